"""Gradient canaries of an audited training: planted before it, and seen by its strongest adversary.

Shape suffixes: C canaries, W witnesses, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import nn

from attacks.targets.frame import Coins, EngineTrace, Task
from attacks.white_box import SeenGradients
from privlm.data import draw_membership
from privlm.dp.canaries import GradientCanaries, Observed
from privlm.dp.clipping import AdaptiveClipping
from privlm.dp.plan import Plan
from privlm.dp.sampling import PoissonSampler
from privlm.dp.trade_off import trade_off
from protocols.randomness import Stream


@dataclass(frozen=True, eq=False)
class Planted:
    """Canaries in one run, and the coins that decided which of them are in its data."""

    canaries: GradientCanaries = field(repr=False)
    coin_C: npt.NDArray[np.bool_] = field(repr=False)
    plan: Plan
    sampling_probability: float
    tensors: tuple[str, ...] = field(repr=False)

    def task(self) -> Task:
        """Which canaries were trained on, and the same where the noise is left out.

        The twin is the same run: what was summed, in place of what was released.
        """
        seen = self.canaries.observed()
        no_noise = np.zeros_like(seen.noise_SW)
        coins = Coins(self.coin_C)
        weak = Task(
            "gradients",
            self._view(seen, seen.exact_SC, no_noise),
            coins,
            broken="the noise is left out",
        )
        view = self._view(seen, seen.released_SC, seen.noise_SW)
        return Task("gradients", view, coins, weakened=(weak,))

    def trace(self) -> EngineTrace:
        """What the engine did."""
        seen = self.canaries.observed()
        return EngineTrace(
            noise_SW=seen.noise_SW,
            tensor_W=self.canaries.witnesses.tensor_M,
            tensors=self.tensors,
            noise_std=self._noise_std,
            joins_SJ=seen.joins_SJ,
            sampling_probability=self.sampling_probability,
        )

    @property
    def _noise_std(self) -> float:
        """As the plan claims it; what the mechanism makes of it is what is audited."""
        return self.plan.noise_multiplier * self.plan.max_grad_norm

    def _view(
        self,
        seen: Observed,
        released_SC: npt.NDArray[np.float64],
        noise_SW: npt.NDArray[np.float64],
    ) -> SeenGradients:
        return SeenGradients(
            released_SC=released_SC,
            background_SC=seen.background_SC,
            noise_SW=noise_SW,
            tensor_C=self.canaries.canaries.tensor_M,
            tensor_W=self.canaries.witnesses.tensor_M,
            norm=self.plan.max_grad_norm,
            noise_std=self._noise_std,
            sampling_probability=self.sampling_probability,
        )


def plant_gradients(
    model: nn.Module, count: int, plan: Plan, *, seed: int, stream: Stream
) -> Planted:
    """``count`` canaries and as many witnesses over all tensors of ``model`` that are trained.

    Args:
        model: in training.
        count: canaries, each in the data by its own fair coin.
        plan: of the run.
        seed: of the coordinates, which are no secret.
        stream: of the coins.

    Raises:
        ValueError: the model has too few parameters, or the plan draws batches otherwise than by
            Poisson's coins, moves the clipping bound, or correlates the noise.
    """
    sampler = plan.sampler
    if (
        not isinstance(sampler, PoissonSampler)
        or isinstance(plan.clipping, AdaptiveClipping)
        or plan.correlation is not None
    ):
        raise ValueError(
            "gradient canaries are judged by the law of Poisson-sampled batches, one clipping "
            "bound and independent noise; audit such a plan"
        )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    coin_C = draw_membership(count, stream)
    canaries = GradientCanaries.spread(
        [p for _, p in trained], coin_C, count, plan.max_grad_norm, np.random.default_rng(seed)
    )
    return Planted(
        canaries, coin_C, plan, sampler.sampling_probability, tuple(name for name, _ in trained)
    )


def check_room(model: nn.Module, count: int) -> None:
    """Raise ``ValueError`` unless canaries and witnesses fit into the model."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if 2 * count > parameters:
        raise ValueError(
            f"training.canaries.gradients: {count:,} canaries and as many witnesses do not fit "
            f"into {parameters:,} parameters; plant fewer"
        )


def trade_off_of(plan: Plan) -> tuple[tuple[float, float], ...]:
    """(false positive rate, highest true positive rate) under the plan, on a logarithmic grid."""
    fpr_G = np.geomspace(1e-5, 1.0, 120)
    tpr_G = trade_off(plan.event(), fpr_G, plan.neighbours)
    return tuple(zip(fpr_G.tolist(), tpr_G.tolist(), strict=True))
