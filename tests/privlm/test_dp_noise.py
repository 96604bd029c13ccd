"""The Gaussian mechanism's noise: its law, its grid, what it touches and what it refuses.

Statistical tests run under a fixed seed; the stated false-alarm probability is that of the choice
of the seed.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from privlm.dp import noise as module
from privlm.dp.clipping import ClippedSum
from privlm.dp.noise import GRID_BITS, GaussianMechanism, grid_of, noise_shard, noised
from protocols.chacha20 import DeviceStream
from protocols.randomness import Stream

CPU = torch.device("cpu")
KINDS = {
    "stream": lambda: Stream(bytes(range(32)), "noise"),
    "device stream": lambda: DeviceStream(bytes(range(32)), "noise", CPU),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def stream(request):
    return request.param()


@pytest.fixture
def values():
    """Two tensors that end amid a chunk, far from zero on the scale of the noise."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(300, 333, generator=generator) * 10,
        torch.randn(7, generator=generator, dtype=torch.float64) * 10,
    )


def residuals(values, released):
    pairs = zip(values, released, strict=True)
    return torch.cat([(b.double() - a.double()).flatten() for a, b in pairs]).numpy()


def test_the_noise_has_the_stated_law_in_every_tensor(stream, values):
    """KS at 10^-4 over 99,907 numbers; σ·2/3 and σ·3/2, and the sensitivity left out, are seen."""
    mechanism = GaussianMechanism(1.5)
    released = mechanism.release(ClippedSum(values, 0.5), stream).values
    noise = residuals(values, released) / 0.75
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    for wrong in (2 / 3, 3 / 2, 2.0):
        assert stats.kstest(noise * wrong, "norm").pvalue < 1e-10
    # Each of the chunks, the last and short one too.
    for chunk in np.array_split(noise, range(1 << 15, len(noise), 1 << 15)):
        assert stats.kstest(chunk, "norm").pvalue > 1e-4


def test_no_noise_is_used_twice(stream, values):
    mechanism = GaussianMechanism(1.0)
    zeros = tuple(torch.zeros_like(value) for value in values)
    noise = [
        residuals(zeros, mechanism.release(ClippedSum(zeros, 1.0), stream).values) for _ in range(2)
    ]
    drawn = np.concatenate(noise)
    # Grid points agree by chance, neighbours in one place do not.
    twins = np.stack([drawn[:-1], drawn[1:]], axis=1)
    assert len(np.unique(twins, axis=0)) == len(twins)


def test_releases_lie_on_the_grid_and_the_grid_on_public_numbers(stream):
    for noise_std in (0.3, 1.0, 1.5, 700.0, 1e-30, 1e30):
        grid = grid_of(noise_std)
        assert 2.0**-GRID_BITS / 2 < grid / noise_std <= 2.0**-GRID_BITS
        value = torch.full((50,), noise_std * 0.123456789, dtype=torch.float64)
        points = noised(value, noise_std, stream) / grid
        assert torch.equal(points, points.round())
        assert len(points.unique()) > 40


def test_two_neighbouring_values_reach_the_same_points(stream):
    """Mironov's attack: sums in plain float64 tell 0 from 1/3 by their last bits; these do not."""
    naive, released = [], []
    for value in (0.0, 1 / 3):
        whole = torch.full((4000,), value, dtype=torch.float64)
        drawn = torch.from_numpy(Stream(bytes(32), "naive").standard_normal(4000))
        naive.append(drawn + whole - whole == drawn)
        points = noised(whole, 1.0, stream) / grid_of(1.0)
        released.append(points.to(torch.int64) % 8)
    assert naive[0].all()
    assert not naive[1].all()
    counts = [torch.bincount(r, minlength=8).numpy() for r in released]
    # The low bits of both are uniform: chi-square at 10^-4.
    assert all(stats.chisquare(count).pvalue > 1e-4 for count in counts)


def test_a_grid_point_has_the_normals_probability(monkeypatch):
    """Rounding to nearest: with a grid of σ/2, chi-square at 10^-4; rounding down is seen."""
    monkeypatch.setattr(module, "GRID_BITS", 1)
    stream = Stream(bytes(range(32)), "coarse")
    points = noised(torch.full((100_000,), 0.2, dtype=torch.float64), 1.0, stream).numpy()
    edges = np.arange(-1.75, 2.5, 0.5)
    counts = np.histogram(points, edges)[0]
    for shift, accepted in ((0.0, True), (0.25, False)):
        share = np.diff(stats.norm.cdf(edges + shift - 0.2))
        observed = [*counts, len(points) - counts.sum()]
        expected = len(points) * np.array([*share, 1 - share.sum()])
        assert bool(stats.chisquare(observed, expected).pvalue > 1e-4) is accepted


