"""Gives a model another implementation of its gating, for as long as it is wanted."""

from __future__ import annotations

import functools
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
    standing_forwards,
    weights_owner,
)
from moeprof.live.stacking import stack_experts
from moeprof.live.stand_ins import (
    WeightWatch,
    claim_experts,
    free_experts,
    guarded,
    replace_forward,
)

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
        num_sites: int,
        undo: list[Callable[[], None]],
    ) -> None:
        self.gating = gating
        self.token_fraction = token_fraction
        self.num_sites = num_sites
        self._undo = undo
        self._is_entered = False

    def restore(self) -> None:
        """Gives the model its own implementation back; a second call does nothing."""
        _take_back(self._undo)

    def __enter__(self) -> AppliedGating:
        if not self._undo or self._is_entered:
            state = "entered" if self._undo else "taken back"
            raise UsageError(
                f"this gating was {state} already",
                hint=f"apply it anew for every with block: apply_gating(model, {self.gating!r})",
            )
        self._is_entered = True
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

    For inference: a backward pass through the experts is refused. Experts that a model keeps as
    modules are copied; once their weights change, or parameters move, a forward pass is refused
    (what is written through ``.data`` is not noticed; where a layer has more than 64 parameters of
    experts, some that move are noticed a few passes later, see `stand_ins.WeightWatch`). A graph
    of `torch.compile` or `torch.export` does not look at the weights again. Under
    ``torch.no_grad()`` layers with static gating compile without a break.

    Args:
        model: A model in evaluation mode: any whose experts `moeprof.live.stack_experts` reads.
        gating: One of `moeprof.live.kernels.KERNELS`.
        token_fraction: Slots per expert as a share of the tokens of a forward pass; static only.

    Returns:
        A handle: ``restore()`` takes the change back, and so does leaving it as a context. If it is
        dropped the change stays, until something else is applied to the model.

    Raises:
        UsageError: There is no such gating, the fraction makes no sense, the model's experts
            cannot be read, or something else runs them already.
    """
    kernel = kernel_named(gating)
    if token_fraction is not None:
        if gating not in SLOTTED:
            raise UsageError(
                f"{gating} has no slots to limit: token_fraction is for static gating",
                hint=f"static are: {', '.join(SLOTTED)}",
            )
        try:
            fits = 0 < token_fraction <= 1
        except TypeError:
            fits = False
        if not fits:
            raise UsageError(
                f"token_fraction must be a number above 0 and up to 1, got {token_fraction!r}"
            )
    technique = f"apply_gating(model, {gating!r})"
    free_experts(model, technique)
    found, layouts = readable_experts(model)
    claim = claim_experts(map(experts_module, found), technique)
    undo = [claim.release]
    try:
        forwards = []
        for site, layout in zip(found, layouts, strict=True):
            module = experts_module(site)
            run = _runner(kernel, stack_experts(module), token_fraction)
            parameters = (part.parameter for part in layout.parts)
            watch = WeightWatch(weights_owner(site), parameters, is_shared=layout.is_stacked)
            run = guarded(run, watch, technique, site.name)
            forwards += standing_forwards(site, layout.num_experts, run)
        for module, forward in forwards:
            undo.append(replace_forward(module, forward))
    except BaseException:
        _take_back(undo)
        raise
    applied = AppliedGating(gating, token_fraction, len(found), undo)
    claim.hand_out(applied, functools.partial(_take_back, undo))
    return applied


def _take_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


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
