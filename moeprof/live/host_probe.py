"""The speed of the host while something else is measured: a fixed small piece of work, timed.

Hosts of virtual machines slow down and recover within seconds. Says when, and corrects nothing.
The work stays on one thread: what torch shares out among threads leaves them spinning for a while,
which slows down what is measured next, and stops whole machines whose processors are rationed.
"""

from __future__ import annotations

import statistics
import time

import torch

_NUM_RUNS = 3
_NUM_ADDITIONS = 20_000
_NUM_CALLS = 300
_NUM_NUMBERS = 16


def probe_ms() -> float:
    """Returns the median time of the work in milliseconds, 1 to 2 on a current host."""
    numbers = torch.zeros(_NUM_NUMBERS)
    times = []
    for _ in range(_NUM_RUNS):
        begun_s = time.perf_counter()
        _work(numbers)
        times.append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(times)


def _work(numbers: torch.Tensor) -> int:
    """Python's interpreter and torch's calls, as a step has them on the host."""
    total = 0
    for each in range(_NUM_ADDITIONS):
        total += each
    for _ in range(_NUM_CALLS):
        numbers.add_(1.0)
    return total
