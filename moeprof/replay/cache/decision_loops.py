"""Compiled decisions on the arrays of `decision_state`: `Residency`, and the order of its pieces.

One call decides a dispatch. Every helper says what of `residency`, `pieces` or `foresight` it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache.decision_pieces import order_copies, order_pieces
from moeprof.replay.cache.decision_state import (
    AFTER,
    AHEAD,
    AHEAD_FIELDS,
    CACHE_FIELDS,
    CACHE_NODES,
    CACHE_NODES_END,
    CACHE_POOL,
    CACHE_WIDE,
    CACHE_WIDE_END,
    CACHES,
    EXPERT,
    HIT,
    LEVELS,
    LOADS,
    LOOKUPS,
    MARKS,
    MOST_EXPERTS,
    NO_FREE_SLOT,
    NO_SUCH_EXPERT,
    NO_SUCH_SLOT,
    NUM_AHEAD,
    NUM_CACHES,
    NUM_COPIES,
    NUM_EXPERTS,
    NUM_ON_HOST,
    NUM_PIECES,
    ON_HOST,
    POOL_AHEAD,
    POOL_FIELDS,
    POOLS,
    READERS,
    ROWS,
    SITE_CACHE,
    SITE_EXPERTS,
    SITE_FIELDS,
    SITE_FIRST_KEY,
    SITES,
    SLOT,
    release,
    take,
)
from moeprof.replay.cache.machine_state import (
    BEFORE,
    CAPACITY,
    CURSOR,
    KIND,
    NOBODY,
    NUM_KEYS,
    OF,
    PAPER,
    SLOT_OF,
    WIDTH,
)
from moeprof.replay.cache.residency import AT_ONCE, NO_SLOT
from moeprof.replay.cache.sequential_machines import hit, miss, place_first
from moeprof.replay.compiled import compiled, inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

# What `decide` is given: an expert per slot, or columns that are filled in.
CHOSEN, GIVEN = range(2)
# A mark of an expert: inactive, active, or more: active and ahead, in the slot of this mark - 2.
_INACTIVE, _ACTIVE, _IS_AHEAD = range(3)
# Levels of `pieces_of`.
_HITS, _AHEADS, _COPIES = range(3)


@inlined("int64(int32[::1], int64[::1], int64)", allocates=False)
def _activate(ints, longs, count):  # type: ignore[no-untyped-def]
    """Lists the experts that have rows in the marks, ascending, and marks them active."""
    most, marks = longs[MOST_EXPERTS], longs[MARKS]
    rows_at = ROWS * most
    active: Any = 0
    for expert in range(count):
        rows = ints[marks + expert]
        # Without a branch: who is inactive is overwritten by the next.
        ints[EXPERT * most + active] = expert
        ints[rows_at + active] = rows
        is_active = np.int64(rows > 0)
        ints[marks + expert] = is_active
        active += is_active
    return active


@inlined("int64(int32[::1], int64[::1], int64[::1], int64, int64, int64)", allocates=False)
def _read(ints, longs, chosen, num, given, count):  # type: ignore[no-untyped-def]
    """Lists and marks active experts; returns their number, or what is wrong."""
    most, marks = longs[MOST_EXPERTS], longs[MARKS]
    if given != GIVEN and num > len(chosen):
        return NO_SUCH_SLOT
    if given == CHOSEN:
        for slot in range(num):
            expert = chosen[slot]
            if expert >= count:
                for earlier in range(count):
                    ints[marks + earlier] = _INACTIVE
                return NO_SUCH_EXPERT
            if expert >= 0:
                ints[marks + expert] += 1
        return _activate(ints, longs, count)
    for place in range(num):
        ints[marks + ints[EXPERT * most + place]] = _ACTIVE
    return num


@inlined("void(int32[::1], int64[::1], int64, int64)", allocates=False)
def _take_ahead(ints, longs, pool, site):  # type: ignore[no-untyped-def]
    """Marks active experts that are ahead, frees the site's others (`Residency._taken_ahead`)."""
    marks, first = longs[MARKS], longs[pool + POOL_AHEAD]
    kept = 0
    for each in range(longs[pool + NUM_AHEAD]):
        at = first + AHEAD_FIELDS * each
        expert, slot = ints[at + 1], ints[at + 2]
        if ints[at] != site:
            to = first + AHEAD_FIELDS * kept
            ints[to], ints[to + 1], ints[to + 2] = ints[at], expert, slot
            kept += 1
        elif ints[marks + expert] == _INACTIVE:
            release(ints, longs, pool, slot)
        else:
            ints[marks + expert] = _IS_AHEAD + slot
    longs[pool + NUM_AHEAD] = kept


