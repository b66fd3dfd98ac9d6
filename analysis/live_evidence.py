"""What was measured on a GPU, read from the results that are kept, as rows and as numbers.

Every figure of `analysis.live_results` comes through here, so that a page
cannot say something else than the files. Leaves out how it is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from analysis.gpu.allocator_readings import is_steady
from analysis.gpu.link_readings import LINK_TOLERANCE, half_width, link_judged
from moeprof.errors import MoeprofError

RESULTS = Path(__file__).resolve().parent / "results"
FILES: Mapping[str, str] = MappingProxyType(
    {
        "headline": "paper_headline.json",
        "kernels": "gating_kernels.json",
        "buffering": "buffering_live.json",
        "twin": "twin_lm.json",
        "twin_mt": "twin_mt.json",
    }
)
_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "headline": ("config", "routing", "weight_bytes", "rows", "breakdown", "headline"),
        "kernels": ("check", "ceilings", "routing", "rows"),
        "buffering": ("studies",),
        "twin": ("config", "text", "learned", "held_out", "recorded", "routing"),
        "twin_mt": ("config", "text", "learned", "held_out", "recorded", "routing", "beside"),
    }
)
_BY_STUDY = ("buffering",)
"""Results whose studies may come from several runs: each says its own command and device."""
_ALWAYS = ("command", "date", "hardware", "versions")
ADDITIONAL_FILES: Mapping[str, str] = MappingProxyType(
    {
        "predictions": "prediction_quality.json",
        "latency": "memory_latency.json",
        "parallel": "expert_parallel.json",
        "mt": "mt_headline.json",
        "skew": "gating_skew.json",
    }
)
"""Results that the page takes where they are there."""
_ADDITIONAL_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "predictions": (
            "command", "sources", "counts", "all", "groups", "regret", "not_measured", "goals",
            "rows",
        ),
        "latency": (
            "command", "sources", "percentile", "routing", "predicted", "measured", "frontier",
            "token_major", "hit_rate_alone", "recommended", "budget_bytes", "calibrated_on",
        ),
        "parallel": (*_ALWAYS, "num_ranks", "kernel", "all_to_all", "traces"),
        "mt": _ALWAYS,
        "skew": (
            *_ALWAYS, "geometry", "num_tokens", "tolerance", "routing", "agreement", "states",
            "complete",
        ),
    }
)  # fmt: skip

GATINGS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense twin, equal FLOPs",
        "dynamic": "dynamic, moeprof's kernel",
        "dynamic_grouped": "dynamic, torch grouped GEMM",
        "dynamic_loop": "dynamic, one GEMM per expert (the paper's)",
        "static_index": "static, indices (as Tutel)",
        "static_grouped": "static, masks per 1,024 tokens (as GShard)",
        "static_mask": "static, one mask (as fairseq)",
    }
)
"""What each way of gating is called, fastest first."""
KERNELS: Mapping[str, str] = MappingProxyType(
    {
        "dynamic": "moeprof",
        "moe-ops": "moe-ops (PyPI)",
        "transformers grouped_mm": "transformers grouped_mm",
    }
)
"""The kernels that stand beside each other: moeprof's, then the public ones."""
GEOMETRY = "lm"
MANY_TOKENS = 16_384
MOST_GRAPH_TOKENS = 64
GRAPH, EAGER = "graph", "eager"
RECORDED = "recorded, decoder"
ROUTINGS: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "uniform",
        "zipf 1": "Zipf 1",
        RECORDED: "recorded by the twin",
        "zipf 2.2": "Zipf 2.2",
    }
)

