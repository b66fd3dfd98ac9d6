"""Figures of what was measured on a GPU, as PNG files.

Colours are told apart by readers who are colour blind; marks, line styles and hatching carry the
same difference in grey. Text from the results is never read as mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.live_evidence import (
    EAGER,
    GATINGS,
    GEOMETRY,
    GRAPH,
    KERNELS,
    MOST_GRAPH_TOKENS,
    PARTS,
    ROUTINGS,
    Evidence,
    best_of,
    breakdown_rows,
    buffering_rows,
    buffering_study,
    gains,
    headline_rows,
    kernel_rows,
    once_rows,
)
from analysis.live_goals import (
    GIB,
    GOAL_FEW_UNIFORM,
    GOAL_MANY_SKEWED,
    GOAL_MANY_UNIFORM,
)
from analysis.live_styles import INK, SOFT, STYLE, save

_LABELLED_BATCH = 64
_LEAST_APART = 1.24
_MOST_TICKS = 8
_STYLES: Mapping[str, tuple[str, str, Any]] = MappingProxyType(
    {
        "dense": ("#6b7280", ".", (0, (1, 1.6))),
        "dynamic": ("#1f4fc4", "o", "-"),
        "dynamic_grouped": ("#0f8a6d", "s", (0, (6, 2))),
        "dynamic_loop": ("#9a4fb0", "D", (0, (6, 2, 1.5, 2))),
        "static_index": ("#c9622a", "^", (0, (3, 2))),
        "static_grouped": ("#a8842c", "v", (0, (2, 1.5))),
        "static_mask": (INK, "P", "-"),
        "transformers grouped_mm": ("#0f8a6d", "s", (0, (6, 2))),
        "moe-ops": ("#c9622a", "^", (0, (3, 2))),
    }
)
_PART_STYLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "attention": ("#4c7fbd", ""),
        "dense_ffn": ("#9fd3c7", ""),
        "gate": ("#f0b93a", "||||"),
        "dispatch_experts_combine": ("#b5372b", "////"),
        "head": ("#6a62ad", "...."),
        "rest": ("#d5d9df", ""),
    }
)
_SHORT: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense twin",
        "dynamic": "dynamic, moeprof",
        "dynamic_grouped": "dynamic, grouped GEMM",
        "dynamic_loop": "dynamic, loop (paper's)",
        "static_index": "static, indices",
        "static_grouped": "static, grouped masks",
        "static_mask": "static, one mask",
    }
)


def draw_all(evidence: Evidence, folder: Path) -> tuple[Path, ...]:
    """Draws every figure into ``folder`` and returns the files."""
    paths = []
    for name, draw in (
        ("headline.png", draw_headline),
        ("kernels.png", draw_kernels),
        ("buffering.png", draw_buffering),
    ):
        draw(evidence, folder / name)
        paths.append(folder / name)
    return tuple(paths)


def draw_headline(evidence: Evidence, path: Path) -> None:
    """Draws tokens per second, memory and where the time goes, of the paper's model per gating."""
    with mpl.rc_context(dict(STYLE)):
        figure = plt.figure(figsize=(10.6, 6.5), layout="constrained")
        heading, body = figure.subfigures(2, 1, height_ratios=[0.075, 1])
        left, right = body.subfigures(1, 2, width_ratios=[1.42, 1])
        upper, lower = right.subfigures(2, 1, height_ratios=[1, 1.05])
        rows = headline_rows(evidence.headline)
        _draw_rates(left.subplots(), rows, evidence)
        _draw_memory(upper.subplots(), rows, once_rows(evidence.headline))
        _draw_parts(lower.subplots(), breakdown_rows(evidence.headline))
        config = evidence.headline["config"]
        heading.text(
            0.012, 0.72,
            "The founding paper's 52B language model, whole, on one "
            f"{_device(evidence.headline)}",
            fontsize=13, fontweight="bold", va="center",
        )  # fmt: skip
        heading.text(
            0.012, 0.1,
            f"{config['num_layers']} layers, every second with {config['num_experts']} experts, "
            f"top-{config['top_k']}; bf16; scored under routing recorded from a trained twin; "
            "medians" + _marks_said(evidence.headline, rows),
            fontsize=9.5, color=SOFT, va="center",
        )  # fmt: skip
        save(figure, path)


