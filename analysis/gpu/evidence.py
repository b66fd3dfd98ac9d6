"""What every GPU result says about where and how it was measured."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moeprof.live.source_digest import code_digest
from moeprof.recording.hardware import hardware, versions


def evidence(command: str, device: torch.device | str) -> dict[str, Any]:
    """Returns the device, driver, versions, date and code of a measurement made by ``command``."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware(torch.device(device))),
        "versions": {**versions(), "python": sys.version.split()[0]},
        "source_sha256": code_digest(),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes ``result`` beside ``path``, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
