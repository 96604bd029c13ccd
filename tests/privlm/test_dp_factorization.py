"""Correlated noise: the matrices against known ones, and the stream against the matrices.

Statistical tests run under a fixed seed; the stated false-alarm probability is that of the choice
of the seed.
"""

import itertools
import math
import time

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import toeplitz

from privlm.dp import noise as noise_module
from privlm.dp import toeplitz as toeplitz_module
from privlm.dp.clipping import ClippedSum
from privlm.dp.factorization import (
    Banded,
    Blt,
    CorrelatedNoise,
    Correlation,
    NoiseOutOfOrder,
)
from privlm.dp.noise import grid_of
from protocols.chacha20 import DeviceStream
from protocols.randomness import Stream

STRATEGIES = [Banded(1), Banded(2), Banded(5), Banded(40), Blt(1), Blt(3), Blt(2, 7)]
STEPS = 24


@pytest.fixture
def stream():
    return Stream(bytes(range(32)), "noise")


@pytest.fixture
def fresh_stream():
    return lambda: Stream(bytes(range(32)), "noise")


def matrix(column):
    return toeplitz(column, np.zeros(len(column)))


def clipped(*values, bound=1.0):
    return ClippedSum(tuple(torch.as_tensor(value) for value in values), bound)


# The matrices


def test_all_bands_give_the_square_root_of_the_prefix_sums():
    """1, 1/2, 3/8, 5/16, … and 1, -1/2, -1/8, -1/16, -5/128, …: the best of all Toeplitz."""
    c = Banded(400).coefficients(400)
    c = c / c[0]
    assert c[:5] == pytest.approx([1, 1 / 2, 3 / 8, 5 / 16, 35 / 128], rel=1e-6)
    inverse = Banded(400).inverse_coefficients(400)
    inverse = inverse / inverse[0]
    assert inverse[:5] == pytest.approx([1, -1 / 2, -1 / 8, -1 / 16, -5 / 128], rel=1e-5)
    square = matrix(c[:60]) @ matrix(c[:60])
    np.testing.assert_allclose(square, np.tril(np.ones((60, 60))), atol=1e-6)
    best = float(np.sum(toeplitz_module.square_root(400) ** 2))
    assert Banded(400).error(400) == pytest.approx(best, rel=1e-9)


def test_no_other_toeplitz_matrix_does_better():
    """A hundred directions around the square root, each way: no error below its own."""
    c, generator = toeplitz_module.square_root(30), np.random.default_rng(0)
    best = Banded(30).error(30)
    for _ in range(100):
        for sign in (1, -1):
            near = c * (1 + sign * 0.02 * generator.standard_normal(30))
            last_row = np.linalg.solve(matrix(near), np.ones(30))
            assert np.linalg.norm(near) * np.linalg.norm(last_row) > best


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, STEPS, 300])
def test_c_is_what_the_sensitivity_assumes_and_its_inverse_is_one(strategy, steps):
    c = strategy.coefficients(steps)
    assert c.shape == (steps,)
    assert (c >= 0).all()
    assert (np.diff(c) <= 0).all()
    product = matrix(c) @ matrix(strategy.inverse_coefficients(steps))
    np.testing.assert_allclose(product, np.eye(steps), atol=1e-11)
    if isinstance(strategy, Banded):
        assert np.linalg.norm(c) == pytest.approx(1, rel=1e-14)
        assert (c[strategy.bands :] == 0).all()
    else:
        assert c[0] == 1


def test_more_bands_err_less_and_one_is_independent_noise():
    errors = [Banded(bands).error(256) for bands in (1, 2, 4, 16, 64, 256)]
    assert errors[0] == pytest.approx(16, rel=1e-14)
    assert all(more < less * 0.95 for less, more in itertools.pairwise(errors))
    truncated = toeplitz_module.square_root(16)
    last_row = np.linalg.solve(matrix(np.pad(truncated, (0, 240))), np.ones(256))
    assert errors[3] < 0.95 * np.linalg.norm(truncated) * np.linalg.norm(last_row)


