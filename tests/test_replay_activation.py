"""Activation: idle experts, loads and evenness against brute force and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from replay_tools import make_law, make_tokens, make_traffic, mark_trained

from moeprof import replay
from moeprof.replay import chance, intervals, labels, usage
from moeprof.trace import schema
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace


def uniform_experts(rng, num_tokens, num_experts, top_k):
    return np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]


def test_chance_equals_simulation():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        experts = uniform_experts(rng, 60, 8, 2)
        counts = np.bincount(experts.ravel(), minlength=8)
        share = counts[counts > 0] / counts.sum()
        entropy = -(share * np.log(share)).sum() / math.log(8)
        found.append([entropy, counts.max() / counts.mean(), (counts == 0).mean()])
    entropy, largest, idle = np.mean(found, axis=0)
    assert chance.normalized_entropy(8, 2, 60) == pytest.approx(entropy, abs=0.001)
    assert chance.max_over_mean(8, 2, 60) == pytest.approx(largest, abs=0.03)
    assert chance.idle_share(2 / 8, np.float64(60)) == pytest.approx(idle, abs=1e-4)


def test_chance_at_the_edges():
    assert math.isnan(chance.normalized_entropy(1, 1, 5))
    assert math.isnan(chance.max_over_mean(4, 2, 0))
    assert chance.max_over_mean(4, 4, 10) == pytest.approx(1.0)
    assert chance.normalized_entropy(512, 8, 10_000_000) == pytest.approx(1.0, abs=1e-3)
    exact, normal = (chance.normalized_entropy(64, 2, n) for n in (2_000_000, 2_000_001))
    assert exact == pytest.approx(normal, abs=1e-7)


def test_idle_experts_by_hand(tmp_path):
    trace = hand_trace(
        tmp_path / "t.moeprof",
        [
            [
                HandToken(request=0, position=3, experts=[[0, 1]]),
                HandToken(request=1, position=3, experts=[[0, 2]]),
            ],
            [HandToken(request=0, position=4, experts=[[0, 1]])],
        ],
    )
    result = replay.activation(trace)
    row = result.table.iloc[0]
    assert row["num_dispatches"] == 2
    assert row["inactive_share"] == pytest.approx((5 / 8 + 6 / 8) / 2)
    assert row["uniform_inactive_share"] == pytest.approx((0.75**2 + 0.75) / 2)
    assert row["max_over_mean"] == pytest.approx(3 / (6 / 8))
    assert (row["hottest_expert"], row["hottest_share"]) == (0, 1.0)
    heat = result.tables["heat"]
    assert heat["expert_tokens"].tolist() == [
        [2, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert heat["num_tokens"].tolist() == [2, 1]


def test_uniform_routing_looks_uniform(tmp_path):
    trace = mark_trained(
        synthetic_trace(
            tmp_path / "t.moeprof",
            num_requests=40,
            skew=0.0,
            persistence=0.0,
            seed=7,
            num_experts=16,
            output_tokens=40,
        )
    )
    result = replay.activation(trace)
    for phase in ("prefill", "decode"):
        where = f"decoder/{phase}"
        idle = result.metric(f"activation/inactive_share/{where}")
        expected = result.metric(f"activation/uniform_inactive_share/{where}")
        assert idle.value == pytest.approx(expected.value, abs=0.02)
        assert idle.low <= expected.value <= idle.high
        entropy = result.metric(f"activation/usage_entropy/{where}").value
        expected = result.metric(f"activation/uniform_usage_entropy/{where}").value
        assert entropy == pytest.approx(expected, abs=0.003)
    assert "do not stand out" not in " ".join(f.text for f in result.findings)


def test_heat_maps_keep_every_token(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=60, batch=1, seed=8)
    result = replay.activation(trace)
    heat = result.tables["heat"]
    assert heat.groupby(["stack", "site", "phase"]).size().max() <= usage.MAX_HEAT_ROWS
    assert int(np.sum(heat["expert_tokens"].tolist())) == len(
        trace.routing(columns=["expert", "status"]).query("status == 0")
    )
    tokens_of = heat[heat["site"] == 0]["num_tokens"].sum()
    assert tokens_of == trace.steps["num_tokens"].sum()
    assert (heat["first_step"] <= heat["last_step"]).all()


def test_dropped_decisions_do_not_work(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, capacity_factor=0.5, seed=9)
    routed = trace.routing(columns=["status"])["status"]
    assert (routed == schema.SlotStatus.DROPPED).any()
    heat = replay.activation(trace).tables["heat"]
    assert int(np.sum(heat["expert_tokens"].tolist())) == int((routed == 0).sum())


def test_domains_that_share_experts_and_domains_that_do_not():
    rng = np.random.default_rng(1)
    same = make_law(rng, num_experts=16, num_labels=1)
    step, request, experts = make_traffic(rng, same, num_requests=40, batch=2)
    tokens = labelled(make_tokens(step, request, experts, num_experts=16))
    _, distances = labels.label_usage(tokens)
    pooled = distances[-1]
    assert pooled["site"] is None
    assert pooled["distance"] < labels._APART * pooled["chance_distance"]
    assert pooled["distance_low"] < pooled["distance"] < pooled["distance_high"]

    moved = (experts + 5 * (np.arange(40) % 2)[request][:, None]) % 16
    apart = labelled(make_tokens(step, request, moved, num_experts=16))
    counts, distances = labels.label_usage(apart)
    assert distances[-1]["distance"] > labels._APART * distances[-1]["chance_distance"]
    assert [row["label"] for row in counts] == ["even", "odd"]
    metrics, findings = labels.label_results("activation", distances, num_stacks=1)
    assert "different experts" in findings[0].text
    assert metrics[0].low is not None


def labelled(tokens):
    import dataclasses

    label = np.arange(len(tokens.requests)) % 2
    requests = dataclasses.replace(
        tokens.requests,
        label=label,
        labels=("even", "odd"),
        label_kind="domain",
        half=intervals.alternate(label),
    )
    return dataclasses.replace(tokens, requests=requests)


def test_one_request_per_domain_leaves_chance_unknown():
    tokens = labelled(make_tokens([0, 0, 1, 1], [0, 1, 0, 1], [[0], [1], [0], [1]], num_experts=4))
    _, distances = labels.label_usage(tokens)
    assert distances[-1]["distance"] == 1.0
    assert distances[-1]["chance_distance"] is None
    metrics, findings = labels.label_results("activation", distances, num_stacks=1)
    assert [metric.value for metric in metrics] == [1.0, None]
    assert findings == []


def test_disjoint_usage_is_all_to_move():
    counts = np.array([[4.0, 0, 0, 4], [0, 1, 1, 0]])
    assert labels._label_distance(counts.reshape(1, -1), shape=(2, 4))[0, 0] == 1.0
    assert labels._label_distance(np.ones((1, 8)), shape=(2, 4))[0, 0] == 0.0


def test_random_weights_conclude_nothing(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=20, seed=1)
    assert trace.info.model.random_weights
    for analyse in (replay.activation, replay.locality, replay.batching):
        (finding,) = analyse(trace).findings
        assert "routing means nothing" in finding.text


def test_experts_without_work_are_counted(tmp_path):
    steps = [
        [HandToken(request=r, position=p, experts=[[0, 1 + (p % 2)]]) for r in range(12)]
        for p in range(6)
    ]
    result = replay.activation(mark_trained(hand_trace(tmp_path / "t.moeprof", steps)))
    dead = result.tables["dead"].iloc[0]
    assert (dead["num_never_used"], dead["num_rarely_used"]) == (5, 5)
    assert any("nothing at all" in finding.text for finding in result.findings)
