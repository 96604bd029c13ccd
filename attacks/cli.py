"""``privlm audit``: registered with the command line by entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    suite: Annotated[
        Path | None, typer.Argument(help="YAML file; the default suite if none is named.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report; made if missing.")] = Path(
        "audit"
    ),
    strict: Annotated[
        bool, typer.Option("--strict", help="A claim that could not be tested fails, too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print findings.json and nothing else.")
    ] = False,
) -> None:
    """Run training, aggregation and inference under each protection, and attack what is seen.

    Exits with 1 when a measurement exceeds what a protection claims; with --strict also when
    a claim could not be tested.
    """
    from attacks.report import write_report
    from attacks.suite import load_suite, run_suite
    from attacks.targets import watching

    config = load_suite(suite)
    out.mkdir(parents=True, exist_ok=True)
    result = run_suite(config, ledger_dir=out / "ledgers", watch=watching(quiet=as_json))
    write_report(result, out, as_json=as_json)
    failed = result.exceeds_claim or (strict and result.has_untested_claim)
    raise typer.Exit(1 if failed else 0)
