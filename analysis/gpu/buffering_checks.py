"""Keeps of a buffered run what other work on the machine cannot change: checks, counts, memory.

Every time is left out, and how far copies hid behind kernels.

    python -m analysis.gpu.buffering_checks DIR/buffering_live.json OUT.json --beside TEXT

TEXT says what else ran. Without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.gpu.evidence import write_json

_TIMES = frozenset({"build_s", "wait_s", "copies_overlapped_by_kernels"})
_TIME_ENDS = ("_ms", "_ms_per_dispatch")


def without_times(value: Any) -> Any:
    """Returns a result without the fields that hold times, at every depth."""
    if isinstance(value, Mapping):
        return {
            key: without_times(held)
            for key, held in value.items()
            if key not in _TIMES and not key.endswith(_TIME_ENDS)
        }
    if isinstance(value, list):
        return [without_times(held) for held in value]
    return value


def kept(study: Mapping[str, Any], beside: str) -> dict[str, Any]:
    """Returns a study without times; of repetitions how many there were and what each counted.

    Args:
        study: As `analysis/gpu/buffering_live.py` wrote it.
        beside: What else ran on the machine.
    """
    found: dict[str, Any] = {**without_times(study), "beside": beside, "times": "left out"}
    # What ran beside is said once, as it is known after the run.
    found["command"] = re.sub(r" --beside ('[^']*'|\S+)", "", found["command"])
    for row in (found["unbuffered"], *found["settings"]):
        repetitions = row.pop("repetitions")
        row["num_repetitions"] = len(repetitions)
        row["counts"] = [each["counts"] for each in repetitions]
        row["link_bytes"] = [each["link_bytes"] for each in repetitions]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a run and writes what is kept of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--beside", required=True, metavar="TEXT")
    options = parser.parse_args(arguments)
    studies = json.loads(options.run.read_text(encoding="utf-8"))["studies"]
    write_json(
        options.out,
        {"studies": {name: kept(study, options.beside) for name, study in studies.items()}},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
