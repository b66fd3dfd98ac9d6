"""The buffering replay: what an expert cache would hit, move and stream on this trace.

Leaves out who leaves a cache (`policies`) and what follows for a person (`verdicts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import TraceError, UsageError
from moeprof.replay import intervals
from moeprof.replay.cache import counts, engine, policies, sizes, streams, verdicts
from moeprof.replay.cache.counts import ALL, Counts, Question
from moeprof.replay.intervals import Estimates
from moeprof.replay.result import Result
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Placement, Rows, Stream
    from moeprof.trace.reader import Trace

NAME = "buffering"
PHASES = (*schema.PHASES, "all")
DEFAULT_POLICIES = ("lru", "lfu", "lifo", "min", policies.BOUND)
DEFAULT_CAPACITIES = (0.125, 0.25, 0.5, 0.75)

_KEYS = ("replica", "device", "stack", "site", "layer")


@dataclass(frozen=True, kw_only=True)
class BufferingResult(Result):
    """What `buffering` returns: a `Result` that can also be asked for single lookups.

    Attributes:
        settings: What was asked, and the rows it was asked of.
    """

    settings: _Settings

    @property
    def per_cache(self) -> pd.DataFrame:
        """One row per policy, capacity, phase and cache; ``worst`` marks the lowest hit rate."""
        return self.tables["per_cache"]

    def lookups(self, policy: str, capacity: Any) -> pd.DataFrame:
        """Returns one row per lookup, in order of execution, to compare with a device.

        Columns rank, step, phase, stack, site, layer, device, expert, hit. Within a dispatch
        experts stand in the order of their first rows, under ``sequential`` by id.

        Args:
            policy: One of the policies of the study.
            capacity: As in ``capacities=``.

        Raises:
            UsageError: The policy was not part of the study, or is no policy (``bound``).
        """
        settings = self.settings
        if policy not in settings.question.policies:
            known = ", ".join(settings.question.policies)
            raise UsageError(f"there are no lookups of {policy!r}", hint=f"one of {known}")
        question = dataclasses.replace(
            settings.question,
            policies=(policy,),
            capacities=(sizes.parse_capacity(capacity),),
        )
        frames = [
            _lookups_of(stream, question, cache) for cache, stream in enumerate(settings.streams())
        ]
        frame = pd.concat(frames, ignore_index=True)
        sites = {site.site: site for site in settings.rows.sites}
        order = frame["site"].map({number: site.first_slot for number, site in sites.items()})
        frame = frame.iloc[
            np.lexsort((frame["device"], frame["replica"], order, frame["step"]))
        ].reset_index(drop=True)
        frame.insert(3, "stack", frame["site"].map({n: s.stack for n, s in sites.items()}))
        frame.insert(5, "layer", frame["site"].map({n: s.layer for n, s in sites.items()}))
        return frame.drop(columns="replica")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Settings:
    """What was asked."""

    rows: Rows
    scope: str
    devices: int
    placement: Placement | None
    question: Question

    def streams(self) -> Iterable[Stream]:
        """Returns the lookups of every cache."""
        return streams.streams(
            self.rows,
            scope=self.scope,
            devices=self.devices,
            placement=self.placement,
            by_key=self.question.semantics == "sequential",
        )


def buffering(
    trace: Trace,
    *,
    policies: Sequence[str] = DEFAULT_POLICIES,
    capacities: Sequence[Any] = DEFAULT_CAPACITIES,
    scope: str = "layer",
    semantics: str = "batch",
    initial: str = "empty",
    devices: int = 1,
    placement: Placement | None = None,
    jobs: int = -1,
) -> BufferingResult:
    """Returns what expert caches would do on this trace.

    One lookup per distinct expert per dispatch. Who leaves, and every tie, stands in
    `moeprof.replay.cache.policies.TABLE`: {policies}. ``bound`` is the ceiling for each row by
    itself: the best policy there can be for equal sizes and all phases, else PFOO-L.

    Semantics: under ``batch`` a hit is judged against what was resident when the dispatch arrived;
    every row refreshes recency in the order token, slot as recorded; after the dispatch untouched
    experts leave by policy order, and if that is not enough, touched ones. ``batch_hits_first``
    refreshes hits before misses enter. ``sequential`` runs experts one by one in increasing id and
    makes room before each enters.

    The table has one row per policy, capacity and phase; `BufferingResult.per_cache` one per cache
    too. ``bytes_moved`` are the bytes of all misses, ``bytes_streamed`` those of misses that are
    not resident after their dispatch (unknown for ``bound``). ``low``, ``high`` and both halves
    belong to ``hit_rate``; ``bytes_moved_per_pass`` (of that phase) has its own. The ceilings of
    ``bound`` have intervals like policies: what a budget buys are hits of single lookups, shared
    among the requests that wanted them. Caches run side by side through joblib: a surrounding
    ``parallel_config`` decides where.

    Args:
        trace: The trace.
        policies: Names of policies, ``bound`` included.
        capacities: int = slots per cache, each as large as the cache's largest expert; float in
            (0, 1] = share of all expert bytes; text = total bytes ("4000MiB"), share ("25%") or
            slots ("16"). Totals are split over caches in proportion to their expert bytes.
        scope: What shares a cache on a device: ``layer``, ``stack`` or ``global`` (everything).
        semantics: ``batch``, ``batch_hits_first`` or ``sequential``.
        initial: ``empty``, or ``full``: lowest site and id first.
        devices: Devices that experts are spread over, each with caches of its own.
        placement: Device of each expert: one sequence for all sites, or one per site id;
            contiguous when None.
        jobs: Caches replayed at a time; -1 uses all processors.

    Raises:
        UsageError: An argument makes no sense.
        TraceError: The trace holds no routing.
    """
    with_bound = "bound" in policies
    question = _question(trace, policies, capacities, semantics, initial)
    if scope not in streams.SCOPES:
        raise UsageError(f"there is no scope {scope!r}", hint=f"one of {_list(streams.SCOPES)}")
    if isinstance(devices, bool) or devices < 1:
        raise UsageError(f"there have to be devices, not {devices}")
    settings = _Settings(
        rows=streams.read_rows(trace),
        scope=scope,
        devices=devices,
        placement=placement,
        question=question,
    )
    for site in trace.sites:
        streams.device_of_expert(site, devices, placement)
    total, per_cache = _run(settings, jobs=jobs, with_bound=with_bound)
    if total is None:
        raise TraceError(f"{trace.path} holds no routing", hint="record it again")
    halves = settings.rows.requests.half
    rates = _rates(total, halves)
    moved = _moved(total, _pass_shares(settings.rows), halves)
    in_bytes = _capacity_bytes(settings)
    order = [name for name in dict.fromkeys(policies)]
    table = _table(total, rates, moved, settings, in_bytes, order)
    judged = verdicts.judge(
        trace,
        table=table,
        total=total,
        question=question,
        halves=halves,
        capacity_bytes=in_bytes,
        scope=scope,
    )
    return BufferingResult(
        name=NAME,
        title="Expert buffering",
        table=table,
        metrics=judged.metrics,
        findings=judged.findings,
        tables={"per_cache": _marked(per_cache)},
        notes=_notes(settings),
        settings=settings,
    )


buffering.__doc__ = (buffering.__doc__ or "").format(policies=", ".join(policies.POLICIES))


def _question(
    trace: Trace, names: Sequence[str], asked: Sequence[Any], semantics: str, initial: str
) -> Question:
    if isinstance(names, str) or isinstance(asked, str | int | float):
        raise UsageError("policies and capacities are lists", hint='policies=["lru"]')
    known = (*policies.POLICIES, policies.BOUND)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"there is no policy {unknown[0]!r}", hint=f"one of {_list(known)}")
    if not names or not len(asked):
        raise UsageError("there is nothing to replay", hint="name a policy and a capacity")
    if semantics not in policies.SEMANTICS:
        raise UsageError(
            f"there are no semantics {semantics!r}", hint=f"one of {_list(policies.SEMANTICS)}"
        )
    if initial not in policies.INITIALS:
        raise UsageError(
            f"a cache cannot start {initial!r}", hint=f"one of {_list(policies.INITIALS)}"
        )
    unique = {(type(each).__name__, str(each)): each for each in asked}
    return Question(
        policies=tuple(name for name in dict.fromkeys(names) if name != policies.BOUND),
        capacities=tuple(sizes.parse_capacity(each) for each in unique.values()),
        semantics=semantics,
        initial=initial,
        expert_bytes=sum(site.num_experts * site.expert_bytes for site in trace.sites),
        num_requests=len(trace.requests),
        with_bound=policies.BOUND in names,
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _run(
    settings: _Settings, *, jobs: int, with_bound: bool
) -> tuple[Counts | None, list[pd.DataFrame]]:
    """Returns the counts of all caches added up, and the rows of each."""
    total: Counts | None = None
    frames: list[pd.DataFrame] = []
    keys: list[Stream] = []

    def described() -> Iterable[tuple[Stream, int]]:
        for cache, stream in enumerate(settings.streams()):
            keys.append(stream)
            yield stream, cache

    parallel = joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")
    found = parallel(
        joblib.delayed(counts.count)(stream, settings.question, cache)
        for stream, cache in described()
    )
    for index, own in enumerate(found):
        frames.append(_cache_rows(own, keys[index], settings, with_bound=with_bound))
        keys[index] = None  # type: ignore[call-overload]
        total = own if total is None else counts.add(total, own)
    return total, frames


def _cache_rows(
    own: Counts, stream: Stream, settings: _Settings, *, with_bound: bool
) -> pd.DataFrame:
    layers = {site.site: site.layer for site in settings.rows.sites}
    place = (stream.replica, stream.device, stream.stack, stream.site, layers.get(stream.site, -1))
    names = (*settings.question.policies, *([policies.BOUND] if with_bound else []))
    columns = _columns(own, settings, names)
    return pd.DataFrame({**dict(zip(_KEYS, place, strict=True)), **columns})


def _columns(total: Counts, settings: _Settings, names: Sequence[str]) -> dict[str, Any]:
    """Returns the counts as columns: rows by policy, capacity, phase, `all` first."""
    present = [ALL, *np.flatnonzero(total.lookups[:ALL]).tolist()]
    question = settings.question
    num_capacities = len(question.capacities)
    hits, hit_bytes, streamed = [], [], []
    for name in names:
        if name == policies.BOUND:
            hits.append(total.bound_hits[:, present])
            hit_bytes.append(total.bound_hit_bytes[:, present])
            streamed.append(np.zeros((num_capacities, len(present)), np.int64))
        else:
            row = question.policies.index(name)
            hits.append(total.hits[row][:, present])
            hit_bytes.append(total.hit_bytes[row][:, present])
            streamed.append(total.streamed[row][:, present])
    shape = (len(names), num_capacities, len(present))
    lookups = np.broadcast_to(total.lookups[present], shape).ravel()
    all_bytes = np.broadcast_to(total.lookup_bytes[present], shape).ravel()
    ceiling = np.broadcast_to(total.bound_hits[:, present], shape).ravel()
    compulsory = np.broadcast_to(total.compulsory[:, present], shape).ravel()
    found = np.stack(hits).ravel()
    of_bound = np.repeat(np.array(names) == policies.BOUND, num_capacities * len(present))
    not_kept = pd.arrays.IntegerArray(np.stack(streamed).ravel(), of_bound)
    return {
        "policy": np.repeat(names, num_capacities * len(present)),
        "scope": settings.scope,
        "semantics": question.semantics,
        "capacity": pd.array(
            [capacity.asked for _ in names for capacity in question.capacities for _ in present],
            dtype=object,
        ),
        "phase": np.tile([PHASES[each] for each in present], len(names) * num_capacities),
        "num_lookups": lookups,
        "num_hits": found,
        "hit_rate": found / lookups,
        "bytes_moved": all_bytes - np.stack(hit_bytes).ravel(),
        "bytes_streamed": not_kept,
        "misses_compulsory": compulsory,
        "misses_capacity": lookups - ceiling - compulsory,
        "misses_policy": ceiling - found,
    }


def _table(
    total: Counts,
    rates: Estimates,
    moved: Estimates,
    settings: _Settings,
    in_bytes: Sequence[int],
    names: Sequence[str],
) -> pd.DataFrame:
    columns = _columns(total, settings, names)
    num_phases = len(total.lookups)
    present = [ALL, *np.flatnonzero(total.lookups[:ALL]).tolist()]
    num_capacities = len(settings.question.capacities)
    rows = [
        len(settings.question.policies)
        if name == policies.BOUND
        else settings.question.policies.index(name)
        for name in names
    ]
    cell = np.array(
        [
            (row * num_capacities + capacity) * num_phases + phase
            for row in rows
            for capacity in range(num_capacities)
            for phase in present
        ]
    )
    asked = np.tile(np.repeat(np.array(in_bytes, dtype=np.int64), len(present)), len(names))
    ordered: dict[str, Any] = {}
    for column, values in columns.items():
        ordered[column] = values
        if column == "capacity":
            ordered["capacity_bytes"] = asked
        if column == "hit_rate":
            ordered["low"], ordered["high"] = rates.low[cell], rates.high[cell]
            ordered["first_half"] = rates.first_half[cell]
            ordered["second_half"] = rates.second_half[cell]
        if column == "bytes_moved":
            for name, found in moved.columns("bytes_moved_per_pass").items():
                ordered[name] = found[cell]
            ordered["bytes_moved_per_pass_first_half"] = moved.first_half[cell]
            ordered["bytes_moved_per_pass_second_half"] = moved.second_half[cell]
    return pd.DataFrame(ordered)


def _rates(total: Counts, halves: NDArray[np.int8]) -> Estimates:
    """Returns hit rates with intervals, flat by policy (the ceiling last), capacity and phase."""
    return intervals.share(
        _flat(total.hit_shares), _repeated(total.lookup_shares, total), halves=halves
    )


def _moved(total: Counts, passes: counts.Floats, halves: NDArray[np.int8]) -> Estimates:
    """Returns bytes moved per forward pass with intervals, flat as `_rates`.

    Args:
        total: The counts of all caches.
        passes: [phases, requests] from `_pass_shares`.
        halves: [requests].
    """
    missed = total.lookup_byte_shares - total.hit_byte_shares
    return intervals.ratio(_flat(missed), _repeated(passes, total), halves=halves).within(
        0.0, np.inf
    )


def _flat(shares: counts.Floats) -> counts.Floats:
    """Returns [requests, policies x capacities x phases]."""
    return np.ascontiguousarray(shares.reshape(-1, shares.shape[-1]).T)


def _repeated(shares: counts.Floats, total: Counts) -> counts.Floats:
    """Returns [phases, requests] as the denominators of `_flat`."""
    repeats = total.hit_shares.shape[0] * total.hit_shares.shape[1]
    return np.tile(shares.T, (1, repeats))


def _pass_shares(rows: Rows) -> counts.Floats:
    """Returns [phases, requests] forward passes, each shared equally among its requests."""
    shares = np.zeros((len(PHASES), len(rows.requests)))
    for stacks in rows.stacks:
        for own in stacks:
            pairs = np.unique(own.dispatch.astype(np.int64) * own.num_requests + own.request)
            dispatch, request = pairs // own.num_requests, pairs % own.num_requests
            part = 1 / np.bincount(dispatch)[dispatch]
            np.add.at(shares, (own.phase[dispatch], request), part)
    shares[ALL] = shares[:ALL].sum(axis=0)
    return shares


def _capacity_bytes(settings: _Settings) -> list[int]:
    """Returns the bytes asked for, of one replica, for each capacity."""
    largest: dict[tuple[Any, int], int] = {}
    for site in settings.rows.sites:
        unit: Any = {"layer": site.site, "stack": site.stack, "global": ""}[settings.scope]
        device_of = streams.device_of_expert(site, settings.devices, settings.placement)
        for device in np.unique(device_of).tolist():
            place = (unit, device)
            largest[place] = max(largest.get(place, 0), site.expert_bytes)
    return [
        sizes.capacity_bytes(capacity, list(largest.values()), settings.question.expert_bytes)
        for capacity in settings.question.capacities
    ]


def _marked(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Returns the rows of all caches with the worst of each policy, capacity and phase marked."""
    frame = pd.concat(frames, ignore_index=True)
    groups = frame.assign(asked=frame["capacity"].map(repr)).groupby(
        ["policy", "asked", "phase"], sort=False
    )
    frame["worst"] = False
    frame.loc[groups["hit_rate"].idxmin(), "worst"] = True
    return frame


