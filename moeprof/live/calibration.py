"""Measures what this machine does, once, for the cost model.

Constants first, each by itself; then trials: whole steps under several settings, driven by made-up
routing in two regimes, next to what the constants alone say of them. From them come corrections of
the constants and how sure predictions are (`moeprof.replay.corrections`). Leaves out the file
(`moeprof.replay.calibration_file`).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moeprof.errors import MoeprofError, UsageError
from moeprof.live.ceilings import measure_ceilings
from moeprof.live.exchange_times import exchange_curve
from moeprof.live.expert_store import ExpertStore
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.grouping import can_group
from moeprof.live.kernels import KERNELS
from moeprof.live.kernels.fused import can_fuse
from moeprof.live.kernels.streamed import (
    ROWS_AT_ONCE,
    STREAMED_TOKENS,
    StreamedDispatch,
    can_stream,
)
from moeprof.live.part_times import PartTimes
from moeprof.live.routed_runs import random_sites, routed_steps, starting_rows
from moeprof.live.row_blocks import Workspace
from moeprof.live.setting_runs import (
    RoutedStack,
    SettingRun,
    gating_layer,
    geometry_of,
    open_stack,
    timed_steps,
)
from moeprof.live.transfers import (
    HostTransfers,
    Transfers,
    made_current,
    make_slots,
    open_transfers,
)
from moeprof.recording.hardware import hardware, versions
from moeprof.replay import cost_model
from moeprof.replay.buffer_plans import planned_dispatches, read_routed_rows, residency_of
from moeprof.replay.cache import policies, streams
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.calibration_file import (
    Calibration,
    Curve,
    DecisionTimes,
    ExpertTimes,
    GatingTimes,
    Measured,
    StreamedTimes,
    Trial,
)
from moeprof.replay.corrections import TriedBuffer, fit_by_size, fit_corrections
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.gating_work import Dispatches, device_columns, kernel_work
from moeprof.replay.least_squares import fit_parts
from moeprof.replay.pipeline import Work, step_times
from moeprof.replay.serving_settings import (
    STATIC_KERNELS,
    UNBUFFERED,
    BufferingSetting,
    GatingSetting,
    Setting,
)
from moeprof.trace.synthetic import synthetic_trace

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

ROUTING = "made-up routing (Zipf, half of the experts kept from token to token)"
DEFAULT_POLICIES = tuple(policies.POLICIES)

_SMALL_ROWS = 8
# Few, so that prompts are dispatches of a few tokens too, which is what is predicted.
_PROMPT_TOKENS = 4
_PLAN_REPEATS = 3
_TRIAL_POLICIES = ("lru", "lfu", "paper", "min")
_TRIAL_SHARES = (0.125, 0.5)
_TRIAL_MISSES = ("host", "split")
_TRIAL_MISS_SHARE = 0.25
_WIDTH_MULTIPLE = 8
_TRIAL_S = 1.5
_LEAST_REPETITIONS = 2
_CHAIN = 16
_COPIES = 8
_ACTIVE_SHARES = (0.25, 1.0)
_DECISION_SHARES = (0.125, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How trials are run.

    Attributes:
        batch: Requests at a time.
        num_layers: Layers.
        num_steps: Steps.
    """

    batch: int
    num_layers: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class CalibrationSizes:
    """How large the things are that are measured.

    Attributes:
        expert_bytes: Sizes of experts, ascending.
        d_model: Width of a row.
        gated: Experts of three matrices, not two.
        dtype: Of weights and rows.
        num_experts: Experts per layer of trials.
        top_k: Slots per token of trials.
        regimes: What trials run.
        rows: Rows of an expert on the device.
        host_rows: Rows of an expert on the host.
        slots: (token, slot) rows of a dispatch.
        tokens: Tokens of a dispatch, for gating kernels.
        pieces: Experts of a piece.
        cold_bytes: Experts that take turns take so much at least, so that no cache of the device
            holds them.
        repeats: Repetitions of each part.
        trial_repetitions: Repetitions of each trial; two where that would take seconds.
    """

    expert_bytes: tuple[int, ...]
    d_model: int
    gated: bool = True
    dtype: str
    num_experts: int
    top_k: int
    regimes: tuple[Regime, ...]
    rows: tuple[int, ...]
    host_rows: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[int, ...]
    cold_bytes: int
    repeats: int
    trial_repetitions: int

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        for name in ("expert_bytes", "rows", "host_rows", "slots", "tokens", "pieces"):
            values = getattr(self, name)
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise UsageError(f"{name} has to ascend from 1 or more, not {values}")

    def shape(self, expert_bytes: int) -> ExpertShape:
        """Returns the shape of experts of about that size, of widths as models have them."""
        base = ExpertShape(d_model=self.d_model, d_ff=1, gated=self.gated, dtype=self.dtype)
        near = base.with_bytes(expert_bytes)
        d_ff = max(1, round(near.d_ff / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE
        return dataclasses.replace(near, d_ff=d_ff)


GPU_SIZES = CalibrationSizes(
    expert_bytes=(9 << 20, 32 << 20, 64 << 20),
    d_model=2048,
    dtype="bfloat16",
    num_experts=64,
    top_k=6,
    # With more requests at a time more is copied in a step: fewer layers, for about the same time.
    regimes=(
        Regime(batch=1, num_layers=4, num_steps=12),
        Regime(batch=8, num_layers=2, num_steps=8),
    ),
    rows=(1, 2, 4, 8, 16, 64, 256, 1024),
    host_rows=(1, 2, 4, 16),
    slots=(8, 64, 512, 4096),
    tokens=(1, 8, 32, 128, 512),
    pieces=(1, 2, 4, 8, 16, 32, 64),
    cold_bytes=256 << 20,
    repeats=20,
    trial_repetitions=4,
)
CPU_SIZES = CalibrationSizes(
    expert_bytes=(64 << 10, 512 << 10),
    d_model=128,
    dtype="float32",
    num_experts=16,
    top_k=2,
    regimes=(
        Regime(batch=1, num_layers=4, num_steps=12),
        Regime(batch=8, num_layers=2, num_steps=8),
    ),
    rows=(1, 4, 16, 64),
    host_rows=(1, 4, 16),
    slots=(8, 64, 256),
    tokens=(1, 8, 32),
    pieces=(1, 4, 16),
    cold_bytes=4 << 20,
    repeats=10,
    trial_repetitions=4,
)


def calibrate(
    device: torch.device | str | None = None,
    *,
    sizes: CalibrationSizes | None = None,
    expert_bytes: Sequence[int] | None = None,
    policies: Sequence[str] = DEFAULT_POLICIES,
    kernels: Sequence[str] = tuple(KERNELS),
    num_ranks: int | None = None,
    command: str = "moeprof.live.calibrate",
    progress: Progress | None = None,
) -> Calibration:
    """Measures this machine for the cost model (`moeprof.replay.cost`).

    Args:
        device: Which; a GPU if there is one when None.
        sizes: How large things are; `GPU_SIZES` or `CPU_SIZES` when None.
        expert_bytes: Sizes of experts, instead of those in ``sizes``: those of the models that
            predictions are wanted for.
        policies: Cache policies whose decisions are timed.
        kernels: Gating kernels that are timed.
        num_ranks: Processes that exchange rows, each on a GPU of its own (on a CPU all on it); no
            exchange is measured when None. A script that gives it starts under
            ``if __name__ == "__main__":``.
        command: What to write into the file as the command.
        progress: Called with (what is measured, parts done, parts in all).

    Raises:
        UsageError: An argument makes no sense.
        MoeprofError: The device is not there.
    """
    target = device_named(device)
    chosen = sizes or sizes_for(target)
    if expert_bytes is not None:
        chosen = dataclasses.replace(chosen, expert_bytes=tuple(sorted(set(expert_bytes))))
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise UsageError(
            f"there is no gating kernel {unknown[0]!r}", hint=f"one of {', '.join(KERNELS)}"
        )
    for policy in policies:
        # Refuses unknown ones before anything takes time.
        BufferingSetting(capacity=None, policy=policy)
    bench = _Bench(target, chosen)
    show = progress or (lambda *_: None)
    # First: ranks that do not find each other should not cost all the rest.
    exchange = None if num_ranks is None else exchange_curve(num_ranks, device=target)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), made_current(target):
        regimes = [_made_up(Path(folder), chosen, regime) for regime in chosen.regimes]
        found = _measured(bench, regimes, policies, kernels, command, show)
    return dataclasses.replace(found, all_to_all=exchange, exchange_ranks=num_ranks)


def sizes_for(device: torch.device) -> CalibrationSizes:
    """Returns the sizes that suit a device."""
    return GPU_SIZES if device.type == "cuda" else CPU_SIZES


def device_named(device: torch.device | str | None) -> torch.device:
    """Returns the device to measure; a GPU if there is one when None.

    Raises:
        UsageError: It is no device that can be measured.
        MoeprofError: It is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}", hint="say cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise MoeprofError("there is no GPU that torch can use", hint="say --device cpu")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"{found.type} devices cannot be calibrated", hint="say cpu or cuda")
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _MadeUp:
    """Made-up routing of a regime."""

    regime: Regime
    trace: Trace


def _made_up(folder: Path, sizes: CalibrationSizes, regime: Regime) -> _MadeUp:
    trace = synthetic_trace(
        folder / f"calibration-{regime.batch}.moeprof",
        num_requests=2 * regime.batch,
        num_sites=regime.num_layers,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        batch=regime.batch,
        prompt_tokens=_PROMPT_TOKENS,
        # Lengths differ: long enough that the batch stays full while trials run.
        output_tokens=2 * regime.num_steps,
    )
    return _MadeUp(regime=regime, trace=trace)


def _measured(
    bench: _Bench,
    regimes: Sequence[_MadeUp],
    policy_names: Sequence[str],
    kernels: Sequence[str],
    command: str,
    show: Progress,
) -> Calibration:
    """Returns constants, then trials."""
    sizes = bench.sizes
    parts = 4 + len(policy_names) + len(kernels) + len(sizes.expert_bytes)
    count = itertools.count()
    show("rates of the device", next(count), parts)
    ceilings = measure_ceilings(
        bench.device, dtype=getattr(torch, sizes.dtype), repeats=sizes.repeats
    )
    copy_ms, matrix_ms = ceilings.copy.times_ms, ceilings.matrix.times_ms
    moved = ceilings.copy_bytes_per_s * ceilings.copy.median_ms
    computed = ceilings.matrix_flops_per_s * ceilings.matrix.median_ms
    show("experts and copies", next(count), parts)
    by_size = [bench.of_expert(size) for size in sizes.expert_bytes]
    show("dispatches", next(count), parts)
    constants = bench.of_dispatch()
    machine = Calibration(
        device=asdict(hardware(bench.device)),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        dtype=sizes.dtype,
        is_serial=bench.times.is_serial,
        device_copy_bytes_per_s=Measured.of([moved / each for each in copy_ms]),
        matrix_flops_per_s=Measured.of([computed / each for each in matrix_ms]),
        to_device=_ascending([(one.block_bytes, one.copy) for one in by_size]),
        device_expert=_surface([(one.expert_bytes, one.on_device) for one in by_size]),
        host_expert=_surface([(one.expert_bytes, one.on_host) for one in by_size]),
        expert_host_s=by_size[0].launch,
        slot_host_s=by_size[0].slot,
        load_host_s=by_size[0].load,
        handover_s=by_size[0].handover,
        streamed=_streamed_times(by_size),
        **constants,
    )
    decisions = {}
    for name in policy_names:
        show(f"decisions of {name}", next(count), parts)
        decisions[name] = _decision_times(regimes, name, streamed=machine.streamed is not None)
    gating = {}
    for name in kernels:
        show(f"gating {name}", next(count), parts)
        gating[name] = bench.of_kernel(name, machine)
    machine = dataclasses.replace(machine, decisions=decisions, gating=gating)
    tried: list[_Tried] = []
    for size in sizes.expert_bytes:
        show(f"trials at {size / (1 << 20):.2f} MiB an expert", next(count), parts)
        tried += bench.trials(regimes, size, machine)
    show("done", parts, parts)
    return _corrected(machine, tried)


def _corrected(machine: Calibration, tried: Sequence[_Tried]) -> Calibration:
    """Returns a calibration with its trials, and what they say."""
    buffers = [
        TriedBuffer(trial=one.trial, work=one.work, expert_bytes=one.expert_bytes)
        for one in tried
        if one.whole is None
    ]
    kernels = {
        name: [one.trial for one in tried if one.whole == name]
        for name in (UNBUFFERED, *machine.gating)
    }
    return dataclasses.replace(
        machine,
        trials=tuple(one.trial for one in tried),
        corrections=fit_corrections(buffers, kernels),
        by_size=fit_by_size(buffers),
    )


def refitted(machine: Calibration, sizes: CalibrationSizes | None = None) -> Calibration:
    """Returns a calibration with its trials modelled and fitted again; nothing is measured.

    Args:
        machine: A calibration.
        sizes: Those that it was measured with; of its device when None.

    Raises:
        UsageError: These are not its trials.
    """
    given = sizes or (CPU_SIZES if machine.is_serial else GPU_SIZES)
    others = UsageError(
        "the calibration has other trials than these sizes ask for",
        hint="give the sizes that it was measured with",
    )
    shapes = [given.shape(size) for size in machine.device_expert.expert_bytes]
    ran = tuple(shape.expert_bytes for shape in shapes)
    if given.dtype != machine.dtype or ran != machine.device_expert.expert_bytes:
        raise others
    trials = iter(machine.trials)
    tried: list[_Tried] = []
    with tempfile.TemporaryDirectory() as folder:
        regimes = [_made_up(Path(folder), given, regime) for regime in given.regimes]
        for shape, made in itertools.product(shapes, regimes):
            question = _question(made, shape, given)
            for setting in trial_settings(machine):
                trial = next(trials, None)
                if trial is None or trial.setting != setting.name:
                    raise others
                if len(trial.modelled_ms) != len(question.routed.steps):
                    raise others
                tried.append(_tried(trial.measured_ms, question, setting, machine))
    if next(trials, None) is not None:
        raise others
    return _corrected(machine, tried)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tried:
    """A trial, and what is modelled of it; ``whole`` names what has one factor for all its work."""

    trial: Trial
    work: Work
    whole: str | None
    expert_bytes: int


@dataclass(frozen=True, kw_only=True)
class _PieceParts:
    """What was measured of dispatches that run in pieces, at one size of experts."""

    known: Measured
    late: Measured
    host: Curve
    slot: Measured
    load: Measured
    device: Curve
    combine_host: Measured
    combine_device: Curve


@dataclass(frozen=True, kw_only=True)
class _ExpertParts:
    """What was measured at one size of experts."""

    expert_bytes: int
    block_bytes: int
    copy: Measured
    on_device: Curve
    on_host: Curve
    launch: Measured
    slot: Measured
    load: Measured
    handover: Measured
    pieces: _PieceParts | None


def _streamed_times(by_size: Sequence[_ExpertParts]) -> StreamedTimes | None:
    """Returns what depends on the size of experts by size, all else as it is for the smallest."""
    found = [(one.expert_bytes, one.pieces) for one in by_size if one.pieces is not None]
    if not found:
        return None
    own = found[0][1]
    return StreamedTimes(
        most_tokens=STREAMED_TOKENS,
        rows_at_once=ROWS_AT_ONCE,
        known_s=own.known,
        late_s=own.late,
        piece_host=own.host,
        slot_host_s=own.slot,
        load_host_s=own.load,
        piece_device=_surface([(size, one.device) for size, one in found]),
        combine_host_s=own.combine_host,
        combine_device=own.combine_device,
    )


@dataclass(frozen=True, kw_only=True)
class _KernelPoint:
    """A gating kernel at one size."""

    columns: tuple[float, ...]
    active: float
    device_s: float
    host_s: float


class _UnwaitedWorkspace(Workspace):
    """A workspace that is not asked what the device found: for its device part alone."""

    def _received(self, count: int) -> list[int]:
        return [0] * count


class _Bench:
    """Measures parts and runs trials on one device.

    Args:
        device: Which.
        sizes: How large things are.
    """

    def __init__(self, device: torch.device, sizes: CalibrationSizes) -> None:
        self.device = device
        self.sizes = sizes
        self.dtype: torch.dtype = getattr(torch, sizes.dtype)
        self.times = PartTimes(device, repeats=sizes.repeats)

    def _rows(self, count: int, device: torch.device | str | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(count, self.sizes.d_model, generator=generator)
        return rows.to(device=self.device if device is None else device, dtype=self.dtype)

    def _store(self, shape: ExpertShape, count: int, trace: Trace) -> ExpertStore:
        site = random_sites(
            trace, geometry_of(shape), stack="decoder", pinned=not self.times.is_serial
        )[0]
        assert site.store.num_experts == count
        return site.store

    def of_expert(self, size: int) -> _ExpertParts:
        """Measures copies and computations of experts of one size."""
        shape = self.sizes.shape(size)
        count = max(2, -(-self.sizes.cold_bytes // shape.block_bytes))
        with tempfile.TemporaryDirectory() as folder:
            only = synthetic_trace(
                Path(folder) / "one.moeprof", num_requests=1, num_sites=1, num_experts=count
            )
            store = self._store(shape, count, only)
        slots, pools = make_slots([count], [shape.block_bytes], self.device)
        for expert, slot in enumerate(slots):
            slot.copy_(store.block(expert))
        views = [store.shape.weights(slot[: store.shape.block_bytes]) for slot in slots]
        transfers = open_transfers(slots)
        self.times.settle()
        turn = itertools.cycle(range(count))

        def load() -> None:
            for _ in range(_COPIES):
                expert = next(turn)
                slots[expert][: shape.block_bytes].copy_(store.block(expert), non_blocking=True)

        def ask() -> None:
            expert = next(turn)
            transfers.load(expert, store.block(expert))

        def order() -> None:
            expert = next(turn)
            transfers.await_load(expert)
            transfers.release(expert)

        def on_device(rows: torch.Tensor) -> Callable[[], object]:
            return lambda: views[next(turn)].run(0, rows)

        def by_host(rows: torch.Tensor) -> Callable[[], object]:
            # As the live buffer does: the weights are looked up in their block each time.
            return lambda: store.weights(next(turn)).run(0, rows)

        few = self._rows(self.sizes.rows[0])

        def chain() -> None:
            # The read event lies behind whatever the device is busy with.
            transfers.release(0)
            for expert in range(_CHAIN):
                transfers.load(0, store.block(expert % count))
                transfers.await_load(0)
                views[0].run(0, few)
                transfers.release(0)

        given = {rows: self._rows(rows) for rows in self.sizes.rows}
        own = {rows: self._rows(rows, "cpu") for rows in self.sizes.host_rows}
        # One after another, as they are asked for; what the first waits for is a handover.
        copy = _scaled(self.times.device_part(load), 1 / _COPIES)
        curve = _ascending(
            [(n, self.times.device_part(on_device(rows))) for n, rows in given.items()]
        )
        found = _ExpertParts(
            expert_bytes=shape.expert_bytes,
            block_bytes=shape.block_bytes,
            copy=copy,
            on_device=curve,
            on_host=_ascending([(n, self._on_host(by_host(rows))) for n, rows in own.items()]),
            launch=self.times.host(on_device(few)),
            # Without a queue there is nothing to order, and a copy is done when it is asked for.
            slot=self.times.host(order),
            load=self.times.host(ask),
            handover=self._handover(chain, copy.median + curve.times_s[0].median),
            pieces=self._of_pieces(store, slots, transfers)
            if not self.times.is_serial and can_stream(store.shape, self.device)
            else None,
        )
        transfers.finish()
        assert isinstance(transfers, HostTransfers) == self.times.is_serial
        store.close()
        del pools
        return found

    def _handover(self, chain: Callable[[], object], link_s: float) -> Measured:
        """Returns what a chain of copies and experts in one slot takes beyond them, per handover.

        Each link of the chain is a copy that waits for the expert before it, and an expert that
        waits for the copy: two handovers.
        """
        if self.times.is_serial:
            return self.times.host(chain)
        whole = self.times.device_part(chain)

        def beyond(chain_s: float) -> float:
            return max(0.0, (chain_s / _CHAIN - link_s) / 2)

        return Measured(
            median=beyond(whole.median),
            low=beyond(whole.low),
            high=beyond(whole.high),
            error=whole.error,
            num_repetitions=whole.num_repetitions,
        )

    def _of_pieces(
        self, store: ExpertStore, slots: Sequence[torch.Tensor], transfers: Transfers
    ) -> _PieceParts:
        """Measures dispatches of a few tokens in pieces."""
        sizes, times, shape = self.sizes, self.times, store.shape
        most = max(len(slots), sizes.pieces[-1])
        memory = torch.empty(most * shape.block_bytes, dtype=torch.uint8, device=self.device)
        size = shape.block_bytes
        blocks = [memory[each * size : (each + 1) * size] for each in range(most)]
        for index, block in enumerate(blocks):
            block.copy_(slots[index % len(slots)][:size])
        dispatch = StreamedDispatch(shape, num_experts=most, device=self.device)
        dispatch.reserve(STREAMED_TOKENS * sizes.top_k)
        first = itertools.count()

        def begun(num_slots: int, num_experts: int) -> Callable[[], object]:
            """Returns what takes a dispatch whose experts are 0, 1, ..."""
            tokens = min(STREAMED_TOKENS, max(1, -(-num_slots // sizes.top_k)))
            hidden = self._rows(tokens)
            ids = torch.arange(tokens * sizes.top_k, device=self.device) % num_experts
            ids = ids.view(tokens, sizes.top_k)
            gates = torch.full(ids.shape, 1 / sizes.top_k, dtype=self.dtype, device=self.device)

            def begin() -> None:
                rows = F.rms_norm(hidden, hidden.shape[-1:])
                dispatch.begin(rows, ids, gates)

            return begin

        def piece(num_experts: int) -> Callable[[], object]:
            def run() -> None:
                # Others each time: no cache of the device holds them.
                start = next(first) * num_experts
                own = [blocks[(start + each) % most] for each in range(num_experts)]
                dispatch.run(range(num_experts), own)

            return run

        def known() -> None:
            begin()
            dispatch.active()

        def after(stream: torch.Tensor) -> Callable[[], object]:
            return lambda: stream + dispatch.combined()

        def order() -> None:
            transfers.await_all([0])
            transfers.mark()

        group = range(min(len(slots), sizes.top_k))

        def ask() -> None:
            transfers.load_all([(each, store.block(each)) for each in group])

        host, device = [], []
        for experts in sizes.pieces:
            begin = begun(experts, experts)
            host.append((experts, times.host(piece(experts), before=begin)))
            device.append((experts, times.device_part(piece(experts), before=begin)))
        combine = []
        combine_host = None
        for num_slots in sizes.slots:
            if num_slots > STREAMED_TOKENS * sizes.top_k:
                continue
            begin = begun(num_slots, min(num_slots, most))
            begin()
            tokens = min(STREAMED_TOKENS, max(1, -(-num_slots // sizes.top_k)))
            added = after(self._rows(tokens))
            combine.append((tokens * sizes.top_k, times.device_part(added)))
            combine_host = combine_host or times.host(added)
        assert combine_host is not None
        begin = begun(sizes.top_k, sizes.top_k)
        asked = times.host(ask)
        transfers.finish()
        return _PieceParts(
            known=times.host(known),
            late=times.late(known),
            host=_ascending(host),
            slot=times.host(order),
            load=_scaled(asked, 1 / len(group)),
            device=_ascending(device),
            combine_host=combine_host,
            combine_device=_ascending(combine),
        )

    def _on_host(self, function: Callable[[], object]) -> Measured:
        return PartTimes(torch.device("cpu"), repeats=self.sizes.repeats).device_part(function)

    def of_dispatch(self) -> dict[str, Any]:
        """Measures what surrounds the experts of a dispatch, by its (token, slot) rows."""
        sizes, times = self.sizes, self.times
        first: dict[str, Any] = {}
        sort, combine = [], []
        for slots in sizes.slots:
            tokens = max(1, slots // sizes.top_k)
            hidden = self._rows(tokens)
            ids = torch.arange(tokens * sizes.top_k, device=self.device) % sizes.num_experts
            ids = ids.view(tokens, sizes.top_k)
            gates = torch.full(ids.shape, 1 / sizes.top_k, dtype=self.dtype, device=self.device)
            spaces = [
                kind(
                    num_experts=sizes.num_experts,
                    d_model=sizes.d_model,
                    dtype=self.dtype,
                    device=self.device,
                )
                for kind in (Workspace, _UnwaitedWorkspace)
            ]

            def before(
                space: Workspace, hidden: torch.Tensor = hidden, ids: torch.Tensor = ids
            ) -> Any:
                rows = F.rms_norm(hidden, hidden.shape[-1:])
                return space.sorted_rows(rows, ids, sizes.num_experts)

            given, order, _ = before(spaces[0])
            pieces = list(given.split(max(1, len(given) // min(len(given), sizes.top_k))))
            returned = torch.empty_like(given)

            def after(
                pieces: list[torch.Tensor] = pieces,
                returned: torch.Tensor = returned,
                order: torch.Tensor = order,
                gates: torch.Tensor = gates,
                hidden: torch.Tensor = hidden,
                space: Workspace = spaces[0],
            ) -> torch.Tensor:
                torch.cat(pieces, out=returned)
                return hidden + space.combined(returned, order, gates, len(returned))

            sort.append((ids.numel(), times.device_part(lambda: before(spaces[1]))))  # noqa: B023
            combine.append((ids.numel(), times.device_part(after)))
            if not first:
                first["combine_host_s"] = times.host(after)
                # The host waits inside, so what it needs is the whole of it on an idle device.
                first["known_s"] = times.host(lambda: before(spaces[0]))  # noqa: B023
        small = self._rows(_SMALL_ROWS)
        pinned = torch.empty(small.shape, dtype=self.dtype, pin_memory=not times.is_serial)

        def fetch() -> None:
            pinned.copy_(small, non_blocking=True)
            times.settle()

        return {
            **first,
            "sort_device": _ascending(sort),
            "combine_device": _ascending(combine),
            "fetch_s": times.wall(fetch),
            "return_host_s": times.wall(
                lambda: small.copy_(pinned, non_blocking=True), settle=times.is_serial
            ),
            "sync_s": times.host(times.settle),
            "launch_host_s": times.host(lambda: small.add_(1)),
            "launch_device_s": times.device_part(lambda: small.add_(1)),
        }

    def of_kernel(self, name: str, machine: Calibration) -> GatingTimes:
        """Measures a gating kernel over tokens and active experts, and fits its parts."""
        found = [self._kernel_points(name, size, machine) for size in self.sizes.expert_bytes]
        points = [point for of_size, _ in found for point in of_size]
        waits = any(each for _, each in found)
        fit = fit_parts(
            np.array([point.columns for point in points]),
            np.array([point.device_s for point in points]),
        )
        host = np.zeros(2)
        if not waits and not self.times.is_serial:
            host = fit_parts(
                np.array([[1.0, point.active] for point in points]),
                np.array([point.host_s for point in points]),
            ).factors
        return GatingTimes(
            host_dispatch_s=float(host[0]),
            host_expert_s=float(host[1]),
            device_dispatch_s=float(fit.factors[0]),
            device_expert_s=float(fit.factors[1]),
            weight_factor=float(fit.factors[2]),
            flops_factor=float(fit.factors[3]),
            moved_factor=float(fit.factors[4]),
            waits=waits and not self.times.is_serial,
            error=fit.error,
        )

    def _kernel_points(
        self, name: str, size: int, machine: Calibration
    ) -> tuple[list[_KernelPoint], bool]:
        """Returns times at one size of experts, and whether the host waits in them."""
        sizes, times = self.sizes, self.times
        shape = sizes.shape(size)
        experts = _stacked(shape, sizes.num_experts, self.device)
        kernel = KERNELS[name]
        hidden = self._rows(max(sizes.tokens))
        waits = _waits(name, hidden, experts)
        found = []
        for tokens, share in itertools.product(sizes.tokens, _ACTIVE_SHARES):
            used = max(sizes.top_k, round(share * sizes.num_experts))
            flat = torch.arange(tokens * sizes.top_k, device=self.device) % used
            ids = flat.view(tokens, sizes.top_k)
            gates = torch.full(ids.shape, 1 / sizes.top_k, dtype=self.dtype, device=self.device)

            def layer(
                rows: torch.Tensor = hidden[:tokens],
                ids: torch.Tensor = ids,
                gates: torch.Tensor = gates,
            ) -> torch.Tensor:
                return gating_layer(kernel, rows, ids, gates, experts)

            numbers = {
                "num_tokens": tokens,
                "top_k": sizes.top_k,
                "active": min(used, flat.numel()),
                "executed": flat.numel(),
                "num_experts": sizes.num_experts,
            }
            given = Dispatches(**{key: np.array([float(n)]) for key, n in numbers.items()})
            work = kernel_work(name, given, shape)
            found.append(
                _KernelPoint(
                    columns=tuple(device_columns(work, given.active, machine)[0].tolist()),
                    active=float(given.active[0]),
                    device_s=(times.wall(layer) if waits else times.device_part(layer)).median,
                    host_s=times.host(layer).median,
                )
            )
        return found, waits

    def trials(self, regimes: Sequence[_MadeUp], size: int, machine: Calibration) -> list[_Tried]:
        """Runs settings on made-up routing, at one size of experts."""
        shape = self.sizes.shape(size)
        # Page-locked memory takes seconds to be had: one copy for all regimes.
        most = max(regimes, key=lambda made: made.regime.num_layers)
        whole = open_stack(
            most.trace, stack="decoder", device=self.device, shape=shape, share_host=True
        )
        found: list[_Tried] = []
        # What is there stays: each trial looks for garbage before it begins.
        gc.collect()
        gc.freeze()
        try:
            for made in regimes:
                found += self._regime_trials(whole, made, machine)
        finally:
            gc.unfreeze()
            whole.close()
        return found

    def _regime_trials(
        self, whole: RoutedStack, made: _MadeUp, machine: Calibration
    ) -> list[_Tried]:
        stack = self._stack_of(whole, made)
        question = _question(made, whole.shape, self.sizes)
        found = []
        for setting in trial_settings(machine):
            try:
                found.append(self._trial(stack, question, setting, machine))
            except torch.cuda.OutOfMemoryError:
                # A trial fewer: what is kept on the device depends on the setting.
                torch.cuda.empty_cache()
        return found

    def _stack_of(self, whole: RoutedStack, made: _MadeUp) -> RoutedStack:
        """Returns the first layers of a stack under the routing of a regime."""
        steps = routed_steps(
            made.trace,
            stack="decoder",
            device=self.device,
            dtype=self.dtype,
            max_steps=made.regime.num_steps,
        )
        return dataclasses.replace(
            whole,
            trace=made.trace,
            sites=whole.sites[: made.regime.num_layers],
            steps=tuple(steps),
            hidden=starting_rows(steps, geometry_of(whole.shape), self.device),
        )

    def _trial(
        self,
        stack: RoutedStack,
        question: cost_model.Question,
        setting: Setting,
        machine: Calibration,
    ) -> _Tried:
        run = SettingRun(stack, setting)
        measured = self._repeated(run)
        run.close()
        return _tried(measured, question, setting, machine)

    def _repeated(self, run: SettingRun) -> tuple[tuple[float, ...], ...]:
        """Returns [repetitions][steps] in milliseconds; fewer repetitions where they take long."""
        begun_s = time.perf_counter()
        found = timed_steps(run, repetitions=1)
        while len(found) < self.sizes.trial_repetitions:
            if len(found) >= _LEAST_REPETITIONS and time.perf_counter() - begun_s > _TRIAL_S:
                break
            found += timed_steps(run, repetitions=1, warmup=0)
        return found


def _question(made: _MadeUp, shape: ExpertShape, sizes: CalibrationSizes) -> cost_model.Question:
    """Returns what is asked of trials of a regime."""
    return cost_model.question_of(
        made.trace,
        shape=shape,
        phase="all",
        max_steps=made.regime.num_steps,
        repetitions=sizes.trial_repetitions,
    )


def _tried(
    measured_ms: tuple[tuple[float, ...], ...],
    question: cost_model.Question,
    setting: Setting,
    machine: Calibration,
) -> _Tried:
    """Returns a trial beside what is modelled of it."""
    work = cost_model.work_of(question, setting, machine)
    is_gating = isinstance(setting, GatingSetting)
    trial = Trial(
        kind="gating" if is_gating else "buffering",
        setting=setting.name,
        routing=ROUTING,
        modelled_ms=tuple((step_times(work)[0] * 1e3).tolist()),
        measured_ms=measured_ms,
    )
    return _Tried(
        trial=trial,
        work=work,
        whole=cost_model.whole_of(setting),
        expert_bytes=question.shape.expert_bytes,
    )


def trial_settings(machine: Calibration) -> list[Setting]:
    """Returns the settings that are tried: no buffer, small and large ones, others, every kernel.

    Policies differ in how long they take to decide, which is measured for all of them, and in what
    they copy, which is known: a few of them are enough.
    """
    known = [name for name in _TRIAL_POLICIES if name in machine.decisions]
    found: list[Setting] = [BufferingSetting(capacity=None)]
    found += [
        BufferingSetting(capacity=share, policy=policy)
        for policy in known or list(machine.decisions)
        for share in _TRIAL_SHARES
    ]
    found += [
        BufferingSetting(capacity=_TRIAL_MISS_SHARE, policy=policy, miss=miss)
        for policy in known[:1]
        for miss in _TRIAL_MISSES
    ]
    found += [GatingSetting(kernel=name) for name in machine.gating]
    return found


def _waits(name: str, hidden: torch.Tensor, experts: ExpertWeights) -> bool:
    """Returns True where the host waits for the device in a kernel (itself, or its fallback)."""
    if name in STATIC_KERNELS or (name == "dynamic" and can_fuse(hidden, experts)):
        return False
    return name == "dynamic_loop" or not can_group(experts.w_in, hidden)


def _stacked(shape: ExpertShape, count: int, device: torch.device) -> ExpertWeights:
    return random_experts(
        num_experts=count,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        gated=shape.gated,
        device=device,
        dtype=getattr(torch, shape.dtype),
        activation="silu" if shape.gated else "relu",
    )


def _scaled(measured: Measured, factor: float) -> Measured:
    return dataclasses.replace(
        measured,
        median=measured.median * factor,
        low=measured.low * factor,
        high=measured.high * factor,
    )


def _ascending(points: Sequence[tuple[float, Measured]]) -> Curve:
    ordered = dict(sorted(points, key=lambda point: point[0]))
    return Curve(sizes=tuple(map(float, ordered)), times_s=tuple(ordered.values()))


def _surface(points: Sequence[tuple[int, Curve]]) -> ExpertTimes:
    return ExpertTimes(
        expert_bytes=tuple(size for size, _ in points), by_rows=tuple(curve for _, curve in points)
    )


def _decision_times(regimes: Sequence[_MadeUp], policy: str, *, streamed: bool) -> DecisionTimes:
    """Times a policy's state machine over made-up routing, and the order of pieces; host alone."""
    found = [
        _decisions(made.trace, policy, share, streamed=streamed)
        for made in regimes
        for share in _DECISION_SHARES
    ]
    every = np.concatenate([columns for columns, _ in found])
    fit = fit_parts(every, np.concatenate([seconds for _, seconds in found]))
    return DecisionTimes(
        dispatch_s=float(fit.factors[0]),
        hit_s=float(fit.factors[1]),
        miss_s=float(fit.factors[2]),
        slot_s=float(fit.factors[3]),
        error=fit.error / len(every) ** 0.5,
    )


def _decisions(trace: Trace, policy: str, share: float, *, streamed: bool) -> tuple[Floats, Floats]:
    """Returns what `DecisionTimes` multiplies [dispatches, 4], and the times in seconds."""
    routed = read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    count = np.diff(routed.starts)
    setting = BufferingSetting(capacity=share, policy=policy)
    runs = []
    for _ in range(_PLAN_REPEATS):
        made = residency_of(trace, routed, setting, rows=rows)
        dispatches = planned_dispatches(made.residency, routed, setting)
        times, hits = [], []
        for _ in range(len(count)):
            begun_s = time.perf_counter()
            planned = next(dispatches)
            if streamed:
                copies_of(planned, pieces_of(planned, streamed=True))
            times.append(time.perf_counter() - begun_s)
            hits.append(sum(one.hit for one in planned))
        runs.append(times)
    hit = np.array(hits, np.float64)
    missed = count - hit
    slots = made.capacity[routed.site]
    columns = np.stack([np.ones_like(hit), hit, missed, missed * slots], axis=1)
    # The same decisions each time: the median of the repetitions is without interruptions.
    return columns, np.median(np.array(runs), axis=0)
