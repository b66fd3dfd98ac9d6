"""Percentiles of steps' medians, and how honest their spreads are where repetitions cluster."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from moeprof.live import step_percentiles
from moeprof.live.step_percentiles import (
    measured_ms,
    more_visits,
    spread_of,
    spreads_of,
    visits_of,
)


def test_spread() -> None:
    same = np.tile(np.arange(1.0, 11.0), (5, 1))
    assert spread_of(same, 50) == 0
    assert spread_of(same[:2], 50) == np.inf
    generator = np.random.default_rng(0)
    few, many = (np.exp(generator.normal(0, 0.2, (n, 30))) for n in (4, 100))
    assert 0 < spread_of(many, 50) < spread_of(few, 50)


def test_hiccups_are_no_property_of_a_setting() -> None:
    steps = np.tile(np.arange(1.0, 101.0), (5, 1))
    hiccups = steps.copy()
    hiccups[1, 40:60] *= 3
    hiccups[3, 80:] *= 2
    for percentile in (50, 99):
        found = measured_ms(hiccups, percentile)
        assert found == measured_ms(steps, percentile)
    assert np.percentile(hiccups, 99) > 1.5 * np.percentile(steps, 99)


def test_one_visit_knows_nothing_of_others() -> None:
    times = np.exp(np.random.default_rng(0).normal(0, 0.01, (6, 20)))
    assert spread_of(times, 50, np.zeros(6, np.int64)) == np.inf
    assert spread_of(times[:2], 50, np.arange(2)) == np.inf
    assert np.isfinite(spread_of(times, 50, np.array([0, 0, 0, 0, 1, 1])))
    same = np.tile(np.arange(1.0, 11.0), (4, 1))
    assert spread_of(same, 99, np.array([0, 0, 1, 1])) == 0


@pytest.mark.parametrize(("num_visits", "of_visit"), [(3, 2), (6, 3)])
def test_intervals_hold_what_they_say_where_visits_differ(num_visits: int, of_visit: int) -> None:
    # Each visit is slower or faster as a whole; true is what no noise would give.
    generator = np.random.default_rng(num_visits)
    steps = np.exp(generator.normal(0, 0.3, 15))
    visits = np.repeat(np.arange(num_visits), of_visit)
    held, held_one_by_one = [], []
    for _ in range(80):
        machine = generator.normal(0, 0.03, num_visits)[visits, None]
        times = steps * np.exp(machine + generator.normal(0, 0.01, (len(visits), len(steps))))
        value = measured_ms(times, 50)
        off = abs(value - np.percentile(steps, 50)) / value
        held.append(off <= spread_of(times, 50, visits))
        held_one_by_one.append(off <= spread_of(times, 50))
    assert np.mean(held) >= 0.85
    # Drawn one by one, repetitions of a visit pass for independent.
    assert np.mean(held_one_by_one) < 0.8


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1, 1, 1), (3, 1, 4), (1, 2)])
def test_draws_take_whole_visits_then_repetitions_of_each(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(len(sizes))
    visits = np.repeat(np.arange(len(sizes)), sizes)
    times = generator.lognormal(1, 0.2, (len(visits), 7))
    drawn = np.random.default_rng(0)
    medians = []
    for _ in range(200):
        chosen = drawn.integers(len(sizes), size=len(sizes))
        rows = [drawn.choice(np.flatnonzero(visits == one), size=sizes[one]) for one in chosen]
        medians.append(np.median(times[np.concatenate(rows)], axis=0))
    for percentile, found in zip((50, 99), spreads_of(times, (50, 99), visits), strict=True):
        low, high = np.quantile(np.percentile(medians, percentile, axis=1), (0.05, 0.95))
        half = (high - low) / 2 / measured_ms(times, percentile)
        assert found == pytest.approx(half * step_percentiles._widening(len(sizes)))
        assert found == spread_of(times, percentile, visits)
    assert spreads_of(times[:2], (50, 99), visits[:2]) == (math.inf, math.inf)


def test_many_steps_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    times = generator.lognormal(size=(9, 12))
    visits = np.repeat(np.arange(3), (2, 3, 4))
    whole = step_percentiles.spreads_of(times, (50, 99), visits)
    # Two draws of nine repetitions at once at most.
    monkeypatch.setattr(step_percentiles, "_MOST_NUMBERS", 2 * 9 * 12)
    assert step_percentiles.spreads_of(times, (50, 99), visits) == whole
    monkeypatch.setattr(step_percentiles, "_MOST_NUMBERS", 1)
    assert step_percentiles.spreads_of(times, (50, 99), visits) == whole


def test_more_visits_that_are_needed() -> None:
    # Widths of n visits go as t(n - 1) / sqrt(n - 1): R's qt as below.
    def width(freedom: int, quantile: float) -> float:
        return quantile / math.sqrt(freedom)

    at_3, at_6 = width(2, 2.9200), width(5, 2.0150)
    assert more_visits(0.0199 * at_3 / at_6, 3, 0.02, most=60) == 3
    assert more_visits(0.0205 * at_3 / at_6, 3, 0.02, most=60) == 4
    assert more_visits(0.02, 3, 0.02, most=60) == 0
    assert more_visits(0.0199 * at_3 / at_6, 3, 0.02, most=2) == math.inf
    assert more_visits(0.03, 1, 0.02, most=60) == math.inf
    assert more_visits(math.inf, 3, 0.02, most=60) == math.inf


def test_as_many_visits_as_foretold_suffice_mostly() -> None:
    generator = np.random.default_rng(5)
    every = generator.normal(100, 3, (40, 40, 1))
    ratios = []
    for times in every:
        spread = spread_of(times[:8], 50, np.arange(8))
        more = more_visits(spread, 8, 0.8 * spread, most=30)
        count = 8 + int(more)
        ratios.append(spread_of(times[:count], 50, np.arange(count)) / (0.8 * spread))
    assert 0.8 < np.median(ratios) < 1.25


def test_quantiles_of_student_s_t() -> None:
    # R: qt(0.95, c(1, 2, 3, 5, 10, 19))
    known = {1: 6.3138, 2: 2.9200, 3: 2.3534, 5: 2.0150, 10: 1.8125, 19: 1.7291}
    for freedom, value in known.items():
        assert step_percentiles._t_quantile(freedom) == pytest.approx(value, rel=3e-3)
    assert step_percentiles._widening(2) == pytest.approx(math.sqrt(2) * 6.3138 / 1.6449, rel=1e-3)


def test_visits_of_what_was_written() -> None:
    times = {"measured_ms": [[1.0]] * 3}
    assert visits_of(times) is None
    visits = [{"round": 1, "repetitions": 2}, {"round": 2, "repetitions": 1}]
    found = visits_of({**times, "visits": visits})
    assert found is not None and found.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="visits of 2 repetitions, not 3"):
        visits_of({**times, "visits": visits[:1]})
