"""The ledger never under-counts: killed, torn, altered, shared or out of disk."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from privlm.dp import (
    AdaptiveClipping,
    BallsInBinsSampler,
    Banded,
    Budget,
    BudgetExceeded,
    CyclicPoissonSampler,
    ExampleLevelSampling,
    FixedSizeSampler,
    FlatClipping,
    Ledger,
    LedgerError,
    Plan,
    PoissonSampler,
    UserLevelSampling,
    epsilon_of,
    read_ledger,
)
from privlm.dp.accounting import composed
from privlm.dp.listing import list_ledgers


def plan(q: float = 0.1, sigma: float = 1.0, **more) -> Plan:
    asked = {
        "sampler": PoissonSampler(q),
        "steps": 100,
        "noise_multiplier": sigma,
        "expected_batch_size": 10.0,
        "delta": 1e-5,
    }
    return Plan(**asked | more)


def test_what_was_recorded_is_there_when_it_is_opened_again(tmp_path):
    with Ledger(tmp_path / "new" / "ledger.jsonl", dataset="d") as ledger:
        assert ledger.spent(1e-5).value == 0.0
        ledger.record("a", plan(), count=3)
        ledger.record("b", plan(sigma=2.0))
        ledger.record("a", plan())
    with Ledger(tmp_path / "new" / "ledger.jsonl", dataset="d") as ledger:
        assert (ledger.steps("a"), ledger.steps("b"), ledger.steps("c")) == (4, 1, 0)


def test_spending_composes_over_runs(tmp_path):
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        for run in "ab":
            ledger.record(run, plan(), count=50)
        assert ledger.spent(1e-5) == epsilon_of(plan().event(), 1e-5)
        one_run = ledger.spent(1e-5).value
        ledger.record("c", plan(sigma=0.8), count=50)
        assert ledger.spent(1e-5).value > one_run


def test_full_batches_are_composed_without_amplification(tmp_path):
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", plan(q=1.0), count=100)
        assert ledger.spent(1e-5) == epsilon_of(plan(q=1.0).event(), 1e-5)


def test_a_second_writer_is_refused(tmp_path):
    with Ledger(tmp_path / "l", dataset="d"), pytest.raises(LedgerError, match="in use"):
        Ledger(tmp_path / "l", dataset="d")
    Ledger(tmp_path / "l", dataset="d").close()


def test_another_data_set_is_refused(tmp_path):
    with Ledger(tmp_path / "l", dataset="one") as ledger:
        ledger.record("a", plan())
    with pytest.raises(LedgerError, match="line 1.*own ledger"):
        Ledger(tmp_path / "l", dataset="two")


def test_a_closed_ledger_records_nothing(tmp_path):
    ledger = Ledger(tmp_path / "l", dataset="d")
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.record("a", plan())


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_torn_by_a_crash_was_never_released_and_is_dropped(tmp_path, kept):
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", plan())
        ledger.record("a", plan())
    whole = lines(tmp_path / "l")
    (tmp_path / "l").write_bytes(whole[0] + whole[1][:kept])
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        assert ledger.steps("a") == 1
        ledger.record("a", plan())
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        assert ledger.steps("a") == 2


def forged(line: bytes, **changes) -> bytes:
    parsed = json.loads(line)
    parsed["entry"].update(changes)
    return json.dumps(parsed).encode() + b"\n"


def test_entries_altered_or_removed_before_the_last_are_noticed(tmp_path):
    path = tmp_path / "l"
    with Ledger(path, dataset="d") as ledger:
        for _ in range(3):
            ledger.record("a", plan())
    a, b, c = lines(path)
    for tampered in (
        a + c,
        b + c,
        a + b + b + c,
        forged(a, spending=json.loads(a)["entry"]["spending"] | {"noise_multiplier": 9.0}) + b + c,
        a + forged(b, count=0) + c,
        a + b"not json\n" + c,
        a + b"\n" + b,
    ):
        path.write_bytes(tampered)
        with pytest.raises(LedgerError, match="line [12].*backup|line [123].*backup"):
            Ledger(path, dataset="d")


def test_the_chain_has_no_key_and_does_not_notice_a_cut_or_rewritten_file(tmp_path):
    """What the documentation says that nobody may rely on."""
    path, other = tmp_path / "l", tmp_path / "m"
    for place, count in ((path, 9), (other, 1)):
        with Ledger(place, dataset="d") as ledger:
            ledger.record("a", plan(), count)
            ledger.record("a", plan())
    path.write_bytes(lines(path)[0])
    assert read_ledger(path).steps("a") == 9
    path.write_bytes(other.read_bytes())
    assert read_ledger(path).steps("a") == 2


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path):
    """A real limit on the file's size makes the write fail half way."""
    script = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_dp_ledger import plan
