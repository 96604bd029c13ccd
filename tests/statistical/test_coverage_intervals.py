"""Every interval covers its truth in at least 95% of simulated samples, and a plausible but wrong
variant of each is rejected by the same check.

A check passes at most `most_misses(runs)` misses: a method whose true error is 5% or less fails
it with probability FALSE_ALARM; there are about 140 such checks.
"""

import math

import numpy as np
import pytest
from scipy import stats

from attacks.statistics import (
    Auc,
    TprAtFpr,
    auc,
    auc_distribution_free,
    clopper_pearson,
    exposure_by_sample,
    mean_estimate,
    permutation_control,
    pointwise_band,
    ratio_estimate,
    simultaneous_band,
    tpr_at_fpr,
)

ERROR = 0.05
FALSE_ALARM = 1e-5


@pytest.fixture
def rng():
    return np.random.default_rng(19_340)


def most_misses(runs, error=ERROR):
    return int(stats.binom.isf(FALSE_ALARM, runs, error))


def misses(interval_of_run, truth, runs):
    intervals = [interval_of_run() for _ in range(runs)]
    return sum(not low <= truth <= high for low, high in intervals)


def limits(estimate):
    return estimate.interval.low, estimate.interval.high


def labelled(in_scores, out_scores):
    member = np.arange(in_scores.size + out_scores.size) < in_scores.size
    return np.concatenate([in_scores, out_scores]), member


# Rates


def test_clopper_pearson_covers_at_every_rate():
    """Exact: the law of k is known, so coverage is a sum."""
    assert _worst_binomial_coverage(clopper_pearson) >= 1 - ERROR - 1e-12


def test_wald_and_wilson_are_caught():
    def wald(k, n):
        half = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
        return k / n - half, k / n + half

    def wilson(k, n):
        centre = (k + 1.96**2 / 2) / (n + 1.96**2)
        half = 1.96 / (n + 1.96**2) * np.sqrt(k * (n - k) / n + 1.96**2 / 4)
        return centre - half, centre + half

    assert _worst_binomial_coverage(wald) < 0.9
    assert _worst_binomial_coverage(wilson) < 0.94


def _worst_binomial_coverage(method):
    rates_P = np.linspace(0.001, 0.999, 999)
    worst = 1.0
    for n in (10, 50, 300):
        k_K = np.arange(n + 1)
        low_K, high_K = method(k_K, n)
        covers_PK = (low_K <= rates_P[:, None]) & (rates_P[:, None] <= high_K)
        worst = min(
            worst, (stats.binom.pmf(k_K, n, rates_P[:, None]) * covers_PK).sum(axis=1).min()
        )
    return worst


# The area under the curve. Each law: draw members, draw non-members, true area.


def binormal(shift, spread):
    area = float(stats.norm.cdf(shift / math.hypot(1, spread)))
    return (lambda g, n: g.normal(shift, spread, n)), (lambda g, n: g.normal(size=n)), area


def cauchy(shift):
    area = 0.5 + math.atan(shift / 2) / math.pi
    return (lambda g, n: g.standard_cauchy(n) + shift), (lambda g, n: g.standard_cauchy(n)), area


def student(shift, freedom):
    grid = (np.arange(20_000) + 0.5) / 20_000
    area = float(stats.t.cdf(stats.t.ppf(grid, freedom) + shift, freedom).mean())

    def draw(at):
        return lambda g, n: g.standard_t(freedom, n) + at

    return draw(shift), draw(0.0), area


def graded(in_law, out_law):
    """Scores on a few levels, higher levels last."""
    pairs = np.outer(in_law, out_law)
    area = float(np.tril(pairs, -1).sum() + np.trace(pairs) / 2)

    def draw(law):
        return lambda g, n: g.choice(len(law), n, p=law).astype(float)

    return draw(in_law), draw(out_law), area


def outlying(share, members):
    """Well separated, but a few records of one class stand far on the wrong side."""
    area = (1 - share) * float(stats.norm.cdf(6 / math.sqrt(2)))

    def stray(at, to):
        return lambda g, n: np.where(g.random(n) < share, to, at) + g.normal(size=n)

    if members:
        return stray(6.0, -20.0), (lambda g, n: g.normal(size=n)), area
    return (lambda g, n: g.normal(6.0, 1.0, n)), stray(0.0, 30.0), area


