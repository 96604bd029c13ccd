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
    """Raise ``ValueError`` unless there are so many private texts of so many tokens, and decoys."""
    there = len(_openings(corpus, tokens))
    if there < 2 * wanted:
        raise ValueError(
            f"{wanted:,} private texts of {tokens} tokens are needed, and as many that are not "
            f"sent; the corpus gives {there:,}; "
            "ask for fewer or shorter texts, add text, or raise corpus.private_share"
        )


def require_public_text(corpus: Corpus, tokens: int) -> None:
    """Raise ``ValueError`` unless some public text has so many tokens."""
    if not bool((corpus.blocks.public.length_N >= tokens).any()):
        raise ValueError(
            f"no public text has {tokens} tokens, which the other clients of a round need; ask for "
            "shorter texts, add public text, or raise corpus.public_share"
        )


def private_texts(scene: Scene, tokens: int, count: int) -> Tensor:
    """The first tokens of so many private records, no two alike: ids_NT."""
    return _shuffled(scene, tokens)[:count]


def public_texts(scene: Scene, tokens: int, count: int) -> Tensor:
    """The first tokens of so many public records, in their order, over again if there are fewer."""
    public = scene.corpus.blocks.public
    texts_MT = public.ids_NT[public.length_N >= tokens, :tokens]
    return texts_MT[torch.arange(count) % len(texts_MT)]


def as_texts(scene: Scene, ids_NT: Tensor, texts_a_victim: int = 1) -> Texts:
    """The truth about victims who have so many of these first private texts each, in their order.

    Decoys are the private texts after them.
    """
    tokens = ids_NT.shape[1]
    decoys_NT = _shuffled(scene, tokens)[len(ids_NT) : 2 * len(ids_NT)]
    return Texts(
        victims=_grouped(ids_NT, texts_a_victim),
        decoys=_grouped(decoys_NT, texts_a_victim),
        guess=(_most_frequent(scene.corpus),) * tokens,
    )


def _grouped(ids_NT: Tensor, size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    rows = [tuple(row) for row in ids_NT.tolist()]
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


def _shuffled(scene: Scene, tokens: int) -> Tensor:
    texts_MT = _openings(scene.corpus, tokens)
    order_M = np.random.default_rng(scene.seed).permutation(len(texts_MT))
    return texts_MT[torch.from_numpy(order_M)]


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
