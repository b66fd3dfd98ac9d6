"""Which experts are used: shares of tokens over time, idle experts, evenness, domains.

Leaves out what follows in time (`reuse`) and what larger batches would need (`working_set`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moeprof.replay import chance, intervals, wording
from moeprof.replay.access import Accesses, Floats, accesses, tally
from moeprof.replay.intervals import Estimates, Interval
from moeprof.replay.labels import label_results, label_usage
from moeprof.replay.result import (
    SEVERITY_COST,
    SEVERITY_FACT,
    SEVERITY_NOTE,
    Finding,
    Metric,
    Result,
)
from moeprof.replay.tokens import StackTokens
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

NAME = "activation"
MAX_HEAT_ROWS = 64
"""Rows of a heat map: consecutive dispatches beyond it share a row."""

_IDLE_THRESHOLD = 0.5
_UNEVEN_THRESHOLD = 1.5
_DEAD_SHARE = 0.1
_CONCENTRATED = 0.05
_WORTH_EXPLAINING = 0.2
_HARDLY_IDLE = 0.005
_MIN_EXPECTED_TOKENS = 5


def activation(trace: Trace) -> Result:
    """Returns which experts were used, how evenly, and how many stood idle.

    The table has one row per site and phase. Table ``heat`` holds tokens per expert over
    consecutive dispatches, ``labels`` tokens per expert and domain (or language), ``dead`` the
    experts that no token of the trace reached.
    """
    rows: list[dict[str, Any]] = []
    heat: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    distances: list[dict[str, Any]] = []
    metrics: list[Metric] = []
    findings: list[Finding] = []
    busiest: list[tuple[float, Finding]] = []
    stacks = wording.stacks_of(trace)
    for stack, tokens in stacks:
        per_site = [(site, accesses(tokens, site)) for site in tokens.sites]
        for phase in tokens.phases():
            found = [(site, by_phase[phase]) for site, by_phase in per_site if phase in by_phase]
            if not found:
                continue
            usages = [_site_usage(site, access) for site, access in found]
            idle = _idle(tokens, usages)
            load = _load(tokens, phase, found)
            rows += [
                {"stack": stack, "phase": phase, **row} for row in _site_rows(usages, idle, load)
            ]
            heat += [
                {"stack": stack, "phase": phase, **row}
                for site, access in found
                for row in _heat(tokens, site, access)
            ]
            summary = _phase_metrics(stack, phase, usages, tokens, load)
            metrics += summary
            if phase == wording.main_phase(tokens.phases()):
                place = wording.place(stack, phase, num_stacks=len(stacks))
                findings += _idle_findings(place, summary, usages, idle)
                busiest.append(_busiest(place, summary, usages, load))
        counts, distance = label_usage(tokens)
        labels += counts
        distances += distance
    findings += [max(busiest, key=lambda found: found[0])[1]] if busiest else []
    label_metrics, label_findings = label_results(NAME, distances, num_stacks=len(stacks))
    dead, dead_findings = _dead(stacks)
    return Result(
        name=NAME,
        title="Expert activation",
        table=pd.DataFrame(rows),
        metrics=(*metrics, *label_metrics),
        findings=wording.routing_findings(
            trace, NAME, [*findings, *label_findings, *dead_findings]
        ),
        tables={
            "heat": pd.DataFrame(heat),
            "labels": pd.DataFrame(labels),
            "label_distances": pd.DataFrame(distances),
            "dead": pd.DataFrame(dead),
        },
        notes=(
            "Share of tokens: a token counts for each of its k experts, so the shares of a layer "
            "sum to k.",
            "Inactive: experts of a layer that no token of a dispatch picked; mean over "
            "dispatches.",
            "Under uniform routing: the same dispatch sizes, experts picked at random.",
        ),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _SiteUsage:
    """One site in one phase; shares are per request.

    Attributes:
        site: The site.
        num_dispatches: Dispatches.
        num_tokens: Tokens over all of them.
        idle: [requests] shares of experts not picked, dispatch by dispatch.
        slots: [requests] shares of all experts, dispatch by dispatch.
        uniform_idle: Share of experts idle under uniform routing.
    """

    site: schema.Site
    num_dispatches: int
    num_tokens: int
    idle: Floats
    slots: Floats
    uniform_idle: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Load:
    """Tokens per expert of the sites of one phase.

    Attributes:
        counts: [experts] per site.
        max_over_mean: One estimate per site, then their mean.
        entropy: The same for the normalized entropy.
        uniform_max_over_mean: Per site, under uniform routing.
        uniform_entropy: Per site, under uniform routing.
    """

    counts: list[Floats]
    max_over_mean: Estimates
    entropy: Estimates
    uniform_max_over_mean: list[float]
    uniform_entropy: list[float]


def _site_usage(site: schema.Site, access: Accesses) -> _SiteUsage:
    picked = access.num_rows.sum() / access.num_tokens.sum() / site.num_experts
    used, slots = access.slot_shares(np.ones(access.num_dispatches))
    return _SiteUsage(
        site=site,
        num_dispatches=access.num_dispatches,
        num_tokens=int(access.num_tokens.sum()),
        idle=slots - used,
        slots=slots,
        uniform_idle=float(chance.idle_share(picked, access.num_tokens.astype(np.float64)).mean()),
    )


def _idle(tokens: StackTokens, usages: list[_SiteUsage]) -> Estimates:
    """Returns the share of idle experts per site."""
    return intervals.share(
        np.stack([usage.idle for usage in usages], axis=1),
        np.stack([usage.slots for usage in usages], axis=1),
        halves=tokens.requests.half,
    )


def _load(tokens: StackTokens, phase: str, found: list[tuple[schema.Site, Accesses]]) -> _Load:
    in_phase = np.flatnonzero(tokens.dispatch_phase == schema.PHASES.index(phase))
    longest = max(access.longest_request() for _, access in found)
    blocks = intervals.block_index(len(in_phase), longest)
    num_requests = len(np.unique(np.concatenate([a.cause_request for _, a in found])))
    rows, whole, uniform_max, uniform_entropy = [], [], [], []
    for site, access in found:
        counts = tally(access.expert, site.num_experts, weights=access.num_rows)
        per_block = None
        if blocks is not None:
            block = blocks[np.searchsorted(in_phase, access.dispatch)][access.lookup_dispatch()]
            shape = (int(blocks[-1]) + 1, site.num_experts)
            cell = block * site.num_experts + access.expert
            per_block = tally(cell, shape[0] * shape[1], weights=access.num_rows).reshape(shape)
        rows.append(
            intervals.resampled_blocks(
                per_block, counts, _half_counts(tokens, site, phase), _evenness
            )
        )
        whole.append(counts)
        num_tokens = int(access.num_tokens.sum())
        picked = float(counts.sum()) / num_tokens
        uniform_max.append(chance.max_over_mean(site.num_experts, picked, num_tokens))
        uniform_entropy.append(chance.normalized_entropy(site.num_experts, picked, num_tokens))
    stacked = np.stack(rows, axis=2)
    stacked = np.concatenate([stacked, stacked.mean(axis=2, keepdims=True)], axis=2)
    return _Load(
        counts=whole,
        max_over_mean=intervals.summarized(stacked[:, 0], num_requests=num_requests),
        entropy=intervals.summarized(stacked[:, 1], num_requests=num_requests),
        uniform_max_over_mean=uniform_max,
        uniform_entropy=uniform_entropy,
    )


def _half_counts(tokens: StackTokens, site: schema.Site, phase: str) -> Floats:
    experts = tokens.expert[tokens.sites.index(site)]
    in_phase = tokens.dispatch_phase[tokens.dispatch] == schema.PHASES.index(phase)
    half = tokens.requests.half[tokens.request].astype(np.int64)
    chosen = in_phase[:, None] & (experts >= 0)
    cell = (half[:, None] * site.num_experts + experts)[chosen]
    return tally(cell, 2 * site.num_experts).reshape(2, site.num_experts)


def _evenness(counts: Floats) -> Floats:
    """Returns [rows, 2]: load of the fullest expert over the mean, and normalized entropy."""
    total = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = counts / total[:, None]
        terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0)
        entropy = -terms.sum(axis=1) / np.log(counts.shape[1])
        largest = share.max(axis=1) * counts.shape[1]
    empty = total == 0
    return np.stack([np.where(empty, np.nan, largest), np.where(empty, np.nan, entropy)], axis=1)


def _site_rows(
    usages: list[_SiteUsage],
    idle: Estimates,
    load: _Load,
) -> list[dict[str, Any]]:
    rows = []
    for index, usage in enumerate(usages):
        recorded = idle[index]
        largest, entropy = load.max_over_mean[index], load.entropy[index]
        rows.append(
            {
                "site": usage.site.site,
                "layer": usage.site.layer,
                "num_experts": usage.site.num_experts,
                "num_dispatches": usage.num_dispatches,
                "num_tokens": usage.num_tokens,
                "inactive_share": recorded.value,
                "inactive_share_low": recorded.low,
                "inactive_share_high": recorded.high,
                "uniform_inactive_share": usage.uniform_idle,
                "num_inactive": None
                if recorded.value is None
                else recorded.value * usage.site.num_experts,
                "max_over_mean": largest.value,
                "max_over_mean_low": largest.low,
                "max_over_mean_high": largest.high,
                "uniform_max_over_mean": load.uniform_max_over_mean[index],
                "entropy": entropy.value,
                "entropy_low": entropy.low,
                "entropy_high": entropy.high,
                "uniform_entropy": load.uniform_entropy[index],
                "hottest_expert": int(np.argmax(load.counts[index])),
                "hottest_share": float(load.counts[index].max() / usage.num_tokens),
            }
        )
    return rows


def _heat(tokens: StackTokens, site: schema.Site, access: Accesses) -> list[dict[str, Any]]:
    """Returns tokens per expert over rows of consecutive dispatches."""
    num_rows = min(MAX_HEAT_ROWS, access.num_dispatches)
    row = np.arange(access.num_dispatches) * num_rows // access.num_dispatches
    counts = np.bincount(
        row[access.lookup_dispatch()] * site.num_experts + access.expert,
        weights=access.num_rows,
        minlength=num_rows * site.num_experts,
    ).reshape(num_rows, site.num_experts)
    num_tokens = np.bincount(row, weights=access.num_tokens, minlength=num_rows)
    steps = tokens.dispatch_step[access.dispatch]
    first = np.searchsorted(row, np.arange(num_rows), side="left")
    last = np.searchsorted(row, np.arange(num_rows), side="right") - 1
    return [
        {
            "site": site.site,
            "layer": site.layer,
            "row": index,
            "first_step": int(steps[first[index]]),
            "last_step": int(steps[last[index]]),
            "num_tokens": int(num_tokens[index]),
            "expert_tokens": counts[index].astype(np.int64).tolist(),
        }
        for index in range(num_rows)
    ]


def _phase_metrics(
    stack: str, phase: str, usages: list[_SiteUsage], tokens: StackTokens, load: _Load
) -> list[Metric]:
    where = f"{stack}/{phase}"
    halves = tokens.requests.half
    slots = np.sum([usage.slots for usage in usages], axis=0)
    idle = intervals.share(np.sum([u.idle for u in usages], axis=0), slots, halves=halves)[0]
    weights = np.array([usage.site.num_experts * usage.num_dispatches for usage in usages])
    uniform = Interval(
        value=float(np.average([usage.uniform_idle for usage in usages], weights=weights))
    )
    mean = len(usages)
    return [
        wording.metric_of(
            f"{NAME}/inactive_share/{where}",
            idle,
            unit="share",
            figure_class="exact",
            note="experts of a layer that no token of a dispatch picked, mean over dispatches",
        ),
        wording.metric_of(
            f"{NAME}/uniform_inactive_share/{where}",
            uniform,
            unit="share",
            figure_class="exact",
            note="the same under uniform routing with the dispatch sizes recorded",
        ),
        wording.metric_of(
            f"{NAME}/max_over_mean_load/{where}",
            load.max_over_mean[mean],
            unit="ratio",
            figure_class="exact",
            better="lower",
            note="tokens of the fullest expert over the mean, whole trace, mean over layers",
        ),
        wording.metric_of(
            f"{NAME}/uniform_max_over_mean_load/{where}",
            Interval(value=float(np.mean(load.uniform_max_over_mean))),
            unit="ratio",
            figure_class="exact",
            note="expected under uniform routing",
        ),
        wording.metric_of(
            f"{NAME}/usage_entropy/{where}",
            load.entropy[mean],
            unit="ratio",
            figure_class="exact",
            better="higher",
            note="entropy of usage over log E, whole trace, mean over layers; 1 is even",
        ),
        wording.metric_of(
            f"{NAME}/uniform_usage_entropy/{where}",
            Interval(value=float(np.mean(load.uniform_entropy))),
            unit="ratio",
            figure_class="exact",
            note="expected under uniform routing",
        ),
    ]


def _idle_findings(
    where: str, metrics: list[Metric], usages: list[_SiteUsage], idle: Estimates
) -> list[Finding]:
    inactive, uniform = metrics[0], metrics[1]
    if inactive.value is None or uniform.value is None:
        return []
    interval = Interval(value=inactive.value, low=inactive.low, high=inactive.high)
    idle_bytes = sum(
        float(idle.value[index]) * usage.site.num_experts * usage.site.expert_bytes
        for index, usage in enumerate(usages)
    )
    if inactive.value < _HARDLY_IDLE:
        text = f"In {where}, practically every expert works in every step."
        return [Finding(text=text, severity=SEVERITY_NOTE, section=NAME, metric=inactive.name)]
    weights = f" ({wording.num_bytes(idle_bytes)} of weights)" if idle_bytes else ""
    mean_tokens = usages[0].num_tokens / usages[0].num_dispatches
    meaning = (
        "the router concentrates tokens beyond chance, which caches and placement can use"
        if inactive.value - uniform.value > _CONCENTRATED
        else "most of it comes from few tokens per step, and larger batches would use it"
    )
    text = (
        f"In {where}, {wording.share_with_interval(interval)} of the experts{weights} stand "
        f"idle in an average step of {wording.number(mean_tokens)} "
        f"{'token' if mean_tokens == 1 else 'tokens'}; uniform routing "
        f"would leave {wording.percent(uniform.value)} idle"
        + (f": {meaning}." if inactive.value >= _WORTH_EXPLAINING else ".")
    )
    severity = SEVERITY_COST if inactive.value >= _IDLE_THRESHOLD else SEVERITY_NOTE
    return [Finding(text=text, severity=severity, section=NAME, metric=inactive.name)]


def _busiest(
    where: str, metrics: list[Metric], usages: list[_SiteUsage], load: _Load
) -> tuple[float, Finding]:
    """Returns how far the busiest expert stands out beyond chance, and what is to say of it."""
    beyond = load.max_over_mean.value[:-1] / np.array(load.uniform_max_over_mean)
    worst = int(np.argmax(beyond))
    usage = usages[worst]
    hottest = int(np.argmax(load.counts[worst]))
    share = float(load.counts[worst].max() / usage.num_tokens)
    uneven = bool(beyond[worst] > _UNEVEN_THRESHOLD)
    text = (
        f"The busiest expert of {where}, number {hottest} of layer {usage.site.layer}, gets "
        f"{wording.percent(share)} of the tokens, "
        f"{wording.number_with_interval(load.max_over_mean[worst])} times a fair share where "
        f"uniform routing would show {wording.number(load.uniform_max_over_mean[worst])}"
        + (
            ": under expert parallelism the device that holds it sets the pace."
            if uneven
            else ": no expert stands out much beyond chance."
        )
    )
    finding = Finding(
        text=text,
        severity=SEVERITY_COST - 5 if uneven else SEVERITY_NOTE - 5,
        section=NAME,
        metric=metrics[2].name,
    )
    return float(beyond[worst]), finding


def _dead(
    stacks: tuple[tuple[str, StackTokens], ...],
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Returns experts under a tenth of a fair share in the whole trace, per site."""
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    for stack, tokens in stacks:
        for site, experts in zip(tokens.sites, tokens.expert, strict=True):
            counts = np.bincount(experts[experts >= 0], minlength=site.num_experts)
            fair = counts.sum() / site.num_experts
            rows.append(
                {
                    "stack": stack,
                    "site": site.site,
                    "layer": site.layer,
                    "num_experts": site.num_experts,
                    "num_never_used": int((counts == 0).sum()),
                    "num_rarely_used": int((counts < _DEAD_SHARE * fair).sum()),
                    "mean_tokens_per_expert": float(fair),
                }
            )
        found = [row for row in rows if row["stack"] == stack]
        rare = sum(row["num_rarely_used"] for row in found)
        total = sum(row["num_experts"] for row in found)
        if rare and min(row["mean_tokens_per_expert"] for row in found) >= _MIN_EXPECTED_TOKENS:
            of_stack = f" of the {stack}" if len(stacks) > 1 else ""
            findings.append(
                Finding(
                    text=f"{rare} of {total} experts{of_stack} got less than a tenth of a fair "
                    f"share over the whole trace, "
                    f"{sum(row['num_never_used'] for row in found)} of them nothing at all: "
                    "candidates for slower memory or pruning on this traffic.",
                    severity=SEVERITY_FACT - 4,
                    section=NAME,
                )
            )
    return rows, findings
