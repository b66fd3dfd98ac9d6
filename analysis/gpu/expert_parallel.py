"""Runs expert parallelism on the GPUs of a host, under every planner's placement and real routing.

    python -m analysis.gpu.expert_parallel --out DIR --routing TRACE [TRACE ...]   # all GPUs, NCCL
    python -m analysis.gpu.expert_parallel --out DIR --tiny [--ranks 4]            # CPU, gloo

Starts a process per GPU. For each trace (a twin of arXiv 2303.06182's models, or any other):

* outputs against one device that runs the same rows together: to the bit with ``dynamic_loop`` on
  narrow experts in float32, and within rounding with the kernel that is timed, at full size;
* the rows that reach every device, dispatch by dispatch, against the replay's
  (`moeprof.replay.loads.device_loads`, replicas dealt round robin);
* all-to-alls of several sizes, and the line latency + bytes / bandwidth through them;
* the time of a step and of its parts under every placement, beside what was predicted before: the
  slowest share of the experts (each device's share in turn on one GPU), the exchanges from the
  line, the work on a rank's own tokens;
* the same arithmetic for 8, 16 and 32 devices, times the median of measured over predicted of the
  steps here of the same trace and number of tokens: an estimate, whose error bar is the range of
  these ratios. It takes every link to be as fast as those measured.

Experts are of the full size of the paper's models (Qwen3-30B-A3B's for its trace) with random
weights; gate weights are drawn; routing is the trace's. Placements are planned on window A; steps
are judged on consecutive dispatches of window B, joined to as many tokens as are asked for.

Every repetition is kept in DIR/expert_parallel.json, which is written anew after every trace. What
time there is (--seconds) is dealt to the traces: fewer dispatches are checked and fewer settings of
more devices estimated where it is short. Of these the contiguous, greedy, EPLB and robust
placements come first, on 8, 16 and 32 devices, and it is said which were not tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.parallel_studies import (
    ESTIMATE_ROUNDS,
    NUM_ROUNDS,
    Findings,
    Plan,
    SiteCheck,
    Study,
    by_importance,
    everywhere,
    is_wanted,
    run_study,
    say,
    spread,
)
from analysis.gpu.time_spent import TimeSpent, print_seconds
from moeprof.errors import UsageError
from moeprof.live.exchange_times import time_exchanges
from moeprof.live.expert_parallel import PARTS
from moeprof.live.parallel_estimates import AllToAllLine, StepEstimate, fitted_line
from moeprof.live.parallel_plans import rows_to_slots, shard_counts
from moeprof.live.parallel_traces import PlannerSetting, SiteDispatches, site_dispatches
from moeprof.live.rank_processes import run_ranks
from moeprof.live.repetitions import Repetitions
from moeprof.live.routing_sources import read_routing
from moeprof.replay.loads import Layout, max_over_mean
from moeprof.replay.planners import NOTHING, PLANNERS
from moeprof.trace.reader import open_trace
from moeprof.trace.schema import Site
from moeprof.trace.synthetic import synthetic_trace

RESULT = "expert_parallel.json"
WITH_REPLICAS = ("greedy", "eplb", "eplb_global", "second_moment", "peak", "robust")
SHARE_REDUNDANT = 16
"""One slot beyond one per expert for so many experts, rounded to the devices."""
SCALED_DEVICES = (8, 16, 32)
LONGEST_WAIT_S = 120.0
"""Least that a rank waits for another, which may compile meanwhile."""
EXCHANGE_BYTES = tuple(1 << power for power in range(10, 29, 2))

SHAPES: dict[str, dict[str, Any]] = {
    "paper LM": {"d_model": 1024, "d_ff": 4096, "gated": False, "bias": True, "activation": "relu"},
    "paper MT": {"d_model": 2048, "d_ff": 8192, "gated": False, "bias": True, "activation": "relu"},
    "Qwen3-30B-A3B": {"d_model": 2048, "d_ff": 768, "gated": True, "bias": False},
    "tiny": {"d_model": 64, "d_ff": 128, "gated": True, "bias": True},
}
TOLERANCE = 1e-2
"""Largest relative error of the timed kernel against one device: roundings to bfloat16."""
NOTES = (
    "outputs: narrow experts in float32 with dynamic_loop, to the bit; timed_outputs: the timed "
    "kernel at full size, relative to one device with dynamic_loop",
    "steps: the slowest rank of each repetition, all setting out together; parts likewise, ranks "
    f"held up between them, so that their sum is not the step; in {NUM_ROUNDS} rounds of all "
    "placements",
    f"predictions and estimates are the middle of {ESTIMATE_ROUNDS} rounds of all placements, or "
    "of as many as there was time for",
    "scaling is an estimate: each device's share in turn on one GPU, the slowest counted; exchange "
    "times from the line; size exchange as measured here; uncorrected_ms is their sum, parts_ms "
    "its parts; step_ms is that times the median of measured over predicted of the steps here of "
    "the same trace and number of tokens, low_ms and high_ms times the least and the greatest, of "
    "num_ratios; no network between hosts is in it",
)
BY_EXPERTS = {(512, 2): "paper LM", (128, 2): "paper MT", (128, 6): "Qwen3-30B-A3B"}
"""Whose experts a layer of so many experts and slots drives; others drive their own."""


def settings_for(
    planners: Sequence[str], num_experts: int, num_devices: int
) -> list[PlannerSetting]:
    """Returns the planners without replicas, and those that make something of them with some."""
    redundant = num_devices * max(1, num_experts // SHARE_REDUNDANT // num_devices)
    return [
        *(PlannerSetting(planner=name) for name in planners),
        *(
            PlannerSetting(planner=n, num_redundant=redundant)
            for n in planners
            if n in WITH_REPLICAS
        ),
    ]


def shape_of(site: Site, *, tiny: bool) -> tuple[str, dict[str, Any]]:
    """Returns the name and shape of the experts that a site's routing drives."""
    name = "tiny" if tiny else BY_EXPERTS.get((site.num_experts, site.top_k))
    if name is not None:
        return name, SHAPES[name]
    if site.d_model is None or site.d_ff is None:
        raise UsageError(
            f"the trace does not say how large its {site.num_experts} experts are",
            hint=f"shapes are known for {', '.join(map(str, BY_EXPERTS))} experts and slots",
        )
    gated = site.matrices_per_expert == 3
    return "its own", {"d_model": site.d_model, "d_ff": site.d_ff, "gated": gated, "bias": False}


