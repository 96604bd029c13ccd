"""Accounting against published and independently computed values."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from privlm.dp import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    ExampleLevelSampling,
    FixedSizeSampler,
    FlatClipping,
    Plan,
    PoissonSampler,
    Search,
    TruncatedPoissonSampler,
    UserLevelSampling,
    calibrate_noise_multiplier,
    epsilon_of,
    most_steps,
    trade_off,
)
from privlm.dp.accounting import (
    _deltas_of,
    _epsilon_of,
    _resized,
    composed,
    deltas_of,
    rounded_up,
)


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


@pytest.mark.parametrize(("capacity", "expected"), [(128, 5.2208), (160, 2.12466), (256, 2.124523)])
def test_truncated_poisson_matches_the_known_values(capacity, expected):
    event = TruncatedPoissonSampler(0.01, capacity, 10_000).event(1.0, 1000)
    spent = epsilon_of(event, 1e-6)
    assert spent.accountant == "PLD"
    assert spent.value == pytest.approx(expected, abs=1e-3)


def test_replacing_one_is_a_shift_of_two_bounds():
    gaussian = dp_accounting.GaussianDpEvent
    for accountant_limit in (None, 1):
        with pytest.MonkeyPatch.context() as patch:
            if accountant_limit is not None:  # Rényi DP answers
                patch.setattr("privlm.dp.accounting.MAX_GRID_POINTS", accountant_limit)
            replaced = epsilon_of(gaussian(2.0), 1e-5, "replace-one")
            assert replaced.value == pytest.approx(epsilon_of(gaussian(1.0), 1e-5).value, abs=1e-6)


def test_fixed_size_batches_are_accounted_by_renyi_for_replacing_one():
    """Wang et al. 2019; a whole batch is no sampling at all, a small one earns something."""
    spent = epsilon_of(FixedSizeSampler(10, 1000).event(2.0, 100), 1e-5, "replace-one")
    assert spent.accountant == "RDP"
    assert "PLD does not know" in spent.fallback_reason
    whole = epsilon_of(FixedSizeSampler(1000, 1000).event(2.0, 100), 1e-5, "replace-one")
    assert spent.value < whole.value / 10
    # The same rate, drawn by Poisson sampling, is known exactly; it is close and smaller.
    poisson = epsilon_of(poisson_gaussian(2.0, 0.01, 100), 1e-5, "replace-one").value
    assert poisson < spent.value < 6 * poisson
    with pytest.raises(ValueError, match="no accountant knows"):
        epsilon_of(FixedSizeSampler(10, 1000).event(2.0, 100), 1e-5)


def test_events_that_no_accountant_knows_together_are_added_at_half_of_delta():
    ours, theirs = FixedSizeSampler(10, 1000).event(2.0, 10), poisson_gaussian(2.0, 0.01, 10)
    both = epsilon_of(composed([ours, theirs]), 1e-5, "replace-one")
    halves = [epsilon_of(event, 5e-6, "replace-one").value for event in (ours, theirs)]
    assert both.value == pytest.approx(sum(halves))
    assert "added at half of δ" in both.fallback_reason


def test_noise_too_small_for_pld_where_renyi_is_ignorant_is_unbounded_not_wrong():
    event = ExampleLevelSampling(4).event(0.5, 0.005, 10)
    spent = epsilon_of(event, 1e-5)
    assert spent.value == math.inf
    assert "did not fit" in spent.fallback_reason


def test_a_coarse_grid_errs_upwards():
    event = poisson_gaussian(1.3, 0.0025, 6000)
    assert epsilon_of(event, 1e-5, coarseness=10).value > epsilon_of(event, 1e-5).value


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


@pytest.mark.parametrize(
    ("sampler", "more"),
    [
        (TruncatedPoissonSampler(0.05, 60, 1000), {}),
        (FixedSizeSampler(50, 1000), {"neighbours": "replace-one"}),
        (PoissonSampler(0.05), {"neighbours": "replace-one"}),
        (CyclicPoissonSampler(0.2, 4), {}),
        (BallsInBinsSampler(20), {}),
        (PoissonSampler(0.05), {"users": ExampleLevelSampling(2)}),
        (PoissonSampler(0.05), {"users": UserLevelSampling(2)}),
    ],
)
def test_every_kind_of_plan_is_calibrated_from_below(sampler, more):
    asked = {"sampler": sampler, "steps": 60, "expected_batch_size": 50.0, "delta": 1e-5} | more
    found = Plan.for_budget(target_epsilon=2.0, **asked)
    assert found.guarantee().epsilon <= 2.0
    less = Plan(noise_multiplier=found.noise_multiplier / 1.01, **asked)
    assert less.guarantee().epsilon > 2.0


@pytest.mark.parametrize(("sigma", "q"), [(1.5, 0.04), (2.0, 0.5)])
def test_the_most_steps_fit_and_a_few_more_do_not(sigma, q):
    count = most_steps(lambda steps: poisson_gaussian(sigma, q, steps), 3.0, 1e-5)
    assert epsilon_of(poisson_gaussian(sigma, q, count), 1e-5).value <= 3.0
    more = count + max(1, count // 250)
    assert epsilon_of(poisson_gaussian(sigma, q, more), 1e-5).value > 3.0


def test_a_plan_allows_the_steps_that_it_was_calibrated_for():
    made = Plan.for_budget(
        target_epsilon=1.0, delta=1e-5, sampler=PoissonSampler(0.01), steps=777,
        expected_batch_size=1.0,
    )  # fmt: skip
    assert made.most_steps(1.0, at_most=777) == 777
    assert made.most_steps(1e-6) == 0


def test_the_trade_off_of_one_gaussian_is_known_exactly():
    """TPR = Φ(Φ⁻¹(α) + 1/σ) (Dong, Roth and Su 2019)."""
    rates = np.array([0.0, 1e-4, 0.01, 0.1, 0.5, 0.9, 1.0])
    exact = stats.norm.cdf(stats.norm.ppf(rates) + 1 / 1.3)
    curve = trade_off(dp_accounting.GaussianDpEvent(1.3), rates)
    assert (curve >= exact - 1e-9).all()
    assert curve == pytest.approx(exact, abs=2e-4)


def test_the_trade_off_of_a_composition_agrees_with_its_epsilon():
    event, rates = poisson_gaussian(1.0, 0.02, 200), np.linspace(0, 1, 11)
    curve = trade_off(event, rates)
    epsilon = epsilon_of(event, 1e-5).value
    assert (curve <= 1e-5 + np.exp(epsilon) * rates + 1e-9).all()
    assert (np.diff(curve) > 0).all()
    assert (curve >= rates).all()
    # From above the attack that looks at the largest of many independent steps alone.
    assert curve[1] > 0.12
    assert (trade_off(poisson_gaussian(0.0, 0.5, 1), rates) == 1).all()
    with pytest.raises(ValueError, match="false positive rates"):
        trade_off(event, np.array([1.1]))


def test_a_search_is_no_cheaper_by_taking_its_trials_for_granted():
    trial = poisson_gaussian(2.0, 0.02, 100)
    laws = [
        Search(mean_trials=10.0),
        Search(mean_trials=10.0, law="poisson"),
        Search(mean_trials=10.0, law="truncated-negative-binomial", shape=0.0),
    ]
    costs = [epsilon_of(search.event(trial), 1e-5).value for search in laws]
    assert min(costs) > epsilon_of(trial, 1e-5).value
    assert costs[2] < costs[0]


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
        "clipping": FlatClipping(1.0),
        "expected_batch_size": 64.0,
        "delta": 1e-5,
    }
    return Plan(**(values | changes))


def test_the_plan_composes_sampler_and_mechanism():
    guarantee = plan().guarantee()
    assert guarantee.epsilon == pytest.approx(6.768787, abs=1e-3)
    assert guarantee.accountant == "PLD"


def test_full_batches_earn_no_amplification():
    assert plan(sampler=PoissonSampler(1.0)).event() == dp_accounting.SelfComposedDpEvent(
        dp_accounting.GaussianDpEvent(1.5), 2250
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
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


def exact_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of N(0, 1) against N(μ, 1) (Balle and Wang 2018, theorem 8)."""
    below = stats.norm.logsf(epsilon / mu + mu / 2)
    return stats.norm.sf(epsilon / mu - mu / 2) - math.exp(epsilon + below)


