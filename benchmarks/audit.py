"""How long the default audit takes, in how much memory, and what it prints.

With ``--readme`` the table in README.md is replaced by the one just printed.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import ROOT, arguments, report

WANTED_SECONDS = 300
MARKS = ("<!-- audit: begin -->", "<!-- audit: end -->")
COLUMNS = 100


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = arguments(__doc__ or "", parser)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [Path(sys.executable).with_name("privlm"), "audit", "--out", folder],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"},
        )
        seconds = time.perf_counter() - started
        findings = json.loads((Path(folder) / "findings.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    rows = [
        {
            "moment": row["moment"],
            "protection": row["name"],
            "status": row["status"],
            "seconds": row["cost"]["seconds"],
            "sent_bytes": row["cost"]["sent_bytes"],
            "per": row["cost"]["unit"],
            "utility": row["utility"]["estimate"]["value"],
            "utility_unit": row["utility"]["unit"],
        }
        for row in findings["protections"]
    ]
    lines = [
        f"default audit, one run: {seconds:.0f} s, peak memory {peak / 2**20:.0f} MiB",
        *(
            f"  {row['moment']:12}{row['protection']:24}{row['seconds']:10.4g} s"
            f"{row['sent_bytes'] or 0:12,.0f} B a {row['per']:18}"
            f"{row['utility']:10.4g} {row['utility_unit']:26}{row['status']}"
            for row in rows
        ),
        f"wanted under {WANTED_SECONDS} s: {'reached' if seconds < WANTED_SECONDS else 'MISSED'}",
    ]
    results = {
        "wanted_s": WANTED_SECONDS,
        "reached": seconds < WANTED_SECONDS,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "protections": rows,
    }
    if options.readme:
        _put_into_readme(done.stdout)
    report("audit", options, ["torch", "opacus", "dp-accounting"], results, "\n".join(lines))


def _put_into_readme(printed: str) -> None:
    """Up to the first line that speaks of single attacks."""
    table = printed.split("Every attack, with its controls", maxsplit=1)[0].rstrip()
    page = ROOT / "README.md"
    begin, end = MARKS
    block = f"{begin}\n```text\n{table}\n```\n{end}"
    page.write_text(
        re.sub(
            re.escape(begin) + ".*?" + re.escape(end),
            lambda _: block,
            page.read_text(),
            flags=re.DOTALL,
        )
    )


if __name__ == "__main__":
    main()
