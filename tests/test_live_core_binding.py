"""Who is bound to a core, that nobody stays bound, and when a core is quiet."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("torch")
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("the system binds no threads", allow_module_level=True)

from moeprof.errors import UsageError
from moeprof.live import core_binding, host_probe
from moeprof.live.core_binding import QuietCore, Unwatched, allowed_cores, undisturbed

MARGIN = core_binding._MARGIN


class Machine:
    """Cores whose speed is made up; counts how often each was probed."""

    def __init__(self) -> None:
        self.cores = sorted(allowed_cores())
        self.times = dict.fromkeys(self.cores, 3.0)
        self.probed: list[int] = []

    def probe(self) -> float:
        (core,) = allowed_cores()
        self.probed.append(core)
        return self.times[core]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Two cores, however many there are: what is quiet is a quantile of what all took."""
    before = allowed_cores()
    if len(before) < 2:
        pytest.skip("one core only")
    os.sched_setaffinity(0, set(sorted(before)[:2]))
    yield Machine()
    os.sched_setaffinity(0, before)


def test_the_calling_thread_is_kept_on_the_quietest_core_and_let_go(machine: Machine) -> None:
    before = allowed_cores()
    quiet = machine.cores[-1]
    machine.times[quiet] = 1.5
    with QuietCore(probe=machine.probe) as own:
        assert own.core is None and allowed_cores() == before
        assert own.settle() == 1.5
        assert own.core == quiet and allowed_cores() == {quiet}
        # The first time all are asked.
        assert machine.probed == machine.cores
        machine.probed.clear()
        assert own.settle() == 1.5 and machine.probed == [quiet]
    assert allowed_cores() == before
    with pytest.raises(KeyboardInterrupt), QuietCore(probe=machine.probe) as own:
        own.settle()
        raise KeyboardInterrupt
    assert allowed_cores() == before


def test_it_moves_where_its_core_becomes_slow(machine: Machine) -> None:
    first, second = machine.cores[:2]
    machine.times[first] = 1.5
    with QuietCore(probe=machine.probe) as own:
        own.settle()
        assert own.core == first
        machine.times |= {first: 2.8, second: 1.55}
        machine.probed.clear()
        assert own.settle() == 1.55 and own.core == second
        # Its own core, then from the next one on until one is quiet.
        assert machine.probed == [first, second]
        # A tenth is no reason to move.
        machine.times[second] = 1.65
        assert own.settle() == 1.65 and own.core == second
        # Where none is quiet the best one has to do, if it is better by more than that.
        better, best = 3.01 / MARGIN, 2.99 / MARGIN
        machine.times |= {first: better, second: 3.0}
        assert own.settle() == 3.0 and own.core == second
        machine.times[first] = best
        assert own.settle() == best and own.core == first
        machine.times[second] = 1.01 * best / MARGIN
        assert own.settle() == best and own.core == first


def test_one_fast_probe_is_no_measure(machine: Machine) -> None:
    first = machine.cores[0]
    with QuietCore(probe=machine.probe) as own:
        usual = 1.1 * MARGIN
        machine.times |= dict.fromkeys(machine.cores, usual) | {first: 1.0}
        own.settle()
        machine.times[first] = usual
        assert not own.is_quiet()
        for _ in range(30):
            assert own.settle() == usual and own.core == first
        # After a few it is known that this is quiet: nobody else is asked any more.
        machine.probed.clear()
        own.settle()
        assert machine.probed == [first] and own.is_quiet()


def test_quiet_is_what_quiet_cores_take(machine: Machine) -> None:
    first, second = machine.cores
    machine.times |= {first: 1.0, second: 2.0}
    with QuietCore(probe=machine.probe) as own:
        own.settle()
        machine.probed.clear()
        # Looks at the present core alone, and moves nobody.
        assert own.is_quiet() and machine.probed == [first] and own.core == first
        machine.times[first] = 0.99 * MARGIN
        assert own.is_quiet()
        machine.times[first] = 1.01 * MARGIN
        assert not own.is_quiet() and own.core == first


