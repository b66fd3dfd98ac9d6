"""JSON files that replace others only when asked to, and never half."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprof.errors import MoeprofError


def write_json(
    content: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes a file beside its place, then renames it.

    Args:
        content: What JSON can hold.
        path: Where to.
        force: Replace an existing file.

    Raises:
        MoeprofError: The file exists.
    """
    target = Path(path)
    if target.exists() and not force:
        raise MoeprofError(f"{target} exists", hint="choose another name, or replace it: --force")
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target