AREAS = {
    "null": binormal(0.0, 1.0),
    "weak": binormal(0.5, 1.0),
    "clear": binormal(1.5, 1.0),
    "strong": binormal(3.0, 1.0),
    "near one": binormal(4.5, 1.0),
    "null, wide members": binormal(0.0, 5.0),
    "null, narrow members": binormal(0.0, 0.2),
    "wide members": binormal(4.0, 5.0),
    "narrow members": binormal(1.0, 0.2),
    "narrow, near one": binormal(2.0, 0.2),
    "heavy tails, null": cauchy(0.0),
    "heavy tails": cauchy(3.0),
    "two degrees of freedom": student(4.0, 2),
    "two levels": graded([0.1, 0.9], [0.9, 0.1]),
    "two levels, null": graded([0.9, 0.1], [0.9, 0.1]),
    "four levels": graded([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]),
    "four levels, near one": graded([0.0, 0.01, 0.04, 0.95], [0.9, 0.08, 0.02, 0.0]),
    "stray non-members": outlying(0.05, members=False),
    "stray members": outlying(0.1, members=True),
    "rare stray members": outlying(0.02, members=True),
    "few stray members": outlying(0.03, members=True),
    "narrow, at one": binormal(3.0, 0.2),
}


@pytest.mark.parametrize(("n_in", "n_out"), [(50, 50), (50, 500), (400, 50)])
@pytest.mark.parametrize("law", AREAS.values(), ids=AREAS)
def test_auc_interval_covers(rng, law, n_in, n_out):
    draw_in, draw_out, truth = law
    runs = 800
    missed = misses(
        lambda: limits(auc(*labelled(draw_in(rng, n_in), draw_out(rng, n_out)))), truth, runs
    )
    assert missed <= most_misses(runs)


@pytest.mark.parametrize("law", ["null", "near one", "narrow members", "stray members"])
def test_distribution_free_auc_interval_covers(rng, law):
    draw_in, draw_out, truth = AREAS[law]
    runs = 300
    missed = misses(
        lambda: limits(auc_distribution_free(*labelled(draw_in(rng, 20), draw_out(rng, 30)))),
        truth,
        runs,
    )
    assert missed <= most_misses(runs)


def test_auc_interval_is_no_wider_than_needed(rng):
    """At the null with many records it comes within 5% of the shortest, 1.96 standard errors."""
    estimate = auc(*labelled(rng.normal(size=1000), rng.normal(size=1000)))
    shortest = 2 * 1.96 * math.sqrt(2001 / (12 * 1000 * 1000))
    assert estimate.interval.width < 1.05 * shortest


def _hanley_mcneil(in_scores, out_scores):
    """The textbook's Wald interval."""
    area = (in_scores[:, None] > out_scores).mean()
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    n_in, n_out = in_scores.size, out_scores.size
    spread = area * (1 - area) + (n_in - 1) * (q1 - area**2) + (n_out - 1) * (q2 - area**2)
    half = 1.96 * math.sqrt(spread / (n_in * n_out))
    return area - half, area + half


@pytest.mark.parametrize("law", ["narrow, at one", "few stray members"])
def test_an_auc_interval_blind_to_unseen_records_is_caught(rng, law):
    """DeLong's variance alone, without pseudo-records."""
    draw_in, draw_out, truth = AREAS[law]
    runs = 600

    def seen_only():
        in_scores, out_scores = draw_in(rng, 50), draw_out(rng, 50)
        wins = (in_scores[:, None] > out_scores).astype(float)
        area = wins.mean()
        variance = wins.mean(axis=1).var(ddof=1) / 50 + wins.mean(axis=0).var(ddof=1) / 50
        if variance == 0:
            return area, area
        half = 1.96 * math.sqrt(variance) / (area * (1 - area))
        logit = math.log(area / (1 - area))
        return 1 / (1 + math.exp(half - logit)), 1 / (1 + math.exp(-half - logit))

    assert misses(seen_only, truth, runs) > most_misses(runs)


@pytest.mark.parametrize("law", ["near one", "wide members", "rare stray members"])
def test_the_textbook_auc_interval_is_caught(rng, law):
    draw_in, draw_out, truth = AREAS[law]
    runs = 600
    missed = misses(lambda: _hanley_mcneil(draw_in(rng, 50), draw_out(rng, 400)), truth, runs)
    assert missed > most_misses(runs)


# The true positive rate at a fixed false positive rate


def continuous_tpr(shift):
    truth = lambda f: float(stats.norm.sf(stats.norm.isf(f) - shift))  # noqa: E731
    return (lambda g, n: g.normal(shift, 1, n)), (lambda g, n: g.normal(size=n)), truth


def graded_tpr(in_law, out_law):
    """The largest set of top levels whose false positive rate is at most f."""

    def truth(f):
        top_false = np.append(np.cumsum(out_law[::-1])[::-1], 0.0)
        top_true = np.append(np.cumsum(in_law[::-1])[::-1], 0.0)
        return float(top_true[top_false <= f + 1e-12].max())

    draw_in, draw_out, _ = graded(in_law, out_law)
    return draw_in, draw_out, truth


