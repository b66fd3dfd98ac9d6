"""Compiled replays of one cache at many capacities: the machines of `policies`, fast.

Every kernel takes the same arguments and fills the same outputs: `hit_mask` ([lookups], bit c set
where the lookup hits at capacity c of this call, at most 64) and `streamed` ([capacities, phases]
bytes of misses that are not resident after their dispatch). Tested lookup by lookup against the
machines. Leaves out policies whose answers at all capacities follow from one pass (`curves`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import policies
from moeprof.replay.cache.loops import append, pop, push, unlink
from moeprof.replay.compiled import compiled, filled_int64, inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Masks = NDArray[np.uint64]

MAX_CAPACITIES = 64
BATCH, HITS_FIRST, SEQUENTIAL = range(3)
SEMANTICS_CODES = dict(zip(policies.SEMANTICS, (BATCH, HITS_FIRST, SEQUENTIAL), strict=True))
LRU, FIFO, LIFO, PAPER = range(4)
LIST_CODES = {"lru": LRU, "fifo": FIFO, "lifo": LIFO, "paper": PAPER}

_COMMON = (
    "(int64[::1], int32[::1], int32[::1], uint8[::1], int64[::1], int64[::1], int64[::1], int64,"
    " boolean, uint64[::1], int64[:, ::1]"
)
_SLACK = 64
_PROMOTION = policies.S3_PROMOTION
_MAX_FREQUENCY = policies.S3_MAX_FREQUENCY


@inlined(
    "void(int64, int64, int32[::1], int64[::1], boolean[::1], uint64[::1], uint64,"
    " int64[:, ::1], int64, int64)"
)
def _note(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    first, stop, key, bytes_of, inside, hit_mask, bit, streamed, row, phase
):
    """Counts what was missed in a dispatch and is not resident after it."""
    for lookup in range(first, stop):
        chosen = key[lookup]
        if not inside[chosen] and not hit_mask[lookup] & bit:
            streamed[row, phase] += bytes_of[chosen]


@compiled("void" + _COMMON + ", int64)")
def replay_list(  # noqa: PLR0912, PLR0915, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
    rule: int,
) -> None:
    """Replays lru, fifo, lifo and paper: one list of residents, left from either end."""
    num_keys = len(size)
    head = num_keys
    following = np.empty(num_keys + 1, np.int32)
    before = np.empty(num_keys + 1, np.int32)
    inside = np.empty(num_keys, np.bool_)
    newest = np.empty(num_keys, np.int64)
    backwards = rule == LIFO or rule == PAPER  # noqa: PLR1714
    refresh = rule == LRU
    for row in range(len(capacities)):
        capacity = capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        inside[:] = False
        newest[:] = -1
        following[head] = head
        before[head] = head
        used = 0
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                used += size[chosen]
                inside[chosen] = True
                append(following, before, head, chosen)
        for dispatch in range(len(phase)):
            first, stop = offset[dispatch], offset[dispatch + 1]
            if semantics == SEQUENTIAL:
                if rule == PAPER:
                    for lookup in range(first, stop):
                        newest[key[lookup]] = dispatch
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                        if refresh:
                            unlink(following, before, chosen)
                            append(following, before, head, chosen)
                        continue
                    if size[chosen] > capacity:
                        continue
                    if rule == PAPER:
                        node = before[head]
                        while used + size[chosen] > capacity and node != head:
                            towards = before[node]
                            if newest[node] != dispatch:
                                unlink(following, before, node)
                                inside[node] = False
                                used -= size[node]
                            node = towards
                    while used + size[chosen] > capacity:
                        node = before[head] if backwards else following[head]
                        unlink(following, before, node)
                        inside[node] = False
                        used -= size[node]
                    inside[chosen] = True
                    used += size[chosen]
                    append(following, before, head, chosen)
            else:
                num_hits = 0
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                        num_hits += 1
                if refresh:
                    if semantics == HITS_FIRST and num_hits < stop - first:
                        for turn in range(2):
                            for index in range(first, stop):
                                lookup = last[index]
                                if ((hit_mask[lookup] & bit) != 0) == (turn == 0):
                                    chosen = key[lookup]
                                    if turn == 0:
                                        unlink(following, before, chosen)
                                    else:
                                        inside[chosen] = True
                                        used += size[chosen]
                                    append(following, before, head, chosen)
                    else:
                        for index in range(first, stop):
                            chosen = key[last[index]]
                            if inside[chosen]:
                                unlink(following, before, chosen)
                            else:
                                inside[chosen] = True
                                used += size[chosen]
                            append(following, before, head, chosen)
                elif num_hits < stop - first:
                    for lookup in range(first, stop):
                        chosen = key[lookup]
                        if not inside[chosen]:
                            inside[chosen] = True
                            used += size[chosen]
                            append(following, before, head, chosen)
                if used <= capacity:
                    continue
                node = before[head] if backwards else following[head]
                while used > capacity and node != head:
                    towards = before[node] if backwards else following[node]
                    if newest[node] != dispatch:
                        unlink(following, before, node)
                        inside[node] = False
                        used -= size[node]
                    node = towards
                if used <= capacity:
                    continue
                while used > capacity:
                    node = before[head] if backwards else following[head]
                    unlink(following, before, node)
                    inside[node] = False
                    used -= size[node]
            _note(first, stop, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void" + _COMMON + ")")
def replay_lfu(  # noqa: PLR0912, PLR0915, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
) -> None:
    """Replays lfu: a chain of counts that occur, each with its list of residents."""
    num_keys = len(size)
    # Heads of counts are nodes num_keys.., one more than keys; the last is the chain's anchor.
    num_heads = num_keys + 2
    anchor = num_keys + num_heads - 1
    following = np.empty(num_keys + num_heads, np.int32)
    before = np.empty(num_keys + num_heads, np.int32)
    chain_next = np.empty(num_keys + num_heads, np.int32)
    chain_before = np.empty(num_keys + num_heads, np.int32)
    count = np.empty(num_keys + num_heads, np.int64)
    head_of = np.empty(num_keys, np.int32)
    spare = np.empty(num_heads, np.int32)
    inside = np.empty(num_keys, np.bool_)
    newest = np.empty(num_keys, np.int64)
    for row in range(len(capacities)):
        capacity = capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        inside[:] = False
        newest[:] = -1
        used = 0
        num_spare = 0
        for node in range(num_keys, anchor):
            spare[num_spare] = node
            num_spare += 1
        chain_next[anchor] = anchor
        chain_before[anchor] = anchor
        count[anchor] = -1
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                if used == 0:
                    num_spare -= 1
                    head = spare[num_spare]
                    count[head] = 0
                    following[head] = head
                    before[head] = head
                    append(chain_next, chain_before, anchor, head)
                used += size[chosen]
                inside[chosen] = True
                head = chain_next[anchor]
                head_of[chosen] = head
                append(following, before, head, chosen)
        for dispatch in range(len(phase)):
            first, stop = offset[dispatch], offset[dispatch + 1]
            if semantics != SEQUENTIAL:
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
            num_turns = 2 if semantics == HITS_FIRST else 1
            for turn in range(num_turns):
                for index in range(first, stop):
                    if semantics == SEQUENTIAL:
                        lookup = index
                        chosen = key[lookup]
                        if inside[chosen]:
                            hit_mask[lookup] |= bit
                        elif size[chosen] > capacity:
                            continue
                        else:
                            while used + size[chosen] > capacity:
                                head = chain_next[anchor]
                                node = following[head]
                                unlink(following, before, node)
                                inside[node] = False
                                used -= size[node]
                                if following[head] == head:
                                    unlink(chain_next, chain_before, head)
                                    spare[num_spare] = head
                                    num_spare += 1
                    else:
                        lookup = last[index]
                        chosen = key[lookup]
                        is_hit = (hit_mask[lookup] & bit) != 0
                        if semantics == HITS_FIRST and is_hit != (turn == 0):
                            continue
                    behind = anchor
                    wanted = 1
                    if inside[chosen]:
                        old = head_of[chosen]
                        wanted = count[old] + 1
                        behind = old
                        unlink(following, before, chosen)
                    else:
                        inside[chosen] = True
                        used += size[chosen]
                        if count[chain_next[anchor]] == 0:
                            behind = chain_next[anchor]
                    head = chain_next[behind]
                    if count[head] != wanted:
                        num_spare -= 1
                        head = spare[num_spare]
                        count[head] = wanted
                        following[head] = head
                        before[head] = head
                        after = chain_next[behind]
                        chain_next[behind] = head
                        chain_before[head] = behind
                        chain_next[head] = after
                        chain_before[after] = head
                    if behind != anchor and following[behind] == behind:
                        unlink(chain_next, chain_before, behind)
                        spare[num_spare] = behind
                        num_spare += 1
                    head_of[chosen] = head
                    append(following, before, head, chosen)
            if semantics != SEQUENTIAL:
                if used <= capacity:
                    continue
                for turn in range(2):
                    head = chain_next[anchor]
                    while used > capacity and head != anchor:
                        node = following[head]
                        while used > capacity and node != head:
                            towards = following[node]
                            if turn == 1 or newest[node] != dispatch:
                                unlink(following, before, node)
                                inside[node] = False
                                used -= size[node]
                            node = towards
                        towards = chain_next[head]
                        if following[head] == head:
                            unlink(chain_next, chain_before, head)
                            spare[num_spare] = head
                            num_spare += 1
                        head = towards
            _note(first, stop, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void" + _COMMON + ", int64[::1], int64[::1], int64[::1])")
def replay_s3fifo(  # noqa: PLR0912, PLR0915, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
    small_capacities: Int64s,
    main_capacities: Int64s,
    ghost_capacities: Int64s,
) -> None:
    """Replays s3fifo; cursors pass over the dispatch's own experts, which stay where they are."""
    num_keys = len(size)
    small_head, main_head, ghost_head = num_keys, num_keys + 1, num_keys + 2
    following = np.empty(num_keys + 3, np.int32)
    before = np.empty(num_keys + 3, np.int32)
    ghost_next = np.empty(num_keys + 3, np.int32)
    ghost_before = np.empty(num_keys + 3, np.int32)
    inside = np.empty(num_keys, np.bool_)
    is_ghost = np.empty(num_keys, np.bool_)
    returning = np.empty(num_keys, np.bool_)
    frequency = np.zeros(num_keys, np.uint8)
    newest = np.empty(num_keys, np.int64)
    for row in range(len(capacities)):
        capacity = capacities[row]
        small_capacity, main_capacity = small_capacities[row], main_capacities[row]
        ghost_capacity = ghost_capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        inside[:] = False
        is_ghost[:] = False
        returning[:] = False
        newest[:] = -1
        for node in range(num_keys, num_keys + 3):
            following[node] = node
            before[node] = node
            ghost_next[node] = node
            ghost_before[node] = node
        used = small_used = main_used = ghost_used = 0
        has_evicted = False
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                used += size[chosen]
                inside[chosen] = True
                frequency[chosen] = 0
                if small_used >= small_capacity:
                    append(following, before, main_head, chosen)
                    main_used += size[chosen]
                else:
                    append(following, before, small_head, chosen)
                    small_used += size[chosen]
        for dispatch in range(len(phase)):
            begin, end = offset[dispatch], offset[dispatch + 1]
            first = begin
            while first < end:
                stop = first + 1 if semantics == SEQUENTIAL else end
                missing = 0
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                        if frequency[chosen] < _MAX_FREQUENCY:
                            frequency[chosen] += 1
                        continue
                    missing += size[chosen]
                    if is_ghost[chosen]:
                        is_ghost[chosen] = False
                        ghost_used -= size[chosen]
                        unlink(ghost_next, ghost_before, chosen)
                        returning[chosen] = True
                if missing == 0:
                    first = stop
                    continue
                if semantics == SEQUENTIAL and missing > capacity:
                    if used + missing > capacity:
                        has_evicted = True
                    returning[key[first]] = False
                    first = stop
                    continue
                if used + missing > capacity:
                    has_evicted = True
                joined = False
                for turn in range(2):
                    # Turn 0 spares the dispatch's own (under sequential nobody is inside yet).
                    spare = turn == 0 and semantics != SEQUENTIAL
                    small, main = following[small_head], following[main_head]
                    target = capacity - (0 if joined else missing)
                    from_small = False
                    while used > target:
                        if spare:
                            while small != small_head and newest[small] == dispatch:
                                small = following[small]
                            while main != main_head and newest[main] == dispatch:
                                main = following[main]
                        if small == small_head and main == main_head:
                            break
                        if main != main_head and (
                            small == small_head or (main_used > main_capacity and not from_small)
                        ):
                            node = main
                            main = following[node]
                            unlink(following, before, node)
                            if frequency[node]:
                                frequency[node] -= 1
                                append(following, before, main_head, node)
                                if main == main_head:
                                    main = node
                                continue
                            from_small = False
                            main_used -= size[node]
                            inside[node] = False
                            used -= size[node]
                            continue
                        node = small
                        small = following[node]
                        unlink(following, before, node)
                        small_used -= size[node]
                        if frequency[node] >= _PROMOTION:
                            append(following, before, main_head, node)
                            main_used += size[node]
                            frequency[node] = 0
                            from_small = True
                            if main == main_head:
                                main = node
                            continue
                        from_small = False
                        inside[node] = False
                        used -= size[node]
                        if size[node] <= ghost_capacity:
                            while ghost_used + size[node] > ghost_capacity:
                                oldest = ghost_next[ghost_head]
                                unlink(ghost_next, ghost_before, oldest)
                                is_ghost[oldest] = False
                                ghost_used -= size[oldest]
                            append(ghost_next, ghost_before, ghost_head, node)
                            is_ghost[node] = True
                            ghost_used += size[node]
                    if not joined:
                        joined = True
                        for lookup in range(first, stop):
                            if hit_mask[lookup] & bit:
                                continue
                            chosen = key[lookup]
                            inside[chosen] = True
                            used += size[chosen]
                            frequency[chosen] = 0
                            is_full = small_used >= small_capacity and not has_evicted
                            if returning[chosen] or is_full:
                                append(following, before, main_head, chosen)
                                main_used += size[chosen]
                            else:
                                append(following, before, small_head, chosen)
                                small_used += size[chosen]
                            returning[chosen] = False
                    if used <= capacity:
                        break
                first = stop
            _note(begin, end, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void" + _COMMON + ")")
