"""Merges the many parts of one rank into one file per table, in bounded memory.

Leaves out the commit log, whose replacement makes the merged files count (`writer`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moeprof.trace import commits, encoding, files
from moeprof.trace.commits import Part


def merge(root: Path, parts: Sequence[Part], *, rank: int, number: int) -> tuple[Part, ...]:
    """Writes one part per table that holds the rows of ``parts`` in order of execution.

    The old parts stay. A table that has one part already keeps it.

    Args:
        root: The trace.
        parts: Committed parts of one rank, in the order they were committed.
        rank: The rank.
        number: Number in the names of the new files.

    Raises:
        OSError: The disk does not take the files; those written so far are useless.
    """
    tables: dict[str, list[Part]] = {}
    for part in parts:
        tables.setdefault(part.table, []).append(part)
    return tuple(
        _merge_table(root, name, group, rank=rank, number=number) for name, group in tables.items()
    )


def _merge_table(root: Path, name: str, parts: Sequence[Part], *, rank: int, number: int) -> Part:
    if len(parts) == 1:
        return parts[0]
    target = root / commits.part_name(name, rank, number)
    schema = pq.read_schema(root / parts[0].path)
    files.create_private(files.beside(target))
    groups = _row_groups(root, parts, encoding.group_rows(schema))
    num_rows = encoding.write_file(files.beside(target), schema, groups)
    files.put_in_place(target)
    assert num_rows == sum(part.num_rows for part in parts), "compaction must keep every row"
    first = [part.first_step for part in parts if part.first_step is not None]
    last = [part.last_step for part in parts if part.last_step is not None]
    return Part(
        table=name,
        path=target.relative_to(root).as_posix(),
        num_rows=num_rows,
        num_bytes=target.stat().st_size,
        first_step=min(first, default=None),
        last_step=max(last, default=None),
    )


def _row_groups(root: Path, parts: Sequence[Part], num_rows: int) -> Iterator[pa.Table]:
    """Yields the rows in order of execution, ``num_rows`` at a time."""
    waiting: list[pa.Table] = []
    count = 0
    for table in _ordered(root, parts):
        waiting.append(table)
        count += table.num_rows
        if count < num_rows:
            continue
        joined = pa.concat_tables(waiting)
        whole = count - count % num_rows
        for start in range(0, whole, num_rows):
            yield _tidy(joined.slice(start, num_rows))
        waiting, count = [joined.slice(whole)], count - whole
    if count:
        yield _tidy(pa.concat_tables(waiting))


def _ordered(root: Path, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Yields tables in order of execution; parts whose steps overlap are sorted together."""
    for cluster in commits.clusters(parts):
        if len(cluster) == 1:
            yield from _stream(root / cluster[0].path)
        else:
            tables = [table for part in cluster for table in _stream(root / part.path)]
            yield encoding.in_execution_order(pa.concat_tables(tables).unify_dictionaries())


def _stream(path: Path) -> Iterator[pa.Table]:
    with contextlib.closing(pq.ParquetFile(path)) as file:
        for index in range(file.num_row_groups):
            yield file.read_row_group(index, use_threads=False)


def _tidy(table: pa.Table) -> pa.Table:
    return table.unify_dictionaries().combine_chunks()
