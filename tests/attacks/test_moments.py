"""Aggregation and inference end to end: production code, the exact view, and broken engines."""

import contextlib
import json

import msgspec
import numpy as np
import pytest

from attacks.catalogue import ATTACKS
from attacks.scoring import Measurement, measure
from attacks.suite import SuiteConfig, run_suite
from attacks.targets import (
    AggregationSetup,
    ClearSum,
    ClearUpdate,
    InferenceSetup,
    NoisedSplit,
    PlainSplit,
    SecretShared,
    Setup,
    prepare,
)
from attacks.threat import Moment, Status
from privlm.config import CorpusConfig, ModelConfig, PublicTraining, TokenizerConfig
from privlm.split import protection as split_protection
from protocols.aggregation import additive
from protocols.randomness import Stream
from protocols.ring import Z_2_32

SMALL = Setup(
    corpus=CorpusConfig(context=16, public_share=0.3, private_share=0.5, test_share=0.1),
    tokenizer=TokenizerConfig(vocab_size=300),
    model=ModelConfig(width=32, layers=2, heads=2),
    public=PublicTraining(epochs=1),
    aggregation=AggregationSetup(clients=8, tokens=10),
    inference=InferenceSetup(tokens=12, prompts=48, requests=1000),
)
SHARED = SecretShared(texts=512, trials=6000, weakened_texts=96)
NOISED = NoisedSplit(name="noised", target_epsilon=2.0, clip=4.0)


@contextlib.contextmanager
def unwatched(what, steps):
    yield lambda done: None


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return prepare(
        SMALL,
        (ClearUpdate(), PlainSplit()),
        seed=0,
        stream=Stream(bytes(range(32)), "audit"),
        ledger_dir=tmp_path_factory.mktemp("ledgers"),
        watch=unwatched,
    )


@pytest.fixture
def fixed_streams(monkeypatch):
    """Every run draws from one seed and a count, so that the verdict is the same on every run."""
    drawn = [0]

    def fresh(cls, label):
        drawn[0] += 1
        return cls(bytes(32), f"{label} {drawn[0]}")

    monkeypatch.setattr(Stream, "fresh", classmethod(fresh))


def audited(scene, protection):
    target = protection.run(scene)
    return target, {
        (finding.population, finding.attack): finding
        for finding in measure(
            target, list(ATTACKS.values()), Measurement(), np.random.default_rng(0)
        ).findings
    }


def test_a_clear_update_gives_its_text_away(scene, fixed_streams):
    target, findings = audited(scene, ClearUpdate(texts=64))
    found = findings["texts", "gradient span"]
    assert found.status is Status.LEAK
    assert found.estimate.value >= 0.95
    assert found.further["texts recovered exactly"].value >= 0.9
    assert target.cost.sent_bytes / target.details["parameters"] == pytest.approx(4, rel=0.01)


def test_a_sum_of_more_tokens_than_dimensions_hides_their_order(scene, fixed_streams):
    """8 texts of 10 tokens, width 32; which tokens occur still shows in the embedding's rows."""
    _, findings = audited(scene, ClearSum(texts=160))
    found = findings["texts", "gradient span"]
    assert found.estimate.value == 0.0
    assert found.further["tokens recovered as a set"].value > 0.8
    assert found.status is Status.LEAK


def test_shared_updates_show_nothing_by_the_rule(scene, fixed_streams):
    _, findings = audited(scene, SHARED)
    assert {finding.status for finding in findings.values()} == {Status.NO_EVIDENCE}
    assert set(findings) == {("texts", "gradient span"), ("uploads", "matching")}
    matched = findings["uploads", "matching"]
    assert matched.n == 6000
    assert matched.estimate.interval.high <= 1 / 64 + 0.02
    assert findings["texts", "gradient span"].n == 512 * 10


@pytest.mark.slow
def test_three_servers_of_which_two_collude(scene, fixed_streams):
    three = msgspec.structs.replace(SHARED, servers=3)
    target, findings = audited(scene, three)
    assert findings["uploads", "matching"].status is Status.NO_EVIDENCE
    assert "server-1 and server-2" in target.claim.adversary


def test_too_few_trials_are_not_evaluable(scene, fixed_streams):
    _, findings = audited(scene, msgspec.structs.replace(SHARED, trials=4999, texts=160))
    assert findings["uploads", "matching"].status is Status.NOT_EVALUABLE
    assert "5,000" in findings["uploads", "matching"].reason


def not_fresh(monkeypatch):
    """Clients derive their seeds from a constant."""
    inside = additive.Client.__init__

    def init(self, name, cohort, update_P, stream):
        inside(self, name, cohort, update_P, Stream(bytes(32), "constant"))

    monkeypatch.setattr(additive.Client, "__init__", init)


def not_masked(monkeypatch):
    """The last share is the secret itself."""
    monkeypatch.setattr(type(Z_2_32), "sub_mask_", lambda self, x, stream: None)


