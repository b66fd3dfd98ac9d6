"""Holds predictions to measurements: every setting of a trace predicted, run, and compared.

A setting's step takes the median over its repetitions: what the machine does besides is no property
of the setting, and hits other steps in every repetition. Percentiles are taken over these medians,
of predictions (`moeprof.replay.cost_model`) and measurements alike; those of all repetitions of all
steps together stand beside them (``raw_ms``). Settings are repeated in rounds over the whole run
(`moeprof.live.rounds`), so that a slow stretch of the machine is not one setting's, until bootstrap
draws of their visits say that both percentiles are known to `TOLERANCE`. Steps that are not judged
run without their copies (`moeprof.live.setting_runs.SettingRun`).

Predictions can be written to a file before anything is measured, and read back to be judged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from moeprof.errors import MoeprofError, TraceError, UsageError
from moeprof.live.cache_plans import PreparedCaches
from moeprof.live.core_binding import QuietCore, allowed_cores
from moeprof.live.rounds import RoundLimits, Rounds, Visited, run_in_rounds
from moeprof.live.setting_runs import ResidentExperts, RoutedStack, SettingRun, open_stack
from moeprof.live.step_percentiles import measured_ms, spread_of, spreads_of
from moeprof.live.transfers import made_current
from moeprof.recording.hardware import hardware, versions
from moeprof.replay.calibration_file import SCHEMA_VERSION
from moeprof.replay.cost_model import PERCENTILES, Question, predict, prediction_rows, question_of
from moeprof.replay.expert_shapes import ExpertShape, shape_of_trace
from moeprof.replay.result import SEVERITY_FACT, Finding, Metric, Result
from moeprof.replay.serving_settings import (
    BufferingSetting,
    GatingSetting,
    Setting,
    parse_setting,
)

if TYPE_CHECKING:
    from moeprof.replay.calibration_file import Calibration
    from moeprof.trace.reader import Trace

Progress = Callable[[str, int, int], None]

NAME = "verification"
PREDICTIONS_KIND = "moeprof predictions"
PREDICTIONS_VERSION = 1
DEFAULT_POLICIES = ("lru", "lfu", "paper", "min")
DEFAULT_CAPACITIES = ("12.5%", "25%", "50%", "75%")
DEFAULT_AHEAD = (("25%", 2), ("12.5%", 4))
TOLERANCE = 0.02
QUIET_CORE_NOTE = "before each visit the dispatching thread was put on the quietest core found"

_TAIL = 0.05
_BISECTIONS = 60
_LIBRARY_ROWS = 16
_VISIT_COLUMNS = ("setting", "round", "begun_s", "probe_ms", "repetitions")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is run; the same for predictions and measurements.

    Attributes:
        stack: Stack of the trace; the last one (a decoder) when None.
        shape: Of random experts; as the model or the trace has it when None.
        dtype: Of the model's or trace's experts as they are run; as recorded when None.
        phase: Steps that are judged; see `moeprof.replay.cost_model.question_of`.
        max_steps: At most so many steps.
        repetitions: Times that every setting runs them at least; more where a repetition is cheap
            against building the setting.
        most_repetitions: At most, where percentiles are not yet known to `TOLERANCE`.
        rounds: Over which the least repetitions are spread; one repetition in each where there are
            fewer repetitions than rounds.
        seed: Of the draws.
    """

    stack: str | None = None
    shape: ExpertShape | None = None
    dtype: str | None = None
    phase: str | None = None
    max_steps: int | None = None
    repetitions: int = 5
    most_repetitions: int = 20
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that measure nothing."""
        if not 1 <= self.repetitions <= self.most_repetitions:
            raise UsageError(
                f"{self.repetitions} to {self.most_repetitions} repetitions make no sense"
            )
        if self.rounds < 1:
            raise UsageError(f"{self.rounds} rounds make no sense")

    def question(self, trace: Trace) -> Question:
        """Returns what is predicted."""
        stack = trace.stacks[-1] if self.stack is None else self.stack
        return question_of(
            trace,
            stack=stack,
            shape=self.shape or shape_of_trace(trace, stack, dtype=self.dtype),
            phase=self.phase,
            max_steps=self.max_steps,
            repetitions=self.repetitions,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions as they are written before a measurement.

    Attributes:
        options: What is run.
        settings: Names of the settings.
        rows: As `moeprof.replay.cost` has them.
        facts: Trace, model and calibration that they come from.
    """

    options: VerifyOptions
    settings: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]

    @property
    def shape(self) -> ExpertShape:
        """Of the experts that were predicted."""
        return ExpertShape(**self.facts["shape"])


