from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import (
    corrections,
    exactly,
    flat,
    hand_calibration,
    leftovers,
    streamed_times,
    trial,
)

from moeprof.errors import EXIT_BAD_TRACE, CalibrationError, MoeprofError
from moeprof.replay.calibration_file import (
    Curve,
    DecisionTimes,
    ExpertTimes,
    Measured,
    TrialSource,
    read_calibration,
    write_calibration,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    calibration = hand_calibration(
        all_to_all=Curve(sizes=(1.0, 2.0), times_s=(exactly(0.1, 0.02), exactly(0.3))),
        exchange_ranks=2,
        foresee_s=exactly(2e-5, 0.01),
        host_probes_ms=(2.0, 2.5),
        streamed=streamed_times(),
        trials=(trial(1.25), trial(0.5, kind="gating")),
        corrections=corrections(1.2, residuals=(0.1, -0.2)),
        trials_of=TrialSource(machine="another", date="2026-01-02T00:00:00+00:00"),
        by_size={
            9 << 20: dataclasses.replace(corrections(0.9), host=leftovers((0.3, -0.1))),
            1 << 40: dataclasses.replace(corrections(1.1), buffering=None, gating=None, kernels={}),
        },
    )
    path = write_calibration(calibration, tmp_path / "machine.json")
    found = read_calibration(path)
    assert found == calibration
    # Text in the file, numbers again when read.
    assert list(found.by_size) == [9 << 20, 1 << 40]
    assert [each.name for each in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("field", ["exchange_ranks", "foresee_s", "host_probes_ms", "trials_of"])
def test_files_from_before_a_field_was_there_are_read(tmp_path: Path, field: str) -> None:
    path = write_calibration(hand_calibration(), tmp_path / "machine.json")
    content = json.loads(path.read_text())
    assert not content.pop(field)
    path.write_text(json.dumps(content))
    assert read_calibration(path) == hand_calibration()


def test_files_from_before_copies_ahead_are_read(tmp_path: Path) -> None:
    path = write_calibration(hand_calibration(foresee_s=exactly(1e-5)), tmp_path / "machine.json")
    content = json.loads(path.read_text())
    del content["foresee_s"]
    path.write_text(json.dumps(content))
    assert read_calibration(path) == hand_calibration()
    content["foresee_s"] = {**content["known_s"], "median": -1.0}
    path.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="negative"):
        read_calibration(path)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = write_calibration(hand_calibration(), tmp_path / "machine.json")
    with pytest.raises(MoeprofError, match="exists"):
        write_calibration(hand_calibration(date="later"), path)
    assert read_calibration(path).date == hand_calibration().date
    write_calibration(hand_calibration(date="later"), path, force=True)
    assert read_calibration(path).date == "later"


def _damaged(change: Any) -> Any:
    def apply(content: dict[str, Any]) -> str:
        change(content)
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: json.dumps(content)[:100], "cannot be read"),
        (lambda _: "[1, 2]", "no calibration file"),
        (_damaged(lambda c: c.update(kind="x")), "no calibration file"),
        (_damaged(lambda c: c.update(schema_version=99)), "has version 99"),
        (_damaged(lambda c: c.update(schema_version=1)), "has version 1, this moeprof reads"),
        (_damaged(lambda c: c["corrections"]["log_factors"].pop()), "do not match their parts"),
        (_damaged(lambda c: c["corrections"]["covariance"].pop()), "do not match their parts"),
        (_damaged(lambda c: c["corrections"]["gating"].update(freedom=0)), "nothing over"),
        (_damaged(lambda c: c["corrections"]["gating"].update(jitter=[math.nan])), "no finite"),
        (_damaged(lambda c: c["corrections"].pop("host")), "lacks 'host'"),
        (_damaged(lambda c: c.pop("by_size")), "lacks 'by_size'"),
        (_damaged(lambda c: c["by_size"].update(small=c["corrections"])), "damaged"),
        (_damaged(lambda c: c["by_size"]["1024"].pop("log_factors")), "lacks 'log_factors'"),
        (_damaged(lambda c: c["by_size"]["1024"]["covariance"].pop()), "do not match their parts"),
        (_damaged(lambda c: c["by_size"]["1024"]["host"].update(freedom=0)), "nothing over"),
        (_damaged(lambda c: c["by_size"]["1024"]["host"].update(jitter=[math.inf])), "no finite"),
        (_damaged(lambda c: c["by_size"].update({"1024": None})), "damaged"),
        (_damaged(lambda c: c["by_size"].update({"0": c["corrections"]})), "not positive"),
        (_damaged(lambda c: c.update(by_size=[])), "are no table"),
        (_damaged(lambda c: c["streamed"].pop("piece_host")), "lacks 'piece_host'"),
        (_damaged(lambda c: c.pop("known_s")), "lacks 'known_s'"),
        (_damaged(lambda c: c["sync_s"].update(median=-1.0)), "negative"),
        (_damaged(lambda c: c["matrix_flops_per_s"].update(median=0.0)), "is zero"),
        (_damaged(lambda c: c["sync_s"].update(median=math.nan)), "no finite"),
        (_damaged(lambda c: c["sync_s"].update(median="fast")), "damaged"),
        (_damaged(lambda c: c["to_device"].update(sizes=[1, 2])), "do not ascend"),
        (_damaged(lambda c: c["trials"][0].update(modelled_ms=[1.0])), "not as many"),
        (
            _damaged(lambda c: [run.__setitem__(2, None) for run in c["trials"][0]["measured_ms"]]),
            "a step whose times are all set aside",
        ),
        (_damaged(lambda c: c["trials"][0]["measured_ms"][1].pop()), "not as many"),
        (_damaged(lambda c: c.update(host_probes_ms=[1.0, 0.0])), "took no time"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    whole = hand_calibration(
        trials=(trial(1.0),),
        corrections=corrections(),
        by_size={1024: dataclasses.replace(corrections(), host=leftovers((0.1,)))},
        streamed=streamed_times(),
    )
    path = write_calibration(whole, tmp_path / "machine.json")
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(CalibrationError, match=message) as caught:
        read_calibration(path)
    assert caught.value.exit_code == EXIT_BAD_TRACE
    assert "\n" not in caught.value.message
    assert "moeprof calibrate" in caught.value.hint


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration file"):
        read_calibration(tmp_path / "none.json")


def test_spreads() -> None:
    values = np.random.default_rng(0).normal(10.0, 0.5, 400).tolist()
    found = Measured.of([*values, 1e6])
    assert found.median == pytest.approx(10.0, abs=0.1)
    assert found.low < found.median < found.high < 12
    # 1.2533 sigma / sqrt(n), over the median; one outlier changes nothing.
    assert found.error == pytest.approx(1.2533 * 0.5 / 20 / 10, rel=0.15)
    assert Measured.of([3.0]).error == 0


def test_trials_are_judged_by_the_median_of_their_repetitions() -> None:
    found = dataclasses.replace(
        trial(1.0), modelled_ms=(1.0, 2.0), measured_ms=((1.0, 4.0), (9.0, 4.0), (2.0, 8.0))
    )
    np.testing.assert_allclose(found.step_ms(), [2, 4])
    np.testing.assert_allclose(found.ratios(), [2, 2])


def test_times_that_are_set_aside_are_in_no_median(tmp_path: Path) -> None:
    own = dataclasses.replace(
        trial(1.0),
        modelled_ms=(1.0, 2.0, 4.0),
        measured_ms=((1.0, None, 7.0), (None, 4.0, 8.0), (2.0, 8.0, 9.0), (9.0, None, None)),
    )
    # The medians of 1, 2, 9, of 4, 8 and of 7, 8, 9.
    np.testing.assert_array_equal(own.step_ms(), [2, 6, 8])
    np.testing.assert_array_equal(own.ratios(), [2, 3, 2])
    machine = hand_calibration(trials=(trial(1.25), own))
    path = write_calibration(machine, tmp_path / "machine.json")
    assert read_calibration(path) == machine
    content = json.loads(path.read_text())
    assert content["trials"][1]["measured_ms"][0] == [1.0, None, 7.0]


def test_curves() -> None:
    curve = Curve(sizes=(10.0, 20.0, 40.0), times_s=(exactly(1.0), exactly(2.0), exactly(6.0)))
    np.testing.assert_allclose(curve.at([5, 10, 15, 30, 40, 50]), [1, 1, 1.5, 4, 6, 8])
    np.testing.assert_allclose(flat(2.0).at([1.0, 2e9]), [2.0, 4.0])
    falling = dataclasses.replace(curve, times_s=(exactly(1.0), exactly(2.0), exactly(1.5)))
    assert falling.at(100) == 1.5


def test_expert_times() -> None:
    by_rows = tuple(
        Curve(sizes=(1.0, 101.0), times_s=(exactly(base), exactly(2 * base))) for base in (1.0, 3.0)
    )
    times = ExpertTimes(expert_bytes=(100, 200), by_rows=by_rows)
    np.testing.assert_allclose(times.at(100, [1, 51, 101]), [1, 1.5, 2])
    np.testing.assert_allclose(times.at(150, [1, 101]), [2, 4])
    np.testing.assert_allclose(times.at(300, [1]), [5])
    np.testing.assert_allclose(times.at(10, [1]), [1])


def test_decision_times() -> None:
    times = DecisionTimes(dispatch_s=1.0, hit_s=2.0, miss_s=3.0, slot_s=0.5, error=0.0)
    np.testing.assert_allclose(times.at([0, 2], [0, 1], [4, 4]), [1.0, 1 + 4 + 3 + 2])
