"""Per-example gradient clipping: the one place where sensitivity is made.

Shape suffixes: N examples of a batch, P parameters of one tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PerExampleLoss = Callable[[nn.Module, Tensor], Tensor]
"""(model, examples of shape (N, ...)) -> losses of shape (N,), each of its example alone."""

_ROUNDING_MARGIN = 1e-5
"""Float32 norms of 10^8 terms, and float32 sums over a microbatch of up to 1024 examples, err by
less; microbatches are added up in float64. Clipped norms stay below the bound despite both."""

MAX_MICROBATCH = 1024
MIN_GRAD_NORM = 1e-6
"""Below it the squares of float32 gradients may underflow and the norm with them."""


class NonFiniteGradient(ValueError):
    """A NaN or infinite gradient has no norm to clip; nothing was released."""


@dataclass(frozen=True)
class ClippedSum:
    """Sum over a batch of per-example gradients, each of joint l2 norm ≤ ``l2_sensitivity``.

    Sensitive: only a mechanism may consume it. ``values`` has one tensor a
    parameter; the norm is over all of them together.
    """

    values: tuple[Tensor, ...] = field(repr=False)
    l2_sensitivity: float


class PerExampleClipping:
    """Clipped gradient sums of a model through Opacus's per-sample engine.

    Used as a context manager, so that the model's hooks are gone afterwards.

    Args:
        model: any module that Opacus's validators accept; its parameters that
            require a gradient are the ones trained.
        loss: the per-example loss; see :data:`PerExampleLoss`.
        max_grad_norm: the clipping bound.
        microbatch_size: examples back-propagated at once. Bounds the memory
            (about microbatch_size × trainable parameters × 4 bytes) and never
            changes the result's distribution.

    Raises:
        ValueError: a layer that mixes examples (batch norm) or that Opacus cannot
            treat per sample, tied parameters included; the message names it.
    """

    def __init__(
        self, model: nn.Module, loss: PerExampleLoss, max_grad_norm: float, microbatch_size: int
    ) -> None:
        if not max_grad_norm >= MIN_GRAD_NORM:
            raise ValueError(f"max_grad_norm must be at least {MIN_GRAD_NORM}, got {max_grad_norm}")
        if not 1 <= microbatch_size <= MAX_MICROBATCH:
            raise ValueError(
                f"microbatch_size must lie between 1 and {MAX_MICROBATCH}, got {microbatch_size}"
            )
        self._model = model
        self._loss = loss
        self._max_grad_norm = max_grad_norm
        self._microbatch_size = microbatch_size
        self.parameters = tuple(p for p in model.parameters() if p.requires_grad)
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient")

    def __enter__(self) -> PerExampleClipping:
        from opacus.grad_sample import GradSampleModule  # takes seconds; accounting needs none

        self._model.train()
        try:
            self._engine: Any = GradSampleModule(
                self._model, batch_first=True, loss_reduction="sum", strict=True
            )
        except Exception as error:
            raise ValueError(f"the model cannot be trained per example: {error}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._engine.to_standard_module()
        for parameter in self.parameters:
            parameter.grad = None

    def clipped_sum(self, examples: Tensor) -> ClippedSum:
        """Σ over the batch of g·min(1, max_grad_norm / ‖g‖).

        Args:
            examples: shape (N, ...); N may be 0, whose sum is zero.

        Raises:
            NonFiniteGradient: an example whose loss or gradient is NaN or infinite.
        """
        totals = tuple(torch.zeros_like(p, dtype=torch.float64) for p in self.parameters)
        for chunk in examples.split(self._microbatch_size) if len(examples) else ():
            self._add_clipped(chunk, totals)
        return ClippedSum(totals, self._max_grad_norm)

    def _add_clipped(self, examples: Tensor, totals: tuple[Tensor, ...]) -> None:
        with warnings.catch_warnings():
            # Inputs are token ids: the hooks see no gradient for them, which torch remarks on.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss_N = self._loss(self._engine, examples)
            if loss_N.shape != (len(examples),):
                raise ValueError(
                    f"the loss must have one value per example, shape ({len(examples)},), "
                    f"got {tuple(loss_N.shape)}"
                )
            loss_N.sum().backward()
        samples = [p.grad_sample for p in self.parameters]  # type: ignore[attr-defined]
        squares_N = torch.stack(
            [g.flatten(1).float().square().sum(1) for g in samples if g is not None]
        ).sum(0)
        if not bool(torch.isfinite(squares_N).all()):
            self._forget()
            raise NonFiniteGradient(
                "a per-example gradient is not finite; nothing was released. Lower the learning "
                "rate, or look for NaN in the model or the data"
            )
        factor_N = (self._max_grad_norm * (1 - _ROUNDING_MARGIN) / squares_N.sqrt()).clamp(max=1.0)
        for total, g in zip(totals, samples, strict=True):
            if g is not None:
                total.view(-1).add_(factor_N @ g.flatten(1).float())
        self._forget()

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
