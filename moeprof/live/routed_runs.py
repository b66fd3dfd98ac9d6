"""Layers of experts without a model around them, driven by the routing of a trace.

For geometries that are too large to load, or whose weights are not to be had: experts are random,
routing is the trace's own. Every pass is a forward pass through the experts of one stack's sites:
normalization, experts, residual stream. Leaves out attention, embeddings and gates.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from moeprof.errors import TraceError, UsageError
from moeprof.live.buffer_settings import BufferedSite
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import ALIGNMENT_BYTES, BlockShape, ExpertStore, make_store
from moeprof.replay.cache.streams import device_of_expert

if TYPE_CHECKING:
    from moeprof.trace.blocks import Dispatch
    from moeprof.trace.reader import Trace
    from moeprof.trace.schema import Site

_SHIFT = 64
_BIAS_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class ExpertGeometry:
    """Shape of the experts that are made up.

    Attributes:
        d_model: Width of a row.
        d_ff: Hidden width.
        gated: True where the activation gates.
        bias: True for biases.
        activation: As in `ExpertWeights`.
        dtype: Of weights and rows.
    """

    d_model: int
    d_ff: int
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    dtype: torch.dtype = torch.bfloat16

    @property
    def block_shape(self) -> BlockShape:
        """What lies where in a block."""
        rows = 2 * self.d_ff if self.gated else self.d_ff
        shapes: dict[str, tuple[int, ...]] = {
            "w_in": (rows, self.d_model),
            "w_out": (self.d_model, self.d_ff),
        }
        if self.bias:
            shapes |= {"b_in": (rows,), "b_out": (self.d_model,)}
        return BlockShape(
            shapes=shapes, dtype=self.dtype, activation=self.activation, gated=self.gated
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedPass:
    """One dispatch of a pass.

    Attributes:
        site: Site id.
        ids: [T, k] int64 indices into the experts of this device; -1 where not executed here.
        weights: [T, k].
    """

    site: int
    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedStep:
    """One forward pass of a stack.

    Attributes:
        step: As in the trace.
        phase: As in the trace.
        passes: Dispatches in order of execution.
    """

    step: int
    phase: str
    passes: tuple[RoutedPass, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first dispatch."""
        return self.passes[0].ids.shape[0]


def local_experts(site: Site, *, device_index: int, num_devices: int) -> np.ndarray:
    """Returns the ids of a site's experts on one of several devices, contiguous as by default."""
    return np.flatnonzero(device_of_expert(site, num_devices, None) == device_index)


def routed_steps(
    trace: Trace,
    *,
    stack: str,
    device: torch.device | str,
    dtype: torch.dtype,
    device_index: int = 0,
    num_devices: int = 1,
    max_steps: int | None = None,
) -> list[RoutedStep]:
    """Returns the routing of a stack, on the device.

    Weights are those of the trace; where it holds none, every slot weighs the same.

    Args:
        trace: The trace.
        stack: Its stack.
        device: Where experts run.
        dtype: Of weights.
        device_index: Which of ``num_devices`` this is.
        num_devices: Devices that experts are spread over.
        max_steps: At most so many steps.

    Raises:
        TraceError: There is no routing.
    """
    local: dict[int, np.ndarray] = {}
    for site in trace.info.sites_of(stack):
        table = np.full(site.num_experts + 1, -1, np.int64)
        own = local_experts(site, device_index=device_index, num_devices=num_devices)
        table[own] = np.arange(len(own))
        local[site.site] = table
    found: dict[int, tuple[str, list[RoutedPass]]] = {}
    for dispatch in _dispatches(trace, stack):
        if dispatch.step not in found:
            if max_steps is not None and len(found) == max_steps:
                break
            found[dispatch.step] = (dispatch.phase, [])
        ids = local[dispatch.site][dispatch.experts]
        weights = dispatch.weights
        if weights is None:
            weights = np.full(ids.shape, 1.0 / ids.shape[1], np.float32)
        found[dispatch.step][1].append(
            RoutedPass(
                site=dispatch.site,
                ids=torch.from_numpy(np.ascontiguousarray(ids)).to(device),
                weights=torch.from_numpy(np.ascontiguousarray(weights)).to(device, dtype),
            )
        )
    if not found:
        raise TraceError(f"{trace.path} holds no routing of the stack {stack}")
    return [
        RoutedStep(step=step, phase=phase, passes=tuple(passes))
        for step, (phase, passes) in found.items()
    ]


