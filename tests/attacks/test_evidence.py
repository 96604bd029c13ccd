"""The rules of evidence: what may be said of a measurement, on attacks of known strength."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from attacks.scoring import Measurement, measure
from attacks.scoring.secrecy import Figure, judge_secrecy
from attacks.scoring.texts import as_set, beats, exactly, in_order
from attacks.statistics import bounded_mean, mean_estimate, rate
from attacks.suite import ProtectionResult
from attacks.targets import Choices, Coins, Target, Task, Texts
from attacks.threat import (
    Attack,
    Claim,
    Cost,
    Finding,
    Moment,
    Reconstruction,
    Recovered,
    Scores,
    Status,
    Utility,
)

CONFIDENCE = 0.9995
SURE = (rate(800, 800), rate(800, 800))


class View:
    """What a made-up attack sees."""


NOTHING = Claim("somebody", "none", "nothing is claimed")
SECRET = Claim("somebody", "none", "nothing is learnt", nothing_leaks=True)
PRIVATE = Claim("somebody", "none", "ε = 2", epsilon=2.0, delta=1e-5)


def judged(claim, attacks, *tasks):
    nowhere = Utility(mean_estimate([1.0, 2.0]), "none")
    target = Target(claim, tasks, nowhere, Cost(0.0, None, "run"), {})
    return measure(target, attacks, Measurement(), np.random.default_rng(0)).findings


@pytest.mark.parametrize(
    ("hits", "trials", "weakened", "status", "reason"),
    [
        (94, 6000, SURE, Status.NO_EVIDENCE, "at most 2.2"),
        (160, 6000, SURE, Status.LEAK, "beats chance"),
        (94, 6000, (), Status.NOT_EVALUABLE, "no weakened variant"),
        (94, 6000, (SURE[0], rate(700, 800)), Status.NOT_EVALUABLE, "less than 90%"),
        (78, 4999, SURE, Status.NOT_EVALUABLE, "5,000 trials or more, these are 4,999"),
        (0, 4999, SURE, Status.NOT_EVALUABLE, "5,000 trials or more"),
    ],
)
def test_that_nothing_leaks_is_said_only_by_the_rule(hits, trials, weakened, status, reason):
    found, said = judged_rate(hits, trials, 1 / 64, weakened)
    assert found is status
    assert reason in said


def judged_rate(hits, trials, chance, weakened=SURE, confidence=CONFIDENCE):
    estimate = rate(hits, trials, confidence)
    figure = Figure(estimate, chance, chance, estimate.interval.low > chance)
    return judge_secrecy(figure, trials, weakened)


def test_a_measured_chance_acquits_by_its_lower_end_alone():
    figure = Figure(rate(78, 6000, CONFIDENCE), 0.5, 0.0, above_chance=False)
    assert judge_secrecy(figure, 6000, SURE)[0] is Status.NO_EVIDENCE
    figure = Figure(rate(180, 6000, CONFIDENCE), 0.5, 0.0, above_chance=False)
    assert judge_secrecy(figure, 6000, SURE)[0] is Status.NOT_EVALUABLE


def test_a_wide_interval_is_not_evaluable():
    """At chance 1/2, 5,000 trials leave the upper end more than 0.02 above it."""
    found, said = judged_rate(2500, 5000, 0.5)
    assert found is Status.NOT_EVALUABLE
    assert "more trials would narrow it" in said


def test_the_rule_rarely_accuses_a_guess_and_never_acquits_a_leak():
    """A guess is called a leak in at most 0.05% of 20,000 audits (+5 deviations); two and a half
    times chance and more is called one in at least 99% of them."""
    rng = np.random.default_rng(0)

    def leaks(success):
        hits = rng.binomial(6000, success, 20_000)
        verdicts = {
            int(k): judged_rate(int(k), 6000, 1 / 64, confidence=0.999)[0] for k in np.unique(hits)
        }
        assert Status.NOT_EVALUABLE not in verdicts.values() or success > 1 / 64
        return np.mean([verdicts[int(k)] is Status.LEAK for k in hits])

    assert leaks(1 / 64) <= 0.0005 + 5 * math.sqrt(0.0005 / 20_000)
    assert leaks(2.5 / 64) >= 0.99


def guesses(success, trials, options=64, seed=0):
    """Scores that name the truth with probability ``success``, else any option."""
    rng = np.random.default_rng(seed)
    place_N = rng.integers(0, options, trials)
    named_N = np.where(rng.random(trials) < success, place_N, rng.integers(0, options, trials))
    scores_NC = torch.zeros(trials, options)
    scores_NC[torch.arange(trials), torch.from_numpy(named_N)] = 1.0
    return Choices(place_N, options), scores_NC


def choosing(success, weakened):
    truth, scores_NC = guesses(success, 6000)
    broken, sure_NC = guesses(weakened, 800, seed=1)
    views = {}
    sound = View()
    views[sound] = scores_NC
    weak = View()
    views[weak] = sure_NC
    attack = Attack("guess", View, lambda view: Scores("guess", views[view]))
    twin = Task("uploads", weak, broken, broken="all is broken")
    return [attack], Task("uploads", sound, truth, (twin,))


@pytest.mark.parametrize(
    ("success", "weakened", "status"),
    [
        (0.0, 1.0, Status.NO_EVIDENCE),
        (0.1, 1.0, Status.LEAK),
        (0.0, 0.5, Status.NOT_EVALUABLE),
    ],
)
def test_a_choice_is_judged_by_the_rule(success, weakened, status):
    (finding,) = judged(SECRET, *choosing(success, weakened))
    assert finding.status is status
    assert finding.chance == 1 / 64
    assert finding.estimate.interval.confidence == pytest.approx(0.999)
    (control,) = finding.controls
    assert control.value == pytest.approx(weakened, abs=0.05)


def test_intervals_behind_secrecy_hold_together():
    attacks, task = choosing(0.0, 1.0)
    findings = judged(SECRET, [attacks[0], Attack("again", View, attacks[0].run)], task)
    assert [f.estimate.interval.confidence for f in findings] == pytest.approx([0.9995, 0.9995])


def test_the_three_figures_of_texts_hold_together():
    (finding,) = judged(SECRET, *reconstructing(0.0, 1.0))
    figures = (finding.estimate, *finding.further.values())
    assert [f.interval.confidence for f in figures] == pytest.approx([1 - 0.001 / 3] * 3)


def test_ties_count_against_the_attack():
    truth = Choices(np.zeros(6000, np.int64), 64)
    flat = Attack("flat", View, lambda view: Scores("flat", torch.zeros(6000, 64)))
    (finding,) = judged(SECRET, [flat], Task("uploads", View(), truth))
    assert finding.estimate.value == 0.0


@pytest.mark.parametrize("values", [torch.zeros(6000, 63), torch.full((6000, 64), math.nan)])
def test_scores_that_cannot_be_judged_are_refused(values):
    truth = Choices(np.zeros(6000, np.int64), 64)
    broken = Attack("broken", View, lambda view: Scores("broken", values))
    with pytest.raises(ValueError, match="'broken' must return a number for each of 6000 trials"):
        judged(SECRET, [broken], Task("uploads", View(), truth))


def test_a_task_that_no_attack_sees_is_refused():
    truth = Choices(np.zeros(10, np.int64), 4)
    with pytest.raises(ValueError, match="no attack of this suite sees a View"):
        judged(SECRET, [], Task("uploads", View(), truth))


@pytest.mark.parametrize(
    ("found", "share"),
    [
        ((), 0.0),
        (((1, 2, 3), (4, 5, 6)), 1.0),
        (((4, 5, 6), (1, 2, 3)), 1.0),  # whose text it is, nobody asked
        (((1, 2, 3),), 0.5),
        (((1, 2, 3), (1, 2, 3)), 0.5),  # one text twice is not two texts
        (((1, 2),), 1 / 3),
        (((2, 3, 1), (6, 4, 5)), 0.0),  # all the tokens, none at its place
        (((1, 2, 3, 9, 9), (4, 0, 6)), 5 / 6),
    ],
)
def test_tokens_count_at_their_place_alone(found, share):
    recovered = Recovered(found, frozenset())
    assert in_order(recovered, ((1, 2, 3), (4, 5, 6))) == pytest.approx(share)


def test_a_text_counts_for_whomever_it_was_found():
    truth = ((1, 2), (3, 4))
    found = frozenset({(3, 4)})
    assert exactly(Recovered((), frozenset()), truth, found) == 0.5


def test_naming_every_token_is_no_recovery_of_the_set():
    texts = ((1, 2, 3),)
    assert as_set(Recovered((), frozenset({1, 2, 3})), texts) == 1.0
    assert as_set(Recovered((), frozenset(range(512))), texts) == pytest.approx(3 / 512)
    assert as_set(Recovered((), frozenset()), texts) == 0.0


def texts_of(rows, rng):
    decoys = rng.integers(0, 100, (len(rows), 20)).tolist()
    return Texts(
        tuple((tuple(row),) for row in rows),
        tuple((tuple(row),) for row in decoys),
        guess=(7,) * 20,
    )


def reading(victims, share, *, texts=480, seed=0):
    """An attack that reads each victim's text whole with probability ``share``, else nothing."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 100, (texts, 20)).tolist()
    truth = texts_of(rows, rng)
    made = tuple(
        Recovered((tuple(row),), frozenset(row))
        if rng.random() < share
        else Recovered((), frozenset())
        for row in rows
    )
    return truth, made[:victims]


