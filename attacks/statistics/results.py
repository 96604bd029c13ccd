"""What every statistic returns, and the checks made at its door.

The results are frozen and hold plain Python numbers, so `dataclasses.asdict` followed by
`json.dumps` writes them down without a helper.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Interval:
    """A random set [low, high] that holds the truth with probability at least `confidence`."""

    low: float
    high: float
    confidence: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"an interval needs low <= high, got [{self.low}, {self.high}]")
        if not 0.0 < self.confidence <= 1.0:
            raise ValueError(f"confidence must lie in (0, 1], got {self.confidence}")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """The distance from low to high, in the units of the estimate."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the interval that goes with it, the records behind it and how it was made."""

    value: float
    interval: Interval
    n: int
    method: str


def checked_confidence(confidence: float) -> float:
    """Return `confidence` if it lies strictly between 0 and 1; else ValueError."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return float(confidence)


def checked_delta(delta: float) -> float:
    """Return `delta` if it lies in [0, 1); else ValueError."""
    if not 0.0 <= delta < 1.0:
        raise ValueError(f"delta must lie in [0, 1), got {delta}")
    return float(delta)


def checked_epsilon(epsilon: float) -> float:
    """Return `epsilon` if it is finite and not negative; else ValueError."""
    if not (math.isfinite(epsilon) and epsilon >= 0.0):
        raise ValueError(f"epsilon must be finite and at least 0, got {epsilon}")
    return float(epsilon)


def checked_rate(rate: float, name: str) -> float:
    """Return `rate` if it lies strictly between 0 and 1; else ValueError naming it."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"{name} must lie in (0, 1), got {rate}")
    return float(rate)


def checked_numbers(values: npt.ArrayLike, name: str) -> Floats:
    """One-dimensional float64 copy of `values` without NaN; infinities pass. Else ValueError."""
    numbers = np.array(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {numbers.shape}")
    nan_places = np.flatnonzero(np.isnan(numbers))
    if nan_places.size:
        first = ", ".join(str(place) for place in nan_places[:5])
        more = ", ..." if nan_places.size > 5 else ""
        raise ValueError(
            f"{name} holds {nan_places.size} NaN of {numbers.size} at positions {first}{more}: "
            "decide what a record without a score means before measuring"
        )
    return numbers


def checked_mask(member: npt.ArrayLike, size: int) -> Bools:
    """`member` as `size` booleans with both values present. ValueError for anything else."""
    mask = np.asarray(member)
    if mask.shape != (size,):
        raise ValueError(f"member must have the shape of scores, ({size},), got {mask.shape}")
    if mask.dtype != np.bool_:
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("member must hold booleans (or 0 and 1), got other values")
        mask = mask.astype(np.bool_)
    n_in = int(np.count_nonzero(mask))
    if n_in in (0, size):
        raise ValueError(f"both members and non-members are needed, got {n_in} members of {size}")
    return mask


def split_scores(scores: npt.ArrayLike, member: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Ascending scores of members and of non-members, after every check at the door."""
    scores_N = checked_numbers(scores, "scores")
    member_N = checked_mask(member, scores_N.size)
    return np.sort(scores_N[member_N]), np.sort(scores_N[~member_N])
