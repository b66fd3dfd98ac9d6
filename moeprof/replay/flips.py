"""Do two traces of the same requests route alike?

Rounding depends on the batch, so two runs may choose differently where two experts score nearly
the same; what follows such a flip in its request differs too. Measures how often that is, which is
the error of re-batching.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import intervals, wording
from moeprof.replay.access import tally
from moeprof.replay.recorded import Columns, recorded_stack
from moeprof.replay.result import SEVERITY_FACT, SEVERITY_WARNING, Finding, Metric, Result
from moeprof.replay.tokens import load_requests
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Ints = NDArray[np.int64]

NAME = "agreement"
TIES: Mapping[str, float] = types.MappingProxyType(
    {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
)
"""Selection scores closer than this, beyond the precision they are stored in, are a tie: rounding
alone can turn them round. By the type the model computes in."""

_SITE_COLUMNS = ("stack", "site", "layer")


def agreement(first: Trace, second: Trace) -> Result:
    """Returns where two traces of the same requests choose different experts.

    Requests are matched by their ids, tokens by sequence and position, dispatches by their order.
    The table has one row per site: dispatches whose expert counts differ, decisions that flipped.
    Table ``flips`` has one row per token and site that differs. A flip is a ``root`` where no
    earlier one of its request can have caused it, and ``tied`` where the scores of the experts
    exchanged lie within 1e-5 of each other (for half precision its own rounding), as far as their
    stored precision tells; needs traces recorded with ``scores=True``. In generated text a root
    that is not tied may also follow from another token: near ties of the output flip too.

    Args:
        first: One trace, for example a composed one.
        second: The other, for example a fresh recording.

    Raises:
        UsageError: The traces are not of one model.
        TraceError: A trace is damaged.
    """
    if [_geometry(site) for site in first.sites] != [_geometry(site) for site in second.sites]:
        raise UsageError(
            "the traces are not of one model: their MoE layers differ",
            hint="compare two recordings of one model with the same prompts",
        )
    rows: list[dict[str, Any]] = []
    flips: list[pd.DataFrame] = []
    unmatched = 0
    flipped_by_request: list[NDArray[np.float64]] = []
    decisions_by_request: list[NDArray[np.float64]] = []
    halves = load_requests(first).half
    tie = max(TIES.get(trace.info.model.dtype, TIES["float32"]) for trace in (first, second))
    for stack in first.info.stacks:
        one, other, num_unmatched = _matched(first, second, stack)
        unmatched += num_unmatched
        counts = _differing_dispatches(first, second, stack)
        found = []
        for order, site in enumerate(first.info.sites_of(stack)):
            exchanged = _exchanged(one, other, site)
            found.append(_flips(one, other, site, order, exchanged, tie))
            owner = one["request_index"]
            flipped = tally(owner, len(halves), weights=exchanged)
            decisions = site.top_k * tally(owner, len(halves))
            flipped_by_request.append(flipped)
            decisions_by_request.append(decisions)
            rows.append(
                {
                    "stack": stack,
                    "site": site.site,
                    "layer": site.layer,
                    **counts[site.site],
                    "num_decisions": int(decisions.sum()),
                    "num_flipped": int(exchanged.sum()),
                    "flip_rate": float(exchanged.sum() / max(decisions.sum(), 1)),
                }
            )
        flips.append(_with_roots(pd.concat(found, ignore_index=True)))
    every = pd.concat(flips, ignore_index=True)
    table = pd.DataFrame(rows)
    rate = intervals.share(
        np.sum(flipped_by_request, axis=0), np.sum(decisions_by_request, axis=0), halves=halves
    )[0]
    metrics = [
        wording.metric_of(
            f"{NAME}/flip_rate", rate, unit="share", figure_class="measured", better="lower",
            note="decisions that chose another expert in the other run",
        ),
        Metric(
            name=f"{NAME}/differing_dispatches", unit="count", figure_class="measured",
            value=float(table["num_differing_dispatches"].sum()), better="lower",
            note="dispatches whose tokens per expert differ",
        ),
        Metric(
            name=f"{NAME}/untied_roots", unit="count", figure_class="measured", better="lower",
            value=float((every["root"] & ~every["tied"]).sum()),
            note="first flips of a request that no tie of scores explains",
        ),
        Metric(
            name=f"{NAME}/unmatched_tokens", unit="count", figure_class="measured", better="lower",
            value=float(unmatched), note="tokens that only one of the traces has",
        ),
    ]  # fmt: skip
    return Result(
        name=NAME,
        title="Agreement of two runs",
        table=table,
        metrics=tuple(metrics),
        findings=(_finding(table, every, rate, unmatched),),
        tables={"flips": every},
        notes=(
            "Exchanged experts whose scores are equal to the precision they are stored in count as "
            "tied: about three digits in float16, as older traces have them, seven in float32.",
        ),
    )


def _geometry(site: schema.Site) -> tuple[Any, ...]:
    return site.stack, site.layer, site.num_experts, site.top_k, site.first_slot


def _matched(first: Trace, second: Trace, stack: str) -> tuple[Columns, Columns, int]:
    """Returns the tokens that both traces have, in one order, and how many only one has."""
    pair = []
    for trace in (first, second):
        requests = load_requests(trace).key
        found = recorded_stack(trace, stack, requests)
        columns = dict(found.columns)
        index = np.repeat(
            np.arange(len(requests)), np.diff(np.append(found.prompt_start, len(columns["phase"])))
        )
        columns["request_index"], columns["request"] = index, requests[index]
        pair.append(columns)
    names, code = np.unique(
        np.concatenate([columns["request"] for columns in pair]), return_inverse=True
    )
    assert len(names) < 1 << 15, "too many requests to match"
    sizes = [len(columns["request"]) for columns in pair]
    keys = [
        (code_of << 48) | (columns["sequence"].astype(np.int64) << 32) | columns["position"]
        for code_of, columns in zip(np.split(code, sizes[:1]), pair, strict=True)
    ]
    _, at_first, at_second = np.intersect1d(keys[0], keys[1], return_indices=True)
    one, other = (
        {name: values[rows] for name, values in columns.items()}
        for columns, rows in zip(pair, (at_first, at_second), strict=True)
    )
    return one, other, sum(sizes) - 2 * len(at_first)


def _exchanged(one: Columns, other: Columns, site: schema.Site) -> NDArray[np.int64]:
    """Returns [tokens] experts that the second run chose and the first did not."""
    slots = slice(site.first_slot, site.first_slot + site.top_k)
    chosen, again = one["expert"][:, slots], other["expert"][:, slots]
    kept = (again[:, :, None] == chosen[:, None, :]).any(axis=2)
    exchanged: NDArray[np.int64] = (~kept).sum(axis=1)
    return exchanged


def _flips(
    one: Columns, other: Columns, site: schema.Site, order: int, exchanged: Ints, tie: float
) -> pd.DataFrame:
    """Returns one row per token that chose differently at a site."""
    at = np.flatnonzero(exchanged)
    slots = slice(site.first_slot, site.first_slot + site.top_k)
    gap, precision = _gaps(one, other, slots, at)
    return pd.DataFrame(
        {
            "stack": site.stack,
            "site": site.site,
            "layer": site.layer,
            "order": order,
            "request": one["request"][at],
            "sequence": one["sequence"][at],
            "position": one["position"][at],
            "phase": np.array(schema.TOKEN_PHASES)[one["phase"][at]],
            "num_exchanged": exchanged[at],
            "score_gap": gap,
            "tied": gap <= tie + precision,
        }
    )


def _gaps(
    one: Columns, other: Columns, slots: slice, at: Ints
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns, per flip, the gap between experts lost and gained, and its stored precision."""
    names = ("selection_score", "score")
    name = next((each for each in names if each in one and each in other), None)
    if name is None:
        unknown = np.full(len(at), np.nan)
        return unknown, unknown
    chosen, again = one["expert"][at, slots], other["expert"][at, slots]
    lost = ~(chosen[:, :, None] == again[:, None, :]).any(axis=2)
    gained = ~(again[:, :, None] == chosen[:, None, :]).any(axis=2)
    before, after = one[name][at, slots], other[name][at, slots]
    stored = max(before.dtype, after.dtype, key=lambda dtype: float(np.finfo(dtype).eps))
    low = np.where(lost, before, np.inf).min(axis=1)
    high = np.where(gained, after, -np.inf).max(axis=1)
    gap = np.abs(low.astype(np.float64) - high.astype(np.float64))
    spacing = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(stored))
    return gap, spacing.astype(np.float64)


