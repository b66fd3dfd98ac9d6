"""Times the parts of a run apart: what the host does, what the device does, and both.

On a device without a queue of its own everything is the device's, and the host's part is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moeprof.live.core_binding import Unwatched, Watch, undisturbed
from moeprof.replay.calibration_file import Measured

_AHEAD_CYCLES = 8_000_000
_HOST_TIMES = 3
"""As many repetitions of what the host does: it takes microseconds, and varies most."""

_NOTHING = Measured(median=0.0, low=0.0, high=0.0, error=0.0, num_repetitions=0)


def _nothing() -> None:
    """Does nothing."""


class PartTimes:
    """Times functions on one device.

    Args:
        device: Which.
        repeats: Timed repetitions of each.
        warmup: Repetitions before them.
        watch: Asked for a quiet core before the host has a part in what is timed; that is timed
            again where the core did not stay quiet. Parts are subtracted from each other, and
            should find the host alike.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        repeats: int,
        warmup: int = 3,
        watch: Watch | None = None,
    ) -> None:
        self.device = device
        self.is_serial = device.type != "cuda"
        self._repeats = repeats
        self._warmup = warmup
        self._watch = watch or Unwatched()

    def settle(self) -> None:
        """Waits until the device has nothing to do."""
        if not self.is_serial:
            torch.cuda.synchronize(self.device)

    def wall(
        self,
        function: Callable[[], object],
        *,
        before: Callable[[], object] = _nothing,
        settle: bool = True,
        times: int = 1,
    ) -> Measured:
        """Returns the time in seconds on the host's clock, from an idle device.

        Args:
            function: What to time.
            before: What each run of it needs; not timed.
            settle: The device has to be done too; else the function returns when it likes.
            times: As many repetitions as usual.
        """

        def measured() -> list[float]:
            self._warm_up(function, before)
            found = []
            for _ in range(times * self._repeats):
                before()
                self.settle()
                begun_s = time.perf_counter()
                function()
                if settle:
                    self.settle()
                found.append(time.perf_counter() - begun_s)
            self.settle()
            return found

        return Measured.of(undisturbed(self._watch, measured))

    def host(
        self, function: Callable[[], object], *, before: Callable[[], object] = _nothing
    ) -> Measured:
        """Returns the time in seconds that the host needs to ask for something; see `wall`."""
        if self.is_serial:
            return _NOTHING
        return self.wall(function, before=before, settle=False, times=_HOST_TIMES)

    def device_part(
        self, function: Callable[[], object], *, before: Callable[[], object] = _nothing
    ) -> Measured:
        """Returns the time in seconds on the device, launches not waited for.

        The device is kept busy meanwhile, so that everything is asked for before it begins; the
        function must not wait for the device.

        Args:
            function: What to time.
            before: What each run of it needs; not timed.
        """
        if self.is_serial:
            return self.wall(function, before=before)
        self._warm_up(function, before)
        found = []
        for _ in range(self._repeats):
            before()
            self.settle()
            torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            function()
            end.record()
            self.settle()
            found.append(begin.elapsed_time(end) / 1e3)
        return Measured.of(found)

    def late(
        self, function: Callable[[], object], *, before: Callable[[], object] = _nothing
    ) -> Measured:
        """Returns the time in seconds from a busy device being free until a function has returned.

        Args:
            function: What to time; it waits for the device, and asks for what it waits for long
                before the device is free.
            before: What each run of it needs; not timed.
        """
        if self.is_serial:
            return _NOTHING

        def measured() -> list[float]:
            self._warm_up(function, before)
            found = []
            for _ in range(self._repeats):
                before()
                self.settle()
                begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                begun_s = time.perf_counter()
                begin.record()
                torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
                end.record()
                function()
                passed_s = time.perf_counter() - begun_s
                self.settle()
                found.append(max(0.0, passed_s - begin.elapsed_time(end) / 1e3))
            return found

        return Measured.of(undisturbed(self._watch, measured))

    def _warm_up(self, function: Callable[[], object], before: Callable[[], object]) -> None:
        for _ in range(self._warmup):
            before()
            function()
