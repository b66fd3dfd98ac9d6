"""Runs the experts of a stack under one setting after another, driven by recorded routing."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from moeprof.errors import MoeprofError, UsageError
from moeprof.live.buffer_settings import BufferedSite, BufferSettings
from moeprof.live.cache_plans import PreparedCaches, prepare_caches
from moeprof.live.core_binding import Unwatched, Watch
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import on_device, store_of_layout
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels import kernel_named
from moeprof.live.model_experts import readable_experts
from moeprof.live.repetitions import wait_for
from moeprof.live.routed_runs import (
    ExpertGeometry,
    RoutedStep,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.live.transfers import made_current
from moeprof.live.watched_steps import StepTimes, WatchedTimes
from moeprof.replay.expert_shapes import ITEM_BYTES, ExpertShape, shape_of_trace
from moeprof.replay.serving_settings import GatingSetting, Setting

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

WEIGHTS = ("auto", "random")

# The first dispatch of a kind has its kernels looked up, the second has their launches laid out.
_NEW_DISPATCHES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedStack:
    """The experts of a stack in host memory, and the routing that drives them.

    Attributes:
        trace: Where the routing comes from.
        sites: The experts.
        steps: The routing, on the device.
        hidden: Rows that every step starts with.
        shape: Of an expert.
        device: Where experts run.
        weights_source: Whose weights these are, in words.
    """

    trace: Trace
    sites: tuple[BufferedSite, ...]
    steps: tuple[RoutedStep, ...]
    hidden: torch.Tensor
    shape: ExpertShape
    device: torch.device
    weights_source: str

    @functools.cached_property
    def most_rows(self) -> int:
        """(token, slot) rows of the largest dispatch."""
        return max(one.ids.numel() for step in self.steps for one in step.passes)

    @functools.cached_property
    def warming_steps(self) -> tuple[RoutedStep, ...]:
        """Few steps that have every kind of dispatch, often enough that none is new."""
        seen: Counter[tuple[int, ...]] = Counter()
        found = []
        for step in self.steps:
            kinds = Counter(tuple(one.ids.shape) for one in step.passes)
            if any(seen[kind] < _NEW_DISPATCHES for kind in kinds):
                found.append(step)
                seen += kinds
        return tuple(found)

    def close(self) -> None:
        """Lets go of page locks."""
        for store in {id(site.store): site.store for site in self.sites}.values():
            store.close()


def geometry_of(shape: ExpertShape) -> ExpertGeometry:
    """Returns the geometry of random experts of a shape."""
    return ExpertGeometry(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        gated=shape.gated,
        bias=shape.bias,
        activation="silu" if shape.gated else "relu",
        dtype=getattr(torch, shape.dtype),
    )


def open_stack(
    trace: Trace,
    *,
    stack: str,
    device: torch.device | str,
    shape: ExpertShape | None = None,
    dtype: str | None = None,
    weights: str = "auto",
    max_steps: int | None = None,
    share_host: bool = False,
) -> RoutedStack:
    """Returns the experts of a stack: the model's own where it can be opened, else random ones.

    Args:
        trace: The trace.
        stack: Its stack.
        device: Where experts run.
        shape: Of random experts; as the trace has it when None. Where it is given, weights are
            random: the model's have a shape of their own.
        dtype: Of experts where no shape is given; as recorded when None.
        weights: ``auto``, or ``random`` for random ones in any case.
        max_steps: At most so many steps.
        share_host: All layers of random experts read one host copy, each at another place of it.

    Raises:
        UsageError: There is no such stack, or the shape is not known.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"there are no weights {weights!r}", hint=f"one of {', '.join(WEIGHTS)}")
    target = torch.device(device)
    pinned = target.type == "cuda"
    sites: list[BufferedSite] | None = None
    reason = "asked for" if weights == "random" else "the shape was given"
    if weights == "auto" and shape is None:
        try:
            sites, shape = _model_sites(trace, stack, pinned=pinned, dtype=dtype)
            source = f"weights of {trace.model.name}"
        except MoeprofError as error:
            reason = f"the model cannot be opened: {error.message}"
    if sites is None:
        shape = shape or shape_of_trace(trace, stack, dtype=dtype)
        sites = random_sites(
            trace, geometry_of(shape), stack=stack, pinned=pinned, share_host=share_host
        )
        source = f"random weights ({reason})" + (
            ", one host copy for all layers" if share_host else ""
        )
    assert shape is not None
    geometry = geometry_of(shape)
    steps = routed_steps(
        trace, stack=stack, device=target, dtype=geometry.dtype, max_steps=max_steps
    )
    return RoutedStack(
        trace=trace,
        sites=tuple(sites),
        steps=tuple(steps),
        hidden=starting_rows(steps, geometry, target),
        shape=shape,
        device=target,
        weights_source=source,
    )


