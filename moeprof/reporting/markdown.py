"""A report's data as Markdown: the same order as the page, figures as tables of their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moeprof.replay.result import FIGURE_CLASS_MEANINGS
from moeprof.reporting.layout import (
    FigureData,
    MetricData,
    ReportData,
    SectionData,
    TableData,
    TraceData,
)
from moeprof.reporting.numbers import formatted, interval
from moeprof.reporting.vocabulary import yardstick_of

_MAX_ROWS = 60
_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_[]#|"} | {"<": "&lt;", ">": "&gt;"}
)


def markdown_page(report: ReportData) -> str:
    """Returns the report as Markdown."""
    lines = [f"# {plain(report['title'])}", ""]
    for trace in report["traces"]:
        lines += [plain(trace["verdict"]), ""]
    lines += ["## Findings", ""]
    titles = {trace["id"]: trace["title"] for trace in report["traces"]}
    for number, finding in enumerate(report["findings"], start=1):
        kind = f" *({finding['figure_class']})*" if finding["figure_class"] else ""
        name = f"**{plain(titles[finding['trace']])}:** " if len(titles) > 1 else ""
        lines.append(f"{number}. {name}{plain(finding['text'])}{kind}")
    meanings = "; ".join(f"*{name}* {text}" for name, text in FIGURE_CLASS_MEANINGS.items())
    reading = report["reading"]
    lines += ["", f"{meanings}. {plain(reading['ranges'])}", ""]
    if report["comparison"] is not None:
        heading = plain(report["comparison"]["title"])
        lines += [f"## {heading}", "", *_table(report["comparison"], titled=False)]
    for trace in report["traces"]:
        lines += _trace(trace, reading["range"])
    lines += [
        "---",
        "",
        f"moeprof {report['moeprof_version']}, report format {report['moeprof_report']}, written "
        f"{report['generated']}. The JSON file beside this one holds every number.",
        "",
    ]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return " ".join(str(text).translate(_SPECIAL).split())


def _trace(trace: TraceData, ranged: str) -> list[str]:
    lines = [f"## {plain(trace['title'])}", ""]
    for banner in trace["banners"]:
        lines += [f"> **{plain(banner)}**", ""]
    lines += ["| Run | |", "|---|---|"]
    for fact in trace["facts"]:
        words = "; ".join(plain(line) for line in fact["lines"])
        lines.append(f"| {plain(fact['label'])} | {words} |")
    lines.append("")
    for section in trace["sections"]:
        lines += _section(section, ranged)
    return lines


def _section(section: SectionData, ranged: str) -> list[str]:
    lines = [f"### {plain(section['title'])}", "", f"*{plain(section['question'])}*", ""]
    for finding in section["findings"]:
        lines += [plain(finding["text"]), ""]
    if section["absence"]:
        lines += [plain(section["absence"]), ""]
    metrics = {metric["name"]: metric for metric in section["metrics"]}
    if section["headline"]:
        lines += [f"| | Value | {ranged} | Halves | Class |", "|---|---:|---:|---:|---|"]
        for name in section["headline"]:
            lines.append(_metric_row(metrics[name]))
            against = yardstick_of(name)
            if against is not None and against[0] in metrics:
                lines.append(_metric_row(metrics[against[0]]))
        lines.append("")
    for figure in section["figures"]:
        lines += _figure(figure)
    for table in section["tables"]:
        lines += _table(table)
    lines += [f"- {plain(note)}" for note in section["notes"]]
    return [*lines, ""]


def _metric_row(metric: MetricData) -> str:
    unit = metric["unit"]
    halves = metric["split_half"]
    cells = (
        plain(metric["label"]),
        formatted(metric["value"], unit),
        interval(metric["low"], metric["high"], unit),
        ", ".join(formatted(half, unit) for half in halves) if halves else "",
        metric["figure_class"],
    )
    return f"| {' | '.join(cells)} |"


def _figure(figure: FigureData) -> list[str]:
    """Returns the numbers behind a figure; heat maps only say what the page shows."""
    lines = [f"**{plain(figure['title'])}** *({figure['figure_class']})*", ""]
    rows = _FIGURE_ROWS.get(figure["kind"])
    if rows is None:
        lines += [plain(figure["alt"]), ""]
    else:
        for panel in figure["panels"]:
            words = [panel[name] for name in ("title", "y_label") if panel.get(name)]
            if words:
                lines += [plain(", ".join(words)), ""]
            lines += [*rows(panel), ""]
    return [*lines, f"How to read: {plain(figure['how_to_read'])}", ""]


def _bar_rows(panel: dict[str, Any]) -> list[str]:
    return [
        f"- {plain(row['label'])} ({formatted(row.get('value'), row.get('unit', ''))}): "
        + ", ".join(
            f"{plain(segment['label'])} "
            + (
                formatted(segment["value"], segment["unit"])
                if segment["unit"] == "bytes" or row.get("by_value", False)
                else formatted(segment["share"], "share")
            )
            for segment in row["segments"]
        )
        for row in panel["rows"]
    ]


def _meter_rows(panel: dict[str, Any]) -> list[str]:
    rows = []
    for row in panel["rows"]:
        bounds = interval(row["low"], row["high"], row["unit"])
        value = formatted(row["value"], row["unit"])
        rows.append(f"- {plain(row['label'])}: {value}{f' ({bounds})' if bounds else ''}")
    return rows


def _line_rows(panel: dict[str, Any]) -> list[str]:
    series = [each for each in panel["series"] if each["points"] and not each.get("marks")]
    xs = sorted({point[0] for each in series for point in each["points"]})
    unit = panel["y_unit"]
    if len(xs) > _MAX_ROWS:
        largest = [
            f"{plain(each['label'])} {formatted(max(point[1] for point in each['points']), unit)}"
            for each in series
        ]
        return [f"Largest: {', '.join(largest)}."]
    lookup = [{point[0]: point[1] for point in each["points"]} for each in series]
    cells = [
        [f"{x:g}", *(formatted(known[x], unit) if x in known else "" for known in lookup)]
        for x in xs
    ]
    return _grid([plain(panel["x_label"]), *(plain(each["label"]) for each in series)], cells)


def _layer_rows(panel: dict[str, Any]) -> list[str]:
    cells = [
        [
            plain(name),
            *(
                ""
                if each["values"][index] is None
                else formatted(each["values"][index], panel["y_unit"])
                for each in panel["series"]
            ),
        ]
        for index, name in enumerate(panel["categories"])
    ]
    return _grid(
        [plain(panel["x_label"]), *(plain(each["label"]) for each in panel["series"])],
        cells[:_MAX_ROWS],
    )


_FIGURE_ROWS = {
    "bars": _bar_rows,
    "meters": _meter_rows,
    "lines": _line_rows,
    "layers": _layer_rows,
}


def _table(table: TableData, *, titled: bool = True) -> list[str]:
    kind = f" *({table['figure_class']})*" if table["figure_class"] else ""
    lines = [f"**{plain(table['title'])}**{kind}", ""] if titled else []
    cells = [
        [_cell(row, key, unit) for key, _, unit in table["columns"]]
        for row in table["rows"][:_MAX_ROWS]
    ]
    lines += _grid([plain(heading) for _, heading, _ in table["columns"]], cells)
    left = len(table["rows"]) - _MAX_ROWS
    if left > 0:
        lines += ["", f"{left} more rows are in the JSON file."]
    return [*lines, ""]


def _cell(row: dict[str, Any], key: str, unit: str) -> str:
    unit = row["unit"] if unit == "row" else unit
    value = row.get(key)
    if unit in {"text", "class"}:
        return plain(value or "")
    bounds = interval(row.get(f"{key}_low"), row.get(f"{key}_high"), unit)
    return formatted(value, unit) + (f" ({bounds})" if bounds else "")


def _grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]
