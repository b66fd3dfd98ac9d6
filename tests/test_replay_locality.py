"""Temporal locality against slow counterparts and against laws with known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_tools import make_accesses, make_site, mark_trained, sets_of

from moeprof import replay
from moeprof.replay import reuse
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace


def value(result, name):
    return result.metric(name).value


def in_order(accesses):
    return np.arange(accesses.num_dispatches, dtype=np.int64)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_distances_and_windows_equal_the_obvious_loop(seed):
    rng = np.random.default_rng(seed)
    num_tokens = int(rng.integers(2, 60))
    ranks = np.sort(rng.integers(0, 2, num_tokens))
    found = make_accesses(
        rng.integers(0, 15, num_tokens), rng.integers(0, 4, num_tokens),
        rng.integers(0, 6, (num_tokens, 2)), num_experts=6, rank=ranks,
    )["decode"]  # fmt: skip
    sets, lanes = sets_of(found), found.lane.tolist()
    backward, forward = reuse.reuse_distances(found, in_order(found))
    at = found.lookup_dispatch()
    for lookup, (place, expert) in enumerate(zip(at, found.expert, strict=True)):
        mine = [p for p, lane in enumerate(lanes) if lane == lanes[place] and expert in sets[p]]
        earlier = [p for p in mine if p < place]
        later = [p for p in mine if p > place]
        assert backward[lookup] == (place - max(earlier) if earlier else 0)
        assert forward[lookup] == (min(later) - place if later else 0)

    windows = np.array([1, 2, 4])
    parts = reuse._shares_of_order(found, in_order(found), np.array([1, 2]), windows)
    for column, window in enumerate(windows):
        ends = [
            p for p in range(len(sets))
            if p >= window - 1 and lanes[p] == lanes[p - window + 1]
        ]  # fmt: skip
        union = [set().union(*sets[p - window + 1 : p + 1]) for p in ends]
        assert parts.resident[:, column].sum() == pytest.approx(sum(map(len, union)))
        assert parts.slots[:, column].sum() == pytest.approx(6 * len(ends))


def test_uniform_sets_overlap_by_chance():
    """Consecutive uniform sets of k of E share k/E: 0.25 for 2 of 8."""
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((6000, 8)), axis=1)[:, :2]
    found = make_accesses(np.arange(6000), np.arange(6000) // 100, experts, num_experts=8)
    part = reuse._site_locality(found["decode"], make_site(8, 2))
    recorded = part.reused[:, 0].sum() / part.lookups.sum()
    assert recorded == pytest.approx(0.25, abs=0.01)
    assert part.shuffled[:, 0].sum() / part.lookups.sum() == pytest.approx(0.25, abs=0.01)
    assert part.uniform[:, 0].sum() / part.lookups.sum() == pytest.approx(0.25, abs=0.001)
    # Within d dispatches: 1-(1-k/E)^d.
    within = part.reused.sum(axis=0) / part.lookups.sum()
    assert within[:4] == pytest.approx(1 - 0.75 ** part.distances[:4], abs=0.015)


def test_a_cycle_comes_back_after_its_length():
    steps = np.arange(240)
    found = make_accesses(steps, steps // 24, steps[:, None] % 24, num_experts=24)["decode"]
    backward, _ = reuse.reuse_distances(found, in_order(found))
    assert set(backward[24:].tolist()) == {24}
    assert not backward[:24].any()


def test_persistence_is_found_and_lost_in_the_shuffled_control(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=30, batch=1, persistence=0.7, skew=0.0, seed=1,
        num_experts=16, top_k=2, output_tokens=40, num_sites=2,
    )  # fmt: skip
    result = replay.locality(trace)
    overlap = result.metric("locality/overlap_share/decoder/decode")
    # A token keeps its set with 0.7; else it shares k/E of it. Requests that change break it.
    expected = 0.7 + 0.3 * 2 / 16
    assert overlap.value == pytest.approx(expected, abs=0.04)
    assert overlap.low < overlap.value < overlap.high
    shuffled = value(result, "locality/shuffled_overlap_share/decoder/decode")
    uniform = value(result, "locality/uniform_overlap_share/decoder/decode")
    assert uniform == pytest.approx(2 / 16, abs=1e-3)  # the first step has none before it
    assert shuffled == pytest.approx(uniform, abs=0.02)
    excess = result.metric("locality/excess_overlap_share/decoder/decode")
    assert excess.value == pytest.approx(overlap.value - shuffled)
    assert excess.low > 0.4


def test_a_trace_without_persistence_equals_its_shuffled_self(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=40, batch=4, persistence=0.0, skew=1.0, seed=2,
        domains=("one",), num_sites=2, output_tokens=30,
    )  # fmt: skip
    result = replay.locality(trace)
    excess = result.metric("locality/excess_overlap_share/decoder/decode")
    assert excess.low < 0 < excess.high
    popular = value(result, "locality/shuffled_overlap_share/decoder/decode")
    assert popular > value(result, "locality/uniform_overlap_share/decoder/decode") + 0.02


def test_shuffling_keeps_sizes_and_lanes():
    rng = np.random.default_rng(3)
    size = rng.integers(1, 9, 300)
    step = np.repeat(np.arange(300), size)
    found = make_accesses(
        step, np.zeros(len(step), int), rng.integers(0, 8, (len(step), 1)), num_experts=8,
        rank=(step >= 150).astype(int),
    )["decode"]  # fmt: skip
    order = reuse._shuffled(found, rng)
    assert sorted(order.tolist()) == list(range(300))
    assert (found.lane[order] == found.lane).all()
    assert (found.num_tokens[order] == found.num_tokens).mean() > 0.9
    assert (order != np.arange(300)).mean() > 0.8


def test_shuffling_merges_rare_sizes():
    step = np.repeat(np.arange(12), np.arange(1, 13) ** 2)
    found = make_accesses(
        step, np.zeros(len(step), int), np.zeros((len(step), 1), int), num_experts=2
    )["decode"]
    order = reuse._shuffled(found, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(12))


def test_neighbouring_tokens_by_hand(tmp_path):
    trace = hand_trace(
        tmp_path / "t.moeprof",
        [
            [HandToken(request=0, position=0, experts=[[0, 1]])],
            [HandToken(request=0, position=1, experts=[[1, 2]])],
            [HandToken(request=0, position=2, experts=[[1, 2]])],
            [HandToken(request=0, position=4, experts=[[1, 2]])],  # not the next position
            [HandToken(request=1, position=0, experts=[[3, 4]])],
        ],
    )
    rows = replay.locality(trace).tables["tokens"].set_index("pair")["shared_share"]
    assert rows["next token"] == pytest.approx(3 / 4)
    assert rows["uniform"] == pytest.approx(2 / 8)
    # Pairs of request 0: (0,1), (0,2), (0,3) share 1 of 2, the other three share all.
    assert rows["same request"] == pytest.approx((3 * 0.5 + 3 * 1) / 6)


def test_median_distance_counts_first_uses_as_infinite():
    counts = np.zeros((1, reuse._COLD + 1))
    counts[0, [1, 3, reuse._COLD]] = 2, 2, 1
    assert reuse._median_of_counts(counts)[0, 0] == 3
    counts[0, reuse._COLD] = 10
    assert np.isnan(reuse._median_of_counts(counts)[0, 0])


def test_a_single_dispatch_has_no_locality(tmp_path):
    trace = hand_trace(
        tmp_path / "t.moeprof",
        [[HandToken(request=0, position=0, experts=[[0, 1]], phase="prefill")]],
    )
    result = replay.locality(trace)
    assert result.table.empty
    assert not [m for m in result.metrics if "overlap" in m.name]


def test_ranks_do_not_see_each_other(tmp_path):
    one = synthetic_trace(tmp_path / "a.moeprof", num_requests=24, num_ranks=2, seed=5)
    result = replay.locality(one)
    assert 0 < value(result, "locality/overlap_share/decoder/decode") < 1


def test_too_few_requests_get_a_verdict_instead_of_an_interval(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=6, seed=1)
    mark_trained(trace)
    result = replay.locality(trace)
    assert all(metric.low is None for metric in result.metrics)
    assert any("record about 4 more" in finding.text for finding in result.findings)
