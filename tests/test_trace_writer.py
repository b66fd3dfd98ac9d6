"""What is appended comes back: types, nulls, order, files, commits."""

from __future__ import annotations

import dataclasses
import json
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprof.errors import MoeprofError
from moeprof.trace import schema as spec
from moeprof.trace.reader import open_trace
from moeprof.trace.writer import TraceWriter

FOREVER = float("inf")


def make_info(num_sites=2, top_k=2, num_experts=8, **changes):
    sites = tuple(
        spec.Site(
            site=index,
            stack="decoder",
            layer=index,
            num_experts=num_experts,
            top_k=top_k,
            first_slot=index * top_k,
            expert_bytes=1024,
        )
        for index in range(num_sites)
    )
    return spec.TraceInfo(model=spec.ModelInfo(name="m"), sites=sites, **changes)


def make_unit(step, *, num_tokens=3, slots=4, seed=None):
    rng = np.random.default_rng(step if seed is None else seed)
    return {
        "steps": {
            "step": step,
            "stack": "decoder",
            "phase": "decode",
            "batch": num_tokens,
            "num_tokens": num_tokens,
            "num_prefill_tokens": 0,
            "num_decode_tokens": num_tokens,
            "num_padded_tokens": 0,
            "probed": False,
            "start_s": 0.5 * step,
        },
        "routing/decoder": {
            "step": step,
            "row": np.arange(num_tokens),
            "request": np.arange(num_tokens),
            "sequence": 0,
            "parent_sequence": 0,
            "position": step,
            "phase": "decode",
            "expert": rng.integers(0, 8, (num_tokens, slots)),
            "status": 0,
            "weight": rng.random((num_tokens, slots)),
        },
    }


def test_a_unit_comes_back(tmp_path):
    with TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER
    ) as writer:
        unit = make_unit(7)
        unit["steps"] |= {"wall_ms": 1.5, "peak_bytes": np.array([1 << 40])}
        writer.append(unit)
    trace = open_trace(tmp_path / "a.moeprof")
    assert trace.complete
    assert trace.stacks == ("decoder",)
    step = trace.steps.iloc[0]
    assert (step["rank"], step["step"], step["stack"], step["phase"]) == (0, 7, "decoder", "decode")
    assert step["wall_ms"] == 1.5
    assert step["peak_bytes"] == 1 << 40
    assert np.isnan(step["device_ms"])
    frame = trace.routing()
    assert list(frame["expert"]) == list(unit["routing/decoder"]["expert"].ravel())
    expected = unit["routing/decoder"]["weight"].astype(np.float16).astype(np.float32)
    assert np.array_equal(frame["weight"].to_numpy(), expected.ravel())
    assert frame["weight"].dtype == np.float32
    assert list(frame["site"][:4]) == [0, 0, 1, 1]
    assert list(frame["slot"][:4]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "values",
    [
        [1.5, None, 3.0],
        np.array([1.5, np.nan, 3.0]),
        np.ma.array([1.5, 9.0, 3.0], mask=[False, True, False]),
        np.array([1.5, None, 3.0], dtype=object),
        np.array([1.5, np.nan, 3.0], dtype=object),
        pd.Series([1.5, pd.NA, 3.0], dtype="Float64"),
    ],
    ids=["list", "nan", "masked", "object", "object-nan", "pandas"],
)
def test_missing_is_null_never_zero(tmp_path, values):
    with TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER
    ) as writer:
        unit = {"layers": {"step": [0, 1, 2], "stack": "decoder", "layer": 0, "moe_ms": values}}
        writer.append(unit)
    path = next((tmp_path / "a.moeprof" / "layers").glob("*.parquet"))
    stored = pq.read_table(path)
    assert stored.column("moe_ms").to_pylist() == [1.5, None, 3.0]
    assert stored.column("site").to_pylist() == [None, None, None]
    assert stored.column("component_source").to_pylist() == [None, None, None]


