"""Goals that were set for what was measured on a GPU, and the README's table: words, each computed.

Leaves out reading the results (`analysis.live_evidence`) and the page (`analysis.live_results`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from analysis.live_evidence import (
    EAGER,
    GOAL_LINK_ERROR,
    KERNELS,
    MANY_TOKENS,
    QWEN_STUDY,
    RECORDED,
    ROUTINGS,
    Evidence,
    Gain,
    best_of,
    buffering_matrix,
    buffering_rows,
    checks_held,
    gains,
    graph_range,
    graph_sizes,
    headline_rows,
    held_out_rows,
    kernel_rows,
    only_study,
    share_of_floor,
)

PUBLISHED_GAIN = 6.21
"""LM, dynamic over static gating, one node (arXiv 2303.06182, Fig. 9)."""
PUBLISHED_GAIN_NODES = 11.23
"""The same over several nodes, as its abstract has it."""

GOAL_MANY_UNIFORM = 0.80
GOAL_MANY_SKEWED = 0.60
GOAL_FEW_UNIFORM = 0.80
GOAL_DENSE = 0.75
GOAL_GROUPED = 5.0
GOAL_MASK_TOKENS_PER_S = 27_600.0
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal and what was measured.

    Attributes:
        quantity: What it is about.
        goal: As set; the paper's own figure where no goal is set.
        found: As measured, in words.
        met: Whether it is reached; None where no goal is set or nothing was measured.
        section: Where the page shows it.
    """

    quantity: str
    goal: str
    found: str
    met: bool | None
    section: str

    @property
    def verdict(self) -> str:
        """One word or two."""
        if self.met is None:
            return "no goal set" if self.found != NOT_MEASURED else NOT_MEASURED
        return "reached" if self.met else "missed"


NOT_MEASURED = "not measured"


def percent(value: float) -> str:
    """Returns a share as a whole percentage; ``97%``."""
    return f"{100 * value:.0f}%"


def share_said(share: float, goal: float) -> str:
    """Returns a share as a percentage that does not read as its goal where it misses that."""
    if share < goal and percent(share) == percent(goal):
        return f"{math.floor(1000 * share) / 10:.1f}%"
    return percent(share)


