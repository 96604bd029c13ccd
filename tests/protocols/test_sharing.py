"""Shares open to the secret, hide it below the threshold, and do not open when they should not."""

import tracemalloc
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from protocols.errors import (
    DuplicateShare,
    InconsistentShares,
    MissingShares,
    NonCanonicalElement,
)
from protocols.randomness import Stream
from protocols.ring import BLOCK, FIELD_61, Z_2_32, Z_2_64
from protocols.sharing import (
    SeedShare,
    ShamirShare,
    ShareSum,
    VectorShare,
    open_additive,
    open_bytes,
    open_shamir,
    share_additive,
    share_bytes,
    share_shamir,
)

RINGS = [Z_2_32, Z_2_64, FIELD_61]
every_ring = pytest.mark.parametrize("ring", RINGS, ids=str)
seeds = st.binary(min_size=32, max_size=32)
P = FIELD_61.modulus


def stream(label: str = "sharing") -> Stream:
    return Stream(bytes(range(32)), label)


# Additive


@every_ring
@given(parties=st.integers(2, 6), size=st.integers(0, 9), seed=seeds, order=st.randoms())
def test_additive_shares_open_in_any_order(ring, parties, size, seed, order):
    secret = ring.random((size, 2), Stream(seed, "secret"))
    shares = share_additive(secret, ring, parties, Stream(seed, "shares"))
    order.shuffle(shares)
    assert ring.equal(open_additive(shares), secret)
    assert sum(isinstance(share, VectorShare) for share in shares) == 1
    # Without one of them, what is left opens to something else.
    if size:
        rest = ring.zeros((size, 2))
        for share in shares[1:]:
            share.add_to_(rest)
        assert not ring.equal(rest, secret)


@every_ring
def test_additive_shares_of_long_vectors_and_in_place(ring):
    secret = ring.random(2 * BLOCK + 5, stream("secret"))
    kept = ring.add(secret, ring.zeros(2 * BLOCK + 5))
    shares = share_additive(secret, ring, 3, stream(), out=secret)
    assert shares[-1].elements is secret
    out = ring.random(2 * BLOCK + 5, stream("rubbish"))
    assert open_additive(shares, out=out) is out
    assert ring.equal(out, kept)


