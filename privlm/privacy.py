"""The ``privacy`` of a configuration, and the plan that it amounts to."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from privlm.dp.accounting import Neighbours
from privlm.dp.clipping import (
    MIN_GRAD_NORM,
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
)
from privlm.dp.factorization import MAX_BANDS, MAX_BUFFERS, Banded, Blt, Correlation
from privlm.dp.plan import Plan
from privlm.dp.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    PoissonSampler,
    Sampler,
    TruncatedPoissonSampler,
)
from privlm.dp.users import ExampleLevelSampling, UserLevelSampling, Users

# Upper ends keep infinity out, and what would not end in an error but in a swapping machine.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Probability = Annotated[float, msgspec.Meta(gt=0, lt=1)]
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class _Choice(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"
):
    """One of several; ``kind`` says which."""


class Truncated(_Choice, frozen=True, forbid_unknown_fields=True, tag="truncated-poisson"):
    """Poisson batches cut to a size; see :class:`~privlm.dp.sampling.TruncatedPoissonSampler`."""

    max_batch_size: AtLeastOne


class Cyclic(_Choice, frozen=True, forbid_unknown_fields=True, tag="cyclic-poisson"):
    """Groups that take turns; see :class:`~privlm.dp.sampling.CyclicPoissonSampler`."""

    cycle: AtLeastOne


SamplerConfig = Literal["poisson", "fixed-size", "balls-in-bins"] | Truncated | Cyclic
"""``truncated-poisson`` and ``cyclic-poisson`` have parameters and are written as objects."""


class Automatic(_Choice, frozen=True, forbid_unknown_fields=True, tag="automatic"):
    """See :class:`~privlm.dp.clipping.AutomaticClipping`."""

    stability: Positive = 0.01


class Adaptive(_Choice, frozen=True, forbid_unknown_fields=True, tag="adaptive"):
    """See :class:`~privlm.dp.clipping.AdaptiveClipping`."""

    target_quantile: Probability = 0.5
    learning_rate: Positive = 0.2
    count_noise_multiplier: Positive = 20.0


ClippingConfig = Literal["flat", "per-layer", "automatic", "adaptive"] | Automatic | Adaptive


class BandedNoise(_Choice, frozen=True, forbid_unknown_fields=True, tag="banded"):
    """See :class:`~privlm.dp.factorization.Banded`."""

    bands: Annotated[int, msgspec.Meta(ge=1, le=MAX_BANDS)]


class BltNoise(_Choice, frozen=True, forbid_unknown_fields=True, tag="blt"):
    """See :class:`~privlm.dp.factorization.Blt`, made for the sampler's cycle."""

    buffers: Annotated[int, msgspec.Meta(ge=1, le=MAX_BUFFERS)] = 3


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A budget, or a noise multiplier; exactly one of the two.

    Attributes:
        target_epsilon: least noise that keeps within it.
        noise_multiplier: standard deviation of the noise over the clipping bound.
        delta: belongs to both.
        max_grad_norm: the clipping bound; the first one, if ``clipping`` is adaptive.
        sampler: Poisson by default; with correlated noise the one that it needs:
            ``cyclic-poisson`` with a cycle of ``bands``, or ``balls-in-bins`` for ``blt``.
        clipping: ``flat``, ``per-layer``, ``automatic`` or ``adaptive``, or an object with its
            parameters.
        correlation: of the noise over the steps; none by default.
        unit: whose privacy it is: an ``example``'s, or all examples of a ``user`` together.
        examples_per_user: what a user contributes at most; asked for with ``unit: user``.
        user_sampling: ``uls`` draws users, ``batch_size`` of them; ``els`` draws their examples.
        neighbours: ``replace-one`` doubles the sensitivity; a ``fixed-size`` sampler has no other.
    """

    target_epsilon: Positive | None = None
    noise_multiplier: Annotated[float, msgspec.Meta(ge=1e-6, le=1e9)] | None = None
    delta: Probability = 1e-5
    max_grad_norm: Annotated[float, msgspec.Meta(ge=MIN_GRAD_NORM, le=1e9)] = 1.0
    sampler: SamplerConfig | None = None
    clipping: ClippingConfig = "flat"
    correlation: BandedNoise | BltNoise | None = None
    unit: Literal["example", "user"] = "example"
    examples_per_user: AtLeastOne | None = None
    user_sampling: Literal["uls", "els"] = "uls"
    neighbours: Neighbours | None = None

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either target_epsilon or noise_multiplier, and not both")
        if (self.unit == "user") != (self.examples_per_user is not None):
            raise ValueError(
                "unit: user and examples_per_user go together; give both, or neither of them"
            )

    @property
    def users(self) -> Users | None:
        """How a user's examples are taken together."""
        if self.examples_per_user is None:
            return None
        kind = UserLevelSampling if self.user_sampling == "uls" else ExampleLevelSampling
        return kind(self.examples_per_user)

    @property
    def rule(self) -> Clipping:
        """How one unit's gradient is bounded."""
        match self.clipping:
            case "flat":
                return FlatClipping(self.max_grad_norm)
            case "per-layer":
                return PerLayerClipping(self.max_grad_norm)
            case "automatic":
                return AutomaticClipping(self.max_grad_norm)
            case "adaptive":
                return AdaptiveClipping(self.max_grad_norm)
            case Automatic(stability=stability):
                return AutomaticClipping(self.max_grad_norm, stability)
            case Adaptive() as chosen:
                return AdaptiveClipping(
                    self.max_grad_norm,
                    chosen.target_quantile,
                    chosen.learning_rate,
                    chosen.count_noise_multiplier,
                )

    def sampler_over(self, candidates: int, batch_size: int) -> Sampler:
        """The sampler whose batches hold ``batch_size`` of ``candidates``, in expectation."""
        share = batch_size / candidates
        match self.sampler or self._default_sampler():
            case "fixed-size":
                return FixedSizeSampler(batch_size, candidates)
            case "balls-in-bins":
                return BallsInBinsSampler(max(1, round(candidates / batch_size)))
            case Truncated(max_batch_size=most):
                return TruncatedPoissonSampler(share, most, candidates)
            case Cyclic(cycle=cycle):
                if batch_size * cycle > candidates:
                    raise ValueError(
                        f"each of {cycle} groups has about {candidates // cycle} of {candidates} "
                        f"candidates, fewer than batch_size {batch_size}; lower it or the cycle"
                    )
                return CyclicPoissonSampler(batch_size * cycle / candidates, cycle)
            case _:
                return PoissonSampler(share)

    def _default_sampler(self) -> SamplerConfig:
        match self.correlation:
            case BandedNoise(bands=bands):
                return Cyclic(cycle=bands)
            case BltNoise():
                return "balls-in-bins"
            case _:
                return "poisson"

    def _correlated(self, sampler: Sampler) -> Correlation | None:
        match self.correlation:
            case BandedNoise(bands=bands):
                return Banded(bands)
            case BltNoise(buffers=buffers):
                return Blt(buffers, getattr(sampler, "cycle", None))
            case _:
                return None


