"""The machines of `policies` under ``sequential``, one lookup at a time, for compiled callers.

A machine's arrays are laid out by `machine_state`. Whoever calls knows who is resident: it calls
`hit` or `miss`, and takes who left out of `SLOT_OF`. Tested lookup by lookup against
`reference.look_up`. Leaves out slots and what is copied; s3fifo and arc are in `ghost_machines`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeprof.replay.cache import policies
from moeprof.replay.cache.ghost_machines import enter_queues, miss_arc, miss_s3fifo, move
from moeprof.replay.cache.loops import popcount
from moeprof.replay.cache.machine_state import (
    ARC,
    BUCKET_COUNT,
    BUCKET_END,
    CAPACITY,
    CURSOR,
    FINDS,
    FREE_BUCKETS,
    KIND,
    LFU,
    LRU,
    MIN,
    MIN_BYPASS,
    NOBODY,
    NUM_FREE_BUCKETS,
    NUM_KEYS,
    OF,
    PAPER,
    RANDOM,
    S3FIFO,
    STATE,
    STATIC,
    T1,
    T2,
    USE,
    USED,
    USES_END,
    WIDTH,
    append,
    link,
    unlink,
)
from moeprof.replay.compiled import inlined

_NEVER = policies.NEVER
_MOST = policies.S3_MAX_FREQUENCY


@inlined("void(int64[::1], int32[::1], int64)", allocates=False)
def _leave_bucket(own, nodes, key):  # type: ignore[no-untyped-def]
    """Takes a resident out of its count."""
    width = own[WIDTH]
    bucket = nodes[OF * width + key]
    if nodes[BUCKET_END * width + bucket] == key:
        previous = nodes[width + key]
        if previous != own[NUM_KEYS] and nodes[OF * width + previous] == bucket:
            nodes[BUCKET_END * width + bucket] = previous
        else:
            nodes[FREE_BUCKETS * width + own[NUM_FREE_BUCKETS]] = bucket
            own[NUM_FREE_BUCKETS] += 1
    unlink(own, nodes, key)


@inlined("void(int64[::1], int32[::1], int64, int64, int64)", allocates=False)
def _enter_bucket(own, nodes, place, key, count):  # type: ignore[no-untyped-def]
    """Puts a key behind all of its count, which begins behind ``place``."""
    width = own[WIDTH]
    node = nodes[place]
    bucket = nodes[OF * width + node] if node != own[NUM_KEYS] else NOBODY
    if bucket != NOBODY and nodes[BUCKET_COUNT * width + bucket] == count:
        place = nodes[BUCKET_END * width + bucket]
    else:
        own[NUM_FREE_BUCKETS] -= 1
        bucket = nodes[FREE_BUCKETS * width + own[NUM_FREE_BUCKETS]]
        nodes[BUCKET_COUNT * width + bucket] = count
    nodes[BUCKET_END * width + bucket] = key
    nodes[OF * width + key] = bucket
    link(own, nodes, place, key)


@inlined("void(int64[::1], int32[::1], int64, int64)", allocates=False)
def _enter_count(own, nodes, key, count):  # type: ignore[no-untyped-def]
    """Lets a key in with a count of 0 or 1."""
    width = own[WIDTH]
    place = own[NUM_KEYS]
    node = nodes[place]
    if count and node != place:
        lowest = nodes[OF * width + node]
        if nodes[BUCKET_COUNT * width + lowest] == 0:
            place = nodes[BUCKET_END * width + lowest]
    _enter_bucket(own, nodes, place, key, count)


@inlined("void(int64[::1], int32[::1], int64)", allocates=False)
def _count_up(own, nodes, key):  # type: ignore[no-untyped-def]
    """Moves a resident to the next count."""
    width = own[WIDTH]
    bucket = nodes[OF * width + key]
    count = nodes[BUCKET_COUNT * width + bucket]
    place = nodes[BUCKET_END * width + bucket]
    if place == key:
        place = nodes[width + key]
    _leave_bucket(own, nodes, key)
    _enter_bucket(own, nodes, place, key, count + 1)


@inlined(FINDS, allocates=False)
def _miss_in_list(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Makes room in the list of `FIFO`, `LIFO`, `PAPER` and `LRU`, and lets a key in."""
    width, head, kind = own[WIDTH], own[NUM_KEYS], own[KIND]
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        left = nodes[head] if kind <= LRU else nodes[width + head]
        if kind == PAPER:
            # Nobody behind the cursor is inactive: who entered since is active.
            node = own[CURSOR]
            while node != head and nodes[OF * width + node]:
                node = nodes[width + node]
            if node != head:
                left = node
                node = nodes[width + node]
            own[CURSOR] = node
        unlink(own, nodes, left)
    append(own, nodes, head, key)
    return left


