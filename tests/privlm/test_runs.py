"""Runs in a folder: what is refused, what is resumed, and that nothing gets cheaper by it."""

import contextlib
import json
import shutil

import msgspec
import pytest
import torch
from made_up_runs import (  # noqa
    QUIET,
    RECORDS,
    STEPS,
    accounted_once,
    begin,
    configured,
    corpus_in,
    go,
    ledger_lines,
    write_documents,
)
from safetensors.torch import load_file

import privlm.dp.history
import privlm.dp.plan
import privlm.runs
from privlm.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from privlm.config import ConfigError
from privlm.data import DataError
from privlm.dp.clipping import NonFiniteGradient
from privlm.dp.ledger import LedgerError
from privlm.dp.training import OptimizerConfig
from privlm.evaluation import NonFinitePrediction
from privlm.models import TinyConfig, TinyDecoder
from privlm.runs import train_run


@pytest.fixture(autouse=True, scope="module")
def _accounted_once():
    with accounted_once():
        yield


@pytest.fixture
def base(tmp_path):
    write_documents(tmp_path / "docs")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("finished")
    write_documents(base / "docs")
    return base, go(configured(base), base / "out")


@pytest.fixture
def done(finished, tmp_path):
    """A finished run to spoil: its configuration, a copy of its folder, its result."""
    base, result = finished
    shutil.copytree(base / "out", tmp_path / "out")
    return configured(base), tmp_path / "out", result


class TestResult:
    def test_the_guarantee_is_what_the_plan_and_the_ledger_say(self, done):
        _, out, result = done
        record = json.loads((out / "run.json").read_text())
        plan = msgspec.convert(record["plan"], privlm.dp.plan.Plan)
        assert result.guarantee == plan.guarantee()
        assert result.records == RECORDS
        assert result.steps == plan.steps == STEPS == len(ledger_lines(out / "ledger.jsonl"))
        assert result.spent_on_data_set == result.guarantee.epsilon
        assert (result.unit, result.steps_lost) == ("block", 0)
        assert 0 < result.bits_per_byte < result.base_bits_per_byte

    def test_the_weights_are_those_of_the_last_checkpoint(self, done):
        _, out, _ = done
        weights, saved = (
            load_file(out / "model.safetensors"),
            load_file(out / "checkpoint.safetensors"),
        )
        assert all(torch.equal(saved[f"model.{name}"], value) for name, value in weights.items())

    def test_private_files_are_the_owners_alone(self, done):
        _, out, _ = done
        for name in ("run.json", "ledger.jsonl", "checkpoint.safetensors"):
            assert (out / name).stat().st_mode & 0o077 == 0

    def test_a_budget_is_met(self, base):
        config = configured(base, privacy={"target_epsilon": 3.0})
        result = go(config, base / "out")
        assert 2.9 < result.guarantee.epsilon <= 3.0
        assert go(config, base / "out", resume=True).guarantee == result.guarantee


