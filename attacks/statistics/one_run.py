"""Lower bounds on epsilon from a single training run with many canaries.

Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run" (NeurIPS 36),
theorem 5.2 and appendix D. The setting, every part of which the bound rests on:

1. Each of m canaries is included by its own fair coin. A fixed half, coins shared between
   canaries, or a hold-out chosen by date void the bound.
2. The audited mechanism sees the included canaries; the guesses are a function of its output
   alone (and of randomness independent of the coins). Scores may use the released model and the
   canaries, never the coins.
3. r, the number of guesses, is fixed before the scores are seen; *which* canaries are guessed, and
   how the r split into "in" and "out", may depend on the scores in any way. (For delta = 0 the
   proof is conditional on the guesses, so r itself may depend on them; for delta > 0 a free r could
   be made to follow the rare delta-events. These functions hold r fixed throughout.)

Under (epsilon, delta)-DP, given the guesses and the coins of the other canaries, each guess is
right with probability at most q = e^epsilon/(1 + e^epsilon), but for delta-events that make up to i
guesses right and cost 2 m delta/i at most. Hence, v being the number of right guesses,

    P[at least v right] <= beta + 2 m delta alpha,     beta = P[Bin(r, q) >= v],
    alpha = max_{1 <= i <= m} P[v - i <= Bin(r, q) < v] / i.

What is bounded: the epsilon, at this delta, of the relation between data sets that one coin flips.
With canaries included or left out that is add/remove of one canary, the paper's own relation. A
mechanism accounted under replace-one is compared fairly only if each coin swaps one canary for
another; between the two, epsilon_replace <= 2 epsilon_add/remove for delta = 0. If the unit of
privacy is a user, a canary must be a whole user.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

from attacks.statistics.results import (
    Bools,
    Floats,
    checked_confidence,
    checked_delta,
    checked_mask,
    checked_numbers,
)

DEFAULT_GUESS_FRACTIONS = (0.85, 0.25, 0.07)
"""Shares of the canaries guessed at: few enough that Bonferroni costs little, spread enough to come
within a tenth or so of the best single share for Gaussian mechanisms of mu 1 to 3 and m 100 to 10^4
(simulated). The largest stops short of 1 because the number of members varies: with half guessed
"in" even a perfect attack on all m would miss about 0.4 sqrt(m)."""

MOST_CANARIES = 10**8
"""Where `canaries_needed` gives up."""

_TIE_SEED = 7_919


@dataclass(frozen=True, slots=True)
class OneRunBound:
    """The mechanism is not (e, delta)-DP for any e < epsilon, with the stated confidence.

    epsilon: the best lower bound among `tried` guess rules, corrected for their number.
    guesses, correct: r and v of that rule; guessed_in of the r were "in".
    ceiling: what a perfect attack would have reached with m canaries under the same correction.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    guessed_in: int
    correct: int
    tried: int
    ceiling: float


def one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """min(1, beta + 2 m delta alpha): the p-value of v right guesses under (epsilon, delta)-DP.

    m canaries, r guesses, v of them right. Raises ValueError.
    """
    _check_counts(m, r, v)
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    return _p_value(m, r, v, float(epsilon), checked_delta(delta))


