"""What each protection leaks, in lines for the table's cells.

A moment has several columns of leakage: bounds, text and secrets in training, else one a
population.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from attacks.report import figures, wording
from attacks.report.findings import FindingRecord, ProtectionRecord
from attacks.threat import Moment, Population

Lines = list[str]


def populations(protections: Sequence[ProtectionRecord]) -> tuple[Population, ...]:
    """Those that were attacked, in the order of the findings."""
    return tuple(dict.fromkeys(f.population for p in protections for f in p.findings))


def heading(moment: Moment, fpr: float) -> str:
    """Of a single column; ``fpr`` is the declared false positive rate."""
    return f"(TPR at {figures.rate_name(fpr)} FPR)" if moment is Moment.TRAINING else ""


def headings(moment: Moment, attacked: Sequence[Population], fpr: float) -> list[str]:
    """Of several columns."""
    if moment is Moment.TRAINING:
        rate = figures.rate_name(fpr)
        return ["lower bound\non ε", f"on text:\nTPR at {rate} FPR, AUC", "secrets\nranked first"]
    return [wording.population_title(population).lower() for population in attacked]


def columns(
    protection: ProtectionRecord, attacked: Sequence[Population], width: int
) -> list[Lines]:
    """The cells of one protection; a line longer than ``width`` breaks before its interval."""
    if protection.moment is Moment.TRAINING:
        return _training(protection)
    return [_block(protection.strongest(population), width) for population in attacked]


def stacked(protection: ProtectionRecord, attacked: Sequence[Population], width: int) -> Lines:
    """The same in a single cell."""
    cells = columns(protection, attacked, width)
    if protection.moment is Moment.TRAINING:
        bounds, text, secrets = cells
        return [*_joined(bounds), *text, *(f"secrets {line}" for line in secrets)]
    return [line for cell in cells for line in _joined(cell)]


def _training(protection: ProtectionRecord) -> list[Lines]:
    """Lines on ε, on text, and on secrets."""
    strongest, on_text = protection.strongest(), protection.strongest("text")
    secrets = protection.secrets
    return [
        [*_bound(strongest), _attack(strongest)] if strongest else [figures.NONE],
        [f"TPR {figures.share(on_text.tpr)}", f"AUC {figures.estimate(on_text.auc)}"]
        if on_text
        else [],
        [figures.share(secrets.estimate)] if secrets else [],
    ]


def _block(finding: FindingRecord | None, width: int) -> Lines:
    """Lines on one population."""
    if finding is None:
        return []
    attack = textwrap.wrap(_attack(finding), width)
    lines = [*_bound(finding), *attack] if finding.bounds_epsilon else attack
    for measure in wording.measures(finding):
        line = f"{measure.short} {measure.said}"
        lines += [line] if len(line) <= width else line.replace(" [", "\n[").split("\n")
        if measure.reference is not None:
            lines.append(f"(chance {figures.percent(measure.reference)})")
    return lines


def _bound(finding: FindingRecord) -> Lines:
    return [
        f"ε ≥ {figures.at_least(finding.lower_bound)}",
        f"(ceiling {figures.at_least(finding.ceiling)})",
    ]


def _attack(finding: FindingRecord) -> str:
    return f"{finding.attack}, {finding.population}"


def _joined(lines: Lines) -> Lines:
    """A bound with its ceiling on one line."""
    if len(lines) > 1 and lines[1].startswith("(ceiling"):
        return [" ".join(lines[:2]), *lines[2:]]
    return lines
