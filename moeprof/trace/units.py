"""Caller's columns to Arrow: checks, broadcasts and nulls, one unit at a time.

A unit is what must be committed together: usually everything known about one step. Leaves out
buffering and files (`writer`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moeprof.trace import encoding
from moeprof.trace import schema as spec

Array = np.ndarray[Any, Any]

_NONE = np.array(None, dtype=object)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one unit.

    Attributes:
        values: One value per row, or a single one for all rows.
        nulls: True where a value is null; None where none is.
        lengths: Values per row of a list column, whose ``values`` are flat.
    """

    values: Array
    nulls: Array | None = None
    lengths: Array | None = None


@dataclass(frozen=True, slots=True)
class UnitTable:
    """The rows one unit adds to one table."""

    name: str
    num_rows: int
    chunks: Mapping[str, Chunk]

    @property
    def num_bytes(self) -> int:
        """Bytes held by all columns; text counts one pointer per value."""
        return sum(chunk.values.nbytes for chunk in self.chunks.values())


@dataclass(frozen=True, slots=True)
class _Column:
    """How the values of one column are converted."""

    name: str
    kind: str
    dtype: Any
    nullable: bool
    optional: bool
    absent: Chunk


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
    known = _columns(table.name)
    if not columns.keys() <= known.keys():
        unknown = sorted(set(columns) - set(known))
        raise ValueError(f"{name} has no column {', '.join(unknown)}")
    given = columns if "rank" in columns else {"rank": rank, **columns}
    num_rows = _num_rows(name, given)
    chunks = {}
    for column in known.values():
        data = given.get(column.name)
        if data is None and column.nullable:
            chunks[column.name] = column.absent
        elif column.name in given:
            chunks[column.name] = _chunk(name, column, data, num_rows, info)
        elif not column.optional:
            raise ValueError(f"{name} needs the column {column.name}")
    return UnitTable(name, num_rows, chunks)


