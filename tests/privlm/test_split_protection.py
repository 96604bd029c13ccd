"""Clipping, noise and the ε that is claimed for them."""

import dp_accounting
import pytest
import torch
from scipy import stats

from privlm.dp.noise import GRID_BITS
from privlm.split import GaussianNoise, Plain, gaussian_delta
from protocols.randomness import Stream


@pytest.fixture
def stream():
    return Stream(bytes(range(32)), "test")


@pytest.fixture
def rows_TD():
    """Norms from far below the clip to far above."""
    rows_TD = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    return rows_TD * torch.logspace(-3, 3, 60)[:, None]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.7306, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_equals_dp_accountings(sigma, delta):
    """The noise multiplier is noise_std / Δ with Δ = 2 · clip · √max_rows = 12."""
    protection = GaussianNoise(12.0 * sigma, clip=2.0, max_rows=9, delta=delta)
    assert protection.l2_sensitivity == 12.0
    epsilon, at = protection.guarantee()
    assert at == delta
    expected = dp_accounting.get_epsilon_gaussian(sigma, delta)
    assert epsilon == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if epsilon > 0:
        assert gaussian_delta(epsilon, 1 / sigma) <= delta
        assert gaussian_delta(epsilon * 0.999, 1 / sigma) > delta


def test_the_calibration_of_balle_and_wang():
    """σ/Δ for ε = 1, δ = 1e-5 by the analytic Gaussian mechanism."""
    protection = GaussianNoise.for_budget(1.0, 1e-5, clip=0.5, max_rows=1)
    assert protection.noise_std == pytest.approx(3.7306, abs=5e-5)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 100.0, 2000.0])
@pytest.mark.parametrize(("clip", "max_rows"), [(1.0, 1), (7.5, 32)])
def test_a_budget_is_kept_and_used_up(epsilon, clip, max_rows):
    protection = GaussianNoise.for_budget(epsilon, 1e-5, clip, max_rows)
    reached, _ = protection.guarantee()
    assert epsilon * (1 - 1e-5) <= reached <= epsilon
    sigma = dp_accounting.get_sigma_gaussian(epsilon, 1e-5)
    assert protection.noise_std == pytest.approx(2 * clip * max_rows**0.5 * sigma, rel=1e-5)


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
        clipped = GaussianNoise(1.0, clip=clip, max_rows=60, delta=1e-5).clipped(rows_TD)
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
    protection = GaussianNoise(0.7, clip=1.0, max_rows=60, delta=1e-5)
    clipped_TD = protection.clipped(rows_TD)
    sent = [protection.protect(rows_TD, stream) for _ in range(40)]
    noise = torch.stack([s.double() - clipped_TD for s in sent]).flatten().numpy() / 0.7
    assert sent[0].dtype == torch.float32
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "norm", args=(0, wrong)).pvalue < 1e-4
    unclipped = torch.stack([s - rows_TD for s in sent]).flatten().numpy() / 0.7
    assert stats.kstest(unclipped, "norm").pvalue < 1e-4


def test_what_leaves_lies_on_a_public_grid(stream):
    rows_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 1e-3
    sent = GaussianNoise(1.0, clip=1.0, max_rows=50, delta=1e-5).protect(rows_TD, stream)
    scaled = sent.double() * 2.0**GRID_BITS
    assert torch.equal(scaled, scaled.round())
    assert not torch.equal(sent, Plain().protect(rows_TD, stream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_std": 0.0}, "noise_std must be positive, got 0"),
        ({"noise_std": float("inf")}, "noise_std must be positive"),
        ({"clip": -1.0}, "clip must be positive, got -1"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"max_rows": 0}, "max_rows must be positive, got 0"),
        ({"delta": 0.0}, r"delta must lie in \(0, 1\), got 0"),
        ({"delta": 1.0}, r"delta must lie in \(0, 1\)"),
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
    with pytest.raises(ValueError, match="target_epsilon must be positive"):
        GaussianNoise.for_budget(0.0, 1e-5, 1.0, 1)
