"""Fair coins: from scores to a lower bound on ε, and its verdict.

Shape suffixes: N units with a coin each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.scoring.measurement import Curve, Measurement
from attacks.statistics import (
    DEFAULT_GUESS_FRACTIONS,
    Auc,
    Estimate,
    Interval,
    OneRunBound,
    TooFewNonMembers,
    auc,
    canaries_needed,
    one_run_audit,
    permutation_control,
    pointwise_band,
    simultaneous_confidence,
    tpr_at_fpr,
)
from attacks.targets import Coins, Task
from attacks.threat import (
    Attack,
    Claim,
    Control,
    Finding,
    Population,
    Scores,
    Seen,
    Status,
    promised,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

PERMUTATIONS = 199


def scores_of(attack: Attack[Seen], view: Seen) -> Scores:
    """Run an attack that has to return scores.

    Raises:
        TypeError: it returned something else.
    """
    scores = attack.run(view)
    if not isinstance(scores, Scores):
        raise TypeError(f"attack {attack.name!r} on {type(view).__name__} must return Scores")
    return scores


def coin_findings(
    attack: Attack[Any],
    task: Task,
    truth: Coins,
    claim: Claim,
    measurement: Measurement,
    confidence: float,
    rng: np.random.Generator,
) -> tuple[Finding, list[Curve]]:
    """What one attack makes of a task whose truth is coins, and its ROC where records are drawn.

    Where the task has weakened twins, the same attack on them is the positive control: the finding
    says the least that it shows there.
    """
    delta = measurement.delta if claim.delta is None else claim.delta
    values_N = scores_of(attack, task.view).values.double().numpy()
    controls, shown = [], []
    for weak in task.weakened:
        assert isinstance(weak.truth, Coins)
        broken_N = scores_of(attack, weak.view).values.double().numpy()
        bound = one_run_audit(broken_N, weak.truth.coin_N, delta=delta, confidence=confidence)
        shown.append(bound.epsilon)
        name = f"the same attack where {weak.broken}, ε"
        controls.append(Control(name, bound.epsilon, bound.epsilon, math.inf))
    finding = coin_finding(
        attack.name,
        task.population,
        values_N,
        truth.coin_N,
        claim,
        measurement,
        delta,
        confidence,
        tuple(controls),
        rng,
    )
    curves = []
    if task.population == "gradients":
        band = pointwise_band(values_N, truth.coin_N, confidence=measurement.confidence)
        curves.append(Curve(attack.name, task.population, band))
    return dataclasses.replace(finding, broken_bound=min(shown, default=None)), curves


def coin_finding(
    attack: str,
    population: Population,
    scores_N: Floats,
    member_N: Bools,
    claim: Claim,
    measurement: Measurement,
    delta: float,
    confidence: float,
    controls: tuple[Control, ...],
    rng: np.random.Generator,
) -> Finding:
    """Whether scores tell on which side each coin fell, held against the claim.

    Args:
        attack: its name.
        population: what was attacked.
        scores_N: higher for "in".
        member_N: the coins; fair, independent, and one for each unit that the claim speaks of.
        claim: what the protection promises.
        measurement: declared beforehand.
        delta: at which ε is bounded.
        confidence: of this bound.
        controls: to be read beside it.
        rng: for label permutations.
    """
    bound = one_run_audit(scores_N, member_N, delta=delta, confidence=confidence)
    units = "requests" if population in ("requests", "canary rows") else "records"
    status, reason = judge_epsilon(bound, claim, units)
    further = {"AUC": auc(scores_N, member_N, measurement.confidence)}
    try:
        further[f"TPR at {measurement.fpr:.3g} FPR"] = tpr_at_fpr(
            scores_N, member_N, measurement.fpr, measurement.confidence
        )
    except TooFewNonMembers as refusal:
        reason = f"{reason}; {refusal}"
    shuffled = permutation_control(scores_N, member_N, Auc(), PERMUTATIONS, rng)
    return Finding(
        attack=attack,
        population=population,
        metric=f"lower bound on ε at δ = {delta:g}",
        estimate=Estimate(
            bound.epsilon,
            Interval(bound.epsilon, math.inf, confidence),
            bound.canaries,
            f"one run: {bound.correct} of {bound.guesses} guesses right",
        ),
        n=bound.canaries,
        lower_bound=bound.epsilon,
        ceiling=bound.ceiling,
        controls=(
            *controls,
            Control(
                "AUC under permuted labels",
                shuffled.null_mean,
                shuffled.null_band.low,
                shuffled.null_band.high,
                shuffled.p_value,
            ),
        ),
        status=status,
        reason=reason,
        further=further,
    )


def judge_epsilon(bound: OneRunBound, claim: Claim, units: str = "records") -> tuple[Status, str]:
    """The verdict on a lower bound, and why; a ceiling below the claim can contradict nothing."""
    if claim.epsilon is None:
        if bound.epsilon > 0:
            return Status.LEAK, "it shows, and nothing was claimed"
        return Status.NOT_EVALUABLE, "nothing was claimed and this attack found nothing"
    if bound.epsilon > claim.epsilon:
        return Status.LEAK, f"the lower bound exceeds the claimed ε = {promised(claim.epsilon)}"
    if bound.ceiling <= claim.epsilon:
        return Status.NOT_EVALUABLE, (
            f"even a perfect attack on {bound.canaries:,} {units} reaches only "
            f"{bound.ceiling:.2f} ≤ ε = {promised(claim.epsilon)}; "
            f"{_what_would_do(bound, claim.epsilon, units)}"
        )
    return (
        Status.WITHIN_CLAIM,
        f"the lower bound stays within the claimed ε = {promised(claim.epsilon)}",
    )


def _what_would_do(bound: OneRunBound, epsilon: float, units: str) -> str:
    confidence = simultaneous_confidence(bound.confidence, bound.tried)
    try:
        needed = canaries_needed(epsilon, bound.delta, confidence)
    except ValueError:
        return f"at δ = {bound.delta:g} no number of {units} would do"
    return f"about {math.ceil(needed / max(DEFAULT_GUESS_FRACTIONS)):,} would do"
