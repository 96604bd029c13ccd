"""What has been released from one data set, and the lines of a ledger that say so.

A line is ``{"version":3,"entry":{…},"chain":"…"}``; ``chain`` is the SHA-256 of the chain before it
and the entry, so that a line altered, removed or inserted before others is noticed. It guards
against accidents, not against who may write the file: no key is in it, so that last lines that were
cut off, or a file that was written anew from its first line, are not noticed. Against those, keep
the file where nobody but its runs may write, and a copy elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Annotated, Literal

import dp_accounting
import msgspec

from privlm.dp.accounting import DpEvent, Epsilon, Neighbours, composed, epsilon_of
from privlm.dp.clipping import Clipping
from privlm.dp.plan import Plan
from privlm.dp.spending import Spending, Unit
from privlm.dp.users import ExampleLevelSampling

GENESIS = hashlib.sha256(b"privlm ledger 3").hexdigest()

_OPENING = b'{"version":3,"entry":{"dataset":"'
_CANNOT_ADD = "; this version cannot add to it. Keep it as a record, and name another ledger"
_EARLIER = {
    b'{"entry":{"dataset":"': 'written as "privlm ledger 1", which did not say which sampler drew',
    b'{"version":2,"entry":{"dataset":"': (
        'written as "privlm ledger 2", which did not say under which relation a release was planned'
    ),
}


class LedgerError(ValueError):
    """The ledger cannot vouch for what was spent; nothing further may be released."""


Terms = tuple[Neighbours, Clipping, float]
"""Relation, clipping rule and expected batch size: what no run may change, besides its spending."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``count`` consecutive releases of one kind from one data set by one run.

    Attributes:
        dataset: fingerprint of the data set.
        run: name of the run.
        spending: what decides the cost.
        neighbours: the relation under which the plan promised it.
        clipping: how one unit's gradient was bounded.
        expected_batch_size: what the sums were divided by; an adaptive bound follows it too.
        count: of releases.
    """

    dataset: str
    run: str
    spending: Spending
    neighbours: Neighbours
    clipping: Clipping
    expected_batch_size: float
    count: Annotated[int, msgspec.Meta(ge=1)]

    @property
    def terms(self) -> Terms:
        """What this entry was released on."""
        return self.neighbours, self.clipping, self.expected_batch_size


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[3]
    entry: Entry
    chain: str


class History:
    """Releases by run and kind; grows by one entry at a time.

    Attributes:
        dataset: fingerprint of the data set; None as long as nothing was released.
        releases: steps of every kind, by run.
        terms: relations, clipping rules and batch sizes of every run.
    """

    def __init__(self) -> None:
        self.dataset: str | None = None
        self.releases: dict[str, Counter[Spending]] = {}
        self.terms: dict[str, set[Terms]] = {}

    def add(self, entry: Entry) -> None:
        """Count an entry; the caller has checked that it belongs here."""
        self.dataset = entry.dataset
        self.releases.setdefault(entry.run, Counter())[entry.spending] += entry.count
        self.terms.setdefault(entry.run, set()).add(entry.terms)

    def merge(self, other: History, where: str) -> None:
        """Count all that ``other`` holds of the same data set too; once for every ``where``.

        Its runs are named ``where: run`` from then on: equal names in two files are two runs.

        Raises:
            LedgerError: the costs cannot be added; nothing was counted.
        """
        for kind in other.spendings:
            self.check_composes(kind, other.neighbours)
        self.dataset = other.dataset
        for run, kinds in other.releases.items():
            self.releases[f"{where}: {run}"] = Counter(kinds)
            self.terms[f"{where}: {run}"] = set(other.terms[run])

    def of_run(self, run: str) -> History:
        """What one run released."""
        alone = History()
        alone.dataset = self.dataset
        alone.releases = {run: Counter(self.releases.get(run, {}))}
        alone.terms = {run: set(self.terms.get(run, ()))}
        return alone

    def steps(self, run: str) -> int:
        """How many releases this run has on record."""
        return self.releases.get(run, Counter()).total()

    def steps_of(self, run: str, spending: Spending) -> int:
        """How many releases of one kind this run has on record."""
        return self.releases.get(run, Counter())[spending]

    def fits(self, run: str, plan: Plan) -> bool:
        """Whether all that this run has on record are steps of ``plan``, and not too many.

        That is, everything that decides a release and what it promises is the same: what it costs,
        the relation, the clipping rule and the batch size expected.
        """
        kinds = set(self.releases.get(run, ()))
        terms = {(plan.neighbours, plan.clipping, plan.expected_batch_size)}
        return (
            self.steps(run) <= plan.steps
            and kinds <= {plan.spending}
            and self.terms.get(run, set()) <= terms
        )

    @property
    def spendings(self) -> set[Spending]:
        """Every kind of release on record."""
        return {kind for kinds in self.releases.values() for kind in kinds}

    @property
    def unit(self) -> Unit | None:
        """Whose privacy the costs are about; None as long as nothing was released."""
        return next((kind.unit for kind in self.spendings), None)

    @property
    def neighbours(self) -> Neighbours:
        """The strongest relation that a release on record was planned for: replacing, if any."""
        every = {kind.neighbours for kind in self.spendings}
        every |= {relation for terms in self.terms.values() for relation, _, _ in terms}
        return "replace-one" if "replace-one" in every else "add-or-remove-one"

    def check_composes(self, spending: Spending, neighbours: Neighbours) -> None:
        """Raise ``LedgerError`` for a kind whose cost cannot be added to what is on record.

        Args:
            spending: the kind.
            neighbours: the relation that it was planned for.
        """
        if self.unit not in (None, spending.unit):
            raise LedgerError(
                f"costs per {spending.unit} cannot be added to the costs per {self.unit} on "
                f"record; plan per {self.unit}"
            )
        kinds = self.spendings | {spending}
        replacing = "replace-one" in {self.neighbours, spending.neighbours, neighbours}
        if replacing and any(isinstance(kind.users, ExampleLevelSampling) for kind in kinds):
            raise LedgerError(
                "releases planned for replacing one (all batches of fixed size are) and sampling "
                "of a user's examples (els) are known under different relations, and their costs "
                "cannot be added; choose one of the two"
            )

    def event(self) -> DpEvent:
        """All releases of all runs, composed."""
        return self.event_with("", None, 0)

    def event_with(self, run: str, spending: Spending | None, count: int) -> DpEvent:
        """All releases, and ``count`` more steps of one kind by ``run``."""
        steps = Counter(
            {(name, kind): n for name, kinds in self.releases.items() for kind, n in kinds.items()}
        )
        if spending is not None:
            steps[run, spending] += count
        repeated: Counter[DpEvent] = Counter()
        joint = []
        # A run's steps are one event; equal steps of several runs compose more cheaply as one.
        for (_, kind), number in steps.items():
            event = kind.event(number)
            if isinstance(event, dp_accounting.SelfComposedDpEvent):
                repeated[event.event] += event.count
            else:
                joint.append(event)
        once = sorted(repeated.items(), key=repr)
        return composed([dp_accounting.SelfComposedDpEvent(e, n) for e, n in once] + joint)

    def spent(self, delta: float, neighbours: Neighbours | None = None) -> Epsilon:
        """What the data set has paid so far, over all runs.

        Args:
            delta: the δ of the answer.
            neighbours: the relation; by default the one under which all releases are known.
        """
        if not self.releases:
            return Epsilon(0.0, delta, "PLD")
        return epsilon_of(self.event(), delta, neighbours or self.neighbours)


def encoded(entry: Entry, chain: str) -> tuple[bytes, str]:
    """The line of an entry that follows ``chain``, and the chain after it."""
    # As it will be read: a bound given as the integer 1 is written otherwise than 1.0 read back.
    entry = msgspec.json.decode(msgspec.json.encode(entry), type=Entry)
    following = _link(chain, entry)
    return msgspec.json.encode(_Line(3, entry, following)) + b"\n", following


def parsed(data: bytes, where: str, dataset: str | None = None) -> tuple[History, str, int]:
    """Read the lines of a ledger, all but an unfinished last one.

    Args:
        data: the file.
        where: its name, for errors.
        dataset: the data set that it must be about; None takes the first entry's.

    Returns:
        The history, the chain after it, and the number of bytes that hold whole lines.

    Raises:
        LedgerError: no ledger, lines altered or missing before the last, or about another data
            set.
    """
    history, chain, end = History(), GENESIS, 0
    *lines, tail = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        entry = _taken(line, chain, f"{where}, line {number}")
        if entry.dataset != (dataset or history.dataset or entry.dataset):
            raise LedgerError(
                f"{where}, line {number}: this ledger belongs to data set {entry.dataset[:16]}…, "
                f"not to {(dataset or history.dataset or '')[:16]}…; give every data set its own "
                "ledger"
            )
        history.add(entry)
        chain = _link(chain, entry)
        end += len(line) + 1
    _check_torn(tail, f"{where}, line {len(lines) + 1}")
    return history, chain, end


def _taken(line: bytes, chain: str, where: str) -> Entry:
    _check_version(line, where)
    try:
        read = msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError as error:
        raise LedgerError(f"{where}: not a ledger entry ({error}); restore a backup") from error
    if read.chain != _link(chain, read.entry):
        raise LedgerError(f"{where}: entries were altered or removed; restore a backup")
    return read.entry


def _check_torn(tail: bytes, where: str) -> None:
    """Refuse an unfinished last line that no ledger began: it is dropped, so it must be ours.

    A power cut may leave zero bytes where an entry was to stand.
    """
    begun = tail.rstrip(b"\0")
    _check_version(begun, where)
    if not (begun.startswith(_OPENING) or _OPENING.startswith(begun)):
        raise LedgerError(
            f"{where}: not a ledger entry; restore a backup, or choose another ledger if this file "
            "is none"
        )


def _check_version(line: bytes, where: str) -> None:
    for opening, reason in _EARLIER.items():
        if line.startswith(opening):
            raise LedgerError(f"{where}: {reason}{_CANNOT_ADD}")


def _link(chain: str, entry: Entry) -> str:
    return hashlib.sha256(chain.encode() + msgspec.json.encode(entry)).hexdigest()
