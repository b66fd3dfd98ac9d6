"""Percentiles of steps' medians, and how honest their spreads are where repetitions cluster.

And what is left of both where some times are set aside.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")

from moeprof.live import step_percentiles
from moeprof.live.step_percentiles import (
    RepeatedSteps,
    measured_ms,
    more_visits,
    repetitions_of,
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


@pytest.mark.parametrize(("num_steps", "apart"), [(19, 0.0), (39, 0.0), (39, 0.05)])
def test_the_slowest_of_like_steps_is_slow_by_chance(num_steps: int, apart: float) -> None:
    # Where steps are alike, the 99th percentile of their medians is that of the noise.
    generator = np.random.default_rng(5)
    visits = np.repeat(np.arange(20), 2)
    held = []
    for _ in range(60):
        steps = np.exp(generator.normal(0, apart, num_steps))
        times = steps * np.exp(generator.normal(0, 0.025, (40, num_steps)))
        value = measured_ms(times, 99)
        off = value - np.percentile(steps, 99)
        assert apart or off > 0
        held.append(abs(off) <= spread_of(times, 99, visits) * value)
    # Widths of draws alone hold a tenth to a third where steps are alike.
    assert np.mean(held) >= 0.7


def half_width(medians: list[Any], percentile: int, own: float, widened: float) -> float:
    """Of a percentile's interval, by the medians [draws][steps] that were drawn."""
    every = np.percentile(medians, percentile, axis=1)
    low, left, middle, right, high = np.quantile(every, (0.05, 0.25, 0.5, 0.75, 0.95))
    return float(widened * (high - low) / 2 + shifted(own, left, middle, right))


def shifted(own: float, left: float, middle: float, right: float) -> float:
    """Returns what is added for a percentile so far from the draws' median, by quartiles."""
    quarter = middle - left if own < middle else right - middle
    off = abs(own - middle)
    if off <= quarter:
        return 0.0
    return 2 * off if off >= 2 * quarter else 4 * (off - quarter)


def drawn_by_hand(sizes: Sequence[int]) -> list[Any]:
    """Returns repetitions of each draw: visits of these sizes, then as many of each as it has."""
    generator = np.random.default_rng(0)
    visits = np.repeat(np.arange(len(sizes)), sizes)
    chosen = generator.integers(len(sizes), size=(2000, len(sizes)))
    within = generator.random((2000, len(sizes), max(sizes)))
    return [
        [
            np.flatnonzero(visits == one)[int(within[draw, place, number] * sizes[one])]
            for place, one in enumerate(own)
            for number in range(sizes[one])
        ]
        for draw, own in enumerate(chosen.tolist())
    ]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1, 1, 1), (3, 1, 4), (1, 2)])
