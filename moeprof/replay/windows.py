"""A stack's forward passes in time, with their domain and the window they plan or judge.

The ranks of an expert-parallel group run one pass together: their tokens are merged. Every domain
is split in time by itself; the first part plans (window A), the second judges (window B).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import MoeprofError
from moeprof.replay.compiled import compiled, filled_int64
from moeprof.replay.tokens import RANK_SHIFT, StackTokens, load
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Array = NDArray[Any]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIXED_DOMAINS = "(mixed)"
"""Name of the domain of passes that hold tokens of several domains."""

_CUT_LOW, _CUT_HIGH = 0.4, 0.6
_LEFT_OUT = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """The forward passes of one stack, in order of time.

    A part is the tokens of one domain in one pass; where no pass mixes domains, parts are passes.

    Attributes:
        tokens: The routing; its tokens in the order of ``token_order``.
        token_order: [tokens] indices into the arrays of ``tokens``, ascending by part.
        part_of_token: [tokens] part of each token in that order.
        part_pass: [parts] pass of each part, ascending.
        part_label: [parts] index into ``labels``.
        lane: [passes] expert-parallel group; passes of different groups are no neighbours.
        phase: [passes] index into ``schema.PHASES``.
        label: [passes] index into ``labels``, the last being `MIXED_DOMAINS`.
        labels: Domains or languages, then `MIXED_DOMAINS`.
        judged: [passes] True in window B.
        straddling: Share of window B's tokens whose request window A has seen too.
        longest_request: Passes of window B that the longest request took part in.
    """

    tokens: StackTokens
    token_order: Ints
    part_of_token: Ints
    part_pass: Ints
    part_label: Ints
    lane: Ints
    phase: Ints
    label: Ints
    labels: tuple[str, ...]
    judged: Bools
    straddling: float
    longest_request: int

    def __len__(self) -> int:
        return len(self.label)

    @property
    def mixes(self) -> bool:
        """True where a pass holds tokens of several domains."""
        return bool((self.label == len(self.labels) - 1).any())

    def part_key(self) -> Ints:
        """Returns [parts] one number per lane, phase and domain of the part."""
        num = len(self.labels)
        place = self.lane[self.part_pass] * len(schema.PHASES) + self.phase[self.part_pass]
        return place * num + self.part_label

    def pass_key(self) -> Ints:
        """Returns [passes] one number per lane, phase and domain of the pass."""
        return (self.lane * len(schema.PHASES) + self.phase) * len(self.labels) + self.label


def passes(trace: Trace, stack: str) -> Passes:
    """Returns the passes of a stack, split into both windows.

    Raises:
        MoeprofError: A rank of an expert-parallel group is missing, or there is nothing to split.
    """
    tokens = load(trace, stack)
    lane_of_rank = expert_parallel_lanes(trace)
    lanes = np.array([lane_of_rank[rank] for rank in tokens.dispatch_rank.tolist()])
    key = (tokens.dispatch_step.astype(np.int64) << RANK_SHIFT) | np.maximum(lanes, 0)
    keys = np.unique(key[lanes != _LEFT_OUT])
    if len(keys) < 2:  # noqa: PLR2004
        raise MoeprofError(
            f"the {stack} ran {len(keys)} forward passes; one has to plan and another to judge",
            hint="record more requests",
        )
    pass_of_dispatch = np.where(lanes != _LEFT_OUT, np.searchsorted(keys, key), _LEFT_OUT)
    lane = keys & ((1 << RANK_SHIFT) - 1)
    phase = _merged_phase(pass_of_dispatch, tokens.dispatch_phase.astype(np.int64), len(keys))

    pass_of_token = pass_of_dispatch[tokens.dispatch]
    labels = (*tokens.requests.labels, MIXED_DOMAINS)
    label_of_token = tokens.requests.label[tokens.request]
    part_key = pass_of_token * len(labels) + label_of_token
    order = np.argsort(part_key, kind="stable")
    order = order[pass_of_token[order] >= 0]
    found, part_of_token = np.unique(part_key[order], return_inverse=True)
    part_pass, part_label = found // len(labels), found % len(labels)
    num_parts = np.bincount(part_pass, minlength=len(keys))
    label = np.full(len(keys), len(labels) - 1)
    single = num_parts[part_pass] == 1
    label[part_pass[single]] = part_label[single]

    request, of_pass = tokens.request[order], pass_of_token[order]
    judged = _split(label, of_pass, request)
    return Passes(
        tokens=tokens,
        token_order=order,
        part_of_token=part_of_token.astype(np.int64),
        part_pass=part_pass,
        part_label=part_label,
        lane=lane,
        phase=phase,
        label=label,
        labels=labels,
        judged=judged,
        straddling=_straddling(judged[of_pass], request),
        longest_request=_longest(of_pass, request, judged),
    )


def expert_parallel_lanes(trace: Trace) -> dict[int, int]:
    """Returns the expert-parallel group of every rank; -1 for ranks that are left out.

    Ranks without expert parallelism are groups of their own. Further ranks of a tensor-parallel
    group see the same tokens again and are left out.

    Raises:
        MoeprofError: A rank of an expert-parallel group is missing.
    """
    ranks = sorted(trace.info.ranks, key=lambda entry: entry.rank)
    parallel = any(entry.expert_parallel for entry in ranks)
    if parallel and trace.info.missing_ranks:
        missing = ", ".join(map(str, trace.info.missing_ranks))
        raise MoeprofError(
            f"rank {missing} is missing: loads of an expert-parallel group need all its ranks",
            hint="copy the parts of that rank into the trace, or record again",
        )
    seen: dict[int, int] = {}
    lanes = {}
    for entry in ranks:
        group = seen.get(entry.expert_parallel, 0)
        seen[entry.expert_parallel] = group + 1
        lanes[entry.rank] = group if entry.tensor_parallel == 0 else _LEFT_OUT
    return lanes


def merged_rows(num_tokens: Ints, key: Ints, least: int) -> tuple[Ints, Bools]:
    """Merges rows that follow each other until each group has enough tokens.

    Args:
        num_tokens: [rows] tokens of each row, in order of time; empty rows join no group.
        key: [rows] rows of different keys are never merged.
        least: Tokens that close a group; a row that has as many is a group of its own.

    Returns:
        [rows] the group of each row, -1 for empty rows; [groups] whether it has enough tokens.
    """
    _, codes = np.unique(key, return_inverse=True)
    group = np.full(len(key), -1, np.int64)
    total = np.zeros(len(key), np.int64)
    num_groups = _merge(num_tokens.astype(np.int64), codes.astype(np.int64), least, group, total)
    return group, total[:num_groups] >= least


@compiled("int64(int64[::1], int64[::1], int64, int64[::1], int64[::1])")
def _merge(num_tokens: Ints, key: Ints, least: int, group: Ints, total: Ints) -> int:
    num_keys = 0
    for each in key:
        num_keys = max(num_keys, each + 1)
    open_group = filled_int64(num_keys, -1)
    num_groups = 0
    for row in range(len(key)):
        if num_tokens[row] == 0:
            continue
        if num_tokens[row] >= least:
            group[row] = num_groups
            total[num_groups] = num_tokens[row]
            num_groups += 1
            continue
        mine = open_group[key[row]]
        if mine < 0:
            mine = num_groups
            num_groups += 1
            open_group[key[row]] = mine
        group[row] = mine
        total[mine] += num_tokens[row]
        if total[mine] >= least:
            open_group[key[row]] = -1
    return num_groups


def _merged_phase(pass_of_dispatch: Ints, phase: Ints, num_passes: int) -> Ints:
    lowest = np.full(num_passes, len(schema.PHASES))
    highest = np.full(num_passes, -1)
    kept = pass_of_dispatch >= 0
    np.minimum.at(lowest, pass_of_dispatch[kept], phase[kept])
    np.maximum.at(highest, pass_of_dispatch[kept], phase[kept])
    return np.where(lowest == highest, lowest, schema.PHASES.index("mixed"))


def _split(label: Ints, of_pass: Ints, request: Array) -> Bools:
    """Returns [passes] True for those that judge: each domain's second part.

    The cut lies where the fewest requests run across it, between 40 and 60 % of the domain's
    passes; the one nearest to the middle among equals.
    """
    judged = np.zeros(len(label), bool)
    for each in np.unique(label).tolist():
        members = np.flatnonzero(label == each)
        count = len(members)
        mine = label[of_pass] == each
        first, last = _spans(of_pass[mine], request[mine], len(label))
        # A request crosses the cut c if it was seen before member c and is seen from there on.
        begins = np.searchsorted(members, first, side="left")
        ends = np.searchsorted(members, last, side="right") - 1
        crossing = begins < ends
        change = np.bincount(begins[crossing] + 1, minlength=count + 2) - np.bincount(
            ends[crossing] + 1, minlength=count + 2
        )
        crossed = np.cumsum(change)
        middle = count // 2
        cuts = np.arange(count + 1)
        allowed = (cuts >= _CUT_LOW * count) & (cuts <= _CUT_HIGH * count) & (cuts > 0)
        allowed &= cuts < count
        allowed[middle] = True
        best = cuts[allowed][
            np.lexsort((np.abs(cuts[allowed] - middle), crossed[: count + 1][allowed]))[0]
        ]
        judged[members[best:]] = True
    return judged


def _spans(of_pass: Ints, request: Array, num_passes: int) -> tuple[Ints, Ints]:
    """Returns the first and last pass of every request that has tokens."""
    num_requests = int(request.max()) + 1 if len(request) else 0
    first = np.full(num_requests, num_passes)
    last = np.full(num_requests, -1)
    np.minimum.at(first, request, of_pass)
    np.maximum.at(last, request, of_pass)
    present = last >= 0
    return first[present], last[present]


def _straddling(judged: Bools, request: Array) -> float:
    seen_before = np.zeros(int(request.max()) + 1 if len(request) else 0, bool)
    seen_before[request[~judged]] = True
    return float(seen_before[request[judged]].mean()) if judged.any() else 0.0


def _longest(of_pass: Ints, request: Array, judged: Bools) -> int:
    kept = judged[of_pass]
    if not kept.any():
        return 1
    pairs = np.unique(request[kept].astype(np.int64) * len(judged) + of_pass[kept])
    return int(np.bincount(pairs // len(judged)).max())