def _model_sites(
    trace: Trace, stack: str, *, pinned: bool, dtype: str | None
) -> tuple[list[BufferedSite], ExpertShape]:
    """Returns the experts of the model that was recorded.

    Raises:
        MoeprofError: It cannot be opened, or is another one than the trace's.
    """
    from moeprof.zoo.loader import load

    own_dtype = trace.model.dtype.removeprefix("torch.")
    wanted = dtype or (own_dtype if own_dtype in ITEM_BYTES else None)
    loaded = load(trace.model.name, task=trace.model.task, device="cpu", dtype=wanted)
    if trace.model.weight_hash is not None and loaded.weight_hash != trace.model.weight_hash:
        raise MoeprofError(f"{trace.model.name} has other weights than those that were recorded")
    found, layouts = readable_experts(loaded.model)
    own = trace.info.sites_of(stack)
    chosen = [layout for site, layout in zip(found, layouts, strict=True) if site.stack == stack]
    if [layout.num_experts for layout in chosen] != [site.num_experts for site in own]:
        raise MoeprofError(f"{trace.model.name} has other experts than the trace")
    stores = [store_of_layout(layout, pinned=pinned) for layout in chosen]
    first = stores[0].shape
    if any(store.shape != first for store in stores):
        raise MoeprofError(f"the experts of {trace.model.name} differ in shape")
    shape = ExpertShape(
        d_model=first.shapes["w_in"][1],
        d_ff=first.shapes["w_out"][1],
        gated=first.gated,
        bias="b_in" in first.shapes,
        dtype=str(first.dtype).removeprefix("torch."),
    )
    sites = [
        BufferedSite(site=site.site, stack=stack, layer=site.layer, store=store)
        for site, store in zip(own, stores, strict=True)
    ]
    return sites, shape


class ResidentExperts:
    """All experts of a stack on the device, kept from one gating setting to the next.

    Every gating runs the same weights: copying them for each visit of each would take longer than
    the visits.
    """

    def __init__(self) -> None:
        self._weights: dict[int, ExpertWeights] = {}

    def of(self, stack: RoutedStack) -> Mapping[int, ExpertWeights]:
        """Returns the experts by site, copied to the device if they are not there."""
        missing = [site for site in stack.sites if site.site not in self._weights]
        every = on_device([site.store for site in missing], stack.device)
        try:
            for site, memory in zip(missing, every, strict=True):
                store = site.store
                stacked = store.shape.stacked_weights(memory, store.num_experts)
                self._weights[site.site] = stacked.contiguous()
        except torch.cuda.OutOfMemoryError:
            self.let_go()
            raise
        return self._weights

    def let_go(self) -> None:
        """Frees the device of them."""
        self._weights.clear()


