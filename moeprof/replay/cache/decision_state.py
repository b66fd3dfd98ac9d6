"""All that compiled decisions know, in two arrays: caches, slots, what is ahead, the last decision.

`Residency` as arrays, laid out by the constants below: ``ints`` (int32) and ``longs`` (int64). They
never move, so that whoever reads a decision may hold its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.machine_state import NOBODY, NUM_FIELDS, MachineState
from moeprof.replay.cache.residency import NO_SLOT, CacheSpec
from moeprof.replay.compiled import inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

# Rows of a decision's columns.
EXPERT, ROWS, HIT, SLOT, LOADS, ON_HOST, AFTER, AHEAD = range(8)
NUM_COLUMNS = 8
# Rows of what is copied ahead.
SITE, FETCHED_EXPERT, FETCHED_SLOT, FETCHED_AFTER = range(4)
NUM_FETCHED_COLUMNS = 4

# ``longs`` begin with the counts of the last decision, ...
NUM_EXPERTS, NUM_PIECES, NUM_COPIES, NUM_ON_HOST = range(4)
NUM_COUNTS = 4
# ... then lookups so far and what stays: sizes, where tables begin in ``longs`` and arrays in
# ``ints``. The first of those are the columns, at 0.
LOOKUPS, MOST_EXPERTS, PREFETCH, NUM_CACHES = range(4, 8)
SITES, CACHES, POOLS, STACKS, READERS = range(8, 13)
PIECE_STARTS, PIECE_PLACES, COPY_STARTS, COPY_PLACES, FETCHED = range(13, 18)
MARKS, LEVELS, PER_LEVEL, SCORES = range(18, 22)
NUM_HEADER = 22

# Rows of the tables. A site's cache is `NOBODY` where it has none.
SITE_CACHE, SITE_FIRST_KEY, SITE_EXPERTS, SITE_ID, SITE_NEXT, SITE_STACK, SITE_PAIRS = range(7)
SITE_FIELDS = 7
# A cache: its machine's own numbers, then where its blocks lie.
CACHE_NODES, CACHE_NODES_END, CACHE_WIDE, CACHE_WIDE_END, CACHE_POOL = range(
    NUM_FIELDS, NUM_FIELDS + 5
)
CACHE_FIELDS = NUM_FIELDS + 5
# A pool: the ring of its free slots, and (site, expert, slot) of what is ahead, first copied first.
RING, RING_SIZE, RING_FIRST, NUM_FREE, POOL_AHEAD, NUM_AHEAD = range(6)
POOL_FIELDS = 6
AHEAD_FIELDS = 3
# A stack: what was looked up last.
LAST_SITE, NUM_LAST, LAST_EXPERTS = range(3)
STACK_FIELDS = 3

# What decisions return instead of a count.
NO_SUCH_EXPERT, NO_FREE_SLOT, NO_SUCH_SLOT = -1, -2, -3


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionState:
    """The arrays.

    Attributes:
        ints: See the module.
        longs: See the module.
        pairs: Counts of pairs of experts (`Foresight`), by `SITE_PAIRS` of the first's site.
        index: Row of each site in the table of sites.
    """

    ints: Int32s
    longs: Int64s
    pairs: Int32s
    index: dict[int, int]


class _Blocks:
    """Arrays put one after another."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.integer]] = []
        self.length = 0

    def put(self, part: NDArray[np.integer]) -> int:
        """Returns where the array begins."""
        start = self.length
        self.parts.append(part.reshape(-1))
        self.length += part.size
        return start


