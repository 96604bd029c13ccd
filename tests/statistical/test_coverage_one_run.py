"""The one-run bound against mechanisms whose epsilon is known: it may exceed the truth in at most
5% of audits, and it must not be idle.

Randomised response is the worst case under pure DP: every guess is right with probability exactly
q. For delta > 0 the worst case reveals k coins at once with probability m delta/k. For both the
number of right guesses has a known law, so those tests are exact. The audits end to end are
simulated: with `runs` audits of true error at most 5%, a sound bound fails a check with
probability at most FALSE_ALARM.
"""

import math

import numpy as np
import pytest
from scipy import stats

from attacks.statistics import gdp_epsilon, one_run_audit, one_run_epsilon

ERROR = 0.05
FALSE_ALARM = 1e-5


@pytest.fixture
def rng():
    return np.random.default_rng(52_001)


def most_misses(runs):
    return int(stats.binom.isf(FALSE_ALARM, runs, ERROR))


def right_rate(epsilon):
    return 1 / (1 + np.exp(-epsilon))


# Bounds on trial: the theorem's, and three that are plausible and wrong.


def theorem(m, r, v, delta):
    return one_run_epsilon(m, r, v, delta)


def without_delta(m, r, v, delta):
    return one_run_epsilon(m, r, v, 0.0)


def without_two_m(m, r, v, delta):
    """Delta enters as if it were spent once, not by every canary."""
    return one_run_epsilon(m, r, v, delta / (2 * m))


def mid_p(m, r, v, delta):
    """Clopper-Pearson with half the mass at v: shorter, and not valid."""
    q_grid = right_rate(np.linspace(0, 12, 4001))
    p = stats.binom.sf(v, r, q_grid) + 0.5 * stats.binom.pmf(v, r, q_grid)
    rejected = np.flatnonzero(p <= ERROR)
    return float(np.linspace(0, 12, 4001)[rejected[-1]]) if rejected.size else 0.0


def right_given_reveal(r, k, epsilon):
    """Law of the right guesses, shape (r + 1,): k revealed, the rest randomised response."""
    law = np.zeros(r + 1)
    law[k:] = stats.binom.pmf(np.arange(r - k + 1), r - k, right_rate(epsilon))
    return law


def exceedance(bound, m, r, epsilon, *, delta=0.0, reveal=0):
    """P[bound > epsilon] exactly, for the (epsilon, delta)-DP mechanism that reveals `reveal`."""
    exceeds = np.array([bound(m, r, v, delta) > epsilon for v in range(r + 1)])
    rare = min(1.0, m * delta / reveal) if reveal else 0.0
    law = (1 - rare) * right_given_reveal(r, 0, epsilon) + rare * right_given_reveal(
        r, reveal, epsilon
    )
    return float(law @ exceeds)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("m", "r"), [(100, 100), (100, 10), (1000, 1000), (1000, 70)])
def test_randomised_response_is_exceeded_in_at_most_five_percent(m, r, epsilon):
    assert exceedance(theorem, m, r, epsilon) <= ERROR + 1e-12


def test_mid_p_is_caught():
    """Its error passes 5% for some r and epsilon of the same family of mechanisms."""
    worst = max(
        exceedance(mid_p, r, r, epsilon) for r in (20, 30, 40) for epsilon in (0.0, 1.0, 2.0, 4.0)
    )
    assert worst > ERROR + 0.01


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("m", "r", "delta"), [(100, 100, 1e-3), (100, 30, 1e-2), (1000, 100, 1e-3)]
)
def test_delta_events_are_paid_for(m, r, delta, epsilon):
    worst = max(
        exceedance(theorem, m, r, epsilon, delta=delta, reveal=k) for k in range(1, r + 1, 3)
    )
    assert worst <= ERROR + 1e-12


@pytest.mark.parametrize("broken", [without_delta, without_two_m])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_a_bound_that_forgets_delta_is_caught(broken, epsilon):
    worst = max(
        exceedance(broken, 1000, 100, epsilon, delta=1e-2, reveal=k) for k in range(1, 101, 3)
    )
    assert worst > 2 * ERROR


# Audits end to end


def randomised_response(rng, member, epsilon):
    """One answer a canary, flipped with probability 1 - q; the strength of the score is noise."""
    answer = np.where(rng.random(member.size) < right_rate(epsilon), member, ~member)
    return np.where(answer, 1.0, -1.0) * (1 + rng.random(member.size))


def bare_randomised_response(rng, member, epsilon):
    """The same with nothing but two values: ties everywhere."""
    return np.sign(randomised_response(rng, member, epsilon))


def gaussian(rng, member, mu):
    """mu-GDP per canary: each coin is shifted by mu in unit noise."""
    return rng.normal(size=member.size) + mu * member


