from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
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
from moeprof.replay.calibration_sizes import CalibrationSizes, Regime

RESULTS = Path(__file__).resolve().parents[1] / "analysis" / "results"
KEPT = sorted(RESULTS.glob("calibration-*.json"))
SIZES = CalibrationSizes(
    expert_bytes=(4608, 12288),
    d_model=32,
    widths=((4608, 16),),
    dtype="float32",
    num_experts=8,
    top_k=2,
    regimes=(Regime(batch=1, num_layers=2, num_steps=4),),
    rows=(1, 8),
    host_rows=(1, 4),
    slots=(4, 16),
    tokens=(1, 4),
    pieces=(1, 4),
    cold_bytes=1 << 16,
    repeats=3,
    trial_repetitions=2,
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
        sizes=SIZES,
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


@pytest.mark.parametrize(
    "field",
    ["exchange_ranks", "foresee_s", "host_probes_ms", "num_disturbed", "trials_of", "sizes"],
)
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
        (_damaged(lambda c: c["corrections"]["gating"].update(freedom=0)), "not positive"),
        (_damaged(lambda c: c["corrections"]["gating"].update(jitter=[math.nan])), "no finite"),
        (_damaged(lambda c: c["corrections"].pop("host")), "lacks 'host'"),
        (_damaged(lambda c: c.pop("by_size")), "lacks 'by_size'"),
        (_damaged(lambda c: c["by_size"].update(small=c["corrections"])), "damaged"),
        (_damaged(lambda c: c["by_size"]["1024"].pop("log_factors")), "lacks 'log_factors'"),
        (_damaged(lambda c: c["by_size"]["1024"]["covariance"].pop()), "do not match their parts"),
        (_damaged(lambda c: c["by_size"]["1024"]["host"].update(freedom=0)), "not positive"),
        (_damaged(lambda c: c["by_size"]["1024"]["host"].update(residuals=[])), "nothing over"),
        (_damaged(lambda c: c["by_size"]["1024"]["host"].update(jitter=[math.inf])), "no finite"),
        (_damaged(lambda c: c["by_size"].update({"1024": None})), "damaged"),
        (_damaged(lambda c: c["by_size"].update({"0": c["corrections"]})), "not positive"),
        (_damaged(lambda c: c.update(by_size=[])), "is no table"),
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
        (_damaged(lambda c: c.update(host_probes_ms=[1.0, 0.0])), "not positive"),
        (_damaged(lambda c: c.update(sizes={})), "lacks 'expert_bytes'"),
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


# Fields that no computation checks again: what is read from them is believed.
_NUMBERS = [
    ("decisions", "lru", "miss_s"),
    ("decisions", "lru", "error"),
    *(("gating", "dynamic", name) for name in (
        "host_dispatch_s", "device_dispatch_s", "weight_factor", "flops_factor", "error",
    )),
    ("corrections", "kernels", "dynamic", "error"),
    ("sync_s", "low"),
    ("to_device", "times_s", 0, "median"),
    ("device_expert", "by_rows", 0, "times_s", 0, "error"),
    ("by_size", "1024", "host", "freedom"),
    ("by_size", "1024", "host", "jitter", 0),
    ("trials", 0, "modelled_ms", 1),
    ("trials", 0, "measured_ms", 0, 1),
    ("host_probes_ms", 0),
]  # fmt: skip
_SIGNED = [
    ("corrections", "kernels", "dynamic", "log_factor"),
    ("corrections", "log_factors", 3),
    ("by_size", "1024", "host", "residuals", 0),
    ("by_size", "1024", "covariance", 2, 2),
]
_NO_NUMBERS = [math.nan, math.inf, True, "1.0", None, [1.0], 10**400]


def whole_file(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A file with all that can be in one, and its content."""
    known = dataclasses.replace(corrections(), host=leftovers((0.1,)))
    machine = hand_calibration(
        trials=(trial(1.0),),
        corrections=known,
        by_size={1024: known},
        streamed=streamed_times(),
        host_probes_ms=(1.0,),
        exchange_ranks=2,
        num_disturbed=0,
        sizes=SIZES,
    )
    path = write_calibration(machine, folder / "machine.json")
    assert read_calibration(path) == machine
    return path, json.loads(path.read_text())


def refused(path: Path, content: dict[str, Any]) -> str:
    """What is said of a file with this content."""
    path.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="is damaged") as caught:
        read_calibration(path)
    assert caught.value.exit_code == EXIT_BAD_TRACE and "moeprof calibrate" in caught.value.hint
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    return caught.value.message


def put(content: Any, place: Sequence[Any], value: Any) -> None:
    """Replaces what lies at a place."""
    for key in place[:-1]:
        content = content[key]
    assert content[place[-1]] is not None
    content[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (place, value)
        for place in (*_NUMBERS, *_SIGNED)
        for value in _NO_NUMBERS
        # There None is a time that is set aside.
        if value is not None or "measured_ms" not in place
    ],
    ids=lambda each: ".".join(map(str, each)) if isinstance(each, tuple) else repr(each)[:10],
)
def test_no_number_is_believed_that_is_none(tmp_path: Path, place: Any, value: Any) -> None:
    path, content = whole_file(tmp_path)
    put(content, place, value)
    said = refused(path, content)
    named = [str(key) for key in place if isinstance(key, str) and not key.isdecimal()]
    assert all(name in said for name in named if name not in ("by_rows",))
    assert "is no finite number" in said or "is no list" in said


@pytest.mark.parametrize("place", _NUMBERS, ids=lambda place: ".".join(map(str, place)))
def test_no_time_or_error_is_negative(tmp_path: Path, place: Any) -> None:
    path, content = whole_file(tmp_path)
    put(content, place, -1e-3)
    said = refused(path, content)
    assert "is negative" in said or "is not positive" in said


def test_jitter_and_freedom_are_above_zero(tmp_path: Path) -> None:
    for name, value in (("jitter", [1.0, 0.0]), ("freedom", 0)):
        path, content = whole_file(tmp_path)
        content["by_size"]["1024"]["host"][name] = value
        assert f"by_size.1024.host.{name} is not positive" in refused(path, content)
        path.unlink()


def _flipped(content: dict[str, Any]) -> None:
    own = content["by_size"]["1024"]["covariance"]
    own[:] = [[-x for x in row] for row in own]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_flipped, "by_size.1024.covariance is not positive definite"),
        (lambda c: put(c, ("corrections", "covariance", 0, 5), 99.0), "is not symmetric"),
        (lambda c: put(c, ("corrections", "covariance", 1, 1), 0.0), "is not positive definite"),
        (lambda c: put(c, ("gating", "dynamic", "waits"), 0), "neither true nor false"),
        (lambda c: put(c, ("is_serial",), "no"), "neither true nor false"),
        (lambda c: put(c, ("date",), 20260101), "date is no text"),
        (lambda c: put(c, ("device",), "H100"), "device is no table"),
        (lambda c: put(c, ("decisions",), []), "decisions is no table"),
        (lambda c: put(c, ("decisions", "lru"), 1.0), "decisions.lru is no table"),
        (lambda c: c["decisions"]["lru"].update(extra=1.0), "extra, which is not known"),
        (lambda c: c["decisions"]["lru"].pop("slot_s"), "lacks 'slot_s'"),
        (lambda c: c["gating"]["dynamic"].pop("waits"), "lacks 'waits'"),
        (lambda c: put(c, ("sync_s", "low"), 9.0), "sync_s.low is above"),
        (lambda c: put(c, ("sync_s", "num_repetitions"), 1.5), "no whole number"),
        (lambda c: put(c, ("streamed", "most_tokens"), "64"), "no whole number"),
        (lambda c: put(c, ("device_expert", "expert_bytes", 0), True), "no whole number"),
        (lambda c: put(c, ("exchange_ranks",), 0), "exchange_ranks is less than 1"),
        (lambda c: put(c, ("num_disturbed",), -1), "num_disturbed is less than 0"),
        (lambda c: put(c, ("trials", 0, "setting"), 2), "trials[0].setting is no text"),
        (lambda c: put(c, ("sizes", "expert_bytes"), [9, 3]), "has to ascend"),
        (lambda c: put(c, ("sizes", "widths"), [[4608]]), "is damaged"),
        (lambda c: put(c, ("sizes", "widths"), [[4608, "16"]]), "no whole number"),
        (lambda c: put(c, ("sizes", "regimes", 0, "batch"), 0), "regimes.batch is less than 1"),
        (lambda c: put(c, ("sizes", "gated"), 1), "neither true nor false"),
    ],
)
def test_parts_that_cannot_be(tmp_path: Path, change: Any, said: str) -> None:
    path, content = whole_file(tmp_path)
    change(content)
    assert said in refused(path, content)


def test_numbers_too_long_for_any_reader_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for content in ("9" * 5000, "[" * 100000):
        path.write_text(content)
        with pytest.raises(CalibrationError, match="cannot be read") as caught:
            read_calibration(path)
        assert "\n" not in caught.value.message


@pytest.mark.skipif(not KEPT, reason="no calibration is kept")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_kept_calibrations_are_read(path: Path) -> None:
    machine = read_calibration(path)
    content = json.loads(path.read_text())
    assert len(machine.trials) == len(content["trials"]) > 0
    assert machine.sizes is None and machine.corrections is not None


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
