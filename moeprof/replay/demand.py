"""What routers asked for, before any capacity: tokens and their experts, dealt to devices.

Decisions that the recorded model dropped are part of what was asked for. Whole requests are dealt
to devices in turn; padding goes where the rows that hold it go. Leaves out what a capacity does to
it (`gate_sums`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import TraceError
from moeprof.replay.tokens import RANK_SHIFT, Requests
from moeprof.trace import schema
from moeprof.trace.schema import SlotStatus

if TYPE_CHECKING:
    import pandas as pd

    from moeprof.trace.reader import Trace

Ints = NDArray[np.int64]

_CHOSEN = (SlotStatus.ROUTED, SlotStatus.DROPPED)
_UNSEEN = (SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Demand:
    """Consecutive dispatches of one site.

    Attributes:
        site: The site.
        devices: Devices the tokens are dealt to.
        num_requests: Requests of the trace.
        phase: [dispatches] index into ``schema.PHASES``.
        num_tokens: [dispatches, devices] tokens the site saw.
        num_padded: [dispatches, devices] padding rows beside them.
        dispatch: [tokens] index of the dispatch, ascending; in token order within it.
        device: [tokens].
        request: [tokens].
        expert: [tokens, top_k] what the router chose, first choice first; -1 where nothing.
    """

    site: schema.Site
    devices: int
    num_requests: int
    phase: Ints
    num_tokens: Ints
    num_padded: Ints
    dispatch: Ints
    device: Ints
    request: Ints
    expert: Ints


def demands(
    trace: Trace, stack: str, *, devices: int, requests: Requests
) -> Iterator[tuple[Demand, ...]]:
    """Yields whole dispatches of a stack, one `Demand` per site, in bounded memory.

    Request i of the trace is dealt to device i modulo ``devices`` for as long as it runs. Where
    several ranks shared experts, the dispatches of one step over all of them are one.

    Args:
        trace: The trace.
        stack: One of its stacks.
        devices: Devices the tokens are dealt to.
        requests: As `tokens.load_requests` gives them.

    Raises:
        TraceError: Ranks that shared experts are missing.
    """
    lanes = expert_groups(trace.info)
    padding = _Padding(trace, stack, lanes)
    for rows in _rows(trace, stack, merged=len(set(lanes.values())) < len(lanes)):
        batch = _batch(rows, requests, lanes)
        if len(batch.token_dispatch):
            yield tuple(
                _demand(batch, site, padding, devices=devices, num_requests=len(requests))
                for site in trace.info.sites_of(stack)
            )


def expert_groups(info: schema.TraceInfo) -> dict[int, int]:
    """Returns, per rank, the first rank of those it shares experts with.

    Raises:
        TraceError: Ranks that shared experts are missing.
    """
    shared = len({rank.expert_parallel for rank in info.ranks})
    if shared > 1 and info.missing_ranks:
        raise TraceError(
            f"the trace lacks rank {info.missing_ranks[0]}, which shared experts with the others",
            hint="copy the parts of all ranks into the trace",
        )
    groups: dict[Any, int] = {}
    found = {}
    for rank in sorted(info.ranks, key=lambda each: each.rank):
        key: Any = rank.rank
        if shared == len(info.ranks) > 1:
            key = "all"
        elif shared > 1:
            key = (rank.tensor_parallel, rank.pipeline_parallel, rank.data_parallel)
        found[rank.rank] = groups.setdefault(key, rank.rank)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Tokens of whole steps, dispatch by dispatch.

    Attributes:
        key: [dispatches] lane and step in one number.
        phase: [dispatches].
        token_dispatch: [tokens] ascending.
        token_request: [tokens].
        token_sequence: [tokens].
        expert: [tokens, slots].
        seen: [tokens, slots] False where the site did not see the token.
    """

    key: Ints
    phase: Ints
    token_dispatch: Ints
    token_request: Ints
    token_sequence: Ints
    expert: NDArray[Any]
    seen: NDArray[np.bool_]


