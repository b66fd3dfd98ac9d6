"""Runs a model at growing batch sizes under each gating, and sets the gatings beside each other.

What the headline runs of the founding paper's models (arXiv 2303.06182) share: gates that hand on
recorded choices, time and memory of a batch, where the time goes, gains at own best batches and at
equal terms. Leaves out the models and their routing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprof.live.paper_lm import PaperGate
from moeprof.live.repetitions import repeat

Choice = tuple[torch.Tensor, torch.Tensor]
Prepare = Callable[[int], tuple[int, Callable[[], object]]]
"""From a batch size to (tokens of a pass, a pass)."""

_FIRST_REPEATS = 2
"""Timed passes that tell how many more there may be; all there are where a pass is slow."""


@dataclass
class StepCursor:
    """Which recorded pass the gates hand on.

    Attributes:
        num_steps: Recorded passes; after the last comes the first.
        step: The pass.
    """

    num_steps: int = 1
    step: int = 0

    def advance(self) -> None:
        """Goes to the next pass."""
        self.step = (self.step + 1) % self.num_steps


class ForcedGate(nn.Module):
    """A gate that computes its own choice and hands on a recorded one.

    Args:
        gate: The model's own.
        choices: Per recorded pass, [T, k] int64 experts (-1: not executed) and [T, k] weights, for
            as many tokens as the largest batch has.
        cursor: Which pass; shared by the gates of a model.
    """

    def __init__(
        self, gate: PaperGate, choices: Sequence[Choice], cursor: StepCursor | None = None
    ) -> None:
        super().__init__()
        self.gate = gate
        self.choices = list(choices)
        self.cursor = cursor or StepCursor()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (ids [T, k], weights [T, k]), as `PaperGate` does."""
        self.gate(hidden)
        rows = hidden.shape[0]
        ids, weights = self.choices[self.cursor.step]
        return ids[:rows], weights[:rows].to(hidden.dtype)


def memory(device: str) -> tuple[int, int]:
    """Returns (allocated, peak) bytes and forgets the peak; zeros where torch does not count."""
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now, peak


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """How long a batch may be measured, and which batches are not tried.

    Attributes:
        seconds: Time for the repetitions of a batch, within the two counts below.
        least_repeats: Fewest timed passes.
        most_repeats: Most timed passes.
        point_seconds: A batch predicted to need longer than this is not tried; None tries all.
        deadline_s: On `time.monotonic`; no batch is begun after it. None: no end.
    """

    seconds: float = 3.0
    least_repeats: int = 4
    most_repeats: int = 20
    point_seconds: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRuns:
    """What came of one gating.

    Attributes:
        rows: One per batch that ran or ran out of memory.
        skipped: One per batch that was not tried: gating, batch, reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


def run_batch(
    prepare: Prepare, batch: int, device: str, limits: RunLimits | None = None
) -> dict[str, Any]:
    """Returns times and memory of passes over ``batch`` sequences; the first pass is a warm-up.

    What ``prepare`` allocates counts as memory of the batch.
    """
    limits = limits or RunLimits()
    if device != "cpu":
        torch.cuda.empty_cache()
    before, _ = memory(device)
    num_tokens, run = prepare(batch)
    with torch.no_grad():
        first = repeat(run, device=device, repeats=_FIRST_REPEATS, warmup=1)
        _, peak = memory(device)
        wanted = int(limits.seconds * 1e3 / first.median_ms)
        repeats = max(limits.least_repeats, min(limits.most_repeats, wanted))
        times = first
        if repeats > _FIRST_REPEATS:
            times = repeat(run, device=device, warmup=0, repeats=repeats)
    return {
        "batch": batch,
        "num_tokens": num_tokens,
        "median_ms": times.median_ms,
        "p95_ms": float(np.percentile(times.times_ms, 95)),
        "tokens_per_s": num_tokens / times.median_ms * 1e3,
        "extra_bytes": peak - before,
        "times_ms": [round(ms, 4) for ms in times.times_ms],
    }


def run_gating(
    name: str,
    batches: Sequence[int],
    prepare: Prepare,
    device: str,
    *,
    limits: RunLimits | None = None,
    growth: int = 1,
) -> BatchRuns:
    """Measures one gating at growing batches until memory ends.

    Args:
        name: Of the gating.
        batches: Ascending.
        prepare: See `Prepare`.
        device: ``cuda`` or ``cpu``.
        limits: See there.
        growth: Power of the batch with which its time and memory grow at most: 1, or 2 for a
            dispatch mask whose slots are a share of the tokens.
    """
    limits = limits or RunLimits()
    found = BatchRuns()
    for index, batch in enumerate(batches):
        reason = _too_far(found.rows, batch, limits, device, growth)
        if reason:
            print(f"  {name:16s} batch {batch:5d} and larger not tried: {reason}", flush=True)
            found.skipped.extend(
                {"gating": name, "batch": each, "reason": reason} for each in batches[index:]
            )
            break
        try:
            row = {"gating": name, **run_batch(prepare, batch, device, limits)}
        except torch.OutOfMemoryError as error:
            print(f"  {name:16s} batch {batch:5d}: out of memory", flush=True)
            said = str(error).splitlines()[0]
            found.rows.append({"gating": name, "batch": batch, "out_of_memory": said})
            break
        print(
            f"  {name:16s} batch {batch:5d}: {row['median_ms']:9.2f} ms, p95 {row['p95_ms']:9.2f},"
            f" {row['tokens_per_s'] / 1e3:7.1f} k tokens/s, {row['extra_bytes'] / 2**30:6.2f} GiB",
            flush=True,
        )
        found.rows.append(row)
    return found


def _too_far(
    rows: Sequence[Mapping[str, Any]], batch: int, limits: RunLimits, device: str, growth: int
) -> str | None:
    """Returns why a batch is not tried, or None: judged by the batch before it."""
    if limits.deadline_s is not None and time.monotonic() > limits.deadline_s:
        return "the time given to this gating is up"
    if not rows or limits.point_seconds is None:
        return None
    last = rows[-1]
    factor = (batch / last["batch"]) ** growth
    passes = 1 + _FIRST_REPEATS
    if limits.least_repeats > _FIRST_REPEATS:
        passes += limits.least_repeats
    seconds = passes * last["median_ms"] * factor / 1e3
    beyond = False
    if device != "cpu":
        torch.cuda.empty_cache()
        beyond = last["extra_bytes"] * factor > torch.cuda.mem_get_info()[0]
    # Running out of memory takes no time: such a batch is tried, so that memory ends the series.
    if seconds > limits.point_seconds and not beyond:
        return (
            f"{passes} passes predicted to take {seconds:.1f} s, more than"
            f" {limits.point_seconds:g} s"
        )
    return None


@contextmanager
def timed_parts(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Records events around the parts of every layer of ``model.layers`` while it is open."""
    events: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(*_: Any) -> None:
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
            events.setdefault(name, []).append([begin, None])

        def after(*_: Any) -> None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            events[name][-1][1] = end

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for layer in model.layers:
        watch("attention", layer.attention)
        if hasattr(layer, "cross_attention"):
            watch("attention", layer.cross_attention)
        if layer.routes:
            watch("moe", layer.moe)
            watch("gate", layer.moe.gate)
        else:
            watch("dense_ffn", layer.ffn)
    if hasattr(model, "head"):
        watch("head", model.head)
    watch("all", model)
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def breakdown(model: nn.Module, name: str, batch: int, prepare: Prepare) -> dict[str, Any]:
    """Returns the time of each part of one pass, in milliseconds, medians over passes."""
    _, run = prepare(batch)
    run()
    passes = []
    for _ in range(5):
        with timed_parts(model) as events:
            run()
        torch.cuda.synchronize()
        passes.append(
            {part: sum(a.elapsed_time(b) for a, b in pairs) for part, pairs in events.items()}
        )
    parts = {part: float(np.median([each[part] for each in passes])) for part in passes[0]}
    if "moe" in parts:
        parts["dispatch_experts_combine"] = parts.pop("moe") - parts["gate"]
    print(f"  parts of {name}, batch {batch}: "
          + ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()), flush=True)  # fmt: skip
    return {"gating": name, "batch": batch, "parts_ms": parts}


