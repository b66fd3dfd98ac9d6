"""Replays traces against static and dynamic gating, beside the founding paper's numbers.

    python -m analysis.gating [TRACE...] [-o OUT]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/gating.html, .md
and .json) and every row of the replay (OUT/NAME.csv, OUT/NAME-sweep.csv). The page holds the
paper's Fig. 8 (what a capacity wastes and drops) on each trace, and a table of what the paper
(arXiv 2303.06182) and an independent profile of fairseq's 15B model publish on gating and memory,
each with what comes out here and why it differs where it does.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import moeprof
from moeprof.errors import MoeprofError
from moeprof.replay import gating
from moeprof.replay.capacity import (
    PAPER_FRACTIONS,
    PAPER_LM,
    PAPER_LM_SMALL,
    PAPER_MT,
    elementwise_blocks,
    static_dispatches,
)
from moeprof.replay.result import Result
from moeprof.reporting import Report, facts
from moeprof.reporting.gating_sections import gating_section
from moeprof.reporting.layout import (
    REPORT_VERSION,
    FindingData,
    ReportData,
    TableData,
    TraceData,
)
from moeprof.reporting.vocabulary import main_places
from moeprof.trace.reader import Trace, open_trace

DEFAULT_TRACES = ("sample:lm", "sample:mt")
DEFAULT_OUTPUT = Path("demo", "gating")
SWEEP = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
MAX_FINDINGS = 7

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Published:
    """A published number and what comes out here.

    Attributes:
        quantity: What it is.
        published: As printed.
        found: What the code here gives; None where it gives nothing.
        unit: Of both.
        verdict: What is reproduced, what differs, and why.
    """

    quantity: str
    published: str
    found: float | None
    unit: str
    verdict: str


def published() -> list[Published]:
    """Returns the published numbers on gating and memory beside what comes out here."""
    lm = static_dispatches(PAPER_LM.moe, num_tokens=[2048], value=PAPER_FRACTIONS["lm"])
    large = static_dispatches(PAPER_LM.moe, num_tokens=[4096], value=PAPER_FRACTIONS["lm"])
    mt = static_dispatches(PAPER_MT.moe, num_tokens=[2048], value=PAPER_FRACTIONS["mt"])
    small = static_dispatches(
        PAPER_LM_SMALL.moe, num_tokens=[2048] * 4, value=PAPER_FRACTIONS["lm"]
    )
    calls, products = PAPER_LM_SMALL.batched_products(small, sequence_length=2048)
    payload, needed = small.dispatched_bytes, small.needed_bytes
    assert payload is not None and needed is not None
    whole = PAPER_MT.device_bytes(devices=8)
    one, ten = (PAPER_MT.device_bytes(devices=8, cache_slots=slots) for slots in (1, 10))
    exact = "reproduced from shapes"
    per_token = "rows per row"
    rows = [
        ("Waste factor, LM", "12.8", lm.waste_factor_without_ceiling, per_token, exact),
        ("Waste factor, LM, 2,048 tokens, slots rounded up", "not printed", lm.waste_factor,
         per_token, exact),
        ("Waste factor, MT", "64", mt.waste_factor, per_token, exact),
        ("Parameters, LM", "52 B", PAPER_LM.num_params / 1e9, "B", f"{exact}: 51.83 B"),
        ("Parameters, MT", "54.5 B", PAPER_MT.num_params / 1e9, "B", exact),
        ("Static memory per GPU, LM, 8 GPUs", "12.59 GB", PAPER_LM.device_bytes(devices=8) / _GIB,
         "GiB", "reproduced to 1 %: printed total less printed activations; GB there means GiB"),
        ("Static memory per GPU, MT, 8 GPUs", "not printed", whole / _GIB, "GiB",
         "the base of the printed 32.2 % and 1.47; printed total less activations is 19.27"),
        ("Freed by a cache of 10 of 16 experts", "2.25 GB", (whole - ten) / _GIB, "GiB", exact),
        ("Freed by a cache of 1 of 16 experts", "32.2 %", 100 * (whole - one) / whole, "%", exact),
        ("Memory ratio at cache size 1", "1.47", whole / one, "times",
         f"{exact}; the headline is this smallest cache"),
        ("Memory ratio at cache size 10", "not printed", whole / ten, "times",
         "the configuration whose throughput is printed saves this much"),
        ("Dynamic memory, LM, batch 8, static gating", "6.29 GB",
         float(large.mask_bytes[0, 0]) / _GIB, "GiB",
         "differs by 5 %: masks of one layer at 4,096 tokens; the sequence length is not printed"),
        ("Profile of fairseq 15B: thread blocks of the mask", "421,888",
         float(elementwise_blocks(int(small.mask_elements[0, 0]))), "blocks", exact),
        ("The same: one mask in single precision", "not printed",
         float(small.combine_bytes[0, 0]) / _MIB, "MiB", exact),
        ("The same: batched products of 5 passes, allocated", "29.94 GiB", 5 * products / _GIB,
         "GiB", f"{exact}, attention included: {5 * calls} calls"),
        ("The same: rows per expert", "412", float(small.rows_per_expert[0]), "rows", exact),
        ("The same: expert calls", "15,360",
         float(5 * 4 * PAPER_LM_SMALL.num_moe_layers * small.local_experts), "calls", exact),
        ("The same: all-to-all payload", "not printed", float(payload[0, 0]) / _MIB, "MiB",
         "what each device sends both ways per layer"),
        ("The same: payload needed", "not printed", float(needed[0, 0]) / _MIB, "MiB",
         "the rows that tokens need"),
        ("Throughput, dynamic over static", "6.21, 5.75, 2.58 times", None, "",
         "not replayed: a trace holds no time of gating that was not run; it takes a live run"),
    ]  # fmt: skip
    return [Published(*row) for row in rows]


def analyse(trace: Trace) -> tuple[Result, Result]:
    """Returns gating at the paper's capacity for the task, and over all capacities."""
    fraction = PAPER_FRACTIONS.get(trace.info.model.task, PAPER_FRACTIONS["lm"])
    return gating(trace, values=[fraction]), gating(trace, values=SWEEP)


