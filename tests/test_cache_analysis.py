"""The buffering page on a user's traces, and the verb that imports one."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_bigmoeonedge import SMALL

from analysis import buffering as analysis
from moeprof.cli import main
from moeprof.trace.synthetic import synthetic_trace


def test_pages_of_any_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"num_requests": 12, "num_sites": 2, "batch": 4}
    lm = synthetic_trace(tmp_path / "lm.moeprof", **options)  # type: ignore[arg-type]
    mt = synthetic_trace(tmp_path / "mt.moeprof", stacks=("encoder", "decoder"), **options)  # type: ignore[arg-type]
    out = tmp_path / "pages"
    assert analysis.main([str(lm.path), str(mt.path), "-o", str(out), "--devices", "2"]) == 0
    assert "buffering.html" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "buffering.html", "buffering.md", "buffering.json", "lm.csv", "lm-caches.csv", "mt.csv",
        "mt-caches.csv",
    }  # fmt: skip
    html = (out / "buffering.html").read_text()
    assert html.count("<svg") >= 3
    text = (out / "buffering.md").read_text()
    for published in ("2.251 GiB", "32.2 %", "1.474", "1.148"):
        assert published in text
    table = pd.read_csv(out / "lm.csv")
    assert set(table["policy"]) == set(analysis.POLICIES)
    assert table["capacity"].max() == 8
    data = json.loads((out / "buffering.json").read_text())
    assert [trace["id"] for trace in data["traces"]] == ["lm", "mt"]
    assert analysis.main([str(tmp_path / "nothing"), "-o", str(out)]) != 0


def test_import_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.route.csv").write_text(SMALL)
    assert main(["import", "bigmoeonedge", "tiny.route.csv"]) == 0
    assert capsys.readouterr().out.strip() == "tiny.moeprof"
    assert main(["check", "tiny.moeprof"]) == 0
    assert main(["import", "bigmoeonedge", "tiny.route.csv"]) != 0
    assert main(["import", "bigmoeonedge", "tiny.route.csv", "-o", "b.moeprof", "--force"]) == 0
    Path("bad.csv").write_text("nothing\n")
    assert main(["import", "bigmoeonedge", "bad.csv"]) == 3
    assert main(["import", "other", "bad.csv"]) == 2
