"""Rows per expert of every pass of a site, and the dispatches that planning and judging look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay import loads
from moeprof.replay.planners import History
from moeprof.replay.tokens import NOT_SEEN
from moeprof.replay.windows import Passes, merged_rows
from moeprof.trace import schema

Array = NDArray[Any]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MIN_MERGED = 64
"""Dispatches that a planner is shown at least, merged less where tokens are few."""
NUM_REMIXED = 1024
"""Dispatches mixed anew where passes hold several domains."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteRows:
    """Rows per expert of one site.

    Attributes:
        site: The site.
        expert: [tokens, top_k] in the order of `Passes.token_order`.
        parts: [parts, experts] rows.
        part_tokens: [parts] tokens that the site saw.
        passes: [passes, experts] rows.
        pass_tokens: [passes] tokens that the site saw.
    """

    site: schema.Site
    expert: Array
    parts: Ints
    part_tokens: Ints
    passes: Ints
    pass_tokens: Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatches:
    """Dispatches of one site to be planned on or judged.

    Attributes:
        rows: [dispatches, experts].
        num_tokens: [dispatches].
        first_pass: [dispatches] the pass, or the first of those merged.
        label: [dispatches] domain.
        merged: True where recorded dispatches were merged.
    """

    rows: Ints
    num_tokens: Ints
    first_pass: Ints
    label: Ints
    merged: bool


def site_rows(passes: Passes, site: schema.Site) -> SiteRows:
    """Returns the rows of a site, pass by pass and part by part."""
    tokens = passes.tokens
    expert = tokens.expert[tokens.sites.index(site)][passes.token_order]
    num_parts = len(passes.part_pass)
    parts = loads.expert_rows(passes.part_of_token, expert, num_parts, site.num_experts)
    seen = expert[:, 0] != NOT_SEEN
    part_tokens = np.bincount(passes.part_of_token[seen], minlength=num_parts)
    starts = np.searchsorted(passes.part_pass, np.arange(len(passes)))
    return SiteRows(
        site=site,
        expert=expert,
        parts=parts,
        part_tokens=part_tokens,
        passes=np.add.reduceat(parts, starts, axis=0),
        pass_tokens=np.add.reduceat(part_tokens, starts),
    )


def history(rows: SiteRows, passes: Passes, chosen: Bools, *, min_tokens: int) -> History:
    """Returns what a planner is shown of the chosen passes.

    Args:
        rows: The site.
        passes: Its stack.
        chosen: [passes] which of them.
        min_tokens: Tokens that smaller dispatches are merged to; fewer where the passes hold so
            few that less than 64 dispatches would be left.
    """
    kept = chosen & (rows.pass_tokens > 0)
    enough = int(rows.pass_tokens[kept].sum()) // MIN_MERGED
    min_tokens = max(min(min_tokens, enough), 1)
    parts = merged_parts(rows, passes, chosen, min_tokens=min_tokens, all_groups=True)
    num_mixed = _parts_per_pass(rows, passes, kept)
    if num_mixed > 1:
        merged = _remixed(parts, num_mixed, seed=rows.site.site)
    else:
        found = merged_dispatches(rows, passes, chosen, min_tokens=min_tokens, all_groups=True)
        merged = found.rows
    return History(
        recorded=rows.passes[kept],
        merged=merged,
        parts=parts.rows,
        domain=parts.label,
        site=rows.site.site,
    )


def _parts_per_pass(rows: SiteRows, passes: Passes, kept: Bools) -> int:
    """Returns how many equal parts the passes consist of on average, rounded."""
    if not kept.any():
        return 1
    squares = np.bincount(
        passes.part_pass, rows.part_tokens.astype(np.float64) ** 2, minlength=len(passes)
    )
    return round(float((rows.pass_tokens[kept] ** 2 / squares[kept]).mean()))


def _remixed(parts: Dispatches, num_mixed: int, *, seed: int) -> Ints:
    """Returns dispatches mixed anew from the domains' parts, drawn by their tokens.

    Where a dispatch mixes domains, there are far more parts than dispatches, and which of them met
    is chance: mixing them anew shows a planner more of what may come.
    """
    generator = np.random.default_rng(seed)
    chance = parts.num_tokens / parts.num_tokens.sum()
    drawn = generator.choice(len(parts.rows), size=(NUM_REMIXED, num_mixed), p=chance)
    mixed: Ints = parts.rows[drawn].sum(axis=1)
    return mixed


def recorded_dispatches(
    rows: SiteRows, passes: Passes, chosen: Bools, *, min_tokens: int = 1
) -> Dispatches:
    """Returns the chosen passes that have enough tokens, as recorded."""
    index = np.flatnonzero(chosen & (rows.pass_tokens >= min_tokens))
    return Dispatches(
        rows=rows.passes[index],
        num_tokens=rows.pass_tokens[index],
        first_pass=index,
        label=passes.label[index],
        merged=False,
    )


def merged_dispatches(
    rows: SiteRows, passes: Passes, chosen: Bools, *, min_tokens: int, all_groups: bool = False
) -> Dispatches:
    """Returns the chosen passes, those of one lane, phase and domain merged in order of time.

    Args:
        rows: The site.
        passes: Its stack.
        chosen: [passes] which of them.
        min_tokens: Tokens that close a group; larger dispatches stay as they are.
        all_groups: Keep also what is left with fewer tokens at the end.
    """
    index = np.flatnonzero(chosen)
    return _merged(
        rows.passes[index],
        rows.pass_tokens[index],
        key=passes.pass_key()[index],
        first_pass=index,
        label=passes.label[index],
        min_tokens=min_tokens,
        all_groups=all_groups,
    )


def merged_parts(
    rows: SiteRows, passes: Passes, chosen: Bools, *, min_tokens: int, all_groups: bool = False
) -> Dispatches:
    """Returns `merged_dispatches` of each domain's part in the passes."""
    index = np.flatnonzero(chosen[passes.part_pass])
    return _merged(
        rows.parts[index],
        rows.part_tokens[index],
        key=passes.part_key()[index],
        first_pass=passes.part_pass[index],
        label=passes.part_label[index],
        min_tokens=min_tokens,
        all_groups=all_groups,
    )


def _merged(
    rows: Ints,
    num_tokens: Ints,
    *,
    key: Ints,
    first_pass: Ints,
    label: Ints,
    min_tokens: int,
    all_groups: bool,
) -> Dispatches:
    group, enough = merged_rows(num_tokens, key, min_tokens)
    num_groups = len(enough)
    member = np.flatnonzero(group >= 0)
    order = member[np.argsort(group[member], kind="stable")]
    starts = np.searchsorted(group[order], np.arange(num_groups))
    kept = np.ones(num_groups, bool) if all_groups else enough
    if not num_groups:
        return Dispatches(
            rows=rows[:0],
            num_tokens=num_tokens[:0],
            first_pass=first_pass[:0],
            label=label[:0],
            merged=False,
        )
    first = order[starts]
    return Dispatches(
        rows=np.add.reduceat(rows[order], starts, axis=0)[kept],
        num_tokens=np.add.reduceat(num_tokens[order], starts)[kept],
        first_pass=first_pass[first][kept],
        label=label[first][kept],
        merged=bool((np.bincount(group[member], minlength=num_groups)[kept] > 1).any()),
    )