def arrow_table(tables: Sequence[UnitTable], *, info: spec.TraceInfo) -> pa.Table:
    """Returns the rows of several units of one table as Arrow, in order of execution."""
    first = tables[0]
    schema = encoding.arrow_schema(first.name, info, list(first.chunks))
    counts = [table.num_rows for table in tables]
    arrays = [
        _arrow_array(field.type, [table.chunks[field.name] for table in tables], counts)
        for field in schema
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


@functools.cache
def _columns(table: str) -> dict[str, _Column]:
    """Returns how the columns of a table are converted, in stored order."""
    columns = {}
    for column in spec.TABLES[table].columns:
        if column.per_slot:
            kind, dtype = "slots", None
        elif pa.types.is_list(column.type):
            kind, dtype = "list", np.dtype(column.type.value_type.to_pandas_dtype())
        elif pa.types.is_dictionary(column.type) or pa.types.is_string(column.type):
            kind, dtype = "text", np.dtype(object)
        else:
            kind, dtype = "number", np.dtype(column.type.to_pandas_dtype())
        columns[column.name] = _Column(
            name=column.name,
            kind=kind,
            dtype=dtype,
            nullable=column.nullable,
            optional=column.nullable or column.name in spec.OPTIONAL_ROUTING_COLUMNS,
            absent=Chunk(np.zeros(1, dtype), np.ones(1, bool)),
        )
    return columns


def _num_rows(name: str, columns: Mapping[str, Any]) -> int:
    """Returns the common length of the columns that have one; 1 where none has."""
    num_rows = -1
    for value in columns.values():
        length = _length(value)
        if length < 0 or length == num_rows:
            continue
        if num_rows >= 0:
            lengths = {key: _length(each) for key, each in columns.items() if _length(each) >= 0}
            raise ValueError(f"{name}: columns differ in length: {lengths}")
        num_rows = length
    return 1 if num_rows < 0 else num_rows


def _length(value: Any) -> int:
    """Returns the number of rows of a column, -1 for a scalar."""
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else -1
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        return -1
    return len(value) if getattr(value, "ndim", 1) else -1


def _chunk(name: str, column: _Column, data: Any, num_rows: int, info: spec.TraceInfo) -> Chunk:
    where = f"{name}.{column.name}"
    if column.kind == "slots":
        return _slots(name, column, data, num_rows, info)
    if column.kind == "list":
        return _lists(where, column, data)
    if column.kind == "text":
        return _text(where, column, data)
    return _numbers(where, column, data)


def _slots(name: str, column: _Column, data: Any, num_rows: int, info: spec.TraceInfo) -> Chunk:
    stack = encoding.stack_of(name)
    num_slots = info.num_slots(stack)
    where = f"{name}.{column.name}"
    element = encoding.slot_type(spec.ROUTING.column(column.name), stack, info)
    values = np.asarray(data)
    if values.ndim == 0:
        values = np.full((1, num_slots), values)
    elif values.shape != (num_rows, num_slots):
        raise ValueError(f"{where} needs the shape {(num_rows, num_slots)}, got {values.shape}")
    return Chunk(_cast(where, values, np.dtype(element.to_pandas_dtype())))


def _lists(where: str, column: _Column, data: Any) -> Chunk:
    rows = [np.asarray(row) for row in data]
    if any(row.ndim != 1 for row in rows):
        raise ValueError(f"{where} needs one list per row")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Chunk(_cast(where, np.concatenate(rows), column.dtype), lengths=lengths)


def _text(where: str, column: _Column, data: Any) -> Chunk:
    values = np.asarray(data)
    if column.name == "phase" and values.dtype.kind in "iu":
        values = np.array(spec.PHASES, dtype=object)[values]
    values = np.array(values, dtype=object, ndmin=1)
    if not column.nullable and np.equal(values, _NONE).any():
        raise ValueError(f"{where} must not be null")
    return Chunk(values)


def _numbers(where: str, column: _Column, data: Any) -> Chunk:
    nulls: Array | None = None
    if isinstance(data, np.ma.MaskedArray):
        nulls = np.ma.getmaskarray(data)
        values = data.filled(0)
    else:
        values = np.asarray(data)
    if values.dtype == object:
        nulls = _is_null(values)
        values = np.where(nulls, 0, values).astype(column.dtype)
    elif values.dtype.kind == "f" and (column.nullable or column.dtype.kind != "f"):
        absent = np.isnan(values)
        if absent.any():
            nulls = absent if nulls is None else nulls | absent
            values = np.where(absent, 0, values)
    if nulls is not None and not nulls.any():
        nulls = None
    if nulls is not None and not column.nullable:
        raise ValueError(f"{where} must not be null")
    values = _cast(where, values, column.dtype)
    if values.ndim == 0:
        return Chunk(values.reshape(1), None if nulls is None else nulls.reshape(1))
    return Chunk(values, nulls)


def _cast(where: str, values: Array, dtype: Any) -> Array:
    """Returns an own copy of ``values`` as ``dtype``; ValueError where an integer does not fit."""
    if values.dtype == dtype:
        return values.copy()
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            converted = values.astype(dtype)
    else:
        converted = values.astype(dtype)
    if dtype.kind in "iu" and values.dtype.kind in "iuf" and (converted != values).any():
        raise ValueError(f"{where} holds values outside {dtype}")
    return converted


def _is_null(values: Array) -> Array:
    """Returns True for None, NaN and the like among objects."""
    nulls: Array = np.equal(values, _NONE).astype(bool)
    try:
        # NaN, and nothing else, differs from itself.
        nulls |= np.not_equal(values, values).astype(bool)
        return nulls
    except TypeError:
        flat = [value is None or type(value).__name__ == "NAType" for value in values.ravel()]
        return np.array(flat, dtype=bool).reshape(values.shape)


def _arrow_array(
    arrow_type: pa.DataType, chunks: Sequence[Chunk], counts: Sequence[int]
) -> pa.Array:
    if pa.types.is_list(arrow_type):
        flat = pa.array(np.concatenate([chunk.values for chunk in chunks]), arrow_type.value_type)
        lengths = np.concatenate([chunk.lengths for chunk in chunks if chunk.lengths is not None])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, type=arrow_type)
    values = _joined([chunk.values for chunk in chunks], counts)
    if encoding.is_fixed_list(arrow_type):
        flat = pa.array(values.reshape(-1), arrow_type.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)
    nulls = None
    if any(chunk.nulls is not None for chunk in chunks):
        no = np.zeros(1, bool)
        nulls = _joined([no if chunk.nulls is None else chunk.nulls for chunk in chunks], counts)
    if pa.types.is_dictionary(arrow_type):
        text = pa.array(values, pa.string(), mask=nulls, from_pandas=True)
        return text.dictionary_encode().cast(arrow_type)
    return pa.array(values, arrow_type, mask=nulls, from_pandas=pa.types.is_string(arrow_type))


def _joined(pieces: Sequence[Array], counts: Sequence[int]) -> Array:
    """Returns the pieces end to end; a piece of one value stands for all its rows."""
    single = [len(piece) == 1 for piece in pieces]
    if all(single):
        return np.repeat(np.concatenate(pieces), counts, axis=0)
    return np.concatenate(
        [
            np.repeat(piece, count, axis=0) if alone else piece
            for piece, count, alone in zip(pieces, counts, single, strict=True)
        ]
    )
