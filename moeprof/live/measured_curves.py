"""Curves and surfaces out of measurements: ordered, scaled, put together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moeprof.replay.calibration_file import Curve, ExpertTimes, Measured


def scaled(measured: Measured, factor: float) -> Measured:
    """Returns a measurement times a factor."""
    return dataclasses.replace(
        measured,
        median=measured.median * factor,
        low=measured.low * factor,
        high=measured.high * factor,
    )


def middle(moments: Sequence[Measured]) -> Measured:
    """Returns what was measured at several moments: the median of them, and how they differ.

    A host that others use too is slow for seconds: one moment's repetitions all fall into that.
    The error is that of a mean of moments, each as far off as it says itself and as they differ.

    Args:
        moments: One or more.
    """
    medians = np.array([one.median for one in moments])
    median = float(np.median(medians))
    own = float(np.median([one.error for one in moments]))
    between = float(medians.std()) / median if median > 0 else 0.0
    return Measured(
        median=median,
        low=min(one.low for one in moments),
        high=max(one.high for one in moments),
        error=math.hypot(own, between) / math.sqrt(len(moments)),
        num_repetitions=sum(one.num_repetitions for one in moments),
    )


def middle_curve(moments: Sequence[Curve]) -> Curve:
    """Returns the same of one or more curves over the same sizes, size by size; see `middle`."""
    assert all(one.sizes == moments[0].sizes for one in moments)
    times = zip(*(one.times_s for one in moments), strict=True)
    return Curve(sizes=moments[0].sizes, times_s=tuple(middle(own) for own in times))


def ascending(points: Sequence[tuple[float, Measured]]) -> Curve:
    """Returns a curve out of (size, time) in any order."""
    ordered = dict(sorted(points, key=lambda point: point[0]))
    return Curve(sizes=tuple(map(float, ordered)), times_s=tuple(ordered.values()))


def surface(points: Sequence[tuple[int, Curve]]) -> ExpertTimes:
    """Returns times of experts out of (size of an expert in bytes, curve by rows)."""
    return ExpertTimes(
        expert_bytes=tuple(size for size, _ in points), by_rows=tuple(curve for _, curve in points)
    )
