"""What a model is still good for, measured on documents that nobody trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from privlm.data import IGNORE_INDEX, Examples, TokenBlocks, Tokenizer
from privlm.models import loss_for, token_log_probs


class NonFinitePrediction(ValueError):
    """A model that has diverged has no utility to report."""


@dataclass(frozen=True)
class DocumentBits:
    """Code length of each test document and its size; their ratio is bits per byte.

    Shape suffix: D documents, which are the independent units of any interval.
    """

    bits_D: npt.NDArray[np.float64]
    bytes_D: npt.NDArray[np.float64]

    @property
    def bits_per_byte(self) -> float:
        """Σ bits / Σ bytes: comparable between tokenizers; lower is better."""
        return float(self.bits_D.sum() / self.bytes_D.sum())


@torch.no_grad()
def document_bits(
    model: nn.Module, blocks: TokenBlocks, tokenizer: Tokenizer, batch_size: int = 256
) -> DocumentBits:
    """Bits that ``model`` needs for each document's predicted tokens, and the bytes they stand for.

    Raises:
        NonFinitePrediction: the model's output is NaN or infinite.
        ValueError: ``blocks`` is empty.
    """
    if not len(blocks):
        raise ValueError("there are no test documents; give the test split a larger share")
    model.eval()
    byte_V = torch.from_numpy(tokenizer.n_bytes_V)
    bits_N, bytes_N = [], []
    for ids_BT, mask_BT in zip(
        blocks.ids_NT.split(batch_size), blocks.mask_NT.split(batch_size), strict=True
    ):
        target_BS = mask_BT[:, 1:]
        nats_BS = -token_log_probs(model(ids_BT), ids_BT)
        bits_N.append((nats_BS * target_BS).sum(1).double() / np.log(2))
        bytes_N.append((byte_V[ids_BT[:, 1:]] * target_BS).sum(1).double())
    return _by_document(torch.cat(bits_N), torch.cat(bytes_N), blocks.document_N)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Examples that nobody trained on.

    Attributes:
        examples: for the model's own loss.
        document_N: which of D documents each belongs to.
        bytes_N: float64; UTF-8 bytes that its targets stand for.
    """

    examples: Examples = field(repr=False)
    document_N: Tensor = field(repr=False)
    bytes_N: Tensor = field(repr=False)


@torch.no_grad()
def example_bits(model: nn.Module, held_out: HeldOut, batch_size: int = 32) -> DocumentBits:
    """:func:`document_bits` for any model with a loss over tokens, images or sound beside them.

    Raises:
        NonFinitePrediction: the model's output is NaN or infinite.
        UnknownLossError: the model's class does not tell its loss.
    """
    model.eval()
    loss = loss_for(model)
    bits_N = []
    for index_B in torch.arange(len(held_out.examples)).split(batch_size):
        batch = held_out.examples.batch(index_B)
        targets_B = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1)
        bits_N.append(loss(model, batch).double() * targets_B / np.log(2))
    return _by_document(torch.cat(bits_N), held_out.bytes_N, held_out.document_N)


def _by_document(bits: Tensor, size: Tensor, document_N: Tensor) -> DocumentBits:
    if not bool(torch.isfinite(bits).all()):
        raise NonFinitePrediction(
            "the model's predictions are not finite: it has diverged; lower the learning rate"
        )
    zero_D = torch.zeros(int(document_N.max()) + 1, dtype=torch.float64)
    return DocumentBits(
        zero_D.index_add(0, document_N, bits).numpy(),
        zero_D.index_add(0, document_N, size).clamp(min=1).numpy(),
    )