def _rows(trace: Trace, stack: str, *, merged: bool) -> Iterator[dict[str, NDArray[Any]]]:
    names = ("rank", "step", "request", "sequence", "phase", "expert", "status")
    blocks = (
        {name: np.asarray(getattr(block, name)) for name in names} for block in trace.blocks(stack)
    )
    if not merged:
        yield from blocks
        return
    every = list(blocks)
    if every:
        yield {name: np.concatenate([rows[name] for rows in every]) for name in names}


def _batch(rows: dict[str, NDArray[Any]], requests: Requests, lanes: dict[int, int]) -> _Batch:
    rank = rows["rank"].astype(np.int64)
    request_key = (rank << RANK_SHIFT) | rows["request"]
    request = np.searchsorted(requests.key, request_key)
    request[request == len(requests)] = 0
    known = requests.key[request] == request_key if len(requests) else np.zeros(len(rank), bool)
    step_key = (_lane(rank, lanes) << RANK_SHIFT) | rows["step"]
    order = np.argsort(step_key, kind="stable")
    order = order[known[order]]
    key, dispatch = np.unique(step_key[order], return_inverse=True)
    starts = np.flatnonzero(np.diff(dispatch, prepend=-1))
    phases = rows["phase"][order].astype(np.int64)
    lowest = np.minimum.reduceat(phases, starts) if len(starts) else phases
    highest = np.maximum.reduceat(phases, starts) if len(starts) else phases
    status = rows["status"][order]
    chosen = np.isin(status, _CHOSEN)
    return _Batch(
        key=key,
        phase=np.where(lowest == highest, lowest, schema.PHASES.index("mixed")),
        token_dispatch=dispatch.astype(np.int64),
        token_request=request[order],
        token_sequence=rows["sequence"][order].astype(np.int64),
        expert=np.where(chosen, rows["expert"][order], schema.NO_EXPERT),
        seen=~np.isin(status, _UNSEEN),
    )


def _lane(rank: Ints, lanes: dict[int, int]) -> Ints:
    table = np.arange(max([*lanes, int(rank.max(initial=0))]) + 1)
    for each, first in lanes.items():
        table[each] = first
    return table[rank]


def _demand(
    batch: _Batch, site: schema.Site, padding: _Padding, *, devices: int, num_requests: int
) -> Demand:
    slots = slice(site.first_slot, site.first_slot + site.top_k)
    seen = batch.seen[:, site.first_slot]
    whole = bool(seen.all())
    picked = slice(None) if whole else np.flatnonzero(seen)
    dispatch, request = batch.token_dispatch[picked], batch.token_request[picked]
    device = request % devices
    shape = (len(batch.key), devices)
    cells = shape[0] * devices
    num_tokens = np.bincount(dispatch * devices + device, minlength=cells).reshape(shape)
    return Demand(
        site=site,
        devices=devices,
        num_requests=num_requests,
        phase=batch.phase,
        num_tokens=num_tokens,
        num_padded=padding.deal(batch, site, num_tokens, picked),
        dispatch=dispatch,
        device=device,
        request=request,
        expert=batch.expert[picked, slots].astype(np.int64),
    )