def test_draws_take_whole_visits_then_repetitions_of_each(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(len(sizes))
    visits = np.repeat(np.arange(len(sizes)), sizes)
    times = generator.lognormal(1, 0.2, (len(visits), 7))
    medians = [np.median(times[rows], axis=0) for rows in drawn_by_hand(sizes)]
    for percentile, found in zip((50, 99), spreads_of(times, (50, 99), visits), strict=True):
        own, every = measured_ms(times, percentile), np.percentile(medians, percentile, axis=1)
        low, left, middle, right, high = np.quantile(every, (0.05, 0.25, 0.5, 0.75, 0.95))
        shift = shifted(own, left, middle, right)
        half = (high - low) / 2 * step_percentiles.widening(len(sizes))
        assert found == pytest.approx((half + shift) / own)
        assert found == spread_of(times, percentile, visits)
    assert spreads_of(times[:2], (50, 99), visits[:2]) == (math.inf, math.inf)


def test_luck_of_the_draws_decides_little(monkeypatch: pytest.MonkeyPatch) -> None:
    # Settings of few visits, as they are measured: who stops where draws are lucky knows nothing.
    generator = np.random.default_rng(2)
    cases = []
    for num_visits in (4, 6, 12):
        visits = np.repeat(np.arange(num_visits), 2)
        machine = generator.normal(0, 0.04, num_visits)[visits, None]
        noise = generator.normal(0, 0.03, (len(visits), 19))
        cases.append((np.exp(machine + noise), visits))
    real = np.random.default_rng
    found = []
    for seed in range(6):
        monkeypatch.setattr(
            step_percentiles.np.random, "default_rng", lambda _, seed=seed: real(seed)
        )
        found.append(
            [spread for case in cases for spread in spreads_of(case[0], (50, 99), case[1])]
        )
    apart = np.ptp(found, axis=0) / np.mean(found, axis=0)
    assert apart.max() < 0.2 and np.median(apart) < 0.1


def test_the_interval_has_no_step_at_the_quartiles() -> None:
    # By hand, median 10 and quartiles 9 and 12: a hair beyond a quartile adds a hair.
    added = {9.0: 0, 9.5: 0, 12.0: 0, 8.99: 0.04, 8.5: 2, 8.0: 4, 7.0: 6, 12.01: 0.04, 15.0: 10}
    for own, expected in added.items():
        assert step_percentiles._shift(own, 9.0, 10.0, 12.0) == pytest.approx(expected), own
    # Draws that are all alike but for the value itself.
    assert step_percentiles._shift(9.0, 10.0, 10.0, 10.0) == 2


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
    assert step_percentiles.widening(2) == pytest.approx(math.sqrt(2) * 6.3138 / 1.6449, rel=1e-3)


def test_visits_of_what_was_written() -> None:
    times = {"measured_ms": [[1.0]] * 3}
    assert visits_of(times) is None
    visits = [{"round": 1, "repetitions": 2}, {"round": 2, "repetitions": 1}]
    found = visits_of({**times, "visits": visits})
    assert found is not None and found.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="visits of 2 repetitions, not 3"):
        visits_of({**times, "visits": visits[:1]})


def repeated(
    times: Any, is_quiet: Any = True, visit_of: Sequence[int] | None = None
) -> RepeatedSteps:
    times_ms = np.array(times, np.float64)
    return RepeatedSteps(
        times_ms=times_ms,
        is_quiet=np.broadcast_to(np.array(is_quiet, np.bool_), times_ms.shape).copy(),
        visit_of=None if visit_of is None else np.array(visit_of),
    )


def noisy(generator: np.random.Generator, repetitions: int, steps: int) -> NDArray[np.float64]:
    return np.exp(generator.normal(1, 0.2, (repetitions, steps)))


