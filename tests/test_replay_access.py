"""Dispatches as sets: counts and shares equal to what a slow, obvious loop finds."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_tools import make_accesses, make_site, make_tokens, sets_of

from moeprof.replay import access, tokens
from moeprof.replay.tokens import NOT_ROUTED, NOT_SEEN
from moeprof.trace.synthetic import synthetic_trace


@st.composite
def traffic(draw):
    num_tokens = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    step, request = rng.integers(0, 6, num_tokens), rng.integers(0, 5, num_tokens)
    experts = np.stack([rng.permutation(7)[:3] for _ in range(num_tokens)])
    experts[rng.random(experts.shape) < 0.2] = NOT_ROUTED
    experts[rng.random(num_tokens) < 0.2] = NOT_SEEN
    return step, request, experts


@given(traffic())
@settings(max_examples=60, deadline=None)
def test_dispatches_equal_the_obvious_loop(given_traffic):
    step, request, experts = given_traffic
    wanted = collections.defaultdict(lambda: collections.defaultdict(list))
    present = collections.defaultdict(set)
    count = collections.Counter()
    for s, r, row in zip(step, request, experts, strict=True):
        if row[0] == NOT_SEEN:
            continue
        count[s] += 1
        present[s].add(r)
        for expert in row[row >= 0]:
            wanted[s][expert].append(r)
    found = make_accesses(step, request, experts, num_experts=7, num_requests=5)
    if not count:
        assert found == {}
        return
    one = found["decode"]
    steps = sorted(count)
    assert one.num_tokens.tolist() == [count[s] for s in steps]
    assert one.num_causes.tolist() == [len(present[s]) for s in steps]
    assert sets_of(one) == [set(wanted[s]) for s in steps]
    shares = np.zeros(5)
    dispatch_shares = np.zeros(5)
    for position, s in enumerate(steps):
        for r in present[s]:
            dispatch_shares[r] += 1 / len(present[s])
        for lookup in range(one.offset[position], one.offset[position + 1]):
            who = wanted[s][one.expert[lookup]]
            assert one.num_rows[lookup] == len(who)
            assert one.num_wanting[lookup] == len(set(who))
            for r in set(who):
                shares[r] += 1 / len(set(who))
    assert np.allclose(one.shares(np.ones(len(one.expert))), shares)
    assert np.allclose(one.dispatch_shares(np.ones(len(steps))), dispatch_shares)


def test_shares_keep_the_total():
    rng = np.random.default_rng(0)
    found = make_accesses(
        rng.integers(0, 50, 400), rng.integers(0, 12, 400), rng.integers(0, 16, (400, 2)),
        num_experts=16,
    )["decode"]  # fmt: skip
    units = rng.random(len(found.expert))
    assert found.shares(units).sum() == pytest.approx(units.sum())
    used, slots = found.slot_shares(np.ones(found.num_dispatches))
    assert used.sum() == len(found.expert)
    assert slots.sum() == 16 * found.num_dispatches


def test_phases_are_kept_apart():
    found = make_accesses(
        [0, 0, 1, 2], [0, 1, 0, 1], [[0], [1], [2], [3]], num_experts=4,
        phase=["prefill", "prefill", "decode", "decode"],
    )  # fmt: skip
    assert list(found) == ["prefill", "decode"]
    assert sets_of(found["prefill"]) == [{0, 1}]
    assert sets_of(found["decode"]) == [{2}, {3}]


def test_ranks_are_lanes_of_their_own():
    found = make_accesses(
        [0, 1, 0, 1], [0, 0, 0, 0], [[0], [1], [2], [3]], num_experts=4, rank=[0, 0, 1, 1]
    )["decode"]
    assert found.lane.tolist() == [0, 0, 1, 1]
    assert found.num_requests == 2
    assert sets_of(found) == [{0}, {1}, {2}, {3}]


def test_tokens_of_unknown_requests_are_left_out():
    found = make_tokens([0, 0], [0, 7], [[0], [1]], num_experts=4, num_requests=2)
    assert found.request.tolist() == [0]


def test_loading_reads_each_stack_once(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=6, seed=4, prune_last_layer=True)
    one = tokens.load(trace, "decoder")
    assert tokens.load(trace, "decoder") is one
    long = trace.routing(stack="decoder")
    assert len(one.dispatch) * one.sites[0].top_k * len(one.sites) == len(long)
    last = access.accesses(one, one.sites[-1])["prefill"]
    first = access.accesses(one, one.sites[0])["prefill"]
    assert last.num_tokens.sum() == 6
    assert first.num_tokens.sum() > 6
    assert [set(d.experts[d.experts >= 0].tolist()) for d in trace.dispatches(sites=[0])] == [
        set(one.expert[0][one.dispatch == index].ravel().tolist())
        for index in range(one.num_dispatches)
    ]


def test_labels_prefer_what_tells_requests_apart():
    table = make_requests(domain=["a", "b", "a"], language=["x", "x", "x"])
    assert tokens.requests_from_table(table, task="mt").label_kind == "domain"
    assert tokens.requests_from_table(table, task="mt").labels == ("a", "b")
    table = make_requests(domain=["a", "b", "a"], language=["x", "y", None])
    assert tokens.requests_from_table(table, task="mt").labels == ("", "x", "y")
    assert tokens.requests_from_table(table, task="lm").label_kind == "domain"


def make_requests(**columns):
    import pandas as pd

    return pd.DataFrame({"rank": 0, "request": range(3), **columns})


def test_a_site_is_found_by_its_place_in_the_stack():
    site = make_site(4, 1)
    found = make_tokens([0], [0], [[3]], num_experts=4)
    assert found.sites == (site,)
