"""Times something again and again on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Runs queued at once while loading: so many that the device hardly idles between.
_QUEUED = 10
# What the device waits for each timed run that the host asks for ahead: 2 ms at 2 GHz, longer than
# a layer's launches take.
_AHEAD_CYCLES = 4_000_000


@dataclass(frozen=True)
class Repetitions:
    """Times of one thing, in the order they were taken.

    Attributes:
        times_ms: Every repetition.
    """

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.times_ms)

    def spread(self) -> float:
        """Returns the distance between the quartiles over the median."""
        low, _, high = statistics.quantiles(self.times_ms, n=4)
        return (high - low) / self.median_ms


def repeat(
    function: Callable[[], object],
    *,
    device: torch.device | str,
    repeats: int = 20,
    warmup: int = 3,
    rest_s: float = 0.0,
    load_s: float = 0.0,
    ahead: bool = False,
) -> Repetitions:
    """Runs ``function`` and returns its times.

    On a GPU each run is timed between two events, queued one after the other without waiting, so
    that what the host does between launches shows only where it is slower than the device; with
    ``ahead`` not even there, unless it waits for the device itself.

    A GPU that was at work a moment ago may be slower than one that was not: times compare only
    where it had rested as long before each.

    Args:
        function: What to run.
        device: Where it runs.
        repeats: Timed runs; at least two.
        warmup: Runs before them.
        rest_s: Seconds that the device idles first.
        load_s: Seconds that ``function`` runs again and again after that.
        ahead: True to let a GPU wait, idle, until the host has asked for all timed runs.
    """
    if rest_s:
        wait_for(device)
        time.sleep(rest_s)
    if load_s:
        _load(function, device, load_s)
    return repeat_in_turn([function], device=device, repeats=repeats, warmup=warmup, ahead=ahead)[0]


def repeat_in_turn(
    functions: Sequence[Callable[[], object]],
    *,
    device: torch.device | str,
    repeats: int = 20,
    warmup: int = 3,
    ahead: bool = False,
) -> list[Repetitions]:
    """Runs several functions one after the other, again and again; returns the times of each.

    What one of them leaves in a cache of the device the others displace, as far as they are large.

    Args:
        functions: What to run.
        device: Where it runs.
        repeats: Timed runs of each; at least two.
        warmup: Runs before them.
        ahead: As `repeat` has it.
    """
    every = [function for _ in range(repeats) for function in functions]
    for _ in range(warmup):
        for function in functions:
            function()
    if torch.device(device).type != "cuda":
        times = []
        for function in every:
            begun = time.perf_counter()
            function()
            times.append((time.perf_counter() - begun) * 1e3)
    else:
        pairs = [(_event(), _event()) for _ in every]
        torch.cuda.synchronize(device)
        if ahead:
            _hold(device, len(every) * _AHEAD_CYCLES)
        for function, (begin, end) in zip(every, pairs, strict=True):
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize(device)
        times = [begin.elapsed_time(end) for begin, end in pairs]
    return [Repetitions(tuple(times[place :: len(functions)])) for place in range(len(functions))]


def _load(function: Callable[[], object], device: torch.device | str, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(_QUEUED):
            function()
        wait_for(device)


def _hold(device: torch.device | str, cycles: int) -> None:
    with torch.cuda.device(device):
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def wait_for(device: torch.device | str) -> None:
    """Waits until a GPU has done what it was asked for; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