def test_a_single_slow_look_says_nothing(machine: Machine) -> None:
    first, second = machine.cores
    machine.times |= {first: 1.0, second: 1.8}
    with QuietCore(probe=machine.probe) as own:
        own.settle()
        once = iter([1.8, 1.0])
        own._probe = lambda: next(once)
        # Caches were cold: found slow, then quiet.
        assert own.is_quiet() and next(once, None) is None
        looks = [1.8] * core_binding._NUM_LOOKS
        own._probe = looks.pop
        assert not own.is_quiet() and not looks


def test_a_slow_stretch_of_all_cores_is_not_taken_for_quiet(machine: Machine) -> None:
    first, second = machine.cores
    machine.times |= {first: 1.0, second: 1.8}
    with QuietCore(probe=machine.probe) as own:
        own.settle()
        assert all(own.is_quiet() for _ in range(100))
        # Where no core is quiet it is looked at as after a step: found slow, and left if possible.
        machine.times[first] = 1.7
        for _ in range(100):
            assert not own.is_quiet()
            assert own.settle() == 1.7 and own.core == first
            assert not own.is_quiet()
        # Somewhere else it is quiet again.
        machine.times[second] = 1.05
        assert not own.is_quiet()
        assert own.settle() == 1.05 and own.core == second and own.is_quiet()


def test_what_nothing_is_as_fast_as_any_more_is_forgotten(machine: Machine) -> None:
    first, second = machine.cores
    machine.times |= {first: 1.0, second: 1.8}
    now = [0.0]
    with QuietCore(probe=machine.probe, clock=lambda: now[0]) as own:
        own.settle()
        assert all(own.is_quiet() for _ in range(20))
        # As fast as it was with a cold machine it will not be again; nor is anything else.
        machine.times |= {first: 1.7, second: 1.7}
        kept_s = core_binding._STRETCH_S * (core_binding._NUM_STRETCHES - 1)
        while now[0] < kept_s:
            for _ in range(500):
                assert not own.is_quiet()
            own.settle()
            now[0] += 1.0
        for _ in range(2):
            now[0] += core_binding._STRETCH_S
            for _ in range(5):
                own.is_quiet()
        own.settle()
        assert own.is_quiet()


