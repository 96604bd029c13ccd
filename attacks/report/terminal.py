"""The tables in the terminal: 80 columns suffice, colour is never needed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator

from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attacks.report import figures, leakage, wording
from attacks.report.findings import FindingRecord, Findings, ProtectionRecord
from attacks.report.reading import reading
from attacks.threat import Moment, Status

WIDE = 120
"""Columns from which the measures stand side by side."""

CLAIM_WIDTH, PRICE_WIDTH, WIDE_CELL = 10, 12, 20
"""Columns for a claim, for utility and cost, and for leakage in one of several cells."""

ROOMY = 96
"""Columns from which a share and its interval fit on one line."""

NARROW = 78
"""Columns below which numbers may break across lines; none is cut off."""

_COLOURS = {
    Status.LEAK: "bold red",
    Status.WITHIN_CLAIM: "green",
    Status.NO_EVIDENCE: "green",
    Status.NOT_APPLICABLE: "dim",
    Status.NOT_EVALUABLE: "yellow",
}
_ASCII = str.maketrans(
    {
        "ε": "eps", "δ": "delta", "≥": ">=", "≤": "<=", "∞": "inf", "−": "-", "–": "-", "·": ",",
        "✗": "x", "✓": "+", "○": "o", "“": '"', "”": '"', "×": "x", "→": "->", "µ": "u",
    }
)  # fmt: skip

Say = Callable[[str], str]
Protections = tuple[ProtectionRecord, ...]


def print_findings(findings: Findings, console: Console) -> None:
    """Print what was audited, the table, all attacks with controls, and how to read them."""
    say, width = _speaker(console), console.width
    moments = findings.moments()
    _print(console, Text(say(wording.headline(findings)), style="bold"))
    _print(console, "", Text(say(_audited(findings))), "")
    _print(console, _main_table(findings, say, width=width), "")
    _print(console, *(Padding(Text(say(line)), (0, 0, 0, 2)) for line in _why(findings)))
    _heading(console, say, "Every attack, with its controls")
    for moment, protections in moments:
        _print(console, "", Text(say(f"{moment.upper()}: {wording.danger(moment)}")), "")
        table = _membership_table if moment is Moment.TRAINING else _recovery_table
        _print(console, table(findings, protections, say, width=width))
        if any(protection.secrets for protection in protections):
            _heading(console, say, "Planted secrets")
            _print(console, "", _secret_table(protections, say, width=width))
        if any(protection.engine for protection in protections):
            _heading(console, say, "What the engine did, over what is claimed of it")
            _print(console, "", _engine_table(protections, say, width=width))
    _heading(console, say, "How to read this")
    _print(console, *_definitions(reading(findings), say))
    _heading(console, say, "What is claimed")
    claims = [(p.name, wording.full_claim(p.claim)) for _, ps in moments for p in ps]
    _print(console, *_definitions(claims, say))


def print_places(places: Iterable[tuple[str, str]], console: Console) -> None:
    """Print where the files lie: (path, what it is)."""
    say = _speaker(console)
    _heading(console, say, "Files")
    for path, what in places:
        _print(console, Text.assemble("  ", say(path), (say(f"  {what}"), "dim")))


def _heading(console: Console, say: Say, text: str) -> None:
    _print(console, "", Text(say(text), style="bold"))


def _print(console: Console, *lines: RenderableType) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, emoji=False, crop=False)


def _speaker(console: Console) -> Say:
    """What the console's encoding can say; control characters never reach it."""
    ascii_only = console.options.ascii_only

    def say(text: str) -> str:
        text = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
        return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text

    return say


def _audited(findings: Findings) -> str:
    base = findings.base_utility
    said = f"public base model {figures.estimate(base.estimate)} {base.unit}"
    return "Audited: " + " · ".join([*wording.counted(findings), said])


