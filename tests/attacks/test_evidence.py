"""The rules of evidence: what may be said of a measurement, on attacks of known strength."""

import math

import numpy as np
import pytest
import torch

from attacks.scoring import Measurement, measure
from attacks.scoring.secrecy import judge_secrecy
from attacks.scoring.texts import as_set, exactly, in_order
from attacks.statistics import bounded_mean, mean_estimate, rate
from attacks.targets import Choices, Coins, Target, Task, Texts
from attacks.threat import (
    Attack,
    Claim,
    Cost,
    Reconstruction,
    Recovered,
    Scores,
    Status,
    Utility,
)

CONFIDENCE = 0.9995
SURE = rate(800, 800)


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
        (94, 6000, None, Status.NOT_EVALUABLE, "no weakened variant"),
        (94, 6000, rate(700, 800), Status.NOT_EVALUABLE, "less than 90%"),
        (78, 4999, SURE, Status.NOT_EVALUABLE, "5,000 trials or more, these are 4,999"),
        (0, 4999, SURE, Status.NOT_EVALUABLE, "5,000 trials or more"),
    ],
)
def test_that_nothing_leaks_is_said_only_by_the_rule(hits, trials, weakened, status, reason):
    found, said = judge_secrecy(rate(hits, trials, CONFIDENCE), trials, 1 / 64, weakened)
    assert found is status
    assert reason in said


def test_a_wide_interval_is_not_evaluable():
    """At chance 1/2, 5,000 trials leave the upper end more than 0.02 above it."""
    found, said = judge_secrecy(rate(2500, 5000, CONFIDENCE), 5000, 0.5, SURE)
    assert found is Status.NOT_EVALUABLE
    assert "more trials would narrow it" in said


def test_the_rule_rarely_accuses_a_guess_and_never_acquits_a_leak():
    """A guess is called a leak in at most 0.05% of 20,000 audits (+5 deviations); two and a half
    times chance and more is called one in at least 99% of them."""
    rng = np.random.default_rng(0)

    def leaks(success):
        hits = rng.binomial(6000, success, 20_000)
        verdicts = {
            int(k): judge_secrecy(rate(int(k), 6000, 0.999), 6000, 1 / 64, SURE)[0]
            for k in np.unique(hits)
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


class Weakened(View):
    pass


def choosing(success, weakened):
    truth, scores_NC = guesses(success, 6000)
    broken, sure_NC = guesses(weakened, 800, seed=1)
    views = {}
    sound = View()
    views[sound] = scores_NC
    weak = View()
    views[weak] = sure_NC
    attack = Attack("guess", View, lambda view: Scores("guess", views[view]))
    return [attack], Task("uploads", sound, truth, Task("uploads", weak, broken))


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


def test_naming_every_token_is_no_recovery_of_the_set():
    texts = ((1, 2, 3),)
    assert as_set(Recovered((), frozenset({1, 2, 3})), texts) == 1.0
    assert as_set(Recovered((), frozenset(range(512))), texts) == pytest.approx(3 / 512)
    assert as_set(Recovered((), frozenset()), texts) == 0.0


def test_of_equal_texts_each_counts_once():
    assert exactly(Recovered(((1, 2),), frozenset()), ((1, 2), (1, 2))) == 0.5
    assert exactly(Recovered(((1, 2), (1, 3)), frozenset()), ((1, 2), (1, 2))) == 0.5


def reading(victims, share, *, texts=480, seed=0):
    """An attack that reads each victim's text whole with probability ``share``, else nothing."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 100, (texts, 20)).tolist()
    truth = Texts(tuple((tuple(row),) for row in rows), guess=(7,) * 20)
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
    return [attack], Task("texts", sound, truth, Task("texts", weak, broken))


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
    """Tokens are right by chance as often in the next victim's text as in one's own."""
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((400, 20)) < 0.2, 7, rng.integers(0, 100, (400, 20))).tolist()
    truth = Texts(tuple((tuple(row),) for row in rows), guess=(7,) * 20)
    guess = Recovered(((7,) * 20,), frozenset({7}))
    attack = Attack("guess", View, lambda view: Reconstruction("guess", (guess,) * 400))
    (finding,) = judged(NOTHING, [attack], Task("texts", View(), truth))
    assert finding.status is Status.NOT_EVALUABLE
    assert finding.chance == pytest.approx(finding.controls[0].value, abs=0.02)


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
