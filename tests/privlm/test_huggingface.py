"""A GPT-2 behind the door computes what transformers computes, however it is cut."""

import builtins
import json
import socket
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from privlm.models import TinyConfig, TinyDecoder, generate
from privlm.models.huggingface import Gpt2Decoder, ModelError, load_causal_lm

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

CONFIG = {
    "vocab_size": 60,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def gpt2(**changes):
    """Weights far from zero, so that every part shows in the logits."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def original():
    return gpt2()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    original.save_pretrained(path)
    words = {f"w{number}": number for number in range(60)}
    library = Tokenizer(models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=library).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_causal_lm(folder).model


@pytest.fixture
def ids():
    return torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(2))


def tiny():
    generator = torch.Generator().manual_seed(3)
    model = TinyDecoder(TinyConfig(60, 24, width=32, layers=3), generator)
    with torch.no_grad():  # norms start out alike
        for norm in model.modules():
            if isinstance(norm, torch.nn.RMSNorm):
                norm.weight.uniform_(0.5, 1.5, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attn_implementation": "eager"},
        {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_logits_equal_the_original_in_full_and_in_cached_pieces(changes, ids):
    model = gpt2(**changes)
    decoder, expected = Gpt2Decoder(model), model(ids).logits
    assert expected.std() > 0.5
    assert torch.allclose(decoder(ids), expected, atol=1e-5)
    for pieces in ((1,) * 12, (5, 1, 6)):
        cache = decoder.new_cache()
        logits = [decoder(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-5)
        assert cache.length == 12


@torch.no_grad()
def test_what_is_loaded_equals_what_was_saved(original, loaded, ids):
    assert torch.equal(loaded(ids), Gpt2Decoder(original)(ids))
    assert not loaded.training
    assert (loaded.vocab_size, loaded.width, loaded.layers, loaded.context) == (60, 32, 3, 24)
    assert loaded.tied_head
    assert loaded.positional
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_half_precision_folders_become_float32(tmp_path, ids):
    gpt2().half().save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path).model
    assert model.head.weight.dtype == torch.float32
    assert torch.allclose(model(ids), gpt2()(ids).logits, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (1, 3), (0, 3), (2, 2)])
@pytest.mark.parametrize("make", [tiny, lambda: Gpt2Decoder(gpt2())], ids=["tiny", "gpt2"])
def test_cut_runs_with_their_own_caches_equal_one_run(make, first, last, ids):
    model = make()
    spans = ((0, first), (first, last), (last, 3))
    caches = [model.new_cache() for _ in spans]
    logits, start = [], 0
    for piece in ids.split((7, 1, 1, 3), dim=1):
        x = model.embed_tokens(piece, start)
        for (low, high), cache in zip(spans, caches, strict=True):
            x = model.run_blocks(x, cache, low, high)
        logits.append(model.predict(x))
        start += piece.shape[1]
    assert torch.allclose(torch.cat(logits, dim=1), model(ids), atol=1e-5)
    assert [len(cache.layers) for cache in caches] == [high - low for low, high in spans]


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny, lambda: Gpt2Decoder(gpt2())], ids=["tiny", "gpt2"])
def test_a_repeated_cache_tries_candidates_side_by_side(make, ids):
    model, cache = make(), make().new_cache()
    model(ids, cache=cache)
    candidates = torch.tensor([[3], [4], [5]])
    side_by_side = model(candidates.repeat(2, 1), cache=cache.repeat(3))
    for row in range(2):
        for number, candidate in enumerate(candidates):
            alone = model(torch.cat([ids[row], candidate])[None])[0, -1]
            assert torch.allclose(side_by_side[3 * row + number, -1], alone, atol=1e-5)
    assert cache.length == 12


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny, lambda: Gpt2Decoder(gpt2())], ids=["tiny", "gpt2"])
def test_the_values_of_a_layer_are_its_attention_input_times_the_weight_named(make, ids):
    model = make()
    parameters = dict(model.named_parameters())
    roles, cache = model.parameter_roles(), model.new_cache()
    model(ids, cache=cache)
    x = model.embed_tokens(ids)
    for layer, weight in enumerate(roles.values):
        matrix = parameters[weight.name]
        matrix = matrix if weight.in_out else matrix.T  # (in, out)
        bias = parameters.get(weight.name.replace("weight", "bias"), torch.zeros(matrix.shape[1]))
        made = model.attention_input(x, layer) @ matrix + bias
        values = cache.layers[layer][1].transpose(1, 2).flatten(2)
        assert torch.allclose(made[..., -32:], values, atol=1e-5)
        x = model.run_blocks(x, first=layer, last=layer + 1)
    assert torch.allclose(F.linear(model.final_hidden(x), parameters[roles.head]), model(ids))
    assert parameters[roles.embedding].shape == (60, 32)
    assert (roles.head == roles.embedding) == model.tied_head


def test_weights_are_shared_with_the_original_and_gradients_reach_them(ids):
    model = gpt2()
    decoder = Gpt2Decoder(model)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in decoder.parameters()} == theirs
    decoder(ids).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_generation_equals_transformers(original, loaded, ids):
    expected = original.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    written = generate(loaded, ids, 8)
    assert torch.equal(written[:, : expected.shape[1]], expected)
    assert len(written[0, 12:].unique()) > 1


def test_the_tokenizer_comes_along(folder, tmp_path):
    tokenizer = load_causal_lm(folder).tokenizer
    assert tokenizer.encode("w3 w59", add_special_tokens=False) == [3, 59]
    gpt2().save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).tokenizer is None


def test_positions_beyond_the_context_are_refused(loaded):
    ids = torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match="0 cached and 25 new positions exceed the context of 24"):
        loaded(ids)
    cache = loaded.new_cache()
    loaded(ids[:, :20], cache=cache)
    with pytest.raises(ValueError, match="20 cached and 5 new"):
        loaded.run_blocks(torch.zeros(1, 5, 32), cache)
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        loaded(ids[0])


def test_loading_touches_no_network(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_causal_lm(str(folder)).model.layers == 3


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(tmp_path):
    transformers.GPT2Config(**CONFIG).save_pretrained(tmp_path)
    proof, weights = tmp_path / "it ran", tmp_path / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": Bomb(proof)}, weights)
    torch.load(weights, weights_only=False)
    proof.unlink()  # the bomb is live
    with pytest.raises(ModelError, match=r"needs a config\.json and model\.safetensors"):
        load_causal_lm(tmp_path)
    assert not proof.exists()
    torch.save(gpt2().state_dict(), weights)  # a good one is refused as well
    with pytest.raises(ModelError, match=r"needs a config\.json and model\.safetensors"):
        load_causal_lm(tmp_path)


def test_code_in_the_folder_is_never_run(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    assert load_causal_lm(tmp_path).model.layers == 3


def test_missing_weights_are_not_made_up(tmp_path, original):
    state = original.state_dict()
    del state["transformer.h.1.mlp.c_fc.weight"]
    original.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks weights .* transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_causal_lm(tmp_path)


def test_each_refusal_says_how_to_mend_it(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="is no folder; give the local folder"):
        load_causal_lm(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is no folder"):
        load_causal_lm("gpt2")
    with pytest.raises(ModelError, match=r"it needs a config\.json"):
        load_causal_lm(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a 'llama' model; only 'gpt2'"):
        load_causal_lm(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge it with peft's merge_and_unload"):
        load_causal_lm(tmp_path)
    usual = builtins.__import__

    def without(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'privlm\[hf\]'"):
        load_causal_lm(tmp_path)
