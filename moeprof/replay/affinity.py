"""Cross-layer affinity: what a token's experts at one MoE layer say about those at the next.

Per pair of consecutive sites `moeprof.replay.layer_pairs` judges a prefetcher that fetches the
experts that are most likely given those of the layer before, per token and per dispatch, beside
always fetching the most popular ones; this module makes shares, intervals and findings of it.
Leaves out what is resident already (`moeprof.replay.buffering`) and predictors that see more than
expert ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals, verdicts, wording
from moeprof.replay.intervals import Estimates, Interval
from moeprof.replay.layer_pairs import (
    AS_NEEDED,
    MULTIPLES,
    OF_DISPATCH,
    OF_TOKEN,
    Pair,
    judged_pair,
    later_requests,
    pooled,
)
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, SEVERITY_NOTE, Finding, Metric
from moeprof.replay.tokens import StackTokens

SECTION = "locality"

NOTES = (
    "Affinity: next experts ranked by their mean probability given the token's experts at the "
    "layer before, shrunk towards popularity by as much as chance explains; fitted on the first "
    "half of the requests (of each domain), judged on the others' shares.",
    "Affinity, shuffled: every token gets the experts that another token of its dispatch had at "
    "the layer before (tokens alone in their dispatch trade among themselves), then fitted and "
    "judged alike. Uniform: experts fetched over experts there are.",
    "Information: mutual information of one expert of a token and one of the same token at the "
    "next layer, less that of the shuffled tokens (what chance gives at this number of tokens), "
    "over the next expert's entropy less the same.",
)


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """What consecutive sites of one stack say about each other.

    Attributes:
        pairs: One row per phase and pair of sites.
        curve: One row per phase and number of experts fetched, all pairs together.
        metrics: Of each phase.
        findings: Of the phase that counts.
    """

    pairs: tuple[dict[str, Any], ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    metrics: tuple[Metric, ...] = ()
    findings: tuple[Finding, ...] = ()


def layer_affinity(tokens: StackTokens, *, num_stacks: int) -> Affinity:
    """Returns the affinity of consecutive sites of a stack; empty for fewer than two sites.

    Args:
        tokens: The stack's routing.
        num_stacks: Stacks of the trace; with more than one, sentences name theirs.
    """
    halves = tokens.requests.half
    pairs: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    for phase in tokens.phases():
        judged = later_requests(tokens, phase)
        found = [
            pair
            for index in range(len(tokens.sites) - 1)
            if (pair := judged_pair(tokens, phase, index, judged)) is not None
        ]
        if not found:
            continue
        place = {"stack": tokens.stack, "phase": phase}
        pairs += [{**place, **_pair_row(pair, halves)} for pair in found]
        whole = pooled(found)
        curve += [{**place, **row} for row in _curve(whole, halves)]
        metrics += _metrics(tokens.stack, phase, whole, halves)
        if phase == wording.main_phase(tokens.phases()):
            findings += _findings(tokens.stack, phase, found, halves, num_stacks=num_stacks)
    return Affinity(
        pairs=tuple(pairs), curve=tuple(curve), metrics=tuple(metrics), findings=tuple(findings)
    )


def _share(pair: Pair, name: str, level: int, halves: NDArray[np.int8]) -> Estimates:
    """Returns [multiples] the share of what was needed that was fetched."""
    return intervals.share(getattr(pair, name)[level], pair.units[level][:, None], halves=halves)


def _gain(pair: Pair, over: str, level: int, halves: NDArray[np.int8]) -> Interval:
    """Returns what knowing the layer before adds, fetching as many as needed, on the same draws."""
    more = pair.hits[level] - getattr(pair, over)[level]
    return intervals.ratio(more[:, AS_NEEDED], pair.units[level], halves=halves)[0]


def _told(pair: Pair, halves: NDArray[np.int8]) -> Interval:
    return intervals.ratio(pair.information[:, 0], pair.information[:, 1], halves=halves)[0]


def _spread(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _pair_row(pair: Pair, halves: NDArray[np.int8]) -> dict[str, Any]:
    one, other = pair.sites
    row: dict[str, Any] = {
        "site": one.site,
        "layer": one.layer,
        "next_site": other.site,
        "next_layer": other.layer,
        "num_experts": other.num_experts,
        "num_tokens": pair.num_tokens,
    }
    for level, prefix in ((OF_TOKEN, "token"), (OF_DISPATCH, "dispatch")):
        row[f"{prefix}_num_fetched"] = int(pair.fetched[level, AS_NEEDED])
        row |= _spread(f"{prefix}_share", _share(pair, "hits", level, halves)[AS_NEEDED])
        for name in ("popular", "shuffled", "uniform"):
            row[f"{prefix}_{name}_share"] = _share(pair, name, level, halves)[AS_NEEDED].value
        row |= _spread(f"{prefix}_gain", _gain(pair, "popular", level, halves))
    return row | _spread("information_share", _told(pair, halves))


def _curve(whole: Pair, halves: NDArray[np.int8]) -> list[dict[str, Any]]:
    """Returns the shares fetched against multiples of what is needed, up to the first of all."""
    found = {
        (name, level): _share(whole, name, level, halves)
        for name in ("hits", "popular", "shuffled", "uniform")
        for level in (OF_TOKEN, OF_DISPATCH)
    }
    rows: list[dict[str, Any]] = []
    for index, multiple in enumerate(MULTIPLES):
        row: dict[str, Any] = {"multiple": multiple}
        for level, prefix in ((OF_TOKEN, "token"), (OF_DISPATCH, "dispatch")):
            row[f"{prefix}_num_fetched"] = float(whole.fetched[level, index])
            row |= _spread(f"{prefix}_share", found["hits", level][index])
            for name in ("popular", "shuffled", "uniform"):
                row[f"{prefix}_{name}_share"] = found[name, level][index].value
        rows.append(row)
        if min(row["token_uniform_share"] or 0, row["dispatch_uniform_share"] or 0) >= 1:
            break
    return rows


def _metrics(stack: str, phase: str, whole: Pair, halves: NDArray[np.int8]) -> list[Metric]:
    where = f"{stack}/{phase}"
    found = []
    for level, name, fetched in (
        (OF_TOKEN, "affinity", "as many as a token needs, per token"),
        (OF_DISPATCH, "prefetch", "as many as the median dispatch needs, per dispatch"),
    ):
        found += [
            wording.metric_of(
                f"{SECTION}/{name}_share/{where}",
                _share(whole, "hits", level, halves)[AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="needed experts among those most likely after the experts of the layer "
                f"before: {fetched}",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_popular_share/{where}",
                _share(whole, "popular", level, halves)[AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same, always fetching the most popular",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_shuffled_share/{where}",
                _share(whole, "shuffled", level, halves)[AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same with tokens exchanged within their dispatches",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_uniform_share/{where}",
                _share(whole, "uniform", level, halves)[AS_NEEDED],
                unit="share",
                figure_class="exact",
                note="the same if tokens picked their experts at random",
            ),
            wording.metric_of(
                f"{SECTION}/{name}_gain/{where}",
                _gain(whole, "popular", level, halves),
                unit="points",
                figure_class="exact",
                note="what knowing the layer before adds to popularity, on the same draws",
            ),
        ]
    found.append(
        wording.metric_of(
            f"{SECTION}/affinity_information/{where}",
            _told(whole, halves),
            unit="share",
            figure_class="exact",
            note="mutual information of one expert and one of the next layer beyond chance, over "
            "the entropy of the latter",
        )
    )
    return found


def _findings(
    stack: str, phase: str, pairs: Sequence[Pair], halves: NDArray[np.int8], *, num_stacks: int
) -> list[Finding]:
    whole = pooled(pairs)
    place = wording.place(stack, phase, num_stacks=num_stacks)
    hit = _share(whole, "hits", OF_DISPATCH, halves)[AS_NEEDED]
    token = _gain(whole, "popular", OF_TOKEN, halves)
    popular, shuffled, uniform = (
        _share(whole, name, OF_DISPATCH, halves)[AS_NEEDED].value or 0.0
        for name in ("popular", "shuffled", "uniform")
    )
    gain = _gain(whole, "popular", OF_DISPATCH, halves)
    if hit.value is None or gain.value is None:
        return []
    ceiling = 1 - popular
    unknown = float("nan")
    judged = verdicts.verdict(
        gain.value,
        unknown if gain.low is None else gain.low,
        unknown if gain.high is None else gain.high,
        ceiling,
    )
    counts = sorted({int(pair.fetched[OF_DISPATCH, AS_NEEDED]) for pair in pairs})
    fetched = f"{counts[0]} to {counts[-1]} experts"
    if len(counts) == 1:
        fetched = f"{counts[0]} {'expert' if counts[0] == 1 else 'experts'}"
    start, severity = {
        verdicts.TRY: ("Try to prefetch", SEVERITY_COST - 2),
        verdicts.DO_NOT_TRY: ("Do not prefetch", SEVERITY_FACT),
        verdicts.NOT_ENOUGH: ("Not enough evidence to prefetch", SEVERITY_NOTE + 5),
    }[judged]
    text = (
        f"{start} by the layer before in {place}: of what the next layer needs in a step, fetching "
        f"{fetched} finds {wording.percent(popular)} if they are the most popular"
    )
    if ceiling < verdicts.WORTH_IT:
        text += ", so nothing is left to gain."
    else:
        text += (
            f" and {wording.share_with_interval(hit)} if they are the most likely after the "
            f"experts just used: {wording.points_with_interval(gain)} of {wording.points(ceiling)} "
            f"that could be gained. Controls: {wording.percent(shuffled)} with tokens exchanged "
            f"within steps, {wording.percent(uniform)} under uniform routing."
        )
    text += f" Per token the gain is {wording.points_with_interval(token)}"
    told = _told(whole, halves)
    if told.value is not None:
        text += (
            f", and one expert tells {wording.share_with_interval(told)} of what there is to know "
            "about one of the next layer"
        )
    text += "."
    return [
        Finding(
            text=text,
            severity=severity,
            section=SECTION,
            metric=f"{SECTION}/prefetch_gain/{stack}/{phase}",
        )
    ]


def frames(found: Sequence[Affinity]) -> dict[str, pd.DataFrame]:
    """Returns the tables ``affinity`` and ``prefetch`` of all stacks."""
    return {
        "affinity": pd.DataFrame([row for each in found for row in each.pairs]),
        "prefetch": pd.DataFrame([row for each in found for row in each.curve]),
    }