def planned(
    sites: Sequence[SiteDispatches], planners: Sequence[str], num_devices: int
) -> list[dict[PlannerSetting, Layout]]:
    """Returns the placements of every site."""
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for site in sites:
            names = settings_for(planners, site.site.num_experts, num_devices)
            made = pool.map(site.layout, names, [num_devices] * len(names))
            found.append((names, made))
        return [dict(zip(names, made, strict=True)) for names, made in found]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A trace as this process sees it.

    Attributes:
        name: Of the trace.
        said: Where routing comes from.
        shape: Whose experts it drives.
        sites: All that are checked; the first is timed.
        chosen: Indices of the dispatches to check, by site, in an order that may end anywhere.
        num_passes: Passes joined in each batch.
        study: What ranks get.
    """

    name: str
    said: dict[str, Any]
    shape: str
    sites: list[SiteDispatches]
    chosen: list[np.ndarray]
    num_passes: list[int]
    study: Study


def subject_of(path: str, options: argparse.Namespace, num_ranks: int) -> Subject:
    """Reads a trace, plans on it, and chooses what is checked and timed."""
    trace = open_trace(path)
    stack = options.stack or trace.stacks[-1]
    ids = [site.site for site in trace.info.sites_of(stack)]
    middle = ids[len(ids) // 2]
    others = [site for site in ids if site != middle][: max(options.sites - 1, 0)]
    sites = site_dispatches(trace, stack=stack, sites=[middle, *others])
    source = read_routing(trace, stacks=[stack], weights="uniform", rank=trace.ranks[0]).source
    if len(trace.ranks) > 1:
        source = source.changed("passes of all ranks merged")
    mixed = np.random.default_rng(0)
    chosen = [mixed.permutation(spread(len(site), options.max_dispatches)) for site in sites]
    layouts = planned(sites, options.planners, num_ranks)
    timed = sites[0]
    # A short trace gives the same batch twice.
    joined = {len(ids): (ids, num) for ids, num in map(timed.joined, options.tokens)}
    num_experts = timed.site.num_experts
    by_devices = {num_ranks: layouts[0]}
    for count in SCALED_DEVICES:
        if count not in by_devices and num_experts % count == 0:
            by_devices[count] = planned([timed], options.planners, count)[0]
    name, shape = shape_of(timed.site, tiny=options.tiny)
    study = Study(
        shape=shape,
        num_experts=num_experts,
        checks=[
            SiteCheck(dispatches=[site.dispatch(i) for i in picked.tolist()], layouts=own)
            for site, picked, own in zip(sites, chosen, layouts, strict=True)
        ],
        batches=[ids for ids, _ in joined.values()],
        layouts=by_devices,
    )
    return Subject(
        name=Path(path.rstrip("/")).name,
        said=source.changed("gate weights drawn").to_json(),
        shape=name,
        sites=sites,
        chosen=chosen,
        num_passes=[num for _, num in joined.values()],
        study=study,
    )


def load_rows(subject: Subject, found: Sequence[Findings]) -> Iterator[dict[str, Any]]:
    """Yields a row per site and setting: how many dispatches arrived as the replay says.

    Args:
        subject: The trace.
        found: What each rank found.
    """
    for place, (site, all_chosen) in enumerate(zip(subject.sites, subject.chosen, strict=True)):
        live = np.stack([each.arrived[place] for each in found], axis=-1)
        chosen = all_chosen[: live.shape[1]]
        kept = site.judged[chosen] & (site.rows[chosen].sum(axis=1) > 0)
        for (setting, layout), rows in zip(
            subject.study.checks[place].layouts.items(), live, strict=True
        ):
            replayed = site.device_loads(layout)[chosen]
            yield {
                "site": site.site.site,
                "setting": str(setting),
                "num_dispatches": len(chosen),
                "num_dispatches_of_trace": len(site),
                "num_equal": int((rows == replayed).all(axis=1).sum()),
                "num_rows_lost": int(site.rows[chosen].sum() - rows.sum()),
                "mean_max_over_mean": (
                    float(max_over_mean(replayed[kept]).mean()) if kept.any() else None
                ),
            }


def step_rows(
    subject: Subject, found: Findings, num_ranks: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns measured steps beside their prediction, and estimates for more devices."""
    study = subject.study
    ratios: list[list[float]] = [[] for _ in study.batches]
    measured_rows, scaled_rows = [], []
    for setting, layout in study.layouts[num_ranks].items():
        for index, step in enumerate(found.steps[setting]):
            estimate = found.estimates[num_ranks, setting][index]
            median_ms = statistics.median(step["whole_ms"])
            ratios[index].append(median_ms / estimate.step_ms)
            measured_rows.append(
                {
                    **described(subject, setting, index, layout),
                    "figure_class": "measured",
                    "step_ms": median_ms,
                    "predicted_ms": estimate.step_ms,
                    "measured_over_predicted": ratios[index][-1],
                    "parts_ms": {p: statistics.median(t) for p, t in step["parts_ms"].items()},
                    "predicted_parts_ms": predicted_parts(estimate),
                    "busiest_bytes": estimate.busiest_bytes,
                    "times_ms": step["whole_ms"],
                    "part_times_ms": step["parts_ms"],
                }
            )
    for (count, setting), estimates in found.estimates.items():
        if count == num_ranks:
            continue
        for index, estimate in enumerate(estimates):
            corrected = estimate.corrected(ratios[index])
            scaled_rows.append(
                {
                    **described(subject, setting, index, study.layouts[count][setting]),
                    "figure_class": estimate.figure_class,
                    "uncorrected_ms": estimate.step_ms,
                    **dataclasses.asdict(corrected),
                    "parts_ms": predicted_parts(estimate),
                    "shares_ms": estimate.shares_ms,
                    "busiest_bytes": estimate.busiest_bytes,
                }
            )
    scaled_rows.sort(key=lambda row: (row["num_devices"], row["num_tokens"]))
    return measured_rows, scaled_rows