GOAL_LINK_ERROR = LINK_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The results, as they were written.

    Attributes:
        headline: The founding paper's language model, whole.
        kernels: Gating kernels against the floor.
        buffering: Live expert buffering.
        twin: The model whose routing drove the paper's language model.
        twin_mt: The same for its translation model.
        additions: Those of `ADDITIONAL_FILES` that are there, by name.
    """

    headline: Mapping[str, Any]
    kernels: Mapping[str, Any]
    buffering: Mapping[str, Any]
    twin: Mapping[str, Any]
    twin_mt: Mapping[str, Any]
    additions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_evidence(folder: Path = RESULTS) -> Evidence:
    """Reads the results.

    Args:
        folder: Where the files named in `FILES`, and perhaps in `ADDITIONAL_FILES`, lie.

    Raises:
        MoeprofError: One is missing, is no JSON or lacks a field.
    """
    return Evidence(
        **{
            name: _read(folder / file, (*(() if name in _BY_STUDY else _ALWAYS), *_NEEDED[name]))
            for name, file in FILES.items()
        },
        additions={
            name: _read(folder / file, _ADDITIONAL_NEEDED[name])
            for name, file in ADDITIONAL_FILES.items()
            if (folder / file).exists()
        },
    )


def _read(path: Path, needed: Sequence[str]) -> Mapping[str, Any]:
    hint = "analysis/gpu/ holds the script that measures it on a GPU"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MoeprofError(f"there is no {path}", hint=hint) from error
    except (OSError, ValueError) as error:
        raise MoeprofError(f"cannot read {path}: {error}", hint=hint) from error
    known: Mapping[str, Any] = data if isinstance(data, dict) else {}
    lacking = [each for each in needed if each not in known]
    if "studies" in needed:
        lacking += [
            f"{each} of {name}"
            for name, study in known.get("studies", {}).items()
            for each in _ALWAYS
            if each not in study
        ]
    if lacking:
        raise MoeprofError(f"{path} lacks {', '.join(lacking)}", hint=hint)
    return data


def spread(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median and the quartiles of repetitions."""
    low, median, high = np.percentile(np.asarray(times_ms, dtype=float), [25, 50, 75])
    return float(median), float(low), float(high)


def share_columns(floor_ms: float, times_ms: Sequence[float]) -> dict[str, float]:
    """Returns the columns of repetitions beside the floor: times in ms, shares, quartiles."""
    median, low, high = spread(times_ms)
    return {
        "floor_ms": floor_ms,
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "share": floor_ms / median,
        "share_low": floor_ms / high,
        "share_high": floor_ms / low,
    }


def measured_rows(data: Mapping[str, Any], field: str, named: str) -> list[Mapping[str, Any]]:
    """Returns the rows of a result, those that an earlier run measured better from there.

    Args:
        data: With the rows, and perhaps ``earlier``: an earlier run, why some of it is kept, and
            that.
        field: Which rows.
        named: What tells whose a row is.
    """
    kept = data.get("earlier", {}).get(field, [])
    names = {row[named] for row in kept}
    return [*(row for row in data[field] if row[named] not in names), *kept]


