"""Who is bound to a core, and that nobody stays bound."""

from __future__ import annotations

import os
import threading

import pytest

pytest.importorskip("torch")
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("the system binds no threads", allow_module_level=True)

from moeprof.errors import UsageError
from moeprof.live.core_binding import allowed_cores, bound_to_core, quietest_core


def test_the_calling_thread_is_bound_and_let_go() -> None:
    before = allowed_cores()
    for core in sorted(before)[:2]:
        with bound_to_core(core):
            assert allowed_cores() == {core}
        assert allowed_cores() == before
    with pytest.raises(KeyboardInterrupt), bound_to_core(min(before)):
        raise KeyboardInterrupt
    assert allowed_cores() == before


def test_no_core_binds_nothing() -> None:
    before = allowed_cores()
    with bound_to_core(None):
        assert allowed_cores() == before


def test_other_threads_stay_as_they_are() -> None:
    before = allowed_cores()
    go, seen = threading.Event(), []

    def look() -> None:
        go.wait()
        seen.append(allowed_cores())

    thread = threading.Thread(target=look)
    thread.start()
    with bound_to_core(min(before)):
        go.set()
        thread.join()
    assert seen == [before]


def test_torch_s_threads_are_there_before() -> None:
    """In a process of its own: here they are there already."""
    import subprocess
    import sys

    code = """
import os, torch
torch.set_num_threads(2)
from moeprof.live.core_binding import bound_to_core
def affinities():
    tasks = map(int, os.listdir("/proc/self/task"))
    return {task: os.sched_getaffinity(task) for task in tasks}
core = min(os.sched_getaffinity(0))
with bound_to_core(core):
    torch.ones(1 << 20).mul_(2.0)
    bound = [task for task, cores in affinities().items() if cores == {core}]
    assert bound == [os.getpid()], bound
assert all(len(cores) > 1 for cores in affinities().values())
"""
    if len(allowed_cores()) < 2 or not os.path.isdir("/proc/self/task"):
        pytest.skip("one core only, or threads cannot be listed")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_core_that_is_not_there() -> None:
    before = allowed_cores()
    with (
        pytest.raises(UsageError, match="may not run on core 99999") as caught,
        bound_to_core(99999),
    ):
        pytest.fail("it was bound")
    assert caught.value.hint
    assert allowed_cores() == before


def test_a_system_that_binds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(UsageError, match="binds no thread"):
        allowed_cores()
    with bound_to_core(None):
        pass


def test_the_quietest_core() -> None:
    cores = sorted(allowed_cores())
    quiet = cores[-1]

    def probe() -> float:
        (core,) = allowed_cores()
        return 1.0 if core == quiet else 2.0

    assert quietest_core(probe=probe) == quiet
    assert quietest_core(cores[:1], probe=probe) == cores[0]
    assert allowed_cores() == set(cores)
    assert quietest_core() in cores