from privlm.dp.ledger import Ledger, LedgerError
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Ledger(path, dataset="d") as ledger:
    ledger.record("a", plan())
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, resource.RLIM_INFINITY))
    try:
        ledger.record("a", plan())
    except LedgerError as error:
        assert "nothing was released" in str(error), error
    else:
        sys.exit("the write went through")
    assert path.read_bytes() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    ledger.record("a", plan())
    assert ledger.steps("a") == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "l"), str(Path(__file__).parent)],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_entry_is_on_disk_when_record_returns(tmp_path, monkeypatch):
    """A power cut is no kill: what was not synced may be gone although the file seemed whole."""
    calls = []
    for name in ("pwrite", "fsync"):
        original = getattr(os, name)
        monkeypatch.setattr(
            f"privlm.dp.ledger.os.{name}",
            lambda fd, *rest, name=name, original=original: (
                calls.append((name, fd)),
                original(fd, *rest),
            )[1],
        )
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        calls.clear()
        ledger.record("a", plan())
        assert [name for name, _ in calls] == ["pwrite", "fsync"]
        assert len({fd for _, fd in calls}) == 1


def test_correlated_steps_of_one_run_compose_jointly(tmp_path):
    banded = plan(sampler=CyclicPoissonSampler(0.1, 8), correlation=Banded(8))
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        for _ in range(20):
            ledger.record("a", banded)
        assert ledger.spent(1e-5) == epsilon_of(composed([banded.event(20)]), 1e-5)
        assert ledger.spent(1e-5).value < epsilon_of(plan().event(20), 1e-5).value


def test_rounds_of_two_runs_are_not_merged(tmp_path):
    """Five steps of ten bins are one participation; twice five steps are two, in other bins."""
    bins = plan(sampler=BallsInBinsSampler(10))
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        for run in "ab":
            ledger.record(run, bins, count=5)
        assert ledger.spent(1e-5) == epsilon_of(composed([bins.event(20)]), 1e-5)


def test_costs_that_cannot_be_added_are_refused_before_they_are_written(tmp_path):
    by_user = plan(users=UserLevelSampling(3))
    fixed = plan(sampler=FixedSizeSampler(5, 50), neighbours="replace-one")
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", plan())
        before = (tmp_path / "l").read_bytes()
        with pytest.raises(LedgerError, match="per user cannot be added.*per example"):
            ledger.record("b", by_user)
        assert (tmp_path / "l").read_bytes() == before
        ledger.record("c", fixed)
        assert ledger.spent(1e-5).accountant == "RDP"
    with Ledger(tmp_path / "m", dataset="d") as ledger:
        ledger.record("a", plan(users=ExampleLevelSampling(2)))
        with pytest.raises(LedgerError, match="different relations"):
            ledger.record(
                "b",
                plan(
                    sampler=FixedSizeSampler(5, 50),
                    neighbours="replace-one",
                    users=UserLevelSampling(2),
                ),
            )


