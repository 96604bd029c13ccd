"""One private run in several processes: each clips part of a batch and noises part of the sum.

Under torchrun, with the model a copy in every process (:class:`Replicas`, here) or spread over
them (:class:`~privlm.dp.sharding.Shards`)::

    torch.distributed.init_process_group(timeout=timedelta(minutes=5))
    group = Replicas(model)
    with (
        group.ledger(path, dataset=name) as ledger,
        private_gradients(
            model, loss, records, plan, ledger, run="a", stream=group.stream(), group=group
        ) as gradients,
    ):
        fit(model, gradients, optimizer, range(plan.steps))

What makes it one mechanism, and not one for every process:

- All processes draw one logical batch from one secret stream. Each clips the examples of its own
  part; an example's whole gradient lies in one process, so norms need no communication.
- The clipped sums are added in float64. A sum rounded to float32 on its way would err by 2^-24 of
  its norm, for n examples up to 2^-24 · n bounds, and neighbouring batches may round either way: at
  n = 4096 the sensitivity would grow by 5·10^-4, fifty times the margin that clipping keeps. In
  float64 it is 10^-12. The l2 sensitivity is then that of one process.
- The sum is scattered as it is added. A process noises its shard alone, from a stream of its own,
  so every entry of the released gradient is noised once, whatever the number of processes.
- Process 0 writes the ledger before any process draws noise. An error in one stops all before the
  step is released.

All processes are one party. The seed of its secret randomness and the clipped sums cross the
network unencrypted, as torch.distributed sends them: keep it private.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from privlm.dp.clipping import ClippedSum, Clipping, PerExampleClipping, PerExampleLoss
from privlm.dp.ledger import Budget, Ledger
from privlm.dp.plan import Plan
from privlm.dp.records import Records, taken
from protocols.randomness import SEED_BYTES, Stream

# Renamed in torch 2.13, where the old names warn.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class IncompleteSum(RuntimeError):
    """Another process failed; without its part of the sum nothing may be released."""


class ProcessesDiffer(RuntimeError):
    """Processes that must agree do not; going on would train another model in each."""


class Group(ABC):
    """The processes of one run; every method is called by all of them, in the same order.

    Args:
        model: the one in training.
        timeout: how long one process waits for the others to agree on a step. Sums and parameters
            travel within the timeout given to ``init_process_group``.

    Raises:
        ValueError: torch.distributed is not initialised, or the model is none for this group.
    """

    kind: ClassVar[str]

    def __init__(self, model: nn.Module, timeout: timedelta = timedelta(minutes=10)) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group; start with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if isinstance(model, DistributedDataParallel):
            raise ValueError(  # noqa: TRY004  (a usable model, wrapped needlessly)
                "DistributedDataParallel waits for gradients that are never formed here; give the "
                "model itself, model.module"
            )
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)
        # Agreements travel apart: a process that failed amid another collective can still tell.
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def stream(self, seed: bytes | None = None) -> Stream:
        """The run's secret randomness, the same in all processes.

        Args:
            seed: 32 uniform bytes, in process 0; None draws them. One seed gives other randomness
                to another number of processes.
        """
        with self.together():
            if self.rank != 0 or seed is None:
                seed = Stream.fresh("seed of a group").bytes(SEED_BYTES)
            if len(seed) != SEED_BYTES:
                raise ValueError(f"a seed has {SEED_BYTES} bytes, got {len(seed)}")
        told = torch.frombuffer(bytearray(seed), dtype=torch.uint8)
        dist.broadcast(told, src=0, group=self._control)
        return Stream(told.numpy().tobytes(), f"run of {self.size} {self.kind}")

    @contextmanager
    def ledger(
        self, path: Path, *, dataset: str, create: bool = True, budget: Budget | None = None
    ) -> Iterator[SharedLedger]:
        """The :class:`Ledger` at ``path``, which process 0 alone opens."""
        with ExitStack() as stack:
            held = None
            with self.together():
                if self.rank == 0:
                    opened = Ledger(path, dataset=dataset, create=create, budget=budget)
                    held = stack.enter_context(opened)
            yield SharedLedger(self, held)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block with all processes, or with none.

        Raises:
            IncompleteSum: another process raised in it; where one raised, that error goes on.
        """
        try:
            yield
        except Exception:
            self._any(True)
            raise
        if self._any(False):
            raise IncompleteSum(
                "another process failed, and tells why; nothing of this step was released"
            )

    def require_same(self, what: str, value: bytes) -> None:
        """Raise :class:`ProcessesDiffer` unless all processes give the same ``value``."""
        digest = torch.tensor(list(hashlib.sha256(value).digest()), dtype=torch.uint8)
        low, high = digest.clone(), digest.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self._control)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self._control)
        if not torch.equal(low, high):
            raise ProcessesDiffer(f"{what}: not the same in all processes")

    @abstractmethod
    def clipping(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        clipping: Clipping | float,
        microbatch_size: int | None,
    ) -> PerExampleClipping:
        """Whose sums :meth:`summed` adds; arguments of :class:`PerExampleClipping`."""

    @abstractmethod
    def summed(
        self, clipping: PerExampleClipping, records: Records, batch: Tensor, max_grad_norm: float
    ) -> ClippedSum:
        """The clipped sum over a whole batch: this process's shard, with the counts of all.

        Args:
            clipping: as made by :meth:`clipping`, and entered.
            records: the private data, all of it within reach of every process.
            batch: the numbers of the records, the same in all processes.
            max_grad_norm: the bound.
        """

    @abstractmethod
    def gathered(self, shards: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What was released for every process's shard, as gradients, one a parameter."""

    def _check_trains(self, made: PerExampleClipping) -> None:
        if [*map(id, made.parameters)] != [*map(id, self.parameters)]:
            raise ValueError(
                "the group was made of another model, or when other parameters were trained; make "
                "it of this model as it is trained"
            )

    def _own(self, batch: Tensor) -> Tensor:
        return batch[self.rank :: self.size]

    def _with_all_counts(self, clipped: ClippedSum, shards: tuple[Tensor, ...]) -> ClippedSum:
        counts = torch.tensor(
            [clipped.examples, clipped.unclipped, clipped.loss], dtype=torch.float64
        )
        dist.all_reduce(counts, group=self._control)
        examples, unclipped, loss = counts.tolist()
        return replace(
            clipped, values=shards, examples=int(examples), unclipped=int(unclipped), loss=loss
        )

    def _any(self, failed: bool) -> bool:
        flag = torch.tensor(int(failed))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag)


