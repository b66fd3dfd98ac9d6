"""What numbers are called, what they are read against, and rows of plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moeprof.replay import wording
from moeprof.replay.breakdown import COMPONENTS
from moeprof.replay.result import Metric, Result
from moeprof.reporting.layout import FigureData, MetricData, SectionData, TableData
from moeprof.trace import schema
from moeprof.trace.reader import Trace

Rows = list[dict[str, Any]]
Built = tuple[list[str], list[FigureData], list[TableData]]
"""Names of the headline metrics, figures, tables."""

QUANTITIES: Mapping[str, str] = {
    "latency/moe_share": "MoE blocks' share of step time",
    "latency/host_p50_ms": "Median step, host time",
    "latency/host_p95_ms": "95th percentile step, host time",
    "latency/host_tokens_per_s": "Tokens per second, host time",
    "latency/device_p50_ms": "Median step, device time",
    "latency/device_p95_ms": "95th percentile step, device time",
    "latency/device_tokens_per_s": "Tokens per second, device time",
    "latency/stalled_share": "Time in stalled steps",
    **{f"latency/{name}_share": f"{label}: share of step" for name, label in COMPONENTS.items()},
    "memory/static_bytes": "Parameters and buffers",
    "memory/expert_bytes": "Routed experts",
    "memory/experts_share": "Experts' share of static bytes",
    "memory/max_peak_bytes": "Largest device peak",
    "memory/max_reserved_bytes": "Most reserved device memory",
    "memory/max_process_bytes": "Most resident process memory",
    "memory/max_activation_bytes": "Largest activation peak",
    "memory/p50_activation_bytes": "Median activation peak",
    "activation/inactive_share": "Inactive experts per step",
    "activation/uniform_inactive_share": "Inactive under uniform routing",
    "activation/max_over_mean_load": "Fullest expert over mean",
    "activation/uniform_max_over_mean_load": "Fullest over mean, uniform routing",
    "activation/usage_entropy": "Evenness of usage (entropy)",
    "activation/uniform_usage_entropy": "Evenness under uniform routing",
    "activation/label_distance": "Usage distance between {labels}",
    "activation/chance_label_distance": "Distance by chance",
    "locality/overlap_share": "Experts needed again in the next step",
    "locality/shuffled_overlap_share": "The same, steps shuffled",
    "locality/uniform_overlap_share": "The same, uniform routing",
    "locality/excess_overlap_share": "What order in time adds",
    "locality/median_reuse_distance": "Median reuse distance",
    "locality/next_token_share": "Experts shared with the next token",
    "locality/affinity_share": "Next layer's experts told by a token's own",
    "locality/affinity_popular_share": "Next layer's experts among the most popular, per token",
    "locality/affinity_shuffled_share": "Told by another token of the step",
    "locality/affinity_uniform_share": "Told under uniform routing",
    "locality/affinity_gain": "What a token's experts add to popularity",
    "locality/affinity_information": "Information about the next layer",
    "locality/prefetch_share": "Next layer's experts fetched by likelihood",
    "locality/prefetch_popular_share": "The same, fetched by popularity",
    "locality/prefetch_shuffled_share": "The same, tokens exchanged",
    "locality/prefetch_uniform_share": "The same, uniform routing",
    "locality/prefetch_gain": "What likelihood adds to popularity",
    "batching/distinct_share": "Experts needed by a batch",
}
QUESTIONS: Mapping[str, str] = {
    "latency": "Where does the time of a step go?",
    "memory": "What fills the memory, and what does running add?",
    "activation": "Which experts work, how evenly, and how many stand idle?",
    "locality": "Is an expert that was just used about to be used again?",
    "batching": "How many experts does a batch need?",
}

_NUM_ALT_ITEMS = 4
_YARDSTICKS = {
    "activation/inactive_share": ("activation/uniform_inactive_share", "uniform routing"),
    "activation/max_over_mean_load": (
        "activation/uniform_max_over_mean_load", "uniform routing",
    ),
    "activation/usage_entropy": ("activation/uniform_usage_entropy", "uniform routing"),
    "activation/label_distance": ("activation/chance_label_distance", "by chance"),
    "locality/overlap_share": ("locality/shuffled_overlap_share", "steps shuffled"),
    "locality/affinity_share": ("locality/affinity_popular_share", "most popular"),
    "locality/prefetch_share": ("locality/prefetch_popular_share", "most popular"),
}  # fmt: skip


def section_data(
    result: Result,
    *,
    question: str,
    label: Callable[[str], str],
    headline: Sequence[str],
    figures: Sequence[FigureData],
    tables: Sequence[TableData],
) -> SectionData:
    """Returns a result as a section; its findings are filled in by the report.

    Args:
        result: The result.
        question: What it answers.
        label: From the name of a metric to what it is called on a page.
        headline: Names of the metrics that stand first; those there are none of are left out.
        figures: Its figures; those without a panel are left out.
        tables: Its tables; those without a row are left out.
    """
    names = {metric.name for metric in result.metrics}
    return SectionData(
        name=result.name,
        title=result.title,
        question=question,
        headline=[name for name in headline if name in names],
        metrics=[metric_data(metric, label(metric.name)) for metric in result.metrics],
        figures=[figure for figure in figures if figure["panels"]],
        tables=[table for table in tables if table["rows"]],
        findings=[],
        notes=list(result.notes),
        absence="",
    )


def absent_section(name: str, *, title: str, question: str, absence: str) -> SectionData:
    """Returns the sentence that stands where a trace cannot have a section."""
    return SectionData(
        name=name,
        title=title,
        question=question,
        headline=[],
        metrics=[],
        figures=[],
        tables=[],
        findings=[],
        notes=[],
        absence=absence,
    )


def metric_data(metric: Metric, label: str) -> MetricData:
    """Returns a metric as data."""
    return MetricData(
        name=metric.name,
        label=label,
        value=finite(metric.value),
        unit=metric.unit,
        figure_class=metric.figure_class,
        low=finite(metric.low),
        high=finite(metric.high),
        split_half=None if metric.split_half is None else [float(v) for v in metric.split_half],
        better=metric.better,
        note=metric.note,
    )


def metric_label(name: str, trace: Trace) -> str:
    """Returns what a metric is called on a page."""
    analysis, quantity, *where = name.split("/")
    label = QUANTITIES[f"{analysis}/{quantity}"]
    if analysis == "batching" and where:
        tokens = where.pop()
        label = f"Experts needed by {tokens} token{'' if tokens == '1' else 's'}"
    label = label.replace("{labels}", label_plural(trace))
    return f"{label}, {place_label(trace, where)}" if where else label


def place_label(trace: Trace, where: Sequence[str]) -> str:
    """Returns ``decode``, or ``decoder decode`` where a trace has two stacks."""
    stack = where[0]
    if len(where) == 1:
        return stack
    phase = where[1]
    if phase == "encode":
        return "encoder"
    return phase if _num_stacks(trace) == 1 else f"{stack} {phase}"


def yardstick_of(name: str) -> tuple[str, str] | None:
    """Returns the metric that a metric is read against, and what to call it."""
    analysis, quantity, *where = name.split("/")
    found = _YARDSTICKS.get(f"{analysis}/{quantity}")
    return None if found is None else ("/".join([found[0], *where]), found[1])


def finite(value: Any) -> float | None:
    """Returns a number, or None for what is none."""
    if value is None or pd.isna(value) or not math.isfinite(float(value)):
        return None
    return float(value)


def records(table: pd.DataFrame) -> Rows:
    """Returns rows of plain data: numbers, text, lists; None for missing values."""
    return [
        {str(key): _plain(value) for key, value in row.items()} for row in table.to_dict("records")
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return finite(value)
    return None if pd.isna(value) else str(value)


def _num_stacks(trace: Trace) -> int:
    return len(set(trace.steps["stack"])) or 1


def label_plural(trace: Trace) -> str:
    """Returns what tells the requests of a trace apart: domains or languages."""
    requests = trace.requests
    kinds = ("language", "domain") if trace.info.model.task == "mt" else ("domain", "language")
    for kind in kinds:
        if kind in requests and requests[kind].nunique() > 1:
            return f"{kind}s"
    return "labels"


def groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Returns rows by the values of some of their keys, in order of appearance."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def main_places(trace: Trace) -> list[str]:
    """Returns ``stack/phase`` of the phase that stands for each stack."""
    places = []
    for stack in trace.info.stacks:
        own = trace.steps.loc[trace.steps["stack"] == stack, "phase"]
        phases = tuple(phase for phase in schema.PHASES if (own == phase).any())
        if phases:
            places.append(f"{stack}/{wording.main_phase(phases)}")
    return places


def headline_of(trace: Trace, *quantities: str) -> list[str]:
    """Returns the names of metrics of the phases that stand for their stacks."""
    return [f"{quantity}/{place}" for place in main_places(trace) for quantity in quantities]


def listed_items(items: Iterable[str]) -> str:
    """Returns the first few items as text, and how many more there are."""
    listed = list(items)
    more = len(listed) - _NUM_ALT_ITEMS
    text = "; ".join(listed[:_NUM_ALT_ITEMS])
    return f"{text}; and {more} more" if more > 0 else text


def percent(value: float | None) -> str:
    """Returns a share as a percentage, or ``unknown``."""
    return "unknown" if value is None else wording.percent(value)
