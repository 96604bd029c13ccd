"""Texts that an attack put together, held against those that were there.

Shape suffixes: N victims.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy.optimize import linear_sum_assignment

from attacks.scoring.secrecy import CONFIDENCE, Figure, judge_secrecy
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
Success = Callable[[Recovered, OneVictims, frozenset[Text]], float]
"""What was made of a victim, its texts, and the texts found anywhere -> a share in [0, 1]."""


def text_finding(
    attack: Attack[object], task: Task, truth: Texts, claim: Claim, confidence: float, judged: int
) -> Finding:
    """Which share of the tokens the attack got right, at their places.

    The victim is the unit of every interval: the tokens of one text are not independent. What is
    held against a claim are the tokens in order, the tokens as a set, and the texts found anywhere,
    linked to their owner or not.

    Args:
        attack: returns a :class:`Reconstruction` of the task's victims.
        task: what is seen, and the same where the protection is broken on purpose.
        truth: of the task.
        claim: what the protection promises.
        confidence: of the intervals that are not held against a claim.
        judged: intervals that are held against the claim together.
    """
    recovered = _reconstruct(attack, task.view, truth)
    together = (
        simultaneous_confidence(CONFIDENCE, judged)
        if claim.nothing_leaks
        else simultaneous_confidence(confidence, len(SUCCESSES))
    )
    if claim.nothing_leaks:
        confidence = together
    figures = {
        name: _against_decoys(success, recovered, truth, confidence, together)
        for name, success in SUCCESSES.items()
    }
    tokens = sum(len(text) for texts in truth.victims for text in texts)
    guessed = _share_guessed(truth)
    controls = [Control("the most frequent public token everywhere", guessed, guessed, guessed)]
    if claim.nothing_leaks:
        broken = [(weak, *_weakened(attack, weak)) for weak in task.weakened]
        verdicts = []
        for name, success in SUCCESSES.items():
            weakened = [_figure(success, made, there.victims) for _, made, there in broken]
            verdicts.append(judge_secrecy(figures[name], tokens, weakened))
            if name == IN_ORDER:
                controls += [
                    weakened_control(weak.broken, estimate)
                    for (weak, *_), estimate in zip(broken, weakened, strict=True)
                ]
        status, reason = max(verdicts, key=lambda verdict: SEVERITY[verdict[0]])
    elif claim.epsilon is not None:
        status = Status.NOT_APPLICABLE
        reason = "shown beside the claim; ε is held against coins"
    elif figures[IN_ORDER].above_chance or figures[EXACTLY].above_chance:
        status, reason = Status.LEAK, "text is recovered, and nothing was claimed"
    elif figures[AS_SET].above_chance:
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
        metric=IN_ORDER,
        estimate=figures[IN_ORDER].estimate,
        n=tokens,
        controls=tuple(controls),
        status=status,
        reason=reason,
        chance=figures[IN_ORDER].chance,
        further={name: figures[name].estimate for name in (AS_SET, EXACTLY)},
    )


def _against_decoys(
    success: Success,
    recovered: tuple[Recovered, ...],
    truth: Texts,
    confidence: float,
    together: float,
) -> Figure:
    """Chance is what the same reconstructions reach against texts that nobody sent.

    Which texts were sent and which are decoys is drawn at random, so without a leak a victim's own
    figure beats its decoys' as often as the reverse: a sign test without the ties. Chance itself is
    measured, so nothing is acquitted by more than its lower end.
    """
    own_N = _shares(success, recovered, truth.victims)
    decoy_N = _shares(success, recovered, truth.decoys)
    wins, losses = int((own_N > decoy_N).sum()), int((own_N < decoy_N).sum())
    return Figure(
        estimate=bounded_mean(own_N, confidence),
        chance=float(decoy_N.mean()),
        sure_chance=bounded_mean(decoy_N, confidence).interval.low,
        above_chance=beats(wins, losses, together),
    )


def beats(wins: int, losses: int, confidence: float) -> bool:
    """Whether a fair coin wins so often with probability 1 - ``confidence`` at most."""
    return wins > 0 and float(special.bdtrc(wins - 1, wins + losses, 0.5)) <= 1 - confidence


def _figure(
    success: Success, recovered: tuple[Recovered, ...], victims: tuple[OneVictims, ...]
) -> Estimate:
    return bounded_mean(_shares(success, recovered, victims))


def _shares(
    success: Success, recovered: tuple[Recovered, ...], victims: tuple[OneVictims, ...]
) -> npt.NDArray[np.float64]:
    found = frozenset(text for made in recovered for text in made.texts)
    return np.array(
        [success(made, texts, found) for made, texts in zip(recovered, victims, strict=True)]
    )


def in_order(
    recovered: Recovered, texts: OneVictims, found: frozenset[Text] = frozenset()
) -> float:
    """Share of the tokens that stand at their place in a recovered text.

    Recovered texts are a set, so they are assigned to the true ones to the attack's best advantage.
    """
    if not recovered.texts:
        return 0.0
    right = np.array(
        [
            [sum(a == b for a, b in zip(text, made, strict=False)) for made in recovered.texts]
            for text in texts
        ]
    )
    return float(right[linear_sum_assignment(right, maximize=True)].sum()) / sum(map(len, texts))


def as_set(recovered: Recovered, texts: OneVictims, found: frozenset[Text] = frozenset()) -> float:
    """Distinct tokens that occur and were named, over those that occur or were named."""
    there = {token for text in texts for token in text}
    return len(there & recovered.tokens) / len(there | recovered.tokens)


def exactly(recovered: Recovered, texts: OneVictims, found: frozenset[Text]) -> float:
    """Share of the texts that were recovered without an error, for whichever victim."""
    return sum(text in found for text in texts) / len(texts)


IN_ORDER = "tokens recovered in order"
AS_SET = "tokens recovered as a set"
EXACTLY = "texts recovered exactly"
SUCCESSES: dict[str, Success] = {IN_ORDER: in_order, AS_SET: as_set, EXACTLY: exactly}
SEVERITY = {Status.NO_EVIDENCE: 0, Status.NOT_EVALUABLE: 1, Status.LEAK: 2}


def weakened_control(how: str, estimate: Estimate) -> Control:
    """What the same attack does where the protection is broken on purpose."""
    ends = estimate.interval
    return Control(f"the same attack where {how}", estimate.value, ends.low, ends.high)


def _weakened(attack: Attack[object], weak: Task) -> tuple[tuple[Recovered, ...], Texts]:
    assert isinstance(weak.truth, Texts)
    return _reconstruct(attack, weak.view, weak.truth), weak.truth


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
