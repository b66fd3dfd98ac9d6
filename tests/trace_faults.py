"""A recording to be interrupted, and interruptions at every call that touches the disk.

Run as a script it kills itself: ``python trace_faults.py FOLDER`` records into one folder per
call and ends with SIGKILL in the middle of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from moeprof.trace import schema as spec
from moeprof.trace.reader import open_trace
from moeprof.trace.writer import TraceWriter

NUM_STEPS = 3
NUM_TOKENS = 5
SLOTS = 4
WATCHED = (
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (os, "rename"),
    (os, "mkdir"),
    (os, "truncate"),
    (os, "unlink"),
    (pq.ParquetWriter, "write_table"),
    (pq.ParquetWriter, "close"),
)


def info():
    sites = tuple(
        spec.Site(
            site=index,
            stack="decoder",
            layer=index,
            num_experts=64,
            top_k=2,
            first_slot=2 * index,
            expert_bytes=1024,
        )
        for index in range(SLOTS // 2)
    )
    return spec.TraceInfo(model=spec.ModelInfo(name="m"), sites=sites)


def experts(step):
    return np.random.default_rng(step).integers(0, 64, (NUM_TOKENS, SLOTS))


def unit(step):
    return {
        "steps": {
            "step": step,
            "stack": "decoder",
            "phase": "decode",
            "batch": NUM_TOKENS,
            "num_tokens": NUM_TOKENS,
            "num_prefill_tokens": 0,
            "num_decode_tokens": NUM_TOKENS,
            "num_padded_tokens": 0,
            "probed": False,
            "start_s": 0.5 * step,
        },
        "routing/decoder": {
            "step": step,
            "row": np.arange(NUM_TOKENS),
            "request": np.arange(NUM_TOKENS),
            "sequence": 0,
            "parent_sequence": 0,
            "position": step,
            "phase": "decode",
            "expert": experts(step),
            "status": 0,
        },
    }


def record(path, progress):
    """Records `NUM_STEPS` steps; notes in ``progress`` what was appended and what committed."""
    writer = TraceWriter.create(path, info(), flush_interval_s=float("inf"))
    progress["writer"] = writer
    for step in range(NUM_STEPS):
        progress["appended"] = step + 1
        writer.append(unit(step))
        if step < NUM_STEPS - 1:
            writer.commit()
            progress["committed"] = step + 1
    writer.update_info(notes=("late",))
    writer.close()
    progress["committed"] = NUM_STEPS


def whole_steps(path):
    """Returns how many steps a trace holds; each must be whole and in every table."""
    trace = open_trace(path)
    steps = list(trace.table("steps", columns=["step"])["step"])
    assert steps == list(range(len(steps)))
    rows = [block for block in trace.blocks("decoder")]
    found = np.concatenate([block.expert for block in rows]) if rows else np.zeros((0, SLOTS))
    expected = [experts(step) for step in steps]
    assert np.array_equal(found, np.concatenate(expected) if expected else np.zeros((0, SLOTS)))
    return len(steps)


@contextlib.contextmanager
def interrupted(action, *, at, lasting=False):
    """Calls ``action`` before the watched call number ``at``, or before all from it on.

    Yields a list whose length is the number of watched calls so far.
    """
    calls = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in WATCHED]

    def wrap(original):
        def call(*args, **kwargs):
            index = len(calls)
            calls.append(original.__name__)
            if index == at or (lasting and index > at):
                action()
            return original(*args, **kwargs)

        return call

    for owner, name, original in originals:
        setattr(owner, name, wrap(original))
    try:
        yield calls
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def count_calls(folder):
    """Returns the number of watched calls of an undisturbed recording."""
    with interrupted(lambda: None, at=-1) as calls:
        record(folder / "undisturbed.moeprof", {})
    return len(calls)


class DiskProgress(dict):
    """Progress that survives the process."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        if key == "committed":
            self._path.write_text(str(value))


def kill_at_every_call(folder):
    """Records once per watched call, each time in a child that kills itself there."""
    for at in range(count_calls(folder)):
        place = folder / f"{at:04d}"
        place.mkdir()
        child = os.fork()
        if child == 0:
            with interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL), at=at):
                record(place / "a.moeprof", DiskProgress(place / "committed"))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"call {at} was never made"


def record_for_ever(path):
    """Records until killed; prints every committed step, then what it is about to do."""
    writer = TraceWriter.create(path, info(), flush_interval_s=float("inf"))
    for step in range(40):
        writer.append(unit(step))
        if step % 3 == 0:
            writer.commit()
            print(step + 1, flush=True)
    writer.commit()
    print(40, flush=True)
    print("closing", flush=True)
    writer.close()
    print("closed", flush=True)


if __name__ == "__main__":
    verb, target = sys.argv[1], Path(sys.argv[2])
    {"calls": kill_at_every_call, "ever": record_for_ever}[verb](target)
