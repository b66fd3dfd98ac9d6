"""Measurements put together: of several moments, and of what one takes beyond another."""

from __future__ import annotations

import math

import pytest
from calibrations import exactly

pytest.importorskip("torch")

from moeprof.live.measured_curves import middle, middle_curve
from moeprof.live.piece_bench import difference
from moeprof.replay.calibration_file import Curve, Measured


def measured(median: float, low: float, high: float, error: float, repetitions: int) -> Measured:
    return Measured(median=median, low=low, high=high, error=error, num_repetitions=repetitions)


def test_the_middle_of_moments_is_their_median() -> None:
    # One moment was slow: of the mean it would be a third.
    moments = [exactly(2e-5, 0.01), exactly(9e-5, 0.5), exactly(2.2e-5, 0.02)]
    found = middle(moments)
    assert found.median == 2.2e-5
    assert (found.low, found.high) == (2e-5, 9e-5)
    assert found.num_repetitions == 15
    assert middle(moments[::-1]) == found
    # Of an even number half of the inner two.
    assert middle([exactly(1.0), exactly(2.0)]).median == 1.5
    wide = [measured(2.0, 0.5, 3.0, 0.1, 4), measured(2.0, 1.0, 7.0, 0.1, 6)]
    assert middle(wide) == measured(2.0, 0.5, 7.0, pytest.approx(0.1 / math.sqrt(2)), 10)


def test_moments_that_differ_are_less_sure() -> None:
    errors = [
        middle([exactly(10.0 - off, 0.02), exactly(10.0, 0.02), exactly(10.0 + off, 0.02)]).error
        for off in (0.0, 1.0, 2.0, 4.0)
    ]
    assert errors == sorted(set(errors))
    # Where they agree each of them makes it surer; where they do not, their own errors hardly tell.
    assert errors[0] == pytest.approx(0.02 / math.sqrt(3))
    spread = 4.0 * math.sqrt(2 / 3) / 10.0
    assert errors[3] == pytest.approx(math.hypot(0.02, spread) / math.sqrt(3))
    # More moments of the same spread say more.
    assert middle([exactly(9.0), exactly(11.0)] * 4).error == pytest.approx(
        middle([exactly(9.0), exactly(11.0)]).error / 2
    )


def test_one_moment_is_itself() -> None:
    one = measured(3e-6, 2e-6, 5e-6, 0.04, 30)
    assert middle([one]) == one


def test_what_takes_no_time_at_most_moments_has_an_error_still() -> None:
    nothing = middle([exactly(0.0), exactly(0.0), exactly(1e-6)])
    assert nothing.median == 0 and nothing.high == 1e-6
    assert math.isfinite(nothing.error)


def test_curves_are_put_together_size_by_size() -> None:
    moments = [
        Curve(sizes=(1.0, 4.0), times_s=(exactly(first, 0.01), exactly(last, 0.03)))
        for first, last in ((1.0, 8.0), (3.0, 7.0), (2.0, 30.0))
    ]
    found = middle_curve(moments)
    assert found.sizes == (1.0, 4.0)
    # Of each size the moment in the middle, not of all sizes the same moment.
    assert [one.median for one in found.times_s] == [2.0, 8.0]
    for index, one in enumerate(found.times_s):
        assert one == middle([each.times_s[index] for each in moments])
    assert middle_curve(moments[:1]) == moments[0]


def test_differences_are_what_one_takes_beyond_the_other() -> None:
    whole = measured(10.0, 9.0, 12.0, 0.03, 9)
    part = measured(6.0, 5.9, 6.2, 0.02, 5)
    found = difference(whole, part)
    # The absolute errors, 0.3 and 0.12, add up as squares; relative to 4 they are larger.
    assert found == measured(4.0, 3.0, 6.0, pytest.approx(math.hypot(0.3, 0.12) / 4.0), 5)
    share = difference(whole, part, 0.25)
    assert (share.median, share.low, share.high) == (1.0, 0.75, 1.5)
    # A share is as sure as all of it.
    assert share.error == found.error and share.num_repetitions == 5


def test_differences_are_never_below_nothing() -> None:
    part = measured(6.0, 5.9, 6.2, 0.02, 5)
    for median in (6.0, 5.0, 0.5):
        whole = measured(median, 0.9 * median, 1.2 * median, 0.03, 9)
        found = difference(whole, part)
        assert found.median == found.low == found.error == 0
        assert found.high == pytest.approx(0.2 * median)
    # What is hardly more is far from sure, and its lower end is nothing.
    barely = difference(measured(6.1, 5.0, 7.0, 0.03, 9), part)
    assert barely.low == 0 < barely.median < barely.high
    assert barely.error > 1
