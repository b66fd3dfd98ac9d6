"""A trace's dispatches as ranks would hold them, with the placements of the replay's planners.

Every pass is what all ranks of an expert-parallel group run together; its tokens lie in the order
in which the replay counts rows, so that contiguous parts of it are ranks. Leaves out running
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import loads, planners, site_rows, windows
from moeprof.replay.loads import Layout
from moeprof.replay.peaks import MIN_TOKENS
from moeprof.replay.planners import Devices, History
from moeprof.replay.tokens import NOT_SEEN
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PlannerSetting:
    """A planner and how many slots it may add.

    Attributes:
        planner: A name from `moeprof.replay.planners.PLANNERS`.
        num_redundant: Slots of a layer beyond one per expert.
    """

    planner: str
    num_redundant: int = 0

    def __str__(self) -> str:
        return f"{self.planner}+{self.num_redundant}" if self.num_redundant else self.planner


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteDispatches:
    """All dispatches of one site.

    Attributes:
        site: The site.
        experts: [tokens, top_k] the passes one after another; -1 in slots that are not executed.
        starts: [passes + 1] first token of each pass.
        rows: [passes, experts] rows of each expert, as the replay counts them.
        judged: [passes] True for those a placement is judged on; the others plan it.
        history: What planners are shown.
    """

    site: schema.Site
    experts: Ids
    starts: Ints
    rows: Ints
    judged: Bools
    history: History

    def __len__(self) -> int:
        return len(self.judged)

    def dispatch(self, index: int) -> Ids:
        """Returns [tokens, top_k] the ids of one pass."""
        return self.experts[self.starts[index] : self.starts[index + 1]]

    def layout(self, setting: PlannerSetting, num_devices: int) -> Layout:
        """Returns the placement that a planner makes of the passes that plan.

        Raises:
            UsageError: There is no such planner, or slots cannot be dealt to the devices.
        """
        machine = Devices(num_devices=num_devices, num_redundant=setting.num_redundant)
        return planners.plan(setting.planner, self.history, machine)

    def device_loads(self, layout: Layout) -> Floats:
        """Returns [passes, devices] the replay's rows per device, replicas dealt round robin."""
        return loads.device_loads(self.rows, layout, "round_robin")

    def joined(self, num_tokens: int) -> tuple[Ids, int]:
        """Returns so many tokens of consecutive judged passes, and how many passes they are.

        The last pass in part; fewer tokens where there are not so many.
        """
        parts: list[Ids] = []
        total = 0
        for index in np.flatnonzero(self.judged).tolist():
            if total >= num_tokens:
                break
            part = self.dispatch(index)
            if len(part):
                parts.append(part)
                total += len(part)
        if not parts:
            return self.experts[:0], 0
        return np.concatenate(parts)[:num_tokens], len(parts)


def site_dispatches(
    trace: Trace, *, stack: str | None = None, sites: Sequence[int] | None = None
) -> list[SiteDispatches]:
    """Returns the dispatches of a stack's sites, ranks of a group merged.

    Args:
        trace: The trace.
        stack: Its stack; the last when None (the decoder, where there are two).
        sites: Site ids wanted; all when None.

    Raises:
        UsageError: There is no such stack or site.
        MoeprofError: The trace is too short to plan and to judge, or a rank is missing.
    """
    name = trace.stacks[-1] if stack is None else stack
    if name not in trace.stacks:
        raise UsageError(
            f"the trace has no stack {name!r}", hint=f"it has: {', '.join(trace.stacks)}"
        )
    known = {site.site: site for site in trace.info.sites_of(name)}
    for site in known if sites is None else sites:
        if site not in known:
            raise UsageError(
                f"the {name} has no site {site}", hint=f"it has: {', '.join(map(str, known))}"
            )
    passes = windows.passes(trace, name)
    pass_of_token = passes.part_pass[passes.part_of_token]
    found = []
    for site in known if sites is None else sites:
        rows = site_rows.site_rows(passes, known[site])
        seen = rows.expert[:, 0] != NOT_SEEN
        starts = np.searchsorted(pass_of_token[seen], np.arange(len(passes) + 1))
        found.append(
            SiteDispatches(
                site=known[site],
                experts=np.maximum(rows.expert[seen], schema.NO_EXPERT).astype(np.int32),
                starts=starts.astype(np.int64),
                rows=rows.passes,
                judged=passes.judged,
                history=site_rows.history(rows, passes, ~passes.judged, min_tokens=MIN_TOKENS),
            )
        )
    return found
