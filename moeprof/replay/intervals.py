"""Intervals: how far a number of this trace may lie from that of other traffic of its kind.

The trace is analysed once, in its own order. Ratios of sums resample requests: every counted unit
(lookup, hit, byte, slot, token) is shared equally among the requests that caused it, requests are
drawn with replacement 200 times, and the 5th and 95th percentiles of the recomputed ratio are the
interval. Everything else resamples blocks of consecutive dispatches. All draws come from one seed,
so whatever is compared is compared on the same draws.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_DRAWS = 200
LOW_PERCENTILE = 5.0
HIGH_PERCENTILE = 95.0
MIN_REQUESTS = 10
MIN_BLOCKS = 10
MAX_BLOCKS = 1000
"""More blocks than this are merged into longer ones: the statistic costs less, nothing is lost."""
SEED = 1

_NUM_HALVES = 2
_CACHED_REQUESTS = 4096


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One number with what is known of its spread; None where nothing is."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    split_half: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Numbers with intervals, as arrays of one length; NaN stands for "not known".

    Attributes:
        value: From the whole trace.
        low: 5th percentile of the draws.
        high: 95th percentile.
        first_half: From the odd requests.
        second_half: From the even requests.
    """

    value: Floats
    low: Floats
    high: Floats
    first_half: Floats
    second_half: Floats

    def __getitem__(self, index: int) -> Interval:
        halves = (float(self.first_half[index]), float(self.second_half[index]))
        return Interval(
            value=_known(self.value[index]),
            low=_known(self.low[index]),
            high=_known(self.high[index]),
            split_half=halves if np.isfinite(halves).all() else None,
        )

    def within(self, lowest: float, highest: float) -> Estimates:
        """Returns the same cut to the values that are possible."""
        return Estimates(
            value=np.clip(self.value, lowest, highest),
            low=np.clip(self.low, lowest, highest),
            high=np.clip(self.high, lowest, highest),
            first_half=np.clip(self.first_half, lowest, highest),
            second_half=np.clip(self.second_half, lowest, highest),
        )

    def columns(self, name: str = "value") -> dict[str, Floats]:
        """Returns the columns ``name``, ``low``, ``high`` of a table.

        Args:
            name: Name of the value's column; other than ``value`` it prefixes all three.
        """
        prefix = "" if name == "value" else f"{name}_"
        return {name: self.value, f"{prefix}low": self.low, f"{prefix}high": self.high}


def ratio(numerator: Floats, denominator: Floats, *, halves: NDArray[np.int8]) -> Estimates:
    """Returns ratios of sums with their intervals.

    Args:
        numerator: [requests] or [requests, columns] shares of the numerator's units.
        denominator: The same of the denominator's units.
        halves: [requests] 0 or 1, as `alternate` gives them.
    """
    numerator, denominator = _matched(numerator, denominator)
    return summarized(
        resampled_ratio(numerator, denominator, halves=halves),
        num_requests=contributing(numerator, denominator),
    )


def share(numerator: Floats, denominator: Floats, *, halves: NDArray[np.int8]) -> Estimates:
    """Returns `ratio` of a part to its whole: intervals stay within 0 and 1."""
    return ratio(numerator, denominator, halves=halves).within(0.0, 1.0)


def difference(
    first: tuple[Floats, Floats], second: tuple[Floats, Floats], *, halves: NDArray[np.int8]
) -> Estimates:
    """Returns the first ratio less the second, both recomputed on the same draws.

    Args:
        first: Numerator and denominator, [requests] or [requests, columns].
        second: The same.
        halves: [requests] 0 or 1.
    """
    one, other = _matched(*first), _matched(*second)
    return summarized(
        resampled_ratio(*one, halves=halves) - resampled_ratio(*other, halves=halves),
        num_requests=np.minimum(contributing(*one), contributing(*other)),
    )


def contributing(numerator: Floats, denominator: Floats) -> Ints:
    """Returns, per column, how many requests caused any of the units counted."""
    numerator, denominator = _matched(numerator, denominator)
    counts: Ints = ((numerator != 0) | (denominator != 0)).sum(axis=0, dtype=np.int64)
    return counts


def resampled_ratio(numerator: Floats, denominator: Floats, *, halves: NDArray[np.int8]) -> Floats:
    """Returns [1 + draws + 2, columns] ratios: the trace's own, each draw's, each half's."""
    numerator, denominator = _matched(numerator, denominator)
    top = _resampled_sums(numerator, halves)
    bottom = _resampled_sums(denominator, halves)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom != 0, top / bottom, np.nan)


def summarized(resampled: Floats, *, num_requests: Ints | int) -> Estimates:
    """Returns the estimates held by rows of `resampled_ratio` or `resampled_blocks`.

    Args:
        resampled: [1 + draws + 2, columns]; no draws where there are no intervals.
        num_requests: Requests behind each column; fewer than 10 give no interval.
    """
    draws = resampled[1:-_NUM_HALVES]
    enough = np.broadcast_to(np.asarray(num_requests) >= MIN_REQUESTS, resampled.shape[1:])
    low = np.full(resampled.shape[1], np.nan)
    high = low.copy()
    known = enough & np.isfinite(draws).any(axis=0) if len(draws) else np.zeros_like(enough)
    if known.any():
        low[known], high[known] = np.nanpercentile(
            draws[:, known], (LOW_PERCENTILE, HIGH_PERCENTILE), axis=0
        )
    return Estimates(
        value=resampled[0], low=low, high=high, first_half=resampled[-2], second_half=resampled[-1]
    )


