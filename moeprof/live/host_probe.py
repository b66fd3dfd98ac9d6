"""The speed of the host while something else is measured: a fixed small piece of work, timed.

Hosts of virtual machines slow down and recover within seconds, one core at a time: two of a pair
share their arithmetic, and the other may belong to somebody else. Says when, and corrects nothing.
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
_GLANCE = 16
_NUM_NUMBERS = 16


def probe_ms() -> float:
    """Returns the median time of the work in milliseconds, 1 to 2 on a current host."""
    return _median_ms(_NUM_ADDITIONS, _NUM_CALLS)


def glance_ms() -> float:
    """Returns the median time of a sixteenth of that work, short enough to look between steps."""
    return _median_ms(_NUM_ADDITIONS // _GLANCE, _NUM_CALLS // _GLANCE)


def _median_ms(num_additions: int, num_calls: int) -> float:
    numbers = torch.zeros(_NUM_NUMBERS)
    times = []
    for _ in range(_NUM_RUNS):
        begun_s = time.perf_counter()
        _work(numbers, num_additions, num_calls)
        times.append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(times)


def _work(numbers: torch.Tensor, num_additions: int, num_calls: int) -> int:
    """Python's interpreter and torch's calls, as a step has them on the host."""
    total = 0
    for each in range(num_additions):
        total += each
    for _ in range(num_calls):
        numbers.add_(1.0)
    return total
