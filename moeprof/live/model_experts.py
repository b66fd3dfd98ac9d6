"""The experts of a model: how they are stored, and something else standing in for them.

Shared by everything that runs a model's experts in another way; what that way is, is left out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from moeprof.errors import UsageError
from moeprof.live.paper_lm import PaperExperts, PaperMoe
from moeprof.live.stacking import ExpertLayout, check_layout, expert_layout
from moeprof.recording import adapters
from moeprof.recording.sites import ID_ARGUMENTS, WEIGHT_ARGUMENTS, FoundSite, find_sites
from moeprof.zoo.dispatch import needs_nllb_dispatch_fix

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [T, d_model], ids [T, k], weights [T, k]) -> [T, d_model]; an id of -1 executes nothing."""


def readable_experts(model: nn.Module) -> tuple[list[FoundSite], list[ExpertLayout]]:
    """Returns the MoE sites of ``model`` and how their experts are stored.

    Each layout has been seen to compute what the model's own experts do.

    Raises:
        UsageError: Experts cannot be read, or the model cannot be run in another way.
        CaptureError: The model has no MoE layers.
    """
    found = find_sites(model)
    layouts = [_readable(site) for site in found]
    _check_model(model, found, layouts)
    return found, layouts


def experts_module(site: FoundSite) -> nn.Module:
    """Returns the module that holds a site's experts.

    Raises:
        UsageError: The experts of this kind of site cannot be run in another way.
    """
    if site.adapter in (adapters.NLLB, adapters.SWITCH):
        experts = site.modules.experts or getattr(site.modules.block, "experts", None)
        assert isinstance(experts, nn.Module)
        return experts
    if site.adapter.name != "experts_arguments" or site.modules.experts is None:
        raise UsageError(
            f"{site.name}: experts of this kind ({site.adapter.name}) cannot be run in another way",
            hint="their module has to take rows, expert ids and weights",
        )
    return site.modules.experts


def weights_owner(site: FoundSite) -> nn.Module:
    """Returns the module within which a site's weights must stay where they are.

    Where a block is stood in for, it no longer calls the experts module that it holds.
    """
    return site.modules.block if site.adapter is adapters.NLLB else experts_module(site)


def _readable(site: FoundSite) -> ExpertLayout:
    """Returns the layout of a site's experts, once it has been seen to compute the same."""
    module = experts_module(site)
    if site.num_weighted != site.num_experts:
        raise UsageError(f"{site.name}: some of its experts have no weights and compute nothing")
    layout = expert_layout(module)
    if layout.num_experts != site.num_experts:
        raise UsageError(
            f"{site.name} has {site.num_experts} experts but holds {layout.num_experts}",
            hint="models split over devices cannot be read",
        )
    if layout.device.type == "meta":
        raise UsageError(f"{site.name} has no weights in memory (device meta)")
    if isinstance(module, PaperExperts):
        check_layout(module, layout, functools.partial(_call_paper, module))
    elif layout.modules:
        check_layout(module, layout)
    else:
        check_layout(module, layout, _caller(site, module))
    return layout


