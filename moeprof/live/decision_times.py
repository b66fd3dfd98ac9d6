"""Times what is decided about a dispatch, over made-up routing; on the host alone.

Dispatches in pieces are decided by compiled code where it knows the policy, as the buffer does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.live.calibration_trials import MadeUp
from moeprof.live.core_binding import Unwatched, Watch, undisturbed
from moeprof.replay.buffer_plans import (
    RoutedRows,
    planned_dispatches,
    read_routed_rows,
    residency_of,
)
from moeprof.replay.cache import streams
from moeprof.replay.cache.decisions import HIT, CompiledResidency
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import Residency
from moeprof.replay.calibration_file import DecisionTimes, Measured
from moeprof.replay.least_squares import fit_parts
from moeprof.replay.serving_settings import BufferingSetting

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]

_PLAN_REPEATS = 3
_DECISION_SHARES = (0.125, 0.25, 0.5)
_FORESEEN = BufferingSetting(capacity=0.25, prefetch=2)


def decision_times(
    regimes: Sequence[MadeUp], policy: str, *, streamed: bool, watch: Watch | None = None
) -> DecisionTimes:
    """Times a policy's state machine over made-up routing, and the order of pieces; host alone."""
    found = [
        _decisions(made.trace, policy, share, watch or Unwatched(), streamed=streamed)
        for made in regimes
        for share in _DECISION_SHARES
    ]
    every = np.concatenate([columns for columns, _ in found])
    fit = fit_parts(every, np.concatenate([seconds for _, seconds in found]))
    return DecisionTimes(
        dispatch_s=float(fit.factors[0]),
        hit_s=float(fit.factors[1]),
        miss_s=float(fit.factors[2]),
        slot_s=float(fit.factors[3]),
        error=fit.error / len(every) ** 0.5,
    )


def _decisions(
    trace: Trace, policy: str, share: float, watch: Watch, *, streamed: bool
) -> tuple[Floats, Floats]:
    """Returns what `DecisionTimes` multiplies [dispatches, 4], and the times in seconds."""
    routed = read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    count = np.diff(routed.starts)
    setting = BufferingSetting(capacity=share, policy=policy)
    made = residency_of(trace, routed, setting, rows=rows)

    def timed() -> tuple[list[float], list[int]]:
        fresh = residency_of(trace, routed, setting, rows=rows)
        return _timed(fresh.residency, routed, setting, streamed=streamed)

    runs = [undisturbed(watch, timed) for _ in range(_PLAN_REPEATS)]
    hit = np.array(runs[-1][1], np.float64)
    missed = count - hit
    slots = made.capacity[routed.site]
    columns = np.stack([np.ones_like(hit), hit, missed, missed * slots], axis=1)
    # The same decisions each time: the median of the repetitions is without interruptions.
    return columns, np.median(np.array([times for times, _ in runs]), axis=0)


def _timed(
    residency: Residency | CompiledResidency,
    routed: RoutedRows,
    setting: BufferingSetting,
    *,
    streamed: bool,
) -> tuple[list[float], list[int]]:
    """Returns the times [dispatches] of decisions in seconds, and the hits."""
    times, hits = [], []
    if streamed and isinstance(residency, CompiledResidency):
        for site, chosen in _chosen(routed):
            begun_s = time.perf_counter()
            count = residency.decide(site, chosen, len(chosen))
            times.append(time.perf_counter() - begun_s)
            hits.append(int(residency.decision.columns[HIT, :count].sum()))
        return times, hits
    dispatches = planned_dispatches(residency, routed, setting)
    for _ in range(len(routed.site)):
        begun_s = time.perf_counter()
        planned = next(dispatches)
        if streamed:
            copies_of(planned, pieces_of(planned, streamed=True))
        times.append(time.perf_counter() - begun_s)
        hits.append(sum(one.hit for one in planned))
    return times, hits


def _chosen(routed: RoutedRows) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields the site of each dispatch and what the router may have chosen."""
    starts = routed.starts.tolist()
    for dispatch, index in enumerate(routed.site.tolist()):
        own = slice(starts[dispatch], starts[dispatch + 1])
        chosen = np.repeat(routed.expert[own].astype(np.int64), routed.rows[own])
        yield routed.sites[index].site, chosen


def foresee_time(
    regimes: Sequence[MadeUp], *, streamed: bool, watch: Watch | None = None
) -> Measured:
    """Times what a dispatch teaches, and saying which experts are copied ahead.

    Asking for the copies is not in it: they take as long to ask for as others.
    """
    found = [_foreseen_s(made.trace, watch or Unwatched(), streamed=streamed) for made in regimes]
    return Measured.of(np.concatenate(found).tolist())


def _foreseen_s(trace: Trace, watch: Watch, *, streamed: bool) -> Floats:
    """Returns the times [dispatches] in seconds, medians of repetitions."""
    routed = read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)

    def timed() -> list[float]:
        residency = residency_of(trace, routed, _FORESEEN, rows=rows).residency
        if streamed and isinstance(residency, CompiledResidency):
            return list(_compiled_foreseen_s(residency, routed))
        return list(_planned_foreseen_s(residency, routed))

    runs = [undisturbed(watch, timed) for _ in range(_PLAN_REPEATS)]
    found: Floats = np.median(np.array(runs), axis=0)
    return found


def _compiled_foreseen_s(residency: CompiledResidency, routed: RoutedRows) -> Iterator[float]:
    for site, chosen in _chosen(routed):
        residency.decide(site, chosen, len(chosen))
        begun_s = time.perf_counter()
        residency.foresee(site)
        yield time.perf_counter() - begun_s


def _planned_foreseen_s(
    residency: Residency | CompiledResidency, routed: RoutedRows
) -> Iterator[float]:
    sites = [routed.sites[index].site for index in routed.site.tolist()]
    for site, planned in zip(sites, planned_dispatches(residency, routed, _FORESEEN), strict=True):
        begun_s = time.perf_counter()
        residency.fetch_ahead(site, [step.expert for step in planned])
        yield time.perf_counter() - begun_s
