"""Predictions and verifications as JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moeprof.errors import TraceError
from moeprof.live.rounds import Visit, Visited
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verification_options import (
    NAME,
    QUIET_CORE_NOTE,
    Predictions,
    VerifyOptions,
)
from moeprof.recording.hardware import hardware, versions
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.json_files import write_json

if TYPE_CHECKING:
    from moeprof.replay.result import Result

PREDICTIONS_KIND = "moeprof predictions"
PREDICTIONS_VERSION = 1
VERIFICATION_KIND = f"moeprof {NAME}"


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
        "hardware": asdict(hardware("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(),
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
        steps: The judged steps.
        machine: Name of the device, or of the processor.
        is_watched: Steps were set aside while the core was slow.
        runs: Command, date, hardware and versions of it and of those that it added to, in order.
    """

    rows: tuple[Mapping[str, Any], ...]
    visited: Mapping[str, Visited]
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
        times = content["step_times"]
        steps = {tuple(one["steps"]) for one in times.values()}
        if len(steps) != 1:
            raise ValueError(f"{len(steps)} kinds of steps")
        hardware_of = content["hardware"]
        return EarlierRun(
            rows=tuple(content["rows"]),
            visited={name: _visited(one) for name, one in times.items()},
            steps=steps.pop(),
            machine=str(hardware_of["device_name"] or hardware_of["cpu_name"]),
            is_watched=QUIET_CORE_NOTE in content["notes"],
            runs=(
                *content.get("earlier_runs", ()),
                {name: content[name] for name in ("command", "date", "hardware", "versions")},
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} is damaged: {error!r}", hint=hint) from None


def _visited(times: Mapping[str, Any]) -> Visited:
    """Returns the visits of a setting as a file has them."""
    found = repetitions_of(times)
    if found.visit_of is None:
        raise ValueError("no visits")
    return Visited(
        visits=tuple(
            Visit(
                round=each["round"],
                begun_s=each["begun_s"],
                probe_ms=each["probe_ms"],
                times_ms=found.times_ms[found.visit_of == number],
                is_quiet=found.is_quiet[found.visit_of == number],
            )
            for number, each in enumerate(times["visits"])
        )
    )


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


def _read(path: str | os.PathLike[str], kind: str, what: str, hint: str) -> dict[str, Any]:
    """Returns a file of a kind.

    Raises:
        TraceError: It is missing, no JSON or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TraceError(f"{path} cannot be read as {what}: {error}", hint=hint) from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise TraceError(f"{path} holds no {what}", hint=hint)
    return content
