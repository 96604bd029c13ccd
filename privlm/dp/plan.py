"""The public parameters of a private training run, and what they guarantee."""

from __future__ import annotations

import math
from typing import Literal

import dp_accounting
import msgspec

from privlm.dp.accounting import (
    Accountant,
    DpEvent,
    calibrate_noise_multiplier,
    epsilon_of,
    rounded_up,
)
from privlm.dp.noise import GaussianMechanism
from privlm.dp.sampling import PoissonSampler

Unit = Literal["example"]


class Guarantee(msgspec.Struct, frozen=True):
    """(ε, δ)-differential privacy of one unit under add-or-remove-one.

    ``unit`` says what one "record" is; ``accountant`` who computed ε.
    """

    epsilon: float
    delta: float
    unit: Unit
    accountant: Accountant

    def __str__(self) -> str:
        return f"(ε = {rounded_up(self.epsilon)}, δ = {self.delta:g})-DP per {self.unit}"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything public about a DP-SGD run; frozen before the data is touched.

    Attributes:
        sampler: draws the batches and earns the amplification; one object.
        steps: number of releases, at most.
        noise_multiplier: standard deviation of the noise over the sensitivity.
        max_grad_norm: per-example l2 clipping bound; the l2 sensitivity of the
            clipped sum under add-or-remove-one.
        expected_batch_size: the normaliser of the noised sum. A public constant:
            the true batch size is never used, because it depends on the data.
        delta: the δ of the guarantee.

    Source: Abadi et al. 2016, algorithm 1, with Poisson sampling.
    """

    sampler: PoissonSampler
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    delta: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier must be at least 0, got {self.noise_multiplier}")
        if not (self.max_grad_norm > 0 and math.isfinite(self.max_grad_norm)):
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not (self.expected_batch_size > 0 and math.isfinite(self.expected_batch_size)):
            raise ValueError(
                f"expected_batch_size must be positive, got {self.expected_batch_size}"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")

    @classmethod
    def for_budget(
        cls,
        *,
        target_epsilon: float,
        delta: float,
        sampler: PoissonSampler,
        steps: int,
        max_grad_norm: float,
        expected_batch_size: float,
    ) -> Plan:
        """The plan with the least noise that spends at most ``target_epsilon``.

        Raises:
            ValueError: a parameter out of range, or an ε that no noise reaches.
        """
        draft = cls(
            sampler=sampler,
            steps=steps,
            noise_multiplier=1.0,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            delta=delta,
        )
        noise_multiplier = calibrate_noise_multiplier(
            lambda sigma: msgspec.structs.replace(draft, noise_multiplier=sigma).event(),
            target_epsilon,
            delta,
        )
        return msgspec.structs.replace(draft, noise_multiplier=noise_multiplier)

    @property
    def mechanism(self) -> GaussianMechanism:
        """The mechanism that turns a clipped sum into a release."""
        return GaussianMechanism(self.noise_multiplier)

    def step_event(self) -> DpEvent:
        """What one step releases."""
        return self.sampler.amplify(self.mechanism.event)

    def event(self) -> DpEvent:
        """What all steps release together."""
        return dp_accounting.SelfComposedDpEvent(self.step_event(), self.steps)

    def guarantee(self) -> Guarantee:
        """The guarantee of the full run; costs one accounting."""
        spent = epsilon_of(self.event(), self.delta)
        return Guarantee(spent.value, self.delta, "example", spent.accountant)
