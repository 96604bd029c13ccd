"""Correlated noise: what is added to one step's sum is partly taken back in the steps after it.

An optimiser adds up its gradients x₀, x₁, …, so what matters is the noise on prefix sums A x, A
being the lower triangle of ones. Factor A = B C with C lower triangular and release B (C x + z) =
A (x + C⁻¹ z) for independent normals z: step t sends x_t + (C⁻¹ z)_t. Privacy is that of C x + z,
a Gaussian mechanism whose sensitivity is that of C x, and holds against whoever chooses x_t after
having seen all that was sent before (Denisov et al. 2022, theorem 2.1).

C is Toeplitz here, C_ij = c_{i-j}, with c₀ >= c₁ >= … >= 0; n steps, M buffers, P entries of a
parameter, C of them in a chunk.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import msgspec
import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from privlm.dp.clipping import ClippedSum
from privlm.dp.noise import add_on_grid, chunk_size, grid_of, stream_on
from privlm.dp.toeplitz import Array, banded_optimum, blt_inverse, blt_optimum, geometric
from protocols.chacha20 import DeviceStream
from protocols.errors import LocalProtocolError
from protocols.randomness import Stream

MAX_BANDS = 4096
MAX_BUFFERS = 8
"""More gain nothing: four already come within 0.02% of the optimum at 1000 steps."""


class NoiseOutOfOrder(LocalProtocolError):
    """A step noised twice or in another order would not have the correlation accounted for."""


class _Toeplitz(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the sensitivity and the error of any Toeplitz C follow from."""

    @abstractmethod
    def coefficients(self, steps: int) -> Array:
        """First column of C, float64 of shape (steps,), nonnegative and never increasing."""

    def inverse_coefficients(self, steps: int) -> Array:
        """First column of C⁻¹, float64 of shape (steps,): step t sends Σ_j of these times z_{t-j}.

        Raises:
            ValueError: ``steps`` is less than 1.
        """
        impulse = np.zeros(_checked(steps))
        impulse[0] = 1.0
        return np.asarray(lfilter([1.0], self._nonzero(steps), impulse))

    def _nonzero(self, steps: int) -> Array:
        return np.trim_zeros(self.coefficients(steps), "b")

    def sensitivity(self, steps: int, min_separation: int, *, planned: int | None = None) -> float:
        """l2 norm of what one example adds to C x, each of its participations having norm 1.

        The worst case over all patterns whose participations lie ``min_separation`` steps apart or
        more: one in step 0 and from there on in every ``min_separation``-th. That is exact for a
        nonnegative C whose columns never increase (Kalinin and Lampert 2024, theorem 2).

        Args:
            steps: how many are released.
            min_separation: least distance of two participations; ``steps`` or more for only one.
            planned: for how many steps C was optimised, if the run was or may be cut short.

        Raises:
            ValueError: an argument is less than 1, or more is released than was planned.
        """
        planned = steps if planned is None else planned
        if not 1 <= steps <= planned:
            raise ValueError(f"steps must lie in [1, {planned}], got {steps}")
        if min_separation < 1:
            raise ValueError(f"min_separation must be at least 1, got {min_separation}")
        apart = min(min_separation, steps)
        times = -(-steps // apart)
        padded = np.zeros(times * apart)
        padded[:steps] = self.coefficients(planned)[:steps]
        return float(np.linalg.norm(padded.reshape(times, apart).cumsum(0).reshape(-1)[:steps]))

    def error(self, steps: int, min_separation: int | None = None) -> float:
        """Standard deviation of the last prefix sum, the noisiest, at equal privacy.

        ‖last row of B‖ · sensitivity, in units of noise_multiplier · clipping bound; independent
        noise has √steps · √participations.

        Args:
            steps: of the run.
            min_separation: as of :meth:`sensitivity`; None for one participation.

        Raises:
            ValueError: as :meth:`sensitivity`.
        """
        last_row = self.inverse_coefficients(steps).cumsum()
        return float(np.linalg.norm(last_row)) * self.sensitivity(steps, min_separation or steps)


class Banded(_Toeplitz, frozen=True, forbid_unknown_fields=True, tag="banded"):
    """C with ``bands`` diagonals, which remembers bands - 1 steps (Choquette-Choo et al. 2023).

    Participations at least ``bands`` steps apart touch columns of C that share no row; so this is
    the strategy that cyclic sampling amplifies (arXiv 2306.08153). c has l2 norm 1. One band is
    independent noise. c minimises the error of the last prefix sum for one participation, which
    for participations at least ``bands`` apart is the optimum as well.
    """

    bands: int

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= MAX_BANDS:
            raise ValueError(f"bands must lie in [1, {MAX_BANDS}], got {self.bands}")

    def coefficients(self, steps: int) -> Array:
        """First column of C, of l2 norm 1; (steps,), zero from ``bands`` on."""
        c = np.zeros(_checked(steps))
        bands = min(self.bands, steps)
        c[:bands] = banded_optimum(bands, steps)
        return c

    def buffers_for(self, steps: int) -> int:
        """How many numbers are remembered for each entry."""
        return min(self.bands, steps) - 1

    def correlate(self, noise_C: Tensor, state_MC: Tensor, step: int, steps: int) -> None:
        """Turn z into w, in place: w_t = (z_t - Σ_j c_j w_{t-j}) / c₀; row t mod M keeps w_t."""
        c = banded_optimum(min(self.bands, steps), steps)
        memory = len(state_MC)
        if memory:
            past = c[1 + (step - 1 - np.arange(memory)) % memory]
            noise_C.addmv_(state_MC.t(), torch.tensor(past, device=noise_C.device), alpha=-1)
        noise_C.div_(c[0])
        if memory:
            state_MC[step % memory] = noise_C


class Blt(_Toeplitz, frozen=True, forbid_unknown_fields=True, tag="blt"):
    """c₀ = 1 and c_j = Σ_d ω_d θ_d^(j-1): buffered linear Toeplitz (Dvijotham et al. 2024).

    Every step weighs on all later ones, at the price of ``buffers`` numbers for each entry. ω and θ
    minimise the error of the last prefix sum times the sensitivity for participations that lie
    ``min_separation`` steps apart, as McMahan et al. 2024 do, or for one participation if that is
    None. What the search finds is sound for every pattern, since :meth:`sensitivity` knows any. The
    search is repeated in every process; another processor may find other last digits.
    """

    buffers: int
    min_separation: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.buffers <= MAX_BUFFERS:
            raise ValueError(f"buffers must lie in [1, {MAX_BUFFERS}], got {self.buffers}")
        if self.min_separation is not None and self.min_separation < 1:
            raise ValueError(f"min_separation must be at least 1, got {self.min_separation}")

    def coefficients(self, steps: int) -> Array:
        """First column of C, with c₀ = 1; (steps,)."""
        theta_D, omega_D = self._optimum(steps)
        return np.concatenate([[1.0], geometric(theta_D, omega_D, steps - 1)])

    def inverse_coefficients(self, steps: int) -> Array:
        """First column of C⁻¹, which is a BLT as well; (steps,)."""
        lambda_D, alpha_D = blt_inverse(*self._optimum(steps))
        return np.concatenate([[1.0], -geometric(lambda_D, alpha_D, steps - 1)])

    def _optimum(self, steps: int) -> tuple[Array, Array]:
        return blt_optimum(self.buffers, _checked(steps), min(self.min_separation or steps, steps))

    def buffers_for(self, steps: int) -> int:
        """How many numbers are remembered for each entry."""
        return self.buffers

    def correlate(self, noise_C: Tensor, state_MC: Tensor, step: int, steps: int) -> None:
        """Turn z into w, in place: w_t = z_t - Σ_d ω_d s_d, then s_d ← θ_d s_d + w_t."""
        theta_D, omega_D = (
            torch.tensor(values, device=noise_C.device) for values in self._optimum(steps)
        )
        noise_C.addmv_(state_MC.t(), omega_D, alpha=-1)
        state_MC.mul_(theta_D[:, None]).add_(noise_C)


Correlation = Banded | Blt


class CorrelatedNoise:
    """Streams x_t + (C⁻¹ z)_t, step after step, with z_t ~ N(0, (noise_multiplier · bound)²).

    The cost of a run is one of all its steps together: a Gaussian mechanism of ``noise_multiplier``
    over :meth:`Banded.sensitivity`; it is not composed of costs of steps, and no step has an event.

    Memory: a float64 for every entry and buffer, bands - 1 or ``buffers`` of them. Float32 would
    save half and shift C x by its rounding, which differs between neighbouring data sets: about
    2^-24 of a deviation on every entry, 0.1% of σ over 10⁸ entries that would have to be accounted.
    What is sent is rounded to the grid of :class:`~privlm.dp.noise.GaussianMechanism`, whose
    docstring says what that is good for.

    Step t's noise is drawn from ``stream.child(f"step {t}")``: whoever holds the stream's seed can
    :meth:`rebuild` the state, and so could take all noise off.

    Args:
        strategy: which C.
        noise_multiplier: standard deviation of z over the clipping bound.
        steps: of the run as planned, for which C is optimised.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, strategy: Correlation, noise_multiplier: float, steps: int) -> None:
        if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
            raise ValueError(f"noise_multiplier must be at least 0, got {noise_multiplier}")
        self._strategy = strategy
        self._noise_multiplier = noise_multiplier
        self._steps = _checked(steps)
        self._next = 0
        self._sensitivity: float | None = None
        self._states_MP: list[Tensor] = []

    @property
    def next_step(self) -> int:
        """The step that may be released next."""
        return self._next

    def release(
        self,
        clipped: ClippedSum,
        step: int,
        stream: Stream | DeviceStream,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, ...]:
        """Noise the clipped sum of ``step``; the tensors that may leave, of its shapes and dtypes.

        An interruption leaves the step counted as released: :meth:`rebuild` before the next.

        Args:
            clipped: as every time before: the same shapes and the same sensitivity.
            step: from 0, without gap or repetition.
            stream: secret, the same every time; a child of it serves each step.
            in_place: overwrite the sum, whose tensors must then be contiguous.

        Raises:
            NoiseOutOfOrder: another step is due, or none.
            ValueError: shapes or sensitivity differ from the steps before.
        """
        if step != self._next or step >= self._steps:
            raise NoiseOutOfOrder(
                f"step {step} of {self._steps} cannot be noised: step {self._next} is due"
            )
        if self._sensitivity not in (None, clipped.l2_sensitivity):
            raise ValueError(
                f"the sensitivity was {self._sensitivity} and is {clipped.l2_sensitivity}: "
                "correlated noise keeps one clipping bound for the whole run"
            )
        values = tuple(value.detach() for value in clipped.values)
        if in_place and not all(value.is_contiguous() for value in values):
            raise ValueError("only contiguous tensors can be noised in place")
        self._require_shapes(values)
        self._sensitivity = clipped.l2_sensitivity
        outs = values
        if not in_place:
            kept = torch.contiguous_format
            outs = tuple(torch.empty_like(value, memory_format=kept) for value in values)
        self._advance(values, outs, step, stream)
        return outs

    def rebuild(self, like: tuple[Tensor, ...], step: int, stream: Stream | DeviceStream) -> None:
        """Draw steps 0 to ``step`` - 1 again, so that ``step`` is due; takes their time.

        A step released a second time must be of the same sum: the noise is the same, and another
        sum would leave with the difference.

        Args:
            like: tensors of the shapes and on the devices of those released.
            step: as many as were released before.
            stream: as of :meth:`release`.

        Raises:
            ValueError: ``step`` lies outside the run.
        """
        if not 0 <= step <= self._steps:
            raise ValueError(f"step must lie in [0, {self._steps}], got {step}")
        self._next, self._sensitivity, self._states_MP = 0, None, []
        self._require_shapes(like)
        like = tuple(value.detach() for value in like)
        for past in range(step):
            self._advance(like, None, past, stream)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint that is kept as secret as the data: with a release it gives the sum."""
        bound = math.nan if self._sensitivity is None else self._sensitivity
        return {
            "next_step": torch.tensor(self._next),
            "l2_sensitivity": torch.tensor(bound, dtype=torch.float64),
            **{f"buffers.{i}": state.clone() for i, state in enumerate(self._states_MP)},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state belongs to another strategy or a longer run.
        """
        step, bound = int(state["next_step"]), float(state["l2_sensitivity"])
        buffers = [state[f"buffers.{i}"] for i in range(len(state) - 2)]
        memory = self._strategy.buffers_for(self._steps)
        if not 0 <= step <= self._steps or any(b.shape[0] != memory for b in buffers):
            raise ValueError("this state belongs to another run's noise")
        self._next = step
        self._sensitivity = None if math.isnan(bound) else bound
        self._states_MP = [buffer.clone() for buffer in buffers]

    def _require_shapes(self, values: tuple[Tensor, ...]) -> None:
        if not self._states_MP:
            memory = self._strategy.buffers_for(self._steps)
            self._states_MP = [
                torch.zeros(memory, v.numel(), dtype=torch.float64, device=v.device) for v in values
            ]
        if [v.numel() for v in values] != [state.shape[1] for state in self._states_MP]:
            raise ValueError("the tensors differ in number or size from the steps before")

    def _advance(
        self,
        values: tuple[Tensor, ...],
        outs: tuple[Tensor, ...] | None,
        step: int,
        stream: Stream | DeviceStream,
    ) -> None:
        self._next = step + 1
        step_stream = stream.child(f"step {step}")
        for i, (value, state_MP) in enumerate(zip(values, self._states_MP, strict=True)):
            drawn = stream_on(value.device, step_stream)
            source, size = value.reshape(-1), chunk_size(value)
            scratch_2C = torch.empty(
                2, min(size, len(source)), dtype=torch.float64, device=value.device
            )
            for start in range(0, len(source), size):
                part = source[start : start + size]
                noise_C, total_C = scratch_2C[:, : len(part)]
                drawn.fill_normal(noise_C)
                state_MC = state_MP[:, start : start + size]
                self._strategy.correlate(noise_C, state_MC, step, self._steps)
                if outs is not None:
                    self._send(part, noise_C, total_C)
                    outs[i].view(-1)[start : start + size].copy_(total_C)

    def _send(self, part_C: Tensor, noise_C: Tensor, total_C: Tensor) -> None:
        assert self._sensitivity is not None
        noise_std = self._noise_multiplier * self._sensitivity
        if noise_std == 0:
            total_C.copy_(part_C)
        else:
            add_on_grid(part_C, noise_C, noise_std, grid_of(noise_std), total_C)


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps
