"""Cross-layer affinity against laws with known answers and an obvious counterpart."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_tools import make_site, make_tokens, mark_trained

from moeprof import replay
from moeprof.replay import affinity, layer_pairs
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace

ONCE = layer_pairs.MULTIPLES.index(1.0)


def two_sites(step, request, first, second, *, num_experts, **options):
    """Returns tokens that two sites see, in dispatches of ``step``."""
    first, second = np.asarray(first, np.int32), np.asarray(second, np.int32)
    order = np.lexsort((request, step, np.broadcast_to(options.get("rank", 0), len(step))))
    made = make_tokens(step, request, first, num_experts=num_experts[0], **options)
    top_k = first.shape[1]
    other = make_site(num_experts[1], second.shape[1], site=1, layer=1, first_slot=top_k)
    return dataclasses.replace(
        made,
        sites=(made.sites[0], other),
        expert=(made.expert[0], np.ascontiguousarray(second[order])),
    )


def batches(num_requests, num_tokens, batch):
    """Returns (step, request) of requests that run ``batch`` at a time, to the end of each."""
    request = np.repeat(np.arange(num_requests), num_tokens)
    index = np.tile(np.arange(num_tokens), num_requests)
    return request // batch * num_tokens + index, request


def row_of(tokens):
    (row,) = affinity.layer_affinity(tokens, num_stacks=1).pairs
    return row


@pytest.mark.parametrize("batch", [1, 8])
def test_a_fixed_chain_is_known_entirely(batch):
    rng = np.random.default_rng(0)
    step, request = batches(40, 50, batch)
    first = rng.integers(0, 12, (len(step), 1))
    row = row_of(two_sites(step, request, first, rng.permutation(12)[first], num_experts=(12, 12)))
    assert row["token_share"] == 1.0
    assert row["information_share"] == pytest.approx(1.0)
    assert row["token_popular_share"] == pytest.approx(1 / 12, abs=0.03)
    assert row["token_uniform_share"] == pytest.approx(1 / 12)
    assert row["token_gain"] == pytest.approx(1 - row["token_popular_share"])
    # Broken links: nothing is left of it beyond popularity.
    assert row["token_shuffled_share"] == pytest.approx(1 / 12, abs=0.03)
    if batch == 1:
        assert row["dispatch_share"] == 1.0
        assert row["dispatch_num_fetched"] == 1
        assert row["dispatch_shuffled_share"] == pytest.approx(1 / 12, abs=0.03)


def test_a_fixed_chain_of_sets_is_known_with_more_than_one_expert():
    rng = np.random.default_rng(1)
    step, request = batches(40, 100, 4)
    first = np.argsort(rng.random((len(step), 16)), axis=1)[:, :3]
    chain = rng.permutation(16)
    row = row_of(two_sites(step, request, first, chain[first], num_experts=(16, 16)))
    assert row["token_share"] == pytest.approx(1.0, abs=0.01)
    # One of three experts names one of three: each pair tells little, the three together all.
    assert 0 < row["information_share"] < 0.6


@pytest.mark.parametrize("num_tokens", [10, 100])
def test_independent_layers_gain_nothing(num_tokens):
    """Popular experts alone are no affinity, and few tokens do not make one up."""
    rng = np.random.default_rng(2)
    step, request = batches(60, num_tokens, 4)
    weights = np.arange(1, 33.0) ** -1
    noise = np.log(weights) + rng.gumbel(size=(2, len(step), 32))
    first, second = np.argsort(-noise, axis=2)[:, :, :4]
    row = row_of(two_sites(step, request, first, second, num_experts=(32, 32)))
    assert row["token_popular_share"] > 0.3 > 2 * row["token_uniform_share"]
    for level in ("token", "dispatch"):
        assert row[f"{level}_gain"] == pytest.approx(0.0, abs=0.02)
        assert row[f"{level}_gain_low"] <= 0.005
        assert row[f"{level}_shuffled_share"] == pytest.approx(
            row[f"{level}_popular_share"], abs=0.02
        )
    # Plug-in mutual information would read 8 % of the entropy at 600 tokens.
    assert abs(row["information_share"]) < 0.01


def test_dispatches_that_agree_are_no_affinity_of_tokens():
    """Experts that depend on the step only: the shuffled control tells as much as the trace."""
    rng = np.random.default_rng(3)
    step, request = batches(40, 50, 8)
    first = (rng.integers(0, 16, step.max() + 1)[step])[:, None]
    row = row_of(two_sites(step, request, first, (first + 3) % 16, num_experts=(16, 16)))
    assert row["token_share"] == row["token_shuffled_share"] == 1.0
    # Nothing is left that a token could tell beyond its step.
    assert row["information_share"] is None


@pytest.mark.parametrize("num_experts", [(1, 1), (1, 4), (4, 1)])
def test_a_single_expert_tells_nothing(num_experts):
    rng = np.random.default_rng(7)
    step, request = batches(24, 20, 2)
    first, second = (rng.integers(0, count, (len(step), 1)) for count in num_experts)
    row = row_of(two_sites(step, request, first, second, num_experts=num_experts))
    assert row["token_gain"] == pytest.approx(0.0, abs=0.05)
    if num_experts[1] == 1:
        assert row["token_share"] == row["token_uniform_share"] == 1.0
        assert row["information_share"] is None
    else:
        assert row["information_share"] == pytest.approx(0.0, abs=1e-9)


def test_probabilities_by_hand():
    """Two experts, four tokens each: 4 and 0 of 4 go to expert 0, against 4 of 8 at large."""
    first = np.repeat([0, 1], 4)[:, None].astype(np.int32)
    assert layer_pairs.conditional(first, first, (2, 2)).tolist() == [[1, 0], [0, 1]]
    # 3 of 4 and 1 of 4: squares 4 x (1 - 4/4) = 0 beyond what chance gives, so popularity alone.
    second = np.array([0, 0, 0, 1, 0, 1, 1, 1])[:, None].astype(np.int32)
    assert layer_pairs.conditional(first, second, (2, 2)).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    # 10 tokens each, 9 and 1: (4 x 16 - 4 x 2.5) / (4 x 10 x 9 x 0.25) = 0.6; prior of 2/3 tokens.
    first = np.repeat([0, 1], 10)[:, None].astype(np.int32)
    second = np.r_[np.zeros(9), 1, 0, np.ones(9)][:, None].astype(np.int32)
    found = layer_pairs.conditional(first, second, (3, 2))
    assert found[0, 0] == pytest.approx((9 + 1 / 3) / (10 + 2 / 3))
    # Never seen: popularity.
    assert found[2].tolist() == [0.5, 0.5]


def test_tokens_get_the_experts_of_others():
    dispatch = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5], np.int32)
    partner = layer_pairs.exchanged(dispatch, np.array([0] * 6 + [0, 0, 1], np.int32))
    assert sorted(partner.tolist()) == list(range(9))
    assert partner[:2].tolist() == [1, 0]
    assert set(partner[3:6].tolist()) == {3, 4, 5}
    assert (partner[3:6] != np.arange(3, 6)).all()
    # Alone in their dispatch: 2, 6 and 7 trade; 8 is alone on its rank.
    assert set(partner[[2, 6, 7]].tolist()) == {2, 6, 7}
    assert partner[8] == 8


def test_nothing_is_judged_on_what_it_was_fitted_on():
    """The later half of each rank and domain judges; a rule that changes between is not known."""
    rng = np.random.default_rng(4)
    step, request = batches(40, 50, 1)
    first = rng.integers(0, 8, (len(step), 1))
    later = request >= 20
    second = np.where(later[:, None], 7 - first, first)
    tokens = two_sites(step, request, first, second, num_experts=(8, 8))
    assert layer_pairs.later_requests(tokens, "decode").tolist() == [False] * 20 + [True] * 20
    row = row_of(tokens)
    assert row["token_share"] == 0.0
    assert row["num_tokens"] == 20 * 50
    labels = dataclasses.replace(
        tokens.requests, label=np.arange(40) % 4, labels=("a", "b", "c", "d")
    )
    judged = layer_pairs.later_requests(dataclasses.replace(tokens, requests=labels), "decode")
    assert np.bincount(np.arange(40)[judged] % 4).tolist() == [5, 5, 5, 5]
    assert np.flatnonzero(judged).min() == 20


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_ranks_and_shares_equal_the_obvious_loop(seed):
    rng = np.random.default_rng(seed)
    num_tokens, num_requests = int(rng.integers(8, 60)), int(rng.integers(2, 8))
    request = np.r_[np.arange(num_requests), rng.integers(0, num_requests, num_tokens)]
    step = rng.integers(0, 8, len(request))
    first = np.argsort(rng.random((len(request), 5)), axis=1)[:, :2]
    second = np.argsort(rng.random((len(request), 7)), axis=1)[:, :3]
    first[rng.random(first.shape) < 0.2] = -1
    second[rng.random(second.shape) < 0.2] = -1
    tokens = two_sites(step, request, first, second, num_experts=(5, 7), num_requests=num_requests)
    judged = layer_pairs.later_requests(tokens, "decode")
    pair = layer_pairs.judged_pair(tokens, "decode", 0, judged)
    first, second = tokens.expert
    seen = [t for t in range(len(first)) if max(first[t]) >= 0 and max(second[t]) >= 0]
    fitted = [t for t in seen if not judged[tokens.request[t]]]
    if pair is None:
        assert not fitted or len(fitted) == len(seen)
        return
    popularity = np.array([(second[fitted] == each).sum() for each in range(7)])
    popular = sorted(range(7), key=lambda each: (-popularity[each], each))
    table = layer_pairs.conditional(first[fitted], second[fitted], (5, 7))
    needed = [len({e for t in fitted if tokens.dispatch[t] == d for e in second[t] if e >= 0})
              for d in sorted({tokens.dispatch[t] for t in fitted})]  # fmt: skip
    fetched = (3, int(np.median(needed)))
    hits, units = np.zeros((2, num_requests)), np.zeros((2, num_requests))
    popular_hits = np.zeros((2, num_requests))

    def best(score, count):
        order = sorted(popular, key=lambda each: -score[each])
        return set(order[:count])

    for dispatch in sorted({tokens.dispatch[t] for t in seen}):
        mine = [t for t in seen if tokens.dispatch[t] == dispatch]
        whole = np.zeros(7, np.float32)
        for t in mine:
            score = np.zeros(7, np.float32)
            for given_expert in first[t]:
                if given_expert >= 0:
                    score += table[given_expert]
            whole += score
            if judged[tokens.request[t]]:
                for expert in second[t][second[t] >= 0]:
                    units[0, tokens.request[t]] += 1
                    hits[0, tokens.request[t]] += expert in best(score, fetched[0])
                    popular_hits[0, tokens.request[t]] += expert in popular[: fetched[0]]
        for expert in {e for t in mine for e in second[t] if e >= 0}:
            who = {tokens.request[t] for t in mine if expert in second[t]}
            for each in who:
                if judged[each]:
                    units[1, each] += 1 / len(who)
                    hits[1, each] += (expert in best(whole, fetched[1])) / len(who)
                    popular_hits[1, each] += (expert in popular[: fetched[1]]) / len(who)
    assert pair.fetched[:, ONCE].tolist() == list(fetched)
    assert np.allclose(pair.units, units)
    assert np.allclose(pair.popular[:, :, ONCE], popular_hits)
    assert np.allclose(pair.hits[:, :, ONCE], hits)


def test_long_traces_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(layer_pairs, "MAX_TOKENS", 500)
    rng = np.random.default_rng(5)
    step, request = batches(40, 50, 4)
    first = rng.integers(0, 8, (len(step), 1))
    row = row_of(two_sites(step, request, first, first, num_experts=(8, 8)))
    assert row["num_tokens"] == 500
    assert row["token_share"] == 1.0


def test_the_report_of_a_trace(tmp_path):
    """Synthetic layers draw apart from each other, with different numbers of experts."""
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=48, num_sites=3, num_experts=[8, 16, 12],
        top_k=[1, 2, 3], batch=4, seed=1, persistence=0.0, domains=("one",), output_tokens=40,
    )  # fmt: skip
    mark_trained(trace)
    result = replay.locality(trace)
    table = result.tables["affinity"]
    assert set(zip(table["site"], table["next_site"], strict=True)) == {(0, 1), (1, 2)}
    assert set(table["phase"]) == {"prefill", "decode"}
    decode = table[table["phase"] == "decode"].set_index("site")
    assert decode.loc[0, "token_uniform_share"] == pytest.approx(2 / 16)
    assert decode.loc[1, "token_uniform_share"] == pytest.approx(3 / 12)
    assert (decode["token_gain"].abs() < 0.02).all()
    curve = result.tables["prefetch"]
    for _, own in curve.groupby("phase"):
        assert own["token_share"].is_monotonic_increasing
        assert own["dispatch_share"].iloc[-1] == own["token_share"].iloc[-1] == 1.0
    gain = result.metric("locality/prefetch_gain/decoder/decode")
    assert gain.low <= gain.value <= gain.high
    assert gain.split_half is not None
    (text,) = [each.text for each in result.findings if "the layer before" in each.text]
    assert text.startswith(("Do not prefetch", "Not enough evidence"))


def chained(path, num_requests, num_sites=2):
    """Writes requests whose next expert is always the same step further."""
    rng = np.random.default_rng(6)
    steps = []
    for request in range(num_requests):
        for position, first in enumerate(rng.integers(0, 8, 30).tolist()):
            experts = [[first], [(first + 1) % 8]][:num_sites]
            steps.append([HandToken(request=request, position=position, experts=experts)])
    return mark_trained(hand_trace(path, steps))


def test_verdicts(tmp_path):
    result = replay.locality(chained(tmp_path / "many.moeprof", 40))
    (text,) = [each.text for each in result.findings if "the layer before" in each.text]
    assert text.startswith("Try to prefetch by the layer before in decode")
    assert "fetching 1 expert finds" in text
    assert "100%" in text
    few = replay.locality(chained(tmp_path / "few.moeprof", 12))
    (text,) = [each.text for each in few.findings if "the layer before" in each.text]
    assert text.startswith("Not enough evidence to prefetch")
    assert few.metric("locality/affinity_gain/decoder/decode").low is None


def test_short_traces_have_none(tmp_path):
    for num_requests, num_sites in ((1, 2), (4, 1)):
        trace = chained(tmp_path / f"{num_requests}.moeprof", num_requests, num_sites)
        result = replay.locality(trace)
        assert result.tables["affinity"].empty
        assert result.tables["prefetch"].empty
        assert not [each for each in result.metrics if "affinity" in each.name]


def test_stacks_apart_and_slots_that_were_dropped(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=24, num_sites=2, seed=2,
        stacks=("encoder", "decoder"), capacity_factor=0.5, prune_last_layer=True, num_ranks=2,
    )  # fmt: skip
    table = replay.locality(trace).tables["affinity"]
    assert set(zip(table["stack"], table["site"], table["next_site"], strict=True)) == {
        ("encoder", 0, 1), ("decoder", 2, 3),
    }  # fmt: skip
    shares = table[["token_share", "dispatch_share"]]
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
