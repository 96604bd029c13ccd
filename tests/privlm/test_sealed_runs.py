"""Runs whose randomness is sealed: a step that was lost is made again bitwise, or not at all."""

import json
from collections import Counter

import msgspec
import pytest
import torch
from made_up_runs import QUIET, accounted_once, begin, configured, go, ledger_lines, write_documents
from safetensors.torch import load_file

import privlm.steps
from privlm.config import ConfigError
from privlm.dp.ledger import BudgetExceeded
from privlm.dp.releases import Releases, ReplayDiffers
from privlm.runs import train_run
from privlm.steps import NOTE
from protocols.randomness import Stream

BANDED = {"noise_multiplier": 1.0, "correlation": {"kind": "banded", "bands": 3}}


@pytest.fixture(autouse=True, scope="module")
def _accounted_once():
    with accounted_once():
        yield


@pytest.fixture
def base(tmp_path):
    write_documents(tmp_path / "docs")
    return tmp_path


@pytest.fixture
def released(monkeypatch):
    """Every release that was ever made, by step: what an observer of all steps would hold."""
    seen = []
    release = Releases.release

    def watched(self, clipped, joined=None):
        step = self.step
        values = release(self, clipped, joined)
        seen.append((step, torch.cat([v.flatten().clone() for v in values])))
        return values

    monkeypatch.setattr(Releases, "release", watched)
    return seen


def steps_in(out) -> list[dict]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    ("choice", "batch_size"),
    [
        ({"correlation": {"kind": "banded", "bands": 3}}, 12),
        ({"correlation": {"kind": "blt", "buffers": 2}}, 12),
        ({"sampler": {"kind": "cyclic-poisson", "cycle": 2}}, 12),
        ({"unit": "user", "examples_per_user": 2, "user_sampling": "els"}, 3),
        ({"unit": "user", "examples_per_user": 2}, 2),
    ],
    ids=["banded", "blt", "cyclic", "els", "uls"],
)
def test_lost_steps_are_made_again_as_they_were(base, released, choice, batch_size):
    privacy = {"noise_multiplier": 1.0} | choice
    config = configured(base, privacy=privacy, batch_size=batch_size, epochs=2)
    begin(config, base / "out", until=5)
    key = base / "out" / "secret.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_size == 32
    assert len(ledger_lines(base / "out" / "ledger.jsonl")) == 5
    result = go(config, base / "out", resume=True)
    assert Counter(step for step, _ in released) == {
        step: 2 if step in (3, 4) else 1 for step in range(result.steps)
    }
    first = {}
    for step, values in released:
        assert torch.equal(first.setdefault(step, values), values), step
    assert len({tuple(values.tolist()) for values in first.values()}) == result.steps
    assert len(ledger_lines(base / "out" / "ledger.jsonl")) == result.steps
    assert result.steps_lost == 0
    assert not key.exists()


