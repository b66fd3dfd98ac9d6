"""Expert parallelism on several GPUs, as a part of the page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

from analysis.live_goals import Goal, not_measured, percent
from analysis.live_parts import (
    Addition,
    beside_banners,
    figure_data,
    part,
    result_section,
    rows_table,
)
from analysis.live_styles import COLOURS, INK, STYLE, save
from moeprof.live.parallel_corrections import CorrectedStep, corrected_step
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described
from moeprof.reporting.layout import TableData

TOLERANCE = 1e-2
"""Largest relative error of the timed kernel against one device: roundings to bfloat16."""
_COMMAND = "`-m analysis.gpu.expert_parallel`"
# Some files say so of ranges that they took over one trace and number of tokens.
_FORMER_BAR = "; error bar: the range of measured over predicted of all settings here"
_HEADINGS: Mapping[str, str] = {
    "error_share": "median_signed_error_share",
    "size_of_error_share": "median_absolute_error_share",
    "measured_over_predicted_share": "median_measured_over_predicted_share",
    "measured_over_predicted_share_low": "median_measured_over_predicted_share_low",
    "measured_over_predicted_share_high": "median_measured_over_predicted_share_high",
}
"""What columns of `error_rows` are medians of, as the page heads them."""


def setting_of(row: Mapping[str, Any]) -> str:
    """Returns the planner, and how many slots it adds."""
    extra = row["num_redundant"]
    return str(row["planner"]) + (f" +{extra}" if extra else "")


def step_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per trace, number of tokens and setting: measured beside predicted."""
    return pd.DataFrame(
        {
            "trace": each["trace"],
            "num_devices": row["num_devices"],
            "setting": setting_of(row),
            "num_tokens": row["num_tokens"],
            "num_passes_joined": row["num_passes_joined"],
            "max_over_mean": row["max_over_mean"],
            "step_ms": row["step_ms"],
            "predicted_ms": row["predicted_ms"],
            "error_share": row["predicted_ms"] / row["step_ms"] - 1,
            "num_repetitions": len(row["times_ms"]),
        }
        for each in data["traces"]
        for row in each["steps"]
    )


def scaling_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per trace, devices, tokens and setting: estimates with their bars.

    Corrected here, by the steps that were measured: some files hold what is not corrected only.
    """
    found = []
    for each in data["traces"]:
        for row in each["scaling"]:
            uncorrected_ms = uncorrected_of(row)
            corrected = corrected_step(uncorrected_ms, ratios_of(each, row["num_tokens"]))
            found.append(
                {
                    "trace": each["trace"],
                    "num_devices": row["num_devices"],
                    "setting": setting_of(row),
                    "num_tokens": row["num_tokens"],
                    "max_over_mean": row["max_over_mean"],
                    "estimate_ms": corrected.step_ms,
                    "estimate_ms_low": corrected.low_ms,
                    "estimate_ms_high": corrected.high_ms,
                    "uncorrected_ms": uncorrected_ms,
                }
            )
    return pd.DataFrame(found)


def not_estimated_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns what was not estimated for more devices: a row per trace, devices and reason.

    Empty where everything was, and of results that do not say.
    """
    found: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for trace in data["traces"]:
        for each in sorted(trace.get("not_estimated", ()), key=lambda row: row["num_devices"]):
            key = (trace["trace"], each["num_devices"], each["reason"])
            found.setdefault(key, []).append(each)
    return pd.DataFrame(
        {
            "trace": trace,
            "num_devices": num_devices,
            "placements": _placements_said(every),
            "wanted_most": _placements_said([each for each in every if each["wanted"]]),
            "reason": reason,
        }
        for (trace, num_devices, reason), every in found.items()
    )


