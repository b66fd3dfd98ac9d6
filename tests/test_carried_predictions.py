"""Predictions by another machine's trials: what is combined, judged apart, and refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import verified_files as made

torch = pytest.importorskip("torch")

from calibrations import corrections, flat, hand_calibration  # noqa: E402

from analysis import carried_predictions as carried  # noqa: E402
from analysis import prediction_quality as quality  # noqa: E402
from analysis.judgements import read_judgements  # noqa: E402
from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.live.verification import make_predictions  # noqa: E402
from moeprof.live.verification_files import read_predictions, write_predictions  # noqa: E402
from moeprof.live.verification_options import VerifyOptions  # noqa: E402
from moeprof.replay.calibration_file import TrialSource, write_calibration  # noqa: E402
from moeprof.replay.expert_shapes import ExpertShape  # noqa: E402
from moeprof.replay.serving_settings import parse_setting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = VerifyOptions(
    shape=ExpertShape(d_model=16, d_ff=8, dtype="float32"), repetitions=2, max_steps=4
)
SETTINGS = [parse_setting(text) for text in ("unbuffered", "lru:2", "min:2")]
OWN_MACHINE, OTHER_MACHINE = "NVIDIA H200", "NVIDIA H100"


def machine(name, ratio, copy_s, **changes):
    known = corrections(ratio, residuals=(-0.02, 0.0, 0.02))
    return hand_calibration(
        device={"device_name": name}, corrections=known, to_device=flat(copy_s), **changes
    )


OWN = machine(OWN_MACHINE, 1.0, 10.0)
OTHER = machine(OTHER_MACHINE, 2.0, 20.0, date="2025-12-31T00:00:00+00:00")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carried")
    return synthetic_trace(folder / "t.moeprof", num_requests=2, num_sites=2, num_experts=8)


@pytest.fixture(scope="module")
def own(trace):
    return make_predictions(trace, OWN, SETTINGS, OPTIONS)


def carry(own, trace, constants=OWN, trials=OTHER):
    return carried.carried_over(
        "predicted-t-h200.json", own, trace, constants=constants, trials=trials, said="python"
    )


def middle(predictions, setting):
    return next(
        row["predicted_ms"]
        for row in predictions.rows
        if (row["setting"], row["percentile"]) == (setting, 50)
    )


def test_constants_of_one_machine_and_trials_of_another(own, trace):
    found = carry(own, trace)
    unchanged = carry(own, trace, constants=None)
    for each in (found, unchanged):
        assert (each.settings, each.options) == (own.settings, own.options)
        assert each.facts["judged_on"] == OWN_MACHINE and each.facts["trials_on"] == OTHER_MACHINE
        assert each.facts["trials_date"] == OTHER.date and each.facts["command"] == "python"
        assert each.facts["carried_for"] == "predicted-t-h200.json"
    assert (found.facts["calibrated_on"], found.facts["calibrated"]) == (OWN_MACHINE, OWN.date)
    assert unchanged.facts["calibrated_on"] == OTHER_MACHINE
    assert unchanged.facts["calibrated"] == OTHER.date
    # Twice as long by the other's trials; unchanged, its copies take twice as long again.
    assert middle(found, "lru:2") == pytest.approx(2 * middle(own, "lru:2"), rel=0.05)
    assert middle(unchanged, "lru:2") > 1.5 * middle(found, "lru:2")
    assert middle(unchanged, "unbuffered") == pytest.approx(middle(found, "unbuffered"), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": OWN}, "comes from trials on NVIDIA H200 already"),
        (
            {"trials": dataclasses.replace(OTHER, trials_of=TrialSource(machine="A", date="B"))},
            "has trials of A itself",
        ),
        ({"trials": dataclasses.replace(OTHER, corrections=None)}, "has no trials"),
        (
            {"constants": dataclasses.replace(OWN, date="2026-01-09T00:00:00+00:00")},
            "not from that of NVIDIA H200 of 2026-01-09",
        ),
        ({"constants": OTHER}, "not from that of NVIDIA H100"),
    ],
)
def test_what_does_not_belong_together_is_refused(own, trace, changes, said):
    with pytest.raises(MoeprofError, match=said) as caught:
        carry(own, trace, **changes)
    assert caught.value.hint


def test_what_is_carried_over_is_not_carried_on(own, trace, tmp_path):
    with pytest.raises(MoeprofError, match="is carried over itself"):
        carry(carry(own, trace), trace)
    other = synthetic_trace(tmp_path / "o.moeprof", num_requests=2, num_sites=2, num_experts=8)
    with pytest.raises(MoeprofError, match=r"is not of .*o\.moeprof"):
        carry(own, other)


def test_the_command_writes_predictions(own, trace, tmp_path, capsys):
    write_predictions(own, tmp_path / "predicted-t-h200.json")
    write_calibration(OWN, tmp_path / "own.json")
    write_calibration(OTHER, tmp_path / "other.json")
    out = tmp_path / "carried-t-h200-constants.json"
    command = [
        str(tmp_path / "predicted-t-h200.json"), "--trace", str(trace.path),
        "--trials", str(tmp_path / "other.json"), "-o", str(out),
    ]  # fmt: skip
    assert carried.main([*command, "--constants", str(tmp_path / "own.json")]) == 0
    (one,) = carried.read_carried([out])
    assert one.kind == carried.CONSTANTS
    assert one.predictions.rows == carry(own, trace).rows
    assert one.facts["command"].startswith("python -m analysis.carried_predictions ")
    capsys.readouterr()
    assert carried.main(command) == 1 and "exists" in capsys.readouterr().err
    assert carried.main([*command, "--force"]) == 0
    (one,) = carried.read_carried([out])
    assert one.kind == carried.UNCHANGED


def measured(folder, *, machine="H200", trace="a", names=None, ms=10.0):
    """Returns measurements that are exactly a machine's own predictions, and these."""
    names = list(made.settings_of()) if names is None else names
    times = {name: made.step_times(ms + 3 * index, index) for index, name in enumerate(names)}
    said = {
        (name, each): float(np.percentile(np.median(times[name], axis=0), each))
        for name in names
        for each in made.PERCENTILES
    }
    predictions = made.predicted_file(folder, trace, said, machine=machine)
    return made.verified_file(predictions, machine, times), predictions


