"""Results as sections of a report: which numbers, figures and tables, in which words.

Everything here is data (`layout`); nothing is formatted or drawn. Leaves out the replays, which
take settings (`replays`).
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
from moeprof.reporting.vocabulary import QUESTIONS, Built, metric_label, section_data
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
    headline, figures, tables = _BUILDERS[result.name](trace, result)
    return section_data(
        result,
        question=QUESTIONS[result.name],
        label=lambda name: metric_label(name, trace),
        headline=headline,
        figures=figures,
        tables=tables,
    )