def make_plan(
    privacy: PrivacyConfig,
    *,
    candidates: int,
    epochs: float,
    batch_size: int,
    users_known: bool = False,
) -> Plan:
    """The plan of a run.

    Args:
        privacy: the configuration.
        candidates: what the sampler draws from, a number treated as public: examples, or users
            if those are sampled.
        epochs: how often one of them is drawn, in expectation.
        batch_size: expected.
        users_known: the caller bounds what each user contributes.

    Raises:
        ValueError: a batch larger than the data, a budget that no noise reaches, choices that do
            not go together, or users to protect where nobody bounds what they contribute.
    """
    check_batch_size(batch_size, candidates)
    if privacy.unit == "user" and not users_known:
        raise ValueError(
            "privacy.unit: a user is protected by `privlm train` alone, which bounds what each "
            "contributes; protect an example here"
        )
    sampler = privacy.sampler_over(candidates, batch_size)
    fixed = isinstance(sampler, FixedSizeSampler)
    neighbours = privacy.neighbours or ("replace-one" if fixed else "add-or-remove-one")
    expected = float(batch_size)
    if isinstance(sampler, BallsInBinsSampler):
        expected = candidates / sampler.cycle
    steps = planned_steps(candidates, epochs, expected)
    correlation = privacy._correlated(sampler)
    if privacy.noise_multiplier is not None:
        return Plan(
            sampler=sampler,
            steps=steps,
            noise_multiplier=privacy.noise_multiplier,
            expected_batch_size=expected,
            delta=privacy.delta,
            clipping=privacy.rule,
            neighbours=neighbours,
            correlation=correlation,
            users=privacy.users,
        )
    assert privacy.target_epsilon is not None  # PrivacyConfig holds exactly one of the two
    return Plan.for_budget(
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        sampler=sampler,
        steps=steps,
        expected_batch_size=expected,
        clipping=privacy.rule,
        neighbours=neighbours,
        correlation=correlation,
        users=privacy.users,
    )


def planned_steps(examples: int, epochs: float, batch_size: float) -> int:
    """Steps in which an example is seen ``epochs`` times, in expectation; at least one."""
    return max(1, round(epochs * examples / batch_size))


def check_batch_size(batch_size: int, candidates: int) -> None:
    """Raise ``ValueError`` for a batch larger than the data."""
    if batch_size > candidates:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {candidates} private examples (or users, if "
            "those are sampled); lower batch_size, or add data"
        )


def needs_one_seed(plan: Plan) -> bool:
    """Whether a run of this plan has to go on under the randomness that it began with.

    Noise correlated over the steps takes back what was added before; groups, bins and users'
    contributions are drawn once for the whole run. Independent noise and batches are drawn afresh.
    """
    return plan.needs_one_stream or plan.users is not None
