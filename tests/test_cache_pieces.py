"""In which pieces a dispatch runs, worked out by hand and held to what copies wait for."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from moeprof.replay.cache import policies
from moeprof.replay.cache.pieces import pieces_of
from moeprof.replay.cache.residency import (
    AT_ONCE,
    NO_SLOT,
    CacheSpec,
    MissRule,
    Planned,
    Residency,
)


def hit(expert: int) -> Planned:
    return Planned(expert, True, expert, False, False, AT_ONCE)


def load(expert: int, after: int = AT_ONCE, *, on_host: bool = False) -> Planned:
    return Planned(expert, False, expert, True, on_host, after)


def test_levels_by_hand() -> None:
    planned = [hit(0), load(1), load(2, after=0), hit(3), load(4, after=1), load(5, after=4)]
    assert pieces_of(planned, streamed=True) == [[0, 3], [1, 2], [4], [5]]
    assert pieces_of(planned, streamed=False) == [[0], [1], [2], [3], [4], [5]]
    assert pieces_of([load(0), load(1)], streamed=True) == [[0, 1]]
    assert pieces_of([], streamed=True) == []


def test_what_the_host_computes_is_in_no_piece() -> None:
    alone = Planned(2, False, NO_SLOT, False, True, AT_ONCE)
    planned = [hit(0), load(1, after=0, on_host=True), alone, hit(3)]
    assert pieces_of(planned, streamed=True) == [[0, 3]]
    assert pieces_of(planned, streamed=False) == [[0], [3]]
    assert pieces_of([alone], streamed=True) == []


@pytest.mark.parametrize("policy", ["lru", "lfu", "lifo", "paper"])
def test_readers_come_before_those_who_wait_for_them(policy: str) -> None:
    generator = np.random.default_rng(0)
    machine = functools.partial(policies.SIMPLE_MACHINES[policy], [1] * 16, 4)
    cache = CacheSpec(sites=((0, 16),), capacity=4, pool=0, machine=machine)
    residency = Residency([cache], [4])
    depths = set()
    for _ in range(50):
        active = sorted(generator.choice(16, size=9, replace=False).tolist())
        planned = residency.plan(0, active, [1] * 9, MissRule())
        pieces = pieces_of(planned, streamed=True)
        assert sorted(place for piece in pieces for place in piece) == list(range(9))
        piece_of = {place: index for index, piece in enumerate(pieces) for place in piece}
        for place, step in enumerate(planned):
            if step.after != AT_ONCE:
                assert piece_of[step.after] < piece_of[place]
        # No slot is written and read by two lookups of one piece.
        for piece in pieces:
            slots = [planned[place].slot for place in piece]
            assert len(slots) == len(set(slots))
        depths.add(len(pieces))
    assert max(depths) > 2
