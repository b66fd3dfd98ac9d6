"""Gating as a section of a report: what each capacity would cost and drop, layer by layer.

Everything here is data (`layout`); nothing is formatted or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeprof.replay.result import Result
from moeprof.reporting.layout import FigureData, SectionData, TableData
from moeprof.reporting.vocabulary import (
    Rows,
    groups,
    main_places,
    place_label,
    records,
    section_data,
)
from moeprof.trace.reader import Trace

QUESTION = "What would fixed capacities cost and drop, and what does dynamic gating save?"
QUANTITIES = {
    "waste_factor": "Rows processed per row needed",
    "waste_factor_without_ceiling": "The same without rounding up",
    "dropped_share": "Choices dropped",
    "clipped_share": "Tokens that lose an expert",
    "lost_share": "Tokens that lose all experts of a layer",
    "tile_ratio": "Tile rows, static over dynamic",
    "dynamic_tile_padding": "Tile rows per row, dynamic gating",
}

_HEADLINE = ("waste_factor", "dropped_share", "lost_share", "dynamic_tile_padding")
_NUM_PARTS = 5


def gating_section(
    trace: Trace,
    result: Result,
    *,
    sweep: Result | None = None,
    extra_tables: Sequence[TableData] = (),
) -> SectionData:
    """Returns the result of `replay.gating` as a section; findings are filled in by the report.

    Args:
        trace: The trace.
        result: Of the capacity that the section is about.
        sweep: Of several capacities, for the curves; none are drawn without it.
        extra_tables: Tables that follow those of the result.
    """
    return section_data(
        result,
        question=QUESTION,
        label=lambda name: _label(name, trace),
        headline=[
            metric.name
            for place in main_places(trace)
            for quantity in _HEADLINE
            for metric in result.metrics
            if metric.name.startswith(f"gating/{quantity}/{place}/")
        ],
        figures=[
            *_rows(trace, result),
            *(_curves(trace, sweep) if sweep is not None else ()),
            *_layers(trace, result),
        ],
        tables=[*_tables(result), *extra_tables],
    )


def _label(name: str, trace: Trace) -> str:
    _, quantity, stack, phase, rule = name.split("/", _NUM_PARTS - 1)
    place = "all phases" if phase == "all" else place_label(trace, (stack, phase))
    return f"{QUANTITIES[quantity]}, {place}, {rule.replace('-', ' ')}"


def _rows(trace: Trace, result: Result) -> list[FigureData]:
    """Returns the rows that experts get under static and under dynamic gating, to one scale."""
    places = [tuple(place.split("/")) for place in main_places(trace)]
    by_place = groups(records(result.tables["stacks"]), "stack", "phase")
    found = [(place, row) for place in places for row in by_place.get(place, [])]
    bars: list[dict[str, Any]] = []
    for place, row in found:
        kept = row["num_decisions"] - row["num_dropped"]
        longest = max(row["num_slots"], row["num_decisions"], 1)
        where = place_label(trace, place)
        value = "" if row["value"] is None else f" {row['value']:g}"
        parts = (
            (f"{where}, static gating, {row['rule'].replace('_', ' ')}{value}", row["num_slots"],
             f"rows, {row['num_dropped']:,} choices dropped",
             (("recorded", "rows of tokens", kept),
              ("shuffled", "placeholders", row["num_placeholders"]))),
            (f"{where}, dynamic gating", row["num_decisions"], "rows, nothing dropped",
             (("recorded", "rows of tokens", row["num_decisions"]),)),
        )  # fmt: skip
        bars += [
            {
                "label": label,
                "value": total,
                "unit": "count",
                "value_note": note,
                "segments": [
                    {"key": key, "label": name, "share": count / longest, "value": count,
                     "unit": "count"}
                    for key, name, count in segments
                ],
            }
            for label, total, note, segments in parts
        ]  # fmt: skip
    estimated = any(row["drops_class"] == "estimate" and row["num_dropped"] for _, row in found)
    return [
        FigureData(
            id="gating-rows",
            kind="bars",
            title="What experts are sent, static and dynamic (the paper's Fig. 8)",
            alt="Bars of the rows sent to experts under static and under dynamic gating.",
            how_to_read="Both bars of a pair have one scale. Static gating fills every slot it "
            "reserves, with placeholders where tokens do not; dynamic gating sends the rows of "
            "tokens and no others.",
            figure_class="estimate" if estimated else "exact",
            collapsed=False,
            panels=[{"rows": bars}] if bars else [],
        )
    ]


def _curves(trace: Trace, sweep: Result) -> list[FigureData]:
    """Returns waste and drops against the capacity."""
    by_place = groups(records(sweep.tables["stacks"]), "stack", "phase")
    wanted = {tuple(place.split("/")) for place in main_places(trace)}
    own = {key: rows for key, rows in by_place.items() if key in wanted}
    classes = {row["drops_class"] for rows in own.values() for row in rows}
    drops_class = "estimate" if "estimate" in classes else "exact"
    specs = (
        (
            "waste", "Rows processed for each row needed", "rows per row needed", "number", "exact",
            (("recorded", "waste_factor", "slots rounded up"),
             ("uniform", "waste_factor_without_ceiling", "without rounding")),
            "1 is dynamic gating: what lies above is placeholders, what lies below was dropped.",
        ),
        (
            "drops", "What finds no slot", "share", "share", drops_class,
            (("recorded", "dropped_share", "choices dropped"),
             ("shuffled", "clipped_share", "tokens that lose an expert"),
             ("popularity", "lost_share", "tokens that lose all experts of a layer")),
            "Dynamic gating drops nothing. Beyond the first layer that drops, the routing is that "
            "of a run without drops.",
        ),
    )  # fmt: skip
    return [
        FigureData(
            id=f"gating-{name}",
            kind="lines",
            title=title,
            alt=f"{title} against the capacity, one panel per stack.",
            how_to_read=how,
            figure_class=figure_class,
            collapsed=False,
            panels=[
                {
                    "title": place_label(trace, key),
                    "x_label": "slots per expert, % of tokens",
                    "y_label": y_label,
                    "x_scale": "log2",
                    "y_unit": unit,
                    "series": [
                        {"key": style, "label": label, "points": _points(rows, column)}
                        for style, column, label in series
                    ],
                }
                for key, rows in own.items()
            ],
        )
        for name, title, y_label, unit, figure_class, series, how in specs
    ]


def _points(rows: Rows, column: str) -> list[list[Any]]:
    found = [
        [100 * row["value"], row[column], row[f"{column}_low"], row[f"{column}_high"]]
        for row in rows
        if row[column] is not None
    ]
    return sorted(found, key=lambda point: point[0])


def _layers(trace: Trace, result: Result) -> list[FigureData]:
    """Returns drops per layer, one panel per place."""
    rows = records(result.table)
    if not any(row["num_dropped"] for row in rows):
        return []
    wanted = {tuple(place.split("/")) for place in main_places(trace)}
    panels = []
    for key, rows_of_place in groups(rows, "stack", "phase").items():
        if key not in wanted:
            continue
        first = rows_of_place[0]["value"]
        own = [row for row in rows_of_place if row["value"] == first]
        panels.append(
            {
                "title": place_label(trace, key),
                "x_label": "layer",
                "y_label": "choices dropped",
                "y_unit": "share",
                "categories": [str(row["layer"]) for row in own],
                "series": [
                    {
                        "key": "recorded",
                        "label": "choices dropped",
                        "values": [row["dropped_share"] for row in own],
                        "low": [row["dropped_share_low"] for row in own],
                        "high": [row["dropped_share_high"] for row in own],
                    }
                ],
            }
        )
    return [
        FigureData(
            id="gating-layers",
            kind="layers",
            title="Choices dropped per layer",
            alt="One mark per MoE layer: share of routing choices that find no slot.",
            how_to_read="Layers differ as far as their experts are used unevenly.",
            figure_class="estimate",
            collapsed=False,
            panels=panels,
        )
    ]


def _tables(result: Result) -> list[TableData]:
    stacks = records(result.tables["stacks"])
    resources = [
        ("Rows of expert products", "gemm_rows", "dynamic_gemm_rows", "count"),
        ("The same in whole tiles", "tile_rows", "dynamic_tile_rows", "count"),
        ("Operations of expert products", "flops", "dynamic_flops", "number"),
        ("Operations of mask products", "mask_flops", None, "number"),
        ("Expert calls", "num_expert_calls", "num_dynamic_expert_calls", "count"),
        ("Expert weights read", "weight_bytes", "dynamic_weight_bytes", "bytes"),
        ("Activations dispatched", "dispatched_bytes", "dynamic_dispatched_bytes", "bytes"),
        ("Largest dispatch of a device", "max_dispatched_bytes",
         "max_dynamic_dispatched_bytes", "bytes"),
        ("Largest dispatch masks of a device", "max_mask_bytes", None, "bytes"),
        ("All-to-all traffic", "all_to_all_bytes", "dynamic_all_to_all_bytes", "bytes"),
    ]  # fmt: skip
    tables = [
        TableData(
            title=f"Static against dynamic: {row['stack']} {row['phase']}, {row['rule']} "
            f"{row['value']:g}"
            if row["value"] is not None
            else "Static against dynamic",
            figure_class="exact",
            columns=[
                ["label", "Whole trace", "text"],
                ["static", "Static", "row"],
                ["dynamic", "Dynamic", "row"],
            ],
            rows=[
                {
                    "label": label,
                    "unit": unit,
                    "static": row[static],
                    "dynamic": 0 if dynamic is None else row[dynamic],
                }
                for label, static, dynamic, unit in resources
                if row[static] is not None
            ],
        )
        for row in stacks
        if row["phase"] == "all" or len(stacks) == 1
    ]
    tables.append(
        TableData(
            title="Layers",
            figure_class="",
            columns=[
                ["stack", "Stack", "text"],
                ["layer", "Layer", "count"],
                ["phase", "Phase", "text"],
                ["value", "Capacity", "ratio"],
                ["max_slots_per_expert", "Slots per expert", "count"],
                ["waste_factor", "Rows per row needed", "number"],
                ["dropped_share", "Choices dropped", "share"],
                ["lost_share", "Tokens that lose all", "share"],
                ["drops_class", "Class of drops", "class"],
            ],
            rows=records(result.table),
        )
    )
    return tables
