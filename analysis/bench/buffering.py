"""How fast the buffering replay is: ``python -m analysis.bench.buffering`` (``make bench``).

Prints a table and writes it as JSON. CPU seconds of one thread unless said otherwise; a shared
machine makes everything slower, ratios less so. libcachesim (GPL-3, an optional extra of the
tests) is the yardstick where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from analysis.bench import generator
from moeprof import replay
from moeprof.replay.cache import curves, flat, scan
from moeprof.replay.cache.streams import read_rows, streams
from moeprof.trace.reader import open_trace

RESULT = Path(__file__).parents[1] / "results" / "bench_buffering.json"
CAPACITY = generator.NUM_KEYS // 4
USER_POLICIES = ("paper", "fifo", "lru", "lfu", "s3fifo", "arc", "random", "min")
USER_CAPACITIES = tuple(range(2, 129, 2))
THEIRS = {
    "lru": ("LRU", 5), "fifo": ("FIFO", 15), "lfu": ("LFU", 7), "s3fifo": ("S3FIFO", 6),
    "arc": ("ARC", 3.5), "min": ("Belady", 4),
}  # fmt: skip
CURVE_GOALS = {"lru": 1.1, "min": 5.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement against its goal."""

    what: str
    value: float
    unit: str
    goal: str
    met: bool
    detail: dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    parser.add_argument("--requests", type=int, default=20_000_000, help="per flat stream")
    parser.add_argument("--decisions", type=int, default=10_000_000, help="of the user's trace")
    parser.add_argument("--long", type=int, default=100_000_000, help="decisions of the long trace")
    parser.add_argument("--repeat", type=int, default=2, help="take the best of so many runs")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.scan:
        _scan(options.scan)
        return
    rows: list[Row] = []
    for row in _rows(options):
        rows.append(row)
        print(f"{row.what:<58} {row.value:>9.2f} {row.unit:<10} goal {row.goal:<9} "
              f"{'met' if row.met else 'NOT MET'}", flush=True)  # fmt: skip
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "load": os.getloadavg(),
            "python": platform.python_version(),
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.output}")


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    yield from _flat_rows(options)
    with tempfile.TemporaryDirectory() as folder:
        yield from _user_rows(Path(folder), options)
        yield from _long_rows(Path(folder), options)


def _cpu_s(run: Callable[[], Any], repeat: int) -> float:
    """Returns the CPU seconds of the best of some runs."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def _flat_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Compares single sizes and whole curves with libcachesim, stream by stream."""
    try:
        import libcachesim
    except ImportError:
        print("libcachesim is not installed: no comparison (pip install 'moeprof[parity]')")
        return
    ours: dict[str, dict[str, float]] = {name: {} for name in THEIRS}
    theirs: dict[str, dict[str, float]] = {name: {} for name in THEIRS}
    whole: dict[str, dict[str, float]] = {name: {} for name in CURVE_GOALS}
    num_keys = generator.NUM_KEYS
    for stream in generator.FLAT_NAMES:
        key = generator.flat_keys(stream, options.requests)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.oracleGeneral")
            _oracle_file(key, path)
            reader = libcachesim.TraceReader(
                str(path),
                libcachesim.TraceType.ORACLE_GENERAL_TRACE,
                libcachesim.ReaderInitParam(ignore_obj_size=True),
            )
            for policy, (name, _) in THEIRS.items():
                flat.num_misses(policy, key[:1000], num_keys=num_keys, capacity=CAPACITY)
                found = []

                def run_ours(policy: str = policy, key: Any = key, found: Any = found) -> None:
                    found.append(flat.num_misses(policy, key, num_keys=num_keys, capacity=CAPACITY))

                def run_theirs(name: str = name, reader: Any = reader, found: Any = found) -> None:
                    reader.reset()
                    cache = getattr(libcachesim, name)(cache_size=CAPACITY, hashpower=16)
                    ratio, _ = cache.process_trace(reader, start_req=0, max_req=-1)
                    found.append(round(ratio * options.requests))

                theirs[policy][stream] = _cpu_s(run_theirs, options.repeat)
                ours[policy][stream] = _cpu_s(run_ours, options.repeat)
                assert len(set(found)) == 1, f"{policy} on {stream}: {set(found)} misses"
        for policy in CURVE_GOALS:
            flat.misses_at_all_capacities(policy, key[:1000], num_keys=num_keys)
            whole[policy][stream] = _cpu_s(
                lambda policy=policy, key=key: flat.misses_at_all_capacities(
                    policy, key, num_keys=num_keys
                ),
                options.repeat,
            )
    million = options.requests / 1e6
    for policy, (name, goal) in THEIRS.items():
        ratios = {each: theirs[policy][each] / ours[policy][each] for each in ours[policy]}
        value = statistics.median(ratios.values())
        speed = {each: million / second for each, second in ours[policy].items()}
        yield Row(f"{policy} against libcachesim {name}, one size", value, "x", f">= {goal}",
                  value >= goal, {"ratios": ratios, "million_per_s": speed})  # fmt: skip
    for policy, goal in CURVE_GOALS.items():
        runs = {each: whole[policy][each] / theirs[policy][each] for each in whole[policy]}
        value = statistics.median(runs.values())
        speed = {each: million / second for each, second in whole[policy].items()}
        yield Row(f"{policy} curve of {num_keys} sizes, in libcachesim runs", value, "runs",
                  f"<= {goal}", value <= goal,
                  {"runs": runs, "million_per_s": speed})  # fmt: skip


