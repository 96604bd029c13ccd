"""The matching game on holdings made by hand: clear, masked afresh, and masked badly."""

import dataclasses
import math

import pytest
import torch
from scipy import stats

from attacks.protocol import matching
from attacks.threat import ChosenUpload, ChosenUploads
from protocols.randomness import Stream

TRIALS = 2_000
CANDIDATES = 16
PARAMETERS = 48
STEP = 2.0**-12
FALSE_ALARM = 1e-6


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(41_003)


@pytest.fixture
def masks():
    return Stream(bytes(range(32)), "masks of the matching game")


def clear(masks):
    return torch.zeros(3, PARAMETERS, dtype=torch.int64)


def repeated(masks):
    """In every upload of a round, afresh in the next."""
    mask_3P = fresh(masks)
    mask_3P[1] = mask_3P[0]
    return mask_3P


def repeated_by_the_client(masks):
    """In every round, to each client a mask of its own."""
    mask_3P = fresh(masks)
    mask_3P[2] = mask_3P[0]
    return mask_3P


def at_the_edge(masks):
    """Added to it, positive numbers wrap around and negative ones do not."""
    return torch.full((3, PARAMETERS), 2**63 - 1)


def every_second(masks):
    mask_3P = fresh(masks)
    mask_3P[:, ::2] = 0
    return mask_3P


def every_second_of_32_bits(masks):
    return every_second(masks).to(torch.int32)


def fresh(masks):
    return masks.ring_elements(64, (3, PARAMETERS))


def fresh_of_32_bits(masks):
    return masks.ring_elements(32, (3, PARAMETERS))


def new_candidates(rng):
    """A common direction and small differences, as gradients have; a few hundred steps each."""
    common_P = torch.randn(PARAMETERS, generator=rng, dtype=torch.float64)
    own_CP = torch.randn(CANDIDATES, PARAMETERS, generator=rng, dtype=torch.float64)
    sum_P = torch.randn(PARAMETERS, generator=rng, dtype=torch.float64)
    return (common_P + 0.2 * own_CP) * 0.1, sum_P * 0.2


def trial(update_CP, sum_P, chosen, mask_3P, step=STEP):
    """The client's upload, its partner's, and the client's of an earlier round: zeros."""
    zero_P = torch.zeros_like(sum_P)
    weight_H = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    known_HP = torch.stack([zero_P, sum_P, zero_P])
    uploads_3P = weight_H[:, None] * update_CP[chosen] + known_HP
    encoded_3P = (uploads_3P / step).round().to(mask_3P.dtype)
    return ChosenUpload(encoded_3P + mask_3P, weight_H, known_HP, update_CP, step)


def game(mask, rng, masks, trials=TRIALS):
    """Trials over one set of candidates, and which each was."""
    update_CP, sum_P = new_candidates(rng)
    chosen_N = torch.randint(CANDIDATES, (trials,), generator=rng)
    played = [trial(update_CP, sum_P, int(chosen), mask(masks)) for chosen in chosen_N]
    return played, chosen_N


def scores(trials):
    return matching.run(ChosenUploads(iter(trials))).values


def hits(values_NC, chosen_N):
    """A shared first place counts against the attack."""
    own_N1 = values_NC.gather(1, chosen_N[:, None])
    return int(((values_NC >= own_N1).sum(1) == 1).sum())


def looks_like_guessing(found):
    low, high = stats.binom.interval(1 - FALSE_ALARM, TRIALS, 1 / CANDIDATES)
    return low <= found <= high


@pytest.mark.parametrize(
    "mask",
    [
        clear,
        repeated,
        repeated_by_the_client,
        at_the_edge,
        every_second,
        every_second_of_32_bits,
    ],
)
def test_what_is_not_hidden_is_matched(mask, rng, masks):
    played, chosen_N = game(mask, rng, masks)
    values_NC = scores(played)
    assert hits(values_NC, chosen_N) >= 0.99 * TRIALS
    first_N, second_N = values_NC.topk(2, dim=1).values.T
    assert (first_N - second_N).min() > 10  # nats: beyond doubt
    assert not looks_like_guessing(hits(values_NC, chosen_N))


@pytest.mark.parametrize("mask", [fresh, fresh_of_32_bits])
def test_fresh_masks_leave_a_guess(mask, rng, masks):
    played, chosen_N = game(mask, rng, masks)
    values_NC = scores(played)
    assert looks_like_guessing(hits(values_NC, chosen_N))  # false alarm: 1e-6
    # A guess and not a refusal to guess: one candidate comes first alone, and none always.
    first_N, second_N = values_NC.topk(2, dim=1).values.T
    assert (first_N > second_N).all()
    assert (torch.bincount(values_NC.argmax(1), minlength=CANDIDATES) > 0).all()


