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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from analysis import command
from analysis.live_drawings import draw_all, draw_headline
from analysis.live_evidence import (
    ADDITIONAL_FILES,
    RESULTS,
    Evidence,
    breakdown_rows,
    buffering_matrix,
    buffering_rows,
    headline_rows,
    held_out_rows,
    kernel_rows,
    once_rows,
    read_evidence,
)
from analysis.live_gating_parts import headline_part, kernels_part
from analysis.live_goals import README_HEADINGS, Goal, goals, readme_rows
from analysis.live_mt_parts import MT
from analysis.live_parallel_parts import PARALLEL
from analysis.live_parts import Addition
from analysis.live_prediction_drawings import draw_memory_latency
from analysis.live_prediction_parts import LATENCY, PREDICTIONS
from analysis.live_routing_parts import buffering_part, routing_rows, twin_part
from analysis.live_skew_parts import SKEW
from moeprof.errors import MoeprofError
from moeprof.reporting.document import assembled
from moeprof.reporting.layout import (
    ReadingData,
    TableData,
)
from moeprof.reporting.writing import Report, refuse_foreign, write_files

NAME = "live-results"
SECTION = "## Measured on a GPU"
ADDITIONS: Mapping[str, Addition] = MappingProxyType(
    {
        "skew": SKEW,
        "mt": MT,
        "predictions": PREDICTIONS,
        "latency": LATENCY,
        "parallel": PARALLEL,
    }
)
"""What the page makes of results that may be absent, by name."""


def results_page(evidence: Evidence) -> Report:
    """Returns the page.

    Args:
        evidence: The results.
    """
    parts = [
        headline_part(evidence.headline),
        kernels_part(evidence.kernels),
        buffering_part(evidence.buffering),
        twin_part(evidence.twin),
        twin_part(evidence.twin_mt, "twin_mt"),
        *(each.part(data) for each, data in present(evidence)),
    ]
    reading = ReadingData(
        eyebrow="Measured on a GPU",
        part="Result",
        range="Range",
        ranges="Ranges of times and rates are the quartiles of the repetitions; those of "
        "predictions are stated 90% intervals.",
        method=[
            [
                "Ranges",
                "A time is the median of its repetitions and its range their quartiles; a rate or "
                "a share of the floor has the range of its time. Ranges of figures that describe "
                "the twin's routing are 90% intervals over requests; that of a prediction is the "
                "90% interval stated before the run. Every repetition is in the JSON files in "
                "analysis/results that this page is made from.",
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


def present(evidence: Evidence) -> list[tuple[Addition, Mapping[str, Any]]]:
    """Returns the results that may be absent and are there."""
    return [
        (each, evidence.additions[name])
        for name, each in ADDITIONS.items()
        if name in evidence.additions
    ]


def every_goal(evidence: Evidence) -> list[Goal]:
    """Returns every goal, also of what was not measured."""
    return [
        *goals(evidence),
        *(
            goal
            for name, each in ADDITIONS.items()
            for goal in each.goals(evidence.additions.get(name))
        ),
    ]


def every_readme_row(evidence: Evidence) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the README's table."""
    return [
        *readme_rows(evidence),
        *(row for each, data in present(evidence) for row in each.readme_rows(data)),
    ]


def readme_table(evidence: Evidence) -> str:
    """Returns the README's table as Markdown."""
    lines = [README_HEADINGS, ("---",) * len(README_HEADINGS), *every_readme_row(evidence)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def with_table(text: str, table: str) -> str:
    """Returns a README with the table under `SECTION` replaced.

    Raises:
        MoeprofError: There is no such section, or no table in it.
    """
    before, heading, after = text.partition(f"{SECTION}\n")
    lines = after.split("\n")
    rows = [index for index, line in enumerate(lines) if line.startswith("|")]
    if not heading or not rows:
        raise MoeprofError(f"there is no table under {SECTION!r}")
    end = next(index for index in range(rows[0], len(lines)) if not lines[index].startswith("|"))
    made = [*lines[: rows[0]], *table.rstrip("\n").split("\n"), *lines[end:]]
    return before + heading + "\n".join(made)


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
    drawn = list(draw_all(evidence, folder))
    for each, result in present(evidence):
        for name, draw in each.drawings.items():
            draw(result, folder / name)
            drawn.append(folder / name)
    return (*write_files(texts), *drawn)


def frames(evidence: Evidence) -> dict[str, pd.DataFrame]:
    """Returns the rows that are written as CSV, by file name."""
    once = once_rows(evidence.headline)
    return {
        "headline": headline_rows(evidence.headline),
        **({"headline-once": once} if len(once) else {}),
        "breakdown": breakdown_rows(evidence.headline),
        "kernels": kernel_rows(evidence.kernels),
        "buffering": buffering_rows(evidence.buffering),
        "buffering-checks": buffering_matrix(evidence.buffering),
        "twin": held_out_rows(evidence.twin),
        "twin-routing": routing_rows(evidence.twin),
        "twin-mt": held_out_rows(evidence.twin_mt),
        "twin-mt-routing": routing_rows(evidence.twin_mt),
        "goals": pd.DataFrame(
            {**vars(goal), "verdict": goal.verdict} for goal in every_goal(evidence)
        ),
        **{
            name: rows for each, data in present(evidence) for name, rows in each.rows(data).items()
        },
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
            for goal in every_goal(evidence)
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
    parser.add_argument("--latency-figure", type=Path, metavar="FILE", help="also the second one")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="also replace its table")
    options = parser.parse_args(arguments)

    def write() -> tuple[Path, ...]:
        evidence = read_evidence(options.results)
        written = list(save_page(evidence, options.output))
        if options.figure is not None:
            draw_headline(evidence, options.figure)
            written.append(options.figure)
        if options.latency_figure is not None:
            if "latency" not in evidence.additions:
                raise MoeprofError(
                    f"there is no {options.results / ADDITIONAL_FILES['latency']}",
                    hint="python -m analysis.memory_latency writes it",
                )
            draw_memory_latency(evidence.additions["latency"], options.latency_figure)
            written.append(options.latency_figure)
        if options.readme is not None:
            text = options.readme.read_text(encoding="utf-8")
            written += write_files({options.readme: with_table(text, readme_table(evidence))})
        return tuple(written)

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
