"""Predictions and verifications as JSON files."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprof.errors import MoeprofError, TraceError, UsageError
from moeprof.live.rounds import Visit, Visited
from moeprof.live.source_digest import code_digest
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verification_options import (
    NAME,
    QUIET_CORE_NOTE,
    Predictions,
    VerifyOptions,
)
from moeprof.recording.hardware import versions
from moeprof.replay import json_values as checked
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.json_files import write_json
from moeprof.replay.serving_settings import parse_setting

if TYPE_CHECKING:
    from moeprof.replay.result import Result

PREDICTIONS_KIND = "moeprof predictions"
PREDICTIONS_VERSION = 1
VERIFICATION_KIND = f"moeprof {NAME}"

_MOST_PERCENTILE = 100
_OF_RUN = ("command", "date", "hardware", "versions")
SOURCE = "source_sha256"
"""Of the code that ran; files from before it was written lack it."""


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
    return write_json(content, path, force=force)


def write_verification(
    result: Result,
    path: str | os.PathLike[str],
    *,
    command: str,
    earlier: EarlierRun | None = None,
    force: bool = False,
) -> Path:
    """Writes what `moeprof.live.verify` returned, every repetition of every step included.

    Under ``step_times`` every setting has its ``steps``, the times ``measured_ms`` [repetitions]
    [steps], the places of those that were ``set_aside`` [repetitions], the round of each repetition
    (``rounds``) and its ``visits`` in order: round, seconds since the first visit of its run began,
    the host's probe in milliseconds, and repetitions.
    ``earlier_runs`` say where and when the first visits were made, where these were added to them.

    Args:
        result: From `moeprof.live.verify`.
        path: Where to.
        command: What was run.
        earlier: The run that this one added visits to.
        force: Replace an existing file.

    Raises:
        MoeprofError: The file exists.
    """
    steps, visits = result.tables["step_times"], result.tables["visits"]
    times = {
        str(name): {
            "steps": own["step"].unique().tolist(),
            "measured_ms": [run["measured_ms"].tolist() for _, run in own.groupby("repetition")],
            "set_aside": [
                np.flatnonzero(~run["is_quiet"].to_numpy()).tolist()
                for _, run in own.groupby("repetition")
            ],
            "rounds": own.groupby("repetition")["round"].first().tolist(),
            "visits": visits[visits["setting"] == name]
            .drop(columns="setting")
            .to_dict(orient="records"),
        }
        for name, own in (steps.groupby("setting", sort=False) if len(steps) else ())
    }
    content = {
        "kind": VERIFICATION_KIND,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": result.tables["hardware"].iloc[0].to_dict(),
        "versions": versions(),
        SOURCE: code_digest(),
        **({} if earlier is None else {"earlier_runs": list(earlier.runs)}),
        "notes": list(result.notes),
        "findings": [finding.text for finding in result.findings],
        "metrics": [asdict(metric) for metric in result.metrics],
        "rows": json.loads(result.table.to_json(orient="records", double_precision=12)),
        "step_times": times,
    }
    return write_json(content, path, force=force)


@dataclass(frozen=True, kw_only=True, eq=False)
class EarlierRun:
    """A verification that another run adds visits to.

    Attributes:
        rows: As they stand in its file.
        visited: Its visits by setting, times of the judged steps.
        without_room: Settings that the device's memory did not suffice for.
        steps: The judged steps.
        machine: Name of the device, or of the processor.
        is_watched: Steps were set aside while the core was slow.
        runs: Command, date, hardware and versions of it and of those that it added to, in order.
    """

    rows: tuple[Mapping[str, Any], ...]
    visited: Mapping[str, Visited]
    without_room: tuple[str, ...]
    steps: tuple[int, ...]
    machine: str
    is_watched: bool
    runs: tuple[Mapping[str, Any], ...]


def read_verification(path: str | os.PathLike[str]) -> EarlierRun:
    """Reads what `write_verification` wrote, to add visits to it.

    Raises:
        TraceError: The file is missing, damaged or something else.
    """
    hint = "give a file that moeprof verify -o wrote"
    content = _read(path, VERIFICATION_KIND, "verification", hint)
    try:
        return _earlier_run(content)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise TraceError(f"{path} is damaged: {_said(error)}", hint=hint) from None


def _earlier_run(content: Mapping[str, Any]) -> EarlierRun:
    rows = checked.listed(content["rows"], "rows")
    names = _settings_of(rows)
    times = checked.table(content["step_times"], "step_times")
    unknown = [name for name in times if name not in names]
    if unknown:
        raise ValueError(f"{unknown[0]} was measured and not predicted")
    notes = [checked.text(note, "notes") for note in checked.listed(content["notes"], "notes")]
    is_watched = QUIET_CORE_NOTE in notes
    if is_watched and any("set_aside" not in one for one in times.values()):
        raise ValueError("times were set aside, and it is not said which")
    for row in rows:
        # Where a run could not be judged no row says what was measured.
        if "measured_ms" in row and (row["measured_ms"] is None) == (row["setting"] in times):
            raise ValueError(f"{row['setting']} has a time and no steps, or steps and no time")
    steps = {
        tuple(checked.whole(step, "a step") for step in checked.listed(one["steps"], "steps"))
        for one in times.values()
    }
    if len(steps) != 1:
        raise ValueError(f"{len(steps)} kinds of steps")
    hardware_of = checked.table(content["hardware"], "hardware")
    runs = [
        *checked.listed(content.get("earlier_runs", []), "earlier_runs"),
        {
            **{name: content[name] for name in _OF_RUN},
            **({SOURCE: content[SOURCE]} if SOURCE in content else {}),
        },
    ]
    for run in runs:
        for name in _OF_RUN[:2]:
            checked.text(run[name], name)
    return EarlierRun(
        rows=tuple(rows),
        visited={name: _visited(one, name) for name, one in times.items()},
        without_room=tuple(name for name in names if name not in times),
        steps=steps.pop(),
        machine=str(hardware_of["device_name"] or hardware_of["cpu_name"]),
        is_watched=is_watched,
        runs=tuple(runs),
    )


def _visited(times: Mapping[str, Any], name: str) -> Visited:
    """Returns the visits of a setting as a file has them."""
    for run in checked.listed(times["measured_ms"], f"measured_ms of {name}"):
        for one in checked.listed(run, f"measured_ms of {name}"):
            checked.positive(one, f"a time of {name}")
    given = checked.listed(times.get("visits", []), f"visits of {name}")
    if not given:
        raise ValueError(f"{name} has no visits")
    for each in given:
        checked.whole(each["repetitions"], f"repetitions of a visit of {name}", least=1)
    found = repetitions_of(times)
    visits = [
        Visit(
            round=checked.whole(each["round"], f"round of a visit of {name}", least=1),
            begun_s=checked.not_negative(each["begun_s"], f"begun_s of a visit of {name}"),
            probe_ms=checked.positive(each["probe_ms"], f"probe_ms of a visit of {name}"),
            times_ms=found.times_ms[found.visit_of == number],
            is_quiet=found.is_quiet[found.visit_of == number],
        )
        for number, each in enumerate(given)
    ]
    if any(one.round >= other.round for one, other in itertools.pairwise(visits)):
        raise ValueError(f"the rounds of {name} do not ascend")
    return Visited(visits=tuple(visits))


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads predictions.

    Raises:
        TraceError: The file is missing, damaged or something else.
    """
    hint = "write them again: moeprof verify TRACE --calibration FILE --predict-only -o FILE"
    content = _read(path, PREDICTIONS_KIND, "predictions", hint)
    if content.get("schema_version") != PREDICTIONS_VERSION:
        raise TraceError(f"{path} has version {content.get('schema_version')}", hint=hint)
    try:
        return _predictions(content)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
        raise TraceError(f"{path} is damaged: {_said(error)}", hint=hint) from None


