"""Replays traces under other placements of experts, beside the founding paper's numbers.

    python -m analysis.balancing [TRACE...] [-o OUT] [--devices N] [--counts CSV]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/balancing.html, .md
and .json) and the tables of the replay (OUT/NAME.csv, OUT/NAME-transfer.csv and more). The page
holds what the paper's load-balancing figures hold (maximum and average maximum load per planner),
and a table of published numbers with what comes out here and why it differs where it does. CSV
holds expert counts per domain (columns domain, layer, expert, count and, where several models are
in it, model): placements are planned on one domain and judged on the others.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import moeprof
from moeprof.errors import MoeprofError, UsageError
from moeprof.replay import balancing, transfer
from moeprof.replay.loads import balancedness
from moeprof.replay.placement import eplb
from moeprof.replay.result import Result
from moeprof.reporting import Report, facts
from moeprof.reporting.balancing_sections import balancing_section, transfer_table
from moeprof.reporting.layout import (
    REPORT_VERSION,
    FindingData,
    ReportData,
    TableData,
    TraceData,
)
from moeprof.reporting.vocabulary import records
from moeprof.trace.reader import Trace, open_trace

DEFAULT_TRACES = ("sample:lm", "sample:mt")
DEFAULT_OUTPUT = Path("demo", "balancing")
DEFAULT_DEVICES = 8
SWEEP = (2, 4, 8, 16, 32)
SWEEP_PLANNERS = ("contiguous", "eplb", "second_moment")
MAX_FINDINGS = 7
TABLES = ("transfer", "replanning", "sites", "sizes", "domains", "placements")

README_LOAD = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
"""The worked example of EPLB's README (deepseek-ai/EPLB, MIT)."""
README_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@dataclass(frozen=True)
class Analysed:
    """One trace with its results.

    Attributes:
        name: Short name, unique on the page.
        trace: The trace.
        result: For the number of devices asked for.
        sweep: For several numbers of devices.
    """

    name: str
    trace: Trace
    result: Result
    sweep: tuple[Result, ...]


def devices_for(trace: Trace, wanted: int) -> int:
    """Returns the most devices, up to ``wanted``, to which the experts of all sites divide."""
    return max(
        count
        for count in range(1, wanted + 1)
        if all(site.num_experts % count == 0 for site in trace.sites)
    )


def analyse(name: str, trace: Trace, wanted: int) -> Analysed:
    """Returns load balancing of a trace for one and for several numbers of devices."""
    num_devices = devices_for(trace, wanted)
    others = [
        count for count in SWEEP if all(site.num_experts % count == 0 for site in trace.sites)
    ]
    return Analysed(
        name,
        trace,
        balancing(trace, num_devices),
        tuple(balancing(trace, count, planners=SWEEP_PLANNERS) for count in others),
    )