class SettingRun:
    """A stack under one setting, ready to be timed.

    Steps that nobody judges (a prefill may copy half of all experts, for half a second) only bring
    caches to where judged steps find them. They are run without their copies: decisions, and with
    them all that judged steps do, are the same. Slots are filled with an expert beforehand, so that
    these read weights.

    Args:
        stack: The experts and their routing.
        setting: How they are run.
        resident: Where gating settings find all experts and leave them; a setting with a buffer
            lets go of them. Copied for this run alone when None.
        judged: Indices of the steps whose times count; all when None.
        prepared: Where the setting finds its caches by its name, and leaves them for its next run.
    """

    def __init__(
        self,
        stack: RoutedStack,
        setting: Setting,
        *,
        resident: ResidentExperts | None = None,
        judged: Sequence[int] | None = None,
        prepared: dict[str, PreparedCaches] | None = None,
    ) -> None:
        self.setting = setting
        every = stack.steps if judged is None else [stack.steps[index] for index in judged]
        self._judged = frozenset(step.step for step in every)
        self._stack = stack
        self._buffer: ExpertBuffer | None = None
        self._is_shared = resident is not None
        self._resident = resident or ResidentExperts()
        if isinstance(setting, GatingSetting):
            self._kernel: Callable[..., torch.Tensor] = kernel_named(setting.kernel)
            self._resident.of(stack)
            return
        self._resident.let_go()
        settings = BufferSettings(
            capacity=setting.capacity,
            policy=setting.policy,
            scope=setting.scope,
            miss=setting.miss,
            host_rows=setting.host_rows,
            initial=setting.initial,
            prefetch=setting.prefetch,
            future=stack.trace,
        )
        caches = None if prepared is None else prepared.get(setting.name)
        if caches is None and setting.capacity is not None:
            caches = prepare_caches(stack.sites, settings)
            if prepared is not None:
                prepared[setting.name] = caches
        self._buffer = ExpertBuffer(stack.sites, settings, device=stack.device, prepared=caches)
        self._buffer.reserve(stack.most_rows)
        if len(self._judged) < len(stack.steps):
            self._buffer.fill_slots()

    def warm_up(self, *, is_whole: bool = True) -> None:
        """Runs steps untimed: what is made once is there afterwards.

        Args:
            is_whole: Run them all. Else a few that have every kind of dispatch, without copies:
                enough where such dispatches ran in this process before.
        """
        if is_whole or self._buffer is None:
            self._run(self._stack.steps if is_whole else self._stack.warming_steps, Unwatched())
            return
        with self._buffer.without_copies():
            self._run(self._stack.warming_steps, Unwatched())

    def repeat(self, watch: Watch | None = None) -> StepTimes:
        """Returns the time of every step, from caches as they are at the start.

        Times of steps that are not judged are not theirs with copies.

        Args:
            watch: Looks between steps whether the core is quiet; nobody does when None.
        """
        return self._run(self._stack.steps, watch or Unwatched())

    def _run(self, steps: Sequence[RoutedStep], watch: Watch) -> StepTimes:
        if self._buffer is None:
            with made_current(self._stack.device):
                weights = self._resident.of(self._stack)
                return _gating_steps(self._stack, steps, self._kernel, weights, watch)
        self._buffer.reset()
        wait_for(self._stack.device)
        times = WatchedTimes(watch)
        for is_judged, group in itertools.groupby(steps, key=self._is_judged):
            with nullcontext() if is_judged else self._buffer.without_copies():
                for result in run_steps(self._buffer, list(group), self._stack.hidden):
                    times.add(result.wall_ms)
        return times.whole()

    def _is_judged(self, step: RoutedStep) -> bool:
        return step.step in self._judged

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies asked for in the last repetition, those left out included."""
        return 0 if self._buffer is None else self._buffer.counts().copied_bytes

    def close(self, *, keep_memory: bool = False) -> None:
        """Lets go of what was built.

        Args:
            keep_memory: Leave the memory to torch, for what is built next: to give tens of GiB
                back to the driver and to have them again takes longer than to build a setting.
        """
        if self._buffer is not None:
            self._buffer.close()
        if not self._is_shared:
            self._resident.let_go()
        # Whoever is given this memory next does not wait for the streams that still use it.
        wait_for(self._stack.device)
        if self._stack.device.type == "cuda" and not keep_memory:
            torch.cuda.empty_cache()


@torch.no_grad()
def _gating_steps(
    stack: RoutedStack,
    steps: Sequence[RoutedStep],
    kernel: Callable[..., torch.Tensor],
    weights: Mapping[int, ExpertWeights],
    watch: Watch,
) -> StepTimes:
    wait_for(stack.device)
    times = WatchedTimes(watch)
    for step in steps:
        begun_s = time.perf_counter()
        stream = stack.hidden
        for each in step.passes:
            stream = gating_layer(
                kernel, stream[: each.ids.shape[0]], each.ids, each.weights, weights[each.site]
            )
        wait_for(stack.device)
        times.add((time.perf_counter() - begun_s) * 1e3)
    return times.whole()


def gating_layer(
    kernel: Callable[..., torch.Tensor],
    stream: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    experts: ExpertWeights,
) -> torch.Tensor:
    """Returns the stream [T, d_model] after one layer: normalization, experts, residual."""
    rows = F.rms_norm(stream, stream.shape[-1:])
    return stream + kernel(rows, ids, gates, experts)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python's collector out of what is timed.

    How long it takes depends on what else the process holds, which is no property of a setting.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
