"""Rows in expert order, and tables of the tiles that cover them, made and kept on the device."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeprof.live.kernels.parts import next_power
from moeprof.live.kernels.tiles import HIGH, LOW, MOST_PARTLY_FILLED_PERCENT, TALL

COPY_COLUMNS = 1024
# int32 of a table's entry: expert, first row, rows from there on, nothing (16 bytes are aligned).
ENTRY = tl.constexpr(4)
_COUNT_BLOCK, _COUNT_WARPS = 32, 4


@triton.jit
def _count(
    ids, counts, finished, rank, offsets, starts, decided, num_slots, num_experts,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr, TALL_HEIGHT: tl.constexpr,
    LOW_HEIGHT: tl.constexpr, HIGH_HEIGHT: tl.constexpr, MOST_PERCENT: tl.constexpr,
):  # fmt: skip
    """Counts each expert's rows, ranks every slot among them, and says where rows begin.

    Expects ``counts`` and ``finished`` at zero. The last program to finish sums the counts up. With
    PAIRS it also says where each expert's tiles begin in the tables, and decides whether pairs run
    or single products: the tables of pairs that do not run have no entry.
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
        is_expert = expert < num_experts
        total = tl.load(counts + expert, mask=is_expert, other=0, cache_modifier=".cg")
        tl.store(offsets + expert, tl.cumsum(total, 0) - total, mask=is_expert)
        if PAIRS:
            is_tall = total > HIGH_HEIGHT
            tall = tl.where(is_tall, tl.cdiv(total, TALL_HEIGHT), 0)
            low = ((total > 0) & (total <= LOW_HEIGHT)).to(tl.int32)
            high = ((total > LOW_HEIGHT) & (total <= HIGH_HEIGHT)).to(tl.int32)
            tl.store(starts + expert, tl.cumsum(tall, 0) - tall, mask=is_expert)
            tl.store(starts + num_experts + expert, tl.cumsum(low, 0) - low, mask=is_expert)
            tl.store(starts + 2 * num_experts + expert, tl.cumsum(high, 0) - high, mask=is_expert)
            partly = tl.sum((is_tall & (total <= TALL_HEIGHT)).to(tl.int32))
            active = tl.sum((total > 0).to(tl.int32))
            paired = (partly * 100 <= active * MOST_PERCENT).to(tl.int32)
            tl.store(decided, tl.sum(tall) * paired)
            tl.store(decided + 1, tl.sum(low) * paired)
            tl.store(decided + 2, tl.sum(high) * paired)
            tl.store(decided + 3, paired)


@triton.jit
def _put(table, at, expert, first, left, mask):
    """Writes entries of a table of tiles."""
    tl.store(table + at * ENTRY, expert, mask=mask)
    tl.store(table + at * ENTRY + 1, first, mask=mask)
    tl.store(table + at * ENTRY + 2, left, mask=mask)


