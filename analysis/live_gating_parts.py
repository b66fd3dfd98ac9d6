"""The paper's language model and the gating kernels, as parts of the page on GPU measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.live_evidence import (
    EAGER,
    GATINGS,
    GEOMETRY,
    GRAPH,
    KERNELS,
    MANY_TOKENS,
    MOST_GRAPH_TOKENS,
    PARTS,
    RECORDED,
    ROUTINGS,
    Gain,
    best_at_the_end,
    best_of,
    breakdown_rows,
    gain_rows,
    gains,
    graph_range,
    graph_sizes,
    headline_rows,
    kernel_rows,
    measured_rows,
    once_rows,
    share_of_floor,
)
from analysis.live_goals import (
    GOAL_DENSE,
    GOAL_FEW_UNIFORM,
    GOAL_MANY_SKEWED,
    GOAL_MANY_UNIFORM,
    PUBLISHED_GAIN,
    PUBLISHED_GAIN_NODES,
    percent,
    share_said,
)
from analysis.live_parts import (
    beside_banners,
    earlier_banners,
    figure_data,
    model_said,
    panel,
    part,
    repetitions_said,
    result_section,
    rows_table,
)
from moeprof.replay import wording
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described
from moeprof.reporting.layout import TableData

_SERIES: Mapping[str, str] = {"moe-ops": "moe_ops", "transformers grouped_mm": "grouped_mm"}

_PART_KEYS: Mapping[str, str] = {"dispatch_experts_combine": "experts", "rest": "other"}

_ABOVE_ONE = 0.02
"""What a plot draws above its highest line."""


def throughput_metrics(
    name: str, best: Mapping[str, pd.Series[Any]], gained: Mapping[str, Gain]
) -> tuple[list[Metric], dict[str, str]]:
    """Returns the best throughput of each gating and moeprof's gains over them, with their labels.

    Args:
        name: Section that the metrics belong to.
        best: By gating, the row of its best batch.
        gained: By gating, what moeprof gains over it.
    """
    metrics, labels = [], {}
    for gating, row in best.items():
        key = f"{name}/tokens_per_s/{gating}"
        labels[key] = f"Best tokens/s: {GATINGS[gating]} (batch {row['batch']})"
        metrics.append(
            Metric(
                name=key, value=row["tokens_per_s"], unit="tokens/s", figure_class="measured",
                low=row["tokens_per_s_low"], high=row["tokens_per_s_high"], better="higher",
                note=f"{row['num_repetitions']} repetitions",
            )
        )  # fmt: skip
    for gating, gain in gained.items():
        key = f"{name}/gain/{gating}"
        labels[key] = f"moeprof's tokens/s over: {GATINGS[gating]}, own best batches"
        metrics.append(
            Metric(
                name=key, value=gain.own_best, unit="ratio", figure_class="measured",
                better="higher",
            )
        )  # fmt: skip
    return metrics, labels


def headline_part(data: Mapping[str, Any]) -> Described:
    """Returns what gating makes of the founding paper's language model."""
    rows, gained = headline_rows(data), gains(data)
    parts = breakdown_rows(data)
    best = {name: best_of(rows, name) for name in GATINGS}
    ours, mask, grouped, dense = (
        best["dynamic"], gained["static_mask"], gained["static_grouped"], gained["dense"],
    )  # fmt: skip
    loop = best["dynamic_loop"]["tokens_per_s"] / best["static_mask"]["tokens_per_s"]
    metrics, labels = throughput_metrics("headline", best, gained)
    once = once_rows(data)
    end = "; ".join(GATINGS[name] for name in best_at_the_end(rows, once))
    findings = (
        Finding(
            text=f"Dynamic gating with moeprof's kernel scores {ours['tokens_per_s']:,.0f} "
            f"tokens/s: {mask.own_best:.1f} times static gating with one mask, each at its own "
            f"best batch ({_times(mask.equal_terms)} at equal memory and p95), and "
            f"{grouped.own_best:.1f} times static gating in groups. The paper prints "
            f"{PUBLISHED_GAIN} on one node and {PUBLISHED_GAIN_NODES} on several, for a loop over "
            f"experts on other devices; that loop reaches {loop:.1f} times here.",
            severity=SEVERITY_COST + 2,
            section="headline",
            metric="headline/gain/static_mask",
        ),
        Finding(
            text=f"It reaches {percent(dense.own_best)} of the dense twin of equal FLOPs at best "
            f"batches, and {_share(dense.equal_terms)} at equal memory beyond the weights and "
            f"equal p95: the goal of {percent(GOAL_DENSE)} is "
            + _met_words(dense.own_best >= GOAL_DENSE, (dense.equal_terms or 0.0) >= GOAL_DENSE)
            + ".",
            severity=SEVERITY_COST,
            section="headline",
            metric="headline/gain/dense",
        ),
    )
    result = Result(
        name="headline",
        title="Throughput",
        table=rows,
        metrics=tuple(metrics),
        findings=findings,
        notes=(
            "Equal terms: moeprof's gating at its fastest batch that needs no more memory beyond "
            "the weights and no longer at the 95th percentile than the other at its own best. The "
            f"model's weights, {wording.num_bytes(data['weight_bytes'])}, are the same for every "
            "gating; the dense twin has no experts and far fewer weights.",
            f"Still at their best at the largest batch tried, so that more might give more: "
            f"{end or 'none'}. Only what is marked out of memory ran out of it.",
            "Static gating has a capacity of 0.05 of the tokens, as the paper's; tokens beyond it "
            "are dropped.",
            *ending_notes(data),
            *judged_notes(data),
            *(
                (
                    "Other work held up the host meanwhile. A pass of few tokens waits for it: at "
                    f"small batches, batch {int(parts['batch'].iloc[0])} of the breakdown among "
                    "them, times can be longer than the device alone would take.",
                )
                if data.get("beside")
                else ()
            ),
        ),
    )
    labelled = [name for name in GATINGS if name in set(rows["gating"])]
    ran = rows[~rows["out_of_memory"]]
    rates = [
        {
            "key": name,
            "label": GATINGS[name],
            "points": [
                [row["batch"], row["tokens_per_s"] / 1e3, row["tokens_per_s_low"] / 1e3,
                 row["tokens_per_s_high"] / 1e3]
                for _, row in ran[ran["gating"] == name].iterrows()
            ],
        }
        for name in labelled
    ]  # fmt: skip
    memory = [
        {
            "key": name,
            "label": GATINGS[name],
            "points": [
                [batch, num_bytes, None, None]
                for batch, num_bytes in memory_points(ran, once, name)
            ],
        }
        for name in labelled
    ]
    figures = [
        figure_data(
            "rates",
            "lines",
            "Tokens per second and memory, by batch",
            alt="; ".join(
                f"{GATINGS[name]} {row['tokens_per_s']:,.0f} tokens/s at batch {row['batch']}"
                for name, row in best.items()
            ),
            how="Higher is faster on the left, lower is leaner on the right; bands are the "
            "quartiles of the repetitions. A line ends at the last batch that was tried or fitted."
            + once_said(once),
            panels=[
                panel("throughput", "batch", "thousand tokens/s", "number", rates),
                panel("memory beyond the weights", "batch", "bytes", "bytes", memory),
            ],
        ),
        figure_data(
            "parts",
            "bars",
            f"Where the time of a pass goes, batch {int(parts['batch'].iloc[0])}",
            alt="; ".join(
                f"{GATINGS[row['gating']]} {row['all']:.0f} ms" for _, row in parts.iterrows()
            ),
            how="Each bar is a whole pass; its length is its time against the slowest. Dispatch, "
            "experts and combine are one part because the kernels fuse them.",
            panels=[{"rows": [_bar(row, parts["all"].max()) for _, row in parts.iterrows()]}],
        ),
    ]
    section = result_section(
        result,
        question="What does each way of gating make of the founding paper's 52B model?",
        labels=labels,
        figures=figures,
        tables=batch_tables(data, rows),
        headline=[f"headline/tokens_per_s/{name}" for name in
                  ("dynamic", "dense", "static_grouped", "static_mask")],
    )  # fmt: skip
    return part(
        "headline",
        data,
        title="The paper's model",
        verdict=f"On one {data['hardware']['device_name']} the paper's language model runs "
        f"{mask.own_best:.1f} times as fast with moeprof's dynamic gating as with a dispatch mask, "
        f"and at {percent(dense.own_best)} of the speed of a dense model of equal FLOPs.",
        routing=[data["routing"]],
        facts={
            "Model": model_said(data["config"]),
            "Repetitions": repetitions_said(rows.loc[~rows["out_of_memory"], "num_repetitions"]),
        },
        banners=[*beside_banners([data]), *earlier_banners(data)],
        section=section,
        result=result,
    )


