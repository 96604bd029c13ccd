"""Arithmetic against Python's integers, and the encodings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from protocols.errors import MalformedMessage, NonCanonicalElement
from protocols.randomness import Stream
from protocols.ring import BLOCK, FIELD_61, Z_2_32, Z_2_64, PowerOfTwoRing

RINGS = [Z_2_32, Z_2_64, FIELD_61]
every_ring = pytest.mark.parametrize("ring", RINGS, ids=str)
P = FIELD_61.modulus


def elements(ring, integers):
    """Ring elements for any Python integers, without the code under test."""
    if ring is FIELD_61:
        return np.array([i % P for i in integers], np.uint64)
    half = ring.modulus // 2
    return torch.tensor([(i + half) % ring.modulus - half for i in integers], dtype=ring.dtype)


def residues(ring, x):
    return [int(i) % ring.modulus for i in x.reshape(-1).tolist()]


edges = [0, 1, 2, P - 1, P, P + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63, 2**64 - 1]
integers = st.one_of(st.sampled_from(edges), st.integers(0, 2**64 - 1))
pairs = st.lists(st.tuples(integers, integers), max_size=12)


@every_ring
@settings(max_examples=200)
@given(xy=pairs)
def test_arithmetic_is_that_of_the_integers(ring, xy):
    xs, ys = [x for x, _ in xy], [y for _, y in xy]
    x, y, m = elements(ring, xs), elements(ring, ys), ring.modulus
    expected = [(a % m, b % m) for a, b in xy]
    assert residues(ring, ring.add(x, y)) == [(a + b) % m for a, b in expected]
    assert residues(ring, ring.sub(x, y)) == [(a - b) % m for a, b in expected]
    assert residues(ring, ring.mul(x, y)) == [a * b % m for a, b in expected]
    assert residues(ring, ring.neg(x)) == [-a % m for a, _ in expected]
    assert residues(ring, x) == [a for a, _ in expected]  # the arguments are left alone
    z = ring.empty(len(xs))
    ring.copy_(z, x)
    ring.add_(z, y)
    assert ring.equal(z, ring.add(x, y))
    ring.sub_(z, y)
    assert ring.equal(z, x)


@every_ring
@given(rows=st.integers(0, 70), seed=st.binary(min_size=32, max_size=32))
def test_sum_is_over_the_first_dimension(ring, rows, seed):
    x = ring.random((rows, 3), Stream(seed, "sum"))
    columns = np.array(x.tolist(), dtype=object).reshape(rows, 3)
    expected = [sum(map(int, columns[:, j])) % ring.modulus for j in range(3)]
    total = ring.sum(x)
    assert ring.check(total) == (3,)
    assert residues(ring, total) == expected


def test_field_sum_of_largest_elements_does_not_overflow():
    x = np.full((1000, 2), P - 1, np.uint64)
    assert FIELD_61.sum(x).tolist() == [(1000 * (P - 1)) % P] * 2


@given(st.lists(integers.filter(lambda i: i % P != 0), min_size=1, max_size=8))
def test_field_inverses(xs):
    x = elements(FIELD_61, xs)
    inverse = FIELD_61.inverse(x)
    assert inverse.tolist() == [pow(i % P, -1, P) for i in xs]
    assert FIELD_61.mul(x, inverse).tolist() == [1] * len(xs)
    assert FIELD_61.power(x, 5).tolist() == [pow(i % P, 5, P) for i in xs]


def test_zero_has_no_inverse():
    with pytest.raises(ZeroDivisionError):
        FIELD_61.inverse(np.array([1, 0], np.uint64))


@pytest.mark.filterwarnings("error")
def test_field_scalars_neither_overflow_nor_warn():
    x, y = np.array(0, np.uint64), np.array(P - 1, np.uint64)
    assert int(FIELD_61.sub(x, y)) == 1
    assert int(FIELD_61.add(y, y)) == P - 2
    assert int(FIELD_61.mul(y, y)) == 1
    assert int(FIELD_61.neg(y)) == 1


@every_ring
@given(values=st.lists(st.integers(-(2**30), 2**30), max_size=10))
def test_signed_integers_come_back(ring, values):
    signed = torch.tensor(values, dtype=torch.int64)
    x = ring.from_integers(signed)
    assert residues(ring, x) == [v % ring.modulus for v in values]
    assert ring.to_integers(x).tolist() == values
    y = ring.empty(len(values))
    ring.set_integers_(y, signed.to(torch.float64))
    assert ring.equal(x, y)


@every_ring
def test_largest_integer_comes_back_and_the_next_does_not(ring):
    m = ring.largest_integer
    x = elements(ring, [m, -m, m + 1])
    assert ring.to_integers(x).tolist() == [m, -m, m + 1 - ring.modulus]


@every_ring
@given(count=st.integers(0, 9), seed=st.binary(min_size=32, max_size=32))
def test_bytes_come_back(ring, count, seed):
    x = ring.random(count, Stream(seed, "bytes"))
    data = ring.to_bytes(x)
    width = ring.element_bytes
    words = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    assert words == residues(ring, x)
    assert ring.equal(ring.from_bytes(data, count), x)
    for wrong in (data + b"\0", data[:-1], data + bytes(width)):
        if len(wrong) != len(data):
            with pytest.raises(MalformedMessage):
                ring.from_bytes(wrong, count)


@pytest.mark.parametrize("value", [P, P + 1, 2**64 - 1])
def test_an_element_has_one_encoding(value):
    data = bytes(8) + value.to_bytes(8, "little")
    with pytest.raises(NonCanonicalElement):
        FIELD_61.from_bytes(data, 2)
    assert FIELD_61.from_bytes(bytes(8) + (P - 1).to_bytes(8, "little"), 2)[1] == P - 1


@every_ring
def test_decoded_elements_are_writable_and_own_their_memory(ring):
    data = bytes(3 * ring.element_bytes)
    x = ring.from_bytes(data, (3,))
    ring.add_(x, ring.from_integers(torch.ones(3, dtype=torch.int64)))
    assert residues(ring, x) == [1, 1, 1]
    assert data == bytes(3 * ring.element_bytes)


@every_ring
def test_masks_are_the_stream_and_cancel(ring):
    shape = (2, BLOCK + 7)
    x = ring.random(shape, Stream(bytes(32), "x"))
    masked = ring.empty(shape)
    ring.copy_(masked, x)
    ring.add_mask_(masked, Stream(bytes(32), "mask"))
    mask = ring.random(shape, Stream(bytes(32), "mask"))
    assert ring.equal(masked, ring.add(x, mask))
    ring.sub_mask_(masked, Stream(bytes(32), "mask"))
    assert ring.equal(masked, x)


@every_ring
def test_random_elements_are_uniform(ring):
    # False alarm 10^-4; the sum of two uniforms in 16 cells of half the range must be rejected.
    x = np.array(residues(ring, ring.random(32_000, Stream(bytes(32), "uniform"))), dtype=object)
    cells = [int(v * 16 // ring.modulus) for v in x]
    assert stats.chisquare(np.bincount(cells, minlength=16)).pvalue > 1e-4
    halves = [int((a + b) * 8 // ring.modulus) for a, b in zip(x[::2], x[1::2], strict=True)]
    assert stats.chisquare(np.bincount(halves, minlength=16)).pvalue < 1e-10


def test_wrong_types_are_refused():
    with pytest.raises(ValueError, match="32 or 64"):
        PowerOfTwoRing(16)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        Z_2_32.check(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="uint64"):
        FIELD_61.check(np.zeros(2))
    with pytest.raises(ValueError, match="contiguous"):
        list(Z_2_64.blocks(torch.zeros((2, 2), dtype=torch.int64).t()))
    with pytest.raises(ValueError, match="contiguous"):
        list(FIELD_61.blocks(np.zeros((2, 2), np.uint64).T))


@every_ring
def test_blocks_cover_the_vector(ring):
    x = ring.random((3, 5), Stream(bytes(32), "blocks"))
    sizes = [math.prod(ring.check(block)) for block in ring.blocks(x, size=4)]
    assert sizes == [4, 4, 4, 3]
