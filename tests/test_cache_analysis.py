"""The buffering page on a user's traces, and the verb that imports one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_bigmoeonedge import SMALL

import moeprof
from analysis import buffering as analysis
from moeprof.cli import main
from moeprof.reporting.buffering_sections import POLICIES
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace


def test_pages_of_any_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"num_requests": 12, "num_sites": 2, "batch": 4}
    lm = synthetic_trace(tmp_path / "lm.moeprof", **options)  # type: ignore[arg-type]
    mt = synthetic_trace(tmp_path / "mt.moeprof", stacks=("encoder", "decoder"), **options)  # type: ignore[arg-type]
    out = tmp_path / "pages"
    assert analysis.main([str(lm.path), str(mt.path), "-o", str(out), "--devices", "2"]) == 0
    assert "buffering.html" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "buffering.html", "buffering.md", "buffering.json",
        *(f"{name}{end}.csv" for name in ("lm", "mt")
          for end in ("", "-caches", "-placed", "-unplaced")),
    }  # fmt: skip
    html = (out / "buffering.html").read_text()
    assert html.count("<svg") >= 3
    for number in ("12a", "12b", "13"):
        assert len(re.findall(rf"<h4>[^<]*Fig\. {number}\)", html)) == 2
    text = (out / "buffering.md").read_text()
    for published in ("2.251 GiB", "32.2 %", "1.474", "1.148"):
        assert published in text
    table = pd.read_csv(out / "lm.csv")
    assert set(table["policy"]) == set(analysis.POLICIES)
    assert table["capacity"].max() == 8
    data = json.loads((out / "buffering.json").read_text())
    assert [trace["id"] for trace in data["traces"]] == ["lm", "mt"]
    assert data["comparison"]["title"] == "The founding paper's numbers on expert buffering"
    check_paper_figures(data["traces"][0]["sections"][0], out)
    assert analysis.main([str(tmp_path / "nothing"), "-o", str(out)]) != 0
    assert analysis.main([str(lm.path), "-o", str(out), "--devices", "0"]) == 2


def check_paper_figures(section: dict[str, Any], out: Path) -> None:
    """Holds Figs. 12a and 13 to the rows beside the page."""
    figures = {figure["id"]: figure for figure in section["figures"]}
    table = pd.read_csv(out / "lm.csv")
    own = table[(table["policy"] == "lru") & (table["phase"] == "decode")]
    trace = moeprof.open(out.parent / "lm.moeprof")
    passes = int((trace.steps["phase"] == "decode").sum())
    copies = figures["buffering-moved"]
    assert copies["figure_class"] == "estimate"
    lru = next(each for each in copies["panels"][-1]["series"] if each["label"] == "LRU")
    times_ms = own["bytes_moved"] / passes / 12e9 * 1e3
    assert [point[1] for point in lru["points"]] == pytest.approx(times_ms.tolist())
    for name, where in (("placed", "placed"), ("unplaced", "in order of ids")):
        caches = pd.read_csv(out / f"lm-{name}.csv")
        worst = caches[(caches["policy"] == "paper") & (caches["phase"] == "decode")]
        misses = 1 - worst.groupby("capacity")["hit_rate"].min()
        panel = figures["buffering-placed"]["panels"][-1]
        drawn = next(each for each in panel["series"]
                     if each["label"] == f"{POLICIES['paper']}, {where}")  # fmt: skip
        assert [point[1] for point in drawn["points"]] == pytest.approx(misses.tolist())


def test_no_placement_is_drawn_where_there_is_none(tmp_path: Path) -> None:
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, num_sites=1, num_experts=4)
    section = analysis.studied(str(trace.path), 1).section
    assert "buffering-placed" not in {figure["id"] for figure in section["figures"]}
    assert any("Fig. 12a is not drawn: the experts" in note for note in section["notes"])
    token = HandToken(request=0, position=0, experts=[[0, 1]], phase="prefill")
    short = hand_trace(tmp_path / "short.moeprof", [[token]])
    notes = analysis.studied(str(short.path), 1).section["notes"]
    assert any("12a is not drawn: the decoder ran 1 forward passes" in note for note in notes)


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
