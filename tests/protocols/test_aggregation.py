"""Shared among servers, the updates open to their sum over one set of clients, and to nothing else.

Statistical tests run on fixed streams; each states the false-alarm probability it would have on
fresh ones.
"""

import dataclasses
import hashlib
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from protocols.aggregation import Aggregate, Cohort, Round, additive
from protocols.aggregation.additive_messages import Holding, SeedUpload, SumShare, VectorUpload
from protocols.errors import (
    DuplicateShare,
    InconsistentShares,
    InconsistentSurvivors,
    MalformedMessage,
    OversizedMessage,
    PartySpent,
    PeersMissing,
    TooFewClients,
    UnexpectedMessage,
    WrongSession,
)
from protocols.fixed_point import FixedPoint
from protocols.party import State
from protocols.randomness import Stream
from protocols.ring import FIELD_61, Z_2_32, Z_2_64
from protocols.wire import decode, encode, pack_vector

RINGS = [Z_2_32, Z_2_64, FIELD_61]
every_ring = pytest.mark.parametrize("ring", RINGS, ids=str)
SEED = bytes(range(32))
LARGEST = 2**15 - 1
MAX = 1 << 20


def cohort_of(clients=3, servers=2, length=4, ring=Z_2_64, min_clients=2) -> Cohort:
    """One step is 1, so that whole numbers are encoded exactly."""
    return Cohort(
        session=b"session of tests",
        clients=tuple(f"client {c}" for c in range(clients)),
        servers=tuple(f"server {s}" for s in range(servers)),
        collector="collector",
        length=length,
        encoding=FixedPoint(clip=LARGEST, bits=16, clients=clients, ring=ring),
        min_clients=min_clients,
    )


@pytest.fixture
def streams():
    return lambda cohort, seed=SEED: dict.fromkeys(cohort.parties, Stream(seed, "aggregation"))


@pytest.fixture
def updates():
    """Whole numbers within the clip."""

    def draw(cohort, seed=1):
        rng = np.random.default_rng(seed)
        shape = (len(cohort.clients), cohort.length)
        return torch.from_numpy(rng.integers(-LARGEST, LARGEST + 1, shape).astype(np.float64))

    return draw


@pytest.fixture
def sent(streams, updates):
    """A cohort, its started servers, its collector, and every client's uploads by (client, s)."""

    def start(cohort):
        source = streams(cohort)
        uploads = {}
        for name, update_P in zip(cohort.clients, updates(cohort), strict=True):
            outgoing = additive.Client(name, cohort, update_P, source[name]).start()
            assert [item.recipient for item in outgoing] == list(cohort.servers)
            uploads |= {(name, s): item.data for s, item in enumerate(outgoing)}
        servers = [additive.Server(name, cohort, source[name]) for name in cohort.servers]
        collector = additive.Collector(cohort.collector, cohort, source[cohort.collector])
        for party in (*servers, collector):
            assert party.start() == []
        return servers, collector, uploads

    return start


def uniform(integers_P: torch.Tensor) -> float:
    """p-value of a chi-square test that all bytes of Z_2^64 elements are uniform."""
    return stats.chisquare(np.bincount(integers_P.numpy().view(np.uint8), minlength=256)).pvalue


# The sum


@settings(max_examples=60, deadline=None)
@given(
    ring=st.sampled_from(RINGS),
    servers=st.integers(2, 4),
    whole=st.integers(2, 5).flatmap(
        lambda k: st.lists(
            st.lists(st.integers(-LARGEST, LARGEST), min_size=3, max_size=3),
            min_size=k,
            max_size=k,
        )
    ),
    seed=st.binary(min_size=32, max_size=32),
)
def test_the_sum_is_that_of_the_integers(ring, servers, whole, seed):
    cohort = cohort_of(len(whole), servers, 3, ring)
    source = dict.fromkeys(cohort.parties, Stream(seed, "aggregation"))
    result, outcome = additive.run_round(cohort, torch.tensor(whole, dtype=torch.float32), source)
    assert result.sum_P.dtype == torch.float64
    assert result.sum_P.tolist() == [sum(column) for column in zip(*whole, strict=True)]
    assert (result.clients, result.count) == (cohort.clients, len(whole))
    assert (outcome.errors, outcome.unfinished, outcome.rounds) == ({}, (), 3)


