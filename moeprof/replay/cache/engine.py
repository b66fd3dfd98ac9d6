"""Hits of one cache at many capacities: picks the fast way for a policy, size and semantics.

Leaves out what is made of the hits (`study`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import curves, kernels, policies, reference
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream

Int64s = NDArray[np.int64]
Masks = NDArray[np.uint64]

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True, kw_only=True, eq=False)
class Hits:
    """What one policy did at several capacities.

    Attributes:
        mask: [chunks, lookups]; bit c of chunk n: hit at capacity 64 n + c.
        streamed: [capacities, phases] bytes missed and not resident after the dispatch.
    """

    mask: Masks
    streamed: Int64s

    def at(self, index: int) -> NDArray[np.bool_]:
        """Returns [lookups] whether each hits at the capacity of that index."""
        chunk, bit = divmod(index, kernels.MAX_CAPACITIES)
        hit: NDArray[np.bool_] = (self.mask[chunk] >> np.uint64(bit)) & np.uint64(1) != 0
        return hit


def hits(
    stream: Stream,
    policy: str,
    *,
    sizes: Int64s,
    capacities: Sequence[int],
    semantics: str = "batch",
    initial: str = "empty",
    cache: int = 0,
    curve: bool = True,
) -> Hits:
    """Returns the hits of a policy.

    Args:
        stream: Under ``sequential`` with lookups by key (`Stream.by_key`).
        policy: Name in `policies.TABLE`.
        sizes: [keys] size of each key.
        capacities: In the unit of the sizes, ascending.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty`` or ``full``.
        cache: Number of the cache, which seeds its random numbers.
        curve: Use one pass for all capacities where that is exact.
    """
    if policy in {"min", "min_bypass"} and semantics == "batch_hits_first":
        semantics = "batch"  # the next use of an expert does not depend on the order of rows
    wanted = kernels.int64s(capacities)
    num_chunks = -(-len(wanted) // kernels.MAX_CAPACITIES)
    found = Hits(
        mask=np.zeros((num_chunks, stream.num_lookups), np.uint64),
        streamed=np.zeros((len(wanted), len(schema.PHASES)), np.int64),
    )
    equal = bool((sizes == 1).all())
    if curve and equal and curves.exists(policy, semantics=semantics, initial=initial):
        reached = curves.reach(stream, policy, semantics=semantics, initial=initial)
        _from_reach(stream, reached, wanted, found)
        return found
    for chunk in range(num_chunks):
        rows = slice(chunk * kernels.MAX_CAPACITIES, (chunk + 1) * kernels.MAX_CAPACITIES)
        _replay(
            stream,
            policy,
            sizes=sizes,
            capacities=np.ascontiguousarray(wanted[rows]),
            semantics=semantics,
            initial=initial,
            cache=cache,
            mask=found.mask[chunk],
            streamed=found.streamed[rows],
        )
    return found


def _replay(
    stream: Stream,
    policy: str,
    *,
    sizes: Int64s,
    capacities: Int64s,
    semantics: str,
    initial: str,
    cache: int,
    mask: Masks,
    streamed: Int64s,
) -> None:
    full = initial == "full"
    code = kernels.SEMANTICS_CODES[semantics]
    common = (
        stream.offset,
        stream.key,
        stream.last,
        stream.phase,
        sizes,
        stream.key_bytes,
        capacities,
        code,
        full,
        mask,
        streamed,
    )
    if policy in kernels.LIST_CODES:
        kernels.replay_list(*common, kernels.LIST_CODES[policy])
    elif policy == "lfu":
        kernels.replay_lfu(*common)
    elif policy == "arc":
        kernels.replay_arc(*common)
    elif policy == "s3fifo":
        shares = np.array([policies.s3_shares(int(each)) for each in capacities], np.int64)
        kernels.replay_s3fifo(*common, *(np.ascontiguousarray(part) for part in shares.T))
    elif policy == "random":
        kernels.replay_random(*common, policies.seed_of(cache))
    elif policy in {"pinned", "layers"}:
        _replay_static(stream, policy, sizes, capacities, full, mask, streamed)
    else:
        next_use = kernels.next_uses(
            stream.offset,
            stream.key,
            one_by_one=semantics == "sequential",
            num_keys=stream.num_keys,
        )
        kernels.replay_min(*common, next_use, policy == "min_bypass")


def _replay_static(
    stream: Stream,
    policy: str,
    sizes: Int64s,
    capacities: Int64s,
    full: bool,
    mask: Masks,
    streamed: Int64s,
) -> None:
    plain = sizes.tolist()
    lookups = reference.window_lookups(stream).tolist()
    sites = stream.key_site.tolist()
    for row, capacity in enumerate(capacities.tolist()):
        chosen = (
            policies.most_used(lookups, plain, capacity)
            if policy == "pinned"
            else policies.whole_sites(sites, plain, capacity)
        )
        kept = np.zeros(stream.num_keys, np.bool_)
        kept[chosen] = True
        kernels.replay_static(
            stream.offset,
            stream.key,
            stream.phase,
            sizes,
            stream.key_bytes,
            capacity,
            row,
            full,
            mask,
            streamed,
            kept,
        )


def _from_reach(stream: Stream, reached: curves.Reach, capacities: Int64s, found: Hits) -> None:
    """Fills hits and streamed bytes from the smallest capacities that hit and that keep."""
    first = np.searchsorted(capacities, reached.hit)
    for chunk, row in enumerate(found.mask):
        bit = np.clip(first - chunk * kernels.MAX_CAPACITIES, 0, kernels.MAX_CAPACITIES)
        reached_by = np.where(
            bit == kernels.MAX_CAPACITIES, np.uint64(0), _ALL << bit.astype(np.uint64)
        )
        asked = min(len(capacities) - chunk * kernels.MAX_CAPACITIES, kernels.MAX_CAPACITIES)
        row[:] = reached_by & (_ALL >> np.uint64(kernels.MAX_CAPACITIES - asked))
    gone = np.searchsorted(capacities, np.minimum(reached.hit, reached.kept))
    num_phases = found.streamed.shape[1]
    cell = gone * num_phases + stream.lookup_phase()
    weight = np.bincount(
        cell,
        weights=stream.key_bytes[stream.key],
        minlength=(len(capacities) + 1) * num_phases,
    ).reshape(-1, num_phases)
    # Streamed at every capacity below the one from which it hits or stays.
    found.streamed[:] = weight[::-1].cumsum(axis=0)[::-1][1:].astype(np.int64)
