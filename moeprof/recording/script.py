"""`moeprof record -- PROGRAM`: runs a program of the user's and records the MoE model in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeprof.errors import CaptureError, MoeprofError
from moeprof.recording.attachment import command_of, environment
from moeprof.recording.summary import recording_lines
from moeprof.trace.reader import open_trace


def record_script(
    argv: Sequence[str],
    output: str,
    *,
    force: bool = False,
    fixes: Sequence[str] = (),
    scores: bool = False,
) -> int:
    """Runs a program and records the first MoE model that runs in it.

    Args:
        argv: The program and its arguments, such as ``["python", "script.py"]``.
        output: Path of the trace.
        force: Replace an existing trace.
        fixes: Names of fixes applied to the model.
        scores: Store affinities of the selected experts.

    Returns:
        The program's exit code.

    Raises:
        MoeprofError: The program cannot be started, or the trace not be written.
        CaptureError: No MoE model ran in it.
    """
    with tempfile.TemporaryDirectory(prefix="moeprof-") as folder:
        status_path = Path(folder) / "status.json"
        settings = {
            "output": str(Path(output).resolve()),
            "force": force,
            "fixes": [fix for fix in fixes if fix != "none"],
            "scores": scores,
            "command": command_of(argv),
            "status": str(status_path),
        }
        code = _run(argv, environment(settings, dict(os.environ)))
        status = {}
        if status_path.exists():
            status = json.loads(status_path.read_text(encoding="utf-8"))
    _judge(status, code, argv, output)
    if code == 0:
        for line in recording_lines(output):
            print(line, file=sys.stderr)
    return code


def _judge(status: Mapping[str, Any], code: int, argv: Sequence[str], output: str) -> None:
    """Raises what went wrong with the recording; says what became of a program that failed."""
    if "error" in status and code in (0, status["exit_code"]):
        raise MoeprofError(status["error"], hint=status["hint"], exit_code=status["exit_code"])
    if code != 0:
        kept = _state_of(output) if "attached" in status or "error" in status else ""
        print(f"the program ended with exit code {code}{kept}", file=sys.stderr)
    elif "attached" not in status:
        raise CaptureError(
            f"no Mixture-of-Experts model ran in: {' '.join(argv)}",
            hint="the program must be Python and run a MoE model in its own process, eagerly; "
            "for a module of your own call moeprof.register in the program",
        )
    elif not status["finished"]:
        raise CaptureError(
            f"the program left without ending its recording{_state_of(output)}",
            hint="os._exit and exec leave no time to write; let the program end by itself",
        )
    elif status["others"]:
        print(
            f"recorded the first MoE model only, a {status['attached']}; not recorded: "
            f"{', '.join(status['others'])}",
            file=sys.stderr,
        )


def _state_of(output: str) -> str:
    if not Path(output).exists():
        return "; nothing was recorded"
    complete = open_trace(output).complete
    return f"; what was recorded is in {output}{'' if complete else ', marked incomplete'}"


def _command(argv: Sequence[str]) -> list[str]:
    """Returns the command to start; ``python`` is this one where there is none on the path."""
    if argv[0] in ("python", "python3") and shutil.which(argv[0]) is None:
        return [sys.executable, *argv[1:]]
    return list(argv)


def _run(argv: Sequence[str], env: dict[str, str]) -> int:
    """Runs the program; an interrupt goes to it, and this process waits for its end."""
    try:
        process = subprocess.Popen(_command(argv), env=env)
    except OSError as error:
        raise MoeprofError(
            f"cannot start {argv[0]}: {(error.strerror or str(error)).lower()}",
            hint="write the program as you would start it, e.g. -- python my_script.py",
        ) from error
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue
    return 128 - code if code < 0 and -code in list(signal.Signals) else code
