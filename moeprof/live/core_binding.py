"""The calling thread on one core for a while, where the system moves it about.

A thread that waits for the device by reading memory again and again loses what it had in caches
when it is moved, and cores differ: one may share its arithmetic with a busy neighbour, which guests
of a virtual machine are not told. Nothing here is used unless asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from moeprof.errors import UsageError
from moeprof.live.host_probe import probe_ms

# More than torch computes on one thread.
_SHARED_OUT = 1 << 20


@contextmanager
def bound_to_core(core: int | None) -> Iterator[None]:
    """Keeps the calling thread on a core, and lets it go where it could before.

    Threads that are there already stay as they are. Those that the calling thread starts meanwhile,
    and programs (compilers of kernels), are on that core too, and stay there: torch's own for the
    processor are started before, those of a backward pass are not.

    Args:
        core: Number of the core; None binds nothing.

    Raises:
        UsageError: The thread may not run there, or the system binds no threads.
    """
    if core is None:
        yield
        return
    before = allowed_cores()
    if core not in before:
        raise UsageError(
            f"this thread may not run on core {core}",
            hint=f"one of {', '.join(map(str, sorted(before)))}",
        )
    _start_threads()
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allowed_cores() -> set[int]:
    """Returns the cores that the calling thread may run on.

    Raises:
        UsageError: The system binds no threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system binds no thread to a core", hint="run without a core")
    return set(os.sched_getaffinity(0))


def quietest_core(
    cores: Collection[int] | None = None, *, probe: Callable[[], float] = probe_ms
) -> int:
    """Returns the core on which a fixed piece of work is done fastest right now.

    Args:
        cores: Which are tried; all that the calling thread may run on when None.
        probe: Time of the work.

    Raises:
        UsageError: The thread may not run on one of them, or the system binds no threads.
    """
    times = {}
    for core in sorted(allowed_cores() if cores is None else cores):
        with bound_to_core(core):
            times[core] = probe()
    return min(times, key=lambda core: times[core])


def _start_threads() -> None:
    """Has torch start its threads: they would be bound where it first needs them."""
    torch.zeros(_SHARED_OUT).add_(1.0)
