"""A trace's token rows by request: prompt tokens first, then one turn after another.

Keeps every routing column as recorded. Leaves out batches: that is what `composition` makes anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.tokens import RANK_SHIFT
from moeprof.trace import blocks, parts, schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]

KEPT = ("sequence", "parent_sequence", "position", "phase")
"""Columns that stay what they are; ``accepted`` too where it is known."""

_DECODE = schema.TOKEN_PHASES.index("decode")


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedStack:
    """The tokens of one stack, request by request.

    Attributes:
        stack: The stack.
        columns: [tokens] or [tokens, slots] per column.
        prompt_start: [requests] first prompt token; encoder tokens are prompt.
        prompt_end: [requests].
        first_turn: [requests + 1] first decode turn.
        turn_start: [turns] first token of each turn.
        turn_end: [turns].
    """

    stack: str
    columns: Columns
    prompt_start: Ints
    prompt_end: Ints
    first_turn: Ints
    turn_start: Ints
    turn_end: Ints

    @property
    def num_prompt(self) -> Ints:
        """[requests] prompt tokens."""
        return self.prompt_end - self.prompt_start

    @property
    def num_turns(self) -> Ints:
        """[requests] decode turns."""
        return np.diff(self.first_turn)

    @property
    def is_pruned(self) -> bool:
        """True where a layer saw only the last token of some prompts."""
        return bool((self.columns["status"] == schema.SlotStatus.PRUNED_LAST_LAYER).any())

    def turn_tokens(self) -> NDArray[np.float64]:
        """Returns [requests] mean tokens of a decode turn."""
        before = np.r_[0, np.cumsum(self.turn_end - self.turn_start)][self.first_turn]
        mean: NDArray[np.float64] = np.diff(before) / np.maximum(self.num_turns, 1)
        return mean


def recorded_stack(trace: Trace, stack: str, request_keys: Ints) -> RecordedStack:
    """Returns the tokens of a stack by request.

    Args:
        trace: The trace.
        stack: One of its stacks.
        request_keys: [requests] rank and id in one number, ascending; tokens of others are left
            out.
    """
    columns = _columns(trace, stack)
    key = (columns["rank"].astype(np.int64) << RANK_SHIFT) | columns["request"]
    request = np.searchsorted(request_keys, key)
    request[request == len(request_keys)] = 0
    known = request_keys[request] == key if len(request_keys) else np.zeros(len(key), bool)
    decode = columns["phase"] == _DECODE
    order = np.lexsort(
        (
            columns["position"],
            columns["sequence"],
            np.where(decode, columns["step"], columns["position"]),
            decode,
            request,
        )
    )
    order = order[known[order]]
    request, decode, step = request[order], decode[order], columns["step"][order]
    bounds = np.searchsorted(request, np.arange(len(request_keys) + 1))
    num_prompt = np.bincount(request[~decode], minlength=len(request_keys))
    new_turn = decode & (
        np.r_[True, (np.diff(request) != 0) | (np.diff(step) != 0) | ~decode[:-1]]
        if len(order)
        else decode
    )
    turns = np.flatnonzero(new_turn)
    return RecordedStack(
        stack=stack,
        columns={
            name: values[order]
            for name, values in columns.items()
            if name not in ("rank", "step", "request")
        },
        prompt_start=bounds[:-1],
        prompt_end=bounds[:-1] + num_prompt,
        first_turn=np.searchsorted(turns, bounds),
        turn_start=turns,
        turn_end=np.minimum(np.append(turns[1:], len(order)), bounds[request[turns] + 1]),
    )


def _columns(trace: Trace, stack: str) -> Columns:
    """Returns all routing columns of a stack, in stored order."""
    scalars = ("rank", "step", "request", "sequence", "parent_sequence", "position")
    lists = ["expert", "status"]
    table = f"routing/{stack}"
    lists += [name for name in schema.OPTIONAL_ROUTING_COLUMNS if trace.has_column(table, name)]
    wanted = (*scalars, "phase", "accepted", *lists)
    num_slots = trace.info.num_slots(stack)
    pieces: list[Columns] = []
    for part in trace.parts(table):
        for rows in parts.read_part(trace.store, part, columns=wanted, steps=parts.StepFilter()):
            piece: Columns = {name: rows.column(name).to_numpy() for name in scalars}
            piece["phase"] = blocks.phase_codes(rows.column("phase"))
            for name in lists:
                piece[name] = np.array(blocks.fixed_lists(rows.column(name), num_slots))
            accepted = rows.column("accepted") if "accepted" in rows.column_names else None
            if accepted is not None and accepted.null_count < len(accepted):
                piece["accepted"] = accepted.to_numpy()
            pieces.append(piece)
    if not pieces:
        empty: Columns = {name: np.zeros(0, np.int64) for name in scalars}
        empty["phase"] = np.zeros(0, np.uint8)
        return {**empty, **{name: np.zeros((0, num_slots), np.int16) for name in lists}}
    names = dict.fromkeys(name for piece in pieces for name in piece)
    return {
        name: np.concatenate(
            [piece.get(name, np.full(len(piece["step"]), None)) for piece in pieces]
        )
        for name in names
    }