def half_masked(monkeypatch):
    """The mask of every second element is zero."""
    whole = type(Z_2_32).sub_mask_

    def half(self, x, stream):
        before = x.clone()
        whole(self, x, stream)
        x[::2] = before[::2]

    monkeypatch.setattr(type(Z_2_32), "sub_mask_", half)


@pytest.mark.parametrize("broken", [not_fresh, not_masked, half_masked])
def test_a_build_whose_shares_do_not_hide_is_caught(scene, fixed_streams, monkeypatch, broken):
    broken(monkeypatch)
    _, findings = audited(scene, msgspec.structs.replace(SHARED, trials=400, texts=64))
    assert findings["uploads", "matching"].status is Status.LEAK
    assert findings["uploads", "matching"].estimate.value > 0.9


@pytest.mark.parametrize("rounds", [10**9, 8])
def test_seeds_that_come_again_in_later_rounds_are_caught(
    scene, fixed_streams, monkeypatch, rounds
):
    """Each client has a seed of its own, and keeps it for so many rounds."""
    inside, made = additive.Client.__init__, {}

    def init(self, name, cohort, update_P, stream):
        made[name] = made.get(name, -1) + 1
        inside(self, name, cohort, update_P, Stream(bytes(32), f"{name} {made[name] // rounds}"))

    monkeypatch.setattr(additive.Client, "__init__", init)
    _, findings = audited(scene, msgspec.structs.replace(SHARED, trials=400, texts=64))
    assert findings["uploads", "matching"].status is Status.LEAK
    assert findings["texts", "gradient span"].status is Status.LEAK


def test_one_seed_for_all_servers_is_caught_where_two_of_three_collude(
    scene, fixed_streams, monkeypatch
):
    inside = additive.share_additive

    def share(secret, ring, parties, stream, out=None):
        seed = stream.bytes(32)

        class Constant:
            def bytes(self, count):
                return seed

        return inside(secret, ring, parties, Constant(), out=out)

    monkeypatch.setattr(additive, "share_additive", share)
    few = msgspec.structs.replace(SHARED, servers=3, trials=400, texts=64)
    _, findings = audited(scene, few)
    assert findings["uploads", "matching"].status is Status.LEAK
    assert findings["texts", "gradient span"].status is Status.LEAK


def test_seeds_that_two_clients_share_are_caught(scene, fixed_streams, monkeypatch):
    """Neighbours do, as if a seed had been derived from half of the client's number."""
    inside = additive.Client.__init__

    def init(self, name, cohort, update_P, stream):
        seed, number = cohort.session.ljust(32, b"\0"), int(name.removeprefix("client-"))
        inside(self, name, cohort, update_P, Stream(seed, f"{number // 2}"))

    monkeypatch.setattr(additive.Client, "__init__", init)
    _, findings = audited(scene, msgspec.structs.replace(SHARED, trials=400, texts=64))
    assert findings["uploads", "matching"].status is Status.LEAK


def test_plain_hidden_states_are_read_back(scene, fixed_streams):
    target, findings = audited(scene, PlainSplit())
    assert findings["prompts", "nearest neighbour"].estimate.value >= 0.95
    assert {finding.status for finding in findings.values()} == {Status.LEAK}
    told = findings["requests", "distinguish"]
    assert told.lower_bound == pytest.approx(told.ceiling)
    assert target.utility.estimate.value == pytest.approx(target.utility.baseline, abs=1e-4)
    # There and back, 4 bytes for each of 32 numbers, and the envelopes.
    assert 256 < target.cost.sent_bytes < 300


def test_noised_hidden_states_stay_within_their_claim(scene, fixed_streams):
    _, findings = audited(scene, NOISED)
    for population in ("requests", "canary rows"):
        assert findings[population, "distinguish"].status is Status.WITHIN_CLAIM
    assert findings["canary rows", "distinguish"].lower_bound > 0.5
    assert findings["prompts", "nearest neighbour"].status is Status.NOT_APPLICABLE
    assert findings["prompts", "nearest neighbour"].estimate.value < 0.2


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_an_engine_with_too_little_noise_exceeds_its_claim(
    scene, fixed_streams, monkeypatch, factor
):
    whole = split_protection.noised
    monkeypatch.setattr(
        split_protection,
        "noised",
        lambda rows, std, stream: rows if factor == 0 else whole(rows, factor * std, stream),
    )
    _, findings = audited(scene, NOISED)
    assert findings["canary rows", "distinguish"].status is Status.LEAK
    assert findings["canary rows", "distinguish"].lower_bound > 2.0


def test_a_row_of_each_moment_in_one_suite(tmp_path, fixed_streams):
    config = SuiteConfig(
        protections=(ClearUpdate(texts=16), PlainSplit(), NOISED),
        setup=msgspec.structs.replace(
            SMALL, inference=InferenceSetup(tokens=12, prompts=16, requests=1000)
        ),
    )
    result = run_suite(config, ledger_dir=tmp_path, watch=unwatched)
    assert [row.moment for row in result.results] == [
        Moment.AGGREGATION,
        Moment.INFERENCE,
        Moment.INFERENCE,
    ]
    assert result.record_ids == ()
    assert not result.exceeds_claim
    noised = result.results[2]
    assert noised.status is Status.WITHIN_CLAIM
    assert any("where nothing protects" in finding.reason for finding in noised.findings)


