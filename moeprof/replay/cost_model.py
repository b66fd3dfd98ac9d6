"""What a setting would cost on a calibrated machine: the time of every step, bytes, intervals.

Every step of the trace is run through the pipeline of the live runtime (`pipeline`) with the exact
lookups and copies of the ``sequential`` replay (`buffer_plans`), in the runtime's order
(`execution_orders`), with the constants of the calibration times the factors that its trial runs
ask for (`corrections`): one for each kind of work, with a buffer or without; a gating kernel has
one for all it does. Leaves out attention, embeddings and everything else around the experts: a
step is what `moeprof.live` runs, all experts of one stack.

A measurement takes the median of every step over its repetitions, then percentiles over steps: a
hiccup of the machine is no property of a setting. Predictions are of that.

The interval. 200 draws; in each of them the factors of all kinds of work are drawn together from
the errors of their fit, the host is as fast or slow as it was seen to vary (`host_spread`), the
whole setting is off by a factor drawn from what the trials leave over
(Student's t, one more setting to come), and the median of every step by a factor drawn from those
of the trials. The percentiles of each draw are taken as a measurement would take them; the
prediction is the median of the draws, the interval their 5th to 95th percentile. Without at least
`LEAST_TRIALS` trials of a kind there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import CalibrationError, UsageError
from moeprof.replay.buffer_plans import BufferPlan, RoutedRows, plan_buffer, read_routed_rows
from moeprof.replay.cache import streams
from moeprof.replay.execution_orders import execution_order, is_streamed
from moeprof.replay.expert_shapes import ExpertShape, shape_of_trace
from moeprof.replay.gating_work import Dispatches, device_seconds, kernel_work
from moeprof.replay.pipeline import NOTHING, PARTS, Work, step_times
from moeprof.replay.result import Result
from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, Setting

if TYPE_CHECKING:
    from moeprof.replay.calibration_file import Calibration, Leftovers
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]

UNJUDGED = "calibrated on a CPU: this model of time was held to measurements on GPUs only"
"""Said of predictions that may be far off, intervals included."""

NAME = "cost"
NUM_DRAWS = 200
LEAST_TRIALS = 3
PERCENTILES = (50, 99)
HOST_PARTS = ("known", "decide", "load", "launch", "host_expert", "lane", "combine_host", "sync")
"""Kinds of work (`pipeline.PARTS`) that the host does."""

HOST_SPREAD = 0.2
"""Standard deviation of the log of a host's speed where nobody watched it.

Virtual machines share processors: on three of one kind the launch of an expert took 57, 58 and 89
microseconds; copies took the same within 3 %.
"""

LEAST_HOST_SPREAD = 0.03
"""The same at least, however steady a host was while it was calibrated."""

LEAST_PROBES = 10
"""Probes of the host's speed from which its spread is known."""


_LOW, _HIGH = 0.05, 0.95
# Of a normal distribution so much lies below its mean less a standard deviation.
_SIXTH = 0.1587
_MS = 1e3
_NO_POLICY = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is predicted, whatever the setting.

    Attributes:
        trace: The trace.
        routed: The routing of one stack.
        shape: Of its experts.
        judged: [judged steps] indices of the steps that percentiles are taken over.
        rows: What policies that look ahead see.
        seed: Of the draws.
        percentiles: Of the step times that are predicted.
    """

    trace: Trace
    routed: RoutedRows
    shape: ExpertShape
    judged: NDArray[np.int64]
    rows: Any
    seed: int
    percentiles: tuple[int, ...] = PERCENTILES


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a setting would cost.

    Attributes:
        setting: The setting.
        modelled_ms: [steps] by the constants alone.
        step_ms: [steps] corrected by the trials.
        copied_bytes: [steps] bytes copied to the device.
        device_bytes: Bytes of experts on the device.
        judged_hit_rate: Hits over lookups of the judged steps, so that what other steps miss, as
            those of a prompt into an empty buffer, is not in it; None where nothing is buffered or
            looked up.
        percentiles_ms: Percentile -> (value, low, high); low and high None without an interval.
        naive_bandwidth_ms: Percentile -> bytes over bandwidth: bytes copied over the link's, plus
            bytes of active experts over the device's.
        naive_mean_ms: What the mean step costs where nothing overlaps, whatever the percentile.
    """

    setting: Setting
    modelled_ms: Floats
    step_ms: Floats
    copied_bytes: NDArray[np.int64]
    device_bytes: int
    judged_hit_rate: float | None
    percentiles_ms: dict[int, tuple[float, float | None, float | None]]
    naive_bandwidth_ms: dict[int, float]
    naive_mean_ms: float