def readings(played):
    """Log-likelihood ratios of every candidate, one reading after the other, by definition."""
    update_CP, sum_P = played.update_CP / STEP, played.known_HP[1] / STEP
    client_P, partner_P, before_P = played.held_HP.double()
    reach_P = (update_CP - update_CP.mean(0)).abs().amax(0) + 1
    for x_P in (client_P, (client_P - partner_P + sum_P) / 2, client_P - before_P):
        left_CP = (x_P - update_CP).square()
        variance_C = left_CP.mean(1) + 1 / 12
        yield -PARAMETERS / 2 * (variance_C.log() - variance_C.mean().log())
        within_P = (x_P - update_CP.mean(0)).abs() <= reach_P
        count = int(within_P.sum())
        if count:
            variance_C = left_CP[:, within_P].mean(1) + 1 / 12
            gaussian_C = -count / 2 * (2 * math.pi * math.e * variance_C).log()
            yield gaussian_C + (2 * reach_P[within_P]).log().sum()


@pytest.mark.parametrize("noise", [0, 30, 300, 3_000])
def test_scores_are_the_best_of_six_log_likelihood_ratios(noise, rng, masks):
    def noised(masks):
        return (torch.randn(3, PARAMETERS, generator=rng) * noise).round().long()

    played, _ = game(noised, rng, masks, trials=20)
    expected_NC = torch.stack([torch.stack(list(readings(t))).amax(0) for t in played])
    torch.testing.assert_close(scores(played), expected_NC.double())


@pytest.mark.parametrize("noise", [100, 200, 400])
def test_under_gaussian_noise_hardly_anything_is_given_away(noise, rng, masks):
    """Nearly as often right as the best attack, which knows that noise is all there is."""

    def noised(masks):
        return (torch.randn(3, PARAMETERS, generator=rng) * noise).round().long()

    played, chosen_N = game(noised, rng, masks)
    best_NC = torch.stack(
        [
            -((t.held_HP[0] - t.held_HP[1]) * STEP - (2 * t.update_CP - t.known_HP[1]))
            .square()
            .sum(1)
            for t in played
        ]
    )
    assert not looks_like_guessing(hits(best_NC, chosen_N))
    assert hits(scores(played), chosen_N) >= 0.9 * hits(best_NC, chosen_N)


@pytest.mark.parametrize("mask", [clear, repeated, fresh])
def test_scores_follow_the_candidates_and_not_their_places(mask, rng, masks):
    played, _ = game(mask, rng, masks, trials=50)
    order_C = torch.randperm(CANDIDATES, generator=rng)
    shuffled_CP = played[0].update_CP[order_C]
    shuffled = [dataclasses.replace(t, update_CP=shuffled_CP) for t in played]
    expected_NC = scores(played)[:, order_C]
    scale = float(expected_NC.abs().max())
    torch.testing.assert_close(scores(shuffled) / scale, expected_NC / scale, rtol=0, atol=1e-9)


def test_equal_updates_tie(rng, masks):
    played, _ = game(clear, rng, masks, trials=1)
    twin_CP = played[0].update_CP.clone()
    twin_CP[1] = twin_CP[0]
    values_NC = scores([trial(twin_CP, played[0].known_HP[1], 0, clear(masks))])
    assert values_NC[0, 0] == values_NC[0, 1] == values_NC.max()
    alike_CP = twin_CP[:1].expand(CANDIDATES, -1).contiguous()
    values_NC = scores([trial(alike_CP, played[0].known_HP[1], 0, clear(masks))])
    assert (values_NC == values_NC[0, 0]).all()


@pytest.mark.parametrize("mask", [repeated, fresh])
def test_the_same_holdings_give_the_same_scores(mask, rng, masks):
    played, _ = game(mask, rng, masks, trials=50)
    assert torch.equal(scores(played), scores(played))


def test_trials_are_scored_each_by_its_own_candidates(rng, masks):
    """Batches change nothing, whichever trials come after each other."""
    played = []
    for step in (STEP, STEP / 8):
        for _ in range(3):
            update_CP, sum_P = new_candidates(rng)
            chosen = torch.randint(CANDIDATES, (40,), generator=rng)
            played += [trial(update_CP, sum_P, int(c), repeated(masks), step) for c in chosen]
    played.append(dataclasses.replace(played[-1], step=STEP))
    one_by_one = torch.cat([scores([t]) for t in played])
    torch.testing.assert_close(scores(played), one_by_one, rtol=1e-9, atol=1e-12)


def test_without_trials_there_is_nothing_to_match():
    with pytest.raises(ValueError, match="no trials"):
        scores([])


def test_a_trial_holds_nothing_but_what_the_adversary_may_know():
    assert {f.name for f in dataclasses.fields(ChosenUpload)} == {
        "held_HP",
        "weight_H",
        "known_HP",
        "update_CP",
        "step",
    }
