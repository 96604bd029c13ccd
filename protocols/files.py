"""Files that are replaced whole or not at all, and folders that one process uses at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path


class DirectoryInUse(OSError):
    """Two processes writing into one folder would mix their files."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``, on disk before this returns.

    A reader, and whoever looks after a crash, sees the old file or the new one.
    Whatever goes wrong (a full disk, say), the old file stays and no other is left;
    a process killed meanwhile leaves a file that :func:`is_leftover` recognises.

    Args:
        path: the file; its folder exists.
        data: everything it shall hold.
        mode: permission bits of a new file; by default its owner's alone.

    Raises:
        OSError: with the reason of the system, and ``path`` as its filename.
    """
    # A name of this call alone: another thread, or a process of the same number in another
    # container, must not put its half of a file in the place of ours.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{time.time_ns()}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is what a killed :func:`write_atomically` left, or one at work now."""
    return re.fullmatch(r"\..+\.\d+\.new", path.name) is not None


def sync_directory(directory: Path) -> None:
    """See a folder's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold a folder for one process; the lock ends with the context or the process.

    Raises:
        DirectoryInUse: another process, or another context of this one, holds it.
        OSError: no folder, or one that cannot be locked.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirectoryInUse(error.errno, "in use by another process", str(directory)) from None
        yield
    finally:
        os.close(descriptor)
