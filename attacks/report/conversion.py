"""From an audit's result to its :class:`Findings`: all that speaks of no single record."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from attacks.report.findings import (
    ClaimRecord,
    ControlRecord,
    CostRecord,
    CurveRecord,
    EstimateRecord,
    FindingRecord,
    Findings,
    IntervalRecord,
    ProtectionRecord,
    UtilityRecord,
)
from attacks.scoring import Curve
from attacks.statistics import Estimate
from attacks.suite import SCHEMA_VERSION, ProtectionResult, SuiteResult
from attacks.threat import Claim, Control, Cost, Finding, Moment, Utility

CURVE_DIGITS = 6
"""Significant digits of points on curves; every other number is written in full."""


BASE_UNIT = "bits per byte"
"""What the public base model's utility is measured in."""


def findings_of(result: SuiteResult) -> Findings:
    """Everything in ``result`` that does not speak of a single record."""
    config = result.config
    return Findings(
        schema_version=SCHEMA_VERSION,
        started=str(result.provenance["started"]),
        seconds=float(result.provenance["seconds"]),
        exceeds_claim=result.exceeds_claim,
        confidence=config.measurement.confidence,
        fpr=config.measurement.fpr,
        seed=config.seed,
        counts={name: int(count) for name, count in result.counts.items()},
        base_utility=_utility(Utility(result.base_utility, BASE_UNIT)),
        protections=tuple(_protection(p) for m in Moment for p in result.results if p.moment is m),
        config=_builtin(msgspec.to_builtins(config)),
        versions={name: str(v) for name, v in result.provenance["versions"].items()},
        hardware=_builtin(result.provenance["hardware"]),
    )


def _protection(result: ProtectionResult) -> ProtectionRecord:
    return ProtectionRecord(
        moment=result.moment,
        name=result.name,
        claim=_claim(result.claim),
        status=result.status,
        exceeds_claim=result.exceeds_claim,
        utility=_utility(result.utility),
        cost=_cost(result.cost),
        details=_builtin(result.details),
        findings=tuple(_finding(finding) for finding in result.findings),
        curves=tuple(_curve(curve) for curve in result.curves),
    )


def _claim(claim: Claim) -> ClaimRecord:
    return ClaimRecord(
        adversary=claim.adversary,
        assumption=claim.assumption,
        guarantee=claim.guarantee,
        short=claim.short,
        epsilon=_finite(claim.epsilon),
        delta=_finite(claim.delta),
        nothing_leaks=claim.nothing_leaks,
        trade_off=tuple((_curve_point(fpr), _curve_point(tpr)) for fpr, tpr in claim.trade_off),
    )


def _utility(utility: Utility) -> UtilityRecord:
    return UtilityRecord(
        estimate=_estimate(utility.estimate),
        unit=utility.unit,
        baseline=_finite(utility.baseline),
    )


def _cost(cost: Cost) -> CostRecord:
    return CostRecord(
        seconds=float(cost.seconds), sent_bytes=_finite(cost.sent_bytes), unit=cost.unit
    )


def _finding(finding: Finding) -> FindingRecord:
    return FindingRecord(
        attack=finding.attack,
        population=finding.population,
        metric=finding.metric,
        estimate=_estimate(finding.estimate),
        n=int(finding.n),
        lower_bound=_finite(finding.lower_bound),
        ceiling=_finite(finding.ceiling),
        chance=_finite(finding.chance),
        controls=tuple(_control(control) for control in finding.controls),
        status=finding.status,
        reason=finding.reason,
        further={name: _estimate(estimate) for name, estimate in finding.further.items()},
    )


def _control(control: Control) -> ControlRecord:
    return ControlRecord(
        name=control.name,
        value=_finite(control.value),
        low=_finite(control.low),
        high=_finite(control.high),
        p_value=_finite(control.p_value),
    )


def _estimate(estimate: Estimate) -> EstimateRecord:
    interval = estimate.interval
    return EstimateRecord(
        value=_finite(estimate.value),
        interval=IntervalRecord(
            low=_finite(interval.low),
            high=_finite(interval.high),
            confidence=float(interval.confidence),
        ),
        n=int(estimate.n),
        method=estimate.method,
    )


def _curve(curve: Curve) -> CurveRecord:
    band = curve.band
    fpr, tpr, low, high = (
        tuple(_curve_point(x) for x in column)
        for column in (band.fpr, band.tpr, band.low, band.high)
    )
    return CurveRecord(
        attack=curve.attack,
        population=curve.population,
        kind=band.kind,
        confidence=band.confidence,
        method=band.method,
        fpr=fpr,
        tpr=tpr,
        low=low,
        high=high,
    )


def _curve_point(rate: float) -> float:
    return float(f"{rate:.{CURVE_DIGITS}g}")


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _builtin(value: Any) -> Any:
    """The same in dict, list, str, bool, int, float and None alone."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_builtin(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _finite(float(value))
    return str(value)
