"""Calibration on the CPU at small sizes: what it measures, not how fast that is."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import exactly, flat, hand_calibration
from calibrations import streamed_times as hand_streamed_times
from shared_core import SharedCore

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from moeprof import live  # noqa: E402
from moeprof.errors import CalibrationError, UsageError  # noqa: E402
from moeprof.live import calibration, calibration_trials, part_times, watched_steps  # noqa: E402
from moeprof.live.calibration_sizes import (  # noqa: E402
    GPU_SIZES,
    Regime,
    asked_in,
    asked_sizes,
)
from moeprof.live.calibration_trials import TrialBench, made_up, trial_question  # noqa: E402
from moeprof.live.constant_bench import ConstantBench, ExpertParts, streamed_times  # noqa: E402
from moeprof.live.decision_times import decision_times, foresee_time  # noqa: E402
from moeprof.live.kernels.fused import _has_triton  # noqa: E402
from moeprof.live.kernels.streamed import STREAMED_TOKENS  # noqa: E402
from moeprof.live.part_times import PartTimes  # noqa: E402
from moeprof.live.piece_bench import PieceBench, PieceParts  # noqa: E402
from moeprof.live.setting_runs import SettingRun, open_stack  # noqa: E402
from moeprof.live.transfers import make_slots  # noqa: E402
from moeprof.live.watched_steps import StepTimes  # noqa: E402
from moeprof.recording.hardware import package_version  # noqa: E402
from moeprof.replay import cost_model  # noqa: E402
from moeprof.replay.buffer_plans import read_routed_rows  # noqa: E402
from moeprof.replay.calibration_file import Curve  # noqa: E402
from moeprof.replay.execution_orders import is_streamed  # noqa: E402
from moeprof.replay.expert_shapes import ExpertShape  # noqa: E402
from moeprof.replay.serving_settings import parse_setting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(
    live.CPU_SIZES,
    expert_bytes=(6 << 10, 24 << 10),
    d_model=32,
    num_experts=8,
    regimes=(
        Regime(batch=1, num_layers=2, num_steps=4),
        Regime(batch=2, num_layers=1, num_steps=3),
    ),
    rows=(1, 8),
    host_rows=(1, 4),
    slots=(4, 16),
    tokens=(1, 4),
    pieces=(1, 4),
    cold_bytes=64 << 10,
    repeats=3,
    trial_repetitions=2,
)


LATER = "2999-01-01T00:00:00+00:00"


def as_modelled(machine: Any, factor: float = 1.0) -> Any:
    """A calibration whose trials took ``factor`` times what its constants say, none by chance."""
    trials = tuple(
        dataclasses.replace(
            trial, measured_ms=((factor * np.array(trial.modelled_ms)).tolist(),) * 2
        )
        for trial in machine.trials
    )
    return dataclasses.replace(machine, trials=trials)


@pytest.fixture(scope="module")
def calibrated() -> Any:
    seen: list[tuple[str, int, int]] = []
    machine = live.calibrate(
        "cpu",
        sizes=TINY,
        policies=("lru", "min"),
        kernels=("dynamic_loop", "static_mask"),
        command="a test",
        progress=lambda *step: seen.append(step),
    )
    return machine, seen


def test_everything_is_measured(calibrated: Any) -> None:
    machine, _ = calibrated
    assert machine.is_serial
    assert machine.all_to_all is None
    assert machine.command == "a test"
    assert machine.device["device"] == "cpu"
    assert machine.versions["torch"] == package_version("torch")
    assert machine.dtype == "float32"
    for name in ("device_copy_bytes_per_s", "matrix_flops_per_s", "fetch_s", "launch_device_s"):
        found = getattr(machine, name)
        assert 0 < found.low <= found.median <= found.high
        assert found.num_repetitions > 0
    # A processor has no queue: what the host asks for is what the device does.
    assert machine.expert_host_s.median == machine.known_s.median == 0
    assert set(machine.decisions) == {"lru", "min"}
    assert set(machine.gating) == {"dynamic_loop", "static_mask"}
    for times in machine.gating.values():
        assert min(times.device_dispatch_s, times.weight_factor, times.flops_factor) >= 0
        assert not times.waits


def test_curves_are_at_the_sizes_asked_for(calibrated: Any) -> None:
    machine, _ = calibrated
    shapes = [TINY.shape(size) for size in TINY.expert_bytes]
    assert machine.device_expert.expert_bytes == tuple(shape.expert_bytes for shape in shapes)
    assert machine.to_device.sizes == tuple(float(shape.block_bytes) for shape in shapes)
    assert machine.device_expert.by_rows[0].sizes == (1.0, 8.0)
    assert machine.host_expert.by_rows[1].sizes == (1.0, 4.0)
    assert machine.sort_device.sizes == (4.0, 16.0)


def test_trials_cover_policies_miss_actions_and_kernels(calibrated: Any) -> None:
    machine, _ = calibrated
    names = {trial.setting for trial in machine.trials}
    assert {"unbuffered", "lru:0.125", "min:0.5", "lru:0.25:host", "lru:0.25:split"} <= names
    assert {"lru:0.125:ahead=4", "lru:0.5:ahead=2"} <= names
    assert {"gating:dynamic_loop", "gating:static_mask"} <= names
    assert len(machine.trials) == len(TINY.expert_bytes) * len(TINY.regimes) * len(names)
    assert {len(trial.modelled_ms) for trial in machine.trials} == {4, 3}
    # The host is probed before every trial, and between the constants.
    assert len(machine.host_probes_ms) > len(machine.trials)
    for trial in machine.trials:
        assert TINY.trial_repetitions <= len(trial.measured_ms) <= 12
        assert (trial.ratios() > 0).all() and np.isfinite(trial.ratios()).all()


def test_the_file_holds_it_all(calibrated: Any, tmp_path: Path) -> None:
    machine, _ = calibrated
    path = moeprof.replay.write_calibration(machine, tmp_path / "cpu.json")
    assert moeprof.replay.read_calibration(path) == machine


def test_progress_ends(calibrated: Any) -> None:
    _, seen = calibrated
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == max(total for *_, total in seen)
    assert len(seen) == seen[-1][2]


def test_predictions_follow_from_it(calibrated: Any, tmp_path: Path) -> None:
    machine, _ = calibrated
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=2, num_sites=2, num_experts=8)
    settings = [parse_setting(text) for text in ("lru:2", "unbuffered", "gating:dynamic_loop")]
    result = moeprof.replay.cost(trace, machine, settings, shape=TINY.shape(TINY.expert_bytes[0]))
    buffered = result.table[~result.table["setting"].str.startswith("gating")]
    assert (buffered["low_ms"] <= buffered["high_ms"]).all()
    assert (result.table["predicted_ms"] > 0).all()


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no gating kernel"):
        live.calibrate("cpu", sizes=TINY, kernels=("fast",))
    with pytest.raises(UsageError, match="no policy 'best'"):
        live.calibrate("cpu", sizes=TINY, policies=("best",))
    with pytest.raises(UsageError, match="no device"):
        live.calibrate("tpu9")
    with pytest.raises(UsageError, match="cannot be calibrated"):
        live.calibrate("meta")
    with pytest.raises(UsageError, match="has to ascend"):
        dataclasses.replace(TINY, rows=(8, 1))
    # 44 and 45 wide are both measured at 48: a file could not tell them apart.
    near = [3 * 32 * width * 4 for width in (44, 45)]
    with pytest.raises(UsageError, match="experts of the same bytes"):
        live.calibrate("cpu", sizes=TINY, expert_bytes=near)


def test_an_absent_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(moeprof.MoeprofError, match="no GPU"):
        live.calibrate("cuda")


def test_parts_of_a_device_with_a_queue() -> None:
    # What a queue would give, without one: every function runs, waits are asked for.
    times = PartTimes(torch.device("cpu"), repeats=4, warmup=2)
    calls: list[int] = []
    assert times.host(lambda: calls.append(1)).median == 0
    assert not calls
    assert times.device_part(lambda: calls.append(1)).num_repetitions == 4
    assert len(calls) == 6
    assert times.wall(lambda: calls.append(1)).median > 0
    assert len(calls) == 12
    # Repeated more often, and no more often warmed up.
    assert times.wall(lambda: calls.append(1), times=3).num_repetitions == 12
    assert len(calls) == 12 + 2 + 12


class Script:
    """A watch whose looks are written down before, then find only quiet; notes what it is asked."""

    def __init__(self, *looks: bool) -> None:
        self.looks = iter(looks)
        self.log: list[str] = []
        self.num_given_up = 0

    def settle(self) -> None:
        self.log.append("settle")

    def give_up(self) -> None:
        self.num_given_up += 1

    def is_quiet(self) -> bool:
        self.log.append("look")
        return next(self.looks, True)


def test_the_host_s_part_is_timed_where_its_core_stays_quiet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Script(True, False)
    times = PartTimes(torch.device("cpu"), repeats=2, warmup=1, watch=watch)
    monkeypatch.setattr(times, "is_serial", False)
    monkeypatch.setattr(times, "settle", lambda: None)
    found = times.host(lambda: watch.log.append("run"))
    # Nothing is moved or looked at within what is timed; what was disturbed is timed again, whole.
    # A thread that was moved begins with cold caches: each is warmed up.
    whole = ["settle", "look", "run", *["run"] * (3 * 2), "look"]
    assert watch.log == [*whole, *whole]
    assert found.num_repetitions == 3 * 2
    # So is what host and device do together.
    watch.log.clear()
    watch.looks = iter((False, True, True))
    assert times.wall(lambda: watch.log.append("run")).num_repetitions == 2
    timed = ["settle", "look", *["run"] * (1 + 2)]
    assert watch.log == [*timed, *timed, "look"]


def test_what_is_disturbed_time_and_again_is_timed_all_the_same() -> None:
    watch = Script(*[False] * 100)
    times = PartTimes(torch.device("cpu"), repeats=2, warmup=0, watch=watch)
    assert times.wall(lambda: watch.log.append("run")).num_repetitions == 2
    assert watch.log.count("run") == 6 * 2
    assert watch.log[-4:] == ["settle", "look", "run", "run"]
    # Which is noted, once.
    assert watch.num_given_up == 1


def test_decisions_are_timed_where_the_core_stays_quiet(tmp_path: Path) -> None:
    made = made_up(tmp_path, TINY, Regime(batch=1, num_layers=1, num_steps=3))
    for timed in (
        lambda watch: decision_times([made], "lru", streamed=False, watch=watch),
        lambda watch: foresee_time([made], streamed=False, watch=watch),
    ):
        plain, watch = Script(), Script(False, True, False)
        timed(plain)
        found = timed(watch)
        looks = plain.log.count("look")
        assert looks == 2 * plain.log.count("settle") > 0
        # Once slow before it, once after it: two tries more, of one look and of two.
        assert watch.log.count("look") == looks + 3
        assert watch.log.count("settle") == plain.log.count("settle") + 2
        assert np.isfinite(found.error)


@pytest.mark.parametrize(
    "text", ["lru:3", "min:3:host", "gating:static_index", "unbuffered", "lru:2:ahead=2"]
)
def test_runs_copy_what_the_plan_says(text: str, tmp_path: Path) -> None:
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=3, num_sites=2, num_experts=8, output_tokens=6
    )
    shape = ExpertShape(d_model=16, d_ff=8, dtype="float32")
    stack = open_stack(trace, stack="decoder", device="cpu", shape=shape)
    setting = parse_setting(text)
    run = SettingRun(stack, setting)
    run.warm_up()
    for _ in range(2):
        times = run.repeat()
        assert len(times.times_ms) == len(stack.steps) and all(times.is_quiet)
    question = cost_model.question_of(trace, shape=shape, phase="all")
    assert len(question.routed.steps) == len(stack.steps)
    if not text.startswith("gating"):
        plan = cost_model.plan_buffer(trace, question.routed, setting)
        copies = int(plan.copies_per_step(question.routed).sum())
        assert run.copied_bytes == copies * shape.block_bytes
    run.close()
    assert stack.weights_source.startswith("random weights (the shape was given")


@pytest.mark.skipif(not _has_triton(), reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for a GPU here")
@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
def test_pieces_are_measured_at_the_sizes_asked_for(tmp_path: Path) -> None:
    # In Triton's interpreter: what runs, not how fast that is.
    sizes = dataclasses.replace(TINY, dtype="float16", repeats=1, slots=(2, 6))
    bench = ConstantBench(torch.device("cpu"), sizes)
    shape = sizes.shape(6 << 10)
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=1, num_sites=1, num_experts=3)
    store = bench._store(shape, 3, trace)
    slots, _pools = make_slots([3], [shape.block_bytes], "cpu")
    found = PieceBench(torch.device("cpu"), sizes).of_store(store, slots)
    assert found.device.sizes == found.host.sizes == (1.0, 4.0)
    assert found.combine_device.sizes == (2.0, 6.0)
    assert min(one.median for one in found.device.times_s) > 0
    parts = ExpertParts(
        expert_bytes=shape.expert_bytes, block_bytes=shape.block_bytes, copy=found.known,
        on_device=found.device, on_host=found.host, launch=found.known, slot=found.slot,
        load=found.load, handover=found.slot, pieces=found,
    )  # fmt: skip
    times = streamed_times([dataclasses.replace(parts, pieces=None), parts])
    assert times is not None and times.most_tokens == STREAMED_TOKENS
    assert times.piece_device.expert_bytes == (shape.expert_bytes,)
    assert streamed_times([dataclasses.replace(parts, pieces=None)]) is None


def test_what_does_not_depend_on_the_size_of_experts_is_the_middle() -> None:
    def at(size: int, factor: float, rest: Any) -> ExpertParts:
        def curve(first: float) -> Curve:
            times = (exactly(first * factor), exactly(2 * first * factor))
            return Curve(sizes=(1.0, 4.0), times_s=times)

        nothing = exactly(0.0)
        return ExpertParts(
            expert_bytes=size, block_bytes=size, copy=nothing, on_device=flat(0.0),
            on_host=flat(0.0), launch=nothing, slot=nothing, load=nothing, handover=nothing,
            pieces=PieceParts(
                known=exactly(factor), late=exactly(2 * factor), host=curve(1.0),
                slot=exactly(3 * factor), load=exactly(4 * factor), device=curve(10.0),
                combine_host=exactly(5 * factor), combine_device=curve(3.0), rest=rest,
            ),
        )  # fmt: skip

    # The smallest was measured while the host was slow.
    found = streamed_times([at(1, 9.0, None), at(2, 1.0, exactly(7.0)), at(3, 2.0, exactly(6.0))])
    assert found is not None and found.rest_host_s is not None
    own = (found.known_s, found.late_s, found.slot_host_s, found.load_host_s, found.combine_host_s)
    assert [one.median for one in own] == [2, 4, 6, 8, 10]
    assert min(one.error for one in own) > 0
    assert [one.median for one in found.piece_host.times_s] == [2, 4]
    assert [one.median for one in found.combine_device.times_s] == [6, 12]
    assert found.rest_host_s.median == 6.5
    # What does depend on it is not mixed.
    assert found.piece_device.expert_bytes == (1, 2, 3)
    assert [each.times_s[0].median for each in found.piece_device.by_rows] == [90, 10, 20]
    unknown = streamed_times([at(1, 9.0, None), at(2, 1.0, None)])
    assert unknown is not None and unknown.rest_host_s is None


@pytest.mark.parametrize("regime", live.GPU_SIZES.regimes, ids=lambda regime: regime.batch)
def test_trials_are_what_runs_in_pieces(regime: Regime, tmp_path: Path) -> None:
    made = made_up(tmp_path, live.GPU_SIZES, regime)
    routed = read_routed_rows(made.trace, "decoder", max_steps=regime.num_steps)
    assert len(routed.steps) == regime.num_steps
    able = hand_calibration(streamed=hand_streamed_times(most_tokens=STREAMED_TOKENS))
    for size in live.GPU_SIZES.expert_bytes:
        shape = live.GPU_SIZES.shape(size)
        assert shape.expert_bytes == pytest.approx(size, rel=0.01)
        assert is_streamed(routed.num_tokens, shape, able).all()
    assert set(routed.num_tokens.tolist()) <= set(range(1, STREAMED_TOKENS + 1))
    assert (routed.num_tokens == regime.batch).mean() > 0.5


def test_a_size_has_the_width_that_was_said() -> None:
    sizes = dataclasses.replace(
        live.GPU_SIZES, expert_bytes=(73728, 9 << 20), widths=((73728, 256),)
    )
    narrow, wide = (sizes.shape(size) for size in sizes.expert_bytes)
    assert (narrow.d_model, narrow.d_ff, narrow.expert_bytes) == (256, 48, 73728)
    assert (wide.d_model, wide.d_ff) == (2048, 768)
    bench = ConstantBench(torch.device("cpu"), dataclasses.replace(TINY, dtype="float32"))
    assert bench.rows(3, width=narrow.d_model).shape == (3, 256)
    assert bench.rows(3).shape == (3, TINY.d_model)


def test_a_device_that_streams_decides_about_pieces_too(tmp_path: Path) -> None:
    regime = Regime(batch=1, num_layers=2, num_steps=6)
    made = made_up(tmp_path, TINY, regime)
    for streamed in (False, True):
        times = decision_times([made], "lru", streamed=streamed)
        assert times.dispatch_s + times.hit_s + times.miss_s + times.slot_s > 0
        assert np.isfinite(times.error)


def test_saying_what_is_copied_ahead_is_timed(calibrated: Any, tmp_path: Path) -> None:
    machine, _ = calibrated
    assert 0 < machine.foresee_s.low <= machine.foresee_s.median <= machine.foresee_s.high
    made = made_up(tmp_path, TINY, Regime(batch=1, num_layers=2, num_steps=6))
    routed = read_routed_rows(made.trace, "decoder")
    assert foresee_time([made], streamed=True).num_repetitions == len(routed.site)
    # A calibration without it tries none.
    before = calibration_trials.trial_settings(dataclasses.replace(machine, foresee_s=None))
    assert not any("ahead" in setting.name for setting in before)
    assert len(calibration_trials.trial_settings(machine)) == len(before) + 2


def test_what_each_run_needs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = PartTimes(torch.device("cpu"), repeats=3, warmup=1)
    seen: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(part_times.time, "perf_counter", lambda: float(next(clock)))
    found = times.device_part(lambda: seen.append("run"), before=lambda: next(clock))
    assert seen == ["run"] * 4
    # One tick from before it to after it; what was done before would be another.
    assert found.low == found.high == 1
    times.wall(lambda: seen.append("run"), before=lambda: seen.append("before"))
    assert seen[4:] == ["before", "run"] * 4
    assert times.late(lambda: seen.append("late")).median == 0 and "late" not in seen


class Repeated:
    """A run whose two steps take 1 and 2 ms, and are disturbed as is written down."""

    def __init__(self, is_quiet: Iterable[tuple[bool, bool]]) -> None:
        self.is_quiet = iter(is_quiet)

    def repeat(self, _watch: Any) -> StepTimes:
        return StepTimes(times_ms=(1.0, 2.0), is_quiet=next(self.is_quiet))


def test_long_trials_are_repeated_less_and_quick_ones_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = TrialBench(torch.device("cpu"), dataclasses.replace(TINY, trial_repetitions=5))
    run = Repeated(itertools.repeat((True, True)))
    for seconds, expected in ((1e-6, 6), (0.06, 3), (0.2, 3), (0.5, 2), (2.0, 1)):
        clock = itertools.count(0.0, seconds)
        monkeypatch.setattr(calibration_trials.time, "perf_counter", lambda: next(clock))  # noqa: B023
        expected_times = (StepTimes(times_ms=(1.0, 2.0), is_quiet=(True, True)),) * expected
        assert bench._repeated(run) == expected_times, seconds


def test_trials_that_were_disturbed_are_repeated_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = TrialBench(torch.device("cpu"), dataclasses.replace(TINY, trial_repetitions=4))

    def count(seconds: float, *is_quiet: tuple[bool, bool]) -> int:
        """Returns the repetitions; a step is quiet as given, then always."""
        clock = itertools.count(0.0, seconds)
        monkeypatch.setattr(calibration_trials.time, "perf_counter", lambda: next(clock))
        run = Repeated(itertools.chain(is_quiet, itertools.repeat((True, True))))
        return len(bench._repeated(run))

    # Two of a turn are enough where they take longer than nothing.
    assert count(0.15) == 2
    # The second step was disturbed in the first repetition, the first one in the second.
    assert count(0.15, (True, False)) == count(0.15, (True, False), (False, True)) == 3
    assert count(0.15, (True, False), (True, False)) == 4
    assert count(0.1, *[(True, False)] * 4) == 6
    # Nobody waits for ever, by time or by count.
    assert count(0.3, *[(False, True)] * 9) == 3
    assert count(1e-6, *[(False, True)] * 9) == 6


def test_times_that_were_disturbed_are_left_out() -> None:
    found = [
        StepTimes(times_ms=(1.0, 2.0, 3.0), is_quiet=(True, False, False)),
        StepTimes(times_ms=(4.0, 5.0, 6.0), is_quiet=(True, True, False)),
        StepTimes(times_ms=(7.0, 8.0, 9.0), is_quiet=(False, True, False)),
    ]
    watch = Script()
    kept = TrialBench(torch.device("cpu"), TINY, watch=watch)._kept
    # A step that was never quiet has all its times, which is noted.
    left = ((1.0, None, 3.0), (4.0, 5.0, 6.0), (None, 8.0, 9.0))
    assert kept(found) == left and watch.num_given_up == 1
    assert kept(found[1:2]) == ((4.0, 5.0, 6.0),) and watch.num_given_up == 2
    assert kept(found[:1]) == ((1.0, 2.0, 3.0),) and watch.num_given_up == 4
    assert kept(found[::2]) == ((1.0, None, 3.0), (None, 8.0, 9.0))


def test_trials_take_two_turns_in_opposite_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []
    full = "lru:0.5"

    def turn(_self: Any, _stack: Any, setting: Any, *, is_first: bool) -> Any:
        ran.append((setting.name, is_first))
        if setting.name == full and not is_first:
            raise torch.cuda.OutOfMemoryError
        count = made.regime.num_steps
        return (StepTimes(times_ms=(1.0 if is_first else 2.0,) * count, is_quiet=(True,) * count),)

    monkeypatch.setattr(TrialBench, "_turn", turn)
    bench = TrialBench(torch.device("cpu"), TINY)
    with tempfile.TemporaryDirectory() as folder:
        made = made_up(Path(folder), TINY, TINY.regimes[0])
        machine = hand_calibration()
        found = bench.trials([made], TINY.expert_bytes[0], machine)
    names = [each.name for each in calibration_trials.trial_settings(machine)]
    assert full in names
    assert ran == [(name, True) for name in names] + [(name, False) for name in names[::-1]]
    assert [each.trial.setting for each in found] == [name for name in names if name != full]
    assert all(len(each.trial.measured_ms) == 2 for each in found)
    assert all(each.trial.step_ms()[0] == 1.5 for each in found)


def test_a_machine_whose_core_is_shared_is_calibrated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration, "QuietCore", SharedCore)
    # Binds no thread: any system will do.
    monkeypatch.setattr(calibration, "allowed_cores", lambda: {0})
    monkeypatch.setattr(watched_steps, "_LOOK_EVERY_MS", 0.0)
    few = dataclasses.replace(TINY, expert_bytes=TINY.expert_bytes[:1], trial_repetitions=4)
    machine = live.calibrate(
        "cpu", sizes=few, policies=("lru", "min"), kernels=("dynamic_loop",), quiet_core=True
    )
    measured = [trial.measured_ms for trial in machine.trials]
    times = [each for runs in measured for run in runs for each in run]
    assert machine.num_disturbed is not None and machine.num_disturbed < 10
    assert 0.1 < times.count(None) / len(times) < 0.5
    for runs in measured:
        # Of every step something is left.
        assert all(set(step) != {None} for step in zip(*runs, strict=True))
    for trial in machine.trials:
        assert np.isfinite(trial.step_ms()).all() and (trial.ratios() > 0).all()
    own = machine.corrections
    assert own is not None and own.buffering is not None and own.gating is not None
    assert np.isfinite(own.log_factors).all() and np.isfinite(own.covariance).all()
    assert np.isfinite([*own.buffering.residuals, *own.gating.residuals]).all()
    # The file holds what was set aside, and says the same again.
    path = moeprof.replay.write_calibration(machine, tmp_path / "cpu.json")
    read = moeprof.replay.read_calibration(path)
    assert read == machine
    assert live.refitted(read, few) == machine
    shape = few.shape(few.expert_bytes[0])
    question = trial_question(made_up(tmp_path, few, few.regimes[0]), shape)
    predicted = cost_model.predict(question, parse_setting("lru:50%"), machine)
    assert np.isfinite(predicted.step_ms).all() and (predicted.step_ms > 0).all()


def test_corrections_come_from_the_trials(calibrated: Any) -> None:
    machine, _ = calibrated
    found = machine.corrections
    num_runs = len(TINY.expert_bytes) * len(TINY.regimes)
    names = [trial.setting for trial in machine.trials]
    # Only kernels have one factor for all they do: without a buffer parts are told apart as with.
    is_whole = [name.startswith("gating:") for name in names]
    assert names.count("unbuffered") == num_runs
    assert len(found.buffering.residuals) + len(found.host.residuals) == is_whole.count(False)
    assert len(found.buffering.residuals) >= num_runs + sum(
        name.startswith(("lru", "min")) and not name.endswith((":host", ":split")) for name in names
    )
    # Where a miss is the host's it computes; where misses are split it may.
    assert num_runs <= len(found.host.residuals) <= 2 * num_runs
    assert set(found.kernels) == {"dynamic_loop", "static_mask"}
    assert len(found.gating.residuals) == is_whole.count(True) == 2 * num_runs
    # On the host nothing is handed over, and nothing is launched.
    for part in ("handover", "launch", "load"):
        assert found.log_factors[found.parts.index(part)] == pytest.approx(0, abs=1e-9)


def test_sizes_of_experts_are_corrected_apart(calibrated: Any) -> None:
    machine, _ = calibrated
    assert list(machine.by_size) == [TINY.shape(size).expert_bytes for size in TINY.expert_bytes]
    found = machine.corrections
    for kind in ("buffering", "host"):
        own = [len(getattr(each, kind).residuals) for each in machine.by_size.values()]
        assert sum(own) == len(getattr(found, kind).residuals)
    assert not any(each.kernels for each in machine.by_size.values())


def test_trials_are_fitted_again_as_they_were(calibrated: Any) -> None:
    machine, _ = calibrated
    assert live.refitted(machine, TINY) == machine
    # What was modelled and fitted comes from the constants, not from the file.
    slow = dataclasses.replace(machine.trials[0], modelled_ms=(1e6,) * 4)
    spoilt = dataclasses.replace(
        machine, trials=(slow, *machine.trials[1:]), corrections=None, by_size={}
    )
    assert live.refitted(spoilt, TINY) == machine


def test_what_was_measured_decides_what_is_fitted_again(calibrated: Any, tmp_path: Path) -> None:
    # Two machines of the same constants: one takes what they say, the other twice as long.
    measured, _ = calibrated
    machine = live.refitted(as_modelled(measured), TINY)
    np.testing.assert_allclose(machine.corrections.log_factors, 0, atol=1e-6)
    found = live.refitted(as_modelled(measured, 2.0), TINY)
    assert [each.modelled_ms for each in found.trials] == [
        each.modelled_ms for each in machine.trials
    ]
    for name, own in found.corrections.kernels.items():
        assert machine.corrections.kernels[name].log_factor == pytest.approx(0, abs=1e-9)
        assert own.log_factor == pytest.approx(np.log(2))
    once, twice = step_sums((machine, found), tmp_path)
    np.testing.assert_allclose(twice / once, 2, rtol=0.01)


def step_sums(machines: Iterable[Any], folder: Path) -> Any:
    """[machines, settings] predicted sums of steps, without a buffer and with one."""
    shape = TINY.shape(TINY.expert_bytes[0])
    question = trial_question(made_up(folder, TINY, TINY.regimes[0]), shape)
    settings = [parse_setting(text) for text in ("unbuffered", "lru:50%")]
    return np.array(
        [
            [cost_model.predict(question, setting, each).step_ms.sum() for setting in settings]
            for each in machines
        ]
    )


@pytest.mark.parametrize("damage", ["none", "fewer", "more", "others"])
def test_other_trials_are_not_fitted_again(calibrated: Any, damage: str) -> None:
    machine, _ = calibrated
    own = machine.trials
    other = dataclasses.replace(own[1], setting="lru:7")
    given = {
        "none": (),
        "fewer": own[:-1],
        "more": (*own, own[0]),
        "others": (own[0], other, *own[2:]),
    }[damage]
    with pytest.raises(UsageError, match="has other trials") as caught:
        live.refitted(dataclasses.replace(machine, trials=given), TINY)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"regimes": TINY.regimes[:1]},
        {"regimes": TINY.regimes[::-1]},
        {"regimes": (*TINY.regimes, Regime(batch=3, num_layers=1, num_steps=3))},
        {"d_model": 48},
        {"dtype": "float64"},
    ],
    ids=["fewer-regimes", "other-regimes", "more-regimes", "width", "dtype"],
)
def test_trials_are_not_those_of_other_sizes(calibrated: Any, change: Any) -> None:
    machine, _ = calibrated
    with pytest.raises(UsageError, match="has other trials"):
        live.refitted(machine, dataclasses.replace(TINY, **change))


def test_calibrations_of_one_machine_are_pooled(calibrated: Any, tmp_path: Path) -> None:
    machine, _ = calibrated
    once = live.refitted(machine, TINY)
    # Nothing new is learned from the same twice, but of how sure it is.
    again = dataclasses.replace(machine, date=LATER)
    with pytest.raises(CalibrationError, match="same measurement"):
        live.pooled([machine, machine], TINY)
    same = live.pooled([again, machine], TINY)
    assert same.date == LATER and same.sizes == TINY
    assert len(same.trials) == 2 * len(once.trials)
    for trial, own in zip(same.trials, 2 * once.trials, strict=True):
        assert (trial.setting, trial.measured_ms) == (own.setting, own.measured_ms)
        np.testing.assert_allclose(trial.modelled_ms, own.modelled_ms)
    assert same.host_probes_ms == 2 * machine.host_probes_ms
    assert same.to_device.times_s[0].median == pytest.approx(machine.to_device.times_s[0].median)
    # Nor are settings that were not tried more alike.
    for kind in ("buffering", "host", "gating"):
        both, own = getattr(same.corrections, kind), getattr(once.corrections, kind)
        assert len(both.residuals) == 2 * len(own.residuals)
        assert both.freedom <= len(own.residuals)
        assert both.freedom == pytest.approx(own.freedom, abs=0.2 * len(own.residuals))
    # What trials of different times say counts alike.
    doubled = tuple(
        dataclasses.replace(trial, measured_ms=tuple((2 * np.array(trial.measured_ms)).tolist()))
        for trial in machine.trials
    )
    later = dataclasses.replace(again, trials=doubled)
    found = live.pooled([machine, later], TINY)
    assert len(found.trials) == 2 * len(machine.trials)
    for name, own in found.corrections.kernels.items():
        trials = [each for each in once.trials if each.setting == f"gating:{name}"]
        logs = np.log([np.median(each.ratios()[1:]) for each in trials])
        assert once.corrections.kernels[name].log_factor == pytest.approx(np.median(logs))
        assert own.log_factor == pytest.approx(np.median([*logs, *(logs + np.log(2))]))
    with pytest.raises(UsageError, match="no calibrations"):
        live.pooled([], TINY)
    with pytest.raises(UsageError, match="other trials"):
        live.pooled([machine, dataclasses.replace(later, trials=doubled[:-1])], TINY)


def test_pooled_predictions_lie_between_those_of_each(calibrated: Any, tmp_path: Path) -> None:
    # At one time all took what the constants say, at another twice as long.
    measured, _ = calibrated
    earlier, later = as_modelled(measured), as_modelled(measured, 2.0)
    later = dataclasses.replace(later, date=LATER)
    once, found = live.refitted(earlier, TINY), live.pooled([earlier, later], TINY)
    alone, both = step_sums((once, found), tmp_path)
    np.testing.assert_allclose(np.log(both / alone), np.log(2) / 2, atol=0.1)
    assert found.corrections.buffering.spread > once.corrections.buffering.spread


def test_sizes_are_kept_so_that_trials_can_be_modelled_again(
    calibrated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, _ = calibrated
    assert machine.sizes == TINY
    path = moeprof.replay.write_calibration(machine, tmp_path / "cpu.json")
    read = moeprof.replay.read_calibration(path)
    assert read.sizes == TINY and live.refitted(read) == machine
    # What a caller says counts before what the file says.
    with pytest.raises(UsageError, match="has other trials"):
        live.refitted(read, dataclasses.replace(TINY, d_model=48))
    # A file from before they were kept, by the usual sizes; what was used is known from then on.
    old = dataclasses.replace(read, sizes=None)
    with pytest.raises(UsageError, match="has other trials"):
        live.refitted(old)
    monkeypatch.setattr(calibration, "CPU_SIZES", TINY)
    measured = machine.device_expert.expert_bytes
    assert live.refitted(old) == dataclasses.replace(
        machine, sizes=dataclasses.replace(TINY, expert_bytes=measured)
    )


def test_experts_as_large_and_of_other_width_are_not_pooled(calibrated: Any) -> None:
    machine, _ = calibrated
    wide = dataclasses.replace(TINY, d_model=64)
    assert [wide.shape(size).expert_bytes for size in TINY.expert_bytes] == list(
        machine.device_expert.expert_bytes
    )
    other = dataclasses.replace(machine, date=LATER, sizes=wide)
    with pytest.raises(CalibrationError, match="other widths of the experts"):
        live.pooled([machine, other])


def test_sizes_that_are_asked_for() -> None:
    found = asked_sizes(["64MiB", "256x48", "9MiB", "256x48"], dtype="bfloat16")
    assert found == ((73728, 9 << 20, 64 << 20), ((73728, 256),))
    assert asked_sizes(["256x48"], dtype="float32") == ((147456,), ((147456, 256),))
    with pytest.raises(UsageError, match="gated and without bias"):
        asked_sizes(["256x48:bias"], dtype="float32")
    with pytest.raises(UsageError, match="73728 bytes are asked for at two widths"):
        asked_sizes(["256x48", "128x96"], dtype="bfloat16")


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("moeprof calibrate -o x.json --expert-bytes 256x48,9MiB --quiet-core", ["256x48", "9MiB"]),
        ("moeprof calibrate '--expert-bytes=3KiB, 12KiB'", ["3KiB", "12KiB"]),
        ("moeprof calibrate --expert-bytes 1MiB --expert-bytes 2MiB", ["2MiB"]),
        ("moeprof calibrate --expert-bytes", []),
        ("moeprof calibrate", None),
        ("it's no command", None),
    ],
)
def test_sizes_of_a_command(command: str, found: list[str] | None) -> None:
    assert asked_in(command) == found


RESULTS = Path(__file__).resolve().parents[1] / "analysis" / "results"


@pytest.mark.parametrize("name", ["h100", "h200", "h200-256x48"])
def test_the_kept_calibrations_can_be_fitted_again_and_pooled(name: str) -> None:
    machine = moeprof.replay.read_calibration(RESULTS / f"calibration-{name}.json")
    assert machine.sizes is None
    # They were measured by one shape and two sizes, which their command says.
    found = live.refitted(machine)
    assert found.sizes is not None and found.sizes.widths == ((3 * 256 * 48 * 2, 256),)
    assert found.sizes.regimes == GPU_SIZES.regimes
    for own, kept in zip(found.trials, machine.trials, strict=True):
        assert (own.setting, own.measured_ms) == (kept.setting, kept.measured_ms)
    again = dataclasses.replace(machine, date=LATER)
    assert len(live.pooled([machine, again]).trials) == 2 * len(machine.trials)
