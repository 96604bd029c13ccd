"""Texts recovered from gradients of real models on real text, and what must not be claimed."""

import dataclasses

import pytest
import torch

from attacks.gradient import recover_texts, span
from attacks.gradient.subspace import RowSpan
from attacks.targets.anatomy import gradient_of, open_model
from attacks.threat import SeenUpdates
from privlm.config import CorpusConfig, TokenizerConfig
from privlm.finetuning import load_corpus
from privlm.models import TinyConfig, TinyDecoder, per_example_loss

CONTEXT, VOCABULARY = 32, 512


@pytest.fixture(scope="module")
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(
        CorpusConfig(context=CONTEXT), TokenizerConfig(vocab_size=VOCABULARY), seed=0
    )


@pytest.fixture(scope="module")
def texts_NT(corpus, generator):
    """Full blocks of documents that no model or tokenizer here was trained on, in any order."""
    blocks = corpus.blocks.private
    full_NT = blocks.ids_NT[blocks.length_N == CONTEXT]
    return full_NT[torch.randperm(len(full_NT), generator=generator)]


def tiny(width=128, layers=2, tied=False):
    config = TinyConfig(VOCABULARY, CONTEXT, width=width, layers=layers, tied_head=tied)
    return TinyDecoder(config, torch.Generator().manual_seed(2)).eval()


@pytest.fixture(scope="module")
def trained(corpus, generator):
    """Of width 256, briefly trained on public blocks."""
    model = tiny(256)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    public_NT = corpus.blocks.public.ids_NT
    for _ in range(20):
        ids = public_NT[torch.randint(0, len(public_NT), (8,), generator=generator)]
        loss = per_example_loss(model(ids), ids, torch.ones_like(ids, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from privlm.models.huggingface import load_causal_lm

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(3)
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=256, n_layer=2, n_head=4
        )
    ).save_pretrained(folder)
    return load_causal_lm(folder).model


def gradients(model, ids_BT, length_B=None):
    """Of the mean of the examples' losses, by parameter name."""
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if length_B is not None:
        mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(length_B)[:, None]
    named = dict(model.named_parameters())
    loss = per_example_loss(model(ids_BT), ids_BT, mask_BT).mean()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def rounded(named, step):
    return {name: (g.double() / step).round() * step for name, g in named.items()}


def recover(model, named, resolution=0.0):
    return recover_texts(open_model(model), gradient_of(model, named, resolution))


def as_set(ids_BT):
    return {tuple(row) for row in ids_BT.tolist()}


def is_prefix_of_any(text, texts):
    return any(text == other[: len(text)] for other in texts)


def without_hidden_last_token(ids_BT):
    """With a tied head a last token that was read somewhere is not told from the others."""
    read = set(ids_BT[:, :-1].flatten().tolist())
    return {row[:-1] if row[-1] in read else row for row in as_set(ids_BT)}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("start", [0, 10])
def test_every_token_in_order_from_one_gradient(texts_NT, batch, start):
    model, ids = tiny(256), texts_NT[start : start + batch]
    found = recover(model, gradients(model, ids))
    assert set(found.texts) == as_set(ids)
    assert found.tokens == set(ids.flatten().tolist())
    assert found.note == ""


@pytest.mark.parametrize("batch", [1, 4])
def test_training_does_not_hide_the_text(trained, texts_NT, batch):
    ids = texts_NT[20 : 20 + batch]
    found = recover(trained, gradients(trained, ids))
    assert set(found.texts) == as_set(ids)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_tied_head_hides_no_more_than_last_tokens_read_elsewhere(texts_NT, batch):
    model, noted = tiny(192, tied=True), set()
    for ids in texts_NT[:8].split(batch):
        found = recover(model, gradients(model, ids))
        assert set(found.texts) == without_hidden_last_token(ids)
        hidden = without_hidden_last_token(ids) != as_set(ids)
        assert ("ambiguous" in found.note) == hidden
        noted.add(hidden)
    assert True in noted  # else this showed nothing about hidden tokens


@pytest.mark.parametrize("batch", [1, 4])
def test_gpt2_with_fused_projections_and_learned_positions(gpt2, texts_NT, batch):
    ids = texts_NT[:batch]
    found = recover(gpt2, gradients(gpt2, ids))
    assert set(found.texts) == without_hidden_last_token(ids)


