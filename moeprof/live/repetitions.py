"""Times something again and again on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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
) -> Repetitions:
    """Runs ``function`` and returns its times.

    On a GPU each run is timed between two events, queued one after the other without waiting, so
    that what the host does between launches shows only where it is slower than the device.

    Args:
        function: What to run.
        device: Where it runs.
        repeats: Timed runs; at least two.
        warmup: Runs before them.
    """
    for _ in range(warmup):
        function()
    if torch.device(device).type != "cuda":
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            function()
            times.append((time.perf_counter() - begun) * 1e3)
        return Repetitions(tuple(times))
    pairs = [(_event(), _event()) for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for begin, end in pairs:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return Repetitions(tuple(begin.elapsed_time(end) for begin, end in pairs))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
