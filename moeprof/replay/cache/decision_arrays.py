"""What was decided about a dispatch, as arrays for compiled readers and as lists for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache.decision_state import (
    AFTER,
    AHEAD,
    COPY_PLACES,
    COPY_STARTS,
    EXPERT,
    FETCHED,
    HIT,
    LOADS,
    MOST_EXPERTS,
    NUM_COLUMNS,
    NUM_COUNTS,
    NUM_EXPERTS,
    NUM_FETCHED_COLUMNS,
    NUM_PIECES,
    ON_HOST,
    PIECE_PLACES,
    PIECE_STARTS,
    ROWS,
    SLOT,
)
from moeprof.replay.cache.residency import Fetched, Planned

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What was decided about a dispatch, until the next one is.

    Places are columns: active experts, ascending. All arrays are C-contiguous.

    Attributes:
        columns: [8, most experts] int32; rows `EXPERT`, `ROWS`, `HIT`, `SLOT`, `LOADS`, `ON_HOST`,
            `AFTER`, `AHEAD`: those of `Planned`, and the rows of each expert.
        counts: [4] int64: `NUM_EXPERTS` that are active, `NUM_PIECES`, `NUM_COPIES` (of experts
            that the host computes too), `NUM_ON_HOST`.
        piece_starts: [most experts + 1] int32 first of ``piece_places`` of each piece, and the end.
        piece_places: [most experts] int32 places of the pieces, one after another.
        copy_starts: [most experts + 2] int32 as ``piece_starts``: what is copied before each piece,
            and after the last.
        copy_places: [most experts] int32.
        fetched: [4, prefetch, at least 1] int32 what is copied ahead; rows `SITE`,
            `FETCHED_EXPERT`, `FETCHED_SLOT`, `FETCHED_AFTER`: those of `Fetched`.
    """

    columns: Int32s
    counts: Int64s
    piece_starts: Int32s
    piece_places: Int32s
    copy_starts: Int32s
    copy_places: Int32s
    fetched: Int32s

    def planned(self) -> list[Planned]:
        """Returns what happens to each active expert."""
        found = self.columns[:, : self.counts[NUM_EXPERTS]].tolist()
        return [
            Planned(expert, bool(hit), slot, bool(loads), bool(on_host), after, bool(ahead))
            for expert, hit, slot, loads, on_host, after, ahead in zip(
                *(found[row] for row in (EXPERT, HIT, SLOT, LOADS, ON_HOST, AFTER, AHEAD)),
                strict=True,
            )
        ]

    def pieces(self) -> list[list[int]]:
        """Returns the places of each piece, as `pieces.pieces_of` streamed."""
        return _split(self.piece_starts, self.piece_places, int(self.counts[NUM_PIECES]))

    def copies(self) -> list[list[int]]:
        """Returns the places of each group of copies, as `pieces.copies_of`."""
        return _split(self.copy_starts, self.copy_places, int(self.counts[NUM_PIECES]) + 1)

    def fetched_list(self, num: int) -> list[Fetched]:
        """Returns what is copied ahead.

        Args:
            num: What `CompiledResidency.foresee` returned.
        """
        return [Fetched(*each) for each in self.fetched[:, :num].T.tolist()]


def _split(starts: Int32s, places: Int32s, num: int) -> list[list[int]]:
    return [places[starts[group] : starts[group + 1]].tolist() for group in range(num)]


def empty_decision(most_experts: int) -> Decision:
    """Returns a decision about nothing, in memory of its own; nothing is copied ahead."""

    def part(length: int) -> Int32s:
        return np.zeros(length, np.int32)

    return Decision(
        columns=part(NUM_COLUMNS * most_experts).reshape(NUM_COLUMNS, most_experts),
        counts=np.zeros(NUM_COUNTS, np.int64),
        piece_starts=part(most_experts + 1),
        piece_places=part(most_experts),
        copy_starts=part(most_experts + 2),
        copy_places=part(most_experts),
        fetched=part(NUM_FETCHED_COLUMNS).reshape(NUM_FETCHED_COLUMNS, 1),
    )


def columns_of(planned: Sequence[Planned], rows: Sequence[int]) -> Int32s:
    """Returns [8, active experts] what `Decision.columns` hold about a dispatch.

    Args:
        planned: Its lookups.
        rows: Rows of each.
    """
    found = np.zeros((NUM_COLUMNS, len(planned)), np.int32)
    if planned:
        fields = [EXPERT, HIT, SLOT, LOADS, ON_HOST, AFTER, AHEAD]
        found[fields] = np.array(planned, np.int32).T
        found[ROWS] = rows
    return found


def decision_in(ints: Int32s, longs: Int64s, most_fetched: int) -> Decision:
    """Returns the part of the arrays of `decision_state` that holds a decision."""
    most = int(longs[MOST_EXPERTS])

    def part(field: int, length: int) -> Int32s:
        return ints[longs[field] : longs[field] + length]

    return Decision(
        columns=ints[: NUM_COLUMNS * most].reshape(NUM_COLUMNS, most),
        counts=longs[:NUM_COUNTS],
        piece_starts=part(PIECE_STARTS, most + 1),
        piece_places=part(PIECE_PLACES, most),
        copy_starts=part(COPY_STARTS, most + 2),
        copy_places=part(COPY_PLACES, most),
        fetched=part(FETCHED, NUM_FETCHED_COLUMNS * most_fetched).reshape(NUM_FETCHED_COLUMNS, -1),
    )