def question_of(
    trace: Trace,
    *,
    stack: str | None = None,
    shape: ExpertShape | None = None,
    phase: str | None = None,
    max_steps: int | None = None,
    seed: int = 0,
    percentiles: Sequence[int] = PERCENTILES,
) -> Question:
    """Returns what is predicted.

    Args:
        trace: The trace.
        stack: Its stack; the last one (a decoder) when None.
        shape: Of the experts as they are run; as the trace has it when None.
        phase: Steps of this phase are judged, ``all`` for every step; when None decode where there
            are such steps, else all.
        max_steps: At most so many steps are run.
        seed: Of the draws.
        percentiles: Of the step times.

    Raises:
        UsageError: There is no such stack or phase, or the shape is not known.
    """
    chosen = trace.stacks[-1] if stack is None else stack
    routed = read_routed_rows(trace, chosen, max_steps=max_steps)
    phases = np.array(routed.phases)
    wanted = phase or ("decode" if "decode" in routed.phases else "all")
    judged = np.arange(len(phases)) if wanted == "all" else np.flatnonzero(phases == wanted)
    if not len(judged):
        known = ", ".join([*dict.fromkeys(routed.phases), "all"])
        raise UsageError(f"there are no steps of phase {wanted!r}", hint=f"one of {known}")
    return Question(
        trace=trace,
        routed=routed,
        shape=shape or shape_of_trace(trace, chosen),
        judged=judged,
        rows=streams.read_rows(trace),
        seed=seed,
        percentiles=tuple(percentiles),
    )


def predict(
    question: Question,
    setting: Setting,
    machine: Calibration,
    *,
    plan: BufferPlan | None = None,
) -> Prediction:
    """Returns what a setting would cost.

    Args:
        question: What is predicted.
        setting: The setting.
        machine: The machine.
        plan: What the buffer does; what the live runtime would do when None.

    Raises:
        UsageError: The calibration lacks what the setting needs.
    """
    routed = question.routed
    plan = plan or plan_of(question, setting)
    work = work_of(question, setting, machine, plan=plan)
    is_buffered = isinstance(setting, BufferingSetting) and setting.capacity is not None
    modelled = step_times(work)[0] * _MS
    copied = plan.copies_per_step(routed) * question.shape.block_bytes
    known = _knowledge_of(setting, machine, question.shape.expert_bytes)
    corrected = known.scale * step_times(work, np.exp(known.log_factors)[None])[0] * _MS
    generator = np.random.default_rng(question.seed)
    drawn = _drawn_percentiles(question, work, known, generator)
    left = known.leftovers
    has_interval = left is not None and len(left.residuals) >= LEAST_TRIALS
    percentiles = {}
    for index, percentile in enumerate(question.percentiles):
        value = float(np.median(drawn[:, index]))
        low, high = np.quantile(drawn[:, index], (_LOW, _HIGH)).tolist()
        percentiles[percentile] = (value, low, high) if has_interval else (value, None, None)
    read = routed.per_step(np.ones(routed.num_lookups, np.int64)) * question.shape.expert_bytes
    link = _link_bytes_per_s(machine)
    by_bytes = copied / link + read / machine.device_copy_bytes_per_s.median
    return Prediction(
        setting=setting,
        modelled_ms=modelled,
        step_ms=corrected,
        copied_bytes=copied,
        device_bytes=(plan.num_slots + plan.num_staging) * question.shape.expert_bytes,
        judged_hit_rate=_judged_hit_rate(question, plan) if is_buffered else None,
        percentiles_ms=percentiles,
        naive_bandwidth_ms={
            each: float(np.percentile(by_bytes[question.judged], each)) * _MS
            for each in question.percentiles
        },
        naive_mean_ms=float(work.unoverlapped_s()[question.judged].mean()) * _MS,
    )


