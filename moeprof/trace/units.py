"""Caller's columns to Arrow: checks, broadcasts and nulls, one unit at a time.

A unit is what must be committed together: usually everything known about one step. Leaves out
buffering and files (`writer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moeprof.trace import encoding
from moeprof.trace import schema as spec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Chunk:
    """One column of one unit: values, and True where they are null."""

    values: Array
    nulls: Array | None = None
    lengths: Array | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held; text counts one pointer per value."""
        extra = 0 if self.nulls is None else self.nulls.nbytes
        return self.values.nbytes + extra


@dataclass(frozen=True)
class UnitTable:
    """The rows one unit adds to one table."""

    name: str
    num_rows: int
    chunks: Mapping[str, Chunk]

    @property
    def num_bytes(self) -> int:
        """Bytes held by all columns."""
        return sum(chunk.num_bytes for chunk in self.chunks.values())


def unit_table(
    name: str, columns: Mapping[str, Any], *, info: spec.TraceInfo, rank: int
) -> UnitTable:
    """Returns ``columns`` checked and converted to the types of table ``name``.

    Args:
        name: Table name; ``routing/STACK`` for routing.
        columns: Values per column: arrays, sequences or scalars (broadcast). Nullable columns
            may be absent, and may hold None, masked values or NaN for null.
        info: Geometry of the sites.
        rank: Fills the column ``rank`` where it is absent.

    Raises:
        ValueError: An unknown table or column, a missing column, or values that do not fit.
    """
    table = _table(name, info)
    known = {column.name for column in table.columns}
    unknown = set(columns) - known
    if unknown:
        raise ValueError(f"{name} has no column {', '.join(sorted(unknown))}")
    given = {"rank": rank, **columns}
    num_rows = _num_rows(name, given)
    chunks = {}
    for column in table.columns:
        if column.name in given:
            chunks[column.name] = _chunk(name, column, given[column.name], num_rows, info)
        elif column.nullable:
            chunks[column.name] = _chunk(name, column, None, num_rows, info)
        elif column.name not in spec.OPTIONAL_ROUTING_COLUMNS:
            raise ValueError(f"{name} needs the column {column.name}")
    return UnitTable(name, num_rows, chunks)


def arrow_table(tables: Sequence[UnitTable], *, info: spec.TraceInfo) -> pa.Table:
    """Returns the rows of several units of one table as Arrow, in order of execution."""
    first = tables[0]
    schema = encoding.arrow_schema(first.name, info, list(first.chunks))
    arrays = [
        _arrow_array(field.type, [table.chunks[field.name] for table in tables]) for field in schema
    ]
    return encoding.in_execution_order(pa.Table.from_arrays(arrays, schema=schema))


def _table(name: str, info: spec.TraceInfo) -> spec.Table:
    base, _, stack = name.partition("/")
    if base not in spec.TABLES:
        raise ValueError(f"there is no table {name!r}")
    table = spec.TABLES[base]
    if table.per_stack and stack not in info.stacks:
        raise ValueError(f"{name!r} names no stack of this model: {', '.join(info.stacks)}")
    if not table.per_stack and stack:
        raise ValueError(f"table {base!r} has no stacks")
    return table


