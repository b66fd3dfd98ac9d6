"""Rows per device: from rows per expert and a placement to loads, their peaks and their yardsticks.

All loads are rows (token, slot pairs). Leaves out which placement to choose (`placement`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeprof.replay import placement
from moeprof.replay.compiled import compiled, filled_int64

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ReplicaRule = Literal["even", "round_robin"]
REPLICA_RULES: tuple[ReplicaRule, ...] = ("even", "round_robin")

_EXACT_ROWS = 2048
_SAMPLES = 400
_GRID = 4001


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One layer's slots on devices.

    Attributes:
        expert: [slots] expert of each slot; device ``d`` has the ``d``-th equal part of them.
        replica: [slots] the how-manieth replica of its expert it is, from 0.
        num_experts: Experts of the layer.
        num_devices: Devices.
    """

    expert: Ints
    replica: Ints
    num_experts: int
    num_devices: int

    @property
    def device(self) -> Ints:
        """[slots] device of each slot."""
        return np.arange(len(self.expert)) * self.num_devices // len(self.expert)

    @property
    def counts(self) -> Ints:
        """[experts] replicas of each expert."""
        return np.bincount(self.expert, minlength=self.num_experts)

    def homes(self) -> Ints:
        """Returns [experts, most replicas] the device of each replica, then -1."""
        homes = np.full((self.num_experts, int(self.counts.max())), -1, np.int64)
        homes[self.expert, self.replica] = self.device
        return homes


def layout(phy2log: ArrayLike, *, num_experts: int, num_devices: int) -> Layout:
    """Returns the layout of a placement, replicas numbered in the order of their slots."""
    expert = np.asarray(phy2log, np.int64)
    return Layout(
        expert=expert,
        replica=placement.replica_numbers(expert[None])[0],
        num_experts=num_experts,
        num_devices=num_devices,
    )


def expert_rows(row: Ints, expert: Array, num_rows: int, num_experts: int) -> Ints:
    """Returns [rows, experts] how many slots of each row's tokens chose each expert.

    Args:
        row: [tokens] index of the row a token belongs to.
        expert: [tokens, top_k]; negative ids count nowhere.
        num_rows: Rows.
        num_experts: Experts.
    """
    total = np.zeros(num_rows * num_experts, np.int64)
    for slot in range(expert.shape[1]):
        ids = expert[:, slot]
        chosen = ids >= 0
        key = row[chosen] * num_experts + ids[chosen]
        total += np.bincount(key, minlength=len(total))
    return total.reshape(num_rows, num_experts)


def device_loads(rows: Array, where: Layout, rule: ReplicaRule = "even") -> Floats:
    """Returns [dispatches, devices] rows per device.

    Args:
        rows: [dispatches, experts] rows of each expert.
        where: The placement.
        rule: ``even`` gives each replica the same part of its expert's rows (EPLB's planning
            assumption); ``round_robin`` sends row i of an expert to replica i mod r.
    """
    counts = where.counts[where.expert]
    if rule == "even":
        share = np.zeros((where.num_experts, where.num_devices))
        np.add.at(share, (where.expert, where.device), 1 / counts)
        even: Floats = np.asarray(rows, np.float64) @ share
        return even
    whole = np.asarray(rows, np.int64)[:, where.expert]
    each = (whole - where.replica + counts - 1) // counts
    per_device: Floats = each.reshape(
        len(each), where.num_devices, len(counts) // where.num_devices
    ).sum(axis=-1, dtype=np.float64)
    return per_device


def max_over_mean(loads: Array) -> Floats:
    """Returns the fullest device's load over the mean load, along the last axis; NaN without rows.

    Args:
        loads: [..., devices].
    """
    mean = np.asarray(loads, np.float64).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean > 0, np.max(loads, axis=-1) / mean, np.nan)


def balancedness(loads: ArrayLike) -> float:
    """Returns the mean over layers of mean load over largest load: 1 is perfect.

    Devices are reduced first, layers second: ``[[100, 200], [100, 200]]`` gives 0.75. (Adding up
    the layers first would call a device that is overloaded in every other layer balanced.)

    Args:
        loads: [layers, devices]; layers without rows count nowhere.
    """
    ratios = max_over_mean(np.asarray(loads, np.float64))
    known = ratios[np.isfinite(ratios)]
    return float((1 / known).mean()) if len(known) else math.nan


