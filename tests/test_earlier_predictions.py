"""What an earlier round came to: reduced, read, and only where it is earlier."""

from __future__ import annotations

import json

import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import earlier_predictions as earlier
from analysis import prediction_quality as quality
from analysis.judgements import read_judgements
from moeprof.errors import MoeprofError

OLD_DATE = "2026-01-02T12:00:00+00:00"


def written(folder, *, date=made.MEASURED, trace="a"):
    """Writes the quality of predictions of one trace, measured at a date."""
    folder.mkdir(exist_ok=True)
    names = ["lru:25%", "min:25%"]
    predictions = made.predicted_file(
        folder, trace, {(name, each): 10.0 for name in names for each in made.PERCENTILES}
    )
    times = {"lru:25%": made.step_times(10, 0), "min:25%": made.step_times(8, 1)}
    verified = made.verified_file(predictions, "H100", times, date=date)
    out = folder / "q.json"
    command = [str(verified), "--predicted", str(predictions)]
    assert quality.main([*command, "-o", str(out)]) == 0
    return out, command


def test_a_round_is_reduced_and_stands_beside_the_next(tmp_path, capsys):
    old, _ = written(tmp_path / "old", date=OLD_DATE)
    content = json.loads(old.read_text())
    content["sources"][0]["printed"] = "read from a table"
    old.write_text(json.dumps(content))
    kept = tmp_path / "earlier.json"
    assert earlier.main([str(old), "-o", str(kept)]) == 0
    whole, small = json.loads(old.read_text()), json.loads(kept.read_text())
    assert small["kind"] == earlier.KIND and small["command"] == whole["command"]
    assert small["reduced_by"].startswith("python -m analysis.earlier_predictions ")
    for key in ("counts", "all", "goals"):
        assert small[key] == whole[key]
    assert small["regret"]["worst"] == whole["regret"]["worst"] and "rows" not in small["regret"]
    assert [each["of"] for each in small["groups"]] == ["H100"] and "rows" not in small
    assert small["sources"][0]["measured_on"] == OLD_DATE and "hardware" not in small["sources"][0]
    assert small["sources"][0]["printed"] == "read from a table"

    new, command = written(tmp_path / "new")
    assert quality.main([*command, "--earlier", str(kept), "-o", str(new)]) == 0
    assert json.loads(new.read_text())["earlier"] == small
    # The round itself is no earlier one.
    assert earlier.main([str(new), "-o", str(kept)]) == 0
    assert quality.main([*command, "--earlier", str(kept), "-o", str(new)]) == 0
    assert json.loads(new.read_text())["earlier"] is None


def test_what_is_not_earlier_is_refused(tmp_path):
    late, _ = written(tmp_path / "late", date="2026-01-04T00:00:00+00:00")
    small = earlier.reduced(json.loads(late.read_text()))
    _, command = written(tmp_path / "new")
    found = quality.pooled(read_judgements([made.Path(command[0])], [made.Path(command[2])]))
    with pytest.raises(MoeprofError, match="was measured until 2026-01-04"):
        earlier.earlier_of(small, found["sources"])
    with pytest.raises(MoeprofError, match="was measured until never"):
        earlier.earlier_of({**small, "sources": []}, found["sources"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("[", "cannot be read"), ("[]", "is no quality"), ('{"kind": "other"}', "is no quality"),
     ('{"kind": "moeprof prediction quality"}', "damaged")],
)  # fmt: skip
def test_nothing_else_is_reduced(tmp_path, capsys, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert earlier.main([str(path), "-o", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err
    assert said in error and "hint:" in error and not (tmp_path / "out.json").exists()


def test_a_damaged_earlier_round_is_refused(tmp_path):
    old, _ = written(tmp_path / "old", date=OLD_DATE)
    small = earlier.reduced(json.loads(old.read_text()))
    path = tmp_path / "e.json"
    for change in ({"kind": "other"}, {"goals": None}):
        content = {**small, **change}
        if change.get("goals", 0) is None:
            del content["goals"]
        path.write_text(json.dumps(content))
        with pytest.raises(MoeprofError, match="holds no earlier quality"):
            earlier.read_earlier(path)
    with pytest.raises(MoeprofError, match="cannot be read"):
        earlier.read_earlier(tmp_path / "none.json")


KEPT = earlier.RESULTS / earlier.EARLIER


@pytest.mark.skipif(not KEPT.exists(), reason="there was no earlier round")
def test_the_kept_round_can_be_read():
    found = earlier.read_earlier(KEPT)
    assert found["all"]["predictions"] == sum(each["predictions"] for each in found["groups"])
