"""A report on one or several traces, and how it gets to disk: its data first."""

from __future__ import annotations

import contextlib
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from moeprof.errors import MoeprofError, UsageError
from moeprof.reporting import document
from moeprof.reporting.document import Progress
from moeprof.reporting.layout import SECTIONS, FindingData, ReportData
from moeprof.reporting.markdown import markdown_page
from moeprof.reporting.page import html_page
from moeprof.trace.reader import Trace, open_trace

FORMATS = ("html", "md", "json")

_FRAME_HEIGHT_PX = 900


class Finding:
    """One sentence of a report, with its severity and the section it belongs to.

    Attributes:
        text: The sentence.
        severity: Higher is worse.
        section: Name of the analysis, or ``run``.
        trace: Anchor of the trace it is about.
    """

    def __init__(self, data: FindingData) -> None:
        self.text = data["text"]
        self.severity = data["severity"]
        self.section = data["section"]
        self.trace = data["trace"]

    def __repr__(self) -> str:
        return f"<Finding {self.severity}: {self.text}>"


class Report:
    """What is to be said about traces. Get it from `report`.

    Attributes:
        json_data: Every number of the report, as `layout.ReportData` describes it.
    """

    def __init__(self, json_data: ReportData) -> None:
        self.json_data = json_data

    def __repr__(self) -> str:
        return f"<Report on {self.json_data['title']}: {len(self.findings)} findings>"

    def _repr_html_(self) -> str:
        """Returns the page in a frame, so that a notebook's style and the page's stay apart."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="{html.escape(repr(self))}" '
            f'style="width:100%;height:{_FRAME_HEIGHT_PX}px;border:0"></iframe>'
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings at the top of the page, worst first."""
        return tuple(Finding(data) for data in self.json_data["findings"])

    @cached_property
    def html(self) -> str:
        """The page: self-contained, no network, no script."""
        return html_page(self.json_data)

    @cached_property
    def markdown(self) -> str:
        """The same in Markdown: figures as tables of their numbers."""
        return markdown_page(self.json_data)

    @cached_property
    def json(self) -> str:
        """`json_data` as text."""
        return json.dumps(self.json_data, allow_nan=False, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Writes the report and, before a page, its data beside it.

        All files are written under other names before any is renamed, so a page is whole or absent.

        Args:
            path: Ends in ``.html``, ``.md`` or ``.json``.

        Returns:
            The files written: the data, then the page.

        Raises:
            UsageError: The suffix is none of these.
            MoeprofError: The file cannot be written, or the JSON file beside the page exists and
                is no report.
        """
        target = Path(path)
        kind = target.suffix.removeprefix(".").lower()
        if kind not in FORMATS:
            raise UsageError(
                f"cannot tell the format of {target}",
                hint=f"end the name in {', '.join('.' + name for name in FORMATS)}",
            )
        data = target.with_suffix(".json")
        if kind != "json":
            refuse_foreign(data)
        if kind == "json":
            return write_files({data: self.json})
        return write_files(
            {data: self.json, target: self.html if kind == "html" else self.markdown}
        )


def report(
    traces: Trace | str | os.PathLike[str] | Iterable[Trace | str | os.PathLike[str]],
    *,
    title: str | None = None,
    sections: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Returns a report on each trace: what was recorded, and what replays make of it.

    Sections are latency, memory, activation, locality and batching; then the replays gating,
    buffering and balancing, at settings that each section names. A section that does not apply to a
    trace is one sentence.

    Args:
        traces: A trace, its path, or several of either.
        title: Heading; made from the models' names when None.
        sections: Names of the sections; all when None. `CHARACTERIZATION` leaves out the replays,
            which take most of the time.
        progress: Called with trace, analyses done, analyses in all and the name of the next.

    Raises:
        UsageError: There is no trace, or no such section.
        TraceError: A trace cannot be read.
    """
    chosen = SECTIONS if sections is None else tuple(sections)
    for name in chosen:
        if name not in SECTIONS:
            raise UsageError(f"there is no section {name!r}", hint=f"one of {', '.join(SECTIONS)}")
    if not chosen:
        raise UsageError("there is no section to report", hint=f"one of {', '.join(SECTIONS)}")
    given: Sequence[Trace | str | os.PathLike[str]]
    given = [traces] if isinstance(traces, (Trace, str, os.PathLike)) else list(traces)
    if not given:
        raise UsageError("there is no trace to report on", hint="name at least one")
    opened = [trace if isinstance(trace, Trace) else open_trace(trace) for trace in given]
    data = document.report_data(opened, title=title, sections=chosen, progress=progress)
    return Report(data)


def refuse_foreign(path: Path) -> None:
    """Refuses to replace a JSON file that is no report.

    Raises:
        MoeprofError: It is none.
    """
    if path.exists() and not _is_report(path):
        raise MoeprofError(
            f"{path} exists and is no report",
            hint="the data of a page is written beside it: choose another name",
        )


def _is_report(path: Path) -> bool:
    """Returns True for a file that this module wrote; its first field says so."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(_MARK)) == _MARK


_MARK = '{"moeprof_report":'


def write_files(texts: Mapping[Path, str]) -> tuple[Path, ...]:
    """Writes files and returns their paths.

    All are written under other names before any is renamed: a full disk leaves what was there.

    Args:
        texts: The text of each file.

    Raises:
        MoeprofError: A file cannot be written.
    """
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    path = Path()
    try:
        for path, text in texts.items():
            beside[path].write_text(text, encoding="utf-8")
        for path, temporary in beside.items():
            temporary.replace(path)
    except OSError as error:
        raise MoeprofError(
            f"cannot write {path}: {error.strerror or error}",
            hint="choose another place with -o",
        ) from error
    finally:
        for temporary in beside.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return tuple(texts)
