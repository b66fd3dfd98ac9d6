"""The hooks: what is attached to a model, and the captures they hand on.

Leaves out what happens to a capture afterwards (`steps`, `recorder`).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moeprof.errors import MoeprofError
from moeprof.recording.anatomy import Anatomy
from moeprof.recording.calls import (
    PACKED_ARGUMENTS,
    cache_argument,
    compiles_by_itself,
    describe_generation,
    is_matrix,
    named_arguments,
    router_logits,
    token_argument,
    token_shape,
)
from moeprof.recording.execution import RowWitness
from moeprof.recording.memory import MemoryMeter
from moeprof.recording.sites import FoundSite
from moeprof.recording.steps import SpanKey, StepCapture
from moeprof.recording.timing import Clock, CudaClock
from moeprof.recording.tokens import Generation, Tracker


@dataclass(frozen=True)
class GenerationEnd:
    """A finished call of `generate`.

    Attributes:
        generation: The call.
        sequences: What it returned; None when it failed.
        end_s: Seconds since the trace started.
    """

    generation: Generation
    sequences: torch.Tensor | None
    end_s: float


class Sink(Protocol):
    """Takes what the hooks captured."""

    def before_step(self) -> None:
        """Called before each pass; may raise what went wrong behind the scenes."""

    def knows_scoring(self, site: int) -> bool:
        """Says whether the scoring rule of a site is established."""

    def on_step(self, capture: StepCapture) -> None:
        """Takes a finished pass."""

    def on_generated(self, ended: GenerationEnd) -> None:
        """Takes the end of a call of `generate`."""


@dataclass(frozen=True, kw_only=True)
class InstrumentSettings:
    """What the hooks look at.

    Attributes:
        timing: Time the parts of each layer.
        probe_every: Every n-th pass of a kind is probed; 0: never.
        scores: Keep router logits of every pass.
        score: Passes are teacher-forced scoring.
    """

    timing: bool
    probe_every: int
    scores: bool
    score: bool


class Instrument:
    """The hooks on one model.

    Args:
        model: The outermost module.
        found: Its MoE sites.
        anatomy: Its stacks, layers, attention, embeddings and head.
        clock: Marks moments.
        memory: Reads memory.
        settings: What to look at.
        sink: Where captures go.
        t0: Reading of `time.perf_counter` that stands for 0 seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[FoundSite],
        anatomy: Anatomy,
        *,
        clock: Clock,
        memory: MemoryMeter,
        settings: InstrumentSettings,
        sink: Sink,
        t0: float,
    ) -> None:
        self._model = model
        self._found = found
        self._anatomy = anatomy
        self._clock = clock
        self._memory = memory
        self._settings = settings
        self._sink = sink
        self._t0 = t0
        self.tracker = Tracker(encoder_decoder=len(anatomy.stacks) > 1)
        self.num_steps = 0
        self.num_unfinished = 0
        self.num_packed = 0
        self.kernels: dict[str, set[str]] = {}
        self._handles: list[Any] = []
        self._restore: list[Callable[[], None]] = []
        self._open: dict[str, StepCapture] = {}
        self._current: StepCapture | None = None
        self._top_depth = 0
        self._kind_counts: dict[tuple[str, bool], int] = {}
        self._beam_index: torch.Tensor | None = None

    def attach(self) -> None:
        """Attaches every hook."""
        for stack, module in self._anatomy.stacks.items():
            self._pre(module, functools.partial(self._stack_begins, stack))
            self._post(module, functools.partial(self._stack_ends, stack))
        if self._anatomy.top not in self._anatomy.stacks.values():
            self._pre(self._anatomy.top, self._top_begins)
            self._post(self._anatomy.top, self._top_ends)
        for site, found in enumerate(self._found):
            self._attach_site(site, found)
        self._attach_parts()
        self._wrap_generate()
        self._watch_reordering()

    def _pre(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _post(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Calls ``hook`` when the module ends, with output None when it failed."""
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def _after(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Calls ``hook`` when the module ended well."""
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Removes every hook and wrapper; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for undo in self._restore:
            undo()
        self._restore.clear()

    def _attach_site(self, site: int, found: FoundSite) -> None:
        adapter = found.adapter

        def capture(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            step = self._current
            if step is None:
                return
            kept = adapter.capture(module, args, kwargs, output)
            step.routing.setdefault(site, []).append(kept)
            capacity = getattr(module, "expert_capacity", None)
            if found.adapter.name == "nllb_top2_router" and isinstance(capacity, int):
                step.capacity[site] = capacity

        if adapter.source == "experts":
            self._pre(found.watched, lambda m, a, k: capture(m, a, k, None))
        else:
            self._after(found.watched, capture)
        if found.expert_modules:
            for expert, module in enumerate(found.expert_modules):
                self._pre(module, functools.partial(self._expert_ran, site, expert))
        elif found.fused is not None and self._settings.probe_every:
            self._watch_fused(site, found.fused, found.num_experts)
        if found.logits_source is not None:
            self._after(found.logits_source, functools.partial(self._router_ran, site))

    def _expert_ran(
        self, site: int, expert: int, module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        step = self._current
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        if step is None or tensor is None:
            return
        rows = step.module_rows.get(site)
        if rows is None:
            rows = step.module_rows[site] = np.zeros(self._found[site].num_experts, dtype=np.int64)
        rows[expert] += tensor.numel() // max(1, tensor.shape[-1])

    def _watch_fused(self, site: int, experts: nn.Module, num_experts: int) -> None:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            step = self._current
            if step is not None and step.probed:
                witness = RowWitness(module, num_experts)
                step.witnesses.setdefault(site, []).append(witness)
                witness.__enter__()  # type: ignore[no-untyped-call]

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            step = self._current
            if step is not None and step.probed and step.witnesses.get(site):
                step.witnesses[site][-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]

        self._pre(experts, begin)
        self._post(experts, end)

    def _router_ran(
        self, site: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Keeps router logits: always where scores are stored, else to learn the rule once."""
        step = self._current
        if step is None or not (self._settings.scores or step.probed):
            return
        if not self._settings.scores and self._sink.knows_scoring(site):
            return
        logits = router_logits(output, self._found[site].num_experts)
        if logits is not None:
            step.logits.setdefault(site, []).append(logits)

    def _attach_parts(self) -> None:
        for position, layer in enumerate(self._anatomy.layers):
            self._attach_layer_memory(position, layer.module)
            self._time(("layer", position), layer.module)
            for module in layer.attention:
                self._time(("attention", position), module)
            for module in layer.dense_ffn:
                self._time(("dense_ffn", position), module)
        layers = {id(layer.module) for layer in self._anatomy.layers}
        for site, found in enumerate(self._found):
            modules = found.modules
            if id(modules.block) not in layers and modules.block is not modules.experts:
                self._time(("moe", site), modules.block)
            experts = modules.experts if modules.experts is not modules.block else None
            parts: dict[str, Any] = {"gate": modules.router, "experts": experts}
            parts |= {key: getattr(modules.block, key, None) for key in ("dispatch", "combine")}
            for key, part in parts.items():
                if isinstance(part, nn.Module):
                    self._time((key, site), part)
            for module in found.shared:
                self._time(("shared_experts", site), module)
        for module in self._anatomy.embeddings:
            self._time(("embedding", 0), module)
        if self._anatomy.head is not None:
            self._time(("head", 0), self._anatomy.head)

    def _time(self, key: SpanKey, module: nn.Module) -> None:
        if not self._settings.timing:
            return
        begun: list[tuple[StepCapture, Any]] = []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            step = self._current
            if step is not None and not step.probed:
                begun.append((step, self._clock.mark()))

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not begun:
                return
            step, mark = begun.pop()
            if step is self._current:
                step.spans.append((key, mark, self._clock.mark()))
            else:
                begun.clear()

        self._pre(module, begin)
        self._post(module, end)

    def _attach_layer_memory(self, position: int, module: nn.Module) -> None:
        if not self._memory.sees_device or not self._settings.probe_every:
            return
        base: list[int] = [0]

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            step = self._current
            if step is not None and step.probed:
                step.peak_bytes = max(step.peak_bytes, self._memory.peak_bytes())
                self._memory.reset_peak()
                base[0] = self._memory.allocated_bytes()

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            step = self._current
            if step is not None and step.probed:
                peak = self._memory.peak_bytes()
                step.peak_bytes = max(step.peak_bytes, peak)
                step.layer_peaks[position] = peak - base[0]

        self._pre(module, begin)
        self._post(module, end)

    def _top_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._top_depth += 1

    def _top_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._top_depth = max(0, self._top_depth - 1)
        step = self._current
        if self._top_depth == 0 and step is not None and step.thread == threading.get_ident():
            if output is None:
                self._discard_open_step()
            else:
                self._close_step()

    def _stack_begins(self, stack: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._sink.before_step()
        if self._current is not None:
            if self._current.thread != threading.get_ident():
                raise MoeprofError(
                    "the recorded model was called in two threads at once",
                    hint="call it from one thread at a time while it is recorded",
                )
            if stack in self._open:
                self._discard_open_step()
            else:
                self._close_step()
        tokens = token_argument(module, args, kwargs)
        if tokens is None:
            return
        shape = token_shape(tokens)
        named = named_arguments(module, args, kwargs)
        if any(named.get(name) is not None for name in PACKED_ARGUMENTS):
            self.num_packed += 1
            return
        generating = self.tracker.generation is not None
        past, past_length = cache_argument(named, columns=shape[1], generating=generating)
        if stack == "encoder":
            past, past_length = None, 0
        episode, new = self.tracker.enter(stack, shape, past, past_length)
        kind = (stack, shape[1] > 1)
        order = self._kind_counts.get(kind, 0)
        self._kind_counts[kind] = order + 1
        probe_every = self._settings.probe_every
        beam_index, self._beam_index = self._beam_index, None
        mask = named.get("attention_mask")
        self._note_kernels(stack, shape)
        capture = StepCapture(
            step=self.num_steps,
            stack=stack,
            episode=episode,
            new_episode=new,
            shape=shape,
            past_length=past_length,
            # Outside `generate` the caller may write the next mask over this one.
            mask=(mask.detach() if generating else mask.clone()) if is_matrix(mask) else None,
            token_ids=tokens.detach() if generating and is_matrix(tokens) else None,
            beam_index=beam_index if stack == "decoder" else None,
            start_s=time.perf_counter() - self._t0,
            thread=threading.get_ident(),
            probed=bool(probe_every) and order % probe_every == 0,
            score=self._settings.score,
        )
        self._open[stack] = capture
        self._current = capture
        if self._memory.sees_device:
            self._memory.reset_peak()
        if isinstance(self._clock, CudaClock):
            capture.device_start = self._clock.mark()
        capture.host_start = time.perf_counter_ns()

    def _stack_ends(
        self, stack: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        capture = self._open.get(stack)
        if capture is None or capture is not self._current:
            return
        if capture.thread != threading.get_ident():
            return
        if output is None:
            self._discard_open_step()
            return
        self.tracker.remember(getattr(output, "past_key_values", None), capture.episode)
        # The head still belongs to the pass when the outermost module is running.
        if self._top_depth == 0 or stack == "encoder":
            self._close_step()

    def _discard_open_step(self) -> None:
        """Forgets a pass that raised: it never became a step."""
        self._current = None
        self._open.clear()
        self.num_unfinished += 1

    def _close_step(self) -> None:
        capture = self._current
        assert capture is not None
        capture.host_end = time.perf_counter_ns()
        if isinstance(self._clock, CudaClock):
            capture.device_end = self._clock.mark()
        capture.memory = self._memory.read()
        self._current = None
        self._open.pop(capture.stack, None)
        self.num_steps += 1
        self._sink.on_step(capture)

    def _note_kernels(self, stack: str, shape: tuple[int, int]) -> None:
        config = getattr(self._model, "config", None)
        name = getattr(config, "_experts_implementation", None)
        if isinstance(name, str):
            phase = "encode" if stack == "encoder" else ("prefill" if shape[1] > 1 else "decode")
            self.kernels.setdefault(phase, set()).add(name)

    def _wrap_generate(self) -> None:
        original = getattr(self._model, "generate", None)
        if not callable(original):
            return

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.tracker.generation is not None or not self._handles:
                return original(*args, **kwargs)
            if compiles_by_itself(self._model):
                # On a GPU `generate` compiles what runs on a static cache; hooks need it eager.
                kwargs = {**kwargs, "disable_compile": True}
            self.tracker.begin_generation(describe_generation(self._model, args, kwargs))
            result = None
            try:
                result = original(*args, **kwargs)
                return result
            finally:
                ended = self.tracker.end_generation()
                # A beam search reorders its cache once more than it runs.
                self._beam_index = None
                if ended is not None:
                    sequences = getattr(result, "sequences", result)
                    tensor = sequences if isinstance(sequences, torch.Tensor) else None
                    end_s = time.perf_counter() - self._t0
                    self._sink.on_generated(
                        GenerationEnd(generation=ended, sequences=tensor, end_s=end_s)
                    )

        own = vars(self._model)
        had_own = "generate" in own
        own["generate"] = generate

        def undo() -> None:
            # Another recorder may have come and not gone; this wrapper then passes calls on.
            if own.get("generate") is not generate:
                return
            if had_own:
                own["generate"] = original
            else:
                own.pop("generate")

        self._restore.append(undo)

    def _watch_reordering(self) -> None:
        """Notes which beam each row continues, where the cache is reordered."""

        def note(beam_idx: torch.Tensor) -> None:
            if self.tracker.generation is not None:
                self._beam_index = beam_idx.detach().reshape(-1)

        self._restore.append(watch_reordering(note))


_reorder_watchers: list[Callable[[torch.Tensor], None]] = []
_reorder_originals: list[tuple[Any, Any]] = []


def watch_reordering(watcher: Callable[[torch.Tensor], None]) -> Callable[[], None]:
    """Calls ``watcher`` with the index whenever a cache is reordered; returns what ends that.

    The classes are patched once, however many recorders watch, and restored after the last.
    """
    cache_utils = sys.modules.get("transformers.cache_utils")
    if not _reorder_originals and cache_utils is not None:
        for name in ("Cache", "EncoderDecoderCache"):
            owner = getattr(cache_utils, name, None)
            if owner is not None and "reorder_cache" in vars(owner):
                _patch_reordering(owner)
    _reorder_watchers.append(watcher)

    def undo() -> None:
        _reorder_watchers.remove(watcher)
        if not _reorder_watchers:
            for owner, original in _reorder_originals:
                owner.reorder_cache = original
            _reorder_originals.clear()

    return undo


def _patch_reordering(owner: Any) -> None:
    original = vars(owner)["reorder_cache"]

    @functools.wraps(original)
    def reorder_cache(cache: Any, beam_idx: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for watcher in _reorder_watchers:
            watcher(beam_idx)
        return original(cache, beam_idx, *args, **kwargs)

    _reorder_originals.append((owner, original))
    owner.reorder_cache = reorder_cache