def replay_arc(  # noqa: PLR0912, PLR0915, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
) -> None:
    """Replays arc: lists 0 and 1 hold T1 and T2, lists 2 and 3 their ghosts."""
    num_keys = len(size)
    following = np.empty(num_keys + 4, np.int32)
    before = np.empty(num_keys + 4, np.int32)
    where = np.empty(num_keys, np.int8)
    inside = np.empty(num_keys, np.bool_)
    entering = np.zeros(num_keys, np.int8)
    newest = np.empty(num_keys, np.int64)
    amount = filled_int64(4, 0)
    cursor = filled_int64(2, 0)
    for row in range(len(capacities)):
        capacity = capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        where[:] = -1
        inside[:] = False
        newest[:] = -1
        amount[:] = 0
        for node in range(num_keys, num_keys + 4):
            following[node] = node
            before[node] = node
        target = 0.0
        used = 0
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                used += size[chosen]
                amount[0] += size[chosen]
                where[chosen] = 0
                inside[chosen] = True
                append(following, before, num_keys, chosen)
        for dispatch in range(len(phase)):
            begin, end = offset[dispatch], offset[dispatch + 1]
            first = begin
            while first < end:
                stop = first + 1 if semantics == SEQUENTIAL else end
                while amount[2] > 0 and amount[0] + amount[2] > capacity:
                    node = following[num_keys + 2]
                    unlink(following, before, node)
                    where[node] = -1
                    amount[2] -= size[node]
                while amount[3] > 0 and used + amount[2] + amount[3] > 2 * capacity:
                    node = following[num_keys + 3]
                    unlink(following, before, node)
                    where[node] = -1
                    amount[3] -= size[node]
                ghosts_1, ghosts_2 = amount[2], amount[3]
                hit_second = False
                missing = 0
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    place = where[chosen]
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                        continue
                    missing += size[chosen]
                    entering[chosen] = 0
                    if place >= 0:
                        entering[chosen] = 1
                        if place == 2:  # noqa: PLR2004
                            step = max(1.0, ghosts_2 / ghosts_1) * size[chosen]
                            target = min(target + step, float(capacity))
                        else:
                            step = max(1.0, ghosts_1 / ghosts_2) * size[chosen]
                            target = max(target - step, 0.0)
                            hit_second = True
                        unlink(following, before, chosen)
                        amount[place] -= size[chosen]
                        where[chosen] = -1
                for index in range(first, stop):
                    lookup = last[index] if semantics != SEQUENTIAL else index
                    if hit_mask[lookup] & bit:
                        chosen = key[lookup]
                        unlink(following, before, chosen)
                        amount[where[chosen]] -= size[chosen]
                        where[chosen] = 1
                        amount[1] += size[chosen]
                        append(following, before, num_keys + 1, chosen)
                if missing == 0 or (semantics == SEQUENTIAL and missing > capacity):
                    first = stop
                    continue
                joined = False
                for turn in range(2):
                    spare = turn == 0 and semantics != SEQUENTIAL
                    cursor[0] = following[num_keys]
                    cursor[1] = following[num_keys + 1]
                    limit = capacity - (0 if joined else missing)
                    while used > limit:
                        if spare:
                            for which in range(2):
                                node = cursor[which]
                                while node < num_keys and newest[node] == dispatch:
                                    node = following[node]
                                cursor[which] = node
                        if cursor[0] >= num_keys and cursor[1] >= num_keys:
                            break
                        too_large = amount[0] > target or (amount[0] == target and hit_second)
                        which = 1
                        if (amount[0] > 0 and too_large) or cursor[1] >= num_keys:
                            which = 0
                        if cursor[which] >= num_keys:
                            which = 1 - which
                        node = cursor[which]
                        cursor[which] = following[node]
                        unlink(following, before, node)
                        amount[which] -= size[node]
                        used -= size[node]
                        inside[node] = False
                        where[node] = which + 2
                        amount[which + 2] += size[node]
                        append(following, before, num_keys + 2 + which, node)
                    if not joined:
                        joined = True
                        # Hits of the dispatch may have their last rows behind those of misses.
                        for index in range(first, stop):
                            lookup = last[index] if semantics != SEQUENTIAL else index
                            chosen = key[lookup]
                            if hit_mask[lookup] & bit:
                                if semantics == BATCH:
                                    unlink(following, before, chosen)
                                    append(following, before, num_keys + 1, chosen)
                                continue
                            which = entering[chosen]
                            inside[chosen] = True
                            used += size[chosen]
                            where[chosen] = which
                            amount[which] += size[chosen]
                            append(following, before, num_keys + which, chosen)
                    if used <= capacity:
                        break
                first = stop
            _note(begin, end, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void" + _COMMON + ", uint64)")
