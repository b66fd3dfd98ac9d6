"""Holds predictions to measurements: every setting of a trace predicted, run, and compared.

A setting's step takes the median over its repetitions: what the machine does besides is no property
of the setting, and hits other steps in every repetition. Percentiles are taken over these medians,
of predictions (`moeprof.replay.cost_model`) and measurements alike; those of all repetitions of all
steps together stand beside them (``raw_ms``). Settings are repeated in rounds over the whole run
(`moeprof.live.rounds`), so that a slow stretch of the machine is not one setting's, until bootstrap
draws of their visits say that both percentiles are known somewhat better than to `TOLERANCE`. Steps
that are not judged run without their copies (`moeprof.live.setting_runs.SettingRun`).

Predictions can be written to a file before anything is measured, and read back to be judged
(`moeprof.live.verification_files`); `moeprof.live.verdicts` says what the table comes to.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from moeprof.errors import TraceError, UsageError
from moeprof.live.cache_plans import PreparedCaches
from moeprof.live.core_binding import QuietCore, Unwatched, Watch, allowed_cores
from moeprof.live.rounds import RoundLimits, Rounds, Visited, run_in_rounds
from moeprof.live.setting_runs import ResidentExperts, RoutedStack, SettingRun, open_stack
from moeprof.live.source_digest import code_digest
from moeprof.live.step_percentiles import RepeatedSteps
from moeprof.live.transfers import made_current
from moeprof.live.verdicts import summary
from moeprof.live.verification_options import (
    NAME,
    QUIET_CORE_NOTE,
    TOLERANCE,
    Predictions,
    VerifyOptions,
)
from moeprof.live.watched_steps import StepTimes
from moeprof.recording.hardware import hardware, versions
from moeprof.replay.calibration_file import SCHEMA_VERSION
from moeprof.replay.cost_model import PERCENTILES, Question, predict, prediction_rows
from moeprof.replay.result import Result
from moeprof.replay.serving_settings import (
    BufferingSetting,
    GatingSetting,
    Setting,
    parse_setting,
)

if TYPE_CHECKING:
    from moeprof.live.verification_files import EarlierRun
    from moeprof.replay.calibration_file import Calibration
    from moeprof.trace.reader import Trace

Progress = Callable[[str, int, int], None]

DEFAULT_POLICIES = ("lru", "lfu", "paper", "min")
DEFAULT_CAPACITIES = ("12.5%", "25%", "50%", "75%")
DEFAULT_AHEAD = (("25%", 2), ("12.5%", 4))

_LIBRARY_ROWS = 16
# Settings are visited until they are known somewhat better than is asked: who stops at the first
# visit that says so stops on a lucky one.
_MARGIN = 0.9
# So many draws tell who is not known, but for a sixth; all of them take as long as a short visit.
_FEW_DRAWS, _FAR = 200, 1.15
_VISIT_COLUMNS = ("setting", "round", "begun_s", "probe_ms", "repetitions")


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
        UsageError: A setting cannot be predicted, its name does not say how to run it, or it is
            given twice.
    """
    chosen = list(default_settings(calibration) if settings is None else settings)
    if not chosen:
        raise UsageError("there is nothing to predict", hint="name a setting, as in lru:32")
    _check_once([setting.name for setting in chosen])
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


