"""How claims, verdicts and measures are said, in the terminal and on the page alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from attacks.report import figures
from attacks.report.findings import (
    ClaimRecord,
    CostRecord,
    EstimateRecord,
    FindingRecord,
    Findings,
    ProtectionRecord,
)
from attacks.threat import Moment, Population, Status, promised

_UNITS = {"bits per byte": "bits/byte"}
_MEASURES = {
    "tokens recovered in order": "in order",
    "tokens recovered as a set": "as a set",
    "texts recovered exactly": "exactly",
    "uploads matched": "matched",
    "TPR at": "TPR",
}
_TITLES: dict[Population, str] = {
    "text": "Text records",
    "canaries": "Canaries",
    "secrets": "Secrets",
    "gradients": "Gradient canaries",
    "engine": "The engine",
    "texts": "Texts of clients",
    "uploads": "Uploads matched",
    "prompts": "Prompts",
    "requests": "Requests told apart",
    "canary rows": "Canary rows told apart",
}
_DANGERS = {
    Moment.TRAINING: "what the released model tells of the records it was trained on",
    Moment.AGGREGATION: "what the other parties of a round learn of one client's update",
    Moment.INFERENCE: "what the server learns of the prompts it helps to answer",
}


@dataclass(frozen=True)
class Measure:
    """One figure of a finding: its name in full and in short, and what is said of it.

    ``reference`` is what chance alone reaches in it.
    """

    name: str
    short: str
    said: str
    is_share: bool
    reference: float | None
    estimate: EstimateRecord = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """A status as sign and word; colour may be added, never relied on."""

    sign: str
    word: str
    note: str
    key: str


_TESTED = (Status.LEAK, Status.WITHIN_CLAIM, Status.NO_EVIDENCE)
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
        note = "more than claimed" if claim.promises else "nothing was claimed"
    return Verdict(_SIGNS[status], status.value, note, status.name.lower().replace("_", "-"))


def headline(findings: Findings) -> str:
    """The whole audit in a sentence or two."""
    beyond = [p.name for p in findings.protections if p.exceeds_claim]
    claimed = [p for p in findings.protections if p.claim.promises]
    tested = [p for p in claimed if p.status in _TESTED]
    untested = len(claimed) - len(tested)
    if beyond:
        return f"More leaks than is claimed: {', '.join(beyond)}."
    if not claimed:
        return "No protection claims anything, so no claim was tested."
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
        return claim.short or claim.guarantee.split(",")[0]
    return f"ε = {promised(claim.epsilon)}" + (
        "" if claim.delta is None else f"\nδ = {claim.delta:g}"
    )


def full_claim(claim: ClaimRecord) -> str:
    """A claim in sentences."""
    if not claim.promises:
        return f"{claim.guarantee}; the adversary is {claim.adversary}."
    return f"{claim.guarantee}, against {claim.adversary}. Assumed: {claim.assumption}."


def measures(finding: FindingRecord) -> tuple[Measure, ...]:
    """The figures of a finding beside its bound on ε: shares, and the AUC."""
    further = tuple(_measure(name, estimate) for name, estimate in finding.further.items())
    if finding.bounds_epsilon:
        return further
    return _measure(finding.metric, finding.estimate, finding.chance), *further


def yardsticks(finding: FindingRecord) -> list[tuple[str, str]]:
    """All that a finding must be read against: (what, figure)."""
    said = [] if finding.chance is None else [("chance", figures.percent(finding.chance))]
    for control in finding.controls:
        if finding.bounds_epsilon or "AUC" in control.name:
            value = figures.number(control.value)
            ends = figures.interval(control.low, control.high)
        else:
            value = figures.percent(control.value)
            ends = figures.percents(control.low, control.high)
        exact = control.low is not None and control.low == control.high
        p = "" if control.p_value is None else f", p = {figures.number(control.p_value, 3)}"
        said.append((control.name, (value if exact else f"{value} {ends}") + p))
    return said


def laws(finding: FindingRecord) -> list[tuple[str, str]]:
    """What an engine did over what is claimed of it: (what, figure)."""
    every = {finding.metric: finding.estimate, **finding.further}
    return [(name, figures.estimate(estimate)) for name, estimate in every.items()]


def short_unit(unit: str) -> str:
    """A unit in a narrow column."""
    return _UNITS.get(unit, unit)


def per(cost: CostRecord) -> str:
    """``a token``: what one unit of work is."""
    return f"{'an' if cost.unit[:1] in set('aeio') else 'a'} {cost.unit}"


def baseline(moment: Moment) -> str:
    """What utility is compared with."""
    return "the public base model" if moment is Moment.TRAINING else "the unprotected system"


def reasons(protection: ProtectionRecord) -> list[tuple[str, str]]:
    """Why findings were not evaluable, each reason once: (what it concerns, why)."""
    untested = (f for f in protection.findings if f.status is Status.NOT_EVALUABLE)
    return _concerned((main_reason(finding), finding.population) for finding in untested)


def all_reasons(protection: ProtectionRecord) -> list[tuple[str, str]]:
    """Why the findings stand as they do, each reason once: (what it concerns, why)."""
    return _concerned((finding.reason, finding.population) for finding in protection.findings)


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
                    f"model reaches AUC {figures.number(blind.value)} "
                    f"{figures.interval(blind.low, blind.high)}; members and non-members differ as "
                    "records, and AUC and TPR there do not measure membership alone."
                )
    return said


def population_title(population: Population) -> str:
    """A heading."""
    return _TITLES[population]


def danger(moment: Moment) -> str:
    """What is measured at this moment."""
    return _DANGERS[moment]


def _concerned(said: Iterable[tuple[str, Population]]) -> list[tuple[str, str]]:
    concerned: dict[str, dict[str, None]] = {}
    for why, population in said:
        concerned.setdefault(why, {})[population] = None
    return [(", ".join(populations), why) for why, populations in concerned.items()]


def _measure(name: str, estimate: EstimateRecord, reference: float | None = None) -> Measure:
    is_share = name != "AUC"
    short = next((said for start, said in _MEASURES.items() if name.startswith(start)), name)
    said = figures.share(estimate) if is_share else figures.estimate(estimate)
    return Measure(name, short, said, is_share, reference, estimate)


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
