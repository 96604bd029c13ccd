"""Parties and the network in memory, on a small additive sum that tolerates dropouts."""

import dataclasses
from typing import Annotated

import numpy as np
import pytest
import torch
from msgspec import Meta

from protocols.errors import (
    EndlessExchange,
    InconsistentShares,
    PeersMissing,
    UnexpectedMessage,
    UnknownRecipient,
)
from protocols.party import Outgoing, Party, State
from protocols.randomness import Stream
from protocols.ring import Z_2_64
from protocols.transport import FaultPlan, InMemoryNetwork
from protocols.wire import Message, RingVector, decode, encode, pack_vector, unpack_vector

SIZE = 3
LIMIT = 4096
SERVERS = ("server 0", "server 1")


class Share(Message, frozen=True, tag="test/share"):
    vector: RingVector


class Sum(Message, frozen=True, tag="test/sum"):
    clients: Annotated[list[Annotated[str, Meta(max_length=20)]], Meta(max_length=100)]
    vector: RingVector


class Client(Party):
    """Sends one share to each server."""

    def __init__(self, name, stream, values):
        super().__init__(name, stream, {"values": values})
        self._values = values

    def _on_start(self):
        mask = Z_2_64.random(SIZE, self._stream)
        shares = (mask, self._values - mask)
        self._finish()
        return [
            Outgoing(server, encode(Share(vector=pack_vector(Z_2_64, share))))
            for server, share in zip(SERVERS, shares, strict=True)
        ]

    def _on_message(self, sender, data):
        raise AssertionError("a finished party is called no more")


class Server(Party):
    """Sums the shares of those who answered; the two sums are of one set of clients or none."""

    def __init__(self, name, stream, clients):
        super().__init__(name, stream, {})
        self._waiting = set(clients)
        self._total = Z_2_64.zeros(SIZE)
        self._summed = []
        self._other = SERVERS[1 - SERVERS.index(name)]
        self._peer_sum = None
        self._sent = False
        self.result = None

    def _on_start(self):
        return []

    def _on_message(self, sender, data):
        message = decode(data, Share, Sum, max_bytes=LIMIT)
        if isinstance(message, Sum):
            if sender != self._other or self._peer_sum is not None:
                raise UnexpectedMessage(f"a sum from {sender}")
            self._peer_sum = message
            return self._conclude()
        if sender not in self._waiting:
            raise UnexpectedMessage(f"a second share from {sender}, or one from a stranger")
        Z_2_64.add_(self._total, unpack_vector(Z_2_64, message.vector, SIZE))
        self._waiting.remove(sender)
        self._summed.append(sender)
        return [] if self._waiting else self._close()

    def _on_deadline(self):
        if self._sent or len(self._summed) < 2:
            return super()._on_deadline()
        return self._close()

    def _close(self):
        self._sent = True
        mine = Sum(clients=sorted(self._summed), vector=pack_vector(Z_2_64, self._total))
        return [Outgoing(self._other, encode(mine)), *self._conclude()]

    def _conclude(self):
        if self._sent and self._peer_sum is not None:
            if self._peer_sum.clients != sorted(self._summed):
                raise InconsistentShares("the servers summed different clients")
            other = unpack_vector(Z_2_64, self._peer_sum.vector, SIZE)
            self.result = Z_2_64.add(self._total, other)
            self._finish()
        return []


def cast(n=4):
    root = Stream(bytes(range(32)), "transport")
    names = [f"client {i}" for i in range(n)]
    values = {name: torch.arange(SIZE) + 10**i for i, name in enumerate(names)}
    clients = [Client(name, root.child(name), values[name]) for name in names]
    servers = [Server(name, root.child(name), names) for name in SERVERS]
    return [*servers, *clients], values


def play(n=4, seed=0, deadlines=SERVERS, **faults):
    parties, values = cast(n)
    network = InMemoryNetwork(
        parties,
        faults=FaultPlan(**faults),
        generator=np.random.default_rng(seed),
        deadlines=deadlines,
        max_deliveries=200,
    )
    return network.run(), parties[:2], values


def total(values, names):
    return sum((values[name] for name in names), torch.zeros(SIZE, dtype=torch.int64))


