"""Cross-entropy that keeps the logits and nothing else of their size.

torch keeps the log-probabilities for the backward pass, there writes their gradient and then that
of the logits, and half precision is first widened: with the logits themselves 16 bytes a logit at
the peak in float32 and 14 in bfloat16. Here the softmax is taken again in the backward pass, a few
rows at a time: 8 and 4 bytes. (Counted from torch's allocations on a CPU.)

Shapes: R = rows, V = vocabulary, N = a batch of vmap.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # what torch and transformers skip in a loss

# Numbers in flight: on a CPU they stay in the cache, on an accelerator the kernels stay large.
_CHUNK_CPU = 1 << 17
_CHUNK_DEVICE = 1 << 26


def cross_entropy_rows(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    """-log softmax(logits)[target] (nats) of every row; 0 where the target is ``IGNORE_INDEX``.

    Differentiable twice and under ``torch.func.vmap``. The logits are not copied.

    Args:
        logits_RV: Of any floating type.
        target_R: int64 in [0, V), or ``IGNORE_INDEX``.

    Returns:
        nll_R: float32, or float64 for such logits.
    """
    nll_R: Tensor = _Rows.apply(logits_RV, target_R)  # type: ignore[no-untyped-call]
    return nll_R


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(logits_RV: Tensor, target_R: Tensor) -> Tensor:
        wide = _wide(logits_RV)
        nll_R = logits_RV.new_empty(len(logits_RV), dtype=wide)
        index_R1 = _index(target_R)
        for rows in _chunks(logits_RV):
            logp = logits_RV[rows].log_softmax(dim=1, dtype=wide)
            nll_R[rows] = logp.gather(1, index_R1[rows]).squeeze(1)
        return nll_R.neg_().masked_fill_(target_R == IGNORE_INDEX, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, scale_R: Tensor) -> tuple[Tensor, None]:
        gradient_RV: Tensor = _RowsGradient.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, scale_R
        )
        return gradient_RV, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        return _side_by_side(_Rows, info, in_dims, arguments)


class _RowsGradient(torch.autograd.Function):
    """scale (softmax(logits) - onehot(target)), by row; itself differentiable."""

    @staticmethod
    def forward(logits_RV: Tensor, target_R: Tensor, scale_R: Tensor) -> Tensor:
        wide = _wide(logits_RV)
        gradient_RV = torch.empty_like(logits_RV)
        index_R1 = _index(target_R)
        scale_R1 = scale_R.masked_fill(target_R == IGNORE_INDEX, 0.0)[:, None]
        for rows in _chunks(logits_RV):
            part = logits_RV[rows].softmax(dim=1, dtype=wide).mul_(scale_R1[rows])
            gradient_RV[rows] = part.scatter_add_(1, index_R1[rows], -scale_R1[rows])
        return gradient_RV

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, outer_RV: Tensor) -> tuple[Tensor, None, Tensor]:
        logits_RV, target_R, scale_R = ctx.saved_tensors
        wide = _wide(logits_RV)
        scale_R1 = scale_R.masked_fill(target_R == IGNORE_INDEX, 0.0)[:, None]
        p_RV, outer_RV = logits_RV.softmax(dim=1, dtype=wide), outer_RV.to(wide)
        mean_R1 = (p_RV * outer_RV).sum(dim=1, keepdim=True)
        slope_R = (mean_R1 - outer_RV.gather(1, _index(target_R))).squeeze(1)
        curved_RV = (scale_R1 * p_RV * (outer_RV - mean_R1)).to(logits_RV.dtype)
        return curved_RV, None, slope_R.masked_fill(target_R == IGNORE_INDEX, 0.0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        return _side_by_side(_RowsGradient, info, in_dims, arguments)


def _side_by_side(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    arguments: tuple[Tensor, ...],
) -> tuple[Tensor, int]:
    """Rows know nothing of each other, so N batches of R rows are one of N R rows."""
    size = info.batch_size
    rows = [
        (
            argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
        ).flatten(0, 1)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    return function.apply(*rows).unflatten(0, (size, -1)), 0


def _wide(logits_RV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_RV.dtype, torch.float32)


def _index(target_R: Tensor) -> Tensor:
    return target_R.masked_fill(target_R == IGNORE_INDEX, 0)[:, None]


def _chunks(logits_RV: Tensor) -> Iterator[slice]:
    numbers = _CHUNK_CPU if logits_RV.device.type == "cpu" else _CHUNK_DEVICE
    rows = max(1, numbers // max(1, logits_RV.shape[1]))
    for start in range(0, len(logits_RV), rows):
        yield slice(start, start + rows)