def published(analysed: Sequence[Analysed]) -> TableData:
    """Returns published numbers on load balancing beside what comes out here."""
    slots, _, _ = eplb(README_LOAD, num_replicas=16, num_groups=4, num_nodes=2, num_devices=8)
    same = bool((slots == np.array(README_SLOTS)).all())
    other_traffic = (
        "differs: another model and other traffic. The paper does not say whether the shares of "
        "top-2 add up to 1 or 2; here they add up to 1"
    )
    not_replayed = "not replayed: balance is not time; it takes a live run"
    rows = [
        ("EPLB README, 2 layers, 16 slots, 8 devices", "32 slots",
         "all equal" if same else "differ", "reproduced, sort made stable"),
        ("Balancedness of [[100, 200], [100, 200]]", "0.75",
         f"{balancedness([[100, 200], [100, 200]]):g}", "devices reduced first, then layers"),
        ("Ideal load of 8 devices", "0.125", "0.125", "1/8"),
        *(
            (f"{quantity}, {row['stack']} of {each.name}, {row['planner']}",
             printed if row["stack"] == "decoder" else "not printed",
             f"{row[column]:.3f}",
             other_traffic + f"; {row['num_devices']} devices")
            for each in analysed
            for row in records(each.result.table)
            for quantity, column, printed in (
                ("Max Load", "max_load", _PRINTED.get(row["planner"], "not printed")),
                ("Avg Max Load", "avg_max_load", _PRINTED.get(row["planner"], "not printed")),
            )
            if row["planner"] in (*_PRINTED, "eplb", "second_moment")
        ),
        ("Throughput gain, LM", "up to 10.1 %", "", not_replayed),
        ("Throughput gain, MT encoder", "up to 19.5 %", "", not_replayed),
    ]  # fmt: skip
    return TableData(
        title="Published numbers on load balancing",
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


_PRINTED = {
    "contiguous": "more than 0.6 (LM)",
    "greedy": "less than 0.4 (LM)",
    "anticorrelation": "less than 0.4 (LM)",
}


def count_tables(path: Path, num_devices: int) -> list[TableData]:
    """Returns placements between the domains of a file of counts, one table per model.

    Raises:
        UsageError: The file cannot be read or has other columns.
    """
    try:
        counts = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", hint="give a CSV of counts") from error
    if "model" not in counts:
        counts["model"] = path.name.split(".")[0]
    tables = []
    for model, mine in counts.groupby("model", sort=True):
        if mine["domain"].nunique() < 2:
            continue
        experts = int(mine["expert"].max()) + 1
        fitting = max(count for count in range(1, num_devices + 1) if experts % count == 0)
        # One expert a device leaves nothing to place.
        fitting = fitting if fitting < experts else max(
            (count for count in range(1, experts) if experts % count == 0), default=1
        )  # fmt: skip
        rows = records(transfer(mine, fitting))
        title = f"{model}: placements between domains, {fitting} devices, from counts"
        tables.append(transfer_table(rows, title))
    return tables


def page(analysed: Sequence[Analysed], extra: Sequence[TableData] = ()) -> Report:
    """Returns the page on several traces.

    Args:
        analysed: The traces.
        extra: Further tables, on counts.
    """
    found: list[FindingData] = []
    built: list[TraceData] = []
    for index, each in enumerate(analysed):
        section = balancing_section(
            each.trace,
            each.result,
            sweep=each.sweep,
            extra_tables=[published(analysed), *extra] if index == 0 else [],
        )
        classes = {metric["name"]: metric["figure_class"] for metric in section["metrics"]}
        section["findings"] = [
            FindingData(
                text=finding.text,
                severity=finding.severity,
                section=finding.section,
                metric=finding.metric,
                figure_class=classes.get(finding.metric or ""),
                trace=each.name,
                anchor=f"{each.name}-{finding.section}",
            )
            for finding in each.result.findings
        ]
        found += section["findings"]
        first = max(each.result.findings, key=lambda finding: finding.severity)
        built.append(
            TraceData(
                id=each.name,
                name=each.name,
                title=each.trace.info.model.name,
                verdict=first.text,
                banners=facts.banners(each.trace),
                facts=facts.run_facts(each.trace),
                sections=[section],
            )
        )
    return Report(
        ReportData(
            moeprof_report=REPORT_VERSION,
            moeprof_version=moeprof.__version__,
            generated=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            title="Load balancing: " + ", ".join(dict.fromkeys(each["title"] for each in built)),
            verdict=" ".join(dict.fromkeys(each["verdict"] for each in built)),
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
    """Writes the pages and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.balancing",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("traces", nargs="*", default=list(DEFAULT_TRACES), metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="OUT")
    parser.add_argument("--devices", type=int, default=DEFAULT_DEVICES, metavar="N")
    parser.add_argument("--counts", type=Path, metavar="CSV")
    options = parser.parse_args(arguments)
    try:
        if options.devices < 1:
            raise UsageError(f"{options.devices} devices hold nothing", hint="give at least one")
        analysed: list[Analysed] = []
        for path in options.traces:
            name = _name(path, [each.name for each in analysed])
            analysed.append(analyse(name, open_trace(path), options.devices))
        extra = count_tables(options.counts, options.devices) if options.counts else []
        options.output.mkdir(parents=True, exist_ok=True)
        for each in analysed:
            each.result.table.to_csv(options.output / f"{each.name}.csv", index=False)
            for table in TABLES:
                target = options.output / f"{each.name}-{table}.csv"
                each.result.tables[table].to_csv(target, index=False)
        report = page(analysed, extra)
        written = [*report.save(options.output / "balancing.md")]
        written += report.save(options.output / "balancing.html")[1:]
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
