"""Gating kernels: what runs between the router's choice and the layer's output.

Every kernel has one signature and computes the same numbers::

    kernel(hidden, expert_ids, weights, experts, *, capacity=None) -> out

with ``hidden`` [T, d_model], ``expert_ids`` [T, k] (-1: the slot is not executed), ``weights``
[T, k] and `moeprof.live.experts.ExpertWeights`; ``out`` is [T, d_model] in the dtype of ``hidden``.
``capacity`` is the number of rows an expert takes; what comes later is dropped, all first choices
before all second ones (fairseq's ``top2gating``; GShard, arXiv 2006.16668, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from moeprof.errors import UsageError
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels.fused import dynamic
from moeprof.live.kernels.plain import dynamic_grouped, dynamic_loop
from moeprof.live.kernels.static import static_grouped, static_index, static_mask

__all__ = [
    "KERNELS",
    "GatingKernel",
    "dynamic",
    "dynamic_grouped",
    "dynamic_loop",
    "kernel_named",
    "static_grouped",
    "static_index",
    "static_mask",
]


class GatingKernel(Protocol):
    """What every kernel looks like."""

    def __call__(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        experts: ExpertWeights,
        *,
        capacity: int | None = None,
    ) -> torch.Tensor:
        """Returns the layer's output [T, d_model]."""


KERNELS: dict[str, GatingKernel] = {
    "static_mask": static_mask,
    "static_grouped": static_grouped,
    "static_index": static_index,
    "dynamic_loop": dynamic_loop,
    "dynamic_grouped": dynamic_grouped,
    "dynamic": dynamic,
}


def kernel_named(name: str) -> Callable[..., torch.Tensor]:
    """Returns the kernel called ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in KERNELS:
        raise UsageError(
            f"unknown gating {name!r}", hint=f"choose one of: {', '.join(sorted(KERNELS))}"
        )
    return KERNELS[name]
