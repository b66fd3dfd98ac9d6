"""Which code was measured: a digest of its source.

A version says little between releases, and a measured tree may not be a commit. What runs is in
this package and in those that it takes its decisions from.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import moeprof


@functools.cache
def code_digest() -> str:
    """Returns the digest of all of moeprof, as it was when it was asked for first."""
    return source_digest(Path(moeprof.__file__).parent)


def source_digest(folder: Path) -> str:
    """Returns a digest of the names and contents of the Python files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
