"""Runs a policy's state machine over the lookups of a cache: the reference of every kernel.

The three semantics are written here once. Slow (a few hundred thousand lookups a second) and good
for any policy, size and scope.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import policies
from moeprof.replay.cache.policies import NOBODY, Machine

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What one policy did at one capacity.

    Attributes:
        hit: [lookups].
        streamed: [lookups] missed, and not resident after the dispatch.
        most_used: Largest use of the cache after a dispatch.
    """

    hit: NDArray[np.bool_]
    streamed: NDArray[np.bool_]
    most_used: int


def replay(
    stream: Stream,
    policy: str,
    *,
    sizes: Sequence[int],
    capacity: int,
    semantics: str = "batch",
    initial: str = "empty",
    cache: int = 0,
) -> Replay:
    """Returns every lookup's fate.

    Args:
        stream: Under ``sequential`` with lookups by key (`Stream.by_key`).
        policy: Name in `policies.TABLE`.
        sizes: Size of each key.
        capacity: In the unit of the sizes.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty`` or ``full``.
        cache: Number of the cache, which seeds its random numbers.
    """
    machine = machine_of(
        stream, policy, sizes=sizes, capacity=capacity, semantics=semantics, cache=cache
    )
    if initial == "full":
        for key in policies.placed_at_start(sizes, capacity):
            machine.place(key)
    hit = np.zeros(stream.num_lookups, bool)
    streamed = np.zeros(stream.num_lookups, bool)
    most_used = machine.used
    keys = stream.key.tolist()
    last = stream.last.tolist()
    bounds = stream.offset.tolist()
    for first, stop in itertools.pairwise(bounds):
        own = keys[first:stop]
        hits = (
            _one_by_one(machine, own)
            if semantics == "sequential"
            else _together(
                machine,
                own,
                [keys[lookup] for lookup in last[first:stop]],
                hits_first=semantics == "batch_hits_first",
            )
        )
        hit[first:stop] = hits
        streamed[first:stop] = [
            not found and key not in machine for key, found in zip(own, hits, strict=True)
        ]
        most_used = max(most_used, machine.used)
    return Replay(hit=hit, streamed=streamed, most_used=most_used)


def machine_of(
    stream: Stream,
    policy: str,
    *,
    sizes: Sequence[int],
    capacity: int,
    semantics: str = "batch",
    cache: int = 0,
) -> Machine:
    """Returns an empty machine for a cache that will see ``stream``."""
    if policy in policies.SIMPLE_MACHINES:
        return policies.SIMPLE_MACHINES[policy](sizes, capacity)
    if policy == "random":
        return policies.Random(sizes, capacity, seed=policies.seed_of(cache))
    if policy == "pinned":
        kept = policies.most_used(window_lookups(stream).tolist(), sizes, capacity)
        return policies.Static(sizes, capacity, kept=kept)
    if policy == "layers":
        kept = policies.whole_sites(stream.key_site.tolist(), sizes, capacity)
        return policies.Static(sizes, capacity, kept=kept)
    times = np.arange(stream.num_lookups) if semantics == "sequential" else stream.lookup_dispatch()
    uses: dict[int, list[int]] = {key: [] for key in range(stream.num_keys)}
    for key, time in zip(stream.key.tolist(), times.tolist(), strict=True):
        uses[key].append(time)
    kind = {"min": policies.Min, "min_bypass": policies.MinBypass}[policy]
    return kind(sizes, capacity, uses=uses)


def window_lookups(stream: Stream) -> NDArray[np.int64]:
    """Returns [keys] lookups in window A: the first half of the cache's dispatches."""
    end = int(stream.offset[stream.num_dispatches // 2])
    return np.bincount(stream.key[:end], minlength=stream.num_keys)


def _together(machine: Machine, own: list[int], last: list[int], *, hits_first: bool) -> list[bool]:
    """Looks up a dispatch against what was resident when it arrived."""
    machine.arrive(own)
    resident = [key in machine for key in own]
    touched = frozenset(own)
    found = {key for key, is_hit in zip(own, resident, strict=True) if is_hit}
    rounds = [found, touched - found] if hits_first else [touched]
    for chosen in rounds:
        for key in own:
            if key in chosen:
                if key in found:
                    machine.hit(key)
                else:
                    machine.insert(key)
        for key in last:
            if key in chosen:
                machine.touch(key)
    protected = NOBODY if machine.bypasses else touched
    while machine.used > machine.capacity:
        if machine.victim(protected) is None:
            if protected is NOBODY:
                break
            protected = NOBODY
    return resident


class Outcome(NamedTuple):
    """What one lookup under ``sequential`` did.

    Attributes:
        hit: The expert was resident.
        evicted: Who left, first to leave first; the expert itself where it was not kept.
    """

    hit: bool
    evicted: tuple[int, ...]


def look_up(machine: Machine, key: int, active: Collection[int]) -> Outcome:
    """Looks up one expert under ``sequential``, making room before it enters.

    Args:
        machine: The cache.
        key: The expert.
        active: All experts of its dispatch.
    """
    machine.arrive((key,))
    if key in machine:
        machine.hit(key)
        machine.touch(key)
        return Outcome(hit=True, evicted=())
    size = machine.sizes[key]
    if size > machine.capacity:
        return Outcome(hit=False, evicted=())
    evicted = []
    if machine.bypasses:
        machine.insert(key)
    while machine.used + (0 if machine.bypasses else size) > machine.capacity:
        left = machine.victim(active) if machine.spares_active else None
        if left is None:
            left = machine.victim()
        assert left is not None
        evicted.append(left)
    if not machine.bypasses:
        machine.insert(key)
        machine.touch(key)
    return Outcome(hit=False, evicted=tuple(evicted))


def _one_by_one(machine: Machine, own: list[int]) -> list[bool]:
    """Looks up one expert after another."""
    active = frozenset(own)
    return [look_up(machine, key, active).hit for key in own]
