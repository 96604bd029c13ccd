"""ROC curves, areas, rates at a fixed false positive rate and bands: vectors and properties."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from attacks.statistics import (
    Estimate,
    Interval,
    TooFewNonMembers,
    auc,
    auc_distribution_free,
    pointwise_band,
    roc_curve,
    simultaneous_band,
    tpr_at_fpr,
)

STATISTICS = {
    "auc": auc,
    "auc_distribution_free": auc_distribution_free,
    "tpr_at_fpr": lambda s, m: tpr_at_fpr(s, m, 0.5),
}


@st.composite
def labelled_scores(draw, per_class=20):
    """Scores with many ties, at least `per_class` of either class."""
    n_in = draw(st.integers(per_class, 40))
    n_out = draw(st.integers(per_class, 40))
    n = n_in + n_out
    scores = draw(st.lists(st.integers(-6, 6), min_size=n, max_size=n))
    return np.array(scores, dtype=float), np.arange(n) < n_in


def _auc_by_pairs(scores, member):
    above = scores[member][:, None] - scores[~member][None, :]
    return ((above > 0) + 0.5 * (above == 0)).mean()


def test_roc_moves_tied_records_together():
    roc = roc_curve([3, 2, 2, 2, 1], [True, True, False, True, False])
    assert roc.thresholds.tolist() == [math.inf, 3, 2, 1]
    np.testing.assert_allclose(roc.tpr, [0, 1 / 3, 1, 1])
    np.testing.assert_allclose(roc.fpr, [0, 0, 1 / 2, 1])
    assert (roc.n_in, roc.n_out) == (3, 2)


def test_infinite_scores_are_ordered():
    scores = [math.inf, math.inf, 0.0, -math.inf]
    roc = roc_curve(scores, [True, False, True, False])
    np.testing.assert_allclose(roc.tpr, [0, 0.5, 1, 1])
    np.testing.assert_allclose(roc.fpr, [0, 0.5, 0.5, 1])
    assert auc(scores, [True, False, True, False]).value == pytest.approx((0.5 + 1 + 0 + 1) / 4)


@given(labelled_scores())
def test_roc_area_and_auc_agree_with_all_pairs(case):
    scores, member = case
    roc = roc_curve(scores, member)
    expected = _auc_by_pairs(scores, member)
    assert np.trapezoid(roc.tpr, roc.fpr) == pytest.approx(expected)
    assert auc(scores, member).value == pytest.approx(expected)
    assert (np.diff(roc.fpr) >= 0).all()
    assert (np.diff(roc.tpr) >= 0).all()
    assert (roc.fpr[-1], roc.tpr[-1]) == (1.0, 1.0)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
@given(case=labelled_scores(), seed=st.integers(0, 2**32 - 1))
def test_only_the_order_of_scores_matters(statistic, case, seed):
    scores, member = case
    expected = statistic(scores, member)
    assert statistic(np.exp(scores / 2) - 7, member) == expected
    shuffled = np.random.default_rng(seed).permutation(scores.size)
    assert statistic(scores[shuffled], member[shuffled]) == expected
    assert expected.interval.low <= expected.value <= expected.interval.high
    assert expected.n == scores.size


@given(labelled_scores())
def test_swapping_the_classes_mirrors_the_area(case):
    scores, member = case
    there, back = auc(scores, member), auc(scores, ~member)
    assert back.value == pytest.approx(1 - there.value)
    assert back.interval.low == pytest.approx(1 - there.interval.high, abs=1e-9)


def test_the_auc_interval_does_not_collapse_when_the_classes_separate():
    member = np.arange(100) < 50
    estimate = auc(member.astype(float), member)
    assert estimate.value == 1.0
    assert estimate.interval.high == 1.0
    assert estimate.interval.low < 0.97


def test_auc_interval_by_hand():
    """Two members of three records win everything: one lost pair among six, ties none."""
    in_scores, out_scores = np.array([1.0, 3.0, 4.0]), np.array([0.0, 2.0])
    wins_in, wins_out = np.array([1 / 2, 1, 1]), np.array([1, 2 / 3])
    variance = wins_in.var(ddof=1) / 3 + wins_out.var(ddof=1) / 2
    trials = (5 / 6) * (1 / 6) / variance
    low = stats.beta.ppf(0.025, trials * 5 / 6, trials / 6 + 1)
    high = stats.beta.ppf(0.975, trials * 5 / 6 + 1, trials / 6)
    member = np.arange(5) < 3
    interval = auc(np.concatenate([in_scores, out_scores]), member).interval
    assert interval.high == pytest.approx(high)
    assert interval.low <= low + 1e-12


def test_constant_scores_have_area_one_half_and_a_width():
    estimate = auc(np.zeros(100), np.arange(100) < 50)
    assert estimate.value == 0.5
    assert estimate.interval.low < 0.48
    assert estimate.interval.high > 0.52


def test_the_distribution_free_interval_at_one_is_the_exact_binomial_limit():
    member = np.arange(150) < 50
    low = auc_distribution_free(member.astype(float), member).interval.low
    assert low == pytest.approx(0.025 ** (1 / 50), abs=1e-9)


def test_tpr_is_that_of_the_largest_threshold_set_within_the_rate():
    out = np.arange(100.0)  # 0..99
    members = np.array([99.5, 90.0, 89.5, 89.0, 50.0])
    scores = np.concatenate([members, out])
    member = np.arange(105) < 5
    # Ten of 100 may be false: everything above 89 is called in; the member tied with 89 is not.
    assert tpr_at_fpr(scores, member, 0.1).value == pytest.approx(3 / 5)


def test_ties_at_the_threshold_are_left_out():
    member = np.arange(200) < 100
    constant = tpr_at_fpr(np.zeros(200), member, 0.1)
    assert constant.value == 0.0
    assert constant.interval.low == 0.0


def test_beyond_the_lowest_out_score_everything_counts_as_detected():
    """At FPR 90% of 12 the threshold may lie below all twelve, so no upper bound is earned."""
    scores = np.concatenate([np.full(50, -1.0), np.arange(12.0)])
    estimate = tpr_at_fpr(scores, np.arange(62) < 50, 0.9)
    assert (estimate.value, estimate.interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(("n_out", "fpr"), [(999, 0.01), (9, 0.9), (1000, 0.0099)])
def test_tpr_is_refused_where_the_rate_cannot_be_seen(n_out, fpr):
    scores = np.arange(n_out + 10.0)
    member = np.arange(n_out + 10) < 10
    with pytest.raises(TooFewNonMembers, match=f"got {n_out}"):
        tpr_at_fpr(scores, member, fpr)


def test_tpr_is_given_at_exactly_ten_expected_false_positives():
    member = np.arange(1010) < 10
    assert tpr_at_fpr(np.arange(1010.0), member, 0.01).value == 0.0


def test_pointwise_band_agrees_with_the_single_rates():
    rng = np.random.default_rng(5)
    member = np.arange(3000) < 1000
    scores = rng.normal(size=3000) + member
    band = pointwise_band(scores, member, [0.01, 0.1, 0.5], 0.9)
    assert (band.kind, band.confidence) == ("pointwise", 0.9)
    for k, fpr in enumerate(band.fpr):
        single = tpr_at_fpr(scores, member, fpr, 0.9)
        assert (band.tpr[k], band.low[k], band.high[k]) == pytest.approx(
            (single.value, single.interval.low, single.interval.high)
        )
    assert pointwise_band(scores, member).fpr[0] == pytest.approx(10 / 2000)


def test_simultaneous_band_is_wider_in_the_bulk_and_honest_below_its_reach():
    rng = np.random.default_rng(6)
    member = np.arange(4000) < 2000
    scores = rng.normal(size=4000) + member
    whole = simultaneous_band(scores, member, [0.005, 0.3])
    point = pointwise_band(scores, member, [0.005, 0.3])
    assert whole.kind == "simultaneous"
    assert whole.low[0] == 0.0
    assert whole.low[1] < point.low[1] < point.high[1] < whole.high[1]


def test_the_simultaneous_band_has_the_half_widths_of_dkw():
    n = 1000
    member = np.arange(2 * n) < n
    scores = np.concatenate([np.arange(n) + 0.5, np.arange(n)])  # the diagonal
    slack = math.sqrt(math.log(4 / 0.05) / (2 * n))
    band = simultaneous_band(scores, member, [0.4])
    assert band.low[0] == pytest.approx(0.4 - 2 * slack, abs=2.1 / n)
    assert band.high[0] == pytest.approx(0.4 + 2 * slack, abs=2.1 / n)


def test_interval_limits_come_from_order_statistics():
    """By hand: with every member between two out-scores only the ranks decide."""
    n_out, fpr = 1000, 0.02
    inner = int(stats.binom.ppf(0.0125, n_out, fpr))
    outer = int(stats.binom.isf(0.0125, n_out, fpr)) + 1
    out = np.arange(n_out, 0.0, -1.0)  # U_(k) = n_out + 1 - k
    member = np.arange(n_out + 40) >= n_out

    def interval(place):
        return tpr_at_fpr(np.concatenate([out, np.full(40, place)]), member, fpr).interval

    assert interval(n_out + 1 - inner + 0.5).low > 0.8  # just above U_(inner): surely detected
    assert interval(n_out + 1 - inner - 0.5).low == 0.0
    assert interval(n_out + 1 - outer + 0.5).high == 1.0
    assert interval(n_out + 1 - outer - 0.5).high < 0.2  # just below U_(outer): surely missed


@pytest.mark.parametrize("statistic", [roc_curve, *STATISTICS.values()])
class TestTheDoor:
    def test_nan_is_counted_and_located(self, statistic):
        scores = np.arange(60.0)
        scores[[7, 31]] = math.nan
        with pytest.raises(ValueError, match="2 NaN of 60 at positions 7, 31"):
            statistic(scores, np.arange(60) < 30)

    def test_one_class_is_refused(self, statistic):
        with pytest.raises(ValueError, match="both members and non-members"):
            statistic(np.arange(30.0), np.ones(30, dtype=bool))

    def test_shapes_must_match(self, statistic):
        with pytest.raises(ValueError, match="shape"):
            statistic(np.arange(30.0), np.ones(29, dtype=bool))
        with pytest.raises(ValueError, match="one-dimensional"):
            statistic(np.zeros((5, 6)), np.ones((5, 6), dtype=bool))

    def test_labels_must_be_truth_values(self, statistic):
        with pytest.raises(ValueError, match="booleans"):
            statistic(np.arange(3.0), [0, 1, 2])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.1, math.nan])
def test_confidence_is_a_probability(confidence):
    member = np.arange(60) < 30
    with pytest.raises(ValueError, match="confidence"):
        auc(np.arange(60.0), member, confidence)
    with pytest.raises(ValueError, match="confidence"):
        tpr_at_fpr(np.arange(60.0), member, 0.5, confidence)


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.5, math.nan])
def test_rates_outside_the_open_unit_interval_are_refused(fpr):
    member = np.arange(60) < 30
    with pytest.raises(ValueError, match="fpr"):
        tpr_at_fpr(np.arange(60.0), member, fpr)
    with pytest.raises(ValueError, match="fpr"):
        pointwise_band(np.arange(60.0), member, [fpr])


def test_results_are_frozen_and_serialise():
    estimate = Estimate(0.5, Interval(0.4, 0.6, 0.95), 10, "by hand")
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = 1.0
    assert json.loads(json.dumps(dataclasses.asdict(estimate)))["interval"]["low"] == 0.4
    member = np.arange(60) < 30
    for result in (
        auc(np.arange(60.0), member),
        tpr_at_fpr(np.arange(60.0), member, 0.5),
        pointwise_band(np.arange(60.0), member),
    ):
        json.dumps(dataclasses.asdict(result))
    assert 0.5 in estimate.interval
    with pytest.raises(ValueError, match="low <= high"):
        Interval(0.6, 0.4, 0.95)
