"""When a measurement may say that *nothing* leaks.

That an attack failed says little: it may be weak, or the trials few. "No evidence" is therefore
said only if the number of trials was declared beforehand and is at least `MIN_TRIALS`, the upper
end of a simultaneous `CONFIDENCE` interval lies at most `MARGIN` above chance, and the same attack
is sure to reach `CONTROL` wherever the protection is broken on purpose. Otherwise the claim was not
evaluable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attacks.statistics import Estimate
from attacks.threat import Status

CONFIDENCE = 0.999
MIN_TRIALS = 5_000
MARGIN = 0.02
CONTROL = 0.9


@dataclass(frozen=True)
class Figure:
    """One figure of an attack's success, beside what it reaches without any leak.

    Attributes:
        estimate: with its interval.
        chance: known, or measured.
        sure_chance: the same, or the lower end of an interval where it had to be measured.
        above_chance: whether the figure exceeds chance beyond doubt.
    """

    estimate: Estimate
    chance: float
    sure_chance: float
    above_chance: bool


def judge_secrecy(figure: Figure, trials: int, weakened: Sequence[Estimate]) -> tuple[Status, str]:
    """The verdict on a claim that nothing leaks, and why.

    Args:
        figure: its interval holds together with those of the others that are held to the claim.
        trials: tokens or records, as declared.
        weakened: the same figure of the same attack, for each way in which the protection was
            broken on purpose.
    """
    high, chance = figure.estimate.interval.high, figure.sure_chance
    if figure.above_chance:
        return Status.LEAK, (
            f"the attack beats chance ({figure.chance:.2%}), with confidence "
            f"{figure.estimate.interval.confidence:.5g}"
        )
    if trials < MIN_TRIALS:
        return Status.NOT_EVALUABLE, (
            f"that nothing leaks needs {MIN_TRIALS:,} trials or more, these are {trials:,}"
        )
    if high > chance + MARGIN:
        return Status.NOT_EVALUABLE, (
            f"the interval reaches {high:.2%}, more than {MARGIN:.0%} above chance "
            f"({chance:.2%}); more trials would narrow it"
        )
    if not weakened:
        return Status.NOT_EVALUABLE, (
            "no weakened variant of this protection shows what the attack can do"
        )
    surely = min(estimate.interval.low for estimate in weakened)
    if surely < CONTROL:
        return Status.NOT_EVALUABLE, (
            f"on a weakened variant the same attack is sure of {surely:.1%} alone, "
            f"less than {CONTROL:.0%}"
        )
    return Status.NO_EVIDENCE, (
        f"at most {high:.2%} where chance is {chance:.2%}, in {trials:,} trials; on weakened "
        f"variants the same attack reaches {min(e.value for e in weakened):.1%}"
    )
