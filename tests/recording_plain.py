"""A plain torch model that nothing gives away as a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NUM_EXPERTS, TOP_K, WIDTH = 6, 2, 16


class OddExperts(nn.Module):
    """Experts that nothing about their names or arguments gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH, 24) * 0.3)
        self.down = nn.Parameter(torch.randn(NUM_EXPERTS, 24, WIDTH) * 0.3)
        self.num_experts = NUM_EXPERTS

    def forward(self, x: Any, which: Any, how_much: Any) -> Any:
        y = torch.zeros_like(x)
        for slot in range(which.shape[1]):
            up, down = self.up[which[:, slot]], self.down[which[:, slot]]
            hidden = torch.relu(torch.bmm(x.unsqueeze(1), up))
            y = y + torch.bmm(hidden, down).squeeze(1) * how_much[:, slot, None]
        return y


class OddBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NUM_EXPERTS)
        self.experts = OddExperts()

    def forward(self, x: Any) -> Any:
        flat = x.reshape(-1, WIDTH)
        weights, ids = torch.softmax(self.gate(flat), dim=-1).topk(TOP_K)
        return self.experts(flat, ids, weights).reshape(x.shape)


class OddModel(nn.Module):
    """Three layers; the last sees the last token of each sequence only, where ``prune`` is set."""

    def __init__(self, *, prune: bool = False) -> None:
        super().__init__()
        self.prune = prune
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(OddBlock() for _ in range(3))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            if self.prune and i == len(self.layers) - 1:
                x = x[:, -1:]
            x = x + layer(x)
        return self.head(x)
