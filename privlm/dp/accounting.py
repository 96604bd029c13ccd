"""What a composition of releases costs: privacy loss distributions, with Rényi DP behind them.

Events are data (``dp_accounting.DpEvent``); accountants interpret them. The
default accountant convolves privacy loss distributions (PLD; Koskela et al.
2020, Doroshenko et al. 2022), in practice 5-30% below Rényi DP (Mironov 2017).
Its discretisation errs upwards. The round-off of its Fourier transforms errs
either way: 1e-13 in δ after 30,000 releases and 1e-11 after a million, where the
answer is known. PLD is therefore read at a δ that is smaller by ten times as
much and at least 1e-11, so that its ε is an upper bound but for a round-off
beyond that, which is measured and not proven. Where PLD cannot run (its grid
outgrows memory at tiny noise), does not know an event, or δ is within its
round-off, Rényi DP answers instead and the result says so and why.

Noise multipliers in events are relative to the clipping bound, under both
neighbouring relations: replacing one example moves a sum by two bounds, and the
accountants see to that here.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import dp_accounting
import numpy as np
from dp_accounting import pld, rdp
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from numpy.typing import NDArray

Accountant = Literal["PLD", "RDP"]
Neighbours = Literal["add-or-remove-one", "replace-one"]
DpEvent = Any
"""``dp_accounting.DpEvent``; the library ships no types."""

VALUE_DISCRETIZATION = 1e-4
MAX_GRID_POINTS = 20_000_000
"""About 160 MB a distribution, several of which are in memory while they are convolved."""

_ROUND_OFF = 1e-11
_ROUND_OFF_OF_A_RELEASE = 1e-16
"""What may be wrong with PLD's δ, at least and for each release composed."""

_NEGLIGIBLE = 1e-15
_EASY_GRID_POINTS = 1_000_000
"""Losses that reach further than this many intervals get wider ones: still an upper bound, higher
by less than a thousandth of an ε that is then large."""

_SLOW_GRID_POINTS = 100_000
"""The same for events whose single losses take microseconds each to tabulate."""

