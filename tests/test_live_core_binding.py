"""Who is bound to a core, and that nobody stays bound."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("torch")
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("the system binds no threads", allow_module_level=True)

from moeprof.errors import UsageError
from moeprof.live.core_binding import QuietCore, allowed_cores


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
def machine() -> Machine:
    found = Machine()
    if len(found.cores) < 2:
        pytest.skip("one core only")
    return found


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
        machine.times |= dict.fromkeys(machine.cores, 3.0) | {first: 2.5}
        assert own.settle() == 2.5 and own.core == first
        machine.times |= dict.fromkeys(machine.cores, 2.4) | {first: 2.5}
        assert own.settle() == 2.5 and own.core == first


def test_one_fast_probe_is_no_measure(machine: Machine) -> None:
    first = machine.cores[0]
    with QuietCore(probe=machine.probe) as own:
        machine.times |= dict.fromkeys(machine.cores, 1.13) | {first: 1.0}
        own.settle()
        machine.times[first] = 1.13
        for _ in range(30):
            assert own.settle() == 1.13 and own.core == first
        # After a few it is known that 1.13 is quiet: nobody else is asked any more.
        machine.probed.clear()
        own.settle()
        assert machine.probed == [first]


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