@pytest.mark.parametrize(("version", "opening"), [(1, {}), (2, {"version": 2})])
def test_a_ledger_of_an_earlier_version_is_refused_by_name(tmp_path, version, opening):
    old = {"dataset": "d", "run": "a", "sampling_probability": 0.1, "noise_multiplier": 1.0}
    line = json.dumps(opening | {"entry": old | {"count": 1}, "chain": "00"}, separators=(",", ":"))
    for text in (line + "\n", line[:40]):
        (tmp_path / "l").write_text(text)
        with pytest.raises(LedgerError, match=f"line 1: written as .privlm ledger {version}."):
            Ledger(tmp_path / "l", dataset="d")
        assert (tmp_path / "l").read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        {"clipping": FlatClipping(2.0)},
        {"clipping": AdaptiveClipping()},
        {"neighbours": "replace-one"},
        {"expected_batch_size": 20.0},
        {"noise_multiplier": 0.9},
        {"sampler": PoissonSampler(0.2)},
        {"users": UserLevelSampling(2)},
    ],
)
def test_a_run_fits_no_plan_whose_releases_or_promise_differ(tmp_path, change):
    """The same noise under two clipping bounds, say, would cancel in the difference."""
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", plan())
        other = msgspec.structs.replace(plan(), **change)
        assert ledger.fits("a", plan())
        assert ledger.fits("a", plan(steps=200))
        assert not ledger.fits("a", other)
        assert ledger.fits("b", other)
    assert read_ledger(tmp_path / "l").fits("a", plan())
    assert not read_ledger(tmp_path / "l").fits("a", other)


def test_whole_numbers_given_as_integers_are_read_back_as_what_they_are(tmp_path):
    whole = plan(clipping=FlatClipping(2), expected_batch_size=10, sigma=1)
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", whole)
        ledger.record("a", whole)
    assert read_ledger(tmp_path / "l").fits("a", whole)


def test_the_strongest_relation_on_record_is_kept_for_each_run(tmp_path):
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", plan())
        ledger.record("b", plan(neighbours="replace-one"))
    history = read_ledger(tmp_path / "l")
    assert history.neighbours == history.of_run("b").neighbours == "replace-one"
    assert history.of_run("a").neighbours == "add-or-remove-one"
    with Ledger(tmp_path / "m", dataset="d") as ledger:
        ledger.record("a", plan(users=UserLevelSampling(2), neighbours="replace-one"))
        with pytest.raises(LedgerError, match="different relations"):
            ledger.record("b", plan(users=ExampleLevelSampling(2)))


def test_more_steps_than_correlated_noise_was_made_for_are_not_recorded(tmp_path):
    banded = plan(sampler=CyclicPoissonSampler(0.1, 4), correlation=Banded(4), steps=8)
    with Ledger(tmp_path / "l", dataset="d") as ledger:
        ledger.record("a", banded, count=8)
        with pytest.raises(ValueError, match="made for 8 steps.*9"):
            ledger.record("a", banded)
        ledger.record("b", banded)  # another run has noise of its own
        assert (ledger.steps("a"), ledger.steps("b")) == (8, 1)


def test_another_writer_is_noticed_before_an_entry_is_overwritten(tmp_path):
    with Ledger(tmp_path / "m", dataset="d") as ledger:
        ledger.record("longer name", plan(), count=7)
    path = tmp_path / "l"
    with Ledger(path, dataset="d") as ledger:
        path.write_bytes((tmp_path / "m").read_bytes())  # as a file system without locks allows
        with pytest.raises(LedgerError, match="another has written.*Nothing was released"):
            ledger.record("a", plan())
        assert ledger.steps("a") == 0
    assert path.read_bytes() == (tmp_path / "m").read_bytes()


