"""What every rank runs of `analysis.gpu.expert_parallel`: checks, exchanges, estimates, steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moeprof.live.exchange_times import time_exchanges
from moeprof.live.expert_parallel import PARTS, ParallelExperts, experts_of_rank, on_one_device
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.parallel_clocks import PartClock, repeat_together, slowest_ms
from moeprof.live.parallel_estimates import (
    AllToAllLine,
    StepEstimate,
    estimated_step,
    fitted_line,
)
from moeprof.live.parallel_plans import shard_starts
from moeprof.live.parallel_traces import PlannerSetting
from moeprof.live.repetitions import Repetitions
from moeprof.replay.loads import Layout

NARROW: dict[str, Any] = {"d_model": 64, "d_ff": 64, "gated": True, "bias": True}
NUM_CHECKED_OUTPUTS = 4


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
    """

    outputs: dict[PlannerSetting, dict[str, Any]]
    timed_outputs: dict[PlannerSetting, dict[str, Any]]
    arrived: list[np.ndarray]
    size_exchange: dict[PlannerSetting, Repetitions]
    estimates: dict[tuple[int, PlannerSetting], list[StepEstimate]]
    steps: dict[PlannerSetting, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankFindings:
    """What one rank found out.

    Attributes:
        exchanges: Times of all-to-alls by size, the slowest rank's.
        line: Through their medians.
        studies: One per trace.
    """

    exchanges: list[Repetitions]
    line: AllToAllLine
    studies: list[Findings]


def measured(device: torch.device, studies: list[Study], plan: Plan) -> RankFindings:
    """Runs everything on one rank."""
    exchanges = time_exchanges(device, plan.exchange_bytes, plan.repeats)
    line = fitted_line(
        plan.exchange_bytes,
        [each.median_ms for each in exchanges],
        num_ranks=dist.get_world_size(),
    )
    say(f"all-to-all: {1e3 * line.latency_ms:.1f} us + bytes / {line.bytes_per_s / 1e9:.1f} GB/s")
    return RankFindings(
        exchanges=exchanges,
        line=line,
        studies=[run_study(device, study, plan, line) for study in studies],
    )


def run_study(device: torch.device, study: Study, plan: Plan, line: AllToAllLine) -> Findings:
    """Checks, predicts, then times."""
    layouts = study.layouts[dist.get_world_size()]
    outputs = {name: checked_outputs(device, study, each) for name, each in layouts.items()}
    num_equal, num_checked = (
        sum(each[key] for each in outputs.values()) for key in ("num_equal", "num_dispatches")
    )
    say(f"outputs equal to the bit in {num_equal}/{num_checked}")
    rows = [arrived(device, check) for check in study.checks]
    say("loads counted")
    experts = full_experts(device, study, plan)
    timed_outputs = {
        name: close_outputs(device, study, experts, each, plan) for name, each in layouts.items()
    }
    sizes = {
        name: size_exchange(device, study, experts, each, plan) for name, each in layouts.items()
    }
    # Replicas make the exchange longer: rows are numbered after it, not meanwhile.
    by_kind: dict[bool, list[float]] = {}
    for name, each in layouts.items():
        by_kind.setdefault(is_replicated(each), []).append(sizes[name].median_ms)
    size_ms = {kind: statistics.median(times) for kind, times in by_kind.items()}
    estimates = all_estimates(study, experts, plan, line, size_ms)
    say("predicted")
    steps = {
        name: [time_step(device, experts, each, batch, plan) for batch in study.batches]
        for name, each in layouts.items()
    }
    return Findings(
        outputs=outputs,
        timed_outputs=timed_outputs,
        arrived=rows,
        size_exchange=sizes,
        estimates=estimates,
        steps=steps,
    )


def is_replicated(layout: Layout) -> bool:
    """Returns True where some expert has more than one slot."""
    return bool((layout.counts > 1).any())


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most so many indices below ``count``, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def say(what: str) -> None:
    """Prints on one rank only."""
    if dist.get_rank() == 0:
        print(f"  {what}", flush=True)


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
    """Holds outputs of the timed kernel at full size to one device's."""
    own = experts_of_rank(experts, layout, dist.get_rank())
    layer = ParallelExperts(own, layout, kernel=plan.kernel)
    batch = batch_of(study.batches[0], experts.d_model, device, plan.dtype)
    out, again = layer(*own_part(batch)), layer(*own_part(batch))
    reference = own_part([on_one_device(*batch, experts, layout)])[0]
    return {
        "relative_error": relative_error(out, reference),
        "same_twice": everywhere(torch.equal(out, again), device),
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


def arrived(device: torch.device, check: SiteCheck) -> np.ndarray:
    """Returns [settings, dispatches] the rows that reached this rank.

    Every row carries the id of its expert; only rows that came to a slot of that expert count.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = np.zeros((len(check.layouts), len(check.dispatches)), np.int64)
    for place, layout in enumerate(check.layouts.values()):
        narrow = random_experts(
            num_experts=layout.num_experts, d_model=8, d_ff=8, device=device, dtype=torch.float32
        )
        layer = ParallelExperts(experts_of_rank(narrow, layout, rank), layout)
        per_device = layer.own.num_experts
        own = torch.from_numpy(layout.expert[rank * per_device :][:per_device]).to(device)
        for index, each in enumerate(check.dispatches):
            first, last = shard_starts(len(each), num_ranks)[rank : rank + 2]
            # A row per slot of a token, in the same order.
            ids = torch.from_numpy(each[first:last].reshape(-1, 1)).long().to(device)
            sent = layer.send(ids.float().repeat(1, 8), ids)
            found[place, index] = int((sent.rows[:, 0].long() == own[sent.slots]).sum())
    return found


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
    study: Study,
    experts: ExpertWeights,
    plan: Plan,
    line: AllToAllLine,
    size_ms: dict[bool, float],
) -> dict[tuple[int, PlannerSetting], list[StepEstimate]]:
    """Returns estimates by (devices, setting), one per batch; ranks share the work."""
    jobs = [(count, name) for count, layouts in study.layouts.items() for name in layouts]
    mine = {}
    for count, name in jobs[dist.get_rank() :: dist.get_world_size()]:
        layout = study.layouts[count][name]
        slots = experts.select(torch.from_numpy(layout.expert).to(experts.w_in.device))
        mine[count, name] = [
            estimated_step(
                batch,
                slots,
                layout,
                exchange=line,
                size_exchange_ms=size_ms[is_replicated(layout)],
                kernel=plan.kernel,
                repeats=plan.share_repeats,
            )
            for batch in study.batches
        ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return {key: value for each in every for key, value in each.items()}


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