def test_chunks_do_not_change_the_noise(values, monkeypatch):
    """No entry is left without noise and none gets it twice, wherever the chunks end."""
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr(module, "_CPU_CHUNK", size)
        part = values[0][:3, :5].contiguous()
        released = noised(part, 1.0, Stream(bytes(32), "x"))
        assert len((released - part).unique()) == part.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_are_kept_and_only_in_place_overwrites(stream, dtype):
    value = torch.ones(3, 4, dtype=dtype).t()
    before = value.clone()
    released = noised(value, 1.0, stream)
    assert (released.shape, released.dtype) == (value.shape, dtype)
    assert torch.equal(value, before)
    assert not torch.equal(released, before)
    for empty in (torch.zeros(0, 3), torch.zeros(())):
        assert noised(empty, 1.0, stream).shape == empty.shape


@pytest.mark.parametrize("in_place", [False, True])
def test_no_graph_leads_from_a_release_back_to_the_data(stream, in_place):
    data = torch.ones(3, requires_grad=True)
    released = noised(2 * data, 1.0, stream, in_place=in_place)
    assert not released.requires_grad
    assert released.grad_fn is None


def test_in_place_gives_the_same_release_in_the_sums_memory(values):
    mechanism = GaussianMechanism(2.0)
    apart = mechanism.release(ClippedSum(values, 1.0), KINDS["stream"]()).values
    assert all(a.data_ptr() != v.data_ptr() for a, v in zip(apart, values, strict=True))
    addresses = [value.data_ptr() for value in values]
    over = mechanism.release(ClippedSum(values, 1.0), KINDS["stream"](), in_place=True).values
    assert [value.data_ptr() for value in over] == addresses
    assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))
    with pytest.raises(ValueError, match="contiguous"):
        noised(torch.ones(3, 4).t(), 1.0, KINDS["stream"](), in_place=True)


def test_memory_does_not_grow_with_the_parameters(stream):
    """Neither NumPy's nor torch's allocator is asked for as much as the sum would take."""
    value = torch.zeros(1 << 18)
    with torch.profiler.profile(profile_memory=True) as profile:
        noised(value, 1.0, stream, in_place=True)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < value.nbytes
    tracemalloc.start()
    noised(value, 1.0, stream, in_place=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * value.nbytes


def test_no_noise_is_asked_for_by_a_multiplier_of_zero_alone(values, stream):
    released = GaussianMechanism(0.0).release(ClippedSum(values, 1.0), stream).values
    assert released is values
    for noise_std in (0.0, -1.0, 1e-201, 1e201, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"noise_std must lie in \[1e-200, 1e\+200\]"):
            noised(values[0], noise_std, stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_noise_is_drawn_there():
    source = KINDS["stream"]()
    values = (torch.zeros(100_001, device="cuda"), torch.zeros(5, device="cuda"))
    released = GaussianMechanism(1.0).release(ClippedSum(values, 1.0), source).values
    assert released[0].device == values[0].device
    assert stats.kstest(released[0].double().cpu().numpy(), "norm").pvalue > 1e-4
    assert not torch.equal(released[0][:5], released[1])


# Shards


def test_shards_share_no_noise_and_a_copy_of_a_shard_repeats_it(stream):
    """What two processes add up must be one noise an entry: correlations at 10^-4."""
    step = stream.child("step 3").child("weight")
    whole = torch.zeros(4, 5000, dtype=torch.float64)
    shards = [noise_shard(part, 1.0, step, k).numpy() for k, part in enumerate(whole)]
    for k, shard in enumerate(shards):
        assert stats.kstest(shard, "norm").pvalue > 1e-4
        for other in shards[:k]:
            assert stats.pearsonr(shard, other).pvalue > 1e-4
            assert not np.array_equal(shard, other)
    np.testing.assert_array_equal(noise_shard(whole[2], 1.0, step, 2).numpy(), shards[2])
    other = stream.child("step 4").child("weight")
    assert not np.array_equal(noise_shard(whole[2], 1.0, other, 2).numpy(), shards[2])


def test_the_variance_over_shards_is_that_of_one_process(stream):
    """Noise once an entry: 3 shards of 20,000, five deviations; drawn by two it would double."""
    parts = [noise_shard(torch.zeros(20_000), 2.0, stream, k) for k in range(3)]
    whole = torch.cat(parts).double()
    bound = 5 * (2 / len(whole)) ** 0.5
    assert abs(float(whole.square().mean()) / 4 - 1) < bound
    twice = torch.cat([noise_shard(p, 2.0, stream.child("again"), k) for k, p in enumerate(parts)])
    assert abs(float(twice.double().square().mean()) / 4 - 1) > bound


def test_a_shard_has_a_number(stream):
    with pytest.raises(ValueError, match="shard must be at least 0"):
        noise_shard(torch.zeros(3), 1.0, stream, -1)
