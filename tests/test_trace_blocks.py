"""Streaming: whole steps, own arrays, the order of execution."""

from __future__ import annotations

import numpy as np
import pytest

from moeprof.trace import schema as spec
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.synthetic import synthetic_trace


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("moeprof.trace.encoding.ROUTING_GROUP_ROWS", (64, 64))
    trace = synthetic_trace(
        tmp_path_factory.mktemp("mt") / "mt.moeprof",
        num_requests=30,
        num_sites=3,
        num_experts=[8, 16, 8],
        top_k=[2, 3, 1],
        stacks=("encoder", "decoder"),
        mixed_steps=True,
        capacity_factor=1.0,
        prune_last_layer=True,
        num_sequences=2,
    )
    patch.undo()
    return trace


def test_blocks_hold_whole_steps_and_own_arrays(mt, monkeypatch):
    monkeypatch.setattr("moeprof.trace.blocks.BLOCK_SLOTS", 600)
    for stack in mt.stacks:
        slots = mt.info.num_slots(stack)
        blocks = list(mt.blocks(stack, weights=True))
        assert len(blocks) > 3
        seen = [set(block.step.tolist()) for block in blocks]
        assert sum(len(steps) for steps in seen) == len(set.union(*seen)), "a step was split"
        for block in blocks:
            assert block.expert.shape == block.status.shape == (len(block.step), slots)
            assert block.weight.dtype == np.float32
            for values in vars(block).values():
                if isinstance(values, np.ndarray):
                    assert values.flags.writeable
                    assert values.flags.c_contiguous
        frame = mt.routing(stack=stack)
        joined = np.concatenate([block.expert.ravel() for block in blocks])
        assert np.array_equal(joined, frame["expert"].to_numpy())
        joined = np.concatenate([block.weight.ravel() for block in blocks])
        assert np.array_equal(joined, frame["weight"].to_numpy())


def test_a_step_larger_than_a_row_group_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("moeprof.trace.encoding.ROUTING_GROUP_ROWS", (16, 16))
    monkeypatch.setattr("moeprof.trace.blocks.BLOCK_SLOTS", 64)
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=20, prompt_tokens=30)
    sizes = trace.steps.set_index("step")["num_tokens"]
    assert sizes.max() > 100
    for block in trace.blocks("decoder"):
        steps, counts = np.unique(block.step, return_counts=True)
        assert np.array_equal(counts, sizes.loc[steps].to_numpy())


def test_blocks_of_one_phase(mt):
    whole = list(mt.blocks("decoder"))
    for code, phase in enumerate(spec.TOKEN_PHASES):
        kept = [block.expert[block.phase == code] for block in whole]
        some = [block.expert for block in mt.blocks("decoder", phase=phase)]
        kept = np.concatenate(kept)
        assert np.array_equal(np.concatenate([kept[:0], *some]), kept)
    with pytest.raises(ValueError, match="no token phase 'mixed'"):
        next(mt.blocks("decoder", phase="mixed"))
    with pytest.raises(ValueError, match="no stack"):
        next(mt.blocks("tower"))


def test_dispatches_agree_with_the_long_table(mt, monkeypatch):
    monkeypatch.setattr("moeprof.trace.blocks.BLOCK_SLOTS", 2000)
    frame = mt.routing()
    phases = mt.steps.set_index("step")["phase"]
    seen = frame[~frame["status"].isin([SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT])]
    groups = dict(list(seen.groupby(["step", "site"])))
    dispatches = list(mt.dispatches(weights=True))
    assert [(each.step, each.site) for each in dispatches] == sorted(groups)
    for each in dispatches:
        rows = groups[each.step, each.site]
        site = next(site for site in mt.sites if site.site == each.site)
        experts = rows["expert"].where(rows["status"] == SlotStatus.ROUTED, -1)
        assert each.experts.dtype == np.int32
        assert np.array_equal(each.experts, experts.to_numpy().reshape(-1, site.top_k))
        assert np.array_equal(each.weights, rows["weight"].to_numpy().reshape(-1, site.top_k))
        first = rows[rows["slot"] == 0]
        assert np.array_equal(each.requests, first["request"])
        assert np.array_equal(each.positions, first["position"])
        assert [spec.TOKEN_PHASES[code] for code in each.token_phases] == list(first["phase"])
        assert (each.stack, each.layer, each.rank) == (site.stack, site.layer, 0)
        assert each.phase == phases[each.step]
    assert {each.phase for each in dispatches} == {"encode", "prefill", "decode", "mixed"}


def test_dispatches_of_some_sites(mt):
    whole = [(d.step, d.site) for d in mt.dispatches()]
    some = [(d.step, d.site) for d in mt.dispatches(sites={1, 4})]
    assert some == [pair for pair in whole if pair[1] in {1, 4}]
    decoder = [(d.step, d.site) for d in mt.dispatches(stack="decoder", sites=[4])]
    assert decoder == [pair for pair in whole if pair[1] == 4]
    assert all(d.weights is None for d in mt.dispatches(sites=[0]))
    assert not list(mt.dispatches(sites=[]))


def test_dispatches_by_hand(tmp_path):
    pruned = SlotStatus.PRUNED_LAST_LAYER
    dropped, unused = SlotStatus.DROPPED, SlotStatus.UNUSED
    trace = hand_trace(
        tmp_path / "a.moeprof",
        [
            [
                HandToken(
                    request=4,
                    position=0,
                    phase="prefill",
                    experts=[[0, 1], [-1]],
                    status=[[0, 0], [pruned]],
                ),
                HandToken(
                    request=4,
                    position=1,
                    phase="prefill",
                    experts=[[2, -1], [5]],
                    status=[[0, unused], [0]],
                ),
            ],
            [
                HandToken(request=4, position=2, experts=[[3, 0], [7]], status=[[0, dropped], [0]]),
                HandToken(request=9, position=0, experts=[[1, 2], [6]], phase="prefill"),
            ],
        ],
    )
    found = [(d.step, d.site, d.phase, d.experts.tolist()) for d in trace.dispatches()]
    assert found == [
        (0, 0, "prefill", [[0, 1], [2, -1]]),
        (0, 1, "prefill", [[5]]),
        (1, 0, "mixed", [[3, -1], [1, 2]]),
        (1, 1, "mixed", [[7], [6]]),
    ]
    last = list(trace.dispatches())[1]
    assert (last.requests.tolist(), last.positions.tolist()) == ([4], [1])


def test_streaming_is_fast_enough(tmp_path):
    """A loose bound; `analysis/bench` measures. Guards against per-row Python objects."""
    import time

    trace = synthetic_trace(
        tmp_path / "a.moeprof",
        num_requests=120,
        num_sites=16,
        num_experts=64,
        top_k=8,
        prompt_tokens=60,
        output_tokens=40,
        executed=False,
        timed=False,
    )
    next(trace.blocks("decoder"))
    start_s = time.process_time()
    decisions = sum(block.expert.size for block in trace.blocks("decoder"))
    elapsed_s = time.process_time() - start_s
    assert decisions > 1_000_000
    assert decisions / elapsed_s > 10e6