def judged(verified, predicted, files):
    return quality.pooled(read_judgements(verified, predicted), carried.read_carried(files))


def test_carried_predictions_are_judged_by_the_same_runs_and_apart(tmp_path):
    verified, predictions = zip(
        measured(tmp_path), measured(tmp_path, trace="b", ms=11.0),
        measured(tmp_path, machine="H100", ms=12.0), strict=True,
    )  # fmt: skip
    files = [
        made.carried_file(predictions[0], 1.05),
        made.carried_file(predictions[1], 1.05),
        made.carried_file(predictions[0], 1.5, is_unchanged=True),
    ]
    plain = judged(verified, predictions, [])
    found = judged(verified, predictions, files)
    number = 2 * len(made.settings_of())
    assert {key: value for key, value in found.items() if key != "carried"} == {
        key: value for key, value in plain.items() if key != "carried"
    }
    assert plain["carried"] is None
    # Two machines ran the same settings of one trace: they count once, by its name.
    assert found["counts"]["settings"] == number and found["counts"]["machines"] == 2
    assert {row["trace"] for row in found["rows"]} == {"a", "b"}
    constants, unchanged = found["carried"]["kinds"]
    assert (constants["kind"], unchanged["kind"]) == carried.KINDS
    assert constants["machines"] == ["H200"] and constants["trials_on"] == ["H100"]
    assert constants["predictions"] == 2 * number and constants["coverage"] == 1
    assert constants["median_signed_error"] == pytest.approx(0.05)
    assert constants["absolute_errors"]["model"]["0.5"] == pytest.approx(0.05)
    # An interval of 1.35 to 1.65 times: all measurements are faster.
    assert (unchanged["predictions"], unchanged["below"]) == (number, number)
    assert unchanged["absolute_errors"]["model"]["0.5"] == pytest.approx(0.5)
    assert unchanged["regret"]["worst"] == 0 and unchanged["regret"]["choices"] == 6
    for kind in (constants, unchanged):
        assert kind["own"]["predictions"] == kind["predictions"]
        assert kind["own"]["absolute_errors"]["model"]["0.5"] == pytest.approx(0, abs=1e-9)
    rows = pd.DataFrame(found["carried"]["rows"])
    assert len(rows) == 3 * number and set(rows["kind"]) == set(carried.KINDS)
    assert [each["verified"] for each in found["carried"]["sources"]] == [
        ["verified-a-h200-h200.json"], ["verified-b-h200-h200.json"],
        ["verified-a-h200-h200.json"],
    ]  # fmt: skip
    json.dumps(found, allow_nan=False)


def test_a_wrong_order_is_regret_of_what_was_carried_over_alone(tmp_path):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.0)
    content = json.loads(file.read_text())
    for row in content["rows"]:
        if row["setting"] == "min:25%":
            row["predicted_ms"] = row["low_ms"] = 1e-3
    file.write_text(json.dumps(content))
    found = judged([path], [predictions], [file])
    (kind,) = found["carried"]["kinds"]
    times = {(row["setting"], row["percentile"]): row["measured_ms"] for row in found["rows"]}
    worst = max(times["min:25%", each] / times["lru:25%", each] - 1 for each in made.PERCENTILES)
    assert kind["regret"]["worst"] == pytest.approx(worst)
    assert kind["own"]["regret"]["worst"] == found["regret"]["worst"] == 0