def _num_rows(name: str, columns: Mapping[str, Any]) -> int:
    lengths = {key: len(value) for key, value in columns.items() if _has_rows(value)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: columns differ in length: {lengths}")
    return next(iter(lengths.values()), 1)


def _has_rows(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return False
    return int(getattr(value, "ndim", 1)) > 0


def _chunk(
    table: str, column: spec.Column, data: Any, num_rows: int, info: spec.TraceInfo
) -> Chunk:
    where = f"{table}.{column.name}"
    if column.per_slot:
        return _slots(table, column, data, num_rows, info)
    if pa.types.is_list(column.type):
        return _lists(where, column, data)
    if pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
        return _text(where, column, data, num_rows)
    return _numbers(where, column, data, num_rows)


def _slots(
    table: str, column: spec.Column, data: Any, num_rows: int, info: spec.TraceInfo
) -> Chunk:
    stack = encoding.stack_of(table)
    num_slots = info.num_slots(stack)
    element = encoding.slot_type(column, stack, info)
    values = np.asarray(data)
    if values.ndim == 0:
        values = np.broadcast_to(values, (num_rows, num_slots))
    if values.shape != (num_rows, num_slots):
        raise ValueError(
            f"{table}.{column.name} needs the shape {(num_rows, num_slots)}, got {values.shape}"
        )
    return Chunk(_cast(f"{table}.{column.name}", values, element.to_pandas_dtype()))


def _lists(where: str, column: spec.Column, data: Any) -> Chunk:
    rows = [np.asarray(row) for row in data]
    if any(row.ndim != 1 for row in rows):
        raise ValueError(f"{where} needs one list per row")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate(rows) if rows else np.zeros(0)
    return Chunk(_cast(where, flat, column.type.value_type.to_pandas_dtype()), lengths=lengths)


def _text(where: str, column: spec.Column, data: Any, num_rows: int) -> Chunk:
    if data is None or isinstance(data, str):
        data = [data] * num_rows
    values = np.asarray(data)
    if column.name == "phase" and values.dtype.kind in "iu":
        values = np.broadcast_to(np.array(spec.PHASES, dtype=object)[values], (num_rows,))
    values = np.array(values, dtype=object)
    nulls = _is_null(values)
    if nulls.any() and not column.nullable:
        raise ValueError(f"{where} must not be null")
    return Chunk(values, nulls if nulls.any() else None)


def _numbers(where: str, column: spec.Column, data: Any, num_rows: int) -> Chunk:
    dtype = np.dtype(column.type.to_pandas_dtype())
    nulls: Array | None = None
    if data is None:
        values, nulls = np.zeros((), dtype), np.ones((), bool)
    elif isinstance(data, np.ma.MaskedArray):
        nulls = np.ma.getmaskarray(data)
        values = data.filled(0)
    else:
        values = np.asarray(data)
        if values.dtype == object:
            nulls = _is_null(values)
            values = np.where(nulls, 0, values)
            values = values.astype(np.float64 if dtype.kind == "f" else dtype)
        elif values.dtype.kind == "f" and (column.nullable or dtype.kind != "f"):
            nulls = np.isnan(values)
            values = np.where(nulls, 0, values)
    if nulls is not None and not nulls.any():
        nulls = None
    if nulls is not None and not column.nullable:
        raise ValueError(f"{where} must not be null")
    values = np.broadcast_to(_cast(where, values, dtype), (num_rows,))
    return Chunk(values, None if nulls is None else np.broadcast_to(nulls, (num_rows,)))


def _cast(where: str, values: Array, dtype: Any) -> Array:
    """Returns an own copy of ``values`` as ``dtype``; ValueError where an integer overflows."""
    target = np.dtype(dtype)
    if target.kind in "iu" and values.dtype.kind in "iuf" and values.size:
        limits = np.iinfo(target)
        if not np.can_cast(values.dtype, target) and (
            values.min() < limits.min or values.max() > limits.max
        ):
            raise ValueError(f"{where} holds values outside {target}")
    if target.kind == "f" and values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.array(values, dtype=target, order="C")
    return np.array(values, dtype=target, order="C")


def _is_null(values: Array) -> Array:
    flat = [value is None or _is_nan(value) for value in values.ravel()]
    return np.array(flat, dtype=bool).reshape(values.shape)


def _is_nan(value: Any) -> bool:
    if isinstance(value, str):
        return False
    return type(value).__name__ in ("NAType", "NaTType") or bool(value != value)  # noqa: PLR0124


def _arrow_array(arrow_type: pa.DataType, chunks: Sequence[Chunk]) -> pa.Array:
    values = np.concatenate([chunk.values for chunk in chunks])
    nulls = _joined_nulls(chunks)
    if encoding.is_fixed_list(arrow_type):
        flat = pa.array(values.reshape(-1), arrow_type.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)
    if pa.types.is_list(arrow_type):
        lengths = np.concatenate([c.lengths for c in chunks if c.lengths is not None])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = pa.array(values, arrow_type.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, type=arrow_type)
    if pa.types.is_dictionary(arrow_type):
        return pa.array(values, pa.string(), mask=nulls).dictionary_encode().cast(arrow_type)
    return pa.array(values, arrow_type, mask=nulls)


def _joined_nulls(chunks: Sequence[Chunk]) -> Array | None:
    if all(chunk.nulls is None for chunk in chunks):
        return None
    return np.concatenate(
        [
            np.zeros(len(chunk.values), bool) if chunk.nulls is None else chunk.nulls
            for chunk in chunks
        ]
    )
