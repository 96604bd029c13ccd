"""The ROC curve of a membership attack and the area under it.

Throughout, a higher score says "more likely a member"; `member` is the truth. N records, I of
them members, O not. Scores of members are taken as independent draws from one law and scores of
non-members from another, given the model under attack.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from attacks.statistics.rates import chernoff_interval
from attacks.statistics.results import (
    Estimate,
    Floats,
    Interval,
    checked_confidence,
    checked_mask,
    checked_numbers,
    split_scores,
)


@dataclass(frozen=True, slots=True, eq=False)
class RocCurve:
    """Rates when every record scoring at least `thresholds[k]` is called a member.

    thresholds_K descends over the distinct scores after a first +inf that calls nobody a member
    (it stands above even an infinite score), so the rates run from (0, 0) to (1, 1).
    """

    thresholds: Floats
    fpr: Floats
    tpr: Floats
    n_in: int
    n_out: int


def roc_curve(scores: npt.ArrayLike, member: npt.ArrayLike) -> RocCurve:
    """The empirical ROC with one point per distinct score, so tied records move together.

    scores, member: shape (N,). Infinite scores are ordered like any other.
    Raises ValueError for NaN (how many and where), for shapes that differ and for one class only.
    """
    scores_N = checked_numbers(scores, "scores")
    member_N = checked_mask(member, scores_N.size)
    order_N = np.argsort(-scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    last_of_tie = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
    true_positives = np.cumsum(member_N[order_N])[last_of_tie]
    false_positives = last_of_tie + 1 - true_positives
    n_in = int(true_positives[-1])
    n_out = scores_N.size - n_in
    return RocCurve(
        thresholds=np.concatenate(([np.inf], sorted_N[last_of_tie])),
        fpr=np.concatenate(([0.0], false_positives / n_out)),
        tpr=np.concatenate(([0.0], true_positives / n_in)),
        n_in=n_in,
        n_out=n_out,
    )


def auc(scores: npt.ArrayLike, member: npt.ArrayLike, confidence: float = 0.95) -> Estimate:
    """P[in > out] + P[in = out]/2 for a random member and non-member, with an interval.

    With DeLong's variance V (1988, Biometrics 44) the area A is as sure as a rate among
    A (1 - A)/V trials, and gets the Clopper-Pearson interval of such a rate (Korn & Graubard 1998,
    Survey Methodology 24): unlike a normal interval it holds close to 1, and V follows unequal
    variances and ties. A small sample may not show the rare misplaced record, and V collapses when
    the classes separate; so the interval is the hull of this one and of the same after adding one
    pseudo-record at either end of either class.
    It is no finite-sample theorem: its coverage is simulated in the tests, from 50 records a
    class, for equal and unequal variances, heavy tails, ties and rare outliers.
    `auc_distribution_free` is the theorem, about 1.5 times as wide.

    scores, member: shape (N,), at least two records a class. `n` is N. Raises ValueError.
    """
    checked_confidence(confidence)
    in_I, out_O = split_scores(scores, member)
    if min(in_I.size, out_O.size) < 2:
        raise ValueError("an interval for the AUC needs at least 2 members and 2 non-members")
    wins_I, wins_O = _placements(in_I, out_O)
    seen = _effective_clopper_pearson(wins_I, wins_O, confidence)
    unseen = _effective_clopper_pearson(*_with_pseudo_records(wins_I, wins_O), confidence)
    interval = Interval(min(seen[0], unseen[0]), max(seen[1], unseen[1]), confidence)
    method = "Clopper-Pearson at DeLong's effective size, with and without pseudo-records"
    return Estimate(float(wins_I.mean()), interval, in_I.size + out_O.size, method)


def auc_distribution_free(
    scores: npt.ArrayLike, member: npt.ArrayLike, confidence: float = 0.95
) -> Estimate:
    """The AUC with an interval that covers for every pair of laws and every sample size.

    Chernoff's bound for two-sample U-statistics (Hoeffding 1963, JASA 58, section 5b) with the
    smaller class as the sample size: every area p with min(I, O) KL(AUC || p) <= log(2/alpha).

    scores, member: shape (N,). `n` is N. Raises ValueError.
    """
    checked_confidence(confidence)
    in_I, out_O = split_scores(scores, member)
    area = float(_placements(in_I, out_O)[0].mean())
    interval = chernoff_interval(area, min(in_I.size, out_O.size), confidence)
    return Estimate(area, interval, in_I.size + out_O.size, "Chernoff-Hoeffding")


def _placements(in_I: Floats, out_O: Floats) -> tuple[Floats, Floats]:
    """The share of the other class that each record beats, ties as half (both sorted upwards)."""

    def below(values: Floats, others: Floats) -> Floats:
        pairs = np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")
        return np.asarray(pairs / (2.0 * others.size), dtype=np.float64)

    return below(in_I, out_O), 1.0 - below(out_O, in_I)


def _with_pseudo_records(wins_I: Floats, wins_O: Floats) -> tuple[Floats, Floats]:
    """Placements after adding one record above and one below all others to each class.

    The added records tie with one another, so a top member beats O + 1 of O + 2 and half of one.
    """
    return _with_ends(wins_I, wins_O.size), _with_ends(wins_O, wins_I.size)


def _with_ends(wins: Floats, others: int) -> Floats:
    ends = np.array([0.5, others + 1.5])
    return np.append(wins * others + 1.0, ends) / (others + 2.0)


def _effective_clopper_pearson(
    wins_I: Floats, wins_O: Floats, confidence: float
) -> tuple[float, float]:
    area = float(wins_I.mean())
    variance = float(wins_I.var(ddof=1) / wins_I.size + wins_O.var(ddof=1) / wins_O.size)
    if variance == 0.0:
        return area, area
    tail = (1.0 - confidence) / 2.0
    trials = area * (1.0 - area) / variance
    won, lost = area * trials, (1.0 - area) * trials
    low = float(special.betaincinv(won, lost + 1.0, tail))
    high = float(special.betainccinv(won + 1.0, lost, tail))
    return low, high
