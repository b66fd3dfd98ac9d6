"""Figures of predictions beside measurements, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from analysis.live_goals import GIB, percent
from analysis.live_styles import COLOURS, INK, SOFT, STYLE, save

_MARKS: Mapping[int, str] = MappingProxyType({50: "o", 95: "s", 99: "^"})
_MACHINE_MARKS = ("o", "s", "P", "X")
_OUTSIDE = "#b3261e"
_KIND_STYLES: Mapping[str, str] = MappingProxyType(
    {
        "lru": "#1f4fc4", "lfu": "#c9622a", "paper": "#0f8a6d", "min": "#9a4fb0",
        "fifo": "#b08900", "s3fifo": "#7a4a1e", "arc": "#d0568b", "unbuffered": "#1d2129",
        "gating": "#6b7280",
    }
)  # fmt: skip
_MISS_WORDS: Mapping[str, str] = MappingProxyType(
    {"host": "misses on the host", "split": "few rows on the host"}
)
_MISS_MARKS: Mapping[str, str] = MappingProxyType({"host": "1", "split": "2"})
_AHEAD_MARK = "4"
_FEW_DECADES = 1.2
"""Of which an axis has room for more labels."""
_SAME_SIZE = 1.01
"""Sizes that differ by less stand at one place: what copies ahead stages them in is small."""
_LITTLE, _ROOM = 1.16, 1.7
"""Above the highest point, times as high: without and with words there."""

_SUBTITLE_INCHES = 0.465
_DODGE = 2**0.095
"""Between settings of one size, at most."""
_OF_GAP = 0.8
"""Of what lies between two sizes, what their settings fill."""
_ASIDE = 2**0.024
"""How far hollow marks stand beside their setting."""


def draw_predictions(data: Mapping[str, Any], path: Path) -> None:
    """Draws measured over predicted times with stated intervals, a panel per machine.

    As shares of what was predicted, since on axes of times hundreds of points lie on one line.
    """
    rows = pd.DataFrame(data["rows"])
    rows = rows[rows["measured_ms"].notna()]
    machines = sorted(rows["machine"].unique())
    models = sorted(rows["trace"].unique())
    colours = dict(zip(models, _cycled(COLOURS, len(models)), strict=True))
    with mpl.rc_context(dict(STYLE)):
        width = max(1, len(machines))
        figure, grid = plt.subplots(
            1, width, figsize=(1.2 + 4.9 * width, 5.2), sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, machine in zip(grid[0], machines, strict=False):
            own = rows[rows["machine"] == machine]
            _draw_machine(axes, own, colours)
            (group,) = [
                each for each in data["groups"] if each["by"] == "machine" and each["of"] == machine
            ]
            inside = (
                "no interval stated"
                if group["coverage"] is None
                else f"{percent(group['coverage'])} of {group['stated']} inside"
            )
            axes.set_title(f"{machine}: {inside}")
            axes.set_xlabel("predicted, ms")
        for axes in grid[0]:
            axes.axhline(1, color=SOFT, linewidth=1, zorder=1)
        if len(rows):
            predicted = rows["predicted_ms"].to_numpy(float)
            shares = (rows["measured_ms"] / rows["predicted_ms"]).to_numpy(float)
            places = [predicted.min() / 1.35, predicted.max() * 1.35]
            ends = [min(shares.min(), 1 / 1.5) / 1.1, max(shares.max(), 1.5) * 1.1]
            for axes in grid[0]:
                axes.set(xscale="log", yscale="log", xlim=places, ylim=ends)
                _log_ticks(axes.xaxis, places)
                _log_ticks(axes.yaxis, ends)
        grid[0][0].set_ylabel("measured over predicted")
        drawn = sorted(rows["percentile"].unique())
        handles = [Patch(color=colours[name], label=name) for name in models]
        handles += [
            Line2D([], [], marker=_MARKS.get(each, "D"), color=INK, linestyle="", label=f"p{each}")
            for each in drawn
        ]
        handles += [
            Line2D([], [], color=SOFT, linewidth=1.4, label="stated 90% interval"),
            Line2D([], [], marker="o", color="white", markeredgecolor=_OUTSIDE, linestyle="",
                   markeredgewidth=1.4, label="measured outside it"),
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
            columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
        figure.suptitle(
            "Step times predicted before the run, and measured",
            x=0.01, ha="left", fontsize=12.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


def _draw_machine(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str]) -> None:
    for trace, own in rows.groupby("trace", sort=True):
        for percentile, each in own.groupby("percentile", sort=True):
            stated = each[each["low_ms"].notna()]
            said = stated["predicted_ms"]
            axes.vlines(
                said, stated["low_ms"] / said, stated["high_ms"] / said,
                color=colours[str(trace)], linewidth=1.4, alpha=0.22, zorder=2,
            )  # fmt: skip
            outside = each["inside"].eq(False)
            for rough, edge, order in ((~outside, "white", 3), (outside, _OUTSIDE, 4)):
                part = each[rough]
                axes.plot(
                    part["predicted_ms"], part["measured_ms"] / part["predicted_ms"], linestyle="",
                    marker=_MARKS.get(int(percentile), "D"), color=colours[str(trace)],
                    markersize=5.5, markeredgecolor=edge, zorder=order,
                    markeredgewidth=0.5 if order == 3 else 1.1,
                )  # fmt: skip


def draw_memory_latency(data: Mapping[str, Any], path: Path) -> None:
    """Draws memory of the experts on the device against p95 latency of a step, a row per machine.

    Gating kernels, all of which hold every expert, have a panel of their own: their times differ
    by more than what buffers cost. Where something was measured, predicted settings that were not
    are left out, but for the recommended.
    """
    every = [data, *data.get("others", ())]
    shown = [measured_alone(each) for each in every]
    machines = list(dict.fromkeys(row["machine"] for each in every for row in each["measured"]))
    with mpl.rc_context(dict(STYLE)):
        height = 1.4 + 4.8 * len(every)
        figure, grid = plt.subplots(
            len(every), 2, figsize=(11.4, height), width_ratios=[3.4, 1], layout="constrained",
            squeeze=False,
        )  # fmt: skip
        for panels, whole, each in zip(grid, every, shown, strict=True):
            gatings = [row for row in each["predicted"] if row["kind"] == "gating"]
            buffers = [row for row in each["predicted"] if row["kind"] != "gating"]
            _draw_buffers(panels[0], each, buffers, machines)
            _draw_kernels(panels[1], each, gatings, machines)
            left_out = len(whole["predicted"]) - len(each["predicted"])
            panels[0].set_title(
                f"{each['calibrated_on']}, expert buffers: p{data['percentile']} of a step, ms"
                + (f" ({left_out} settings were not measured)" if left_out else "")
            )
        together = [row for each in shown for row in each["predicted"]]
        figure.legend(
            handles=_handles(together, machines), loc="outside lower center", ncols=5,
            frameon=False, fontsize=8.5, columnspacing=1.6,
        )  # fmt: skip
        measured = "then measured" if machines else "nothing measured yet"
        figure.suptitle(
            f"Memory against p{data['percentile']} step latency, geometry and recorded routing of "
            f"{data['routing']['model'].removesuffix('.gguf')}\n",
            x=0.01, ha="left", fontsize=12.5, fontweight="bold",
        )  # fmt: skip
        figure.text(
            0.01, 1 - _SUBTITLE_INCHES / height,
            f"all experts of {data['layers']} layers, {data['judged_steps']} steps; predicted from "
            f"a calibration of the machine, {measured}",
            fontsize=9.5, color=SOFT,
        )  # fmt: skip
        save(figure, path)


def measured_alone(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the data without predictions of settings that were not measured, if any were."""
    kept = {each["setting"] for each in data["measured"]} | {data["recommended"]}
    if not data["measured"]:
        return data
    series = ("predicted", "token_major", "hit_rate_alone")
    return {
        **data,
        **{name: [each for each in data[name] if each["setting"] in kept] for name in series},
    }


