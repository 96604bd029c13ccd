"""Clipped sums of real architectures, whole and by LoRA, against a loop over single examples."""

import pytest
import torch
from made_up_examples import batch_for, loud
from test_dp_bookkeeping import alone, norm_of, summed

pytest.importorskip("transformers")
from privlm.dp.clipping import ROUNDING_MARGIN, FlatClipping, PerLayerClipping
from privlm.models.adapters import add_lora, trainable
from privlm.models.architectures import KINDS, Sizes, build
from privlm.models.loss import loss_for

SIZES = Sizes(60, width=32, layers=2, heads=2, context=48, image_size=16, image_patch=4, n_mels=8)
TASKS = {"bert": "masked_lm", "t5": "seq2seq"}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def in_double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def assert_sums_of_a_loop(model, loss, batch):
    model.train()
    gradients = alone(model, loss, batch)
    norms = [norm_of(row) for row in gradients]
    bound = sorted(norms)[1]
    weights = [min(1.0, bound * (1 - ROUNDING_MARGIN) / norm) for norm in norms]
    expected = [
        sum(w * g for w, g in zip(weights, column, strict=True))
        for column in zip(*gradients, strict=True)
    ]
    got = summed(model, loss, batch, bound, 2).values
    difference = [a - b for a, b in zip(got, expected, strict=True)]
    assert norm_of(difference) <= 1e-9 * norm_of(expected)
    assert norm_of(expected) > 0


@pytest.mark.filterwarnings("ignore:.*one by one")
@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters(kind, generator):
    built = build(kind, SIZES, generator)
    model = loud(built.model, generator).double()
    batch = in_double(batch_for(built, TASKS.get(kind, "causal_lm"), generator))
    assert_sums_of_a_loop(model, loss_for(model), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone(kind, generator):
    built = build(kind, SIZES, generator)
    loud(built.model, generator)
    model = add_lora(built.model, rank=3, alpha=6, generator=generator).double()
    for parameter in trainable(model).values():  # B starts at zero, where A has no gradient
        parameter.data.normal_(0.0, 0.2, generator=generator)
    batch = in_double(batch_for(built, TASKS.get(kind, "causal_lm"), generator))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert_sums_of_a_loop(model, loss_for(model), batch)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("clipping", [FlatClipping(0.01), PerLayerClipping(0.01)])
@pytest.mark.parametrize("kind", ["gpt2", "llava", "qwen2_audio"])
def test_one_example_moves_the_sum_by_one_bound_at_most(kind, clipping, generator):
    """The sensitivity of the sum, which clipping after the sum would not bound."""
    built = build(kind, SIZES, generator)
    loud(built.model, generator)
    batch = batch_for(built, "causal_lm", generator)
    loss = loss_for(built.model)
    everybody = summed(built.model, loss, batch, clipping).values
    for left_out in range(3):
        others = {name: v[[n for n in range(3) if n != left_out]] for name, v in batch.items()}
        without = summed(built.model, loss, others, clipping).values
        moved = norm_of(a - b for a, b in zip(everybody, without, strict=True))
        assert 0.005 < moved <= 0.01
