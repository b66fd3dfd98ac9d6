"""The calling thread on a quiet core for a while, where the system would move it about.

A thread that waits for the device by reading memory again and again loses what it had in caches
when it is moved, and cores differ: one may share its arithmetic with a busy neighbour, which guests
of a virtual machine are not told. Nothing here is used unless asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType

import torch

from moeprof.errors import UsageError
from moeprof.live.host_probe import probe_ms

# More than torch computes on one thread.
_SHARED_OUT = 1 << 20
# A core is quiet that takes no longer than this, over the least ever seen. A busy neighbour costs
# more than half again.
_QUIET = 1.12


class QuietCore:
    """Keeps the calling thread on one core, chosen anew where that one has become slow.

    Threads that are there already stay as they are. Those that the calling thread starts meanwhile,
    and programs (compilers of kernels), are on that core too, and stay there: torch's own for the
    processor are started before, those of a backward pass are not. Used as a context, at whose end
    the thread may run where it could before.

    Args:
        probe: Time of a fixed piece of work.

    Raises:
        UsageError: The system binds no threads.
    """

    def __init__(self, *, probe: Callable[[], float] = probe_ms) -> None:
        self._probe = probe
        self._before = allowed_cores()
        self._least_ms: float | None = None
        self._core: int | None = None

    def __enter__(self) -> QuietCore:
        _start_threads()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        os.sched_setaffinity(0, self._before)
        self._core = None

    @property
    def core(self) -> int | None:
        """Where the thread is; None before it was settled."""
        return self._core

    def settle(self) -> float:
        """Stays where it is quiet, else looks for a core that is, and stays on the best found.

        Returns:
            The probe's time there.
        """
        if self._core is not None:
            found = self._probed(self._core)
            if self._is_quiet(found):
                return found
        # All are asked the first time, as nothing else says what quiet is. Later from the last core
        # on, so that no core is always the first to be asked.
        cores = sorted(self._before)
        start = 0 if self._core is None else cores.index(self._core) + 1
        is_first = self._least_ms is None
        times: dict[int, float] = {}
        for core in cores[start:] + cores[:start]:
            times[core] = self._probed(core)
            if not is_first and self._is_quiet(times[core]):
                break
        self._core = min(times, key=lambda core: times[core])
        os.sched_setaffinity(0, {self._core})
        return times[self._core]

    def _probed(self, core: int) -> float:
        os.sched_setaffinity(0, {core})
        found = self._probe()
        self._least_ms = found if self._least_ms is None else min(found, self._least_ms)
        return found

    def _is_quiet(self, found_ms: float) -> bool:
        return self._least_ms is not None and found_ms <= _QUIET * self._least_ms


def allowed_cores() -> set[int]:
    """Returns the cores that the calling thread may run on.

    Raises:
        UsageError: The system binds no threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system binds no thread to a core", hint="run without --quiet-core")
    return set(os.sched_getaffinity(0))


def _start_threads() -> None:
    """Has torch start its threads: they would be bound where it first needs them."""
    torch.zeros(_SHARED_OUT).add_(1.0)
