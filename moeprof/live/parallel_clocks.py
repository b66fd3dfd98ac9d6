"""Times of the parts of a step that several ranks run together.

Ranks set out together into every part (a reduction of one number holds them up until the last has
come), so that waiting for another rank's experts does not count as communication. Leaves out what
the parts are (`expert_parallel`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moeprof.live.repetitions import Repetitions, wait_for

Moment = float | torch.cuda.Event


class PartClock:
    """Takes the time of one part after the other.

    On a GPU moments are events on the current stream, on a CPU readings of a clock.

    Args:
        device: Where the ranks run.
        group: Their group; None is all of them.
        together: Hold ranks up between parts, so that they begin each together.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        group: dist.ProcessGroup | None = None,
        together: bool = True,
    ) -> None:
        self._device = torch.device(device)
        self._group = group
        self._together = together
        self._one = torch.zeros(1, device=self._device)
        self._spans: dict[str, list[tuple[Moment, Moment]]] = {}
        self._begun: Moment = 0.0

    def begin(self) -> None:
        """Begins the first part."""
        if self._together:
            align(self._one, self._group)
        self._begun = self._now()

    def mark(self, part: str) -> None:
        """Ends the part that was running, which is called ``part``, and begins the next."""
        self._spans.setdefault(part, []).append((self._begun, self._now()))
        self.begin()

    def times_ms(self) -> dict[str, tuple[float, ...]]:
        """Returns the times of every part in the order they were taken; waits for the device."""
        wait_for(self._device)
        return {
            part: tuple(_elapsed_ms(begun, ended) for begun, ended in spans)
            for part, spans in self._spans.items()
        }

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def align(one: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Holds ranks (on a GPU, their streams) up until the last of the group has come.

    Args:
        one: A tensor of one number on the rank's device.
        group: The group; None is all ranks.
    """
    dist.all_reduce(one, group=group)


def slowest_ms(
    times_ms: tuple[float, ...], device: torch.device | str, group: dist.ProcessGroup | None = None
) -> tuple[float, ...]:
    """Returns, repetition by repetition, the longest time that any rank took.

    Args:
        times_ms: Of this rank; as many on every rank.
        device: Where the ranks run.
        group: The group; None is all ranks.
    """
    times = torch.tensor(times_ms, dtype=torch.float32, device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    return tuple(times.tolist())


def repeat_together(
    function: Callable[[], object],
    *,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    repeats: int = 20,
    warmup: int = 3,
) -> Repetitions:
    """Runs what all ranks run together; returns the slowest rank's time of every repetition.

    Args:
        function: What to run; the same number of times on every rank.
        device: Where.
        group: The group; None is all ranks.
        repeats: Timed runs.
        warmup: Runs before them.
    """
    for _ in range(warmup):
        function()
    clock = PartClock(device, group=group)
    clock.begin()
    for _ in range(repeats):
        function()
        clock.mark("step")
    return Repetitions(slowest_ms(clock.times_ms()["step"], device, group))


def _elapsed_ms(begun: Moment, ended: Moment) -> float:
    if isinstance(begun, torch.cuda.Event):
        assert isinstance(ended, torch.cuda.Event)
        return float(begun.elapsed_time(ended))
    assert not isinstance(ended, torch.cuda.Event)
    return (ended - begun) * 1e3