def _main_table(findings: Findings, say: Say, *, width: int) -> Table:
    wide, table = width >= WIDE, _table()
    moments = [(m, ps, leakage.populations(ps)) for m, ps in findings.moments()]
    headings = {m: leakage.headings(m, attacked, findings.fpr) for m, _, attacked in moments}
    count = max(map(len, headings.values())) if wide else 1
    table.add_column("protection", overflow="fold")
    table.add_column("claim", overflow="fold", width=CLAIM_WIDTH)
    for heading in ("measured leakage", *[""] * (count - 1), "verdict", "utility,\ntime, bytes"):
        table.add_column(say(heading), overflow="fold", no_wrap=width >= NARROW)
    for moment, protections, attacked in moments:
        above = headings[moment] if wide else [leakage.heading(moment, findings.fpr)]
        above += [""] * (count - len(above))
        units = _units(protections)
        _add_row(table, say, moment.upper(), "", *above, "", "\n".join(units))
        for protection in protections:
            cells = (
                leakage.columns(protection, attacked, WIDE_CELL)
                if wide
                else [leakage.stacked(protection, attacked, 24 if width < ROOMY else 30)]
            )
            cells += [[]] * (count - len(cells))
            _add_row(
                table,
                say,
                protection.name,
                wording.short_claim(protection.claim),
                *map("\n".join, cells),
                _verdict(protection, say),
                "\n".join(_price(protection, with_units=not units)),
            )
            table.add_section()
    return table


def _add_row(table: Table, say: Say, *cells: str | Text) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(say(cell)) for cell in cells))


def _units(protections: Protections) -> list[str]:
    """Lines on the units of utility and cost that all these protections share; none if not."""
    said = {(p.utility.unit, p.cost.unit): _unit_lines(p) for p in protections}
    return next(iter(said.values())) if len(said) == 1 else []


def _unit_lines(protection: ProtectionRecord) -> list[str]:
    unit = wording.short_unit(protection.utility.unit)
    return [*_wrapped(f"{unit},"), *_wrapped(wording.per(protection.cost))]


def _price(protection: ProtectionRecord, *, with_units: bool) -> list[str]:
    """Lines on utility and cost, 12 columns at most for usual values."""
    utility, cost = protection.utility, protection.cost
    value, interval = figures.amount(utility.estimate)
    spent = [figures.duration(cost.seconds), figures.traffic(cost.sent_bytes)]
    together = ", ".join(spent)
    return [
        *(_unit_lines(protection) if with_units else []),
        value,
        *([interval] if interval else []),
        *([figures.change(utility)] if utility.baseline is not None else []),
        *([together] if len(together) <= PRICE_WIDTH else [f"{spent[0]},", spent[1]]),
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, PRICE_WIDTH, break_on_hyphens=False)


def _verdict(protection: ProtectionRecord, say: Say) -> Text:
    """In lines of eleven columns at most."""
    said = wording.verdict(protection.status, protection.claim)
    word = said.word.replace(" claim", "\nclaim").replace("not ", "not\n").replace("no ", "no\n")
    text = Text(say(f"{said.sign} {word}"), style=_COLOURS[protection.status])
    if said.note:
        text.append(
            say("\n" + said.note.replace(" was", "\nwas").replace("than ", "than\n")),
            style="default not bold",
        )
    return text


def _why(findings: Findings) -> list[str]:
    said = [
        f"? {protection.name}, {concerned}: {why}."
        for protection in findings.protections
        for concerned, why in wording.reasons(protection)
    ]
    return said + [f"! {warning}" for warning in wording.warnings(findings)]


def _membership_table(
    findings: Findings, protections: Protections, say: Say, *, width: int
) -> Table:
    wide = width >= WIDE
    table = _table(gap=2 if wide else 1)
    no_wrap = width >= NARROW
    table.add_column(say("attack, population"), overflow="fold", no_wrap=no_wrap)
    headings = ["ε ≥", "ceiling", "AUC", "blind AUC", "p"]
    if wide:
        headings += [f"TPR at {figures.rate_name(findings.fpr)} FPR", "verdict"]
    for heading in headings:
        justify: JustifyMethod = "left" if heading == "verdict" else "right"
        table.add_column(say(heading), justify=justify, overflow="fold", no_wrap=no_wrap)
    for protection in protections:
        table.add_section()
        table.add_row(Text(say(protection.name), style="bold"))
        for finding in protection.findings:
            if finding.population not in ("secrets", "engine"):
                table.add_row(*_attack_row(finding, protection, say, wide=wide))
    return table


