"""What the table of a verification says: errors, coverage, regret, and what is left open."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from moeprof.live.verification_options import NAME, TOLERANCE
from moeprof.replay.result import SEVERITY_FACT, Finding, Metric

_TAIL = 0.05
_BISECTIONS = 60


def regrets(table: pd.DataFrame) -> pd.DataFrame:
    """Returns what it costs to take the setting that the model recommends.

    Settings compete at equal memory and for one percentile; recommended is the least predicted.

    Args:
        table: As `moeprof.live.verify` returns it.

    Returns:
        Columns percentile, device_bytes, recommended, best, regret (recommended over best, both
        measured, less 1), settings; one row where at least two were measured.
    """
    found = []
    known = table.dropna(subset=["measured_ms"])
    for (percentile, size), group in known.groupby(["percentile", "device_bytes"]):
        if len(group) < 2:  # noqa: PLR2004
            continue
        taken = group.iloc[int(np.argmin(group["predicted_ms"].to_numpy(float)))]
        best = group.iloc[int(np.argmin(group["measured_ms"].to_numpy(float)))]
        found.append(
            {
                "percentile": percentile,
                "device_bytes": size,
                "recommended": taken["setting"],
                "best": best["setting"],
                "regret": taken["measured_ms"] / best["measured_ms"] - 1,
                "settings": len(group),
            }
        )
    columns = ["percentile", "device_bytes", "recommended", "best", "regret", "settings"]
    return pd.DataFrame(found, columns=columns)


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the exact (Clopper-Pearson) 90 % interval of a share."""

    def at_least(share: float, count: int) -> float:
        return math.fsum(
            math.comb(trials, n) * share**n * (1 - share) ** (trials - n)
            for n in range(count, trials + 1)
        )

    def solved(count: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, count) < wanted else (low, middle)
        return (low + high) / 2

    least = 0.0 if successes == 0 else solved(successes, _TAIL)
    most = 1.0 if successes == trials else solved(successes + 1, 1 - _TAIL)
    return least, most


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the metrics and what they say."""
    if table.empty:
        return {"metrics": (), "findings": (_finding("Nothing was run."),)}
    known = table.dropna(subset=["measured_ms"])
    if known.empty:
        return {"metrics": (), "findings": (_finding("Nothing fitted into the device's memory."),)}
    errors = {
        name: float(known[column].astype(float).abs().median())
        for name, column in (
            ("model", "error"),
            ("bytes over bandwidth", "naive_bandwidth_error"),
            ("mean", "naive_mean_error"),
        )
    }
    metrics = [
        _metric(f"verification/median error/{name}", value) for name, value in errors.items()
    ]
    findings = [
        _finding(
            f"Over {len(known)} predictions the model is off by {errors['model']:.1%} (median), "
            f"bytes over bandwidth by {errors['bytes over bandwidth']:.1%}, the mean by "
            f"{errors['mean']:.1%}."
        )
    ]
    stated = known.dropna(subset=["inside"])
    if len(stated):
        inside = int(stated["inside"].astype(bool).sum())
        low, high = binomial_interval(inside, len(stated))
        metrics.append(
            _metric("verification/coverage", inside / len(stated), low, high, better=None)
        )
        findings.append(
            _finding(
                f"{inside} of {len(stated)} measurements lie in their stated 90 % interval: "
                f"{inside / len(stated):.1%} ({low:.1%} to {high:.1%})."
            )
        )
    found = regrets(table)
    if len(found):
        median, worst = float(found["regret"].median()), float(found["regret"].max())
        metrics += [
            _metric("verification/regret/median", median),
            _metric("verification/regret/worst", worst),
        ]
        findings.append(
            _finding(
                f"Taking what the model recommends at equal memory costs {median:.1%} (median of "
                f"{len(found)} choices) and at worst {worst:.1%} over the best measured."
            )
        )
    rough = known[known["measured_spread"].astype(float) > TOLERANCE]
    if len(rough):
        findings.append(
            _finding(f"{len(rough)} of {len(known)} are not measured to {TOLERANCE:.0%}.")
        )
    left_out = table[table["measured_ms"].isna()]["setting"].unique()
    if len(left_out):
        findings.append(_finding(f"No room on the device for {', '.join(left_out)}."))
    return {"metrics": tuple(metrics), "findings": tuple(findings)}


def _metric(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    better: Any = "lower",
) -> Metric:
    return Metric(
        name=name,
        value=value,
        unit="share",
        figure_class="measured",
        low=low,
        high=high,
        better=better,
    )


def _finding(text: str) -> Finding:
    return Finding(text=text, severity=SEVERITY_FACT, section=NAME)
