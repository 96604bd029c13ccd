"""The ledger never under-counts: killed, torn, altered, shared or out of disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from privlm.dp.accounting import epsilon_of
from privlm.dp.ledger import Ledger, LedgerError
from privlm.dp.plan import Plan
from privlm.dp.sampling import PoissonSampler


def plan(q: float = 0.1, sigma: float = 1.0) -> Plan:
    return Plan(
        sampler=PoissonSampler(q),
        steps=100,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        expected_batch_size=10.0,
        delta=1e-5,
    )


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


def test_altered_and_removed_entries_are_noticed(tmp_path):
    path = tmp_path / "l"
    with Ledger(path, dataset="d") as ledger:
        for _ in range(3):
            ledger.record("a", plan())
    a, b, c = lines(path)
    for tampered in (
        a + c,
        b + c,
        a + b + b + c,
        forged(a, noise_multiplier=9.0) + b + c,
        a + forged(b, count=0) + c,
        a + b"not json\n" + c,
        a + b"\n" + b,
    ):
        path.write_bytes(tampered)
        with pytest.raises(LedgerError, match="line [12].*backup|line [123].*backup"):
            Ledger(path, dataset="d")


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


def test_no_release_is_lost_when_the_process_is_killed(tmp_path):
    """A writer that announces each release after recording it is killed 50 times, anywhere."""
    path, announced = tmp_path / "l", 0
    for kill in range(50):
        reading, writing = os.pipe()
        writer = os.fork()
        if writer == 0:
            with Ledger(path, dataset="d") as ledger:
                while True:
                    ledger.record("a", plan())
                    os.write(writing, b".")
        os.close(writing)
        time.sleep(0.005 + 0.0007 * kill)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        while chunk := os.read(reading, 1 << 16):
            announced += len(chunk)
        os.close(reading)
        with Ledger(path, dataset="d") as ledger:
            assert announced <= ledger.steps("a") <= announced + kill + 1
    assert announced > 50
