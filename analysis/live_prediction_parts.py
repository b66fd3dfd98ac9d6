"""Predictions held to measurements, and memory against latency, as parts of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.live_goals import GIB, Goal, not_measured, percent
from analysis.live_parts import (
    Addition,
    beside_banners,
    date_said,
    figure_data,
    pooled_part,
    result_section,
    rows_table,
)
from analysis.live_prediction_drawings import draw_memory_latency, draw_predictions
from analysis.live_prediction_words import (
    aside_notes,
    carried_findings,
    carried_notes,
    carried_rows,
    cluster_words,
    coverage_findings,
    coverage_words,
    earlier_findings,
    host_speed_findings,
    host_speed_rows,
    machine_rows,
    median_error,
    not_measured_notes,
    probe_notes,
    regret_findings,
    run_notes,
)
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described
from moeprof.reporting.layout import FigureData

_COMMAND = "`moeprof verify`, `-m analysis.prediction_quality`"
_LATENCY_COMMAND = "`-m analysis.memory_latency`"
_WANTED = (
    ("Settings predicted, then measured on two kinds of GPU",
     "at least 48 over 3 models, 4 policies, 4 capacities"),
    ("Measurements inside their stated 90% interval", "85% to 95% of at least 200"),
    ("Median error of a predicted percentile", "at most 5%, and a third of the naive models'"),
    ("Regret of the setting recommended at equal memory", "median at most 2%, worst 10%"),
)  # fmt: skip
_MOST_NAMED = 6
_LISTED: Mapping[str, str] = {
    "machine": "machine", "trace": "trace", "setting": "setting", "percentile": "percentile",
    "predicted_ms": "predicted_ms", "low_ms": "predicted_ms_low", "high_ms": "predicted_ms_high",
    "measured_ms": "measured_ms", "raw_ms": "raw_ms", "measured_spread": "measured_spread_share",
    "error": "error_share", "inside": "inside",
    "naive_bandwidth_error": "naive_bandwidth_error_share",
    "naive_mean_error": "naive_mean_error_share",
}  # fmt: skip
"""Columns of a prediction that the page shows, and what they are named there by what they hold."""


def prediction_goals(data: Mapping[str, Any] | None) -> list[Goal]:
    """Returns what predictions are held to."""
    if data is None:
        return not_measured("predictions", *_WANTED)
    return [
        Goal(
            quantity=goal["quantity"],
            goal=goal["goal"],
            found="not measured" if goal["found"] is None else goal["found"],
            met=goal["met"],
            section="predictions",
        )
        for goal in data["goals"]
    ]


def prediction_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns every prediction and its measurement."""
    return pd.DataFrame(data["rows"])


