"""Load balancing as a section of a report: planners, layers, devices, domains, bytes.

Everything here is data (`layout`); nothing is formatted or drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeprof.replay.planners import NOTHING
from moeprof.replay.result import Result
from moeprof.reporting.layout import FigureData, SectionData, TableData
from moeprof.reporting.vocabulary import Rows, groups, records, section_data
from moeprof.trace.reader import Trace

QUESTION = "Would another placement of experts on devices even out their load?"
QUANTITIES = {
    "max_over_mean": "Fullest device over mean",
    "balancedness": "Mean device over fullest, whole window",
    "gain_over_nothing": "Less on the fullest device than doing nothing",
    "gain_over_eplb": "Less on the fullest device than EPLB",
}
PLANNERS = {
    "contiguous": "in order of ids (nothing done)",
    "random": "random",
    "greedy": "greedy (the paper's)",
    "anticorrelation": "anti-correlation (the paper's)",
    "anticorrelation_relative": "anti-correlation, loads rescaled",
    "eplb": "EPLB",
    "eplb_global": "EPLB, no hierarchy",
    "second_moment": "second moment",
    "peak": "peak",
    "robust": "robust",
}

_CURVES = {"contiguous": "shuffled", "eplb": "popularity", "second_moment": "recorded"}


def balancing_section(
    trace: Trace,
    result: Result,
    *,
    sweep: Sequence[Result] = (),
    extra_tables: Sequence[TableData] = (),
) -> SectionData:
    """Returns the result of `replay.balancing` as a section; findings are filled in by the report.

    Args:
        trace: The trace.
        result: The result that the section is about.
        sweep: Results for several numbers of devices, for the curves; none are drawn without.
        extra_tables: Tables that follow those of the result.
    """
    return section_data(
        result,
        question=QUESTION,
        label=lambda name: _label(name, num_stacks=len(trace.stacks)),
        headline=_headline(trace, result),
        figures=[*_planners(result), *_loads(result), *_layers(result), *_curves(sweep)],
        tables=[*_tables(result), *extra_tables],
    )


def _headline(trace: Trace, result: Result) -> list[str]:
    """Returns doing nothing beside the planner that the verdict on each stack is about."""
    names: list[str] = []
    for stack in trace.info.stacks:
        start = f"balancing/gain_over_nothing/{stack}/"
        judged = [
            finding.metric.removeprefix(start)
            for finding in result.findings
            if finding.metric is not None and finding.metric.startswith(start)
        ]
        names.append(f"balancing/max_over_mean/{stack}/{NOTHING}")
        for planner in dict.fromkeys(judged[:1]):
            names.append(f"balancing/max_over_mean/{stack}/{planner}")
            names.append(f"{start}{planner}")
            names.append(f"balancing/gain_over_eplb/{stack}/{planner}")
    return names


def _label(name: str, *, num_stacks: int) -> str:
    _, quantity, stack, planner = name.split("/")
    place = f"{stack}, " if num_stacks > 1 else ""
    return f"{QUANTITIES[quantity]}: {place}{PLANNERS.get(planner, planner)}"


def _planners(result: Result) -> list[FigureData]:
    """Returns max/mean of every planner, one figure per stack."""
    figures = []
    limits = groups(records(result.tables["ceilings"]), "stack")
    for (stack,), rows in groups(records(result.table), "stack").items():
        meters = [
            {
                "key": "recorded",
                "label": PLANNERS.get(row["planner"], row["planner"]),
                "value": row["mean_max_over_mean"],
                "low": row["low"],
                "high": row["high"],
                "unit": "ratio",
            }
            for row in rows
        ]
        meters += [
            {
                "key": "uniform",
                "label": {"uniform": "uniform routing", "hindsight": "with hindsight",
                          "floor": "floor of any placement"}[row["limit"]],
                "value": row["mean_max_over_mean"],
                "low": None,
                "high": None,
                "unit": "ratio",
            }
            for row in limits.get((stack,), [])
        ]  # fmt: skip
        figures.append(
            FigureData(
                id=f"balancing-planners-{stack}",
                kind="meters",
                title=f"Fullest device over mean device: {stack}",
                alt=f"Max over mean load of a dispatch in the {stack}, one bar per planner.",
                how_to_read="1 is perfect balance. Uniform routing, hindsight and the floor tell "
                "how much could be had at all.",
                figure_class=rows[0]["figure_class"],
                collapsed=False,
                panels=[{"rows": meters}],
            )
        )
    return figures


def _loads(result: Result) -> list[FigureData]:
    """Returns the paper's two measures of every planner, one figure per stack."""
    figures = []
    for (stack,), rows in groups(records(result.table), "stack").items():
        num_devices = rows[0]["num_devices"]
        meters = [
            {
                "key": key,
                "label": f"{PLANNERS.get(row['planner'], row['planner'])}: {name}",
                "value": row[column],
                "low": None if not bounds or row["low"] is None else row["low"] / num_devices,
                "high": None if not bounds or row["high"] is None else row["high"] / num_devices,
                "unit": "share",
            }
            for row in rows
            for key, name, column, bounds in (
                ("recorded", "average", "avg_max_load", True),
                ("shuffled", "largest", "max_load", False),
            )
        ]
        ideal = {"key": "uniform", "label": f"perfect balance (1/{num_devices})",
                 "value": 1 / num_devices, "low": None, "high": None, "unit": "share"}  # fmt: skip
        figures.append(
            FigureData(
                id=f"balancing-loads-{stack}",
                kind="meters",
                title=f"Share of a dispatch on its fullest device: {stack} (the paper's Fig. 14)",
                alt=f"Average and largest share of a dispatch of the {stack} that its fullest "
                "device gets, two bars per planner.",
                how_to_read="Average is the paper's Avg Max Load, a proxy of the slowdown; largest "
                "is its Max Load over all dispatches, a proxy of memory. Shares of a dispatch add "
                "up to 1 over devices.",
                figure_class=rows[0]["figure_class"],
                collapsed=False,
                panels=[{"rows": [*meters, ideal]}],
            )
        )
    return figures


