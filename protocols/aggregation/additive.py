"""Additive secret sharing of the clients' updates among s >= 2 servers.

Client c encodes its update as x_c over the ring and splits it, x_c = Σ_i [x_c]_i, with all shares
but the last the keystream under a seed. Server i sums what it holds over the clients U that all
servers hold, y_i = Σ_{c in U} [x_c]_i; the collector opens Σ_i y_i = Σ_{c in U} x_c.

Claim: any s - 1 servers and the collector together, whatever they send, learn of the honest
clients' updates their sum over one set U and nothing else.

Assumed:
- Private, authenticated channels between all parties.
- One honest server, which answers a session once, over restarts too: a second answer, over other
  clients, would give away the difference. Nothing here is written to disk; its host must see to it.
- Clients that upload the shares of one sharing to one session only, for the same reason.
- A secret stream for each client; AES-CTR and HMAC-SHA256 as in `Stream`.

Not claimed:
- A correct result from dishonest parties. Nothing proves a share: a server that changes its own,
  or a client that uploads rubbish, changes the sum unnoticed.
- That U is large. Dishonest servers may leave clients out, down to `min_clients`; clients in U that
  collude can subtract their own updates; the sums of two rounds may differ in one client.
- Privacy of the sum itself; that is for noise to give.
- That U tells nothing. A client's absence may: an update with a NaN in it, say, is never sent.
- That a round ends. Any message that is refused closes the party that refused it, and with it the
  round for all; one client is enough.

Public: the names of all parties, P, the encoding, who uploaded to which server, and U.

Shapes: P = parameters, K = clients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from protocols.aggregation.additive_messages import (
    read_holding,
    read_sum_share,
    read_upload,
    write_holding,
    write_sum_share,
    write_upload,
)
from protocols.aggregation.cohort import Aggregate, Cohort, Round
from protocols.errors import (
    DuplicateShare,
    InconsistentSurvivors,
    PeersMissing,
    RemoteProtocolError,
    UnexpectedMessage,
)
from protocols.party import Outgoing, Party, View
from protocols.randomness import Stream
from protocols.sharing import AdditiveShare, ShareSum, VectorShare, open_additive, share_additive
from protocols.transport import InMemoryNetwork

A = TypeVar("A")


class Client(Party, Generic[A]):
    """Shares its update among the servers, and is done.

    | event    | does                      | next     |
    |----------|---------------------------|----------|
    | start    | one upload to each server | finished |

    Memory: four encoded updates while the last upload is packed. Sends 32 bytes to each server but
    the last and P ring elements to the last, with fewer than 150 bytes around each.

    Attributes:
        clipped_fraction: share of the update's entries beyond the encoding's clip; for the
            client's owner alone. None before the start.

    Args:
        name: one of the cohort's clients.
        cohort: the round.
        update_P: floats, contiguous, in host memory.
        stream: of the seeds.

    Raises:
        ValueError: no such client, or `update_P` is not as described. `start` raises it where an
            entry is NaN or infinite.

    """

    def __init__(
        self, name: str, cohort: Cohort[A], update_P: torch.Tensor, stream: Stream
    ) -> None:
        _require_role(name, cohort.clients, "client")
        cohort.check_update(update_P)
        super().__init__(name, stream, {"update": update_P})
        self._cohort = cohort
        self._update_P = update_P
        self.clipped_fraction: float | None = None

    def _on_start(self) -> list[Outgoing]:
        cohort = self._cohort
        ring = cohort.encoding.ring
        encoded_P, self.clipped_fraction = cohort.encoding.encode(self._update_P)
        shares = share_additive(encoded_P, ring, len(cohort.servers), self._stream, out=encoded_P)
        self._finish()
        return [
            Outgoing(server, write_upload(share, cohort))
            for server, share in zip(cohort.servers, shares, strict=True)
        ]

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        raise UnexpectedMessage(f"{self.name} expects no message")


class Server(Party, Generic[A]):
    """Holds one share of each client, and sums those of the clients that all servers hold, once.

    | state     | upload                   | other's holding     | deadline                      |
    |-----------|--------------------------|---------------------|-------------------------------|
    | gathering | kept; after the last:    | kept                | sends its holding → comparing |
    |           | sends its holding        |                     |                               |
    |           | → comparing              |                     |                               |
    | comparing | late: dropped unread     | kept; after the     | the first: waits on;          |
    |           |                          | last: sends its sum | the second: PeersMissing      |
    |           |                          | → finished          |                               |

    The first deadline ends the gathering at all servers, the second the comparing: a server that
    has everybody's upload waits for those that do not. Both may be one timer's.

    A holding that has been sent is final, so a client whose upload comes later is left out by all;
    whatever else such a client sends is dropped unread as well, repeats and rubbish included.
    Refused in both states: a second upload of a client that is held, a second holding of one
    server, and, where it is read, whatever `decode` or the cohort refuses. Below `min_clients`, in
    its own holding or in the intersection, a server sends nothing and is closed.

    Memory: 32 bytes a client; the last server holds K·P elements until the other holdings are in,
    and 2·P more while it reads an upload. Every server takes 4·P more for its sum and the packing
    of it. Receives from each client what that one sends; sends each other server the names it
    holds, and the collector those names and P elements.

    Args:
        name: one of the cohort's servers.
        cohort: the round.
        stream: unused, as every server step is deterministic.

    Raises:
        ValueError: no such server.

    """

    def __init__(self, name: str, cohort: Cohort[A], stream: Stream) -> None:
        _require_role(name, cohort.servers, "server")
        super().__init__(name, stream, {})
        self._cohort = cohort
        self._index = cohort.servers.index(name)
        self._shares: dict[str, AdditiveShare[A]] = {}
        self._holdings: dict[str, tuple[str, ...]] = {}
        self._gathering_over = False

    def _on_start(self) -> list[Outgoing]:
        return []

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        if sender in self._cohort.clients:
            return self._on_upload(sender, data)
        if sender in self._cohort.servers and sender != self.name:
            return self._on_holding(sender, data)
        raise UnexpectedMessage(f"{self.name} expects no message from {sender!r}")

    def _on_deadline(self) -> list[Outgoing]:
        if self._gathering_over:
            raise PeersMissing(f"{self.name}: not every server said which clients it holds")
        self._gathering_over = True
        return [] if self._compares else self._declare()

    @property
    def _compares(self) -> bool:
        return self.name in self._holdings

    def _on_upload(self, client: str, data: bytes) -> list[Outgoing]:
        if client in self._shares:
            raise DuplicateShare(f"{self.name} has a share of {client!r} already")
        if self._compares:
            return []
        self._shares[client] = read_upload(data, self._index, self._cohort)
        return self._declare() if len(self._shares) == len(self._cohort.clients) else []

    def _on_holding(self, server: str, data: bytes) -> list[Outgoing]:
        holding = read_holding(data, self._cohort)
        if server in self._holdings:
            raise UnexpectedMessage(f"{server!r} said twice which clients it holds")
        self._holdings[server] = holding
        return self._sum_when_agreed()

    def _declare(self) -> list[Outgoing]:
        """Tell the others which clients this server holds, for good."""
        held = self._cohort.in_order(self._shares)
        self._cohort.check_enough(held)
        self._holdings[self.name] = held
        data = write_holding(held, self._cohort)
        others = [server for server in self._cohort.servers if server != self.name]
        return [*(Outgoing(server, data) for server in others), *self._sum_when_agreed()]

    def _sum_when_agreed(self) -> list[Outgoing]:
        cohort = self._cohort
        if len(self._holdings) < len(cohort.servers):
            return []
        survivors = cohort.in_order(set.intersection(*map(set, self._holdings.values())))
        cohort.check_enough(survivors)
        first, *rest = (self._shares[client] for client in survivors)
        total = ShareSum(first)
        for share in rest:
            total.add(share)
        self._shares.clear()
        self._finish()
        return [Outgoing(cohort.collector, write_sum_share(total.share(), survivors, cohort))]


class Collector(Party, Generic[A]):
    """Opens the sum from the servers' shares of it.

    | event            | does                                     | next     |
    |------------------|------------------------------------------|----------|
    | a share of a sum | keeps it; after the last: opens, decodes | finished |
    | deadline         | PeersMissing                             | failed   |

    Shares over different sets of clients are refused as InconsistentSurvivors, a second share of
    one server as DuplicateShare, a share over fewer than `min_clients` as TooFewClients.

    Memory: (s + 2)·P ring elements at most, while it opens the sum. Sends nothing.

    Args:
        name: the cohort's collector.
        cohort: the round.
        stream: unused, as every step of the collector is deterministic.

    Raises:
        ValueError: another name than the cohort's collector.

    """

    def __init__(self, name: str, cohort: Cohort[A], stream: Stream) -> None:
        _require_role(name, (cohort.collector,), "collector")
        super().__init__(name, stream, {})
        self._cohort = cohort
        self._shares: dict[str, VectorShare[A]] = {}
        self._survivors: tuple[str, ...] | None = None
        self.result: Aggregate | None = None

    def _on_start(self) -> list[Outgoing]:
        return []

    def _on_message(self, sender: str, data: bytes) -> list[Outgoing]:
        cohort = self._cohort
        if sender not in cohort.servers:
            raise UnexpectedMessage(f"{self.name} expects no message from {sender!r}")
        share, survivors = read_sum_share(data, cohort.servers.index(sender), cohort)
        if sender in self._shares:
            raise DuplicateShare(f"{sender!r} sent its share of the sum twice")
        if self._survivors not in (None, survivors):
            raise InconsistentSurvivors(f"{sender!r} summed over other clients than those before")
        self._survivors = survivors
        self._shares[sender] = share
        if len(self._shares) == len(cohort.servers):
            total_P = open_additive(list(self._shares.values()))
            sum_P = cohort.encoding.decode(total_P, len(survivors))
            self.result = Aggregate(sum_P, survivors)
            self._shares.clear()
            self._finish()
        return []


def run_round(cohort: Cohort[A], updates_KP: torch.Tensor, streams: Mapping[str, Stream]) -> Round:
    """Run a whole round in memory.

    Args:
        cohort: the round.
        updates_KP: contiguous floats, one row for each client in the order of the cohort.
        streams: by the name of each party. Each takes 32 bytes, so one stream may serve all.

    Raises:
        ValueError: an update is not as :class:`Client` wants it, or is missing.

    """
    clients = [
        Client(name, cohort, update_P, streams[name])
        for name, update_P in zip(cohort.clients, updates_KP, strict=True)
    ]
    servers = [Server(name, cohort, streams[name]) for name in cohort.servers]
    collector = Collector(cohort.collector, cohort, streams[cohort.collector])
    outcome = InMemoryNetwork([*clients, *servers, collector]).run()
    assert collector.result is not None, outcome.errors  # nothing fails without a fault
    return Round(collector.result, outcome)


def held_by(view: View, cohort: Cohort[A]) -> dict[str, torch.Tensor]:
    """Read back the share that one server holds of each client's encoded update.

    Returns:
        int64 (P,) by client, the representatives nearest zero. An upload that the server would
        refuse is passed over, as is a second one; one that came late is held and returned.

    Raises:
        ValueError: the view is not a server's.

    """
    return held_together([view], cohort)


def held_together(views: Iterable[View], cohort: Cohort[A]) -> dict[str, torch.Tensor]:
    """Return the ring sum of what colluding servers hold of each client that reached them all.

    With the views of all servers that is the encoded update itself.

    Args:
        views: of distinct servers.
        cohort: the round.

    Returns:
        int64 (P,) by client, as :func:`held_by`.

    Raises:
        ValueError: no view, or one that is not a server's.

    """
    held = [_shares_in(view, cohort) for view in views]
    if not held:
        raise ValueError("no view to read")
    ring = cohort.encoding.ring
    sums: dict[str, torch.Tensor] = {}
    for client in cohort.in_order(set.intersection(*map(set, held))):
        total = ShareSum(held[0][client]).share().elements
        for shares in held[1:]:
            shares[client].add_to_(total)
        sums[client] = ring.to_integers(total)
    return sums


def _shares_in(view: View, cohort: Cohort[A]) -> dict[str, AdditiveShare[A]]:
    _require_role(view.party, cohort.servers, "server")
    index = cohort.servers.index(view.party)
    shares: dict[str, AdditiveShare[A]] = {}
    for message in view.received:
        if message.sender in cohort.clients and message.sender not in shares:
            try:
                shares[message.sender] = read_upload(message.data, index, cohort)
            except RemoteProtocolError:
                continue
    return shares


def _require_role(name: str, names: Sequence[str], role: str) -> None:
    if name not in names:
        raise ValueError(f"{name!r} is no {role} of this round")
