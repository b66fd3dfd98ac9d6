from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from moeprof.live import paper_lm
from moeprof.live.kernels import router
from moeprof.live.paper_lm import PaperGate, PaperLmConfig

# The kernel runs in Triton's interpreter where there is no GPU, and only on one where there is.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def router_of(num_experts: int, d_model: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_experts, d_model, generator=generator)
    rows = torch.randn(37, d_model, generator=generator).bfloat16()
    return weight.to(DEVICE), rows.to(DEVICE)


def test_parts_hold_every_bit_of_the_weights():
    weight, _ = router_of(24, 32)
    parts = router.in_parts(weight).double().view(router.NUM_PARTS, 24, 32)
    assert parts.shape[0] == 3
    assert torch.equal(parts.sum(0), weight.double())
    # Two would not do.
    assert not torch.equal(parts[:2].sum(0), weight.double())


def test_logits_of_parts_add_up_to_exact_ones():
    weight, rows = router_of(24, 32)
    parts = router.part_logits(rows, router.in_parts(weight)).view(-1, 3, 24).double().sum(1)
    exact = rows.double() @ weight.double().T
    single = (rows.float() @ weight.T).double()
    assert (parts - exact).abs().max() <= 2 * (single - exact).abs().max()
    # The reason for three: with the weights rounded to half precision it is a hundred times worse.
    rounded = rows.double() @ weight.bfloat16().double().T
    assert (rounded - exact).abs().max() > 100 * (parts - exact).abs().max()


@pytest.mark.parametrize(("num_experts", "top_k"), [(24, 2), (16, 1), (40, 6)])
def test_route_chooses_as_softmax_and_top_k_do(num_experts, top_k, monkeypatch):
    # Several turns: a few tokens at a time.
    monkeypatch.setattr(router, "_TOKENS_AT_ONCE", 16)
    weight, rows = router_of(num_experts, 32, seed=num_experts)
    ids, weights = router.route(rows, router.in_parts(weight), top_k=top_k)
    chosen, expected = torch.softmax(rows.double() @ weight.double().T, -1).topk(top_k)
    assert torch.equal(ids, expected)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(
        weights, (chosen / chosen.sum(-1, keepdim=True)).bfloat16(), rtol=2**-7, atol=0
    )


def test_of_equal_experts_the_lowest_is_chosen():
    weight = torch.zeros(20, 16, device=DEVICE)
    weight[[3, 7, 19]] = 1.0
    ids, weights = router.route(
        torch.ones(5, 16, device=DEVICE).bfloat16(), router.in_parts(weight), top_k=4
    )
    assert ids.tolist() == [[3, 7, 19, 0]] * 5
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 3] < weights[:, 2]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_rows_without_numbers_choose_experts_that_there_are():
    weight, rows = router_of(20, 32)
    rows[5] = float("nan")
    ids, weights = router.route(rows, router.in_parts(weight), top_k=3)
    assert ids[5].tolist() == [0, 1, 2] and weights[5].isnan().all()
    assert ids.min() >= 0 and ids.max() < 20
    others = torch.arange(len(rows), device=DEVICE) != 5
    assert weights[others].isfinite().all()


def test_no_tokens():
    weight, rows = router_of(24, 32)
    ids, weights = router.route(rows[:0], router.in_parts(weight), top_k=2)
    assert ids.shape == weights.shape == (0, 2)


def gate_of(monkeypatch) -> tuple[PaperGate, torch.Tensor]:
    """Returns a gate that takes this machine for a GPU that it suits, and rows."""
    monkeypatch.setattr(paper_lm, "suits_device", lambda *_: True)
    config = PaperLmConfig(
        vocab_size=97, num_layers=2, d_model=32, d_ff=24, num_heads=2, num_experts=24, top_k=2
    )
    gate = PaperGate(config, device=torch.device(DEVICE), dtype=torch.bfloat16)
    weight, rows = router_of(24, 32)
    gate.weight.requires_grad_(requires_grad=False).copy_(weight)
    return gate, rows


def test_the_gate_follows_its_weights(monkeypatch):
    gate, rows = gate_of(monkeypatch)
    asked = []
    made = router.in_parts
    monkeypatch.setattr(router, "in_parts", lambda weight: asked.append(1) or made(weight))
    for _ in range(2):
        for _ in range(2):
            ids, weights = gate(rows)
            expected = F.linear(rows.float(), gate.weight).topk(2).indices
            assert torch.equal(ids, expected)
            assert weights.dtype == rows.dtype
        gate.weight.copy_(gate.weight.flip(0))
    assert len(asked) == 2


def test_the_gate_keeps_gradients_where_they_are_wanted(monkeypatch):
    gate, rows = gate_of(monkeypatch)
    gate.weight.requires_grad_()
    _, weights = gate(rows)
    weights.float().sum().backward()
    assert gate.weight.grad is not None


@pytest.mark.gpu
def test_on_a_gpu_logits_are_as_good_as_single_precision_ones():
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(512, 1024, device="cuda", generator=generator) / 32
    rows = torch.randn(20_000, 1024, device="cuda", generator=generator).bfloat16()
    exact = rows.double() @ weight.double().T
    parts = router.part_logits(rows, router.in_parts(weight)).view(-1, 3, 512).double().sum(1)
    single = (rows.float() @ weight.T).double()
    assert (parts - exact).abs().max() <= 4 * (single - exact).abs().max()
    ids, weights = router.route(rows, router.in_parts(weight), top_k=2)
    best = exact.topk(2).values
    # Another expert only where two are as good as equal.
    assert (exact.gather(1, ids) - best).abs().max() < 1e-4
    expected = torch.softmax(exact.gather(1, ids), -1)
    torch.testing.assert_close(weights.double(), expected, rtol=2**-8, atol=0)
