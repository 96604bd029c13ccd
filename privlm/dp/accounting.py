"""What a composition of releases costs: privacy loss distributions, with Rényi DP behind them.

Events are data (``dp_accounting.DpEvent``); accountants interpret them. The
default accountant convolves privacy loss distributions (PLD; Koskela et al.
2020, Doroshenko et al. 2022), whose ε is an upper bound up to the stated
discretisation and in practice 5-30% below Rényi DP (Mironov 2017). Where PLD
cannot run (its grid outgrows memory at tiny noise), Rényi DP answers instead
and the result says so and why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import dp_accounting
from dp_accounting import pld, rdp

Accountant = Literal["PLD", "RDP"]
DpEvent = Any
"""``dp_accounting.DpEvent``; the library ships no types."""

VALUE_DISCRETIZATION = 1e-4
MAX_GRID_POINTS = 20_000_000
"""About 160 MB a distribution, several of which are in memory while they are convolved."""

_NEGLIGIBLE = 1e-15

_WHOLE_ORDERS = [float(order) for order in range(2, 64)] + [float(2**k) for k in range(6, 13)]
_RDP_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + _WHOLE_ORDERS


@dataclass(frozen=True)
class Epsilon:
    """An ε at a δ, and who computed it.

    ``fallback_reason`` is None for PLD, and says why PLD did not run otherwise.
    """

    value: float
    delta: float
    accountant: Accountant
    fallback_reason: str | None = None


def rounded_up(epsilon: float, decimals: int = 3) -> str:
    """An ε in print, never smaller than the number; trailing zeros are dropped."""
    if math.isinf(epsilon):
        return "∞"
    scale = 10**decimals
    return f"{math.ceil(epsilon * scale) / scale:.{decimals}f}".rstrip("0").rstrip(".")


class _PldWouldNotFitError(Exception):
    pass


def epsilon_of(event: DpEvent, delta: float) -> Epsilon:
    """Smallest ε known for which ``event`` is (ε, δ)-DP under add-or-remove-one.

    Args:
        event: what was released, composed; ``dp_accounting.DpEvent``.
        delta: the δ of the guarantee, in (0, 1).

    Returns:
        An upper bound on ε (``inf`` for a release without noise).

    Raises:
        ValueError: δ outside (0, 1), or an event that neither accountant knows.
    """
    _check_delta(delta)
    if _contains_noiseless_release(event):
        return Epsilon(math.inf, delta, "PLD")
    try:
        _refuse_oversized_grid(event)
        accountant = pld.PLDAccountant(value_discretization_interval=VALUE_DISCRETIZATION)
        value = float(accountant.compose(event).get_epsilon(delta))
    except (_PldWouldNotFitError, MemoryError, OverflowError) as error:
        return _rdp_epsilon(event, delta, f"PLD did not fit: {error}")
    except dp_accounting.UnsupportedEventError as error:
        return _rdp_epsilon(event, delta, f"PLD does not know this event: {error}")
    if not math.isfinite(value):
        return _rdp_epsilon(event, delta, f"PLD cannot resolve δ = {delta:g}")
    return Epsilon(value, delta, "PLD")


def calibrate_noise_multiplier(
    make_event: Callable[[float], DpEvent],
    target_epsilon: float,
    delta: float,
    *,
    relative_tolerance: float = 1e-3,
) -> float:
    """Smallest noise multiplier (within the tolerance) whose event costs at most the target.

    ε falls roughly as a power of σ, so the search is regula falsi on log ε
    against log σ inside a bracket: five or six evaluations.

    Args:
        make_event: noise multiplier -> composed event.
        target_epsilon: the ε to stay within; positive.
        delta: the δ of the guarantee, in (0, 1).
        relative_tolerance: how much larger than necessary σ may come out.

    Returns:
        σ with ε(σ) ≤ target and ε(σ / (1 + tolerance)) above it (nearly).

    Raises:
        ValueError: a target that no noise multiplier in [0.1, 10^4] reaches.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"target_epsilon must be positive and finite, got {target_epsilon}")
    _check_delta(delta)

    def excess(log_sigma: float) -> float:
        value = epsilon_of(make_event(math.exp(log_sigma)), delta).value
        return math.log(max(value, 1e-12)) - math.log(target_epsilon)

    # Start at 1 and walk: cheap events first, because PLD grids grow as σ falls.
    low, high = math.log(0.1), math.log(1e4)
    x = 0.0
    f = excess(x)
    step = math.log(4.0) if f > 0 else -math.log(2.0)
    inside, outside = (x, f), (x, f)
    while True:
        if f > 0:
            outside = (x, f)
            if step < 0:
                break
        else:
            inside = (x, f)
            if step > 0:
                break
        if not low <= x + step <= high:
            if step > 0:
                raise ValueError(
                    f"epsilon {target_epsilon} at delta {delta} cannot be reached: even a noise "
                    f"multiplier of {math.exp(x):.0f} costs more; take fewer steps, a smaller "
                    "sampling probability or a larger delta"
                )
            return math.exp(inside[0])  # less noise than any we would use already suffices
        x += step
        f = excess(x)
    while inside[0] - outside[0] > relative_tolerance:
        slope = (inside[1] - outside[1]) / (inside[0] - outside[0])
        guess = outside[0] - outside[1] / slope if slope < 0 else (inside[0] + outside[0]) / 2
        # Aim half a tolerance to the safe side, and never closer to an end than a tenth.
        guess += relative_tolerance / 2
        width = inside[0] - outside[0]
        guess = min(max(guess, outside[0] + width / 10), inside[0] - width / 10)
        f = excess(guess)
        if f > 0:
            outside = (guess, f)
        else:
            inside = (guess, f)
    return math.exp(inside[0])


def _rdp_epsilon(event: DpEvent, delta: float, reason: str) -> Epsilon:
    chatter = logging.getLogger("absl")  # it reports every order that it leaves out
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        accountant = rdp.RdpAccountant(orders=_RDP_ORDERS)
        value = float(accountant.compose(event).get_epsilon(delta))
    except dp_accounting.UnsupportedEventError as error:
        raise ValueError(f"no accountant knows this event: {error}") from error
    finally:
        chatter.setLevel(level)
    return Epsilon(value, delta, "RDP", reason)


def _refuse_oversized_grid(event: DpEvent) -> None:
    """The grid must reach the losses whose probability is no longer negligible.

    Rényi DP, which costs no memory, says how far that is.
    """
    try:
        accountant = rdp.RdpAccountant(orders=_WHOLE_ORDERS)
        reach = float(accountant.compose(event).get_epsilon(_NEGLIGIBLE))
    except dp_accounting.UnsupportedEventError:
        return
    points = reach / VALUE_DISCRETIZATION
    if points > MAX_GRID_POINTS:
        raise _PldWouldNotFitError(f"its grid would need {points:.1e} points")


def _noise_multipliers(event: DpEvent) -> list[float]:
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return [float(event.noise_multiplier)]
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return [s for inner in event.events for s in _noise_multipliers(inner)]
    if isinstance(event, dp_accounting.SelfComposedDpEvent | dp_accounting.PoissonSampledDpEvent):
        return _noise_multipliers(event.event)
    return []


def _contains_noiseless_release(event: DpEvent) -> bool:
    return isinstance(event, dp_accounting.NonPrivateDpEvent) or any(
        sigma**2 == 0
        for sigma in _noise_multipliers(event)  # underflow included
    )


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
