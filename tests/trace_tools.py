"""Reads a trace back into writable columns, so that tests can damage it and write it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from moeprof.trace import schema as spec
from moeprof.trace.blocks import fixed_lists
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.writer import TraceWriter

Tables = dict[str, dict[str, Any]]


def read_tables(trace: Trace) -> Tables:
    """Returns every committed table as columns; per-slot columns are [rows, slots]."""
    tables: Tables = {}
    for name in sorted({part.table for log in trace.logs for part in log.parts}):
        if not name.startswith("routing/"):
            frame = trace.table(name)
            tables[name] = {column: frame[column].to_numpy(copy=True) for column in frame}
            continue
        files = [pq.read_table(Path(trace.path, part.path)) for part in trace.parts(name)]
        columns: dict[str, Any] = {}
        for column in files[0].column_names:
            parts = []
            for file in files:
                if spec.ROUTING.column(column).per_slot:
                    slots = trace.info.num_slots(name.partition("/")[2])
                    parts.append(fixed_lists(file.column(column), slots))
                else:
                    parts.append(np.array(file.column(column).to_pylist()))
            columns[column] = np.concatenate(parts)
        tables[name] = columns
    return tables


def write_tables(path: Path, info: spec.TraceInfo, tables: Tables) -> Trace:
    """Writes columns as one complete trace of rank 0."""
    info = dataclasses.replace(info, missing_ranks=())
    with TraceWriter.create(path, info, flush_interval_s=float("inf")) as writer:
        writer.append(tables)
    return open_trace(path)


def rewrite(
    trace: Trace,
    path: Path,
    damage: Callable[[Tables], Any] = lambda tables: None,
    **changes: Any,
) -> Trace:
    """Writes ``trace`` again after ``damage`` changed its tables; ``changes`` go to its info."""
    tables = read_tables(trace)
    damage(tables)
    return write_tables(path, dataclasses.replace(trace.info, **changes), tables)


def keep_rows(columns: dict[str, Any], keep: Any) -> None:
    """Drops rows of a table in place."""
    for name in columns:
        columns[name] = columns[name][keep]
