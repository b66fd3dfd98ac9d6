"""Planning again and again while traffic goes on, charged with the bytes of experts it moves.

The trace is taken in its own order, domains as they come. Its second half is judged; it is cut into
equal segments, and each segment runs on what was planned on the segment before it. Planned once on
the whole first half is the row to compare with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import loads, planners, site_rows
from moeprof.replay.loads import Layout, ReplicaRule
from moeprof.replay.planners import NOTHING, Devices
from moeprof.replay.site_rows import SiteRows
from moeprof.replay.windows import Passes

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SEGMENTS = (1, 2, 4, 8)
"""Placements used over the second half: planned once, or that many times."""
REPLANNING_PLANNERS = (NOTHING, "eplb", "second_moment")

MIN_PASSES = 2
"""Passes a segment must have to be planned on."""

_COLUMNS = (
    "planner",
    "num_plans",
    "figure_class",
    "passes_per_plan",
    "num_dispatches",
    "mean_max_over_mean",
    "gain_over_once",
    "num_experts_moved",
    "bytes_moved",
    "bytes_moved_relabelled",
    "bytes_per_token",
)


def replanned(
    sites: Sequence[SiteRows],
    passes: Passes,
    machine: Devices,
    names: Sequence[str],
    rule: ReplicaRule,
    *,
    min_tokens: int,
) -> pd.DataFrame:
    """Returns balance and bytes moved, by planner and number of plans.

    ``bytes_moved`` counts every expert that a device has to fetch because the new plan puts it
    there and the old one did not; ``bytes_moved_relabelled`` the same after devices swap names so
    that they keep as much as possible, which changes no load. Both are None where the size of an
    expert is unknown; ``num_experts_moved`` counts what ``bytes_moved`` weighs.

    Args:
        sites: Rows of the stack's sites.
        passes: The stack's passes.
        machine: The devices.
        names: Planners asked for; those of `REPLANNING_PLANNERS` are compared.
        rule: Replica rule.
        min_tokens: Tokens of a dispatch that counts; smaller ones are merged where there are none.
    """
    num_passes = len(passes)
    late = np.arange(num_passes) >= num_passes // 2
    merged = not any((rows.pass_tokens[late] >= min_tokens).any() for rows in sites)
    found = []
    for name in (each for each in names if each in REPLANNING_PLANNERS):
        for num_plans in SEGMENTS:
            if num_passes < 2 * num_plans * MIN_PASSES:
                break
            run = _Run(machine=machine, rule=rule, merged=merged, min_tokens=min_tokens)
            for rows in sites:
                run.add(name, rows, passes, num_plans)
            if run.num_dispatches:
                found.append({"planner": name, "num_plans": num_plans, **run.row(late, passes)})
    frame = pd.DataFrame(found, columns=[name for name in _COLUMNS if name != "gain_over_once"])
    if not len(frame):
        return pd.DataFrame(columns=list(_COLUMNS))
    once = frame.groupby("planner", sort=False)["mean_max_over_mean"].transform("first")
    return frame.assign(gain_over_once=1 - frame["mean_max_over_mean"] / once)[list(_COLUMNS)]


def moved_experts(before: Layout, after: Layout, *, relabelled: bool = False) -> int:
    """Returns how many experts devices have to fetch to get from one layout to the next.

    Args:
        before: The layout in use.
        after: The next one.
        relabelled: Let devices swap names first, so that each keeps much of what it holds: the
            pair that shares most is matched first.
    """
    shared = _holdings(before) @ _holdings(after).T
    needed = int(_holdings(after).sum())
    if not relabelled:
        return needed - int(np.trace(shared))
    kept = 0
    left = shared.copy()
    for _ in range(len(shared)):
        one, other = np.unravel_index(int(left.argmax()), left.shape)
        kept += int(left[one, other])
        left[one, :] = -1
        left[:, other] = -1
    # Matching the best pairs first need not beat leaving the names as they are.
    return needed - max(kept, int(np.trace(shared)))


def _holdings(layout: Layout) -> Ints:
    held = np.zeros((layout.num_devices, layout.num_experts), np.int64)
    held[layout.device, layout.expert] = 1
    return held


@dataclass(kw_only=True, eq=False)
class _Run:
    """Sums over sites of one way to replan."""

    machine: Devices
    rule: ReplicaRule
    merged: bool
    min_tokens: int
    total_ratio: float = 0.0
    num_dispatches: int = 0
    experts_moved: int = 0
    sizes_known: bool = True
    bytes_moved: int = 0
    bytes_relabelled: int = 0
    passes_per_plan: float = 0.0

    def add(self, name: str, rows: SiteRows, passes: Passes, num_plans: int) -> None:
        """Adds one site."""
        num_segments = 2 * num_plans
        segment = np.arange(len(passes)) * num_segments // len(passes)
        self.passes_per_plan = len(passes) / num_segments
        plans: list[Layout] = []
        for index in range(num_plans, num_segments):
            before = segment == index - 1
            shown = site_rows.history(rows, passes, before, min_tokens=self.min_tokens)
            if shown.recorded.sum():
                plans.append(planners.plan(name, shown, self.machine))
            elif plans:
                plans.append(plans[-1])
            else:
                return
            self._judge(rows, passes, segment == index, plans[-1])
        self.sizes_known &= rows.site.expert_bytes > 0
        for old, new in itertools.pairwise(plans):
            moved = moved_experts(old, new)
            self.experts_moved += moved
            self.bytes_moved += moved * rows.site.expert_bytes
            fewest = moved_experts(old, new, relabelled=True)
            self.bytes_relabelled += fewest * rows.site.expert_bytes

    def row(self, late: Bools, passes: Passes) -> dict[str, Any]:
        """Returns the table row."""
        of_token = passes.part_pass[passes.part_of_token]
        num_tokens = int(late[of_token].sum())
        return {
            "figure_class": "estimate" if self.merged else "exact",
            "passes_per_plan": self.passes_per_plan,
            "num_dispatches": self.num_dispatches,
            "mean_max_over_mean": self.total_ratio / self.num_dispatches,
            "num_experts_moved": self.experts_moved,
            "bytes_moved": self.bytes_moved if self.sizes_known else None,
            "bytes_moved_relabelled": self.bytes_relabelled if self.sizes_known else None,
            "bytes_per_token": self.bytes_moved / max(num_tokens, 1) if self.sizes_known else None,
        }

    def _judge(self, rows: SiteRows, passes: Passes, chosen: Bools, layout: Layout) -> None:
        take = site_rows.merged_dispatches if self.merged else site_rows.recorded_dispatches
        judged = take(rows, passes, chosen, min_tokens=self.min_tokens)
        ratio = loads.max_over_mean(loads.device_loads(judged.rows, layout, self.rule))
        ratio = ratio[np.isfinite(ratio)]
        self.total_ratio += float(ratio.sum())
        self.num_dispatches += len(ratio)
