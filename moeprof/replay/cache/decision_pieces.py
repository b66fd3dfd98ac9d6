"""In which pieces a compiled decision runs: `pieces`, on the arrays of `decision_state`."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeprof.replay.cache.decision_state import (
    AFTER,
    COPY_PLACES,
    COPY_STARTS,
    LEVELS,
    LOADS,
    MOST_EXPERTS,
    NUM_COPIES,
    NUM_PIECES,
    ON_HOST,
    PER_LEVEL,
    PIECE_PLACES,
    PIECE_STARTS,
)
from moeprof.replay.cache.residency import AT_ONCE
from moeprof.replay.compiled import inlined


@inlined("void(int32[::1], int64[::1], int64)", allocates=False)
def order_pieces(ints, longs, active):  # type: ignore[no-untyped-def]
    """Sorts places by level (`pieces_of`), and leaves the piece of each in place of its level."""
    on_host = ON_HOST * longs[MOST_EXPERTS]
    levels, per_level = longs[LEVELS], longs[PER_LEVEL]
    starts, places = longs[PIECE_STARTS], longs[PIECE_PLACES]
    top: Any = -1
    for place in range(active):
        if ints[on_host + place]:
            continue
        level = np.int64(ints[levels + place])
        while top < level:
            top += 1
            ints[per_level + top] = 0
        ints[per_level + level] += 1
    num_pieces = 0
    num_places: Any = 0
    for each in range(top + 1):
        count = ints[per_level + each]
        ints[per_level + each] = num_pieces
        if count:
            ints[starts + num_pieces] = num_places
            num_pieces += 1
            num_places += count
    ints[starts + num_pieces] = num_places
    longs[NUM_PIECES] = num_pieces
    for place in range(active):
        if ints[on_host + place]:
            continue
        piece = ints[per_level + ints[levels + place]]
        ints[levels + place] = piece
        ints[places + ints[starts + piece]] = place
        ints[starts + piece] += 1
    # Each start has moved on to the next one's.
    for piece in range(num_pieces - 1, 0, -1):
        ints[starts + piece] = ints[starts + piece - 1]
    ints[starts] = 0


@inlined("int64(int32[::1], int64[::1], int64)", allocates=False)
def _group(ints, longs, place):  # type: ignore[no-untyped-def]
    """Returns before which piece a copy for the device is asked for."""
    after = ints[AFTER * longs[MOST_EXPERTS] + place]
    return 0 if after == AT_ONCE else ints[longs[LEVELS] + after] + 1


@inlined("void(int32[::1], int64[::1], int64)", allocates=False)
def order_copies(ints, longs, active):  # type: ignore[no-untyped-def]
    """Sorts copies by the piece before which they are asked for (`copies_of`)."""
    most, num_pieces = longs[MOST_EXPERTS], longs[NUM_PIECES]
    starts, places = longs[COPY_STARTS], longs[COPY_PLACES]
    for group in range(num_pieces + 2):
        ints[starts + group] = 0
    if longs[NUM_COPIES] == 0:
        return
    num_on_device = ints[longs[PIECE_STARTS] + num_pieces]
    for index in range(num_on_device):
        place = ints[longs[PIECE_PLACES] + index]
        if ints[LOADS * most + place]:
            ints[starts + _group(ints, longs, place) + 1] += 1
    for group in range(num_pieces + 1):
        ints[starts + group + 1] += ints[starts + group]
    num_copies = np.int64(ints[starts + num_pieces + 1])
    for index in range(num_on_device):
        place = ints[longs[PIECE_PLACES] + index]
        if ints[LOADS * most + place]:
            group = _group(ints, longs, place)
            ints[places + ints[starts + group]] = place
            ints[starts + group] += 1
    for group in range(num_pieces, 0, -1):
        ints[starts + group] = ints[starts + group - 1]
    ints[starts] = 0
    if num_copies < longs[NUM_COPIES]:
        for place in range(active):
            if ints[ON_HOST * most + place] and ints[LOADS * most + place]:
                ints[places + num_copies] = place
                num_copies += 1
        ints[starts + num_pieces + 1] = num_copies
