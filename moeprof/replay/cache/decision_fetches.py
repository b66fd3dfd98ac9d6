"""What is copied ahead, compiled: `Foresight` and `Residency.fetch_ahead` on `decision_state`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache.decision_state import (
    AHEAD_FIELDS,
    CACHE_FIELDS,
    CACHE_NODES,
    CACHE_POOL,
    CACHES,
    FETCHED,
    FETCHED_AFTER,
    FETCHED_EXPERT,
    FETCHED_SLOT,
    LAST_EXPERTS,
    LAST_SITE,
    LOOKUPS,
    NO_FREE_SLOT,
    NO_SUCH_EXPERT,
    NUM_AHEAD,
    NUM_EXPERTS,
    NUM_LAST,
    POOL_AHEAD,
    POOL_FIELDS,
    POOLS,
    PREFETCH,
    READERS,
    SCORES,
    SITE,
    SITE_CACHE,
    SITE_EXPERTS,
    SITE_FIELDS,
    SITE_FIRST_KEY,
    SITE_ID,
    SITE_NEXT,
    SITE_PAIRS,
    SITE_STACK,
    SITES,
    STACK_FIELDS,
    STACKS,
    release,
    take,
)
from moeprof.replay.cache.machine_state import (
    NOBODY,
    SLOT_OF,
    WIDTH,
)
from moeprof.replay.cache.residency import AT_ONCE, NO_SLOT
from moeprof.replay.compiled import compiled, inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@inlined("void(int32[::1], int64[::1], int32[::1], int64, int32[::1], int64)", allocates=False)
def _learn(ints, longs, pairs, index, experts, num):  # type: ignore[no-untyped-def]
    """Takes the active experts of a dispatch (`Foresight.learn`)."""
    site = longs[SITES] + index * SITE_FIELDS
    stack = longs[STACKS] + longs[site + SITE_STACK] * STACK_FIELDS
    last = longs[stack + LAST_EXPERTS]
    if longs[stack + LAST_SITE] != NOBODY:
        before = longs[SITES] + longs[stack + LAST_SITE] * SITE_FIELDS
        if longs[before + SITE_NEXT] == index:
            count = longs[site + SITE_EXPERTS]
            for earlier in range(longs[stack + NUM_LAST]):
                row = longs[before + SITE_PAIRS] + ints[last + earlier] * count
                for each in range(num):
                    pairs[row + experts[each]] += 1
    longs[stack + LAST_SITE] = index
    longs[stack + NUM_LAST] = num
    for each in range(num):
        ints[last + each] = experts[each]


@inlined("int64(int32[::1], int64[::1], int32[::1], int64, int32[::1], int64)", allocates=False)
def _likeliest(ints, longs, pairs, index, experts, num):  # type: ignore[no-untyped-def]
    """Lists as `FETCHED_EXPERT` the likeliest that are absent, at most `PREFETCH` of them.

    As `Foresight.ranked` ranks them: ties lower id, only those seen. Returns their number.
    """
    site = longs[SITES] + index * SITE_FIELDS
    upcoming = longs[SITES] + longs[site + SITE_NEXT] * SITE_FIELDS
    if longs[upcoming + SITE_CACHE] == NOBODY:
        return 0
    count, scores = longs[upcoming + SITE_EXPERTS], longs[SCORES]
    for other in range(count):
        ints[scores + other] = 0
    for each in range(num):
        row = longs[site + SITE_PAIRS] + experts[each] * count
        for other in range(count):
            ints[scores + other] += pairs[row + other]
    cache = longs[CACHES] + longs[upcoming + SITE_CACHE] * CACHE_FIELDS
    slot_of = (
        longs[cache + CACHE_NODES]
        + SLOT_OF * longs[cache + WIDTH]
        + longs[upcoming + SITE_FIRST_KEY]
    )
    prefetch = longs[PREFETCH]
    found_at = longs[FETCHED] + FETCHED_EXPERT * prefetch
    found = 0
    for other in range(count):
        score = ints[scores + other]
        if score == 0 or ints[slot_of + other] != NO_SLOT:
            continue
        place = found
        while place > 0 and ints[scores + ints[found_at + place - 1]] < score:
            place -= 1
        if place == prefetch:
            continue
        found = min(found + 1, prefetch)
        for later in range(found - 1, place, -1):
            ints[found_at + later] = ints[found_at + later - 1]
        ints[found_at + place] = other
    return found


@inlined("int64(int32[::1], int64[::1], int64, int64, int64)", allocates=False)
def _drop(ints, longs, pool, upcoming, found):  # type: ignore[no-untyped-def]
    """Leaves of the likeliest those not ahead, and makes room for them; returns their number."""
    prefetch = longs[PREFETCH]
    found_at = longs[FETCHED] + FETCHED_EXPERT * prefetch
    ahead_at = longs[pool + POOL_AHEAD]
    # Who is ahead and likely stays: marked by a site that there is not, -1 - site.
    wanted = 0
    for each in range(found):
        expert = ints[found_at + each]
        is_ahead = False
        for other in range(longs[pool + NUM_AHEAD]):
            at = ahead_at + AHEAD_FIELDS * other
            if ints[at] == upcoming and ints[at + 1] == expert:
                ints[at] = -1 - upcoming
                is_ahead = True
        if not is_ahead:
            ints[found_at + wanted] = expert
            wanted += 1
    too_many = longs[pool + NUM_AHEAD] + wanted - prefetch
    kept = 0
    for each in range(longs[pool + NUM_AHEAD]):
        at = ahead_at + AHEAD_FIELDS * each
        site, expert, slot = ints[at], ints[at + 1], ints[at + 2]
        if site >= 0 and too_many > 0:
            release(ints, longs, pool, slot)
            too_many -= 1
            continue
        to = ahead_at + AHEAD_FIELDS * kept
        ints[to], ints[to + 1], ints[to + 2] = site if site >= 0 else -1 - site, expert, slot
        kept += 1
    longs[pool + NUM_AHEAD] = kept
    return wanted


@compiled("int64(int32[::1], int64[::1], int32[::1], int64, int32[::1], int64)", allocates=False)
def foresee(
    ints: Int32s, longs: Int64s, pairs: Int32s, index: int, experts: Int32s, num: int
) -> int:
    """Says what is copied ahead (`Residency.fetch_ahead`); returns how much, or what is wrong.

    Args:
        ints: Of `decision_state`.
        longs: Of `decision_state`.
        pairs: Of `decision_state`.
        index: Row of the site that was decided last.
        experts: [num or more] its active experts.
        num: How many; at least one.
    """
    count = longs[longs[SITES] + index * SITE_FIELDS + SITE_EXPERTS]
    for each in range(num):
        if experts[each] < 0 or experts[each] >= count:
            return NO_SUCH_EXPERT
    _learn(ints, longs, pairs, index, experts, num)
    found = _likeliest(ints, longs, pairs, index, experts, num)
    if found == 0:
        return 0
    upcoming = longs[longs[SITES] + index * SITE_FIELDS + SITE_NEXT]
    site = longs[SITES] + upcoming * SITE_FIELDS
    cache = longs[CACHES] + longs[site + SITE_CACHE] * CACHE_FIELDS
    pool = longs[POOLS] + longs[cache + CACHE_POOL] * POOL_FIELDS
    wanted: int = _drop(ints, longs, pool, upcoming, found)
    prefetch, fetched = longs[PREFETCH], longs[FETCHED]
    slots = fetched + FETCHED_SLOT * prefetch
    begun = longs[LOOKUPS] - longs[NUM_EXPERTS]
    num_unread = 0
    for each in range(wanted):
        slot = take(ints, longs, pool)
        if slot == NO_SLOT:
            return NO_FREE_SLOT
        # Slots that nobody has read come first.
        place = each
        if longs[longs[READERS] + slot] < begun:
            place = num_unread
            num_unread += 1
        for later in range(each, place, -1):
            ints[slots + later] = ints[slots + later - 1]
        ints[slots + place] = slot
    for each in range(wanted):
        slot = ints[slots + each]
        reader = longs[longs[READERS] + slot]
        expert = ints[fetched + FETCHED_EXPERT * prefetch + each]
        ints[fetched + SITE * prefetch + each] = longs[site + SITE_ID]
        ints[fetched + FETCHED_AFTER * prefetch + each] = (
            reader - begun if reader >= begun else AT_ONCE
        )
        at = longs[pool + POOL_AHEAD] + AHEAD_FIELDS * longs[pool + NUM_AHEAD]
        ints[at], ints[at + 1], ints[at + 2] = upcoming, expert, slot
        longs[pool + NUM_AHEAD] += 1
    return wanted
