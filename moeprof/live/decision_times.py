"""Times what is decided about a dispatch, over made-up routing; on the host alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeprof.live.calibration_trials import MadeUp
from moeprof.replay.buffer_plans import planned_dispatches, read_routed_rows, residency_of
from moeprof.replay.cache import streams
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.calibration_file import DecisionTimes, Measured
from moeprof.replay.least_squares import fit_parts
from moeprof.replay.serving_settings import BufferingSetting

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]

_PLAN_REPEATS = 3
_DECISION_SHARES = (0.125, 0.25, 0.5)
_FORESEEN = BufferingSetting(capacity=0.25, prefetch=2)


def decision_times(regimes: Sequence[MadeUp], policy: str, *, streamed: bool) -> DecisionTimes:
    """Times a policy's state machine over made-up routing, and the order of pieces; host alone."""
    found = [
        _decisions(made.trace, policy, share, streamed=streamed)
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


def _decisions(trace: Trace, policy: str, share: float, *, streamed: bool) -> tuple[Floats, Floats]:
    """Returns what `DecisionTimes` multiplies [dispatches, 4], and the times in seconds."""
    routed = read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    count = np.diff(routed.starts)
    setting = BufferingSetting(capacity=share, policy=policy)
    runs = []
    for _ in range(_PLAN_REPEATS):
        made = residency_of(trace, routed, setting, rows=rows)
        dispatches = planned_dispatches(made.residency, routed, setting)
        times, hits = [], []
        for _ in range(len(count)):
            begun_s = time.perf_counter()
            planned = next(dispatches)
            if streamed:
                copies_of(planned, pieces_of(planned, streamed=True))
            times.append(time.perf_counter() - begun_s)
            hits.append(sum(one.hit for one in planned))
        runs.append(times)
    hit = np.array(hits, np.float64)
    missed = count - hit
    slots = made.capacity[routed.site]
    columns = np.stack([np.ones_like(hit), hit, missed, missed * slots], axis=1)
    # The same decisions each time: the median of the repetitions is without interruptions.
    return columns, np.median(np.array(runs), axis=0)


def foresee_time(regimes: Sequence[MadeUp]) -> Measured:
    """Times what a dispatch teaches, and saying which experts are copied ahead.

    Asking for the copies is not in it: they take as long to ask for as others.
    """
    found = [_foreseen_s(made.trace) for made in regimes]
    return Measured.of(np.concatenate(found).tolist())


def _foreseen_s(trace: Trace) -> Floats:
    """Returns the times [dispatches] in seconds, medians of repetitions."""
    routed = read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    sites = [routed.sites[index].site for index in routed.site.tolist()]
    runs = []
    for _ in range(_PLAN_REPEATS):
        residency = residency_of(trace, routed, _FORESEEN, rows=rows).residency
        times = []
        for site, planned in zip(
            sites, planned_dispatches(residency, routed, _FORESEEN), strict=True
        ):
            begun_s = time.perf_counter()
            residency.fetch_ahead(site, [step.expert for step in planned])
            times.append(time.perf_counter() - begun_s)
        runs.append(times)
    found: Floats = np.median(np.array(runs), axis=0)
    return found