def reconstructing(share, weakened):
    truth, made = reading(480, share)
    broken, sure = reading(100, weakened, texts=100, seed=1)
    sound, weak = View(), View()
    returned = {sound: made, weak: sure}
    attack = Attack("read", View, lambda view: Reconstruction("read", returned[view]))
    twin = Task("texts", weak, broken, broken="all is broken")
    return [attack], Task("texts", sound, truth, (twin,))


@pytest.mark.parametrize(
    ("claim", "share", "weakened", "status"),
    [
        (NOTHING, 0.9, 1.0, Status.LEAK),
        (NOTHING, 0.0, 1.0, Status.NOT_EVALUABLE),
        (SECRET, 0.0, 1.0, Status.NO_EVIDENCE),
        (SECRET, 0.0, 0.3, Status.NOT_EVALUABLE),
        (SECRET, 0.2, 1.0, Status.LEAK),
        (PRIVATE, 0.9, 1.0, Status.NOT_APPLICABLE),
    ],
)
def test_recovered_text_is_judged_by_what_was_claimed(claim, share, weakened, status):
    (finding,) = judged(claim, *reconstructing(share, weakened))
    assert finding.status is status
    assert finding.n == 9600
    assert finding.estimate.value in finding.estimate.interval


def test_a_reconstruction_of_other_victims_is_refused():
    truth, made = reading(479, 1.0)
    attack = Attack("read", View, lambda view: Reconstruction("read", made))
    with pytest.raises(ValueError, match="returned 479 victims of 480"):
        judged(NOTHING, [attack], Task("texts", View(), truth))


