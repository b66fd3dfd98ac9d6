"""Numbers as text, by unit; the same on every page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeprof.replay import wording

UNKNOWN = "unknown"

_THOUSAND = 1000
_TAILS = (" points", " ms", " B", " KiB", " MiB", " GiB", " TiB")


def formatted(value: Any, unit: str) -> str:
    """Returns a value as a reader wants to see it.

    Args:
        value: Number or text; None is unknown.
        unit: ``share``, ``points``, ``bytes``, ``ms``, ``count``, ``text`` or any other name, which
            is put behind the number.
    """
    if value is None or value == "":
        return UNKNOWN if unit not in {"text", ""} else ""
    if unit in _FORMATS:
        return _FORMATS[unit](value)
    return f"{wording.number(value)} {_SINGULARS.get(unit, unit) if value == 1 else unit}"


_SINGULARS: Mapping[str, str] = {"dispatches": "dispatch"}
_FORMATS: Mapping[str, Callable[[Any], str]] = {
    "text": str,
    "class": str,
    "share": wording.percent,
    "points": wording.points,
    "bytes": wording.num_bytes,
    "ms": wording.milliseconds,
    "count": "{:,.0f}".format,
    "ratio": "{:.3g}".format,
    "number": wording.number,
}


def interval(low: Any, high: Any, unit: str) -> str:
    """Returns ``38 to 44%``; an empty string where there is no interval."""
    if low is None or high is None:
        return ""
    if unit not in _FORMATS:
        return f"{wording.number(low)} to {wording.number(high)} {unit}"
    if unit == "share":
        return wording.percent_range(low, high)
    first, second = formatted(low, unit), formatted(high, unit)
    for tail in _TAILS:
        if first.endswith(tail) and second.endswith(tail):
            first = first.removesuffix(tail)
    return f"{first} to {second}"


def compact(value: float) -> str:
    """Returns a number for an axis."""
    if value >= _THOUSAND and value % _THOUSAND == 0:
        return f"{value / _THOUSAND:g}k"
    return f"{value:g}"
