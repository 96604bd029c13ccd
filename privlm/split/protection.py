"""What is done to hidden states before they leave the client.

Shapes: T = rows (one a token), D = width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from privlm.dp.noise import noised
from protocols.errors import LocalProtocolError
from protocols.randomness import Stream

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

    Generated tokens are computed from the server's answers, that is, from noised rows: they and the
    moment at which generation stops cost nothing more. By the same argument they are no secret
    from a server that knows the client's tail and head. Requests compose: k of the same user are
    one with k · max_rows rows.

    Args:
        noise_std: Of the noise on every number, > 0.
        clip: Greatest l2 norm of a row.
        max_rows: Rows that one request may send, prompt and generated tokens together.
        delta: At which ``guarantee`` states ε.

    Raises:
        ValueError: If an argument is out of range.
    """

    noise_std: float
    clip: float
    max_rows: int
    delta: float

    def __post_init__(self) -> None:
        for name in ("noise_std", "clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.max_rows < 1:
            raise ValueError(f"max_rows must be positive, got {self.max_rows}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")

    @classmethod
    def for_budget(
        cls, target_epsilon: float, delta: float, clip: float, max_rows: int
    ) -> "GaussianNoise":
        """The least noise whose guarantee is (target_epsilon, delta), rounded up.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
            raise ValueError(f"target_epsilon must be positive, got {target_epsilon}")
        unit = cls(1.0, clip, max_rows, delta)  # checks the other arguments
        mu = _root(lambda mu: gaussian_delta(target_epsilon, mu) - delta)
        return cls(unit.l2_sensitivity / mu * (1 + _MARGIN), clip, max_rows, delta)

    @property
    def l2_sensitivity(self) -> float:
        """Δ, of all rows of a request."""
        return 2.0 * self.clip * math.sqrt(self.max_rows)

    @property
    def mu(self) -> float:
        """Δ / noise_std."""
        return self.l2_sensitivity / self.noise_std

    def guarantee(self) -> tuple[float, float]:
        """(ε, δ) of a request at the stated δ, ε rounded up."""
        mu = self.mu
        if gaussian_delta(0.0, mu) <= self.delta:
            return 0.0, self.delta
        epsilon = _root(lambda epsilon: self.delta - gaussian_delta(epsilon, mu))
        return epsilon * (1 + _MARGIN), self.delta

    def protect(self, rows_TD: Tensor, stream: Stream) -> Tensor:
        """Clip the rows and add noise to them."""
        return noised(self.clipped(rows_TD), self.noise_std, stream).float()

    def clipped(self, rows: Tensor) -> Tensor:
        """Rows (…, D) in float64, none longer than ``clip``."""
        rows = rows.to(torch.float64)
        factor: Tensor = (self.clip * (1 - _MARGIN) / rows.norm(dim=-1, keepdim=True)).clamp(max=1)
        return rows * factor


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ) (Balle and Wang 2018, theorem 8)."""
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


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
