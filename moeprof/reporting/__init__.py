"""Results as pages: HTML, Markdown and JSON."""

from __future__ import annotations

from moeprof.reporting.writing import Report, report

__all__ = ["Report", "report"]
