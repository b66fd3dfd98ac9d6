"""Traces as the data of a report: analyses, the findings that stand at the top, the verdict."""

from __future__ import annotations

import datetime
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import moeprof
from moeprof.replay import wording
from moeprof.replay.breakdown import latency
from moeprof.replay.footprint import memory
from moeprof.replay.result import SEVERITY_WARNING, Finding, Metric, Result
from moeprof.replay.reuse import locality
from moeprof.replay.usage import activation
from moeprof.replay.working_set import batching
from moeprof.reporting import facts, replays, vocabulary
from moeprof.reporting.layout import (
    REPLAYS,
    REPORT_VERSION,
    SECTIONS,
    TRACE_READING,
    FindingData,
    MetricData,
    ReadingData,
    ReportData,
    SectionData,
    TableData,
    TraceData,
)
from moeprof.reporting.sections import section_of
from moeprof.trace.reader import Trace

MAX_FINDINGS = 7
ANALYSES: Mapping[str, Callable[[Trace], Result]] = types.MappingProxyType(
    {
        "latency": latency,
        "memory": memory,
        "activation": activation,
        "locality": locality,
        "batching": batching,
    }
)

_MIN_PER_TRACE = 3
_NUM_NAMED = 2
_COMPARED = (
    "latency/moe_share",
    "latency/host_p50_ms",
    "latency/device_p50_ms",
    "memory/experts_share",
    "activation/inactive_share",
    "activation/max_over_mean_load",
    "locality/overlap_share",
    "locality/shuffled_overlap_share",
    "locality/median_reuse_distance",
)


Progress = Callable[[str, int, int, str], None]
"""Told the trace, analyses done, analyses in all, and which one begins."""


def report_data(
    traces: Sequence[Trace],
    *,
    title: str | None = None,
    sections: Sequence[str] = SECTIONS,
    progress: Progress | None = None,
) -> ReportData:
    """Returns everything that a report on ``traces`` says, as plain data.

    Args:
        traces: At least one.
        title: Heading; made from the models' names when None.
        sections: Which of `layout.SECTIONS`.
        progress: Called before each analysis of each trace, and once more after its last.
    """
    ids = trace_ids(traces)
    described = [
        _described(trace, name, sections=sections, progress=progress or _silent)
        for trace, name in zip(traces, ids, strict=True)
    ]
    return assembled(
        described,
        title=title or title_of(traces),
        comparison=_comparison(traces, [each.data for each in described]),
    )


def _silent(label: str, done: int, total: int, item: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Described:
    """One trace as data, with all that was found, worst first."""

    data: TraceData
    findings: list[FindingData]


def described(
    trace: Trace,
    name: str,
    *,
    verdict: str,
    sections: Sequence[SectionData],
    findings: Sequence[Finding],
) -> Described:
    """Returns a trace with its sections, each with what was found in it.

    Args:
        trace: The trace.
        name: Its anchor.
        verdict: One sentence on it.
        sections: Its sections; their findings are filled in here.
        findings: What was found, of every section and of the run.
    """
    data = TraceData(
        id=name,
        name=name,
        title=trace.info.model.name,
        verdict=verdict,
        banners=facts.banners(trace),
        facts=facts.run_facts(trace),
        sections=list(sections),
    )
    return with_findings(data, findings)


def with_findings(data: TraceData, findings: Sequence[Finding]) -> Described:
    """Returns a part of a report with what was found in it, in the sections it belongs to.

    Args:
        data: The part.
        findings: What was found, in any order.
    """
    once: dict[str, Finding] = {}
    for finding in findings:
        once.setdefault(finding.text, finding)
    ordered = sorted(once.values(), key=lambda finding: -finding.severity)
    found = [_finding_data(finding, data) for finding in ordered]
    for section in data["sections"]:
        section["findings"] = [each for each in found if each["section"] == section["name"]]
    return Described(data=data, findings=found)


def assembled(
    traces: Sequence[Described],
    *,
    title: str,
    comparison: TableData | None = None,
    reading: ReadingData = TRACE_READING,
) -> ReportData:
    """Returns a report on traces that are described already.

    Args:
        traces: At least one.
        title: Heading.
        comparison: The table that stands before the traces.
        reading: How to read it.
    """
    ids = [each.data["id"] for each in traces]
    return ReportData(
        moeprof_report=REPORT_VERSION,
        moeprof_version=moeprof.__version__,
        generated=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        title=title,
        verdict=" ".join(dict.fromkeys(each.data["verdict"] for each in traces)),
        findings=_top([finding for each in traces for finding in each.findings], ids),
        comparison=comparison,
        traces=[each.data for each in traces],
        reading=reading,
    )


def trace_ids(traces: Sequence[Trace]) -> list[str]:
    """Returns one short anchor per trace, from its file name."""
    ids: list[str] = []
    for trace in traces:
        stem = re.split(r"[/\\:]", str(trace.path).rstrip("/"))[-1].removesuffix(".moeprof")
        base = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "trace"
        name, number = base, 2
        while name in ids:
            name, number = f"{base}-{number}", number + 1
        ids.append(name)
    return ids


def title_of(traces: Sequence[Trace]) -> str:
    """Returns a heading: the models' names."""
    names = list(dict.fromkeys(trace.info.model.name for trace in traces))
    if len(names) <= _NUM_NAMED:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} more"


