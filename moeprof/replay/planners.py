"""The planners that `balancing` compares, by name, and what each of them is shown.

A planner sees window A only. The paper's planners and EPLB see the dispatches as recorded; ours see
them merged to 256 tokens where they were smaller, so that chance does not pass for structure, and
mixed anew from each domain's tokens where dispatches mix domains.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import loads, placement
from moeprof.replay.loads import Layout

Ints = NDArray[np.int64]

NOTHING = "contiguous"
"""The planner that stands for doing nothing."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The machine a placement is made for.

    Attributes:
        num_devices: Devices of all nodes.
        num_redundant: Slots of a layer beyond one per expert.
        num_groups: Expert groups of group-limited routing.
        num_nodes: Nodes.
    """

    num_devices: int
    num_redundant: int = 0
    num_groups: int = 1
    num_nodes: int = 1

    def num_slots(self, num_experts: int) -> int:
        """Returns the slots of a layer."""
        return num_experts + self.num_redundant


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """What a planner is shown of one site.

    Attributes:
        recorded: [dispatches, experts] rows, as recorded.
        merged: [groups, experts] rows of dispatches merged to a size that means something, or
            mixed anew.
        parts: [parts, experts] the same within each domain.
        domain: [parts] domain of each.
        site: Id of the site; seeds the random placement.
    """

    recorded: Ints
    merged: Ints
    parts: Ints
    domain: Ints
    site: int

    @property
    def num_experts(self) -> int:
        """Experts of the site."""
        return int(self.recorded.shape[1])


Planner = Callable[[History, Devices], Layout]


def plan(name: str, history: History, devices: Devices) -> Layout:
    """Returns the placement that the planner called ``name`` makes of a history.

    Raises:
        UsageError: There is no such planner.
    """
    check_names((name,))
    return PLANNERS[name](history, devices)


def check_names(names: tuple[str, ...]) -> None:
    """Refuses names that no planner has.

    Raises:
        UsageError: There is no such planner.
    """
    for name in names:
        if name not in PLANNERS:
            raise UsageError(
                f"there is no planner {name!r}", hint=f"choose from {', '.join(PLANNERS)}"
            )


def _contiguous(history: History, devices: Devices) -> Layout:
    # Doing nothing adds no replicas; they are used only where the experts alone do not fit evenly.
    slots = history.num_experts
    if slots % devices.num_devices:
        slots = devices.num_slots(history.num_experts)
    return _laid_out(
        placement.contiguous(
            history.num_experts, num_devices=devices.num_devices, num_replicas=slots
        ),
        history,
        devices,
    )


def _random(history: History, devices: Devices) -> Layout:
    chosen = placement.random(
        history.num_experts,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
        seed=history.site,
    )
    return _laid_out(chosen, history, devices)


def _greedy(history: History, devices: Devices) -> Layout:
    chosen = placement.greedy(
        history.recorded,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
    )
    return _laid_out(chosen, history, devices)


def _anticorrelation(history: History, devices: Devices) -> Layout:
    chosen = placement.anticorrelation(
        history.recorded,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
    )
    return _laid_out(chosen, history, devices)


def _anticorrelation_relative(history: History, devices: Devices) -> Layout:
    chosen = placement.anticorrelation(
        history.recorded,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
        scaling="relative",
    )
    return _laid_out(chosen, history, devices)


def _eplb(history: History, devices: Devices) -> Layout:
    return _by_eplb(history, devices, devices.num_groups, devices.num_nodes)


def _eplb_global(history: History, devices: Devices) -> Layout:
    return _by_eplb(history, devices, 1, 1)


def _by_eplb(history: History, devices: Devices, num_groups: int, num_nodes: int) -> Layout:
    slots, log2phy, _ = placement.eplb(
        history.recorded.sum(axis=0)[None],
        num_replicas=devices.num_slots(history.num_experts),
        num_groups=num_groups,
        num_nodes=num_nodes,
        num_devices=devices.num_devices,
    )
    replica = np.empty(slots.shape[1], np.int64)
    expert, number = np.nonzero(log2phy[0] >= 0)
    replica[log2phy[0][expert, number]] = number
    return Layout(
        expert=slots[0],
        replica=replica,
        num_experts=history.num_experts,
        num_devices=devices.num_devices,
    )


def _second_moment(history: History, devices: Devices) -> Layout:
    chosen = placement.second_moment(
        history.merged,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
    )
    return _laid_out(chosen, history, devices)


def _peak(history: History, devices: Devices) -> Layout:
    chosen = placement.peak(
        history.merged,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
    )
    return _laid_out(chosen, history, devices)


def _robust(history: History, devices: Devices) -> Layout:
    chosen = placement.robust(
        history.parts,
        history.domain,
        num_devices=devices.num_devices,
        num_replicas=devices.num_slots(history.num_experts),
    )
    return _laid_out(chosen, history, devices)


def _laid_out(phy2log: Ints, history: History, devices: Devices) -> Layout:
    return loads.layout(phy2log, num_experts=history.num_experts, num_devices=devices.num_devices)


PLANNERS: Mapping[str, Planner] = types.MappingProxyType(
    {
        "contiguous": _contiguous,
        "random": _random,
        "greedy": _greedy,
        "anticorrelation": _anticorrelation,
        "anticorrelation_relative": _anticorrelation_relative,
        "eplb": _eplb,
        "eplb_global": _eplb_global,
        "second_moment": _second_moment,
        "peak": _peak,
        "robust": _robust,
    }
)
"""All planners: nothing, chance, the paper's, EPLB's two policies, and our own."""

DEFAULT_PLANNERS = (
    "contiguous",
    "random",
    "greedy",
    "anticorrelation",
    "anticorrelation_relative",
    "eplb",
    "second_moment",
    "peak",
    "robust",
)
