"""Temporal locality: are experts needed again soon, sooner than in the same trace shuffled?

Each phase of each stack is looked at by itself: its dispatches, one after another, at one site.
A lookup is one distinct expert of one dispatch. The control is the same trace with its dispatches
in random order (whole dispatches change places with others of similar size, so that sizes, sets
and popularity stay what they are and only the order in time is lost). Leaves out caches: those
are `moeprof.replay.buffering`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import affinity, intervals, wording
from moeprof.replay.access import Accesses, Floats, Int32s, accesses
from moeprof.replay.compiled import compiled
from moeprof.replay.intervals import Interval
from moeprof.replay.result import SEVERITY_FACT, SEVERITY_NOTE, Finding, Metric, Result
from moeprof.replay.tokens import NOT_SEEN, StackTokens
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "locality"
NUM_SHUFFLES = 5
MAX_DISTANCE = 256
"""Longest reuse distance and window that is told apart, in dispatches."""

_SIZE_CLASSES_PER_OCTAVE = 4
_MIN_SIZE_CLASS = 8
_MIN_DISPATCHES = 2
_LOCALITY_THRESHOLD = 0.03
_COLD = MAX_DISTANCE + 1
_PAIR_KINDS = ("next token", "same request", "any request")


def locality(trace: Trace) -> Result:
    """Returns reuse distances, overlap of consecutive dispatches and working sets.

    The table has one row per site and phase; tables ``reuse``, ``working_set`` and ``tokens`` hold
    the curves per stack and phase, ``affinity`` what each MoE layer says about the next, and
    ``prefetch`` what fetching by it would find.
    """
    sites, reuse, windows, tokens_table = [], [], [], []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    stacks = wording.stacks_of(trace)
    next_layers = []
    for stack, tokens in stacks:
        halves = tokens.requests.half
        per_site = [(site, accesses(tokens, site)) for site in tokens.sites]
        for phase in tokens.phases():
            parts = [
                (site, _site_locality(found[phase], site))
                for site, found in per_site
                if phase in found and found[phase].num_dispatches >= _MIN_DISPATCHES
            ]
            if not parts:
                continue
            sites += [_site_row(stack, phase, site, part, halves) for site, part in parts]
            whole = _pooled([part for _, part in parts])
            reuse.append(_reuse_curve(stack, phase, whole, halves))
            windows.append(_window_curve(stack, phase, whole, halves))
            median = _median_distance(tokens, phase, [found for _, found in per_site])
            metrics += _metrics(stack, phase, whole, halves, median)
            if phase == wording.main_phase(tokens.phases()):
                findings += _findings(stack, phase, whole, halves, num_stacks=len(stacks))
        for phase in tokens.token_phases():
            rows, found_metrics = _token_overlap(tokens, phase)
            tokens_table += rows
            metrics += found_metrics
        found_next = affinity.layer_affinity(tokens, num_stacks=len(stacks))
        next_layers.append(found_next)
        metrics += found_next.metrics
        findings += found_next.findings
    return Result(
        name=NAME,
        title="Temporal locality",
        table=pd.DataFrame(sites),
        metrics=tuple(metrics),
        findings=wording.routing_findings(trace, NAME, findings),
        tables={
            "reuse": _concatenated(reuse),
            "working_set": _concatenated(windows),
            "tokens": pd.DataFrame(tokens_table),
            **affinity.frames(next_layers),
        },
        notes=(
            "Each phase by itself: distances and overlaps skip dispatches of other phases. A first "
            "use has no distance and counts as not reused.",
            f"Shuffled: mean of {NUM_SHUFFLES} random orders of the same dispatches, exchanged "
            "only with dispatches of similar size.",
            "Uniform: every token picks its experts at random, dispatch sizes as recorded.",
            *affinity.NOTES,
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Locality:
    """Per-request shares; [requests, distances] or [requests, windows] unless said otherwise."""

    distances: NDArray[np.int64]
    reused: Floats
    shuffled: Floats
    uniform: Floats
    lookups: Floats
    """[requests, 1]"""
    windows: NDArray[np.int64]
    resident: Floats
    slots: Floats
    resident_shuffled: Floats
    slots_shuffled: Floats
    num_dispatches: int


def _site_locality(access: Accesses, site: schema.Site) -> _Locality:
    distances = _powers(min(MAX_DISTANCE, access.num_dispatches - 1))
    windows = _powers(min(MAX_DISTANCE, access.num_dispatches // 2))
    real = _shares_of_order(
        access, np.arange(access.num_dispatches, dtype=np.int64), distances, windows
    )
    generator = np.random.default_rng(intervals.SEED)
    controls = [
        _shares_of_order(access, _shuffled(access, generator), distances, windows)
        for _ in range(NUM_SHUFFLES)
    ]
    mean_slots: Floats = np.mean([control.slots for control in controls], axis=0)
    mean_resident: Floats = np.mean([control.resident for control in controls], axis=0)
    mean_reused: Floats = np.mean([control.reused for control in controls], axis=0)
    return _Locality(
        distances=distances,
        reused=real.reused,
        shuffled=mean_reused,
        uniform=_uniform_reuse(access, site, distances),
        lookups=access.shares(np.ones(len(access.expert)))[:, None],
        windows=windows,
        resident=real.resident,
        slots=real.slots,
        resident_shuffled=mean_resident,
        slots_shuffled=mean_slots,
        num_dispatches=access.num_dispatches,
    )


def _powers(largest: int) -> NDArray[np.int64]:
    return 2 ** np.arange(int(largest).bit_length(), dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class _OrderShares:
    """[requests, distances] reused; [requests, windows] resident and all, in expert slots."""

    reused: Floats
    resident: Floats
    slots: Floats


def _shares_of_order(
    access: Accesses,
    order: NDArray[np.int64],
    distances: NDArray[np.int64],
    windows: NDArray[np.int64],
) -> _OrderShares:
    backward, forward = reuse_distances(access, order)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    lanes = access.lane[order]
    starts = np.searchsorted(lanes, lanes, side="left").astype(np.int64)
    stops = np.searchsorted(lanes, lanes, side="right").astype(np.int64)
    reused = np.zeros((access.num_requests, len(distances)))
    resident = np.zeros((access.num_requests, len(windows)))
    _share_out(
        access.want_lookup,
        access.want_request,
        access.num_wanting,
        place[access.lookup_dispatch()],
        backward,
        forward,
        starts,
        stops,
        distances,
        windows,
        reused,
        resident,
    )
    age = (np.arange(len(order)) - starts)[place]
    whole = float(access.num_experts)
    slots = [access.dispatch_shares(np.where(age >= window - 1, whole, 0)) for window in windows]
    return _OrderShares(
        reused=reused,
        resident=resident,
        slots=np.stack(slots, axis=1) if slots else resident,
    )


@compiled(
    "void(int32[::1], int32[::1], int32[::1], int64[::1], int32[::1], int32[::1], int64[::1],"
    " int64[::1], int64[::1], int64[::1], float64[:, ::1], float64[:, ::1])"
)
def _share_out(  # noqa: PLR0917
    want_lookup: Int32s,
    want_request: Int32s,
    num_wanting: Int32s,
    place_of_lookup: NDArray[np.int64],
    backward: Int32s,
    forward: Int32s,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    distances: NDArray[np.int64],
    windows: NDArray[np.int64],
    reused: Floats,
    resident: Floats,
) -> None:
    for want in range(len(want_lookup)):
        lookup = want_lookup[want]
        who = want_request[want]
        part = 1.0 / num_wanting[lookup]
        place = place_of_lookup[lookup]
        if backward[lookup] > 0:
            for index in range(len(distances)):
                if backward[lookup] <= distances[index]:
                    reused[who, index] += part
        stay = forward[lookup] if forward[lookup] > 0 else len(starts)
        # The window that ends at a place holds an expert from its lookup on until the window has
        # passed or the expert's next lookup takes over; only full windows count.
        for index in range(len(windows)):
            first = max(place, starts[place] + windows[index] - 1)
            last = min(place + min(stay, windows[index]), stops[place])
            if last > first:
                resident[who, index] += part * (last - first)


def reuse_distances(access: Accesses, order: NDArray[np.int64]) -> tuple[Int32s, Int32s]:
    """Returns, per lookup, dispatches since the expert's last use and until its next; 0 is never.

    Args:
        access: Dispatches of one site.
        order: [dispatches] their order in time; lanes stay together.
    """
    backward = np.zeros(len(access.expert), np.int32)
    forward = np.zeros(len(access.expert), np.int32)
    _reuse(access.offset, access.expert, order, access.lane, access.num_experts, backward, forward)
    return backward, forward


@compiled("void(int64[::1], int32[::1], int64[::1], int32[::1], int64, int32[::1], int32[::1])")
def _reuse(
    offset: NDArray[np.int64],
    expert: Int32s,
    order: NDArray[np.int64],
    lane: Int32s,
    num_experts: int,
    backward: Int32s,
    forward: Int32s,
) -> None:
    last_place = np.full(num_experts, -1, np.int64)
    last_lookup = np.full(num_experts, -1, np.int64)
    for place in range(len(order)):
        dispatch = order[place]
        if place > 0 and lane[dispatch] != lane[order[place - 1]]:
            last_place[:] = -1
        for lookup in range(offset[dispatch], offset[dispatch + 1]):
            chosen = expert[lookup]
            if last_place[chosen] >= 0:
                distance = place - last_place[chosen]
                backward[lookup] = distance
                forward[last_lookup[chosen]] = distance
            last_place[chosen] = place
            last_lookup[chosen] = lookup


def _shuffled(access: Accesses, generator: np.random.Generator) -> NDArray[np.int64]:
    """Returns a random order in which only dispatches of one lane and similar size trade places."""
    size = np.floor(_SIZE_CLASSES_PER_OCTAVE * np.log2(access.num_tokens)).astype(np.int64)
    strata = access.lane.astype(np.int64) * (size.max() + 1) + size
    found, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    lane_of_stratum = found // (size.max() + 1)
    merged = np.zeros(len(found), np.int64)
    members, number = 0, 0
    for index, count in enumerate(counts):
        new_lane = index > 0 and lane_of_stratum[index] != lane_of_stratum[index - 1]
        if index > 0 and (new_lane or members >= _MIN_SIZE_CLASS):
            members, number = 0, number + 1
        merged[index] = number
        members += int(count)
    if len(found) > 1 and members < _MIN_SIZE_CLASS and number > 0:
        same_lane = lane_of_stratum == lane_of_stratum[-1]
        last = merged == number
        if same_lane[np.flatnonzero(last)[0] - 1]:
            merged[last] = number - 1
    group = merged[stratum]
    places = np.argsort(group, kind="stable")
    drawn = np.lexsort((generator.random(len(group)), group))
    order = np.empty(len(group), np.int64)
    order[places] = drawn
    return order


def _age_in_lane(access: Accesses) -> NDArray[np.int64]:
    index = np.arange(access.num_dispatches)
    return index - np.searchsorted(access.lane, access.lane, side="left")


def _uniform_reuse(access: Accesses, site: schema.Site, distances: NDArray[np.int64]) -> Floats:
    """Returns [requests, distances] expected reuses if tokens picked experts at random."""
    rows = int(access.num_rows.sum())
    picked = rows / max(int(access.num_tokens.sum()), 1) / site.num_experts
    passed = np.r_[0, np.cumsum(access.num_tokens, dtype=np.int64)]
    index = np.arange(access.num_dispatches)
    start = index - _age_in_lane(access)
    shares = [
        access.shares(
            np.repeat(
                1 - (1 - picked) ** (passed[index] - passed[np.maximum(index - distance, start)]),
                access.lookups,
            )
        )
        for distance in distances
    ]
    return np.stack(shares, axis=1) if shares else np.empty((access.num_requests, 0))


def _pooled(parts: list[_Locality]) -> _Locality:
    num_distances = min(len(part.distances) for part in parts)
    num_windows = min(len(part.windows) for part in parts)

    def total(name: str, length: int) -> Floats:
        summed: Floats = np.sum([getattr(part, name)[:, :length] for part in parts], axis=0)
        return summed

    return _Locality(
        distances=parts[0].distances[:num_distances],
        reused=total("reused", num_distances),
        shuffled=total("shuffled", num_distances),
        uniform=total("uniform", num_distances),
        lookups=total("lookups", 1),
        windows=parts[0].windows[:num_windows],
        resident=total("resident", num_windows),
        slots=total("slots", num_windows),
        resident_shuffled=total("resident_shuffled", num_windows),
        slots_shuffled=total("slots_shuffled", num_windows),
        num_dispatches=max(part.num_dispatches for part in parts),
    )


def _site_row(
    stack: str, phase: str, site: schema.Site, part: _Locality, halves: NDArray[np.int8]
) -> dict[str, Any]:
    overlap = intervals.share(part.reused[:, 0], part.lookups, halves=halves)[0]
    shuffled = intervals.share(part.shuffled[:, 0], part.lookups, halves=halves)[0]
    uniform = intervals.share(part.uniform[:, 0], part.lookups, halves=halves)[0]
    excess = _excess(part, halves)
    return {
        "stack": stack,
        "phase": phase,
        "site": site.site,
        "layer": site.layer,
        "num_dispatches": part.num_dispatches,
        "overlap_share": overlap.value,
        "overlap_share_low": overlap.low,
        "overlap_share_high": overlap.high,
        "shuffled_share": shuffled.value,
        "uniform_share": uniform.value,
        "excess_share": excess.value,
        "excess_share_low": excess.low,
        "excess_share_high": excess.high,
    }


def _excess(part: _Locality, halves: NDArray[np.int8]) -> Interval:
    return intervals.difference(
        (part.reused[:, 0], part.lookups), (part.shuffled[:, 0], part.lookups), halves=halves
    )[0]


def _reuse_curve(
    stack: str, phase: str, whole: _Locality, halves: NDArray[np.int8]
) -> pd.DataFrame:
    real = intervals.share(whole.reused, whole.lookups, halves=halves)
    shuffled = intervals.share(whole.shuffled, whole.lookups, halves=halves)
    uniform = intervals.share(whole.uniform, whole.lookups, halves=halves)
    return pd.DataFrame(
        {
            "stack": stack,
            "phase": phase,
            "distance": whole.distances,
            **real.columns("reused_share"),
            "shuffled_share": shuffled.value,
            "uniform_share": uniform.value,
        }
    )


def _window_curve(
    stack: str, phase: str, whole: _Locality, halves: NDArray[np.int8]
) -> pd.DataFrame:
    real = intervals.share(whole.resident, whole.slots, halves=halves)
    shuffled = intervals.share(whole.resident_shuffled, whole.slots_shuffled, halves=halves)
    return pd.DataFrame(
        {
            "stack": stack,
            "phase": phase,
            "window": whole.windows,
            **real.columns("expert_share"),
            "shuffled_share": shuffled.value,
        }
    )


def _median_distance(
    tokens: StackTokens, phase: str, per_site: list[dict[str, Accesses]]
) -> Interval:
    """Returns the median reuse distance; a first use counts as infinitely far."""
    found = [by_phase[phase] for by_phase in per_site if phase in by_phase]
    in_phase = np.flatnonzero(tokens.dispatch_phase == schema.PHASES.index(phase))
    longest = max((access.longest_request() for access in found), default=1)
    blocks = intervals.block_index(len(in_phase), longest)
    num_blocks = 1 if blocks is None else int(blocks[-1]) + 1
    per_block = np.zeros((num_blocks, _COLD + 1))
    halves = np.zeros((2, _COLD + 1))
    for access in found:
        backward, _ = reuse_distances(access, np.arange(access.num_dispatches, dtype=np.int64))
        distance = np.where(backward > 0, np.minimum(backward, _COLD), _COLD)
        at = access.lookup_dispatch()
        if blocks is not None:
            block = blocks[np.searchsorted(in_phase, access.dispatch[at])]
            cell = block * (_COLD + 1) + distance
            per_block += np.bincount(cell, minlength=per_block.size).reshape(per_block.shape)
        else:
            per_block[0] += np.bincount(distance, minlength=_COLD + 1)
        parts = 1 / access.num_wanting[access.want_lookup]
        half = tokens.requests.half[access.want_request].astype(np.int64)
        cell = half * (_COLD + 1) + distance[access.want_lookup]
        halves += np.bincount(cell, weights=parts, minlength=halves.size).reshape(halves.shape)
    rows = intervals.resampled_blocks(
        None if blocks is None else per_block,
        per_block.sum(axis=0),
        halves,
        _median_of_counts,
        centered=False,
    )
    return intervals.summarized(rows, num_requests=_num_requests(found))[0]


def _num_requests(found: list[Accesses]) -> int:
    return len(np.unique(np.concatenate([access.cause_request for access in found])))


def _median_of_counts(counts: Floats) -> Floats:
    reached = np.cumsum(counts, axis=1)
    total = reached[:, -1]
    median: Floats = np.argmax(reached >= total[:, None] / 2, axis=1).astype(np.float64)
    median[(median >= _COLD) | (total == 0)] = np.nan
    return median[:, None]


def _token_overlap(tokens: StackTokens, phase: str) -> tuple[list[dict[str, Any]], list[Metric]]:
    """Returns how many experts two tokens share: neighbours, of one request, of any two."""
    order, first = _neighbours(tokens, phase)
    if not len(first):
        return [], []
    request = tokens.request[order]
    num_requests = len(tokens.requests)
    shared = np.zeros((num_requests, len(_PAIR_KINDS)))
    slots = np.zeros(num_requests)
    uniform = 0.0
    for site, experts in zip(tokens.sites, tokens.expert, strict=True):
        ids = np.ascontiguousarray(experts[order])
        both = np.zeros(len(first), np.int32)
        wanted = np.zeros(len(first), np.int32)
        _shared_experts(ids, first, both, wanted)
        shared[:, 0] += np.bincount(request[first], weights=both, minlength=num_requests)
        slots += np.bincount(request[first], weights=wanted, minlength=num_requests)
        pairs = np.bincount(request[first[wanted > 0]], minlength=num_requests)
        uniform += wanted.sum() ** 2 / max(pairs.sum(), 1) / site.num_experts

        seen = ids[:, 0] != NOT_SEEN
        tokens_of = np.bincount(request[seen], minlength=num_requests).astype(np.float64)
        counts = np.zeros((num_requests, site.num_experts), np.int64)
        _count_experts(ids, request, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = (counts * (counts - 1.0)).sum(axis=1) / (tokens_of * (tokens_of - 1))
        shared[:, 1] += np.where(pairs > 0, pairs * np.nan_to_num(own), 0)
        total = counts.sum(axis=0)
        num_tokens = float(tokens_of.sum())
        any_two = (total * (total - 1.0)).sum() / max(num_tokens * (num_tokens - 1), 1.0)
        shared[:, 2] += pairs * any_two
    found = intervals.share(shared, slots[:, None], halves=tokens.requests.half)
    stack = tokens.stack
    rows: list[dict[str, Any]] = [
        {
            "stack": stack,
            "phase": phase,
            "pair": kind,
            "shared_share": found[index].value,
            "shared_share_low": found[index].low,
            "shared_share_high": found[index].high,
        }
        for index, kind in enumerate(_PAIR_KINDS)
    ]
    rows.append(
        {
            "stack": stack,
            "phase": phase,
            "pair": "uniform",
            "shared_share": uniform / max(slots.sum(), 1.0),
            "shared_share_low": None,
            "shared_share_high": None,
        }
    )
    metric = wording.metric_of(
        f"{NAME}/next_token_share/{stack}/{phase}",
        found[0],
        unit="share",
        figure_class="exact",
        note="experts that a token shares with the token before it in the same sequence",
    )
    return rows, [metric]


def _neighbours(tokens: StackTokens, phase: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the tokens of a phase by request and position, and where a pair of them starts."""
    chosen = np.flatnonzero(tokens.phase == schema.TOKEN_PHASES.index(phase))
    order = chosen[
        np.lexsort((tokens.position[chosen], tokens.sequence[chosen], tokens.request[chosen]))
    ]
    request, sequence = tokens.request[order], tokens.sequence[order]
    position = tokens.position[order]
    follows = (
        (request[1:] == request[:-1])
        & (sequence[1:] == sequence[:-1])
        & (position[1:] == position[:-1] + 1)
    )
    return order, np.flatnonzero(follows)


