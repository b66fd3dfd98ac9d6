"""The replays that a report runs, at settings that keep it quick, each named on the page.

What the settings leave out is said in the section, with the command that gives the rest. Nothing is
sampled: every replay sees the whole trace. A trace to which a replay does not apply gets one
sentence.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moeprof.errors import MoeprofError
from moeprof.replay import balancing, buffering, gating
from moeprof.replay.capacity import PAPER_FRACTIONS
from moeprof.replay.planners import DEFAULT_PLANNERS
from moeprof.replay.result import Result
from moeprof.reporting import balancing_sections, buffering_sections, gating_sections
from moeprof.reporting.layout import SectionData
from moeprof.reporting.vocabulary import absent_section
from moeprof.trace.reader import Trace

SWEEP = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Slots per token and expert that the curves of gating go through."""
POLICIES = ("paper", "fifo", "lru", "lfu", "min", "bound")
NUM_CAPACITIES = 8
MAX_DEVICES = 8
PLANNERS = ("contiguous", "greedy", "anticorrelation", "eplb", "second_moment")
SEARCHING = ("second_moment",)
"""Planners of `PLANNERS` that search: their time grows with the pairs of experts of each layer."""
MAX_PAIRS = 1_000_000
"""Pairs of experts, over all layers, up to which a report lets planners search (seconds)."""

_TITLES = {
    "gating": "Gating",
    "buffering": "Expert buffering",
    "balancing": "Load balancing",
}
_QUESTIONS = {
    "gating": gating_sections.QUESTION,
    "buffering": buffering_sections.QUESTION,
    "balancing": balancing_sections.QUESTION,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """One replay of a trace.

    Attributes:
        section: Its section, or the sentence in place of it.
        result: What the section shows; None where the replay does not apply.
    """

    section: SectionData
    result: Result | None


def replayed(trace: Trace, name: str) -> Replayed:
    """Returns a replay of a trace at the settings of a report.

    Args:
        trace: The trace.
        name: One of `layout.REPLAYS`.
    """
    absence = absence_of(trace, name)
    if not absence:
        try:
            return _REPLAYS[name](trace)
        except MoeprofError as error:
            hint = f" ({error.hint})" if error.hint else ""
            absence = f"{_TITLES[name]} cannot be replayed on this trace: {error.message}{hint}."
    section = absent_section(name, title=_TITLES[name], question=_QUESTIONS[name], absence=absence)
    return Replayed(section=section, result=None)


def own_fraction(trace: Trace) -> float:
    """Returns the slots per token and expert that the founding paper gives a model of this task."""
    return PAPER_FRACTIONS.get(trace.info.model.task, PAPER_FRACTIONS["lm"])


def capacities_of(trace: Trace, devices: int, *, most: int) -> list[int]:
    """Returns slots per cache, from 1 to what one device holds of the largest site.

    Args:
        trace: The trace.
        devices: Devices the experts lie on.
        most: Most sizes, evenly spread.
    """
    largest = -(-max(site.num_experts for site in trace.sites) // devices)
    steps = np.unique(np.linspace(1, largest, min(largest, most)).round().astype(int))
    return [int(step) for step in steps]


def devices_for(trace: Trace, wanted: int) -> int:
    """Returns the most devices, up to ``wanted``, to which the experts of all sites divide."""
    return max(
        count
        for count in range(1, wanted + 1)
        if all(site.num_experts % count == 0 for site in trace.sites)
    )


def planners_for(trace: Trace) -> tuple[str, ...]:
    """Returns the planners that a report can wait for."""
    if sum(site.num_experts**2 for site in trace.sites) <= MAX_PAIRS:
        return PLANNERS
    return tuple(name for name in PLANNERS if name not in SEARCHING)


def absence_of(trace: Trace, name: str) -> str:
    """Returns why a replay does not apply, as far as the model's shape tells; else nothing."""
    title = _TITLES[name]
    if not trace.sites:
        return f"{title} does not apply: the model has no Mixture-of-Experts layers."
    if name == "buffering":
        if any(site.expert_bytes <= 0 for site in trace.sites):
            return f"{title} does not apply: the trace does not say how large an expert is."
        if all(site.num_experts == 1 for site in trace.sites):
            return f"{title} does not apply: no layer has an expert that a cache could do without."
    if name == "balancing" and devices_for(trace, MAX_DEVICES) == 1:
        counts = " or ".join(str(n) for n in sorted({site.num_experts for site in trace.sites}))
        return (
            f"{title} does not apply: {counts} experts cannot be dealt evenly to any number of "
            f"devices from 2 to {MAX_DEVICES}; moeprof replay balancing TRACE --num-redundant "
            "adds replicas until they can."
        )
    return ""


def _gating(trace: Trace) -> Replayed:
    own = all(site.capacity_rule is not None for site in trace.sites)
    fraction = own_fraction(trace)
    result = gating(trace, "model") if own else gating(trace, values=[fraction])
    sweep = gating(trace, values=SWEEP)
    section = gating_sections.gating_section(trace, result, sweep=sweep)
    rule = (
        "the model's own capacity rule"
        if own
        else f"token_fraction {fraction:g}, the founding paper's for this task"
    )
    _lead(
        section,
        f"Settings here: {rule}; curves for token_fraction {_listed(SWEEP)}; one device. Other "
        "rules, values and devices, and every row: moeprof replay gating TRACE --rule "
        "capacity_factor --values 1.0,2.0 --devices 8 --csv.",
    )
    return Replayed(section=section, result=result)


def _buffering(trace: Trace) -> Replayed:
    capacities = capacities_of(trace, 1, most=NUM_CAPACITIES)
    result = buffering(trace, policies=POLICIES, capacities=capacities)
    section = buffering_sections.buffering_section(trace, result)
    _lead(
        section,
        f"Settings here: policies {', '.join(POLICIES)}; {_listed(capacities)} slots per layer; "
        "one device, batch semantics, caches empty at first. Other policies (arc, s3fifo, "
        "lifo, random, min_bypass, pinned, layers), sizes, scopes and devices, and every row: "
        f"moeprof replay buffering TRACE --policies lru,arc,s3fifo,bound --capacities "
        f"{','.join(map(str, capacities))} --csv.",
    )
    return Replayed(section=section, result=result)


def _balancing(trace: Trace) -> Replayed:
    devices = devices_for(trace, MAX_DEVICES)
    planners = planners_for(trace)
    result = balancing(trace, devices, planners=planners)
    section = balancing_sections.balancing_section(trace, result)
    left_out = [name for name in DEFAULT_PLANNERS if name not in planners]
    reason = (
        ", some of them because searching takes minutes with so many experts"
        if planners != PLANNERS
        else ""
    )
    _lead(
        section,
        f"Settings here: {devices} devices, no replicas, one node; planners "
        f"{', '.join(planners)}. Planners left out{reason}: {', '.join(left_out)}. They, other "
        f"devices, replicas and nodes: moeprof replay balancing TRACE --devices {devices} --csv.",
    )
    return Replayed(section=section, result=result)


def _lead(section: SectionData, note: str) -> None:
    """Puts the settings before all other notes."""
    section["notes"].insert(0, note)


def _listed(numbers: tuple[float, ...] | list[int]) -> str:
    *first, last = (f"{number:g}" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


_REPLAYS: Mapping[str, Callable[[Trace], Replayed]] = types.MappingProxyType(
    {"gating": _gating, "buffering": _buffering, "balancing": _balancing}
)
