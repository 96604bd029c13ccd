"""Private training of a model whose parameters are spread over processes (FSDP2).

Shape suffixes: N examples, P parameters of the model.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from privlm.dp.batches import Batch, size
from privlm.dp.clipping import ClippedSum, Clipping, PerExampleClipping, PerExampleLoss
from privlm.dp.distributed import Group, _reduce_scatter
from privlm.dp.records import Records, taken


class Shards(Group):
    """The model went through ``torch.distributed.fsdp.fully_shard``, over all processes.

    Every process runs every module equally often, or the others would wait for it: a part with
    fewer examples is filled up with one more example of the batch, which is not counted. After each
    microbatch the clipped sums go to the shards' owners, one parameter at a time. A process so
    holds, beside FSDP's own memory and a microbatch's books, 8 bytes for each entry of its shards
    and 16 for each entry of the model's largest parameter. What a microbatch sends is what FSDP
    sends for it, with gradients in float64.

    Raises:
        ValueError: a trained parameter is not sharded on dimension 0 over all processes.
    """

    kind = "shards"

    def __init__(self, model: nn.Module, timeout: timedelta = timedelta(minutes=10)) -> None:
        _reshard(model)
        super().__init__(model, timeout)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not self._owns(parameter):
                raise ValueError(
                    f"{name} is not sharded on dimension 0 over all {self.size} processes; "
                    "fully_shard the whole model on one mesh of one dimension, or use Replicas"
                )

    def clipping(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        clipping: Clipping | float,
        microbatch_size: int | None,
    ) -> PerExampleClipping:
        """See :class:`Group`."""
        return _ShardedClipping(self, model, loss, clipping, microbatch_size)

    def summed(
        self, clipping: PerExampleClipping, records: Records, batch: Tensor, max_grad_norm: float
    ) -> ClippedSum:
        """See :class:`Group`; the shards are the local ones of the parameters, in float64."""
        own = self._own(batch)
        lacking = -(-len(batch) // self.size) - len(own)
        with self.together():
            examples = taken(records, torch.cat([own, batch[:1].expand(lacking)]))
        clipped = clipping.clipped_sum(examples, max_grad_norm, len(own))
        return self._with_all_counts(clipped, clipped.values)

    def gathered(self, shards: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :class:`Group`; as the optimiser wants them, which is in shards."""
        return tuple(
            DTensor.from_local(
                shard.to(p.dtype), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
            )
            for shard, p in zip(shards, self._sharded(), strict=True)
        )

    def zeros(self) -> tuple[Tensor, ...]:
        """Room for the sums of this process's shards, in float64."""
        return tuple(
            torch.zeros_like(p.to_local(), dtype=torch.float64).contiguous()
            for p in self._sharded()
        )

    def add_reduced(self, index: int, whole: Tensor, shard: Tensor) -> None:
        """Add to ``shard`` this process's rows of the sum of all processes' ``whole``.

        Args:
            index: of the parameter.
            whole: rows padded to a multiple of the number of processes.
            shard: as of :meth:`zeros`.
        """
        rows = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        _reduce_scatter(rows, whole, group=self._sharded()[index].device_mesh.get_group())
        shard += rows[: len(shard)]

    def _sharded(self) -> tuple[Any, ...]:
        return self.parameters

    def _owns(self, parameter: Tensor) -> bool:
        return (
            isinstance(parameter, DTensor)
            and parameter.placements == (Shard(0),)
            and parameter.device_mesh.size() == self.size
        )


class _ShardedClipping(PerExampleClipping):
    """Runs in step with all processes, and keeps sums of this process's shards alone."""

    def __init__(self, group: Shards, model: nn.Module, *arguments: Any) -> None:
        _reshard(model)
        super().__init__(model, *arguments)
        group._check_trains(self)
        self._group = group

    def _zeros(self) -> tuple[Tensor, ...]:
        return self._group.zeros()

    def _finite_squares(self) -> Tensor:
        with self._group.together():
            return super()._finite_squares()

    def _add_weighted(self, weight_PN: Tensor, totals: tuple[Tensor, ...]) -> None:
        for index, (parameter, total) in enumerate(zip(self.parameters, totals, strict=True)):
            rows, *rest = parameter.shape
            padded = -(-rows // self._group.size) * self._group.size
            whole = total.new_zeros(padded, *rest)
            self._book.add_weighted_of(index, weight_PN[index], whole[:rows])
            self._group.add_reduced(index, whole, total)

    def _check(self, examples: Batch) -> None:
        with self._group.together():
            super()._check(examples)

    def _tell_apart(self, examples: Batch) -> bool:
        return size(examples) > 1  # and nothing that other processes might decide otherwise

    def _shaken(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _alone(self, example: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """By plain autograd, but for the whole parameters: FSDP would mix processes' gradients."""
        loss_1 = self._losses(example)
        whole = [self._book.used(index) for index in range(len(self.parameters))]
        with self._full_precision():
            gradients = torch.autograd.grad(
                loss_1.sum(), [w for w in whole if not isinstance(w, DTensor)], allow_unused=True
            )
        given = iter(gradients)
        return loss_1.detach(), tuple(
            None if isinstance(w, DTensor) else next(given) for w in whole
        )

    def _add_one_by_one(self, *arguments: Any) -> NoReturn:
        raise ValueError(
            "the model uses a parameter once for all examples of a batch; freeze it, or train in "
            "Replicas, which can back-propagate examples one by one"
        )

    def _halve(self) -> NoReturn:
        raise MemoryError(
            "not enough memory for a microbatch, and processes that share a model cannot choose "
            "smaller ones by themselves; set microbatch_size"
        )


def _reshard(model: nn.Module) -> None:
    """Put the shards back in place of parameters that a last forward pass left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
