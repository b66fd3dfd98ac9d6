"""Finds the MoE sites of a model and measures their geometry.

A site is found by structure (a module whose forward takes expert ids and weights), by the class
of its router where routing is hidden from that argument list, or because the caller registered
its class. Leaves out layers, attention and embeddings (`anatomy`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeprof.errors import CaptureError, UsageError
from moeprof.recording import adapters
from moeprof.recording.adapters import Adapter, SiteModules
from moeprof.trace.schema import CapacityRule, Site

ID_ARGUMENTS = (
    "top_k_index",
    "router_indices",
    "topk_indices",
    "topk_idx",
    "selected_experts",
)
WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights", "topk_weights", "router_scores")
ROUTER_CHILDREN = ("gate", "router", "router_gate")
SHARED_CHILDREN = ("shared_expert", "shared_experts", "shared_mlp")
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "total_experts",
    "num_routed_experts",
    "moe_num_experts",
)
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "num_selected_experts")
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|block|blocks|layer)\.(\d+)(?=\.|$)")
MAX_STORED_BIAS = 4096
MATRIX_DIM, FUSED_DIM = 2, 3

SelectFunction = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], Any]


@dataclass(frozen=True)
class Registration:
    """What the caller said about a class of plain torch modules."""

    ids: str | int | SelectFunction
    weights: str | int | None
    num_experts: int | str | None


@dataclass(frozen=True)
class FoundSite:
    """A site and the modules that belong to it.

    Attributes:
        name: Qualified name of the block.
        layer_name: Qualified name of the model layer that holds it.
        stack: ``encoder`` or ``decoder``.
        layer: Index of that layer.
        kind: ``ffn`` or ``attention``.
        adapter: How to read it.
        modules: Block, router and experts.
        watched: The module whose call shows the routing.
        num_experts: Routed experts.
        expert_modules: One module per expert where the model keeps them apart, else empty.
        shared: Shared experts, in the block or beside it.
        num_weighted: Experts that have weights; ids from there on compute nothing.
    """

    name: str
    layer_name: str
    stack: str
    layer: int
    kind: str
    adapter: Adapter
    modules: SiteModules
    watched: nn.Module
    num_experts: int
    expert_modules: tuple[nn.Module, ...]
    shared: tuple[nn.Module, ...]
    num_weighted: int

    @property
    def logits_source(self) -> nn.Module | None:
        """The module that puts out the router's logits."""
        if self.adapter is adapters.SWITCH:
            # What its router calls logits is the largest probability.
            return getattr(self.modules.router, "classifier", self.modules.router)
        return self.modules.router

    @property
    def runs_all_experts(self) -> bool:
        """True where the architecture runs every expert on every row by design."""
        return self.adapter is adapters.LLAMA4

    @property
    def fused(self) -> nn.Module | None:
        """The module whose call multiplies rows with stacked expert weights."""
        if self.modules.experts is not None:
            return self.modules.experts
        stacked = (
            child
            for child in self.modules.block.children()
            if any(
                p.dim() == FUSED_DIM and p.shape[0] == self.num_experts for p in child.parameters()
            )
        )
        return next(stacked, None)


_REGISTERED: dict[type[nn.Module], Registration] = {}


def register(
    module_class: type[nn.Module],
    *,
    ids: str | int | SelectFunction,
    weights: str | int | None = None,
    num_experts: int | str | None = None,
) -> None:
    """Makes instances of a plain torch module recordable as MoE sites.

    Two lines make any model recordable::

        import moeprof
        moeprof.register(MyExperts, ids="expert_ids", weights="gate_weights")

    Args:
        module_class: A module that is called once per forward pass of its layer.
        ids: Name or position of the forward argument with the expert ids, integer [T, k], -1
            where a slot is empty; or a function ``(module, args, kwargs, output) -> (ids,
            weights)``, called after forward.
        weights: Name or position of the forward argument with the weights applied, [T, k]; None
            when ``ids`` is a function.
        num_experts: Number of experts, or the name of the attribute that holds it; by default
            the first of the usual attribute names found on the module or its parent.

    Raises:
        UsageError: The class has no such argument.
    """
    if callable(ids):
        if weights is not None:
            raise UsageError(
                "register: weights must be left out when ids is a function",
                hint="the function returns (ids, weights)",
            )
    else:
        if weights is None:
            raise UsageError(
                f"register({module_class.__name__}): weights is missing",
                hint="name the forward argument that holds the weights, e.g. weights='weights'",
            )
        names = _parameters(module_class)
        for key in (ids, weights):
            known = key in names if isinstance(key, str) else 0 <= key < len(names)
            if not known:
                raise UsageError(
                    f"register({module_class.__name__}): forward has no argument {key!r}",
                    hint=f"its arguments are: {', '.join(names)}",
                )
    _REGISTERED[module_class] = Registration(ids=ids, weights=weights, num_experts=num_experts)


