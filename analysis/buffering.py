"""Replays traces against expert caches, beside the founding paper's numbers.

    python -m analysis.buffering [TRACE...] [-o OUT] [--devices N]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/buffering.html, .md
and .json) and every row of the replay (OUT/NAME.csv, OUT/NAME-caches.csv). The page holds the
paper's Fig. 12 (miss rate of the worst decoder cache against its size, for LIFO, FIFO and Belady's
MIN; LRU, which the paper leaves out, beside them) and what its Fig. 13 trades, memory against bytes
moved, on each trace; and a table of what the paper (arXiv 2303.06182) publishes on expert
buffering, each with what comes out here and why it differs where it does.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

import moeprof
from moeprof.errors import MoeprofError
from moeprof.replay import buffering
from moeprof.replay.cache.study import BufferingResult
from moeprof.replay.capacity import PAPER_MT
from moeprof.reporting import Report, facts
from moeprof.reporting.layout import (
    REPORT_VERSION,
    FigureData,
    FindingData,
    MetricData,
    ReportData,
    SectionData,
    TableData,
    TraceData,
)
from moeprof.reporting.vocabulary import finite, records
from moeprof.trace.reader import Trace, open_trace

DEFAULT_TRACES = ("sample:lm", "sample:mt")
DEFAULT_OUTPUT = Path("demo", "buffering")
POLICIES = ("paper", "fifo", "lru", "lfu", "min", "bound")
MAX_FINDINGS = 7
QUESTION = "How many expert slots are enough, under which policy, and what do misses move?"

_STYLES = {"lru": "recorded", "paper": "shuffled", "fifo": "uniform", "min": "popularity"}
_GIB = 2**30
_MOST_CAPACITIES = 16


def capacities_of(trace: Trace, devices: int) -> list[int]:
    """Returns slots per cache, from 1 to what one device holds of the largest site."""
    most = -(-max(site.num_experts for site in trace.sites) // devices)
    steps = np.unique(np.linspace(1, most, min(most, _MOST_CAPACITIES)).round().astype(int))
    return [int(step) for step in steps]


def analyse(trace: Trace, devices: int) -> BufferingResult:
    """Returns the replay of a trace at all sizes of its caches."""
    return buffering(
        trace, policies=POLICIES, capacities=capacities_of(trace, devices), devices=devices
    )


def published_table() -> TableData:
    """Returns the paper's numbers on expert buffering beside what comes out here."""
    whole = PAPER_MT.device_bytes(devices=8)
    one, ten = (PAPER_MT.device_bytes(devices=8, cache_slots=slots) for slots in (1, 10))
    shapes = "reproduced from shapes"
    image = "differs in kind: the paper prints an image, no values, and its trace was not published"
    rows = [
        ("Freed by a cache of 10 of 16 experts", "2.25 GB", f"{(whole - ten) / _GIB:.3f} GiB",
         f"{shapes}; GB there means GiB"),
        ("Freed by a cache of 1 of 16 experts", "32.2 %", f"{100 * (whole - one) / whole:.1f} %",
         shapes),
        ("Memory ratio, smallest cache", "1.47", f"{whole / one:.3f}",
         f"{shapes}; the headline is a cache of one expert"),
        ("Memory ratio at the cache size whose throughput is printed", "not printed",
         f"{whole / ten:.3f}", "10 experts per device and layer"),
        ("Fig. 12: miss rate against cache size, LIFO, FIFO, MIN", "image", "curves above",
         f"{image}; the curves here are the same policies on these traces"),
        ("Fig. 13: latency against memory", "image", "bytes moved above",
         f"{image}; bytes are exact, their time is a matter of the machine"),
    ]  # fmt: skip
    return TableData(
        title="The founding paper's numbers on expert buffering",
        figure_class="exact",
        columns=[
            ["quantity", "Quantity", "text"],
            ["published", "Published", "text"],
            ["found", "Here", "text"],
            ["verdict", "What is reproduced, what differs, why", "text"],
        ],
        rows=[
            dict(zip(("quantity", "published", "found", "verdict"), row, strict=True))
            for row in rows
        ],
    )


def section_of(trace: Trace, result: BufferingResult, extra: Sequence[TableData]) -> SectionData:
    """Returns the section of one trace."""
    metrics = [
        MetricData(
            name=metric.name,
            label=" ".join(metric.name.split("/")[1:]).replace("_", " "),
            value=finite(metric.value),
            unit=metric.unit,
            figure_class=metric.figure_class,
            low=finite(metric.low),
            high=finite(metric.high),
            split_half=None if metric.split_half is None else [float(v) for v in metric.split_half],
            better=metric.better,
            note=metric.note,
        )
        for metric in result.metrics
    ]
    capacities = list(dict.fromkeys(result.table["capacity"]))
    middle = f"{capacities[(len(capacities) - 1) // 2]} slot"
    headline = [
        metric["name"]
        for metric in metrics
        if metric["name"].startswith(("buffering/hit_rate/lru/", "buffering/hit_rate/min/"))
        and f"/{middle}" in metric["name"]
    ]
    return SectionData(
        name=result.name,
        title=result.title,
        question=QUESTION,
        headline=headline,
        metrics=metrics,
        figures=_figures(result),
        tables=[_rows_table(result), *extra],
        findings=[],
        notes=list(result.notes),
    )


