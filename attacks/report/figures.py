"""How single numbers are said, in the terminal and on the page alike.

Rounding never flatters: a lower bound is rounded down, an interval outwards.
"""

from __future__ import annotations

import math
import re

from attacks.report.findings import EstimateRecord, UtilityRecord

NONE = "–"
_SLACK = 1e-9  # 4.74 stored as 4.7399999999 is still 4.74
_SMALL = 0.005
"""Below it two decimals show nothing."""


def at_least(value: float | None, digits: int = 2) -> str:
    """A lower bound, rounded down."""
    return NONE if value is None else f"{_down(value, digits):.{digits}f}"


def number(value: float | None, digits: int = 2) -> str:
    """Rounded to the nearest."""
    return NONE if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """``[low, high]`` rounded outwards; unbounded ends as infinities."""
    lower = "−∞" if low is None else f"{_down(low, digits):.{digits}f}"
    upper = "∞" if high is None else f"{0.0 - _down(-high, digits):.{digits}f}"
    return f"[{lower}, {upper}]"


def estimate(value: EstimateRecord | None, digits: int = 2) -> str:
    """A number with its interval."""
    if value is None:
        return NONE
    return (
        f"{number(value.value, digits)} {interval(value.interval.low, value.interval.high, digits)}"
    )


def percent(value: float | None) -> str:
    """A rate in per cent, to the nearest tenth."""
    return NONE if value is None else _whole_ends(f"{100 * value:.1f}%")


def percents(low: float | None, high: float | None) -> str:
    """The interval of a rate in per cent, rounded outwards."""
    return _whole_ends(
        interval(None if low is None else 100 * low, None if high is None else 100 * high, 1)
    )


def share(value: EstimateRecord | None) -> str:
    """A rate with its interval, in per cent."""
    if value is None or value.value is None:
        return NONE
    return f"{percent(value.value)} {percents(value.interval.low, value.interval.high)}"


def rate_name(rate: float) -> str:
    """``0.01`` as ``1%``."""
    return f"{100 * rate:.3g}%"


def amount(value: EstimateRecord) -> tuple[str, str]:
    """A number of any size and its interval; ``("3.0e-9", "[2.9, 3.1]e-9")`` where it is small.

    An interval without width belongs to a number that is exact, and is left out.
    """
    low, high = value.interval.low, value.interval.high
    if low is not None and low == high:
        return _sized(value.value, _power(value.value)), ""
    power = _power(value.value, low, high)
    if power == 0:
        return number(value.value), interval(low, high)
    low, high = (None if end is None else end / 10.0**power for end in (low, high))
    return _sized(value.value, power), f"{interval(low, high, 1)}e{power}"


def change(utility: UtilityRecord) -> str:
    """The signed difference to the baseline, and whether it is for the better: less is."""
    value, baseline = utility.estimate.value, utility.baseline
    if value is None or baseline is None:
        return NONE
    power = _power(value, baseline)
    difference = _sized(value - baseline, power, sign="+")
    if difference.startswith("-"):
        difference = f"−{difference[1:]}"
    if not re.search(r"[1-9]", difference.split("e")[0]):
        return f"{difference} same"
    return f"{difference} {'better' if value < baseline else 'worse'}"


def duration(seconds: float) -> str:
    """From microseconds to hours; two units at most."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if 0 < seconds < 999.5 * size:
            return f"{seconds / size:.3g} {unit}"
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def traffic(sent_bytes: float | None) -> str:
    """Bytes in units of the SI, three digits; none where nothing crosses a wire."""
    size = sent_bytes or 0.0
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:,.0f} TB"


def _sized(value: float | None, power: int, sign: str = "") -> str:
    """To the nearest: two decimals, or a multiple of a power of ten."""
    if value is None or power == 0:
        return NONE if value is None else f"{value:{sign}.2f}"
    return f"{value / 10.0**power:{sign}.1f}e{power}"


def _power(*values: float | None) -> int:
    """The power of ten in which small values are written together; 0 where decimals do."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0 or largest >= _SMALL:
        return 0
    return math.floor(math.log10(largest))


def _whole_ends(said: str) -> str:
    """``0.0`` and ``100.0`` without their decimal."""
    return re.sub(r"\b(0|100)\.0\b", r"\1", said)


def _down(value: float, digits: int) -> float:
    scale = 10.0**digits
    return math.floor(value * scale + _SLACK) / scale
