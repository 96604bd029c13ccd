"""Clipping, noise and the ε that is claimed for them."""

import dp_accounting
import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from privlm.dp.noise import GRID_BITS
from privlm.split import GaussianNoise, Plain, gaussian_delta
from protocols.randomness import NORMAL_CUT, NORMAL_DENSE, Stream


@pytest.fixture
def stream():
    return Stream(bytes(range(32)), "test")


@pytest.fixture
def rows_TD():
    """Norms from far below the clip to far above."""
    rows_TD = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    return rows_TD * torch.logspace(-3, 3, 60)[:, None]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7306, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-4, 1e-5])
def test_epsilon_equals_dp_accountings(sigma, delta):
    """The noise multiplier is noise_std / Δ with Δ = 2 · clip · √max_rows = 12."""
    protection = GaussianNoise(12.0 * sigma, clip=2.0, max_rows=9, delta=delta)
    assert protection.l2_sensitivity == 12.0
    epsilon, at = protection.guarantee()
    assert at == delta
    usable = 0.9 * delta
    expected = dp_accounting.get_epsilon_gaussian(sigma, usable)
    assert epsilon == pytest.approx(expected, rel=1e-6, abs=1e-9)
    # What the margin costs.
    assert epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(sigma, delta), rel=0.05)
    if epsilon > 0:
        assert gaussian_delta(epsilon, 1 / sigma) <= delta
        assert gaussian_delta(epsilon * 0.95, 1 / sigma) > delta


def test_the_calibration_of_balle_and_wang():
    """σ/Δ for ε = 1, δ = 1e-5 by the analytic Gaussian mechanism; the margin of delta costs."""
    protection = GaussianNoise.for_budget(1.0, 1e-5, clip=0.5, max_rows=1)
    assert 3.7306 < protection.noise_std < 3.7306 * 1.01


BUDGETS = [(1, 0.1), (1, 1.0), (1, 8.0), (32, 0.1), (32, 8.0), (32, 50.0), (4096, 1000.0)]


@pytest.mark.parametrize("clip", [1.0, 7.5])
@pytest.mark.parametrize(("max_rows", "epsilon"), BUDGETS)
def test_a_budget_is_kept_and_used_up(epsilon, clip, max_rows):
    protection = GaussianNoise.for_budget(epsilon, 1e-5, clip, max_rows)
    reached, _ = protection.guarantee()
    assert epsilon * (1 - 1e-5) <= reached <= epsilon
    sigma = dp_accounting.get_sigma_gaussian(epsilon, 0.9e-5)
    assert protection.noise_std == pytest.approx(2 * clip * max_rows**0.5 * sigma, rel=1e-5)


def exact_delta(epsilon, mu):
    """Balle and Wang's δ(ε) in 60 digits."""
    with mpmath.workdps(60):
        epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
        first = mpmath.ncdf(mu / 2 - epsilon / mu)
        return first - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def exact_mu(protection):
    with mpmath.workdps(60):
        sensitivity = 2 * mpmath.mpf(protection.clip) * mpmath.sqrt(protection.max_rows)
        return sensitivity / mpmath.mpf(protection.noise_std)


@pytest.mark.parametrize(
    ("delta", "greatest_epsilon", "greatest_mu"),
    [(1e-7, 30.0, 4.0), (1e-5, 100.0, 10.0), (0.1, 500.0, 30.0)],
)
def test_what_is_stated_is_never_below_the_truth(delta, greatest_epsilon, greatest_mu):
    """In exact arithmetic, to both ends of the range: float64 must not round a claim down."""
    stated = [
        (epsilon, GaussianNoise.for_budget(epsilon, delta, 1.0, 100))
        for epsilon in np.geomspace(1e-3, greatest_epsilon, 20).clip(1e-3).tolist()
    ]
    for mu in np.geomspace(greatest_mu, 1e-13, 40).tolist():
        protection = GaussianNoise(20 / mu, 1.0, 100, delta)
        stated.append((protection.guarantee()[0], protection))
    assert stated[-1][0] == 0.0
    for epsilon, protection in stated:
        assert epsilon == 0 or epsilon >= 1e-3
        # A tenth is left for the tails.
        assert exact_delta(epsilon, exact_mu(protection)) <= 0.9 * delta * (1 + 1e-6)


