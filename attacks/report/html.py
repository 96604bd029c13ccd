"""``report.html``: the audit on one page that needs nothing else to be read or printed."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from attacks.report import curves, figures, leakage, wording
from attacks.report.findings import EstimateRecord, FindingRecord, Findings, ProtectionRecord
from attacks.report.reading import reading
from attacks.scoring import secrecy
from attacks.threat import Moment, Population

TEMPLATE = "report.html.j2"


def report_html(findings: Findings) -> bytes:
    """Render the page; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        at_least=figures.at_least,
        duration=figures.duration,
        estimate=figures.estimate,
        number=figures.number,
        percent=figures.percent,
        rate_name=figures.rate_name,
        sentence=_sentence,
        share=figures.share,
        traffic=figures.traffic,
    )
    environment.globals.update(_said(), **_bars(findings))
    page = environment.get_template(TEMPLATE).render(_context(findings))
    return page.encode("utf-8")


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _said() -> dict[str, Any]:
    """The words that the page shares with the terminal."""
    return {
        "all_reasons": wording.all_reasons,
        "amount": figures.amount,
        "baseline": wording.baseline,
        "change": figures.change,
        "danger": wording.danger,
        "interval": figures.interval,
        "laws": wording.laws,
        "main_head": _main_head,
        "measures": wording.measures,
        "per": wording.per,
        "population_title": wording.population_title,
        "populations": leakage.populations,
        "reasons": wording.reasons,
        "short_claim": wording.short_claim,
        "verdict": wording.verdict,
        "yardsticks": wording.yardsticks,
    }


def _bars(findings: Findings) -> dict[str, Any]:
    """Bars on scales that all protections share."""
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

    return {"epsilon_bar": epsilon_bar, "auc_bar": auc_bar, "share_bar": share_bar}


def _context(findings: Findings) -> dict[str, Any]:
    numbers = itertools.count(1)
    attacked = leakage.populations(findings.protections)
    return {
        "findings": findings,
        "headline": wording.headline(findings),
        "started": _date(findings.started),
        "counted": wording.counted(findings),
        "moments": [
            (moment, [(next(numbers), protection) for protection in protections])
            for moment, protections in findings.moments()
        ],
        "panels": curves.panels(findings),
        "reading": reading(findings),
        "warnings": wording.warnings(findings),
        "trains": any(p.moment is Moment.TRAINING for p in findings.protections),
        "recovers": not {"texts", "uploads", "prompts"}.isdisjoint(attacked),
        "tells_apart": "requests" in attacked,
        "watched": "gradients" in attacked,
        "rule": secrecy,
        "promises_nothing_leaks": any(p.claim.nothing_leaks for p in findings.protections),
        "config": json.dumps(findings.config, indent=2, ensure_ascii=False, allow_nan=False),
    }


def _main_head(moment: Moment, attacked: Sequence[Population]) -> list[str]:
    measured = (
        ["lower bound on ε", "membership of text records", "secrets ranked first"]
        if moment is Moment.TRAINING
        else [wording.population_title(population).lower() for population in attacked]
    )
    return ["protection", "claim", *measured, "verdict", "utility", "time, bytes"]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _date(started: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(started)
    except ValueError:
        return started
    zone = " UTC" if moment.utcoffset() == datetime.timedelta(0) else ""
    return f"{moment:%d %B %Y, %H:%M}{zone}"
