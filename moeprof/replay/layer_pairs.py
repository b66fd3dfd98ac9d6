"""Pairs of consecutive MoE layers: tables of what follows what, and how well they foretell.

A table of conditional probabilities is fitted on some requests (window A) and judged on the others
(window B), so nothing is judged on what it was fitted on. Judged is what a prefetcher would do with
it, per token and per dispatch, beside the most popular experts, exchanged tokens and uniform
routing. Leaves out shares, intervals and sentences (`moeprof.replay.affinity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from moeprof.replay import intervals
from moeprof.replay.compiled import compiled
from moeprof.replay.tokens import StackTokens
from moeprof.trace import schema

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAX_TOKENS = 65_536
"""Tokens judged per pair of sites and phase; dispatches beyond it are left out evenly."""
MULTIPLES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
"""Experts fetched, in multiples of what a token (or the median dispatch) needs."""
AS_NEEDED = MULTIPLES.index(1.0)
OF_TOKEN, OF_DISPATCH = 0, 1
"""First axis of what was judged: per token, and per dispatch."""

_CERTAIN = 1e-9


def later_requests(tokens: StackTokens, phase: str) -> Bools:
    """Returns [requests] True for those of window B: the later half of each rank and label.

    Args:
        tokens: The stack's routing.
        phase: Phase of the dispatches that count; requests without part in any are in window A.
    """
    requests = tokens.requests
    later = np.zeros(len(requests), bool)
    mine = np.flatnonzero(tokens.dispatch_phase[tokens.dispatch] == schema.PHASES.index(phase))
    present, at = np.unique(tokens.request[mine], return_index=True)
    if not len(present):
        return later
    first_step = tokens.dispatch_step[tokens.dispatch[mine[at]]]
    rank = tokens.dispatch_rank[tokens.dispatch[mine[at]]]
    group = rank.astype(np.int64) * len(requests.labels) + requests.label[present]
    order = np.lexsort((present, first_step, group))
    group = group[order]
    start = np.searchsorted(group, group, side="left")
    count = np.searchsorted(group, group, side="right") - start
    later[present[order]] = np.arange(len(order)) - start >= (count + 1) // 2
    return later


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two consecutive sites in one phase; shares of window B's requests unless said otherwise.

    Attributes:
        sites: Both; of pooled pairs those of the first pair.
        num_tokens: Tokens judged.
        fetched: [token or dispatch, multiples] experts fetched; their mean where pairs are pooled.
        units: [token or dispatch, requests] experts needed (by tokens), lookups (of dispatches).
        hits: [token or dispatch, requests, multiples] of which among the most likely.
        popular: The same among the most popular.
        shuffled: The same among the most likely after another token's experts.
        uniform: The same under uniform routing.
        information: [requests, 2] of all requests: bits beyond chance that are told, and those
            there are.
    """

    sites: tuple[schema.Site, ...]
    num_tokens: int
    fetched: NDArray[Any]
    units: Floats
    hits: Floats
    popular: Floats
    shuffled: Floats
    uniform: Floats
    information: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Tokens that two sites both routed, by dispatch and request.

    Attributes:
        dispatch: [tokens].
        lane: [tokens] rank.
        request: [tokens].
        first: [tokens, top_k] experts at the first site; negative where a slot holds none.
        second: [tokens, top_k] experts at the second.
    """

    dispatch: Int32s
    lane: Int32s
    request: Int32s
    first: Int32s
    second: Int32s


def judged_pair(tokens: StackTokens, phase: str, index: int, judged: Bools) -> Pair | None:
    """Returns what one site says about the next, or None where there is nothing to judge.

    Args:
        tokens: The stack's routing.
        phase: Phase of the dispatches that count.
        index: Place of the first site among the stack's.
        judged: [requests] True for those of window B.
    """
    sites = tokens.sites[index : index + 2]
    one, other = tokens.expert[index], tokens.expert[index + 1]
    seen = tokens.dispatch_phase[tokens.dispatch] == schema.PHASES.index(phase)
    seen &= (one >= 0).any(axis=1) & (other >= 0).any(axis=1)
    chosen = np.flatnonzero(seen)
    rows = _Rows(
        dispatch=tokens.dispatch[chosen],
        lane=tokens.dispatch_rank[tokens.dispatch[chosen]],
        request=tokens.request[chosen],
        first=np.ascontiguousarray(one[chosen]),
        second=np.ascontiguousarray(other[chosen]),
    )
    fitted = ~judged[rows.request]
    if fitted.all() or not fitted.any():
        return None
    mixed = rows.first[exchanged(rows.dispatch, rows.lane)]
    num_experts = sites[1].num_experts
    popularity = np.bincount(
        rows.second[fitted][rows.second[fitted] >= 0], minlength=num_experts
    ).astype(np.int64)
    # From here on experts of the second site are named by their place in order of popularity.
    place = np.empty(num_experts, np.int32)
    place[np.argsort(-popularity, kind="stable")] = np.arange(num_experts, dtype=np.int32)
    second = np.where(rows.second >= 0, place[rows.second], rows.second).astype(np.int32)
    asked = _asked(rows.dispatch[fitted], second[fitted], num_experts)
    fetched = np.stack([_fetched(sites[1].top_k, num_experts), _fetched(asked, num_experts)])
    kept = _judged_rows(rows.dispatch, judged[rows.request])
    shape = (sites[0].num_experts, num_experts)
    results = []
    for first in (rows.first, mixed):
        table = conditional(first[fitted], second[fitted], shape)
        outputs = (
            np.zeros((2, len(judged))),
            *(np.zeros((2, len(judged), len(MULTIPLES) + 1)) for _ in range(2)),
        )
        _judge(
            rows.dispatch[kept], rows.request[kept], first[kept], second[kept],
            table, judged, fetched, *outputs,
        )  # fmt: skip
        results.append((outputs[0], *(np.cumsum(each, axis=2)[..., :-1] for each in outputs[1:])))
    (units, hits, popular), (_, shuffled, _) = results
    return Pair(
        sites=sites,
        num_tokens=int(judged[rows.request[kept]].sum()),
        fetched=fetched,
        units=units,
        hits=hits,
        popular=popular,
        shuffled=shuffled,
        uniform=units[..., None] * (fetched / num_experts)[:, None],
        information=_information(rows.request, (rows.first, mixed), second, shape, len(judged)),
    )


def exchanged(dispatch: Int32s, lane: Int32s) -> Int64s:
    """Returns [tokens] whose experts each token gets: another's of its dispatch, never its own.

    Tokens that are alone in their dispatch get those of another one that is alone.

    Args:
        dispatch: [tokens] ascending.
        lane: [tokens] rank.
    """
    _, index, counts = np.unique(dispatch, return_inverse=True, return_counts=True)
    group = np.where(counts[index] > 1, index, len(counts) + lane)
    order = np.lexsort((np.random.default_rng(intervals.SEED).random(len(group)), group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))
    following = np.arange(1, len(order) + 1)
    following[starts + sizes - 1] = starts
    partner = np.empty(len(order), np.int64)
    partner[order] = order[following]
    return partner


def conditional(first: Int32s, second: Int32s, shape: tuple[int, int]) -> Float32s:
    """Returns [experts, next experts] the probability that a token needs the one given the other.

    Counts are shrunk towards popularity as if by so many tokens of it as make the spread between
    rows what it is beyond chance (method of moments); nothing is left but popularity where chance
    explains all.

    Args:
        first: [tokens, top_k] experts at the first site; negative where a slot holds none.
        second: [tokens, top_k] experts at the next.
        shape: Experts of both.
    """
    together = np.zeros(shape, np.int64)
    alone = np.zeros(shape[0], np.int64)
    _count_pairs(first, second, together, alone)
    needed = np.bincount(second[second >= 0], minlength=shape[1])
    popular = needed / len(second)
    tokens = alone[:, None].astype(np.float64)
    variance = popular * (1 - popular)
    beyond = ((together - tokens * popular) ** 2 - tokens * variance).sum()
    most = (tokens * (tokens - 1) * variance).sum()
    # Share of the spread that is the rows' own; its odds against the rest weigh one token.
    own = min(max(beyond / most, 0.0), 1.0) if most > 0 else 0.0
    prior = (1 - own) / own if own > _CERTAIN else np.inf
    if np.isinf(prior):
        table = np.broadcast_to(popular, shape)
    else:
        weight = tokens + prior
        with np.errstate(divide="ignore", invalid="ignore"):
            table = np.where(weight > 0, (together + prior * popular) / weight, popular)
    return np.ascontiguousarray(table, dtype=np.float32)


@compiled("void(int32[:, ::1], int32[:, ::1], int64[:, ::1], int64[::1])")
def _count_pairs(first: Int32s, second: Int32s, together: Int64s, alone: Int64s) -> None:
    for token in range(len(first)):
        for slot in range(first.shape[1]):
            one = first[token, slot]
            if one < 0:
                continue
            alone[one] += 1
            for other in range(second.shape[1]):
                if second[token, other] >= 0:
                    together[one, second[token, other]] += 1


def _fetched(needed: int, num_experts: int) -> NDArray[np.int64]:
    """Returns [multiples] experts fetched where so many are needed."""
    wanted = np.maximum(np.round(np.array(MULTIPLES) * needed), 1).astype(np.int64)
    return np.minimum(wanted, num_experts)


def _asked(dispatch: Int32s, second: Int32s, num_experts: int) -> int:
    """Returns the median number of distinct experts that a dispatch needs."""
    key = dispatch[:, None].astype(np.int64) * num_experts + second
    lookups = np.unique(key[second >= 0])
    _, counts = np.unique(lookups // num_experts, return_counts=True)
    return int(np.median(counts))


def _judged_rows(dispatch: Int32s, judged: Bools) -> Int64s:
    """Returns the tokens of dispatches with part in window B, evenly thinned to `MAX_TOKENS`."""
    taken = np.unique(dispatch[judged])
    rows = np.flatnonzero(np.isin(dispatch, taken))
    if len(rows) > MAX_TOKENS:
        fewer = max(len(taken) * MAX_TOKENS // len(rows), 1)
        taken = taken[np.linspace(0, len(taken) - 1, fewer).astype(np.int64)]
        rows = np.flatnonzero(np.isin(dispatch, taken))
    return rows


@numba.njit
def _step(rank, fetched):  # type: ignore[no-untyped-def]
    """Returns the first multiple that fetches the expert of that rank."""
    for index in range(len(fetched)):
        if rank < fetched[index]:
            return index
    return len(fetched)


@numba.njit
def _place(likely, needed, fetched):  # type: ignore[no-untyped-def]
    """Returns the first multiple that fetches an expert; ties go to the more popular."""
    mine = likely[needed]
    rank = 0
    for each in range(len(likely)):
        rank += likely[each] > mine
    for each in range(needed):
        rank += likely[each] == mine
    return _step(rank, fetched)


@compiled(
    "void(int32[::1], int32[::1], int32[:, ::1], int32[:, ::1], float32[:, ::1], boolean[::1],"
    " int64[:, ::1], float64[:, ::1], float64[:, :, ::1], float64[:, :, ::1])"
)
def _judge(  # noqa: PLR0912, PLR0917
    dispatch: Int32s,
    request: Int32s,
    first: Int32s,
    second: Int32s,
    table: Float32s,
    judged: Bools,
    fetched: Int64s,
    units: Floats,
    hits: Floats,
    popular: Floats,
) -> None:
    """Adds what each request of window B needed, and the smallest fetch that held it.

    Tokens are sorted by dispatch and request; experts of the second site by popularity. Entry m of
    the last axis counts what multiple m holds and the one before does not.
    """
    num_experts = table.shape[1]
    likely = np.empty(num_experts, np.float32)
    of_dispatch = np.empty(num_experts, np.float32)
    wanting = np.empty(num_experts, np.int32)
    newest = np.empty(num_experts, np.int32)
    places = np.empty((2, num_experts), np.int64)
    start = 0
    while start < len(dispatch):
        stop = start
        of_dispatch[:] = 0
        wanting[:] = 0
        newest[:] = -1
        while stop < len(dispatch) and dispatch[stop] == dispatch[start]:
            likely[:] = 0
            for slot in range(first.shape[1]):
                given = first[stop, slot]
                if given >= 0:
                    for each in range(num_experts):
                        likely[each] += table[given, each]
            for each in range(num_experts):
                of_dispatch[each] += likely[each]
            who = request[stop]
            for slot in range(second.shape[1]):
                needed = second[stop, slot]
                if needed < 0:
                    continue
                if newest[needed] != who:
                    newest[needed] = who
                    wanting[needed] += 1
                if judged[who]:
                    units[0, who] += 1
                    hits[0, who, _place(likely, needed, fetched[0])] += 1
                    popular[0, who, _step(needed, fetched[0])] += 1
            stop += 1
        for needed in range(num_experts):
            if wanting[needed] > 0:
                places[0, needed] = _place(of_dispatch, needed, fetched[1])
                places[1, needed] = _step(needed, fetched[1])
        newest[:] = -1
        for token in range(start, stop):
            who = request[token]
            if not judged[who]:
                continue
            for slot in range(second.shape[1]):
                needed = second[token, slot]
                if needed < 0 or newest[needed] == who:
                    continue
                newest[needed] = who
                part = 1.0 / wanting[needed]
                units[1, who] += part
                hits[1, who, places[0, needed]] += part
                popular[1, who, places[1, needed]] += part
        start = stop


def _information(
    request: Int32s,
    firsts: Sequence[Int32s],
    second: Int32s,
    shape: tuple[int, int],
    num_requests: int,
) -> Floats:
    """Returns [requests, 2] pointwise mutual information beyond chance, and the most there is.

    Args:
        request: [tokens].
        firsts: Experts at the first site, [tokens, top_k] each: as recorded, and exchanged.
        second: [tokens, top_k] experts at the next.
        shape: Experts of both.
        num_requests: Requests of the trace.
    """
    told = []
    left = np.zeros(num_requests)
    for first in firsts:
        together = np.zeros(shape, np.int64)
        _count_pairs(first, second, together, np.zeros(shape[0], np.int64))
        rows, columns = together.sum(axis=1, keepdims=True), together.sum(axis=0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = np.where(
                together > 0, np.log2(together * (float(together.sum()) / rows) / columns), 0.0
            )
            open_bits = np.where(columns > 0, np.log2(float(together.sum()) / columns), 0.0)
        told.append(np.zeros(num_requests))
        _add_pairs(first, second, request, np.ascontiguousarray(bits), told[-1])
        if len(told) == 1:
            every = np.tile(open_bits, (shape[0], 1))
            _add_pairs(first, second, request, every, left)
    found = np.stack([told[0] - told[1], left - told[1]], axis=1)
    # Where exchanged tokens tell everything there is nothing to tell beyond them: no ratio.
    if found[:, 1].sum() <= _CERTAIN * left.sum():
        found[:] = 0.0
    return found


@compiled("void(int32[:, ::1], int32[:, ::1], int32[::1], float64[:, ::1], float64[::1])")
def _add_pairs(first: Int32s, second: Int32s, request: Int32s, value: Floats, sums: Floats) -> None:
    for token in range(len(first)):
        for slot in range(first.shape[1]):
            for other in range(second.shape[1]):
                if first[token, slot] >= 0 and second[token, other] >= 0:
                    sums[request[token]] += value[first[token, slot], second[token, other]]


def pooled(pairs: Sequence[Pair]) -> Pair:
    """Returns all pairs of a stack together; the sites are those of the first."""

    def total(name: str) -> Floats:
        summed: Floats = np.sum([getattr(pair, name) for pair in pairs], axis=0)
        return summed

    return Pair(
        sites=pairs[0].sites,
        num_tokens=sum(pair.num_tokens for pair in pairs),
        fetched=np.mean([pair.fetched for pair in pairs], axis=0),
        **{
            name: total(name)
            for name in ("units", "hits", "popular", "shuffled", "uniform", "information")
        },
    )
