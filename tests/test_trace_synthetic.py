"""Synthetic traces follow the law they state."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moeprof.trace.schema import SlotStatus
from moeprof.trace.synthetic import synthetic_trace, synthetic_truth


def test_the_same_arguments_give_the_same_trace(tmp_path):
    options = {"num_requests": 9, "stacks": ("encoder", "decoder"), "num_sequences": 2}
    first = synthetic_trace(tmp_path / "a.moeprof", **options)
    second = synthetic_trace(tmp_path / "b.moeprof", **options)
    pd.testing.assert_frame_equal(first.routing(), second.routing())
    pd.testing.assert_frame_equal(first.layers, second.layers)
    other = synthetic_trace(tmp_path / "c.moeprof", seed=1, **options)
    assert not first.routing()["expert"].equals(other.routing()["expert"])


def test_popularity_and_persistence_are_the_stated_ones(tmp_path):
    trace = synthetic_trace(
        tmp_path / "a.moeprof",
        num_requests=400,
        num_sites=2,
        num_experts=8,
        top_k=1,
        skew=1.0,
        persistence=0.6,
        domains=("one", "two"),
    )
    truth = synthetic_truth(trace.info)
    assert truth.persistence == 0.6
    frame = trace.routing().merge(trace.requests[["request", "domain"]], on="request")
    for site in (0, 1):
        for index, domain in enumerate(truth.domains):
            rows = frame[(frame["site"] == site) & (frame["domain"] == domain)]
            share = np.bincount(rows["expert"], minlength=8) / len(rows)
            assert np.abs(share - truth.popularity[site][index]).max() < 0.04
    rows = frame[frame["site"] == 0].sort_values(["request", "position"])
    follows = rows["request"].to_numpy()[1:] == rows["request"].to_numpy()[:-1]
    kept = (np.diff(rows["expert"]) == 0)[follows].mean()
    again = np.mean([(p**2).sum() for p in truth.popularity[0]])
    assert kept == pytest.approx(0.6 + 0.4 * again, abs=0.02)


def test_no_skew_is_uniform(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=4, skew=0.0)
    for popularity in synthetic_truth(trace.info).popularity.values():
        assert np.allclose(popularity, 1 / 16)


def test_requests_start_and_end_within_the_batch(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=40, batch=5)
    assert set(trace.steps["phase"]) == {"prefill", "decode"}
    assert trace.steps["batch"].max() == 5
    frame = trace.table("routing/decoder")
    per_request = frame.groupby("request")
    requests = trace.requests.set_index("request")
    expected = requests["num_prompt_tokens"] + requests["num_output_tokens"] - 1
    assert np.array_equal(per_request.size(), expected)
    assert np.array_equal(per_request["position"].max(), expected - 1)
    assert (requests["end_s"] > requests["arrival_s"]).all()
    assert requests["num_output_tokens"].nunique() > 3


def test_capacity_drops_the_late_tokens(tmp_path):
    trace = synthetic_trace(
        tmp_path / "a.moeprof", num_requests=20, capacity_factor=0.5, num_sites=1, num_experts=4
    )
    frame = trace.routing()
    dropped = frame[frame["status"] == SlotStatus.DROPPED]
    assert 0.3 < len(dropped) / len(frame) < 0.7
    assert (dropped["weight"] == 0).all()
    assert trace.sites[0].capacity_rule.rule == "capacity_factor"


def test_sites_may_differ(tmp_path):
    trace = synthetic_trace(
        tmp_path / "a.moeprof",
        num_requests=3,
        num_sites=2,
        num_experts=[4, 12],
        top_k=[1, 4],
        expert_bytes=[10, 1000],
        layer_stride=3,
    )
    assert [(s.num_experts, s.top_k, s.first_slot, s.expert_bytes) for s in trace.sites] == [
        (4, 1, 0, 10),
        (12, 4, 1, 1000),
    ]
    assert [site.layer for site in trace.sites] == [2, 5]
    assert sorted(trace.layers["layer"].unique()) == [0, 1, 2, 3, 4, 5]
    dense = trace.layers[trace.layers["site"].isna()]
    assert set(dense["layer"]) == {0, 1, 3, 4}
    assert dense["dense_ffn_ms"].notna().all()


def test_it_says_that_it_is_made_up(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=1)
    assert trace.info.mode == "synthetic"
    assert trace.model.random_weights
    assert "made-up" in trace.info.notes[0]