def _parameters(module_class: type[nn.Module]) -> list[str]:
    # The class, not the instance: accelerate and tensor parallelism replace `instance.forward`.
    try:
        return list(inspect.signature(module_class.forward).parameters)[1:]
    except (TypeError, ValueError):
        return []


def find_sites(model: nn.Module) -> list[FoundSite]:
    """Returns the MoE sites of ``model``, encoder first, in module order.

    Raises:
        CaptureError: The model has none.
    """
    modules = dict(model.named_modules())
    found: dict[str, FoundSite] = {}
    for name, module in modules.items():
        site = _site_of(model, modules, name, module)
        if site is not None:
            found.setdefault(f"{site.name}:{id(site.watched)}", site)
    if not found:
        raise CaptureError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that moeprof can see",
            hint="dense models have no routing to record; for a module of your own call "
            "moeprof.register(YourExperts, ids=..., weights=...) first",
        )
    layers = {name: i for i, name in enumerate(dict.fromkeys(s.layer_name for s in found.values()))}
    # Attention runs before the feed-forward part, wherever a layer declares it.
    return sorted(
        found.values(),
        key=lambda s: (s.stack != "encoder", layers[s.layer_name], s.kind != "attention"),
    )


def _site_of(
    model: nn.Module, modules: Mapping[str, nn.Module], name: str, module: nn.Module
) -> FoundSite | None:
    class_name = type(module).__name__
    parent_name = name.rpartition(".")[0]
    parent = modules.get(parent_name, module)
    registration = next(
        (_REGISTERED[base] for base in type(module).__mro__ if base in _REGISTERED), None
    )
    names = _parameters(type(module))
    experts: nn.Module | None = None
    router: nn.Module | None
    if registration is not None:
        adapter = adapters.with_copies(
            adapters.callable_adapter(registration.ids)
            if callable(registration.ids)
            else adapters.argument_adapter(registration.ids, registration.weights or 0, names)
        )
        experts, router = module, _child(parent, ROUTER_CHILDREN)
    elif class_name in adapters.BY_ROUTER_CLASS:
        adapter = adapters.BY_ROUTER_CLASS[class_name]
        router = module
        experts = _child(parent, ("experts",))
    elif class_name in adapters.BY_EXPERTS_CLASS:
        adapter = adapters.BY_EXPERTS_CLASS[class_name]
        experts, router = module, _child(parent, ROUTER_CHILDREN)
    else:
        ids = next((n for n in names if n in ID_ARGUMENTS), None)
        weights = next((n for n in names if n in WEIGHT_ARGUMENTS), None)
        if ids is None or weights is None or isinstance(module, nn.ModuleDict):
            return None
        adapter = adapters.argument_adapter(ids, weights, names)
        experts, router = module, _child(parent, ROUTER_CHILDREN)
    watched = router if adapter.source == "router" else module
    assert watched is not None
    layer_name, layer = _layer(modules, name)
    explicit = registration.num_experts if registration is not None else None
    num_experts = _num_experts(model, explicit, experts, router, parent)
    zero_experts = getattr(experts, "zero_expert_num", 0)
    beside = modules.get(parent_name.rpartition(".")[0]) if parent_name else None
    return FoundSite(
        name=parent_name or name,
        layer_name=layer_name,
        stack="encoder" if "encoder" in name.split(".") else "decoder",
        layer=layer,
        kind="attention" if class_name == "JetMoeTopKGating" and _is_moa(parent) else "ffn",
        adapter=adapter,
        modules=SiteModules(block=parent, router=router, experts=experts),
        watched=watched,
        num_experts=num_experts,
        expert_modules=_expert_modules(experts),
        shared=_shared(parent) or _shared(beside),
        num_weighted=num_experts - (zero_experts if isinstance(zero_experts, int) else 0),
    )