class TestBudget:
    def test_a_run_stops_before_the_step_that_would_exceed(self, tmp_path):
        budget = Budget(1.5, 1e-5)
        with Ledger(tmp_path / "l", dataset="d", budget=budget) as ledger:
            ledger.record("before", plan(sigma=2.0), count=10)
            allowed = ledger.allowance("a", plan(sigma=2.0), budget)
            for _ in range(allowed):
                ledger.record("a", plan(sigma=2.0))
            with pytest.raises(BudgetExceeded, match="budget of ε = 1.5"):
                ledger.record("a", plan(sigma=2.0))
            assert ledger.steps("a") == allowed > 5
            assert ledger.spent(1e-5).value <= 1.5
            more = epsilon_of(plan(sigma=2.0).event(10 + allowed + 1), 1e-5)
            assert more.value > 1.5
        with (
            Ledger(tmp_path / "l", dataset="d", budget=budget) as ledger,
            pytest.raises(BudgetExceeded, match="Nothing was released"),
        ):
            ledger.record("a", plan(sigma=2.0))

    def test_a_plan_fits_the_budget_that_it_was_made_for(self, tmp_path):
        made = Plan.for_budget(
            target_epsilon=1.0,
            delta=1e-5,
            sampler=PoissonSampler(0.1),
            steps=37,
            expected_batch_size=1.0,
        )
        with Ledger(tmp_path / "l", dataset="d", budget=Budget(1.0, 1e-5)) as ledger:
            for _ in range(37):
                ledger.record("a", made)
            assert ledger.steps("a") == 37
            with pytest.raises(BudgetExceeded):
                ledger.record("a", made)

    def test_another_run_in_between_is_counted(self, tmp_path):
        with Ledger(tmp_path / "l", dataset="d", budget=Budget(2.0, 1e-5)) as ledger:
            ledger.record("a", plan(sigma=2.0))
            with pytest.raises(BudgetExceeded):
                ledger.record("b", plan(sigma=0.5), count=100)
            ledger.record("b", plan(sigma=2.0), count=30)
            room = ledger.allowance("a", plan(sigma=2.0), Budget(2.0, 1e-5))
            with pytest.raises(BudgetExceeded):
                ledger.record("a", plan(sigma=2.0), count=room + 1)

    def test_a_step_planned_for_replacing_one_is_paid_for_as_such(self, tmp_path):
        """Room counted for adding or removing one is no room for replacing one."""
        budget = Budget(4.0, 1e-5)
        with Ledger(tmp_path / "l", dataset="d", budget=budget) as ledger:
            adding, replacing = plan(sigma=2.0), plan(sigma=2.0, neighbours="replace-one")
            ledger.record("a", adding)
            room = ledger.allowance("b", replacing, budget)
            assert room < ledger.allowance("b", adding, budget)
            with pytest.raises(BudgetExceeded):
                ledger.record("a", replacing, count=room + 1)
            ledger.record("a", replacing, count=room)
            everything = epsilon_of(adding.event(room + 1), 1e-5, "replace-one")
            assert ledger.spent(1e-5) == everything
            assert ledger.spent(1e-5).value <= 4.0
            with pytest.raises(BudgetExceeded):  # the promise of replacing is over all of it
                ledger.record("b", adding, count=20)
        with Ledger(tmp_path / "l", dataset="d", budget=budget) as ledger:
            assert ledger.spent(1e-5) == everything

    def test_a_longer_plan_of_the_same_kind_has_room_of_its_own(self, tmp_path):
        with Ledger(tmp_path / "l", dataset="d", budget=Budget(20.0, 1e-5)) as ledger:
            ledger.record("a", plan(steps=3), count=3)
            ledger.record("a", plan(steps=6), count=3)
            assert ledger.steps("a") == 6

    def test_few_accountings_however_many_steps(self, tmp_path, monkeypatch):
        from privlm.dp import calibration

        calls = []
        original = calibration.epsilon_of
        monkeypatch.setattr(
            calibration, "epsilon_of", lambda *a, **k: (calls.append(a), original(*a, **k))[1]
        )
        with Ledger(tmp_path / "l", dataset="d", budget=Budget(20.0, 1e-5)) as ledger:
            for _ in range(60):
                ledger.record("a", plan())
        assert 0 < len(calls) < 20


