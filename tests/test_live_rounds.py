"""Which setting is visited when, with runs and a clock that are stand-ins."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moeprof.live import step_percentiles  # noqa: E402
from moeprof.live.rounds import (  # noqa: E402
    RoundLimits,
    Rounds,
    Visit,
    Visited,
    _Cost,
    _Schedule,
    run_in_rounds,
)
from moeprof.live.step_percentiles import more_visits  # noqa: E402
from moeprof.live.watched_steps import StepTimes  # noqa: E402

BUILT_S, CLOSED_S = 1.0, 0.5


class Machine:
    """Builds runs that only let a clock go on, and notes what is done.

    Args:
        step_s: Time of a repetition by setting.
        fails: How often building a setting runs out of memory.
        fails_running: The same for its repetitions.
    """

    def __init__(
        self,
        step_s: Mapping[str, float],
        fails: Mapping[str, int] | None = None,
        fails_running: Mapping[str, int] | None = None,
    ) -> None:
        self.step_s = step_s
        self.fails = dict(fails or {})
        self.fails_running = dict(fails_running or {})
        self.now_s = 100.0
        self.log: list[tuple[str, Any]] = []
        self.is_alone = False
        self.open_runs = 0

    def opened(self, name: str) -> _Run:
        assert self.open_runs == 0 and not gc.isenabled()
        self._fail(self.fails, name)
        self.now_s += BUILT_S
        self.open_runs += 1
        return _Run(self, name)

    def empty(self) -> None:
        self.log.append(("empty", None))

    def _fail(self, fails: dict[str, int], name: str) -> None:
        if fails.get(name, 0):
            fails[name] -= 1
            raise torch.cuda.OutOfMemoryError("too much")

    def of(self, kind: str) -> list[Any]:
        return [what for each, what in self.log if each == kind]


class _Run:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def warm_up(self, *, is_whole: bool) -> None:
        self.machine.log.append(("warm", (self.name, is_whole)))
        self.machine.now_s += (1.0 if is_whole else 0.125) * self.machine.step_s[self.name]

    def repeat(self) -> StepTimes:
        self.machine._fail(self.machine.fails_running, self.name)
        self.machine.log.append(("step", self.name))
        self.machine.now_s += self.machine.step_s[self.name]
        step_ms = self.machine.step_s[self.name] * 1e3
        # The core is slow during the second step of every other repetition.
        is_quiet = self.machine.is_alone or len(self.machine.of("step")) % 2 == 1
        return StepTimes(times_ms=(step_ms, step_ms + 1), is_quiet=(True, is_quiet))

    def close(self, *, keep_memory: bool) -> None:
        # Memory stays with torch between visits.
        assert keep_memory
        self.machine.now_s += CLOSED_S
        self.machine.open_runs -= 1
        self.machine.log.append(("close", self.name))


def limits(**changes: Any) -> RoundLimits:
    return RoundLimits(
        **{"rounds": 3, "repetitions": 6, "most_repetitions": 20, "tolerance": 0.02, **changes}
    )


def measure(
    machine: Machine,
    names: Sequence[str],
    given: RoundLimits,
    *,
    spread: Callable[[Visited], float] = lambda _: 0.0,
    progress: Any = None,
) -> Rounds:
    return run_in_rounds(
        names,
        machine.opened,
        given,
        spread=spread,
        probe=lambda: 2.0,
        empty=machine.empty,
        clock=lambda: machine.now_s,
        progress=progress,
    )


def order_of(found: Rounds) -> list[tuple[int, str]]:
    """Returns (round, setting) of all visits in order of time."""
    visits = [
        (visit.begun_s, visit.round, name)
        for name, visited in found.measured.items()
        for visit in (() if visited is None else visited.visits)
    ]
    return [(number, name) for _, number, name in sorted(visits)]


def test_rounds_go_there_and_back() -> None:
    machine = Machine(dict.fromkeys("abcd", 1.0))
    found = measure(machine, "abcd", limits())
    # Nothing twice in a row: d would begin the second round.
    order = ["abcd", "cdba", "bacd"]
    # The third begins with b: a ended the second.
    assert order_of(found) == [(n, name) for n, each in enumerate(order, 1) for name in each]
    assert list(found.measured) == list("abcd") and found.late == ()
    visited = found.measured["a"]
    assert visited is not None
    assert visited.times_ms.shape == (6, 2)
    repeated = visited.repeated
    assert repeated.times_ms.tolist() == visited.times_ms.tolist() == [[1000, 1001]] * 6
    assert repeated.visit_of is not None
    assert repeated.visit_of.tolist() == [0, 0, 1, 1, 2, 2]
    # Two repetitions a visit: the second of each is disturbed.
    assert repeated.is_quiet.tolist() == [[True, True], [True, False]] * 3
    assert all(visit.is_quiet.tolist() == [[True, True], [True, False]] for visit in visited.visits)
    assert visited.round_of.tolist() == [1, 1, 2, 2, 3, 3]
    assert visited.visits[0].begun_s == 0 and visited.visits[0].probe_ms == 2.0
    assert machine.open_runs == 0 and machine.of("empty") == []
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_only_first_visits_are_warmed_up_whole() -> None:
    machine = Machine(dict.fromkeys("ab", 1.0))
    measure(machine, "ab", limits())
    warmed = machine.of("warm")
    assert warmed[:2] == [("a", True), ("b", True)]
    assert len(warmed) == 6 and not any(is_whole for _, is_whole in warmed[2:])


def test_fewer_repetitions_than_rounds() -> None:
    assert (limits(repetitions=2).num_rounds, limits(repetitions=2).of_visit) == (2, 1)
    assert (limits(repetitions=5).num_rounds, limits(repetitions=5).of_visit) == (3, 2)
    found = measure(Machine({"a": 1.0, "b": 1.0}), "ab", limits(repetitions=2))
    assert [name for _, name in order_of(found)] == list("abab")


@pytest.mark.parametrize(
    ("repetitions", "most", "rounds", "expected"),
    [(4, 4, 3, [2, 2]), (5, 5, 3, [2, 2, 1]), (7, 7, 5, [2, 2, 2, 1]), (1, 1, 3, [1])],
)
def test_nobody_is_repeated_more_than_wanted(
    repetitions: int, most: int, rounds: int, expected: list[int]
) -> None:
    # Visits of as many repetitions may have them all before the last round.
    given = limits(repetitions=repetitions, most_repetitions=most, rounds=rounds, most_s=1e4)
    found = measure(Machine({"a": 1.0, "b": 1.0}), "ab", given, spread=lambda _: math.inf)
    for visited in found.measured.values():
        assert visited is not None
        assert [len(visit.times_ms) for visit in visited.visits] == expected


def test_the_soonest_known_go_first() -> None:
    known = {"a": 0.01, "b": 0.03, "c": 0.09, "d": 0.05}

    def spread(visited: Visited) -> float:
        name = "abcd"[int(visited.times_ms[0, 0] / 1e3) - 1]
        return known[name] / (len(visited.visits) - 2)

    said: list[tuple[str, int, int]] = []
    machine = Machine({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    found = measure(
        machine, "abcd", limits(), spread=spread, progress=lambda *each: said.append(each)
    )
    further = [each for each in order_of(found) if each[0] > 3]
    # No setting that is known goes at all.
    assert further == [(4, "b"), (4, "d"), (4, "c"), (5, "d"), (5, "c"), (6, "c"), (7, "c")]
    assert said[0] == ("a, round 1 of 3", 0, 12)
    assert said[5] == ("d, round 2 of 3", 5, 12)
    assert said[12] == ("b, round 4, known to 3.0%", 12, 15)
    assert [done for _, done, _ in said] == list(range(len(said)))
    assert all(done < planned for _, done, planned in said)


def test_there_is_an_end_to_what_cannot_be_known() -> None:
    machine = Machine({"a": 1.0, "b": 1.0})
    found = measure(machine, "ab", limits(most_repetitions=9), spread=lambda _: math.inf)
    for visited in found.measured.values():
        assert visited is not None and visited.times_ms.shape == (9, 2)
        # The last visit only takes what is left.
        assert visited.round_of.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize("most_s", [45.0, 60.0, 80.0, 100.0, 150.0])
def test_short_time_is_shared(most_s: float) -> None:
    names = "abcdefgh"
    step_s = {name: 1.0 + 0.25 * index for index, name in enumerate(names)}
    machine = Machine(step_s)
    found = measure(machine, names, limits(most_s=most_s), spread=lambda _: math.inf)
    assert found.late == () and None not in found.measured.values()
    rounds = [set(visited.round_of.tolist()) for visited in found.measured.values() if visited]
    least = min(map(len, rounds))
    assert all(set(range(1, least + 1)) <= each for each in rounds)
    assert machine.now_s - 100 <= most_s
    repetitions = [len(visited.times_ms) for visited in found.measured.values() if visited]
    # Less for all: not two repetitions of one where there is no time for every visit.
    whole = sum(2 * BUILT_S + CLOSED_S + 1.125 * each + each for each in step_s.values())
    if most_s < whole:
        first = [n for visited in found.measured.values() if visited for n in [visited.visits[0]]]
        assert all(len(visit.times_ms) == 1 for visit in first)
    assert min(repetitions) >= least


def test_rounds_come_before_repetitions() -> None:
    # Time for three rounds of one repetition, not of the two that are asked for.
    names = "abcd"
    once = BUILT_S + CLOSED_S + 1.0
    machine = Machine(dict.fromkeys(names, 1.0))
    most_s = len(names) * (3 * once + 1.0 + 2 / 8) + 0.4
    found = measure(machine, names, limits(most_s=most_s), spread=lambda _: math.inf)
    for visited in found.measured.values():
        assert visited is not None and visited.round_of.tolist() == [1, 2, 3]


def test_who_is_left_out_is_named() -> None:
    machine = Machine(dict.fromkeys("abcd", 1.0))
    # Each takes 3.5 seconds.
    found = measure(machine, "abcd", limits(most_s=7.5), spread=lambda _: math.inf)
    assert list(found.measured) == list("abc") and found.late == ("d",)
    assert [name for _, name in order_of(found)] == list("abc")
    none = measure(machine, "abcd", limits(most_s=0.0))
    assert none.measured == {} and none.late == tuple("abcd")


def test_memory_is_given_back_once_where_it_runs_out() -> None:
    machine = Machine(dict.fromkeys("abc", 1.0), fails={"b": 1}, fails_running={"c": 1})
    found = measure(machine, "abc", limits())
    assert machine.of("empty") == [None, None]
    for name in "abc":
        visited = found.measured[name]
        assert visited is not None and visited.times_ms.shape == (6, 2)
    # What ran out while it ran was closed, and built again.
    assert machine.of("close").count("c") == 4 and machine.open_runs == 0


def test_no_room_is_said_and_not_tried_again() -> None:
    machine = Machine(dict.fromkeys("abc", 1.0), fails={"b": 99})
    found = measure(machine, "abc", limits(), spread=lambda _: math.inf)
    assert found.measured["b"] is None and found.late == ()
    assert machine.fails["b"] == 97 and machine.of("empty") == [None]
    assert {name for _, name in order_of(found)} == {"a", "c"}


def test_what_was_measured_stays_where_memory_runs_out_later() -> None:
    machine = Machine({"a": 1.0, "b": 1.0})

    def progress(text: str, *_: int) -> None:
        if text.startswith("b, round 2"):
            machine.fails["b"] = 9

    found = measure(machine, "ab", limits(), progress=progress)
    visited = found.measured["b"]
    assert visited is not None and visited.round_of.tolist() == [1, 1]
    assert machine.fails["b"] == 7


def known_after(**needed: int) -> Callable[[Visited], float]:
    """Returns a spread that is down to the tolerance after so many visits, as noise has it."""

    def spread(visited: Visited) -> float:
        name = "abcdefgh"[round(visited.times_ms[0, 0] / 1e2) - 10]
        count = len(visited.visits)
        return 0.0199 * width(count) / width(needed[name]) if count > 1 else math.inf

    return spread


def width(num_visits: int) -> float:
    """Returns what `spread_of` makes of visits that vary by as much as each other, but a factor."""
    return step_percentiles._relative_width(num_visits)


def step_times(names: str) -> dict[str, float]:
    """Returns repetitions that take nearly as long, and tell settings apart."""
    return {name: 1.0 + 0.1 * index for index, name in enumerate(names)}


def test_time_is_spent_on_those_who_can_be_known() -> None:
    names = "abcd"
    needed = {"a": 40, "b": 4, "c": 6, "d": 35}
    given = limits(repetitions=3, most_repetitions=60)
    machine = Machine(step_times(names))
    measure(machine, names, given, spread=lambda _: 0.0)
    least_s = machine.now_s - 100
    visit_s = BUILT_S + CLOSED_S + 1.125 * 1.3
    machine = Machine(step_times(names))
    short = dataclasses.replace(given, most_s=least_s + 6 * visit_s)
    found = measure(machine, names, short, spread=known_after(**needed))
    visits = {name: len(each.visits) for name, each in found.measured.items() if each}
    # One visit and three make both known; the other two are as far from it as ever. One goes once,
    # that nobody is visited twice in a row, and what is left is too short for anybody else.
    assert visits["b"] == 4 and visits["c"] == 6
    assert machine.now_s - 100 <= short.most_s
    order = [name for _, name in order_of(found)]
    assert all(one != other for one, other in itertools.pairwise(order))
    # With all the time there is everybody is known.
    every = measure(Machine(step_times(names)), names, given, spread=known_after(**needed)).measured
    assert {name: len(each.visits) for name, each in every.items() if each} == needed


def test_everybody_is_visited_thrice_before_anybody_is_given_up() -> None:
    names = "abc"
    given = limits(rounds=1, repetitions=1, most_repetitions=60)
    once_s = BUILT_S + CLOSED_S + 1.125 * 1.2
    short = dataclasses.replace(given, most_s=9 * once_s + 3)
    found = measure(Machine(step_times(names)), names, short, spread=known_after(a=50, b=50, c=50))
    assert {len(each.visits) for each in found.measured.values() if each} == {3}
    assert [number for number, _ in order_of(found)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_nobody_is_given_up_after_two_visits() -> None:
    # Time for six visits more, of which b needs three: the others are not expected to be known.
    names = "abc"
    given = limits(rounds=2, repetitions=2, most_repetitions=60)
    machine = Machine(step_times(names))
    measure(machine, names, given)
    once_s = BUILT_S + CLOSED_S + 1.125 * 1.2
    short = dataclasses.replace(given, most_s=machine.now_s - 100 + 6 * once_s)
    machine = Machine(step_times(names))
    machine.is_alone = True
    found = measure(machine, names, short, spread=known_after(a=50, b=5, c=50))
    visits = {name: len(each.visits) for name, each in found.measured.items() if each}
    assert visits["b"] == 5 and min(visits.values()) == 3


def test_who_was_seldom_quiet_is_expected_to_need_more_visits() -> None:
    def needed(is_quiet: Sequence[Sequence[bool]], spread: float) -> float:
        schedule = _Schedule(
            names=("a",), opened=Machine({"a": 1.0}).opened, limits=limits(most_repetitions=200),
            spread=lambda _: spread, probe=lambda: 2.0, settle=lambda: None, earlier={},
            empty=lambda: None, clock=lambda: 0.0, show=lambda *_: None,
        )  # fmt: skip
        schedule.visits["a"] = [
            Visit(
                round=1, begun_s=0.0, probe_ms=2.0, times_ms=np.ones((1, 2)),
                is_quiet=np.array([own]),
            )
            for own in is_quiet
        ]  # fmt: skip
        schedule.costs["a"] = _Cost(built_s=0.5, warmed_s=0.25, repetition_s=1.0, closed_s=0.25)
        return schedule._needed_s("a")

    always, half, never = [[True, True]] * 8, [[True, True], [True, False]] * 4, [[True, False]] * 8
    # Known to 4 % from eight visits, or from the four of eight in which every step was quiet.
    eight, four = (more_visits(0.04, count, 0.02, most=200) for count in (8, 4))
    assert needed(always, 0.04) == eight * 2.0
    assert needed(half, 0.04) == 2 * four * 2.0
    # Of a step that was never quiet it is only known that it is not often: once in eight, at most.
    assert needed(never, math.inf) == 3 * 8 * 2.0
    assert needed([[True, True], [True, False], [True, False]], math.inf) == 2 * 3 * 2.0


def test_who_costs_too_much_keeps_nobody_from_the_rest() -> None:
    """One setting was visited once and takes longer than all the time left: others go on."""
    times = {"a": 60.0, "b": 1.0, "c": 1.1}
    given = limits(rounds=1, repetitions=1, most_repetitions=60)
    machine = Machine(times)
    measure(machine, "abc", given)
    short = dataclasses.replace(given, most_s=machine.now_s - 100 + 40)

    def spread(visited: Visited) -> float:
        return 0.0199 if len(visited.visits) >= 6 and visited.times_ms[0, 0] < 2e3 else 0.5

    found = measure(Machine(times), "abc", short, spread=spread)
    visits = {name: len(each.visits) for name, each in found.measured.items() if each}
    assert visits == {"a": 1, "b": 6, "c": 6}


def test_others_go_on_where_all_of_a_round_run_out_of_memory() -> None:
    machine = Machine(step_times("ab"))

    def progress(item: str, *_: int) -> None:
        if item.startswith("a, round 2"):
            machine.fails["a"] = 9

    needs = limits(rounds=1, repetitions=1, most_repetitions=60)
    found = measure(machine, "ab", needs, spread=known_after(a=4, b=4), progress=progress)
    visited = found.measured["b"]
    assert visited is not None and len(visited.visits) == 4


def test_visits_are_added_to_those_of_an_earlier_run() -> None:
    names = "abcd"
    given = limits(rounds=2, repetitions=2, most_repetitions=60)
    needed = {"a": 2, "b": 5, "c": 4, "d": 2}
    first = measure(Machine(step_times(names)), names, given).measured
    kept = {name: each for name, each in first.items() if each and name != "d"}
    machine = Machine(step_times(names))
    found = run_in_rounds(
        names, machine.opened, given, spread=known_after(**needed), probe=lambda: 3.0,
        earlier=kept, empty=machine.empty, clock=lambda: machine.now_s,
    )  # fmt: skip
    visits = {name: each.visits for name, each in found.measured.items() if each}
    assert {name: len(each) for name, each in visits.items()} == needed
    assert list(found.measured) == list(names)
    for name, each in kept.items():
        # What was there stays in front, as it is.
        assert visits[name][: len(each.visits)] == each.visits
        assert all(visit.round > 2 and visit.probe_ms == 3.0 for visit in visits[name][2:])
    # a is known; whoever is visited is warmed up whole once in this run too.
    whole = [name for name, is_whole in machine.of("warm") if is_whole]
    assert sorted(whole) == ["b", "c", "d"] and "a" not in machine.of("step")


@pytest.mark.parametrize("named", ["b", "d"])
def test_settings_that_are_not_named_stay_as_an_earlier_run_has_them(named: str) -> None:
    names = "abc"
    given = limits(rounds=2, repetitions=2, most_repetitions=60)
    kept = measure(Machine(step_times(names)), names, given).measured
    machine = Machine(step_times("abcd"))
    found = run_in_rounds(
        named, machine.opened, given, spread=known_after(a=9, b=4, c=9, d=4),
        probe=lambda: 3.0, earlier={name: each for name, each in kept.items() if each},
        empty=machine.empty, clock=lambda: machine.now_s,
    )  # fmt: skip
    # However badly they are known, they are not visited.
    assert set(machine.of("step")) == {named} and found.late == ()
    assert list(found.measured) == list(dict.fromkeys((named, *names)))
    for name, each in found.measured.items():
        before = kept.get(name)
        assert each is not None
        if name == named:
            assert len(each.visits) == 4
            own = each.visits[2:] if before else each.visits
            assert min(visit.round for visit in own) > 2
        else:
            assert before is not None and each.visits == before.visits


def test_no_time_to_add_visits() -> None:
    names = "ab"
    given = limits(rounds=2, repetitions=2, most_repetitions=60)
    first = measure(Machine(step_times(names)), names, given).measured
    kept = {name: each for name, each in first.items() if each}
    machine = Machine(step_times(names))
    found = run_in_rounds(
        names, machine.opened, dataclasses.replace(given, most_s=0.0), spread=lambda _: 0.5,
        probe=lambda: 3.0, earlier=kept, empty=machine.empty, clock=lambda: machine.now_s,
    )  # fmt: skip
    assert machine.log == [] and found.late == ()
    assert {name: each.visits for name, each in found.measured.items() if each} == {
        name: each.visits for name, each in kept.items()
    }


def test_the_machine_is_settled_before_anything_is_built() -> None:
    machine = Machine({"a": 1.0, "b": 1.0})
    found: list[tuple[float, int]] = []
    run_in_rounds(
        "ab", machine.opened, limits(), spread=lambda _: 0.0, probe=lambda: 2.0,
        settle=lambda: found.append((machine.now_s, machine.open_runs)),
        clock=lambda: machine.now_s,
    )  # fmt: skip
    assert len(found) == 6 and all(num_open == 0 for _, num_open in found)
    assert len({begun for begun, _ in found}) == 6


def test_spreads_are_drawn_once_per_visit() -> None:
    asked: Counter[tuple[str, int]] = Counter()
    spread = known_after(a=3, b=6)

    def counted(visited: Visited) -> float:
        asked[f"{visited.times_ms[0, 0]:.0f}", len(visited.visits)] += 1
        return spread(visited)

    measure(Machine(step_times("ab")), "ab", limits(repetitions=3), spread=counted)
    assert set(asked.values()) == {1} and len(asked) == 1 + 4


@pytest.mark.parametrize(
    ("step_s", "most", "expected"),
    # 1.125 seconds to build and warm up: three repetitions, or what most leaves to 12 visits.
    [(1.0, 60, 2), (0.1, 60, 3), (0.1, 36, 3), (0.1, 24, 2), (0.1, 6, 2), (0.01, 60, 5)],
)
def test_cheap_repetitions_are_many(step_s: float, most: int, expected: int) -> None:
    given = limits(most_repetitions=most)
    found = measure(Machine({"a": step_s, "b": step_s}), "ab", given)
    for visited in found.measured.values():
        assert visited is not None
        assert [len(visit.times_ms) for visit in visited.visits] == [expected] * 3


def test_more_repetitions_only_where_all_visits_have_time() -> None:
    names = "abcd"
    machine = Machine(dict.fromkeys(names, 0.1))
    given = limits(repetitions=3, most_repetitions=60)
    measure(machine, names, given)
    assert len(machine.of("step")) == 3 * 3 * 4
    # Three rounds of one repetition, and half a second.
    most_s = 12 * (BUILT_S + CLOSED_S + 0.1) + 4 * 0.1 + 8 * 0.0125 + 0.5
    machine = Machine(dict.fromkeys(names, 0.1))
    found = measure(machine, names, dataclasses.replace(given, most_s=most_s))
    for visited in found.measured.values():
        assert visited is not None and set(visited.round_of.tolist()) == {1, 2, 3}
    assert 12 <= len(machine.of("step")) <= 17
    assert machine.now_s - 100 <= most_s
