"""Events that were made once and wait for their next use.

A buffer of thousands of slots has two for each. To make, record and destroy them takes as long as
all else of building it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class SpareEvents:
    """Events of one device that nobody uses.

    Args:
        make: Makes an event that the driver knows: one that was recorded.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._spare: list[Any] = []

    def __len__(self) -> int:
        return len(self._spare)

    def take(self, count: int) -> list[Any]:
        """Returns so many events, as many as possible of those that are there."""
        kept = max(0, len(self._spare) - count)
        found = self._spare[kept:]
        del self._spare[kept:]
        return found + [self._make() for _ in range(count - len(found))]

    def give_back(self, events: Sequence[Any]) -> None:
        """Takes events back that nobody waits for any more and that all lie behind."""
        self._spare += events