def _figures(result: BufferingResult) -> list[FigureData]:
    """Returns hit rates, miss rates of the worst cache and bytes moved, against the size."""
    table = result.table[result.table["phase"] != "all"]
    caches = result.per_cache[result.per_cache["worst"] & (result.per_cache["phase"] != "all")]
    phases = list(dict.fromkeys(table["phase"]))
    misses = caches.assign(miss_rate=1 - caches["hit_rate"])
    specs = (
        ("hits", "Lookups that hit", table, "hit_rate", True, "share", "lookups that hit",
         "Higher is better; min knows the future and is the ceiling for equal sizes."),
        ("worst", "Misses of the worst cache (the paper's Fig. 12)", misses, "miss_rate", False,
         "share", "lookups that miss", "The cache that misses most at each size; lower is better."),
        ("moved", "Bytes moved for the memory kept (the paper's Fig. 13)", table, "bytes_moved",
         False, "bytes", "bytes moved", "Lower is better; the time a byte takes is the machine's."),
    )  # fmt: skip
    return [
        FigureData(
            id=f"buffering-{name}",
            kind="lines",
            title=title,
            alt=f"{title} against slots per cache, one panel per phase.",
            how_to_read=how,
            figure_class="exact",
            collapsed=False,
            panels=[
                {
                    "title": phase,
                    "x_label": "slots per cache",
                    "y_label": y_label,
                    "x_scale": "linear",
                    "y_unit": unit,
                    "series": [
                        {
                            "key": style,
                            "label": policy,
                            "points": _points(frame, policy, phase, column, bands),
                        }
                        for policy, style in _STYLES.items()
                    ],
                }
                for phase in phases
            ],
        )
        for name, title, frame, column, bands, unit, y_label, how in specs
    ]


def _points(
    frame: pd.DataFrame, policy: str, phase: str, column: str, bands: bool
) -> list[list[float | None]]:
    own = frame[(frame["policy"] == policy) & (frame["phase"] == phase)]
    own = own.sort_values("capacity", key=lambda values: values.astype(int))
    low = own["low"] if bands else pd.Series(np.nan, index=own.index)
    high = own["high"] if bands else pd.Series(np.nan, index=own.index)
    return [
        [float(x), float(y), finite(below), finite(above)]
        for x, y, below, above in zip(own["capacity"], own[column], low, high, strict=True)
    ]


def _rows_table(result: BufferingResult) -> TableData:
    columns = [
        ["policy", "Policy", "text"],
        ["capacity", "Slots", "number"],
        ["phase", "Phase", "text"],
        ["num_lookups", "Lookups", "number"],
        ["hit_rate", "Hits", "share"],
        ["bytes_moved", "Moved", "bytes"],
        ["bytes_streamed", "Streamed", "bytes"],
        ["misses_compulsory", "First uses", "number"],
        ["misses_capacity", "For lack of room", "number"],
        ["misses_policy", "By the policy", "number"],
    ]
    return TableData(
        title="Every policy, size and phase",
        figure_class="exact",
        columns=columns,
        rows=records(result.table[[key for key, _, _ in columns]]),
    )


def page(traces: Sequence[tuple[str, Trace, BufferingResult]]) -> Report:
    """Returns the page on several traces.

    Args:
        traces: Name, trace and result.
    """
    found: list[FindingData] = []
    built: list[TraceData] = []
    for index, (name, trace, result) in enumerate(traces):
        section = section_of(trace, result, [published_table()] if index == 0 else [])
        section["findings"] = [
            FindingData(
                text=finding.text,
                severity=finding.severity,
                section=finding.section,
                metric=finding.metric,
                figure_class="exact",
                trace=name,
                anchor=f"{name}-{finding.section}",
            )
            for finding in result.findings
        ]
        found += section["findings"]
        verdict = result.findings[0].text if result.findings else "nothing could be concluded."
        built.append(
            TraceData(
                id=name,
                name=name,
                title=trace.info.model.name,
                verdict=f"{trace.info.model.name}: {verdict}",
                banners=facts.banners(trace),
                facts=facts.run_facts(trace),
                sections=[section],
            )
        )
    return Report(
        ReportData(
            moeprof_report=REPORT_VERSION,
            moeprof_version=moeprof.__version__,
            generated=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            title="Expert buffering: " + ", ".join(dict.fromkeys(each["title"] for each in built)),
            verdict=" ".join(each["verdict"] for each in built),
            findings=sorted(found, key=lambda each: -each["severity"])[:MAX_FINDINGS],
            comparison=None,
            traces=built,
        )
    )


def _name(path: str, taken: Sequence[str]) -> str:
    stem = Path(path.replace(":", "-")).name.removesuffix(".moeprof") or "trace"
    base = "".join(c if c.isalnum() else "-" for c in stem.lower()).strip("-") or "trace"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.buffering",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("traces", nargs="*", default=list(DEFAULT_TRACES), metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="OUT")
    parser.add_argument("--devices", type=int, default=1, help="devices the experts lie on")
    options = parser.parse_args(arguments)
    try:
        analysed: list[tuple[str, Trace, BufferingResult]] = []
        for path in options.traces:
            trace = open_trace(path)
            name = _name(path, [each[0] for each in analysed])
            analysed.append((name, trace, analyse(trace, options.devices)))
        options.output.mkdir(parents=True, exist_ok=True)
        for name, _, result in analysed:
            result.table.to_csv(options.output / f"{name}.csv", index=False)
            result.per_cache.to_csv(options.output / f"{name}-caches.csv", index=False)
        report = page(analysed)
        written = [*report.save(options.output / "buffering.md")]
        written += report.save(options.output / "buffering.html")[1:]
    except MoeprofError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
