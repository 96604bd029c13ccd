"""From a sensitive sum to a release: noise, and the event that it amounts to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import dp_accounting
import torch
from torch import Tensor

from privlm.dp.accounting import DpEvent
from privlm.dp.clipping import ClippedSum
from protocols.chacha20 import DeviceStream
from protocols.randomness import Stream

GRID_BITS = 20
"""Releases are multiples of a power of two near σ·2^-20."""

_SCALES = (1e-200, 1e200)
"""Of the noise: its grid and the grid's reciprocal are then far from float64's ends."""

# A core's cache holds the scratch of one chunk; a GPU wants few and large kernels.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 15, 1 << 22


@dataclass(frozen=True)
class Release:
    """A noised value, free to leave, with the event that it costs."""

    values: tuple[Tensor, ...]
    event: DpEvent


@dataclass(frozen=True)
class GaussianMechanism:
    """Adds N(0, (noise_multiplier · l2_sensitivity)²) to every coordinate.

    Attacks on noise in floating point, and what becomes of them here:

    - The floats that value + noise can reach differ from value to value, and so betray it (Mironov
      2012). The noise is drawn and added in float64, and the sum rounded to a fixed grid of spacing
      near σ·2^-20 that depends on public parameters alone. Every grid point that one value reaches
      is reached from its neighbours too, with about the right probability.
    - A Gaussian sampler's own gaps show through the sum (Jin et al. 2022), most of all in its
      tails. Below 10.73 σ (:data:`protocols.randomness.NORMAL_DENSE`) the gaps are a 2^23rd of the
      grid; the tails end at 13.27 σ, where a true normal arrives with probability below 10^-39.
    - A generator that can be predicted gives the noise away (Garfinkel and Leclerc 2020): it comes
      from AES-256 in counter mode or ChaCha20, never from ``torch.normal``.
    - A sum's precision depends on its size, and tells it (Haney et al. 2022). The grid does not, as
      long as the sum is below 2^31 σ; beyond that its floats are coarser than the grid.

    What remains: every grid point's probability is off by the share of the sums that rounding moves
    across its edges, a relative 10^-8 for sums of a few σ and 10^-6 for sums of 1000 σ. That is a
    count and no proof; who needs one takes a discrete sampler. The time that noise takes does not
    depend on the value, but a little on the noise: timing (Jin et al. 2022) is not covered.
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

    def release(
        self, clipped: ClippedSum, stream: Stream | DeviceStream, *, in_place: bool = False
    ) -> Release:
        """Consume a clipped sum.

        Args:
            clipped: tensors of any shape with their common l2 sensitivity.
            stream: secret randomness of this run's noise. Either one stream that is read on and on,
                or a child for each step; never the same child twice.
            in_place: overwrite the sum instead of allocating as much again.

        Returns:
            Tensors of the same shapes and dtypes, noised.
        """
        noise_std = self.noise_std(clipped.l2_sensitivity)
        if noise_std == 0:
            return Release(clipped.values, self.event)
        return Release(
            tuple(noised(value, noise_std, stream, in_place=in_place) for value in clipped.values),
            self.event,
        )


def noised(
    value: Tensor, noise_std: float, stream: Stream | DeviceStream, *, in_place: bool = False
) -> Tensor:
    """``value`` plus N(0, noise_std²) on every entry, rounded to the grid.

    Whatever is computed from ``noise_std`` > 0 alone is public; see :class:`GaussianMechanism`.
    Beyond the result it takes memory for one chunk: 1.2 MB on a CPU, 300 MB on a GPU.

    Args:
        value: floats of any shape; on an accelerator, the noise is drawn there.
        noise_std: from 1e-200 to 1e200.
        stream: secret randomness; on an accelerator it seeds a :class:`DeviceStream`, unless it is
            one.
        in_place: write the result over ``value``, which must be contiguous.

    Raises:
        ValueError: ``noise_std`` is out of range, or ``value`` cannot be overwritten.
    """
    grid = grid_of(noise_std)
    if in_place and not value.is_contiguous():
        raise ValueError("only a contiguous tensor can be noised in place")
    value = value.detach()  # a graph behind a release would lead back to the data
    out = value if in_place else torch.empty_like(value, memory_format=torch.contiguous_format)
    source, target = value.reshape(-1), out.view(-1)
    drawn = stream_on(value.device, stream)
    size = chunk_size(value)
    scratch_2C = torch.empty(2, min(size, len(source)), dtype=torch.float64, device=value.device)
    for start in range(0, len(source), size):
        part = source[start : start + size]
        noise, total = scratch_2C[:, : len(part)]
        drawn.fill_normal(noise)
        add_on_grid(part, noise, noise_std, grid, total)
        target[start : start + size].copy_(total)
    return out


def noise_shard(
    value: Tensor,
    noise_std: float,
    stream: Stream | DeviceStream,
    shard: int,
    *,
    in_place: bool = False,
) -> Tensor:
    """:func:`noised`, for shard number ``shard`` of a parameter that is spread over processes.

    Every shard is drawn from a child stream of its own, so no two shards share noise, and every
    entry is noised once. A process that holds a copy of a shard gives its number and draws the same
    noise; where every process holds the whole parameter, all of them give shard 0.

    Args:
        value: this shard of the *whole* clipped sum, that is, after it was reduced.
        noise_std: as of :func:`noised`.
        stream: the same in all processes, and another one for every parameter and step, for example
            ``stream.child(f"step {step}").child(name)``.
        shard: which part of the parameter this is, from 0.
        in_place: as of :func:`noised`.

    Raises:
        ValueError: ``shard`` is negative; or as :func:`noised`.
    """
    if shard < 0:
        raise ValueError(f"shard must be at least 0, got {shard}")
    return noised(value, noise_std, stream.child(f"shard {shard}"), in_place=in_place)


def grid_of(noise_std: float) -> float:
    """The spacing of what is released under noise of this deviation: a power of two.

    Raises:
        ValueError: ``noise_std`` does not lie in [1e-200, 1e200].
    """
    low, high = _SCALES
    if not low <= noise_std <= high:
        raise ValueError(f"noise_std must lie in [{low:g}, {high:g}], got {noise_std}")
    return math.ldexp(1.0, math.floor(math.log2(noise_std)) - GRID_BITS)


def add_on_grid(value: Tensor, noise: Tensor, noise_std: float, grid: float, total: Tensor) -> None:
    """``total`` = ``value`` + noise_std · ``noise`` in float64, rounded to the grid."""
    # In units of the grid; scaling by a power of two loses nothing.
    total.copy_(value).mul_(1.0 / grid).add_(noise, alpha=noise_std / grid).round_().mul_(grid)


def stream_on(device: torch.device, stream: Stream | DeviceStream) -> Stream | DeviceStream:
    """``stream`` itself, or one seeded by it where a :class:`Stream` cannot reach."""
    if isinstance(stream, Stream) and device.type != "cpu":
        return DeviceStream.of(stream, device)
    return stream


def chunk_size(value: Tensor) -> int:
    """How many entries are noised at once."""
    return _CPU_CHUNK if value.device.type == "cpu" else _DEVICE_CHUNK
