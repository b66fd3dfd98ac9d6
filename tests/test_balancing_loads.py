"""Loads per device, their peaks and yardsticks, by hand and by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from moeprof.replay import loads, replanning


def test_balancedness_reduces_devices_first():
    assert loads.balancedness([[100, 200], [100, 200]]) == 0.75
    assert loads.balancedness([[100, 200], [200, 100]]) == 0.75
    assert loads.balancedness([[7, 7], [0, 0]]) == 1
    assert np.isnan(loads.balancedness([[0, 0]]))


def test_loads_by_hand():
    # Slots 0 1 | 2 0: expert 0 lies on both devices.
    where = loads.layout([0, 1, 2, 0], num_experts=3, num_devices=2)
    rows = np.array([[5, 1, 2]])
    assert loads.device_loads(rows, where, "even").tolist() == [[3.5, 4.5]]
    # Rows 0, 2, 4 of expert 0 go to its first replica, rows 1 and 3 to the second.
    assert loads.device_loads(rows, where, "round_robin").tolist() == [[4, 4]]
    assert loads.max_over_mean(np.array([[3.5, 4.5], [0, 0]]))[0] == 4.5 / 4
    assert np.isnan(loads.max_over_mean(np.array([[0, 0]]))[0])
    for rule in loads.REPLICA_RULES:
        assert loads.device_loads(rows[:0], where, rule).shape == (0, 2)


def test_round_robin_equals_dealing_rows_one_by_one():
    rng = np.random.default_rng(0)
    slots = np.r_[np.arange(6), rng.integers(0, 6, 6)]
    where = loads.layout(rng.permutation(slots), num_experts=6, num_devices=4)
    rows = rng.poisson(4, (20, 6))
    expected = np.zeros((20, 4))
    homes = where.homes()
    for dispatch, expert in np.ndindex(rows.shape):
        held = homes[expert][homes[expert] >= 0]
        for row in range(rows[dispatch, expert]):
            expected[dispatch, held[row % len(held)]] += 1
    assert (loads.device_loads(rows, where, "round_robin") == expected).all()


def test_expert_rows_count_every_routed_slot():
    expert = np.array([[0, 2], [1, -1], [2, 0], [-2, -2]])
    found = loads.expert_rows(np.array([0, 0, 1, 1]), expert, 2, 3)
    assert found.tolist() == [[1, 1, 1], [1, 0, 1]]


def test_bound_is_below_every_placement():
    rng = np.random.default_rng(1)
    rows = rng.poisson(rng.gamma(0.5, 5, (50, 8)))
    rows = rows[rows.sum(axis=1) > 0]
    floor = loads.bound(rows, num_devices=4)
    for _ in range(50):
        where = loads.layout(rng.permutation(8), num_experts=8, num_devices=4)
        assert (loads.max_over_mean(loads.device_loads(rows, where)) >= floor - 1e-12).all()
    shared = loads.bound(rows, num_devices=4, most_replicas=3)
    assert (shared <= floor).all()
    assert (shared >= 1).all()


def test_bound_by_hand():
    # 6 of 8 rows on one expert, 2 devices: it alone makes 6 of a mean of 4.
    assert loads.bound(np.array([[6, 1, 1, 0]]), num_devices=2).tolist() == [1.5]


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "devices"), [(32, 4, 64, 8), (16, 2, 3000, 4), (128, 8, 300, 8)]
)
def test_uniform_expectation_against_simulation(experts, top_k, tokens, devices):
    rng = np.random.default_rng(7)
    peaks = []
    for _ in range(300):
        order = rng.random((tokens, experts)).argpartition(top_k, axis=1)[:, :top_k]
        reached = np.bincount(order.ravel() * devices // experts, minlength=devices)
        peaks.append(reached.max() / reached.mean())
    expected = loads.uniform_max_over_mean(experts, top_k, tokens, devices)
    error = 4 * np.std(peaks) / np.sqrt(300)
    assert expected == pytest.approx(np.mean(peaks), abs=error + 0.003)


def test_uniform_expectation_at_its_ends():
    assert loads.uniform_max_over_mean(8, 2, 10, 1) == 1
    assert np.isnan(loads.uniform_max_over_mean(8, 2, 0, 4))
    # One token, one expert: all of it on one of 4 devices.
    assert loads.uniform_max_over_mean(8, 1, 1, 4) == 4
    assert loads.largest_normal(2) == pytest.approx(1 / np.sqrt(np.pi), abs=1e-6)


def test_destinations_by_hand():
    where = loads.layout([0, 1, 2, 3], num_experts=4, num_devices=4)
    expert = np.array([[0, 1], [0, 3], [2, -1], [-2, -2]])
    devices, nodes = loads.destinations(np.zeros(4), expert, where, devices_per_node=2)
    assert devices == pytest.approx(5 / 3)
    assert nodes == pytest.approx(4 / 3)
    # Expert 0 on both devices: its rows alternate, and start again with each dispatch.
    twice = loads.layout([0, 1, 0, 2], num_experts=3, num_devices=2)
    expert = np.array([[0, 1], [0, 1], [0, 1]])
    devices, _ = loads.destinations(np.array([0, 0, 1]), expert, twice, devices_per_node=1)
    assert devices == pytest.approx(4 / 3)


def test_moved_experts():
    before = loads.layout([0, 1, 2, 3], num_experts=4, num_devices=2)
    after = loads.layout([2, 3, 0, 1], num_experts=4, num_devices=2)
    assert replanning.moved_experts(before, before) == 0
    assert replanning.moved_experts(before, after) == 4
    assert replanning.moved_experts(before, after, relabelled=True) == 0
    half = loads.layout([0, 2, 1, 3], num_experts=4, num_devices=2)
    assert replanning.moved_experts(before, half) == 2
