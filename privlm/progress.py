"""Progress of anything that takes longer than two seconds, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Show(Protocol):
    """Told how far something has come."""

    def __call__(self, done: int, note: str = "") -> None:
        """So many steps are done; ``note`` says what there is to say, and stays until the next."""
        ...


Watch = Callable[[str, int], AbstractContextManager[Show]]
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
def _silent(what: str, steps: int) -> Iterator[Show]:
    def show(done: int, note: str = "") -> None:
        pass

    yield show


@contextmanager
def _bar(what: str, steps: int) -> Iterator[Show]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(what, total=steps)

        def show(done: int, note: str = "") -> None:
            said = f"{what}, {note}" if note else None
            progress.update(task, completed=done, description=said)

        yield show


@contextmanager
def _lines(what: str, steps: int) -> Iterator[Show]:
    started = last = time.monotonic()
    said = ""
    print(f"{what}: {steps} steps" if steps > 1 else what, file=sys.stderr, flush=True)

    def show(done: int, note: str = "") -> None:
        nonlocal last, said
        said = f", {note}" if note else said
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done < steps:
            last = time.monotonic()
            print(f"{what}: {done}/{steps}{said}", file=sys.stderr, flush=True)

    yield show
    print(f"{what}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
