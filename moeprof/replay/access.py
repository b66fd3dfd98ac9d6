"""Who asked for what: the dispatches of one site as sets of experts, with the requests behind them.

A lookup is one distinct expert of one dispatch; a want is one request's part in a lookup. Units are
shared equally among the requests that caused them, which is what intervals are made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.compiled import compiled
from moeprof.replay.tokens import NOT_SEEN, StackTokens
from moeprof.trace import schema

Floats = NDArray[np.float64]
Int32s = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Accesses:
    """Consecutive dispatches of one site, of one phase.

    Attributes:
        num_experts: Routed experts of the site.
        num_requests: Requests of the trace, those without part here included.
        dispatch: [dispatches] index into the stack's dispatches (or the group's number).
        lane: [dispatches] rank; dispatches of different ranks are no neighbours.
        num_tokens: [dispatches] tokens the site saw.
        num_causes: [dispatches] distinct requests.
        offset: [dispatches + 1] first lookup of each dispatch.
        expert: [lookups].
        num_rows: [lookups] tokens routed to the expert.
        num_wanting: [lookups] distinct requests that wanted it.
        want_lookup: [wants] index of the lookup.
        want_request: [wants] index of the request.
        cause_dispatch: [causes] position of the dispatch within this object.
        cause_request: [causes] index of the request.
    """

    num_experts: int
    num_requests: int
    dispatch: Int32s
    lane: Int32s
    num_tokens: Int32s
    num_causes: Int32s
    offset: NDArray[np.int64]
    expert: Int32s
    num_rows: Int32s
    num_wanting: Int32s
    want_lookup: Int32s
    want_request: Int32s
    cause_dispatch: Int32s
    cause_request: Int32s

    @property
    def num_dispatches(self) -> int:
        """Dispatches in which the site saw at least one token."""
        return len(self.num_tokens)

    @property
    def lookups(self) -> NDArray[np.int64]:
        """[dispatches] distinct experts of each dispatch."""
        return np.diff(self.offset)

    def lookup_dispatch(self) -> NDArray[np.int64]:
        """Returns [lookups] the position of each lookup's dispatch."""
        return np.repeat(np.arange(self.num_dispatches), self.lookups)

    def shares(self, units: Floats) -> Floats:
        """Returns [requests] sums of per-lookup units, each shared among those who wanted it."""
        parts = (units / self.num_wanting)[self.want_lookup]
        return tally(self.want_request, self.num_requests, weights=parts)

    def dispatch_shares(self, units: Floats) -> Floats:
        """Returns [requests] sums of per-dispatch units, each shared among its requests."""
        parts = (units / self.num_causes)[self.cause_dispatch]
        return tally(self.cause_request, self.num_requests, weights=parts)

    def slot_shares(self, kept: Floats) -> tuple[Floats, Floats]:
        """Returns [requests] shares of used experts and of all experts, dispatch by dispatch.

        A used expert is shared among those who wanted it; the experts to choose from are shared
        among all requests of the dispatch.

        Args:
            kept: [dispatches] weight of each dispatch.
        """
        used = self.shares(np.repeat(kept, self.lookups))
        return used, self.dispatch_shares(kept * self.num_experts)

    def longest_request(self) -> int:
        """Returns the number of dispatches of the request that took part in most."""
        return int(np.bincount(self.cause_request).max()) if len(self.cause_request) else 0


def accesses(tokens: StackTokens, site: schema.Site) -> dict[str, Accesses]:
    """Returns the dispatches of ``site`` by phase of the step, in schema order of the phases."""
    experts = tokens.expert[tokens.sites.index(site)]
    phase_of_token = tokens.dispatch_phase[tokens.dispatch]
    found = {}
    for phase in tokens.phases():
        chosen = np.flatnonzero(phase_of_token == schema.PHASES.index(phase))
        gathered = gather(
            dispatch=tokens.dispatch[chosen],
            request=tokens.request[chosen],
            expert=experts[chosen],
            num_experts=site.num_experts,
            num_requests=len(tokens.requests),
            lane=tokens.dispatch_rank,
        )
        if gathered.num_dispatches:
            found[phase] = gathered
    return found


