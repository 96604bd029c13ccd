"""From a configuration to a model: corpus, tokenizer, public base, private fine-tuning.

The one path that ``privlm train`` takes and that the audit attacks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from privlm.config import CorpusConfig, ModelConfig, PrivacyConfig, PublicTraining, TokenizerConfig
from privlm.data import (
    BlockSplit,
    DataError,
    Split,
    Tokenizer,
    cut_blocks,
    cut_split,
    load_documents,
    split_documents,
    train_bpe,
)
from privlm.data.tokenization import ByteTokenizer
from privlm.dp.ledger import Ledger
from privlm.dp.plan import Plan
from privlm.dp.sampling import PoissonSampler
from privlm.dp.training import (
    PlainGradients,
    causal_lm_loss,
    examples_of,
    fit,
    private_gradients,
)
from privlm.models import TinyConfig, TinyDecoder
from protocols.randomness import Stream

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
    shares = {"private": config.private_share}
    if config.public_share is not None:
        shares["public"] = config.public_share
    if config.test_source is None:
        shares["test"] = config.test_share
    documents = load_documents(config.source)
    with _naming(config.source):
        split = split_documents(documents, seed, shares)
    if config.public_source is not None:
        split = replace(split, public=load_documents(config.public_source))
    if config.test_source is not None:
        split = replace(split, test=load_documents(config.test_source))
    base: Tokenizer = (
        ByteTokenizer()
        if tokenizer.kind == "byte"
        else train_bpe([d.text for d in split.public], tokenizer.vocab_size)
    )
    made = base.reserve(reserved_tokens)
    cut = partial(
        cut_blocks,
        tokenizer=made,
        context=config.context,
        unit=config.unit,
        truncate=config.truncate,
    )
    with _naming(config.source):
        return Corpus(split, cut_split(split, cut), made)


@contextmanager
def _naming(source: str) -> Iterator[None]:
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
    examples = examples_of(corpus.blocks.public)
    train_plainly(
        model,
        examples,
        training.optimizer.build(list(model.parameters())),
        steps=range(public_steps(corpus, training)),
        batch_size=training.batch_size,
        generator=torch.Generator().manual_seed(seed),
        after_step=after_step,
    )
    return model


def public_steps(corpus: Corpus, training: PublicTraining) -> int:
    """Optimiser steps of :func:`public_base_model`."""
    return training.epochs * math.ceil(len(corpus.blocks.public) / training.batch_size)


def train_plainly(
    model: TinyDecoder,
    examples_N2T: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    steps: range,
    batch_size: int,
    generator: torch.Generator,
    after_step: AfterStep = lambda step: None,
) -> None:
    """Train in place without any protection."""
    gradients = PlainGradients(model, causal_lm_loss, examples_N2T, batch_size, generator)
    fit(model, gradients, optimizer, steps, after_step)


def make_plan(privacy: PrivacyConfig, *, candidates: int, epochs: float, batch_size: int) -> Plan:
    """The plan of a run over about ``candidates`` examples, a number treated as public.

    Raises:
        ValueError: a batch larger than the data, or a budget that no noise reaches.
    """
    check_batch_size(batch_size, candidates)
    sampler = PoissonSampler(batch_size / candidates)
    steps = planned_steps(candidates, epochs, batch_size)
    if privacy.noise_multiplier is not None:
        return Plan(
            sampler=sampler,
            steps=steps,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=batch_size,
            delta=privacy.delta,
        )
    assert privacy.target_epsilon is not None  # PrivacyConfig holds exactly one of the two
    return Plan.for_budget(
        target_epsilon=privacy.target_epsilon,
        delta=privacy.delta,
        sampler=sampler,
        steps=steps,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=batch_size,
    )


def planned_steps(examples: int, epochs: float, batch_size: int) -> int:
    """Steps in which an example is seen ``epochs`` times, in expectation; at least one."""
    return max(1, round(epochs * examples / batch_size))


def check_batch_size(batch_size: int, examples: int) -> None:
    """Raise ``ValueError`` for a batch larger than the data."""
    if batch_size > examples:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {examples} private examples; lower batch_size, "
            "or add data"
        )


def train_privately(
    model: TinyDecoder,
    examples_N2T: Tensor,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    *,
    run: str,
    stream: Stream,
    microbatch_size: int = 64,
    after_step: AfterStep = lambda step: None,
) -> None:
    """DP-SGD in place, from wherever the ledger says this run stands to the end of its plan."""
    with private_gradients(
        model,
        causal_lm_loss,
        examples_N2T,
        plan,
        ledger,
        run=run,
        stream=stream,
        microbatch_size=microbatch_size,
    ) as gradients:
        fit(model, gradients, optimizer, range(ledger.steps(run), plan.steps), after_step)


def clone(model: TinyDecoder) -> TinyDecoder:
    """An independent copy to train further."""
    return copy.deepcopy(model)
