"""Replays traces against expert caches, beside the founding paper's numbers.

    python -m analysis.buffering [TRACE...] [-o OUT] [--devices N]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/buffering.html, .md
and .json) and every row of the replay (OUT/NAME.csv, OUT/NAME-caches.csv, and for Fig. 12a
OUT/NAME-placed.csv, OUT/NAME-unplaced.csv). The page holds the paper's Fig. 12 on each trace (miss
rate of the worst cache against its size, for LIFO, FIFO and Belady's MIN, with LRU, which the paper
leaves out, beside them; and with experts placed by anti-correlation) and its Fig. 13 (the time that
misses take against the memory kept, at the paper's 12 GB/s); and a table of what the paper (arXiv
2303.06182) publishes on expert buffering, each with what comes out here and why it differs where it
does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import command
from moeprof.errors import MoeprofError, UsageError
from moeprof.replay import balancing, buffering
from moeprof.replay.cache.study import BufferingResult
from moeprof.replay.capacity import PAPER_MT
from moeprof.reporting.buffering_sections import buffering_section
from moeprof.reporting.layout import TableData
from moeprof.reporting.replays import capacities_of, devices_for
from moeprof.reporting.studies import Study, published_table, save_studies
from moeprof.reporting.vocabulary import main_places
from moeprof.trace.reader import Trace

POLICIES = ("paper", "fifo", "lru", "lfu", "min", "bound")
PLACED_POLICIES = ("paper", "min")
PLANNER = "anticorrelation"
LINK_GB_PER_S = 12.0
"""The paper's measured copies from CPU to GPU."""

_GIB = 2**30
_MOST_CAPACITIES = 16
_MOST_DEVICES = 8
_FEWEST_EXPERTS = 4


def studied(path: str, devices: int) -> Study:
    """Returns the replay of a trace at all sizes of its caches.

    Args:
        path: The trace.
        devices: Devices the experts lie on.
    """
    trace = command.opened(path, "buffering")
    sizes = capacities_of(trace, devices, most=_MOST_CAPACITIES)
    result = buffering(trace, policies=POLICIES, capacities=sizes, devices=devices)
    frames = {"": result.table, "caches": result.per_cache}
    placed, unplaced, reason = _placed(trace, devices)
    if placed is not None and unplaced is not None:
        frames |= {"placed": placed.per_cache, "unplaced": unplaced.per_cache}
    section = buffering_section(
        trace, result, placed=placed, unplaced=unplaced, link_gb_per_s=LINK_GB_PER_S
    )
    if reason:
        section["notes"].append(f"Fig. 12a is not drawn: {reason}.")
    return Study(trace=trace, result=result, section=section, frames=frames)


