"""Distinct experts against batch size, beside what uniform routing would give.

Where nothing is dropped, a token's experts do not depend on the batch it travels in, so tokens can
be grouped into batches that were never run. Decode tokens are grouped across requests, each at the
same number of tokens after its prompt, one per request. Prompt tokens are grouped as they follow
each other, prompt after prompt. Leaves out re-batching of whole runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals, wording
from moeprof.replay.access import Accesses, Floats, accesses, gather
from moeprof.replay.result import SEVERITY_FACT, FigureClass, Finding, Metric, Result
from moeprof.replay.tokens import StackTokens
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "batching"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_TOKENS_PER_SIZE = 131_072
"""Tokens grouped per size and site; groups beyond it are left out evenly."""

_HALF_OCTAVES = 2
_HALF = 0.5
_SATURATED = 0.9
_AGREEING = 0.05


def batching(trace: Trace) -> Result:
    """Returns how many experts a batch of a given size needs.

    The table has one row per site, phase and group size; table ``curve`` pools the sites of a
    stack, table ``dispatches`` holds the sizes that were really run.
    """
    figure_class: FigureClass = "estimate" if _drops(trace) else "exact"
    per_site, curves, recorded = [], [], []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    stacks = wording.stacks_of(trace)
    for stack, tokens in stacks:
        recorded += _recorded(tokens)
        for phase in tokens.token_phases():
            rows, curve = _phase_curves(tokens, phase)
            per_site += rows
            curves += curve
            metrics += [
                wording.metric_of(
                    f"{NAME}/distinct_share/{stack}/{phase}/{row['num_tokens']}",
                    _interval(row),
                    unit="share",
                    figure_class=figure_class,
                    note=f"experts of a site that {row['num_tokens']} tokens need together",
                )
                for row in curve
            ]
            if phase == wording.main_phase(tokens.token_phases()):
                findings += _findings(stack, phase, curve, num_stacks=len(stacks))
    return Result(
        name=NAME,
        title="Distinct experts against batch size",
        table=pd.DataFrame(per_site),
        metrics=tuple(metrics),
        findings=wording.routing_findings(trace, NAME, findings),
        tables={
            "curve": pd.DataFrame(curves).drop(columns="split_half", errors="ignore"),
            "dispatches": pd.DataFrame(recorded),
        },
        notes=(
            "Decode batches are made of one token per request, so sizes end where requests do; "
            "prompt batches are made of tokens that follow each other.",
            "Popularity: tokens draw their experts independently, each expert as often as in this "
            "trace. Uniform: E(1-(1-k/E)^T).",
            *(
                ("The model drops tokens by capacity, so regrouping is an estimate.",)
                if figure_class == "estimate"
                else ()
            ),
        ),
    )


def uniform_distinct(num_experts: int, picked: float, num_tokens: Floats | float) -> Floats:
    """Returns the distinct experts that tokens need on average if they pick at random.

    Args:
        num_experts: Experts of the site.
        picked: Experts per token.
        num_tokens: Tokens per batch.
    """
    return num_experts * (1 - (1 - picked / num_experts) ** np.asarray(num_tokens, np.float64))


def _drops(trace: Trace) -> bool:
    return any(site.capacity_rule is not None for site in trace.info.sites)


def _phase_curves(
    tokens: StackTokens, phase: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    order, column, row = _lanes(tokens, phase)
    halves = tokens.requests.half
    rows: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    for size in BATCH_SIZES:
        chosen, group = _groups(order, column, row, size)
        if not len(chosen):
            break
        by_request = np.lexsort((tokens.request[chosen], group))
        chosen, group = chosen[by_request], group[by_request]
        pooled: list[tuple[Floats, Floats]] = []
        uniforms, popular = [], []
        for site, experts in zip(tokens.sites, tokens.expert, strict=True):
            access = _grouped(tokens, experts, chosen, group, site)
            whole = np.flatnonzero(access.num_tokens == size)
            if not len(whole):
                continue
            kept = np.isin(np.arange(access.num_dispatches), whole).astype(np.float64)
            distinct, slots = access.slot_shares(kept)
            found = intervals.share(distinct, slots, halves=halves)[0]
            counts = np.bincount(access.expert, weights=access.num_rows, minlength=site.num_experts)
            num_tokens = float(access.num_tokens.sum())
            picked = float(counts.sum()) / num_tokens
            uniform = float(uniform_distinct(site.num_experts, picked, size)) / site.num_experts
            popularity = float(np.mean(1 - (1 - np.minimum(counts / num_tokens, 1)) ** size))
            pooled.append((distinct, slots))
            uniforms.append(uniform)
            popular.append(popularity)
            rows.append(
                {
                    "stack": tokens.stack,
                    "phase": phase,
                    "site": site.site,
                    "layer": site.layer,
                    "num_tokens": size,
                    "num_groups": len(whole),
                    "distinct_share": found.value,
                    "distinct_share_low": found.low,
                    "distinct_share_high": found.high,
                    "num_distinct": None if found.value is None else found.value * site.num_experts,
                    "popularity_share": popularity,
                    "uniform_share": uniform,
                }
            )
        if not pooled:
            continue
        total = intervals.share(
            np.sum([part[0] for part in pooled], axis=0),
            np.sum([part[1] for part in pooled], axis=0),
            halves=halves,
        )[0]
        curve.append(
            {
                "stack": tokens.stack,
                "phase": phase,
                "num_tokens": size,
                "distinct_share": total.value,
                "distinct_share_low": total.low,
                "distinct_share_high": total.high,
                "split_half": total.split_half,
                "popularity_share": float(np.mean(popular)),
                "uniform_share": float(np.mean(uniforms)),
            }
        )
    return rows, curve


def _lanes(
    tokens: StackTokens, phase: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns tokens in the order in which they are grouped, with their row and place in it.

    Groups never cross rows. A decode row holds the tokens that lie equally far behind their
    prompts, one per request, requests in random order. Prompt tokens form one row.
    """
    chosen = np.flatnonzero(tokens.phase == schema.TOKEN_PHASES.index(phase))
    chosen = chosen[tokens.sequence[chosen] == _first_sequence(tokens, chosen)]
    order = chosen[np.lexsort((tokens.position[chosen], tokens.request[chosen]))]
    request = tokens.request[order]
    index = np.arange(len(order))
    if phase != "decode":
        return order, index, np.zeros(len(order), np.int64)
    starts = np.r_[True, request[1:] != request[:-1]] if len(order) else np.zeros(0, bool)
    behind_prompt = index - np.maximum.accumulate(np.where(starts, index, 0))
    generator = np.random.default_rng(intervals.SEED)
    by_row = np.lexsort((generator.random(len(order)), behind_prompt))
    row = behind_prompt[by_row]
    new_row = np.r_[True, row[1:] != row[:-1]] if len(row) else np.zeros(0, bool)
    return order[by_row], index - np.maximum.accumulate(np.where(new_row, index, 0)), row


