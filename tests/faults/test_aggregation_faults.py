"""Whatever the wire does, a round ends with the exact sum over the clients it names, or with none.

Corruption stands apart: channels are assumed to be authenticated, and inside a share nothing could
notice a changed bit. What is noticed is everything else, bit by bit.
"""

from collections import Counter, deque

import numpy as np
import pytest
import torch

from protocols.aggregation import Aggregate, Cohort, additive
from protocols.aggregation.additive_messages import SeedUpload, SumShare, VectorUpload
from protocols.errors import DuplicateShare, PeersMissing, ProtocolError, WrongSession
from protocols.fixed_point import FixedPoint
from protocols.randomness import Stream
from protocols.ring import Z_2_64
from protocols.transport import FaultPlan, InMemoryNetwork, Outcome
from protocols.wire import decode

SEED = bytes(range(32))
LARGEST = 2**15 - 1


def cohort_of(clients: int, servers: int, session: bytes = b"session of tests") -> Cohort:
    return Cohort(
        session=session,
        clients=tuple(f"client {c}" for c in range(clients)),
        servers=tuple(f"server {s}" for s in range(servers)),
        collector="collector",
        length=3,
        encoding=FixedPoint(clip=LARGEST, bits=16, clients=clients, ring=Z_2_64),
        min_clients=2,
    )


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def parties(rng):
    """A round's parties, and what each client gives in whole steps."""

    def make(cohort):
        whole = rng.integers(-LARGEST, LARGEST + 1, (len(cohort.clients), cohort.length))
        updates_KP, stream = torch.from_numpy(whole.astype(np.float64)), Stream(SEED, "faults")
        clients = [
            additive.Client(name, cohort, update_P, stream)
            for name, update_P in zip(cohort.clients, updates_KP, strict=True)
        ]
        servers = [additive.Server(name, cohort, stream) for name in cohort.servers]
        collector = additive.Collector(cohort.collector, cohort, stream)
        return [*clients, *servers, collector], updates_KP

    return make


def is_exact(result: Aggregate, cohort: Cohort, updates_KP: torch.Tensor) -> bool:
    rows = [cohort.clients.index(name) for name in result.clients]
    return len(rows) >= cohort.min_clients and torch.equal(result.sum_P, updates_KP[rows].sum(0))


@pytest.fixture
def play(parties, rng):
    def run(cohort, **faults) -> tuple[Aggregate | None, torch.Tensor, Outcome]:
        everybody, updates_KP = parties(cohort)
        plan = FaultPlan(**faults)
        outcome = InMemoryNetwork(
            everybody, faults=plan, generator=rng, deadlines=cohort.servers
        ).run()
        return everybody[-1].result, updates_KP, outcome

    return run


@pytest.mark.parametrize(
    "faults",
    [
        {"drop": 0.06},
        {"reorder": 0.5, "drop": 0.06},
        {"duplicate": 0.02, "reorder": 0.5},
        {"drop": 0.06, "duplicate": 0.02, "reorder": 0.5},
    ],
    ids=", ".join,
)
def test_losses_repeats_and_disorder_never_give_a_wrong_sum(play, faults):
    sizes: Counter[int] = Counter()
    for _ in range(150):
        cohort = cohort_of(5, 3)
        result, updates_KP, _ = play(cohort, **faults)
        sizes[0 if result is None else result.count] += 1
        assert result is None or is_exact(result, cohort, updates_KP)
    assert sizes[0] > 10
    assert sizes[5] > 10
    assert "drop" not in faults or sizes[4] > 10


def test_disorder_alone_does_no_harm(play):
    for _ in range(100):
        result, updates_KP, _ = play(cohort_of(5, 3), reorder=1.0)
        assert result is not None
        assert is_exact(result, cohort_of(5, 3), updates_KP)
        assert result.count == 5


def test_a_client_that_is_offline_is_left_out(play):
    cohort = cohort_of(4, 2)
    result, updates_KP, outcome = play(cohort, offline_from={"client 1": 1})
    assert result.clients == ("client 0", "client 2", "client 3")
    assert is_exact(result, cohort, updates_KP)
    assert outcome.errors == {}


