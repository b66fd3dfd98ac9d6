"""From sites and settings to caches, their state machines and the pools of slots.

Numbers caches, keys and capacities as `moeprof.replay.buffering` does, so that both see the same
machines. Leaves out what the machines decide (`residency`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeprof.errors import UsageError
from moeprof.live.buffer_settings import BufferedSite, BufferSettings, check_caches
from moeprof.replay.cache import policies, reference, streams
from moeprof.replay.cache.decisions import CompiledResidency, make_residency
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.policies import Machine
from moeprof.replay.cache.residency import CacheSpec, MissRule, Residency
from moeprof.replay.cache.sizes import parse_capacity

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream

_STAGING = 2
_NOT_ALL_KEPT = ("min_bypass", "pinned", "layers")


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The caches of a buffer and the slots they need.

    Attributes:
        caches: The caches.
        pool_slots: Slots of each pool, staging included.
        slot_bytes: Bytes of a slot of each pool.
        cache_bytes: Bytes of the caches' slots, tensors only.
        staging_bytes: Bytes of the slots beside them, tensors only; those of what is copied ahead
            included.
        padding_bytes: Bytes of all slots that only align tensors.
    """

    caches: tuple[CacheSpec, ...]
    pool_slots: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    cache_bytes: int
    staging_bytes: int
    padding_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCaches:
    """The caches of a buffer, and what decides about them: all that no device is needed for.

    Buffers of the same sites and settings may have it one after the other: each begins with
    ``residency.reset()``.

    Attributes:
        plan: The caches.
        residency: Who is where.
    """

    plan: CachePlan
    residency: Residency | CompiledResidency


def prepare_caches(sites: Sequence[BufferedSite], settings: BufferSettings) -> PreparedCaches:
    """Returns the caches of a buffer, planned, and their machines.

    Raises:
        UsageError: The settings make no sense.
    """
    plan = plan_caches(sites, settings)
    residency = make_residency(
        plan.caches,
        plan.pool_slots,
        full=settings.initial == "full",
        prefetch=settings.prefetch,
        # It counts pairs of experts: nothing to hold where nobody asks.
        foresight=Foresight(_in_stacks(sites)) if settings.prefetch else None,
    )
    if isinstance(residency, CompiledResidency):
        residency.rule = MissRule(action=settings.miss, host_rows=settings.host_rows)
    return PreparedCaches(plan=plan, residency=residency)


def _in_stacks(sites: Sequence[BufferedSite]) -> list[list[tuple[int, int]]]:
    """Returns sites and their number of experts, stack by stack."""
    found: dict[str, list[tuple[int, int]]] = {}
    for site in sites:
        found.setdefault(site.stack, []).append((site.site, site.store.num_experts))
    return list(found.values())


def plan_caches(sites: Sequence[BufferedSite], settings: BufferSettings) -> CachePlan:
    """Returns the caches of a buffer.

    Raises:
        UsageError: The settings make no sense.
    """
    check_caches(settings)
    groups = _grouped(sites, settings.scope)
    capacities = _capacities(groups, settings)
    foreseen = _foreseen(settings)
    sizes = [max(site.store.shape.block_bytes for site in group) for group in groups]
    pools = sorted(set(sizes))
    caches = []
    for number, (group, capacity) in enumerate(zip(groups, capacities, strict=True)):
        ordered = sorted(group, key=lambda site: site.site)
        keys = tuple((site.site, site.store.num_experts) for site in ordered)
        caches.append(
            CacheSpec(
                sites=keys,
                capacity=capacity,
                pool=pools.index(sizes[number]),
                machine=_machine(settings, keys, capacity, number, foreseen),
            )
        )
    needs_staging = settings.policy in _NOT_ALL_KEPT or 0 in capacities
    staging = settings.staging
    if staging is None:
        staging = _STAGING if needs_staging and settings.miss != "host" else 0
    if staging < 0 or (needs_staging and not staging and settings.miss != "host"):
        raise UsageError(
            f"{settings.policy} does not keep every expert that it misses: it needs staging slots",
            hint="staging=1 or more",
        )
    staging += settings.prefetch
    tensors = [max(site.store.shape.expert_bytes for site in group) for group in groups]
    slots = [
        staging + sum(cache.capacity for cache in caches if cache.pool == pool)
        for pool in range(len(pools))
    ]
    in_pool = [
        max(tensors[number] for number, cache in enumerate(caches) if cache.pool == pool)
        for pool in range(len(pools))
    ]
    cache_bytes = sum(cache.capacity * size for cache, size in zip(caches, tensors, strict=True))
    staging_bytes = staging * sum(in_pool)
    every = sum(count * size for count, size in zip(slots, pools, strict=True))
    return CachePlan(
        caches=tuple(caches),
        pool_slots=tuple(slots),
        slot_bytes=tuple(pools),
        cache_bytes=cache_bytes,
        staging_bytes=staging_bytes,
        padding_bytes=every - cache_bytes - staging_bytes,
    )