def _check_once(names: Sequence[str]) -> None:
    """Refuses a setting that is named twice: it would count twice in all that is said of them."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is given twice", hint="name every setting once")


def _whose_trials(calibration: Calibration) -> dict[str, str]:
    """Returns whose trials correct the constants, where they are another machine's."""
    source = calibration.trials_of
    return {} if source is None else {"trials_on": source.machine, "trials_date": source.date}


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
    most_repetitions: int | None = None,
    most_s: float | None = None,
    quiet_core: bool = False,
    earlier: EarlierRun | None = None,
    keep: Callable[[Result], object] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Predicts settings, runs them on this machine, and says how far off the predictions were.

    The table has one row per setting and percentile: ``predicted_ms`` with its stated interval,
    ``measured_ms`` (of the steps' medians over repetitions, without what was set aside) with the
    half width of its own 90 % interval over visits and repetitions (``measured_spread``),
    ``raw_ms`` (of all repetitions, what was set aside included),
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
        most_repetitions: Of each setting, in this run; as the options have it when None.
        most_s: About so many seconds are taken. Where they are few settings are repeated less, then
            visited in fewer rounds, and only then left out.
        quiet_core: Keep the calling thread on a core that is quiet (`moeprof.live.core_binding`)
            and set steps aside during which it was not (`moeprof.live.watched_steps`). Machines
            should be calibrated likewise.
        earlier: A run of the same predictions on such a machine, which visits are added to: of
            those settings that it does not know somewhat better than to `TOLERANCE`. All that it
            measured is in the result, of settings that are not run now as well.
        keep: Called with what was measured before it is judged: the rows as they were predicted,
            and every step. What fails afterwards loses nothing.
        progress: Called with (setting and round, visits done, visits planned).

    Raises:
        UsageError: An argument makes no sense.
        TraceError: The predictions are not of this trace, or the earlier run is of others.
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
    _check_once(names)
    unknown = [name for name in names if name not in predictions.settings]
    if unknown:
        raise UsageError(
            f"{unknown[0]} is not among the predictions",
            hint=f"one of {', '.join(predictions.settings)}",
        )
    begun_s = time.perf_counter()
    chosen = predictions.options
    if most_repetitions is not None:
        chosen = replace(chosen, most_repetitions=most_repetitions)
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
    machine = hardware(target)
    # The code that is loaded, whatever becomes of its files until the result is written.
    code_digest()
    here = str(machine.device_name or machine.cpu_name)
    if earlier is not None:
        _check_earlier(earlier, predictions, question, here, is_watched=quiet_core)
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
            _measured,
            stack,
            names,
            chosen,
            question.judged,
            left_s,
            progress,
            earlier={} if earlier is None else earlier.visited,
        )
        if quiet_core:
            with QuietCore() as quiet:
                found = measure(quiet)
        else:
            found = measure(Unwatched())
    finally:
        stack.close()
    measured = _in_order(predictions.settings, found.measured, earlier)
    rows = [row for row in predictions.rows if row["setting"] in measured]
    num_steps = len(question.routed.steps)
    late = [name for name in found.late if name not in measured]
    ran = (
        f"measured on {here}, predicted for {predictions.facts['calibrated_on']} as calibrated "
        f"{predictions.facts['calibrated']}",
        f"routing of {Path(trace.path).name} ({trace.model.name}), {stack.weights_source}",
        f"{len(question.judged)} of {num_steps} steps judged, each by its "
        "median over repetitions"
        + ("; the others without their copies" if len(question.judged) < num_steps else ""),
        f"{len(measured)} of {len(predictions.settings)} predicted settings run"
        + (f", no time for {', '.join(late)}" if late else ""),
    )
    added = (
        *(
            ()
            if earlier is None
            else (f"visits were added to those of a run of {earlier.runs[-1]['date']}",)
        ),
        "versions: " + ", ".join(f"{name} {one}" for name, one in versions().items()),
    )
    tables = {
        "step_times": _step_table(measured, question),
        "visits": _visit_table(measured),
        "hardware": pd.DataFrame([asdict(machine)], dtype=object),
    }
    if keep is not None:
        keep(
            Result(
                name=NAME,
                title="Measured, not judged",
                table=pd.DataFrame(rows),
                notes=(*ran, *((QUIET_CORE_NOTE,) if quiet_core else ()), *added),
                tables=tables,
            )
        )
    table = _table(rows, measured)
    return Result(
        name=NAME,
        title="Predicted against measured",
        table=table,
        **summary(table),
        notes=(
            *ran,
            *_visit_notes(tables["visits"]),
            *(_quiet_notes(measured) if quiet_core else ()),
            *added,
        ),
        tables=tables,
    )


def _in_order(
    settings: Sequence[str], measured: Mapping[str, Visited | None], earlier: EarlierRun | None
) -> dict[str, Visited | None]:
    """Returns what was measured, in an earlier run as well, in the order of the predictions."""
    known = {} if earlier is None else dict.fromkeys(earlier.without_room)
    known |= measured
    return {name: known[name] for name in settings if name in known}


def _measured(
    stack: RoutedStack,
    names: Sequence[str],
    options: VerifyOptions,
    judged: NDArray[np.int64],
    most_s: float | None,
    progress: Progress | None,
    watch: Watch,
    *,
    earlier: Mapping[str, Visited],
) -> Rounds:
    """Runs settings in rounds; times are of the judged steps."""
    resident = ResidentExperts()
    prepared: dict[str, PreparedCaches] = {}

    def opened(name: str) -> _JudgedSteps:
        run = SettingRun(
            stack,
            parse_setting(name),
            resident=resident,
            judged=judged.tolist(),
            prepared=prepared,
        )
        return _JudgedSteps(run=run, judged=judged.tolist(), watch=watch)

    limits = RoundLimits(
        rounds=options.rounds,
        repetitions=options.repetitions,
        most_repetitions=options.most_repetitions,
        tolerance=_MARGIN * TOLERANCE,
        most_s=most_s,
    )
    _open_libraries(stack)
    try:
        return run_in_rounds(
            names,
            opened,
            limits,
            spread=lambda visited: how_well_known(visited.repeated),
            settle=watch.settle,
            earlier=earlier,
            progress=progress,
        )
    finally:
        resident.let_go()


