"""Another gating in a whole model: the same result, then the model as it was."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from forcing_tools import with_weights  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import MoeprofError, UsageError  # noqa: E402
from moeprof.live import (  # noqa: E402
    RoutingShape,
    apply_gating,
    buffer_experts,
    force_routing,
    skewed_routing,
)
from moeprof.live.kernels import KERNELS  # noqa: E402
from moeprof.live.paper_lm import PaperLm, PaperLmConfig  # noqa: E402
from moeprof.live.scoring_heads import ScoringHead  # noqa: E402
from moeprof.recording import sites as site_search  # noqa: E402
from moeprof.zoo import fix_nllb_dispatch  # noqa: E402

TINY = PaperLmConfig(
    vocab_size=128, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_experts=8, max_positions=64
)


def paper_lm():
    return PaperLm(TINY, dtype=torch.float64)


def nllb():
    model = tiny_models.nllb_moe()
    fix_nllb_dispatch(model)
    return model


BUILDERS = {
    "mixtral": tiny_models.mixtral,
    "qwen3_moe": tiny_models.qwen3_moe,
    "deepseek_v3": tiny_models.deepseek_v3,
    "switch": tiny_models.switch,
    "nllb_moe": nllb,
    "paper_lm": paper_lm,
}


def logits(model, ids):
    with torch.no_grad():
        if isinstance(model, PaperLm):
            return model(ids)
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids).logits
        return model(input_ids=ids).logits


def tokens(rows=2, length=7):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUILDERS)
def test_every_gating_gives_the_same_result(name):
    model, ids = BUILDERS[name](), tokens()
    before = logits(model, ids)
    for gating in KERNELS:
        with apply_gating(model, gating) as applied:
            out = logits(model, ids)
            assert applied.num_sites >= 1
        assert torch.allclose(out, before, rtol=1e-3, atol=1e-4), gating
        assert torch.equal(logits(model, ids), before), gating


@pytest.mark.filterwarnings("ignore")
def test_the_kernel_is_what_runs(monkeypatch):
    model, ids = tiny_models.qwen3_moe(), tokens()
    ran = []

    def kernel(hidden, ids, weights, experts, *, capacity=None):
        ran.append((tuple(ids.shape), capacity))
        return torch.zeros_like(hidden)

    monkeypatch.setitem(KERNELS, "static_index", kernel)
    before = logits(model, ids)
    with apply_gating(model, "static_index", token_fraction=0.25):
        assert not torch.allclose(logits(model, ids), before)
    # 14 tokens: ceil(0.25 x 14) slots.
    assert set(ran) == {((14, 2), 4)}


@pytest.mark.filterwarnings("ignore")
def test_a_recording_sees_the_same_routing(tmp_path):
    model, ids = tiny_models.mixtral(), tokens()
    with moeprof.record(model, tmp_path / "own.moeprof", mode="forward"):
        logits(model, ids)
    path = tmp_path / "applied.moeprof"
    with apply_gating(model, "dynamic_loop"), moeprof.record(model, path, mode="forward"):
        logits(model, ids)
    own, applied = (
        moeprof.open(tmp_path / f"{name}.moeprof").routing() for name in ("own", "applied")
    )
    assert own["expert"].equals(applied["expert"])


def mixtral_block():
    model = tiny_models.mixtral()
    return model, model.model.layers[0].mlp, torch.randn(2, 4, 32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gating", ["static_index", "static_mask"])
def test_a_static_gating_compiles_as_one_graph(gating):
    model, block, hidden = mixtral_block()
    torch.compiler.reset()
    with apply_gating(model, gating), torch.no_grad():
        expected = block(hidden)
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(hidden), expected, atol=1e-6)
        exported = torch.export.export(block, (hidden,)).module()
        assert torch.allclose(exported(hidden), expected, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_gating_refuses_a_backward_pass_too():
    model, block, hidden = mixtral_block()
    torch.compiler.reset()
    with apply_gating(model, "static_index"):
        expected = block(hidden)
        out = torch.compile(block, backend="eager")(hidden)
        assert torch.allclose(out, expected, atol=1e-6)
        with pytest.raises(MoeprofError, match="no gradients"):
            out.sum().backward()
    torch.compiler.reset()


class ShapedExperts(torch.nn.Module):
    """Takes its weights in any shape."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 32, 8) * 0.3)
        self.down_proj = torch.nn.Parameter(torch.randn(4, 8, 16) * 0.3)
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        weights = top_k_weights.reshape(top_k_index.shape)
        out = torch.zeros_like(hidden_states)
        for token, row in enumerate(hidden_states):
            for expert, weight in zip(top_k_index[token], weights[token], strict=True):
                gate, up = (self.gate_up_proj[expert] @ row).chunk(2)
                out[token] += weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return out


