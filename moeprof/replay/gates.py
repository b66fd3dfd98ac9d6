"""Static against dynamic gating: slots, drops, placeholders, masks, traffic, products.

Static gating gives each expert ceil(rule) slots per device, drops what does not fit and computes
what stays empty. Dynamic gating computes exactly the rows that tokens need. Leaves out time: that
takes a calibrated machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay import capacity, gate_verdicts, intervals, wording
from moeprof.replay.capacity import MoeShape, device_bytes
from moeprof.replay.demand import demands
from moeprof.replay.gate_sums import VALUE_SUMS, VALUE_TOTALS, SiteSums
from moeprof.replay.gate_verdicts import NAME, Gated
from moeprof.replay.intervals import Estimates
from moeprof.replay.result import FigureClass, Metric, Result
from moeprof.replay.tokens import Requests, load_requests
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]

MODEL_RULE = "model"
GATING_RULES = ("token_fraction", "capacity_factor", MODEL_RULE)
DEFAULT_VALUES = {"token_fraction": (0.05, 1.0), "capacity_factor": (1.0, 1.25, 2.0)}
ALL_PHASES = "all"
MIN_EVENTS = 10
"""Fewer losses than this carry no interval."""

_RATIOS = {
    "waste_factor": ("slots", "decisions"),
    "waste_factor_without_ceiling": ("exact_slots", "decisions"),
    "dropped_share": ("dropped", "decisions"),
    "clipped_share": ("clipped", "tokens"),
    "lost_share": ("lost", "tokens"),
    "tile_ratio": ("tile_rows", "dynamic_tile_rows"),
    "dynamic_tile_padding": ("dynamic_tile_rows", "decisions"),
}
"""Ratios of sums, each with an interval."""
_SHARES = ("dropped_share", "clipped_share", "lost_share")


def gating(
    trace: Trace,
    rule: str = "token_fraction",
    values: Sequence[float] | None = None,
    devices: int = 1,
    *,
    tile_rows: int = capacity.TILE_ROWS,
) -> Result:
    """Returns what static gating would cost and drop, beside dynamic gating.

    The two rules must not be mixed up: ``token_fraction`` gives each expert ceil(value x tokens)
    slots (fairseq's evaluation), ``capacity_factor`` ceil(value x k x tokens / E) (GShard, Switch).
    Capacity is per device: requests are dealt to devices in turn and whole, and padding counts as
    tokens. First choices take slots before second choices, in token order.

    The table has one row per value, site and phase; table ``stacks`` pools the sites of a stack,
    with a phase ``all``; table ``memory`` holds the parameter bytes of a device, whole and with an
    expert cache in front of the decoder. Columns named ``dynamic_*`` are those of dynamic gating.
    Drops are ``exact`` at the first MoE layer and as long as nothing was dropped before; beyond,
    the routing is that of a run without these drops, and they are ``estimate``.

    Args:
        trace: The trace.
        rule: ``token_fraction``, ``capacity_factor``, or ``model``: each site's own rule.
        values: Parameters of the rule to compare; none with ``model``. By default 0.05 and 1.0 for
            ``token_fraction`` (the founding paper's language and translation models), and 1.0,
            1.25 and 2.0 for ``capacity_factor``.
        devices: Devices that share the experts, contiguous ranges of them.
        tile_rows: Rows that a matrix product handles at a time.

    Raises:
        UsageError: An option makes no sense.
        TraceError: The trace is damaged.
    """
    compared = _compared(trace, rule, values)
    for name, number in (("devices", devices), ("tile_rows", tile_rows)):
        if isinstance(number, bool) or number != int(number) or number < 1:
            raise UsageError(f"{name} must be a whole number from 1 up, not {number!r}")
    requests = load_requests(trace)
    pools: list[_Pool] = []
    dropped_before = np.zeros(_num_values(compared))
    is_first = True
    for stack in trace.info.stacks:
        sites = _summed(trace, stack, compared, requests, devices=devices, tile=tile_rows)
        of_stack = []
        for sums in sites:
            exact = (dropped_before == 0) & (not _recorded_drops(trace))
            if is_first or (rule == MODEL_RULE and devices == 1):
                exact[:] = True
            of_stack += _pools([sums], exact, with_all=False)
            dropped_before = dropped_before + sums.sums["dropped"].sum(axis=(0, 1))
            is_first = False
        exact = np.array(
            [all(pool.exact for pool in of_stack if pool.index == index)
             for index in range(_num_values(compared))]
        )  # fmt: skip
        pools += of_stack
        pools += _pools(sites, exact, with_all=True)
    return _result(trace, pools, requests, rule=rule, devices=devices, tile=tile_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """One row: sites of a stack, phases and a rule.

    Attributes:
        sites: Sums of each site.
        phase: Name of the phase, or ``all``.
        codes: Phases pooled.
        index: Which of the rules.
        exact: True where the drops are exact.
        whole: True for a row of table ``stacks``.
    """

    sites: tuple[SiteSums, ...]
    phase: str
    codes: tuple[int, ...]
    index: int
    exact: bool
    whole: bool

    @property
    def stack(self) -> str:
        return self.sites[0].site.stack

    @property
    def dispatches(self) -> list[int]:
        """Dispatches of each site."""
        return [int(sums.sums["num_dispatches"][list(self.codes)].sum()) for sums in self.sites]

    def knows(self, name: str) -> bool:
        """Returns True where a count of losses carries an interval.

        Where fewer than 10 were lost there is no telling how many will be; where the rule can
        never drop, there is nothing to tell.
        """
        if not any(
            capacity.may_drop(
                replace(sums.site, capacity_rule=schema.CapacityRule(rule=r, value=v))
            )
            for sums in self.sites
            for r, v in [sums.rules[self.index]]
        ):
            return True
        return (self.total(name) or 0.0) >= MIN_EVENTS

    def per_request(self, name: str) -> Floats:
        """Returns [requests] sums of a quantity over sites and phases."""
        codes = list(self.codes)
        parts = [sums.sums[name][codes].sum(axis=0) for sums in self.sites]
        total: Floats = np.sum(parts, axis=0)
        return total if total.ndim == 1 else total[:, self.index]

    def total(self, name: str, unit: str | None = None) -> float | None:
        """Returns the sum of a quantity, in rows or in what each of a site's rows has."""
        found = 0.0
        for sums in self.sites:
            each = 1 if unit is None else getattr(sums.shape, unit)
            if each is None:
                return None
            array = sums.sums[name][list(self.codes)]
            per_rule = name in (*VALUE_SUMS, *VALUE_TOTALS)
            found += float(array[..., self.index].sum() if per_rule else array.sum()) * each
        return found

    def largest(self, name: str, unit: str | None = None) -> float | None:
        """Returns the maximum of a quantity over sites and phases."""
        found = 0.0
        for sums in self.sites:
            each = 1 if unit is None else getattr(sums.shape, unit)
            if each is None:
                return None
            array = sums.sums[name][list(self.codes)]
            best = array[:, self.index].max() if array.ndim > 1 else array.max()
            found = max(found, float(best) * each)
        return found


def _compared(
    trace: Trace, rule: str, values: Sequence[float] | None
) -> dict[int, list[tuple[str, float]]]:
    """Returns, per site id, the (rule, value) pairs to compare; sites without a rule are absent."""
    if rule not in GATING_RULES:
        raise UsageError(f"unknown rule {rule!r}", hint=f"choose one of: {', '.join(GATING_RULES)}")
    if rule == MODEL_RULE:
        if values is not None and len(values):
            raise UsageError("the rule 'model' takes no values", hint="leave them out")
        own = {
            site.site: [(site.capacity_rule.rule, site.capacity_rule.value)]
            for site in trace.info.sites
            if site.capacity_rule is not None
        }
        if not own:
            raise UsageError(
                f"{trace.info.model.name} has no capacity rule: it drops nothing",
                hint="choose token_fraction or capacity_factor to see what a rule would do",
            )
        return own
    if isinstance(values, (str, int, float)):
        raise UsageError("values must be several numbers", hint=f"values=[{values}]")
    chosen = DEFAULT_VALUES[rule] if values is None else tuple(values)
    if not chosen:
        raise UsageError("no values to compare", hint=f"values={list(DEFAULT_VALUES[rule])}")
    for value in chosen:
        capacity.check_rule(rule, value)
    pairs = [(rule, float(value)) for value in dict.fromkeys(chosen)]
    return {site.site: pairs for site in trace.info.sites}


def _num_values(compared: dict[int, list[tuple[str, float]]]) -> int:
    return len(next(iter(compared.values())))


def _recorded_drops(trace: Trace) -> bool:
    return any(capacity.may_drop(site) for site in trace.info.sites)


def _summed(
    trace: Trace,
    stack: str,
    compared: dict[int, list[tuple[str, float]]],
    requests: Requests,
    *,
    devices: int,
    tile: int,
) -> list[SiteSums]:
    sites = {
        site.site: SiteSums(
            site=site,
            rules=compared[site.site],
            num_requests=len(requests),
            shape=MoeShape.of_site(site, dtype=trace.info.model.dtype),
            devices=devices,
            tile=tile,
        )
        for site in trace.info.sites_of(stack)
        if site.site in compared
    }
    if sites:
        for batch in demands(trace, stack, devices=devices, requests=requests):
            for demand in batch:
                if demand.site.site in sites:
                    sites[demand.site.site].add(demand)
    return list(sites.values())


def _pools(sites: list[SiteSums], exact: NDArray[np.bool_], *, with_all: bool) -> list[_Pool]:
    """Returns a pool per rule and phase that the sites have."""
    if not sites:
        return []
    happened = np.sum([sums.sums["num_dispatches"] for sums in sites], axis=0)
    phases: list[tuple[str, tuple[int, ...]]] = [
        (schema.PHASES[code], (code,)) for code in map(int, np.flatnonzero(happened))
    ]
    if with_all and len(phases) > 1:
        phases.append((ALL_PHASES, tuple(code for _, codes in phases for code in codes)))
    return [
        _Pool(
            sites=tuple(sites), phase=phase, codes=codes, index=index,
            exact=bool(exact[index]), whole=with_all,
        )
        for index in range(len(sites[0].rules))
        for phase, codes in phases
    ]  # fmt: skip


def _result(
    trace: Trace, pools: list[_Pool], requests: Requests, *, rule: str, devices: int, tile: int
) -> Result:
    ratios = _ratios(pools, requests)
    rows = [
        _row(pool, {name: found[index] for name, found in ratios.items()})
        for index, pool in enumerate(pools)
    ]
    table = pd.DataFrame([row for row, pool in zip(rows, pools, strict=True) if not pool.whole])
    stacks = pd.DataFrame([row for row, pool in zip(rows, pools, strict=True) if pool.whole]).drop(
        columns=["site", "layer"], errors="ignore"
    )
    gated = [
        Gated(
            stack=pool.stack,
            phase=pool.phase,
            rule=row["rule"],
            value=row["value"],
            drops_class="exact" if pool.exact else "estimate",
            ratios={name: found[index] for name, found in ratios.items()},
            row=row,
        )
        for index, (pool, row) in enumerate(zip(pools, rows, strict=True))
        if pool.whole
    ]
    metrics = [metric for each in gated for metric in _metrics(each)]
    return Result(
        name=NAME,
        title="Gating",
        table=table,
        metrics=tuple(metrics),
        findings=wording.routing_findings(
            trace, NAME, gate_verdicts.verdicts(trace, gated, tile=tile)
        ),
        tables={"stacks": stacks, "memory": _memory(trace, devices)},
        notes=_notes(trace, rule=rule, devices=devices, tile=tile),
    )


def _ratios(pools: list[_Pool], requests: Requests) -> dict[str, Estimates]:
    found: dict[str, Estimates] = {}
    for name, (top, bottom) in _RATIOS.items() if pools else ():
        estimate = intervals.share if name in _SHARES else intervals.ratio
        found[name] = estimate(
            np.stack([pool.per_request(top) for pool in pools], axis=1),
            np.stack([pool.per_request(bottom) for pool in pools], axis=1),
            halves=requests.half,
        )
        if name in _SHARES:
            known = np.array([pool.knows(top) for pool in pools])
            found[name] = replace(
                found[name],
                low=np.where(known, found[name].low, np.nan),
                high=np.where(known, found[name].high, np.nan),
            )
    return found


def _row(pool: _Pool, ratios: dict[str, intervals.Interval]) -> dict[str, Any]:
    site = pool.sites[0].site
    rules = {sums.rules[pool.index] for sums in pool.sites}
    rule, value = next(iter(rules)) if len(rules) == 1 else ("mixed", float("nan"))
    num_slots, decisions = pool.total("slots"), pool.total("decisions")
    dropped = pool.total("dropped")
    assert num_slots is not None and decisions is not None and dropped is not None
    row: dict[str, Any] = {
        "rule": rule,
        "value": value,
        "stack": pool.stack,
        "site": site.site,
        "layer": site.layer,
        "phase": pool.phase,
        "num_dispatches": pool.total("num_dispatches"),
        "num_tokens": pool.total("tokens"),
        "num_padded_tokens": pool.total("num_padded"),
        "num_decisions": decisions,
        "max_slots_per_expert": pool.largest("max_slots"),
        "num_slots": num_slots,
        "num_placeholders": num_slots - (decisions - dropped),
        "num_dropped": dropped,
        "num_tokens_clipped": pool.total("clipped"),
        "num_tokens_lost": pool.total("lost"),
        "drops_class": "exact" if pool.exact else "estimate",
    }
    for name, interval in ratios.items():
        row[name] = interval.value
        row[f"{name}_low"], row[f"{name}_high"] = interval.low, interval.high
    row = {
        name: round(number)
        if isinstance(number, float) and name.startswith(("num", "max"))
        else number
        for name, number in row.items()
    }
    return {**row, **_resources(pool)}


def _resources(pool: _Pool) -> dict[str, Any]:
    """Returns bytes, rows and operations, static and dynamic; None where shapes are unknown."""
    elements = pool.largest("max_mask_elements")
    assert elements is not None
    crossing, dynamic_crossing = (
        pool.total("crossing_rows", "row_bytes"),
        pool.total("dynamic_crossing_rows", "row_bytes"),
    )
    num_counts = sum(
        sums.site.num_experts * (sums.devices - 1) * calls
        for sums, calls in zip(pool.sites, pool.dispatches, strict=True)
    )
    return {
        "max_mask_elements": int(elements),
        "max_mask_bytes": int(elements) * capacity.MASK_ELEMENT_BYTES,
        "max_combine_bytes": int(elements) * capacity.COMBINE_ELEMENT_BYTES,
        "max_dispatched_bytes": _whole(pool.largest("max_rows", "row_bytes")),
        "max_dynamic_dispatched_bytes": _whole(pool.largest("max_needed_rows", "row_bytes")),
        "dispatched_bytes": _whole(pool.total("slots", "row_bytes")),
        "dynamic_dispatched_bytes": _whole(pool.total("decisions", "row_bytes")),
        "all_to_all_bytes": _whole(None if crossing is None else 2 * crossing),
        "dynamic_all_to_all_bytes": _whole(
            None
            if dynamic_crossing is None
            else 2 * dynamic_crossing + num_counts * capacity.COUNT_BYTES
        ),
        "max_rows_per_expert": _whole(pool.largest("max_rows_per_expert")),
        "gemm_rows": _whole(pool.total("slots")),
        "dynamic_gemm_rows": _whole(pool.total("decisions")),
        "tile_rows": _whole(pool.total("tile_rows")),
        "dynamic_tile_rows": _whole(pool.total("dynamic_tile_rows")),
        "flops": _whole(pool.total("slots", "row_flops")),
        "dynamic_flops": _whole(pool.total("decisions", "row_flops")),
        "mask_flops": _whole(pool.total("mask_elements", "mask_element_flops")),
        "num_expert_calls": sum(
            sums.site.num_experts * calls
            for sums, calls in zip(pool.sites, pool.dispatches, strict=True)
        ),
        "num_dynamic_expert_calls": _whole(pool.total("active_experts")),
        "weight_bytes": sum(
            sums.site.num_experts * sums.site.expert_bytes * calls
            for sums, calls in zip(pool.sites, pool.dispatches, strict=True)
        ),
        "dynamic_weight_bytes": _whole(pool.total("active_experts", "expert_bytes")),
    }


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


def _metrics(gated: Gated) -> list[Metric]:
    where = gated.where
    drops: FigureClass = "exact" if gated.drops_class == "exact" else "estimate"
    kinds: dict[str, tuple[str, FigureClass, str]] = {
        "waste_factor": (
            "ratio", "exact", "rows processed under the capacity rule for each row needed",
        ),
        "waste_factor_without_ceiling": (
            "ratio", "exact", "the same before slots are rounded up",
        ),
        "dropped_share": ("share", drops, "decisions that find no slot"),
        "clipped_share": ("share", drops, "tokens that lose at least one expert"),
        "lost_share": ("share", drops, "tokens that lose all experts of a layer"),
        "tile_ratio": (
            "ratio", "exact", "rows of whole tiles, static over dynamic",
        ),
        "dynamic_tile_padding": (
            "ratio", "exact", "rows of whole tiles that dynamic gating needs for each routed row",
        ),
    }  # fmt: skip
    return [
        wording.metric_of(
            f"{NAME}/{name}/{where}", gated.ratios[name], unit=unit, figure_class=figure_class,
            better="lower", note=note,
        )
        for name, (unit, figure_class, note) in kinds.items()
    ]  # fmt: skip


def _memory(trace: Trace, devices: int) -> pd.DataFrame:
    """Returns the parameter bytes of a device, whole and with an expert cache."""
    static, sites = trace.info.model.static_bytes, trace.info.sites
    if static is None:
        return pd.DataFrame()
    whole = device_bytes(static, sites, devices=devices)
    stack = trace.info.stacks[-1]
    most = max(-(-site.num_experts // devices) for site in sites if site.stack == stack)
    rows = []
    for slots in range(1, most + 1):
        held = device_bytes(static, sites, devices=devices, cache_slots=slots, cached_stack=stack)
        rows.append(
            {
                "devices": devices,
                "cached_stack": stack,
                "cache_slots": slots,
                "device_bytes": held,
                "freed_bytes": whole - held,
                "freed_share": (whole - held) / max(whole, 1),
                "memory_ratio": whole / max(held, 1),
            }
        )
    return pd.DataFrame(rows)


def _notes(trace: Trace, *, rule: str, devices: int, tile: int) -> tuple[str, ...]:
    notes = [
        "Capacity is per device and counts padding as tokens; padding itself takes no slot. First "
        "choices take slots before second choices, in token order.",
        "Drops are of the recorded tokens: beyond the first MoE layer that drops, and in text that "
        "would have been generated otherwise, routing would have changed (estimate).",
        f"Mask bytes: {capacity.MASK_ELEMENT_BYTES} bytes for each of tokens x experts x slots on "
        f"one device, as fairseq holds them. Tiles of {tile} rows. All-to-all bytes: both ways, "
        f"rows that leave their device, {devices} device{'s' * (devices > 1)}.",
        "Operations of the mask products come on top of those of the experts, in static gating "
        "only.",
    ]
    if any(site.slot_order == "none" and site.top_k > 1 for site in trace.info.sites):
        notes.append(
            "Some sites do not order their slots by weight: which token is dropped follows the "
            "recorded slots; how many are dropped does not depend on it."
        )
    if rule == MODEL_RULE and any(site.capacity_rule is None for site in trace.info.sites):
        notes.append("Sites without a capacity rule are left out.")
    return tuple(notes)
