"""What is done to hidden states before they leave the client.

Shapes: T = rows (one a token), D = width.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from privlm.dp.noise import noised
from protocols.errors import LocalProtocolError
from protocols.randomness import NORMAL_DENSE, Stream

_SCALES = (1e-30, 1e30)
"""Of noise and clip: no number that leaves can then overflow a float32, which would tell."""

MIN_DELTA = 1e-12
MIN_EPSILON = 1e-3
"""Below these, float64's errors are no longer far below the margin kept of delta."""

_DELTA_MARGIN = 0.1
"""Part of delta that stays unused, for the tails and float64's errors."""

_SPARSE_FROM = NORMAL_DENSE
"""Deviations, 10.73, to which the sampler's values lie far denser than the grid they are rounded
to. They end at ``protocols.randomness.NORMAL_CUT``, 13.27."""

_TAIL_SHARE = 0.1
"""Part of delta that the sparse tails may take."""

_MARGIN = 1e-9
"""Far more than float64 norms and roots err by; clipping and calibration both stay this far below
their bounds."""


class RowBudgetSpent(LocalProtocolError):
    """A row more than was accounted for would leave with less privacy than promised."""


class Protection(Protocol):
    """Of the rows of one request."""

    @property
    def max_rows(self) -> int | None:
        """Rows that one request may send; None: as many as the context holds."""

    def protect(self, rows_TD: Tensor, stream: Stream) -> Tensor:
        """What leaves in place of the rows: (T, D) float32."""


@dataclass(frozen=True)
class Plain:
    """Rows leave as they are: nothing is protected."""

    @property
    def max_rows(self) -> int | None:
        """No bound."""
        return None

    def protect(self, rows_TD: Tensor, stream: Stream) -> Tensor:
        """The rows as they are."""
        return rows_TD.float()


