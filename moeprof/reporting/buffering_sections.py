"""Expert caches as a section of a report: hits, the worst cache and bytes, against the size.

Everything here is data (`layout`); nothing is formatted or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moeprof.replay.cache.study import BufferingResult
from moeprof.reporting.layout import FigureData, SectionData, TableData
from moeprof.reporting.vocabulary import finite, main_places, records, section_data
from moeprof.trace.reader import Trace

QUESTION = "How many expert slots are enough, under which policy, and what do misses move?"
QUANTITIES = {
    "hit_rate": "Lookups that hit",
    "bytes_moved_per_pass": "Moved per forward pass",
}
POLICIES = {
    "paper": "paper (LIFO, inactive first)",
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "min": "MIN (knows the future)",
}

_STYLES = {"lru": "recorded", "paper": "shuffled", "fifo": "uniform", "lfu": "run",
           "min": "popularity"}  # fmt: skip
_PLACED_STYLES = {"paper": ("recorded", "shuffled"), "min": ("popularity", "uniform")}
_MS_PER_S = 1000
_GB = 10**9


def buffering_section(
    trace: Trace,
    result: BufferingResult,
    *,
    placed: BufferingResult | None = None,
    unplaced: BufferingResult | None = None,
    link_gb_per_s: float | None = None,
    extra_tables: Sequence[TableData] = (),
) -> SectionData:
    """Returns the result of `replay.buffering` as a section; findings are filled in by the report.

    Args:
        trace: The trace.
        result: The result that the section is about.
        placed: Several devices, experts placed to even out their load.
        unplaced: The same devices, experts in the order of their ids; drawn beside ``placed``.
        link_gb_per_s: Speed at which experts are copied, in 10**9 bytes per second: the time this
            takes is drawn in place of the bytes moved.
        extra_tables: Tables that follow those of the result.
    """
    figures = [*_curves(trace, result, link_gb_per_s)]
    if placed is not None and unplaced is not None:
        figures.append(_placements(placed, unplaced))
    return section_data(
        result,
        question=QUESTION,
        label=_label,
        headline=_headline(result),
        figures=figures,
        tables=[_rows_table(result), *extra_tables],
    )


def _label(name: str) -> str:
    _, quantity, policy, capacity = name.split("/", 3)
    return f"{QUANTITIES[quantity]}: {policy}, {capacity}"


def _headline(result: BufferingResult) -> list[str]:
    """Returns hit rates of doing nothing and of the ceiling at the middle size."""
    asked = list(dict.fromkeys(result.table["capacity"]))
    middle = asked[(len(asked) - 1) // 2]
    return [
        metric.name
        for policy in ("lru", "min")
        for metric in result.metrics
        if metric.name.startswith(
            (f"buffering/hit_rate/{policy}/{middle} slot",
             f"buffering/bytes_moved_per_pass/{policy}/{middle} slot")
        )
    ]  # fmt: skip


def _phases(table: pd.DataFrame) -> list[str]:
    """Returns the phases that get a panel: the recorded ones, not their sum."""
    return [phase for phase in dict.fromkeys(table["phase"]) if phase != "all"]


def _curves(trace: Trace, result: BufferingResult, link_gb_per_s: float | None) -> list[FigureData]:
    """Returns hit rates, miss rates of the worst cache and what misses move, against the size."""
    steps = trace.steps.groupby("phase", observed=True).size()
    passes = result.table["phase"].map(steps).astype(float)
    expert_bytes = sum(site.num_experts * site.expert_bytes for site in trace.sites)
    table = result.table.assign(
        slots=result.table["capacity"].astype(int),
        kept=100 * result.table["capacity_bytes"] / max(expert_bytes, 1),
        moved=result.table["bytes_moved"] / passes,
    )
    table["copy_ms"] = _MS_PER_S * table["moved"] / ((link_gb_per_s or 1.0) * _GB)
    caches = _worst(result)
    moved = (
        ("moved", "Bytes moved for the memory kept (the paper's Fig. 13)", table, "kept", "moved",
         False, "bytes", "moved per forward pass", "exact",
         "Lower and further left is better; the time a byte takes is the machine's.")
        if link_gb_per_s is None
        else
        ("moved", f"Copying at {link_gb_per_s:g} GB/s for the memory kept (the paper's Fig. 13)",
         table, "kept", "copy_ms", False, "ms", "copying per forward pass", "estimate",
         f"Lower and further left is better. Bytes of misses at {link_gb_per_s:g} GB/s, none of it "
         f"hidden behind other work; {_step_times(trace)}.")
    )  # fmt: skip
    specs = (
        ("hits", "Lookups that hit", table, "slots", "hit_rate", True, "share",
         "lookups that hit", "exact",
         "Higher is better; MIN knows the future and is the ceiling for equal sizes."),
        ("worst", "Misses of the worst cache (the paper's Fig. 12b)", caches, "slots", "miss_rate",
         False, "share", "lookups that miss", "exact",
         "The cache that misses most at each size; lower is better."),
        moved,
    )  # fmt: skip
    return [
        FigureData(
            id=f"buffering-{name}",
            kind="lines",
            title=title,
            alt=f"{title} against the size of caches, one panel per phase.",
            how_to_read=how,
            figure_class=figure_class,
            collapsed=False,
            panels=[
                {
                    "title": phase,
                    "x_label": "slots per cache" if x == "slots" else "experts kept, % of bytes",
                    "y_label": y_label,
                    "x_scale": "linear",
                    "y_unit": unit,
                    "series": [
                        {
                            "key": style,
                            "label": POLICIES[policy],
                            "points": _points(frame, policy, phase, x, y, bands=bands),
                        }
                        for policy, style in _STYLES.items()
                    ],
                }
                for phase in _phases(result.table)
            ],
        )
        for name, title, frame, x, y, bands, unit, y_label, figure_class, how in specs
    ]


def _step_times(trace: Trace) -> str:
    """Returns what a recorded step of each main phase took, in words."""
    steps = trace.steps
    said = []
    for place in main_places(trace):
        stack, phase = place.split("/")
        own = steps[(steps["stack"] == stack) & (steps["phase"] == phase)]
        column = "device_ms" if own["device_ms"].notna().any() else "wall_ms"
        known = own[column].dropna()
        if len(known):
            said.append(f"{float(known.median()):.3g} ms in {stack} {phase}")
    if not said:
        return "times of the recorded steps are not known"
    return f"the median recorded step took {' and '.join(said)}"


def _worst(result: BufferingResult) -> pd.DataFrame:
    caches = result.per_cache[result.per_cache["worst"]]
    return caches.assign(slots=caches["capacity"].astype(int), miss_rate=1 - caches["hit_rate"])


def _placements(placed: BufferingResult, unplaced: BufferingResult) -> FigureData:
    """Returns misses of the worst cache with and without a placement that evens out load."""
    frames = (("placed", _worst(placed)), ("in order of ids", _worst(unplaced)))
    return FigureData(
        id="buffering-placed",
        kind="lines",
        title="Misses of the worst cache with load balancing (the paper's Fig. 12a)",
        alt="Miss rate of the worst cache of a device against its slots, with experts placed by "
        "anti-correlation and in order of ids, one panel per phase.",
        how_to_read=f"Experts lie on {placed.settings.devices} devices, in order of ids or as "
        "anti-correlation places them; a cache belongs to a layer and device. The placement was "
        "planned on the first half of each domain and is judged on the whole trace, which flatters "
        "it.",
        figure_class="exact",
        collapsed=False,
        panels=[
            {
                "title": phase,
                "x_label": "slots per cache",
                "y_label": "lookups that miss",
                "x_scale": "linear",
                "y_unit": "share",
                "series": [
                    {
                        "key": style,
                        "label": f"{POLICIES[policy]}, {where}",
                        "points": _points(frame, policy, phase, "slots", "miss_rate"),
                    }
                    for policy, styles in _PLACED_STYLES.items()
                    for (where, frame), style in zip(frames, styles, strict=True)
                ],
            }
            for phase in _phases(placed.table)
        ],
    )


def _points(
    frame: pd.DataFrame, policy: str, phase: str, x: str, y: str, *, bands: bool = False
) -> list[list[float | None]]:
    own = frame[(frame["policy"] == policy) & (frame["phase"] == phase)].sort_values(x)
    unknown = pd.Series(np.nan, index=own.index)
    low, high = (own["low"], own["high"]) if bands else (unknown, unknown)
    return [
        [float(at), float(value), finite(below), finite(above)]
        for at, value, below, above in zip(own[x], own[y], low, high, strict=True)
    ]


def _rows_table(result: BufferingResult) -> TableData:
    columns = [
        ["policy", "Policy", "text"],
        ["capacity", "Slots", "count"],
        ["phase", "Phase", "text"],
        ["num_lookups", "Lookups", "count"],
        ["hit_rate", "Hits", "share"],
        ["bytes_moved", "Moved", "bytes"],
        ["bytes_streamed", "Streamed", "bytes"],
        ["misses_compulsory", "First uses", "count"],
        ["misses_capacity", "For lack of room", "count"],
        ["misses_policy", "By the policy", "count"],
    ]
    keys = [key for key, _, _ in columns]
    table = result.table.rename(columns={"low": "hit_rate_low", "high": "hit_rate_high"})
    return TableData(
        title="Every policy, size and phase",
        figure_class="exact",
        columns=columns,
        rows=records(table[[*keys, "hit_rate_low", "hit_rate_high"]]),
    )
