"""How full the fullest device of each dispatch is, under every planner, with intervals.

A headline counts dispatches of at least 256 tokens. Leaves out where the dispatches come from
(`site_rows`) and what is concluded (`verdicts`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import intervals, loads, placement, planners, site_rows
from moeprof.replay.loads import Layout, ReplicaRule
from moeprof.replay.planners import NOTHING, Devices
from moeprof.replay.site_rows import Dispatches, SiteRows
from moeprof.replay.windows import Passes
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_TOKENS = 256
"""Tokens of a dispatch that counts in the headline."""

GAIN_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was asked for."""

    trace: Trace
    machine: Devices
    names: tuple[str, ...]
    rule: ReplicaRule

    @classmethod
    def of(cls, trace: Trace, machine: Devices, names: Sequence[str], rule: ReplicaRule) -> Study:
        """Returns the study.

        Raises:
            UsageError: It makes no sense for this trace.
        """
        chosen = tuple(dict.fromkeys((NOTHING, *names)))
        planners.check_names(chosen)
        num_devices, num_nodes = machine.num_devices, machine.num_nodes
        if rule not in loads.REPLICA_RULES:
            raise UsageError(
                f"there is no replica rule {rule!r}",
                hint=f"choose from {', '.join(loads.REPLICA_RULES)}",
            )
        if machine.num_redundant < 0:
            raise UsageError("a layer cannot have fewer slots than experts", hint="use 0 or more")
        if num_nodes < 1 or num_devices < 1 or num_devices % num_nodes:
            raise UsageError(
                f"{num_devices} devices cannot be dealt evenly to {num_nodes} nodes",
                hint=f"choose a number of nodes that divides {num_devices}",
            )
        for num_experts in sorted({site.num_experts for site in trace.sites}):
            placement.check_slots(num_experts, machine.num_slots(num_experts), num_devices)
        return cls(trace=trace, machine=machine, names=chosen, rule=rule)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Max/mean of dispatches under every planner: the same dispatches in the same order.

    Attributes:
        ratio: [planners, dispatches].
        first_pass: [dispatches].
        num_tokens: [dispatches].
        site: [dispatches] position of the site.
        label: [dispatches] domain.
        floor: [dispatches] the smallest max/mean any placement could have had.
    """

    ratio: Floats
    first_pass: Ints
    num_tokens: Ints
    site: Ints
    label: Ints
    floor: Floats

    def means(self, chosen: Bools) -> Floats:
        """Returns [planners] means over the chosen dispatches."""
        return np.asarray(self.ratio[:, chosen].mean(axis=1), np.float64)


def plans_of(
    study: Study, passes: Passes, sites: Sequence[SiteRows], chosen: Bools
) -> dict[str, list[Layout]]:
    """Returns each planner's layout of every site, planned on the chosen passes."""
    plans: dict[str, list[Layout]] = {name: [] for name in study.names}
    for rows in sites:
        shown = site_rows.history(rows, passes, chosen, min_tokens=MIN_TOKENS)
        if not shown.recorded.sum():
            raise UsageError(
                f"site {rows.site.site} routed nothing in the window that plans",
                hint="record more requests",
            )
        for name in study.names:
            plans[name].append(planners.plan(name, shown, study.machine))
    return plans