def test_which_rows_the_spans_hold(texts_NT):
    """Value: all inputs but the last. Query: neither first nor last, as there is no choice at the
    first position and no loss at the last."""
    model, ids = tiny(), texts_NT[:1]
    named = gradients(model, ids)
    rows_TD = torch.cat(
        [
            open_model(model).attended_after(1, ids[:, :t], ids[0, t : t + 1])[0]
            for t in range(CONTEXT)
        ]
    )
    held = {
        name: RowSpan.of(named[f"blocks.1.attention.{name}.weight"]).contains(rows_TD).tolist()
        for name in ("value", "query")
    }
    inside = [True] * (CONTEXT - 2)
    assert held["value"] == [True, *inside, False]
    assert held["query"] == [False, *inside, False]


def test_a_sum_of_clients_hides_the_order_once_its_prefixes_fill_the_width(texts_NT):
    model, shares = tiny(128), []
    clients = [gradients(model, row[None]) for row in texts_NT[:16]]
    for n in (1, 2, 4, 8, 16):
        summed = {name: sum(client[name] for client in clients[:n]) for name in clients[0]}
        found, true = recover(model, summed), as_set(texts_NT[:n])
        assert all(is_prefix_of_any(text, true) for text in found.texts)
        shares.append(len(true & set(found.texts)) / n)
        distinct = len({text[:t] for text in true for t in range(1, CONTEXT)})
        if distinct >= model.width:
            assert found.texts == ()
            assert "full" in found.note
            read = set(texts_NT[:n, :-1].flatten().tolist())
            assert found.tokens == read  # an untied embedding still lists them
    assert shares[:2] == [1.0, 1.0]
    assert shares[-2:] == [0.0, 0.0]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("scale", [1e-6, 0.37, 1e4])
def test_clipping_by_a_scalar_hides_nothing(texts_NT, scale):
    model, ids = tiny(), texts_NT[:2]
    clipped = {name: scale * g for name, g in gradients(model, ids).items()}
    assert set(recover(model, clipped).texts) == as_set(ids)


@pytest.mark.parametrize("bits", [16, 20, 24, 30])
def test_fixed_point_leaves_one_text_exact(texts_NT, bits):
    model, step = tiny(), 2.0**-bits
    for ids in texts_NT[:3].split(1):
        found = recover(model, rounded(gradients(model, ids), step), step)
        assert set(found.texts) == as_set(ids)


def test_resolution_drowns_texts_little_by_little_and_never_invents_any(texts_NT):
    model, ids, shares = tiny(256), texts_NT[:4], []
    named, true = gradients(model, ids), as_set(ids)
    for bits in (20, 15, 13, 11, 9, 6):
        found = recover(model, rounded(named, 2.0**-bits), 2.0**-bits)
        assert all(is_prefix_of_any(text, true) for text in found.texts)
        assert found.note or set(found.texts) == true
        shares.append(sum(map(len, found.texts)))
    assert shares[0] == 4 * CONTEXT
    assert shares[-1] == 0
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_noise_of_a_hundredth_leaves_nothing(texts_NT, generator, tied):
    model = tiny(tied=tied)
    noised = {
        name: g + 1e-2 * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
        for name, g in gradients(model, texts_NT[:1]).items()
    }
    found = recover(model, noised)
    assert (found.texts, found.tokens) == ((), frozenset())
    assert found.note


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("step", [0.0, 2.0**-20])
def test_uniform_noise_is_nobodys_text(generator, tied, step):
    model = tiny(tied=tied)
    noise = {
        name: torch.rand(p.shape, generator=generator) - 0.5 for name, p in model.named_parameters()
    }
    found = recover(model, noise, step)
    assert (found.texts, found.tokens) == ((), frozenset())


def test_lengths_beginnings_and_repeats(texts_NT):
    """Texts that begin alike, one that goes on from another, runs of one token, padding."""
    model, ids = tiny(256), texts_NT[:4].clone()
    ids[1, :9] = ids[0, :9]
    ids[2, :4] = ids[2, 20:24] = 7
    ids[3, :12] = ids[0, :12]
    lengths = [CONTEXT, 20, 25, 12]
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = 0
    expected = {tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)}
    found = recover(model, gradients(model, ids, lengths))
    assert set(found.texts) == expected
    assert found.note == ""


def test_unscored_prompts_are_recovered_too(texts_NT):
    """Only the last tokens are targets; no text may seem to end inside the prompt."""
    model, ids = tiny(), texts_NT[:1]
    mask = torch.arange(CONTEXT)[None] >= 24
    named = dict(model.named_parameters())
    loss = per_example_loss(model(ids), ids, mask).mean()
    gradient = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert set(recover(model, gradient).texts) == as_set(ids)