def test_what_is_set_aside_counts_for_nothing() -> None:
    times = [[1.0, 10.0, 100.0], [2.0, 30.0, 101.0], [50.0, 20.0, 103.0], [4.0, 90.0, 109.0]]
    is_quiet = [[1, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]
    found = repeated(times, is_quiet)
    # Of 1, 2, 4; of 10, 30, 20; and of all four where the core was slow each time.
    assert found.percentile_ms(0) == 2
    assert found.percentile_ms(50) == 20
    assert found.percentile_ms(100) == 102
    assert found.percentile_ms(75) == (20 + 102) / 2
    # An even count of what is left.
    assert repeated([[1.0], [8.0], [4.0]], [[1], [1], [0]]).percentile_ms(50) == 4.5
    assert repeated([[1.0], [8.0], [4.0]], [[0], [1], [0]]).percentile_ms(50) == 8
    # Beside it stands what took the time.
    assert found.raw_ms(100) == 109 and found.raw_ms(0) == 1
    assert found.raw_ms(50) == np.median(times)
    # Nothing is set aside of the step that was never quiet.
    assert (found.num_aside, found.num_never_quiet) == (2, 1)
    whole = found.whole()
    assert whole.is_quiet.all() and (whole.num_aside, whole.num_never_quiet) == (0, 0)
    assert whole.percentile_ms(0) == 3 and whole.percentile_ms(50) == 25


def test_visits_that_know_every_step() -> None:
    times = np.ones((5, 2))
    is_quiet = np.array([[1, 1], [1, 0], [1, 0], [1, 0], [1, 1]], np.bool_)
    visit_of = np.array([0, 0, 1, 2, 2])
    found = RepeatedSteps(times_ms=times, is_quiet=is_quiet, visit_of=visit_of)
    # The second step was quiet in the first visit and in the third.
    assert found.num_quiet_visits == 2
    assert found.whole().num_quiet_visits == 3
    assert dataclasses.replace(found, visit_of=None).num_quiet_visits == 0


@pytest.mark.parametrize("seed", range(8))
def test_medians_of_what_is_left(seed: int) -> None:
    generator = np.random.default_rng(seed)
    repetitions = int(generator.integers(1, 12))
    times = noisy(generator, repetitions, 30)
    is_quiet = generator.random(times.shape) < generator.random()
    found = repeated(times, is_quiet)
    medians = []
    for own, quiet in zip(times.T, is_quiet.T, strict=True):
        medians.append(np.median(own[quiet] if quiet.any() else own))
    for percentile in (0, 50, 95, 99, 100):
        assert found.percentile_ms(percentile) == np.percentile(medians, percentile)
    with warnings.catch_warnings():
        # Where nothing is left.
        warnings.simplefilter("ignore", RuntimeWarning)
        aside = np.where(is_quiet, times, np.nan)[None].repeat(2, axis=0)
        expected = np.nanmedian(aside, axis=1)
    np.testing.assert_array_equal(step_percentiles._known_medians(aside), expected)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1, 1, 1), (3, 1, 4), None])
def test_where_nothing_is_set_aside_nothing_changes(sizes: tuple[int, ...] | None) -> None:
    generator = np.random.default_rng(7)
    visits = None if sizes is None else np.repeat(np.arange(len(sizes)), sizes)
    times = noisy(generator, 8 if visits is None else len(visits), 20)
    found = repeated(times, visit_of=None if visits is None else visits.tolist())
    if sizes is None:
        rows, widened = list(np.random.default_rng(0).integers(8, size=(2000, 8))), 1.0
    else:
        rows, widened = drawn_by_hand(sizes), step_percentiles.widening(len(sizes))
    medians = [np.median(times[own], axis=0) for own in rows]
    for percentile, spread in zip((50, 99), found.spreads((50, 99)), strict=True):
        value = np.percentile(np.median(times, axis=0), percentile)
        assert found.percentile_ms(percentile) == value
        expected = half_width(medians, percentile, value, widened) / value
        assert spread == pytest.approx(expected, rel=1e-12)


def test_a_step_that_was_seldom_quiet_is_not_known() -> None:
    generator = np.random.default_rng(1)
    times = noisy(generator, 8, 5)
    visits = [0, 0, 1, 1, 2, 2, 3, 3]
    unknown = (math.inf, math.inf)
    whole = repeated(times, visit_of=visits)
    assert all(map(math.isfinite, whole.spreads((50, 99))))

    def spreads(quiet: Sequence[int], visit_of: Sequence[int] | None) -> tuple[float, ...]:
        """Returns those where one step was quiet in these repetitions alone."""
        is_quiet = np.ones(times.shape, np.bool_)
        is_quiet[:, 3] = [each in quiet for each in range(len(times))]
        return repeated(times, is_quiet, visit_of).spreads((50, 99))

    # Three times, in visits of their own or not.
    for visit_of in (visits, None):
        assert spreads([], visit_of) == spreads([0], visit_of) == unknown
        assert spreads([0, 2], visit_of) == unknown
        assert all(map(math.isfinite, spreads([0, 2, 4, 5], visit_of)))
    # Three times in one visit.
    assert spreads([0, 1, 2], [0, 0, 0, 1, 1, 1, 1, 1]) == unknown
    assert all(map(math.isfinite, spreads([0, 1, 3], [0, 0, 0, 1, 1, 1, 1, 1])))