def _predictions(content: Mapping[str, Any]) -> Predictions:
    names = [
        checked.text(one, "settings") for one in checked.listed(content["settings"], "settings")
    ]
    rows = checked.listed(content["rows"], "rows")
    if _settings_of(rows) != names or not names:
        raise ValueError("its rows are not those of its settings, in their order")
    return Predictions(
        options=_options(content["options"]),
        settings=tuple(names),
        rows=tuple(rows),
        facts=_facts(content["facts"]),
    )


def _options(content: Any) -> VerifyOptions:
    given = dict(checked.table(content, "options"))
    for name in ("repetitions", "most_repetitions", "rounds", "seed"):
        if name in given:
            checked.whole(given[name], f"options.{name}")
    for name in ("stack", "dtype", "phase"):
        if given[name] is not None:
            checked.text(given[name], f"options.{name}")
    if given["max_steps"] is not None:
        checked.whole(given["max_steps"], "options.max_steps", least=1)
    if given["shape"] is not None:
        given["shape"] = _shape(given["shape"], "options.shape")
    return VerifyOptions(**given)


def _facts(content: Any) -> Mapping[str, Any]:
    """Returns where predictions come from, once all that is asked of it is there."""
    facts = checked.table(content, "facts")
    for name in ("trace", "model", "calibrated_on", "calibrated", "date"):
        checked.text(facts[name], f"facts.{name}")
    checked.whole(facts["num_lookups"], "facts.num_lookups", least=1)
    # Predictions from before there were versions do not say it.
    checked.whole(facts.get("calibration_version", 1), "facts.calibration_version", least=1)
    _shape(facts["shape"], "facts.shape")
    return facts