def _grouped(sites: Sequence[BufferedSite], scope: str) -> list[list[BufferedSite]]:
    groups: dict[object, list[BufferedSite]] = {}
    for site in sites:
        key = {"layer": site.site, "stack": site.stack, "global": None}[scope]
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _capacities(groups: Sequence[Sequence[BufferedSite]], settings: BufferSettings) -> list[int]:
    """Returns the slots of each cache."""
    asked = parse_capacity(settings.capacity)
    if asked.slots is not None:
        return [asked.slots for _ in groups]
    # A share is one of all devices' experts; every device holds an equal part of them here.
    own = [sum(site.store.expert_bytes for site in group) for group in groups]
    everything = sum(own)
    found = []
    for group, size in zip(groups, own, strict=True):
        experts = {site.store.shape.expert_bytes for site in group}
        if len(experts) > 1:
            raise UsageError(
                "experts of one cache differ in size, so bytes cannot be counted in slots",
                hint="give the capacity in slots per cache, or scope='layer'",
            )
        if settings.num_devices > 1:
            raise UsageError(
                "a share of all devices' experts is not known on one of them",
                hint="give the capacity in slots per cache",
            )
        found.append(asked.total_bytes(everything) * size // everything // experts.pop())
    return found


def _foreseen(settings: BufferSettings) -> dict[tuple[tuple[int, ...], int], Stream]:
    """Returns the lookups to come of each cache, by its sites and its number in the replay."""
    if settings.future is None:
        return {}
    rows = streams.read_rows(settings.future)
    found = {}
    every = streams.streams(rows, scope=settings.scope, devices=settings.num_devices, by_key=True)
    for number, stream in enumerate(every):
        if stream.device == settings.device_index and stream.replica == 0:
            sites = tuple(np.unique(stream.key_site).tolist())
            found[sites, number] = stream
    return found


def _machine(
    settings: BufferSettings,
    keys: tuple[tuple[int, int], ...],
    capacity: int,
    number: int,
    foreseen: dict[tuple[tuple[int, ...], int], Stream],
) -> Callable[[], Machine]:
    """Returns a function that makes the machine of a cache."""
    own = tuple(site for site, _ in keys)
    seed = number * settings.num_devices + settings.device_index
    stream = None
    for (sites, cache), each in foreseen.items():
        if sites == own:
            stream, seed = each, cache
    sizes = [1] * sum(count for _, count in keys)
    policy = settings.policy
    if policy in policies.SIMPLE_MACHINES:
        return functools.partial(policies.SIMPLE_MACHINES[policy], sizes, capacity)
    if policy == "random":
        return functools.partial(policies.Random, sizes, capacity, seed=policies.seed_of(seed))
    if policy == "layers":
        of_key = [site for site, count in keys for _ in range(count)]
        kept = policies.whole_sites(of_key, sizes, capacity)
        return functools.partial(policies.Static, sizes, capacity, kept=kept)
    if stream is None:
        raise UsageError(
            f"the trace has no lookups of site {own[0]}, on which {policy} would plan",
            hint="give a trace of a run of the same model, with the same scope of caches",
        )
    if stream.num_keys != len(sizes):
        raise UsageError(
            f"the trace has {stream.num_keys} experts where a cache of this run has {len(sizes)}",
            hint="give a trace of the same model",
        )
    return functools.partial(
        reference.machine_of,
        stream,
        policy,
        sizes=sizes,
        capacity=capacity,
        semantics="sequential",
        cache=seed,
    )
