"""Capacities as people ask for them: slots, a share of all expert bytes, or total bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream

Int64s = NDArray[np.int64]
Asked = int | float | str

_HINT = "16 (slots per cache), 25% or 0.25 as a Python float (share), 4000MiB (total bytes)"
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_BYTES = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(i?)B", re.IGNORECASE)
_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")
_KIB, _KB = 1024, 1000
_PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A capacity as asked for: exactly one of slots, share and num_bytes is set.

    Attributes:
        asked: What the caller wrote.
        slots: Slots per cache, each as large as the cache's largest expert.
        share: Share of all expert bytes.
        num_bytes: Total bytes of all caches of a replica.
    """

    asked: Asked
    slots: int | None = None
    share: Fraction | None = None
    num_bytes: int | None = None

    def total_bytes(self, expert_bytes: int) -> int:
        """Returns the total asked for of ``expert_bytes``; not for slots."""
        if self.share is not None:
            return int(self.share * expert_bytes)
        assert self.num_bytes is not None
        return self.num_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheSizes:
    """One unit in which capacities of a cache are counted.

    Attributes:
        sizes: [keys] size of each expert in that unit.
        capacities: Capacities in that unit, ascending.
        index: Which of the capacities asked for each of them is.
    """

    sizes: Int64s
    capacities: tuple[int, ...]
    index: tuple[int, ...]


def parse_capacity(value: Any) -> Capacity:
    """Returns a capacity.

    Args:
        value: int (slots per cache), float in (0, 1] (share of all expert bytes) or text: slots
            ("16"), share ("25%") or total bytes ("4000MiB").

    Raises:
        UsageError: It is none of these, or a text that could mean two of them.
    """
    if isinstance(value, bool | np.bool_):
        raise UsageError(f"a capacity cannot be {value}", hint=_HINT)
    if isinstance(value, int | np.integer):
        return _slots(value, int(value))
    if isinstance(value, float | np.floating):
        if not 0 < value <= 1:
            raise UsageError(
                f"a capacity of {value} is no share: it has to lie above 0 and at most at 1",
                hint=_HINT,
            )
        # As it is written: 0.29 is 29 %, not the binary number next to it.
        return Capacity(asked=float(value), share=Fraction(repr(float(value))))
    if isinstance(value, str):
        return _parse_text(value.strip())
    raise UsageError(f"a capacity cannot be {value!r}", hint=_HINT)


def _parse_text(text: str) -> Capacity:
    if text.isdecimal():
        return _slots(text, int(text))
    if match := _SHARE.fullmatch(text):
        share = Fraction(match[1]) / _PERCENT
        if not 0 < share <= 1:
            raise UsageError(f"a capacity of {text} is no share of the experts", hint=_HINT)
        return Capacity(asked=text, share=share)
    if match := _BYTES.fullmatch(text):
        base = _KIB if match[3] else _KB
        num_bytes = int(Fraction(match[1]) * base ** _POWERS[match[2].upper()])
        return Capacity(asked=text, num_bytes=num_bytes)
    try:
        float(text)
    except ValueError:
        raise UsageError(f"'{text}' is no capacity", hint=_HINT) from None
    raise UsageError(
        f"'{text}' could be a share or a number of slots", hint=f"write one of {_HINT}"
    )


def byte_count(text: str) -> int:
    """Returns bytes from text ("9MiB", "64 MB").

    Raises:
        UsageError: It is no number of bytes.
    """
    num_bytes = parse_capacity(text).num_bytes
    if not num_bytes:
        raise UsageError(f"{text!r} is no number of bytes", hint="write it with its unit: 9MiB")
    return num_bytes


def _slots(asked: Any, slots: int) -> Capacity:
    if slots < 1:
        raise UsageError(f"a capacity of {slots} slots holds nothing", hint=_HINT)
    return Capacity(asked=asked if isinstance(asked, str) else slots, slots=slots)


def capacity_bytes(capacity: Capacity, largest_bytes: Sequence[int], expert_bytes: int) -> int:
    """Returns the total asked for, in bytes, of one replica.

    Args:
        capacity: The capacity.
        largest_bytes: Bytes of the largest expert of each cache.
        expert_bytes: Bytes of all experts.
    """
    if capacity.slots is not None:
        return capacity.slots * sum(largest_bytes)
    return capacity.total_bytes(expert_bytes)


def cache_sizes(
    stream: Stream, capacities: Sequence[Capacity], expert_bytes: int
) -> tuple[CacheSizes, ...]:
    """Returns the capacities of one cache by unit: slots where they serve, else bytes.

    Totals are split over caches in proportion to their expert bytes, rounded down.

    Args:
        stream: The cache's lookups.
        capacities: As asked for.
        expert_bytes: Bytes of all experts of a replica.
    """
    equal = bool((stream.key_bytes == stream.largest_bytes).all())
    in_slots: list[tuple[int, int]] = []
    in_bytes: list[tuple[int, int]] = []
    for index, capacity in enumerate(capacities):
        if capacity.slots is not None:
            in_slots.append((capacity.slots, index))
            continue
        own = capacity.total_bytes(expert_bytes) * stream.all_bytes // expert_bytes
        if equal:
            in_slots.append((own // stream.largest_bytes, index))
        else:
            in_bytes.append((own, index))
    ones = np.ones(stream.num_keys, np.int64)
    return tuple(
        CacheSizes(
            sizes=sizes,
            capacities=tuple(number for number, _ in sorted(found)),
            index=tuple(index for _, index in sorted(found)),
        )
        for sizes, found in ((ones, in_slots), (stream.key_bytes, in_bytes))
        if found
    )