def _shape(content: Any, what: str) -> ExpertShape:
    given = checked.table(content, what)
    for name in ("d_model", "d_ff"):
        checked.whole(given[name], f"{what}.{name}", least=1)
    for name in ("gated", "bias"):
        checked.flag(given[name], f"{what}.{name}")
    checked.text(given["dtype"], f"{what}.dtype")
    return ExpertShape(**given)


def _settings_of(rows: Sequence[Any]) -> list[str]:
    """Returns the settings of rows in their order, once the rows are what predictions are made of.

    Raises:
        ValueError: A row lacks something, is no prediction, or is there twice, or not at all where
            other settings have it.
    """
    counts: Counter[tuple[str, int]] = Counter()
    for row in rows:
        given = checked.table(row, "a row")
        name = checked.text(given["setting"], "the setting of a row")
        percentile = checked.whole(given["percentile"], f"a percentile of {name}")
        if percentile > _MOST_PERCENTILE:
            raise ValueError(f"{name} has a percentile of {percentile}")
        counts[name, percentile] += 1
    settings = list(dict.fromkeys(name for name, _ in counts))
    percentiles = sorted({percentile for _, percentile in counts})
    for name, percentile in itertools.product(settings, percentiles):
        count = counts[name, percentile]
        if count != 1:
            raise ValueError(
                f"it lacks p{percentile} of {name}"
                if count == 0
                else f"it has {count} rows of {name} p{percentile}"
            )
    for name in settings:
        parse_setting(name)
    for row in rows:
        _check_prediction(row, f"of {row['setting']} p{row['percentile']}")
    return settings


def _check_prediction(row: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where a row says nothing that a measurement can be held to."""
    for name in ("predicted_ms", "naive_bandwidth_ms", "naive_mean_ms", "device_bytes"):
        checked.positive(row[name], f"{name} {what}")
    checked.not_negative(row["copied_bytes_per_step"], f"copied_bytes_per_step {what}")
    for name in ("hit_rate", "judged_hit_rate"):
        if row.get(name) is not None and not 0 <= checked.number(row[name], f"{name} {what}") <= 1:
            raise ValueError(f"{name} {what} is no share: {row[name]}")
    low, high = row["low_ms"], row["high_ms"]
    if low is None and high is None:
        # A calibration with few trials states no interval.
        return
    checked.positive(low, f"low_ms {what}")
    checked.positive(high, f"high_ms {what}")
    if not low <= row["predicted_ms"] <= high:
        raise ValueError(f"predicted_ms {what} is outside of its interval")


def _said(error: Exception) -> str:
    """Returns what is wrong with a file, in one line."""
    if isinstance(error, MoeprofError):
        return error.message
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _read(path: str | os.PathLike[str], kind: str, what: str, hint: str) -> dict[str, Any]:
    """Returns a file of a kind.

    Raises:
        TraceError: It is missing, no JSON or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(f"{path} cannot be read as {what}: {error}", hint=hint) from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise TraceError(f"{path} holds no {what}", hint=hint)
    return content
