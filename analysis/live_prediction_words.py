"""Predictions in words and rows: coverage, what carries over from another machine, earlier rounds.

Leaves out the part of the page that they stand in (`analysis.live_prediction_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.carried_predictions import CONSTANTS
from analysis.live_goals import percent
from analysis.live_parts import date_said
from moeprof.replay.result import SEVERITY_FACT, Finding

_OWN = "its own calibration"


def coverage_words(each: Mapping[str, Any]) -> str:
    """Returns the share inside its interval with the exact interval of that share."""
    if each["coverage"] is None:
        return "no interval stated"
    return (
        f"{percent(each['coverage'])} of {each['stated']} ({percent(each['coverage_low'])} to "
        f"{percent(each['coverage_high'])})"
    )


def median_error(each: Mapping[str, Any], name: str = "model") -> float:
    """Returns the median of absolute errors.

    Args:
        each: As `analysis.judged_rows.quality_of` gives it.
        name: Of the model of time.
    """
    value: float = each["absolute_errors"][name]["0.5"]
    return value


def quality_words(each: Mapping[str, Any]) -> str:
    """Returns coverage, median error and regret."""
    if not each["predictions"]:
        return "nothing measured"
    regret = each["regret"]
    said = (
        f"{coverage_words(each)} inside, off by {100 * median_error(each):.1f}% (median; "
        f"{100 * each['median_signed_error']:+.1f}% with its sign)"
    )
    if regret["choices"]:
        said += f", regret at worst {100 * regret['worst']:.1f}%"
    return said


def machine_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per machine: coverage, errors, regret.

    Args:
        data: As `analysis.prediction_quality` writes it.
    """
    regret = {each["machine"]: each for each in data["regret"]["by_machine"]}
    return pd.DataFrame(
        {"machine": each["of"], **_quality_row(each), **_regret_row(regret[each["of"]])}
        for each in data["groups"]
        if each["by"] == "machine"
    )


def carried_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per machine's trials that predict another, its own on the same runs beside.

    Args:
        data: As `analysis.prediction_quality` writes it.
    """
    rows: list[dict[str, Any]] = []
    for each in (data.get("carried") or {"kinds": ()})["kinds"]:
        machines = " and ".join(each["machines"])
        for said, trials_on, own in (
            (_OWN, machines, each["own"]),
            (each["kind"], " and ".join(each["trials_on"]), each),
        ):
            row = {
                "machine": machines,
                "predicted_from": said,
                "trials_on": trials_on,
                **_quality_row(own),
                **_regret_row(own["regret"]),
            }
            if row not in rows:
                rows.append(row)
    return pd.DataFrame(rows)


def _quality_row(each: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "predictions": each["predictions"],
        "inside": each["inside"],
        "coverage_share": each["coverage"],
        "coverage_share_low": each["coverage_low"],
        "coverage_share_high": each["coverage_high"],
        "median_error_share": median_error(each),
        "median_signed_share": each["median_signed_error"],
    }


def _regret_row(each: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "choices": each["choices"],
        "median_regret_share": each["median"],
        "worst_regret_share": each["worst"],
    }


def carried_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Returns what trials on one machine said about another, in a sentence; none without."""
    kinds = (data.get("carried") or {"kinds": ()})["kinds"]
    if not kinds:
        return []
    said = []
    for each in kinds:
        trials = " and ".join(each["trials_on"])
        source = (
            f"its own constants and trials on {trials}"
            if each["kind"] == CONSTANTS
            else f"the calibration of {trials}, unchanged"
        )
        said.append(f"from {source}: {quality_words(each)}")
    owns = {quality_words(each["own"]): None for each in kinds}
    said += [f"from {_OWN}, on the same runs: {words}" for words in owns]
    machines = dict.fromkeys(machine for each in kinds for machine in each["machines"])
    text = f"{' and '.join(machines)} predicted {'; '.join(said)}. Only the last is held to goals."
    return [Finding(text=text, severity=SEVERITY_FACT + 3, section="predictions")]


def carried_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns what was carried over and never measured."""
    missing = (data.get("carried") or {"not_measured": ()})["not_measured"]
    if not missing:
        return []
    names = ", ".join(f"{each['carried']} ({each['machine']})" for each in missing)
    return [f"Carried over to a machine and not measured there: {names}."]


def earlier_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Returns what an earlier round came to, in a sentence or two; none without."""
    earlier = data.get("earlier")
    if earlier is None or not earlier["all"]["predictions"]:
        return []
    goals, sources = earlier["goals"], earlier["sources"]
    measured = sorted(each["measured_on"] for each in sources)
    versions = dict.fromkeys(
        f"{name} {each['versions'][name]}"
        for name in ("moeprof", "torch")
        for each in sources
        if name in each["versions"]
    )
    machines = "; ".join(
        f"{each['of']} {coverage_words(each)}, {100 * median_error(each):.1f}%"
        for each in earlier["groups"]
        if each["by"] == "machine"
    )
    calibrated = " and ".join(dict.fromkeys(each["calibrated_on"] for each in sources))
    missed = [goal["quantity"] for goal in goals if goal["met"] is False]
    text = (
        f"An earlier round, {date_said(measured[0])} to {date_said(measured[-1])}, with the "
        f"runtime and the cost model of then ({', '.join(versions)}), came to "
        f"{quality_words({**earlier['all'], 'regret': earlier['regret']})} over "
        f"{earlier['all']['predictions']} predictions from a calibration of {calibrated} "
        f"({machines})."
    )
    if missed:
        text += f" It missed {len(missed)} of {len(goals)} goals: {'; '.join(missed)}."
    return [Finding(text=text, severity=SEVERITY_FACT + 2, section="predictions")]


def probe_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns how steady hosts were while settings were measured, where that was watched."""
    said = []
    for each in data["sources"]:
        probe = each.get("host_probe_ms")
        if probe is not None:
            said.append(
                f"{each['trace']} on {each['machine']} {probe['least']:.2f} to "
                f"{probe['most']:.2f} ms (median {probe['median']:.2f} over {probe['visits']} "
                "visits)"
            )
    if not said:
        return []
    return [
        f"A fixed piece of work on the host, timed before every visit of a setting: "
        f"{'; '.join(said)}. It says how steady the host was; nothing is corrected by it."
    ]