def gather(
    *,
    dispatch: Int32s,
    request: Int32s,
    expert: Int32s,
    num_experts: int,
    num_requests: int,
    lane: Int32s,
) -> Accesses:
    """Returns tokens as accesses.

    Args:
        dispatch: [tokens] ascending.
        request: [tokens] ascending within a dispatch.
        expert: [tokens, top_k]; negative where a slot holds none.
        num_experts: Experts of the site.
        num_requests: Requests of the trace.
        lane: [dispatches] rank of each dispatch.
    """
    num_tokens, top_k = expert.shape
    num_passes = len(lane)
    tokens_of_pass = np.zeros(num_passes, np.int32)
    causes_of_pass = np.zeros(num_passes, np.int32)
    lookups_of_pass = np.zeros(num_passes, np.int64)
    per_decision = [np.empty(num_tokens * top_k, np.int32) for _ in range(5)]
    per_token = [np.empty(num_tokens, np.int32) for _ in range(2)]
    num_lookups, num_wants, num_causes = _gather(
        np.ascontiguousarray(dispatch),
        np.ascontiguousarray(request),
        np.ascontiguousarray(expert),
        num_experts,
        tokens_of_pass,
        causes_of_pass,
        lookups_of_pass,
        *per_decision,
        *per_token,
    )
    seen = np.flatnonzero(tokens_of_pass)
    position = np.cumsum(tokens_of_pass > 0, dtype=np.int32) - 1
    lookup_expert, lookup_rows, lookup_wanting, want_lookup, want_request = per_decision
    cause_dispatch, cause_request = per_token
    return Accesses(
        num_experts=num_experts,
        num_requests=num_requests,
        dispatch=seen.astype(np.int32),
        lane=lane[seen].astype(np.int32),
        num_tokens=tokens_of_pass[seen],
        num_causes=causes_of_pass[seen],
        offset=np.r_[0, np.cumsum(lookups_of_pass[seen])],
        expert=lookup_expert[:num_lookups].copy(),
        num_rows=lookup_rows[:num_lookups].copy(),
        num_wanting=lookup_wanting[:num_lookups].copy(),
        want_lookup=want_lookup[:num_wants].copy(),
        want_request=want_request[:num_wants].copy(),
        cause_dispatch=position[cause_dispatch[:num_causes]].astype(np.int32),
        cause_request=cause_request[:num_causes].copy(),
    )


def tally(
    index: NDArray[np.integer[Any]], length: int, *, weights: NDArray[Any] | None = None
) -> Floats:
    """Returns [length] how often, or with what total weight, each index occurs."""
    return np.bincount(index, weights=weights, minlength=length).astype(np.float64)


@compiled(
    "UniTuple(int64, 3)(int32[::1], int32[::1], int32[:, ::1], int64, int32[::1], int32[::1],"
    " int64[::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1],"
    " int32[::1])"
)
def _gather(  # noqa: PLR0917
    dispatch: Int32s,
    request: Int32s,
    expert: Int32s,
    num_experts: int,
    tokens_of_pass: Int32s,
    causes_of_pass: Int32s,
    lookups_of_pass: NDArray[np.int64],
    lookup_expert: Int32s,
    lookup_rows: Int32s,
    lookup_wanting: Int32s,
    want_lookup: Int32s,
    want_request: Int32s,
    cause_dispatch: Int32s,
    cause_request: Int32s,
) -> tuple[int, int, int]:
    newest_lookup = np.full(num_experts, -1, np.int64)
    newest_cause = np.full(num_experts, -1, np.int64)
    num_lookups = 0
    num_wants = 0
    num_causes = 0
    current_dispatch = -1
    current_request = -1
    first_lookup = 0
    for token in range(len(dispatch)):
        if expert[token, 0] == NOT_SEEN:
            continue
        here = dispatch[token]
        who = request[token]
        if here != current_dispatch:
            current_dispatch = here
            current_request = -1
            first_lookup = num_lookups
        if who != current_request:
            current_request = who
            cause_dispatch[num_causes] = here
            cause_request[num_causes] = who
            causes_of_pass[here] += 1
            num_causes += 1
        tokens_of_pass[here] += 1
        for slot in range(expert.shape[1]):
            chosen = expert[token, slot]
            if chosen < 0:
                continue
            lookup = newest_lookup[chosen]
            if lookup < first_lookup:
                lookup = num_lookups
                newest_lookup[chosen] = lookup
                lookup_expert[lookup] = chosen
                lookup_rows[lookup] = 0
                lookup_wanting[lookup] = 0
                lookups_of_pass[here] += 1
                num_lookups += 1
            lookup_rows[lookup] += 1
            if newest_cause[chosen] != num_causes:
                newest_cause[chosen] = num_causes
                lookup_wanting[lookup] += 1
                want_lookup[num_wants] = lookup
                want_request[num_wants] = who
                num_wants += 1
    return num_lookups, num_wants, num_causes
