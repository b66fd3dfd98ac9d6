"""Curves and surfaces out of measurements: ordered, and scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moeprof.replay.calibration_file import Curve, ExpertTimes, Measured


def scaled(measured: Measured, factor: float) -> Measured:
    """Returns a measurement times a factor."""
    return dataclasses.replace(
        measured,
        median=measured.median * factor,
        low=measured.low * factor,
        high=measured.high * factor,
    )


def ascending(points: Sequence[tuple[float, Measured]]) -> Curve:
    """Returns a curve out of (size, time) in any order."""
    ordered = dict(sorted(points, key=lambda point: point[0]))
    return Curve(sizes=tuple(map(float, ordered)), times_s=tuple(ordered.values()))


def surface(points: Sequence[tuple[int, Curve]]) -> ExpertTimes:
    """Returns times of experts out of (size of an expert in bytes, curve by rows)."""
    return ExpertTimes(
        expert_bytes=tuple(size for size, _ in points), by_rows=tuple(curve for _, curve in points)
    )
