"""ROC curves on log-log axes and small interval bars, as coordinates for inline SVG.

G grid points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from attacks.report import figures, wording
from attacks.report.findings import CurveRecord, FindingRecord, Findings, ProtectionRecord
from attacks.statistics import epsilon_delta_roc_ceiling
from attacks.threat import Population

STYLES = 6
"""Distinct colours and dash patterns; a seventh protection wears the first again."""

HEADROOM = 5.0
"""Units between a rate of 1 and the frame, so that a perfect curve is seen."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One protection in a panel: SVG paths, and a caption for the legend."""

    style: int
    name: str
    caption: str
    curve: str = field(repr=False)
    band: str = field(repr=False)
    ceiling: str = field(repr=False)


@dataclass(frozen=True)
class Panel:
    """One population's ROC curves in a box of ``width`` by ``height`` user units."""

    population: Population
    title: str
    description: str
    lines: tuple[Line, ...]
    chance: str = field(repr=False)
    x_ticks: tuple[Tick, ...] = field(repr=False)
    y_ticks: tuple[Tick, ...] = field(repr=False)
    width: float = 360.0
    height: float = 300.0
    left: float = 58.0
    top: float = 10.0
    right: float = 343.0
    bottom: float = 252.0


@dataclass(frozen=True)
class Bar:
    """Marks on a track of ``width`` units; None where there is nothing to mark."""

    low: float
    high: float
    mark: float | None
    reference: float | None
    limit: float | None
    width: float = 120.0


class LogAxes:
    """Log-log axes from a smallest rate to 1, in SVG user units; smaller values lie on the edge."""

    def __init__(self, panel: type[Panel], smallest_x: float, smallest_y: float) -> None:
        self._panel = panel
        self._x, self._y = smallest_x, smallest_y

    def x(self, rate: float) -> float:
        """Units from the left."""
        left, right = self._panel.left, self._panel.right
        return left + (right - left) * _log_place(rate, self._x)

    def y(self, rate: float) -> float:
        """Units from the top."""
        top, bottom = self._panel.top + HEADROOM, self._panel.bottom
        return bottom - (bottom - top) * _log_place(rate, self._y)

    def path(self, points: Points, *, closed: bool = False) -> str:
        """The path through ``points`` of rates."""
        if not points:
            return ""
        places = [f"{self.x(fpr):.1f} {self.y(tpr):.1f}" for fpr, tpr in points]
        return "M" + "L".join(places) + ("Z" if closed else "")


def panels(findings: Findings) -> tuple[Panel, ...]:
    """One panel a population, one line a protection: its strongest attack there."""
    return tuple(_panel(findings, population) for population in findings.populations())


def epsilon_bar(finding: FindingRecord, protection: ProtectionRecord, scale: float) -> Bar:
    """From 0 to the bound, the claim as reference, the ceiling as limit."""
    claimed = protection.claim.epsilon
    place = _Place(0.0, scale)
    return Bar(
        low=0.0,
        high=place(finding.lower_bound if finding.lower_bound is not None else scale),
        mark=None,
        reference=None if claimed is None else place(claimed),
        limit=None if finding.ceiling is None else place(finding.ceiling),
    )


def epsilon_scale(findings: Findings) -> float:
    """The ε at the right end of every bar: all ceilings fit, and claims up to twice as large."""
    ceilings = [
        finding.ceiling
        for protection in findings.protections
        for finding in protection.findings
        if finding.bounds_epsilon and finding.ceiling is not None
    ]
    most = max(ceilings, default=1.0)
    claims = [p.claim.epsilon for p in findings.protections if p.claim.epsilon is not None]
    return 1.04 * max([most, *(claim for claim in claims if claim <= 2 * most)])


def interval_bar(
    low: float | None,
    value: float | None,
    high: float | None,
    *,
    start: float,
    end: float,
    chance: float | None,
) -> Bar:
    """An interval with its estimate on a track from ``start`` to ``end``."""
    place = _Place(start, end)
    return Bar(
        low=place(start if low is None else low),
        high=place(end if high is None else high),
        mark=None if value is None else place(value),
        reference=None if chance is None else place(chance),
        limit=None,
    )


