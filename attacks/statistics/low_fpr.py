"""True positive rates at a fixed false positive rate, and bands for whole ROC curves.

The quantity of interest belongs to the population, not to the sample: with f given,

    TPR(f) = sup { P[in-score in A] : A = {s >= t} or {s > t} for some t, P[out-score in A] <= f },

the detection rate at the threshold whose *true* false positive rate is f. The sample knows that
threshold only roughly, and an interval that forgets this is too short: at n_out f = 10 the
threshold picked from the sample has a true rate anywhere between about f/2 and 2f.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from attacks.statistics.rates import clopper_pearson
from attacks.statistics.results import (
    Estimate,
    Floats,
    Interval,
    checked_confidence,
    checked_rate,
    split_scores,
)

MINIMUM_EXPECTED_FALSE_POSITIVES = 10


class TooFewNonMembers(ValueError):
    """A false positive rate resting on fewer than ten out-scores would be a guess, not a rate."""


@dataclass(frozen=True, slots=True)
class RocBand:
    """An ROC curve between two others, on a grid of false positive rates.

    `kind` is "pointwise" (each point covers with `confidence`; the band as a whole does not) or
    "simultaneous" (the whole curve lies inside with `confidence`). G grid points.
    """

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    confidence: float
    kind: str
    method: str


def tpr_at_fpr(
    scores: npt.ArrayLike, member: npt.ArrayLike, fpr: float, confidence: float = 0.95
) -> Estimate:
    """TPR(fpr) with an interval valid for every pair of score laws and any ties.

    The value is the empirical TPR of the largest threshold set whose empirical FPR is at most
    fpr; records tied at the threshold are all left out, so ties never flatter the attack.

    With U_(k) the k-th highest of n out-scores, P[S_out > U_(k)] is at most a Beta(k, n + 1 - k)
    variable and P[S_out >= U_(k)] at least one (equality without ties). So with error a/4 each
    - {s > U_(k)} has FPR at most fpr for the largest k with P[Bin(n, fpr) < k] <= a/4,
    - {s >= U_(k)} has FPR above fpr for the smallest k with P[Bin(n, fpr) >= k] <= a/4,
    - and Clopper-Pearson one-sided bounds hold for the share of members in either set,
    where a = 1 - confidence: four statements, together wrong with probability at most a.
    (Order-statistic bounds for a quantile: David & Nagaraja, Order Statistics, section 7.1.)

    scores, member: shape (N,); fpr in (0, 1). `n` is N. Members and non-members are each taken as
    independent draws given the model. Raises ValueError, and TooFewNonMembers when
    n_out * fpr < 10.
    """
    checked_confidence(confidence)
    in_I, out_O = split_scores(scores, member)
    fpr_G = np.array([checked_rate(fpr, "fpr")])
    require_nonmembers(out_O.size, fpr)
    low_G, high_G = _tpr_limits(in_I, out_O, fpr_G, confidence)
    interval = Interval(float(low_G[0]), float(high_G[0]), confidence)
    value = float(_empirical_tpr(in_I, out_O, fpr_G)[0])
    return Estimate(value, interval, in_I.size + out_O.size, "order statistics, Clopper-Pearson")


def pointwise_band(
    scores: npt.ArrayLike,
    member: npt.ArrayLike,
    fpr: npt.ArrayLike | None = None,
    confidence: float = 0.95,
) -> RocBand:
    """The interval of `tpr_at_fpr` at every rate of a grid, for drawing on log-log axes.

    Pointwise: read it one vertical at a time. `simultaneous_band` speaks of the whole curve.

    scores, member: shape (N,). fpr: shape (G,), in (0, 1); 100 points evenly spaced on the log
    axis from 10/n_out to 0.99 if not given. Raises ValueError, and TooFewNonMembers for a grid
    that starts below 10/n_out.
    """
    checked_confidence(confidence)
    in_I, out_O = split_scores(scores, member)
    fpr_G = _grid(out_O.size) if fpr is None else _checked_grid(fpr)
    require_nonmembers(out_O.size, float(fpr_G.min()))
    low_G, high_G = _tpr_limits(in_I, out_O, fpr_G, confidence)
    return _band(
        (fpr_G, _empirical_tpr(in_I, out_O, fpr_G), low_G, high_G),
        confidence,
        ("pointwise", "order statistics, Clopper-Pearson"),
    )


def simultaneous_band(
    scores: npt.ArrayLike,
    member: npt.ArrayLike,
    fpr: npt.ArrayLike | None = None,
    confidence: float = 0.95,
) -> RocBand:
    """A band that holds the whole population ROC curve with the stated confidence.

    Both empirical distribution functions lie within e = sqrt(log(2/(a/2))/(2n)) of the truth
    everywhere, with probability 1 - a/2 each (Dvoretzky, Kiefer & Wolfowitz 1956 with Massart's
    1990 constant), so TPR(f) lies between the empirical curve at f - e_out, less e_in, and the
    empirical curve at f + e_out, plus e_in. Below f = e_out its lower edge is 0: for one low rate
    named in advance `tpr_at_fpr` says more.

    scores, member: shape (N,). fpr: shape (G,), in (0, 1), or None for the default grid of
    `pointwise_band`. Raises ValueError.
    """
    alpha = 1.0 - checked_confidence(confidence)
    in_I, out_O = split_scores(scores, member)
    fpr_G = _grid(out_O.size) if fpr is None else _checked_grid(fpr)
    slack_in, slack_out = (
        float(np.sqrt(np.log(4.0 / alpha) / (2.0 * n))) for n in (in_I.size, out_O.size)
    )
    # {s > U_(k)} with k - 1 out-scores above: FPR at most (k - 1)/n + slack, at least k/n - slack
    # once the tied records at U_(k) are counted in.
    inner_G = np.floor(out_O.size * (fpr_G - slack_out)).astype(np.int64)
    outer_G = np.floor(out_O.size * (fpr_G + slack_out)).astype(np.int64) + 1
    low_G = _share_above(in_I, out_O, inner_G + 1) - slack_in
    high_G = _share_from(in_I, out_O, outer_G) + slack_in
    low_G = np.where(inner_G >= 0, np.clip(low_G, 0.0, 1.0), 0.0)
    return _band(
        (fpr_G, _empirical_tpr(in_I, out_O, fpr_G), low_G, np.clip(high_G, 0.0, 1.0)),
        confidence,
        ("simultaneous", "Dvoretzky-Kiefer-Wolfowitz-Massart"),
    )


def _tpr_limits(
    in_I: Floats, out_O: Floats, fpr_G: Floats, confidence: float
) -> tuple[Floats, Floats]:
    alpha = 1.0 - confidence
    inner_G = np.asarray(stats.binom.ppf(alpha / 4.0, out_O.size, fpr_G), dtype=np.int64)
    outer_G = np.asarray(stats.binom.isf(alpha / 4.0, out_O.size, fpr_G), dtype=np.int64) + 1
    inner_hits_G = np.rint(_share_above(in_I, out_O, inner_G) * in_I.size)
    outer_hits_G = np.rint(_share_from(in_I, out_O, outer_G) * in_I.size)
    # Clopper-Pearson at 1 - alpha/2 leaves alpha/4 on each side.
    low_G, _ = clopper_pearson(inner_hits_G, in_I.size, 1.0 - alpha / 2.0)
    _, high_G = clopper_pearson(outer_hits_G, in_I.size, 1.0 - alpha / 2.0)
    return np.where(inner_G >= 1, low_G, 0.0), high_G


def _empirical_tpr(in_I: Floats, out_O: Floats, fpr_G: Floats) -> Floats:
    allowed_G = np.floor(out_O.size * fpr_G + 1e-9).astype(np.int64)
    return _share_above(in_I, out_O, allowed_G + 1)


def _share_above(in_I: Floats, out_O: Floats, rank_G: npt.NDArray[np.int64]) -> Floats:
    """Share of members strictly above the rank-th highest out-score (or the lowest, past it)."""
    place_G = np.clip(out_O.size - rank_G, 0, out_O.size - 1)
    above_G = in_I.size - np.searchsorted(in_I, out_O[place_G], "right")
    return np.asarray(above_G / in_I.size, dtype=np.float64)


def _share_from(in_I: Floats, out_O: Floats, rank_G: npt.NDArray[np.int64]) -> Floats:
    """Share of members at or above the rank-th highest out-score; all of them past the last."""
    place_G = np.clip(out_O.size - rank_G, 0, out_O.size - 1)
    above_G = in_I.size - np.searchsorted(in_I, out_O[place_G], "left")
    return np.where(rank_G > out_O.size, 1.0, above_G / in_I.size)


def require_nonmembers(n_out: int, fpr: float) -> None:
    """Raise TooFewNonMembers unless n_out * fpr >= 10."""
    if n_out * fpr < MINIMUM_EXPECTED_FALSE_POSITIVES - 1e-9:
        needed = int(np.ceil(MINIMUM_EXPECTED_FALSE_POSITIVES / fpr - 1e-9))
        raise TooFewNonMembers(
            f"a true positive rate at FPR {fpr:g} needs at least {needed} non-members "
            f"(n_out * fpr >= {MINIMUM_EXPECTED_FALSE_POSITIVES}), got {n_out}"
        )


def _grid(n_out: int) -> Floats:
    start = MINIMUM_EXPECTED_FALSE_POSITIVES / n_out
    if start >= 0.99:
        raise TooFewNonMembers(f"an ROC band needs more than 10 non-members, got {n_out}")
    return np.geomspace(start, 0.99, 100)


def _checked_grid(fpr: npt.ArrayLike) -> Floats:
    fpr_G = np.asarray(fpr, dtype=np.float64)
    if fpr_G.ndim != 1 or fpr_G.size == 0 or not ((fpr_G > 0.0) & (fpr_G < 1.0)).all():
        raise ValueError("fpr must be a non-empty sequence of rates in (0, 1)")
    return fpr_G


def _band(
    columns: tuple[Floats, Floats, Floats, Floats], confidence: float, label: tuple[str, str]
) -> RocBand:
    fpr, tpr, low, high = (tuple(column.tolist()) for column in columns)
    return RocBand(fpr, tpr, low, high, confidence, *label)
