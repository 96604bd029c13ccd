"""Per-example gradient clipping: the one place where sensitivity is made.

Shape suffixes: N examples of a batch, P parameters of one tensor.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
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


class FlatClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="flat"):
    """g · min(1, max_grad_norm / ‖g‖) over all parameters together (Abadi et al. 2016)."""

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)


class PerLayerClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="per-layer"):
    """Each of L parameter tensors to max_grad_norm / √L, so that together they keep the bound."""

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)


class AutomaticClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="automatic"):
    """g · max_grad_norm / (‖g‖ + stability): AUTO-S (Bu et al. 2023), no threshold to tune."""

    max_grad_norm: float = 1.0
    stability: float = 0.01

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)
        if not (self.stability > 0 and math.isfinite(self.stability)):
            raise ValueError(f"stability must be positive and finite, got {self.stability}")


class AdaptiveClipping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="adaptive"):
    """Flat clipping whose bound follows a quantile of the norms (Andrew et al. 2021).

    Each step also releases how many norms lay below the bound C, minus half the batch, under noise
    of standard deviation ``count_noise_multiplier`` / 2: one example moves it by 1/2. With b that
    count over the expected batch size plus 1/2, C ← C · e^(−learning_rate (b − target_quantile)).

    Attributes:
        max_grad_norm: the first bound.
        target_quantile: share of examples that shall not be clipped.
        learning_rate: of the logarithm of the bound.
        count_noise_multiplier: noise on the count over its sensitivity; the noise on the gradients
            grows so that both releases together cost what the plan's noise multiplier says.
    """

    max_grad_norm: float = 1.0
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_multiplier: float = 20.0

    def __post_init__(self) -> None:
        check_bound(self.max_grad_norm)
        if not 0 < self.target_quantile < 1:
            raise ValueError(f"target_quantile must lie in (0, 1), got {self.target_quantile}")
        for name in ("learning_rate", "count_noise_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Noise on the gradients such that gradients and count together cost ``noise_multiplier``.

        (σ⁻² − σ_b⁻²)^(−1/2), with both multipliers relative to their sensitivities.

        Raises:
            ValueError: the count alone already costs as much.
        """
        if noise_multiplier == 0:
            return 0.0
        if self.count_noise_multiplier <= noise_multiplier:
            raise ValueError(
                f"count_noise_multiplier {self.count_noise_multiplier} must exceed the "
                f"noise_multiplier {noise_multiplier:.4g}; raise it"
            )
        return float((noise_multiplier**-2 - self.count_noise_multiplier**-2) ** -0.5)


Clipping = FlatClipping | PerLayerClipping | AutomaticClipping | AdaptiveClipping
"""How one example's gradient is bounded; ``max_grad_norm`` is the l2 bound on it."""


def check_bound(max_grad_norm: float) -> None:
    """Raise ``ValueError`` for a clipping bound that float32 norms could not keep."""
    if not MIN_GRAD_NORM <= max_grad_norm < math.inf:
        raise ValueError(
            f"max_grad_norm must be at least {MIN_GRAD_NORM} and finite, got {max_grad_norm}"
        )


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