class TestFinished:
    def test_resuming_reports_again_and_trains_nothing(self, done, monkeypatch):
        config, out, result = done
        before = (out / "model.safetensors").stat().st_mtime_ns
        monkeypatch.setattr(privlm.runs, "_train", None)
        assert go(config, out, resume=True) == result
        assert (out / "model.safetensors").stat().st_mtime_ns == before

    def test_what_other_runs_spent_since_is_counted(self, base):
        shared = str(base / "ledger")
        first = configured(base, ledger=shared)
        second = configured(base, ledger=shared, privacy={"noise_multiplier": 2.0}, epochs=1)
        one, two = go(first, base / "one"), go(second, base / "two")
        assert one.spent_on_data_set == one.guarantee.epsilon
        assert two.spent_on_data_set > max(one.guarantee.epsilon, two.guarantee.epsilon)
        again = go(first, base / "one", resume=True)
        assert again.guarantee == one.guarantee
        assert again.spent_on_data_set == two.spent_on_data_set
        assert len(ledger_lines(base / "ledger")) == one.steps + two.steps

    @pytest.mark.parametrize("spoil", ["result.json", "model.safetensors"])
    def test_a_lost_or_damaged_result_is_made_again_for_nothing(self, done, spoil):
        config, out, result = done
        if spoil == "result.json":
            (out / spoil).write_text("{")
        else:
            (out / spoil).unlink()
        again = go(config, out, resume=True)
        assert msgspec.structs.replace(again, seconds=result.seconds) == result
        assert len(ledger_lines(out / "ledger.jsonl")) == result.steps

    def test_a_ledger_that_forgot_is_refused(self, done):
        config, out, _ = done
        lines = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        (out / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
        with pytest.raises(LedgerError, match="only 11 of its 12 steps.*restore"):
            go(config, out, resume=True)


class TestResumed:
    def test_lost_steps_stay_paid_for(self, base):
        config = configured(base)
        begin(config, base / "out", until=5)
        assert len(ledger_lines(base / "out" / "ledger.jsonl")) == 5
        result = go(config, base / "out", resume=True)
        assert (result.steps, result.steps_lost) == (12, 2)
        assert len(ledger_lines(base / "out" / "ledger.jsonl")) == 12

    def test_the_public_model_is_not_trained_again(self, base, monkeypatch):
        config = configured(base)
        begin(config, base / "out", until=1)
        monkeypatch.setattr(privlm.runs, "public_base_model", None)
        assert go(config, base / "out", resume=True).steps_lost == 1

    def test_knobs_of_memory_and_safety_may_change(self, base):
        begin(configured(base), base / "out", until=4)
        result = go(
            configured(base, microbatch_size=2, checkpoint_every=1), base / "out", resume=True
        )
        assert result.steps_lost == 1

    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"privacy": {"noise_multiplier": 1.1}}, "privacy"),
            ({"privacy": None}, "privacy"),
            ({"epochs": 3, "batch_size": 20}, "epochs, batch_size"),
            ({"ledger": "/tmp/other"}, "ledger"),
        ],
    )
    def test_another_configuration_is_refused(self, done, changes, names):
        config, out, _ = done
        changed = msgspec.structs.replace(
            config, **{k: getattr(configured(out, **changes), k) for k in changes}
        )
        with pytest.raises(ConfigError, match=rf"run\.json: .*differs in {names}\)"):
            go(changed, out, resume=True)

    def test_changed_documents_are_refused(self, base):
        config = configured(base)
        begin(config, base / "out", until=2)
        for path in (base / "docs").glob("*/*.txt"):
            original = path.read_text()
            path.write_text(original.replace("fox", "cat", 1))
            if original != path.read_text():
                with pytest.raises(ConfigError, match="the documents changed"):
                    go(config, base / "out", resume=True)
            path.write_text(original)
        assert go(config, base / "out", resume=True).steps_lost == 2

    def test_from_another_working_directory_it_finds_its_ledger(self, base, monkeypatch):
        (base / "elsewhere").mkdir()
        config = configured(base, ledger="spent/ledger.jsonl")
        monkeypatch.chdir(base)
        begin(config, base / "out", until=2)
        monkeypatch.chdir(base / "elsewhere")
        assert go(config, base / "out", resume=True).steps_lost == 2
        assert len(ledger_lines(base / "spent" / "ledger.jsonl")) == 12
        assert not (base / "elsewhere" / "spent").exists()

    def test_a_moved_folder_takes_its_ledger_along(self, base):
        config = configured(base)
        begin(config, base / "out", until=4)
        (base / "out").rename(base / "moved")
        assert go(config, base / "moved", resume=True).steps_lost == 1


