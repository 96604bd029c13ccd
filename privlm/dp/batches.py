"""Batches: one tensor, or a mapping of tensors, whose first dimension is the example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = Tensor | Mapping[str, Tensor]


def size(batch: Batch) -> int:
    """Number of examples.

    Raises:
        ValueError: the tensors of a mapping disagree about it, or there are none.
    """
    if isinstance(batch, Tensor):
        return len(batch)
    sizes = {name: len(value) for name, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"every tensor of a batch needs one row an example, got {sizes}")
    return next(iter(sizes.values()))


def select(batch: Batch, which: Tensor) -> Batch:
    """The examples at these indices."""
    if isinstance(batch, Tensor):
        return batch[which.to(batch.device)]
    return {name: value[which.to(value.device)] for name, value in batch.items()}


def part(batch: Batch, start: int, examples: int) -> Batch:
    """At most so many examples from ``start`` on; a view, no copy."""
    rows = slice(start, start + examples)
    if isinstance(batch, Tensor):
        return batch[rows]
    return {name: value[rows] for name, value in batch.items()}


def split(batch: Batch, examples: int) -> Iterator[Batch]:
    """Parts of at most so many examples, in order; views, no copies."""
    for start in range(0, size(batch), examples):
        yield part(batch, start, examples)


def cycle(batch: Batch, examples: int) -> Batch:
    """The first ``examples`` ones, beginning anew where there are not as many."""
    return select(batch, torch.arange(examples) % size(batch))
