"""The baseline: one party sums the clients' updates in clear. Nothing is protected.

Client c sends its encoded update x_c to the collector, which sends Σ x_c to every client. Messages,
encoding and cohort are those of the protected protocols, so that their cost and what they hide can
be measured against it. The cohort's servers have no part.

Public among the parties: everything; the collector sees every update, every client the sum.

Shapes: P = parameters, K = clients.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch

from protocols.aggregation.cohort import Aggregate, Cohort, CohortMessage, Names, Round
from protocols.errors import DuplicateShare, RemoteProtocolError, UnexpectedMessage
from protocols.party import Outgoing, Party, View
from protocols.randomness import Stream
from protocols.transport import InMemoryNetwork
from protocols.wire import RingVector, decode, encode, pack_vector, unpack_vector

A = TypeVar("A")


class Upload(CohortMessage, frozen=True, tag="aggregation/clear/upload"):
    """From a client to the collector: its encoded update, in clear."""

    update: RingVector


class Sum(CohortMessage, frozen=True, tag="aggregation/clear/sum"):
    """From the collector to every client: the sum over `clients`, in clear."""

    clients: Names
    total: RingVector


class Client(Party, Generic[A]):
    """Sends its update in clear and waits for the sum. Nothing is protected.

    | event    | does                        | next     |
    |----------|-----------------------------|----------|
    | start    | its update to the collector | –        |
    | the sum  | decodes it into `result`    | finished |
    | deadline | PeersMissing                | failed   |

    Memory: four encoded updates while its own is packed. Sends and receives P ring elements, with
    the names in the sum.

    Attributes:
        clipped_fraction: as in :class:`protocols.aggregation.additive.Client`.
        result: the sum, once it has come.

    Args:
        name: one of the cohort's clients.
        cohort: the round.
        update_P: floats, contiguous, in host memory.
        stream: unused, as nothing is hidden.

    Raises:
        ValueError: no such client, or `update_P` is not as described. `start` raises it where an
            entry is NaN or infinite.

    """

    def __init__(
        self, name: str, cohort: Cohort[A], update_P: torch.Tensor, stream: Stream
    ) -> None:
        if name not in cohort.clients:
            raise ValueError(f"{name!r} is no client of this round")
        cohort.check_update(update_P)
        super().__init__(name, stream, {"update": update_P})
        self._cohort = cohort
        self._update_P = update_P
        self.clipped_fraction: float | None = None
        self.result: Aggregate | None = None

    def _on_start(self) -> list[Outgoing]:
        encoding = self._cohort.encoding
        encoded_P, self.clipped_fraction = encoding.encode(self._update_P)
        vector = pack_vector(encoding.ring, encoded_P)
        message = Upload(cohort=self._cohort.digest, update=vector)
        return [Outgoing(self._cohort.collector, encode(message))]

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        if sender != self._cohort.collector:
            raise UnexpectedMessage(f"{self.name} expects no message from {sender!r}")
        total_P, names = _read_sum(data, self._cohort)
        self.result = Aggregate(self._cohort.encoding.decode(total_P, len(names)), names)
        self._finish()
        return []


class Collector(Party, Generic[A]):
    """Sums the updates it is sent in clear and tells every client. Nothing is protected.

    | event     | does                                              | next     |
    |-----------|---------------------------------------------------|----------|
    | an upload | adds it to the sum; after the last: sends the sum | finished |
    | deadline  | sends the sum of those that came                  | finished |

    Below `min_clients` it sends nothing and is closed by TooFewClients.

    Memory: P elements, and 4·P more while the sum is packed. Receives P elements from each client
    and sends each P and the names.

    Args:
        name: the cohort's collector.
        cohort: the round.
        stream: unused, as nothing is hidden.

    Raises:
        ValueError: another name than the cohort's collector.

    """

    def __init__(self, name: str, cohort: Cohort[A], stream: Stream) -> None:
        if name != cohort.collector:
            raise ValueError(f"{name!r} is not the collector of this round")
        super().__init__(name, stream, {})
        self._cohort = cohort
        self._summed: set[str] = set()
        self._total_P = cohort.encoding.ring.zeros(cohort.length)
        self.result: Aggregate | None = None

    def _on_start(self) -> list[Outgoing]:
        return []

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        cohort = self._cohort
        if sender not in cohort.clients:
            raise UnexpectedMessage(f"{self.name} expects no message from {sender!r}")
        update_P = _read_upload(data, cohort)
        if sender in self._summed:
            raise DuplicateShare(f"{self.name} has an update of {sender!r} already")
        self._summed.add(sender)
        cohort.encoding.ring.add_(self._total_P, update_P)
        return self._tell() if len(self._summed) == len(cohort.clients) else []

    def _on_deadline(self) -> list[Outgoing]:
        return self._tell()

    def _tell(self) -> list[Outgoing]:
        cohort = self._cohort
        names = cohort.in_order(self._summed)
        cohort.check_enough(names)
        vector = pack_vector(cohort.encoding.ring, self._total_P)
        data = encode(Sum(cohort=cohort.digest, clients=names, total=vector))
        self.result = Aggregate(cohort.encoding.decode(self._total_P, len(names)), names)
        self._finish()
        return [Outgoing(client, data) for client in cohort.clients]


def run_round(cohort: Cohort[A], updates_KP: torch.Tensor, streams: Mapping[str, Stream]) -> Round:
    """Run a whole round in memory, as :func:`protocols.aggregation.additive.run_round`."""
    clients = [
        Client(name, cohort, update_P, streams[name])
        for name, update_P in zip(cohort.clients, updates_KP, strict=True)
    ]
    collector = Collector(cohort.collector, cohort, streams[cohort.collector])
    outcome = InMemoryNetwork([*clients, collector]).run()
    assert collector.result is not None, outcome.errors  # nothing fails without a fault
    return Round(collector.result, outcome)


def held_by(view: View, cohort: Cohort[A]) -> dict[str, torch.Tensor]:
    """Read back each client's encoded update from the collector's view.

    Returns:
        int64 (P,) by client, the representatives nearest zero. An upload that the collector would
        refuse is passed over, as is a second one.

    Raises:
        ValueError: the view is not the collector's.

    """
    if view.party != cohort.collector:
        raise ValueError(f"{view.party!r} is not the collector of this round")
    held: dict[str, torch.Tensor] = {}
    for message in view.received:
        if message.sender in cohort.clients and message.sender not in held:
            try:
                update_P = _read_upload(message.data, cohort)
            except RemoteProtocolError:
                continue
            held[message.sender] = cohort.encoding.ring.to_integers(update_P)
    return {client: held[client] for client in cohort.in_order(held)}


def sum_seen(view: View, cohort: Cohort[A]) -> torch.Tensor:
    """Read back the sum that a client was sent.

    Returns:
        int64 (P,), the representatives nearest zero.

    Raises:
        ValueError: no sum came.

    """
    for message in view.received:
        if message.sender == cohort.collector:
            total_P, _ = _read_sum(message.data, cohort)
            return cohort.encoding.ring.to_integers(total_P)
    raise ValueError(f"{view.party} was sent no sum")


def _read_sum(data: bytes, cohort: Cohort[A]) -> tuple[A, tuple[str, ...]]:
    message = decode(data, Sum, max_bytes=cohort.max_bytes(vectors=1, names=True))
    cohort.check_session(message)
    cohort.check_names(message.clients)
    cohort.check_enough(message.clients)
    return unpack_vector(cohort.encoding.ring, message.total, cohort.length), message.clients


def _read_upload(data: bytes, cohort: Cohort[A]) -> A:
    upload = decode(data, Upload, max_bytes=cohort.max_bytes(vectors=1))
    cohort.check_session(upload)
    return unpack_vector(cohort.encoding.ring, upload.update, cohort.length)
