"""Correct dispatch for NLLB-MoE models of transformers."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_EXPERTS_CLASS = "NllbMoeExperts"
_BLOCK_CLASS = "NllbMoeSparseMLP"


def fix_nllb_dispatch(model: nn.Module) -> int:
    """Make every NLLB-MoE layer of `model` execute the experts that its router chose.

    transformers 5.17 to 5.23 take a one-hot of a mask that is one-hot already
    (`NllbMoeExperts.forward`), so only `expert_0` and `expert_1` ever run, whatever the router
    says: `expert_1` for the first choice of every token, `expert_0` for everything else, its cost
    growing with tokens times experts. What is measured per expert then means nothing.

    The corrected forward keeps the router call and its handling of padding as they are upstream.
    Each expert module is still called through `__call__` (hooks count what it executes), once, with
    exactly the rows whose combine weight for it is not zero, and not at all where there are none.
    In evaluation an expert's output is multiplied by `1 - moe_token_dropout`, as upstream does; in
    training `token_dropout` is applied, as upstream does.

    Instances are patched, never the class. Patching twice changes nothing.

    Args:
        model: Any module; layers of other kinds are left alone.

    Returns:
        The number of layers that dispatch correctly now because of this call.
    """
    num_fixed = 0
    for module in model.modules():
        if type(module).__name__ == _BLOCK_CLASS and not is_dispatch_fixed(module):
            module.forward = types.MethodType(_sparse_forward, module)
            num_fixed += 1
    return num_fixed


def is_dispatch_fixed(block: nn.Module) -> bool:
    """Tell whether `fix_nllb_dispatch` was applied to this block."""
    forward = vars(block).get("forward")
    return getattr(forward, "__func__", None) is _sparse_forward


def needs_nllb_dispatch_fix(model: nn.Module) -> bool:
    """Tell whether `model` has NLLB-MoE layers that execute other experts than its router chose.

    The verdict comes from behaviour, not from a version: a copy of one layer's experts is run on
    one row that is routed to the last expert, and what ran is counted.
    """
    for module in model.modules():
        if type(module).__name__ == _BLOCK_CLASS:
            return not is_dispatch_fixed(module) and _runs_wrong_experts(module)
    return False


def _runs_wrong_experts(block: Any) -> bool:
    import torch
    from torch import nn

    class Probe(nn.Module):
        """An expert that notes that it ran and returns its input."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            if rows.shape[0]:
                executed.append(self.index)
            return rows

    executed: list[int] = []
    num_experts = len(block.experts)
    kind: Any = type(block.experts)
    experts = kind.__new__(kind)
    nn.ModuleDict.__init__(experts, {f"expert_{i}": Probe(i) for i in range(num_experts)})
    experts.num_experts = num_experts
    experts.moe_token_dropout = 0.0
    experts.eval()
    weights = torch.zeros(1, num_experts)
    weights[0, num_experts - 1] = 1.0
    mask = torch.zeros(1, num_experts, dtype=torch.int64)
    mask[0, num_experts - 1] = 1
    experts(torch.ones(1, 1), mask, weights)
    return executed != [num_experts - 1]


def _sparse_forward(
    self: Any, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    import torch

    batch_size, sequence_length, hidden_dim = hidden_states.shape
    flat = hidden_states.reshape(-1, hidden_dim)
    _, combine, _ = self.router(flat, padding_mask)
    experts = self.experts
    output = torch.zeros_like(flat)
    loads = torch.count_nonzero(combine, dim=0).tolist()
    for index, load in enumerate(loads):
        if load == 0:
            continue
        tokens = combine[:, index].nonzero().squeeze(-1)
        rows = experts[f"expert_{index}"](flat[tokens]) * combine[tokens, index, None]
        if experts.moe_token_dropout > 0:
            if self.training:
                rows = experts.token_dropout(rows)
            else:
                rows = rows * (1 - experts.moe_token_dropout)
        output.index_add_(0, tokens, rows.to(output.dtype))
    return output.reshape(batch_size, sequence_length, hidden_dim)