class TestDamaged:
    @pytest.fixture
    def begun(self, base):
        config = configured(base)
        begin(config, base / "out", until=5)
        return config, base / "out"

    def refused(self, begun, kind, match) -> None:
        config, out = begun
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(kind, match=match) as error:
            go(config, out, resume=True)
        assert str(out) in str(error.value)
        assert "\n" not in str(error.value)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before

    def test_missing_ledger(self, begun):
        (begun[1] / "ledger.jsonl").unlink()
        self.refused(begun, LedgerError, "the ledger of this run is missing; restore it")

    @pytest.mark.parametrize("left", [0, 2])
    def test_ledger_rolled_back_behind_the_checkpoint(self, begun, left):
        path = begun[1] / "ledger.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:left]))
        self.refused(begun, LedgerError, f"3 private steps were taken and only {left} are on")

    def test_altered_ledger(self, begun):
        path = begun[1] / "ledger.jsonl"
        path.write_bytes(
            path.read_bytes().replace(b'"noise_multiplier":1.0', b'"noise_multiplier":9.0')
        )
        self.refused(begun, LedgerError, "line 1: entries were altered")

    def test_missing_checkpoint(self, begun):
        (begun[1] / "checkpoint.safetensors").unlink()
        self.refused(begun, CheckpointError, "missing, though 5 private steps were taken")

    def test_cut_checkpoint(self, begun):
        path = begun[1] / "checkpoint.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        self.refused(begun, CheckpointError, "not readable as a checkpoint")

    def test_checkpoint_of_another_run(self, begun, base):
        begin(begun[0], base / "other", until=4)
        name = "checkpoint.safetensors"
        shutil.copy(base / "other" / name, begun[1] / name)
        self.refused(begun, CheckpointError, "belongs to run .*, not to .* of this folder")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 3}', "\x00" * 50])
    def test_unreadable_record(self, begun, text):
        (begun[1] / "run.json").write_text(text)
        self.refused(begun, ConfigError, r"run\.json: damaged .*restore it from a backup")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("steps", 1200),
            ("noise_multiplier", 5.0),
            ("delta", 1e-4),
            ("clipping", {"type": "flat", "max_grad_norm": 3.0}),
            ("expected_batch_size", 2.0),
            ("sampler", {"type": "poisson", "sampling_probability": 0.01}),
        ],
    )
    def test_a_plan_that_does_not_follow_from_the_configuration(self, begun, key, value):
        path = begun[1] / "run.json"
        record = json.loads(path.read_text())
        record["plan"][key] = value
        path.write_text(json.dumps(record))
        self.refused(begun, ConfigError, "its plan does not follow from its configuration")

    def test_a_plan_removed(self, begun):
        path = begun[1] / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": None}))
        self.refused(begun, ConfigError, "its plan does not follow")

    def test_less_noise_than_the_budget_needs(self, base):
        config = configured(base, privacy={"target_epsilon": 3.0})
        begin(config, base / "out", until=2)
        path = base / "out" / "run.json"
        record = json.loads(path.read_text())
        record["plan"]["noise_multiplier"] *= 0.9
        path.write_text(json.dumps(record))
        self.refused((config, base / "out"), ConfigError, "its plan does not follow")

    def test_more_noise_than_was_added_so_far(self, base):
        """The plan fits the budget, but its steps are not those on the ledger."""
        config = configured(base, privacy={"target_epsilon": 3.0})
        begin(config, base / "out", until=2)
        path = base / "out" / "run.json"
        record = json.loads(path.read_text())
        record["plan"]["noise_multiplier"] *= 1.1
        path.write_text(json.dumps(record))
        self.refused((config, base / "out"), ConfigError, "not the one whose steps stand in")

    def test_not_a_number_in_the_model(self, begun):
        config, out = begun
        model = TinyDecoder(
            TinyConfig(vocab_size=257, context=16, width=16, layers=1, heads=2),
            torch.Generator().manual_seed(0),
        )
        optimizer = config.optimizer.build(list(model.parameters()))
        run = json.loads((out / "run.json").read_text())["run"]
        path = out / "checkpoint.safetensors"
        stood = load_checkpoint(path, model, optimizer, run=run)
        with torch.no_grad():
            next(model.parameters())[:] = float("nan")
        save_checkpoint(path, model, optimizer, stood)
        paid = len(ledger_lines(out / "ledger.jsonl"))
        with pytest.raises(NonFiniteGradient, match="^private training: .*not finite; nothing was"):
            go(config, out, resume=True)
        assert len(ledger_lines(out / "ledger.jsonl")) == paid


class TestRefusedBeforeItBegins:
    """Bad input leaves no folder, no ledger and no other trace."""

    def refused(self, base, kind, match, **changes) -> None:
        (base / "in").mkdir(exist_ok=True)
        with pytest.raises(kind, match=match) as error:
            go(configured(base, **changes), base / "in" / "deep" / "out")
        assert "\n" not in str(error.value)
        assert not any((base / "in").iterdir())

    def test_a_batch_larger_than_the_data(self, base):
        for privacy in ({"noise_multiplier": 1.0}, None):
            self.refused(
                base, ValueError, r"batch_size 5000 exceeds", batch_size=5000, privacy=privacy
            )

    def test_an_epsilon_that_cannot_be_reached(self, base):
        self.refused(
            base,
            ValueError,
            "epsilon 1e-08 at delta 1e-300 cannot be reached: .*take fewer steps",
            privacy={"target_epsilon": 1e-8, "delta": 1e-300},
        )

    def test_a_document_longer_than_the_context(self, base):
        corpus = corpus_in(base / "docs", unit="document")
        self.refused(base, DataError, "document 'p.*' has .* tokens.*truncate", corpus=corpus)

    def test_documents_that_cannot_be_read(self, base):
        corpus = corpus_in(base / "docs", source=str(base / "none"))
        self.refused(base, DataError, "none does not exist; give", corpus=corpus)
        (base / "empty").mkdir()
        corpus = corpus_in(base / "docs", source=str(base / "empty"))
        self.refused(base, DataError, "empty holds no .txt file", corpus=corpus)
        (base / "one.txt").write_text("only one")
        corpus = corpus_in(base / "docs", source=str(base / "one.txt"))
        shared = {"source": corpus["source"], "public_share": 0.3}
        self.refused(base, DataError, r"one\.txt: none of 1 documents fell to the", corpus=shared)
        (base / "same.jsonl").write_text('{"text": "the same"}\n' * 5)
        same = str(base / "same.jsonl")
        corpus = corpus_in(base / "docs", source=same, public_source=same)
        self.refused(base, DataError, r"same\.jsonl: all 5 records repeat", corpus=corpus)
        (base / "docs" / "private" / "bad.txt").write_bytes(b"\xff")
        self.refused(base, DataError, r"bad\.txt, line 1: byte 0 is not valid UTF-8")

    def test_a_ledger_that_cannot_be(self, base):
        (base / "plain").write_text("my only copy of this text")
        self.refused(base, LedgerError, "not a ledger entry", ledger=str(base / "plain"))
        assert (base / "plain").read_text() == "my only copy of this text"
        self.refused(base, LedgerError, "cannot be opened", ledger=str(base / "docs"))
        self.refused(base, LedgerError, "cannot be opened", ledger=str(base / "plain" / "l"))
        self.refused(base, LedgerError, "not a regular file", ledger="/dev/null")
        self.refused(base, LedgerError, "cannot be opened.*null", ledger="a\0b")

    def test_another_data_set_on_the_ledger(self, base):
        go(configured(base, ledger=str(base / "l"), epochs=0.1), base / "out")
        corpus = corpus_in(base / "docs", context=8)
        self.refused(
            base, LedgerError, "belongs to data set", ledger=str(base / "l"), corpus=corpus
        )

    def test_ctrl_c_while_the_documents_are_read(self, base):
        @contextlib.contextmanager
        def watch(what, steps):
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            train_run(configured(base), base / "out", resume=False, watch=watch)
        assert not (base / "out").exists()


