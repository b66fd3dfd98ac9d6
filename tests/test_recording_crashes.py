"""Whatever ends a recording, what was committed is whole."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from recording_plain import OddExperts, OddModel  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.recording.steps import build_unit  # noqa: E402
from moeprof.trace import files  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402

TESTS = Path(__file__).parent
FLUSH_S = 1.0

SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
import moeprof
from recording_plain import OddExperts, OddModel
moeprof.register(OddExperts, ids="which", weights="how_much")
model = OddModel()
ids = torch.randint(0, 50, (4, 8))
with torch.no_grad(), moeprof.record(model, sys.argv[1], flush_interval_s=float(sys.argv[2])):
    for step in range(100000):
        model(ids)
        print(step, flush=True)
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeprof.recording import sites

    monkeypatch.setattr(sites, "_REGISTERED", {})
    moeprof.register(OddExperts, ids="which", weights="how_much")


def _start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(FLUSH_S)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}


def _run_for(process: subprocess.Popen[str], seconds: float) -> list[tuple[int, float]]:
    """Returns (step, time it was reported) until ``seconds`` after the first."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        now = time.monotonic()
        seen.append((int(line), now))
        if now - seen[0][1] > seconds:
            break
    return seen


def _check_whole(path: Path) -> Any:
    trace: Any = moeprof.open(path)
    assert not trace.complete
    result = check(trace)
    assert result.ok, result.problems
    assert result.codes >= {"incomplete"}
    assert trace.steps["step"].tolist() == list(range(len(trace.steps)))
    rows = trace.routing(columns=["step", "site", "slot"])
    assert len(rows) == len(trace.steps) * 32 * len(trace.sites) * 2
    assert sorted(trace.layers["step"].unique()) == trace.steps["step"].tolist()
    return trace


def test_kill_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "t.moeprof"
    process = _start(path)
    seen = _run_for(process, 3.2 * FLUSH_S)
    killed = time.monotonic()
    process.kill()
    process.communicate()
    trace = _check_whole(path)
    # What was finished one flush interval before, and a moment for the flush itself, is there.
    due = [step for step, reported in seen if reported < killed - FLUSH_S - 0.5]
    assert len(due) > 10
    assert len(trace.steps) > max(due)
    # Another recording can take its place.
    with torch.no_grad(), moeprof.record(OddModel(), path, force=True) as recorder:
        recorder.model(torch.zeros(1, 2, dtype=torch.int64))
    assert moeprof.open(path).complete


def test_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "t.moeprof"
    process = _start(path)
    seen = _run_for(process, 0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    trace = _check_whole(path)
    # All of it: an interrupt leaves time to write.
    assert len(trace.steps) >= len(seen)


def test_an_interrupt_tears_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives while a step is translated, and takes effect once the step is written."""
    model, ids = OddModel(), torch.zeros(4, 8, dtype=torch.int64)
    count = [0]

    def interrupted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return build_unit(*args)

    monkeypatch.setattr("moeprof.recording.recorder.build_unit", interrupted)
    path = tmp_path / "t.moeprof"
    with (
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        moeprof.record(model, path, flush_interval_s=60.0) as recorder,
    ):
        for _ in range(5):
            model(ids)
        recorder._drain()
        raise AssertionError("the interrupt came to nothing")
    trace: Any = moeprof.open(path)
    assert trace.steps["step"].tolist() == [0, 1, 2, 3, 4]
    assert not trace.complete
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_pause_is_used_to_commit(tmp_path: Path) -> None:
    """Nothing runs, and what ran before is on the disk within the interval."""
    model, path = OddModel(), tmp_path / "t.moeprof"
    with torch.no_grad(), moeprof.record(model, path, flush_interval_s=0.5) as recorder:
        model(torch.randint(0, 50, (4, 8)))
        deadline = time.monotonic() + 20
        while recorder.num_committed_steps == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert recorder.num_committed_steps == 1
        assert len(moeprof.open(path).steps) == 1
        assert not moeprof.open(path).complete
        model(torch.randint(0, 50, (4, 8)))
    assert len(moeprof.open(path).steps) == 2


class _Disk:
    """Fills up after a number of files."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._put = files.put_in_place

    def put_in_place(self, path: Path) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._put(path)


def test_a_disk_that_fills_up_while_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = OddModel(), tmp_path / "t.moeprof"
    disk = _Disk(10_000)
    monkeypatch.setattr(files, "put_in_place", disk.put_in_place)
    ids = torch.randint(0, 50, (4, 8))
    with (
        pytest.raises(MoeprofError, match="disk is full") as caught,
        torch.no_grad(),
        moeprof.record(model, path, flush_interval_s=0.0) as recorder,
    ):
        for _ in range(3):
            model(ids)
        assert recorder.num_committed_steps == 3
        disk.room = 0
        for _ in range(10):
            model(ids)
    assert "3 committed steps are safe" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    trace: Any = moeprof.open(path)
    assert len(trace.steps) == 3
    assert check(trace).ok
    model(ids)  # The model itself is none the worse.


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = OddModel(), tmp_path / "t.moeprof"
    disk = _Disk(10_000)
    monkeypatch.setattr(files, "put_in_place", disk.put_in_place)
    with (
        pytest.raises(MoeprofError, match="disk is full") as caught,
        torch.no_grad(),
        moeprof.record(model, path, flush_interval_s=60.0) as recorder,
    ):
        model(torch.randint(0, 50, (4, 8)))
        recorder._drain()
        model(torch.randint(0, 50, (4, 8)))
        disk.room = 0
    assert "1 committed steps are safe" in caught.value.message
    assert len(moeprof.open(path).steps) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model = OddModel()
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(MoeprofError, match="cannot write") as caught,
        torch.no_grad(),
        moeprof.record(model, tmp_path / "file" / "t.moeprof"),
    ):
        model(torch.randint(0, 50, (4, 8)))
    assert caught.value.hint
