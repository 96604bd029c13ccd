"""Where scores meet the truth: estimates with intervals, controls, and the verdict.

No other room sees which records were trained on.

Shape suffixes: N records, K secret canaries, C candidate secrets, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from attacks.membership import ATTACKS
from attacks.membership.secrets import guess_secrets, guess_secrets_blind
from attacks.statistics import (
    DEFAULT_GUESS_FRACTIONS,
    Auc,
    Estimate,
    Interval,
    OneRunBound,
    RocBand,
    TooFewNonMembers,
    auc,
    canaries_needed,
    chernoff_interval,
    one_run_audit,
    permutation_control,
    pointwise_band,
    rate,
    simultaneous_confidence,
    tpr_at_fpr,
)
from attacks.targets import Truth
from attacks.threat import (
    Claim,
    Control,
    Finding,
    Population,
    ReleasedModel,
    Scores,
    Status,
    promised,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

PERMUTATIONS = 199


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is declared before any model is attacked.

    ``confidence`` holds for all bounds of one protection together. ``delta`` is
    the δ at which ε is bounded where the claim names none.
    """

    attacks: tuple[str, ...] = tuple(ATTACKS)
    confidence: float = 0.95
    fpr: float = 0.01
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("attacks must name at least one attack")
        for name in self.attacks:
            if name not in ATTACKS:
                raise ValueError(f"attacks: {name!r} is none of {', '.join(ATTACKS)}")
        if len(set(self.attacks)) != len(self.attacks):
            raise ValueError("attacks: a name stands twice")
        for key in ("confidence", "fpr", "delta"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key} must lie in (0, 1), got {getattr(self, key)}")


@dataclass(frozen=True)
class Curve:
    """One attack's ROC on one population, with pointwise bands."""

    attack: str
    population: Population
    band: RocBand = field(repr=False)


@dataclass(frozen=True)
class Measured:
    """All findings on one protection, and the scores behind them for whoever owns the records."""

    findings: tuple[Finding, ...]
    curves: tuple[Curve, ...] = field(repr=False)
    scores: tuple[Scores, ...] = field(repr=False)


def measure(
    view: ReleasedModel,
    truth: Truth,
    canary_N: Bools,
    claim: Claim,
    measurement: Measurement,
    rng: np.random.Generator,
) -> Measured:
    """Run every declared attack on ``view`` and judge it against ``claim``.

    Args:
        view: what the adversary sees.
        truth: what the adversary wants to know; no attack receives it.
        canary_N: which candidates are canaries.
        claim: what the protection promises.
        measurement: declared beforehand.
        rng: for label permutations and the blind baseline's split; no secret.

    Raises:
        ValueError: scores that are not numbers, or too few records.
    """
    populations: dict[Population, Bools] = {"text": ~canary_N, "canaries": canary_N}
    all_scores = tuple(ATTACKS[attack](view) for attack in measurement.attacks)
    statements = len(all_scores) * len(populations) + (view.released.secrets is not None)
    confidence = simultaneous_confidence(measurement.confidence, statements)
    delta = measurement.delta if claim.delta is None else claim.delta
    findings: list[Finding] = []
    curves: list[Curve] = []
    blind = {
        name: _blind_control(view, truth.member_N, chosen_N, measurement, rng)
        for name, chosen_N in populations.items()
    }
    for scores in all_scores:
        for name, chosen_N in populations.items():
            values_N = scores.values.double().numpy()[chosen_N]
            member_N = truth.member_N[chosen_N]
            findings.append(
                _membership_finding(
                    scores.attack,
                    name,
                    values_N,
                    member_N,
                    claim,
                    measurement,
                    delta,
                    confidence,
                    blind[name],
                    rng,
                )
            )
            band = pointwise_band(values_N, member_N, confidence=measurement.confidence)
            curves.append(Curve(scores.attack, name, band))
    if view.released.secrets is not None:
        findings.append(_secret_finding(view, truth, claim, delta, confidence))
    return Measured(tuple(findings), tuple(curves), all_scores)


def _membership_finding(
    attack: str,
    population: Population,
    scores_N: Floats,
    member_N: Bools,
    claim: Claim,
    measurement: Measurement,
    delta: float,
    confidence: float,
    blind: Control,
    rng: np.random.Generator,
) -> Finding:
    bound = one_run_audit(scores_N, member_N, delta=delta, confidence=confidence)
    status, reason = _judge_epsilon(bound, claim)
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
            blind,
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


def _judge_epsilon(bound: OneRunBound, claim: Claim) -> tuple[Status, str]:
    if claim.epsilon is None:
        if bound.epsilon > 0:
            return Status.LEAK, "membership shows, and nothing was claimed"
        return Status.NOT_EVALUABLE, "nothing was claimed and this attack found nothing"
    if bound.epsilon > claim.epsilon:
        return Status.LEAK, f"the lower bound exceeds the claimed ε = {promised(claim.epsilon)}"
    if bound.ceiling <= claim.epsilon:
        return Status.NOT_EVALUABLE, (
            f"even a perfect attack on {bound.canaries:,} records reaches only "
            f"{bound.ceiling:.2f} ≤ ε = {promised(claim.epsilon)}; "
            f"{_what_would_do(bound, claim.epsilon)}"
        )
    return (
        Status.WITHIN_CLAIM,
        f"the lower bound stays within the claimed ε = {promised(claim.epsilon)}",
    )