# A run without faults


def test_the_sum_comes_out_and_the_traffic_is_metered():
    outcome, servers, values = play()
    for server in servers:
        assert torch.equal(server.result, total(values, values))
    assert not outcome.errors
    assert not outcome.unfinished
    assert outcome.rounds == 2
    client, server = outcome.traffic["client 0"], outcome.traffic["server 0"]
    share_bytes = len(encode(Share(vector=pack_vector(Z_2_64, Z_2_64.zeros(SIZE)))))
    assert (client.sent_messages, client.received_messages) == (2, 0)
    assert client.sent_bytes == 2 * share_bytes
    assert (server.sent_messages, server.received_messages) == (1, 5)
    received = outcome.views["server 0"].received
    assert server.received_bytes == sum(len(m.data) for m in received)
    assert server.received_bytes > 4 * share_bytes


def test_a_view_holds_all_that_corruption_reveals():
    outcome, _, values = play()
    view = outcome.views["client 2"]
    assert view.party == "client 2"
    assert torch.equal(view.inputs["values"], values["client 2"])
    # The randomness in the view reproduces what the client sent.
    mask = Z_2_64.random(SIZE, view.stream())
    sent = [m for m in outcome.views["server 0"].received if m.sender == "client 2"]
    message = decode(sent[0].data, Share, max_bytes=LIMIT)
    assert torch.equal(unpack_vector(Z_2_64, message.vector, SIZE), mask)
    # Both servers together know a client's values: the threat model of two servers.
    shares = [
        unpack_vector(Z_2_64, decode(m.data, Share, max_bytes=LIMIT).vector, SIZE)
        for server in SERVERS
        for m in outcome.views[server].received
        if m.sender == "client 3"
    ]
    assert torch.equal(shares[0] + shares[1], values["client 3"])


def test_views_are_frozen_and_do_not_print():
    view = play()[0].views["server 0"]
    assert repr(view) == "View(party='server 0')"
    assert "data" not in repr(view.received[0])
    assert repr(Outgoing("x", b"secret")) == "Outgoing(recipient='x')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.party = "another"
    with pytest.raises(TypeError):
        view.inputs["values"] = 1
    with pytest.raises(TypeError):
        view.randomness["seed"] = bytes(32)


# Faults


def test_a_silent_client_is_left_out():
    outcome, servers, values = play(offline_from={"client 1": 1})
    assert torch.equal(servers[0].result, total(values, ["client 0", "client 2", "client 3"]))
    assert outcome.traffic["client 1"].sent_messages == 2
    assert outcome.traffic["server 0"].received_messages == 4
    assert not outcome.errors


def test_without_a_timer_the_servers_wait():
    outcome, servers, _ = play(offline_from={"client 1": 1}, deadlines=())
    assert outcome.unfinished == SERVERS
    assert servers[0].result is None


def test_a_silent_server_ends_the_run_without_a_result():
    outcome, servers, _ = play(offline_from={"server 1": 2})
    assert isinstance(outcome.errors["server 0"], PeersMissing)
    assert servers[0].result is None
    assert outcome.unfinished == ("server 1",)


def test_too_few_answers_end_the_run():
    outcome, servers, _ = play(drop=1.0)
    assert set(outcome.errors) == set(SERVERS)
    assert all(isinstance(error, PeersMissing) for error in outcome.errors.values())
    assert servers[0].result is servers[1].result is None


def test_duplicates_close_the_server_that_gets_them_and_the_others_go_on():
    outcome, servers, _ = play(duplicate=1.0)
    assert all(isinstance(error, UnexpectedMessage) for error in outcome.errors.values())
    assert set(outcome.errors) == set(SERVERS)
    assert [s.state for s in servers] == [State.FAILED] * 2
    # What arrived after the failure is in the view all the same, though no party acted on it.
    assert len(outcome.views["server 0"].received) == 8


def test_reordering_changes_nothing_but_the_order():
    orders = set()
    for seed in range(10):
        outcome, servers, values = play(seed=seed, reorder=1.0)
        assert torch.equal(servers[0].result, total(values, values))
        orders.add(tuple(m.sender for m in outcome.views["server 0"].received))
    assert len(orders) > 3