def published_table() -> TableData:
    """Returns `published` as a table of the page."""
    return TableData(
        title="The founding paper's numbers on gating and memory",
        figure_class="exact",
        columns=[
            ["quantity", "Quantity", "text"],
            ["published", "Published", "text"],
            ["found", "Here", "text"],
            ["verdict", "What is reproduced, what differs, why", "text"],
        ],
        rows=[
            {
                "quantity": row.quantity,
                "published": row.published,
                "found": "" if row.found is None else f"{row.found:,.5g} {row.unit}",
                "verdict": row.verdict,
            }
            for row in published()
        ],
    )


def page(traces: Sequence[tuple[str, Trace, Result, Result]]) -> Report:
    """Returns the page on several traces.

    Args:
        traces: Name, trace, result at one capacity, result over all.
    """
    found: list[FindingData] = []
    built: list[TraceData] = []
    for index, (name, trace, result, sweep) in enumerate(traces):
        extra = [published_table()] if index == 0 else []
        section = gating_section(trace, result, sweep=sweep, extra_tables=extra)
        classes = {metric["name"]: metric["figure_class"] for metric in section["metrics"]}
        section["findings"] = [
            FindingData(
                text=finding.text,
                severity=finding.severity,
                section=finding.section,
                metric=finding.metric,
                figure_class=classes.get(finding.metric or ""),
                trace=name,
                anchor=f"{name}-{finding.section}",
            )
            for finding in result.findings
        ]
        found += section["findings"]
        built.append(
            TraceData(
                id=name,
                name=name,
                title=trace.info.model.name,
                verdict=_verdict(trace, result),
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
            title="Gating: " + ", ".join(dict.fromkeys(trace["title"] for trace in built)),
            verdict=" ".join(trace["verdict"] for trace in built),
            findings=sorted(found, key=lambda each: -each["severity"])[:MAX_FINDINGS],
            comparison=None,
            traces=built,
        )
    )


def _verdict(trace: Trace, result: Result) -> str:
    places = main_places(trace)
    stacks = result.tables["stacks"]
    said = []
    for stack, phase in (place.split("/") for place in places):
        row = stacks[(stacks["stack"] == stack) & (stacks["phase"] == phase)].iloc[0]
        said.append(
            f"{row['waste_factor']:.3g} rows per row needed and {100 * row['dropped_share']:.2g}% "
            f"of choices dropped in {stack} {phase}"
        )
    name = trace.info.model.name
    if not said:
        return f"{name}: nothing could be concluded from this trace."
    row = stacks.iloc[0]
    return f"{name}: with {row['rule']} {row['value']:g}, {' and '.join(said)}."


def _name(path: str, taken: Sequence[str]) -> str:
    stem = Path(path.replace(":", "-")).name.removesuffix(".moeprof") or "trace"
    base = "".join(c if c.isalnum() else "-" for c in stem.lower()).strip("-") or "trace"
    name, number = base, 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.gating", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("traces", nargs="*", default=list(DEFAULT_TRACES), metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="OUT")
    options = parser.parse_args(arguments)
    try:
        analysed: list[tuple[str, Trace, Result, Result]] = []
        for path in options.traces:
            trace = open_trace(path)
            name = _name(path, [each[0] for each in analysed])
            analysed.append((name, trace, *analyse(trace)))
        options.output.mkdir(parents=True, exist_ok=True)
        for name, _, result, sweep in analysed:
            result.table.to_csv(options.output / f"{name}.csv", index=False)
            sweep.table.to_csv(options.output / f"{name}-sweep.csv", index=False)
        report = page(analysed)
        written = [*report.save(options.output / "gating.md")]
        written += report.save(options.output / "gating.html")[1:]
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
