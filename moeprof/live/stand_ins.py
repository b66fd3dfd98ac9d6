"""What stands in for the experts of a model: put in place, guarded, and taken back.

One thing stands in at a time; weights that it read must not change meanwhile; nothing flows back
through it. Leaves out which module that is (`model_experts`) and what stands in.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch
from torch import nn

from moeprof.errors import MoeprofError, UsageError

_CHUNK = 64
_version = operator.attrgetter("_version")


class Claim:
    """What runs the experts of some modules, while it does; made by `claim_experts`.

    It keeps no module alive.

    Args:
        modules: The modules.
        technique: What it is, as the user called it.

    Attributes:
        technique: As given.
    """

    def __init__(self, modules: Iterable[nn.Module], technique: str) -> None:
        self.technique = technique
        self._modules = WeakSet(modules)
        self._handle: ReferenceType[Any] | None = None
        self._take_back: Callable[[], None] | None = None

    def release(self) -> None:
        """Lets something else run them."""
        for module in self._modules:
            _CLAIMS.pop(module, None)
        self._modules.clear()

    def hand_out(self, handle: Any, take_back: Callable[[], None]) -> None:
        """Says by which object the user takes it back, and what does so once that is dropped."""
        self._handle, self._take_back = ref(handle), take_back

    def take_back_if_dropped(self) -> bool:
        """Takes it back where the user no longer can; returns False where the user can."""
        if self._handle is None or self._handle() is not None or self._take_back is None:
            return False
        self._take_back()
        return True


_CLAIMS: WeakKeyDictionary[nn.Module, Claim] = WeakKeyDictionary()


def free_experts(model: nn.Module, technique: str) -> None:
    """Sees that nothing runs the experts in a model; takes back what has lost its handle.

    Raises:
        UsageError: Something runs them already.
    """
    for module in model.modules():
        other = _CLAIMS.get(module)
        if other is not None and not other.take_back_if_dropped():
            raise UsageError(
                f"{technique}: the model's experts are run by {other.technique} already",
                hint="restore() that, or leave its context, first: one at a time runs the experts",
            )


def claim_experts(modules: Iterable[nn.Module], technique: str) -> Claim:
    """Notes what runs the experts in these modules, which nothing ran before (`free_experts`)."""
    claimed = list(modules)
    claim = Claim(claimed, technique)
    for module in claimed:
        _CLAIMS[module] = claim
    return claim


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives one instance another forward and returns what takes it back, once or more often.

    What is returned keeps neither of them alive; ``forward`` must not hold the module, or a model
    that is dropped would keep its memory until the garbage collector runs.
    """
    stand_in = _StandIn(module, forward)
    module.forward = stand_in
    found = WeakMethod(stand_in.take_back)

    def take_back() -> None:
        method = found()
        if method is not None:
            method()

    return take_back


class _StandIn:
    """The forward of one module for a while.

    Whoever wraps it meanwhile and stays longer calls the module's own through it.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        # Weakly: the module holds this.
        self._module = ref(module)
        self._own = vars(module).get("forward")
        self._forward: Callable[..., Any] | None = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._forward or self._own_forward())(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._forward is None:
            return _as_it_is, (self._own_forward(),)
        # A copy would go on running the experts of this model.
        raise MoeprofError(
            f"{type(self._module()).__name__} cannot be copied or pickled while something stands "
            "in for it",
            hint="leave apply_gating or buffer_experts first; state_dict() can be saved meanwhile",
        )

    def _own_forward(self) -> Callable[..., Any]:
        module = self._module()
        assert module is not None
        forward: Callable[..., Any] = self._own or types.MethodType(type(module).forward, module)
        return forward

    def take_back(self) -> None:
        """Gives the module its own forward back."""
        self._forward = None
        module = self._module()
        if module is None or vars(module).get("forward") is not self:
            return
        if self._own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = self._own


def _as_it_is(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what a copy of a module gets as its forward."""
    return forward


class WeightWatch:
    """Notices that parameters are no longer those that were read.

    Sees other parameters, other modules that hold them, other memory (`to`, `half`) and what is
    written into them (`load_state_dict`), but not what is written through ``.data``. Of more than
    64 parameters the first look is at all, and each later one at all that is written into them but
    at where 64 of them lie, in turn: whole models that move are seen at once. About 0.2 us per
    parameter up to 64; 50 us for 512.

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
        # Inference tensors count no versions.
        self._counted = [] if is_shared else list(filter(_counts_versions, self.parameters))
        # Each only grows.
        self._versions = sum(map(_version, self._counted))
        slots = list(_slots(module, {id(one) for one in self.parameters}))
        num_chunks = max(-(-len(self.parameters) // _CHUNK), 1)
        self._chunks = [
            _Places(slots[first::num_chunks], self.parameters[first::num_chunks])
            for first in range(num_chunks)
        ]
        self._next = 0
        self._is_first = True

    def has_changed(self) -> bool:
        """Returns True once the parameters are other ones; waits for no device."""
        if sum(map(_version, self._counted)) != self._versions:
            return True
        if self._is_first:
            if any(chunk.has_changed() for chunk in self._chunks):
                return True
            self._is_first = False
            return False
        # What has changed is looked at again the next time.
        if self._chunks[self._next].has_changed():
            return True
        self._next = (self._next + 1) % len(self._chunks)
        return False


class _Places:
    """Where some parameters lie.

    Args:
        slots: Dictionaries that hold parameters or modules, the names there, and what they hold.
        parameters: The parameters.
    """

    def __init__(
        self,
        slots: Iterable[tuple[dict[str, Any], str, Any]],
        parameters: tuple[torch.Tensor, ...],
    ) -> None:
        found = list(slots)
        self._holders = [holder for holder, _, _ in found]
        self._names = [name for _, name, _ in found]
        self._held = [held for _, _, held in found]
        self._parameters = parameters
        self._memory = list(map(torch.Tensor.data_ptr, parameters))

    def has_changed(self) -> bool:
        """Returns True where others are held, or they lie elsewhere."""
        held = map(dict.get, self._holders, self._names)
        return (
            not all(map(operator.is_, held, self._held))
            or list(map(torch.Tensor.data_ptr, self._parameters)) != self._memory
        )


def _slots(module: nn.Module, wanted: set[int]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yields where parameters, by id, and the modules that hold them hang in a module."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if id(parameter) in wanted:
                yield owner._parameters, name, parameter
        for name, child in owner._modules.items():
            if child is not None and any(id(one) in wanted for one in child.parameters()):
                yield owner._modules, name, child


def _counts_versions(parameter: torch.Tensor) -> bool:
    try:
        _version(parameter)
    except RuntimeError:
        return False
    return True


def guarded(
    run: Callable[..., torch.Tensor], watch: WeightWatch, technique: str, site: str
) -> Callable[..., torch.Tensor]:
    """Returns ``run`` of tensors, which refuses changed weights and whose gradients are refused.

    While `torch.compile` or `torch.export` traces it, weights are taken to be those that were read:
    what is compiled does not look at them again.

    Args:
        run: Runs the experts of a site; for inference.
        watch: Of the weights that it read.
        technique: What it is, as the user called it.
        site: Name of the site.
    """

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and watch.has_changed():
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