def test_nullable_integers_and_text(tmp_path):
    with TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER
    ) as writer:
        writer.append(
            {
                "requests": {
                    "request": [0, 1],
                    "task": "lm",
                    "domain": ["news", None],
                    "num_prompt_tokens": [5, None],
                    "num_sequences": 1,
                    "arrival_s": 0.0,
                }
            }
        )
        writer.append(
            {
                "requests": {
                    "request": 1,
                    "task": "lm",
                    "domain": "code",
                    "num_prompt_tokens": 9,
                    "num_sequences": 1,
                    "arrival_s": 0.0,
                }
            }
        )
    requests = open_trace(tmp_path / "a.moeprof").requests
    assert list(requests["request"]) == [0, 1]
    assert list(requests["domain"]) == ["news", "code"], "the last row of a request counts"
    assert list(requests["num_prompt_tokens"]) == [5, 9]
    assert requests["language"].isna().all()


def test_bad_units_are_refused_and_leave_nothing(tmp_path):
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER)
    unit = make_unit(0)
    bad = [
        ({"nonsense": {}}, "no table"),
        ({"routing/encoder": {}}, "names no stack"),
        ({"steps/decoder": {}}, "no stacks"),
        ({"steps": {**unit["steps"], "color": 1}}, "no column color"),
        ({"steps": {"step": 0}}, "needs the column"),
        ({"steps": {**unit["steps"], "step": None}}, "must not be null"),
        ({"steps": {**unit["steps"], "stack": None}}, "must not be null"),
        ({"steps": {**unit["steps"], "step": 1 << 40}}, "outside int32"),
        ({"steps": {**unit["steps"], "step": [1, 2], "batch": [1, 2, 3]}}, "differ in length"),
        ({"routing/decoder": {**unit["routing/decoder"], "expert": [[1]] * 3}}, "shape"),
        (
            {"routing/decoder": {**unit["routing/decoder"], "expert": [[40000] * 4] * 3}},
            "outside int16",
        ),
    ]
    for columns, message in bad:
        with pytest.raises(ValueError, match=message):
            writer.append(columns)
    writer.append(unit)
    without_weights = make_unit(1)
    del without_weights["routing/decoder"]["weight"]
    with pytest.raises(ValueError, match="was started with the columns"):
        writer.append(without_weights)
    writer.close()
    assert list(open_trace(tmp_path / "a.moeprof").steps["step"]) == [0]
    with pytest.raises(ValueError, match="closed"):
        writer.append(unit)


def test_the_writer_keeps_its_own_copy(tmp_path):
    with TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER
    ) as writer:
        unit = make_unit(0)
        ids = np.array(unit["routing/decoder"]["expert"], dtype=np.int16)
        unit["routing/decoder"]["expert"] = ids
        expected = ids.copy()
        writer.append(unit)
        ids[:] = 7
    frame = open_trace(tmp_path / "a.moeprof").routing()
    assert np.array_equal(frame["expert"].to_numpy(), expected.ravel())


def test_wide_ids_and_float32_weights(tmp_path):
    info = make_info(num_experts=70_000, settings={"weight_dtype": "float32"})
    unit = make_unit(0)
    unit["routing/decoder"]["expert"] = np.full((3, 4), 69_999)
    with TraceWriter.create(tmp_path / "a.moeprof", info, flush_interval_s=FOREVER) as writer:
        writer.append(unit)
    frame = open_trace(tmp_path / "a.moeprof").routing()
    assert set(frame["expert"]) == {69_999}
    expected = unit["routing/decoder"]["weight"].astype(np.float32).ravel()
    assert np.array_equal(frame["weight"].to_numpy(), expected)


def test_reserved_tables_hold_lists(tmp_path):
    with TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER
    ) as writer:
        writer.append({"scores": {"step": 0, "row": [0, 1], "site": 0, "score": np.ones((2, 8))}})
        writer.append({"norms": {"step": 0, "row": [0, 1], "site": 0, "norm": [[1.0], [2.0, 3.0]]}})
    trace = open_trace(tmp_path / "a.moeprof")
    assert trace.has_table("scores")
    assert not trace.has_table("hidden")
    assert [list(row) for row in trace.table("norms")["norm"]] == [[1.0], [2.0, 3.0]]