@compiled("void(int32[:, ::1], int64[::1], int32[::1], int32[::1])")
def _shared_experts(
    expert: Int32s, first: NDArray[np.int64], shared: Int32s, wanted: Int32s
) -> None:
    top_k = expert.shape[1]
    for pair in range(len(first)):
        one = first[pair]
        for slot in range(top_k):
            chosen = expert[one + 1, slot]
            if chosen < 0 or expert[one, 0] == NOT_SEEN:
                continue
            wanted[pair] += 1
            for other in range(top_k):
                if expert[one, other] == chosen:
                    shared[pair] += 1
                    break


@compiled("void(int32[:, ::1], int32[::1], int64[:, ::1])")
def _count_experts(expert: Int32s, request: Int32s, counts: NDArray[np.int64]) -> None:
    for token in range(len(request)):
        for slot in range(expert.shape[1]):
            chosen = expert[token, slot]
            if chosen >= 0:
                counts[request[token], chosen] += 1


def _metrics(
    stack: str, phase: str, whole: _Locality, halves: NDArray[np.int8], median: Interval
) -> list[Metric]:
    where = f"{stack}/{phase}"
    overlap = intervals.share(whole.reused[:, 0], whole.lookups, halves=halves)[0]
    shuffled = intervals.share(whole.shuffled[:, 0], whole.lookups, halves=halves)[0]
    uniform = intervals.share(whole.uniform[:, 0], whole.lookups, halves=halves)[0]
    return [
        wording.metric_of(
            f"{NAME}/overlap_share/{where}",
            overlap,
            unit="share",
            figure_class="exact",
            note="lookups whose expert was needed by the dispatch before, at the same site",
        ),
        wording.metric_of(
            f"{NAME}/shuffled_overlap_share/{where}",
            shuffled,
            unit="share",
            figure_class="exact",
            note="the same with the dispatches in random order",
        ),
        wording.metric_of(
            f"{NAME}/uniform_overlap_share/{where}",
            uniform,
            unit="share",
            figure_class="exact",
            note="the same if tokens picked their experts at random",
        ),
        wording.metric_of(
            f"{NAME}/excess_overlap_share/{where}",
            _excess(whole, halves),
            unit="points",
            figure_class="exact",
            note="overlap less overlap shuffled, on the same draws: what order in time adds",
        ),
        wording.metric_of(
            f"{NAME}/median_reuse_distance/{where}",
            median,
            unit="dispatches",
            figure_class="exact",
            note=(
                "dispatches since the expert's last use, first uses counted as infinite; none "
                f"where it lies beyond {MAX_DISTANCE}"
            ),
        ),
    ]


