"""Misses of one lookup after another, as fast as they can be counted.

For flat streams of many keys of one size (all experts of a model in one cache), where only the
number of misses counts: no dispatches, no phases, no requests. lru and fifo keep no list: the trace
itself is the queue. min keeps no keys: a lookup hits where its own time is marked as a next use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import curves, kernels, policies
from moeprof.replay.cache.loops import append, leading_zeros, unlink
from moeprof.replay.compiled import compiled

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

POLICIES = ("lru", "fifo", "lifo", "lfu", "s3fifo", "arc", "min")
CURVES = ("lru", "lifo", "min")

_GHOST, _RESIDENT = 1, 2
_T1, _T2, _B1, _B2 = 1, 2, 3, 4
_PROMOTION, _MOST = policies.S3_PROMOTION, policies.S3_MAX_FREQUENCY


def num_misses(policy: str, key: Int32s, *, num_keys: int, capacity: int) -> int:
    """Returns the misses of a policy.

    Args:
        policy: One of `POLICIES`.
        key: [lookups].
        num_keys: Keys count from 0.
        capacity: Slots.
    """
    if policy == "lru":
        return lru(key, num_keys, capacity)
    if policy == "fifo":
        return fifo(key, num_keys, capacity)
    if policy == "lifo":
        return lifo(key, num_keys, capacity)
    if policy == "lfu":
        return lfu(key, num_keys, capacity)
    if policy == "arc":
        return arc(key, num_keys, capacity)
    if policy == "s3fifo":
        return s3fifo(key, num_keys, capacity, *policies.s3_shares(capacity))
    assert policy == "min"
    next_use = np.empty(len(key), np.int32)
    fill_next_use(key, num_keys, next_use)
    return minimum(next_use, num_keys, capacity)


def misses_at_all_capacities(policy: str, key: Int32s, *, num_keys: int) -> Int64s:
    """Returns [num_keys] misses at capacities 1, 2, ... in one pass.

    Args:
        policy: One of `CURVES`.
        key: [lookups].
        num_keys: Keys count from 0.
    """
    reach = np.empty(len(key), np.int32)
    if policy == "lru":
        curves.lru_flat(key, num_keys, reach)
    elif policy == "lifo":
        curves.lifo_flat(key, num_keys, reach)
    else:
        assert policy == "min"
        whole = np.array([0, len(key)], np.int64)
        next_use = kernels.next_uses(whole, key, one_by_one=True, num_keys=num_keys)
        curves.min_flat(key, next_use, num_keys, False, reach)
    return misses_from_reach(reach, num_keys)


def misses_from_reach(reach: Int32s, num_capacities: int) -> Int64s:
    """Returns misses at capacities 1, 2, ... of lookups with these reaches (`curves.Reach`)."""
    counts = np.zeros(num_capacities + 1, np.int64)
    _count(reach, counts)
    return len(reach) - np.cumsum(counts)[1:]


@compiled("void(int32[::1], int64[::1])")
def _count(reach: Int32s, counts: Int64s) -> None:
    for lookup in range(len(reach)):
        if reach[lookup] < len(counts):
            counts[reach[lookup]] += 1


@compiled("int64(int32[::1], int64, int64)")
def lru(key: Int32s, num_keys: int, capacity: int) -> int:
    """Counts misses of lru: the oldest position that is its key's last use leaves."""
    newest = np.full(num_keys, -1, np.int32)
    oldest = 0
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        if newest[chosen] < oldest:
            num_misses += 1
            if num_misses > capacity:
                while newest[key[oldest]] != oldest:
                    oldest += 1
                oldest += 1
        newest[chosen] = lookup
    return num_misses


@compiled("int64(int32[::1], int64, int64)")
def fifo(key: Int32s, num_keys: int, capacity: int) -> int:
    """Counts misses of fifo: what came in less than C misses ago is still there."""
    entered = np.full(num_keys, -capacity, np.int64)
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        gone = num_misses - entered[chosen] >= capacity
        num_misses += gone
        entered[chosen] = num_misses if gone else entered[chosen]
    return num_misses


@compiled("int64(int32[::1], int64, int64)")
def lifo(key: Int32s, num_keys: int, capacity: int) -> int:
    """Counts misses of lifo: the first C - 1 keys stay for good, the last miss has the slot."""
    for_good = np.zeros(num_keys, np.bool_)
    num_for_good = 0
    slot = -1
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        if for_good[chosen] or chosen == slot:
            continue
        num_misses += 1
        if num_for_good < capacity - 1:
            for_good[chosen] = True
            num_for_good += 1
        else:
            slot = chosen
    return num_misses