def _first_sequence(tokens: StackTokens, chosen: NDArray[np.int64]) -> NDArray[np.int32]:
    """Returns, per token, the first beam of its request: one row of the batch per request."""
    first = np.full(len(tokens.requests), np.iinfo(np.int32).max, np.int32)
    np.minimum.at(first, tokens.request[chosen], tokens.sequence[chosen])
    return first[tokens.request[chosen]]


def _groups(
    order: NDArray[np.int64], place: NDArray[np.int64], row: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the tokens of all full groups of ``size`` and the number of each one's group."""
    starts = np.flatnonzero(place % size == 0)
    full = starts[starts + size <= len(order)]
    full = full[row[full + size - 1] == row[full]]
    most = max(MAX_TOKENS_PER_SIZE // size, 1)
    if len(full) > most:
        full = full[np.linspace(0, len(full) - 1, most).astype(np.int64)]
    members = (full[:, None] + np.arange(size)).ravel()
    return order[members], np.repeat(np.arange(len(full)), size)


def _grouped(
    tokens: StackTokens,
    experts: NDArray[np.int32],
    chosen: NDArray[np.int64],
    group: NDArray[np.int64],
    site: schema.Site,
) -> Accesses:
    return gather(
        dispatch=group.astype(np.int32),
        request=tokens.request[chosen],
        expert=experts[chosen],
        num_experts=site.num_experts,
        num_requests=len(tokens.requests),
        lane=np.zeros(int(group[-1]) + 1, np.int32),
    )


def _recorded(tokens: StackTokens) -> list[dict[str, Any]]:
    """Returns the dispatches that were really run, by half octaves of their size."""
    rows: list[dict[str, Any]] = []
    totals: dict[tuple[str, int], list[Floats]] = {}
    for site in tokens.sites:
        for phase, access in accesses(tokens, site).items():
            octave = np.round(_HALF_OCTAVES * np.log2(access.num_tokens)).astype(np.int64)
            for step in np.unique(octave):
                here = octave == step
                picked = access.num_rows.sum() / access.num_tokens.sum()
                expected = uniform_distinct(
                    site.num_experts, picked, access.num_tokens[here].astype(np.float64)
                )
                parts = np.array(
                    [
                        here.sum(),
                        access.num_tokens[here].sum(),
                        access.lookups[here].sum() / site.num_experts,
                        expected.sum() / site.num_experts,
                    ]
                )
                totals.setdefault((phase, int(step)), []).append(parts)
    for (phase, _), found in sorted(totals.items()):
        num_dispatches, num_tokens, distinct, expected_sum = np.sum(found, axis=0)
        rows.append(
            {
                "stack": tokens.stack,
                "phase": phase,
                "num_dispatches": int(num_dispatches),
                "mean_num_tokens": num_tokens / num_dispatches,
                "distinct_share": distinct / num_dispatches,
                "uniform_share": expected_sum / num_dispatches,
            }
        )
    return rows


def _findings(
    stack: str, phase: str, curve: list[dict[str, Any]], *, num_stacks: int
) -> list[Finding]:
    if not curve:
        return []
    # Where nearly every expert is needed anyway, a larger batch has nothing more to tell.
    unsaturated = [row for row in curve if row["distinct_share"] <= _SATURATED]
    shown = unsaturated[-1] if unsaturated else curve[0]
    half = next((row for row in curve if row["distinct_share"] >= _HALF), None)
    where = wording.place(stack, phase, num_stacks=num_stacks).removeprefix("the ")
    article = "An" if where[0] in "aeiou" else "A"
    tokens = "tokens" if shown["num_tokens"] != 1 else "token"
    text = (
        f"{article} {where} batch of {shown['num_tokens']} {tokens} needs "
        f"{wording.share_with_interval(_interval(shown))} of a layer's experts, where uniform "
        f"routing would need {wording.percent(shown['uniform_share'])}"
    )
    if half is not None and half is not shown:
        text += f"; from {half['num_tokens']} tokens on it is more than half of them"
    elif shown["uniform_share"] - shown["distinct_share"] > _AGREEING:
        text += ": tokens of one batch agree more than chance would have them"
    text += "."
    return [
        Finding(
            text=text,
            severity=SEVERITY_FACT - 5,
            section=NAME,
            metric=f"{NAME}/distinct_share/{stack}/{phase}/{shown['num_tokens']}",
        )
    ]


def _interval(row: dict[str, Any]) -> intervals.Interval:
    return intervals.Interval(
        value=row["distinct_share"],
        low=row["distinct_share_low"],
        high=row["distinct_share_high"],
        split_half=row["split_half"],
    )
