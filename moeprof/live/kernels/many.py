"""Dynamic gating for many tokens: order rows by expert, then two persistent grouped products.

Near-uniform routing leaves an expert tens of rows, so the weights' bytes are the floor; skewed
routing leaves some experts thousands, so the matrix rate is. Rows are therefore cut into tiles of
two heights, short ones for what is left over. Counts stay on the device: every program finds its
tiles from them.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.parts import ACTIVATION_CODES, activated, next_power

TALL, SHORT = 128, 64
_COUNT_BLOCK = 128
_COPY_COLUMNS = 1024


@dataclass(frozen=True)
class ProductTiles:
    """Tile sizes of one grouped product.

    Attributes:
        columns: Output columns per tile; of the gate and as many of what it multiplies, where the
            experts are gated.
        depth: Columns of the rows per step.
        num_stages: Steps whose loads are under way at once.
        num_warps: Warps per program.
        programs: Programs per multiprocessor.
        flatten: True to let one tile's end overlap the next one's first loads.
    """

    columns: int
    depth: int
    num_stages: int
    num_warps: int
    programs: int
    flatten: bool


IN_TILES = ProductTiles(128, 64, num_stages=3, num_warps=4, programs=2, flatten=True)
GATED_IN_TILES = ProductTiles(128, 64, num_stages=3, num_warps=8, programs=1, flatten=True)
OUT_TILES = IN_TILES


@triton.jit
def _count(
    ids, counts, finished, rank, offsets, num_slots, num_experts, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Counts each expert's rows, ranks every slot among them, and says where rows begin.

    Expects ``counts`` and ``finished`` at zero. The last program to finish sums the counts up.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    same = (chosen[:, None] == chosen[None, :]).to(tl.int32)
    index = tl.arange(0, BLOCK)
    earlier = tl.sum(same * (index[None, :] < index[:, None]).to(tl.int32), 1)
    rows = tl.sum(same, 1)
    # The first slot of a block that has an expert takes ranks for all of the block's.
    is_first = (earlier == 0) & (chosen >= 0)
    base = tl.atomic_add(counts + tl.maximum(chosen, 0), rows, mask=is_first, sem="relaxed")
    base = tl.where(is_first, base, 0)
    shared = tl.sum(same * base[None, :], 1)
    tl.store(rank + slot, shared + earlier, mask=(slot < num_slots) & (chosen >= 0))
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        expert = tl.arange(0, EXPERTS)
        total = tl.load(counts + expert, mask=expert < num_experts, other=0, cache_modifier=".cg")
        tl.store(offsets + expert, tl.cumsum(total, 0) - total, mask=expert < num_experts)


@triton.jit
def _gather(
    hidden, ids, rank, offsets, sorted_rows, place, num_slots, WIDTH: tl.constexpr,
    TOP_K: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies each token's row to where its expert's rows are, and says where that is.

    ``place`` must not be ``rank``: warps read the same ranks, and a fast one must not write over
    what a slow one has yet to read.
    """
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1)
    valid = chosen >= 0
    begin = tl.load(offsets + chosen, mask=valid, other=0)
    target = begin + tl.load(rank + slot, mask=valid, other=0)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        inside = valid[:, None] & (column < WIDTH)[None, :]
        source = hidden + (slot // TOP_K)[:, None].to(tl.int64) * WIDTH + column[None, :]
        row = tl.load(source, mask=inside, other=0.0)
        goal = sorted_rows + target[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(goal, row, mask=inside)
    tl.store(place + slot, target, mask=valid)


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
    tall_rows, short_rows, matrix, bias, out, counts, offsets, num_experts, num_columns,
    EXPERTS: tl.constexpr, DEPTH: tl.constexpr, TALL_HEIGHT: tl.constexpr,
    SHORT_HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH_STEP: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[rows of e] = activation(rows @ matrix[e].T + bias[e]), in tall tiles and short ones.

    Tall tiles keep the matrix units busy, short ones the memory: half of the programs begin with
    one kind and half with the other, so that both are.
    """
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


@dataclass(frozen=True)
class SortedRows:
    """Rows in expert order.

    Attributes:
        rows: [T * k, d_model]; behind the executed rows the content is undefined.
        place: [T * k] int32, where each executed (token, slot) went.
        counts: [num_experts] int32, rows of each expert.
        offsets: [num_experts] int32, where each expert's rows begin.
    """

    rows: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor


def sort_rows(hidden: torch.Tensor, expert_ids: torch.Tensor, num_experts: int) -> SortedRows:
    """Returns the rows of ``hidden`` [T, d_model], one per executed slot, by expert."""
    num_slots, width = expert_ids.numel(), hidden.shape[1]
    device = hidden.device
    counted = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    counts, finished = counted[:num_experts], counted[num_experts:]
    offsets = torch.empty_like(counts)
    rank = torch.empty(num_slots, dtype=torch.int32, device=device)
    place = torch.empty_like(rank)
    rows = torch.empty(num_slots, width, dtype=hidden.dtype, device=device)
    _count[(triton.cdiv(num_slots, _COUNT_BLOCK),)](
        expert_ids, counts, finished, rank, offsets, num_slots, num_experts, BLOCK=_COUNT_BLOCK,
        EXPERTS=next_power(num_experts), num_warps=4,
    )  # fmt: skip
    group, step = 4, min(next_power(width), _COPY_COLUMNS)
    _gather[(triton.cdiv(num_slots, group),)](
        hidden, expert_ids, rank, offsets, rows, place, num_slots, WIDTH=width,
        TOP_K=expert_ids.shape[1], STEP=step, ROWS=group,
    )  # fmt: skip
    return SortedRows(rows=rows, place=place, counts=counts, offsets=offsets)


def grouped_product(
    sent: SortedRows,
    rows: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gated: bool = False,
    activation: int = -1,
    tiles: ProductTiles,
) -> torch.Tensor:
    """Returns each row through its expert's matrix, bias and activation.

    Args:
        sent: Counts and offsets of the rows.
        rows: [n, depth], in expert order.
        matrix: [num_experts, columns, depth], or [num_experts, 2 * columns, depth] where gated.
        bias: [num_experts, rows of matrix] or None.
        gated: True where the first half of ``matrix`` gates the second.
        activation: Code of the activation; -1 for none.
        tiles: Tile sizes.
    """
    num_experts, matrix_rows, depth = matrix.shape
    columns = matrix_rows // 2 if gated else matrix_rows
    out = torch.empty(rows.shape[0], columns, dtype=rows.dtype, device=rows.device)
    processors = 1
    if rows.device.type == "cuda":
        processors = torch.cuda.get_device_properties(rows.device).multi_processor_count
    _product[(processors * tiles.programs,)](
        TensorDescriptor.from_tensor(rows, [TALL, tiles.depth]),
        TensorDescriptor.from_tensor(rows, [SHORT, tiles.depth]),
        TensorDescriptor.from_tensor(matrix.view(-1, depth), [tiles.columns, tiles.depth]),
        bias, out, sent.counts, sent.offsets, num_experts, columns,
        EXPERTS=next_power(num_experts), DEPTH=depth, TALL_HEIGHT=TALL, SHORT_HEIGHT=SHORT,
        COLUMNS=tiles.columns, DEPTH_STEP=tiles.depth, GATED=gated, BIAS=bias is not None,
        ACTIVATION=activation, FLATTEN=tiles.flatten,
        num_stages=tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def run_many(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    tiles_in: ProductTiles | None = None,
    tiles_out: ProductTiles | None = None,
) -> torch.Tensor:
    """Returns the layer's output for many tokens; arguments contiguous, as `dynamic` takes them.

    Args:
        hidden: [T, d_model], half precision.
        expert_ids: [T, k].
        weights: [T, k].
        experts: Contiguous weights.
        tiles_in: Tile sizes of the first product.
        tiles_out: Tile sizes of the second product.
    """
    sent = sort_rows(hidden, expert_ids, experts.num_experts)
    inner = grouped_product(
        sent, sent.rows, experts.w_in, experts.b_in, gated=experts.gated,
        activation=ACTIVATION_CODES[experts.activation],
        tiles=tiles_in or (GATED_IN_TILES if experts.gated else IN_TILES),
    )  # fmt: skip
    rows = grouped_product(sent, inner, experts.w_out, experts.b_out, tiles=tiles_out or OUT_TILES)
    out = torch.empty_like(hidden)
    num_tokens, width = hidden.shape
    group, step = 4, min(next_power(width), _COPY_COLUMNS)
    _combine[(triton.cdiv(num_tokens, group),)](
        rows, expert_ids, weights, sent.place, out, num_tokens, WIDTH=width,
        TOP_K=expert_ids.shape[1], STEP=step, TOKENS=group,
    )  # fmt: skip
    return out