@compiled("int64(int32[::1], int64, int64)")
def lfu(key: Int32s, num_keys: int, capacity: int) -> int:
    """Counts misses of lfu: one list by count, then recency; the end of each count is known."""
    head = num_keys
    following = np.full(num_keys + 1, head, np.int32)
    before = np.full(num_keys + 1, head, np.int32)
    frequency = np.zeros(num_keys + 1, np.int32)
    # Last key of each count, plus one; 0 where a count has none.
    end = np.zeros(len(key) + 2, np.int32)
    used = 0
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        own = frequency[chosen]
        if own:
            after, previous = following[chosen], before[chosen]
            place = end[own + 1] - 1
            if end[own] == chosen + 1:
                end[own] = previous + 1 if frequency[previous] == own else 0
                if place < 0:
                    frequency[chosen] = own + 1
                    end[own + 1] = chosen + 1
                    continue
            elif place < 0:
                place = end[own] - 1
            following[previous] = after
            before[after] = previous
        else:
            num_misses += 1
            if used == capacity:
                gone = following[head]
                count = frequency[gone]
                if end[count] == gone + 1:
                    end[count] = 0
                frequency[gone] = 0
                after = following[gone]
                following[head] = after
                before[after] = head
            else:
                used += 1
            place = end[1] - 1
            if place < 0:
                place = head
        frequency[chosen] = own + 1
        end[own + 1] = chosen + 1
        after = following[place]
        following[place] = chosen
        before[chosen] = place
        following[chosen] = after
        before[after] = chosen
    return num_misses


@compiled("int64(int32[::1], int64, int64, int64, int64, int64)")
def s3fifo(  # noqa: PLR0912, PLR0915
    key: Int32s,
    num_keys: int,
    capacity: int,
    small_capacity: int,
    main_capacity: int,
    ghost_capacity: int,
) -> int:
    """Counts misses of s3fifo: two rings and a list of ghosts."""
    small = np.empty(capacity + 1, np.int32)
    main = np.empty(capacity + 1, np.int32)
    ring = capacity + 1
    small_first = small_used = main_first = main_used = ghosts = 0
    ghost_head = num_keys
    ghost_next = np.full(num_keys + 1, ghost_head, np.int32)
    ghost_before = np.full(num_keys + 1, ghost_head, np.int32)
    # 0 absent, 1 ghost, 2 and more: resident, with lookups since on top.
    state = np.zeros(num_keys, np.uint8)
    has_evicted = False
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        own = state[chosen]
        if own >= _RESIDENT:
            if own < _RESIDENT + _MOST:
                state[chosen] = own + 1
            continue
        num_misses += 1
        if own == _GHOST:
            unlink(ghost_next, ghost_before, chosen)
            ghosts -= 1
        if small_used + main_used >= capacity:
            has_evicted = True
            evicted = False
            if main_used <= main_capacity:
                while small_used and not evicted:
                    node = small[small_first]
                    small_first += 1
                    if small_first == ring:
                        small_first = 0
                    small_used -= 1
                    if state[node] >= _RESIDENT + _PROMOTION:
                        state[node] = _RESIDENT
                        last = main_first + main_used
                        main[last - ring if last >= ring else last] = node
                        main_used += 1
                        continue
                    evicted = True
                    state[node] = 0
                    if ghost_capacity:
                        if ghosts == ghost_capacity:
                            oldest = ghost_next[ghost_head]
                            unlink(ghost_next, ghost_before, oldest)
                            state[oldest] = 0
                            ghosts -= 1
                        append(ghost_next, ghost_before, ghost_head, node)
                        state[node] = _GHOST
                        ghosts += 1
            while not evicted:
                node = main[main_first]
                main_first += 1
                if main_first == ring:
                    main_first = 0
                if state[node] > _RESIDENT:
                    state[node] -= 1
                    last = main_first + main_used - 1
                    main[last - ring if last >= ring else last] = node
                    continue
                main_used -= 1
                state[node] = 0
                evicted = True
        state[chosen] = _RESIDENT
        if own == _GHOST or (not has_evicted and small_used >= small_capacity):
            last = main_first + main_used
            main[last - ring if last >= ring else last] = chosen
            main_used += 1
        else:
            last = small_first + small_used
            small[last - ring if last >= ring else last] = chosen
            small_used += 1
    return num_misses


