"""Predictions in words and rows: coverage, other machines, earlier rounds, and how fast hosts were.

Leaves out the part of the page that they stand in (`analysis.live_prediction_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.carried_predictions import CONSTANTS
from analysis.live_goals import percent
from analysis.live_parts import date_said
from analysis.prediction_quality import MOST_REGRET
from analysis.run_differences import LEAST_VISITS
from moeprof.replay.result import SEVERITY_FACT, Finding

_OWN = "its own calibration"
_MOST_CHOICES = 5


def coverage_words(each: Mapping[str, Any]) -> str:
    """Returns the share inside its interval with the exact interval of that share."""
    if each["coverage"] is None:
        return "no interval stated"
    return (
        f"{percent(each['coverage'])} of {each['stated']} ({percent(each['coverage_low'])} to "
        f"{percent(each['coverage_high'])})"
    )


def cluster_words(data: Mapping[str, Any]) -> str:
    """Returns the intervals of the coverage that do not take predictions for independent.

    Args:
        data: As `analysis.prediction_quality` writes it.
    """
    found = data.get("coverage_by_cluster") or {"intervals": ()}
    return ", ".join(
        f"by {each['by']} {percent(each['low'])} to {percent(each['high'])}"
        + (f" (the {each['clusters']} shares)" if "shares" in each else "")
        for each in found["intervals"]
    )


def coverage_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Returns how well the coverage is known, to which side it is missed, and what flatters it."""
    whole, found = data["all"], data.get("coverage_by_cluster")
    if found is None:
        return []
    drawn = ", and ".join(map(_drawn_whole, found["intervals"]))
    outside = whole["stated"] - whole["inside"]
    text = (
        f"The exact interval of {coverage_words(whole)} takes each prediction for one of its own. "
        f"They go together: in {found['cases_alike']} of {found['cases']} cases all percentiles of "
        "a setting on a machine are inside or all outside. "
        f"{drawn[:1].upper()}{drawn[1:]} (bootstraps have {found['draws']:,} draws, widened for "
        f"few). Of the {outside} outside "
        f"{whole['below']} were measured faster than the stated interval and {whole['above']} "
        "slower. "
    )
    by_percentile = [each for each in data["groups"] if each["by"] == "percentile"]
    if "raw_above" in whole:
        text += (
            "With nothing set aside, each step still by its median over repetitions, "
            f"{whole['whole_inside']} of {whole['stated']} are inside. Of percentiles of all "
            "repetitions of all steps together, which have the machine's own hiccups in them and "
            f"are not what is predicted, {whole['raw_inside']} of {whole['stated']}"
            + "".join(
                f", p{each['of']} {each['raw_inside']} of {each['stated']}"
                for each in by_percentile
            )
            + f": {whole['raw_below']} faster, {whole['raw_above']} slower."
        )
    return [Finding(text=text, severity=SEVERITY_FACT + 4, section="predictions")]


