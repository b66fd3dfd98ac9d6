"""Upper bounds of hits and of bytes hit, for experts of any size: PFOO-L (Berger et al. 2018).

An expert that is hit was kept since its last use, which costs its size times the time in between;
a cache has its capacity times the length of the trace to spend. Taking the cheapest first, the last
one in part, no cache can do better. Hits and bytes are bounded separately, and a phase counts its
own reuses only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
) -> tuple[list[int], list[int]]:
    """Returns the most hits, and the most bytes hit, at each capacity.

    Args:
        stream: The lookups.
        sizes: [keys] size of each expert, in the unit of the capacities.
        capacities: In the unit of the sizes.
        semantics: One of `policies.SEMANTICS`.
        initial: ``empty`` or ``full``.
        phase: Index into `schema.PHASES`; None for all.
    """
    if initial == "full":
        found = [
            _bounds_of(stream, sizes, [each], semantics, phase,
                       len(policies.placed_at_start(sizes.tolist(), each)))
            for each in capacities
        ]  # fmt: skip
        return [hits[0] for hits, _ in found], [in_bytes[0] for _, in_bytes in found]
    return _bounds_of(stream, sizes, capacities, semantics, phase, 0)


def _bounds_of(
    stream: Stream,
    sizes: Int64s,
    capacities: Sequence[int],
    semantics: str,
    phase: int | None,
    placed: int,
) -> tuple[list[int], list[int]]:
    found = reuses(stream, semantics=semantics, placed=placed)
    lookup, time = found.lookup, found.time
    if phase is not None:
        own = stream.lookup_phase()[lookup] == phase
        lookup, time = lookup[own], time[own]
    key = stream.key[lookup]
    cost = sizes[key] * time
    budgets = [capacity * found.length for capacity in capacities]
    return (
        most(cost, np.ones(len(cost), np.int64), budgets),
        most(cost, stream.key_bytes[key], budgets),
    )
