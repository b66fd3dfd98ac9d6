"""Writes planned steps as a trace, with the tokens of a recording.

Leaves out which steps there are (`schedules`) and whether that is allowed (`composition`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.recorded import KEPT, RecordedStack
from moeprof.replay.schedules import PROMPT_PART, PlannedStep, Workload
from moeprof.trace import schema
from moeprof.trace.schema import SlotStatus
from moeprof.trace.writer import TraceWriter

Ints = NDArray[np.int64]

_UNIT_TOKENS = 1 << 15
_PREFILL, _DECODE = (schema.TOKEN_PHASES.index(name) for name in ("prefill", "decode"))
_UNSEEN = (SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT)


@dataclass(kw_only=True, eq=False)
class Written:
    """What was written.

    Attributes:
        end_s: [requests] end of each request's last step.
        num_tokens: Token rows.
        num_padded: Padding and rows of ended requests, left out.
        num_calls: Steps x sites of their stack.
    """

    end_s: NDArray[np.float64]
    num_tokens: int = 0
    num_padded: int = 0
    num_calls: int = 0

    def capture(self, info: schema.TraceInfo) -> schema.CaptureCounts:
        """Returns the counters of `trace.json`."""
        return schema.CaptureCounts(
            num_sites=len(info.sites),
            num_calls_expected=self.num_calls,
            num_calls_seen=self.num_calls,
            num_tokens_seen=self.num_tokens,
            num_tokens_recorded=self.num_tokens,
            num_padded_tokens=self.num_padded,
        )


def write_steps(
    writer: TraceWriter,
    stacks: Mapping[str, RecordedStack],
    steps: Iterator[PlannedStep],
    *,
    request: Ints,
    ids: Ints,
    work: Workload,
) -> Written:
    """Writes steps in their order.

    Args:
        writer: Where to.
        stacks: The recorded tokens.
        steps: In order of execution.
        request: [requests] index of each planned request among the recorded ones.
        ids: [requests] id to write.
        work: The planned requests.
    """
    written = Written(end_s=np.zeros(len(request)))
    waiting: dict[str, _Waiting] = {}
    number = 0
    for planned in steps:
        stack = stacks.get(planned.stack)
        if stack is None:
            continue
        gathered = _gather(stack, planned, request)
        if not len(gathered[0]):
            continue
        held = waiting.setdefault(planned.stack, _Waiting())
        held.add(number, planned, *gathered)
        written.end_s[planned.request] = planned.end_s
        number += 1
        if held.num_tokens >= _UNIT_TOKENS:
            _write(writer, stack, waiting.pop(planned.stack), ids, work, written)
    for name, held in waiting.items():
        _write(writer, stacks[name], held, ids, work, written)
    return written


@dataclass(kw_only=True, eq=False)
class _Waiting:
    """Steps of one stack that are not written yet."""

    numbers: list[int] = field(default_factory=list)
    planned: list[PlannedStep] = field(default_factory=list)
    tokens: list[Ints] = field(default_factory=list)
    requests: list[Ints] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, number: int, planned: PlannedStep, tokens: Ints, requests: Ints) -> None:
        self.numbers.append(number)
        self.planned.append(planned)
        self.tokens.append(tokens)
        self.requests.append(requests)
        self.num_tokens += len(tokens)


def _gather(stack: RecordedStack, planned: PlannedStep, request: Ints) -> tuple[Ints, Ints]:
    """Returns the recorded token rows of a step, and the planned request of each."""
    source = request[planned.request]
    turn = np.where(planned.part == PROMPT_PART, 0, stack.first_turn[source] + planned.first)
    starts, ends = stack.prompt_start[source] + planned.first, stack.prompt_start[source]
    ends = ends + planned.last
    if len(stack.turn_start):
        decodes = planned.part != PROMPT_PART
        turn = np.minimum(turn, len(stack.turn_start) - 1)
        starts = np.where(decodes, stack.turn_start[turn], starts)
        ends = np.where(decodes, stack.turn_end[turn], ends)
    lengths = ends - starts
    offsets = np.cumsum(lengths) - lengths
    rows = np.arange(int(lengths.sum())) + np.repeat(starts - offsets, lengths)
    return rows, np.repeat(planned.request, lengths)


def _write(
    writer: TraceWriter,
    stack: RecordedStack,
    held: _Waiting,
    ids: Ints,
    work: Workload,
    written: Written,
) -> None:
    """Writes the waiting steps of one stack as one unit."""
    info = writer.info
    tokens, requests = np.concatenate(held.tokens), np.concatenate(held.requests)
    sizes = np.array([len(rows) for rows in held.tokens])
    of_step = np.repeat(np.arange(len(sizes)), sizes)
    columns = {name: values[tokens] for name, values in stack.columns.items()}
    placed = _rows(info, stack.stack, held.planned, of_step, requests, columns, work)
    step = np.array(held.numbers)
    phase = columns["phase"].astype(np.int64)
    starts = np.r_[0, np.cumsum(sizes)[:-1]]
    lowest = np.minimum.reduceat(phase, starts)
    highest = np.maximum.reduceat(phase, starts)
    num_decode = np.bincount(of_step[phase == _DECODE], minlength=len(sizes))
    num_padded = placed.num_rows - sizes
    writer.append(
        {
            "steps": {
                "step": step,
                "stack": stack.stack,
                "phase": np.where(lowest == highest, lowest, schema.PHASES.index("mixed")),
                "batch": placed.batch,
                "num_tokens": sizes,
                "num_prefill_tokens": sizes - num_decode,
                "num_decode_tokens": num_decode,
                "num_padded_tokens": num_padded,
                "probed": False,
                "start_s": np.array([planned.start_s for planned in held.planned]),
            },
            "layers": _layers(info, stack.stack, step, of_step, columns, placed),
            f"routing/{stack.stack}": {
                "step": step[of_step],
                "row": placed.row,
                "request": ids[requests],
                **{name: columns[name] for name in KEPT},
                **{
                    name: columns[name]
                    for name in ("accepted", "expert", "status", *schema.OPTIONAL_ROUTING_COLUMNS)
                    if name in columns
                },
            },
        }
    )
    written.num_tokens += len(tokens)
    written.num_padded += int(num_padded.sum())
    written.num_calls += len(sizes) * len(info.sites_of(stack.stack))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Placed:
    """Where tokens lie in their batches.

    Attributes:
        row: [tokens] row of the flattened batch.
        batch: [steps] rows of the batch.
        num_rows: [steps] rows times columns.
        one_each: [steps] rows of a layer that sees one token of each row of the batch.
    """

    row: Ints
    batch: Ints
    num_rows: Ints
    one_each: Ints


def _rows(
    info: schema.TraceInfo,
    stack: str,
    planned: Sequence[PlannedStep],
    of_step: Ints,
    requests: Ints,
    columns: Mapping[str, NDArray[Any]],
    work: Workload,
) -> _Placed:
    """Returns the rows of tokens: packed, or padded as `generate` pads a batch.

    Encoders and translation prompts are padded on the right, language models on the left.
    """
    sequence = columns["sequence"].astype(np.int64)
    width = int(work.num_sequences.max(initial=1)) + int(sequence.max(initial=0))
    key = (of_step * len(work) + requests) * width + sequence
    order = np.lexsort((columns["position"], key))
    ordered = key[order]
    fresh = np.r_[True, ordered[1:] != ordered[:-1]]
    index = np.arange(len(order))
    place = np.empty(len(order), np.int64)
    place[order] = index - np.maximum.accumulate(np.where(fresh, index, 0))
    lane, of_lane = np.unique(key, return_inverse=True)
    length = np.bincount(of_lane)
    lane_step = lane // (len(work) * width)
    lanes = np.bincount(lane_step, minlength=len(planned))
    if planned[0].members is None:
        starts = np.searchsorted(of_step, np.arange(len(planned)))
        num_rows = np.bincount(of_step, minlength=len(planned))
        row = index - starts[of_step]
        return _Placed(row=row, batch=lanes, num_rows=num_rows, one_each=lanes)
    columns_of_step = np.zeros(len(planned), np.int64)
    np.maximum.at(columns_of_step, lane_step, length)
    sequences = np.ones_like(work.num_sequences) if stack == "encoder" else work.num_sequences
    before = np.cumsum(sequences) - sequences
    members = [step.members for step in planned]
    first = np.array([int(each[0]) if each is not None else 0 for each in members])
    batch = np.array([int(sequences[each].sum()) for each in members if each is not None])
    batch_row = before[requests] - before[first[of_step]] + sequence
    pads_left = stack == "decoder" and info.model.task != "mt"
    shift = columns_of_step[of_step] - length[of_lane] if pads_left else 0
    return _Placed(
        row=batch_row * columns_of_step[of_step] + shift + place,
        batch=batch,
        num_rows=batch * columns_of_step,
        one_each=batch,
    )


def _layers(
    info: schema.TraceInfo,
    stack: str,
    step: Ints,
    of_step: Ints,
    columns: Mapping[str, NDArray[Any]],
    placed: _Placed,
) -> dict[str, Any]:
    """Returns the columns of `layers`: one row per dispatch."""
    rows = []
    sizes = np.bincount(of_step, minlength=len(step))
    for site in info.sites_of(stack):
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        status, expert = columns["status"][:, slots], columns["expert"][:, slots]
        unseen = np.isin(status, _UNSEEN).all(axis=1)
        seen = np.bincount(of_step[~unseen], minlength=len(step))
        routed = status == SlotStatus.ROUTED
        cell = np.unique((of_step[:, None] * site.num_experts + expert)[routed])
        active = np.bincount(cell // site.num_experts, minlength=len(step))
        happened = np.flatnonzero(seen)
        rows.append(
            np.stack(
                [
                    step[happened],
                    np.full(len(happened), site.layer),
                    np.full(len(happened), site.site),
                    seen[happened],
                    np.where(seen == sizes, placed.num_rows, placed.one_each)[happened],
                    active[happened],
                ]
            )
        )
    joined = np.concatenate(rows, axis=1)
    joined = joined[:, np.lexsort((joined[2], joined[0]))]
    names = ("step", "layer", "site", "num_tokens", "num_rows", "num_active_experts")
    return {"stack": stack, **dict(zip(names, joined, strict=True))}