@pytest.mark.parametrize(("mu", "steps"), [(3, 30_000), (6, 1000), (1, 10**6)])
@pytest.mark.parametrize("neighbours", ["add-or-remove-one", "replace-one"])
def test_round_off_does_not_carry_epsilon_below_the_truth_at_a_tiny_delta(mu, steps, neighbours):
    """n releases at a rate of all but 1 are one Gaussian release of √n times the shift."""
    bounds = 1 if neighbours == "add-or-remove-one" else 2
    event = poisson_gaussian(bounds * math.sqrt(steps) / mu, 1 - 1e-13, steps)
    for delta in (1e-9, 1e-10, 1.2e-11, 1e-12):
        spent = epsilon_of(event, delta, neighbours)
        exact = brentq(lambda e: exact_delta(mu, e) - delta, 0, 500)  # noqa: B023
        assert exact <= spent.value
        if 1e-16 * steps < delta and delta > 1e-11:
            assert spent.accountant == "PLD"
            assert spent.value < 1.2 * exact
        else:
            assert "cannot resolve" in spent.fallback_reason
            if neighbours == "add-or-remove-one":  # Rényi DP does not know the other
                assert spent.accountant == "RDP"
                assert spent.value < 1.2 * exact
            else:
                assert spent.value == math.inf


def test_round_off_does_not_carry_the_privacy_profile_below_the_truth():
    mu, steps = 3, 30_000
    event = poisson_gaussian(math.sqrt(steps) / mu, 1 - 1e-13, steps)
    epsilons = np.array([12.0, 20.0, 23.0, 24.0, 25.0, 27.0])
    exact = np.array([exact_delta(mu, epsilon) for epsilon in epsilons])
    assert (deltas_of(event, epsilons) >= exact).all()


@pytest.mark.parametrize(
    ("population", "capacity", "q", "dearer"),
    [(20, 10, 0.9, 19), (3, 1, 0.9, 2), (3, 2, 1.0, 3)],
)
def test_replacing_one_of_truncated_batches_is_accounted_for_the_dearer_size(
    population, capacity, q, dearer
):
    """Batches are drawn from ``population`` examples or one less; neither is always dearer."""

    def of_size(examples: int) -> float:
        event = TruncatedPoissonSampler(q, capacity, population).event(2.0, 1)
        sizes = {population: examples}
        return _epsilon_of(_resized(event, sizes), 1e-5, "replace-one", 1.0).value

    costs = {examples: of_size(examples) for examples in (population, population - 1)}
    event = TruncatedPoissonSampler(q, capacity, population).event(2.0, 1)
    assert epsilon_of(event, 1e-5, "replace-one").value == max(costs.values()) == costs[dearer]
    assert costs[population] != costs[population - 1]
    deltas = deltas_of(event, np.array([5.0]), "replace-one")
    smaller = composed([_resized(event, {population: population - 1})])
    assert deltas >= _deltas_of(smaller, np.array([5.0]), "replace-one")
