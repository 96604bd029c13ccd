"""What everybody knows of an aggregation round before it begins, and what comes out of it.

Shapes: P = parameters, K = clients.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Generic, NamedTuple, TypeVar

import msgspec
import torch
from msgspec import Meta

from protocols.errors import MalformedMessage, TooFewClients, WrongSession
from protocols.fixed_point import FixedPoint
from protocols.transport import Outcome
from protocols.wire import HEADER_BYTES, Message

A = TypeVar("A")

MAX_NAME = 64
MAX_CONTEXT = 64
MAX_CLIENTS = 1 << 20
MAX_SERVERS = 1 << 10
DIGEST_BYTES = 32
# MessagePack writes the length of a byte string in 32 bits.
_MAX_VECTOR_BYTES = (1 << 32) - 1
# Tag, digest, index, modulus and MessagePack's own lengths; each is bounded, their sum lies below.
_FRAME_BYTES = HEADER_BYTES + 256

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAX_CLIENTS)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class CohortMessage(Message, frozen=True):
    """A message of one round: it names the cohort that it belongs to."""

    cohort: Digest


@dataclass(frozen=True, kw_only=True)
class Cohort(Generic[A]):
    """A round's public description: everybody holds the same one, and no message counts otherwise.

    Args:
        session: 16 to 32 bytes that no other round has.
        clients: names of those who may give an update, K of them.
        servers: names of those who hold shares of them, s >= 2.
        collector: name of whoever learns the sum.
        length: P, entries of an update.
        encoding: of an entry, with room for the sum of all clients.
        min_clients: at least 2; of fewer clients nothing is summed.
        context: up to 64 bytes for what else the host wants all parties to agree on, such as the
            digest of what an update's entries mean.

    Raises:
        ValueError: an argument is out of range, two parties have one name, or a sum could wrap.

    """

    session: bytes
    clients: tuple[str, ...]
    servers: tuple[str, ...]
    collector: str
    length: int
    encoding: FixedPoint[A]
    min_clients: int
    context: bytes = b""

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(self.clients))
        object.__setattr__(self, "servers", tuple(self.servers))
        if not 16 <= len(self.session) <= 32:
            raise ValueError(f"a session has 16 to 32 bytes, not {len(self.session)}")
        for name in self.parties:
            if not 1 <= len(name) <= MAX_NAME:
                raise ValueError(f"a name has 1 to {MAX_NAME} characters, not {len(name)}")
        if len(set(self.parties)) < len(self.parties):
            raise ValueError("two parties have one name")
        if not 2 <= len(self.servers) <= MAX_SERVERS:
            raise ValueError(
                f"shares lie with 2 to {MAX_SERVERS} servers, not {len(self.servers)}; "
                "with one, nothing would be hidden"
            )
        if self.length < 1 or self.vector_bytes > _MAX_VECTOR_BYTES:
            most = _MAX_VECTOR_BYTES // self.encoding.ring.element_bytes
            raise ValueError(f"length must lie in [1, {most}], got {self.length}")
        if self.min_clients < 2:
            raise ValueError(f"a sum over {self.min_clients} clients would hide nothing")
        if not self.min_clients <= len(self.clients) <= min(self.encoding.clients, MAX_CLIENTS):
            raise ValueError(
                f"{len(self.clients)} clients, where at least {self.min_clients} are wanted and "
                f"the encoding has room for {self.encoding.clients}"
            )
        if not isinstance(self.context, bytes) or len(self.context) > MAX_CONTEXT:
            raise ValueError(f"context must be at most {MAX_CONTEXT} bytes")

    @property
    def parties(self) -> tuple[str, ...]:
        """Names of all parties."""
        return (*self.clients, *self.servers, self.collector)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the description: two rounds that differ anywhere have two digests."""
        encoding = self.encoding
        description = (
            "privlm/aggregation/cohort/v1",
            self.session,
            self.clients,
            self.servers,
            self.collector,
            self.length,
            (encoding.clip, encoding.bits, encoding.clients, encoding.ring.name),
            self.min_clients,
            self.context,
        )
        return hashlib.sha256(msgspec.msgpack.encode(description)).digest()

    @property
    def vector_bytes(self) -> int:
        """Bytes of one encoded update."""
        return self.length * self.encoding.ring.element_bytes

    def max_bytes(self, *, vectors: int = 0, names: bool = False) -> int:
        """Return the greatest length of a message with so many vectors, and clients' names or not.

        Beyond these a message holds no more than a seed.
        """
        names_bytes = sum(len(name.encode()) + 5 for name in self.clients) if names else 0
        return _FRAME_BYTES + vectors * self.vector_bytes + names_bytes

    def check_update(self, update_P: torch.Tensor) -> None:
        """Raise ValueError unless `update_P` is a vector of P contiguous floats in host memory."""
        if tuple(update_P.shape) != (self.length,):
            raise ValueError(f"an update has shape ({self.length},), not {tuple(update_P.shape)}")
        if not update_P.is_floating_point() or not update_P.is_contiguous():
            raise ValueError("an update must hold contiguous floating-point numbers")
        if update_P.device.type != "cpu":
            raise ValueError(f"an update must lie in host memory, not on {update_P.device}")

    def check_session(self, message: CohortMessage) -> None:
        """Raise WrongSession unless `message` belongs to this round."""
        if message.cohort != self.digest:
            raise WrongSession("a message of another round, or of one described otherwise")

    def check_names(self, names: tuple[str, ...]) -> None:
        """Raise MalformedMessage unless `names` are clients, each once and in their order."""
        if names != self.in_order(names):
            raise MalformedMessage("names that are no set of this round's clients, in their order")

    def check_enough(self, names: tuple[str, ...]) -> None:
        """Raise TooFewClients below `min_clients`."""
        if len(names) < self.min_clients:
            raise TooFewClients(f"{len(names)} of at least {self.min_clients} clients are there")

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of the clients who are among `names`, in the order of the cohort."""
        wanted = set(names)
        return tuple(name for name in self.clients if name in wanted)


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round releases: the sum, and whose updates are in it.

    Attributes:
        sum_P: float64, in the unit of the updates; each client's entries rounded and clipped.
        clients: names of those in the sum, in the order of the cohort.

    """

    sum_P: torch.Tensor = field(repr=False)
    clients: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many updates are in the sum."""
        return len(self.clients)


class Round(NamedTuple):
    """A round that ran in memory: its result, and what each party saw, sent and received."""

    aggregate: Aggregate
    outcome: Outcome
