"""What ranks run in the tests of expert parallelism: imported by every process of a group."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from moeprof.errors import UsageError
from moeprof.live.exchange_times import time_exchanges
from moeprof.live.expert_parallel import (
    PARTS,
    ParallelExperts,
    experts_of_rank,
    on_one_device,
)
from moeprof.live.experts import random_experts
from moeprof.live.parallel_clocks import PartClock, repeat_together
from moeprof.replay.loads import Layout
from moeprof.replay.loads import layout as laid_out

WORLD = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One layer, one placement, one batch dealt to ranks."""

    name: str
    layout: Layout
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    starts: tuple[int, ...]
    shape: dict
    misplaced: bool = False

    @property
    def num_ranks(self):
        return self.layout.num_devices

    @property
    def experts(self):
        return random_experts(
            num_experts=self.layout.num_experts, dtype=self.hidden.dtype, **self.shape
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """All dispatches of a trace under many placements, [site][setting]."""

    layouts: list[list[Layout]]
    experts: list[np.ndarray]
    starts: list[np.ndarray]

    @property
    def num_ranks(self):
        return self.layouts[0][0].num_devices


def groups():
    """Returns the groups of 2, 4 and 8 ranks; every rank makes them all, in one order."""
    return {
        size: [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
        for size in (2, 4, 8)
    }


def run_everything(device, cases, loads):
    """Runs every case on one group of its size; returns what this rank saw of each."""
    made = groups()
    seen = {}
    for index, case in enumerate(cases):
        group = mine(made[case.num_ranks], index)
        if group is not None:
            seen[case.name] = run_case(case, group)
    for index, each in enumerate(loads):
        group = mine(made[each.num_ranks], index)
        if group is not None:
            seen["loads", each.num_ranks] = dist.get_rank(group), received_loads(each, group)
    seen["clocks"] = run_clocks(device, made[WORLD][0])
    seen["refused"] = run_refusals(mine(made[2], dist.get_rank() // 2))
    return seen


def mine(groups, index):
    """Returns the group that has a case, if this rank is in it; cases are dealt to groups."""
    group = groups[index % len(groups)]
    return group if dist.get_rank(group) >= 0 else None


def run_case(case, group):
    rank = dist.get_rank(group)
    layout = case.layout
    if case.misplaced:
        layout = dataclasses.replace(layout, expert=np.roll(layout.expert, 1))
    layer = ParallelExperts(experts_of_rank(case.experts, layout, rank), case.layout, group=group)
    own = slice(case.starts[rank], case.starts[rank + 1])
    batch = case.hidden[own], case.ids[own], case.weights[own]
    out = layer(*batch)
    again = layer(*batch)
    sent = layer.send(*batch[:2])
    return {
        "rank": rank,
        "out": out,
        "same_again": torch.equal(out, again),
        "send_splits": sent.plan.send_splits,
        "receive_splits": sent.plan.receive_splits,
        "load": sent.rows.shape[0],
        "slot_rows": torch.bincount(sent.slots, minlength=layer.own.num_experts).tolist(),
        "came": sent.rows,
        "went": batch[0][sent.order.slots[: sent.plan.num_sent] // batch[1].shape[1]],
    }


def received_loads(each, group):
    """Returns [sites, settings, dispatches] the rows that reached this rank."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    found = []
    for layouts, experts, starts in zip(each.layouts, each.experts, each.starts, strict=True):
        num_experts = layouts[0].num_experts
        weights = random_experts(num_experts=num_experts, d_model=2, d_ff=2, dtype=torch.float32)
        ids = torch.from_numpy(experts)
        of_site = []
        for layout in layouts:
            layer = ParallelExperts(experts_of_rank(weights, layout, rank), layout, group=group)
            rows = []
            for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                bounds = [first + (last - first) * part // num_ranks for part in (rank, rank + 1)]
                own = ids[bounds[0] : bounds[1]]
                sent = layer.send(torch.zeros(len(own), 2), own)
                rows.append(len(sent.rows))
            of_site.append(rows)
        found.append(of_site)
    return found


def run_clocks(device, group):
    """Times the parts of a few steps, and exchanges."""
    rank = dist.get_rank(group)
    experts = random_experts(num_experts=16, d_model=16, d_ff=16, dtype=torch.float32)
    slots = np.arange(16)
    layout = Layout(expert=slots, replica=slots * 0, num_experts=16, num_devices=WORLD)
    layer = ParallelExperts(experts_of_rank(experts, layout, rank), layout, group=group)
    ids = torch.randint(16, (8 + rank, 2), generator=torch.Generator().manual_seed(rank))
    hidden, weights = torch.zeros(len(ids), 16), torch.ones(len(ids), 2)
    clock = PartClock(device, group=group)
    for _ in range(3):
        layer(hidden, ids, weights, clock=clock)
    times = clock.times_ms()
    return {
        "parts": times,
        "in_order": tuple(times) == PARTS,
        "step": repeat_together(lambda: layer(hidden, ids, weights), device=device, repeats=2),
        "exchanges": time_exchanges(device, [0, 1000, 50_000], 2, group=group),
    }


def run_refusals(group):
    """Returns what two ranks are told, by what is wrong; and whether they go on afterwards."""
    rank = dist.get_rank(group)
    experts = random_experts(num_experts=4, d_model=8, d_ff=8, dtype=torch.float32)
    batch = torch.ones(6, 8), torch.arange(12).reshape(6, 2) % 4, torch.ones(6, 2)
    together = [each.repeat(2, 1) for each in batch]
    found = {}
    for name, slots in {"plain": [0, 1, 2, 3], "replicas": [0, 1, 2, 3, 2, 1]}.items():
        layout = laid_out(slots, num_experts=4, num_devices=2)
        own = experts_of_rank(experts, layout, rank)
        layer = ParallelExperts(own, layout, group=group)
        wanted = dataclasses.replace(own, w_out=own.w_out.clone().requires_grad_())
        for key, attempt in refusals(layer, batch, rank).items():
            found[name, key] = refusal(attempt)
        trained = ParallelExperts(wanted, layout, group=group)
        found[name, "gradient of experts"] = refusal(functools.partial(trained, *batch))
        hidden, ids, weights = batch
        with torch.no_grad():
            out = trained(hidden.clone().requires_grad_(), ids.to(torch.int16), weights)
        right = on_one_device(*together, experts, layout)[:6]
        found[name, "afterwards"] = torch.equal(out, right)
    return found


def refusals(layer, batch, rank):
    """Returns calls that are to be refused, by what is wrong; unknown ids are on rank 1 only."""
    hidden, ids, weights = batch
    wanted = hidden.clone().requires_grad_()
    first = ids == 2
    return {
        "weights of other tokens": lambda: layer(hidden, ids, torch.ones(12, 1)),
        "more rows": lambda: layer(torch.ones(9, 8), ids, weights),
        "wider rows": lambda: layer.send(torch.ones(6, 9), ids),
        "rows of another dtype": lambda: layer(hidden.double(), ids, weights),
        "ids that are no integers": lambda: layer(hidden, ids.float(), weights),
        "elsewhere": lambda: layer(hidden, ids.to("meta"), weights),
        "gradient of rows": lambda: layer(wanted, ids, weights),
        "gradient of rows sent": lambda: layer.send(wanted, ids),
        "gradient of weights": lambda: layer(hidden, ids, wanted[:, :2]),
        "too high on rank 1": lambda: layer(hidden, ids.masked_fill(first, 2 + 2 * rank), weights),
        "far too high": lambda: layer(hidden, ids + 1000 * rank, weights),
        "below -1": lambda: layer(hidden, ids.masked_fill(first, 2 - 9 * rank), weights),
    }


def refusal(attempt):
    """Returns what a call is refused with; None where it is not."""
    try:
        attempt()
    except UsageError as error:
        return str(error)
    return None


def fail_on_one(device):
    """Fails on rank 1 while rank 0 waits for it."""
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()
