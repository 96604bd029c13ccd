"""Documents: what a person wrote, with the user it belongs to, read from common file formats."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec

from privlm.data.errors import DataError

DEFAULT_CORPUS = "pydoc-topics"
MAX_LINE_BYTES = 64 * 2**20  # bounds what one malformed line can make the reader allocate


@dataclass(frozen=True)
class Document:
    """One text and its owner.

    Args:
        id: Unique within a data set; record ids are built from it ("topic#3").
        text: Unicode that UTF-8 can encode, with something other than whitespace in it.
        user: Whose document it is, for user-level protection; by default every document is its
            own user.

    Raises:
        DataError: On an empty id, or text that is empty, blank or holds lone surrogates.
    """

    id: str
    text: str = field(repr=False)
    user: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise DataError("a document has an empty id; give every document a unique id")
        if not self.text.strip():
            raise DataError(f"document {self.id!r} is empty or all whitespace; leave it out")
        for part, value in (("id", self.id), ("user", self.user), ("text", self.text)):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the {part} of document {self.id!r} has a lone surrogate at character "
                    f"{error.start}, which UTF-8 cannot encode; remove it"
                ) from None
        if not self.user:
            object.__setattr__(self, "user", self.id)


def load_documents(source: str | Path = DEFAULT_CORPUS) -> tuple[Document, ...]:
    r"""Read documents from ``source``.

    =====================  ===================================================================
    ``"pydoc-topics"``     CPython's own help topics: offline English, about 80 documents and
                           465,000 characters (the count differs a little between versions)
    ``name.txt``           one document; its id is the file's stem
    directory of ``.txt``  one document a file, in order of name
    ``name.jsonl``         one object a line: ``text``, optionally ``id`` and ``user``;
                           the default id is ``name:<line>``; blank lines are skipped
    ``name.csv``           columns ``text``, optionally ``id`` and ``user``
    Arrow directory        what ``Dataset.save_to_disk`` wrote: the same columns;
                           needs ``pip install 'privlm[hf]'``
    =====================  ===================================================================

    Files are UTF-8; a byte order mark is skipped.

    Raises:
        DataError: Naming the file, the line where there is one, and the way out: missing or empty
            source, unknown suffix, invalid UTF-8, missing column, text that is no string, blank or
            duplicate documents, a line over 64 MiB.
    """
    if source == DEFAULT_CORPUS:
        return _checked(_read_pydoc_topics(), DEFAULT_CORPUS)
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a .txt, .jsonl or .csv file, a directory, "
            f"or {DEFAULT_CORPUS!r}"
        )
    if path.is_dir():
        return _checked(_read_directory(path), str(path))
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the unknown suffix {path.suffix!r}; known are {', '.join(readers)}"
        )
    return _checked(reader(path), str(path))


def _checked(documents: Iterable[Document], source: str) -> tuple[Document, ...]:
    collected = tuple(documents)
    if not collected:
        raise DataError(f"{source} holds no documents")
    require_unique_ids(collected, source)
    return collected


def require_unique_ids(documents: Sequence[Document], source: str) -> None:
    """Raise ``DataError`` if two documents share an id."""
    first_at: dict[str, int] = {}
    for position, document in enumerate(documents, start=1):
        if document.id in first_at:
            raise DataError(
                f"{source}: documents {first_at[document.id]} and {position} share the id "
                f"{document.id!r}; make ids unique"
            )
        first_at[document.id] = position


def _read_pydoc_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield Document(topic, topics[topic])


def _read_directory(directory: Path) -> Iterator[Document]:
    if any((directory / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        from privlm.data.huggingface import read_arrow

        yield from read_arrow(directory)
        return
    paths = sorted(p for p in directory.iterdir() if p.is_file() and p.suffix.lower() == ".txt")
    if not paths:
        raise DataError(f"{directory} holds no .txt file and is no saved data set")
    for path in paths:
        yield from _read_text(path)


def _read_text(path: Path) -> Iterator[Document]:
    yield _document(str(path), path.stem, _decode(path.read_bytes(), str(path)), "")


class _Row(msgspec.Struct, frozen=True):
    text: str
    id: str | Annotated[int, msgspec.Meta(ge=0)] | None = None
    user: str | Annotated[int, msgspec.Meta(ge=0)] | None = None


def _read_jsonl(path: Path) -> Iterator[Document]:
    decoder = msgspec.json.Decoder(_Row)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where} is longer than {MAX_LINE_BYTES} bytes; split the document"
                )
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise DataError(
                    f'{where}: {error}; every line is an object like {{"text": "...", "id": "..."}}'
                ) from None
            yield _document(
                where, _name(row.id, f"{path.stem}:{number}"), row.text, _name(row.user)
            )


def _read_csv(path: Path) -> Iterator[Document]:
    text = _decode(path.read_bytes(), str(path))
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if "text" not in (reader.fieldnames or ()):
            raise DataError(
                f"{path} has no column 'text'; its first line names "
                f"{', '.join(repr(n[:20]) for n in reader.fieldnames or ()) or 'nothing'}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row["text"] is None or None in row:
                raise DataError(
                    f"{where}: {'fewer' if row['text'] is None else 'more'} fields than the "
                    f"{len(reader.fieldnames or ())} columns of line 1; quote commas in text"
                )
            name = _name(row.get("id"), f"{path.stem}:{reader.line_num}")
            yield _document(where, name, row["text"], _name(row.get("user")))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.reader.line_num}: {error}; check its quotes"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _document(where: str, name: str, text: str, user: str) -> Document:
    try:
        return Document(name, text, user)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _name(value: str | int | None, default: str = "") -> str:
    return default if value is None or value == "" else str(value)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = where if re.search(r", line \d+$", where) else f"{where}, line {line}"
        raise DataError(
            f"{place}: byte {error.start} is not valid UTF-8; convert the file to UTF-8"
        ) from None
