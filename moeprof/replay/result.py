"""What every analysis returns: a table, metrics with class and interval, findings in sentences."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

FigureClass = Literal["exact", "estimate", "measured"]
FIGURE_CLASSES: tuple[FigureClass, ...] = ("exact", "estimate", "measured")
FIGURE_CLASS_MEANINGS: Mapping[FigureClass, str] = types.MappingProxyType(
    {
        "exact": "follows from this trace by arithmetic",
        "estimate": "rests on a model or on routing that would have changed",
        "measured": "was read on the device named",
    }
)

SEVERITY_INVALID = 100
"""The trace does not show what it seems to show."""
SEVERITY_WARNING = 80
"""A reader who overlooks it draws a wrong conclusion."""
SEVERITY_COST = 60
"""Time or memory that could be saved."""
SEVERITY_FACT = 40
"""Worth knowing."""
SEVERITY_NOTE = 20
"""For completeness."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number with its class and interval.

    Attributes:
        name: Path, unique within a report: ``analysis/quantity/stack/phase``.
        value: None where it could not be seen.
        unit: ``share``, ``points`` (a difference of shares, as a share), ``bytes``, ``ms``,
            ``tokens/s``, ``dispatches`` or ``ratio``.
        figure_class: What kind of knowledge the number is.
        low: 5th percentile of 200 draws of requests (or blocks); None without an interval.
        high: 95th percentile.
        split_half: The same number from either half of the requests.
        better: Which direction is an improvement; None where neither is.
        note: One line a reader needs to read it correctly.
    """

    name: str
    value: float | None
    unit: str
    figure_class: FigureClass
    low: float | None = None
    high: float | None = None
    split_half: tuple[float, float] | None = None
    better: Literal["lower", "higher"] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence worth acting on.

    Attributes:
        text: Plain sentence with its number, interval and meaning.
        severity: Sort key, worst first (the ``SEVERITY_*`` constants are its anchors).
        section: Name of the result that it belongs to.
        metric: Name of the metric it quotes.
    """

    text: str
    severity: int
    section: str
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer of one analysis.

    Attributes:
        name: The analysis.
        title: Its question or subject, for a heading.
        table: The main table, one row per thing compared.
        metrics: Headline numbers.
        findings: Sentences, worst first.
        tables: Further data, by name (what figures are drawn from).
        notes: What a reader has to know about coverage and definitions.
    """

    name: str
    title: str
    table: pd.DataFrame
    metrics: tuple[Metric, ...] = ()
    findings: tuple[Finding, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metric(self, name: str) -> Metric:
        """Returns the metric called ``name``; KeyError when there is none."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)
