"""Routing for live runs: read, made up, re-batched, brought to a device, and always named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import (  # noqa: E402
    RoutingShape,
    read_routing,
    rebatched_routing,
    routing_of,
    skewed_routing,
    staggered_routing,
    uniform_routing,
)
from moeprof.live.routing_controls import draw_experts  # noqa: E402
from moeprof.trace.foreign import import_trace  # noqa: E402
from moeprof.trace.reader import open_trace  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

DATA = Path(os.environ.get("MOEPROF_DATA", Path(__file__).parents[2] / "shared" / "data"))
QWEN = DATA / "bigmoeonedge-qwen3-30b-a3b" / "qwen.route.csv"


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("t") / "made.moeprof",
        num_requests=6,
        num_sites=3,
        num_experts=[8, 8, 12],
        top_k=[2, 3, 2],
        batch=2,
        output_tokens=5,
        seed=4,
    )


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("t") / "pruned.moeprof",
        num_requests=4,
        num_sites=2,
        num_experts=8,
        batch=2,
        prune_last_layer=True,
        weights=False,
        stacks=("encoder", "decoder"),
    )


# ---------------------------------------------------------------- reading
def test_what_is_read_are_the_dispatches_of_the_trace(trace, pruned):
    for each in (trace, pruned, open_trace("sample:mt")):
        routing = read_routing(each)
        weighted = each is not pruned
        order = {name: {} for name in routing.stacks}
        for name, stack in routing.stacks.items():
            order[name] = {int(step): index for index, step in enumerate(stack.steps)}
        seen = 0
        for dispatch in each.dispatches(weights=weighted):
            stack = routing.stacks[dispatch.stack]
            site = next(s for s in stack.sites if s.site == dispatch.site)
            index = order[dispatch.stack][dispatch.step]
            rows = slice(site.starts[index], site.starts[index + 1])
            assert (site.experts[rows] == dispatch.experts).all()
            if weighted:
                routed = dispatch.experts >= 0
                assert (site.weights[rows][routed] == dispatch.weights[routed]).all()
                assert not site.weights[rows][~routed].any()
            assert stack.phases[index] == dispatch.phase
            seen += len(dispatch.experts)
        assert seen == sum(
            len(site.experts) for stack in routing.stacks.values() for site in stack.sites
        )


def test_tokens_stand_where_they_stood_in_the_batch():
    """With padding: places are the recorded rows, and batches as large as they were."""
    sample = open_trace("sample:mt")
    routing = read_routing(sample, stacks=["encoder"]).stack()
    steps = sample.steps[sample.steps["stack"] == "encoder"].sort_values("step")
    assert (steps["num_padded_tokens"] > 0).any()
    site = routing.sites[0]
    assert (site.num_rows == steps["num_tokens"] + steps["num_padded_tokens"]).all()
    rows = sample.routing(stack="encoder", columns=["step", "row", "site", "slot"])
    rows = rows[(rows["site"] == site.site) & (rows["slot"] == 0)]
    assert (site.places == rows["row"]).all()


def test_weights_that_were_not_recorded_or_not_wanted_are_uniform(trace, pruned):
    routing = read_routing(pruned)
    for stack in routing.stacks.values():
        for site in stack.sites:
            assert (site.weights == 1 / site.top_k).all()
    assert "weights 1/slots each, as none were recorded" in str(routing.source)
    uniform = read_routing(trace, weights="uniform")
    assert (uniform.stack().sites[1].weights == np.float32(1 / 3)).all()
    assert "weights 1/slots each;" in str(uniform.source) + ";"
    assert "as none" not in str(uniform.source)
    assert "weights as recorded" in str(read_routing(trace).source)


def test_a_part_of_a_trace_is_taken_and_named(trace):
    whole = read_routing(trace)
    last = int(trace.steps["step"].max())
    some = read_routing(trace, sites=[2, 0], steps=slice(3, last), phase="decode")
    stack = some.stack()
    assert [site.site for site in stack.sites] == [2, 0]
    assert (stack.steps >= 3).all()
    assert set(stack.phases) == {"decode"}
    assert 0 < len(stack) < len(whole.stack())
    index = int(np.flatnonzero(whole.stack().steps == stack.steps[1])[0])
    for mine, site in zip(stack.sites, (2, 0), strict=True):
        other = whole.stack().sites[site]
        rows = slice(other.starts[index], other.starts[index + 1])
        assert (mine.experts[mine.starts[1] : mine.starts[2]] == other.experts[rows]).all()
    said = str(some.source)
    assert "sites 2, 0" in said
    assert f"{len(stack)} of {last + 1} steps" in said
    assert "decode passes only" in said


def test_the_source_names_the_trace_the_law_and_the_origin(trace):
    source = read_routing(trace, origin={"repository": "example/traces", "licence": "MIT"}).source
    said = str(source)
    assert said.startswith("synthetic routing made.moeprof (decoder: 3 sites of ")
    assert "8 experts top-2 or 8 experts top-3 or 12 experts top-2" in said
    assert "repository: example/traces" in said
    assert "6 requests" in said
    plain = json.loads(json.dumps(source.to_json()))
    assert plain["description"] == said
    assert plain["origin"]["licence"] == "MIT"
    assert plain["num_tokens"] == int(trace.steps["num_tokens"].sum())
    recorded = str(read_routing(open_trace("sample:lm")).source)
    assert recorded.startswith("recorded routing lm.moeprof")
    assert "model moeprof-zoo" in recorded or "model zoo:lm" in recorded
    assert "random weights" not in recorded
    assert "its routing means nothing" in str(read_routing(open_trace("sample:paper")).source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacks": ["encoder"]}, "no stack 'encoder'"),
        ({"sites": [7]}, "no site 7"),
        ({"weights": "best"}, "unknown weights"),
        ({"rank": 3}, "no rank 3"),
        ({"phase": "encode"}, "no step of the trace is left"),
    ],
)
def test_what_a_trace_does_not_have_is_refused(trace, options, message):
    with pytest.raises(UsageError, match=message):
        read_routing(trace, **options)


def test_ranks_are_not_mixed(tmp_path):
    two = synthetic_trace(tmp_path / "two.moeprof", num_requests=4, num_ranks=2, batch=2)
    with pytest.raises(UsageError, match="2 ranks recorded this trace"):
        read_routing(two)
    for rank in (0, 1):
        routing = read_routing(two, rank=rank)
        steps = two.steps[two.steps["rank"] == rank]
        assert len(routing.stack()) == len(steps)
        assert routing.source.num_tokens == int(steps["num_tokens"].sum())
        assert f"rank {rank}" in str(routing.source)


# ---------------------------------------------------------------- controls
def test_uniform_routing_draws_every_expert_equally_often():
    shape = RoutingShape(num_sites=2, num_experts=16, top_k=4, tokens=[4000])
    routing = uniform_routing(shape, seed=1)
    for site in routing.stack().sites:
        assert len(np.unique(site.experts, axis=1)[0]) == 4
        assert (np.diff(np.sort(site.experts, axis=1), axis=1) > 0).all()
        counts = np.bincount(site.experts.ravel(), minlength=16)
        assert np.abs(counts / 1000 - 1).max() < 0.15
        assert (site.weights == 0.25).all()
    again = uniform_routing(shape, seed=1)
    assert (again.stack().sites[1].experts == routing.stack().sites[1].experts).all()
    other = uniform_routing(shape, seed=2)
    assert (other.stack().sites[1].experts != routing.stack().sites[1].experts).any()
    assert "uniform routing over all experts" in str(routing.source)
    assert "seed 1" in str(routing.source)


def test_skewed_routing_follows_the_law_of_drawing_without_putting_back():
    """Exact probabilities of a small case: first p, second p_i * p_j / (1 - p_i)."""
    exponent, tokens = 1.2, 60_000
    p = np.arange(1, 5) ** -exponent
    p /= p.sum()
    drawn = draw_experts(np.log(p), tokens, 2, np.random.default_rng(0))
    pair = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).reshape(4, 4) / tokens
    expected = p[:, None] * p[None, :] / (1 - p[:, None])
    np.fill_diagonal(expected, 0)
    assert np.abs(pair - expected).max() < 4 * np.sqrt(0.25 / tokens)
    shape = RoutingShape(num_sites=3, num_experts=32, top_k=1, tokens=[20_000])
    routing = skewed_routing(shape, exponent=exponent, seed=3)
    law = np.arange(1, 33) ** -exponent
    law /= law.sum()
    orders = []
    for site in routing.stack().sites:
        share = np.bincount(site.experts.ravel(), minlength=32) / 20_000
        assert np.abs(np.sort(share)[::-1] - law).max() < 0.02
        orders.append(int(share.argmax()))
    assert len(set(orders)) > 1
    assert "by a Zipf law of exponent 1.2" in str(routing.source)


def test_a_control_takes_the_shape_of_what_it_is_held_against(pruned):
    own = read_routing(pruned)
    control = uniform_routing(pruned, seed=5)
    assert control.stacks.keys() == own.stacks.keys()
    for name, stack in own.stacks.items():
        mine = control.stacks[name]
        assert mine.phases == stack.phases
        for one, other in zip(mine.sites, stack.sites, strict=True):
            assert one.experts.shape == other.experts.shape
            assert (one.starts == other.starts).all()
            assert (one.places == other.places).all()
    assert "shape of pruned.moeprof" in str(control.source)


@pytest.mark.parametrize(
    "changes", [{"num_sites": 0}, {"tokens": []}, {"top_k": 9}, {"phases": ["decode"]}]
)
def test_shapes_that_cannot_be_drawn_are_refused(changes):
    with pytest.raises(UsageError):
        RoutingShape(**{"num_sites": 1, "num_experts": 8, "top_k": 2, "tokens": [1, 1], **changes})
    with pytest.raises(UsageError, match="exponent"):
        skewed_routing(RoutingShape(num_sites=1, num_experts=8, top_k=2, tokens=[1]), exponent=-1)


# ---------------------------------------------------------------- other batches
def test_a_recording_at_batch_1_drives_batch_4(tmp_path):
    single = synthetic_trace(
        tmp_path / "single.moeprof", num_requests=8, batch=1, output_tokens=6, length_spread=0.0
    )
    routing = rebatched_routing(single, max_batch=4, schedule="static")
    stack = routing.stack()
    decode = [
        n for n, phase in zip(stack.num_tokens, stack.phases, strict=True) if phase == "decode"
    ]
    assert set(decode) == {4}
    alone = read_routing(single)
    tokens = [
        sorted(np.concatenate([s.experts for s in each.stack().sites], axis=1).tolist())
        for each in (routing, alone)
    ]
    assert tokens[0] == tokens[1]
    said = str(routing.source)
    assert "single.moeprof" in said
    assert "re-batched from its requests: schedule=static, max_batch=4" in said


def test_one_request_is_staggered_over_a_batch(tmp_path):
    one = synthetic_trace(
        tmp_path / "one.moeprof",
        num_requests=1,
        batch=1,
        prompt_tokens=4,
        output_tokens=21,
        length_spread=0.0,
    )
    own = read_routing(one).stack()
    routing = staggered_routing(one, batch=4)
    stack = routing.stack()
    decode = [i for i, phase in enumerate(own.phases) if phase == "decode"]
    length = len(decode) // 4
    assert len(stack) == length
    assert set(stack.num_tokens) == {4}
    for step in range(length):
        for row in range(4):
            token = own.sites[1].starts[decode[row * length + step]]
            got = stack.sites[1].experts[stack.sites[1].starts[step] + row]
            assert (got == own.sites[1].experts[token]).all()
    assert f"each pass holds 4 decode tokens {length} apart" in str(routing.source)
    with pytest.raises(UsageError, match="do not fill"):
        staggered_routing(one, batch=100)


# ---------------------------------------------------------------- devices
@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def test_passes_on_a_device_are_the_dispatches(trace, device):
    routing = routing_of(trace, device=device)
    steps = sorted(trace.steps["step"])
    assert len(routing) == len(steps)
    passes = list(routing)
    for dispatch in trace.dispatches(weights=True):
        got = passes[steps.index(dispatch.step)][dispatch.site]
        k = dispatch.experts.shape[1]
        assert (got.expert_ids[:, :k].cpu().numpy() == dispatch.experts).all()
        assert (got.weights[:, :k].cpu().numpy() == dispatch.weights).all()
        assert (got.expert_ids[:, k:] == -1).all()
        assert not got.weights[:, k:].any()
        assert got.expert_ids.is_contiguous()
    assert routing.num_experts == (8, 8, 12)
    assert routing.num_bytes == routing.expert_ids.numel() * 12
    with pytest.raises(IndexError):
        routing[len(routing)]


def test_tokens_a_site_did_not_see_hold_no_expert(pruned):
    routing = routing_of(pruned, stack="decoder")
    host = read_routing(pruned).stack("decoder")
    assert host.sites[-1].tokens is not None
    seen = np.zeros(int(host.starts[-1]), bool)
    seen[host.sites[-1].tokens] = True
    ids = routing.expert_ids[-1].numpy()
    assert (ids[seen] >= 0).all()
    assert (ids[~seen] == -1).all()
    assert "decoder only" in str(routing.source)
    with pytest.raises(UsageError, match="name a stack"):
        routing_of(pruned)


def test_sites_may_be_chosen_and_repeated(trace):
    routing = routing_of(trace, sites=[0, 2, 0], ids_dtype=torch.int32, dtype=torch.bfloat16)
    assert routing.num_sites == 3
    assert torch.equal(routing.expert_ids[0], routing.expert_ids[2])
    assert routing.expert_ids.dtype == torch.int32
    assert routing.weights.dtype == torch.bfloat16
    assert "layers driven by sites 0, 2, 0" in str(routing.source)
    with pytest.raises(UsageError, match="no site 5"):
        routing_of(trace, sites=[5])


def test_buffers_stay_where_they_are_and_hold_nothing_stale(trace, device):
    routing = routing_of(trace, device=device)
    buffers = routing.buffers()
    addresses = [t.data_ptr() for site in range(3) for t in buffers.site(site)]
    largest = int(np.argmax(routing.num_tokens))
    smallest = int(np.argmin(routing.num_tokens))
    assert routing.num_tokens[smallest] < routing.num_tokens[largest] == routing.max_tokens
    for step in (largest, smallest, largest):
        rows = buffers.load(step)
        assert rows == routing.num_tokens[step]
        for site, dispatch in enumerate(routing[step]):
            ids, weights = buffers.site(site)
            assert torch.equal(ids[:rows], dispatch.expert_ids)
            assert torch.equal(weights[:rows], dispatch.weights)
            assert (ids[rows:] == -1).all()
            assert not weights[rows:].any()
    assert addresses == [t.data_ptr() for site in range(3) for t in buffers.site(site)]
    with pytest.raises(UsageError, match="the buffers hold 1"):
        routing.buffers(1).load(largest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_captured_graph_reads_what_was_loaded_and_nothing_waits(trace):
    routing = routing_of(trace, device="cuda")
    buffers = routing.buffers()
    out = torch.zeros_like(buffers.site(1).expert_ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(buffers.site(1).expert_ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = []
        for step in range(len(routing)):
            buffers.load(step)
            graph.replay()
            results.append(out.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, result in enumerate(results):
        rows = routing.num_tokens[step]
        assert torch.equal(result[:rows], routing[step][1].expert_ids)
        assert (result[rows:] == -1).all()


# ---------------------------------------------------------------- a real run
@pytest.mark.skipif(
    not QWEN.is_file(), reason="set MOEPROF_DATA to the folder that holds the device log"
)
def test_the_real_qwen_run_drives_48_layers(tmp_path):
    trace = import_trace(QWEN, tmp_path / "qwen.moeprof", source_format="bigmoeonedge")
    routing = read_routing(
        trace, origin={"repository": "Helldez/BigMoeOnEdge", "licence": "Apache-2.0"}
    )
    device_routing = routing_of(routing)
    assert device_routing.expert_ids.shape == (48, 156, 6)
    assert device_routing.num_tokens == (28, *[1] * 128)
    assert set(device_routing.num_experts) == {128}
    said = str(routing.source)
    assert "decoder: 48 sites of 128 experts top-6" in said
    assert "Qwen3-30B-A3B" in said
    assert "weights as recorded" in said
    assert "1 request, 129 steps, 156 tokens" in said
    assert "licence: Apache-2.0" in said
    batch = staggered_routing(routing, batch=8)
    assert routing_of(batch).num_tokens == (8,) * 16
