"""Percentiles of measured steps, and how well repetitions know them.

A setting's step takes the median over its repetitions; percentiles are taken over these medians.
Leaves out when repetitions are taken (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_NUM_DRAWS = 200
_LEAST_REPETITIONS = 3
_TAIL = 0.05
_Z = 1.6448536269514722


def measured_ms(times: Floats, percentile: int) -> float:
    """Returns a percentile of the steps' medians.

    Args:
        times: [repetitions, steps].
        percentile: Which.
    """
    return float(np.percentile(np.median(times, axis=0), percentile))


def spread_of(times: Floats, percentile: int, visits: Numbers | None = None) -> float:
    """Returns half the width of the 90 % interval of a percentile, over the percentile.

    Repetitions of one visit share what the machine did meanwhile: a slow stretch of seconds hits
    all of them, and drawing them one by one would take them for independent. Where visits are
    given, whole visits are drawn with replacement, then repetitions within each. Draws from few
    visits vary too little (by ``n - 1`` over ``n``) and their tails are those of Student's t: the
    width is widened for both. It is infinite for one visit and for fewer than three repetitions.

    Args:
        times: [repetitions, steps].
        percentile: Which, of the steps' medians over repetitions.
        visits: [repetitions] the visit of each; None where they are not known. Repetitions are then
            drawn one by one, nothing is widened, and slow stretches are not accounted for.
    """
    if len(times) < _LEAST_REPETITIONS:
        return math.inf
    generator = np.random.default_rng(0)
    if visits is None:
        drawn = times[generator.integers(len(times), size=(_NUM_DRAWS, len(times)))]
        medians, widened = np.median(drawn, axis=1), 1.0
    else:
        members = [np.flatnonzero(visits == visit) for visit in np.unique(visits)]
        if len(members) == 1:
            return math.inf
        medians = np.stack(
            [np.median(times[_drawn(members, generator)], axis=0) for _ in range(_NUM_DRAWS)]
        )
        widened = _widening(len(members))
    found = np.percentile(medians, percentile, axis=1)
    low, high = np.quantile(found, (_TAIL, 1 - _TAIL)).tolist()
    return float(widened * (high - low) / 2 / measured_ms(times, percentile))


def visits_of(times: Mapping[str, Any]) -> Numbers | None:
    """Returns the visit of each repetition of a setting [repetitions], or None.

    Args:
        times: Of one setting, as `moeprof.live.verification.write_verification` writes them; files
            from before there were rounds know of no visits.

    Raises:
        ValueError: The visits are not those of the repetitions.
    """
    if "visits" not in times:
        return None
    counts = [visit["repetitions"] for visit in times["visits"]]
    if sum(counts) != len(times["measured_ms"]):
        raise ValueError(f"visits of {sum(counts)} repetitions, not {len(times['measured_ms'])}")
    return np.repeat(np.arange(len(counts)), counts)


def _drawn(members: list[Numbers], generator: np.random.Generator) -> Numbers:
    """Returns repetitions: visits drawn with replacement, then as many of each as it has."""
    chosen = generator.integers(len(members), size=len(members))
    return np.concatenate(
        [generator.choice(members[one], size=len(members[one])) for one in chosen.tolist()]
    )


def _widening(num_visits: int) -> float:
    return float(np.sqrt(num_visits / (num_visits - 1)) * _t_quantile(num_visits - 1) / _Z)


def _t_quantile(freedom: int) -> float:
    """Returns the 95 % quantile of Student's t.

    In closed form for 1 and 2 degrees of freedom, else by the expansion of Abramowitz and Stegun
    (26.7.5), off by less than 0.3 %.
    """
    if freedom == 1:
        return math.tan(math.pi * (0.5 - _TAIL))
    if freedom == 2:  # noqa: PLR2004
        return (1 - 2 * _TAIL) * math.sqrt(2 / (4 * _TAIL * (1 - _TAIL)))
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))
