"""``findings.json``: all that an audit found, and no record's name.

The tables and the page are drawn from :class:`Findings` alone, so neither can show what the file
does not hold.

Schema version 2: one JSON object whose keys and types are the fields below, in that order. A
number that has no finite value, such as the upper end of a one-sided interval, or that does not
apply, such as a bound on ε where shares are measured, is ``null``. Keys may be added within a
version; readers skip those that they do not know.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from attacks.suite import SCHEMA_VERSION
from attacks.threat import Moment, Population, Status


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
    chance: float | None
    controls: tuple[ControlRecord, ...]
    status: Status
    reason: str
    further: dict[str, EstimateRecord]

    @property
    def bounds_epsilon(self) -> bool:
        """Whether ``estimate`` is a bound on ε; else it is a share."""
        return self.metric.startswith("lower bound on ε")

    @property
    def holds_laws(self) -> bool:
        """Whether an engine was held against the laws that its claim assumes."""
        return self.population == "engine"

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
    """What the protection promises; see :class:`attacks.threat.Claim`."""

    adversary: str
    assumption: str
    guarantee: str
    short: str
    epsilon: float | None
    delta: float | None
    nothing_leaks: bool
    trade_off: tuple[tuple[float, float], ...] = ()

    @property
    def promises(self) -> bool:
        """Whether anything is promised that a measurement could contradict."""
        return self.epsilon is not None or self.nothing_leaks


class UtilityRecord(_Struct, frozen=True, kw_only=True):
    """What is still good; lower is better. ``baseline`` is null where there is none."""

    estimate: EstimateRecord
    unit: str
    baseline: float | None


class CostRecord(_Struct, frozen=True, kw_only=True):
    """Of one ``unit`` of work; ``sent_bytes`` is null where nothing crosses a wire."""

    seconds: float
    sent_bytes: float | None
    unit: str


class ProtectionRecord(_Struct, frozen=True, kw_only=True):
    """One row of the table."""

    moment: Moment
    name: str
    claim: ClaimRecord
    status: Status
    exceeds_claim: bool
    utility: UtilityRecord
    cost: CostRecord
    details: dict[str, Any]
    findings: tuple[FindingRecord, ...]
    curves: tuple[CurveRecord, ...]

    def strongest(self, population: Population | None = None) -> FindingRecord | None:
        """The finding that shows most: the largest bound on ε, or the largest share.

        Among equals, the largest AUC. If no population is named, only findings that bound ε are
        compared.
        """
        found = [
            finding
            for finding in self.findings
            if (finding.bounds_epsilon if population is None else finding.population == population)
        ]
        return max(found, key=_strength, default=None)

    @property
    def engine(self) -> FindingRecord | None:
        """The finding on noise and batches, if the engine was watched."""
        return next((f for f in self.findings if f.holds_laws), None)

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
    positive rate that was declared; ``base_utility`` is that of the public base model. Protections
    stand in the order of their moments.
    """

    schema_version: int
    started: str
    seconds: float
    exceeds_claim: bool
    confidence: float
    fpr: float
    seed: int
    counts: dict[str, int]
    base_utility: UtilityRecord
    protections: tuple[ProtectionRecord, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    def populations(self) -> tuple[Population, ...]:
        """Those that have curves, in the order of the findings."""
        seen = {c.population: None for p in self.protections for c in p.curves}
        return tuple(seen)

    def moments(self) -> tuple[tuple[Moment, tuple[ProtectionRecord, ...]], ...]:
        """The protections of each moment, in the order of :class:`Moment`; none is empty."""
        grouped = ((m, tuple(p for p in self.protections if p.moment is m)) for m in Moment)
        return tuple((moment, protections) for moment, protections in grouped if protections)


class _Version(msgspec.Struct):
    schema_version: int


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
    shown = finding.lower_bound if finding.bounds_epsilon else finding.estimate.value
    return (
        math.inf if shown is None else shown,
        -1.0 if area is None or area.value is None else area.value,
    )