def scored(
    study: Study,
    sites: Sequence[SiteRows],
    plans: dict[str, list[Layout]],
    dispatches: Sequence[Dispatches],
) -> Scores:
    """Returns max/mean of the dispatches of all sites under every planner.

    Args:
        study: What was asked for.
        sites: The stack's sites.
        plans: Per planner, a layout per site.
        dispatches: Per site; dispatches without rows are left out.
    """
    ratios = [
        np.concatenate(
            [
                loads.max_over_mean(loads.device_loads(each.rows, layout, study.rule))
                for each, layout in zip(dispatches, plans[name], strict=True)
            ]
        )
        for name in plans
    ]
    machine = study.machine
    floors = [
        loads.bound(
            each.rows, num_devices=machine.num_devices, most_replicas=1 + machine.num_redundant
        )
        for each in dispatches
    ]
    ratio, floor = np.array(ratios), np.concatenate(floors)
    kept = np.isfinite(floor)
    index = [np.full(len(each.rows), place) for place, each in enumerate(dispatches)]
    return Scores(
        ratio=ratio[:, kept],
        first_pass=np.concatenate([each.first_pass for each in dispatches])[kept],
        num_tokens=np.concatenate([each.num_tokens for each in dispatches])[kept],
        site=np.concatenate(index)[kept],
        label=np.concatenate([each.label for each in dispatches])[kept],
        floor=floor[kept],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimates:
    """Means with intervals, and gains paired on the same draws.

    Attributes:
        means: Per planner.
        drawn: [draws, planners] means of each draw; empty without intervals.
        num_blocks: Blocks that were drawn; 0 where there were too few.
    """

    means: intervals.Estimates
    drawn: Floats
    num_blocks: int

    @classmethod
    def of(cls, study: Study, passes: Passes, scores: Scores) -> Estimates:
        """Returns the estimates of scored dispatches of window B."""
        judged_index = np.cumsum(passes.judged) - 1
        block_of_pass = None
        if len(study.trace.requests) >= intervals.MIN_REQUESTS:
            block_of_pass = intervals.block_index(int(passes.judged.sum()), passes.longest_request)
        sums = np.concatenate([scores.ratio, np.ones((1, scores.ratio.shape[1]))]).T
        per_block = None
        if block_of_pass is not None:
            block = block_of_pass[judged_index[scores.first_pass]]
            per_block = np.zeros((int(block_of_pass[-1]) + 1, sums.shape[1]))
            np.add.at(per_block, block, sums)
        rows = intervals.resampled_blocks(
            per_block,
            sums.sum(axis=0),
            _half_weights(passes)[:, scores.first_pass] @ sums,
            _mean_of_sums,
            centered=False,
        )
        return cls(
            means=intervals.summarized(rows, num_requests=len(study.trace.requests)),
            drawn=rows[1:-2],
            num_blocks=0 if per_block is None else len(per_block),
        )

    def gain(
        self,
        planner: int,
        reference: int,
        *,
        percentiles: tuple[float, float] = GAIN_PERCENTILES,
    ) -> tuple[float, float, float]:
        """Returns how much lower the planner's mean is, with its paired interval (95 %)."""
        value = 1 - self.means.value[planner] / self.means.value[reference]
        if not len(self.drawn):
            return float(value), np.nan, np.nan
        drawn = 1 - self.drawn[:, planner] / self.drawn[:, reference]
        low, high = np.nanpercentile(drawn, percentiles)
        return float(value), float(low), float(high)


def _mean_of_sums(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, :-1] / sums[:, -1:], np.float64)


def _half_weights(passes: Passes) -> Floats:
    """Returns [2, passes] the share of each pass's tokens that come from either half."""
    of_pass = passes.part_pass[passes.part_of_token]
    tokens = passes.tokens
    half = tokens.requests.half[tokens.request[passes.token_order]]
    counts = np.stack(
        [np.bincount(of_pass[half == each], minlength=len(passes)) for each in range(2)]
    )
    return np.asarray(counts / np.maximum(counts.sum(axis=0), 1), np.float64)


def uniform_max_over_mean(sites: Sequence[SiteRows], scores: Scores, num_devices: int) -> float:
    """Returns what uniform routing would show at the sites' mean sizes, weighted by dispatches."""
    total = 0.0
    for place, rows in enumerate(sites):
        mine = scores.site == place
        if mine.any():
            size = round(float(scores.num_tokens[mine].mean()))
            total += float(mine.sum()) * uniform_of_site(rows.site, size, num_devices)
    return total / len(scores.site)


def uniform_of_site(site: schema.Site, num_tokens: int, num_devices: int) -> float:
    """Returns what uniform routing of so many tokens at a site would show; remembered."""
    return _cached_uniform(site.num_experts, site.top_k, num_tokens, num_devices)


@functools.lru_cache(maxsize=1024)
def _cached_uniform(num_experts: int, top_k: int, num_tokens: int, num_devices: int) -> float:
    return loads.uniform_max_over_mean(num_experts, top_k, num_tokens, num_devices)
