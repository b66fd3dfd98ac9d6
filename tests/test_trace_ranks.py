"""Several ranks write side by side; readers see one trace and know who is missing."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from moeprof.errors import MoeprofError
from moeprof.trace import schema as spec
from moeprof.trace import writer as writing
from moeprof.trace.reader import open_trace
from moeprof.trace.synthetic import synthetic_trace
from moeprof.trace.validator import check
from moeprof.trace.writer import TraceWriter


@pytest.fixture
def two_ranks(tmp_path):
    return synthetic_trace(tmp_path / "a.moeprof", num_requests=16, num_ranks=2, num_sites=2)


def test_ranks_are_merged(two_ranks):
    trace = two_ranks
    assert trace.complete
    assert trace.ranks == (0, 1)
    assert trace.info.missing_ranks == ()
    assert [entry.data_parallel for entry in trace.info.ranks] == [0, 1]
    assert set(trace.requests["request"]) == set(range(16))
    assert set(trace.requests[trace.requests["rank"] == 1]["request"]) == set(range(1, 16, 2))
    assert set(trace.routing()["rank"]) == {0, 1}
    assert trace.info.capture.num_tokens_recorded == len(trace.table("routing/decoder"))
    for block in trace.blocks("decoder"):
        assert len(set(block.rank)) == 1
    keys = [(d.step, d.site, d.rank) for d in trace.dispatches()]
    assert keys == sorted(keys)
    assert check(trace).ok


def test_a_missing_rank_is_named(two_ranks):
    Path(two_ranks.path, "commits-r00001.jsonl").unlink()
    trace = open_trace(two_ranks.path)
    assert trace.info.missing_ranks == (1,)
    assert not trace.complete
    result = check(trace)
    assert [p.message for p in result.problems if p.code == "rank_missing"] == ["rank 1 is missing"]
    assert not result.ok


def test_a_rank_that_did_not_close_leaves_the_trace_incomplete(tmp_path):
    info = _info(2)
    first = TraceWriter.create(tmp_path / "a.moeprof", info)
    second = TraceWriter.create(tmp_path / "a.moeprof", info, rank=1)
    first.close()
    assert not open_trace(tmp_path / "a.moeprof").complete
    second.update_info(
        capture=spec.CaptureCounts(num_sites=1, num_tokens_seen=3, num_tokens_recorded=3),
        notes=("from rank 1",),
    )
    second.close()
    trace = open_trace(tmp_path / "a.moeprof")
    assert trace.complete
    assert trace.info.capture.num_tokens_seen == 3
    assert trace.info.notes == ("from rank 1",)


def test_only_rank_0_writes_trace_json(tmp_path):
    info = _info(2)
    first = TraceWriter.create(tmp_path / "a.moeprof", info)
    second = TraceWriter.create(tmp_path / "a.moeprof", info, rank=1)
    before = (tmp_path / "a.moeprof" / "trace.json").read_bytes()
    second.update_info(notes=("mine",))
    second.close()
    assert (tmp_path / "a.moeprof" / "trace.json").read_bytes() == before
    first.close()


def test_ranks_wait_for_rank_0(tmp_path, monkeypatch):
    joined = []

    def join():
        joined.append(TraceWriter.create(tmp_path / "a.moeprof", _info(2), rank=1))

    thread = threading.Thread(target=join)
    thread.start()
    TraceWriter.create(tmp_path / "a.moeprof", _info(2)).close()
    thread.join(timeout=20)
    joined[0].close()
    assert open_trace(tmp_path / "a.moeprof").complete
    with pytest.raises(MoeprofError, match="already holds rank 1"):
        TraceWriter.create(tmp_path / "a.moeprof", _info(2), rank=1)
    monkeypatch.setattr(writing, "JOIN_TIMEOUT_S", 0.1)
    with pytest.raises(MoeprofError, match="rank 2 waited"):
        TraceWriter.create(tmp_path / "nowhere.moeprof", _info(2), rank=2)


def test_a_rank_sweeps_only_its_own_files(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=6, num_ranks=3)
    steps = [part.path for part in trace.parts("steps")]
    assert len(steps) == 3
    counts = trace.steps.groupby("rank").size()
    assert np.all(counts > 0)


def _info(world_size):
    site = spec.Site(
        site=0, stack="decoder", layer=0, num_experts=4, top_k=1, first_slot=0, expert_bytes=8
    )
    ranks = tuple(spec.RankInfo(rank=rank, world_size=world_size) for rank in range(world_size))
    info = spec.TraceInfo(model=spec.ModelInfo(name="m"), sites=(site,), ranks=ranks)
    return dataclasses.replace(info, created="2026-01-01T00:00:00+00:00")
