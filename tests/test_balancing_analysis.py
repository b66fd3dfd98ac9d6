"""`python -m analysis.balancing` on a user's trace: page, data and tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

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
    assert [Path(path).suffix for path in written] == [".json", ".md", ".html"]
    data = json.loads((out / "balancing.json").read_text())
    (section,) = data["traces"][0]["sections"]
    assert section["title"] == "Placing experts on 6 devices"
    kinds = {figure["kind"] for figure in section["figures"]}
    assert kinds == {"meters", "layers", "lines"}
    titles = [table["title"] for table in section["tables"]]
    assert "Published numbers on load balancing" in titles
    assert "counts: placements between domains, 4 devices, from counts" in titles
    page = (out / "balancing.html").read_text()
    assert "the paper" in page
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
    opened = module.open_trace(trace)
    assert module.devices_for(opened, 8) == 6
    assert module.devices_for(opened, 3) == 3