def test_an_attack_that_returns_the_wrong_kind_is_refused():
    truth, _ = reading(480, 1.0)
    attack = Attack("scores", View, lambda view: Scores("scores", torch.zeros(400)))
    with pytest.raises(TypeError, match="must return a Reconstruction"):
        judged(NOTHING, [attack], Task("texts", View(), truth))


def test_tokens_without_order_are_a_leak_too():
    truth, _ = reading(480, 1.0)
    bags = tuple(Recovered((), frozenset(text)) for (text,) in truth.victims)
    attack = Attack("bag", View, lambda view: Reconstruction("bag", bags))
    for claim in (NOTHING, SECRET):
        (finding,) = judged(claim, [attack], Task("texts", View(), truth))
        assert finding.status is Status.LEAK
        assert finding.estimate.value == 0.0
        assert finding.further["tokens recovered as a set"].value == 1.0


def test_a_guess_of_the_prior_is_no_leak():
    """Tokens are right by chance as often in a text that nobody sent: of 40 audits at 95% at most
    2 accuse the guess (+5 deviations)."""
    guess = Recovered(((7,) * 20,), frozenset({7}))
    attack = Attack("guess", View, lambda view: Reconstruction("guess", (guess,) * 200))
    leaks = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows, decoys = (
            np.where(rng.random((200, 20)) < 0.2, 7, rng.integers(0, 100, (200, 20))).tolist()
            for _ in range(2)
        )
        truth = dataclasses.replace(
            texts_of(rows, rng), decoys=tuple((tuple(row),) for row in decoys)
        )
        (finding,) = judged(NOTHING, [attack], Task("texts", View(), truth))
        leaks += finding.status is Status.LEAK
        assert finding.estimate.value == pytest.approx(finding.controls[0].value)
    assert leaks <= 40 * 0.05 + 5 * math.sqrt(40 * 0.05 * 0.95)


