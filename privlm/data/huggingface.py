"""The door to ``datasets``: no other module imports it."""

from collections.abc import Iterator
from pathlib import Path

from privlm.data.documents import Document
from privlm.data.errors import DataError


def read_arrow(directory: Path) -> Iterator[Document]:
    """Yield the documents of a local directory that ``Dataset.save_to_disk`` wrote.

    Columns: ``text``, optionally ``id`` and ``user``; the default id is ``<directory>:<row>``.

    Raises:
        DataError: If ``datasets`` is missing, the directory holds several splits or cannot be
            read, a column is missing, or a text is no string.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{directory} is a saved Arrow data set; to read it, pip install 'privlm[hf]'"
        ) from None
    try:
        table = datasets.load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory} cannot be read as a saved data set: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        raise DataError(
            f"{directory} holds the splits {', '.join(table)}; give the directory of one of them, "
            f"such as {directory / next(iter(table), 'train')}"
        )
    if "text" not in table.column_names:
        raise DataError(
            f"{directory} has no column 'text'; its columns are {', '.join(table.column_names)}"
        )
    for number, row in enumerate(table):
        where = f"{directory}, row {number}"
        if not isinstance(row["text"], str):
            raise DataError(f"{where}: text is {type(row['text']).__name__}, expected a string")
        name, user = row.get("id"), row.get("user")
        try:
            yield Document(
                f"{directory.name}:{number}" if name in (None, "") else str(name),
                row["text"],
                "" if user is None else str(user),
            )
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
