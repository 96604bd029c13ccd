"""From clipped sums to gradients: recorded, then noised, then normalised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from privlm.dp.canaries import GradientCanaries
from privlm.dp.clipping import MIN_GRAD_NORM, AdaptiveClipping, ClippedSum
from privlm.dp.factorization import CorrelatedNoise
from privlm.dp.ledger import Ledger
from privlm.dp.noise import Release, noised
from privlm.dp.plan import Plan
from protocols.randomness import Stream

if TYPE_CHECKING:
    from privlm.dp.distributed import SharedLedger


class BudgetSpent(ValueError):
    """One more step would exceed the guarantee that the plan gives."""


class ReplayDiffers(ValueError):
    """Two releases of one step under one noise would reveal the difference of their sums."""


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did. Private, but for ``step`` and ``max_grad_norm``: publish nothing else.

    Attributes:
        step: its number, from 0.
        examples: how many the batch held; depends on the data through the secret sampling.
        loss: mean per-example loss before the step; 0 for an empty batch.
        unclipped: how many examples kept their gradient whole.
        max_grad_norm: the bound; under adaptive clipping made from released values alone.
    """

    step: int
    examples: int
    loss: float
    unclipped: int
    max_grad_norm: float


class Releases:
    """The one way from a :class:`ClippedSum` to a gradient that may leave; one object a run.

    Each release is written to the ledger first. A step that the ledger counts already (a run that
    goes on from a checkpoint, with the same ``stream``) is made again from the same batch and
    noise, and not counted twice; without the same stream the caller starts behind such steps.

    Args:
        plan: the public parameters.
        ledger: the data set's record.
        run: this run's name in it.
        stream: secret randomness of the run; sampling and noise use children of it.
        start: the first step to release; by default the one behind those on the ledger.
        released: the :attr:`digest` of each release that was made before, by step; empty at first.
            For runs that may make steps again: a digest is to be kept before anything is made of
            its release. None computes no digests, which would cost as much as the noise.
        canaries: more records, through which an audit watches.
        shard: number of the part of each sum that this process releases, where several release one
            together; see :mod:`privlm.dp.distributed`. Its noise is its own. A step that the ledger
            counts is then never made again: another number of processes would noise it otherwise.

    Raises:
        ValueError: canaries with a bound that changes, or in several processes; a start beyond the
            ledger, or in several processes before its end; several processes that go on with
            correlated noise.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger | SharedLedger,
        run: str,
        stream: Stream,
        *,
        start: int | None = None,
        released: Mapping[int, str] | None = None,
        canaries: GradientCanaries | None = None,
        shard: int | None = None,
    ) -> None:
        paid = ledger.steps(run)
        if start is not None and not 0 <= start <= paid:
            raise ValueError(f"step {start} cannot be the next: the ledger counts {paid}")
        if paid and not ledger.fits(run, plan):
            raise ValueError(
                f"the ledger counts steps of another plan under the name {run!r}; give another "
                "plan another name, or go on with the plan of that run"
            )
        if shard is not None:
            _check_shared(plan, paid, start, canaries)
        if start is not None and start < paid and released is None:
            raise ValueError(
                f"steps {start} to {paid - 1} of run {run!r} were released before: give the "
                "digests of their releases, for a step is made again bitwise the same or not at all"
            )
        if start is None and paid and plan.needs_one_stream:
            raise ValueError(
                f"{paid} steps of run {run!r} are on the ledger, and its noise or its assignment "
                "of examples must go on from the same secret stream: give that stream, and the "
                "step to start from"
            )
        if canaries is not None and isinstance(plan.clipping, AdaptiveClipping):
            raise ValueError("gradient canaries need one clipping bound; use flat clipping")
        self.plan = plan
        self.step = paid if start is None else start
        self.max_grad_norm = plan.max_grad_norm
        self.canaries = canaries
        self.report: StepReport | None = None
        self.digest: str | None = None
        self._released = released
        stream = stream.child(f"run {run}")  # two runs of one stream share nothing
        self._ledger = ledger
        self._run = run
        self._sampling = stream.child("sampling")
        self._noise = stream.child("noise" if shard is None else f"noise of shard {shard}")
        self._counts = stream.child("counts")
        self._correlated: CorrelatedNoise | None = None

    def draw(self, records: int) -> tuple[Tensor, Tensor]:
        """The next step's batch: numbers of data records, and of canaries that joined it.

        Raises:
            BudgetSpent: all steps of the plan are taken.
        """
        if self.step >= self.plan.steps:
            raise BudgetSpent(
                f"all {self.plan.steps} steps of the plan are spent; another would exceed the "
                "guarantee. Make a new plan with a larger budget to train on"
            )
        hidden = 0 if self.canaries is None else self.canaries.records
        batch = self.plan.sampler.draw(records + hidden, self.step, self._sampling)
        is_canary = batch >= records
        return batch[~is_canary], batch[is_canary] - records

    def release(self, clipped: ClippedSum, joined: Tensor | None = None) -> tuple[Tensor, ...]:
        """The step's gradient: noised, over the expected batch size. Consumes ``clipped``.

        Args:
            clipped: of this step's batch, under the bound :attr:`max_grad_norm`.
            joined: the canaries that the batch held.

        Raises:
            LedgerError: the step could not be recorded; nothing was released.
            ValueError: the sum was clipped to another bound.
        """
        if clipped.l2_sensitivity != self.max_grad_norm:
            raise ValueError(
                f"the sum was clipped to {clipped.l2_sensitivity}, this step's bound is "
                f"{self.max_grad_norm}"
            )
        if self.canaries is not None:
            assert joined is not None
            self.canaries.hide(clipped, joined)
        if self.step >= self._ledger.steps(self._run):
            self._ledger.record(self._run, self.plan)
        values = self._noised(clipped)
        self.digest = None if self._released is None else _digest(values)
        if self._released is not None and (
            self._released.get(self.step, self.digest) != self.digest
        ):
            raise ReplayDiffers(
                f"step {self.step} was released before, and comes out differently now; nothing is "
                "made of it. Go on with the model, optimiser, processor, number of threads, "
                "microbatch size and library versions that the run was begun with"
            )
        if self.canaries is not None:
            self.canaries.observe(Release(values, self.plan.mechanism.event))
        self.report = StepReport(
            step=self.step,
            examples=clipped.examples,
            loss=clipped.loss / max(1, clipped.examples),
            unclipped=clipped.unclipped,
            max_grad_norm=self.max_grad_norm,
        )
        self._adapt(clipped)
        self.step += 1
        return tuple(value.div_(self.plan.expected_batch_size) for value in values)

    def _noised(self, clipped: ClippedSum) -> tuple[Tensor, ...]:
        plan = self.plan
        if plan.correlation is None:
            stream = self._noise.child(f"step {self.step}")
            return plan.mechanism.release(clipped, stream, in_place=True).values
        if self._correlated is None:
            self._correlated = CorrelatedNoise(plan.correlation, plan.noise_multiplier, plan.steps)
            self._correlated.rebuild(clipped.values, self.step, self._noise)
        return self._correlated.release(clipped, self.step, self._noise, in_place=True)

    def _adapt(self, clipped: ClippedSum) -> None:
        """Move the bound by a noised count of the norms below it (Andrew et al. 2021)."""
        rule = self.plan.clipping
        if not isinstance(rule, AdaptiveClipping):
            return
        centred = torch.tensor([clipped.unclipped - clipped.examples / 2], dtype=torch.float64)
        if self.plan.noise_multiplier > 0:
            stream = self._counts.child(f"step {self.step}")
            centred = noised(centred, rule.count_noise_multiplier / 2, stream)
        share = float(centred) / self.plan.expected_batch_size + 0.5
        moved = self.max_grad_norm * math.exp(-rule.learning_rate * (share - rule.target_quantile))
        self.max_grad_norm = max(moved, MIN_GRAD_NORM)


def _check_shared(
    plan: Plan, paid: int, start: int | None, canaries: GradientCanaries | None
) -> None:
    """Refuse what needs the whole sum, or noise that other processes have drawn."""
    if canaries is not None:
        raise ValueError("gradient canaries watch whole sums; audit in one process")
    if start not in (None, paid):
        raise ValueError(
            f"step {start} is on the ledger: several processes might noise it otherwise than "
            f"before, and both releases together would betray it; go on at step {paid}"
        )
    if paid and plan.correlation is not None:
        raise ValueError(
            "correlated noise goes on from the noise of all steps before, which another number of "
            "processes drew otherwise; begin a new run, or train in one process"
        )


def _digest(values: tuple[Tensor, ...]) -> str:
    """SHA-256 of the bits of a release, in hexadecimal."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