def _dispatches(trace: Trace, stack: str) -> Iterator[Dispatch]:
    try:
        yield from trace.dispatches(stack=stack, weights=True)
    except TraceError as error:
        if "weight" not in error.message:
            raise
        yield from trace.dispatches(stack=stack)


def random_sites(
    trace: Trace,
    geometry: ExpertGeometry,
    *,
    stack: str,
    device_index: int = 0,
    num_devices: int = 1,
    pinned: bool = False,
    share_host: bool = False,
    seed: int = 0,
) -> list[BufferedSite]:
    """Returns sites of random experts, as many per site as the trace's model has.

    Experts are windows of one random sequence, each shifted against the last, so that all differ
    and 50 GiB of them are there within a minute.

    Args:
        trace: Says which sites there are.
        geometry: Shape of the experts.
        stack: Stack of the trace.
        device_index: Which of ``num_devices`` this is.
        num_devices: Devices that experts are spread over.
        pinned: Page-lock the experts.
        share_host: All sites read one host copy, each at another place of it, so that no block of a
            site has the bytes of another site's: for machines with less memory. Must be said beside
            what is measured.
        seed: Of the random sequence.

    Raises:
        UsageError: There is no such stack.
    """
    if stack not in trace.stacks:
        raise UsageError(f"there is no stack {stack!r}", hint=f"one of {', '.join(trace.stacks)}")
    shape = geometry.block_shape
    of_stack = trace.info.sites_of(stack)
    most = max(site.num_experts for site in of_stack) * len(of_stack)
    source = _source(shape, most, seed)
    every = [
        local_experts(site, device_index=device_index, num_devices=num_devices) for site in of_stack
    ]
    make = _shared_stores if share_host else _own_stores
    stores = make(shape, [len(own) for own in every], source, pinned=pinned)
    return [
        BufferedSite(
            site=site.site, stack=stack, layer=site.layer, store=store, expert_ids=own.tolist()
        )
        for site, own, store in zip(of_stack, every, stores, strict=True)
    ]


def _own_stores(
    shape: BlockShape, counts: Sequence[int], source: Mapping[str, torch.Tensor], *, pinned: bool
) -> list[ExpertStore]:
    """Returns stores of so many experts each, in memory of their own."""
    stores = []
    first = 0
    for count in counts:
        stores.append(_random_store(shape, count, source, first, pinned=pinned))
        first += count
    return stores


def _shared_stores(
    shape: BlockShape, counts: Sequence[int], source: Mapping[str, torch.Tensor], *, pinned: bool
) -> list[ExpertStore]:
    """Returns stores of so many experts each; those of as many lie in one piece of memory."""
    every: dict[int, Iterator[ExpertStore]] = {}
    first = 0
    for count, num_stores in Counter(counts).items():
        every[count] = iter(_windows(shape, count, num_stores, source, first, pinned=pinned))
        first += count * num_stores
    return [next(every[count]) for count in counts]


