"""What a live expert buffer would do in every step of a trace: lookups, copies, host rows.

The same state machines and slots as the live buffer (`moeprof.replay.cache.residency`), so that
copies, and what each of them has to wait for, follow exactly. Leaves out how long it takes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import TraceError, UsageError
from moeprof.replay.cache import reference, streams
from moeprof.replay.cache.decisions import CompiledResidency, make_residency
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.residency import CacheSpec, Fetched, MissRule, Planned, Residency
from moeprof.replay.cache.sizes import parse_capacity
from moeprof.replay.pipeline import NOTHING
from moeprof.replay.serving_settings import BufferingSetting

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Rows, Stream
    from moeprof.trace.reader import Trace
    from moeprof.trace.schema import Site

Int32s = NDArray[np.int32]
Bools = NDArray[np.uint8]

_STAGING = 2
_NOMINAL_BYTES = 1 << 20
_NOT_ALL_KEPT = ("min_bypass", "pinned", "layers")


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedRows:
    """The active experts of every dispatch of a stack, in order of execution.

    Attributes:
        sites: The stack's sites.
        steps: [steps] as in the trace.
        phases: Phase of each step.
        step_starts: [steps + 1] first dispatch of each step.
        site: [dispatches] index into ``sites``.
        num_tokens: [dispatches].
        top_k: [dispatches] slots per token.
        starts: [dispatches + 1] first lookup of each dispatch.
        expert: [lookups] ascending within a dispatch.
        rows: [lookups] rows of the expert.
    """

    sites: tuple[Site, ...]
    steps: Int32s
    phases: tuple[str, ...]
    step_starts: Int32s
    site: Int32s
    num_tokens: Int32s
    top_k: Int32s
    starts: Int32s
    expert: Int32s
    rows: Int32s

    @property
    def num_lookups(self) -> int:
        """Active experts of all dispatches."""
        return len(self.expert)

    def dispatch_of_lookup(self) -> Int32s:
        """Returns [lookups] the dispatch of each lookup."""
        count = np.arange(len(self.site), dtype=np.int32)
        return np.repeat(count, np.diff(self.starts))

    def per_step(self, per_lookup: NDArray[Any]) -> NDArray[Any]:
        """Returns [steps] sums of a value [lookups]."""
        total = np.concatenate([[0], np.cumsum(per_lookup)])
        found: NDArray[Any] = np.diff(total[self.starts[self.step_starts]])
        return found


def read_routed_rows(trace: Trace, stack: str, *, max_steps: int | None = None) -> RoutedRows:
    """Reads the routing of a stack.

    Args:
        trace: The trace.
        stack: Its stack.
        max_steps: At most so many steps.

    Raises:
        UsageError: There is no such stack.
        TraceError: It holds no routing, or that of several ranks.
    """
    if stack not in trace.stacks:
        raise UsageError(f"there is no stack {stack!r}", hint=f"one of {', '.join(trace.stacks)}")
    sites = tuple(trace.info.sites_of(stack))
    place = {site.site: index for index, site in enumerate(sites)}
    steps: list[int] = []
    phases: list[str] = []
    step_starts: list[int] = []
    site_of: list[int] = []
    tokens: list[int] = []
    slots: list[int] = []
    experts: list[NDArray[Any]] = []
    rows: list[NDArray[Any]] = []
    for dispatch in trace.dispatches(stack=stack):
        if dispatch.rank != 0:
            raise TraceError(
                f"{trace.path} holds several ranks; a prediction is for one device",
                hint="give the trace of one rank",
            )
        if not steps or dispatch.step != steps[-1]:
            if max_steps is not None and len(steps) == max_steps:
                break
            steps.append(dispatch.step)
            phases.append(dispatch.phase)
            step_starts.append(len(site_of))
        ids = dispatch.experts
        found, count = np.unique(ids[ids >= 0], return_counts=True)
        site_of.append(place[dispatch.site])
        tokens.append(ids.shape[0])
        slots.append(ids.shape[1])
        experts.append(found)
        rows.append(count)
    if not steps:
        raise TraceError(f"{trace.path} holds no routing of the stack {stack}")
    starts = np.concatenate([[0], np.cumsum([len(one) for one in experts])])
    return RoutedRows(
        sites=sites,
        steps=np.array(steps, np.int32),
        phases=tuple(phases),
        step_starts=np.array([*step_starts, len(site_of)], np.int32),
        site=np.array(site_of, np.int32),
        num_tokens=np.array(tokens, np.int32),
        top_k=np.array(slots, np.int32),
        starts=starts.astype(np.int32),
        expert=np.concatenate(experts).astype(np.int32),
        rows=np.concatenate(rows).astype(np.int32),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CopiesAhead:
    """What a buffer copies ahead of its lookup, and which lookups find that.

    Attributes:
        dispatch: [copies] dispatch after which it is asked for, ascending.
        after: [copies] place within that dispatch of the reader that it waits for, or `NOTHING`.
        used: [lookups] 1 where a miss finds its copy made or under way.
        awaits: [lookups] copy ahead, of the same step, that is read, or `NOTHING`.
    """

    dispatch: Int32s
    after: Int32s
    used: Bools
    awaits: Int32s

    @classmethod
    def none(cls, num_lookups: int) -> CopiesAhead:
        """Returns what a buffer has that copies nothing ahead."""
        return cls(
            dispatch=np.zeros(0, np.int32),
            after=np.zeros(0, np.int32),
            used=np.zeros(num_lookups, np.uint8),
            awaits=np.full(num_lookups, NOTHING, np.int32),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class BufferPlan:
    """What a buffer does with every lookup.

    Attributes:
        hit: [lookups] 1 where resident.
        loads: [lookups] 1 where the expert is copied.
        after: [lookups] place within the dispatch of the reader that the copy waits for.
        awaits: [lookups] lookup of the same step whose copy is read, or `NOTHING`.
        on_host: [lookups] 1 where the host computes.
        capacity: [sites] slots of the cache that serves the site.
        num_slots: Slots of all caches.
        num_staging: Slots beside them, those of what is copied ahead included.
        ahead: What is copied ahead of its lookup.
    """

    hit: Bools
    loads: Bools
    after: Int32s
    awaits: Int32s
    on_host: Bools
    capacity: Int32s
    num_slots: int
    num_staging: int
    ahead: CopiesAhead

    def copies_per_step(self, routed: RoutedRows) -> NDArray[np.int64]:
        """Returns [steps] the experts that are copied, ahead of their lookup or for it."""
        before = np.concatenate([[0], np.cumsum(self.loads, dtype=np.int64)])
        for_lookups = np.diff(before[routed.starts[routed.step_starts]])
        first = np.searchsorted(self.ahead.dispatch, routed.step_starts)
        found: NDArray[np.int64] = for_lookups + np.diff(first)
        return found


def plan_buffer(
    trace: Trace, routed: RoutedRows, setting: BufferingSetting, *, rows: Rows | None = None
) -> BufferPlan:
    """Returns what a buffer does on this trace.

    One lookup after the other through a state machine: a few hundred thousand a second.

    Args:
        trace: The trace.
        routed: Its routing, from `read_routed_rows`.
        setting: The buffer.
        rows: The trace's rows, from `moeprof.replay.cache.streams.read_rows`; read when None.

    Raises:
        UsageError: The trace ends before a policy that looks ahead, or capacities make no sense.
    """
    count = routed.num_lookups
    if setting.capacity is None:
        return BufferPlan(
            hit=np.ones(count, np.uint8),
            loads=np.zeros(count, np.uint8),
            after=np.full(count, NOTHING, np.int32),
            awaits=np.full(count, NOTHING, np.int32),
            on_host=np.zeros(count, np.uint8),
            capacity=np.array([site.num_experts for site in routed.sites], np.int32),
            num_slots=sum(site.num_experts for site in routed.sites),
            num_staging=0,
            ahead=CopiesAhead.none(count),
        )
    made = residency_of(trace, routed, setting, rows=rows)
    dispatches = list(_dispatches(made.residency, routed, setting))
    planned = [one for each in dispatches for one in each.planned]
    awaits, awaits_ahead = _awaits(dispatches, routed)
    fetched = [(index, one) for index, each in enumerate(dispatches) for one in each.fetched]
    return BufferPlan(
        hit=np.array([one.hit for one in planned], np.uint8),
        loads=np.array([one.loads for one in planned], np.uint8),
        after=np.array([one.after for one in planned], np.int32),
        awaits=awaits,
        on_host=np.array([one.on_host for one in planned], np.uint8),
        capacity=made.capacity,
        num_slots=made.num_slots,
        num_staging=made.num_staging,
        ahead=CopiesAhead(
            dispatch=np.array([dispatch for dispatch, _ in fetched], np.int32),
            after=np.array([one.after for _, one in fetched], np.int32),
            used=np.array([one.ahead for one in planned], np.uint8),
            awaits=awaits_ahead,
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class EmptyCaches:
    """The caches of a buffer before its first dispatch.

    Attributes:
        residency: Who is in which slot.
        capacity: [sites] slots of the cache that serves the site.
        num_slots: Slots of all caches.
        num_staging: Slots beside them, those of what is copied ahead included.
    """

    residency: Residency | CompiledResidency
    capacity: Int32s
    num_slots: int
    num_staging: int


def residency_of(
    trace: Trace, routed: RoutedRows, setting: BufferingSetting, *, rows: Rows | None = None
) -> EmptyCaches:
    """Returns the caches of a buffer; arguments as in `plan_buffer`, with a capacity."""
    caches = _caches(streams.read_rows(trace) if rows is None else rows, routed, setting)
    needs_staging = setting.policy in _NOT_ALL_KEPT or any(not one.capacity for one in caches)
    staging = _STAGING if needs_staging and setting.miss != "host" else 0
    staging += setting.prefetch
    slots = sum(cache.capacity for cache in caches)
    in_stack = [(site.site, site.num_experts) for site in routed.sites]
    capacity_of = {site: cache.capacity for cache in caches for site, _ in cache.sites}
    return EmptyCaches(
        residency=make_residency(
            caches,
            [slots + staging],
            full=setting.initial == "full",
            prefetch=setting.prefetch,
            foresight=Foresight([in_stack]) if setting.prefetch else None,
        ),
        capacity=np.array([capacity_of.get(site.site, 0) for site in routed.sites], np.int32),
        num_slots=slots,
        num_staging=staging,
    )


def planned_dispatches(
    residency: Residency | CompiledResidency, routed: RoutedRows, setting: BufferingSetting
) -> Iterator[list[Planned]]:
    """Yields what is done in each dispatch, one after the other; nothing is copied ahead."""
    rule = MissRule(action=setting.miss, host_rows=setting.host_rows)
    experts, rows = routed.expert.tolist(), routed.rows.tolist()
    bounds = routed.starts.tolist()
    for dispatch, index in enumerate(routed.site.tolist()):
        first, end = bounds[dispatch], bounds[dispatch + 1]
        site = routed.sites[index].site
        yield residency.plan(site, experts[first:end], rows[first:end], rule) if end > first else []


class _Dispatch(NamedTuple):
    """What is done in a dispatch.

    Attributes:
        planned: Its lookups.
        fetched: What is copied ahead after it.
    """

    planned: list[Planned]
    fetched: list[Fetched]


def _dispatches(
    residency: Residency | CompiledResidency, routed: RoutedRows, setting: BufferingSetting
) -> Iterator[_Dispatch]:
    """Yields what is done in each dispatch, copies ahead included."""
    every = planned_dispatches(residency, routed, setting)
    for planned, index in zip(every, routed.site.tolist(), strict=True):
        experts = [one.expert for one in planned]
        yield _Dispatch(planned, residency.fetch_ahead(routed.sites[index].site, experts))


def _caches(rows: Rows, routed: RoutedRows, setting: BufferingSetting) -> list[CacheSpec]:
    """Returns the caches of the stack, numbered as the replay numbers them."""
    asked = parse_capacity(setting.capacity)
    own = {site.site for site in routed.sites}
    found = []
    scoped = streams.streams(rows, scope=setting.scope, by_key=True)
    # A stack that is run alone is all there is on the device: its caches are those of the stack.
    everything = sum(site.num_experts for site in routed.sites)
    for number, stream in enumerate(scoped):
        sites, counts = np.unique(stream.key_site, return_counts=True)
        if not own.issuperset(sites.tolist()):
            if own.intersection(sites.tolist()):
                raise UsageError(
                    "one cache for all stacks cannot be predicted for one of them",
                    hint="scope='layer' or 'stack'",
                )
            continue
        if asked.slots is not None:
            capacity = asked.slots
        elif asked.share is not None:
            # In bytes of a nominal size, rounded as the live buffer rounds.
            total = int(asked.share * everything * _NOMINAL_BYTES)
            capacity = total * int(counts.sum()) // everything // _NOMINAL_BYTES
        else:
            raise UsageError(
                "a capacity in bytes depends on how experts are run", hint="give slots or a share"
            )
        found.append(
            CacheSpec(
                sites=tuple(zip(sites.tolist(), counts.tolist(), strict=True)),
                capacity=capacity,
                pool=0,
                machine=functools.partial(_machine, stream, setting.policy, capacity, number),
            )
        )
    return found


def _machine(stream: Stream, policy: str, capacity: int, number: int) -> Any:
    return reference.machine_of(
        stream,
        policy,
        sizes=[1] * stream.num_keys,
        capacity=capacity,
        semantics="sequential",
        cache=number,
    )


def _awaits(dispatches: Sequence[_Dispatch], routed: RoutedRows) -> tuple[Int32s, Int32s]:
    """Returns [lookups] the copy of the same step that is read, or `NOTHING`.

    Of copies for a lookup that lookup, then of copies ahead their number.
    """
    count = routed.num_lookups
    of_lookup, of_ahead = np.full(count, NOTHING, np.int32), np.full(count, NOTHING, np.int32)
    starts = routed.starts.tolist()
    experts = routed.expert.tolist()
    sites = routed.site.tolist()
    index_of = {site.site: index for index, site in enumerate(routed.sites)}
    number = 0
    for first, end in zip(routed.step_starts[:-1], routed.step_starts[1:], strict=True):
        # The last copy of an expert: for a lookup, or ahead.
        copied: dict[tuple[int, int], tuple[int, int]] = defaultdict(lambda: (NOTHING, NOTHING))
        ahead: dict[tuple[int, int], int] = defaultdict(lambda: NOTHING)
        for dispatch in range(int(first), int(end)):
            planned, fetched = dispatches[dispatch]
            for lookup, step in enumerate(planned, start=starts[dispatch]):
                key = (sites[dispatch], experts[lookup])
                if step.loads:
                    copied[key] = (lookup, NOTHING)
                elif step.ahead:
                    copied[key] = (NOTHING, ahead[key])
                if not step.on_host:
                    of_lookup[lookup], of_ahead[lookup] = copied[key]
            for one in fetched:
                ahead[index_of[one.site], one.expert] = number
                number += 1
    return of_lookup, of_ahead
