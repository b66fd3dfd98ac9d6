"""Durable file operations: private files, atomic replacement, fsync.

Leaves out what the files hold.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})


def beside(path: Path) -> Path:
    """Returns the temporary name under which ``path`` is written first."""
    return path.with_name(f".{path.name}.tmp")


def create_private(path: Path) -> None:
    """Creates an empty file that only its owner can read; an old one is emptied."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, FILE_MODE))


def sync_file(path: Path) -> None:
    """Waits until the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Waits until the directory's entries are on the disk, where the filesystem can do so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def put_in_place(path: Path) -> None:
    """Makes the file written beside ``path`` durable and gives it its name."""
    sync_file(beside(path))
    os.replace(beside(path), path)
    sync_directory(path.parent)


def write_beside(path: Path, text: str) -> None:
    """Writes what ``path`` shall become under its temporary name, durably."""
    create_private(beside(path))
    with beside(path).open("w", encoding="utf-8") as file:
        file.write(text)
    sync_file(beside(path))


def write_text(path: Path, text: str) -> None:
    """Writes ``path`` so that readers see the old or the new text, never a mixture."""
    write_beside(path, text)
    os.replace(beside(path), path)
    sync_directory(path.parent)
