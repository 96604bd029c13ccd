"""Adapters move and the base does not; what is saved is the adapters alone, and peft reads it."""

import builtins
import copy
import json
from pathlib import Path

import pytest
import torch
from made_up_examples import batch_for, loud

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
import safetensors.torch  # noqa: E402

from privlm.models.adapters import (  # noqa: E402
    ALL_LINEAR,
    CONFIG,
    WEIGHTS,
    add_lora,
    load_adapters,
    save_adapters,
    trainable,
)
from privlm.models.architectures import KINDS, Sizes, build  # noqa: E402
from privlm.models.huggingface import ModelError  # noqa: E402
from privlm.models.loss import loss_for  # noqa: E402

SIZES = Sizes(60, width=32, layers=2, heads=2, context=48, image_size=16, image_patch=4, n_mels=8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def lora(model, generator, **changes):
    return add_lora(model, generator=generator, **{"rank": 2, "alpha": 4.0} | changes)


def task_of(kind):
    return {"bert": "masked_lm", "t5": "seq2seq"}.get(kind, "causal_lm")


@pytest.mark.parametrize("targets", [None, ALL_LINEAR], ids=["default", "all-linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_move_and_the_base_does_not(kind, targets, generator):
    built = build(kind, SIZES, generator)
    loud(built.model, generator)
    batch = batch_for(built, task_of(kind), generator)
    expected = built.loss(built.model, batch).detach()
    adapted = lora(built.model, generator, targets=targets)
    parameters = trainable(adapted)
    assert parameters
    assert all("lora_" in name for name in parameters)
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert loss_for(adapted) is built.loss
    assert torch.allclose(built.loss(adapted, batch), expected, atol=1e-6)

    before = copy.deepcopy(adapted.state_dict())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves at the second step
        optimizer.zero_grad()
        built.loss(adapted, batch).sum().backward()
        optimizer.step()
    moved = {name for name, value in adapted.state_dict().items() if not value.equal(before[name])}
    idle = {name for name in parameters if "vision_tower.encoder.layers.1." in name}
    assert moved == set(parameters) - (idle if kind == "llava" else set())
    assert not torch.allclose(built.loss(adapted, batch), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_audio"])
def test_by_default_a_multimodal_model_adapts_its_projector_and_language_model(kind, generator):
    names = trainable(lora(build(kind, SIZES, generator).model, generator))
    projectors = [n for n in names if "projector" in n or "modality_projection" in n]
    assert projectors
    assert any("q_proj" in name for name in names)
    assert not any("tower" in name or "vision_model" in name for name in names)


def test_a_half_precision_base_has_float32_adapters(generator):
    model = build("llama", SIZES, generator).model.bfloat16()
    adapted = lora(model, generator)
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
    frozen = {p.dtype for p in adapted.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_classifier_trains_its_random_head_as_well(generator):
    model = build("bert", SIZES, generator, task="sequence_classification").model
    names = trainable(lora(model, generator))
    assert any("classifier" in name for name in names)
    assert any("lora_A" in name for name in names)


@pytest.mark.parametrize("kind", ["gpt2", "smolvlm", "t5"])
def test_what_is_saved_is_the_adapters_alone_and_loads_again(kind, generator, tmp_path):
    built = build(kind, SIZES, generator)
    base = copy.deepcopy(built.model)
    adapted = lora(built.model, generator)
    with torch.no_grad():
        for parameter in trainable(adapted).values():
            parameter.normal_(generator=generator)
    batch = batch_for(built, task_of(kind), generator)
    expected = built.loss(adapted, batch).detach()
    assert not torch.allclose(built.loss(base, batch), expected, atol=1e-3)
    save_adapters(adapted, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} <= {WEIGHTS, CONFIG, "README.md"}
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert len(stored) == len(trainable(adapted))
    assert all("lora_" in name for name in stored)
    ours = load_adapters(copy.deepcopy(base), tmp_path)
    assert torch.allclose(built.loss(ours, batch), expected, atol=1e-6)
    assert set(trainable(ours)) == set(trainable(adapted))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.allclose(built.loss(theirs, batch), expected, atol=1e-6)
    assert not trainable(load_adapters(base, tmp_path, is_trainable=False))


def test_the_generator_alone_decides_the_adapters(generator):
    def weights(seed):
        model = build("llama", SIZES, torch.Generator().manual_seed(1)).model
        adapted = lora(model, torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in trainable(adapted).values()])

    state = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_adapters_in_a_pickle_are_never_opened(generator, tmp_path):
    """peft takes the pickle where there are no safetensors."""
    model = build("llama", SIZES, generator).model
    save_adapters(lora(copy.deepcopy(model), generator), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    proof, weights = tmp_path / "it ran", tmp_path / "adapter_model.bin"
    torch.save({"lora": Bomb(proof)}, weights)
    torch.load(weights, weights_only=False)
    proof.unlink()  # the bomb is live
    with pytest.raises(ModelError, match="a pickle is never opened"):
        load_adapters(model, tmp_path)
    assert not proof.exists()
    torch.save({}, weights)  # a harmless one is refused as well
    with pytest.raises(ModelError, match="a pickle is never opened"):
        load_adapters(model, tmp_path)


def test_each_refusal_says_how_to_mend_it(generator, tmp_path, monkeypatch):
    model = build("llama", SIZES, generator).model
    with pytest.raises(ValueError, match="rank and alpha must be positive"):
        lora(model, generator, rank=0)
    with pytest.raises(ModelError, match="adapters do not fit"):
        lora(model, generator, targets=["nowhere"])
    with pytest.raises(ModelError, match="has no adapters"):
        save_adapters(model, tmp_path)
    with pytest.raises(ModelError, match="a pickle is never opened"):
        load_adapters(model, tmp_path)
    adapted = lora(model, generator)
    with pytest.raises(ModelError, match="merge_and_unload"):
        lora(adapted, generator)
    save_adapters(adapted, tmp_path)
    with pytest.raises(ModelError, match="merge_and_unload"):
        load_adapters(adapted, tmp_path)
    other = Sizes(60, width=16, layers=2, heads=2)
    with pytest.raises(ModelError, match="do not fit the model"):
        load_adapters(build("llama", other, generator).model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for change in ({"peft_type": "IA3"}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        (tmp_path / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match="another kind than plain LoRA"):
            load_adapters(build("llama", SIZES, generator).model, tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapters(model, tmp_path)
    unknown = build("llama", SIZES, generator).model
    unknown.config.model_type = "unheard-of"
    with pytest.raises(ModelError, match="no layers are customary"):
        lora(unknown, generator)
    usual = builtins.__import__

    def without(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"pip install 'privlm\[hf\]'"):
        lora(build("llama", SIZES, generator).model, generator)
