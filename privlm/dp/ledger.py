"""Every release ever made from a data set, persisted before the release leaves.

One JSON line an entry, each chained to the one before by SHA-256, appended and
fsynced. A process killed at any instant leaves a ledger that counts every
release that left; at worst it counts one that did not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections import Counter
from pathlib import Path
from types import TracebackType

import dp_accounting
import msgspec

from privlm.dp.accounting import DpEvent, Epsilon, epsilon_of
from privlm.dp.plan import Plan
from protocols.files import sync_directory

_GENESIS = "privlm ledger 1"
_MAX_BYTES = 1 << 30
_OPENING = b'{"entry":{"dataset":"'


class LedgerError(ValueError):
    """The ledger cannot vouch for what was spent; nothing further may be released."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``count`` consecutive releases of one kind from one data set by one run."""

    dataset: str
    run: str
    sampling_probability: float
    noise_multiplier: float
    count: int


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    entry: Entry
    chain: str


class Ledger:
    """The append-only record of one data set, open for one writer at a time.

    Use as a context manager::

        with Ledger(path, dataset=fingerprint) as ledger:
            ledger.record("run-1", plan)          # before the release
            ledger.spent(delta=1e-5).value

    Args:
        path: the file; created, with its folder, if missing.
        dataset: fingerprint of the data set that the entries are about. A file
            that records another data set is refused: one ledger, one data set.
        create: whether a missing file is a new ledger. Not so for a run that
            has begun: a missing ledger would make its releases look free.

    Raises:
        LedgerError: it cannot be opened, another process writes to it, it was
            tampered with, or it belongs to another data set.
    """

    def __init__(self, path: Path, *, dataset: str, create: bool = True) -> None:
        self.path = Path(path)
        self.dataset = dataset
        self._chain = hashlib.sha256(_GENESIS.encode()).hexdigest()
        self._end = 0
        self._releases: dict[str, Counter[tuple[float, float]]] = {}
        self._fd = self._open(create)
        try:
            self._lock()
            self._load()
            sync_directory(self.path.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def record(self, run: str, plan: Plan, count: int = 1) -> None:
        """Persist ``count`` steps of ``plan``; returns once they are on disk.

        Raises:
            LedgerError: the entry could not be written (disk full, say). The file
                is as it was, and the caller must not release.
        """
        if self._fd < 0:
            raise LedgerError(f"{self.path} is closed; open it again before releasing")
        entry = Entry(
            self.dataset, run, plan.sampler.sampling_probability, plan.noise_multiplier, count
        )
        chain = _link(self._chain, entry)
        data = msgspec.json.encode(_Line(entry, chain)) + b"\n"
        try:
            written = os.pwrite(self._fd, data, self._end)
            if written != len(data):
                raise OSError("short write")
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise LedgerError(
                f"{self.path}: the entry could not be persisted ({error}), so nothing was "
                "released; free some disk space and resume"
            ) from error
        self._end += len(data)
        self._chain = chain
        self._count(entry)

    def steps(self, run: str) -> int:
        """How many releases this run has on record."""
        return sum(self._releases.get(run, Counter()).values())

    def fits(self, run: str, plan: Plan) -> bool:
        """Whether all that this run has on record are steps of ``plan``, and not too many."""
        kind = (plan.sampler.sampling_probability, plan.noise_multiplier)
        return self.steps(run) <= plan.steps and set(self._releases.get(run, ())) <= {kind}

    def event(self) -> DpEvent:
        """All releases of all runs, composed."""
        total: Counter[tuple[float, float]] = sum(self._releases.values(), Counter())
        return dp_accounting.ComposedDpEvent(
            [
                dp_accounting.SelfComposedDpEvent(_step_event(q, sigma), count)
                for (q, sigma), count in sorted(total.items())
            ]
        )

    def spent(self, delta: float) -> Epsilon:
        """What the data set has paid so far, over all runs."""
        if not self._releases:
            return Epsilon(0.0, delta, "PLD")
        return epsilon_of(self.event(), delta)

    def _open(self, create: bool) -> int:
        if not create and not self.path.exists():
            raise LedgerError(
                f"{self.path}: the ledger of this run is missing; restore it from a backup, "
                "because without it nothing says what was spent"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise LedgerError(
                f"{self.path}: the ledger cannot be opened ({error}); choose another place for it"
            ) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise LedgerError(f"{self.path} is not a regular file; choose another ledger")
        return fd

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(
                f"{self.path} is in use by another run; wait for it, or give each data set "
                "its own ledger"
            ) from None
        except OSError as error:
            raise LedgerError(
                f"{self.path}: cannot be locked ({error}); put it on a local disk"
            ) from error

    def _load(self) -> None:
        size = os.fstat(self._fd).st_size
        if size > _MAX_BYTES:
            raise LedgerError(f"{self.path} has {size} bytes, more than any ledger should")
        lines = _read_all(self._fd, size).split(b"\n")
        for number, line in enumerate(lines, start=1):
            if number == len(lines):
                self._check_torn(number, line)
                break  # it was interrupted before its release
            self._take(number, line)
        if self._end != size:
            os.ftruncate(self._fd, self._end)

    def _check_torn(self, number: int, tail: bytes) -> None:
        """Refuse an unfinished last line that no ledger began: it is dropped, so it must be ours.

        A power cut may leave zero bytes where an entry was to stand.
        """
        begun = tail.rstrip(b"\0")
        if not (begun.startswith(_OPENING) or _OPENING.startswith(begun)):
            raise LedgerError(
                f"{self.path}, line {number}: not a ledger entry; restore a backup, or choose "
                "another ledger if this file is none"
            )

    def _take(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number}"
        try:
            parsed = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            raise LedgerError(f"{where}: not a ledger entry ({error}); restore a backup") from error
        if parsed.chain != _link(self._chain, parsed.entry) or parsed.entry.count < 1:
            raise LedgerError(f"{where}: entries were altered or removed; restore a backup")
        if parsed.entry.dataset != self.dataset:
            raise LedgerError(
                f"{where}: this ledger belongs to data set {parsed.entry.dataset[:16]}…, not to "
                f"{self.dataset[:16]}…; give every data set its own ledger"
            )
        self._chain = parsed.chain
        self._end += len(line) + 1
        self._count(parsed.entry)

    def _count(self, entry: Entry) -> None:
        kind = (entry.sampling_probability, entry.noise_multiplier)
        self._releases.setdefault(entry.run, Counter())[kind] += entry.count


def _step_event(sampling_probability: float, noise_multiplier: float) -> DpEvent:
    release = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_probability == 1:
        return release
    return dp_accounting.PoissonSampledDpEvent(sampling_probability, release)


def _link(chain: str, entry: Entry) -> str:
    return hashlib.sha256(chain.encode() + msgspec.json.encode(entry)).hexdigest()


def _read_all(fd: int, size: int) -> bytes:
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
