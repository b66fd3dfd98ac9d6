"""The recorder: hooks on a model, captures per step, committed flushes to a trace.

While the model runs, hooks keep references and mark clocks; reading them, attributing tokens and
writing happen between steps, at the latest `flush_interval_s` after the step. Leaves out loading
models and prompts (`session`).
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprof.errors import CaptureError, MoeprofError
from moeprof.recording import sites as site_search
from moeprof.recording.anatomy import Anatomy, anatomy, static_bytes
from moeprof.recording.calls import kept_columns, output_tokens
from moeprof.recording.devices import DeviceSampler, open_meter
from moeprof.recording.forced import forced_source
from moeprof.recording.hardware import hardware, versions
from moeprof.recording.hooks import GenerationEnd, Instrument, InstrumentSettings
from moeprof.recording.memory import MemoryMeter
from moeprof.recording.steps import ModelView, Observation, StepCapture, build_unit
from moeprof.recording.timing import clock_for
from moeprof.recording.tokens import Episode, RequestLabel
from moeprof.trace.schema import CaptureCounts, ModelInfo, RankInfo, Site, TraceInfo
from moeprof.trace.writer import TraceWriter

logger = logging.getLogger(__name__)

DRAIN_BYTES = 32 << 20
MAX_QUEUED_BYTES = 4 * DRAIN_BYTES
MAX_RUNNING = 4096
NS_PER_S = 1e9
MIN_WAIT_S = 0.02


@dataclass(frozen=True, kw_only=True)
class RecorderOptions:
    """What a recording keeps.

    Attributes:
        task: ``lm`` or ``mt``; None takes it from the model.
        name: Model name stored in the trace; None takes the model's own.
        mode: ``generate``, ``score`` or ``forward``.
        scores: Store the affinity of the selected experts.
        timing: Time the parts of each layer.
        probe_every: Every n-th step of a kind (the first included) is probed: executed rows of
            fused experts and memory per layer are watched, and layer times are left out. 0: never.
        device_interval_s: Time between samples of the GPU's meters.
        flush_interval_s: Longest time a finished step stays uncommitted.
        force: Replace an existing trace.
        fixes: Names of fixes applied to the model.
        weight_hash: Hash of the weights, where the caller knows it.
        revision: Revision, where the caller knows it.
        random_weights: True where the weights were never trained.
        command: Command line or call, as stored.
        notes: Sentences every reader should see.
    """

    task: str | None = None
    name: str | None = None
    mode: str = "generate"
    scores: bool = False
    timing: bool = True
    probe_every: int = 8
    device_interval_s: float = 0.1
    flush_interval_s: float = 5.0
    force: bool = False
    fixes: tuple[str, ...] = ()
    weight_hash: str | None = None
    revision: str | None = None
    random_weights: bool = False
    command: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class _Running:
    """Requests of one batch that have started and not ended.

    Attributes:
        started: The episode that started them; it holds the prompt.
        episode: The decoder's episode, once it runs.
        rows: Rows of the requests table, by request.
        end_s: End of their last pass, in seconds since the trace started.
    """

    started: Episode
    episode: Episode
    rows: dict[int, dict[str, Any]]
    end_s: float = 0.0


class Recorder:
    """Records one model into one trace; use it as a context manager.

    Args:
        model: Any Hugging Face MoE model, or a plain torch module whose experts class was given
            to `moeprof.register`. Eager mode.
        path: Where the trace goes (``NAME.moeprof``).
        options: What to keep.

    Raises:
        CaptureError: The model has no MoE layer; on leaving the context: nothing was captured,
            or less than expected.
        MoeprofError: The path exists, or could not be written.
    """

    def __init__(
        self, model: nn.Module, path: str | Path, options: RecorderOptions | None = None
    ) -> None:
        self.model = model
        self.options = options or RecorderOptions()
        self.found = site_search.find_sites(model)
        self.anatomy: Anatomy = anatomy(model, self.found)
        self.device = _device_of(model)
        self._clock = clock_for(self.device)
        self._path = Path(path)
        self._queue: deque[StepCapture | GenerationEnd] = deque()
        self._queued_bytes = 0
        self._queue_lock = threading.Lock()
        self._drain_lock = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._observed = Observation()
        self._running: dict[int, _Running] = {}
        self._held: StepCapture | None = None
        self._forced_by: dict[str, int] = {}
        self._sites: list[Site] | None = None
        self._writer: TraceWriter | None = None
        self._sampler: DeviceSampler | None = None
        self._t0 = time.perf_counter()
        self._last_drain = self._t0
        self._created = ""
        self._closed = False
        self._instrument = Instrument(
            model,
            self.found,
            self.anatomy,
            clock=self._clock,
            memory=MemoryMeter(self.device),
            settings=InstrumentSettings(
                timing=self.options.timing,
                probe_every=self.options.probe_every,
                scores=self.options.scores,
                score=self.options.mode == "score",
            ),
            sink=self,
            t0=self._t0,
        )

    # -- life ---------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.abort()

    @property
    def path(self) -> Path:
        """Where the trace is."""
        return self._writer.path if self._writer is not None else self._path

    @property
    def num_requests(self) -> int:
        """Requests started so far."""
        return self._instrument.tracker.num_requests

    @property
    def num_committed_steps(self) -> int:
        """Steps that are safe on the disk."""
        return self._writer.num_committed_steps if self._writer is not None else 0

    @property
    def observed(self) -> Observation:
        """Counts so far."""
        return self._observed

    def start(self) -> None:
        """Attaches the hooks.

        Raises:
            MoeprofError: The output exists.
        """
        if self._path.exists() and not self.options.force:
            # Known now, not after the model ran for an hour.
            raise MoeprofError(
                f"{self._path} exists", hint="choose another name (-o), or replace it with --force"
            )
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._last_drain = time.perf_counter()
        self._instrument.attach()
        self._sampler = DeviceSampler(
            open_meter(), interval_s=self.options.device_interval_s, t0=self._t0, rank=_rank()
        )
        self._sampler.start()
        self._thread = threading.Thread(target=self._watch, name="moeprof-flush", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Detaches the hooks, writes what is left and closes the trace as complete.

        Raises:
            CaptureError: Nothing was captured, or less than expected; what there is stays.
            MoeprofError: Writing failed.
        """
        if self._closed:
            return
        self._instrument.detach()
        try:
            self._drain(closing=True)
        except BaseException:
            self._finish(complete=False)
            raise
        problem = self._capture_problem()
        self._finish(complete=problem is None)
        if problem is not None:
            raise problem

    def abort(self) -> None:
        """Detaches the hooks and keeps what was captured, marked incomplete.

        Never raises over the exception that is under way.
        """
        if self._closed:
            return
        self._instrument.detach()
        with suppress(Exception):
            self._drain(closing=True)
        with suppress(Exception):
            self._finish(complete=False)

    def announce(self, labels: Sequence[RequestLabel]) -> None:
        """Labels the next requests to start, in order."""
        self._instrument.tracker.announce(labels)

    def profile(self, run: Callable[[], object]) -> None:
        """Runs ``run`` under the profiler and stores what the experts call hides.

        Apart from the recording: hooks are off meanwhile, and its passes are no steps.

        Args:
            run: Runs the model for about ten forward passes.

        Raises:
            MoeprofError: Nothing was recorded before, so the sites' shapes are not known.
        """
        from moeprof.recording.kernels import profile_kernels

        self._drain(closing=True)
        if self._writer is None or self._sites is None:
            raise MoeprofError(
                "profile: nothing was recorded yet", hint="run the model once before profiling it"
            )
        self._instrument.detach()
        try:
            columns = profile_kernels(
                self.found,
                self.anatomy,
                run,
                top_k={site.site: site.top_k for site in self._sites},
                cuda=self.device.type == "cuda",
            )
        finally:
            self._instrument.attach()
        if columns["site"].size:
            self._writer.append({"kernels": columns})

    def _finish(self, *, complete: bool) -> None:
        self._closed = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._sampler is not None:
            self._sampler.stop()
            self._write_devices()
            self._sampler.meter.close()
        if self._writer is not None:
            written = False
            try:
                self._end_running()
                self._writer.update_info(**self._final_facts())
                written = True
            finally:
                self._writer.close(complete=complete and written)

    def _capture_problem(self) -> CaptureError | None:
        observed = self._observed
        where = f"; the incomplete trace is {self.path}" if self._writer is not None else ""
        if self._instrument.num_packed:
            return CaptureError(
                f"{self._instrument.num_packed} forward passes held several sequences in one row, "
                f"which cannot be told apart{where}",
                hint="record padded batches: generate, not generate_batch or packed rows",
            )
        if observed.num_calls_seen == 0:
            ran = self._instrument.num_steps + self._instrument.num_unfinished
            if ran == 0:
                return CaptureError(
                    "nothing was captured: the model did not run while it was recorded",
                    hint="call the model inside the with block, in eager mode: hooks stay silent "
                    "in a model that torch.compile compiled before",
                )
            return CaptureError(
                f"nothing was captured in {ran} forward passes{where}",
                hint="hooks do not fire in compiled code, CUDA graphs or replaced kernels: record "
                "in eager mode (no torch.compile, use_kernels=False, dequantized experts)",
            )
        if observed.num_calls_seen < observed.num_calls_expected or observed.num_tokens_dropped:
            silent = ", ".join(f"{name} ({n} steps)" for name, n in observed.missing.items())
            detail = (
                f"silent: {silent}" if silent else "some rows could not be attributed to tokens"
            )
            return CaptureError(
                f"partial capture: {observed.num_calls_seen} of {observed.num_calls_expected} "
                f"MoE calls were seen ({detail}){where}",
                hint="record in eager mode; if the model skips layers by design, register its "
                "experts with moeprof.register",
            )
        return None

    # -- writing ------------------------------------------------------------------------------

    def knows_scoring(self, site: int) -> bool:
        """Says whether the scoring rule of a site is established."""
        return self._observed.scoring.get(site) is not None

    def on_step(self, capture: StepCapture) -> None:
        """Queues a finished pass, and writes between passes when enough waits."""
        with self._queue_lock:
            self._queue.append(capture)
            self._queued_bytes += capture.size_bytes
            waiting = self._queued_bytes
        since_s = time.perf_counter() - self._last_drain
        if waiting > DRAIN_BYTES or since_s > self.options.flush_interval_s / 2:
            self._drain()

    def on_generated(self, ended: GenerationEnd) -> None:
        """Queues the end of a call of `generate` behind its passes."""
        with self._queue_lock:
            self._queue.append(ended)

    def before_step(self) -> None:
        """Raises what went wrong in the background; notes routing that was forced."""
        self._raise_pending()
        source = forced_source(found.watched for found in self.found)
        if source is not None:
            self._forced_by[source] = self._forced_by.get(source, 0) + 1

    def _raise_pending(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _watch(self) -> None:
        """Commits what waits when the model pauses or one pass takes long."""
        interval = self.options.flush_interval_s
        while not self._wake.wait(max(interval / 5, MIN_WAIT_S)):
            if time.perf_counter() - self._last_drain < interval * 0.8:
                continue
            try:
                self._drain()
            except BaseException as error:
                self._error = error
                return

    def _drain(self, *, closing: bool = False) -> None:
        """Writes every queued step and commits; an interrupt waits, so that no step is torn."""
        with _uninterrupted(), self._drain_lock:
            if self._error is not None:
                self._raise_pending()
            self._last_drain = time.perf_counter()
            while True:
                with self._queue_lock:
                    if not self._queue:
                        break
                    if self._writer is None and not self._ready(closing):
                        return
                    item = self._queue.popleft()
                    if isinstance(item, StepCapture):
                        self._queued_bytes -= item.size_bytes
                self._write(item)
            if closing:
                self._release(None)
            if self._writer is not None:
                self._write_devices()
                self._writer.commit()

    def _ready(self, closing: bool) -> bool:
        """Says whether the geometry of every site is known, so that the trace can be opened."""
        if closing or self._queued_bytes > MAX_QUEUED_BYTES:
            return True
        seen = {site for item in self._queue if isinstance(item, StepCapture)
                for site in item.routing}  # fmt: skip
        return all(
            site in seen or site_search.declared_top_k(self.model, found) is not None
            for site, found in enumerate(self.found)
        )

    def _open_writer(self, first: StepCapture) -> TraceWriter:
        top_k: dict[int, int] = {}
        with self._queue_lock:
            captures = [first, *(c for c in self._queue if isinstance(c, StepCapture))]
        for capture in captures:
            for site, raws in capture.routing.items():
                if site not in top_k:
                    host = tuple(t.to("cpu") for t in raws[0])
                    found = self.found[site]
                    top_k[site] = found.adapter.decode(host, found.modules).experts.shape[1]
        self._sites = site_search.geometry(self.model, self.found, top_k)
        return TraceWriter.create(
            self._path,
            self._info(self._sites),
            rank=_rank(),
            force=self.options.force,
            flush_interval_s=self.options.flush_interval_s,
        )

    def _info(self, sites: Sequence[Site]) -> TraceInfo:
        options = self.options
        config = getattr(self.model, "config", None)
        task = options.task or ("mt" if getattr(config, "is_encoder_decoder", False) else "lm")
        name = options.name or getattr(config, "_name_or_path", "") or type(self.model).__name__
        dtype = next((str(p.dtype).removeprefix("torch.") for p in self.model.parameters()), "")
        random_weights = options.random_weights or bool(
            getattr(self.model, "random_weights", False)
        )
        return TraceInfo(
            created=self._created,
            model=ModelInfo(
                name=name,
                architecture=type(self.model).__name__,
                task=task,
                revision=options.revision,
                weight_hash=options.weight_hash,
                dtype=dtype,
                num_layers=dict(self.anatomy.num_layers),
                static_bytes=static_bytes(self.anatomy, self.found),
                random_weights=random_weights,
                fixes=options.fixes,
            ),
            sites=tuple(sites),
            mode=options.mode,
            command=options.command or "moeprof.record(model, path)",
            ranks=_rank_infos(),
            hardware=hardware(self.device),
            versions=versions(),
            notes=options.notes,
            settings={
                "probe_every": options.probe_every,
                "scores": options.scores,
                "timing": options.timing,
                "device_interval_s": options.device_interval_s,
                "flush_interval_s": options.flush_interval_s,
                "device_meter": self._sampler.meter.reason if self._sampler else "",
            },
        )

    def _final_facts(self) -> Mapping[str, Any]:
        """Returns the fields of `TraceInfo` that are known only at the end."""
        observed = self._observed
        sites = []
        for site in self._sites or []:
            rule = observed.scoring.get(site.site)
            order = "none"
            if observed.by_weight.get(site.site, site.top_k == 1):
                order = "by_weight"
            elif observed.by_score.get(site.site, False):
                order = "by_score"
            changes: dict[str, Any] = {"slot_order": order}
            if rule is not None:
                changes |= {
                    "scoring": rule.scoring,
                    "renormalized": rule.renormalized,
                    "scaling_factor": rule.scaling_factor,
                }
            sites.append(replace(site, **changes))
        notes = [
            *self.options.notes,
            *(
                f"In {count} of {self._instrument.num_steps} forward passes the routing is not the "
                f"model's own choice: it was driven by {source}."
                for source, count in self._forced_by.items()
            ),
        ]
        if observed.execution_note is not None:
            notes.append(
                f"Executed rows disagree with routed rows in {observed.num_executed_disagreeing} "
                f"of {observed.num_executed_checked} dispatches that were checked: "
                f"{observed.execution_note}."
            )
        return {
            "sites": tuple(sites),
            "notes": tuple(notes),
            "kernels": {
                phase: "+".join(sorted(names)) for phase, names in self._instrument.kernels.items()
            },
            "capture": CaptureCounts(
                num_sites=len(self.found),
                num_calls_expected=observed.num_calls_expected,
                num_calls_seen=observed.num_calls_seen,
                num_tokens_seen=observed.num_tokens_seen,
                num_tokens_recorded=observed.num_tokens_recorded,
                num_tokens_dropped=observed.num_tokens_dropped,
                num_padded_tokens=observed.num_padded_tokens,
                num_executed_checked=observed.num_executed_checked,
                num_executed_disagreeing=observed.num_executed_disagreeing,
                execution_note=observed.execution_note,
            ),
        }

    def _write(self, item: StepCapture | GenerationEnd) -> None:
        """Writes one item; a speculative pass waits for the next, which says what was kept."""
        if isinstance(item, GenerationEnd):
            self._release(kept_columns(item.sequences, item.generation))
            self._write_end(item)
            return
        self._release(item.past_length)
        if item.episode.speculative:
            self._held = item
        else:
            self._write_step(item)

    def _release(self, kept_length: int | None) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.kept_length = kept_length
            self._write_step(held)

    def _write_step(self, capture: StepCapture) -> None:
        if self._writer is None:
            self._writer = self._open_writer(capture)
        assert self._sites is not None
        view = ModelView(
            found=self.found,
            sites=self._sites,
            layers=self.anatomy.layers,
            clock=self._clock,
            with_scores=self.options.scores,
        )
        unit, _ = build_unit(capture, view, self._observed)
        episode = capture.episode
        if capture.new_episode and episode.starts_requests:
            unit["requests"] = self._start_requests(capture)
        running = self._running.get(episode.first_request)
        if running is not None:
            running.end_s = capture.start_s + (capture.host_end - capture.host_start) / NS_PER_S
            if capture.stack == "decoder":
                running.episode = episode
        self._writer.append(unit)
        self._limit_running()

    def _start_requests(self, capture: StepCapture) -> dict[str, Any]:
        episode = capture.episode
        prompt = episode.prompt_tokens()
        task = self._writer.info.model.task if self._writer is not None else "lm"
        rows: dict[int, dict[str, Any]] = {}
        for offset in range(episode.num_requests):
            request = episode.first_request + offset
            label = self._instrument.tracker.labels.pop(request, RequestLabel())
            rows[request] = {
                "request": request,
                "task": task,
                "domain": label.domain,
                "language": label.language,
                "source_language": label.source_language,
                "prompt_id": label.prompt_id,
                "num_prompt_tokens": int(prompt[offset]),
                "num_output_tokens": None,
                "num_sequences": episode.sequences_per_request,
                "arrival_s": capture.start_s,
                "end_s": None,
                "slo_ms": label.slo_ms,
            }
        running = _Running(started=episode, episode=episode, rows=rows)
        self._running[episode.first_request] = running
        return _columns(rows.values())

    def _write_end(self, ended: GenerationEnd) -> None:
        episodes = ended.generation.episodes
        decoder = episodes.get("decoder") or next(iter(episodes.values()), None)
        running = self._running.pop(decoder.first_request, None) if decoder is not None else None
        if decoder is None or running is None:
            return
        running.episode = decoder
        counts = output_tokens(ended.sequences, decoder, ended.generation)
        self._end_requests(running, counts, ended.end_s)

    def _limit_running(self) -> None:
        """Ends the oldest requests of passes outside `generate`, whose end nothing tells."""
        if len(self._running) > MAX_RUNNING:
            oldest = self._running.pop(next(iter(self._running)))
            self._end_requests(oldest, oldest.episode.decoded_tokens(), oldest.end_s)

    def _end_running(self) -> None:
        """Ends the requests of passes outside `generate`."""
        for running in self._running.values():
            self._end_requests(running, running.episode.decoded_tokens(), running.end_s)
        self._running.clear()

    def _end_requests(self, running: _Running, num_output: np.ndarray, end_s: float) -> None:
        assert self._writer is not None
        prompt = running.started.prompt_tokens()
        for offset, row in enumerate(running.rows.values()):
            row["num_prompt_tokens"] = int(prompt[offset])
            row["num_output_tokens"] = int(num_output[offset])
            row["num_sequences"] = running.episode.sequences_per_request
            row["end_s"] = end_s
        self._writer.append({"requests": _columns(running.rows.values())})

    def _write_devices(self) -> None:
        if self._sampler is None or self._writer is None:
            return
        rows = self._sampler.drain()
        if rows:
            self._writer.append({"devices": _columns(rows)})


def record(model: nn.Module, path: str | Path, **options: Any) -> Recorder:
    """Returns a context manager that records ``model`` into a trace while it is entered.

    Example::

        with moeprof.record(model, "run.moeprof"):
            model.generate(**inputs)

    Args:
        model: Any Hugging Face MoE model; or a plain torch module, see `moeprof.register`.
        path: Where the trace goes.
        **options: Fields of `RecorderOptions`.

    Raises:
        CaptureError: The model has no MoE layer that can be seen.
        MoeprofError: An option is unknown.
    """
    try:
        settings = RecorderOptions(**options)
    except TypeError as error:
        raise MoeprofError(
            f"record: {str(error).split('__init__() ')[-1]}",
            hint=f"options are: {', '.join(RecorderOptions.__dataclass_fields__)}",
        ) from error
    return Recorder(model, path, settings)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off Ctrl-C until the block ends; other threads get none anyway."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


def _columns(rows: Any) -> dict[str, Any]:
    rows = list(rows)
    return {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    cuda = sorted((d for d in devices if d.type == "cuda"), key=str)
    if cuda:
        return cuda[0]
    return next(iter(devices), torch.device("cpu"))


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return 0


def _rank_infos() -> tuple[RankInfo, ...]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        size = int(distributed.get_world_size())
        return tuple(RankInfo(rank=rank, world_size=size) for rank in range(size))
    return (RankInfo(),)
