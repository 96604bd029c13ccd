"""What every benchmark shares: timing, the facts that make a figure repeatable, and the report."""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]


def arguments(description: str, parser: argparse.ArgumentParser | None = None) -> Any:
    """Parse the command line that all benchmarks have, and what `parser` adds to it."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--runs", type=int, default=7, help="timed runs, at least 5")
    parser.add_argument("--no-save", action="store_true", help="write no file under results/")
    parsed = parser.parse_args()
    if parsed.runs < 5:
        parser.error("a median needs at least 5 runs")
    return parsed


def time_runs(action: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each of `runs` runs, after one that warms up."""
    action()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": len(seconds),
    }


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """Greatest growth of the resident set inside the block, in bytes, sampled every millisecond."""

    extra_bytes = 0

    def __enter__(self) -> "PeakMemory":
        self._before = _resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.extra_bytes = max(self.extra_bytes, _resident_bytes() - self._before)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return {
        "processor": model.group(1).strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit that was measured, marked if the tree differs from it; None before the first."""
    head = _git("rev-parse", "HEAD")
    return (
        f"{head}+changes"
        if head and _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        else head
    )


def report(
    question: str, options: Any, packages: Sequence[str], results: dict[str, Any], table: str
) -> None:
    """Print the results, and save them under results/ unless told not to."""
    facts = machine()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = {
        "question": question,
        "date": today,
        "machine": facts,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "results": results,
    }
    text = json.dumps(content, indent=1)
    print(text if options.json else table)
    if not options.no_save:
        words = re.findall(r"[a-z0-9]+", facts["processor"].lower())
        hardware = "-".join([*words[:4], f"{facts['cores']}c"])
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{today}-{hardware}-{question}.json"
        path.write_text(text + "\n")
        if not options.json:
            print(f"\nsaved as {path.relative_to(ROOT)}")
