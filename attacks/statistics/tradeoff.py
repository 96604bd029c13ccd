"""What a privacy guarantee allows an attack: trade-off functions and the ROC curves they cap."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special

from attacks.statistics.results import Floats, checked_delta, checked_epsilon


def tradeoff_gaussian(mu: float) -> Callable[[npt.ArrayLike], Floats]:
    """The trade-off function G_mu of mu-GDP: the least false negative rate at each alpha.

    G_mu(alpha) = Phi(Phi^-1(1 - alpha) - mu) (Dong, Roth & Su 2022, definition 4 of Gaussian
    differential privacy). The ROC an attack cannot pass is 1 - G_mu(fpr).

    mu: at least 0. The returned function takes false positive rates in [0, 1] of any shape.
    Raises ValueError.
    """
    mu = _checked_mu(mu)

    def least_false_negative_rate(alpha: npt.ArrayLike) -> Floats:
        fpr = _checked_rates(alpha)
        return np.asarray(special.ndtr(-special.ndtri(fpr) - mu), dtype=np.float64)

    return least_false_negative_rate


def gdp_delta(mu: float, epsilon: float) -> float:
    """The delta at which mu-GDP is (epsilon, delta)-DP.

    delta = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Dong, Roth & Su 2022,
    corollary 1 on Gaussian mechanisms; Balle & Wang 2018, theorem 8). Raises ValueError.
    """
    mu, epsilon = _checked_mu(mu), checked_epsilon(epsilon)
    if mu == 0.0:
        return 0.0
    log_first = float(special.log_ndtr(mu / 2.0 - epsilon / mu))
    log_second = epsilon + float(special.log_ndtr(-mu / 2.0 - epsilon / mu))
    return max(0.0, -math.exp(log_first) * math.expm1(log_second - log_first))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The least epsilon for which mu-GDP is (epsilon, delta)-DP, rounded up by at most 1e-9.

    Solves `gdp_delta(mu, epsilon) = delta`; 0 when delta is already enough, infinite for
    delta = 0 with mu > 0. Raises ValueError.
    """
    mu, delta = _checked_mu(mu), checked_delta(delta)
    if mu == 0.0 or gdp_delta(mu, 0.0) <= delta:
        return 0.0
    if delta == 0.0:
        return math.inf
    short, enough = 0.0, 1.0
    while gdp_delta(mu, enough) > delta:
        short, enough = enough, 2.0 * enough
    while enough - short > 1e-9 * max(1.0, enough):
        middle = (short + enough) / 2.0
        short, enough = (middle, enough) if gdp_delta(mu, middle) > delta else (short, middle)
    return enough


def epsilon_delta_roc_ceiling(epsilon: float, delta: float, fpr: npt.ArrayLike) -> Floats:
    """The highest true positive rate any attack can have under (epsilon, delta)-DP.

    min(1, e^epsilon f + delta, 1 - e^-epsilon (1 - delta - f)) (Kairouz, Oh & Viswanath 2015,
    theorem 2.1), for one record whose presence is in question.

    fpr: false positive rates in [0, 1] of any shape. Raises ValueError.
    """
    epsilon, delta = checked_epsilon(epsilon), checked_delta(delta)
    f = _checked_rates(fpr)
    steep = np.exp(min(epsilon, 700.0)) * f + delta
    flat = 1.0 - math.exp(-epsilon) * (1.0 - delta - f)
    return np.asarray(np.clip(np.minimum(steep, flat), 0.0, 1.0), dtype=np.float64)


def _checked_mu(mu: float) -> float:
    if not (math.isfinite(mu) and mu >= 0.0):
        raise ValueError(f"mu must be finite and at least 0, got {mu}")
    return float(mu)


def _checked_rates(rates: npt.ArrayLike) -> Floats:
    values = np.asarray(rates, dtype=np.float64)
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("false positive rates must lie in [0, 1]")
    return values
