"""Pooled predictions: arithmetic by hand, what is refused, and that the kept figures are theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import judgements
from analysis import live_prediction_parts as parts
from analysis import prediction_quality as quality
from analysis.live_prediction_words import aside_notes, coverage_findings
from moeprof.errors import MoeprofError
from moeprof.live.verdicts import binomial_interval


def pooled(verified, predicted):
    return quality.pooled(quality.read_judgements(verified, predicted))


def goals_of(found):
    return {goal["quantity"].split(",")[0]: goal for goal in found["goals"]}


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def times(content):
    return content["step_times"]["unbuffered"]["measured_ms"]


def aside(content, places):
    content["step_times"]["unbuffered"]["set_aside"] = places


def test_what_is_right_everywhere_is_counted_so(tmp_path):
    found = pooled(*made.made_up(tmp_path))
    settings = made.settings_of()
    counts = found["counts"]
    assert counts["settings"] == 3 * len(settings)
    assert (counts["models"], counts["policies"], counts["capacities"]) == (3, 2, 2)
    assert counts["machines"] == 2 and counts["not_to_tolerance"] == 0
    number = 2 * 2 * 3 * len(settings)
    assert found["all"]["predictions"] == found["all"]["inside"] == len(found["rows"]) == number
    assert found["all"]["coverage_low"] == binomial_interval(number, number)[0]
    assert found["all"]["absolute_errors"]["model"]["0.5"] < 0.02
    # Said twice and thrice too high, on what is right within a percent.
    assert found["all"]["absolute_errors"]["bytes over bandwidth"]["0.5"] == pytest.approx(
        1, abs=0.05
    )
    assert found["all"]["absolute_errors"]["the mean"]["0.5"] == pytest.approx(2, abs=0.08)
    by = {group["of"]: group["predictions"] for group in found["groups"]}
    assert by["H100"] == by["H200"] == by["50"] == by["99"] == number / 2
    assert by["gating"] == by["unbuffered"] == 12 and by["miss: load"] == 48
    assert by["model a"] == number / 3


def test_goals_fall_as_they_do(tmp_path):
    good = goals_of(pooled(*made.made_up(tmp_path)))
    (tmp_path / "bad").mkdir()
    bad = goals_of(pooled(*made.made_up(tmp_path / "bad", off=1.5)))
    scope = good["Settings predicted"]
    assert scope["met"] is False and scope["found"].startswith("18 over 3 models, 2 policies")
    # All inside is too many, and too few to say so.
    assert good["Measurements inside their stated 90% interval"]["met"] is False
    assert good["Median error of a predicted percentile"]["met"] is True
    naive = "The same over that of bytes over bandwidth and the mean"
    assert good[naive]["met"] is True
    assert good["Percentiles measured to 2%"]["met"] is True
    assert bad["Median error of a predicted percentile"]["met"] is False
    assert bad["Measurements inside their stated 90% interval"]["found"].startswith("0% of 72")
    assert bad[naive]["met"] is True and bad[naive]["found"].startswith("0.2")


def test_coverage_and_regret_by_hand(tmp_path):
    names = list(made.settings_of())
    times = {name: [[10.0] * made.NUM_STEPS] * 4 for name in names}
    times["lru:25%"] = [[12.0] * made.NUM_STEPS] * 4
    said = {(name, each): 10.0 for name in names for each in (50, 99)}
    # lru is recommended at 25 % and costs 20 % more than min; elsewhere both cost the same.
    said["lru:25%", 50] = said["lru:25%", 99] = 9.0
    said["min:50%", 50] = 20.0
    predictions = made.predicted_file(tmp_path, "a", said)
    path = made.verified_file(predictions, "H100", times)
    found = pooled([path], [predictions])
    assert found["all"]["inside"] == 12 - 3 and found["all"]["below"] == 1
    assert found["all"]["above"] == 2
    low, high = found["all"]["coverage_low"], found["all"]["coverage_high"]
    assert (low, high) == binomial_interval(9, 12)
    # Of six settings one has both percentiles outside, one a single one; one machine and trace,
    # which says nothing. Six are too few for an interval.
    known = found["coverage_by_cluster"]
    assert (known["cases"], known["cases_alike"]) == (6, 5)
    (by_setting,) = known["intervals"]
    assert (by_setting["by"], by_setting["clusters"]) == ("setting", 6)
    assert by_setting["shares"] == [0, 0.5, 1, 1, 1, 1]
    assert (by_setting["low"], by_setting["high"]) == (0, 1)
    said = coverage_findings(json.loads(json.dumps(found)))[0].text
    assert "in 5 of 6 cases all percentiles" in said
    assert "By setting the 6 shares are 0%, 50%, 100%, 100%, 100%, 100%: too few for an" in said
    assert "Of the 3 outside 1 were measured faster than the stated interval and 2 slower" in said
    (row, *_) = parts.prediction_readme_rows({"command": "python", **found})
    assert row[1].endswith("); by setting 0% to 100% (the 6 shares)")
    assert found["regret"]["choices"] == 2 * 3
    assert found["regret"]["worst"] == pytest.approx(0.2) and found["regret"]["median"] == 0
    worst = [row for row in found["regret"]["rows"] if row["regret"] > 0]
    assert {(row["recommended"], row["best"]) for row in worst} == {("lru:25%", "min:25%")}
    assert [row["percentile"] for row in worst] == [50, 99]
    assert goals_of(found)["Regret of the setting recommended at equal memory"]["met"] is False
    errors = np.abs([0, 0, -0.25, -0.25, 0, 0, 0, 0, 1, 0, 0, 0])
    assert found["all"]["absolute_errors"]["model"]["0.9"] == pytest.approx(
        np.quantile(errors, 0.9)
    )


def test_raw_percentiles_stand_beside(tmp_path):
    # One repetition in four is slow: the steps' medians do not see it, raw p99 does.
    predictions = made.predicted_file(
        tmp_path, "a", {("unbuffered", each): 10.0 for each in (50, 99)}
    )
    times = [[10.0] * made.NUM_STEPS] * 3 + [[30.0] * made.NUM_STEPS]
    path = made.verified_file(predictions, "H100", {"unbuffered": times})
    found = pooled([path], [predictions])
    assert [row["measured_ms"] for row in found["rows"]] == [10.0, 10.0]
    assert [row["raw_ms"] for row in found["rows"]] == [10.0, 30.0]
    assert (found["all"]["inside"], found["all"]["raw_inside"]) == (2, 1)
    assert (found["all"]["raw_below"], found["all"]["raw_above"]) == (0, 1)
    said = coverage_findings(json.loads(json.dumps(found)))[0].text
    assert said.endswith("1 of 2, p50 1 of 1, p99 0 of 1: 0 faster, 1 slower.")
    assert found["all"]["raw_median_error"] == pytest.approx((0 + 2 / 3) / 2)


def test_what_was_set_aside_is_in_no_error(tmp_path):
    # Two repetitions of four are slow, from start to end in one, in the last ten steps in another.
    predictions = made.predicted_file(
        tmp_path, "a", {("unbuffered", each): 10.0 for each in (50, 99)}
    )
    late = list(range(made.NUM_STEPS - 10, made.NUM_STEPS))
    times = np.full((4, made.NUM_STEPS), 10.0)
    times[1] = times[2, late] = 18.0
    set_aside = {"unbuffered": [[], list(range(made.NUM_STEPS)), late, []]}
    given = {"unbuffered": times.tolist()}
    path = made.verified_file(predictions, "H100", given, set_aside=set_aside)
    found = pooled([path], [predictions])
    assert [row["measured_ms"] for row in found["rows"]] == [10.0, 10.0]
    assert [row["raw_ms"] for row in found["rows"]] == [10.0, 18.0]
    # With all of them the median of the last ten steps lies between.
    assert [row["whole_ms"] for row in found["rows"]] == [10.0, 14.0]
    whole = found["all"]
    assert (whole["inside"], whole["whole_inside"], whole["raw_inside"]) == (2, 1, 1)
    assert whole["absolute_errors"]["model"]["0.9"] == 0
    assert whole["whole_median_error"] == pytest.approx((0 + 4 / 14) / 2)
    aside = (made.NUM_STEPS + 10) / (4 * made.NUM_STEPS)
    assert [row["aside_share"] for row in found["rows"]] == pytest.approx([aside] * 2)
    assert found["sources"][0]["aside_share"] == pytest.approx(aside)
    (note,) = aside_notes(json.loads(json.dumps(found)))
    assert "however long they took: 31% of a on H100. With nothing set aside 1 of 2 " in note
    assert note.endswith("would lie inside and the median error be 14.3%.")
    # Of the last ten steps two times are left.
    assert [row["measured_spread"] for row in found["rows"]] == [None, None]
    edited(path, lambda c: c["step_times"]["unbuffered"].pop("set_aside"))
    with pytest.raises(MoeprofError, match=r"p99 says 10.0 ms, its steps say otherwise"):
        pooled([path], [predictions])
    unwatched = made.verified_file(predictions, "H100", given)
    plain = pooled([unwatched], [predictions])
    assert plain["sources"][0]["aside_share"] is None and aside_notes(plain) == []
    assert [row["aside_share"] for row in plain["rows"]] == [0, 0]
    assert [row["measured_ms"] for row in plain["rows"]] == [10.0, 14.0]
    assert [row["whole_ms"] for row in plain["rows"]] == [10.0, 14.0]


def test_parts_are_joined_and_what_is_missing_is_said(tmp_path):
    (whole,), (predictions,) = made.made_up(tmp_path, traces=["a"], machines=["H100"])
    times = {
        name: each["measured_ms"]
        for name, each in json.loads(whole.read_text())["step_times"].items()
    }
    whole.unlink()
    one = made.verified_file(predictions, "H100", {"lru:25%": times["lru:25%"]}, part="-1")
    two = made.verified_file(
        predictions, "H100", {"min:25%": times["min:25%"], "unbuffered": None}, part="-2"
    )
    found = pooled([one, two], [predictions])
    assert found["all"]["predictions"] == 4 and found["regret"]["choices"] == 2
    missing = {each["setting"]: each["why"] for each in found["not_measured"]}
    assert missing.pop("unbuffered") == "no room"
    assert set(missing) == {"lru:50%", "min:50%", "gating:dynamic"}
    assert set(missing.values()) == {"not run"}
    again = made.verified_file(predictions, "H100", {"lru:25%": times["lru:25%"]}, part="-3")
    with pytest.raises(MoeprofError, match=r"lru:25% .* was measured .* and in .*-3.json"):
        pooled([one, two, again], [predictions])


def test_times_that_spread_are_not_known(tmp_path):
    names = ["lru:25%"]
    predictions = made.predicted_file(tmp_path, "a", {("lru:25%", each): 10.0 for each in (50, 99)})
    loose = [[10.0 * (1 + n / 4)] * made.NUM_STEPS for n in range(4)]
    path = made.verified_file(predictions, "H100", dict.fromkeys(names, loose))
    found = pooled([path], [predictions])
    assert found["counts"]["not_to_tolerance"] == 2
    assert goals_of(found)["Percentiles measured to 2%"]["met"] is False
    assert found["regret"]["median"] is None
    assert goals_of(found)["Regret of the setting recommended at equal memory"]["met"] is None


def test_a_trace_is_named_without_its_machine():
    for name, machine, said in (
        ("predicted-qwen3-h100.json", "NVIDIA H100 80GB HBM3", "qwen3"),
        ("predicted-twin-mt-h200.json", "NVIDIA H200", "twin-mt"),
        ("predicted-twin-mt.json", "NVIDIA H200", "twin-mt"),
        ("predicted-qwen3-h100.json", "NVIDIA H200", "qwen3-h100"),
        ("predicted-h200.json", "NVIDIA H200", "h200"),
    ):
        assert judgements.trace_named(name, machine) == said


def test_each_machine_has_predictions_of_its_own(tmp_path):
    times = {"lru:25%": made.step_times(10, 0)}
    files = []
    for machine, said in (("H100", 10.0), ("H200", 12.0)):
        predictions = made.predicted_file(
            tmp_path, "a", {("lru:25%", each): said for each in made.PERCENTILES}, machine=machine
        )
        files.append((made.verified_file(predictions, machine, times), predictions))
    found = pooled(*zip(*files, strict=True))
    assert (found["counts"]["settings"], found["counts"]["machines"]) == (1, 2)
    assert {(row["trace"], row["machine"], row["predicted_ms"]) for row in found["rows"]} == {
        ("a", "H100", 10.0), ("a", "H200", 12.0),
    }  # fmt: skip
    assert [each["machine"] for each in found["regret"]["by_machine"]] == ["H100", "H200"]
    # What another file predicted of the same routing is measured once too.
    other = made.predicted_file(tmp_path, "a-more", {("lru:25%", 50): 11.0})
    content = json.loads(other.read_text())
    content["facts"]["trace"] = "a.moeprof"
    other.write_text(json.dumps(content))
    again = made.verified_file(other, "H200", times)
    with pytest.raises(MoeprofError, match=r"lru:25% of a.moeprof was measured on H200 in"):
        pooled([files[1][0], again], [files[1][1], other])


def test_visits_widen_what_is_known_and_probes_are_kept(tmp_path):
    predictions = made.predicted_file(tmp_path, "a", {("lru:25%", each): 10.0 for each in (50, 99)})
    times = {"lru:25%": made.step_times(10, 0)}
    path = made.verified_file(predictions, "H100", times)
    alone = pooled([path], [predictions])
    assert alone["sources"][0]["host_probe_ms"] is None
    path = made.verified_file(predictions, "H100", times, probes_ms=(1.0, 2.0, 2.5, 9.0))
    found = pooled([path], [predictions])
    assert found["sources"][0]["host_probe_ms"] == {
        "visits": 4, "least": 1.0, "median": 2.25, "most": 9.0,
    }  # fmt: skip
    for one, two in zip(alone["rows"], found["rows"], strict=True):
        assert one["measured_ms"] == two["measured_ms"]
        assert one["measured_spread"] < two["measured_spread"]
    edited(path, lambda c: c["step_times"]["lru:25%"]["visits"].pop())
    with pytest.raises(MoeprofError, match=r"damaged.*visits of 3 repetitions"):
        pooled([path], [predictions])


def test_what_ran_beside_is_said_on_the_page(tmp_path):
    (one, two), predicted = made.made_up(tmp_path, traces=["a"])
    edited(two, lambda c: c.update(beside="another process used the host"))
    found = pooled([one, two], predicted)
    assert ["beside" in source for source in found["sources"]] == [False, True]
    page = parts.predictions_part({"command": "python", **found})
    assert page.data["banners"] == [
        "While this was measured on H200, another process used the host."
    ]


def test_nothing_measured_is_no_goal_reached(tmp_path):
    predictions = made.predicted_file(tmp_path, "a", {("unbuffered", 50): 10.0})
    path = made.verified_file(predictions, "H100", {"unbuffered": None})
    found = pooled([path], [predictions])
    assert not any(goal["met"] for goal in found["goals"])
    assert found["not_measured"][0]["why"] == "no room"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(kind="other"), "not from moeprof verify"),
        (lambda c: c.pop("step_times"), "lacks step_times"),
        (lambda c: c["rows"][0].pop("measured_ms"), "damaged"),
        (lambda c: c["rows"][0].update(measured_ms=1.0), "its steps say otherwise"),
        (lambda c: c["rows"][0].update(measured_ms=None), "steps and no time"),
        (lambda c: c["step_times"].pop("unbuffered"), "no steps"),
        (lambda c: c["step_times"]["unbuffered"]["steps"].pop(), "not one per repetition and step"),
        (lambda c: aside(c, [[made.NUM_STEPS], [], [], []]), "damaged.*are set aside, of 40"),
        (lambda c: aside(c, [[], [-1], [], []]), "damaged.*are set aside, of 40"),
        (lambda c: aside(c, [[], ["3"], [], []]), "damaged.*are set aside, of 40"),
        (lambda c: aside(c, [[0], [0]]), "damaged"),
        (lambda c: aside(c, None), "damaged"),
        (lambda c: times(c)[2].__setitem__(7, None), "damaged.*a time is missing"),
        (lambda c: c["rows"][0].update(repetitions=3), "not as many repetitions"),
        (lambda c: c["rows"][0].update(predicted_ms=1.0), "none of predicted-a.json says"),
        (lambda c: c["rows"][0].update(high_ms=None), "none of predicted-a.json says"),
        (lambda c: c["rows"][0].update(device_bytes=1), "none of predicted-a.json says"),
        (lambda c: c["rows"].pop(0), "lacks p50 of unbuffered, which was predicted and measured"),
        (
            lambda c: c.update(rows=[row for row in c["rows"] if row["percentile"] == 50]),
            "lacks p99 of unbuffered, which was predicted",
        ),
        (
            lambda c: c.update(rows=[row for row in c["rows"] if row["setting"] != "lru:25%"]),
            "lacks p50 of lru:25%, which was predicted and measured",
        ),
        (lambda c: c.update(rows=[]), "lacks p50 of unbuffered"),
        (lambda c: c["rows"].append(c["rows"][3]), "has 2 rows of lru:25% p99"),
        (lambda c: c["rows"].extend(3 * c["rows"]), "has 4 rows of unbuffered p50"),
        (
            lambda c: c["step_times"].update({"lru:12%": c["step_times"]["lru:25%"]}),
            "measured lru:12%, which was not predicted",
        ),
        (lambda c: c["rows"][2].update(judged_hit_rate=0.9), "none of predicted-a.json says"),
        (lambda c: c["rows"][2].pop("judged_hit_rate"), "none of predicted-a.json says"),
        (lambda c: c["rows"][2].update(hit_rate=0.5), "none of predicted-a.json says"),
        (lambda c: c.update(date="2026-01-01T12:00:00+00:00"), "not in this order"),
        (lambda c: c.update(date=made.PREDICTED), "not in this order"),
        (lambda c: c.update(earlier_runs=[{"date": made.PREDICTED}]), "not in this order"),
        (lambda c: c.update(earlier_runs=[{"date": None}]), "no date"),
        (lambda c: c.update(date="yesterday"), "no date"),
        (lambda c: c.update(date=None), "no date"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_was_not_predicted_is_refused(tmp_path, change, said):
    (path,), predicted = made.made_up(tmp_path, traces=["a"], machines=["H100"])
    edited(path, change)
    with pytest.raises(MoeprofError, match=said) as caught:
        pooled([path], predicted)
    assert "\n" not in caught.value.message


def test_a_setting_that_was_predicted_twice_is_refused(tmp_path):
    # Whichever way predictions came to say it twice, it would count twice.
    (path,), (predictions,) = made.made_up(tmp_path, traces=["a"], machines=["H100"])
    edited(predictions, lambda c: c.update(rows=[*c["rows"], c["rows"][0]]))
    with pytest.raises(MoeprofError, match=r"predicted-a\.json .*has 2 rows of unbuffered p50"):
        pooled([path], [predictions])


def test_hit_rates_say_of_which_steps_they_are(tmp_path):
    files = made.made_up(tmp_path, traces=["a", "b"], machines=["H100"])
    # Earlier predictions have the rate of every step that runs.
    for path in (files[0][1], files[1][1]):
        edited(
            path,
            lambda c: [row.update(hit_rate=row.pop("judged_hit_rate")) for row in c["rows"]],
        )
    rows = {(row["trace"], row["setting"]): row for row in pooled(*files)["rows"]}
    for trace, known, other in (
        ("a", "judged_hit_rate", "every_step_hit_rate"),
        ("b", "every_step_hit_rate", "judged_hit_rate"),
    ):
        assert rows[trace, "lru:25%"][known] == 0.5 and rows[trace, "lru:25%"][other] is None


def test_repetitions_of_a_visit_are_not_taken_for_independent(tmp_path):
    (path,), predicted = made.made_up(tmp_path, traces=["a"], machines=["H100"])

    def spread():
        rows = pooled([path], predicted)["rows"]
        return {(row["setting"], row["percentile"]): row["measured_spread"] for row in rows}

    def visited(counts):
        visits = [{"round": n, "repetitions": count} for n, count in enumerate(counts, 1)]
        return lambda content: content["step_times"]["unbuffered"].update(visits=visits)

    before = spread()
    edited(path, visited([2, 2]))
    after = spread()
    for percentile in made.PERCENTILES:
        assert after.pop(("unbuffered", percentile)) > before.pop(("unbuffered", percentile))
    # Of files and settings without visits nothing changes.
    assert after == before
    edited(path, visited([2, 1]))
    with pytest.raises(MoeprofError, match="visits of 3 repetitions, not 4"):
        pooled([path], predicted)


def test_predictions_later_than_their_calibration_only(tmp_path):
    predictions = made.predicted_file(
        tmp_path, "a", {("unbuffered", 50): 10.0}, date="2025-12-31T00:00:00+00:00"
    )
    path = made.verified_file(predictions, "H100", {"unbuffered": made.step_times(10, 0)})
    with pytest.raises(MoeprofError, match="not in this order"):
        pooled([path], [predictions])


def test_the_command_writes_what_it_says(tmp_path, capsys):
    verified, predicted = made.made_up(tmp_path)
    out = tmp_path / "q.json"
    command = [*map(str, verified), "--predicted", *map(str, predicted), "-o", str(out)]
    assert quality.main(command) == 0
    text = capsys.readouterr().out
    assert "missed: Settings predicted" in text and "reached: Median error" in text
    content = json.loads(out.read_text())
    assert content["kind"] == quality.KIND and "prediction_quality" in content["command"]
    again = pooled(verified, predicted)
    assert {key: content[key] for key in again} == json.loads(json.dumps(again))
    verified[0].write_text("{")
    assert quality.main(command) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error and "Traceback" not in error and "hint:" in error
    with pytest.raises(MoeprofError, match="nothing to pool"):
        quality.read_judgements([], predicted)


KEPT = quality.RESULTS / quality.RESULT


@pytest.mark.skipif(not KEPT.exists(), reason="no predictions were judged on a GPU yet")
def test_what_is_kept_is_what_the_kept_files_say(tmp_path):
    content = json.loads(KEPT.read_text())
    assert quality.main(["-o", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    for key, value in again.items():
        if key not in ("rows", "command"):
            assert content[key] == value
    assert len(content["rows"]) == len(again["rows"])
