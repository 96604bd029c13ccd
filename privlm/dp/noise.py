"""From a sensitive sum to a release: noise, and the event that it amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import dp_accounting
import torch
from torch import Tensor

from privlm.dp.accounting import DpEvent
from privlm.dp.clipping import ClippedSum
from protocols.randomness import Stream

GRID_BITS = 20
"""Releases are multiples of a power of two near σ·2^-20."""


@dataclass(frozen=True)
class Release:
    """A noised value, free to leave, with the event that it costs."""

    values: tuple[Tensor, ...]
    event: DpEvent


@dataclass(frozen=True)
class GaussianMechanism:
    """Adds N(0, (noise_multiplier · l2_sensitivity)²) to every coordinate.

    Floating point: the noise is drawn and added in float64, and the sum is
    rounded to a fixed grid of spacing near σ·2^-20 that depends on public
    parameters alone. The low bits, through which the set of reachable floats
    would betray the noiseless value (Mironov 2012), are thereby gone; what
    remains is the 2^-53 resolution of the uniforms and tails that end at
    :data:`protocols.randomness.NORMAL_CUT` = 8.57 σ.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier must be at least 0, got {self.noise_multiplier}")

    @property
    def event(self) -> DpEvent:
        """The event of one release, before amplification by sampling."""
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def noise_std(self, l2_sensitivity: float) -> float:
        """Standard deviation of the noise on each coordinate."""
        return self.noise_multiplier * l2_sensitivity

    def release(self, clipped: ClippedSum, stream: Stream) -> Release:
        """Consume a clipped sum.

        Args:
            clipped: tensors of any shape with their common l2 sensitivity.
            stream: secret randomness of this run's noise.

        Returns:
            Tensors of the same shapes and dtypes, noised.
        """
        noise_std = self.noise_std(clipped.l2_sensitivity)
        if noise_std == 0:
            return Release(clipped.values, self.event)
        return Release(
            tuple(noised(value, noise_std, stream) for value in clipped.values), self.event
        )


def noised(value: Tensor, noise_std: float, stream: Stream) -> Tensor:
    """``value`` plus N(0, noise_std²) on every entry, rounded to the grid.

    Whatever is computed from ``noise_std`` > 0 alone is public; see :class:`GaussianMechanism`.
    """
    grid = 2.0 ** (math.floor(math.log2(noise_std)) - GRID_BITS)
    noise = torch.from_numpy(stream.standard_normal(value.numel())).view(value.shape)
    total = value.to(device="cpu", dtype=torch.float64) + noise_std * noise
    return (total / grid).round_().mul_(grid).to(device=value.device, dtype=value.dtype)