def test_few_of_many_cores_are_asked_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    before = allowed_cores()
    here = [0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: here.__setitem__(0, min(cores)))
    times = dict.fromkeys(range(64), 2.0) | {0: 1.0}
    asked: list[int] = []

    def probe() -> float:
        asked.append(here[0])
        return times[here[0]]

    own = QuietCore(probe=probe)
    own.settle()
    assert asked == list(range(64)) and own.core == 0
    assert [own.is_quiet() for _ in range(5)] == [True] * 5
    own.settle()
    times[0], times[40] = 1.9, 1.0
    most = core_binding._MOST_ASKED
    num_tours = 0
    while own.core == 0:
        num_tours += 1
        asked.clear()
        own.settle()
        # The present one first, then those behind whom was asked last.
        assert asked[0] == 0 and len(asked) <= most and num_tours < 64
    assert own.core == 40 and num_tours == -(-40 // (most - 1))
    monkeypatch.undo()
    assert allowed_cores() == before


class Script:
    """A watch whose looks are written down before; notes what it is asked."""

    def __init__(self, looks: Sequence[bool], log: list[str]) -> None:
        self.looks, self.log = list(looks), log

    def settle(self) -> None:
        self.log.append("settle")

    def give_up(self) -> None:
        self.log.append("give up")

    def is_quiet(self) -> bool:
        self.log.append("look")
        return self.looks.pop(0)


def measured_under(looks: Sequence[bool]) -> tuple[int, list[str]]:
    log: list[str] = []

    def measure() -> int:
        log.append("measure")
        return log.count("measure")

    watch = Script(looks, log)
    found = undisturbed(watch, measure)
    assert not watch.looks
    return found, log


def test_what_was_disturbed_is_measured_again() -> None:
    once = ["settle", "look", "measure", "look"]
    # Where the core was slow before there is no need to look again.
    slow = once[:3]
    assert measured_under([True, True]) == (1, once)
    assert measured_under([True, False, True, True]) == (2, 2 * once)
    assert measured_under([False, True, True]) == (2, [*slow, *once])
    assert measured_under([False, True, False, True, True]) == (3, [*slow, *once, *once])
    # The sixth has to do, which is noted where it was no better.
    assert measured_under([True, False] * 6) == (6, [*once * 6, "give up"])
    assert measured_under([False] * 6) == (6, [*slow * 6, "give up"])
    assert measured_under([False] * 5 + [True, True]) == (6, [*slow * 5, *once])
    assert measured_under([True, False] * 4 + [True, True]) == (5, once * 5)


def test_what_nobody_watches_is_measured_once() -> None:
    measured: list[int] = []
    assert undisturbed(Unwatched(), lambda: measured.append(1)) is None
    assert measured == [1]


def test_a_glance_is_a_sixteenth_of_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int]] = []

    def work(numbers: object, num_additions: int, num_calls: int) -> int:
        done.append((num_additions, num_calls))
        return real(numbers, num_additions, num_calls)

    real = host_probe._work
    monkeypatch.setattr(host_probe, "_work", work)
    assert host_probe.probe_ms() > 0
    (whole,) = set(done)
    num_runs = len(done)
    assert host_probe.glance_ms() > 0
    (part,) = set(done[num_runs:])
    assert len(done) == 2 * num_runs
    assert [all_of // own for all_of, own in zip(whole, part, strict=True)] == [16, 16]


def test_cores_that_go_away(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = allowed_cores()
    real = os.sched_setaffinity
    gone = {machine.cores[0]}

    def bind(thread: int, cores: set[int]) -> None:
        if set(cores) <= gone:
            raise OSError(22, "no such core")
        real(thread, cores)

    monkeypatch.setattr(os, "sched_setaffinity", bind)
    machine.times[machine.cores[1]] = 1.5
    with QuietCore(probe=machine.probe) as own:
        assert own.settle() == 1.5 and own.core == machine.cores[1]
        gone |= set(machine.cores)
        monkeypatch.setattr(own, "_probe", lambda: 7.0)
        assert own.settle() == 7.0 and own.core is None
        # Leaving must not hide what went wrong inside.
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: bind(0, gone))
    monkeypatch.setattr(os, "sched_setaffinity", real)
    real(0, before)


def test_other_threads_stay_as_they_are(machine: Machine) -> None:
    before = allowed_cores()
    go, seen = threading.Event(), []

    def look() -> None:
        go.wait()
        seen.append(allowed_cores())

    thread = threading.Thread(target=look)
    thread.start()
    with QuietCore(probe=machine.probe) as own:
        own.settle()
        go.set()
        thread.join()
    assert seen == [before]


def test_torch_s_threads_are_there_before() -> None:
    """In a process of its own: here they are there already."""
    code = """
import os, torch
torch.set_num_threads(2)
from moeprof.live.core_binding import QuietCore
def affinities():
    tasks = map(int, os.listdir("/proc/self/task"))
    return {task: os.sched_getaffinity(task) for task in tasks}
with QuietCore() as own:
    own.settle()
    torch.ones(1 << 20).mul_(2.0)
    bound = [task for task, cores in affinities().items() if cores == {own.core}]
    assert bound == [os.getpid()], bound
assert all(len(cores) > 1 for cores in affinities().values())
"""
    if len(allowed_cores()) < 2 or not os.path.isdir("/proc/self/task"):
        pytest.skip("one core only, or threads cannot be listed")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_system_that_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(UsageError, match="binds no thread") as caught:
        QuietCore()
    assert caught.value.hint
