"""What a cache sees: the lookups of its dispatches, in order of execution.

A cache belongs to one device and holds experts of one site (scope ``layer``), one stack or the
whole model (``global``). Ranks of one expert-parallel group share devices, so their dispatches of
one step and site are merged; every other rank is a replica with caches of its own. Leaves out what
caches do with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import TraceError, UsageError
from moeprof.replay.compiled import compiled, filled_int32, filled_int64
from moeprof.replay.tokens import RANK_SHIFT, Requests, load_requests
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

SCOPES = ("layer", "stack", "global")
Placement = Mapping[int, Sequence[int]] | Sequence[int]

_UNSEEN = (schema.SlotStatus.PRUNED_LAST_LAYER, schema.SlotStatus.EARLY_EXIT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """The lookups of one cache.

    A lookup is one distinct expert of one dispatch; a want is one request's part in a lookup.

    Attributes:
        replica: Which expert-parallel group (or rank) the cache serves.
        device: Device within the replica.
        stack: The stack; empty for scope ``global``.
        site: The site; -1 unless the scope is ``layer``.
        key_site: [keys] site id.
        key_expert: [keys] expert id; keys ascend by site and expert.
        key_bytes: [keys] bytes of the expert.
        offset: [dispatches + 1] first lookup of each dispatch.
        key: [lookups] by first row within the dispatch, or by key under ``sequential``.
        last: [lookups] indices of lookups, within each dispatch in the order of their last rows.
        phase: [dispatches] index into `schema.PHASES`.
        rank: [dispatches] lowest rank that took part.
        step: [dispatches].
        dispatch_site: [dispatches] site id.
        num_wanting: [lookups] distinct requests that wanted it.
        want_lookup: [wants] index of the lookup, ascending by dispatch.
        want_request: [wants] index of the request.
    """

    replica: int
    device: int
    stack: str
    site: int
    key_site: Int32s
    key_expert: Int32s
    key_bytes: Int64s
    offset: Int64s
    key: Int32s
    last: Int32s
    phase: Bytes
    rank: Int32s
    step: Int32s
    dispatch_site: Int32s
    num_wanting: Int32s
    want_lookup: Int32s
    want_request: Int32s

    @property
    def num_keys(self) -> int:
        """Experts that this cache may hold."""
        return len(self.key_site)

    @property
    def num_lookups(self) -> int:
        """Lookups of all dispatches."""
        return len(self.key)

    @property
    def num_dispatches(self) -> int:
        """Dispatches with at least one expert of this cache."""
        return len(self.phase)

    @property
    def all_bytes(self) -> int:
        """Bytes of all experts that this cache may hold."""
        return int(self.key_bytes.sum())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest expert."""
        return int(self.key_bytes.max(initial=1))

    def lookup_dispatch(self) -> Int32s:
        """Returns [lookups] the index of each lookup's dispatch."""
        dispatch: Int32s = np.repeat(
            np.arange(self.num_dispatches, dtype=np.int32), np.diff(self.offset)
        )
        return dispatch

    def lookup_phase(self) -> Bytes:
        """Returns [lookups] the phase of each lookup's dispatch."""
        phase: Bytes = np.repeat(self.phase, np.diff(self.offset))
        return phase

    def by_key(self) -> Stream:
        """Returns the same with the lookups of each dispatch in order of increasing key."""
        dispatch = self.lookup_dispatch()
        order = np.lexsort((self.key, dispatch)).astype(np.int32)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return replace(
            self,
            key=self.key[order],
            last=np.arange(len(order), dtype=np.int32),
            num_wanting=self.num_wanting[order],
            want_lookup=place[self.want_lookup],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _StackRows:
    """Token rows of one stack and replica: by step, then rank, then as recorded."""

    stack: str
    sites: tuple[schema.Site, ...]
    dispatch: Int32s
    request: Int32s
    expert: NDArray[Any]
    step: Int64s
    rank: Int32s
    phase: Bytes
    num_requests: int
    max_causes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The routing of a trace, from which streams are made; see `read_rows`.

    Attributes:
        sites: All sites by id.
        requests: The requests of the trace.
        num_replicas: Expert-parallel groups.
        stacks: Token rows by replica and stack.
    """

    sites: tuple[schema.Site, ...]
    requests: Requests
    num_replicas: int
    stacks: tuple[tuple[_StackRows, ...], ...]


def read_rows(trace: Trace) -> Rows:
    """Reads the routing of a trace.

    Raises:
        TraceError: Ranks of an expert-parallel group are missing.
    """
    requests = load_requests(trace)
    groups = rank_groups(trace)
    stacks = [
        tuple(
            rows
            for stack in trace.stacks
            if (rows := _read_stack(trace, stack, group, requests)) is not None
        )
        for group in groups
    ]
    return Rows(
        sites=trace.sites, requests=requests, num_replicas=len(groups), stacks=tuple(stacks)
    )


def rank_groups(trace: Trace) -> tuple[tuple[int, ...], ...]:
    """Returns the ranks of each expert-parallel group; a rank by itself is a group of one.

    Raises:
        TraceError: A group lacks ranks.
    """
    by_rank = {each.rank: each for each in trace.info.ranks}
    groups: dict[tuple[int, ...], list[int]] = {}
    seen: dict[tuple[int, int], int] = {}
    parallel = any(each.expert_parallel for each in trace.info.ranks)
    for rank in sorted(trace.ranks):
        info = by_rank.get(rank, schema.RankInfo(rank=rank))
        if not parallel:
            groups[rank,] = [rank]
            continue
        place = (info.pipeline_parallel, info.expert_parallel)
        number = seen.get(place, 0)
        seen[place] = number + 1
        groups.setdefault((info.pipeline_parallel, number), []).append(rank)
    if parallel and trace.info.missing_ranks:
        missing = ", ".join(map(str, trace.info.missing_ranks))
        raise TraceError(
            f"ranks {missing} of an expert-parallel run are missing: its dispatches are not whole",
            hint="copy the parts of all ranks into the trace",
        )
    return tuple(tuple(ranks) for ranks in groups.values())


def streams(
    rows: Rows,
    *,
    scope: str,
    devices: int = 1,
    placement: Placement | None = None,
    by_key: bool = False,
) -> Iterator[Stream]:
    """Yields the lookups of every cache that has any, by replica, site or stack, and device.

    Args:
        rows: From `read_rows`.
        scope: One of `SCOPES`.
        devices: Devices per replica.
        placement: Device of each expert: one sequence for all sites, or one per site id. None
            places experts contiguously.
        by_key: Order lookups within a dispatch by key, as ``sequential`` runs them.
    """
    device_of = {site.site: device_of_expert(site, devices, placement) for site in rows.sites}
    for replica, stacks in enumerate(rows.stacks):
        parts = [
            (group.stack, site, _site_lookups(group, index))
            for group in stacks
            for index, site in enumerate(group.sites)
        ]
        for scoped in _scoped(parts, scope):
            for device in range(devices):
                stream = _join(scoped, device_of, replica=replica, device=device, scope=scope)
                if stream.num_lookups:
                    yield stream.by_key() if by_key else stream


def device_of_expert(site: schema.Site, devices: int, placement: Placement | None) -> Int32s:
    """Returns [experts] the device of each expert of a site.

    Raises:
        UsageError: The placement does not fit.
    """
    if placement is None:
        return (np.arange(site.num_experts) * devices // site.num_experts).astype(np.int32)
    own = placement.get(site.site) if isinstance(placement, Mapping) else placement
    if own is None:
        raise UsageError(f"the placement says nothing about site {site.site}")
    found = np.asarray(own, dtype=np.int32)
    if found.shape != (site.num_experts,):
        raise UsageError(
            f"the placement has {found.size} entries where site {site.site} has "
            f"{site.num_experts} experts",
            hint="give the device of each expert: one sequence, or one per site id",
        )
    if found.min() < 0 or found.max() >= devices:
        raise UsageError(
            f"the placement names device {int(found.max())} of {devices}",
            hint="devices count from 0",
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _SiteLookups:
    """The lookups of one site; arrays as in `Stream`, experts instead of keys."""

    site: schema.Site
    rows: _StackRows
    dispatch: Int32s
    offset: Int64s
    expert: Int32s
    last: Int32s
    num_wanting: Int32s
    want_lookup: Int32s
    want_request: Int32s


def _scoped(
    parts: Sequence[tuple[str, schema.Site, Any]], scope: str
) -> Iterator[list[_SiteLookups]]:
    if scope == "layer":
        for _, _, lookups in parts:
            yield [lookups()]
    elif scope == "stack":
        for stack in dict.fromkeys(stack for stack, _, _ in parts):
            yield [lookups() for own, _, lookups in parts if own == stack]
    elif parts:
        yield [lookups() for _, _, lookups in parts]


def _site_lookups(rows: _StackRows, index: int) -> Any:
    """Returns a function that gathers the lookups of one site, so that few are held at a time."""

    def gathered() -> _SiteLookups:
        site = rows.sites[index]
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        expert = np.ascontiguousarray(rows.expert[:, slots], dtype=np.int32)
        num_passes = len(rows.step)
        num_decisions = expert.size
        lookups_of_pass = np.zeros(num_passes, np.int64)
        arrays = [np.empty(num_decisions, np.int32) for _ in range(5)]
        num_lookups, num_wants = _gather(
            rows.dispatch,
            rows.request,
            expert,
            site.num_experts,
            rows.num_requests,
            rows.max_causes,
            lookups_of_pass,
            *arrays,
        )
        seen = np.flatnonzero(lookups_of_pass)
        found, last, wanting, want_lookup, want_request = arrays
        return _SiteLookups(
            site=site,
            rows=rows,
            dispatch=seen.astype(np.int32),
            offset=np.concatenate([[0], np.cumsum(lookups_of_pass[seen])]),
            expert=found[:num_lookups].copy(),
            last=last[:num_lookups].copy(),
            num_wanting=wanting[:num_lookups].copy(),
            want_lookup=want_lookup[:num_wants].copy(),
            want_request=want_request[:num_wants].copy(),
        )

    return gathered


def _join(
    parts: Sequence[_SiteLookups],
    device_of: Mapping[int, Int32s],
    *,
    replica: int,
    device: int,
    scope: str,
) -> Stream:
    """Returns the lookups of several sites that fall on one device, in order of execution."""
    ordered = sorted(range(len(parts)), key=lambda index: parts[index].site.site)
    first_key: dict[int, int] = {}
    key_site, key_expert, key_bytes = [], [], []
    num_keys = 0
    key_of: dict[int, Int32s] = {}
    for index in ordered:
        site = parts[index].site
        own = np.flatnonzero(device_of[site.site] == device).astype(np.int32)
        first_key[site.site] = num_keys
        table = np.full(site.num_experts, -1, np.int32)
        table[own] = num_keys + np.arange(len(own), dtype=np.int32)
        key_of[site.site] = table
        num_keys += len(own)
        key_site.append(np.full(len(own), site.site, np.int32))
        key_expert.append(own)
        key_bytes.append(np.full(len(own), site.expert_bytes, np.int64))
    pieces = [_on_device(part, key_of[part.site.site]) for part in parts]
    step = np.concatenate([part.rows.step[piece.dispatch] for part, piece in _both(parts, pieces)])
    rank = np.concatenate([part.rows.rank[piece.dispatch] for part, piece in _both(parts, pieces)])
    phase = np.concatenate(
        [part.rows.phase[piece.dispatch] for part, piece in _both(parts, pieces)]
    )
    of_site = np.concatenate(
        [
            np.full(len(piece.dispatch), part.site.site, np.int32)
            for part, piece in _both(parts, pieces)
        ]
    )
    number = np.concatenate(
        [np.full(len(piece.dispatch), index, np.int32) for index, piece in enumerate(pieces)]
    )
    length = np.concatenate([np.diff(piece.offset) for piece in pieces])
    first = np.cumsum(length) - length
    key = np.concatenate([piece.expert for piece in pieces])
    shifts = np.cumsum([0, *(len(piece.expert) for piece in pieces)])[:-1]
    last, want_lookup = (
        np.concatenate(
            [getattr(piece, name) + shift for piece, shift in zip(pieces, shifts, strict=True)]
        ).astype(np.int32)
        for name in ("last", "want_lookup")
    )
    num_wanting = np.concatenate([piece.num_wanting for piece in pieces])
    want_request = np.concatenate([piece.want_request for piece in pieces])
    if len(parts) > 1:
        order = np.lexsort((number, step))
        lookup_order = _ranges(first[order], length[order])
        place = np.empty(len(key), np.int32)
        place[lookup_order] = np.arange(len(key), dtype=np.int32)
        key, num_wanting = key[lookup_order], num_wanting[lookup_order]
        last = place[last[lookup_order]]
        want_lookup = place[want_lookup]
        by_dispatch = np.argsort(want_lookup, kind="stable")
        want_lookup, want_request = want_lookup[by_dispatch], want_request[by_dispatch]
        step, rank, phase, of_site = step[order], rank[order], phase[order], of_site[order]
        length = length[order]
    only = parts[0].site
    return Stream(
        replica=replica,
        device=device,
        stack=only.stack if scope != "global" else "",
        site=only.site if scope == "layer" else -1,
        key_site=np.concatenate(key_site),
        key_expert=np.concatenate(key_expert),
        key_bytes=np.concatenate(key_bytes),
        offset=np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
        key=key,
        last=last,
        phase=phase,
        rank=rank,
        step=step.astype(np.int32),
        dispatch_site=of_site,
        num_wanting=num_wanting,
        want_lookup=want_lookup,
        want_request=want_request,
    )


def _both(
    parts: Sequence[_SiteLookups], pieces: Sequence[_SiteLookups]
) -> Iterator[tuple[_SiteLookups, _SiteLookups]]:
    return zip(parts, pieces, strict=True)


def _on_device(part: _SiteLookups, key_of: Int32s) -> _SiteLookups:
    """Returns the lookups whose experts have a key, keys in place of experts."""
    key = key_of[part.expert]
    keep = key >= 0
    if keep.all():
        return replace(part, expert=key)
    place = np.cumsum(keep, dtype=np.int32) - 1
    counts = np.add.reduceat(keep, part.offset[:-1]) if len(key) else np.zeros(0, np.int64)
    wanted = keep[part.want_lookup]
    return replace(
        part,
        dispatch=part.dispatch[counts > 0],
        offset=np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int64),
        expert=key[keep],
        last=place[part.last[keep[part.last]]].astype(np.int32),
        num_wanting=part.num_wanting[keep],
        want_lookup=place[part.want_lookup[wanted]].astype(np.int32),
        want_request=part.want_request[wanted],
    )


def _ranges(first: Int64s, length: Int64s) -> Int64s:
    """Returns the concatenation of ``range(first, first + length)``."""
    ends = np.cumsum(length)
    index: Int64s = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
        first - (ends - length), length
    )
    return index


def _read_stack(
    trace: Trace, stack: str, ranks: Sequence[int], requests: Requests
) -> _StackRows | None:
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("rank", "step", "request", "phase", "expert")
    }
    for block in trace.blocks(stack):
        if int(block.rank[0]) not in ranks:
            continue
        expert = block.expert
        if block.status.any():
            expert[block.status != schema.SlotStatus.ROUTED] = schema.NO_EXPERT
        columns["expert"].append(expert)
        columns["rank"].append(block.rank)
        columns["step"].append(block.step)
        columns["request"].append(block.request)
        columns["phase"].append(block.phase)
    if not columns["step"]:
        return None
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    step, rank = joined["step"].astype(np.int64), joined["rank"].astype(np.int32)
    expert = joined["expert"]
    if len(ranks) > 1:
        order = np.lexsort((rank, step))
        step, rank, expert = step[order], rank[order], expert[order]
        joined["request"], joined["phase"] = joined["request"][order], joined["phase"][order]
    starts = np.flatnonzero(np.diff(step, prepend=-1))
    dispatch = np.repeat(
        np.arange(len(starts), dtype=np.int32), np.diff(np.append(starts, len(step)))
    )
    wanted = (rank.astype(np.int64) << RANK_SHIFT) | joined["request"]
    request = np.searchsorted(requests.key, wanted).astype(np.int32)
    known = np.append(requests.key, -1)[request] == wanted
    if not known.all():
        raise TraceError(
            f"request {int(joined['request'][~known][0])} is routed but not in the table requests",
            hint="moeprof check says what else is wrong",
        )
    lowest = np.minimum.reduceat(joined["phase"], starts)
    highest = np.maximum.reduceat(joined["phase"], starts)
    mixed = np.uint8(schema.PHASES.index("mixed"))
    phase = np.where(lowest == highest, lowest, mixed).astype(np.uint8)
    return _StackRows(
        stack=stack,
        sites=trace.info.sites_of(stack),
        dispatch=dispatch,
        request=request,
        expert=expert,
        step=step[starts],
        rank=np.minimum.reduceat(rank, starts),
        phase=phase,
        num_requests=len(requests),
        max_causes=_max_causes(dispatch, request, len(requests)),
    )


@compiled("int64(int32[::1], int32[::1], int64)")
def _max_causes(dispatch: Int32s, request: Int32s, num_requests: int) -> int:
    """Returns the most distinct requests that one dispatch has."""
    newest = filled_int32(num_requests, -1)
    most = 0
    here = 0
    current = -1
    for row in range(len(dispatch)):
        if dispatch[row] != current:
            current = dispatch[row]
            here = 0
        if newest[request[row]] != current:
            newest[request[row]] = current
            here += 1
            if here > most:  # noqa: PLR1730
                most = here
    return most


@compiled(
    "UniTuple(int64, 2)(int32[::1], int32[::1], int32[:, ::1], int64, int64, int64, int64[::1],"
    " int32[::1], int32[::1], int32[::1], int32[::1], int32[::1])"
)
def _gather(  # noqa: PLR0917
    dispatch: Int32s,
    request: Int32s,
    expert: Int32s,
    num_experts: int,
    num_requests: int,
    max_causes: int,
    lookups_of_pass: Int64s,
    lookup_expert: Int32s,
    lookup_last: Int32s,
    lookup_wanting: Int32s,
    want_lookup: Int32s,
    want_request: Int32s,
) -> tuple[int, int]:
    """Gathers lookups and wants; rows sorted by dispatch, in recorded order within it."""
    local = filled_int32(num_requests, -1)
    local_of = filled_int32(num_requests, -1)
    asked = filled_int32(num_experts * max_causes, -1)
    last_row = np.empty(num_experts, np.int64)
    index_of = filled_int64(num_experts, -1)
    num_lookups = 0
    num_wants = 0
    num_rows = len(dispatch)
    top_k = expert.shape[1]
    row = 0
    while row < num_rows:
        current = dispatch[row]
        first_row = row
        first = num_lookups
        num_local = 0
        while row < num_rows and dispatch[row] == current:
            who = request[row]
            if local[who] != current:
                local[who] = current
                local_of[who] = num_local
                num_local += 1
            mine = local_of[who]
            for slot in range(top_k):
                chosen = expert[row, slot]
                if chosen < 0:
                    continue
                lookup = index_of[chosen]
                if lookup < first:
                    lookup = num_lookups
                    index_of[chosen] = lookup
                    lookup_expert[lookup] = chosen
                    lookup_wanting[lookup] = 0
                    num_lookups += 1
                place = mine * num_experts + chosen
                if asked[place] != current:
                    asked[place] = current
                    lookup_wanting[lookup] += 1
                    want_lookup[num_wants] = lookup
                    want_request[num_wants] = who
                    num_wants += 1
            row += 1
        lookups_of_pass[current] = num_lookups - first
        # Backwards over the rows: the first sight of an expert is its last row.
        if row - first_row == 1:
            for lookup in range(first, num_lookups):
                lookup_last[lookup] = lookup
            continue
        for lookup in range(first, num_lookups):
            last_row[lookup_expert[lookup]] = -1
        place_last = num_lookups - 1
        back = row - 1
        while place_last >= first:
            for slot in range(top_k - 1, -1, -1):
                chosen = expert[back, slot]
                if chosen >= 0 and last_row[chosen] == -1:
                    last_row[chosen] = back
                    lookup_last[place_last] = index_of[chosen]
                    place_last -= 1
            back -= 1
    return num_lookups, num_wants
