"""The router's choice at the precision of single-precision products, at the speed of half ones.

Routers are kept in single precision, and a GPU multiplies that an order of magnitude slower than
half precision. Rows in bfloat16 leave only the router's weights to be represented: three bfloat16
numbers hold the 24 bits of one in single precision (the idea of Henry, Tang and Heinecke,
arXiv 1904.06376), so three products, each exact and summed in single precision, give the same
logits but for the order of summation. The top k follow in one pass over them.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,index,arg-type"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeprof.live.kernels.parts import next_power

NUM_PARTS = 3
_ROWS = 4
_TOKENS_AT_ONCE = 16384


@triton.jit
def _top(
    logits, ids, weights, num_tokens, num_experts, K: tl.constexpr, SLOTS: tl.constexpr,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Chooses each token's top experts, best first; of equal ones the lowest id.

    What is no number comes first, as in `torch.topk`; its token's weights are no numbers either.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    inside = (row < num_tokens)[:, None] & (expert < num_experts)[None, :]
    place = row[:, None].to(tl.int64) * (PARTS * num_experts) + expert[None, :]
    score = tl.zeros((ROWS, EXPERTS), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        # The smallest part first, which loses least.
        at = place + (PARTS - 1 - part) * num_experts
        score += tl.load(logits + at, mask=inside, other=0.0)
    # Nothing compares with what is no number: the choice could fall behind the last expert.
    score = tl.where(score == score, score, float("inf"))  # noqa: PLR0124
    score = tl.where((expert < num_experts)[None, :], score, float("-inf"))
    slot = tl.arange(0, SLOTS)
    best = tl.full((ROWS, SLOTS), float("-inf"), dtype=tl.float32)
    chosen = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
    for nth in tl.static_range(K):
        highest = tl.max(score, 1)
        which = tl.argmax(score, 1)
        is_slot = (slot == nth)[None, :]
        best = tl.where(is_slot, highest[:, None], best)
        chosen = tl.where(is_slot, which[:, None], chosen)
        score = tl.where(expert[None, :] == which[:, None], float("-inf"), score)
    share = tl.exp(best - tl.max(best, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    kept = (row < num_tokens)[:, None] & (slot < K)[None, :]
    goal = row[:, None].to(tl.int64) * K + slot[None, :]
    tl.store(ids + goal, chosen.to(tl.int64), mask=kept)
    tl.store(weights + goal, share.to(weights.dtype.element_ty), mask=kept)


def in_parts(weight: torch.Tensor) -> torch.Tensor:
    """Returns [3 * num_experts, d_model] bfloat16 parts that add up to a router's weights.

    Args:
        weight: [num_experts, d_model] in single precision.
    """
    left = weight.detach()
    parts = []
    for _ in range(NUM_PARTS):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1].to(left.dtype)
    return torch.cat(parts)


def part_logits(hidden: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Returns [T, 3 * num_experts] the logits of each part, in single precision.

    Args:
        hidden: [T, d_model] bfloat16.
        parts: As `in_parts` returns them.
    """
    if hidden.device.type == "cuda":
        return torch.mm(hidden, parts.T, out_dtype=torch.float32)
    return hidden.float() @ parts.float().T


def route(
    hidden: torch.Tensor, parts: torch.Tensor, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each token's choice: (ids [T, k] int64, best first; weights [T, k] that sum to 1).

    Args:
        hidden: [T, d_model] bfloat16; weights have its type.
        parts: As `in_parts` returns them.
        top_k: Slots per token.
    """
    num_tokens, num_experts = hidden.shape[0], parts.shape[0] // NUM_PARTS
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=hidden.device)
    weights = torch.empty(num_tokens, top_k, dtype=hidden.dtype, device=hidden.device)
    # A few tokens at a time: the logits of all would take more memory than the rows.
    for start in range(0, num_tokens, _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        logits = part_logits(hidden[some], parts)
        _top[(triton.cdiv(logits.shape[0], _ROWS),)](
            logits, ids[some], weights[some], logits.shape[0], num_experts, K=top_k,
            SLOTS=next_power(top_k, 1), PARTS=NUM_PARTS, EXPERTS=next_power(num_experts),
            ROWS=_ROWS,
        )  # fmt: skip
    return ids, weights