def test_an_attack_that_never_saw_the_view_is_rarely_accused():
    """Texts right or wrong by a coin, sent or not: a leak in at most 0.1% of 2,000 (+5 deviations).

    An interval against the decoys' mean, as if that were known, accuses 0.2% and more.
    """
    rng = np.random.default_rng(0)
    own_RN, decoy_RN = rng.random((2, 2000, 480)) < 0.5
    wins_R, losses_R = (own_RN & ~decoy_RN).sum(1), (decoy_RN & ~own_RN).sum(1)
    accused = np.mean([beats(w, lost, 0.999) for w, lost in zip(wins_R, losses_R, strict=True)])
    assert accused <= 0.001 + 5 * math.sqrt(0.001 / 2000)
    assert beats(40, 0, 0.999)
    assert beats(300, 180, 0.999)
    assert not beats(260, 220, 0.999)
    assert not beats(0, 0, 0.999)


def test_answering_with_a_neighbours_text_is_a_leak():
    """Which text is whose the attack need not know."""
    truth, made = reading(480, 1.0)
    attack = Attack("shift", View, lambda view: Reconstruction("shift", (*made[1:], made[0])))
    for claim in (NOTHING, SECRET):
        (finding,) = judged(claim, [attack], Task("texts", View(), truth))
        assert finding.status is Status.LEAK
        assert finding.estimate.value < 0.1
        assert finding.further["texts recovered exactly"].value == 1.0


def test_a_single_victim_has_a_chance_of_its_own():
    sent, never_sent = reading(40, 1.0, texts=40)[0], reading(40, 1.0, texts=40, seed=5)[0]
    many = Texts(
        (tuple(text for (text,) in sent.victims),),
        (tuple(text for (text,) in never_sent.victims),),
        sent.guess,
    )
    all_read = Recovered(many.victims[0], frozenset(t for text in many.victims[0] for t in text))
    attack = Attack("all", View, lambda view: Reconstruction("all", (all_read,)))
    (finding,) = judged(NOTHING, [attack], Task("texts", View(), many))
    assert finding.chance < 0.5
    assert finding.estimate.value == 1.0


def row(claim, *statuses):
    finding = Finding(
        "a", "uploads", "m", rate(1, 2), 2, controls=(), status=Status.LEAK, reason=""
    )
    return ProtectionResult(
        Moment.AGGREGATION,
        "row",
        claim,
        tuple(dataclasses.replace(finding, status=status) for status in statuses),
        (),
        Utility(mean_estimate([1.0, 2.0]), "none"),
        Cost(0.0, None, "run"),
        {},
        (),
    )


