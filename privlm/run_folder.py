"""The folder of a training run: what lies in it, who may use it, whether it is still whole.

======================  ==========================================================
run.json                configuration, plan, run id, fingerprint of the data; private
ledger.jsonl            every release, written before it was made; private
checkpoint.safetensors  model and optimiser of the last checkpoint; private
steps.jsonl             what each step did; private, see :mod:`privlm.steps`
secret.key              seed of a run that needs one throughout; secret, gone once it is finished
tokenizer.json          learned from public text
model.safetensors       the trained weights: what the guarantee is about
result.json             guarantee, utility, cost; written last
======================  ==========================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from privlm.config import BudgetConfig, ConfigError, TrainConfig
from privlm.dp.ledger import Budget, Ledger
from privlm.dp.plan import Plan
from privlm.privacy import needs_one_seed
from protocols.files import DirectoryInUse, is_leftover, locked_directory, write_atomically
from protocols.randomness import SEED_BYTES, Stream

MAY_CHANGE = ("microbatch_size", "checkpoint_every", "budget")
"""Keys that change neither the guarantee of a step nor the distribution of what it releases."""


class RunRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run is, fixed when its folder is made.

    ``dataset`` is the fingerprint of the private records, ``corpus`` of all of them.
    ``ledger`` is an absolute path, so that a resumed run finds the ledger that it
    began whatever the working directory; None is the folder's own, which moves with it.
    """

    run: str
    dataset: str
    corpus: str
    config: TrainConfig
    plan: Plan | None
    ledger: str | None


S = TypeVar("S", bound=msgspec.Struct)


