import pytest
import torch

from privlm.models import per_example_loss, token_log_probs


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
