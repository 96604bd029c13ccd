import io
import math

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from sklearn.datasets import load_digits
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from privlm.data import ByteTokenizer, Document, cut_blocks
from privlm.models import (
    Cache,
    TinyConfig,
    TinyDecoder,
    generate,
    log_mel,
    per_example_loss,
)
from privlm.models.tiny import Positions

CONFIGS = {
    "swiglu": TinyConfig(50, 24, width=32, heads=2),
    "gelu tied": TinyConfig(50, 24, width=32, heads=4, mlp="gelu", tied_head=True),
    "image and audio": TinyConfig(
        50, 24, width=32, layers=1, image_channels=1, image_patch=2, n_mels=5
    ),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from threads and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name="swiglu", seed=0):
    return TinyDecoder(CONFIGS[name], seeded(seed))


def make_inputs(config, examples=4, length=12, seed=1):
    generator = seeded(seed)
    ids = torch.randint(config.vocab_size, (examples, length), generator=generator)
    image = audio = None
    if config.image_channels:
        image = torch.rand(examples, config.image_channels, 4, 4, generator=generator)
    if config.n_mels:
        audio = torch.randn(examples, 3, config.n_mels, generator=generator)
    return ids, image, audio


def train(model, steps, learning_rate, loss_of_step):
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate)
    for step in range(steps):
        optimiser.zero_grad()
        loss = loss_of_step(step)
        loss.mean().backward()
        optimiser.step()
    return loss


@pytest.mark.parametrize("name", CONFIGS)
def test_first_predictions_are_near_uniform(name):
    model = make(name)
    ids, *prefix = make_inputs(model.config)
    logits = model(ids, *prefix)
    assert logits.shape == (4, 12, 50)
    loss = per_example_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool))
    assert loss.mean().item() == pytest.approx(math.log(50), abs=0.7)


def test_initialisation_depends_on_its_generator_alone():
    before = torch.get_rng_state()
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(before, torch.get_rng_state())
    for name, parameter in first.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_nothing_before_it(name):
    model = make(name)
    ids, *prefix = make_inputs(model.config)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(ids, *prefix), model(changed, *prefix)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_examples_are_independent(name):
    model = make(name)
    ids, *prefix = make_inputs(model.config)
    alone = model(ids[2:3], *[p if p is None else p[2:3] for p in prefix])
    assert torch.allclose(model(ids, *prefix)[2:3], alone, atol=1e-5)


def test_an_empty_batch_passes():
    assert make()(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 50)


def test_rotary_scores_depend_on_the_difference_of_positions():
    """Su et al. 2021, equation 16."""
    query, key = torch.randn(2, 1, 1, 1, 16, generator=seeded())
    positions = Positions.at(3, 10, 16, like=query)
    rotated_query, rotated_key = (positions.rotate(x.repeat(1, 1, 10, 1)) for x in (query, key))
    score_SS = (rotated_query @ rotated_key.transpose(2, 3))[0, 0]
    for offset in range(-9, 10):
        diagonal = score_SS.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert score_SS.diagonal(0)[0].item() == pytest.approx((query * key).sum().item(), abs=1e-5)
    assert score_SS.std() > 0.1


def test_order_matters():
    # One layer, because two causal ones tell order even without positions.
    model = TinyDecoder(TinyConfig(50, 24, width=32, layers=1), seeded())
    logits = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))
    assert (logits[0, 3] - logits[1, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6)])
def test_cached_pieces_equal_one_full_pass(name, pieces):
    model = make(name)
    ids, *prefix = make_inputs(model.config)
    full = model(ids, *prefix)
    cache, start, logits = Cache(), 0, []
    for size in pieces:
        given = prefix if start == 0 else [None, None]
        logits.append(model(ids[:, start : start + size], *given, cache))
        start += size
    assert torch.allclose(torch.cat(logits, dim=1), full, atol=1e-5)
    assert cache.length == 12 + (4 + 3 if name == "image and audio" else 0)


