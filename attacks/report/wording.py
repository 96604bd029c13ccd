"""How numbers and verdicts are said, in the terminal and on the page alike.

Rounding never flatters: a lower bound is rounded down, an interval outwards.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from attacks.report.findings import (
    ClaimRecord,
    EstimateRecord,
    FindingRecord,
    Findings,
    ProtectionRecord,
)
from attacks.threat import Population, Status, promised

NONE = "–"
_SLACK = 1e-9  # 4.74 stored as 4.7399999999 is still 4.74


@dataclass(frozen=True)
class Verdict:
    """A status as sign and word; colour may be added, never relied on."""

    sign: str
    word: str
    note: str
    key: str


_SIGNS = {
    Status.LEAK: "✗",
    Status.WITHIN_CLAIM: "✓",
    Status.NO_EVIDENCE: "○",
    Status.NOT_APPLICABLE: "–",
    Status.NOT_EVALUABLE: "?",
}


def verdict(status: Status, claim: ClaimRecord) -> Verdict:
    """What is said of ``status`` beside ``claim``."""
    note = ""
    if status is Status.LEAK:
        note = "nothing was claimed" if claim.epsilon is None else "more than claimed"
    return Verdict(_SIGNS[status], status.value, note, status.name.lower().replace("_", "-"))


def headline(findings: Findings) -> str:
    """The whole audit in a sentence or two."""
    beyond = [p.name for p in findings.protections if p.exceeds_claim]
    claimed = [p for p in findings.protections if p.claim.epsilon is not None]
    tested = [p for p in claimed if p.status in (Status.LEAK, Status.WITHIN_CLAIM)]
    untested = len(claimed) - len(tested)
    if beyond:
        return f"More leaks than is claimed: {', '.join(beyond)}."
    if not claimed:
        return "No protection claims a bound, so no claim was tested."
    if not tested:
        return "No claim could be tested by this audit; nothing is shown either way."
    held = f"{_count(len(tested), 'claim was', 'claims were')} tested and not contradicted."
    return held + (
        f" {_count(untested, 'claim', 'claims')} could not be tested by this audit."
        if untested
        else ""
    )


def counted(findings: Findings) -> list[str]:
    """What was audited: ``2,400 text records (1,206 trained on)`` and so on."""
    counts = findings.counts
    said = []
    for name, count in counts.items():
        if name.endswith(" trained on") and name.removesuffix(" trained on") in counts:
            continue
        trained = counts.get(f"{name} trained on")
        said.append(f"{count:,} {name}" + ("" if trained is None else f" ({trained:,} trained on)"))
    return said


def short_claim(claim: ClaimRecord) -> str:
    """A claim in a narrow column."""
    if claim.epsilon is None:
        return claim.guarantee
    return f"ε = {promised(claim.epsilon)}" + (
        "" if claim.delta is None else f"\nδ = {claim.delta:g}"
    )


def full_claim(claim: ClaimRecord) -> str:
    """A claim in sentences."""
    if claim.epsilon is None:
        return f"{claim.guarantee}; the adversary is {claim.adversary}."
    return f"{claim.guarantee}, against {claim.adversary}. Assumed: {claim.assumption}."


def reasons(protection: ProtectionRecord) -> list[tuple[str, str]]:
    """Why findings were not evaluable, each reason once: (what it concerns, why)."""
    concerned: dict[str, dict[str, None]] = {}
    for finding in protection.findings:
        if finding.status is Status.NOT_EVALUABLE:
            concerned.setdefault(main_reason(finding), {})[finding.population] = None
    return [(", ".join(populations), why) for why, populations in concerned.items()]


def main_reason(finding: FindingRecord) -> str:
    """The reason of the verdict, without remarks on other figures."""
    return finding.reason.split("; a true positive rate at FPR")[0]


def warnings(findings: Findings) -> list[str]:
    """Controls that fail: what attacks show there is not membership."""
    said = []
    for protection in findings.protections:
        for population in findings.populations():
            strongest = protection.strongest(population)
            blind = strongest.control("AUC of a blind") if strongest else None
            if blind is not None and blind.low is not None and blind.low > 0.5:
                said.append(
                    f"{protection.name}, {population}: a blind baseline that never meets the "
                    f"model reaches AUC {number(blind.value)} "
                    f"{interval(blind.low, blind.high)}; members and non-members differ as "
                    "records, and AUC and TPR there do not measure membership alone."
                )
    return said


def reading(findings: Findings) -> list[tuple[str, str]]:
    """How to read the table: (term, meaning)."""
    together = f"{findings.confidence:.3g}"
    one_by_one = f"{100 * findings.confidence:.3g}%"
    ranked = next((p.secrets.metric for p in findings.protections if p.secrets), None)
    said = [
        (
            "ε ≥ x (ceiling y)",
            "the training is not (e, δ)-differentially private for any e below x. All bounds of "
            f"one row hold together with probability {together}. A perfect attack on this many "
            "records would have shown y: a bound at its ceiling means “at least”, and a claim "
            "above the ceiling cannot be tested.",
        ),
        (
            f"TPR at {rate_name(findings.fpr)} FPR, AUC",
            f"share of text records trained on that are found while {rate_name(findings.fpr)} of "
            f"the others are accused (chance: {rate_name(findings.fpr)}), and area under the ROC "
            "curve (chance: 0.50), of the attack on text with the largest bound. Each interval "
            f"holds by itself with probability {one_by_one}.",
        ),
    ]
    if ranked is not None:
        said.append(("secrets", f"{ranked}; a secret never seen ranks first once in so many."))
    said += [
        (
            "leak",
            "a bound exceeds the claim, or something shows and nothing was claimed.",
        ),
        (
            "within claim",
            "no attack here contradicts the claim, though the same attack exceeds it where nothing "
            "protects. It is no proof: a better attack may show more.",
        ),
        (
            "not evaluable",
            "no outcome could have contradicted the claim: even a perfect attack would not reach "
            "it, or this one is too weak where nothing protects.",
        ),
        (
            "utility",
            f"{findings.utility_unit} of documents that nobody trained on; lower is better. The "
            "change is against the public base model and has no interval of its own.",
        ),
        (
            "this report",
            "is not differentially private: it states exact figures of models trained on the data.",
        ),
    ]
    return said


def at_least(value: float | None, digits: int = 2) -> str:
    """A lower bound, rounded down."""
    return NONE if value is None else f"{_down(value, digits):.{digits}f}"


def number(value: float | None, digits: int = 2) -> str:
    """Rounded to the nearest."""
    return NONE if value is None else f"{value:.{digits}f}"


def change(value: float | None) -> str:
    """A signed difference."""
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def better(value: float | None) -> str:
    """Whether a change in bits per byte, of which fewer are better, is for the better."""
    if value is None or abs(value) < 0.005:
        return "same"
    return "better" if value < 0 else "worse"


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


def share(value: EstimateRecord | None) -> str:
    """A rate with its interval, in per cent."""
    if value is None or value.value is None:
        return NONE
    low, high = value.interval.low, value.interval.high
    hundredfold = interval(
        None if low is None else 100 * low, None if high is None else 100 * high, 1
    )
    return re.sub(r"\b(0|100)\.0\b", r"\1", f"{100 * value.value:.1f}% {hundredfold}")


def rate_name(rate: float) -> str:
    """``0.01`` as ``1%``."""
    return f"{100 * rate:.3g}%"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours; two units at most."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def population_title(population: Population) -> str:
    """A heading."""
    return {"text": "Text records", "canaries": "Canaries", "secrets": "Secrets"}[population]


def _down(value: float, digits: int) -> float:
    scale = 10.0**digits
    return math.floor(value * scale + _SLACK) / scale


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
