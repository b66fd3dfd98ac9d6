"""Reads other tools' traces into the format of this project.

Each format has a module of its own; this one knows their names. Leaves out what a trace means.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moeprof.errors import MoeprofError, UsageError
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

FORMATS = ("bigmoeonedge",)
"""Each is a module of this package with a function ``convert(source, output, force=)``."""


def import_trace(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    source_format: str,
    force: bool = False,
) -> Trace:
    """Writes a foreign trace as a trace of this project and returns it.

    Args:
        source: The file to read.
        output: Where to write; beside the current folder's other files, named after the source,
            when None.
        source_format: One of `FORMATS`.
        force: Replace an existing trace.

    Raises:
        UsageError: There is no such format.
        TraceError: The file is not what its format says.
        MoeprofError: The file is missing, or the output exists.
    """
    if source_format not in FORMATS:
        raise UsageError(
            f"there is no format {source_format!r} to import", hint=f"one of {', '.join(FORMATS)}"
        )
    path = Path(source)
    if not path.is_file():
        raise MoeprofError(f"there is no file {path}")
    if output is None:
        output = path.name.split(".")[0] + schema.TRACE_SUFFIX
    module = importlib.import_module(f"moeprof.trace.{source_format}")
    trace: Trace = module.convert(path, Path(output), force=force)
    return trace