_REACH_ORDERS = [2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0]
_WHOLE_ORDERS = [float(order) for order in range(2, 64)] + [float(2**k) for k in range(6, 13)]
_RDP_ORDERS = [1 + tenth / 10 for tenth in range(1, 100)] + _WHOLE_ORDERS
_QUICK_ORDERS = [order for order in _RDP_ORDERS if order < 200]
_RELATIONS = {
    "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}
_GRID_ERRORS = (MemoryError, OverflowError, FloatingPointError)


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


class _PldCannotError(Exception):
    """Its message is the reason for the fallback."""


class _PldDoesNotFitError(_PldCannotError):
    """PLD knows the event, and needs too much memory for it or cannot resolve so small a δ."""


def epsilon_of(
    event: DpEvent,
    delta: float,
    neighbours: Neighbours = "add-or-remove-one",
    *,
    coarseness: float = 1.0,
) -> Epsilon:
    """Smallest ε known for which ``event`` is (ε, δ)-DP.

    Args:
        event: what was released, composed; ``dp_accounting.DpEvent``.
        delta: the δ of the guarantee, in (0, 1).
        neighbours: which data sets are to be told apart no better than that.
        coarseness: width of PLD's grid over its ordinary width. A coarser grid answers sooner, and
            its ε is an upper bound all the same, a higher one.

    Returns:
        An upper bound on ε, up to what the module says of round-off; ``inf`` for a release without
        noise, and where PLD alone knows the event and cannot answer. Events that neither
        accountant knows together are accounted apart at δ/2 each, and their ε added (basic
        composition).

    Raises:
        ValueError: δ outside (0, 1), or an event that neither accountant knows under this relation.
    """
    check_delta(delta)
    every = [
        _epsilon_of(e, delta, neighbours, coarseness) for e in _at_each_size(event, neighbours)
    ]
    return max(every, key=lambda epsilon: epsilon.value)


def _epsilon_of(event: DpEvent, delta: float, neighbours: Neighbours, coarseness: float) -> Epsilon:
    """As :func:`epsilon_of`, for data sets of the one size that ``event`` states."""
    if _contains_noiseless_release(event):
        return Epsilon(math.inf, delta, "PLD")
    try:
        accountant = _pld(event, neighbours, coarseness)
        resolved = delta - _round_off(event)
        if resolved <= 0:
            raise _PldDoesNotFitError(f"PLD cannot resolve δ = {delta:g} for its round-off")
        try:
            value = float(accountant.get_epsilon(resolved))
        except _GRID_ERRORS as error:
            raise _PldDoesNotFitError(f"PLD did not fit: {error}") from error
        if not math.isfinite(value):
            raise _PldDoesNotFitError(f"PLD cannot resolve δ = {delta:g}")
    except _PldCannotError as error:
        try:
            return _rdp_epsilon(event, delta, neighbours, str(error), coarseness)
        except ValueError:
            if isinstance(error, _PldDoesNotFitError):
                return Epsilon(math.inf, delta, "PLD", f"{error}, and Rényi DP does not know it")
            raise
    return Epsilon(value, delta, "PLD")


def deltas_of(
    event: DpEvent, epsilons: NDArray[np.float64], neighbours: Neighbours = "add-or-remove-one"
) -> NDArray[np.float64]:
    """δ(ε) at each of ``epsilons`` ≥ 0: the privacy profile of ``event``, from above.

    From above as :func:`epsilon_of` is: PLD's round-off is added to its δ.

    Raises:
        ValueError: an event that neither accountant knows under this relation.
    """
    every = [_deltas_of(e, epsilons, neighbours) for e in _at_each_size(event, neighbours)]
    return np.asarray(np.max(every, axis=0), dtype=np.float64)


def _deltas_of(
    event: DpEvent, epsilons: NDArray[np.float64], neighbours: Neighbours
) -> NDArray[np.float64]:
    """As :func:`deltas_of`, for data sets of the one size that ``event`` states."""
    if _contains_noiseless_release(event):
        return np.ones_like(epsilons)
    try:
        deltas = np.add(_pld(event, neighbours, 1.0).get_delta(epsilons), _round_off(event))
    except (_PldCannotError, *_GRID_ERRORS) as error:
        accountant = _rdp(event, neighbours, str(error))
        deltas = [accountant.get_delta(epsilon) for epsilon in epsilons]
    return np.clip(np.asarray(deltas, dtype=np.float64), 0.0, 1.0)


def check_delta(delta: float) -> None:
    """Raise ``ValueError`` for a δ outside (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")


def _pld(event: DpEvent, neighbours: Neighbours, coarseness: float) -> Any:
    """A PLD accountant that has composed ``event``."""
    relation = _RELATIONS[neighbours]
    if not pld.PLDAccountant(relation).supports(event):
        raise _PldCannotError("PLD does not know this event")
    interval = coarseness * _interval(event, neighbours)
    try:
        return pld.PLDAccountant(relation, interval).compose(event)
    except _GRID_ERRORS as error:
        raise _PldDoesNotFitError(f"PLD did not fit: {error}") from error


def _rdp(event: DpEvent, neighbours: Neighbours, reason: str, coarseness: float = 1.0) -> Any:
    """A Rényi accountant that has composed ``event``."""
    # PLD doubles the sensitivity under replace-one by itself, the Rényi accountant does not.
    stated = event if neighbours == "add-or-remove-one" else _restated(event, 0.5)
    orders = _RDP_ORDERS if coarseness == 1 else _QUICK_ORDERS
    accountant = rdp.RdpAccountant(orders, _RELATIONS[neighbours])
    try:
        with _without_chatter():
            return accountant.compose(stated)
    except dp_accounting.UnsupportedEventError as error:
        raise ValueError(
            f"no accountant knows this event under {neighbours}: {reason}; Rényi DP: {error}"
        ) from error


def _rdp_epsilon(
    event: DpEvent, delta: float, neighbours: Neighbours, reason: str, coarseness: float
) -> Epsilon:
    known = rdp.RdpAccountant(_RDP_ORDERS, _RELATIONS[neighbours]).supports
    if isinstance(event, dp_accounting.ComposedDpEvent) and not known(event):
        ours = [part for part in event.events if known(part)]
        others = [part for part in event.events if not known(part)]
        if ours:
            parts = [
                _epsilon_of(composed(half), delta / 2, neighbours, coarseness)
                for half in (ours, others)
            ]
            value = sum(part.value for part in parts)
            return Epsilon(value, delta, "RDP", f"{reason}; PLD's part was added at half of δ each")
    with _without_chatter():
        value = float(_rdp(event, neighbours, reason, coarseness).get_epsilon(delta))
    return Epsilon(value, delta, "RDP", reason)


def composed(events: list[DpEvent]) -> DpEvent:
    """All of ``events`` together."""
    return dp_accounting.ComposedDpEvent(events)


@contextmanager
def _without_chatter() -> Iterator[None]:
    chatter = logging.getLogger("absl")  # it reports every order that it leaves out
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatter.setLevel(level)


def _interval(event: DpEvent, neighbours: Neighbours) -> float:
    """The width of PLD's grid: fine, but for losses that reach far or are slow to tabulate.

    The grid must reach the losses whose probability is no longer negligible. Rényi DP, which costs
    no memory, says how far that is.
    """
    stated = _restated(_for_reach(event), 1.0 if neighbours == "add-or-remove-one" else 0.5)
    try:
        with _without_chatter():
            accountant = rdp.RdpAccountant(orders=_REACH_ORDERS).compose(stated)
            reach = float(accountant.get_epsilon(_NEGLIGIBLE))
    except dp_accounting.UnsupportedEventError:
        reach = 0.0
    points = reach / VALUE_DISCRETIZATION
    if points > MAX_GRID_POINTS:
        raise _PldDoesNotFitError(f"PLD did not fit: its grid would need {points:.1e} points")
    return max(VALUE_DISCRETIZATION, reach / _EASY_GRID_POINTS, _interval_of_slow(event, 1))


def _interval_of_slow(event: DpEvent, times: int) -> float:
    """The width of the grid for events whose losses PLD tabulates point by slow point."""
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return _interval_of_slow(event.event, times * event.count)
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return max((_interval_of_slow(part, times) for part in event.events), default=0.0)
    if isinstance(event, MixtureOfGaussiansDpEvent):
        shift, width = max(event.sensitivities) / event.standard_deviation, 0.03
    elif isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        shift, width = 2 / event.noise_multiplier, 0.016
    else:
        return 0.0
    # What a grid of width h adds to ε grows as n·h² with n steps, and stays below 1e-3 like this.
    harmless = min(4e-3, width / math.sqrt(times))
    return max(harmless, float(shift**2 / 2 + 10 * shift) / _SLOW_GRID_POINTS)


def _inner(event: DpEvent) -> list[DpEvent]:
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return list(event.events)
    inner = getattr(event, "event", None)
    return [] if inner is None else [inner]


def _contains_noiseless_release(event: DpEvent) -> bool:
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return True
    for name in ("noise_multiplier", "standard_deviation"):
        if getattr(event, name, 1.0) ** 2 == 0:  # underflow included
            return True
    return any(_contains_noiseless_release(part) for part in _inner(event))


def _round_off(event: DpEvent) -> float:
    """What PLD's Fourier transforms may have put into δ, from above in all that was measured."""
    return max(_ROUND_OFF, _ROUND_OFF_OF_A_RELEASE * _releases(event))


def _releases(event: DpEvent) -> int:
    inner = _inner(event)
    count = int(event.count) if isinstance(event, dp_accounting.SelfComposedDpEvent) else 1
    return count * sum(_releases(part) for part in inner) if inner else 1


def _at_each_size(event: DpEvent, neighbours: Neighbours) -> list[DpEvent]:
    """``event`` for every size of the data set that it is about.

    Truncated batches are drawn from a stated population or from one example less, which adding or
    removing one tells apart. Replacing one leaves the size as it is, either of the two, and neither
    is always the dearer. Every stated population is varied on its own, because canaries may have
    made one run's larger than another's.
    """
    stated = sorted(_populations(event)) if neighbours == "replace-one" else []
    fewer = itertools.product(*([size, size - 1] for size in stated))
    return [_resized(event, dict(zip(stated, sizes, strict=True))) for sizes in fewer]


def _populations(event: DpEvent) -> set[int]:
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return {event.dataset_size}
    return {size for part in _inner(event) for size in _populations(part)}


def _resized(event: DpEvent, sizes: dict[int, int]) -> DpEvent:
    """``event`` with truncated batches that are drawn from populations of other sizes."""

    def change(part: DpEvent) -> DpEvent:
        if not isinstance(part, dp_accounting.TruncatedSubsampledGaussianDpEvent):
            return part
        size = sizes[part.dataset_size]
        q = part.sampling_probability
        if size <= part.truncated_batch_size:  # nothing is truncated
            once = dp_accounting.GaussianDpEvent(part.noise_multiplier)
            return once if q == 1 else dp_accounting.PoissonSampledDpEvent(q, once)
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            size, q, part.truncated_batch_size, part.noise_multiplier
        )

    return _changed(event, change) if sizes else event


