"""What a private run notes about each of its steps, and how a repeated step proves to be the same.

``steps.jsonl`` is private: loss, number of examples and clipping follow from the data without
noise. Its first line says what of it may be published.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from privlm.dp.accounting import epsilon_of
from privlm.dp.plan import Plan
from privlm.dp.releases import Releases
from protocols.files import write_atomically

NOTE = (
    "Private, all of it but these, which follow from public parameters and released values alone: "
    "step, max_grad_norm and epsilon; and from run.json's plan: steps, noise_multiplier, "
    "expected_batch_size and the sampler. Everything else is computed from the data without noise."
)


FIRST_ACCOUNTING_S = 5.0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of ``steps.jsonl``.

    Attributes:
        step: its number, from 0.
        max_grad_norm: the clipping bound.
        loss: mean over the batch before the step, nats a token; 0 if the batch was empty.
        examples: how many the batch held.
        clipped: share of them that were clipped; 0 if there were none.
        seconds: since the step before.
        examples_per_second, tokens_per_second: of this step; padding counts as tokens.
        epsilon: spent by this run so far, where it was worked out.
        release: SHA-256 of what was released, where the step may be repeated.
    """

    step: int
    max_grad_norm: float
    loss: float
    examples: int
    clipped: float
    seconds: float
    examples_per_second: float
    tokens_per_second: float
    epsilon: float | None = None
    release: str | None = None


class StepLog:
    """Appends a line a step; what it holds from ``start`` on is forgotten, but for its digests.

    Args:
        path: the file; made for its owner alone.
        start: the first step that is to be taken now.
        tokens: of an example, padding included.
    """

    def __init__(self, path: Path, start: int, tokens: int) -> None:
        earlier = _read(path)
        self.digests = {line.step: line.release for line in earlier if line.release is not None}
        kept = [msgspec.json.encode(line) for line in earlier if line.step < start]
        heading = msgspec.json.encode({"note": NOTE})
        write_atomically(path, b"".join(line + b"\n" for line in (heading, *kept)))
        self._path = path
        self._tokens = tokens
        self._last = time.perf_counter()

    def write(self, releases: Releases, *, epsilon: float | None, release: str | None) -> None:
        """Note the step that was just released.

        Raises:
            OSError: with ``path`` as its filename.
        """
        report = releases.report
        assert report is not None  # there is a step
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = report.examples / max(seconds, 1e-9)
        line = Step(
            step=report.step,
            max_grad_norm=report.max_grad_norm,
            loss=report.loss,
            examples=report.examples,
            clipped=(report.examples - report.unclipped) / max(1, report.examples),
            seconds=seconds,
            examples_per_second=rate,
            tokens_per_second=rate * self._tokens,
            epsilon=epsilon,
            release=release,
        )
        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class Meter:
    """ε of a run so far, worked out rarely enough to cost at most a twentieth of the time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._due = time.perf_counter() + FIRST_ACCOUNTING_S

    def after(self, steps: int) -> float | None:
        """ε of the first ``steps`` steps; None if it is not due."""
        started = time.perf_counter()
        if started < self._due:
            return None
        plan = self._plan
        epsilon = epsilon_of(plan.event(steps), plan.delta, plan.neighbours).value
        ended = time.perf_counter()
        self._due = ended + 20 * (ended - started)
        return epsilon


def _read(path: Path) -> list[Step]:
    """The whole lines of an earlier process; a torn last one is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for text in data.split(b"\n")[1:]:
        try:
            lines.append(msgspec.json.decode(text, type=Step))
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
    return lines