@pytest.mark.parametrize(
    ("setup", "protection", "message"),
    [
        ({"aggregation": AggregationSetup(tokens=17)}, ClearUpdate(), "aggregation.tokens 17"),
        ({"inference": InferenceSetup(tokens=17)}, PlainSplit(), "inference.tokens 17"),
        ({"inference": InferenceSetup(first=2, last=2)}, PlainSplit(), "first < last"),
        ({"inference": InferenceSetup(last=3)}, PlainSplit(), "model.layers, which is 2"),
        ({}, ClearUpdate(texts=10**6), "private texts of 10 tokens are needed"),
        ({}, ClearSum(texts=15), "fewer than two sums of 8 clients"),
        ({"aggregation": AggregationSetup(tokens=10, bits=32)}, ClearUpdate(), "would wrap"),
        ({}, NoisedSplit(name="loud", target_epsilon=1e5, clip=1.0), "tails are sparse"),
        ({"inference": InferenceSetup(tokens=12, prompts=10**6)}, PlainSplit(), "are needed"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(tmp_path, setup, protection, message):
    watched = []

    @contextlib.contextmanager
    def watch(what, steps):
        watched.append(what)
        yield lambda done: None

    config = SuiteConfig(protections=(protection,), setup=msgspec.structs.replace(SMALL, **setup))
    with pytest.raises(ValueError, match=f"protections: {protection.name}: .*{message}"):
        run_suite(config, ledger_dir=tmp_path, watch=watch)
    assert watched == []


def test_every_pass_over_a_view_runs_fresh_rounds(scene, fixed_streams):
    (texts, uploads) = SHARED.run(scene).tasks
    first, again = (next(iter(uploads.view.trials)).held_HP for _ in range(2))
    assert (first == again).float().mean() < 0.01
    assert len(texts.truth.victims) == len(texts.truth.decoys) == 512
    assert not set(texts.truth.victims) & set(texts.truth.decoys)


def test_the_published_sum_tells_nothing_of_the_choice(scene, fixed_streams, monkeypatch):
    sums = []
    inside = additive.run_round

    def run(cohort, updates_KP, streams):
        done = inside(cohort, updates_KP, streams)
        sums.append(done.aggregate.sum_P)
        return done

    monkeypatch.setattr(additive, "run_round", run)
    (_, uploads) = SHARED.run(scene).tasks
    sums.clear()
    trials = [trial for trial, _ in zip(uploads.view.trials, range(50), strict=False)]
    assert len(trials) == 50
    assert not sums[0].any()  # the first round, in which all upload zeros
    assert len({tuple(sum_P.tolist()) for sum_P in sums[1:]}) == 1


def test_places_are_drawn_anew_for_every_game(scene, fixed_streams):
    same = msgspec.structs.replace(SHARED, trials=400, weakened_trials=400)
    other = msgspec.structs.replace(same, name="another")
    games = [protection.run(scene).tasks[1] for protection in (same, other)]
    places = [game.truth.place_N for game in (*games, *games[0].weakened)]
    for one in range(4):
        for two in range(one):
            assert (places[one] == places[two]).mean() < 0.1


def test_every_view_needs_an_attack(tmp_path):
    config = SuiteConfig(
        protections=(PlainSplit(),), setup=SMALL, measurement=Measurement(attacks=("loss",))
    )
    with pytest.raises(ValueError, match="none of them sees a SentActivations"):
        run_suite(config, ledger_dir=tmp_path, watch=unwatched)


def test_two_attacks_of_one_name_are_refused(tmp_path):
    config = SuiteConfig(protections=(PlainSplit(),), setup=SMALL)
    with pytest.raises(ValueError, match="attacks: the name 'loss' stands twice"):
        run_suite(config, ledger_dir=tmp_path, watch=unwatched, attacks=(ATTACKS["loss"],))


def test_rounds_without_public_text_are_refused_before_any_training(tmp_path):
    """Private documents are long, public ones shorter than a client's text."""
    private, public = tmp_path / "private.jsonl", tmp_path / "public.jsonl"
    rng = np.random.default_rng(0)
    words = ["word" + str(n) for n in range(50)]
    private.write_text(
        "".join(
            json.dumps({"id": f"d{n}", "text": " ".join(rng.choice(words, 200))}) + "\n"
            for n in range(20)
        )
    )
    public.write_text(
        "".join(json.dumps({"id": f"p{n}", "text": "w" + "ab"[n % 2]}) + "\n" for n in range(4))
    )
    corpus = CorpusConfig(source=str(private), public_source=str(public), context=16)
    setup = msgspec.structs.replace(SMALL, corpus=corpus, tokenizer=TokenizerConfig(kind="byte"))
    config = SuiteConfig(protections=(ClearUpdate(texts=8),), setup=setup)
    with pytest.raises(ValueError, match="no public text has 10 tokens"):
        run_suite(config, ledger_dir=tmp_path, watch=unwatched)
