"""How each kind of MoE module is made to compute with routing it did not choose.

The mirror of `moeprof.recording.adapters`: what an adapter reads from a call, a driver writes into
it. Leaves out which routing, and when (`forcing`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moeprof.errors import UsageError
from moeprof.recording import adapters
from moeprof.recording.adapters import RoutingArguments
from moeprof.recording.sites import FoundSite
from moeprof.zoo import needs_nllb_dispatch_fix

_ROUTED_PARAMETERS = 3
"""Rows, ids and weights: what an experts module needs if it dispatches by itself."""

_NEVER = -1e4
"""A logit whose probability is 0 in every type, and which is still a number."""


@dataclass(frozen=True)
class Placed:
    """Routing for some rows of the batch a module was called with.

    Attributes:
        ids: [n, k] int64, -1 in empty slots.
        weights: [n, k] float32.
        places: [n] int64 rows; None where these are all rows, in order. The other rows keep what
            the model chose for them: they are padding, or sequences that have ended.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor | None

    def over(self, own: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
        """Returns ``forced`` [n, ...], with the rows of ``own`` [rows, ...] where it has none."""
        forced = forced.to(own.dtype)
        if self.places is None:
            return forced
        # A batch of other rows may have more slots than the routing: those hold no choice here.
        return own[:, : forced.shape[1]].index_copy(0, self.places, forced)

    def dense(self, num_experts: int) -> torch.Tensor:
        """Returns the weights as [n, num_experts]."""
        zeros = self.weights.new_zeros(self.ids.shape[0], num_experts)
        return zeros.scatter_add(1, self.ids.clamp(min=0), self.weights)


class Choose(Protocol):
    """Gives the routing for a batch; None where the site is not to be driven now."""

    def __call__(self, num_rows: int, top_k: int, device: torch.device) -> Placed | None:
        """Returns what a module called with ``num_rows`` rows, choosing ``top_k``, computes with.

        Raises:
            MoeprofError: There is no routing for such a batch.
        """


Apply = Callable[[tuple[Any, ...], Mapping[str, Any], Any, Choose], Any]


@dataclass(frozen=True)
class Driver:
    """How one site is driven.

    Attributes:
        module: The module whose call is changed.
        before: True where its arguments are replaced, False where its output is.
        apply: Takes arguments, keyword arguments, output and a `Choose`; returns the replacement,
            or None to change nothing.
        takes_empty: True where a token may leave a slot empty.
        check: Called before the experts run: raises where the choice did not reach them.
    """

    module: nn.Module
    before: bool
    apply: Apply
    takes_empty: bool
    check: Callable[[tuple[Any, ...], Mapping[str, Any]], None] | None = None


def driver_of(site: FoundSite) -> Driver:
    """Returns how ``site`` is driven.

    Raises:
        UsageError: It cannot be, and why.
    """
    if site.adapter is adapters.NLLB:
        return _nllb(site)
    if site.adapter is adapters.SWITCH:
        return Driver(site.watched, before=False, apply=_apply_switch, takes_empty=True)
    if site.adapter is adapters.LLAMA4:
        return _llama4(site)
    if site.adapter is adapters.JETMOE:
        return _jetmoe(site)
    if site.adapter.arguments is None:
        raise UsageError(
            f"{site.name} cannot be driven: its {type(site.watched).__name__} chooses experts "
            "inside, and nothing handed to it carries the choice",
            hint="drive modules that are called with expert ids and weights; for one of your own: "
            "moeprof.register(Experts, ids='...', weights='...')",
        )
    if _num_required(site.watched) <= _ROUTED_PARAMETERS:
        return _arguments(site, site.adapter.arguments)
    return _router_output(site, site.adapter.arguments)


def _num_required(module: nn.Module) -> int:
    """Returns the arguments a forward cannot do without."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return sum(p.default is inspect.Parameter.empty and p.kind not in kinds for p in parameters)


def _arguments(site: FoundSite, arguments: RoutingArguments) -> Driver:
    """Drives an experts module by the ids and weights it is called with."""

    def apply(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose) -> Any:
        ids = arguments.pick(arguments.ids, args, kwargs)
        weights = arguments.pick(arguments.weights, args, kwargs)
        top_k = ids.shape[-1]
        own_ids = ids.reshape(-1, top_k)
        placed = choose(own_ids.shape[0], top_k, ids.device)
        if placed is None:
            return None
        slots = placed.ids.shape[1]
        if weights.numel() == ids.numel():
            own, forced = weights.reshape(own_ids.shape), placed.weights
            shape = _shape_of_slots(tuple(weights.shape), tuple(ids.shape), slots)
        else:  # Weights of all experts, of which the module takes those it needs.
            own = weights.reshape(-1, weights.shape[-1])
            forced, shape = placed.dense(own.shape[1]), tuple(weights.shape)
        return arguments.replaced(
            args,
            kwargs,
            {
                arguments.ids: placed.over(own_ids, placed.ids).reshape(*ids.shape[:-1], slots),
                arguments.weights: placed.over(own, forced).reshape(shape),
            },
        )

    # `moeprof.register` says -1 is an empty slot; fused experts of transformers know no such id.
    takes_empty = not type(site.watched).__module__.startswith("transformers.")
    return Driver(site.watched, before=True, apply=apply, takes_empty=takes_empty)


def _shape_of_slots(weights: tuple[int, ...], ids: tuple[int, ...], slots: int) -> tuple[int, ...]:
    """Returns the shape of weights, one for each id, where there are ``slots`` of them per row."""
    if weights[: len(ids)] == ids:
        return (*ids[:-1], slots, *weights[len(ids) :])
    if weights[-1] == ids[-1]:
        return (*weights[:-1], slots)
    # Flat: rows behind each other.
    return (*weights[:-1], weights[-1] // ids[-1] * slots)


def _router_output(site: FoundSite, arguments: RoutingArguments) -> Driver:
    """Drives a block that arranges rows by the router's choice before its experts are called."""
    router = site.modules.router
    if router is None:
        raise UsageError(
            f"{site.name} cannot be driven: its experts are called with rows arranged beforehand, "
            "and there is no router module whose choice could be replaced",
            hint="give the block a child 'gate' or 'router' that returns (ids, weights)",
        )
    handed: list[torch.Tensor] = []

    def apply(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose) -> Any:
        handed.clear()
        if not _is_choice(output):
            raise UsageError(
                f"{site.name} cannot be driven: its router does not return (ids, weights)",
                hint="its experts are called with rows arranged beforehand, so the choice can only "
                "be replaced where it is made",
            )
        ids, weights = output
        placed = choose(ids.shape[0], ids.shape[1], ids.device)
        if placed is None:
            return None
        handed.append(placed.over(ids, placed.ids))
        return handed[0], placed.over(weights, placed.weights)

    def check(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not handed:
            return
        got = arguments.pick(arguments.ids, args, kwargs)
        if got.data_ptr() != handed[0].data_ptr() or got.shape != handed[0].shape:
            raise UsageError(
                f"{site.name} cannot be driven: its experts are not called with the very ids that "
                "its router returned",
                hint="pass them on unchanged",
            )

    return Driver(router, before=False, apply=apply, takes_empty=False, check=check)


def _is_choice(output: Any) -> bool:
    """Returns True for ``(ids [T, k], weights [T, k])``."""
    return (
        isinstance(output, tuple)
        and len(output) == 2  # noqa: PLR2004
        and all(isinstance(tensor, torch.Tensor) for tensor in output)
        and not output[0].is_floating_point()
        and output[0].dim() == 2  # noqa: PLR2004
        and output[0].shape == output[1].shape
    )


def _nllb(site: FoundSite) -> Driver:
    """Drives NllbMoeTop2Router's ``(top_1_mask, combine [T, E], logits [T, E])``.

    The logits become those of the forced choice, so that who reads them reads one story; a token
    that is left without any expert is recorded as dropped.
    """
    block = site.modules.block
    if _runs_as_shipped(block) and needs_nllb_dispatch_fix(block):
        raise UsageError(
            f"{site.name} cannot be driven: this transformers runs experts 0 and 1 there, whatever "
            "the router says",
            hint="call moeprof.zoo.fix_nllb_dispatch(model) first",
        )

    def apply(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose) -> Any:
        top_1, combine, logits = output[:3]
        num_experts = combine.shape[-1]
        placed = choose(combine.shape[0], 2, combine.device)
        if placed is None:
            return None
        # Recorded weights hold the factor that the block applies after this.
        scale = 1.0 - float(getattr(site.modules.experts, "moe_token_dropout", 0.0))
        forced = placed.dense(num_experts) / scale
        used = placed.ids >= 0
        first = used.int().argmax(dim=1, keepdim=True)
        leading = placed.ids.gather(1, first).clamp(min=0)
        mask = torch.zeros_like(forced).scatter(1, leading, used.any(1, keepdim=True).float())
        scores = forced.log().clamp(min=_NEVER)
        return (
            placed.over(top_1, mask),
            placed.over(combine, forced),
            placed.over(logits, scores),
            *output[3:],
        )

    return Driver(site.watched, before=False, apply=apply, takes_empty=True)


def _runs_as_shipped(block: nn.Module) -> bool:
    """Returns True where nobody gave the block another forward; offloading wraps the one it has."""
    own = vars(block)
    forward = own.get("_old_forward", own.get("forward"))
    return forward is None or getattr(forward, "__func__", None) is type(block).forward


def _apply_switch(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose
) -> Any:
    """Replaces ``(probability [T, 1], one-hot [T, 1, E], ...)`` of SwitchTransformersTop1Router.

    Where the third output is the probability again, it is what the block applies.
    """
    probability, one_hot, *others = output
    num_experts = one_hot.shape[-1]
    flat = one_hot.reshape(-1, num_experts)
    placed = choose(flat.shape[0], 1, flat.device)
    if placed is None:
        return None
    used = (placed.ids >= 0).to(placed.weights.dtype)
    chosen = Placed(placed.ids, used, placed.places).dense(num_experts)

    def weighted(own: torch.Tensor) -> torch.Tensor:
        return placed.over(own.reshape(-1, 1), placed.weights).reshape(own.shape)

    return (
        weighted(probability),
        placed.over(flat, chosen).reshape(one_hot.shape),
        *(weighted(each) if each.shape == probability.shape else each for each in others),
    )


def _llama4(site: FoundSite) -> Driver:
    """Drives Llama4Router's scores [T, E], which multiply what each expert is given."""
    router: Any = site.watched

    def apply(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose) -> Any:
        scores, *others = output
        placed = choose(scores.shape[0], int(router.top_k), scores.device)
        if placed is None:
            return None
        return (placed.over(scores, placed.dense(scores.shape[1])), *others)

    return Driver(site.watched, before=False, apply=apply, takes_empty=True)


def _jetmoe(site: FoundSite) -> Driver:
    """Drives JetMoeTopKGating, whose slots leave it sorted by expert."""

    def apply(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, choose: Choose) -> Any:
        order, _, gates, sizes, logits = output
        num_rows, num_experts = logits.shape
        top_k = order.numel() // max(num_rows, 1)
        placed = choose(num_rows, top_k, order.device)
        if placed is None:
            return None
        counts = torch.as_tensor(sizes, device=order.device)
        by_expert = torch.repeat_interleave(counts)
        own_ids = torch.empty_like(order).index_copy(0, order, by_expert).view(num_rows, top_k)
        own_gates = torch.empty_like(gates).index_copy(0, order, gates).view(num_rows, top_k)
        ids = placed.over(own_ids, placed.ids)
        weights = placed.over(own_gates, placed.weights)
        chosen = ids.flatten()
        order = chosen.sort(stable=True).indices
        # The model takes sizes as a list of the host, and waits for it itself.
        sizes = torch.bincount(chosen, minlength=num_experts).tolist()
        return order, order // ids.shape[1], weights.flatten()[order], sizes, logits

    return Driver(site.watched, before=False, apply=apply, takes_empty=False)