def batch_tables(data: Mapping[str, Any], rows: pd.DataFrame) -> list[TableData]:
    """Returns the tables of a series of batches: each timed, each that ran once, and the gains.

    Args:
        data: The series, perhaps with ``once``.
        rows: Of `headline_rows`.
    """
    once, gained = once_rows(data), gain_rows(data)
    return [
        rows_table("Every batch", rows),
        *([rows_table(ONCE_TITLE, once)] if len(once) else []),
        *([rows_table("What moeprof's gains rest on", gained)] if len(gained) else []),
    ]


_UNSTEADY = 0.05
ONCE_TITLE = "Batches that ran a single time, for their memory: too slow to be timed"


def once_said(once: pd.DataFrame) -> str:
    """Returns what a figure says of batches that ran a single time, from `once_rows`."""
    return " Memory is also that of batches that ran a single time." if len(once) else ""


def memory_points(ran: pd.DataFrame, once: pd.DataFrame, gating: str) -> list[tuple[int, float]]:
    """Returns batch and bytes beyond the weights of a gating, ascending by batch.

    Args:
        ran: Of `headline_rows`, those that memory was enough for.
        once: Of `once_rows`.
        gating: Its name.
    """
    own = [each[each["gating"] == gating] for each in (ran, once) if len(each)]
    return sorted(
        (int(batch), float(num_bytes))
        for each in own
        for batch, num_bytes in zip(each["batch"], each["extra_bytes"], strict=True)
    )


