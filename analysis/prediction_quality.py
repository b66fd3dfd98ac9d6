"""How good predictions of step times were, over every file of `moeprof verify`.

    python -m analysis.prediction_quality [VERIFIED ...] [--predicted FILE ...] [-o OUT]

Pools verified-*.json (analysis/results) and holds each to the predictions that were written before
it (predicted-*.json): every row judged must be a row predicted, and predicted earlier than it was
measured. Measured percentiles, errors and coverage are computed again from the times of the steps,
as the predictions mean them (of the steps' medians over repetitions); beside them stands what they
are for all repetitions of all steps together (raw). Of some runs only the printed table was kept
(`analysis.printed_verifications`): their percentiles and errors stay as printed, are held to the
predictions by the digits that were printed, and are counted apart. Regret is that of
`moeprof.live.regrets`, per routing, machine, percentile and memory. Goals are met or missed as they
fall; what was predicted and not measured is listed.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import command
from analysis.printed_verifications import DIGITS, check_error
from moeprof.errors import MoeprofError
from moeprof.live.verification import (
    NAME,
    TOLERANCE,
    Predictions,
    binomial_interval,
    measured_ms,
    read_predictions,
    regrets,
    spread_of,
)
from moeprof.replay.cache.policies import POLICIES
from moeprof.replay.serving_settings import GatingSetting, Setting, parse_setting
from moeprof.reporting.writing import write_files

RESULTS = Path(__file__).resolve().parent / "results"
RESULT = "prediction_quality.json"
KIND = "moeprof prediction quality"

LEAST_COVERAGE, MOST_COVERAGE = 0.85, 0.95
LEAST_PREDICTIONS = 200
LEAST_SETTINGS, LEAST_MODELS, LEAST_POLICIES, LEAST_CAPACITIES = 48, 3, 4, 4
MOST_MEDIAN_ERROR = 0.05
MOST_OF_NAIVE = 1 / 3
MOST_MEDIAN_REGRET, MOST_REGRET = 0.02, 0.10
QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
MODELS_OF_TIME = {
    "model": "error",
    "bytes over bandwidth": "naive_bandwidth_error",
    "the mean": "naive_mean_error",
}
"""Columns of errors, moeprof's first."""

