"""Progress of anything that takes longer than two seconds, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what happens, how many steps) -> a context giving a callback for the steps done."""

SECONDS_BETWEEN_LINES = 10.0


def watching(*, quiet: bool = False) -> Watch:
    """A bar on a terminal, a line now and then in a log, nothing when ``quiet``.

    Standard output stays free for results either way.
    """
    if quiet:
        return _silent
    return _bar if sys.stderr.isatty() else _lines


@contextmanager
def _silent(what: str, steps: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@contextmanager
def _bar(what: str, steps: int) -> Iterator[Callable[[int], None]]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(what, total=steps)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def _lines(what: str, steps: int) -> Iterator[Callable[[int], None]]:
    started = last = time.monotonic()
    print(f"{what}: {steps} steps" if steps > 1 else what, file=sys.stderr, flush=True)

    def show(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done < steps:
            last = time.monotonic()
            print(f"{what}: {done}/{steps}", file=sys.stderr, flush=True)

    yield show
    print(f"{what}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
