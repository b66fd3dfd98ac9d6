"""Ten lines on a recording, read back from the trace that was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.schema import Site

MIB = 1 << 20
NUM_LINES = 10


def recording_lines(path: str | Path) -> list[str]:
    """Returns ten lines that say what a trace holds, from the trace itself."""
    trace = open_trace(path)
    return [
        _model_line(trace),
        _sites_line(trace),
        _requests_line(trace),
        _tokens_line(trace),
        _capture_line(trace),
        _executed_line(trace),
        _time_line(trace),
        _memory_line(trace),
        _load_line(trace),
        _size_line(trace),
    ]


def _model_line(trace: Trace) -> str:
    model, hardware = trace.model, trace.info.hardware
    device = hardware.device_name or hardware.cpu_name or hardware.device
    random = ", RANDOM WEIGHTS" if model.random_weights else ""
    return f"model      {model.name} ({model.architecture}), {model.dtype}{random}, on {device}"


def _sites_line(trace: Trace) -> str:
    parts = []
    for stack in trace.stacks:
        sites = trace.info.sites_of(stack)
        kinds = sorted({_kind(site) for site in sites})
        parts.append(f"{stack}: {len(sites)} x {' / '.join(kinds)}")
    return "MoE sites  " + "; ".join(parts)


def _kind(site: Site) -> str:
    attention = " attention" if site.kind == "attention" else ""
    return f"{site.num_experts}{attention} experts top-{site.top_k}"


def _requests_line(trace: Trace) -> str:
    requests = trace.requests
    labels = [
        f"{count} {name}{'s' * (count != 1)}"
        for name in ("domain", "language")
        if (count := requests[name].nunique())
    ]
    batches = trace.steps["step"].size
    detail = f" of {', '.join(labels)}" if labels else ""
    return f"requests   {len(requests)}{detail}, in {batches} forward passes"


def _tokens_line(trace: Trace) -> str:
    steps = trace.steps
    by_phase = steps.groupby("phase", observed=True)["num_tokens"].sum()
    phases = ", ".join(f"{phase} {int(n):,}" for phase, n in by_phase.items())
    total, padded = int(steps["num_tokens"].sum()), int(steps["num_padded_tokens"].sum())
    return f"tokens     {total:,} recorded ({phases}); {padded:,} padding left out"


def _capture_line(trace: Trace) -> str:
    capture = trace.info.capture
    return (
        f"capture    {capture.num_calls_seen:,} of {capture.num_calls_expected:,} MoE calls seen"
        f"{'' if trace.complete else '; trace INCOMPLETE'}"
    )


def _executed_line(trace: Trace) -> str:
    capture = trace.info.capture
    if capture.num_executed_checked == 0:
        return "execution  rows executed could not be seen"
    if capture.num_executed_disagreeing:
        return (
            f"execution  DISAGREES with routing in {capture.num_executed_disagreeing} of "
            f"{capture.num_executed_checked} dispatches checked: {capture.execution_note}"
        )
    return (
        f"execution  rows executed equal rows routed in all {capture.num_executed_checked:,} "
        "dispatches checked"
    )


def _time_line(trace: Trace) -> str:
    return "time       " + (", ".join(_phase_times(trace.steps)) or "not measured")


def _phase_times(steps: pd.DataFrame) -> Iterator[str]:
    for phase, group in steps.groupby("phase", observed=True):
        timed = group[~group["probed"].astype(bool)]
        timed = timed if len(timed) else group
        column = "device_ms" if timed["device_ms"].notna().any() else "wall_ms"
        times = timed[column].dropna()
        if len(times):
            yield f"{phase} {np.median(times):.2f} ms/step (median of {len(times)})"


def _memory_line(trace: Trace) -> str:
    static = trace.model.static_bytes
    parts = []
    if static is not None and static.total:
        share = static.experts / static.total
        parts.append(f"static {static.total / MIB:.1f} MiB ({share:.0%} experts)")
    for column, name in (("peak_bytes", "peak device"), ("process_bytes", "process")):
        values = trace.steps[column].dropna()
        if len(values):
            parts.append(f"{name} {values.max() / MIB:.0f} MiB")
    return "memory     " + ", ".join(parts)


def _load_line(trace: Trace) -> str:
    worst: tuple[float, Site] | None = None
    for stack in trace.stacks:
        sites = trace.info.sites_of(stack)
        counts = [np.zeros(site.num_experts, dtype=np.int64) for site in sites]
        for block in trace.blocks(stack):
            for i, site in enumerate(sites):
                slots = slice(site.first_slot, site.first_slot + site.top_k)
                routed = block.expert[:, slots][block.status[:, slots] == 0]
                counts[i] += np.bincount(routed, minlength=site.num_experts)
        for site, count in zip(sites, counts, strict=True):
            if count.sum():
                ratio = float(count.max() / count.mean())
                worst = max(worst or (ratio, site), (ratio, site), key=lambda pair: pair[0])
    if worst is None:
        return "routing    no tokens routed"
    ratio, site = worst
    return (
        f"routing    busiest expert carries up to {ratio:.1f} x the mean "
        f"({site.stack} layer {site.layer})"
    )


def _size_line(trace: Trace) -> str:
    decisions = 0
    for stack in trace.stacks:
        tokens = int(trace.steps.loc[trace.steps["stack"] == stack, "num_tokens"].sum())
        decisions += tokens * trace.info.num_slots(stack)
    per = f", {trace.num_bytes / decisions:.2f} bytes per routing decision" if decisions else ""
    return f"trace      {trace.num_bytes / 1024:.0f} KiB{per} (everything included)"