def test_values_beyond_the_clip_are_clipped_and_their_share_is_told_to_the_client(streams):
    cohort = cohort_of(clients=2)
    update_P = torch.tensor([0.0, 1.0, 2.0 * LARGEST, -3.0 * LARGEST])
    client = additive.Client("client 0", cohort, update_P, streams(cohort)["client 0"])
    assert client.clipped_fraction is None
    client.start()
    assert client.clipped_fraction == 0.5
    result, _ = additive.run_round(cohort, torch.stack([update_P, update_P]), streams(cohort))
    assert result.sum_P.tolist() == [0, 2, 2 * LARGEST, -2 * LARGEST]


def test_traffic_is_as_documented(streams, updates):
    cohort = cohort_of(clients=4, servers=3, length=1000)
    _, outcome = additive.run_round(cohort, updates(cohort), streams(cohort))
    assert outcome.traffic["client 1"].sent_messages == 3
    extra = outcome.traffic["client 1"].sent_bytes - cohort.vector_bytes
    assert 2 * 32 < extra < 3 * 150
    names = sum(map(len, cohort.clients))
    for server in cohort.servers:
        sent_bytes = outcome.traffic[server].sent_bytes
        assert 3 * names < sent_bytes - cohort.vector_bytes < 3 * names + 3 * 150
    assert outcome.traffic["collector"].sent_messages == 0


@pytest.mark.parametrize("ring", [Z_2_32, Z_2_64], ids=str)
def test_the_longest_messages_are_within_their_bounds(streams, updates, ring):
    cohort = dataclasses.replace(
        cohort_of(clients=40, length=70_000, ring=ring),
        session=bytes(32),
        clients=tuple(chr(0x1F600 + c) * 64 for c in range(40)),
        servers=tuple(chr(0x1F700 + s) * 64 for s in range(2)),
    )
    values = updates(cohort)
    assert torch.equal(
        additive.run_round(cohort, values, streams(cohort)).aggregate.sum_P, values.sum(0)
    )


# What servers see


@pytest.mark.parametrize("servers", [2, 3])
def test_all_servers_but_one_hold_uniform_bytes(streams, servers):
    # False alarm 10^-4 for each set of servers and client; all servers must be rejected.
    cohort = cohort_of(clients=2, servers=servers, length=20_000)
    update_KP = torch.full((2, 20_000), 7.0)
    _, outcome = additive.run_round(cohort, update_KP, streams(cohort))
    views = [outcome.views[server] for server in cohort.servers]
    for size in range(1, servers):
        for chosen in combinations(views, size):
            held = additive.held_together(chosen, cohort)
            assert list(held) == ["client 0", "client 1"]
            first, second = held.values()
            assert min(uniform(first), uniform(second), uniform(first - second)) > 1e-4
    everything = additive.held_together(views, cohort)
    assert everything["client 0"].tolist() == [7] * 20_000
    assert uniform(everything["client 0"]) < 1e-10


def test_a_clients_seeds_are_the_next_bytes_of_its_own_stream(streams, updates):
    """Each seed alone is uniform even where one follows from another; only the draw shows it.

    A server that could derive its neighbour's seed from its own would be two servers.
    """
    cohort = cohort_of(clients=2, servers=4)
    seeds, views = [], []
    for name, update_P in zip(cohort.clients, updates(cohort), strict=True):
        source = streams(cohort)[name]
        client = additive.Client(name, cohort, update_P, source)
        views.append(client.view(()))
        uploads = [decode(out.data, SeedUpload, max_bytes=MAX) for out in client.start()[:-1]]
        assert [upload.index for upload in uploads] == [0, 1, 2]
        seeds.append(b"".join(upload.seed for upload in uploads))
    # The party's own seed is the first draw from the stream it was given.
    party_seed = Stream(SEED, "aggregation").bytes(32)
    assert seeds[0] == Stream(party_seed, "privlm/party/v1").bytes(3 * 32)
    assert seeds == [view.stream().bytes(3 * 32) for view in views]
    # By HKDF and AES of the cryptography package alone.
    assert (
        hashlib.sha256(seeds[0]).hexdigest()
        == "a14caac29c772795f96688cb8dd2128ad19d889a22e9132a4ee3ebb353204596"
    )