def test_blocks_can_be_run_in_parts():
    model = make()
    ids, *_ = make_inputs(model.config)
    middle = model.run_blocks(model.embed_inputs(ids), last=1)
    logits = model.head(model.norm(model.run_blocks(middle, first=1)))
    assert torch.allclose(logits, model(ids), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # ids have no gradient
@pytest.mark.parametrize("name", CONFIGS)
def test_opacus_per_sample_gradients_equal_a_loop(name):
    assert ModuleValidator.validate(make(name)) == []
    wrapped = GradSampleModule(make(name), loss_reduction="sum", strict=True)
    ids, *prefix = make_inputs(CONFIGS[name])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    per_example_loss(wrapped(ids, *prefix), ids, mask).sum().backward()
    for b in range(len(ids)):
        one = make(name)
        logits = one(ids[b : b + 1], *[p if p is None else p[b : b + 1] for p in prefix])
        per_example_loss(logits, ids[b : b + 1], mask[b : b + 1]).sum().backward()
        for key, parameter in one.named_parameters():
            sample = wrapped._module.get_parameter(key).grad_sample[b]
            assert torch.allclose(sample, parameter.grad, atol=1e-5), (key, b)


@pytest.mark.parametrize("name", ["swiglu", "image and audio"])
def test_torch_func_per_sample_gradients_equal_a_loop(name):
    model = make(name)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    ids, *prefix = make_inputs(model.config)

    def loss(parameters, ids_T, *prefix):
        inputs = (ids_T[None], *[p if p is None else p[None] for p in prefix])
        logits = functional_call(model, parameters, inputs)
        return per_example_loss(logits, inputs[0], torch.ones_like(inputs[0]).bool())[0]

    dims = (None, 0, *[None if p is None else 0 for p in prefix])
    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=dims)(parameters, ids, *prefix)
    for b in range(len(ids)):
        expected = grad(loss)(parameters, ids[b], *[p if p is None else p[b] for p in prefix])
        for key in parameters:
            assert torch.allclose(gradients[key][b], expected[key], atol=1e-5), (key, b)


