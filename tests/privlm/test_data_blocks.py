import dataclasses
import itertools

import pytest
import torch

from privlm.data import (
    IGNORE_INDEX,
    ByteTokenizer,
    DataError,
    Document,
    TokenBlocks,
    concatenate,
    cut_blocks,
    fingerprint,
)

BYTES = ByteTokenizer()
DOCUMENTS = (
    Document("long", "abcdefghijklmnopqrstuvwxyz", "ada"),
    Document("short", "0123", "ada"),
    Document("mid", "ABCDEFGHIJ", "bob"),
)


def test_blocks_hold_every_token_once_and_pad_on_the_right():
    blocks = cut_blocks(DOCUMENTS, BYTES, 8, min_tail=2)
    assert blocks.record_ids == (
        *("long#0", "long#1", "long#2", "long#3"),
        "short#0",
        *("mid#0", "mid#1"),
    )
    assert blocks.length_N.tolist() == [8, 8, 8, 3, 5, 8, 3]
    for document in DOCUMENTS:
        kept = [
            ids[:length]
            for ids, length, name in zip(
                blocks.ids_NT.tolist(), blocks.length_N.tolist(), blocks.documents, strict=True
            )
            if name == document.id
        ]
        assert list(itertools.chain(*kept)) == [*BYTES.encode(document.text), BYTES.end_id]
    assert blocks.ids_NT[4].tolist() == [*b"0123", *[BYTES.end_id] * 4]
    assert blocks.labels_NT[4].tolist() == [*b"0123", BYTES.end_id, *[IGNORE_INDEX] * 3]
    assert blocks.document_N.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert blocks.user_N.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_short_tails_are_dropped_but_no_document_vanishes():
    blocks = cut_blocks(DOCUMENTS, BYTES, 8, min_tail=6)  # "short" has 5 tokens
    assert blocks.record_ids == ("long#0", "long#1", "long#2", "short#0", "mid#0")
    exact = cut_blocks([Document("d", "1234567")], BYTES, 8)  # 7 bytes and the end: one block
    assert exact.record_ids == ("d#0",)
    assert bool(exact.mask_NT.all())


def test_document_unit_refuses_what_does_not_fit_and_says_the_ways_out():
    whole = cut_blocks(DOCUMENTS, BYTES, 27, unit="document")
    assert whole.record_ids == ("long", "short", "mid")
    with pytest.raises(DataError, match=r"'long' has 27 tokens, the context holds 16; use unit: b"):
        cut_blocks(DOCUMENTS, BYTES, 16, unit="document")
    cut = cut_blocks(DOCUMENTS, BYTES, 16, unit="document", truncate=True)
    assert cut.length_N.tolist() == [16, 5, 11]
    assert BYTES.decode(cut.ids_NT[0].tolist()) == "abcdefghijklmnop"


def test_select_and_concatenate():
    blocks = cut_blocks(DOCUMENTS, BYTES, 8, min_tail=2)
    mask = blocks.user_N == 1
    assert blocks.select(mask.numpy()).record_ids == ("mid#0", "mid#1")
    assert blocks.select(mask).record_ids == ("mid#0", "mid#1")
    assert blocks.select([6, 0]).record_ids == ("mid#1", "long#0")
    assert len(blocks.select([])) == 0
    both = concatenate(blocks.select([3]), blocks.select([0, 1]))
    assert both.record_ids == ("long#3", "long#0", "long#1")
    assert torch.equal(both.ids_NT, blocks.ids_NT[[3, 0, 1]])
    with pytest.raises(DataError, match="mask of"):
        blocks.select(mask[:3])
    with pytest.raises(DataError, match="contexts differ"):
        concatenate(blocks, cut_blocks(DOCUMENTS, BYTES, 9))
    with pytest.raises(DataError, match="record ids repeat"):
        concatenate(blocks, blocks)


def test_fingerprint_sees_content_names_and_users_but_not_order():
    blocks = cut_blocks(DOCUMENTS, BYTES, 8)
    reference = fingerprint(blocks)
    assert reference == fingerprint(blocks.select(list(range(len(blocks)))[::-1]))
    other_token = blocks.ids_NT.clone()
    other_token[0, 3] += 1
    other_mask = blocks.mask_NT.clone()
    other_mask[0, 7] = False
    changed = [
        dataclasses.replace(blocks, ids_NT=other_token),
        dataclasses.replace(blocks, mask_NT=other_mask),
        dataclasses.replace(blocks, users=("eve", *blocks.users[1:])),
        dataclasses.replace(blocks, record_ids=("x", *blocks.record_ids[1:])),
        blocks.select(range(1, len(blocks))),
    ]
    assert len({reference, *map(fingerprint, changed)}) == 6


def test_malformed_blocks_are_refused():
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    names = ("a", "b")
    with pytest.raises(DataError, match="int64"):
        TokenBlocks(ids.int(), mask, names, names, names)
    with pytest.raises(DataError, match="share a shape"):
        TokenBlocks(ids, mask[:, :3], names, names, names)
    with pytest.raises(DataError, match="2 records but 1 users"):
        TokenBlocks(ids, mask, names, names, ("u",))
    only_first = mask & torch.tensor([True, False, False, False])
    with pytest.raises(DataError, match="'a' has no target"):
        TokenBlocks(ids, only_first, names, names, names)


def test_cutting_errors():
    with pytest.raises(DataError, match="at least 2"):
        cut_blocks(DOCUMENTS, BYTES, 1)
    with pytest.raises(DataError, match="no documents"):
        cut_blocks([], BYTES, 8)
    with pytest.raises(DataError, match="share the id"):
        cut_blocks([DOCUMENTS[0], DOCUMENTS[0]], BYTES, 8)
    with pytest.raises(DataError, match="unit must be"):
        cut_blocks(DOCUMENTS, BYTES, 8, unit="user")
