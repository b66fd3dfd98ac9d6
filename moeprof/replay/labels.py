"""Do domains (or target languages) use different experts?

Compares usage shares of whole stacks, all phases together. Leaves out order in time.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from moeprof.replay import intervals, wording
from moeprof.replay.access import Floats, tally
from moeprof.replay.causes import distinct_causes
from moeprof.replay.intervals import Interval
from moeprof.replay.result import SEVERITY_FACT, SEVERITY_NOTE, Finding, Metric
from moeprof.replay.tokens import UNLABELLED, StackTokens

MAX_LABELS = 12
"""Labels compared; the most frequent ones where there are more."""

_MAX_LABEL_BLOCKS = 200
_APART = 1.5
"""Labels differ where they lie this many times further apart than halves of one label."""


def label_usage(tokens: StackTokens) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns tokens per expert and label, and how far labels lie apart, per site.

    The distance is half the sum of absolute differences of usage shares, mean over pairs of
    labels: 0 where domains use the same experts, 1 where they share none. Beside it the same
    between the two halves of each label, which is what chance alone gives.
    """
    requests = tokens.requests
    names = [name for name in requests.labels if name != UNLABELLED]
    if len(names) == 1 or not names:
        return [], []
    tokens_of_label = np.bincount(requests.label[tokens.request], minlength=len(requests.labels))
    codes = [requests.labels.index(name) for name in names]
    codes = sorted(codes, key=lambda code: -tokens_of_label[code])[:MAX_LABELS]
    codes = sorted(code for code in codes if tokens_of_label[code])
    place = np.full(len(requests.labels), -1)
    place[codes] = np.arange(len(codes))
    label = place[requests.label[tokens.request]]
    half = requests.half[tokens.request].astype(np.int64)
    longest = int(np.bincount(tokens.request[distinct_causes(tokens)]).max(initial=1))
    blocks = intervals.block_index(tokens.num_dispatches, longest)
    if blocks is not None:
        blocks = np.minimum(blocks[-1] + 1, _MAX_LABEL_BLOCKS) * blocks // (blocks[-1] + 1)
    counts_rows: list[dict[str, Any]] = []
    distances: list[dict[str, Any]] = []
    pooled: list[Floats] = []
    for site, experts in zip(tokens.sites, tokens.expert, strict=True):
        width = len(codes) * site.num_experts
        chosen = (label[:, None] >= 0) & (experts >= 0)
        cell = (label[:, None] * site.num_experts + experts)[chosen]
        owner = np.broadcast_to(half[:, None], experts.shape)[chosen]
        halves = tally(owner * width + cell, 2 * width).reshape(2, width)
        per_block = None
        if blocks is not None:
            block = np.broadcast_to(blocks[tokens.dispatch][:, None], experts.shape)[chosen]
            num_blocks = int(blocks[-1]) + 1
            per_block = tally(block * width + cell, num_blocks * width)
            per_block = per_block.reshape(num_blocks, width)
        shape = (len(codes), site.num_experts)
        whole = halves.sum(axis=0)
        rows = intervals.resampled_blocks(
            per_block, whole, halves, functools.partial(_label_distance, shape=shape)
        )
        pooled.append(rows)
        found = intervals.summarized(rows, num_requests=len(requests))[0]
        distances.append(
            {
                "stack": tokens.stack,
                "site": site.site,
                "layer": site.layer,
                "label_kind": requests.label_kind,
                "num_labels": len(codes),
                "distance": found.value,
                "distance_low": found.low,
                "distance_high": found.high,
                "split_half": found.split_half,
                "chance_distance": _half_distance(halves.reshape(2, *shape)),
            }
        )
        for index, code in enumerate(codes):
            own = whole.reshape(shape)[index]
            counts_rows.append(
                {
                    "stack": tokens.stack,
                    "site": site.site,
                    "layer": site.layer,
                    "label": requests.labels[code],
                    "num_tokens": int(((label == index) & (experts >= 0).any(axis=1)).sum()),
                    "expert_tokens": own.astype(np.int64).tolist(),
                }
            )
    mean = intervals.summarized(np.mean(pooled, axis=0), num_requests=len(requests))[0]
    distances.append(
        {
            "stack": tokens.stack,
            "site": None,
            "layer": None,
            "label_kind": requests.label_kind,
            "num_labels": len(codes),
            "distance": mean.value,
            "distance_low": mean.low,
            "distance_high": mean.high,
            "split_half": mean.split_half,
            "chance_distance": _mean_known([row["chance_distance"] for row in distances]),
        }
    )
    return counts_rows, distances


