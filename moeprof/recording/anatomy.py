"""Which modules of a model are its stacks, layers, attention, embeddings and head.

Used twice: to time parts of a layer and to say where the static bytes are. Leaves out the MoE
sites themselves (`sites`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moeprof.recording.sites import FoundSite
from moeprof.trace.schema import StaticBytes

ATTENTION_NAME = re.compile(
    r"(^|_)(self_attn|attn|attention|self_attention|cross_attn|cross_attention|encoder_attn|"
    r"mixer|mamba|linear_attn|short_conv|conv)$"
)
ATTENTION_CLASS = re.compile(r"(Attention|LayerSelfAttention|LayerCrossAttention|MLA|Mamba)")
NORM_CLASS = re.compile(r"(Norm|Dropout|Identity)")
EMBEDDING_CLASS = re.compile(r"Embedding")


@dataclass(frozen=True)
class LayerParts:
    """The modules of one model layer.

    Attributes:
        name: Qualified name.
        stack: ``encoder`` or ``decoder``.
        index: Layer index inside the stack.
        module: The layer.
        sites: Ids of its MoE sites.
        attention: Outermost attention modules.
        dense_ffn: Outermost feed-forward modules outside MoE blocks.
    """

    name: str
    stack: str
    index: int
    module: nn.Module
    sites: tuple[int, ...]
    attention: tuple[nn.Module, ...]
    dense_ffn: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model the recorder watches.

    Attributes:
        stacks: Module whose forward pass is one step, by stack.
        top: The outermost module.
        layers: All layers, dense ones too.
        embeddings: Token embedding modules.
        head: Output projection; None where the model has none.
    """

    stacks: Mapping[str, nn.Module]
    top: nn.Module
    layers: tuple[LayerParts, ...]
    embeddings: tuple[nn.Module, ...]
    head: nn.Module | None
    num_layers: Mapping[str, int] = field(default_factory=dict)


def anatomy(model: nn.Module, sites: list[FoundSite]) -> Anatomy:
    """Returns the parts of ``model``, whose MoE sites are ``sites``."""
    modules = dict(model.named_modules())
    layers = tuple(_layers(modules, sites))
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer.stack] = max(counts.get(layer.stack, 0), layer.index + 1)
    return Anatomy(
        stacks=_stacks(model, modules, sites),
        top=model,
        layers=layers,
        embeddings=_embeddings(model),
        head=_head(model),
        num_layers=counts,
    )


def _stacks(
    model: nn.Module, modules: Mapping[str, nn.Module], sites: list[FoundSite]
) -> dict[str, nn.Module]:
    """Returns the module whose call is one forward pass of each stack.

    An encoder-decoder model's encoder and decoder run apart, and `generate` calls the encoder
    outside the model's own forward. For an LM it is the innermost module around all its layers
    that takes token ids or embeddings.
    """
    stacks: dict[str, nn.Module] = {}
    for stack in ("encoder", "decoder"):
        names = [site.layer_name for site in sites if site.stack == stack]
        if not names:
            continue
        common = _common_prefix(names)
        candidates = [common]
        while candidates[-1]:
            candidates.append(candidates[-1].rpartition(".")[0])
        chosen: nn.Module = model
        for name in candidates:
            module = modules[name]
            if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                continue
            if name in names:
                continue  # The layer itself, where a stack has a single MoE layer.
            chosen = module
            break
        stacks[stack] = chosen
    if len(stacks) == 1:
        other = _other_stack(model, next(iter(stacks)))
        stacks.update(other)
    return stacks


