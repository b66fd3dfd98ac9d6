"""How far off predictions were, row by row and together: errors, coverage, regret.

Measured percentiles, errors and coverage are computed again from the times of the steps, as the
predictions mean them (of the steps' medians over repetitions, without what was set aside); beside
them stands what they are with nothing set aside (whole), and for all repetitions of all steps
together, nothing set aside either (raw). Leaves out what is held to which goal
(`analysis.prediction_quality`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd

from analysis.judgements import HIT_RATES, PREDICTED, Judgement
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verdicts import (
    CLUSTER_DRAWS,
    CLUSTER_SEED,
    LEAST_CLUSTERS,
    binomial_interval,
    clustered_interval,
    regrets,
)
from moeprof.replay.cache.policies import POLICIES
from moeprof.replay.serving_settings import GatingSetting, Setting, parse_setting

OTHER_MEASURES = ("raw", "whole")
"""What else a measurement could have been; see above."""

QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
MODELS_OF_TIME: Mapping[str, str] = MappingProxyType(
    {
        "model": "error",
        "bytes over bandwidth": "naive_bandwidth_error",
        "the mean": "naive_mean_error",
    }
)
"""Columns of errors, moeprof's first."""

CLUSTERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"setting": ("routing", "setting"), "GPU and trace": ("machine", "routing")}
)
"""What goes together, and the columns that tell: a setting on every machine, both percentiles; all
settings of one trace on one machine."""