def test_a_repeated_stream_is_rejected_by_the_same_test(updates):
    # The mask cancels in the difference of two clients' shares: that must be noticed.
    cohort = cohort_of(clients=2, length=20_000)
    repeated = {name: Stream(SEED, "repeated") for name in cohort.parties}
    values = updates(cohort)
    _, outcome = additive.run_round(cohort, values, repeated)
    first, second = additive.held_by(outcome.views["server 1"], cohort).values()
    assert min(uniform(first), uniform(second)) > 1e-4
    assert uniform(first - second) < 1e-10
    assert torch.equal((first - second).double(), values[0] - values[1])


@every_ring
def test_what_a_server_holds_is_what_it_sums(streams, updates, ring):
    cohort = cohort_of(clients=4, servers=3, length=50, ring=ring)
    values = updates(cohort)
    _, outcome = additive.run_round(cohort, values, streams(cohort))
    for received in outcome.views["collector"].received:
        message = decode(received.data, SumShare, max_bytes=MAX)
        total = ring.zeros(50)
        for held in additive.held_by(outcome.views[received.sender], cohort).values():
            ring.add_(total, ring.from_integers(held))
        assert ring.to_bytes(total) == message.share.data
    together = additive.held_together([outcome.views[s] for s in cohort.servers], cohort)
    for client, update_P in zip(cohort.clients, values, strict=True):
        assert torch.equal(together[client].double(), update_P)


def test_only_a_servers_view_holds_shares(streams, updates):
    cohort = cohort_of()
    _, outcome = additive.run_round(cohort, updates(cohort), streams(cohort))
    for name in ("client 0", "collector"):
        with pytest.raises(ValueError, match="no server"):
            additive.held_by(outcome.views[name], cohort)
    with pytest.raises(ValueError, match="no view"):
        additive.held_together([], cohort)


def test_nothing_secret_prints(streams, updates):
    cohort = cohort_of()
    values = updates(cohort)
    played = additive.run_round(cohort, values, streams(cohort))
    assert isinstance(played, Round)
    client = additive.Client("client 0", cohort, values[0], streams(cohort)["client 0"])
    message = decode(client.start()[0].data, SeedUpload, max_bytes=MAX)
    text = repr((played, client, message, played.outcome.views))
    secrets = [repr(message.seed), message.seed.hex()]
    secrets += [f"{value:.0f}" for value in [*values[0], *played.aggregate.sum_P]]
    assert not [secret for secret in secrets if secret in text]
    assert "clients=('client 0', 'client 1', 'client 2')" in text


# Who is in the sum


def give(server, uploads, *names):
    index = int(server.name[-1])
    return [out for name in names for out in server.receive(name, uploads[name, index])]


def test_a_client_that_reached_some_servers_is_left_out(sent, updates):
    cohort = cohort_of(clients=4, servers=3)
    servers, collector, uploads = sent(cohort)
    in_flight = []
    for server in servers:
        reached = [n for n in cohort.clients if (server.name, n) != ("server 1", "client 2")]
        in_flight += [(server.name, out) for out in give(server, uploads, *reached)]
    assert {sender for sender, _ in in_flight} == {"server 0", "server 2"}
    in_flight += [("server 1", out) for out in servers[1].deadline()]
    to_collector = []
    for sender, out in in_flight:
        answers = servers[int(out.recipient[-1])].receive(sender, out.data)
        to_collector += [(out.recipient, answer) for answer in answers]
    for sender, out in to_collector:
        assert (out.recipient, collector.result) == ("collector", None)
        collector.receive(sender, out.data)
    assert isinstance(collector.result, Aggregate)
    assert collector.result.clients == ("client 0", "client 1", "client 3")
    assert torch.equal(collector.result.sum_P, updates(cohort)[[0, 1, 3]].sum(0))
    assert {party.state for party in (*servers, collector)} == {State.FINISHED}


def test_an_upload_after_the_deadline_is_not_taken(sent):
    cohort = cohort_of()
    (first, second), _, uploads = sent(cohort)
    give(first, uploads, "client 0", "client 1")
    [holding] = first.deadline()
    assert give(first, uploads, "client 2") == []
    said = decode(holding.data, Holding, max_bytes=MAX)
    assert said.clients == ("client 0", "client 1")
    [holding] = give(second, uploads, *cohort.clients)
    [share] = first.receive("server 1", holding.data)
    assert decode(share.data, SumShare, max_bytes=MAX).clients == ("client 0", "client 1")
    assert first.state is State.FINISHED


