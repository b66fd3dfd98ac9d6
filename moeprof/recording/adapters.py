"""How each kind of MoE module shows its routing: what to keep, and how to read it later.

Two steps, so that nothing waits for the device while the model runs: `capture` keeps references
inside a hook, `decode` turns host copies into expert ids, weights and slot statuses. Expert ids
are always the model's own choice; none is derived again from logits where the model shows it.
Leaves out finding the modules (`sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moeprof.trace.schema import NO_EXPERT, SlotStatus

Tensors = tuple[torch.Tensor, ...]
Hook = Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Tensors]


@dataclass(frozen=True)
class SlotTable:
    """Routing of one dispatch, padding rows included.

    Attributes:
        experts: [rows, top_k] int64, -1 where a slot holds no expert.
        weights: [rows, top_k] float32, what the model applied.
        status: [rows, top_k] uint8, `SlotStatus`.
    """

    experts: np.ndarray
    weights: np.ndarray
    status: np.ndarray


@dataclass(frozen=True)
class SiteModules:
    """The modules of one site; None where the model has no such module."""

    block: torch.nn.Module
    router: torch.nn.Module | None
    experts: torch.nn.Module | None


@dataclass(frozen=True)
class RoutingArguments:
    """The arguments of a forward that carry the routing.

    Attributes:
        ids: Name of the argument with expert ids, int [T, k].
        weights: Name of the argument with weights, float [T, k] or [T, num_experts].
        parameters: The forward's parameter names, self left out.
    """

    ids: str
    weights: str
    parameters: tuple[str, ...]

    def pick(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Returns the tensor given for an argument."""
        position = self.parameters.index(name)
        value = args[position] if len(args) > position else kwargs[name]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"argument {name!r} holds {type(value).__name__}, not a tensor")
        return value.detach()

    def replaced(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, torch.Tensor],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call with other tensors for some arguments."""
        positional, named = list(args), dict(kwargs)
        for name, value in values.items():
            position = self.parameters.index(name)
            if len(positional) > position:
                positional[position] = value
            else:
                named[name] = value
        return tuple(positional), named


@dataclass(frozen=True)
class Adapter:
    """How to read one kind of site.

    Attributes:
        name: Stored in the trace.
        source: Module whose call is watched: ``experts`` (before it runs) or ``router`` (after).
        capture: Picks the tensors to keep.
        decode: Turns host copies of them into a `SlotTable`; told the site's modules.
        arguments: Where the watched call carries the routing; None where its output does, or
            the choice is made inside.
    """

    name: str
    source: str
    capture: Hook
    decode: Callable[[Tensors, SiteModules], SlotTable]
    arguments: RoutingArguments | None = None


def _routed(experts: torch.Tensor, weights: torch.Tensor) -> SlotTable:
    """Returns a table of slots that all hold an expert, save those with a negative id."""
    ids = experts.to(torch.int64).numpy()
    empty = ids < 0
    return SlotTable(
        experts=np.where(empty, NO_EXPERT, ids),
        weights=np.where(empty, 0.0, weights.to(torch.float32).numpy()).astype(np.float32),
        status=np.where(empty, SlotStatus.UNUSED, SlotStatus.ROUTED).astype(np.uint8),
    )


def argument_adapter(ids: str | int, weights: str | int, parameters: list[str]) -> Adapter:
    """Returns an adapter for modules that are called with expert ids and weights.

    Args:
        ids: Name or position (0 = first after self) of the ids argument, int [T, k].
        weights: Name or position of the weights argument, float [T, k].
        parameters: The forward's parameter names, self left out.
    """

    def named(key: str | int) -> str:
        return parameters[key] if isinstance(key, int) else key

    arguments = RoutingArguments(named(ids), named(weights), tuple(parameters))

    def capture(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensors:
        return (
            arguments.pick(arguments.ids, args, kwargs),
            arguments.pick(arguments.weights, args, kwargs),
        )

    def decode(raw: Tensors, modules: SiteModules) -> SlotTable:
        experts, applied = raw
        k = experts.shape[-1]
        table = _routed(experts.reshape(-1, k), _gathered(applied, experts).reshape(-1, k))
        # Expert parallelism marks slots of other ranks with an id past the last expert.
        count = getattr(modules.experts, "num_experts", None)
        if isinstance(count, int) and (outside := table.experts >= count).any():
            table.status[outside] = SlotStatus.UNUSED
            table.experts[outside] = NO_EXPERT
        return table

    return Adapter(
        name="experts_arguments",
        source="experts",
        capture=capture,
        decode=decode,
        arguments=arguments,
    )


def _gathered(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Returns [T, k] weights; some blocks hand over weights for all E experts."""
    if weights.shape == experts.shape:
        return weights
    return weights.reshape(experts.shape[0], -1).gather(1, experts.to(torch.int64).clamp(min=0))


