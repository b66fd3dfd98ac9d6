"""Which code was measured: a digest of its source.

A version says little between releases, and a measured tree may not be a commit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def live_digest() -> str:
    """Returns the digest of this package, which runs what is measured."""
    return source_digest(Path(__file__).parent)


def source_digest(folder: Path) -> str:
    """Returns a digest of the names and contents of the Python files below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
