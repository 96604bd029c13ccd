"""The I/O between parties. In memory: delivers, fails as planned, and records what everyone saw."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from protocols.errors import EndlessExchange, ProtocolError, UnknownRecipient
from protocols.party import Outgoing, Party, Received, State, View


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """What goes wrong on the wire: probabilities for each message, and who goes offline when.

    `drop`, `corrupt`, `duplicate` and `reorder` are independent. A corrupted message has one bit
    flipped, is cut short or grows by a byte; a reordered one overtakes a random number of those in
    flight. From its round in `offline_from` on, all messages from a party and to it are lost.
    """

    drop: float = 0.0
    corrupt: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    offline_from: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("drop", "corrupt", "duplicate", "reorder"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    @property
    def random(self) -> bool:
        """Whether anything is left to chance."""
        return max(self.drop, self.corrupt, self.duplicate, self.reorder) > 0.0


@dataclass
class Traffic:
    """What one party sent, whether or not it arrived, and what it received."""

    sent_messages: int = 0
    sent_bytes: int = 0
    received_messages: int = 0
    received_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        views: what each party saw, in full even where the party failed or had finished.
        traffic: messages and bytes of each party, by direction.
        rounds: length of the longest chain of messages, each sent in answer to the one before.
        errors: the ProtocolError that closed a party, by party.
        unfinished: parties that neither finished nor failed.

    """

    views: Mapping[str, View] = field(repr=False)
    traffic: Mapping[str, Traffic]
    rounds: int
    errors: Mapping[str, ProtocolError]
    unfinished: tuple[str, ...]


@dataclass(frozen=True)
class _InFlight:
    sender: str
    recipient: str
    data: bytes = field(repr=False)
    round: int


class InMemoryNetwork:
    """Runs parties against each other in one process, one message at a time, deterministically.

    A party that raises a ProtocolError is isolated: the error is recorded, the others go on. When
    no message is in flight, the running parties named in `deadlines` are told so, as a host's timer
    would, in that order. Used once.

    Every message is kept until the end, for the views: memory grows with the traffic.

    Args:
        parties: with distinct names.
        faults: what goes wrong; nothing if not given.
        generator: of the faults; needed if the plan leaves anything to chance.
        deadlines: names of the parties whose host has a timer.
        max_deliveries: deliveries after which the exchange is taken to be endless.

    """

    def __init__(
        self,
        parties: Iterable[Party],
        *,
        faults: FaultPlan | None = None,
        generator: np.random.Generator | None = None,
        deadlines: Iterable[str] = (),
        max_deliveries: int = 1_000_000,
    ) -> None:
        listed = list(parties)
        self._parties = {party.name: party for party in listed}
        self._faults = FaultPlan() if faults is None else faults
        self._deadlines = tuple(deadlines)
        if len(self._parties) != len(listed):
            raise ValueError("two parties have one name")
        if self._faults.random and generator is None:
            raise ValueError("faults left to chance need a generator")
        strangers = {*self._deadlines, *self._faults.offline_from} - set(self._parties)
        if strangers:
            raise ValueError(f"no such parties: {sorted(strangers)}")
        self._generator = np.random.default_rng(0) if generator is None else generator
        # What a fault does to a message is drawn apart from whether it strikes.
        self._details = np.random.default_rng(self._generator.integers(1 << 63))
        self._max_deliveries = max_deliveries
        self._ran = False
        self._in_flight: deque[_InFlight] = deque()
        self._received: dict[str, list[Received]] = {name: [] for name in self._parties}
        self._traffic = {name: Traffic() for name in self._parties}
        self._errors: dict[str, ProtocolError] = {}
        self._rounds = 0

    def run(self) -> Outcome:
        """Start every party and deliver until nothing is in flight.

        Raises:
            EndlessExchange: after `max_deliveries` deliveries.
            ValueError: the network ran before.
            PartySpent: recorded, as any ProtocolError, for a party that was started before.

        """
        if self._ran:
            raise ValueError("a network runs once")
        self._ran = True
        for party in self._parties.values():
            self._step(party, party.start, 0)
        steps = 0
        while self._in_flight or self._pass_deadlines():
            steps += 1
            if steps > self._max_deliveries:
                raise EndlessExchange(f"no end after {self._max_deliveries} deliveries")
            if self._in_flight:
                self._deliver(self._in_flight.popleft())
        return Outcome(
            {name: p.view(tuple(self._received[name])) for name, p in self._parties.items()},
            self._traffic,
            self._rounds,
            self._errors,
            tuple(name for name, party in self._parties.items() if self._runs(party)),
        )

    def _pass_deadlines(self) -> bool:
        """Tell the waiting parties that time is up; return whether any of them wrote to anyone."""
        after_round = self._rounds
        wrote = [
            self._step(party, party.deadline, after_round)
            for name in self._deadlines
            if self._runs(party := self._parties[name]) and not self._offline(name)
        ]
        return any(wrote)

    def _runs(self, party: Party) -> bool:
        return party.state is State.RUNNING and party.name not in self._errors

    def _deliver(self, message: _InFlight) -> None:
        party = self._parties[message.recipient]
        traffic = self._traffic[party.name]
        traffic.received_messages += 1
        traffic.received_bytes += len(message.data)
        self._received[party.name].append(Received(message.sender, message.data))
        if self._runs(party):
            self._step(party, lambda: party.receive(message.sender, message.data), message.round)

    def _step(self, party: Party, action: Callable[[], list[Outgoing]], after_round: int) -> bool:
        """Take one step; return whether the party wrote to anyone."""
        try:
            outgoing = action()
            for item in outgoing:
                if item.recipient not in self._parties:
                    raise UnknownRecipient(f"{party.name} wrote to {item.recipient!r}")
        except ProtocolError as error:
            self._errors[party.name] = error
            return False
        for item in outgoing:
            self._send(_InFlight(party.name, item.recipient, item.data, after_round + 1))
        return bool(outgoing)

    def _send(self, message: _InFlight) -> None:
        self._rounds = max(self._rounds, message.round)
        traffic = self._traffic[message.sender]
        traffic.sent_messages += 1
        traffic.sent_bytes += len(message.data)
        faults = self._faults
        # All four coins are tossed for every message, so that one fault does not shift the others:
        # until it changes what is sent, the same messages are lost with it as without it.
        drop, corrupt, duplicate, reorder = self._generator.random(4)
        if drop < faults.drop or any(
            message.round >= faults.offline_from.get(name, message.round + 1)
            for name in (message.sender, message.recipient)
        ):
            return
        if corrupt < faults.corrupt:
            message = _InFlight(
                message.sender, message.recipient, self._corrupted(message.data), message.round
            )
        for _ in range(2 if duplicate < faults.duplicate else 1):
            if reorder < faults.reorder:
                place = int(self._details.integers(len(self._in_flight) + 1))
                self._in_flight.insert(place, message)
            else:
                self._in_flight.append(message)

    def _offline(self, name: str) -> bool:
        return self._rounds >= self._faults.offline_from.get(name, self._rounds + 1)

    def _corrupted(self, data: bytes) -> bytes:
        kind = int(self._details.integers(3)) if data else 2
        if kind == 0:
            place, bit = int(self._details.integers(len(data))), int(self._details.integers(8))
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            return bytes(flipped)
        if kind == 1:
            return data[: int(self._details.integers(len(data)))]
        return data + self._details.bytes(1)
