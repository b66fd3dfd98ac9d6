"""Whatever happens while a trace is written, what was committed stays whole."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trace_faults as faults

import moeprof
from moeprof.errors import MoeprofError
from moeprof.trace.reader import open_trace
from moeprof.trace.writer import TraceWriter

SCRIPT = Path(faults.__file__)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(moeprof.__path__[0]).parent)}


@pytest.fixture
def ram_path(tmp_path):
    """A folder in memory where there is one: hundreds of recordings wait for no disk."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from-then-on"])
def test_a_full_disk_at_every_call(ram_path, lasting):
    num_calls = faults.count_calls(ram_path)
    assert num_calls > 40
    for at in range(num_calls):
        path = ram_path / f"{at}.moeprof"
        progress = {"committed": 0, "appended": 0}
        error = None
        with faults.interrupted(disk_full, at=at, lasting=lasting) as calls:
            try:
                faults.record(path, progress)
            except MoeprofError as caught:
                error = caught
        where = f"call {at} ({calls[at]})"
        if error is None:
            assert calls[at] in ("unlink", "mkdir"), f"{where}: the failure was swallowed"
        else:
            assert error.message.startswith("the disk is full: "), where
            assert "\n" not in error.message
            assert error.hint
        if "writer" not in progress:
            assert not path.exists() or faults.whole_steps(path) == 0, where
            continue
        num_steps = faults.whole_steps(path)
        assert progress["committed"] <= num_steps <= progress["appended"], where
        if error is not None:
            said = int(re.search(r"(\d+) committed steps are safe", error.message).group(1))
            assert progress["committed"] <= said <= num_steps, where
        progress["writer"].close()
        assert faults.whole_steps(path) == progress["appended"], f"{where}: a second close loses"
        trace = open_trace(path)
        assert trace.complete
        left = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        named = {part.path for log in trace.logs for part in log.parts}
        assert named | {"trace.json", "commits-r00000.jsonl"} <= left
        if error is not None and "not compacted" not in error.message:
            assert len(left) == len(named) + 2, f"{where}: files are left over"
            assert len(named) == 2, f"{where}: not compacted"


def test_ctrl_c_at_every_call(ram_path):
    for at in range(faults.count_calls(ram_path)):
        path = ram_path / f"{at}.moeprof"
        progress = {"committed": 0, "appended": 0}
        with faults.interrupted(ctrl_c, at=at), pytest.raises(KeyboardInterrupt):
            faults.record(path, progress)
        if "writer" not in progress:
            if path.exists():
                assert faults.whole_steps(path) == 0
            continue
        num_steps = faults.whole_steps(path)
        assert progress["committed"] <= num_steps <= progress["appended"]
        progress["writer"].close(complete=False)
        # The unit whose append was interrupted may or may not be in.
        assert progress["appended"] - 1 <= faults.whole_steps(path) <= progress["appended"]
        assert not open_trace(path).complete


def test_sigkill_at_every_call(ram_path):
    subprocess.run([sys.executable, SCRIPT, "calls", ram_path], check=True, env=ENVIRONMENT)
    places = sorted(path for path in ram_path.iterdir() if path.name.isdigit())
    assert len(places) > 40
    partial = 0
    for place in places:
        path = place / "a.moeprof"
        committed = place / "committed"
        if not path.exists():
            assert not committed.exists()
            continue
        num_steps = faults.whole_steps(path)
        least = int(committed.read_text()) if committed.exists() else 0
        assert least <= num_steps <= faults.NUM_STEPS, place.name
        partial += not open_trace(path).complete
    assert partial > 30


def test_sigkill_at_random_moments(ram_path):
    delays_s = [0.0, 0.003, 0.01, 0.02, 0.03, 0.05]
    for index, delay_s in enumerate(delays_s):
        path = ram_path / f"{index}.moeprof"
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "ever", path],
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        # Odd ones die while recording, even ones from the moment they start to compact.
        awaited = "closing" if index % 2 == 0 else "1"
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if lines[-1] == awaited:
                break
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().split()
        process.stdout.close()
        assert process.wait() in (-signal.SIGKILL, 0)
        least = max(int(line) for line in lines if line.isdigit())
        assert least <= faults.whole_steps(path) <= 40
        assert open_trace(path).complete or "closed" not in lines


def test_a_torn_last_line_is_ignored(ram_path):
    path = ram_path / "a.moeprof"
    writer = TraceWriter.create(path, faults.info(), flush_interval_s=float("inf"))
    for step in range(2):
        writer.append(faults.unit(step))
        writer.commit()
    log = path / "commits-r00000.jsonl"
    whole = log.read_bytes()
    second = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in (*range(second, len(whole), 37), len(whole) - 1):
        log.write_bytes(whole[:size])
        assert faults.whole_steps(path) == 1
    log.write_bytes(whole)
    assert faults.whole_steps(path) == 2


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root: " + mounted.stderr.decode().strip())
    try:
        path = disk / "a.moeprof"
        writer = TraceWriter.create(path, faults.info(), flush_interval_s=float("inf"))
        committed = 0
        with pytest.raises(MoeprofError, match="the disk is full: ") as caught:
            for step in range(200):
                writer.append(faults.unit(step))
                writer.commit()
                committed = step + 1
        assert committed > 5
        assert f"{committed} committed steps are safe" in caught.value.message
        assert faults.whole_steps(path) == committed
        with pytest.raises(MoeprofError, match="the disk is full"):
            writer.close()
        assert faults.whole_steps(path) == committed
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        writer.close()
        assert faults.whole_steps(path) == committed + 1
        assert open_trace(path).complete
    finally:
        subprocess.run(["umount", disk], check=True)
