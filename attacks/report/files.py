"""Writes a set of files so that no half of it is ever left."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NUMBERS = itertools.count()


class ReportNotWritten(OSError):
    """Half a report, or a report beside the key of another, would mislead its reader."""


@dataclass(frozen=True)
class File:
    """A file to be: its name in the folder, all its bytes, who may read it."""

    name: str
    content: bytes = field(repr=False)
    mode: int = 0o644


def write_together(folder: Path, files: Sequence[File], gone: Sequence[str] = ()) -> None:
    """Write ``files`` into ``folder``, all of them or none; the folder is made if missing.

    Files named in ``gone`` belong to an older set and do not outlive it.

    Every file is written beside its place and synced before the first takes its place. If any
    step fails, what stood there before stands there again. A machine that stops between two
    renames leaves whole files, some of them old.

    Raises:
        ReportNotWritten: names the path and what the system said.
    """
    path = folder
    new: dict[Path, Path] = {}
    old: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = folder / file.name
            if path.is_dir():
                raise IsADirectoryError(None, "a folder stands in its place")
            new[path] = _beside(path)
            _write_synced(new[path], file)
        for path in (*new, *(folder / name for name in gone)):
            if path.exists():
                old[path] = _beside(path)
                _keep(path, old[path])
        for path, written in new.items():
            written.replace(path)
            placed.append(path)
        for path in old.keys() - new.keys():
            path.unlink()
            placed.append(path)
        _sync_folder(folder)
    except BaseException as error:
        _put_back(placed, old)
        if not isinstance(error, OSError):
            raise
        raise ReportNotWritten(
            f"{path}: {error.strerror or error}; no file of this report was written, and older "
            "ones stand as they were"
        ) from error
    finally:
        for left in (*new.values(), *old.values()):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)


def _put_back(placed: Sequence[Path], old: Mapping[Path, Path]) -> None:
    for path in placed:
        if path in old:
            old[path].replace(path)
        else:
            path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_NUMBERS)}.tmp")


def _write_synced(path: Path, file: File) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, file.mode), "wb") as stream:
        stream.write(file.content)
        stream.flush()
        os.fsync(stream.fileno())


def _keep(path: Path, copy: Path) -> None:
    """A second name for the old file; a copy where the file system knows no links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, copy, follow_symlinks=False)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