def _shared(owner: nn.Module | None) -> tuple[nn.Module, ...]:
    found = (getattr(owner, name, None) for name in SHARED_CHILDREN)
    return tuple(module for module in found if isinstance(module, nn.Module))


def _child(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(parent, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def _is_moa(block: nn.Module) -> bool:
    return type(block).__name__.endswith("MoA")


def _layer(modules: Mapping[str, nn.Module], name: str) -> tuple[str, int]:
    """Returns the name and index of the model layer around ``name``.

    The first match counts: T5-like names read ``block.N.layer.M``.
    """
    match = LAYER_NAME.search(name)
    if match is not None:
        return name[: match.end()], int(match.group(1))
    parts = name.split(".")
    for i, part in enumerate(parts):
        container = modules.get(".".join(parts[:i]))
        if part.isdigit() and isinstance(container, (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[: i + 1]), int(part)
    return name, -1


def _num_experts(
    model: nn.Module,
    explicit: int | str | None,
    *modules: nn.Module | None,
) -> int:
    if isinstance(explicit, int):
        return explicit
    names = (explicit,) if isinstance(explicit, str) else EXPERT_COUNTS
    for module in modules:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and value > 0:
                return value
    config = _config(model)
    for name in EXPERT_COUNTS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise CaptureError(
        "the number of experts cannot be read from the model",
        hint="pass num_experts to moeprof.register",
    )


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    return text_config() if callable(text_config) else config


def _expert_modules(experts: nn.Module | None) -> tuple[nn.Module, ...]:
    """Returns the modules of single experts, by id; empty where weights are fused."""
    if experts is None:
        return ()
    container: nn.Module | None = experts
    if not isinstance(container, (nn.ModuleDict, nn.ModuleList)):
        lists = [
            child
            for child in experts.children()
            if isinstance(child, (nn.ModuleDict, nn.ModuleList))
        ]
        container = lists[0] if len(lists) == 1 else None
    if container is None:
        return ()
    # Shared state such as a dropout module has no parameters and is no expert.
    children = [
        (name, child)
        for name, child in container.named_children()
        if next(child.parameters(), None) is not None
    ]
    numbered = [(_trailing_number(name), child) for name, child in children]
    if not numbered or any(number is None for number, _ in numbered):
        return ()
    if len({type(child) for _, child in children}) != 1:
        return ()
    return tuple(child for _, child in sorted(numbered, key=lambda item: item[0] or 0))


def _trailing_number(name: str) -> int | None:
    match = re.search(r"(\d+)$", name)
    return int(match.group(1)) if match else None


def geometry(model: nn.Module, found: list[FoundSite], top_k: Mapping[int, int]) -> list[Site]:
    """Returns the geometry of every site, as stored in the trace.

    Args:
        model: The model the sites were found in.
        found: Its sites; the index is the site id.
        top_k: Slots per token by site id, as captured; sites missing there fall back to what
            the modules declare.

    Raises:
        CaptureError: Neither is known.
    """
    next_slot: dict[str, int] = {}
    sites = []
    for index, site in enumerate(found):
        # A site that is silent and tells nothing is taken for one like the others.
        k = top_k.get(index) or declared_top_k(model, site) or max(top_k.values(), default=0)
        if k == 0:
            raise CaptureError(
                f"top_k of {site.name} is neither declared nor was it seen",
                hint="run at least one forward pass while recording",
            )
        first_slot = next_slot.get(site.stack, 0)
        next_slot[site.stack] = first_slot + k
        sites.append(_geometry(model, index, site, k, first_slot))
    return sites


def declared_top_k(model: nn.Module, site: FoundSite) -> int | None:
    """Returns the routing slots per token the modules declare; None where none of them does."""
    if site.adapter is adapters.NLLB:
        return 2
    if site.adapter is adapters.SWITCH:
        return 1
    config = _config(model)
    for owner in (site.modules.router, site.modules.block, site.modules.experts, config):
        for name in TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _geometry(model: nn.Module, index: int, site: FoundSite, top_k: int, first_slot: int) -> Site:
    matrices, d_model, d_ff, expert_bytes = _expert_shape(model, site)
    bias = _selection_bias(site)
    return Site(
        site=index,
        stack=site.stack,
        layer=site.layer,
        kind=site.kind,
        name=site.name,
        num_experts=site.num_experts,
        top_k=top_k,
        first_slot=first_slot,
        expert_bytes=expert_bytes,
        matrices_per_expert=matrices,
        d_model=d_model,
        d_ff=d_ff,
        num_shared_experts=_num_shared(model, site),
        shared_expert_bytes=sum(tensor_bytes(module) for module in site.shared),
        selection_bias=bias,
        capacity_rule=_capacity_rule(site),
        runs_all_experts=site.runs_all_experts,
        adapter=site.adapter.name,
    )


def tensor_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _expert_shape(
    model: nn.Module, site: FoundSite
) -> tuple[int | None, int | None, int | None, int]:
    """Returns (matrices per expert, d_model, d_ff, bytes of the largest expert)."""
    width = getattr(_config(model), "hidden_size", None) or getattr(_config(model), "d_model", None)
    if site.expert_modules:
        sizes = [tensor_bytes(module) for module in site.expert_modules]
        shapes = [
            ("", tuple(p.shape))
            for p in site.expert_modules[0].parameters()
            if p.dim() == MATRIX_DIM
        ]
        expert_bytes = max(sizes)
    else:
        stacked = _stacked(site)
        shapes = [(name, shape) for name, shape, _ in stacked if len(shape) == MATRIX_DIM]
        expert_bytes = sum(num_bytes for _, _, num_bytes in stacked)
    if not shapes:
        return None, width if isinstance(width, int) else None, None, expert_bytes
    matrices, d_ff, d_model = 0, None, width if isinstance(width, int) else None
    if d_model is None:
        d_model = getattr(site.modules.experts, "hidden_dim", None) or shapes[-1][1][0]
    for _, shape in shapes:
        other = shape[0] if shape[1] == d_model else shape[1]
        if d_ff is None or other < d_ff:
            d_ff = other
    for name, shape in shapes:
        other = shape[0] if shape[1] == d_model else shape[1]
        # Gate and up projection are often stored as one matrix of twice the width.
        joined = "gate_up" in name or (d_ff is not None and other == 2 * d_ff)
        matrices += 2 if joined and other % 2 == 0 else 1
    if len(shapes) == 1 and "gate_up" in shapes[0][0] and d_ff is not None:
        d_ff //= 2
    return matrices, d_model, d_ff, expert_bytes


def _stacked(site: FoundSite) -> list[tuple[str, tuple[int, ...], int]]:
    """Returns (name, shape, bytes) of one expert's part of each stacked parameter."""
    owner = site.modules.experts or site.modules.block
    found = []
    for name, p in owner.named_parameters():
        shape = tuple(p.shape)
        if "router" in name or not shape:
            continue
        if shape[0] in (site.num_experts, site.num_weighted):
            found.append((name, shape[1:], p.numel() * p.element_size() // shape[0]))
        elif len(shape) == MATRIX_DIM and shape[0] % site.num_experts == 0:
            # Rows of all experts in one matrix.
            rows = shape[0] // site.num_experts
            size = p.numel() * p.element_size() // site.num_experts
            found.append((name, (rows, shape[1]), size))
    return found


def _num_shared(model: nn.Module, site: FoundSite) -> int:
    if not site.shared:
        return 0
    declared = getattr(_config(model), "n_shared_experts", None)
    return declared if isinstance(declared, int) and declared > 0 else len(site.shared)


def _selection_bias(site: FoundSite) -> tuple[float, ...] | None:
    for name, bias in _bias_candidates(site):
        if name.rpartition(".")[2] in BIAS_NAMES and bias.numel() == site.num_experts:
            if bias.device.type == "meta" or bias.numel() > MAX_STORED_BIAS:
                return None
            return tuple(float(v) for v in bias.detach().float().cpu().reshape(-1))
    return None


def _bias_candidates(site: FoundSite) -> Iterator[tuple[str, torch.Tensor]]:
    router, block = site.modules.router, site.modules.block
    if router is not None:
        yield from (*router.named_buffers(), *router.named_parameters())
    yield from (*block.named_buffers(recurse=False), *block.named_parameters(recurse=False))


def _capacity_rule(site: FoundSite) -> CapacityRule | None:
    if site.adapter is not adapters.NLLB:
        return None
    router: Any = site.modules.router
    fraction = float(router.moe_eval_capacity_token_fraction)
    if fraction > 0:
        return CapacityRule(rule="token_fraction", value=fraction)
    if router.expert_capacity:
        return CapacityRule(rule="fixed", value=float(router.expert_capacity))
    return CapacityRule(rule="capacity_factor", value=1.0)
