"""Dynamic gating in plain torch: experts run on the rows they were given, no more and no fewer.

"Towards MoE Deployment", arXiv 2303.06182, section V: argsort, bincount, gather, experts, inverse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeprof.live.experts import ExpertWeights
from moeprof.live.grouping import can_group
from moeprof.live.kernels.slots import combine_rows, rows_by_expert, within_capacity


def dynamic_loop(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """One pair of matrix products per active expert, in increasing id: the paper's own way.

    Waits for the device once: the host must know the counts.
    """
    kept = within_capacity(expert_ids, experts.num_experts, capacity)
    order = rows_by_expert(kept, experts.num_experts)
    given = hidden.index_select(0, order.slots // kept.shape[1])
    rows = torch.zeros_like(given)
    start = 0
    for expert, end in enumerate(order.ends.tolist()):
        if end > start:
            rows[start:end] = experts.run(expert, given[start:end])
        start = end
    return combine_rows(rows, order, weights)


def dynamic_grouped(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """One grouped matrix product (`torch.nn.functional.grouped_mm`) for each matrix.

    Falls back to `dynamic_loop` where torch has none that is fast (see `can_group`).
    """
    if not can_group(experts.w_in, hidden):
        return dynamic_loop(hidden, expert_ids, weights, experts, capacity=capacity)
    kept = within_capacity(expert_ids, experts.num_experts, capacity)
    order = rows_by_expert(kept, experts.num_experts)
    row_experts = order.experts.clamp(max=experts.num_experts - 1)
    given = hidden.index_select(0, order.slots // kept.shape[1])
    inner = F.grouped_mm(given, experts.w_in.transpose(1, 2), offs=order.ends)
    if experts.b_in is not None:
        inner += experts.b_in[row_experts]
    rows = F.grouped_mm(experts.activate(inner), experts.w_out.transpose(1, 2), offs=order.ends)
    if experts.b_out is not None:
        rows += experts.b_out[row_experts]
    return combine_rows(rows, order, weights)