def _panel(findings: Findings, population: Population) -> Panel:
    chosen: list[tuple[int, ProtectionRecord, FindingRecord, CurveRecord]] = []
    for number, protection in enumerate(findings.protections):
        finding = protection.strongest(population)
        curve = None if finding is None else protection.curve(finding)
        if finding is not None and curve is not None and curve.fpr:
            chosen.append((number, protection, finding, curve))
    smallest_x = _round_down(min((curve.fpr[0] for *_, curve in chosen), default=0.01))
    positive = [rate for *_, curve in chosen for rate in curve.tpr if rate > 0]
    smallest_y = max(_round_down(min([smallest_x, *positive])), smallest_x / 10)
    axes = LogAxes(Panel, smallest_x, smallest_y)
    confidence = f"{100 * findings.confidence:.3g}%"
    lines = tuple(
        Line(
            style=number % STYLES,
            name=protection.name,
            caption=_caption(finding),
            curve=axes.path(list(zip(curve.fpr, curve.tpr, strict=True))),
            band=axes.path(
                [
                    *zip(curve.fpr, curve.high, strict=True),
                    *reversed(list(zip(curve.fpr, curve.low, strict=True))),
                ],
                closed=True,
            ),
            ceiling=_ceiling(protection, axes, smallest_x),
        )
        for number, protection, finding, curve in chosen
    )
    said = "; ".join(f"{line.name}: {line.caption}" for line in lines)
    return Panel(
        population=population,
        title=wording.population_title(population),
        description=(
            f"ROC curves on logarithmic axes with pointwise {confidence} bands, {population}. "
            f"{said}."
        ),
        lines=lines,
        chance=axes.path([(max(smallest_x, smallest_y), max(smallest_x, smallest_y)), (1.0, 1.0)]),
        x_ticks=tuple(Tick(axes.x(r), figures.rate_name(r)) for r in _ticks(smallest_x)),
        y_ticks=tuple(Tick(axes.y(r), figures.rate_name(r)) for r in _ticks(smallest_y)),
    )


def _caption(finding: FindingRecord) -> str:
    return f"{finding.attack}, AUC {figures.estimate(finding.auc)}"


def _ceiling(protection: ProtectionRecord, axes: LogAxes, smallest: float) -> str:
    claim = protection.claim
    if claim.epsilon is None:
        return ""
    fpr_G = np.geomspace(smallest, 1.0, 60)
    if claim.trade_off:
        known_fpr, known_tpr = zip(*claim.trade_off, strict=True)
        tpr_G = np.interp(fpr_G, known_fpr, known_tpr)
    else:
        tpr_G = epsilon_delta_roc_ceiling(claim.epsilon, claim.delta or 0.0, fpr_G)
    return axes.path(list(zip(fpr_G.tolist(), tpr_G.tolist(), strict=True)))


def _ticks(smallest: float) -> list[float]:
    """1, 2 and 5 of each decade; 1 alone beyond two decades."""
    steps = (1.0, 2.0, 5.0) if smallest >= 0.004 else (1.0,)
    decades = range(math.floor(math.log10(smallest)), 1)
    found = [step * 10.0**decade for decade in decades for step in steps]
    return [rate for rate in found if smallest * (1 - 1e-9) <= rate <= 1.0]


def _round_down(rate: float) -> float:
    """The largest of 1, 2, 5 times a power of ten not above ``rate``."""
    decade = 10.0 ** math.floor(math.log10(rate))
    return max(step * decade for step in (1.0, 2.0, 5.0) if step * decade <= rate * (1 + 1e-9))


def _log_place(rate: float, smallest: float) -> float:
    return 1.0 - math.log(min(max(rate, smallest), 1.0)) / math.log(smallest)


@dataclass(frozen=True)
class _Place:
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.start) / (self.end - self.start)
        return Bar.width * min(max(share, 0.0), 1.0)
