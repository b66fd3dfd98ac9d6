"""Events are made once and used again."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")

from moeprof.live.spare_events import SpareEvents


def test_events_are_made_where_none_is_spare() -> None:
    numbers = itertools.count()
    spare = SpareEvents(lambda: next(numbers))
    assert spare.take(3) == [0, 1, 2] and len(spare) == 0
    spare.give_back([0, 1, 2])
    taken = spare.take(2)
    assert len(set(taken)) == 2 and set(taken) < {0, 1, 2} and len(spare) == 1
    # What is left, and new ones: nobody has one that another has.
    more = spare.take(4)
    assert len(set(more)) == 4 and not set(more) & set(taken)
    assert max(more) == 5 and len(spare) == 0
    assert spare.take(0) == []
    spare.give_back(taken)
    assert spare.take(0) == [] and len(spare) == 2
