"""Which requests took part in which step, and what follows for times and bytes per step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals
from moeprof.replay.access import Floats, tally
from moeprof.replay.intervals import Estimates, Interval
from moeprof.replay.tokens import RANK_SHIFT, StackTokens

_UNKNOWN = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Causes:
    """One entry per (step, request) in which the request had a token.

    Attributes:
        num_steps: Rows of the table of steps asked about.
        num_requests: Requests of the trace.
        half: [requests] 0 or 1.
        step: [entries] row of the table of steps.
        request: [entries].
        num_causes: [steps] requests of each step.
    """

    num_steps: int
    num_requests: int
    half: NDArray[np.int8]
    step: NDArray[np.int64]
    request: NDArray[np.int64]
    num_causes: Floats

    @property
    def num_contributing(self) -> int:
        """Requests with a token in any of the steps."""
        return len(np.unique(self.request))

    def shares(self, units: Floats) -> Floats:
        """Returns [requests] sums of per-step units, shared among the step's requests."""
        parts = (units / np.maximum(self.num_causes, 1))[self.step]
        return tally(self.request, self.num_requests, weights=parts)


def causes(tokens: StackTokens | None, steps: pd.DataFrame) -> Causes:
    """Returns who took part in the steps of a table.

    Args:
        tokens: Routing of the stack; None where the stack has no MoE site, so nobody is known.
        steps: Columns rank and step, in order of execution.
    """
    num_steps = len(steps)
    if tokens is None or not len(tokens.dispatch) or not num_steps:
        nobody = np.empty(0, np.int64)
        return Causes(
            num_steps=num_steps, num_requests=0, half=np.empty(0, np.int8), step=nobody,
            request=nobody, num_causes=np.zeros(num_steps),
        )  # fmt: skip
    key = (steps["rank"].to_numpy(np.int64) << RANK_SHIFT) | steps["step"].to_numpy(np.int64)
    passes = (tokens.dispatch_rank.astype(np.int64) << RANK_SHIFT) | tokens.dispatch_step
    order = np.argsort(key)
    place = np.minimum(np.searchsorted(key[order], passes), num_steps - 1)
    row_of_pass = np.where(key[order][place] == passes, order[place], _UNKNOWN)
    first = distinct_causes(tokens)
    row = row_of_pass[tokens.dispatch[first]]
    known = row != _UNKNOWN
    return Causes(
        num_steps=num_steps,
        num_requests=len(tokens.requests),
        half=tokens.requests.half,
        step=row[known],
        request=tokens.request[first][known].astype(np.int64),
        num_causes=tally(row[known], num_steps),
    )


def distinct_causes(tokens: StackTokens) -> NDArray[np.int64]:
    """Returns the first token of each distinct (dispatch, request)."""
    changed = (tokens.dispatch[1:] != tokens.dispatch[:-1]) | (
        tokens.request[1:] != tokens.request[:-1]
    )
    return np.flatnonzero(np.r_[len(tokens.dispatch) > 0, changed])


def ratios(
    numerators: list[Floats], denominator: Floats, caused: Causes, *, known: NDArray[np.bool_]
) -> list[Interval]:
    """Returns ratios of sums over steps; without intervals where nobody is known.

    Args:
        numerators: Each [steps].
        denominator: [steps].
        caused: Who took part.
        known: [steps] False leaves a step out.
    """
    tops = [np.where(known, numerator, 0) for numerator in numerators]
    bottom = np.where(known, denominator, 0)
    if not caused.num_contributing:
        total = float(bottom.sum())
        return [Interval(value=float(top.sum()) / total if total else None) for top in tops]
    found = intervals.ratio(
        np.stack([caused.shares(top) for top in tops], axis=1),
        caused.shares(bottom)[:, None],
        halves=caused.half,
    )
    return [found[index] for index in range(len(tops))]


def quantiles(
    values: Floats, wanted: tuple[float, ...], caused: Causes, *, known: NDArray[np.bool_]
) -> Estimates:
    """Returns quantiles of per-step values, their intervals from blocks of steps.

    Args:
        values: [steps].
        wanted: Quantiles in 0 to 1.
        caused: Who took part.
        known: [steps] False leaves a step out.
    """
    num_steps = len(values)
    half = caused.half[caused.request].astype(np.int64)
    weight = tally(half * num_steps + caused.step, 2 * num_steps).reshape(2, num_steps)
    weight /= np.maximum(caused.num_causes, 1)
    longest = int(tally(caused.request, caused.num_requests).max(initial=1))
    blocks = intervals.block_index(num_steps, longest) if caused.num_contributing else None
    if blocks is not None and len(np.unique(blocks[known])) <= int(blocks[-1]):
        blocks = None
    rows = intervals.resampled_quantiles(
        values[known],
        wanted,
        blocks=None if blocks is None else blocks[known],
        halves=weight[:, known],
    )
    return intervals.summarized(rows, num_requests=caused.num_contributing)
