"""Dynamic gating for a few tokens: stream the weights of the active experts, once.

At decode every expert has a row or two, so time is the bytes of the active experts over the
bandwidth. Two launches: each program finds its expert from the ids itself, so that neither a sort
nor a wait stands before the first byte; the last program to finish a column adds the slots up.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.parts import ACTIVATION_CODES, activated, next_power

FEW_ROWS = 16


@dataclass(frozen=True)
class StreamTiles:
    """Tile sizes of one streaming kernel.

    Attributes:
        columns: Rows of the weight matrix per program.
        depth: Columns of the weight matrix per step of its loop.
        num_stages: Steps whose loads are under way at once.
        num_warps: Warps per program.
    """

    columns: int
    depth: int
    num_stages: int
    num_warps: int


IN_TILES = StreamTiles(columns=128, depth=128, num_stages=3, num_warps=4)
OUT_TILES = StreamTiles(columns=64, depth=128, num_stages=5, num_warps=4)


@triton.jit
def _nth_active(ids, nth, num_slots, num_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Returns (the expert that is ``nth`` among those that have a row, or -1; how many have)."""
    slot = tl.arange(0, SLOTS)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    rows = tl.histogram(tl.maximum(chosen, 0), EXPERTS, mask=chosen >= 0)
    is_active = (rows > 0).to(tl.int32)
    expert = tl.arange(0, EXPERTS)
    place = tl.cumsum(is_active, 0) - 1
    here = (is_active > 0) & (place == nth) & (expert < num_experts)
    return tl.max(tl.where(here, expert, -1)), tl.sum(is_active)


@triton.jit
def _stream(
    source, source_row, source_valid, matrix, columns, columns_valid, DEPTH: tl.constexpr,
    DEPTH_STEP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Returns matrix[columns] @ source[rows].T as [COLUMNS, ROWS] in single precision."""
    step = tl.arange(0, DEPTH_STEP)
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    left = matrix + columns[:, None].to(tl.int64) * DEPTH + step[None, :]
    right = source + source_row[None, :].to(tl.int64) * DEPTH + step[:, None]
    for start in range(0, DEPTH, DEPTH_STEP):
        inside = start + step < DEPTH
        weight = tl.load(
            left + start, mask=columns_valid[:, None] & inside[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        rows = tl.load(right + start, mask=source_valid[None, :] & inside[:, None], other=0.0)
        total = tl.dot(weight, rows, total)
    return total


@triton.jit
def some_rows(source, start, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Returns (token, source) of the matches from ``start`` on, ROWS of them, and which exist."""
    token = tl.arange(0, TOKENS)
    place = tl.cumsum((source >= 0).to(tl.int32), 0) - 1
    row = start + tl.arange(0, ROWS)
    here = (source >= 0)[None, :] & (place[None, :] == row[:, None])
    picked = tl.sum(tl.where(here, token[None, :], 0), 1)
    picked_source = tl.sum(tl.where(here, source[None, :], 0), 1)
    return picked, picked_source, tl.sum(here.to(tl.int32), 1) > 0


@triton.jit
def columns_in(
    hidden, ids, matrix, bias, inner, expert, token, valid, column, is_column, D_FF,
    D_MODEL: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    ROWS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """First product, bias and activation of one expert's rows, for some columns."""
    value = _stream(
        hidden, token, valid, matrix, column, is_column, D_MODEL, DEPTH_STEP, COLUMNS, ROWS
    )
    if BIAS:
        added = tl.load(bias + column, mask=is_column, other=0.0)
        value += added.to(tl.float32)[:, None]
    value = activated(value, ACTIVATION)
    if GATED:
        up = _stream(
            hidden, token, valid, matrix, column + D_FF, is_column, D_MODEL, DEPTH_STEP, COLUMNS,
            ROWS,
        )  # fmt: skip
        if BIAS:
            added_up = tl.load(bias + D_FF + column, mask=is_column, other=0.0)
            up += added_up.to(tl.float32)[:, None]
        value = value * up
    value = value.to(inner.dtype.element_ty)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids + token * TOP_K + slot, mask=valid, other=-1)
        here = valid & (chosen == expert)
        target = inner + (token * TOP_K + slot)[None, :].to(tl.int64) * D_FF + column[:, None]
        tl.store(target, value, mask=here[None, :] & is_column[:, None])


@triton.jit
def chosen_by(ids, expert, num_tokens, TOP_K: tl.constexpr, TOKENS: tl.constexpr):
    """Returns each token's first flat slot that has the expert, or -1."""
    token = tl.arange(0, TOKENS)
    source = tl.zeros((TOKENS,), dtype=tl.int32) - 1
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids + token * TOP_K + slot, mask=token < num_tokens, other=-1)
        source = tl.where((chosen == expert) & (source < 0), token * TOP_K + slot, source)
    return source


