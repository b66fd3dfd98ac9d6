"""Visits by the speed of the host: ratios by hand, and that no goal knows of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import prediction_quality as quality
from analysis.host_speeds import by_host_speed, visit_rows
from analysis.live_prediction_words import (
    host_speed_findings,
    host_speed_rows,
    not_measured_notes,
    regret_findings,
)

PROBES = (2.0, 2.0, 2.6, 4.0)


def run(folder, machine, factors, probes=PROBES, settings=("lru:25%", "min:25%")):
    """Predicts 10 ms; each visit, of one repetition, takes so many times that in every step."""
    said = {(name, each): 10.0 for name in settings for each in made.PERCENTILES}
    predictions = made.predicted_file(folder, "a", said, machine=machine)
    times = {name: [[10.0 * each] * made.NUM_STEPS for each in factors] for name in settings}
    return made.verified_file(predictions, machine, times, probes_ms=probes), predictions


def read(*files):
    return quality.read_judgements(*zip(*files, strict=True))


def test_ratios_by_the_speed_of_the_host(tmp_path):
    found = by_host_speed(read(run(tmp_path, "H200", (1.0, 1.04, 1.2, 1.6))))
    assert (found["visits"], found["slowest_bin"], found["percentile"]) == (8, 2, 50)
    fast, between, slow = found["groups"]
    assert [each["visits"] for each in found["groups"]] == [4, 2, 2]
    assert {each["settings"] for each in found["groups"]} == {2}
    assert fast["ratio"] == pytest.approx(1.02) and fast["ratio_high"] == pytest.approx(1.04)
    assert (fast["inside"], fast["stated"], fast["median_probe_ms"]) == (4, 4, 2.0)
    assert (between["ratio"], between["inside"]) == (pytest.approx(1.2), 0)
    assert (slow["ratio"], slow["above"], slow["up_to"]) == (pytest.approx(1.6), 1.5, None)


def test_repetitions_of_a_visit_are_one_visit(tmp_path):
    path, predictions = run(tmp_path, "H200", (1.0, 3.0, 1.2, 1.4))
    content = json.loads(path.read_text())
    for times in content["step_times"].values():
        times["visits"] = [
            {"round": 1, "begun_s": 0.0, "probe_ms": 2.0, "repetitions": 3},
            {"round": 2, "begun_s": 9.0, "probe_ms": 4.0, "repetitions": 1},
        ]
    path.write_text(json.dumps(content))
    rows = visit_rows(read((path, predictions)))
    # The median over the three of the first visit, then over steps.
    assert rows["ratio"].tolist() == pytest.approx([1.2, 1.4, 1.2, 1.4])
    assert rows["slowdown"].tolist() == pytest.approx([1, 2, 1, 2])
    assert rows["round"].tolist() == [1, 2, 1, 2]


def test_visits_take_what_is_left_of_them(tmp_path):
    path, predictions = run(tmp_path, "H200", (1.0, 1.04, 1.2, 1.6))
    content = json.loads(path.read_text())
    (one, two) = content["step_times"].values()
    half = made.NUM_STEPS // 2
    for own in (one, two):
        # Of the third visit the slower half is set aside, of the last one nothing is left.
        own["measured_ms"][2][:half] = [19.0] * half
        own["visits"] = [{**own["visits"][0], "repetitions": 2}, *own["visits"][2:]]
        own["set_aside"] = [list(range(half)), [], list(range(half)), list(range(made.NUM_STEPS))]
    rows = content["rows"]
    kept = np.array(one["measured_ms"])
    for places, times in zip(one["set_aside"], kept, strict=True):
        times[places] = np.nan
    for row in rows:
        row["measured_ms"] = np.percentile(np.nanmedian(kept, axis=0), row["percentile"])
    path.write_text(json.dumps(content))
    found = visit_rows(read((path, predictions)))
    # 10.4 in a half and 10.2 in the other; all 19 or 12, as the half was never quiet; and all 16.
    assert found["ratio"].tolist() == pytest.approx([1.03, (1.9 + 1.2) / 2, 1.6] * 2)


def test_each_run_has_its_own_full_speed(tmp_path):
    files = [
        run(tmp_path, "H100", (1.0, 1.0, 1.0, 1.0), probes=(8.0,) * 4),
        run(tmp_path, "H200", (1.0, 1.0, 1.0, 2.0)),
    ]
    groups = by_host_speed(read(*files))["groups"]
    assert [(each["machine"], each["above"], each["visits"]) for each in groups] == [
        ("H100", 0.0, 8), ("H200", 0.0, 4), ("H200", 1.15, 2), ("H200", 1.5, 2),
    ]  # fmt: skip


def test_without_probes_there_is_nothing_and_no_goal_changes(tmp_path):
    path, predictions = run(tmp_path, "H200", (1.0, 1.04, 1.2, 1.6))
    probed = quality.pooled(read((path, predictions)))
    content = json.loads(path.read_text())
    for times in content["step_times"].values():
        for visit in times["visits"]:
            del visit["probe_ms"]
    path.write_text(json.dumps(content))
    plain = quality.pooled(read((path, predictions)))
    assert plain["by_host_speed"] is None and probed["by_host_speed"] is not None
    assert host_speed_findings(plain) == [] and host_speed_rows(plain).empty
    same = ("counts", "all", "groups", "regret", "goals", "not_measured")
    assert {key: probed[key] for key in same} == {key: plain[key] for key in same}


def test_words_and_rows_say_what_was_found(tmp_path):
    found = quality.pooled(read(run(tmp_path, "H200", (1.0, 1.04, 1.2, 1.6))))
    (finding,) = host_speed_findings(json.loads(json.dumps(found)))
    assert "In 2 of 8 visits of a setting the host was slow" in finding.text
    assert "(within 1.15 times), then where it was slow: on H200 " in finding.text
    assert "model a 1.02 and 1.60; inside the stated interval 4 of 4 and 0 of 2." in finding.text
    rows = host_speed_rows(found)
    assert rows["probe_over_its_fastest"].tolist() == ["up to 1.15", "1.15 to 1.5", "over 1.5"]
    assert rows["inside_share"].tolist() == [1, 0, 0]


def test_costly_choices_are_named(tmp_path):
    names = ("lru:25%", "min:25%")
    said = {(name, 50): 10.0 + index for index, name in enumerate(names)}
    predictions = made.predicted_file(tmp_path, "a", said, machine="H200")
    times = {
        name: [[ms] * made.NUM_STEPS] * 4 for name, ms in zip(names, (15.0, 10.0), strict=True)
    }
    path = made.verified_file(predictions, "H200", times)
    (finding,) = regret_findings(quality.pooled(read((path, predictions))))
    assert finding.text == (
        "1 of 1 choices cost more than 10% over the best measured: lru:25% instead of min:25% "
        "(a.moeprof, H200, p50) 50%. In 1 of them both settings are known to 2%."
    )
    # Of a single visit nobody knows how far another would have been off.
    once = made.verified_file(
        predictions, "H200", {name: each[:1] for name, each in times.items()}, probes_ms=(2.0,)
    )
    (finding,) = regret_findings(json.loads(json.dumps(quality.pooled(read((once, predictions))))))
    assert "In 0 of them both" in finding.text


def test_what_was_not_reached_in_time_is_told_from_what_was_not_run(tmp_path):
    said = {(name, 50): 10.0 for name in ("lru:25%", "lru:50%", "min:50%", "min:25%")}
    predictions = made.predicted_file(tmp_path, "a", said, machine="H200")
    path = made.verified_file(predictions, "H200", {"lru:25%": made.step_times(10, 0)})
    content = json.loads(path.read_text())
    content["notes"].append("1 of 4 predicted settings run, no time for lru:50%, min:50%")
    path.write_text(json.dumps(content))
    found = quality.pooled(read((path, predictions)))
    assert {each["setting"]: each["why"] for each in found["not_measured"]} == {
        "lru:50%": "no time was left", "min:50%": "no time was left", "min:25%": "not run",
    }  # fmt: skip
    (note,) = not_measured_notes(found)
    assert note.startswith("3 settings were predicted for a machine and not measured there: ")
    assert "2 of a on H200, no time was left (lru:50%, min:50%); 1 of a on H200, not run" in note
    assert not_measured_notes({"not_measured": []}) == [
        "Every setting that was predicted was measured."
    ]
