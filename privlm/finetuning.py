"""From a configuration to a model: corpus, tokenizer, public base, private fine-tuning.

The one path that ``privlm train`` takes and that the audit attacks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from privlm.config import (
    NO_PUBLIC_TEXT,
    CorpusConfig,
    ModelConfig,
    PublicTraining,
    TokenizerConfig,
)
from privlm.data import (
    BlockSplit,
    DataError,
    Document,
    Encoder,
    Split,
    Tokenizer,
    cut_blocks,
    cut_split,
    load_documents,
    split_documents,
    train_bpe,
)
from privlm.data.tokenization import ByteTokenizer
from privlm.dp.batches import Batch
from privlm.dp.clipping import PerExampleLoss
from privlm.dp.training import PlainGradients, causal_lm_loss, examples_of, fit
from privlm.models import TinyConfig, TinyDecoder
from privlm.privacy import make_plan

__all__ = [
    "AfterStep",
    "Corpus",
    "clone",
    "cut_corpus",
    "load_corpus",
    "make_plan",
    "naming",
    "new_model",
    "new_tokenizer",
    "public_base_model",
    "public_steps",
    "split_sources",
    "steps_of",
    "train_plainly",
]

AfterStep = Callable[[int], None]


@dataclass(frozen=True)
class Corpus:
    """Records by who may see them, and the tokenizer that made them."""

    documents: Split
    blocks: BlockSplit
    tokenizer: Tokenizer


def load_corpus(
    config: CorpusConfig, tokenizer: TokenizerConfig, *, seed: int, reserved_tokens: int = 0
) -> Corpus:
    """Load, split and cut the documents; train the tokenizer on the public part.

    Args:
        config: which documents and what a record is.
        tokenizer: which tokenizer.
        seed: chooses the public split; no secret.
        reserved_tokens: ids kept free for canaries.

    Raises:
        DataError: the documents cannot be used; says where and how to mend it.
    """
    documents = split_sources(config, load_documents, seed=seed)
    made = new_tokenizer(tokenizer, [d.text for d in documents.public]).reserve(reserved_tokens)
    return Corpus(documents, cut_corpus(config, documents, made), made)


def split_sources(
    config: CorpusConfig,
    load: Callable[[str], tuple[Document, ...]],
    *,
    seed: int,
    by: Literal["document", "user"] = "document",
) -> Split:
    """Load what the configuration names, and say who may see which document.

    Args:
        config: the sources and their shares.
        load: reads one source.
        seed: chooses the split; no secret.
        by: ``"user"`` keeps all of a user's documents in one part.

    Raises:
        DataError: a source cannot be used, or a part is empty.
    """
    shares = {"private": config.private_share}
    if config.public_share is not None:
        shares["public"] = config.public_share
    if config.test_source is None:
        shares["test"] = config.test_share
    documents = load(config.source)
    with naming(config.source):
        split = split_documents(documents, seed, shares, by)
    if config.public_source is not None and config.public_source != NO_PUBLIC_TEXT:
        split = replace(split, public=load(config.public_source))
    if config.test_source is not None:
        split = replace(split, test=load(config.test_source))
    return split


def new_tokenizer(config: TokenizerConfig, public_texts: Sequence[str]) -> Tokenizer:
    """The tokenizer, trained on public text alone."""
    if config.kind == "byte":
        return ByteTokenizer()
    return train_bpe(public_texts, config.vocab_size)


def cut_corpus(config: CorpusConfig, documents: Split, tokenizer: Encoder) -> BlockSplit:
    """Records of every part, without exact duplicates.

    Raises:
        DataError: nothing remains of a part, or a document does not fit.
    """
    cut = partial(
        cut_blocks,
        tokenizer=tokenizer,
        context=config.context,
        unit=config.unit,
        truncate=config.truncate,
    )
    with naming(config.source):
        return cut_split(documents, cut)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of a source before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def new_model(corpus: Corpus, config: ModelConfig, *, seed: int) -> TinyDecoder:
    """A model that fits the corpus, before any training."""
    return TinyDecoder(
        TinyConfig(
            vocab_size=corpus.tokenizer.vocab_size,
            context=corpus.blocks.public.context,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        ),
        torch.Generator().manual_seed(seed),
    )


def public_base_model(
    corpus: Corpus,
    config: ModelConfig,
    training: PublicTraining,
    *,
    seed: int,
    after_step: AfterStep = lambda step: None,
) -> TinyDecoder:
    """A model trained on the public documents alone; what the private runs start from."""
    model = new_model(corpus, config, seed=seed)
    train_plainly(
        model,
        examples_of(corpus.blocks.public),
        training.optimizer.build(list(model.parameters())),
        steps=range(public_steps(corpus, training)),
        batch_size=training.batch_size,
        generator=torch.Generator().manual_seed(seed),
        after_step=after_step,
    )
    return model


def public_steps(corpus: Corpus, training: PublicTraining) -> int:
    """Optimiser steps of :func:`public_base_model`."""
    return steps_of(training, len(corpus.blocks.public))


def steps_of(training: PublicTraining, examples: int) -> int:
    """Optimiser steps of public training over so many examples."""
    return training.epochs * math.ceil(examples / training.batch_size)


def train_plainly(
    model: nn.Module,
    examples: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    steps: range,
    batch_size: int,
    generator: torch.Generator,
    loss: PerExampleLoss = causal_lm_loss,
    after_step: AfterStep = lambda step: None,
) -> None:
    """Train in place without any protection."""
    gradients = PlainGradients(model, loss, examples, batch_size, generator)
    fit(model, gradients, optimizer, steps, after_step)


def clone(model: TinyDecoder) -> TinyDecoder:
    """An independent copy to train further."""
    return copy.deepcopy(model)