def _marks_said(headline: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """Returns what else a reader of the figure must know."""
    earlier = {row["gating"] for row in headline.get("earlier", {}).get("rows", ())}
    names = [_SHORT[name] for name in GATINGS if name in earlier]
    return ("; x: out of memory" if rows["out_of_memory"].any() else "") + (
        f"; earlier run: {', '.join(names)}" if names else ""
    )


def _draw_rates(axes: Axes, rows: pd.DataFrame, evidence: Evidence) -> None:
    best = {name: best_of(rows, name) for name in GATINGS}
    for name, (colour, mark, line) in _gating_styles().items():
        own = rows[(rows["gating"] == name) & ~rows["out_of_memory"]]
        axes.fill_between(
            own["batch"], own["tokens_per_s_low"], own["tokens_per_s_high"],
            color=colour, alpha=0.18, linewidth=0,
        )  # fmt: skip
        axes.plot(
            own["batch"], own["tokens_per_s"], color=colour, marker=mark, linestyle=line,
            markersize=5, linewidth=3 if name == "dynamic" else 1.8, label=_SHORT[name],
        )  # fmt: skip
    out = rows[rows["out_of_memory"]]
    for _, row in out.iterrows():
        last = rows[(rows["gating"] == row["gating"]) & ~rows["out_of_memory"]].iloc[-1]
        axes.plot(
            [last["batch"], row["batch"]], [last["tokens_per_s"]] * 2,
            color=_STYLES[row["gating"]][0], linestyle=":", linewidth=1,
        )  # fmt: skip
        axes.plot(
            row["batch"], last["tokens_per_s"], marker="x", color=_STYLES[row["gating"]][0],
            markersize=8, markeredgewidth=2,
        )  # fmt: skip
    _label_ends(axes, rows, best)
    gain = gains(evidence.headline)["static_mask"].own_best
    ours, mask = best["dynamic"], best["static_mask"]
    axes.annotate(
        "", (mask["batch"], ours["tokens_per_s"]), (mask["batch"], mask["tokens_per_s"] * 1.07),
        arrowprops={"arrowstyle": "<->", "color": INK, "linewidth": 1.1},
    )  # fmt: skip
    axes.plot(
        [mask["batch"], ours["batch"]], [ours["tokens_per_s"]] * 2, color=INK, linewidth=0.8,
        linestyle=(0, (1, 2)), zorder=1,
    )  # fmt: skip
    axes.text(
        mask["batch"] * 1.12, 0.79 * ours["tokens_per_s"], f"{gain:.1f}x", fontsize=14,
        fontweight="bold", va="center",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(0.85, rows["batch"].max() * 1.25)
    axes.set_ylim(rows["tokens_per_s"].min() / 1.3, rows["tokens_per_s"].max() * 1.4)
    _power_ticks(axes, _batch_ticks(rows))
    axes.yaxis.set_major_locator(FixedLocator([5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e3:g}k"))
    axes.set_title("tokens per second; at the right each one's best")
    axes.set_xlabel(f"batch (sequences of {_length(rows):,} tokens)")


def _label_ends(axes: Axes, rows: pd.DataFrame, best: Mapping[str, Any]) -> None:
    """Writes each gating's name and best figure beside its line's end, pushed apart."""
    ends = []
    for name in _gating_styles():
        own = rows[(rows["gating"] == name) & ~rows["out_of_memory"]]
        ends.append((name, own.iloc[-1]["tokens_per_s"]))
    previous = float("inf")
    for name, rate in sorted(ends, key=lambda end: -end[1]):
        previous = min(rate, previous / _LEAST_APART)
        axes.text(
            1.015, previous, _best_said(name, best), transform=axes.get_yaxis_transform(),
            fontsize=9.5, va="center", color=_STYLES[name][0],
            fontweight="bold" if name == "dynamic" else "normal",
        )  # fmt: skip


def _best_said(name: str, best: Mapping[str, Any]) -> str:
    return f"{_SHORT[name]}: {best[name]['tokens_per_s'] / 1e3:.0f}k"


def _draw_memory(axes: Axes, rows: pd.DataFrame, once: pd.DataFrame) -> None:
    """Draws memory, also that of batches that ran a single time."""
    ran = pd.concat([rows[~rows["out_of_memory"]], once]).sort_values("batch")
    for name, (colour, mark, line) in _gating_styles().items():
        own = ran[ran["gating"] == name]
        axes.plot(
            own["batch"], own["extra_bytes"] / GIB, color=colour, marker=mark, linestyle=line,
            markersize=4, linewidth=2.4 if name == "dynamic" else 1.5, label=_SHORT[name],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log")
    _power_ticks(axes, _batch_ticks(ran))
    axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for name, words, shift, side in (
        ("static_mask", "one mask", (-7, 0), "right"),
        ("static_grouped", "grouped", (-7, 2), "right"),
        ("static_index", "indices", (7, -1), "left"),
        ("dynamic", "dynamic, dense", (-2, -22), "right"),
    ):
        last = ran[ran["gating"] == name].iloc[-1]
        if name == "dynamic":
            own = rows[(rows["gating"] == name) & ~rows["out_of_memory"]]
            last = own.loc[(own["batch"] - _LABELLED_BATCH).abs().idxmin()]
        axes.annotate(
            words, (last["batch"], last["extra_bytes"] / GIB), xytext=shift, fontsize=9,
            textcoords="offset points", ha=side, va="center", color=_STYLES[name][0],
        )  # fmt: skip
    axes.set_title("memory beyond the weights, GiB")
    axes.set_xlabel("batch")


def _draw_parts(axes: Axes, rows: pd.DataFrame) -> None:
    rows = rows.sort_values("all").set_index("gating")
    names = list(rows.index)
    left = pd.Series(0.0, index=names)
    for part, (colour, hatch) in _PART_STYLES.items():
        widths = rows.loc[names, part]
        axes.barh(
            range(len(names)), widths, left=left, color=colour, hatch=hatch, height=0.68,
            edgecolor="white", linewidth=0.4, label=PARTS[part],
        )  # fmt: skip
        left = left + widths
    for index, name in enumerate(names):
        axes.text(
            rows.loc[name, "all"] + 4, index, f"{rows.loc[name, 'all']:.0f}", va="center",
            fontsize=9.5, fontweight="bold" if name == "dynamic" else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [_SHORT[name] for name in names])
    axes.set_xlim(0, rows["all"].max() * 1.1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_title(f"a pass at batch {int(rows['batch'].iloc[0])}, ms, by part")
    axes.legend(
        fontsize=8.5, frameon=True, framealpha=0.92, edgecolor="none", loc="lower right",
        bbox_to_anchor=(1.02, 0.0), handlelength=1.4, borderaxespad=0.1,
    )  # fmt: skip


def draw_kernels(evidence: Evidence, path: Path) -> None:
    """Draws the share of the floor by tokens, a panel per routing."""
    rows = kernel_rows(evidence.kernels)
    rows = rows[rows["geometry"] == GEOMETRY]
    chosen = rows[rows["mode"] == _mode_of(rows)]
    with mpl.rc_context(dict(STYLE)):
        figure, grid = plt.subplots(
            1, len(ROUTINGS), figsize=(11.5, 3.9), sharey=True, layout="constrained"
        )
        for axes, (routing, words) in zip(grid, ROUTINGS.items(), strict=True):
            for kernel, label in KERNELS.items():
                own = chosen[(chosen["kernel"] == kernel) & (chosen["routing"] == routing)]
                colour, mark, line = _STYLES[kernel]
                for mode in (GRAPH, EAGER):
                    part = own[own["mode"] == mode].sort_values("num_tokens")
                    axes.errorbar(
                        part["num_tokens"], part["share"],
                        [part["share"] - part["share_low"], part["share_high"] - part["share"]],
                        color=colour, marker=mark, linestyle=line, markersize=5, capsize=2,
                        linewidth=2.4 if kernel == "dynamic" else 1.6,
                        label=label if mode == EAGER else None,
                    )  # fmt: skip
            _draw_goals(axes, routing)
            axes.axhline(1.0, color=SOFT, linewidth=0.8)
            axes.set(xscale="log", ylim=(0, 1.13))
            _power_ticks(axes, [8, 64, 1024, 4096, 16384])
            axes.set_xticklabels(["8", "64", "1k", "4k", "16k"])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
            axes.set_title(f"routing {words}")
            axes.set_xlabel("tokens")
        grid[0].set_ylabel("share of the floor")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            f"How near the floor one layer of 512 experts comes, {_device(evidence.kernels)} "
            f"(CUDA graphs up to {MOST_GRAPH_TOKENS} tokens)",
            x=0.008, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


def _mode_of(rows: pd.DataFrame) -> pd.Series[str]:
    """Returns the mode that counts at each size: graphs for few tokens."""
    few = rows["num_tokens"] <= MOST_GRAPH_TOKENS
    return few.map({True: GRAPH, False: EAGER})


def _draw_goals(axes: Axes, routing: str) -> None:
    most = GOAL_MANY_UNIFORM if routing == "uniform" else GOAL_MANY_SKEWED
    spans = [(11_000, 24_000, most)]
    if routing == "uniform":
        spans.append((7, 75, GOAL_FEW_UNIFORM))
    for index, (low, high, goal) in enumerate(spans):
        axes.hlines(
            goal, low, high, color="#b3261e", linewidth=3, zorder=1,
            label="goal for moeprof" if index == 0 else None,
        )  # fmt: skip


def draw_buffering(evidence: Evidence, path: Path) -> None:
    """Draws decode steps, hit rate and memory of each policy beside all experts on the GPU."""
    rows = buffering_rows(evidence.buffering)
    names = list(rows["policy"])
    with mpl.rc_context(dict(STYLE)):
        figure, (steps, hits, memory) = plt.subplots(
            1, 3, figsize=(11.0, 3.6), width_ratios=[1.6, 1, 1], layout="constrained"
        )
        places = range(len(names))
        steps.vlines(places, rows["p50_ms"], rows["p99_ms"], color=SOFT, linewidth=1.2)
        for column, mark, label in (
            ("p50_ms", "o", "median"), ("p95_ms", "^", "p95"), ("p99_ms", "_", "p99"),
        ):  # fmt: skip
            steps.plot(
                places, rows[column], linestyle="", marker=mark, markersize=9, label=label,
                color="#1f4fc4" if mark == "o" else INK, markeredgewidth=2 if mark == "_" else 1,
            )  # fmt: skip
        for place, low, high in zip(places, rows["p50_low_ms"], rows["p50_high_ms"], strict=True):
            steps.plot(
                [place + 0.16] * 2, [low, high], color="#1f4fc4", marker="_", linewidth=1.6,
                label="median per repetition" if place == 0 else None,
            )  # fmt: skip
        for place, value in zip(places, rows["p50_ms"], strict=True):
            steps.text(place - 0.16, value, f"{value:.0f}", ha="right", va="center")
        steps.set(ylim=(0, None), xlim=(-0.6, len(names) - 0.4))
        steps.set_xticks(places, [name.replace(" the", "\nthe") for name in names])
        steps.grid(visible=False, axis="x")
        steps.set_title("decode step, ms")
        steps.legend(frameon=False, ncols=2, loc="lower right", fontsize=8.5)
        own = rows.iloc[1:]
        hits.barh(range(len(own)), own["hit_rate"], color="#9fb8ea", height=0.62)
        for place, value in enumerate(own["hit_rate"]):
            hits.text(value - 0.02, place, f"{100 * value:.0f}%", ha="right", va="center")
        hits.set_yticks(range(len(own)), own["policy"])
        hits.invert_yaxis()
        hits.set_xlim(0, 1)
        hits.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        hits.grid(visible=False, axis="y")
        hits.set_title("hit rate, all steps")
        held = rows["device_bytes"].iloc[[0, 1]] / GIB
        words = ["all on the GPU", f"{rows['capacity'].iloc[1]} of {rows['capacity'].iloc[0]}"]
        memory.barh(range(2), held, color=["#c9ced6", "#1f4fc4"], height=0.5)
        for place, value in enumerate(held):
            memory.text(value + 1, place, f"{value:.1f}", va="center")
        memory.set_yticks(range(2), words)
        memory.invert_yaxis()
        memory.set_xlim(0, held.max() * 1.22)
        memory.grid(visible=False, axis="y")
        memory.set_title("experts on the GPU, GiB")
        figure.suptitle(
            "Live expert buffering, geometry and recorded routing of Qwen3-30B-A3B, one "
            f"{_device(buffering_study(evidence.buffering))}",
            x=0.008, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


def _gating_styles() -> dict[str, tuple[str, str, Any]]:
    return {name: _STYLES[name] for name in reversed(GATINGS)}


def _power_ticks(axes: Axes, ticks: list[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _batch_ticks(rows: pd.DataFrame) -> list[int]:
    """Returns powers of two up to the largest batch, every one or as many as have room."""
    most = int(rows["batch"].max()).bit_length()
    return [1 << power for power in range(0, most, -(-most // _MOST_TICKS))]


def _length(rows: pd.DataFrame) -> int:
    return int((rows["num_tokens"] / rows["batch"]).dropna().iloc[0])


def _device(result: Mapping[str, Any]) -> str:
    return str(result["hardware"]["device_name"])