def goals(evidence: Evidence) -> list[Goal]:
    """Returns every goal that the measurements can be held to, reached or not."""
    kernels = kernel_rows(evidence.kernels)
    rows = headline_rows(evidence.headline)
    gained = gains(evidence.headline)
    own = buffering_rows(evidence.buffering)
    made = []

    def add(quantity: str, goal: str, found: str, met: bool | None, section: str) -> None:
        judged = None if met is None else bool(met)
        made.append(Goal(quantity=quantity, goal=goal, found=found, met=judged, section=section))

    for routing, words in ROUTINGS.items():
        least = GOAL_MANY_UNIFORM if routing == "uniform" else GOAL_MANY_SKEWED
        share = share_of_floor(kernels, "dynamic", MANY_TOKENS, routing, EAGER)
        add(
            f"Kernel, {MANY_TOKENS:,} tokens, routing {words}: share of the floor",
            f"at least {percent(least)}",
            share_said(share.value, least),
            share.value >= least,
            "kernels",
        )
    low, high = graph_range(kernels, "dynamic", "uniform")
    sizes = graph_sizes(kernels)
    add(
        f"Kernel, {sizes[0]} to {sizes[-1]} tokens as CUDA graphs, routing uniform",
        f"at least {percent(GOAL_FEW_UNIFORM)}",
        f"{share_said(low, GOAL_FEW_UNIFORM)} to {percent(high)}",
        low >= GOAL_FEW_UNIFORM,
        "kernels",
    )
    dense, grouped, mask = (gained[name] for name in ("dense", "static_grouped", "static_mask"))
    add(
        "LM of 52B parameters: share of the dense twin's tokens/s, each at its own best batch",
        f"at least {percent(GOAL_DENSE)}",
        share_said(dense.own_best, GOAL_DENSE),
        dense.own_best >= GOAL_DENSE,
        "headline",
    )
    add(
        "The same at equal memory beyond the weights and equal p95",
        f"at least {percent(GOAL_DENSE)}",
        _share_or_none(dense.equal_terms),
        dense.equal_terms is not None and dense.equal_terms >= GOAL_DENSE,
        "headline",
    )
    add(
        "The same model over static gating in groups",
        f"at least {GOAL_GROUPED:g}x",
        f"{grouped.own_best:.2f}x at own best, {_gain(grouped.equal_terms)} at equal terms",
        min(grouped.own_best, grouped.equal_terms or 0.0) >= GOAL_GROUPED,
        "headline",
    )
    best = best_of(rows, "static_mask")
    add(
        "Static gating with one mask, its best batch: a baseline not held back",
        f"at least {GOAL_MASK_TOKENS_PER_S:,.0f} tokens/s",
        f"{best['tokens_per_s']:,.0f} tokens/s at batch {best['batch']}",
        best["tokens_per_s"] >= GOAL_MASK_TOKENS_PER_S,
        "headline",
    )
    add(
        "Over static gating with one mask, each at its own best batch",
        f"the paper: {PUBLISHED_GAIN}x on one node, {PUBLISHED_GAIN_NODES}x on several",
        f"{mask.own_best:.2f}x; {_gain(mask.equal_terms)} at equal memory and p95",
        None,
        "headline",
    )
    held = checks_held(evidence.buffering)
    add(
        "Live buffering: checks that held in every setting",
        "all",
        f"{sum(held.values())} of {len(held)}",
        all(held.values()),
        "buffering",
    )
    looked = buffering_matrix(evidence.buffering)
    counted = looked["profiler_copies_equal"].dropna().astype(bool)
    add(
        "Live buffering: copies and bytes that the profiler counts, against the predicted ones of "
        "each step",
        "equal",
        f"at {counted.sum()} of {len(counted)} settings of {looked['study'].nunique()} models",
        bool(counted.all()) if len(counted) else None,
        "buffering",
    )
    unknown = int((looked["link_error_judged"].notna() & ~looked["link_error_known"]).sum())
    judged = looked.loc[looked["link_error_known"], "link_error_judged"].dropna()
    within = int((judged <= GOAL_LINK_ERROR).sum())
    gross = int((looked["link_error_net"].isna() & looked["link_error_judged"].notna()).sum())
    add(
        "Live buffering: PCIe counters, less what the run receives without copies, against the "
        "bytes copied, largest difference",
        f"within {percent(GOAL_LINK_ERROR)}",
        f"{100 * judged.max():.1f}%; within at {within} of {len(judged)} settings"
        + (f", with nothing taken off at {gross}" if gross else "")
        + (f"; not known that well at {unknown}" if unknown else "")
        if len(judged)
        else NOT_MEASURED,
        within == len(judged) if len(judged) else None,
        "buffering",
    )
    worst = float(own["link_error"].max())
    add(
        "Live buffering, Qwen3-30B-A3B geometry: PCIe counters against the bytes copied, largest "
        "difference",
        f"within {percent(GOAL_LINK_ERROR)}",
        NOT_MEASURED if math.isnan(worst) else f"{100 * worst:.1f}%",
        None if math.isnan(worst) else worst <= GOAL_LINK_ERROR,
        "buffering",
    )
    return made


def not_measured(section: str, *wanted: tuple[str, str]) -> list[Goal]:
    """Returns goals for which there is no result.

    Args:
        section: Where the page would show them.
        wanted: Quantity and goal of each.
    """
    return [
        Goal(quantity=quantity, goal=goal, found=NOT_MEASURED, met=None, section=section)
        for quantity, goal in wanted
    ]


def _gain(value: float | None) -> str:
    return "not to be had" if value is None else f"{value:.2f}x"


def _share_or_none(value: float | None) -> str:
    return "not to be had" if value is None else share_said(value, GOAL_DENSE)


README_HEADINGS = ("Measured", "Result", "Goal", "Command")
_SCRIPTS: Mapping[str, str] = MappingProxyType(
    {
        "headline": "`-m analysis.gpu.paper_headline`",
        "kernels": "`-m analysis.gpu.gating_kernels`",
        "buffering": "`analysis/gpu/buffering_live.py`",
        "twin": "`-m analysis.gpu.twins lm`",
    }
)


