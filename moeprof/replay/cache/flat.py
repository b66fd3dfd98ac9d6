"""Misses of one lookup after another, as fast as they can be counted.

For flat streams of many keys of one size (all experts of a model in one cache), where only the
number of misses counts: no dispatches, no phases, no requests. lru and fifo keep no list: the trace
itself is the queue. The others run the ``sequential`` kernels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import curves, kernels, policies
from moeprof.replay.cache.loops import lazily_compiled

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

POLICIES = ("lru", "fifo", "lifo", "lfu", "s3fifo", "arc", "min")
CURVES = ("lru", "lifo", "min")


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
    assert policy in POLICIES
    mask = np.zeros(len(key), np.uint64)
    ones = np.ones(num_keys, np.int64)
    common = (
        np.array([0, len(key)], np.int64),
        key,
        key,
        np.zeros(1, np.uint8),
        ones,
        ones,
        np.array([capacity], np.int64),
        kernels.SEQUENTIAL,
        False,
        mask,
        np.zeros((1, 4), np.int64),
    )
    if policy == "lifo":
        kernels.replay_list(*common, kernels.LIFO)
    elif policy == "lfu":
        kernels.replay_lfu(*common)
    elif policy == "arc":
        kernels.replay_arc(*common)
    elif policy == "s3fifo":
        kernels.replay_s3fifo(*common, *np.array([policies.s3_shares(capacity)], np.int64).T)
    else:
        next_use = kernels.next_uses(common[0], key, one_by_one=True, num_keys=num_keys)
        kernels.replay_min(*common, next_use, False)
    return len(key) - int(np.count_nonzero(mask))


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


@lazily_compiled("void(int32[::1], int64[::1])")
def _count(reach: Int32s, counts: Int64s) -> None:
    for lookup in range(len(reach)):
        if reach[lookup] < len(counts):
            counts[reach[lookup]] += 1


@lazily_compiled("int64(int32[::1], int64, int64)")
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


@lazily_compiled("int64(int32[::1], int64, int64)")
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