def _described(
    trace: Trace, name: str, *, sections: Sequence[str], progress: Progress
) -> Described:
    """Returns what the analyses say about a trace."""
    built: list[SectionData] = []
    results: list[Result] = []
    chosen = [section for section in SECTIONS if section in sections]
    for done, section in enumerate(chosen):
        progress(name, done, len(chosen), section)
        if section in ANALYSES:
            result: Result | None = ANALYSES[section](trace)
            assert result is not None
            built.append(section_of(trace, result))
        else:
            replay = replays.replayed(trace, section)
            result = replay.result
            built.append(replay.section)
        results += [] if result is None else [result]
    progress(name, len(chosen), len(chosen), "")
    return described(
        trace,
        name,
        verdict=_verdict(trace, results),
        sections=built,
        findings=[
            *facts.recording_findings(trace),
            *(finding for result in results for finding in result.findings),
        ],
    )


def _verdict(trace: Trace, results: Sequence[Result]) -> str:
    """Returns one sentence: what the trace is worth, or its two most telling numbers."""
    name = trace.info.model.name
    known = {metric.name: metric for result in results for metric in result.metrics}
    worst = facts.recording_findings(trace)
    place = vocabulary.main_places(trace)[-1] if vocabulary.main_places(trace) else ""
    said = vocabulary.place_label(trace, place.split("/")) if place else "a step"
    if worst and worst[0].severity > SEVERITY_WARNING + 2:
        return f"{name}: the recording itself needs attention before its numbers do."
    idle = known.get(f"activation/inactive_share/{place}")
    moe = known.get(f"latency/moe_share/{place}")
    again = known.get(f"locality/overlap_share/{place}")
    parts = []
    if moe is not None and moe.value is not None:
        parts.append(f"{said} spends {_percent(moe)} of its time in MoE blocks")
    if not trace.info.model.random_weights:
        if idle is not None and idle.value is not None:
            parts.append(f"leaves {_percent(idle)} of the experts idle")
        if again is not None and again.value is not None:
            parts.append(f"needs {_percent(again)} of them again in the next step")
    if not parts:
        return f"{name}: nothing could be concluded from this trace."
    text = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    if not text.startswith(said):
        text = f"{said} {text}"
    tail = " (random weights: routing left out)" if trace.info.model.random_weights else ""
    return f"{name}: {text}{tail}."


def _percent(metric: Metric) -> str:
    return wording.percent(metric.value or 0.0)


def _finding_data(finding: Finding, data: TraceData) -> FindingData:
    section = next((s for s in data["sections"] if s["name"] == finding.section), None)
    metric: MetricData | None = None
    if section is not None and finding.metric is not None:
        metric = next((m for m in section["metrics"] if m["name"] == finding.metric), None)
    suffix = finding.section if section is not None else facts.SECTION
    return FindingData(
        text=finding.text,
        severity=finding.severity,
        section=finding.section,
        metric=finding.metric,
        figure_class=None if metric is None else metric["figure_class"],
        trace=data["id"],
        anchor=f"{data['id']}-{suffix}",
    )


def _top(found: Sequence[FindingData], ids: Sequence[str]) -> list[FindingData]:
    """Returns the findings for the top of the page: the worst, but some of each trace.

    What replays found stands there once per trace as long as there is something else to say: they
    have many verdicts, and what was recorded comes first.
    """
    ordered = sorted(found, key=lambda finding: -finding["severity"])
    replayed: set[str] = set()
    first: list[FindingData] = []
    for finding in ordered:
        if finding["section"] not in REPLAYS or finding["trace"] not in replayed:
            first.append(finding)
        if finding["section"] in REPLAYS:
            replayed.add(finding["trace"])
    each = max(min(_MIN_PER_TRACE, MAX_FINDINGS // max(len(ids), 1)), 1)
    kept: list[FindingData] = []
    for name in ids:
        kept += [finding for finding in first if finding["trace"] == name][:each]
    for finding in [*first, *ordered]:
        if len(kept) >= MAX_FINDINGS:
            break
        if finding not in kept:
            kept.append(finding)
    return sorted(kept, key=lambda finding: -finding["severity"])[: max(MAX_FINDINGS, len(ids))]


def _comparison(traces: Sequence[Trace], built: Sequence[TraceData]) -> TableData | None:
    """Returns the headline numbers of all traces and stacks side by side; None for a single one."""
    columns = [
        (trace, data, place)
        for trace, data in zip(traces, built, strict=True)
        for place in vocabulary.main_places(trace)
    ]
    if len(columns) == 1 or not columns:
        return None
    rows: list[dict[str, Any]] = []
    for quantity in _COMPARED:
        row: dict[str, Any] = {"label": vocabulary.QUANTITIES[quantity], "unit": "", "class": ""}
        for index, (_, data, place) in enumerate(columns):
            known = {m["name"]: m for section in data["sections"] for m in section["metrics"]}
            metric = known.get(f"{quantity}/{place}") or known.get(quantity)
            if metric is None:
                continue
            row["unit"], row["class"] = metric["unit"], metric["figure_class"]
            row[f"c{index}"] = metric["value"]
            row[f"c{index}_low"], row[f"c{index}_high"] = metric["low"], metric["high"]
        if row["unit"]:
            rows.append(row)
    headings = [
        f"{data['title']}: {vocabulary.place_label(trace, place.split('/'))}"
        for trace, data, place in columns
    ]
    return TableData(
        title="Side by side",
        figure_class="",
        columns=[
            ["label", "", "text"],
            *([f"c{index}", heading, "row"] for index, heading in enumerate(headings)),
            ["class", "Class", "class"],
        ],
        rows=rows,
    )
