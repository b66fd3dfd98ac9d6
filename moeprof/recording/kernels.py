"""A short profiled pass that says what the experts module hides: dispatch, experts, combine.

Module hooks time the experts call as a whole, although most models bring rows to experts and back
inside it. Under the profiler every kernel (every operator on the CPU) that runs inside the call is
classified by what it does to which shape; what fits no rule is kept as unclassified and shown.
The profiler slows the host, so these times are shares, not latencies.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprof.recording.anatomy import Anatomy
from moeprof.recording.calls import token_argument, token_shape
from moeprof.recording.sites import FoundSite

DISPATCH, EXPERTS, COMBINE, UNCLASSIFIED = "dispatch", "experts", "combine", "unclassified"
REGION = re.compile(r"^moeprof\|(\w+)\|(\d+)\|(\d+)\|(\d+)$")
US_PER_MS = 1e3
MATRIX_DIM = 2
FUSED_DIM = 3

_PRODUCTS = re.compile(
    r"::(_?grouped_mm\w*|mm|bmm|addmm|baddbmm|matmul|linear|_scaled_mm|addmv|mv|dot|einsum)$"
)
_ACTIVATIONS = re.compile(
    r"::(silu|gelu|relu|relu_|sigmoid|tanh|softplus|hardtanh|clamp_?|clamp_min|clamp_max|"
    r"native_dropout|dropout|silu_|gelu_|leaky_relu)$"
)
_ROW_SEARCH = re.compile(
    r"::(one_hot|nonzero|nonzero_numpy|where|sort|argsort|histc|bincount|cumsum|repeat_interleave|"
    r"floor_divide|div|div_|remainder|eq|ne|gt|ge|lt|le|greater|bitwise_\w+|_local_scalar_dense|item|"
    r"scatter_?|_unique2|unique|topk|_?softmax|searchsorted|arange|is_nonzero|any|all|max|min)$"
)
_ACCUMULATION = re.compile(
    r"::(index_add_?|index_copy_?|scatter_add_?|scatter_reduce\w*|index_put_?|_index_put_impl_|"
    r"index_reduce_?)$"
)
_GATHERS = re.compile(r"::(index|index_select|gather|take_along_dim|_unsafe_index)$")
_ALLOCATIONS = re.compile(r"::(zeros_like|zeros|zero_|fill_|new_zeros)$")
_ELEMENTWISE = re.compile(
    r"::(mul|mul_|add|add_|sub|neg|masked_fill_?|_to_copy|copy_|to|clone|contiguous|cat)$"
)
_VIEWS = re.compile(
    r"::(view|reshape|select|as_strided|slice|narrow|t|transpose|permute|expand|unsqueeze|squeeze|"
    r"chunk|split|detach|alias|resolve_conj|resolve_neg|numpy_T|lift_fresh|unbind|flatten)$"
)
_SUMS = re.compile(r"::(sum|mean)$")


@dataclass(frozen=True)
class CallShape:
    """Sizes that tell what an operator inside an experts call works on.

    Attributes:
        num_rows: Rows the call was given, padding included.
        d_model: Width of a row.
        num_experts: Experts of the site.
        top_k: Slots per row.
    """

    num_rows: int
    d_model: int
    num_experts: int
    top_k: int


def classify(name: str, shapes: Sequence[Any], call: CallShape) -> str:
    """Returns the component an operator inside an experts call belongs to.

    Args:
        name: Operator name, such as ``aten::index_add_``.
        shapes: Shapes of its inputs, as the profiler reports them.
        call: Sizes of the call.
    """
    first = tuple(shapes[0]) if shapes and isinstance(shapes[0], (list, tuple)) else ()
    if _PRODUCTS.search(name):
        return EXPERTS
    if _ACTIVATIONS.search(name):
        return EXPERTS if len(first) >= MATRIX_DIM else DISPATCH  # Ids are clamped, too.
    if any(pattern.search(name) for pattern in (_ACCUMULATION, _SUMS, _ALLOCATIONS)):
        # Writing ids into a mask is not accumulation of rows.
        return COMBINE if first and first[-1] == call.d_model else DISPATCH
    if _GATHERS.search(name):
        return _gather(first, call)
    if _ROW_SEARCH.search(name):
        return DISPATCH
    if _ELEMENTWISE.search(name) or _VIEWS.search(name):
        return _elementwise(name, first, shapes, call)
    return UNCLASSIFIED


def _gather(first: tuple[int, ...], call: CallShape) -> str:
    if len(first) == FUSED_DIM and 1 in first:
        first = tuple(size for size in first if size != 1)
    if len(first) == FUSED_DIM and first[0] == call.num_experts:
        return EXPERTS  # Copies of expert weights, one per row.
    if len(first) == MATRIX_DIM and first[1] == call.d_model:
        return DISPATCH if first[0] == call.num_rows else COMBINE
    if first in ((call.num_rows, call.top_k), (call.num_rows, call.num_experts)):
        return COMBINE  # Weights of the rows an expert returns.
    if len(first) == 1:
        return COMBINE
    return DISPATCH if first and first[0] == call.num_experts else UNCLASSIFIED


def _elementwise(name: str, first: tuple[int, ...], shapes: Sequence[Any], call: CallShape) -> str:
    second = tuple(shapes[1]) if len(shapes) > 1 and isinstance(shapes[1], (list, tuple)) else ()
    if not first:
        return DISPATCH
    last, product = first[-1], "mul" in name
    weighs = product or "masked_fill" in name
    num_rows = math.prod(first[:-1])
    wide, matrix = last == call.d_model, len(first) >= MATRIX_DIM
    index_like = last in (call.top_k, call.num_experts, 1) or not matrix
    rules = (
        # Slices of stacked expert weights and biases.
        (matrix and first[0] == call.num_experts and wide, EXPERTS),
        (
            len(first) == FUSED_DIM and first[0] == call.num_experts and call.d_model in first,
            EXPERTS,
        ),
        # Rows times their gate weight, or cleared where their slot is empty.
        (weighs and wide and second[-1:] == (1,), COMBINE),
        (product and matrix and wide and second == first, EXPERTS),
        # The hidden width of an expert is neither of the others.
        (matrix and not wide and not index_like and last != call.num_rows, EXPERTS),
        (index_like or last == call.num_rows, DISPATCH),
        # Outputs of shared and routed experts of every row, added up.
        (wide and "add" in name and second == first and num_rows == call.num_rows, COMBINE),
        # Bias of the output projection, the same for all rows or one for each.
        (wide and "add" in name and (len(second) == 1 or second == first), EXPERTS),
    )
    return next((component for fits, component in rules if fits), UNCLASSIFIED)


class _Ranges:
    """Hooks that open a named profiler range around each experts call and block."""

    def __init__(self, found: Sequence[FoundSite], anatomy: Anatomy) -> None:
        self.step = -1
        self.stack = ""
        self.phases: dict[int, tuple[str, str]] = {}
        self._handles: list[Any] = []
        self._shape = (0, 0)
        for stack, module in anatomy.stacks.items():
            self._handles.append(
                module.register_forward_pre_hook(self._stack_hook(stack), with_kwargs=True)
            )
        for site, found_site in enumerate(found):
            modules = found_site.modules
            self._around(modules.block, "block", site)
            if modules.experts is not None and modules.experts is not modules.block:
                self._around(modules.experts, "experts", site)
            apart = (modules.router, *found_site.shared)
            for part in apart:
                if part is not None:
                    self._around(part, "apart", site)

    def _stack_hook(self, stack: str) -> Callable[..., None]:
        def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = token_argument(module, args, kwargs)
            if tokens is None:
                return
            self._shape = token_shape(tokens)
            self.step += 1
            phase = "prefill" if self._shape[1] > 1 else "decode"
            if stack == "encoder":
                phase = "encode"
            elif stack not in {s for s, _ in self.phases.values()}:
                phase = "prefill"
            self.phases[self.step] = (stack, phase)

        return begins

    def _around(self, module: nn.Module, region: str, site: int) -> None:
        opened: list[Any] = []

        def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
            rows = self._shape[0] * self._shape[1]
            name = f"moeprof|{region}|{site}|{self.step}|{rows}"
            scope = torch.profiler.record_function(name)
            scope.__enter__()  # type: ignore[no-untyped-call]
            opened.append(scope)

        def ends(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if opened:
                opened.pop().__exit__(None, None, None)

        self._handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        self._handles.append(module.register_forward_hook(ends, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def profile_kernels(
    found: Sequence[FoundSite],
    anatomy: Anatomy,
    run: Callable[[], object],
    *,
    top_k: Mapping[int, int],
    cuda: bool,
) -> dict[str, np.ndarray]:
    """Returns the columns of the table `kernels` for one run under the profiler.

    Args:
        found: The model's MoE sites.
        anatomy: Its stacks and layers.
        run: Runs the model for about ten forward passes.
        top_k: Slots per row by site.
        cuda: True where kernels run on a GPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # It reports its own start on stderr.
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    ranges = _Ranges(found, anatomy)
    try:
        with torch.profiler.profile(
            activities=activities, record_shapes=True, acc_events=True
        ) as profiler:
            run()
            if cuda:
                torch.cuda.synchronize()
    finally:
        ranges.remove()
    widths = [_width(site) for site in found]
    totals: dict[tuple[int, int, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events() or ():
        match = REGION.match(event.name)
        if match is None or match[1] == "apart":
            continue
        site, step = int(match[2]), int(match[3])
        call = CallShape(
            num_rows=int(match[4]),
            d_model=widths[site],
            num_experts=found[site].num_experts,
            top_k=top_k.get(site, 1),
        )
        for child in event.cpu_children:
            for component, spent_us, count in _components(child, call, cuda=cuda):
                if count == 0:
                    continue
                total = totals[(step, site, match[1], component)]
                total[0] += spent_us
                total[1] += count
    return _table(totals, ranges.phases, found)


def _components(event: Any, call: CallShape, *, cuda: bool) -> Iterator[tuple[str, float, int]]:
    """Yields (component, microseconds, kernels) of an operator.

    An operator that fits a rule takes what it called along; one that fits none hands its parts on.
    """
    if event.name.startswith("moeprof|"):
        return  # A range of its own.
    component = classify(event.name, event.input_shapes or (), call)
    if component != UNCLASSIFIED or not event.cpu_children:
        yield component, *_spent_us(event, cuda=cuda, whole=True)
        return
    yield component, *_spent_us(event, cuda=cuda, whole=False)
    for child in event.cpu_children:
        yield from _components(child, call, cuda=cuda)


def _width(site: FoundSite) -> int:
    router = site.modules.router or site.modules.block
    owner = site.expert_modules[0] if site.expert_modules else router
    for parameter in owner.parameters():
        if parameter.dim() == MATRIX_DIM:
            return int(parameter.shape[-1])
    return 0


def _spent_us(event: Any, *, cuda: bool, whole: bool) -> tuple[float, int]:
    """Returns (microseconds, kernels or operators) of an event; ``whole``: with what it called."""
    if not cuda:
        return float(event.cpu_time_total if whole else event.self_cpu_time_total), 1
    kernels = list(event.kernels)
    if whole:
        waiting = list(event.cpu_children)
        while waiting:
            child = waiting.pop()
            kernels.extend(child.kernels)
            waiting.extend(child.cpu_children)
    return float(sum(kernel.duration for kernel in kernels)), len(kernels)


def _table(
    totals: Mapping[tuple[int, int, str, str], Sequence[float]],
    phases: Mapping[int, tuple[str, str]],
    found: Sequence[FoundSite],
) -> dict[str, np.ndarray]:
    rows = []
    for (step, site, region, component), (spent_us, count) in sorted(totals.items()):
        stack, phase = phases[step]
        rows.append(
            (
                step,
                stack,
                phase,
                max(found[site].layer, 0),
                site,
                region,
                component,
                spent_us / US_PER_MS,
                int(count),
            )
        )
    names = (
        "profile_step",
        "stack",
        "phase",
        "layer",
        "site",
        "region",
        "component",
        "device_ms",
        "num_kernels",
    )
    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    return {
        name: np.array(list(values), dtype=object)
        for name, values in zip(names, columns, strict=True)
    }
