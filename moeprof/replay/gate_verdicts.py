"""What to do about gating: try, do not try, or not enough evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprof.replay import wording
from moeprof.replay.intervals import Interval
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, SEVERITY_WARNING, Finding

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "gating"
WORTH_TRYING = 1.1
"""Static gating that processes this many rows per row needed is worth replacing."""

_SAME = 0.01
_RARE = 0.001


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated:
    """A capacity rule applied to one phase of a stack.

    Attributes:
        stack: The stack.
        phase: The phase, or ``all``.
        rule: The rule; ``mixed`` where sites differ.
        value: Its parameter.
        drops_class: ``exact`` or ``estimate``.
        ratios: Ratios with intervals, by name.
        row: The row of table ``stacks``.
    """

    stack: str
    phase: str
    rule: str
    value: float
    drops_class: str
    ratios: Mapping[str, Interval]
    row: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The rule in words."""
        return self.rule if np.isnan(self.value) else f"{self.rule} {self.value:g}"

    @property
    def where(self) -> str:
        """Last parts of the names of its metrics."""
        return f"{self.stack}/{self.phase}/{self.label.replace(' ', '-')}"


def verdicts(trace: Trace, gated: Sequence[Gated], *, tile: int) -> list[Finding]:
    """Returns one verdict per stack, rule and the stack's main phase.

    Args:
        trace: The trace.
        gated: All rules, stacks and phases.
        tile: Rows of a tile.
    """
    findings = []
    for stack in trace.info.stacks:
        of_stack = [each for each in gated if each.stack == stack and each.phase != "all"]
        if not of_stack:
            continue
        phase = wording.main_phase(tuple(dict.fromkeys(each.phase for each in of_stack)))
        executed = executed_per_routed(trace, stack)
        for each in of_stack:
            if each.phase == phase:
                findings.append(
                    _verdict(trace, each, executed, tile=tile, num_stacks=len(trace.info.stacks))
                )
    return findings


def executed_per_routed(trace: Trace, stack: str) -> float | None:
    """Returns rows that experts ran on for each row routed to them; None where not seen."""
    sites = [site.site for site in trace.info.sites_of(stack)]
    executed = trace.executed
    seen = executed[executed["site"].isin(sites) & executed["num_executed_rows"].notna()]
    routed = float(seen["num_routed_rows"].sum())
    return float(seen["num_executed_rows"].sum()) / routed if routed else None


def _verdict(
    trace: Trace, gated: Gated, executed: float | None, *, tile: int, num_stacks: int
) -> Finding:
    where = wording.place(gated.stack, gated.phase, num_stacks=num_stacks)
    waste, dropped = gated.ratios["waste_factor"], gated.ratios["dropped_share"]
    tiles = gated.ratios["dynamic_tile_padding"]
    has_rule = any(site.capacity_rule is not None for site in trace.info.sites_of(gated.stack))
    is_dynamic = not has_rule if executed is None else abs(executed - 1) <= _SAME
    drops = "drops nothing"
    if dropped.value:
        drops = f"drops {wording.share_with_interval(dropped)} of the choices"
        drops += " (estimate)" if gated.drops_class == "estimate" else ""
    cost = (
        f"it processes {wording.number_with_interval(waste)} rows for each row needed and {drops}"
    )
    ceiling = (
        f"No gating can process fewer than 1 row for each row needed; in tiles of {tile} rows "
        f"dynamic gating computes {wording.number_with_interval(tiles)}."
    )
    today = _today(executed, has_rule=has_rule)
    low, high = waste.low, waste.high
    severity = SEVERITY_FACT
    if low is None or high is None:
        text = f"Not enough evidence on static gating with {gated.label} in {where}: {cost}."
        severity = SEVERITY_FACT - 2
    elif high < WORTH_TRYING and (dropped.high or 0.0) <= _RARE:
        text = (
            f"Try static gating with {gated.label} in {where} if fixed shapes help you: {cost}. "
            f"Doing nothing costs at most that: {today}."
        )
    elif low <= WORTH_TRYING <= high:
        text = (
            f"Not enough evidence to choose between static gating with {gated.label} and dynamic "
            f"gating in {where}: {cost}."
        )
    elif is_dynamic:
        text = (
            f"Do not try static gating with {gated.label} in {where}: {cost}. Do nothing: {today}."
        )
    elif low > WORTH_TRYING:
        text = (
            f"Try dynamic gating in {where}: with {gated.label}, {cost}. Doing nothing keeps that: "
            f"{today}."
        )
        severity = SEVERITY_COST
    else:
        text = (
            f"Try dynamic gating in {where} for what it keeps, not for speed: with {gated.label}, "
            f"{cost}; {today}."
        )
        severity = SEVERITY_WARNING
    return Finding(
        text=f"{text} {ceiling}",
        severity=severity,
        section=NAME,
        metric=f"{NAME}/waste_factor/{gated.where}",
    )


def _today(executed: float | None, *, has_rule: bool) -> str:
    """Returns what the recorded run did, in words."""
    if executed is not None and abs(executed - 1) <= _SAME:
        return "this run executed the routed rows and no others, which is dynamic gating"
    if executed is not None:
        return f"this run executed {wording.number(executed)} rows for each one routed"
    if has_rule:
        return "the model has a capacity rule, and what it executed was not seen"
    return "the model has no capacity rule, so nothing is dropped today"