def _judged_hit_rate(question: Question, plan: BufferPlan) -> float | None:
    lookups, hits = (
        int(question.routed.per_step(each)[question.judged].sum())
        for each in (np.ones_like(plan.hit, np.int64), plan.hit.astype(np.int64))
    )
    return hits / lookups if lookups else None


def _link_bytes_per_s(machine: Calibration) -> float:
    """Returns the bandwidth of the largest copy measured."""
    return machine.to_device.sizes[-1] / machine.to_device.times_s[-1].median


def plan_of(question: Question, setting: Setting) -> BufferPlan:
    """Returns what the live runtime would do with every lookup."""
    if isinstance(setting, GatingSetting):
        setting = BufferingSetting(capacity=None)
    return plan_buffer(question.trace, question.routed, setting, rows=question.rows)


def work_of(
    question: Question,
    setting: Setting,
    machine: Calibration,
    *,
    plan: BufferPlan | None = None,
) -> Work:
    """Returns what the steps do; arguments as in `predict`."""
    if isinstance(setting, GatingSetting):
        return gating_work_of(question.routed, setting, question.shape, machine)
    plan = plan or plan_of(question, setting)
    return buffering_work_of(question.routed, plan, setting, question.shape, machine)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Knowledge:
    """What trials say about a setting.

    Attributes:
        log_factors: [parts] of the kinds of work.
        error: [parts, parts] a root of their covariance.
        host_error: Standard error of the log of the host's speed, the same for all it does.
        scale: Factor of the whole.
        scale_error: Standard error of its log.
        leftovers: What they leave over; None without trials.
    """

    log_factors: Floats
    error: Floats
    host_error: float = 0.0
    scale: float = 1.0
    scale_error: float = 0.0
    leftovers: Leftovers | None = None


def whole_of(setting: Setting) -> str | None:
    """Returns the name under which trials give a setting one factor for all it does, or None."""
    return setting.kernel if isinstance(setting, GatingSetting) else None


def host_spread(machine: Calibration) -> float:
    """Returns the standard deviation of the log of the host's speed from one moment to another.

    Half the distance between the outer sixths of the probes taken all through the calibration, so
    that slow stretches count and single hiccups do not; `HOST_SPREAD` where there are too few.
    Nothing where the device is the host: its trials are of the same work.
    """
    if machine.is_serial:
        return 0.0
    if len(machine.host_probes_ms) < LEAST_PROBES:
        return HOST_SPREAD
    low, high = np.quantile(np.log(machine.host_probes_ms), (_SIXTH, 1 - _SIXTH))
    return max(LEAST_HOST_SPREAD, float(high - low) / 2)


def _knowledge_of(setting: Setting, machine: Calibration, expert_bytes: int) -> _Knowledge:
    """Returns what is known; of kinds of work at the nearest size of experts that was tried."""
    found = machine.corrections
    nothing = np.zeros(len(PARTS))
    plain = _Knowledge(log_factors=nothing, error=np.diag(part_errors(machine)))
    if found is None:
        return plain
    if found.parts != PARTS:
        raise CalibrationError(
            "the calibration corrects other parts than this moeprof models",
            hint="measure this machine again: moeprof calibrate -o FILE",
        )
    speed = host_spread(machine)
    whole = whole_of(setting)
    if whole is not None:
        if whole not in found.kernels:
            return plain
        # Its trials ran all of it: what single constants are off by is in them.
        own = found.kernels[whole]
        return _Knowledge(
            log_factors=nothing,
            error=np.zeros((len(PARTS), len(PARTS))),
            host_error=speed,
            scale=float(np.exp(own.log_factor)),
            scale_error=own.error,
            leftovers=found.gating,
        )
    assert isinstance(setting, BufferingSetting)
    if machine.by_size:
        nearest = min(machine.by_size, key=lambda size: abs(math.log(size / expert_bytes)))
        found = machine.by_size[nearest]
    left = found.buffering if setting.miss == "load" else found.host or found.buffering
    if left is None:
        return plain
    return _Knowledge(
        log_factors=np.array(found.log_factors),
        error=np.linalg.cholesky(np.array(found.covariance)),
        host_error=speed,
        leftovers=left,
    )


