"""The least noise, or the most steps, that a budget allows.

Cost falls roughly as a power of the noise multiplier and grows roughly as a power of the number of
steps, so both searches are regula falsi between logarithms. They use a coarse grid, whose answers
err upwards and come ten times sooner, and end on the ordinary one: what is returned was seen to
stay within the budget there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from scipy.optimize import brentq

from privlm.dp.accounting import DpEvent, Neighbours, check_delta, epsilon_of

_COARSE = 10.0
LEAST_NOISE, _MOST_NOISE = 0.1, 1e4
_MOST_STEPS = 10**9
_TINY = 1e-12
_UNBOUNDED = 1e3
_LEAST_SLOPE = 0.05
_NEARLY = 0.1
_STRIDE = math.log(16.0)

Margin = Callable[[float, float], float]
"""(x, coarseness of the grid) -> log(target / ε(x)), falling in x; negative beyond the budget."""


def calibrate_noise_multiplier(
    make_event: Callable[[float], DpEvent],
    target_epsilon: float,
    delta: float,
    neighbours: Neighbours = "add-or-remove-one",
    *,
    relative_tolerance: float = 1e-3,
) -> float:
    """Smallest noise multiplier (within the tolerance) whose event costs at most the target.

    Args:
        make_event: noise multiplier -> composed event.
        target_epsilon: the ε to stay within; positive.
        delta: the δ of the guarantee, in (0, 1).
        neighbours: the relation of the guarantee.
        relative_tolerance: how much larger than necessary σ may come out.

    Returns:
        σ with ε(σ) ≤ target and ε(σ / (1 + tolerance)) above it (nearly).

    Raises:
        ValueError: a target that no noise multiplier in [0.1, 10^4] reaches.
    """
    _check_target(target_epsilon, delta)

    def margin(x: float, coarseness: float) -> float:
        event = make_event(math.exp(-x))
        return _margin(event, target_epsilon, delta, neighbours, coarseness)

    x = _furthest(margin, 0.0, -math.log(_MOST_NOISE), -math.log(LEAST_NOISE), relative_tolerance)
    if x is None:
        raise ValueError(
            f"epsilon {target_epsilon} at delta {delta} cannot be reached: even a noise "
            f"multiplier of {_MOST_NOISE:.0f} costs more; take fewer steps, a smaller "
            "sampling probability or a larger delta"
        )
    return math.exp(-x)


def most_steps(
    make_event: Callable[[int], DpEvent],
    target_epsilon: float,
    delta: float,
    neighbours: Neighbours = "add-or-remove-one",
    *,
    at_most: int | None = None,
    relative_tolerance: float = 1e-3,
) -> int:
    """Largest number of steps (within the tolerance) whose event costs at most the target.

    Args:
        make_event: number of steps, at least 1 -> composed event of them and of all before.
        target_epsilon: the ε to stay within; positive.
        delta: the δ of the guarantee, in (0, 1).
        neighbours: the relation of the guarantee.
        at_most: no more are asked for; None stops at 10^9.
        relative_tolerance: share of the steps that may be left out.

    Returns:
        n with ε(n) ≤ target; 0 if a single step costs more.
    """
    _check_target(target_epsilon, delta)
    if at_most is not None and at_most < 1:
        return 0

    @functools.cache
    def whole(steps: int, coarseness: float) -> float:
        return _margin(make_event(steps), target_epsilon, delta, neighbours, coarseness)

    def margin(x: float, coarseness: float) -> float:
        return whole(_floor_exp(x), coarseness)

    if at_most is None:
        x = _furthest(margin, 0.0, 0.0, math.log(_MOST_STEPS), relative_tolerance)
    else:
        # What was asked for may fit exactly: a plan in the budget that it was made for.
        high = math.log(at_most)
        if margin(high, _COARSE) > -_NEARLY and margin(high, 1.0) >= 0:
            return at_most
        x = _furthest(margin, high, 0.0, high, relative_tolerance)
    return 0 if x is None else _floor_exp(x)


def _floor_exp(x: float) -> int:
    return math.floor(math.exp(x) * (1 + 1e-12))  # log and exp of a whole number may lose it


def _margin(
    event: DpEvent, target: float, delta: float, neighbours: Neighbours, coarseness: float
) -> float:
    value = epsilon_of(event, delta, neighbours, coarseness=coarseness).value
    return math.log(target / max(value, _TINY)) if math.isfinite(value) else -_UNBOUNDED


def _furthest(
    margin: Margin, start: float, low: float, high: float, tolerance: float
) -> float | None:
    """Largest x in [low, high], within the tolerance, that keeps ``margin`` at 0 or above.

    None if not even ``low`` does.
    """
    inside, outside = _bracketed(lambda x: margin(x, _COARSE), start, low, high)
    if outside is None:
        x, slope = high, 1.0
    elif inside is None:
        x, slope = low, 1.0  # a coarse grid errs upwards, so it may fit after all
    else:
        slope = max(_LEAST_SLOPE, (inside[1] - outside[1]) / (outside[0] - inside[0]))
        x = brentq(margin, inside[0], outside[0], args=(_COARSE,), xtol=2 * tolerance)
        # The error of a grid is quadratic in its width, so two grids foretell the ordinary one.
        coarse, finer = margin(x, _COARSE), margin(x, _COARSE / 2)
        x = min(high, x + (finer + (finer - coarse) / 3) / slope - tolerance / 3)
    fine = margin(x, 1.0)
    while fine < 0:
        if x == low:
            return None
        x = max(low, x + fine / slope - tolerance / 2)
        fine = margin(x, 1.0)
    while (further := min(high, x + fine / slope - tolerance / 3)) > x + tolerance:
        there = margin(further, 1.0)
        if there < 0:
            slope = (fine - there) / (further - x)
        else:
            x, fine = further, there
    return x


Point = tuple[float, float]
"""x and its margin."""


def _bracketed(
    margin: Callable[[float], float], start: float, low: float, high: float
) -> tuple[Point | None, Point | None]:
    """A point that keeps the margin and one that does not; None where the range has none."""
    here = (start, margin(start))
    step = math.log(2.0) if here[1] >= 0 else -math.log(2.0)
    while True:
        x = min(high, max(low, here[0] + step))
        if x == here[0]:
            return (here, None) if here[1] >= 0 else (None, here)
        there = (x, margin(x))
        if there[1] < 0 <= here[1]:
            return here, there
        if here[1] < 0 <= there[1]:
            return there, here
        # No further than by 16: cost grows with the grid, and the grid with what is spent.
        here, step = there, max(-_STRIDE, min(_STRIDE, 2 * step))


def _check_target(target_epsilon: float, delta: float) -> None:
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon must be positive and finite, got {target_epsilon}")
    check_delta(delta)
