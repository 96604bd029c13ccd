"""The one-run lower bound on epsilon: published vectors, a literal reference, properties."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attacks.statistics import (
    canaries_needed,
    one_run_audit,
    one_run_ceiling,
    one_run_epsilon,
    one_run_p_value,
)


def literal_p_value(m, r, v, epsilon, delta):
    """Theorem 5.2 as it is written, over every i."""
    q = 1 / (1 + math.exp(-epsilon))
    correct = stats.binom(r, q)
    alpha = max((correct.cdf(v - 1) - correct.cdf(v - i - 1)) / i for i in range(1, m + 1))
    return min(1.0, correct.sf(v - 1) + 2 * m * delta * alpha)


def test_published_value():
    assert one_run_epsilon(1000, 100, 75, 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(("m", "ceiling"), [(100, 3.49), (1000, 5.81), (10_000, 8.11)])
def test_ceilings_of_a_perfect_attack(m, ceiling):
    assert one_run_ceiling(m, m, 0.0) == pytest.approx(ceiling, abs=5e-3)


@settings(max_examples=60, deadline=None)
@given(
    r=st.integers(1, 80),
    extra=st.integers(0, 100),
    share=st.floats(0, 1),
    epsilon=st.floats(0, 6),
    delta=st.sampled_from([0.0, 1e-6, 1e-3]),
)
def test_p_value_is_the_theorem(r, extra, share, epsilon, delta):
    v = round(share * r)
    expected = literal_p_value(r + extra, r, v, epsilon, delta)
    actual = one_run_p_value(r + extra, r, v, epsilon, delta)
    # The running mean stops twelve deviations below the bulk; what is left out is below 1e-12.
    assert actual == pytest.approx(expected, rel=1e-8, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 300), data=st.data(), delta=st.sampled_from([0.0, 1e-5, 1e-3]))
def test_bound_grows_with_right_guesses(r, data, delta):
    v = data.draw(st.integers(0, r - 1))
    assert one_run_epsilon(300, r, v, delta) <= one_run_epsilon(300, r, v + 1, delta) + 1e-8


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 300), data=st.data(), delta=st.sampled_from([0.0, 1e-5, 1e-3]))
def test_bound_is_the_edge_of_what_is_rejected(r, data, delta):
    v = data.draw(st.integers(0, r))
    bound = one_run_epsilon(300, r, v, delta)
    if bound > 0:
        assert one_run_p_value(300, r, v, bound - 1e-7, delta) <= 0.05
    assert one_run_p_value(300, r, v, bound + 1e-7, delta) > 0.05


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 200), data=st.data())
def test_delta_and_confidence_only_lower_the_bound(r, data):
    v = data.draw(st.integers(0, r))
    bounds = [one_run_epsilon(200, r, v, delta) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True)
    assert one_run_epsilon(200, r, v, 1e-4, 0.99) <= one_run_epsilon(200, r, v, 1e-4, 0.9)


def test_large_counts_are_neither_slow_nor_rounded_away():
    million = 10**6
    assert one_run_epsilon(million, million, 600_000, 1e-7) == pytest.approx(0.402, abs=2e-3)
    perfect = math.log(1 / -math.expm1(math.log(0.05) / million) - 1)
    assert one_run_ceiling(million, million, 0.0) == pytest.approx(perfect, abs=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1e-5])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0, 6.0])
def test_canaries_needed_is_the_smallest_number(epsilon, delta):
    m = canaries_needed(epsilon, delta)
    assert one_run_ceiling(m, m, delta) > epsilon
    assert all(one_run_ceiling(few, few, delta) <= epsilon for few in range(1, m))


def test_a_budget_beyond_every_audit_at_this_delta_is_named():
    with pytest.raises(ValueError, match=r"a perfect attack reaches 5\.[0-9]"):
        canaries_needed(8.0, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 5, 0.0), "guesses r"),
        ((10, 0, 0, 0.0), "guesses r"),
        ((10, 5, 6, 0.0), "right guesses v"),
        ((10, 5, -1, 0.0), "right guesses v"),
        ((10, 5, 5, 1.0), "delta"),
        ((10, 5, 5, -1e-9), "delta"),
        ((10, 5, 5, math.nan), "delta"),
        ((10, 5, 5, 0.0, 1.0), "confidence"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        one_run_epsilon(*arguments)


class TestAudit:
    def test_counts_by_hand(self):
        scores = np.arange(10.0, 0.0, -1.0)
        member = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0, 0], dtype=bool)
        both = one_run_audit(scores, member, 0.0, guess_fractions=(0.6,))
        assert (both.guesses, both.guessed_in, both.correct) == (6, 3, 2 + 2)
        odd = one_run_audit(scores, member, 0.0, guess_fractions=(0.7,))
        assert (odd.guesses, odd.guessed_in, odd.correct) == (7, 4, 3 + 2)
        everything = one_run_audit(scores, member, 0.0, guess_fractions=(1.0,))
        assert (everything.guesses, everything.correct) == (10, 4 + 4)
        top = one_run_audit(scores, member, 0.0, guess_fractions=(), in_only_fractions=(0.5,))
        assert (top.guesses, top.guessed_in, top.correct) == (5, 5, 4)

    def test_bound_and_ceiling_share_one_correction(self):
        member = np.random.default_rng(1).random(1000) < 0.5
        audit = one_run_audit(
            member + 0.0, member, 1e-5, guess_fractions=(0.8, 0.2), in_only_fractions=(0.3,)
        )
        assert audit.tried == 3
        split = 1 - 0.05 / 3
        assert audit.epsilon == pytest.approx(one_run_epsilon(1000, 800, 800, 1e-5, split))
        assert audit.ceiling == pytest.approx(audit.epsilon)

    def test_rules_that_coincide_are_paid_for_once(self):
        member = np.random.default_rng(1).random(20) < 0.5
        assert one_run_audit(member + 0.0, member, 0.0, guess_fractions=(0.1, 0.11)).tried == 1

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_only_the_order_of_scores_matters(self, seed):
        rng = np.random.default_rng(seed)
        member = rng.random(200) < 0.5
        if member.all() or not member.any():
            return
        scores = rng.normal(size=200) + 2 * member
        expected = one_run_audit(scores, member, 1e-5)
        assert one_run_audit(np.tanh(scores / 9), member, 1e-5) == expected
        shuffled = rng.permutation(200)
        assert one_run_audit(scores[shuffled], member[shuffled], 1e-5) == expected

    @pytest.mark.parametrize("rng", [None, np.random.default_rng(3)], ids=["fixed", "given"])
    def test_ties_do_not_read_the_order_of_the_records(self, rng):
        """Constant scores with all members listed first say nothing, in either direction."""
        for member in (np.arange(1000) < 500, np.arange(1000) >= 500):
            audit = one_run_audit(np.zeros(1000), member, 0.0, tie_rng=rng)
            assert audit.epsilon < 0.3

    def test_order_of_listing_would_have_leaked(self):
        """The control for the test above: breaking ties by position yields a perfect attack."""
        by_position = -np.arange(1000.0)
        member = np.arange(1000) < 500
        assert one_run_audit(by_position, member, 0.0).epsilon > 5

    def test_the_result_serialises(self):
        member = np.arange(100) % 2 == 0
        text = json.dumps(dataclasses.asdict(one_run_audit(np.arange(100.0), member, 1e-5)))
        assert json.loads(text)["canaries"] == 100

    @pytest.mark.parametrize("fraction", [0.0, 1.1, -0.5, math.nan])
    def test_fractions_out_of_range_are_refused(self, fraction):
        with pytest.raises(ValueError, match="fraction"):
            one_run_audit([1.0, 2.0], [True, False], 0.0, guess_fractions=(fraction,))

    def test_nothing_to_guess_is_refused(self):
        with pytest.raises(ValueError, match="at least one"):
            one_run_audit([1.0, 2.0], [True, False], 0.0, guess_fractions=())
