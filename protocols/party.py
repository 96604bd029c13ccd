"""A party of a protocol as a state machine without input or output of its own.

The host hands in what arrived and sends what comes back; it owns sockets, clocks and threads. So a
whole protocol runs in one process, in a test as in production, and every run can be repeated.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NoReturn, final

from protocols.errors import PartySpent, PeersMissing
from protocols.randomness import SEED_BYTES, Stream

_PARTY_LABEL = "privlm/party/v1"


@dataclass(frozen=True)
class Outgoing:
    """A message on its way out: for whom, and its bytes."""

    recipient: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Received:
    """A message that arrived: from whom, as the transport authenticated it, and its bytes."""

    sender: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class View:
    """All that corrupting one party reveals: inputs, randomness and the messages it received.

    What the party sent and computed follows from these, from what is public, and from when its host
    started it and let deadlines pass, which no view records.
    """

    party: str
    inputs: Mapping[str, object] = field(repr=False)
    randomness: Mapping[str, bytes] = field(repr=False)
    received: tuple[Received, ...] = field(repr=False)

    def stream(self) -> Stream:
        """Return the party's stream, from its beginning."""
        return Stream(self.randomness["seed"], _PARTY_LABEL)


class State(Enum):
    """Where a party stands."""

    NEW = "new"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


class Party(ABC):
    """One party's part in one run of a protocol: used once, and closed by its first error.

    | state    | start    | receive, deadline | an exception leads to | `_finish` leads to |
    |----------|----------|-------------------|-----------------------|--------------------|
    | new      | running  | PartySpent        | failed                | finished           |
    | running  | PartySpent | running         | failed                | finished           |
    | finished | PartySpent | PartySpent      | –                     | –                  |
    | failed   | PartySpent | PartySpent      | –                     | –                  |

    A call in the wrong state closes a new or running party as well: whoever mixes up the order of
    calls cannot be trusted with the next one.

    A subclass implements `_on_start`, `_on_message` and, where it can go on without everybody,
    `_on_deadline`, and calls `_finish` when it is done. Inside them it draws all it needs from
    `self._stream` and, if a library draws for it, reports that with `_record_randomness`; the view
    is then complete. A party can be neither copied nor pickled: the copy would play a second time.

    Args:
        name: by which the others address it.
        stream: of the party's randomness; 32 bytes are taken from it.
        inputs: everything private that the party is given.

    """

    def __init__(self, name: str, stream: Stream, inputs: Mapping[str, object]) -> None:
        seed = stream.bytes(SEED_BYTES)
        self.name = name
        self.state = State.NEW
        self._stream = Stream(seed, _PARTY_LABEL)
        self._inputs = dict(inputs)
        self._randomness = {"seed": seed}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PartySpent(f"a copy of {self.name} would play twice under the same secrets")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, state={self.state.value})"

    @property
    def done(self) -> bool:
        """Whether every further call would raise."""
        return self.state in (State.FINISHED, State.FAILED)

    @final
    def start(self) -> list[Outgoing]:
        """Begin, and return the first messages; must come before any other call.

        Raises:
            ProtocolError: going on would be unsafe; the party is closed.

        """
        if self.state is not State.NEW:
            self._refuse("started twice")
        self.state = State.RUNNING
        return self._step(self._on_start)

    @final
    def receive(self, sender: str, data: bytes) -> list[Outgoing]:
        """Take in one message and return the answers.

        Args:
            sender: who sent it, as the transport authenticated it.
            data: the bytes of the message.

        Raises:
            ProtocolError: the message was refused, or the party had not started or was done; the
                party is closed.

        """
        if self.state is not State.RUNNING:
            self._refuse("given a message")
        return self._step(lambda: self._on_message(sender, data))

    @final
    def deadline(self) -> list[Outgoing]:
        """Go on with what has arrived: the host's timer for the present step ran out.

        Raises:
            ProtocolError: too little has arrived; the party is closed.

        """
        if self.state is not State.RUNNING:
            self._refuse("given a deadline")
        return self._step(self._on_deadline)

    @final
    def view(self, received: tuple[Received, ...]) -> View:
        """Return the party's view, given the messages that the transport recorded."""
        return View(
            self.name,
            MappingProxyType(dict(self._inputs)),
            MappingProxyType(dict(self._randomness)),
            received,
        )

    @abstractmethod
    def _on_start(self) -> list[Outgoing]:
        """Return the first messages."""

    @abstractmethod
    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        """Take in one message and return the answers; raise ProtocolError to refuse it."""

    def _on_deadline(self) -> list[Outgoing]:
        """Go on without those who have not answered; overridden by protocols that can."""
        raise PeersMissing(f"{self.name}: the deadline passed before everybody had answered")

    def _finish(self) -> None:
        """Declare the party's part over."""
        self.state = State.FINISHED

    def _record_randomness(self, name: str, value: bytes) -> None:
        """Add to the view what a library drew for the party."""
        self._randomness[name] = value

    def _step(self, action: Callable[[], list[Outgoing]]) -> list[Outgoing]:
        try:
            return action()
        except BaseException:
            self.state = State.FAILED
            raise

    def _refuse(self, what: str) -> NoReturn:
        before = self.state
        if not self.done:
            self.state = State.FAILED
        raise PartySpent(f"{self.name} was {what} when {before.value}")
