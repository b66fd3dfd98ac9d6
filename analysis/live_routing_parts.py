"""Live expert buffering and the routing twin, as parts of the page on GPU measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.live_evidence import (
    CHECK_COLUMNS,
    GOAL_LINK_ERROR,
    LOAD,
    STUDIES,
    buffering_matrix,
    buffering_rows,
    buffering_study,
    checks_held,
    held_out_rows,
)
from analysis.live_goals import (
    GIB,
    percent,
)
from analysis.live_parts import (
    beside_banners,
    code_said,
    figure_data,
    part,
    result_section,
    rows_table,
)
from analysis.published import MT_BUFFERED_SHARES, MT_DEVICE_GIB
from moeprof.replay import wording
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described
from moeprof.reporting.vocabulary import finite

_LOCALITY = (
    ("locality/overlap_share", "Experts needed again by the next dispatch", "share"),
    ("locality/shuffled_overlap_share", "the same, dispatches shuffled", "share"),
    ("locality/uniform_overlap_share", "the same, uniform routing", "share"),
    ("locality/excess_overlap_share", "what order in time adds", "points"),
    ("locality/affinity_share", "Next layer's experts told by a token's own", "share"),
    ("locality/affinity_shuffled_share", "told by another token of the dispatch", "share"),
    ("locality/affinity_popular_share", "told by popularity", "share"),
    ("locality/affinity_uniform_share", "told under uniform routing", "share"),
    ("activation/inactive_share", "Inactive experts per dispatch", "share"),
    ("activation/uniform_inactive_share", "the same, uniform routing", "share"),
    ("activation/max_over_mean_load", "Fullest expert over mean", "ratio"),
    ("activation/uniform_max_over_mean_load", "the same, uniform routing", "ratio"),
    ("activation/usage_entropy", "Entropy of load over that of an even one", "ratio"),
    ("activation/uniform_usage_entropy", "the same, uniform routing", "ratio"),
)


def checks_rows(buffering: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per setting of every study: whether each check held; blank: not looked at."""
    rows = buffering_matrix(buffering)
    found = rows[["study", "policy", "miss"]].copy()
    found["slots"] = [
        f"{capacity} of {experts}"
        for capacity, experts in zip(rows["capacity"], rows["experts_per_layer"], strict=True)
    ]
    found[["hit_rate", "copies"]] = rows[["hit_rate", "copies"]]
    found[["decode_p50_ms", "decode_p95_ms"]] = rows[["p50_ms", "p95_ms"]]
    found["copy_time_under_kernels"] = [
        "" if pd.isna(each) else percent(each) for each in rows["copy_overlap_share"]
    ]
    for column in (*CHECK_COLUMNS, "wrong_expert_noticed"):
        found[column] = [
            "" if held is None or pd.isna(held) else "yes" if held else "no"
            for held in rows[column]
        ]
    found["compared"] = rows["outputs_compared"]
    found["pcie_difference"] = [_percent_of(value) for value in rows["link_error"]]
    found["pcie_difference_net"] = [_percent_of(value) for value in rows["link_error_net"]]
    judged = [
        said or (f"not: {why}" if why else "")
        for said, why in zip(rows["link_judged_by"], rows["link_not_judged"], strict=True)
    ]
    if any(judged):
        found["pcie_judged"] = judged
    return found


def _percent_of(value: float) -> str:
    return "" if pd.isna(value) else f"{100 * value:.1f}%"


def checks_said(data: Mapping[str, Any]) -> list[str]:
    """Returns what independent witnesses say: the profiler's count, plans, the link's counters."""
    rows = buffering_matrix(data)
    every = checks_rows(data)
    counted, planned = (
        f"{int((looked == 'yes').sum())} of {len(looked)}"
        for looked in (
            every[column][every[column] != ""]
            for column in ("profiler_copies_equal", "copies_as_planned")
        )
    )
    lost = [
        f"{row['study']} {row['policy']}, {row['slots']} slots: "
        f"{', '.join(c.replace('_', ' ') for c in CHECK_COLUMNS if row[c] == 'no')}"
        for _, row in every[(every[list(CHECK_COLUMNS)] == "no").any(axis=1)].iterrows()
    ]
    ahead = [
        f"{row['study']} {row['policy']}, which copied {row['copies_ahead']:,} of "
        f"{row['copies']:,} experts before their lookup and used {row['copies_ahead_used']:,} "
        "of those"
        for _, row in rows[rows["copies_ahead"] > 0].iterrows()
    ]
    return [
        "The profiler counts copies and bytes equal to the predicted ones of each step at "
        f"{counted} settings looked at; copies are as planned at {planned}"
        + (f", among them {'; '.join(ahead)}" if ahead else "")
        + f". Of {len(rows)} settings {len(rows) - len(lost)} held every check of outputs, "
        "lookups, slots, copies and memory" + (f"; not: {'; '.join(lost)}." if lost else "."),
        _link_said(data, rows),
    ]