@dataclass(frozen=True)
class RunFolder:
    """Where the files of one run lie."""

    path: Path

    @property
    def record(self) -> Path:
        """What the run is: :class:`RunRecord`."""
        return self.path / "run.json"

    @property
    def checkpoint(self) -> Path:
        """Model and optimiser of the last checkpoint."""
        return self.path / "checkpoint.safetensors"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer."""
        return self.path / "tokenizer.json"

    @property
    def steps(self) -> Path:
        """What each step did."""
        return self.path / "steps.jsonl"

    @property
    def key(self) -> Path:
        """The sealed seed."""
        return self.path / "secret.key"

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.path / "model.safetensors"

    @property
    def result(self) -> Path:
        """What the run achieved; there once it is finished."""
        return self.path / "result.json"

    def ledger(self, elsewhere: str | None) -> Path:
        """The ledger: in this folder, unless the configuration puts it elsewhere."""
        return Path(elsewhere) if elsewhere else self.path / "ledger.jsonl"

    def write(self, path: Path, value: msgspec.Struct, *, mode: int = 0o600) -> None:
        """Write one of the folder's JSON files, whole or not at all."""
        text = msgspec.json.format(msgspec.json.encode(value), indent=2)
        write_atomically(path, text + b"\n", mode=mode)

    def read(self, path: Path, kind: type[S]) -> S:
        """Read one of the folder's JSON files.

        Raises:
            ConfigError: it is missing, unreadable or damaged.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: damaged ({error}); restore it from a backup, or start anew in "
                "another --out"
            ) from error

    def read_record(self, config: TrainConfig) -> RunRecord:
        """What the run in this folder is.

        Raises:
            ConfigError: it cannot be read, or was started with another configuration.
        """
        record = self.read(self.record, RunRecord)
        # A step that is made again comes out bitwise the same only with the same micro-batches.
        sealed = record.plan is not None and needs_one_seed(record.plan)
        may_change = set(MAY_CHANGE) - ({"microbatch_size"} if sealed else set())
        changed = [
            name
            for name in config.__struct_fields__
            if name not in may_change and getattr(record.config, name) != getattr(config, name)
        ]
        if changed:
            raise ConfigError(
                f"{self.record}: the run was started with another configuration (differs in "
                f"{', '.join(changed)}); restore it, or start anew in another --out"
            )
        return record


@contextlib.contextmanager
def opened_folder(path: Path, *, resume: bool, ledger: str | None) -> Iterator[RunFolder]:
    """Hold the folder of a run, made if missing, for this process alone.

    What was made is removed again if nothing came to lie in it.

    Args:
        path: the folder.
        resume: it holds a run to go on with; otherwise it has to be empty, but for
            what a run leaves that was killed before it began.
        ledger: the configuration's, which may lie in the folder too.

    Raises:
        ConfigError: the folder is not what ``resume`` says, in use, or cannot be written.
    """
    folder = RunFolder(path)
    if resume and not path.is_dir():
        raise ConfigError(f"{path}: there is no run to resume; leave --resume out to start one")
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(
                f"{path}: cannot be made a folder ({reason}); choose another --out"
            ) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"{path}: no permission to write there; choose another --out")
        try:
            with locked_directory(path), _left_clean(folder, folder.ledger(ledger)):
                _check_contents(folder, resume, folder.ledger(ledger))
                yield folder
        except DirectoryInUse as error:
            raise ConfigError(
                f"{path}: another process is training there; wait for it, or choose another --out"
            ) from error
    finally:
        for made in missing:
            with contextlib.suppress(OSError, ValueError):
                made.rmdir()


def open_ledger(
    folder: RunFolder, record: RunRecord, *, resume: bool, spend: BudgetConfig | None
) -> Ledger:
    """The ledger of a private run, after checking that it and ``record`` tell one story.

    ``spend`` is what all its runs together may.

    Raises:
        LedgerError: see :class:`~privlm.dp.ledger.Ledger`; a run that is resumed
            never begins a new one.
        ConfigError: the ledger holds other steps of this run than its plan's.
    """
    path = folder.ledger(record.ledger)
    budget = None if spend is None else Budget(spend.epsilon, spend.delta)
    ledger = Ledger(path, dataset=record.dataset, create=not resume, budget=budget)
    if record.plan is not None and not ledger.fits(record.run, record.plan):
        ledger.close()
        raise ConfigError(
            f"{folder.record}: its plan is not the one whose steps stand in {path}; restore both "
            "from a backup, or start anew in another --out"
        )
    return ledger


def stream_of(folder: RunFolder, plan: Plan, *, paid: int) -> Stream:
    """Secret randomness to go on with.

    Where a plan needs one seed throughout, it is sealed in the folder before the first release;
    elsewhere sampling and noise are drawn afresh, and nothing is kept.

    Args:
        folder: of the run.
        plan: of the run.
        paid: steps that were released already.

    Raises:
        ConfigError: the key is missing, though steps were released under it, or damaged.
    """
    if not needs_one_seed(plan):
        return Stream.fresh(_LABEL)
    if not folder.key.exists():
        if paid:
            raise ConfigError(
                f"{folder.key}: missing, though {paid} steps were released under it; restore it, "
                "or start anew in another --out"
            )
        write_atomically(folder.key, Stream.fresh("sealed seed").bytes(SEED_BYTES))
    seed = folder.key.read_bytes()
    if len(seed) != SEED_BYTES:
        raise ConfigError(f"{folder.key}: damaged; restore it, or start anew in another --out")
    return Stream(seed, _LABEL)


_LABEL = "private training"


def _check_contents(folder: RunFolder, resume: bool, ledger: Path) -> None:
    if folder.record.exists():
        if not resume:
            raise ConfigError(
                f"{folder.path}: a run lies there already; add --resume to go on with it, or "
                "choose another --out"
            )
    elif resume:
        raise ConfigError(
            f"{folder.path}: there is no run to resume; leave --resume out to start one"
        )
    leftovers = [path for path in folder.path.iterdir() if is_leftover(path)]
    for path in sorted(set(folder.path.iterdir()).difference(leftovers)):
        if not resume and not (path.absolute() == ledger.absolute() and _is_empty(path)):
            raise ConfigError(
                f"{folder.path}: the folder is not empty, it holds {path.name}; choose another "
                "--out"
            )
    for path in leftovers:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _left_clean(folder: RunFolder, ledger: Path) -> Iterator[None]:
    """A run that ends before it began leaves no empty ledger behind."""
    try:
        yield
    finally:
        here = ledger.absolute().parent == folder.path.absolute()
        if here and not folder.record.exists() and _is_empty(ledger):
            ledger.unlink()


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0
