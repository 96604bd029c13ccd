import dataclasses

import pytest
import torch

from privlm.data import (
    IGNORE_INDEX,
    ByteTokenizer,
    DataError,
    Document,
    Examples,
    cut_blocks,
    fingerprint,
)


@pytest.fixture
def examples():
    tensors = {"input_ids": torch.arange(12).view(3, 4), "pixel_values": torch.ones(3, 1, 2, 2)}
    return Examples(tensors, ("a", "b", "c"), ("u", "u", "v"))


def test_blocks_become_examples_with_labels_at_targets_alone():
    documents = (Document("long", "abcdefghij", "ada"), Document("short", "0123", "bob"))
    blocks = cut_blocks(documents, ByteTokenizer(), 8, min_tail=2)
    examples = blocks.as_examples()
    assert examples.record_ids == blocks.record_ids
    assert examples.users == blocks.users
    assert torch.equal(examples.tensors["input_ids"], blocks.ids_NT)
    for n, length in enumerate(blocks.length_N.tolist()):
        mask, labels = (examples.tensors[name][n] for name in ("attention_mask", "labels"))
        assert mask.tolist() == [1] * length + [0] * (8 - length)
        assert torch.equal(labels[:length], blocks.ids_NT[n, :length])
        assert (labels[length:] == IGNORE_INDEX).all()
    assert fingerprint(blocks) == examples.fingerprint()  # one data set, one ledger


def test_selection_keeps_rows_names_and_users_together(examples):
    for which in ([2, 0], torch.tensor([2, 0])):
        chosen = examples.select(which)
        assert chosen.record_ids == ("c", "a")
        assert chosen.users == ("v", "u")
        assert chosen.tensors["input_ids"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert examples.select(torch.tensor([False, True, False])).record_ids == ("b",)
    empty = examples.select([])
    assert len(empty) == 0
    assert empty.tensors["pixel_values"].shape == (0, 1, 2, 2)
    batch = examples.batch(torch.tensor([1]))
    assert batch["pixel_values"].shape == (1, 1, 2, 2)
    with pytest.raises(DataError, match="cannot select from 3"):
        examples.select(torch.tensor([True]))


def test_fingerprint_sees_content_names_users_and_types_but_not_order(examples):
    reference = examples.fingerprint()
    assert examples.select([2, 1, 0]).fingerprint() == reference
    pixel = {k: v.clone() for k, v in examples.tensors.items()}
    pixel["pixel_values"][1, 0, 0, 0] += 1e-6
    shape = dict(examples.tensors, pixel_values=torch.ones(3, 1, 4))
    kind = dict(examples.tensors, pixel_values=torch.ones(3, 1, 2, 2).int())
    name = {"labels": examples.tensors["input_ids"], "pixel_values": torch.ones(3, 1, 2, 2)}
    changed = [
        *(dataclasses.replace(examples, tensors=tensors) for tensors in (pixel, shape, kind, name)),
        dataclasses.replace(examples, users=("u", "v", "v")),
        dataclasses.replace(examples, record_ids=("x", "b", "c")),
        examples.select([0, 1]),
    ]
    assert len({reference, *(other.fingerprint() for other in changed)}) == 8


def test_malformed_examples_are_refused():
    ids = torch.zeros(2, 4)
    with pytest.raises(DataError, match="without any tensor"):
        Examples({}, (), ())
    with pytest.raises(DataError, match=r"1 record ids but input_ids of shape \(2, 4\)"):
        Examples({"input_ids": ids}, ("a",), ("a",))
    with pytest.raises(DataError, match="2 record ids but 1 users"):
        Examples({"input_ids": ids}, ("a", "b"), ("a",))
    with pytest.raises(DataError, match="record ids repeat"):
        Examples({"input_ids": ids}, ("a", "a"), ("a", "a"))
