"""Predictions and verifications as JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprof.errors import MoeprofError, TraceError
from moeprof.live.verification_options import NAME, Predictions, VerifyOptions
from moeprof.recording.hardware import hardware, versions
from moeprof.replay.expert_shapes import ExpertShape

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
    return _write_json(content, Path(path), force=force)


def write_verification(
    result: Result, path: str | os.PathLike[str], *, command: str, force: bool = False
) -> Path:
    """Writes what `moeprof.live.verify` returned, every repetition of every step included.

    Under ``step_times`` every setting has its ``steps``, the times ``measured_ms`` [repetitions]
    [steps], the round of each repetition (``rounds``) and its ``visits`` in order: round, seconds
    since the first visit began, the host's probe in milliseconds, and repetitions.

    Args:
        result: From `moeprof.live.verify`.
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
        "kind": VERIFICATION_KIND,
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