def _other_stack(model: nn.Module, known: str) -> dict[str, nn.Module]:
    """Returns the stack without MoE sites of an encoder-decoder model: its steps count too."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    missing = "decoder" if known == "encoder" else "encoder"
    getter = getattr(model, f"get_{missing}", None)
    module = getter() if callable(getter) else None
    return {missing: module} if isinstance(module, nn.Module) else {}


def _common_prefix(names: list[str]) -> str:
    split = [name.split(".") for name in names]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _layers(modules: Mapping[str, nn.Module], sites: list[FoundSite]) -> Iterator[LayerParts]:
    lists: dict[str, str] = {}
    for site in sites:
        container, _, last = site.layer_name.rpartition(".")
        if last.isdigit():
            lists.setdefault(container, site.stack)
    for container, stack in lists.items():
        for child_name, layer in modules[container].named_children():
            if not child_name.isdigit():
                continue
            name = f"{container}.{child_name}" if container else child_name
            own = tuple(i for i, site in enumerate(sites) if site.layer_name == name)
            blocks = {id(sites[i].modules.block) for i in own if sites[i].kind != "attention"}
            attention = tuple(_outermost(layer, blocks, _is_attention))
            shared = {id(module) for i in own for module in sites[i].shared}
            taken = blocks | shared | {id(module) for module in attention}
            dense = tuple(_outermost(layer, taken, _is_dense_ffn))
            yield LayerParts(
                name=name,
                stack=stack,
                index=int(child_name),
                module=layer,
                sites=own,
                attention=attention,
                dense_ffn=dense,
            )


def _outermost(module: nn.Module, excluded: set[int], wanted: Any) -> Iterator[nn.Module]:
    """Yields matching descendants, none inside another or inside an excluded module."""
    for name, child in module.named_children():
        if id(child) in excluded:
            continue
        if wanted(name, child) and not _contains(child, excluded):
            yield child
        else:
            yield from _outermost(child, excluded, wanted)


def _contains(module: nn.Module, wanted: set[int]) -> bool:
    return any(id(descendant) in wanted for descendant in module.modules())


def _is_attention(name: str, module: nn.Module) -> bool:
    class_name = type(module).__name__
    if NORM_CLASS.search(class_name):
        return False
    return bool(ATTENTION_NAME.search(name) or ATTENTION_CLASS.search(class_name))


def _is_dense_ffn(name: str, module: nn.Module) -> bool:
    class_name = type(module).__name__
    if NORM_CLASS.search(class_name) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return any(p.dim() > 1 for p in module.parameters(recurse=True))


def _embeddings(model: nn.Module) -> tuple[nn.Module, ...]:
    found: dict[int, nn.Module] = {}
    getter = getattr(model, "get_input_embeddings", None)
    if callable(getter):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):
            module = None
        if isinstance(module, nn.Module):
            found[id(module)] = module
    for module in model.modules():
        if isinstance(module, nn.Embedding) or EMBEDDING_CLASS.search(type(module).__name__):
            large = any(p.dim() > 1 for p in module.parameters(recurse=False))
            if large:
                found.setdefault(id(module), module)
    return tuple(found.values())


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    module = None
    if callable(getter):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):
            module = None
    if not isinstance(module, nn.Module):
        named = dict(model.named_children())
        module = next((named[n] for n in ("lm_head", "head", "output") if n in named), None)
    return module if isinstance(module, nn.Module) else None


def static_bytes(parts: Anatomy, sites: list[FoundSite]) -> StaticBytes:
    """Returns the bytes of parameters and buffers by part; shared storage counts once.

    A tied output head belongs to the embedding.
    """
    totals = dict.fromkeys(
        ("embedding", "attention", "dense_ffn", "experts", "shared_experts", "router", "other"), 0
    )
    seen: set[int] = set()

    def take(part: str, module: nn.Module | None) -> None:
        if module is None:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            totals[part] += tensor.numel() * tensor.element_size()

    for site in sites:
        take("router", site.modules.router)
        for shared in site.shared:
            take("shared_experts", shared)
        take("experts", site.modules.experts)
        if site.modules.experts is None:
            take("experts", site.modules.block)
    for embedding in parts.embeddings:
        take("embedding", embedding)
    take("embedding", parts.head)
    for layer in parts.layers:
        for module in layer.attention:
            take("attention", module)
        for module in layer.dense_ffn:
            take("dense_ffn", module)
    take("other", parts.top)
    return StaticBytes(**totals)
