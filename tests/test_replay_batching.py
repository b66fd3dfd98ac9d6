"""Distinct experts against batch size: the uniform formula, and how batches are made."""

from __future__ import annotations

import numpy as np
import pytest
from replay_tools import make_tokens, mark_trained

from moeprof import replay
from moeprof.replay import working_set
from moeprof.trace.synthetic import synthetic_trace


def test_the_uniform_formula():
    assert working_set.uniform_distinct(64, 8, 1) == pytest.approx(8)
    assert working_set.uniform_distinct(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    sizes = np.array([1.0, 1e6])
    assert working_set.uniform_distinct(128, 2, sizes) == pytest.approx([2, 128])


def test_uniform_traffic_lies_on_the_formula(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=80, skew=0.0, persistence=0.0, seed=3,
        num_experts=32, output_tokens=30,
    )  # fmt: skip
    curve = replay.batching(trace).tables["curve"]
    assert set(curve["phase"]) == {"prefill", "decode"}
    assert (curve["distinct_share"] - curve["uniform_share"]).abs().max() < 0.02
    assert (curve["popularity_share"] - curve["uniform_share"]).abs().max() < 0.01
    assert curve.loc[curve["num_tokens"] == 1, "distinct_share"].tolist() == [2 / 32, 2 / 32]


def test_persistent_prompts_need_fewer(tmp_path):
    trace = mark_trained(
        synthetic_trace(
            tmp_path / "t.moeprof",
            num_requests=60,
            skew=0.5,
            persistence=0.8,
            seed=4,
            num_experts=32,
            prompt_tokens=40,
        )
    )
    result = replay.batching(trace)
    curve = result.tables["curve"].set_index(["phase", "num_tokens"])
    assert (
        curve.loc[("prefill", 16), "distinct_share"]
        < 0.6 * curve.loc[("prefill", 16), "popularity_share"]
    )  # neighbours agree
    decode = curve.loc[("decode", 16)]
    assert decode["distinct_share"] == pytest.approx(decode["popularity_share"], abs=0.05)
    assert curve["distinct_share"].between(curve["distinct_share_low"],
                                           curve["distinct_share_high"]).all()  # fmt: skip
    assert {metric.figure_class for metric in result.metrics} == {"exact"}
    assert "A decode batch of" in result.findings[0].text


def test_a_decode_batch_holds_one_token_per_request():
    """Six requests of unequal length: groups of four, all at the same place behind the prompt."""
    lengths = np.array([5, 5, 3, 4, 5, 1])
    request = np.repeat(np.arange(6), lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    tokens = make_tokens(step, request, request[:, None] % 4, num_experts=4)
    order, place, row = working_set._lanes(tokens, "decode")
    chosen, group = working_set._groups(order, place, row, 4)
    assert len(chosen) % 4 == 0
    for number in np.unique(group):
        members = chosen[group == number]
        assert len(set(tokens.request[members])) == 4
        assert len(set(tokens.position[members])) == 1
    # Places 0, 1, 2, 3 have 6, 5, 5, 4 requests: one full group of four each.
    assert group.max() + 1 == 4


def test_prompt_batches_follow_the_prompt():
    request = np.repeat([0, 1], 8)
    tokens = make_tokens(
        np.zeros(16, int), request, np.arange(16)[:, None] % 4, num_experts=4, phase="prefill"
    )
    order, place, row = working_set._lanes(tokens, "prefill")
    chosen, group = working_set._groups(order, place, row, 4)
    assert chosen.tolist() == order.tolist()
    assert group.tolist() == np.repeat(np.arange(4), 4).tolist()


def test_sizes_beyond_the_limit_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(working_set, "MAX_TOKENS_PER_SIZE", 8)
    order = np.arange(64)
    chosen, group = working_set._groups(order, order, np.zeros(64, int), 2)
    assert group.max() + 1 == 4
    assert (chosen[0], chosen[-1]) == (0, 63)


def test_capacity_makes_it_an_estimate(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, capacity_factor=1.0, seed=5)
    result = replay.batching(trace)
    assert {metric.figure_class for metric in result.metrics} == {"estimate"}
    assert any("estimate" in note for note in result.notes)


def test_beams_count_once(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, num_sequences=3, seed=6)
    curve = replay.batching(trace).tables["curve"]
    assert curve.loc[curve["phase"] == "decode", "num_tokens"].max() == 8


def test_dispatches_that_ran_are_there_too(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=24, batch=8, seed=6)
    run = replay.batching(trace).tables["dispatches"]
    sites = len(trace.sites)
    assert run["num_dispatches"].sum() == len(trace.steps) * sites
    assert run["distinct_share"].between(0, 1).all()
