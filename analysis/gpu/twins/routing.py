"""The layer that routes: gate, dispatch, experts and combination, fast enough to train.

Dynamic gating with fairseq's rules: softmax in single precision, both experts always taken, their
weights made to sum to 1, nothing dropped. Leaves out the layers around it (`model`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from analysis.gpu.twins.shape import TwinConfig
from moeprof.live.grouping import can_group


class _Gather(torch.autograd.Function):
    """Rows by index, where each row is taken equally often; its gradient is a gather too.

    The gradient that torch knows adds rows atomically; this one brings them into token order and
    sums the few that belong together.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, take: torch.Tensor, back: torch.Tensor
    ) -> torch.Tensor:
        """Returns ``rows[take]``; ``back`` [rows, times] is where each row went."""
        ctx.save_for_backward(back)
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Returns the gradient of ``rows``."""
        (back,) = ctx.saved_tensors
        (grad,) = grads
        taken = grad.index_select(0, back.reshape(-1))
        if back.shape[1] > 1:
            taken = taken.view(*back.shape, grad.shape[-1]).sum(1)
        return taken, None, None


class TwinGate(nn.Module):
    """Chooses experts; shows its logits, from which the balancing loss follows."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns ids [T, k] best first, weights [T, k] and logits [T, experts] (float32)."""
        logits = F.linear(hidden_states.float(), self.weight.float())
        chosen, top_k_index = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        weights = chosen / chosen.sum(dim=-1, keepdim=True)
        return top_k_index, weights.to(hidden_states.dtype), logits


class TwinExperts(nn.Module):
    """Two-matrix experts with a rectifier between, in one tensor per matrix, without biases."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        shape = (config.num_experts, config.expert_width, config.d_model)
        self.w_in = nn.Parameter(torch.empty(shape))
        self.w_out = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(
        self,
        rows: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Returns each row through its expert.

        Args:
            rows: [T * k, d_model], sorted by expert.
            top_k_index: [T, k] int64; shows a recorder which experts each token chose.
            top_k_weights: [T, k]; shows a recorder the weights that the combination applies.
            ends: [num_experts] int32, end of each expert's rows.
        """
        w_in, w_out = self.w_in.to(rows.dtype), self.w_out.to(rows.dtype)
        if can_group(self.w_in, rows):
            if torch.is_grad_enabled():
                # Grouped products need not write the gradient of an expert without rows.
                idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
                for weight in (w_in, w_out):
                    if weight.requires_grad:
                        weight.register_hook(
                            lambda grad, idle=idle: grad.masked_fill(idle[:, None, None], 0)
                        )
            hidden = F.relu(F.grouped_mm(rows, w_in.transpose(1, 2), offs=ends))
            return F.grouped_mm(hidden, w_out.transpose(1, 2), offs=ends)
        parts, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                hidden = F.relu(F.linear(rows[start:end], w_in[expert]))
                parts.append(F.linear(hidden, w_out[expert]))
            start = end
        return torch.cat(parts)


class TwinMoe(nn.Module):
    """A layer that routes: gate, dispatch, experts, combination.

    Attributes:
        balance: Balancing loss of the last pass that was asked to keep it.
        load: [num_experts] tokens per expert in that pass, over both choices.
    """

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.gate = TwinGate(config)
        self.experts = TwinExperts(config)
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.balance: torch.Tensor | None = None
        self.load: torch.Tensor | None = None

    def forward(
        self, hidden_states: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the layer's output for ``hidden_states`` [B, S, d_model].

        Args:
            hidden_states: The tokens.
            valid: [B, S] True for tokens, False for padding, which gets no output; None where all
                are tokens.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_index, weights, logits = self.gate(flat)
        if valid is not None:
            weights = weights * valid.reshape(-1, 1).to(weights.dtype)
        by_expert, order = top_k_index.reshape(-1).sort(stable=True)
        every = torch.arange(self.num_experts, device=order.device)
        ends = torch.searchsorted(by_expert, every, right=True, out_int32=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        rows = _Gather.apply(flat, order // self.top_k, back.view(-1, self.top_k))
        out = self.experts(rows, top_k_index, weights, ends)
        by_token = _Gather.apply(out, back, order[:, None]).view(*weights.shape, -1)
        if self.training:
            self._keep_balance(logits, top_k_index, valid, ends)
        combined: torch.Tensor = (by_token * weights[..., None]).sum(1)
        return combined.view_as(hidden_states)

    def _keep_balance(
        self,
        logits: torch.Tensor,
        top_k_index: torch.Tensor,
        valid: torch.Tensor | None,
        ends: torch.Tensor,
    ) -> None:
        """Keeps GShard's loss: experts x sum of mean probability x share of first choices."""
        ones = logits.new_ones(logits.shape[0])
        if valid is not None:
            ones = valid.reshape(-1).to(logits.dtype)
        num_tokens = ones.sum().clamp(min=1)
        first = logits.new_zeros(self.num_experts).index_add(0, top_k_index[:, 0], ones)
        probability = (torch.softmax(logits, dim=-1) * ones[:, None]).sum(0)
        self.balance = self.num_experts * (probability * first).sum() / num_tokens**2
        self.load = torch.diff(ends, prepend=ends.new_zeros(1)).detach()
