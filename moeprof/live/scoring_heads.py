"""Scores tokens without ever holding all their logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CHUNK_TOKENS = 4096


class ScoringHead(nn.Module):
    """An output head that returns each token's loss instead of its logits.

    Args:
        weight: [vocab_size, d_model].
        chunk_tokens: Tokens whose logits are held at once.
    """

    def __init__(self, weight: torch.Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__()
        self.weight = weight
        self.chunk_tokens = chunk_tokens
        self.targets: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the loss of every token, [B, S], for `targets` [B, S].

        Args:
            hidden: [B, S, d_model].
        """
        assert self.targets is not None
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), self.targets.reshape(-1)
        losses = torch.empty(flat.shape[0], dtype=torch.float32, device=flat.device)
        for start in range(0, flat.shape[0], self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            logits = F.linear(flat[rows], self.weight)
            losses[rows] = F.cross_entropy(logits.float(), targets[rows], reduction="none")
        return losses.view(hidden.shape[:-1])
