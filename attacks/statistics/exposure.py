"""Exposure of a canary: how far up the ranking of its own format it stands, in bits.

Carlini, Liu, Erlingsson, Kos & Song 2019, "The Secret Sharer" (USENIX Security), definition 2:
exposure = log2 |R| - log2 rank, where R is the space the canary was drawn from and rank 1 is the
candidate the model finds likeliest. Uniformly drawn and not memorised, a canary has more than b
bits with probability 2^-b. Scores: higher means more likely memorised; ties count against the
canary.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attacks.statistics.rates import clopper_pearson
from attacks.statistics.results import Interval, checked_confidence, checked_numbers


@dataclass(frozen=True, slots=True)
class Exposure:
    """Bits of exposure; `at_least` marks a value that the sample can only bound from below."""

    bits: float
    interval: Interval
    n: int
    at_least: bool
    method: str

    def __str__(self) -> str:
        return f"{'>= ' if self.at_least else ''}{self.bits:.2f} bits"


def exposure_by_ranking(canary_score: float, other_scores: npt.ArrayLike) -> Exposure:
    """Exposure from the scores of every other candidate: exact, so the interval is a point.

    other_scores: shape (|R| - 1,). Raises ValueError.
    """
    others_R = checked_numbers(other_scores, "other_scores")
    canary = _checked_canary(canary_score)
    rank = 1 + int(np.count_nonzero(others_R >= canary))
    bits = math.log2(others_R.size + 1) - math.log2(rank)
    return Exposure(bits, Interval(bits, bits, 1.0), others_R.size + 1, False, "full ranking")


def exposure_by_sample(
    canary_score: float,
    sample_scores: npt.ArrayLike,
    space_size: int,
    confidence: float = 0.95,
) -> Exposure:
    """Exposure from a random sample of the other candidates, with an interval in bits.

    With p the share of the other |R| - 1 candidates that score at least as high, rank is
    1 + p (|R| - 1); a Clopper-Pearson interval for p becomes one for
    log2 |R| - log2(1 + p (|R| - 1)), since that falls with p. When no sampled candidate reaches
    the canary, the sample supports only a lower bound: the value is then the interval's low end,
    marked `at_least`. (Carlini et al. fit a skew normal to go further; a tail beyond the sample is
    a guess, and none is made here.)

    sample_scores: shape (n,), drawn uniformly and independently from R without the canary.
    space_size: |R|, at least 2. Raises ValueError.
    """
    checked_confidence(confidence)
    sample_S = checked_numbers(sample_scores, "sample_scores")
    canary = _checked_canary(canary_score)
    if sample_S.size == 0:
        raise ValueError("sample_scores must not be empty")
    if space_size < 2:
        raise ValueError(f"space_size must be at least 2, got {space_size}")
    as_high = int(np.count_nonzero(sample_S >= canary))
    low, high = clopper_pearson(as_high, sample_S.size, confidence)

    def bits_at(share: float) -> float:
        return math.log2(space_size) - math.log2(1.0 + share * (space_size - 1))

    interval = Interval(max(0.0, bits_at(float(high))), bits_at(float(low)), confidence)
    at_least = as_high == 0
    bits = interval.low if at_least else bits_at(as_high / sample_S.size)
    return Exposure(bits, interval, sample_S.size, at_least, "sampled ranks, Clopper-Pearson")


def _checked_canary(canary_score: float) -> float:
    if math.isnan(canary_score):
        raise ValueError("canary_score is NaN: the canary has no score")
    return float(canary_score)