def test_a_few_buffers_come_near_the_optimum():
    """As published for BLTs: within 1% of the best Toeplitz matrix, at a memory of a few steps."""
    best = float(np.sum(toeplitz_module.square_root(1000) ** 2))
    ratios = [Blt(buffers).error(1000) / best for buffers in (1, 2, 3, 4)]
    assert all(ratio >= 1 - 1e-9 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[1] < 1.02
    assert ratios[2] < 1.002
    assert ratios[3] < 1.0002


def test_a_blt_for_repeated_participation_beats_one_for_a_single():
    for steps, apart in ((300, 30), (303, 30), (1000, 64)):
        suited, single = Blt(4, apart).error(steps, apart), Blt(4).error(steps, apart)
        assert suited < 0.97 * single
        assert single < Banded(1).error(steps, apart)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("apart", [1, 2, 3, 5, 12])
def test_sensitivity_is_the_worst_of_all_patterns(strategy, apart):
    """By brute force over every pattern of participations and, for three of them, their signs."""
    steps = 11
    columns = matrix(strategy.coefficients(steps))
    patterns = [
        chosen
        for bits in itertools.product([False, True], repeat=steps)
        if (chosen := np.flatnonzero(bits)).size and (np.diff(chosen) >= apart).all()
    ]
    norms = [np.linalg.norm(columns[:, chosen].sum(1)) for chosen in patterns]
    worst = strategy.sensitivity(steps, apart)
    assert worst == pytest.approx(max(norms), rel=1e-12)
    for chosen in patterns:
        if len(chosen) <= 3:
            for signs in itertools.product([1, -1], repeat=len(chosen)):
                assert np.linalg.norm(columns[:, chosen] @ signs) <= worst * (1 + 1e-12)


def test_bands_that_never_overlap_cost_one_a_round():
    for steps in (1, 7, 8, 9, 40):
        rounds = math.ceil(steps / 8)
        assert Banded(8).sensitivity(steps, 8, planned=40) <= math.sqrt(rounds) * (1 + 1e-14)
    assert Banded(8).sensitivity(40, 8) == pytest.approx(math.sqrt(5), rel=1e-14)
    assert Banded(8).sensitivity(40, 7) > math.sqrt(6) * 1.05


def test_a_run_cut_short_keeps_the_matrix_of_its_plan():
    for strategy in (Banded(6), Blt(2)):
        c = strategy.coefficients(100)[:8]
        expected = np.linalg.norm(c + np.pad(c, (4, 0))[:8])
        cut = strategy.sensitivity(8, 4, planned=100)
        assert cut == pytest.approx(expected, rel=1e-12)
        assert cut != pytest.approx(strategy.sensitivity(8, 4), rel=1e-3)


def test_gradients_of_the_search_are_right():
    """Against differences of the error itself: the search's end is flat in every coefficient."""
    c = Banded(12).coefficients(50)

    def log_error(column):
        last_row = np.linalg.solve(matrix(np.pad(column, (0, 38))), np.ones(50))
        return math.log(np.linalg.norm(column) * np.linalg.norm(last_row))

    for k in range(12):
        step = np.zeros(12)
        step[k] = 1e-5
        slope = (log_error(c[:12] + step) - log_error(c[:12] - step)) / 2e-5
        assert abs(slope) < 2e-4


@pytest.mark.parametrize(("steps", "apart"), [(21, 7), (12, 1), (12, 12), (30, 15)])
def test_the_search_sees_the_sensitivity_itself(steps, apart):
    theta_D, omega_D = toeplitz_module.blt_optimum(3, steps, apart)
    seen = toeplitz_module._squared_sensitivity(theta_D, omega_D, steps, apart)
    assert math.sqrt(seen) == pytest.approx(Blt(3, apart).sensitivity(steps, apart), rel=1e-9)


def test_both_ways_to_divide_series_agree():
    """300 coefficients go through Fourier transforms, against linear equations."""
    generator = np.random.default_rng(0)
    c, ones = np.sort(generator.random(300))[::-1] + 0.1, np.ones(777)
    whole = matrix(np.pad(c, (0, 477)))
    once = np.linalg.solve(whole, ones)
    twice = np.linalg.solve(whole, once)
    by_fourier = toeplitz_module._divided(ones, c)
    np.testing.assert_allclose(by_fourier[0], once, rtol=1e-9, atol=1e-12 * abs(once).max())
    np.testing.assert_allclose(by_fourier[1], twice, rtol=1e-9, atol=1e-12 * abs(twice).max())
    direct = [once[k:] @ twice[: 777 - k] for k in range(300)]
    scale = np.linalg.norm(once) * np.linalg.norm(twice)
    np.testing.assert_allclose(
        toeplitz_module._correlated(once, twice, 300), direct, atol=1e-12 * scale
    )


def test_the_search_is_quick_and_gives_the_same_every_time():
    for strategy in (Banded(32), Banded(64), Blt(4), Blt(4, 64)):
        toeplitz_module.banded_optimum.cache_clear()
        toeplitz_module.blt_optimum.cache_clear()
        start = time.perf_counter()
        first = strategy.coefficients(2000)
        assert time.perf_counter() - start < 5  # 0.2 s on an idle core
        toeplitz_module.banded_optimum.cache_clear()
        toeplitz_module.blt_optimum.cache_clear()
        np.testing.assert_array_equal(strategy.coefficients(2000), first)


def test_strategies_are_values_that_travel():
    for strategy in (Banded(4), Blt(3), Blt(3, min_separation=10)):
        decoded = msgspec.json.decode(msgspec.json.encode(strategy), type=Correlation)
        assert decoded == strategy
        with pytest.raises(AttributeError):
            decoded.bands = 5


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Banded(0), r"bands must lie in \[1, 4096\], got 0"),
        (lambda: Blt(9), r"buffers must lie in \[1, 8\], got 9"),
        (lambda: Blt(2, 0), "min_separation must be at least 1"),
        (lambda: Banded(2).coefficients(0), "steps must be at least 1, got 0"),
        (lambda: Banded(2).sensitivity(0, 1), r"steps must lie in \[1, 0\], got 0"),
        (lambda: Banded(2).sensitivity(5, 1, planned=4), r"steps must lie in \[1, 4\], got 5"),
        (lambda: Blt(2).sensitivity(5, 0), "min_separation must be at least 1, got 0"),
        (lambda: CorrelatedNoise(Blt(2), -1.0, 5), "noise_multiplier must be at least 0"),
        (lambda: CorrelatedNoise(Blt(2), 1.0, 0), "steps must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


# The stream


def streamed(noise, stream, values, steps):
    return [noise.release(clipped(*values), step, stream) for step in range(steps)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_is_streamed_is_the_inverse_times_the_steps_own_normals(strategy, stream, monkeypatch):
    """Every step, every entry, in chunks of three, to within half a grid spacing."""
    monkeypatch.setattr(noise_module, "_CPU_CHUNK", 3)
    values = (torch.arange(8, dtype=torch.float64), torch.ones(2, 2))
    sent = streamed(CorrelatedNoise(strategy, 1.3, STEPS), stream, values, STEPS)
    z_TE = np.zeros((STEPS, 12))
    for step in range(STEPS):
        child = stream.child(f"step {step}")
        z_TE[step] = np.concatenate([child.standard_normal(n) for n in (3, 3, 2, 3, 1)])
    w_TE = matrix(strategy.inverse_coefficients(STEPS)) @ z_TE
    sums = np.array([*range(8), 1, 1, 1, 1])
    for step, (first, second) in enumerate(sent):
        got = np.concatenate([first.numpy(), second.double().numpy().ravel()])
        np.testing.assert_allclose(got, sums + 1.3 * w_TE[step], atol=1.3 * 2.0**-20, rtol=1e-6)


@pytest.mark.parametrize("strategy", [Banded(4), Blt(2)], ids=str)
@pytest.mark.parametrize("kind", ["stream", "device stream"])
def test_covariances_over_steps_are_those_of_the_inverse(strategy, kind, stream):
    """Whitened by C the noise is N(0, 1), KS at 10^-4; unwhitened or scaled by 3/2 it is not."""
    if kind == "device stream":
        stream = DeviceStream(bytes(range(32)), "noise", torch.device("cpu"))
    zeros = torch.zeros(20_000, dtype=torch.float64)
    noise = CorrelatedNoise(strategy, 2.0, 8)
    w_TE = np.stack([noise.release(clipped(zeros, bound=0.5), t, stream)[0] for t in range(8)])
    white_TE = matrix(strategy.coefficients(8)) @ w_TE
    assert stats.kstest(white_TE.ravel(), "norm").pvalue > 1e-4
    assert stats.kstest(1.5 * white_TE.ravel(), "norm").pvalue < 1e-10
    assert stats.kstest(2 / 3 * white_TE.ravel(), "norm").pvalue < 1e-10
    assert stats.kstest(w_TE.ravel(), "norm").pvalue < 1e-10
    inverse = matrix(strategy.inverse_coefficients(8))
    expected, entries = inverse @ inverse.T, w_TE.shape[1]
    scale = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / entries)
    deviations = abs(w_TE @ w_TE.T / entries - expected) / scale
    assert deviations.max() < 5.5  # 36 numbers: false alarm below 10^-5
    assert (abs(w_TE @ w_TE.T / entries - np.eye(8)) / scale).max() > 20


def test_prefix_sums_err_as_little_as_the_matrices_say(stream):
    """The point of it all: 64 steps' noise adds up to Banded(64).error, an eighth of it alone."""
    zeros = torch.zeros(20_000, dtype=torch.float64)
    for strategy in (Banded(64), Banded(8), Blt(3)):
        noise = CorrelatedNoise(strategy, strategy.sensitivity(64, 64), 64)
        child = stream.child(str(strategy))
        total = sum(noise.release(clipped(zeros), t, child)[0] for t in range(64))
        # Standard error of a deviation: 1/√(2 n) = 0.5%; five of them.
        assert float(total.std()) == pytest.approx(strategy.error(64), rel=0.025)
        assert strategy.error(64) < 0.6 * 8


def test_releases_lie_on_the_public_grid_and_keep_dtypes(stream):
    values = (torch.rand(50), torch.rand(3, 4, dtype=torch.float64).t())
    noise = CorrelatedNoise(Banded(3), 0.7, 4)
    for step in range(4):
        for value, sent in zip(values, noise.release(clipped(*values), step, stream), strict=True):
            assert (sent.shape, sent.dtype) == (value.shape, value.dtype)
            points = sent.double() / grid_of(0.7)
            assert torch.equal(points, points.round())


def test_in_place_overwrites_the_sum_with_the_same_release(fresh_stream):
    value = torch.rand(10)
    apart = CorrelatedNoise(Blt(2), 1.0, 3).release(clipped(value), 0, fresh_stream())[0]
    over = CorrelatedNoise(Blt(2), 1.0, 3).release(
        clipped(value), 0, fresh_stream(), in_place=True
    )[0]
    assert over.data_ptr() == value.data_ptr()
    assert torch.equal(apart, over)
    noise = CorrelatedNoise(Blt(2), 1.0, 3)
    with pytest.raises(ValueError, match="contiguous"):
        noise.release(clipped(torch.rand(3, 4).t()), 0, fresh_stream(), in_place=True)
    assert noise.next_step == 0


def test_steps_out_of_order_are_refused(stream):
    noise = CorrelatedNoise(Banded(3), 1.0, 2)
    with pytest.raises(NoiseOutOfOrder, match="step 1 of 2 cannot be noised: step 0 is due"):
        noise.release(clipped(torch.zeros(3)), 1, stream)
    streamed(noise, stream, (torch.zeros(3),), 2)
    for step in (0, 1, 2):
        with pytest.raises(NoiseOutOfOrder):
            noise.release(clipped(torch.zeros(3)), step, stream)


def test_an_interrupted_step_is_not_noised_again(stream, monkeypatch):
    noise = CorrelatedNoise(Blt(2), 1.0, 5)
    noise.release(clipped(torch.zeros(3)), 0, stream)
    monkeypatch.delattr(CorrelatedNoise, "_send")  # so that the step breaks off in its midst
    with pytest.raises(AttributeError, match="_send"):
        noise.release(clipped(torch.zeros(3)), 1, stream)
    monkeypatch.undo()
    with pytest.raises(NoiseOutOfOrder):
        noise.release(clipped(torch.zeros(3)), 1, stream)


def test_bound_and_shapes_stay_the_same(stream):
    noise = CorrelatedNoise(Banded(3), 1.0, 5)
    noise.release(clipped(torch.zeros(3)), 0, stream)
    with pytest.raises(ValueError, match="one clipping bound for the whole run"):
        noise.release(clipped(torch.zeros(3), bound=2.0), 1, stream)
    for values in ((torch.zeros(4),), (torch.zeros(3), torch.zeros(3))):
        with pytest.raises(ValueError, match="differ in number or size"):
            noise.release(clipped(*values), 1, stream)
    assert noise.next_step == 1


@pytest.mark.parametrize("strategy", [Banded(1), Banded(4), Blt(2)], ids=str)
@pytest.mark.parametrize("killed_at", [0, 1, 5])
def test_a_killed_run_goes_on_with_the_same_noise(strategy, killed_at, fresh_stream):
    """From the seed alone, or from a checkpoint; fresh noise, uncorrelated, is seen to differ."""
    values = (torch.rand(70), torch.rand(2, 3))
    whole = streamed(CorrelatedNoise(strategy, 1.0, 9), fresh_stream(), values, 9)
    first = CorrelatedNoise(strategy, 1.0, 9)
    streamed(first, fresh_stream(), values, killed_at)
    rebuilt, loaded = (CorrelatedNoise(strategy, 1.0, 9) for _ in range(2))
    rebuilt.rebuild(values, killed_at, fresh_stream())
    loaded.load_state_dict(first.state_dict())
    for noise in (rebuilt, loaded):
        stream = fresh_stream()
        assert noise.next_step == killed_at
        for step in range(killed_at, 9):
            sent = noise.release(clipped(*values), step, stream)
            assert all(torch.equal(a, b) for a, b in zip(sent, whole[step], strict=True))
    if killed_at and strategy != Banded(1):
        forgetful = CorrelatedNoise(strategy, 1.0, 9)
        streamed(forgetful, Stream(bytes(32), "other"), values, killed_at)
        sent = forgetful.release(clipped(*values), killed_at, fresh_stream())
        assert not torch.equal(sent[0], whole[killed_at][0])


def test_another_runs_state_is_refused(stream):
    noise = CorrelatedNoise(Banded(4), 1.0, 9)
    streamed(noise, stream, (torch.zeros(5),), 3)
    for other in (CorrelatedNoise(Banded(3), 1.0, 9), CorrelatedNoise(Banded(4), 1.0, 2)):
        with pytest.raises(ValueError, match="another run's noise"):
            other.load_state_dict(noise.state_dict())
    with pytest.raises(ValueError, match=r"step must lie in \[0, 9\]"):
        noise.rebuild((torch.zeros(5),), 10, stream)


def test_a_state_taken_is_not_changed_by_later_steps(stream):
    noise = CorrelatedNoise(Blt(2), 1.0, 9)
    streamed(noise, stream, (torch.zeros(5),), 3)
    state = {name: tensor.clone() for name, tensor in noise.state_dict().items()}
    taken = noise.state_dict()
    noise.release(clipped(torch.zeros(5)), 3, stream)
    assert all(torch.equal(taken[name], state[name]) for name in state)


def test_memory_is_one_number_for_every_entry_and_buffer(stream):
    for strategy, buffers in ((Banded(1), 0), (Banded(5), 4), (Banded(100), 11), (Blt(3), 3)):
        noise = CorrelatedNoise(strategy, 1.0, 12)
        noise.release(clipped(torch.zeros(50)), 0, stream.child(str(strategy)))
        assert noise.state_dict()["buffers.0"].shape == (buffers, 50)


def test_without_noise_the_sums_leave_as_they_are(stream):
    values = (torch.rand(5), torch.rand(2, dtype=torch.float64))
    sent = CorrelatedNoise(Banded(3), 0.0, 2).release(clipped(*values), 0, stream)
    assert all(torch.equal(a, b) for a, b in zip(sent, values, strict=True))