def _drawn_percentiles(
    question: Question, work: Work, known: _Knowledge, generator: np.random.Generator
) -> Floats:
    """Returns [draws, percentiles] in milliseconds."""
    errors = generator.standard_normal((NUM_DRAWS, len(PARTS))) @ known.error.T
    speed = known.host_error * generator.standard_normal(NUM_DRAWS)
    errors = errors + speed[:, None] * np.isin(PARTS, HOST_PARTS)
    every = step_times(work, np.exp(known.log_factors + errors))[:, question.judged] * _MS
    off = known.scale_error * generator.standard_normal(NUM_DRAWS)
    if known.leftovers is not None:
        left = known.leftovers
        off = off + left.spread * generator.standard_t(left.freedom, NUM_DRAWS)
        jitter = np.array(left.jitter)
        every = every * jitter[generator.integers(len(jitter), size=every.shape)]
    run = every * (known.scale * np.exp(off))[:, None]
    found: Floats = np.percentile(run, question.percentiles, axis=1).T
    return found


def part_errors(machine: Calibration) -> Floats:
    """Returns [len(PARTS)] the relative standard error of each kind of work."""
    decide = max((one.error for one in machine.decisions.values()), default=0.0)
    if machine.foresee_s is not None:
        decide = max(decide, machine.foresee_s.error)
    errors = {
        "known": machine.known_s.error,
        "sort": machine.sort_device.error,
        "decide": decide,
        "load": machine.load_host_s.error,
        "copy": machine.to_device.error,
        "launch": machine.expert_host_s.error,
        "expert": machine.device_expert.error,
        "host_expert": machine.host_expert.error,
        "lane": max(machine.fetch_s.error, machine.return_host_s.error),
        "combine_host": machine.combine_host_s.error,
        "combine_device": machine.combine_device.error,
        "sync": machine.sync_s.error,
        "handover": machine.handover_s.error,
    }
    return np.array([errors[part] for part in PARTS])


