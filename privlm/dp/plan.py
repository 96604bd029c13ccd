"""The public parameters of a private training run, and what they guarantee."""

from __future__ import annotations

import math

import msgspec

from privlm.dp.accounting import (
    Accountant,
    DpEvent,
    Neighbours,
    check_delta,
    epsilon_of,
    rounded_up,
)
from privlm.dp.calibration import LEAST_NOISE, calibrate_noise_multiplier, most_steps
from privlm.dp.clipping import AdaptiveClipping, Clipping, FlatClipping
from privlm.dp.factorization import Correlation
from privlm.dp.noise import GaussianMechanism
from privlm.dp.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    Sampler,
)
from privlm.dp.spending import Spending, UnearnedAmplification, Unit
from privlm.dp.users import ExampleLevelSampling, Users


class Guarantee(msgspec.Struct, frozen=True):
    """(ε, δ)-differential privacy of one unit.

    ``unit`` says what one "record" is; ``accountant`` who computed ε; ``neighbours`` which data
    sets cannot be told apart.
    """

    epsilon: float
    delta: float
    unit: Unit
    accountant: Accountant
    neighbours: Neighbours = "add-or-remove-one"

    def __str__(self) -> str:
        relation = "" if self.neighbours == "add-or-remove-one" else ", for replacing one"
        return f"(ε = {rounded_up(self.epsilon)}, δ = {self.delta:g})-DP per {self.unit}{relation}"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything public about a private run; frozen before the data is touched.

    Attributes:
        sampler: draws the batches and earns the amplification; one object.
        steps: number of releases, at most.
        noise_multiplier: standard deviation of the noise over the clipping bound; with adaptive
            clipping, what gradients and count together amount to.
        clipping: how one unit's gradient is bounded.
        expected_batch_size: the normaliser of the noised sum. A public constant:
            the true batch size is never used, because it depends on the data.
        delta: the δ of the guarantee.
        neighbours: the relation of the guarantee. ``replace-one`` doubles the sensitivity; a
            fixed-size sampler is accounted under it alone.
        correlation: of the noise over the steps; None for DP-SGD's independent noise.
        users: how a user's examples are taken together; None if an example is the unit.

    Raises:
        UnearnedAmplification: sampler, noise, users and relation do not go together; see
            :class:`~privlm.dp.spending.Spending`.
        ValueError: a parameter out of range.

    Source: Abadi et al. 2016, algorithm 1; Choquette-Choo et al. 2023 for correlated noise.
    """

    sampler: Sampler
    steps: int
    noise_multiplier: float
    expected_batch_size: float
    delta: float
    clipping: Clipping = FlatClipping()
    neighbours: Neighbours = "add-or-remove-one"
    correlation: Correlation | None = None
    users: Users | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier must be at least 0, got {self.noise_multiplier}")
        if not (self.expected_batch_size > 0 and math.isfinite(self.expected_batch_size)):
            raise ValueError(
                f"expected_batch_size must be positive, got {self.expected_batch_size}"
            )
        check_delta(self.delta)
        _ = self.spending  # checks what goes together
        if isinstance(self.clipping, AdaptiveClipping):
            self.clipping.gradient_noise_multiplier(self.noise_multiplier)
            if self.correlation is not None:
                raise ValueError(
                    "adaptive clipping changes the bound that correlated noise is spread over; "
                    "use another clipping, or independent noise"
                )
        if self.neighbours != "replace-one" and isinstance(self.sampler, FixedSizeSampler):
            raise UnearnedAmplification(
                "batches of fixed size earn amplification for replacing one example, not for "
                "adding or removing one; set neighbours to replace-one, or use a Poisson sampler"
            )
        if self.neighbours == "replace-one" and isinstance(self.users, ExampleLevelSampling):
            raise UnearnedAmplification(
                "sampling a user's examples (els) is accounted for adding or removing one user; "
                "sample users (uls) to replace one"
            )

    @classmethod
    def for_budget(
        cls,
        *,
        target_epsilon: float,
        delta: float,
        sampler: Sampler,
        steps: int,
        expected_batch_size: float,
        max_grad_norm: float = 1.0,
        clipping: Clipping | None = None,
        neighbours: Neighbours = "add-or-remove-one",
        correlation: Correlation | None = None,
        users: Users | None = None,
    ) -> Plan:
        """The plan with the least noise that spends at most ``target_epsilon``.

        ``clipping`` is flat, to ``max_grad_norm``, unless it is given; the other arguments are the
        plan's.

        Raises:
            ValueError: a parameter out of range, or an ε that no noise reaches.
        """
        draft = cls(
            sampler=sampler,
            steps=steps,
            noise_multiplier=LEAST_NOISE,
            expected_batch_size=expected_batch_size,
            delta=delta,
            clipping=FlatClipping(max_grad_norm) if clipping is None else clipping,
            neighbours=neighbours,
            correlation=correlation,
            users=users,
        )
        found = calibrate_noise_multiplier(
            lambda sigma: msgspec.structs.replace(draft.spending, noise_multiplier=sigma).event(
                steps
            ),
            target_epsilon,
            delta,
            neighbours,
        )
        return msgspec.structs.replace(draft, noise_multiplier=found)

    @property
    def max_grad_norm(self) -> float:
        """The l2 bound on one unit's contribution, at the first step."""
        return self.clipping.max_grad_norm

    @property
    def unit(self) -> Unit:
        """Whose privacy the guarantee is about."""
        return self.spending.unit

    @property
    def spending(self) -> Spending:
        """What of this plan decides the cost; what the ledger keeps."""
        return Spending(
            sampler=self.sampler,
            noise_multiplier=self.noise_multiplier,
            correlation=self.correlation,
            horizon=0 if self.correlation is None else self.steps,
            users=self.users,
        )

    @property
    def mechanism(self) -> GaussianMechanism:
        """The mechanism that turns a clipped sum into a release.

        Its multiplier is the gradients': larger than the plan's where a count is released too.
        """
        if isinstance(self.clipping, AdaptiveClipping):
            return GaussianMechanism(self.clipping.gradient_noise_multiplier(self.noise_multiplier))
        return GaussianMechanism(self.noise_multiplier)

    @property
    def needs_one_stream(self) -> bool:
        """Whether all steps must come from one secret stream, a resumed run's too.

        Correlated noise continues the noise before it, and fixed assignments of examples to steps
        are drawn once; drawn anew, the accounting of one run would no longer cover both parts.
        """
        fixed = isinstance(self.sampler, CyclicPoissonSampler | BallsInBinsSampler)
        return self.correlation is not None or fixed

    def event(self, steps: int | None = None) -> DpEvent:
        """What the first ``steps`` steps, by default all, release together."""
        return self.spending.event(self.steps if steps is None else steps)

    def most_steps(self, target_epsilon: float, at_most: int | None = None) -> int:
        """How many steps of this kind stay within ``target_epsilon``; 0 if not even one does.

        Raises:
            ValueError: correlated noise, which is made for one number of steps.
        """
        if self.correlation is not None:
            raise ValueError(
                "correlated noise is made for its number of steps; calibrate the noise"
            )
        return most_steps(
            self.spending.event, target_epsilon, self.delta, self.neighbours, at_most=at_most
        )

    def guarantee(self) -> Guarantee:
        """The guarantee of the full run; costs one accounting."""
        spent = epsilon_of(self.event(), self.delta, self.neighbours)
        return Guarantee(spent.value, self.delta, self.unit, spent.accountant, self.neighbours)