def test_a_run_of_one_token_has_no_length(texts_NT):
    model, ids = tiny(), torch.full((1, CONTEXT), 7)
    found = recover(model, gradients(model, ids))
    assert found.texts == ()
    assert found.tokens == {7}
    assert "repeats one token" in found.note


def test_one_layer_gives_a_bag_of_tokens(texts_NT):
    model, ids = tiny(layers=1), texts_NT[:2]
    found = recover(model, gradients(model, ids))
    assert found.texts == ()
    assert found.tokens == set(ids[:, :-1].flatten().tolist())
    assert "one layer" in found.note


def view_of(model, uploads_VKP, step):
    layout = {name: p.shape for name, p in model.named_parameters()}

    def gradient(values_P, resolution):
        parts = values_P.split([shape.numel() for shape in layout.values()])
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(layout.items(), parts, strict=True)
        }
        return gradient_of(model, named, resolution)

    return SeenUpdates(open_model(model), iter(uploads_VKP), step, gradient)


@pytest.fixture
def round_of_three(texts_NT):
    """Model, step and three clients' encoded updates (3, P)."""
    model, step = tiny(), 2.0**-20
    flat = [
        torch.cat([g.flatten() for g in gradients(model, row[None]).values()])
        for row in texts_NT[:3]
    ]
    return model, step, torch.stack([(g.double() / step).round().long() for g in flat])


def masks(generator, shape):
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, shape, generator=generator)


def test_a_clear_upload_is_its_senders_alone(round_of_three, texts_NT):
    model, step, units_KP = round_of_three
    (found,) = span.run(view_of(model, [units_KP], step)).victims
    assert set(found.texts) == as_set(texts_NT[:1])


def test_a_mask_used_twice_cancels(round_of_three, texts_NT, generator):
    model, step, units_KP = round_of_three
    mask_P = masks(generator, units_KP.shape[1:])
    held_KP = units_KP + mask_P  # wraps around
    held_KP[1] = units_KP[1] + masks(generator, mask_P.shape)
    (found,) = span.run(view_of(model, [held_KP], step)).victims
    assert set(found.texts) == as_set(texts_NT[[0, 2]])


def test_fresh_masks_leave_nothing(round_of_three, generator):
    model, step, units_KP = round_of_three
    held = [units_KP + masks(generator, units_KP.shape) for _ in range(3)]
    result = span.run(view_of(model, held, step))
    assert len(result.victims) == 3
    assert all(not v.texts and not v.tokens for v in result.victims)


@pytest.fixture
def planted(generator):
    """A rank-20 matrix of width 64 under noise of known size, and its rows."""
    rows = torch.randn(20, 64, generator=generator, dtype=torch.float64)
    strength = torch.logspace(0, -2, 20, dtype=torch.float64)[:, None]
    left = torch.randn(20, 96, generator=generator, dtype=torch.float64)
    return rows, (strength * left).T @ rows


@pytest.mark.parametrize("step", [1e-5, 1e-3])
def test_the_span_check_keeps_its_level(planted, generator, step):
    """Rejects a true row once in 1e9; accepts none of 100,000 chance directions: in each case a
    false alarm is far below 1e-3."""
    rows, clear = planted
    found = RowSpan.of((clear / step).round() * step, step)
    assert found.rank == 20
    assert found.noise_std == pytest.approx(step / 12**0.5, rel=0.1)
    assert found.contains(rows).all()
    anywhere = torch.randn(100_000, 64, generator=generator, dtype=torch.float64)
    assert found.tells(100_000)
    assert not found.contains(anywhere).any()


def test_tolerances_belong_to_the_row(planted, generator):
    """A row of strong directions may stray far less than one of weak ones: the error that passes
    for the weakest row does not pass for the strongest."""
    rows, clear = planted
    found = RowSpan.of((clear / 1e-3).round() * 1e-3, 1e-3)
    weak = rows[-1] - rows[-1] @ found.basis_RD.T @ found.basis_RD
    assert found.contains(rows[-1])
    assert not found.contains(rows[0] + weak)


def test_a_nearly_full_span_is_not_told_from_chance(generator):
    noisy = torch.randn(64, 64, generator=generator)
    assert not RowSpan.of(noisy).tells(1)
    assert not RowSpan.of(torch.zeros(64, 64)).tells(1)


def test_the_reach_of_an_attack_is_its_view():
    assert {f.name for f in dataclasses.fields(SeenUpdates)} == {
        "model",
        "uploads",
        "step",
        "gradient",
    }
