"""``privlm train`` killed, interrupted, out of disk and raced: privacy is never under-counted.

Every run is a process of its own, forked from one that has paid for the imports.
It announces each release to a file the moment that the release exists, and may be
told to die at its n-th file operation.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

from privlm.config import CorpusConfig, TokenizerConfig
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.sampling import PoissonSampler
from privlm.finetuning import load_corpus

DEADLINE = 60.0
STEPS = 16
BATCH = 36

FORGE = r"""
import functools, json, os, resource, signal, sys, time
from pathlib import Path
import opacus.grad_sample
import privlm.cli, privlm.dp.history, privlm.dp.ledger, privlm.dp.plan, privlm.runs, privlm.steps
import privlm.summary
from privlm.dp.accounting import epsilon_of
from privlm.dp.noise import GaussianMechanism
from privlm.dp.training import PlainGradients

cache = {}
def remembered(event, delta, *relation):
    # Accounting has its own tests; here it would be most of the time.
    key = repr(event), delta, *relation
    if key not in cache:
        cache[key] = epsilon_of(event, delta, *relation)
    return cache[key]
privlm.dp.history.epsilon_of = privlm.dp.plan.epsilon_of = remembered
privlm.steps.epsilon_of = remembered
plan = privlm.dp.plan.Plan(  # what the standard run will ask
    sampler=privlm.dp.sampling.PoissonSampler(float(sys.argv[1])), steps=int(sys.argv[2]),
    noise_multiplier=1.0, expected_batch_size=1.0, delta=1e-5)
plan.guarantee()
import dp_accounting
remembered(dp_accounting.ComposedDpEvent([plan.event()]), 1e-5, plan.neighbours)

import torch  # its first optimiser step imports for a second
weight = torch.nn.Parameter(torch.zeros(1))
weight.grad = torch.zeros(1)
torch.optim.AdamW([weight]).step()

