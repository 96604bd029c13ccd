"""The tables in the terminal: 80 columns suffice, colour is never needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attacks.report import wording
from attacks.report.findings import FindingRecord, Findings, ProtectionRecord
from attacks.threat import Status

WIDE = 120
"""Columns from which the measures stand side by side."""

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
        "✗": "x", "✓": "+", "○": "o", "“": '"', "”": '"', "×": "x", "→": "->",
    }
)  # fmt: skip

Say = Callable[[str], str]


def print_findings(findings: Findings, console: Console) -> None:
    """Print what was audited, the table, all attacks with controls, and how to read them."""
    say = _speaker(console)
    _print(console, Text(say(wording.headline(findings)), style="bold"))
    _print(console, "", Text(say(_audited(findings))), "")
    _print(console, _main_table(findings, say, width=console.width), "")
    _print(console, *(Padding(Text(say(line)), (0, 0, 0, 2)) for line in _why(findings)))
    _heading(console, say, "Every attack, with its controls")
    _print(console, "", _attack_table(findings, say, width=console.width))
    if any(protection.secrets for protection in findings.protections):
        _heading(console, say, "Planted secrets")
        _print(console, "", _secret_table(findings, say, width=console.width))
    _heading(console, say, "How to read this")
    _print(console, *_definitions(wording.reading(findings), say))
    _heading(console, say, "What is claimed")
    claims = [(p.name, wording.full_claim(p.claim)) for p in findings.protections]
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
    base = f"public base model {wording.estimate(findings.base_utility)} {findings.utility_unit}"
    return "Audited: " + " · ".join([*wording.counted(findings), base])


def _main_table(findings: Findings, say: Say, *, width: int) -> Table:
    table = _table()
    tpr = f"TPR at {wording.rate_name(findings.fpr)} FPR"
    measures = (
        ("lower bound\non ε", f"on text:\n{tpr}, AUC", "secrets\nranked first")
        if width >= WIDE
        else (f"measured leakage\n({tpr})",)
    )
    table.add_column("protection", overflow="fold")
    table.add_column("claim", overflow="fold", width=10)
    for heading in (*measures, "verdict", "bits/byte,\ntraining"):
        table.add_column(say(heading), overflow="fold", no_wrap=width >= NARROW)
    for protection in findings.protections:
        bounds, text, secrets = _leakage(protection)
        if width >= WIDE:
            leakage = [bounds, text, secrets]
        else:
            stacked = [" ".join(bounds[:2]), *bounds[2:], *text]
            leakage = [[*stacked, *(f"secrets {line}" for line in secrets)]]
        cells = [protection.name, wording.short_claim(protection.claim), *map("\n".join, leakage)]
        table.add_row(
            *(Text(say(cell)) for cell in cells),
            _verdict(protection, say),
            Text(say("\n".join(_price(protection)))),
        )
        table.add_section()
    return table


def _leakage(protection: ProtectionRecord) -> tuple[list[str], list[str], list[str]]:
    """Lines on ε, on text, and on secrets."""
    strongest, on_text = protection.strongest(), protection.strongest("text")
    secrets = protection.secrets
    return (
        [
            f"ε ≥ {wording.at_least(strongest.lower_bound)}",
            f"(ceiling {wording.at_least(strongest.ceiling)})",
            f"{strongest.attack}, {strongest.population}",
        ]
        if strongest
        else [wording.NONE],
        [f"TPR {wording.share(on_text.tpr)}", f"AUC {wording.estimate(on_text.auc)}"]
        if on_text
        else [],
        [wording.share(secrets.estimate)] if secrets else [],
    )


def _price(protection: ProtectionRecord) -> list[str]:
    """Lines on utility and time, 14 columns at most for usual values."""
    ends, change = protection.utility.interval, protection.utility_change
    return [
        wording.number(protection.utility.value),
        wording.interval(ends.low, ends.high),
        f"{wording.change(change)} {wording.better(change)}",
        wording.duration(protection.seconds),
    ]


def _verdict(protection: ProtectionRecord, say: Say) -> Text:
    """In lines of eleven columns at most."""
    said = wording.verdict(protection.status, protection.claim)
    word = said.word.replace(" claim", "\nclaim").replace("not ", "not\n")
    text = Text(say(f"{said.sign} {word}"), style=_COLOURS[protection.status])
    if said.note:
        text.append(say("\n" + said.note.replace(" ", "\n", 1)), style="default not bold")
    return text


def _why(findings: Findings) -> list[str]:
    said = [
        f"? {protection.name}, {concerned}: {why}."
        for protection in findings.protections
        for concerned, why in wording.reasons(protection)
    ]
    return said + [f"! {warning}" for warning in wording.warnings(findings)]


def _attack_table(findings: Findings, say: Say, *, width: int) -> Table:
    wide = width >= WIDE
    table = _table(gap=2 if wide else 1)
    no_wrap = width >= NARROW
    table.add_column(say("attack, population"), overflow="fold", no_wrap=no_wrap)
    headings = ["ε ≥", "ceiling", "AUC", "blind AUC", "p"]
    if wide:
        headings += [f"TPR at {wording.rate_name(findings.fpr)} FPR", "verdict"]
    for heading in headings:
        justify: JustifyMethod = "left" if heading == "verdict" else "right"
        table.add_column(say(heading), justify=justify, overflow="fold", no_wrap=no_wrap)
    for protection in findings.protections:
        table.add_section()
        table.add_row(Text(say(protection.name), style="bold"))
        for finding in protection.findings:
            if finding.population != "secrets":
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
        wording.at_least(finding.lower_bound),
        wording.at_least(finding.ceiling),
        wording.estimate(finding.auc),
        wording.NONE
        if blind is None
        else f"{wording.number(blind.value)} {wording.interval(blind.low, blind.high)}",
        wording.number(None if shuffled is None else shuffled.p_value, 3),
    ]
    row = [first, *(Text(say(cell)) for cell in cells)]
    if wide:
        row += [
            Text(say(wording.share(finding.tpr))),
            Text(say(said.word), style=_COLOURS[finding.status]),
        ]
    return row


def _secret_table(findings: Findings, say: Say, *, width: int) -> Table:
    table = _table()
    table.add_column("protection", overflow="fold")
    for heading in ("ranked first", "exposure, bits", "not planted,\nbits", "public model,\nbits"):
        no_wrap = width >= NARROW
        table.add_column(say(heading), justify="right", overflow="fold", no_wrap=no_wrap)
    for protection in findings.protections:
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
            Text(say(wording.share(finding.estimate))),
            Text(say(wording.estimate(finding.exposure, 1))),
            *(Text(wording.number(None if c is None else c.value, 1)) for c in (absent, public)),
        )
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