def kernel_rows(kernels: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per kernel, size and routing: times in ms, and shares of the floor.

    Where the run held the outputs of timed layers to the definition, the largest relative error of
    a token; where it counted it, memory beyond what the kernel was given.
    """
    rows = []
    for row in measured_rows(kernels, "rows", "kernel"):
        rows.append(
            {
                "geometry": row["geometry"],
                "num_tokens": row["num_tokens"],
                "routing": row["routing"],
                "mean_active_experts": row["mean_active_experts"],
                "kernel": row["kernel"],
                "mode": row["mode"],
                **share_columns(row["floor_ms"], row["times_ms"]),
                "num_repetitions": len(row["times_ms"]),
                "largest_token_error": row.get("relative_error", math.nan),
                "extra_bytes": row.get("extra_bytes", math.nan),
            }
        )
    made = pd.DataFrame(rows)
    later = ["largest_token_error", "extra_bytes"]
    # Earlier results have neither, and graphs no memory of their own.
    return made.drop(columns=[each for each in later if made[each].isna().all()])


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the floor, with the quartiles of its repetitions."""

    value: float
    low: float
    high: float


def share_of_floor(
    rows: pd.DataFrame, kernel: str, num_tokens: int, routing: str, mode: str
) -> Share:
    """Returns one share of the floor at the paper's LM geometry.

    Args:
        rows: As `kernel_rows` gives them.
        kernel: As the file names it.
        num_tokens: Of the layer's input.
        routing: One of `ROUTINGS`.
        mode: `GRAPH` or `EAGER`.
    """
    found = rows[
        (rows["geometry"] == GEOMETRY)
        & (rows["kernel"] == kernel)
        & (rows["num_tokens"] == num_tokens)
        & (rows["routing"] == routing)
        & (rows["mode"] == mode)
    ]
    if len(found) != 1:
        raise MoeprofError(
            f"{FILES['kernels']} has {len(found)} rows of {kernel} at {num_tokens} tokens, "
            f"{routing}, {mode}",
            hint="measure again with analysis/gpu/gating_kernels.py",
        )
    row = found.iloc[0]
    return Share(
        value=float(row["share"]), low=float(row["share_low"]), high=float(row["share_high"])
    )


def graph_sizes(rows: pd.DataFrame) -> list[int]:
    """Returns the sizes, in tokens, that were timed as CUDA graphs."""
    own = rows[(rows["geometry"] == GEOMETRY) & (rows["mode"] == GRAPH)]
    return sorted(int(size) for size in own["num_tokens"].unique())


def graph_range(rows: pd.DataFrame, kernel: str, routing: str) -> tuple[float, float]:
    """Returns the smallest and the largest share over `graph_sizes`."""
    shares = [
        share_of_floor(rows, kernel, size, routing, GRAPH).value for size in graph_sizes(rows)
    ]
    return min(shares), max(shares)


def headline_rows(headline: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per gating and batch: times in ms, tokens per second, bytes; NaN where out.

    The range of tokens per second is that of the quartiles of the repetitions.
    """
    rows = []
    for row in measured_rows(headline, "rows", "gating"):
        out = "out_of_memory" in row
        tokens = row.get("num_tokens", math.nan)
        median, low, high = (math.nan,) * 3 if out else spread(row["times_ms"])
        rows.append(
            {
                "gating": row["gating"],
                "batch": row["batch"],
                "num_tokens": tokens,
                "out_of_memory": out,
                "median_ms": median,
                "low_ms": low,
                "high_ms": high,
                "p95_ms": row.get("p95_ms", math.nan),
                "tokens_per_s": row.get("tokens_per_s", math.nan),
                "tokens_per_s_low": 1e3 * tokens / high,
                "tokens_per_s_high": 1e3 * tokens / low,
                "extra_bytes": row.get("extra_bytes", math.nan),
                "num_repetitions": 0 if out else len(row["times_ms"]),
            }
        )
    return pd.DataFrame(rows)


def once_rows(headline: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per gating and batch that ran a single time, for its memory.

    Empty where there are none, as in results from before there were any. A single pass has no
    percentiles and no range. Gatings whose rows are of an earlier run have none of the later one.
    """
    place = {name: index for index, name in enumerate(GATINGS)}
    earlier = {row["gating"] for row in headline.get("earlier", {}).get("rows", ())}
    found = sorted(
        (row for row in headline.get("once", ()) if row["gating"] not in earlier),
        key=lambda row: (place[row["gating"]], row["batch"]),
    )
    return pd.DataFrame(
        {
            "gating": row["gating"],
            "batch": row["batch"],
            "num_tokens": row["num_tokens"],
            "pass_ms": row["pass_ms"],
            "tokens_per_s": 1e3 * row["num_tokens"] / row["pass_ms"],
            "extra_bytes": row["extra_bytes"],
        }
        for row in found
    )


def best_of(rows: pd.DataFrame, gating: str) -> pd.Series[Any]:
    """Returns the row of a gating with the most tokens per second."""
    own = rows[(rows["gating"] == gating) & ~rows["out_of_memory"]]
    if own.empty:
        raise MoeprofError(f"{FILES['headline']} has no row of {gating}")
    return own.loc[own["tokens_per_s"].idxmax()]


def at_batch(rows: pd.DataFrame, gating: str, batch: int) -> pd.Series[Any]:
    """Returns the row of a gating at a batch."""
    return rows[(rows["gating"] == gating) & (rows["batch"] == batch)].iloc[0]


def best_at_the_end(rows: pd.DataFrame, once: pd.DataFrame | None = None) -> list[str]:
    """Returns the gatings of which a larger batch might have given more than their best.

    Their best batch is the largest tried, or a larger one was faster in its only pass.

    Args:
        rows: Of `headline_rows`.
        once: Of `once_rows`.
    """
    found = []
    for gating in GATINGS:
        best = best_of(rows, gating)
        tried, single = rows[rows["gating"] == gating], pd.DataFrame()
        if once is not None and len(once):
            single = once[once["gating"] == gating]
        is_faster = len(single) > 0 and single["tokens_per_s"].max() > best["tokens_per_s"]
        if is_faster or best["batch"] == max([tried["batch"].max(), *single.get("batch", ())]):
            found.append(gating)
    return found


@dataclass(frozen=True, kw_only=True)
class Gain:
    """moeprof's gating against another.

    Attributes:
        own_best: Tokens per second over the other's, each at its own best batch.
        equal_terms: The same with no more memory beyond the weights and no longer at the 95th
            percentile than the other at its best batch; None where there is no such batch.
        equal_batch: The batch of that.
    """

    own_best: float
    equal_terms: float | None
    equal_batch: int | None


def gains(headline: Mapping[str, Any]) -> dict[str, Gain]:
    """Returns moeprof's gain over every other gating, as the run wrote it or from earlier rows."""
    found = {
        row["baseline"]: Gain(
            own_best=row["gain_at_own_best"],
            equal_terms=row["gain_at_equal_terms"],
            equal_batch=row["equal_terms_batch"],
        )
        for row in headline["headline"]
    }
    rows = headline_rows(headline)
    earlier = {row["gating"] for row in headline.get("earlier", {}).get("rows", ())}
    return found | {name: _gain(rows, name) for name in found if name in earlier}


def gain_rows(headline: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per gating that moeprof's is set beside: what both gains rest on.

    Batches, repetitions, 95th percentiles and memory of the other's best row, of moeprof's best and
    of moeprof's at equal terms, which is blank where there is no such row.
    """
    rows, found = headline_rows(headline), []
    for name, gain in gains(headline).items():
        other, best = best_of(rows, name), best_of(rows, "dynamic")
        fair = rows[(rows["gating"] == "dynamic") & (rows["batch"] == gain.equal_batch)]
        equal = fair.iloc[0] if len(fair) else None
        found.append(
            {
                "over": GATINGS[name],
                "its_batch": int(other["batch"]),
                "its_repetitions": int(other["num_repetitions"]),
                "its_p95_ms": other["p95_ms"],
                "its_extra_bytes": other["extra_bytes"],
                "moeprof_batch": int(best["batch"]),
                "moeprof_repetitions": int(best["num_repetitions"]),
                "own_best_gain": f"{gain.own_best:.2f}x",
                "equal_terms_batch": "none" if equal is None else f"{equal['batch']:,}",
                "equal_terms_repetitions": (
                    "" if equal is None else f"{equal['num_repetitions']:,}"
                ),
                "equal_terms_p95_ms": math.nan if equal is None else equal["p95_ms"],
                "equal_terms_extra_bytes": math.nan if equal is None else equal["extra_bytes"],
                "equal_terms_gain": (
                    "not to be had" if gain.equal_terms is None else f"{gain.equal_terms:.2f}x"
                ),
            }
        )
    return pd.DataFrame(found)


def _gain(rows: pd.DataFrame, gating: str) -> Gain:
    """Returns moeprof's gain over a gating, from `headline_rows`."""
    other = best_of(rows, gating)
    own = rows[(rows["gating"] == "dynamic") & ~rows["out_of_memory"]]
    fair = own[(own["extra_bytes"] <= other["extra_bytes"]) & (own["p95_ms"] <= other["p95_ms"])]
    top = None if fair.empty else fair.loc[fair["tokens_per_s"].idxmax()]
    return Gain(
        own_best=float(own["tokens_per_s"].max() / other["tokens_per_s"]),
        equal_terms=None if top is None else float(top["tokens_per_s"] / other["tokens_per_s"]),
        equal_batch=None if top is None else int(top["batch"]),
    )


PARTS: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attention",
        "dense_ffn": "dense FFN",
        "gate": "gate",
        "dispatch_experts_combine": "dispatch, experts, combine",
        "head": "head",
        "rest": "rest",
    }
)


def breakdown_rows(headline: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per gating: ms of each of `PARTS` and of a whole pass."""
    rows = []
    for row in measured_rows(headline, "breakdown", "gating"):
        parts = dict(row["parts_ms"])
        total = parts.pop("all")
        known = {name: parts.get(name, 0.0) for name in PARTS if name != "rest"}
        rest = max(total - sum(known.values()), 0.0)
        rows.append(
            {"gating": row["gating"], "batch": row["batch"], **known, "rest": rest, "all": total}
        )
    order = {name: index for index, name in enumerate(GATINGS)}
    rows.sort(key=lambda row: -order[row["gating"]])
    return pd.DataFrame(rows)


LOAD = "load"
QWEN_STUDY = "qwen3-30b-a3b"
STUDIES: Mapping[str, str] = MappingProxyType(
    {
        QWEN_STUDY: "Qwen3-30B-A3B geometry",
        f"{QWEN_STUDY}-further": "Qwen3-30B-A3B geometry, further settings",
        "mt-decoder": "the paper's MT decoder",
        "zoo-lm": "zoo:lm",
    }
)
"""What each study of live buffering is called."""


def buffering_study(buffering: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the study of Qwen3-30B-A3B's geometry, with its own command, date and device."""
    if QWEN_STUDY not in buffering["studies"]:
        raise MoeprofError(f"{FILES['buffering']} lacks the study {QWEN_STUDY}")
    study: Mapping[str, Any] = buffering["studies"][QWEN_STUDY]
    return study


def only_study(buffering: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns the results of buffering with one study left in them."""
    return {**buffering, "studies": {name: buffering["studies"][name]}}


def buffering_rows(buffering: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the policies at the first capacity, the model without a buffer before them.

    Of Qwen3-30B-A3B's geometry; every miss is loaded. Times are ms of decode steps. Every setting
    of every study is in `buffering_matrix`.
    """
    study = buffering_study(buffering)
    first = study["settings"][0]["capacity"]
    settings = [
        study["unbuffered"],
        *(
            row
            for row in study["settings"]
            if row["capacity"] == first
            and row.get("miss", LOAD) == LOAD
            and not row.get("prefetch")
        ),
    ]
    rows = []
    for row in settings:
        buffered = row is not settings[0]
        own = row.get("p50_by_repetition_ms", [])
        profiler = row.get("profiler", {})
        rows.append(
            {
                "policy": row["policy"] if buffered else "all on the GPU",
                "capacity": row["capacity"] if buffered else study["experts_per_layer_here"],
                "hit_rate": row.get("hit_rate", math.nan),
                "lookups": row.get("lookups", 0),
                "copies": row.get("copies", 0),
                "copied_bytes": row.get("copied_bytes", 0),
                "p50_ms": row["decode_p50_ms"],
                "p95_ms": row["decode_p95_ms"],
                "p99_ms": row["decode_p99_ms"],
                "p50_low_ms": min(own),
                "p50_high_ms": max(own),
                "device_bytes": row["device_bytes"]["requested"],
                "saved_bytes": row["memory"]["saved_bytes"] if buffered else 0,
                "rounding_bytes": row.get("rounding_bytes", 0),
                "memory_as_predicted": row.get("requested_as_predicted"),
                "outputs_bit_equal": (
                    row["outputs_hold"] and row["outputs_compared"] == "bits" if buffered else None
                ),
                "lookups_equal_replay": row.get("lookups_equal_replay"),
                "profiler_copies_equal": profiler.get("holds"),
                "link_error": (
                    max(map(abs, row.get("link_errors") or [math.nan])) if buffered else math.nan
                ),
                "allocations_in_steady_state": row.get("allocations_in_steady_state", 0),
                "slots_broken": row.get("slots_broken", 0),
                "num_repetitions": len(row["repetitions"]),
            }
        )
    return pd.DataFrame(rows)


def buffering_matrix(buffering: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per study, capacity, policy and miss action: what was checked, what held.

    A check that was not looked at is None. ``link_error`` is the largest of the repetitions,
    without sign. ``link_error_net`` is the middle one, less the bytes that the same run receives
    where no expert is copied: commands, ids and rows, which vary from run to run.
    ``link_error_judged`` is the one that is held to the goal: net, or of all bytes where no run
    without copies was counted, as the run said. ``link_error_known`` tells where half of its 90%
    interval is within the goal: runs that copy little differ by much of it. Results from before a
    run said so, and why the profiler was left out, have blanks.
    """
    rows = []
    for name, study in buffering["studies"].items():
        for row in study["settings"]:
            errors = row.get("link_errors") or [math.nan]
            net = row.get("link_errors_net") or [math.nan]
            control = row.get("wrong_expert_on_host")
            net_error = abs(float(np.median(net)))
            # Runs from before there was this judgement had no other than net.
            judged = link_judged(row) if row.get("link_judged") else None
            width = half_width(row.get("link_errors_net") or errors)
            rounded = row.get("output_errors") or {}
            allocator = row.get("allocator_in_steady_state") or {}
            rows.append(
                {
                    "study": STUDIES.get(name, name),
                    "policy": row["policy"]
                    + (f", {row['prefetch']} ahead" if row.get("prefetch") else ""),
                    "miss": row["miss"],
                    "copies_ahead": row.get("copies_ahead", 0),
                    "copies_ahead_used": row.get("copies_ahead_used", 0),
                    "capacity": row["capacity"],
                    "experts_per_layer": study["experts_per_layer_here"],
                    "hit_rate": row["hit_rate"],
                    "lookups": row["lookups"],
                    "copies": row["copies"],
                    "copied_bytes": row["copied_bytes"],
                    "outputs_hold": row["outputs_hold"],
                    "outputs_compared": row["outputs_compared"],
                    "wrong_expert_noticed": (
                        None if control is None else not control["comparison_holds"]
                    ),
                    "lookups_equal_replay": row["lookups_equal_replay"],
                    "slots_intact": row["slots_broken"] == 0,
                    "profiler_copies_equal": row.get("profiler", {}).get("holds"),
                    "copies_as_planned": row.get("copies_as_planned"),
                    "no_allocations": is_steady(row),
                    "memory_as_predicted": row["requested_as_predicted"],
                    "link_error": max(map(abs, errors)),
                    "link_error_net": net_error,
                    "link_error_net_worst": max(abs(error) for error in net),
                    "link_error_judged": net_error if judged is None else judged["error"],
                    "link_error_half_width": width,
                    "link_error_known": not width > GOAL_LINK_ERROR,
                    "link_judged_by": "" if judged is None else row["link_judged"]["by"],
                    "link_not_judged": _why_link_not_judged(row),
                    "profiler_left_out": row.get("profiler_left_out", ""),
                    "p50_ms": row.get("decode_p50_ms", math.nan),
                    "p95_ms": row.get("decode_p95_ms", math.nan),
                    "num_repetitions": len(row["repetitions"]),
                    "copy_overlap_share": _overlap(row),
                    "most_blocks_of_a_step": allocator.get("most_blocks_of_a_step", math.nan),
                    "worst_row_error": rounded.get("worst_row", math.nan),
                    "row_tolerance": rounded.get("tolerance", math.nan),
                }
            )
    return pd.DataFrame(rows)


def _overlap(row: Mapping[str, Any]) -> float:
    """Returns the share of the copies' time in which a kernel ran, as the profiler saw it."""
    share = (row.get("profiler") or {}).get("copies_overlapped_by_kernels")
    return math.nan if share is None else float(share)


def _why_link_not_judged(row: Mapping[str, Any]) -> str:
    """Returns why the link's counters were not held to the copies; nothing where they were."""
    if row.get("link_judged") or row.get("link_errors"):
        return ""
    reasons = [said for each in row["repetitions"] if (said := each.get("link_reason"))]
    if reasons:
        return str(reasons[0])
    if not row["copied_bytes"]:
        return "no expert was copied"
    return "what the link adds to a byte that is copied was not measured"


CHECK_COLUMNS = ("outputs_hold", "lookups_equal_replay", "slots_intact", "profiler_copies_equal",
                 "copies_as_planned", "no_allocations", "memory_as_predicted")  # fmt: skip
"""Checks of buffered runs, in the order of their letters B, H, S, P, C, A, M."""


def checks_held(buffering: Mapping[str, Any]) -> dict[str, bool]:
    """Returns each check of the buffered runs and whether it held in every setting of every study.

    Checks that no setting has are left out.
    """
    rows = buffering_matrix(buffering)
    loaded = rows["miss"] == LOAD

    def held(column: str, chosen: pd.Series[bool] | None = None) -> bool | None:
        looked = (rows if chosen is None else rows[chosen])[column].dropna()
        return None if looked.empty else bool(looked.astype(bool).all())

    on_host = held("outputs_hold", ~loaded)
    noticed = held("wrong_expert_noticed", ~loaded)
    wrong = [study["wrong_slot_map"] for study in buffering["studies"].values()]
    # Runs from before there was this control lack it; a stack of one layer has none.
    layers = [each for study in buffering["studies"].values() if (each := study.get("wrong_layer"))]
    errors = rows.loc[rows["link_error_known"], "link_error_judged"].dropna()
    found = {
        "outputs bit-equal to the model without a buffer": held("outputs_hold", loaded),
        "outputs of experts computed on the host within rounding, and outside it with wrong "
        "experts": None if on_host is None else on_host and noticed is True,
        "lookups equal to the sequential replay, row by row": held("lookups_equal_replay"),
        "copies and bytes counted by the profiler equal to the predicted misses, per step": held(
            "profiler_copies_equal"
        ),
        "bytes counted by the PCIe counters within 2% of the copies": (
            None if errors.empty else bool((errors <= GOAL_LINK_ERROR).all())
        ),
        "copies as planned, those ahead of their lookup too": held("copies_as_planned"),
        "memory asked for as predicted, to the byte": held("memory_as_predicted"),
        "no memory asked of the driver in steady state": held("no_allocations"),
        "a slot map made wrong on purpose changes the outputs": all(
            each is not None and each["held_before"] and each["outputs_differ_after"]
            for each in wrong
        ),
        "experts of another layer change the outputs of every dispatch": (
            all(each["dispatches_noticed"] == each["dispatches"] for each in layers)
            if layers
            else None
        ),
    }
    return {name: ok for name, ok in found.items() if ok is not None}


def held_out_rows(twin: Mapping[str, Any]) -> pd.DataFrame:
    """Returns bits per byte on held-out text per domain, beside a unigram model of tokens."""
    rows = pd.DataFrame(twin["held_out"])
    rows["share"] = rows["bits_per_byte"] / rows["unigram_bits_per_byte"]
    return rows
