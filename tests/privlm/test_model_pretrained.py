"""What was built and saved is what is loaded, from safetensors and the folder alone."""

import json

import pytest
import torch
from made_up_examples import batch_for, loud

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from privlm.models.architectures import KINDS, LanguageModel, Sizes, build  # noqa: E402
from privlm.models.huggingface import ModelError  # noqa: E402
from privlm.models.pretrained import FolderTokenizer, load, save  # noqa: E402

SIZES = Sizes(60, width=32, layers=2, heads=2, context=48, image_size=16, image_patch=4, n_mels=8)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("kind", "task"), [(k, None) for k in KINDS] + [("llama", "sequence_classification")]
)
def test_a_model_comes_back_as_it_was(kind, task, generator, tmp_path):
    built = build(kind, SIZES, generator, task=task)
    loud(built.model, generator)
    save(built, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(built.model)
    assert loaded.inputs == built.inputs
    assert loaded.model.training
    assert loaded.tokenizer is None
    assert (tmp_path / "model.safetensors").exists()
    head = task or {"bert": "masked_lm", "t5": "seq2seq"}.get(kind, "causal_lm")
    batch = batch_for(built, head, generator)
    assert torch.equal(loaded.loss(loaded.model, batch), built.loss(built.model, batch))


def word_tokenizer(**special):
    words = {f"w{number}": number for number in range(58)} | {"<image>": 58, "</s>": 59}
    library = Tokenizer(models.WordLevel(words, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special)


def test_text_never_encodes_to_a_special_token(generator, tmp_path):
    """Else a record could name an image that it does not have."""
    library = word_tokenizer(eos_token="</s>", additional_special_tokens=["<image>"])
    save(LanguageModel(build("llava", SIZES, generator).model, None, FolderTokenizer(library, 59)),
         tmp_path)  # fmt: skip
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.end_id == 59
    assert tokenizer.encode("w3 w7") == [3, 7]
    assert tokenizer.decode([3, 7, 59]) == "w3 w7"
    assert 58 in tokenizer.library("w3 <image> w7")["input_ids"]  # the danger is real
    assert not {58, 59} & set(tokenizer.encode("w3 <image> w7 </s>"))


def test_a_tokenizer_without_an_end_is_refused(generator, tmp_path):
    model = build("bert", SIZES, generator).model
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="set its eos_token"):
        load(tmp_path)


@pytest.mark.parametrize("newer", [False, True])
def test_the_folder_says_how_images_are_normalised(newer, generator, tmp_path):
    save(build("smolvlm", SIZES, generator), tmp_path)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_resize": True}
    name = "processor_config.json" if newer else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": said} if newer else said))
    image = load(tmp_path).inputs.image
    assert (image.mean, image.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / name).write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_no_other_class_than_a_language_model_is_made(generator, tmp_path):
    save(build("llama", SIZES, generator), tmp_path)
    for named, message in (
        (None, "a model without a head"),
        (["LlamaModel"], "must name one class"),
        (["LlamaForCausalLM", "GPT2LMHeadModel"], "must name one class"),
        (["TheirsForCausalLM"], "code in the folder is not run"),
        (["GPT2LMHeadModel"], "beside a 'llama' configuration"),
    ):
        changed(tmp_path, architectures=named)
        with pytest.raises(ModelError, match=message):
            load(tmp_path)


def test_code_and_pickles_in_the_folder_are_left_alone(generator, tmp_path):
    built = build("llama", SIZES, generator)
    save(built, tmp_path)
    changed(tmp_path, auto_map={"AutoModelForCausalLM": "theirs.Model", "AutoConfig": "theirs.C"})
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    assert load(tmp_path).model.config.model_type == "llama"
    (tmp_path / "model.safetensors").unlink()
    torch.save(built.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"needs a config\.json and model\.safetensors"):
        load(tmp_path)


def test_weights_are_neither_made_up_nor_dropped(generator, tmp_path):
    built = build("qwen2", SIZES, generator)
    state = built.model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    built.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks weights of a Qwen2ForCausalLM.*up_proj"):
        load(tmp_path)
    save(built, tmp_path)
    changed(tmp_path, num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ModelError, match=r"has no place for, such as model\.layers\.1\."):
        load(tmp_path)
