"""The measured gain over EPLB: the kept result, and the script that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis import balancing_gain
from moeprof.replay import compose
from moeprof.replay.balance import balancing
from moeprof.trace.synthetic import synthetic_trace

KEPT = Path(__file__).parents[1] / "analysis" / "results" / "balancing-gain-zoo-lm.json"


def test_the_kept_result_lies_above_the_goal():
    kept = json.loads(KEPT.read_text())
    rows = kept["rows"]
    assert kept["finding"] == balancing_gain.sentence(rows)
    chosen = {(row["batch"], row["num_devices"]): row for row in rows if row["chosen"]}
    row = chosen[1, 8]
    assert row["figure_class"] == "exact" and row["mean_tokens"] >= 256
    assert row["gain_over_eplb_low"] > balancing_gain.GOAL
    assert row["uniform_max_over_mean"] < row["mean_max_over_mean"]


def test_passages_are_drawn_once_each():
    found = balancing_gain.passages(60)
    assert found == balancing_gain.passages(60)
    assert [each["domain"] for each in found].count("code") == 30
    assert len({each["text"] for each in found}) == len(found) == 60
    assert len({each["id"] for each in found}) == 60


def test_a_module_under_two_names_is_one_passage(monkeypatch):
    text = {name: name * balancing_gain.PASSAGE_CHARS for name in "abc"}
    modules = [("first", text["a"]), ("second", text["b"]), ("third", text["a"] + "more")]
    monkeypatch.setattr(balancing_gain, "_modules", lambda: iter(modules))
    monkeypatch.setattr(balancing_gain, "_topics", lambda: iter([("one", text["c"])]))
    found = balancing_gain.passages(10)
    assert sorted(each["id"] for each in found) == ["code-first", "code-second", "manual-one"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("traces") / "read",
        num_requests=48,
        num_sites=1,
        num_experts=16,
        top_k=2,
        skew=0.8,
        domain_share=1.0,
        batch=1,
        prompt_tokens=300,
        output_tokens=0,
        length_spread=0.0,
        executed=False,
        timed=False,
    )


def test_rows_are_those_of_balancing(trace):
    rows = balancing_gain.gains(trace, [4])
    assert {row["batch"] for row in rows} == set(balancing_gain.BATCHES)
    table = balancing(compose(trace, "static", max_batch=2), 4, planners=("peak", "eplb")).table
    expected = table.set_index("planner")["gain_over_eplb_low"]["peak"]
    (row,) = [row for row in rows if row["batch"] == 2 and row["planner"] == "peak"]
    assert row["gain_over_eplb_low"] == pytest.approx(expected)
    for batch in balancing_gain.BATCHES:
        assert sum(row["chosen"] for row in rows if row["batch"] == batch) == 1


def test_sentences():
    row = {
        "planner": "peak", "num_devices": 8, "chosen": True, "num_dispatches": 40,
        "mean_tokens": 300.0, "gain_over_eplb": 0.08, "gain_over_eplb_low": 0.06,
        "gain_over_eplb_high": 0.1,
    }  # fmt: skip
    said = balancing_gain.sentence([{**row, "chosen": False}, row])
    assert "8.0% (95%: 6.0 to 10.0%) less than EPLB" in said and said.endswith("reached.")
    assert balancing_gain.sentence([{**row, "gain_over_eplb_low": 0.04}]).endswith("missed.")
    assert balancing_gain.sentence([{**row, "gain_over_eplb_low": None}]).startswith("Not enough")


def test_the_command(tmp_path, capsys):
    pytest.importorskip("torch")
    command = ["--passages", "16", "--devices", "4", "-o", str(tmp_path)]
    assert balancing_gain.main(command) == 0
    found = json.loads((tmp_path / "balancing-gain-zoo-lm.json").read_text())
    assert found["num_passages"] == 16
    assert found["finding"] == "Not enough passages for an interval."
    assert {row["gain_over_eplb_low"] for row in found["rows"]} == {None}
    assert balancing_gain.main([*command, "--model", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error:")
