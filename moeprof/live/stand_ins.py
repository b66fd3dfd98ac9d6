"""What stands in for the experts of a model: put in place, guarded, and taken back.

One thing stands in at a time; weights that it read must not change meanwhile; nothing flows back
through it. Leaves out which module that is (`model_experts`) and what stands in.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moeprof.errors import MoeprofError, UsageError

_CLAIMS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_version = operator.attrgetter("_version")


def claim_experts(modules: Iterable[nn.Module], technique: str) -> Callable[[], None]:
    """Notes what runs the experts in these modules, and returns what takes the note back.

    Raises:
        UsageError: Something else runs them already.
    """
    claimed = list(modules)
    for module in claimed:
        other = _CLAIMS.get(module)
        if other is not None:
            raise UsageError(
                f"{technique}: the model's experts are run by {other} already",
                hint="restore() that, or leave its context, first: one at a time runs the experts",
            )
    for module in claimed:
        _CLAIMS[module] = technique

    def release() -> None:
        for module in claimed:
            _CLAIMS.pop(module, None)
        claimed.clear()

    return release


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives one instance another forward and returns what takes it back, once or more often."""
    stand_in = _StandIn(module, forward)
    module.forward = stand_in
    return stand_in.take_back


class _StandIn:
    """The forward of one module for a while.

    Whoever wraps it meanwhile and stays longer calls the module's own through it.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._own = vars(module).get("forward")
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy would go on running the experts of this model.
        raise MoeprofError(
            f"{type(self._module).__name__} cannot be copied or pickled while something stands in "
            "for it",
            hint="leave apply_gating or buffer_experts first; state_dict() can be saved meanwhile",
        )

    def take_back(self) -> None:
        """Gives the module its own forward back."""
        self._forward = self._own or types.MethodType(type(self._module).forward, self._module)
        attributes = vars(self._module)
        if attributes.get("forward") is not self:
            return
        if self._own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = self._own


class WeightWatch:
    """Notices that parameters are no longer those that were read.

    Sees other parameters, other memory (`to`, `half`) and what is written into them
    (`load_state_dict`), but not what is written through ``.data``. About 0.2 us per parameter.

    Args:
        module: Holds the parameters, itself or in modules of its own.
        parameters: Those to watch.
        is_shared: True where what stands in reads their memory, so that writing into it is right.

    Attributes:
        parameters: As given.
    """

    def __init__(
        self, module: nn.Module, parameters: Iterable[torch.Tensor], *, is_shared: bool
    ) -> None:
        self.parameters = tuple(parameters)
        wanted = {id(parameter) for parameter in self.parameters}
        slots = [
            (owner._parameters, name)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in wanted
        ]
        self._holders = [holder for holder, _ in slots]
        self._names = [name for _, name in slots]
        self._ids = self._held()
        self._places = self._memory()
        # Inference tensors count no versions.
        counted = [] if is_shared else [one for one in self.parameters if not one.is_inference()]
        self._counted = counted
        self._versions = list(map(_version, counted))

    def _held(self) -> list[int]:
        return list(map(id, map(dict.get, self._holders, self._names)))

    def _memory(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.parameters))

    def has_changed(self) -> bool:
        """Returns True once the parameters are other ones; waits for no device."""
        return (
            self._held() != self._ids
            or self._memory() != self._places
            or list(map(_version, self._counted)) != self._versions
        )


def guarded(
    run: Callable[..., torch.Tensor], watch: WeightWatch, technique: str, site: str
) -> Callable[..., torch.Tensor]:
    """Returns ``run`` of tensors, which refuses changed weights and whose gradients are refused.

    Args:
        run: Runs the experts of a site; for inference.
        watch: Of the weights that it read.
        technique: What it is, as the user called it.
        site: Name of the site.
    """

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        if watch.has_changed():
            raise MoeprofError(
                f"weights of the experts of {site} changed after {technique} had read them",
                hint="restore() it or leave its context, and apply it again",
            )
        if not torch.is_grad_enabled():
            return run(*tensors)
        with torch.no_grad():
            out = run(*tensors)
        wanting = next((one for one in (*tensors, *watch.parameters) if one.requires_grad), None)
        if wanting is None:
            return out
        refused: torch.Tensor = _NoBackward.apply(out, wanting, technique)  # type: ignore[no-untyped-call]
        return refused

    return call


class _NoBackward(torch.autograd.Function):
    """Lets a forward pass be, and refuses the backward pass that would lose gradients."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, wanting: torch.Tensor, technique: str) -> torch.Tensor:
        """Returns a copy of ``out`` that requires a gradient as ``wanting`` does."""
        ctx.technique = technique
        # What is returned as it is would be a view, which models may not write into.
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Refuses."""
        raise MoeprofError(
            f"experts run by {ctx.technique} have no gradients: it is for inference",
            hint="restore() it or leave its context before the forward pass; or run under "
            "torch.no_grad()",
        )