def test_independent_noise_is_drawn_afresh(base, released):
    config = configured(base)
    begin(config, base / "out", until=5)
    assert not (base / "out" / "secret.key").exists()
    result = go(config, base / "out", resume=True)
    assert [step for step, _ in released] == list(range(result.steps))
    assert result.steps_lost == 2


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(base, monkeypatch):
    """Same seed, same weights: nothing of the memory of correlated noise is lost with a process."""
    config = configured(base, privacy=BANDED, batch_size=12)
    monkeypatch.setattr(Stream, "fresh", classmethod(lambda cls, label: cls(b"s" * 32, label)))
    go(config, base / "whole")
    begin(config, base / "broken", until=7)
    go(config, base / "broken", resume=True)
    whole, broken = (load_file(base / n / "model.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


class TestRefused:
    @pytest.fixture
    def begun(self, base):
        config = configured(base, privacy=BANDED, batch_size=12)
        begin(config, base / "out", until=5)
        return config, base / "out"

    def test_another_release_of_a_step(self, begun):
        """Another seed under the same steps would give two releases of one step."""
        config, out = begun
        (out / "secret.key").write_bytes(b"x" * 32)
        before = (out / "checkpoint.safetensors").read_bytes()
        with pytest.raises(ReplayDiffers, match="step 3 was released before"):
            go(config, out, resume=True)
        assert (out / "checkpoint.safetensors").read_bytes() == before
        assert len(ledger_lines(out / "ledger.jsonl")) == 5

    def test_a_missing_key(self, begun):
        config, out = begun
        (out / "secret.key").unlink()
        with pytest.raises(ConfigError, match=r"secret\.key: missing, though 5 steps"):
            go(config, out, resume=True)
        assert not (out / "secret.key").exists()

    def test_a_cut_key(self, begun):
        config, out = begun
        (out / "secret.key").write_bytes(b"x" * 31)
        with pytest.raises(ConfigError, match=r"secret\.key: damaged"):
            go(config, out, resume=True)

    def test_other_microbatches(self, begun, base):
        _, out = begun
        other = configured(base, privacy=BANDED, batch_size=12, microbatch_size=2)
        with pytest.raises(ConfigError, match="differs in microbatch_size"):
            go(other, out, resume=True)


class TestNotes:
    def test_what_a_step_did_is_the_owners_alone(self, base):
        config = configured(base)
        result = go(config, base / "out")
        path = base / "out" / "steps.jsonl"
        assert path.stat().st_mode & 0o777 == 0o600
        assert json.loads(path.read_text().splitlines()[0]) == {"note": NOTE}
        lines = steps_in(base / "out")
        assert [line["step"] for line in lines] == list(range(result.steps))
        assert all(0 <= line["clipped"] <= 1 and line["examples"] < 60 for line in lines)
        assert sum(line["examples"] for line in lines) > 0
        full = [line for line in lines if line["examples"]]
        assert all(
            line["tokens_per_second"] == pytest.approx(16 * line["examples_per_second"])
            and 0 < line["loss"] < 10
            for line in full
        )

    def test_a_resumed_run_has_one_line_a_step_it_took(self, base):
        config = configured(base)
        begin(config, base / "out", until=5)
        with (base / "out" / "steps.jsonl").open("a") as file:
            file.write('{"step": 5, "los')
        result = go(config, base / "out", resume=True)
        assert [line["step"] for line in steps_in(base / "out")] == list(range(12))
        assert result.steps == 12

    def test_epsilon_on_the_way_is_that_of_the_steps_taken(self, base, monkeypatch):
        monkeypatch.setattr(privlm.steps, "FIRST_ACCOUNTING_S", 0.0)
        said = []

        import contextlib

        @contextlib.contextmanager
        def watch(what, steps):
            yield lambda done, note="": said.append(note) if note else None

        result = train_run(configured(base), base / "out", resume=False, watch=watch)
        known = [line["epsilon"] for line in steps_in(base / "out") if line["epsilon"]]
        assert known == sorted(known)
        assert 0 < known[0] < result.guarantee.epsilon * 1.0001
        assert said[0].startswith("ε = ")

    def test_the_adaptive_bound_survives_an_interruption(self, base):
        privacy = {"noise_multiplier": 0.5, "clipping": "adaptive", "max_grad_norm": 1e-3}
        config = configured(base, privacy=privacy)
        begin(config, base / "out", until=6)
        before = steps_in(base / "out")
        go(config, base / "out", resume=True)
        after = steps_in(base / "out")
        # The checkpoint after three steps holds the bound of the fourth.
        assert after[6]["max_grad_norm"] == before[3]["max_grad_norm"] > 1e-3


class TestBudget:
    def test_a_run_ends_before_the_step_that_would_exceed_it(self, base):
        whole = go(configured(base), base / "whole")
        epsilon = whole.guarantee.epsilon * 0.7
        config = configured(base, budget={"epsilon": epsilon})
        result = go(config, base / "out")
        assert 0 < result.steps < result.planned_steps == 12
        assert len(ledger_lines(base / "out" / "ledger.jsonl")) == result.steps
        assert result.spent_on_data_set <= epsilon
        assert (base / "out" / "model.safetensors").exists()
        again = go(config, base / "out", resume=True)
        assert msgspec.structs.replace(again, seconds=result.seconds) == result

    def test_what_others_spent_counts(self, base):
        shared = str(base / "ledger")
        first = go(configured(base, ledger=shared), base / "one")
        config = configured(base, ledger=shared, budget={"epsilon": first.guarantee.epsilon})
        with pytest.raises(BudgetExceeded, match="would exceed the budget"):
            go(config, base / "two")
        assert len(ledger_lines(base / "ledger")) == first.steps
        assert not (base / "two" / "model.safetensors").exists()


def test_quiet_is_quiet(capsys):
    with QUIET("nothing", 3) as show:
        show(1, "ε = 3")
    assert capsys.readouterr() == ("", "")
