"""Verdicts on attacks whose strength is known, and controls that notice a bad experiment."""

import math

import numpy as np
import pytest
import torch

from attacks.membership import MEMBERSHIP
from attacks.scoring import Measurement, measure
from attacks.scoring.membership import _blind_control, _exposure, _mean_bits
from attacks.statistics import canaries_needed, mean_estimate
from attacks.targets import Target, Task, Truth
from attacks.threat import (
    Claim,
    Cost,
    Evaluated,
    ReleasedModel,
    Scores,
    SecretSlots,
    Status,
    Utility,
)

NOTHING = Claim("holder of the model", "none", "nothing is claimed")
N, VOCABULARY = 2400, 50


def claim(epsilon: float) -> Claim:
    return Claim("holder of the model", "none", f"ε = {epsilon}", epsilon, 1e-5)


def experiment(leakage: float, *, secret_leakage: float = 0.0, seed: int = 0):
    """A view whose loss separates members by ``leakage`` deviations, and the truth about it."""
    rng = np.random.default_rng(seed)
    member_N = rng.random(N) < 0.5
    canary_N = np.arange(N) >= 1400
    ids_NT = torch.from_numpy(rng.integers(0, VOCABULARY, (N, 3)))
    score_N = torch.from_numpy(rng.normal(size=N) + leakage * member_N).float()
    K, C = 60, 64
    secret_member_K = rng.random(K) < 0.5
    place_K = rng.integers(0, C, K)
    secret_KC = rng.normal(size=(K, C))
    secret_KC[secret_member_K, place_K[secret_member_K]] += secret_leakage
    slots = SecretSlots(
        torch.zeros(K, C, 3, dtype=torch.int64), torch.ones(K, C, 3, dtype=torch.bool), 10**6
    )
    released = Evaluated(_never, ids_NT, torch.ones(N, 3, dtype=torch.bool), secrets=slots)
    reference = Evaluated(_never, ids_NT, torch.ones(N, 3, dtype=torch.bool), secrets=slots)
    # The passes over the model are stood in for by their results.
    released.__dict__["statistics"] = _Statistics(score_N)
    reference.__dict__["statistics"] = _Statistics(torch.zeros(N))
    released.__dict__["secret_logp_NC"] = torch.from_numpy(secret_KC)
    reference.__dict__["secret_logp_NC"] = torch.from_numpy(rng.normal(size=(K, C)))
    truth = Truth(member_N, canary_N, secret_member_K, place_K)
    return ReleasedModel(released, reference), truth


def _never(ids_BT):
    raise AssertionError("the model was asked again")


class _Statistics:
    def __init__(self, score_N):
        self.mean_logp_N = score_N


def judged(promise: Claim, leakage: float, **kwargs):
    return judged_view(promise, *experiment(leakage, **kwargs))


def judged_view(promise: Claim, view: ReleasedModel, truth: Truth):
    nowhere = Utility(mean_estimate([1.0, 2.0]), "none")
    target = Target(promise, (Task("text", view, truth),), nowhere, Cost(0.0, None, "run"), {})
    chosen = [attack for attack in MEMBERSHIP if attack.name in ("loss", "reference")]
    return measure(target, chosen, Measurement(), np.random.default_rng(1))


def statuses(measured, population):
    return {f.status for f in measured.findings if f.population == population}


def test_a_separated_model_without_a_claim_is_a_leak():
    measured = judged(NOTHING, 3.0)
    assert statuses(measured, "text") == statuses(measured, "canaries") == {Status.LEAK}


def test_a_model_that_ignores_membership_and_claims_nothing_is_not_evaluable():
    measured = judged(NOTHING, 0.0)
    assert statuses(measured, "canaries") == {Status.NOT_EVALUABLE}


def test_leakage_beyond_the_claim_is_a_leak():
    assert statuses(judged(claim(1.0), 3.0), "canaries") == {Status.LEAK}


def test_leakage_below_the_claim_is_within_it():
    assert statuses(judged(claim(1.0), 0.3), "canaries") == {Status.WITHIN_CLAIM}


def test_a_claim_above_the_ceiling_is_not_evaluable_and_says_what_would_do():
    measured = judged(claim(5.5), 0.3)
    findings = [f for f in measured.findings if f.population == "canaries"]
    assert {f.status for f in findings} == {Status.NOT_EVALUABLE}
    assert all(f.ceiling < 5.5 for f in findings)
    assert all("records reaches only" in f.reason and "would do" in f.reason for f in findings)


def test_a_claim_that_no_audit_can_contradict_says_so():
    with pytest.raises(ValueError, match="no audit"):
        canaries_needed(11.0, 1e-5)
    reasons = [f.reason for f in judged(claim(11.0), 0.3).findings if f.population == "text"]
    assert all("no number of records would do" in reason for reason in reasons)