def _layers(result: Result) -> list[FigureData]:
    panels = []
    for (stack,), rows in groups(records(result.tables["sites"]), "stack").items():
        by_planner = groups(rows, "planner")
        shown = {name: by_planner[name,] for name in _CURVES if (name,) in by_planner}
        first = next(iter(shown.values()), [])
        series = [_marks(key, PLANNERS[name], shown[name], "mean_max_over_mean")
                  for name, key in _CURVES.items() if name in shown]  # fmt: skip
        series.append(_marks("uniform", "uniform routing", first, "uniform_max_over_mean"))
        panels.append(
            {
                "title": stack,
                "x_label": "layer",
                "y_label": "fullest device over mean",
                "y_unit": "ratio",
                "categories": [str(row["layer"]) for row in first],
                "series": series,
            }
        )
    return [
        FigureData(
            id="balancing-layers",
            kind="layers",
            title="Fullest device over mean, per layer",
            alt="One mark per MoE layer and planner: mean max over mean load of a dispatch.",
            how_to_read="A layer far above uniform routing is where a placement matters.",
            figure_class=str(result.table["figure_class"].iloc[0]),
            collapsed=False,
            panels=panels,
        )
    ]


def _marks(key: str, label: str, rows: Rows, column: str) -> dict[str, Any]:
    return {
        "key": key,
        "label": label,
        "values": [row[column] for row in rows],
        "low": [],
        "high": [],
    }


def _curves(sweep: Sequence[Result]) -> list[FigureData]:
    """Returns max/mean against the number of devices."""
    rows = [row for result in sweep for row in records(result.table)]
    panels = []
    for (stack,), own in groups(rows, "stack").items():
        series = [
            {
                "key": key,
                "label": PLANNERS[name],
                "points": [
                    [row["num_devices"], row["mean_max_over_mean"], row["low"], row["high"]]
                    for row in own
                    if row["planner"] == name
                ],
            }
            for name, key in _CURVES.items()
        ]
        uniform = [
            [row["num_devices"], row["uniform_max_over_mean"], None, None]
            for row in own
            if row["planner"] == "contiguous"
        ]
        series.append({"key": "uniform", "label": "uniform routing", "points": uniform})
        panels.append(
            {
                "title": stack,
                "x_label": "devices",
                "y_label": "fullest device over mean",
                "x_scale": "log2",
                "y_unit": "ratio",
                "series": [each for each in series if each["points"]],
            }
        )
    return [
        FigureData(
            id="balancing-devices",
            kind="lines",
            title="Fullest device over mean against the number of devices",
            alt="Curves of max over mean load against devices, one panel per stack.",
            how_to_read="The more devices, the fewer experts on each, the less a placement can "
            "even out.",
            figure_class=str(rows[0]["figure_class"]) if rows else "exact",
            collapsed=False,
            panels=panels,
        )
    ]


