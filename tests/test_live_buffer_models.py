"""Whole models with buffered experts: same bits, same hits as the replay, back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import recording_models  # noqa: E402
import tiny_models  # noqa: E402
from torch import nn  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import force_routing  # noqa: E402
from moeprof.live.buffered_models import buffer_experts  # noqa: E402
from moeprof.live.expert_store import ALIGNMENT_BYTES  # noqa: E402
from moeprof.live.paper_lm import PaperLm, PaperLmConfig  # noqa: E402
from moeprof.live.stacking import check_layout, expert_layout, stack_experts  # noqa: E402
from moeprof.recording.sites import find_sites  # noqa: E402
from moeprof.zoo import fix_nllb_dispatch, load  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

KEYS = ["step", "stack", "site", "layer", "expert", "hit"]
FUSED = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "granite_moe")
REFUSED = {
    "gpt_oss": "activation of its own",
    "jetmoe": "cannot be run in another way",
    "llama4": "cannot be run in another way",
    "aria": "cannot be run in another way",
    "dbrx": "names that say nothing",
    "longcat": "no weights",
}


def fixed_nllb(**settings: Any) -> Any:
    model: Any = tiny_models.nllb_moe(**settings)
    fix_nllb_dispatch(model)
    return model


BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: tiny_models.LMS[name] for name in FUSED},
    "nllb_moe": fixed_nllb,
    "switch": tiny_models.switch,
}


def generate(model: Any, ids: Any, tokens: int = 4) -> list[Any]:
    with torch.no_grad():
        out = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return list(out.logits)


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def prompts(rows: int = 2, length: int = 6, high: int = 90) -> Any:
    return torch.randint(3, high, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_generation_and_lookups(name: str, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    ids = prompts()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = generate(model, ids)
    with buffer_experts(model, capacity=None):
        unbuffered = generate(model, ids)
    for found, expected in zip(unbuffered, plain, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    for policy, capacity, scope in (
        ("lru", 1, "layer"),
        ("paper", 3, "layer"),
        ("lfu", 5, "global"),
    ):
        with buffer_experts(model, capacity=capacity, policy=policy, scope=scope) as buffer:
            with moeprof.record(model, tmp_path / f"{policy}.moeprof") as recorder:
                logits = generate(model, ids)
            # The parameters are still the model's, wherever they lie.
            assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
            assert buffer.audit() == []
        assert same(logits, unbuffered), policy
        trace = moeprof.open(recorder.path)
        assert trace.info.capture.num_executed_disagreeing == 0
        predicted = moeprof.replay.buffering(
            trace,
            policies=[policy],
            capacities=[capacity],
            scope=scope,
            semantics="sequential",
            jobs=1,
        ).lookups(policy, capacity)
        assert buffer.lookups()[KEYS].values.tolist() == predicted[KEYS].values.tolist()
        assert {"prefill", "decode"} <= set(trace.steps["phase"])
        assert buffer.counts().copies == int((~predicted["hit"]).sum()) > 0
        prediction = sum(site.num_experts * site.expert_bytes for site in trace.sites)
        assert buffer.memory().expert_bytes == prediction
    assert same(generate(model, ids), plain)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules()) or name == "nllb_moe"


def test_the_built_in_translation_model(tmp_path: Path) -> None:
    loaded = load("zoo:mt", device="cpu")
    texts = [prompt.text for prompt in loaded.prompts[:1]]
    ids = loaded.tokenizer(texts, return_tensors="pt")["input_ids"]
    with buffer_experts(loaded.model, capacity=None):
        unbuffered = generate(loaded.model, ids, tokens=5)
    with moeprof.record(loaded.model, tmp_path / "t.moeprof") as recorder:
        generate(loaded.model, ids, tokens=5)
    trace = moeprof.open(recorder.path)
    for policy, capacity in (("paper", 1), ("paper", 10), ("min", 4), ("pinned", 4)):
        options: dict[str, Any] = {"capacity": capacity, "policy": policy, "future": trace}
        with buffer_experts(loaded.model, **options) as buffer:
            assert same(generate(loaded.model, ids, tokens=5), unbuffered)
        predicted = moeprof.replay.buffering(
            trace, policies=[policy], capacities=[capacity], semantics="sequential", jobs=1
        ).lookups(policy, capacity)
        assert buffer.lookups()[KEYS].values.tolist() == predicted[KEYS].values.tolist()
        assert {"encoder", "decoder"} == set(buffer.lookups()["stack"])


def test_the_built_in_language_model() -> None:
    loaded = load("zoo:lm", device="cpu")
    ids = loaded.tokenizer([loaded.prompts[0].text], return_tensors="pt")["input_ids"][:, :12]
    with buffer_experts(loaded.model, capacity=None):
        unbuffered = generate(loaded.model, ids, tokens=3)
    with buffer_experts(loaded.model, capacity=8, policy="s3fifo") as buffer:
        assert same(generate(loaded.model, ids, tokens=3), unbuffered)
    assert 0 < buffer.counts().hits < buffer.counts().lookups
    with buffer_experts(loaded.model, capacity=8, miss="split", host_rows=1) as buffer:
        logits = generate(loaded.model, ids, tokens=3)
    assert buffer.counts().host_experts > 0
    for found, expected in zip(logits, unbuffered, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_paper_s_model() -> None:
    config = PaperLmConfig(
        vocab_size=64, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_experts=8
    )
    model = PaperLm(config, device="cpu", dtype=torch.float32)
    ids = prompts(3, 5, 60)
    with torch.no_grad():
        plain = model(ids)
        with buffer_experts(model, capacity=2, policy="paper") as buffer:
            found = model(ids)
            assert buffer.audit() == []
    # Its own loop runs the same rows through the same products.
    assert torch.equal(_logits(found), _logits(plain))
    assert buffer.counts().dispatches == 2


def _logits(out: Any) -> Any:
    return out if torch.is_tensor(out) else getattr(out, "logits", out[0])


@pytest.mark.parametrize("name", ["mixtral", "nllb_moe"])
def test_forced_routing_is_buffered_too(name: str, tmp_path: Path) -> None:
    model = BUILDERS[name]()
    ids = prompts()
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        generate(model, ids)
    trace = moeprof.open(recorder.path)
    predicted = moeprof.replay.buffering(
        trace, policies=["min"], capacities=[2], semantics="sequential", jobs=1
    ).lookups("min", 2)
    with torch.no_grad():
        for place in find_sites(model):
            for parameter in place.modules.router.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(7))
    with (
        torch.inference_mode(),
        force_routing(model, trace),
        buffer_experts(model, capacity=2, policy="min", future=trace) as buffer,
    ):
        generate(model, ids)
    assert buffer.lookups()[KEYS].values.tolist() == predicted[KEYS].values.tolist()


def test_experts_leave_and_come_back() -> None:
    model: Any = tiny_models.mixtral()
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    before, place = weight.detach().clone(), weight.data_ptr()
    with buffer_experts(model, capacity=2) as buffer:
        store = buffer.sites[0].store
        assert weight.data_ptr() == store.memory.data_ptr()
        assert model.model.layers[0].mlp.experts.gate_up_proj is weight
        assert store.shape.block_bytes % ALIGNMENT_BYTES == 0
    assert weight.data_ptr() not in (place, store.memory.data_ptr())
    assert torch.equal(weight, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu", 0), "cpu"])
def test_the_host_by_any_name(device: Any) -> None:
    model = tiny_models.mixtral()
    ids = torch.arange(3, 17)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with buffer_experts(model, capacity=2, device=device) as buffer:
            assert torch.allclose(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert buffer.device == torch.device("cpu")


def test_an_error_brings_everything_back() -> None:
    model: Any = tiny_models.mixtral()
    ids = prompts()
    plain = generate(model, ids, 2)
    with (
        pytest.raises(UsageError, match="planned on a trace"),
        buffer_experts(model, capacity=2, policy="min"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), buffer_experts(model, capacity=2):
        raise ZeroDivisionError
    assert same(generate(model, ids, 2), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_wrong_slot_map_changes_the_model_s_output() -> None:
    model: Any = tiny_models.mixtral()
    ids = prompts()
    with torch.no_grad(), buffer_experts(model, capacity=8, initial="full") as buffer:
        right = model(ids).logits
        buffer.misplace((0, 0), (0, 1))
        buffer.misplace((0, 2), (0, 3))
        assert len(buffer.audit()) == 4
        assert not torch.equal(model(ids).logits, right)


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_cannot_be_read_are_refused(name: str) -> None:
    model = {**tiny_models.LMS, **recording_models.FAMILIES}[name]()
    with pytest.raises(UsageError, match=REFUSED[name]), buffer_experts(model, capacity=2):
        pass


def test_models_in_the_wrong_state_are_refused() -> None:
    with (
        pytest.raises(UsageError, match="training mode"),
        buffer_experts(tiny_models.mixtral().train(), capacity=2),
    ):
        pass
    with (
        pytest.raises(UsageError, match="does not execute") as refused,
        buffer_experts(tiny_models.nllb_moe(), capacity=2),
    ):
        pass
    assert "fix_nllb_dispatch" in refused.value.hint
    model: Any = tiny_models.mixtral()
    first, second = (model.model.layers[i].mlp.experts for i in (0, 1))
    second.down_proj = first.down_proj
    with pytest.raises(UsageError, match="tied"), buffer_experts(model, capacity=2):
        pass


class Stacked(nn.Module):
    """Experts as transformers stacks them."""

    def __init__(self, *, transposed: bool = False, clamp: bool = False, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)

        self.gate_up_proj = drawn(5, 8, 24) if transposed else drawn(5, 24, 8)
        self.down_proj = drawn(5, 12, 8) if transposed else drawn(5, 8, 12)
        if bias:
            self.gate_up_proj_bias, self.down_proj_bias = drawn(5, 24), drawn(5, 8)
        self.act_fn = nn.GELU()
        self.is_transposed = transposed
        self.clamp = clamp

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        out = torch.zeros_like(hidden_states)
        for token in range(hidden_states.shape[0]):
            for slot, expert in enumerate(top_k_index[token].tolist()):
                matrix_in, matrix_out = self.gate_up_proj[expert], self.down_proj[expert]
                if not self.is_transposed:
                    matrix_in, matrix_out = matrix_in.t(), matrix_out.t()
                inner = hidden_states[token] @ matrix_in
                if hasattr(self, "gate_up_proj_bias"):
                    inner = inner + self.gate_up_proj_bias[expert]
                gate, up = inner.chunk(2)
                if self.clamp:
                    up = up.clamp(-7, 7)
                row = (self.act_fn(gate) * up) @ matrix_out
                if hasattr(self, "down_proj_bias"):
                    row = row + self.down_proj_bias[expert]
                out[token] += row * top_k_weights[token, slot]
        return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_layouts(transposed: bool, bias: bool) -> None:
    module = Stacked(transposed=transposed, bias=bias)
    check_layout(module, expert_layout(module))
    experts = stack_experts(module)
    assert experts.activation == "gelu" and experts.gated
    assert experts.w_in.data_ptr() == module.gate_up_proj.data_ptr()
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    ones = torch.ones(3, 1)
    for expert in range(5):
        found = experts.run(expert, rows)
        expected = module(rows, torch.full((3, 1), expert), ones)
        assert torch.allclose(found, expected, atol=1e-6)


def test_modules_apart_are_stacked() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
            self.w2 = nn.Linear(4, 6, bias=False)
            self.act_fn = nn.SiLU()

        def forward(self, rows: Any) -> Any:
            return self.w2(self.act_fn(self.w1(rows)) * self.w3(rows))

    module = nn.ModuleList(Gated() for _ in range(3))
    check_layout(module, expert_layout(module))
    experts = stack_experts(module)
    rows = torch.randn(2, 6)
    for expert, own in enumerate(module):
        assert torch.allclose(experts.run(expert, rows), own(rows), atol=1e-6)


class Pair(nn.Module):
    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 4), nn.Linear(4, 6)
        self.act = act or nn.ReLU()


def test_layouts_that_are_not_known_are_refused() -> None:
    with pytest.raises(UsageError, match="something else"):
        module = Stacked(clamp=True)
        check_layout(module, expert_layout(module))
    with pytest.raises(UsageError, match="none of relu"):
        stack_experts(nn.ModuleList([Pair(nn.Tanh()), Pair(nn.Tanh())]))
    with pytest.raises(UsageError, match="share their weights"):
        pair, twin = Pair(), Pair()
        twin.fc1, twin.fc2 = pair.fc1, pair.fc2
        stack_experts(nn.ModuleList([pair, twin]))
    with pytest.raises(UsageError, match="not a Linear"):
        odd = Pair()
        odd.fc1 = nn.Bilinear(6, 6, 4)
        stack_experts(nn.ModuleList([odd, Pair()]))
    with pytest.raises(UsageError, match="quantised"):
        half = Stacked(bias=False)
        half.gate_up_proj = nn.Parameter(half.gate_up_proj.to(torch.int8), requires_grad=False)
        stack_experts(half)
    with pytest.raises(UsageError, match="are not known"):
        stack_experts(nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]))
    interleaved = Stacked()
    interleaved.is_concatenated = False
    with pytest.raises(UsageError, match="interleaved"):
        stack_experts(interleaved)