class _Padding:
    """Padding rows of every dispatch, from the tables `steps` and `layers`."""

    def __init__(self, trace: Trace, stack: str, lanes: dict[int, int]) -> None:
        steps = trace.steps
        steps = steps[steps["stack"] == stack]
        self._steps = _totals(steps, lanes, ("batch", "num_tokens", "num_padded_tokens"))
        self._lanes = lanes
        self._trace = trace
        self._rows: dict[int, tuple[Ints, Ints]] | None = None

    def deal(self, batch: _Batch, site: schema.Site, num_tokens: Ints, picked: Any) -> Ints:
        """Returns [dispatches, devices] padding rows beside the tokens a site saw."""
        found, (rows, recorded, padded) = _looked_up(self._steps, batch.key)
        pruned = num_tokens.sum(axis=1) < recorded
        if pruned.any():
            padded = np.where(pruned, self._site_padding(batch.key, site, num_tokens, rows), padded)
        padded = np.where(found, padded, 0)
        if not padded.any():
            return np.zeros_like(num_tokens)
        devices = num_tokens.shape[1]
        width = int(batch.token_sequence.max(initial=0)) + 1
        request, dispatch = batch.token_request[picked], batch.token_dispatch[picked]
        owner = (dispatch * (int(request.max(initial=0)) + 1) + request) * width
        _, first = np.unique(owner + batch.token_sequence[picked], return_index=True)
        cell = dispatch[first] * devices + request[first] % devices
        sequences = np.bincount(cell, minlength=num_tokens.size).reshape(num_tokens.shape)
        return dealt(padded, rows, num_tokens=num_tokens, num_sequences=sequences)

    def _site_padding(self, key: Ints, site: schema.Site, num_tokens: Ints, batch: Ints) -> Ints:
        """Returns [dispatches] padding where a site saw the last token of each row only."""
        if self._rows is None:
            layers = self._trace.layers
            layers = layers[layers["num_rows"].notna() & layers["site"].notna()]
            self._rows = {
                number: _totals(rows, self._lanes, ("num_rows",))
                for number, rows in layers.groupby(layers["site"].astype(np.int64))
            }
        seen = num_tokens.sum(axis=1)
        table = self._rows.get(site.site)
        rows = batch
        if table is not None:
            found, (counted,) = _looked_up(table, key)
            rows = np.where(found, counted, batch)
        padded: Ints = np.maximum(rows - seen, 0)
        return padded


def dealt(padded: Ints, batch: Ints, *, num_tokens: Ints, num_sequences: Ints) -> Ints:
    """Returns [dispatches, devices] padding rows, each on the device of its row of the batch.

    A pass of rows of one width pads every row to it; rows of sequences that ended are dealt to
    the devices with the fewest rows. Where a pass has no such shape, padding is dealt in
    proportion to tokens.

    Args:
        padded: [dispatches] padding rows.
        batch: [dispatches] rows of the batch, those of sequences that ended too.
        num_tokens: [dispatches, devices].
        num_sequences: [dispatches, devices] rows that hold a token.
    """
    total = num_tokens.sum(axis=1)
    width = np.where(batch > 0, (total + padded) // np.maximum(batch, 1), 0)
    own = num_sequences * width[:, None] - num_tokens
    rest = padded - own.sum(axis=1)
    rows, odd = np.divmod(rest, np.maximum(width, 1))
    square = (width * batch == total + padded) & (own >= 0).all(axis=1) & (rest >= 0) & (odd == 0)
    devices = num_tokens.shape[1]
    even, extra = np.divmod(rows, devices)
    place = np.argsort(np.argsort(num_sequences, axis=1, kind="stable"), axis=1, kind="stable")
    absent = even[:, None] + (place < extra[:, None])
    reached = np.cumsum(num_tokens, axis=1) * padded[:, None] // np.maximum(total, 1)[:, None]
    by_tokens = np.diff(reached, axis=1, prepend=0)
    result: Ints = np.where(square[:, None], own + absent * width[:, None], by_tokens)
    return result


def _totals(
    frame: pd.DataFrame, lanes: dict[int, int], columns: tuple[str, ...]
) -> tuple[Ints, Ints]:
    """Returns sorted keys and [columns, keys] sums over the ranks of a lane."""
    rank = frame["rank"].to_numpy(np.int64)
    key = (_lane(rank, lanes) << RANK_SHIFT) | frame["step"].to_numpy(np.int64)
    found, inverse = np.unique(key, return_inverse=True)
    sums = [
        np.bincount(inverse, weights=frame[name].to_numpy(np.float64), minlength=len(found))
        for name in columns
    ]
    return found, np.stack(sums).astype(np.int64)


def _looked_up(table: tuple[Ints, Ints], key: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Returns which keys are known, and [columns, keys] their values, 0 where not."""
    known, values = table
    if not len(known):
        return np.zeros(len(key), bool), np.zeros((len(values), len(key)), np.int64)
    index = np.minimum(np.searchsorted(known, key), len(known) - 1)
    found = known[index] == key
    return found, np.where(found, values[:, index], 0)