_PREDICTED = (
    "predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms", "naive_mean_ms", "hit_rate",
    "copied_bytes_per_step", "device_bytes",
)  # fmt: skip
_PRINTED_PREDICTIONS = ("predicted_ms", "low_ms", "high_ms")
_PRINTED = (
    *_PRINTED_PREDICTIONS, "measured_ms", "measured_spread", "inside", *MODELS_OF_TIME.values(),
)  # fmt: skip
"""What a row of a printed table has."""
_NEEDED = ("kind", "command", "date", "hardware", "versions", "notes", "rows")
_CLOSE = 1e-9
_HINT = "write it again: moeprof verify TRACE --predictions FILE -o FILE"


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A file of measurements and the predictions that it judges.

    Attributes:
        name: Of the file.
        content: The file.
        predicted: Name of the file of predictions.
        predictions: Written before.
    """

    name: str
    content: Mapping[str, Any]
    predicted: str
    predictions: Predictions

    @property
    def machine(self) -> str:
        """Where it was measured."""
        hardware = self.content["hardware"]
        return str(hardware["device_name"] or hardware.get("cpu_name"))

    @property
    def is_printed(self) -> bool:
        """Whether only a printed table was kept."""
        return "printed" in self.content

    @property
    def trace(self) -> str:
        """What the predictions are called."""
        return Path(self.predicted).stem.removeprefix("predicted-")


def read_judgements(verified: Iterable[Path], predicted: Iterable[Path]) -> list[Judgement]:
    """Reads files of measurements, each with the predictions that it judges.

    Args:
        verified: From ``moeprof verify -o``.
        predicted: From ``moeprof verify --predict-only -o``.

    Raises:
        MoeprofError: A file is damaged, judges what was not predicted before, or what another
            judges as well.
    """
    known = {path.name: read_predictions(path) for path in predicted}
    found = []
    seen: dict[tuple[str, str, str], str] = {}
    for path in sorted(verified):
        content = _read(path)
        name = _predictions_of(path, content, known)
        if "printed" in content:
            content = _filled(path, content, known[name])
        one = Judgement(name=path.name, content=content, predicted=name, predictions=known[name])
        _check_dates(one)
        for setting in dict.fromkeys(row["setting"] for row in content["rows"]):
            key = (name, one.machine, setting)
            if key in seen:
                raise MoeprofError(
                    f"{setting} of {name} was measured on {one.machine} in {seen[key]} and in "
                    f"{path.name}",
                    hint="every setting counts once; name the files to pool",
                )
            seen[key] = path.name
        found.append(one)
    if not found:
        raise MoeprofError("there is nothing to pool", hint=_HINT)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoeprofError(f"{path} cannot be read: {error}", hint=_HINT) from error
    if not isinstance(content, dict) or content.get("kind") != f"moeprof {NAME}":
        raise MoeprofError(f"{path} is not from moeprof verify", hint=_HINT)
    is_printed = "printed" in content
    needed = _NEEDED if is_printed else (*_NEEDED, "step_times")
    lacking = [field for field in needed if field not in content]
    if lacking:
        raise MoeprofError(f"{path} lacks {', '.join(lacking)}", hint=_HINT)
    try:
        if is_printed and "step_times" in content:
            raise ValueError("a printed table has no times of steps")
        for row in content["rows"]:
            if is_printed:
                _check_printed_row(row)
                continue
            _check_row(row, content["step_times"].get(row["setting"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MoeprofError(f"{path} is damaged: {error!r}", hint=_HINT) from None
    return content


def _check_row(row: Mapping[str, Any], times: Mapping[str, Any] | None) -> None:
    """Raises ValueError where a row is not what its steps say."""
    what = f"{row['setting']} p{row['percentile']}"
    if (times is None) != (row["measured_ms"] is None):
        raise ValueError(f"{what} has a time and no steps, or steps and no time")
    if times is None:
        return
    steps = np.array(times["measured_ms"], float)
    if steps.shape != (row["repetitions"], len(times["steps"])) or not np.isfinite(steps).all():
        raise ValueError(f"{what} has {steps.shape} times, not one per repetition and step")
    if not math.isclose(measured_ms(steps, row["percentile"]), row["measured_ms"], rel_tol=1e-6):
        raise ValueError(f"{what} says {row['measured_ms']} ms, its steps say otherwise")


def _check_printed_row(row: Mapping[str, Any]) -> None:
    """Raises where a row lacks a number, or its error is not what its times say."""
    numbers = [float(row[key]) for key in _PRINTED if key != "inside"]
    if not (np.isfinite(numbers).all() and isinstance(row["inside"], bool)):
        raise ValueError(f"{row['setting']} p{row['percentile']} has no numbers")
    check_error(row, "error", row["predicted_ms"])


def _filled(path: Path, content: Mapping[str, Any], predictions: Predictions) -> Mapping[str, Any]:
    """Returns a printed file with what was predicted to every digit, and no times of steps."""
    said = {(row["setting"], row["percentile"]): row for row in predictions.rows}
    rows = []
    try:
        for row in content["rows"]:
            own = said[row["setting"], row["percentile"]]
            check_error(row, "naive_bandwidth_error", own["naive_bandwidth_ms"])
            check_error(row, "naive_mean_error", own["naive_mean_ms"])
            rows.append({**row, **{key: own[key] for key in _PREDICTED}, "repetitions": None})
    except MoeprofError as error:
        raise MoeprofError(f"{path} is damaged: {error.message}", hint=error.hint) from None
    return {**content, "rows": rows, "step_times": {}}


def _predictions_of(
    path: Path, content: Mapping[str, Any], known: Mapping[str, Predictions]
) -> str:
    """Returns the file whose rows these are."""
    same = _is_same_printed if "printed" in content else _is_same
    for name, predictions in known.items():
        rows = {(row["setting"], row["percentile"]): row for row in predictions.rows}
        if all(same(row, rows.get((row["setting"], row["percentile"]))) for row in content["rows"]):
            return name
    raise MoeprofError(
        f"{path} judges what none of {', '.join(known) or 'no predictions'} says",
        hint="give the predictions that it was run with: --predicted FILE",
    )


def _is_same(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    if other is None:
        return False
    for key in _PREDICTED:
        one, two = row[key], other[key]
        if (one is None) != (two is None):
            return False
        if one is not None and not math.isclose(one, two, rel_tol=_CLOSE, abs_tol=_CLOSE):
            return False
    return True


def _is_same_printed(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    return other is not None and all(
        other[key] is not None and float(f"{other[key]:.{DIGITS}g}") == row[key]
        for key in _PRINTED_PREDICTIONS
    )


def _check_dates(one: Judgement) -> None:
    facts = one.predictions.facts
    dates = [facts["calibrated"], facts["date"], one.content["date"]]
    try:
        calibrated, predicted, measured = map(datetime.fromisoformat, dates)
        in_order = calibrated <= predicted < measured
    except (TypeError, ValueError) as error:
        raise MoeprofError(f"{one.name} or {one.predicted} has no date: {error}") from None
    if not in_order:
        raise MoeprofError(
            f"{one.name} was measured {dates[2]}, {one.predicted} predicted {dates[1]} from what "
            f"was calibrated {dates[0]}: not in this order",
            hint="predictions are kept before anything is measured",
        )


def pooled_rows(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Returns one row per trace, machine, setting and percentile, errors computed again.

    What comes from a printed table stays as printed, its ``raw_ms`` NaN. ``inside`` is None where
    no interval was stated, all that is measured NaN where the setting did not fit.
    """
    rows = []
    for one in judgements:
        times_of = one.content["step_times"]
        for row in one.content["rows"]:
            own = {
                "trace": one.trace,
                "routing": one.predictions.facts["trace"],
                "model": one.predictions.facts["model"],
                "machine": one.machine,
                "setting": row["setting"],
                **_described(parse_setting(row["setting"])),
                "percentile": row["percentile"],
                **{key: row[key] for key in _PREDICTED},
                "measured_ms": math.nan,
                "raw_ms": math.nan,
                "measured_spread": math.nan,
                "repetitions": row["repetitions"],
                "printed": one.is_printed,
                "inside": None,
                **dict.fromkeys(MODELS_OF_TIME.values(), math.nan),
            }
            if one.is_printed:
                own |= {key: row[key] for key in _PRINTED if key not in _PREDICTED}
            elif row["setting"] in times_of:
                times = np.array(times_of[row["setting"]]["measured_ms"], float)
                value = measured_ms(times, row["percentile"])
                low, high = row["low_ms"], row["high_ms"]
                own |= {
                    "measured_ms": value,
                    "raw_ms": float(np.percentile(times, row["percentile"])),
                    "measured_spread": spread_of(times, row["percentile"]),
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
    return {
        "kind": f"miss: {setting.miss}",
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
        "raw_stated": int(stated["raw_ms"].notna().sum()),
        "raw_inside": int(
            ((stated["low_ms"] <= stated["raw_ms"]) & (stated["raw_ms"] <= stated["high_ms"])).sum()
        ),
        "raw_median_error": float((known["predicted_ms"] / known["raw_ms"] - 1).abs().median())
        if known["raw_ms"].notna().any()
        else None,
        "median_signed_error": float(known["error"].median()) if len(known) else None,
        "absolute_errors": errors,
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
    return pd.concat(found, ignore_index=True)


def pooled(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Returns everything that the files say together, as plain data."""
    rows = pooled_rows(judgements)
    known = rows[rows["measured_ms"].notna()]
    chosen = regret_rows(rows)
    counts = {
        "settings": len(known[["trace", "setting"]].drop_duplicates()),
        "models": known["model"].nunique(),
        "policies": known["policy"].nunique(),
        "capacities": known["capacity"].nunique(),
        "machines": known["machine"].nunique(),
        "from_printed_tables": int(known["printed"].astype(bool).sum()),
        "not_to_tolerance": int((known["measured_spread"] > TOLERANCE).sum()),
        "tolerance": TOLERANCE,
    }
    whole = quality_of(rows)
    groups = [
        {"by": by, "of": str(value), **quality_of(own)}
        for by in ("machine", "model", "percentile", "kind")
        for value, own in known.groupby(by, sort=True)
    ] + [
        {"by": "machine and model", "of": f"{machine}, {model}", **quality_of(own)}
        for (machine, model), own in known.groupby(["machine", "model"], sort=True)
    ]
    regret = {
        **_regret_of(chosen),
        "without_future": _regret_of(regret_rows(rows[~rows["policy"].map(_sees_future)])),
        "rows": json.loads(chosen.to_json(orient="records", double_precision=12)),
    }
    return {
        "kind": KIND,
        "sources": [_source(one) for one in judgements],
        "counts": counts,
        "all": whole,
        "groups": groups,
        "regret": regret,
        "not_measured": _not_measured(judgements, rows),
        "goals": _goals(counts, whole, regret),
        "rows": json.loads(rows.to_json(orient="records", double_precision=12)),
    }


def _sees_future(policy: object) -> bool:
    # Gatings have no policy, which pandas may turn into NaN.
    return isinstance(policy, str) and POLICIES[policy].sees_future


def _regret_of(chosen: pd.DataFrame) -> dict[str, Any]:
    """Returns how many choices there were, and their regret."""
    return {
        "choices": len(chosen),
        "median": float(chosen["regret"].median()) if len(chosen) else None,
        "worst": float(chosen["regret"].max()) if len(chosen) else None,
    }


def _source(one: Judgement) -> dict[str, Any]:
    facts = one.predictions.facts
    return {
        "verified": one.name,
        "predicted": one.predicted,
        "trace": one.trace,
        "model": facts["model"],
        "machine": one.machine,
        "hardware": one.content["hardware"],
        "versions": one.content["versions"],
        "calibrated_on": facts["calibrated_on"],
        "calibrated": facts["calibrated"],
        "predicted_on": facts["date"],
        "measured_on": one.content["date"],
        "command": one.content["command"],
        "notes": one.content["notes"],
        **{key: one.content[key] for key in ("printed", "beside") if key in one.content},
    }


def _not_measured(judgements: Sequence[Judgement], rows: pd.DataFrame) -> list[dict[str, str]]:
    """Returns settings that were predicted and not measured where others of them were."""
    found = []
    for predicted, machine in dict.fromkeys((one.predicted, one.machine) for one in judgements):
        (one, *_) = [each for each in judgements if each.predicted == predicted]
        own = rows[(rows["trace"] == one.trace) & (rows["machine"] == machine)]
        ran = set(own.loc[own["measured_ms"].notna(), "setting"])
        tried = set(own["setting"])
        found += [
            {
                "trace": one.trace,
                "machine": machine,
                "setting": name,
                "why": "no room" if name in tried else "not run",
            }
            for name in one.predictions.settings
            if name not in ran
        ]
    return found


def _goals(
    counts: Mapping[str, Any], whole: Mapping[str, Any], regret: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns every goal, what was found and whether it is met; None where nothing was found."""
    made = []

    def add(quantity: str, goal: str, found: str | None, met: bool | None) -> None:
        made.append({"quantity": quantity, "goal": goal, "found": found, "met": met})

    add(
        "Settings predicted, then measured",
        f"at least {LEAST_SETTINGS} over {LEAST_MODELS} models, {LEAST_POLICIES} policies, "
        f"{LEAST_CAPACITIES} capacities",
        f"{counts['settings']} over {counts['models']} models, {counts['policies']} policies, "
        f"{counts['capacities']} capacities",
        counts["settings"] >= LEAST_SETTINGS
        and counts["models"] >= LEAST_MODELS
        and counts["policies"] >= LEAST_POLICIES
        and counts["capacities"] >= LEAST_CAPACITIES,
    )
    rough = counts["not_to_tolerance"]
    add(
        f"Percentiles measured to {TOLERANCE:.0%}",
        "all",
        f"{whole['predictions'] - rough} of {whole['predictions']}",
        rough == 0 if whole["predictions"] else None,
    )
    coverage = whole["coverage"]
    add(
        "Measurements inside their stated 90% interval",
        f"{LEAST_COVERAGE:.0%} to {MOST_COVERAGE:.0%} of at least {LEAST_PREDICTIONS}",
        None
        if coverage is None
        else f"{coverage:.0%} of {whole['stated']} ({whole['coverage_low']:.0%} to "
        f"{whole['coverage_high']:.0%})",
        None
        if coverage is None
        else LEAST_COVERAGE <= coverage <= MOST_COVERAGE and whole["stated"] >= LEAST_PREDICTIONS,
    )
    medians = {name: each["0.5"] for name, each in whole["absolute_errors"].items()}
    own = medians["model"]
    add(
        "Median error of a predicted percentile",
        f"at most {MOST_MEDIAN_ERROR:.0%}",
        None if own is None else f"{own:.1%}",
        None if own is None else own <= MOST_MEDIAN_ERROR,
    )
    naive = {name: value for name, value in medians.items() if name != "model"}
    add(
        "The same over that of " + " and ".join(n for n in MODELS_OF_TIME if n != "model"),
        "at most a third of each",
        None
        if own is None
        else " and ".join(
            f"{own / value:.2f} of {value:.1%}" if value else "0" for value in naive.values()
        ),
        None if own is None else all(own <= value * MOST_OF_NAIVE for value in naive.values()),
    )
    for what, most in (("median", MOST_MEDIAN_REGRET), ("worst", MOST_REGRET)):
        value = regret[what]
        add(
            f"Regret of the setting recommended at equal memory, {what}",
            f"at most {most:.0%}",
            None if value is None else f"{value:.1%} over {regret['choices']} choices",
            None if value is None else value <= most,
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what the files say together and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.prediction_quality",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("verified", nargs="*", type=Path, metavar="VERIFIED")
    parser.add_argument("--predicted", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / RESULT, metavar="OUT")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)

    def write() -> tuple[Path, ...]:
        found = pooled(
            read_judgements(
                options.verified or sorted(RESULTS.glob("verified-*.json")),
                options.predicted or sorted(RESULTS.glob("predicted-*.json")),
            )
        )
        said = {"command": shlex.join(["python", "-m", "analysis.prediction_quality", *given])}
        for goal in found["goals"]:
            print(f"{_verdict(goal['met'])}: {goal['quantity']}: {goal['found']}, {goal['goal']}")
        return write_files({options.output: json.dumps({**said, **found}, indent=1) + "\n"})

    return command.run(write)


def _verdict(met: bool | None) -> str:
    if met is None:
        return "not measured"
    return "reached" if met else "missed"


if __name__ == "__main__":
    sys.exit(main())