def _tables(result: Result) -> list[TableData]:
    figure_class = str(result.table["figure_class"].iloc[0])
    stack = ["stack", "Stack", "text"]
    planner = ["planner", "Planner", "text"]
    return [
        TableData(
            title="Planners, judged on what they have not seen",
            figure_class=figure_class,
            columns=[
                stack,
                planner,
                ["mean_max_over_mean", "Fullest over mean", "ratio"],
                ["max_max_over_mean", "Worst dispatch", "ratio"],
                ["avg_max_load", "Avg Max Load (paper)", "share"],
                ["max_load", "Max Load (paper)", "share"],
                ["balancedness", "Balancedness", "ratio"],
                ["gain_over_eplb", "Less than EPLB", "share"],
                ["gain_over_eplb_low", "95 %, from", "share"],
                ["gain_over_eplb_high", "to", "share"],
                ["worst_domain_max_over_mean", "Worst domain of a layer", "ratio"],
                ["devices_per_token", "Devices per token", "number"],
            ],
            rows=records(result.table),
        ),
        TableData(
            title="Limits",
            figure_class=figure_class,
            columns=[
                stack,
                ["limit", "Limit", "text"],
                ["mean_max_over_mean", "Fullest over mean", "ratio"],
                ["gain_over_nothing", "Less than doing nothing", "share"],
                ["meaning", "What it is", "text"],
            ],
            rows=records(result.tables["ceilings"]),
        ),
        TableData(
            title="By size of the dispatch",
            figure_class="",
            columns=[
                stack,
                ["tokens", "Tokens", "text"],
                planner,
                ["num_dispatches", "Dispatches", "count"],
                ["mean_max_over_mean", "Fullest over mean", "ratio"],
                ["uniform_max_over_mean", "Uniform routing", "ratio"],
                ["figure_class", "Class", "class"],
            ],
            rows=[
                row
                for row in records(result.tables["sizes"])
                if row["planner"] in (*_CURVES, "robust")
            ],
        ),
        transfer_table(records(result.tables["transfer"]), "Planned on one domain, judged on all"),
        TableData(
            title="Planned again while traffic goes on",
            figure_class=figure_class,
            columns=[
                stack,
                planner,
                ["num_plans", "Plans", "count"],
                ["mean_max_over_mean", "Fullest over mean", "ratio"],
                ["gain_over_once", "Less than planned once", "share"],
                ["num_experts_moved", "Experts moved", "count"],
                ["bytes_moved", "Their bytes", "bytes"],
                ["bytes_moved_relabelled", "The same, devices renamed", "bytes"],
                ["bytes_per_token", "Moved per token", "bytes"],
            ],
            rows=records(result.tables["replanning"]),
        ),
    ]


def transfer_table(rows: Sequence[Mapping[str, Any]], title: str) -> TableData:
    """Returns placements between domains as a table: one row per planner and planning domain.

    Args:
        rows: Rows of `replay.transfer` or of a result's table ``transfer``.
        title: Its title.
    """
    judges = list(dict.fromkeys(str(row["judged_on"]) for row in rows))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (str(row["planner"]), str(row["planned_on"]))
        line = found.setdefault(key, {"planner": key[0], "planned_on": key[1]})
        line[f"on {row['judged_on']}"] = row["mean_max_over_mean"]
    classes = {str(row["figure_class"]) for row in rows}
    return TableData(
        title=title,
        figure_class="estimate" if "estimate" in classes else "exact",
        columns=[
            ["planner", "Planner", "text"],
            ["planned_on", "Planned on", "text"],
            *([f"on {name}", f"On {name}", "ratio"] for name in judges),
        ],
        rows=list(found.values()),
    )
