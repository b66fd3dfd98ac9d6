"""What an earlier round of predictions came to, so that goals it missed are not forgotten.

    python -m analysis.earlier_predictions OLD [-o OUT]

Reduces a former prediction_quality.json to its counts, errors, coverage, regret and goals, and when
and with which versions it was measured; `analysis.prediction_quality` puts it beside its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from analysis import command
from moeprof.errors import MoeprofError
from moeprof.reporting.writing import write_files

RESULTS = Path(__file__).resolve().parent / "results"
EARLIER = "earlier_predictions.json"
KIND = "moeprof earlier prediction quality"

_OF_KIND = "moeprof prediction quality"
_SOURCE = (
    "verified", "predicted", "trace", "model", "machine", "versions", "calibrated_on", "calibrated",
    "predicted_on", "measured_on", "printed", "beside",
)  # fmt: skip
"""What is kept of a source; ``printed`` where an earlier round had no more than a printed table."""

_KEPT = ("command", "counts", "all", "goals")
_OF_REGRET = ("choices", "median", "worst", "without_future", "by_machine")
_HINT = "give what analysis.prediction_quality wrote"


def reduced(old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a round came to, without its rows.

    Args:
        old: What `analysis.prediction_quality` wrote.

    Raises:
        MoeprofError: It is something else, or damaged.
    """
    if old.get("kind") != _OF_KIND:
        raise MoeprofError("this is no quality of predictions", hint=_HINT)
    try:
        return {
            "kind": KIND,
            **{key: old[key] for key in _KEPT},
            "sources": [
                {key: each[key] for key in _SOURCE if key in each} for each in old["sources"]
            ],
            "groups": [each for each in old["groups"] if each["by"] == "machine"],
            "regret": {key: old["regret"][key] for key in _OF_REGRET if key in old["regret"]},
        }
    except (KeyError, TypeError) as error:
        raise MoeprofError(
            f"the quality of predictions is damaged: {error!r}", hint=_HINT
        ) from None


def read_earlier(path: Path) -> Mapping[str, Any]:
    """Reads what `reduced` gave.

    Raises:
        MoeprofError: It cannot be read, or is something else.
    """
    content = _read(path)
    lacking = [key for key in (*_KEPT, "sources", "groups", "regret") if key not in content]
    if content.get("kind") != KIND or lacking:
        raise MoeprofError(
            f"{path} holds no earlier quality of predictions",
            hint="python -m analysis.earlier_predictions OLD -o FILE",
        )
    return content


def earlier_of(
    earlier: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Returns the earlier round; None where it is the one that stands beside it.

    Args:
        earlier: As `read_earlier` gives it.
        sources: Of the present round.

    Raises:
        MoeprofError: It was not measured before the present one.
    """
    before, now = (
        sorted(datetime.fromisoformat(each["measured_on"]) for each in every)
        for every in (earlier["sources"], sources)
    )
    if before == now:
        return None
    if not before or before[-1] >= now[0]:
        raise MoeprofError(
            f"what is called earlier was measured until {before[-1] if before else 'never'}, the "
            f"present round from {now[0]}",
            hint="leave measurements of the earlier round out of the present one",
        )
    return earlier


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoeprofError(f"{path} cannot be read: {error}", hint=_HINT) from error
    if not isinstance(content, dict):
        raise MoeprofError(f"{path} is no quality of predictions", hint=_HINT)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the reduced copy and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.earlier_predictions",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / EARLIER, metavar="OUT")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)

    def write() -> tuple[Path, ...]:
        said = shlex.join(["python", "-m", "analysis.earlier_predictions", *given])
        made = {**reduced(_read(options.old)), "reduced_by": said}
        return write_files({options.output: json.dumps(made, indent=1) + "\n"})

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
