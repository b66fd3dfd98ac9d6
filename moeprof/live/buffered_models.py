"""Buffers the experts of a whole model: they move to host memory, slots take their place.

The model keeps its modules, parameters and hooks, so that it can be recorded as before; only the
forward of its experts is another one for a while. Inference only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moeprof.errors import UsageError
from moeprof.live.expert_buffer import BufferedSite, BufferSettings, ExpertBuffer
from moeprof.live.expert_store import ExpertStore, store_of_layout
from moeprof.live.experts import ExpertWeights
from moeprof.live.paper_lm import PaperExperts
from moeprof.live.stacking import ExpertLayout, check_layout, expert_layout
from moeprof.recording import adapters
from moeprof.recording.anatomy import anatomy
from moeprof.recording.sites import ID_ARGUMENTS, WEIGHT_ARGUMENTS, FoundSite, find_sites
from moeprof.zoo.dispatch import needs_nllb_dispatch_fix

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace


@contextmanager
def buffer_experts(
    model: nn.Module,
    *,
    capacity: int | float | str | None,
    policy: str = "lru",
    scope: str = "layer",
    miss: str = "load",
    host_rows: int = 1,
    initial: str = "empty",
    staging: int | None = None,
    future: Trace | None = None,
    device: torch.device | str | None = None,
) -> Iterator[ExpertBuffer]:
    """Keeps a model's experts in host memory and ``capacity`` of them per cache on its device.

    Outputs are the same bits as with ``capacity=None``, which leaves every expert on the device and
    runs the same kernels; experts computed on the host differ within rounding. Rows of padding are
    executed as the model does, so their experts are looked up too; a trace leaves padding out, so
    lookups equal its replay only in batches without padding.

    Args:
        model: A model in evaluation mode on one device.
        capacity: See `BufferSettings`, as for what follows.
        policy: See there.
        scope: See there.
        miss: See there.
        host_rows: See there.
        initial: See there.
        staging: See there.
        future: See there.
        device: Where experts run; when None where they lie, or where the rest of the model lies if
            they lie on the host already (the way to run a model that does not fit).

    Yields:
        The buffer: `ExpertBuffer.lookups`, `counts`, `memory`, `audit`.

    Raises:
        UsageError: The model's experts cannot be read, or a setting makes no sense.
        CaptureError: The model has no MoE layers.
    """
    settings = BufferSettings(
        capacity=capacity,
        policy=policy,
        scope=scope,
        miss=miss,
        host_rows=host_rows,
        initial=initial,
        staging=staging,
        future=future,
    )
    found = find_sites(model)
    layouts = [_readable(site) for site in found]
    _check_model(model, found, layouts)
    target = _target(model, layouts) if device is None else torch.device(device)
    stores: list[ExpertStore] = []
    undo: list[Callable[[], None]] = []
    try:
        for layout in layouts:
            store = store_of_layout(layout, pinned=target.type == "cuda")
            stores.append(store)
            undo.append(functools.partial(_bring_back, layout, layout.device))
            _move_out(layout, store)
        sites = [
            BufferedSite(
                site=index,
                stack=site.stack,
                layer=site.layer,
                store=store,
                run=_module_runner(layout, undo) if layout.modules else None,
            )
            for index, (site, layout, store) in enumerate(zip(found, layouts, stores, strict=True))
        ]
        buffer = ExpertBuffer(sites, settings, device=target)
        undo.append(buffer.close)
        for index, (site, layout) in enumerate(zip(found, layouts, strict=True)):
            module, forward = _forward_of(site, layout, buffer, index)
            undo.append(_replace_forward(module, forward))
        for stack in anatomy(model, found).stacks.values():
            handle = stack.register_forward_pre_hook(lambda *_: buffer.begin_step())
            undo.append(handle.remove)
        yield buffer
    finally:
        for step in reversed(undo):
            step()
        for store in stores:
            store.close()


@dataclass
class _Current:
    """The weights that expert modules of a site read while they run."""

    weights: ExpertWeights | None = None
    expert: int = 0


def _experts_module(site: FoundSite) -> nn.Module:
    if site.adapter in (adapters.NLLB, adapters.SWITCH):
        experts = site.modules.experts or getattr(site.modules.block, "experts", None)
        assert isinstance(experts, nn.Module)
        return experts
    if site.adapter.name != "experts_arguments" or site.modules.experts is None:
        raise UsageError(
            f"{site.name}: experts of this kind ({site.adapter.name}) cannot be buffered",
            hint="their module has to take rows, expert ids and weights",
        )
    return site.modules.experts


def _readable(site: FoundSite) -> ExpertLayout:
    """Returns the layout of a site's experts, once it has been seen to compute the same."""
    module = _experts_module(site)
    if site.num_weighted != site.num_experts:
        raise UsageError(f"{site.name}: some of its experts have no weights and compute nothing")
    layout = expert_layout(module)
    if layout.num_experts != site.num_experts:
        raise UsageError(
            f"{site.name} has {site.num_experts} experts but holds {layout.num_experts}",
            hint="models split over devices cannot be buffered",
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


def _target(model: nn.Module, layouts: Sequence[ExpertLayout]) -> torch.device:
    """Returns where experts run."""
    own = {id(part.parameter) for layout in layouts for part in layout.parts}
    others = {each.device for each in model.parameters() if id(each) not in own}
    if layouts[0].device.type == "cpu" and len(others) == 1:
        return others.pop()
    return layouts[0].device


def _move_out(layout: ExpertLayout, store: ExpertStore) -> None:
    """Lets a module's parameters lie in the store, so that nothing of them stays on the device."""
    stacked = store.shape.stacked_views(store.memory, store.num_experts)
    for part in layout.parts:
        if part.expert is None:
            view = stacked[part.tensor]
            part.parameter.data = view.mT if part.transposed else view
            continue
        view = store.shape.views(store.block(part.expert))[part.tensor]
        rows = part.matrix(part.expert).shape[0]
        own = view[part.start : part.start + rows]
        part.parameter.data = own.t() if part.transposed else own


def _bring_back(layout: ExpertLayout, device: torch.device) -> None:
    """Gives a module's parameters memory of their own on the device again."""
    for part in layout.parts:
        source = part.parameter.data
        part.parameter.data = torch.empty(source.shape, dtype=source.dtype, device=device).copy_(
            source
        )


def _module_runner(
    layout: ExpertLayout, undo: list[Callable[[], None]]
) -> Callable[[int, ExpertWeights, torch.Tensor], torch.Tensor]:
    """Returns a function that calls expert modules, hooks and all, on weights in slots."""
    current = _Current()

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert current.weights is not None
        return current.weights.run(current.expert, hidden_states)

    for module in layout.modules:
        undo.append(_replace_forward(module, forward))

    def run(expert: int, weights: ExpertWeights, rows: torch.Tensor) -> torch.Tensor:
        current.weights = weights
        current.expert = 0 if weights.num_experts == 1 else expert
        out: torch.Tensor = layout.modules[expert](rows)
        return out

    return run


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives one instance another forward and returns what takes it back."""
    own = vars(module).get("forward")
    module.forward = forward

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    return restore


def _forward_of(
    site: FoundSite, layout: ExpertLayout, buffer: ExpertBuffer, index: int
) -> tuple[nn.Module, Callable[..., Any]]:
    """Returns the module whose forward changes, and that forward."""
    experts = _experts_module(site)
    if site.adapter is adapters.NLLB:
        return site.modules.block, functools.partial(_nllb_forward, site, buffer, index)
    if site.adapter is adapters.SWITCH:
        return experts, functools.partial(_switch_forward, buffer, index)
    if isinstance(experts, PaperExperts):
        return experts, functools.partial(_paper_forward, buffer, index)
    names = _argument_names(experts)
    every = _all_names(experts)
    return experts, functools.partial(_arguments_forward, buffer, index, names, every)


def _all_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _arguments_forward(
    buffer: ExpertBuffer,
    index: int,
    names: tuple[str, str, str],
    every: tuple[str, ...],
    *args: torch.Tensor,
    **kwargs: torch.Tensor,
) -> torch.Tensor:
    given = {**dict(zip(every, args, strict=False)), **kwargs}
    hidden, ids, weights = (given[name] for name in names)
    top_k = ids.shape[-1]
    ids = ids.reshape(-1, top_k)
    count = buffer.sites[index].store.num_experts
    gates = weights.reshape(ids.shape[0], -1)
    if gates.shape != ids.shape:
        # Some blocks hand over weights for all experts.
        gates = gates.gather(1, ids.long().clamp(min=0, max=count - 1))
    # An id past the last expert marks an empty slot, as -1 does.
    ids = torch.where(ids >= count, -1, ids)
    out = buffer.run(index, hidden.reshape(-1, hidden.shape[-1]), ids, gates)
    return out.view(hidden.shape)


def _paper_forward(
    buffer: ExpertBuffer,
    index: int,
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    row_experts: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    return buffer.run_sorted(index, rows, ends)


def _nllb_forward(
    site: FoundSite,
    buffer: ExpertBuffer,
    index: int,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    block: Any = site.modules.block
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    _, combine, _ = block.router(flat, padding_mask)
    weights, ids = combine.topk(min(2, combine.shape[-1]), dim=-1)
    ids = torch.where(weights > 0, ids, -1)
    weights = weights * (1.0 - block.experts.moe_token_dropout)
    return buffer.run(index, flat, ids, weights).view(hidden_states.shape)


def _switch_forward(
    buffer: ExpertBuffer,
    index: int,
    hidden_states: torch.Tensor,
    selected_experts: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    chosen = selected_experts.reshape(hidden_states.shape[0], -1)
    ids = torch.where(chosen.amax(dim=1, keepdim=True) > 0, chosen.argmax(dim=1, keepdim=True), -1)
    return buffer.run(index, hidden_states, ids, routing_weights.reshape(-1, 1))
