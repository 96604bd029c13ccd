"""Exact intervals for rates, and p-values that stay honest when there are several."""

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from attacks.statistics.results import (
    Estimate,
    Floats,
    Interval,
    checked_confidence,
    checked_numbers,
)


def clopper_pearson(
    successes: npt.ArrayLike, trials: npt.ArrayLike, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """The exact two-sided interval for a binomial rate, equal tails.

    low solves P[Bin(n, low) >= k] = (1 - confidence)/2 and high solves
    P[Bin(n, high) <= k] = (1 - confidence)/2; low is exactly 0 at k = 0 and high exactly 1 at
    k = n (Clopper & Pearson 1934, Biometrika 26). Covers with at least `confidence` for every
    rate and n.

    successes, trials: integers of any shapes that broadcast, 0 <= successes <= trials, trials >= 1.
    Returns (low, high), float64 of the broadcast shape. Raises ValueError.
    """
    tail = (1.0 - checked_confidence(confidence)) / 2.0
    k, n = np.broadcast_arrays(_whole(successes, "successes"), _whole(trials, "trials"))
    if (n < 1).any():
        raise ValueError(f"trials must be at least 1, got {n.min():.0f}")
    if (k < 0).any() or (k > n).any():
        raise ValueError("successes must lie between 0 and trials")
    low = np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, tail), 0.0)
    high = np.where(k < n, special.betainccinv(k + 1, np.maximum(n - k, 1), tail), 1.0)
    return low, high


def rate(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """The rate successes / trials with its Clopper-Pearson interval. Raises ValueError."""
    low, high = clopper_pearson(successes, trials, confidence)
    interval = Interval(float(low), float(high), confidence)
    return Estimate(successes / trials, interval, int(trials), "Clopper-Pearson")


def bonferroni(p_values: npt.ArrayLike) -> Floats:
    """Adjusted p-values min(1, K p): any below a level is significant with all K errors shared.

    p_values: shape (K,), each in [0, 1]. Needs no independence. Raises ValueError.
    """
    p_K = _checked_p_values(p_values)
    return np.minimum(1.0, p_K * p_K.size)


def holm(p_values: npt.ArrayLike) -> Floats:
    """Step-down adjusted p-values, never larger than Bonferroni's (Holm 1979, Scand. J. Stat. 6).

    With p sorted upwards, adjusted_(i) = max_{j <= i} min(1, (K - j + 1) p_(j)). Rejecting those
    at most a keeps the chance of one false rejection at most a; needs no independence.

    p_values: shape (K,), each in [0, 1]. Returned in the given order. Raises ValueError.
    """
    p_K = _checked_p_values(p_values)
    order_K = np.argsort(p_K, kind="stable")
    remaining_K = np.arange(p_K.size, 0, -1)
    stepped_K = np.minimum(1.0, np.maximum.accumulate(remaining_K * p_K[order_K]))
    adjusted_K = np.empty_like(p_K)
    adjusted_K[order_K] = stepped_K
    return adjusted_K


def simultaneous_confidence(confidence: float, statements: int) -> float:
    """The confidence each of several intervals needs for all to hold at once (Bonferroni)."""
    if statements < 1:
        raise ValueError(f"statements must be at least 1, got {statements}")
    return 1.0 - (1.0 - checked_confidence(confidence)) / statements


def _whole(numbers: npt.ArrayLike, name: str) -> Floats:
    as_floats = np.asarray(numbers, dtype=np.float64)
    if not (np.isfinite(as_floats).all() and (as_floats == np.floor(as_floats)).all()):
        raise ValueError(f"{name} must be whole numbers")
    return as_floats


def _checked_p_values(p_values: npt.ArrayLike) -> Floats:
    p_K = checked_numbers(p_values, "p_values")
    if p_K.size == 0 or p_K.min() < 0.0 or p_K.max() > 1.0:
        raise ValueError("p_values must be a non-empty sequence of numbers in [0, 1]")
    return p_K


def kullback_leibler(observed: float, rate: float) -> float:
    """KL(observed || rate) in nats between two coins; the exponent of Chernoff's bound."""
    return float(special.rel_entr(observed, rate) + special.rel_entr(1.0 - observed, 1.0 - rate))


def chernoff_interval(observed: float, n: int, confidence: float) -> Interval:
    """Every mean p of n independent variables in [0, 1] with n KL(observed || p) <= log(2/alpha).

    P[mean >= p + t] <= exp(-n KL(p + t || p)) (Hoeffding 1963, JASA 58, theorem 1); the same
    bound holds for a two-sample U-statistic with n the smaller sample (section 5b).
    """
    exponent = math.log(2.0 / (1.0 - checked_confidence(confidence))) / n

    def furthest(limit: float) -> float:
        inside, outside = observed, limit
        for _ in range(60):
            middle = (inside + outside) / 2.0
            if kullback_leibler(observed, middle) <= exponent:
                inside = middle
            else:
                outside = middle
        return outside

    return Interval(furthest(0.0), furthest(1.0), confidence)


def bounded_mean(values: npt.ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of independent values in [0, 1], such as each text's share of recovered tokens.

    The interval is `chernoff_interval`: it covers whatever the law of the values, so what happens
    inside one value, such as between the tokens of one text, needs no independence. Never of width
    zero, unlike Student's where all values are alike.

    values: shape (N,), N >= 1. Raises ValueError.
    """
    values_N = checked_numbers(values, "values")
    if values_N.size == 0 or values_N.min() < 0.0 or values_N.max() > 1.0:
        raise ValueError("values must be a non-empty sequence of numbers in [0, 1]")
    mean = float(np.clip(values_N.mean(), 0.0, 1.0))
    interval = chernoff_interval(mean, values_N.size, confidence)
    return Estimate(mean, interval, int(values_N.size), "Chernoff-Hoeffding")
