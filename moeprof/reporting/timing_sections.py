"""Latency and memory as figures and tables of a report."""

from __future__ import annotations

from moeprof.replay import wording
from moeprof.replay.breakdown import MOE_COMPONENTS
from moeprof.replay.footprint import PARTS
from moeprof.replay.result import Result
from moeprof.reporting.layout import FigureData, TableData
from moeprof.reporting.vocabulary import (
    Built,
    Rows,
    groups,
    headline_of,
    listed_items,
    percent,
    place_label,
    records,
)
from moeprof.trace.reader import Trace


def latency_content(trace: Trace, result: Result) -> Built:
    """Returns what a report shows of step times."""
    rows = records(result.table)
    steps = {
        (row["stack"], row["phase"], row["clock"]): row for row in records(result.tables["steps"])
    }
    bars: Rows = []
    for (stack, phase, clock), parts in groups(rows, "stack", "phase", "clock").items():
        own = steps.get((stack, phase, clock), {})
        bars.append(
            {
                "label": place_label(trace, (stack, phase)),
                "value": own.get("p50_ms"),
                "unit": "ms",
                "value_note": f"median step, {clock} time",
                "segments": [
                    {
                        "key": part["component"],
                        "label": part["label"],
                        "share": part["share"],
                        "value": part["ms_per_step"],
                        "unit": "ms",
                        "group": "moe" if part["component"] in MOE_COMPONENTS else "rest",
                    }
                    for part in parts
                ],
            }
        )
    alt = listed_items(
        f"{bar['label']}: "
        + ", ".join(
            f"{segment['label'].lower()} {percent(segment['share'])}"
            for segment in sorted(bar["segments"], key=lambda part: -(part["share"] or 0))[:3]
        )
        for bar in bars
    )
    split = any(row["figure_class"] == "estimate" for row in rows)
    figure = FigureData(
        id="breakdown",
        kind="bars",
        title="Time of a step by component",
        alt=f"Stacked bars of the share of step time per component. {alt}.",
        how_to_read=(
            "Each bar is an ordinary step, stalled ones left out; warm colours are the MoE block, "
            "cool ones the rest, which no way of running experts can shrink."
        ),
        figure_class="estimate" if split else "measured",
        collapsed=False,
        panels=[{"rows": bars}] if bars else [],
    )
    clock = rows[0]["clock"] if rows else "host"
    return (
        headline_of(
            trace, "latency/moe_share", f"latency/{clock}_p50_ms", f"latency/{clock}_tokens_per_s"
        ),
        [figure],
        [
            TableData(
                title="Components",
                figure_class="",
                columns=[
                    ["stack", "Stack", "text"],
                    ["phase", "Phase", "text"],
                    ["label", "Component", "text"],
                    ["share", "Share of step", "share"],
                    ["ms_per_step", "Mean per step", "ms"],
                    ["figure_class", "Class", "class"],
                ],
                rows=rows,
            ),
            TableData(
                title="Steps",
                figure_class="measured",
                columns=[
                    ["stack", "Stack", "text"],
                    ["phase", "Phase", "text"],
                    ["clock", "Clock", "text"],
                    ["num_steps", "Steps", "count"],
                    ["mean_num_tokens", "Tokens per step", "number"],
                    ["p50_ms", "Median", "ms"],
                    ["p95_ms", "95th percentile", "ms"],
                    ["tokens_per_s", "Tokens per second", "number"],
                ],
                rows=list(steps.values()),
            ),
            TableData(
                title="Kernels of the profiled pass",
                figure_class="measured",
                columns=[
                    ["stack", "Stack", "text"],
                    ["phase", "Phase", "text"],
                    ["region", "Inside", "text"],
                    ["component", "Component", "text"],
                    ["region_share", "Share", "share"],
                    ["device_ms", "Kernel time, all steps", "ms"],
                    ["num_kernels", "Kernels", "count"],
                    ["num_profiled_steps", "Profiled steps", "count"],
                ],
                rows=records(result.tables["kernels"]),
            ),
        ],
    )


def memory_content(trace: Trace, result: Result) -> Built:
    """Returns what a report shows of memory."""
    static = records(result.table)
    dynamic = records(result.tables["dynamic"])
    segments = [
        {
            "key": f"static_{row['part']}",
            "label": row["label"],
            "value": row["bytes"],
            "unit": "bytes",
            "group": "moe" if row["part"] in {"experts", "shared_experts", "router"} else "rest",
        }
        for row in static
        if row["bytes"]
    ]
    bars: Rows = []
    if segments:
        bars.append({"label": "parameters", "segments": segments})
    for row in dynamic:
        if segments and row["max_activation_bytes"]:
            extra = {
                "key": "activations",
                "label": "Activations at the peak",
                "value": row["max_activation_bytes"],
                "unit": "bytes",
                "group": "dynamic",
            }
            label = f"peak in {place_label(trace, (row['stack'], row['phase']))}"
            bars.append({"label": label, "segments": [*segments, extra]})
    for bar in bars:
        bar["value"] = sum(segment["value"] for segment in bar["segments"])
        bar["unit"] = "bytes"
    largest = max((bar["value"] for bar in bars), default=1) or 1
    for bar in bars:
        bar["segments"] = [
            {**segment, "share": segment["value"] / largest} for segment in bar["segments"]
        ]
    figures = [
        FigureData(
            id="parts",
            kind="bars",
            title="Memory by part",
            alt="Stacked bars of bytes. "
            + listed_items(
                f"{row['label'].lower()} {wording.num_bytes(row['bytes'])}"
                for row in sorted(static, key=lambda row: -row["bytes"])
                if row["bytes"]
            )
            + ".",
            how_to_read=(
                "The first bar is what the model weighs at rest; each further bar adds what "
                "running a phase needs at its peak. All bars share one scale."
            ),
            figure_class="measured" if len(bars) > 1 else "exact",
            collapsed=False,
            panels=[{"rows": bars}] if bars else [],
        ),
        _memory_timeline(result),
        _memory_layers(trace, result),
    ]
    places = [f"{row['stack']}/{row['phase']}" for row in dynamic]
    wanted = (
        "max_activation_bytes"
        if any(row["max_activation_bytes"] for row in dynamic)
        else ("max_process_bytes")
    )
    peak = max(dynamic, key=lambda row: row[wanted] or 0, default=None)
    headline = ["memory/static_bytes", "memory/experts_share"]
    if peak is not None and places:
        headline.append(f"memory/{wanted}/{peak['stack']}/{peak['phase']}")
    return headline, figures, _memory_tables(static, dynamic, result)