def _restated(event: DpEvent, scale: float) -> DpEvent:
    """``event`` with ``scale`` times the noise."""

    def change(part: DpEvent) -> DpEvent:
        if isinstance(part, dp_accounting.GaussianDpEvent):
            return dp_accounting.GaussianDpEvent(part.noise_multiplier * scale)
        return part

    return _changed(event, change)


def _changed(event: DpEvent, change: Callable[[DpEvent], DpEvent]) -> DpEvent:
    """``event`` with ``change`` made to every part that has no parts."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return composed([_changed(part, change) for part in event.events])
    if not _inner(event):
        return change(event)
    # The library's events are attrs classes, which evolve as copy.replace would.
    changed = copy.copy(event)
    object.__setattr__(changed, "event", _changed(event.event, change))
    return changed


def _for_reach(event: DpEvent) -> DpEvent:
    """Events that Rényi DP does not know, as plain ones whose losses reach about as far."""
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return dp_accounting.SelfComposedDpEvent(_for_reach(event.event), event.count)
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return composed([_for_reach(part) for part in event.events])
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier / 2)
        return dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian)
    if isinstance(event, MixtureOfGaussiansDpEvent):
        beyond = 1 - np.cumsum(event.sampling_probs)
        usual = event.sensitivities[int((beyond > 1e-3).sum())]
        gaussian = dp_accounting.GaussianDpEvent(event.standard_deviation / max(usual, 1.0))
        return dp_accounting.PoissonSampledDpEvent(1 - event.sampling_probs[0], gaussian)
    return event