def test_whatever_is_lost_doubled_or_late_the_result_is_a_true_sum_or_nothing():
    ended_well = 0
    for seed in range(40):
        _, servers, values = play(seed=seed, drop=0.1, duplicate=0.03, reorder=0.5)
        for server in servers:
            if server.result is not None:
                ended_well += 1
                assert len(server._summed) >= 2
                assert torch.equal(server.result, total(values, server._summed))
    assert 10 < ended_well < 70  # both ends are reached


def test_corruption_of_the_frame_is_refused():
    refused = 0
    for seed in range(20):
        outcome, _, _ = play(seed=seed, corrupt=1.0)
        refused += bool(outcome.errors)
    assert refused == 20


def test_faults_are_repeatable():
    def trace(seed):
        outcome, _, _ = play(seed=seed, drop=0.2, corrupt=0.3, duplicate=0.3, reorder=0.5)
        errors = {name: str(error) for name, error in outcome.errors.items()}
        return {name: view.received for name, view in outcome.views.items()}, errors

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


def test_one_fault_does_not_shift_the_others():
    def dropped(**faults):
        outcome, _, _ = play(n=8, seed=3, drop=0.4, deadlines=(), **faults)
        received = outcome.views["server 0"].received
        return {m.sender for m in received if m.sender.startswith("client")}

    arrived = dropped()
    assert 0 < len(arrived) < 8
    # Each of these strikes every message, and draws what it does to it.
    for other in ({"corrupt": 1.0}, {"reorder": 1.0}, {"duplicate": 1.0}):
        assert dropped(**other) == arrived
    assert dropped(offline_from={"server 1": 1}) == arrived


def test_a_network_runs_once():
    network = InMemoryNetwork(cast()[0])
    outcome = network.run()
    with pytest.raises(ValueError, match="once"):
        network.run()
    assert not outcome.errors


class PingPong(Party):
    def __init__(self, name, peer):
        super().__init__(name, Stream(bytes(32), name), {})
        self._peer = peer

    def _on_start(self):
        return [Outgoing(self._peer, b"ping")]

    def _on_message(self, sender, data):
        return [Outgoing(sender, data)]


def test_an_endless_exchange_is_stopped():
    network = InMemoryNetwork([PingPong("a", "b"), PingPong("b", "a")], max_deliveries=100)
    with pytest.raises(EndlessExchange):
        network.run()
    assert sum(traffic.received_messages for traffic in network._traffic.values()) == 100


def test_a_party_that_only_waits_at_its_deadline_does_not_keep_the_network_busy():
    class Idle(PingPong):
        calls = 0

        def _on_start(self):
            return []

        def _on_deadline(self):
            self.calls += 1
            return []

    idle = Idle("a", "a")
    assert InMemoryNetwork([idle], deadlines=["a"]).run().unfinished == ("a",)
    assert idle.calls == 1


def test_a_message_for_nobody_isolates_its_sender():
    parties = [PingPong("a", "nobody"), PingPong("b", "a")]
    outcome = InMemoryNetwork(parties).run()
    assert isinstance(outcome.errors["a"], UnknownRecipient)
    assert outcome.unfinished == ("b",)
    assert outcome.traffic["b"].received_messages == 0


def test_errors_that_are_no_protocol_errors_are_not_hidden():
    class Buggy(PingPong):
        def _on_message(self, sender, data):
            return [1 / 0]

    with pytest.raises(ZeroDivisionError):
        InMemoryNetwork([Buggy("a", "b"), PingPong("b", "a")]).run()


def test_network_arguments_are_checked():
    a = PingPong("a", "a")
    for arguments, text in (
        ({"parties": [a, PingPong("a", "a")]}, "one name"),
        ({"parties": [a], "faults": FaultPlan(drop=0.1)}, "generator"),
        ({"parties": [a], "deadlines": ["b"]}, "no such"),
        ({"parties": [a], "faults": FaultPlan(offline_from={"b": 1})}, "no such"),
    ):
        with pytest.raises(ValueError, match=text):
            InMemoryNetwork(**arguments)
    with pytest.raises(ValueError, match="corrupt"):
        FaultPlan(corrupt=1.1)
