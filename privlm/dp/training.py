"""One training loop; where its gradients come from is a value.

:class:`PrivateGradients` is DP-SGD: sample, clip, record, noise, normalise.
:class:`PlainGradients` is the baseline without protection. Both feed
:func:`fit`, which knows nothing of either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec
import torch
from torch import Tensor, nn

from privlm.data import TokenBlocks
from privlm.dp.batches import Batch, select, size
from privlm.dp.canaries import GradientCanaries
from privlm.dp.clipping import NonFiniteGradient, PerExampleClipping, PerExampleLoss
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.records import InMemory, Records, check_unit, taken
from privlm.dp.releases import Releases
from privlm.models import per_example_loss
from protocols.randomness import SEED_BYTES, Stream

if TYPE_CHECKING:
    from privlm.dp.distributed import Group, SharedLedger


class OptimizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which first-order optimiser consumes the gradients.

    With clipped gradients plain SGD wants learning rates near 1, because a step
    moves the parameters by at most learning_rate × max_grad_norm.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.kind} has its own, leave it out")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimiser over ``parameters``."""
        if self.kind == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


class Gradients(Protocol):
    """An endless source of gradients, one tensor a trained parameter."""

    def next(self) -> tuple[Tensor, ...]:
        """The gradient of the coming step."""
        ...


class PlainGradients:
    """Mean gradients of shuffled batches: no protection whatsoever.

    Args:
        model: the model in training.
        loss: per-example loss.
        examples: N of them, as a tensor or a mapping of tensors.
        batch_size: at most N are used at once.
        generator: order of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        examples: Batch,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        if size(examples) == 0:
            raise ValueError("there are no examples to train on")
        self._model = model
        self._loss = loss
        self._batches = _shuffled_batches(examples, batch_size, generator)
        self._parameters = tuple(p for p in model.parameters() if p.requires_grad)

    def next(self) -> tuple[Tensor, ...]:
        """The mean gradient of the next batch.

        Raises:
            NonFiniteGradient: the loss of the batch is NaN or infinite.
        """
        self._model.train()
        loss = self._loss(self._model, next(self._batches)).mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteGradient(
                "the loss is not finite; lower the learning rate, or look for NaN in the data"
            )
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return tuple(
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self._parameters, gradients, strict=True)
        )


class PrivateGradients:
    """DP-SGD's gradients (Abadi et al. 2016, algorithm 1): the only way to a private model.

    Every step draws a batch by the plan's sampler, clips and sums its per-example
    gradients, and releases the sum. An empty batch releases noise like any other.

    Args:
        clipping: an entered :class:`PerExampleClipping` over the model in training.
        records: the private data.
        releases: what the sums become.
        group: the processes of the run, if there are several.
    """

    def __init__(
        self,
        clipping: PerExampleClipping,
        records: Records,
        releases: Releases,
        group: Group | None = None,
    ) -> None:
        self._clipping = clipping
        self._records = records
        self._group = group
        self.releases = releases

    def next(self) -> tuple[Tensor, ...]:
        """The noised, normalised gradient of the next step.

        Raises:
            NonFiniteGradient, LedgerError: before anything was released.
            BudgetSpent: the plan's steps are all taken.
        """
        bound, group = self.releases.max_grad_norm, self._group
        batch, joined = self.releases.draw(len(self._records))
        if group is None:
            clipped = self._clipping.clipped_sum(taken(self._records, batch), bound)
            return self.releases.release(clipped, joined)
        clipped = group.summed(self._clipping, self._records, batch, bound)
        return group.gathered(self.releases.release(clipped, joined))


@contextmanager
def private_gradients(
    model: nn.Module,
    loss: PerExampleLoss,
    records: Records | Batch,
    plan: Plan,
    ledger: Ledger | SharedLedger,
    *,
    run: str,
    stream: Stream,
    start: int | None = None,
    released: Mapping[int, str] | None = None,
    microbatch_size: int | None = None,
    canaries: GradientCanaries | None = None,
    group: Group | None = None,
) -> Iterator[PrivateGradients]:
    """:class:`PrivateGradients` over ``model``, which is an ordinary one again on leaving.

    With a ``group``, every process calls this with the same arguments, of which ``ledger`` and
    ``stream`` are the group's.

    Raises:
        ProcessesDiffer: the arguments are not the same in all processes of the group.
        ValueError: the ledger is not the group's; or as :class:`Releases`.
    """
    if isinstance(records, Tensor | Mapping):
        records = InMemory(records)
    check_unit(records, plan.users)
    shard = None
    if group is not None:
        if isinstance(ledger, Ledger):
            raise ValueError("several processes share a ledger; open it by group.ledger(path)")
        shard = group.rank
        group.require_same("plan, run or number of records", _shared(plan, run, len(records)))
    releases = Releases(
        plan, ledger, run, stream, start=start, released=released, canaries=canaries, shard=shard
    )
    if group is not None:
        group.require_same("the secret stream", stream.child("check").bytes(SEED_BYTES))
    made = PerExampleClipping if group is None else group.clipping
    with made(model, loss, plan.clipping, microbatch_size) as clipping:
        yield PrivateGradients(clipping, records, releases, group)


def fit(
    model: nn.Module,
    gradients: Gradients,
    optimizer: torch.optim.Optimizer,
    steps: range,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Take one optimiser step per element of ``steps``.

    Args:
        model: its parameters that require a gradient are trained, in place.
        gradients: where the gradients come from.
        optimizer: over exactly those parameters.
        steps: the numbers of the steps still to take.
        after_step: called with the number of steps taken so far; may raise to stop.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        for parameter, gradient in zip(parameters, gradients.next(), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(step + 1)


def _shared(plan: Plan, run: str, records: int) -> bytes:
    """What several processes must agree on."""
    return msgspec.json.encode((plan, run, records))


def _shuffled_batches(
    examples: Batch, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    while True:
        order = torch.randperm(size(examples), generator=generator)
        for batch in order.split(batch_size):
            yield select(examples, batch)


def examples_of(blocks: TokenBlocks) -> Tensor:
    """Token blocks as one tensor of examples: ids and target mask, int64 of shape (N, 2, T)."""
    return torch.stack([blocks.ids_NT, blocks.mask_NT.long()], dim=1)


def causal_lm_loss(model: nn.Module, examples_N2T: Tensor) -> Tensor:
    """Per-example loss of a causal language model on :func:`examples_of`; shape (N,)."""
    ids_NT, mask_NT = examples_N2T[:, 0].contiguous(), examples_N2T[:, 1].bool()
    return per_example_loss(model(ids_NT), ids_NT, mask_NT)
