import pytest
import torch
from torch.nn import functional as F

from privlm.data import IGNORE_INDEX
from privlm.models import (
    TinyConfig,
    TinyDecoder,
    UnknownLossError,
    cross_entropy,
    decoder_lm,
    loss_for,
    next_token_loss,
    per_example_loss,
    token_log_probs,
    token_loss,
)
from privlm.models.loss import class_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (3, 6), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()
    return logits, ids, mask


def test_each_example_averages_its_own_targets(batch):
    logits, ids, mask = batch
    loss = per_example_loss(logits, ids, mask)
    for b in range(3):
        log_probs = [logits[b, t - 1].log_softmax(-1)[ids[b, t]] for t in range(1, 6) if mask[b, t]]
        assert loss[b].item() == pytest.approx(-sum(log_probs).item() / len(log_probs))


def test_padding_changes_nothing(batch):
    logits, ids, mask = batch
    loss = per_example_loss(logits, ids, mask)
    other_ids, other_logits = ids.clone(), logits.clone()
    other_ids[1, 3:] = 5
    other_logits[1, 3:] = 100.0
    assert torch.equal(per_example_loss(other_logits, other_ids, mask), loss)
    short = per_example_loss(logits[1:2, :3], ids[1:2, :3], mask[1:2, :3])
    assert short.item() == pytest.approx(loss[1].item(), abs=1e-12)


def test_examples_do_not_couple(batch):
    logits, ids, mask = batch
    logits.requires_grad_()
    per_example_loss(logits, ids, mask)[1].backward()
    reaches = logits.grad.abs().sum(dim=(1, 2)) > 0
    assert reaches.tolist() == [False, True, False]
    assert not logits.grad[1, 2:].any()  # the last target, token 2, is predicted at position 1


def test_no_target_means_no_loss_and_no_gradient(batch):
    logits, ids, _ = batch
    logits.requires_grad_()
    loss = per_example_loss(logits, ids, torch.zeros_like(ids, dtype=torch.bool))
    assert loss.tolist() == [0.0] * 3
    loss.sum().backward()
    assert not logits.grad.any()


def test_token_log_probs_normalise(batch):
    logits, ids, _ = batch
    every = torch.stack([token_log_probs(logits, torch.full_like(ids, v)) for v in range(11)])
    assert torch.allclose(every.exp().sum(0), torch.ones(3, 5, dtype=torch.float64))


def test_shapes_must_agree(batch):
    logits, ids, mask = batch
    with pytest.raises(ValueError, match="do not fit ids"):
        token_log_probs(logits, ids[:, :4])
    with pytest.raises(ValueError, match="does not fit ids"):
        per_example_loss(logits, ids, mask[:, :4])


def reference(logits, labels):
    """Token by token, as the definition has it."""
    losses = []
    for b in range(len(labels)):
        terms = [
            -logits[b, t].log_softmax(-1)[labels[b, t]]
            for t in range(labels.shape[1])
            if labels[b, t] != IGNORE_INDEX
        ]
        losses.append(sum(terms) / len(terms) if terms else logits[b].sum() * 0.0)
    return torch.stack(losses)


def test_token_loss_and_its_gradient_follow_the_definition(batch):
    logits, ids, mask = batch
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[2] = IGNORE_INDEX
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    weights = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    (token_loss(ours, labels) * weights).sum().backward()
    (reference(theirs, labels) * weights).sum().backward()
    assert torch.allclose(token_loss(logits, labels), reference(logits, labels), atol=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    assert token_loss(logits, labels)[2] == 0
    assert not ours.grad[2].any()


def test_next_token_loss_moves_the_labels_by_one(batch):
    logits, ids, mask = batch
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    shifted = reference(logits[:, :-1], labels[:, 1:])
    assert torch.allclose(next_token_loss(logits, labels), shifted, atol=1e-12)
    assert not torch.allclose(token_loss(logits, labels), shifted, atol=0.1)


def test_class_loss_is_the_cross_entropy_of_each_example(batch):
    logits = batch[0][:, 0]
    label = torch.tensor([3, IGNORE_INDEX, 0])
    expected = F.cross_entropy(logits, label, reduction="none")
    assert torch.allclose(class_loss(logits, label), expected, atol=1e-12)
    with pytest.raises(ValueError, match="one label an example"):
        class_loss(logits, label[:, None])


def test_half_precision_is_widened_before_the_softmax(batch):
    """In bfloat16 log-probabilities err by percents; the float32 of the same logits must come."""
    logits = (4 * batch[0]).bfloat16()
    ids, mask = batch[1:]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    exact = token_loss(logits.double(), labels)
    narrow = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    loss = token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), exact, rtol=1e-6)
    assert not torch.allclose(narrow.double() / mask.sum(1), exact, rtol=1e-6)


def test_rows_are_twice_differentiable_across_chunks(monkeypatch):
    """Attacks on gradients differentiate a gradient; the chunk of two rows splits the five."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_CPU", 14)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, IGNORE_INDEX, 2, 2])

    def rows(logits):
        return cross_entropy.cross_entropy_rows(logits, target)

    expected = F.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(rows(logits), expected, atol=1e-12)
    assert torch.autograd.gradcheck(rows, (logits,))
    assert torch.autograd.gradgradcheck(rows, (logits,))


def test_rows_batch_under_vmap():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, 7, generator=generator)
    target = torch.randint(7, (3, 4), generator=generator)

    def gradients(loss):
        return torch.func.vmap(torch.func.grad(lambda x, t: loss(x, t).sum()))(logits, target)

    theirs = gradients(lambda x, t: F.cross_entropy(x, t, reduction="none"))
    assert torch.allclose(gradients(cross_entropy.cross_entropy_rows), theirs, atol=1e-6)


def test_a_training_step_keeps_nothing_of_the_logits_size_but_the_logits():
    """torch's own keeps the log-probabilities as well; this is what saves the memory."""

    def kept(loss):
        logits = torch.zeros(64, 500, requires_grad=True)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append((t.data_ptr(), t.numel())) or t, lambda t: t
        ):
            loss(logits, torch.zeros(64, dtype=torch.int64))
        return {size for place, size in sizes if place != logits.data_ptr() and size >= 64 * 500}

    assert kept(cross_entropy.cross_entropy_rows) == set()
    assert kept(lambda x, t: F.cross_entropy(x, t, reduction="none")) == {64 * 500}


def test_labels_of_another_shape_are_refused(batch):
    logits, ids, _ = batch
    with pytest.raises(ValueError, match="do not fit labels"):
        token_loss(logits, ids[:, :4])
    with pytest.raises(ValueError, match="do not fit labels"):
        next_token_loss(logits, ids[:, :4])


def test_a_decoder_of_this_toolkit_takes_the_same_batch():
    model = TinyDecoder(
        TinyConfig(20, 16, width=16, layers=1, image_channels=3, n_mels=5),
        torch.Generator().manual_seed(5),
    )
    ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(6))
    labels = ids.clone()
    labels[1, 3:] = IGNORE_INDEX
    batch = {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.rand(2, 3, 8, 4, generator=torch.Generator().manual_seed(7)),
        "input_features": torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(8)),
    }
    logits = model(ids, batch["pixel_values"], batch["input_features"].transpose(1, 2))
    expected = per_example_loss(logits, ids, labels != IGNORE_INDEX)
    assert loss_for(model) is decoder_lm
    assert torch.allclose(decoder_lm(model, batch), expected)


def test_a_model_that_does_not_tell_its_loss_is_refused():
    with pytest.raises(UnknownLossError, match="Linear does not tell"):
        loss_for(torch.nn.Linear(2, 2))
