"""Percentiles of measured steps, and how well repetitions know them.

A setting's step takes the median over its repetitions, without those during which the core that
dispatched was found slow (`watched_steps`); percentiles are taken over these medians. Leaves out
when repetitions are taken (`rounds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Fewer draws say by their own luck that something is known, and whoever visits until it is stops on
# that luck.
NUM_DRAWS = 2000
# Of what is drawn at once, 32 MiB.
_MOST_NUMBERS = 1 << 22
_LEAST_REPETITIONS = 3
_TAIL = 0.05
_SHIFTS = 2.0
_Z = 1.6448536269514722


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatedSteps:
    """All repetitions of a setting.

    Attributes:
        times_ms: [repetitions, steps].
        is_quiet: [repetitions, steps] False where a time is set aside.
        visit_of: [repetitions] the visit of each; None where they are not known.
    """

    times_ms: Floats
    is_quiet: Flags
    visit_of: Numbers | None = None

    @property
    def num_never_quiet(self) -> int:
        """Steps that were quiet in no repetition: all their times count."""
        return int((~self.is_quiet.any(axis=0)).sum())

    @property
    def num_aside(self) -> int:
        """Times that are set aside."""
        return int((~self.is_quiet & self.is_quiet.any(axis=0)).sum())

    @property
    def num_quiet_visits(self) -> int:
        """Visits in which the step was quiet that was quiet in the fewest."""
        if self.visit_of is None:
            return 0
        return _fewest_visits(self.is_quiet, self.visit_of)

    def whole(self) -> RepeatedSteps:
        """Returns the same with nothing set aside."""
        return dataclasses.replace(self, is_quiet=np.ones_like(self.is_quiet))

    def part(self, chosen: Flags) -> RepeatedSteps:
        """Returns some of the repetitions.

        Args:
            chosen: [repetitions].
        """
        visit_of = None if self.visit_of is None else self.visit_of[chosen]
        return RepeatedSteps(
            times_ms=self.times_ms[chosen], is_quiet=self.is_quiet[chosen], visit_of=visit_of
        )

    def percentile_ms(self, percentile: int) -> float:
        """Returns a percentile of the steps' medians; a step that was never quiet takes all."""
        never = ~self.is_quiet.any(axis=0)
        return measured_ms(np.where(self.is_quiet | never, self.times_ms, np.nan), percentile)

    def raw_ms(self, percentile: int) -> float:
        """Returns a percentile of all times, those that are set aside included."""
        return float(np.percentile(self.times_ms, percentile))

    def spreads(
        self, percentiles: Sequence[int], *, num_draws: int = NUM_DRAWS
    ) -> tuple[float, ...]:
        """Returns `spreads_of` without what is set aside."""
        times = np.where(self.is_quiet, self.times_ms, np.nan)
        return spreads_of(times, percentiles, self.visit_of, num_draws=num_draws)


def repetitions_of(times: Mapping[str, Any]) -> RepeatedSteps:
    """Returns the repetitions of a setting as `moeprof.live.verification_files` writes them.

    Raises:
        ValueError: They are not one time per repetition and step, or what is set aside is none of
            them.
    """
    every = np.array(times["measured_ms"], np.float64)
    if every.ndim != 2 or every.shape[1] != len(times["steps"]):  # noqa: PLR2004
        raise ValueError(f"{every.shape} times, not one per repetition and step")
    if not np.isfinite(every).all():
        raise ValueError("a time is missing")
    is_quiet = np.ones(every.shape, np.bool_)
    aside = times.get("set_aside", [[]] * len(every))
    for own, places in zip(is_quiet, aside, strict=True):
        if not all(type(place) is int and 0 <= place < len(own) for place in places):
            raise ValueError(f"steps {places} are set aside, of {len(own)}")
        own[places] = False
    return RepeatedSteps(times_ms=every, is_quiet=is_quiet, visit_of=visits_of(times))


