"""What the parts of the page on GPU measurements are made of: facts of a run, figures, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_float_dtype, is_integer_dtype

from analysis.live_evidence import ADDITIONAL_FILES, FILES
from analysis.live_goals import Goal
from moeprof.live.source_digest import code_digest
from moeprof.replay import wording
from moeprof.replay.result import Finding, Result
from moeprof.reporting.document import Described, with_findings
from moeprof.reporting.layout import (
    FactData,
    FigureData,
    SectionData,
    TableData,
    TraceData,
)
from moeprof.reporting.vocabulary import records, section_data

_LISTED_VERSIONS = ("moeprof", "torch", "transformers", "cuda", "python", "numpy")

_UNITS = (
    ("_ms", "ms"), ("_bytes", "bytes"), ("_share", "share"), ("share", "share"),
    ("hit_rate", "share"), ("link_error", "share"),
)  # fmt: skip

_NUMBERS = ("batch", "num_tokens", "mean_active_experts", "tokens_per_s", "copies", "lookups",
            "capacity", "num_repetitions", "rounding", "num_bytes", "nats_per_token",
            "bits_per_byte", "unigram_bits_per_byte", "allocations_in_steady_state",
            "slots_broken")  # fmt: skip

_COUNTS = ("batch", "num_tokens", "tokens_per_s", "copies", "lookups", "capacity",
           "num_repetitions", "num_bytes", "allocations_in_steady_state",
           "slots_broken", "active_experts")  # fmt: skip
# Columns of neither are shown by what they hold: counts as such, others with three digits.


Draw = Callable[[Mapping[str, Any], Path], None]


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What the page makes of a result of `ADDITIONAL_FILES`.

    Attributes:
        part: The part of the page.
        goals: What the result is held to, given None where there is no result.
        readme_rows: Rows of the README's table.
        rows: What is written as CSV, by file name.
        drawings: What is drawn as PNG, by file name.
    """

    part: Callable[[Mapping[str, Any]], Described]
    goals: Callable[[Mapping[str, Any] | None], list[Goal]]
    readme_rows: Callable[[Mapping[str, Any]], list[tuple[str, str, str, str]]]
    rows: Callable[[Mapping[str, Any]], Mapping[str, pd.DataFrame]]
    drawings: Mapping[str, Draw]


def part(
    name: str,
    data: Mapping[str, Any],
    *,
    title: str,
    verdict: str,
    routing: Sequence[str],
    facts: Mapping[str, str],
    banners: Sequence[str],
    section: SectionData,
    result: Result,
) -> Described:
    """Returns one result as a part of the page, with what has to be known of its measurement."""
    return pooled_part(
        name,
        [data],
        command=data["command"],
        title=title,
        verdict=verdict,
        routing=routing,
        facts=facts,
        banners=banners,
        sections=[section],
        findings=result.findings,
    )


def pooled_part(
    name: str,
    measurements: Sequence[Mapping[str, Any]],
    *,
    command: str,
    title: str,
    verdict: str,
    routing: Sequence[str],
    facts: Mapping[str, str],
    banners: Sequence[str],
    sections: Sequence[SectionData],
    findings: Sequence[Finding],
    figure_class: str = "measured",
) -> Described:
    """Returns what several measurements say together as a part of the page.

    Args:
        name: In `FILES` or `ADDITIONAL_FILES`.
        measurements: Each with hardware, versions and date.
        command: That made the result.
        title: Heading.
        verdict: One sentence.
        routing: Where routing comes from.
        facts: Further facts by label.
        banners: What has to be known first.
        sections: Of the part.
        findings: Of all sections.
        figure_class: Of what the part is about.
    """
    devices, drivers, versions, dates = [], [], [], []
    for each in measurements:
        hardware = each["hardware"]
        memory = hardware.get("device_memory_bytes")
        device = hardware["device_name"] or hardware.get("cpu_name") or "unknown"
        devices.append(f"{device}, {wording.num_bytes(memory)}" if memory else device)
        drivers.append(hardware.get("driver") or "unknown")
        versions.append(
            ", ".join(
                f"{key} {each['versions'][key]}"
                for key in _LISTED_VERSIONS
                if key in each["versions"]
            )
        )
        dates.append(date_said(each["date"]))
    code = code_said(measurements)
    lines = [
        ("Device", _once(devices)),
        ("Driver", _once(drivers)),
        ("Versions", _once(versions)),
        ("Date", _once(dates)),
        *([("Code", code)] if code else []),
        ("Routing source", _once(routing)),
        *((label, [text]) for label, text in facts.items()),
        ("Class", [figure_class]),
        ("Command", [command]),
    ]
    return with_findings(
        TraceData(
            id=name,
            name=FILES.get(name) or ADDITIONAL_FILES[name],
            title=title,
            verdict=verdict,
            banners=list(banners),
            facts=[
                FactData(label=label, lines=[str(line) for line in each if line])
                for label, each in lines
            ],
            sections=list(sections),
        ),
        findings,
    )


