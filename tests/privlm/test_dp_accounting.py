"""Accounting against published and independently computed values."""

import math

import dp_accounting
import pytest

from privlm.dp.accounting import calibrate_noise_multiplier, epsilon_of, rounded_up
from privlm.dp.plan import Plan
from privlm.dp.sampling import PoissonSampler


def poisson_gaussian(sigma: float, q: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    return dp_accounting.SelfComposedDpEvent(step, steps)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "expected"),
    [
        (1.5, 0.04, 2250, 1e-5, 6.768787),
        (3.0, 0.2, 100, 1e-6, 3.371055),
        (0.7, 0.01, 120, 1e-5, 2.4612381),
        (1.3, 0.0025, 6000, 1e-5, 0.640111),
    ],
)
def test_epsilon_matches_the_known_values(sigma, q, steps, delta, expected):
    spent = epsilon_of(poisson_gaussian(sigma, q, steps), delta)
    assert spent.accountant == "PLD"
    assert spent.value == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta", "expected"),
    [
        (1.5, 0.04, 2250, 1e-5, 7.329111),
        (3.0, 0.2, 100, 1e-6, 3.639669),
        (0.7, 0.01, 120, 1e-5, 3.2392676),
        (1.3, 0.0025, 6000, 1e-5, 0.7242234),
    ],
)
def test_the_renyi_fallback_matches_the_known_values(sigma, q, steps, delta, expected, monkeypatch):
    monkeypatch.setattr("privlm.dp.accounting.MAX_GRID_POINTS", 1)
    spent = epsilon_of(poisson_gaussian(sigma, q, steps), delta)
    assert spent.accountant == "RDP"
    assert "grid" in spent.fallback_reason
    assert spent.value == pytest.approx(expected, abs=1e-3)


def test_noise_too_small_for_pld_falls_back_and_says_so():
    spent = epsilon_of(poisson_gaussian(0.01, 0.1, 10), 1e-5)
    assert spent.accountant == "RDP"
    assert "grid" in spent.fallback_reason
    assert spent.value > 100


def test_memory_exhausted_by_pld_falls_back(monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError("grid")

    monkeypatch.setattr("privlm.dp.accounting.pld.PLDAccountant.compose", exhausted)
    assert epsilon_of(poisson_gaussian(1.0, 0.1, 10), 1e-5).accountant == "RDP"


def test_a_release_without_noise_has_no_epsilon():
    assert epsilon_of(poisson_gaussian(0.0, 0.1, 10), 1e-5).value == math.inf
    assert epsilon_of(dp_accounting.NonPrivateDpEvent(), 1e-5).value == math.inf


def test_calibration_meets_the_budget_from_below_and_wastes_little():
    sigma = calibrate_noise_multiplier(lambda s: poisson_gaussian(s, 0.04, 2250), 8.0, 1e-5)
    assert sigma == pytest.approx(1.34600, rel=1e-3)
    assert epsilon_of(poisson_gaussian(sigma, 0.04, 2250), 1e-5).value <= 8.0
    assert epsilon_of(poisson_gaussian(sigma / 1.002, 0.04, 2250), 1e-5).value > 8.0


@pytest.mark.parametrize("target", [0.1, 1.0, 50.0])
def test_calibration_holds_over_three_decades(target):
    sigma = calibrate_noise_multiplier(lambda s: poisson_gaussian(s, 0.1, 50), target, 1e-6)
    assert epsilon_of(poisson_gaussian(sigma, 0.1, 50), 1e-6).value <= target


def test_a_budget_out_of_reach_is_refused_with_the_ways_out():
    with pytest.raises(ValueError, match="cannot be reached.*fewer steps"):
        calibrate_noise_multiplier(lambda s: poisson_gaussian(s, 1.0, 10**6), 1e-3, 1e-9)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon_of(poisson_gaussian(1.0, 0.1, 1), delta)


def plan(**changes):
    values = {
        "sampler": PoissonSampler(0.04),
        "steps": 2250,
        "noise_multiplier": 1.5,
        "max_grad_norm": 1.0,
        "expected_batch_size": 64.0,
        "delta": 1e-5,
    }
    return Plan(**(values | changes))


def test_the_plan_composes_sampler_and_mechanism():
    guarantee = plan().guarantee()
    assert guarantee.epsilon == pytest.approx(6.768787, abs=1e-3)
    assert guarantee.accountant == "PLD"


def test_full_batches_earn_no_amplification():
    assert plan(sampler=PoissonSampler(1.0)).step_event() == dp_accounting.GaussianDpEvent(1.5)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.inf},
        {"expected_batch_size": 0.0},
        {"delta": 0.0},
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        plan(**changes)


@pytest.mark.parametrize("q", [0.0, -0.1, 1.1, math.nan])
def test_a_sampling_probability_outside_its_range_is_refused(q):
    with pytest.raises(ValueError, match="sampling_probability"):
        PoissonSampler(q)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(7.9941, "7.995"), (1.0, "1"), (1234.5604, "1234.561"), (1e5 + 0.4, "100000.4"), (0.0, "0")],
)
def test_a_printed_epsilon_is_never_smaller_than_the_number(epsilon, text):
    assert rounded_up(epsilon) == text
    assert float(text) >= epsilon
    assert rounded_up(math.inf) == "∞"


def test_a_delta_too_small_for_pld_is_answered_by_renyi():
    spent = epsilon_of(poisson_gaussian(1.0, 0.02, 100), 1e-18)
    assert spent.accountant == "RDP"
    assert math.isfinite(spent.value)