def leaky_response(rng, member, epsilon, delta, reveal):
    """(epsilon, delta)-DP: with probability m delta/reveal, `reveal` coins come out as they are."""
    scores = randomised_response(rng, member, epsilon)
    if rng.random() < member.size * delta / reveal:
        shown = rng.choice(member.size, reveal, replace=False)
        scores[shown] = np.where(member[shown], np.inf, -np.inf)
    return scores


def audits(rng, m, runs, mechanism, delta, **rules):
    """Bounds (runs,) from audits on freshly tossed coins."""
    bounds = np.empty(runs)
    for run in range(runs):
        member = rng.random(m) < 0.5
        bounds[run] = one_run_audit(mechanism(rng, member), member, delta, **rules).epsilon
    return bounds


# Floors for the mean bound, about 10% below the measured one: a bound of 0 fails.
POWER_RESPONSE = {
    (100, 0.0): 0.0,
    (100, 1.0): 0.42,
    (100, 2.0): 1.18,
    (100, 4.0): 2.2,
    (1000, 0.0): 0.0,
    (1000, 1.0): 0.76,
    (1000, 2.0): 1.62,
    (1000, 4.0): 3.15,
}


@pytest.mark.parametrize("scores", [randomised_response, bare_randomised_response])
@pytest.mark.parametrize(("m", "epsilon"), POWER_RESPONSE)
def test_audits_of_randomised_response(rng, scores, m, epsilon):
    runs = 1000
    bounds = audits(rng, m, runs, lambda g, member: scores(g, member, epsilon), 0.0)
    assert (bounds > epsilon).sum() <= most_misses(runs)
    assert bounds.mean() >= POWER_RESPONSE[m, epsilon]


@pytest.mark.parametrize(
    ("m", "mu", "floor"), [(100, 1.0, 0.58), (100, 2.0, 1.45), (1000, 1.0, 1.42), (1000, 2.0, 2.9)]
)
def test_audits_of_a_gaussian_mechanism(rng, m, mu, floor):
    runs, delta = 500, 1e-5
    bounds = audits(rng, m, runs, lambda g, member: gaussian(g, member, mu), delta)
    assert (bounds > gdp_epsilon(mu, delta)).sum() <= most_misses(runs)
    assert bounds.mean() >= floor


@pytest.mark.parametrize("reveal", [10, 30])
def test_audits_of_a_mechanism_that_leaks_rarely(rng, reveal):
    runs, m, delta = 1000, 1000, 1e-2
    bounds = audits(rng, m, runs, lambda g, s: leaky_response(g, s, 1.0, delta, reveal), delta)
    assert (bounds > 1.0).sum() <= most_misses(runs)


def test_that_mechanism_defeats_a_bound_without_delta(rng):
    runs, m = 300, 1000
    bounds = audits(rng, m, runs, lambda g, s: leaky_response(g, s, 1.0, 1e-2, 30), 0.0)
    assert (bounds > 1.0).sum() > most_misses(runs)


def test_perfect_separation_comes_close_to_the_ceiling(rng):
    for m, ceiling in ((1000, 5.81), (10_000, 8.11)):
        bounds = audits(rng, m, 20, lambda g, member: member + 0.0, 0.0)
        assert bounds.mean() > 0.9 * ceiling


def test_one_sided_guesses_are_as_valid_and_stronger_where_only_members_tell(rng):
    runs, m, epsilon = 1000, 1000, 2.0

    def members_tell(g, member):
        """1-in-10 members score high, non-members e^epsilon times less often: epsilon-DP."""
        high = g.random(m) < np.where(member, 0.2, 0.2 * math.exp(-epsilon))
        return high + g.random(m)

    two_sided = audits(rng, m, runs, members_tell, 0.0)
    one_sided = audits(
        rng, m, runs, members_tell, 0.0, guess_fractions=(), in_only_fractions=(0.25, 0.1, 0.05)
    )
    assert (two_sided > epsilon).sum() <= most_misses(runs)
    assert (one_sided > epsilon).sum() <= most_misses(runs)
    assert one_sided.mean() > two_sided.mean() + 0.3


def test_picking_the_best_rule_without_paying_for_it_is_caught(rng):
    """Twelve shares of guesses, each tested at the full 5%."""
    runs, m, misses = 400, 1000, 0
    shares = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
    for _ in range(runs):
        member = rng.random(m) < 0.5
        scores = randomised_response(rng, member, 0.0)
        misses += any(
            one_run_audit(scores, member, 0.0, guess_fractions=(share,)).epsilon > 0
            for share in shares
        )
    assert misses > most_misses(runs)


def test_the_same_twelve_rules_paid_for_are_sound(rng):
    runs = 1000
    shares = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
    bounds = audits(
        rng, 1000, runs, lambda g, s: randomised_response(g, s, 0.0), 0.0, guess_fractions=shares
    )
    assert (bounds > 0).sum() <= most_misses(runs)
