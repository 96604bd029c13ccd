"""What ``privlm account`` answers: the cost of a plan that nobody has made yet."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from privlm.dp.accounting import Epsilon, epsilon_of
from privlm.dp.factorization import Banded, Blt
from privlm.dp.plan import Plan
from privlm.dp.sampling import Sampler
from privlm.dp.selection import Search, epsilon_of_search
from privlm.dp.users import ExampleLevelSampling, UserLevelSampling

SamplerKind = Literal[
    "poisson", "truncated-poisson", "fixed-size", "cyclic-poisson", "balls-in-bins"
]
UserSampling = Literal["els", "uls"]

_TAKES = {
    "poisson": ("sampling_probability",),
    "truncated-poisson": ("sampling_probability", "max_batch_size", "population"),
    "fixed-size": ("batch_size", "population"),
    "cyclic-poisson": ("sampling_probability", "cycle"),
    "balls-in-bins": ("cycle",),
}
_OPTIONS = {
    "sampling_probability": "--sample-rate",
    "max_batch_size": "--max-batch-size",
    "batch_size": "--batch-size",
    "population": "--population",
    "cycle": "--cycle",
}


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``privlm account``; what a sampler does not take is None."""

    sampler: SamplerKind
    steps: int
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    sampling_probability: float | None = None
    max_batch_size: int | None = None
    batch_size: int | None = None
    population: int | None = None
    cycle: int | None = None
    bands: int | None = None
    buffers: int | None = None
    users: UserSampling | None = None
    examples_per_user: int | None = None
    replace_one: bool = False
    trials: float | None = None

    def __post_init__(self) -> None:
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError("give --noise-multiplier, --target-epsilon, or both")
        if self.bands is not None and self.buffers is not None:
            raise ValueError("give --bands or --buffers, and not both")
        if (self.users is None) != (self.examples_per_user is None):
            raise ValueError("give --users and --examples-per-user together")
        if self.trials is not None and self.target_epsilon is not None:
            raise ValueError("--trials answers for a --noise-multiplier, not for a target")
        for name, option in _OPTIONS.items():
            given, taken = getattr(self, name) is not None, name in _TAKES[self.sampler]
            if given != taken:
                verb = "needs" if taken else "does not take"
                raise ValueError(f"--sampler {self.sampler} {verb} {option}")

    def plan(self, noise_multiplier: float) -> Plan:
        """The plan that is asked about, at this noise."""
        taken = {name: getattr(self, name) for name in _TAKES[self.sampler]}
        correlation: Banded | Blt | None = None
        if self.bands is not None:
            correlation = Banded(self.bands)
        elif self.buffers is not None:
            correlation = Blt(self.buffers)
        users: ExampleLevelSampling | UserLevelSampling | None = None
        if self.users is not None and self.examples_per_user is not None:
            kind = ExampleLevelSampling if self.users == "els" else UserLevelSampling
            users = kind(self.examples_per_user)
        return Plan(
            sampler=msgspec.convert({"type": self.sampler} | taken, Sampler),
            steps=self.steps,
            noise_multiplier=noise_multiplier,
            expected_batch_size=1.0,  # costs nothing
            delta=self.delta,
            neighbours="replace-one" if self.replace_one else "add-or-remove-one",
            correlation=correlation,
            users=users,
        )


def cost(question: Question) -> dict[str, Any]:
    """ε of the plan, and what a target ε would take, as plain values.

    Raises:
        ValueError: a plan that cannot be, or a target that no noise reaches.
    """
    sigma, target = question.noise_multiplier, {}
    if question.target_epsilon is not None:
        draft = question.plan(1.0)
        calibrated = Plan.for_budget(
            target_epsilon=question.target_epsilon,
            delta=draft.delta,
            sampler=draft.sampler,
            steps=draft.steps,
            expected_batch_size=draft.expected_batch_size,
            neighbours=draft.neighbours,
            correlation=draft.correlation,
            users=draft.users,
        ).noise_multiplier
        target = {
            "target_epsilon": question.target_epsilon,
            "noise_multiplier_for_target": calibrated,
        }
        if sigma is None:
            sigma = calibrated
        elif draft.correlation is None:
            target["steps_for_target"] = question.plan(sigma).most_steps(question.target_epsilon)
    assert sigma is not None  # Question holds at least one of the two
    plan = question.plan(sigma)
    spent = _spent(question, plan)
    relation = "replace" if question.replace_one else "add or remove"
    return {
        "epsilon": spent.value,
        "delta": question.delta,
        "accountant": spent.accountant,
        "fallback_reason": spent.fallback_reason,
        "noise_multiplier": sigma,
        "sampler": msgspec.to_builtins(plan.sampler),
        "sample_rate": question.sampling_probability,
        "steps": question.steps,
        "neighbours": f"{relation} one {plan.unit}",
    } | target


def _spent(question: Question, plan: Plan) -> Epsilon:
    if question.trials is not None:
        return epsilon_of_search(Search(mean_trials=question.trials), plan)
    return epsilon_of(plan.event(), plan.delta, plan.neighbours)
