"""What is declared before any attack runs, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from attacks.catalogue import ATTACKS
from attacks.statistics import RocBand
from attacks.threat import Finding, Population, Scores


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is declared before any model is attacked.

    ``confidence`` holds for all bounds of one protection together. ``delta`` is
    the δ at which ε is bounded where the claim names none. That *nothing* leaks is
    judged by the rule of :mod:`attacks.scoring.secrecy`, which nothing here relaxes.
    """

    attacks: tuple[str, ...] = tuple(ATTACKS)
    confidence: float = 0.95
    fpr: float = 0.01
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("attacks must name at least one attack")
        for name in self.attacks:
            if name not in ATTACKS:
                raise ValueError(f"attacks: {name!r} is none of {', '.join(ATTACKS)}")
        if len(set(self.attacks)) != len(self.attacks):
            raise ValueError("attacks: a name stands twice")
        for key in ("confidence", "fpr", "delta"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key} must lie in (0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class Curve:
    """One attack's ROC on one population, with pointwise bands."""

    attack: str
    population: Population
    band: RocBand = field(repr=False)


@dataclass(frozen=True)
class Measured:
    """All findings on one protection, and the scores behind them for whoever owns the records."""

    findings: tuple[Finding, ...]
    curves: tuple[Curve, ...] = field(repr=False)
    scores: tuple[Scores, ...] = field(repr=False)