@inlined(FINDS, allocates=False)
def _miss_static(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Keeps members of a set; others leave where they were placed at the start."""
    width, head = own[WIDTH], own[NUM_KEYS]
    if not nodes[OF * width + key]:
        return key
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        left = nodes[head]
        while nodes[OF * width + left]:
            left = nodes[left]
        unlink(own, nodes, left)
    append(own, nodes, head, key)
    return left


@inlined(FINDS, allocates=False)
def _miss_lfu(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Evicts the first of the lowest count."""
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        left = nodes[own[NUM_KEYS]]
        _leave_bucket(own, nodes, left)
    _enter_count(own, nodes, key, 1)
    return left


@inlined("int64(uint64)", allocates=False)
def _set_bits(bits):  # type: ignore[no-untyped-def]
    """Returns their number as a signed one."""
    return np.int64(popcount(bits))


@inlined("int64(int64[::1], int64[::1])", allocates=False)
def _draw(own, wide):  # type: ignore[no-untyped-def]
    """Draws one of the residents of `RANDOM`, in order of key, and takes it out."""
    state = np.uint64(own[STATE])
    state ^= state >> np.uint64(12)
    state ^= state << np.uint64(25)
    state ^= state >> np.uint64(27)
    own[STATE] = np.int64(state)
    drawn = (state * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)
    left = np.int64(drawn) % own[USED]
    word = 0
    while True:
        bits = np.uint64(wide[word])
        found = np.int64(_set_bits(bits))
        if left < found:
            break
        left -= found
        word += 1
    for _ in range(left):
        bits &= bits - np.uint64(1)
    lowest = bits & (~bits + np.uint64(1))
    wide[word] ^= np.int64(lowest)
    return (word << 6) + _set_bits(lowest - np.uint64(1))


@inlined(FINDS, allocates=False)
def _miss_random(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Evicts a resident that is drawn."""
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        left = _draw(own, wide)
    wide[key >> 6] |= np.int64(1) << (key & 63)
    return left


@inlined("void(int64[::1], int32[::1], int64[::1], int64)", allocates=False)
def _leave_residents(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Takes a key off the residents of `MIN`; the last of them takes its place."""
    width = own[WIDTH]
    own[USED] -= 1
    last = nodes[own[USED]]
    place = nodes[width + key]
    nodes[place] = last
    nodes[width + last] = place


@inlined("void(int64[::1], int32[::1], int64)", allocates=False)
def _enter_residents(own, nodes, key):  # type: ignore[no-untyped-def]
    """Lets a key into the residents of `MIN`."""
    nodes[own[USED]] = key
    nodes[own[WIDTH] + key] = own[USED]
    own[USED] += 1


@inlined("int64(int64[::1], int32[::1], int64[::1])", allocates=False)
def _farthest(own, nodes, wide):  # type: ignore[no-untyped-def]
    """Returns the resident whose next use is farthest; ties: larger key."""
    found: Any = NOBODY
    farthest = np.int64(-1)
    for place in range(own[USED]):
        node = np.int64(nodes[place])
        use = wide[node]
        if use > farthest or (use == farthest and node > found):
            found, farthest = node, use
    return found


@inlined("void(int64[::1], int64[::1], int64)", allocates=False)
def _move_on(own, wide, key):  # type: ignore[no-untyped-def]
    """Moves on to the next use of a key that is looked up."""
    num_keys = own[NUM_KEYS]
    use, end = wide[USE * num_keys + key], wide[USES_END * num_keys + key]
    if use < end:
        use += 1
        wide[USE * num_keys + key] = use
    wide[key] = wide[use] if use < end else _NEVER


@inlined(FINDS, allocates=False)
def _miss_min(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Evicts the farthest next use, before the key enters or with the key among them."""
    _move_on(own, wide, key)
    left = NOBODY
    is_full = own[USED] == own[CAPACITY]
    if own[KIND] == MIN_BYPASS:
        _enter_residents(own, nodes, key)
    if is_full:
        left = _farthest(own, nodes, wide)
        _leave_residents(own, nodes, wide, left)
    if own[KIND] == MIN:
        _enter_residents(own, nodes, key)
    return left


@inlined("void(int64[::1], int32[::1], int64[::1], int64)", allocates=False)
def hit(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Looks up a resident."""
    kind = own[KIND]
    if kind == LRU:
        unlink(own, nodes, key)
        append(own, nodes, own[NUM_KEYS], key)
    elif kind == LFU:
        _count_up(own, nodes, key)
    elif kind == S3FIFO:
        node = OF * own[WIDTH] + key
        if nodes[node] < _MOST:
            nodes[node] += 1
    elif kind == ARC:
        move(own, nodes, key, T2)
    elif kind >= MIN:
        _move_on(own, wide, key)


@inlined(FINDS, allocates=False)
def miss(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Looks up a key that is not resident; returns who left, the key itself if it is not kept."""
    if own[CAPACITY] == 0:
        return key
    kind = own[KIND]
    if kind <= PAPER:
        return _miss_in_list(own, nodes, wide, key)
    if kind == LFU:
        return _miss_lfu(own, nodes, wide, key)
    if kind == S3FIFO:
        return miss_s3fifo(own, nodes, wide, key)
    if kind == ARC:
        return miss_arc(own, nodes, wide, key)
    if kind == RANDOM:
        return _miss_random(own, nodes, wide, key)
    if kind == STATIC:
        return _miss_static(own, nodes, wide, key)
    return _miss_min(own, nodes, wide, key)


@inlined("void(int64[::1], int32[::1], int64[::1], int64)", allocates=False)
def place_first(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Makes a key resident before the first dispatch; there is room."""
    kind = own[KIND]
    if kind >= MIN:
        _enter_residents(own, nodes, key)
        return
    own[USED] += 1
    if kind <= STATIC:
        append(own, nodes, own[NUM_KEYS], key)
    elif kind == LFU:
        _enter_count(own, nodes, key, 0)
    elif kind == S3FIFO:
        enter_queues(own, nodes, key, False)
    elif kind == ARC:
        move(own, nodes, key, T1)
    else:
        wide[key >> 6] |= np.int64(1) << (key & 63)
