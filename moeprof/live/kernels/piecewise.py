"""A dispatch of a few tokens in pieces: some experts now, others once their weights have arrived.

As `few`, with two differences: experts are named by a table that the host wrote, each with the
place of its weights in a pool of blocks, and the slots are added up by a launch of their own. The
host may be told what was chosen by a launch too, which writes to its memory. What a row of an
expert gives does not depend on the piece, nor on where the weights lie.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

import triton
import triton.language as tl

from moeprof.live.kernels.few import chosen_by, columns_in, columns_out, some_rows


@triton.jit(do_not_specialize=["turn", "num_slots"])
def publish(ids, words, turn, num_slots, SLOTS: tl.constexpr):
    """Writes each id where the host looks for it, below the number of the dispatch."""
    slot = tl.arange(0, SLOTS)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int64)
    # What 32 bits do not hold stays nobody, or an expert that there is not.
    chosen = tl.minimum(tl.maximum(chosen, -1), 0x7FFFFFFF)
    word = (turn.to(tl.int64) << 32) | (chosen & 0xFFFFFFFF)
    tl.store(words + slot, word, mask=slot < num_slots)


@triton.jit(do_not_specialize=["first", "num_tokens"])
def piece_in(
    hidden, ids, table, pool, inner, first, num_tokens, D_FF, TABLE: tl.constexpr,
    UNIT: tl.constexpr, W_IN: tl.constexpr, B_IN: tl.constexpr, D_MODEL: tl.constexpr,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    ROWS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """First product of the experts ``first`` and following of the table."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.cdiv(D_FF, COLUMNS)
    nth, tile = first + tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    expert = tl.load(table + nth)
    block = pool + tl.load(table + TABLE + nth).to(tl.int64) * UNIT
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    source = chosen_by(ids, expert, num_tokens, TOP_K, TOKENS)
    for start in range(0, tl.sum((source >= 0).to(tl.int32)), ROWS):
        token, _source, valid = some_rows(source, start, TOKENS, ROWS)
        columns_in(
            hidden, ids, block + W_IN, block + B_IN, inner, expert, token, valid, column,
            column < D_FF, D_FF, D_MODEL, TOP_K, COLUMNS, DEPTH_STEP, ROWS, GATED, BIAS, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "num_tokens"])
def piece_out(
    inner, ids, table, pool, rows_out, first, num_tokens, D_MODEL, TABLE: tl.constexpr,
    UNIT: tl.constexpr, W_OUT: tl.constexpr, B_OUT: tl.constexpr, D_FF: tl.constexpr,
    TOP_K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Second product of the same experts, in single precision."""
    num_tiles = tl.cdiv(D_MODEL, COLUMNS)
    nth, tile = first + tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    expert = tl.load(table + nth)
    block = pool + tl.load(table + TABLE + nth).to(tl.int64) * UNIT
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    source = chosen_by(ids, expert, num_tokens, TOP_K, TOKENS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    for start in range(0, tl.sum((source >= 0).to(tl.int32)), ROWS):
        token, some_source, valid = some_rows(source, start, TOKENS, ROWS)
        columns_out(
            inner, ids, block + W_OUT, block + B_OUT, rows_out, expert, some_source, token, valid,
            column, column < D_MODEL, D_MODEL, D_FF, TOP_K, COLUMNS, DEPTH_STEP, ROWS, BIAS,
        )  # fmt: skip


@triton.jit
def put_rows(given, slots, rows, D_MODEL, COLUMNS: tl.constexpr):
    """Writes rows that were computed elsewhere into their slots."""
    num_tiles = tl.cdiv(D_MODEL, COLUMNS)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + row).to(tl.int64)
    value = tl.load(given + row * D_MODEL + column, mask=column < D_MODEL, other=0.0)
    tl.store(rows + slot * D_MODEL + column, value.to(tl.float32), mask=column < D_MODEL)


@triton.jit
def add_slots(
    rows, ids, weights, out, D_MODEL, TOP_K: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Adds a token's rows, weighted, slot by slot; slots that are not executed count as zero."""
    num_tiles = tl.cdiv(D_MODEL, COLUMNS)
    token = (tl.program_id(0) // num_tiles).to(tl.int64)
    column = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D_MODEL
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        # What lies in the rows of a slot that is not executed is of an earlier dispatch.
        if tl.load(ids + token * TOP_K + slot) >= 0:
            gate = tl.load(weights + token * TOP_K + slot).to(tl.float32)
            place = (token * TOP_K + slot) * D_MODEL + column
            total += gate * tl.load(rows + place, mask=is_column, other=0.0)
    tl.store(out + token * D_MODEL + column, total.to(out.dtype.element_ty), mask=is_column)
