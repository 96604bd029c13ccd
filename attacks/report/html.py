"""``report.html``: the audit on one page that needs nothing else to be read or printed."""

from __future__ import annotations

import datetime
import json
from importlib import resources
from typing import Any

import jinja2

from attacks.report import curves, wording
from attacks.report.findings import EstimateRecord, FindingRecord, Findings, ProtectionRecord

TEMPLATE = "report.html.j2"


def report_html(findings: Findings) -> bytes:
    """Render the page; every value is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        at_least=wording.at_least,
        change=wording.change,
        better=wording.better,
        duration=wording.duration,
        estimate=wording.estimate,
        share=wording.share,
        number=wording.number,
        rate_name=wording.rate_name,
    )
    text = resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8")
    page = environment.from_string(text).render(_context(findings))
    return page.encode("utf-8")


def _context(findings: Findings) -> dict[str, Any]:
    scale = curves.epsilon_scale(findings)
    areas = [
        area.interval.low
        for protection in findings.protections
        for finding in protection.findings
        if (area := finding.auc) is not None and area.interval.low is not None
    ]
    start = min(0.4, *areas, 1.0) if areas else 0.4

    def epsilon_bar(finding: FindingRecord, protection: ProtectionRecord) -> curves.Bar:
        return curves.epsilon_bar(finding, protection, scale)

    def auc_bar(low: float | None, value: float | None, high: float | None) -> curves.Bar:
        return curves.interval_bar(low, value, high, start=start, end=1.0, chance=0.5)

    def share_bar(estimate: EstimateRecord, chance: float | None) -> curves.Bar:
        ends = estimate.interval
        return curves.interval_bar(
            ends.low, estimate.value, ends.high, start=0.0, end=1.0, chance=chance
        )

    return {
        "findings": findings,
        "headline": wording.headline(findings),
        "started": _date(findings.started),
        "counted": wording.counted(findings),
        "panels": curves.panels(findings),
        "reading": wording.reading(findings),
        "warnings": wording.warnings(findings),
        "verdict": wording.verdict,
        "short_claim": wording.short_claim,
        "interval": wording.interval,
        "reasons": wording.reasons,
        "main_reason": wording.main_reason,
        "population_title": wording.population_title,
        "epsilon_bar": epsilon_bar,
        "auc_bar": auc_bar,
        "share_bar": share_bar,
        "config": json.dumps(findings.config, indent=2, ensure_ascii=False, allow_nan=False),
    }


def _date(started: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(started)
    except ValueError:
        return started
    zone = " UTC" if moment.utcoffset() == datetime.timedelta(0) else ""
    return f"{moment:%d %B %Y, %H:%M}{zone}"
