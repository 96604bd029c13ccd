"""The report of an audit: a table in the terminal and a set of files.

``findings.json``  everything measured, for machines and for :func:`read_findings`
``report.html``    the same on one page, for people and for paper
``records.csv``    scores of single records, under names that only the key's holder can link
``records.key``    that key; keep it with the data, apart from the other files

The last two are written where a training was attacked; without one there are no such scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from attacks.report.conversion import findings_of
from attacks.report.files import File, ReportNotWritten, write_together
from attacks.report.findings import Findings, FindingsUnreadable, read_findings, to_json
from attacks.report.html import report_html
from attacks.report.records import (
    NotARecordKey,
    key_file,
    read_key,
    record_name,
    records_csv,
)
from attacks.report.terminal import print_findings, print_places
from attacks.suite import SuiteResult
from attacks.targets import secret_key

__all__ = [
    "Findings",
    "FindingsUnreadable",
    "NotARecordKey",
    "ReportFiles",
    "ReportNotWritten",
    "findings_of",
    "print_findings",
    "read_findings",
    "read_key",
    "record_name",
    "report_html",
    "to_json",
    "write_report",
]

OWNER_ONLY = 0o600


@dataclass(frozen=True)
class ReportFiles:
    """Where the files of one report lie."""

    findings: Path
    html: Path
    records: Path
    key: Path

    @classmethod
    def within(cls, folder: Path) -> ReportFiles:
        """Their places in ``folder``, whether or not they are there."""
        names = ("findings.json", "report.html", "records.csv", "records.key")
        return cls(*(folder / name for name in names))


def write_report(
    result: SuiteResult, out: Path, console: Console | None = None, *, as_json: bool = False
) -> ReportFiles:
    """Print the table, or ``findings.json`` instead, and write the report's files, all or none.

    A closed pipe costs the table and not the files; a full disk costs the files and not the table.

    Args:
        result: what the audit found.
        out: the folder of the files; made if missing.
        console: where to print; standard output if none is given.
        as_json: print ``findings.json`` and nothing else.

    Raises:
        ReportNotWritten: names the path and what the system said; older files stand.
    """
    console = Console() if console is None else console
    findings = findings_of(result)
    encoded = to_json(findings)
    places = ReportFiles.within(out)
    files = [File(places.findings.name, encoded), File(places.html.name, report_html(findings))]
    gone: list[str] = []
    if result.record_ids:
        key = secret_key("names of records")
        files += [
            File(places.records.name, records_csv(result, key), OWNER_ONLY),
            File(places.key.name, key_file(key), OWNER_ONLY),
        ]
    else:
        gone = [places.records.name, places.key.name]
    failure: ReportNotWritten | None = None
    try:
        write_together(out, files, gone)
    except ReportNotWritten as error:
        failure = error
    if as_json:
        _print_json(encoded, console)
    else:
        print_findings(findings, console)
    if failure is not None:
        raise failure
    if not as_json:
        said = {
            places.html: "this audit on one page",
            places.findings: "the same for machines",
            places.records: "scores of single records; for their owner alone",
            places.key: "links names in records.csv to record ids; keep it apart",
        }
        written = {file.name for file in files}
        print_places([(str(p), what) for p, what in said.items() if p.name in written], console)
    return places


def _print_json(encoded: bytes, console: Console) -> None:
    """As bytes where the file takes them: JSON is UTF-8 whatever the terminal speaks."""
    stream = console.file
    binary = getattr(stream, "buffer", None)
    if binary is None:
        stream.write(encoded.decode("utf-8"))
    else:
        stream.flush()
        binary.write(encoded)
    stream.flush()
