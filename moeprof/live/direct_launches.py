"""What the driver needs to launch kernels that Triton compiled, laid out once.

Triton packs arguments and looks up what it compiled at every launch, which takes longer than the
driver's own part. Which arguments a kernel takes is read from what was compiled and checked against
what the driver says of it; a kernel that needs anything else is left to Triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.live.device_copies import opened_driver

Int64s = NDArray[np.int64]

KERNELS = ("publish", "piece_in", "piece_out", "add_slots")
PUBLISH, PIECE_IN, PIECE_OUT, ADD_SLOTS = range(4)

CELLS = (
    "hidden", "ids", "table", "pool", "inner", "rows", "first", "num_tokens", "D_FF", "D_MODEL",
    "weights", "out", "words", "turn", "num_slots", "nothing",
)  # fmt: skip
"""Arguments of all kernels; each lies in a word of its own, which launches read."""
CELL = {name: index for index, name in enumerate(CELLS)}
_ALIASES = {"rows_out": "rows"}

GRID, THREADS, SHARED, STREAM, FUNCTION, PARAMETERS, CONFIG, PROGRAMS = 0, 1, 3, 4, 7, 8, 9, 10
"""Columns of a launch. The first seven are the driver's ``CUlaunchConfig``."""
_BLOCK, _ATTRIBUTES, _NUM_ATTRIBUTES, _NUM_COLUMNS = 2, 5, 6, 11

_PROGRAMMATIC_SERIALIZATION = 6
_ATTRIBUTE_WORDS = 9
_NUM_SCRATCH = 2
_WARP = 32
_HIGH = 32


@dataclass(frozen=True, kw_only=True)
class PreparedKernel:
    """A compiled kernel as the driver knows it.

    Attributes:
        function: Its handle.
        num_threads: Of a program.
        shared_bytes: Of a program.
        is_dependent: It may begin before the launch in front of it has ended.
        parameters: Names of its arguments, in order.
    """

    function: int
    num_threads: int
    shared_bytes: int
    is_dependent: bool
    parameters: tuple[str, ...]


def prepared(compiled: Any) -> PreparedKernel | None:
    """Returns what Triton compiled as the driver knows it; None where only Triton can launch it.

    Args:
        compiled: What a launch returned.
    """
    metadata = compiled.metadata
    needs_more = (
        getattr(metadata, "num_ctas", 1) != 1
        or getattr(metadata, "launch_cooperative_grid", False)
        or getattr(metadata, "global_scratch_size", 0)
        or getattr(metadata, "profile_scratch_size", 0)
    )
    if needs_more:
        return None
    signature: Mapping[str, str] = compiled.src.signature
    given = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    if not _takes(compiled.function, list(given.values())):
        return None
    return PreparedKernel(
        function=compiled.function,
        num_threads=_WARP * metadata.num_warps,
        shared_bytes=metadata.shared,
        is_dependent=bool(getattr(metadata, "launch_pdl", False)),
        parameters=tuple(_ALIASES.get(name, name) for name in given),
    )


def _takes(function: int, kinds: Sequence[str]) -> bool:
    """Returns True where a function takes arguments of these kinds, and pointers behind them."""
    ask = getattr(opened_driver(), "cuFuncGetParamInfo", None)
    if ask is None:
        return False
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    sizes: list[int] = []
    while ask(
        ctypes.c_void_p(function),
        ctypes.c_size_t(len(sizes)),
        ctypes.byref(offset),
        ctypes.byref(size),
    ) == 0:  # fmt: skip
        sizes.append(size.value)
    scratch = sizes[len(kinds) :]
    return (
        sizes[: len(kinds)] == [_size_of(kind) for kind in kinds]
        and len(scratch) <= _NUM_SCRATCH
        and all(each == ctypes.sizeof(ctypes.c_void_p) for each in scratch)
    )


def _size_of(kind: str) -> int:
    return {"i32": 4, "i64": 8}.get(kind, 8 if kind.startswith("*") else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Launches:
    """Launches of the four kernels for dispatches of one kind.

    Attributes:
        table: [kernels, columns] one launch each.
        kept: What the table points to.
    """

    table: Int64s
    kept: tuple[Any, ...]


def launches_of(
    kernels: Sequence[PreparedKernel], programs: Sequence[int], cells: Int64s
) -> Launches:
    """Returns launches whose arguments are read from cells.

    Args:
        kernels: In the order of `KERNELS`.
        programs: Programs of each: in all, or per expert of a piece.
        cells: [len(CELLS)] the arguments; they are written before every launch, in place.
    """
    table = np.zeros((len(KERNELS), _NUM_COLUMNS), np.int64)
    kept: list[Any] = [cells]
    for row, kernel, count in zip(table, kernels, programs, strict=True):
        names = [*kernel.parameters, *["nothing"] * _NUM_SCRATCH]
        addresses = np.array(
            [cells.ctypes.data + cells.itemsize * CELL[name] for name in names], np.int64
        )
        row[GRID] = 1 << _HIGH
        row[THREADS] = 1 | kernel.num_threads << _HIGH
        row[_BLOCK] = 1 | 1 << _HIGH
        row[SHARED] = kernel.shared_bytes
        if kernel.is_dependent:
            attribute = np.zeros(_ATTRIBUTE_WORDS, np.int64)
            attribute[:2] = _PROGRAMMATIC_SERIALIZATION, 1
            row[_ATTRIBUTES], row[_NUM_ATTRIBUTES] = attribute.ctypes.data, 1
            kept.append(attribute)
        row[FUNCTION] = kernel.function
        row[PARAMETERS] = addresses.ctypes.data
        row[CONFIG] = row.ctypes.data
        row[PROGRAMS] = count
        kept.append(addresses)
    return Launches(table=table, kept=tuple(kept))
