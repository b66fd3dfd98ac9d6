"""Routing made for a model, and experts that are changed to see who used them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tiny_models
import torch

from moeprof.live import Routing, RoutingShape, skewed_routing
from moeprof.recording.sites import FoundSite, declared_top_k, find_sites
from moeprof.zoo import fix_nllb_dispatch

SCALE = 1.7


def nllb_moe() -> torch.nn.Module:
    model = tiny_models.nllb_moe()
    fix_nllb_dispatch(model)
    return model


def routing_for(
    model: torch.nn.Module,
    tokens: Sequence[int],
    *,
    encoder_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Routing:
    """Routing of the model's geometry with a weight of its own in every slot, in sixteenths."""
    found = find_sites(model)
    shapes = []
    for stack, passes in (("encoder", encoder_tokens), ("decoder", tokens)):
        own = [site for site in found if site.stack == stack]
        if not own or not passes:
            continue
        k = declared_top_k(model, own[0])
        assert k is not None
        shapes.append(
            RoutingShape(
                num_sites=len(own),
                num_experts=own[0].num_experts,
                top_k=k,
                tokens=passes,
                stack=stack,
            )
        )
    return with_weights(skewed_routing(shapes, exponent=0.7, seed=seed), seed)


def with_weights(routing: Routing, seed: int = 0) -> Routing:
    generator = np.random.default_rng(seed)

    def weighted(site: Any) -> Any:
        drawn = generator.integers(4, 16, site.experts.shape) / 16
        return dataclasses.replace(site, weights=drawn.astype(np.float32))

    stacks = {
        name: dataclasses.replace(stack, sites=tuple(map(weighted, stack.sites)))
        for name, stack in routing.stacks.items()
    }
    return dataclasses.replace(routing, stacks=stacks)


def scaled_weights(routing: Routing, factor: float) -> Routing:
    def scaled(site: Any) -> Any:
        return dataclasses.replace(site, weights=(site.weights * factor).astype(np.float32))

    stacks = {
        name: dataclasses.replace(stack, sites=tuple(map(scaled, stack.sites)))
        for name, stack in routing.stacks.items()
    }
    return dataclasses.replace(routing, stacks=stacks)


def expert_parameters(site: FoundSite, expert: int) -> Iterator[torch.Tensor]:
    """Views of every parameter of one expert."""
    if site.expert_modules:
        yield from (p.data for p in site.expert_modules[expert].parameters())
        return
    owners = [site.modules.experts]
    if owners[0] is None:
        owners = [c for c in site.modules.block.children() if c is not site.modules.router]
    count = site.num_weighted
    for owner in owners:
        for parameter in owner.parameters():
            if parameter.dim() > 1 and parameter.shape[0] % count == 0:
                yield parameter.data.view(count, -1, *parameter.shape[1:])[expert]


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set(torch.nonzero((before != after).any(dim=1)).flatten().tolist())


def reseeded(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The same geometry with other weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model
