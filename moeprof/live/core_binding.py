"""The calling thread on a quiet core for a while, where the system would move it about.

A thread that waits for the device by reading memory again and again loses what it had in caches
when it is moved, and cores differ: one may share its arithmetic with a busy neighbour, which guests
of a virtual machine are not told. So what is timed looks again and again whether its core is still
quiet (`Watch`), whatever the time came out as. Nothing here is used unless asked for.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from moeprof.errors import UsageError
from moeprof.live.host_probe import glance_ms

# More than torch computes on one thread.
_SHARED_OUT = 1 << 20
# A core is quiet that takes no longer than this over what quiet cores take, and is left only for
# one that is faster by as much. Cores of the hosts seen took 1.0 to 1.1, or 1.6 to 1.9.
_MARGIN = 1.3
# What quiet cores take is the fifth fastest look of the last minutes: a single fast one is no
# measure, and slow ones do not count, however many. What nothing was as fast as for so long is no
# speed that this machine keeps.
_NUM_FAST = 5
_STRETCH_S = 10.0
_NUM_STRETCHES = 12
_NUM_LOOKS = 2
# Of many cores so many are asked in one go, others in the next.
_MOST_ASKED = 8
_MOST_TRIES = 6

T = TypeVar("T")


class Watch(Protocol):
    """Whoever knows whether the core that the calling thread is on is quiet."""

    def settle(self) -> object:
        """Goes to a quiet core, if there is one."""

    def is_quiet(self) -> bool:
        """Says whether the present core is quiet."""

    def give_up(self) -> None:
        """Takes note that something is measured though no core stayed quiet for it."""


class Unwatched:
    """A watch that never looks: every core will do."""

    def settle(self) -> None:
        """Stays."""

    def is_quiet(self) -> bool:
        """Takes every core for quiet."""
        return True

    def give_up(self) -> None:
        """Has nothing to note."""


def undisturbed(watch: Watch, measure: Callable[[], T]) -> T:
    """Returns what was measured on a core that was quiet before and after.

    Measures again where it was not, a few times; then the last has to do, which is noted.

    Args:
        watch: Looks.
        measure: What is to be measured; any times.
    """
    for number in range(_MOST_TRIES):
        watch.settle()
        was_quiet = watch.is_quiet()
        found = measure()
        if was_quiet and watch.is_quiet():
            break
        if number == _MOST_TRIES - 1:
            watch.give_up()
    return found


class QuietCore:
    """Keeps the calling thread on one core, chosen anew where that one has become slow.

    Threads that are there already stay as they are. Those that the calling thread starts meanwhile,
    and programs (compilers of kernels), are on that core too, and stay there: torch's own for the
    processor are started before, those of a backward pass are not. Used as a context, at whose end
    the thread may run where it could before.

    Args:
        probe: Time of a fixed piece of work.
        clock: In seconds.

    Raises:
        UsageError: The system binds no threads.
    """

    def __init__(
        self,
        *,
        probe: Callable[[], float] = glance_ms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._clock = clock
        self._before = allowed_cores()
        # Stretches of time, and the fastest looks of each, ascending.
        self._fastest: deque[tuple[int, list[float]]] = deque(maxlen=_NUM_STRETCHES)
        self._core: int | None = None
        self._asked: int | None = None
        self._quiet_ms = 0.0
        self.num_given_up = 0

    def __enter__(self) -> QuietCore:
        _start_threads()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._core = None
        self._free()

    @property
    def core(self) -> int | None:
        """Where the thread is; None before it was settled, and where no core takes it."""
        return self._core

    def settle(self) -> float:
        """Stays where it is quiet, else looks for a core that is, and goes to one that is faster.

        All cores are asked the first time, as nothing else says what quiet is; later the present
        one, then others in turn until one is quiet, a few in one go.

        Returns:
            The probe's time where the thread is now.
        """
        found: dict[int, float] = {}
        for core in self._order():
            own = self._probed(core)
            self._asked = core
            if own is not None:
                found[core] = own
                if own <= self._quiet_ms:
                    break
        self._quiet_ms = _MARGIN * self._fast_ms()
        if not found:
            # None is left of those that there were: wherever the system likes.
            self._core = None
            self._free()
            return self._probe()
        best = min(found, key=lambda core: found[core])
        present = self._core
        if present in found and found[present] <= _MARGIN * found[best]:
            best = present
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {best})
        self._core = best
        return found[best]

    def is_quiet(self) -> bool:
        """Says whether the thread's core takes no longer than quiet cores do (`settle`).

        Looks twice before it says no: after a long wait for the device caches are cold, while a
        neighbour stays.
        """
        return any(self._look() <= self._quiet_ms for _ in range(_NUM_LOOKS))

    def give_up(self) -> None:
        """Counts what was measured though no core stayed quiet for it."""
        self.num_given_up += 1

    def _order(self) -> list[int]:
        """Returns the cores to ask: the present one, then those behind whom was asked last."""
        cores = sorted(self._before)
        if self._core is None or self._asked is None:
            return cores
        start = cores.index(self._asked) + 1
        others = [core for core in cores[start:] + cores[:start] if core != self._core]
        return [self._core, *others[: _MOST_ASKED - 1]]

    def _look(self) -> float:
        """Returns how long the probe takes on the present core, and remembers it."""
        found = self._probe()
        stretch = int(self._clock() // _STRETCH_S)
        if not self._fastest or self._fastest[-1][0] != stretch:
            self._fastest.append((stretch, []))
        own = self._fastest[-1][1]
        bisect.insort(own, found)
        del own[_NUM_FAST:]
        return found

    def _fast_ms(self) -> float:
        """Returns what quiet cores take; of few looks, the fastest fifth."""
        found = sorted(each for _, own in self._fastest for each in own)
        return found[min(_NUM_FAST - 1, len(found) // _NUM_FAST)] if found else 0.0

    def _probed(self, core: int) -> float | None:
        """Returns a core's time; None where the thread may not run there any more."""
        try:
            os.sched_setaffinity(0, {core})
        except OSError:
            return None
        return self._look()

    def _free(self) -> None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._before)


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
