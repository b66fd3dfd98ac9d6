"""The paper's translation model and one rank's share of its 8 GPUs, as a part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis.live_evidence import (
    GATINGS,
    Gain,
    best_of,
    breakdown_rows,
    gains,
    headline_rows,
    once_rows,
)
from analysis.live_gating_parts import (
    batch_tables,
    ending_notes,
    judged_notes,
    memory_points,
    once_said,
    throughput_metrics,
)
from analysis.live_goals import GIB, Goal, not_measured, percent
from analysis.live_parts import (
    Addition,
    beside_banners,
    figure_data,
    model_said,
    panel,
    pooled_part,
    repetitions_said,
    result_section,
    rows_table,
)
from analysis.live_styles import COLOURS, INK, STYLE, save
from analysis.published import MEMORY_RATIOS, MT_GAINS
from moeprof.replay import wording
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described

STACKS: Mapping[str, str] = {"mt-encoder": "MT encoder", "mt-decoder": "MT decoder"}
MODELS: Mapping[str, str] = {"lm": "LM of 52B", "mt": "MT of 54.5B"}
SHARE = "rank-share"
SHARE_GATINGS: Mapping[str, str] = {
    "static_mask": "static, one mask",
    "static_mask_fairseq": "static, masks by products as fairseq",
    "dynamic_loop": "dynamic, one GEMM per expert (the paper's)",
    "dynamic": "dynamic, moeprof's kernel",
}
JUDGED_RATIO = "static_mask over dynamic"
_LONGER = 1.15
"""The lean mask against moeprof's kernel: the smaller of the two static baselines."""
_COLOURS: Mapping[str, str] = {
    "dense": COLOURS[5],
    "dynamic": COLOURS[0],
    "dynamic_grouped": COLOURS[2],
    "dynamic_loop": COLOURS[3],
    "static_index": COLOURS[1],
    "static_grouped": COLOURS[4],
    "static_mask": INK,
}
_COMMAND = "`-m analysis.gpu.mt_headline`"