def predicted_parts(estimate: StepEstimate) -> dict[str, float]:
    """Returns the parts of an estimate by the names of `PARTS`."""
    return {part: getattr(estimate, f"{part}_ms") for part in PARTS}


def described(
    subject: Subject, setting: PlannerSetting, index: int, layout: Layout
) -> dict[str, Any]:
    """Returns what a step was of."""
    ids = subject.study.batches[index]
    counts = shard_counts(ids, [0, len(ids)], subject.study.num_experts)
    rows = rows_to_slots(counts, layout).reshape(layout.num_devices, -1).sum(axis=1)
    return {
        "planner": setting.planner,
        "num_redundant": len(layout.expert) - subject.study.num_experts,
        "num_devices": layout.num_devices,
        "num_tokens": len(ids),
        "num_passes_joined": subject.num_passes[index],
        "max_over_mean": float(max_over_mean(rows)),
    }


def regret(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, by number of tokens, what choosing by prediction costs over the best measured."""
    found = []
    for count in sorted({row["num_tokens"] for row in rows}):
        mine = [row for row in rows if row["num_tokens"] == count]
        chosen = min(mine, key=lambda row: row["predicted_ms"])
        best = min(mine, key=lambda row: row["step_ms"])
        found.append(
            {
                "num_tokens": count,
                "chosen": f"{chosen['planner']}+{chosen['num_redundant']}",
                "best": f"{best['planner']}+{best['num_redundant']}",
                "regret": chosen["step_ms"] / best["step_ms"] - 1,
            }
        )
    return found


def subject_result(subject: Subject, found: Sequence[Findings]) -> dict[str, Any]:
    """Returns what a results file says of one trace; prints the gist.

    Args:
        subject: The trace.
        found: What each rank found.
    """
    load_table = list(load_rows(subject, found))
    measured_rows, scaled_rows = step_rows(subject, found[0], len(found))
    num_equal = sum(row["num_equal"] for row in load_table)
    num_checked = sum(row["num_dispatches"] for row in load_table)
    lines = [
        f"{subject.name} ({subject.shape}): loads are the replay's in {num_equal}/{num_checked}"
    ]
    for row in measured_rows:
        lines.append(f"  {row_text(row)}, predicted {row['predicted_ms']:8.3f}")
    lines += map(estimate_text, nothing_and_fastest(scaled_rows))
    missing = list(not_estimated(subject, found[0], len(found)))
    lines.append(
        f"  not estimated for more devices: {len(missing)}, of which most wanted"
        f" {sum(each['wanted'] for each in missing)}"
    )
    print("\n".join(lines), flush=True)
    return {
        "trace": subject.name,
        "routing": subject.said,
        "experts": subject.shape,
        "geometry": {"num_experts": subject.study.num_experts, **subject.study.shape},
        "timed_site": subject.sites[0].site.site,
        "outputs": {str(name): each for name, each in found[0].outputs.items()},
        "timed_outputs": {str(name): each for name, each in found[0].timed_outputs.items()},
        "loads": load_table,
        "size_exchange_ms": {
            str(name): each.times_ms for name, each in found[0].size_exchange.items()
        },
        "steps": measured_rows,
        "regret": regret(measured_rows),
        "scaling": scaled_rows,
        "num_scaled_settings": sum(
            len(layouts) for count, layouts in subject.study.layouts.items() if count != len(found)
        ),
        "not_estimated": missing,
        "seconds_by_part": found[0].seconds,
    }


def not_estimated(subject: Subject, found: Findings, num_ranks: int) -> Iterator[dict[str, Any]]:
    """Yields what was not estimated for more devices, most wanted first, and why.

    Args:
        subject: The trace.
        found: What a rank found.
        num_ranks: Devices there are.
    """
    layouts = subject.study.layouts
    for count in SCALED_DEVICES:
        if count not in layouts:
            reason = f"{subject.study.num_experts} experts do not deal evenly"
            yield {"num_devices": count, "setting": None, "wanted": True, "reason": reason}
    for count, setting in by_importance(layouts, num_ranks):
        if (count, setting) not in found.estimates:
            yield {
                "num_devices": count,
                "setting": str(setting),
                "wanted": is_wanted(setting),
                "reason": "the time given to this trace was up",
            }


def nothing_and_fastest(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields, by devices and tokens, the row of doing nothing and the fastest one."""
    sizes = {(row["num_devices"], row["num_tokens"]) for row in rows}
    for devices, tokens in sorted(sizes):
        mine = [r for r in rows if (r["num_devices"], r["num_tokens"]) == (devices, tokens)]
        yield from (row for row in mine if row["planner"] == NOTHING)
        yield min(mine, key=lambda row: row["step_ms"])


def row_text(row: dict[str, Any]) -> str:
    """Returns what a step was of and what it took, for the terminal."""
    planner = f"{row['planner']} +{row['num_redundant']}"
    return (
        f"{row['num_devices']:3d} devices {planner:28s} {row['num_tokens']:6d} tokens"
        f"  max/mean {row['max_over_mean']:.3f} {row['step_ms']:8.3f} ms"
    )


def estimate_text(row: dict[str, Any]) -> str:
    """Returns an estimate for the terminal."""
    return f"  {row_text(row)} ({row['low_ms']:.3f} to {row['high_ms']:.3f}), estimate"


def failures(result: dict[str, Any]) -> list[str]:
    """Returns what does not hold."""
    run = {each["trace"] for each in result["traces"]}
    said = [f"{name}: not run" for name in result["traces_asked_for"] if name not in run]
    for each in result["traces"]:
        for row in each["loads"]:
            if row["num_equal"] < row["num_dispatches"] or row["num_rows_lost"]:
                said.append(f"{each['trace']}: loads of {row['setting']} at site {row['site']}")
        for name, row in each["outputs"].items():
            if min(row["num_equal"], row["num_same_twice"]) < row["num_dispatches"]:
                said.append(f"{each['trace']}: outputs of {name}, off by {row['largest_error']}")
        for name, row in each["timed_outputs"].items():
            if not (row["same_twice"] and row["relative_error"] <= TOLERANCE):
                said.append(f"{each['trace']}: {result['kernel']} under {name}: {row}")
    return said


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, tiny sizes filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", nargs="+", default=[], help="traces whose routing is run")
    parser.add_argument("--stack", help="encoder or decoder; the last one otherwise")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS))
    parser.add_argument("--sites", type=int, default=2, help="sites whose loads are checked")
    parser.add_argument("--max-dispatches", type=int, default=400, help="dispatches checked a site")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--ranks", type=int, help="processes; one per GPU, or 2 on a CPU")
    parser.add_argument("--kernel", default="dynamic", help="gating kernel that is timed")
    parser.add_argument("--seconds", type=float, default=130.0, help="time to be done in")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.tokens, options.kernel = [32, 96], "dynamic_loop"
        options.ranks = options.ranks or 2
    elif not options.routing:
        parser.error("--routing is needed: a trace to run under")
    options.ranks = options.ranks or torch.cuda.device_count()
    if options.ranks < 2:
        parser.error("experts are spread over two devices at least")
    return options


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """The results file and what is in it besides results.

    Attributes:
        path: The file.
        head: Where, when and how.
        subjects: All traces that are asked for.
        until_s: When to be done, by `time.time`.
    """

    path: Path
    head: dict[str, Any]
    subjects: list[Subject]
    until_s: float

    def write(
        self,
        sizes: Sequence[int],
        exchanges: Sequence[Repetitions],
        line: AllToAllLine,
        results: list[dict[str, Any]],
    ) -> None:
        """Writes what there is.

        Args:
            sizes: Bytes that a rank sends to the others in an exchange.
            exchanges: Its times.
            line: Through them.
            results: Of the traces that were run.
        """
        result = {
            **self.head,
            "all_to_all": {
                "line": dataclasses.asdict(line),
                "bytes_to_others": sizes,
                "times_ms": [each.times_ms for each in exchanges],
            },
            "notes": NOTES,
            "traces_asked_for": [each.name for each in self.subjects],
            "traces": results,
        }
        write_json(self.path, result)


