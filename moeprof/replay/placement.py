"""Which device holds which expert: contiguous, random, the founding paper's two, EPLB, and our own.

A placement of one layer is ``phy2log``, an array [slots]: slot ``p`` lies on device
``p // (slots / devices)`` and holds expert ``phy2log[p]``. Every device has the same number of
slots; slots beyond one per expert are replicas. ``history`` is an array [dispatches, experts] of
the rows that each expert got in each dispatch; planners see shares of a dispatch, so that a large
dispatch counts no more than a small one.

What was published, and what is done here:

- **Paper, objective.** Printed as ``min max_(m,b) |sum_n P_mn A_mb - 1/D|``, which is constant
  (an expert lies on one device). Meant, and measured here: the sum over experts ``m``, the maximum
  over devices ``n`` and batches ``b``.
- **Paper, greedy.** Experts by mean load, heaviest first, each to the device with the least load
  that is not full.
- **Paper, anti-correlation.** The same with ``load + 0.5 * S`` in place of the load, ``S`` being
  the Pearson correlation with the expert being placed. Loads are about 1/E and correlations up to
  1, so that as printed the correlation decides almost alone. ``scaling="relative"`` measures loads
  in multiples of the mean load instead. The correlation with an expert whose share never changes
  is undefined; it counts as 0.
- **EPLB** (deepseek-ai/EPLB, MIT): in float32 and with a stable sort, bit for bit. The published
  code sorts without promising stability, so on ties its ids may differ; its loads do not. It also
  leaves open in which order the fractional loads of a group are added up: groups that are equal
  but for rounding may change places.
- **Replicas** for planners that know none: EPLB's rule on the mean load, then each replica counts
  as an item with its part of the load.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeprof.errors import UsageError
from moeprof.replay import packing

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NUM_STARTS = 8
"""Starts of a search by swaps: the greedy placement and shuffles; a quarter with many slots."""
MANY_SLOTS = 64
"""More slots than this are searched from fewer starts, over fewer dispatches."""
MAX_PEAK_ROWS = 512
"""Dispatches that `peak` and `robust` look at, spread evenly; fewer the more slots there are."""
MIN_PEAK_ROWS = 64
NUM_WEIGHTINGS = 12
"""Weightings of the domains that `robust` tries; a quarter with many slots."""
WEIGHTING_RATE = 8.0
PEAK_MEAN_SHARE = 0.01
CORRELATION_WEIGHT = 0.5

_PAIR = 2


def contiguous(num_experts: int, *, num_devices: int, num_replicas: int | None = None) -> Ints:
    """Returns experts in the order of their ids: what happens when nothing is done.

    Slots beyond one per expert repeat the first experts, as inference engines start.

    Args:
        num_experts: Experts of the layer.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
    """
    return np.arange(_num_slots(num_experts, num_replicas, num_devices)) % num_experts


def random(
    num_experts: int, *, num_devices: int, num_replicas: int | None = None, seed: int = 0
) -> Ints:
    """Returns the slots of `contiguous` in random order; the same seed gives the same order."""
    slots = contiguous(num_experts, num_devices=num_devices, num_replicas=num_replicas)
    return np.random.default_rng(seed).permutation(slots)


def greedy(history: ArrayLike, *, num_devices: int, num_replicas: int | None = None) -> Ints:
    """Returns the paper's greedy placement: heaviest first, to the emptiest device.

    Without replicas it differs from `eplb` in what it calls load (the mean share of a dispatch,
    not the sum of rows), in float64 arithmetic, and in nothing else.

    Args:
        history: [dispatches, experts] rows.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
    """
    items = _Items.of(history, num_devices, num_replicas)
    device, _ = packing.pack(items.load[None], num_devices)
    return items.placed(device[0])


def anticorrelation(
    history: ArrayLike,
    *,
    num_devices: int,
    num_replicas: int | None = None,
    weight: float = CORRELATION_WEIGHT,
    scaling: Literal["printed", "relative"] = "printed",
) -> Ints:
    """Returns the paper's anti-correlation placement.

    Args:
        history: [dispatches, experts] rows.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
        weight: Weight of the correlation; the paper tested 0.5 only.
        scaling: ``printed`` adds correlations to shares; ``relative`` to multiples of the mean
            share.
    """
    items = _Items.of(history, num_devices, num_replicas)
    load = items.load if scaling == "printed" else items.load * len(items.load)
    order = np.argsort(-items.load, kind="stable")
    packing.pack_by_score(load.copy(), correlations(items.shares), weight, order, num_devices)
    return items.placed(order)


def second_moment(history: ArrayLike, *, num_devices: int, num_replicas: int | None = None) -> Ints:
    """Returns the placement with the smallest sum of squared device loads that swaps can find.

    The sum over dispatches and devices of the squared load is ``sum_d 1_d' X'X 1_d``: it holds
    both the mean loads and which experts are busy together, and it costs the same whatever the
    number of dispatches. Pairs of slots are swapped until no swap lowers it, from the greedy
    placement and from shuffles of it; the best is returned.

    Args:
        history: [dispatches, experts] rows.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
    """
    items = _Items.of(history, num_devices, num_replicas)
    return items.placed(_least_second_moment(items, items.moments(items.weight), num_devices))


def peak(history: ArrayLike, *, num_devices: int, num_replicas: int | None = None) -> Ints:
    """Returns the placement with the smallest mean peak that swaps can find.

    The peak of a dispatch is the load of its fullest device. From the `second_moment` placement
    and from shuffles of it, slots are swapped as long as the mean peak of up to 512 dispatches
    falls. It aims at what is judged, where the second moment aims at something smoother: better
    with many dispatches, more prone to learn noise with few.

    Args:
        history: [dispatches, experts] rows.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
    """
    return robust(
        history,
        np.zeros(len(np.asarray(history)), np.int64),
        num_devices=num_devices,
        num_replicas=num_replicas,
    )


def robust(
    history: ArrayLike,
    domain: ArrayLike,
    *,
    num_devices: int,
    num_replicas: int | None = None,
) -> Ints:
    """Returns the placement whose worst domain is best.

    A domain's cost is the mean, over its dispatches, of the fullest device's load. Domains are
    weighted; a placement for the weights is found as `peak` does; domains that fare badly gain
    weight (multiplicative weights), several times over. The placement with the smallest worst
    domain is then improved by swaps that lower that worst domain directly.

    Args:
        history: [dispatches, experts] rows.
        domain: [dispatches] domain of each dispatch, any labels.
        num_devices: Devices.
        num_replicas: Slots of the layer; one per expert when None.
    """
    counts = np.asarray(history, np.float64)
    kept = counts.sum(axis=1) > 0
    counts, labels = counts[kept], np.asarray(domain)[kept]
    _, group = np.unique(labels, return_inverse=True)
    chosen = _spread(group, _most_rows(counts, num_replicas))
    counts, group = counts[chosen], group[chosen].astype(np.int64)
    within = 1 / np.bincount(group)[group] if len(group) else np.ones(0)
    items = _Items.of(counts, num_devices, num_replicas, weight=within)
    if num_devices == 1:
        return items.placed(np.zeros(len(items.load), np.int64))
    rows = np.array(items.shares.T * num_devices, order="C")
    best = _weighted_search(items, rows, group, within, num_devices)
    packing.swap_by_peak(rows, within, group, best, num_devices)
    return items.placed(best)


def eplb(
    load: ArrayLike,
    *,
    num_replicas: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_devices: int,
) -> tuple[Ints, Ints, Ints]:
    """Returns ``(phy2log, log2phy, counts)`` of DeepSeek's Expert Parallelism Load Balancer.

    Where groups can be dealt evenly to nodes, the hierarchical policy: groups of experts are
    packed onto nodes, experts are replicated within their node, replicas packed onto its devices.
    Else the global policy: one group, one node.

    Args:
        load: [layers, experts] load of each expert.
        num_replicas: Slots of a layer; a multiple of ``num_devices``.
        num_groups: Groups of experts (of group-limited routing).
        num_nodes: Nodes.
        num_devices: Devices of all nodes together.

    Returns:
        ``phy2log`` [layers, slots], the expert of each slot; ``log2phy`` [layers, experts, most
        replicas], the slots of each expert in order of replication, then -1; ``counts`` [layers,
        experts], replicas of each expert.
    """
    weight = np.asarray(load).astype(np.float32)
    if weight.ndim != _PAIR:
        raise UsageError(
            f"loads have {weight.ndim} dimensions", hint="give an array [layers, experts]"
        )
    num_layers, num_experts = weight.shape
    _num_slots(num_experts, num_replicas, num_devices)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    _check_hierarchy(num_experts, num_replicas, num_groups, num_nodes, num_devices)
    per_group = num_experts // num_groups

    group_load = weight.reshape(num_layers, num_groups, per_group).sum(axis=-1, dtype=np.float32)
    node, place = packing.pack(group_load, num_nodes)
    first = (node * (num_groups // num_nodes) + place) * per_group
    middle_of = (first[..., None] + np.arange(per_group)).reshape(num_layers, num_experts)
    expert_of = _inverse(middle_of)

    per_node = num_experts // num_nodes
    node_load = np.take_along_axis(weight, expert_of, -1).reshape(-1, per_node)
    middle, replica, counts = packing.replicate(node_load, num_replicas // num_nodes)
    each = (node_load / counts.astype(np.float32)).astype(np.float32)
    slot_load = np.take_along_axis(each, middle, -1)

    device, place = packing.pack(slot_load, num_devices // num_nodes)
    slot = _inverse(device * (num_replicas // num_devices) + place)
    middle = np.take_along_axis(middle, slot, -1).reshape(num_layers, num_nodes, -1)
    middle = (middle + np.arange(0, num_experts, per_node)[None, :, None]).reshape(num_layers, -1)
    phy2log = np.take_along_axis(expert_of, middle, -1)
    replica = np.take_along_axis(replica, slot, -1).reshape(num_layers, -1)
    counts = np.take_along_axis(counts.reshape(num_layers, -1), middle_of, -1)
    return phy2log, _slots_of(phy2log, replica, counts), counts


def slots_of(phy2log: ArrayLike, num_experts: int) -> tuple[Ints, Ints]:
    """Returns ``(log2phy, counts)`` of placements, replicas in the order of their slots.

    Args:
        phy2log: [layers, slots].
        num_experts: Experts per layer.
    """
    slots = np.asarray(phy2log, np.int64)
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in slots])
    return _slots_of(slots, replica_numbers(slots), counts), counts


def replica_numbers(phy2log: Ints) -> Ints:
    """Returns [layers, slots] the how-manieth replica of its expert each slot holds, from 0."""
    order = np.argsort(phy2log, axis=-1, kind="stable")
    ordered = np.take_along_axis(phy2log, order, -1)
    index = np.broadcast_to(np.arange(phy2log.shape[-1]), phy2log.shape)
    is_first = np.ones(phy2log.shape, bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(is_first, index, 0), axis=-1)
    numbers = np.empty(phy2log.shape, np.int64)
    np.put_along_axis(numbers, order, index - first, -1)
    return numbers


def correlations(shares: Floats) -> Floats:
    """Returns [experts, experts] Pearson correlations; 0 with whatever never changes.

    Args:
        shares: [dispatches, experts].
    """
    centred = shares - shares.mean(axis=0)
    # What is left of a constant after its mean is taken off is rounding, not variation.
    centred[:, np.abs(centred).max(axis=0) <= 1e-12 * np.abs(shares).max(axis=0)] = 0
    length = np.sqrt((centred**2).sum(axis=0))
    unit = centred / np.where(length > 0, length, 1)
    return np.array(unit.T @ unit, order="C")


def check_slots(num_experts: int, num_slots: int, num_devices: int) -> None:
    """Refuses numbers of slots and devices that no placement can have.

    Raises:
        UsageError: Fewer slots than experts, or slots that do not divide evenly.
    """
    _num_slots(num_experts, num_slots, num_devices)


class _Items:
    """The slots to be placed: their experts, loads and shares.

    Attributes:
        expert: [items].
        load: [items] mean share of a dispatch.
        shares: [dispatches, items].
        weight: [dispatches] weight of each in second moments.
    """

    def __init__(self, expert: Ints, shares: Floats, weight: Floats) -> None:
        self.expert = expert
        self.shares = shares
        self.weight = weight
        self.load: Floats = weight @ shares / weight.sum()

    @classmethod
    def of(
        cls,
        history: ArrayLike,
        num_devices: int,
        num_replicas: int | None,
        *,
        weight: Floats | None = None,
    ) -> _Items:
        """Returns the slots of a history, experts replicated by EPLB's rule.

        Raises:
            UsageError: The history is empty or the slots cannot be dealt evenly.
        """
        counts = np.asarray(history, np.float64)
        if counts.ndim != _PAIR:
            raise UsageError(
                f"the history has {counts.ndim} dimensions",
                hint="give an array [dispatches, experts]",
            )
        num_slots = _num_slots(counts.shape[1], num_replicas, num_devices)
        total = counts.sum(axis=1)
        if not total.any():
            raise UsageError("the history holds no routed rows", hint="give it some dispatches")
        kept = total > 0
        shares = counts[kept] / total[kept, None]
        weight = np.ones(len(shares)) if weight is None else weight[kept]
        mean = weight @ shares / weight.sum()
        expert, _, replicas = packing.replicate(mean[None], num_slots)
        return cls(expert[0], shares[:, expert[0]] / replicas[0][expert[0]], weight)

    def placed(self, device: Ints) -> Ints:
        """Returns ``phy2log`` of a device per item; heavier items come first within a device."""
        order = np.lexsort((np.arange(len(device)), -self.load, device))
        return self.expert[order]

    def moments(self, weight: Floats) -> Floats:
        """Returns [items, items] weighted second moments of the shares."""
        return np.array((self.shares * weight[:, None]).T @ self.shares, order="C")


def _weighted_search(
    items: _Items, rows: Floats, group: Ints, within: Floats, num_devices: int
) -> Ints:
    """Returns the device of each item with the smallest worst group that weighting found."""
    num_groups = int(group.max()) + 1
    weight = np.full(num_groups, 1 / num_groups)
    one_group = np.zeros(len(group), np.int64)
    best: tuple[float, Ints] | None = None
    num_weightings = NUM_WEIGHTINGS if len(items.load) <= MANY_SLOTS else NUM_WEIGHTINGS // 4
    for index in range(num_weightings if num_groups > 1 else 1):
        of_row = weight[group] * within
        moments = items.moments(of_row)
        if index == 0 or best is None:
            starts = _starts(_least_second_moment(items, moments, num_devices))
        else:
            starts = [_least_second_moment(items, moments, num_devices, start=best[1])]
        for device in starts:
            packing.swap_by_peak(rows, of_row / of_row.sum(), one_group, device, num_devices)
            peaks = np.bincount(
                group, within * _peaks(rows, device, num_devices), minlength=num_groups
            )
            cost = float(peaks.max() + PEAK_MEAN_SHARE * peaks.mean())
            if best is None or cost < best[0]:
                best = cost, device
        weight = weight * np.exp(WEIGHTING_RATE * (peaks - peaks.mean()))
        weight /= weight.sum()
    assert best is not None
    return best[1]


def _peaks(rows: Floats, device: Ints, num_devices: int) -> Floats:
    """Returns [rows] the load of the fullest device."""
    load = np.zeros((num_devices, rows.shape[1]))
    np.add.at(load, device, rows)
    return np.asarray(load.max(axis=0), np.float64)


def _least_second_moment(
    items: _Items, moments: Floats, num_devices: int, *, start: Ints | None = None
) -> Ints:
    packed, _ = packing.pack(items.load[None], num_devices)
    best: tuple[float, Ints] | None = None
    starts = _starts(packed[0]) if start is None else [packed[0], start.copy()]
    for device in starts:
        reached = packing.swap_by_second_moment(moments, device, num_devices)
        if best is None or reached < best[0] * (1 - 1e-12):
            best = reached, device
    assert best is not None
    return best[1]


def _starts(device: Ints) -> list[Ints]:
    """Returns a device per item and shuffles of it, as starts of a search."""
    generator = np.random.default_rng(0)
    num_starts = NUM_STARTS if len(device) <= MANY_SLOTS else NUM_STARTS // 4
    return [device.copy(), *(generator.permutation(device) for _ in range(num_starts - 1))]


def _most_rows(counts: Floats, num_replicas: int | None) -> int:
    """Returns how many dispatches a search by peaks can afford to look at."""
    num_slots = counts.shape[1] if num_replicas is None else num_replicas
    affordable = MAX_PEAK_ROWS * MANY_SLOTS // (2 * num_slots)
    return min(max(affordable, MIN_PEAK_ROWS), MAX_PEAK_ROWS)


def _spread(group: Array, most: int) -> Ints:
    """Returns at most ``most`` indices, as many of each group as possible, spread evenly."""
    groups, sizes = np.unique(group, return_counts=True)
    quota = max(most // len(groups), 1)
    chosen = []
    for each, size in zip(groups.tolist(), sizes.tolist(), strict=True):
        members = np.flatnonzero(group == each)
        chosen.append(members[np.arange(min(size, quota)) * size // min(size, quota)])
    return np.sort(np.concatenate(chosen))


def _num_slots(num_experts: int, num_replicas: int | None, num_devices: int) -> int:
    """Returns the number of slots.

    Raises:
        UsageError: No placement has these numbers.
    """
    num_slots = num_experts if num_replicas is None else num_replicas
    if num_devices < 1:
        raise UsageError(f"{num_devices} devices hold nothing", hint="give at least one device")
    if num_slots < num_experts:
        raise UsageError(
            f"{num_slots} slots cannot hold {num_experts} experts", hint="add replicas"
        )
    if num_slots % num_devices:
        needed = -(-num_experts // num_devices) * num_devices - num_experts
        raise UsageError(
            f"{num_slots} slots cannot be dealt evenly to {num_devices} devices",
            hint=f"{num_experts} experts need {needed} redundant slots, or {needed} plus a "
            f"multiple of {num_devices}",
        )
    return num_slots


def _check_hierarchy(
    num_experts: int, num_slots: int, num_groups: int, num_nodes: int, num_devices: int
) -> None:
    for number, of, divisor, by in (
        (num_experts, "experts", num_groups, "groups"),
        (num_devices, "devices", num_nodes, "nodes"),
        (num_slots, "slots", num_nodes, "nodes"),
    ):
        if divisor < 1 or number % divisor:
            raise UsageError(
                f"{number} {of} cannot be dealt evenly to {divisor} {by}",
                hint=f"choose a number of {by} that divides {number}",
            )


def _inverse(permutation: Ints) -> Ints:
    inverse = np.empty_like(permutation)
    index = np.broadcast_to(np.arange(permutation.shape[-1]), permutation.shape)
    np.put_along_axis(inverse, permutation, index, -1)
    return inverse


def _slots_of(phy2log: Ints, replica: Ints, counts: Ints) -> Ints:
    num_layers, num_slots = phy2log.shape
    most = int(counts.max())
    log2phy = np.full((num_layers, counts.shape[1] * most), -1, np.int64)
    slots = np.broadcast_to(np.arange(num_slots), phy2log.shape)
    np.put_along_axis(log2phy, phy2log * most + replica, slots, -1)
    return log2phy.reshape(num_layers, counts.shape[1], most)
