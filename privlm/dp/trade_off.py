"""The trade-off curve of a composition: how well its best attack can do, at every false-alarm rate.

An attack that tells two neighbouring data sets apart with false positive rate α has a true positive
rate of at most δ(ε) + e^ε α for every ε (Kairouz et al. 2015), and the best attack reaches the
least of these bounds (Dong, Roth and Su 2019, proposition 6).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privlm.dp.accounting import DpEvent, Neighbours, deltas_of

_POINTS = 3000
_REACH = 100.0


def trade_off(
    event: DpEvent,
    false_positive_rates: NDArray[np.float64],
    neighbours: Neighbours = "add-or-remove-one",
) -> NDArray[np.float64]:
    """Highest true positive rate of any attack on ``event``, at each false positive rate.

    Holds for telling either data set from the other: it is the least concave curve above the
    exact curves of both directions, from above by the accountant's discretisation and by less
    than 10^-4 for the finite grid of ε.

    Args:
        event: what was released, composed; ``plan.event()``, say.
        false_positive_rates: in [0, 1], any shape.
        neighbours: which data sets are told apart.

    Raises:
        ValueError: a rate outside [0, 1], or an event that no accountant knows.
    """
    rates = np.asarray(false_positive_rates, dtype=np.float64)
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("false positive rates must lie in [0, 1]")
    epsilons = np.concatenate([[0.0], np.geomspace(1e-4, _REACH, _POINTS)])
    deltas = deltas_of(event, epsilons, neighbours)
    best = np.ones_like(rates)
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        np.minimum(best, delta + np.exp(epsilon) * rates, out=best)
        # The same bound on the other direction's errors: 1 − α ≤ δ + e^ε (1 − TPR).
        np.minimum(best, 1 - np.exp(-epsilon) * (1 - delta - rates), out=best)
    return best