def _what_would_do(bound: OneRunBound, epsilon: float) -> str:
    confidence = simultaneous_confidence(bound.confidence, bound.tried)
    try:
        needed = canaries_needed(epsilon, bound.delta, confidence)
    except ValueError:
        return f"at δ = {bound.delta:g} no number of records would do"
    return f"about {math.ceil(needed / max(DEFAULT_GUESS_FRACTIONS)):,} would do"


def _secret_finding(
    view: ReleasedModel, truth: Truth, claim: Claim, delta: float, confidence: float
) -> Finding:
    """What became of the planted secrets: how many rank first, and their exposure in bits.

    A secret that was never seen ranks first of C with probability 1/C, which is
    the test where nothing is claimed. A claim is held against the coins instead:
    whether the likelihood of a secret betrays that it was planted is one more
    one-run audit, whose theorem covers δ > 0.
    """
    bits_K, first_K = _exposure(guess_secrets(view), truth)
    blind_bits_K, _ = _exposure(guess_secrets_blind(view), truth)
    planted_K = truth.secret_member_K
    most = math.log2(guess_secrets(view).values.shape[1])
    n = int(planted_K.sum())
    if n in (0, len(planted_K)):
        return Finding(
            attack="exposure",
            population="secrets",
            metric="bits of exposure",
            estimate=Estimate(0.0, Interval(0.0, most, confidence), n, "none"),
            n=n,
            lower_bound=0.0,
            ceiling=0.0,
            controls=(),
            status=Status.NOT_EVALUABLE,
            reason="all coins of the secrets fell alike; plant more",
        )
    gained_K = _own(guess_secrets(view), truth) - _own(guess_secrets_blind(view), truth)
    bound = one_run_audit(gained_K, planted_K, delta=delta, confidence=confidence)
    extracted = rate(int(first_K[planted_K].sum()), n, confidence)
    status, reason = _judge_epsilon(bound, claim)
    if claim.epsilon is None and extracted.interval.low > 2.0**-most:
        status, reason = Status.LEAK, "planted secrets are recovered, and nothing was claimed"
    return Finding(
        attack="exposure",
        population="secrets",
        metric=f"share of secrets ranked first of {2**most:.0f}",
        estimate=extracted,
        n=n,
        lower_bound=bound.epsilon,
        ceiling=bound.ceiling,
        controls=(
            _bits_control("exposure of secrets not planted, bits", bits_K[~planted_K], most),
            _bits_control("exposure under the public model, bits", blind_bits_K[planted_K], most),
        ),
        status=status,
        reason=reason,
        further={"exposure, bits": _mean_bits(bits_K[planted_K], most, confidence)},
    )


def _mean_bits(bits: Floats, most: float, confidence: float) -> Estimate:
    """Mean exposure; Chernoff's interval for a mean of values in [0, ``most``] always covers."""
    mean = float(bits.mean())
    unit = chernoff_interval(mean / most, len(bits), confidence)
    interval = Interval(unit.low * most, unit.high * most, confidence)
    return Estimate(mean, interval, len(bits), "Chernoff-Hoeffding")


def _bits_control(name: str, bits: Floats, most: float) -> Control:
    estimate = _mean_bits(bits, most, 0.95)
    return Control(name, estimate.value, estimate.interval.low, estimate.interval.high)


def _own(scores: Scores, truth: Truth) -> Floats:
    """Each canary's own secret's score; shape (K,)."""
    values_KC = scores.values.double().numpy()
    own_K1 = np.take_along_axis(values_KC, truth.secret_place_K[:, None], axis=1)
    return np.asarray(own_K1[:, 0])


def _exposure(scores: Scores, truth: Truth) -> tuple[Floats, Bools]:
    """Exposure log2 C − log2 rank in bits, ties against the attack, and who ranks first alone."""
    values_KC = scores.values.double().numpy()
    if not np.isfinite(values_KC).all():
        raise ValueError("the model's scores of secrets are not finite; it has diverged")
    rank_K = (values_KC >= _own(scores, truth)[:, None]).sum(axis=1)
    return math.log2(values_KC.shape[1]) - np.log2(rank_K), rank_K == 1


def _blind_control(
    view: ReleasedModel,
    member_N: Bools,
    chosen_N: Bools,
    measurement: Measurement,
    rng: np.random.Generator,
) -> Control:
    """AUC of a classifier that never meets the model: naive Bayes on token counts.

    It learns on one random half and is judged on the other; cross-fitting would
    couple the halves and drag a null below one half. If it beats chance, members
    and non-members differ as text, and what an attack shows is not membership
    (Das et al. 2024, "Blind baselines beat membership inference attacks").
    """
    ids_NT = view.released.ids_NT[torch.from_numpy(chosen_N)]
    target_NT = view.released.target_NT[torch.from_numpy(chosen_N)]
    count_NV = torch.zeros(len(ids_NT), int(ids_NT.max()) + 1).scatter_add_(
        1, ids_NT, target_NT.to(torch.float32)
    )
    labels_N = member_N[chosen_N]
    member = torch.from_numpy(labels_N)
    learnt_N = torch.from_numpy(rng.permutation(len(ids_NT)) % 2 == 0)
    inside_V = count_NV[learnt_N & member].sum(0) + 1
    outside_V = count_NV[learnt_N & ~member].sum(0) + 1
    weight_V = (inside_V / inside_V.sum()).log() - (outside_V / outside_V.sum()).log()
    judged_N = ~learnt_N.numpy()
    score_N = (count_NV @ weight_V).double().numpy()
    estimate = auc(score_N[judged_N], labels_N[judged_N], measurement.confidence)
    return Control(
        "AUC of a blind baseline",
        estimate.value,
        estimate.interval.low,
        estimate.interval.high,
    )