class TestListing:
    def filled(self, folder: Path) -> None:
        for name, dataset, runs in (("1", "x", "ab"), ("2", "y", "c"), ("3", "x", "d")):
            with Ledger(folder / f"{name}.jsonl", dataset=dataset * 64) as ledger:
                for run in runs:
                    ledger.record(run, plan(), count=50)

    def test_every_run_alone_and_all_of_a_data_set_together(self, tmp_path):
        self.filled(tmp_path)
        listing = list_ledgers(tmp_path, 1e-5)
        x, y = listing.data_sets
        assert [run.run for run in x.runs] == ["a", "b", "d"]
        assert x.files == (str(tmp_path / "1.jsonl"), str(tmp_path / "3.jsonl"))
        assert x.epsilon == epsilon_of(plan().event(150), 1e-5).value
        assert y.epsilon == y.runs[0].epsilon == epsilon_of(plan().event(50), 1e-5).value
        assert listing.unreadable == {}

    def test_equal_names_in_two_files_are_two_runs(self, tmp_path):
        """Half a run of 50 bins is one participation; two halves of two runs are two."""
        bins = plan(sampler=BallsInBinsSampler(50))
        for name in "12":
            with Ledger(tmp_path / f"{name}.jsonl", dataset="d") as ledger:
                ledger.record("train", bins, count=25)
        (listed,) = list_ledgers(tmp_path, 1e-5).data_sets
        assert listed.epsilon == epsilon_of(composed([bins.event(100)]), 1e-5).value
        assert [(run.run, run.file, run.steps) for run in listed.runs] == [
            ("train", str(tmp_path / f"{name}.jsonl"), 25) for name in "12"
        ]
        assert {run.epsilon for run in listed.runs} == {epsilon_of(bins.event(25), 1e-5).value}

    def test_a_file_whose_cost_cannot_be_added_is_named_and_not_counted(self, tmp_path):
        for name, users in (("1", None), ("2", UserLevelSampling(3))):
            with Ledger(tmp_path / f"{name}.jsonl", dataset="d") as ledger:
                ledger.record("a", plan(users=users), count=5)
        listing = list_ledgers(tmp_path, 1e-5)
        (listed,) = listing.data_sets
        assert (listed.unit, len(listed.runs)) == ("example", 1)
        assert listed.epsilon == epsilon_of(plan().event(5), 1e-5).value
        assert list(listing.unreadable) == [str(tmp_path / "2.jsonl")]
        assert "per user cannot be added" in listing.unreadable[str(tmp_path / "2.jsonl")]

    def test_a_file_without_a_known_cost_is_named_and_not_counted(self, tmp_path, monkeypatch):
        self.filled(tmp_path)
        banded = plan(sampler=CyclicPoissonSampler(0.1, 4), correlation=Banded(4), steps=8)
        with monkeypatch.context() as patch, Ledger(tmp_path / "4.jsonl", dataset="z") as ledger:
            patch.setattr("privlm.dp.spending.Spending.check_steps", lambda *_: None)
            ledger.record("a", banded, count=9)
        listing = list_ledgers(tmp_path, 1e-5)
        assert [data_set.dataset[0] for data_set in listing.data_sets] == ["x", "y"]
        assert "made for 8 steps" in listing.unreadable[str(tmp_path / "4.jsonl")]
        with pytest.raises(LedgerError, match="made for 8 steps"):
            list_ledgers(tmp_path / "4.jsonl", 1e-5)

    def test_reading_needs_no_lock_and_drops_a_torn_line(self, tmp_path):
        path = tmp_path / "l"
        with Ledger(path, dataset="d") as ledger:
            ledger.record("a", plan())
            ledger.record("a", plan())
            assert read_ledger(path).steps("a") == 2
            whole = lines(path)
            path.write_bytes(whole[0] + whole[1][:50])
            assert read_ledger(path).steps("a") == 1
            assert path.read_bytes() == whole[0] + whole[1][:50]

    def test_what_is_no_ledger_is_named_and_not_counted(self, tmp_path):
        self.filled(tmp_path)
        (tmp_path / "letters.jsonl").write_text('{"text": "Dear Ann"}\n')
        (name, reason), *rest = list_ledgers(tmp_path, 1e-5).unreadable.items()
        assert name.endswith("letters.jsonl")
        assert "line 1: not a ledger entry" in reason
        assert rest == []
        with pytest.raises(LedgerError, match="not a ledger entry"):
            list_ledgers(tmp_path / "letters.jsonl", 1e-5)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(LedgerError, match="no ledger lies there"):
            list_ledgers(tmp_path, 1e-5)
        with pytest.raises(LedgerError, match="cannot be read: No such file"):
            list_ledgers(tmp_path / "l", 1e-5)
