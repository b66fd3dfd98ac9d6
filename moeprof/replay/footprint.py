"""What memory holds: parameters by part, and what a run adds to them.

Static bytes are arithmetic on the model's shapes; everything else was read from the allocator, the
process or the device while the trace was recorded. Leaves out what another configuration would
need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moeprof.replay import wording
from moeprof.replay.causes import causes, quantiles
from moeprof.replay.intervals import Interval
from moeprof.replay.result import SEVERITY_FACT, Finding, Metric, Result
from moeprof.replay.tokens import load
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "memory"
PARTS: Mapping[str, str] = {
    "embedding": "Embedding",
    "attention": "Attention",
    "dense_ffn": "Dense FFN",
    "experts": "Experts",
    "shared_experts": "Shared experts",
    "router": "Router",
    "other": "Other",
}
"""Static parts, as `trace.json` has them, with their labels."""
MAX_TIMELINE_POINTS = 300

_SERIES = ("allocated_bytes", "reserved_bytes", "peak_bytes", "process_bytes")
_QUANTILES = (0.5, 0.95)


def memory(trace: Trace) -> Result:
    """Returns static bytes by part and what steps and layers need beyond them.

    The table has one row per static part. Table ``dynamic`` has one row per stack and phase,
    ``timeline`` the bytes over time, ``layers`` the activation peak of each layer, ``devices`` one
    row per device that was sampled.
    """
    static = trace.info.model.static_bytes
    steps = trace.steps
    static_table = _static(static)
    dynamic = _dynamic(trace, static)
    layers = _layers(trace.layers, steps)
    metrics = [*_static_metrics(static), *_dynamic_metrics(dynamic)]
    notes = []
    if static is None:
        notes.append("The model's static bytes were not recorded.")
    if steps["peak_bytes"].isna().all():
        notes.append(
            "No device allocator to read: activation peaks are unknown, not zero; the process's "
            "resident memory stands in."
        )
    elif static is not None:
        notes.append(
            "Activations: peak of allocated bytes within a step less static bytes; the key-value "
            "cache counts as activation."
        )
    return Result(
        name=NAME,
        title="Memory",
        table=static_table,
        metrics=tuple(metrics),
        findings=tuple(_findings(trace, static, dynamic)),
        tables={
            "dynamic": dynamic,
            "timeline": _timeline(steps),
            "layers": layers,
            "devices": _devices(trace.devices),
        },
        notes=tuple(notes),
    )


def _static(static: schema.StaticBytes | None) -> pd.DataFrame:
    if static is None:
        return pd.DataFrame()
    counts = dataclasses.asdict(static)
    return pd.DataFrame(
        [
            {
                "part": part,
                "label": label,
                "bytes": int(counts[part]),
                "share": counts[part] / max(static.total, 1),
            }
            for part, label in PARTS.items()
        ]
    )


def _static_metrics(static: schema.StaticBytes | None) -> list[Metric]:
    if static is None or static.total == 0:
        return []
    return [
        Metric(
            name=f"{NAME}/static_bytes",
            value=float(static.total),
            unit="bytes",
            figure_class="exact",
            better="lower",
            note="parameters and buffers, shared ones once",
        ),
        Metric(
            name=f"{NAME}/expert_bytes",
            value=float(static.experts),
            unit="bytes",
            figure_class="exact",
            better="lower",
            note="routed experts of all layers",
        ),
        Metric(
            name=f"{NAME}/experts_share",
            value=static.experts / static.total,
            unit="share",
            figure_class="exact",
            note="routed experts' part of static bytes",
        ),
    ]


def _dynamic(trace: Trace, static: schema.StaticBytes | None) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    steps = trace.steps
    for stack, phase in _places(steps):
        chosen = steps[(steps["stack"] == stack) & (steps["phase"] == phase)]
        row: dict[str, Any] = {"stack": stack, "phase": phase, "num_steps": len(chosen)}
        for name in _SERIES:
            largest = chosen[name].max()
            row[f"max_{name}"] = None if pd.isna(largest) else float(largest)
        extra = chosen["peak_bytes"].to_numpy(np.float64)
        seen = np.isfinite(extra)
        extra = extra - (static.total if static is not None else 0)
        known = static is not None and bool(seen.any()) and bool((extra[seen] >= 0).all())
        row["max_activation_bytes"] = float(extra[seen].max()) if known else None
        found = (Interval(), Interval())
        if known:
            tokens = load(trace, stack) if stack in trace.info.stacks else None
            both = quantiles(extra, _QUANTILES, causes(tokens, chosen), known=seen)
            found = (both[0], both[1])
        for name, interval in zip(("p50", "p95"), found, strict=True):
            row[f"{name}_activation_bytes"] = interval.value
            row[f"{name}_activation_bytes_low"] = interval.low
            row[f"{name}_activation_bytes_high"] = interval.high
        rows.append(row)
    return pd.DataFrame(rows)


def _dynamic_metrics(dynamic: pd.DataFrame) -> list[Metric]:
    metrics = []
    wanted = {
        "max_peak_bytes": "largest peak of allocated device memory; a maximum has no interval",
        "max_reserved_bytes": "most device memory the allocator held",
        "max_process_bytes": "most resident memory of the process",
        "max_activation_bytes": "largest peak less static bytes, key-value cache included",
    }
    for row in dynamic.to_dict("records"):
        where = f"{row['stack']}/{row['phase']}"
        metrics += [
            Metric(
                name=f"{NAME}/{name}/{where}",
                value=float(row[name]),
                unit="bytes",
                figure_class="measured",
                better="lower",
                note=note,
            )
            for name, note in wanted.items()
            if row[name] is not None and not pd.isna(row[name])
        ]
        if row["p50_activation_bytes"] is not None and not pd.isna(row["p50_activation_bytes"]):
            metrics.append(
                wording.metric_of(
                    f"{NAME}/p50_activation_bytes/{where}",
                    Interval(
                        value=row["p50_activation_bytes"],
                        low=_number(row["p50_activation_bytes_low"]),
                        high=_number(row["p50_activation_bytes_high"]),
                    ),
                    unit="bytes",
                    figure_class="measured",
                    better="lower",
                    note="median over steps of the peak less static bytes",
                )
            )
    return metrics


def _timeline(steps: pd.DataFrame) -> pd.DataFrame:
    """Returns the largest bytes of consecutive steps, at most 300 points."""
    ordered = steps.sort_values("start_s", kind="stable").reset_index(drop=True)
    if ordered.empty:
        return pd.DataFrame()
    num_points = min(MAX_TIMELINE_POINTS, len(ordered))
    point = np.arange(len(ordered)) * num_points // len(ordered)
    grouped = ordered.groupby(point)
    table = grouped[list(_SERIES)].max()
    table.insert(0, "start_s", grouped["start_s"].first())
    table.insert(1, "stack", grouped["stack"].first())
    table.insert(2, "phase", grouped["phase"].first())
    return table.reset_index(drop=True)


def _layers(layers: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    seen = layers[layers["activation_peak_bytes"].notna()]
    if seen.empty:
        return pd.DataFrame()
    keys = ["rank", "step"]
    joined = seen.join(steps.set_index(keys)["phase"], on=keys)
    joined = joined.assign(site=joined["site"].fillna(-1))
    grouped = joined.groupby(["stack", "phase", "layer", "site"], observed=True)
    table = grouped["activation_peak_bytes"].agg(["mean", "max"]).reset_index()
    table.columns = pd.Index(
        [
            "stack",
            "phase",
            "layer",
            "site",
            "mean_activation_peak_bytes",
            "max_activation_peak_bytes",
        ]
    )
    table["site"] = table["site"].where(table["site"] >= 0)
    rank = {place: index for index, place in enumerate(_places(steps))}
    order = [rank[(str(row.stack), str(row.phase))] for row in table.itertuples()]
    return table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)


def _devices(devices: pd.DataFrame) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for (rank, device), samples in devices.groupby(["rank", "device"], observed=True):
        ordered = samples.sort_values("time_s")

        def grown(column: str, frame: pd.DataFrame = ordered) -> float | None:
            known = frame[column].dropna()
            return float(known.iloc[-1] - known.iloc[0]) if len(known) > 1 else None

        rows.append(
            {
                "rank": int(str(rank)),
                "device": int(str(device)),
                "num_samples": len(ordered),
                "mean_utilization_pct": _number(ordered["utilization_pct"].mean()),
                "max_memory_used_bytes": _number(ordered["memory_used_bytes"].max()),
                "mean_power_w": _number(ordered["power_w"].mean()),
                "energy_j": grown("energy_j"),
                "pcie_tx_bytes": grown("pcie_tx_bytes"),
                "pcie_rx_bytes": grown("pcie_rx_bytes"),
            }
        )
    return pd.DataFrame(rows)


def _places(steps: pd.DataFrame) -> list[tuple[str, str]]:
    found = steps[["stack", "phase"]].drop_duplicates()
    places = [(str(row.stack), str(row.phase)) for row in found.itertuples()]
    return sorted(places, key=lambda place: (place[0] != "encoder", schema.PHASES.index(place[1])))


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _findings(
    trace: Trace, static: schema.StaticBytes | None, dynamic: pd.DataFrame
) -> list[Finding]:
    findings = []
    if static is not None and static.total:
        others = {
            PARTS[part].lower(): count
            for part, count in dataclasses.asdict(static).items()
            if part != "experts"
        }
        second = max(others, key=lambda part: others[part])
        findings.append(
            Finding(
                text=f"Experts hold {wording.percent(static.experts / static.total)} of the "
                f"{wording.num_bytes(static.total)} of parameters; the next largest part is "
                f"{second} with {wording.percent(others[second] / static.total)}.",
                severity=SEVERITY_FACT - 3,
                section=NAME,
                metric=f"{NAME}/experts_share",
            )
        )
    seen = dynamic.dropna(subset=["max_activation_bytes"]) if len(dynamic) else dynamic
    if static is not None and len(seen):
        most = seen.iloc[int(np.argmax(seen["max_activation_bytes"].to_numpy(np.float64)))]
        extra = float(most["max_activation_bytes"])
        where = wording.place(
            str(most["stack"]), str(most["phase"]), num_stacks=len(trace.info.stacks)
        )
        device = trace.info.hardware.device_name or trace.info.hardware.device
        findings.append(
            Finding(
                text=f"Activations and key-value cache peak at {wording.num_bytes(extra)} in "
                f"{where}, {wording.percent(extra / (extra + static.total))} of all memory "
                f"allocated then on {device}.",
                severity=SEVERITY_FACT - 6,
                section=NAME,
                metric=f"{NAME}/max_activation_bytes/{most['stack']}/{most['phase']}",
            )
        )
    return findings