def test_a_perfect_attack_reaches_the_ceiling_it_was_given():
    for finding in judged(NOTHING, 50.0).findings:
        if finding.population != "secrets":
            assert finding.lower_bound == pytest.approx(finding.ceiling)


def test_bounds_hold_for_all_attacks_together():
    """Four bounds a family on a null: any exceeds ε = 0 in at most 5% of 60 (+5 deviations)."""
    exceeded = sum(
        any(f.lower_bound > 0 for f in judged(NOTHING, 0.0, seed=seed).findings[:4])
        for seed in range(60)
    )
    assert exceeded <= 60 * 0.05 + 5 * math.sqrt(60 * 0.05 * 0.95)


def test_planted_secrets_that_rank_first_are_a_leak():
    assert statuses(judged(NOTHING, 0.0, secret_leakage=20.0), "secrets") == {Status.LEAK}
    assert statuses(judged(claim(0.5), 0.0, secret_leakage=20.0), "secrets") == {Status.LEAK}


def test_secrets_that_rank_like_any_other_stay_within_a_claim():
    assert statuses(judged(claim(0.5), 0.0), "secrets") == {Status.WITHIN_CLAIM}


def test_exposure_counts_ties_against_the_attack():
    truth = Truth(np.ones(1, bool), np.zeros(1, bool), np.ones(2, bool), np.array([0, 3]))
    flat = Scores("s", torch.zeros(2, 8))
    bits_K, first_K = _exposure(flat, truth)
    assert bits_K.tolist() == [0.0, 0.0]
    assert not first_K.any()
    sharp = torch.zeros(2, 8)
    sharp[0, 0] = sharp[1, 3] = 1.0
    bits_K, first_K = _exposure(Scores("s", sharp), truth)
    assert bits_K.tolist() == [3.0, 3.0]
    assert first_K.all()


def test_scores_that_are_no_numbers_are_refused():
    view, truth = experiment(0.0)
    view.released.__dict__["statistics"].mean_logp_N[7] = math.nan
    with pytest.raises(ValueError, match="1 NaN of 1400"):
        judged_view(NOTHING, view, truth)


def blind(ids_NT, member_N, seed=0):
    evaluated = Evaluated(_never, ids_NT, torch.ones_like(ids_NT, dtype=torch.bool))
    return _blind_control(
        ReleasedModel(evaluated, evaluated),
        member_N,
        np.ones(len(member_N), bool),
        Measurement(),
        np.random.default_rng(seed),
    )


def test_the_blind_baseline_notices_members_that_read_differently():
    rng = np.random.default_rng(0)
    member_N = rng.random(600) < 0.5
    ids = rng.integers(0, 40, (600, 12)) + 10 * member_N[:, None]
    assert blind(torch.from_numpy(ids), member_N).low > 0.9


@pytest.mark.parametrize("kind", ["text", "canaries"])
def test_the_blind_baseline_is_at_chance_when_coins_decided(kind):
    """Mean over 40 draws within 5 deviations of 1/2."""
    values = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        member_N = rng.random(300) < 0.5
        ids = (
            rng.integers(0, 40, (300, 12))
            if kind == "text"
            else np.repeat(np.arange(300)[:, None], 12, axis=1)
        )
        values.append(blind(torch.from_numpy(ids), member_N, seed).value)
    assert abs(np.mean(values) - 0.5) < 5 * max(np.std(values), 0.01) / math.sqrt(40)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attacks": ()}, "attacks"),
        ({"attacks": ("lira",)}, "lira"),
        ({"attacks": ("loss", "loss")}, "twice"),
        ({"confidence": 1.0}, "confidence"),
        ({"fpr": 0.0}, "fpr"),
        ({"delta": 2.0}, "delta"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_by_name(changes, key):
    with pytest.raises(ValueError, match=key):
        Measurement(**changes)


@pytest.mark.parametrize("memorised", [0.0, 0.5, 0.9, 0.98, 1.0])
@pytest.mark.parametrize("n", [5, 25, 50])
def test_the_interval_on_mean_exposure_covers(memorised, n):
    """2000 audits at 95%: misses at most 5% (+5 deviations), also where nearly all rank first."""
    rng = np.random.default_rng(n)
    rank = np.where(rng.random((2000, n)) < memorised, 1, rng.integers(1, 257, (2000, n)))
    bits = 8 - np.log2(rank)
    truth = memorised * 8 + (1 - memorised) * float((8 - np.log2(np.arange(1, 257))).mean())
    intervals = [_mean_bits(row, 8.0, 0.95).interval for row in bits]
    missed = np.mean([not i.low <= truth <= i.high for i in intervals])
    assert missed <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / 2000)
    assert all(0 <= i.low <= i.high <= 8 for i in intervals)
    assert np.mean([i.width for i in intervals]) < (8.0 if n == 5 else 4.0)
