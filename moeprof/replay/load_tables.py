"""The tables of load balancing beside the headline: by site, phase and size; devices; placements.

Each takes scores or plans of one stack and returns a frame, one row per planner and whatever the
table is about.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import loads
from moeprof.replay.loads import Layout
from moeprof.replay.peaks import MIN_TOKENS, Scores, Study, uniform_max_over_mean, uniform_of_site
from moeprof.replay.result import FigureClass
from moeprof.replay.site_rows import SiteRows
from moeprof.replay.windows import Passes
from moeprof.trace import schema

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SIZE_CLASSES = (1, 16, 64, 256, 1024)
"""Smallest tokens of each class in table ``sizes``."""


def whole_window(
    study: Study, passes: Passes, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
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


def _window_loads(
    study: Study, passes: Passes, sites: Sequence[SiteRows], layouts: Sequence[Layout]
) -> Floats:
    """Returns [sites, devices] rows over window B."""
    return np.stack(
        [
            loads.device_loads(rows.passes[passes.judged], layout, study.rule).sum(axis=0)
            for rows, layout in zip(sites, layouts, strict=True)
        ]
    )


def _destinations(
    study: Study, passes: Passes, sites: Sequence[SiteRows], layouts: Sequence[Layout]
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


def by_site(study: Study, sites: Sequence[SiteRows], scores: Scores) -> pd.DataFrame:
    """Returns the headline per site and planner."""
    rows = []
    for place, each in enumerate(sites):
        mine = scores.site == place
        if not mine.any():
            continue
        size = float(scores.num_tokens[mine].mean())
        uniform = uniform_of_site(each.site, round(size), study.machine.num_devices)
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


def by_phase(study: Study, passes: Passes, scores: Scores) -> pd.DataFrame:
    """Returns max/mean of dispatches as recorded, per phase and planner."""
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


def by_size(
    study: Study, sites: Sequence[SiteRows], recorded: Scores, merged: Scores | None
) -> pd.DataFrame:
    """Returns max/mean per class of tokens and planner, beside uniform routing of that size.

    Args:
        study: What was asked for.
        sites: The stack's sites.
        recorded: Scores of dispatches as recorded.
        merged: Scores of merged dispatches, a class of their own; None without any.
    """
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
    study: Study,
    sites: Sequence[SiteRows],
    scores: Scores,
    chosen: Bools,
    name: str,
    figure_class: FigureClass,
) -> list[dict[str, Any]]:
    if not chosen.any():
        return []
    picked = Scores(
        ratio=scores.ratio[:, chosen],
        first_pass=scores.first_pass[chosen],
        num_tokens=scores.num_tokens[chosen],
        site=scores.site[chosen],
        label=scores.label[chosen],
        floor=scores.floor[chosen],
    )
    uniform = uniform_max_over_mean(sites, picked, study.machine.num_devices)
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


def device_table(
    study: Study, passes: Passes, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
) -> pd.DataFrame:
    """Returns rows per device over window B, per planner and site."""
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


def placement_table(
    study: Study, sites: Sequence[SiteRows], plans: dict[str, list[Layout]]
) -> pd.DataFrame:
    """Returns the expert of every slot, per planner and site."""
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
