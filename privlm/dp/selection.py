"""What it costs to choose among private runs: hyper-parameter search and early stopping.

Publishing the best of several runs is a release of its own. What it costs beyond one run is bounded
if the number of runs is random (Papernot and Steinke 2022, theorems 2 and 6).

*Early stopping.* Every step of a run is on its ledger, so any of its checkpoints may be published
at the cost of the run, and so may the best of them by a score that is computed from public data, or
from what was released anyway. A score on the private data (a training loss, say) is a release that
nobody has accounted for: score on public data instead.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy import stats
from scipy.optimize import brentq

from privlm.dp.accounting import DpEvent, Epsilon, Neighbours, epsilon_of
from privlm.dp.plan import Plan
from protocols.randomness import Stream

_RESOLUTION = 1 << 62


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Repeat a private run a random number of times, and publish the best outcome only.

    Every trial draws its hyper-parameters anew from one distribution that does not depend on the
    data, and is a whole run of the plan. Scores may be computed from the private data within the
    trial's own budget, or from public data. Neither the number of trials nor any other trial's
    outcome may be published: they cost more.

    Attributes:
        mean_trials: expected number of trials, at least 1.
        law: of the number of trials. ``geometric``: (1 − γ)^(k−1) γ. ``poisson`` may be 0: nothing
            is published then. ``truncated-negative-binomial``: of the given shape; 0 is the
            logarithmic law, 1 the geometric one.
        shape: η of the truncated negative binomial; smaller costs less, and has longer tails.
    """

    mean_trials: float
    law: Literal["geometric", "poisson", "truncated-negative-binomial"] = "geometric"
    shape: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.mean_trials <= 1e6:
            raise ValueError(f"mean_trials must lie in [1, 10^6], got {self.mean_trials}")
        if (self.shape is not None) != (self.law == "truncated-negative-binomial"):
            raise ValueError("give a shape to the truncated-negative-binomial law, and to no other")
        if self.shape is not None and not 0 <= self.shape <= 100:
            raise ValueError(f"shape must lie in [0, 100], got {self.shape}")

    def event(self, trial: DpEvent) -> DpEvent:
        """What publishing the best of the trials costs; Rényi DP knows this event, PLD does not."""
        return RepeatAndSelectDpEvent(trial, self.mean_trials, self._eta)

    @property
    def _eta(self) -> float:
        if self.law == "poisson":
            return math.inf
        return 1.0 if self.shape is None else self.shape

    def draw_trials(self, stream: Stream) -> int:
        """The number of trials of one search, by inversion of the law's distribution function.

        Exact up to the rounding of its float64 probabilities, below 10^-12 in total variation.

        Args:
            stream: secret randomness; the number must stay secret.
        """
        survival = (int(stream.integers(_RESOLUTION, 1)[0]) + 0.5) / _RESOLUTION
        eta = self._eta
        if math.isinf(eta):
            return int(stats.poisson.isf(survival, self.mean_trials))
        if self.mean_trials == 1:
            return 1
        gamma = _gamma(eta, self.mean_trials)
        if eta == 0:
            return int(stats.logser.isf(survival, 1 - gamma))
        at_least_one = -math.expm1(eta * math.log(gamma))
        return int(stats.nbinom.isf(survival * at_least_one, eta, gamma))


def _gamma(eta: float, mean: float) -> float:
    """γ of the truncated negative binomial with this shape and mean (definition 1 of the paper)."""

    def excess(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        if eta == 0:
            return (1 / gamma - 1) / -log_gamma - mean
        return eta * (1 - gamma) / (gamma * -math.expm1(eta * log_gamma)) - mean

    return math.exp(brentq(excess, -60.0, -1e-9, xtol=1e-14))


def epsilon_of_search(
    search: Search, plan: Plan, delta: float | None = None, neighbours: Neighbours | None = None
) -> Epsilon:
    """ε of publishing the best of a search whose trials are runs of ``plan``."""
    return epsilon_of(
        search.event(plan.event()),
        plan.delta if delta is None else delta,
        plan.neighbours if neighbours is None else neighbours,
    )
