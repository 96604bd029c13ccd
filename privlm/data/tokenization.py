"""Text to token ids and back: bytes, or byte-level BPE (Sennrich et al. 2016; Radford et al. 2019).

Special tokens are ids that no text encodes to, so a document cannot smuggle one in. They follow the
ordinary ids: first ``end_id``, then the ids reserved for canaries.

Shapes: V = vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as _Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from privlm.data.errors import DataError
from protocols.files import write_atomically


class Encoder(Protocol):
    """What making records of text asks of a tokenizer."""

    @property
    def end_id(self) -> int:
        """The token after a document's last; also fills padded positions."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""


class Tokenizer(Encoder, Protocol):
    """What the toolkit asks of a tokenizer of its own."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, end of document and reserved ones included: the width of the head."""

    @property
    def reserved_ids(self) -> range:
        """Ids that no text encodes to, kept for canary tokens."""

    @property
    def n_bytes_V(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes that each id stands for, for bits per byte; 0 for special ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; ``decode`` gives back exactly ``text``."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids vanish, bytes that are no UTF-8 become U+FFFD."""

    def reserve(self, count: int) -> Self:
        """The same tokenizer with ``count`` more ids at the end for canary tokens."""

    def save(self, path: str | Path) -> None:
        """Write JSON that ``load_tokenizer`` reads."""


class _Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    kind: Literal["byte", "bpe"]
    reserved: Annotated[int, msgspec.Meta(ge=0)] = 0
    bpe: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True)
class _ByteLevel:
    """What both tokenizers share: each ordinary id stands for a fixed byte string."""

    token_bytes: tuple[bytes, ...] = field(repr=False)
    reserved: int = 0

    @property
    def end_id(self) -> int:
        return len(self.token_bytes)

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes) + 1 + self.reserved

    @property
    def reserved_ids(self) -> range:
        return range(self.end_id + 1, self.vocab_size)

    @property
    def n_bytes_V(self) -> npt.NDArray[np.int64]:
        lengths = [len(token) for token in self.token_bytes]
        return np.array(lengths + [0] * (1 + self.reserved), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        parts = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"token id {token} lies outside the vocabulary of {self.vocab_size}"
                )
            parts.append(self.token_bytes[token] if token < self.end_id else b"")
        return b"".join(parts).decode("utf-8", errors="replace")

    def reserve(self, count: int) -> Self:
        if count < 0:
            raise DataError(f"cannot reserve {count} ids")
        return replace(self, reserved=self.reserved + count)

    def _write(self, path: str | Path, saved: _Saved) -> None:
        write_atomically(Path(path), msgspec.json.encode(saved) + b"\n", mode=0o644)


@dataclass(frozen=True)
class ByteTokenizer(_ByteLevel):
    """Ids 0 to 255 are the bytes of UTF-8. Learns nothing, so it leaks nothing."""

    token_bytes: tuple[bytes, ...] = field(
        default=tuple(bytes([value]) for value in range(256)), init=False, repr=False
    )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, one a byte."""
        return list(_utf8(text))

    def save(self, path: str | Path) -> None:
        """Write JSON that ``load_tokenizer`` reads."""
        self._write(path, _Saved("byte", self.reserved))


@dataclass(frozen=True)
class BpeTokenizer(_ByteLevel):
    """Byte-level BPE by the ``tokenizers`` library; made by ``train_bpe`` or ``load_tokenizer``."""

    library: _Library = field(kw_only=True, repr=False, compare=False)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; ``decode`` gives back exactly ``text``."""
        _utf8(text)
        return list(self.library.encode(text, add_special_tokens=False).ids)

    def save(self, path: str | Path) -> None:
        """Write JSON that ``load_tokenizer`` reads."""
        self._write(
            path, _Saved("bpe", self.reserved, msgspec.Raw(self.library.to_str().encode("utf-8")))
        )


def train_bpe(texts: Sequence[str], vocab_size: int) -> BpeTokenizer:
    """Learn a byte-level BPE tokenizer; the same texts give the same tokenizer.

    A tokenizer trained on private text is itself a release without differential privacy: its merges
    tell which strings are frequent. Train it on public text.

    Args:
        texts: Public text.
        vocab_size: At most this many ids, ``end_id`` included; fewer if the texts run out of
            pairs to merge. ``reserve`` adds to it.

    Raises:
        DataError: If there is no text, or ``vocab_size`` cannot hold 256 bytes and ``end_id``.
    """
    if isinstance(texts, str) or not any(texts):
        raise DataError("train_bpe needs a sequence of texts, at least one of them not empty")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise DataError(f"vocab_size must be at least {len(alphabet) + 1}, got {vocab_size}")
    library = _Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return _wrap(library, reserved=0)


def load_tokenizer(path: str | Path) -> ByteTokenizer | BpeTokenizer:
    """Read a tokenizer that ``save`` wrote.

    Raises:
        DataError: If the file is missing or no tokenizer of this toolkit.
    """
    try:
        saved = msgspec.json.decode(Path(path).read_bytes(), type=_Saved)
        if saved.kind == "byte":
            return ByteTokenizer(saved.reserved)
        library = _Library.from_str(bytes(saved.bpe).decode("utf-8"))
        return _wrap(library, saved.reserved)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exception for JSON it does not know
        raise DataError(f"{path} is no saved tokenizer: {error}") from error


def _wrap(library: _Library, reserved: int) -> BpeTokenizer:
    byte_of = _byte_of_symbol()
    by_id = sorted((token, symbols) for symbols, token in library.get_vocab().items())
    if [token for token, _ in by_id] != list(range(len(by_id))):
        raise DataError("the tokenizer's ids are not 0, 1, 2, ... without gaps")
    if library.get_added_tokens_decoder():
        raise DataError("the tokenizer has added tokens, which text could forge")
    try:
        token_bytes = tuple(bytes(byte_of[s] for s in symbols) for _, symbols in by_id)
    except KeyError as error:
        raise DataError(f"the tokenizer is not byte-level: symbol {error}") from None
    if not {bytes([value]) for value in range(256)} <= set(token_bytes):
        raise DataError("the tokenizer does not know every byte, so it would lose text")
    return BpeTokenizer(token_bytes, reserved, library=library)


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as is, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    return {chr(value): value for value in printable} | {
        chr(0x100 + rank): value for rank, value in enumerate(others)
    }


def symbol_of_byte(value: int) -> str:
    """The character by which byte-level vocabularies write a byte."""
    return {byte: symbol for symbol, byte in _byte_of_symbol().items()}[value]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at character {error.start}") from None
