from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeprof.errors import UsageError
from moeprof.live.paper_lm import PaperExperts, PaperLm, PaperLmConfig, PaperMoe

GIB = 2**30
TINY = PaperLmConfig(
    vocab_size=97,
    num_layers=4,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_experts=8,
    top_k=2,
    max_positions=32,
)


def tiny(seed: int = 0, **changes) -> PaperLm:
    config = PaperLmConfig(**{**vars(TINY), **changes})
    model = PaperLm(config, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "b_" in name or name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
    return model


def token_ids(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))


def dense_reference(moe: PaperMoe, hidden: torch.Tensor) -> torch.Tensor:
    """Every token through every expert, one by one; weights of the unchosen are zero."""
    out = torch.zeros_like(hidden)
    for i, x in enumerate(hidden.reshape(-1, hidden.shape[-1])):
        logits = moe.gate.weight @ x
        gates = torch.exp(logits) / torch.exp(logits).sum()
        best = int(gates.argmax())
        second = int(gates.masked_fill(torch.arange(len(gates)) == best, -1).argmax())
        total = gates[best] + gates[second]
        experts = moe.experts
        y = torch.zeros_like(x)
        for e in range(len(gates)):
            weight = gates[e] / total if e in (best, second) else 0.0
            hidden_e = F.relu(experts.w_in[e] @ x + (experts.b_in[e] if moe_bias(moe) else 0))
            y += weight * (experts.w_out[e] @ hidden_e + (experts.b_out[e] if moe_bias(moe) else 0))
        out.view(-1, out.shape[-1])[i] = y
    return out


def moe_bias(moe: PaperMoe) -> bool:
    return moe.experts.b_in is not None


def test_the_default_shape_has_the_papers_51_83_billion_parameters():
    model = PaperLm(device="meta")
    assert round(model.num_params / 1e9, 2) == 51.83
    # The paper's eight GPUs hold an eighth of the experts each and everything else once:
    # 12.49 GiB of weights in two bytes per parameter.
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    per_gpu = (model.num_params - experts + experts / 8) * 2
    assert round(per_gpu / GIB, 2) == 12.49
    assert experts == 12 * 512 * model.config.num_expert_params
    assert model.config.num_moe_layers == 12


def test_every_second_layer_routes():
    model = tiny()
    assert [layer.routes for layer in model.layers] == [False, True, False, True]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "dtype"), [("loop", "float64"), ("grouped", "float32")])
def test_the_moe_layer_equals_a_dense_per_token_reference(kernel, dtype, bias):
    moe = tiny(expert_kernel=kernel, bias=bias).layers[1].moe
    hidden = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = dense_reference(moe, hidden)
    # Grouped products exist up to single precision.
    dtype = getattr(torch, dtype)
    got = moe.to(dtype)(hidden.to(dtype))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_nothing_is_dropped_when_all_tokens_want_the_same_experts():
    moe = tiny().layers[1].moe
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[5, 0] = 100.0
        moe.gate.weight[6, 0] = 50.0
    hidden = torch.rand(2, 7, 16, dtype=torch.float64) + 0.5
    seen = []
    moe.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    torch.testing.assert_close(moe(hidden), dense_reference(moe, hidden))
    rows, index, weights, row_experts, ends = seen[0]
    assert rows.shape == (28, 16)
    assert index.tolist() == [[5, 6]] * 14
    assert row_experts.tolist() == [5] * 14 + [6] * 14
    assert ends.tolist() == [0, 0, 0, 0, 0, 14, 28, 28]
    torch.testing.assert_close(weights.sum(1), torch.ones(14, dtype=torch.float64))