def within_the_tails(protection, stream, monkeypatch):
    """The greatest and the least number that noise can add, in deviations."""
    reached = []
    for word in (-(1 << 63), 0):  # the shortest uniform, at angles -π and 0

        def fill(self, words, word=word):
            words[:] = 0
            if words.size > 1:  # radii, then angles; alone, it continues a short word
                words[words.size // 2 :] = word

        monkeypatch.setattr(Stream, "fill", fill)
        zeros_TD = torch.zeros(1, 2)
        reached.append(float(protection.protect(zeros_TD, stream)[0, 0]) / protection.noise_std)
    return reached


def test_noise_so_little_that_its_tails_tell_is_refused(stream, monkeypatch):
    """Past the tails around one row the other is certain; they are sparse from 10.73σ on."""
    edge = GaussianNoise.for_budget(8.0, 1e-5, clip=1.0, max_rows=1)
    low, high = within_the_tails(edge, stream, monkeypatch)
    assert (-low, high) == (pytest.approx(NORMAL_CUT, abs=1e-4),) * 2
    for epsilon in (100.0, 2000.0):
        with pytest.raises(ValueError, match="tails are sparse from 10.73 deviations on"):
            GaussianNoise.for_budget(epsilon, 1e-5, 1.0, 1)
    # Where the rule turns: 2 · clip/σ - 10.73 is the quantile of δ/10 over all rows.
    for max_rows in (1, 32):
        turn = 2 / (NORMAL_DENSE + stats.norm.ppf(1e-6 / max_rows))
        GaussianNoise(turn * 1.0001, 1.0, max_rows, 1e-5)
        with pytest.raises(ValueError, match="at most a tenth of delta, 1e-05"):
            GaussianNoise(turn * 0.9999, 1.0, max_rows, 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_clipped_to_zero(bad):
    """A valid clip of anything: the bound holds for it, and something can be sent."""
    protection = GaussianNoise(1.0, clip=1.0, max_rows=3, delta=1e-5)
    rows_TD = torch.tensor([[1.0, 2.0], [bad, 1.0], [0.5, 0.1]])
    clipped_TD = protection.clipped(rows_TD)
    assert clipped_TD[1].tolist() == [0.0, 0.0]
    assert torch.equal(clipped_TD[[0, 2]], protection.clipped(rows_TD[[0, 2]]))


def test_a_row_whose_norm_overflows_is_clipped_to_zero():
    protection = GaussianNoise(1.0, clip=1.0, max_rows=3, delta=1e-5)
    rows_TD = torch.tensor([[1e300, -1e300], [3e38, 0.0]], dtype=torch.float64)
    clipped_TD = protection.clipped(rows_TD)
    assert clipped_TD[0].tolist() == [0.0, 0.0]
    assert clipped_TD[1].tolist() == [pytest.approx(1.0), 0.0]


def test_at_both_ends_of_the_scales_what_leaves_is_finite_and_noised(stream):
    rows_TD = torch.full((2, 3), 3e38)
    for scale in (1e-30, 1e30):
        sent_TD = GaussianNoise(scale, scale, 2, 1e-5).protect(rows_TD, stream)
        assert sent_TD.isfinite().all()
        assert len(sent_TD.unique()) == 6


def test_delta_is_the_divergence_of_two_normals():
    """E[(1 - e^ε q/p)+] by a million draws: five deviations, false alarm below 1e-6 each."""
    generator = torch.Generator().manual_seed(1)
    for epsilon, mu in ((0.5, 1.0), (2.0, 1.5), (0.0, 0.4)):
        x = torch.randn(1_000_000, generator=generator, dtype=torch.float64) + mu
        excess = (1 - torch.exp(epsilon - (mu * x - mu * mu / 2))).clamp(min=0)
        error = float(excess.std()) / 1000
        assert abs(float(excess.mean()) - gaussian_delta(epsilon, mu)) < 5 * error


def test_no_epsilon_is_needed_where_delta_covers_everything():
    assert GaussianNoise(1e9, clip=1.0, max_rows=1, delta=1e-5).guarantee() == (0.0, 1e-5)


def test_more_rows_cost_more():
    epsilons = [
        GaussianNoise(8.0, clip=1.0, max_rows=rows, delta=1e-5).guarantee()[0] for rows in (1, 4)
    ]
    assert epsilons[1] > 1.9 * epsilons[0]


def test_no_row_is_longer_than_the_clip(rows_TD):
    for clip in (0.1, 1.0, 3.0):
        clipped = GaussianNoise(5.0, clip=clip, max_rows=60, delta=1e-5).clipped(rows_TD)
        assert clipped.dtype == torch.float64
        assert clipped.norm(dim=1).max() <= clip
        assert clipped.norm(dim=1)[-1] > 0.999 * clip
        short_T = rows_TD.norm(dim=1) < 0.99 * clip
        assert short_T.any()
        assert torch.equal(clipped[short_T], rows_TD[short_T].double())
        cosine_T = torch.cosine_similarity(clipped, rows_TD.double())
        assert torch.allclose(cosine_T, torch.ones(60, dtype=torch.float64))
    zero = GaussianNoise(1.0, clip=1.0, max_rows=1, delta=1e-5).clipped(torch.zeros(1, 16))
    assert torch.equal(zero, torch.zeros(1, 16, dtype=torch.float64))


def test_what_leaves_is_the_clipped_row_and_noise_of_the_stated_law(rows_TD, stream):
    """KS over 38,400 numbers: p > 1e-4 for σ, below it for 2σ/3, 3σ/2 and unclipped rows."""
    protection = GaussianNoise(0.9, clip=1.0, max_rows=60, delta=1e-3)
    clipped_TD = protection.clipped(rows_TD)
    sent = [protection.protect(rows_TD, stream) for _ in range(40)]
    noise = torch.stack([s.double() - clipped_TD for s in sent]).flatten().numpy() / 0.9
    assert sent[0].dtype == torch.float32
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "norm", args=(0, wrong)).pvalue < 1e-4
    unclipped = torch.stack([s - rows_TD for s in sent]).flatten().numpy() / 0.9
    assert stats.kstest(unclipped, "norm").pvalue < 1e-4


def test_what_leaves_lies_on_a_public_grid(stream):
    rows_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 1e-3
    sent = GaussianNoise(1.0, clip=1.0, max_rows=50, delta=1e-3).protect(rows_TD, stream)
    scaled = sent.double() * 2.0**GRID_BITS
    assert torch.equal(scaled, scaled.round())
    assert not torch.equal(sent, Plain().protect(rows_TD, stream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_std": 0.0}, r"noise_std must lie in \[1e-30, 1e\+30\], got 0"),
        ({"noise_std": float("inf")}, "noise_std must lie in"),
        ({"noise_std": 1e-200}, "noise_std must lie in"),
        ({"clip": -1.0}, r"clip must lie in \[1e-30, 1e\+30\], got -1"),
        ({"clip": float("nan")}, "clip must lie in"),
        ({"clip": 1e200}, "clip must lie in"),
        ({"max_rows": 0}, r"max_rows must lie in \[1, 2\^31\], got 0"),
        ({"delta": 0.0}, r"delta must lie in \[1e-12, 1\), got 0"),
        ({"delta": 1.0}, r"delta must lie in \[1e-12, 1\)"),
        ({"delta": 1e-13}, r"delta must lie in \[1e-12, 1\)"),
    ],
)
def test_protection_errors(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianNoise(**{"noise_std": 1.0, "clip": 1.0, "max_rows": 1, "delta": 1e-5, **change})
    if "noise_std" not in change:
        with pytest.raises(ValueError, match=message):
            GaussianNoise.for_budget(
                **{"clip": 1.0, "max_rows": 1, "delta": 1e-5, **change}, target_epsilon=1.0
            )
    for epsilon in (0.0, 1e-4, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"target_epsilon must lie in \[0\.001, 1e9\]"):
            GaussianNoise.for_budget(epsilon, 1e-5, 1.0, 1)


def test_rows_are_counted_in_whole_numbers():
    """A NaN is neither too small nor too great, and would pass for free of charge."""
    for wrong in (float("nan"), 2.5, 8.0):
        with pytest.raises(TypeError):
            GaussianNoise(1.0, 1.0, wrong, 1e-3)
        with pytest.raises(TypeError):
            GaussianNoise.for_budget(1.0, 1e-5, 1.0, wrong)
    counted = GaussianNoise(1.0, 1.0, np.int64(8), 1e-3)
    assert type(counted.max_rows) is int
