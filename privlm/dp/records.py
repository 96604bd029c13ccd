"""Where a batch's examples come from, and what one record is.

Shape suffixes: N records, U users of a batch, k examples of a user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from privlm.dp.batches import Batch, select, size
from privlm.dp.users import Contributions, ExampleLevelSampling, UserLevelSampling, Users

MASK = "user_mask"
"""The key under which a batch of users says which of its entries are examples."""


class Records(Protocol):
    """The private data: numbered records, each of which moves a sum by one bounded gradient."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def take(self, which: Tensor) -> Batch:
        """The records with these numbers as one batch, whose first dimension is the record."""
        ...


class InMemory:
    """Examples held as one tensor, or as a mapping of tensors."""

    def __init__(self, examples: Batch) -> None:
        self._examples = examples
        self._count = size(examples)

    def __len__(self) -> int:
        return self._count

    def take(self, which: Tensor) -> Batch:
        """See :class:`Records`."""
        return select(self._examples, which)


class Collated:
    """A torch ``Dataset`` with indices and length, and what makes a batch of its items.

    Args:
        dataset: ``dataset[i]`` is example i.
        collate: items -> batch; a torch or Hugging Face collator. It is never called with none.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Batch]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, which: Tensor) -> Batch:
        """See :class:`Records`; an empty batch is an empty tensor, whatever the items are."""
        if not len(which):
            return torch.empty(0)
        return _plain(self._collate([self._dataset[i] for i in which.tolist()]))


class OfContributors:
    """The examples that take part where each user contributes at most k, as records of their own.

    For example-level sampling of users (ELS).
    """

    def __init__(self, examples: Records, contributions: Contributions) -> None:
        self._examples = examples
        self._chosen = contributions.examples
        self.examples_per_user = contributions.index_Uk.shape[1]

    def __len__(self) -> int:
        return len(self._chosen)

    def take(self, which: Tensor) -> Batch:
        """See :class:`Records`."""
        return self._examples.take(self._chosen[which])


class OfUsers:
    """Users as records, each with up to k examples: batches of shape (U, k, ...).

    For :func:`per_user`, which turns a loss of examples into one of users.
    """

    def __init__(self, examples: Records, contributions: Contributions) -> None:
        self._examples = examples
        self._contributions = contributions
        self.examples_per_user = contributions.index_Uk.shape[1]

    def __len__(self) -> int:
        return len(self._contributions.users)

    def take(self, which: Tensor) -> Batch:
        """See :class:`Records`."""
        index_Uk, mask_Uk = self._contributions.of(which)
        batch = self._examples.take(index_Uk.flatten())
        named = {"examples": batch} if isinstance(batch, Tensor) else dict(batch)
        shaped = {name: value.unflatten(0, index_Uk.shape) for name, value in named.items()}
        return shaped | {MASK: mask_Uk.to(next(iter(shaped.values())).device)}


def taken(records: Records, which: Tensor) -> Batch:
    """The batch of these records, and nothing but one row for each.

    Raises:
        ValueError: a record has several rows, each of which would be clipped by itself.
    """
    batch = records.take(which)
    if size(batch) != len(which):
        raise ValueError(
            f"{len(which)} records gave a batch of {size(batch)} rows: a record is to be one row, "
            "or it moves the sum by several bounds; mend the collator"
        )
    return batch


def check_unit(records: Records, users: Users | None) -> None:
    """Refuse records that are not of the unit that a plan protects.

    Raises:
        ValueError: says which records the plan needs.
    """
    needed = {type(None): None, ExampleLevelSampling: OfContributors, UserLevelSampling: OfUsers}
    kind = needed[type(users)]
    kinds = (OfContributors, OfUsers)
    found = next((k for k in kinds if isinstance(records, k)), None)
    if found is not kind:
        wanted = "examples" if kind is None else kind.__name__
        raise ValueError(
            f"the plan protects {'examples' if users is None else 'users'} and needs records that "
            f"are {wanted}, not {type(records).__name__}"
        )
    if users is not None and records.examples_per_user > users.examples_per_user:  # type: ignore[attr-defined]
        raise ValueError(
            f"users contribute up to {records.examples_per_user} examples, "  # type: ignore[attr-defined]
            f"the plan accounts for {users.examples_per_user}"
        )


def per_user(loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of a user: the mean over his examples of ``loss``, a per-example loss."""

    def of_users(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        mask_Uk = batch[MASK]
        flat = {name: v.flatten(0, 1) for name, v in batch.items() if name != MASK}
        examples: Any = flat["examples"] if list(flat) == ["examples"] else flat
        loss_Uk = loss(model, examples).view(mask_Uk.shape)
        return loss_Uk.masked_fill(~mask_Uk, 0.0).sum(1) / mask_Uk.sum(1)

    return of_users


def _plain(batch: Any) -> Batch:
    """A collator's own mapping type as a dict; a sequence by its places."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if isinstance(batch, tuple | list) and all(isinstance(v, Tensor) for v in batch):
        return {str(place): value for place, value in enumerate(batch)}
    raise ValueError(
        f"a collator gave {type(batch).__name__}; batches are tensors, or mappings or sequences "
        "of tensors whose first dimension is the example"
    )
