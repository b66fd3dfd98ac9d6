"""Runs expert buffering under one setting after another and holds each to its replay.

Leaves out what is run (`buffering_live`) and how outputs are compared where experts ran on the host
(`buffering_outputs`).
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import moeprof
from analysis.gpu.allocator_readings import (
    allocator_reading,
    handed_out,
    is_steady,
    steady_state,
)
from analysis.gpu.buffering_outputs import compared, noticed, wrong_layers, wrong_on_host
from analysis.gpu.link_readings import is_link_within, link_judged
from moeprof.live.buffer_settings import BufferedSite, BufferMemory, BufferSettings, described
from moeprof.live.copy_witness import (
    copies_by_step,
    link_overhead,
    overlapped_share,
    profiled,
    step_range,
    watched_link,
)
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import host_bytes
from moeprof.live.routed_runs import (
    ExpertGeometry,
    RoutedStep,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.live.setting_runs import geometry_of, open_stack
from moeprof.recording.devices import NullMeter
from moeprof.replay.buffer_plans import plan_buffer, read_routed_rows
from moeprof.replay.serving_settings import BufferingSetting

KEYS = ["step", "stack", "site", "layer", "expert", "hit"]
GIB = 2**30
# What else crosses the link while these are copied must be nothing beside them.
OVERHEAD_COPIES, OVERHEAD_BYTES = 256, 2 * GIB
# Enough to see every layer compute with experts of another one, prefill and decode.
WRONG_LAYER_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Study:
    """One geometry under one trace.

    Attributes:
        name: Of the study.
        trace: Path or sample.
        stack: Stack of the trace.
        geometry: Shape of random experts; None: the experts of the model that was recorded.
        policies: Policies, most wanted first.
        capacities: Slots per cache, most wanted first.
        misses: (policy, capacity, miss action) besides; on one device, which is what copies are
            planned for where not every miss is one.
        aheads: (policy, capacity, experts copied ahead) besides; on one device too.
        devices: Devices that experts are spread over.
        device: Which of them runs here.
        max_steps: Most steps of the trace.
        seconds: No setting is begun later than this after the first; making weights comes before.
        repetitions: Timed runs of each setting.
        profile_steps: Decode steps under the profiler, beside the prefill before them; none is
            where this is 0.
        share_host: All layers read one host copy of random experts, each at another place of it.
    """

    name: str
    trace: str
    stack: str
    geometry: ExpertGeometry | None
    policies: tuple[str, ...]
    capacities: tuple[int, ...]
    misses: tuple[tuple[str, int, str], ...]
    aheads: tuple[tuple[str, int, int], ...] = ()
    devices: int = 1
    device: int = 0
    max_steps: int | None = None
    seconds: float = 120.0
    repetitions: int = 3
    profile_steps: int = 8
    share_host: bool = False


class Bench:
    """Runs the settings of one study.

    Args:
        study: What to run.
        device: Where.
    """

    def __init__(self, study: Study, device: torch.device) -> None:
        self.study = study
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.trace = moeprof.open(study.trace)
        begun = time.perf_counter()
        self.geometry: ExpertGeometry
        self.sites: list[BufferedSite]
        self.steps: list[RoutedStep]
        if study.geometry is None:
            self._open_model()
        else:
            self._make_experts(study.geometry)
        self.build_s = time.perf_counter() - begun
        self.last_step = max(step.step for step in self.steps)
        host = host_bytes(site.store for site in self.sites)
        say(f"{study.name}: {len(self.sites)} layers, {host / GIB:.1f} GiB of experts on the host, "
            f"{len(self.steps)} steps, made in {self.build_s:.0f} s")  # fmt: skip
        besides = [one[:2] for one in (*study.misses, *study.aheads)]
        self.predicted = moeprof.replay.buffering(
            self.trace,
            policies=list(dict.fromkeys([*study.policies, *(each for each, _ in besides)])),
            capacities=list(dict.fromkeys([*study.capacities, *(each for _, each in besides)])),
            semantics="sequential",
            devices=study.devices,
        )
        self.expected: list[torch.Tensor] = []
        self.overhead: float | None = None
        self.ends_s: float | None = None

    def _make_experts(self, geometry: ExpertGeometry) -> None:
        study = self.study
        share = {"device_index": study.device, "num_devices": study.devices}
        self.geometry, self.weights_source = geometry, "random weights"
        self.steps = routed_steps(
            self.trace,
            stack=study.stack,
            device=self.device,
            dtype=geometry.dtype,
            max_steps=study.max_steps,
            **share,
        )
        self.sites = random_sites(
            self.trace,
            geometry,
            stack=study.stack,
            pinned=self.is_cuda,
            share_host=study.share_host,
            **share,
        )
        self.hidden = starting_rows(self.steps, geometry, self.device)

    def _open_model(self) -> None:
        study = self.study
        stack = open_stack(
            self.trace, stack=study.stack, device=self.device, max_steps=study.max_steps
        )
        if stack.weights_source.startswith("random"):
            raise SystemExit(f"{study.name}: {stack.weights_source}")
        self.geometry, self.weights_source = geometry_of(stack.shape), stack.weights_source
        self.sites, self.steps, self.hidden = list(stack.sites), list(stack.steps), stack.hidden

    def close(self) -> None:
        """Lets go of the experts."""
        for store in {id(site.store): site.store for site in self.sites}.values():
            store.close()
        self.sites.clear()
        self.expected.clear()
        self.clean()

    def clean(self) -> None:
        """Lets go of what nobody holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def settings(
        self, capacity: int | None, policy: str, miss: str, prefetch: int = 0
    ) -> BufferSettings:
        """Returns the settings of a buffer here."""
        return BufferSettings(
            capacity=capacity,
            policy=policy,
            miss=miss,
            prefetch=prefetch,
            future=self.trace,
            device_index=self.study.device,
            num_devices=self.study.devices,
        )

    def buffer(
        self, settings: BufferSettings, sites: Sequence[BufferedSite] | None = None
    ) -> tuple[ExpertBuffer, dict[str, int]]:
        """Returns a buffer, and the bytes by which the device's memory grew."""
        before = device_bytes(self.device)
        buffer = ExpertBuffer(self.sites if sites is None else sites, settings, device=self.device)
        buffer.reserve(max(each.ids.numel() for step in self.steps for each in step.passes))
        after = device_bytes(self.device)
        return buffer, {name: after[name] - before[name] for name in after}

    def outputs(
        self,
        buffer: ExpertBuffer,
        steps: Sequence[RoutedStep],
        follow: Iterable[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Returns the output of every dispatch."""
        results = run_steps(buffer, steps, self.hidden, keep_outputs=True, follow=follow)
        return [out for result in results for out in result.outputs]

    def unbuffered(self) -> dict[str, Any]:
        """Runs with all experts on the device and keeps the outputs."""
        buffer, grown = self.buffer(self.settings(None, "lru", "load"))
        self.expected = self.outputs(buffer, self.steps)
        if not all(bool(out.isfinite().all()) for out in self.expected):
            raise SystemExit(f"{self.study.name}: outputs are not finite, nothing can be compared")
        repetitions = [self.timed(buffer) for _ in range(self.study.repetitions)]
        buffer.close()
        del buffer
        self.clean()
        row = {"device_bytes": grown, "repetitions": repetitions, **latencies(repetitions)}
        say(f"  {'unbuffered':<12} {'-':>4} {'':>7} {'':>7} {row['decode_p50_ms']:9.2f} "
            f"{row['decode_p95_ms']:9.2f} {row['decode_p99_ms']:9.2f}")  # fmt: skip
        return row

    def timed(self, buffer: ExpertBuffer) -> dict[str, Any]:
        """Returns the time of every step of one repetition, from empty caches."""
        buffer.reset()
        if self.is_cuda:
            torch.cuda.synchronize()
        found: dict[str, list[Any]] = {"phase": [], "wall_ms": []}
        readings = [allocator_reading(self.device)]
        with watched_link(None if self.is_cuda else NullMeter("runs on the CPU")) as link:
            for result in run_steps(buffer, self.steps, self.hidden):
                # Between steps, whose times end before.
                readings.append(allocator_reading(self.device))
                found["phase"].append(result.phase)
                found["wall_ms"].append(round(result.wall_ms, 4))
        readings.append(allocator_reading(self.device))
        counts = buffer.counts()
        return {
            **found,
            "allocator": handed_out([each for each in readings if each is not None]),
            "counts": asdict(counts),
            "link_bytes": link.num_bytes,
            "link_sent_bytes": link.sent_bytes,
            "link_reason": link.reason,
        }

    def planned_copies(
        self, policy: str, capacity: int, miss: str, prefetch: int, lookups: pd.DataFrame
    ) -> pd.Series[int]:
        """Returns the experts that every step copies: those missed, or as the plan has it.

        There is one where the host computes what is missed, and where experts are copied ahead.
        """
        if not prefetch and miss == "load":
            misses: pd.Series[int] = (~lookups["hit"]).groupby(lookups["step"]).sum()
            return misses
        assert self.study.devices == 1
        routed = read_routed_rows(self.trace, self.study.stack, max_steps=self.study.max_steps)
        setting = BufferingSetting(capacity=capacity, policy=policy, miss=miss, prefetch=prefetch)
        plan = plan_buffer(self.trace, routed, setting)
        return pd.Series(plan.copies_per_step(routed), index=routed.steps)

    def run(self, policy: str, capacity: int, miss: str, prefetch: int = 0) -> dict[str, Any]:
        """Runs one setting and holds it to its prediction."""
        everywhere = self.predicted.lookups(policy, capacity)
        everywhere = everywhere[
            (everywhere["stack"] == self.study.stack) & (everywhere["step"] <= self.last_step)
        ]
        lookups = everywhere[everywhere["device"] == self.study.device]
        settings = self.settings(capacity, policy, miss, prefetch)
        buffer, grown = self.buffer(settings)
        checked: dict[str, Any]
        if miss == "load":
            outputs = self.outputs(buffer, self.steps)
            same = all(map(torch.equal, outputs, self.expected))
            checked = {"outputs_hold": same, "outputs_compared": "bits"}
        else:
            outputs = self.outputs(buffer, self.steps, follow=self.expected)
            errors = compared(outputs, self.expected, self.geometry)
            checked = {
                "outputs_hold": errors["holds"],
                "outputs_compared": "rows, each dispatch given the input it had without a buffer",
                "output_errors": errors,
            }
        log = buffer.lookups()
        equal = log[KEYS].to_numpy().tolist() == lookups[KEYS].to_numpy().tolist()
        broken = buffer.audit()
        counts = buffer.counts()
        copies = self.planned_copies(policy, capacity, miss, prefetch, lookups)
        del outputs
        # What lies in cycles would be let go on the way, and hide as much that is taken.
        gc.collect()
        warm = allocator_reading(self.device)
        repetitions = [self.timed(buffer) for _ in range(self.study.repetitions)]
        allocator = steady_state(warm, allocator_reading(self.device), repetitions)
        again = buffer.lookups().equals(log)
        left_over = self.without_copies(buffer)
        memory = buffer.memory()
        row: dict[str, Any] = {
            **{k: v for k, v in described(settings).items() if k != "future"},
            **checked,
            "lookups_equal_replay": equal and again,
            "slots_broken": len(broken),
            "lookups": len(log),
            "hit_rate": float(log["hit"].mean()),
            "worst_layer_miss_rate": float(1 - log.groupby("site")["hit"].mean().min()),
            "misses": int((~log["hit"]).sum()),
            "copies": counts.copies,
            "copies_as_planned": bool(counts.copies == copies.sum()),
            "copies_ahead": counts.prefetches,
            "copies_ahead_used": counts.prefetch_used,
            "copied_bytes": repetitions[0]["counts"]["copied_bytes"],
            **allocator,
            "memory": {**asdict(memory), "saved_bytes": memory.saved_bytes},
            "device_bytes": grown,
            "requested_as_predicted": requested_as_predicted(memory, grown, self.device),
            "rounding_bytes": grown["allocated"] - grown["requested"],
            "repetitions": repetitions,
            "wait_ms_per_dispatch": 1e3 * float(np.mean([
                each["counts"]["wait_s"] / each["counts"]["dispatches"] for each in repetitions
            ])),
            **latencies(repetitions),
            **self.link(repetitions, left_over),
        }  # fmt: skip
        reason = self.why_not_profiled()
        if reason is None:
            row["profiler"] = self.profile(buffer, copies, miss)
        else:
            row["profiler_left_out"] = reason
        if self.study.devices > 1:
            row["replay_by_device"] = by_device(everywhere, self.study.devices)
        buffer.close()
        del buffer
        self.clean()
        if miss != "load":
            row["wrong_expert_on_host"] = self.wrong_experts(settings)
        say(self.line(row))
        return row

    def wrong_experts(self, settings: BufferSettings) -> dict[str, Any]:
        """Lets the host compute other experts than it should and says how often that shows."""
        sites = wrong_on_host(self.sites)
        buffer, _ = self.buffer(settings, sites)
        outputs = self.outputs(buffer, self.steps, follow=self.expected)
        found = noticed(outputs, self.expected, self.steps, sites, buffer.lookups(), self.geometry)
        buffer.close()
        del buffer
        self.clean()
        return found

    def without_copies(self, buffer: ExpertBuffer) -> list[int]:
        """Returns the bytes that the link carries where experts are not copied, all else is."""
        if not self.is_cuda:
            return []
        buffer.leave_out_copies(left_out=True)
        found = [self.timed(buffer)["link_bytes"] for _ in range(self.study.repetitions)]
        buffer.leave_out_copies(left_out=False)
        return [each for each in found if each is not None]

    def link(self, repetitions: list[dict[str, Any]], left_over: list[int]) -> dict[str, Any]:
        """Returns bytes received over bytes copied, the link's overhead taken out.

        Args:
            repetitions: Of the setting.
            left_over: Bytes of runs of it in which no expert was copied; net of them are the
                copies' own: commands, ids and rows cross the link too.
        """
        if self.overhead is None:
            return {"link_error": None}
        known = [
            (each["link_bytes"], each["counts"]["copied_bytes"] * self.overhead)
            for each in repetitions
            if each["link_bytes"] is not None and each["counts"]["copied_bytes"]
        ]
        ratios = [received / copied - 1 for received, copied in known]
        found = {"link_error": float(np.median(ratios)) if ratios else None, "link_errors": ratios}
        if left_over:
            found["link_bytes_without_copies"] = left_over
            others = float(np.median(left_over))
            found["link_errors_net"] = [(received - others) / copied - 1
                                        for received, copied in known]  # fmt: skip
        found["link_judged"] = link_judged(found)
        return found

    def measure_link(self) -> None:
        """Measures what the link adds to every byte copied."""
        if not self.is_cuda:
            return
        block = self.sites[0].store.block(0)
        slot = torch.empty(block.numel(), dtype=torch.uint8, device=self.device)
        count = max(OVERHEAD_COPIES, OVERHEAD_BYTES // block.numel())
        found = [link_overhead(slot, block, count=count) for _ in range(3)]
        known = [each for each in found if each is not None]
        self.overhead = float(np.median(known)) if known else None
        say(f"  bytes received per byte copied: {found}")

    def why_not_profiled(self) -> str | None:
        """Returns why the profiler does not look at a setting; None where it does."""
        if not self.is_cuda:
            return "runs on the CPU"
        if not self.study.profile_steps:
            return "no step was to be profiled"
        if self.ends_s is not None and time.perf_counter() > self.ends_s:
            return "out of time"
        return None

    def profile(self, buffer: ExpertBuffer, planned: pd.Series[int], miss: str) -> dict[str, Any]:
        """Counts copies with the profiler, step by step, and compares with predicted copies.

        Args:
            buffer: The setting.
            planned: Copies by step, as predicted.
            miss: Its miss action.
        """
        block_bytes = self.sites[0].store.shape.block_bytes
        windows = profiled_windows(self.steps, self.study.profile_steps)
        phases = {step.step: step.phase for step in self.steps}
        rows: list[dict[str, Any]] = []
        shares = []
        buffer.reset()
        done = 0
        for window in windows:
            # What comes before fills the caches and would only make the profile large.
            list(run_steps(buffer, self.steps[done : window.start], self.hidden))
            steps = self.steps[window.start : window.stop]
            profile = profiled(functools.partial(self.run_in_ranges, buffer, steps))
            done = window.stop
            if miss != "load":
                profile = without_rows(profile, block_bytes)
            shares.append(overlapped_share(profile, least_bytes=block_bytes))
            rows += [
                {
                    "step": each.step,
                    "phase": phases[each.step],
                    "copies": each.copies,
                    "bytes": each.num_bytes,
                    "predicted_copies": int(planned.get(each.step, 0)),
                    "predicted_bytes": int(planned.get(each.step, 0)) * block_bytes,
                }
                for each in copies_by_step(profile, least_bytes=block_bytes)
            ]
        holds = len(rows) == sum(map(len, windows)) and all(
            row["copies"] == row["predicted_copies"] and row["bytes"] == row["predicted_bytes"]
            for row in rows
        )
        return {
            "holds": holds,
            "copies_counted": "of a block or more" if miss == "load" else "of a block exactly",
            # Of the last window: decode steps, where there are any.
            "copies_overlapped_by_kernels": shares[-1],
            "steps": rows,
        }

    def run_in_ranges(self, buffer: ExpertBuffer, steps: Sequence[RoutedStep]) -> None:
        """Runs steps, each within a range of its own for the profiler."""
        for step in steps:
            with step_range(step.step):
                list(run_steps(buffer, [step], self.hidden))

    def sabotage(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Exchanges slots in the map half way and says whether the checks notice.

        With the policy that hits most, since only a hit reads what the map says.
        """
        policy, capacity = most_hits(rows)
        buffer, _ = self.buffer(self.settings(capacity, policy, "load"))
        half = len(self.steps) // 2
        right = self.outputs(buffer, self.steps[:half])
        held = all(map(torch.equal, right, self.expected[: len(right)]))
        ids: dict[int, list[int]] = {}
        for site, expert in buffer.resident_experts():
            ids.setdefault(site, []).append(expert)
        for site, experts in ids.items():
            for one, other in zip(experts[::2], experts[1::2], strict=False):
                buffer.misplace((site, one), (site, other))
        broken = len(buffer.audit())
        wrong = self.outputs(buffer, self.steps[half:])
        noticed = not all(map(torch.equal, wrong, self.expected[len(right) :]))
        buffer.close()
        del buffer
        self.clean()
        say(f"  wrong slot map ({policy}, {capacity}): {broken} slots broken, outputs "
            f"{'differ' if noticed else 'are the same'}")  # fmt: skip
        return {
            "policy": policy,
            "capacity": capacity,
            "held_before": held,
            "outputs_differ_after": noticed,
            "slots_broken": broken,
        }

    def wrong_layer(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Runs some steps on experts of the next layer each and says how often outputs show it.

        Returns:
            Dispatches that executed an expert, and those whose output differs; None with one layer.
        """
        sites = wrong_layers(self.sites)
        if sites is None:
            return None
        policy, capacity = most_hits(rows)
        buffer, _ = self.buffer(self.settings(capacity, policy, "load"), sites)
        steps = self.steps[:WRONG_LAYER_STEPS]
        outputs = self.outputs(buffer, steps, follow=self.expected)
        executed = [bool((each.ids >= 0).any()) for step in steps for each in step.passes]
        differ = [
            not torch.equal(out, right)
            for out, right in zip(outputs, self.expected[: len(outputs)], strict=True)
        ]
        buffer.close()
        del buffer
        self.clean()
        found = {
            "policy": policy,
            "capacity": capacity,
            "dispatches": sum(executed),
            "dispatches_noticed": sum(differ),
        }
        say(f"  experts of another layer ({policy}, {capacity}): outputs of {sum(differ)} of "
            f"{sum(executed)} dispatches differ")  # fmt: skip
        return found

    def line(self, row: dict[str, Any]) -> str:
        """Returns a row of the table."""
        marks = "".join(
            "-" if good is None else letter if good else "!"
            for letter, good in (
                ("B", row["outputs_hold"]),
                ("H", row["lookups_equal_replay"]),
                ("S", row["slots_broken"] == 0),
                ("P", row.get("profiler", {}).get("holds")),
                ("C", row["copies_as_planned"]),
                ("A", is_steady(row)),
                ("M", row["requested_as_predicted"]),
                ("L", is_link_within(row)),
            )
        )  # fmt: skip
        judged = row.get("link_judged")
        link = "" if judged is None else f"{100 * judged['error']:6.2f}%"
        allocator = row["allocator_in_steady_state"]
        blocks = "-" if allocator is None else str(allocator["most_blocks_of_a_step"])
        name = row["policy"] if row["miss"] == "load" else f"{row['policy']}+{row['miss']}"
        name += f"+{row['prefetch']}" if row["prefetch"] else ""
        return (
            f"  {name:<12} {row['capacity']:>4} {100 * row['hit_rate']:6.1f}% {row['copies']:>7} "
            f"{row['decode_p50_ms']:9.2f} {row['decode_p95_ms']:9.2f} {row['decode_p99_ms']:9.2f} "
            f"{row['memory']['saved_bytes'] / GIB:8.2f} {link:>8} {blocks:>7} {marks}"
        )

    def table(self) -> dict[str, Any]:
        """Runs everything that fits into the time."""
        study = self.study
        say(f"  {'policy':<12} {'slots':>4} {'hits':>7} {'copies':>7} {'p50 ms':>9} {'p95 ms':>9} "
            f"{'p99 ms':>9} {'GiB saved':>8} {'link':>8} {'blocks':>7} checks")  # fmt: skip
        self.measure_link()
        baseline = self.unbuffered()
        self.ends_s = time.perf_counter() + study.seconds
        first, *others = study.capacities
        wanted: list[tuple[Any, ...]] = [
            *((policy, first, "load") for policy in study.policies),
            *study.misses,
            *((policy, capacity, "load", prefetch) for policy, capacity, prefetch in study.aheads),
            *((policy, capacity, "load") for capacity in others for policy in study.policies),
        ]
        rows, skipped = [], []
        for setting in wanted:
            if time.perf_counter() > self.ends_s:
                skipped.append(setting)
                continue
            rows.append(self.run(*setting))
        if skipped:
            say(f"  out of time, left out: {skipped}")
        shape = self.sites[0].store.shape
        return {
            "routing_source": routing_source(self.trace, study),
            "weights_source": self.weights_source,
            "geometry": {**asdict(self.geometry), "dtype": str(self.geometry.dtype)},
            "layers": len(self.sites),
            "experts_per_layer_here": self.sites[0].store.num_experts,
            "expert_bytes": shape.expert_bytes,
            "block_bytes": shape.block_bytes,
            "host_copy_shared_by_all_layers": study.share_host,
            "host_bytes": host_bytes(site.store for site in self.sites),
            "build_s": round(self.build_s, 2),
            "steps": len(self.steps),
            "link_bytes_per_byte_copied": self.overhead,
            "unbuffered": baseline,
            "settings": rows,
            "left_out_for_time": skipped,
            "wrong_slot_map": self.sabotage(rows) if rows else None,
            "wrong_layer": self.wrong_layer(rows) if rows else None,
        }


def most_hits(rows: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Returns policy and capacity of the setting that hits most, of those that load misses."""
    loaded = [row for row in rows if row["miss"] == "load" and not row["prefetch"]]
    best = max(loaded, key=lambda row: row["hit_rate"])
    return best["policy"], best["capacity"]


def profiled_windows(steps: Sequence[RoutedStep], num_decode: int) -> list[range]:
    """Returns indices of the steps to profile: the prefill before the first decode step, and those.

    Args:
        steps: All steps.
        num_decode: Decode steps, at most; of a stack that has none so many steps from the first.
    """
    decode = (index for index, step in enumerate(steps) if step.phase == "decode")
    first = next(decode, 0)
    prefill = [range(first - 1, first)] if first else []
    return [*prefill, range(first, min(first + num_decode, len(steps)))]


def without_rows(profile: Mapping[str, Any], block_bytes: int) -> dict[str, Any]:
    """Returns a profile without copies that are no block: rows of experts that ran on the host."""
    return {
        **profile,
        "traceEvents": [
            event
            for event in profile["traceEvents"]
            if event.get("cat") != "gpu_memcpy" or event["args"].get("bytes") == block_bytes
        ],
    }


def latencies(repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns percentiles of the time of decode steps (of all, where there are none)."""
    phases = np.concatenate([each["phase"] for each in repetitions])
    wall = np.concatenate([each["wall_ms"] for each in repetitions])
    decode = wall[phases == "decode"] if (phases == "decode").any() else wall
    found = {f"decode_p{q}_ms": float(np.percentile(decode, q)) for q in (50, 95, 99)}
    medians = [
        float(np.median(np.array(each["wall_ms"])[np.array(each["phase"]) == "decode"]))
        if "decode" in each["phase"]
        else float(np.median(each["wall_ms"]))
        for each in repetitions
    ]
    return {
        **found,
        "prefill_p50_ms": float(np.median(wall[phases != "decode"]))
        if (phases != "decode").any()
        else None,
        "p50_by_repetition_ms": medians,
    }


def device_bytes(device: torch.device) -> dict[str, int]:
    """Returns bytes allocated on a GPU, and of them requested; zeros on a CPU."""
    if device.type != "cuda":
        return {"allocated": 0, "requested": 0, "reserved": 0}
    stats = torch.cuda.memory_stats(device)
    return {
        "allocated": stats["allocated_bytes.all.current"],
        "requested": stats["requested_bytes.all.current"],
        "reserved": stats["reserved_bytes.all.current"],
    }


def requested_as_predicted(
    memory: BufferMemory, grown: dict[str, int], device: torch.device
) -> bool | None:
    """Returns True where a GPU was asked for the predicted bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    slots = memory.cache_bytes + memory.staging_bytes + memory.padding_bytes
    return grown["requested"] == slots + memory.workspace_bytes


def by_device(lookups: pd.DataFrame, num_devices: int) -> dict[str, Any]:
    """Returns what the replay predicts for every device that experts are spread over."""
    devices = range(num_devices)
    every = lookups.groupby("device").size().reindex(devices, fill_value=0)
    misses = (~lookups["hit"]).groupby(lookups["device"]).sum().reindex(devices, fill_value=0)
    return {
        "lookups": [int(count) for count in every],
        "misses": [int(count) for count in misses],
        "total_lookups": int(every.sum()),
        "total_misses": int(misses.sum()),
    }


def routing_source(trace: Any, study: Study) -> dict[str, Any]:
    """Returns what the routing is."""
    return {
        "trace": Path(str(study.trace)).name,
        "model": trace.model.name,
        "origin": dict(trace.info.origin or {}),
        "stack": study.stack,
        "top_k": trace.info.sites_of(study.stack)[0].top_k,
        "devices": study.devices,
        "device": study.device,
        "requests": len(trace.requests),
    }


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def failed_checks(study: dict[str, Any]) -> list[str]:
    """Returns what did not hold, one line each."""
    failed = []
    for row in study["settings"]:
        holds = {
            "outputs": row["outputs_hold"],
            "lookups": row["lookups_equal_replay"],
            "slots": row["slots_broken"] == 0,
            "profiler": row.get("profiler", {}).get("holds", True),
            "copies": row.get("copies_as_planned") is not False,
            "allocations": is_steady(row),
            "memory": row["requested_as_predicted"] is not False,
            "link": is_link_within(row) is not False,
        }
        name = f"{row['policy']} {row['capacity']} {row['miss']}"
        name += f" ahead={row['prefetch']}" if row.get("prefetch") else ""
        failed += [f"{name}: {check}" for check, good in holds.items() if not good]
        control = row.get("wrong_expert_on_host")
        if control is not None and control["dispatches"] and control["comparison_holds"]:
            failed.append(f"{name}: wrong experts on the host were not noticed")
    wrong = study["wrong_slot_map"]
    if wrong is not None and not (wrong["slots_broken"] and wrong["outputs_differ_after"]):
        failed.append("a wrong slot map was not noticed")
    other = study.get("wrong_layer")
    if other is not None and other["dispatches_noticed"] < other["dispatches"]:
        failed.append("experts of another layer were not noticed")
    return failed