def alternate(groups: NDArray[np.int64]) -> NDArray[np.int8]:
    """Returns a half, 0 or 1, per request: odd and even within each group.

    Counting within a group (domain or language) keeps both halves of the same mix where domains
    are interleaved with an even period.

    Args:
        groups: [requests] label of each request's group.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.r_[True, groups[order][1:] != groups[order][:-1]] if len(groups) else []
    index = np.arange(len(groups))
    first = np.maximum.accumulate(np.where(starts, index, 0)) if len(groups) else index
    halves = np.empty(len(groups), dtype=np.int8)
    halves[order] = (index - first) % _NUM_HALVES
    return halves


def block_index(num_dispatches: int, block_length: int) -> Ints | None:
    """Returns the block of each dispatch, or None where there are fewer than 10 blocks.

    Args:
        num_dispatches: Consecutive dispatches.
        block_length: Dispatches per block: the steps of the longest request.
    """
    num_blocks = num_dispatches // max(block_length, 1)
    if num_blocks < MIN_BLOCKS:
        return None
    num_blocks = min(num_blocks, MAX_BLOCKS)
    return np.arange(num_dispatches, dtype=np.int64) * num_blocks // num_dispatches


def resampled_blocks(
    per_block: Floats | None,
    whole: Floats,
    halves: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    centered: bool = True,
) -> Floats:
    """Returns [1 + draws + 2, columns] values of a statistic of sums, blocks redrawn.

    A draw holds some blocks twice and others not at all, so it is less even than the trace. What
    that adds to a measure of unevenness is taken off again: the draws are moved so that their mean
    is the trace's own value.

    Args:
        per_block: [blocks, sums]; None where there are too few blocks.
        whole: [sums] of the trace.
        halves: [2, sums] of either half of the requests.
        statistic: Maps [rows, sums] to [rows, columns].
        centered: False leaves the draws where they fall (for medians).
    """
    rows = [statistic(whole[None])]
    if per_block is not None:
        drawn = statistic(draw_weights(len(per_block)) @ per_block)
        if centered:
            drawn = drawn + (rows[0] - np.nanmean(drawn, axis=0))
        rows.append(drawn)
    rows.append(statistic(halves))
    return np.concatenate(rows)


def resampled_quantiles(
    values: Floats,
    quantiles: tuple[float, ...],
    *,
    blocks: Ints | None,
    halves: Floats,
) -> Floats:
    """Returns [1 + draws + 2, quantiles] of values, blocks redrawn.

    Args:
        values: [dispatches]; finite.
        quantiles: In 0 to 1.
        blocks: [dispatches] as `block_index` gives them, or None.
        halves: [2, dispatches] weight of each value in either half.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    weights = [np.ones((1, len(values)))]
    if blocks is not None:
        weights.append(draw_weights(int(blocks[-1]) + 1)[:, blocks[order]])
    weights.append(halves[:, order])
    return np.concatenate([_weighted_quantiles(ordered, rows, quantiles) for rows in weights])


def draw_weights(num_units: int) -> Floats:
    """Returns [200, units]: how often each draw holds each request or block."""
    return _cached_weights(num_units) if num_units <= _CACHED_REQUESTS else _weights(num_units)


def _weights(num_units: int) -> Floats:
    generator = np.random.default_rng(SEED)
    weights = np.empty((NUM_DRAWS, num_units))
    for row in weights:
        drawn = generator.integers(num_units, size=num_units)
        row[:] = np.bincount(drawn, minlength=num_units)
    return weights


@functools.lru_cache(maxsize=8)
def _cached_weights(num_units: int) -> Floats:
    weights = _weights(num_units)
    weights.flags.writeable = False
    return weights


def _resampled_sums(shares: Floats, halves: NDArray[np.int8]) -> Floats:
    num_requests = len(shares)
    whole = shares.sum(axis=0, keepdims=True)
    each = [(halves == half).astype(np.float64) @ shares for half in range(_NUM_HALVES)]
    if num_requests < MIN_REQUESTS:
        return np.concatenate([whole, np.stack(each)])
    if num_requests <= _CACHED_REQUESTS:
        drawn = draw_weights(num_requests) @ shares
    else:
        generator = np.random.default_rng(SEED)
        drawn = np.empty((NUM_DRAWS, shares.shape[1]))
        for row in drawn:
            sample = generator.integers(num_requests, size=num_requests)
            row[:] = np.bincount(sample, minlength=num_requests) @ shares
    return np.concatenate([whole, drawn, np.stack(each)])


def _weighted_quantiles(ordered: Floats, weights: Floats, quantiles: tuple[float, ...]) -> Floats:
    found = np.full((len(weights), len(quantiles)), np.nan)
    for row, weight in enumerate(weights):
        reached = np.cumsum(weight)
        if len(reached) == 0 or reached[-1] <= 0:
            continue
        for column, quantile in enumerate(quantiles):
            index = np.searchsorted(reached, quantile * reached[-1], side="left")
            found[row, column] = ordered[min(int(index), len(ordered) - 1)]
    return found


def _matched(numerator: Floats, denominator: Floats) -> tuple[Floats, Floats]:
    columns = [array if array.ndim > 1 else array[:, None] for array in (numerator, denominator)]
    top, bottom = np.broadcast_arrays(*columns)
    return top.astype(np.float64), bottom.astype(np.float64)


def _known(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None
