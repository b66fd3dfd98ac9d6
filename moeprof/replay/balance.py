"""What placing experts on devices differently would do to the fullest device of each dispatch.

Window A plans and window B judges, split in time within each domain. The headline counts dispatches
of at least 256 tokens: smaller ones are ruled by chance. Nothing a planner or a choice between
planners rests on comes from window B.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import (
    domains,
    intervals,
    loads,
    placement,
    planners,
    replanning,
    site_rows,
    verdicts,
    windows,
    wording,
)
from moeprof.replay.loads import Layout, ReplicaRule
from moeprof.replay.planners import DEFAULT_PLANNERS, NOTHING, Devices
from moeprof.replay.result import FigureClass, Metric, Result
from moeprof.replay.site_rows import Dispatches, SiteRows
from moeprof.replay.windows import Passes
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NAME = "balancing"
MIN_TOKENS = 256
"""Tokens of a dispatch that counts in the headline."""

EPLB = "eplb"
GAIN_PERCENTILES = (2.5, 97.5)
SIZE_CLASSES = (1, 16, 64, 256, 1024)
"""Smallest tokens of each class in table ``sizes``."""


def balancing(
    trace: Trace,
    devices: int = 8,
    *,
    num_redundant: int = 0,
    groups: int = 1,
    nodes: int = 1,
    planners: Sequence[str] = DEFAULT_PLANNERS,
    replica_rule: ReplicaRule = "even",
) -> Result:
    """Returns what each planner's placement does to the load of the fullest device.

    The table has one row per stack and planner: mean and largest max/mean over the headline
    dispatches with the 90 % interval; the same as shares (the paper's average and maximum load);
    what uniform routing would show at that size and the floor no placement could go below;
    balancedness; the gains over doing nothing and over EPLB with their 95 % intervals, paired on
    the same blocks; distinct devices and nodes per token; the worst domain.

    Tables: ``sites``, ``phases``, ``sizes``, ``domains``, ``transfer`` (planned on one domain,
    judged on another), ``replanning`` (over time, charged with bytes), ``ceilings``, ``choice``
    (the comparison within window A that picks the planner the verdict is about), ``devices``
    (rows per device) and ``placements``.

    Args:
        trace: The trace.
        devices: Devices of all nodes.
        num_redundant: Slots of a layer beyond one per expert.
        groups: Expert groups, for EPLB's hierarchical policy.
        nodes: Nodes, for EPLB's hierarchical policy and the nodes per token.
        planners: Names from `moeprof.replay.planners.PLANNERS`; doing nothing is always added.
        replica_rule: ``even`` or ``round_robin``.

    Raises:
        UsageError: An unknown planner or rule, or experts that cannot be dealt to the devices.
        MoeprofError: The trace is too short to be split, or a rank is missing.
    """
    machine = Devices(
        num_devices=devices, num_redundant=num_redundant, num_groups=groups, num_nodes=nodes
    )
    study = _Study.of(trace, machine, planners, replica_rule)
    stacks = [_judge(study, stack) for stack in trace.info.stacks]
    metrics = [metric for judged in stacks for metric in _metrics(study, judged)]
    findings = [
        finding
        for judged in stacks
        for finding in verdicts.findings(
            judged.evidence, num_stacks=len(stacks), section=NAME, nothing=NOTHING
        )
    ]
    frames = {
        name: pd.concat([judged.tables[name] for judged in stacks], ignore_index=True)
        for name in stacks[0].tables
    }
    return Result(
        name=NAME,
        title=f"Placing experts on {devices} devices",
        table=frames.pop("table"),
        metrics=tuple(metrics),
        findings=wording.routing_findings(trace, NAME, findings),
        tables=frames,
        notes=_notes(study, stacks),
    )

_KIND_NOTES: Mapping[verdicts.Kind, str] = types.MappingProxyType(
    {
        "large": f"mean over dispatches of at least {MIN_TOKENS} tokens",
        "merged": f"consecutive dispatches merged to at least {MIN_TOKENS} tokens",
        "small": f"dispatches as recorded: there are not {MIN_TOKENS} tokens to merge",
    }
)


@dataclass(frozen=True, kw_only=True)
class _Study:
    """What was asked for."""

    trace: Trace
    machine: Devices
    names: tuple[str, ...]
    rule: ReplicaRule

    @classmethod
    def of(
        cls, trace: Trace, machine: Devices, names: Sequence[str], rule: ReplicaRule
    ) -> _Study:
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
class _Judged:
    """One stack's answer."""

    stack: str
    passes: Passes
    figure_class: FigureClass
    evidence: verdicts.Evidence
    tables: dict[str, pd.DataFrame]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scores:
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


def _judge(study: _Study, stack: str) -> _Judged:
    passes = windows.passes(study.trace, stack)
    sites = [site_rows.site_rows(passes, site) for site in study.trace.info.sites_of(stack)]
    plans = _plans(study, passes, sites, ~passes.judged)
    judged = passes.judged
    kind, dispatches = _headline(passes, sites, judged)
    headline = _score(study, sites, plans, dispatches)
    recorded = _score(
        study, sites, plans, [site_rows.recorded_dispatches(r, passes, judged) for r in sites]
    )
    figure_class: FigureClass = "estimate" if kind == "merged" else "exact"
    by_domain = domains.judged_domains(sites, passes, plans, study.rule, min_tokens=MIN_TOKENS)
    hindsight = _hindsight(study, sites, dispatches)
    choice = _choice(study, passes, sites)
    estimates = _Estimates.of(study, passes, headline)
    table = _table(study, sites, headline, estimates)
    table.insert(0, "stack", stack)
    table.insert(3, "figure_class", figure_class)
    table = table.merge(_whole_window(study, passes, sites, plans), on="planner")
    table = table.merge(_worst_domains(by_domain), on="planner", how="left")
    ceilings = _ceilings(study, headline, hindsight, table)
    transfer = domains.transfer_between(
        sites, passes, study.machine, study.names, study.rule, min_tokens=MIN_TOKENS
    )
    replanned = replanning.replanned(
        sites, passes, study.machine, study.names, study.rule, min_tokens=MIN_TOKENS
    )
    tables = {
        "table": table,
        "sites": _by_site(study, sites, headline),
        "phases": _by_phase(study, passes, recorded),
        "sizes": _by_size(study, sites, recorded, headline if kind == "merged" else None),
        "domains": by_domain,
        "transfer": transfer,
        "replanning": replanned,
        "ceilings": ceilings,
        "choice": choice,
        "devices": _device_table(study, passes, sites, plans),
        "placements": _placement_table(study, sites, plans),
    }
    for name, frame in tables.items():
        if name != "table":
            frame.insert(0, "stack", stack)
    evidence = verdicts.Evidence(
        stack=stack,
        table=table,
        ceilings=ceilings,
        choice=choice,
        transfer=transfer,
        replanning=replanned,
        kind=kind,
        min_tokens=MIN_TOKENS,
        num_devices=study.machine.num_devices,
        num_blocks=estimates.num_blocks,
        block_passes=passes.longest_request,
        num_domains=len(passes.labels) - 1,
    )
    return _Judged(
        stack=stack, passes=passes, figure_class=figure_class, evidence=evidence, tables=tables
    )


def _plans(
    study: _Study, passes: Passes, sites: Sequence[SiteRows], chosen: Bools
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


def _headline(
    passes: Passes, sites: Sequence[SiteRows], judged: Bools
) -> tuple[verdicts.Kind, list[Dispatches]]:
    """Returns what of the judged passes counts, per site, and of what kind it is.

    ``large``: dispatches with enough tokens. Where there are none, ``merged``: those of one phase
    and domain merged as they follow each other. Where even that is not enough, ``small``:
    dispatches as recorded.
    """
    if any((rows.pass_tokens[judged] >= MIN_TOKENS).any() for rows in sites):
        return "large", [
            site_rows.recorded_dispatches(rows, passes, judged, min_tokens=MIN_TOKENS)
            for rows in sites
        ]
    merged = [
        site_rows.merged_dispatches(rows, passes, judged, min_tokens=MIN_TOKENS) for rows in sites
    ]
    if any(len(each.rows) for each in merged):
        return "merged", merged
    return "small", [site_rows.recorded_dispatches(rows, passes, judged) for rows in sites]


def _score(
    study: _Study,
    sites: Sequence[SiteRows],
    plans: dict[str, list[Layout]],
    dispatches: Sequence[Dispatches],
) -> _Scores:
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
    return _Scores(
        ratio=ratio[:, kept],
        first_pass=np.concatenate([each.first_pass for each in dispatches])[kept],
        num_tokens=np.concatenate([each.num_tokens for each in dispatches])[kept],
        site=np.concatenate(index)[kept],
        label=np.concatenate([each.label for each in dispatches])[kept],
        floor=floor[kept],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Estimates:
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
    def of(cls, study: _Study, passes: Passes, scores: _Scores) -> _Estimates:
        """Returns the estimates of scored dispatches of window B."""
        judged_index = np.cumsum(passes.judged) - 1
        block_of_pass = None
        if len(study.trace.requests) >= intervals.MIN_REQUESTS:
            block_of_pass = intervals.block_index(
                int(passes.judged.sum()), passes.longest_request
            )
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

    def gain(self, planner: int, reference: int) -> tuple[float, float, float]:
        """Returns how much lower the planner's mean is, with its paired 95 % interval."""
        value = 1 - self.means.value[planner] / self.means.value[reference]
        if not len(self.drawn):
            return float(value), np.nan, np.nan
        drawn = 1 - self.drawn[:, planner] / self.drawn[:, reference]
        low, high = np.nanpercentile(drawn, GAIN_PERCENTILES)
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


def _table(
    study: _Study, sites: Sequence[SiteRows], scores: _Scores, estimates: _Estimates
) -> pd.DataFrame:
    """Returns what the headline dispatches show, one row per planner."""
    num_devices = study.machine.num_devices
    uniform = _uniform(sites, scores, num_devices)
    nothing = study.names.index(NOTHING)
    reference = study.names.index(EPLB) if EPLB in study.names else None
    rows = []
    for index, name in enumerate(study.names):
        mean = float(estimates.means.value[index])
        largest = float(scores.ratio[index].max())
        over_nothing = estimates.gain(index, nothing)
        over_eplb = (np.nan,) * 3 if reference is None else estimates.gain(index, reference)
        rows.append(
            {
                "planner": name,
                "num_devices": num_devices,
                "num_dispatches": scores.ratio.shape[1],
                "mean_tokens": float(scores.num_tokens.mean()),
                "mean_max_over_mean": mean,
                "low": float(estimates.means.low[index]),
                "high": float(estimates.means.high[index]),
                "max_max_over_mean": largest,
                "avg_max_load": mean / num_devices,
                "max_load": largest / num_devices,
                "uniform_max_over_mean": uniform,
                "floor_max_over_mean": float(scores.floor.mean()),
                "gain_over_nothing": over_nothing[0],
                "gain_over_nothing_low": over_nothing[1],
                "gain_over_nothing_high": over_nothing[2],
                "gain_over_eplb": over_eplb[0],
                "gain_over_eplb_low": over_eplb[1],
                "gain_over_eplb_high": over_eplb[2],
            }
        )
    return pd.DataFrame(rows)


def _whole_window(
    study: _Study, passes: Passes, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
) -> pd.DataFrame:
    """Returns what all of window B shows, one row per planner."""
    rows = []
    for name, layouts in plans.items():
        reached, nodes = _destinations(study, passes, sites, layouts)
        rows.append(
            {
                "planner": name,
                "num_slots": sum(len(layout.expert) for layout in layouts),
                "balancedness": loads.balancedness(_window_loads(study, passes, sites, layouts)),
                "devices_per_token": reached,
                "nodes_per_token": nodes,
            }
        )
    return pd.DataFrame(rows)


def _uniform(sites: Sequence[SiteRows], scores: _Scores, num_devices: int) -> float:
    """Returns what uniform routing would show at the sites' mean sizes, weighted by dispatches."""
    total = 0.0
    for place, rows in enumerate(sites):
        mine = scores.site == place
        if mine.any():
            size = round(float(scores.num_tokens[mine].mean()))
            total += float(mine.sum()) * _uniform_of(rows.site, size, num_devices)
    return total / len(scores.site)


def _uniform_of(site: schema.Site, num_tokens: int, num_devices: int) -> float:
    return _cached_uniform(site.num_experts, site.top_k, num_tokens, num_devices)


@functools.lru_cache(maxsize=1024)
def _cached_uniform(num_experts: int, top_k: int, num_tokens: int, num_devices: int) -> float:
    return loads.uniform_max_over_mean(num_experts, top_k, num_tokens, num_devices)


def _window_loads(
    study: _Study, passes: Passes, sites: Sequence[SiteRows], layouts: Sequence[Layout]
) -> Floats:
    """Returns [sites, devices] rows over window B."""
    return np.stack(
        [
            loads.device_loads(rows.passes[passes.judged], layout, study.rule).sum(axis=0)
            for rows, layout in zip(sites, layouts, strict=True)
        ]
    )


def _destinations(
    study: _Study, passes: Passes, sites: Sequence[SiteRows], layouts: Sequence[Layout]
) -> tuple[float, float]:
    of_pass = passes.part_pass[passes.part_of_token]
    chosen = passes.judged[of_pass]
    per_node = study.machine.num_devices // study.machine.num_nodes
    found = [
        loads.destinations(of_pass[chosen], rows.expert[chosen], layout, devices_per_node=per_node)
        for rows, layout in zip(sites, layouts, strict=True)
    ]
    reached, nodes = np.nanmean(np.array(found), axis=0)
    return float(reached), float(nodes)


def _worst_domains(by_domain: pd.DataFrame) -> pd.DataFrame:
    """Returns each planner's worst domain: over all sites, and the mean of each site's worst."""
    sites = by_domain["site"] >= 0
    over_all = by_domain[~sites].sort_values("mean_max_over_mean", ascending=False)
    worst = over_all.drop_duplicates("planner")[["planner", "domain"]]
    each = by_domain[sites].groupby(["planner", "site"])["mean_max_over_mean"].max()
    mean = each.groupby("planner").mean().rename("worst_domain_max_over_mean").reset_index()
    return worst.rename(columns={"domain": "worst_domain"}).merge(mean, on="planner")


def _hindsight(
    study: _Study, sites: Sequence[SiteRows], dispatches: Sequence[Dispatches]
) -> float:
    """Returns the mean max/mean of the second-moment placement planned on what it is judged on."""
    machine = study.machine
    ratios = []
    for rows, judged in zip(sites, dispatches, strict=True):
        if not judged.rows.sum():
            continue
        num_experts = rows.site.num_experts
        slots = placement.second_moment(
            judged.rows,
            num_devices=machine.num_devices,
            num_replicas=machine.num_slots(num_experts),
        )
        layout = loads.layout(slots, num_experts=num_experts, num_devices=machine.num_devices)
        ratios.append(loads.max_over_mean(loads.device_loads(judged.rows, layout, study.rule)))
    return float(np.nanmean(np.concatenate(ratios)))


def _ceilings(
    study: _Study, scores: _Scores, hindsight: float, table: pd.DataFrame
) -> pd.DataFrame:
    nothing = float(table["mean_max_over_mean"].iloc[study.names.index(NOTHING)])
    limits = {
        "uniform": float(table["uniform_max_over_mean"].iloc[0]),
        "hindsight": hindsight,
        "floor": float(scores.floor.mean()),
    }
    meanings = {
        "uniform": "uniform routing of as many tokens, nothing placed",
        "hindsight": "the second-moment placement planned on window B itself",
        "floor": "each dispatch by itself, its heaviest expert alone on a device",
    }
    return pd.DataFrame(
        {
            "limit": list(limits),
            "mean_max_over_mean": list(limits.values()),
            "gain_over_nothing": [1 - value / nothing for value in limits.values()],
            "meaning": [meanings[name] for name in limits],
        }
    )


def _choice(study: _Study, passes: Passes, sites: Sequence[SiteRows]) -> pd.DataFrame:
    """Returns the planners compared within window A: its first half plans, its second judges."""
    planning = ~passes.judged
    late = np.zeros(len(passes), bool)
    for label in np.unique(passes.label[planning]).tolist():
        members = np.flatnonzero(planning & (passes.label == label))
        late[members[len(members) // 2 :]] = True
    early = planning & ~late
    if not early.any() or not all(rows.passes[early].sum() for rows in sites):
        return pd.DataFrame({"planner": list(study.names), "mean_max_over_mean": np.nan})
    plans = _plans(study, passes, sites, early)
    _, dispatches = _headline(passes, sites, late)
    scores = _score(study, sites, plans, dispatches)
    return pd.DataFrame(
        {"planner": list(study.names), "mean_max_over_mean": scores.ratio.mean(axis=1)}
    )


def _by_site(study: _Study, sites: Sequence[SiteRows], scores: _Scores) -> pd.DataFrame:
    rows = []
    for place, each in enumerate(sites):
        mine = scores.site == place
        if not mine.any():
            continue
        size = float(scores.num_tokens[mine].mean())
        uniform = _uniform_of(each.site, round(size), study.machine.num_devices)
        for name, ratio in zip(study.names, scores.ratio[:, mine], strict=True):
            rows.append(
                {
                    "site": each.site.site,
                    "layer": each.site.layer,
                    "planner": name,
                    "num_dispatches": int(mine.sum()),
                    "mean_tokens": size,
                    "mean_max_over_mean": float(ratio.mean()),
                    "max_max_over_mean": float(ratio.max()),
                    "uniform_max_over_mean": uniform,
                    "floor_max_over_mean": float(scores.floor[mine].mean()),
                }
            )
    return pd.DataFrame(rows)


def _by_phase(study: _Study, passes: Passes, scores: _Scores) -> pd.DataFrame:
    phase = passes.phase[scores.first_pass]
    rows = []
    for index in np.unique(phase).tolist():
        mine = phase == index
        for name, ratio in zip(study.names, scores.ratio[:, mine], strict=True):
            rows.append(
                {
                    "phase": schema.PHASES[index],
                    "planner": name,
                    "num_dispatches": int(mine.sum()),
                    "mean_tokens": float(scores.num_tokens[mine].mean()),
                    "mean_max_over_mean": float(ratio.mean()),
                    "max_max_over_mean": float(ratio.max()),
                }
            )
    return pd.DataFrame(rows)


def _by_size(
    study: _Study, sites: Sequence[SiteRows], recorded: _Scores, merged: _Scores | None
) -> pd.DataFrame:
    bounds = (*SIZE_CLASSES, np.inf)
    rows = []
    for low, high in itertools.pairwise(bounds):
        chosen = (recorded.num_tokens >= low) & (recorded.num_tokens < high)
        name = f"{low}-{high - 1:.0f}" if np.isfinite(high) else f"{low}-"
        rows += _size_rows(study, sites, recorded, chosen, name, "exact")
    if merged is not None and merged is not recorded:
        everything = np.ones(len(merged.site), bool)
        name = f"merged to {MIN_TOKENS}"
        rows += _size_rows(study, sites, merged, everything, name, "estimate")
    return pd.DataFrame(rows)


def _size_rows(
    study: _Study,
    sites: Sequence[SiteRows],
    scores: _Scores,
    chosen: Bools,
    name: str,
    figure_class: FigureClass,
) -> list[dict[str, Any]]:
    if not chosen.any():
        return []
    picked = _Scores(
        ratio=scores.ratio[:, chosen],
        first_pass=scores.first_pass[chosen],
        num_tokens=scores.num_tokens[chosen],
        site=scores.site[chosen],
        label=scores.label[chosen],
        floor=scores.floor[chosen],
    )
    uniform = _uniform(sites, picked, study.machine.num_devices)
    return [
        {
            "tokens": name,
            "figure_class": figure_class,
            "planner": planner,
            "num_dispatches": int(chosen.sum()),
            "mean_tokens": float(picked.num_tokens.mean()),
            "mean_max_over_mean": float(ratio.mean()),
            "uniform_max_over_mean": uniform,
            "floor_max_over_mean": float(picked.floor.mean()),
        }
        for planner, ratio in zip(study.names, picked.ratio, strict=True)
    ]


def _device_table(
    study: _Study, passes: Passes, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
) -> pd.DataFrame:
    num_devices = study.machine.num_devices
    frames = []
    for name in study.names:
        total = _window_loads(study, passes, sites, plans[name])
        frames.append(
            pd.DataFrame(
                {
                    "planner": name,
                    "site": np.repeat([rows.site.site for rows in sites], num_devices),
                    "device": np.tile(np.arange(num_devices), len(sites)),
                    "num_rows": total.ravel(),
                    "share": (total / total.sum(axis=1, keepdims=True)).ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _placement_table(
    study: _Study, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {
                "planner": name,
                "site": rows.site.site,
                "slot": np.arange(len(layout.expert)),
                "device": layout.device,
                "expert": layout.expert,
                "replica": layout.replica,
            }
        )
        for name in study.names
        for rows, layout in zip(sites, plans[name], strict=True)
    ]
    return pd.concat(frames, ignore_index=True)


def _metrics(study: _Study, judged: _Judged) -> list[Metric]:
    metrics = []
    for row in judged.tables["table"].to_dict("records"):
        place = f"{judged.stack}/{row['planner']}"
        note = _KIND_NOTES[judged.evidence.kind]
        metrics.append(
            Metric(
                name=f"{NAME}/max_over_mean/{place}",
                value=row["mean_max_over_mean"],
                low=_or_none(row["low"]),
                high=_or_none(row["high"]),
                unit="ratio",
                figure_class=judged.figure_class,
                better="lower",
                note=note,
            )
        )
        metrics.append(
            Metric(
                name=f"{NAME}/balancedness/{place}",
                value=_or_none(row["balancedness"]),
                unit="ratio",
                figure_class="exact",
                better="higher",
                note="mean over largest load of window B, devices reduced first, then sites",
            )
        )
        for reference in ("nothing", EPLB):
            if row["planner"] in (reference, NOTHING) or np.isnan(row[f"gain_over_{reference}"]):
                continue
            metrics.append(
                Metric(
                    name=f"{NAME}/gain_over_{reference}/{place}",
                    value=row[f"gain_over_{reference}"],
                    low=_or_none(row[f"gain_over_{reference}_low"]),
                    high=_or_none(row[f"gain_over_{reference}_high"]),
                    unit="share",
                    figure_class=judged.figure_class,
                    better="higher",
                    note="95 % interval, paired over blocks of consecutive passes; " + note,
                )
            )
    return metrics


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _notes(study: _Study, stacks: Sequence[_Judged]) -> tuple[str, ...]:
    notes = [
        "Window A plans, window B judges; each domain is split in time by itself, where the fewest "
        "requests run across the cut.",
        f"Headline: dispatches of at least {MIN_TOKENS} tokens. Loads are rows; balance is not "
        "time.",
        "Intervals of gains are 95 %, paired over blocks of consecutive passes as long as the "
        "longest request; others are 90 %.",
        f"Replicas share rows by the rule {study.rule!r}; distinct devices per token are counted "
        "round robin.",
    ]
    if study.machine.num_redundant:
        notes.append("Doing nothing ('contiguous') adds no replicas.")
    if study.machine.num_nodes > 1:
        notes.append("Only EPLB's hierarchical policy keeps expert groups on one node.")
    for judged in stacks:
        if judged.evidence.kind == "merged":
            notes.append(
                f"No dispatch of the {judged.stack} in window B has {MIN_TOKENS} tokens: "
                "consecutive dispatches of one phase and domain were merged, which is an estimate "
                "(see table sizes)."
            )
        if judged.evidence.kind == "small":
            notes.append(
                f"Window B of the {judged.stack} does not hold {MIN_TOKENS} tokens of one phase "
                "and domain: its dispatches count as recorded, and chance rules them."
            )
        if judged.passes.straddling > 0:
            share = wording.percent(judged.passes.straddling)
            notes.append(
                f"{share} of the {judged.stack}'s tokens in window B belong to requests that "
                "window A saw too."
            )
        if judged.passes.mixes:
            notes.append(
                f"Passes of the {judged.stack} mix domains; domains and transfer are judged on "
                "each domain's tokens by themselves, which is an estimate."
            )
    return tuple(notes)
