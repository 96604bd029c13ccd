"""Reals to ring elements and back: exact bounds, unbiased rounding, no silent clipping."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from protocols.fixed_point import FixedPoint
from protocols.randomness import Stream
from protocols.ring import BLOCK, FIELD_61, Z_2_32, Z_2_64

RINGS = [Z_2_32, Z_2_64, FIELD_61]


def stream(label: str = "rounding") -> Stream:
    return Stream(bytes(range(32)), label)


@st.composite
def layouts(draw):
    """Fixed points that use their ring up to the last client, with vectors for all of them."""
    ring = draw(st.sampled_from(RINGS))
    bits = draw(st.integers(2, 32 if ring is not Z_2_32 else 31))
    most = ring.largest_integer // ((1 << (bits - 1)) - 1)
    clients = draw(st.integers(1, min(most, 40)) | st.just(most))
    clip = draw(st.floats(1e-6, 1e6))
    return FixedPoint(clip=clip, bits=bits, clients=clients, ring=ring), most


@settings(max_examples=150)
@given(layouts(), st.data())
def test_sums_of_all_clients_never_wrap(layout, data):
    fixed, _ = layout
    n = min(fixed.clients, 40)
    extremes = st.sampled_from([fixed.clip, -fixed.clip, 2 * fixed.clip, -1e30, 0.0])
    value = extremes | st.floats(-2 * fixed.clip, 2 * fixed.clip)
    rows = data.draw(st.lists(st.tuples(value, value), min_size=n, max_size=n))
    x_NV = torch.tensor(rows, dtype=torch.float64)
    total = fixed.ring.zeros(2)
    at_random = data.draw(st.booleans())
    for index, x_V in enumerate(x_NV):
        rounding = stream(str(index)) if at_random else None
        fixed.ring.add_(total, fixed.encode(x_V, stream=rounding).elements)
    exact = x_NV.clamp(-fixed.clip, fixed.clip).sum(dim=0)
    worst = fixed.max_rounding_error * (2 if at_random else 1) * n
    error = (fixed.decode(total, n) - exact).abs().max().item()
    assert error <= worst * (1 + 1e-9) + n * fixed.clip * 1e-15
    assert fixed.ring.to_integers(total).abs().max() <= n * fixed.largest


@given(layouts())
def test_one_client_more_than_the_ring_holds_is_refused(layout):
    fixed, most = layout
    FixedPoint(clip=fixed.clip, bits=fixed.bits, clients=most, ring=fixed.ring)
    with pytest.raises(ValueError, match="would wrap"):
        FixedPoint(clip=fixed.clip, bits=fixed.bits, clients=most + 1, ring=fixed.ring)


def test_the_bound_is_tight_a_sum_beyond_it_does_wrap():
    most = Z_2_32.largest_integer // 127
    fixed = FixedPoint(clip=1.0, bits=8, clients=most, ring=Z_2_32)
    one = fixed.encode(torch.ones(1)).elements
    full = one.to(torch.int64) * most
    assert fixed.decode(full.to(torch.int32), most).item() == pytest.approx(most)
    beyond = (full + one).to(torch.int32)
    assert fixed.decode(beyond, most).item() < 0


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("rounding", [None, "stream"])
def test_values_on_the_grid_come_back_exactly(ring, rounding):
    fixed = FixedPoint(clip=127.0, bits=8, clients=3, ring=ring)
    grid = torch.arange(-127, 128, dtype=torch.float32)
    encoded = fixed.encode(grid, stream=stream() if rounding else None)
    assert encoded.clipped_fraction == 0.0
    assert torch.equal(fixed.decode(encoded.elements, 1), grid.to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_width_is_rounded_to_nearest(dtype):
    fixed = FixedPoint(clip=0.75, bits=12, clients=5, ring=Z_2_32)
    x = torch.linspace(-1, 1, 2 * BLOCK + 3, dtype=torch.float64).to(dtype)
    exact = x.to(torch.float64).clamp(-0.75, 0.75)
    error = (fixed.decode(fixed.encode(x).elements, 1) - exact).abs().max().item()
    assert error <= fixed.max_rounding_error
    assert error > 0.45 * fixed.step


def test_shapes_are_kept_and_buffers_reused():
    fixed = FixedPoint(clip=1.0, bits=16, clients=2, ring=Z_2_64)
    for shape in ((), (0,), (3, 4), (BLOCK + 1,)):
        x = torch.rand(shape)
        out, back = Z_2_64.empty(shape), torch.empty(shape)
        encoded = fixed.encode(x, out=out)
        assert encoded.elements is out
        assert fixed.decode(out, 1, out=back) is back
        assert torch.allclose(back, x, atol=fixed.step)
    with pytest.raises(ValueError, match="shape"):
        fixed.encode(torch.rand(3), out=Z_2_64.empty(4))
    with pytest.raises(ValueError, match="shape"):
        fixed.decode(Z_2_64.zeros(3), 1, out=torch.empty(4))
    with pytest.raises(ValueError, match="contiguous"):
        fixed.decode(Z_2_64.zeros((3, 3)), 1, out=torch.empty((3, 3)).t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_are_left_alone(dtype):
    x = torch.tensor([3.0, -0.1, -5.0], dtype=dtype)
    kept = x.clone()
    FixedPoint(clip=1.0, bits=8, clients=1, ring=Z_2_32).encode(x, stream=stream())
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("x", "fraction"),
    [([0.5, -1.0, 1.0], 0.0), ([1.5, -1.0, 0.0, -2.0], 0.5), ([5.0], 1.0), ([], 0.0)],
)
def test_clipping_is_reported(x, fraction):
    fixed = FixedPoint(clip=1.0, bits=8, clients=1, ring=Z_2_32)
    encoded = fixed.encode(torch.tensor(x))
    assert encoded.clipped_fraction == fraction
    assert fixed.decode(encoded.elements, 1).tolist() == pytest.approx(
        [max(-1.0, min(1.0, v)) for v in x], abs=fixed.step
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (1, BLOCK - 1), (2, 5)])
def test_values_that_are_no_numbers_are_refused_by_place(bad, where):
    x = torch.zeros((3, BLOCK))
    x[where] = bad
    fixed = FixedPoint(clip=1.0, bits=8, clients=1, ring=Z_2_32)
    with pytest.raises(ValueError, match="not finite") as error:
        fixed.encode(x)
    assert str(where) in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": math.nan},
        {"clip": math.inf},
        {"clip": 1e-300},  # largest/clip overflows: every zero would become NaN
        {"clip": 5e-324},
        {"clip": 1e300},
        {"bits": 1},
        {"bits": 33},
        {"clients": 0},
    ],
)
def test_parameters_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FixedPoint(**{"clip": 1.0, "bits": 8, "clients": 1, "ring": Z_2_64, **arguments})


@pytest.mark.parametrize("clip", [2.0**-900, 2.0**900])
@pytest.mark.parametrize("bits", [2, 32])
def test_the_smallest_and_the_largest_clip_work(clip, bits):
    fixed = FixedPoint(clip=clip, bits=bits, clients=1 << 31, ring=Z_2_64)
    x = torch.tensor([0.0, clip, -clip, 5e-324, 1e308, -1e308], dtype=torch.float64)
    for rounding in (None, stream()):
        elements = fixed.encode(x, stream=rounding).elements
        assert elements.abs().max() <= fixed.largest
        back = fixed.decode(elements, 1)
        error = (back - x.clamp(-clip, clip)).abs().max()
        assert error <= fixed.max_rounding_error
        total = fixed.decode(elements * fixed.clients, fixed.clients)
        assert torch.isfinite(total).all()


def test_numbers_of_numpy_do_not_weaken_the_bound():
    # In np.int32, 100,000 · (2^15 - 1) wraps to something negative, below every bound.
    with pytest.raises(ValueError, match="would wrap"):
        FixedPoint(clip=1.0, bits=16, clients=np.int32(100_000), ring=Z_2_32)
    with pytest.raises(ValueError, match="would wrap"):
        FixedPoint(clip=1.0, bits=np.int32(32), clients=np.int64(1 << 33), ring=Z_2_64)
    fixed = FixedPoint(clip=np.float32(0.1), bits=np.int8(32), clients=1, ring=Z_2_64)
    x = torch.linspace(-0.1, 0.1, 1001, dtype=torch.float64)
    error = (fixed.decode(fixed.encode(x).elements, 1) - x).abs().max().item()
    assert error <= fixed.max_rounding_error
    with pytest.raises(TypeError):
        FixedPoint(clip=1.0, bits=8, clients=2.5, ring=Z_2_32)


def test_encoded_values_do_not_print():
    fixed = FixedPoint(clip=1.0, bits=20, clients=2, ring=Z_2_32)
    encoded = fixed.encode(torch.tensor([0.4321, 7.0]))
    assert repr(encoded) == f"{encoded}" == "Encoded(elements=…, clipped_fraction=…)"


def test_inputs_of_the_wrong_kind_are_refused():
    fixed = FixedPoint(clip=1.0, bits=8, clients=2, ring=Z_2_32)
    for x in (torch.zeros(3, dtype=torch.int64), torch.zeros((3, 3)).t()[1:]):
        with pytest.raises(ValueError, match="contiguous"):
            fixed.encode(x)
    for count in (0, 3):
        with pytest.raises(ValueError, match="count"):
            fixed.decode(Z_2_32.zeros(1), count)


# Rounding at random. False-alarm probability 10^-4 for each test.


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_rounding_at_random_is_unbiased_and_rounding_to_nearest_is_not(ring):
    fixed = FixedPoint(clip=1.0, bits=6, clients=2, ring=ring)
    n = 40_000
    for x in (0.3, -0.3, 0.001, -0.9999, 5.0):
        target = max(-1.0, min(1.0, x))
        values = torch.full((n,), x, dtype=torch.float64)
        encoded = fixed.encode(values, stream=stream(f"{x}"))
        decoded = fixed.decode(encoded.elements, 1)
        spread = decoded.std().item() or fixed.step * 1e-9
        assert abs(decoded.mean().item() - target) < 3.9 * spread / math.sqrt(n) + 1e-12
        assert (decoded - target).abs().max() < fixed.step
        nearest = fixed.decode(fixed.encode(values).elements, 1).mean().item()
        if target == x:
            assert abs(nearest - target) > 3.9 * spread / math.sqrt(n)


def test_each_value_has_its_own_coin():
    fixed = FixedPoint(clip=1.0, bits=4, clients=1, ring=Z_2_32)
    x = torch.full((4096,), 0.5 / 7)
    up = fixed.encode(x, stream=stream()).elements.numpy()
    assert stats.binomtest(int(up.sum()), up.size).pvalue > 1e-4
    assert stats.binomtest(int((up[1:] == up[:-1]).sum()), up.size - 1).pvalue > 1e-4


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_no_coin_rounds_the_largest_value_beyond_the_bound(ring):
    class Constant(Stream):
        __slots__ = ("word",)

        def ring_elements(self, bits, shape):
            return torch.full((shape,), self.word, dtype=torch.int64)

    bits = 31 if ring is Z_2_32 else 32
    for clip in (1.0, 0.1, 3.3, 1e-5):
        fixed = FixedPoint(clip=clip, bits=bits, clients=2, ring=ring)
        near = [clip, math.nextafter(clip, 0.0), math.nextafter(clip, 9.0), 1e30]
        x = torch.tensor(near + [-v for v in near], dtype=torch.float64)
        for word in (0, -1, 1):
            coins = Constant(bytes(32), "coins")
            coins.word = word
            elements = fixed.encode(x, stream=coins).elements
            assert ring.to_integers(elements).abs().max() <= fixed.largest
            assert ring.to_integers(elements)[[3, 7]].tolist() == [fixed.largest, -fixed.largest]


def test_rounding_does_not_depend_on_blocks():
    fixed = FixedPoint(clip=1.0, bits=8, clients=1, ring=Z_2_32)
    x = torch.linspace(-1, 1, BLOCK + 100)
    whole = fixed.encode(x, stream=stream()).elements
    pieces = stream()
    parts = [fixed.encode(part, stream=pieces).elements for part in (x[:10], x[10:].contiguous())]
    assert torch.equal(whole, torch.cat(parts))


# Noise


@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_noise_is_reduced_modulo_never_clamped(ring):
    fixed = FixedPoint(clip=1.0, bits=8, clients=1, ring=ring)
    elements = fixed.encode(torch.tensor([1.0, -1.0, 0.0])).elements
    fixed.add_noise_(elements, torch.tensor([1000, 5, -3]))
    assert ring.to_integers(elements).tolist() == [1127, -122, -3]
    fixed.add_noise_(elements, torch.tensor([ring.largest_integer, 0, 0]))
    assert ring.to_integers(elements)[0] == 1127 + ring.largest_integer - ring.modulus
    with pytest.raises(ValueError, match="noise"):
        fixed.add_noise_(elements, torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="noise"):
        fixed.add_noise_(elements, torch.tensor([1, 2]))


def test_wrap_probability_bounds_what_happens():
    fixed = FixedPoint(clip=1.0, bits=31, clients=2, ring=Z_2_32)
    rng = np.random.default_rng(3)
    n = 20_000
    for noise_std in (0.0001, 0.0005, 0.001):
        worst = fixed.encode(torch.ones(n)).elements
        total = Z_2_32.add(worst, worst)
        assert fixed.decode(total, 2).min() > 1.99
        noise = torch.from_numpy(rng.normal(0, noise_std / fixed.step, n).round().astype(np.int64))
        fixed.add_noise_(total, noise)
        wrapped = (fixed.decode(total, 2) < 0).double().mean().item()
        assert wrapped <= fixed.wrap_probability(noise_std)
    roomy = FixedPoint(clip=1.0, bits=29, clients=2, ring=Z_2_32)
    assert roomy.wrap_probability(1.0) == pytest.approx(2 * math.exp(-0.5 * 6.0**2), rel=1e-6)
    assert roomy.wrap_probability(1.0, 1000) == pytest.approx(2e3 * math.exp(-18), rel=1e-6)
    assert roomy.wrap_probability(0.0, 10**9) == 0.0
    assert roomy.wrap_probability(1e9) == roomy.wrap_probability(math.inf) == 1.0
    assert roomy.wrap_probability(1e-300) == 0.0  # the square of the ratio overflows
    # The bound is not vacuous: half the claimed room would be refuted.
    noise = rng.normal(0, 3.0, 200_000)
    beyond = float((np.abs(noise) > 6.0).mean())
    assert beyond <= roomy.wrap_probability(3.0)
    assert beyond > 2 * math.exp(-0.5 * (12.0 / 3.0) ** 2)
    for arguments in ((-1.0, 1), (math.nan, 1), (1.0, 0)):
        with pytest.raises(ValueError, match="noise_std"):
            roomy.wrap_probability(*arguments)