def _placements_said(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the placements of rows of ``not_estimated``; one without a name stands for all."""
    if not rows:
        return "none"
    if any(each["setting"] is None for each in rows):
        return "all"
    return ", ".join(str(each["setting"]).replace("+", " +") for each in rows)


def uncorrected_of(row: Mapping[str, Any]) -> float:
    """Returns an estimate for more devices as the arithmetic has it.

    Args:
        row: Of ``scaling``; where it has no ``uncorrected_ms``, its ``step_ms`` is not corrected.
    """
    return float(row.get("uncorrected_ms", row["step_ms"]))


def ratios_of(trace: Mapping[str, Any], num_tokens: int) -> list[float]:
    """Returns measured over predicted of the steps of a trace that had so many tokens."""
    return [
        row["step_ms"] / row["predicted_ms"]
        for row in trace["steps"]
        if row["num_tokens"] == num_tokens
    ]


def error_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per trace and number of tokens: how far off its predictions were.

    Errors are predicted over measured, less 1: negative where a step took longer.
    """
    found = []
    for each in data["traces"]:
        for num_tokens in sorted({row["num_tokens"] for row in each["steps"]}):
            ratios = ratios_of(each, num_tokens)
            errors = [1 / ratio - 1 for ratio in ratios]
            spread = corrected_step(1.0, ratios)
            found.append(
                {
                    "trace": each["trace"],
                    "num_tokens": num_tokens,
                    "num_steps": len(ratios),
                    "num_too_short": sum(error < 0 for error in errors),
                    "error_share": statistics.median(errors),
                    "size_of_error_share": statistics.median(map(abs, errors)),
                    "measured_over_predicted_share": spread.step_ms,
                    "measured_over_predicted_share_low": spread.low_ms,
                    "measured_over_predicted_share_high": spread.high_ms,
                }
            )
    return pd.DataFrame(found)


def loads_equal(data: Mapping[str, Any]) -> tuple[int, int]:
    """Returns dispatches whose rows reached every device as replayed, and those checked."""
    rows = [row for each in data["traces"] for row in each["loads"]]
    equal = sum(0 if row["num_rows_lost"] else row["num_equal"] for row in rows)
    return equal, sum(row["num_dispatches"] for row in rows)


@dataclass(frozen=True, kw_only=True)
class CheckedDispatches:
    """What the checks of loads were of; each dispatch counts once, however many its placements.

    Attributes:
        num_dispatches: Whose loads were checked.
        num_of_layers: All dispatches of the layers checked.
        num_layers: Of all traces together.
        num_placements: The fewest of any layer.
    """

    num_dispatches: int
    num_of_layers: int
    num_layers: int
    num_placements: int

    @property
    def said(self) -> str:
        """What was checked of how much, in words."""
        return (
            f"{self.num_dispatches:,} of {self.num_of_layers:,} dispatches at "
            f"{_counted(self.num_layers, 'layer')}, {_counted(self.num_placements, 'placement')}"
        )


def dispatches_checked(data: Mapping[str, Any]) -> CheckedDispatches:
    """Returns what the checks of loads were of, over all traces."""
    rows = pd.DataFrame(
        {"trace": each["trace"], **row} for each in data["traces"] for row in each["loads"]
    )
    if not len(rows):
        return CheckedDispatches(num_dispatches=0, num_of_layers=0, num_layers=0, num_placements=0)
    by_site = rows.groupby(["trace", "site"])
    checked, whole = by_site["num_dispatches"].max(), by_site["num_dispatches_of_trace"].max()
    return CheckedDispatches(
        num_dispatches=int(checked.sum()),
        num_of_layers=int(whole.sum()),
        num_layers=len(checked),
        num_placements=int(by_site["setting"].nunique().min()),
    )


def _counted(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def outputs_equal(data: Mapping[str, Any]) -> tuple[int, int]:
    """Returns checks in which outputs are those of one device, and all: two of every setting.

    To the bit on narrow experts in float32; the timed kernel at full size within `TOLERANCE`.
    """
    exact = [row for each in data["traces"] for row in each["outputs"].values()]
    timed = [row for each in data["traces"] for row in each["timed_outputs"].values()]
    held = [min(row["num_equal"], row["num_same_twice"]) == row["num_dispatches"] for row in exact]
    held += [bool(row["same_twice"]) and row["relative_error"] <= TOLERANCE for row in timed]
    return sum(held), len(held)


def _regrets(data: Mapping[str, Any]) -> list[float]:
    return [row["regret"] for each in data["traces"] for row in each["regret"]]


def parallel_goals(data: Mapping[str, Any] | None) -> list[Goal]:
    """Returns what expert parallelism is held to."""
    loads = "Expert parallelism: rows that reach every device, dispatch by dispatch"
    outputs = "Expert parallelism: outputs against one device, two checks of a setting"
    steps = "Expert parallelism: step time predicted by planner"
    if data is None or not data["traces"]:
        return not_measured(
            "parallel",
            (loads, "the replay's, exactly"),
            (outputs, "the same"),
            (steps, "beside the measured"),
        )
    num_equal, num_loads = loads_equal(data)
    num_held, num_outputs = outputs_equal(data)
    rows = step_rows(data)
    found = (
        (loads, "the replay's, exactly", num_equal, num_loads, dispatches_checked(data).said),
        (outputs, "the same", num_held, num_outputs, ""),
    )
    made = [
        Goal(
            quantity=quantity,
            goal=goal,
            found=f"{held:,} of {checked:,}" + (f" ({of})" if of else ""),
            met=held == checked,
            section="parallel",
        )
        for quantity, goal, held, checked, of in found
    ]
    if len(rows):
        made.append(
            Goal(
                quantity=steps, goal="beside the measured",
                found=f"off by {percent(rows['error_share'].abs().median())} (median of "
                f"{len(rows)}): {_errors_by_trace(rows)}; regret at most "
                f"{percent(max(_regrets(data)))}",
                met=None, section="parallel",
            )
        )  # fmt: skip
    return made


def parallel_readme_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the row of the README's table."""
    rows = step_rows(data) if data["traces"] else pd.DataFrame()
    if not len(rows):
        return []
    num_equal, num_loads = loads_equal(data)
    num_held, num_outputs = outputs_equal(data)
    by_trace = rows["error_share"].abs().groupby(rows["trace"]).median()
    return [
        (
            f"Expert parallelism over {data['num_ranks']} GPUs: loads as replayed; outputs as on "
            "one device; step times predicted",
            f"{num_equal:,} of {num_loads:,} ({dispatches_checked(data).said}); "
            f"{num_held} of {num_outputs} checks; "
            f"off by {percent(rows['error_share'].abs().median())} (median of {len(rows)}), "
            f"{percent(by_trace.min())} to {percent(by_trace.max())} by trace",
            "all; all",
            _COMMAND,
        )
    ]


def parallel_part(data: Mapping[str, Any]) -> Described:
    """Returns expert parallelism."""
    rows, scaling = step_rows(data), scaling_rows(data)
    num_equal, num_loads = loads_equal(data)
    num_held, num_outputs = outputs_equal(data)
    line = data["all_to_all"]["line"]
    metrics = [
        Metric(name="parallel/loads", value=num_equal / max(num_loads, 1), unit="share",
               figure_class="measured", better="higher"),
        Metric(name="parallel/outputs", value=num_held / max(num_outputs, 1), unit="share",
               figure_class="measured", better="higher"),
    ]  # fmt: skip
    labels = {
        "parallel/loads": "Checks of dispatches whose rows reach every device as replayed",
        "parallel/outputs": "Checks of outputs that are those of one device",
    }
    findings = [
        Finding(
            text=f"Rows reach every device as the replay says {_loads_said(data)}; outputs are "
            f"those of one device in {num_held} of {num_outputs} checks, two of every setting.",
            severity=SEVERITY_FACT + 2
            if (num_equal, num_held) == (num_loads, num_outputs)
            else SEVERITY_COST + 10,
            section="parallel",
            metric="parallel/loads",
        )
    ]
    if len(rows):
        error = float(rows["error_share"].abs().median())
        labels["parallel/error"] = "Error of the predicted step time, median"
        metrics.append(
            Metric(name="parallel/error", value=error, unit="share", figure_class="measured",
                   better="lower")
        )  # fmt: skip
        findings.append(_gain(data, rows, error))
    unscaled = not_estimated_rows(data)
    missing = [name for name in data.get("traces_asked_for", [])
               if name not in {each["trace"] for each in data["traces"]}]  # fmt: skip
    result = Result(
        name="parallel",
        title="Expert parallelism",
        table=rows,
        metrics=tuple(metrics),
        findings=tuple(findings),
        notes=(
            *(note.replace(_FORMER_BAR, "") for note in data.get("notes", ())),
            "A step is of consecutive dispatches of the trace (num passes joined), joined to so "
            "many tokens. Max over mean: rows of its busiest device over those of a mean device.",
            f"All-to-all: {1e3 * line['latency_ms']:.0f} us plus bytes over "
            f"{line['bytes_per_s'] / 1e9:.1f} GB/s, off by at most "
            f"{percent(line['largest_error'])}.",
            *_output_notes(data),
            *_estimate_notes(data),
            *_order_notes(rows, data.get("step_rounds", 1)),
            *([f"No time was left for {', '.join(missing)}."] if missing else []),
        ),
    )
    tables = (
        [
            rows_table("Steps measured", rows),
            rows_table("How far off predictions were", error_rows(data).rename(columns=_HEADINGS)),
            *_part_tables(data),
        ]
        if len(rows)
        else []
    )
    if len(scaling):
        tables.append(rows_table("More devices", scaling, figure_class="estimate"))
    if len(unscaled):
        tables.append(
            rows_table("Not estimated for more devices", unscaled, figure_class="estimate")
        )
    section = result_section(
        result,
        question="Is what a placement promises what several GPUs do?",
        labels=labels,
        figures=[_steps_figure(each) for each in data["traces"] if each["steps"]],
        tables=tables,
        headline=[metric.name for metric in metrics],
    )
    return part(
        "parallel",
        data,
        title="Expert parallelism",
        verdict=f"Over {data['num_ranks']} devices rows arrive as replayed {_loads_said(data)}.",
        routing=[str(each["routing"]["description"]) for each in data["traces"]] or ["none"],
        facts={
            "Devices": f"{data['num_ranks']}, {data.get('backend', 'unknown backend')}",
            "Kernel": data["kernel"],
            **_layer_facts(data),
        },
        banners=["Times for more devices than were there are estimates: the slowest share in turn "
                 "on one GPU, exchanges from the line through those measured, corrected by how far "
                 f"off the same arithmetic was on {data['num_ranks']} devices.",
                 *beside_banners([data])],
        section=section,
        result=result,
    )  # fmt: skip


def _loads_said(data: Mapping[str, Any]) -> str:
    """Returns how many dispatches reached every device as replayed, in words."""
    num_equal, num_loads = loads_equal(data)
    return f"in {num_equal:,} of {num_loads:,} checks ({dispatches_checked(data).said})"


def _errors_by_trace(rows: pd.DataFrame) -> str:
    """Returns the median error of every trace, its sign, and how many were too short."""
    said = []
    for trace, errors in rows.groupby("trace", sort=False)["error_share"]:
        name = str(trace).removesuffix(".moeprof").removeprefix("sample:")
        said.append(
            f"{name} {percent(errors.abs().median())} (signed {100 * errors.median():+.1f}%, "
            f"{(errors < 0).sum()} of {len(errors)} too short)"
        )
    return ", ".join(said)


def part_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per trace, number of tokens and part of a step: measured beside predicted.

    Times are medians over placements. Empty where steps do not have parts.
    """
    found = []
    for each in data["traces"]:
        own = [row for row in each["steps"] if "parts_ms" in row]
        for num_tokens in sorted({row["num_tokens"] for row in own}):
            rows = [row for row in own if row["num_tokens"] == num_tokens]
            for part_name in rows[0]["parts_ms"]:
                measured, predicted = (
                    statistics.median(row[key][part_name] for row in rows)
                    for key in ("parts_ms", "predicted_parts_ms")
                )
                found.append(
                    {
                        "trace": each["trace"],
                        "num_tokens": num_tokens,
                        "part": part_name.replace("_", " "),
                        "measured_ms": measured,
                        "predicted_ms": predicted,
                    }
                )
    return pd.DataFrame(found)


def _part_tables(data: Mapping[str, Any]) -> list[TableData]:
    """Returns the parts of steps, a column each, measured and predicted in one cell."""
    rows = part_rows(data)
    if rows.empty:
        return []
    said = [
        f"{measured:.3f}, predicted {predicted:.3f}"
        for measured, predicted in zip(rows["measured_ms"], rows["predicted_ms"], strict=True)
    ]
    wide = rows.assign(said=said).pivot_table(
        index=["trace", "num_tokens"], columns="part", values="said", aggfunc="first", sort=False
    )
    return [rows_table("Parts of a step in ms, medians over placements", wide.reset_index())]


def _layer_facts(data: Mapping[str, Any]) -> dict[str, str]:
    """Returns whose experts each trace drove, and which layer was timed, where the result says."""
    return {
        f"Layer, {each['trace']}": f"{shape['num_experts']} experts of {shape['d_model']} x "
        f"{shape['d_ff']} ({each['experts']}), layer timed: {each['timed_site']}"
        for each in data["traces"]
        if (shape := each.get("geometry")) and "timed_site" in each
    }


def _output_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns what outputs were held to, and by how much they held."""
    exact = [row for each in data["traces"] for row in each["outputs"].values()]
    timed = [row for each in data["traces"] for row in each["timed_outputs"].values()]
    if not exact or not timed:
        return []
    return [
        "Outputs are checked twice under every placement: narrow experts in float32 are equal to "
        f"one device's to the bit in {sum(row['num_equal'] for row in exact):,} of "
        f"{sum(row['num_dispatches'] for row in exact):,} dispatches; the timed kernel, at full "
        f"size, is off by at most {max(row['relative_error'] for row in timed):.1e} "
        f"({TOLERANCE:g} is allowed). Run again, they are the same to the bit in "
        f"{sum(row['num_same_twice'] for row in exact):,} of those dispatches, and in "
        f"{sum(bool(row['same_twice']) for row in timed)} of {len(timed)} runs of the kernel."
    ]


def _estimate_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns what was done to estimates for more devices, and how many there are."""
    said, counts = [], []
    for each in data["traces"]:
        if not each["scaling"]:
            continue
        for num_tokens in sorted({row["num_tokens"] for row in each["scaling"]}):
            spread = corrected_step(1.0, ratios_of(each, num_tokens))
            said.append(f"{each['trace']}, {num_tokens:,} tokens: {_ratio_said(spread)}")
        done = {(row["num_devices"], setting_of(row)) for row in each["scaling"]}
        counts.append(f"{len(done)} of {each['num_scaled_settings']} of {each['trace']}")
    if not said:
        return []
    return [
        f"Estimates for more devices are the arithmetic's time (uncorrected ms) times the median "
        f"of measured over predicted of the steps on {data['num_ranks']} devices of the same trace "
        "and number of tokens, from the least of these ratios to the greatest. That range is what "
        f"was seen on {data['num_ranks']} devices, no interval of known coverage. "
        f"{'; '.join(said)}.",
        f"Settings of more devices for which there was time: {', '.join(counts)}.",
        *_once_estimated(data),
    ]


def _once_estimated(data: Mapping[str, Any]) -> list[str]:
    """Returns what estimates that were taken once, placement by placement, do not tell."""
    rows = scaling_rows(data)
    plain = rows[~rows["setting"].str.contains("+", regex=False)]
    if data.get("step_rounds", 1) > 1 or plain.empty:
        return []
    groups = plain.groupby(["trace", "num_devices", "num_tokens"])["uncorrected_ms"]
    spread = groups.max() / groups.min()
    trace, num_devices, num_tokens = spread.idxmax()
    return [
        "Each placement was estimated once, one after the other: a slow stretch of the host may be "
        "in one placement's estimate, and these rank no placements. Without replicas they differ "
        f"by up to {spread.max():.1f} times ({trace}, {num_devices} devices, {num_tokens:,} "
        "tokens).",
    ]


def _ratio_said(spread: CorrectedStep) -> str:
    return (
        f"{spread.step_ms:.2f} ({spread.low_ms:.2f} to {spread.high_ms:.2f}, "
        f"{spread.num_ratios} steps)"
    )


def _order_notes(rows: pd.DataFrame, num_rounds: int) -> list[str]:
    """Returns how far placements without replicas differ, as predicted and as measured."""
    if not len(rows):
        return []
    plain = rows[~rows["setting"].str.contains(" +", regex=False)]
    said = []
    for (trace, tokens), own in plain.groupby(["trace", "num_tokens"], sort=False):
        apart = {key: own[key].max() / own[key].min() - 1 for key in ("predicted_ms", "step_ms")}
        said.append(
            f"{percent(apart['step_ms'])}, {percent(apart['predicted_ms'])} predicted ({trace}, "
            f"{tokens:,} tokens)"
        )
    if not said:
        return []
    order = (
        f"in {num_rounds} rounds of all of them"
        if num_rounds > 1
        else "one after the other, so that a slow stretch of the host is one placement's"
    )
    return [
        f"Placements were timed {order}. Without replicas the slowest takes longer than the "
        "fastest by "
        f"{'; '.join(said)}."
    ]


def _gain(data: Mapping[str, Any], rows: pd.DataFrame, error: float) -> Finding:
    """Returns what the best placement gains, and how far off predictions are."""
    said = []
    for (trace, tokens), own in rows.groupby(["trace", "num_tokens"], sort=False):
        plain = own[own["setting"] == "contiguous"]
        best = own.loc[own["step_ms"].idxmin()]
        if len(plain):
            gain = float(plain["step_ms"].iloc[0] / best["step_ms"])
            foreseen = float(plain["predicted_ms"].iloc[0] / best["predicted_ms"])
            said.append(
                f"{gain:.2f}x with {best['setting']} ({trace}, {tokens:,} tokens; "
                f"{foreseen:.2f}x predicted)"
            )
    gained = (
        f"The fastest placement gains {', '.join(said)} over contiguous experts. " if said else ""
    )
    return Finding(
        text=f"{gained}Predicted step times are off by {percent(error)} (median of {len(rows)}): "
        f"{_errors_by_trace(rows)}; "
        f"choosing by them costs at most {percent(max(_regrets(data)))} over the best measured.",
        severity=SEVERITY_FACT + 1,
        section="parallel",
        metric="parallel/error",
    )


def _steps_figure(each: Mapping[str, Any]) -> Any:
    most = max(row["num_tokens"] for row in each["steps"])
    rows = [row for row in each["steps"] if row["num_tokens"] == most]
    return figure_data(
        f"steps-{each['trace'].removesuffix('.moeprof')}",
        "layers",
        f"A step by placement, {each['trace']}, {most:,} tokens",
        alt="; ".join(
            f"{setting_of(row)} {row['step_ms']:.2f} ms, predicted {row['predicted_ms']:.2f}"
            for row in rows
        ),
        how="Lower is better. Placements: "
        + ", ".join(f"{number} {setting_of(row)}" for number, row in enumerate(rows, 1))
        + "; +N: so many slots beyond one per expert.",
        panels=[
            {
                "title": "step",
                "x_label": "placement",
                "y_label": "ms",
                "y_unit": "ms",
                "category": "placement",
                # Names of so many placements would lie on each other.
                "categories": [str(number) for number in range(1, len(rows) + 1)],
                "series": [
                    {"key": "recorded", "label": "measured", "low": None, "high": None,
                     "values": [row["step_ms"] for row in rows]},
                    {"key": "uniform", "label": "predicted", "low": None, "high": None,
                     "values": [row["predicted_ms"] for row in rows]},
                ],
            }
        ],
    )  # fmt: skip


def draw_parallel(data: Mapping[str, Any], path: Path) -> None:
    """Draws measured and predicted steps by placement, a panel per trace."""
    traces = [each for each in data["traces"] if each["steps"]]
    with mpl.rc_context(dict(STYLE)):
        width = max(1, len(traces))
        figure, grid = plt.subplots(
            1, width, figsize=(2.2 + 4.4 * width, 5.4), squeeze=False, layout="constrained"
        )
        for axes, each in zip(grid[0], traces, strict=False):
            sizes = sorted({row["num_tokens"] for row in each["steps"]})
            names = list(dict.fromkeys(setting_of(row) for row in each["steps"]))
            for index, size in enumerate(sizes):
                own = {setting_of(row): row for row in each["steps"] if row["num_tokens"] == size}
                apart = (index - (len(sizes) - 1) / 2) * 0.5 / len(sizes)
                places = [place + apart for place, name in enumerate(names) if name in own]
                colour = COLOURS[index % len(COLOURS)]
                times = [own[name]["step_ms"] for name in names if name in own]
                said = [own[name]["predicted_ms"] for name in names if name in own]
                axes.hlines(places, times, said, color=colour, linewidth=0.9, alpha=0.5, zorder=2)
                axes.plot(times, places, "o", color=colour, markersize=5.5, zorder=4,
                          label=f"{size:,} tokens, measured")  # fmt: skip
                axes.plot(said, places, "D", color="none", markeredgecolor=colour, markersize=5.5,
                          zorder=3, label="predicted")  # fmt: skip
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_xlim(0, None)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
            axes.set_title(f"{each['trace'].removesuffix('.moeprof')} ({each['experts']})")
            axes.set_xlabel("a step, ms")
            axes.legend(
                frameon=False, fontsize=8.5, ncols=2, loc="upper center",
                bbox_to_anchor=(0.4, -0.09),
            )  # fmt: skip
        device = data["hardware"]["device_name"] or data["hardware"]["cpu_name"]
        figure.suptitle(
            f"Expert parallelism over {data['num_ranks']} x {device}: steps by placement",
            x=0.01, ha="left", fontsize=12.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


PARALLEL = Addition(
    part=parallel_part,
    goals=parallel_goals,
    readme_rows=parallel_readme_rows,
    rows=lambda data: {
        "parallel-steps": step_rows(data),
        "parallel-errors": error_rows(data),
        "parallel-scaling": scaling_rows(data),
    },
    drawings={"parallel.png": draw_parallel},
)
