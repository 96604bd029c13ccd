"""Whether a training engine did what its claim assumes: the law of its noise and of its batches.

No attack is needed to contradict a claim whose noise is not there. The engine's own steps are held
against the public plan: in every parameter tensor the noise has at least the variance claimed, it
does not repeat from one step to the next, and every record joins every batch by its own coin. All
but one of these are a mean of squares over what is claimed of it, whose law is χ² over its degrees
of freedom, d; all are tested together at :data:`attacks.scoring.secrecy.CONFIDENCE`.

Shape suffixes: S steps, W watched coordinates, J planted records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from attacks.scoring.secrecy import CONFIDENCE
from attacks.statistics import Estimate, Interval, rate
from attacks.targets import EngineTrace
from attacks.threat import Finding, Status

NOTICED = 2 / 3
"""Noise of so much of what is claimed has to be noticed with probability `POWER` in every tensor,
or the test was too weak to be passed."""

POWER = 0.99

FEWEST_COUNTS = 10
"""Of whole numbers, for their dispersion to follow χ²."""


@dataclass(frozen=True)
class Law:
    """A mean of squares over what is claimed: 1 on average, and χ²_d/d in distribution.

    Attributes:
        name: what is measured.
        ratio: measured over claimed.
        degrees: d.
        is_noise: of noise more than is claimed harms nobody; else both sides contradict.
    """

    name: str
    ratio: float
    degrees: float
    is_noise: bool

    def less(self) -> float:
        """Probability of a value as small."""
        return float(special.gammainc(self.degrees / 2, self.degrees / 2 * self.ratio))

    def more(self) -> float:
        """Probability of a value as large."""
        return float(special.gammaincc(self.degrees / 2, self.degrees / 2 * self.ratio))

    def contradicts(self, alpha: float) -> bool:
        """Whether the claim is rejected at level ``alpha``."""
        if self.is_noise:
            return self.less() < alpha
        return min(self.less(), self.more()) < alpha / 2

    def interval(self, alpha: float) -> Interval:
        """Of measured over claimed in truth."""
        half = self.degrees / 2
        return Interval(
            self.ratio * half / float(special.gammainccinv(half, alpha / 2)),
            self.ratio * half / float(special.gammaincinv(half, alpha / 2)),
            1 - alpha,
        )

    def would_notice(self, alpha: float) -> bool:
        """Whether noise of `NOTICED` of the deviation claimed is rejected with `POWER`."""
        reject_below = float(special.gammaincinv(self.degrees / 2, alpha))
        return float(special.gammainc(self.degrees / 2, reject_below / NOTICED**2)) >= POWER


def engine_finding(trace: EngineTrace, confidence: float = CONFIDENCE) -> Finding:
    """Hold what the engine did against what its claim assumes.

    A leak if a law is contradicted; with a sound engine that happens with probability 1 -
    ``confidence`` at most. Otherwise the finding stands beside the claim, which ε is held against.

    Args:
        trace: of all steps.
        confidence: of all laws together.
    """
    noises, batches = noise_laws(trace), batch_laws(trace)
    alpha = (1 - confidence) / (len(noises) + len(batches) + 1)
    joins = joins_in_all(trace, alpha)
    tensors = [law for law in noises if law.name in trace.tensors]
    least = min(tensors, key=lambda law: law.ratio)
    status, reason = _judge(trace, noises, batches, joins, alpha)
    return Finding(
        attack="laws of noise and batches",
        population="engine",
        metric=METRIC,
        estimate=Estimate(
            least.ratio,
            least.interval(alpha),
            round(least.degrees),
            f"χ², {least.name}, least of {len(tensors)} tensors",
        ),
        n=trace.noise_SW.size,
        controls=(),
        status=status,
        reason=reason,
        further={JOINS: joins}
        | {
            law.name: Estimate(law.ratio, law.interval(alpha), round(law.degrees), "χ²")
            for law in batches
        },
    )


METRIC = "variance of the noise over the claimed"
JOINS = "joins of canaries"


def _judge(
    trace: EngineTrace, noises: list[Law], batches: list[Law], joins: Estimate, alpha: float
) -> tuple[Status, str]:
    wrong = [law for law in noises if law.contradicts(alpha)]
    if wrong:
        return Status.LEAK, f"noise of less variance than is claimed: {_said(wrong)}"
    wrong = [law for law in batches if law.contradicts(alpha)]
    if wrong:
        return Status.LEAK, (
            f"batches are not drawn by independent coins as is claimed: {_said(wrong)}"
        )
    if 1.0 not in joins.interval:
        return Status.LEAK, f"canaries join {joins.value:.3g} times as many batches as is claimed"
    unwatched = set(trace.tensors) - {law.name for law in noises}
    weak = [law.name for law in noises if not law.would_notice(alpha)]
    if unwatched or weak:
        named = ", ".join(sorted({*unwatched, *weak})[:3])
        return Status.NOT_EVALUABLE, (
            f"noise of two thirds would go unnoticed in {named}; take more steps or plant more "
            "gradient canaries"
        )
    said = f"the noise in all {len(trace.tensors)} tensors is what is claimed or more"
    if batches:
        said += ", batches are drawn as claimed"
    more = [law for law in noises if law.more() < alpha]
    if more:
        said += f"; there is more noise than is claimed: {_said(more)}"
    return Status.NOT_APPLICABLE, f"{said}; ε is held against coins"


def noise_laws(trace: EngineTrace) -> list[Law]:
    """Of every tensor that is watched, and of differences between successive steps."""
    square_SW = np.square(trace.noise_SW / trace.noise_std)
    laws = [
        Law(
            trace.tensors[tensor],
            float(square_SW[:, trace.tensor_W == tensor].mean()),
            float(square_SW[:, trace.tensor_W == tensor].size),
            is_noise=True,
        )
        for tensor in np.unique(trace.tensor_W).tolist()
    ]
    pairs = len(trace.noise_SW) // 2 * 2
    if pairs:
        # Noise that comes again in the next step cancels in the difference.
        change_SW = (trace.noise_SW[1:pairs:2] - trace.noise_SW[0:pairs:2]) / trace.noise_std
        mean = float(np.square(change_SW).mean() / 2)
        laws.append(Law("differences of successive steps", mean, change_SW.size, is_noise=True))
    return laws


def batch_laws(trace: EngineTrace) -> list[Law]:
    """Of how often a canary joins, and of how many join a step: the dispersion of both counts.

    Shuffling lets every record join once an epoch and makes the first vanish; batches of one size
    the second. None where every record joins every batch.
    """
    q, (steps, records) = trace.sampling_probability, trace.joins_SJ.shape
    counts = {
        "dispersion of batches a canary joins": (trace.joins_SJ.sum(0), steps),
        "dispersion of canaries a batch holds": (trace.joins_SJ.sum(1), records),
    }
    return [
        _dispersion(name, count, trials, q)
        for name, (count, trials) in counts.items()
        if q < 1 and len(count) >= FEWEST_COUNTS
    ]


def joins_in_all(trace: EngineTrace, alpha: float) -> Estimate:
    """All joins over their expectation, with the interval of Clopper and Pearson."""
    q, joins = trace.sampling_probability, trace.joins_SJ
    share = rate(int(joins.sum()), joins.size, 1 - alpha)
    ends = Interval(share.interval.low / q, share.interval.high / q, 1 - alpha)
    return Estimate(share.value / q, ends, share.n, share.method)


def _dispersion(name: str, counts: npt.NDArray[np.int64], trials: int, q: float) -> Law:
    """Of independent counts that claim to be Bin(trials, q).

    The square of a standardised count has variance 2 + (1 - 6q(1-q))/(trials q(1-q)); the degrees
    of freedom are those of a χ² with the variance of the mean of these squares.
    """
    variance = trials * q * (1 - q)
    ratio = float(np.square(counts - trials * q).mean() / variance)
    square_variance = 2 + (1 - 6 * q * (1 - q)) / variance
    return Law(name, ratio, 2 * counts.size / square_variance, is_noise=False)


def _said(laws: list[Law]) -> str:
    worst = sorted(laws, key=lambda law: law.ratio)
    named = ", ".join(f"{law.name} ({law.ratio:.3g} of it)" for law in worst[:3])
    return named + (f" and {len(worst) - 3} more" if len(worst) > 3 else "")
