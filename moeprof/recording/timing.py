"""Clocks that do not wait: host time on the CPU, CUDA events read after the fact on a GPU."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

NS_PER_MS = 1e6


class Clock(Protocol):
    """Marks moments and tells the time between two of them later."""

    def mark(self) -> Any:
        """Returns a mark of now, in the order of the device's work."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Returns milliseconds between two marks; waits for the second on a device."""


class HostClock:
    """The host's monotonic clock; right where operators run when they are called."""

    def mark(self) -> int:
        """Returns nanoseconds."""
        return time.perf_counter_ns()

    def elapsed_ms(self, start: int, end: int) -> float:
        """Returns milliseconds between two marks."""
        return (end - start) / NS_PER_MS


class CudaClock:
    """CUDA events on the current stream: marking costs microseconds and never waits."""

    def mark(self) -> torch.cuda.Event:
        """Returns a recorded event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Returns milliseconds between two events, once the second has happened."""
        end.synchronize()
        return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    """Returns the clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()
