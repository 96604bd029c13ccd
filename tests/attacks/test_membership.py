"""Scores against plain loops, and attacks that cannot see the truth."""

import dataclasses
import math

import pytest
import torch

from attacks.membership import guess_secrets, loss, min_k_plus_plus, reference
from attacks.threat import Evaluated, ReleasedModel, SecretSlots, TokenStatistics

VOCABULARY = 11


def fake_model(seed: int):
    """Logits that depend on the previous and the present token, so that order matters."""
    table = torch.randn(
        VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)
    )

    def logits(ids_BT):
        before_BT = torch.cat([torch.zeros_like(ids_BT[:, :1]), ids_BT[:, :-1]], dim=1)
        return table[before_BT, ids_BT]

    return logits


@pytest.fixture
def view():
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, VOCABULARY, (9, 6), generator=generator)
    target_NT = torch.arange(6) < torch.randint(2, 7, (9, 1), generator=generator)
    released = Evaluated(fake_model(1), ids_NT, target_NT)
    return ReleasedModel(released, dataclasses.replace(released, logits=fake_model(2)))


def token_log_probs(logits, ids, target):
    """(log p, mean, deviation) of every target token, one at a time."""
    rows = torch.log_softmax(logits(ids[None])[0].double(), dim=-1)
    for t in range(1, len(ids)):
        if target[t]:
            p = rows[t - 1].exp()
            mean = float((p * rows[t - 1]).sum())
            deviation = math.sqrt(float((p * (rows[t - 1] - mean) ** 2).sum()))
            yield float(rows[t - 1, ids[t]]), mean, deviation


def by_hand(evaluated, score):
    return torch.tensor(
        [
            score(list(token_log_probs(evaluated.logits, ids, target)))
            for ids, target in zip(evaluated.ids_NT, evaluated.target_NT, strict=True)
        ]
    )


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def test_loss_is_the_mean_log_likelihood(view):
    expected = by_hand(view.released, lambda tokens: mean(t[0] for t in tokens))
    torch.testing.assert_close(loss(view).values, expected, rtol=1e-4, atol=1e-5)


def test_reference_subtracts_the_public_model(view):
    expected = by_hand(view.released, lambda tokens: mean(t[0] for t in tokens)) - by_hand(
        view.reference, lambda tokens: mean(t[0] for t in tokens)
    )
    torch.testing.assert_close(reference(view).values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_min_k_plus_plus_averages_the_lowest_standardised_tokens(view, fraction):
    def score(tokens):
        z = sorted((p - m) / s for p, m, s in tokens)
        return mean(z[: max(1, math.ceil(len(z) * fraction))])

    expected = by_hand(view.released, score)
    torch.testing.assert_close(
        min_k_plus_plus(view, fraction).values, expected, rtol=1e-4, atol=1e-4
    )


def test_min_k_refuses_a_fraction_outside_its_range(view):
    with pytest.raises(ValueError, match="fraction"):
        min_k_plus_plus(view, 0.0)


def test_statistics_do_not_depend_on_the_batch(view):
    whole, parts = (
        TokenStatistics.of(
            view.released.logits, view.released.ids_NT, view.released.target_NT, batch_size=size
        )
        for size in (100, 2)
    )
    torch.testing.assert_close(whole.logp_NS, parts.logp_NS)
    torch.testing.assert_close(whole.std_NS, parts.std_NS)


def test_a_model_is_asked_once_however_many_attacks_there_are(view):
    calls = []
    counted = dataclasses.replace(
        view.released, logits=lambda ids: (calls.append(1), fake_model(1)(ids))[1]
    )
    counted_view = ReleasedModel(counted, view.reference)
    for attack in (loss, min_k_plus_plus, reference):
        attack(counted_view)
    assert len(calls) == 1


def test_secrets_are_scored_by_their_own_tokens():
    ids_NCT = torch.randint(0, VOCABULARY, (3, 4, 6), generator=torch.Generator().manual_seed(3))
    secret_NCT = torch.zeros_like(ids_NCT, dtype=torch.bool)
    secret_NCT[:, :, 2:5] = True
    slots = SecretSlots(ids_NCT, secret_NCT, 1000)
    evaluated = Evaluated(fake_model(1), ids_NCT[:, 0], secret_NCT[:, 0], secrets=slots)
    scores = guess_secrets(ReleasedModel(evaluated, evaluated)).values
    for n in range(3):
        for c in range(4):
            expected = sum(
                p for p, _, _ in token_log_probs(fake_model(1), ids_NCT[n, c], secret_NCT[n, c])
            )
            assert float(scores[n, c]) == pytest.approx(expected, rel=1e-4)


def test_without_secrets_there_is_nothing_to_guess(view):
    with pytest.raises(ValueError, match="no secret canaries"):
        guess_secrets(view)


def test_a_view_holds_nothing_but_what_the_adversary_may_know(view):
    allowed = {"released", "reference"}
    assert {f.name for f in dataclasses.fields(view)} == allowed
    assert {f.name for f in dataclasses.fields(view.released)} == {
        "logits",
        "ids_NT",
        "target_NT",
        "secrets",
    }
