"""Reading: lazily, only what is asked for, with one clear line where it cannot be done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trace_tools import rewrite

from moeprof.errors import EXIT_BAD_TRACE, TraceError, UsageError
from moeprof.trace import parts, storage
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.reader import ROUTING_COLUMNS, open_trace
from moeprof.trace.synthetic import synthetic_trace


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "lm.moeprof"
    return synthetic_trace(path, num_requests=12, num_sites=3, num_experts=[8, 16, 8], top_k=2)


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    path = tmp_path_factory.mktemp("mt") / "mt.moeprof"
    return synthetic_trace(
        path,
        num_requests=12,
        num_sites=2,
        stacks=("encoder", "decoder"),
        mixed_steps=True,
        capacity_factor=1.0,
        prune_last_layer=True,
    )


@pytest.fixture
def reads(monkeypatch):
    """Lists every opened part, and every row group with the columns read of it."""
    seen = {"opened": [], "groups": []}
    open_part, read_group = storage.Store.open_part, pq.ParquetFile.read_row_group

    def opened(self, name):
        seen["opened"].append(name)
        return open_part(self, name)

    def read(self, index, columns=None, **options):
        seen["groups"].append((index, tuple(columns)))
        return read_group(self, index, columns=columns, **options)

    monkeypatch.setattr(storage.Store, "open_part", opened)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    return seen


def test_opening_reads_no_parquet(lm, reads):
    trace = open_trace(lm.path)
    assert trace.complete
    assert trace.stacks == ("decoder",)
    assert len(trace.sites) == 3
    assert trace.model.name == "synthetic"
    assert trace.has_table("routing")
    assert not trace.has_table("kernels")
    assert trace.num_bytes > 0
    assert "complete" in repr(trace)
    assert reads == {"opened": [], "groups": []}


def test_a_table_reads_only_its_own_part_and_columns(lm, reads):
    trace = open_trace(lm.path)
    frame = trace.table("steps", columns=["step", "wall_ms"])
    assert list(frame.columns) == ["step", "wall_ms"]
    assert {name.split("/")[0] for name in reads["opened"]} == {"steps"}
    assert reads["groups"] == [(0, ("step", "wall_ms"))]
    assert trace.steps is trace.steps


def test_routing_reads_only_needed_columns_and_row_groups(tmp_path, monkeypatch, reads):
    monkeypatch.setattr("moeprof.trace.encoding.ROUTING_GROUP_ROWS", (100, 100))
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=80, batch=4)
    whole = trace.routing()
    reads["opened"].clear()
    reads["groups"].clear()
    some = trace.routing(layers=2, steps=slice(10, 14), columns=["step", "expert"])
    assert {columns for _, columns in reads["groups"]} == {("step", "expert")}
    assert len(reads["opened"]) == 1
    num_groups = -(-len(trace.table("routing/decoder", columns=["step"])) // 100)
    assert num_groups > 20
    assert len(reads["groups"]) - num_groups <= 4
    expected = whole[(whole["layer"] == 2) & whole["step"].between(10, 13)]
    assert np.array_equal(some["expert"].to_numpy(), expected["expert"].to_numpy())


def test_routing_of_a_step_range_opens_only_parts_that_hold_it(tmp_path, reads):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=12)
    for part in trace.parts("routing/decoder"):
        assert part.last_step < 10_000
    assert trace.routing(steps=range(10_000, 10_010)).empty
    assert not reads["groups"]


@pytest.mark.parametrize(
    "steps",
    [5, slice(3, 9), slice(None, 4), slice(8, None), range(2, 20, 3), [7, 1, 7], np.array([4]), []],
)
def test_routing_filters_agree_with_pandas(mt, steps):
    frame = mt.routing()
    numbers = frame["step"].to_numpy()
    if isinstance(steps, slice):
        keep = np.isin(numbers, np.arange(10_000)[steps])
    else:
        keep = np.isin(numbers, np.atleast_1d(np.array(list(np.atleast_1d(steps)), dtype=int)))
    pd.testing.assert_frame_equal(mt.routing(steps=steps), frame[keep].reset_index(drop=True))
    keep &= (frame["phase"] == "decode") & (frame["layer"] == 1) & (frame["stack"] == "decoder")
    some = mt.routing(stack="decoder", layers=[1], phase="decode", steps=steps)
    pd.testing.assert_frame_equal(some, frame[keep].reset_index(drop=True))


def test_routing_speaks_plainly(lm, mt):
    frame = mt.routing()
    assert tuple(frame.columns) == ROUTING_COLUMNS
    assert set(frame["stack"].unique()) == {"encoder", "decoder"}
    assert set(frame["phase"].unique()) == {"encode", "prefill", "decode"}
    assert frame["weight"].dtype == np.float32
    extra = ["row", "parent_sequence", "accepted", "score"]
    other = lm.routing(columns=extra)
    assert list(other.columns) == extra
    assert other["accepted"].isna().all()
    assert other["score"].isna().all()
    with pytest.raises(ValueError, match="no column 'colour'"):
        lm.routing(columns=["colour"])
    with pytest.raises(ValueError, match="no stack 'encoder'"):
        lm.routing(stack="encoder")
    with pytest.raises(ValueError, match="no table 'routing'"):
        lm.table("routing")
    with pytest.raises(ValueError, match="no column 'expert'"):
        lm.table("routing/decoder", columns=["expert"])
    with pytest.raises(ValueError, match="stride"):
        lm.routing(steps=slice(0, 10, 2))


def test_a_trace_without_weights(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=3, weights=False)
    assert "weight" not in trace.routing()
    assert trace.routing(columns=["weight"])["weight"].isna().all()
    with pytest.raises(TraceError, match="holds no weights"):
        next(trace.blocks("decoder", weights=True))


def test_tables_have_stable_types(lm, tmp_path):
    empty = hand_trace(
        tmp_path / "a.moeprof", [[HandToken(request=0, position=0, experts=[[0, 1]])]]
    )
    for name in ("requests", "steps", "layers", "executed", "devices", "kernels"):
        few, many = empty.table(name), lm.table(name)
        assert list(few.columns) == list(many.columns)
        assert few.dtypes.to_dict() == many.dtypes.to_dict(), name
    assert len(empty.layers) == len(empty.kernels) == 0


def test_plain_lists_of_other_writers_are_read(lm, tmp_path):
    copy = tmp_path / "copy.moeprof"
    shutil.copytree(lm.path, copy)
    trace = open_trace(copy)
    path = copy / trace.parts("routing/decoder")[0].path
    table = pq.read_table(path)
    for name in ("expert", "status", "weight"):
        index = table.schema.get_field_index(name)
        element = table.schema.field(name).type.value_type
        table = table.set_column(index, name, table.column(name).cast(pa.list_(element)))
    pq.write_table(table.replace_schema_metadata(None), path, row_group_size=50, store_schema=False)
    pd.testing.assert_frame_equal(trace.routing(), lm.routing())
    ours = np.concatenate([block.expert for block in lm.blocks("decoder")])
    theirs = np.concatenate([block.expert for block in trace.blocks("decoder")])
    assert np.array_equal(ours, theirs)


def test_fsspec_urls(lm):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(lm.path, "/bucket/lm.moeprof", recursive=True)
    trace = open_trace("memory://bucket/lm.moeprof")
    assert trace.complete
    pd.testing.assert_frame_equal(trace.routing(), lm.routing())
    pd.testing.assert_frame_equal(trace.steps, lm.steps)
    with pytest.raises(TraceError, match="does not exist"):
        open_trace("memory://bucket/other.moeprof")


def test_file_urls(lm):
    assert open_trace(f"file://{lm.path}").num_bytes == lm.num_bytes


def test_samples_are_found_by_name(lm, tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "moeprof" / "trace"
    package.mkdir(parents=True)
    monkeypatch.setattr(storage, "__file__", str(package / "storage.py"))
    with pytest.raises(UsageError) as caught:
        open_trace("sample:lm")
    assert caught.value.hint == "samples: none"
    checkout = tmp_path / "site-packages" / "traces" / "samples"
    checkout.mkdir(parents=True)
    shutil.copytree(lm.path, checkout / "lm.moeprof")
    assert open_trace("sample:lm").path == str(checkout / "lm.moeprof")
    wheel = package.parent / "samples"
    wheel.mkdir()
    shutil.copytree(lm.path, wheel / "mt.moeprof")
    assert open_trace("sample:mt").path == str(wheel / "mt.moeprof")
    with pytest.raises(UsageError, match="no sample trace 'xx'") as caught:
        open_trace("sample:xx")
    assert "sample:mt" in caught.value.hint


def test_what_is_no_trace_is_one_line_and_a_hint(tmp_path, lm):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "trace.json").write_text('{"traceEvents": []}')
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "trace.json").write_text('{"schema_version": 1, "mod')
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "trace.json").write_text("[]")
    shutil.copytree(lm.path, tmp_path / "near.moeprof")
    cases = {
        "nowhere": "does not exist",
        "near": "does not exist",
        "file": "is a file, not a moeprof trace",
        "empty": "is not a moeprof trace: it holds no trace.json",
        "foreign": "is of another program",
        "torn": "is not valid JSON",
        "listed": "is of another program",
    }
    for name, message in cases.items():
        with pytest.raises(TraceError, match=message) as caught:
            open_trace(tmp_path / name)
        assert caught.value.exit_code == EXIT_BAD_TRACE
        assert "\n" not in caught.value.message
        assert caught.value.hint
        if name == "near":
            assert "near.moeprof" in caught.value.hint


def edited_info(trace, path, **changes):
    shutil.copytree(trace.path, path)
    data = json.loads((path / "trace.json").read_text())
    data.update(changes)
    (path / "trace.json").write_text(json.dumps(data))
    return path


def test_versions(lm, tmp_path):
    newer = edited_info(lm, tmp_path / "newer.moeprof", schema_version=99)
    with pytest.raises(TraceError, match=r"written by a newer moeprof \(schema 99") as caught:
        open_trace(newer)
    assert "upgrade" in caught.value.hint
    for index, value in enumerate(["one", 0, None, 1.5]):
        bad = edited_info(lm, tmp_path / f"{index}.moeprof", schema_version=value)
        with pytest.raises(TraceError, match="schema_version"):
            open_trace(bad)
    unknown = edited_info(lm, tmp_path / "more.moeprof", field_of_the_future=1)
    assert open_trace(unknown).info == lm.info
    for key, value in {"model": 3, "sites": [{}], "capture": []}.items():
        bad = edited_info(lm, tmp_path / f"{key}.moeprof", **{key: value})
        with pytest.raises(TraceError, match=r"trace\.json is not valid"):
            open_trace(bad)


def test_damaged_parts(lm, tmp_path):
    for name, damage, message in [
        ("missing", lambda part: part.unlink(), "is missing"),
        ("cut", lambda part: part.write_bytes(part.read_bytes()[:-100]), "damaged or cut short"),
        ("empty", lambda part: part.write_bytes(b""), "damaged or cut short"),
        ("middle", lambda part: part.write_bytes(_scrambled(part.read_bytes())), "damaged"),
    ]:
        path = tmp_path / f"{name}.moeprof"
        shutil.copytree(lm.path, path)
        trace = open_trace(path)
        damage(path / trace.parts("routing/decoder")[0].path)
        assert len(trace.steps) == len(lm.steps), "other tables can still be read"
        for read in (trace.routing, lambda t=trace: list(t.dispatches())):
            with pytest.raises(TraceError, match=message) as caught:
                read()
            assert "\n" not in caught.value.message


def _scrambled(data):
    """Returns a Parquet file whose footer is whole and whose pages are not."""
    footer = int.from_bytes(data[-8:-4], "little") + 8
    body = bytearray(data[:-footer])
    body[4:] = bytes(255 - byte for byte in body[4:])
    return bytes(body) + data[-footer:]


def test_a_damaged_log(lm, tmp_path):
    path = tmp_path / "a.moeprof"
    shutil.copytree(lm.path, path)
    log = path / "commits-r00000.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + "garbage\n" + lines[1])
    with pytest.raises(TraceError, match="line 2 of the commit log is damaged"):
        open_trace(path)


def test_slots_that_do_not_fit_the_geometry(lm, tmp_path):
    data = json.loads(lm.store.read_text("trace.json"))
    sites = data["sites"][:2]
    path = edited_info(lm, tmp_path / "a.moeprof", sites=sites)
    with pytest.raises(TraceError, match="slots where"):
        open_trace(path).routing()


def test_a_rewritten_trace_is_the_same(mt, tmp_path):
    again = rewrite(mt, tmp_path / "again.moeprof")
    pd.testing.assert_frame_equal(again.routing(), mt.routing())
    pd.testing.assert_frame_equal(again.layers, mt.layers)


def test_step_filters():
    assert parts.StepFilter.of(None).everything
    chosen = parts.StepFilter.of([2, 9])
    assert chosen.overlaps(0, 2)
    assert chosen.overlaps(None, None)
    assert not chosen.overlaps(3, 8)
    assert not chosen.overlaps(10, 12)
    assert not parts.StepFilter.of([]).overlaps(0, 100)
    assert not parts.StepFilter.of(slice(5, 7)).overlaps(7, 9)


def test_importing_the_package_is_cheap():
    code = (
        "import sys, moeprof.trace as t; "
        "assert 'pyarrow' not in sys.modules and 'pandas' not in sys.modules, 'heavy'; "
        "assert t.open_trace and 'pyarrow' in sys.modules; "
        "assert 'torch' not in sys.modules and set(t.__all__) <= set(dir(t))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment():
    import os
    from pathlib import Path

    import moeprof

    return {**os.environ, "PYTHONPATH": str(Path(moeprof.__path__[0]).parent)}
