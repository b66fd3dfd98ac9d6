"""Streams routing as NumPy blocks and as dispatches, in bounded memory.

A block never splits a step. Leaves out pandas views (`reader`).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from moeprof.errors import TraceError
from moeprof.trace import commits, parts
from moeprof.trace import schema as spec
from moeprof.trace.commits import Part
from moeprof.trace.schema import SlotStatus
from moeprof.trace.storage import Store

Array = np.ndarray[Any, Any]
Rows = dict[str, Array]
SortKey = tuple[int, int, int]

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
    for rows in stream_rows(store, committed, num_slots=num_slots, weights=weights, phase=phase):
        yield RoutingBlock(stack=stack, rank=np.full(len(rows["step"]), rank, np.int16), **rows)


def stream_rows(
    store: Store,
    committed: Sequence[Part],
    *,
    num_slots: int,
    weights: bool = False,
    phase: str | None = None,
    extra: Sequence[str] = (),
) -> Iterator[Rows]:
    """Yields the columns of whole steps of one stack and rank, in order of execution.

    Args:
        store: Where the trace lies.
        committed: Routing parts of that stack and rank.
        num_slots: Routing slots of the stack.
        weights: Read the weights too.
        phase: Only tokens of this phase.
        extra: Columns wanted beside those of `RoutingBlock`: ``row``, ``parent_sequence``,
            ``accepted``.

    Raises:
        TraceError: A part is missing, damaged or out of order, or holds no weights.
    """
    wanted = _Wanted(num_slots, weights, phase, tuple(extra))
    limit = max(1, BLOCK_SLOTS // max(num_slots, 1))
    ready: list[Rows] = []
    open_step: list[Rows] = []
    num_ready = 0
    for rows in _chunks(store, committed, wanted):
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
            yield _joined(ready)
            ready, num_ready = [], 0
    if ready or open_step:
        yield _joined(ready + open_step)


def block_dispatches(
    block: RoutingBlock, sites: Sequence[spec.Site]
) -> Iterator[tuple[SortKey, Dispatch]]:
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


def merged(streams: Sequence[Iterator[tuple[SortKey, Dispatch]]]) -> Iterator[Dispatch]:
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


@dataclass(frozen=True)
class _Wanted:
    """What is read of each row."""

    num_slots: int
    weights: bool
    phase: str | None
    extra: tuple[str, ...]


def _chunks(store: Store, committed: Sequence[Part], wanted: _Wanted) -> Iterator[Rows]:
    """Yields the tokens of one row group at a time, in order of execution."""
    for cluster in commits.clusters(committed):
        if len(cluster) == 1:
            for rows in _part_chunks(store, cluster[0], wanted):
                if (np.diff(rows["step"]) < 0).any():
                    raise TraceError(
                        f"{store.path}: {cluster[0].path} is not in order of execution",
                        hint="sort its rows by step and row",
                    )
                yield rows
        else:
            yield from _sorted_cluster(store, cluster, wanted)


def _sorted_cluster(store: Store, cluster: Sequence[Part], wanted: _Wanted) -> Iterator[Rows]:
    """Yields the tokens of parts whose steps overlap, sorted together."""
    extra = (*wanted.extra, *(() if "row" in wanted.extra else ("row",)))
    with_row = dataclasses.replace(wanted, extra=extra)
    pieces = [rows for part in cluster for rows in _part_chunks(store, part, with_row)]
    if pieces:
        joined = _joined(pieces)
        order = np.lexsort((joined["row"], joined["step"]))
        if "row" not in wanted.extra:
            del joined["row"]
        yield {name: values[order] for name, values in joined.items()}


def _part_chunks(store: Store, part: Part, wanted: _Wanted) -> Iterator[Rows]:
    with parts.OpenPart(store, part) as opened:
        if wanted.weights and "weight" not in opened.names:
            raise TraceError(
                f"{store.path}: {part.table} holds no weights", hint="record it with weights"
            )
        for group in range(opened.num_groups):
            if wanted.phase is None or _may_hold(opened.bounds(group, "phase"), wanted.phase):
                rows = _group_rows(opened, group, wanted)
                if len(rows["step"]):
                    yield rows


def _group_rows(opened: parts.OpenPart, group: int, wanted: _Wanted) -> Rows:
    """Returns the wanted tokens of one row group."""
    routed_only = opened.bounds(group, "status") == (0, 0)
    lists = ["expert", *([] if routed_only else ["status"])]
    lists += ["weight"] if wanted.weights else []
    keys = (*_KEYS, *wanted.extra)
    table = opened.read(group, [*keys, "phase", *lists])
    rows = {name: _key(table.column(name)) for name in keys}
    rows["phase"] = phase_codes(table.column("phase"))
    for name in lists:
        rows[name] = fixed_lists(table.column(name), wanted.num_slots)
    if routed_only:
        rows["status"] = np.zeros((table.num_rows, wanted.num_slots), np.uint8)
    if wanted.weights:
        rows["weight"] = rows["weight"].astype(np.float32, copy=False)
    if wanted.phase is not None:
        keep = rows["phase"] == spec.TOKEN_PHASES.index(wanted.phase)
        if not keep.all():
            rows = {name: values[keep] for name, values in rows.items()}
    return rows


def _key(column: pa.ChunkedArray) -> Array:
    """Returns a column of numbers; null flags count as true."""
    if pa.types.is_boolean(column.type):
        column = column.fill_null(True)
    values: Array = column.to_numpy()
    return values


def _may_hold(bounds: tuple[Any, Any], value: str) -> bool:
    smallest, largest = bounds
    return smallest is None or bool(smallest <= value <= largest)


def _joined(pieces: Sequence[Rows]) -> Rows:
    return {name: np.concatenate([rows[name] for rows in pieces]) for name in pieces[0]}


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
    return _SiteView(starts.tolist(), ends.tolist(), expert, request, phase, position, weight)