@triton.jit
def _few_in(
    hidden, ids, w_in, b_in, inner, finished, num_tokens, num_experts, D_FF,
    D_MODEL: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr, ROWS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, DEPENDENT: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    # For the next launch, which waits for this one before it counts.
    if tl.program_id(0) == 0:
        tl.store(finished + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), dtype=tl.int32))
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.cdiv(D_FF, COLUMNS)
    nth, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    expert, _active = _nth_active(ids, nth, num_tokens * TOP_K, num_experts, SLOTS, EXPERTS)
    if expert >= 0:
        rows_in = D_FF * 2 if GATED else D_FF
        matrix = w_in + expert.to(tl.int64) * rows_in * D_MODEL
        bias = b_in
        if BIAS:
            bias = b_in + expert * rows_in
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        source = chosen_by(ids, expert, num_tokens, TOP_K, TOKENS)
        for start in range(0, tl.sum((source >= 0).to(tl.int32)), ROWS):
            token, _source, valid = some_rows(source, start, TOKENS, ROWS)
            columns_in(
                hidden, ids, matrix, bias, inner, expert, token, valid, column, column < D_FF, D_FF,
                D_MODEL, TOP_K, COLUMNS, DEPTH_STEP, ROWS, GATED, BIAS, ACTIVATION,
            )  # fmt: skip


