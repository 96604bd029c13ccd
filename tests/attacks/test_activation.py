"""Prompts of real text behind one block of a trained decoder, with and without noise."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from attacks.activation import distinguish, nearest_neighbour, prior_only, with_prior
from attacks.activation import nearest as nearest_module
from attacks.threat import PairedPrompts, SentActivations
from privlm.config import CorpusConfig, ModelConfig, PublicTraining, TokenizerConfig
from privlm.finetuning import load_corpus, public_base_model

LENGTH = 8
REQUESTS = 40
PAIRS = 600
BLOCKS = 1
"""At the client."""
DEVIATIONS = (0.0, 1.0, 2.0, 4.0)
FALSE_ALARM = 1e-4


def adapter(model, vocabulary_C):
    """What an honest client sends, and what the model expects."""

    def sent(ids_NT):
        return model.run_blocks(model.embed_tokens(ids_NT), last=BLOCKS)

    def sent_after(prefix_Bt, ids_C):
        count, start = prefix_Bt.shape
        cache = None
        if start:
            cache = model.new_cache()
            model.run_blocks(model.embed_tokens(prefix_Bt), cache, last=BLOCKS)
            cache = cache.repeat(len(ids_C))
        x_X1D = model.embed_tokens(ids_C.repeat(count)[:, None], start)
        return model.run_blocks(x_X1D, cache, last=BLOCKS)[:, 0].unflatten(0, (count, -1))

    def log_prior(prefix_Bt):
        if prefix_Bt.shape[1] == 0:
            return torch.zeros(len(prefix_Bt), len(vocabulary_C)).log_softmax(-1)
        return model(prefix_Bt)[:, -1, vocabulary_C].log_softmax(-1)

    return {"sent": sent, "sent_after": sent_after, "log_prior": log_prior}


@pytest.fixture(scope="module")
def world():
    """A model, private prompts that it never saw, and plain views of them."""
    corpus = load_corpus(CorpusConfig(context=16), TokenizerConfig(vocab_size=300), seed=0)
    config = ModelConfig(width=32, layers=2, heads=2)
    model = public_base_model(corpus, config, PublicTraining(epochs=2), seed=0)
    model.eval().requires_grad_(requires_grad=False)
    vocabulary_C = torch.arange(corpus.tokenizer.vocab_size).flip(0)  # an order of its own
    ids_NT = corpus.blocks.private.ids_NT
    order = torch.randperm(len(ids_NT), generator=torch.Generator().manual_seed(3))
    ids_NT = ids_NT[order, :LENGTH].long()
    calls = adapter(model, vocabulary_C)
    prompts_NT = ids_NT[:REQUESTS]
    view = SentActivations(
        rows_NTD=calls["sent"](prompts_NT), vocabulary_C=vocabulary_C, noise_std=0.0, **calls
    )
    return SimpleNamespace(model=model, prompts_NT=prompts_NT, others_NT=ids_NT, view=view)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(27_011)


def noised(view, noise_NTD, std):
    return dataclasses.replace(view, rows_NTD=view.rows_NTD + std * noise_NTD, noise_std=std)


def ids(reconstruction):
    return torch.tensor([recovered.texts[0] for recovered in reconstruction.victims])


def recovered(attack, view, prompts_NT):
    """Share of tokens in their places."""
    return float((ids(attack.run(view)) == prompts_NT).double().mean())


@pytest.mark.parametrize("attack", [nearest_neighbour, with_prior])
def test_plain_rows_give_the_prompt_away(attack, world):
    assert recovered(attack, world.view, world.prompts_NT) >= 0.95
    assert recovered(prior_only, world.view, world.prompts_NT) < 0.2


def test_a_row_is_read_with_the_prefix_that_precedes_it(rng):
    """Rows that are sums of all tokens so far mean nothing to whoever forgets the prefix."""
    tokens = 11
    prompts_NT = torch.randint(tokens, (20, 6), generator=rng)
    view = SentActivations(
        rows_NTD=(prompts_NT.cumsum(1) % tokens).float()[..., None],
        vocabulary_C=torch.arange(tokens),
        sent=lambda ids_NT: ids_NT,
        sent_after=lambda prefix_Bt, ids_C: (
            (prefix_Bt.sum(1, keepdim=True) + ids_C) % tokens
        ).float()[..., None],
        log_prior=lambda prefix_Bt: torch.zeros(len(prefix_Bt), tokens),
        noise_std=0.1,
    )
    assert torch.equal(ids(nearest_neighbour.run(view)), prompts_NT)
    assert torch.equal(ids(with_prior.run(view)), prompts_NT)


def test_reconstructions_name_the_texts_and_their_tokens(world):
    found = nearest_neighbour.run(world.view)
    assert found.attack == nearest_neighbour.name
    for victim in found.victims:
        assert len(victim.texts) == 1
        assert victim.tokens == frozenset(victim.texts[0])


def test_noise_costs_the_nearest_neighbour_and_the_prior_wins_some_back(world, rng):
    noise_NTD = torch.randn(world.view.rows_NTD.shape, generator=rng)
    views = [noised(world.view, noise_NTD, std) for std in DEVIATIONS]
    nearest = [recovered(nearest_neighbour, view, world.prompts_NT) for view in views]
    adaptive = [recovered(with_prior, view, world.prompts_NT) for view in views]
    assert all(more > less for more, less in itertools.pairwise(nearest))
    assert all(knows >= not_ for knows, not_ in zip(adaptive, nearest, strict=True))
    assert max(knows - not_ for knows, not_ in zip(adaptive, nearest, strict=True)) > 0.05


def test_under_boundless_noise_only_the_prior_is_left(world, rng):
    noise_NTD = torch.randn(world.view.rows_NTD.shape, generator=rng)
    view = noised(world.view, noise_NTD, 1e4)
    guessed = recovered(prior_only, view, world.prompts_NT)
    assert recovered(with_prior, view, world.prompts_NT) == pytest.approx(guessed, abs=0.05)
    assert recovered(nearest_neighbour, view, world.prompts_NT) < 0.05


def test_the_prior_alone_never_looks(world):
    blind = dataclasses.replace(
        world.view, rows_NTD=torch.full_like(world.view.rows_NTD, torch.nan)
    )
    guesses_NT = ids(prior_only.run(blind))
    assert torch.equal(guesses_NT, ids(prior_only.run(world.view)))
    # Greedy: every token is the likeliest after those before it.
    for t in range(1, LENGTH):
        likeliest_N = world.view.log_prior(guesses_NT[:, :t]).argmax(1)
        assert torch.equal(guesses_NT[:, t], world.view.vocabulary_C[likeliest_N])


def test_a_beam_takes_back_what_greed_chose(rng):
    """Two steps, two tokens: what the first row favours by a little the second rules out."""
    activation = {(): [0.0, 1.0], (0,): [10.0, 10.0], (1,): [0.0, 3.0]}

    def sent_after(prefix_Bt, ids_C):
        rows = [
            [activation[tuple(prefix)][c] for c in ids_C.tolist()] for prefix in prefix_Bt.tolist()
        ]
        return torch.tensor(rows)[..., None]

    view = SentActivations(
        rows_NTD=torch.tensor([[[0.4], [3.0]]]),
        vocabulary_C=torch.tensor([0, 1]),
        sent=lambda ids_NT: ids_NT,
        sent_after=sent_after,
        log_prior=lambda prefix_Bt: torch.zeros(len(prefix_Bt), 2),
        noise_std=1.0,
    )
    assert ids(nearest_neighbour.run(view))[0, 0] == 0
    assert ids(with_prior.run(view)).tolist() == [[1, 1]]


def test_noise_and_prior_are_weighed_as_bayes_has_it(rng):
    """One row, one token: the posterior of every candidate, worked out by hand."""
    candidates_CD = torch.randn(5, 3, generator=rng)
    log_prior_C = torch.randn(5, generator=rng).log_softmax(0)
    rows_N1D = torch.randn(40, 1, 3, generator=rng)
    view = SentActivations(
        rows_NTD=rows_N1D,
        vocabulary_C=torch.tensor([7, 3, 9, 1, 4]),
        sent=lambda ids_NT: ids_NT,
        sent_after=lambda prefix_Bt, ids_C: candidates_CD[
            (ids_C[:, None] == torch.tensor([7, 3, 9, 1, 4])).int().argmax(1)
        ].expand(len(prefix_Bt), -1, -1),
        log_prior=lambda prefix_Bt: log_prior_C.expand(len(prefix_Bt), -1),
        noise_std=0.8,
    )
    law = torch.distributions.Normal(candidates_CD, 0.8)
    posterior_NC = law.log_prob(rows_N1D).sum(-1) + log_prior_C
    best_N = view.vocabulary_C[posterior_NC.argmax(1)]
    assert torch.equal(ids(with_prior.run(view))[:, 0], best_N)
    assert not torch.equal(ids(nearest_neighbour.run(view))[:, 0], best_N)


@pytest.mark.parametrize("attack", [nearest_neighbour, with_prior, prior_only])
def test_chunks_change_nothing(attack, world, rng, monkeypatch):
    """Neither those of requests nor, where one request is too much at once, of candidates."""
    few = dataclasses.replace(world.view, rows_NTD=world.view.rows_NTD[:5])
    view = noised(few, torch.randn(few.rows_NTD.shape, generator=rng), 1.0)
    whole = ids(attack.run(view))
    for numbers in (1 << 16, 1 << 13):
        monkeypatch.setattr(nearest_module, "_NUMBERS", numbers)
        assert torch.equal(ids(attack.run(view)), whole)


def coin_view(world, rng, noise_std):
    """Requests of one prompt of two, and which it was."""
    pairs_N2T = torch.stack([world.others_NT[:PAIRS], world.others_NT[PAIRS : 2 * PAIRS]], dim=1)
    coin_N = torch.randint(2, (PAIRS,), generator=rng)
    honest_NTD = world.view.sent(pairs_N2T[torch.arange(PAIRS), coin_N])
    noise_NTD = torch.randn(honest_NTD.shape, generator=rng)
    honest = dataclasses.replace(world.view, rows_NTD=honest_NTD)
    return PairedPrompts(noised(honest, noise_NTD, noise_std), pairs_N2T), coin_N


def test_plain_rows_tell_two_prompts_apart(world, rng):
    view, coin_N = coin_view(world, rng, 0.0)
    assert torch.equal(distinguish.run(view).values > 0, coin_N == 1)


@pytest.mark.parametrize("std", [5.0, 40.0])
def test_the_ratio_is_distributed_as_theory_has_it(std, world, rng):
    """N(±μ²/2, μ²) by Kolmogorov and Smirnov; false alarm: 1e-4. A wrong deviation is refused."""
    view, coin_N = coin_view(world, rng, std)
    first_NTD, second_NTD = (view.sent.sent(view.pairs_N2T[:, which]) for which in (0, 1))
    mu_N = (second_NTD - first_NTD).flatten(1).norm(dim=1).double() / std
    different_N = mu_N > 0

    def p_value(claimed_std):
        claimed = dataclasses.replace(view.sent, noise_std=claimed_std)
        ratio_N = distinguish.run(PairedPrompts(claimed, view.pairs_N2T)).values
        standard_N = (ratio_N - (2 * coin_N - 1) * mu_N.square() / 2) / mu_N
        return stats.kstest(standard_N[different_N].numpy(), "norm").pvalue

    assert different_N.sum() > 0.9 * PAIRS
    assert p_value(std) > FALSE_ALARM > p_value(1.5 * std)
    assert p_value(std / 1.5) < FALSE_ALARM


def test_the_ratio_is_exact_where_prompts_hardly_differ(world, rng):
    """Squared distances of a thousand would drown a difference of a millionth in float32."""
    shift_D = torch.full((32,), 1e-5)
    pairs_N2T = torch.tensor([[[0] * LENGTH, [1] * LENGTH]])
    rows_NTD = 100 * torch.randn((1, LENGTH, 32), generator=rng)
    sent = dataclasses.replace(
        world.view,
        rows_NTD=rows_NTD,
        sent=lambda ids_NT: ids_NT[..., None] * shift_D,
        noise_std=2.0,
    )
    view = PairedPrompts(sent, pairs_N2T)
    d_D = shift_D.double()
    expected = float(((rows_NTD.double() - d_D / 2) * d_D).sum() / 4)
    assert float(distinguish.run(view).values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("attack", [nearest_neighbour, with_prior, prior_only])
def test_the_same_rows_give_the_same_texts(attack, world, rng):
    few = dataclasses.replace(world.view, rows_NTD=world.view.rows_NTD[:5])
    view = noised(few, torch.randn(few.rows_NTD.shape, generator=rng), 2.0)
    assert torch.equal(ids(attack.run(view)), ids(attack.run(view)))


def test_views_hold_nothing_but_what_the_adversary_may_know(world, rng):
    view, _ = coin_view(world, rng, 0.0)
    assert {f.name for f in dataclasses.fields(view)} == {"sent", "pairs_N2T"}
    assert {f.name for f in dataclasses.fields(view.sent)} == {
        "rows_NTD",
        "vocabulary_C",
        "sent",
        "sent_after",
        "log_prior",
        "noise_std",
    }