@pytest.mark.parametrize("round_number", [1, 2])
def test_without_a_server_nothing_is_released(play, round_number):
    result, _, outcome = play(cohort_of(4, 3), offline_from={"server 2": round_number})
    assert result is None
    assert {"server 0", "server 1", "collector"} <= set(outcome.unfinished)
    assert outcome.views["collector"].received == ()


def test_servers_that_miss_one_of_them_are_closed_by_their_deadlines(play):
    cohort = cohort_of(4, 3)
    result, _, outcome = play(cohort, offline_from={"server 2": 1, "client 3": 1})
    assert result is None
    assert {name: type(error) for name, error in outcome.errors.items()} == {
        "server 0": PeersMissing,
        "server 1": PeersMissing,
    }


def test_a_server_lost_after_the_comparison_releases_nothing(play):
    result, _, outcome = play(cohort_of(4, 3), offline_from={"server 2": 3})
    assert result is None
    assert [m.sender for m in outcome.views["collector"].received] == ["server 0", "server 1"]


def test_a_repeated_message_ends_the_round(play):
    result, _, outcome = play(cohort_of(3, 2), duplicate=1.0)
    assert result is None
    assert {type(error) for error in outcome.errors.values()} == {DuplicateShare}


def test_nothing_of_another_round_is_taken(parties):
    old = cohort_of(3, 2, session=b"an older session")
    everybody, _ = parties(old)
    outcome = InMemoryNetwork(everybody).run()
    assert everybody[-1].result is not None
    replayed = 0
    for name, view in outcome.views.items():
        for received in view.received:
            fresh = {party.name: party for party in parties(cohort_of(3, 2))[0]}
            fresh[name].start()
            with pytest.raises(WrongSession):
                fresh[name].receive(received.sender, received.data)
            replayed += 1
    assert replayed == 3 * 2 + 2 + 2


def deliver(everybody, change=None) -> list[bytes]:
    """Run a round over queues of the test's own; `change` (number, data) -> data on the wire.

    Returns:
        the messages as they were sent, in order.

    """
    by_name = {party.name: party for party in everybody}
    sent, queue = [], deque((p.name, out) for p in everybody for out in p.start())
    while queue:
        sender, out = queue.popleft()
        data = change(len(sent), out.data) if change else out.data
        sent.append(out.data)
        recipient = by_name[out.recipient]
        if recipient.done:
            continue
        try:
            queue.extend((recipient.name, answer) for answer in recipient.receive(sender, data))
        except ProtocolError:
            continue
    return sent


def share_bytes_of(data: bytes) -> set[int]:
    """Places of a message that hold nothing but a share."""
    message = decode(data, SeedUpload, VectorUpload, SumShare, max_bytes=1 << 20)
    share = message.seed if isinstance(message, SeedUpload) else message.share.data
    start = data.index(share)
    return set(range(start, start + len(share)))


def test_one_changed_bit_is_noticed_everywhere_but_in_a_share(parties):
    """Every byte of every message of a round, one bit each."""
    cohort = cohort_of(3, 2)
    sent = deliver(parties(cohort)[0])
    assert len(sent) == 3 * 2 + 2 + 2
    wrong = {}
    for number, data in enumerate(sent):
        wrong[number] = set()
        for place in range(len(data)):
            everybody, updates_KP = parties(cohort)

            def flip(n, original, number=number, place=place):
                if n != number:
                    return original
                changed = bytearray(original)
                changed[place] ^= 1 << place % 8
                return bytes(changed)

            deliver(everybody, flip)
            result = everybody[-1].result
            if result is not None and not is_exact(result, cohort, updates_KP):
                wrong[number].add(place)
            elif result is not None:
                raise AssertionError(f"byte {place} of message {number} has no meaning")
    holdings = {6, 7}
    assert {number for number in wrong if not wrong[number]} == holdings
    for number in set(wrong) - holdings:
        # Outside the claim: inside a share nobody can tell.
        assert wrong[number] == share_bytes_of(sent[number])


def test_cut_and_grown_messages_are_refused(parties):
    cohort = cohort_of(3, 2)
    for number, data in enumerate(deliver(parties(cohort)[0])):
        for length in (0, 1, 20, 21, len(data) - 1, len(data) + 1):
            everybody, _ = parties(cohort)

            def resize(n, original, number=number, length=length):
                return (original + b"\0")[:length] if n == number else original

            deliver(everybody, resize)
            assert everybody[-1].result is None
