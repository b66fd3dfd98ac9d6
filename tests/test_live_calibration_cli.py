"""`moeprof calibrate` and `moeprof verify`, from the machine to the verdict."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_live_calibration import TINY  # noqa: E402

from moeprof import cli  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import calibration, verification  # noqa: E402
from moeprof.recording.hardware import hardware  # noqa: E402
from moeprof.replay.calibration_file import read_calibration  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ("--shape", "32x8", "--dtype", "float32")
CALIBRATE = (
    "calibrate", "--device", "cpu", "--policies", "lru,min", "--kernels", "dynamic_loop",
)  # fmt: skip


@pytest.fixture
def run(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "CPU_SIZES", TINY)
    synthetic_trace(tmp_path / "t.moeprof", num_requests=2, num_sites=2, num_experts=8)

    def runner(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moeprof", *arguments])
        code = cli.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return runner


@pytest.fixture(scope="module")
def of_another_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration that tests take as another machine's: measured once, and copied by each."""
    path = tmp_path_factory.mktemp("other") / "other.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "CPU_SIZES", TINY)
        arguments = ("-o", str(path), "--expert-bytes", "3KiB")
        assert cli.main([*CALIBRATE, *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def small_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration by the shapes of experts, narrower than those of other sizes."""
    path = tmp_path_factory.mktemp("small") / "small.json"
    arguments = ["moeprof", *CALIBRATE, "-o", str(path), "--expert-bytes", "16x24,16x44"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "CPU_SIZES", TINY)
        patch.setattr("sys.argv", arguments)
        assert cli.main(arguments[1:]) == 0
    return path


def calibrated(run: Run, *more: str) -> tuple[int, str, str]:
    return run(*CALIBRATE, *more)


def test_small_experts_are_measured_at_their_own_width(run: Run, tmp_path: Path) -> None:
    quiet = ("--quiet-core",) if hasattr(os, "sched_setaffinity") else ()
    code, _, err = calibrated(run, "-o", "cpu.json", "--expert-bytes", "16x24,12KiB", *quiet)
    assert code == 0, err
    machine = read_calibration(tmp_path / "cpu.json")
    assert machine.device_expert.expert_bytes == (3 * 16 * 24 * 4, 12288)
    assert all(quiet_core in machine.command for quiet_core in quiet)
    # The machine is as large as before the thread was put on one of its cores.
    assert machine.device["num_cpus"] == hardware().num_cpus
    assert machine.host_probes_ms and min(machine.host_probes_ms) > 0
    code, _, err = calibrated(run, "-o", "other.json", "--expert-bytes", "16x24:bias")
    assert code == 2 and "gated and without bias" in err
    assert not (tmp_path / "other.json").exists()


def test_from_the_machine_to_the_verdict(run: Run, tmp_path: Path) -> None:
    code, out, err = calibrated(run, "-o", "cpu.json", "--expert-bytes", "3KiB,12KiB")
    assert (code, out) == (0, "cpu.json\n"), err
    assert "Next: moeprof verify TRACE --calibration cpu.json" in err
    machine = read_calibration(tmp_path / "cpu.json")
    assert machine.device_expert.expert_bytes == (3072, 12288)
    assert machine.all_to_all is None and machine.exchange_ranks is None
    assert machine.command.startswith("moeprof calibrate ")
    assert machine.command.endswith("--expert-bytes 3KiB,12KiB")

    code, _, err = calibrated(run, "-o", "cpu.json")
    assert code == 1 and "cpu.json exists" in err and "--force" in err

    asked = ("verify", "t.moeprof", "--calibration", "cpu.json", *SHAPE,
             "--settings", "lru:2,min:25%,gating:dynamic_loop")  # fmt: skip
    code, out, err = run(*asked, "--rounds", "2", "--predict-only", "-o", "p.json")
    assert (code, out) == (0, "p.json\n"), err
    assert "Note: calibrated on a CPU" in err
    predicted = json.loads((tmp_path / "p.json").read_text())
    assert predicted["settings"] == ["lru:2", "min:25%", "gating:dynamic_loop"]
    assert predicted["options"]["shape"]["d_ff"] == 8 and predicted["options"]["rounds"] == 2

    code, out, err = run(
        "verify", "t.moeprof", "--predictions", "p.json", "--device", "cpu", "-o", "v.json"
    )
    assert code == 0, err
    assert out.count("lru:2") == 2 and "measured_ms" in out
    assert "the model is off by" in err and "random weights" in err
    written = json.loads((tmp_path / "v.json").read_text())
    assert [row["predicted_ms"] for row in written["rows"]] == pytest.approx(
        [row["predicted_ms"] for row in predicted["rows"]]
    )
    assert all(row["measured_ms"] > 0 for row in written["rows"])
    times = written["step_times"]["lru:2"]
    # Five repetitions at least: three in each of two rounds.
    assert len(times["measured_ms"]) == len(times["rounds"]) >= 6
    assert [visit["round"] for visit in times["visits"]][:2] == [1, 2]
    assert times["visits"][0]["repetitions"] == 3 and times["visits"][0]["probe_ms"] > 0
    assert "host probe: median " in err
    assert {len(each) for each in times["measured_ms"]} == {len(times["steps"])}
    assert written["hardware"] and written["versions"] and written["command"]

    further = ("verify", "t.moeprof", "--predictions", "p.json", "--device", "cpu")
    code, _, err = run(*further, "--continue", "v.json", "--most-seconds", "0", "-o", "more.json")
    assert code == 0, err
    more = json.loads((tmp_path / "more.json").read_text())
    # No time for any visit: what there was is told again, and of which run it is.
    assert more["step_times"] == written["step_times"] and len(more["earlier_runs"]) == 1
    assert more["earlier_runs"][0]["command"] == written["command"]
    code, _, err = run(*further, "--continue", "p.json")
    assert code == 3 and "p.json holds no verification" in err
    code, _, err = run(*asked, "--continue", "v.json")
    assert code == 2 and "--continue goes with the --predictions" in err


def test_ranks_exchange_when_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(calibration.exchange_curve, sizes=(64, 4096), repeats=2)
    monkeypatch.setattr(calibration, "exchange_curve", few)
    code, _, err = calibrated(run, "--ranks", "2")
    assert code == 0, err
    machine = read_calibration(tmp_path / "calibration.json")
    assert machine.exchange_ranks == 2 and machine.all_to_all is not None
    assert machine.all_to_all.sizes == (64.0, 4096.0)
    code, _, err = calibrated(run, "--ranks", "1", "--force")
    assert code == 0, err
    assert read_calibration(tmp_path / "calibration.json").all_to_all is None


def test_trials_of_another_machine(run: Run, tmp_path: Path, of_another_machine: Path) -> None:
    shutil.copy(of_another_machine, "other.json")
    other = read_calibration(tmp_path / "other.json")
    arguments = ("-o", "own.json", "--expert-bytes", "3KiB", "--trials-from", "other.json")
    code, _, err = calibrated(run, *arguments)
    assert code == 0, err
    assert f"{len(other.trials)} trials of {other.name}" in err and "trials at" not in err
    own = read_calibration(tmp_path / "own.json")
    assert other.trials_of is None and own.trials_of is not None
    assert (own.trials_of.machine, own.trials_of.date) == (other.name, other.date)
    assert (own.trials, own.corrections, own.by_size) == (
        other.trials, other.corrections, other.by_size,
    )  # fmt: skip
    assert own.command.endswith("--trials-from other.json")
    assert own.device_copy_bytes_per_s != other.device_copy_bytes_per_s
    with pytest.raises(UsageError, match=f"trials are those of {re.escape(other.name)}"):
        calibration.refitted(own, TINY)

    content = json.loads((tmp_path / "other.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**content, "corrections": None}))
    code, _, err = calibrated(run, *arguments, "--force")
    assert code == 3 and "has no trials" in err


def test_trials_are_refused_before_anything_is_measured(
    run: Run, of_another_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(of_another_machine, "other.json")
    monkeypatch.setattr(calibration, "made_up", None)
    code, _, err = calibrated(run, "--trials-from", "other.json", "--dtype", "bfloat16")
    assert code == 3 and "experts of float32 there, bfloat16 here" in err


def of_another_time(source: str, target: str, **changes: Any) -> None:
    """Copies a calibration, as if it had been measured at another time."""
    content = {**json.loads(Path(source).read_text()), "date": "2999-01-01T00:00:00+00:00"}
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    Path(target).write_text(json.dumps(content))


@pytest.mark.parametrize("knows_sizes", [True, False], ids=["sizes kept", "from before"])
def test_calibrations_of_small_experts_are_pooled(
    run: Run, tmp_path: Path, small_experts: Path, knows_sizes: bool
) -> None:
    shutil.copy(small_experts, "one.json")
    one = read_calibration(tmp_path / "one.json")
    # 44 is no multiple of 8: it is measured at the nearest, 48.
    assert one.device_expert.expert_bytes == (3 * 16 * 24 * 4, 3 * 16 * 48 * 4)
    assert one.sizes is not None
    assert one.sizes.widths == ((3 * 16 * 24 * 4, 16), (3 * 16 * 44 * 4, 16))
    if not knows_sizes:
        of_another_time("one.json", "one.json", sizes=None, date=one.date)
        assert read_calibration(tmp_path / "one.json").sizes is None
    of_another_time("one.json", "two.json")
    code, out, err = run("calibrate", "--pool", "two.json", "--pool", "one.json", "-o", "both.json")
    assert (code, out) == (0, "both.json\n"), err
    both = read_calibration(tmp_path / "both.json")
    assert both.sizes == one.sizes and both.date.startswith("2999")
    assert [trial.measured_ms for trial in both.trials] == 2 * [
        trial.measured_ms for trial in one.trials
    ]
    # By another command it is not known how wide they were.
    if not knows_sizes:
        of_another_time("two.json", "two.json", command="by hand")
        code, _, err = run("calibrate", "--pool", "two.json", "-o", "none.json")
        assert code == 2 and "has other trials than these sizes ask for" in err


def test_calibrations_of_other_weights_are_pooled(run: Run, tmp_path: Path) -> None:
    arguments = ("--dtype", "bfloat16", "--expert-bytes", "3KiB")
    code, _, err = calibrated(run, "-o", "one.json", *arguments)
    assert code == 0, err
    one = read_calibration(tmp_path / "one.json")
    code, _, err = run("calibrate", "--pool", "one.json", "--pool", "one.json", "-o", "both.json")
    assert code == 3 and "two of the calibrations are the same measurement" in err
    assert not (tmp_path / "both.json").exists()
    of_another_time("one.json", "two.json")
    pooling = ("calibrate", "--pool", "one.json", "--pool", "two.json", "-o", "both.json")
    code, out, err = run(*pooling)
    assert (code, out) == (0, "both.json\n"), err
    both = read_calibration(tmp_path / "both.json")
    assert both.dtype == "bfloat16" and len(both.trials) == 2 * len(one.trials)
    assert both.command.startswith("moeprof calibrate --pool one.json")
    for option in (("--trials-from", "one.json"), ("--dtype", "float32")):
        code, _, err = run(*pooling, "--force", *option)
        assert code == 2 and f"leave out {option[0]}" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("verify", "t.moeprof"), 2, "give --calibration FILE, or --predictions FILE"),
        (("verify", "t.moeprof", "--calibration", "none.json"), 3, "there is no calibration"),
        (("verify", "t.moeprof", "--calibration", "bad.json"), 3, "cannot be read"),
        (("verify", "t.moeprof", "--calibration", "bad.json", "--predict-only"), 2, "give -o"),
        (("verify", "t.moeprof", "--predictions", "bad.json"), 3, "cannot be read"),
        (("calibrate", "--device", "tpu"), 2, "no device 'tpu'"),
        (("calibrate", "--device", "cpu", "--expert-bytes", "12"), 2, "no number of bytes"),
        (("calibrate", "--device", "cpu", "--policies", "best"), 2, "no policy 'best'"),
        (("calibrate", "--device", "cpu", "--trials-from", "bad.json"), 3, "cannot be read"),
        (("calibrate", "--device", "cpu", "-o", "bad.json"), 1, "bad.json exists"),
        (("calibrate", "--pool", "bad.json", "--quiet-core"), 2, "leave out --quiet-core"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "bad.json").write_text("{")
    found, out, err = run(*arguments)
    assert found == code and not out
    assert message in err.splitlines()[0]
    assert err.splitlines()[1].startswith("hint: ") and len(err.splitlines()) == 2


def test_what_was_measured_is_on_disk_before_it_is_judged(
    run: Run, tmp_path: Path, of_another_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(of_another_machine, "calibration.json")
    asked = ("verify", "t.moeprof", "--calibration", "calibration.json", *SHAPE, "--settings")
    code, out, err = run(*asked, "lru:2,min:2,lru:2", "--predict-only", "-o", "p.json")
    assert code == 2 and not out and not (tmp_path / "p.json").exists()
    assert err.splitlines() == ["error: lru:2 is given twice", "hint: name every setting once"]
    code, _, err = run(*asked, "lru:2,min:2", "--predict-only", "-o", "p.json")
    assert code == 0, err

    def broken(_: Any) -> Any:
        raise ZeroDivisionError

    judged = ("verify", "t.moeprof", "--predictions", "p.json", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(verification, "summary", broken)
        code, _, err = run(*judged, "-o", "v.json")
    assert code == 1 and "ZeroDivisionError" in err
    kept = json.loads((tmp_path / "v.json").read_text())
    assert set(kept["step_times"]) == {"lru:2", "min:2"} and not kept["findings"]
    assert kept["command"].endswith("-o v.json")
    # It is judged later; and added to one setting at a time, which loses no other.
    more = ("--continue", "v.json", "-o", "v.json", "--force")
    code, _, err = run(*judged, *more, "--most-seconds", "0")
    assert code == 0, err
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["step_times"] == kept["step_times"] and content["findings"]
    code, out, err = run(*judged, *more, "--only", "min:2")
    assert code == 0 and out.count("lru:2") == 2, err
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["step_times"]["lru:2"] == kept["step_times"]["lru:2"]
    assert "2 of 2 predicted settings run" in content["notes"]
    # A list may be given in parts; and more is measured than was asked for with the predictions.
    code, _, err = run(*judged, "--only", "lru:2", "--only", "min:2", "-o", "w.json")
    assert code == 0, err
    content = json.loads((tmp_path / "w.json").read_text())
    assert set(content["step_times"]) == {"lru:2", "min:2"}
    assert all(len(own["measured_ms"]) <= 20 for own in content["step_times"].values())
    monkeypatch.setattr(verification, "TOLERANCE", 0.0)
    code, _, err = run(*judged, "--only", "min:2", "--most-repetitions", "23", "-o", "x.json")
    assert code == 0, err
    content = json.loads((tmp_path / "x.json").read_text())
    assert len(content["step_times"]["min:2"]["measured_ms"]) == 23
    code, _, err = run(*judged, "--most-repetitions", "1")
    assert code == 2 and "5 to 1 repetitions make no sense" in err


def test_settings_of_predictions_cannot_be_changed(run: Run, of_another_machine: Path) -> None:
    shutil.copy(of_another_machine, "calibration.json")
    base = ("verify", "t.moeprof")
    code, _, err = run(*base, "--calibration", "calibration.json", *SHAPE, "--settings", "lru:2",
                       "--predict-only", "-o", "p.json")  # fmt: skip
    assert code == 0, err
    code, _, err = run(*base, "--predictions", "p.json", "--max-steps", "3")
    assert code == 2 and "--max-steps is that of the predictions" in err
