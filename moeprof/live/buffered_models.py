"""Buffers the experts of a whole model: they move to host memory, slots take their place.

The model keeps its modules, parameters and hooks, so that it can be recorded as before; only the
forward of its experts is another one for a while. Inference only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moeprof.live.buffer_settings import BufferedSite, BufferSettings
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import ExpertStore, store_of_layout
from moeprof.live.experts import ExpertWeights
from moeprof.live.model_experts import (
    experts_module,
    readable_experts,
    standing_forwards,
    weights_owner,
)
from moeprof.live.paper_lm import PaperExperts
from moeprof.live.stacking import ExpertLayout
from moeprof.live.stand_ins import (
    WeightWatch,
    claim_experts,
    free_experts,
    guarded,
    replace_forward,
)
from moeprof.recording.anatomy import anatomy
from moeprof.recording.sites import FoundSite

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace


TECHNIQUE = "buffer_experts"


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
    prefetch: int = 0,
    future: Trace | None = None,
    device: torch.device | str | None = None,
) -> Iterator[ExpertBuffer]:
    """Keeps a model's experts in host memory and ``capacity`` of them per cache on its device.

    Outputs are the same bits as with ``capacity=None``, which leaves every expert on the device and
    runs the same kernels; experts computed on the host differ within rounding. Rows of padding are
    executed as the model does, so their experts are looked up too; a trace leaves padding out, so
    lookups equal its replay only in batches without padding.

    Weights must not change meanwhile: once they do, or parameters move, a forward pass is refused
    (what is written through ``.data`` is not noticed; where a layer has more than 64 parameters of
    experts, some that move are noticed a few passes later). A backward pass through the experts is
    refused. Stacked parameters are strided views: ``state_dict`` can be taken,
    ``save_pretrained`` of transformers fails; save before or afterwards.

    On leaving, experts are brought back to where they lay. One that finds no room there stays in
    host memory, and all the others come back before the error is raised.

    Args:
        model: A model in evaluation mode on one device.
        capacity: See `BufferSettings`, as for what follows.
        policy: See there.
        scope: See there.
        miss: See there.
        host_rows: See there.
        initial: See there.
        staging: See there.
        prefetch: See there.
        future: See there.
        device: Where experts run; when None where they lie, or where the rest of the model lies if
            they lie on the host already (the way to run a model that does not fit).

    Yields:
        The buffer: `ExpertBuffer.lookups`, `counts`, `memory`, `audit`.

    Raises:
        UsageError: The model's experts cannot be read, something else runs them already, or a
            setting makes no sense.
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
        prefetch=prefetch,
        future=future,
    )
    free_experts(model, TECHNIQUE)
    found, layouts = readable_experts(model)
    target = _target(model, layouts) if device is None else torch.device(device)
    stores: list[ExpertStore] = []
    undo = [claim_experts(map(experts_module, found), TECHNIQUE).release]
    try:
        for layout in layouts:
            store = store_of_layout(layout, pinned=target.type == "cuda")
            stores.append(store)
            undo.append(functools.partial(_take_home, layout, layout.device, store))
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
            for module, forward in _forwards_of(site, layout, buffer, index):
                undo.append(replace_forward(module, forward))
        for stack in anatomy(model, found).stacks.values():
            handle = stack.register_forward_pre_hook(lambda *_: buffer.begin_step())
            undo.append(handle.remove)
        yield buffer
    except BaseException as error:
        _leave(undo, error)
        raise
    failed = _leave(undo)
    if failed is not None:
        raise failed


def _leave(
    undo: Sequence[Callable[[], None]], first: BaseException | None = None
) -> BaseException | None:
    """Takes everything back, last things first, whatever fails.

    Returns:
        ``first``, or else the first error on the way; a note on it tells of each later one.
    """
    for step in reversed(undo):
        try:
            step()
        except BaseException as error:  # The other steps are due nevertheless.
            if first is None:
                first = error
            else:
                first.add_note(f"on leaving {TECHNIQUE}: {type(error).__name__}: {error}")
    return first


@dataclass
class _Current:
    """The weights that expert modules of a site read while they run."""

    weights: ExpertWeights | None = None
    expert: int = 0


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
            _lay_in(part.parameter, view.mT if part.transposed else view)
            continue
        view = store.shape.views(store.block(part.expert))[part.tensor]
        rows = part.matrix(part.expert).shape[0]
        own = view[part.start : part.start + rows]
        _lay_in(part.parameter, own.t() if part.transposed else own)


def _lay_in(parameter: torch.Tensor, memory: torch.Tensor) -> None:
    """Lets a parameter lie in memory of the same shape, and stay the kind of tensor it is.

    An inference tensor could never be trained again; and one made normal, having no version, could
    not even be read.
    """
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        own = torch.empty(0, dtype=memory.dtype, device=memory.device)
        own.set_(
            memory.untyped_storage(),
            memory.storage_offset(),
            memory.shape,
            memory.stride(),
        )
        parameter.data = own


def _take_home(layout: ExpertLayout, device: torch.device, store: ExpertStore) -> None:
    """Brings a module's parameters back and closes the store that they lay in."""
    left: list[torch.Tensor] = []
    errors = []
    for part in layout.parts:
        try:
            _bring_back(part.parameter, device)
        except BaseException as error:  # There may be room for the others.
            left.append(part.parameter)
            errors.append(error)
    if errors:
        # What lies in the store has to be gone first.
        weakref.finalize(left[0], store.close).atexit = False
        errors[0].add_note(
            f"{len(left)} of {len(layout.parts)} parameters of experts stay in host memory"
        )
        raise errors[0]
    store.close()


def _bring_back(parameter: torch.Tensor, device: torch.device) -> None:
    """Gives a parameter memory of its own on the device again."""
    source = parameter.data
    with torch.no_grad():
        home = torch.empty(source.shape, dtype=source.dtype, device=device).copy_(source)
    _lay_in(parameter, home)


def _module_runner(
    layout: ExpertLayout, undo: list[Callable[[], None]]
) -> Callable[[int, ExpertWeights, torch.Tensor], torch.Tensor]:
    """Returns a function that calls expert modules, hooks and all, on weights in slots."""
    current = _Current()

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert current.weights is not None
        return current.weights.run(current.expert, hidden_states)

    for module in layout.modules:
        undo.append(replace_forward(module, forward))

    def run(expert: int, weights: ExpertWeights, rows: torch.Tensor) -> torch.Tensor:
        current.weights = weights
        current.expert = 0 if weights.num_experts == 1 else expert
        out: torch.Tensor = layout.modules[expert](rows)
        return out

    return run


def _forwards_of(
    site: FoundSite, layout: ExpertLayout, buffer: ExpertBuffer, index: int
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Returns the modules whose forward changes, and those forwards."""
    experts = experts_module(site)
    parameters = (part.parameter for part in layout.parts)
    watch = WeightWatch(weights_owner(site), parameters, is_shared=False)
    if isinstance(experts, PaperExperts):
        run_sorted = functools.partial(buffer.run_sorted, index)
        guarded_run = guarded(run_sorted, watch, TECHNIQUE, site.name)
        return [(experts, functools.partial(_paper_forward, guarded_run))]
    run = guarded(functools.partial(buffer.run, index), watch, TECHNIQUE, site.name)
    return standing_forwards(site, layout.num_experts, run)


def _paper_forward(
    run_sorted: Callable[..., torch.Tensor],
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    row_experts: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    return run_sorted(rows, ends)
