"""Results as sections of a report: which numbers, figures and tables, in which words.

Everything here is data (`layout`); nothing is formatted or drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moeprof.replay.result import Result
from moeprof.reporting.layout import SectionData
from moeprof.reporting.routing_sections import (
    activation_content,
    batching_content,
    locality_content,
)
from moeprof.reporting.timing_sections import latency_content, memory_content
from moeprof.reporting.vocabulary import QUESTIONS, Built, metric_data
from moeprof.trace.reader import Trace

_BUILDERS: Mapping[str, Callable[[Trace, Result], Built]] = {
    "latency": latency_content,
    "memory": memory_content,
    "activation": activation_content,
    "locality": locality_content,
    "batching": batching_content,
}


def section_of(trace: Trace, result: Result) -> SectionData:
    """Returns a result as a section; its findings are filled in by the report."""
    build = _BUILDERS[result.name]
    headline, figures, tables = build(trace, result)
    names = {metric.name for metric in result.metrics}
    return SectionData(
        name=result.name,
        title=result.title,
        question=QUESTIONS[result.name],
        headline=[name for name in headline if name in names],
        metrics=[metric_data(metric, trace) for metric in result.metrics],
        figures=[figure for figure in figures if figure["panels"]],
        tables=[table for table in tables if table["rows"]],
        findings=[],
        notes=list(result.notes),
    )
