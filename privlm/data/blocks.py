"""Token blocks: the records that training samples and that attacks judge.

Shapes: N = records, T = tokens of context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from privlm.data.documents import Document, require_unique_ids
from privlm.data.errors import DataError
from privlm.data.examples import Examples, Which, chosen
from privlm.data.tokenization import Encoder

IGNORE_INDEX = -100  # what torch and transformers skip in a loss


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """N records of T tokens.

    The loss convention: position t is a target, predicted from the tokens before it, where
    ``mask_NT[:, t]`` is true; position 0 has nothing before it and is never a target. Padding
    stands on the right, so under causal attention no real token sees it.

    Args:
        ids_NT: int64 token ids.
        mask_NT: bool, true at targets, false at padding.
        record_ids: One stable, unique name a record, such as ``"topic#3"``.
        documents: Name of each record's document.
        users: Name of each record's user.

    Raises:
        DataError: If shapes or types disagree, a record id repeats, or a record has no target.
    """

    ids_NT: Tensor = field(repr=False)
    mask_NT: Tensor = field(repr=False)
    record_ids: tuple[str, ...] = field(repr=False)
    documents: tuple[str, ...] = field(repr=False)
    users: tuple[str, ...] = field(repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.ids_NT.shape)
        if self.ids_NT.dtype != torch.int64 or self.mask_NT.dtype != torch.bool:
            raise DataError(
                f"ids must be int64 and mask bool, got {self.ids_NT.dtype}, {self.mask_NT.dtype}"
            )
        if len(shape) != 2 or self.mask_NT.shape != self.ids_NT.shape:
            raise DataError(
                f"ids and mask must share a shape (N, T), got {shape} and "
                f"{tuple(self.mask_NT.shape)}"
            )
        for name in ("record_ids", "documents", "users"):
            if len(getattr(self, name)) != shape[0]:
                raise DataError(f"{shape[0]} records but {len(getattr(self, name))} {name}")
        if len(set(self.record_ids)) != shape[0]:
            raise DataError("record ids repeat; every record needs its own")
        without_target = (~self.mask_NT[:, 1:].any(dim=1)).nonzero().flatten().tolist()
        if without_target:
            raise DataError(f"record {self.record_ids[without_target[0]]!r} has no target token")

    def __len__(self) -> int:
        return len(self.record_ids)

    @property
    def context(self) -> int:
        """T, tokens a record."""
        return self.ids_NT.shape[1]

    @property
    def length_N(self) -> Tensor:
        """Tokens before the padding: one past the last target."""
        position_T = torch.arange(1, self.context + 1, device=self.ids_NT.device)
        return (self.mask_NT * position_T).amax(dim=1)

    @property
    def labels_NT(self) -> Tensor:
        """Ids with ``IGNORE_INDEX`` where there is no target; unshifted, as transformers wants."""
        return self.ids_NT.masked_fill(~self.mask_NT, IGNORE_INDEX)

    @property
    def document_N(self) -> Tensor:
        """Index of each record's document, in order of first appearance."""
        return _first_seen_index(self.documents)

    @property
    def user_N(self) -> Tensor:
        """Index of each record's user, in order of first appearance."""
        return _first_seen_index(self.users)

    def as_examples(self) -> Examples:
        """The same records as ``input_ids``, ``attention_mask`` and ``labels``, all (N, T)."""
        position_T = torch.arange(self.context, device=self.ids_NT.device)
        tensors = {
            "input_ids": self.ids_NT,
            "attention_mask": (position_T < self.length_N[:, None]).long(),
            "labels": self.labels_NT,
        }
        return Examples(tensors, self.record_ids, self.users)

    def select(self, which: Which) -> "TokenBlocks":
        """The records at these indices, or where this mask of N is true."""
        index = chosen(which, len(self))
        return TokenBlocks(
            self.ids_NT[index],
            self.mask_NT[index],
            tuple(self.record_ids[i] for i in index),
            tuple(self.documents[i] for i in index),
            tuple(self.users[i] for i in index),
        )


def concatenate(*parts: TokenBlocks) -> TokenBlocks:
    """One data set of all records of ``parts``, which share a context length."""
    if len({part.context for part in parts}) != 1:
        raise DataError(f"contexts differ or are none: {[part.context for part in parts]}")
    return TokenBlocks(
        torch.cat([part.ids_NT for part in parts]),
        torch.cat([part.mask_NT for part in parts]),
        tuple(name for part in parts for name in part.record_ids),
        tuple(name for part in parts for name in part.documents),
        tuple(name for part in parts for name in part.users),
    )


def cut_blocks(
    documents: Sequence[Document],
    tokenizer: Encoder,
    context: int,
    *,
    unit: Literal["block", "document"] = "block",
    truncate: bool = False,
    min_tail: int = 16,
) -> TokenBlocks:
    """Cut documents into records of ``context`` tokens.

    Each document's tokens, followed by ``end_id``, are cut apart; no record mixes documents.
    With ``unit="block"`` every piece is a record, and protection of one record is protection of
    one piece, not of a document. With ``unit="document"`` a document is one record.

    Args:
        documents: With unique ids.
        tokenizer: Trained on public text.
        context: T, at least 2.
        unit: What a record is.
        truncate: With ``unit="document"``, keep the first ``context`` tokens of longer documents.
        min_tail: A document's last piece is dropped if shorter than this (never its only piece).

    Raises:
        DataError: If there are no documents, ids repeat, ``context`` or ``min_tail`` is out of
            range, ``unit`` is unknown, or a document is longer than ``context`` under
            ``unit="document"`` without ``truncate``.
    """
    if context < 2:
        raise DataError(f"context must be at least 2 tokens, got {context}")
    if not documents:
        raise DataError("there are no documents to cut into records")
    if unit not in ("block", "document"):
        raise DataError(f"unit must be 'block' or 'document', got {unit!r}")
    require_unique_ids(documents, "cut_blocks")
    pieces: list[tuple[list[int], str, Document]] = []
    for document in documents:
        ids = [*tokenizer.encode(document.text), tokenizer.end_id]
        if unit == "document":
            if len(ids) > context and not truncate:
                raise DataError(
                    f"document {document.id!r} has {len(ids)} tokens, the context holds {context}; "
                    "use unit: block, a longer context, or truncate"
                )
            pieces.append((ids[:context], document.id, document))
            continue
        for number, start in enumerate(range(0, len(ids), context)):
            piece = ids[start : start + context]
            if number == 0 or len(piece) >= max(2, min(min_tail, context)):
                pieces.append((piece, f"{document.id}#{number}", document))
    ids_NT = torch.full((len(pieces), context), tokenizer.end_id, dtype=torch.int64)
    mask_NT = torch.zeros((len(pieces), context), dtype=torch.bool)
    for n, (piece, _, _) in enumerate(pieces):
        ids_NT[n, : len(piece)] = torch.tensor(piece)
        mask_NT[n, : len(piece)] = True
    return TokenBlocks(
        ids_NT,
        mask_NT,
        tuple(name for _, name, _ in pieces),
        tuple(document.id for _, _, document in pieces),
        tuple(document.user for _, _, document in pieces),
    )


def fingerprint(blocks: TokenBlocks) -> str:
    """:meth:`Examples.fingerprint` of the records: one data set has one name in the ledger."""
    return blocks.as_examples().fingerprint()


def _first_seen_index(names: tuple[str, ...]) -> Tensor:
    index: dict[str, int] = {}
    return torch.tensor([index.setdefault(name, len(index)) for name in names], dtype=torch.int64)