def test_after_its_own_deadline_a_server_waits_for_the_others_once(sent):
    (first, _), _, uploads = sent(cohort_of())
    give(first, uploads, "client 0", "client 1")
    assert len(first.deadline()) == 1
    with pytest.raises(PeersMissing):
        first.deadline()


def test_a_server_sums_once(sent):
    """A second sum, over one client less, would give that client away."""
    cohort = cohort_of()
    (first, second), _, uploads = sent(cohort)
    [holding] = give(second, uploads, *cohort.clients)
    give(first, uploads, *cohort.clients)
    assert len(first.receive("server 1", holding.data)) == 1
    smaller = Holding(cohort=cohort.digest, clients=("client 0", "client 1"))
    with pytest.raises(PartySpent):
        first.receive("server 1", encode(smaller))


def test_below_min_clients_nothing_is_summed(sent):
    cohort = cohort_of(clients=4, min_clients=3)
    (first, second), _, uploads = sent(cohort)
    give(first, uploads, "client 0", "client 1")
    with pytest.raises(TooFewClients, match="2 of at least 3"):
        first.deadline()
    assert first.state is State.FAILED
    give(second, uploads, "client 0", "client 1", "client 2")
    assert len(second.deadline()) == 1
    other = Holding(cohort=cohort.digest, clients=("client 1", "client 2", "client 3"))
    with pytest.raises(TooFewClients, match="2 of at least 3"):  # three each, two in common
        second.receive("server 0", encode(other))
    assert second.state is State.FAILED


def test_without_every_servers_word_nothing_is_released(sent):
    (first, _), collector, uploads = sent(cohort_of())
    assert [out.recipient for out in give(first, uploads, *cohort_of().clients)] == ["server 1"]
    assert first.deadline() == []  # the gathering is over; the others may still answer
    with pytest.raises(PeersMissing):
        first.deadline()
    with pytest.raises(PeersMissing):
        collector.deadline()
    assert collector.result is None


# What is refused

COHORT = cohort_of(clients=3, servers=3, length=2)
VECTOR = pack_vector(Z_2_64, Z_2_64.zeros(2))
OTHER = dataclasses.replace(COHORT, session=b"another session!")
GOOD_SEED = SeedUpload(cohort=COHORT.digest, index=0, seed=bytes(32))
GOOD_VECTOR = VectorUpload(cohort=COHORT.digest, index=2, share=VECTOR)
GOOD_HOLDING = Holding(cohort=COHORT.digest, clients=COHORT.clients)
GOOD_SUM = SumShare(cohort=COHORT.digest, index=1, clients=COHORT.clients, share=VECTOR)


def changed(message, **changes):
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return encode(type(message)(**fields | changes))


