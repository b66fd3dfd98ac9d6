"""`python -m analysis.balancing` on a user's trace: page, data and tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from moeprof.replay import balancing
from moeprof.reporting.studies import Study
from moeprof.trace.reader import open_trace
from moeprof.trace.synthetic import synthetic_trace


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    return importlib.import_module("analysis.balancing")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "My run.moeprof"
    synthetic_trace(
        path, num_requests=24, num_sites=2, num_experts=12, prompt_tokens=60, executed=False
    )
    return path


def test_page_and_tables(module, trace, tmp_path, capsys):
    counts = tmp_path / "counts.csv"
    pd.DataFrame(
        [
            {"domain": domain, "layer": 0, "expert": expert, "count": 1 + (expert + shift) % 4}
            for shift, domain in enumerate(("a", "b"))
            for expert in range(8)
        ]
    ).to_csv(counts, index=False)
    out = tmp_path / "out"
    assert module.main([str(trace), "-o", str(out), "--counts", str(counts)]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).suffix for path in written[:3]] == [".json", ".md", ".html"]
    assert {Path(path).suffix for path in written[3:]} == {".csv"}
    data = json.loads((out / "balancing.json").read_text())
    (section,) = data["traces"][0]["sections"]
    assert section["title"] == "Placing experts on 6 devices"
    kinds = {figure["kind"] for figure in section["figures"]}
    assert kinds == {"meters", "layers", "lines"}
    titles = [table["title"] for table in section["tables"]]
    assert data["comparison"]["title"] == "Published numbers on load balancing"
    quantities = [row["quantity"] for row in data["comparison"]["rows"]]
    assert "Max Load, Avg Max Load: greedy, decoder of synthetic" in quantities
    assert "balancing-loads-decoder" in {figure["id"] for figure in section["figures"]}
    assert "counts: placements between domains, 4 devices, from counts" in titles
    page = (out / "balancing.html").read_text()
    assert "(the paper&#39;s Fig. 14)" in page
    table = pd.read_csv(out / "my-run.csv")
    assert set(table["planner"]) >= {"contiguous", "eplb", "second_moment", "robust"}
    for name in module.TABLES:
        assert (out / f"my-run-{name}.csv").exists()


def test_published_example_is_reproduced(module):
    rows = module.published([])["rows"]
    assert rows[0]["found"] == "all equal"
    assert rows[1]["found"] == "0.75"


def test_errors_are_one_line(module, tmp_path, capsys):
    assert module.main([str(tmp_path / "nothing.moeprof")]) != 0
    assert "hint:" in capsys.readouterr().err
    assert module.main(["--devices", "0"]) == 2
    assert "0 devices" in capsys.readouterr().err


def test_devices_divide_the_experts(module, trace):
    opened = open_trace(trace)
    assert module.devices_for(opened, 8) == 6
    assert module.devices_for(opened, 3) == 3


def test_only_a_language_model_stands_beside_the_papers(module, trace, tmp_path):
    mt = synthetic_trace(tmp_path / "mt.moeprof", num_requests=24, stacks=("encoder", "decoder"))
    for opened, printed in ((open_trace(trace), {"both more than 0.6"}), (mt, set())):
        result = balancing(opened, 2, planners=["contiguous", "eplb"])
        study = Study(trace=opened, result=result, section={}, frames={})
        rows = module.published([study])["rows"]
        mine = [row for row in rows if "of synthetic" in row["quantity"]]
        assert len(mine) == 2 * len(opened.stacks)
        assert {row["published"] for row in mine} == {"not printed"} | printed
        first = result.table.iloc[0]
        assert mine[0]["found"] == f"{first['max_load']:.3f}, {first['avg_max_load']:.3f}"