def _draw_buffers(
    axes: Axes,
    data: Mapping[str, Any],
    buffers: Sequence[Mapping[str, Any]],
    machines: Sequence[str],
) -> None:
    places = places_of(buffers)
    for each in buffers:
        _draw_setting(axes, each, places[each["setting"]])
    for name, mark in (("token_major", "v"), ("hit_rate_alone", "D")):
        for each in data[name]:
            axes.plot(
                places[each["setting"]] * _ASIDE, each["p95_ms"], marker=mark, color="none",
                markersize=7.5 if mark == "v" else 5.5, markeredgecolor=INK, markeredgewidth=0.9,
                zorder=5,
            )  # fmt: skip
    own = [each for each in data["measured"] if each["setting"] in places]
    colours = {each["setting"]: _colour(each) for each in buffers}
    _draw_measured(axes, own, places, machines, colours)
    frontier = data["frontier"]
    axes.plot(
        [each["device_bytes"] / GIB for each in frontier],
        [each["p95_ms"] for each in frontier],
        color=INK, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3,
    )  # fmt: skip
    points = [each["p95_ms"] for each in (*buffers, *own, *data["hit_rate_alone"])]
    sizes = sizes_of(buffers)
    _set_times(axes, points, buffers, above=_ROOM if data["recommended"] in places else _LITTLE)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([size / GIB for size in sizes]))
    axes.xaxis.set_minor_locator(NullLocator())
    whole = data["all_expert_bytes"]
    axes.set_xticklabels([f"{size / GIB:.1f}\n{100 * size / whole:.3g}%" for size in sizes])
    if sizes:
        axes.set_xlim(sizes[0] / GIB / _DODGE**4.5, sizes[-1] / GIB * _DODGE**2.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("experts on the device, GiB and share of all")
    _circle(axes, data, places)


def _draw_kernels(
    axes: Axes,
    data: Mapping[str, Any],
    gatings: Sequence[Mapping[str, Any]],
    machines: Sequence[str],
) -> None:
    ordered = sorted(gatings, key=lambda each: each["p95_ms"])
    places = {each["setting"]: float(index) for index, each in enumerate(ordered)}
    for each in ordered:
        _draw_setting(axes, each, places[each["setting"]])
    own = [each for each in data["measured"] if each["setting"] in places]
    _draw_measured(axes, own, places, machines, dict.fromkeys(places, _KIND_STYLES["gating"]))
    _set_times(axes, [each["p95_ms"] for each in (*ordered, *own)], ordered)
    names = [each["setting"].removeprefix("gating:") for each in ordered]
    axes.set_xticks(list(places.values()), names, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.7, max(len(names), 1) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_title("gating kernels, ms")


def _draw_measured(
    axes: Axes,
    measured: Sequence[Mapping[str, Any]],
    places: Mapping[str, float],
    machines: Sequence[str],
    colours: Mapping[str, str],
) -> None:
    for machine, mark in zip(machines, _cycled(_MACHINE_MARKS, len(machines)), strict=True):
        for each in measured:
            if each["machine"] == machine:
                axes.plot(
                    places[each["setting"]], each["p95_ms"], marker=mark, markersize=6.5,
                    color=colours[each["setting"]], markeredgecolor="white", markeredgewidth=0.6,
                    zorder=6,
                )  # fmt: skip


def places_of(buffers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns where on the axis each setting stands: settings of one size beside each other."""
    by_size: dict[int, list[str]] = {}
    sizes = sizes_of(buffers)
    for each in buffers:
        size = max(size for size in sizes if size <= each["device_bytes"])
        by_size.setdefault(size, []).append(each["setting"])
    dodge = _DODGE
    for low, high in pairwise(sizes):
        settings = (len(by_size[low]) + len(by_size[high])) / 2
        dodge = min(dodge, (high / low) ** (_OF_GAP / settings))
    return {
        name: size / GIB * dodge ** (index - (len(names) - 1) / 2)
        for size, names in by_size.items()
        for index, name in enumerate(names)
    }


def sizes_of(buffers: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns sizes in ascending order, the least of those that are nearly the same."""
    found: list[int] = []
    for size in sorted({each["device_bytes"] for each in buffers}):
        if not found or size > found[-1] * _SAME_SIZE:
            found.append(size)
    return found


def _mark(each: Mapping[str, Any]) -> str:
    return _AHEAD_MARK if each.get("ahead") else _MISS_MARKS.get(each["kind"], "_")


def _colour(each: Mapping[str, Any]) -> str:
    return _KIND_STYLES.get(each["policy"] or each["kind"], COLOURS[4])


def _draw_setting(axes: Axes, each: Mapping[str, Any], place: float) -> None:
    colour = _colour(each)
    if each["low_ms"] is not None:
        axes.vlines(place, each["low_ms"], each["high_ms"], color=colour, linewidth=7, alpha=0.25,
                    zorder=2)  # fmt: skip
    axes.plot(
        place, each["p95_ms"], marker=_mark(each), markersize=10,
        color=colour, markeredgewidth=2.2, zorder=4,
    )  # fmt: skip


def _circle(axes: Axes, data: Mapping[str, Any], places: Mapping[str, float]) -> None:
    """Circles what is recommended within the budget."""
    name = data["recommended"]
    if name not in places:
        return
    (each,) = [one for one in data["predicted"] if one["setting"] == name]
    place = places[name]
    axes.plot(
        place, each["p95_ms"], marker="o", markersize=21, color="none",
        markeredgecolor=_OUTSIDE, markeredgewidth=2, zorder=7,
    )  # fmt: skip
    axes.annotate(
        f"recommended within {data['budget_bytes'] / GIB:.0f} GiB: {name}",
        (place, each["p95_ms"]), xytext=(0.62, 0.985), textcoords="axes fraction", ha="center",
        va="top", color=_OUTSIDE, fontweight="bold", zorder=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        arrowprops={"arrowstyle": "-", "color": _OUTSIDE, "shrinkB": 10, "relpos": (0.5, 0)},
    )  # fmt: skip


def _set_times(
    axes: Axes,
    points: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    above: float = _LITTLE,
) -> None:
    """Shows all points, and of intervals what lies within twice their range."""
    if not points:
        return
    bands = [each[end] for each in rows for end in ("low_ms", "high_ms")]
    known = [value for value in bands if value is not None]
    low = max(min([*points, *known]), min(points) / 2)
    high = min(max([*points, *known]), max(points) * 2)
    ends = [low / 1.12, high * above]
    axes.set(yscale="log", ylim=ends)
    _log_ticks(axes.yaxis, ends)


def _handles(predicted: Sequence[Mapping[str, Any]], machines: Sequence[str]) -> list[Any]:
    names = dict.fromkeys(each["policy"] or each["kind"] for each in predicted)
    handles: list[Any] = [
        Patch(color=_KIND_STYLES.get(name, COLOURS[4]), label=_name_words(name)) for name in names
    ]
    dash = {"color": SOFT, "linestyle": "", "markersize": 9, "markeredgewidth": 2.2}
    kinds = {each["kind"] for each in predicted}
    handles += [
        Patch(color=SOFT, alpha=0.25, label="predicted, 90% interval"),
        Line2D([], [], marker="_", label="predicted", **dash),
        *(
            Line2D([], [], marker=mark, label=f"predicted, {_MISS_WORDS[kind]}", **dash)
            for kind, mark in _MISS_MARKS.items()
            if kind in kinds
        ),
    ]
    if any(each.get("ahead") for each in predicted):
        handles.append(Line2D([], [], marker=_AHEAD_MARK, label="predicted, copied ahead", **dash))
    handles += [
        Line2D([], [], marker=mark, color=SOFT, linestyle="", markersize=6.5,
               label=f"measured, {machine}")
        for machine, mark in zip(machines, _cycled(_MACHINE_MARKS, len(machines)), strict=True)
    ]  # fmt: skip
    handles += [
        Line2D([], [], color=INK, linewidth=1.6, linestyle=(0, (5, 2)),
               label="predicted for the fewest copies (MIN)"),
        Line2D([], [], marker="v", color="none", markeredgecolor=INK, markersize=7.5,
               label="token-flattened replay"),
        Line2D([], [], marker="D", color="none", markeredgecolor=INK, markersize=5.5,
               label="hit rate alone"),
    ]  # fmt: skip
    return handles


def _name_words(name: str) -> str:
    return {
        "paper": "paper's policy", "min": "min (knows the future)",
        "unbuffered": "no buffer", "gating": "gating kernels",
    }.get(name, name)  # fmt: skip


def _log_ticks(axis: Any, ends: Sequence[float]) -> None:
    """Labels a few round numbers, more where few decades are shown."""
    decades = np.log10(ends[1] / ends[0])
    within: tuple[float, ...] = (1, 2, 5)
    if decades < _FEW_DECADES:
        within = (1, 1.5, 2, 3, 4, 5, 6, 8)
    if decades < 0.5:
        within = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(LogLocator(subs=within))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _cycled(values: Sequence[str], count: int) -> Iterable[str]:
    return [values[index % len(values)] for index in range(count)]