def best(rows: Sequence[dict[str, Any]], gating: str) -> dict[str, Any] | None:
    """Returns the row with the most tokens per second."""
    own = [row for row in rows if row["gating"] == gating and "tokens_per_s" in row]
    return max(own, key=lambda row: row["tokens_per_s"], default=None)


def headline(rows: Sequence[dict[str, Any]], gatings: Sequence[str]) -> list[dict[str, Any]]:
    """Compares moeprof's gating with each other at its own best batch and at equal terms.

    Equal terms: ours at the batch with the most tokens per second among those that need no more
    memory and no longer at the 95th percentile than the baseline at its own best batch.
    """
    ours = [row for row in rows if row["gating"] == "dynamic" and "tokens_per_s" in row]
    top = best(rows, "dynamic")
    compared = []
    for name in gatings:
        other = best(rows, name)
        if name == "dynamic" or other is None or top is None:
            continue
        equal = [
            row
            for row in ours
            if row["extra_bytes"] <= other["extra_bytes"] and row["p95_ms"] <= other["p95_ms"]
        ]
        fair = max(equal, key=lambda row: row["tokens_per_s"], default=None)
        compared.append(
            {
                "baseline": name,
                "baseline_batch": other["batch"],
                "baseline_tokens_per_s": other["tokens_per_s"],
                "best_batch": top["batch"],
                "gain_at_own_best": top["tokens_per_s"] / other["tokens_per_s"],
                "equal_terms_batch": fair["batch"] if fair else None,
                "gain_at_equal_terms": (
                    fair["tokens_per_s"] / other["tokens_per_s"] if fair else None
                ),
            }
        )
    return compared


def print_headline(compared: Sequence[Mapping[str, Any]]) -> None:
    """Prints the gains, a line each."""
    for row in compared:
        fair = row["gain_at_equal_terms"]
        print(
            f"against {row['baseline']}: {row['gain_at_own_best']:.2f}x at its own best batch,"
            f" {f'{fair:.2f}x' if fair else 'not to be had'} at equal memory and p95",
            flush=True,
        )
