"""Intervals hold what they promise: coverage on traffic whose truth is known, and the rules."""

from __future__ import annotations

import numpy as np
import pytest
from replay_tools import make_law, make_traffic

from moeprof.replay import intervals, reuse
from moeprof.replay.access import gather

NUM_EXPERTS = 16


def measured(step, request, experts, num_requests):
    """Returns used share, and lookups reused within 1 and 4 dispatches, with intervals."""
    found = gather(
        dispatch=step.astype(np.int32),
        request=request.astype(np.int32),
        expert=experts.astype(np.int32),
        num_experts=NUM_EXPERTS,
        num_requests=num_requests,
        lane=np.zeros(step.max() + 1, np.int32),
    )
    used, slots = found.slot_shares(np.ones(found.num_dispatches))
    backward, _ = reuse.reuse_distances(found, np.arange(found.num_dispatches))
    lookups = found.shares(np.ones(len(found.expert)))
    reused = [
        found.shares(((backward > 0) & (backward <= distance)).astype(float)) for distance in (1, 4)
    ]
    return intervals.share(
        np.stack([used, *reused], axis=1),
        np.stack([slots, lookups, lookups], axis=1),
        halves=intervals.alternate(np.zeros(num_requests, np.int64)),
    )


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_coverage_on_traffic_with_known_truth(batch):
    """The truth is the law's expectation: the mean over many independent traces of it."""
    law = make_law(np.random.default_rng(5), num_experts=NUM_EXPERTS)
    rng = np.random.default_rng(11)
    found = []
    for _ in range(200):
        step, request, experts = make_traffic(rng, law, num_requests=80, batch=batch)
        found.append(measured(step, request, experts, 80))
    truth = np.mean([each.value for each in found], axis=0)
    inside = np.mean([(each.low <= truth) & (truth <= each.high) for each in found], axis=0)
    # With one token per step the used share is k/E without any spread: nothing to cover.
    first = 1 if batch == 1 else 0
    assert (inside[first:] >= 0.80).all()
    assert (inside[first:] <= 0.995).all()
    assert inside[first:].mean() <= 0.99
    if batch == 1:
        assert truth[0] == pytest.approx(2 / NUM_EXPERTS)


def test_the_same_trace_gives_the_same_interval():
    rng = np.random.default_rng(0)
    top, bottom = rng.random(30), rng.random(30) + 1
    halves = intervals.alternate(np.zeros(30, np.int64))
    first = intervals.ratio(top, bottom, halves=halves)[0]
    assert intervals.ratio(top, bottom, halves=halves)[0] == first
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(top.sum() / bottom.sum())


def test_split_half_is_odd_against_even():
    top = np.array([1.0, 10, 2, 20, 3, 30])
    halves = intervals.alternate(np.zeros(6, np.int64))
    assert intervals.ratio(top, np.ones(6), halves=halves)[0].split_half == (2.0, 20.0)


def test_halves_alternate_within_each_label():
    assert intervals.alternate(np.array([0, 1, 0, 1, 0, 1])).tolist() == [0, 0, 1, 1, 0, 0]
    assert intervals.alternate(np.empty(0, np.int64)).tolist() == []


def test_no_interval_under_ten_requests():
    halves = intervals.alternate(np.zeros(30, np.int64))
    top = np.zeros(30)
    top[:9] = 1.0
    thin = intervals.ratio(top, top, halves=halves)[0]
    assert (thin.value, thin.low, thin.high) == (1.0, None, None)
    top[9] = 1.0
    assert intervals.ratio(top, top, halves=halves)[0].low == 1.0


def test_a_ratio_of_nothing_is_unknown():
    halves = intervals.alternate(np.zeros(12, np.int64))
    empty = intervals.ratio(np.zeros(12), np.zeros(12), halves=halves)[0]
    assert empty == intervals.Interval()


def test_comparisons_are_paired():
    """Two metrics that differ by a constant differ by exactly that constant on every draw."""
    rng = np.random.default_rng(1)
    top, bottom = rng.random(40), rng.random(40) + 1
    halves = intervals.alternate(np.zeros(40, np.int64))
    gap = intervals.difference((top + 0.25 * bottom, bottom), (top, bottom), halves=halves)[0]
    assert gap.low == pytest.approx(0.25)
    assert gap.high == pytest.approx(0.25)


def test_large_traces_draw_the_same_way():
    """Beyond the cached size the draws are made one by one, from the same seed."""
    num_requests = intervals._CACHED_REQUESTS + 1
    shares = np.random.default_rng(2).random((num_requests, 2))
    halves = intervals.alternate(np.zeros(num_requests, np.int64))
    found = intervals._resampled_sums(shares, halves)
    assert np.allclose(found[1:-2], intervals._weights(num_requests) @ shares)


def test_blocks_are_as_long_as_the_longest_request():
    assert intervals.block_index(99, 10) is None
    blocks = intervals.block_index(105, 10)
    assert blocks is not None
    assert blocks[0] == 0
    assert blocks[-1] == 9
    assert np.bincount(blocks).min() >= 10
    many = intervals.block_index(50_000, 1)
    assert many is not None
    assert many[-1] + 1 == intervals.MAX_BLOCKS


def test_block_draws_are_centred_on_the_trace():
    per_block = np.random.default_rng(3).poisson(5, (40, 16)).astype(float)
    rows = intervals.resampled_blocks(
        per_block,
        per_block.sum(axis=0),
        np.stack([per_block[::2].sum(axis=0), per_block[1::2].sum(axis=0)]),
        lambda sums: (sums.max(axis=1) / sums.mean(axis=1))[:, None],
    )
    assert rows.shape == (1 + intervals.NUM_DRAWS + 2, 1)
    assert rows[1:-2].mean() == pytest.approx(rows[0, 0])


def test_quantiles_of_weighted_values():
    values = np.arange(1.0, 101.0)
    halves = np.stack([values % 2, 1 - values % 2])
    rows = intervals.resampled_quantiles(
        values, (0.5, 0.95), blocks=intervals.block_index(100, 5), halves=halves
    )
    assert rows[0].tolist() == [50.0, 95.0]
    assert rows[-2].tolist() == [49.0, 95.0]
    assert rows[-1].tolist() == [50.0, 96.0]
    found = intervals.summarized(rows, num_requests=20)[0]
    assert found.low is not None
    assert found.low < 50 < found.high


def test_shares_stay_between_zero_and_one():
    top = np.linspace(0.2, 1.8, 20)
    halves = intervals.alternate(np.zeros(20, np.int64))
    assert intervals.share(top, np.ones(20), halves=halves)[0].high == 1.0
