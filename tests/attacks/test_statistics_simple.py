"""Rates, several p-values, permutation, exposure, means and trade-offs: vectors and properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from attacks.statistics import (
    Auc,
    TooFewNonMembers,
    TprAtFpr,
    auc,
    bonferroni,
    clopper_pearson,
    epsilon_delta_roc_ceiling,
    exposure_by_ranking,
    exposure_by_sample,
    gdp_delta,
    gdp_epsilon,
    holm,
    mean_estimate,
    permutation_control,
    rate,
    ratio_estimate,
    simultaneous_confidence,
    tpr_at_fpr,
    tradeoff_gaussian,
)
from attacks.statistics.permutation import _subsets


@pytest.fixture
def rng():
    return np.random.default_rng(20_240_611)


class TestClopperPearson:
    @given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.5, 0.999))
    def test_agrees_with_scipy(self, trials, share, confidence):
        successes = round(share * trials)
        low, high = clopper_pearson(successes, trials, confidence)
        expected = stats.binomtest(successes, trials).proportion_ci(confidence, "exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-12)

    def test_is_exact_at_the_ends_and_vectorised(self):
        low, high = clopper_pearson([0, 5, 10], 10)
        assert low[0] == 0.0
        assert high[2] == 1.0
        assert high[0] == pytest.approx(1 - 0.025**0.1)
        assert low[2] == pytest.approx(0.025**0.1)
        assert clopper_pearson(np.zeros((3, 1)), np.full(4, 9))[0].shape == (3, 4)

    def test_rate_is_an_estimate(self):
        estimate = rate(3, 10)
        assert (estimate.value, estimate.n) == (0.3, 10)
        assert 0.3 in estimate.interval

    @pytest.mark.parametrize(("k", "n"), [(5, 4), (-1, 4), (0, 0), (0.5, 2), (math.nan, 2)])
    def test_impossible_counts_are_refused(self, k, n):
        with pytest.raises(ValueError, match=r"successes|trials"):
            clopper_pearson(k, n)


class TestSeveralPValues:
    def test_holm_by_hand(self):
        np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
        np.testing.assert_allclose(bonferroni([0.04, 0.01, 0.5]), [0.12, 0.03, 1.0])

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_holm_lies_between_raw_and_bonferroni(self, p_values):
        adjusted = holm(p_values)
        assert (adjusted >= np.array(p_values)).all()
        assert (adjusted <= bonferroni(p_values) + 1e-15).all()

    def test_confidence_is_shared(self):
        assert simultaneous_confidence(0.95, 5) == pytest.approx(0.99)
        with pytest.raises(ValueError, match="statements"):
            simultaneous_confidence(0.95, 0)

    @pytest.mark.parametrize("p_values", [[], [1.1], [-0.1], [math.nan]])
    def test_what_is_no_p_value_is_refused(self, p_values):
        with pytest.raises(ValueError, match="p_values"):
            holm(p_values)


class TestPermutation:
    @pytest.mark.parametrize("decimals", [0, 3])
    def test_observed_values_are_those_of_the_estimates(self, rng, decimals):
        member = rng.permutation(700) < 300
        scores = np.round(rng.normal(size=700) + member, decimals)
        area = permutation_control(scores, member, Auc(), 39, rng)
        assert area.observed == pytest.approx(auc(scores, member).value)
        for fpr in (0.05, 0.2, 0.999):
            detection = permutation_control(scores, member, TprAtFpr(fpr), 39, rng)
            assert detection.observed == pytest.approx(tpr_at_fpr(scores, member, fpr).value)

    def test_an_attack_stands_out_and_noise_does_not(self, rng):
        member = rng.random(2000) < 0.5
        strong = permutation_control(rng.normal(size=2000) + member, member, Auc(), 199, rng)
        assert strong.p_value == 1 / 200
        assert strong.observed > strong.null_band.high
        assert strong.null_mean == pytest.approx(0.5, abs=0.005)
        constant = permutation_control(np.zeros(2000), member, Auc(), 199, rng)
        assert constant.p_value == 1.0
        assert constant.observed == constant.null_mean == 0.5

    def test_the_null_of_a_rate_lies_at_the_rate(self, rng):
        member = rng.random(4000) < 0.5
        control = permutation_control(rng.normal(size=4000), member, TprAtFpr(0.1), 199, rng)
        assert control.statistic == "TPR at FPR 0.1"
        assert control.null_mean == pytest.approx(0.1, abs=0.005)

    def test_null_spread_is_that_of_the_rank_sum(self, rng):
        """Under the null, var AUC = (N + 1)/(12 I O): Mann & Whitney 1947."""
        member = np.arange(300) < 100
        control = permutation_control(rng.normal(size=300), member, Auc(), 1999, rng)
        expected = 1.96 * math.sqrt(301 / (12 * 100 * 200))
        assert control.null_band.width / 2 == pytest.approx(expected, rel=0.1)

    def test_too_few_permutations_or_records_are_refused(self, rng):
        member = np.arange(100) < 50
        with pytest.raises(ValueError, match="39"):
            permutation_control(np.arange(100.0), member, Auc(), 38, rng)
        with pytest.raises(TooFewNonMembers, match="got 50"):
            permutation_control(np.arange(100.0), member, TprAtFpr(0.1), 39, rng)
        with pytest.raises(ValueError, match="fpr"):
            TprAtFpr(0.0)

    @pytest.mark.parametrize(("n", "size"), [(6, 2), (6, 5), (5, 1)])
    def test_subsets_are_uniform(self, rng, n, size):
        """Chi-square over all subsets; false alarm 1e-4 a case."""
        masks = [int((1 << subset).sum()) for subset in _subsets(n, size, 6000, rng)]
        _, counts = np.unique(masks, return_counts=True)
        assert counts.size == math.comb(n, size)
        assert stats.chisquare(counts).pvalue > 1e-4

    def test_the_uniformity_test_sees_a_biased_repair(self, rng):
        """Mending the size from the left, instead of at random, is caught by the same test."""
        masks = []
        for _ in range(6000):
            drawn = rng.random(6) < 1 / 3
            while drawn.sum() != 2:
                drawn[np.flatnonzero(drawn if drawn.sum() > 2 else ~drawn)[0]] ^= True
            masks.append(int((1 << np.flatnonzero(drawn)).sum()))
        _, counts = np.unique(masks, return_counts=True)
        assert stats.chisquare(counts).pvalue < 1e-4


class TestExposure:
    def test_the_first_of_1024_has_ten_bits(self):
        top = exposure_by_ranking(5.0, np.arange(1023) / 1023)
        assert (top.bits, top.at_least, str(top)) == (10.0, False, "10.00 bits")
        assert exposure_by_ranking(-1.0, np.arange(1023)).bits == 0.0
        assert exposure_by_ranking(3.0, [4.0, 2.0, 1.0]).bits == 1.0

    def test_ties_count_against_the_canary(self):
        assert exposure_by_ranking(0.0, np.zeros(1023)).bits == 0.0
        assert exposure_by_sample(0.0, np.zeros(1000), 1024).bits == 0.0

    def test_a_sample_yields_no_more_bits_than_it_supports(self):
        top = exposure_by_sample(2.0, np.linspace(0, 1, 1000), 10**9)
        assert top.at_least
        assert top.bits == top.interval.low == pytest.approx(-math.log2(1 - 0.025**0.001), abs=1e-3)
        assert top.interval.high == pytest.approx(math.log2(10**9))
        assert str(top) == ">= 8.09 bits"

    def test_the_whole_space_as_sample_gives_the_ranking(self):
        others = np.arange(999.0)
        sampled = exposure_by_sample(899.5, others, 1000)
        exact = exposure_by_ranking(899.5, others)
        assert sampled.bits == pytest.approx(exact.bits)
        assert sampled.interval.low < exact.bits < sampled.interval.high

    def test_the_door(self):
        with pytest.raises(ValueError, match="canary_score"):
            exposure_by_ranking(math.nan, [1.0])
        with pytest.raises(ValueError, match="1 NaN of 2"):
            exposure_by_sample(0.0, [1.0, math.nan], 100)
        with pytest.raises(ValueError, match="empty"):
            exposure_by_sample(0.0, [], 100)
        with pytest.raises(ValueError, match="space_size"):
            exposure_by_sample(0.0, [1.0], 1)


class TestMeans:
    def test_symmetric_values_get_students_interval(self):
        values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
        estimate = mean_estimate(values)
        expected = stats.t.interval(0.95, 4, loc=3, scale=values.std(ddof=1) / math.sqrt(5))
        assert (estimate.interval.low, estimate.interval.high) == pytest.approx(expected)
        assert (estimate.value, estimate.n) == (3.0, 5)

    def test_skewness_stretches_the_side_of_the_long_tail(self):
        values = np.array([1.0] * 18 + [5.0, 9.0])
        estimate = mean_estimate(values)
        low, high = stats.t.interval(
            0.95, 19, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(20)
        )
        assert estimate.interval.high > high + 0.1
        assert estimate.interval.low == pytest.approx(low)
        mirrored = mean_estimate(-values).interval
        assert (mirrored.low, mirrored.high) == pytest.approx(
            (-estimate.interval.high, -estimate.interval.low)
        )

    def test_the_cluster_is_the_unit(self, rng):
        document = np.repeat(np.arange(10), 50)
        tokens = np.repeat(rng.normal(size=10), 50) + 0.01 * rng.normal(size=500)
        clustered = mean_estimate(tokens, clusters=document)
        assert clustered.n == 10
        by_document = mean_estimate(tokens.reshape(10, 50).mean(axis=1))
        assert clustered.interval.width == pytest.approx(by_document.interval.width)
        assert clustered.interval.width > 5 * mean_estimate(tokens).interval.width

    def test_a_ratio_weighs_documents_by_their_bytes(self):
        estimate = ratio_estimate([10.0, 300.0, 30.0], [10.0, 100.0, 10.0])
        assert estimate.value == pytest.approx(340 / 120)
        labels = ["a", "b", "b", "a", "c"]
        clustered = mean_estimate([1.0, 2.0, 4.0, 3.0, 9.0], clusters=labels)
        assert clustered.value == pytest.approx(19 / 5)
        assert clustered == ratio_estimate([4.0, 6.0, 9.0], [2.0, 2.0, 1.0])

    def test_the_variance_is_the_jackknife(self, rng):
        bits, sizes = rng.gamma(9, size=30), rng.gamma(9, size=30)
        left_out = np.array(
            [np.delete(bits, k).sum() / np.delete(sizes, k).sum() for k in range(30)]
        )
        ratio = bits.sum() / sizes.sum()
        jackknife = math.sqrt(29 / 30 * ((left_out - ratio) ** 2).sum())
        estimate = ratio_estimate(bits, sizes)
        narrow = min(ratio - estimate.interval.low, estimate.interval.high - ratio)
        assert narrow == pytest.approx(stats.t.ppf(0.975, 29) * jackknife, rel=0.02)

    def test_equal_values_have_no_spread(self):
        assert mean_estimate([2.0, 2.0, 2.0]).interval.width == 0.0

    def test_the_door(self):
        with pytest.raises(ValueError, match="at least 2"):
            mean_estimate([1.0])
        with pytest.raises(ValueError, match="at least 2"):
            mean_estimate([1.0, 2.0], clusters=["a", "a"])
        with pytest.raises(ValueError, match="infinite"):
            mean_estimate([1.0, math.inf])
        with pytest.raises(ValueError, match="NaN"):
            mean_estimate([1.0, math.nan])
        with pytest.raises(ValueError, match="positive"):
            ratio_estimate([1.0, 2.0], [1.0, 0.0])
        with pytest.raises(ValueError, match="clusters"):
            mean_estimate([1.0, 2.0], clusters=["a"])


class TestTradeoffs:
    @pytest.mark.parametrize(
        ("mu", "delta", "epsilon"), [(1.0, 1e-6, 4.887), (1.0, 1e-5, 4.377), (0.0, 0.0, 0.0)]
    )
    def test_known_budgets(self, mu, delta, epsilon):
        assert gdp_epsilon(mu, delta) == pytest.approx(epsilon, abs=2e-3)

    @given(st.floats(0.01, 6), st.floats(1e-12, 0.5))
    def test_epsilon_and_delta_are_inverse(self, mu, delta):
        epsilon = gdp_epsilon(mu, delta)
        assert gdp_delta(mu, epsilon) <= delta
        if epsilon > 0:
            assert gdp_delta(mu, epsilon) == pytest.approx(delta, rel=1e-4)

    def test_limits(self):
        assert gdp_epsilon(1.0, 0.0) == math.inf
        assert gdp_epsilon(0.1, 0.5) == 0.0
        assert gdp_delta(0.0, 1.0) == 0.0

    def test_no_gaussian_attack_passes_the_ceiling_and_one_touches_it(self):
        fpr = np.linspace(0, 1, 20_001)
        for delta in (1e-5, 1e-2):
            epsilon = gdp_epsilon(1.0, delta)
            roc = 1 - tradeoff_gaussian(1.0)(fpr)
            room = epsilon_delta_roc_ceiling(epsilon, delta, fpr) - roc
            assert room.min() > -1e-9
            looser = epsilon_delta_roc_ceiling(epsilon - 0.3, delta, fpr) - roc
            assert looser.min() < 0

    def test_ceiling_by_hand(self):
        np.testing.assert_allclose(
            epsilon_delta_roc_ceiling(math.log(3), 0.01, [0.0, 0.1, 0.9, 1.0]),
            [0.01, 0.31, 1 - (0.99 - 0.9) / 3, 1.0],
        )
        np.testing.assert_allclose(epsilon_delta_roc_ceiling(0.0, 0.0, [0.2, 0.7]), [0.2, 0.7])
        assert epsilon_delta_roc_ceiling(800.0, 0.0, 0.5) == 1.0

    def test_the_door(self):
        for call in (
            lambda: gdp_epsilon(-1.0, 0.1),
            lambda: gdp_epsilon(1.0, 1.5),
            lambda: gdp_delta(1.0, math.nan),
            lambda: tradeoff_gaussian(math.inf),
            lambda: tradeoff_gaussian(1.0)([1.5]),
            lambda: epsilon_delta_roc_ceiling(-0.1, 0.0, 0.5),
        ):
            with pytest.raises(ValueError, match="must"):
                call()