def _windows(
    shape: BlockShape,
    num_experts: int,
    num_stores: int,
    source: Mapping[str, torch.Tensor],
    first: int,
    *,
    pinned: bool,
) -> list[ExpertStore]:
    """Returns stores in one piece of memory that is hardly longer than one of them.

    Each begins a little further on than the last, by more than the windows of its experts differ:
    blocks of two stores are as different as those of two experts, and still lie one behind the
    other, where whoever copies expects them. No store begins where a block of another one does: it
    would have that block.
    """
    distance = _distance(shape, num_experts, num_stores)
    spare = -(-(num_stores - 1) * distance // shape.block_bytes)
    whole = _random_store(shape, num_experts + spare, source, first, pinned=pinned)
    size = num_experts * shape.block_bytes
    return [
        dataclasses.replace(
            whole,
            num_experts=num_experts,
            memory=whole.memory[nth * distance : nth * distance + size],
            # One unlocks them all: the first, which begins where the piece does.
            is_locked=whole.is_locked and nth == 0,
        )
        for nth in range(num_stores)
    ]


def _distance(shape: BlockShape, num_experts: int, num_stores: int) -> int:
    """Returns the bytes between beginnings of stores; all of one where blocks are too short."""
    distance = _aligned(num_experts * _SHIFT * shape.itemsize)
    whole = num_experts * shape.block_bytes
    while distance < whole:
        if shape.block_bytes // math.gcd(shape.block_bytes, distance) >= num_stores:
            return distance
        distance += ALIGNMENT_BYTES
    return whole


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _source(shape: BlockShape, num_experts: int, seed: int) -> dict[str, torch.Tensor]:
    """Returns a random sequence for each tensor, long enough for a window per expert."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in shape.shapes.items():
        count = torch.Size(size).numel() + num_experts * _SHIFT
        spread = _BIAS_SPREAD if len(size) == 1 else size[1] ** -0.5
        drawn = torch.empty(count, dtype=torch.float32)
        found[name] = drawn.normal_(std=spread, generator=generator).to(shape.dtype)
    return found


def _random_store(
    shape: BlockShape,
    num_experts: int,
    source: Mapping[str, torch.Tensor],
    first: int,
    *,
    pinned: bool,
) -> ExpertStore:
    def fill(expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        start = (first + expert) * _SHIFT
        for name, tensor in tensors.items():
            tensor.view(-1).copy_(source[name][start : start + tensor.numel()])

    return make_store(shape, num_experts, fill, pinned=pinned)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What one step of a run gave.

    Attributes:
        step: As in the trace.
        phase: As in the trace.
        wall_ms: From the first call to the end on the device.
        outputs: Output of every dispatch; empty unless they were asked for.
    """

    step: int
    phase: str
    wall_ms: float
    outputs: tuple[torch.Tensor, ...]


def run_steps(
    buffer: ExpertBuffer,
    steps: Sequence[RoutedStep],
    hidden: torch.Tensor,
    *,
    keep_outputs: bool = False,
    follow: Iterable[torch.Tensor] | None = None,
) -> Iterator[StepResult]:
    """Yields the result of each step; ends with the device at rest.

    Args:
        buffer: The experts.
        steps: The routing.
        hidden: [most tokens, d_model] rows that every step starts with.
        keep_outputs: Keep what every dispatch put out.
        follow: What the dispatches of another run of these steps put out, in order. Each dispatch
            is then given what it was given there, to the bit, whatever came out here: where
            experts run elsewhere, sums round otherwise, and 48 layers would add that up.
    """
    followed = None if follow is None else iter(follow)
    is_cuda = buffer.device.type == "cuda"
    for step in steps:
        outputs = []
        begun_s = time.perf_counter()
        buffer.begin_step(step.step)
        stream = hidden
        for each in step.passes:
            stream = stream[: each.ids.shape[0]]
            # Gated experts square what they are given: without it numbers grow past any type.
            rows = F.rms_norm(stream, stream.shape[-1:])
            out = buffer.run(each.site, rows, each.ids, each.weights)
            if keep_outputs:
                outputs.append(out)
            stream = stream + (out if followed is None else next(followed))
        if is_cuda:
            torch.cuda.synchronize(buffer.device)
        yield StepResult(
            step=step.step,
            phase=step.phase,
            wall_ms=(time.perf_counter() - begun_s) * 1e3,
            outputs=tuple(outputs),
        )


def starting_rows(
    steps: Sequence[RoutedStep], geometry: ExpertGeometry, device: torch.device | str, seed: int = 1
) -> torch.Tensor:
    """Returns random rows [most tokens of a step, d_model] to start every step with."""
    generator = torch.Generator().manual_seed(seed)
    most = max(step.num_tokens for step in steps)
    rows = torch.randn(most, geometry.d_model, generator=generator)
    return rows.to(device=device, dtype=geometry.dtype)