def buffering_work_of(
    routed: RoutedRows,
    plan: BufferPlan,
    setting: BufferingSetting,
    shape: ExpertShape,
    machine: Calibration,
) -> Work:
    """Returns what a buffer does, with the time of each piece."""
    slots = (routed.num_tokens * routed.top_k).astype(np.float64)
    count = len(routed.site)
    decide = np.zeros(count)
    is_buffered = setting.capacity is not None
    if setting.capacity is not None:
        if setting.policy not in machine.decisions:
            known = ", ".join(sorted(machine.decisions))
            raise UsageError(
                f"the calibration does not know the policy {setting.policy}",
                hint=f"calibrate with it, or choose one of {known}",
            )
        hits = _per_dispatch(plan.hit, routed.starts)
        decide = machine.decisions[setting.policy].at(
            hits, np.diff(routed.starts) - hits, plan.capacity[routed.site]
        )
    foresee = np.zeros(count)
    if setting.prefetch:
        if machine.foresee_s is None:
            raise UsageError(
                "the calibration does not know how long it takes to say what is copied ahead",
                hint="measure this machine again: moeprof calibrate -o FILE",
            )
        foresee += machine.foresee_s.median * (np.diff(routed.starts) > 0)
    streamed = is_streamed(routed.num_tokens, shape, machine)
    order = execution_order(routed, plan, streamed)
    experts = np.diff(order.lookup_starts)
    # Expert by expert, a piece is one lookup.
    slot_s = machine.slot_host_s.median
    launch = np.full(len(experts), machine.expert_host_s.median + is_buffered * slot_s)
    load_s = np.full(len(order.copied), machine.load_host_s.median)
    first = order.lookups[order.lookup_starts[:-1]]
    expert_s = machine.device_expert.at(shape.expert_bytes, routed.rows[first])
    known_s = np.full(count, machine.known_s.median)
    sort_s = machine.sort_device.at(slots)
    combine_host = np.full(count, machine.combine_host_s.median)
    combine_device = machine.combine_device.at(slots)
    if machine.streamed is not None:
        own = machine.streamed
        by_piece = np.repeat(streamed, np.diff(order.piece_starts))
        piece_host = own.piece_host.at(experts) + is_buffered * own.slot_host_s.median
        launch = np.where(by_piece, piece_host, launch)
        # What is copied ahead is asked for one by one, so that nobody waits for all of it.
        by_group = np.repeat(streamed, np.diff(order.copy_starts)) & (order.copied != NOTHING)
        load_s = np.where(by_group, own.load_host_s.median, load_s)
        reads = -(-routed.rows[order.lookups] // own.rows_at_once)
        total = np.concatenate([[0], np.cumsum(reads)])
        reads_of_piece = np.diff(total[order.lookup_starts])
        piece_device = own.piece_device.at(shape.expert_bytes, reads_of_piece)
        expert_s = np.where(by_piece, piece_device, expert_s)
        known_s = np.where(streamed, own.known_s.median, known_s)
        sort_s = np.where(streamed, own.late_s.median, sort_s)
        if own.rest_host_s is not None:
            decide = decide + streamed * own.rest_host_s.median
        combine_host = np.where(streamed, own.combine_host_s.median, combine_host)
        combine_device = np.where(streamed, own.combine_device.at(slots), combine_device)
    on_host = _per_dispatch(plan.on_host, routed.starts)
    host_s = plan.on_host * machine.host_expert.at(shape.expert_bytes, routed.rows)
    copy_s = float(machine.to_device.at(shape.block_bytes))
    return Work(
        step_starts=routed.step_starts,
        piece_starts=order.piece_starts,
        copy_starts=order.copy_starts,
        waits=np.ones(count, np.uint8),
        known_s=known_s,
        sort_s=sort_s,
        decide_s=decide,
        foresee_s=foresee,
        on_host=(on_host > 0).astype(np.uint8),
        host_s=_per_dispatch(host_s, routed.starts),
        combine_host_s=combine_host,
        combine_device_s=combine_device,
        launch_s=launch,
        expert_s=expert_s,
        awaits=order.awaits,
        before=order.before,
        after=order.after,
        load_s=load_s,
        copy_s=np.full(len(order.copied), copy_s),
        handover_s=machine.handover_s.median,
        fetch_s=machine.fetch_s.median,
        return_s=machine.return_host_s.median,
        sync_s=machine.sync_s.median,
        is_serial=machine.is_serial,
    )


def _per_dispatch(per_lookup: NDArray[Any], starts: NDArray[np.int32]) -> Floats:
    """Returns [dispatches] sums of a value [lookups]."""
    total = np.concatenate([[0.0], np.cumsum(per_lookup, dtype=np.float64)])
    found: Floats = np.diff(total[starts])
    return found


def gating_work_of(
    routed: RoutedRows, setting: GatingSetting, shape: ExpertShape, machine: Calibration
) -> Work:
    """Returns what a gating kernel does: one piece per dispatch."""
    if setting.kernel not in machine.gating:
        known = ", ".join(sorted(machine.gating)) or "none"
        raise UsageError(
            f"the calibration does not know the gating kernel {setting.kernel}",
            hint=f"calibrate with it, or choose one of {known}",
        )
    times = machine.gating[setting.kernel]
    count = len(routed.site)
    active = np.diff(routed.starts).astype(np.float64)
    total = np.concatenate([[0], np.cumsum(routed.rows.astype(np.int64))])
    experts = np.array([site.num_experts for site in routed.sites], np.float64)
    given = Dispatches(
        num_tokens=routed.num_tokens.astype(np.float64),
        top_k=routed.top_k.astype(np.float64),
        active=active,
        executed=np.diff(total[routed.starts]).astype(np.float64),
        num_experts=experts[routed.site],
    )
    done = kernel_work(setting.kernel, given, shape)
    nothing = np.zeros(count)
    none = np.zeros(0, np.int32)
    return Work(
        step_starts=routed.step_starts,
        piece_starts=np.arange(count + 1, dtype=np.int32),
        copy_starts=np.zeros(count + 1, np.int32),
        waits=np.full(count, times.waits, np.uint8),
        known_s=nothing,
        sort_s=nothing,
        decide_s=nothing,
        foresee_s=nothing,
        on_host=np.zeros(count, np.uint8),
        host_s=nothing,
        combine_host_s=nothing,
        combine_device_s=nothing,
        launch_s=times.host_dispatch_s + times.host_expert_s * active,
        expert_s=device_seconds(times, done, active, machine),
        awaits=np.full(count, NOTHING, np.int32),
        before=none,
        after=none,
        load_s=np.zeros(0),
        copy_s=np.zeros(0),
        handover_s=0.0,
        fetch_s=0.0,
        return_s=0.0,
        sync_s=machine.sync_s.median,
        is_serial=machine.is_serial,
    )


def cost(
    trace: Trace,
    machine: Calibration,
    settings: Sequence[Setting],
    *,
    stack: str | None = None,
    shape: ExpertShape | None = None,
    phase: str | None = None,
    max_steps: int | None = None,
    seed: int = 0,
) -> Result:
    """Returns what settings would cost on a calibrated machine; every figure is an estimate.

    The table has one row per setting and percentile: predicted time with a 90 % interval, both
    naive models, bytes of experts on the device, and of the judged steps the hit rate and the mean
    of bytes copied.

    Args:
        trace: The trace.
        machine: From `moeprof.replay.read_calibration`.
        settings: What to predict.
        stack: See `question_of`, as for what follows.
        shape: See there.
        phase: See there.
        max_steps: See there.
        seed: See there.

    Raises:
        UsageError: An argument makes no sense, or the calibration lacks what a setting needs.
    """
    if not settings:
        raise UsageError("there is nothing to predict", hint="name a setting, as in lru:32")
    question = question_of(
        trace,
        stack=stack,
        shape=shape,
        phase=phase,
        max_steps=max_steps,
        seed=seed,
    )
    predictions = [predict(question, setting, machine) for setting in settings]
    rows = [row for each in predictions for row in prediction_rows(each, question)]
    return Result(
        name=NAME,
        title="Predicted time of a step",
        table=pd.DataFrame(rows),
        notes=(
            f"estimate on {machine.name}, calibrated {machine.date}",
            f"{len(question.judged)} of {len(question.routed.steps)} steps judged, to which hit "
            "rates and bytes copied belong as well",
            "a step is all experts of the stack, without what lies between them",
            *([UNJUDGED] if machine.is_serial else []),
        ),
    )


def prediction_rows(prediction: Prediction, question: Question) -> list[dict[str, Any]]:
    """Returns one row per percentile of a prediction, plain values only."""
    return [
        {
            "setting": prediction.setting.name,
            "percentile": percentile,
            "predicted_ms": value,
            "low_ms": low,
            "high_ms": high,
            "naive_bandwidth_ms": prediction.naive_bandwidth_ms[percentile],
            "naive_mean_ms": prediction.naive_mean_ms,
            "judged_hit_rate": prediction.judged_hit_rate,
            "copied_bytes_per_step": float(prediction.copied_bytes[question.judged].mean()),
            "device_bytes": prediction.device_bytes,
            "figure_class": "estimate",
        }
        for percentile, (value, low, high) in prediction.percentiles_ms.items()
    ]
