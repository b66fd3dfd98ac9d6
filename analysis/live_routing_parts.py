"""Live expert buffering and the routing twin, as parts of the page on GPU measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.live_evidence import (
    GOAL_LINK_ERROR,
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
    figure_data,
    part,
    result_section,
    rows_table,
)
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


def buffering_part(data: Mapping[str, Any]) -> Described:
    """Returns live expert buffering."""
    study, rows = buffering_study(data), buffering_rows(data)
    base, own = rows.iloc[0], rows.iloc[1:]
    lru = own[own["policy"] == "lru"].iloc[0]
    quickest = own.loc[own["p50_ms"].idxmin()]
    fewest = own.loc[own["copies"].idxmin()]
    held = checks_held(data)
    source, geometry = study["routing_source"], study["geometry"]
    metrics, labels = [], {}
    for _, row in own.iterrows():
        for quantity, words, unit in (
            ("hit_rate", "Hit rate", "share"), ("p50_ms", "Median decode step", "ms"),
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
            f"hits {percent(lru['hit_rate'])} of the lookups, saves "
            f"{lru['saved_bytes'] / GIB:.1f} of {base['device_bytes'] / GIB:.1f} GiB and lengthens "
            f"the median decode step from {base['p50_ms']:.0f} to {lru['p50_ms']:.0f} ms (p95 "
            f"{base['p95_ms']:.0f} to {lru['p95_ms']:.0f} ms).",
            severity=SEVERITY_FACT + 3,
            section="buffering",
            metric="buffering/p50_ms/lru",
        ),
        Finding(
            text=f"{sum(held.values())} of {len(held)} checks hold in all {len(own)} settings: "
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
    left = study.get("left_out_for_time", [])
    result = Result(
        name="buffering",
        title="Steps and memory",
        table=rows,
        metrics=tuple(metrics),
        findings=tuple(findings),
        notes=(
            "Policies: paper is the founding paper's, min knows the future (Belady) and bounds "
            "the hits of every other.",
            f"PCIe counters are read around each run; a byte copied takes "
            f"{study['link_bytes_per_byte_copied']:.3f} bytes on the link, measured beforehand, "
            f"and the largest difference from the copies is {100 * own['link_error'].max():.1f}% "
            f"(goal: {percent(GOAL_LINK_ERROR)}).",
            f"The allocator rounds what is asked for up by at most "
            f"{int(own['rounding_bytes'].max())} bytes.",
            f"{len(left)} further settings were left out for time."
            if left
            else "No setting was left out.",
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
            how="Lookups whose expert was on the GPU when it was needed; bars against the best.",
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
        tables=[rows_table("Every setting", rows)],
        headline=["buffering/p50_ms/none", "buffering/p50_ms/lru", "buffering/p50_ms/paper",
                  "buffering/p50_ms/min"],
    )  # fmt: skip
    repetitions = int(rows["num_repetitions"].max())
    shared = study["host_copy_shared_by_all_layers"]
    return part(
        "buffering",
        data,
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
        },
        banners=[
            ("One copy of a layer's experts in host memory was shared by all layers, which holds "
             "less memory there than a model would and changes no copy; " if shared else "")
            + f"{study['steps']} steps and {repetitions} repetitions per setting, one request: "
            "high percentiles rest on few steps."
        ],
        section=section,
        result=result,
    )  # fmt: skip


def twin_part(data: Mapping[str, Any]) -> Described:
    """Returns the model whose routing drove the others."""
    text, routing = held_out_rows(data), routing_rows(data)
    config = data["config"]
    known = data["routing"]["metrics"]
    phase = "decoder/prefill"
    entropy = known[f"activation/usage_entropy/{phase}"]["value"]
    idle = known[f"activation/inactive_share/{phase}"]
    excess = known[f"locality/excess_overlap_share/{phase}"]
    told = known[f"locality/affinity_share/{phase}"]
    shuffled = known[f"locality/affinity_shuffled_share/{phase}"]
    apart = known["activation/label_distance/decoder"]["value"]
    chance = known["activation/chance_label_distance/decoder"]["value"]
    metrics, labels = [], {}
    for key, words, unit in _LOCALITY:
        for place in ("prefill", "decode"):
            name = f"{key}/decoder/{place}"
            if name not in known:
                continue
            each = known[name]
            # Its own name space: these are quoted from the result, not computed here.
            labels[f"twin/{name}"] = f"{words}, {place}"
            metrics.append(
                Metric(
                    name=f"twin/{name}", value=each["value"], unit=unit, figure_class="exact",
                    low=each.get("low"), high=each.get("high"), note=each.get("note", ""),
                )
            )  # fmt: skip
    adds = excess["low"] is not None and excess["low"] > 0
    findings = (
        Finding(
            text=f"The twin learned: {text['bits_per_byte'].min():.2f} to "
            f"{text['bits_per_byte'].max():.2f} bits per byte on held-out text, "
            f"{percent(text['share'].min())} to {percent(text['share'].max())} of a unigram "
            f"model's. Its domains use experts {apart / chance:.1f} times as differently as two "
            "halves of one domain do.",
            severity=SEVERITY_FACT,
            section="twin",
        ),
        Finding(
            text=f"Its load is nearly even (entropy {entropy:.2f} of 1; {percent(idle['value'])} "
            "of the experts inactive in a prefill pass). Layers follow each other: "
            f"{percent(told['value'])} of a token's next experts can be told from its own, "
            f"{100 * shuffled['value']:.1f}% from another token's. Order in time adds "
            f"{wording.points(excess['value'])} to reuse "
            f"({wording.points(excess['low'])} to {wording.points(excess['high'])})"
            + ("." if adds else ": no more than chance explains."),
            severity=SEVERITY_FACT - 2,
            section="twin",
            metric=f"twin/locality/affinity_share/{phase}",
        ),
    )
    learned, recorded = data["learned"], data["recorded"]
    result = Result(
        name="twin",
        title="Its routing",
        table=text,
        metrics=tuple(metrics),
        findings=findings,
        notes=(
            "Bits per byte are measured on the device named; figures of the routing follow from "
            "the twin's trace, sample:twin-lm, by arithmetic, and are quoted from the result.",
            "The twin has the paper's layers, experts, top-k and width with narrow experts: its "
            "routing is learned, its times and bytes are not the paper's model's.",
        ),
    )
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
                    "title": "domains",
                    "x_label": "domain",
                    "y_label": "bits per byte",
                    "y_unit": "number",
                    "category": "domain",
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
        ],
        headline=[f"twin/{key}/{phase}" for key in (
            "activation/inactive_share", "locality/overlap_share",
            "locality/shuffled_overlap_share", "locality/affinity_share")],
    )  # fmt: skip
    return part(
        "twin",
        data,
        title="Routing twin",
        verdict=f"The routing that drove the paper's model comes from a twin trained for "
        f"{learned['steps']:,} steps to {percent(text['share'].min())} to "
        f"{percent(text['share'].max())} of a unigram model's bits per byte.",
        routing=["its own: the trace is sample:twin-lm"],
        facts={
            "Model": f"{config['decoder_layers']} layers, every {config['moe_every']}nd with "
            f"{config['num_experts']} experts, top-{config['top_k']}, d_model "
            f"{config['d_model']}, experts {config['expert_width']} wide",
            "Training": f"{learned['num_tokens']:,} tokens in {learned['seconds']:.0f} s",
            "Recorded": f"{recorded['requests']} requests, "
            f"{data['routing']['capture']['num_tokens']:,} tokens",
        },
        banners=[],
        section=section,
        result=result,
    )


def routing_rows(twin: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the twin's routing figures beside their controls, one row each."""
    known = twin["routing"]["metrics"]
    rows = []
    for key, words, unit in _LOCALITY:
        row: dict[str, Any] = {"quantity": words, "unit": unit}
        for place in ("prefill", "decode"):
            each = known.get(f"{key}/decoder/{place}", {})
            row[place] = finite(each.get("value"))
            row[f"{place}_low"] = finite(each.get("low"))
            row[f"{place}_high"] = finite(each.get("high"))
        rows.append(row)
    return pd.DataFrame(rows)