class TestFolder:
    def test_places_that_are_none(self, base):
        config = configured(base)
        (base / "file").write_text("")
        for out in (base / "file", base / "file" / "out", base / "a\0b"):
            with pytest.raises(ConfigError, match="cannot be made a folder .*another --out"):
                go(config, out)
            with pytest.raises(ConfigError, match="there is no run to resume"):
                go(config, out, resume=True)
        assert (base / "file").read_text() == ""

    def test_nothing_to_resume_makes_nothing(self, base):
        for out in (base / "none", base / "docs"):
            with pytest.raises(ConfigError, match="no run to resume; leave --resume out"):
                go(configured(base), out, resume=True)
        assert not (base / "none").exists()

    def test_a_folder_in_use_for_something_else_is_left_alone(self, base):
        (base / "out").mkdir()
        (base / "out" / ".mine.1.new").write_text("x")
        (base / "out" / "thesis.tex").write_text("x")
        with pytest.raises(ConfigError, match=r"not empty, it holds thesis\.tex; choose another"):
            go(configured(base), base / "out")
        assert {p.name for p in (base / "out").iterdir()} == {".mine.1.new", "thesis.tex"}

    def test_a_run_is_not_started_over(self, done):
        config, out, _ = done
        with pytest.raises(ConfigError, match="a run lies there already; add --resume"):
            go(config, out)

    def test_what_a_killed_start_left_is_no_obstacle(self, base):
        (base / "out").mkdir()
        (base / "out" / "ledger.jsonl").touch()
        (base / "out" / ".run.json.17.new").write_text("{")
        go(configured(base, epochs=0.1), base / "out")
        assert not list((base / "out").glob(".*"))

    def test_a_folder_that_may_not_be_written(self, base, monkeypatch):
        monkeypatch.setattr("privlm.run_folder.os.access", lambda *_: False)
        with pytest.raises(ConfigError, match="no permission to write"):
            go(configured(base), base / "out")
        assert not (base / "out").exists()


class TestDiverged:
    wild = OptimizerConfig(kind="sgd", learning_rate=1e30)

    def test_base_model(self, base):
        config = configured(base)
        public = msgspec.structs.replace(config.public, epochs=5, optimizer=self.wild)
        config = msgspec.structs.replace(config, public=public)
        with pytest.raises((NonFiniteGradient, NonFinitePrediction), match="^public base model: "):
            go(config, base / "out")
        assert not (base / "out" / "ledger.jsonl").read_bytes()

    def test_private_training(self, base):
        config = msgspec.structs.replace(configured(base), optimizer=self.wild)
        with pytest.raises(
            (NonFiniteGradient, NonFinitePrediction), match="^(private|the trained)"
        ):
            go(config, base / "out")
        assert not (base / "out" / "model.safetensors").exists()
        assert not (base / "out" / "result.json").exists()


def test_an_unprotected_run_is_resumed_without_a_ledger(base):
    config = configured(base, privacy=None)
    begin(config, base / "out", until=5)
    result = go(config, base / "out", resume=True)
    assert (result.guarantee, result.spent_on_data_set, result.steps_lost) == (None, None, 0)
    assert result.steps == 12
    assert not (base / "out" / "ledger.jsonl").exists()
    assert go(config, base / "out", resume=True) == result