def test_what_did_not_fit_and_what_has_no_interval(tmp_path):
    path, predictions = measured(tmp_path, names=["unbuffered", "lru:25%"])
    content = json.loads(path.read_text())
    del content["step_times"]["unbuffered"]
    for row in content["rows"][:2]:
        row.update(measured_ms=None, measured_spread=None, repetitions=0)
    path.write_text(json.dumps(content))
    file = made.carried_file(predictions, 1.0)
    content = json.loads(file.read_text())
    content["rows"][-1].update(low_ms=None, high_ms=None)
    file.write_text(json.dumps(content))
    (kind,) = judged([path], [predictions], [file])["carried"]["kinds"]
    assert (kind["predictions"], kind["stated"], kind["inside"]) == (2, 1, 1)


def test_nothing_measured_of_it_is_said(tmp_path):
    (path, predictions), (_, late) = measured(tmp_path), measured(tmp_path, trace="late")
    found = judged([path], [predictions, late], [made.carried_file(late, 1.0)])["carried"]
    assert found["kinds"] == [] and found["rows"] == []
    assert found["not_measured"] == [
        {"carried": "carried-late-h200-constants.json", "machine": "H200"}
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["facts"].pop("trials_on"), "lacks trials_on"),
        (lambda c: c["facts"].pop("judged_on"), "lacks judged_on"),
        (lambda c: c["facts"].update(trials_on="H200"), "carries nothing over to H200"),
        (lambda c: c["facts"].update(calibrated_on="A100"), "carries nothing over to H200"),
        (lambda c: c.update(settings=c["settings"][:-1], rows=c["rows"][:-2]), "other settings"),
        (lambda c: c["options"].update(repetitions=4), "has other options than"),
        (lambda c: c["facts"].update(trace="other.moeprof"), "has other trace than"),
        (lambda c: c["facts"].update(num_lookups=11), "has other lookups than"),
        (lambda c: c["facts"].update(date=made.MEASURED), "not in this order"),
        (lambda c: c["facts"].update(trials_date="2026-01-02T12:00:00+00:00"), "not in this order"),
        (lambda c: c["facts"].update(calibrated="2026-01-02T12:00:00+00:00"), "not in this order"),
        (lambda c: c["facts"].update(trials_date="some day"), "has no date"),
        (lambda c: c["facts"].update(date="some day"), "has no date"),
        (lambda c: c["rows"].pop(), "is damaged: it lacks"),
        (lambda c: c["rows"][0].pop("naive_mean_ms"), "is damaged: it lacks 'naive_mean_ms'"),
        (lambda c: c.update(kind="other"), "holds no predictions"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_late_is_refused(tmp_path, change, said):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.0)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(MoeprofError, match=said) as caught:
        judged([path], [predictions], [file])
    assert "\n" not in caught.value.message


def test_what_was_carried_over_after_the_first_visits_is_refused(tmp_path):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.0, date="2026-01-20T00:00:00+00:00")
    content = json.loads(path.read_text())
    # Visits were added later: the first of them were made before.
    content["earlier_runs"] = [{"date": content["date"]}]
    content["date"] = "2026-02-01T00:00:00+00:00"
    path.write_text(json.dumps(content))
    with pytest.raises(MoeprofError, match=r"was measured 2026-01-03 .* not in this order"):
        judged([path], [predictions], [file])
    file = made.carried_file(predictions, 1.0)
    assert judged([path], [predictions], [file])["carried"]["kinds"]


def test_what_is_carried_over_twice_in_a_file_is_refused(tmp_path):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.0)
    content = json.loads(file.read_text())
    content["rows"].append({**content["rows"][0], "low_ms": 0.0, "high_ms": 1e9})
    file.write_text(json.dumps(content))
    with pytest.raises(MoeprofError, match="has 2 rows of unbuffered p50"):
        judged([path], [predictions], [file])


def test_each_prediction_is_carried_over_once_and_never_part_of_the_goals(tmp_path):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.0)
    again = file.with_name("carried-again.json")
    again.write_text(file.read_text())
    with pytest.raises(MoeprofError, match=r"both carry over predicted-a-h200\.json"):
        judged([path], [predictions], [file, again])
    with pytest.raises(MoeprofError, match="is carried over from another machine"):
        judged([path], [predictions, file], [])
    assert read_predictions(file).settings == read_predictions(predictions).settings


def test_the_pool_takes_them_from_the_command_line(tmp_path):
    path, predictions = measured(tmp_path)
    file = made.carried_file(predictions, 1.05)
    out = tmp_path / "q.json"
    command = [str(path), "--predicted", str(predictions), "-o", str(out)]
    assert quality.main(command) == 0
    # Measurements that are named do not go with carried predictions that happen to be kept.
    assert json.loads(out.read_text())["carried"] is None
    assert quality.main([*command, "--carried", str(file)]) == 0
    assert len(json.loads(out.read_text())["carried"]["kinds"]) == 1