class ShapedModel(torch.nn.Module):
    class Block(torch.nn.Module):
        def __init__(self, shape, top_k):
            super().__init__()
            self.gate = torch.nn.Linear(8, 4)
            self.experts = ShapedExperts()
            self.shape, self.top_k = shape, top_k

        def forward(self, hidden):
            weights, ids = self.gate(hidden).softmax(-1).topk(self.top_k, -1)
            return self.experts(hidden, ids, weights.reshape(self.shape))

    def __init__(self, shape, top_k):
        super().__init__()
        self.layers = torch.nn.ModuleList([self.Block(shape, top_k) for _ in range(2)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


@pytest.fixture
def shaped_experts():
    site_search.register(ShapedExperts, ids="top_k_index", weights="top_k_weights")
    yield
    site_search._REGISTERED.pop(ShapedExperts)


@pytest.mark.usefixtures("shaped_experts")
@pytest.mark.parametrize(
    ("shape", "top_k"),
    [((-1, 2), 2), ((-1, 2, 1), 2), ((-1,), 2), ((-1, 1), 1), ((-1, 1, 1), 1), ((-1,), 1)],
)
def test_weights_come_in_any_shape(shape, top_k):
    torch.manual_seed(0)
    model, hidden = ShapedModel(shape, top_k).eval(), torch.randn(5, 8)
    shapes = RoutingShape(num_sites=2, num_experts=4, top_k=top_k, tokens=[5])
    routing = with_weights(skewed_routing([shapes], exponent=0.7, seed=1))
    site = routing.stack().sites[0]
    with torch.no_grad():
        expected = model(hidden)
        with force_routing(model, routing):
            first = model.layers[0](hidden)
        ids, weights = torch.from_numpy(site.experts), torch.from_numpy(site.weights)
        assert torch.allclose(first, model.layers[0].experts(hidden, ids, weights), atol=1e-6)
        for technique in (apply_gating(model, "dynamic"), None):
            with technique or buffer_experts(model, capacity=2):
                assert torch.allclose(model(hidden), expected, atol=1e-5)


@pytest.mark.usefixtures("shaped_experts")
@pytest.mark.parametrize(
    ("shape", "given"), [((-1, 1), (5, 2)), ((-1, 1, 1), (5, 2, 1)), ((-1,), (10,))]
)
def test_weights_of_more_slots_keep_their_kind_of_shape(shape, given):
    model, hidden = ShapedModel(shape, 1).eval(), torch.randn(5, 8)
    shapes = RoutingShape(num_sites=2, num_experts=4, top_k=2, tokens=[5])
    seen = []
    with force_routing(model, skewed_routing([shapes], exponent=0.7, seed=1), top_k="trace"):
        model.layers[0].experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
        with torch.no_grad():
            model(hidden)
    assert tuple(seen[0].shape) == given


def test_restoring_twice_and_after_an_error_leaves_the_model_as_it_was():
    model, ids = paper_lm(), tokens()
    before = logits(model, ids)
    applied = apply_gating(model, "dynamic_loop")
    applied.restore()
    applied.restore()
    with pytest.raises(ZeroDivisionError), apply_gating(model, "static_mask"):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before)


def test_what_makes_no_sense_is_refused():
    model = paper_lm()
    with pytest.raises(UsageError, match="unknown gating 'sttic'"):
        apply_gating(model, "sttic")
    with pytest.raises(UsageError, match="no slots to limit"):
        apply_gating(model, "dynamic", token_fraction=0.5)
    with pytest.raises(UsageError, match="above 0 and up to 1"):
        apply_gating(model, "static_mask", token_fraction=1.5)
    with pytest.raises(UsageError, match="training mode"):
        apply_gating(model.train(), "static_mask")


@pytest.mark.filterwarnings("ignore")
def test_the_readme_says_what_runs(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.split("**Run the techniques for real.**")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    inputs = {"input_ids": tokens(), "max_new_tokens": 2, "do_sample": False}
    exec(code, {"moeprof": moeprof, "model": tiny_models.mixtral(), "inputs": inputs})
    assert "hit" in capsys.readouterr().out
    named = set(re.findall(r"`((?:static|dynamic)\w*)`", section))
    assert named == set(KERNELS)


def test_a_scoring_head_gives_the_loss_of_every_token():
    model = PaperLm(dataclasses.replace(TINY, num_experts=2), dtype=torch.float32)
    ids, targets = tokens(3, 9), tokens(3, 9).flip(0)
    expected = torch.nn.functional.cross_entropy(
        model(ids).view(-1, 128), targets.view(-1), reduction="none"
    ).view(3, 9)
    model.head = ScoringHead(model.embedding.weight, chunk_tokens=5)
    model.head.targets = targets
    assert torch.allclose(model(ids), expected, atol=1e-5)