def _placed(
    trace: Trace, devices: int
) -> tuple[BufferingResult | None, BufferingResult | None, str]:
    """Returns caches of devices whose load was evened out, and of the same in order of ids.

    Last comes why there are none; nothing where there are.
    """
    fewest = min(site.num_experts for site in trace.sites)
    wanted = devices if devices > 1 else min(_MOST_DEVICES, fewest // _FEWEST_EXPERTS)
    count = devices_for(trace, max(wanted, 1))
    if count == 1:
        return None, None, "the experts cannot be dealt evenly to devices, several to each"
    try:
        frame = balancing(trace, count, planners=[PLANNER]).tables["placements"]
    except MoeprofError as error:
        return None, None, error.message
    chosen = frame[frame["planner"] == PLANNER].sort_values(["site", "expert"])
    placement = {
        site.site: chosen.loc[chosen["site"] == site.site, "device"].to_list()
        for site in trace.sites
    }
    sizes = capacities_of(trace, count, most=_MOST_CAPACITIES)
    placed, unplaced = (
        buffering(trace, policies=PLACED_POLICIES, capacities=sizes, devices=count, placement=each)
        for each in (placement, None)
    )
    return placed, unplaced, ""


def published(studies: Sequence[Study]) -> TableData:
    """Returns the paper's numbers on expert buffering beside what comes out here."""
    whole = PAPER_MT.device_bytes(devices=8)
    one, ten = (PAPER_MT.device_bytes(devices=8, cache_slots=slots) for slots in (1, 10))
    copy_ms = 1000 * PAPER_MT.sites[0].expert_bytes / (LINK_GB_PER_S * 1e9)
    shapes = "reproduced from shapes"
    image = "differs in kind: the paper prints an image, no values, and its trace was not published"
    other = "another model and other traffic; the paper says so of its translation decoder"
    live = "not replayed: it takes a live run"
    rows = [
        ("Freed by a cache of 10 of 16 experts", "2.25 GB", f"{(whole - ten) / _GIB:.3f} GiB",
         f"{shapes}; GB there means GiB"),
        ("Freed by a cache of 1 of 16 experts", "32.2 %", f"{100 * (whole - one) / whole:.1f} %",
         shapes),
        ("Memory ratio, smallest cache", "1.47", f"{whole / one:.3f}",
         f"{shapes}; the headline is a cache of one expert"),
        ("Memory ratio at the cache size whose throughput is printed", "not printed",
         f"{whole / ten:.3f}", "10 experts per device and layer"),
        ("Copy of one expert of its translation model at 12 GB/s", "not printed",
         f"{copy_ms:.2f} ms", "from shapes; its decoder takes 90 ms for 6 MoE layers"),
        ("Fig. 12: miss rate against cache size", "image", "curves below",
         f"{image}; the curves here are the same policies on these traces"),
        *((f"Fig. 12b: LIFO misses less than FIFO, worst cache, {_name(study)}", "LIFO below FIFO",
           _fewer(study), other) for study in studies),
        *((f"Fig. 12a: LIFO above MIN, experts placed by anti-correlation, {_name(study)}",
           "very close", _gap(study), f"largest difference over sizes; {other}")
          for study in studies),
        ("Fig. 13: latency against memory", "image", "curves below",
         f"{image}; here the time of the copies alone, none of it hidden, at the paper's 12 GB/s"),
        ("Throughput at 10 experts over static gating, 2 and 4 nodes", "2.21, 4.30 times", "",
         live),
    ]  # fmt: skip
    return published_table("The founding paper's numbers on expert buffering", rows)


def _name(study: Study) -> str:
    return study.trace.info.model.name


def _misses(caches: pd.DataFrame, trace: Trace) -> pd.DataFrame:
    """Returns the miss rate of the worst cache, [sizes, policies], in the decoder's main phase."""
    phase = main_places(trace)[-1].split("/")[1]
    own = caches[caches["worst"] & (caches["phase"] == phase)]
    return 1 - own.pivot_table(index="capacity", columns="policy", values="hit_rate")


def _fewer(study: Study) -> str:
    """Returns at how many sizes LIFO misses less, in words; sizes that hold all are left out."""
    misses = _misses(study.frames["caches"], study.trace)
    lifo, fifo = misses["paper"].to_numpy(), misses["fifo"].to_numpy()
    differ = ~np.isclose(lifo, fifo)
    return f"at {int((lifo < fifo)[differ].sum())} of {int(differ.sum())} sizes where they differ"


def _gap(study: Study) -> str:
    """Returns how far LIFO lies above MIN with experts placed, in words."""
    if "placed" not in study.frames:
        return "not drawn"
    gaps = []
    for name in ("placed", "unplaced"):
        misses = _misses(study.frames[name], study.trace)
        gaps.append(100 * float((misses["paper"] - misses["min"]).max()))
    return f"{gaps[0]:.1f} points (in order of ids: {gaps[1]:.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and returns the exit code."""
    parser = command.parser("buffering", __doc__)
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="devices the experts lie on"
    )
    options = parser.parse_args(arguments)

    def write() -> tuple[Path, ...]:
        if options.devices < 1:
            raise UsageError(f"{options.devices} devices hold nothing", hint="give at least one")
        studies = [studied(path, options.devices) for path in options.traces]
        return save_studies(
            studies,
            published(studies),
            options.output,
            name="buffering",
            subject="Expert buffering",
        )

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
