"""What one cache did under every policy and capacity, counted by phase and shared among requests.

Leaves out how caches are added up and judged (`study`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import bound, engine, kernels, policies, sizes
from moeprof.replay.cache.loops import popcount
from moeprof.replay.compiled import compiled
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.replay.cache.sizes import Capacity
    from moeprof.replay.cache.streams import Stream

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Floats = NDArray[np.float64]
Masks = NDArray[np.uint64]

NUM_PHASES = len(schema.PHASES)
ALL = NUM_PHASES
"""Index of all phases together, behind those of `schema.PHASES`."""
CEILING = "min_bypass"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every cache.

    Attributes:
        policies: Names in `policies.TABLE`, `policies.BOUND` left out.
        capacities: As asked for.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty`` or ``full``.
        expert_bytes: Bytes of all experts of a replica.
        num_requests: Requests of the trace.
        with_bound: The ceiling is asked for like a policy, so requests share it.
    """

    policies: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    semantics: str
    initial: str
    expert_bytes: int
    num_requests: int
    with_bound: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Counts of one cache, or of several added up. The last phase is all of them.

    Attributes:
        lookups: [phases].
        lookup_bytes: [phases].
        compulsory: [capacities, phases] first uses of experts that are not there at the start.
        hits: [policies, capacities, phases].
        hit_bytes: [policies, capacities, phases].
        streamed: [policies, capacities, phases] bytes.
        bound_hits: [capacities, phases].
        bound_hit_bytes: [capacities, phases].
        lookup_shares: [phases, requests].
        lookup_byte_shares: [phases, requests].
        hit_shares: [policies + 1, capacities, phases, requests]; the last policy is the ceiling,
            zero where it was not asked for.
        hit_byte_shares: [policies + 1, capacities, phases, requests].
        cycles: [capacities, phases] caches smaller than what one forward pass of that phase asks
            of them.
        num_caches: [phases] caches that are asked for anything.
    """

    lookups: Int64s
    lookup_bytes: Int64s
    compulsory: Int64s
    hits: Int64s
    hit_bytes: Int64s
    streamed: Int64s
    bound_hits: Int64s
    bound_hit_bytes: Int64s
    lookup_shares: Floats
    lookup_byte_shares: Floats
    hit_shares: Floats
    hit_byte_shares: Floats
    cycles: Int64s
    num_caches: Int64s


def count(stream: Stream, question: Question, cache: int) -> Counts:
    """Returns the counts of one cache.

    Args:
        stream: Its lookups.
        question: What is asked.
        cache: Its number, which seeds its random numbers.
    """
    num_policies, num_capacities = len(question.policies), len(question.capacities)
    phase = stream.lookup_phase()
    weight = stream.key_bytes[stream.key]
    shape = (num_policies, num_capacities, NUM_PHASES + 1)
    found = Counts(
        lookups=_by_phase(phase),
        lookup_bytes=_by_phase(phase, weight),
        compulsory=np.zeros(shape[1:], np.int64),
        hits=np.zeros(shape, np.int64),
        hit_bytes=np.zeros(shape, np.int64),
        streamed=np.zeros(shape, np.int64),
        bound_hits=np.zeros(shape[1:], np.int64),
        bound_hit_bytes=np.zeros(shape[1:], np.int64),
        lookup_shares=np.zeros((NUM_PHASES + 1, question.num_requests)),
        lookup_byte_shares=np.zeros((NUM_PHASES + 1, question.num_requests)),
        hit_shares=np.zeros((num_policies + 1, *shape[1:], question.num_requests)),
        hit_byte_shares=np.zeros((num_policies + 1, *shape[1:], question.num_requests)),
        cycles=np.zeros((num_capacities, NUM_PHASES), np.int64),
        num_caches=(_by_phase(phase) > 0).astype(np.int64)[:NUM_PHASES],
    )
    part = 1.0 / stream.num_wanting
    for units, shares in (
        (part, found.lookup_shares),
        (part * weight, found.lookup_byte_shares),
    ):
        _share_lookups(stream.want_lookup, stream.want_request, phase, units, shares[:NUM_PHASES])
        shares[ALL] = shares[:NUM_PHASES].sum(axis=0)
    for group in sizes.cache_sizes(stream, question.capacities, question.expert_bytes):
        index = np.array(group.index)
        for row, policy in enumerate(question.policies):
            done = _hits_of(stream, policy, group, question, cache)
            found.streamed[row, index, :NUM_PHASES] = done.streamed
            _count_hits(stream, done, phase, weight, part, group, found, row)
        _count_bounds(stream, group, question, phase, weight, part, found)
        found.cycles[index] = np.array(group.capacities)[:, None] < _cycle(stream, group.sizes)
    for totals in (found.hits, found.hit_bytes, found.streamed):
        totals[..., ALL] = totals[..., :NUM_PHASES].sum(axis=-1)
    for shares in (found.hit_shares, found.hit_byte_shares):
        shares[:-1, :, ALL] = shares[:-1, :, :NUM_PHASES].sum(axis=2)
    return found


def add(total: Counts, more: Counts) -> Counts:
    """Adds counts in place to ``total`` and returns the sum."""
    for name in (
        "lookups", "lookup_bytes", "compulsory", "hits", "hit_bytes", "streamed", "bound_hits",
        "bound_hit_bytes", "lookup_shares", "lookup_byte_shares", "hit_shares", "hit_byte_shares",
        "cycles", "num_caches",
    ):  # fmt: skip
        array = getattr(total, name)
        array += getattr(more, name)
    return total


def _hits_of(
    stream: Stream, policy: str, group: sizes.CacheSizes, question: Question, cache: int
) -> engine.Hits:
    return engine.hits(
        stream,
        policy,
        sizes=group.sizes,
        capacities=group.capacities,
        semantics=question.semantics,
        initial=question.initial,
        cache=cache,
    )


def _count_hits(
    stream: Stream,
    done: engine.Hits,
    phase: NDArray[np.uint8],
    weight: Int64s,
    part: Floats,
    group: sizes.CacheSizes,
    found: Counts,
    row: int,
) -> None:
    """Adds the hits of one policy, by phase and by request."""
    same_bytes = bool((stream.key_bytes == stream.largest_bytes).all())
    for chunk, mask in enumerate(done.mask):
        first = chunk * kernels.MAX_CAPACITIES
        index = np.array(group.index[first : first + kernels.MAX_CAPACITIES])
        hits = np.zeros((NUM_PHASES, len(index) + 1), np.int64)
        in_bytes = np.zeros_like(hits)
        shares = np.zeros((NUM_PHASES, found.lookup_shares.shape[1], len(index) + 1))
        _share_hits(
            mask, stream.want_lookup, stream.want_request, phase, weight, part,
            hits, in_bytes, shares,
        )  # fmt: skip
        if row < len(found.hits):
            found.hits[row, index, :NUM_PHASES] = hits.cumsum(axis=1)[:, :-1].T
            found.hit_bytes[row, index, :NUM_PHASES] = in_bytes.cumsum(axis=1)[:, :-1].T
        found.hit_shares[row, index, :NUM_PHASES] = _by_capacity(shares)
        if same_bytes:
            of_bytes = found.hit_shares[row, index, :NUM_PHASES] * stream.largest_bytes
        else:
            shares[:] = 0
            _share_hits(
                mask, stream.want_lookup, stream.want_request, phase, weight, part * weight,
                np.zeros_like(hits), np.zeros_like(hits), shares,
            )  # fmt: skip
            of_bytes = _by_capacity(shares)
        found.hit_byte_shares[row, index, :NUM_PHASES] = of_bytes


def _by_capacity(differences: Floats) -> Floats:
    """Returns [capacities, phases, requests] from [phases, requests, differences]."""
    return differences.cumsum(axis=2)[:, :, :-1].transpose(2, 0, 1)


def _count_bounds(
    stream: Stream,
    group: sizes.CacheSizes,
    question: Question,
    phase: NDArray[np.uint8],
    weight: Int64s,
    part: Floats,
    found: Counts,
) -> None:
    """Fills bounds, what requests share of them, and compulsory misses."""
    index = np.array(group.index)
    equal = bool((group.sizes == 1).all())
    same_bytes = bool((stream.key_bytes == stream.largest_bytes).all())
    ceiling = len(question.policies)
    if equal:
        best = _hits_of(stream, CEILING, group, question, 0)
        if question.with_bound:
            _count_hits(stream, best, phase, weight, part, group, found, ceiling)
            for shares in (found.hit_shares[ceiling], found.hit_byte_shares[ceiling]):
                shares[index, ALL] = shares[index, :NUM_PHASES].sum(axis=1)
        every = [int(best.at(place).sum()) for place in range(len(index))]
        found.bound_hits[index, ALL] = every
        found.bound_hit_bytes[index, ALL] = np.array(every) * stream.largest_bytes
    places: list[int] = np.unique(phase).tolist()
    for each in [*places, ALL]:
        # The optimal policy bounds all phases together, bytes where they are as equal as sizes.
        hits_known, bytes_known = each == ALL and equal, each == ALL and equal and same_bytes
        if hits_known and bytes_known:
            continue
        most = bound.bounds(
            stream, sizes=group.sizes, capacities=group.capacities, semantics=question.semantics,
            initial=question.initial, phase=None if each == ALL else each,
            num_requests=question.num_requests if question.with_bound else None,
        )  # fmt: skip
        if not hits_known:
            found.bound_hits[index, each] = most.hits
            if most.hit_shares is not None:
                found.hit_shares[ceiling, index, each] = most.hit_shares
        found.bound_hit_bytes[index, each] = most.hit_bytes
        if most.byte_shares is not None:
            found.hit_byte_shares[ceiling, index, each] = most.byte_shares
    first = bound.first_uses(stream)
    plain = group.sizes.tolist()
    for place, capacity in zip(group.index, group.capacities, strict=True):
        placed = 0
        if question.initial == "full":
            placed = len(policies.placed_at_start(plain, capacity))
        found.compulsory[place] = _by_phase(phase[first & (stream.key >= placed)])


def _by_phase(phase: NDArray[np.uint8], weight: Int64s | None = None) -> Int64s:
    """Returns [phases + 1] sums by phase, and over all of them."""
    counts = np.zeros(NUM_PHASES + 1, np.int64)
    if weight is None:
        counts[:-1] = np.bincount(phase, minlength=NUM_PHASES)
    else:
        np.add.at(counts, phase, weight)
    counts[-1] = counts[:-1].sum()
    return counts


def _cycle(stream: Stream, size: Int64s) -> Floats:
    """Returns [phases] the median size of what a forward pass asks of the cache; 0 for none."""
    asked = np.add.reduceat(size[stream.key], stream.offset[:-1])
    _, first, step = np.unique(
        (stream.rank.astype(np.int64) << 32) | stream.step, return_index=True, return_inverse=True
    )
    of_pass = np.bincount(step, weights=asked)
    phase = stream.phase[first]
    median = np.zeros(NUM_PHASES)
    for each in np.unique(phase).tolist():
        median[each] = np.median(of_pass[phase == each])
    return median


@compiled("void(int32[::1], int32[::1], uint8[::1], float64[::1], float64[:, ::1])")
def _share_lookups(
    want_lookup: Int32s,
    want_request: Int32s,
    phase: NDArray[np.uint8],
    part: Floats,
    shares: Floats,
) -> None:
    for want in range(len(want_lookup)):
        lookup = want_lookup[want]
        shares[phase[lookup], want_request[want]] += part[lookup]


@compiled(
    "void(uint64[::1], int32[::1], int32[::1], uint8[::1], int64[::1], float64[::1],"
    " int64[:, ::1], int64[:, ::1], float64[:, :, ::1])"
)
def _share_hits(  # noqa: PLR0917
    mask: Masks,
    want_lookup: Int32s,
    want_request: Int32s,
    phase: NDArray[np.uint8],
    weight: Int64s,
    part: Floats,
    hits: Int64s,
    in_bytes: Int64s,
    shares: Floats,
) -> None:
    """Adds hits as differences along capacities: few, as larger caches mostly hit what smaller do.

    Their cumulative sums are the hits at each capacity.
    """
    num_capacities = hits.shape[1] - 1
    one = np.uint64(1)
    for lookup in range(len(mask)):
        change = mask[lookup] ^ (mask[lookup] << one)
        row = phase[lookup]
        while change:
            place = np.int64(popcount((change & (~change + one)) - one))
            change &= change - one
            if place >= num_capacities:
                break
            sign = 1 if mask[lookup] >> np.uint64(place) & one else -1
            hits[row, place] += sign
            in_bytes[row, place] += sign * weight[lookup]
    for want in range(len(want_lookup)):
        lookup = want_lookup[want]
        change = mask[lookup] ^ (mask[lookup] << one)
        row = phase[lookup]
        who = want_request[want]
        while change:
            place = np.int64(popcount((change & (~change + one)) - one))
            change &= change - one
            if place >= num_capacities:
                break
            if mask[lookup] >> np.uint64(place) & one:
                shares[row, who, place] += part[lookup]
            else:
                shares[row, who, place] -= part[lookup]
