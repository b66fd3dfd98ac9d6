"""What a setting would cost on a calibrated machine: the time of every step, bytes, intervals.

Every step of the trace is run through the pipeline of the live runtime (`pipeline`) with the exact
lookups and copies of the ``sequential`` replay (`buffer_plans`), then corrected by what the
calibration's trial runs left over. Leaves out attention, embeddings and everything else around the
experts: a step is what `moeprof.live` runs, all experts of one stack.

The interval. 200 draws; in each of them every kind of work is off by a factor drawn from the
standard error of its constant, the whole setting is off by a factor drawn from the spread between
the calibration's trials (Student's t for their number, one more setting to come), and every step of
every repetition by a factor drawn from the steps of the trials. The percentiles of each draw are
taken as a measurement would take them; the prediction is the median of the draws, the interval
their 5th to 95th percentile. Without at least `LEAST_TRIALS` trials of a kind there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.replay.buffer_plans import BufferPlan, RoutedRows, plan_buffer, read_routed_rows
from moeprof.replay.cache import streams
from moeprof.replay.expert_shapes import ExpertShape, shape_of_trace
from moeprof.replay.gating_work import Dispatches, device_seconds, kernel_work
from moeprof.replay.pipeline import NOTHING, PARTS, Work, step_times
from moeprof.replay.result import Result
from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, Setting

if TYPE_CHECKING:
    from moeprof.replay.calibration_file import Calibration, Trial
    from moeprof.trace.reader import Trace

Floats = NDArray[np.float64]

NAME = "cost"
NUM_DRAWS = 200
LEAST_TRIALS = 3
PERCENTILES = (50, 99)
KINDS = ("buffering", "gating")

_LOW, _HIGH = 0.05, 0.95
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
        repetitions: Times that a measurement would run the steps.
        rows: What policies that look ahead see.
        seed: Of the draws.
        percentiles: Of the step times that are predicted.
    """

    trace: Trace
    routed: RoutedRows
    shape: ExpertShape
    judged: NDArray[np.int64]
    repetitions: int
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
        hit_rate: Hits over lookups; None where nothing is buffered.
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
    hit_rate: float | None
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
    repetitions: int = 5,
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
        repetitions: Times that a measurement runs them.
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
        repetitions=repetitions,
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
    kind = "gating" if isinstance(setting, GatingSetting) else "buffering"
    if isinstance(setting, GatingSetting):
        plan = plan_buffer(question.trace, routed, BufferingSetting(capacity=None))
        work = gating_work_of(routed, setting, question.shape, machine)
        hit_rate = None
    else:
        plan = plan or plan_buffer(question.trace, routed, setting, rows=question.rows)
        work = buffering_work_of(routed, plan, setting, question.shape, machine)
        hit_rate = None if setting.capacity is None else float(plan.hit.mean())
    modelled = step_times(work)[0] * _MS
    copied = routed.per_step(plan.loads.astype(np.int64)) * question.shape.block_bytes
    leftover = leftovers(machine.trials, kind)
    generator = np.random.default_rng(question.seed)
    drawn = _drawn_percentiles(question, work, machine, leftover, generator)
    percentiles = {}
    for index, percentile in enumerate(question.percentiles):
        value = float(np.median(drawn[:, index]))
        low, high = np.quantile(drawn[:, index], (_LOW, _HIGH)).tolist()
        has_interval = leftover.num_trials >= LEAST_TRIALS
        percentiles[percentile] = (value, low, high) if has_interval else (value, None, None)
    read = routed.per_step(np.ones(routed.num_lookups, np.int64)) * question.shape.expert_bytes
    link = _link_bytes_per_s(machine)
    by_bytes = copied / link + read / machine.device_copy_bytes_per_s.median
    return Prediction(
        setting=setting,
        modelled_ms=modelled,
        step_ms=modelled * leftover.factor,
        copied_bytes=copied,
        device_bytes=(plan.num_slots + plan.num_staging) * question.shape.expert_bytes,
        hit_rate=hit_rate,
        percentiles_ms=percentiles,
        naive_bandwidth_ms={
            each: float(np.percentile(by_bytes[question.judged], each)) * _MS
            for each in question.percentiles
        },
        naive_mean_ms=_mean_ms(work, question.judged),
    )


def _link_bytes_per_s(machine: Calibration) -> float:
    """Returns the bandwidth of the largest copy measured."""
    return machine.to_device.sizes[-1] / machine.to_device.times_s[-1].median


def _mean_ms(work: Work, judged: NDArray[np.int64]) -> float:
    """Returns the mean over steps of everything done, as if nothing overlapped."""
    every = work.known_s + work.decide_s + work.combine_host_s + work.combine_device_s + work.sort_s
    lookups = np.where(
        work.on_host == 1, work.host_s, work.launch_s + work.expert_s
    ) + work.loads * (work.load_s + work.copy_s)
    total = np.concatenate([[0.0], np.cumsum(lookups)])
    per_dispatch = every + np.diff(total[work.starts])
    steps = np.concatenate([[0.0], np.cumsum(per_dispatch)])[work.step_starts]
    return float((np.diff(steps) + work.sync_s)[judged].mean()) * _MS


@dataclass(frozen=True, kw_only=True, eq=False)
class Leftovers:
    """What trials leave over: measured times over those of the constants alone.

    Attributes:
        factor: Median over trials.
        spread: Standard deviation between trials, of logarithms, one more setting to come.
        freedom: Degrees of freedom of the spread.
        jitter: [steps of all trials] factors of single steps around their trial, median 1.
        num_trials: Trials.
    """

    factor: float
    spread: float
    freedom: int
    jitter: Floats
    num_trials: int


