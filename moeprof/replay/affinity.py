"""Cross-layer affinity: what a token's experts at one MoE layer say about those at the next.

Per pair of consecutive sites a table of conditional probabilities is fitted on the requests that
came first (window A) and judged on the others (window B), so nothing is judged on what it was
fitted on. Judged is what a prefetcher would do with it: fetch the experts that are most likely
given those of the layer before, per token and per dispatch, beside always fetching the most
popular ones. Leaves out what is resident already (`moeprof.replay.buffering`) and predictors that
see more than expert ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals, verdicts, wording
from moeprof.replay.compiled import compiled
from moeprof.replay.intervals import Estimates, Interval
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, SEVERITY_NOTE, Finding, Metric
from moeprof.replay.tokens import StackTokens
from moeprof.trace import schema

Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

SECTION = "locality"
MAX_TOKENS = 65_536
"""Tokens judged per pair of sites and phase; dispatches beyond it are left out evenly."""
MULTIPLES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
"""Experts fetched, in multiples of what a token (or the median dispatch) needs."""

_AS_NEEDED = MULTIPLES.index(1.0)
_TOKEN, _DISPATCH = 0, 1
_CERTAIN = 1e-9

NOTES = (
    "Affinity: next experts ranked by their mean probability given the token's experts at the "
    "layer before, shrunk towards popularity by as much as chance explains; fitted on the first "
    "half of the requests (of each domain), judged on the others' shares.",
    "Affinity, shuffled: every token gets the experts that another token of its dispatch had at "
    "the layer before (tokens alone in their dispatch trade among themselves), then fitted and "
    "judged alike. Uniform: experts fetched over experts there are.",
    "Information: mutual information of one expert of a token and one of the same token at the "
    "next layer, less that of the shuffled tokens (what chance gives at this number of tokens), "
    "over the next expert's entropy less the same.",
)


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """What consecutive sites of one stack say about each other.

    Attributes:
        pairs: One row per phase and pair of sites.
        curve: One row per phase and number of experts fetched, all pairs together.
        metrics: Of each phase.
        findings: Of the phase that counts.
    """

    pairs: tuple[dict[str, Any], ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    metrics: tuple[Metric, ...] = ()
    findings: tuple[Finding, ...] = ()


def layer_affinity(tokens: StackTokens, *, num_stacks: int) -> Affinity:
    """Returns the affinity of consecutive sites of a stack; empty for fewer than two sites.

    Args:
        tokens: The stack's routing.
        num_stacks: Stacks of the trace; with more than one, sentences name theirs.
    """
    halves = tokens.requests.half
    pairs: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    for phase in tokens.phases():
        judged = later_requests(tokens, phase)
        found = [
            pair
            for index in range(len(tokens.sites) - 1)
            if (pair := _pair(tokens, phase, index, judged)) is not None
        ]
        if not found:
            continue
        place = {"stack": tokens.stack, "phase": phase}
        pairs += [{**place, **_pair_row(pair, halves)} for pair in found]
        whole = _pooled(found)
        curve += [{**place, **row} for row in _curve(whole, halves)]
        metrics += _metrics(tokens.stack, phase, whole, halves)
        if phase == wording.main_phase(tokens.phases()):
            findings += _findings(tokens.stack, phase, found, halves, num_stacks=num_stacks)
    return Affinity(
        pairs=tuple(pairs), curve=tuple(curve), metrics=tuple(metrics), findings=tuple(findings)
    )


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
class _Pair:
    """Two consecutive sites in one phase; shares of window B's requests unless said otherwise.

    ``hits`` and the like are [token or dispatch, requests, multiples].
    """

    sites: tuple[schema.Site, ...]
    num_tokens: int
    fetched: NDArray[Any]
    """[token or dispatch, multiples] experts fetched; their mean where pairs are pooled."""
    units: Floats
    """[token or dispatch, requests] experts needed (by tokens), and lookups (of dispatches)."""
    hits: Floats
    popular: Floats
    shuffled: Floats
    uniform: Floats
    information: Floats
    """[requests, 2] all requests: bits beyond chance that are told, and those there are."""


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


def _pair(tokens: StackTokens, phase: str, index: int, judged: Bools) -> _Pair | None:
    """Returns what one site says about the next, or None where there is nothing to judge."""
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
    return _Pair(
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


def _pooled(pairs: Sequence[_Pair]) -> _Pair:
    """Returns all pairs of a stack together; the sites are those of the first."""

    def total(name: str) -> Floats:
        summed: Floats = np.sum([getattr(pair, name) for pair in pairs], axis=0)
        return summed

    return _Pair(
        sites=pairs[0].sites,
        num_tokens=sum(pair.num_tokens for pair in pairs),
        fetched=np.mean([pair.fetched for pair in pairs], axis=0),
        **{
            name: total(name)
            for name in ("units", "hits", "popular", "shuffled", "uniform", "information")
        },
    )


def _share(pair: _Pair, name: str, level: int, halves: NDArray[np.int8]) -> Estimates:
    """Returns [multiples] the share of what was needed that was fetched."""
    return intervals.share(getattr(pair, name)[level], pair.units[level][:, None], halves=halves)


def _gain(pair: _Pair, over: str, level: int, halves: NDArray[np.int8]) -> Interval:
    """Returns what knowing the layer before adds, fetching as many as needed, on the same draws."""
    more = pair.hits[level] - getattr(pair, over)[level]
    return intervals.ratio(more[:, _AS_NEEDED], pair.units[level], halves=halves)[0]


def _told(pair: _Pair, halves: NDArray[np.int8]) -> Interval:
    return intervals.ratio(pair.information[:, 0], pair.information[:, 1], halves=halves)[0]


def _spread(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _pair_row(pair: _Pair, halves: NDArray[np.int8]) -> dict[str, Any]:
    one, other = pair.sites
    row: dict[str, Any] = {
        "site": one.site,
        "layer": one.layer,
        "next_site": other.site,
        "next_layer": other.layer,
        "num_experts": other.num_experts,
        "num_tokens": pair.num_tokens,
    }
    for level, prefix in ((_TOKEN, "token"), (_DISPATCH, "dispatch")):
        row[f"{prefix}_num_fetched"] = int(pair.fetched[level, _AS_NEEDED])
        row |= _spread(f"{prefix}_share", _share(pair, "hits", level, halves)[_AS_NEEDED])
        for name in ("popular", "shuffled", "uniform"):
            row[f"{prefix}_{name}_share"] = _share(pair, name, level, halves)[_AS_NEEDED].value
        row |= _spread(f"{prefix}_gain", _gain(pair, "popular", level, halves))
    return row | _spread("information_share", _told(pair, halves))


def _curve(whole: _Pair, halves: NDArray[np.int8]) -> list[dict[str, Any]]:
    """Returns the shares fetched against multiples of what is needed, up to the first of all."""
    found = {
        (name, level): _share(whole, name, level, halves)
        for name in ("hits", "popular", "shuffled", "uniform")
        for level in (_TOKEN, _DISPATCH)
    }
    rows: list[dict[str, Any]] = []
    for index, multiple in enumerate(MULTIPLES):
        row: dict[str, Any] = {"multiple": multiple}
        for level, prefix in ((_TOKEN, "token"), (_DISPATCH, "dispatch")):
            row[f"{prefix}_num_fetched"] = float(whole.fetched[level, index])
            row |= _spread(f"{prefix}_share", found["hits", level][index])
            for name in ("popular", "shuffled", "uniform"):
                row[f"{prefix}_{name}_share"] = found[name, level][index].value
        rows.append(row)
        if min(row["token_uniform_share"] or 0, row["dispatch_uniform_share"] or 0) >= 1:
            break
    return rows


def _metrics(stack: str, phase: str, whole: _Pair, halves: NDArray[np.int8]) -> list[Metric]:
    where = f"{stack}/{phase}"
    found = []
    for level, name, fetched in (
        (_TOKEN, "affinity", "as many as a token needs, per token"),
        (_DISPATCH, "prefetch", "as many as the median dispatch needs, per dispatch"),
    ):
        found += [
            wording.metric_of(
                f"{SECTION}/{name}_share/{where}",
                _share(whole, "hits", level, halves)[_AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="needed experts among those most likely after the experts of the layer "
                f"before: {fetched}",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_popular_share/{where}",
                _share(whole, "popular", level, halves)[_AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same, always fetching the most popular",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_shuffled_share/{where}",
                _share(whole, "shuffled", level, halves)[_AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same with tokens exchanged within their dispatches",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_uniform_share/{where}",
                _share(whole, "uniform", level, halves)[_AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same if tokens picked their experts at random",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_gain/{where}",
                _gain(whole, "popular", level, halves),
                unit="points",
                figure_class="exact",
                note="what knowing the layer before adds to popularity, on the same draws",
            ),
        ]
    found.append(
        wording.metric_of(
            f"{SECTION}/affinity_information/{where}",
            _told(whole, halves),
            unit="share",
            figure_class="exact",
            note="mutual information of one expert and one of the next layer beyond chance, over "
            "the entropy of the latter",
        )
    )
    return found


def _findings(
    stack: str, phase: str, pairs: Sequence[_Pair], halves: NDArray[np.int8], *, num_stacks: int
) -> list[Finding]:
    whole = _pooled(pairs)
    place = wording.place(stack, phase, num_stacks=num_stacks)
    hit = _share(whole, "hits", _DISPATCH, halves)[_AS_NEEDED]
    token = _gain(whole, "popular", _TOKEN, halves)
    popular, shuffled, uniform = (
        _share(whole, name, _DISPATCH, halves)[_AS_NEEDED].value or 0.0
        for name in ("popular", "shuffled", "uniform")
    )
    gain = _gain(whole, "popular", _DISPATCH, halves)
    if hit.value is None or gain.value is None:
        return []
    ceiling = 1 - popular
    unknown = float("nan")
    judged = verdicts.verdict(
        gain.value,
        unknown if gain.low is None else gain.low,
        unknown if gain.high is None else gain.high,
        ceiling,
    )
    counts = sorted({int(pair.fetched[_DISPATCH, _AS_NEEDED]) for pair in pairs})
    fetched = f"{counts[0]} to {counts[-1]} experts"
    if len(counts) == 1:
        fetched = f"{counts[0]} {'expert' if counts[0] == 1 else 'experts'}"
    start, severity = {
        verdicts.TRY: ("Try to prefetch", SEVERITY_COST - 2),
        verdicts.DO_NOT_TRY: ("Do not prefetch", SEVERITY_FACT),
        verdicts.NOT_ENOUGH: ("Not enough evidence to prefetch", SEVERITY_NOTE + 5),
    }[judged]
    text = (
        f"{start} by the layer before in {place}: of what the next layer needs in a step, fetching "
        f"{fetched} finds {wording.percent(popular)} if they are the most popular"
    )
    if ceiling < verdicts.WORTH_IT:
        text += ", so nothing is left to gain."
    else:
        text += (
            f" and {wording.share_with_interval(hit)} if they are the most likely after the "
            f"experts just used: {wording.points_with_interval(gain)} of {wording.points(ceiling)} "
            f"that could be gained. Controls: {wording.percent(shuffled)} with tokens exchanged "
            f"within steps, {wording.percent(uniform)} under uniform routing."
        )
    text += f" Per token the gain is {wording.points_with_interval(token)}"
    told = _told(whole, halves)
    if told.value is not None:
        text += (
            f", and one expert tells {wording.share_with_interval(told)} of what there is to know "
            "about one of the next layer"
        )
    text += "."
    return [
        Finding(
            text=text,
            severity=severity,
            section=SECTION,
            metric=f"{SECTION}/prefetch_gain/{stack}/{phase}",
        )
    ]


def frames(found: Sequence[Affinity]) -> dict[str, pd.DataFrame]:
    """Returns the tables ``affinity`` and ``prefetch`` of all stacks."""
    return {
        "affinity": pd.DataFrame([row for each in found for row in each.pairs]),
        "prefetch": pd.DataFrame([row for each in found for row in each.curve]),
    }