@every_ring
def test_every_share_of_a_constant_is_uniform(ring):
    # False alarm 10^-4 for each share; the secret itself must be rejected.
    secret = ring.zeros(16_000)
    for share in share_additive(secret, ring, 3, stream()):
        alone = ring.zeros(16_000)
        share.add_to_(alone)
        cells = [int(v) % ring.modulus * 16 // ring.modulus for v in alone.tolist()]
        assert stats.chisquare(np.bincount(cells, minlength=16)).pvalue > 1e-4
    assert stats.chisquare(np.bincount([0] * 16_000, minlength=16)).pvalue < 1e-10


@every_ring
def test_all_shares_but_one_are_independent(ring):
    # False alarm 10^-4 for each pair of three; all three together must be rejected.
    def cells(x):
        return np.array([int(v) % ring.modulus * 4 // ring.modulus for v in x.tolist()])

    def joint(a, b):
        return stats.chisquare(np.bincount(4 * cells(a) + cells(b), minlength=16)).pvalue

    alone = [ring.zeros(16_000) for _ in range(3)]
    for share in share_additive(ring.zeros(16_000), ring, 3, stream()):
        share.add_to_(alone[share.index])
    for a, b in combinations(alone, 2):
        assert joint(a, b) > 1e-4
    assert joint(ring.add(alone[0], alone[1]), alone[2]) < 1e-10


@every_ring
def test_servers_sum_shares_into_shares_of_the_sum(ring):
    shape = (BLOCK + 3,)
    secrets = [ring.random(shape, stream(f"secret {c}")) for c in range(4)]
    sums: dict[int, ShareSum] = {}
    for c, secret in enumerate(secrets):
        for share in share_additive(secret, ring, 3, stream(f"client {c}")):
            if share.index in sums:
                sums[share.index].add(share)
            else:
                rubbish = ring.random(shape, stream("rubbish"))
                sums[share.index] = ShareSum(share, out=rubbish)
    assert [s.count for s in sums.values()] == [4, 4, 4]
    total = open_additive([s.share() for s in sums.values()])
    expected = ring.zeros(shape)
    for secret in secrets:
        ring.add_(expected, secret)
    assert ring.equal(total, expected)


def test_summing_takes_constant_memory():
    # NumPy's allocations are traced: there must be blocks among them, not the 8 MiB of a vector.
    secret, buffers = FIELD_61.zeros(1 << 20), [FIELD_61.zeros(1 << 20) for _ in range(2)]
    tracemalloc.start()
    shares = share_additive(secret, FIELD_61, 5, stream(), out=secret)
    total = ShareSum(shares[4], out=buffers[0])
    total.add(shares[4])
    ShareSum(shares[0], out=buffers[1]).add(shares[0])
    open_additive(shares, out=buffers[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_additive_opening_refuses_wrong_sets_of_shares():
    secret = Z_2_64.random(4, stream("secret"))
    a, b, c = share_additive(secret, Z_2_64, 3, stream())
    with pytest.raises(MissingShares, match=r"\[1\]"):
        open_additive([a, c])
    with pytest.raises(MissingShares):
        open_additive([])
    with pytest.raises(DuplicateShare, match=r"\[0\]"):
        open_additive([a, a, b, c])
    with pytest.raises(DuplicateShare):
        open_additive([a, a, c])
    others = [
        share_additive(secret, Z_2_64, 2, stream())[1],
        share_additive(Z_2_64.zeros(5), Z_2_64, 3, stream())[2],
        share_additive(Z_2_32.zeros(4), Z_2_32, 3, stream())[2],
    ]
    for other in others:
        with pytest.raises(InconsistentShares):
            open_additive([a, b, other])
        with pytest.raises(InconsistentShares):
            ShareSum(c).add(other)
    with pytest.raises(InconsistentShares, match="server 2"):
        ShareSum(c).add(a)


def test_additive_arguments_are_checked():
    with pytest.raises(ValueError, match="hide nothing"):
        share_additive(Z_2_32.zeros(1), Z_2_32, 1, stream())
    with pytest.raises(ValueError, match="int32"):
        share_additive(Z_2_64.zeros(1), Z_2_32, 2, stream())
    with pytest.raises(ValueError, match="shape"):
        share_additive(Z_2_32.zeros(1), Z_2_32, 2, stream(), out=Z_2_32.zeros(2))
    shares = share_additive(Z_2_32.zeros(1), Z_2_32, 2, stream())
    with pytest.raises(ValueError, match="shape"):
        open_additive(shares, out=Z_2_32.zeros(2))
    with pytest.raises(ValueError, match="shape"):
        ShareSum(shares[0], out=Z_2_32.zeros(2))
    with pytest.raises(ValueError, match="index"):
        SeedShare(ring=Z_2_32, index=2, parties=2, shape=(1,), seed=bytes(32))
    with pytest.raises(ValueError, match="32 bytes"):
        SeedShare(ring=Z_2_32, index=0, parties=2, shape=(1,), seed=bytes(31))
    with pytest.raises(ValueError, match="shape"):
        VectorShare(ring=Z_2_32, index=0, parties=2, shape=(1,), elements=Z_2_32.zeros(2))


@every_ring
def test_the_memory_of_a_share_is_not_cleared_before_it_is_added(ring):
    shares = share_additive(ring.random(4, stream("secret")), ring, 3, stream())
    kept = ring.to_bytes(shares[-1].elements)
    with pytest.raises(ValueError, match="memory of share 2"):
        open_additive(shares, out=shares[-1].elements)
    with pytest.raises(ValueError, match="memory of share 2"):
        ShareSum(shares[-1], out=shares[-1].elements)
    assert ring.to_bytes(shares[-1].elements) == kept


def test_shares_do_not_print():
    secret = torch.tensor([123456789])
    seed_share, vector_share = share_additive(secret, Z_2_64, 2, stream())
    shamir = share_bytes(b"secret", 2, 3, stream())[0]
    for share, hidden in (
        (seed_share, repr(seed_share.seed)),
        (vector_share, str(vector_share.elements.item())),
        (shamir, str(shamir.values[0])),
    ):
        assert hidden not in repr(share)
        assert "index=" in repr(share)


# Shamir


@settings(max_examples=60)
@given(
    secrets=st.lists(st.integers(0, P - 1), max_size=5),
    parties=st.integers(2, 9),
    seed=seeds,
    data=st.data(),
)
def test_any_threshold_of_shares_opens(secrets, parties, seed, data):
    threshold = data.draw(st.integers(2, parties))
    secrets_M = np.array(secrets, np.uint64)
    shares = share_shamir(secrets_M, threshold, parties, Stream(seed, "shamir"))
    size = data.draw(st.integers(threshold, parties))
    chosen = data.draw(st.permutations(shares))[:size]
    np.testing.assert_array_equal(open_shamir(chosen), secrets_M)
    with pytest.raises(MissingShares):
        open_shamir(chosen[: threshold - 1])


def test_every_subset_opens_a_known_polynomial():
    # f(z) = 42 + 7z + (p-1)z², by hand.
    points = {x: (42 + 7 * x + (P - 1) * x * x) % P for x in (1, 2, 3, 5, 1000, P - 1)}
    shares = [
        ShamirShare(index=x, threshold=3, values=np.array([y], np.uint64))
        for x, y in points.items()
    ]
    for size in (3, 4, 6):
        for subset in combinations(shares, size):
            assert open_shamir(subset).tolist() == [42]


@settings(max_examples=40)
@given(seed=seeds, victim=st.integers(0, 4), delta=st.integers(1, P - 1), where=st.integers(0, 2))
def test_a_changed_share_is_noticed_when_there_is_one_to_spare(seed, victim, delta, where):
    shares = share_shamir(FIELD_61.zeros(3), 4, 5, Stream(seed, "shamir"))
    values = shares[victim].values.copy()
    values[where] = (int(values[where]) + delta) % P
    shares[victim] = replace(shares[victim], values=values)
    with pytest.raises(InconsistentShares):
        open_shamir(shares)
    # With exactly the threshold nothing can be checked, and the secret comes out wrong.
    if victim < 4:
        assert open_shamir(shares[:4]).any()


def test_fewer_shares_than_the_threshold_are_uniform():
    # False alarm 10^-4 for each pair; the pair that determines the secret must be rejected.
    n = 20_000
    secrets_M = np.full(n, 12345, np.uint64)

    def joint(a, b):
        cells = a.values // np.uint64(P // 4 + 1) * np.uint64(4) + b.values // np.uint64(P // 4 + 1)
        return stats.chisquare(np.bincount(cells.astype(np.int64), minlength=16)).pvalue

    shares = share_shamir(secrets_M, 3, 4, stream())
    for a, b in combinations(shares, 2):
        assert joint(a, b) > 1e-4
    # With threshold 2, share 2 is 2·(share 1) - secret: two shares are far from independent.
    a, b = share_shamir(secrets_M, 2, 2, stream())
    assert joint(a, b) < 1e-10


def test_each_secret_has_its_own_polynomial():
    shares = share_shamir(FIELD_61.zeros(100), 2, 2, stream())
    assert len(set(shares[0].values.tolist())) == 100


def test_shamir_opening_refuses_wrong_sets_of_shares():
    a, b, c = share_shamir(FIELD_61.zeros(2), 2, 3, stream())
    with pytest.raises(DuplicateShare, match=r"\[1\]"):
        open_shamir([a, a])
    with pytest.raises(DuplicateShare):
        open_shamir([a, a, b, c])
    with pytest.raises(MissingShares):
        open_shamir([])
    other = share_shamir(FIELD_61.zeros(2), 3, 3, stream())[1]
    shorter = share_shamir(FIELD_61.zeros(1), 2, 3, stream())[1]
    for share in (other, shorter):
        with pytest.raises(InconsistentShares):
            open_shamir([a, share])


def test_shamir_arguments_are_checked():
    for threshold, parties in ((1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="threshold"):
            share_shamir(FIELD_61.zeros(1), threshold, parties, stream())
    for secrets in (np.array([P], np.uint64), np.zeros((2, 2), np.uint64)):
        with pytest.raises(ValueError, match="vector of field elements"):
            share_shamir(secrets, 2, 3, stream())
    good = np.zeros(1, np.uint64)
    for wrong in (
        {"index": 0},
        {"index": P},
        {"threshold": 1},
        {"values": np.array([P], np.uint64)},
        {"values": np.zeros((1, 1), np.uint64)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShamirShare(**{"index": 1, "threshold": 2, "values": good, **wrong})


@given(secret=st.binary(max_size=70), seed=seeds)
def test_byte_strings_come_back(secret, seed):
    shares = share_bytes(secret, 2, 3, Stream(seed, "bytes"))
    assert open_bytes(shares[1:], len(secret)) == secret
    assert len(shares[0].values) == -(-len(secret) // 7)


def test_shares_that_open_to_no_byte_string_are_refused():
    shares = share_bytes(bytes(range(32)), 2, 3, stream())
    for length in (28, 31, 36):
        with pytest.raises(NonCanonicalElement):
            open_bytes(shares, length)
    too_large = share_shamir(np.array([1 << 56], np.uint64), 2, 3, stream())
    with pytest.raises(NonCanonicalElement):
        open_bytes(too_large, 7)


def test_a_hundred_clients_share_their_seeds_quickly():
    shares = share_bytes(bytes(range(32)), 50, 100, stream())
    assert open_bytes(shares[37:], 32) == bytes(range(32))
