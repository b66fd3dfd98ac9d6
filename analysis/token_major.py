"""What a cache does when the replay forgets batches: one token after another, as most tools replay.

Beside it `moeprof.replay.buffering` keeps what runs together together: a dispatch needs an expert
once, however many of its tokens chose it. Leaves out what that costs (`analysis.memory_latency`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.buffer_plans import BufferPlan, RoutedRows
from moeprof.replay.cache import reference, streams
from moeprof.replay.cache.streams import Rows
from moeprof.replay.pipeline import NOTHING
from moeprof.replay.serving_settings import BufferingSetting


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMajor:
    """What happens one token after another.

    Attributes:
        misses: [lookups] by dispatch and expert, as `RoutedRows` has them: misses of its tokens.
        hit_rate: Over the lookups of all tokens.
    """

    misses: NDArray[np.int64]
    hit_rate: float

    def plan(self, like: BufferPlan) -> BufferPlan:
        """Returns a plan with these misses.

        An expert is copied once where any of the dispatch's tokens misses it: a second copy into a
        batch that runs at once has no place in time. No copy waits for a slot; there are none here.

        Args:
            like: The plan of the same setting: its sizes are taken.
        """
        loads = self.misses > 0
        places = np.arange(len(loads), dtype=np.int32)
        return replace(
            like,
            hit=(~loads).astype(np.uint8),
            loads=loads.astype(np.uint8),
            after=np.full(len(loads), NOTHING, np.int32),
            awaits=np.where(loads, places, np.int32(NOTHING)),
            on_host=np.zeros(len(loads), np.uint8),
        )


def token_major(
    rows: Rows, routed: RoutedRows, setting: BufferingSetting, capacity: NDArray[Any]
) -> TokenMajor:
    """Replays one token after another, experts in the order of its slots; a cache per layer.

    Args:
        rows: Routing of the trace, from `moeprof.replay.cache.streams.read_rows`.
        routed: That of one stack and its first steps, from `read_routed_rows`.
        setting: Policy and start.
        capacity: [sites] slots of each cache.
    """
    assert setting.scope == "layer"
    flat = replace(rows, stacks=tuple(tuple(map(_by_token, own)) for own in rows.stacks))
    place = {site.site: index for index, site in enumerate(routed.sites)}
    dispatch = routed.dispatch_of_lookup()
    step_of = np.repeat(routed.steps, np.diff(routed.step_starts))
    codes = _codes(routed.site[dispatch], step_of[dispatch], routed.expert)
    order = np.argsort(codes)
    misses = np.zeros(len(codes), np.int64)
    num_hits = num_lookups = 0
    for number, stream in enumerate(streams.streams(flat, scope="layer")):
        if stream.site not in place:
            continue
        site = place[stream.site]
        hit = reference.replay(
            stream,
            setting.policy,
            sizes=[1] * stream.num_keys,
            capacity=int(capacity[site]),
            semantics="sequential",
            initial=setting.initial,
            cache=number,
        ).hit
        step = stream.step[stream.lookup_dispatch()]
        ran = np.isin(step, routed.steps)
        own = _codes(np.full(len(step), site), step, stream.key_expert[stream.key])[ran]
        found = order[np.searchsorted(codes, own, sorter=order)]
        assert (codes[found] == own).all()
        np.add.at(misses, found, ~hit[ran])
        num_hits += int(hit[ran].sum())
        num_lookups += int(ran.sum())
    return TokenMajor(misses=misses, hit_rate=num_hits / num_lookups)


def _by_token(own: Any) -> Any:
    """Returns the rows of a stack with a pass per token."""
    passes = own.dispatch
    return replace(
        own,
        dispatch=np.arange(len(passes), dtype=np.int32),
        step=own.step[passes],
        rank=own.rank[passes],
        phase=own.phase[passes],
    )


def _codes(site: NDArray[Any], step: NDArray[Any], expert: NDArray[Any]) -> NDArray[np.int64]:
    """Returns a number that is the same where all three are."""
    bits = 20
    found: NDArray[np.int64] = (
        (step.astype(np.int64) << bits | site.astype(np.int64)) << bits
    ) | expert.astype(np.int64)
    return found
