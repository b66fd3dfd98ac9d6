"""The commit log of one rank: which Parquet parts count.

A part exists for readers once a whole line of the log names it. Leaves out how parts and lines
reach the disk (`writer`) and where they are read from (`storage`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeprof.errors import TraceError
from moeprof.trace.schema import COMMIT_LOG_PREFIX, SCHEMA_VERSION, RankInfo

OPEN, COMMIT, CLOSE = "open", "commit", "close"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One committed Parquet file.

    Attributes:
        table: Table name; ``routing/STACK`` for the routing of a stack.
        path: Path inside the trace, with forward slashes.
        num_rows: Rows.
        num_bytes: Size of the file.
        first_step: Smallest step in it; None where the table has no steps.
        last_step: Largest step in it.
    """

    table: str
    path: str
    num_rows: int
    num_bytes: int
    first_step: int | None = None
    last_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class RankLog:
    """What one rank committed.

    Attributes:
        rank: The rank.
        parts: Committed parts in the order they were committed.
        num_commits: Commit lines.
        closed: True when the rank ended its recording in good order.
        compacted: True when the parts are the result of a compaction.
        closing: Counters and notes the rank left when it closed; rank 0 leaves its own in
            `trace.json`.
        coordinates: Parallelism coordinates of the rank.
        num_bytes: Size of the log.
    """

    rank: int
    parts: tuple[Part, ...] = ()
    num_commits: int = 0
    closed: bool = False
    compacted: bool = False
    closing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    coordinates: RankInfo | None = None
    num_bytes: int = 0


def log_name(rank: int) -> str:
    """Returns the file name of the log of ``rank``."""
    return f"{COMMIT_LOG_PREFIX}-r{rank:05d}.jsonl"


def part_name(table: str, rank: int, number: int) -> str:
    """Returns the path of a part inside the trace."""
    return f"{table}/r{rank:05d}-{number:06d}.parquet"


def open_line(coordinates: RankInfo) -> str:
    """Returns the first line of a log."""
    return _line(
        kind=OPEN,
        rank=coordinates.rank,
        schema_version=SCHEMA_VERSION,
        coordinates=dataclasses.asdict(coordinates),
    )


def commit_line(parts: Sequence[Part], *, time: str, compacted: bool = False) -> str:
    """Returns the line that makes ``parts`` count."""
    first = [part.first_step for part in parts if part.first_step is not None]
    last = [part.last_step for part in parts if part.last_step is not None]
    return _line(
        kind=COMMIT,
        time=time,
        compacted=compacted,
        first_step=min(first, default=None),
        last_step=max(last, default=None),
        num_rows=sum(part.num_rows for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        parts=[dataclasses.asdict(part) for part in parts],
    )


def close_line(*, time: str, closing: Mapping[str, Any]) -> str:
    """Returns the line that says that the rank ended in good order."""
    return _line(kind=CLOSE, time=time, closing=dict(closing))


def clusters(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yields the parts of one table and rank in order of execution.

    Parts whose steps overlap come together: their rows must be sorted as one.
    """
    ordered = sorted(parts, key=lambda part: -1 if part.first_step is None else part.first_step)
    cluster: list[Part] = []
    end = -1
    for part in ordered:
        if part.first_step is None or part.last_step is None:
            yield [part]
            continue
        if cluster and part.first_step > end:
            yield cluster
            cluster = []
        cluster.append(part)
        end = max(end, part.last_step)
    if cluster:
        yield cluster


def parse_log(text: str, *, rank: int, where: str) -> RankLog:
    """Returns what the log ``text`` commits; a torn last line is ignored.

    Args:
        text: The log.
        rank: The rank its name gives.
        where: Name of the log in messages.

    Raises:
        TraceError: A line other than a torn last one is no commit record.
    """
    lines = text.split("\n")[:-1]
    log = RankLog(rank=rank, num_bytes=len(text.encode()))
    for number, line in enumerate(lines, start=1):
        try:
            log = _apply(log, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TraceError(
                f"{where}: line {number} of the commit log is damaged",
                hint="record the trace again, or delete the damaged line and all lines after it",
            ) from error
    return log


def _apply(log: RankLog, record: Mapping[str, Any]) -> RankLog:
    kind = record["kind"]
    if kind == OPEN:
        return dataclasses.replace(log, coordinates=_known(RankInfo, record["coordinates"]))
    if kind == COMMIT:
        parts = tuple(_known(Part, part) for part in record["parts"])
        return dataclasses.replace(
            log,
            parts=log.parts + parts,
            num_commits=log.num_commits + 1,
            compacted=bool(record.get("compacted", False)),
        )
    if kind == CLOSE:
        return dataclasses.replace(log, closed=True, closing=record["closing"])
    return log


def _known(cls: Any, data: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in data.items() if name in names})


def _line(**record: Any) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
