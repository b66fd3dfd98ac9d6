"""Replays traces under other placements of experts, beside the founding paper's numbers.

    python -m analysis.balancing [TRACE...] [-o OUT] [--devices N] [--counts CSV]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/balancing.html, .md
and .json) and the tables of the replay (OUT/NAME.csv, OUT/NAME-transfer.csv and more). The page
holds the paper's Fig. 14 on each trace (average and largest maximum load per planner), and a table
of published numbers with what comes out here and why it differs where it does. CSV
holds expert counts per domain (columns domain, layer, expert, count and, where several models are
in it, model): placements are planned on one domain and judged on the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import command
from moeprof.errors import UsageError
from moeprof.replay import balancing, transfer
from moeprof.replay.loads import balancedness
from moeprof.replay.placement import eplb
from moeprof.reporting.balancing_sections import balancing_section, transfer_table
from moeprof.reporting.layout import TableData
from moeprof.reporting.replays import devices_for
from moeprof.reporting.studies import Study, published_table, save_studies
from moeprof.reporting.vocabulary import records

DEFAULT_DEVICES = 8
SWEEP = (2, 4, 8, 16, 32)
SWEEP_PLANNERS = ("contiguous", "eplb", "second_moment")
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


_PRINTED = {
    "contiguous": "both more than 0.6",
    "greedy": "both less than 0.4",
    "anticorrelation": "both less than 0.4",
}
"""Of the paper's language model."""
_SHOWN = (*_PRINTED, "eplb", "second_moment")


def studied(path: str, wanted: int) -> Study:
    """Returns load balancing of a trace for one and for several numbers of devices.

    Args:
        path: The trace.
        wanted: Most devices.
    """
    trace = command.opened(path, "balancing")
    result = balancing(trace, devices_for(trace, wanted))
    sweep = [
        balancing(trace, count, planners=SWEEP_PLANNERS)
        for count in SWEEP
        if all(site.num_experts % count == 0 for site in trace.sites)
    ]
    return Study(
        trace=trace,
        result=result,
        section=balancing_section(trace, result, sweep=sweep),
        frames={"": result.table, **{name: result.tables[name] for name in TABLES}},
    )


def published(studies: Sequence[Study]) -> TableData:
    """Returns published numbers on load balancing beside what comes out here."""
    slots, _, _ = eplb(README_LOAD, num_replicas=16, num_groups=4, num_nodes=2, num_devices=8)
    same = bool((slots == np.array(README_SLOTS)).all())
    image = "differs in kind: the paper prints an image, no values, and its trace was not published"
    not_replayed = "not replayed: balance is not time; it takes a live run"
    rows = [
        ("EPLB README, 2 layers, 16 slots, 8 devices", "32 slots",
         "all equal" if same else "differ", "reproduced, sort made stable"),
        ("Balancedness of [[100, 200], [100, 200]]", "0.75",
         f"{balancedness([[100, 200], [100, 200]]):g}", "devices reduced first, then layers"),
        ("Ideal load of 8 devices", "0.125", f"{1 / 8:g}", "reproduced: 1/8"),
        ("Objective", "sum over devices, largest over experts and batches",
         "sum over experts, largest over devices and batches",
         "differs: as printed the sum is always 1; what is meant is clear from the text"),
        ("Fig. 14: loads of the planners, per task", "image", "bars below",
         f"{image}; the bars here are the same two measures on these traces"),
        ("Shares of a dispatch whose tokens choose two experts", "not said whether they add up to "
         "1 or 2", "add up to 1", "the printed loads below may be twice as large in these units"),
        *(
            (f"Max Load, Avg Max Load: {row['planner']}, {row['stack']} of "
             f"{study.trace.info.model.name}",
             _printed(study, row["planner"]),
             f"{row['max_load']:.3f}, {row['avg_max_load']:.3f}",
             f"{row['num_devices']} devices, another model and other traffic")
            for study in studies
            for row in records(study.result.table)
            if row["planner"] in _SHOWN
        ),
        ("Throughput gain, LM", "up to 10.1 %", "", not_replayed),
        ("Throughput gain, MT encoder", "up to 19.5 %", "", not_replayed),
        ("Throughput gain, MT decoder", "up to 1.9 %", "", not_replayed),
    ]  # fmt: skip
    return published_table("Published numbers on load balancing", rows)


def _printed(study: Study, planner: str) -> str:
    """Returns what the paper prints for a planner and a model of the trace's task."""
    if study.trace.info.model.task != "lm":
        return "not printed"
    return _PRINTED.get(planner, "not printed")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and returns the exit code."""
    parser = command.parser("balancing", __doc__)
    parser.add_argument("--devices", type=int, default=DEFAULT_DEVICES, metavar="N")
    parser.add_argument("--counts", type=Path, metavar="CSV")
    options = parser.parse_args(arguments)

    def write() -> tuple[Path, ...]:
        if options.devices < 1:
            raise UsageError(f"{options.devices} devices hold nothing", hint="give at least one")
        studies = [studied(path, options.devices) for path in options.traces]
        tables = count_tables(options.counts, options.devices) if options.counts else []
        studies[0].section["tables"] += tables
        return save_studies(
            studies,
            published(studies),
            options.output,
            name="balancing",
            subject="Load balancing",
        )

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