def _memory_timeline(result: Result) -> FigureData:
    rows = records(result.tables["timeline"])
    names = {
        "reserved_bytes": "reserved by the allocator",
        "peak_bytes": "peak within the step",
        "allocated_bytes": "allocated after the step",
        "process_bytes": "resident memory of the process",
    }
    on_device = any(row["allocated_bytes"] is not None for row in rows)
    wanted = (
        ("reserved_bytes", "peak_bytes", "allocated_bytes") if on_device else ("process_bytes",)
    )
    series = []
    for name in wanted:
        points = [[row["start_s"], row[name], None, None] for row in rows if row[name] is not None]
        if len(points) > 1:
            series.append({"key": name, "label": names[name], "points": points})
    what = "device" if on_device else "process"
    return FigureData(
        id="timeline",
        kind="lines",
        title="Memory over time",
        alt=f"Line chart of {what} memory in bytes against time in seconds.",
        how_to_read=(
            "Where the lines climb, memory grows with the run (caches); gaps between peak and "
            "allocated are buffers that live within one step."
            if on_device
            else "Resident memory of the whole process; a steady climb is a cache or a leak."
        ),
        figure_class="measured",
        collapsed=False,
        panels=[
            {
                "title": f"{what} memory",
                "x_label": "seconds since the start",
                "x_scale": "linear",
                "y_label": "",
                "y_unit": "bytes",
                "series": series,
            }
        ]
        if series
        else [],
    )


def _memory_layers(trace: Trace, result: Result) -> FigureData:
    panels = []
    for (stack, phase), rows in groups(records(result.tables["layers"]), "stack", "phase").items():
        panels.append(
            {
                "title": place_label(trace, (stack, phase)),
                "x_label": "layer",
                "y_label": "",
                "y_unit": "bytes",
                "categories": [str(row["layer"]) for row in rows],
                "series": [
                    {
                        "key": f"{kind}_layer",
                        "label": label,
                        "values": [
                            row["max_activation_peak_bytes"]
                            if (row["site"] is None) == dense
                            else None
                            for row in rows
                        ],
                        "low": None,
                        "high": None,
                    }
                    for kind, label, dense in (
                        ("moe", "MoE layer", False),
                        ("dense", "dense layer", True),
                    )
                    if any((row["site"] is None) == dense for row in rows)
                ],
            }
        )
    return FigureData(
        id="layers",
        kind="layers",
        title="Activation peak per layer",
        alt="Dots per layer: largest growth of allocated memory within the layer.",
        how_to_read=(
            "How far allocated memory rises above its level at the layer's start: buffers of "
            "attention, gating, dispatch and experts. Largest step of the trace."
        ),
        figure_class="measured",
        collapsed=False,
        panels=panels,
    )


def _memory_tables(static: Rows, dynamic: Rows, result: Result) -> list[TableData]:
    return [
        TableData(
            title="Static bytes",
            figure_class="exact",
            columns=[
                ["label", "Part", "text"],
                ["bytes", "Bytes", "bytes"],
                ["share", "Share", "share"],
            ],
            rows=[row for row in static if row["part"] in PARTS],
        ),
        TableData(
            title="Peaks by phase",
            figure_class="measured",
            columns=[
                ["stack", "Stack", "text"],
                ["phase", "Phase", "text"],
                ["num_steps", "Steps", "count"],
                ["max_allocated_bytes", "Allocated", "bytes"],
                ["max_reserved_bytes", "Reserved", "bytes"],
                ["max_peak_bytes", "Peak", "bytes"],
                ["max_activation_bytes", "Activations, largest", "bytes"],
                ["p50_activation_bytes", "Activations, median", "bytes"],
                ["p95_activation_bytes", "Activations, 95th percentile", "bytes"],
                ["max_process_bytes", "Process", "bytes"],
            ],
            rows=dynamic,
        ),
        TableData(
            title="Devices",
            figure_class="measured",
            columns=[
                ["rank", "Rank", "count"],
                ["device", "Device", "count"],
                ["num_samples", "Samples", "count"],
                ["mean_utilization_pct", "Mean utilization, %", "number"],
                ["max_memory_used_bytes", "Most memory used", "bytes"],
                ["mean_power_w", "Mean power, W", "number"],
                ["energy_j", "Energy, J", "number"],
                ["pcie_tx_bytes", "PCIe sent", "bytes"],
                ["pcie_rx_bytes", "PCIe received", "bytes"],
            ],
            rows=records(result.tables["devices"]),
        ),
    ]