def replay_random(  # noqa: PLR0912, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
    seed: int,
) -> None:
    """Replays random: candidates are listed anew whenever a dispatch has to evict."""
    num_keys = len(size)
    inside = np.empty(num_keys, np.bool_)
    newest = np.empty(num_keys, np.int64)
    candidates = np.empty(num_keys, np.int32)
    for row in range(len(capacities)):
        capacity = capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        inside[:] = False
        newest[:] = -1
        used = 0
        state = np.uint64(seed)
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                used += size[chosen]
                inside[chosen] = True
        for dispatch in range(len(phase)):
            begin, end = offset[dispatch], offset[dispatch + 1]
            first = begin
            while first < end:
                stop = first + 1 if semantics == SEQUENTIAL else end
                incoming = 0
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                    else:
                        incoming += size[chosen]
                if semantics == SEQUENTIAL:
                    if incoming > capacity:
                        first = stop
                        continue
                else:
                    for lookup in range(first, stop):
                        chosen = key[lookup]
                        if not inside[chosen]:
                            inside[chosen] = True
                            used += size[chosen]
                    incoming = 0
                turn = 0 if semantics != SEQUENTIAL else 1
                while used + incoming > capacity and turn < 2:  # noqa: PLR2004
                    num_candidates = 0
                    for node in range(num_keys):
                        if inside[node] and (turn == 1 or newest[node] != dispatch):
                            candidates[num_candidates] = node
                            num_candidates += 1
                    while used + incoming > capacity and num_candidates:
                        state ^= state >> np.uint64(12)
                        state ^= state << np.uint64(25)
                        state ^= state >> np.uint64(27)
                        drawn = (state * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)
                        index = np.int64(drawn) % num_candidates
                        node = candidates[index]
                        num_candidates -= 1
                        candidates[index] = candidates[num_candidates]
                        inside[node] = False
                        used -= size[node]
                    turn += 1
                if semantics == SEQUENTIAL and not inside[key[first]]:
                    inside[key[first]] = True
                    used += size[key[first]]
                first = stop
            _note(begin, end, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled(
    "void(int64[::1], int32[::1], uint8[::1], int64[::1], int64[::1], int64, int64, boolean,"
    " uint64[::1], int64[:, ::1], boolean[::1])"
)
def replay_static(  # noqa: PLR0917
    offset: Int64s,
    key: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacity: int,
    row: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
    kept: NDArray[np.bool_],
) -> None:
    """Replays pinned and layers at one capacity; the same under all semantics."""
    num_keys = len(size)
    bit = np.uint64(1) << np.uint64(row)
    inside = np.zeros(num_keys, np.bool_)
    used = 0
    leaving = 0
    if full:
        for chosen in range(num_keys):
            if used + size[chosen] > capacity:
                break
            used += size[chosen]
            inside[chosen] = True
    for dispatch in range(len(phase)):
        first, stop = offset[dispatch], offset[dispatch + 1]
        for lookup in range(first, stop):
            if inside[key[lookup]]:
                hit_mask[lookup] |= bit
        for lookup in range(first, stop):
            chosen = key[lookup]
            if kept[chosen] and not inside[chosen]:
                inside[chosen] = True
                used += size[chosen]
        while used > capacity:
            # Strangers that were there at the start, lowest key first.
            while not inside[leaving] or kept[leaving]:
                leaving += 1
            inside[leaving] = False
            used -= size[leaving]
        _note(first, stop, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void" + _COMMON + ", int64[::1], boolean)")
def replay_min(  # noqa: PLR0912, PLR0915, PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    phase: NDArray[np.uint8],
    size: Int64s,
    bytes_of: Int64s,
    capacities: Int64s,
    semantics: int,
    full: bool,
    hit_mask: Masks,
    streamed: Int64s,
    next_use: Int64s,
    bypass: bool,
) -> None:
    """Replays min and min_bypass with any sizes: a heap of next uses, stale entries left in it.

    ``next_use`` gives [lookups] the time of the next lookup of the same key (dispatches, or
    lookups under ``sequential``), followed by [keys] the time of the first.
    """
    num_keys = len(size)
    num_lookups = len(key)
    heap = np.empty(8 * num_keys + 2 * _SLACK, np.int64)
    aside = np.empty(num_keys + 1, np.int64)
    inside = np.empty(num_keys, np.bool_)
    newest = np.empty(num_keys, np.int64)
    entry = np.empty(num_keys, np.int64)
    for row in range(len(capacities)):
        capacity = capacities[row]
        bit = np.uint64(1) << np.uint64(row)
        inside[:] = False
        newest[:] = -1
        used = 0
        length = 0
        if full:
            for chosen in range(num_keys):
                if used + size[chosen] > capacity:
                    break
                used += size[chosen]
                inside[chosen] = True
                entry[chosen] = next_use[num_lookups + chosen] * num_keys + chosen
                length = push(heap, length, entry[chosen])
        for dispatch in range(len(phase)):
            begin, end = offset[dispatch], offset[dispatch + 1]
            first = begin
            while first < end:
                stop = first + 1 if semantics == SEQUENTIAL else end
                if semantics == SEQUENTIAL and size[key[first]] > capacity:
                    first = stop
                    continue
                for lookup in range(first, stop):
                    chosen = key[lookup]
                    newest[chosen] = dispatch
                    if inside[chosen]:
                        hit_mask[lookup] |= bit
                    else:
                        inside[chosen] = True
                        used += size[chosen]
                    entry[chosen] = next_use[lookup] * num_keys + chosen
                    length = push(heap, length, entry[chosen])
                spare = not bypass
                num_aside = 0
                while used > capacity:
                    if length == 0:
                        # Only the dispatch's own are left: they may leave now.
                        spare = False
                        for index in range(num_aside):
                            length = push(heap, length, aside[index])
                        num_aside = 0
                    top = heap[0]
                    length = pop(heap, length)
                    node = top % num_keys
                    if not inside[node] or entry[node] != top:
                        continue
                    own = newest[node] == dispatch
                    if semantics == SEQUENTIAL:
                        own = node == key[first]
                    if spare and own:
                        aside[num_aside] = top
                        num_aside += 1
                        continue
                    inside[node] = False
                    used -= size[node]
                for index in range(num_aside):
                    length = push(heap, length, aside[index])
                if length > 6 * num_keys + _SLACK:
                    # Stale entries fill the heap: keep the residents' only.
                    length = 0
                    for node in range(num_keys):
                        if inside[node]:
                            length = push(heap, length, entry[node])
                first = stop
            _note(begin, end, key, bytes_of, inside, hit_mask, bit, streamed, row, phase[dispatch])


@compiled("void(int64[::1], int32[::1], boolean, int64, int64[::1])")
def fill_next_use(
    offset: Int64s, key: Int32s, one_by_one: bool, num_keys: int, next_use: Int64s
) -> None:
    """Fills [lookups + keys] next uses as `replay_min` takes them; never = lookups + 1."""
    num_lookups = len(key)
    upcoming = filled_int64(num_keys, num_lookups + 1)
    for dispatch in range(len(offset) - 2, -1, -1):
        for lookup in range(offset[dispatch + 1] - 1, offset[dispatch] - 1, -1):
            chosen = key[lookup]
            next_use[lookup] = upcoming[chosen]
            upcoming[chosen] = lookup if one_by_one else dispatch
    for chosen in range(num_keys):
        next_use[num_lookups + chosen] = upcoming[chosen]


def next_uses(offset: Int64s, key: Int32s, *, one_by_one: bool, num_keys: int) -> Int64s:
    """Returns the next uses as `replay_min` takes them.

    Args:
        offset: [dispatches + 1].
        key: [lookups].
        one_by_one: Count lookups, as ``sequential`` does, not dispatches.
        num_keys: Keys of the cache.
    """
    found = np.empty(len(key) + num_keys, np.int64)
    fill_next_use(offset, key, one_by_one, num_keys, found)
    return found


def int64s(values: Any) -> Int64s:
    """Returns ``values`` as the kernels take them."""
    return np.ascontiguousarray(values, dtype=np.int64)
