"""Membership of records and exposure of secrets, from the scores of a released model.

Shape suffixes: N records, K secret canaries, C candidate secrets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from attacks.membership.secrets import guess_secrets, guess_secrets_blind
from attacks.scoring.coins import coin_finding, judge_epsilon, scores_of
from attacks.scoring.measurement import Curve, Measured, Measurement
from attacks.statistics import (
    Estimate,
    Interval,
    auc,
    chernoff_interval,
    one_run_audit,
    pointwise_band,
    rate,
)
from attacks.targets import Truth
from attacks.threat import (
    Attack,
    Claim,
    Control,
    Finding,
    Population,
    ReleasedModel,
    Scores,
    Status,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

POPULATIONS: tuple[Population, ...] = ("text", "canaries")


def statements(attacks: int, truth: Truth) -> int:
    """Bounds on ε that :func:`measure_membership` makes."""
    return attacks * len(POPULATIONS) + bool(len(truth.secret_member_K))


def measure_membership(
    view: ReleasedModel,
    truth: Truth,
    claim: Claim,
    attacks: Sequence[Attack[ReleasedModel]],
    measurement: Measurement,
    confidence: float,
    rng: np.random.Generator,
) -> Measured:
    """Run membership attacks on both populations, and guess the secrets.

    Args:
        view: what the adversary sees.
        truth: what the adversary wants to know; no attack receives it.
        claim: what the protection promises.
        attacks: declared beforehand.
        measurement: declared beforehand.
        confidence: of each single bound on ε.
        rng: for label permutations and the blind baseline's split; no secret.

    Raises:
        ValueError: scores that are not numbers, or too few records.
    """
    populations: dict[Population, Bools] = {"text": ~truth.canary_N, "canaries": truth.canary_N}
    all_scores = tuple(scores_of(attack, view) for attack in attacks)
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
                coin_finding(
                    scores.attack,
                    name,
                    values_N,
                    member_N,
                    claim,
                    measurement,
                    delta,
                    confidence,
                    (blind[name],),
                    rng,
                )
            )
            band = pointwise_band(values_N, member_N, confidence=measurement.confidence)
            curves.append(Curve(scores.attack, name, band))
    if view.released.secrets is not None:
        findings.append(_secret_finding(view, truth, claim, delta, confidence))
    return Measured(tuple(findings), tuple(curves), all_scores)


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
    status, reason = judge_epsilon(bound, claim)
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
