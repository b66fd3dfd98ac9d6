"""Where a trace lies: a local directory, a bundled sample or any fsspec URL.

Leaves out what the files mean (`commits`, `schema`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from moeprof.errors import MissingExtraError, MoeprofError, TraceError, UsageError
from moeprof.trace import schema as spec

SAMPLE_PREFIX = "sample:"
_HINT = "a moeprof trace is a directory NAME.moeprof that `moeprof record` wrote"


@dataclass(frozen=True)
class Store:
    """The files of one trace.

    Attributes:
        path: Local directory, or URL.
        filesystem: fsspec filesystem of a URL; None for a local directory.
        root: Path of the trace inside ``filesystem``.
    """

    path: str
    filesystem: Any = None
    root: str = ""

    def read_text(self, name: str) -> str:
        """Returns the text of a file; FileNotFoundError where there is none."""
        if self.filesystem is None:
            return Path(self.path, name).read_text(encoding="utf-8")
        data: bytes = self.filesystem.cat_file(f"{self.root}/{name}")
        return data.decode("utf-8")

    def open_part(self, name: str) -> Any:
        """Returns a source that `pyarrow.parquet` reads."""
        if self.filesystem is None:
            return pa.OSFile(os.path.join(self.path, name), "rb")
        return pa.PythonFile(self.filesystem.open(f"{self.root}/{name}", "rb"), mode="r")

    def file_names(self) -> tuple[str, ...]:
        """Returns the names directly under the trace, sorted."""
        if self.filesystem is None:
            return tuple(sorted(os.listdir(self.path)))
        listed = self.filesystem.ls(self.root, detail=False)
        return tuple(sorted(name.rstrip("/").rpartition("/")[2] for name in listed))


def locate(path: str | os.PathLike[str]) -> Store:
    """Returns the store behind a path, a URL or ``sample:NAME``.

    Raises:
        TraceError: There is no directory.
        UsageError: There is no such sample.
    """
    text = os.fspath(path)
    if text.startswith(SAMPLE_PREFIX):
        return Store(str(sample_path(text.removeprefix(SAMPLE_PREFIX))))
    if "://" in text:
        return _remote(text)
    text = os.path.expanduser(text)
    if os.path.isfile(text):
        raise TraceError(f"{text} is a file, not a moeprof trace", hint=_HINT)
    if not os.path.isdir(text):
        suffixed = text.rstrip("/") + spec.TRACE_SUFFIX
        hint = f"did you mean {suffixed}?" if os.path.isdir(suffixed) else _HINT
        raise TraceError(f"{text} does not exist", hint=hint)
    return Store(text)


def sample_path(name: str) -> Path:
    """Returns the directory of a bundled sample trace.

    Raises:
        UsageError: There is no such sample.
    """
    found = {path.stem: path for path in sorted(_sample_files())}
    if name not in found:
        names = ", ".join(f"{SAMPLE_PREFIX}{each}" for each in found) or "none"
        raise UsageError(f"there is no sample trace {name!r}", hint=f"samples: {names}")
    return found[name]


def not_a_trace(path: str) -> TraceError:
    """Returns the error for a directory that holds no trace."""
    return TraceError(f"{path} is not a moeprof trace: it holds no {spec.INFO_FILE}", hint=_HINT)


def _sample_files() -> Sequence[Path]:
    package = Path(__file__).parents[1]
    folders = (package / "samples", package.parent / "traces" / "samples")
    for folder in folders:
        found = list(folder.glob(f"*{spec.TRACE_SUFFIX}"))
        if found:
            return found
    return []


def _remote(url: str) -> Store:
    try:
        import fsspec
    except ImportError:
        raise MissingExtraError("fsspec", extra="all", purpose=f"reading {url}") from None
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise MoeprofError(f"cannot read {url}: {error}", hint="check the URL") from error
    root = root.rstrip("/")
    if not filesystem.isdir(root):
        raise TraceError(f"{url} does not exist", hint=_HINT)
    return Store(url, filesystem, root)