def test_rows_end_in_order_of_execution_however_they_came(tmp_path):
    order = [3, 0, 2, 5, 1, 4]
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER)
    for index, step in enumerate(order):
        writer.append(make_unit(step))
        if index % 2:
            writer.commit()
    uncompacted = open_trace(tmp_path / "a.moeprof")
    before = np.concatenate([block.expert for block in uncompacted.blocks("decoder")])
    steps = np.concatenate([block.step for block in uncompacted.blocks("decoder")])
    assert list(steps) == sorted(steps)
    writer.close()
    trace = open_trace(tmp_path / "a.moeprof")
    assert list(trace.steps["step"]) == sorted(order)
    routing = trace.table("routing/decoder")
    assert list(zip(routing["step"], routing["row"], strict=True)) == [
        (step, row) for step in range(6) for row in range(3)
    ]
    after = np.concatenate([block.expert for block in trace.blocks("decoder")])
    assert np.array_equal(after, before)


def test_compaction_leaves_one_part_per_table_and_the_same_rows(tmp_path):
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER)
    for step in range(20):
        writer.append(make_unit(step))
        writer.commit()
    assert writer.num_committed_steps == 20
    assert len(list((tmp_path / "a.moeprof" / "steps").glob("*"))) == 20
    before = open_trace(tmp_path / "a.moeprof")
    assert not before.complete
    rows = before.routing()
    writer.close()
    writer.close()
    trace = open_trace(tmp_path / "a.moeprof")
    assert [len(list(folder.iterdir())) for folder in (tmp_path / "a.moeprof").glob("*/")] == [1, 1]
    assert len(trace.parts("steps")) == 1
    pd.testing.assert_frame_equal(trace.routing(), rows)
    assert trace.num_bytes == sum(
        path.stat().st_size for path in (tmp_path / "a.moeprof").rglob("*") if path.is_file()
    )


def test_compaction_streams(tmp_path, monkeypatch):
    """Row groups leave the merge full-sized while only a few parts are in memory."""
    monkeypatch.setattr("moeprof.trace.encoding.ROUTING_GROUP_ROWS", (64, 64))
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER)
    for step in range(50):
        writer.append(make_unit(step, num_tokens=7))
        writer.commit()
    writer.close()
    path = next((tmp_path / "a.moeprof" / "routing" / "decoder").iterdir())
    metadata = pq.ParquetFile(path).metadata
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert sizes == [64] * 5 + [30]


