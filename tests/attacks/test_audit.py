"""The audit end to end: real text, real training, and engines that are broken on purpose."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

from attacks.membership import MEMBERSHIP
from attacks.scoring import Measurement, measure
from attacks.suite import SuiteConfig, load_suite, run_suite, with_positive_control
from attacks.targets import CanaryConfig, DpSgd, NoProtection, Setup, TrainingSetup, prepare
from attacks.threat import Status
from attacks.white_box import white_box
from privlm.config import (
    ConfigError,
    CorpusConfig,
    ModelConfig,
    PrivacyConfig,
    PublicTraining,
    TokenizerConfig,
)
from privlm.data import DataError
from privlm.dp.ledger import Ledger
from privlm.dp.noise import GaussianMechanism
from privlm.dp.training import OptimizerConfig
from protocols.randomness import Stream

SMALL = Setup(
    corpus=CorpusConfig(context=16),
    tokenizer=TokenizerConfig(vocab_size=300),
    model=ModelConfig(width=32, layers=1, heads=2),
    public=PublicTraining(epochs=1),
    training=TrainingSetup(
        canaries=CanaryConfig(
            new_token=400,
            secrets=20,
            secret_digits=4,
            prompt_tokens=8,
            candidates=64,
            gradients=1000,
        ),
        max_records=300,
    ),
)
ONE = DpSgd(
    name="ε = 1",
    privacy=PrivacyConfig(target_epsilon=1.0),
    epochs=8,
    batch_size=64,
    optimizer=OptimizerConfig(learning_rate=0.2),
)


@contextlib.contextmanager
def unwatched(what, steps):
    yield lambda done: None


def scene_of(setup, *protections, watch=unwatched, ledger_dir=None):
    return prepare(
        setup,
        protections or (NoProtection(),),
        seed=0,
        stream=Stream(bytes(range(32)), "audit"),
        ledger_dir=ledger_dir,
        watch=watch,
    )


@pytest.fixture(scope="module")
def scene():
    return scene_of(SMALL)


@pytest.fixture(scope="module")
def experiment(scene):
    return scene.training


@pytest.fixture
def fixed_streams(monkeypatch):
    """Training draws from a fixed seed, so that the verdict is the same on every run."""
    monkeypatch.setattr(Stream, "fresh", classmethod(lambda cls, label: cls(bytes(32), label)))


def audited(scene, protection, folder):
    target = protection.run(dataclasses.replace(scene, ledger_dir=folder))
    attacks = (*MEMBERSHIP, white_box)
    return measure(target, attacks, Measurement(), np.random.default_rng(0)).findings


def statuses(findings):
    return {f.status for f in findings if f.population not in ("secrets", "engine")}


def engine_of(findings):
    return next(f for f in findings if f.population == "engine")


def with_noise_scaled(monkeypatch, factor):
    whole = GaussianMechanism.noise_std
    monkeypatch.setattr(
        GaussianMechanism, "noise_std", lambda self, bound: factor * whole(self, bound)
    )


def test_unprotected_training_is_a_leak(scene, tmp_path):
    findings = audited(scene, NoProtection(epochs=8), tmp_path)
    assert statuses(findings) == {Status.LEAK}
    best = max(f.lower_bound / f.ceiling for f in findings if f.population == "canaries")
    assert best > 0.9


def test_dp_sgd_stays_within_its_claim_and_on_the_ledger(scene, tmp_path, fixed_streams):
    findings = audited(scene, ONE, tmp_path)
    assert statuses(findings) == {Status.WITHIN_CLAIM}
    assert engine_of(findings).status is Status.NOT_APPLICABLE
    assert {f.attack for f in findings if f.population == "gradients"} == {"white-box"}
    (file,) = tmp_path.iterdir()
    dataset = json.loads(file.read_text().splitlines()[0])["entry"]["dataset"]
    with Ledger(file, dataset=dataset) as ledger:
        assert 0.99 < ledger.spent(1e-5).value <= 1.0


def test_an_engine_without_noise_exceeds_its_claim(scene, tmp_path, fixed_streams, monkeypatch):
    with_noise_scaled(monkeypatch, 0.0)
    findings = audited(scene, ONE, tmp_path)
    assert Status.LEAK in statuses(findings)
    assert max(f.lower_bound for f in findings if f.population == "canaries") > 2.0
    assert engine_of(findings).status is Status.LEAK


def test_members_are_those_whose_coin_said_so(experiment):
    truth, members = experiment.truth, experiment.members
    expected = {
        name
        for name, inside in zip(experiment.candidates.record_ids, truth.member_N, strict=True)
        if inside
    }
    trained_on = {name for name in members.record_ids if not name.startswith("secret-canary")}
    assert trained_on == expected
    planted = [name for name in members.record_ids if name.startswith("secret-canary")]
    assert len(planted) == truth.secret_member_K.sum()
    assert 0.4 < truth.member_N.mean() < 0.6


def test_no_candidate_is_known_to_the_public_model(scene, experiment):
    public = {tuple(row) for row in scene.corpus.blocks.public.ids_NT.tolist()}
    assert not public & {tuple(row) for row in experiment.candidates.ids_NT.tolist()}


def test_the_planted_secret_hides_among_its_alternatives(experiment):
    slots, place_K = experiment.reference.secrets, experiment.truth.secret_place_K
    assert len(set(place_K.tolist())) > 10
    for ids_CT in slots.ids_NCT:
        assert len({tuple(row) for row in ids_CT.tolist()}) == 64
    rows = {tuple(row) for row in experiment.members.ids_NT.tolist()}
    planted_K = experiment.truth.secret_member_K
    for k, (ids_CT, place) in enumerate(zip(slots.ids_NCT, place_K, strict=True)):
        assert (tuple(ids_CT[place].tolist()) in rows) == planted_K[k]


def test_canary_tokens_start_alike(scene):
    reserved = scene.corpus.tokenizer.reserved_ids
    rows = scene.base.head.weight[reserved.start : reserved.stop]
    assert torch.equal(rows, rows[:1].expand_as(rows))


def test_gradient_canaries_that_do_not_fit_are_refused():
    setup = with_canaries(new_token=100, secrets=0, gradients=10**5)
    with pytest.raises(ValueError, match=r"ε = 1: training\.canaries\.gradients: .* plant fewer"):
        scene_of(setup, ONE)


def with_canaries(**canaries):
    training = msgspec.structs.replace(SMALL.training, canaries=CanaryConfig(**canaries))
    return msgspec.structs.replace(SMALL, training=training)


def test_canaries_that_do_not_fit_are_refused():
    setup = with_canaries(new_token=100, secrets=5, prompt_tokens=14, secret_digits=6)
    with pytest.raises(DataError, match="14 prompt and 6 secret tokens, the context holds 16"):
        scene_of(setup)


def test_more_secrets_than_prompts_are_refused():
    setup = with_canaries(new_token=100, secrets=10**6, prompt_tokens=8)
    with pytest.raises(DataError, match=r"canaries\.secrets: 1000000 prompts"):
        scene_of(setup)


def test_a_budget_out_of_reach_is_refused_before_any_training():
    greedy = msgspec.structs.replace(ONE, privacy=PrivacyConfig(target_epsilon=1e-7))
    watched = []

    @contextlib.contextmanager
    def watch(what, steps):
        watched.append(what)
        yield lambda done: None

    with pytest.raises(ValueError, match="protections: ε = 1: epsilon 1e-07 .* cannot be reached"):
        scene_of(SMALL, greedy, watch=watch)
    assert watched == ["planning ε = 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("protections: []", "protections"),
        ("protections: [{type: none}]\nmeasurment: {}", "measurment: unknown key"),
        ("protections: [{type: dp, name: a}]", "dp"),
        ("protections: [{type: none, epochs: many}]", r"protections\[0\]\.epochs|epochs"),
        ("protections: [{type: none}, {type: none}]", "stands twice"),
        ("protections: [{type: none}]\nmeasurement: {attacks: [lira]}", "lira"),
        (
            "protections: [{type: dp-sgd, name: a, privacy: {target_epsilon: -1}}]",
            "target_epsilon|privacy",
        ),
        ("seed: -1\nprotections: [{type: none}]", "seed"),
        ("- 1", "list of keys"),
    ],
)
def test_a_suite_that_cannot_be_names_its_key(tmp_path, text, message):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_suite(path)
    assert str(path) in str(caught.value)


def test_the_default_suite_is_what_the_readme_says():
    suite = load_suite(None)
    assert [p.privacy.target_epsilon for p in suite.protections if isinstance(p, DpSgd)] == [8, 1]
    assert sum(isinstance(p, NoProtection) for p in suite.protections) == 1


def test_a_suite_reports_every_protection_and_the_worst_status(tmp_path):
    config = SuiteConfig(
        protections=(NoProtection(epochs=4),), setup=SMALL, measurement=Measurement()
    )
    result = run_suite(config, ledger_dir=tmp_path, watch=unwatched)
    (row,) = result.results
    assert row.status is Status.LEAK
    assert not row.exceeds_claim
    assert not result.exceeds_claim
    assert result.counts["canaries"] == 400
    assert row.utility.estimate.value in row.utility.estimate.interval


def test_within_a_claim_needs_an_attack_that_works_where_nothing_protects(experiment, tmp_path):
    config = SuiteConfig(protections=(NoProtection(epochs=8), ONE), setup=SMALL)
    plain, private = run_suite(config, ledger_dir=tmp_path, watch=unwatched).results
    assert {f.status for f in private.findings if f.population == "canaries"} == {
        Status.WITHIN_CLAIM
    }
    assert all(
        "where nothing protects the same attack shows" in f.reason
        for f in private.findings
        if f.status is Status.WITHIN_CLAIM
    )
    weak = dataclasses.replace(
        plain,
        findings=tuple(dataclasses.replace(f, lower_bound=0.5) for f in plain.findings),
    )
    raw = dataclasses.replace(
        private,
        findings=tuple(
            dataclasses.replace(f, status=Status.WITHIN_CLAIM)
            for f in private.findings
            # White-box has a positive control of its own, and the engine's laws want none.
            if f.population not in ("gradients", "engine")
        ),
    )
    for others, reason in (
        ((weak,), "shows only ε ≥ 0.50"),
        ((), "add the baseline of this moment"),
    ):
        *_, judged = with_positive_control((*others, raw))
        assert {f.status for f in judged.findings} == {Status.NOT_EVALUABLE}
        assert all(reason in f.reason for f in judged.findings)


@pytest.mark.slow
def test_noise_divided_by_the_root_of_the_batch_exceeds_its_claim(
    tmp_path, fixed_streams, monkeypatch
):
    """At the default suite's size; σ / √256 at a claimed ε = 1."""
    suite = load_suite(None)
    (protection,) = (
        p for p in suite.protections if isinstance(p, DpSgd) and p.privacy.target_epsilon == 1
    )
    scene = scene_of(suite.setup)
    with_noise_scaled(monkeypatch, protection.batch_size**-0.5)
    findings = audited(scene, protection, tmp_path)
    for population in ("canaries", "gradients"):
        assert max(f.lower_bound for f in findings if f.population == population) > 1.0
    assert Status.LEAK in statuses(findings)
    assert engine_of(findings).status is Status.LEAK


@pytest.mark.slow
def test_the_default_audit_from_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from privlm.cli import main; main()", "audit", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "DP-SGD" in done.stdout
    findings = json.loads((tmp_path / "findings.json").read_text())
    by_name = {row["name"]: row["status"] for row in findings["protections"]}
    assert by_name.pop("DP-SGD at ε = 8") in ("within claim", "not evaluable")
    assert by_name == {
        "no protection": "leak",
        "DP-SGD at ε = 1": "within claim",
        "update in clear": "leak",
        "sum of 8 in clear": "leak",
        "secret-shared": "no evidence",
        "hidden states in clear": "leak",
        "noised at ε = 4": "within claim",
    }
    assert (tmp_path / "report.html").stat().st_size > 10_000