@triton.jit
def columns_out(
    inner, ids, matrix, bias, rows_out, expert, source, token, valid, column, is_column, D_MODEL,
    D_FF: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Second product and bias of one expert's rows, for some columns."""
    value = _stream(
        inner, source, valid, matrix, column, is_column, D_FF, DEPTH_STEP, COLUMNS, ROWS
    )
    if BIAS:
        added = tl.load(bias + column, mask=is_column, other=0.0)
        value += added.to(tl.float32)[:, None]
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(ids + token * TOP_K + slot, mask=valid, other=-1)
        here = valid & (chosen == expert)
        target = (token * TOP_K + slot)[None, :].to(tl.int64) * D_MODEL + column[:, None]
        tl.store(rows_out + target, value, mask=here[None, :] & is_column[:, None])


@triton.jit
def _few_out(
    inner, ids, weights, w_out, b_out, rows_out, out, finished, num_tokens, num_experts, D_MODEL,
    D_FF: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(D_MODEL, COLUMNS)
    nth, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    expert, num_active = _nth_active(ids, nth, num_tokens * TOP_K, num_experts, SLOTS, EXPERTS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D_MODEL
    token = tl.arange(0, TOKENS)
    is_last = (num_active == 0) & (nth == 0)
    if expert >= 0:
        matrix = w_out + expert.to(tl.int64) * D_MODEL * D_FF
        bias = b_out
        if BIAS:
            bias = b_out + expert * D_MODEL
        source = chosen_by(ids, expert, num_tokens, TOP_K, TOKENS)
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        for start in range(0, tl.sum((source >= 0).to(tl.int32)), ROWS):
            some, some_source, valid = some_rows(source, start, TOKENS, ROWS)
            columns_out(
                inner, ids, matrix, bias, rows_out, expert, some_source, some, valid, column,
                is_column, D_MODEL, D_FF, TOP_K, COLUMNS, DEPTH_STEP, ROWS, BIAS,
            )  # fmt: skip
        # All of this program's rows must be visible before it counts as finished.
        tl.debug_barrier()
        is_last = tl.atomic_add(finished + tile, 1, sem="acq_rel") == num_active - 1
    if is_last:
        total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for slot in tl.static_range(TOP_K):
            here = tl.load(ids + token * TOP_K + slot, mask=token < num_tokens, other=-1) >= 0
            gate = tl.load(weights + token * TOP_K + slot, mask=here, other=0.0).to(tl.float32)
            place = (token * TOP_K + slot)[:, None].to(tl.int64) * D_MODEL + column[None, :]
            part = tl.load(
                rows_out + place, mask=here[:, None] & is_column[None, :], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            total += gate[:, None] * part
        place = token[:, None].to(tl.int64) * D_MODEL + column[None, :]
        is_token = (token < num_tokens)[:, None] & is_column[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=is_token)


def run_few(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    tiles_in: StreamTiles | None = None,
    tiles_out: StreamTiles | None = None,
    dependent: bool | None = None,
) -> torch.Tensor:
    """Returns the layer's output for a few tokens; arguments contiguous, as `dynamic` takes them.

    Args:
        hidden: [T, d_model], half precision.
        expert_ids: [T, k].
        weights: [T, k].
        experts: Contiguous weights.
        tiles_in: Tile sizes of the first product.
        tiles_out: Tile sizes of the second product.
        dependent: True to let the second launch start while the first ends; None: on a GPU.
    """
    if dependent is None:
        dependent = hidden.device.type == "cuda"
    tiles_in, tiles_out = tiles_in or IN_TILES, tiles_out or OUT_TILES
    (num_tokens, width), top_k = hidden.shape, expert_ids.shape[1]
    num_slots = num_tokens * top_k
    num_active = min(num_slots, experts.num_experts)
    inner = torch.empty(num_slots, experts.d_ff, dtype=hidden.dtype, device=hidden.device)
    rows = torch.empty(num_slots, width, dtype=torch.float32, device=hidden.device)
    out = torch.empty_like(hidden)
    shape = {
        "TOP_K": top_k,
        "TOKENS": next_power(num_tokens),
        "SLOTS": next_power(num_slots),
        "EXPERTS": next_power(experts.num_experts),
        "ROWS": FEW_ROWS,
        "DEPENDENT": dependent,
    }
    launch = {"launch_pdl": True} if dependent else {}
    tiles_across = triton.cdiv(width, tiles_out.columns)
    num_counters = next_power(tiles_across)
    finished = torch.empty(num_counters, dtype=torch.int32, device=hidden.device)
    num_tiles = triton.cdiv(experts.d_ff, tiles_in.columns)
    _few_in[(num_active * num_tiles,)](
        hidden, expert_ids, experts.w_in, experts.b_in, inner, finished, num_tokens,
        experts.num_experts, experts.d_ff, D_MODEL=width, COLUMNS=tiles_in.columns,
        DEPTH_STEP=tiles_in.depth, GATED=experts.gated, BIAS=experts.b_in is not None,
        ACTIVATION=ACTIVATION_CODES[experts.activation], COUNTERS=num_counters,
        num_stages=tiles_in.num_stages, num_warps=tiles_in.num_warps, **shape,
    )  # fmt: skip
    _few_out[(num_active * tiles_across,)](
        inner, expert_ids, weights, experts.w_out, experts.b_out, rows, out, finished, num_tokens,
        experts.num_experts, width, D_FF=experts.d_ff, COLUMNS=tiles_out.columns,
        DEPTH_STEP=tiles_out.depth, BIAS=experts.b_out is not None,
        num_stages=tiles_out.num_stages, num_warps=tiles_out.num_warps, **shape, **launch,
    )  # fmt: skip
    return out
