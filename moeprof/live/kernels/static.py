"""Static gating: every expert computes ``capacity`` slots, filled or not.

The baselines of "Towards MoE Deployment" (arXiv 2303.06182, section IV): a dispatch mask as in
fairseq, the same in groups of tokens as in GShard, and indices instead of masks as in Tutel. Each
is as fast as plain torch allows: experts run as one batched product, not one by one.

Rows must be finite. A mask multiplies every row with every slot, zeros too, so one row that is not
makes all of its group not a number; `static_index` does so where it drops. Dynamic gating keeps it
to its token.
"""

from __future__ import annotations

import torch

from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.slots import queue_positions

GROUP_TOKENS = 1024


def static_mask(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """Dispatch and combine through masks of [T, num_experts, capacity].

    fairseq, ``moe_layer.py``: both are matrix products with the mask; the combine weights are
    built in single precision. ``capacity`` None means T: nothing can be dropped.
    """
    if not len(hidden):
        return hidden.clone()
    slots = hidden.shape[0] if capacity is None else capacity
    combine = combine_mask(expert_ids, weights, experts.num_experts, slots)
    dispatch = combine.bool().to(hidden.dtype)
    flat = combine.to(hidden.dtype).view(hidden.shape[0], -1)
    sent = dispatch.view(hidden.shape[0], -1).t() @ hidden
    del dispatch, combine
    rows = _run_slots(sent.view(experts.num_experts, slots, -1), experts)
    return flat @ rows.view(-1, hidden.shape[1])


def static_grouped(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
    group_tokens: int = GROUP_TOKENS,
) -> torch.Tensor:
    """Masks of [groups, group_tokens, num_experts, capacity per group].

    GShard, arXiv 2006.16668, section 3.2: tokens are split into groups of ``group_tokens``, each
    with its share of the capacity, ``ceil(capacity * group_tokens / T)``; so a token may be dropped
    that `static_mask` keeps, and the reverse.
    """
    num_tokens, width = hidden.shape
    if not num_tokens:
        return hidden.clone()
    group = min(group_tokens, num_tokens)
    num_groups = -(-num_tokens // group)
    slots = group if capacity is None else -(-capacity * group // num_tokens)
    missing = num_groups * group - num_tokens
    if missing:
        hidden = torch.cat([hidden, hidden.new_zeros(missing, width)])
        expert_ids = torch.cat(
            [expert_ids, expert_ids.new_full((missing, expert_ids.shape[1]), -1)]
        )
        weights = torch.cat([weights, weights.new_zeros(missing, weights.shape[1])])
    combine = torch.stack(
        [
            combine_mask(ids, gates, experts.num_experts, slots)
            for ids, gates in zip(
                torch.split(expert_ids, group), torch.split(weights, group), strict=True
            )
        ]
    )
    dispatch = combine.bool().to(hidden.dtype).view(num_groups, group, -1)
    flat = combine.to(hidden.dtype).view(num_groups, group, -1)
    del combine
    sent = dispatch.transpose(1, 2) @ hidden.view(num_groups, group, width)
    del dispatch
    by_expert = sent.view(num_groups, experts.num_experts, slots, width).transpose(0, 1)
    rows = _run_slots(by_expert.reshape(experts.num_experts, num_groups * slots, width), experts)
    rows = rows.view(experts.num_experts, num_groups, slots, width).transpose(0, 1)
    out = flat @ rows.reshape(num_groups, -1, width)
    return out.view(-1, width)[:num_tokens]


def static_index(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """The same slots, filled and read by index instead of mask.

    Tutel, arXiv 2206.03382, section 4.2 (fast encode and decode).
    """
    num_tokens, width = hidden.shape
    slots = num_tokens if capacity is None else capacity
    places = queue_positions(expert_ids, experts.num_experts)
    kept = (places >= 0) & (places < slots)
    # What is dropped goes to one row more, so that no mask has to be read on the host.
    target = torch.where(kept, expert_ids.long() * slots + places, experts.num_experts * slots)
    sent = hidden.new_zeros(experts.num_experts * slots + 1, width)
    top_k = expert_ids.shape[1]
    for slot in range(top_k):
        sent.index_copy_(0, target[:, slot], hidden)
    rows = _run_slots(sent[:-1].view(experts.num_experts, slots, width), experts)
    flat = rows.view(-1, width)
    out = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for slot in range(top_k):
        part = flat.index_select(0, target[:, slot].clamp(max=flat.shape[0] - 1))
        gate = torch.where(kept[:, slot], weights[:, slot].to(out.dtype), 0)
        out.addcmul_(part.to(out.dtype), gate[:, None])
    return out.to(hidden.dtype)


def combine_mask(
    expert_ids: torch.Tensor, weights: torch.Tensor, num_experts: int, capacity: int
) -> torch.Tensor:
    """Returns the weights as [T, num_experts, capacity] in single precision or better.

    Written slot by slot into zeros: the products of one-hot tensors that fairseq builds need
    several times the memory, and the baseline should not lose for that.
    """
    num_tokens, top_k = expert_ids.shape
    places = queue_positions(expert_ids, num_experts)
    kept = (places >= 0) & (places < capacity)
    precise = torch.promote_types(weights.dtype, torch.float32)
    mask = torch.zeros(num_tokens, num_experts * capacity, dtype=precise, device=weights.device)
    column = expert_ids.long().clamp(min=0) * capacity + places.clamp(min=0, max=capacity - 1)
    values = torch.where(kept, weights.to(precise), 0)
    for slot in range(top_k):
        mask.scatter_add_(1, column[:, slot, None], values[:, slot, None])
    return mask.view(num_tokens, num_experts, capacity)


def _run_slots(sent: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """Returns every expert's slots [num_experts, capacity, d_model] through that expert."""
    if experts.b_in is None:
        inner = torch.bmm(sent, experts.w_in.transpose(1, 2))
    else:
        inner = torch.baddbmm(experts.b_in[:, None], sent, experts.w_in.transpose(1, 2))
    inner = experts.activate(inner)
    if experts.b_out is None:
        return torch.bmm(inner, experts.w_out.transpose(1, 2))
    return torch.baddbmm(experts.b_out[:, None], inner, experts.w_out.transpose(1, 2))
