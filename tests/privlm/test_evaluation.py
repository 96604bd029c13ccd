"""Bits per byte against numbers that can be worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from privlm.data import Document, cut_blocks, train_bpe
from privlm.data.tokenization import ByteTokenizer
from privlm.evaluation import HeldOut, NonFinitePrediction, document_bits, example_bits
from privlm.models import TinyConfig, TinyDecoder


class Fixed(nn.Module):
    """Predicts every token with given logits, whatever came before."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__()
        self.logits_V = logits_V

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.logits_V.expand(*ids_BT.shape, -1)


DOCUMENTS = (Document("a", "abcdefg"), Document("b", "ää"), Document("c", "x" * 40))


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary():
    """Of a document of n bytes and its end, all but each block's first token is predicted."""
    tokenizer = ByteTokenizer()
    blocks = cut_blocks(DOCUMENTS, tokenizer, 16)
    measured = document_bits(Fixed(torch.zeros(257)), blocks, tokenizer, batch_size=2)
    # c: 41 tokens in blocks of 16, 16 and 9; the last is too short to keep.
    np.testing.assert_allclose(measured.bits_D, np.log2(257) * np.array([7, 4, 30]), rtol=1e-6)
    assert measured.bytes_D.tolist() == [6, 3, 30]
    assert measured.bits_per_byte == pytest.approx(np.log2(257) * 41 / 39)


def test_bits_are_of_the_tokens_that_stand_there():
    tokenizer = ByteTokenizer()
    blocks = cut_blocks([Document("a", "aab")], tokenizer, 8)
    logits = torch.full((257,), -100.0)
    logits[ord("a")], logits[ord("b")], logits[256] = np.log(0.5), np.log(0.25), np.log(0.25)
    measured = document_bits(Fixed(logits), blocks, tokenizer)
    assert measured.bits_D == pytest.approx([1 + 2 + 2])
    assert measured.bytes_D.tolist() == [2]


def test_a_token_counts_for_the_bytes_it_stands_for():
    tokenizer = train_bpe(["abababab cdcdcd"] * 10, 300)
    blocks = cut_blocks([Document("a", "abababab cdcdcd")], tokenizer, 32)
    measured = document_bits(Fixed(torch.zeros(tokenizer.vocab_size)), blocks, tokenizer)
    first = int(tokenizer.n_bytes_V[int(blocks.ids_NT[0, 0])])
    assert measured.bytes_D.tolist() == [15 - first]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_diverged_has_no_utility(bad):
    tokenizer = ByteTokenizer()
    blocks = cut_blocks(DOCUMENTS, tokenizer, 16)
    logits = torch.zeros(257)
    logits[ord("x")] = bad
    with pytest.raises(NonFinitePrediction, match="diverged; lower the learning rate"):
        document_bits(Fixed(logits), blocks, tokenizer)


def test_no_documents():
    tokenizer = ByteTokenizer()
    blocks = cut_blocks(DOCUMENTS, tokenizer, 16)
    with pytest.raises(ValueError, match="larger share"):
        document_bits(Fixed(torch.zeros(257)), blocks.select([]), tokenizer)


def test_a_models_own_loss_tells_the_same_bits():
    tokenizer = ByteTokenizer()
    blocks = cut_blocks(DOCUMENTS, tokenizer, 16)
    model = TinyDecoder(TinyConfig(257, 16, width=8, heads=1), torch.Generator().manual_seed(0))
    by_logits = document_bits(model, blocks, tokenizer)
    bytes_N = torch.tensor([6.0, 3.0, 15.0, 15.0], dtype=torch.float64)
    held_out = HeldOut(blocks.as_examples(), blocks.document_N, bytes_N)
    by_loss = example_bits(model, held_out, batch_size=3)
    np.testing.assert_allclose(by_loss.bits_D, by_logits.bits_D, rtol=1e-5)
    assert by_loss.bytes_D.tolist() == by_logits.bytes_D.tolist()
