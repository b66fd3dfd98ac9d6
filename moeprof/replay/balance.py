"""What placing experts on devices differently would do to the fullest device of each dispatch.

Window A plans and window B judges, split in time within each domain. The headline counts dispatches
of at least 256 tokens: smaller ones are ruled by chance. Nothing a planner or a choice between
planners rests on comes from window B.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import (
    domains,
    intervals,
    load_tables,
    loads,
    placement,
    replanning,
    site_rows,
    verdicts,
    windows,
    wording,
)
from moeprof.replay.loads import ReplicaRule
from moeprof.replay.peaks import (
    MIN_TOKENS,
    Estimates,
    Scores,
    Study,
    plans_of,
    scored,
    uniform_max_over_mean,
)
from moeprof.replay.planners import DEFAULT_PLANNERS, NOTHING, Devices
from moeprof.replay.result import FigureClass, Metric, Result
from moeprof.replay.site_rows import Dispatches, SiteRows
from moeprof.replay.windows import Passes

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Bools = NDArray[np.bool_]

NAME = "balancing"
EPLB = "eplb"


def balancing(
    trace: Trace,
    devices: int = 8,
    *,
    num_redundant: int = 0,
    groups: int = 1,
    nodes: int = 1,
    planners: Sequence[str] = DEFAULT_PLANNERS,
    replica_rule: ReplicaRule = "even",
) -> Result:
    """Returns what each planner's placement does to the load of the fullest device.

    The table has one row per stack and planner: mean and largest max/mean over the headline
    dispatches with the 90 % interval; the same as shares (the paper's average and maximum load);
    what uniform routing would show at that size and the floor no placement could go below;
    balancedness; the gains over doing nothing and over EPLB with their 95 % intervals, paired on
    the same blocks; distinct devices and nodes per token; the worst domain.

    Tables: ``sites``, ``phases``, ``sizes``, ``domains``, ``transfer`` (planned on one domain,
    judged on another), ``replanning`` (over time, charged with bytes), ``ceilings``, ``choice``
    (the comparison within window A that picks the planner the verdict is about), ``devices``
    (rows per device) and ``placements``.

    Args:
        trace: The trace.
        devices: Devices of all nodes.
        num_redundant: Slots of a layer beyond one per expert.
        groups: Expert groups, for EPLB's hierarchical policy.
        nodes: Nodes, for EPLB's hierarchical policy and the nodes per token.
        planners: Names from `moeprof.replay.planners.PLANNERS`; doing nothing is always added.
        replica_rule: ``even`` or ``round_robin``.

    Raises:
        UsageError: An unknown planner or rule, or experts that cannot be dealt to the devices.
        MoeprofError: The trace is too short to be split, or a rank is missing.
    """
    machine = Devices(
        num_devices=devices, num_redundant=num_redundant, num_groups=groups, num_nodes=nodes
    )
    study = Study.of(trace, machine, planners, replica_rule)
    stacks = [_judge(study, stack) for stack in trace.info.stacks]
    metrics = [metric for judged in stacks for metric in _metrics(study, judged)]
    findings = [
        finding
        for judged in stacks
        for finding in verdicts.findings(
            judged.evidence, num_stacks=len(stacks), section=NAME, nothing=NOTHING
        )
    ]
    frames = {
        name: pd.concat([judged.tables[name] for judged in stacks], ignore_index=True)
        for name in stacks[0].tables
    }
    return Result(
        name=NAME,
        title=f"Placing experts on {devices} devices",
        table=frames.pop("table"),
        metrics=tuple(metrics),
        findings=wording.routing_findings(trace, NAME, findings),
        tables=frames,
        notes=_notes(study, stacks),
    )


_KIND_NOTES: Mapping[verdicts.Kind, str] = types.MappingProxyType(
    {
        "large": f"mean over dispatches of at least {MIN_TOKENS} tokens",
        "merged": f"consecutive dispatches merged to at least {MIN_TOKENS} tokens",
        "small": f"dispatches as recorded: there are not {MIN_TOKENS} tokens to merge",
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judged:
    """One stack's answer; ``gain_bounds`` are 90 % intervals by planner and reference."""

    stack: str
    passes: Passes
    figure_class: FigureClass
    evidence: verdicts.Evidence
    tables: dict[str, pd.DataFrame]
    gain_bounds: dict[tuple[str, str], tuple[float, float]]


def _judge(study: Study, stack: str) -> _Judged:
    passes = windows.passes(study.trace, stack)
    sites = [site_rows.site_rows(passes, site) for site in study.trace.info.sites_of(stack)]
    plans = plans_of(study, passes, sites, ~passes.judged)
    judged = passes.judged
    kind, dispatches = _headline(passes, sites, judged)
    headline = scored(study, sites, plans, dispatches)
    recorded = scored(
        study, sites, plans, [site_rows.recorded_dispatches(r, passes, judged) for r in sites]
    )
    figure_class: FigureClass = "estimate" if kind == "merged" else "exact"
    by_domain = domains.judged_domains(sites, passes, plans, study.rule, min_tokens=MIN_TOKENS)
    hindsight = _hindsight(study, sites, dispatches)
    choice = _choice(study, passes, sites)
    estimates = Estimates.of(study, passes, headline)
    table = _table(study, sites, headline, estimates)
    table.insert(0, "stack", stack)
    table.insert(3, "figure_class", figure_class)
    table = table.merge(load_tables.whole_window(study, passes, sites, plans), on="planner")
    table = table.merge(_worst_domains(by_domain), on="planner", how="left")
    ceilings = _ceilings(study, headline, hindsight, table)
    transfer = domains.transfer_between(
        sites, passes, study.machine, study.names, study.rule, min_tokens=MIN_TOKENS
    )
    replanned = replanning.replanned(
        sites, passes, study.machine, study.names, study.rule, min_tokens=MIN_TOKENS
    )
    merged = headline if kind == "merged" else None
    tables = {
        "table": table,
        "sites": load_tables.by_site(study, sites, headline),
        "phases": load_tables.by_phase(study, passes, recorded),
        "sizes": load_tables.by_size(study, sites, recorded, merged),
        "domains": by_domain,
        "transfer": transfer,
        "replanning": replanned,
        "ceilings": ceilings,
        "choice": choice,
        "devices": load_tables.device_table(study, passes, sites, plans),
        "placements": load_tables.placement_table(study, sites, plans),
    }
    for name, frame in tables.items():
        if name != "table":
            frame.insert(0, "stack", stack)
    evidence = verdicts.Evidence(
        stack=stack,
        table=table,
        ceilings=ceilings,
        choice=choice,
        transfer=transfer,
        replanning=replanned,
        kind=kind,
        min_tokens=MIN_TOKENS,
        num_devices=study.machine.num_devices,
        num_blocks=estimates.num_blocks,
        block_passes=passes.longest_request,
        num_domains=len(passes.labels) - 1,
    )
    return _Judged(
        stack=stack,
        passes=passes,
        figure_class=figure_class,
        evidence=evidence,
        tables=tables,
        gain_bounds=_gain_bounds(study, estimates),
    )


def _headline(
    passes: Passes, sites: Sequence[SiteRows], judged: Bools
) -> tuple[verdicts.Kind, list[Dispatches]]:
    """Returns what of the judged passes counts, per site, and of what kind it is.

    ``large``: dispatches with enough tokens. Where there are none, ``merged``: those of one phase
    and domain merged as they follow each other. Where even that is not enough, ``small``:
    dispatches as recorded.
    """
    if any((rows.pass_tokens[judged] >= MIN_TOKENS).any() for rows in sites):
        return "large", [
            site_rows.recorded_dispatches(rows, passes, judged, min_tokens=MIN_TOKENS)
            for rows in sites
        ]
    merged = [
        site_rows.merged_dispatches(rows, passes, judged, min_tokens=MIN_TOKENS) for rows in sites
    ]
    if any(len(each.rows) for each in merged):
        return "merged", merged
    return "small", [site_rows.recorded_dispatches(rows, passes, judged) for rows in sites]


def _table(
    study: Study, sites: Sequence[SiteRows], scores: Scores, estimates: Estimates
) -> pd.DataFrame:
    """Returns what the headline dispatches show, one row per planner."""
    num_devices = study.machine.num_devices
    uniform = uniform_max_over_mean(sites, scores, num_devices)
    nothing = study.names.index(NOTHING)
    reference = study.names.index(EPLB) if EPLB in study.names else None
    rows = []
    for index, name in enumerate(study.names):
        mean = float(estimates.means.value[index])
        largest = float(scores.ratio[index].max())
        over_nothing = estimates.gain(index, nothing)
        over_eplb = (np.nan,) * 3 if reference is None else estimates.gain(index, reference)
        rows.append(
            {
                "planner": name,
                "num_devices": num_devices,
                "num_dispatches": scores.ratio.shape[1],
                "mean_tokens": float(scores.num_tokens.mean()),
                "mean_max_over_mean": mean,
                "low": float(estimates.means.low[index]),
                "high": float(estimates.means.high[index]),
                "max_max_over_mean": largest,
                "avg_max_load": mean / num_devices,
                "max_load": largest / num_devices,
                "uniform_max_over_mean": uniform,
                "floor_max_over_mean": float(scores.floor.mean()),
                "gain_over_nothing": over_nothing[0],
                "gain_over_nothing_low": over_nothing[1],
                "gain_over_nothing_high": over_nothing[2],
                "gain_over_eplb": over_eplb[0],
                "gain_over_eplb_low": over_eplb[1],
                "gain_over_eplb_high": over_eplb[2],
            }
        )
    return pd.DataFrame(rows)


def _gain_bounds(study: Study, estimates: Estimates) -> dict[tuple[str, str], tuple[float, float]]:
    percentiles = (intervals.LOW_PERCENTILE, intervals.HIGH_PERCENTILE)
    found = {}
    for label, reference in (("nothing", NOTHING), (EPLB, EPLB)):
        if reference in study.names:
            place = study.names.index(reference)
            for index, name in enumerate(study.names):
                _, low, high = estimates.gain(index, place, percentiles=percentiles)
                found[name, label] = low, high
    return found


def _worst_domains(by_domain: pd.DataFrame) -> pd.DataFrame:
    """Returns each planner's worst domain: over all sites, and the mean of each site's worst."""
    sites = by_domain["site"] >= 0
    over_all = by_domain[~sites].sort_values("mean_max_over_mean", ascending=False)
    worst = over_all.drop_duplicates("planner")[["planner", "domain"]]
    each = by_domain[sites].groupby(["planner", "site"])["mean_max_over_mean"].max()
    mean = each.groupby("planner").mean().rename("worst_domain_max_over_mean").reset_index()
    return worst.rename(columns={"domain": "worst_domain"}).merge(mean, on="planner")


def _hindsight(study: Study, sites: Sequence[SiteRows], dispatches: Sequence[Dispatches]) -> float:
    """Returns the mean max/mean of the second-moment placement planned on what it is judged on."""
    machine = study.machine
    ratios = []
    for rows, judged in zip(sites, dispatches, strict=True):
        if not judged.rows.sum():
            continue
        num_experts = rows.site.num_experts
        slots = placement.second_moment(
            judged.rows,
            num_devices=machine.num_devices,
            num_replicas=machine.num_slots(num_experts),
        )
        layout = loads.layout(slots, num_experts=num_experts, num_devices=machine.num_devices)
        ratios.append(loads.max_over_mean(loads.device_loads(judged.rows, layout, study.rule)))
    return float(np.nanmean(np.concatenate(ratios)))


def _ceilings(study: Study, scores: Scores, hindsight: float, table: pd.DataFrame) -> pd.DataFrame:
    nothing = float(table["mean_max_over_mean"].iloc[study.names.index(NOTHING)])
    limits = {
        "uniform": float(table["uniform_max_over_mean"].iloc[0]),
        "hindsight": hindsight,
        "floor": float(scores.floor.mean()),
    }
    meanings = {
        "uniform": "uniform routing of as many tokens, nothing placed",
        "hindsight": "the second-moment placement planned on window B itself",
        "floor": "each dispatch by itself, its heaviest expert alone on a device",
    }
    return pd.DataFrame(
        {
            "limit": list(limits),
            "mean_max_over_mean": list(limits.values()),
            "gain_over_nothing": [1 - value / nothing for value in limits.values()],
            "meaning": [meanings[name] for name in limits],
        }
    )


def _choice(study: Study, passes: Passes, sites: Sequence[SiteRows]) -> pd.DataFrame:
    """Returns the planners compared within window A: either half judges what the other planned."""
    planning = ~passes.judged
    late = np.zeros(len(passes), bool)
    for label in np.unique(passes.label[planning]).tolist():
        members = np.flatnonzero(planning & (passes.label == label))
        late[members[len(members) // 2 :]] = True
    halves = (planning & ~late, late)
    unknown = pd.DataFrame({"planner": list(study.names), "mean_max_over_mean": np.nan})
    if not all(rows.passes[half].sum() for half in halves for rows in sites):
        return unknown
    ratios = []
    for shown, judging in (halves, halves[::-1]):
        _, dispatches = _headline(passes, sites, judging)
        ratios.append(scored(study, sites, plans_of(study, passes, sites, shown), dispatches).ratio)
    return unknown.assign(mean_max_over_mean=np.concatenate(ratios, axis=1).mean(axis=1))


def _metrics(study: Study, judged: _Judged) -> list[Metric]:
    metrics = []
    for row in judged.tables["table"].to_dict("records"):
        place = f"{judged.stack}/{row['planner']}"
        note = _KIND_NOTES[judged.evidence.kind]
        metrics.append(
            Metric(
                name=f"{NAME}/max_over_mean/{place}",
                value=row["mean_max_over_mean"],
                low=_or_none(row["low"]),
                high=_or_none(row["high"]),
                unit="ratio",
                figure_class=judged.figure_class,
                better="lower",
                note=note,
            )
        )
        metrics.append(
            Metric(
                name=f"{NAME}/balancedness/{place}",
                value=_or_none(row["balancedness"]),
                unit="ratio",
                figure_class="exact",
                better="higher",
                note="mean over largest load of window B, devices reduced first, then sites",
            )
        )
        for reference in ("nothing", EPLB):
            if row["planner"] in (reference, NOTHING) or np.isnan(row[f"gain_over_{reference}"]):
                continue
            metrics.append(
                Metric(
                    name=f"{NAME}/gain_over_{reference}/{place}",
                    value=row[f"gain_over_{reference}"],
                    low=_or_none(judged.gain_bounds[row["planner"], reference][0]),
                    high=_or_none(judged.gain_bounds[row["planner"], reference][1]),
                    unit="share",
                    figure_class=judged.figure_class,
                    better="higher",
                    note=f"paired over blocks of consecutive passes; {note}",
                )
            )
    return metrics


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _notes(study: Study, stacks: Sequence[_Judged]) -> tuple[str, ...]:
    notes = [
        "Window A plans, window B judges; each domain is split in time by itself, where the fewest "
        "requests run across the cut.",
        f"Headline: dispatches of at least {MIN_TOKENS} tokens. Loads are rows; balance is not "
        "time.",
        "Intervals come from blocks of consecutive passes as long as the longest request, drawn "
        "for all planners alike. Findings and the table give gains with 95 %, metrics with 90 %.",
        f"Replicas share rows by the rule {study.rule!r}; distinct devices per token are counted "
        "round robin.",
    ]
    if study.machine.num_redundant:
        notes.append("Doing nothing ('contiguous') adds no replicas.")
    if study.machine.num_nodes > 1:
        notes.append("Only EPLB's hierarchical policy keeps expert groups on one node.")
    for judged in stacks:
        if judged.evidence.kind == "merged":
            notes.append(
                f"No dispatch of the {judged.stack} in window B has {MIN_TOKENS} tokens: "
                "consecutive dispatches of one phase and domain were merged, which is an estimate "
                "(see table sizes)."
            )
        if judged.evidence.kind == "small":
            notes.append(
                f"Window B of the {judged.stack} does not hold {MIN_TOKENS} tokens of one phase "
                "and domain: its dispatches count as recorded, and chance rules them."
            )
        if judged.passes.straddling > 0:
            share = wording.percent(judged.passes.straddling)
            notes.append(
                f"{share} of the {judged.stack}'s tokens in window B belong to requests that "
                "window A saw too."
            )
        if judged.passes.mixes:
            notes.append(
                f"Passes of the {judged.stack} mix domains; domains and transfer are judged on "
                "each domain's tokens by themselves, which is an estimate."
            )
    return tuple(notes)