_DIGEST_LENGTH = 16
"""Of a digest, what a page shows; results have all of it."""


def code_said(measurements: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns which code was measured, a line each; nothing where no result says so."""
    digests = [each.get("source_sha256") for each in measurements]
    digests += [each["earlier"].get("source_sha256") for each in measurements if "earlier" in each]
    now = code_digest()
    said = _once([
        f"sha256 {str(each)[:_DIGEST_LENGTH]} of the package moeprof, "
        + ("that of this page" if each == now else "not that of this page")
        for each in digests if each
    ])  # fmt: skip
    if said and not all(digests):
        said.append("not recorded by earlier runs")
    return said


def model_said(config: Mapping[str, Any]) -> str:
    """Returns the shape of a model of `moeprof.live.paper_lm`, in words."""
    return (
        f"{config['num_layers']} layers, one in {config['moe_every']} with "
        f"{config['num_experts']} experts, top-{config['top_k']}, d_model {config['d_model']}, "
        f"d_ff {config['d_ff']}, random weights"
    )


def beside_banners(measurements: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what else ran on the machines meanwhile, once each.

    Args:
        measurements: Each with hardware and perhaps ``beside``.
    """
    return _once(
        [
            f"While this was measured on {each['hardware']['device_name']}, {each['beside']}."
            for each in measurements
            if each.get("beside")
        ]
    )


def earlier_banners(data: Mapping[str, Any]) -> list[str]:
    """Returns why some rows are from an earlier run, and from which.

    Args:
        data: Perhaps with ``earlier``.
    """
    if "earlier" not in data:
        return []
    run = data["earlier"]
    return [
        f"Some rows are of {date_said(run['date'])}, on {run['hardware']['device_name']}, torch "
        f"{run['versions']['torch']}: {run['kept']}."
    ]


def date_said(date: object) -> str:
    """Returns a date as people read it."""
    return str(date).replace("T", " ").replace("+00:00", " UTC")


def _once(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def result_section(
    result: Result,
    *,
    question: str,
    labels: Mapping[str, str],
    figures: Sequence[FigureData],
    tables: Sequence[TableData],
    headline: Sequence[str],
) -> SectionData:
    """Returns a result as a section of the page."""
    return section_data(
        result,
        question=question,
        label=labels.__getitem__,
        headline=headline,
        figures=figures,
        tables=tables,
    )


def figure_data(
    name: str, kind: str, title: str, *, alt: str, how: str, panels: list[dict[str, Any]]
) -> FigureData:
    """Returns a figure of measured numbers."""
    return FigureData(
        id=name,
        kind=kind,
        title=title,
        alt=alt,
        how_to_read=how,
        figure_class="measured",
        collapsed=False,
        panels=panels,
    )


def panel(
    title: str, x_label: str, y_label: str, unit: str, series: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns a panel of lines over a logarithmic axis."""
    return {
        "title": title,
        "x_label": x_label,
        "x_scale": "log2",
        "y_label": y_label,
        "y_unit": unit,
        "series": series,
    }


def rows_table(title: str, rows: pd.DataFrame, *, figure_class: str = "measured") -> TableData:
    """Returns rows as a table; columns of ranges stand below what they bound."""
    columns = []
    named = rows.rename(
        columns={
            "low_ms": "median_ms_low", "high_ms": "median_ms_high",
            "p50_low_ms": "p50_ms_low", "p50_high_ms": "p50_ms_high",
        }
    )  # fmt: skip
    for key in named.columns:
        if str(key).endswith(("_low", "_high")) or key == "unit":
            continue
        columns.append([str(key), str(key).replace("_", " "), _unit(str(key), named)])
    table = records(named)
    for row in table:
        for key, value in row.items():
            if isinstance(value, bool):
                row[key] = "yes" if value else "no"
    return TableData(title=title, figure_class=figure_class, columns=columns, rows=table)


def _unit(key: str, rows: pd.DataFrame) -> str:
    if key in {"prefill", "decode", "encode"}:
        return "row"
    if key in _COUNTS:
        return "count"
    for end, unit in _UNITS:
        if key.endswith(end) and key != "num_bytes":
            return unit
    if key in _NUMBERS or is_float_dtype(rows[key]):
        return "number"
    return "count" if is_integer_dtype(rows[key]) else "text"


def repetitions_said(counts: pd.Series[int]) -> str:
    """Returns how many repetitions there are, in words."""
    low, high = int(counts.min()), int(counts.max())
    each = f"{low}" if low == high else f"{low} to {high}"
    return f"{each} of each; medians, ranges are quartiles"
