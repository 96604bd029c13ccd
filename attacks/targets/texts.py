"""Private texts of one length, and the laziness with which rounds are run.

Shape suffixes: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from attacks.targets.frame import Scene, Texts
from privlm.finetuning import Corpus

Item = TypeVar("Item")


class Rerun(Iterable[Item]):
    """Whatever ``run`` yields; every pass calls it anew, and nothing is kept."""

    def __init__(self, run: Callable[[], Iterator[Item]]) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Item]:
        return self._run()


def require_texts(corpus: Corpus, tokens: int, wanted: int) -> None:
    """Raise ``ValueError`` unless there are so many private texts of so many tokens."""
    there = len(_openings(corpus, tokens))
    if there < wanted:
        raise ValueError(
            f"{wanted:,} private texts of {tokens} tokens are needed, the corpus gives {there:,}; "
            "ask for fewer or shorter texts, add text, or raise corpus.private_share"
        )


def private_texts(scene: Scene, tokens: int, count: int) -> Tensor:
    """The first tokens of so many private records, no two alike: ids_NT."""
    texts_MT = _openings(scene.corpus, tokens)
    order_M = np.random.default_rng(scene.seed).permutation(len(texts_MT))
    return texts_MT[torch.from_numpy(order_M[:count])]


def as_texts(scene: Scene, ids_NT: Tensor, texts_a_victim: int = 1) -> Texts:
    """The truth about victims who have so many of these texts each, in their order."""
    rows = [tuple(row) for row in ids_NT.tolist()]
    return Texts(
        victims=tuple(
            tuple(rows[start : start + texts_a_victim])
            for start in range(0, len(rows), texts_a_victim)
        ),
        guess=(_most_frequent(scene.corpus),) * ids_NT.shape[1],
    )


def plain_vocabulary(corpus: Corpus) -> Tensor:
    """The ids that text may hold; those reserved for canaries are not among them: (C,)."""
    reserved = corpus.tokenizer.reserved_ids
    return torch.arange(reserved.start if len(reserved) else corpus.tokenizer.vocab_size)


def _openings(corpus: Corpus, tokens: int) -> Tensor:
    private = corpus.blocks.private
    openings_NT: Tensor = torch.unique(private.ids_NT[private.length_N >= tokens, :tokens], dim=0)
    return openings_NT


def _most_frequent(corpus: Corpus) -> int:
    public = corpus.blocks.public
    return int(public.ids_NT[public.mask_NT].bincount().argmax())