def leftovers(trials: Sequence[Trial], kind: str) -> Leftovers:
    """Returns what the trials of a kind leave over; nothing where there are none."""
    own = [trial.ratios() for trial in trials if trial.kind == kind]
    if not own:
        return Leftovers(factor=1.0, spread=0.0, freedom=1, jitter=np.ones(1), num_trials=0)
    medians = np.array([np.median(each) for each in own])
    jitter = np.concatenate([each / median for each, median in zip(own, medians, strict=True)])
    count = len(own)
    logs = np.log(medians)
    spread = float(np.std(logs, ddof=1)) * (1 + 1 / count) ** 0.5 if count > 1 else 0.0
    return Leftovers(
        factor=float(np.exp(np.median(logs))),
        spread=spread,
        freedom=max(1, count - 1),
        jitter=jitter,
        num_trials=count,
    )


def _drawn_percentiles(
    question: Question,
    work: Work,
    machine: Calibration,
    leftover: Leftovers,
    generator: np.random.Generator,
) -> Floats:
    """Returns [draws, percentiles] in milliseconds."""
    errors = part_errors(machine)
    factors = np.exp(generator.standard_normal((NUM_DRAWS, len(PARTS))) * errors)
    every = step_times(work, factors)[:, question.judged] * _MS
    scale = leftover.factor * np.exp(
        leftover.spread * generator.standard_t(leftover.freedom, NUM_DRAWS)
    )
    shape = (NUM_DRAWS, question.repetitions, len(question.judged))
    jitter = leftover.jitter[generator.integers(len(leftover.jitter), size=shape)]
    run = (every[:, None, :] * jitter).reshape(NUM_DRAWS, -1) * scale[:, None]
    found: Floats = np.percentile(run, question.percentiles, axis=1).T
    return found


def part_errors(machine: Calibration) -> Floats:
    """Returns [len(PARTS)] the relative standard error of each kind of work."""
    decide = max((one.error for one in machine.decisions.values()), default=0.0)
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
    launch = machine.expert_host_s.median
    if setting.capacity is not None:
        if setting.policy not in machine.decisions:
            known = ", ".join(sorted(machine.decisions))
            raise UsageError(
                f"the calibration does not know the policy {setting.policy}",
                hint=f"calibrate with it, or choose one of {known}",
            )
        launch += machine.slot_host_s.median
        lookups = np.diff(routed.starts)
        total = np.concatenate([[0], np.cumsum(plan.hit.astype(np.int64))])
        hits = np.diff(total[routed.starts])
        decide = machine.decisions[setting.policy].at(
            hits, lookups - hits, plan.capacity[routed.site]
        )
    num_lookups = routed.num_lookups
    rows = routed.rows
    copy_s = float(machine.to_device.at(shape.block_bytes))
    return Work(
        step_starts=routed.step_starts,
        starts=routed.starts,
        waits=np.ones(count, np.uint8),
        known_s=np.full(count, machine.known_s.median),
        sort_s=machine.sort_device.at(slots),
        decide_s=decide,
        combine_host_s=np.full(count, machine.combine_host_s.median),
        combine_device_s=machine.combine_device.at(slots),
        loads=plan.loads,
        after=plan.after,
        awaits=plan.awaits,
        on_host=plan.on_host,
        launch_s=np.full(num_lookups, launch),
        expert_s=machine.device_expert.at(shape.expert_bytes, rows),
        host_s=machine.host_expert.at(shape.expert_bytes, rows),
        copy_s=np.full(num_lookups, copy_s),
        load_s=machine.load_host_s.median,
        fetch_s=machine.fetch_s.median,
        return_s=machine.return_host_s.median,
        sync_s=machine.sync_s.median,
        is_serial=machine.is_serial,
    )


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
    nowhere = np.full(count, NOTHING, np.int32)
    return Work(
        step_starts=routed.step_starts,
        starts=np.arange(count + 1, dtype=np.int32),
        waits=np.full(count, times.waits, np.uint8),
        known_s=nothing,
        sort_s=nothing.copy(),
        decide_s=nothing.copy(),
        combine_host_s=nothing.copy(),
        combine_device_s=nothing.copy(),
        loads=np.zeros(count, np.uint8),
        after=nowhere,
        awaits=nowhere.copy(),
        on_host=np.zeros(count, np.uint8),
        launch_s=times.host_dispatch_s + times.host_expert_s * active,
        expert_s=device_seconds(times, done, active, machine),
        host_s=nothing.copy(),
        copy_s=nothing.copy(),
        load_s=0.0,
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
    repetitions: int = 5,
    seed: int = 0,
) -> Result:
    """Returns what settings would cost on a calibrated machine; every figure is an estimate.

    The table has one row per setting and percentile: predicted time with a 90 % interval, both
    naive models, hit rate, bytes copied per step and bytes of experts on the device.

    Args:
        trace: The trace.
        machine: From `moeprof.replay.read_calibration`.
        settings: What to predict.
        stack: See `question_of`, as for what follows.
        shape: See there.
        phase: See there.
        max_steps: See there.
        repetitions: See there.
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
        repetitions=repetitions,
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
            f"{len(question.judged)} of {len(question.routed.steps)} steps judged, "
            f"{question.repetitions} repetitions of each assumed",
            "a step is all experts of the stack, without what lies between them",
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
            "hit_rate": prediction.hit_rate,
            "copied_bytes_per_step": float(prediction.copied_bytes[question.judged].mean()),
            "device_bytes": prediction.device_bytes,
            "figure_class": "estimate",
        }
        for percentile, (value, low, high) in prediction.percentiles_ms.items()
    ]
