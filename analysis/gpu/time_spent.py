"""Where the time of a long measurement goes, so that the next one can be planned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class TimeSpent:
    """Seconds by part.

    Attributes:
        seconds: By name of the part; a part that came again has the sum.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs within as ``name``, also where it fails."""
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def print_seconds(seconds: Mapping[str, float]) -> None:
    """Prints where the time went, longest first."""
    print(f"seconds, {sum(seconds.values()):.0f} in all:", flush=True)
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {spent:7.1f}  {name}", flush=True)