@inlined("int64(int32[::1], int64[::1], int64, int64, int64)", allocates=False)
def _look_up(  # type: ignore[no-untyped-def]  # noqa: PLR0912, PLR0915
    ints, longs, site, active, host_rows
):
    """Fills columns and levels (`Residency.plan`, `pieces_of`); returns whether slots sufficed."""
    most, marks, levels, readers = longs[MOST_EXPERTS], longs[MARKS], longs[LEVELS], longs[READERS]
    first_key = longs[site + SITE_FIRST_KEY]
    row = longs[CACHES] + longs[site + SITE_CACHE] * CACHE_FIELDS
    pool = longs[POOLS] + longs[row + CACHE_POOL] * POOL_FIELDS
    own = longs[row : row + CACHE_NODES]
    nodes = ints[longs[row + CACHE_NODES] : longs[row + CACHE_NODES_END]]
    wide = longs[longs[row + CACHE_WIDE] : longs[row + CACHE_WIDE_END]]
    width = own[WIDTH]
    slot_of = SLOT_OF * width
    begun = longs[LOOKUPS]
    longs[LOOKUPS] = begun + active
    if own[KIND] == PAPER:
        own[CURSOR] = nodes[BEFORE * width + own[NUM_KEYS]]
        for place in range(active):
            nodes[OF * width + first_key + ints[EXPERT * most + place]] = 1
    for place in range(active):
        expert = np.int64(ints[EXPERT * most + place])
        key = first_key + expert
        mark = np.int64(ints[marks + expert])
        ints[marks + expert] = _INACTIVE
        slot = np.int64(nodes[slot_of + key])
        is_hit = slot != NO_SLOT
        level = _HITS
        loads: Any = False
        on_host: Any = False
        is_ahead: Any = False
        after = np.int64(AT_ONCE)
        if is_hit:
            hit(own, nodes, wide, key)
        else:
            left = miss(own, nodes, wide, key)
            is_kept = left != key
            if is_kept and left != NOBODY:
                release(ints, longs, pool, nodes[slot_of + left])
                nodes[slot_of + left] = NO_SLOT
            is_ahead = mark >= _IS_AHEAD
            on_host = not is_ahead and ints[ROWS * most + place] <= host_rows
            if is_ahead:
                slot = mark - _IS_AHEAD
                level = _AHEADS
            elif is_kept or not on_host:
                slot = take(ints, longs, pool)
                if slot == NO_SLOT:
                    return False
                loads = True
                level = _COPIES
                if longs[readers + slot] >= begun:
                    after = longs[readers + slot] - begun
                    level = max(level, ints[levels + after] + 1)
            if slot != NO_SLOT:
                if is_kept:
                    nodes[slot_of + key] = slot
                else:
                    release(ints, longs, pool, slot)
        if not on_host:
            longs[readers + slot] = begun + place
        ints[HIT * most + place] = is_hit
        ints[SLOT * most + place] = slot
        ints[LOADS * most + place] = loads
        ints[ON_HOST * most + place] = on_host
        ints[AFTER * most + place] = after
        ints[AHEAD * most + place] = is_ahead
        ints[levels + place] = level
        longs[NUM_COPIES] += loads
        longs[NUM_ON_HOST] += on_host
    if longs[NUM_ON_HOST]:
        for place in range(active):
            if not (ints[ON_HOST * most + place] and ints[LOADS * most + place]):
                continue
            key = first_key + ints[EXPERT * most + place]
            if nodes[slot_of + key] != ints[SLOT * most + place]:
                # Nobody reads it: not in this dispatch, and it is gone after it.
                ints[LOADS * most + place] = False
                ints[SLOT * most + place] = NO_SLOT
                longs[NUM_COPIES] -= 1
    if own[KIND] == PAPER:
        for place in range(active):
            nodes[OF * width + first_key + ints[EXPERT * most + place]] = 0
    return True


@compiled("int64(int32[::1], int64[::1], int64[::1], int64, int64, int64, int64)", allocates=False)
def decide(
    ints: Int32s,
    longs: Int64s,
    chosen: Int64s,
    num: int,
    given: int,
    index: int,
    host_rows: int,
) -> int:
    """Decides a dispatch; returns its active experts, or below 0 what is wrong.

    Args:
        ints: Of `decision_state`.
        longs: Of `decision_state`.
        chosen: [num or more] what ``given`` says; of `GIVEN` nothing.
        num: Entries.
        given: `CHOSEN` (negative: nobody) or `GIVEN`.
        index: Row of the site.
        host_rows: Misses of at most so many rows are computed on the host.
    """
    site = longs[SITES] + index * SITE_FIELDS
    active: int = _read(ints, longs, chosen, num, given, longs[site + SITE_EXPERTS])
    if active < 0:
        return active
    longs[NUM_EXPERTS] = active
    longs[NUM_PIECES] = longs[NUM_COPIES] = longs[NUM_ON_HOST] = 0
    # Slots without experts are no dispatch: what is ahead stays ahead.
    if active or given == GIVEN:
        row = longs[CACHES] + longs[site + SITE_CACHE] * CACHE_FIELDS
        pool = longs[POOLS] + longs[row + CACHE_POOL] * POOL_FIELDS
        if longs[pool + NUM_AHEAD]:
            _take_ahead(ints, longs, pool, index)
        if not _look_up(ints, longs, site, active, host_rows):
            return NO_FREE_SLOT
    order_pieces(ints, longs, active)
    order_copies(ints, longs, active)
    return active


@compiled("void(int32[::1], int64[::1])", allocates=False)
def fill(ints: Int32s, longs: Int64s) -> None:
    """Fills empty caches with their lowest keys."""
    for number in range(longs[NUM_CACHES]):
        row = longs[CACHES] + number * CACHE_FIELDS
        pool = longs[POOLS] + longs[row + CACHE_POOL] * POOL_FIELDS
        own = longs[row : row + CACHE_NODES]
        nodes = ints[longs[row + CACHE_NODES] : longs[row + CACHE_NODES_END]]
        wide = longs[longs[row + CACHE_WIDE] : longs[row + CACHE_WIDE_END]]
        for key in range(min(own[CAPACITY], own[NUM_KEYS])):
            place_first(own, nodes, wide, key)
            nodes[SLOT_OF * own[WIDTH] + key] = take(ints, longs, pool)
