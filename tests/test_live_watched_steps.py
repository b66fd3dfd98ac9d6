"""Which steps are set aside, by looks that are written down before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from moeprof.live import watched_steps
from moeprof.live.core_binding import Unwatched
from moeprof.live.watched_steps import StepTimes, WatchedTimes

EVERY_MS = watched_steps._LOOK_EVERY_MS
LONG_MS = 2 * EVERY_MS


class Script:
    """A watch that finds what was written down, then only quiet; notes what it is asked."""

    def __init__(self, looks: Iterable[bool]) -> None:
        self.looks = iter(looks)
        self.log: list[str] = []

    def settle(self) -> None:
        self.log.append("settle")

    def give_up(self) -> None:
        self.log.append("give up")

    def is_quiet(self) -> bool:
        found = next(self.looks, True)
        self.log.append("quiet" if found else "slow")
        return found


def watched(times_ms: Sequence[float], looks: Iterable[bool]) -> tuple[list[bool], list[str]]:
    """Returns the flags of all steps, and what was asked; ``|`` where a step was run."""
    watch = Script(looks)
    times = WatchedTimes(watch)
    for each in times_ms:
        watch.log.append("|")
        times.add(each)
    found = times.whole()
    assert found.times_ms == tuple(times_ms)
    return list(found.is_quiet), watch.log


def test_it_looks_before_and_after() -> None:
    flags, log = watched([LONG_MS] * 2, [True, True, True])
    assert flags == [True, True]
    assert log == ["settle", "quiet", "|", "quiet", "|", "quiet"]
    # Slow after the second: another core is looked for, on which the third is quiet.
    flags, log = watched([LONG_MS] * 3, [True, True, False, True, True])
    assert flags == [True, False, True]
    assert log == ["settle", "quiet", "|", "quiet", "|", "slow", "settle", "quiet", "|", "quiet"]


def test_where_no_core_is_quiet() -> None:
    # None before the first step, nor after it; one after the second.
    flags, log = watched([LONG_MS] * 3, [False, False, False, True, True])
    assert flags == [False, False, True]
    assert log == ["settle", "slow", "|", "slow", "settle", "slow", "|", "quiet", "|", "quiet"]
    # Quiet after the first step, which does not make up for how it began.
    assert watched([LONG_MS] * 2, [False, True, True])[0] == [False, True]


def test_short_steps_share_a_look() -> None:
    # 4, 8 and 12 tenths of what is between looks: the third is looked at, then the sixth.
    short = [0.4 * EVERY_MS] * 7
    flags, log = watched(short, [True, True, False, True, True])
    assert flags == [True] * 3 + [False] * 3 + [True]
    assert "".join(each[0] for each in log) == "sq|||q|||ssq|q"
    # A long one after short ones is looked at with them.
    assert watched([0.4 * EVERY_MS, LONG_MS, LONG_MS], [True, False])[0] == [False, False, True]


def test_no_look_is_made_twice() -> None:
    # The last step was looked at when it ended: that is its look.
    assert watched([EVERY_MS], [])[1] == ["settle", "quiet", "|", "quiet"]
    assert watched([], []) == ([], ["settle", "quiet"])
    watch = Script([])
    times = WatchedTimes(watch)
    times.add(0.1)
    assert times.whole() == times.whole() == StepTimes(times_ms=(0.1,), is_quiet=(True,))
    assert watch.log.count("quiet") == 2


def test_an_unwatched_run_sets_nothing_aside() -> None:
    times = WatchedTimes(Unwatched())
    for each in (0.1, LONG_MS, 1e6):
        times.add(each)
    assert times.whole() == StepTimes(times_ms=(0.1, LONG_MS, 1e6), is_quiet=(True,) * 3)


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(EVERY_MS, 1e6), st.floats(EVERY_MS, 1e6)), max_size=20),
    looks=st.lists(st.booleans(), max_size=40),
)
def test_what_is_set_aside_is_not_chosen_by_its_time(
    steps: list[tuple[float, float]], looks: list[bool]
) -> None:
    assert watched([one for one, _ in steps], looks) == watched([two for _, two in steps], looks)


@settings(deadline=None)
@given(
    times_ms=st.lists(st.floats(0, LONG_MS), max_size=30),
    looks=st.lists(st.booleans(), max_size=70),
)
def test_flags_are_those_of_the_looks_around_them(times_ms: list[float], looks: list[bool]) -> None:
    flags, log = watched(times_ms, looks)
    assert len(flags) == len(times_ms) == log.count("|")
    # Between steps there may be looks: the first says how steps ended, the last how they begin.
    parts = " ".join(log).split("|")
    first = [part.split()[:1] for part in parts]
    last = [part.split()[-1:] for part in parts]
    for step, flag in enumerate(flags):
        before = next(each for each in last[step::-1] if each)
        after = next(each for each in first[step + 1 :] if each)
        assert flag == (before == after == ["quiet"])
    # None is longer without a look than was allowed, but for the step that passes it.
    since = 0.0
    for each, part in zip(times_ms, parts[1:], strict=True):
        assert since < EVERY_MS
        since = 0.0 if part.split() else since + each