def _attack_row(
    finding: FindingRecord, protection: ProtectionRecord, say: Say, *, wide: bool
) -> list[Text]:
    said = wording.verdict(finding.status, protection.claim)
    blind, shuffled = finding.control("AUC of a blind"), finding.control("AUC under permuted")
    first = Text(say(f"{said.sign} "), style=_COLOURS[finding.status])
    first.append(say(f"{finding.attack}, {finding.population}"), style="default not bold")
    cells = [
        figures.at_least(finding.lower_bound),
        figures.at_least(finding.ceiling),
        figures.estimate(finding.auc),
        figures.NONE
        if blind is None
        else f"{figures.number(blind.value)} {figures.interval(blind.low, blind.high)}",
        figures.number(None if shuffled is None else shuffled.p_value, 3),
    ]
    row = [first, *(Text(say(cell)) for cell in cells)]
    if wide:
        row += [
            Text(say(figures.share(finding.tpr))),
            Text(say(said.word), style=_COLOURS[finding.status]),
        ]
    return row


def _recovery_table(_: Findings, protections: Protections, say: Say, *, width: int) -> Table:
    """Attack by attack: what it shows, and below it what that must be read against."""
    table, no_wrap = _table(), width >= NARROW
    for heading in ("attack, population", "measured", "n"):
        justify: JustifyMethod = "left" if heading.startswith("attack") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=no_wrap)
    for protection in protections:
        table.add_section()
        _add_row(table, say, Text(say(protection.name), style="bold"))
        for finding in protection.findings:
            said = wording.verdict(finding.status, protection.claim)
            first = Text(say(f"{said.sign} "), style=_COLOURS[finding.status])
            first.append(say(f"{finding.attack}, {finding.population}"), style="default not bold")
            table.add_row(
                first, Text(say(said.word), style=_COLOURS[finding.status]), f"{finding.n:,}"
            )
            for name, figure in _figures(finding):
                _add_row(table, say, textwrap.indent(textwrap.fill(name, 44), "    "), figure)
    return table


def _figures(finding: FindingRecord) -> Iterator[tuple[str, str]]:
    if finding.bounds_epsilon:
        ceiling = figures.at_least(finding.ceiling)
        yield finding.metric, f"ε ≥ {figures.at_least(finding.lower_bound)} (ceiling {ceiling})"
    for measure in wording.measures(finding):
        yield measure.name, measure.said
    for name, figure in wording.yardsticks(finding):
        yield f"against: {name}", figure


def _secret_table(protections: Protections, say: Say, *, width: int) -> Table:
    table = _table()
    table.add_column("protection", overflow="fold")
    for heading in ("ranked first", "exposure, bits", "not planted,\nbits", "public model,\nbits"):
        no_wrap = width >= NARROW
        table.add_column(say(heading), justify="right", overflow="fold", no_wrap=no_wrap)
    for protection in protections:
        finding = protection.secrets
        if finding is None:
            continue
        absent = finding.control("exposure of secrets not planted")
        public = finding.control("exposure under the public model")
        said = wording.verdict(finding.status, protection.claim)
        first = Text(say(f"{said.sign} "), style=_COLOURS[finding.status])
        first.append(say(protection.name), style="default not bold")
        table.add_row(
            first,
            Text(say(figures.share(finding.estimate))),
            Text(say(figures.estimate(finding.exposure, 1))),
            *(Text(figures.number(None if c is None else c.value, 1)) for c in (absent, public)),
        )
    return table


def _engine_table(protections: Protections, say: Say, *, width: int) -> Table:
    table, no_wrap = _table(), width >= NARROW
    table.add_column("protection", overflow="fold")
    table.add_column("of 1", justify="right", overflow="fold", no_wrap=no_wrap)
    for protection in protections:
        finding = protection.engine
        if finding is None:
            continue
        said = wording.verdict(finding.status, protection.claim)
        first = Text(say(f"{said.sign} "), style=_COLOURS[finding.status])
        first.append(say(protection.name), style="default not bold")
        table.add_section()
        table.add_row(first, Text(say(said.word), style=_COLOURS[finding.status]))
        for name, figure in wording.laws(finding):
            _add_row(table, say, textwrap.indent(textwrap.fill(name, 44), "    "), figure)
    return table


def _definitions(pairs: Iterable[tuple[str, str]], say: Say) -> list[RenderableType]:
    return [
        Padding(Text.assemble((say(term), "bold"), say(f": {meaning}")), (0, 0, 0, 2))
        for term, meaning in pairs
    ]


def _table(gap: int = 2) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, gap - 1, 0, 0),  # the box adds one
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        leading=0,
    )
