"""Printed tables of `moeprof verify`: read as they stand, pooled apart, refused where damaged."""

from __future__ import annotations

import json
import re

import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import live_prediction_parts as parts
from analysis import memory_latency
from analysis import prediction_quality as quality
from analysis import printed_verifications as printed
from moeprof.errors import MoeprofError

DATE = "2026-01-03T12:00:00+00:00"
BESIDE = "another process used the host"


def table_of(verified, predicted):
    """Returns what `moeprof verify` would have printed of a file that it wrote."""
    rows = quality.pooled_rows(quality.read_judgements([verified], [predicted]))
    inside = int(rows["inside"].sum())
    settings = rows["setting"].nunique()
    shown = rows[list(printed.COLUMNS)].to_string(
        index=False, float_format="{:.4g}".format, na_rep=""
    )
    return "\n".join(
        [
            "Wrote verified.json",
            shown,
            "  (measured on NVIDIA H200, predicted for H100 as calibrated yesterday)",
            "  (routing of a.moeprof (a), random weights)",
            f"  ({settings} of {settings} predicted settings run)",
            "  (versions: moeprof 0.1.0, torch 2.11.0)",
            f"  - Over {len(rows)} predictions the model is off by 1.0% (median).",
            f"  - {inside} of {len(rows)} measurements lie in their stated 90 % interval: 99%.",
        ]
    )


@pytest.fixture
def files(tmp_path):
    """A file of every repetition, the table printed of it, and the predictions."""
    (verified,), (predicted,) = made.made_up(tmp_path, traces=["a"], machines=["H100"], off=1.08)
    return verified, table_of(verified, predicted), predicted


def written(tmp_path, text, name="verified-a-h200.json"):
    content = printed.verification_of(text, said_command="moeprof verify", date=DATE, beside=BESIDE)
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_a_table_says_what_was_printed(files):
    _, text, _ = files
    found = printed.read_printed(text)
    assert found["device_name"] == "NVIDIA H200"
    assert found["versions"] == {"moeprof": "0.1.0", "torch": "2.11.0"}
    assert len(found["rows"]) == 2 * len(made.settings_of())
    for row, line in zip(found["rows"], text.splitlines()[2:], strict=False):
        assert [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
                for name in printed.COLUMNS] == line.split()  # fmt: skip


def test_what_is_pooled_is_what_the_whole_file_says_to_four_digits(files, tmp_path):
    verified, text, predicted = files
    whole = quality.pooled(quality.read_judgements([verified], [predicted]))
    path = written(tmp_path, text)
    found = quality.pooled(quality.read_judgements([path], [predicted]))
    assert found["counts"]["from_printed_tables"] == len(found["rows"]) == len(whole["rows"])
    assert whole["counts"]["from_printed_tables"] == 0
    for one, other in zip(found["rows"], whole["rows"], strict=True):
        assert one["predicted_ms"] == other["predicted_ms"] and one["inside"] == other["inside"]
        for name in ("measured_ms", "error", "naive_mean_error"):
            assert one[name] == float(f"{other[name]:.4g}")
        assert one["raw_ms"] is None and one["repetitions"] is None
    assert found["all"]["coverage"] == whole["all"]["coverage"]
    assert (found["all"]["raw_stated"], found["all"]["raw_median_error"]) == (0, None)
    assert found["sources"][0]["printed"] == printed.REMARK
    assert found["regret"]["worst"] == pytest.approx(whole["regret"]["worst"], abs=1e-3)


def test_the_page_says_that_tables_were_printed_and_what_ran_beside(files, tmp_path):
    verified, text, predicted = files
    found = quality.pooled(
        quality.read_judgements([verified, written(tmp_path, text)], [predicted])
    )
    page = repr(parts.predictions_part({"command": "python", **found}))
    count = len(found["rows"]) // 2
    assert f"{count} of {2 * count} predictions (NVIDIA H200) are held to the tables" in page
    assert f"While this was measured on NVIDIA H200, {BESIDE}." in page


