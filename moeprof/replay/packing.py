"""Loops behind the placements: replicating experts, packing slots onto devices, swapping slots.

Everything here works on plain arrays of one or several layers; `placement` gives them their names.
Compiled, single-threaded, deterministic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.compiled import compiled, filled_int64, inlined

Array = NDArray[Any]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MIN_GAIN = 1e-12
_FEW_SLOTS = 64
_MAX_SWEEPS = 3


def replicate(load: Array, num_slots: int) -> tuple[Ints, Ints, Ints]:
    """Returns ``(expert, replica, counts)`` of slots: EPLB's rule, one slot after another.

    Every expert gets one slot; each further slot goes to the expert with the largest load per
    replica, the first of equals.

    Args:
        load: [layers, experts], float32 or float64; the arithmetic is done in that type.
        num_slots: Slots per layer, at least one per expert.
    """
    num_layers, num_experts = load.shape
    expert = np.tile(np.arange(num_slots), (num_layers, 1))
    replica = np.zeros((num_layers, num_slots), np.int64)
    counts = np.ones((num_layers, num_experts), np.int64)
    if num_slots > num_experts:
        loop = _replicate32 if load.dtype == np.float32 else _replicate64
        loop(np.array(load, order="C"), expert, replica, counts)
    return expert, replica, counts


def pack(load: Array, num_packs: int) -> tuple[Ints, Ints]:
    """Returns ``(pack, position in the pack)`` of items: heaviest first, into the lightest pack.

    All packs hold the same number of items; equals are taken in the order of their index, and a
    full pack takes no more. One item per pack leaves everything in place, as EPLB does.

    Args:
        load: [layers, items], float32 or float64; the arithmetic is done in that type.
        num_packs: Packs; divides the number of items.
    """
    num_layers, num_items = load.shape
    if num_items == num_packs:
        return np.tile(np.arange(num_items), (num_layers, 1)), np.zeros(load.shape, np.int64)
    order = np.argsort(-load, axis=-1, kind="stable")
    chosen = np.empty(load.shape, np.int64)
    position = np.empty(load.shape, np.int64)
    loop = _pack32 if load.dtype == np.float32 else _pack64
    loop(np.array(load, order="C"), order, num_packs, chosen, position)
    return chosen, position


def swap_by_second_moment(moments: Floats, device: Ints, num_devices: int) -> float:
    """Swaps slots between devices until no swap lowers the sum of squared device loads.

    Args:
        moments: [slots, slots] second moments of the slots' loads.
        device: [slots] device of each slot; changed in place.
        num_devices: Devices.

    Returns:
        The sum over devices of the second moment of their load.
    """
    return float(_swap_by_second_moment(moments, device, num_devices))


def swap_by_peak(
    load: Floats, weight: Floats, group: Ints, device: Ints, num_devices: int
) -> float:
    """Swaps slots until no swap lowers the peak of the worst group.

    With more than 64 slots it ends after three sweeps over all pairs.

    The peak of a group is the weighted mean, over its rows, of the fullest device's load. A
    hundredth of the mean over groups is added, so that the others are not neglected.

    Args:
        load: [slots, rows] load of each slot in each row.
        weight: [rows] sums to 1 within each group.
        group: [rows] group of each row, from 0.
        device: [slots] device of each slot; changed in place.
        num_devices: Devices; at least 2.

    Returns:
        The objective reached.
    """
    return float(_swap_by_peak(load, weight, group, device, num_devices))


def _replicate(load: Array, expert: Ints, replica: Ints, counts: Ints) -> None:
    num_layers, num_experts = load.shape
    for layer in range(num_layers):
        each = load[layer].copy()
        for slot in range(num_experts, expert.shape[1]):
            heaviest = 0
            for candidate in range(1, num_experts):
                if each[candidate] > each[heaviest]:
                    heaviest = candidate
            expert[layer, slot] = heaviest
            replica[layer, slot] = counts[layer, heaviest]
            counts[layer, heaviest] += 1
            each[heaviest] = load[layer, heaviest] / counts[layer, heaviest]


def _pack(load: Array, order: Ints, num_packs: int, chosen: Ints, position: Ints) -> None:
    num_layers, num_items = load.shape
    per_pack = num_items // num_packs
    for layer in range(num_layers):
        total = np.zeros(num_packs, load.dtype)
        size = filled_int64(num_packs, 0)
        for index in range(num_items):
            item = order[layer, index]
            lightest = -1
            for candidate in range(num_packs):
                if size[candidate] < per_pack and (
                    lightest < 0 or total[candidate] < total[lightest]
                ):
                    lightest = candidate
            chosen[layer, item] = lightest
            position[layer, item] = size[lightest]
            total[lightest] += load[layer, item]
            size[lightest] += 1


_replicate32 = compiled("void(float32[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1])")(
    _replicate
)
_replicate64 = compiled("void(float64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1])")(
    _replicate
)
_pack32 = compiled("void(float32[:, ::1], int64[:, ::1], int64, int64[:, ::1], int64[:, ::1])")(
    _pack
)
_pack64 = compiled("void(float64[:, ::1], int64[:, ::1], int64, int64[:, ::1], int64[:, ::1])")(
    _pack
)


@compiled("int64(float64[::1], float64[:, ::1], float64, int64[::1], int64)")
def pack_by_score(
    load: Floats, attraction: Floats, weight: float, order_and_device: Ints, num_devices: int
) -> int:
    """Packs items one after another onto the device with the smallest sum of scores.

    The score of item ``a`` on a device is the sum over the items ``m`` there of
    ``load[m] + weight * attraction[a, m]``; a full device takes no more.

    Args:
        load: [items].
        attraction: [items, items].
        weight: Weight of the attraction.
        order_and_device: [items] items in the order they are placed; replaced by the device of
            each item.
        num_devices: Devices; divides the number of items.

    Returns:
        The number of items placed.
    """
    num_items = len(load)
    per_device = num_items // num_devices
    order = order_and_device.copy()
    size = filled_int64(num_devices, 0)
    for index in range(num_items):
        item = order[index]
        score = np.zeros(num_devices)
        for earlier in range(index):
            other = order[earlier]
            score[order_and_device[other]] += load[other] + weight * attraction[item, other]
        best = -1
        for candidate in range(num_devices):
            if size[candidate] < per_device and (best < 0 or score[candidate] < score[best]):
                best = candidate
        order_and_device[item] = best
        size[best] += 1
    return num_items


@compiled("float64(float64[:, ::1], int64[::1], int64)")
def _swap_by_second_moment(moments: Floats, device: Ints, num_devices: int) -> float:
    num_slots = len(device)
    along = np.zeros((num_slots, num_devices))
    for slot in range(num_slots):
        for other in range(num_slots):
            along[slot, device[other]] += moments[slot, other]
    scale = 0.0
    for slot in range(num_slots):
        scale += float(moments[slot, slot])
    improved = True
    while improved:
        improved = False
        for slot in range(num_slots):
            here = device[slot]
            best = -_MIN_GAIN * scale
            partner = -1
            for other in range(num_slots):
                there = device[other]
                if there == here:
                    continue
                change = (
                    along[slot, there]
                    + along[other, here]
                    - along[slot, here]
                    - along[other, there]
                    + moments[slot, slot]
                    + moments[other, other]
                    - 2 * moments[slot, other]
                )
                if change < best:
                    best = change
                    partner = other
            if partner < 0:
                continue
            there = device[partner]
            device[slot] = there
            device[partner] = here
            for other in range(num_slots):
                moved = moments[other, partner] - moments[other, slot]
                along[other, here] += moved
                along[other, there] -= moved
            improved = True
    total = 0.0
    for slot in range(num_slots):
        total += float(along[slot, device[slot]])
    return total


@inlined("float64(float64[::1], float64)")
def _objective(peaks: Floats, share: float) -> float:
    worst = peaks[0]
    total = 0.0
    for peak in peaks:
        worst = max(worst, peak)
        total += peak
    return float(worst + share * total / len(peaks))


@inlined("void(float64[:, ::1], int64[:, ::1], int64)")
def _rank_devices(device_load: Floats, top: Ints, row: int) -> None:
    """Writes the three fullest devices of a row to ``top``; -1 where there are fewer."""
    for place in range(3):
        best = -1
        for candidate in range(len(device_load)):
            taken = False
            for earlier in range(place):
                taken = taken or top[earlier, row] == candidate
            if not taken and (best < 0 or device_load[candidate, row] > device_load[best, row]):
                best = candidate
        top[place, row] = best


@compiled("float64(float64[:, ::1], float64[::1], int64[::1], int64[::1], int64)")
def _swap_by_peak(
    load: Floats, weight: Floats, group: Ints, device: Ints, num_devices: int
) -> float:
    num_slots, num_rows = load.shape
    num_groups = 1
    for row in range(num_rows):
        num_groups = max(num_groups, group[row] + 1)
    device_load = np.zeros((num_devices, num_rows))
    for slot in range(num_slots):
        for row in range(num_rows):
            device_load[device[slot], row] += load[slot, row]
    top = np.empty((3, num_rows), np.int64)
    peaks = np.zeros(num_groups)
    for row in range(num_rows):
        _rank_devices(device_load, top, row)
        peaks[group[row]] += weight[row] * device_load[top[0, row], row]
    share = 0.01
    objective = float(_objective(peaks, share))
    tried = np.empty(num_groups)
    improved = True
    sweeps = 0
    while improved and (num_slots <= _FEW_SLOTS or sweeps < _MAX_SWEEPS):
        improved = False
        sweeps += 1
        for slot in range(num_slots):
            for other in range(slot + 1, num_slots):
                here = device[slot]
                there = device[other]
                if here == there:
                    continue
                tried[:] = 0.0
                for row in range(num_rows):
                    moved = load[other, row] - load[slot, row]
                    peak = max(device_load[here, row] + moved, device_load[there, row] - moved)
                    for place in range(3):
                        rest = top[place, row]
                        if rest < 0:
                            break
                        if rest not in (here, there):
                            peak = max(peak, device_load[rest, row])
                            break
                    tried[group[row]] += weight[row] * peak
                reached = _objective(tried, share)
                if reached < objective * (1 - 1e-9):
                    objective = reached
                    device[slot] = there
                    device[other] = here
                    for row in range(num_rows):
                        moved = load[other, row] - load[slot, row]
                        device_load[here, row] += moved
                        device_load[there, row] -= moved
                        _rank_devices(device_load, top, row)
                    improved = True
    return objective