def measured(device: torch.device, plan: Plan, record: Record) -> None:
    """Runs everything on one rank; the first one writes after every trace."""
    exchanges = time_exchanges(device, plan.exchange_bytes, plan.repeats)
    line = fitted_line(
        plan.exchange_bytes,
        [each.median_ms for each in exchanges],
        num_ranks=dist.get_world_size(),
    )
    say(f"all-to-all: {1e3 * line.latency_ms:.1f} us + bytes / {line.bytes_per_s / 1e9:.1f} GB/s")
    results: list[dict[str, Any]] = []
    if dist.get_rank() == 0:
        record.write(plan.exchange_bytes, exchanges, line, results)
    for place, subject in enumerate(record.subjects):
        left_s = record.until_s - time.time()
        if not everywhere(left_s > 0, device):
            say(f"no time left for {subject.name}")
            break
        say(f"{subject.name}, {left_s:.0f} s left")
        until_s = time.time() + left_s / (len(record.subjects) - place)
        # What is wanted most may take half of what is left for the others.
        wanted_until_s = (until_s + record.until_s) / 2
        found = run_study(device, subject.study, plan, line, until_s, wanted_until_s)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, found)
        if dist.get_rank() == 0:
            results.append(subject_result(subject, every))
            record.write(plan.exchange_bytes, exchanges, line, results)
        # The weights of a layer go back, so that the next one's find room in one piece.
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns 1 where outputs or loads are not what they should be."""
    until_s = time.time()
    options = options_of(arguments)
    until_s += options.seconds
    backend = "gloo" if options.tiny else "nccl"
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "analysis.gpu.expert_parallel", *given])
    plan = Plan(
        kernel=options.kernel,
        dtype=torch.float32 if options.tiny else torch.bfloat16,
        repeats=3 if options.tiny else 20,
        share_repeats=2 if options.tiny else 10,
        exchange_bytes=EXCHANGE_BYTES[:6] if options.tiny else EXCHANGE_BYTES,
    )
    path = options.out / RESULT
    with tempfile.TemporaryDirectory() as folder:
        traces = options.routing or [made_up(folder)]
        subjects = []
        spent = TimeSpent()
        for each in traces:
            with spent.part("planning"):
                subjects.append(subject_of(each, options, options.ranks))
            print(f"planned {subjects[-1].name}", flush=True)
        head = {
            **evidence(command, "cpu" if options.tiny else "cuda"),
            "num_ranks": options.ranks,
            "backend": backend,
            "kernel": options.kernel,
            "planning_s": spent.seconds["planning"],
            "step_rounds": min(NUM_ROUNDS, plan.repeats),
        }
        record = Record(path=path, head=head, subjects=subjects, until_s=until_s)
        # A rank with less to estimate waits for the others, at most as long as there is time.
        longest_s = max(LONGEST_WAIT_S, options.seconds)
        run_ranks(measured, options.ranks, plan, record, backend=backend, timeout_s=longest_s)
    result = json.loads(path.read_text(encoding="utf-8"))
    print_seconds(
        {"planning": result["planning_s"]}
        | {
            f"{each['trace']}: {part}": seconds
            for each in result["traces"]
            for part, seconds in each["seconds_by_part"].items()
        }
    )
    print(f"written to {path}")
    wrong = failures(result)
    for text in wrong:
        print(f"WRONG: {text}", file=sys.stderr)
    return 1 if wrong else 0


def made_up(folder: str) -> str:
    """Makes a trace to try the script with; returns its path."""
    path = f"{folder}/made-up.moeprof"
    synthetic_trace(path, num_requests=12, num_sites=2, num_experts=32, top_k=2, output_tokens=4)
    return path


if __name__ == "__main__":
    sys.exit(main())