def make_state(
    caches: Sequence[CacheSpec],
    machines: Sequence[MachineState],
    pools: Sequence[int],
    *,
    prefetch: int,
    foresight: Foresight | None,
) -> DecisionState:
    """Returns the arrays of empty caches; all but ``machines`` as `Residency` takes it."""
    stacks = foresight.stacks if foresight is not None and prefetch else ()
    count_of = {site: count for cache in caches for site, count in cache.sites}
    for site, count in (each for sites in stacks for each in sites):
        assert count_of.setdefault(site, count) == count, "the caches know another site"
    in_stacks = {site for sites in stacks for site, _ in sites}
    assert not stacks or in_stacks.issuperset(site for cache in caches for site, _ in cache.sites)
    index = {site: number for number, site in enumerate(count_of)}
    most = max(count_of.values())
    ints, longs = _Blocks(), _Blocks()
    header = np.zeros(NUM_HEADER, np.int64)
    longs.put(header)
    header[[MOST_EXPERTS, PREFETCH, NUM_CACHES]] = most, prefetch, len(caches)
    ints.put(np.zeros(NUM_COLUMNS * most, np.int32))
    for field, length in (
        (PIECE_STARTS, most + 1),
        (PIECE_PLACES, most),
        (COPY_STARTS, most + 2),
        (COPY_PLACES, most),
        (FETCHED, NUM_FETCHED_COLUMNS * max(prefetch, 1)),
        (MARKS, most),
        (LEVELS, most),
        # Levels count from 0, and a chain of copies begins at 2.
        (PER_LEVEL, most + 3),
        (SCORES, most),
    ):
        header[field] = ints.put(np.zeros(length, np.int32))
    sites, pairs = _sites(caches, stacks, count_of, index)
    header[SITES] = longs.put(sites)
    header[CACHES] = longs.put(_caches(caches, machines, ints, longs))
    header[POOLS] = longs.put(_pools(pools, prefetch, ints))
    last = [[NOBODY, 0, ints.put(np.zeros(most, np.int32))] for _ in stacks]
    header[STACKS] = longs.put(np.array(last, np.int64))
    header[READERS] = longs.put(np.full(sum(pools), NOBODY, np.int64))
    return DecisionState(
        ints=np.concatenate(ints.parts).astype(np.int32),
        longs=np.concatenate(longs.parts).astype(np.int64),
        pairs=pairs,
        index=index,
    )


def _sites(
    caches: Sequence[CacheSpec],
    stacks: Sequence[Sequence[tuple[int, int]]],
    count_of: dict[int, int],
    index: dict[int, int],
) -> tuple[Int64s, Int32s]:
    """Returns the table of sites and the counts of pairs."""
    table = np.full((len(index), SITE_FIELDS), NOBODY, np.int64)
    for site, row in index.items():
        table[row, [SITE_ID, SITE_EXPERTS]] = site, count_of[site]
    for number, cache in enumerate(caches):
        first = 0
        for site, count in cache.sites:
            table[index[site], [SITE_CACHE, SITE_FIRST_KEY]] = number, first
            first += count
    num_pairs = 0
    for number, in_stack in enumerate(stacks):
        for (site, count), (after, others) in zip(
            in_stack, [*in_stack[1:], in_stack[0]], strict=True
        ):
            fields = [SITE_NEXT, SITE_STACK, SITE_PAIRS]
            table[index[site], fields] = index[after], number, num_pairs
            num_pairs += count * others
    return table, np.zeros(num_pairs, np.int32)


def _caches(
    caches: Sequence[CacheSpec], machines: Sequence[MachineState], ints: _Blocks, longs: _Blocks
) -> Int64s:
    """Puts the caches' blocks and returns the table of caches."""
    table = np.zeros((len(caches), CACHE_FIELDS), np.int64)
    for row, cache, machine in zip(table, caches, machines, strict=True):
        nodes, wide = ints.put(machine.nodes), longs.put(machine.wide)
        row[:NUM_FIELDS] = machine.own
        row[NUM_FIELDS:] = nodes, ints.length, wide, longs.length, cache.pool
    return table


def _pools(pools: Sequence[int], prefetch: int, ints: _Blocks) -> Int64s:
    """Puts the pools' arrays and returns the table of pools."""
    table = np.zeros((len(pools), POOL_FIELDS), np.int64)
    first = 0
    for row, count in zip(table, pools, strict=True):
        ring = ints.put(np.arange(first, first + count, dtype=np.int32))
        ahead = ints.put(np.zeros(AHEAD_FIELDS * prefetch, np.int32))
        row[:] = ring, count, 0, count, ahead, 0
        first += count
    return table


@inlined("void(int32[::1], int64[::1], int64, int64)", allocates=False)
def release(ints, longs, pool, slot):  # type: ignore[no-untyped-def]
    """Frees a slot, behind all that are free."""
    place = longs[pool + RING_FIRST] + longs[pool + NUM_FREE]
    if place >= longs[pool + RING_SIZE]:
        place -= longs[pool + RING_SIZE]
    ints[longs[pool + RING] + place] = slot
    longs[pool + NUM_FREE] += 1


@inlined("int64(int32[::1], int64[::1], int64)", allocates=False)
def take(ints, longs, pool):  # type: ignore[no-untyped-def]
    """Returns the slot that is free for longest, or `NO_SLOT`."""
    if longs[pool + NUM_FREE] == 0:
        return NO_SLOT
    place = longs[pool + RING_FIRST]
    longs[pool + NUM_FREE] -= 1
    longs[pool + RING_FIRST] = place + 1 if place + 1 < longs[pool + RING_SIZE] else 0
    return ints[longs[pool + RING] + place]