def test_fewer_visits_are_known_less_well() -> None:
    # A step sets the worst percentile by itself; its times are quiet in two of six visits.
    times = np.ones((12, 4))
    times[:, 0] = 10 + np.array([0, 1, 0, 1, 0.5, 0.5, 0, 1, 0, 1, 0.5, 0.5])
    visits = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    is_quiet = np.ones(times.shape, np.bool_)
    is_quiet[4:, 0] = False
    (alone,) = repeated(times, is_quiet, visits).spreads((100,))
    (two,) = repeated(times[:4], visit_of=visits[:4]).spreads((100,))
    (six,) = repeated(times, visit_of=visits).spreads((100,))
    # As wide as of two visits: draws differ, and those that lack it tell nothing.
    assert alone == pytest.approx(two, rel=0.3) and alone > 3 * six


def test_what_lacks_a_step_in_most_draws_is_not_known() -> None:
    # Ten steps, each quiet in two visits of its own of twenty: hardly a draw has all of them.
    visits = np.arange(20).repeat(2)
    is_quiet = visits[:, None] // 2 == np.arange(10)
    times = noisy(np.random.default_rng(2), 40, 10)
    assert (is_quiet.sum(axis=0) == 4).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repeated(times, is_quiet, visits.tolist()).spreads((50,)) == (math.inf,)


def test_some_of_the_repetitions() -> None:
    times = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
    found = repeated(times, [[1, 0], [1, 1], [0, 1]], [0, 1, 1])
    own = found.part(np.array([False, True, True]))
    assert own.times_ms.tolist() == times[1:]
    assert own.is_quiet.tolist() == [[True, True], [False, True]]
    assert own.visit_of is not None and own.visit_of.tolist() == [1, 1]
    assert own.percentile_ms(0) == 2 and own.percentile_ms(100) == 25
    # Of one visit alone the second step was never quiet.
    first = found.part(np.array([True, False, False]))
    assert first.percentile_ms(100) == 10
    assert repeated(times).part(np.array([True, False, True])).visit_of is None


WRITTEN: dict[str, Any] = {
    "steps": [4, 7, 9],
    "measured_ms": [[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]],
    "set_aside": [[2], [0, 2]],
    "visits": [{"round": 1, "repetitions": 1}, {"round": 2, "repetitions": 1}],
}


def test_repetitions_of_what_was_written() -> None:
    found = repetitions_of(WRITTEN)
    # Places among the steps, not their numbers.
    assert found.is_quiet.tolist() == [[True, True, False], [False, True, False]]
    assert found.times_ms.tolist() == WRITTEN["measured_ms"]
    assert found.visit_of is not None and found.visit_of.tolist() == [0, 1]
    assert [found.percentile_ms(each) for each in (0, 50, 100)] == [1, 15, 150]
    # Files from before tell neither.
    old = repetitions_of({name: WRITTEN[name] for name in ("steps", "measured_ms")})
    assert old.is_quiet.all() and old.visit_of is None
    assert [old.percentile_ms(each) for each in (0, 50, 100)] == [1.5, 15, 150]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"set_aside": [[3], []]}, "are set aside, of 3"),
        ({"set_aside": [[], [1, -1]]}, "are set aside, of 3"),
        ({"set_aside": [[0.5], []]}, "are set aside, of 3"),
        ({"set_aside": [[False, False, True], []]}, "are set aside, of 3"),
        ({"set_aside": [[1]]}, "zip"),
        ({"set_aside": [[1], [], []]}, "zip"),
        ({"measured_ms": [[1.0, math.nan, 2.0]] * 2}, "a time is missing"),
        ({"measured_ms": [[1.0, 2.0]] * 2}, "not one per repetition and step"),
        ({"measured_ms": [1.0, 2.0, 3.0]}, "not one per repetition and step"),
        ({"visits": [{"round": 1, "repetitions": 1}]}, "visits of 1 repetitions, not 2"),
    ],
)
def test_repetitions_that_are_damaged(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repetitions_of({**WRITTEN, **damage})