def _call_paper(
    module: PaperExperts, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    every = torch.arange(module.num_experts, device=ids.device)
    ends = torch.searchsorted(ids[:, 0].contiguous(), every, right=True, out_int32=True)
    return PaperExperts.forward(module, rows, ids, weights, ids[:, 0], ends) * weights


def _caller(site: FoundSite, module: nn.Module) -> Callable[..., torch.Tensor]:
    """Returns a call of a module's own forward with (rows, ids, weights), whatever their order."""
    names = _argument_names(module)

    def call(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given = {names[0]: rows, names[1]: ids, names[2]: weights}
        out: torch.Tensor = type(module).forward(module, **given)
        return out.reshape(rows.shape)

    return call


def _argument_names(module: nn.Module) -> tuple[str, str, str]:
    names = _all_names(module)
    ids = next((name for name in names if name in ID_ARGUMENTS), None)
    weights = next((name for name in names if name in WEIGHT_ARGUMENTS), None)
    if ids is None or weights is None or names[0] in (ids, weights):
        raise UsageError(
            f"{type(module).__name__} takes {', '.join(names)}: which are its rows, ids and "
            "weights is not known",
            hint=f"ids: {', '.join(ID_ARGUMENTS)}; weights: {', '.join(WEIGHT_ARGUMENTS)}",
        )
    return names[0], ids, weights


def _check_model(
    model: nn.Module, found: Sequence[FoundSite], layouts: Sequence[ExpertLayout]
) -> None:
    if model.training:
        raise UsageError("the model is in training mode", hint="call model.eval() first")
    if needs_nllb_dispatch_fix(model):
        raise UsageError(
            "this NLLB-MoE model does not execute the experts that its router chooses",
            hint="call moeprof.zoo.fix_nllb_dispatch(model) first",
        )
    devices = {layout.device for layout in layouts}
    if len(devices) > 1:
        raise UsageError(
            f"the experts lie on several devices: {', '.join(sorted(map(str, devices)))}",
            hint="put the model on one device",
        )
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for site, layout in zip(found, layouts, strict=True):
        for part in layout.parts:
            names = holders.get(id(part.parameter), [])
            if len(names) > 1:
                raise UsageError(
                    f"{site.name}: weights of its experts are tied ({names[0]} is {names[1]})"
                )


def standing_forwards(
    site: FoundSite, num_experts: int, run: RunExperts
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Returns the modules whose forward changes so that ``run`` stands in, and those forwards.

    The forwards hold none of these modules.

    Args:
        site: The site.
        num_experts: Its experts.
        run: What computes instead.
    """
    experts = experts_module(site)
    if site.adapter is adapters.NLLB:
        return [
            (site.modules.block, functools.partial(_nllb_forward, ref(site.modules.block), run))
        ]
    if site.adapter is adapters.SWITCH:
        return [(experts, functools.partial(_switch_forward, run))]
    if isinstance(experts, PaperExperts):
        block = site.modules.block
        assert isinstance(block, PaperMoe)
        return [
            (block, functools.partial(_paper_forward, ref(block))),
            (experts, functools.partial(_paper_experts_forward, run)),
        ]
    names = _argument_names(experts)
    every = _all_names(experts)
    return [(experts, functools.partial(_arguments_forward, run, num_experts, names, every))]


def _all_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _arguments_forward(
    run: RunExperts,
    num_experts: int,
    names: tuple[str, str, str],
    every: tuple[str, ...],
    *args: torch.Tensor,
    **kwargs: torch.Tensor,
) -> torch.Tensor:
    given = {**dict(zip(every, args, strict=False)), **kwargs}
    hidden, ids, weights = (given[name] for name in names)
    top_k = ids.shape[-1]
    ids = ids.reshape(-1, top_k)
    # Not (tokens, -1): there may be no token.
    if weights.numel() == ids.numel():
        gates = weights.reshape(ids.shape)
    else:  # Some blocks hand over weights for all experts.
        gates = weights.reshape(-1, weights.shape[-1])
        gates = gates.gather(1, ids.long().clamp(min=0, max=num_experts - 1))
    # An id past the last expert marks an empty slot, as -1 does.
    ids = torch.where(ids >= num_experts, -1, ids)
    out = run(hidden.reshape(-1, hidden.shape[-1]), ids, gates)
    return out.view(hidden.shape)


def _paper_forward(found: ReferenceType[PaperMoe], hidden_states: torch.Tensor) -> torch.Tensor:
    block = found()
    assert block is not None
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids, weights = block.gate(flat)
    # By their module: a recorder watches its calls.
    out: torch.Tensor = block.experts(flat, ids, weights)
    return out.view_as(hidden_states)


def _paper_experts_forward(
    run: RunExperts, rows: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return run(rows, top_k_index, top_k_weights)


def _nllb_forward(
    found: ReferenceType[nn.Module],
    run: RunExperts,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    block: Any = found()
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, combine, _ = block.router(flat, padding_mask)
    weights, ids = combine.topk(min(2, combine.shape[-1]), dim=-1)
    ids = torch.where(weights > 0, ids, -1)
    weights = weights * (1.0 - block.experts.moe_token_dropout)
    return run(flat, ids, weights).view(hidden_states.shape)


def _switch_forward(
    run: RunExperts,
    hidden_states: torch.Tensor,
    selected_experts: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    chosen = selected_experts.reshape(-1, selected_experts.shape[-1])
    ids = torch.where(chosen.amax(dim=1, keepdim=True) > 0, chosen.argmax(dim=1, keepdim=True), -1)
    return run(hidden_states, ids, routing_weights.reshape(-1, 1))