def _findings(
    stack: str, phase: str, whole: _Locality, halves: NDArray[np.int8], *, num_stacks: int
) -> list[Finding]:
    overlap = intervals.share(whole.reused[:, 0], whole.lookups, halves=halves)[0]
    shuffled = intervals.share(whole.shuffled[:, 0], whole.lookups, halves=halves)[0]
    uniform = intervals.share(whole.uniform[:, 0], whole.lookups, halves=halves)[0]
    excess = _excess(whole, halves)
    if overlap.value is None or shuffled.value is None or uniform.value is None:
        return []
    ordered = (excess.value or 0) > _LOCALITY_THRESHOLD and (excess.low or 0) > 0
    popular = shuffled.value - uniform.value > _LOCALITY_THRESHOLD
    if ordered:
        meaning = "so a cache that keeps recent experts profits"
    elif excess.low is None:
        meaning = "with too few requests to say whether that holds for other traffic"
    elif popular:
        meaning = "so reuse comes from popular experts, and pinning those does as well as tracking"
    else:
        meaning = "so reuse is little more than chance gives at this number of tokens per step"
    text = (
        f"In {wording.place(stack, phase, num_stacks=num_stacks)}, "
        f"{wording.share_with_interval(overlap)} of the experts that a step needs were needed by "
        f"the step before at the same layer, {wording.percent(shuffled.value)} with the same steps "
        f"in random order and {wording.percent(uniform.value)} under uniform routing: order in "
        f"time adds {wording.points_with_interval(excess)}, {meaning}."
    )
    return [
        Finding(
            text=text,
            severity=SEVERITY_FACT if ordered or popular else SEVERITY_NOTE + 10,
            section=NAME,
            metric=f"{NAME}/overlap_share/{stack}/{phase}",
        )
    ]


def _concatenated(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