def judged_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns how often the rows that gains are taken from were repeated, where the run says so."""
    if "judged_repeats" not in data:
        return []
    wanted, gained = data["judged_repeats"], gain_rows(data)
    batches = {
        *((row["over"], row["its_batch"]) for _, row in gained.iterrows()),
        *((GATINGS["dynamic"], batch) for batch in gained.get("moeprof_batch", ())),
        *(
            (GATINGS["dynamic"], int(batch.replace(",", "")))
            for batch in gained.get("equal_terms_batch", ())
            if batch != "none"
        ),
    }
    unsteady = [
        f"{GATINGS[row['gating']]}, batch {row['batch']}, {first:.0f} ms and then {again:.0f}"
        for row in measured_rows(data, "rows", "gating")
        if row.get("sweep_times_ms")
        and abs(
            (first := float(np.median(row["sweep_times_ms"])))
            / (again := float(np.median(row["times_ms"])))
            - 1
        )
        > _UNSTEADY
    ]
    left = [
        f"{GATINGS[row['gating']]}, batch {row['batch']}, {len(row['times_ms'])} repetitions"
        for row in measured_rows(data, "rows", "gating")
        if (GATINGS[row["gating"]], row["batch"]) in batches
        and "times_ms" in row
        and not row.get("revisited")
    ]
    return [
        f"Rows that gains rest on are measured again, one after the other, {wanted} repetitions "
        "each; all others have as many as there was time for."
        + (f" Not measured again: {'; '.join(left)}." if left else "")
        + (
            f" Over {percent(_UNSTEADY)} from what they were at first: {'; '.join(unsteady)}."
            if unsteady
            else ""
        )
    ]


def _bar(row: pd.Series[Any], longest: float) -> dict[str, Any]:
    """Returns a bar as long as its pass took, of its parts."""
    return {
        "label": GATINGS[row["gating"]],
        "value": row["all"],
        "unit": "ms",
        "by_value": True,
        "segments": [
            {
                "key": _PART_KEYS.get(part, part),
                "label": label,
                "share": row[part] / longest,
                "value": row[part],
                "unit": "ms",
            }
            for part, label in PARTS.items()
        ],
    }


def kernels_part(data: Mapping[str, Any]) -> Described:
    """Returns the kernels against the floor."""
    rows = kernel_rows(data)
    metrics, labels = [], {}
    for routing, words in ROUTINGS.items():
        for kernel, label in KERNELS.items():
            share = share_of_floor(rows, kernel, MANY_TOKENS, routing, EAGER)
            key = f"kernels/share/{kernel}/{routing}"
            labels[key] = f"{label}, {MANY_TOKENS:,} tokens, routing {words}"
            metrics.append(
                Metric(
                    name=key, value=share.value, unit="share", figure_class="measured",
                    low=share.low, high=share.high, better="higher",
                    note="share of the floor",
                )
            )  # fmt: skip
    many = {
        routing: share_of_floor(rows, "dynamic", MANY_TOKENS, routing, EAGER).value
        for routing in ROUTINGS
    }
    public = {
        label: share_of_floor(rows, kernel, MANY_TOKENS, RECORDED, EAGER).value
        for kernel, label in KERNELS.items()
        if kernel != "dynamic"
    }
    low, high = graph_range(rows, "dynamic", "uniform")
    sizes = graph_sizes(rows)
    reached: list[str] = []
    missed: list[str] = []
    for routing, found in many.items():
        goal = GOAL_MANY_UNIFORM if routing == "uniform" else GOAL_MANY_SKEWED
        (reached if found >= goal else missed).append(
            f"{share_said(found, goal)} on {ROUTINGS[routing]} routing (goal {percent(goal)})"
        )
    errors = data["check"]["largest_relative_error"]
    findings = (
        Finding(
            text=f"At {MANY_TOKENS:,} tokens moeprof's kernel comes within its goal of the floor "
            f"at {', '.join(reached) or 'no routing'}"
            + (f"; it misses it at {', '.join(missed)}." if missed else ".")
            + " The public kernels reach "
            + ", ".join(f"{percent(share)} ({label})" for label, share in public.items())
            + " on the recorded routing.",
            severity=SEVERITY_COST - 2 if missed else SEVERITY_FACT,
            section="kernels",
            metric=f"kernels/share/dynamic/{RECORDED}",
        ),
        Finding(
            text=f"At {sizes[0]} to {sizes[-1]} tokens, as CUDA graphs, it reaches "
            f"{share_said(low, GOAL_FEW_UNIFORM)} to {percent(high)} of the floor on uniform "
            f"routing (goal {percent(GOAL_FEW_UNIFORM)}: "
            f"{'reached' if low >= GOAL_FEW_UNIFORM else 'missed'}).",
            severity=SEVERITY_FACT,
            section="kernels",
        ),
    )
    result = Result(
        name="kernels",
        title="Share of the floor",
        table=rows,
        metrics=tuple(metrics),
        findings=findings,
        notes=(
            "A share slightly above 1 is possible: the floor uses the bandwidth of a copy, which "
            "reads and writes, while the kernel mostly reads.",
            *_strictly(many),
            f"Up to {MOST_GRAPH_TOKENS} tokens a layer is timed as replays of a CUDA graph that "
            "goes through several layers' weights, so that none is left in the L2 cache; above, "
            "eagerly. Eager times at few tokens are among all numbers.",
            *(
                (
                    "Other work held up the host meanwhile: eager calls that the device finishes "
                    "sooner than the host asks for them, as at few tokens or few busy experts, "
                    "waited for it, and their ranges are wide.",
                )
                if data.get("beside")
                else ()
            ),
            *(
                (f"Before each rate and each kernel the device rested for {data['rest_s']:g} s.",)
                if data.get("rest_s")
                else ()
            ),
            "Drawn routing is drawn anew for each geometry and size, with the number of tokens as "
            f"its seed; {_described(data['rows'])}.",
            *_as_measured(data),
            f"Measured rates: copy {data['ceilings']['copy_bytes_per_s'] / 1e12:.2f} TB/s read "
            f"plus written, matrix products "
            f"{data['ceilings']['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s.",
            f"{len(errors)} kernels {_held_said(data['check'])}: "
            f"{', '.join(errors)}. The largest relative error is {max(errors.values()):.1e}, of "
            f"moeprof's kernel {errors['dynamic']:.1e}{_timed_errors_said(rows)}.",
        ),
    )
    own = rows[rows["geometry"] == GEOMETRY]
    shown = own[own["kernel"].isin(KERNELS)]
    top = max(1.0, float(shown["share"].max()) - _ABOVE_ONE)
    panels = []
    for routing, words in ROUTINGS.items():
        series: list[dict[str, Any]] = [
            {
                "key": _SERIES.get(kernel, kernel),
                "label": label,
                "points": [
                    [row["num_tokens"], row["share"], row["share_low"], row["share_high"]]
                    for _, row in own[
                        (own["kernel"] == kernel)
                        & (own["routing"] == routing)
                        & ((own["mode"] == GRAPH) == (own["num_tokens"] <= MOST_GRAPH_TOKENS))
                    ].iterrows()
                ],
            }
            for kernel, label in KERNELS.items()
        ]
        goal = GOAL_MANY_UNIFORM if routing == "uniform" else GOAL_MANY_SKEWED
        points = [[MANY_TOKENS, goal, None, None]]
        if routing == "uniform":
            points += [[size, GOAL_FEW_UNIFORM, None, None] for size in sizes]
        series.append({"key": "goal", "label": "goal for moeprof", "marks": True, "points": points})
        panels.append(
            {
                **panel(f"routing {words}", "tokens", "share of the floor", "share", series),
                "y_max": top,
                "gap": [MOST_GRAPH_TOKENS, MOST_GRAPH_TOKENS + 1],
            }
        )
    figures = [
        figure_data(
            "shares",
            "lines",
            "Share of the floor by tokens, 512 experts of 1024 x 4096, top-2",
            alt="; ".join(
                f"{MANY_TOKENS:,} tokens, {ROUTINGS[routing]}: moeprof {percent(share)}"
                for routing, share in many.items()
            ),
            how=f"1 is the floor. Up to {MOST_GRAPH_TOKENS} tokens CUDA graphs, above that eager "
            "calls. Dots are the goals where one is set; skewed routing at few tokens has none.",
            panels=panels,
        )
    ]
    section = result_section(
        result,
        question="How near does each kernel come to what the device allows?",
        labels=labels,
        figures=figures,
        tables=[
            rows_table("Every kernel, size and routing", _with_errors_as_read(rows)),
            *_routing_tables(data),
        ],
        headline=[f"kernels/share/dynamic/{routing}" for routing in ROUTINGS],
    )
    return part(
        "kernels",
        data,
        title="Gating kernels",
        verdict=f"moeprof's kernel reaches {percent(many['uniform'])} of the floor at "
        f"{MANY_TOKENS:,} tokens on uniform routing and {percent(many[RECORDED])} on recorded.",
        routing=list(data["routing"].values()),
        facts={"Repetitions": repetitions_said(rows["num_repetitions"])},
        banners=[
            *([] if data.get("complete", True) else ["The run was cut short: rows are missing."]),
            *(f"Wrong: {each}." for each in data.get("failures", ())),
            *beside_banners([data]),
            *earlier_banners(data),
        ],
        section=section,
        result=result,
    )


def ending_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns at which batch each gating's series ended and why, where the result says so."""
    earlier = {row["gating"] for row in data.get("earlier", {}).get("rows", ())}
    return [
        f"{GATINGS[each['gating']]}: timed up to batch {each['largest_timed']}, run up to "
        f"{each['largest_run']}; {each['said']}."
        + (
            " In its only pass faster than the best that was timed: batch "
            f"{', '.join(map(str, each['faster_once']))}."
            if each["faster_once"]
            else ""
        )
        for each in data.get("endings", ())
        if each["gating"] not in earlier
    ]