def _link_said(data: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """Returns how far the PCIe counters are from the copies, by study."""
    judged = rows["link_error_judged"].notna()
    if not judged.any():
        return "Bytes on the PCIe counters were held to the copies at no setting."
    if rows["link_error_net"].isna().all():
        return _gross_said(rows)
    known = rows["link_error_known"]
    worst = rows[known].groupby("study", sort=False)["link_error_net"].max().dropna()
    said = [
        f"{_percent_of(worst[label])} ({label}, experts of "
        f"{wording.num_bytes(study['expert_bytes'])})"
        for name, study in data["studies"].items()
        if (label := STUDIES.get(name, name)) in worst
    ]
    if worst.empty:
        return "Bytes on the PCIe counters are known well enough at no setting."
    widest = rows.loc[rows.loc[known, "link_error_net_worst"].idxmax()]
    beyond = [
        f"{100 * row['link_error_net']:.1f}% at {row['study']} {row['policy']}, misses by "
        f"{row['miss']}, {row['capacity']} slots ({row['copies']:,} copies, "
        f"{wording.num_bytes(row['copied_bytes'])})"
        for _, row in rows[known & (rows["link_error_net"] > GOAL_LINK_ERROR)].iterrows()
    ]
    unknown = [
        f"{_setting_said(row)} (half of a 90% interval is "
        f"{_percent_of(row['link_error_half_width'])})"
        for _, row in rows[judged & ~known].iterrows()
    ]
    gross = _gross_said(rows)
    return (
        "Bytes on the PCIe counters, less what the same run receives where no expert is copied, "
        f"differ from those of the copies by at most {', '.join(said)}: the middle of the "
        f"repetitions, of which the furthest is {100 * widest['link_error_net_worst']:.1f}% off, "
        f"at {widest['study']} {widest['policy']}, misses by {widest['miss']}, where "
        f"{wording.num_bytes(widest['copied_bytes'])} are copied and "
        f"{widest['link_error'] - widest['link_error_net']:.1f} times as much is received besides. "
        + (
            f"Beyond the goal of {percent(GOAL_LINK_ERROR)}: {'; '.join(beyond)}."
            if beyond
            else f"{'None of these' if gross or unknown else 'No setting'} is beyond the goal of "
            f"{percent(GOAL_LINK_ERROR)}."
        )
        + (
            " Not known that well, because runs differ by much of what they copy: "
            f"{'; '.join(unknown)}."
            if unknown
            else ""
        )
        + (f" {gross}" if gross else "")
    )


def _gross_said(rows: pd.DataFrame) -> str:
    """Returns what of the link was judged with nothing taken off; nothing where none was."""
    own = rows[rows["link_error_net"].isna() & rows["link_error_judged"].notna()]
    if own.empty:
        return ""
    each = [
        f"{_setting_said(row)} {_percent_of(row['link_error_judged'])}" for _, row in own.iterrows()
    ]
    beyond = int((own["link_error_judged"] > GOAL_LINK_ERROR).sum())
    return (
        "Where no run without copies was counted, all that the PCIe counters received was held to "
        f"the copies: {'; '.join(each)}; {beyond} of {len(own)} beyond the goal of "
        f"{percent(GOAL_LINK_ERROR)}."
    )


def _setting_said(row: pd.Series[Any]) -> str:
    """Returns which setting a row of `buffering_matrix` is of."""
    misses = "" if row["miss"] == LOAD else f", misses by {row['miss']}"
    return f"{row['study']} {row['policy']}{misses}, {row['capacity']} slots"


def _by_reason(rows: pd.DataFrame, column: str) -> str:
    """Returns the settings that have a reason in a column, by reason and study."""
    own = rows[rows[column] != ""]
    return "; ".join(
        f"{reason} ("
        + "; ".join(
            f"{study}: {', '.join(_briefly(row) for _, row in settings.iterrows())}"
            for study, settings in each.groupby("study", sort=False)
        )
        + ")"
        for reason, each in own.groupby(column, sort=False)
    )


def _briefly(row: pd.Series[Any]) -> str:
    """Returns policy, slots and what else tells a setting of a study from its others."""
    policy, *ahead = str(row["policy"]).split(", ", maxsplit=1)
    misses = [] if row["miss"] == LOAD else [f"by {row['miss']}"]
    return " ".join([policy, str(row["capacity"]), *misses, *ahead])


def witness_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns what else is known of the checks: what was left out and why, and by how much it held.

    Results say of it what the run that made them recorded; of earlier ones less is known.
    """
    rows = buffering_matrix(data)
    made = []
    for column, begins in (
        ("profiler_left_out", "The profiler did not look at every setting"),
        ("link_not_judged", "PCIe counters were not held to the copies at every setting"),
    ):
        if reasons := _by_reason(rows, column):
            made.append(f"{begins}: {reasons}.")
    blocks = rows.groupby("study", sort=False)["most_blocks_of_a_step"].max().dropna()
    if len(blocks):
        made.append(
            "That the driver is not asked for memory does not say that none is handed out: torch's "
            "allocator hands out, from what it holds, at most "
            + ", ".join(f"{int(most):,} blocks in a step ({name})" for name, most in blocks.items())
            + "."
        )
    rounded = rows[rows["worst_row_error"].notna()]
    if len(rounded):
        counts = [
            control
            for study in data["studies"].values()
            for row in study["settings"]
            if (control := row.get("wrong_expert_on_host"))
        ]
        share = rounded["worst_row_error"] / rounded["row_tolerance"]
        nearest = rounded.loc[share.groupby(rounded["study"], sort=False).idxmax()]
        made.append(
            "Of experts on the host the row that is nearest to its tolerance is off by "
            + "; ".join(
                f"{100 * row['worst_row_error']:.2f}%, where rounding explains "
                f"{100 * row['row_tolerance']:.2f}% ({_setting_said(row)})"
                for _, row in nearest.iterrows()
            )
            + f". With wrong experts there {sum(each['dispatches_noticed'] for each in counts):,} "
            f"of {sum(each['dispatches'] for each in counts):,} dispatches that had one are off by "
            "more."
        )
    return made


def _other_devices_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns how many lookups miss on the device that ran, beside the replay of all devices."""
    made = []
    for name, study in data["studies"].items():
        each = [
            f"{row['policy']} {row['capacity']}: {row['misses']:,} of {row['lookups']:,}, all "
            f"{every['total_misses']:,} of {every['total_lookups']:,}"
            for row in study["settings"]
            if (every := row.get("replay_by_device"))
        ]
        if each:
            source = study["routing_source"]
            made.append(
                f"Misses of lookups on the device that ran, {source['device']} of "
                f"{source['devices']}, and on all as replayed ({STUDIES.get(name, name)}, policy "
                f"and slots): {'; '.join(each)}."
            )
    return made


def _link_notes(study: Mapping[str, Any], own: pd.DataFrame) -> list[str]:
    """Returns how the PCIe counters are read, where they were.

    Args:
        study: Whose link it is.
        own: Its rows of `buffering_rows`.
    """
    if study["link_bytes_per_byte_copied"] is None or own["link_error"].isna().all():
        return []
    return [
        f"PCIe counters are read around each run; a byte copied takes "
        f"{study['link_bytes_per_byte_copied']:.3f} bytes on the link, measured beforehand, and "
        f"the largest difference from the copies is {100 * own['link_error'].max():.1f}% (goal: "
        f"{percent(GOAL_LINK_ERROR)})."
    ]


def _left_out_notes(data: Mapping[str, Any]) -> list[str]:
    """Returns which settings each study left out for time."""
    said = [
        f"{STUDIES.get(name, name)}: "
        + ", ".join(_wanted_said(setting) for setting in study["left_out_for_time"])
        for name, study in data["studies"].items()
        if study.get("left_out_for_time")
    ]
    if not said:
        return ["No setting was left out."]
    return [f"Settings left out for time, policy and slots. {'; '.join(said)}."]


def _wanted_said(setting: Sequence[Any]) -> str:
    """Returns a setting of (policy, slots, miss action and perhaps experts copied ahead)."""
    policy, capacity, miss, *ahead = setting
    name = f"{policy} {capacity}" + ("" if miss == LOAD else f" by {miss}")
    return name + (f" {ahead[0]} ahead" if ahead and ahead[0] else "")


def _variants_said(data: Mapping[str, Any]) -> list[str]:
    """Returns how long steps take whose misses are not copied as they come, beside those copied."""
    said = []
    for name, study in data["studies"].items():
        plain = {
            (row["policy"], row["capacity"]): row["decode_p50_ms"]
            for row in study["settings"]
            if row["miss"] == LOAD and not row.get("prefetch")
        }
        others = [row for row in study["settings"] if row["miss"] != LOAD or row.get("prefetch")]
        each = []
        for row in others:
            key = row["policy"], row["capacity"]
            how = (
                f"up to {row['prefetch']} experts copied ahead"
                if row.get("prefetch")
                else f"misses by {row['miss']}"
            )
            beside = f" where copying misses takes {plain[key]:.1f}" if key in plain else ""
            each.append(
                f"{row['policy']}, {row['capacity']} slots, {how}: {row['decode_p50_ms']:.1f} ms"
                + beside
            )
        if each:
            said.append(f"{STUDIES.get(name, name)}: {'; '.join(each)}")
    if not said:
        return []
    return [
        "Median decode steps where misses are computed on the host, or experts copied before they "
        f"are looked up. {'. '.join(said)}."
    ]


def _papers_points_said(data: Mapping[str, Any]) -> list[str]:
    """Returns what the founding paper's own points came to, where its decoder was run."""
    study = data["studies"].get("mt-decoder")
    if study is None:
        return []
    found = []
    for slots, share in sorted(MT_BUFFERED_SHARES.items()):
        own = [
            row
            for row in study["settings"]
            if (row["policy"], row["capacity"], row["miss"]) == ("paper", slots, LOAD)
        ]
        if not own:
            continue
        (row,) = own
        saved = row["memory"]["saved_bytes"] / GIB
        found.append(
            f"{slots} of {study['experts_per_layer_here']}: {saved:.2f} GiB saved, "
            f"{percent(saved / MT_DEVICE_GIB)} of a device's static memory (the paper: "
            f"{percent(share)}), {percent(row['hit_rate'])} hits, worst layer "
            f"{percent(1 - row['worst_layer_miss_rate'])}, median decode step "
            f"{row['decode_p50_ms']:.1f} ms, p95 {row['decode_p95_ms']:.0f} ms"
        )
    if not found:
        return []
    whole = study["unbuffered"]
    return [
        "The paper's points of its MT decoder, one device of eight, its own policy (experts kept "
        f"per layer): {'; '.join(found)}; {whole['decode_p50_ms']:.1f} ms and "
        f"{whole['decode_p95_ms']:.0f} ms with all."
    ]


def buffering_part(data: Mapping[str, Any]) -> Described:
    """Returns live expert buffering."""
    study, rows = buffering_study(data), buffering_rows(data)
    base, own = rows.iloc[0], rows.iloc[1:]
    lru = own[own["policy"] == "lru"].iloc[0]
    quickest = own.loc[own["p50_ms"].idxmin()]
    fewest = own.loc[own["copies"].idxmin()]
    held, num_settings = checks_held(data), len(buffering_matrix(data))
    source, geometry = study["routing_source"], study["geometry"]
    metrics, labels = [], {}
    for _, row in own.iterrows():
        for quantity, words, unit in (
            ("hit_rate", "Hit rate of all steps", "share"), ("p50_ms", "Median decode step", "ms"),
        ):  # fmt: skip
            key = f"buffering/{quantity}/{row['policy']}"
            labels[key] = f"{words}, {row['policy']}, {row['capacity']} of {base['capacity']}"
            ranged = quantity == "p50_ms"
            metrics.append(
                Metric(
                    name=key, value=row[quantity], unit=unit, figure_class="measured",
                    low=row["p50_low_ms"] if ranged else None,
                    high=row["p50_high_ms"] if ranged else None,
                    better="lower" if ranged else "higher",
                    note="range: medians of the repetitions" if ranged else "the same in each",
                )
            )  # fmt: skip
    key = "buffering/p50_ms/none"
    labels[key] = "Median decode step, all experts on the GPU"
    metrics.append(
        Metric(
            name=key, value=base["p50_ms"], unit="ms", figure_class="measured",
            low=base["p50_low_ms"], high=base["p50_high_ms"], better="lower",
            note="range: medians of the repetitions",
        )
    )  # fmt: skip
    lost = [name for name, ok in held.items() if not ok]
    apart = own.loc[(own["p50_high_ms"] / own["p50_low_ms"]).idxmax()]
    findings = [
        Finding(
            text=f"With {lru['capacity']} of {base['capacity']} experts a layer on the GPU, LRU "
            f"hits {percent(lru['hit_rate'])} of all lookups (the cold prefill's too), saves "
            f"{lru['saved_bytes'] / GIB:.1f} of {base['device_bytes'] / GIB:.1f} GiB and lengthens "
            f"the median decode step from {base['p50_ms']:.0f} to {lru['p50_ms']:.0f} ms (p95 "
            f"{base['p95_ms']:.0f} to {lru['p95_ms']:.0f} ms).",
            severity=SEVERITY_FACT + 3,
            section="buffering",
            metric="buffering/p50_ms/lru",
        ),
        Finding(
            text=f"{sum(held.values())} of {len(held)} checks hold in all {num_settings} settings: "
            f"{'; '.join(name for name, ok in held.items() if ok)}."
            + (f" Not: {'; '.join(lost)}." if lost else ""),
            severity=SEVERITY_COST + 10 if lost else SEVERITY_FACT + 1,
            section="buffering",
        ),
    ]
    if quickest["policy"] != fewest["policy"]:
        findings.append(
            Finding(
                text=f"Fewer copies were not faster in this run: {fewest['policy']} copies "
                f"{fewest['copies']:,} experts at {fewest['p50_ms']:.0f} ms a step, "
                f"{quickest['policy']} {quickest['copies']:,} at {quickest['p50_ms']:.0f} ms. The "
                f"medians of the repetitions of {apart['policy']} are {apart['p50_low_ms']:.0f} "
                f"and {apart['p50_high_ms']:.0f} ms: step times of policies are not ranked by it.",
                severity=SEVERITY_FACT + 2,
                section="buffering",
            )
        )
    findings += [
        Finding(text=said, severity=SEVERITY_FACT, section="buffering")
        for said in (
            *_papers_points_said(data),
            *_variants_said(data),
            *checks_said(data),
        )
    ]
    result = Result(
        name="buffering",
        title="Steps and memory",
        table=rows,
        metrics=tuple(metrics),
        findings=tuple(findings),
        notes=(
            "Outputs of experts that the host computed are compared row by row, each dispatch "
            "given the input it had without a buffer: along 48 layers in bf16 rounding alone adds "
            "up to several percent.",
            "Hit rates and copies are of the whole run: the prefill, which finds the buffer empty, "
            "and the decode steps, of which alone the times are.",
            "Policies: paper is the founding paper's, min knows the future (Belady) and bounds "
            "the hits of every other.",
            *_link_notes(study, own),
            f"The allocator rounds what is asked for up by at most "
            f"{int(own['rounding_bytes'].max())} bytes.",
            "Copy time under kernels is the share of the copies' time in which a kernel ran, seen "
            "by the profiler, which slows the host. Without copies ahead only the experts of the "
            "same dispatch that hit can be computed meanwhile.",
            *witness_notes(data),
            *_other_devices_notes(data),
            *_left_out_notes(data),
        ),
    )
    panel = {
        "title": "decode steps",
        "x_label": "policy",
        "y_label": "ms",
        "y_unit": "ms",
        "category": "policy",
        "categories": ["all on GPU", *own["policy"]],
        "series": [
            {
                "key": key,
                "label": label,
                "values": [float(value) for value in rows[column]],
                "low": None,
                "high": None,
            }
            for column, label, key in (
                ("p50_ms", "median", "recorded"),
                ("p95_ms", "p95", "shuffled"),
                ("p99_ms", "p99", "uniform"),
            )
        ],
    }
    figures = [
        figure_data(
            "steps",
            "layers",
            "Decode steps with and without a buffer",
            alt="; ".join(
                f"{row['policy']} {row['p50_ms']:.0f} ms median, {row['p99_ms']:.0f} ms p99"
                for _, row in rows.iterrows()
            ),
            how="Lower is better. The first column has all experts on the GPU and is what the "
            "others pay against.",
            panels=[panel],
        ),
        figure_data(
            "hits",
            "meters",
            f"Hit rate with {lru['capacity']} of {base['capacity']} experts a layer",
            alt="; ".join(
                f"{row['policy']} {percent(row['hit_rate'])}" for _, row in own.iterrows()
            ),
            how="Lookups whose expert was on the GPU when it was needed, of all steps, the cold "
            "prefill included; bars against the best.",
            panels=[
                {
                    "rows": [
                        {
                            "label": f"{row['policy']}: {row['copies']:,} copies, "
                            f"{row['copied_bytes'] / GIB:.1f} GiB",
                            "key": "recorded",
                            "value": row["hit_rate"],
                            "unit": "share",
                            "low": None,
                            "high": None,
                        }
                        for _, row in own.iterrows()
                    ]
                }
            ],
        ),
    ]
    section = result_section(
        result,
        question="What does it cost to keep a quarter of the experts on the GPU?"
        if 4 * lru["capacity"] == base["capacity"]
        else "What does it cost to keep some of the experts on the GPU?",
        labels=labels,
        figures=figures,
        tables=[
            rows_table("Times and memory", rows),
            rows_table("Every setting and check", checks_rows(data)),
        ],
        headline=["buffering/p50_ms/none", "buffering/p50_ms/lru", "buffering/p50_ms/paper",
                  "buffering/p50_ms/min"],
    )  # fmt: skip
    repetitions = int(rows["num_repetitions"].max())
    shared = study["host_copy_shared_by_all_layers"]
    others = {
        f"Run of {STUDIES.get(name, name)}": _run_said(other)
        for name, other in data["studies"].items()
        if other is not study
    }
    return part(
        "buffering",
        study,
        title="Live expert buffering",
        verdict=f"With {lru['capacity']} of {base['capacity']} experts a layer on the GPU a decode "
        f"step of Qwen3-30B-A3B's geometry takes {lru['p50_ms']:.0f} ms instead of "
        f"{base['p50_ms']:.0f}"
        + (", and computes the same bits." if own["outputs_bit_equal"].all() else "."),
        routing=[
            f"recorded routing {source['trace']} ({source['model']}, {source['stack']}, top-"
            f"{source['top_k']}, {source['requests']} request; from {source['origin']['format']})",
            "random weights of the same geometry",
        ],
        facts={
            "Geometry": f"{study['layers']} layers of {study['experts_per_layer_here']} experts, "
            f"{geometry['d_model']} x {geometry['d_ff']}, "
            f"{wording.num_bytes(study['expert_bytes'])} each",
            "Repetitions": f"{repetitions} of {study['steps']} steps per setting",
            **others,
        },
        banners=[
            ("One copy of a layer's experts in host memory was shared by all layers, which holds "
             "less memory there than a model would and changes no copy; " if shared else "")
            + f"{study['steps']} steps and {repetitions} repetitions per setting, one request: "
            "high percentiles rest on few steps.",
            *beside_banners([study]),
        ],
        section=section,
        result=result,
    )  # fmt: skip


def _run_said(study: Mapping[str, Any]) -> str:
    """Returns where, how and under which routing a study was run, in a line."""
    hardware, source = study["hardware"], study["routing_source"]
    code = "".join(f", code {each}" for each in code_said([study]))
    beside = f"; beside it {study['beside']}" if study.get("beside") else ""
    spread = (
        f", experts of device {source['device']} of {source['devices']}"
        if source["devices"] > 1
        else ""
    )
    shared = (
        "; one host copy shared by all layers" if study["host_copy_shared_by_all_layers"] else ""
    )
    return (
        f"{study['command']} on {hardware['device_name']}, "
        f"driver {hardware.get('driver') or 'not known'}, "
        f"torch {study['versions']['torch']}, {str(study['date'])[:10]}{code}; recorded routing "
        f"{source['trace']} ({source['model']}, {source['stack']}, top-{source['top_k']}{spread}), "
        f"{study['weights_source']}{shared}{beside}"
    )


def twin_part(data: Mapping[str, Any], name: str = "twin") -> Described:
    """Returns a model whose routing drove the others.

    Args:
        data: Its result.
        name: Of the result, in `analysis.live_evidence.FILES`.
    """
    text, routing = held_out_rows(data), routing_rows(data)
    config = data["config"]
    translates = config["encoder_layers"] > 0
    known = data["routing"]["metrics"]
    phase = "decoder/decode" if translates else "decoder/prefill"
    metrics, labels = [], {}
    for key, words, unit in _LOCALITY:
        for place in ("prefill", "decode"):
            quantity = f"{key}/decoder/{place}"
            if quantity not in known:
                continue
            each = known[quantity]
            # Its own name space: these are quoted from the result, not computed here.
            labels[f"{name}/{quantity}"] = f"{words}, {place}"
            metrics.append(
                Metric(
                    name=f"{name}/{quantity}", value=each["value"], unit=unit,
                    figure_class="exact", low=each.get("low"), high=each.get("high"),
                    note=each.get("note", ""),
                )
            )  # fmt: skip
    findings = _mt_findings(data, text, name) if translates else _lm_findings(data, text, name)
    learned, recorded = data["learned"], data["recorded"]
    result = Result(
        name=name,
        title="Its routing",
        table=text,
        metrics=tuple(metrics),
        findings=findings,
        notes=(
            "Bits per byte are measured on the device named; figures of the routing follow from "
            f"the twin's trace, sample:{data['name']}, by arithmetic, and are quoted from the "
            "result.",
            "The twin has the paper's layers, experts, top-k and width with narrow experts: its "
            "routing is learned, its times and bytes are not the paper's model's.",
            *(
                (
                    "Each batch is of one target language, so that shuffling dispatches also mixes "
                    "languages: what order in time adds is partly that.",
                )
                if translates
                else ()
            ),
        ),
    )
    group = "language" if translates else "domain"
    figures = [
        figure_data(
            "text",
            "layers",
            "Bits per byte on held-out text",
            alt="; ".join(
                f"{row['group']} {row['bits_per_byte']:.2f} of {row['unigram_bits_per_byte']:.2f}"
                for _, row in text.iterrows()
            ),
            how="Lower is better. A ring is a model that only knows how frequent each token is.",
            panels=[
                {
                    "title": f"{group}s",
                    "x_label": group,
                    "y_label": "bits per byte",
                    "y_unit": "number",
                    "category": group,
                    "categories": [str(name) for name in text["group"]],
                    "series": [
                        {"key": "recorded", "label": "twin", "low": None, "high": None,
                         "values": [float(value) for value in text["bits_per_byte"]]},
                        {"key": "uniform", "label": "unigram", "low": None, "high": None,
                         "values": [float(value) for value in text["unigram_bits_per_byte"]]},
                    ],
                }
            ],
        )
    ]  # fmt: skip
    section = result_section(
        result,
        question="Did the model that routes learn anything, and what does it use?",
        labels=labels,
        figures=figures,
        tables=[
            rows_table("Held-out text", text),
            rows_table("Routing beside its controls", routing, figure_class="exact"),
            rows_table("Idle experts by size of dispatch", _idle_table(data), figure_class="exact"),
        ],
        headline=[f"{name}/{key}/{phase}" for key in (
            "activation/inactive_share", "locality/overlap_share",
            "locality/shuffled_overlap_share", "locality/affinity_share")],
    )  # fmt: skip
    layers = f"{config['decoder_layers']} layers"
    if translates:
        layers = f"{config['encoder_layers']} + {layers}"
    return part(
        name,
        data,
        title="Routing twin, translation" if translates else "Routing twin",
        verdict=f"The routing that drove the paper's "
        f"{'translation decoder' if translates else 'model'} comes from a twin trained for "
        f"{learned['steps']:,} steps to {percent(text['share'].min())} to "
        f"{percent(text['share'].max())} of a unigram model's bits per byte.",
        routing=[f"its own: the trace is sample:{data['name']}"],
        facts={
            "Model": f"{layers}, every {_ordinal(config['moe_every'])} with "
            f"{config['num_experts']} experts, top-{config['top_k']}, d_model "
            f"{config['d_model']}, experts {config['expert_width']} wide",
            "Training": f"{learned['num_tokens']:,} tokens in {learned['seconds']:.0f} s",
            "Recorded": f"{recorded['requests']} requests, "
            f"{data['routing']['capture']['num_tokens']:,} tokens",
        },
        banners=[f"Beside it: {data['beside']}."] if data.get("beside") else [],
        section=section,
        result=result,
    )


_ORDINALS = {1: "", 2: "2nd", 3: "3rd"}


def _ordinal(count: int) -> str:
    return _ORDINALS.get(count, f"{count}th")


def _lm_findings(data: Mapping[str, Any], text: pd.DataFrame, name: str) -> tuple[Finding, Finding]:
    known = data["routing"]["metrics"]
    phase = "decoder/prefill"
    entropy = known[f"activation/usage_entropy/{phase}"]["value"]
    idle = known[f"activation/inactive_share/{phase}"]
    excess = known[f"locality/excess_overlap_share/{phase}"]
    told = known[f"locality/affinity_share/{phase}"]
    shuffled = known[f"locality/affinity_shuffled_share/{phase}"]
    adds = excess["low"] is not None and excess["low"] > 0
    return (
        _learned(data, text, name, "domain"),
        Finding(
            text=f"Its load is nearly even (entropy {entropy:.2f} of 1; {percent(idle['value'])} "
            "of the experts inactive in a prefill pass). Layers follow each other: "
            f"{percent(told['value'])} of a token's next experts can be told from its own, "
            f"{100 * shuffled['value']:.1f}% from another token's. Order in time adds "
            f"{wording.points(excess['value'])} to reuse "
            f"({wording.points(excess['low'])} to {wording.points(excess['high'])})"
            + ("." if adds else ": no more than chance explains."),
            severity=SEVERITY_FACT - 2,
            section=name,
            metric=f"{name}/locality/affinity_share/{phase}",
        ),
    )


PUBLISHED_IDLE = 0.75
"""Inactive experts of a layer of the MT decoder, batch 96 (arXiv 2303.06182, Fig. 7)."""


def _mt_findings(
    data: Mapping[str, Any], text: pd.DataFrame, name: str
) -> tuple[Finding, Finding, Finding]:
    known, rows = data["routing"]["metrics"], idle_rows(data)
    phase = "decoder/decode"
    decode = rows[(rows["stack"] == "decoder") & (rows["phase"] == "decode")]
    encode = rows[rows["stack"] == "encoder"]
    (full,), (half,) = (
        decode.iloc[[index]].to_dict("records") for index in (0, 1)
    )  # Sizes stand largest first.
    overlap = known[f"locality/overlap_share/{phase}"]["value"]
    excess = known[f"locality/excess_overlap_share/{phase}"]
    told = known[f"locality/affinity_share/{phase}"]["value"]
    shuffled = known[f"locality/affinity_shuffled_share/{phase}"]["value"]
    never = next(
        row["share_never_used"] for row in data["routing"]["use"] if row["stack"] == "encoder"
    )
    return (
        _learned(data, text, name, "target language"),
        Finding(
            text=f"Its decoder leaves {percent(full['inactive_share'])} of a layer's experts idle "
            f"with all {full['most_tokens']} sequences, as they are early in a sentence, and "
            f"{percent(half['inactive_share'])} with {half['least_tokens']} to "
            f"{half['most_tokens']}; even routing would leave "
            f"{percent(full['uniform_inactive_share'])} and "
            f"{percent(half['uniform_inactive_share'])}. The paper has about "
            f"{percent(PUBLISHED_IDLE)} at batch 96. {percent(overlap)} of the experts of a "
            "dispatch are needed by the next, of which order in time adds "
            f"{wording.points(excess['value'])} ({wording.points(excess['low'])} to "
            f"{wording.points(excess['high'])}); {percent(told)} of a token's next experts can be "
            f"told from its own, {percent(shuffled)} from another token's.",
            severity=SEVERITY_FACT - 2,
            section=name,
            metric=f"{name}/activation/inactive_share/{phase}",
        ),
        Finding(
            text=f"Its encoder never uses {percent(never)} of its experts, and leaves "
            f"{percent(encode['inactive_share'].min())} of them idle in the largest pass of "
            f"{int(encode['most_tokens'].max()):,} tokens, where the paper's has nearly all "
            f"active. {_rare_said(data['learned']['curve'])} Runs under this twin drive decoders.",
            severity=SEVERITY_COST,
            section=name,
        ),
    )


def _rare_said(curve: Sequence[Mapping[str, Any]]) -> str:
    """Returns how the share of rarely used experts, both stacks together, went in training."""
    last = curve[-1]["rare_share"]
    before = curve[len(curve) // 2]["rare_share"]
    return (
        f"Rarely used experts of both stacks were {percent(before)} half way through training and "
        f"{percent(last)} at its end."
    )


def _learned(data: Mapping[str, Any], text: pd.DataFrame, name: str, group: str) -> Finding:
    known = data["routing"]["metrics"]
    apart = known["activation/label_distance/decoder"]["value"]
    chance = known["activation/chance_label_distance/decoder"]["value"]
    return Finding(
        text=f"The twin learned: {text['bits_per_byte'].min():.2f} to "
        f"{text['bits_per_byte'].max():.2f} bits per byte on held-out text, "
        f"{percent(text['share'].min())} to {percent(text['share'].max())} of a unigram "
        f"model's. Its {group}s use experts {apart / chance:.1f} times as differently as two "
        f"halves of one {group} do.",
        severity=SEVERITY_FACT,
        section=name,
    )


def idle_rows(twin: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the share of idle experts by stack, phase and tokens of a dispatch."""
    return pd.DataFrame(twin["routing"]["idleness"])


def _idle_table(twin: Mapping[str, Any]) -> pd.DataFrame:
    rows = idle_rows(twin)
    least, most = rows["least_tokens"], rows["most_tokens"]
    return pd.DataFrame(
        {
            "stack": rows["stack"],
            "phase": rows["phase"],
            "tokens": [
                f"{low:,}" if low == high else f"{low:,} to {high:,}"
                for low, high in zip(least, most, strict=True)
            ],
            "dispatches": [f"{count:,}" for count in rows["num_dispatches"]],
            "inactive_share": rows["inactive_share"],
            "uniform_inactive_share": rows["uniform_inactive_share"],
        }
    )


def routing_rows(twin: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the twin's routing figures beside their controls, one row each."""
    known = twin["routing"]["metrics"]
    places = {"prefill": "decoder", "decode": "decoder"}
    if twin["config"]["encoder_layers"]:
        places["encode"] = "encoder"
    rows = []
    for key, words, unit in _LOCALITY:
        row: dict[str, Any] = {"quantity": words, "unit": unit}
        for place, stack in places.items():
            each = known.get(f"{key}/{stack}/{place}", {})
            row[place] = finite(each.get("value"))
            row[f"{place}_low"] = finite(each.get("low"))
            row[f"{place}_high"] = finite(each.get("high"))
        rows.append(row)
    return pd.DataFrame(rows)
