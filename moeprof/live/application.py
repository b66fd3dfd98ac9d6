"""Gives a model another implementation of its gating, for as long as it is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

import torch
from torch import nn

from moeprof.errors import UsageError
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels import GatingKernel, kernel_named
from moeprof.live.model_experts import (
    RunExperts,
    experts_module,
    readable_experts,
    replace_forward,
    standing_forward,
)
from moeprof.live.stacking import stack_experts

SLOTTED = ("static_mask", "static_grouped", "static_index")


class AppliedGating:
    """Another implementation of gating in a model; a context manager that takes it back.

    Attributes:
        gating: Its name.
        token_fraction: Slots per expert as a share of the tokens; None: nothing can be dropped.
        num_sites: MoE layers it was given to.
    """

    def __init__(
        self,
        gating: str,
        token_fraction: float | None,
        undo: list[Callable[[], None]],
    ) -> None:
        self.gating = gating
        self.token_fraction = token_fraction
        self.num_sites = len(undo)
        self._undo = undo

    def restore(self) -> None:
        """Gives the model its own implementation back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> AppliedGating:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def apply_gating(
    model: nn.Module, gating: str, *, token_fraction: float | None = None
) -> AppliedGating:
    """Changes how a model's MoE layers compute, not what: routers and weights stay the model's.

    With static gating and no ``token_fraction`` every expert has a slot for every token, so that
    nothing is dropped and the result is the same; with one, tokens beyond
    ``ceil(token_fraction x tokens)`` of an expert are dropped, all first choices being served
    before second ones (fairseq).

    Args:
        model: A model in evaluation mode: any whose experts `moeprof.live.stack_experts` reads.
        gating: One of `moeprof.live.kernels.KERNELS`.
        token_fraction: Slots per expert as a share of the tokens of a forward pass; static only.

    Returns:
        A handle: ``restore()`` takes the change back, and so does leaving it as a context.

    Raises:
        UsageError: There is no such gating, the fraction makes no sense, or the model's experts
            cannot be read.
    """
    kernel = kernel_named(gating)
    if token_fraction is not None:
        if gating not in SLOTTED:
            raise UsageError(
                f"{gating} has no slots to limit: token_fraction is for static gating",
                hint=f"static are: {', '.join(SLOTTED)}",
            )
        if not 0 < token_fraction <= 1:
            raise UsageError(f"token_fraction must lie above 0 and up to 1, got {token_fraction}")
    found, layouts = readable_experts(model)
    forwards = []
    for site, layout in zip(found, layouts, strict=True):
        experts = stack_experts(experts_module(site))
        run = _runner(kernel, experts, token_fraction)
        forwards.append(standing_forward(site, layout.num_experts, run))
    undo = [replace_forward(module, forward) for module, forward in forwards]
    return AppliedGating(gating, token_fraction, undo)


def _runner(
    kernel: GatingKernel, experts: ExpertWeights, token_fraction: float | None
) -> RunExperts:
    """Returns what stands in for a site's experts."""

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        capacity = None
        if token_fraction is not None:
            capacity = math.ceil(token_fraction * hidden.shape[0])
        return kernel(hidden, ids, weights, experts, capacity=capacity)

    return run