def counted(function, order, state):
    def wrapped(*args, **kwargs):
        state["operations"] += 1
        if state["operations"] == order["die_at"]:
            if order["die_after"]:
                function(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def child(order):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    announced = os.open(order["announced"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    release, following = GaussianMechanism.release, PlainGradients.next
    def slow_release(self, clipped, stream, **how):
        released = release(self, clipped, stream, **how)
        os.write(announced, b".")
        time.sleep(order["slow"])
        return released
    def slow_next(self):
        time.sleep(order["slow"] if order["slow_public"] else 0)
        return following(self)
    GaussianMechanism.release, PlainGradients.next = slow_release, slow_next
    step_sgd = torch.optim.SGD.step
    def slow_step(self, *args, **kwargs):
        time.sleep(order["slow_optimizer"])
        return step_sgd(self, *args, **kwargs)
    torch.optim.SGD.step = slow_step
    if order["die_at"]:
        state = {"operations": 0}
        for place, name in ((os, "fsync"), (os, "pwrite"), (Path, "replace"), (Path, "mkdir")):
            setattr(place, name, counted(getattr(place, name), order, state))
    if order["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], resource.RLIM_INFINITY))
    sys.argv = ["privlm", *order["arguments"]]
    privlm.cli.main()

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            child(json.loads(line))
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print("pid", pid, flush=True)
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forge:
    """Starts runs from a warm process, one at a time."""

    under_way = 0

    def __init__(self, records: int) -> None:
        self.records = records
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORGE, str(BATCH / records), str(STEPS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == b"ready\n"

    def told(self, what: str) -> int:
        word, number = self.process.stdout.readline().decode().split()
        assert word == what
        return int(number)

    def start(self, order: dict) -> int:
        if self.under_way:  # left by a test that failed
            os.kill(self.under_way, signal.SIGKILL)
            self.end()
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        self.under_way = self.told("pid")
        return self.under_way

    def end(self) -> int:
        code = self.told("code")
        self.under_way = 0
        return code

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(DEADLINE)


def write_documents(folder: Path) -> None:
    text = (
        "the quick brown fox jumps over a lazy dog while seven wizards quietly mix old "
        "potions beneath tall dark towers"
    )
    words = text.split()
    rng = random.Random(0)
    for part, count in (("private", 7), ("public", 3), ("test", 2)):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            text = " ".join(rng.choice(words) for _ in range(60))
            (folder / part / f"{part}{number}.txt").write_text(text)


def corpus_in(folder: Path) -> dict:
    return {
        "source": str(folder / "private"),
        "public_source": str(folder / "public"),
        "test_source": str(folder / "test"),
        "context": 16,
    }


CONFIG = {
    "privacy": {"noise_multiplier": 1.0},
    "tokenizer": {"kind": "byte"},
    "model": {"width": 16, "layers": 1, "heads": 2},
    "public": {"epochs": 2},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01},  # counts its own steps
    "batch_size": BATCH,
    "checkpoint_every": 5,
}


class Run:
    """One output folder and everything that ever happened to it."""

    def __init__(self, forge: Forge, folder: Path, config: dict = CONFIG) -> None:
        self.forge, self.folder, self.out = forge, folder, folder / "out"
        folder.mkdir(exist_ok=True)
        if not (folder / "docs").exists():
            write_documents(folder / "docs")
        settings = config | {
            "corpus": corpus_in(folder / "docs"),
            "epochs": STEPS * BATCH / forge.records,
        }
        (folder / "config.yaml").write_text(json.dumps(settings))
        self.stdout = self.stderr = ""

    def start(self, *options: str, **order) -> int:
        arguments = ["train", str(self.folder / "config.yaml"), "--out", str(self.out), "--json"]
        return self.forge.start(
            {
                "stdout": str(self.folder / "stdout"),
                "stderr": str(self.folder / "stderr"),
                "announced": str(self.folder / "announced"),
                "slow": 0,
                "slow_public": False,
                "slow_optimizer": 0,
                "die_at": 0,
                "die_after": False,
                "file_limit": 0,
            }
            | order
            | {"arguments": arguments + list(options)}
        )

    def end(self) -> int:
        code = self.forge.end()
        self.stdout = (self.folder / "stdout").read_text()
        self.stderr = (self.folder / "stderr").read_text()
        assert "Traceback" not in self.stderr, self.stderr
        return code

    def go(self, *options: str, **order) -> int:
        self.start(*options, **order)
        return self.end()

    def go_on(self, **order) -> int:
        """What a user does next: resume what began, start what did not."""
        begun = (self.out / "run.json").exists()
        return self.go(*(["--resume"] if begun else []), **order)

    def announced(self) -> int:
        path = self.folder / "announced"
        return path.stat().st_size if path.exists() else 0

    def paid(self, ledger: Path | None = None) -> Counter:
        path = ledger or self.out / "ledger.jsonl"
        entries = [json.loads(line)["entry"] for line in path.read_text().splitlines()]
        return Counter(entry["run"] for entry in entries)

    def run_id(self) -> str:
        return json.loads((self.out / "run.json").read_text())["run"]

    def checkpoint(self) -> dict:
        with safe_open(self.out / "checkpoint.safetensors", framework="pt") as file:
            saved = json.loads(file.metadata()["checkpoint"])
            steps = "optimizer.0.step"
            saved["taken"] = int(file.get_tensor(steps)) if steps in file.keys() else 0  # noqa: SIM118
        return saved

    def said_so_far(self) -> str:
        path = self.folder / "stderr"
        return path.read_text() if path.exists() else ""

    def ended(self) -> bool:
        return (self.out / "result.json").exists()

    def wait_for(self, condition) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, self.said_so_far()
            time.sleep(0.005)

    def check_whole(self) -> None:
        """After a death anywhere: every file is whole, and nothing left unpaid."""
        if (self.out / "ledger.jsonl").exists():
            assert self.announced() <= self.paid().total() <= STEPS
        else:
            assert self.announced() == 0
        for name in ("run.json", "tokenizer.json", "result.json"):
            if (self.out / name).exists():
                json.loads((self.out / name).read_text())
        if (self.out / "checkpoint.safetensors").exists():
            assert self.checkpoint()["step"] <= self.paid().total()

    def check_finished(self) -> dict:
        result = json.loads(self.stdout)
        assert self.paid() == {self.run_id(): STEPS}
        assert self.announced() <= STEPS == result["steps"]
        assert result["steps_lost"] == STEPS - self.checkpoint()["taken"]
        assert result["spent_on_data_set"] == result["guarantee"]["epsilon"] > 1
        assert json.loads((self.out / "result.json").read_text()) == result
        expected = {
            "checkpoint.safetensors",
            "ledger.jsonl",
            "model.safetensors",
            "result.json",
            "run.json",
            "steps.jsonl",
            "tokenizer.json",
        }
        assert {path.name for path in self.out.iterdir()} == expected
        return result


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    documents = tmp_path_factory.mktemp("sample") / "docs"
    write_documents(documents)
    corpus = msgspec.convert(corpus_in(documents), CorpusConfig)
    blocks = load_corpus(corpus, TokenizerConfig(kind="byte"), seed=0).blocks
    warm = Forge(len(blocks.private))
    yield warm
    warm.close()


@pytest.fixture
def run(forge, tmp_path):
    return Run(forge, tmp_path / "run")


def test_an_undisturbed_run_loses_nothing(run):
    assert run.go() == 0
    assert run.check_finished()["steps_lost"] == 0
    assert run.announced() == STEPS


class TestKilled:
    """An undisturbed run makes some 65 file operations; each is a place to die before or after."""

    def die_and_go_on(self, run: Run, places: list[tuple[int, bool]]) -> bool:
        """Die at each place in turn, one process a place; then finish. False: it never died."""
        died = False
        for die_at, die_after in places:
            code = run.go_on(die_at=die_at, die_after=die_after)
            assert code in (0, -signal.SIGKILL), run.stderr
            run.check_whole()
            died = died or code != 0
        assert run.go_on() == 0, run.stderr
        run.check_finished()
        return died

    @pytest.mark.parametrize("die_at", [1, 4, 6, 12, 25, 26, 58])
    def test_at_a_file_operation(self, forge, tmp_path, die_at):
        for after in (False, True):
            run = Run(forge, tmp_path / f"run-{after}")
            assert self.die_and_go_on(run, [(die_at, after)])

    @pytest.mark.slow
    def test_at_every_file_operation(self, forge, tmp_path):
        for after in (False, True):
            for die_at in range(1, 200):
                run = Run(forge, tmp_path / f"run-{die_at}-{after}")
                if not self.die_and_go_on(run, [(die_at, after)]):
                    break
            assert 55 < die_at < 90

    @pytest.mark.slow
    def test_again_and_again(self, forge, tmp_path):
        """Up to six deaths a run, at operations of each life that a fixed seed draws."""
        rng = random.Random(1)
        for attempt in range(40):
            run = Run(forge, tmp_path / f"run-{attempt}")
            deaths = [(rng.randint(1, 25), rng.random() < 0.5) for _ in range(rng.randint(2, 6))]
            assert self.die_and_go_on(run, deaths)

    def test_losses_of_several_deaths_add_up(self, run):
        """Checkpoints at 0 and 5: die after 3 releases, then 4 more, then after the last."""
        self.kill_at(run, 3)
        assert run.paid().total() == 3
        self.kill_at(run, 7)
        assert (run.checkpoint()["step"], run.checkpoint()["steps_lost"]) == (5, 3)
        self.kill_at(run, 8)
        assert run.go("--resume") == 0
        assert run.check_finished()["steps_lost"] == 3 + 2 + 1

    def kill_at(self, run: Run, releases: int) -> None:
        pid = run.start(*(["--resume"] if run.out.exists() else []), slow=0.2)
        run.wait_for(lambda: run.announced() == releases)
        os.kill(pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL

    def test_at_any_moment(self, forge, tmp_path):
        """kill -9 after a random time, up to five times a run."""
        rng = random.Random(2)
        for attempt in range(2):
            run, deaths = Run(forge, tmp_path / f"run-{attempt}"), 0
            while True:
                begun = (run.out / "run.json").exists()
                pid = run.start(*(["--resume"] if begun else []), slow=0.1)
                if deaths < 5:
                    time.sleep(rng.uniform(0.02, 0.5))
                    with contextlib.suppress(ProcessLookupError):  # it was done before
                        os.kill(pid, signal.SIGKILL)
                code = run.end()
                run.check_whole()
                deaths += code != 0
                if code == 0:
                    break
            run.check_finished()
            assert deaths > 1


class TestSealed:
    """Noise that is correlated over the steps: a step that was lost is made again as it was."""

    CONFIG = CONFIG | {
        "privacy": {"noise_multiplier": 1.0, "correlation": {"kind": "banded", "bands": 3}},
        "batch_size": 24,
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    }

    def releases(self, run: Run) -> dict[int, str]:
        path = run.out / "steps.jsonl"
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return {line["step"]: line["release"] for line in whole}

    def test_no_step_is_released_in_two_ways(self, forge, tmp_path):
        """kill -9 five times at random moments: what was known of a step stays true of it."""
        rng = random.Random(3)
        run = Run(forge, tmp_path / "run", self.CONFIG)
        known: dict[int, str] = {}
        deaths = repeated = 0
        while True:
            begun = (run.out / "run.json").exists()
            pid = run.start(*(["--resume"] if begun else []), slow_optimizer=0.05)
            if deaths < 5:
                target = max([*known, -1]) + rng.randint(1, 3)
                run.wait_for(lambda wanted=target: wanted in self.releases(run) or run.ended())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = run.end()
            for step, release in self.releases(run).items():
                repeated += step in known
                assert known.setdefault(step, release) == release
            deaths += code != 0
            if code == 0:
                break
            assert (run.out / "secret.key").exists()
        steps = json.loads(run.stdout)["steps"]
        assert run.paid() == {run.run_id(): steps}
        assert sorted(known) == list(range(steps))
        assert len(set(known.values())) == steps
        assert json.loads(run.stdout)["steps_lost"] == 0
        assert deaths > 1
        assert repeated > 0
        assert not (run.out / "secret.key").exists()


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_private_training_saves_the_step_in_progress(self, run, number):
        pid = run.start(slow=0.1)
        run.wait_for(lambda: run.announced() >= 3)
        os.kill(pid, number)
        assert run.end() == 130
        assert "--resume" in run.stderr
        assert run.stdout == ""
        assert run.checkpoint()["step"] == run.announced() == run.paid().total() < STEPS
        assert run.go("--resume") == 0
        assert run.check_finished()["steps_lost"] == 0
        assert run.announced() == STEPS

    def test_twice_stops_at_once_and_pays_for_the_step(self, run):
        pid = run.start(slow=1.0)
        run.wait_for(lambda: run.announced() == 1)
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        before = time.monotonic()
        os.kill(pid, signal.SIGINT)
        assert run.end() == 130
        assert time.monotonic() - before < 0.6
        assert "--resume" in run.stderr
        assert run.checkpoint()["step"] == 0
        assert run.go("--resume") == 0
        assert run.check_finished()["steps_lost"] == 1

    def test_public_training_is_repeated(self, run):
        pid = run.start(slow=0.3, slow_public=True)
        run.wait_for(lambda: "public base" in run.said_so_far())
        os.kill(pid, signal.SIGINT)
        assert run.end() == 130
        assert "--resume" in run.stderr
        assert {path.name for path in run.out.iterdir()} == {
            "run.json",
            "tokenizer.json",
            "ledger.jsonl",
        }
        assert run.paid().total() == 0
        assert run.go("--resume") == 0
        assert run.check_finished()["steps_lost"] == 0

    def test_an_unprotected_run_goes_on_from_its_checkpoint(self, forge, tmp_path):
        config = CONFIG | {"privacy": None}
        run = Run(forge, tmp_path / "plain", config)
        pid = run.start(slow=0.1, slow_public=True)
        run.wait_for((run.out / "checkpoint.safetensors").exists)
        os.kill(pid, signal.SIGINT)
        assert run.end() == 130
        saved = run.checkpoint()
        assert saved["step"] == saved["taken"] < STEPS
        assert run.go("--resume") == 0
        result = json.loads(run.stdout)
        assert (result["guarantee"], result["steps"], result["steps_lost"]) == (None, STEPS, 0)
        assert run.checkpoint()["taken"] == STEPS
        assert not (run.out / "ledger.jsonl").exists()


class TestFullDisk:
    def check_refused(self, run: Run, what: str) -> None:
        assert f"{what}" in run.stderr
        assert "free some" in run.stderr
        assert run.stdout == ""
        assert not list(run.out.glob(".*"))
        run.check_whole()

    @pytest.mark.parametrize(
        ("limit", "what", "left"),
        [
            (500, "run.json", None),
            (30_000, "checkpoint.safetensors", 0),
            (100_000, "checkpoint.safetensors", 5),  # the optimiser's state makes it larger
        ],
    )
    def test_while_a_file_is_written(self, run, limit, what, left):
        assert run.go(file_limit=limit) == 2
        self.check_refused(run, f"{run.out / what}: ")
        if left is None:
            assert not run.out.exists()
        else:
            assert run.paid().total() == left
        assert run.go_on() == 0, run.stderr
        assert run.check_finished()["steps_lost"] == (left or 0)

    def test_while_the_ledger_is_written(self, forge, tmp_path):
        """A ledger that other runs have filled reaches the limit before any checkpoint does."""
        first = Run(forge, tmp_path / "run", CONFIG | {"ledger": str(tmp_path / "ledger")})
        assert first.go() == 0
        record = json.loads((first.out / "run.json").read_text())
        plan = Plan(
            sampler=PoissonSampler(0.001),
            steps=10**6,
            noise_multiplier=50.0,
            expected_batch_size=1.0,
            delta=1e-5,
        )
        with Ledger(tmp_path / "ledger", dataset=record["dataset"]) as ledger:
            while (tmp_path / "ledger").stat().st_size < 200_000:
                ledger.record("filler", plan)
        full = (tmp_path / "ledger").stat().st_size
        second = Run(forge, tmp_path / "run", CONFIG | {"ledger": str(tmp_path / "ledger")})
        second.out = tmp_path / "run" / "second"
        assert second.go(file_limit=full + 1000) == 2
        assert f"{tmp_path / 'ledger'}: " in second.stderr
        assert "nothing was released; free some disk space" in second.stderr
        paid = second.paid(tmp_path / "ledger")
        assert 0 < paid[second.run_id()] < STEPS
        assert second.announced() == STEPS + paid[second.run_id()]
        assert second.go("--resume") == 0
        assert second.paid(tmp_path / "ledger")[second.run_id()] == STEPS
        result = json.loads(second.stdout)
        assert result["steps_lost"] == paid[second.run_id()] == STEPS - second.checkpoint()["taken"]
        assert result["spent_on_data_set"] > result["guarantee"]["epsilon"]


class TestTwoProcesses:
    def main(self, monkeypatch, capsys, *arguments) -> str:
        from privlm.cli import main

        monkeypatch.setattr(sys, "argv", ["privlm", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        return capsys.readouterr().err

    def test_one_folder(self, run, monkeypatch, capsys):
        pid = run.start(slow=0.3)
        run.wait_for(lambda: run.announced() >= 1)
        said = self.main(
            monkeypatch, capsys, run.folder / "config.yaml", "--out", run.out, "--resume"
        )
        assert f"{run.out}: another process is training there" in said
        os.kill(pid, signal.SIGINT)
        assert run.end() == 130

    def test_one_ledger(self, forge, tmp_path, monkeypatch, capsys):
        run = Run(forge, tmp_path / "run", CONFIG | {"ledger": str(tmp_path / "ledger")})
        pid = run.start(slow=0.3)
        run.wait_for(lambda: run.announced() >= 1)
        other = tmp_path / "made" / "other"
        said = self.main(monkeypatch, capsys, run.folder / "config.yaml", "--out", other)
        assert f"{tmp_path / 'ledger'} is in use by another run" in said
        assert not other.parent.exists()
        os.kill(pid, signal.SIGINT)
        assert run.end() == 130