def _mean_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _label_distance(sums: Floats, *, shape: tuple[int, int]) -> Floats:
    """Returns [rows, 1] mean total variation distance over pairs of labels.

    Args:
        sums: [rows, labels x experts].
        shape: Labels and experts.
    """
    counts = sums.reshape(-1, *shape)
    total = counts.sum(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = counts / total
    num_labels = counts.shape[1]
    pairs = [
        np.abs(share[:, one] - share[:, other]).sum(axis=1) / 2
        for one in range(num_labels)
        for other in range(one)
    ]
    stacked = np.stack(pairs)
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0)
    return mean[:, None]


def _half_distance(halves: Floats) -> float | None:
    """Returns the mean distance between the two halves of each label; [2, labels, E].

    None where no label has tokens in both halves.
    """
    total = halves.sum(axis=2, keepdims=True)
    both = (total > 0).all(axis=0)[:, 0]
    if not both.any():
        return None
    share = halves[:, both] / total[:, both]
    return float(np.abs(share[0] - share[1]).sum(axis=1).mean() / 2)


def label_results(
    section: str, distances: list[dict[str, Any]], *, num_stacks: int
) -> tuple[list[Metric], list[Finding]]:
    """Returns metrics and findings of the rows that `label_usage` pools over sites.

    Args:
        section: Name of the analysis they belong to.
        distances: Second half of what `label_usage` returns, of all stacks.
        num_stacks: Stacks of the trace.
    """
    metrics: list[Metric] = []
    findings: list[Finding] = []
    different: list[tuple[str, str]] = []
    same: list[tuple[str, str]] = []
    named = ""
    for row in distances:
        if row["site"] is not None:
            continue
        name = f"{section}/label_distance/{row['stack']}"
        interval = Interval(
            value=row["distance"],
            low=row["distance_low"],
            high=row["distance_high"],
            split_half=row["split_half"],
        )
        metrics.append(
            wording.metric_of(
                name,
                interval,
                unit="share",
                figure_class="exact",
                note=f"share of usage that would have to move to turn one {row['label_kind']}'s "
                "usage into another's, mean over pairs and layers",
            )
        )
        metrics.append(
            wording.metric_of(
                f"{section}/chance_label_distance/{row['stack']}",
                Interval(value=row["chance_distance"]),
                unit="share",
                figure_class="exact",
                note=f"the same between two halves of one {row['label_kind']}'s requests",
            )
        )
        if row["distance"] is None or row["chance_distance"] is None:
            continue
        apart = bool(row["distance"] > _APART * row["chance_distance"])
        of_stack = f" in the {row['stack']}" if num_stacks > 1 else ""
        words = (
            f"{wording.share_with_interval(interval)} of usage would have to move{of_stack} to "
            f"turn one into another, {wording.percent(row['chance_distance'])} by chance"
        )
        (different if apart else same).append((words, metrics[-2].name))
        kind = {"domain": "domains", "language": "languages"}.get(row["label_kind"], "labels")
        named = f"{row['num_labels']} {kind}"
    if different:
        words = "; ".join(text for text, _ in different)
        rest = "".join(f". They use the same experts otherwise: {text}" for text, _ in same)
        findings.append(
            Finding(
                text=f"The {named} use different experts: {words}, so placements and pinned sets "
                f"have to be planned for the mix that is served{rest}.",
                severity=SEVERITY_FACT + 6,
                section=section,
                metric=different[0][1],
            )
        )
    elif same:
        words = "; ".join(text for text, _ in same)
        findings.append(
            Finding(
                text=f"The {named} use the same experts: {words}.",
                severity=SEVERITY_NOTE,
                section=section,
                metric=same[0][1],
            )
        )
    return metrics, findings
