"""How tables are laid out in Parquet: row groups, compression, encodings, order of rows.

Leaves out where files go (`writer`) and what they mean (`schema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moeprof.trace import schema as spec

ZSTD_LEVEL = 3
ROUTING_GROUP_SLOTS = 1 << 20
ROUTING_GROUP_ROWS = (8192, 65536)
TABLE_GROUP_ROWS = 65536

_DELTA_COLUMNS = frozenset({"step", "row", "request", "position"})


def table_of(name: str) -> spec.Table:
    """Returns the schema table behind ``name`` (``routing/decoder`` is ``routing``)."""
    return spec.TABLES[name.partition("/")[0]]


def stack_of(name: str) -> str:
    """Returns the stack in a name such as ``routing/decoder``; empty for other tables."""
    return name.partition("/")[2]


def arrow_schema(name: str, info: spec.TraceInfo, columns: Sequence[str]) -> pa.Schema:
    """Returns the Arrow schema of a table's parts.

    Args:
        name: Table name; ``routing/STACK`` for routing.
        info: Geometry of the sites.
        columns: Columns that the parts hold.
    """
    table = table_of(name)
    num_slots = info.num_slots(stack_of(name)) if table.per_stack else 0
    fields = []
    for column in table.columns:
        if column.name not in columns:
            continue
        arrow_type = column.type
        if column.per_slot:
            element = slot_type(column, stack_of(name), info)
            arrow_type = pa.list_(pa.field("element", element, nullable=False), num_slots)
        fields.append(pa.field(column.name, arrow_type, nullable=column.nullable))
    return pa.schema(fields)


def slot_type(column: spec.Column, stack: str, info: spec.TraceInfo) -> pa.DataType:
    """Returns the type of one slot of a per-slot column.

    Ids are int32 where a site has more than 32,768 experts; weights are float32 where the
    setting `weight_dtype` asks for it, and scores float16 where `score_dtype` says that they
    are no more precise.
    """
    if column.name == "expert" and info.wide_ids(stack):
        return pa.int32()
    if column.name == "weight" and info.settings.get("weight_dtype") == "float32":
        return pa.float32()
    scores = ("score", "selection_score")
    if column.name in scores and info.settings.get("score_dtype") == "float16":
        return pa.float16()
    return column.type


def group_rows(schema: pa.Schema) -> int:
    """Returns the rows of one row group."""
    widths = [field.type.list_size for field in schema if is_fixed_list(field.type)]
    if not widths:
        return TABLE_GROUP_ROWS
    smallest, largest = ROUTING_GROUP_ROWS
    return int(np.clip(ROUTING_GROUP_SLOTS // max(widths[0], 1), smallest, largest))


def is_fixed_list(arrow_type: pa.DataType) -> bool:
    """Returns True for the per-slot lists of the routing table."""
    return bool(pa.types.is_fixed_size_list(arrow_type))


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Returns the keyword arguments of `pyarrow.parquet.ParquetWriter` for ``schema``."""
    dictionary: list[str] = []
    encodings: dict[str, str] = {}
    statistics: list[str] = []
    for field in schema:
        nested = pa.types.is_list(field.type) or is_fixed_list(field.type)
        leaf = f"{field.name}.list.element" if nested else field.name
        value_type = field.type.value_type if nested else field.type
        if pa.types.is_floating(value_type):
            encodings[leaf] = "BYTE_STREAM_SPLIT"
        elif field.name in _DELTA_COLUMNS:
            encodings[leaf] = "DELTA_BINARY_PACKED"
        else:
            dictionary.append(leaf)
        if not nested or field.name == "status":
            statistics.append(leaf)
    return {
        "compression": "zstd",
        "compression_level": ZSTD_LEVEL,
        "use_dictionary": dictionary,
        "column_encoding": encodings,
        "write_statistics": statistics,
        "write_batch_size": 1 << 16,
    }


def write_file(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Writes a Parquet file and returns its rows.

    Args:
        path: An existing file; it is overwritten.
        schema: Schema of the rows.
        tables: The rows, in order.

    Raises:
        OSError: The disk does not take them.
    """
    num_rows = 0
    with pa.OSFile(str(path), "wb") as sink:
        writer = pq.ParquetWriter(sink, schema, **writer_options(schema))
        try:
            for table in tables:
                writer.write_table(table, row_group_size=group_rows(schema))
                num_rows += table.num_rows
            writer.close()
        finally:
            # Else its destructor would try again, and complain on stderr.
            writer.is_open = False
    return num_rows


def sort_keys(schema: pa.Schema) -> tuple[str, ...]:
    """Returns the columns that give the order of execution, outermost first."""
    return tuple(name for name in ("step", "row") if name in schema.names)


def in_execution_order(table: pa.Table) -> pa.Table:
    """Returns ``table`` sorted by order of execution; stable, and free when already sorted."""
    keys = sort_keys(table.schema)
    if not keys or table.num_rows == 0:
        return table
    columns = [table.column(name).to_numpy().astype(np.int64) for name in keys]
    if _is_sorted(columns):
        return table
    order = np.lexsort(columns[::-1])
    return table.take(pa.array(order))


def step_range(table: pa.Table) -> tuple[int | None, int | None]:
    """Returns the smallest and largest step; None where the table has no steps."""
    if "step" not in table.schema.names or table.num_rows == 0:
        return None, None
    bounds = pc.min_max(table.column("step"))
    return bounds["min"].as_py(), bounds["max"].as_py()


def _is_sorted(columns: Sequence[np.ndarray[Any, Any]]) -> bool:
    step = np.diff(columns[0])
    if (step < 0).any():
        return False
    if len(columns) == 1:
        return True
    return not ((step == 0) & (np.diff(columns[1]) < 0)).any()
