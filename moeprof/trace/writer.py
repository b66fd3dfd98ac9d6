"""Writes a trace: atomic units in, committed Parquet parts out.

Invariant: whatever happens at any moment (``kill -9``, a full disk, Ctrl-C), the directory is a
trace whose committed units are whole. Leaves out the conversion of columns (`units`), their
encoding (`encoding`) and the merging of parts (`compaction`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeprof.errors import MoeprofError
from moeprof.trace import commits, compaction, encoding, files, units
from moeprof.trace import schema as spec
from moeprof.trace.commits import Part
from moeprof.trace.units import UnitTable

FLUSH_INTERVAL_S = 5.0
FLUSH_BYTES = 64 << 20
JOIN_TIMEOUT_S = 60.0
_JOIN_POLL_S = 0.05


@dataclasses.dataclass
class _State:
    """What is durable and what waits; a commit replaces it as one, so Ctrl-C cannot tear it."""

    log_bytes: int
    parts: tuple[Part, ...] = ()
    pending: list[tuple[UnitTable, ...]] = dataclasses.field(default_factory=list)
    pending_bytes: int = 0
    pending_since_s: float = 0.0


class TraceWriter:
    """Writes the parts of one rank; rank 0 also writes `trace.json`.

    Use `TraceWriter.create`. All methods may be called from several threads.
    """

    def __init__(
        self,
        path: Path,
        info: spec.TraceInfo,
        *,
        rank: int,
        flush_interval_s: float,
        flush_bytes: int,
    ) -> None:
        self._path = path
        self._info = info
        self._rank = rank
        self._flush_interval_s = flush_interval_s
        self._flush_bytes = flush_bytes
        self._log_path = path / commits.log_name(rank)
        self._state = _State(log_bytes=self._log_path.stat().st_size)
        self._numbers = itertools.count()
        self._columns: dict[str, tuple[str, ...]] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._flusher: threading.Thread | None = None
        self._failure: MoeprofError | None = None
        self._next: tuple[str, _State] | None = None
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        info: spec.TraceInfo,
        *,
        rank: int = 0,
        force: bool = False,
        flush_interval_s: float = FLUSH_INTERVAL_S,
        flush_bytes: int = FLUSH_BYTES,
    ) -> TraceWriter:
        """Starts a trace (rank 0), or joins one that rank 0 started (other ranks).

        Args:
            path: Directory of the trace; by convention it ends in ``.moeprof``.
            info: What is known about the run; can be changed with `update_info`.
            rank: Rank of this process.
            force: Replace an existing trace. Nothing but a trace is ever replaced.
            flush_interval_s: Oldest age of data that is not yet committed.
            flush_bytes: Memory the data that is not yet committed may take.

        Raises:
            MoeprofError: The output exists, or cannot be written.
        """
        root = Path(path)
        info = dataclasses.replace(info, complete=False, created=info.created or _now())
        with _explained(root, "nothing was recorded yet"):
            if rank == 0:
                _start(root, info, force=force)
            else:
                _join(root, _coordinates(info, rank))
        return cls(
            root, info, rank=rank, flush_interval_s=flush_interval_s, flush_bytes=flush_bytes
        )

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None, compact=kind is None)

    @property
    def info(self) -> spec.TraceInfo:
        """What `trace.json` says."""
        return self._info

    @property
    def path(self) -> Path:
        """Directory of the trace."""
        return self._path

    @property
    def num_committed_steps(self) -> int:
        """Rows of the table `steps` that are safe on the disk."""
        return sum(part.num_rows for part in self._state.parts if part.table == "steps")

    def append(self, unit: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds one unit; it is committed whole or not at all.

        Commits by itself once the oldest waiting unit is older than the flush interval or the
        waiting units take too many bytes.

        Args:
            unit: Columns per table (``steps``, ``layers``, ``routing/decoder``, ...). Arrays,
                sequences or scalars, which are broadcast. Nullable columns may be absent and may
                hold None, masked values or NaN for null; ``rank`` may be absent.

        Raises:
            MoeprofError: An earlier unit, or this one, could not be written. The unit stays in
                memory; a later `commit` tries again.
            ValueError: The unit does not fit the schema.
        """
        tables = tuple(
            units.unit_table(name, columns, info=self._info, rank=self._rank)
            for name, columns in unit.items()
        )
        tables = tuple(table for table in tables if table.num_rows)
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._path} is closed")
            self._check_columns(tables)
            self._enqueue(tables)
            self._raise_failure()
            if self._is_due():
                self._commit()

    def commit(self) -> None:
        """Makes everything appended so far durable.

        Raises:
            MoeprofError: It could not be written; nothing committed before is lost.
        """
        with self._lock:
            self._failure = None
            self._commit()

    def update_info(self, **changes: Any) -> None:
        """Replaces fields of `info`; rank 0 rewrites `trace.json`.

        Raises:
            MoeprofError: The file could not be written; the old one stands.
        """
        with self._lock:
            info = dataclasses.replace(self._info, **changes)
            if self._rank == 0:
                with _explained(self._path, self._safe()):
                    _write_info(self._path, info)
            self._info = info

    def close(self, *, complete: bool = True, compact: bool = True) -> None:
        """Commits the rest, merges the parts and ends the trace; a second call does nothing.

        Args:
            complete: False where the recording did not end in good order.
            compact: Merge the parts into one file per table.

        Raises:
            MoeprofError: Something could not be written; nothing committed before is lost. Where
                only the merging failed the trace is complete; else calling again tries again.
        """
        self._stop_flusher()
        with self._lock:
            if self._closed:
                return
            self._failure = None
            self._commit()
            problem = self._compact(complete=complete) if compact else None
            with _explained(self._path, self._safe()):
                if complete and (problem is not None or not compact):
                    self._append_log(self._close_line())
                if self._rank == 0:
                    info = dataclasses.replace(self._info, complete=complete)
                    _write_info(self._path, info)
                    self._info = info
            if not compact:
                self._sweep()
            self._closed = True
            if problem is not None:
                raise problem

    def _check_columns(self, tables: Sequence[UnitTable]) -> None:
        for table in tables:
            columns = tuple(table.chunks)
            if self._columns.setdefault(table.name, columns) != columns:
                raise ValueError(
                    f"{table.name} was started with the columns {self._columns[table.name]}"
                )

    def _enqueue(self, tables: tuple[UnitTable, ...]) -> None:
        if not tables:
            return
        state = self._state
        if not state.pending:
            state.pending_since_s = time.monotonic()
            self._start_flusher()
            self._changed.notify_all()
        state.pending_bytes += sum(table.num_bytes for table in tables)
        state.pending.append(tables)

    def _is_due(self) -> bool:
        state = self._state
        if not state.pending:
            return False
        age_s = time.monotonic() - state.pending_since_s
        return state.pending_bytes >= self._flush_bytes or age_s >= self._flush_interval_s

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _start_flusher(self) -> None:
        if self._flusher is None and self._flush_interval_s != float("inf"):
            self._flusher = threading.Thread(
                target=self._flush_when_due, name="moeprof-flush", daemon=True
            )
            self._flusher.start()

    def _stop_flusher(self) -> None:
        """Ends the thread that commits old units; call without holding the lock."""
        with self._lock:
            flusher, self._flusher = self._flusher, None
            self._changed.notify_all()
        if flusher is not None:
            flusher.join()

    def _flush_when_due(self) -> None:
        me = threading.current_thread()
        with self._lock:
            while self._flusher is me:
                if self._is_due():
                    try:
                        self._commit()
                    except MoeprofError as error:
                        self._failure = error
                        self._flusher = None
                        return
                waiting = self._state.pending
                deadline_s = self._state.pending_since_s + self._flush_interval_s
                self._changed.wait(deadline_s - time.monotonic() if waiting else None)

    def _commit(self) -> None:
        self._settle()
        state = self._state
        if not state.pending:
            return
        with _explained(self._path, self._safe()):
            parts = self._write_parts(state.pending, next(self._numbers))
            try:
                log_bytes = self._append_log(commits.commit_line(parts, time=_now()))
            except OSError:
                self._truncate_log()
                _discard([self._path / part.path for part in parts])
                raise
            self._state = _State(log_bytes=log_bytes, parts=state.parts + parts)

    def _write_parts(self, pending: Sequence[Sequence[UnitTable]], number: int) -> tuple[Part, ...]:
        grouped: dict[str, list[UnitTable]] = {}
        for unit in pending:
            for table in unit:
                grouped.setdefault(table.name, []).append(table)
        written: list[Path] = []
        parts = []
        try:
            for name, tables in grouped.items():
                path = self._path / commits.part_name(name, self._rank, number)
                written.append(path)
                parts.append(self._write_part(name, path, tables))
        except OSError:
            _discard(written)
            raise
        return tuple(parts)

    def _write_part(self, name: str, path: Path, tables: Sequence[UnitTable]) -> Part:
        table = units.arrow_table(tables, info=self._info)
        _make_table_directory(path.parent, self._path)
        files.create_private(files.beside(path))
        encoding.write_file(files.beside(path), table.schema, [table])
        files.put_in_place(path)
        first, last = encoding.step_range(table)
        return Part(
            table=name,
            path=path.relative_to(self._path).as_posix(),
            num_rows=table.num_rows,
            num_bytes=path.stat().st_size,
            first_step=first,
            last_step=last,
        )

    def _append_log(self, line: str) -> int:
        """Appends a line and returns the size of the log after it."""
        data = line.encode()
        self._truncate_log()
        with self._log_path.open("r+b") as log:
            log.seek(self._state.log_bytes)
            log.write(data)
            log.flush()
            os.fsync(log.fileno())
        return self._state.log_bytes + len(data)

    def _truncate_log(self) -> None:
        """Drops what an interrupted commit may have left behind the last whole line."""
        if self._log_path.stat().st_size > self._state.log_bytes:
            os.truncate(self._log_path, self._state.log_bytes)

    def _compact(self, *, complete: bool) -> MoeprofError | None:
        """Merges the parts; returns the problem where the disk does not allow it."""
        number = next(self._numbers)
        try:
            parts = compaction.merge(self._path, self._state.parts, rank=self._rank, number=number)
            text = commits.open_line(_coordinates(self._info, self._rank))
            if parts:
                text += commits.commit_line(parts, time=_now(), compacted=True)
            if complete:
                text += self._close_line()
            files.write_beside(self._log_path, text)
            self._next = (text, _State(log_bytes=len(text.encode()), parts=parts))
            os.replace(files.beside(self._log_path), self._log_path)
            self._settle()
            files.sync_directory(self._path)
        except OSError as error:
            if not self._settle():
                self._sweep()
            return _explain(error, self._path, f"{self._safe()}; they were not compacted")
        self._sweep()
        return None

    def _settle(self) -> bool:
        """Finds out whether an interrupted switch to a new log took place; True where it may have.

        The old log's parts stay until the switch is durable.
        """
        if self._next is None:
            return False
        text, state = self._next
        try:
            switched = self._log_path.read_text(encoding="utf-8") == text
        except OSError:
            return True
        if switched:
            self._state = state
        self._next = None
        return switched

    def _close_line(self) -> str:
        closing: dict[str, Any] = {}
        if self._rank:
            closing = {
                "capture": dataclasses.asdict(self._info.capture),
                "notes": list(self._info.notes),
            }
        return commits.close_line(time=_now(), closing=closing)

    def _sweep(self) -> None:
        """Deletes this rank's files that no line of the log names."""
        kept = {self._path / part.path for part in self._state.parts}
        name = f"r{self._rank:05d}-"
        for table in spec.TABLES:
            for path in (self._path / table).rglob("*"):
                if path.name.lstrip(".").startswith(name) and path not in kept:
                    with contextlib.suppress(OSError):
                        path.unlink()
        with contextlib.suppress(OSError):
            files.beside(self._log_path).unlink(missing_ok=True)

    def _safe(self) -> str:
        return f"{self.num_committed_steps} committed steps are safe in {self._path}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _coordinates(info: spec.TraceInfo, rank: int) -> spec.RankInfo:
    found = (entry for entry in info.ranks if entry.rank == rank)
    return next(found, spec.RankInfo(rank=rank, world_size=max(1, rank + 1)))


