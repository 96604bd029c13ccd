"""Every release ever made from a data set, persisted before the release leaves.

One JSON line an entry, each chained to the one before by SHA-256, appended and
fsynced. A process killed at any instant leaves a ledger that counts every
release that left; at worst it counts one that did not. What the chain notices,
and what it does not, :mod:`privlm.dp.history` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from privlm.dp.accounting import DpEvent, Epsilon, Neighbours, check_delta, rounded_up
from privlm.dp.calibration import most_steps
from privlm.dp.history import Entry, History, LedgerError, encoded, parsed
from privlm.dp.plan import Plan
from protocols.files import sync_directory

_MAX_BYTES = 1 << 30


class BudgetExceeded(LedgerError):
    """One more release would cost the data set more than its budget; nothing was recorded."""


@dataclass(frozen=True)
class Budget:
    """What all runs on a data set together may spend: ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        check_delta(self.delta)


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
        budget: what all runs together may spend; None does not ask.

    Raises:
        LedgerError: it cannot be opened, another process writes to it, lines were
            altered or are missing before the last, or it belongs to another data set.
    """

    def __init__(
        self, path: Path, *, dataset: str, create: bool = True, budget: Budget | None = None
    ) -> None:
        self.path = Path(path)
        self.dataset = dataset
        self.budget = budget
        self._room: tuple[str, Plan, int] | None = None
        self._process = os.getpid()
        self._fd = self._open(create)
        try:
            self._lock()
            self._history, self._chain, self._end = self._load()
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
            BudgetExceeded: the steps would cost more than the budget leaves.
            LedgerError: the entry could not be written (disk full, say), its cost cannot be added
                to what is on record, or the caller is a fork of the process that opened the
                ledger, or another process has written to it. The file is as it was, and the caller
                must not release.
            ValueError: more steps than correlated noise was made for, or none.
        """
        if self._fd < 0:
            raise LedgerError(f"{self.path} is closed; open it again before releasing")
        if os.getpid() != self._process:  # a fork has the lock and the end, and would overwrite
            raise LedgerError(
                f"{self.path} was opened by process {self._process}, and a fork of it cannot "
                "write too; nothing was released. Release in the process that opened it"
            )
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        spending = plan.spending
        self._history.check_composes(spending, plan.neighbours)
        spending.check_steps(self._history.steps_of(run, spending) + count)
        room = self._required_room(run, plan, count)
        entry = Entry(
            dataset=self.dataset,
            run=run,
            spending=spending,
            neighbours=plan.neighbours,
            clipping=plan.clipping,
            expected_batch_size=plan.expected_batch_size,
            count=count,
        )
        self._check_end()
        data, chain = encoded(entry, self._chain)
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
        self._history.add(entry)
        self._room = (run, plan, room - count)

    def steps(self, run: str) -> int:
        """How many releases this run has on record."""
        return self._history.steps(run)

    def fits(self, run: str, plan: Plan) -> bool:
        """Whether all that this run has on record are steps of ``plan``; see :meth:`History.fits`.

        A run that goes on asks it first: with another clipping bound, say, the same noise on the
        same batch would be two releases whose difference has none.
        """
        return self._history.fits(run, plan)

    def event(self) -> DpEvent:
        """All releases of all runs, composed."""
        return self._history.event()

    def spent(self, delta: float, neighbours: Neighbours | None = None) -> Epsilon:
        """What the data set has paid so far, over all runs; see :meth:`History.spent`."""
        return self._history.spent(delta, neighbours)

    def allowance(self, run: str, plan: Plan, budget: Budget, *, at_most: int | None = None) -> int:
        """How many further steps of ``plan`` by ``run`` the budget leaves, given all on record.

        A few accountings, whatever the number; at most one step in a thousand is left out.

        Args:
            run: whose steps they would be: correlated noise is accounted for a run as a whole.
            plan: the kind of step.
            budget: what all runs together may spend.
            at_most: no more are asked for; by default those that the plan has left.
        """
        spending = plan.spending
        self._history.check_composes(spending, plan.neighbours)
        return most_steps(
            lambda count: self._history.event_with(run, spending, count),
            budget.epsilon,
            budget.delta,
            self._relation(plan),
            at_most=plan.steps - self.steps(run) if at_most is None else at_most,
        )

    def _required_room(self, run: str, plan: Plan, count: int) -> int:
        """Steps that the budget leaves, at least ``count``; counted anew when the kind changes."""
        if self.budget is None:
            return count
        if self._room is not None and self._room[:2] == (run, plan):
            room = self._room[2]
        else:
            wanted = max(count, plan.steps - self.steps(run))
            room = self.allowance(run, plan, self.budget, at_most=wanted)
        if room < count:
            spent = rounded_up(self.spent(self.budget.delta, self._relation(plan)).value)
            raise BudgetExceeded(
                f"{self.path}: {count} more steps would exceed the budget of ε = "
                f"{self.budget.epsilon:g} at δ = {self.budget.delta:g}; ε = {spent} is spent. "
                "Nothing was released; stop here, or decide on a larger budget"
            )
        return room

    def _relation(self, plan: Plan) -> Neighbours:
        """The strongest that a release on record, or a step of ``plan``, was planned for."""
        replacing = "replace-one" in (self._history.neighbours, plan.neighbours)
        return "replace-one" if replacing else "add-or-remove-one"

    def _check_end(self) -> None:
        size = os.fstat(self._fd).st_size
        if size != self._end:
            raise LedgerError(
                f"{self.path} has {size} bytes, and {self._end} when this process last wrote: "
                "another has written to it meanwhile. Nothing was released; see what wrote there, "
                "and open it again"
            )

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

    def _load(self) -> tuple[History, str, int]:
        size = os.fstat(self._fd).st_size
        if size > _MAX_BYTES:
            raise LedgerError(f"{self.path} has {size} bytes, more than any ledger should")
        history, chain, end = parsed(_read_all(self._fd, size), str(self.path), self.dataset)
        if end != size:  # an entry was interrupted before its release
            os.ftruncate(self._fd, end)
        return history, chain, end


def read_ledger(path: Path) -> History:
    """What a ledger file says, without a lock: a run may be writing to it.

    Raises:
        LedgerError: it cannot be read, is no ledger, or lines were altered or are missing before
            the last.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise LedgerError(f"{path} has {len(data)} bytes, more than any ledger should")
    return parsed(data, str(path))[0]


def _read_all(fd: int, size: int) -> bytes:
    parts, offset = [], 0
    while offset < size:
        part = os.pread(fd, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
