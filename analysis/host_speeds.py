"""What errors of predictions are made of: visits of settings by how fast the host was before each.

`moeprof verify` visits every setting several times, and before each visit times a fixed piece of
work on the host (the probe). Where steps wait for the host, a host that runs at half its speed is
an error of the prediction, whichever way the cost model was right. The share of such visits can be
told only after the fact: whoever predicted did not know how the host would do, and the stated
intervals had to hold without knowing. So nothing here is part of a goal and no measurement is left
out anywhere because of it; it is shown to say how much of an error belongs to the model, and how
much to what the machine did meanwhile. A visit is held to the p50 predicted, each step by its
median over the visit's repetitions, which are few: one visit varies more than a setting does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.judgements import Judgement
from moeprof.live.step_percentiles import repetitions_of

PERCENTILE = 50
FASTEST = 0.1
"""Quantile of a run's probes that stands for the host's full speed; the least may be luck."""

EDGES = (0.0, 1.15, 1.5, math.inf)
"""Of the bins of probe over full speed, each closed above."""

_QUARTILES = (0.25, 0.5, 0.75)
_COLUMNS = (
    "machine", "model", "trace", "setting", "round", "probe_ms", "slowdown", "measured_ms",
    "predicted_ms", "ratio", "inside",
)  # fmt: skip


def visit_rows(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Returns one row per visit that was probed, of settings whose p50 was predicted.

    ``slowdown`` is the probe over the quantile `FASTEST` of those of the same file, ``ratio`` is
    measured over predicted, ``inside`` None where no interval was stated.
    """
    rows = []
    for one in judgements:
        said = {
            row["setting"]: row
            for row in one.predictions.rows
            if row["percentile"] == PERCENTILE and row["predicted_ms"] is not None
        }
        own = [row for name in said for row in _visits_of(one, said[name])]
        if own:
            full = float(np.quantile([row["probe_ms"] for row in own], FASTEST))
            rows += [{**row, "slowdown": row["probe_ms"] / full} for row in own]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _visits_of(one: Judgement, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the visits of a setting.

    Args:
        one: The run.
        said: The prediction of the setting's p50.
    """
    times = one.content["step_times"].get(said["setting"])
    if times is None or not all("probe_ms" in each for each in times.get("visits", [{}])):
        return []
    repeated = repetitions_of(times)
    found = []
    for number, visit in enumerate(times["visits"]):
        own = repeated.part(repeated.visit_of == number)
        value = own.percentile_ms(PERCENTILE)
        low, high = said["low_ms"], said["high_ms"]
        found.append(
            {
                "machine": one.machine,
                "model": one.predictions.facts["model"],
                "trace": one.trace,
                "setting": said["setting"],
                "round": visit["round"],
                "probe_ms": float(visit["probe_ms"]),
                "measured_ms": value,
                "predicted_ms": said["predicted_ms"],
                "ratio": value / said["predicted_ms"],
                "inside": None if low is None else bool(low <= value <= high),
            }
        )
    return found


def by_host_speed(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """Returns measured over predicted per machine, model and speed of the host; None unprobed.

    Args:
        judgements: Every run; those without probes are left out.
    """
    rows = visit_rows(judgements)
    if rows.empty:
        return None
    bins = pd.cut(rows["slowdown"], EDGES, labels=False)
    groups = [
        {
            "machine": machine,
            "model": model,
            "above": EDGES[number],
            "up_to": None if math.isinf(EDGES[number + 1]) else EDGES[number + 1],
            **_summed(own),
        }
        for (machine, model, number), own in rows.groupby(["machine", "model", bins], sort=True)
    ]
    return {
        "percentile": PERCENTILE,
        "fastest_quantile": FASTEST,
        "fast": EDGES[1],
        "slow": EDGES[-2],
        "visits": len(rows),
        "slowest_bin": int((bins == len(EDGES) - 2).sum()),
        "groups": groups,
    }


def _summed(rows: pd.DataFrame) -> dict[str, Any]:
    low, middle, high = rows["ratio"].quantile(list(_QUARTILES)).tolist()
    stated = rows["inside"].dropna()
    return {
        "visits": len(rows),
        "settings": int(rows["setting"].nunique()),
        "median_probe_ms": float(rows["probe_ms"].median()),
        "ratio_low": low,
        "ratio": middle,
        "ratio_high": high,
        "stated": len(stated),
        "inside": int(stated.astype(bool).sum()),
    }
