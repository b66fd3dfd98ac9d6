"""What every GPU result says about where and how it was measured."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moeprof
from moeprof.recording.hardware import hardware, versions


def evidence(command: str, device: torch.device | str) -> dict[str, Any]:
    """Returns the device, driver, versions, date and code of a measurement made by ``command``."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware(torch.device(device))),
        "versions": {**versions(), "python": sys.version.split()[0]},
        "source_sha256": source_digest(Path(moeprof.__file__).parent / "live"),
    }


def source_digest(folder: Path) -> str:
    """Returns a digest of the Python files below ``folder``: which code was measured.

    A version says little between releases, and a measured tree may not be a commit.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes ``result`` beside ``path``, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