def readme_rows(evidence: Evidence) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the README's table, as it prints them: see `README_HEADINGS`."""
    kernels = kernel_rows(evidence.kernels)
    rows = headline_rows(evidence.headline)
    gained = gains(evidence.headline)
    ours = best_of(rows, "dynamic")
    mask = best_of(rows, "static_mask")
    dense = gained["dense"]
    low, high = graph_range(kernels, "dynamic", "uniform")
    sizes = graph_sizes(kernels)
    many = {
        routing: share_of_floor(kernels, "dynamic", MANY_TOKENS, routing, EAGER).value
        for routing in ROUTINGS
    }
    public = {
        name: share_of_floor(kernels, name, MANY_TOKENS, RECORDED, EAGER).value
        for name in KERNELS
        if name != "dynamic"
    }
    buffered = buffering_rows(evidence.buffering)
    base = buffered.iloc[0]
    lru = buffered[buffered["policy"] == "lru"].iloc[0]
    held = checks_held(only_study(evidence.buffering, QWEN_STUDY))
    counted = buffering_matrix(evidence.buffering)["profiler_copies_equal"].dropna().astype(bool)
    text = held_out_rows(evidence.twin)
    skewed = [many[routing] for routing in ROUTINGS if routing != "uniform"]
    made = [
        (
            "LM of 52B parameters, tokens/s: dynamic over one static mask, own best batches",
            f"{ours['tokens_per_s']:,.0f} over {mask['tokens_per_s']:,.0f}: "
            f"{gained['static_mask'].own_best:.1f}x",
            f"paper {PUBLISHED_GAIN}x, several nodes {PUBLISHED_GAIN_NODES}x",
            "headline",
        ),
        (
            "the same at equal memory and p95",
            _one_digit(gained["static_mask"].equal_terms),
            "",
            "headline",
        ),
        (
            "over static gating in groups",
            f"{gained['static_grouped'].own_best:.1f}x, "
            f"{_one_digit(gained['static_grouped'].equal_terms)} at equal memory and p95",
            f"{GOAL_GROUPED:g}x",
            "headline",
        ),
        (
            "share of the dense twin of equal FLOPs",
            f"{share_said(dense.own_best, GOAL_DENSE)}; {_share_or_none(dense.equal_terms)} at "
            "equal memory and p95",
            f"{percent(GOAL_DENSE)}{_missed(_known(dense), GOAL_DENSE)}",
            "headline",
        ),
        (
            f"moeprof's kernel, share of the floor, {MANY_TOKENS:,} tokens, uniform routing",
            share_said(many["uniform"], GOAL_MANY_UNIFORM),
            percent(GOAL_MANY_UNIFORM),
            "kernels",
        ),
        (
            "the same, Zipf 1 / recorded / Zipf 2.2",
            " / ".join(share_said(share, GOAL_MANY_SKEWED) for share in skewed),
            f"{percent(GOAL_MANY_SKEWED)}{_missed(skewed, GOAL_MANY_SKEWED)}",
            "kernels",
        ),
        (
            "recorded routing, public kernels: " + ", ".join(public),
            ", ".join(percent(share) for share in public.values()),
            "",
            "kernels",
        ),
        (
            f"moeprof's kernel, {sizes[0]} to {sizes[-1]} tokens as CUDA graphs, uniform routing",
            f"{share_said(low, GOAL_FEW_UNIFORM)} to {percent(high)}",
            percent(GOAL_FEW_UNIFORM),
            "kernels",
        ),
        (
            f"Qwen3-30B-A3B geometry, {lru['capacity']} of {base['capacity']} experts a layer on "
            "the GPU (LRU)",
            f"hit rate {percent(lru['hit_rate'])} with the cold prefill, "
            f"{lru['saved_bytes'] / GIB:.1f} of "
            f"{base['device_bytes'] / GIB:.1f} GiB saved, median decode step "
            f"{base['p50_ms']:.1f} to {lru['p50_ms']:.1f} ms; "
            f"{sum(held.values())} of {len(held)} checks held, profiler's count of copies at "
            f"{counted.sum()} of {len(counted)} settings",
            "all checks",
            "buffering",
        ),
        (
            "The routing twin, bits per byte over a unigram's",
            f"{percent(text['share'].min())} to {percent(text['share'].max())}",
            "",
            "twin",
        ),
    ]
    return [(what, found, goal, _SCRIPTS[section]) for what, found, goal, section in made]


def _known(gain: Gain) -> list[float]:
    return [value for value in (gain.own_best, gain.equal_terms) if value is not None]


def _one_digit(value: float | None) -> str:
    return "not to be had" if value is None else f"{value:.1f}x"


def _missed(shares: Sequence[float], goal: float) -> str:
    count = sum(share < goal for share in shares)
    return f", {count} missed" if count else ""