def pooled_rows(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Returns one row per trace, machine, setting and percentile, errors computed again.

    ``inside`` is None where no interval was stated, all that is measured NaN where the setting did
    not fit.
    """
    rows = []
    for one in judgements:
        times_of = one.content["step_times"]
        asked = sorted({row["percentile"] for row in one.content["rows"]})
        spreads = {
            name: dict(zip(asked, repetitions_of(each).spreads(asked), strict=True))
            for name, each in times_of.items()
        }
        for row in one.content["rows"]:
            own = {
                "trace": one.trace,
                "routing": one.predictions.facts["trace"],
                "model": one.predictions.facts["model"],
                "machine": one.machine,
                "setting": row["setting"],
                **_described(parse_setting(row["setting"])),
                "percentile": row["percentile"],
                **{key: row[key] for key in PREDICTED},
                **{key: row.get(name) for key, name in HIT_RATES.items()},
                "measured_ms": math.nan,
                "raw_ms": math.nan,
                "whole_ms": math.nan,
                "aside_share": math.nan,
                "never_quiet": 0,
                "measured_spread": math.nan,
                "repetitions": row["repetitions"],
                "inside": None,
                **dict.fromkeys(MODELS_OF_TIME.values(), math.nan),
            }
            if row["setting"] in times_of:
                repeated = repetitions_of(times_of[row["setting"]])
                value = repeated.percentile_ms(row["percentile"])
                low, high = row["low_ms"], row["high_ms"]
                own |= {
                    "measured_ms": value,
                    "raw_ms": repeated.raw_ms(row["percentile"]),
                    "whole_ms": repeated.whole().percentile_ms(row["percentile"]),
                    "aside_share": repeated.num_aside / repeated.times_ms.size,
                    "never_quiet": repeated.num_never_quiet,
                    "measured_spread": spreads[row["setting"]][row["percentile"]],
                    "inside": None if low is None else bool(low <= value <= high),
                    "error": row["predicted_ms"] / value - 1,
                    "naive_bandwidth_error": row["naive_bandwidth_ms"] / value - 1,
                    "naive_mean_error": row["naive_mean_ms"] / value - 1,
                }
            rows.append(own)
    return pd.DataFrame(rows)


def _described(setting: Setting) -> dict[str, str | None]:
    """Returns kind, policy and capacity."""
    if isinstance(setting, GatingSetting):
        return {"kind": "gating", "policy": None, "capacity": None}
    if setting.capacity is None:
        return {"kind": "unbuffered", "policy": None, "capacity": None}
    ahead = ", copied ahead" if setting.prefetch else ""
    return {
        "kind": f"miss: {setting.miss}{ahead}",
        "policy": setting.policy,
        "capacity": str(setting.capacity),
    }


def quality_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Returns how good the predictions in these rows were: counts, errors, coverage.

    Args:
        rows: As `pooled_rows` gives them; those that were not measured are left out.
    """
    known = rows[rows["measured_ms"].notna()]
    stated = known[known["inside"].notna()]
    inside = int(stated["inside"].astype(bool).sum())
    low, high = binomial_interval(inside, len(stated)) if len(stated) else (None, None)
    errors = {
        name: {
            f"{each:g}": float(known[column].abs().quantile(each)) if len(known) else None
            for each in QUANTILES
        }
        for name, column in MODELS_OF_TIME.items()
    }
    return {
        "predictions": len(known),
        "stated": len(stated),
        "inside": inside,
        "coverage": inside / len(stated) if len(stated) else None,
        "coverage_low": low,
        "coverage_high": high,
        "below": int((stated["measured_ms"] < stated["low_ms"]).sum()),
        "above": int((stated["measured_ms"] > stated["high_ms"]).sum()),
        **{
            f"{name}_{side}": int(found.sum())
            for name in OTHER_MEASURES
            for side, found in (
                ("inside", stated[f"{name}_ms"].between(stated["low_ms"], stated["high_ms"])),
                ("below", stated[f"{name}_ms"] < stated["low_ms"]),
                ("above", stated[f"{name}_ms"] > stated["high_ms"]),
            )
        },
        **{
            f"{name}_median_error": float(
                (known["predicted_ms"] / known[f"{name}_ms"] - 1).abs().median()
            )
            if len(known)
            else None
            for name in OTHER_MEASURES
        },
        "never_quiet": int((known["never_quiet"] > 0).sum()),
        "mean_aside_share": float(known["aside_share"].mean()) if len(known) else None,
        "median_signed_error": float(known["error"].median()) if len(known) else None,
        "absolute_errors": errors,
    }


def coverage_by_cluster(rows: pd.DataFrame) -> dict[str, Any] | None:
    """Returns intervals of the coverage that do not take predictions for independent.

    Args:
        rows: As `pooled_rows` gives them.

    Returns:
        The intervals of `CLUSTERS`, how they are made, and in how many cases all percentiles of a
        setting on a machine are inside or all outside; None where no interval was stated. Of fewer
        clusters than `LEAST_CLUSTERS` it is no interval, but the range of their shares, which are
        there, too; one cluster says nothing.
    """
    stated = rows[rows["inside"].notna() & rows["measured_ms"].notna()]
    if stated.empty:
        return None
    inside = stated["inside"].astype(bool)
    intervals = []
    for name, columns in CLUSTERS.items():
        clusters = list(stated[list(columns)].itertuples(index=False, name=None))
        found: dict[str, Any] = {"by": name, "clusters": len(set(clusters))}
        if found["clusters"] == 1:
            continue
        if found["clusters"] < LEAST_CLUSTERS:
            own = pd.Series(clusters, index=inside.index, dtype=object)
            shares = sorted(inside.groupby(own).mean().tolist())
            found |= {"low": shares[0], "high": shares[-1], "shares": shares}
        else:
            found["low"], found["high"] = clustered_interval(inside.tolist(), clusters)
        intervals.append(found)
    cases = inside.groupby([stated[key] for key in ("machine", "routing", "setting")])
    several = cases.nunique()[cases.size() > 1]
    return {
        "method": "bootstrap of whole clusters, 5th to 95th percentile, widened for few clusters "
        "(moeprof.live.verdicts.clustered_interval)",
        "draws": CLUSTER_DRAWS,
        "seed": CLUSTER_SEED,
        "intervals": intervals,
        "cases": len(several),
        "cases_alike": int((several == 1).sum()),
    }


def regret_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the regret of every choice: per routing, machine, percentile and memory.

    Settings of one trace compete also where they were predicted in several files.
    """
    found = []
    for (routing, machine), own in rows.groupby(["routing", "machine"], sort=True):
        table = regrets(own)
        table.insert(0, "routing", routing)
        table.insert(1, "machine", machine)
        found.append(table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["regret"])


def regret_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Returns how many choices there were, and their regret; also without knowing the future.

    Args:
        rows: As `pooled_rows` gives them.
    """
    return {
        **_summed(regret_rows(rows)),
        "without_future": _summed(regret_rows(rows[~rows["policy"].map(_sees_future)])),
    }


def _sees_future(policy: object) -> bool:
    # Gatings have no policy, which pandas may turn into NaN.
    return isinstance(policy, str) and POLICIES[policy].sees_future


def _summed(chosen: pd.DataFrame) -> dict[str, Any]:
    return {
        "choices": len(chosen),
        "median": float(chosen["regret"].median()) if len(chosen) else None,
        "worst": float(chosen["regret"].max()) if len(chosen) else None,
    }