def _described(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns which of the routings are described above."""
    if all("routing_source" in row for row in rows):
        return (
            f"those described above are of {MANY_TOKENS:,} tokens, every row of the run has its "
            "own description, which the last table has"
        )
    return "of each kind the result keeps the description of the last"


def _as_measured(data: Mapping[str, Any]) -> list[str]:
    """Returns what results of later runs say of how they were measured."""
    notes = []
    rows = measured_rows(data, "rows", "kernel")
    others = sorted({KERNELS[row["kernel"]] for row in data.get("earlier", {}).get("rows", ())})
    earlier = f" Those of {', '.join(others)} are of an earlier run, and are not." if others else ""
    if any(row.get("ahead") for row in rows):
        notes.append(
            f"For eager rows, but those of up to {MOST_GRAPH_TOKENS} tokens of the LM geometry, "
            f"the host asks for all repetitions before the first begins: times are the device's."
            f"{earlier}"
        )
    if others and any("relative_error" in row for row in rows):
        notes.append(
            f"Rows of {', '.join(others)} were not held to float64 in the run that they are of."
        )
    if data.get("public_not_run"):
        reasons = (f"{name}: {reason}" for name, reason in data["public_not_run"].items())
        notes.append(f"Public kernels that this run did not time. {'. '.join(reasons)}.")
    held = data["check"]["largest_relative_error"]
    raised = [
        f"{name}: {error}"
        for name, error in data["check"].get("raised", {}).items()
        if name in held
    ]
    if raised:
        notes.append(f"Raised an error in a case, and was not held to that. {'. '.join(raised)}.")
    return notes


def _timed_errors_said(rows: pd.DataFrame) -> str:
    """Returns the largest errors of timed layers, where outputs of these were held to anything."""
    if "largest_token_error" not in rows:
        return ""
    ours = rows.loc[rows["kernel"] == "dynamic", "largest_token_error"].max()
    return f"; on the layers that are timed {rows['largest_token_error'].max():.1e}" + (
        "" if pd.isna(ours) else f", of moeprof's {ours:.1e}"
    )


def _with_errors_as_read(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns rows with errors and memory in words, blanks where they were not looked at."""
    made = rows
    if "largest_token_error" in rows:
        said = ["" if pd.isna(each) else f"{each:.1e}" for each in rows["largest_token_error"]]
        made = rows.assign(largest_token_error=said)
    if "extra_bytes" in rows:
        sizes = ["" if pd.isna(each) else wording.num_bytes(each) for each in rows["extra_bytes"]]
        made = made.drop(columns="extra_bytes").assign(extra_memory=sizes)
    return made


def _routing_tables(data: Mapping[str, Any]) -> list[TableData]:
    """Returns what the routing of every row is, where rows say so."""
    named = ("geometry", "num_tokens", "routing")
    found = {
        tuple(row[each] for each in named): row["routing_source"]
        for row in data["rows"]
        if "routing_source" in row
    }
    if not found:
        return []
    made = pd.DataFrame(
        {**dict(zip(named, key, strict=True)), "is": source} for key, source in found.items()
    )
    return [rows_table("Routing of every geometry and size", made)]


def _held_said(check: Mapping[str, Any]) -> str:
    """Returns what kernels were held to."""
    if "tolerance" not in check:
        return f"agree with float64 in {check['num_cases']} cases each"
    cases = sorted(set(check["cases_by_kernel"].values()))
    said = f"{cases[0]} to {cases[-1]}" if len(cases) > 1 else f"{cases[0]}"
    return (
        f"are held to float64, token by token, in {said} cases each, and on each layer that is "
        f"timed; {check['tolerance']:g} is allowed"
    )


def _strictly(many: Mapping[str, float]) -> list[str]:
    """Returns what the goal for near-uniform routing would say of routing that is only skewed."""
    short = [
        f"{ROUTINGS[routing]} ({share_said(share, GOAL_MANY_SKEWED)})"
        for routing, share in many.items()
        if routing != "uniform" and share < GOAL_MANY_UNIFORM
    ]
    if not short:
        return []
    return [
        "All but uniform routing is held to the goal for skewed routing. The load that the twin "
        f"recorded is nearly even; held to {percent(GOAL_MANY_UNIFORM)}, the goal for near-uniform "
        f"routing, these would miss it: {', '.join(short)}."
    ]


def _times(value: float | None) -> str:
    return "not to be had" if value is None else f"{value:.1f} times"


def _share(value: float | None) -> str:
    return "nothing" if value is None else percent(value)


def _met_words(own_best: bool, equal_terms: bool) -> str:
    if own_best and equal_terms:
        return "reached at both"
    if own_best or equal_terms:
        return f"reached {'at best batches' if own_best else 'at equal terms'} only"
    return "missed at both"
