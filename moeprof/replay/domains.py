"""Placements between domains: planned on one kind of traffic, judged on another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import loads, placement, planners, site_rows
from moeprof.replay.loads import Layout, ReplicaRule
from moeprof.replay.planners import NOTHING, Devices, History
from moeprof.replay.site_rows import SiteRows
from moeprof.replay.windows import Passes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ALL = "(all)"
"""Planned on all domains."""
OTHERS = "(others)"
"""Planned on all domains but the one that judges."""
ALL_SITES = -1
ROBUST = "robust"
"""The planner that is about several domains: it is not asked to plan on a single one."""
TRANSFER_PLANNERS = (NOTHING, "greedy", "eplb", "second_moment", ROBUST)

_COLUMNS = (
    "planner",
    "planned_on",
    "judged_on",
    "figure_class",
    "num_dispatches",
    "mean_max_over_mean",
    "max_max_over_mean",
    "balancedness",
)


def transfer(
    counts: pd.DataFrame,
    devices: int = 8,
    *,
    num_redundant: int = 0,
    planners: Sequence[str] = TRANSFER_PLANNERS,
    replica_rule: ReplicaRule = "even",
) -> pd.DataFrame:
    """Returns how placements do on other domains than they were planned on, from counts alone.

    Where only sums per domain are known (no dispatches), a domain is one dispatch. A domain that
    judges what was planned on itself judges what the planner saw: an upper limit, not a test.

    Args:
        counts: Columns domain, layer, expert, count; one row per domain, layer and expert.
        devices: Devices.
        num_redundant: Slots of a layer beyond one per expert.
        planners: Names from `moeprof.replay.planners.PLANNERS`.
        replica_rule: ``even`` or ``round_robin``.

    Returns:
        One row per planner, ``planned_on`` (a domain, ``(all)`` or ``(others)``) and ``judged_on``.
    """
    missing = {"domain", "layer", "expert", "count"} - set(counts.columns)
    if missing:
        raise UsageError(
            f"the counts have no column {sorted(missing)[0]!r}",
            hint="give columns domain, layer, expert and count",
        )
    wide = counts.pivot_table(
        index=["layer", "domain"], columns="expert", values="count", aggfunc="sum", fill_value=0
    )
    names = sorted(map(str, counts["domain"].unique()))
    machine = Devices(num_devices=devices, num_redundant=num_redundant)
    traffic = []
    for site, layer in enumerate(sorted(counts["layer"].unique())):
        rows = wide.loc[layer]
        by_domain = {str(domain): rows.loc[[domain]].to_numpy(np.int64) for domain in rows.index}
        traffic.append(_Traffic(site=site, planned=by_domain, shown=by_domain, judged=by_domain))
    classes = dict.fromkeys(names, "exact")
    return _matrix(traffic, names, classes, machine, tuple(planners), replica_rule)


def judged_domains(
    sites: Sequence[SiteRows],
    passes: Passes,
    plans: Mapping[str, Sequence[Layout]],
    rule: ReplicaRule,
    *,
    min_tokens: int,
) -> pd.DataFrame:
    """Returns each planner's max/mean per domain of window B, planned on all domains.

    Site -1 stands for all sites of the stack together.
    """
    classes, judged = _judged(sites, passes, min_tokens)
    rows = []
    for label, name in _domains(passes):
        if label not in classes:
            continue
        for planner, layouts in plans.items():
            ratios = [
                loads.max_over_mean(loads.device_loads(found[label], layout, rule))
                for found, layout in zip(judged, layouts, strict=True)
            ]
            ids = [ALL_SITES, *(each.site.site for each in sites)]
            for site, ratio in zip(ids, [np.concatenate(ratios), *ratios], strict=True):
                if len(ratio):
                    rows.append(
                        {
                            "planner": planner,
                            "domain": name,
                            "site": site,
                            "figure_class": classes[label],
                            "num_dispatches": len(ratio),
                            "mean_max_over_mean": float(np.nanmean(ratio)),
                            "max_max_over_mean": float(np.nanmax(ratio)),
                        }
                    )
    return pd.DataFrame(rows)


def transfer_between(
    sites: Sequence[SiteRows],
    passes: Passes,
    machine: Devices,
    names: Sequence[str],
    rule: ReplicaRule,
    *,
    min_tokens: int,
) -> pd.DataFrame:
    """Returns placements planned on window A of one domain and judged on window B of each.

    Empty where there is one domain only.

    Args:
        sites: Rows of the stack's sites.
        passes: The stack's passes.
        machine: The devices.
        names: Planners asked for; those of `TRANSFER_PLANNERS` are compared.
        rule: Replica rule.
        min_tokens: Tokens that smaller dispatches are merged to.
    """
    classes, judged = _judged(sites, passes, min_tokens)
    labels = [(label, name) for label, name in _domains(passes) if label in classes]
    planned_labels = set(passes.part_label[~passes.judged[passes.part_pass]].tolist())
    labels = [(label, name) for label, name in labels if label in planned_labels]
    if len(labels) < 2:  # noqa: PLR2004
        return pd.DataFrame(columns=list(_COLUMNS))
    traffic = []
    for rows, found in zip(sites, judged, strict=True):
        planning = ~passes.judged[passes.part_pass]
        merged = site_rows.merged_parts(
            rows, passes, ~passes.judged, min_tokens=min_tokens, all_groups=True
        )
        traffic.append(
            _Traffic(
                site=rows.site.site,
                planned={
                    name: rows.parts[
                        planning & (passes.part_label == label) & (rows.part_tokens > 0)
                    ]
                    for label, name in labels
                },
                shown={name: merged.rows[merged.label == label] for label, name in labels},
                judged={name: found[label] for label, name in labels},
            )
        )
    chosen = tuple(name for name in names if name in TRANSFER_PLANNERS)
    return _matrix(
        traffic,
        [name for _, name in labels],
        {name: classes[label] for label, name in labels},
        machine,
        chosen,
        rule,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Traffic:
    """What one site saw of each domain: recorded and merged to plan on, and to judge on."""

    site: int
    planned: Mapping[str, Ints]
    shown: Mapping[str, Ints]
    judged: Mapping[str, Ints]

    def history(self, domains: Sequence[str]) -> History:
        """Returns the planning part of some domains as one history."""
        shown = np.concatenate([self.shown[name] for name in domains])
        sizes = [len(self.shown[name]) for name in domains]
        return History(
            recorded=np.concatenate([self.planned[name] for name in domains]),
            merged=shown,
            parts=shown,
            domain=np.repeat(np.arange(len(domains)), sizes),
            site=self.site,
        )


def _matrix(
    traffic: Sequence[_Traffic],
    domains: Sequence[str],
    classes: Mapping[str, str],
    machine: Devices,
    names: tuple[str, ...],
    rule: ReplicaRule,
) -> pd.DataFrame:
    planners.check_names(names)
    for site in traffic:
        num_experts = next(iter(site.planned.values())).shape[1]
        placement.check_slots(num_experts, machine.num_slots(num_experts), machine.num_devices)
    rows = []
    for name in names:
        for source, targets in _plannings(domains):
            if name == ROBUST and len(source.domains) == 1:
                continue
            layouts = [
                planners.plan(name, each.history(source.domains), machine) for each in traffic
            ]
            for target in targets:
                rows.append(
                    {
                        "planner": name,
                        "planned_on": source.name,
                        "judged_on": target,
                        "figure_class": classes[target],
                        **_outcome(traffic, layouts, target, rule),
                    }
                )
    return pd.DataFrame(rows, columns=list(_COLUMNS))


@dataclass(frozen=True)
class _Source:
    """The domains a placement is planned on."""

    name: str
    domains: tuple[str, ...]


def _plannings(domains: Sequence[str]) -> list[tuple[_Source, tuple[str, ...]]]:
    """Returns what to plan on, each with the domains that judge it."""
    everything = tuple(domains)
    found = [(_Source(name, (name,)), everything) for name in domains]
    found.append((_Source(ALL, everything), everything))
    if len(domains) > 1:
        for name in domains:
            others = tuple(each for each in domains if each != name)
            found.append((_Source(OTHERS, others), (name,)))
    return found


def _outcome(
    traffic: Sequence[_Traffic], layouts: Sequence[Layout], target: str, rule: ReplicaRule
) -> dict[str, Any]:
    reached = [
        loads.device_loads(each.judged[target], layout, rule)
        for each, layout in zip(traffic, layouts, strict=True)
    ]
    ratio = np.concatenate([loads.max_over_mean(each) for each in reached])
    return {
        "num_dispatches": len(ratio),
        "mean_max_over_mean": float(np.nanmean(ratio)),
        "max_max_over_mean": float(np.nanmax(ratio)),
        "balancedness": loads.balancedness(np.stack([each.sum(axis=0) for each in reached])),
    }


def _domains(passes: Passes) -> list[tuple[int, str]]:
    return list(enumerate(passes.labels[:-1]))


def _judged(
    sites: Sequence[SiteRows], passes: Passes, min_tokens: int
) -> tuple[dict[int, str], list[dict[int, Ints]]]:
    """Returns the class of each judged domain, and per site the dispatches that judge it.

    A domain's dispatches of enough tokens, as recorded; where it has none, or shares its passes
    with other domains, its tokens by themselves, merged.
    """
    in_window = passes.judged[passes.part_pass]
    classes: dict[int, str] = {}
    found: list[dict[int, Ints]] = [{} for _ in sites]
    merged = [
        site_rows.merged_parts(rows, passes, passes.judged, min_tokens=min_tokens, all_groups=True)
        for rows in sites
    ]
    for label, _ in _domains(passes):
        mine = in_window & (passes.part_label == label)
        large = [mine & (rows.part_tokens >= min_tokens) for rows in sites]
        pure = bool((passes.label[passes.part_pass[mine]] == label).all())
        if pure and any(each.any() for each in large):
            classes[label] = "exact"
            for place, (rows, each) in enumerate(zip(sites, large, strict=True)):
                found[place][label] = rows.parts[each]
        elif any((each.label == label).any() for each in merged):
            classes[label] = "estimate"
            for place, each in enumerate(merged):
                found[place][label] = _large_enough(each, label, min_tokens)
    return classes, found


def _large_enough(merged: site_rows.Dispatches, label: int, min_tokens: int) -> Ints:
    mine = merged.label == label
    large = mine & (merged.num_tokens >= min_tokens)
    chosen: Ints = merged.rows[large if large.any() else mine]
    return chosen
