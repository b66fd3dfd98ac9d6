"""One replay on several traces: a page, its data, and the rows of the replay as CSV beside it.

What the analysis modules share. Leaves out which replay it is and what it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moeprof.errors import MoeprofError
from moeprof.replay.result import Result
from moeprof.reporting.document import assembled, described, title_of, trace_ids
from moeprof.reporting.layout import SectionData, TableData
from moeprof.reporting.writing import Report, refuse_foreign, write_files
from moeprof.trace.reader import Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """One trace, replayed.

    Attributes:
        trace: The trace.
        result: The replay.
        section: It as a section.
        verdict: One sentence; the worst finding when empty.
        frames: What is written as CSV: the end of the file's name (may be empty), and the rows.
    """

    trace: Trace
    result: Result
    section: SectionData
    frames: Mapping[str, pd.DataFrame]
    verdict: str = ""


def study_page(studies: Sequence[Study], published: TableData, *, subject: str) -> Report:
    """Returns the page on several traces.

    Args:
        studies: At least one.
        published: Published numbers beside what comes out here.
        subject: What the heading begins with.
    """
    traces = [study.trace for study in studies]
    parts = [
        described(
            study.trace,
            name,
            verdict=study.verdict or _verdict(study),
            sections=[study.section],
            findings=study.result.findings,
        )
        for study, name in zip(studies, trace_ids(traces), strict=True)
    ]
    return Report(assembled(parts, title=f"{subject}: {title_of(traces)}", comparison=published))


def save_studies(
    studies: Sequence[Study], published: TableData, folder: Path, *, name: str, subject: str
) -> tuple[Path, ...]:
    """Writes the page, its data and the rows of every replay.

    Nothing is written before everything is there to be written.

    Args:
        studies: At least one.
        published: Published numbers beside what comes out here.
        folder: Where; it is made.
        name: Name of the page's files without their suffix.
        subject: What the heading begins with.

    Returns:
        The files: the page's data, Markdown, HTML, then the CSV files.

    Raises:
        MoeprofError: A file cannot be written, or would replace one that is no report.
    """
    page = study_page(studies, published, subject=subject)
    data = folder / f"{name}.json"
    texts = {
        data: page.json,
        folder / f"{name}.md": page.markdown,
        folder / f"{name}.html": page.html,
    }
    names = trace_ids([study.trace for study in studies])
    for study, trace in zip(studies, names, strict=True):
        for end, frame in study.frames.items():
            stem = f"{trace}-{end}" if end else trace
            texts[_free(folder, stem, texts)] = frame.to_csv(index=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeprofError(
            f"cannot make {folder}: {error.strerror or error}", hint="choose another place with -o"
        ) from error
    refuse_foreign(data)
    return write_files(texts)


def _free(folder: Path, stem: str, taken: Mapping[Path, str]) -> Path:
    """Returns a name that no other trace's rows have."""
    path, number = folder / f"{stem}.csv", 2
    while path in taken:
        path, number = folder / f"{stem}-{number}.csv", number + 1
    return path


def published_table(title: str, rows: Sequence[tuple[str, str, str, str]]) -> TableData:
    """Returns published numbers beside what comes out here.

    Args:
        title: Its title.
        rows: Quantity, as published, as found here, what is reproduced, what differs and why.
    """
    keys = ("quantity", "published", "found", "verdict")
    headings = ("Quantity", "Published", "Here", "What is reproduced, what differs, why")
    return TableData(
        title=title,
        figure_class="exact",
        columns=[[key, heading, "text"] for key, heading in zip(keys, headings, strict=True)],
        rows=[dict(zip(keys, row, strict=True)) for row in rows],
    )


def _verdict(study: Study) -> str:
    findings = sorted(study.result.findings, key=lambda finding: -finding.severity)
    said = findings[0].text if findings else "nothing could be concluded from this trace."
    return f"{study.trace.info.model.name}: {said}"
