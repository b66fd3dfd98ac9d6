"""How far the runs of one file lie apart: visits are added in later ones, on other hosts.

`moeprof verify --continue` adds visits to those of an earlier run on the same kind of GPU, and
takes them for draws of one machine. Where the host is another one, or other work keeps it busy, a
setting that waits for it takes longer in all visits of a run. So beside how well a percentile is
known over all visits stands what a run alone would have said, and how well it would have known it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.judgements import Judgement
from moeprof.live.step_percentiles import RepeatedSteps, repetitions_of
from moeprof.live.verification_options import TOLERANCE
from moeprof.replay.cost_model import PERCENTILES

PERCENTILE = 50
LEAST_VISITS = 5
"""Visits that a run has of a setting, for its median to be compared with another run's."""


def run_of_rounds(step_times: Mapping[str, Any]) -> dict[int, int]:
    """Returns the run of each round, from 0, or nothing where files do not say when visits began.

    Time counts from the first visit of a run.

    Args:
        step_times: Of all settings, as `moeprof.live.verification_files` writes them. A run's
            rounds all come after those of the runs before it, and in turn.
    """
    ends: dict[int, tuple[float, float]] = {}
    if not all(
        "begun_s" in each for own in step_times.values() for each in own.get("visits", [{}])
    ):
        return {}
    for times in step_times.values():
        for visit in times["visits"]:
            first, last = ends.get(visit["round"], (np.inf, -np.inf))
            begun_s = float(visit["begun_s"])
            ends[visit["round"]] = min(first, begun_s), max(last, begun_s)
    runs: dict[int, int] = {}
    number, latest_s = 0, -np.inf
    for each in sorted(ends):
        first, last = ends[each]
        number += first < latest_s
        latest_s = last
        runs[each] = number
    return runs


def runs_apart(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Returns per machine and trace how far runs lie apart.

    ``settings`` have `LEAST_VISITS` in two runs or more; ``median_ratio`` and ``ratio`` are the
    longest p50 of their runs over the shortest, of the median setting and of the ``setting`` with
    the greatest, ``low_ms`` and ``high_ms`` these two. ``known_in_a_run`` counts percentiles that
    some run knows to the tolerance alone, of ``percentiles``.

    Args:
        judgements: Every run.
    """
    return [found for one in judgements if (found := _apart(one)) is not None]


def _apart(one: Judgement) -> dict[str, Any] | None:
    step_times = one.content["step_times"]
    runs = run_of_rounds(step_times)
    if not runs:
        return None
    apart: list[tuple[float, str, float, float]] = []
    known = 0
    for name, times in step_times.items():
        parts = _by_run(times, runs)
        spreads = [each.spreads(PERCENTILES) for each in parts]
        known += sum(min(own) <= TOLERANCE for own in zip(*spreads, strict=True))
        every = [
            each.percentile_ms(PERCENTILE)
            for each in parts
            if len(np.unique(_visits(each))) >= LEAST_VISITS
        ]
        if len(every) > 1:
            apart.append((max(every) / min(every), str(name), min(every), max(every)))
    ratio, setting, low_ms, high_ms = max(apart, default=(None, None, None, None))
    return {
        "machine": one.machine,
        "model": one.predictions.facts["model"],
        "trace": one.trace,
        "runs": max(runs.values()) + 1,
        "settings": len(apart),
        "median_ratio": float(np.median([each[0] for each in apart])) if apart else None,
        "ratio": ratio,
        "setting": setting,
        "low_ms": low_ms,
        "high_ms": high_ms,
        "known_in_a_run": known,
        "percentiles": len(PERCENTILES) * len(step_times),
    }


def _by_run(times: Mapping[str, Any], runs: Mapping[int, int]) -> list[RepeatedSteps]:
    repeated = repetitions_of(times)
    run_of = np.array([runs[visit["round"]] for visit in times["visits"]])[_visits(repeated)]
    return [repeated.part(run_of == each) for each in np.unique(run_of)]


def _visits(repeated: RepeatedSteps) -> np.ndarray[Any, Any]:
    if repeated.visit_of is None:
        raise ValueError("visits are not known")
    return repeated.visit_of