def _write_info(root: Path, info: spec.TraceInfo) -> None:
    text = json.dumps(info.to_json(), indent=2, allow_nan=False)
    files.write_text(root / spec.INFO_FILE, text + "\n")


def _make_table_directory(path: Path, root: Path) -> None:
    """Creates a table's folder, private and durable."""
    if path.is_dir() or path == root:
        return
    _make_table_directory(path.parent, root)
    path.mkdir(mode=files.DIRECTORY_MODE, exist_ok=True)
    files.sync_directory(path.parent)


def _discard(paths: Sequence[Path]) -> None:
    for path in paths:
        for victim in (path, files.beside(path)):
            with contextlib.suppress(OSError):
                victim.unlink(missing_ok=True)


def _start(root: Path, info: spec.TraceInfo, *, force: bool) -> None:
    """Puts a whole, empty trace at ``root`` in one rename."""
    exists = root.exists() or root.is_symlink()
    if exists and not force:
        raise MoeprofError(
            f"{root} exists", hint="choose another name (-o), or replace it with --force"
        )
    if exists:
        _check_replaceable(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    staging = root.with_name(f".{root.name}.{os.getpid()}.new")
    discarded = root.with_name(f".{root.name}.{os.getpid()}.old")
    for leftover in (staging, discarded):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        staging.mkdir(mode=files.DIRECTORY_MODE)
        _write_info(staging, info)
        files.write_text(staging / commits.log_name(0), commits.open_line(_coordinates(info, 0)))
        if exists:
            root.rename(discarded)
        staging.rename(root)
        files.sync_directory(root.parent)
    except OSError:
        moved = not staging.exists()
        shutil.rmtree(root if moved else staging, ignore_errors=True)
        if discarded.exists() and not root.exists():
            discarded.rename(root)
        raise
    shutil.rmtree(discarded, ignore_errors=True)


def _check_replaceable(root: Path) -> None:
    """Refuses to replace anything but a trace that holds nothing but a trace's files."""
    hint = "choose another name (-o); only a moeprof trace is ever replaced"
    if root.is_symlink() or not root.is_dir() or not _looks_like_info(root / spec.INFO_FILE):
        raise MoeprofError(f"{root} exists and is not a moeprof trace", hint=hint)
    foreign = [path for path in root.rglob("*") if path.is_file() and not _is_own(path, root)]
    if foreign:
        name = foreign[0].relative_to(root)
        raise MoeprofError(f"{root} holds a file that is not part of a trace: {name}", hint=hint)


def _looks_like_info(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and {"schema_version", "model", "sites"} <= set(data)


def _is_own(path: Path, root: Path) -> bool:
    inside = path.relative_to(root)
    name = inside.name.lstrip(".").removesuffix(".tmp")
    if len(inside.parts) == 1:
        return name == spec.INFO_FILE or name.startswith(f"{spec.COMMIT_LOG_PREFIX}-r")
    return inside.parts[0] in spec.TABLES and name.endswith(".parquet")


def _join(root: Path, coordinates: spec.RankInfo) -> None:
    """Waits until rank 0 has started the trace, then adds the log of this rank."""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while not (root / spec.INFO_FILE).exists():
        if time.monotonic() > deadline_s:
            raise MoeprofError(
                f"rank {coordinates.rank} waited {JOIN_TIMEOUT_S:.0f} s for rank 0 to start {root}",
                hint="all ranks must record to one directory that they share",
            )
        time.sleep(_JOIN_POLL_S)
    log = root / commits.log_name(coordinates.rank)
    if log.exists():
        raise MoeprofError(
            f"{root} already holds rank {coordinates.rank}",
            hint="let rank 0 start a new trace before the other ranks join it",
        )
    files.write_text(log, commits.open_line(coordinates))


@contextlib.contextmanager
def _explained(root: Path, safe: str) -> Iterator[None]:
    """Turns a failed file operation into one line that says what is safe."""
    try:
        yield
    except OSError as error:
        raise _explain(error, root, safe) from error


def _explain(error: OSError, root: Path, safe: str) -> MoeprofError:
    if error.errno in files.DISK_FULL:
        return MoeprofError(
            f"the disk is full: {safe}",
            hint="free some space, or record to another disk with -o",
        )
    reason = error.strerror or str(error)
    return MoeprofError(
        f"cannot write {root} ({reason}): {safe}", hint="check the path and its permissions"
    )
