"""In what order a buffer asks for copies and launches pieces, over all dispatches of a trace.

As the live buffer does it: before a piece is launched, every copy that may start is asked for.
Leaves out how long anything takes (`cost_model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import AT_ONCE, NO_SLOT, Planned
from moeprof.replay.pipeline import NOTHING

if TYPE_CHECKING:
    from moeprof.replay.buffer_plans import BufferPlan, RoutedRows
    from moeprof.replay.calibration_file import Calibration
    from moeprof.replay.expert_shapes import ExpertShape

Int32s = NDArray[np.int32]

_STREAMED_DTYPES = ("bfloat16", "float16")
_WIDTH_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ExecutionOrder:
    """Pieces and copies in the order in which they are asked for.

    Attributes:
        piece_starts: [dispatches + 1] first piece of each dispatch.
        lookup_starts: [pieces + 1] first of the lookups of each piece.
        lookups: [lookups on the device] in the order of execution.
        awaits: [pieces] last copy that the piece reads; see `pipeline.Work`, as for what follows.
        copy_starts: [dispatches + 1].
        copied: [copies] lookup that it is for, `NOTHING` where it is ahead of it.
        before: [copies].
        after: [copies].
    """

    piece_starts: Int32s
    lookup_starts: Int32s
    lookups: Int32s
    awaits: Int32s
    copy_starts: Int32s
    copied: Int32s
    before: Int32s
    after: Int32s


def is_streamed(
    num_tokens: NDArray[np.int32], shape: ExpertShape, machine: Calibration
) -> NDArray[np.bool_]:
    """Returns [dispatches] True where one launch streams several experts.

    The rule of the live buffer: the machine can, the shape fits, and there are few tokens.

    Args:
        num_tokens: [dispatches].
        shape: Of the experts.
        machine: The machine.
    """
    fits = shape.dtype in _STREAMED_DTYPES and not (
        shape.d_model % _WIDTH_MULTIPLE or shape.d_ff % _WIDTH_MULTIPLE
    )
    if machine.streamed is None or machine.is_serial or not fits:
        return np.zeros(len(num_tokens), bool)
    found: NDArray[np.bool_] = num_tokens <= machine.streamed.most_tokens
    return found


def execution_order(
    routed: RoutedRows, plan: BufferPlan, streamed: NDArray[np.bool_]
) -> ExecutionOrder:
    """Returns the order in which a plan is executed.

    Args:
        routed: The routing.
        plan: What the buffer does with each lookup.
        streamed: [dispatches] True where one launch streams several experts.
    """
    hit, loads, on_host = (each.astype(bool).tolist() for each in (plan.hit, plan.loads,
                                                                   plan.on_host))  # fmt: skip
    after, awaits, starts = plan.after.tolist(), plan.awaits.tolist(), routed.starts.tolist()
    used, awaits_ahead = plan.ahead.used.astype(bool).tolist(), plan.ahead.awaits.tolist()
    after_ahead = plan.ahead.after.tolist()
    bounds = np.searchsorted(plan.ahead.dispatch, np.arange(len(streamed) + 1)).tolist()
    copy_of: dict[int, int] = {}
    copy_ahead: list[int] = []
    piece_starts, lookup_starts, copy_starts = [0], [0], [0]
    lookups: list[int] = []
    piece_awaits: list[int] = []
    copies: list[tuple[int, int, int]] = []
    for dispatch, by_piece in enumerate(streamed.tolist()):
        first, end = starts[dispatch], starts[dispatch + 1]
        planned = [
            Planned(place, hit[at], NO_SLOT, loads[at], on_host[at], after[at], used[at])
            for place, at in enumerate(range(first, end))
        ]
        pieces = pieces_of(planned, streamed=by_piece)
        own = _copies(planned, pieces, streamed=by_piece)
        for place, before, waiting in own:
            copy_of[first + place] = len(copies)
            copies.append((first + place, before, waiting))
        own_ahead = after_ahead[bounds[dispatch] : bounds[dispatch + 1]]
        for waiting in _copies_ahead(own_ahead, pieces, streamed=by_piece):
            copy_ahead.append(len(copies))
            copies.append((NOTHING, len(pieces), waiting))
        copy_starts.append(len(copies))
        for piece in pieces:
            lookups += [first + place for place in piece]
            lookup_starts.append(len(lookups))
            read = [awaits[first + place] for place in piece]
            read_ahead = [awaits_ahead[first + place] for place in piece]
            piece_awaits.append(max(
                [copy_of[one] for one in read if one != NOTHING]
                + [copy_ahead[one] for one in read_ahead if one != NOTHING],
                default=NOTHING,
            ))  # fmt: skip
        piece_starts.append(len(piece_awaits))
    every = _int32s(copies).reshape(-1, 3)
    return ExecutionOrder(
        piece_starts=_int32s(piece_starts),
        lookup_starts=_int32s(lookup_starts),
        lookups=_int32s(lookups),
        awaits=_int32s(piece_awaits),
        copy_starts=_int32s(copy_starts),
        copied=every[:, 0].copy(),
        before=every[:, 1].copy(),
        after=every[:, 2].copy(),
    )


def _copies(
    planned: Sequence[Planned], pieces: Sequence[Sequence[int]], *, streamed: bool
) -> list[tuple[int, int, int]]:
    """Returns (place of the lookup, piece before which it is asked for, piece it waits for)."""
    piece_of = {place: index for index, piece in enumerate(pieces) for place in piece}
    if streamed:
        # One event for all that are asked for together: they wait for the last piece.
        return [
            (place, before, NOTHING if planned[place].after == AT_ONCE and before < len(pieces)
             else before - 1)
            for before, group in enumerate(copies_of(planned, pieces))
            for place in group
        ]  # fmt: skip
    found = []
    before = 0
    for place, step in enumerate(planned):
        if step.loads:
            waiting = piece_of[step.after] if step.after != AT_ONCE else NOTHING
            # In order of place: one that has to wait keeps back all that follow.
            before = max(before, waiting + 1)
            found.append((place, before, waiting))
    return found


def _copies_ahead(
    after: Sequence[int], pieces: Sequence[Sequence[int]], *, streamed: bool
) -> list[int]:
    """Returns the piece that each copy ahead waits for, or `NOTHING`."""
    piece_of = {place: index for index, piece in enumerate(pieces) for place in piece}
    # A dispatch in pieces marks the ends of pieces only, and its last one is launched by then.
    return [
        NOTHING if place == AT_ONCE else len(pieces) - 1 if streamed else piece_of[place]
        for place in after
    ]


def _int32s(values: Any) -> Int32s:
    return np.array(values, np.int32)