def measured_ms(times: Floats, percentile: int) -> float:
    """Returns a percentile of the steps' medians.

    Args:
        times: [repetitions, steps]; NaN where one is set aside.
        percentile: Which.
    """
    return float(np.percentile(_known_medians(times), percentile))


def spread_of(times: Floats, percentile: int, visits: Numbers | None = None) -> float:
    """Returns half the width of the 90 % interval of a percentile, over the percentile.

    Repetitions of one visit share what the machine did meanwhile: a slow stretch of seconds hits
    all of them, and drawing them one by one would take them for independent. Where visits are
    given, whole visits are drawn with replacement, then repetitions within each. Draws from few
    visits vary too little (by ``n - 1`` over ``n``) and their tails are those of Student's t: the
    width is widened for both. It is infinite for one visit and for fewer than three repetitions of
    some step.

    A high percentile of medians that are not exact lies above that of exact ones: where steps are
    nearly alike, the slowest is the one that chance slowed most. What is drawn again is shifted
    again, but by less. Where the percentile is outside the middle half of the draws, up to twice
    the distance from their median is added to half the width, the more the further outside it is,
    and all from twice as far on: where all steps are alike 70 to 95 % of intervals then hold, of
    the width alone 1 to 30 % (simulated, 4 to 40 visits of 2).

    Args:
        times: [repetitions, steps]; NaN where one is set aside.
        percentile: Which, of the steps' medians over repetitions.
        visits: [repetitions] the visit of each; None where they are not known. Repetitions are then
            drawn one by one, nothing is widened, and slow stretches are not accounted for.
    """
    return spreads_of(times, (percentile,), visits)[0]


def spreads_of(
    times: Floats,
    percentiles: Sequence[int],
    visits: Numbers | None = None,
    *,
    num_draws: int = NUM_DRAWS,
) -> tuple[float, ...]:
    """Returns `spread_of` of several percentiles, from the same draws."""
    if np.isfinite(times).sum(axis=0).min() < _LEAST_REPETITIONS:
        return (math.inf,) * len(percentiles)
    generator = np.random.default_rng(0)
    if visits is None:
        drawn = generator.integers(len(times), size=(num_draws, len(times)))
        widened = 1.0
    else:
        fewest = _fewest_visits(np.isfinite(times), visits)
        if fewest < 2:  # noqa: PLR2004
            return (math.inf,) * len(percentiles)
        drawn = _drawn(visits, generator, num_draws)
        widened = widening(fewest)
    medians = _medians(times, drawn)
    # A draw may have no time of a step that was seldom quiet.
    medians = medians[np.isfinite(medians).all(axis=1)]
    if len(medians) < num_draws / 2:
        return (math.inf,) * len(percentiles)
    spreads = []
    for percentile in percentiles:
        found = np.percentile(medians, percentile, axis=1)
        own = measured_ms(times, percentile)
        ends = (_TAIL, 0.25, 0.5, 0.75, 1 - _TAIL)
        low, left, middle, right, high = np.quantile(found, ends).tolist()
        shift = _shift(own, left, middle, right)
        spreads.append(float((widened * (high - low) / 2 + shift) / own))
    return tuple(spreads)


def _shift(own: float, left: float, middle: float, right: float) -> float:
    """Returns what is added for a value that lies off the middle of its draws, by their quartiles.

    No step at the quartile: a hair more or less is no other interval.
    """
    off, quarter = abs(own - middle), middle - left if own < middle else right - middle
    return _SHIFTS * min(off, 2 * max(0.0, off - quarter))


def more_visits(spread: float, num_visits: int, tolerance: float, *, most: int) -> float:
    """Returns how many visits more are expected to bring a spread down to a tolerance.

    The width of draws shrinks with the root of the visits, and is widened less the more they are.

    Args:
        spread: From `spread_of`.
        num_visits: Visits that it is of.
        tolerance: Wanted spread.
        most: Visits that may be made.

    Returns:
        At most ``most``; infinite where these do not suffice, or one visit says nothing yet.
    """
    if num_visits < 2 or math.isinf(spread):  # noqa: PLR2004
        return math.inf
    width = spread / _relative_width(num_visits)
    for more in range(most + 1):
        if width * _relative_width(num_visits + more) <= tolerance:
            return more
    return math.inf