def how_well_known(repeated: RepeatedSteps) -> float:
    """Returns the half width of the worse known percentile, over it; roughly where it is not known.

    Whoever is visited is asked after each visit, so that few draws must do until it may be the
    last.
    """
    rough = max(repeated.spreads(PERCENTILES, num_draws=_FEW_DRAWS))
    if rough > _FAR * _MARGIN * TOLERANCE:
        return rough
    return max(repeated.spreads(PERCENTILES))


@dataclass(frozen=True, kw_only=True)
class _JudgedSteps:
    """A run of which only the judged steps are told."""

    run: SettingRun
    judged: Sequence[int]
    watch: Watch

    def warm_up(self, *, is_whole: bool) -> None:
        self.run.warm_up(is_whole=is_whole)

    def repeat(self) -> StepTimes:
        found = self.run.repeat(self.watch)
        return StepTimes(
            times_ms=tuple(found.times_ms[step] for step in self.judged),
            is_quiet=tuple(found.is_quiet[step] for step in self.judged),
        )

    def close(self, *, keep_memory: bool) -> None:
        self.run.close(keep_memory=keep_memory)


def _check_earlier(
    earlier: EarlierRun,
    predictions: Predictions,
    question: Question,
    here: str,
    *,
    is_watched: bool,
) -> None:
    """Refuses to add visits to a run of other predictions, other steps or on another machine.

    Raises:
        TraceError: It is one.
    """
    predicted = {(row["setting"], row["percentile"]): row for row in predictions.rows}
    told = ("predicted_ms", "low_ms", "high_ms")
    for row in earlier.rows:
        own = predicted.get((row["setting"], row["percentile"]))
        if own is None or any(not _is_close(row[name], own[name]) for name in told):
            raise TraceError(
                f"the earlier run judges another prediction of {row['setting']}",
                hint="give the predictions that it was run with",
            )
    if earlier.steps != tuple(question.routed.steps[question.judged].tolist()):
        raise TraceError(
            "the earlier run has other steps", hint="give the trace that it was run with"
        )
    if earlier.machine != here:
        raise TraceError(
            f"the earlier run was on {earlier.machine}, this is {here}",
            hint="visits are added on the same kind of machine; leave out --continue",
        )
    if earlier.is_watched != is_watched:
        raise TraceError(
            "one of the runs sets steps aside while the core is slow, the other does not",
            hint="run as the earlier run did, with or without --quiet-core, or start anew where an "
            "earlier moeprof ran it, which set nothing aside",
        )


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    # Files have twelve digits.
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


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
    asked = sorted({row["percentile"] for row in rows})
    spreads = {
        name: dict(zip(asked, visited.repeated.spreads(asked), strict=True))
        for name, visited in measured.items()
        if visited is not None
    }
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
            times = visited.repeated
            value = times.percentile_ms(row["percentile"])
            low, high = row["low_ms"], row["high_ms"]
            own |= {
                "measured_ms": value,
                "raw_ms": times.raw_ms(row["percentile"]),
                "measured_spread": spreads[row["setting"]][row["percentile"]],
                "repetitions": len(times.times_ms),
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
                        "is_quiet": visited.repeated.is_quiet.ravel(),
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


def _quiet_notes(measured: Mapping[str, Visited | None]) -> tuple[str, ...]:
    """Returns that, and how much, was set aside, and what could not be."""
    every = [visited.repeated for visited in measured.values() if visited is not None]
    size = sum(one.times_ms.size for one in every)
    aside = sum(one.num_aside for one in every)
    never = [one.num_never_quiet for one in every if one.num_never_quiet]
    return (
        QUIET_CORE_NOTE,
        *((f"{aside / size:.1%} of all times were set aside",) if size else ()),
        *(
            (
                f"{sum(never)} steps of {len(never)} settings were never found quiet: all their "
                "times count",
            )
            if never
            else ()
        ),
    )


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