DETECTIONS = {
    "null": continuous_tpr(0.0),
    "weak": continuous_tpr(1.0),
    "strong": continuous_tpr(3.0),
    "very strong": continuous_tpr(5.0),
    "ties, null": graded_tpr([0.95, 0.042, 0.008], [0.95, 0.042, 0.008]),
    "ties": graded_tpr([0.3, 0.4, 0.3], [0.95, 0.045, 0.005]),
    "ties at the rate": graded_tpr([0.3, 0.4, 0.3], [0.95, 0.04, 0.01]),
}


@pytest.mark.parametrize(("n_in", "n_out", "fpr"), [(1000, 1000, 0.01), (60, 1000, 0.05)])
@pytest.mark.parametrize("law", DETECTIONS.values(), ids=DETECTIONS)
def test_tpr_interval_covers(rng, law, n_in, n_out, fpr):
    draw_in, draw_out, truth = law
    runs = 500
    missed = misses(
        lambda: limits(tpr_at_fpr(*labelled(draw_in(rng, n_in), draw_out(rng, n_out)), fpr)),
        truth(fpr),
        runs,
    )
    assert missed <= most_misses(runs)


def test_forgetting_that_the_threshold_was_estimated_is_caught(rng):
    """Clopper-Pearson on the members alone, at the empirical threshold."""
    draw_in, draw_out, truth = DETECTIONS["weak"]
    runs = 300

    def naive():
        threshold = np.sort(draw_out(rng, 1000))[-11]
        low, high = clopper_pearson((draw_in(rng, 1000) > threshold).sum(), 1000)
        return float(low), float(high)

    assert misses(naive, truth(0.01), runs) > most_misses(runs)


def test_tpr_interval_has_power(rng):
    """A strong attack is told from chance, and the interval narrows with n."""
    draw_in, draw_out, _ = DETECTIONS["strong"]
    small = tpr_at_fpr(*labelled(draw_in(rng, 500), draw_out(rng, 1000)), 0.01)
    large = tpr_at_fpr(*labelled(draw_in(rng, 50_000), draw_out(rng, 100_000)), 0.01)
    assert small.interval.low > 0.3
    assert large.interval.width < small.interval.width / 5


# Bands

GRID = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98])


@pytest.mark.parametrize("law", ["null", "strong", "ties"])
def test_every_point_of_the_pointwise_band_covers(rng, law):
    draw_in, draw_out, truth = DETECTIONS[law]
    truth_G = np.array([truth(f) for f in GRID])
    runs, missed_G = 400, np.zeros(GRID.size)
    for _ in range(runs):
        band = pointwise_band(*labelled(draw_in(rng, 300), draw_out(rng, 600)), GRID)
        missed_G += (truth_G < np.array(band.low)) | (truth_G > np.array(band.high))
    assert missed_G.max() <= most_misses(runs)


DENSE = np.linspace(0.005, 0.995, 199)


@pytest.mark.parametrize("name", ["null", "weak", "strong", "ties"])
def test_the_simultaneous_band_holds_the_whole_curve(rng, name):
    missed = _curves_missed(rng, DETECTIONS[name], simultaneous_band, runs=400)
    assert missed <= most_misses(400)


def test_a_pointwise_band_taken_for_simultaneous_is_caught(rng):
    """Pointwise limits at 80%, which cover each point in 95%, lose the whole curve more often."""
    draw_in, draw_out, truth = DETECTIONS["weak"]

    def eighty(scores, member, fpr):
        return pointwise_band(scores, member, fpr, 0.8)

    truth_G, points = np.array([truth(f) for f in DENSE]), np.zeros(DENSE.size)
    for _ in range(100):
        band = eighty(*labelled(draw_in(rng, 3000), draw_out(rng, 3000)), DENSE)
        points += (truth_G < band.low) | (truth_G > np.array(band.high))
    assert points.mean() < 100 * 0.08
    assert _curves_missed(rng, DETECTIONS["weak"], eighty, runs=200) > most_misses(200)


def _curves_missed(rng, law, band_of, runs):
    draw_in, draw_out, truth = law
    truth_G = np.array([truth(f) for f in DENSE])
    missed = 0
    for _ in range(runs):
        band = band_of(*labelled(draw_in(rng, 3000), draw_out(rng, 3000)), DENSE)
        missed += bool(((truth_G < band.low) | (truth_G > np.array(band.high))).any())
    return missed


# Permutation


