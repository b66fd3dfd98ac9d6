"""Results as pages: HTML, Markdown and JSON."""

from __future__ import annotations

from moeprof.reporting.layout import CHARACTERIZATION, REPLAYS, SECTIONS
from moeprof.reporting.writing import Report, report

__all__ = ["CHARACTERIZATION", "REPLAYS", "SECTIONS", "Report", "report"]
