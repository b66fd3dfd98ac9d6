"""Least squares whose factors are no less than zero, for a handful of factors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fit of times as sums of parts.

    Attributes:
        factors: [parts], none negative.
        error: Root mean square of the relative errors.
    """

    factors: Floats
    error: float


def fit_parts(columns: Floats, times: Floats) -> Fit:
    """Returns the factors with the least relative error, exactly: every choice of parts is tried.

    Args:
        columns: [observations, parts]; at most about ten parts.
        times: [observations], above zero.
    """
    weighted = columns / times[:, None]
    ones = np.ones(len(times))
    num_parts = columns.shape[1]
    best = Fit(factors=np.zeros(num_parts), error=1.0)
    for count in range(1, num_parts + 1):
        for chosen in itertools.combinations(range(num_parts), count):
            part = weighted[:, chosen]
            found = np.linalg.lstsq(part, ones, rcond=None)[0]
            if (found < 0).any():
                continue
            error = float(np.sqrt(np.mean((part @ found - ones) ** 2)))
            if error < best.error:
                factors = np.zeros(num_parts)
                factors[list(chosen)] = found
                best = Fit(factors=factors, error=error)
    return best
