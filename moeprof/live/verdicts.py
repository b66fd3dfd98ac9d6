"""What the table of a verification says: errors, coverage, regret, and what is left open."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moeprof.live.step_percentiles import widening
from moeprof.live.verification_options import NAME, TOLERANCE
from moeprof.replay.result import SEVERITY_FACT, Finding, Metric

CLUSTER_DRAWS = 10_000
CLUSTER_SEED = 0
LEAST_CLUSTERS = 20
"""Of fewer an interval by clusters is too narrow to be called one of 90 %."""

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
    """Returns the exact (Clopper-Pearson) 90 % interval of a share.

    Each trial counts as one of its own; where they go together the interval is too narrow
    (`clustered_interval`).

    Args:
        successes: Of the trials.
        trials: At least 1.
    """
    # Binomial coefficients of a thousand trials are beyond what a float holds.
    log_ways = [
        math.lgamma(trials + 1) - math.lgamma(n + 1) - math.lgamma(trials - n + 1)
        for n in range(trials + 1)
    ]

    def at_least(share: float, count: int) -> float:
        log_yes, log_no = math.log(share), math.log1p(-share)
        return math.fsum(
            math.exp(log_ways[n] + n * log_yes + (trials - n) * log_no)
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


def clustered_interval(
    is_success: Sequence[bool], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """Returns a 90 % interval of a share of trials that go together in clusters.

    A bootstrap: as many clusters as there are, drawn whole with replacement, `CLUSTER_DRAWS` times
    from the seed `CLUSTER_SEED`; the 5th and 95th percentile of the shares. Draws of few clusters
    vary too little: what lies between them and the share is widened as for visits
    (`moeprof.live.step_percentiles.widening`). Draws of successes alone, or of none, are all the
    same: then it is the exact interval of as many trials as there are clusters. One cluster says
    nothing: 0 to 1.

    Of 77 clusters such intervals hold the truth 86 to 93 % of the time, of 6 unlike ones 69 to 87 %
    (simulated): below `LEAST_CLUSTERS` say what each cluster's share is instead.

    Args:
        is_success: [trials] at least one.
        clusters: [trials] what tells whose each is.
    """
    whose = pd.factorize(pd.Series(list(clusters), dtype=object))[0]
    sizes = np.bincount(whose).astype(np.float64)
    successes = np.bincount(whose, weights=np.asarray(is_success, np.float64))
    count = len(sizes)
    if count == 1:
        return 0.0, 1.0
    share = float(successes.sum() / sizes.sum())
    if share in (0.0, 1.0):
        return binomial_interval(round(share * count), count)
    drawn = np.random.default_rng(CLUSTER_SEED).integers(count, size=(CLUSTER_DRAWS, count))
    shares = successes[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(shares, (_TAIL, 1 - _TAIL)).tolist()
    times = widening(count)
    return max(0.0, share - times * (share - low)), min(1.0, share + times * (high - share))


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
        least, most = clustered_interval(
            stated["inside"].astype(bool).tolist(), stated["setting"].tolist()
        )
        findings.append(
            _finding(
                f"{inside} of {len(stated)} measurements lie in their stated 90 % interval: "
                f"{inside / len(stated):.1%} ({low:.1%} to {high:.1%} were each on its own, "
                f"{least:.1%} to {most:.1%} as percentiles of a setting go together)."
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
