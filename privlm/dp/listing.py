"""What ``privlm ledger`` lists: the runs on record, data set by data set, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from privlm.dp.accounting import check_delta
from privlm.dp.history import History, LedgerError
from privlm.dp.ledger import read_ledger
from privlm.dp.spending import Spending


class ListedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run: how many steps of which kinds, and its ε alone.

    ``file`` tells runs of equal names apart: two files know nothing of each other.
    """

    run: str
    file: str
    steps: int
    epsilon: float
    kinds: tuple[Spending, ...]


class ListedDataSet(msgspec.Struct, frozen=True, kw_only=True):
    """All runs on one data set, whichever of the files they stand in, and their ε together."""

    dataset: str
    files: tuple[str, ...]
    runs: tuple[ListedRun, ...]
    epsilon: float
    accountant: str
    neighbours: str
    unit: str


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """``unreadable`` gives the reason for every file that is not counted.

    Such is also a file whose cost is unknown, or cannot be added to that of the files before it.
    """

    delta: float
    data_sets: tuple[ListedDataSet, ...]
    unreadable: dict[str, str]


def list_ledgers(path: Path, delta: float, done: Callable[[int], None] = lambda n: None) -> Listing:
    """Read a ledger, or every ``*.jsonl`` of a folder, without locking any.

    Args:
        path: the file or the folder.
        delta: the δ at which ε is stated.
        done: told how many data sets are accounted for.

    Raises:
        LedgerError: nothing is there to be read, or the one file cannot be counted.
        ValueError: δ outside (0, 1).
    """
    check_delta(delta)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise LedgerError(f"{path}: no ledger lies there; name a ledger, or a folder of *.jsonl")
    together: dict[str, History] = {}
    apart: dict[str, dict[str, History]] = {}
    unreadable: dict[str, str] = {}
    for file in files:
        try:
            history = read_ledger(file)
            if history.dataset is not None:
                known = together.get(history.dataset, History())
                _merge(known, history, str(file))
                together[history.dataset] = known
                apart.setdefault(history.dataset, {})[str(file)] = history
        except LedgerError as error:
            if not path.is_dir():
                raise
            unreadable[str(file)] = str(error)
    listed = []
    for number, (dataset, history) in enumerate(together.items(), start=1):
        listed.append(_listed(dataset, history, apart[dataset], delta))
        done(number)
    return Listing(delta=delta, data_sets=tuple(listed), unreadable=unreadable)


def _merge(known: History, history: History, file: str) -> None:
    try:
        history.event()  # more steps than correlated noise was made for have no cost
        known.merge(history, file)
    except ValueError as error:
        raise LedgerError(f"{file}: {error}") from error


def _listed(
    dataset: str, history: History, files: dict[str, History], delta: float
) -> ListedDataSet:
    known: dict[str, float] = {}

    def spent(alone: History) -> float:
        event = repr(alone.event())  # many runs of one plan cost the same
        if event not in known:
            known[event] = alone.spent(delta, history.neighbours).value
        return known[event]

    together = history.spent(delta)
    return ListedDataSet(
        dataset=dataset,
        files=tuple(files),
        runs=tuple(
            ListedRun(
                run=run,
                file=file,
                steps=kinds.total(),
                epsilon=spent(alone.of_run(run)),
                kinds=tuple(kinds),
            )
            for file, alone in files.items()
            for run, kinds in alone.releases.items()
        ),
        epsilon=together.value,
        accountant=together.accountant,
        neighbours=history.neighbours,
        unit=history.unit or "example",
    )
