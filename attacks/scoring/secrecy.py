"""When a measurement may say that *nothing* leaks.

That an attack failed says little: it may be weak, or the trials few. "No evidence" is therefore
said only if the number of trials was declared beforehand and is at least `MIN_TRIALS`, the upper
end of a simultaneous `CONFIDENCE` interval lies at most `MARGIN` above chance, and the same attack
reaches `CONTROL` where the protection is broken on purpose. Otherwise the claim was not evaluable.
"""

from __future__ import annotations

from attacks.statistics import Estimate
from attacks.threat import Status

CONFIDENCE = 0.999
MIN_TRIALS = 5_000
MARGIN = 0.02
CONTROL = 0.9


def judge_secrecy(
    estimate: Estimate, trials: int, chance: float, weakened: Estimate | None
) -> tuple[Status, str]:
    """The verdict on a claim that nothing leaks, and why.

    Args:
        estimate: of the attack's success; its interval holds together with the others'.
        trials: tokens or records, as declared.
        chance: success of a guess that never saw the view.
        weakened: of the same attack where the protection is broken on purpose.
    """
    low, high = estimate.interval.low, estimate.interval.high
    if low > chance:
        return Status.LEAK, (
            f"the attack beats chance ({chance:.2%}), with confidence "
            f"{estimate.interval.confidence:.5g}"
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
    if weakened is None:
        return Status.NOT_EVALUABLE, (
            "no weakened variant of this protection shows what the attack can do"
        )
    if weakened.interval.low < CONTROL:
        return Status.NOT_EVALUABLE, (
            f"on a weakened variant the same attack is sure of {weakened.interval.low:.1%} alone, "
            f"less than {CONTROL:.0%}"
        )
    return Status.NO_EVIDENCE, (
        f"at most {high:.2%} where chance is {chance:.2%}, in {trials:,} trials; on a weakened "
        f"variant the same attack reaches {weakened.value:.1%}"
    )
