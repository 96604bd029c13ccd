"""Every kind of model: one loss an example, gradients everywhere, nothing between examples."""

from pathlib import Path

import pytest
import torch
from made_up_examples import batch_for, loud

from privlm.data import IGNORE_INDEX, DataError
from privlm.data.inputs import require_placeholders

transformers = pytest.importorskip("transformers")
from privlm.models import architectures  # noqa: E402
from privlm.models.architectures import KINDS, Sizes, build, describe  # noqa: E402
from privlm.models.huggingface import ModelError  # noqa: E402
from privlm.models.loss import (  # noqa: E402
    UnknownLossError,
    causal_lm,
    loss_for,
    masked_lm,
    seq2seq,
    sequence_classification,
)

SIZES = Sizes(60, width=32, layers=2, heads=2, context=48, image_size=16, image_patch=4, n_mels=8)
CLASSIFIER = "sequence_classification"
CASES = [(kind, None) for kind in KINDS] + [
    (kind, CLASSIFIER) for kind in ("gpt2", "llama", "qwen2", "qwen3", "bert")
]
LOSSES = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "seq2seq": seq2seq,
    CLASSIFIER: sequence_classification,
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def task_of(kind, task):
    return task or {"bert": "masked_lm", "t5": "seq2seq"}.get(kind, "causal_lm")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{task_of(*case)}")
def case(request, generator):
    """A model with loud weights, its batch of three, and its task."""
    kind, task = request.param
    built = build(kind, SIZES, generator, task=task)
    loud(built.model, generator)
    return built, batch_for(built, task_of(kind, task), generator), task_of(kind, task)


def without_padding(batch, example):
    """One example alone, its padding cut off."""
    length = int(batch["attention_mask"][example].sum())
    return {
        name: value[example : example + 1, :length]
        if value.shape[:2] == batch["input_ids"].shape
        else value[example : example + 1]
        for name, value in batch.items()
    }


def test_the_loss_is_chosen_by_class_and_gives_one_finite_number_an_example(case):
    built, batch, task = case
    assert loss_for(built.model) is built.loss is LOSSES[task]
    losses = built.loss(built.model, batch)
    assert losses.shape == (3,)
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()


@torch.no_grad()
def test_an_example_alone_has_the_loss_it_has_in_a_batch(case):
    built, batch, _ = case
    together = built.loss(built.model, batch)
    for example in range(3):
        alone = built.loss(built.model, without_padding(batch, example))
        assert torch.allclose(alone, together[example : example + 1], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1:]).abs().min() > 1e-3  # else any mixing would pass


@torch.no_grad()
def test_the_neighbours_content_changes_nothing(case, generator):
    built, batch, task = case
    other = {name: value.clone() for name, value in batch.items()}
    fresh = batch_for(built, task, generator)
    for name in ("input_ids", "labels", "pixel_values", "input_features"):
        if name in batch:
            other[name][1:] = fresh[name][1:]
    before, after = (built.loss(built.model, b) for b in (batch, other))
    assert torch.allclose(before[0], after[0], atol=1e-5, rtol=1e-5)
    assert (before[1:] - after[1:]).abs().max() > 1e-3


def test_the_gradient_of_an_example_reaches_its_own_inputs_alone(case):
    built, batch, _ = case
    media = [name for name in ("pixel_values", "input_features") if name in batch]
    if not media:
        pytest.skip("text alone")
    values = batch[media[0]].requires_grad_()
    built.loss(built.model, batch)[1].backward()
    assert (values.grad.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False]


def test_gradients_reach_every_parameter_that_has_a_use(case):
    built, batch, _ = case
    built.loss(built.model, batch).sum().backward()
    idle = {
        name
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }
    # LLaVA takes the features one layer before the tower's last.
    unused = {name for name in idle if "layers.1." in name or "post_layernorm" in name}
    if built.model.config.model_type == "llava":
        assert idle == unused
        assert all("vision_tower" in name for name in unused)
    else:
        assert idle == set()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3"])
def test_padding_on_the_left_is_padding_on_the_right(kind, generator):
    built = build(kind, SIZES, generator)
    loud(built.model, generator)
    right = batch_for(built, "causal_lm", generator)
    left = {name: value.clone() for name, value in right.items()}
    for value in left.values():
        value[1] = value[1].roll(8)
    expected, found = (built.loss(built.model, batch) for batch in (right, left))
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    unmasked = left | {"attention_mask": torch.ones_like(left["attention_mask"])}
    assert not torch.allclose(built.loss(built.model, unmasked), expected, atol=1e-3)


@torch.no_grad()
def test_a_misplaced_placeholder_leaks_and_is_refused(generator):
    """One too many here, one too few there: transformers does not notice, so the data door must."""
    built = build("llava", SIZES, generator)
    loud(built.model, generator)
    batch = batch_for(built, "causal_lm", generator)
    image = built.inputs.image
    require_placeholders(batch["input_ids"], image)
    batch["input_ids"][0, image.tokens] = image.token_id
    batch["input_ids"][1, 0] = 5
    before = built.loss(built.model, batch)[0]
    batch["pixel_values"][1] += 1.0
    assert (built.loss(built.model, batch)[0] - before).abs() > 1e-4
    with pytest.raises(DataError, match="flow into another"):
        require_placeholders(batch["input_ids"], image)