def visits_of(times: Mapping[str, Any]) -> Numbers | None:
    """Returns the visit of each repetition of a setting [repetitions], or None.

    Args:
        times: Of one setting, as `moeprof.live.verification_files` writes them; files
            from before there were rounds know of no visits.

    Raises:
        ValueError: The visits are not those of the repetitions.
    """
    if "visits" not in times:
        return None
    counts = [visit["repetitions"] for visit in times["visits"]]
    if sum(counts) != len(times["measured_ms"]):
        raise ValueError(f"visits of {sum(counts)} repetitions, not {len(times['measured_ms'])}")
    return np.repeat(np.arange(len(counts)), counts)


def _drawn(visits: Numbers, generator: np.random.Generator, num_draws: int) -> Numbers:
    """Returns [draws, most] repetitions: visits with replacement, then as many of each as it has.

    -1 where a draw has fewer.
    """
    _, visit, counts = np.unique(visits, return_inverse=True, return_counts=True)
    most = int(counts.max())
    first = np.cumsum(counts) - counts
    # By visit, in order.
    members = np.argsort(visit, kind="stable")
    chosen = generator.integers(len(counts), size=(num_draws, len(counts)))
    number = counts[chosen][..., None]
    within = (generator.random((*chosen.shape, most)) * number).astype(np.int64)
    found = members[first[chosen][..., None] + within]
    return np.where(np.arange(most) < number, found, -1).reshape(num_draws, -1)


def _medians(times: Floats, drawn: Numbers) -> Floats:
    """Returns [draws, steps] medians of drawn repetitions, -1 left out; some draws at once."""
    every = np.vstack([times, np.full(times.shape[1], np.nan)])
    block = max(1, _MOST_NUMBERS // (drawn.shape[1] * times.shape[1]))
    starts = range(0, len(drawn), block)
    return np.concatenate([_known_medians(every[drawn[first : first + block]]) for first in starts])


def _fewest_visits(is_quiet: Flags, visits: Numbers) -> int:
    """Returns in how many visits the step was quiet that was quiet in the fewest."""
    seen = np.stack([is_quiet[visits == visit].any(axis=0) for visit in np.unique(visits)])
    return int(seen.sum(axis=0).min())


def _known_medians(times: Floats) -> Floats:
    """Returns medians over the last axis but one of what is no NaN; NaN where nothing is."""
    if not np.isnan(times).any():
        found: Floats = np.median(times, axis=-2)
        return found
    # NaN come last.
    ascending = np.sort(times, axis=-2)
    count = np.isfinite(times).sum(axis=-2, keepdims=True)
    middles = [
        np.take_along_axis(ascending, np.maximum(place, 0), axis=-2)
        for place in ((count - 1) // 2, count // 2)
    ]
    found = ((middles[0] + middles[1]) / 2).squeeze(-2)
    return found


def _relative_width(num_visits: int) -> float:
    return widening(num_visits) / math.sqrt(num_visits)


def widening(num_visits: int) -> float:
    """Returns how many times as wide draws of so few, which vary too little, are taken to be.

    Args:
        num_visits: Visits, or whatever else is drawn whole; at least 2.
    """
    return float(np.sqrt(num_visits / (num_visits - 1)) * _t_quantile(num_visits - 1) / _Z)


def _t_quantile(freedom: int) -> float:
    """Returns the 95 % quantile of Student's t.

    In closed form for 1 and 2 degrees of freedom, else by the expansion of Abramowitz and Stegun
    (26.7.5), off by less than 0.3 %.
    """
    if freedom == 1:
        return math.tan(math.pi * (0.5 - _TAIL))
    if freedom == 2:  # noqa: PLR2004
        return (1 - 2 * _TAIL) * math.sqrt(2 / (4 * _TAIL * (1 - _TAIL)))
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))
