"""Where each (token, slot) goes: order within an expert, drops, rows by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowOrder(NamedTuple):
    """Executed slots in order of expert.

    Attributes:
        slots: [n] int64, flat (token, slot) index of each row; token order within an expert.
        experts: [n] int64, expert of each row.
        ends: [num_experts] int32, end of each expert's rows.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor


def queue_positions(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns each slot's place in its expert's queue, [T, k] int64; -1 stays -1.

    All first choices come before all second ones, each in token order.
    """
    num_tokens, top_k = expert_ids.shape
    in_order = expert_ids.t().reshape(-1).long()
    places = torch.arange(in_order.numel(), device=in_order.device)
    by_expert, order = in_order.sort(stable=True)
    every = torch.arange(num_experts, device=in_order.device)
    starts = torch.searchsorted(by_expert, every)
    rank = torch.empty_like(places)
    rank[order] = places - starts[by_expert.clamp(min=0)]
    rank = torch.where(in_order < 0, -1, rank)
    return rank.view(top_k, num_tokens).t()


def within_capacity(
    expert_ids: torch.Tensor, num_experts: int, capacity: int | None
) -> torch.Tensor:
    """Returns ``expert_ids`` with -1 where the expert's queue is longer than ``capacity``."""
    if capacity is None:
        return expert_ids
    late = queue_positions(expert_ids, num_experts) >= capacity
    return expert_ids.masked_fill(late, -1)


def rows_by_expert(expert_ids: torch.Tensor, num_experts: int) -> RowOrder:
    """Returns the executed slots of ``expert_ids`` [T, k], sorted by expert.

    Slots that are not executed come last and belong to no expert's range: the rows before
    ``ends[-1]`` are the executed ones. Does not wait for the device.
    """
    flat = expert_ids.reshape(-1).long()
    keys = torch.where(flat < 0, num_experts, flat)
    experts, slots = keys.sort(stable=True)
    every = torch.arange(num_experts, device=flat.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    return RowOrder(slots=slots, experts=experts, ends=ends)


def combine_rows(rows: torch.Tensor, order: RowOrder, weights: torch.Tensor) -> torch.Tensor:
    """Adds each token's rows, weighted, slot by slot: the same bits in every run.

    Args:
        rows: [T * k, d_model] in the order of ``order``; rows of slots that were not executed may
            hold anything finite or not.
        order: As `rows_by_expert` returned it.
        weights: [T, k].

    Returns:
        [T, d_model] in the dtype of ``rows``, summed in single precision (double for double).
    """
    num_tokens, top_k = weights.shape
    inverse = torch.empty_like(order.slots)
    inverse[order.slots] = torch.arange(order.slots.numel(), device=rows.device)
    executed = (inverse < order.ends[-1]).view(num_tokens, top_k)
    places = inverse.view(num_tokens, top_k)
    precise = rows.dtype if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros(num_tokens, rows.shape[-1], dtype=precise, device=rows.device)
    for slot in range(top_k):
        part = rows.index_select(0, places[:, slot]).to(precise)
        part = part * weights[:, slot, None].to(precise)
        out += torch.where(executed[:, slot, None], part, 0)
    return out.to(rows.dtype)