@dataclass(frozen=True)
class GaussianNoise:
    r"""Each row clipped to l2 norm ``clip``, then N(0, noise_std²) on every number.

    Guarantee, for each request: (ε, δ)-indistinguishability of any two prompts of the same number
    of tokens, to whoever sees all rows sent; their number is public, and the time of sending is
    not covered. Two prompts' rows differ by at most 2 · clip each, so all rows of a request by at
    most Δ = 2 · clip · √max_rows. Rows sent one after the other, each after the server's answer to
    the one before, compose to one Gaussian mechanism with μ = Δ / noise_std (Dong, Roth and Su
    2019, corollary 3.3, on theorem 3.2's adaptive composition), and it satisfies

        δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)        (Balle and Wang 2018, theorem 8).

    The formula holds for exact normals. The sampler's grow sparse from 10.73 deviations on, become
    sparser than the grid they are rounded to at about 12, and end at 13.27: a row out there may
    rule another prompt out. Over all rows this has a probability of about
    max_rows · Φ(2 · clip / noise_std - 10.73); parameters for which that exceeds δ / 10 are
    refused, and ε is computed at 0.9 δ. That "about" is a count of reachable values and no proof.

    A row that holds a NaN or an infinity, or whose norm overflows, becomes the zero row: something
    is sent whatever the prompt.

    Generated tokens are computed from the server's answers, that is, from noised rows: they and the
    moment at which generation stops cost nothing more. By the same argument they are no secret
    from a server that knows the client's tail and head. Requests compose: k of the same user are
    one with k · max_rows rows.

    Args:
        noise_std: Of the noise on every number, from 1e-30 to 1e30.
        clip: Greatest l2 norm of a row, from 1e-30 to 1e30.
        max_rows: Rows that one request may send, prompt and generated tokens together.
        delta: At which ``guarantee`` states ε; from 1e-12 to below 1.

    Raises:
        ValueError: If an argument is out of range, or the noise too little for its tails.
        TypeError: If ``max_rows`` is no integer.
    """

    noise_std: float
    clip: float
    max_rows: int
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_rows", operator.index(self.max_rows))
        _require_scale("noise_std", self.noise_std)
        _require_public(self.clip, self.max_rows, self.delta)
        sparse = float(ndtr(2 * self.clip / self.noise_std - _SPARSE_FROM))
        beyond = min(1.0, self.max_rows * sparse)
        if beyond > _TAIL_SHARE * self.delta:
            raise ValueError(
                f"noise of {self.noise_std:g} is too little for rows clipped to {self.clip:g}: its "
                f"tails are sparse from {_SPARSE_FROM:.2f} deviations on, and a row out there, of "
                f"probability {beyond:.1g}, may tell prompts apart; that must be at most a tenth "
                f"of delta, {self.delta:g}: ask for a smaller epsilon or a greater delta"
            )

    @classmethod
    def for_budget(
        cls, target_epsilon: float, delta: float, clip: float, max_rows: int
    ) -> "GaussianNoise":
        """The least noise whose guarantee is (target_epsilon, delta), rounded up.

        Args:
            target_epsilon: From 1e-3 to 1e9.
            delta: As of the class.
            clip: As of the class.
            max_rows: As of the class.

        Raises:
            ValueError: If an argument is out of range, or so little noise would have too short
                tails.
            TypeError: If ``max_rows`` is no integer.
        """
        if not MIN_EPSILON <= target_epsilon <= 1e9:
            raise ValueError(f"target_epsilon must lie in [0.001, 1e9], got {target_epsilon}")
        max_rows = operator.index(max_rows)
        _require_public(clip, max_rows, delta)
        usable = (1 - _DELTA_MARGIN) * delta
        mu = _root(lambda mu: gaussian_delta(target_epsilon, mu) - usable)
        noise_std = _sensitivity(clip, max_rows) / mu * (1 + _MARGIN)
        return cls(noise_std, clip, max_rows, delta)

    @property
    def l2_sensitivity(self) -> float:
        """Δ, of all rows of a request."""
        return _sensitivity(self.clip, self.max_rows)

    @property
    def mu(self) -> float:
        """Δ / noise_std."""
        return self.l2_sensitivity / self.noise_std

    def guarantee(self) -> tuple[float, float]:
        """(ε, δ) of a request at the stated δ, ε rounded up: 0, or 1e-3 and more."""
        mu, usable = self.mu, (1 - _DELTA_MARGIN) * self.delta
        if gaussian_delta(0.0, mu) <= usable:
            return 0.0, self.delta
        epsilon = _root(lambda epsilon: usable - gaussian_delta(epsilon, mu))
        return max(epsilon * (1 + _MARGIN), MIN_EPSILON), self.delta

    def protect(self, rows_TD: Tensor, stream: Stream) -> Tensor:
        """Clip the rows and add noise to them."""
        return noised(self.clipped(rows_TD), self.noise_std, stream).float()

    def clipped(self, rows: Tensor) -> Tensor:
        """Rows (…, D) in float64, none longer than ``clip``; zeros for one of no finite norm."""
        rows = rows.to(torch.float64)
        norm = rows.norm(dim=-1, keepdim=True)
        factor = (self.clip * (1 - _MARGIN) / norm).clamp(max=1)
        return torch.where(norm.isfinite(), rows * factor, 0.0)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (Balle and Wang 2018, theorem 8)."""
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def _require_public(clip: float, max_rows: int, delta: float) -> None:
    _require_scale("clip", clip)
    if not 1 <= max_rows <= 1 << 31:
        raise ValueError(f"max_rows must lie in [1, 2^31], got {max_rows}")
    if not MIN_DELTA <= delta < 1:
        raise ValueError(f"delta must lie in [1e-12, 1), got {delta}")


def _require_scale(name: str, value: float) -> None:
    low, high = _SCALES
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")


def _sensitivity(clip: float, max_rows: int) -> float:
    return 2.0 * clip * math.sqrt(max_rows)


def _root(increasing: Callable[[float], float]) -> float:
    """The positive zero of a function that is negative towards 0."""
    low, high = 1.0, 1.0
    while increasing(low) > 0:
        low /= 2
    while increasing(high) < 0:
        high *= 2
    if low == high:
        return low
    return float(brentq(increasing, low, high, xtol=1e-300, rtol=1e-14, maxiter=500))
