"""Streams routing as NumPy blocks and as dispatches, in bounded memory.

A block never splits a step. Leaves out pandas views (`reader`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moeprof.errors import TraceError
from moeprof.trace import commits, encoding, parts
from moeprof.trace import schema as spec
from moeprof.trace.commits import Part
from moeprof.trace.schema import SlotStatus
from moeprof.trace.storage import Store

Array = np.ndarray[Any, Any]

BLOCK_SLOTS = 1 << 20
"""Slots after which a block ends, at the next step's end."""

_KEYS = ("step", "request", "sequence", "position")
_UNSEEN = (SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT)


@dataclass(frozen=True, kw_only=True)
class RoutingBlock:
    """Whole steps of one stack and rank; one row per token, in order of execution.

    All arrays are writable, C-contiguous and the caller's own.

    Attributes:
        stack: The stack.
        rank: Rank per token, int16.
        step: Step per token, int32.
        request: Request per token, int32.
        sequence: Beam or sample per token, int16.
        position: Position per token, int32.
        phase: Index into `schema.TOKEN_PHASES` per token, uint8.
        expert: Ids per token and slot, int16 or int32.
        status: `SlotStatus` per token and slot, uint8.
        weight: Weights per token and slot, float32; None where not asked for.
    """

    stack: str
    rank: Array
    step: Array
    request: Array
    sequence: Array
    position: Array
    phase: Array
    expert: Array
    status: Array
    weight: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The tokens that reached one MoE site in one forward pass.

    Attributes:
        rank: Rank.
        step: Step.
        stack: Stack.
        site: Site id.
        layer: Model layer inside the stack.
        phase: Phase of the step: encode, prefill, decode or mixed.
        experts: Ids per token and slot, int32; -1 in slots that were not routed.
        requests: Request per token, int32.
        token_phases: Index into `schema.TOKEN_PHASES` per token, uint8.
        positions: Position per token, int32.
        weights: Weights per token and slot, float32; None where not asked for.
    """

    rank: int
    step: int
    stack: str
    site: int
    layer: int
    phase: str
    experts: Array
    requests: Array
    token_phases: Array
    positions: Array
    weights: Array | None = None


def stream_blocks(
    store: Store,
    committed: Sequence[Part],
    *,
    rank: int,
    stack: str,
    num_slots: int,
    weights: bool = False,
    phase: str | None = None,
) -> Iterator[RoutingBlock]:
    """Yields the routing of one stack and rank.

    Args:
        store: Where the trace lies.
        committed: Routing parts of that stack and rank.
        rank: The rank.
        stack: The stack.
        num_slots: Routing slots of the stack.
        weights: Read the weights too.
        phase: Only tokens of this phase.

    Raises:
        TraceError: A part is missing, damaged or out of order, or holds no weights.
    """
    limit = max(1, BLOCK_SLOTS // max(num_slots, 1))
    ready: list[Rows] = []
    open_step: list[Rows] = []
    num_ready = 0
    for rows in _chunks(store, committed, num_slots=num_slots, weights=weights, phase=phase):
        step = rows["step"]
        cut = int(np.searchsorted(step, step[-1]))
        if cut or (open_step and open_step[-1]["step"][-1] != step[0]):
            ready += open_step
            num_ready += sum(len(each["step"]) for each in open_step)
            open_step = []
        if cut:
            ready.append({name: values[:cut] for name, values in rows.items()})
            num_ready += cut
        open_step.append({name: values[cut:] for name, values in rows.items()})
        if num_ready >= limit:
            yield _block(ready, rank, stack)
            ready, num_ready = [], 0
    if ready or open_step:
        yield _block(ready + open_step, rank, stack)


def block_dispatches(
    block: RoutingBlock, sites: Sequence[spec.Site]
) -> Iterator[tuple[tuple[int, int, int], Dispatch]]:
    """Yields the dispatches of a block in order of execution, each with its sort key.

    Tokens that a site did not see are left out, and so are dispatches without tokens.

    Args:
        block: Whole steps.
        sites: The sites wanted, in order of execution.
    """
    starts = np.flatnonzero(np.diff(block.step, prepend=-1))
    ends = np.append(starts[1:], len(block.step))
    lowest = np.minimum.reduceat(block.phase, starts)
    highest = np.maximum.reduceat(block.phase, starts)
    phases = [
        spec.TOKEN_PHASES[low] if low == high else "mixed"
        for low, high in zip(lowest.tolist(), highest.tolist(), strict=True)
    ]
    steps = block.step[starts].tolist()
    rank = int(block.rank[0])
    views = [_site_view(block, site, starts, ends) for site in sites]
    for index, step in enumerate(steps):
        for site, view in zip(sites, views, strict=True):
            start, end = view.starts[index], view.ends[index]
            if start == end:
                continue
            rows = slice(start, end)
            yield (
                (step, site.first_slot, rank),
                Dispatch(
                    rank=rank,
                    step=step,
                    stack=block.stack,
                    site=site.site,
                    layer=site.layer,
                    phase=phases[index],
                    experts=view.expert[rows],
                    requests=view.request[rows],
                    token_phases=view.phase[rows],
                    positions=view.position[rows],
                    weights=None if view.weight is None else view.weight[rows],
                ),
            )


def merged(streams: Sequence[Iterator[tuple[tuple[int, int, int], Dispatch]]]) -> Iterator[Dispatch]:
    """Yields the dispatches of several streams by step, then site, then rank."""
    if len(streams) == 1:
        return (dispatch for _, dispatch in streams[0])
    return (dispatch for _, dispatch in heapq.merge(*streams, key=lambda pair: pair[0]))


def fixed_lists(column: pa.ChunkedArray, num_slots: int) -> Array:
    """Returns a per-slot column as an array [rows, num_slots]; may share Arrow's memory.

    Takes fixed-size lists and plain lists of one length, as other writers make them.

    Raises:
        TraceError: A row is null or has another number of slots.
    """
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = flat[0] if len(flat) == 1 else np.concatenate([np.zeros(0, np.int16), *flat])
    if len(values) != len(column) * num_slots:
        raise TraceError(
            f"routing rows hold {len(values)} slots where {len(column)} x {num_slots} are due",
            hint="trace.json and the routing parts do not belong together",
        )
    return values.reshape(len(column), num_slots)


def phase_codes(column: pa.ChunkedArray) -> Array:
    """Returns a column of token phases as indices into `schema.TOKEN_PHASES`."""
    codes = []
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        unknown = set(names) - set(spec.TOKEN_PHASES)
        if unknown:
            raise TraceError(f"unknown token phase {sorted(map(str, unknown))[0]!r} in routing")
        table = np.array([spec.TOKEN_PHASES.index(name) for name in names], dtype=np.uint8)
        codes.append(table[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate([np.zeros(0, np.uint8), *codes])


Rows = dict[str, Array]


def _chunks(
    store: Store, committed: Sequence[Part], *, num_slots: int, weights: bool, phase: str | None
) -> Iterator[Rows]:
    """Yields the tokens of one row group at a time, in order of execution."""
    for cluster in commits.clusters(committed):
        if len(cluster) == 1:
            for rows in _part_chunks(store, cluster[0], num_slots, weights, phase):
                if (np.diff(rows["step"]) < 0).any():
                    raise TraceError(
                        f"{store.path}: {cluster[0].path} is not in order of execution",
                        hint="sort its rows by step and row",
                    )
                yield rows
            continue
        pieces = [
            rows
            for part in cluster
            for rows in _part_chunks(store, part, num_slots, weights, phase, with_row=True)
        ]
        if pieces:
            joined = _joined(pieces)
            order = np.lexsort((joined.pop("row"), joined["step"]))
            yield {name: values[order] for name, values in joined.items()}


def _part_chunks(
    store: Store,
    part: Part,
    num_slots: int,
    weights: bool,
    phase: str | None,
    with_row: bool = False,
) -> Iterator[Rows]:
    with parts.OpenPart(store, part) as opened:
        if weights and "weight" not in opened.names:
            raise TraceError(
                f"{store.path}: {part.table} holds no weights", hint="record it with weights"
            )
        keys = [*_KEYS, *(["row"] if with_row else [])]
        for group in range(opened.num_groups):
            if phase is not None and not _may_hold(opened.bounds(group, "phase"), phase):
                continue
            routed_only = opened.bounds(group, "status") == (0, 0)
            columns = [*keys, "phase", "expert"]
            columns += [] if routed_only else ["status"]
            columns += ["weight"] if weights else []
            table = opened.read(group, columns)
            rows = {name: _numbers(table.column(name)) for name in keys}
            rows["phase"] = phase_codes(table.column("phase"))
            rows["expert"] = fixed_lists(table.column("expert"), num_slots)
            if routed_only:
                rows["status"] = np.zeros((table.num_rows, num_slots), np.uint8)
            else:
                rows["status"] = fixed_lists(table.column("status"), num_slots)
            if weights:
                rows["weight"] = fixed_lists(table.column("weight"), num_slots)
            if phase is not None:
                keep = rows["phase"] == spec.TOKEN_PHASES.index(phase)
                if not keep.all():
                    rows = {name: values[keep] for name, values in rows.items()}
            if len(rows["step"]):
                yield rows


def _may_hold(bounds: tuple[Any, Any], value: str) -> bool:
    smallest, largest = bounds
    return smallest is None or bool(smallest <= value <= largest)


def _numbers(column: pa.ChunkedArray) -> Array:
    values: Array = column.to_numpy()
    return values


def _joined(pieces: Sequence[Rows]) -> Rows:
    return {name: np.concatenate([rows[name] for rows in pieces]) for name in pieces[0]}


def _block(pieces: Sequence[Rows], rank: int, stack: str) -> RoutingBlock:
    rows = _joined(pieces)
    weight = rows.pop("weight", None)
    return RoutingBlock(
        stack=stack,
        rank=np.full(len(rows["step"]), rank, np.int16),
        weight=None if weight is None else weight.astype(np.float32, copy=False),
        **rows,
    )


@dataclass(frozen=True)
class _SiteView:
    """The tokens one site saw in a block, contiguous, and where each step starts and ends."""

    starts: list[int]
    ends: list[int]
    expert: Array
    request: Array
    phase: Array
    position: Array
    weight: Array | None


def _site_view(block: RoutingBlock, site: spec.Site, starts: Array, ends: Array) -> _SiteView:
    slots = slice(site.first_slot, site.first_slot + site.top_k)
    status = block.status[:, slots]
    expert = block.expert[:, slots].astype(np.int32)
    weight = None if block.weight is None else np.ascontiguousarray(block.weight[:, slots])
    request, phase, position = block.request, block.phase, block.position
    if status.any():
        expert[status != SlotStatus.ROUTED] = spec.NO_EXPERT
        seen = ~np.isin(status, _UNSEEN).all(axis=1)
        if not seen.all():
            before = np.concatenate([[0], np.cumsum(seen)])
            starts, ends = before[starts], before[ends]
            expert, request, phase = expert[seen], request[seen], phase[seen]
            position = position[seen]
            weight = None if weight is None else weight[seen]
    return _SiteView(
        starts.tolist(), ends.tolist(), expert, request, phase, position, weight
    )