def _lookups_of(stream: Stream, question: Question, cache: int) -> pd.DataFrame:
    (group,) = sizes.cache_sizes(stream, question.capacities, question.expert_bytes)
    found = engine.hits(
        stream,
        question.policies[0],
        sizes=group.sizes,
        capacities=group.capacities,
        semantics=question.semantics,
        initial=question.initial,
        cache=cache,
        curve=False,
    )
    dispatch = stream.lookup_dispatch()
    return pd.DataFrame(
        {
            "rank": stream.rank[dispatch],
            "step": stream.step[dispatch],
            "phase": np.array(schema.PHASES)[stream.phase[dispatch]],
            "site": stream.key_site[stream.key],
            "device": stream.device,
            "expert": stream.key_expert[stream.key],
            "hit": found.at(0),
            "replica": stream.replica,
        }
    )


def _notes(settings: _Settings) -> tuple[str, ...]:
    question = settings.question
    notes = [
        f"One lookup per distinct expert per dispatch; {question.semantics} semantics; one cache "
        f"per {_UNITS[settings.scope]} and device ({settings.devices}); caches start "
        f"{question.initial}.",
        "Routing is as recorded and caches change nothing in it, so every count is exact; "
        "intervals say how far other traffic of this kind may lie.",
        "Ceilings (bound) hold for each row by itself.",
        "Intervals take requests for independent. Where those that run together need nearly all "
        "experts of a cache, intervals are wider than they need to be; where what they need "
        "together just fits or just does not, they are too narrow.",
    ]
    if settings.rows.num_replicas > 1:
        notes.append(
            f"{settings.rows.num_replicas} replicas, each with caches of its own: bytes of a "
            "capacity are those of one replica."
        )
    if "pinned" in question.policies:
        notes.append("pinned is planned on the first half of the dispatches it is scored on.")
    if "paper" in question.policies and question.semantics != "sequential":
        notes.append("paper and lifo are the same under batch: both spare the active experts.")
    return tuple(notes)


_UNITS = {"layer": "MoE layer", "stack": "stack", "global": "model"}