class SharedLedger:
    """A ledger that process 0 keeps for all of them; see :meth:`Group.ledger`."""

    def __init__(self, group: Group, ledger: Ledger | None) -> None:
        self._group = group
        self._ledger = ledger

    def steps(self, run: str) -> int:
        """As :meth:`Ledger.steps`, in every process."""
        told = torch.tensor(0 if self._ledger is None else self._ledger.steps(run))
        dist.broadcast(told, src=0, group=self._group._control)
        return int(told)

    def fits(self, run: str, plan: Plan) -> bool:
        """As :meth:`Ledger.fits`, in every process."""
        told = torch.tensor(self._ledger is None or self._ledger.fits(run, plan))
        dist.broadcast(told, src=0, group=self._group._control)
        return bool(told)

    def record(self, run: str, plan: Plan) -> None:
        """As :meth:`Ledger.record`; returns nowhere before the step is on disk.

        Raises:
            LedgerError: in process 0; IncompleteSum in the others.
        """
        with self._group.together():
            if self._ledger is not None:
                self._ledger.record(run, plan)


class Replicas(Group):
    """Every process holds the whole model; they are kept bitwise the same.

    The model is not wrapped in DistributedDataParallel, and begins everywhere as in process 0. The
    float64 sum is one flat tensor, reduced and scattered at once; the noised shards are gathered in
    the parameters' type, which costs no privacy. A step sends 12 bytes a float32 parameter through
    each process, where plain data-parallel training sends 8.
    """

    kind = "replicas"

    def __init__(self, model: nn.Module, timeout: timedelta = timedelta(minutes=10)) -> None:
        super().__init__(model, timeout)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError("the model's parameters are sharded; use Shards")
        self._model = model
        self._entries = sum(p.numel() for p in self.parameters)
        self._flat: Tensor | None = None
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                whole = tensor.contiguous()
                dist.broadcast(_bytes(whole), src=0)
                tensor.copy_(whole)

    def check_identical(self) -> None:
        """Compare all parameters and buffers by digest; takes one copy of each to the host.

        Raises:
            ProcessesDiffer: they are not bitwise the same; the first name where they differ.
        """
        for name, tensor in self._model.state_dict().items():
            self.require_same(name, _bytes(tensor.detach().cpu().contiguous()).numpy().tobytes())

    def clipping(
        self,
        model: nn.Module,
        loss: PerExampleLoss,
        clipping: Clipping | float,
        microbatch_size: int | None,
    ) -> PerExampleClipping:
        """See :class:`Group`."""
        return _IntoFlat(self, model, loss, clipping, microbatch_size)

    def summed(
        self, clipping: PerExampleClipping, records: Records, batch: Tensor, max_grad_norm: float
    ) -> ClippedSum:
        """See :class:`Group`; the shard is one flat tensor of float64."""
        with self.together():
            own = clipping.clipped_sum(taken(records, self._own(batch)), max_grad_norm)
        assert self._flat is not None  # of which the sum's values are views
        shard = self._flat.new_empty(len(self._flat) // self.size)
        _reduce_scatter(shard, self._flat)
        self._flat = None
        return self._with_all_counts(own, (shard,))

    def gathered(self, shards: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :class:`Group`."""
        (shard,) = shards
        dtypes = {p.dtype for p in self.parameters}
        shard = shard.to(dtypes.pop()) if len(dtypes) == 1 else shard
        flat = shard.new_empty(len(shard) * self.size)
        _all_gather(_bytes(flat), _bytes(shard))
        return self._views(flat)

    def zeros(self) -> tuple[Tensor, ...]:
        """Room for one process's sums: a float64 tensor a parameter, all of them views of one."""
        padded = -(-self._entries // self.size) * self.size
        device = self.parameters[0].device
        self._flat = torch.zeros(padded, dtype=torch.float64, device=device)
        return self._views(self._flat)

    def _views(self, flat: Tensor) -> tuple[Tensor, ...]:
        parts = flat[: self._entries].split([p.numel() for p in self.parameters])
        return tuple(part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True))


class _IntoFlat(PerExampleClipping):
    """Sums straight into the tensor that :class:`Replicas` reduces."""

    def __init__(self, group: Replicas, *arguments: Any) -> None:
        super().__init__(*arguments)
        group._check_trains(self)
        self._group = group

    def _zeros(self) -> tuple[Tensor, ...]:
        return self._group.zeros()


def _bytes(contiguous: Tensor) -> Tensor:
    """The same memory as bytes, which every backend can carry, whatever the type."""
    return contiguous.view(-1).view(torch.uint8)