@pytest.mark.parametrize(
    ("claim", "statuses", "verdict"),
    [
        (SECRET, (Status.NO_EVIDENCE, Status.NO_EVIDENCE), Status.NO_EVIDENCE),
        (SECRET, (Status.NO_EVIDENCE, Status.NOT_EVALUABLE), Status.NOT_EVALUABLE),
        (SECRET, (Status.NO_EVIDENCE, Status.LEAK), Status.LEAK),
        (SECRET, (), Status.NOT_EVALUABLE),
        (PRIVATE, (Status.NOT_APPLICABLE, Status.WITHIN_CLAIM), Status.WITHIN_CLAIM),
        (PRIVATE, (Status.NOT_EVALUABLE, Status.WITHIN_CLAIM), Status.WITHIN_CLAIM),
        (PRIVATE, (Status.NOT_APPLICABLE,), Status.NOT_EVALUABLE),
        (PRIVATE, (), Status.NOT_EVALUABLE),
        (NOTHING, (Status.NOT_APPLICABLE,), Status.NOT_APPLICABLE),
        (NOTHING, (Status.NOT_EVALUABLE, Status.LEAK), Status.LEAK),
    ],
)
def test_a_row_claims_no_more_than_its_findings(claim, statuses, verdict):
    assert row(claim, *statuses).status is verdict


def test_a_choice_is_held_to_epsilon_by_what_it_allows():
    """64-ary randomised response at ε = 2 names the truth with e²/(e² + 63), 10.5%."""
    allowed = np.exp(2) / (np.exp(2) + 63)
    for success, status in ((allowed, Status.NOT_APPLICABLE), (3 * allowed, Status.LEAK)):
        attacks, task = choosing((success - 1 / 64) / (1 - 1 / 64), 1.0)
        (finding,) = judged(PRIVATE, attacks, task)
        assert finding.status is status


def test_coins_cannot_show_that_nothing_leaks():
    attack = Attack("tell apart", View, lambda view: Scores("tell apart", torch.zeros(10)))
    coins = Coins(np.arange(10) % 2 == 0)
    with pytest.raises(ValueError, match="tried by choices or by texts"):
        judged(SECRET, [attack], Task("requests", View(), coins))


@pytest.mark.parametrize(
    ("claim", "shift", "status"),
    [
        (NOTHING, 3.0, Status.LEAK),
        (NOTHING, 0.0, Status.NOT_EVALUABLE),
        (PRIVATE, 0.3, Status.WITHIN_CLAIM),
        (PRIVATE, 6.0, Status.LEAK),
    ],
)
def test_coins_of_requests_bound_epsilon(claim, shift, status):
    rng = np.random.default_rng(0)
    coin_N = rng.random(2400) < 0.5
    values_N = torch.from_numpy(rng.normal(size=2400) + shift * coin_N)
    attack = Attack("tell apart", View, lambda view: Scores("tell apart", values_N))
    (finding,) = judged(claim, [attack], Task("requests", View(), Coins(coin_N)))
    assert finding.status is status
    assert finding.lower_bound <= finding.ceiling


@pytest.mark.parametrize("law", ["zero", "one", "coin", "uniform", "rare"])
@pytest.mark.parametrize("n", [8, 60, 400])
def test_the_interval_on_a_mean_of_shares_covers(law, n):
    """2,000 audits at 95%: misses at most 5% (+5 deviations), whatever the law."""
    rng = np.random.default_rng(n)
    shape = (2000, n)
    values, truth = {
        "zero": (np.zeros(shape), 0.0),
        "one": (np.ones(shape), 1.0),
        "coin": ((rng.random(shape) < 0.5) * 1.0, 0.5),
        "uniform": (rng.random(shape), 0.5),
        "rare": ((rng.random(shape) < 0.01) * 1.0, 0.01),
    }[law]
    missed = np.mean([truth not in bounded_mean(row).interval for row in values])
    assert missed <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / 2000)
    assert bounded_mean(values[0]).interval.width > 0
