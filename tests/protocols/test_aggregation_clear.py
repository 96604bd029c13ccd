"""The baseline gives the same sum and protects nothing: were it to, it would be no baseline."""

import numpy as np
import pytest
import torch

from protocols.aggregation import Cohort, additive, clear
from protocols.errors import (
    DuplicateShare,
    MalformedMessage,
    PeersMissing,
    TooFewClients,
    UnexpectedMessage,
    WrongSession,
)
from protocols.fixed_point import FixedPoint
from protocols.party import State
from protocols.randomness import Stream
from protocols.ring import FIELD_61, Z_2_32, Z_2_64
from protocols.wire import encode, pack_vector

SEED = bytes(range(32))


@pytest.fixture(params=[Z_2_32, Z_2_64, FIELD_61], ids=str)
def cohort(request):
    return Cohort(
        session=b"session of tests",
        clients=("a", "b", "c", "d"),
        servers=("s", "t"),
        collector="collector",
        length=50,
        encoding=FixedPoint(clip=1.0, bits=16, clients=4, ring=request.param),
        min_clients=2,
    )


@pytest.fixture
def updates_KP():
    return torch.from_numpy(np.random.default_rng(1).normal(0, 0.3, (4, 50)))


@pytest.fixture
def streams(cohort):
    return dict.fromkeys(cohort.parties, Stream(SEED, "clear"))


@pytest.fixture
def parties(cohort, updates_KP, streams):
    clients = [
        clear.Client(name, cohort, update_P, streams[name])
        for name, update_P in zip(cohort.clients, updates_KP, strict=True)
    ]
    collector = clear.Collector("collector", cohort, streams["collector"])
    collector.start()
    return clients, collector, [client.start()[0].data for client in clients]


def test_it_gives_what_the_protected_protocol_gives(cohort, updates_KP, streams):
    protected, _ = additive.run_round(cohort, updates_KP, streams)
    result, outcome = clear.run_round(cohort, updates_KP, streams)
    assert torch.equal(result.sum_P, protected.sum_P)
    assert result.clients == protected.clients == cohort.clients
    error = (result.sum_P - updates_KP.clamp(-1, 1).sum(0)).abs().max()
    assert 0 < error <= 4 * cohort.encoding.max_rounding_error
    assert (outcome.rounds, outcome.errors, outcome.unfinished) == (2, {}, ())


def test_the_collector_holds_every_update(cohort, updates_KP, streams):
    _, outcome = clear.run_round(cohort, updates_KP, streams)
    held = clear.held_by(outcome.views["collector"], cohort)
    assert tuple(held) == cohort.clients
    for update_P, held_P in zip(updates_KP, held.values(), strict=True):
        error_P = (held_P.double() * cohort.encoding.step - update_P.clamp(-1, 1)).abs()
        assert error_P.max() <= cohort.encoding.max_rounding_error
    with pytest.raises(ValueError, match="not the collector"):
        clear.held_by(outcome.views["a"], cohort)


def test_a_clients_view_holds_the_sum(cohort, updates_KP, streams):
    result, outcome = clear.run_round(cohort, updates_KP, streams)
    total_P = clear.sum_seen(outcome.views["b"], cohort)
    encoding = cohort.encoding
    assert torch.equal(encoding.decode(encoding.ring.from_integers(total_P), 4), result.sum_P)
    with pytest.raises(ValueError, match="was sent no sum"):
        clear.sum_seen(outcome.views["collector"], cohort)


def test_clients_get_the_sum_of_those_that_came(parties, updates_KP, cohort):
    clients, collector, uploads = parties
    for name, data in zip("bd", uploads[1::2], strict=True):
        assert collector.receive(name, data) == []
    told = collector.deadline()
    assert [out.recipient for out in told] == ["a", "b", "c", "d"]
    clients[0].receive("collector", told[0].data)
    assert clients[0].result.clients == collector.result.clients == ("b", "d")
    assert torch.equal(clients[0].result.sum_P, collector.result.sum_P)
    error = (collector.result.sum_P - updates_KP[[1, 3]].clamp(-1, 1).sum(0)).abs().max()
    assert error <= 2 * cohort.encoding.max_rounding_error


def test_below_min_clients_nothing_is_summed(parties):
    _, collector, uploads = parties
    collector.receive("a", uploads[0])
    with pytest.raises(TooFewClients):
        collector.deadline()
    assert (collector.result, collector.state) == (None, State.FAILED)


def test_a_client_without_the_sum_is_closed_by_its_deadline(parties):
    clients, _, _ = parties
    with pytest.raises(PeersMissing):
        clients[0].deadline()
    assert clients[0].result is None


def test_wrong_uploads_close_the_collector(cohort, updates_KP, streams):
    vector = pack_vector(cohort.encoding.ring, cohort.encoding.ring.zeros(50))
    short = pack_vector(cohort.encoding.ring, cohort.encoding.ring.zeros(49))
    good = encode(clear.Upload(cohort=cohort.digest, update=vector))
    cases = [
        ("s", good, UnexpectedMessage),
        ("a", encode(clear.Upload(cohort=bytes(32), update=vector)), WrongSession),
        ("a", encode(clear.Upload(cohort=cohort.digest, update=short)), MalformedMessage),
        ("b", good, DuplicateShare),
    ]
    for sender, data, error in cases:
        collector = clear.Collector("collector", cohort, streams["collector"])
        collector.start()
        collector.receive("b", good)
        with pytest.raises(error):
            collector.receive(sender, data)
        assert collector.state is State.FAILED


def test_wrong_sums_close_a_client(cohort, updates_KP, streams):
    vector = pack_vector(cohort.encoding.ring, cohort.encoding.ring.zeros(50))
    good = clear.Sum(cohort=cohort.digest, clients=("a", "b"), total=vector)
    few = clear.Sum(cohort=cohort.digest, clients=("a",), total=vector)
    other = clear.Sum(cohort=bytes(32), clients=("a", "b"), total=vector)
    strange = clear.Sum(cohort=cohort.digest, clients=("a", "z"), total=vector)
    for sender, message, error in (
        ("b", good, UnexpectedMessage),
        ("collector", few, TooFewClients),
        ("collector", other, WrongSession),
        ("collector", strange, MalformedMessage),
    ):
        client = clear.Client("a", cohort, updates_KP[0], streams["a"])
        client.start()
        with pytest.raises(error):
            client.receive(sender, encode(message))
        assert (client.state, client.result) == (State.FAILED, None)


def test_roles_and_updates_are_checked(cohort, streams):
    with pytest.raises(ValueError, match="'s' is not the collector"):
        clear.Collector("s", cohort, streams["s"])
    with pytest.raises(ValueError, match="'s' is no client"):
        clear.Client("s", cohort, torch.zeros(50), streams["s"])
    with pytest.raises(ValueError, match="shape"):
        clear.Client("a", cohort, torch.zeros(49), streams["a"])
