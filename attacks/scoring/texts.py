"""Texts that an attack put together, held against those that were there.

Shape suffixes: N victims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from attacks.scoring.secrecy import CONFIDENCE, judge_secrecy
from attacks.statistics import Estimate, bounded_mean, simultaneous_confidence
from attacks.targets import Task, Texts
from attacks.threat import (
    Attack,
    Claim,
    Control,
    Finding,
    Reconstruction,
    Recovered,
    Status,
)

Text = tuple[int, ...]
OneVictims = tuple[Text, ...]
Success = Callable[[Recovered, OneVictims], float]


def text_finding(
    attack: Attack[object], task: Task, truth: Texts, claim: Claim, confidence: float, judged: int
) -> Finding:
    """Which share of the tokens the attack got right, at their places.

    The victim is the unit of every interval: the tokens of one text are not independent. Chance is
    what the same reconstructions reach against the texts of the next victim: 0 for an attack that
    is silent when it does not know.

    Args:
        attack: returns a :class:`Reconstruction` of the task's victims.
        task: what is seen, and the same where the protection is broken on purpose.
        truth: of the task.
        claim: what the protection promises.
        confidence: of the intervals that are not held against a claim.
        judged: intervals that are held against the claim together.
    """
    recovered = _reconstruct(attack, task.view, truth)
    if claim.nothing_leaks:
        confidence = simultaneous_confidence(CONFIDENCE, judged)
    in_order_, as_set_ = (
        _against_chance(measure, recovered, truth, confidence) for measure in (in_order, as_set)
    )
    tokens = sum(len(text) for texts in truth.victims for text in texts)
    guessed = _share_guessed(truth)
    controls = [Control("the most frequent public token everywhere", guessed, guessed, guessed)]
    if claim.nothing_leaks:
        weakened = _weakened(attack, task)
        if weakened is not None:
            controls.append(weakened_control(weakened))
        status, reason = max(
            (
                judge_secrecy(figure.estimate, tokens, figure.chance, weakened)
                for figure in (in_order_, as_set_)
            ),
            key=lambda judgement: _SEVERITY[judgement[0]],
        )
    elif claim.epsilon is not None:
        status = Status.NOT_APPLICABLE
        reason = "shown beside the claim; ε is held against the coins of the requests"
    elif in_order_.beats_chance:
        status, reason = Status.LEAK, "text is recovered, and nothing was claimed"
    elif as_set_.beats_chance:
        status = Status.LEAK
        reason = "which tokens occur is recovered, if not their order, and nothing was claimed"
    else:
        status = Status.NOT_EVALUABLE
        reason = "nothing was claimed and this attack found nothing"
    notes = sorted({r.note for r in recovered if r.note})
    if notes:
        reason = f"{reason} ({'; '.join(notes[:3])})"
    return Finding(
        attack=attack.name,
        population=task.population,
        metric="tokens recovered in order",
        estimate=in_order_.estimate,
        n=tokens,
        controls=tuple(controls),
        status=status,
        reason=reason,
        chance=in_order_.chance,
        further={
            "tokens recovered as a set": as_set_.estimate,
            "texts recovered exactly": _figure(exactly, recovered, truth.victims, confidence),
        },
    )


_SEVERITY = {Status.NO_EVIDENCE: 0, Status.NOT_EVALUABLE: 1, Status.LEAK: 2}


@dataclass(frozen=True)
class _Figure:
    estimate: Estimate
    chance: float

    @property
    def beats_chance(self) -> bool:
        return self.estimate.interval.low > self.chance


def _against_chance(
    success: Success, recovered: tuple[Recovered, ...], truth: Texts, confidence: float
) -> _Figure:
    shifted = (*truth.victims[1:], truth.victims[0])
    return _Figure(
        _figure(success, recovered, truth.victims, confidence),
        _figure(success, recovered, shifted, confidence).value,
    )


def _figure(
    success: Success,
    recovered: tuple[Recovered, ...],
    victims: tuple[OneVictims, ...],
    confidence: float,
) -> Estimate:
    shares_N = [success(made, texts) for made, texts in zip(recovered, victims, strict=True)]
    return bounded_mean(shares_N, confidence)


def in_order(recovered: Recovered, texts: OneVictims) -> float:
    """Share of the tokens that stand at their place in a recovered text.

    Recovered texts are a set, so they are assigned to the true ones to the attack's best advantage.
    """
    if not recovered.texts:
        return 0.0
    right = np.array(
        [
            [sum(a == b for a, b in zip(text, found, strict=False)) for found in recovered.texts]
            for text in texts
        ]
    )
    return float(right[linear_sum_assignment(right, maximize=True)].sum()) / sum(map(len, texts))


def as_set(recovered: Recovered, texts: OneVictims) -> float:
    """Distinct tokens that occur and were named, over those that occur or were named."""
    there = {token for text in texts for token in text}
    return len(there & recovered.tokens) / len(there | recovered.tokens)


def exactly(recovered: Recovered, texts: OneVictims) -> float:
    """Share of the texts recovered without an error; of equal texts each counts once."""
    left = list(recovered.texts)
    hits = 0
    for text in texts:
        if text in left:
            left.remove(text)
            hits += 1
    return hits / len(texts)


def weakened_control(estimate: Estimate) -> Control:
    """What the same attack does where the protection is broken on purpose."""
    ends = estimate.interval
    return Control("the same attack, protection broken", estimate.value, ends.low, ends.high)


def _weakened(attack: Attack[object], task: Task) -> Estimate | None:
    if task.weakened is None:
        return None
    truth = task.weakened.truth
    assert isinstance(truth, Texts)
    recovered = _reconstruct(attack, task.weakened.view, truth)
    return _figure(in_order, recovered, truth.victims, 0.95)


def _reconstruct(attack: Attack[object], view: object, truth: Texts) -> tuple[Recovered, ...]:
    made = attack.run(view)
    if not isinstance(made, Reconstruction):
        raise TypeError(
            f"attack {attack.name!r} on {type(view).__name__} must return a Reconstruction"
        )
    if len(made.victims) != len(truth.victims):
        raise ValueError(
            f"attack {attack.name!r} returned {len(made.victims)} victims of {len(truth.victims)}"
        )
    return made.victims


def _share_guessed(truth: Texts) -> float:
    guess = Recovered((truth.guess,), frozenset(truth.guess))
    return float(np.mean([in_order(guess, (text,)) for texts in truth.victims for text in texts]))
