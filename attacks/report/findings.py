"""``findings.json``: all that an audit found, and no record's name.

The tables and the page are drawn from :class:`Findings` alone, so neither can show what the file
does not hold.

Schema version 1: one JSON object whose keys and types are the fields below, in that order. A
number that has no finite value, such as the upper end of a one-sided interval, is ``null``. Keys
may be added within a version; readers skip those that they do not know.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from attacks.scoring import Curve
from attacks.statistics import Estimate
from attacks.suite import SCHEMA_VERSION, ProtectionResult, SuiteResult
from attacks.threat import Control, Finding, Population, Status

CURVE_DIGITS = 6
"""Significant digits of points on curves; every other number is written in full."""


class FindingsUnreadable(ValueError):
    """What is no findings file, or one of another version, would be read as something it is not."""


class _Struct(msgspec.Struct, frozen=True, kw_only=True):
    """A frozen JSON object."""


class IntervalRecord(_Struct, frozen=True, kw_only=True):
    """[low, high], null where unbounded, holding the truth with probability ``confidence``."""

    low: float | None
    high: float | None
    confidence: float


class EstimateRecord(_Struct, frozen=True, kw_only=True):
    """A number with its interval, the independent units behind it, and its method."""

    value: float | None
    interval: IntervalRecord
    n: int
    method: str


class ControlRecord(_Struct, frozen=True, kw_only=True):
    """A figure that an attack's figure is read against."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    p_value: float | None


class FindingRecord(_Struct, frozen=True, kw_only=True):
    """One attack on one population; see :class:`attacks.threat.Finding`."""

    attack: str
    population: Population
    metric: str
    estimate: EstimateRecord
    n: int
    lower_bound: float | None
    ceiling: float | None
    controls: tuple[ControlRecord, ...]
    status: Status
    reason: str
    further: dict[str, EstimateRecord]

    @property
    def auc(self) -> EstimateRecord | None:
        """The area under the ROC curve, where the attack has one."""
        return self.further.get("AUC")

    @property
    def tpr(self) -> EstimateRecord | None:
        """The true positive rate at the declared false positive rate, where it was evaluable."""
        return next((e for name, e in self.further.items() if name.startswith("TPR at")), None)

    @property
    def exposure(self) -> EstimateRecord | None:
        """Bits of exposure of planted secrets."""
        return self.further.get("exposure, bits")

    def control(self, beginning: str) -> ControlRecord | None:
        """The control whose name begins so."""
        return next((c for c in self.controls if c.name.startswith(beginning)), None)


class CurveRecord(_Struct, frozen=True, kw_only=True):
    """An attack's ROC with its band: four columns of equal length."""

    attack: str
    population: Population
    kind: str
    confidence: float
    method: str
    fpr: tuple[float, ...]
    tpr: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class ClaimRecord(_Struct, frozen=True, kw_only=True):
    """What the protection promises; ``epsilon`` is null where no ε is promised."""

    adversary: str
    assumption: str
    guarantee: str
    epsilon: float | None
    delta: float | None


class ProtectionRecord(_Struct, frozen=True, kw_only=True):
    """One row of the table. ``utility_change`` is this utility less the public base model's."""

    name: str
    claim: ClaimRecord
    status: Status
    exceeds_claim: bool
    utility: EstimateRecord
    utility_change: float | None
    seconds: float
    details: dict[str, Any]
    findings: tuple[FindingRecord, ...]
    curves: tuple[CurveRecord, ...]

    def strongest(self, population: Population | None = None) -> FindingRecord | None:
        """The membership finding with the largest bound on ε; among equals, the largest AUC."""
        found = [
            finding
            for finding in self.findings
            if finding.population != "secrets" and population in (None, finding.population)
        ]
        return max(found, key=_strength, default=None)

    @property
    def secrets(self) -> FindingRecord | None:
        """The finding on planted secrets, if any were planted."""
        return next((f for f in self.findings if f.population == "secrets"), None)

    def curve(self, finding: FindingRecord) -> CurveRecord | None:
        """The ROC that belongs to ``finding``."""
        key = (finding.attack, finding.population)
        return next((c for c in self.curves if (c.attack, c.population) == key), None)


class Findings(_Struct, frozen=True, kw_only=True):
    """An audit's result.

    ``confidence`` holds for all lower bounds of one protection together; ``fpr`` is the false
    positive rate that was declared; ``utility_unit`` says what utility is measured in.
    """

    schema_version: int
    started: str
    seconds: float
    exceeds_claim: bool
    confidence: float
    fpr: float
    seed: int
    counts: dict[str, int]
    utility_unit: str
    base_utility: EstimateRecord
    protections: tuple[ProtectionRecord, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    def populations(self) -> tuple[Population, ...]:
        """Those that have curves, in the order of the findings."""
        seen = {c.population: None for p in self.protections for c in p.curves}
        return tuple(seen)


class _Version(msgspec.Struct):
    schema_version: int


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
        utility_unit="bits per byte",
        base_utility=_estimate(result.base_utility),
        protections=tuple(_protection(p, result.base_utility.value) for p in result.results),
        config=_builtin(msgspec.to_builtins(config)),
        versions={name: str(v) for name, v in result.provenance["versions"].items()},
        hardware=_builtin(result.provenance["hardware"]),
    )


def to_json(findings: Findings) -> bytes:
    """Strict JSON (no NaN, no Infinity), indented, its keys in a fixed order."""
    return msgspec.json.format(msgspec.json.encode(findings), indent=1) + b"\n"


def read_findings(path: Path) -> Findings:
    """Load a ``findings.json``.

    Raises:
        OSError: the file cannot be read.
        FindingsUnreadable: it is no findings file, or of a version that is not known here.
    """
    content = path.read_bytes()
    try:
        version = msgspec.json.decode(content, type=_Version).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FindingsUnreadable(f"{path} is no findings file: {error}") from error
    if version != SCHEMA_VERSION:
        raise FindingsUnreadable(
            f"{path} has schema version {version}, this privlm reads {SCHEMA_VERSION}; "
            "read it with the version that wrote it (see its field versions.privlm)"
        )
    try:
        return msgspec.json.decode(content, type=Findings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FindingsUnreadable(f"{path} does not follow its schema: {error}") from error


def _strength(finding: FindingRecord) -> tuple[float, float]:
    area = finding.auc
    bound = math.inf if finding.lower_bound is None else finding.lower_bound
    return bound, -1.0 if area is None or area.value is None else area.value


def _protection(result: ProtectionResult, base: float) -> ProtectionRecord:
    claim = result.claim
    return ProtectionRecord(
        name=result.name,
        claim=ClaimRecord(
            adversary=claim.adversary,
            assumption=claim.assumption,
            guarantee=claim.guarantee,
            epsilon=None if claim.epsilon is None else _finite(claim.epsilon),
            delta=None if claim.delta is None else _finite(claim.delta),
        ),
        status=result.status,
        exceeds_claim=result.exceeds_claim,
        utility=_estimate(result.utility),
        utility_change=_finite(result.utility.value - base),
        seconds=float(result.seconds),
        details=_builtin(result.details),
        findings=tuple(_finding(finding) for finding in result.findings),
        curves=tuple(_curve(curve) for curve in result.curves),
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
        p_value=None if control.p_value is None else _finite(control.p_value),
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
        tuple(float(f"{x:.{CURVE_DIGITS}g}") for x in column)
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


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


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
