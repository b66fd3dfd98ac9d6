"""`policies.S3Fifo` and `policies.Arc` on the arrays of `machine_state`, for compiled callers."""

from __future__ import annotations

import numpy as np

from moeprof.replay.cache import policies
from moeprof.replay.cache.machine_state import (
    ABSENT,
    B1,
    B2,
    CAPACITY,
    FINDS,
    FIRST_GHOSTS,
    FIRST_USED,
    GHOST,
    GHOST_CAPACITY,
    GHOSTS_USED,
    HAS_EVICTED,
    MAIN_CAPACITY,
    MAIN_USED,
    NOBODY,
    NOWHERE,
    NUM_KEYS,
    OF,
    SECOND_GHOSTS,
    SECOND_USED,
    SMALL_CAPACITY,
    SMALL_USED,
    STATE,
    T1,
    T2,
    USED,
    WIDTH,
    append,
    unlink,
)
from moeprof.replay.compiled import inlined

_PROMOTION = policies.S3_PROMOTION


@inlined("void(int64[::1], int32[::1], int64, int64)", allocates=False)
def enter_queues(own, nodes, key, was_ghost):  # type: ignore[no-untyped-def]
    """Lets a key into a queue of `S3FIFO`."""
    small = own[NUM_KEYS]
    nodes[OF * own[WIDTH] + key] = 0
    if was_ghost or (own[SMALL_USED] >= own[SMALL_CAPACITY] and not own[HAS_EVICTED]):
        append(own, nodes, small + 1, key)
        own[MAIN_USED] += 1
    else:
        append(own, nodes, small, key)
        own[SMALL_USED] += 1


@inlined("void(int64[::1], int32[::1], int64)", allocates=False)
def _remember(own, nodes, key):  # type: ignore[no-untyped-def]
    """Makes a key that left the small queue a ghost."""
    if own[GHOST_CAPACITY] == 0:
        return
    of, head = OF * own[WIDTH], own[NUM_KEYS] + 2
    if own[GHOSTS_USED] == own[GHOST_CAPACITY]:
        oldest = nodes[head]
        unlink(own, nodes, oldest)
        nodes[of + oldest] = ABSENT
    else:
        own[GHOSTS_USED] += 1
    append(own, nodes, head, key)
    nodes[of + key] = GHOST


@inlined("int64(int64[::1], int32[::1])", allocates=False)
def _leave_queues(own, nodes):  # type: ignore[no-untyped-def]
    """Returns who leaves `S3FIFO`."""
    of, small = OF * own[WIDTH], own[NUM_KEYS]
    main = small + 1
    if own[MAIN_USED] <= own[MAIN_CAPACITY]:
        while own[SMALL_USED]:
            node = nodes[small]
            unlink(own, nodes, node)
            own[SMALL_USED] -= 1
            if nodes[of + node] >= _PROMOTION:
                nodes[of + node] = 0
                append(own, nodes, main, node)
                own[MAIN_USED] += 1
                continue
            nodes[of + node] = ABSENT
            _remember(own, nodes, node)
            return node
    while True:
        node = nodes[main]
        unlink(own, nodes, node)
        if nodes[of + node]:
            nodes[of + node] -= 1
            append(own, nodes, main, node)
            continue
        own[MAIN_USED] -= 1
        nodes[of + node] = ABSENT
        return node


@inlined(FINDS, allocates=False)
def miss_s3fifo(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Lets a key into small, or into main where it was a ghost."""
    was_ghost = nodes[OF * own[WIDTH] + key] == GHOST
    if was_ghost:
        unlink(own, nodes, key)
        own[GHOSTS_USED] -= 1
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        own[HAS_EVICTED] = 1
        left = _leave_queues(own, nodes)
    enter_queues(own, nodes, key, was_ghost)
    return left


@inlined("void(int64[::1], int32[::1], int64, int64)", allocates=False)
def move(own, nodes, key, where):  # type: ignore[no-untyped-def]
    """Moves a node of `ARC` to the end of a list."""
    of = OF * own[WIDTH]
    before = nodes[of + key]
    if before != NOWHERE:
        unlink(own, nodes, key)
        own[FIRST_USED - T1 + before] -= 1
    nodes[of + key] = where
    if where != NOWHERE:
        append(own, nodes, own[NUM_KEYS] - T1 + where, key)
        own[FIRST_USED - T1 + where] += 1


@inlined("void(int64[::1], int32[::1])", allocates=False)
def _cut_ghosts(own, nodes):  # type: ignore[no-untyped-def]
    """Forgets the oldest ghosts of `ARC` that are too many."""
    head = own[NUM_KEYS] - T1
    while own[FIRST_GHOSTS] and own[FIRST_USED] + own[FIRST_GHOSTS] > own[CAPACITY]:
        move(own, nodes, nodes[head + B1], NOWHERE)
    while (
        own[SECOND_GHOSTS]
        and own[USED] + own[FIRST_GHOSTS] + own[SECOND_GHOSTS] > 2 * own[CAPACITY]
    ):
        move(own, nodes, nodes[head + B2], NOWHERE)


@inlined(FINDS, allocates=False)
def miss_arc(own, nodes, wide, key):  # type: ignore[no-untyped-def]
    """Moves the target where the key is a ghost, and lets it in."""
    head = own[NUM_KEYS] - T1
    state = own[STATE : STATE + 1].view(np.float64)
    was = nodes[OF * own[WIDTH] + key]
    first, second = own[FIRST_GHOSTS], own[SECOND_GHOSTS]
    if was == B1:
        state[0] = min(state[0] + max(1.0, second / first), float(own[CAPACITY]))
        move(own, nodes, key, NOWHERE)
    elif was == B2:
        state[0] = max(state[0] - max(1.0, first / second), 0.0)
        move(own, nodes, key, NOWHERE)
    left = NOBODY
    if own[USED] < own[CAPACITY]:
        own[USED] += 1
    else:
        used = own[FIRST_USED]
        too_large = used > state[0] or (used == state[0] and was == B2)
        if (used > 0 and too_large) or own[SECOND_USED] == 0:
            left = nodes[head + T1]
            move(own, nodes, left, B1)
        else:
            left = nodes[head + T2]
            move(own, nodes, left, B2)
    move(own, nodes, key, T1 if was == NOWHERE else T2)
    _cut_ghosts(own, nodes)
    return left
