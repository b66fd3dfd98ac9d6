"""The lru curve of a trace of any length: read once, in bounded memory.

Layer scope, ``batch``, all capacities. Leaves out requests and intervals (`study`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay.cache import curves, flat
from moeprof.replay.compiled import compiled
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


def lru_curve(trace: Trace) -> pd.DataFrame:
    """Returns hits of per-layer lru caches under ``batch`` at every number of slots.

    Columns site, layer, capacity, num_lookups, num_hits. Every rank has caches of its own; the
    counts of all ranks are added up.

    Args:
        trace: The trace.

    Raises:
        UsageError: The ranks share devices; see `moeprof.replay.buffering`.
    """
    if any(rank.expert_parallel for rank in trace.info.ranks):
        raise UsageError(
            "the curve cannot be streamed over expert-parallel ranks",
            hint="use moeprof.replay.buffering with a list of capacities",
        )
    lookups = {site.site: 0 for site in trace.sites}
    misses = {site.site: np.zeros(site.num_experts, np.int64) for site in trace.sites}
    for stack in trace.stacks:
        states: dict[tuple[int, int], curves.LruState] = {}
        sites = trace.info.sites_of(stack)
        for block in trace.blocks(stack):
            expert = block.expert.astype(np.int32)
            if block.status.any():
                expert[block.status != schema.SlotStatus.ROUTED] = schema.NO_EXPERT
            room = len(expert) * max(site.top_k for site in sites)
            key, last, hit = np.empty((3, room), np.int32)
            offset = np.empty(len(expert) + 1, np.int64)
            for site in sites:
                place = (int(block.rank[0]), site.site)
                if place not in states:
                    states[place] = curves.LruState.empty(site.num_experts)
                num = _gather_sets(
                    block.step, expert, site.first_slot, site.top_k, site.num_experts, offset,
                    key, last,
                )  # fmt: skip
                count = int(offset[num])
                curves.lru_batch(
                    offset[: num + 1], key[:count], last[:count], site.num_experts, hit[:count],
                    states[place],
                )  # fmt: skip
                lookups[site.site] += count
                misses[site.site] += flat.misses_from_reach(hit[:count], site.num_experts)
    frames = [
        pd.DataFrame(
            {
                "site": site.site,
                "layer": site.layer,
                "capacity": np.arange(1, site.num_experts + 1),
                "num_lookups": lookups[site.site],
                "num_hits": lookups[site.site] - misses[site.site],
            }
        )
        for site in trace.sites
    ]
    return pd.concat(frames, ignore_index=True)


@compiled(
    "int64(int32[::1], int32[:, ::1], int64, int64, int64, int64[::1], int32[::1], int32[::1])"
)
def _gather_sets(
    step: Int32s,
    expert: NDArray[Any],
    first_slot: int,
    top_k: int,
    num_experts: int,
    offset: Int64s,
    key: Int32s,
    last: Int32s,
) -> int:
    """Fills the dispatches of one site as sets; returns how many there are."""
    index_of = np.full(num_experts, -1, np.int64)
    seen = np.zeros(num_experts, np.int64)
    num_rows = len(step)
    num_lookups = 0
    num_dispatches = 0
    row = 0
    offset[0] = 0
    while row < num_rows:
        current = step[row]
        first_row = row
        first = num_lookups
        while row < num_rows and step[row] == current:
            for slot in range(first_slot, first_slot + top_k):
                chosen = expert[row, slot]
                if chosen >= 0 and index_of[chosen] < first:
                    index_of[chosen] = num_lookups
                    key[num_lookups] = chosen
                    num_lookups += 1
            row += 1
        if num_lookups == first:
            continue
        num_dispatches += 1
        offset[num_dispatches] = num_lookups
        if row - first_row == 1:
            for lookup in range(first, num_lookups):
                last[lookup] = lookup
            continue
        place = num_lookups - 1
        back = row - 1
        while place >= first:
            for slot in range(first_slot + top_k - 1, first_slot - 1, -1):
                chosen = expert[back, slot]
                if chosen >= 0 and seen[chosen] != num_dispatches:
                    seen[chosen] = num_dispatches
                    last[place] = index_of[chosen]
                    place -= 1
            back -= 1
    return num_dispatches
