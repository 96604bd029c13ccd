"""What of a plan decides its cost: the entry that a ledger keeps, and the event behind it."""

from __future__ import annotations

from typing import Literal

import dp_accounting
import msgspec

from privlm.dp.accounting import DpEvent, Neighbours
from privlm.dp.factorization import Banded, Correlation
from privlm.dp.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
)
from privlm.dp.users import ExampleLevelSampling, Users

Unit = Literal["example", "user"]


class UnearnedAmplification(ValueError):
    """Noise, users or relation do not go with this sampler: its amplification would be made up."""


class Spending(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """One kind of release: equal spendings compose, whatever run they come from.

    Of correlated noise the strategy is kept and not its coefficients, which are computed again when
    its cost is asked for: by the version that reads, on the processor that it runs on. A version
    that finds others would have to read these entries as another kind.

    Attributes:
        sampler: draws the batches, and knows its amplification.
        noise_multiplier: standard deviation of the noise over the clipping bound; all that a step
            releases (a count of clipped examples too) costs what one Gaussian release at it costs.
        correlation: of the noise over the steps; None if it is drawn afresh.
        horizon: steps that the correlation was made for; 0 without one.
        users: how a user's examples are taken together; None if an example is the unit.

    Raises:
        UnearnedAmplification: correlated noise, or users, under a sampler whose amplification is
            not proven for them.
    """

    sampler: Sampler
    noise_multiplier: float
    correlation: Correlation | None = None
    horizon: int = 0
    users: Users | None = None

    def __post_init__(self) -> None:
        if isinstance(self.users, ExampleLevelSampling) and not (
            isinstance(self.sampler, PoissonSampler) and self.correlation is None
        ):
            raise UnearnedAmplification(
                "sampling a user's examples (els) is accounted for a Poisson sampler with "
                "independent noise alone; use that, or sample users (uls)"
            )
        if self.correlation is None:
            return
        if self.horizon < 1:
            raise ValueError(f"correlated noise needs a horizon of at least 1, got {self.horizon}")
        if isinstance(self.correlation, Banded) and isinstance(self.sampler, CyclicPoissonSampler):
            if self.sampler.cycle < self.correlation.bands:
                raise UnearnedAmplification(
                    f"{self.correlation.bands} bands need a cycle of as many steps, not "
                    f"{self.sampler.cycle}: within a band the noise of two of an example's steps "
                    "would be correlated"
                )
        elif not isinstance(self.sampler, BallsInBinsSampler):
            raise UnearnedAmplification(
                "no amplification is proven for this correlated noise under this sampler; use "
                "bands with a cyclic-poisson sampler, or a balls-in-bins sampler, which claims none"
            )

    @property
    def unit(self) -> Unit:
        """Whose privacy the cost is about."""
        return "example" if self.users is None else "user"

    @property
    def neighbours(self) -> Neighbours:
        """The relation that the sampler is usually accounted under."""
        return "replace-one" if isinstance(self.sampler, FixedSizeSampler) else "add-or-remove-one"

    def check_steps(self, steps: int) -> None:
        """Raise ``ValueError`` for more steps of one run than correlated noise was made for."""
        if self.correlation is not None and steps > self.horizon:
            raise ValueError(
                f"correlated noise was made for {self.horizon} steps, and nothing is known of "
                f"{steps}; plan as many steps as will be taken"
            )

    def event(self, steps: int) -> DpEvent:
        """What the first ``steps`` steps of one run cost together.

        Raises:
            ValueError: more steps than correlated noise was made for.
        """
        self.check_steps(steps)
        if isinstance(self.users, ExampleLevelSampling):
            assert isinstance(self.sampler, PoissonSampler)
            return self.users.event(self.sampler.sampling_probability, self.noise_multiplier, steps)
        if self.correlation is not None and isinstance(self.sampler, BallsInBinsSampler):
            sensitivity = self.correlation.sensitivity(
                steps, self.sampler.cycle, planned=self.horizon
            )
            return dp_accounting.GaussianDpEvent(self.noise_multiplier / sensitivity)
        return self.sampler.event(self.noise_multiplier, steps)
