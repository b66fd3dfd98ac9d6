"""From a model's experts module to `ExpertWeights`: which parameter holds which part of an expert.

Three layouts are read: parameters stacked over experts (``gate_up_proj`` and ``down_proj``, or
``w_in`` and ``w_out``), and one module per expert with two or three linear layers. Anything else is
refused with the reason; so is a module that computes something else than what was read from it.
Leaves out what is done with the weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeprof.errors import UsageError
from moeprof.live.experts import ACTIVATIONS, ExpertWeights

TENSORS = ("w_in", "w_out", "b_in", "b_out")

ExpertsCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_HINT = "experts stacked as gate_up_proj and down_proj, or one module of linear layers each"
_STACKED_NAMES = {
    ("gate_up_proj", "down_proj"): (True, "gate_up_proj_bias", "down_proj_bias"),
    ("up_proj", "down_proj"): (False, "up_proj_bias", "down_proj_bias"),
    ("w_in", "w_out"): (False, "b_in", "b_out"),
}
_PAIRS = (("fc1", "fc2"), ("wi", "wo"), ("w_in", "w_out"), ("up_proj", "down_proj"))
_TRIPLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_ACTIVATION_NAMES = ("act_fn", "act", "activation", "activation_fn")
_INNER_SPREAD = 4.0
_PROBES = 33
_FUSED_DIM = 3
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, kw_only=True)
class WeightPart:
    """Where a part of one tensor of `ExpertWeights` lies in a module.

    Attributes:
        tensor: One of `TENSORS`.
        parameter: The parameter that holds it.
        expert: The expert it belongs to; None where the parameter is stacked over experts.
        start: First row of the part within the expert's matrix (or bias).
        transposed: True where the parameter holds the matrix transposed.
    """

    tensor: str
    parameter: nn.Parameter
    expert: int | None
    start: int = 0
    transposed: bool = False

    def matrix(self, expert: int) -> torch.Tensor:
        """Returns the part of one expert as a view in the orientation of `ExpertWeights`."""
        found = self.parameter.detach()
        if self.expert is None:
            found = found[expert]
        return found.t() if self.transposed else found


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How the experts of a module are stored.

    Attributes:
        num_experts: Experts.
        shapes: Shape of each tensor of one expert, in the order of `TENSORS`.
        dtype: Of all of them.
        activation: A key of `ACTIVATIONS`.
        gated: True where the activation gates.
        parts: All parts.
        modules: One module per expert where the model keeps them apart, else empty.
    """

    num_experts: int
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    activation: str
    gated: bool
    parts: tuple[WeightPart, ...]
    modules: tuple[nn.Module, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.parts[0].parameter.device

    @property
    def is_stacked(self) -> bool:
        """True where every tensor is one parameter, stacked over experts."""
        return all(part.expert is None for part in self.parts)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        sizes = (torch.Size(shape).numel() for shape in self.shapes.values())
        return sum(sizes) * self.dtype.itemsize

    def parts_of(self, expert: int) -> Iterator[tuple[WeightPart, torch.Tensor]]:
        """Yields the parts of one expert with views of them."""
        for part in self.parts:
            if part.expert is None or part.expert == expert:
                yield part, part.matrix(expert)

    def write(self, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies one expert into ``tensors``, each of the shape in `shapes`."""
        for part, matrix in self.parts_of(expert):
            tensors[part.tensor][part.start : part.start + matrix.shape[0]].copy_(matrix)

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> ExpertWeights:
        """Returns ``tensors`` [experts, ...], named as in `TENSORS`, as weights of this kind."""
        return ExpertWeights(
            w_in=tensors["w_in"],
            w_out=tensors["w_out"],
            b_in=tensors.get("b_in"),
            b_out=tensors.get("b_out"),
            activation=self.activation,
            gated=self.gated,
        )

    def run(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Returns ``rows`` [n, d_model] through one expert, read from the parameters."""
        tensors = {
            name: torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }
        self.write(expert, tensors)
        return self.weights({name: one[None] for name, one in tensors.items()}).run(0, rows)


def stack_experts(module: nn.Module) -> ExpertWeights:
    """Returns the experts of ``module`` as stacked weights on the module's device.

    Parameters that are stacked already are shared, not copied.

    Raises:
        UsageError: The layout is none of those this module reads, or weights are quantised or
            tied.
    """
    layout = expert_layout(module)
    if layout.is_stacked:
        shared = {part.tensor: part for part in layout.parts}
        views = {
            name: part.parameter.detach().mT if part.transposed else part.parameter.detach()
            for name, part in shared.items()
        }
        return layout.weights(views)
    with torch.inference_mode(False), torch.no_grad():
        stacked = {
            name: torch.empty(layout.num_experts, *shape, dtype=layout.dtype, device=layout.device)
            for name, shape in layout.shapes.items()
        }
        for expert in range(layout.num_experts):
            layout.write(expert, {name: tensor[expert] for name, tensor in stacked.items()})
    return layout.weights(stacked)


def expert_layout(module: nn.Module) -> ExpertLayout:
    """Returns how the experts of ``module`` are stored.

    Raises:
        UsageError: As `stack_experts`.
    """
    children = _numbered(module)
    layout = _apart(module, children) if children else _stacked(module)
    seen: set[int] = set()
    for part in layout.parts:
        _check_parameter(module, part.parameter)
        place = part.parameter.data_ptr()
        if part.parameter.device.type != "meta" and place in seen:
            raise _refusal(module, "two of its experts share their weights")
        seen.add(place)
    if len({part.parameter.dtype for part in layout.parts}) > 1:
        raise _refusal(module, "its experts have weights of several types")
    if len({part.parameter.device for part in layout.parts}) > 1:
        raise _refusal(module, "its experts lie on several devices")
    return layout


def check_layout(module: nn.Module, layout: ExpertLayout, call: ExpertsCall | None = None) -> None:
    """Runs two experts as the module does and as ``layout`` says, and compares.

    This is what tells a clamped or otherwise special activation, or weights applied to the input
    instead of the output, from what `ExpertWeights` computes.

    Args:
        module: The module; where its experts are modules they are called one by one.
        layout: As `expert_layout` returned it.
        call: How to call it with (rows, ids [T, 1], weights [T, 1]); its forward when None.

    Raises:
        UsageError: They differ.
    """
    chosen = sorted({0, layout.num_experts - 1})
    width = layout.shapes["w_in"][1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(chosen), width, generator=generator, dtype=torch.float64)
    rows = rows.to(layout.device, layout.dtype)
    # Autocast would round what is called, and not what is held against it.
    with torch.no_grad(), torch.autocast(layout.device.type, enabled=False):
        # Inner values well away from zero, where clamps and other activations show.
        inner = rows.float() @ _first_matrix(layout, chosen[0]).float().t()
        rows = (rows.float() * (_INNER_SPREAD / inner.std().clamp(min=1e-12))).to(rows.dtype)
        expected = torch.cat(
            [layout.run(expert, rows[i : i + 1]) for i, expert in enumerate(chosen)]
        )
        gate = torch.full((len(chosen), 1), 0.5, dtype=rows.dtype, device=rows.device)
        if layout.modules:
            found = torch.cat(
                [
                    _rows_of(layout.modules[expert], rows[i : i + 1])
                    for i, expert in enumerate(chosen)
                ]
            )
        else:
            ids = torch.tensor(chosen, device=rows.device)[:, None]
            found = (call or functools.partial(type(module).forward, module))(rows, ids, gate)
            expected = expected * gate
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = float(((found.float() - expected.float()).abs().max() / scale).item())
    limit = _TOLERANCE.get(layout.dtype, _HALF_TOLERANCE)
    if not error <= limit:
        raise _refusal(
            module,
            f"its experts compute something else than two matrices around {layout.activation}"
            f"{' with a gate' if layout.gated else ''} (they differ by {error:.1e})",
        )


def _rows_of(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = type(module).forward(module, rows)
    return out


def _first_matrix(layout: ExpertLayout, expert: int) -> torch.Tensor:
    parts = [matrix for part, matrix in layout.parts_of(expert) if part.tensor == "w_in"]
    return torch.cat(parts)


def _refusal(module: nn.Module, reason: str) -> UsageError:
    return UsageError(f"{type(module).__name__}: {reason}", hint=f"what can be read: {_HINT}")


def _check_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    kind = type(parameter)
    if kind not in (nn.Parameter, torch.Tensor) or not parameter.is_floating_point():
        raise _refusal(module, f"its weights are quantised or wrapped ({kind.__name__})")
    if parameter.dtype.itemsize < torch.bfloat16.itemsize:
        raise _refusal(module, f"its weights are quantised ({parameter.dtype})")


def _numbered(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the modules of single experts, by id; empty where there are none."""
    found = []
    for name, child in module.named_children():
        match = re.search(r"(\d+)$", name)
        if match is not None and next(child.parameters(), None) is not None:
            found.append((int(match.group(1)), child))
    if not found:
        containers = [
            child
            for child in module.children()
            if isinstance(child, (nn.ModuleDict, nn.ModuleList))
        ]
        return _numbered(containers[0]) if len(containers) == 1 else ()
    found.sort(key=lambda item: item[0])
    if [number for number, _ in found] != list(range(len(found))):
        raise _refusal(module, "its experts are not numbered from 0 on")
    return tuple(child for _, child in found)


def _apart(module: nn.Module, experts: tuple[nn.Module, ...]) -> ExpertLayout:
    first = experts[0]
    if len({type(expert) for expert in experts}) > 1:
        raise _refusal(module, "its experts are of several classes")
    names = next(
        (
            names
            for names in (*_TRIPLES, *_PAIRS)
            if all(isinstance(getattr(first, name, None), nn.Module) for name in names)
        ),
        None,
    )
    if names is None:
        raise _refusal(module, f"the linear layers of {type(first).__name__} are not known")
    parts = []
    for index, expert in enumerate(experts):
        layers = [getattr(expert, name) for name in names]
        for layer in layers:
            if type(layer) is not nn.Linear:
                raise _refusal(module, f"an expert holds a {type(layer).__name__}, not a Linear")
        parts += list(_linear_parts(index, layers))
    gated = len(names) > 2  # noqa: PLR2004
    shapes = _shapes(part for part in parts if part.expert == 0)
    if any(
        _shapes(part for part in parts if part.expert == index) != shapes
        for index in range(len(experts))
    ):
        raise _refusal(module, "its experts differ in shape")
    return ExpertLayout(
        num_experts=len(experts),
        shapes=shapes,
        dtype=parts[0].parameter.dtype,
        activation=_activation_of(module, first),
        gated=gated,
        parts=tuple(parts),
        modules=experts,
    )


def _linear_parts(expert: int, layers: list[Any]) -> Iterator[WeightPart]:
    start = 0
    for layer in layers[:-1]:
        yield WeightPart(tensor="w_in", parameter=layer.weight, expert=expert, start=start)
        if layer.bias is not None:
            yield WeightPart(tensor="b_in", parameter=layer.bias, expert=expert, start=start)
        start += layer.weight.shape[0]
    yield WeightPart(tensor="w_out", parameter=layers[-1].weight, expert=expert)
    if layers[-1].bias is not None:
        yield WeightPart(tensor="b_out", parameter=layers[-1].bias, expert=expert)


def _shapes(parts: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one expert's tensors, in the order of `TENSORS`."""
    found: dict[str, tuple[int, ...]] = {}
    for part in parts:
        rows, *rest = part.matrix(part.expert or 0).shape
        before = found.get(part.tensor, (0,))[0]
        found[part.tensor] = (before + rows, *rest)
    return {name: found[name] for name in TENSORS if name in found}


def _stacked(module: nn.Module) -> ExpertLayout:
    own = dict(module.named_parameters(recurse=False))
    names = next((pair for pair in _STACKED_NAMES if all(name in own for name in pair)), None)
    if names is None:
        raise _refusal(module, "its parameters have names that say nothing")
    gated, *biases = _STACKED_NAMES[names]
    known = {*names, *biases}
    strange = [name for name in own if name not in known]
    if strange:
        raise _refusal(module, f"nothing is known of its parameter {strange[0]}")
    if next(iter(module.children()), None) is not None and _has_parameters(module):
        raise _refusal(module, "it holds weights in modules of its own")
    gate = getattr(module, "_apply_gate", None)
    if gate is not None and getattr(gate, "__name__", "") != "_default_apply_gate":
        raise _refusal(module, "it has an activation of its own (_apply_gate)")
    if gated and getattr(module, "is_concatenated", True) is False:
        raise _refusal(module, "gate and up projection are interleaved")
    matrix_in, matrix_out = (own[name] for name in names)
    if matrix_in.dim() != _FUSED_DIM or matrix_out.dim() != _FUSED_DIM:
        raise _refusal(module, "its matrices are not stacked as [experts, rows, columns]")
    transposed = bool(getattr(module, "is_transposed", False))
    parts = [
        WeightPart(tensor="w_in", parameter=matrix_in, expert=None, transposed=transposed),
        WeightPart(tensor="w_out", parameter=matrix_out, expert=None, transposed=transposed),
    ]
    for tensor, name in zip(("b_in", "b_out"), biases, strict=True):
        if name in own:
            parts.append(WeightPart(tensor=tensor, parameter=own[name], expert=None))
    if len({part.parameter.shape[0] for part in parts}) > 1:
        raise _refusal(module, "its parameters are stacked over different numbers of experts")
    is_plain = names == ("w_in", "w_out") and not _activation_candidates(module)
    return ExpertLayout(
        num_experts=matrix_in.shape[0],
        shapes=_shapes(parts),
        dtype=matrix_in.dtype,
        # The first paper's experts have no activation module: a rectifier is written out.
        activation="relu" if is_plain else _activation_of(module, module),
        gated=gated,
        parts=tuple(parts),
    )


def _has_parameters(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _activation_candidates(owner: nn.Module) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    found = (getattr(owner, name, None) for name in _ACTIVATION_NAMES)
    return [each for each in found if callable(each)]


def _activation_of(module: nn.Module, owner: nn.Module) -> str:
    """Returns the activation's name, told by what it computes."""
    candidates = _activation_candidates(owner)
    if not candidates:
        raise _refusal(module, "its activation is not to be seen")
    probe = torch.linspace(-_INNER_SPREAD, _INNER_SPREAD, _PROBES)
    with torch.no_grad():
        found = candidates[0](probe.clone())
        for name, function in ACTIVATIONS.items():
            if torch.allclose(found, function(probe), rtol=1e-5, atol=1e-6):
                return name
    raise _refusal(module, f"its activation is none of {', '.join(ACTIVATIONS)}")
