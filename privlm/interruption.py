"""Stopping a run after the step in progress: Ctrl-C, SIGTERM, and what is saved then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the step in progress was finished and checkpointed."""


@contextmanager
def checkpointing(save: Callable[[int], None], every: int, steps: int) -> Iterator[Keep]:
    """Save every few steps, at the end, and when a signal asks to stop after this step.

    A second signal stops at once; the last checkpoint and the ledger then decide.

    Args:
        save: writes a checkpoint after so many steps.
        every: steps from one to the next.
        steps: of the run.

    Raises:
        Interrupted: on leaving, if a signal came after the last step.
    """
    asked = False
    interrupted = Interrupted(
        "interrupted after the step in progress, which was saved; add --resume to go on"
    )

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        _restore(previous)

    def keep(step: int) -> None:
        if asked or is_due(step, every, steps):
            save(step)
        if asked:
            raise interrupted

    previous = _handle(ask)
    try:
        yield keep
    finally:
        _restore(previous)
    if asked:
        raise interrupted


Keep = Callable[[int], None]
"""Told after every step; may save, and may raise :class:`Interrupted`."""


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether a checkpoint stands after ``step`` steps, whatever else happens."""
    return step % every == 0 or step == steps


Handlers = dict[signal.Signals, Any]
"""A signal and what handled it before."""


def _handle(handler: Callable[[int, object], None]) -> Handlers:
    """Catch SIGINT and SIGTERM, unless the process was started to ignore them.

    Signals belong to the main thread: in another one, nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught = {n: old for n, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for number in caught:
        signal.signal(number, handler)
    return caught


def _restore(previous: Handlers) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
