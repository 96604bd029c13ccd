"""Real numbers as ring elements, with the overflow bound stated and enforced."""

import math
import operator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from protocols.randomness import Stream
from protocols.ring import BLOCK, Ring

A = TypeVar("A")


class Encoded(NamedTuple, Generic[A]):
    """Ring elements, and the fraction of the values that had to be clipped to get them.

    The fraction is a fact about the private values: show it to their owner, send it to nobody.
    """

    elements: A
    clipped_fraction: float

    def __repr__(self) -> str:
        return "Encoded(elements=…, clipped_fraction=…)"


@dataclass(frozen=True, kw_only=True)
class FixedPoint(Generic[A]):
    """Values in [-clip, clip] as integers of `bits` bits, summed over up to `clients` clients.

    A value x becomes the integer nearest to x/step, or a neighbour of it at random, with
    step = clip / (2^(bits-1) - 1); a sum of integers becomes the sum of values again by times step.
    A sum over `clients` clients lies within ±clients·(2^(bits-1) - 1). The constructor refuses a
    ring too small to hold it, so a sum without noise never wraps. Noise is for the caller to add to
    the encoded elements: it is reduced modulo the ring, never clamped, since clamping would change
    its distribution. `wrap_probability` bounds how often the noised sum wraps.

    Args:
        clip: greatest magnitude of a value; larger ones are clipped, and the fraction reported.
            From 2^-900 to 2^900, so that neither step nor a sum leaves the normal float64s.
        bits: of one encoded value, sign included; from 2 to 32.
        clients: greatest number of encoded vectors that are ever summed.
        ring: in which they are summed.

    Raises:
        ValueError: an argument is out of range, or a sum could wrap.

    """

    clip: float
    bits: int
    clients: int
    ring: Ring[A]

    def __post_init__(self) -> None:
        # In NumPy's numbers the bound below would itself wrap, and the scale lose digits.
        object.__setattr__(self, "clip", float(self.clip))
        object.__setattr__(self, "bits", operator.index(self.bits))
        object.__setattr__(self, "clients", operator.index(self.clients))
        if not 2.0**-900 <= self.clip <= 2.0**900:
            raise ValueError(f"clip must lie in [2^-900, 2^900], got {self.clip}")
        if not 2 <= self.bits <= 32:
            raise ValueError(f"bits must lie in [2, 32], got {self.bits}")
        if self.clients < 1:
            raise ValueError(f"clients must be at least 1, got {self.clients}")
        if self.largest_sum > self.ring.largest_integer:
            raise ValueError(
                f"the sum of {self.clients} values of {self.bits} bits reaches {self.largest_sum} "
                f"and would wrap in {self.ring}, which holds {self.ring.largest_integer}"
            )

    @property
    def largest(self) -> int:
        """The integer that encodes `clip`: 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def largest_sum(self) -> int:
        """The greatest magnitude of a sum of `clients` encoded values."""
        return self.clients * self.largest

    @property
    def step(self) -> float:
        """The distance between neighbouring encoded values, in the unit of the values."""
        return self.clip / self.largest

    @property
    def max_rounding_error(self) -> float:
        """Greatest error of one value within ±clip, rounded to nearest, in the unit of the values.

        Half a step and the rounding of float64. At random it is twice that, and of mean zero. The
        error of a sum is at most that of one value times the number of clients. Decoding into
        floats narrower than float64 adds their rounding.
        """
        return self.step * (0.5 + 2.0 ** (self.bits - 52))

    def encode(
        self, values: torch.Tensor, *, stream: Stream | None = None, out: A | None = None
    ) -> Encoded[A]:
        """Clip and scale `values`, and round them to ring elements of the same shape.

        Without a stream they are rounded to the nearest integer. With one, y is rounded up with
        probability y - ⌊y⌋ to within 2^-53, so that E[decode(encode(x))] = clip(x) up to a relative
        error of 2^-51 from scaling there and back and 2^-53 steps: the error then averages out over
        clients.

        Args:
            values: floats of any width, contiguous, in host memory; left as they are.
            stream: of the rounding; None to round to nearest.
            out: contiguous elements of the same shape to overwrite; fresh ones if None.

        Raises:
            ValueError: a value is NaN or infinite (the message says which), or a shape is wrong.

        """
        if not values.is_floating_point() or not values.is_contiguous():
            raise ValueError("values must be contiguous floating-point numbers")
        shape = tuple(values.shape)
        elements = self.ring.empty(shape) if out is None else out
        if self.ring.check(elements) != shape:
            raise ValueError(f"out has shape {self.ring.check(elements)}, values {shape}")
        values_N = values.detach().view(-1)
        scaled_B = torch.empty(min(BLOCK, values_N.numel()), dtype=torch.float64)
        clipped = 0
        for index, out_B in enumerate(self.ring.blocks(elements)):
            x_B = values_N[index * BLOCK : (index + 1) * BLOCK]
            clipped += self._count_clipped(x_B, index * BLOCK, shape)
            y_B = scaled_B[: x_B.numel()].copy_(x_B).mul_(self.largest / self.clip)
            y_B.clamp_(-self.largest, self.largest)
            if stream is None:
                np.rint(y_B.numpy(), out=y_B.numpy())
            else:
                _round_at_random_(y_B, stream)
            self.ring.set_integers_(out_B, y_B)
        return Encoded(elements, clipped / max(values_N.numel(), 1))

    def decode(self, total: A, count: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the real sum that `total`, the ring sum of `count` encoded vectors, stands for.

        Args:
            total: ring elements of any shape, contiguous.
            count: how many vectors were summed.
            out: contiguous floats of the same shape to overwrite; fresh float64 ones if None.

        Raises:
            ValueError: `count` exceeds `clients`, so that the sum may have wrapped, or `out` is
                not as described.

        """
        if not 1 <= count <= self.clients:
            raise ValueError(f"count must lie in [1, {self.clients}], got {count}")
        shape = self.ring.check(total)
        real = torch.empty(shape, dtype=torch.float64) if out is None else out
        if tuple(real.shape) != shape or not (real.is_floating_point() and real.is_contiguous()):
            raise ValueError(f"out must hold contiguous floats of shape {shape}")
        real_N = real.view(-1)
        for index, total_B in enumerate(self.ring.blocks(total)):
            sum_B = self.ring.to_integers(total_B).to(torch.float64)
            real_N[index * BLOCK : (index + 1) * BLOCK] = sum_B.mul_(self.step)
        return real

    def add_noise_(self, elements: A, noise: torch.Tensor) -> None:
        """Add integer `noise`, in steps, to encoded elements in place, modulo the ring.

        Args:
            elements: encoded vector, (...).
            noise: torch int64 of the same shape, in units of `step`.

        """
        if noise.dtype != torch.int64 or tuple(noise.shape) != self.ring.check(elements):
            raise ValueError("noise must be int64 of the shape of the elements")
        self.ring.add_(elements, self.ring.from_integers(noise))

    def wrap_probability(self, noise_std: float, coordinates: int = 1) -> float:
        """Bound the probability that any of `coordinates` noised sums wraps.

        The sum without noise leaves h steps of room on either side. For noise of variance proxy
        σ² (Gaussian; discrete Gaussian, Canonne, Kamath and Steinke 2020, Corollary 17), the tail
        bound gives P <= coordinates · 2 exp(-h²/2σ²). Proxies of independent noises add up. Noise
        with heavier tails (Laplace, Skellam, binomial) is not covered, nor is what rounding a
        Gaussian to steps adds: up to half a step for each noise rounded.

        Args:
            noise_std: root σ of the variance proxy of all the noise in one coordinate of the sum,
                in the unit of the values. Of a Gaussian it is the standard deviation; of a discrete
                Gaussian the parameter, which far below one step exceeds the standard deviation.
            coordinates: how many sums are decoded.

        """
        if not noise_std >= 0 or coordinates < 1:
            raise ValueError("noise_std must not be negative, coordinates at least 1")
        if noise_std == 0:
            return 0.0
        room = (self.ring.largest_integer - self.largest_sum + 1) * self.step
        sigmas = room / noise_std
        return min(1.0, 2.0 * coordinates * math.exp(-0.5 * sigmas * sigmas))

    def _count_clipped(self, x_B: torch.Tensor, start: int, shape: tuple[int, ...]) -> int:
        # One pass over the common case: NaN and infinities show in the extremes.
        least, greatest = (float(x) for x in torch.aminmax(x_B))
        if not (math.isfinite(least) and math.isfinite(greatest)):
            first = start + int(torch.nonzero(~torch.isfinite(x_B))[0])
            where = tuple(int(i) for i in np.unravel_index(first, shape)) if shape else ()
            raise ValueError(f"value at index {where} is {float(x_B[first - start])}: not finite")
        if -self.clip <= least and greatest <= self.clip:
            return 0
        return int((x_B.to(torch.float64).abs() > self.clip).sum())


def _round_at_random_(y_B: torch.Tensor, stream: Stream) -> None:
    """Round y up with probability y - ⌊y⌋, in place; the coins are exact multiples of 2^-53.

    NumPy takes the floor here, as it rounds above: torch would spread so short a block over threads
    that then wait for each other.
    """
    words_B = stream.ring_elements(64, y_B.numel())
    uniform_B = words_B.bitwise_and_((1 << 53) - 1).to(torch.float64).mul_(2.0**-53)
    floor_B = torch.from_numpy(np.floor(y_B.numpy()))
    y_B.sub_(floor_B)
    torch.add(floor_B, uniform_B < y_B, out=y_B)
