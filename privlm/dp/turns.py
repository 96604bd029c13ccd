"""The one order of private steps, which every loop over them keeps: draw, clip, release."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from privlm.dp.accounting import Neighbours, epsilon_of
from privlm.dp.batches import Batch, part, size
from privlm.dp.clipping import ClippedSum, Clipping, PerExampleClipping, PerExampleLoss
from privlm.dp.factorization import Correlation
from privlm.dp.history import LedgerError
from privlm.dp.ledger import Budget, Ledger
from privlm.dp.plan import Plan
from privlm.dp.records import Records
from privlm.dp.releases import Releases
from privlm.dp.sampling import PoissonSampler, Sampler
from protocols.randomness import Stream

NO_LEDGER = "insecure-no-ledger"
"""In place of a path: nothing remembers what this run releases, and other runs on the same data do
not know of it. Only where the data is used once, or is not private at all."""


class OutOfTurn(ValueError):
    """Another order than draw, backward, step would release what the plan does not account for."""


class Turns:
    """The one order of a private step: draw a batch, clip its sum, release it.

    Args:
        clipping: an entered :class:`PerExampleClipping` over ``model``.
        model: the model in training.
        records: the private data.
        releases: what the sums become.
    """

    def __init__(
        self,
        clipping: PerExampleClipping,
        model: nn.Module,
        records: Records,
        releases: Releases,
    ) -> None:
        self.parameters = clipping.parameters
        self.releases = releases
        self._clipping = clipping
        self._model = model
        self._records = records
        self._drawn: _Drawn | None = None
        self._closed = False

    @property
    def open(self) -> bool:
        """Whether a batch was drawn and its step is not taken."""
        return self._drawn is not None

    @property
    def left(self) -> int:
        """Steps that the plan still allows, given all that the ledger counts for this run."""
        return self.releases.plan.steps - self.releases.step

    def draw(self) -> Batch:
        """The coming step's batch, on the model's device; the same again until it is released.

        Raises:
            BudgetSpent: all steps of the plan are taken.
            OutOfTurn: after :meth:`close`.
            ValueError: the collator made another number of examples than it was given.
        """
        self._check_open()
        which, joined = self.releases.draw(len(self._records))
        # An empty batch has the names and shapes of any other, for whoever looks at it.
        batch = self._records.take(which if len(which) else torch.zeros(1, dtype=torch.int64))
        if size(batch) != max(1, len(which)):
            raise ValueError(
                f"the collator made {size(batch)} rows of {len(which)} examples; one row an "
                "example is needed, so pack and flatten examples beforehand or not at all"
            )
        batch = _on(self.parameters[0].device, part(batch, 0, len(which)))
        self._drawn = _Drawn(batch, _contents(batch), joined)
        return batch

    def clip(self, batch: Batch) -> ClippedSum:
        """The batch's clipped sum, kept for :meth:`release`; sensitive, nothing leaves yet.

        Raises:
            OutOfTurn: not the batch just drawn, or for a second time; or gradients, or trained
                parameters, that came about in another way.
            NonFiniteGradient: a loss or gradient is NaN or infinite.
        """
        self._check_open()
        drawn = self._drawn
        if drawn is None or batch is not drawn.batch or _contents(batch) != drawn.contents:
            raise OutOfTurn(
                "backward takes the batch that the loader just gave, whole and unchanged: the "
                "accounting holds for batches drawn in secret. Put what changes it into the "
                "DataLoader's collate_fn, or into the loss; it is on the model's device already"
            )
        if drawn.clipped is not None:
            raise OutOfTurn(
                "backward twice on one batch would count its examples twice; call step first. For "
                "larger batches raise the DataLoader's batch_size: microbatch_size bounds memory"
            )
        self._check_parameters()
        drawn.clipped = self._clipping.clipped_sum(batch, self.releases.max_grad_norm)
        return drawn.clipped

    def release(self) -> tuple[Tensor, ...]:
        """The step's gradient, recorded, noised and normalised.

        Raises:
            OutOfTurn: no batch was clipped since the last release.
            LedgerError: the step could not be recorded; nothing was released.
        """
        self._check_open()
        drawn = self._drawn
        if drawn is None or drawn.clipped is None:
            raise OutOfTurn("step needs a backward on a batch of the loader since the last step")
        self._check_parameters()
        gradients = self.releases.release(drawn.clipped, drawn.joined)
        self._drawn = None
        return gradients

    def forget(self) -> None:
        """Drop a sum that was not released; its batch stays drawn."""
        if self._drawn is not None:
            self._drawn.clipped = None

    def close(self) -> None:
        """Take no further steps."""
        self._closed = True
        self._drawn = None

    def _check_open(self) -> None:
        if self._closed:
            raise OutOfTurn(
                "the training is closed, and the model an ordinary one; make it private anew, "
                "with the same run to go on"
            )

    def _check_parameters(self) -> None:
        trained = tuple(p for p in self._model.parameters() if p.requires_grad)
        if len(trained) != len(self.parameters) or any(
            now is not then for now, then in zip(trained, self.parameters, strict=True)
        ):
            raise OutOfTurn(
                "the model's trained parameters are others than when it was made private; freeze "
                "and unfreeze before, and make it private anew"
            )
        with_gradient = [n for n, p in self._model.named_parameters() if p.grad is not None]
        if with_gradient:
            raise OutOfTurn(
                f"{', '.join(with_gradient[:3])}: has a gradient of an ordinary backward, which "
                "protects nobody; leave loss.backward() out, and call optimizer.zero_grad()"
            )


@dataclass
class _Drawn:
    batch: Batch = field(repr=False)
    contents: tuple[tuple[str, int, int], ...]
    joined: Tensor
    clipped: ClippedSum | None = field(default=None, repr=False)


def planned(
    *,
    examples: int,
    batch_size: int,
    steps: int,
    target_epsilon: float | None,
    noise_multiplier: float | None,
    target_delta: float,
    clipping: Clipping,
    sampler: Sampler | None = None,
    neighbours: Neighbours = "add-or-remove-one",
    correlation: Correlation | None = None,
) -> Plan:
    """The plan of so many steps; by a Poisson sampler unless another is given.

    Raises:
        ValueError: not exactly one of ε and noise, a batch larger than the data, or a parameter
            that the plan refuses.
    """
    if (target_epsilon is None) == (noise_multiplier is None):
        raise ValueError("give target_epsilon or noise_multiplier, one of the two")
    if batch_size > examples:
        raise ValueError(f"batch size {batch_size} exceeds the {examples} examples; lower it")
    drawn_by = sampler or PoissonSampler(batch_size / examples)
    if target_epsilon is not None:
        return Plan.for_budget(
            target_epsilon=target_epsilon,
            delta=target_delta,
            sampler=drawn_by,
            steps=steps,
            expected_batch_size=batch_size,
            clipping=clipping,
            neighbours=neighbours,
            correlation=correlation,
        )
    assert noise_multiplier is not None
    return Plan(
        sampler=drawn_by,
        steps=steps,
        noise_multiplier=noise_multiplier,
        expected_batch_size=batch_size,
        delta=target_delta,
        clipping=clipping,
        neighbours=neighbours,
        correlation=correlation,
    )


def open_turns(
    stack: ExitStack,
    model: nn.Module,
    loss: PerExampleLoss,
    records: Records,
    plan: Plan,
    *,
    ledger: Path | str,
    dataset: str,
    run: str,
    budget: Budget | None = None,
    microbatch_size: int | None = None,
    at_least: int = 0,
) -> Turns:
    """Lock the ledger and prepare the model; ``stack`` undoes both.

    ``at_least`` steps are known to have been taken under this name, and the ledger must count as
    many; the other arguments are those of :func:`privlm.dp.private.make_private`.

    Raises:
        LedgerError: it counts fewer, or steps of another plan under this name.
        ValueError: the run has begun, and its plan needs the stream that it began with.
    """
    if ledger == NO_LEDGER:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="privlm-"))
        ledger = Path(folder) / "ledger.jsonl"
    book = stack.enter_context(
        Ledger(Path(ledger), dataset=dataset, create=at_least == 0, budget=budget)
    )
    taken = book.steps(run)
    if taken < at_least:
        raise LedgerError(
            f"{ledger} counts {taken} steps of run {run!r}, of which the model has taken "
            f"{at_least}; restore the ledger that it was trained with"
        )
    if taken and not book.fits(run, plan):
        raise LedgerError(
            f"{ledger} counts steps of another plan under the name {run!r}; choose another name "
            "for another plan, or go on with the same batch size, noise and steps"
        )
    if taken and plan.needs_one_stream:
        raise ValueError(
            f"run {run!r} has begun, and its noise or sampler needs the secret that it began with, "
            "which is gone; begin a new run. Independent noise with a Poisson sampler goes on"
        )
    clipping = stack.enter_context(PerExampleClipping(model, loss, plan.clipping, microbatch_size))
    releases = Releases(plan, book, run, Stream.fresh(f"run {run}"))
    turns = Turns(clipping, model, records, releases)
    stack.callback(turns.close)
    return turns


def new_run_name() -> str:
    """A name that no ledger has."""
    return f"run {Stream.fresh('run id').bytes(8).hex()}"


def epsilon_after(plan: Plan, steps: int) -> float:
    """ε of the first ``steps`` steps of ``plan``; 0 before the first."""
    if steps == 0:
        return 0.0
    return epsilon_of(plan.event(steps), plan.delta, plan.neighbours).value


def _contents(batch: Batch) -> tuple[tuple[str, int, int], ...]:
    """Which tensors a batch holds, and how often each was written to."""
    named = {"": batch} if isinstance(batch, Tensor) else batch
    return tuple((name, id(value), value._version) for name, value in named.items())


def _on(device: torch.device, batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: value.to(device) for name, value in batch.items()}
