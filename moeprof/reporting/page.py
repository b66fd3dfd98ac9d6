"""A report's data as one self-contained HTML page: no network, no script, both colour schemes."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from moeprof.replay.result import (
    FIGURE_CLASS_MEANINGS,
    SEVERITY_COST,
    SEVERITY_FACT,
    SEVERITY_INVALID,
    SEVERITY_WARNING,
)
from moeprof.reporting.layout import ReportData, SectionData, TraceData
from moeprof.reporting.numbers import formatted, interval
from moeprof.reporting.plots import drawn
from moeprof.reporting.vocabulary import yardstick_of

_BAND = 10
_MAX_TILE_COLUMNS = 4
_MIN_TILE_COLUMNS = 2
_PLOTS = ("lines", "layers")
_FIRST_NUMBER = re.compile(
    r"\d[\d,.]*(?:%| (?:[KMGT]i)?B\b| ms\b| points\b)(?: \(-?\d[\d.,]*%? to [^)]*\))?"
)


def html_page(report: ReportData) -> str:
    """Returns the page."""
    view = {**report, "traces": [_trace_view(trace) for trace in report["traces"]]}
    return _template().render(
        report=view,
        style=Markup(_asset("style.css")),
        meanings=FIGURE_CLASS_MEANINGS,
        titles={trace["id"]: trace["title"] for trace in report["traces"]},
        section_titles={
            section["name"]: section["title"]
            for trace in report["traces"]
            for section in trace["sections"]
        },
        formatted=formatted,
        interval=interval,
        drawn=drawn,
        emphasized=emphasized,
        severity_name=severity_name,
    )


def emphasized(text: str) -> Markup:
    """Returns a sentence, escaped, with its first number set off."""
    found = _FIRST_NUMBER.search(text)
    if found is None:
        return escape(text)
    return (
        escape(text[: found.start()])
        + Markup("<strong>{}</strong>").format(found.group())
        + escape(text[found.end() :])
    )


def severity_name(severity: int) -> str:
    """Returns the style class of a finding."""
    for name, anchor in (
        ("invalid", SEVERITY_INVALID),
        ("warning", SEVERITY_WARNING),
        ("cost", SEVERITY_COST),
        ("fact", SEVERITY_FACT),
    ):
        if severity > anchor - _BAND:
            return name
    return "note"


def _trace_view(trace: TraceData) -> dict[str, Any]:
    return {
        **trace,
        "sections": [_section_view(trace, section) for section in trace["sections"]],
    }


def _section_view(trace: TraceData, section: SectionData) -> dict[str, Any]:
    metrics = {metric["name"]: metric for metric in section["metrics"]}
    tiles = []
    for name in section["headline"]:
        metric = metrics[name]
        bounds = interval(metric["low"], metric["high"], metric["unit"])
        fixed = metric["name"].startswith("memory/")
        tile: dict[str, Any] = {
            **metric, "range": bounds or ("" if fixed else "no interval"), "yardstick": "",
        }  # fmt: skip
        against = yardstick_of(name)
        if against is not None and against[0] in metrics:
            other = metrics[against[0]]
            tile["yardstick"] = f"{against[1]}: {formatted(other['value'], other['unit'])}"
        tiles.append(tile)
    anchor = f"{trace['id']}-{section['name']}"
    figures: list[dict[str, Any]] = [
        {**figure, "anchor": f"{anchor}-{figure['id']}", "width": "full"}
        for figure in section["figures"]
    ]
    small = [
        figure
        for figure in figures
        if figure["kind"] in _PLOTS and len(figure["panels"]) == 1 and not figure["collapsed"]
    ]
    for figure in small:
        figure["width"] = "half"
    if len(small) % 2:
        small[-1]["width"] = "single"
    columns = min(len(tiles), _MAX_TILE_COLUMNS)
    while columns > _MIN_TILE_COLUMNS and len(tiles) % columns:
        columns -= 1
    return {**section, "tiles": tiles, "tile_columns": columns, "figures": figures}


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(_asset("page.html.jinja"))


@functools.cache
def _asset(name: str) -> str:
    return resources.files("moeprof.reporting").joinpath("templates", name).read_text("utf-8")
