"""The gating page, the command line and the check of composing, on a user's trace."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pandas as pd
import pytest

from analysis import balancing, buffering, composing
from analysis import gating as analysis
from moeprof.cli import main
from moeprof.reporting.replays import SWEEP
from moeprof.trace.synthetic import synthetic_trace


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    options = {"num_requests": 12, "num_sites": 2, "batch": 4}
    lm = synthetic_trace(folder / "lm.moeprof", **options)
    mt = synthetic_trace(folder / "mt.moeprof", stacks=("encoder", "decoder"), **options)
    return lm, mt


def test_pages_of_any_trace(tmp_path, traces, capsys):
    assert analysis.main([str(trace.path) for trace in traces] + ["-o", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "gating.html", "gating.md", "gating.json",
        "lm.csv", "lm-sweep.csv", "mt.csv", "mt-sweep.csv",
    }  # fmt: skip
    assert "gating.html" in capsys.readouterr().out
    html = (tmp_path / "gating.html").read_text()
    assert html.count("<svg") >= 4
    assert html.count("(the paper&#39;s Fig. 8)") == 2
    assert "12.875 rows per row" in html
    assert "421,888 blocks" in html
    assert "12.8" in (tmp_path / "gating.md").read_text()
    sweep = pd.read_csv(tmp_path / "mt-sweep.csv")
    assert sorted(sweep["value"].unique()) == list(SWEEP)
    data = json.loads((tmp_path / "gating.json").read_text())
    assert [trace["id"] for trace in data["traces"]] == ["lm", "mt"]


def test_one_trace_twice_and_bad_paths(tmp_path, traces, capsys):
    path = str(traces[0].path)
    assert analysis.main([path, path, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "lm-2.csv").exists()
    assert analysis.main([str(tmp_path / "nothing"), "-o", str(tmp_path)]) != 0
    assert "hint:" in capsys.readouterr().err


def test_traces_that_an_analysis_cannot_take(tmp_path, capsys):
    path = str(tmp_path / "t.moeprof")
    synthetic_trace(path, num_requests=12, num_sites=2, num_experts=[11, 13], expert_bytes=0)
    out = str(tmp_path / "out")
    assert analysis.main([path, "-o", out]) == 0
    assert balancing.main([path, "-o", out]) == 1
    assert "11 or 13 experts cannot be dealt" in capsys.readouterr().err
    assert buffering.main([path, "-o", out]) == 1
    error = capsys.readouterr().err
    assert "does not say how large an expert is" in error
    assert "hint: leave this trace out" in error


def test_published_numbers_are_what_the_code_gives():
    rows = {row.quantity: row for row in analysis.published()}
    found = [row for row in rows.values() if row.verdict == "reproduced from shapes"]
    assert len(found) >= 10
    for row in found:
        if row.published == "not printed":
            continue
        digits = row.published.replace(",", "").split()[0]
        places = len(digits.partition(".")[2])
        assert round(row.found, places) == float(digits), row.quantity


def test_gating_on_the_command_line(tmp_path, traces, capsys):
    path = str(traces[0].path)
    command = ["replay", "gating", path, "--values", "0.05,1"]
    assert main([*command, "--devices", "2", "--csv"]) == 0
    out = capsys.readouterr()
    table = pd.read_csv(io.StringIO(out.out))
    assert len(table) == 2 * 2 * 2
    assert "The weights are random" in out.err
    assert main(["-q", *command]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert out.out.splitlines()[0].split()[:3] == ["rule", "value", "stack"]
    target = tmp_path / "rows.csv"
    assert main([*command, "-o", str(target)]) == 0
    assert len(pd.read_csv(target)) == len(table)
    assert main([*command, "-o", str(target)]) == 1
    assert main([*command, "-o", str(target), "--force"]) == 0
    assert [each.name for each in tmp_path.iterdir() if "rows" in each.name] == ["rows.csv"]
    capsys.readouterr()
    assert main([*command, "-o", str(tmp_path / "no" / "rows.csv")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["replay", "gating", path, "--values", "a"]) == 2
    assert main(["replay", "gating", path, "--rule", "model"]) == 2
    assert "hint:" in capsys.readouterr().err


def test_balancing_on_the_command_line(traces, capsys):
    path = str(traces[0].path)
    command = ["replay", "balancing", path, "--devices", "4", "--planners", "contiguous,greedy"]
    assert main([*command, "--csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert {"contiguous", "greedy"} <= set(table["planner"])


def test_composing_is_compared_with_a_recording(traces):
    lm = traces[0]
    found = composing.comparison(lm, lm, batch_size=4)
    assert found["num_flipped"] == 0
    assert found["num_decisions"] > 0
    half = replace(lm.info, model=replace(lm.info.model, dtype="bfloat16"))
    lm.info, before = half, lm.info
    try:
        from moeprof.replay import compose

        assert any("0.4 %" in note for note in compose(lm).info.notes)
    finally:
        lm.info = before


def test_buffering_on_the_command_line(traces, capsys):
    path = str(traces[0].path)
    command = ["replay", "buffering", path, "--policies", "lru,min", "--capacities"]
    assert main([*command, "2,25%", "--csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert set(table["policy"]) == {"lru", "min"}
    assert main([*command, "0.25"]) != 0
    assert "hint:" in capsys.readouterr().err
