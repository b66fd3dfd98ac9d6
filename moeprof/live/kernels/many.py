"""Dynamic gating for many tokens: order rows by expert, then two persistent grouped products.

Near-uniform routing leaves an expert tens of rows, so the weights' bytes are the floor; skewed
routing leaves some experts thousands, so the matrix rate is. Rows are therefore cut into tiles of
two heights, short ones for what is left over. Where routing is so skewed that experts with
thousands of rows stand beside experts with a few, both kinds run side by side instead (`pairs`).
Counts stay on the device: every program finds its tiles from them, and which of the two ways is
taken follows from them too; the kernels of the other one exit at once.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.pairs import run_pairs
from moeprof.live.kernels.parts import ACTIVATION_CODES, activated, next_power, processors
from moeprof.live.kernels.sorting import COPY_COLUMNS, SortedRows, sort_rows
from moeprof.live.kernels.tiles import SHORT, TALL, ManyPlan, ProductTiles, plan_for


@triton.jit
def _tiles_of(counts, HEIGHT: tl.constexpr, TALL_HEIGHT: tl.constexpr):
    """Returns how many tiles of this height each expert has.

    Whole tall tiles first; what is left is a short tile if it fits one, else a tall one.
    """
    left = counts % TALL_HEIGHT
    if HEIGHT == TALL_HEIGHT:
        return counts // TALL_HEIGHT + (left * 2 > TALL_HEIGHT).to(tl.int32)
    else:
        return ((left > 0) & (left * 2 <= TALL_HEIGHT)).to(tl.int32)


@triton.jit
def _run_tiles(
    rows, matrix, bias, out, counts, offsets, num_experts, num_columns,
    EXPERTS: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, TALL_HEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Computes this program's share of the tiles of one height.

    Neighbours in time share rows and an expert, so that both are read from memory once.
    """
    every = tl.arange(0, EXPERTS)
    have = tl.load(counts + every, mask=every < num_experts, other=0)
    tiles = _tiles_of(have, HEIGHT, TALL_HEIGHT)
    ends = tl.cumsum(tiles, 0)
    tiles_across = tl.cdiv(num_columns, COLUMNS)
    total = tl.sum(tiles) * tiles_across
    matrix_rows = num_columns * 2 if GATED else num_columns
    # The programs left over by the tall tiles begin with the first short ones.
    begin_at = tl.program_id(0)
    if HEIGHT != TALL_HEIGHT:
        begin_at = tl.num_programs(0) - 1 - begin_at
    for tile in tl.range(begin_at, total, tl.num_programs(0), flatten=FLATTEN):
        down, across = tile // tiles_across, tile % tiles_across
        expert = tl.sum((ends <= down).to(tl.int32))
        before = tl.sum(tl.where(every == expert, ends - tiles, 0))
        num_rows = tl.load(counts + expert)
        if HEIGHT == TALL_HEIGHT:
            first = (down - before) * HEIGHT
        else:
            first = num_rows // TALL_HEIGHT * TALL_HEIGHT
        begin = tl.load(offsets + expert) + first
        left_column = across * COLUMNS
        matrix_row = expert * matrix_rows + left_column
        value = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
        up = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
        for start in range(0, DEPTH, DEPTH_STEP):
            some = rows.load([begin, start])
            weight = matrix.load([matrix_row, start])
            value = tl.dot(some, weight.T, value)
            if GATED:
                weight = matrix.load([matrix_row + num_columns, start])
                up = tl.dot(some, weight.T, up)
        column = left_column + tl.arange(0, COLUMNS)
        is_column = column < num_columns
        if BIAS:
            shift = tl.load(bias + expert * matrix_rows + column, mask=is_column, other=0.0)
            value += shift.to(tl.float32)[None, :]
        if ACTIVATION >= 0:
            value = activated(value, ACTIVATION)
        if GATED:
            if BIAS:
                shift = tl.load(
                    bias + expert * matrix_rows + num_columns + column, mask=is_column, other=0.0
                )
                up += shift.to(tl.float32)[None, :]
            value = value * up
        row = tl.arange(0, HEIGHT)
        target = (begin + row)[:, None].to(tl.int64) * num_columns + column[None, :]
        is_row = first + row < num_rows
        kept = value.to(out.dtype.element_ty)
        tl.store(out + target, kept, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _product(
    tall_rows, short_rows, matrix, bias, out, counts, offsets, paired, num_experts, num_columns,
    EXPERTS: tl.constexpr, DEPTH: tl.constexpr, TALL_HEIGHT: tl.constexpr,
    SHORT_HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[rows of e] = activation(rows @ matrix[e].T + bias[e]), in tall tiles and short ones.

    Tall tiles keep the matrix units busy, short ones the memory: half of the programs begin with
    one kind and half with the other, so that both are. Where pairs run instead, there is nothing to
    do.
    """
    if paired is not None:
        if tl.load(paired) != 0:
            return
    is_first_half = tl.program_id(0) * 2 < tl.num_programs(0)
    for part in tl.range(0, 2):
        if (part == 0) == is_first_half:
            _run_tiles(
                tall_rows, matrix, bias, out, counts, offsets, num_experts, num_columns, EXPERTS,
                DEPTH, TALL_HEIGHT, TALL_HEIGHT, COLUMNS, DEPTH_STEP, GATED, BIAS, ACTIVATION,
                FLATTEN,
            )  # fmt: skip
        else:
            _run_tiles(
                short_rows, matrix, bias, out, counts, offsets, num_experts, num_columns, EXPERTS,
                DEPTH, SHORT_HEIGHT, TALL_HEIGHT, COLUMNS, DEPTH_STEP, GATED, BIAS, ACTIVATION,
                FLATTEN,
            )  # fmt: skip


@triton.jit
def _combine(
    rows, ids, weights, place, out, num_tokens, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    STEP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Adds each token's rows, weighted, slot by slot."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        is_column = column < WIDTH
        total = tl.zeros((TOKENS, STEP), dtype=tl.float32)
        for slot in tl.static_range(TOP_K):
            flat = token * TOP_K + slot
            here = tl.load(ids + flat, mask=is_token, other=-1) >= 0
            gate = tl.load(weights + flat, mask=here, other=0.0).to(tl.float32)
            source = tl.load(place + flat, mask=here, other=0)
            part = tl.load(
                rows + source[:, None].to(tl.int64) * WIDTH + column[None, :],
                mask=here[:, None] & is_column[None, :], other=0.0,
            )  # fmt: skip
            total += gate[:, None] * part.to(tl.float32)
        goal = out + token[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(goal, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


def grouped_product(
    sent: SortedRows,
    rows: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gated: bool = False,
    activation: int = -1,
    tiles: ProductTiles,
) -> None:
    """Runs each row through its expert's matrix, bias and activation, unless pairs are to.

    Args:
        sent: Counts and offsets of the rows, and whether pairs run.
        rows: [n, depth], in expert order.
        matrix: [num_experts, columns, depth], or [num_experts, 2 * columns, depth] where gated.
        bias: [num_experts, rows of matrix] or None.
        out: [n, columns], receives the results; other rows stay as they are, all where pairs run.
        gated: True where the first half of ``matrix`` gates the second.
        activation: Code of the activation; -1 for none.
        tiles: Tile sizes.
    """
    num_experts, _, depth = matrix.shape
    _product[(processors(rows.device) * tiles.programs,)](
        TensorDescriptor.from_tensor(rows, [TALL, tiles.depth]),
        TensorDescriptor.from_tensor(rows, [SHORT, tiles.depth]),
        TensorDescriptor.from_tensor(matrix.view(-1, depth), [tiles.columns, tiles.depth]),
        bias, out, sent.counts, sent.offsets, sent.tables.paired if sent.tables else None,
        num_experts, out.shape[1], EXPERTS=next_power(num_experts), DEPTH=depth,
        TALL_HEIGHT=TALL, SHORT_HEIGHT=SHORT, COLUMNS=tiles.columns, DEPTH_STEP=tiles.depth,
        GATED=gated, BIAS=bias is not None, ACTIVATION=activation, FLATTEN=tiles.flatten,
        num_stages=tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip


def run_many(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    plan: ManyPlan | None = None,
) -> torch.Tensor:
    """Returns the layer's output for many tokens; arguments contiguous, as `dynamic` takes them.

    Args:
        hidden: [T, d_model], half precision.
        expert_ids: [T, k].
        weights: [T, k].
        experts: Contiguous weights.
        plan: Tile sizes; by default those of `plan_for`.
    """
    num_slots = expert_ids.numel()
    plan = plan or plan_for(num_slots, experts.num_experts, gated=experts.gated)
    sent = sort_rows(hidden, expert_ids, experts.num_experts, pairs=plan.pair is not None)
    inner = torch.empty(num_slots, experts.d_ff, dtype=hidden.dtype, device=hidden.device)
    rows = torch.empty(num_slots, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    # Where the device chose pairs these are gone before the pairs begin: beside those they would
    # find no room.
    grouped_product(
        sent, sent.rows, experts.w_in, experts.b_in, inner, gated=experts.gated,
        activation=ACTIVATION_CODES[experts.activation], tiles=plan.tiles_in,
    )  # fmt: skip
    grouped_product(sent, inner, experts.w_out, experts.b_out, rows, tiles=plan.tiles_out)
    if plan.pair is not None:
        run_pairs(sent, experts, inner, rows, plan.pair)
    out = torch.empty_like(hidden)
    num_tokens, width = hidden.shape
    group, step = 2, min(next_power(width), COPY_COLUMNS)
    _combine[(triton.cdiv(num_tokens, group),)](
        rows, expert_ids, weights, sent.place, out, num_tokens, WIDTH=width,
        TOP_K=expert_ids.shape[1], STEP=step, TOKENS=group,
    )  # fmt: skip
    return out