def test_percentiles_that_were_not_printed_are_not_made_up(files, tmp_path):
    _, text, predicted = files
    judgements = quality.read_judgements([written(tmp_path, text)], [predicted])
    with pytest.raises(MoeprofError, match="no p95 can be computed"):
        memory_latency.memory_latency(None, judgements[0].predictions, None, judgements)


def first_row(text, change):
    """Returns the text with cells of the first row changed."""
    lines = text.splitlines()
    cells = lines[2].split()
    for index, value in change.items():
        cells[index] = value
    lines[2] = " ".join(cell for cell in cells if cell)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("measured_spread", "spread"), "no head"),
        (lambda text: first_row(text, {6: ""}), "10 cells where 11 belong"),
        (lambda text: first_row(text, {5: "10.x"}), "cannot be read"),
        (lambda text: first_row(text, {5: "nan"}), "cannot be read"),
        (lambda text: first_row(text, {0: "what:12"}), "cannot be read"),
        (lambda text: first_row(text, {1: "60"}), "every percentile of every setting once"),
        (lambda text: first_row(text, {5: "99"}), "its times say"),
        (lambda text: first_row(text, {7: "-0.5"}), "says error -0.5"),
        (lambda text: first_row(text, {3: "900"}), "no interval around"),
        (lambda text: first_row(text, {8: "False"}), "says inside False"),
        (lambda text: first_row(text, {8: "yes"}), "cannot be read"),
        (lambda text: "\n".join(text.splitlines()[:2] + text.splitlines()[3:]), "once"),
        (lambda text: "\n".join(text.splitlines()[:2] + text.splitlines()[4:]), "settings run"),
        (lambda text: text.replace("Over 12", "Over 13"), "predictions' with 13, it has 12"),
        (lambda text: re.sub(r"- \d+ of", "- 1 of", text), "measurements lie' with 1, it has"),
        (lambda text: text + "\nunbuffered", "goes on after its notes"),
        (lambda text: text.replace("(measured on", "(seen on"), "nowhere says"),
        (lambda text: text.replace("versions: moeprof 0.1.0", "versions: moeprof"), "versions"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(files, change, said):
    _, text, _ = files
    with pytest.raises(MoeprofError, match=said):
        printed.read_printed(change(text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["rows"][0].update(predicted_ms=1.0), "damaged|says error"),
        (lambda c: c["rows"][0].update(low_ms=c["rows"][0]["low_ms"] * 1.001), "none of predicted"),
        (lambda c: c["rows"][0].update(naive_mean_error=0.1), "damaged.*naive_mean_error"),
        (lambda c: c["rows"][0].update(measured_ms=None), "damaged"),
        (lambda c: c["rows"][0].update(inside="yes"), "damaged"),
        (lambda c: c["rows"][0].pop("measured_spread"), "damaged"),
        (lambda c: c.update(step_times={}), "no times of steps"),
        (lambda c: c.update(date=made.PREDICTED), "not in this order"),
    ],
)
def test_a_damaged_file_is_refused(files, tmp_path, change, said):
    _, text, predicted = files
    path = written(tmp_path, text)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(MoeprofError, match=said):
        quality.read_judgements([path], [predicted])


def test_the_command_writes_a_file_and_refuses_in_a_line(files, tmp_path, capsys):
    _, text, predicted = files
    log, out = tmp_path / "log", tmp_path / "verified-b.json"
    log.write_text(text)
    command = [str(log), "--command", "moeprof verify", "--date", DATE, "-o", str(out)]
    assert printed.main(command) == 0
    content = json.loads(out.read_text())
    assert content["printed"] == printed.REMARK and "beside" not in content
    assert content["hardware"] == {"device": "cuda", "device_name": "NVIDIA H200"}
    assert len(quality.read_judgements([out], [predicted])) == 1
    for changed in ([*command[:4], "soon", *command[5:]], ["nowhere", *command[1:]]):
        assert printed.main(changed) == 1
        error = capsys.readouterr().err
        assert "hint:" in error and "Traceback" not in error
