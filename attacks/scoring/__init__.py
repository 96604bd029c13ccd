"""Where attacks meet the truth: estimates with intervals, controls, and the verdict.

No other room sees which records were trained on, or which text a client held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attacks.scoring.choices import choice_finding
from attacks.scoring.coins import coin_findings
from attacks.scoring.engine import engine_finding
from attacks.scoring.measurement import Curve, Measured, Measurement
from attacks.scoring.membership import measure_membership, statements
from attacks.scoring.texts import SUCCESSES, text_finding
from attacks.statistics import simultaneous_confidence
from attacks.targets import Choices, Coins, Target, Task, Texts, Truth
from attacks.threat import Attack, Claim, Finding, ReleasedModel, Scores

__all__ = ["Curve", "Measured", "Measurement", "attacks_on", "measure"]


def measure(
    target: Target,
    attacks: Sequence[Attack[Any]],
    measurement: Measurement,
    rng: np.random.Generator,
    after_attack: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Put every task of ``target`` to the attacks that see views of its kind, and judge.

    What is held against the claim holds together: bounds on ε with
    ``measurement.confidence``, intervals behind "nothing leaks" with
    :data:`attacks.scoring.secrecy.CONFIDENCE`.

    What an engine did where it was watched is held against the claim's assumptions besides; see
    :mod:`attacks.scoring.engine`.

    Args:
        target: a protected system that ran.
        attacks: declared beforehand.
        measurement: declared beforehand.
        rng: for label permutations and the blind baseline's split; no secret.
        after_attack: told how many attacks on tasks are done, of :func:`attacks_on`.

    Raises:
        ValueError: an attack returned what cannot be judged, or no attack sees a task.
    """
    sent = [
        (task, [attack for attack in attacks if attack.sees is type(task.view)])
        for task in target.tasks
    ]
    judged = sum(_judged(task.truth, len(chosen), target.claim) for task, chosen in sent)
    confidence = simultaneous_confidence(measurement.confidence, max(1, judged))
    findings: list[Finding] = []
    curves: list[Curve] = []
    scores: list[Scores] = []
    done = 0
    for task, chosen in sent:
        if not chosen:
            raise ValueError(
                f"no attack of this suite sees a {type(task.view).__name__}, which "
                f"{task.population} are attacked through; name one in measurement.attacks"
            )
        match task.truth:
            case Truth() as truth:
                assert isinstance(task.view, ReleasedModel)
                measured = measure_membership(
                    task.view, truth, target.claim, chosen, measurement, confidence, rng
                )
                findings += measured.findings
                curves += measured.curves
                scores += measured.scores
                done += len(chosen)
                after_attack(done)
            case Texts() | Choices() as truth:
                for attack in chosen:
                    findings.append(
                        _finding(attack, task, truth, target.claim, measurement, judged)
                    )
                    done += 1
                    after_attack(done)
            case Coins() as truth:
                if target.claim.nothing_leaks:
                    raise ValueError(
                        "coins bound ε; that nothing leaks is tried by choices or by texts"
                    )
                for attack in chosen:
                    found, roc = coin_findings(
                        attack, task, truth, target.claim, measurement, confidence, rng
                    )
                    findings.append(found)
                    curves += roc
                    done += 1
                    after_attack(done)
    if target.trace is not None:
        findings.append(engine_finding(target.trace))
    return Measured(tuple(findings), tuple(curves), tuple(scores))


def attacks_on(target: Target, attacks: Sequence[Attack[Any]]) -> int:
    """How many attacks on tasks :func:`measure` will make."""
    return sum(attack.sees is type(task.view) for task in target.tasks for attack in attacks)


def _finding(
    attack: Attack[Any],
    task: Task,
    truth: Texts | Choices,
    claim: Claim,
    measurement: Measurement,
    judged: int,
) -> Finding:
    if isinstance(truth, Texts):
        return text_finding(attack, task, truth, claim, measurement.confidence, judged)
    return choice_finding(attack, task, truth, claim, measurement.confidence, judged)


def _judged(truth: object, attacks: int, claim: Claim) -> int:
    """How many figures of a task are held against the claim."""
    match truth:
        case Truth():
            return statements(attacks, truth)
        case Coins():
            return attacks
        case Texts():
            return len(SUCCESSES) * attacks if claim.nothing_leaks else 0
        case _:
            return attacks if claim.nothing_leaks else 0
