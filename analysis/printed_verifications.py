"""Measurements of which only the table that `moeprof verify` printed was kept, as a file to pool.

    python -m analysis.printed_verifications LOG --command TEXT --date DATE [--beside TEXT] -o OUT

Numbers stay as they were printed: four digits, no single repetition, no time of a step. What a
table says twice has to agree (errors with times, counts with rows), or it is refused. The file says
that it comes from a printed table, and `analysis.prediction_quality` counts such predictions apart.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from analysis import command
from moeprof.errors import MoeprofError
from moeprof.live.verification import NAME
from moeprof.replay.cost_model import PERCENTILES
from moeprof.replay.serving_settings import parse_setting
from moeprof.reporting.writing import write_files

DIGITS = 4
COLUMNS = (
    "setting", "percentile", "predicted_ms", "low_ms", "high_ms", "measured_ms", "measured_spread",
    "error", "inside", "naive_bandwidth_error", "naive_mean_error",
)  # fmt: skip
REMARK = (
    f"Read from the table that moeprof verify printed, {DIGITS} digits each; single repetitions "
    "and times of steps were not kept."
)

_BOOLEANS = {"True": True, "False": False}
_ROUNDING = 2 * 10.0 ** (1 - DIGITS)
"""Share by which a ratio of two printed times may differ from the printed ratio, generously."""
_HINT = "give the whole output of moeprof verify"


def read_printed(text: str) -> dict[str, Any]:
    """Returns what a printed table says: device_name, versions, notes, findings, rows.

    Args:
        text: What ``moeprof verify`` printed.

    Raises:
        MoeprofError: A line is none of such a table, or the table contradicts itself.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    header = next(
        (index for index, line in enumerate(lines) if tuple(line.split()) == COLUMNS), None
    )
    if header is None:
        raise _refused("has no head of the table")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    findings: list[str] = []
    for line in lines[header + 1 :]:
        if line.startswith("  (") and line.endswith(")"):
            notes.append(line[3:-1])
        elif line.startswith("  - "):
            findings.append(line[4:])
        elif notes or findings:
            raise _refused(f"goes on after its notes: {line.strip()!r}")
        else:
            rows.append(_row(line))
    _check_counts(rows, notes, findings)
    return {
        "device_name": _said(r"measured on (.+), predicted for ", notes)[0],
        "versions": _versions(notes),
        "notes": notes,
        "findings": findings,
        "rows": rows,
    }


def _row(line: str) -> dict[str, Any]:
    cells = line.split()
    if len(cells) != len(COLUMNS):
        raise _refused(f"has {len(cells)} cells where {len(COLUMNS)} belong: {line.strip()!r}")
    row: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
    try:
        parse_setting(row["setting"])
        row["percentile"] = int(row["percentile"])
        row["inside"] = _BOOLEANS[row["inside"]]
        for name in set(COLUMNS) - {"setting", "percentile", "inside"}:
            row[name] = float(row[name])
            if not math.isfinite(row[name]):
                raise ValueError(f"{name} is {row[name]}")
    except (KeyError, ValueError, MoeprofError) as error:
        raise _refused(f"cannot be read ({error}): {line.strip()!r}") from None
    if not 0 < row["low_ms"] <= row["predicted_ms"] <= row["high_ms"] or row["measured_ms"] <= 0:
        raise _refused(f"has no interval around its prediction: {line.strip()!r}")
    check_error(row, "error", row["predicted_ms"])
    low, high = row["low_ms"], row["high_ms"]
    at_an_end = any(math.isclose(row["measured_ms"], end, rel_tol=_ROUNDING) for end in (low, high))
    if row["inside"] != (low <= row["measured_ms"] <= high) and not at_an_end:
        raise _refused(f"says inside {row['inside']}, its times say otherwise: {line.strip()!r}")
    return row


def check_error(row: Mapping[str, Any], name: str, said_ms: float) -> None:
    """Refuses a row whose printed error is not what its times say.

    Args:
        row: As `read_printed` has it.
        name: Of the error.
        said_ms: Whose error it is.

    Raises:
        MoeprofError: They differ by more than rounding.
    """
    own = said_ms / row["measured_ms"]
    if not math.isclose(1 + row[name], own, rel_tol=_ROUNDING, abs_tol=10.0**-DIGITS):
        raise _refused(
            f"says {name} {row[name]} of {row['setting']} p{row['percentile']}, its times say "
            f"{own - 1:.4g}"
        )


def _check_counts(
    rows: Sequence[Mapping[str, Any]], notes: Sequence[str], findings: Sequence[str]
) -> None:
    keys = Counter((row["setting"], row["percentile"]) for row in rows)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    wanted = {(name, each) for name in settings for each in PERCENTILES}
    if not rows or set(keys) != wanted or max(keys.values()) > 1:
        raise _refused("has not every percentile of every setting once")
    inside = sum(row["inside"] for row in rows)
    for pattern, lines, counted in (
        (r"(\d+) of \d+ predicted settings run", notes, len(settings)),
        (r"Over (\d+) predictions", findings, len(rows)),
        (r"(\d+) of \d+ measurements lie", findings, inside),
    ):
        said = int(_said(pattern, lines)[0])
        if said != counted:
            said_words = pattern.replace(r"(\d+)", "N").replace(r"\d+", "N")
            raise _refused(f"says {said_words!r} with {said}, it has {counted}")


def _said(pattern: str, lines: Sequence[str]) -> tuple[str, ...]:
    for line in lines:
        found = re.match(pattern, line)
        if found:
            return found.groups()
    raise _refused(f"nowhere says {pattern!r}")


def _versions(notes: Sequence[str]) -> dict[str, str]:
    pairs = [each.rsplit(" ", 1) for each in _said(r"versions: (.+)", notes)[0].split(", ")]
    if any(len(pair) != 2 for pair in pairs):
        raise _refused("has versions that cannot be read")
    return {name: value for name, value in pairs}


def _refused(why: str) -> MoeprofError:
    return MoeprofError(f"the printed table {why}", hint=_HINT)


def verification_of(
    text: str, *, said_command: str, date: str, beside: str | None = None
) -> dict[str, Any]:
    """Returns a file of measurements as `analysis.prediction_quality` reads it.

    Args:
        text: What ``moeprof verify`` printed.
        said_command: That printed it.
        date: When it ended, ISO 8601 with a zone.
        beside: What else ran on the machine.

    Raises:
        MoeprofError: The table is damaged, or the date is none.
    """
    found = read_printed(text)
    try:
        zone = datetime.fromisoformat(date).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise MoeprofError(f"{date} is no date with a zone", hint="as 2026-01-31T12:00:00+00:00")
    return {
        "kind": f"moeprof {NAME}",
        "printed": REMARK,
        "command": said_command,
        "date": date,
        "hardware": {"device": "cuda", "device_name": found["device_name"]},
        "versions": found["versions"],
        **({"beside": beside} if beside else {}),
        "notes": found["notes"],
        "findings": found["findings"],
        "rows": found["rows"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.printed_verifications",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--command", required=True, metavar="TEXT")
    parser.add_argument("--date", required=True)
    parser.add_argument("--beside", metavar="TEXT")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    options = parser.parse_args(arguments)

    def write() -> tuple[Path, ...]:
        try:
            text = options.log.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoeprofError(f"{options.log} cannot be read: {error}", hint=_HINT) from None
        made = verification_of(
            text, said_command=options.command, date=options.date, beside=options.beside
        )
        return write_files({options.output: json.dumps(made, indent=1) + "\n"})

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