@triton.jit
def _gather(
    hidden, ids, rank, counts, offsets, starts, sorted_rows, place, tall_table, low_table,
    high_table, num_slots, num_experts, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, TALL_HEIGHT: tl.constexpr,
    LOW_HEIGHT: tl.constexpr, HIGH_HEIGHT: tl.constexpr,
):  # fmt: skip
    """Copies each token's row to where its expert's rows are, and says where that is.

    ``place`` must not be ``rank``: warps read the same ranks, and a fast one must not write over
    what a slow one has yet to read. With PAIRS, who copies the first row of a tile enters the tile.
    """
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    valid = chosen >= 0
    begin = tl.load(offsets + chosen, mask=valid, other=0)
    own = tl.load(rank + slot, mask=valid, other=0)
    target = begin + own
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        inside = valid[:, None] & (column < WIDTH)[None, :]
        source = hidden + (slot // TOP_K)[:, None].to(tl.int64) * WIDTH + column[None, :]
        row = tl.load(source, mask=inside, other=0.0)
        goal = sorted_rows + target[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(goal, row, mask=inside)
    tl.store(place + slot, target, mask=valid)
    if PAIRS:
        have = tl.load(counts + chosen, mask=valid, other=0)
        is_first = valid & (own % TALL_HEIGHT == 0)
        is_tall = is_first & (have > HIGH_HEIGHT)
        at = tl.load(starts + chosen, mask=is_tall, other=0) + own // TALL_HEIGHT
        _put(tall_table, at, chosen, target, have - own, is_tall)
        is_low = is_first & (have <= LOW_HEIGHT)
        at = tl.load(starts + num_experts + chosen, mask=is_low, other=0)
        _put(low_table, at, chosen, target, have, is_low)
        is_high = is_first & (have > LOW_HEIGHT) & (have <= HIGH_HEIGHT)
        at = tl.load(starts + 2 * num_experts + chosen, mask=is_high, other=0)
        _put(high_table, at, chosen, target, have, is_high)


@dataclass(frozen=True)
class TileTables:
    """The tiles of pairs; all int32.

    Attributes:
        tall: [most tiles, 4]: expert, first row, the expert's rows from there on, undefined.
        low: [num_experts, 4], of experts with up to `LOW` rows.
        high: [num_experts, 4], of experts with more rows than that, and up to `HIGH`.
        totals: [3], entries of each; zeros where single products run.
        paired: [1], 1 where pairs run and 0 where single products do.
        progress: [1], zero; how far the products of tall tiles are, written as they run.
        arrived: [1], zero; programs that have the first product of the others behind them.
    """

    tall: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    totals: torch.Tensor
    paired: torch.Tensor
    progress: torch.Tensor
    arrived: torch.Tensor


@dataclass(frozen=True)
class SortedRows:
    """Rows in expert order.

    Attributes:
        rows: [T * k, d_model]; behind the executed rows the content is undefined.
        place: [T * k] int32, where each executed (token, slot) went.
        counts: [num_experts] int32, rows of each expert.
        offsets: [num_experts] int32, where each expert's rows begin.
        tables: Tiles of pairs; None where pairs were not asked for.
    """

    rows: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    tables: TileTables | None


def sort_rows(
    hidden: torch.Tensor, expert_ids: torch.Tensor, num_experts: int, *, pairs: bool = False
) -> SortedRows:
    """Returns the rows of ``hidden`` [T, d_model], one per executed slot, by expert.

    Args:
        hidden: [T, d_model], contiguous.
        expert_ids: [T, k], contiguous; -1 where a slot is not executed.
        num_experts: Experts of the layer.
        pairs: True to let the device choose between single products and pairs.
    """
    num_slots, width = expert_ids.numel(), hidden.shape[1]
    device = hidden.device

    def integers(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counted = torch.zeros(num_experts + 3, dtype=torch.int32, device=device)
    counts, finished, progress, arrived = counted.split([num_experts, 1, 1, 1])
    offsets, rank, place = integers(num_experts), integers(num_slots), integers(num_slots)
    rows = torch.empty(num_slots, width, dtype=hidden.dtype, device=device)
    starts, decided, tables = None, None, None
    if pairs:
        starts, decided = integers(3, num_experts), integers(4)
        # Tall tiles are full ones, and the last one of each expert with more than HIGH rows.
        most_tall = num_slots // TALL + num_slots // (HIGH + 1) + 1
        tables = TileTables(
            tall=integers(most_tall, ENTRY.value),
            low=integers(num_experts, ENTRY.value),
            high=integers(num_experts, ENTRY.value),
            totals=decided[:3],
            paired=decided[3:],
            progress=progress,
            arrived=arrived,
        )
    heights = {"PAIRS": pairs, "TALL_HEIGHT": TALL, "LOW_HEIGHT": LOW, "HIGH_HEIGHT": HIGH}
    _count[(triton.cdiv(num_slots, _COUNT_BLOCK),)](
        expert_ids, counts, finished, rank, offsets, starts, decided, num_slots, num_experts,
        BLOCK=_COUNT_BLOCK, EXPERTS=next_power(num_experts),
        MOST_PERCENT=MOST_PARTLY_FILLED_PERCENT, num_warps=_COUNT_WARPS, **heights,
    )  # fmt: skip
    group, step = 4, min(next_power(width), COPY_COLUMNS)
    every = (tables.tall, tables.low, tables.high) if tables else (None, None, None)
    _gather[(triton.cdiv(num_slots, group),)](
        hidden, expert_ids, rank, counts, offsets, starts, rows, place, *every, num_slots,
        num_experts, WIDTH=width, TOP_K=expert_ids.shape[1], STEP=step, ROWS=group, **heights,
    )  # fmt: skip
    return SortedRows(rows=rows, place=place, counts=counts, offsets=offsets, tables=tables)