@compiled("int64(int32[::1], int64, int64)")
def arc(key: Int32s, num_keys: int, capacity: int) -> int:  # noqa: PLR0915
    """Counts misses of arc: four lists, T1, T2 and their ghosts B1, B2."""
    t1, t2, b1, b2 = num_keys, num_keys + 1, num_keys + 2, num_keys + 3
    following = np.arange(num_keys + 4).astype(np.int32)
    before = np.arange(num_keys + 4).astype(np.int32)
    where = np.zeros(num_keys, np.uint8)
    first = second = ghosts_1 = ghosts_2 = 0
    target = 0.0
    num_misses = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        place = where[chosen]
        if place == _T2:
            unlink(following, before, chosen)
            append(following, before, t2, chosen)
            continue
        if place == _T1:
            unlink(following, before, chosen)
            append(following, before, t2, chosen)
            where[chosen] = _T2
            first -= 1
            second += 1
            continue
        num_misses += 1
        if place == _B1:
            target = min(target + max(1.0, ghosts_2 / ghosts_1), float(capacity))
            unlink(following, before, chosen)
            ghosts_1 -= 1
        elif place == _B2:
            target = max(target - max(1.0, ghosts_1 / ghosts_2), 0.0)
            unlink(following, before, chosen)
            ghosts_2 -= 1
        if first + second == capacity:
            too_large = first > target or (first == target and place == _B2)
            if (first > 0 and too_large) or second == 0:
                node = following[t1]
                unlink(following, before, node)
                append(following, before, b1, node)
                where[node] = _B1
                first -= 1
                ghosts_1 += 1
            else:
                node = following[t2]
                unlink(following, before, node)
                append(following, before, b2, node)
                where[node] = _B2
                second -= 1
                ghosts_2 += 1
        if place >= _B1:
            append(following, before, t2, chosen)
            where[chosen] = _T2
            second += 1
            continue
        append(following, before, t1, chosen)
        where[chosen] = _T1
        first += 1
        if first + ghosts_1 > capacity and ghosts_1:
            node = following[b1]
            unlink(following, before, node)
            where[node] = 0
            ghosts_1 -= 1
        if first + second + ghosts_1 + ghosts_2 > 2 * capacity and ghosts_2:
            node = following[b2]
            unlink(following, before, node)
            where[node] = 0
            ghosts_2 -= 1
    return num_misses


@compiled("void(int32[::1], int64, int32[::1])")
def fill_next_use(key: Int32s, num_keys: int, next_use: Int32s) -> None:
    """Fills [lookups] times of the next lookup of the same key; never = lookups + key."""
    upcoming = np.empty(num_keys, np.int32)
    for chosen in range(num_keys):
        upcoming[chosen] = len(key) + chosen
    for lookup in range(len(key) - 1, -1, -1):
        next_use[lookup] = upcoming[key[lookup]]
        upcoming[key[lookup]] = lookup


@compiled("int64(int32[::1], int64, int64)")
def minimum(next_use: Int32s, num_keys: int, capacity: int) -> int:
    """Counts misses of min: residents are marks at their next uses, in a tree of 64 ways."""
    length = len(next_use) + num_keys
    words = (length >> 6) + 1
    one = np.uint64(1)
    marks = np.zeros(words, np.uint64)
    groups = np.zeros((words >> 6) + 1, np.uint64)
    blocks = np.zeros((words >> 12) + 1, np.uint64)
    used = 0
    num_misses = 0
    for lookup in range(len(next_use)):
        word = lookup >> 6
        bit = one << np.uint64(lookup & 63)
        if marks[word] & bit:
            marks[word] ^= bit
            if marks[word] == 0:
                groups[word >> 6] ^= one << np.uint64(word & 63)
                if groups[word >> 6] == 0:
                    blocks[word >> 12] ^= one << np.uint64((word >> 6) & 63)
        else:
            num_misses += 1
            if used < capacity:
                used += 1
            else:
                top: Any = len(blocks) - 1
                while blocks[top] == 0:
                    top -= 1
                group = (top << 6) + 63 - np.int64(leading_zeros(blocks[top]))
                word = int((group << 6) + 63 - np.int64(leading_zeros(groups[group])))
                marks[word] ^= one << (np.uint64(63) - leading_zeros(marks[word]))
                if marks[word] == 0:
                    groups[group] ^= one << np.uint64(word & 63)
                    if groups[group] == 0:
                        blocks[top] ^= one << np.uint64(group & 63)
        later = next_use[lookup]
        word = later >> 6
        marks[word] |= one << np.uint64(later & 63)
        groups[word >> 6] |= one << np.uint64(word & 63)
        blocks[word >> 12] |= one << np.uint64((word >> 6) & 63)
    return num_misses