def ran(data: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """Returns a part of the result; None where it was not run or has no comparison to show."""
    found: Mapping[str, Any] | None = (data or {}).get("parts", {}).get(name)
    if found is None or "not_run" in found:
        return None
    if name == SHARE:
        return found if judged_settings(found) else None
    measured = {row["gating"] for row in found["rows"] if "times_ms" in row}
    return found if {"dynamic", "static_mask"} <= measured else None


def judged_settings(share: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns per model the setting that the goal is held to: the most tokens on each rank."""
    return {
        each["model"]: each
        for each in share["settings"]
        if each["judged"] and each["ratios"][JUDGED_RATIO] is not None
    }


def share_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per model, batch and gating: bytes of one rank's share."""
    share = ran(data, SHARE)
    return pd.DataFrame(
        {
            "model": MODELS[each["model"]],
            "batch": each["batch_per_rank"],
            "num_tokens": each["tokens_per_rank"],
            "gating": SHARE_GATINGS[row["gating"]],
            "weights_bytes": row["weight_bytes"],
            "activation_bytes": row["activation_bytes"],
            "peak_bytes": row["peak_bytes"],
            "predicted_peak_bytes": row["predicted_bytes"],
        }
        for each in (share["settings"] if share else ())
        for row in each["rows"]
    )


def mt_rows(data: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Returns what is written as CSV."""
    made = {name: headline_rows(found) for name in STACKS if (found := ran(data, name))}
    once = {f"{name}-once": once_rows(found) for name in STACKS if (found := ran(data, name))}
    shares = share_rows(data)
    every = made | once | {"rank-share": shares}
    return {name: rows for name, rows in every.items() if len(rows)}


def mt_goals(data: Mapping[str, Any] | None) -> list[Goal]:
    """Returns what the translation model and the share are held to."""
    made = []
    for name, label in STACKS.items():
        quantity = f"{label} over static gating with one mask, each at its own best batch"
        found = ran(data, name)
        if found is None:
            made += not_measured("mt", (quantity, f"the paper: {_published(name)}"))
            continue
        gain, control = _mask_gain(found), _control_gain(found)
        made.append(
            Goal(
                quantity=quantity,
                goal=f"the paper: {_published(name)}",
                found=f"{gain.own_best:.2f}x; {_times(gain.equal_terms)} at equal memory and p95"
                + ("" if control is None else f"; {control:.2f}x on uniform routing"),
                met=None,
                section="mt",
            )
        )
    share = ran(data, SHARE)
    judged = {} if share is None else judged_settings(share)
    for model, label in MODELS.items():
        quantity = f"{label}, one rank's share of 8 GPUs: total memory, static over dynamic"
        setting = judged.get(model)
        if setting is None:
            made += not_measured("mt", (quantity, f"at least {MEMORY_RATIOS[model]:g}x"))
            continue
        ratio = setting["ratios"][JUDGED_RATIO]
        made.append(
            Goal(
                quantity=quantity,
                goal=f"at least {MEMORY_RATIOS[model]:g}x",
                found=f"{ratio:.2f}x at {setting['tokens_per_rank']:,} tokens a rank",
                met=ratio >= MEMORY_RATIOS[model],
                section="mt",
            )
        )
    return made


def mt_readme_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the README's table."""
    made = []
    for name, label in STACKS.items():
        found = ran(data, name)
        if found is not None:
            gain = _mask_gain(found)
            rows = headline_rows(found)
            active, num_experts = _busy(found, int(best_of(rows, "dynamic")["batch"]))
            equal = _times(gain.equal_terms, digits=1)
            made.append(
                (
                    f"{label}, tokens/s: dynamic over one static mask, own best batches "
                    f"({active:.0f} of {num_experts} experts busy)",
                    f"{gain.own_best:.1f}x; {equal} at equal memory and p95",
                    f"paper {_published(name)}",
                    _COMMAND,
                )
            )
    share = ran(data, SHARE)
    judged = {} if share is None else judged_settings(share)
    if judged:
        made.append(
            (
                "One rank's share of 8 GPUs, total memory, static over dynamic: "
                + ", ".join(
                    f"{MODELS[model]} ({each['tokens_per_rank']:,} tokens)"
                    for model, each in judged.items()
                ),
                ", ".join(f"{each['ratios'][JUDGED_RATIO]:.2f}x" for each in judged.values())
                + _fewer_tokens(share, judged),
                ", ".join(f"{MEMORY_RATIOS[model]:g}x" for model in judged),
                _COMMAND,
            )
        )
    return made


def _fewer_tokens(share: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the ratios at half of the judged tokens, of which the paper does not say how many."""
    halves = {
        each["model"]: each["ratios"][JUDGED_RATIO]
        for each in share["settings"]
        if each["model"] in judged
        and 2 * each["tokens_per_rank"] == judged[each["model"]]["tokens_per_rank"]
        and each["ratios"][JUDGED_RATIO] is not None
    }
    if set(halves) != set(judged):
        return ""
    said = ", ".join(f"{halves[model]:.2f}x" for model in judged)
    return f"; the paper does not say how many tokens: with half of them {said}"


def mt_part(data: Mapping[str, Any]) -> Described:
    """Returns the translation model by stack, and one rank's share."""
    sections, findings, routing, verdicts, counts = [], [], [], [], []
    uncontrolled: list[str] = []
    for name, label in STACKS.items():
        found = ran(data, name)
        if found is None:
            continue
        result, section = _stack_section(name, label, found)
        sections.append(section)
        findings += result.findings
        routing += [found["routing"], found["control"]["routing"]]
        verdicts.append(f"in the {label} {_mask_gain(found).own_best:.1f} times")
        uncontrolled += [label] if _control_gain(found) is None else []
        rows = headline_rows(found)
        counts.append(rows.loc[~rows["out_of_memory"], "num_repetitions"])
    share = ran(data, SHARE)
    if share is not None:
        result, section = _share_section(data, share)
        sections.append(section)
        findings += result.findings
        routing += [each["routing"] for each in judged_settings(share).values()]
    device = data["hardware"]["device_name"] or data["hardware"]["cpu_name"]
    missing = [name for name in (*STACKS, SHARE) if ran(data, name) is None]
    verdict = "One rank's share of the paper's 8 GPUs, by gating."
    if verdicts:
        verdict = (
            f"On one {device} moeprof's dynamic gating is {' and '.join(verdicts)} as fast as "
            "static gating with a dispatch mask, each at its own best batch."
        )
    elif share is None:
        verdict = "Nothing that could be compared was measured."
    return pooled_part(
        "mt",
        [data],
        command=data["command"],
        title="The paper's translation model",
        verdict=verdict,
        routing=routing or ["none"],
        facts={
            **{
                f"Model, {label}": model_said(found["config"])
                for name, label in STACKS.items()
                if (found := ran(data, name))
            },
            **({"Repetitions": repetitions_said(pd.concat(counts))} if counts else {}),
        },
        banners=[
            *([f"Not among these results: {', '.join(missing)}."] if missing else []),
            *(
                f"{label} was not run on uniform routing, which keeps all experts busy."
                for label in uncontrolled
            ),
            *beside_banners([data]),
        ],
        sections=sections,
        findings=findings,
    )


def _stack_section(name: str, label: str, found: Mapping[str, Any]) -> tuple[Result, Any]:
    rows, gained = headline_rows(found), gains(found)
    measured = [
        each for each in GATINGS if (~rows["out_of_memory"] & (rows["gating"] == each)).any()
    ]
    best = {each: best_of(rows, each) for each in measured}
    metrics, labels = throughput_metrics(name, best, gained)
    mask, control, dense = gained["static_mask"], _control_gain(found), gained.get("dense")
    text = (
        f"{label}: dynamic gating with moeprof's kernel reaches "
        f"{best['dynamic']['tokens_per_s']:,.0f} tokens/s, {mask.own_best:.1f} times static "
        f"gating with one mask, each at its own best batch "
        f"({_times(mask.equal_terms)} at equal memory and p95). The paper prints "
        f"{_published(name)}, on other devices."
    )
    active, num_experts = _busy(found, int(best["dynamic"]["batch"]))
    text += f" The routing keeps {active:.0f} of {num_experts} experts of a layer busy."
    if control is not None:
        equal = _control_gain(found, "gain_at_equal_terms")
        text += (
            f" On uniform routing, which keeps all experts busy, it is {control:.1f} times "
            f"({_times(equal)} at equal memory and p95)."
        )
    if dense is not None:
        padded = _padding(found)
        text += (
            f" The dense twin of equal FLOPs is reached to {percent(dense.own_best)}."
            if padded is None
            else f" The dense twin is reached to {percent(dense.own_best)}; {padded}."
        )
    finding = Finding(
        text=text, severity=SEVERITY_COST + 1, section=name, metric=f"{name}/gain/static_mask"
    )
    result = Result(
        name=name,
        title=label,
        table=rows,
        metrics=tuple(metrics),
        findings=(finding,),
        notes=_stack_notes(name, found, best),
    )
    ran_rows = rows[~rows["out_of_memory"]]
    parts = breakdown_rows(found) if found["breakdown"] else pd.DataFrame()
    once = once_rows(found)
    tables = batch_tables(found, rows)
    if found["control"]["rows"]:
        tables.append(
            rows_table("On uniform routing, which keeps all experts busy in large batches",
                       headline_rows({"rows": found["control"]["rows"]}))
        )  # fmt: skip
    if len(parts):
        tables.append(
            rows_table(
                f"Where the time of a pass goes, batch {int(parts['batch'].iloc[0])}, ms",
                parts.rename(columns={each: f"{each}_ms" for each in parts.columns[2:]}),
            )
        )
    figure = figure_data(
        f"{name}-rates",
        "lines",
        f"{label}: tokens per second and memory, by batch",
        alt="; ".join(
            f"{GATINGS[each]} {row['tokens_per_s']:,.0f} tokens/s at batch {row['batch']}"
            for each, row in best.items()
        ),
        how="Higher is faster on the left, lower is leaner on the right; bands are the quartiles "
        "of the repetitions. A line ends at the last batch that was tried or fitted."
        + once_said(once),
        panels=[
            panel("throughput", "batch", "thousand tokens/s", "number",
                  [_rates(ran_rows, each) for each in measured]),
            panel("memory beyond the weights", "batch", "bytes", "bytes",
                  [_memory(ran_rows, once, each) for each in measured]),
        ],
    )  # fmt: skip
    section = result_section(
        result,
        question=f"What does each way of gating make of the paper's {label}?",
        labels=labels,
        figures=[figure],
        tables=tables,
        headline=[
            f"{name}/tokens_per_s/{each}"
            for each in ("dynamic", "dense", "static_grouped", "static_mask")
            if each in best
        ],
    )
    return result, section


def _rates(rows: pd.DataFrame, gating: str) -> dict[str, Any]:
    """Returns thousands of tokens per second of a gating, ascending by batch."""
    own = rows[rows["gating"] == gating].sort_values("batch")
    points = [
        [row["batch"], row["tokens_per_s"] / 1e3, row["tokens_per_s_low"] / 1e3,
         row["tokens_per_s_high"] / 1e3]
        for _, row in own.iterrows()
    ]  # fmt: skip
    return {"key": gating, "label": GATINGS[gating], "points": points}


def _memory(rows: pd.DataFrame, once: pd.DataFrame, gating: str) -> dict[str, Any]:
    """Returns bytes beyond the weights of a gating, ascending by batch."""
    points = [[*each, None, None] for each in memory_points(rows, once, gating)]
    return {"key": gating, "label": GATINGS[gating], "points": points}


def _stack_notes(
    name: str, found: Mapping[str, Any], best: Mapping[str, pd.Series[Any]]
) -> tuple[str, ...]:
    batch = int(best["dynamic"]["batch"])
    active, num_experts = _busy(found, batch)
    notes = [
        "Tokens are those without padding. Equal terms: moeprof's gating at its fastest batch that "
        "needs no more memory beyond the weights and no longer at the 95th percentile than the "
        f"other at its own best. Weights: {wording.num_bytes(found['weight_bytes'])}; dense twin "
        f"{wording.num_bytes(found['dense_weight_bytes'])}.",
        f"Recorded routing keeps {active:.0f} of {num_experts} experts "
        f"of a layer busy at batch {batch} on average. Static gating has a slot for every token at "
        "every expert, as the paper's, and drops nothing.",
    ]
    if name == "mt-decoder":
        notes.append(
            f"A step attends to {found['past_tokens']} tokens decoded before and to "
            f"{found['length']} of the encoder; their keys and values count as memory "
            "beyond the weights."
        )
    control = [
        f"On uniform routing {said[0].lower()}{said[1:]}"
        for said in _not_tried(found["control"].get("skipped", ()))
    ]
    notes += _waits(found)
    if found.get("endings"):
        return (*notes, *ending_notes(found), *judged_notes(found), *control)
    return (*notes, *_not_tried(found["skipped"]), *control)


def _not_tried(skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns which batches were not tried and why, a sentence per gating and reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in skipped:
        reasons.setdefault((row["gating"], row["reason"]), []).append(row["batch"])
    return [
        f"Not tried: {GATINGS[gating]}, batches from {min(batches)} up: {reason}."
        for (gating, reason), batches in reasons.items()
    ]


def _share_section(data: Mapping[str, Any], share: Mapping[str, Any]) -> tuple[Result, Any]:
    rows, judged = share_rows(data), judged_settings(share)
    metrics, labels, findings = [], {}, []
    for model, each in judged.items():
        key = f"{SHARE}/{model}"
        labels[key] = f"{MODELS[model]}: total memory, static over dynamic"
        ratio, goal = each["ratios"][JUDGED_RATIO], MEMORY_RATIOS[model]
        metrics.append(
            Metric(name=key, value=ratio, unit="ratio", figure_class="measured", better="higher")
        )
        fairseq = each["ratios"]["static_mask_fairseq over dynamic"]
        findings.append(
            Finding(
                text=f"{MODELS[model]}, {each['tokens_per_rank']:,} tokens a rank: static gating "
                f"needs {ratio:.2f} times the memory of dynamic gating, weights included "
                f"({fairseq:.2f} times with masks as fairseq makes them); the goal of "
                f"{goal:g} is {'reached' if ratio >= goal else 'missed'}.",
                severity=SEVERITY_FACT + 1 if ratio >= goal else SEVERITY_COST,
                section=SHARE,
                metric=key,
            )
        )
    others = [
        f"{MODELS[each['model']]} {each['tokens_per_rank']:,} tokens a rank: "
        f"{each['ratios'][JUDGED_RATIO]:.2f}"
        for each in share["settings"]
        if not each["judged"] and each["ratios"][JUDGED_RATIO] is not None
    ]
    result = Result(
        name=SHARE,
        title="One rank's share",
        table=rows,
        metrics=tuple(metrics),
        findings=tuple(findings),
        notes=(
            f"A rank has an {share['ranks']}th of every layer's experts and all else. There is no "
            "other rank: buffers of both all-to-alls have their true sizes, for dynamic gating on "
            "the rank that recorded routing sends the most rows in any layer.",
            "Peaks as torch counts what it has allocated; beside them, weights plus the tensors of "
            "the largest Mixture-of-Experts layer by arithmetic on shapes.",
            *([f"The paper does not say how many tokens a rank had. {'; '.join(others)}."]
              if others else []),
            *map(_rank_said, judged.values()),
            *(
                f"Not run: {MODELS[each['model']]}, {each['batch_per_rank']} sequences a rank: "
                f"{each['reason']}."
                for each in share.get("skipped", ())
            ),
        ),
    )  # fmt: skip
    section = result_section(
        result,
        question="How much memory does one of 8 GPUs need?",
        labels=labels,
        figures=[],
        tables=[rows_table("Every model, batch and gating", rows)],
        headline=[metric.name for metric in metrics],
    )
    return result, section


def _rank_said(setting: Mapping[str, Any]) -> str:
    """Returns which rank a share is of, what it receives, and what arithmetic says of it."""
    weights = setting["rows"][0]["weight_bytes"]
    by_shape = setting.get("weight_bytes_by_shape")
    predicted = setting.get("predicted_ratios", {}).get(JUDGED_RATIO)
    return (
        f"{MODELS[setting['model']]}, {setting['tokens_per_rank']:,} tokens a rank: rank "
        f"{setting['rank']}, whose largest layer receives {setting['rows_received_most']:,} rows, "
        f"a mean one {setting['rows_received_mean']:,.0f}"
        + ("" if predicted is None else f"; by arithmetic static over dynamic is {predicted:.2f}")
        + (
            ""
            if by_shape is None
            else f"; weights are {wording.num_bytes(weights)}, as arithmetic on shapes has it."
            if by_shape == weights
            else f"; weights are {wording.num_bytes(weights)}, arithmetic on shapes has "
            f"{by_shape - weights:+,} bytes."
        )
    ).removesuffix(".") + "."


def draw_mt(data: Mapping[str, Any], path: Path) -> None:
    """Draws tokens per second and memory beyond the weights by batch, a column per stack."""
    stacks = [(label, found) for name, label in STACKS.items() if (found := ran(data, name))]
    ended = False
    with mpl.rc_context(dict(STYLE)):
        width = max(1, len(stacks))
        figure, grid = plt.subplots(
            2, width, figsize=(1.2 + 5.2 * width, 7.4), squeeze=False, sharex="col",
            height_ratios=[3, 2], layout="constrained",
        )  # fmt: skip
        for column, (label, found) in enumerate(stacks):
            every = headline_rows(found)
            rows, out = every[~every["out_of_memory"]], every[every["out_of_memory"]]
            ended |= not out.empty
            rates, sizes = grid[0][column], grid[1][column]
            for gating, said in GATINGS.items():
                own = rows[rows["gating"] == gating].sort_values("batch")
                if own.empty:
                    continue
                style = {"marker": "o", "markersize": 3.5, "linewidth": 1.1,
                         "linestyle": "--" if gating == "dense" else "-",
                         "color": _COLOURS[gating]}  # fmt: skip
                padded = gating == "dense" and any(_padding(each) for _, each in stacks)
                name = "dense twin; the encoder's also computes padding" if padded else said
                rates.plot(own["batch"], own["tokens_per_s"], label=name, **style)
                points = memory_points(rows, once_rows(found), gating)
                sizes.plot(
                    *zip(*((batch, size / GIB) for batch, size in points), strict=True), **style
                )
                last = own.iloc[-1]
                for batch in out.loc[out["gating"] == gating, "batch"]:
                    rates.plot(
                        [last["batch"], batch], [last["tokens_per_s"]] * 2, linestyle=":",
                        linewidth=0.8, marker="x", markersize=6, markevery=[1],
                        color=_COLOURS[gating],
                    )  # fmt: skip
            for axes in (rates, sizes):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                for axis in (axes.xaxis, axes.yaxis):
                    # Not as powers: figures do not read text as mathematics.
                    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                    axis.set_minor_formatter(NullFormatter())
            rates.set_title(f"{label}: tokens/s")
            sizes.set_title("memory beyond the weights, GiB")
            sizes.set_xlabel("batch")
        handles, names = grid[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False,
                          fontsize=8.5)  # fmt: skip
        device = data["hardware"]["device_name"] or data["hardware"]["cpu_name"]
        figure.suptitle(
            f"The paper's translation model on one {device}"
            + ("; x: out of memory" if ended else ""),
            x=0.01, ha="left", fontsize=12.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


def _busy(found: Mapping[str, Any], batch: int) -> tuple[float, int]:
    """Returns the mean number of experts of a layer that recorded routing uses, and all."""
    active = {row["batch"]: row["mean"] for row in found["active_experts"]}
    return float(active[batch]), int(found["config"]["num_experts"])


def _mask_gain(found: Mapping[str, Any]) -> Gain:
    return gains(found)["static_mask"]


def _control_gain(found: Mapping[str, Any], terms: str = "gain_at_own_best") -> float | None:
    """Returns the gain over one mask on uniform routing."""
    rows: Sequence[Mapping[str, Any]] = found["control"]["headline"]
    own = [row[terms] for row in rows if row["baseline"] == "static_mask"]
    return own[0] if own else None


def _padding(found: Mapping[str, Any]) -> str | None:
    """Returns what the dense twin computes more than the experts; None where it is nothing.

    In the place of experts, which leave out padding, its networks computed it in earlier runs.
    """
    if found.get("past_tokens") is not None or found.get("dense_leaves_out_padding"):
        return None
    rows = [row for row in found["rows"] if row["gating"] == "dense" and "num_tokens" in row]
    tokens = sum(row["num_tokens"] for row in rows) / sum(
        row["batch"] * found["length"] for row in rows
    )
    if tokens == 1:
        return None
    config = found["config"]
    width = config["d_model"]
    attention, network = 8 * width**2, 4 * width * config["d_ff"]
    period, top_k = config["moe_every"], config["top_k"]
    common = period * attention + (period - 1) * network
    more = (common + top_k * network) / (common + top_k * network * tokens)
    return (
        f"in the place of experts it also computes padding, {percent(1 - tokens)} of all "
        f"positions, and so {more:.2f} times the operations (attention's scores left out): of "
        "equal operations it would be less"
    )


def _waits(found: Mapping[str, Any]) -> list[str]:
    """Returns of which gatings a pass that is timed part by part takes longer than a whole one."""
    if not found["breakdown"]:
        return []
    whole = {
        (row["gating"], row["batch"]): row["median_ms"]
        for row in found["rows"]
        if "median_ms" in row
    }
    parts = breakdown_rows(found)
    longer = [
        f"{GATINGS[row['gating']]} {row['all'] / whole[key]:.1f} times"
        for _, row in parts.iterrows()
        if (key := (row["gating"], row["batch"])) in whole and row["all"] > _LONGER * whole[key]
    ]
    if not longer:
        return []
    return [
        f"Timed part by part, a pass of batch {int(parts['batch'].iloc[0])} takes longer than whole"
        f": {', '.join(longer)}. There the device waits for the host, and parts say where it waits."
    ]


def _published(name: str) -> str:
    single, several = MT_GAINS[name]
    return f"{single:g}x on one node, {several:g}x on several"


def _times(value: float | None, digits: int = 2) -> str:
    return "not to be had" if value is None else f"{value:.{digits}f}x"


MT = Addition(
    part=mt_part,
    goals=mt_goals,
    readme_rows=mt_readme_rows,
    rows=mt_rows,
    drawings={"mt.png": draw_mt},
)