def test_files_are_private(tmp_path):
    with TraceWriter.create(tmp_path / "a.moeprof", make_info()) as writer:
        writer.append(make_unit(0))
        writer.commit()
        writer.append(make_unit(1))
    for path in [tmp_path / "a.moeprof", *(tmp_path / "a.moeprof").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_an_existing_output_stays_without_force(tmp_path):
    path = tmp_path / "a.moeprof"
    with TraceWriter.create(path, make_info()) as writer:
        writer.append(make_unit(0))
    with pytest.raises(MoeprofError, match="exists") as caught:
        TraceWriter.create(path, make_info())
    assert "--force" in caught.value.hint
    with TraceWriter.create(path, make_info(), force=True) as writer:
        writer.append(make_unit(5))
    assert list(open_trace(path).steps["step"]) == [5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.moeprof"]


def test_force_replaces_nothing_but_a_trace(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("text")
    link = tmp_path / "link"
    with TraceWriter.create(tmp_path / "real.moeprof", make_info()) as writer:
        writer.append(make_unit(0))
    link.symlink_to(tmp_path / "real.moeprof")
    mixed = tmp_path / "mixed.moeprof"
    TraceWriter.create(mixed, make_info()).close()
    (mixed / "notes.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "trace.json").write_text('{"traceEvents": []}')
    for path in (folder, file, link, mixed, foreign):
        with pytest.raises(MoeprofError, match=r"not a moeprof trace|not part of a trace"):
            TraceWriter.create(path, make_info(), force=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert (mixed / "notes.txt").read_text() == "mine"
    assert open_trace(tmp_path / "real.moeprof").complete


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeprofError, match="cannot write") as caught:
        TraceWriter.create(tmp_path / "file" / "a.moeprof", make_info())
    assert "\n" not in caught.value.message


def test_update_info_rewrites_the_file(tmp_path):
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info())
    writer.update_info(notes=("look",), mode="score")
    data = json.loads((tmp_path / "a.moeprof" / "trace.json").read_text())
    assert (data["notes"], data["mode"], data["complete"]) == (["look"], "score", False)
    writer.close()
    assert open_trace(tmp_path / "a.moeprof").info.notes == ("look",)


def test_info_survives_the_file(tmp_path):
    site = dataclasses.replace(
        make_info().sites[0],
        capacity_rule=spec.CapacityRule(rule="fixed", value=4.0),
        selection_bias=(0.5, -0.5),
        scaling_factor=2.5,
        renormalized=True,
    )
    info = make_info(
        kernels={"decode": "eager"},
        hardware=spec.Hardware(device="cuda", num_devices=2),
        versions={"torch": "2.13"},
        origin={"source": "elsewhere"},
        settings={"probe_every": 8},
        created="2026-01-01T00:00:00+00:00",
    )
    info = dataclasses.replace(info, sites=(site,))
    TraceWriter.create(tmp_path / "a.moeprof", info).close()
    assert open_trace(tmp_path / "a.moeprof").info == dataclasses.replace(info, complete=True)


def test_old_units_are_committed_without_another_append(tmp_path):
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=0.1)
    writer.append(make_unit(0))
    assert not open_trace(tmp_path / "a.moeprof").has_table("steps")
    deadline_s = time.monotonic() + 20
    while not open_trace(tmp_path / "a.moeprof").has_table("steps"):
        assert time.monotonic() < deadline_s, "nothing was committed"
        time.sleep(0.02)
    writer.append(make_unit(1))
    while len(open_trace(tmp_path / "a.moeprof").steps) < 2:
        assert time.monotonic() < deadline_s, "the second unit was not committed"
        time.sleep(0.02)
    writer.close()
    assert not [t for t in threading.enumerate() if t.name == "moeprof-flush" and t.is_alive()]


def test_many_bytes_are_committed_at_once(tmp_path):
    writer = TraceWriter.create(
        tmp_path / "a.moeprof", make_info(), flush_interval_s=FOREVER, flush_bytes=10_000
    )
    for step in range(20):
        writer.append(make_unit(step, num_tokens=50))
    assert writer.num_committed_steps >= 15
    assert 1 < len(list((tmp_path / "a.moeprof" / "steps").iterdir())) < 20
    writer.close()


def test_threads_may_append(tmp_path):
    writer = TraceWriter.create(tmp_path / "a.moeprof", make_info(), flush_interval_s=0.01)

    def work(first):
        for step in range(first, first + 50):
            writer.append(make_unit(step))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 50, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    trace = open_trace(tmp_path / "a.moeprof")
    assert list(trace.steps["step"]) == list(range(150))
    for block in trace.blocks("decoder"):
        for step in range(150):
            rows = block.expert[block.step == step]
            assert np.array_equal(rows, make_unit(step)["routing/decoder"]["expert"])


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    commits=st.sets(st.integers(0, 11)),
    compact=st.booleans(),
)
def test_any_pattern_of_commits_gives_the_same_trace(tmp_path_factory, sizes, commits, compact):
    path = tmp_path_factory.mktemp("any") / "a.moeprof"
    writer = TraceWriter.create(path, make_info(), flush_interval_s=FOREVER)
    for step, size in enumerate(sizes):
        writer.append(make_unit(step, num_tokens=size))
        if step in commits:
            writer.commit()
    writer.close(compact=compact)
    trace = open_trace(path)
    assert trace.complete
    blocks = list(trace.blocks("decoder", weights=True))
    expert = np.concatenate([block.expert for block in blocks])
    expected = [
        make_unit(step, num_tokens=size)["routing/decoder"]["expert"]
        for step, size in enumerate(sizes)
    ]
    assert np.array_equal(expert, np.concatenate(expected))
    assert sorted(entry.name for entry in Path(path).iterdir()) == [
        "commits-r00000.jsonl",
        "routing",
        "steps",
        "trace.json",
    ]
