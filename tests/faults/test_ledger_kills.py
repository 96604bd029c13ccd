"""A ledger whose writer is killed at any instant holds every entry that it acknowledged."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from privlm.dp import Ledger, LedgerError, Plan, PoissonSampler, read_ledger

KILLS = 50
PLAN = Plan(
    sampler=PoissonSampler(0.1),
    steps=10**9,
    noise_multiplier=1.0,
    expected_batch_size=1.0,
    delta=1e-5,
)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def write_until_killed(path: Path, acknowledge: int, ledger_type: type[Ledger] = Ledger) -> None:
    with ledger_type(path, dataset="d") as ledger:
        while True:
            ledger.record("a", PLAN)
            os.write(acknowledge, b".")


def acknowledged_by_a_killed_writer(path: Path, seconds: float, write) -> int:
    """How many entries a writer had announced when it was killed ``seconds`` after its first."""
    reading, writing = os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            os.close(reading)
            write(path, writing)
        finally:
            os._exit(70)
    os.close(writing)
    heard = len(os.read(reading, 1))
    time.sleep(seconds)
    os.kill(writer, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
    while chunk := os.read(reading, 1 << 16):
        heard += len(chunk)
    os.close(reading)
    return heard


def test_no_acknowledged_entry_is_lost_over_fifty_kills(tmp_path, rng):
    path, acknowledged = tmp_path / "ledger", 0
    for kill in range(KILLS):
        acknowledged += acknowledged_by_a_killed_writer(
            path, rng.expovariate(1 / 0.004), write_until_killed
        )
        recorded = read_ledger(path).steps("a")
        # Each killed writer may have recorded one entry that it could not announce any more.
        assert acknowledged <= recorded <= acknowledged + kill + 1
    with Ledger(path, dataset="d") as ledger:
        assert ledger.steps("a") == recorded > KILLS


def test_a_writer_that_acknowledges_first_is_caught(tmp_path, rng):
    """The same count notices entries that were announced before they were written."""

    class Late(Ledger):
        held = 0

        def record(self, run: str, plan: Plan, count: int = 1) -> None:
            self.held += 1  # buffered: as many as are announced in milliseconds
            if self.held % 5000 == 0:
                super().record(run, plan, 5000)

    def write(path: Path, acknowledge: int) -> None:
        write_until_killed(path, acknowledge, Late)

    lost = 0
    for _ in range(10):
        path = tmp_path / "ledger"
        before = read_ledger(path).steps("a") if path.exists() else 0
        heard = acknowledged_by_a_killed_writer(path, rng.expovariate(1 / 0.002), write)
        lost += max(0, heard - (read_ledger(path).steps("a") - before))
    assert lost > 0


def test_forks_of_a_writer_record_nothing(tmp_path):
    """Each would write over the entries of the others: lock and end of file are inherited."""
    path, refused = tmp_path / "ledger", 0
    with Ledger(path, dataset="d") as ledger:
        ledger.record("parent", PLAN)
        for number in range(3):
            child = os.fork()
            if child == 0:
                try:
                    ledger.record(f"child {number}", PLAN, 5)
                except LedgerError as error:
                    os._exit(17 if "opened by process" in str(error) else 18)
                finally:
                    os._exit(70)
            refused += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        ledger.record("parent", PLAN)
    assert refused == 3
    assert {run: kinds.total() for run, kinds in read_ledger(path).releases.items()} == {
        "parent": 2
    }
