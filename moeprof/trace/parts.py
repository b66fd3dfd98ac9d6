"""Reads committed Parquet parts: only the columns and row groups that are asked for.

Leaves out what the rows mean (`reader`, `blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moeprof.errors import TraceError
from moeprof.trace.commits import Part
from moeprof.trace.storage import Store

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepFilter:
    """The steps a caller wants.

    Attributes:
        first: Smallest step wanted; None for no bound.
        last: Largest step wanted; None for no bound.
        chosen: The exact steps, sorted; None where all between the bounds are wanted.
    """

    first: int | None = None
    last: int | None = None
    chosen: Array | None = field(default=None, compare=False)

    @classmethod
    def of(cls, steps: Any) -> StepFilter:
        """Returns the filter for None, a step, a slice, a range or a collection of steps."""
        if steps is None:
            return cls()
        if isinstance(steps, (int, np.integer)):
            return cls(int(steps), int(steps), np.array([int(steps)]))
        if isinstance(steps, slice) and steps.step in (None, 1):
            return cls(steps.start, None if steps.stop is None else steps.stop - 1)
        if isinstance(steps, slice):
            raise ValueError("a slice of steps has no stride; give the steps themselves")
        chosen = np.unique(np.asarray(list(steps), dtype=np.int64))
        if not chosen.size:
            return cls(0, -1, chosen)
        return cls(int(chosen[0]), int(chosen[-1]), chosen)

    @property
    def everything(self) -> bool:
        """True where no step is left out."""
        return self.first is None and self.last is None and self.chosen is None

    def overlaps(self, first: int | None, last: int | None) -> bool:
        """Returns True where some step in [first, last] may be wanted."""
        if first is None or last is None:
            return True
        if self.chosen is not None:
            index = int(np.searchsorted(self.chosen, first))
            return index < len(self.chosen) and int(self.chosen[index]) <= last
        return (self.first is None or last >= self.first) and (
            self.last is None or first <= self.last
        )

    def mask(self, steps: Array) -> Array:
        """Returns True where a step is wanted."""
        if self.chosen is not None:
            return np.isin(steps, self.chosen)
        keep = np.ones(len(steps), dtype=bool)
        if self.first is not None:
            keep &= steps >= self.first
        if self.last is not None:
            keep &= steps <= self.last
        return keep


class OpenPart:
    """An opened Parquet part; use it as a context.

    Args:
        store: Where the trace lies.
        part: The part.

    Raises:
        TraceError: The part is missing or damaged.
    """

    def __init__(self, store: Store, part: Part) -> None:
        self._store = store
        self._part = part
        source = None
        try:
            source = store.open_part(part.path)
            self._file = pq.ParquetFile(source)
            self.types: dict[str, pa.DataType] = {
                field.name: field.type for field in self._file.schema_arrow
            }
            self.names: tuple[str, ...] = tuple(self.types)
        except FileNotFoundError as error:
            raise TraceError(
                f"{store.path}: the committed part {part.path} is missing",
                hint="open it again if it is being recorded just now; else copy it again, whole",
            ) from error
        except (OSError, pa.ArrowException) as error:
            if source is not None:
                source.close()
            raise self._damaged() from error
        leaves = self._file.schema
        self._leaves = {leaves.column(index).path: index for index in range(len(leaves))}

    def __enter__(self) -> OpenPart:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)

    @property
    def num_groups(self) -> int:
        """Row groups."""
        return int(self._file.num_row_groups)

    @property
    def num_rows(self) -> int:
        """Rows the file holds."""
        return int(self._file.metadata.num_rows)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Returns columns of one row group; TraceError where it is damaged."""
        try:
            return self._file.read_row_group(group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged() from error

    def bounds(self, group: int, column: str) -> tuple[Any, Any]:
        """Returns the smallest and largest value of a column; (None, None) where unknown.

        For lists it is the smallest and largest element.
        """
        index = self._leaves.get(column, self._leaves.get(f"{column}.list.element"))
        if index is None:
            return None, None
        statistics = self._file.metadata.row_group(group).column(index).statistics
        if statistics is None or not statistics.has_min_max:
            return None, None
        return statistics.min, statistics.max

    def _damaged(self) -> TraceError:
        return TraceError(
            f"{self._store.path}: the part {self._part.path} is damaged or cut short",
            hint="copy the trace again from where it was recorded, or record it again",
        )


def read_part(
    store: Store, part: Part, *, columns: Sequence[str], steps: StepFilter
) -> Iterator[pa.Table]:
    """Yields the wanted columns of each row group that may hold a wanted step.

    Rows of unwanted steps within such a row group are dropped. Columns that the part lacks are
    left out.

    Raises:
        TraceError: The part is missing or damaged.
    """
    if not steps.overlaps(part.first_step, part.last_step):
        return
    with OpenPart(store, part) as opened:
        filtered = not steps.everything and "step" in opened.names
        present = [name for name in columns if name in opened.names]
        wanted = [*present, *(["step"] if filtered and "step" not in present else [])]
        for group in range(opened.num_groups):
            if filtered and not steps.overlaps(*opened.bounds(group, "step")):
                continue
            table = opened.read(group, wanted)
            if filtered:
                keep = steps.mask(table.column("step").to_numpy())
                if not keep.all():
                    table = table.filter(pa.array(keep))
            yield table.select(present)