@pytest.mark.parametrize("statistic", [Auc(), TprAtFpr(0.1)], ids=lambda s: s.name)
@pytest.mark.parametrize("levels", [3, 10**9], ids=["ties", "continuous"])
def test_permutation_p_values_are_valid_under_the_null(rng, statistic, levels):
    runs, p_values, outside = 600, [], 0
    for _ in range(runs):
        scores = rng.integers(0, levels, 220).astype(float)
        member = rng.permutation(220) < 110
        control = permutation_control(scores, member, statistic, 39, rng)
        p_values.append(control.p_value)
        outside += control.observed not in control.null_band
    for level in (0.025, 0.05, 0.2, 0.5):
        assert (np.array(p_values) <= level).sum() <= most_misses(runs, level)
    assert outside <= most_misses(runs)


def test_a_p_value_without_the_added_one_is_caught(rng):
    runs, level, rejected = 4000, 1 / 39, 0
    for _ in range(runs):
        scores = rng.normal(size=60)
        member = rng.permutation(60) < 30
        p = permutation_control(scores, member, Auc(), 39, rng).p_value
        rejected += (p * 40 - 1) / 39 <= level + 1e-12
    assert rejected > most_misses(runs, level)


# Exposure


@pytest.mark.parametrize("rank", [1, 20, 1000, 40_000])
def test_exposure_interval_covers(rng, rank):
    space, runs = 2**16, 600
    truth = math.log2(space) - math.log2(rank)
    others = np.delete(np.arange(space, 0.0, -1.0), rank - 1)  # a score for every other candidate

    def interval():
        sample = others[rng.integers(0, others.size, 2000)]
        return limits(exposure_by_sample(space + 1.0 - rank, sample, space))

    assert misses(interval, truth + 0.0, runs) <= most_misses(runs)


def test_an_exposure_interval_by_the_normal_law_is_caught(rng):
    """Rank 66 of 65,536 shows about twice in 2,000: a normal interval is lost there."""
    runs, share = 600, 66 / 65_536

    def wald():
        seen = rng.binomial(2000, share) / 2000
        half = 1.96 * math.sqrt(seen * (1 - seen) / 2000)
        return seen - half, seen + half

    assert misses(wald, share, runs) > most_misses(runs)


# Means


MEANS = {
    "normal, 5": (lambda g: g.normal(size=5), 0.0),
    "normal, 30": (lambda g: g.normal(size=30), 0.0),
    "heavy tails, 20": (lambda g: g.standard_t(3, 20), 0.0),
    "gamma 4, 20": (lambda g: g.gamma(4, size=20), 4.0),
    "exponential, 20": (lambda g: g.exponential(size=20), 1.0),
    "log-normal, 100": (lambda g: g.lognormal(size=100), math.exp(0.5)),
}


@pytest.mark.parametrize("law", MEANS.values(), ids=MEANS)
def test_mean_interval_covers(rng, law):
    draw, truth = law
    runs = 2000
    assert misses(lambda: limits(mean_estimate(draw(rng))), truth, runs) <= most_misses(runs)


def test_means_with_a_normal_quantile_or_of_skewed_laws_with_students_are_caught(rng):
    runs = 2000

    def interval(draw, quantile):
        values = draw(rng)
        half = quantile(values.size) * values.std(ddof=1) / math.sqrt(values.size)
        return values.mean() - half, values.mean() + half

    draw, truth = MEANS["normal, 5"]
    assert misses(lambda: interval(draw, lambda n: 1.96), truth, runs) > most_misses(runs)
    draw, truth = MEANS["exponential, 20"]
    student_quantile = lambda n: stats.t.ppf(0.975, n - 1)  # noqa: E731
    assert misses(lambda: interval(draw, student_quantile), truth, runs) > most_misses(runs)


def _document_tokens(g):
    """30 documents of 20 to 200 tokens that share a topic: token losses correlate within."""
    lengths = g.integers(20, 201, 30)
    document = np.repeat(np.arange(30), lengths)
    return 3.0 + 0.5 * g.normal(size=30)[document] + g.exponential(size=document.size) - 1, document


def test_clustered_mean_covers_and_tokens_taken_as_independent_do_not(rng):
    runs = 600

    def clustered():
        values, document = _document_tokens(rng)
        return limits(mean_estimate(values, clusters=document))

    def independent():
        return limits(mean_estimate(_document_tokens(rng)[0]))

    assert misses(clustered, 3.0, runs) <= most_misses(runs)
    assert misses(independent, 3.0, runs) > most_misses(runs)


def test_ratio_interval_covers(rng):
    """Bits over bytes where long documents are cheaper a byte."""
    runs = 1500

    def interval():
        sizes = rng.gamma(3, 300, size=40)
        bits = 2 * sizes + 300 + 80 * rng.normal(size=40)
        return limits(ratio_estimate(bits, sizes))

    assert misses(interval, 2 + 300 / 900, runs) <= most_misses(runs)
