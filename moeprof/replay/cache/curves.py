"""All capacities in one pass, where a larger cache always holds what a smaller one does.

That inclusion holds for lru and min under ``batch`` and ``sequential`` and for lifo under
``sequential``, with equal sizes (Mattson et al. 1970). A lookup's reach is the smallest capacity at
which it hits; hits at all capacities follow from it. Under ``batch`` the reach is read at arrival,
before the dispatch changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import kernels
from moeprof.replay.cache.loops import pop, popcount, push
from moeprof.replay.compiled import compiled, filled_int32, filled_int64, inlined

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

NEVER = np.iinfo(np.int32).max
"""Reach of a lookup that hits at no capacity."""

_CURVES = {
    ("lru", "batch"), ("lru", "sequential"), ("min", "batch"), ("min", "sequential"),
    ("min_bypass", "batch"), ("lifo", "sequential"),
}  # fmt: skip
_FROM_FULL = {("min", "batch"), ("min", "sequential"), ("min_bypass", "batch")}

_WORD_BITS = 64
_GROUP_WORDS = 8
_WINDOW_PER_KEY = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """From which capacity on.

    Attributes:
        hit: [lookups] smallest capacity at which the lookup hits; `NEVER` at none.
        kept: [lookups] smallest capacity at which the expert is resident after the dispatch.
    """

    hit: Int32s
    kept: Int32s


def exists(policy: str, *, semantics: str, initial: str) -> bool:
    """Returns True where one pass gives all capacities (with equal sizes)."""
    if initial == "full":
        return (policy, semantics) in _FROM_FULL
    return (policy, semantics) in _CURVES


def reach(
    stream: Stream, policy: str, *, semantics: str = "batch", initial: str = "empty"
) -> Reach:
    """Returns the reach of every lookup.

    Args:
        stream: Under ``sequential`` with lookups by key (`Stream.by_key`).
        policy: ``lru``, ``min``, ``min_bypass`` or ``lifo``.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty``, or ``full`` for min and min_bypass.
    """
    assert exists(policy, semantics=semantics, initial=initial)
    found = Reach(
        hit=np.empty(stream.num_lookups, np.int32), kept=np.empty(stream.num_lookups, np.int32)
    )
    if semantics == "batch":
        if policy == "lru":
            lru_batch(stream.offset, stream.key, stream.last, stream.num_keys, found.hit)
            ends = np.repeat(stream.offset[1:], np.diff(stream.offset))
            found.kept[stream.last] = ends - np.arange(stream.num_lookups)
            return found
        next_use = kernels.next_uses(
            stream.offset, stream.key, one_by_one=False, num_keys=stream.num_keys
        )
        _min_batch(
            stream.offset,
            stream.key,
            next_use,
            stream.num_keys,
            policy == "min_bypass",
            initial == "full",
            *_both(found),
        )
        return found
    if policy == "lru":
        lru_flat(stream.key, stream.num_keys, found.hit)
    elif policy == "lifo":
        lifo_flat(stream.key, stream.num_keys, found.hit)
    else:
        next_use = kernels.next_uses(
            stream.offset, stream.key, one_by_one=True, num_keys=stream.num_keys
        )
        min_flat(stream.key, next_use, stream.num_keys, initial == "full", found.hit)
    _kept_one_by_one(stream, policy, found, full=initial == "full")
    return found


def _both(found: Reach) -> tuple[Int32s, Int32s]:
    return found.hit, found.kept


def _kept_one_by_one(stream: Stream, policy: str, found: Reach, *, full: bool) -> None:
    """Fills `Reach.kept` for ``sequential``, where dispatches change nothing but this."""
    if policy == "lru":
        ends = np.repeat(stream.offset[1:], np.diff(stream.offset))
        found.kept[:] = ends - np.arange(stream.num_lookups)
    elif policy == "lifo":
        _lifo_kept(stream.offset, stream.key, stream.num_keys, found.kept)
    else:
        # What was not kept at the end of its dispatch has no reach within it: replayed exactly.
        next_use = kernels.next_uses(
            stream.offset, stream.key, one_by_one=True, num_keys=stream.num_keys
        )
        _min_kept(stream.offset, stream.key, next_use, stream.num_keys, full, found.kept)


@inlined("int64(uint64[::1], int32[::1], int64, int64)")
def _above(words, groups, slot, end_word):  # type: ignore[no-untyped-def]
    """Returns how many slots beyond ``slot`` are set."""
    word = slot >> 6
    bit = np.uint64(slot & 63)
    total = np.int64(popcount((words[word] >> bit) >> np.uint64(1)))
    group = word // _GROUP_WORDS
    stop = min((group + 1) * _GROUP_WORDS, end_word)
    for index in range(word + 1, stop):
        total += np.int64(popcount(words[index]))
    in_groups = np.int32(0)
    for index in range(group + 1, (end_word - 1) // _GROUP_WORDS + 1):
        in_groups += groups[index]
    return total + np.int64(in_groups)


@inlined("void(uint64[::1], int32[::1], int64)")
def _set(words, groups, slot):  # type: ignore[no-untyped-def]
    words[slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
    groups[(slot >> 6) // _GROUP_WORDS] += 1


@inlined("void(uint64[::1], int32[::1], int64)")
def _clear(words, groups, slot):  # type: ignore[no-untyped-def]
    words[slot >> 6] &= ~(np.uint64(1) << np.uint64(slot & 63))
    groups[(slot >> 6) // _GROUP_WORDS] -= 1


@inlined("int64(uint64[::1], int32[::1], int32[::1], int64[::1], int64)")
def _pack(words, groups, owner, newest, used):  # type: ignore[no-untyped-def]
    """Moves the set slots to the front, in order, and returns how many there are."""
    place = 0
    one = np.uint64(1)
    for word in range((used + 63) >> 6):
        rest = words[word]
        while rest:
            found = (word << 6) + np.int64(popcount((rest & (~rest + one)) - one))
            rest &= rest - one
            owner[place] = owner[found]
            newest[owner[found]] = place
            place += 1
    words[:] = 0
    groups[:] = 0
    for slot in range(place):
        _set(words, groups, slot)
    return place


def _window(num_keys: int, longest: int) -> int:
    """Returns the slots of a window: whole groups, room for all keys and a dispatch."""
    unit = _WORD_BITS * _GROUP_WORDS
    return -(-max(_WINDOW_PER_KEY * num_keys, num_keys + longest) // unit) * unit


@dataclass(frozen=True, eq=False)
class LruState:
    """An lru stack between calls, so that traces can be streamed; see `lru_batch`."""

    words: NDArray[np.uint64]
    groups: Int32s
    owner: Int32s
    newest: Int64s
    used: Int64s

    @classmethod
    def empty(cls, num_keys: int) -> LruState:
        """Returns the state of an empty cache."""
        window = _window(num_keys, num_keys)
        return cls(
            np.zeros(window // _WORD_BITS, np.uint64),
            np.zeros(window // _WORD_BITS // _GROUP_WORDS, np.int32),
            np.zeros(window, np.int32),
            np.full(num_keys, -1, np.int64),
            np.zeros(1, np.int64),
        )


def lru_batch(
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    num_keys: int,
    hit: Int32s,
    state: LruState | None = None,
) -> None:
    """Fills the reach of lru under ``batch``.

    Args:
        offset: [dispatches + 1].
        key: [lookups].
        last: [lookups] as in `Stream`.
        num_keys: Keys.
        hit: [lookups] to fill.
        state: Where to go on from; changed in place.
    """
    state = state or LruState.empty(num_keys)
    _lru_batch(
        offset, key, last, state.words, state.groups, state.owner, state.newest, state.used, hit
    )


@compiled(
    "void(int64[::1], int32[::1], int32[::1], uint64[::1], int32[::1], int32[::1], int64[::1],"
    " int64[::1], int32[::1])"
)
def _lru_batch(  # noqa: PLR0917
    offset: Int64s,
    key: Int32s,
    last: Int32s,
    words: NDArray[np.uint64],
    groups: Int32s,
    owner: Int32s,
    newest: Int64s,
    state_used: Int64s,
    hit: Int32s,
) -> None:
    window = len(owner)
    used = state_used[0]
    for dispatch in range(len(offset) - 1):
        first, stop = offset[dispatch], offset[dispatch + 1]
        if used + stop - first > window:
            used = _pack(words, groups, owner, newest, used)
        end_word = (used + 63) >> 6
        for lookup in range(first, stop):
            slot = newest[key[lookup]]
            if slot < 0:
                hit[lookup] = NEVER
            else:
                hit[lookup] = _above(words, groups, slot, end_word) + 1
        for index in range(first, stop):
            chosen = key[last[index]]
            if newest[chosen] >= 0:
                _clear(words, groups, newest[chosen])
            _set(words, groups, used)
            owner[used] = chosen
            newest[chosen] = used
            used += 1
    state_used[0] = used


def lru_flat(key: Int32s, num_keys: int, hit: Int32s) -> None:
    """Fills the reach of lru, one lookup after another."""
    state = LruState.empty(num_keys)
    _lru_flat(key, state.words, state.groups, state.owner, state.newest, hit)


@compiled("void(int32[::1], uint64[::1], int32[::1], int32[::1], int64[::1], int32[::1])")
def _lru_flat(
    key: Int32s,
    words: NDArray[np.uint64],
    groups: Int32s,
    owner: Int32s,
    newest: Int64s,
    hit: Int32s,
) -> None:
    window = len(owner)
    used = 0
    for lookup in range(len(key)):
        if used == window:
            used = _pack(words, groups, owner, newest, used)
        chosen = key[lookup]
        slot = newest[chosen]
        if slot < 0:
            hit[lookup] = NEVER
        else:
            hit[lookup] = _above(words, groups, slot, (used + 63) >> 6) + 1
            _clear(words, groups, slot)
        _set(words, groups, used)
        owner[used] = chosen
        newest[chosen] = used
        used += 1


@compiled("void(int32[::1], int64, int32[::1])")
def lifo_flat(key: Int32s, num_keys: int, hit: Int32s) -> None:
    """Fills the reach of lifo, one lookup after another.

    A cache of C keeps the first C - 1 experts for good and the last miss in the slot left, so a
    lookup hits where its expert is one of these or nothing has missed since its last use.
    """
    rank = filled_int32(num_keys, -1)
    newest = np.empty(num_keys, np.int64)
    times = np.empty(num_keys + 1, np.int64)
    ranks = np.empty(num_keys + 1, np.int32)
    depth = 0
    num_ranked = 0
    for lookup in range(len(key)):
        chosen = key[lookup]
        own = rank[chosen]
        if own < 0:
            own = num_ranked
            rank[chosen] = own
            num_ranked += 1
            hit[lookup] = NEVER
        else:
            # The highest rank since the last use: the stack falls in rank as time goes on.
            low, high = 0, depth
            while low < high:
                middle = (low + high) >> 1
                if times[middle] > newest[chosen]:
                    high = middle
                else:
                    low = middle + 1
            since = ranks[low] if low < depth else -1
            hit[lookup] = min(own, since) + 2
        newest[chosen] = lookup
        while depth > 0 and ranks[depth - 1] <= own:
            depth -= 1
        times[depth] = lookup
        ranks[depth] = own
        depth += 1


@compiled("void(int64[::1], int32[::1], int64, int32[::1])")
def _lifo_kept(offset: Int64s, key: Int32s, num_keys: int, kept: Int32s) -> None:
    rank = filled_int32(num_keys, -1)
    num_ranked = 0
    for dispatch in range(len(offset) - 1):
        first, stop = offset[dispatch], offset[dispatch + 1]
        for lookup in range(first, stop):
            if rank[key[lookup]] < 0:
                rank[key[lookup]] = num_ranked
                num_ranked += 1
        since = -1
        for lookup in range(stop - 1, first - 1, -1):
            own = rank[key[lookup]]
            kept[lookup] = min(own, since) + 2
            since = max(since, own)


_BLOCK = 16
_SUPER = 128


@inlined("void(int64[::1], int64[::1], int64[::1], int64)")
def _refresh_maxima(value, block_max, super_max, position):  # type: ignore[no-untyped-def]
    block = position // _BLOCK
    most = value[block * _BLOCK]
    for index in range(block * _BLOCK + 1, (block + 1) * _BLOCK):
        most = max(most, value[index])
    block_max[block] = most
    above = position // _SUPER
    most = block_max[above * (_SUPER // _BLOCK)]
    for index in range(above * (_SUPER // _BLOCK) + 1, (above + 1) * (_SUPER // _BLOCK)):
        most = max(most, block_max[index])
    super_max[above] = most


@inlined("void(int32[::1], int64[::1], int32[::1], int64[::1], int64[::1], int64, int64, int64)")
def _to_front(  # type: ignore[no-untyped-def]
    stack, value, place, block_max, super_max, chosen, own_value, depth
):
    """Puts a key on top of the stack; the farther of two next uses moves down until ``depth``."""
    if depth == 0:
        stack[0] = chosen
        value[0] = own_value
        place[chosen] = 0
        _refresh_maxima(value, block_max, super_max, 0)
        return
    carried, carried_value = stack[0], value[0]
    stack[0] = chosen
    value[0] = own_value
    place[chosen] = 0
    position = 1
    changed = True
    while position < depth:
        if position % _BLOCK == 0:
            if (
                position % _SUPER == 0
                and position + _SUPER <= depth
                and super_max[position // _SUPER] <= carried_value
            ):
                position += _SUPER
                continue
            if position + _BLOCK <= depth and block_max[position // _BLOCK] <= carried_value:
                position += _BLOCK
                continue
        stop = min(depth, (position // _BLOCK + 1) * _BLOCK)
        changed = position < _BLOCK
        for index in range(position, stop):
            if value[index] > carried_value:
                other, other_value = stack[index], value[index]
                stack[index] = carried
                value[index] = carried_value
                place[carried] = index
                carried, carried_value = other, other_value
                changed = True
        if changed:
            _refresh_maxima(value, block_max, super_max, position)
        position = stop
    stack[depth] = carried
    value[depth] = carried_value
    place[carried] = depth
    _refresh_maxima(value, block_max, super_max, depth)
    if depth < _BLOCK:
        return
    _refresh_maxima(value, block_max, super_max, 0)


@compiled("void(int32[::1], int64[::1], int64, boolean, int32[::1])")
def min_flat(key: Int32s, next_use: Int64s, num_keys: int, full: bool, hit: Int32s) -> None:
    """Fills the reach of min, one lookup after another (Mattson's priority stack).

    Blocks of the stack know their farthest next use, so that those with nothing to take are passed.

    Args:
        key: [lookups].
        next_use: From `kernels.next_uses`, one by one.
        num_keys: Keys.
        full: Start with all keys, the lowest on top.
        hit: [lookups] to fill.
    """
    num_lookups = len(key)
    room = (num_keys // _SUPER + 1) * _SUPER
    stack = filled_int32(room, 0)
    value = filled_int64(room, -1)
    place = filled_int32(num_keys, -1)
    block_max = filled_int64(room // _BLOCK, -1)
    super_max = filled_int64(room // _SUPER, -1)
    depth = 0
    if full:
        for chosen in range(num_keys):
            stack[chosen] = chosen
            value[chosen] = next_use[num_lookups + chosen]
            if value[chosen] > num_lookups:
                value[chosen] += chosen
            place[chosen] = chosen
        for chosen in range(num_keys):
            _refresh_maxima(value, block_max, super_max, chosen)
        depth = num_keys
    for lookup in range(num_lookups):
        chosen = key[lookup]
        own = next_use[lookup]
        if own > num_lookups:
            own += chosen
        at = np.int64(place[chosen])
        if at < 0:
            hit[lookup] = NEVER
            at = np.int64(depth)
            depth += 1
        else:
            hit[lookup] = at + 1
        _to_front(stack, value, place, block_max, super_max, chosen, own, at)


@compiled("void(int64[::1], int32[::1], int64[::1], int64, boolean, int32[::1])")
def _min_kept(
    offset: Int64s, key: Int32s, next_use: Int64s, num_keys: int, full: bool, kept: Int32s
) -> None:
    """Fills, for min one by one, the depth of each expert at the end of its dispatch."""
    num_lookups = len(key)
    room = (num_keys // _SUPER + 1) * _SUPER
    stack = filled_int32(room, 0)
    value = filled_int64(room, -1)
    place = filled_int32(num_keys, -1)
    block_max = filled_int64(room // _BLOCK, -1)
    super_max = filled_int64(room // _SUPER, -1)
    depth = 0
    if full:
        for chosen in range(num_keys):
            stack[chosen] = chosen
            value[chosen] = next_use[num_lookups + chosen]
            if value[chosen] > num_lookups:
                value[chosen] += chosen
            place[chosen] = chosen
        for chosen in range(num_keys):
            _refresh_maxima(value, block_max, super_max, chosen)
        depth = num_keys
    for dispatch in range(len(offset) - 1):
        first, stop = offset[dispatch], offset[dispatch + 1]
        for lookup in range(first, stop):
            chosen = key[lookup]
            own = next_use[lookup]
            if own > num_lookups:
                own += chosen
            at = np.int64(place[chosen])
            if at < 0:
                at = np.int64(depth)
                depth += 1
            _to_front(stack, value, place, block_max, super_max, chosen, own, at)
        for lookup in range(first, stop):
            kept[lookup] = place[key[lookup]] + 1


@compiled(
    "void(int64[::1], int32[::1], int64[::1], int64, boolean, boolean, int32[::1], int32[::1])"
)
def _min_batch(
    offset: Int64s,
    key: Int32s,
    next_use: Int64s,
    num_keys: int,
    bypass: bool,
    full: bool,
    hit: Int32s,
    kept: Int32s,
) -> None:
    """Fills the reach of min or min_bypass under ``batch``.

    The dispatch's own experts come first, nearest next use on top; from there on each place takes
    the nearest of those that were pushed out above it and the one that was there.
    """
    num_lookups = len(key)
    stack = filled_int64(num_keys, 0)  # next use and key in one number
    place = filled_int32(num_keys, -1)
    newest = filled_int64(num_keys, -1)
    pool = np.empty(2 * num_keys + 2, np.int64)
    depth = 0
    if full:
        for chosen in range(num_keys):
            stack[chosen] = next_use[num_lookups + chosen] * num_keys + chosen
            place[chosen] = chosen
        depth = num_keys
    for dispatch in range(len(offset) - 1):
        first, stop = offset[dispatch], offset[dispatch + 1]
        own = stop - first
        length = 0
        for lookup in range(first, stop):
            chosen = key[lookup]
            newest[chosen] = dispatch
            hit[lookup] = place[chosen] + 1 if place[chosen] >= 0 else NEVER
            length = push(pool, length, -(next_use[lookup] * num_keys + chosen))
        position = 0
        if not bypass:
            displaced = np.int64(0)
            for index in range(own):
                item = -pool[0]
                length = pop(pool, length)
                if index < depth and newest[stack[index] % num_keys] != dispatch:
                    # Kept behind the heap, which shrinks from the end.
                    pool[len(pool) - 1 - displaced] = -stack[index]
                    displaced += 1
                stack[index] = item
                place[item % num_keys] = index
            for index in range(displaced):
                length = push(pool, length, pool[len(pool) - 1 - index])
            position = own
        while length > 0:
            if position < depth and newest[stack[position] % num_keys] != dispatch:
                if -stack[position] >= pool[0]:
                    position += 1
                    continue
                item = -pool[0]
                length = pop(pool, length)
                length = push(pool, length, -stack[position])
            else:
                item = -pool[0]
                length = pop(pool, length)
            stack[position] = item
            place[item % num_keys] = position
            position += 1
        if position > depth:  # noqa: PLR1730
            depth = position
        for lookup in range(first, stop):
            kept[lookup] = place[key[lookup]] + 1