def test_second_derivatives_exist():
    """Gradient inversion descends on a distance between gradients."""
    model = make().double()
    ids, *_ = make_inputs(model.config, examples=2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    weight = model.blocks[0].attention.query.weight

    def squared_norm():
        loss = per_example_loss(model(ids), ids, mask).sum()
        return torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(squared_norm(), weight)[0][0, 0]
        with torch.no_grad():
            weight[0, 0] += 1e-4
        above = squared_norm()
        with torch.no_grad():
            weight[0, 0] -= 2e-4
        below = squared_norm()
    assert slope.item() == pytest.approx((above - below).item() / 2e-4, rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_survives_a_weights_only_round_trip(name):
    model, other = make(name), make(name, seed=9)
    ids, *prefix = make_inputs(model.config)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert not torch.allclose(other(ids, *prefix), model(ids, *prefix))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(ids, *prefix), model(ids, *prefix))


def test_tied_head_is_one_parameter():
    model = make("gelu tied")
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_learns_four_sentences_by_heart():
    sentences = [
        "Anna keeps her savings in the blue tin.",
        "Boris takes the night train to Vienna.",
        "Clara has not told anyone the password.",
        "David was in hospital from May to July.",
    ]
    tokenizer = ByteTokenizer()
    blocks = cut_blocks([Document(text[:5], text) for text in sentences], tokenizer, 48)
    model = TinyDecoder(TinyConfig(tokenizer.vocab_size, 48, width=48), seeded())

    def loss(_step):
        return per_example_loss(model(blocks.ids_NT), blocks.ids_NT, blocks.mask_NT)

    final = train(model, 200, 5e-3, loss)
    assert final.max() < 0.1
    prompt = blocks.ids_NT[:, :5]
    written = generate(model, prompt, 40)
    for ids, length, text in zip(written, blocks.length_N, sentences, strict=True):
        assert tokenizer.decode(ids[: int(length)].tolist()) == text


def test_reads_handwritten_digits_beside_text():
    digits = load_digits()
    images = torch.tensor(digits.images[:700] / 16.0, dtype=torch.float32)[:, None]
    start = torch.full((700, 1), 10)
    ids = torch.cat([start, torch.tensor(digits.target[:700])[:, None]], dim=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    model = TinyDecoder(TinyConfig(11, 6, width=32, image_channels=1), seeded())
    order = seeded(5)

    def loss(_step):
        batch = torch.randint(600, (64,), generator=order)
        return per_example_loss(model(ids[batch], images[batch]), ids[batch], mask[batch])

    def accuracy(rows, pictures):
        return (generate(model, start[rows], 1, image_BCHW=pictures)[:, 1] == ids[rows, 1]).float()

    train(model, 150, 3e-3, loss)
    trained, fresh = slice(0, 600), slice(600, 700)
    assert accuracy(trained, images[trained]).mean() > 0.95
    assert accuracy(fresh, images[fresh]).mean() > 0.8
    assert accuracy(trained, images[trained].flip(0)).mean() < 0.3  # it looks at the image


def test_hears_which_tone_is_played():
    sample_rate, n_mels = 8000, 16
    hertz = torch.tensor([300.0, 450.0, 700.0, 1000.0, 1600.0, 2500.0])
    source = seeded(7)

    def recordings(count):
        label = torch.randint(len(hertz), (count,), generator=source)
        time = torch.arange(1000) / sample_rate
        phase = 2 * math.pi * torch.rand(count, 1, generator=source)
        loudness = 0.1 + 0.9 * torch.rand(count, 1, generator=source)
        wave = loudness * torch.sin(2 * math.pi * hertz[label][:, None] * time + phase)
        wave = wave + 0.05 * torch.randn(count, 1000, generator=source)
        ids = torch.stack([torch.full_like(label, len(hertz)), label], dim=1)
        return log_mel(wave, sample_rate, n_mels), ids

    model = TinyDecoder(TinyConfig(7, 16, width=32, layers=1, heads=2, n_mels=n_mels), seeded())
    mask = torch.ones(64, 2, dtype=torch.bool)

    def loss(_step):
        frames, ids = recordings(64)
        return per_example_loss(model(ids, audio_BFM=frames), ids, mask)

    train(model, 80, 5e-3, loss)
    frames, ids = recordings(200)
    heard = generate(model, ids[:, :1], 1, audio_BFM=frames)[:, 1]
    assert (heard == ids[:, 1]).float().mean() > 0.95


def test_sampling_follows_the_model_and_its_generator():
    model = make()
    prompt = torch.tensor([[1, 2, 3]])
    draws = [generate(model, prompt, 6, temperature=1.0, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    cold = generate(model, prompt, 6, temperature=1e-4, generator=seeded(1))
    assert torch.equal(cold, generate(model, prompt, 6))
    many = generate(model, prompt.repeat(4000, 1), 1, temperature=1.0, generator=seeded(3))
    share = many[:, 3].bincount(minlength=50) / 4000
    expected = model(prompt)[0, -1].softmax(-1)
    assert (share - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
        ({"layers": -1}, "layers must be positive"),
        ({"width": 36, "heads": 4}, "multiple of 2 \\* heads.*width 36 and 4 heads"),
        ({"mlp": "relu"}, "mlp must be one of swiglu, gelu, got 'relu'"),
        ({"n_mels": -1}, "n_mels must not be negative"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        TinyConfig(**{"vocab_size": 10, "context": 8, **change})


def test_input_errors_give_the_numbers():
    model, ids = make(), torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match="0 cached and 25 new positions exceed the context of 24"):
        model(ids)
    cache = Cache()
    model(ids[:, :20], cache=cache)
    with pytest.raises(ValueError, match="20 cached and 5 new"):
        model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="no image input; set image_channels"):
        model(ids[:, :2], torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="no audio input; set n_mels"):
        model(ids[:, :2], audio_BFM=torch.zeros(1, 3, 5))
    both = make("image and audio")
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\), got \(1, 3, 4, 4\)"):
        both(ids[:, :2], torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, F, 5\), got \(1, 3, 6\)"):
        both(ids[:, :2], audio_BFM=torch.zeros(1, 3, 6))
    cache = Cache()
    both(ids[:, :2], torch.zeros(1, 1, 4, 4), cache=cache)
    with pytest.raises(ValueError, match="give them with the first call"):
        both(ids[:, :2], torch.zeros(1, 1, 4, 4), cache=cache)
    with pytest.raises(ValueError, match="positive with a generator"):
        generate(model, ids[:, :2], 3, temperature=1.0)
    with pytest.raises(ValueError, match="max_new_tokens must be positive"):
        generate(model, ids[:, :2], 0)
    with pytest.raises(ValueError, match="exceed the context"):
        generate(model, ids[:, :20], 6)
