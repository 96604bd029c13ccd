"""Who sees what: public, private and test documents, and which private records train the model."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from privlm.data.blocks import TokenBlocks
from privlm.data.documents import Document, require_unique_ids
from privlm.data.errors import DataError
from protocols.randomness import Stream


@dataclass(frozen=True)
class Split:
    """Documents for the tokenizer and reference models, for private training, for testing."""

    public: tuple[Document, ...]
    private: tuple[Document, ...]
    test: tuple[Document, ...]


EQUAL_SHARES = {"public": 1.0, "private": 1.0, "test": 1.0}


def split_documents(
    documents: Sequence[Document],
    seed: int = 0,
    shares: Mapping[str, float] = EQUAL_SHARES,
    by: Literal["document", "user"] = "document",
) -> Split:
    """Divide documents among public, private and test, none in two of them.

    A hash of its id and ``seed`` alone decides where a document goes. So adding or removing a
    private document moves no other, and what is trained on the public part without protection
    says nothing of the private one. The price is that the parts are only as large as chance makes
    them. The seed is no secret: the split is public knowledge, membership is not.

    Args:
        documents: With unique ids.
        seed: Chooses among the divisions.
        shares: Relative number of documents in each part; a part left out stays empty.
        by: ``"user"`` keeps all of a user's documents in one part.

    Raises:
        DataError: If a share is unknown or not positive, ids repeat, or a part that has a share
            gets no document.
    """
    if not shares or not set(shares) <= set(EQUAL_SHARES) or min(shares.values()) <= 0:
        raise DataError(f"shares must be positive, for public, private or test; got {dict(shares)}")
    require_unique_ids(documents, "split_documents")
    parts: dict[str, list[Document]] = {part: [] for part in EQUAL_SHARES}
    for document in sorted(documents, key=lambda d: d.id):
        name = document.id if by == "document" else document.user
        parts[_draw(shares, _unit_hash(seed, name))].append(document)
    for part in shares:
        if not parts[part]:
            raise DataError(
                f"none of {len(documents)} documents fell to the {part} part; add documents, "
                f"raise {part}_share, choose another seed, or name a {part} source of its own"
            )
    return Split(*(tuple(parts[part]) for part in EQUAL_SHARES))


def _unit_hash(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"privlm split {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48


def _draw(weights: Mapping[str, float], uniform: float) -> str:
    point = uniform * sum(weights.values())
    for part in (name for name in EQUAL_SHARES if name in weights):
        point -= weights[part]
        if point < 0:
            return part
    return part


@dataclass(frozen=True)
class Duplicate:
    """Record ``dropped`` has the same tokens as record ``kept``, which stays."""

    kept: str
    dropped: str


def deduplicate(
    blocks: TokenBlocks, against: Iterable[TokenBlocks] = ()
) -> tuple[TokenBlocks, tuple[Duplicate, ...]]:
    """Drop records whose tokens repeat an earlier record of ``blocks`` or any of ``against``.

    A membership attack asks whether one record was in the training data. If its twin may be in
    while it is out, the question has no answer and the trials are not independent; and a record
    that is also public was never secret. Only exact repetitions are found, not near ones.

    Returns:
        The remaining records, and what was dropped in favour of what.

    Raises:
        DataError: If nothing remains.
    """
    seen = {key: name for other in against for key, name in _keyed(other)}
    keep: list[int] = []
    duplicates: list[Duplicate] = []
    for n, (key, name) in enumerate(_keyed(blocks)):
        if key in seen:
            duplicates.append(Duplicate(seen[key], name))
        else:
            seen[key] = name
            keep.append(n)
    if len(blocks) and not keep:
        raise DataError(
            f"all {len(blocks)} records repeat others, as {duplicates[0].dropped!r} repeats "
            f"{duplicates[0].kept!r}; add documents that differ"
        )
    return blocks.select(keep), tuple(duplicates)


def _keyed(blocks: TokenBlocks) -> list[tuple[bytes, str]]:
    tokens = zip(blocks.ids_NT.tolist(), blocks.length_N.tolist(), strict=True)
    return [
        (np.asarray(ids[:length], dtype="<i8").tobytes(), name)
        for (ids, length), name in zip(tokens, blocks.record_ids, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class BlockSplit:
    """The records of each part, and the exact duplicates that were found.

    ``duplicates`` were dropped, unless the caller asked to keep them.
    """

    public: TokenBlocks
    private: TokenBlocks
    test: TokenBlocks
    duplicates: tuple[Duplicate, ...]


def cut_split(
    split: Split, cut: Callable[[Sequence[Document]], TokenBlocks], *, keep_duplicates: bool = False
) -> BlockSplit:
    """Cut each part of ``split`` into records and drop exact duplicates.

    A record found in two parts stays in public before test before private, so that neither the
    public nor the test part depends on a private document.

    Args:
        split: From ``split_documents``.
        cut: Such as ``functools.partial(cut_blocks, tokenizer=tokenizer, context=128)``.
        keep_duplicates: Report duplicates but leave them in; membership results are then not
            independent trials.
    """
    raw_public, raw_private, raw_test = cut(split.public), cut(split.private), cut(split.test)
    public, in_public = deduplicate(raw_public)
    test, in_test = deduplicate(raw_test, [public])
    private, in_private = deduplicate(raw_private, [public, test])
    duplicates = in_public + in_private + in_test
    if keep_duplicates:
        return BlockSplit(raw_public, raw_private, raw_test, duplicates)
    return BlockSplit(public, private, test, duplicates)


def draw_membership(n: int, stream: Stream) -> npt.NDArray[np.bool_]:
    """Toss one fair coin a record: true is in the training data, false is held out.

    One-run audits (Steinke et al. 2023, theorem 5.2) bound the number of right guesses of
    *independent* coins. Drawing exactly half of the records instead ties the coins together and
    voids the bound. The mask is what the adversary guesses: keep it from training logs and from
    every attack.

    Args:
        n: Number of candidate records.
        stream: Source of the coins; never a fixed seed outside tests.

    Returns:
        bool mask of shape (n,).

    Raises:
        ValueError: If ``n`` is not positive.
    """
    if n < 1:
        raise ValueError(f"membership needs at least one candidate record, got {n}")
    return stream.bernoulli(0.5, (n,))
