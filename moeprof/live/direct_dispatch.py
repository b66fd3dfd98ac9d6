"""A dispatch of a few tokens asked for from compiled code: what the host does between two waits.

The same pieces in the same order as `ExpertBuffer` asks for from Python, without its calls.
The host learns the choice of the router from words in its own memory that a kernel writes, each
with the number of its dispatch, and so needs no copy and no event to wait for. Nothing is decided
here (`moeprof.replay.cache.decisions`).
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.live.direct_launches import (
    ADD_SLOTS,
    CELL,
    CONFIG,
    FUNCTION,
    GRID,
    PARAMETERS,
    PIECE_IN,
    PIECE_OUT,
    PROGRAMS,
    PUBLISH,
    STREAM,
)
from moeprof.live.driver_calls import (
    COPY_TO_DEVICE,
    LAUNCH,
    NOT_READY,
    QUERY,
    RECORD,
    WAIT,
    call_1,
    call_2,
    call_3,
    call_4,
    loaded,
)
from moeprof.replay.cache.decisions import EXPERT, HIT, NUM_EXPERTS, NUM_PIECES, ROWS, SLOT
from moeprof.replay.cache.residency import AT_ONCE
from moeprof.replay.compiled import compiled, inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.uint8]

LOST = -1
"""Answer of `learn` where the device has nothing left to do and has not said what it chose."""
TURNS = 1 << 31
"""Dispatches are numbered below this, and from 1 again."""

_HIDDEN, _IDS, _WEIGHTS, _OUT = CELL["hidden"], CELL["ids"], CELL["weights"], CELL["out"]
_POOL, _FIRST, _TURN = CELL["pool"], CELL["first"], CELL["turn"]
_TOKENS, _NUM_SLOTS = CELL["num_tokens"], CELL["num_slots"]
_LOW, _SIGN = (1 << 32) - 1, 1 << 31
_PATIENCE = 4095


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectSlots:
    """Slots as compiled code copies into them and waits for them.

    Attributes:
        address: [slots] on the device.
        offset: [slots] from the start of the slot's pool, in blocks of the alignment.
        pending: [slots] handle of the event that says that a copy has arrived, until a reader has
            waited; 0 where nobody has to.
        is_read: [slots] 1 where the event of a slot marks a reader of an earlier dispatch.
        arrivals: Handles of events on the stream of copies, used in turn.
        marks: Handles of events on that of computations, used in turn.
        turns: [3] next of the arrivals, next of the marks, and handle of the last mark.
    """

    address: Int64s
    offset: Int32s
    pending: Int64s
    is_read: Bools
    arrivals: Int64s
    marks: Int64s
    turns: Int64s


@inlined("int64(int64[::1], int64[:, ::1], int64, int64, int64)")
def _launch(driver, table, kernel, num_programs, stream):  # type: ignore[no-untyped-def]
    """Launches a kernel on as many programs as asked for."""
    table[kernel, GRID] = num_programs | (1 << 32)
    table[kernel, STREAM] = stream
    return call_4(
        driver[LAUNCH], table[kernel, CONFIG], table[kernel, FUNCTION], table[kernel, PARAMETERS], 0
    )


@compiled("int64(int64[::1], int64[:, ::1], int64[::1], int64, int64, int64, int64, int64[::1])")
def learn(
    driver: Int64s,
    table: Int64s,
    cells: Int64s,
    stream: int,
    turn: int,
    num_slots: int,
    words: int,
    chosen: Int64s,
) -> int:
    """Waits until the device has said which experts it chose.

    Args:
        driver: From `moeprof.live.driver_calls.driver_functions`.
        table: Of `moeprof.live.direct_launches.Launches`.
        cells: Arguments of the kernels; ``ids`` is there.
        stream: Handle of the stream of computations.
        turn: Number of the dispatch, from 1.
        num_slots: (token, slot) pairs.
        words: Address of as many words that the device writes to.
        chosen: [num_slots or more] filled with the ids.

    Returns:
        0, an error of the driver, or `LOST`.
    """
    cells[_TURN] = turn
    cells[_NUM_SLOTS] = num_slots
    error = _launch(driver, table, PUBLISH, table[PUBLISH, PROGRAMS], stream)
    if error:
        return error
    polls = 0
    for slot in range(num_slots):
        place = words + 8 * slot
        word = loaded(place)
        while word >> 32 != turn:
            polls += 1
            if polls & _PATIENCE == 0:
                error = call_1(driver[QUERY], stream)
                if error == 0:
                    word = loaded(place)
                    if word >> 32 != turn:
                        return LOST
                    break
                if error != NOT_READY:
                    return error
            word = loaded(place)
        low = word & _LOW
        chosen[slot] = low - (_LOW + 1) if low >= _SIGN else low
    return 0


@compiled("int64(int64[::1], int64, int64, int32[:, ::1], int32[::1], int32[::1], int32[::1],"
          " int64[::1])")  # fmt: skip
def take_all(
    chosen: Int64s,
    num_slots: int,
    num_experts: int,
    columns: Int32s,
    piece_starts: Int32s,
    piece_places: Int32s,
    copy_starts: Int32s,
    counts: Int64s,
) -> int:
    """Decides about a dispatch whose experts are all on the device: one piece, nothing copied.

    Args:
        chosen: [num_slots or more] indices into the experts, or -1.
        num_slots: (token, slot) pairs.
        num_experts: Of the site.
        columns: Of a decision, as for the rest; filled.
        piece_starts: See there.
        piece_places: See there.
        copy_starts: See there.
        counts: See there.

    Returns:
        Active experts, or -1 where there is no expert of some id.
    """
    rows = np.zeros(num_experts, np.int32)
    for slot in range(num_slots):
        if chosen[slot] >= num_experts:
            return -1
        if chosen[slot] >= 0:
            rows[chosen[slot]] += 1
    count = 0
    for expert in range(num_experts):
        if rows[expert]:
            columns[EXPERT, count] = expert
            columns[ROWS, count] = rows[expert]
            columns[HIT, count] = 1
            columns[SLOT, count] = expert
            piece_places[count] = count
            count += 1
    piece_starts[0] = 0
    piece_starts[1] = count
    copy_starts[:3] = 0
    counts[:] = 0
    counts[NUM_EXPERTS] = count
    counts[NUM_PIECES] = 1 if count else 0
    return count


_EXECUTE = (
    "int64(int64[::1], int64[:, ::1], int64[::1], int32[:, ::1], int32[:, ::1], int32[::1],"
    " int32[::1], int32[::1], int32[::1], int64[::1], int64[::1], int32[::1], int64[::1],"
    " uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, int64)"
)


@compiled(_EXECUTE)
def execute(  # noqa: PLR0912, PLR0917
    driver: Int64s,
    table: Int64s,
    cells: Int64s,
    entries: Int32s,
    columns: Int32s,
    piece_starts: Int32s,
    piece_places: Int32s,
    copy_starts: Int32s,
    copy_places: Int32s,
    counts: Int64s,
    address: Int64s,
    offset: Int32s,
    pending: Int64s,
    is_read: Bools,
    arrivals: Int64s,
    marks: Int64s,
    turns: Int64s,
    blocks: Int64s,
    computations: int,
    copies: int,
    combines: int,
) -> int:
    """Asks for a dispatch: its copies as early as slots allow, its pieces, and what adds them up.

    Args:
        driver: From `moeprof.live.driver_calls.driver_functions`.
        table: Of `moeprof.live.direct_launches.Launches`.
        cells: Arguments of the kernels, but for ``pool`` and ``first``.
        entries: [2, experts] table of the kernels, in page-locked memory.
        columns: Of the decision, as for what follows.
        piece_starts: See there.
        piece_places: See there.
        copy_starts: See there.
        copy_places: See there.
        counts: See there.
        address: Of `DirectSlots`, as for what follows.
        offset: See there.
        pending: See there.
        is_read: See there.
        arrivals: See there.
        marks: See there.
        turns: See there.
        blocks: [3] address of the pool, of the blocks in host memory, and bytes of a block; 0 bytes
            where nothing is to be copied.
        computations: Handle of their stream.
        copies: Handle of theirs.
        combines: 1 to add the slots up; 0 where something follows that may have to wait for the
            pieces.

    Returns:
        0, or an error of the driver.
    """
    cells[_POOL] = blocks[0]
    turns[2] = 0
    filled = 0
    num_pieces = counts[NUM_PIECES]
    for piece in range(num_pieces + 1):
        begin, end = copy_starts[piece], copy_starts[piece + 1]
        if end > begin:
            if turns[2]:
                error = call_3(driver[WAIT], copies, turns[2], 0)
                if error:
                    return error
            arrived = arrivals[turns[0]]
            turns[0] = (turns[0] + 1) % len(arrivals)
            for nth in range(begin, end):
                lookup = copy_places[nth]
                slot = columns[SLOT, lookup]
                if blocks[2]:
                    source = blocks[1] + columns[EXPERT, lookup] * blocks[2]
                    error = call_4(driver[COPY_TO_DEVICE], address[slot], source, blocks[2], copies)
                    if error:
                        return error
                pending[slot] = arrived
                is_read[slot] = 0
            error = call_2(driver[RECORD], arrived, copies)
            if error:
                return error
        if piece == num_pieces:
            break
        first = filled
        awaited = 0
        for nth in range(piece_starts[piece], piece_starts[piece + 1]):
            lookup = piece_places[nth]
            slot = columns[SLOT, lookup]
            if pending[slot]:
                if pending[slot] != awaited:
                    awaited = pending[slot]
                    error = call_3(driver[WAIT], computations, awaited, 0)
                    if error:
                        return error
                pending[slot] = 0
            entries[0, filled] = columns[EXPERT, lookup]
            entries[1, filled] = offset[slot]
            filled += 1
        cells[_FIRST] = first
        count = filled - first
        for kernel in (PIECE_IN, PIECE_OUT):
            error = _launch(driver, table, kernel, count * table[kernel, PROGRAMS], computations)
            if error:
                return error
        # Nobody waits for the others.
        if copy_starts[num_pieces + 1] > end or not combines:
            turns[2] = marks[turns[1]]
            turns[1] = (turns[1] + 1) % len(marks)
            error = call_2(driver[RECORD], turns[2], computations)
            if error:
                return error
    if combines:
        return _launch(driver, table, ADD_SLOTS, table[ADD_SLOTS, PROGRAMS], computations)
    return 0


@compiled("int64(int64[::1], int64[:, ::1], int64)")
def combine(driver: Int64s, table: Int64s, stream: int) -> int:
    """Adds the slots of the last dispatch up; see `execute`."""
    return _launch(driver, table, ADD_SLOTS, table[ADD_SLOTS, PROGRAMS], stream)


@compiled(
    "int64(int64[::1], int32[:, ::1], int64, int64[::1], int64[::1], uint8[::1], int64[::1],"
    " int64[::1], int64[:, ::1], int64)"
)
def copy_ahead(  # noqa: PLR0917
    driver: Int64s,
    fetched: Int32s,
    count: int,
    address: Int64s,
    pending: Int64s,
    is_read: Bools,
    arrivals: Int64s,
    turns: Int64s,
    blocks: Int64s,
    copies: int,
) -> int:
    """Asks for copies ahead, one by one, so that nobody waits for all of them.

    Args:
        driver: From `moeprof.live.driver_calls.driver_functions`.
        fetched: [4, count or more] site, expert, slot, and whose reader is waited for.
        count: Copies.
        address: Of `DirectSlots`, as for what follows.
        pending: See there.
        is_read: See there.
        arrivals: See there.
        turns: See there; the last mark lies behind the readers.
        blocks: [sites, 3] as in `execute`, by site id.
        copies: Handle of the stream of copies.

    Returns:
        0, or an error of the driver.
    """
    for nth in range(count):
        site, expert, slot = fetched[0, nth], fetched[1, nth], fetched[2, nth]
        if fetched[3, nth] != AT_ONCE and turns[2]:
            error = call_3(driver[WAIT], copies, turns[2], 0)
            if error:
                return error
        size = blocks[site, 2]
        if size:
            source = blocks[site, 1] + expert * size
            error = call_4(driver[COPY_TO_DEVICE], address[slot], source, size, copies)
            if error:
                return error
        arrived = arrivals[turns[0]]
        turns[0] = (turns[0] + 1) % len(arrivals)
        error = call_2(driver[RECORD], arrived, copies)
        if error:
            return error
        pending[slot] = arrived
        is_read[slot] = 0
    return 0