def one_run_epsilon(m: int, r: int, v: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon rejected at level 1 - confidence by v right guesses out of r.

    A lower bound on the epsilon of the audited mechanism at this delta, valid for an r fixed
    beforehand and one look; 0 if even epsilon = 0 cannot be rejected. Found by bisection to 1e-9,
    rounded down. See the module's text for the conditions.

    m canaries, 1 <= r <= m guesses, 0 <= v <= r right. Raises ValueError.
    """
    _check_counts(m, r, v)
    return _largest_rejected(
        int(m), int(r), int(v), checked_delta(delta), 1.0 - checked_confidence(confidence)
    )


def one_run_ceiling(m: int, r: int, delta: float, confidence: float = 0.95) -> float:
    """The bound a perfect attack reaches, r right of r: what m canaries can certify at most.

    Always print it beside a bound: an epsilon above it cannot be seen by the audit at all.
    Raises ValueError.
    """
    return one_run_epsilon(m, r, r, delta, confidence)


def canaries_needed(epsilon: float, delta: float, confidence: float = 0.95) -> int:
    """The smallest m for which a perfect attack on all m canaries is bounded above `epsilon`.

    With fewer, an audit could not contradict a claim of (epsilon, delta) whatever the leak. It is
    the floor for one guess rule with r = m; `one_run_audit` pays for several and reports its own,
    lower ceiling.
    For delta > 0 the ceiling levels off near log((1 - confidence)/(2 delta)). Raises ValueError
    beyond it, naming the reach, and for arguments out of range.
    """
    checked_confidence(confidence)
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ValueError(f"epsilon must be finite and at least 0, got {epsilon}")
    delta, alpha = checked_delta(delta), 1.0 - confidence

    def contradicts(m: int) -> bool:
        return _p_value(m, m, m, epsilon, delta) < alpha

    few, enough = 0, 1
    while not contradicts(enough):
        if enough == MOST_CANARIES:
            reach = one_run_ceiling(enough, enough, delta, confidence)
            raise ValueError(
                f"no audit of up to {enough:,} canaries can bound epsilon above {epsilon:g} at "
                f"delta {delta:g}: a perfect attack reaches {reach:.2f}"
            )
        few, enough = enough, min(2 * enough, MOST_CANARIES)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if contradicts(middle) else (middle, enough)
    return enough


def one_run_audit(
    scores: npt.ArrayLike,
    member: npt.ArrayLike,
    delta: float,
    confidence: float = 0.95,
    *,
    guess_fractions: Sequence[float] = DEFAULT_GUESS_FRACTIONS,
    in_only_fractions: Sequence[float] = (),
    tie_rng: np.random.Generator | None = None,
) -> OneRunBound:
    """The best one-run bound over guess rules declared beforehand, with Bonferroni's correction.

    A fraction f of `guess_fractions` guesses r = f m canaries: the r/2 highest scores "in" and the
    r/2 lowest "out". A fraction of `in_only_fractions` guesses the f m highest "in" and nothing
    "out": stronger where only high scores tell. K distinct rules in all, each tested at level
    (1 - confidence)/K; the ceiling is that of a perfect attack under the same K. The rules must be
    chosen before the scores are seen: choosing them after voids the confidence.

    Records tied at a cut are taken in a pseudo-random order that is the same for every call and
    knows nothing of `member` (not in the order given, which often lists members first), or in an
    order drawn from `tie_rng`.

    scores: shape (m,), higher means more likely in. member: shape (m,), the coins. Raises
    ValueError.
    """
    scores_M = checked_numbers(scores, "scores")
    member_M = checked_mask(member, scores_M.size)
    delta, alpha = checked_delta(delta), 1.0 - checked_confidence(confidence)
    rules = _guess_rules(scores_M.size, guess_fractions, in_only_fractions)
    hits_M = np.cumsum(_ranked_members(scores_M, member_M, tie_rng), dtype=np.int64)
    bounds = [
        (_largest_rejected(scores_M.size, top + low, v, delta, alpha / len(rules)), top, low, v)
        for top, low in rules
        for v in (_right_guesses(hits_M, top, low),)
    ]
    epsilon, top, low, correct = max(bounds)
    ceiling = max(
        _largest_rejected(scores_M.size, top + low, top + low, delta, alpha / len(rules))
        for top, low in rules
    )
    return OneRunBound(
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        canaries=scores_M.size,
        guesses=top + low,
        guessed_in=top,
        correct=correct,
        tried=len(rules),
        ceiling=ceiling,
    )


def _check_counts(m: int, r: int, v: int) -> None:
    if not 1 <= r <= m:
        raise ValueError(f"guesses r must lie between 1 and the m = {m} canaries, got {r}")
    if not 0 <= v <= r:
        raise ValueError(f"right guesses v must lie between 0 and r = {r}, got {v}")


@lru_cache(maxsize=65_536)
def _largest_rejected(m: int, r: int, v: int, delta: float, alpha: float) -> float:
    if v == 0:
        return 0.0
    # beta alone is rejected below the one-sided Clopper-Pearson bound on q; delta only lowers it.
    q = float(special.betaincinv(v, r - v + 1, alpha))
    wrong = float(special.betainccinv(r - v + 1, v, alpha))
    enough = math.log(q / wrong) if q > 0.0 else 0.0
    if enough <= 0.0 or delta == 0.0:
        return max(0.0, enough)
    if _p_value(m, r, v, 0.0, delta) > alpha:
        return 0.0
    rejected = 0.0
    while enough - rejected > 1e-9:
        middle = (rejected + enough) / 2.0
        if _p_value(m, r, v, middle, delta) <= alpha:
            rejected = middle
        else:
            enough = middle
    return rejected


def _p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    q = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(special.betainc(v, r - v + 1, q)) if v > 0 else 1.0
    if delta == 0.0 or v == 0:
        return beta
    return min(1.0, beta + 2.0 * m * delta * _steepest_gain(r, v, epsilon))


def _steepest_gain(r: int, v: int, epsilon: float) -> float:
    """The alpha of theorem 5.2, max_i P[v - i <= Bin(r, q) < v]/i.

    It is the best running mean of the masses from v - 1 downwards. These rise and then fall, so
    the running mean peaks before the walk leaves the bulk of the distribution. Beyond 12 standard
    deviations and 12 counts of the mean lies less than 1e-12 (Bernstein), which is left out.
    """
    log_right = -math.log1p(math.exp(-epsilon))
    log_wrong = log_right - epsilon
    mean = r * math.exp(log_right)
    reach = 12.0 * math.sqrt(mean * math.exp(log_wrong)) + 12.0
    highest = min(v - 1, math.ceil(mean + reach))
    lowest = max(0, min(highest, math.floor(mean - reach)))
    counts_K = np.arange(highest, lowest - 1, -1, dtype=np.float64)
    log_choices_K = (
        special.gammaln(r + 1.0)
        - special.gammaln(counts_K + 1.0)
        - special.gammaln(r - counts_K + 1.0)
    )
    masses_K = np.exp(log_choices_K + counts_K * log_right + (r - counts_K) * log_wrong)
    return float((np.cumsum(masses_K) / (v - counts_K)).max())


def _guess_rules(
    m: int, guess_fractions: Sequence[float], in_only_fractions: Sequence[float]
) -> list[tuple[int, int]]:
    """(how many highest are "in", how many lowest are "out"), distinct, a function of m alone."""
    for fraction in (*guess_fractions, *in_only_fractions):
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"a guess fraction must lie in (0, 1], got {fraction}")
    both = [max(1, round(fraction * m)) for fraction in guess_fractions]
    in_only = [max(1, round(fraction * m)) for fraction in in_only_fractions]
    rules = dict.fromkeys([((r + 1) // 2, r // 2) for r in both] + [(r, 0) for r in in_only])
    if not rules:
        raise ValueError("at least one guess fraction is needed")
    return list(rules)


def _ranked_members(
    scores_M: Floats, member_M: Bools, tie_rng: np.random.Generator | None
) -> Bools:
    rng = np.random.default_rng(_TIE_SEED) if tie_rng is None else tie_rng
    shuffled_M = rng.permutation(scores_M.size)
    order_M = shuffled_M[np.argsort(-scores_M[shuffled_M], kind="stable")]
    return member_M[order_M]


def _right_guesses(hits_M: npt.NDArray[np.int64], top: int, low: int) -> int:
    """Members among the `top` highest plus non-members among the `low` lowest."""
    m = hits_M.size
    members_below = int(hits_M[-1]) - (int(hits_M[m - low - 1]) if low < m else 0)
    return int(hits_M[top - 1]) + low - members_below