def default_settings(calibration: Calibration) -> list[Setting]:
    """Returns four policies at four capacities, other miss actions, no buffer, and every gating.

    And two that copy ahead, where the calibration knows how long it takes to choose what.
    """
    policies = [name for name in DEFAULT_POLICIES if name in calibration.decisions]
    found: list[Setting] = [BufferingSetting(capacity=None)]
    found += [
        BufferingSetting(capacity=capacity, policy=policy)
        for policy in policies
        for capacity in DEFAULT_CAPACITIES
    ]
    found += [
        BufferingSetting(capacity=DEFAULT_CAPACITIES[1], policy=policy, miss=miss)
        for policy in policies[:1]
        for miss in ("host", "split")
    ]
    if calibration.foresee_s is not None:
        found += [
            BufferingSetting(capacity=capacity, policy=policy, prefetch=prefetch)
            for policy in policies[:1]
            for capacity, prefetch in DEFAULT_AHEAD
        ]
    return found + [GatingSetting(kernel=kernel) for kernel in calibration.gating]


def make_predictions(
    trace: Trace,
    calibration: Calibration,
    settings: Sequence[Setting] | None = None,
    options: VerifyOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Predictions:
    """Predicts every setting; nothing is run.

    Args:
        trace: The trace.
        calibration: The machine.
        settings: What to predict; `default_settings` when None.
        options: What is run.
        progress: Called with (setting, done, all).

    Raises:
        UsageError: A setting cannot be predicted, or its name does not say how to run it.
    """
    chosen = list(default_settings(calibration) if settings is None else settings)
    if not chosen:
        raise UsageError("there is nothing to predict", hint="name a setting, as in lru:32")
    for setting in chosen:
        _check_name(setting)
    given = options or VerifyOptions()
    question = given.question(trace)
    rows = []
    for index, setting in enumerate(chosen):
        if progress is not None:
            progress(setting.name, index, len(chosen))
        rows += prediction_rows(predict(question, setting, calibration), question)
    return Predictions(
        options=given,
        settings=tuple(setting.name for setting in chosen),
        rows=tuple(rows),
        facts={
            "trace": Path(trace.path).name,
            "model": trace.model.name,
            "num_lookups": question.routed.num_lookups,
            "calibrated_on": calibration.name,
            "calibrated": calibration.date,
            "calibration_version": SCHEMA_VERSION,
            **_whose_trials(calibration),
            "shape": asdict(question.shape),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _check_name(setting: Setting) -> None:
    """Refuses a setting that cannot be run from its name, which is what predictions keep of it."""
    try:
        parse_setting(setting.name)
    except UsageError:
        raise UsageError(
            f"{setting.name!r} cannot be run by that name",
            hint="caches are by layer, empty at the start, a share is text ('25%'); "
            "moeprof.replay.cost predicts others",
        ) from None


def _whose_trials(calibration: Calibration) -> dict[str, str]:
    """Returns whose trials correct the constants, where they are another machine's."""
    source = calibration.trials_of
    return {} if source is None else {"trials_on": source.machine, "trials_date": source.date}


def write_predictions(
    predictions: Predictions, path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes predictions, so that they can be kept before anything is measured.

    Raises:
        MoeprofError: The file exists.
    """
    content = {
        "kind": PREDICTIONS_KIND,
        "schema_version": PREDICTIONS_VERSION,
        **asdict(predictions),
    }
    return _write_json(content, Path(path), force=force)


def write_verification(
    result: Result, path: str | os.PathLike[str], *, command: str, force: bool = False
) -> Path:
    """Writes what `verify` returned, every repetition of every step included.

    Under ``step_times`` every setting has its ``steps``, the times ``measured_ms`` [repetitions]
    [steps], the round of each repetition (``rounds``) and its ``visits`` in order: round, seconds
    since the first visit began, the host's probe in milliseconds, and repetitions.

    Args:
        result: From `verify`.
        path: Where to.
        command: What was run.
        force: Replace an existing file.

    Raises:
        MoeprofError: The file exists.
    """
    steps, visits = result.tables["step_times"], result.tables["visits"]
    times = {
        str(name): {
            "steps": own["step"].unique().tolist(),
            "measured_ms": [run["measured_ms"].tolist() for _, run in own.groupby("repetition")],
            "rounds": own.groupby("repetition")["round"].first().tolist(),
            "visits": visits[visits["setting"] == name]
            .drop(columns="setting")
            .to_dict(orient="records"),
        }
        for name, own in (steps.groupby("setting", sort=False) if len(steps) else ())
    }
    content = {
        "kind": f"moeprof {NAME}",
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(),
        "notes": list(result.notes),
        "findings": [finding.text for finding in result.findings],
        "metrics": [asdict(metric) for metric in result.metrics],
        "rows": json.loads(result.table.to_json(orient="records", double_precision=12)),
        "step_times": times,
    }
    return _write_json(content, Path(path), force=force)


def _write_json(content: Mapping[str, Any], target: Path, *, force: bool) -> Path:
    """Writes beside, then renames."""
    if target.exists() and not force:
        raise MoeprofError(f"{target} exists", hint="choose another name, or replace it: --force")
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads predictions.

    Raises:
        TraceError: The file is missing, damaged or something else.
    """
    hint = "write them again: moeprof verify TRACE --calibration FILE --predict-only -o FILE"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TraceError(f"{path} cannot be read as predictions: {error}", hint=hint) from None
    if not isinstance(content, dict) or content.get("kind") != PREDICTIONS_KIND:
        raise TraceError(f"{path} holds no predictions", hint=hint)
    if content.get("schema_version") != PREDICTIONS_VERSION:
        raise TraceError(f"{path} has version {content.get('schema_version')}", hint=hint)
    try:
        options = dict(content["options"])
        if options["shape"] is not None:
            options["shape"] = ExpertShape(**options["shape"])
        return Predictions(
            options=VerifyOptions(**options),
            settings=tuple(content["settings"]),
            rows=tuple(content["rows"]),
            facts=content["facts"],
        )
    except (KeyError, TypeError) as error:
        raise TraceError(f"{path} is damaged: {error}", hint=hint) from None


def verify(
    trace: Trace,
    calibration: Calibration | None = None,
    settings: Sequence[Setting] | None = None,
    options: VerifyOptions | None = None,
    *,
    predictions: Predictions | None = None,
    device: torch.device | str | None = None,
    weights: str = "auto",
    share_host: bool = False,
    only: Sequence[str] | None = None,
    most_s: float | None = None,
    quiet_core: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Predicts settings, runs them on this machine, and says how far off the predictions were.

    The table has one row per setting and percentile: ``predicted_ms`` with its stated interval,
    ``measured_ms`` (of the steps' medians over repetitions) with the half width of its own 90 %
    interval over visits and repetitions (``measured_spread``), ``raw_ms`` (of all repetitions),
    ``error`` (predicted over measured, less 1), ``inside``, and the errors
    of the naive models. The routing is the trace's own; ``notes`` say whose weights ran.

    Args:
        trace: The trace.
        calibration: The machine, measured before; not needed with ``predictions``.
        settings: What to run; `default_settings` when None.
        options: What is run; those of ``predictions`` where these are given.
        predictions: Made before, by `make_predictions`; made now when None.
        device: Where to run; a GPU if there is one when None.
        weights: ``auto`` takes the model's where it can be opened, ``random`` never.
        share_host: All layers of random experts read one host copy.
        only: Names of the settings to run, of those predicted; all when None.
        most_s: About so many seconds are taken. Where they are few settings are repeated less, then
            visited in fewer rounds, and only then left out.
        quiet_core: Put the calling thread on a core that is quiet before a visit begins
            (`moeprof.live.core_binding`). Machines should be calibrated likewise.
        progress: Called with (setting and round, visits done, visits planned).

    Raises:
        UsageError: An argument makes no sense.
        TraceError: The predictions are not of this trace.
    """
    if quiet_core:
        # Before anything takes time: not every system can.
        allowed_cores()
    if predictions is None:
        if calibration is None:
            raise UsageError("there is no calibration", hint="moeprof calibrate -o FILE")
        predictions = make_predictions(trace, calibration, settings, options)
    elif settings is not None or options is not None:
        raise UsageError("settings and options are those of the predictions")
    names = predictions.settings if only is None else tuple(only)
    unknown = [name for name in names if name not in predictions.settings]
    if unknown:
        raise UsageError(
            f"{unknown[0]} is not among the predictions",
            hint=f"one of {', '.join(predictions.settings)}",
        )
    begun_s = time.perf_counter()
    chosen = predictions.options
    question = chosen.question(trace)
    version = predictions.facts.get("calibration_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"the predictions are of a calibration of version {version}, this moeprof runs what "
            f"version {SCHEMA_VERSION} measures",
            hint="calibrate again, then predict: moeprof calibrate -o FILE",
        )
    if predictions.facts["num_lookups"] != question.routed.num_lookups:
        raise TraceError(f"the predictions are not of {trace.path}", hint="give their trace")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stack = open_stack(
        trace,
        stack=question.routed.sites[0].stack,
        device=target,
        shape=chosen.shape,
        dtype=question.shape.dtype,
        weights=weights,
        max_steps=chosen.max_steps,
        share_host=share_host,
    )
    try:
        if stack.shape.expert_bytes != predictions.shape.expert_bytes:
            raise UsageError(
                f"experts of {stack.shape.expert_bytes} bytes run here, predicted were "
                f"{predictions.shape.expert_bytes}",
                hint="say the shape of the experts, for both",
            )
        left_s = None if most_s is None else most_s - (time.perf_counter() - begun_s)
        measure = functools.partial(
            _measured, stack, names, chosen, question.judged, left_s, progress
        )
        if quiet_core:
            with QuietCore() as quiet:
                found = measure(quiet.settle)
        else:
            found = measure(None)
    finally:
        stack.close()
    measured, late = found.measured, found.late
    rows = [row for row in predictions.rows if row["setting"] in measured]
    table = _table(rows, measured)
    visits = _visit_table(measured)
    num_steps = len(question.routed.steps)
    return Result(
        name=NAME,
        title="Predicted against measured",
        table=table,
        **_summary(table),
        notes=(
            f"measured on {hardware(target).device_name or hardware(target).cpu_name}, predicted "
            f"for {predictions.facts['calibrated_on']} as calibrated "
            f"{predictions.facts['calibrated']}",
            f"routing of {Path(trace.path).name} ({trace.model.name}), {stack.weights_source}",
            f"{len(question.judged)} of {num_steps} steps judged, each by its "
            "median over repetitions"
            + ("; the others without their copies" if len(question.judged) < num_steps else ""),
            f"{len(measured)} of {len(predictions.settings)} predicted settings run"
            + (f", no time for {', '.join(late)}" if late else ""),
            *_visit_notes(visits),
            *((QUIET_CORE_NOTE,) if quiet_core else ()),
            "versions: " + ", ".join(f"{name} {one}" for name, one in versions().items()),
        ),
        tables={"step_times": _step_table(measured, question), "visits": visits},
    )


def _measured(
    stack: RoutedStack,
    names: Sequence[str],
    options: VerifyOptions,
    judged: NDArray[np.int64],
    most_s: float | None,
    progress: Progress | None,
    settle: Callable[[], float] | None,
) -> Rounds:
    """Runs settings in rounds; times are of the judged steps."""
    resident = ResidentExperts()
    prepared: dict[str, PreparedCaches] = {}

    def opened(name: str) -> SettingRun:
        return SettingRun(
            stack,
            parse_setting(name),
            resident=resident,
            judged=judged.tolist(),
            prepared=prepared,
        )

    def spread(visited: Visited) -> float:
        times, visits = visited.of_steps(judged).times_ms, visited.visit_of
        return max(spreads_of(times, PERCENTILES, visits))

    limits = RoundLimits(
        rounds=options.rounds,
        repetitions=options.repetitions,
        most_repetitions=options.most_repetitions,
        tolerance=TOLERANCE,
        most_s=most_s,
    )
    _open_libraries(stack)
    try:
        found = run_in_rounds(
            names, opened, limits, spread=spread, settle=settle, progress=progress
        )
    finally:
        resident.let_go()
    of_judged = {
        name: None if visited is None else visited.of_steps(judged)
        for name, visited in found.measured.items()
    }
    return dataclasses.replace(found, measured=of_judged)


@torch.no_grad()
def _open_libraries(stack: RoutedStack) -> None:
    """Has libraries take the memory that they keep.

    A first product in some later visit would cut it out of the tens of GiB that torch keeps
    between visits. These could then neither be had whole by a setting nor be given back.
    """
    # A few rows will do: all of them by all of them may be larger than the device.
    rows = stack.hidden[:_LIBRARY_ROWS]
    with made_current(stack.device):
        rows @ rows.T


def _table(
    rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Visited | None]
) -> pd.DataFrame:
    found = []
    for row in rows:
        visited = measured[row["setting"]]
        own: dict[str, Any] = {
            **row,
            "measured_ms": None,
            "raw_ms": None,
            "measured_spread": None,
            "repetitions": 0,
            "error": None,
            "inside": None,
            "naive_bandwidth_error": None,
            "naive_mean_error": None,
        }
        if visited is not None:
            times = visited.times_ms
            value = measured_ms(times, row["percentile"])
            low, high = row["low_ms"], row["high_ms"]
            own |= {
                "measured_ms": value,
                "raw_ms": float(np.percentile(times, row["percentile"])),
                "measured_spread": spread_of(times, row["percentile"], visited.visit_of),
                "repetitions": len(times),
                "error": row["predicted_ms"] / value - 1,
                "inside": None if low is None else bool(low <= value <= high),
                "naive_bandwidth_error": row["naive_bandwidth_ms"] / value - 1,
                "naive_mean_error": row["naive_mean_ms"] / value - 1,
            }
        found.append(own)
    return pd.DataFrame(found)


def _step_table(measured: Mapping[str, Visited | None], question: Question) -> pd.DataFrame:
    """Returns every repetition of every judged step."""
    frames = []
    steps = question.routed.steps[question.judged]
    for name, visited in measured.items():
        if visited is not None:
            times = visited.times_ms
            frames.append(
                pd.DataFrame(
                    {
                        "setting": name,
                        "repetition": np.repeat(np.arange(len(times)), len(steps)),
                        "round": np.repeat(visited.round_of, len(steps)),
                        "step": np.tile(steps, len(times)),
                        "measured_ms": times.ravel(),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _visit_table(measured: Mapping[str, Visited | None]) -> pd.DataFrame:
    """Returns every visit of every setting."""
    rows = [
        {
            "setting": name,
            "round": visit.round,
            "begun_s": visit.begun_s,
            "probe_ms": visit.probe_ms,
            "repetitions": len(visit.times_ms),
        }
        for name, visited in measured.items()
        for visit in (() if visited is None else visited.visits)
    ]
    return pd.DataFrame(rows, columns=list(_VISIT_COLUMNS))


def _visit_notes(visits: pd.DataFrame) -> tuple[str, ...]:
    """Returns how settings were visited, and how fast the host was meanwhile."""
    if visits.empty:
        return ()
    each = visits.groupby("setting")["round"].count()
    middle, low, high = np.percentile(visits["probe_ms"], (50, 5, 95)).tolist()
    return (
        f"{len(visits)} visits in {visits['round'].max()} rounds, {each.min()} to {each.max()} of "
        "each setting",
        f"host probe: median {middle:.2f} ms, 5-95 % {low:.2f}-{high:.2f}",
    )


def regrets(table: pd.DataFrame) -> pd.DataFrame:
    """Returns what it costs to take the setting that the model recommends.

    Settings compete at equal memory and for one percentile; recommended is the least predicted.

    Args:
        table: As `verify` returns it.

    Returns:
        Columns percentile, device_bytes, recommended, best, regret (recommended over best, both
        measured, less 1), settings; one row where at least two were measured.
    """
    found = []
    known = table.dropna(subset=["measured_ms"])
    for (percentile, size), group in known.groupby(["percentile", "device_bytes"]):
        if len(group) < 2:  # noqa: PLR2004
            continue
        taken = group.iloc[int(np.argmin(group["predicted_ms"].to_numpy(float)))]
        best = group.iloc[int(np.argmin(group["measured_ms"].to_numpy(float)))]
        found.append(
            {
                "percentile": percentile,
                "device_bytes": size,
                "recommended": taken["setting"],
                "best": best["setting"],
                "regret": taken["measured_ms"] / best["measured_ms"] - 1,
                "settings": len(group),
            }
        )
    columns = ["percentile", "device_bytes", "recommended", "best", "regret", "settings"]
    return pd.DataFrame(found, columns=columns)


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the exact (Clopper-Pearson) 90 % interval of a share."""

    def at_least(share: float, count: int) -> float:
        return math.fsum(
            math.comb(trials, n) * share**n * (1 - share) ** (trials - n)
            for n in range(count, trials + 1)
        )

    def solved(count: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, count) < wanted else (low, middle)
        return (low + high) / 2

    least = 0.0 if successes == 0 else solved(successes, _TAIL)
    most = 1.0 if successes == trials else solved(successes + 1, 1 - _TAIL)
    return least, most


def _summary(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the metrics and what they say."""
    if table.empty:
        return {"metrics": (), "findings": (_finding("Nothing was run."),)}
    known = table.dropna(subset=["measured_ms"])
    if known.empty:
        return {"metrics": (), "findings": (_finding("Nothing fitted into the device's memory."),)}
    errors = {
        name: float(known[column].astype(float).abs().median())
        for name, column in (
            ("model", "error"),
            ("bytes over bandwidth", "naive_bandwidth_error"),
            ("mean", "naive_mean_error"),
        )
    }
    metrics = [
        _metric(f"verification/median error/{name}", value) for name, value in errors.items()
    ]
    findings = [
        _finding(
            f"Over {len(known)} predictions the model is off by {errors['model']:.1%} (median), "
            f"bytes over bandwidth by {errors['bytes over bandwidth']:.1%}, the mean by "
            f"{errors['mean']:.1%}."
        )
    ]
    stated = known.dropna(subset=["inside"])
    if len(stated):
        inside = int(stated["inside"].astype(bool).sum())
        low, high = binomial_interval(inside, len(stated))
        metrics.append(
            _metric("verification/coverage", inside / len(stated), low, high, better=None)
        )
        findings.append(
            _finding(
                f"{inside} of {len(stated)} measurements lie in their stated 90 % interval: "
                f"{inside / len(stated):.1%} ({low:.1%} to {high:.1%})."
            )
        )
    found = regrets(table)
    if len(found):
        median, worst = float(found["regret"].median()), float(found["regret"].max())
        metrics += [
            _metric("verification/regret/median", median),
            _metric("verification/regret/worst", worst),
        ]
        findings.append(
            _finding(
                f"Taking what the model recommends at equal memory costs {median:.1%} (median of "
                f"{len(found)} choices) and at worst {worst:.1%} over the best measured."
            )
        )
    rough = known[known["measured_spread"].astype(float) > TOLERANCE]
    if len(rough):
        findings.append(
            _finding(f"{len(rough)} of {len(known)} are not measured to {TOLERANCE:.0%}.")
        )
    left_out = table[table["measured_ms"].isna()]["setting"].unique()
    if len(left_out):
        findings.append(_finding(f"No room on the device for {', '.join(left_out)}."))
    return {"metrics": tuple(metrics), "findings": tuple(findings)}


def _metric(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    better: Any = "lower",
) -> Metric:
    return Metric(
        name=name,
        value=value,
        unit="share",
        figure_class="measured",
        low=low,
        high=high,
        better=better,
    )


def _finding(text: str) -> Finding:
    return Finding(text=text, severity=SEVERITY_FACT, section=NAME)