@torch.no_grad()
def test_the_mean_that_transformers_forms_couples_examples(generator):
    """Why the model is called without labels; and on one example both agree."""
    built = build("gpt2", SIZES, generator)
    loud(built.model, generator)
    batch = batch_for(built, "causal_lm", generator)
    ours = causal_lm(built.model, batch)
    assert not torch.isclose(built.model(**batch).loss, ours.mean(), atol=1e-3)
    alone = {name: value[1:2] for name, value in batch.items()}
    assert torch.isclose(built.model(**alone).loss, ours[1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_heads_agree_with_transformers_on_one_example(kind, generator):
    built = build(kind, SIZES, generator)
    loud(built.model, generator)
    batch = batch_for(built, task_of(kind, None), generator)
    alone = {name: value[1:2] for name, value in batch.items()}
    assert torch.isclose(built.model(**alone).loss, built.loss(built.model, batch)[1], atol=1e-5)


def test_a_model_is_never_given_its_labels(case):
    """It would form the mean that couples examples, and one more tensor as large as the logits."""
    built, batch, _ = case
    given = []
    hook = built.model.register_forward_pre_hook(
        lambda module, arguments, named: given.append(named), with_kwargs=True
    )
    built.loss(built.model, batch)
    hook.remove()
    assert len(given) == 1
    assert "labels" not in given[0]
    assert torch.equal(given[0]["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_every_embedding_is_read_with_one_row_an_example(kind, generator):
    """Read once for all, a table of positions has a gradient that belongs to no example."""
    built = build(kind, SIZES, generator)
    batch = batch_for(built, task_of(kind, None), generator)

    def leading(call):
        rows = set()
        hooks = [
            module.register_forward_hook(lambda m, arguments, out: rows.add(len(arguments[0])))
            for module in built.model.modules()
            if isinstance(module, torch.nn.Embedding)
        ]
        call()
        for hook in hooks:
            hook.remove()
        return rows

    assert leading(lambda: built.loss(built.model, batch)) == {3}
    assert leading(lambda: built.model(batch["input_ids"])) == {1, 3}  # left to itself


def test_no_target_means_no_loss_and_no_gradient(generator):
    built = build("llama", SIZES, generator)
    batch = batch_for(built, "causal_lm", generator)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    losses = built.loss(built.model, batch)
    losses.sum().backward()
    assert losses.tolist() == [0.0] * 3
    assert not any(p.grad.any() for p in built.model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "smolvlm"])
def test_bfloat16_autocast_gives_float32_losses(kind, generator):
    built = build(kind, SIZES, generator)
    batch = batch_for(built, "causal_lm", generator)
    exact = built.loss(built.model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = built.loss(built.model, batch)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, exact, rtol=0.02)
    losses.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in built.model.parameters())


def test_the_generator_alone_decides_the_weights():
    def weights(seed):
        built = build("qwen3", SIZES, torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in built.model.parameters()])

    state = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "llava", "smolvlm"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_as_asked(kind, tied, generator):
    sizes = Sizes(60, width=32, heads=2, image_size=16, image_patch=4, tied_head=tied)
    model = build(kind, sizes, generator).model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_no_dropout_makes_a_loss_depend_on_chance(case):
    built, batch, _ = case
    assert built.model.training
    assert torch.equal(built.loss(built.model, batch), built.loss(built.model, batch))


def test_loss_for_refuses_what_it_cannot_tell(generator):
    built = build("bert", SIZES, generator, task=CLASSIFIER)
    built.model.config.problem_type = "multi_label_classification"
    with pytest.raises(UnknownLossError, match="no choice among classes"):
        loss_for(built.model)
    with pytest.raises(UnknownLossError, match="BertModel does not tell"):
        loss_for(build("bert", SIZES, generator).model.bert)


def test_what_cannot_be_built_is_refused(generator, monkeypatch):
    with pytest.raises(ModelError, match="unknown kind 'gpt5'; known are gpt2"):
        build("gpt5", SIZES, generator)
    with pytest.raises(ModelError, match="t5 is built for seq2seq, not for 'causal_lm'"):
        build("t5", SIZES, generator, task="causal_lm")
    with pytest.raises(ModelError, match="ties a T5's head"):
        build("t5", Sizes(60, tied_head=False), generator)
    with pytest.raises(ModelError, match="'voxtral' model sees or hears"):
        describe(transformers.VoxtralConfig())
    for changes, message in (
        ({"width": 30}, "multiple of 2"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"placeholder_id": 60}, "below vocab_size 60"),
        ({"image_size": 20}, "even multiple of image_patch"),
        ({"frames": 6}, "multiple of 4"),
        ({"classes": 1}, "at least 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Sizes(**({"vocab_size": 60, "heads": 4, "image_patch": 4} | changes))

    def missing(purpose):
        raise ModelError(f"{purpose}, pip install 'privlm[hf]'")

    monkeypatch.setattr(architectures, "require_transformers", missing)
    with pytest.raises(ModelError, match="pip install"):
        build("gpt2", SIZES, generator)


def test_nothing_but_the_door_imports_transformers():
    root = Path(architectures.__file__).parents[1]
    importing = {
        path.name for path in root.rglob("*.py") if "    import transformers" in path.read_text()
    }
    assert importing == {"huggingface.py"}
