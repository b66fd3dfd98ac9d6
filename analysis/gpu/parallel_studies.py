"""What every rank runs of `analysis.gpu.expert_parallel`: checks, exchanges, estimates, steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from analysis.gpu.time_spent import TimeSpent
from moeprof.live.expert_parallel import PARTS, ParallelExperts, experts_of_rank, on_one_device
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.parallel_clocks import PartClock, repeat_together, slowest_ms
from moeprof.live.parallel_estimates import (
    AllToAllLine,
    StepEstimate,
    estimated_step,
)
from moeprof.live.parallel_plans import shard_starts
from moeprof.live.parallel_traces import PlannerSetting
from moeprof.live.repetitions import Repetitions
from moeprof.replay.loads import Layout

NARROW: dict[str, Any] = {"d_model": 64, "d_ff": 64, "gated": True, "bias": True}
NUM_CHECKED_OUTPUTS = 4
CHECK_SHARE = 0.25
"""Of a study's time, most that its checks of loads take; at least `CHECK_BLOCK` dispatches are."""
WANTED_PLANNERS = ("contiguous", "greedy", "eplb", "robust")
"""Whose placements are estimated for more devices before any other."""
CHECK_BLOCK = 8
NUM_ROUNDS = 4
"""Rounds that steps are timed in, all placements in each: a slow stretch of the host is in none
alone."""
ESTIMATE_ROUNDS = 3
"""Rounds of estimates: the middle one counts. The first one also compiles."""
_BEGUN_S = time.time()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run, and how often.

    Attributes:
        kernel: The gating kernel that is timed.
        dtype: Of rows and weights that are timed.
        repeats: Timed repetitions of a step.
        share_repeats: Of a share of the experts.
        exchange_bytes: Bytes that a rank sends to the others.
    """

    kernel: str
    dtype: torch.dtype
    repeats: int
    share_repeats: int
    exchange_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteCheck:
    """Dispatches of one site whose loads are checked.

    Attributes:
        dispatches: [tokens, top_k] ids of each.
        layouts: A placement per setting.
    """

    dispatches: list[np.ndarray]
    layouts: dict[PlannerSetting, Layout]


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What the ranks need of one trace.

    Attributes:
        shape: Shape of an expert.
        num_experts: Experts of a layer.
        checks: By site.
        batches: [tokens, top_k] ids that are timed, of one site.
        layouts: Of that site, by number of devices, a placement per setting.
    """

    shape: dict[str, Any]
    num_experts: int
    checks: list[SiteCheck]
    batches: list[np.ndarray]
    layouts: dict[int, dict[PlannerSetting, Layout]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What one rank found out about one study; alike on all ranks but for the loads.

    Attributes:
        outputs: By setting, narrow experts in float32 against one device.
        timed_outputs: By setting, the timed kernel at full size against one device.
        arrived: [settings, dispatches] by site, rows that reached this rank.
        size_exchange: By setting, times of the size exchange by itself.
        estimates: By (devices, setting), one per batch.
        steps: By setting, one per batch: times of the whole and of the parts.
        seconds: By part of the study, where this rank's time went.
    """

    outputs: dict[PlannerSetting, dict[str, Any]]
    timed_outputs: dict[PlannerSetting, dict[str, Any]]
    arrived: list[np.ndarray]
    size_exchange: dict[PlannerSetting, Repetitions]
    estimates: dict[tuple[int, PlannerSetting], list[StepEstimate]]
    steps: dict[PlannerSetting, list[dict[str, Any]]]
    seconds: dict[str, float] = field(default_factory=dict)


def run_study(
    device: torch.device,
    study: Study,
    plan: Plan,
    line: AllToAllLine,
    until_s: float,
    wanted_until_s: float,
) -> Findings:
    """Checks, predicts, then times; estimates for more devices in the time that is left.

    Args:
        device: Of this rank.
        study: What to run.
        plan: How.
        line: Of all-to-alls.
        until_s: When to be done, by `time.time`; checks of loads take a part of the time till then.
        wanted_until_s: When to begin no more of the estimates that are wanted most, if later.
    """
    num_ranks = dist.get_world_size()
    layouts = study.layouts[num_ranks]
    spent = TimeSpent()
    with spent.part("outputs to the bit"):
        outputs = {name: checked_outputs(device, study, each) for name, each in layouts.items()}
    num_equal, num_checked = (
        sum(each[key] for each in outputs.values()) for key in ("num_equal", "num_dispatches")
    )
    say(f"outputs equal to the bit in {num_equal}/{num_checked}")
    rows = []
    # Of all checks together: what is left when they begin does not grow with their number.
    checks_until_s = time.time() + CHECK_SHARE * max(until_s - time.time(), 0.0)
    with spent.part("loads"):
        for place, check in enumerate(study.checks):
            now = time.time()
            share_s = (checks_until_s - now) / (len(study.checks) - place)
            rows.append(arrived(device, check, now + share_s))
            say(f"loads counted under {rows[-1].shape[1]} of {len(check.dispatches)} dispatches")
    with spent.part("outputs at full size"):
        experts = full_experts(device, study, plan)
        timed_outputs = {
            name: close_outputs(device, study, experts, each, plan)
            for name, each in layouts.items()
        }
    say("outputs at full size compared")
    with spent.part("size exchange"):
        sizes = {
            name: size_exchange(device, study, experts, each, plan)
            for name, each in layouts.items()
        }
    # Replicas make the exchange longer: rows are numbered after it, not meanwhile.
    by_kind: dict[bool, list[float]] = {}
    for name, each in layouts.items():
        by_kind.setdefault(is_replicated(each), []).append(sizes[name].median_ms)
    size_ms = {kind: statistics.median(times) for kind, times in by_kind.items()}
    jobs = [(num_ranks, name) for name in layouts]
    with spent.part("predictions"):
        estimates = all_estimates(jobs, study, experts, plan, line, size_ms)
    say("predicted")
    with spent.part("steps"):
        steps = all_steps(device, experts, layouts, study.batches, plan)
    say("steps timed")
    scaled = by_importance(study.layouts, num_ranks)
    with spent.part("estimates for more devices"):
        wanted = [job for job in scaled if is_wanted(job[1])]
        rest = [job for job in scaled if not is_wanted(job[1])]
        given = (study, experts, plan, line, size_ms)
        more = all_estimates(wanted, *given, until_s=max(until_s, wanted_until_s))
        more |= all_estimates(rest, *given, until_s=until_s)
    say(f"{len(more)} of {len(scaled)} settings of more devices estimated")
    return Findings(
        outputs=outputs,
        timed_outputs=timed_outputs,
        arrived=rows,
        size_exchange=sizes,
        estimates=estimates | more,
        steps=steps,
        seconds=spent.seconds,
    )


def by_importance(
    layouts: Mapping[int, Mapping[PlannerSetting, Layout]], num_ranks: int
) -> list[tuple[int, PlannerSetting]]:
    """Returns devices and setting of all placements for more devices than there are.

    First those of `WANTED_PLANNERS` without replicas, on every number of devices, a planner after
    the other; then the same with replicas; then the rest.

    Args:
        layouts: By number of devices, a placement per setting.
        num_ranks: Devices there are.
    """
    every = [(count, name) for count, own in layouts.items() if count != num_ranks for name in own]

    def place(job: tuple[int, PlannerSetting]) -> tuple[int, int, int]:
        count, name = job
        if name.planner not in WANTED_PLANNERS:
            return 2, 0, 0
        return int(not is_wanted(name)), WANTED_PLANNERS.index(name.planner), count

    return sorted(every, key=place)


def is_wanted(setting: PlannerSetting) -> bool:
    """Returns True for what is estimated for more devices before anything else."""
    return setting.planner in WANTED_PLANNERS and not setting.num_redundant


def is_replicated(layout: Layout) -> bool:
    """Returns True where some expert has more than one slot."""
    return bool((layout.counts > 1).any())


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most so many indices below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def say(what: str) -> None:
    """Prints on one rank only, with the seconds since it began."""
    if dist.get_rank() == 0:
        print(f"  {time.time() - _BEGUN_S:6.1f} s  {what}", flush=True)


def full_experts(device: torch.device, study: Study, plan: Plan) -> ExpertWeights:
    """Returns the whole layer, alike on every rank."""
    return random_experts(
        num_experts=study.num_experts, device=device, dtype=plan.dtype, **study.shape
    )


def batch_of(
    ids: np.ndarray, d_model: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns rows, ids and drawn gate weights of all ranks together, alike on every rank."""
    generator = torch.Generator(device).manual_seed(len(ids))
    hidden = torch.randn(len(ids), d_model, generator=generator, device=device).to(dtype)
    weights = torch.rand(ids.shape, generator=generator, device=device)
    return hidden, torch.from_numpy(ids).long().to(device), weights


def own_part(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns this rank's part of what all have."""
    rank, starts = dist.get_rank(), shard_starts(len(tensors[0]), dist.get_world_size())
    return [tensor[starts[rank] : starts[rank + 1]] for tensor in tensors]


def checked_outputs(device: torch.device, study: Study, layout: Layout) -> dict[str, Any]:
    """Holds outputs in float32 to one device's, to the bit, and two runs to each other."""
    experts = random_experts(
        num_experts=study.num_experts, device=device, dtype=torch.float32, **NARROW
    )
    layer = ParallelExperts(experts_of_rank(experts, layout, dist.get_rank()), layout)
    found = {"num_dispatches": 0, "num_equal": 0, "num_same_twice": 0, "largest_error": 0.0}
    every = [each for each in study.checks[0].dispatches if len(each)]
    picked = sorted(every, key=len)
    for index in spread(len(picked), NUM_CHECKED_OUTPUTS).tolist():
        batch = batch_of(picked[index], NARROW["d_model"], device, torch.float32)
        own = own_part(batch)
        out, again = layer(*own), layer(*own)
        reference = own_part([on_one_device(*batch, experts, layout)])[0]
        found["num_dispatches"] += 1
        found["num_equal"] += everywhere(torch.equal(out, reference), device)
        found["num_same_twice"] += everywhere(torch.equal(out, again), device)
        found["largest_error"] = max(found["largest_error"], relative_error(out, reference))
    return found


def close_outputs(
    device: torch.device, study: Study, experts: ExpertWeights, layout: Layout, plan: Plan
) -> dict[str, Any]:
    """Holds outputs of the timed kernel at full size to one device's, in every batch.

    How many rows an expert has decides which of the kernel's ways is taken.
    """
    own = experts_of_rank(experts, layout, dist.get_rank())
    layer = ParallelExperts(own, layout, kernel=plan.kernel)
    errors, same = [], []
    for ids in study.batches:
        batch = batch_of(ids, experts.d_model, device, plan.dtype)
        out, again = layer(*own_part(batch)), layer(*own_part(batch))
        reference = own_part([on_one_device(*batch, experts, layout)])[0]
        errors.append(relative_error(out, reference))
        same.append(everywhere(torch.equal(out, again), device))
    # Unlike Python's, this maximum does not pass over what is no number.
    return {
        "relative_error": float(np.max(errors)),
        "same_twice": all(same),
        "errors_by_batch": errors,
    }


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ||out - reference|| / ||reference|| of all ranks' tokens."""
    parts = torch.stack([(out.double() - reference.double()), reference.double()])
    sums = parts.square().sum(dim=(1, 2))
    dist.all_reduce(sums)
    return float((sums[0] / sums[1].clamp(min=1e-30)).sqrt())


def everywhere(holds: bool, device: torch.device) -> bool:
    """Returns True where it holds on every rank."""
    flag = torch.tensor([int(holds)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def arrived(device: torch.device, check: SiteCheck, until_s: float) -> np.ndarray:
    """Returns [settings, dispatches] the rows that reached this rank.

    Every row carries the id of its expert; only rows that came to a slot of that expert count.
    Under all placements one dispatch after the other, until time is up on any rank.

    Args:
        device: Of this rank.
        check: Dispatches and placements.
        until_s: By `time.time`.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    layers = []
    for layout in check.layouts.values():
        narrow = random_experts(
            num_experts=layout.num_experts, d_model=8, d_ff=8, device=device, dtype=torch.float32
        )
        layer = ParallelExperts(experts_of_rank(narrow, layout, rank), layout)
        per_device = layer.own.num_experts
        own = torch.from_numpy(layout.expert[rank * per_device :][:per_device]).to(device)
        layers.append((layer, own))
    found = []
    for index, each in enumerate(check.dispatches):
        if index and index % CHECK_BLOCK == 0 and not everywhere(time.time() < until_s, device):
            break
        first, last = shard_starts(len(each), num_ranks)[rank : rank + 2]
        # A row per slot of a token, in the same order.
        ids = torch.from_numpy(each[first:last].reshape(-1, 1)).long().to(device)
        rows = ids.float().repeat(1, 8)
        counts = []
        for layer, own in layers:
            sent = layer.send(rows, ids)
            counts.append((sent.rows[:, 0].long() == own[sent.slots]).sum())
        found.append(torch.stack(counts).tolist())
    return np.array(found, np.int64).reshape(-1, len(layers)).T


def size_exchange(
    device: torch.device, study: Study, experts: ExpertWeights, layout: Layout, plan: Plan
) -> Repetitions:
    """Times the size exchange by itself."""
    layer = ParallelExperts(experts_of_rank(experts, layout, dist.get_rank()), layout)
    own = own_part(batch_of(study.batches[0], 1, device, plan.dtype))
    return repeat_together(
        lambda: layer.exchange_sizes(own[1]), device=device, repeats=plan.repeats
    )


def all_estimates(
    jobs: Sequence[tuple[int, PlannerSetting]],
    study: Study,
    experts: ExpertWeights,
    plan: Plan,
    line: AllToAllLine,
    size_ms: dict[bool, float],
    *,
    until_s: float | None = None,
) -> dict[tuple[int, PlannerSetting], list[StepEstimate]]:
    """Returns estimates by (devices, setting), one per batch; ranks share the work.

    A rank takes all placements of as many slots a device: each other number of slots may need
    kernels of its own, which takes longer to compile than to run. Numbers of slots go to the ranks
    in turn as ``jobs`` first has them, so that no rank has all that is wanted most.

    Args:
        jobs: Devices and setting of each, most wanted first.
        study: What is run.
        experts: The whole layer.
        plan: How.
        line: Of all-to-alls.
        size_ms: Of a size exchange, with replicas and without.
        until_s: When to begin no more, by `time.time`.
    """
    slots_per_device = [len(study.layouts[n][name].expert) // n for n, name in jobs]
    num_ranks = dist.get_world_size()
    ranks = dealt(slots_per_device, num_ranks)
    own = [job for rank, job in zip(ranks, jobs, strict=True) if rank == dist.get_rank()]
    rounds: dict[tuple[int, PlannerSetting], list[list[StepEstimate]]] = {}
    for count, name in own * ESTIMATE_ROUNDS:
        if until_s is not None and time.time() > until_s:
            break
        layout = study.layouts[count][name]
        weights = experts.select(torch.from_numpy(layout.expert).to(experts.w_in.device))
        made = [
            estimated_step(
                batch,
                weights,
                layout,
                exchange=line,
                size_exchange_ms=size_ms[is_replicated(layout)],
                kernel=plan.kernel,
                repeats=plan.share_repeats,
            )
            for batch in study.batches
        ]
        rounds.setdefault((count, name), []).append(made)
    mine = {job: [middle(each) for each in zip(*made, strict=True)] for job, made in rounds.items()}
    every: list[Any] = [None] * num_ranks
    dist.all_gather_object(every, mine)
    found = {key: value for each in every for key, value in each.items()}
    return {job: found[job] for job in jobs if job in found}


def middle(estimates: Sequence[StepEstimate]) -> StepEstimate:
    """Returns the one whose step is in the middle, the shorter one of two."""
    return sorted(estimates, key=lambda each: each.step_ms)[(len(estimates) - 1) // 2]


def dealt(slots_per_device: Sequence[int], num_ranks: int) -> list[int]:
    """Returns the rank of each job: all of as many slots have one, in turn by the first of them."""
    kinds = list(dict.fromkeys(slots_per_device))
    return [kinds.index(slots) % num_ranks for slots in slots_per_device]


def all_steps(
    device: torch.device,
    experts: ExpertWeights,
    layouts: Mapping[PlannerSetting, Layout],
    batches: Sequence[np.ndarray],
    plan: Plan,
) -> dict[PlannerSetting, list[dict[str, Any]]]:
    """Returns the steps of every placement, one per batch, timed in rounds of all placements."""
    found: dict[PlannerSetting, list[dict[str, Any]]] = {
        name: [{"whole_ms": (), "parts_ms": dict.fromkeys(PARTS, ())} for _ in batches]
        for name in layouts
    }
    for part in np.array_split(np.arange(plan.repeats), min(NUM_ROUNDS, plan.repeats)):
        few = replace(plan, repeats=len(part))
        for name, layout in layouts.items():
            for into, ids in zip(found[name], batches, strict=True):
                step = time_step(device, experts, layout, ids, few)
                into["whole_ms"] += step["whole_ms"]
                for key, times in step["parts_ms"].items():
                    into["parts_ms"][key] += times
    return found


def time_step(
    device: torch.device,
    experts: ExpertWeights,
    layout: Layout,
    ids: np.ndarray,
    plan: Plan,
) -> dict[str, Any]:
    """Times a step as a whole, then its parts, ranks held up between them."""
    own = experts_of_rank(experts, layout, dist.get_rank())
    layer = ParallelExperts(own, layout, kernel=plan.kernel)
    batch = own_part(batch_of(ids, experts.d_model, device, plan.dtype))
    whole = repeat_together(lambda: layer(*batch), device=device, repeats=plan.repeats)
    clock = PartClock(device)
    for _ in range(plan.repeats):
        layer(*batch, clock=clock)
    times = clock.times_ms()
    parts = {part: slowest_ms(times[part], device) for part in PARTS}
    return {"whole_ms": whole.times_ms, "parts_ms": parts}
