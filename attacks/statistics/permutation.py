"""Label permutation: what an attack would score if the labels meant nothing.

Shuffling the labels over the same scores keeps the ties, the class sizes and the statistic, and
breaks only the link that membership could have made. N records, I members, P permutations.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from attacks.statistics.low_fpr import require_nonmembers
from attacks.statistics.results import (
    Interval,
    checked_mask,
    checked_numbers,
    checked_rate,
)

Indices = npt.NDArray[np.intp]


class RankStatistic(Protocol):
    """A number computed from which places in the ranking (highest score first) members hold."""

    @property
    def name(self) -> str:
        """How the statistic is called in a report."""
        ...

    def of(self, places: Indices, ranking: "Ranking") -> float:
        """The statistic when members hold the ascending `places` (I,) of the ranking."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Records sorted by falling score, and for each place (N,) the run of ties it belongs to.

    ties_begin[k] is the first place of the run of place k; doubled_middles[k] that place plus one
    past the run's last, which is twice the run's middle.
    """

    ties_begin: Indices
    doubled_middles: Indices

    @classmethod
    def of(cls, sorted_scores: npt.NDArray[np.float64]) -> "Ranking":
        """The runs of ties of scores (N,) sorted downwards."""
        starts = np.flatnonzero(np.append(True, sorted_scores[1:] != sorted_scores[:-1]))
        lengths = np.diff(np.append(starts, sorted_scores.size))
        return cls(np.repeat(starts, lengths), np.repeat(2 * starts + lengths, lengths))


@dataclass(frozen=True, slots=True)
class Auc:
    """The area under the ROC curve through the rank sum (Mann & Whitney 1947), ties as half."""

    name: str = "AUC"

    def of(self, places: Indices, ranking: Ranking) -> float:
        """See `RankStatistic.of`."""
        n, n_in = ranking.ties_begin.size, places.size
        # How many records each member stands above, itself and ties as half.
        wins_over_all = n * n_in - int(ranking.doubled_middles[places].sum()) / 2.0
        return (wins_over_all - n_in * n_in / 2.0) / (n_in * (n - n_in))


@dataclass(frozen=True, slots=True)
class TprAtFpr:
    """The empirical TPR of the largest threshold set with empirical FPR at most `fpr`."""

    fpr: float

    def __post_init__(self) -> None:
        checked_rate(self.fpr, "fpr")

    @property
    def name(self) -> str:
        """See `RankStatistic.name`."""
        return f"TPR at FPR {self.fpr:g}"

    def of(self, places: Indices, ranking: Ranking) -> float:
        """See `RankStatistic.of`."""
        n, n_in = ranking.ties_begin.size, places.size
        require_nonmembers(n - n_in, self.fpr)
        allowed = min(n - n_in - 1, int(np.floor((n - n_in) * self.fpr + 1e-9)))
        # places[j] - j non-members precede the j-th member: find the non-member past the allowance.
        members_before = int(np.searchsorted(places - np.arange(n_in), allowed, "right"))
        first_excluded = ranking.ties_begin[allowed + members_before]
        return int(np.searchsorted(places, first_excluded)) / n_in


@dataclass(frozen=True, slots=True)
class PermutationControl:
    """A statistic beside its distribution under shuffled labels.

    null_band holds 95% of shuffles at least; p_value is one-sided (as high or higher).
    """

    statistic: str
    observed: float
    null_mean: float
    null_band: Interval
    p_value: float
    permutations: int


def permutation_control(
    scores: npt.ArrayLike,
    member: npt.ArrayLike,
    statistic: RankStatistic,
    permutations: int,
    rng: np.random.Generator,
) -> PermutationControl:
    """Shuffle the labels and compare: an exact test that scores and membership are unrelated.

    p = (1 + #{null >= observed})/(1 + P), so it is never 0 and P[p <= a] <= a for every a when the
    labels are exchangeable (Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9). The band runs
    between order statistics of the P null values with at most 2.5% of a further shuffle on each
    side.

    scores, member: shape (N,). permutations: at least 39, below which there is no such band.
    Raises ValueError, and TooFewNonMembers for a TPR at a rate that n_out cannot show.
    """
    if permutations < 39:
        raise ValueError(f"permutations must be at least 39 for a 95% band, got {permutations}")
    scores_N = checked_numbers(scores, "scores")
    member_N = checked_mask(member, scores_N.size)
    n_in = int(np.count_nonzero(member_N))
    order_N = np.argsort(-scores_N, kind="stable")
    ranking = Ranking.of(scores_N[order_N])
    observed = statistic.of(np.flatnonzero(member_N[order_N]), ranking)
    null_P = np.sort(
        [statistic.of(p, ranking) for p in _subsets(scores_N.size, n_in, permutations, rng)]
    )
    skipped = int(0.025 * (permutations + 1) + 1e-9)
    return PermutationControl(
        statistic=statistic.name,
        observed=observed,
        null_mean=float(null_P.mean()),
        null_band=Interval(float(null_P[skipped - 1]), float(null_P[-skipped]), 0.95),
        p_value=float(1 + np.count_nonzero(null_P >= observed - 1e-12)) / (permutations + 1),
        permutations=permutations,
    )


def _subsets(n: int, size: int, count: int, rng: np.random.Generator) -> Iterator[Indices]:
    """`count` uniform subsets of `size` of range(n), each ascending.

    Independent coins of any bias give a uniform subset of a random size; adding or removing a
    uniform few of it mends the size and keeps it uniform. Ten times faster than a shuffle.
    """
    bias = min(255, max(1, round(256 * size / n)))
    for _ in range(count):
        drawn = np.frombuffer(rng.bytes(n), dtype=np.uint8) < bias
        surplus = int(np.count_nonzero(drawn)) - size
        wrong_side = np.flatnonzero(drawn if surplus > 0 else ~drawn)
        drawn[rng.choice(wrong_side, abs(surplus), replace=False, shuffle=False)] = surplus < 0
        yield np.flatnonzero(drawn)