def _drawn_whole(each: Mapping[str, Any]) -> str:
    """Returns what an interval by clusters is, or what the shares of too few of them are."""
    if "shares" in each:
        shares = ", ".join(percent(share) for share in each["shares"])
        return (
            f"by {each['by']} the {each['clusters']} shares are {shares}: too few for an interval"
        )
    return (
        f"drawing each {each['by']} ({each['clusters']}) whole, the interval is "
        f"{percent(each['low'])} to {percent(each['high'])}"
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


def aside_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns how much was set aside while cores were slow, and what it changes."""
    said = [
        f"{each['aside_share']:.0%} of {each['trace']} on {each['machine']}"
        for each in data["sources"]
        if each.get("aside_share") is not None
    ]
    whole = data["all"]
    if not said or whole.get("whole_median_error") is None:
        return []
    text = (
        "Steps are set aside before or after which the core of the dispatching thread was found "
        f"slow, however long they took: {', '.join(said)}. With nothing set aside "
        f"{whole['whole_inside']} of {whole['stated']} would lie inside and the median error be "
        f"{100 * whole['whole_median_error']:.1f}%."
    )
    if whole.get("never_quiet"):
        text += (
            f" {whole['never_quiet']} percentiles are of settings some step of which was never "
            "found quiet: all times of such a step count."
        )
    return [text]


def host_speed_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per machine, model and speed of the host; empty where no host was timed.

    Args:
        data: As `analysis.prediction_quality` writes it.
    """
    return pd.DataFrame(
        {
            "machine": each["machine"],
            "model": each["model"],
            "probe_over_its_fastest": _bin_words(each),
            "visits": each["visits"],
            "p50_measured_over_predicted_share": each["ratio"],
            "p50_measured_over_predicted_share_low": each["ratio_low"],
            "p50_measured_over_predicted_share_high": each["ratio_high"],
            "inside": each["inside"],
            "inside_share": each["inside"] / each["stated"] if each["stated"] else None,
        }
        for each in (data.get("by_host_speed") or {"groups": ()})["groups"]
    )


def _bin_words(each: Mapping[str, Any]) -> str:
    if each["up_to"] is None:
        return f"over {each['above']:g}"
    return (
        f"{each['above']:g} to {each['up_to']:g}" if each["above"] else f"up to {each['up_to']:g}"
    )


def host_speed_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Returns what measurements were where hosts ran at full speed, and where they were slow."""
    groups = (data.get("by_host_speed") or {"groups": ()})["groups"]
    said = []
    for machine in dict.fromkeys(each["machine"] for each in groups):
        own = [each for each in groups if each["machine"] == machine]
        ends = (
            [each for each in own if not each["above"]],
            [each for each in own if each["up_to"] is None],
        )
        if all(ends):
            models = dict.fromkeys(each["model"] for each in own)
            ratios = ", ".join(
                f"{model.removesuffix('.gguf')} "
                + " and ".join(_ratio_of(end, model) for end in ends)
                for model in models
            )
            inside = " and ".join(
                f"{sum(each['inside'] for each in end)} of {sum(each['stated'] for each in end)}"
                for end in ends
            )
            said.append(f"on {machine} {ratios}; inside the stated interval {inside}")
    if not said:
        return []
    every = data["by_host_speed"]
    text = (
        f"In {every['slowest_bin']} of {every['visits']} visits of a setting the host was slow: a "
        f"fixed piece of work just before took over {every['slow']:g} times as long as in its "
        "fastest tenth. Measured over predicted p50 (medians over visits), first where the host "
        f"ran at its speed (within {every['fast']:g} times), then where it was slow: "
        f"{'. '.join(said)}. This is after the fact and part of no goal."
    ).replace(". on ", ". On ")
    return [Finding(text=text, severity=SEVERITY_FACT + 3, section="predictions")]


def run_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns how far runs lie apart whose visits were put together; nothing where none were."""
    every = data.get("runs_apart") or ()
    far = [each for each in every if each["ratio"] is not None]
    if not far:
        return []
    most = ", ".join(
        f"{each['model'].removesuffix('.gguf')} on {each['machine'].removeprefix('NVIDIA ')} "
        f"{each['ratio']:.2f} times ({each['setting']}: {each['low_ms']:.3g} to "
        f"{each['high_ms']:.3g} ms in {each['runs']} runs; median of {each['settings']} settings "
        f"{each['median_ratio']:.2f})"
        for each in far
    )
    known = sum(each["known_in_a_run"] for each in every)
    return [
        "Visits were added in later runs until a percentile was known, on hosts that differ, and "
        "are taken for draws of one: of settings with "
        f"{LEAST_VISITS} visits in two runs or more, the p50 of one run is up to so many times "
        f"that of another: {most}. {known} of {sum(each['percentiles'] for each in every)} "
        "percentiles are known to the same share from some run alone."
    ]


def _ratio_of(groups: Sequence[Mapping[str, Any]], model: str) -> str:
    found = [each["ratio"] for each in groups if each["model"] == model]
    return f"{found[0]:.2f}" if found else "none"


def regret_findings(data: Mapping[str, Any]) -> list[Finding]:
    """Returns which choices cost more than the goal allows, and how well that is known."""
    rows = data["regret"]["rows"]
    costly = sorted(
        (each for each in rows if each["regret"] > MOST_REGRET),
        key=lambda each: -each["regret"],
    )
    if not costly:
        return []
    # What one visit measured has no spread.
    sure = {
        (each["routing"], each["machine"], each["setting"], each["percentile"])
        for each in data["rows"]
        if each["measured_spread"] is not None
        and each["measured_spread"] <= data["counts"]["tolerance"]
    }
    certain = sum(
        all(
            (each["routing"], each["machine"], each[key], each["percentile"]) in sure
            for key in ("recommended", "best")
        )
        for each in costly
    )
    named = "; ".join(
        f"{each['recommended']} instead of {each['best']} ({each['routing']}, {each['machine']}, "
        f"p{each['percentile']}) {100 * each['regret']:.0f}%"
        for each in costly[:_MOST_CHOICES]
    )
    text = (
        f"{len(costly)} of {len(rows)} choices cost more than {percent(MOST_REGRET)} over the best "
        f"measured"
        + (f", the {_MOST_CHOICES} costliest" if len(costly) > _MOST_CHOICES else "")
        + f": {named}. In {certain} of them both settings are known to "
        f"{percent(data['counts']['tolerance'])}."
    )
    return [Finding(text=text, severity=SEVERITY_FACT + 3, section="predictions")]


def not_measured_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns which predicted settings were not measured, and why, together where it is alike."""
    missing = data["not_measured"]
    if not missing:
        return ["Every setting that was predicted was measured."]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for each in missing:
        key = (each["trace"], each["machine"], each["why"])
        alike.setdefault(key, []).append(each["setting"])
    words = "; ".join(
        f"{len(names)} of {trace} on {machine}, {why} ({', '.join(names)})"
        for (trace, machine, why), names in alike.items()
    )
    return [
        f"{len(missing)} settings were predicted for a machine and not measured there: {words}."
    ]