REFUSED = {
    "a stranger": (0, "nobody", encode(GOOD_SEED), UnexpectedMessage),
    "a server's own name": (0, "server 0", encode(GOOD_HOLDING), UnexpectedMessage),
    "the collector": (0, "collector", encode(GOOD_HOLDING), UnexpectedMessage),
    "a replayed upload": (0, "client 0", changed(GOOD_SEED, cohort=OTHER.digest), WrongSession),
    "a replayed vector": (2, "client 0", changed(GOOD_VECTOR, cohort=OTHER.digest), WrongSession),
    "a replayed holding": (
        0,
        "server 1",
        changed(GOOD_HOLDING, cohort=OTHER.digest),
        WrongSession,
    ),
    "another server's seed": (1, "client 0", encode(GOOD_SEED), InconsistentShares),
    "another server's vector": (2, "client 0", changed(GOOD_VECTOR, index=1), InconsistentShares),
    "a vector for a seed": (0, "client 0", encode(GOOD_VECTOR), UnexpectedMessage),
    "a seed for a vector": (2, "client 0", encode(GOOD_SEED), UnexpectedMessage),
    "a client's holding": (0, "client 0", encode(GOOD_HOLDING), UnexpectedMessage),
    "a server's upload": (0, "server 1", encode(GOOD_SEED), UnexpectedMessage),
    "a short vector": (
        2,
        "client 0",
        changed(GOOD_VECTOR, share=pack_vector(Z_2_64, Z_2_64.zeros(1))),
        MalformedMessage,
    ),
    "a long vector": (
        2,
        "client 0",
        changed(GOOD_VECTOR, share=pack_vector(Z_2_64, Z_2_64.zeros(3))),
        MalformedMessage,
    ),
    "a vector that would fill the memory": (
        2,
        "client 0",
        changed(GOOD_VECTOR, share=pack_vector(Z_2_64, Z_2_64.zeros(100))),
        OversizedMessage,
    ),
    "another ring": (
        2,
        "client 0",
        changed(GOOD_VECTOR, share=pack_vector(Z_2_32, Z_2_32.zeros(2))),
        MalformedMessage,
    ),
    "an unknown client": (
        0,
        "server 1",
        changed(GOOD_HOLDING, clients=("client 0", "client 9")),
        MalformedMessage,
    ),
    "a client twice": (
        0,
        "server 1",
        changed(GOOD_HOLDING, clients=("client 0", "client 0", "client 1")),
        MalformedMessage,
    ),
    "clients out of order": (
        0,
        "server 1",
        changed(GOOD_HOLDING, clients=("client 1", "client 0")),
        MalformedMessage,
    ),
    "rubbish": (0, "client 0", b"rubbish", MalformedMessage),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_is_closed_by(case, sent):
    index, sender, data, error = REFUSED[case]
    servers, _, _ = sent(COHORT)
    with pytest.raises(error):
        servers[index].receive(sender, data)
    assert servers[index].state is State.FAILED


def test_a_server_takes_what_is_not_refused(sent):
    """The messages that the cases above change by one field are good ones."""
    servers, collector, _ = sent(COHORT)
    assert servers[0].receive("client 0", encode(GOOD_SEED)) == []
    assert servers[2].receive("client 0", encode(GOOD_VECTOR)) == []
    assert servers[0].receive("server 1", encode(GOOD_HOLDING)) == []
    assert collector.receive("server 1", encode(GOOD_SUM)) == []


@pytest.mark.parametrize(
    ("sender", "data", "error"),
    [
        ("client 0", encode(GOOD_SUM), UnexpectedMessage),
        ("server 0", encode(GOOD_SUM), InconsistentShares),
        ("server 1", changed(GOOD_SUM, cohort=OTHER.digest), WrongSession),
        ("server 1", changed(GOOD_SUM, clients=("client 0",)), TooFewClients),
        ("server 1", changed(GOOD_SUM, clients=("client 1", "client 0")), MalformedMessage),
        ("server 1", encode(GOOD_HOLDING), UnexpectedMessage),
    ],
)
def test_the_collector_is_closed_by(sender, data, error, sent):
    _, collector, _ = sent(COHORT)
    with pytest.raises(error):
        collector.receive(sender, data)
    assert (collector.state, collector.result) == (State.FAILED, None)


def test_shares_of_sums_over_different_clients_are_not_opened(sent):
    _, collector, _ = sent(COHORT)
    collector.receive("server 1", encode(GOOD_SUM))
    other = changed(GOOD_SUM, index=0, clients=("client 0", "client 1"))
    with pytest.raises(InconsistentSurvivors):
        collector.receive("server 0", other)
    assert collector.result is None


def test_duplicates_are_refused(sent):
    servers, collector, uploads = sent(COHORT)
    give(servers[0], uploads, "client 0")
    with pytest.raises(DuplicateShare):
        give(servers[0], uploads, "client 0")
    servers[1].receive("server 0", encode(GOOD_HOLDING))
    with pytest.raises(UnexpectedMessage, match="twice"):
        servers[1].receive("server 0", encode(GOOD_HOLDING))
    collector.receive("server 1", encode(GOOD_SUM))
    with pytest.raises(DuplicateShare):
        collector.receive("server 1", encode(GOOD_SUM))
    assert {servers[0].state, servers[1].state, collector.state} == {State.FAILED}


def test_what_comes_late_is_dropped_unread(sent):
    """As documented: of a client that is not held, rubbish and repeats change nothing."""
    cohort = cohort_of()
    (first, second), _, uploads = sent(cohort)
    give(first, uploads, "client 0", "client 1")
    assert len(first.deadline()) == 1
    late = uploads["client 2", 0]
    assert [first.receive("client 2", data) for data in (b"", b"rubbish", late, late)] == [[]] * 4
    [holding] = give(second, uploads, *cohort.clients)
    [share] = first.receive("server 1", holding.data)
    assert decode(share.data, SumShare, max_bytes=MAX).clients == ("client 0", "client 1")


def test_an_upload_is_taken_once_even_after_the_holding_is_final(sent):
    servers, _, uploads = sent(COHORT)
    give(servers[0], uploads, *COHORT.clients)
    with pytest.raises(DuplicateShare):
        give(servers[0], uploads, "client 0")


def test_a_client_speaks_once_and_listens_to_nobody(streams, updates):
    client = additive.Client("client 0", COHORT, updates(COHORT)[0], streams(COHORT)["client 0"])
    client.start()
    assert client.state is State.FINISHED
    with pytest.raises(PartySpent):
        client.start()
    with pytest.raises(PartySpent):
        client.receive("server 0", b"")


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(1, 2), "shape"),
        (torch.zeros(2, dtype=torch.int64), "floating-point"),
        (torch.zeros(4)[::2], "contiguous"),
        (torch.zeros(2, device="meta"), "host memory"),
    ],
)
def test_a_client_refuses_an_update_of_another_kind(streams, update, words):
    with pytest.raises(ValueError, match=words):
        additive.Client("client 0", COHORT, update, streams(COHORT)["client 0"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_no_number_is_not_sent(streams, bad):
    update_P = torch.tensor([0.0, bad])
    client = additive.Client("client 0", COHORT, update_P, streams(COHORT)["client 0"])
    with pytest.raises(ValueError, match="1"):
        client.start()
    assert client.state is State.FAILED


@pytest.mark.parametrize("role", [additive.Server, additive.Collector])
def test_roles_belong_to_names(streams, role):
    with pytest.raises(ValueError, match="'client 0' is no"):
        role("client 0", COHORT, streams(COHORT)["client 0"])
    with pytest.raises(ValueError, match="'server 0' is no client"):
        additive.Client("server 0", COHORT, torch.zeros(2), streams(COHORT)["server 0"])


# The description


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"session": bytes(15)}, "session"),
        ({"session": bytes(33)}, "session"),
        ({"clients": ("a", "a", "b")}, "one name"),
        ({"clients": ("a", "b", "server 0")}, "one name"),
        ({"collector": "server 1"}, "one name"),
        ({"clients": ("", "b", "c")}, "characters"),
        ({"collector": "c" * 65}, "characters"),
        ({"servers": ("one",)}, "nothing would be hidden"),
        ({"servers": tuple(f"s{n}" for n in range(1025))}, "2 to 1024"),
        ({"length": 0}, "length"),
        ({"length": 1 << 29}, "length"),
        ({"min_clients": 1}, "hide nothing"),
        ({"min_clients": 4}, "at least 4"),
        ({"context": bytes(65)}, "at most 64 bytes"),
        ({"context": "text"}, "at most 64 bytes"),
        (
            {"encoding": FixedPoint(clip=1.0, bits=16, clients=2, ring=Z_2_64)},
            "the encoding has room for 2",
        ),
    ],
)
def test_a_round_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(cohort_of(), **change)


def test_whoever_holds_another_description_is_in_another_round():
    encoding = COHORT.encoding
    others = [
        dataclasses.replace(COHORT, **change)
        for change in (
            {"session": b"another session!"},
            {"clients": COHORT.clients[::-1]},
            {"clients": COHORT.clients[:2]},
            {"servers": COHORT.servers[::-1]},
            {"collector": "another"},
            {"length": 3},
            {"min_clients": 3},
            {"context": b"embedding first"},
            {"context": b"embedding last"},
            {"encoding": dataclasses.replace(encoding, clip=1.0)},
            {"encoding": dataclasses.replace(encoding, bits=17)},
            {"encoding": dataclasses.replace(encoding, clients=4)},
            {"encoding": dataclasses.replace(encoding, ring=FIELD_61)},
        )
    ]
    digests = {cohort.digest for cohort in (COHORT, *others)}
    assert len(digests) == 14
    assert len(dataclasses.replace(COHORT, context=bytes(64)).digest) == 32
    same = dataclasses.replace(COHORT, clients=list(COHORT.clients))
    assert (same, same.digest) == (COHORT, COHORT.digest)
