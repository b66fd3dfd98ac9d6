"""What was measured on a GPU, as a page made only from the results that are kept.

    python -m analysis.live_results [-o OUT] [--results DIR] [--figure FILE]

Reads DIR/*.json (analysis/results: the founding paper's language model whole, gating kernels, live
expert buffering, both routing twins) and writes OUT/live-results.html, .md and .json, the rows
behind it as CSV, its figures as PNG, and the README's table (OUT/readme-table.md). ``--figure
docs/measured.png`` draws the README's figure. Nothing is measured here: each part names the device,
the date and the command that measured it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import command
from analysis.live_drawings import draw_all, draw_headline
from analysis.live_evidence import (
    RESULTS,
    Evidence,
    breakdown_rows,
    buffering_matrix,
    buffering_rows,
    headline_rows,
    held_out_rows,
    kernel_rows,
    read_evidence,
)
from analysis.live_gating_parts import headline_part, kernels_part
from analysis.live_goals import (
    goals,
    readme_table,
)
from analysis.live_routing_parts import buffering_part, routing_rows, twin_part
from moeprof.errors import MoeprofError
from moeprof.reporting.document import assembled
from moeprof.reporting.layout import (
    ReadingData,
    TableData,
)
from moeprof.reporting.writing import Report, refuse_foreign, write_files

NAME = "live-results"


def results_page(evidence: Evidence) -> Report:
    """Returns the page.

    Args:
        evidence: The results.
    """
    parts = [
        headline_part(evidence.headline),
        kernels_part(evidence.kernels),
        buffering_part(evidence.buffering, evidence.checks),
        twin_part(evidence.twin),
        twin_part(evidence.twin_mt, "twin_mt"),
    ]
    reading = ReadingData(
        eyebrow="Measured on a GPU",
        part="Result",
        range="Range",
        ranges="Ranges of times and rates are the quartiles of the repetitions.",
        method=[
            [
                "Ranges",
                "A time is the median of its repetitions and its range their quartiles; a rate or "
                "a share of the floor has the range of its time. Ranges of figures that describe "
                "the twin's routing are 90% intervals over requests. Every repetition is in the "
                "JSON files in analysis/results that this page is made from.",
            ],
            [
                "Shares of the floor",
                "The floor of a layer is max(active expert bytes / copy bandwidth, FLOPs / matrix "
                "rate), both rates measured in the same run. A share slightly above 1 is possible: "
                "the bandwidth is that of a copy, which reads and writes, and a kernel that mostly "
                "reads can exceed it.",
            ],
        ],
    )
    return Report(
        assembled(
            parts,
            title="Measured on a GPU",
            comparison=_goals_table(evidence),
            reading=reading,
        )
    )


def save_page(evidence: Evidence, folder: Path) -> tuple[Path, ...]:
    """Writes the page, its data, rows and figures.

    Args:
        evidence: The results.
        folder: Where; it is made.

    Returns:
        The files: the page's data, Markdown, HTML, the README's table, CSV and PNG files.

    Raises:
        MoeprofError: A file cannot be written, or would replace one that is no report.
    """
    page = results_page(evidence)
    data = folder / f"{NAME}.json"
    texts = {
        data: page.json,
        folder / f"{NAME}.md": page.markdown,
        folder / f"{NAME}.html": page.html,
        folder / "readme-table.md": readme_table(evidence),
    }
    for name, frame in frames(evidence).items():
        texts[folder / f"{name}.csv"] = frame.to_csv(index=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeprofError(
            f"cannot make {folder}: {error.strerror or error}", hint="choose another place with -o"
        ) from error
    refuse_foreign(data)
    return (*write_files(texts), *draw_all(evidence, folder))


def frames(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """Returns the rows that are written as CSV, by file name."""
    return {
        "headline": headline_rows(evidence.headline),
        "breakdown": breakdown_rows(evidence.headline),
        "kernels": kernel_rows(evidence.kernels),
        "buffering": buffering_rows(evidence.buffering),
        "buffering-checks": buffering_matrix(evidence.buffering),
        "buffering-disturbed": buffering_matrix(evidence.checks),
        "twin": held_out_rows(evidence.twin),
        "twin-routing": routing_rows(evidence.twin),
        "twin-mt": held_out_rows(evidence.twin_mt),
        "twin-mt-routing": routing_rows(evidence.twin_mt),
        "goals": pd.DataFrame({**vars(goal), "verdict": goal.verdict} for goal in goals(evidence)),
    }


def _goals_table(evidence: Evidence) -> TableData:
    return TableData(
        title="Goals and what was measured",
        figure_class="measured",
        columns=[
            ["quantity", "Quantity", "text"],
            ["goal", "Goal, or the paper's figure", "text"],
            ["found", "Measured", "text"],
            ["verdict", "Verdict", "text"],
        ],
        rows=[
            {
                "quantity": goal.quantity,
                "goal": goal.goal,
                "found": goal.found,
                "verdict": goal.verdict,
            }
            for goal in goals(evidence)
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.live_results",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("demo", "live"), metavar="OUT")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the README's figure")
    options = parser.parse_args(arguments)

    def write() -> tuple[Path, ...]:
        evidence = read_evidence(options.results)
        written = save_page(evidence, options.output)
        if options.figure is not None:
            draw_headline(evidence, options.figure)
            written = (*written, options.figure)
        return written

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
