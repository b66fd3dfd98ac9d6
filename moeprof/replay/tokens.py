"""A trace's routing as arrays: one row per token, sorted by dispatch and request.

All analyses read a stack once, through `load`; what it returns is kept as long as the trace object
lives. Leaves out weights and scores, which no analysis here needs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NOT_ROUTED = -1
"""In `StackTokens.expert`: a slot that holds no expert, or one that was dropped."""
NOT_SEEN = -2
"""In `StackTokens.expert`: the site did not see the token."""

UNLABELLED = ""
"""Label of a request without domain and language."""

RANK_SHIFT = 32
"""Rank and step (or request id) in one number: the rank lies this many bits up."""

_UNSEEN = (schema.SlotStatus.PRUNED_LAST_LAYER, schema.SlotStatus.EARLY_EXIT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """The requests of a trace, in order of rank and id.

    Attributes:
        key: [requests] rank and id in one number, ascending.
        label: [requests] index into ``labels``.
        labels: Domains, or languages where those tell more apart.
        label_kind: ``domain``, ``language`` or an empty string.
        half: [requests] 0 or 1: odd against even within each label.
    """

    key: NDArray[np.int64]
    label: NDArray[np.int64]
    labels: tuple[str, ...]
    label_kind: str
    half: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, kw_only=True, eq=False)
class StackTokens:
    """The routing of one stack.

    Token arrays are sorted by dispatch, then request. A dispatch here is one forward pass of the
    stack (rank, step); each site sees it once.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        sites: In execution order.
        requests: All requests of the trace.
        dispatch: [tokens] index of the dispatch.
        request: [tokens] index into ``requests``.
        sequence: [tokens] beam or sample.
        position: [tokens] position in the sequence.
        phase: [tokens] index into ``schema.TOKEN_PHASES``.
        expert: One [tokens, top_k] array per site; `NOT_ROUTED` and `NOT_SEEN` are negative.
        dispatch_rank: [dispatches].
        dispatch_step: [dispatches].
        dispatch_phase: [dispatches] index into ``schema.PHASES``.
    """

    stack: str
    sites: tuple[schema.Site, ...]
    requests: Requests
    dispatch: NDArray[np.int32]
    request: NDArray[np.int32]
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    phase: NDArray[np.uint8]
    expert: tuple[NDArray[np.int32], ...]
    dispatch_rank: NDArray[np.int32]
    dispatch_step: NDArray[np.int32]
    dispatch_phase: NDArray[np.uint8]

    @property
    def num_dispatches(self) -> int:
        """Forward passes of this stack."""
        return len(self.dispatch_step)

    def phases(self) -> tuple[str, ...]:
        """Returns the phases that dispatches of this stack have, in schema order."""
        present = np.unique(self.dispatch_phase)
        return tuple(schema.PHASES[int(index)] for index in present)

    def token_phases(self) -> tuple[str, ...]:
        """Returns the phases that tokens of this stack have, in schema order."""
        return tuple(schema.TOKEN_PHASES[int(index)] for index in np.unique(self.phase))


_KEPT: weakref.WeakKeyDictionary[Trace, dict[str, StackTokens]] = weakref.WeakKeyDictionary()


def load(trace: Trace, stack: str) -> StackTokens:
    """Returns the routing of ``stack``; read once per trace object."""
    kept = _KEPT.setdefault(trace, {})
    if stack not in kept:
        kept[stack] = _read(trace, stack)
    return kept[stack]


def stack_tokens(
    *,
    stack: str,
    sites: tuple[schema.Site, ...],
    rank: NDArray[np.int64],
    step: NDArray[np.int64],
    request: NDArray[np.int64],
    sequence: NDArray[np.int64],
    position: NDArray[np.int64],
    phase: NDArray[np.uint8],
    expert: tuple[NDArray[np.int32], ...],
    step_phases: pd.DataFrame,
    requests: Requests,
) -> StackTokens:
    """Returns tokens in any order as `StackTokens`.

    Args:
        stack: Name of the stack.
        sites: Its sites in execution order.
        rank: [tokens].
        step: [tokens].
        request: [tokens] request ids as recorded.
        sequence: [tokens].
        position: [tokens].
        phase: [tokens] index into ``schema.TOKEN_PHASES``.
        expert: [tokens, top_k] per site.
        step_phases: Columns rank, step, phase (a name).
        requests: The requests of the trace; tokens of others are left out.
    """
    pass_key = (rank << RANK_SHIFT) | step
    passes, dispatch = np.unique(pass_key, return_inverse=True)
    request_key = (rank << RANK_SHIFT) | request
    index = np.searchsorted(requests.key, request_key)
    index[index == len(requests)] = 0
    known = requests.key[index] == request_key if len(requests) else np.zeros(len(rank), bool)

    order = np.lexsort((index, dispatch))
    order = order[known[order]]
    return StackTokens(
        stack=stack,
        sites=sites,
        requests=requests,
        dispatch=dispatch[order].astype(np.int32),
        request=index[order].astype(np.int32),
        sequence=sequence[order].astype(np.int32),
        position=position[order].astype(np.int32),
        phase=phase[order],
        expert=tuple(ids[order].astype(np.int32) for ids in expert),
        dispatch_rank=(passes >> RANK_SHIFT).astype(np.int32),
        dispatch_step=(passes & ((1 << RANK_SHIFT) - 1)).astype(np.int32),
        dispatch_phase=_phase_of_passes(passes, step_phases),
    )


def load_requests(trace: Trace) -> Requests:
    """Returns the requests of a trace with the label that tells them apart best."""
    return requests_from_table(trace.requests, task=trace.info.model.task)


def requests_from_table(table: pd.DataFrame, *, task: str) -> Requests:
    """Returns `Requests` from the table of that name.

    Args:
        table: Columns rank, request and, where known, domain and language.
        task: ``mt`` prefers languages as labels, anything else domains.
    """
    key = (table["rank"].to_numpy(np.int64) << RANK_SHIFT) | table["request"].to_numpy(np.int64)
    order = np.argsort(key, kind="stable")
    kinds = ("language", "domain") if task == "mt" else ("domain", "language")
    labels: tuple[str, ...] = (UNLABELLED,)
    label = np.zeros(len(key), dtype=np.int64)
    label_kind = ""
    for kind in kinds:
        if kind not in table or table[kind].isna().all():
            continue
        names = table[kind].astype("string").fillna(UNLABELLED).to_numpy(str)[order]
        found, codes = np.unique(names, return_inverse=True)
        if len(found) > len(labels) or not label_kind:
            labels, label, label_kind = tuple(str(name) for name in found), codes, kind
        if len(found) > 1:
            break
    return Requests(
        key=key[order],
        label=label,
        labels=labels,
        label_kind=label_kind,
        half=intervals.alternate(label),
    )


def _read(trace: Trace, stack: str) -> StackTokens:
    info = trace.info
    sites = info.sites_of(stack)
    columns: dict[str, list[NDArray[np.int64]]] = {
        name: [] for name in ("rank", "step", "request", "sequence", "position", "phase")
    }
    experts: list[list[NDArray[np.int32]]] = [[] for _ in sites]
    for block in trace.blocks(stack):
        for name, parts in columns.items():
            parts.append(np.asarray(getattr(block, name), dtype=np.int64))
        routed = np.where(
            block.status == schema.SlotStatus.ROUTED, block.expert, NOT_ROUTED
        ).astype(np.int32)
        routed[np.isin(block.status, _UNSEEN)] = NOT_SEEN
        for parts_of_site, site in zip(experts, sites, strict=True):
            parts_of_site.append(routed[:, site.first_slot : site.first_slot + site.top_k])
    joined = {
        name: np.concatenate(parts) if parts else np.empty(0, np.int64)
        for name, parts in columns.items()
    }
    steps = trace.steps
    return stack_tokens(
        stack=stack,
        sites=sites,
        rank=joined["rank"],
        step=joined["step"],
        request=joined["request"],
        sequence=joined["sequence"],
        position=joined["position"],
        phase=joined["phase"].astype(np.uint8),
        expert=tuple(
            np.concatenate(parts) if parts else np.empty((0, site.top_k), np.int32)
            for parts, site in zip(experts, sites, strict=True)
        ),
        step_phases=steps.loc[steps["stack"] == stack, ["rank", "step", "phase"]],
        requests=load_requests(trace),
    )


def _phase_of_passes(passes: NDArray[np.int64], step_phases: pd.DataFrame) -> NDArray[np.uint8]:
    key = (step_phases["rank"].to_numpy(np.int64) << RANK_SHIFT) | step_phases["step"].to_numpy(
        np.int64
    )
    names = step_phases["phase"].astype("string").to_numpy(str)
    codes = np.full(len(names), schema.PHASES.index("mixed"), dtype=np.uint8)
    for code, name in enumerate(schema.PHASES):
        codes[names == name] = code
    found = np.full(len(passes), schema.PHASES.index("mixed"), dtype=np.uint8)
    if len(key):
        order = np.argsort(key)
        index = np.minimum(np.searchsorted(key[order], passes), len(key) - 1)
        matches = key[order][index] == passes
        found[matches] = codes[order][index][matches]
    return found