def prediction_tables(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Returns what is written as CSV: predictions, and those carried over where there are any."""
    carried = (data.get("carried") or {"rows": ()})["rows"]
    return {
        "predictions": prediction_rows(data),
        **({"carried-predictions": pd.DataFrame(carried)} if carried else {}),
    }


def predictions_part(data: Mapping[str, Any]) -> Described:
    """Returns how good predictions were, over all machines and traces."""
    whole, counts, regret = data["all"], data["counts"], data["regret"]
    rows = prediction_rows(data)
    naive = [name for name in whole["absolute_errors"] if name != "model"]
    metrics = [
        _metric("predictions/coverage", whole["coverage"], whole["coverage_low"],
                whole["coverage_high"], note="exact binomial interval of 90%, as if independent"),
        *(
            _metric(f"predictions/median error/{name}", median_error(whole, name))
            for name in ("model", *naive)
        ),
        _metric("predictions/regret/median", regret["median"]),
        _metric("predictions/regret/worst", regret["worst"]),
    ]  # fmt: skip
    labels = {
        "predictions/coverage": "Measurements inside their stated 90% interval",
        "predictions/median error/model": "Median error of the cost model",
        **{f"predictions/median error/{name}": f"Median error of {name}" for name in naive},
        "predictions/regret/median": "Regret of what is recommended at equal memory, median",
        "predictions/regret/worst": "The same, worst",
    }
    missed = [goal for goal in data["goals"] if goal["met"] is False]
    findings = [
        Finding(
            text=f"{_said(goal['quantity'])}: {goal['found']}; the goal was {goal['goal']}.",
            severity=SEVERITY_COST,
            section="predictions",
        )
        for goal in missed
    ]
    if whole["predictions"]:
        others = " and ".join(f"{percent(median_error(whole, n))} ({n})" for n in naive)
        findings.append(
            Finding(
                text=f"Over {whole['predictions']} predictions of {counts['settings']} settings "
                f"the cost model is off by {100 * median_error(whole, 'model'):.1f}% (median), "
                f"naive models by {others}; {coverage_words(whole)} lie inside their stated 90% "
                "interval.",
                severity=SEVERITY_COST + 1,
                section="predictions",
                metric="predictions/coverage",
            )
        )
    if regret["choices"]:
        findings.append(
            Finding(
                text="Taking the setting that the model recommends costs "
                f"{100 * regret['median']:.1f}% (median of {regret['choices']} choices at equal "
                f"memory) and at worst {100 * regret['worst']:.1f}% over the best measured.",
                severity=SEVERITY_FACT + 4,
                section="predictions",
                metric="predictions/regret/median",
            )
        )
    findings += [*coverage_findings(data), *regret_findings(data), *_where_it_is_off(data)]
    findings += [
        *host_speed_findings(data), *carried_findings(data), *earlier_findings(data),
    ]  # fmt: skip
    result = Result(
        name="predictions",
        title="Predicted against measured",
        table=rows,
        metrics=tuple(metric for metric in metrics if metric.value is not None),
        findings=tuple(findings),
        notes=(
            "An error is predicted over measured, less 1; median errors are of absolute values. A "
            "prediction is a percentile (p50 or p99) of the step times of one setting on one "
            "machine, each step by its median over repetitions. Against percentiles of all "
            f"repetitions of all steps {whole['raw_inside']} of {whole['stated']} would lie inside"
            + (
                f" and the median error be {100 * whole['raw_median_error']:.1f}%."
                if whole["raw_median_error"] is not None
                else "."
            ),
            "Naive models: bytes over bandwidth (bytes copied over the link's, bytes of active "
            "experts over the device's), and the mean step of everything done one after another.",
            "Settings compete at equal memory on one machine, for one trace and percentile; regret "
            "is the time of the recommended over that of the best measured, less 1."
            + _without_future(regret),
            *probe_notes(data),
            *aside_notes(data),
            *carried_notes(data),
            f"{counts['not_to_tolerance']} of {whole['predictions']} percentiles are not known to "
            f"{percent(counts['tolerance'])} (half of the 90% interval over visits and "
            "repetitions).",
            *run_notes(data),
            *not_measured_notes(data),
        ),
    )
    section = result_section(
        result,
        question="Does the setting do on the machine what was said before?",
        labels=labels,
        figures=[_coverage_figure(data), _error_figure(data)],
        tables=[
            rows_table("By machine", machine_rows(data)),
            rows_table(
                "By speed of the host before a visit, after the fact and held to no goal",
                host_speed_rows(data),
            ),
            rows_table("By machine, model, percentile and kind", _group_rows(data)),
            rows_table("From another machine's trials, held to no goal", carried_rows(data)),
            rows_table(
                "Every choice at equal memory",
                pd.DataFrame(regret["rows"]).rename(columns={"regret": "regret_share"}),
            ),
            rows_table("Every prediction", rows[list(_LISTED)].rename(columns=_LISTED)),
        ],
        headline=[
            metric.name
            for metric in result.metrics
            if metric.name in {"predictions/coverage", "predictions/median error/model",
                               "predictions/regret/median", "predictions/regret/worst"}
        ],
    )  # fmt: skip
    sources = data["sources"]
    met = sum(goal["met"] is True for goal in data["goals"])
    return pooled_part(
        "predictions",
        [{**each, "date": each["measured_on"]} for each in sources],
        command=data["command"],
        title="Predictions",
        verdict=f"Predictions written before the run reached {met} of {len(data['goals'])} goals"
        + (
            f": {coverage_words(whole)} inside their interval."
            if whole["coverage"] is not None
            else "."
        ),
        routing=[f"{each['trace']}: {each['notes'][1]}" if len(each["notes"]) > 1 else each["trace"]
                 for each in sources],
        facts={
            "Calibrated": "; ".join(
                dict.fromkeys(
                    f"{each['calibrated_on']}, {date_said(each['calibrated'])}" for each in sources
                )
            ),
            "Predicted": "; ".join(
                dict.fromkeys(
                    f"{each['predicted']}, {date_said(each['predicted_on'])}" for each in sources
                )
            ),
        },
        banners=beside_banners(sources),
        sections=[section],
        findings=result.findings,
    )  # fmt: skip


def _where_it_is_off(data: Mapping[str, Any]) -> list[Finding]:
    """Returns to which side measurements fall by machine, and where a naive model is closer."""
    sides = [
        f"{each['of']}: off by {100 * median_error(each, 'model'):.1f}% (median; "
        f"{100 * each['median_signed_error']:+.1f}% with its sign), of "
        f"{each['stated']} measured {each['below']} faster and {each['above']} slower than the "
        f"stated interval{_slower(data, each['of'])}"
        for each in data["groups"]
        if each["by"] == "machine" and each["stated"]
    ]
    closer = [
        f"{each['of']}, {name} {100 * value['0.5']:.1f}% against the model's "
        f"{100 * median_error(each, 'model'):.1f}%"
        for each in data["groups"]
        if each["by"] == "machine and model"
        for name, value in each["absolute_errors"].items()
        if name != "model" and value["0.5"] < median_error(each, "model")
    ]
    made = []
    if sides:
        made.append(f"{'; '.join(sides)}. {_calibration_words(data)}")
    if closer:
        made.append(f"A naive model is closer on {'; '.join(closer)}.")
    return [Finding(text=text, severity=SEVERITY_FACT + 3, section="predictions") for text in made]


def _calibration_words(data: Mapping[str, Any]) -> str:
    """Returns whose calibration predictions come from."""
    sources = data["sources"]
    if all(each["calibrated_on"] == each["machine"] for each in sources):
        return "Each machine was predicted from its own calibration."
    calibrated = list(dict.fromkeys(each["calibrated_on"] for each in sources))
    if len(calibrated) == 1:
        return f"All were predicted from a calibration of {calibrated[0]}."
    return f"They were predicted from calibrations of {' and '.join(calibrated)}."


def _slower(data: Mapping[str, Any], machine: str) -> str:
    """Returns which settings were slower than their interval, in the order they were run."""
    own = dict.fromkeys(
        f"{each['setting']} of {each['trace']}"
        for each in data["rows"]
        if each["machine"] == machine
        and each["inside"] is False
        and each["measured_ms"] > each["high_ms"]
    )
    return f" ({', '.join(own)})" if 0 < len(own) <= _MOST_NAMED else ""


def _own_regret(regret: Mapping[str, Any]) -> str:
    """Returns the regret among what can be run, as a part of a row."""
    own = regret["without_future"]
    if not own["choices"] or own == {key: regret.get(key) for key in own}:
        return ""
    return (
        f"; of policies that do not know the future {100 * own['median']:.1f}%, "
        f"{100 * own['worst']:.1f}%"
    )


def _without_future(regret: Mapping[str, Any]) -> str:
    """Returns the regret where nothing competes that knows the future."""
    own = regret["without_future"]
    if not own["choices"]:
        return ""
    return (
        f" Without policies that know the future: median {100 * own['median']:.1f}% of "
        f"{own['choices']} choices, worst {100 * own['worst']:.1f}%."
    )


def _metric(
    name: str,
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> Metric:
    return Metric(
        name=name, value=value, unit="share", figure_class="measured", low=low, high=high,
        better=None if low is not None else "lower", note=note,
    )  # fmt: skip


def _said(quantity: str) -> str:
    return quantity[:1].upper() + quantity[1:]


def _group_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "by": each["by"],
            "of": each["of"],
            "predictions": each["predictions"],
            "inside": each["inside"],
            "coverage_share": each["coverage"],
            "coverage_share_low": each["coverage_low"],
            "coverage_share_high": each["coverage_high"],
            "median_signed_share": each["median_signed_error"],
            **{
                f"{name.replace(' ', '_')}_error_share": median_error(each, name)
                for name in each["absolute_errors"]
            },
        }
        for each in [{"by": "all", "of": "all", **data["all"]}, *data["groups"]]
    )


def _coverage_figure(data: Mapping[str, Any]) -> FigureData:
    groups = [{"by": "all", "of": "all"} | data["all"], *data["groups"]]
    stated = [each for each in groups if each["coverage"] is not None]
    return figure_data(
        "coverage",
        "meters",
        "Measurements inside their stated 90% interval",
        alt="; ".join(f"{each['of']} {coverage_words(each)}" for each in stated)
        or "No interval was stated.",
        how="The whiskers are the exact 90% interval of a share of so many predictions, each taken "
        "for one of its own, which they are not; the goal is 85% to 95% of all.",
        panels=[
            {
                "rows": [
                    {
                        "label": f"{_group_name(each)}: {each['inside']} of {each['stated']}",
                        "key": "recorded",
                        "value": each["coverage"],
                        "unit": "share",
                        "low": each["coverage_low"],
                        "high": each["coverage_high"],
                    }
                    for each in stated
                ]
            }
        ],
    )


def _error_figure(data: Mapping[str, Any]) -> FigureData:
    groups = [{"by": "all", "of": "all"} | data["all"]]
    groups += [each for each in data["groups"] if each["by"] == "machine"]
    known = [each for each in groups if each["predictions"]]
    keys = ("recorded", "shuffled", "uniform")
    return figure_data(
        "errors",
        "layers",
        "Median error, the cost model beside naive ones",
        alt="; ".join(
            f"{each['of']} {100 * median_error(each, 'model'):.1f}%" for each in known
        ),
        how="Lower is better: the median over predictions of |predicted over measured, less 1|.",
        panels=[
            {
                "title": "median errors",
                "x_label": "predictions",
                "y_label": "median error",
                "y_unit": "share",
                "category": "predictions",
                "categories": [str(each["of"]).removeprefix("NVIDIA ") for each in known],
                "series": [
                    {"key": key, "label": name, "low": None, "high": None,
                     "values": [median_error(each, name) for each in known]}
                    for key, name in zip(keys, data["all"]["absolute_errors"], strict=True)
                ],
            }
        ],
    )  # fmt: skip


def _group_name(each: Mapping[str, Any]) -> str:
    return f"p{each['of']}" if each["by"] == "percentile" else str(each["of"])


def prediction_readme_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns rows of the README's table."""
    whole, counts, regret = data["all"], data["counts"], data["regret"]
    if not whole["predictions"]:
        return []
    goals = {goal["quantity"]: goal for goal in data["goals"]}
    naive = [name for name in whole["absolute_errors"] if name != "model"]
    others = ", ".join(f"{name} {percent(median_error(whole, name))}" for name in naive)
    clusters = cluster_words(data)
    rows = [
        (
            f"Step times predicted before they were measured: {counts['settings']} settings, "
            f"{counts['models']} models, {counts['machines']} GPUs; inside their 90% interval",
            coverage_words(whole) + (f"; {clusters}" if clusters else ""),
            "85% to 95%" + _missed(goals, "Measurements inside"),
            _COMMAND,
        ),
        (
            "median error of these (naive models: " + ", ".join(naive) + ")",
            f"{100 * median_error(whole, 'model'):.1f}% ({others})",
            "5%" + _missed(goals, "Median error"),
            _COMMAND,
        ),
    ]
    if regret["choices"]:
        rows.append(
            (
                f"regret of what is recommended at equal memory, {regret['choices']} choices",
                f"median {100 * regret['median']:.1f}%, worst {100 * regret['worst']:.1f}%"
                + _own_regret(regret),
                "2%, 10%" + _missed(goals, "Regret"),
                _COMMAND,
            )
        )
    return rows


def _missed(goals: Mapping[str, Mapping[str, Any]], begins: str) -> str:
    own = [goal["met"] for name, goal in goals.items() if name.startswith(begins)]
    count = sum(met is False for met in own)
    if not count:
        return ""
    return ", missed" if len(own) == 1 else f", {count} missed"


def latency_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per setting: predicted p95 beside every other account of it."""
    rows = []
    flat = {each["setting"]: each for each in data["token_major"]}
    alone = {each["setting"]: each for each in data["hit_rate_alone"]}
    machines = list(dict.fromkeys(each["machine"] for each in data["measured"]))
    measured = {(each["machine"], each["setting"]): each for each in data["measured"]}
    for each in data["predicted"]:
        name = each["setting"]
        row = {
            "setting": name,
            "device_bytes": each["device_bytes"],
            "judged_hit_rate": each["judged_hit_rate"],
            "predicted_p95_ms": each["p95_ms"],
            "predicted_p95_ms_low": each["low_ms"],
            "predicted_p95_ms_high": each["high_ms"],
        }
        for machine in machines:
            row[f"measured, {machine}_ms"] = measured.get((machine, name), {}).get("p95_ms")
        row["token-flattened_ms"] = flat.get(name, {}).get("p95_ms")
        row["hit rate alone_ms"] = alone.get(name, {}).get("p95_ms")
        rows.append(row)
    return pd.DataFrame(rows)


def latency_tables(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Returns what is written as CSV: settings, and those of other machines by their names."""
    return {
        "memory-latency": latency_rows(data),
        **{
            "memory-latency-" + re.sub(r"[^a-z0-9]+", "-", each["calibrated_on"].lower()): (
                latency_rows(each)
            )
            for each in data.get("others", ())
        },
    }


def latency_part(data: Mapping[str, Any]) -> Described:
    """Returns memory against p95 latency."""
    rows = latency_rows(data)
    taken = data["recommended"]
    budget = data["budget_bytes"]
    found = {each["setting"]: each for each in data["predicted"]}
    metrics, labels = [], {}
    for each in data["predicted"]:
        key = f"latency/p95/{each['setting']}"
        labels[key] = f"Predicted p95, {each['setting']}"
        metrics.append(
            Metric(
                name=key, value=each["p95_ms"], unit="ms", figure_class="estimate",
                low=each["low_ms"], high=each["high_ms"], better="lower",
            )
        )  # fmt: skip
    every = [data, *data.get("others", ())]
    findings = [
        _recommended(
            each, next(row for row in each["predicted"] if row["setting"] == each["recommended"])
        )
        for each in every
        if each["recommended"] is not None
    ]
    differ = [_furthest(each) for each in every]
    findings += [each for each in differ if each is not None]
    tokens = data["tokens_per_judged_step"]
    result = Result(
        name="latency",
        title="Memory against p95 latency",
        table=rows,
        metrics=tuple(metrics),
        findings=tuple(findings),
        notes=(
            "Token-flattened: misses of a replay that takes one token after another, in the same "
            "cost model; "
            + (
                "judged steps hold one token, so that only the steps of prompts differ."
                if tokens == 1
                else f"judged steps hold {tokens:.1f} tokens that run together."
            ),
            "Hit rate alone: the time without a buffer, plus misses of a mean judged step by the "
            "time of a copy; nothing overlaps and every step misses alike. Hit rates are of the "
            "judged steps, what the others miss (a prompt into an empty buffer) is not in them.",
            "The frontier has as few copies as any policy can do with so many slots (MIN, free to "
            "pass an expert through), decides for nothing, and no copy waits for a slot. Settings "
            "that compute on the host, copy ahead, or hold all experts do not copy what it copies "
            "when it copies, and may be below it.",
        ),
    )
    section = result_section(
        result,
        question="What does memory buy, and would a simpler account have said so?",
        labels=labels,
        figures=[_latency_figure(data)],
        tables=[
            rows_table("Every setting", rows),
            *(
                rows_table(f"Every setting, {each['calibrated_on']}", latency_rows(each))
                for each in every[1:]
            ),
        ],
        headline=[f"latency/p95/{name}" for name in dict.fromkeys([taken, "unbuffered"])
                  if name in found],
    )  # fmt: skip
    sources = [source for each in every for source in each["sources"]]
    return pooled_part(
        "latency",
        sources
        or [
            {"hardware": {"device_name": data["calibrated_on"]}, "versions": {},
             "date": data["predicted_on"]}
        ],
        command=data["command"],
        title="Memory against latency",
        verdict="No setting fits into the budget."
        if taken is None
        else f"Within {budget / GIB:.1f} GiB the model recommends "
        + ", ".join(
            f"{each['recommended']} ({each['calibrated_on']})" for each in every
        )
        + ".",
        routing=[f"{data['routing']['trace']} ({data['routing']['model']})"],
        facts={
            "Calibrated": "; ".join(
                f"{each['calibrated_on']}, {date_said(each['calibrated'])}" for each in every
            ),
            "Predicted": "; ".join(date_said(each["predicted_on"]) for each in every),
            "Steps": f"{data['judged_steps']} judged, {data['layers']} layers",
        },
        banners=beside_banners(sources)
        if sources
        else ["Predicted only: nothing of it was measured yet."],
        sections=[section],
        findings=findings,
        figure_class="measured" if sources else "estimate",
    )  # fmt: skip


def _recommended(data: Mapping[str, Any], taken: Mapping[str, Any]) -> Finding:
    """Returns what is recommended within the budget and what it costs over the best measured."""
    words = [
        f"Within {data['budget_bytes'] / GIB:.1f} GiB of experts on the device the model "
        f"recommends {taken['setting']}: p95 {taken['p95_ms']:.0f} ms predicted"
    ]
    sizes = {each["setting"]: each["device_bytes"] for each in data["predicted"]}
    for machine in dict.fromkeys(each["machine"] for each in data["measured"]):
        own = {
            each["setting"]: each["p95_ms"]
            for each in data["measured"]
            if each["machine"] == machine and sizes[each["setting"]] <= data["budget_bytes"]
        }
        if taken["setting"] in own:
            best = min(own, key=own.__getitem__)
            words.append(
                f"{own[taken['setting']]:.0f} ms on {machine}, the best there "
                f"{own[best]:.0f} ms ({best})"
            )
    return Finding(
        text="; ".join(words) + ".",
        severity=SEVERITY_FACT + 2,
        section="latency",
        metric=f"latency/p95/{taken['setting']}",
    )


def _furthest(data: Mapping[str, Any]) -> Finding | None:
    """Returns how far off the other accounts are, in the median over settings measured."""
    accounts = {
        "the cost model": data["predicted"],
        "a token-flattened replay": data["token_major"],
        "a hit rate alone": data["hit_rate_alone"],
    }
    common = {each["setting"] for each in data["hit_rate_alone"]}
    errors = {}
    for name, rows in accounts.items():
        said = {each["setting"]: each["p95_ms"] for each in rows}
        own = [
            abs(said[each["setting"]] / each["p95_ms"] - 1)
            for each in data["measured"]
            if each["setting"] in common
        ]
        if own:
            errors[name] = float(pd.Series(own).median())
    if not errors:
        return None
    return Finding(
        text="Median error of the p95 of buffers that copy what they miss, predicted for "
        f"{data['calibrated_on']}: "
        + ", ".join(f"{100 * value:.1f}% by {name}" for name, value in errors.items())
        + ".",
        severity=SEVERITY_FACT + 1,
        section="latency",
    )


def _latency_figure(data: Mapping[str, Any]) -> FigureData:
    def points(rows: list[dict[str, Any]], policy: str | None = None) -> list[list[float | None]]:
        chosen = [each for each in rows if policy is None or each["policy"] == policy]
        return [
            [each["device_bytes"] / GIB, each["p95_ms"], each.get("low_ms"), each.get("high_ms")]
            for each in sorted(chosen, key=lambda each: each["device_bytes"])
        ]

    was_measured = {each["setting"] for each in data["measured"]}
    copying = [
        each
        for each in data["predicted"]
        if each["kind"] == "load"
        and not each.get("ahead")
        and (each["setting"] in was_measured or not was_measured)
    ]
    keys = ("recorded", "shuffled", "uniform", "dynamic_loop")
    policies = list(dict.fromkeys(each["policy"] for each in copying))
    series = [
        {"key": key, "label": f"{policy}, predicted", "points": points(copying, policy)}
        for key, policy in zip(keys, policies, strict=False)
    ]
    series.append({"key": "dense", "label": "frontier", "points": points(data["frontier"])})
    machines = list(dict.fromkeys(each["machine"] for each in data["measured"]))
    names = {each["setting"] for each in copying}
    for key, machine in zip(("goal", "grouped_mm"), machines, strict=False):
        own = [
            each
            for each in data["measured"]
            if each["machine"] == machine and each["setting"] in names
        ]
        label = f"measured, {machine}"
        series.append({"key": key, "label": label, "points": points(own), "marks": True})
    drawn = figure_data(
        "latency",
        "lines",
        "Memory of the experts on the device against p95 latency",
        alt="; ".join(
            f"{each['setting']} {each['device_bytes'] / GIB:.1f} GiB {each['p95_ms']:.0f} ms"
            for each in copying
        )
        or "No buffer that copies was predicted.",
        how="Left and low is better. Ranges are stated 90% intervals. The frontier has as few "
        "copies as can be. Drawn are buffers that copy what they miss as it comes, of those "
        "measured if any were; memory-latency.png, drawn beside the page, has other kinds too, and "
        "the table has every setting.",
        panels=[
            {
                "title": "p95 of a step",
                "x_label": "GiB of experts on the device",
                "x_scale": "linear",
                "y_label": "ms",
                "y_unit": "ms",
                "series": series,
            }
        ],
    )
    return FigureData(**{**drawn, "figure_class": "estimate"})


def latency_goals(data: Mapping[str, Any] | None) -> list[Goal]:
    """Returns none: what is predicted is held to goals with the other predictions."""
    return []


def latency_readme_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns none: the README shows the figure."""
    return []


PREDICTIONS = Addition(
    part=predictions_part,
    goals=prediction_goals,
    readme_rows=prediction_readme_rows,
    rows=prediction_tables,
    drawings={"predictions.png": draw_predictions},
)
LATENCY = Addition(
    part=latency_part,
    goals=latency_goals,
    readme_rows=latency_readme_rows,
    rows=latency_tables,
    drawings={"memory-latency.png": draw_memory_latency},
)
