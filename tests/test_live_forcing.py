"""Models driven with recorded routing: what is computed, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import recording_plain  # noqa: E402
import tiny_models  # noqa: E402
from forcing_tools import nllb_moe, reseeded, routing_for, with_weights  # noqa: E402

import moeprof  # noqa: E402
import moeprof.live  # noqa: E402
from moeprof.errors import CaptureError, UsageError  # noqa: E402
from moeprof.live import (  # noqa: E402
    RoutingShape,
    force_routing,
    read_routing,
    skewed_routing,
    uniform_routing,
)
from moeprof.live.paper_lm import PaperLm, PaperLmConfig  # noqa: E402
from moeprof.recording import sites as site_search  # noqa: E402
from moeprof.replay import agreement  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PAPER = PaperLmConfig(
    vocab_size=97,
    num_layers=4,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_experts=8,
    top_k=2,
    max_positions=32,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def odd_model():
    site_search.register(recording_plain.OddExperts, ids="which", weights="how_much")
    torch.manual_seed(0)
    yield recording_plain.OddModel()
    site_search._REGISTERED.pop(recording_plain.OddExperts)


def run(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- what is computed
def test_a_mixtral_block_computes_the_weighted_sum_of_the_forced_experts():
    model = tiny_models.mixtral()
    routing = routing_for(model, [8])
    block = model.model.layers[1].mlp
    hidden = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    with force_routing(model, routing, loop=True), torch.no_grad():
        out = block(hidden).reshape(8, 32)
    site = routing.stack().sites[1]
    experts, flat = block.experts, hidden.reshape(8, 32)
    for token in range(8):
        expected = torch.zeros(32)
        for expert, weight in zip(site.experts[token], site.weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ flat[token]).chunk(2)
            hidden_e = torch.nn.functional.silu(gate) * up
            expected += float(weight) * (experts.down_proj[expert] @ hidden_e)
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_the_paper_model_computes_with_forced_experts_though_it_sorts_rows_beforehand(kernel):
    model = PaperLm(dataclasses.replace(PAPER, expert_kernel=kernel), dtype=torch.float32)
    routing = routing_for(model, [8])
    moe = model.layers[3].moe
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
    with force_routing(model, routing, loop=True), torch.no_grad():
        out = moe(hidden).reshape(8, 16)
    site = routing.stack().sites[1]
    weights, flat = moe.experts, hidden.reshape(8, 16)
    for token in range(8):
        expected = torch.zeros(16)
        for expert, weight in zip(site.experts[token], site.weights[token], strict=True):
            inner = torch.relu(weights.w_in[expert] @ flat[token] + weights.b_in[expert])
            expected += float(weight) * (weights.w_out[expert] @ inner + weights.b_out[expert])
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


def test_the_paper_model_generates_under_forcing_and_is_recorded_as_forced(tmp_path):
    model = PaperLm(PAPER, dtype=torch.float32)
    routing = routing_for(model, [8, 2, 2])
    with (
        force_routing(model, routing) as forced,
        moeprof.record(model, tmp_path / "t.moeprof", probe_every=1),
    ):
        model.generate(IDS, max_new_tokens=3)
    trace = moeprof.open(tmp_path / "t.moeprof")
    assert forced.passes == {"decoder": 3}
    assert trace.info.capture.num_executed_checked == 6
    assert trace.info.capture.num_executed_disagreeing == 0
    again = read_routing(trace).stack()
    for read, given in zip(again.sites, routing.stack().sites, strict=True):
        assert (read.experts == given.experts).all()
        assert (read.weights == given.weights).all()


def test_a_registered_module_is_driven_empty_slots_too(odd_model):
    routing = routing_for_odd(seed=3)
    site = routing.stack().sites[1]
    site.experts[2, 1], site.weights[2, 1] = -1, 0.0
    out, seen = [], []

    def watch(module: Any, args: Any, output: Any) -> None:
        seen.append(args[1].clone())
        out.append((args[0], args[2], output))

    handle = odd_model.layers[1].experts.register_forward_hook(watch)
    with force_routing(odd_model, routing):
        run(odd_model)
    handle.remove()
    assert (seen[0].numpy() == site.experts).all()
    rows, weights, result = out[0]
    experts = odd_model.layers[1].experts
    for token in range(8):
        expected = torch.zeros(recording_plain.WIDTH)
        for expert, weight in zip(seen[0][token], weights[token], strict=True):
            if expert >= 0:
                inner = torch.relu(rows[token] @ experts.up[expert])
                expected += weight * (inner @ experts.down[expert])
        torch.testing.assert_close(result[token], expected, rtol=1e-4, atol=1e-5)


def routing_for_odd(tokens: tuple[int, ...] = (8,), seed: int = 0) -> Any:
    shape = RoutingShape(num_sites=3, num_experts=6, top_k=2, tokens=tokens)
    return with_weights(uniform_routing(shape, seed=seed), seed)


def test_layers_that_the_caller_runs_are_driven_pass_by_pass(odd_model):
    routing = routing_for_odd((8, 4))
    x = torch.randn(8, recording_plain.WIDTH)
    seen: list[torch.Tensor] = []
    for layer in odd_model.layers:
        layer.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].clone()))
    layers = list(odd_model.layers)
    with force_routing(layers, routing) as forced, torch.no_grad():
        for rows in (8, 4):
            for layer in layers:
                layer(x[:rows])
        with pytest.raises(UsageError, match="used up after 2 passes"):
            layers[0](x)
    assert forced.passes == {"decoder": 2}
    own = routing.stack()
    given = [
        own.sites[s].experts[own.starts[p] : own.starts[p + 1]] for p in (0, 1) for s in range(3)
    ]
    assert all((ids.numpy() == want).all() for ids, want in zip(seen, given, strict=True))


def test_a_last_layer_that_sees_one_token_of_each_row_is_driven(odd_model, tmp_path):
    odd_model.prune = True
    with moeprof.record(odd_model, tmp_path / "one.moeprof"):
        run(odd_model)
    one = moeprof.open(tmp_path / "one.moeprof")
    assert read_routing(one).stack().sites[2].num_rows.tolist() == [2]
    reseeded(odd_model, 5)
    with force_routing(odd_model, one), moeprof.record(odd_model, tmp_path / "two.moeprof"):
        run(odd_model)
    assert not len(agreement(one, moeprof.open(tmp_path / "two.moeprof")).tables["flips"])


def test_a_layer_that_sees_more_than_was_recorded_chooses_for_the_rest(odd_model, tmp_path):
    odd_model.prune = True
    with moeprof.record(odd_model, tmp_path / "one.moeprof"):
        run(odd_model)
    one = moeprof.open(tmp_path / "one.moeprof")
    odd_model.prune = False
    reseeded(odd_model, 5)
    seen: list[torch.Tensor] = []
    odd_model.layers[2].experts.register_forward_pre_hook(lambda m, a: seen.append(a[1].clone()))
    run(odd_model)
    with force_routing(odd_model, one) as forced:
        run(odd_model)
    recorded = read_routing(one).stack().sites[2]
    assert recorded.places.tolist() == [0, 1]
    assert (seen[1][[3, 7]].numpy() == recorded.experts).all()
    assert seen[1].shape == seen[0].shape == (8, 2)
    assert "decoder layer 2 was recorded for 2 of 8 tokens" in str(forced.source)


def test_rows_left_out_of_the_recording_keep_the_models_own_choice(tmp_path):
    model = tiny_models.olmoe()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    with moeprof.record(model, tmp_path / "t.moeprof"), torch.no_grad():
        model(input_ids=IDS, attention_mask=mask)
    reseeded(model, 3)
    seen: list[Any] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(
        lambda m, args: seen.append((args[1].clone(), args[2].clone()))
    )
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=mask)
        with force_routing(model, moeprof.open(tmp_path / "t.moeprof")):
            model(input_ids=IDS, attention_mask=mask)
    handle.remove()
    (own, own_weights), (forced, weights) = seen[0], seen[1]
    assert torch.equal(own[:2], forced[:2])
    assert torch.equal(own_weights[:2], weights[:2])
    recorded = read_routing(moeprof.open(tmp_path / "t.moeprof")).stack().sites[0]
    assert (forced[2:].numpy() == recorded.experts).all()
    assert (own[2:] != forced[2:]).any()


def test_the_zoo_drives_a_random_model_of_its_geometry(tmp_path):
    from moeprof import zoo

    loaded = zoo.load("zoo:lm", device="cpu")
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with moeprof.record(loaded.model, tmp_path / "one.moeprof"):
        loaded.model.generate(input_ids=ids, **options)
    one = moeprof.open(tmp_path / "one.moeprof")
    other = reseeded(loaded.model, 1)
    with force_routing(other, one), moeprof.record(other, tmp_path / "two.moeprof"):
        other.generate(input_ids=ids, **options)
    two = moeprof.open(tmp_path / "two.moeprof")
    assert not len(agreement(one, two).tables["flips"])
    columns = ["step", "site", "row", "slot", "expert", "status"]
    assert one.routing(columns=columns).equals(two.routing(columns=columns))


def test_the_zoo_translates_under_forcing_encoder_and_decoder(tmp_path):
    from moeprof import zoo

    model = zoo.load("zoo:mt", device="cpu").model
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "num_beams": 1,
    }
    with moeprof.record(model, tmp_path / "one.moeprof"):
        model.generate(input_ids=ids, **options)
    one = moeprof.open(tmp_path / "one.moeprof")
    reseeded(model, 1)
    with force_routing(model, one) as forced, moeprof.record(model, tmp_path / "two.moeprof"):
        model.generate(input_ids=ids, **options)
    assert forced.passes == {"encoder": 1, "decoder": 3}
    assert not len(agreement(one, moeprof.open(tmp_path / "two.moeprof")).tables["flips"])


def test_one_stack_of_two_may_be_driven(tmp_path):
    model = nllb_moe()
    routing = routing_for(model, [2, 2])
    with force_routing(model, routing) as forced, torch.no_grad():
        model.generate(input_ids=IDS, max_new_tokens=2, min_new_tokens=2, num_beams=1)
    assert forced.passes == {"decoder": 2}
    assert "the encoder makes its own choice" in str(forced.source)


def test_the_readme_drives_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inputs = {"input_ids": IDS, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with moeprof.record(tiny_models.mixtral(), "run.moeprof") as recorder:
        recorder.model.generate(**inputs)
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("**Drive a model with recorded routing.**")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    model = reseeded(tiny_models.mixtral(), 2)
    exec(code, {"moeprof": moeprof, "model": model, "inputs": inputs})
    assert "recorded routing run.moeprof" in capsys.readouterr().out
    prose = section.split("```")[2].split("\n## ")[0].split("\n**")[0]
    calls = re.findall(r"`(\w+)(\([^`]*\))?`", prose)
    names = {name for name, _ in calls}
    assert names <= set(moeprof.live.__all__)
    for name, arguments in calls:
        if arguments and "cuda" not in arguments:
            trace = moeprof.open("run.moeprof")
            assert eval(f"live.{name}{arguments}", {"live": moeprof.live, "trace": trace})


# ---------------------------------------------------------------- passes and rows
def test_passes_follow_each_other_and_end(tmp_path):
    model = tiny_models.mixtral()
    routing = routing_for(model, [8, 8])
    with force_routing(model, routing) as forced:
        first, second = run(model), run(model)
        with pytest.raises(UsageError, match="used up after 2 passes") as refused:
            run(model)
        assert "loop=True" in refused.value.hint
        forced.seek(1)
        assert torch.equal(run(model), second)
        forced.seek(0, stack="decoder")
        assert torch.equal(run(model), first)
        with pytest.raises(UsageError, match="no pass 2"):
            forced.seek(2)
        with pytest.raises(UsageError, match="no stack 'encoder'"):
            forced.seek(0, stack="encoder")
    assert not torch.equal(first, second)
    with force_routing(model, routing, loop=True) as forced:
        assert all(torch.equal(run(model), want) for want in (first, second, first))
    assert "begun again" in str(forced.source)


def test_batches_of_another_size_are_refused_cropped_or_tiled():
    model = tiny_models.mixtral()
    routing = routing_for(model, [8])
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda m, args: seen.append(args[1].clone())
    )
    want = routing.stack().sites[0].experts
    wide, narrow = torch.cat([IDS, IDS], dim=1), IDS[:, :3]
    for ids in (wide, narrow):
        with force_routing(model, routing, loop=True) as forced:
            with pytest.raises(UsageError, match=f"8 tokens, and is called with {ids.numel()}"):
                run(model, ids)
            run(model)  # The pass that failed leaves nothing behind.
    with force_routing(model, routing, rows="crop", loop=True) as forced:
        with pytest.raises(UsageError, match="fewer than the 16 rows"):
            run(model, wide)
        seen.clear()
        run(model, narrow)
        assert (seen[0].numpy() == want[:6]).all()
    assert "first rows" in str(forced.source)
    with force_routing(model, routing, rows="tile", loop=True) as forced:
        seen.clear()
        run(model, wide)
        run(model, narrow)
        assert (seen[0].numpy() == np.concatenate([want, want])).all()
        assert (seen[1].numpy() == want[:6]).all()
    assert "repeated or cut" in str(forced.source)


# ---------------------------------------------------------------- geometry
def test_another_geometry_is_refused_with_the_way_out():
    model = tiny_models.mixtral()  # 3 sites of 8 experts, top-2

    def shape(**changes: int) -> Any:
        own = {"num_sites": 3, "num_experts": 8, "top_k": 2, **changes}
        return skewed_routing(RoutingShape(**own, tokens=[8]))

    with pytest.raises(UsageError, match="4 MoE sites") as refused:
        force_routing(model, shape(num_sites=4))
    assert "sites=" in refused.value.hint
    with pytest.raises(UsageError, match="8 experts, the routing 16"):
        force_routing(model, shape(num_experts=16))
    with pytest.raises(UsageError, match="8 experts, the routing 16"):
        force_routing(model, shape(num_experts=16), experts="subset")
    with pytest.raises(UsageError, match="8 experts, the routing 4") as refused:
        force_routing(model, shape(num_experts=4))
    assert "experts='subset'" in refused.value.hint
    with pytest.raises(
        UsageError, match="routes to 2 experts per token, the routing to 3"
    ) as refused:
        force_routing(model, shape(top_k=3))
    assert "top_k='trace'" in refused.value.hint
    with pytest.raises(UsageError, match="for the encoder"):
        force_routing(
            model,
            skewed_routing(
                RoutingShape(num_sites=3, num_experts=8, top_k=2, tokens=[8], stack="encoder")
            ),
        )
    for option in ("rows", "top_k", "experts"):
        with pytest.raises(UsageError, match=f"unknown {option} 'no'"):
            force_routing(model, shape(), **{option: "no"})


def test_fewer_experts_and_other_slots_are_driven_where_asked_for():
    model = tiny_models.mixtral()
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda m, args: seen.append(args[1].clone())
    )
    routing = skewed_routing(RoutingShape(num_sites=3, num_experts=4, top_k=3, tokens=[8]))
    with force_routing(model, routing, top_k="trace", experts="subset") as forced:
        run(model)
    assert (seen[0].numpy() == routing.stack().sites[0].experts).all()
    assert "top-3 instead of the model's top-2" in str(forced.source)
    assert "the first 4 of 8 experts used" in str(forced.source)


def test_slots_without_an_expert_are_refused_where_they_cannot_stay_empty():
    for model in (tiny_models.mixtral(), PaperLm(PAPER, dtype=torch.float32)):
        routing = routing_for(model, [8])
        routing.stack().sites[1].experts[0, 1] = -1
        with pytest.raises(UsageError, match="cannot leave a slot empty"):
            force_routing(model, routing)


def test_a_dense_model_and_nothing_at_all_are_refused():
    routing = routing_for(tiny_models.mixtral(), [8])
    with pytest.raises(CaptureError, match="no Mixture-of-Experts layer"):
        force_routing(torch.nn.Linear(2, 2), routing)
    with (
        pytest.raises(CaptureError, match="no MoE layer was driven"),
        force_routing(tiny_models.mixtral(), routing),
    ):
        pass


# ---------------------------------------------------------------- leaving
def test_leaving_restores_the_model_bit_by_bit():
    model = tiny_models.mixtral()
    before, num_hooks = run(model), hooks_of(model)
    with force_routing(model, routing_for(model, [8])):
        assert not torch.equal(run(model), before)
    assert torch.equal(run(model), before)
    assert hooks_of(model) == num_hooks
    assert "generate" not in vars(model)


@pytest.mark.parametrize("model_name", ["mixtral", "paper"])
def test_an_exception_inside_restores_the_model_too(model_name):
    model = PaperLm(PAPER, dtype=torch.float32) if model_name == "paper" else tiny_models.mixtral()
    before, num_hooks = run(model), hooks_of(model)
    forced = force_routing(model, routing_for(model, [8]))
    with pytest.raises(ZeroDivisionError), forced:
        run(model)
        raise ZeroDivisionError
    assert torch.equal(run(model), before)
    assert hooks_of(model) == num_hooks
    with pytest.raises(UsageError, match="is called with 6"), forced:
        run(model, IDS[:, :3])
    assert torch.equal(run(model), before)
    assert hooks_of(model) == num_hooks
    with forced:  # Entered again, it begins at the first pass.
        assert not torch.equal(run(model), before)


def test_a_model_is_driven_by_one_routing_at_a_time():
    model = tiny_models.mixtral()
    routing = routing_for(model, [8, 8])
    with force_routing(model, routing):
        first = run(model)
        with (
            pytest.raises(UsageError, match="driven already, by skewed routing"),
            force_routing(model, routing),
        ):
            pass
        with (
            pytest.raises(UsageError, match="driven already"),
            force_routing(model.model, routing),
        ):
            pass
        run(model)
    with force_routing(model, routing):
        assert torch.equal(run(model), first)


def test_a_site_whose_hook_is_never_called_is_noticed():
    """As with kernels that replace a whole block: nothing would be forced there."""
    model = tiny_models.mixtral()
    block = model.model.layers[2].mlp
    block.forward = lambda hidden: hidden
    with (
        pytest.raises(CaptureError, match=r"layers\.2\.mlp ran in no way that can be driven"),
        force_routing(model, routing_for(model, [8])),
    ):
        run(model)


def test_experts_that_do_not_get_their_routers_ids_are_refused():
    model = PaperLm(PAPER, dtype=torch.float32)
    dispatch = model.layers[1].moe.dispatch
    moe = model.layers[1].moe

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        ids, weights = moe.gate(flat)
        ids = ids.flip(1)
        sent = dispatch(flat, ids)
        rows = moe.experts(sent.rows, ids, weights, sent.row_experts, sent.ends)
        return moe.combine(rows, sent.inverse, weights).view_as(hidden)

    moe.forward = forward
    with (
        pytest.raises(UsageError, match="very ids"),
        force_routing(model, routing_for(model, [8])),
    ):
        run(model)


def test_an_encoder_decoder_trace_drives_no_language_model(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=2, num_experts=8, stacks=("encoder", "decoder")
    )
    with pytest.raises(UsageError, match="routing is for the encoder"):
        force_routing(tiny_models.mixtral(), trace)
