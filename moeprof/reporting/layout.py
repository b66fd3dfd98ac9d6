"""The structure of a report's data: what `report.json` holds, and every page is drawn from.

`REPORT_VERSION` changes when a field is renamed or changes its meaning; new fields do not change
it. Numbers are never formatted here: shares are 0 to 1, bytes are bytes, times are milliseconds.
Null means unknown, never zero.
"""

from __future__ import annotations

from typing import Any, TypedDict

REPORT_VERSION = 1

CHARACTERIZATION = ("latency", "memory", "activation", "locality", "batching")
"""Sections that describe what was recorded."""
REPLAYS = ("gating", "buffering", "balancing")
"""Sections that replay the trace against an optimization."""
SECTIONS = (*CHARACTERIZATION, *REPLAYS)
"""All sections of a report, in their order."""


class MetricData(TypedDict):
    """One number.

    ``name`` is ``analysis/quantity/stack/phase``; ``label`` says it in words. ``class`` is exact,
    estimate or measured. ``low`` and ``high`` bound the 90% interval; ``split_half`` is the number
    from either half of the requests. ``better`` is lower, higher or null.
    """

    name: str
    label: str
    value: float | None
    unit: str
    figure_class: str
    low: float | None
    high: float | None
    split_half: list[float] | None
    better: str | None
    note: str


class FindingData(TypedDict):
    """One sentence; ``severity`` sorts, ``anchor`` is where the page shows its number."""

    text: str
    severity: int
    section: str
    metric: str | None
    figure_class: str | None
    trace: str
    anchor: str


class FigureData(TypedDict):
    """One figure: ``kind`` names how ``panels`` are drawn (bars, meters, lines, layers, heat).

    ``collapsed`` figures are shown on demand.
    """

    id: str
    kind: str
    title: str
    alt: str
    how_to_read: str
    figure_class: str
    collapsed: bool
    panels: list[dict[str, Any]]


class TableData(TypedDict):
    """A table of details: ``columns`` are [key, heading, unit]; ``figure_class`` holds for all."""

    title: str
    figure_class: str
    columns: list[list[str]]
    rows: list[dict[str, Any]]


class SectionData(TypedDict):
    """One analysis of one trace.

    ``absence`` is empty, or one sentence that says why the trace has no such section; nothing else
    is in it then.
    """

    name: str
    title: str
    question: str
    headline: list[str]
    metrics: list[MetricData]
    figures: list[FigureData]
    tables: list[TableData]
    findings: list[FindingData]
    notes: list[str]
    absence: str


class FactData(TypedDict):
    """One run fact: a label and lines of text."""

    label: str
    lines: list[str]


class TraceData(TypedDict):
    """One trace: ``id`` is its anchor, ``banners`` are what every reader has to see first."""

    id: str
    name: str
    title: str
    verdict: str
    banners: list[str]
    facts: list[FactData]
    sections: list[SectionData]


class ReadingData(TypedDict):
    """How a page is to be read.

    ``eyebrow`` stands above the heading, ``part`` is what one of ``traces`` is called; ``range`` is
    the heading of ranges and ``ranges`` the sentence on them; ``method`` holds headings and texts.
    """

    eyebrow: str
    part: str
    range: str
    ranges: str
    method: list[list[str]]


class ReportData(TypedDict):
    """The whole report.

    ``findings`` are the few that stand at the top, worst first; ``comparison`` is the table that
    stands before the traces: they side by side, or published numbers beside theirs; ``reading``
    says how to read it.
    """

    moeprof_report: int
    moeprof_version: str
    generated: str
    title: str
    verdict: str
    findings: list[FindingData]
    comparison: TableData | None
    traces: list[TraceData]
    reading: ReadingData


TRACE_READING = ReadingData(
    eyebrow="Mixture-of-experts characterization",
    part="Trace",
    range="90% interval",
    ranges="Ranges are 90% intervals about traffic like this.",
    method=[
        [
            "Intervals",
            "The trace is analysed once, in its own order. Every counted unit is shared equally "
            "among the requests that caused it; requests are drawn with replacement 200 times, "
            "and the range is the 5th to 95th percentile of the recomputed ratio. Percentiles, "
            "loads and evenness redraw blocks of consecutive steps as long as the longest "
            "request; there is no interval with fewer than 10 requests or 10 blocks. Halves are "
            "every other request of each domain. A range speaks about other traffic of the same "
            "kind; about this trace the number itself is exact.",
        ]
    ],
)
"""How a report on traces is to be read."""
