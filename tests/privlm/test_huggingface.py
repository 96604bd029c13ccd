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
import safetensors.torch  # noqa: E402
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


class Opened(Exception):
    """Not an OSError, which the hub's client would try again and swallow."""


@pytest.fixture
def network(monkeypatch):
    """All attempts to reach another machine; none of them succeeds."""
    attempts = []

    def record(*arguments, **_):
        attempts.append(arguments)
        raise Opened(str(arguments))

    for owner, name in (
        (socket, "getaddrinfo"),
        (socket, "gethostbyname"),
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket.socket, "sendto"),
    ):
        monkeypatch.setattr(owner, name, record)
    return attempts


def test_loading_touches_no_network(folder, network):
    assert load_causal_lm(str(folder)).tokenizer is not None
    assert network == []


def test_a_name_on_the_hub_would_have_been_noticed(network, monkeypatch):
    """Else the test above could not fail."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Exception):  # noqa: B017, PT011  (which one is the hub's client's affair)
        transformers.AutoConfig.from_pretrained("privlm-tests/no-such-model")
    assert network


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


def shard(folder, name):
    """Put all weights where the index says ``name``."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    keys = [key for key in gpt2().state_dict() if key != "lm_head.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_leads_to_safetensors_files_of_the_folder_alone(tmp_path):
    """transformers opens what the index names: a pickle, or a file anywhere on the machine."""
    other, folder = tmp_path / "other", tmp_path / "folder"
    for path in (other, folder):
        gpt2().save_pretrained(path)
    state = {key: value.clone() for key, value in gpt2().state_dict().items()}
    del state["lm_head.weight"]
    torch.save(state, folder / "weights.bin")
    weights = (folder / "model.safetensors").read_bytes()
    for name in (
        "weights.bin",
        "../other/model.safetensors",
        str(other / "model.safetensors"),
        "nowhere.safetensors",
        "weights.safetensors/../weights.bin",
    ):
        shard(folder, name)
        with pytest.raises(ModelError, match="which is no safetensors file in the folder"):
            load_causal_lm(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_causal_lm(folder)
    shard(folder, "all.safetensors")
    (folder / "all.safetensors").write_bytes(weights)
    assert load_causal_lm(folder).model.layers == 3  # a good index is followed


@pytest.mark.parametrize("name", ["adapter_model.bin", "theirs.safetensors.index.json"])
def test_the_config_names_no_weights_of_its_own(tmp_path, name):
    """transformers would open an adapter_model.bin, or an index that nobody has looked at."""
    gpt2().save_pretrained(tmp_path)
    changed(tmp_path, transformers_weights=name)
    shard(tmp_path, "weights.bin")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "theirs.safetensors.index.json")
    state = {key: value.clone() for key, value in gpt2().state_dict().items()}
    torch.save(state, tmp_path / "weights.bin")
    torch.save(state, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="take transformers_weights out"):
        load_causal_lm(tmp_path)


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_code_in_the_folder_is_never_run(tmp_path):
    gpt2().save_pretrained(tmp_path)
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    changed(tmp_path, auto_map=names)
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    assert load_causal_lm(tmp_path).model.layers == 3


def test_missing_weights_are_not_made_up(tmp_path, original):
    state = original.state_dict()
    del state["transformer.h.1.mlp.c_fc.weight"]
    original.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks weights .* transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_causal_lm(tmp_path)


def test_weights_without_a_place_are_not_dropped(tmp_path, original):
    """An adapter that was never merged, or a block too many: another model would be run."""
    original.save_pretrained(tmp_path)
    changed(tmp_path, n_layer=2)
    with pytest.raises(ModelError, match=r"has no place for, such as transformer\.h\.2\."):
        load_causal_lm(tmp_path)
    adapted = {key: value.clone() for key, value in original.state_dict().items()}
    del adapted["lm_head.weight"]
    adapted["transformer.h.0.attn.c_attn.lora_A.weight"] = torch.ones(4, 32)
    changed(tmp_path, n_layer=3)
    safetensors.torch.save_file(adapted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"such as transformer\.h\.0\.attn\.c_attn\.lora_A"):
        load_causal_lm(tmp_path)


@torch.no_grad()
def test_masks_that_older_checkpoints_carry_are_no_weights(tmp_path, original, ids):
    original.save_pretrained(tmp_path)
    state = {key: value.clone() for key, value in original.state_dict().items()}
    del state["lm_head.weight"]
    for layer in range(3):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_causal_lm(tmp_path).model(ids), Gpt2Decoder(original)(ids))


def test_another_head_is_not_taken_for_a_language_models(tmp_path):
    config = transformers.GPT2Config(**CONFIG, pad_token_id=0, num_labels=2)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a GPT2ForSequenceClassification"):
        load_causal_lm(tmp_path)
    gpt2().save_pretrained(tmp_path)
    changed(tmp_path, architectures=None)  # says nothing: the weights decide
    assert load_causal_lm(tmp_path).model.layers == 3


def test_an_error_without_words_is_named(folder, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"cannot be loaded \(AssertionError\)"):
        load_causal_lm(folder)


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