def _with_roots(flips: pd.DataFrame) -> pd.DataFrame:
    """Marks the flips that no earlier flip of the same sequence can have caused.

    A flip changes later layers at its own and later positions; in decoding also the text, and
    with it every layer of later positions.
    """
    flips = flips.sort_values(
        ["request", "sequence", "position", "order"], kind="stable", ignore_index=True
    )
    is_root = np.zeros(len(flips), bool)
    for _, rows in flips.groupby(["request", "sequence"]):
        lowest, text_changed_at = np.inf, np.inf
        for index, position, order, phase in zip(
            rows.index, rows["position"], rows["order"], rows["phase"], strict=True
        ):
            is_root[index] = order <= lowest and position <= text_changed_at
            lowest = min(lowest, order)
            text_changed_at = min(text_changed_at, position if phase == "decode" else np.inf)
    return flips.assign(root=is_root).drop(columns="order")


def _differing_dispatches(first: Trace, second: Trace, stack: str) -> dict[int, dict[str, int]]:
    """Returns, per site, how many dispatches there are and how many have other expert counts."""
    counted: dict[int, tuple[list[bytes], list[bytes]]] = {
        site.site: ([], []) for site in first.info.sites_of(stack)
    }
    for index, trace in enumerate((first, second)):
        for dispatch in trace.dispatches(stack=stack):
            experts = dispatch.experts[dispatch.experts >= 0]
            counted[dispatch.site][index].append(np.bincount(experts).tobytes())
    return {
        site: {
            "num_dispatches": len(one),
            "num_differing_dispatches": sum(a != b for a, b in zip(one, other, strict=False))
            + abs(len(one) - len(other)),
        }
        for site, (one, other) in counted.items()
    }


def _finding(
    table: pd.DataFrame, flips: pd.DataFrame, rate: intervals.Interval, unmatched: int
) -> Finding:
    dispatches = int(table["num_dispatches"].sum())
    differing = int(table["num_differing_dispatches"].sum())
    text = (
        f"Of {dispatches:,} dispatches {differing:,} have other tokens per expert; "
        f"{wording.share_with_interval(rate)} of the decisions flipped"
    )
    roots = flips[flips["root"]]
    severity = SEVERITY_FACT
    if len(roots):
        untied = int((~roots["tied"]).sum())
        cause = "all of them ties" if not untied else f"{untied:,} of them without a tie of scores"
        text += f", from {len(roots):,} first flips, {cause}"
        severity = SEVERITY_WARNING if untied else severity
    if unmatched:
        text += f"; {unmatched:,} tokens are in one trace only"
    return Finding(text=f"{text}.", severity=severity, section=NAME, metric=f"{NAME}/flip_rate")
