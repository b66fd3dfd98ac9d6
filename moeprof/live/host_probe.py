"""The speed of the host while something else is measured: a fixed small piece of work, timed.

Hosts of virtual machines slow down and recover within seconds. Says when, and corrects nothing.
"""

from __future__ import annotations

import statistics
import time

import torch

_NUM_RUNS = 3
_NUM_ADDITIONS = 20_000
_NUM_PRODUCTS = 16
_WIDTH = 64


def probe_ms() -> float:
    """Returns the median time of the work in milliseconds; about 2 on a current host."""
    matrix = torch.full((_WIDTH, _WIDTH), 1 / _WIDTH)
    times = []
    for _ in range(_NUM_RUNS):
        begun_s = time.perf_counter()
        _work(matrix)
        times.append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(times)


def _work(matrix: torch.Tensor) -> float:
    """Python's interpreter and torch's calls, as a step has them on the host."""
    total = 0.0
    for each in range(_NUM_ADDITIONS):
        total += each
    product = matrix
    for _ in range(_NUM_PRODUCTS):
        product = product @ matrix
    return total + float(product[0, 0])
