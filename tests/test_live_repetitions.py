"""Repeated timings on a CPU, under a clock that is a stand-in."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

from moeprof.live import ceilings, repetitions  # noqa: E402
from moeprof.live.repetitions import repeat, repeat_in_turn  # noqa: E402


class Clock:
    """A clock that goes on where something runs or rests, and a list of what did."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.done: list[tuple[str, float]] = []

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self._pass("rest", seconds)

    def run(self, name: str, seconds: float) -> None:
        self._pass(name, seconds)

    def _pass(self, name: str, seconds: float) -> None:
        self.done.append((name, seconds))
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(repetitions, "time", made)
    return made


def test_times_are_those_after_the_warmup(clock):
    seconds = iter([9.0, 9.0, 1.0, 3.0, 2.0])
    found = repeat(lambda: clock.run("run", next(seconds)), device="cpu", repeats=3, warmup=2)
    assert found.times_ms == (1000.0, 3000.0, 2000.0)
    assert found.median_ms == 2000.0
    assert {name for name, _ in clock.done} == {"run"}


def test_several_take_turns(clock):
    functions = [lambda: clock.run("first", 1.0), lambda: clock.run("second", 2.0)]
    found = repeat_in_turn(functions, device="cpu", repeats=2, warmup=1)
    assert [name for name, _ in clock.done] == ["first", "second"] * 3
    assert [each.times_ms for each in found] == [(1000.0, 1000.0), (2000.0, 2000.0)]


def test_the_device_rests_then_is_loaded_then_timed(clock):
    repeat(
        lambda: clock.run("run", 0.25), device="cpu", repeats=2, warmup=1, rest_s=4.0, load_s=6.0
    )
    (first, *runs) = clock.done
    assert first == ("rest", 4.0)
    # Ten runs are queued at once: three times as many fill six seconds. Then one, and two timed.
    assert runs == [("run", 0.25)] * (30 + 1 + 2)


class Gpu:
    """Stands in for `torch.cuda`: notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.slept_cycles = 0

    def synchronize(self, device):
        self.asked.append("wait")

    @contextlib.contextmanager
    def device(self, device):
        assert str(device) == "cuda:1"
        yield

    def _sleep(self, cycles):
        self.asked.append("sleep")
        self.slept_cycles += cycles

    def Event(self, *, enable_timing):
        return Mark(self)


class Mark:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self):
        self.gpu.asked.append("mark")

    def elapsed_time(self, end):
        return 1.5


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gpu_waits_until_all_runs_are_asked_for(monkeypatch, ahead):
    gpu = Gpu()
    monkeypatch.setattr(repetitions.torch, "cuda", gpu)
    runs = [lambda: gpu.asked.append("first"), lambda: gpu.asked.append("second")]
    found = repeat_in_turn(runs, device="cuda:1", repeats=3, warmup=1, ahead=ahead)
    turn = ["mark", "first", "mark", "mark", "second", "mark"]
    assert gpu.asked == ["first", "second", "wait", *["sleep"] * ahead, *3 * turn, "wait"]
    assert gpu.slept_cycles == ahead * 6 * repetitions._AHEAD_CYCLES
    assert [each.times_ms for each in found] == [(1.5,) * 3] * 2


def test_a_cpu_has_nothing_to_ask_ahead(clock):
    found = repeat(lambda: clock.run("run", 1.0), device="cpu", repeats=2, warmup=0, ahead=True)
    assert found.times_ms == (1000.0,) * 2


def test_a_ceiling_is_measured_in_the_state_that_is_asked_for(monkeypatch):
    waits = []

    def noted(function, *, device, repeats, rest_s, load_s):
        function()
        waits.append((rest_s, load_s))
        return repetitions.Repetitions((1.0,) * repeats)

    monkeypatch.setattr(ceilings, "repeat", noted)
    ceilings.measure_ceilings("cpu", dtype=torch.float32, repeats=2, rest_s=0.5, load_s=1.5)
    assert waits == [(0.5, 1.5)] * 2
    ceilings.measure_ceilings("cpu", dtype=torch.float32, repeats=2)
    assert waits[2:] == [(0.0, 0.0)] * 2
