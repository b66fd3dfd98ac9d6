"""Where the time of a step goes: components of layers, per stack and phase.

Times are those the recorder read; nothing is modelled. What was not seen stays unknown: its time
is in the remainder, which is shown. Where a short profiled pass classified the kernels inside the
experts module, its shares split that module's time. Leaves out what would change under another
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import wording
from moeprof.replay.access import Floats
from moeprof.replay.causes import Causes, causes, quantiles, ratios
from moeprof.replay.intervals import Interval
from moeprof.replay.result import (
    SEVERITY_COST,
    SEVERITY_FACT,
    SEVERITY_WARNING,
    FigureClass,
    Finding,
    Metric,
    Result,
)
from moeprof.replay.stalls import FACTOR, stalled
from moeprof.replay.tokens import load
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "latency"
COMPONENTS: Mapping[str, str] = {
    "embedding": "Embedding",
    "attention": "Attention",
    "dense_ffn": "Dense FFN",
    "gate": "Gate",
    "dispatch": "Dispatch",
    "experts": "Experts",
    "combine": "Combine",
    "unclassified": "In experts, unclassified",
    "shared_experts": "Shared experts",
    "moe_rest": "MoE block, rest",
    "moe_block": "MoE block, not split up",
    "head": "Output head",
    "other": "Other",
}
"""Components in the order of a forward pass, with their labels."""
MOE_COMPONENTS = (
    "gate", "dispatch", "experts", "combine", "unclassified", "shared_experts", "moe_rest",
    "moe_block",
)  # fmt: skip

_LAYER_COLUMNS = {
    "attention": "attention_ms",
    "dense_ffn": "dense_ffn_ms",
    "gate": "gate_ms",
    "dispatch": "dispatch_ms",
    "experts": "experts_ms",
    "combine": "combine_ms",
    "shared_experts": "shared_experts_ms",
}
_STEP_COLUMNS = {"embedding": "embedding_ms", "head": "head_ms"}
_INSIDE_MOE = ("gate", "dispatch", "experts", "combine", "shared_experts")
_SPOKEN: Mapping[str, str] = {
    **{name: label.lower() for name, label in COMPONENTS.items()},
    "unclassified": "kernels nobody could classify",
    "moe_rest": "the rest of the block",
    "moe_block": "what no module shows",
}
_NOT_IN_EVERY_MODEL = ("shared_experts", "dense_ffn")
_NUM_NAMED = 3
_WORTH_NAMING = 0.01
_QUANTILES = (0.5, 0.95)
_MS_PER_S = 1000.0
_OVERSHOOT = 1.02
_MANY_STALLS = 0.1
_MOSTLY_STALLS = 0.25
_HALF = 0.5


def latency(trace: Trace) -> Result:
    """Returns the share of step time that each component takes.

    The table has one row per stack, phase and component. Table ``steps`` holds median and 95th
    percentile of step times and throughput, ``kernels`` the kernels of the profiled pass by
    component.
    """
    # Watching executed rows costs time, so steps that did are no measure of time.
    steps, layers = trace.steps[~trace.steps["probed"].astype(bool)], trace.layers
    kernels = trace.kernels if trace.has_table("kernels") else pd.DataFrame()
    rows: list[dict[str, Any]] = []
    step_rows: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    caveats: dict[str, list[str]] = {}
    found_stacks = {str(stack) for stack in steps["stack"]}
    stacks = tuple(sorted(found_stacks, key=lambda stack: (stack != "encoder", stack)))
    for stack in stacks:
        tokens = load(trace, stack) if stack in trace.info.stacks else None
        of_stack = steps[steps["stack"] == stack]
        phases = tuple(p for p in schema.PHASES if (of_stack["phase"] == p).any())
        for phase in phases:
            chosen = of_stack[of_stack["phase"] == phase]
            every = _timed_steps(chosen, layers)
            times, time_metrics = _step_times(stack, phase, chosen, causes(tokens, chosen))
            step_rows += times
            metrics += time_metrics
            if every is None:
                continue
            place = wording.place(stack, phase, num_stacks=len(stacks))
            slow = stalled(every.total_ms, every.num_rows())
            timed = every.only(~slow)
            metrics += _stall_metrics(stack, phase, every, slow, causes(tokens, every.steps))
            if phase == wording.main_phase(phases):
                findings += _stall_findings(place, every, slow, metrics)
            parts = _components(timed, _kernel_shares(kernels, stack, phase))
            found, part_metrics = _shares(stack, phase, parts, causes(tokens, timed.steps))
            rows += found
            metrics += part_metrics
            for caveat in _caveats(stack, chosen, every, slow, parts):
                caveats.setdefault(caveat, []).append(place.removeprefix("the "))
            if phase == wording.main_phase(phases) and part_metrics:
                findings += _findings(place, found, part_metrics, times)
    notes = [f"{', '.join(places)}: {caveat}" for caveat, places in caveats.items()]
    if not rows:
        notes.insert(0, "No component times were recorded; unknown is not zero.")
    verdict = wording.missing_requests(len(trace.requests))
    if verdict:
        notes.append(f"No intervals: {verdict}.")
    return Result(
        name=NAME,
        title="Latency breakdown",
        table=pd.DataFrame(rows),
        metrics=tuple(metrics),
        findings=tuple(findings),
        tables={"steps": pd.DataFrame(step_rows), "kernels": _kernel_table(kernels)},
        notes=(
            *notes,
            *_probed_note(trace.steps),
            "A recorded run is slower than a bare one; shares are more robust than milliseconds.",
        ),
    )


def _probed_note(steps: pd.DataFrame) -> tuple[str, ...]:
    num_probed = int(steps["probed"].astype(bool).sum())
    if not num_probed:
        return ()
    return (
        f"{num_probed:,} of {len(steps):,} steps watched executed rows, which costs time; they are "
        "left out.",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Timed:
    """Steps that have a total and component times.

    Attributes:
        steps: Rows of the table `steps`.
        total_ms: [steps] device time, or host time where there is none.
        clock: ``device`` or ``host``.
        part_ms: Per component [steps]; only those that were seen.
        moe_ms: [steps] of the whole MoE blocks, or None.
        coverage: Per component the share of layers it applies to in which it was seen.
    """

    steps: pd.DataFrame
    total_ms: Floats
    clock: str
    part_ms: Mapping[str, Floats]
    moe_ms: Floats | None
    coverage: Mapping[str, float]

    def num_rows(self) -> Floats:
        """Returns [steps] rows of the batch, padding counted."""
        rows = self.steps["num_tokens"] + self.steps["num_padded_tokens"]
        return rows.to_numpy(np.float64)

    def only(self, kept: NDArray[np.bool_]) -> _Timed:
        """Returns the same of some of the steps."""
        return _Timed(
            steps=self.steps[kept],
            total_ms=self.total_ms[kept],
            clock=self.clock,
            part_ms={name: values[kept] for name, values in self.part_ms.items()},
            moe_ms=None if self.moe_ms is None else self.moe_ms[kept],
            coverage=self.coverage,
        )


def _timed_steps(steps: pd.DataFrame, layers: pd.DataFrame) -> _Timed | None:
    on_device = bool(steps["device_ms"].notna().any())
    column = "device_ms" if on_device else "wall_ms"
    wanted = ["rank", "step", "site", "moe_ms", *_LAYER_COLUMNS.values()]
    own = layers.loc[layers["step"].isin(steps["step"]), wanted]
    keys = ["rank", "step"]
    summed = own.drop(columns="site").groupby(keys, observed=True).sum(min_count=1)
    joined = steps.join(summed, on=keys, how="left")
    seen = joined[list(_LAYER_COLUMNS.values())].notna().any(axis=1)
    joined = joined[seen & joined[column].notna()].sort_values(keys)
    if joined.empty:
        return None
    part_ms = {}
    coverage = {}
    own = own.merge(joined[keys], on=keys)
    moe, dense = own["site"].notna(), own["site"].isna()
    for name, source in {**_STEP_COLUMNS, **_LAYER_COLUMNS}.items():
        values = joined[source].to_numpy(np.float64)
        if np.isfinite(values).any():
            part_ms[name] = np.nan_to_num(values)
            if name in _LAYER_COLUMNS:
                applies = {"attention": moe | dense, "dense_ffn": dense}.get(name, moe)
                coverage[name] = float(own.loc[applies, source].notna().mean())
            else:
                coverage[name] = float(np.isfinite(values).mean())
    moe_ms = joined["moe_ms"].to_numpy(np.float64)
    return _Timed(
        steps=joined,
        total_ms=joined[column].to_numpy(np.float64),
        clock="device" if on_device else "host",
        part_ms=part_ms,
        moe_ms=moe_ms if np.isfinite(moe_ms).all() else None,
        coverage=coverage,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Components:
    """[steps] per component, the remainder included; with the class of each."""

    total_ms: Floats
    clock: str
    part_ms: Mapping[str, Floats]
    figure_class: Mapping[str, FigureClass]
    coverage: Mapping[str, float]
    overshoot: float


def _components(timed: _Timed, shares: Mapping[str, Mapping[str, float]]) -> _Components:
    parts = dict(timed.part_ms)
    classes: dict[str, FigureClass] = dict.fromkeys(parts, "measured")
    if timed.moe_ms is not None:
        # A block whose experts no module shows is kept whole: its rest is mostly experts.
        rest = "moe_rest" if "experts" in parts else "moe_block"
        inside = [parts[name] for name in _INSIDE_MOE if name in parts]
        parts[rest] = np.maximum(timed.moe_ms - np.sum(inside, axis=0), 0)
        classes[rest] = "measured"
    sources = (("experts", "experts"), ("block", "moe_rest"), ("block", "moe_block"))
    for region, source in sources:
        if region not in shares or source not in parts:
            continue
        whole = parts.pop(source)
        classes.pop(source)
        for name, share in shares[region].items():
            target = source if region == "block" and name == "unclassified" else name
            target = "moe_rest" if target == "moe_block" else target
            parts[target] = parts.get(target, np.zeros_like(whole)) + share * whole
            classes[target] = "estimate"
    known: Floats = np.sum(list(parts.values()), axis=0)
    parts["other"] = np.maximum(timed.total_ms - known, 0)
    classes["other"] = "measured"
    return _Components(
        total_ms=np.maximum(timed.total_ms, known),
        clock=timed.clock,
        part_ms={name: parts[name] for name in COMPONENTS if name in parts},
        figure_class=classes,
        coverage=timed.coverage,
        overshoot=float(known.sum() / max(timed.total_ms.sum(), np.finfo(float).tiny)),
    )


def _kernel_shares(
    kernels: pd.DataFrame, stack: str, phase: str
) -> Mapping[str, Mapping[str, float]]:
    """Returns, per region, the share of each component among its kernels."""
    if kernels.empty:
        return {}
    chosen = kernels[(kernels["stack"] == stack) & (kernels["phase"] == phase)]
    found = {}
    for region, rows in chosen.groupby("region", observed=True):
        times = rows.groupby("component", observed=True)["device_ms"].sum()
        total = float(times.sum())
        if total > 0:
            name = "experts" if region == "experts" else "block"
            found[name] = {str(key): float(value) / total for key, value in times.items()}
    return found


def _kernel_table(kernels: pd.DataFrame) -> pd.DataFrame:
    if kernels.empty:
        return pd.DataFrame()
    keys = ["stack", "phase", "region", "component"]
    summed = kernels.groupby(keys, observed=True)[["device_ms", "num_kernels"]].sum()
    passes = kernels.groupby(["stack", "phase"], observed=True)["profile_step"].nunique()
    table = summed.reset_index()
    table = table.join(passes.rename("num_profiled_steps"), on=["stack", "phase"])
    region = table.groupby(["stack", "phase", "region"], observed=True)["device_ms"]
    table["region_share"] = table["device_ms"] / region.transform("sum")
    return table


def _step_times(
    stack: str,
    phase: str,
    steps: pd.DataFrame,
    caused: Causes,
) -> tuple[list[dict[str, Any]], list[Metric]]:
    rows: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    for clock, column in (("host", "wall_ms"), ("device", "device_ms")):
        values = steps[column].to_numpy(np.float64)
        known = np.isfinite(values)
        if not known.any():
            continue
        found = quantiles(values, _QUANTILES, caused, known=known)
        median, slow = found[0], found[1]
        num_tokens = _MS_PER_S * steps["num_tokens"].to_numpy(np.float64)
        (speed,) = ratios([num_tokens], values, caused, known=known)
        where = f"{stack}/{phase}"
        for name, interval, meaning in (
            ("p50", median, "median"),
            ("p95", slow, "95th percentile"),
        ):
            metrics.append(
                wording.metric_of(
                    f"{NAME}/{clock}_{name}_ms/{where}",
                    interval,
                    unit="ms",
                    figure_class="measured",
                    better="lower",
                    note=f"{clock} time of a step, {meaning}",
                )
            )
        metrics.append(
            wording.metric_of(
                f"{NAME}/{clock}_tokens_per_s/{where}",
                speed,
                unit="tokens/s",
                figure_class="measured",
                better="higher",
                note="tokens over step time",
            )
        )
        rows.append(
            {
                "stack": stack,
                "phase": phase,
                "clock": clock,
                "num_steps": int(known.sum()),
                "num_steps_untimed": int((~known).sum()),
                "mean_num_tokens": float(steps["num_tokens"].mean()),
                "p50_ms": median.value,
                "p50_ms_low": median.low,
                "p50_ms_high": median.high,
                "p95_ms": slow.value,
                "p95_ms_low": slow.low,
                "p95_ms_high": slow.high,
                "tokens_per_s": speed.value,
                "tokens_per_s_low": speed.low,
                "tokens_per_s_high": speed.high,
            }
        )
    return rows, metrics


def _shares(
    stack: str,
    phase: str,
    parts: _Components,
    caused: Causes,
) -> tuple[list[dict[str, Any]], list[Metric]]:
    names = list(parts.part_ms)
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    if not {"experts", "moe_block"}.isdisjoint(names):
        groups.append(tuple(name for name in MOE_COMPONENTS if name in names))
    units: list[Floats] = [
        np.sum([parts.part_ms[name] for name in group], axis=0) for group in groups
    ]
    everything = np.ones(len(parts.total_ms), dtype=np.bool_)
    found = ratios(units, parts.total_ms, caused, known=everything)
    where = f"{stack}/{phase}"
    rows: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    for name, unit, interval in zip(names, units, found, strict=False):
        rows.append(
            {
                "stack": stack,
                "phase": phase,
                "component": name,
                "label": COMPONENTS[name],
                "clock": parts.clock,
                "share": interval.value,
                "share_low": interval.low,
                "share_high": interval.high,
                "ms_per_step": float(unit.mean()),
                "num_steps": len(unit),
                "layers_seen_share": parts.coverage.get(name),
                "figure_class": parts.figure_class[name],
            }
        )
        metrics.append(
            wording.metric_of(
                f"{NAME}/{name}_share/{where}",
                interval,
                unit="share",
                figure_class=parts.figure_class[name],
                note=f"{COMPONENTS[name]} of the {parts.clock} time of a step",
            )
        )
    if len(found) > len(names):
        metrics.insert(
            0,
            wording.metric_of(
                f"{NAME}/moe_share/{where}",
                found[-1],
                unit="share",
                figure_class="measured",
                better="lower",
                note=f"MoE blocks' share of the {parts.clock} time of a step",
            ),
        )
    return rows, metrics


def _stall_metrics(
    stack: str, phase: str, every: _Timed, slow: NDArray[np.bool_], caused: Causes
) -> list[Metric]:
    everything = np.ones(len(slow), dtype=np.bool_)
    (share,) = ratios([every.total_ms * slow], every.total_ms, caused, known=everything)
    return [
        wording.metric_of(
            f"{NAME}/stalled_share/{stack}/{phase}",
            share,
            unit="share",
            figure_class="measured",
            better="lower",
            note=f"{every.clock} time in steps that took over {FACTOR:g} times the median, in all "
            "and per row; the breakdown leaves them out",
        )
    ]


def _stall_findings(
    place: str, every: _Timed, slow: NDArray[np.bool_], metrics: list[Metric]
) -> list[Finding]:
    share = metrics[-1]
    if share.value is None or share.value < _MANY_STALLS:
        return []
    excess = {
        name: float(values[slow].mean() - values[~slow].mean())
        for name, values in every.part_ms.items()
    }
    largest = max(excess, key=lambda name: excess[name])
    whole = float(every.total_ms[slow].mean() - every.total_ms[~slow].mean())
    mostly = f", mostly in {_SPOKEN[largest]}" if excess[largest] > _HALF * whole else ""
    interval = Interval(value=share.value, low=share.low, high=share.high)
    text = (
        f"In {place}, {int(slow.sum()):,} of {len(slow):,} steps took over {FACTOR:g} times as "
        f"long as usual and hold {wording.share_with_interval(interval)} of the time{mostly}: "
        "warm-up or stalls, which the breakdown leaves out."
    )
    severity = SEVERITY_WARNING - 10 if share.value >= _MOSTLY_STALLS else SEVERITY_FACT + 4
    return [Finding(text=text, severity=severity, section=NAME, metric=share.name)]


def _caveats(
    stack: str,
    steps: pd.DataFrame,
    every: _Timed,
    slow: NDArray[np.bool_],
    parts: _Components,
) -> list[str]:
    notes = []
    if len(every.steps) < len(steps):
        notes.append(
            f"component times of {len(every.steps)} of {len(steps)} steps; the shares are of those."
        )
    missing = [
        _SPOKEN[name]
        for name in COMPONENTS
        if name in {**_LAYER_COLUMNS, **_STEP_COLUMNS}
        and name not in parts.part_ms
        and name not in _NOT_IN_EVERY_MODEL
        and (name, stack) != ("head", "encoder")
    ]
    if missing:
        notes.append(
            f"no module shows {', '.join(missing)}; unknown, not zero (inside another "
            "component or the remainder)."
        )
    partial = [
        f"{COMPONENTS[name].lower()} in {wording.percent(share)}"
        for name, share in parts.coverage.items()
        if share < 1 and name in _LAYER_COLUMNS
    ]
    if partial:
        notes.append(f"of the layers, seen {', '.join(partial)}.")
    if parts.overshoot > _OVERSHOOT:
        notes.append(
            f"components add up to {wording.percent(parts.overshoot)} of the step time; "
            "shares are of their sum."
        )
    if slow.any():
        notes.append(
            f"{int(slow.sum()):,} of {len(slow):,} steps took over {FACTOR:g} times the median "
            f"({wording.percent(float(every.total_ms[slow].sum() / every.total_ms.sum()))} of the "
            "time); the shares leave them out, medians and tokens per second do not."
        )
    return notes


def _findings(
    place: str,
    rows: list[dict[str, Any]],
    metrics: list[Metric],
    times: list[dict[str, Any]],
) -> list[Finding]:
    moe = metrics[0]
    if moe.value is None or not moe.name.startswith(f"{NAME}/moe_share/"):
        return []
    interval = Interval(value=moe.value, low=moe.low, high=moe.high)
    inside = sorted(
        (row for row in rows if row["component"] in MOE_COMPONENTS and row["share"] is not None),
        key=lambda row: -row["share"],
    )
    largest = ", ".join(
        f"{_SPOKEN[row['component']]} {wording.percent(row['share'])}"
        for row in inside[:_NUM_NAMED]
        if row["share"] > _WORTH_NAMING
    )
    clock = rows[0]["clock"]
    own = next((row for row in times if row["clock"] == clock), None)
    lasts = f" of {wording.milliseconds(own['p50_ms'])} (median)" if own else ""
    attention = next((row["share"] for row in rows if row["component"] == "attention"), None)
    beside = f"; attention takes {wording.percent(attention)}" if attention is not None else ""
    heavy = moe.value >= _HALF
    text = (
        f"In {place}, MoE blocks take "
        f"{wording.share_with_interval(interval)} of the {clock} time of a step{lasts}: {largest}"
        f"{beside}."
    )
    if heavy:
        limit = 1 / (1 - moe.value) if moe.value < 1 else float("inf")
        text += (
            f" Removing their cost altogether would make a step {wording.number(limit)} times as "
            "fast."
        )
    return [
        Finding(
            text=text,
            severity=SEVERITY_COST + 5 if heavy else SEVERITY_FACT + 3,
            section=NAME,
            metric=moe.name,
        )
    ]