def bound(rows: Array, *, num_devices: int, most_replicas: int = 1) -> Floats:
    """Returns [dispatches] the smallest max/mean any placement could have had in that dispatch.

    A device that holds an expert carries at least that expert's rows divided by its replicas.

    Args:
        rows: [dispatches, experts].
        num_devices: Devices.
        most_replicas: Most replicas an expert can have: 1 and the redundant slots.
    """
    total = rows.sum(axis=1)
    replicas = min(most_replicas, num_devices)
    with np.errstate(divide="ignore", invalid="ignore"):
        heaviest = rows.max(axis=1) / replicas / (total / num_devices)
    return np.where(total > 0, np.maximum(heaviest, 1), np.nan)


def uniform_max_over_mean(num_experts: int, top_k: int, num_tokens: int, num_devices: int) -> float:
    """Returns the max/mean expected if every token chose its experts at random.

    Experts lie on devices without replicas, the same number on each. Up to 2,048 rows it is the
    mean of 400 draws from one seed; beyond, devices' rows are as good as normal.

    Args:
        num_experts: Experts; a multiple of the devices (else the expectation is approximate).
        top_k: Distinct experts a token picks.
        num_tokens: Tokens of the dispatch.
        num_devices: Devices.
    """
    if num_tokens == 0:
        return math.nan
    if num_devices == 1:
        return 1.0
    per_device = num_experts // num_devices
    mean = num_tokens * top_k / num_devices
    if num_tokens * top_k <= _EXACT_ROWS and per_device * num_devices == num_experts:
        generator = np.random.default_rng(0)
        drawn = generator.multivariate_hypergeometric(
            np.full(num_devices, per_device), top_k, size=(_SAMPLES, num_tokens), method="marginals"
        )
        return float(drawn.sum(axis=1).max(axis=1).mean() / mean)
    share = 1 / num_devices
    variance = top_k * share * (1 - share) * (num_experts - top_k) / max(num_experts - 1, 1)
    # Devices' rows add up to a constant; the spread of the equivalent independent loads is larger.
    spread = math.sqrt(num_tokens * variance * num_devices / (num_devices - 1))
    return 1 + spread * largest_normal(num_devices) / mean


def largest_normal(count: int) -> float:
    """Returns the expected largest of ``count`` independent standard normal numbers."""
    grid = np.linspace(-9, 9, _GRID)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in grid])
    return float(np.trapezoid(grid * count * density * below ** (count - 1), grid))


def destinations(
    dispatch: Array, expert: Array, where: Layout, *, devices_per_node: int
) -> tuple[float, float]:
    """Returns the mean number of distinct devices and of distinct nodes a token's rows go to.

    Row i of an expert within a dispatch goes to replica i mod r, as a device does it. Tokens
    without a routed row count nowhere.

    Args:
        dispatch: [tokens] ascending.
        expert: [tokens, top_k]; negative ids go nowhere.
        where: The placement.
        devices_per_node: Devices of one node.
    """
    sums = np.zeros(3, np.int64)
    _destinations(
        np.array(dispatch, np.int64),
        np.array(expert, np.int32, order="C"),
        np.array(where.homes(), order="C"),
        np.array(where.counts, np.int64),
        np.array([where.num_devices, devices_per_node], np.int64),
        sums,
    )
    if not sums[0]:
        return math.nan, math.nan
    return float(sums[1] / sums[0]), float(sums[2] / sums[0])


@compiled("void(int64[::1], int32[:, ::1], int64[:, ::1], int64[::1], int64[::1], int64[::1])")
def _destinations(
    dispatch: Ints,
    expert: NDArray[np.int32],
    homes: Ints,
    counts: Ints,
    shape: Ints,
    sums: Ints,
) -> None:
    seen_device = filled_int64(shape[0], -1)
    seen_node = filled_int64(shape[0], -1)
    rows = filled_int64(len(counts), 0)
    newest = filled_int64(len(counts), -1)
    for token in range(len(expert)):
        routed = False
        for slot in range(expert.shape[1]):
            chosen = expert[token, slot]
            if chosen < 0:
                continue
            routed = True
            if newest[chosen] != dispatch[token]:
                newest[chosen] = dispatch[token]
                rows[chosen] = 0
            device = homes[chosen, rows[chosen] % counts[chosen]]
            rows[chosen] += 1
            if seen_device[device] != token:
                seen_device[device] = token
                sums[1] += 1
            node = device // shape[1]
            if seen_node[node] != token:
                seen_node[node] = token
                sums[2] += 1
        sums[0] += routed
