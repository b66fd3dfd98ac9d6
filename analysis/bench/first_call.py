"""What compiling costs on a new machine: ``python -m analysis.bench.first_call`` (``make bench``).

Runs every replay verb on a sample trace in a process of its own, first with an empty folder for
compiled code, then again. CPU seconds are what compiling takes on one thread, start of Python and
reading included; wall seconds are shorter where two processors share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "analysis" / "results" / "bench_first_call.json"
VERBS = ("gating", "buffering", "balancing")
PACKAGES = ("numba", "llvmlite", "numpy", "pandas", "pyarrow")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Row:
    """One verb: its first call and the next."""

    verb: str
    first_cpu_s: float
    first_wall_s: float
    again_cpu_s: float
    again_wall_s: float


def main(arguments: list[str] | None = None) -> None:
    """Runs the verbs."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--trace", default="sample:lm")
    parser.add_argument("--repeat", type=int, default=3, help="fresh folders; the best one counts")
    options = parser.parse_args(given)
    load = os.getloadavg()
    rows = [row(verb, options.trace, repeat=options.repeat) for verb in VERBS]
    print(f"{'replay':<10} {'first, CPU s':>13} {'wall s':>7} {'again, CPU s':>13} {'wall s':>7}")
    for each in rows:
        print(
            f"{each.verb:<10} {each.first_cpu_s:13.1f} {each.first_wall_s:7.1f}"
            f" {each.again_cpu_s:13.1f} {each.again_wall_s:7.1f}"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(_report(rows, given, options.trace, load), indent=1) + "\n"
    )
    print(f"written to {options.output}")


def row(verb: str, trace: str, *, repeat: int) -> Row:
    """Returns the measurement of a verb: of some fresh starts the one that took least.

    Args:
        verb: A verb of ``moeprof replay``.
        trace: A trace as the command line takes it.
        repeat: Fresh starts.
    """
    first, again = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            first.append(_seconds(verb, trace, folder))
            again.append(_seconds(verb, trace, folder))
    return Row(verb, *min(first), *min(again))


def _seconds(verb: str, trace: str, folder: str) -> tuple[float, float]:
    """Returns CPU and wall seconds of a process that keeps compiled code in ``folder``."""
    # Threads of linear algebra that wait for each other would be counted as work.
    environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1"), "NUMBA_CACHE_DIR": folder}
    before, start = _children_cpu_s(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "moeprof", "replay", verb, trace],
        capture_output=True, check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    return _children_cpu_s() - before, time.perf_counter() - start


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _report(
    rows: list[Row], given: list[str], trace: str, load: tuple[float, float, float]
) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m analysis.bench.first_call", *given]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "trace": trace,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "load": load,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "rows": [dataclasses.asdict(each) for each in rows],
    }


if __name__ == "__main__":
    main()
