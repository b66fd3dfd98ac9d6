"""Upper bounds of hits and of bytes hit, for experts of any size: PFOO-L (Berger et al. 2018).

An expert that is hit was kept since its last use, which costs its size times the time in between;
a cache has its capacity times the length of the trace to spend. Taking the cheapest first, the last
one in part, no cache can do better. Hits and bytes are bounded separately, and a phase counts its
own reuses only. What is taken are the hits of single lookups, so the requests that wanted those
share them as they share the hits of a policy; reuses that cost the same are taken alike, in part
where the budget ends among them. Where the budget ends, more requests also bring more of it and
more to spend it on: what a request brings beyond what is spent on it counts at the last price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.access import tally
from moeprof.replay.cache import policies

if TYPE_CHECKING:
    from moeprof.replay.cache.streams import Stream

Int64s = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reuses:
    """The reuses of a cache.

    Attributes:
        lookup: [reuses] the lookup that would hit.
        time: [reuses] how long the expert has to be kept for it.
        length: How long the cache lasts.
    """

    lookup: Int64s
    time: Int64s
    length: int


def reuses(stream: Stream, *, semantics: str, placed: int = 0) -> Reuses:
    """Returns the reuses of a stream.

    Args:
        stream: The lookups.
        semantics: Time counts lookups under ``sequential``, else dispatches.
        placed: How many keys, from the first, are resident at the start: their first uses count.
    """
    if semantics == "sequential":
        now = np.arange(stream.num_lookups, dtype=np.int64)
        length = stream.num_lookups
    else:
        now = stream.lookup_dispatch().astype(np.int64)
        length = stream.num_dispatches
    order = np.lexsort((now, stream.key))
    again = np.zeros(len(order), bool)
    again[1:] = np.diff(stream.key[order]) == 0
    time = np.zeros(len(order), np.int64)
    time[1:] = np.diff(now[order])
    first = ~again & (stream.key[order] < placed)
    time[~again] = now[order][~again]
    taken = again | first
    return Reuses(lookup=order[taken], time=time[taken], length=length)


def first_uses(stream: Stream) -> NDArray[np.bool_]:
    """Returns [lookups] whether the expert was never looked up before in this cache."""
    found = np.zeros(stream.num_lookups, bool)
    _, index = np.unique(stream.key, return_index=True)
    found[index] = True
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """The most that a cache can hit at each of several capacities.

    Attributes:
        hits: [capacities].
        hit_bytes: [capacities].
        hit_shares: [capacities, requests] of the hits; None where they were not asked for.
        byte_shares: [capacities, requests] of the bytes.
    """

    hits: list[int]
    hit_bytes: list[int]
    hit_shares: Floats | None = None
    byte_shares: Floats | None = None


def most(cost: Int64s, value: Int64s, budgets: Sequence[int]) -> list[int]:
    """Returns the most value that each budget buys, rounded down; the last thing may be cut.

    Args:
        cost: [things].
        value: [things].
        budgets: Any order.
    """
    with np.errstate(divide="ignore"):
        order = np.argsort(cost / value, kind="stable")
    spent = np.cumsum(cost[order])
    gained = np.cumsum(value[order])
    found = []
    for budget in budgets:
        num = int(np.searchsorted(spent, budget, side="right"))
        whole = int(gained[num - 1]) if num else 0
        if num < len(order):
            left = budget - (int(spent[num - 1]) if num else 0)
            whole += int(value[order[num]]) * left // int(cost[order[num]])
        found.append(whole)
    return found


def bounds(
    stream: Stream,
    *,
    sizes: Int64s,
    capacities: Sequence[int],
    semantics: str,
    initial: str,
    phase: int | None,
    num_requests: int | None = None,
) -> Bounds:
    """Returns the most hits, and the most bytes hit, at each capacity.

    Args:
        stream: The lookups.
        sizes: [keys] size of each expert, in the unit of the capacities.
        capacities: In the unit of the sizes, ascending.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty`` or ``full``.
        phase: Index into `schema.PHASES`; None for all.
        num_requests: Requests of the trace, to share hits and bytes among; None for no shares.
    """
    if initial != "full":
        return _bounds_of(stream, sizes, capacities, semantics, phase, 0, num_requests)
    found = [
        _bounds_of(stream, sizes, [each], semantics, phase,
                   len(policies.placed_at_start(sizes.tolist(), each)), num_requests)
        for each in capacities
    ]  # fmt: skip
    return Bounds(
        hits=[each.hits[0] for each in found],
        hit_bytes=[each.hit_bytes[0] for each in found],
        hit_shares=_stacked([each.hit_shares for each in found]),
        byte_shares=_stacked([each.byte_shares for each in found]),
    )


def _stacked(parts: Sequence[Floats | None]) -> Floats | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def _bounds_of(
    stream: Stream,
    sizes: Int64s,
    capacities: Sequence[int],
    semantics: str,
    phase: int | None,
    placed: int,
    num_requests: int | None,
) -> Bounds:
    found = reuses(stream, semantics=semantics, placed=placed)
    lookup, time = found.lookup, found.time
    if phase is not None:
        own = stream.lookup_phase()[lookup] == phase
        lookup, time = lookup[own], time[own]
    key = stream.key[lookup]
    cost = sizes[key] * time
    budgets = [capacity * found.length for capacity in capacities]
    values = (np.ones(len(cost), np.int64), stream.key_bytes[key])
    hits, hit_bytes = (most(cost, value, budgets) for value in values)
    if num_requests is None:
        return Bounds(hits=hits, hit_bytes=hit_bytes)
    brought = _time_shares(stream, semantics, num_requests)
    hit_shares, byte_shares = (
        _shared(stream, lookup, cost, value, capacities, brought, found.length) for value in values
    )
    return Bounds(hits=hits, hit_bytes=hit_bytes, hit_shares=hit_shares, byte_shares=byte_shares)


def _time_shares(stream: Stream, semantics: str, num_requests: int) -> Floats:
    """Returns [requests] the cache's time, each dispatch (or lookup) shared by its requests."""
    if semantics == "sequential":
        units = 1 / stream.num_wanting[stream.want_lookup]
        return tally(stream.want_request, num_requests, weights=units)
    dispatch = stream.lookup_dispatch()[stream.want_lookup].astype(np.int64)
    causes = np.unique(dispatch * num_requests + stream.want_request)
    part = 1 / np.bincount(causes // num_requests)[causes // num_requests]
    return tally(causes % num_requests, num_requests, weights=part)


def _shared(
    stream: Stream,
    lookup: Int64s,
    cost: Int64s,
    value: Int64s,
    capacities: Sequence[int],
    brought: Floats,
    length: int,
) -> Floats:
    """Returns [capacities, requests] what each request has of the most that a cache can hit.

    Args:
        stream: The lookups.
        lookup: [reuses] the lookup that would hit.
        cost: [reuses].
        value: [reuses].
        capacities: Ascending.
        brought: [requests] from `_time_shares`.
        length: How long the cache lasts.
    """
    budgets = np.array(capacities, dtype=np.float64) * length
    with np.errstate(divide="ignore"):
        prices, rank = np.unique(cost / value, return_inverse=True)
    price = np.bincount(rank, weights=cost, minlength=len(prices))
    spent = np.cumsum(price)
    # Of each budget: the ranks taken whole, and the part taken of the next.
    whole = np.searchsorted(spent, budgets, side="right")
    binding = whole < len(prices)
    part = np.where(
        binding, (budgets - np.append(0.0, spent)[whole]) / np.append(price, 1.0)[whole], 0.0
    )
    worth = np.where(binding, 1 / np.append(prices, 1.0)[whole], 0.0)
    of_lookup = np.full(stream.num_lookups, -1, np.int64)
    of_lookup[lookup] = rank
    wanted = of_lookup[stream.want_lookup]
    own = np.flatnonzero(wanted >= 0)
    wanted, request = wanted[own], stream.want_request[own].astype(np.int64)
    at = stream.want_lookup[own]
    # A rank is taken whole from the first budget on that reaches beyond it.
    first = np.searchsorted(whole, wanted, side="right")
    edges, edge = np.unique(whole, return_inverse=True)
    place = np.minimum(np.searchsorted(edges, wanted), len(edges) - 1)
    cut = np.flatnonzero(edges[place] == wanted)

    def taken(of_reuse: Int64s) -> Floats:
        of_each = np.zeros(stream.num_lookups)
        of_each[lookup] = of_reuse
        units = of_each[at] / stream.num_wanting[at]
        full = _by_request(request, first, units, len(brought), len(budgets) + 1)
        last = _by_request(request[cut], place[cut], units[cut], len(brought), len(edges))
        return np.cumsum(full, axis=1)[:, :-1] + part * last[:, edge]

    over = brought[:, None] * np.array(capacities, dtype=np.float64) - taken(cost)
    found: Floats = (taken(value) + worth * over).T
    return found


def _by_request(
    request: Int64s, column: Int64s, units: Floats, num_requests: int, num_columns: int
) -> Floats:
    """Returns [requests, columns] sums of units."""
    cell = request * num_columns + column
    return tally(cell, num_requests * num_columns, weights=units).reshape(-1, num_columns)