def _user_rows(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Times what people wait for: the whole table of one study."""
    path = folder / "user.moeprof"
    trace = generator.routing_trace(path, num_decisions=options.decisions, prompt_tokens=128)
    replay.buffering(trace, policies=USER_POLICIES, capacities=[2])
    wall, cpu = time.perf_counter(), time.process_time()
    result = replay.buffering(open_trace(path), policies=USER_POLICIES, capacities=USER_CAPACITIES)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    yield Row(
        f"study of {options.decisions / 1e6:.0f} M decisions, 8 policies, 64 capacities",
        wall, "s", "<= 60", wall <= 60,
        {"cpu_s": cpu, "rows": len(result.table),
         "lookups": int(result.table["num_lookups"].max())},
    )  # fmt: skip
    each = list(streams(read_rows(trace), scope="layer"))
    hit = [np.empty(one.num_lookups, np.int32) for one in each]
    curves.lru_batch(each[0].offset, each[0].key, each[0].last, each[0].num_keys, hit[0])
    curves.lru_flat(each[0].key, each[0].num_keys, hit[0])
    together = _cpu_s(
        lambda: [
            curves.lru_batch(one.offset, one.key, one.last, one.num_keys, own)
            for one, own in zip(each, hit, strict=True)
        ],
        3 * options.repeat,
    )
    alone = _cpu_s(
        lambda: [
            curves.lru_flat(one.key, one.num_keys, own) for one, own in zip(each, hit, strict=True)
        ],
        3 * options.repeat,
    )
    value = together / alone
    yield Row("lru curve under batch, against one by one", value, "x", "<= 1.5", value <= 1.5,
              {"batch_s": together, "flat_s": alone})  # fmt: skip


def _long_rows(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Times a long trace, from Parquet to its lru curve, in a process of its own."""
    path = folder / "long.moeprof"
    generator.routing_trace(
        path, num_decisions=options.long, num_sites=24, num_experts=512, top_k=10, num_requests=8,
        batch=8, with_prefill=False, repeats=10,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "analysis.bench.buffering", "--scan", str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = json.loads(done.stdout)
    name = f"lru curve of {options.long / 1e6:.0f} M decisions from Parquet"
    yield Row(name, found["cpu_s"], "CPU s", "<= 6", found["cpu_s"] <= 6, found)
    yield Row(f"{name}: memory", found["peak_gb"], "GB", "<= 1.5", found["peak_gb"] <= 1.5, {})


def _scan(path: Path) -> None:
    """Prints the time and peak memory of one streamed curve."""
    trace = open_trace(path)
    small = np.zeros(1, np.int32)
    flat.misses_from_reach(small, 1)
    wall, cpu = time.perf_counter(), time.process_time()
    curve = scan.lru_curve(trace)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _peak_kib() * 1024 / 1e9
    lookups = int(curve.drop_duplicates("site")["num_lookups"].sum())
    print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_gb": peak, "lookups": lookups}))


def _peak_kib() -> int:
    """Returns the most memory this program has held.

    The kernel's own counter goes through fork and exec, so it may be that of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _oracle_file(key: np.ndarray, path: Path) -> None:
    """Writes keys as libcachesim's oracleGeneral."""
    rows = np.zeros(
        len(key), np.dtype([("t", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    )
    rows["id"] = key
    rows["size"] = 1
    upcoming = np.empty(len(key), np.int32)
    flat.fill_next_use(key, generator.NUM_KEYS, upcoming)
    rows["next"] = np.where(upcoming < len(key), upcoming, -1)
    rows.tofile(path)


if __name__ == "__main__":
    main()
