"""What a table of predictions and measurements comes to: intervals of shares, and what is said."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch")

from moeprof.live.step_percentiles import widening
from moeprof.live.verdicts import binomial_interval, clustered_interval, summary


def exact_tail(share, count, trials):
    """Returns the probability of at least so many successes, by integers, however many trials."""
    whole = Fraction(share)
    yes, every = whole.numerator, whole.denominator
    ways = sum(
        math.comb(trials, n) * yes**n * (every - yes) ** (trials - n)
        for n in range(count, trials + 1)
    )
    return float(Fraction(ways, every**trials))


@pytest.mark.parametrize(("successes", "trials"), [(3, 12), (279, 308), (550, 1100), (1290, 1300)])
def test_binomial_intervals_of_few_and_many(successes, trials):
    # Binomial coefficients of 1,100 trials are beyond what a float holds.
    low, high = binomial_interval(successes, trials)
    assert exact_tail(low, successes, trials) == pytest.approx(0.05, rel=1e-9)
    assert 1 - exact_tail(high, successes + 1, trials) == pytest.approx(0.05, rel=1e-9)
    mirrored = binomial_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_binomial_intervals_of_all_or_none():
    for trials in (1, 10, 5000):
        low = 0.05 ** (1 / trials)
        assert binomial_interval(trials, trials) == pytest.approx((low, 1.0))
        assert binomial_interval(0, trials) == pytest.approx((0.0, 1 - low))


def test_trials_that_go_together_are_known_less_well():
    generator = np.random.default_rng(1)
    alone = (generator.random(200) < 0.8).tolist()
    pairs = [each for each in alone for _ in range(2)]
    by_pair = clustered_interval(pairs, [number // 2 for number in range(400)])
    # Said twice, nothing is known better.
    assert by_pair == clustered_interval(alone, range(200))
    apart = clustered_interval(pairs, range(400))
    assert np.diff(by_pair) == pytest.approx(2**0.5 * np.diff(apart), rel=0.05)
    # Trials of their own are those of the exact interval.
    low, high = binomial_interval(sum(alone), 200)
    assert clustered_interval(alone, range(200)) == pytest.approx((low, high), abs=0.01)
    names = [("a machine", str(number // 2)) for number in range(400)]
    assert clustered_interval(pairs, names) == by_pair


def test_few_clusters_by_hand():
    # Three of one trial, one of them outside: 27 draws, of which 1 has none inside and 8 all three;
    # 8 of 27 is more than 5 %, 1 of 27 less, so that the least is one of three.
    low, high = clustered_interval([True, True, False], ["a", "b", "c"])
    assert high == 1
    assert low == pytest.approx(max(0, 2 / 3 - widening(3) / 3))
    # Clusters of unlike size: all of the larger are inside, none of the smaller.
    assert clustered_interval([True] * 9 + [False], ["a"] * 9 + ["b"]) == (0.0, 1.0)
    # Draws that are all alike say nothing: as many trials as clusters.
    assert clustered_interval([True] * 8, [1, 1, 2, 2, 3, 3, 4, 4]) == binomial_interval(4, 4)
    assert clustered_interval([False] * 8, [1, 1, 2, 2, 3, 3, 4, 4]) == binomial_interval(0, 4)
    assert clustered_interval([True] * 300, ["one"] * 300) == (0.0, 1.0)


def test_what_is_said_of_the_coverage():
    rows = [
        {
            "setting": f"lru:{setting}", "percentile": percentile, "device_bytes": setting,
            "predicted_ms": 1.0, "measured_ms": 1.0, "measured_spread": 0.01, "error": 0.0,
            "naive_bandwidth_error": 1.0, "naive_mean_error": 1.0, "inside": setting > 2,
        }
        for setting in range(20)
        for percentile in (50, 99)
    ]  # fmt: skip
    said = [finding.text for finding in summary(pd.DataFrame(rows))["findings"]]
    (text,) = [each for each in said if "stated 90 % interval" in each]
    alone, whole = (
        "{:.1%} to {:.1%}".format(*found)
        for found in (
            binomial_interval(34, 40),
            clustered_interval([n // 2 > 2 for n in range(40)], [n // 2 for n in range(40)]),
        )
    )
    assert text.startswith("34 of 40 measurements lie in their stated 90 % interval: 85.0% (")
    assert f"({alone} were each on its own, {whole} as percentiles of a setting go" in text
