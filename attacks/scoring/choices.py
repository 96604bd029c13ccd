"""One of several: how often the attack named the one that was chosen.

Shape suffixes: N trials, C options.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from attacks.scoring.coins import scores_of
from attacks.scoring.secrecy import CONFIDENCE, Figure, judge_secrecy
from attacks.scoring.texts import weakened_control
from attacks.statistics import Estimate, rate, simultaneous_confidence
from attacks.targets import Choices, Task
from attacks.threat import Attack, Claim, Finding, Status


def choice_finding(
    attack: Attack[object],
    task: Task,
    truth: Choices,
    claim: Claim,
    confidence: float,
    judged: int,
) -> Finding:
    """Share of the trials in which the chosen option alone scored highest.

    Args:
        attack: returns scores of shape (N, C).
        task: what is seen, and the same where the protection is broken on purpose.
        truth: of the task; every place was drawn uniformly and by itself.
        claim: what the protection promises.
        confidence: of an interval that is not held against a claim.
        judged: intervals that are held against the claim together.
    """
    chance = 1 / truth.options
    if claim.nothing_leaks:
        confidence = simultaneous_confidence(CONFIDENCE, judged)
    hits = named(attack, task, truth)
    estimate = rate(int(hits.sum()), len(hits), confidence)
    figure = Figure(estimate, chance, chance, estimate.interval.low > chance)
    controls = []
    if claim.nothing_leaks:
        weakened = [_weakened(attack, weak) for weak in task.weakened]
        controls = [
            weakened_control(weak.broken, reached)
            for weak, reached in zip(task.weakened, weakened, strict=True)
        ]
        status, reason = judge_secrecy(figure, len(hits), weakened)
    elif claim.epsilon is not None:
        status, reason = _judge_epsilon(estimate, truth.options, claim)
    elif figure.above_chance:
        status, reason = Status.LEAK, "choices are told apart, and nothing was claimed"
    else:
        status = Status.NOT_EVALUABLE
        reason = "nothing was claimed and this attack found nothing"
    return Finding(
        attack=attack.name,
        population=task.population,
        metric=f"{task.population} matched to one of {truth.options}",
        estimate=estimate,
        n=len(hits),
        controls=tuple(controls),
        status=status,
        reason=reason,
        chance=chance,
    )


def _judge_epsilon(estimate: Estimate, options: int, claim: Claim) -> tuple[Status, str]:
    """Under (ε, δ), one of C is named with probability e^ε/(e^ε + C - 1) + δ at most.

    With s the success over uniform choices, P[i named | i] <= e^ε P[i named | j] + δ for every
    other j; summed over i and j: s <= e^ε (1 - s)/(C - 1) + δ.
    """
    assert claim.epsilon is not None
    most = 1 / (1 + (options - 1) * math.exp(-claim.epsilon)) + (claim.delta or 0.0)
    if estimate.interval.low > most:
        return Status.LEAK, f"more than the {most:.2%} that the claimed ε allows"
    return Status.NOT_APPLICABLE, f"the claimed ε allows {most:.2%}; it is held against coins"


def named(attack: Attack[object], task: Task, truth: Choices) -> npt.NDArray[np.bool_]:
    """In which trials the chosen option scored highest and no other as high.

    Raises:
        ValueError: the scores have another shape, or are not numbers.
    """
    scores_NC = scores_of(attack, task.view).values.double().numpy()
    if scores_NC.shape != (len(truth.place_N), truth.options) or np.isnan(scores_NC).any():
        raise ValueError(
            f"attack {attack.name!r} must return a number for each of {len(truth.place_N)} trials "
            f"and {truth.options} options, got shape {scores_NC.shape}"
        )
    own_N1 = np.take_along_axis(scores_NC, truth.place_N[:, None], axis=1)
    hits: npt.NDArray[np.bool_] = (scores_NC >= own_N1).sum(axis=1) == 1
    return hits


def _weakened(attack: Attack[object], weak: Task) -> Estimate:
    assert isinstance(weak.truth, Choices)
    hits = named(attack, weak, weak.truth)
    return rate(int(hits.sum()), len(hits))