def callable_adapter(
    function: Callable[[torch.nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any],
) -> Adapter:
    """Returns an adapter around a user's function ``(module, args, kwargs, output)``.

    The function runs after the module and returns ``(ids [T, k], weights [T, k])``.
    """

    def capture(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensors:
        experts, weights = function(module, args, kwargs, output)
        return experts.detach(), weights.detach()

    def decode(raw: Tensors, modules: SiteModules) -> SlotTable:
        experts, weights = raw
        k = experts.shape[-1]
        return _routed(experts.reshape(-1, k), weights.reshape(-1, k))

    return Adapter(name="function", source="module", capture=capture, decode=decode)


def with_copies(adapter: Adapter) -> Adapter:
    """Returns an adapter that keeps copies, for modules that may be handed the same memory again.

    The models of transformers make new ids and weights in every pass, so references do there.
    """

    def capture(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensors:
        return tuple(t.clone() for t in adapter.capture(module, args, kwargs, output))

    return replace(adapter, capture=capture)


def _need(module: torch.nn.Module | None) -> Any:
    assert module is not None
    return module


def _keep_outputs(*positions: int) -> Hook:
    def capture(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Tensors:
        return tuple(output[position].detach() for position in positions)

    return capture


def _decode_nllb(raw: Tensors, modules: SiteModules) -> SlotTable:
    """Reads NllbMoeTop2Router's ``(top_1_mask, combine [T, E], logits [T, E])``.

    A zero in `combine` where the router wanted an expert is a capacity drop. The block multiplies
    expert outputs by ``1 - moe_token_dropout`` in evaluation, which is part of the weight applied.
    """
    top_1, combine, logits = raw[0], raw[1].float(), raw[2].float()
    policy = getattr(modules.router, "second_expert_policy", "all")
    if policy == "all":
        # What was dropped is what the logits wanted; after softmax and the cast, as in the router.
        probabilities = torch.softmax(logits, dim=-1).to(raw[1].dtype).float()
        first = _chosen(top_1 > 0, probabilities)
        second = _chosen(
            (combine > 0).scatter(1, first, False), logits.scatter(1, first, float("-inf"))
        )
        experts = torch.cat([first, second], dim=-1)
        weights = combine.gather(1, experts)
        wanted = probabilities.gather(1, experts)
        wanted = wanted / wanted.sum(dim=-1, keepdim=True)
        # A weight that underflows to zero on its own is a slot that was never filled.
        applied, unfilled = weights.numpy() > 0, wanted.numpy() == 0
        status = np.where(applied, SlotStatus.ROUTED, SlotStatus.DROPPED)
        status = np.where(unfilled & ~applied, SlotStatus.UNUSED, status)
        experts_np = np.where(status == SlotStatus.UNUSED, NO_EXPERT, experts.numpy())
    else:
        # "sampling" adds noise to the logits in place and "random" skips second experts, so what
        # was dropped cannot be told from what was never chosen: only what was applied is kept.
        weights, experts = combine.topk(2, dim=-1)
        used = weights.numpy() > 0
        experts_np = np.where(used, experts.numpy(), NO_EXPERT)
        status = np.where(used, SlotStatus.ROUTED, SlotStatus.UNUSED)
    scale = 1.0 - float(getattr(modules.experts, "moe_token_dropout", 0.0))
    return SlotTable(
        experts=experts_np.astype(np.int64),
        weights=(weights * scale).numpy().astype(np.float32),
        status=status.astype(np.uint8),
    )


def _chosen(shown: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Returns [T, 1] experts: the first one shown, else the one with the highest score."""
    derived = scores.argmax(dim=-1, keepdim=True)
    return torch.where(
        shown.any(dim=-1, keepdim=True), shown.int().argmax(dim=-1, keepdim=True), derived
    )


def _decode_switch(raw: Tensors, modules: SiteModules) -> SlotTable:
    """Reads SwitchTransformersTop1Router's ``(probability [T, 1], one-hot [T, 1, E], ...)``."""
    probability, one_hot = raw
    one_hot = one_hot.reshape(-1, one_hot.shape[-1])
    kept = one_hot.sum(dim=-1, keepdim=True).numpy() > 0
    experts = np.where(kept, one_hot.argmax(dim=-1, keepdim=True).numpy(), NO_EXPERT)
    weights = probability.reshape(-1, 1).float().numpy() * kept
    status = np.where(kept, SlotStatus.ROUTED, SlotStatus.DROPPED)
    return SlotTable(
        experts=experts.astype(np.int64),
        weights=weights.astype(np.float32),
        status=status.astype(np.uint8),
    )


def _capture_jetmoe(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Tensors:
    order, _, gates, sizes, _ = output
    sizes = sizes if isinstance(sizes, torch.Tensor) else torch.tensor(sizes)
    return order.detach(), gates.detach(), sizes


def _decode_jetmoe(raw: Tensors, modules: SiteModules) -> SlotTable:
    """Reads JetMoeTopKGating: slots come sorted by expert and are put back in token order."""
    order, gates, sizes = raw
    sorted_ids = torch.repeat_interleave(torch.arange(sizes.numel()), sizes.to(torch.int64))
    experts = torch.empty(order.numel(), dtype=torch.int64)
    weights = torch.empty(order.numel(), dtype=torch.float32)
    experts[order] = sorted_ids
    weights[order] = gates.float()
    k = int(_need(modules.router).top_k)
    return _routed(experts.view(-1, k), weights.view(-1, k))


def _decode_llama4(raw: Tensors, modules: SiteModules) -> SlotTable:
    """Reads Llama4Router's scores [T, E]: unselected experts have exactly sigmoid(-inf) = 0."""
    weights, experts = raw[0].float().topk(int(_need(modules.router).top_k), dim=-1)
    return _routed(experts, weights)


def _capture_aria(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Tensors:
    """Repeats the choice AriaExperts makes inside, on its device: ties fall the same way."""
    logits = args[1] if len(args) > 1 else kwargs["router_logits"]
    config: Any = module.config
    values, experts = torch.topk(logits.detach(), k=config.moe_topk, dim=1)
    return experts, torch.softmax(values, dim=-1)


def _decode_aria(raw: Tensors, modules: SiteModules) -> SlotTable:
    experts, weights = raw
    return _routed(experts, weights)


NLLB = Adapter(
    name="nllb_top2_router", source="router", capture=_keep_outputs(0, 1, 2), decode=_decode_nllb
)
SWITCH = Adapter(
    name="switch_top1_router", source="router", capture=_keep_outputs(0, 1), decode=_decode_switch
)
JETMOE = Adapter(
    name="jetmoe_gating", source="router", capture=_capture_jetmoe, decode=_decode_jetmoe
)
LLAMA4 = Adapter(
    name="llama4_router", source="router", capture=_keep_outputs(0), decode=_decode_llama4
)
ARIA = Adapter(name="aria_experts", source="experts", capture=_capture_aria, decode=_decode_aria)

BY_ROUTER_CLASS: Mapping[str, Adapter] = {
    "NllbMoeTop2Router": NLLB,
    "SwitchTransformersTop1Router": SWITCH,
    "JetMoeTopKGating": JETMOE,
    "Llama4Router": LLAMA4,
}
BY_EXPERTS_CLASS: Mapping[str, Adapter] = {"AriaExperts": ARIA}
