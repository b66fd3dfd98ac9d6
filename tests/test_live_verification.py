"""Verification end to end on a tiny trace, and its arithmetic on tables made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from calibrations import corrections, hand_calibration
from shared_core import SharedCore

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from moeprof import live  # noqa: E402
from moeprof.errors import TraceError, UsageError  # noqa: E402
from moeprof.live import verdicts, verification, verification_files, watched_steps  # noqa: E402
from moeprof.live.setting_runs import open_stack  # noqa: E402
from moeprof.live.source_digest import code_digest  # noqa: E402
from moeprof.live.step_percentiles import (  # noqa: E402
    NUM_DRAWS,
    RepeatedSteps,
    spread_of,
    visits_of,
)
from moeprof.live.verification_files import PREDICTIONS_KIND  # noqa: E402
from moeprof.live.verification_options import VerifyOptions  # noqa: E402
from moeprof.live.watched_steps import StepTimes  # noqa: E402
from moeprof.recording.hardware import hardware  # noqa: E402
from moeprof.replay.calibration_file import SCHEMA_VERSION  # noqa: E402
from moeprof.replay.expert_shapes import ExpertShape  # noqa: E402
from moeprof.replay.serving_settings import BufferingSetting, parse_setting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ExpertShape(d_model=16, d_ff=8, dtype="float32")
OPTIONS = VerifyOptions(shape=SHAPE, repetitions=2, most_repetitions=3)
SETTINGS = [parse_setting(text) for text in ("lru:2", "min:2", "lru:4:host", "gating:dynamic")]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("verify") / "t.moeprof",
        num_requests=3,
        num_sites=2,
        num_experts=8,
        batch=3,
        prompt_tokens=4,
        output_tokens=6,
    )


@pytest.fixture(scope="module")
def machine() -> Any:
    known = corrections(residuals=(-0.1, 0.0, 0.2))
    return hand_calibration(is_serial=True, corrections=known)


@pytest.fixture(scope="module")
def verified(trace: Any, machine: Any) -> Any:
    return live.verify(trace, machine, SETTINGS, OPTIONS, device="cpu")


def test_every_setting_is_predicted_and_measured(verified: Any) -> None:
    table = verified.table
    assert list(table["setting"]) == [s.name for s in SETTINGS for _ in (50, 99)]
    numbers = table[["predicted_ms", "measured_ms", "error", "naive_mean_error"]]
    assert np.isfinite(numbers.to_numpy(float)).all()
    assert (table["measured_ms"].astype(float) > 0).all()
    errors = table["predicted_ms"] / table["measured_ms"] - 1
    np.testing.assert_allclose(table["error"].astype(float), errors.astype(float))
    within = (table["low_ms"] <= table["measured_ms"]) & (table["measured_ms"] <= table["high_ms"])
    assert table["inside"].tolist() == within.tolist()
    assert set(table["repetitions"]) <= {2, 3}


def test_it_says_what_ran(verified: Any, trace: Any) -> None:
    notes = " ".join(verified.notes)
    assert "random weights (the shape was given)" in notes
    assert Path(trace.path).name in notes and "made up" in notes
    steps = verified.tables["step_times"]
    one = steps[steps["setting"] == "lru:2"]
    row = verified.table[(verified.table["setting"] == "lru:2")].iloc[1]
    medians = one.groupby("step")["measured_ms"].median()
    assert row["percentile"] == 99
    assert row["measured_ms"] == pytest.approx(np.percentile(medians, 99))
    assert row["raw_ms"] == pytest.approx(np.percentile(one["measured_ms"], 99))
    assert "median over repetitions" in notes


def test_every_visit_is_kept(verified: Any, tmp_path: Path) -> None:
    visits, steps = verified.tables["visits"], verified.tables["step_times"]
    assert set(visits["setting"]) == {setting.name for setting in SETTINGS}
    # In two rounds of one repetition, there and back; what two repetitions know is not enough.
    first = visits[visits["round"] == 1].sort_values("begun_s")["setting"].tolist()
    assert first == [setting.name for setting in SETTINGS]
    assert (visits["repetitions"] == 1).all() and (visits["probe_ms"] > 0).all()
    assert visits.groupby("setting")["round"].apply(list).eq([[1, 2, 3]] * len(SETTINGS)).all()
    notes = " ".join(verified.notes)
    assert "12 visits in 3 rounds, 3 to 3 of each setting" in notes
    assert "host probe: median " in notes
    row = verified.table[(verified.table["setting"] == "lru:2")].iloc[1]
    one = steps[steps["setting"] == "lru:2"]
    times = one["measured_ms"].to_numpy().reshape(3, -1)
    assert row["measured_spread"] == spread_of(times, 99, np.arange(3)) > spread_of(times, 99)
    path = verification_files.write_verification(verified, tmp_path / "v.json", command="a test")
    written = json.loads(path.read_text())["step_times"]["lru:2"]
    assert written["rounds"] == [1, 2, 3]
    assert [sorted(visit) for visit in written["visits"]] == [
        ["begun_s", "probe_ms", "repetitions", "round"]
    ] * 3
    assert visits_of(written).tolist() == [0, 1, 2]
    np.testing.assert_allclose(written["measured_ms"], times)
    assert written["set_aside"] == [[], [], []]


def test_the_summary_is_made_of_the_table(verified: Any) -> None:
    table = verified.table
    median = verified.metric("verification/median error/model").value
    assert median == pytest.approx(table["error"].astype(float).abs().median())
    coverage = verified.metric("verification/coverage")
    assert coverage.value == pytest.approx(table["inside"].astype(float).mean())
    assert coverage.low <= coverage.value <= coverage.high
    worst = verified.metric("verification/regret/worst")
    assert worst.value == pytest.approx(verdicts.regrets(table)["regret"].max())
    assert len(verified.findings) >= 3


def test_regret_by_hand() -> None:
    rows = [
        ("a", 50, 10, 1.0, 2.2),
        ("b", 50, 10, 1.5, 2.0),
        ("c", 50, 20, 0.1, 1.0),
        ("a", 99, 10, 4.0, 3.0),
        ("b", 99, 10, 3.0, 3.0),
        ("d", 99, 10, 1.0, None),
    ]
    columns = ["setting", "percentile", "device_bytes", "predicted_ms", "measured_ms"]
    found = verdicts.regrets(pd.DataFrame(rows, columns=columns))
    assert found["recommended"].tolist() == ["a", "b"]
    np.testing.assert_allclose(found["regret"], [0.1, 0.0])
    assert found["settings"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Clopper and Pearson's closed cases: 1 - 0.05 ** (1 / n), and its mirror.
        (0, 10, 0.0, 1 - 0.05 ** (1 / 10)),
        (10, 10, 0.05 ** (1 / 10), 1.0),
        # R: binom.test(180, 200, conf.level = 0.9)
        (180, 200, 0.8582, 0.9327),
    ],
)
def test_binomial_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert verdicts.binomial_interval(successes, trials) == pytest.approx((low, high), abs=2e-3)


def test_predictions_are_kept_and_judged_later(
    trace: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = verification.make_predictions(trace, machine, SETTINGS[:2], OPTIONS)
    path = verification_files.write_predictions(made, tmp_path / "p.json")
    with pytest.raises(moeprof.MoeprofError, match="exists"):
        verification_files.write_predictions(made, path)
    read = verification_files.read_predictions(path)
    assert read.options == OPTIONS and read.rows == made.rows
    # Nothing is predicted again once there are predictions.
    monkeypatch.setattr(verification, "predict", None)
    result = live.verify(trace, predictions=read, device="cpu")
    assert result.table["predicted_ms"].tolist() == [row["predicted_ms"] for row in made.rows]
    assert result.table["measured_ms"].notna().all()


def test_settings_can_be_run_in_parts(trace: Any, machine: Any) -> None:
    made = verification.make_predictions(trace, machine, SETTINGS, OPTIONS)
    part = live.verify(trace, predictions=made, device="cpu", only=["min:2"])
    assert set(part.table["setting"]) == {"min:2"}
    assert part.table["measured_ms"].notna().all()
    assert any("1 of 4 predicted settings run" in note for note in part.notes)
    late = live.verify(trace, predictions=made, device="cpu", most_s=0.0)
    assert late.table.empty and late.findings[0].text == "Nothing was run."
    assert any("no time for lru:2, min:2" in note for note in late.notes)
    with pytest.raises(UsageError, match="not among the predictions"):
        live.verify(trace, predictions=made, device="cpu", only=["lru:3"])


def test_the_thread_stays_on_a_quiet_core_where_asked_to(
    trace: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system binds no threads")
    before = os.sched_getaffinity(0)
    quiet = max(before)
    seen = []

    class Here(verification.QuietCore):
        def __init__(self) -> None:
            super().__init__(probe=lambda: 1.0 if os.sched_getaffinity(0) == {quiet} else 2.0)

    real = verification.SettingRun.repeat

    def repeat(self: Any, watch: Any = None) -> Any:
        seen.append(os.sched_getaffinity(0))
        found = real(self, watch)
        seen.append(os.sched_getaffinity(0))
        return found

    monkeypatch.setattr(verification, "QuietCore", Here)
    monkeypatch.setattr(verification.SettingRun, "repeat", repeat)
    bound = live.verify(trace, machine, SETTINGS[:1], OPTIONS, device="cpu", quiet_core=True)
    assert seen and all(each == {quiet} for each in seen)
    assert os.sched_getaffinity(0) == before
    assert verification.QUIET_CORE_NOTE in bound.notes
    assert "0.0% of all times were set aside" in bound.notes
    assert bound.tables["step_times"]["is_quiet"].all()
    assert any("the others without their copies" in note for note in bound.notes)
    free = live.verify(trace, machine, SETTINGS[:1], OPTIONS, device="cpu")
    assert verification.QUIET_CORE_NOTE not in free.notes
    assert not any("set aside" in note for note in free.notes)
    assert free.tables["step_times"]["is_quiet"].all()
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(verification, "open_stack", None)
    with pytest.raises(UsageError, match="binds no thread"):
        live.verify(trace, machine, SETTINGS[:1], OPTIONS, device="cpu", quiet_core=True)


@pytest.fixture
def shared_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "QuietCore", SharedCore)
    # Binds no thread: any system will do.
    monkeypatch.setattr(verification, "allowed_cores", lambda: {0})
    # After every step, however quick this machine is.
    monkeypatch.setattr(watched_steps, "_LOOK_EVERY_MS", 0.0)


@pytest.mark.usefixtures("shared_core")
def test_steps_are_set_aside_while_the_core_is_slow(
    trace: Any, machine: Any, tmp_path: Path
) -> None:
    options = dataclasses.replace(OPTIONS, repetitions=4, most_repetitions=4)
    found = live.verify(
        trace, machine, SETTINGS[:2], options, device="cpu", quiet_core=True
    )  # fmt: skip
    steps = found.tables["step_times"]
    ever = steps.groupby(["setting", "step"])["is_quiet"].transform("any")
    aside = (~steps["is_quiet"] & ever).mean()
    # A slow look may be the one before a step or the one after it.
    assert 0.1 < aside < 0.6
    assert found.notes.count(f"{aside:.1%} of all times were set aside") == 1
    never = steps[~ever].groupby("setting")["step"].nunique()
    said = [note for note in found.notes if "never found quiet" in note]
    assert said == (
        [f"{never.sum()} steps of {len(never)} settings were never found quiet: all their times "
         "count"] if len(never) else []
    )  # fmt: skip
    assert verification.QUIET_CORE_NOTE in found.notes
    path = verification_files.write_verification(found, tmp_path / "v.json", command="a test")
    written = json.loads(path.read_text())
    for name, own in steps.groupby("setting"):
        times = own["measured_ms"].to_numpy().reshape(4, -1)
        is_quiet = own["is_quiet"].to_numpy().reshape(4, -1)
        assert not is_quiet.all() and is_quiet.any()
        medians = [
            np.median(step[quiet] if quiet.any() else step)
            for step, quiet in zip(times.T, is_quiet.T, strict=True)
        ]
        for row in written["rows"]:
            if row["setting"] != name:
                continue
            assert row["measured_ms"] == pytest.approx(np.percentile(medians, row["percentile"]))
            assert row["raw_ms"] == pytest.approx(np.percentile(times, row["percentile"]))
            assert row["repetitions"] == 4
        kept = written["step_times"][name]
        assert kept["set_aside"] == [np.flatnonzero(~each).tolist() for each in is_quiet]
        np.testing.assert_allclose(kept["measured_ms"], times)


def test_judged_steps_have_their_own_flags() -> None:
    class Whole:
        def repeat(self, watch: Any) -> StepTimes:
            assert watch is own
            return StepTimes(times_ms=(1.0, 2.0, 3.0, 4.0), is_quiet=(True, False, True, True))

    own = SharedCore()
    run: Any = Whole()
    found = verification._JudgedSteps(run=run, judged=[1, 3], watch=own).repeat()
    assert found == StepTimes(times_ms=(2.0, 4.0), is_quiet=(False, True))


def test_a_file_says_where_it_was_measured(
    trace: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that has a GPU, and a run on its processor.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = verification.make_predictions(trace, machine, SETTINGS[:1], OPTIONS)
    found = live.verify(trace, predictions=made, device="cpu")
    path = verification_files.write_verification(found, tmp_path / "v.json", command="a test")
    said = json.loads(path.read_text())["hardware"]
    assert said == dataclasses.asdict(hardware("cpu"))
    assert said["device"] == "cpu" and said["device_name"] is None


def test_all_draws_are_made_near_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = RepeatedSteps.spreads

    def spied(self: Any, percentiles: Any, **more: Any) -> Any:
        drawn.append(more.get("num_draws", NUM_DRAWS))
        return real(self, percentiles, **more)

    monkeypatch.setattr(RepeatedSteps, "spreads", spied)
    noise = np.random.default_rng(0).normal(size=(12, 9))
    steps = np.linspace(1.0, 2.0, 9)

    def known(share: float) -> float:
        drawn.clear()
        return verification.how_well_known(
            RepeatedSteps(
                times_ms=steps * (1 + share * noise), is_quiet=np.ones((12, 9), np.bool_),
                visit_of=np.arange(12),
            )
        )  # fmt: skip

    assert known(0.2) > 2 * verification.TOLERANCE and drawn == [200]
    assert known(0.002) < verification.TOLERANCE and drawn == [200, 2000]


def test_who_stops_knows_more_than_is_asked(
    trace: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = verification.run_in_rounds

    def spied(names: Any, opened: Any, limits: Any, **more: Any) -> Any:
        asked.append(limits.tolerance)
        return real(names, opened, limits, **more)

    monkeypatch.setattr(verification, "run_in_rounds", spied)
    live.verify(trace, predictions=made, device="cpu", only=["lru:2"], most_s=0.0)
    assert 0.5 * verification.TOLERANCE < asked[0] < 0.95 * verification.TOLERANCE


@pytest.mark.usefixtures("shared_core")
def test_visits_are_added_to_those_of_a_run_that_looked_as_well(
    trace: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "TOLERANCE", 0.0)
    made = verification.make_predictions(trace, machine, SETTINGS[:1], OPTIONS)

    def verified(name: str, **how: Any) -> tuple[Any, Any]:
        found = live.verify(trace, predictions=made, device="cpu", **how)
        path = verification_files.write_verification(
            found, tmp_path / name, command=name, earlier=how.get("earlier")
        )
        content = json.loads(path.read_text())
        return content["step_times"]["lru:2"], verification_files.read_verification(path)

    once, earlier = verified("once.json", quiet_core=True)
    assert earlier.is_watched and any(once["set_aside"])
    visited = earlier.visited["lru:2"]
    aside = [np.flatnonzero(~own).tolist() for visit in visited.visits for own in visit.is_quiet]
    assert aside == once["set_aside"]
    both, again = verified("both.json", quiet_core=True, earlier=earlier)
    count = len(once["set_aside"])
    assert len(both["set_aside"]) == len(both["measured_ms"]) > count
    assert both["set_aside"][:count] == once["set_aside"]
    assert both["measured_ms"][:count] == once["measured_ms"]
    assert again.is_watched and len(again.runs) == 2

    free, unwatched = verified("free.json")
    assert not unwatched.is_watched and not any(free["set_aside"])
    for how in ({"earlier": earlier}, {"earlier": unwatched, "quiet_core": True}):
        with pytest.raises(TraceError, match="while the core is slow") as caught:
            verified("refused.json", **how)
        assert "--quiet-core" in str(caught.value.hint) and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        lambda times: times["set_aside"][0].append(len(times["steps"])),
        lambda times: times["set_aside"][0].append(-1),
        lambda times: times["set_aside"][0].append(0.5),
        lambda times: times["set_aside"][0].append(True),
        lambda times: times["set_aside"][0].append("0"),
        lambda times: times["set_aside"].pop(),
        lambda times: times["set_aside"].append([]),
        lambda times: times.update(set_aside=None),
        lambda times: times["measured_ms"][0].__setitem__(0, None),
        lambda times: times["measured_ms"][0].pop(),
    ],
    ids=[
        "past the end", "before the start", "a fraction", "no number", "text", "too few",
        "too many", "nothing", "no time", "too few times",
    ],
)  # fmt: skip
def test_damaged_steps_of_an_earlier_run(verified: Any, tmp_path: Path, change: Any) -> None:
    path = verification_files.write_verification(verified, tmp_path / "v.json", command="a test")
    content = json.loads(path.read_text())
    assert verification_files.read_verification(path).visited["lru:2"].repeated.is_quiet.all()
    change(content["step_times"]["lru:2"])
    path.write_text(json.dumps(content))
    with pytest.raises(TraceError, match=r"v\.json is damaged") as caught:
        verification_files.read_verification(path)
    assert "\n" not in caught.value.message and caught.value.hint


def test_runs_from_before_steps_were_set_aside_are_read(verified: Any, tmp_path: Path) -> None:
    path = verification_files.write_verification(verified, tmp_path / "v.json", command="a test")
    content = json.loads(path.read_text())
    for times in content["step_times"].values():
        del times["set_aside"]
    path.write_text(json.dumps(content))
    found = verification_files.read_verification(path)
    assert not found.is_watched
    assert all(visited.repeated.is_quiet.all() for visited in found.visited.values())


def test_visits_are_added_to_those_of_an_earlier_run(
    trace: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "TOLERANCE", 0.0)
    options = dataclasses.replace(OPTIONS, rounds=2, repetitions=2, most_repetitions=2)
    made = verification.make_predictions(trace, machine, SETTINGS[:2], options)
    names = [setting.name for setting in SETTINGS[:2]]
    once = live.verify(trace, predictions=made, device="cpu", only=names[:1])
    file = verification_files.write_verification(once, tmp_path / "once.json", command="first")
    earlier = verification_files.read_verification(file)
    assert list(earlier.visited) == names[:1] and earlier.runs[-1]["command"] == "first"
    both = live.verify(trace, predictions=made, device="cpu", earlier=earlier)
    assert any("visits were added to those of a run of 20" in note for note in both.notes)
    again = verification_files.write_verification(
        both, tmp_path / "both.json", command="second", earlier=earlier
    )
    content = json.loads(again.read_text())
    assert content["command"] == "second"
    assert [run["command"] for run in content["earlier_runs"]] == ["first"]
    # Which code ran, of each run.
    (first_run,) = content["earlier_runs"]
    assert first_run["source_sha256"] == content["source_sha256"] == code_digest()
    first, second = (json.loads(path.read_text())["step_times"] for path in (file, again))
    old, new = first[names[0]], second[names[0]]
    assert new["measured_ms"][:2] == old["measured_ms"] and len(new["measured_ms"]) == 4
    assert new["visits"][:2] == old["visits"]
    rounds = [visit["round"] for visit in new["visits"]]
    assert rounds[:3] == [1, 2, 3] and rounds == sorted(set(rounds)) and len(rounds) == 4
    # The other setting was not in the earlier run.
    assert len(second[names[1]]["measured_ms"]) == 2
    for row in content["rows"]:
        times = np.array(second[row["setting"]]["measured_ms"])
        assert row["repetitions"] == len(times)
        assert row["measured_ms"] == pytest.approx(
            np.percentile(np.median(times, axis=0), row["percentile"])
        )
    third = verification_files.read_verification(again)
    assert [run["command"] for run in third.runs] == ["first", "second"]

    def refused(match: str, given: Any, **changes: Any) -> None:
        with pytest.raises(TraceError, match=match) as caught:
            live.verify(
                trace, predictions=given, device="cpu",
                earlier=dataclasses.replace(earlier, **changes),
            )  # fmt: skip
        assert caught.value.hint

    refused("was on another", made, machine="another")
    refused("has other steps", made, steps=(1,))
    assert not earlier.is_watched
    refused("sets steps aside while the core is slow, the other does not", made, is_watched=True)
    rows = [{**row, "predicted_ms": row["predicted_ms"] * 1.01} for row in made.rows]
    refused("judges another prediction", dataclasses.replace(made, rows=tuple(rows)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no verification"),
        ('{"kind": "moeprof predictions"}', "holds no verification"),
        ('{"kind": "moeprof verification"}', "damaged"),
        ('{"kind": "moeprof verification", "step_times": {}}', "damaged"),
    ],
)
def test_what_is_no_earlier_run(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(TraceError, match=match) as caught:
        verification_files.read_verification(tmp_path / "bad.json")
    assert "moeprof verify -o" in str(caught.value.hint)


def test_predictions_of_an_older_calibration_are_refused(trace: Any, machine: Any) -> None:
    made = verification.make_predictions(trace, machine, SETTINGS[:1], OPTIONS)
    assert made.facts["calibration_version"] == SCHEMA_VERSION
    older = dataclasses.replace(made, facts={**made.facts, "calibration_version": 2})
    with pytest.raises(TraceError, match="calibration of version 2") as caught:
        live.verify(trace, predictions=older, device="cpu")
    assert "calibrate again" in str(caught.value.hint)


def test_what_does_not_fit_is_said(
    trace: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(stack: Any, setting: Any, **more: Any) -> Any:
        if setting.name == "lru:2":
            raise torch.cuda.OutOfMemoryError("too much")
        return real(stack, setting, **more)

    real = verification.SettingRun
    monkeypatch.setattr(verification, "SettingRun", run)
    result = live.verify(trace, machine, SETTINGS[:2], OPTIONS, device="cpu")
    known = result.table.set_index("setting")["measured_ms"].notna()
    assert not known["lru:2"].any() and known["min:2"].all()
    assert any("No room on the device for lru:2" in each.text for each in result.findings)


@pytest.mark.parametrize(
    "changes", [{"scope": "stack"}, {"initial": "full"}, {"capacity": 0.25}], ids=str
)
def test_settings_that_their_names_do_not_say_are_refused(
    trace: Any, machine: Any, changes: Any
) -> None:
    setting = BufferingSetting(**{"capacity": 2, **changes})
    with pytest.raises(UsageError, match="cannot be run by that name") as caught:
        verification.make_predictions(trace, machine, [setting], OPTIONS)
    assert caught.value.hint


def test_page_locks_are_let_go_of_whatever_happens(
    trace: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = verification.RoutedStack.close
    monkeypatch.setattr(
        verification.RoutedStack, "close", lambda stack: (closed.append(stack), close(stack))
    )

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "run_in_rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.verify(trace, machine, SETTINGS[:1], OPTIONS, device="cpu")
    assert len(closed) == 1


def test_predictions_of_something_else(trace: Any, machine: Any, tmp_path: Path) -> None:
    made = verification.make_predictions(trace, machine, SETTINGS[:1], OPTIONS)
    other = synthetic_trace(tmp_path / "o.moeprof", num_requests=2, num_sites=2, num_experts=8)
    with pytest.raises(TraceError, match="not of"):
        live.verify(other, predictions=made, device="cpu")
    wider = dataclasses.replace(
        made, facts={**made.facts, "shape": dataclasses.asdict(SHAPE.with_bytes(1 << 16))}
    )
    with pytest.raises(UsageError, match="predicted were"):
        live.verify(trace, predictions=wider, device="cpu")
    with pytest.raises(UsageError, match="those of the predictions"):
        live.verify(trace, predictions=made, settings=SETTINGS, device="cpu")
    with pytest.raises(UsageError, match="no calibration"):
        live.verify(trace)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no predictions"),
        (json.dumps({"kind": PREDICTIONS_KIND, "schema_version": 9}), "version 9"),
        (json.dumps({"kind": PREDICTIONS_KIND, "schema_version": 1}), "is damaged"),
    ],
)
def test_damaged_predictions(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(TraceError, match=message):
        verification_files.read_predictions(path)


@pytest.fixture(scope="module")
def made(trace: Any, machine: Any) -> Any:
    return verification.make_predictions(trace, machine, SETTINGS, OPTIONS)


def test_a_setting_counts_once(trace: Any, machine: Any, made: Any) -> None:
    twice = [parse_setting(text) for text in ("lru:2", "min:2", "lru: 2")]
    for settings in (twice, twice[::2]):
        with pytest.raises(UsageError, match="lru:2 is given twice") as caught:
            verification.make_predictions(trace, machine, settings, OPTIONS)
        assert "\n" not in caught.value.message and caught.value.hint
    with pytest.raises(UsageError, match="min:2 is given twice"):
        live.verify(trace, predictions=made, device="cpu", only=["min:2", "min:2"])


def test_what_an_earlier_run_measured_is_not_lost(
    trace: Any, machine: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However quiet the machine is, nobody is known: each that is asked for is visited.
    monkeypatch.setattr(verification, "TOLERANCE", 0.0)
    names = [setting.name for setting in SETTINGS]
    real = verification.SettingRun

    def run(stack: Any, setting: Any, **more: Any) -> Any:
        if setting.name == "lru:4:host":
            raise torch.cuda.OutOfMemoryError("too much")
        return real(stack, setting, **more)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "SettingRun", run)
        once = live.verify(trace, predictions=made, device="cpu", only=names[:3])
    file = verification_files.write_verification(once, tmp_path / "once.json", command="first")
    earlier = verification_files.read_verification(file)
    assert set(earlier.visited) == {"lru:2", "min:2"} and earlier.without_room == ("lru:4:host",)
    # One that it knows, then one that it does not: all others are as they were.
    for only in ("min:2", "gating:dynamic"):
        more = live.verify(trace, predictions=made, device="cpu", only=[only], earlier=earlier)
        wanted = [name for name in names if name in (*names[:3], only)]
        assert more.table["setting"].tolist() == [name for name in wanted for _ in (50, 99)]
        assert any(f"{len(wanted)} of 4 predicted settings run" in note for note in more.notes)
        assert any("No room on the device for lru:4:host" in each.text for each in more.findings)
        path = verification_files.write_verification(
            more, tmp_path / f"{only[:3]}.json", command="second", earlier=earlier
        )
        old, new = (json.loads(each.read_text()) for each in (file, path))
        for name in {"lru:2", "min:2"} - {only}:
            assert new["step_times"][name] == old["step_times"][name]
            kept = [[row for row in each["rows"] if row["setting"] == name] for each in (old, new)]
            assert kept[0] == kept[1] and len(kept[0]) == 2
        visits = sum(len(times["visits"]) for times in new["step_times"].values())
        assert any(note.startswith(f"{visits} visits in ") for note in more.notes)
        count = len(old["step_times"].get(only, {"visits": ()})["visits"])
        assert len(new["step_times"][only]["visits"]) > count
        again = verification_files.read_verification(path)
        assert set(again.visited) == {"lru:2", "min:2", only} and len(again.runs) == 2
        assert again.without_room == ("lru:4:host",)


def test_what_was_measured_is_kept_before_it_is_judged(
    trace: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "v.json"

    def keep(found: Any) -> None:
        verification_files.write_verification(found, path, command="first")

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(verification, "summary", broken)
        with pytest.raises(ZeroDivisionError):
            live.verify(trace, predictions=made, device="cpu", only=["lru:2", "min:2"], keep=keep)
    written = json.loads(path.read_text())
    assert set(written["step_times"]) == {"lru:2", "min:2"} and not written["findings"]
    assert not any("measured_ms" in row for row in written["rows"])
    # It is judged as if it had been at once, without another visit.
    earlier = verification_files.read_verification(path)
    judged = live.verify(trace, predictions=made, device="cpu", earlier=earlier, most_s=0.0)
    assert set(judged.table["setting"]) == {"lru:2", "min:2"}
    for row in judged.table.to_dict(orient="records"):
        times = np.median(written["step_times"][row["setting"]]["measured_ms"], axis=0)
        assert row["measured_ms"] == pytest.approx(np.percentile(times, row["percentile"]))


def put(place: str, value: Any) -> Any:
    """Replaces what lies at a place of a file: keys apart by dots."""

    def change(content: Any) -> None:
        *way, last = (int(key) if key.isdecimal() else key for key in place.split("."))
        for key in way:
            content = content[key]
        content[last] = value

    return change


def without(place: str) -> Any:
    def change(content: Any) -> None:
        *way, last = (int(key) if key.isdecimal() else key for key in place.split("."))
        for key in way:
            content = content[key]
        del content[last]

    return change


def turned(content: Any) -> None:
    for row in content["rows"]:
        row.update(low_ms=row["high_ms"], high_ms=row["low_ms"])


DAMAGED_PREDICTIONS = [
    *((put(f"rows.0.{name}", value), said) for name in (
        "predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms", "naive_mean_ms", "device_bytes",
    ) for value, said in (
        (None, f"{name} of lru:2 p50 is no finite number"),
        ("1.0", f"{name} of lru:2 p50 is no finite number"),
        (True, f"{name} of lru:2 p50 is no finite number"),
        (math.nan, f"{name} of lru:2 p50 is no finite number"),
        (math.inf, f"{name} of lru:2 p50 is no finite number"),
        (-1.0, f"{name} of lru:2 p50 is not positive"),
        (0.0, f"{name} of lru:2 p50 is not positive"),
    )),
    *((without(f"rows.0.{name}"), f"it lacks '{name}'") for name in (
        "setting", "percentile", "predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms",
        "naive_mean_ms", "copied_bytes_per_step", "device_bytes",
    )),
    *((without(f"facts.{name}"), f"it lacks '{name}'") for name in (
        "num_lookups", "trace", "model", "calibrated_on", "calibrated", "date", "shape",
    )),
    (turned, "is outside of its interval"),
    (put("rows.0.copied_bytes_per_step", -1), "is negative"),
    (put("rows.0.judged_hit_rate", 1.5), "is no share"),
    (put("rows.0.percentile", "50"), "no whole number"),
    (put("rows.0.percentile", 500), "a percentile of 500"),
    (put("rows.0.setting", 2), "is no text"),
    (without("rows.0"), "it lacks p50 of lru:2"),
    (lambda c: c["rows"].append(c["rows"][0]), "it has 2 rows of lru:2 p50"),
    (lambda c: c.update(rows=c["rows"][2:]), "rows are not those of its settings"),
    (lambda c: c.update(settings=[*c["settings"], "lru:2"]), "rows are not those of its settings"),
    (lambda c: c.update(settings=[], rows=[]), "rows are not those of its settings"),
    (lambda c: c.update(settings=["lru"], rows=[{**r, "setting": "lru"} for r in c["rows"][:2]]),
     "'lru' is no setting"),
    (put("rows", [None]), "a row is no table"),
    (put("rows", {}), "rows is no list"),
    (put("settings", "lru:2"), "settings is no list"),
    (put("facts", None), "facts is no table"),
    (put("facts.num_lookups", 1.5), "no whole number"),
    (put("facts.calibration_version", "3"), "no whole number"),
    (put("facts.shape.d_ff", 0), "is less than 1"),
    (put("facts.shape.dtype", "int3"), "there is no dtype"),
    (put("options", None), "options is no table"),
    (put("options.rounds", "x"), "no whole number"),
    (put("options.repetitions", 0), "make no sense"),
    (put("options.max_steps", 0), "is less than 1"),
    (without("options.shape"), "it lacks 'shape'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), DAMAGED_PREDICTIONS)
def test_predictions_that_cannot_be_judged_are_refused_when_read(
    made: Any, tmp_path: Path, change: Any, said: str
) -> None:
    path = verification_files.write_predictions(made, tmp_path / "p.json")
    assert verification_files.read_predictions(path) == dataclasses.replace(
        made, facts=json.loads(json.dumps(made.facts))
    )
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TraceError, match=r"p\.json is damaged") as caught:
        verification_files.read_predictions(path)
    assert said in caught.value.message and "\n" not in caught.value.message
    assert "--predict-only" in caught.value.hint


def test_predictions_without_intervals_are_read(made: Any, tmp_path: Path) -> None:
    rows = tuple({**row, "low_ms": None, "high_ms": None} for row in made.rows)
    path = verification_files.write_predictions(
        dataclasses.replace(made, rows=rows), tmp_path / "p.json"
    )
    assert verification_files.read_predictions(path).rows == rows


TIMES = "step_times.lru:2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(f"{TIMES}.measured_ms.0.1", -1.0), "a time of lru:2 is not positive"),
        (put(f"{TIMES}.measured_ms.0.1", 0.0), "a time of lru:2 is not positive"),
        (put(f"{TIMES}.measured_ms.0.1", math.nan), "a time of lru:2 is no finite number"),
        (put(f"{TIMES}.measured_ms.0.1", "1.0"), "a time of lru:2 is no finite number"),
        (put(f"{TIMES}.measured_ms.0.1", True), "a time of lru:2 is no finite number"),
        (put(f"{TIMES}.measured_ms.0", None), "measured_ms of lru:2 is no list"),
        (put(f"{TIMES}.visits.0.repetitions", 1.0), "no whole number"),
        (put(f"{TIMES}.visits.0.round", 0), "is less than 1"),
        (put(f"{TIMES}.visits.1.round", 1), "the rounds of lru:2 do not ascend"),
        (put(f"{TIMES}.visits.0.begun_s", math.nan), "no finite number"),
        (put(f"{TIMES}.visits.0.probe_ms", 0.0), "is not positive"),
        (put(f"{TIMES}.visits", []), "lru:2 has no visits"),
        (without(f"{TIMES}.visits"), "lru:2 has no visits"),
        (put(f"{TIMES}.steps", [0.5]), "a step is no whole number"),
        (put(TIMES, None), "is damaged"),
        (lambda c: c["step_times"].update({"lru:3": c["step_times"]["lru:2"]}), "not predicted"),
        (lambda c: c["step_times"].pop("lru:2"), "has a time and no steps, or steps and no time"),
        (put("rows.0.measured_ms", None), "has a time and no steps, or steps and no time"),
        (put("rows", []), "was measured and not predicted"),
        (put("rows.0.predicted_ms", None), "predicted_ms of lru:2 p50 is no finite number"),
        (lambda c: c["rows"].append(c["rows"][0]), "it has 2 rows of lru:2 p50"),
        (lambda c: c.update(rows=[{**r, "setting": "x"} for r in c["rows"][:2]], step_times={}),
         "'x' is no setting"),
        (put("step_times", []), "step_times is no table"),
        (put("step_times", {}), "is damaged"),
        (lambda c: c["notes"].append(verification.QUIET_CORE_NOTE) or c["step_times"]["lru:2"].pop(
            "set_aside"), "it is not said which"),
        (put("notes", None), "notes is no list"),
        (put("hardware", None), "hardware is no table"),
        (put("date", None), "date is no text"),
        (put("earlier_runs", [{"command": "x"}]), "it lacks 'date'"),
    ],
)  # fmt: skip
def test_an_earlier_run_that_cannot_be_added_to_is_refused_when_read(
    verified: Any, tmp_path: Path, change: Any, said: str
) -> None:
    path = verification_files.write_verification(verified, tmp_path / "v.json", command="a test")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TraceError, match=r"v\.json is damaged") as caught:
        verification_files.read_verification(path)
    assert said in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint


RESULTS = Path(__file__).resolve().parents[1] / "analysis" / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("predicted-*.json")), ids=lambda p: p.stem)
def test_the_kept_predictions_are_read(path: Path) -> None:
    content = json.loads(path.read_text())
    found = verification_files.read_predictions(path)
    assert list(found.rows) == content["rows"] and list(found.settings) == content["settings"]
    verified = RESULTS / path.name.replace("predicted", "verified")
    if not verified.exists():
        return
    written = json.loads(verified.read_text())
    earlier = verification_files.read_verification(verified)
    assert list(earlier.rows) == written["rows"]
    assert set(earlier.visited) | set(earlier.without_room) == set(found.settings)
    for name, visited in earlier.visited.items():
        np.testing.assert_array_equal(
            visited.times_ms, np.array(written["step_times"][name]["measured_ms"])
        )
    # Visits could be added: it judges these predictions.
    predicted = {(row["setting"], row["percentile"]): row["predicted_ms"] for row in found.rows}
    for row in earlier.rows:
        wanted = predicted[row["setting"], row["percentile"]]
        assert row["predicted_ms"] == pytest.approx(wanted, rel=1e-9)


def test_default_settings(machine: Any) -> None:
    names = [setting.name for setting in verification.default_settings(machine)]
    assert len(names) == len(set(names))
    assert {"unbuffered", "lru:25%", "min:75%", "lru:25%:split", "gating:dynamic"} <= set(names)
    assert not any("ahead" in name for name in names)
    able = dataclasses.replace(machine, foresee_s=machine.known_s)
    more = [setting.name for setting in verification.default_settings(able)]
    assert set(more) - set(names) == {"lru:25%:ahead=2", "lru:12.5%:ahead=4"}
    policies = {name.split(":")[0] for name in names if name.endswith("%")}
    assert policies == {"lru", "paper", "min"}


def test_the_model_s_own_weights_where_they_can_be_had() -> None:
    trace = moeprof.open("sample:lm")
    stack = open_stack(trace, stack="decoder", device="cpu", dtype="float32", max_steps=2)
    assert stack.weights_source == "weights of zoo:lm"
    assert len(stack.sites) == len(trace.sites) and len(stack.steps) == 2
    loaded = stack.sites[0].store.weights(3)
    assert loaded.w_in.shape[-1] == trace.sites[0].d_model
    randomly = open_stack(
        trace, stack="decoder", device="cpu", dtype="float32", weights="random", max_steps=1
    )
    assert "asked for" in randomly.weights_source


def test_a_model_that_cannot_be_opened_is_said(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    named = dataclasses.replace(trace.model, name="zoo:none")
    monkeypatch.setattr(trace, "info", dataclasses.replace(trace.info, model=named))
    stack = open_stack(trace, stack="decoder", device="cpu", dtype="float32", max_steps=1)
    assert stack.weights_source.startswith("random weights (the model cannot be opened: ")
