"""Values of JSON files, held to what they must be before anything is computed from them.

JSON as Python reads it has NaN, infinities, and text where a number should be; a computation may
swallow all three. Every function raises ValueError with what is wrong in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_SHOWN = 40


def number(value: Any, what: str) -> float:
    """Returns a finite number; no bool and no text is one."""
    if type(value) not in (int, float) or not _is_finite(value):
        raise ValueError(f"{what} is no finite number: {_shown(value)}")
    return float(value)


def not_negative(value: Any, what: str) -> float:
    """Returns a finite number that is 0 or more."""
    found = number(value, what)
    if found < 0:
        raise ValueError(f"{what} is negative: {_shown(value)}")
    return found


def positive(value: Any, what: str) -> float:
    """Returns a finite number above 0."""
    found = number(value, what)
    if found <= 0:
        raise ValueError(f"{what} is not positive: {_shown(value)}")
    return found


def whole(value: Any, what: str, *, least: int = 0) -> int:
    """Returns a whole number that is ``least`` or more."""
    if type(value) is not int:
        raise ValueError(f"{what} is no whole number: {_shown(value)}")
    if value < least:
        raise ValueError(f"{what} is less than {least}: {_shown(value)}")
    return value


def flag(value: Any, what: str) -> bool:
    """Returns true or false."""
    if type(value) is not bool:
        raise ValueError(f"{what} is neither true nor false: {_shown(value)}")
    return value


def text(value: Any, what: str) -> str:
    """Returns text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text: {_shown(value)}")
    return value


def table(value: Any, what: str) -> Mapping[str, Any]:
    """Returns a table of named values."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no table: {_shown(value)}")
    return value


def listed(value: Any, what: str) -> Sequence[Any]:
    """Returns a list."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list: {_shown(value)}")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
