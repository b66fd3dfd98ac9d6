"""What the command lines of the replay analyses share: arguments, files named, errors in a line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from moeprof.errors import MoeprofError
from moeprof.reporting.replays import absence_of
from moeprof.trace.reader import Trace, open_trace

DEFAULT_TRACES = ("sample:lm", "sample:mt")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Returns a parser of ``[TRACE...] [-o OUT]``.

    Args:
        name: Of the module in `analysis`.
        description: Its docstring; the first paragraph is shown.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m analysis.{name}",
        description=(description or "").split("\n\n", maxsplit=1)[0],
    )
    made.add_argument("traces", nargs="*", default=list(DEFAULT_TRACES), metavar="TRACE")
    made.add_argument("-o", "--output", type=Path, default=Path("demo", name), metavar="OUT")
    return made


def opened(path: str, name: str) -> Trace:
    """Returns a trace to which an analysis applies.

    Args:
        path: The trace.
        name: Of the analysis.

    Raises:
        MoeprofError: It does not apply, or there is no such trace.
    """
    trace = open_trace(path)
    absence = absence_of(trace, name)
    if absence:
        raise MoeprofError(f"{path}: {absence.removesuffix('.')}", hint="leave this trace out")
    return trace


def run(write: Callable[[], tuple[Path, ...]]) -> int:
    """Writes files, names them on stdout and returns the exit code."""
    try:
        written = write()
    except MoeprofError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for path in written:
        print(path)
    return 0