def test_perturbing_an_expert_changes_exactly_the_tokens_that_chose_it():
    moe = tiny().layers[1].moe
    hidden = torch.randn(1, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    index, _ = moe.gate(hidden[0])
    before = moe(hidden)[0]
    for expert in range(8):
        saved = moe.experts.w_out[expert].clone()
        with torch.no_grad():
            moe.experts.w_out[expert] += 1.0
        changed = (moe(hidden)[0] != before).any(dim=1)
        with torch.no_grad():
            moe.experts.w_out[expert] = saved
        assert changed.tolist() == (index == expert).any(dim=1).tolist()


def test_decoding_with_a_cache_equals_one_pass_over_everything():
    model = tiny()
    ids = token_ids(3, 12)
    whole = model(ids)
    past = model.new_cache(3, 12)
    parts = [model(ids[:, :5], past), model(ids[:, 5:9], past)]
    parts += [model(ids[:, i : i + 1], past) for i in range(9, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert past.get_seq_length() == 12


def test_a_token_sees_nothing_after_it():
    model = tiny()
    ids = token_ids(1, 9)
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 97
    torch.testing.assert_close(model(ids)[:, :6], model(other)[:, :6])
    assert (model(ids)[:, 6:] != model(other)[:, 6:]).any()


def test_generate_is_greedy():
    model = tiny()
    ids = token_ids(2, 4)
    out = model.generate(ids, max_new_tokens=6)
    assert out.shape == (2, 10)
    for length in range(4, 10):
        step = model(out[:, :length], last_only=True)
        assert step[:, -1].argmax(-1).tolist() == out[:, length].tolist()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = tiny(0), tiny(0), tiny(1)
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.random_weights


def test_the_gate_keeps_single_precision_in_a_bfloat16_model():
    model = PaperLm(TINY)
    gate = model.layers[1].moe.gate
    assert gate.weight.dtype == torch.float32
    index, weights = gate(torch.randn(4, 16, dtype=torch.bfloat16))
    assert (index.dtype, weights.dtype) == (torch.int64, torch.bfloat16)
    assert model(token_ids(1, 4)).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{"d_model": 15}, {"top_k": 9}, {"top_k": 0}, {"expert_kernel": "fast"}],
)
def test_shapes_that_cannot_be_built_are_refused(changes):
    with pytest.raises(UsageError):
        PaperLmConfig(**{**vars(TINY), **changes})


def test_more_tokens_than_positions_are_refused():
    model = tiny()
    with pytest.raises(UsageError, match="room"):
        model(token_ids(1, 33))
    past = model.new_cache(1, 4)
    model(token_ids(1, 4), past)
    with pytest.raises(UsageError, match="room"):
        model(token_ids(1, 1), past)


def test_a_recording_holds_the_gates_choices_and_times_every_part(tmp_path):
    import moeprof

    model = tiny()
    moeprof.register(PaperExperts, ids="top_k_index", weights="top_k_weights")
    chosen = []
    model.layers[1].moe.gate.register_forward_hook(lambda _, args, out: chosen.append(out))
    with moeprof.record(model, tmp_path / "paper.moeprof"):
        model.generate(token_ids(3, 6), max_new_tokens=6)
    trace = moeprof.open(tmp_path / "paper.moeprof")
    assert trace.complete
    assert trace.model.random_weights
    site = trace.sites[0]
    assert (site.num_experts, site.matrices_per_expert, site.d_model, site.d_ff) == (8, 2, 16, 24)
    assert site.expert_bytes == TINY.num_expert_params * 8
    routing = trace.routing(layers=1)
    ids = torch.cat([index for index, _ in chosen]).reshape(-1)
    weights = torch.cat([weights for _, weights in chosen]).reshape(-1)
    assert routing["expert"].tolist() == ids.tolist()
    torch.testing.assert_close(
        torch.tensor(routing["weight"]), weights.float(), rtol=1e-3, atol=1e-4
    )
    assert trace.steps["phase"].tolist() == ["prefill"] + ["decode"] * 5
    timed = trace.layers[trace.layers["layer_ms"].notna()]
    routed = timed[timed["site"].notna()]
    assert len(routed) > 0
    for part in ("attention", "gate", "dispatch", "experts", "combine", "moe"):
        assert (routed[f"{part}_ms"] > 0).all(), part
    assert (timed[timed["site"].isna()]["dense_ffn_ms"] > 0).all()
    executed = trace.executed.dropna(subset="num_executed_rows")
    assert len(executed) > 0
    assert (executed["num_executed_rows"] == executed["num_routed_rows"]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_the_grouped_product_on_a_gpu_equals_the_loop(num_tokens):
    config = PaperLmConfig(
        vocab_size=64, num_layers=2, d_model=256, d_ff=512, num_heads=4, num_experts=32
    )
    model = PaperLm(config, device="cuda")
    moe = model.layers[1].moe
    hidden = torch.randn(1, num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    assert moe.experts.uses_grouped(hidden)
    grouped = moe(hidden)
    moe.experts.kernel = "loop"
    torch.testing.assert_close(grouped, moe(hidden), rtol=3e-2, atol=3e-2)
