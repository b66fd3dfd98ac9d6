"""The cost model against steps worked out by hand, against the replay, and in its limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import corrections, exactly, flat, hand_calibration, leftovers, surface

import moeprof
from moeprof.errors import TraceError, UsageError
from moeprof.replay import buffer_plans, cost_model, pipeline
from moeprof.replay.calibration_file import (
    Curve,
    DecisionTimes,
    ExpertTimes,
    KernelCorrection,
    Trial,
)
from moeprof.replay.corrections import TriedBuffer, fit_corrections
from moeprof.replay.expert_shapes import ExpertShape, shape_of_trace
from moeprof.replay.gating_work import Dispatches, device_columns, kernel_work
from moeprof.replay.least_squares import fit_parts
from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, parse_setting
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace

SHAPE = ExpertShape(d_model=8, d_ff=4, dtype="float32")
POLICIES = ("lru", "lfu", "lifo", "paper", "fifo", "min", "s3fifo", "arc", "random", "pinned")


def hand_steps(tmp_path: Path, *dispatches: Sequence[int], sites: int = 1) -> Any:
    """One step per dispatch of one site, or one step of several sites; one row per expert."""
    if sites == 1:
        steps = [
            [HandToken(request=0, position=i, experts=[[expert]]) for expert in experts]
            for i, experts in enumerate(dispatches)
        ]
    else:
        rows = zip(*dispatches, strict=True)
        steps = [
            [
                HandToken(request=0, position=0, sequence=s, experts=[[expert] for expert in row])
                for s, row in enumerate(rows)
            ]
        ]
    return hand_trace(tmp_path / "hand.moeprof", steps, num_experts=8)


def modelled_s(trace: Any, setting: Any, machine: Any, **options: Any) -> list[float]:
    question = cost_model.question_of(trace, shape=SHAPE, phase="all", **options)
    found = cost_model.predict(question, setting, machine)
    return (found.modelled_ms / 1e3).tolist()


def test_copies_overlap_with_what_is_there(tmp_path: Path) -> None:
    # Copies 10 s, experts 4 s. Step 1: copies end at 10 and 20, the last expert at 24. Step 2: the
    # copy of expert 2 runs from 0 to 10, expert 1 from 0 to 4, expert 2 from 10 to 14.
    trace = hand_steps(tmp_path, [0, 1], [1, 2], [1, 2])
    assert modelled_s(trace, parse_setting("lru:4"), hand_calibration()) == [24, 14, 8]


def test_a_copy_waits_for_the_last_reader_of_its_slot(tmp_path: Path) -> None:
    # One slot: copy, expert, copy, expert; nothing can overlap.
    trace = hand_steps(tmp_path, [0, 1], [0, 1])
    assert modelled_s(trace, parse_setting("lru:1"), hand_calibration()) == [28, 28]
    # Two slots, three experts: the third copy waits for the first expert (14), not the second.
    trace = hand_steps(tmp_path / "two", [0, 1, 2])
    assert modelled_s(trace, parse_setting("lru:2"), hand_calibration()) == [10 + 20 + 4]
    # Experts slower than copies: 10 + 25 = 35 frees the slot, 45 the third copy, 60 the second.
    slow = hand_calibration(device_expert=surface(25.0))
    assert modelled_s(trace, parse_setting("lru:2"), slow) == [10 + 3 * 25]


def test_last_in_first_out_keeps_copies_from_overlapping(tmp_path: Path) -> None:
    # Under lifo with two slots, 1 stays out: 2, 3 pass through the slot of 1 one after another.
    # Copies of 0 and 1 end at 10 and 20, 1 is read until 24, copy of 2 until 34, read until 38, ...
    trace = hand_steps(tmp_path, [0, 1, 2, 3])
    assert modelled_s(trace, parse_setting("lifo:2"), hand_calibration()) == [24 + 14 + 14]
    # lru: the slots take turns; 3 x 10 and 4 after copies wait for 14 and 24 only.
    assert modelled_s(trace, parse_setting("lru:2"), hand_calibration()) == [44]


def test_the_host_computes_what_is_missing(tmp_path: Path) -> None:
    # Miss action host: two misses of 3 s each, one after the other, while copies for later run on
    # the link: 10 and 20. The step ends when the link is done.
    trace = hand_steps(tmp_path, [0, 1], [0, 1])
    machine = hand_calibration(fetch_s=exactly(0.5), return_host_s=exactly(0.25))
    assert modelled_s(trace, parse_setting("lru:4:host"), machine) == [20, 8]
    fast = dataclasses.replace(machine, to_device=flat(1.0))
    assert modelled_s(trace, parse_setting("lru:4:host"), fast) == [0.5 + 6 + 0.25, 8]
    # split with at most 1 row: expert 0 has two rows and is copied, expert 1 runs on the host.
    trace = hand_steps(tmp_path / "rows", [0, 0, 1])
    assert modelled_s(trace, parse_setting("lru:4:split"), fast) == [5]
    assert modelled_s(trace, parse_setting("lru:4:split<=2"), fast) == [0.5 + 6 + 0.25]


def test_the_host_may_be_what_all_wait_for(tmp_path: Path) -> None:
    # 5 s to launch an expert of 4 s: the host's 10 s count, then 1 s to combine and 2 s to wait.
    trace = hand_steps(tmp_path, [0, 1])
    machine = hand_calibration(
        expert_host_s=exactly(5.0),
        known_s=exactly(3.0),
        combine_host_s=exactly(1.0),
        sync_s=exactly(2.0),
    )
    assert modelled_s(trace, BufferingSetting(capacity=None), machine) == [3 + 10 + 1 + 2]
    with_slots = dataclasses.replace(machine, slot_host_s=exactly(0.5), load_host_s=exactly(1.0))
    # Known at 3, both copies asked for by 5 and there by 14 and 24; the last expert ends at 28.
    assert modelled_s(trace, parse_setting("lru:4"), with_slots) == [28 + 2]


def test_deciding_is_charged_by_hits_misses_and_slots(tmp_path: Path) -> None:
    decide = DecisionTimes(dispatch_s=1.0, hit_s=0.25, miss_s=0.5, slot_s=0.125, error=0.0)
    machine = hand_calibration(
        decisions={"lru": decide}, to_device=flat(1e-9), device_expert=surface(0.0)
    )
    trace = hand_steps(tmp_path, [0, 1], [0, 2])
    expected = [1 + 2 * (0.5 + 4 * 0.125), 1 + 0.25 + 0.5 + 0.5]
    assert modelled_s(trace, parse_setting("lru:4"), machine) == pytest.approx(expected)


def test_a_dispatch_waits_for_the_one_before(tmp_path: Path) -> None:
    # Two sites in a step, all experts there: sort on the device 1 s, then 4 s; 0.5 s to combine.
    trace = hand_steps(tmp_path, [0], [3], sites=2)
    machine = hand_calibration(sort_device=flat(1.0), combine_device=flat(0.5))
    assert modelled_s(trace, BufferingSetting(capacity=None), machine) == [2 * (1 + 4 + 0.5)]


def test_a_device_that_is_the_host_does_one_thing_after_another(tmp_path: Path) -> None:
    trace = hand_steps(tmp_path, [0, 1], [1, 2])
    machine = hand_calibration(is_serial=True, load_host_s=exactly(0.5), known_s=exactly(1.0))
    assert modelled_s(trace, parse_setting("lru:4"), machine) == [1 + 2 * 14.5, 1 + 4 + 14.5]


def test_gating_is_host_or_device_whichever_is_slower(tmp_path: Path) -> None:
    # 0.5 + 2 s per active expert on the device, 1 s on the host.
    trace = hand_steps(tmp_path, [0, 1], [1, 1])
    setting = GatingSetting(kernel="dynamic")
    assert modelled_s(trace, setting, hand_calibration()) == [4.5, 2.5]
    machine = hand_calibration()
    slow = dataclasses.replace(machine.gating["dynamic"], host_dispatch_s=7.0)
    machine = dataclasses.replace(machine, gating={"dynamic": slow})
    assert modelled_s(trace, setting, machine) == [7, 7]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("cost") / "t.moeprof",
        num_requests=6,
        num_sites=3,
        num_experts=16,
        top_k=2,
        batch=3,
        prompt_tokens=5,
        output_tokens=10,
        seed=3,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("miss", ["load", "host", "split"])
def test_plans_hit_what_they_hit_without_copies_ahead(trace: Any, policy: str, miss: str) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    setting = BufferingSetting(capacity=3, policy=policy, miss=miss)
    plain = buffer_plans.plan_buffer(trace, routed, setting)
    assert plain.copies_per_step(routed).tolist() == routed.per_step(plain.loads).tolist()
    for prefetch in (1, 4):
        ahead = dataclasses.replace(setting, prefetch=prefetch)
        plan = buffer_plans.plan_buffer(trace, routed, ahead)
        assert plan.hit.tolist() == plain.hit.tolist()
        assert plan.num_staging == plain.num_staging + prefetch
        assert plan.num_slots == plain.num_slots
        used = plan.ahead.used.astype(bool)
        assert used.any() and not (used & (plan.hit | plan.loads | plan.on_host)).any()
        assert np.bincount(plan.ahead.dispatch).max() <= prefetch
        assert plan.copies_per_step(routed).sum() == plan.loads.sum() + len(plan.ahead.dispatch)
        if miss == "load":
            assert (plan.hit | plan.loads | plan.ahead.used).all()


def test_copies_ahead_cost_what_they_copy(trace: Any) -> None:
    machine = any_machine(foresee_s=exactly(0.0))
    plain, ahead = (
        predicted(trace, machine, parse_setting(text)) for text in ("lru:4", "lru:4:ahead=2")
    )
    assert (ahead.copied_bytes >= plain.copied_bytes).all()
    assert ahead.copied_bytes.sum() > plain.copied_bytes.sum()
    assert ahead.judged_hit_rate == plain.judged_hit_rate
    assert ahead.device_bytes == plain.device_bytes + 2 * SHAPE.expert_bytes
    # Where copies are for nothing next to experts, what is ahead is not waited for.
    slow = dataclasses.replace(machine, device_expert=surface(1.0))
    plain, ahead = (
        predicted(trace, slow, parse_setting(text)) for text in ("lru:4", "lru:4:ahead=2")
    )
    assert ahead.modelled_ms.sum() < plain.modelled_ms.sum()
    # Where they are all that counts every byte too many shows.
    slow = dataclasses.replace(machine, to_device=flat(1.0))
    plain, ahead = (
        predicted(trace, slow, parse_setting(text)) for text in ("lru:4", "lru:4:ahead=2")
    )
    each = float(slow.to_device.at(SHAPE.block_bytes)) * 1e3 / SHAPE.block_bytes
    assert ahead.modelled_ms.sum() == pytest.approx(ahead.copied_bytes.sum() * each, rel=1e-3)


def test_a_calibration_from_before_refuses_copies_ahead(trace: Any) -> None:
    setting = parse_setting("lru:4:ahead=2")
    for run in (
        lambda machine: predicted(trace, machine, setting),
        lambda machine: moeprof.replay.cost(trace, machine, [setting], shape=SHAPE),
    ):
        with pytest.raises(UsageError, match="how long it takes to say what is copied") as refused:
            run(any_machine())
        assert "moeprof calibrate" in refused.value.hint
        run(any_machine(foresee_s=exactly(1e-5)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 4, 0.29])
def test_plans_are_those_of_the_replay(trace: Any, policy: str, capacity: Any) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    setting = BufferingSetting(capacity=capacity, policy=policy)
    plan = buffer_plans.plan_buffer(trace, routed, setting)
    replayed = moeprof.replay.buffering(
        trace, policies=[policy], capacities=[capacity], semantics="sequential", jobs=1
    ).lookups(policy, capacity)
    assert plan.hit.astype(bool).tolist() == replayed["hit"].tolist()
    assert routed.expert.tolist() == replayed["expert"].tolist()
    misses = (~replayed["hit"]).groupby(replayed["step"]).sum()
    assert routed.per_step(plan.loads.astype(int)).tolist() == misses.tolist()


def test_rows_are_those_of_the_trace(trace: Any) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder", max_steps=4)
    dispatches = [d for d in trace.dispatches(stack="decoder") if d.step <= routed.steps[-1]]
    assert len(routed.steps) == 4
    assert routed.num_tokens.tolist() == [len(d.experts) for d in dispatches]
    assert routed.rows.sum() == sum((d.experts >= 0).sum() for d in dispatches)


def any_machine(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "to_device": Curve(sizes=(256.0, 1024.0), times_s=(exactly(2e-5), exactly(5e-5))),
        "device_expert": ExpertTimes(
            expert_bytes=(1024,),
            by_rows=(Curve(sizes=(1.0, 64.0), times_s=(exactly(1e-5), exactly(4e-5))),),
        ),
        "host_expert": surface(1e-4),
        "expert_host_s": exactly(2e-5),
        "known_s": exactly(4e-5),
        "load_host_s": exactly(1e-5),
    }
    return hand_calibration(policies=POLICIES, **given | changes)


def predicted(trace: Any, machine: Any, setting: Any, **options: Any) -> Any:
    question = cost_model.question_of(trace, shape=SHAPE, **options)
    return cost_model.predict(question, setting, machine)


def test_more_misses_are_never_faster(trace: Any) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    setting = BufferingSetting(capacity=16)
    plan = buffer_plans.plan_buffer(trace, routed, setting)
    generator = np.random.default_rng(1)
    missing = generator.permutation(routed.num_lookups)
    last = np.zeros(len(routed.steps))
    for share in (0.0, 0.25, 0.5, 1.0):
        loads = np.zeros(routed.num_lookups, np.uint8)
        loads[missing[: int(share * len(missing))]] = 1
        awaits = np.where(loads, np.arange(len(loads)), -1).astype(np.int32)
        changed = dataclasses.replace(plan, loads=loads, hit=1 - loads, awaits=awaits)
        work = cost_model.buffering_work_of(routed, changed, setting, SHAPE, any_machine())
        times = pipeline.step_times(work)[0]
        assert (times >= last - 1e-12).all()
        last = times
    assert last.sum() > 0


def test_more_slots_are_never_slower_where_they_hit_the_same(trace: Any) -> None:
    # A cache that holds everything hits the same from 16 slots on; a policy that looks at all
    # slots is not charged here.
    times = [
        predicted(trace, any_machine(), BufferingSetting(capacity=slots)).modelled_ms
        for slots in (16, 24)
    ]
    np.testing.assert_array_equal(*times)
    every = [
        predicted(trace, any_machine(), BufferingSetting(capacity=slots)).modelled_ms.sum()
        for slots in (1, 2, 4, 8, 16)
    ]
    assert every == sorted(every, reverse=True)


def test_the_pipeline_lies_between_its_bounds(trace: Any) -> None:
    setting = BufferingSetting(capacity=4)
    for miss in ("load", "host", "split"):
        chosen = dataclasses.replace(setting, miss=miss)
        overlapped = predicted(trace, any_machine(), chosen).modelled_ms
        serial = predicted(trace, any_machine(is_serial=True), chosen).modelled_ms
        # fetch, return and sync cost nothing on this machine, so nothing is left out of the sum.
        assert (overlapped <= serial + 1e-9).all()
        plan = buffer_plans.plan_buffer(
            trace, buffer_plans.read_routed_rows(trace, "decoder"), chosen
        )
        routed = buffer_plans.read_routed_rows(trace, "decoder")
        work = cost_model.buffering_work_of(routed, plan, chosen, SHAPE, any_machine())
        link_ms = routed.per_step(plan.loads * work.copy_s[0]) * 1e3
        assert (overlapped >= link_ms - 1e-9).all()


def test_factors_scale_their_part_only(trace: Any) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    setting = BufferingSetting(capacity=4)
    plan = buffer_plans.plan_buffer(trace, routed, setting)
    machine = any_machine(is_serial=True)
    work = cost_model.buffering_work_of(routed, plan, setting, SHAPE, machine)
    factors = np.ones((2, len(pipeline.PARTS)))
    factors[1, pipeline.PARTS.index("copy")] = 2.0
    plain, changed = pipeline.step_times(work, factors)
    copies = routed.per_step(plan.loads * work.copy_s[0])
    np.testing.assert_allclose(changed - plain, copies)
    doubled = pipeline.step_times(work, np.full((1, len(pipeline.PARTS)), 2.0))[0]
    np.testing.assert_allclose(doubled, 2 * plain)


@pytest.fixture
def _steady_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are as fast as when they were calibrated, for tests of what else widens."""
    monkeypatch.setattr(cost_model, "HOST_SPREAD", 0.0)


@pytest.mark.usefixtures("_steady_host")
def test_trials_correct_and_widen(trace: Any) -> None:
    setting = BufferingSetting(capacity=4)
    plain = predicted(trace, any_machine(), setting)
    assert plain.percentiles_ms[50][1:] == (None, None)
    assert plain.percentiles_ms[50][0] == pytest.approx(np.percentile(judged_ms(trace, plain), 50))
    same = any_machine(corrections=corrections(2.0))
    found = predicted(trace, same, setting).percentiles_ms
    for percentile in cost_model.PERCENTILES:
        value, low, high = found[percentile]
        assert value == pytest.approx(2 * np.percentile(judged_ms(trace, plain), percentile))
        assert low == pytest.approx(value) and high == pytest.approx(value)
    spread = any_machine(corrections=corrections(2.0, residuals=(-0.3, -0.1, 0.0, 0.1, 0.3)))
    value, low, high = predicted(trace, spread, setting).percentiles_ms[50]
    assert low < 0.9 * value and high > 1.1 * value
    few = any_machine(corrections=corrections(2.0, residuals=(0.1, -0.1)))
    assert predicted(trace, few, setting).percentiles_ms[50][1:] == (None, None)
    others = dataclasses.replace(corrections(3.0), buffering=None)
    found = predicted(trace, any_machine(corrections=others), setting)
    assert found.percentiles_ms == plain.percentiles_ms
    gating = predicted(trace, any_machine(corrections=others), parse_setting("gating:dynamic"))
    np.testing.assert_allclose(gating.step_ms, 3 * gating.modelled_ms)


def judged_ms(trace: Any, prediction: Any) -> Any:
    decode = np.array(buffer_plans.read_routed_rows(trace, "decoder").phases) == "decode"
    return prediction.modelled_ms[decode]


WIDE = (-0.3, -0.1, 0.0, 0.1, 0.3)


def width(trace: Any, machine: Any, text: str) -> float:
    """Upper over lower end of the interval of a median step."""
    _, low, high = predicted(trace, machine, parse_setting(text)).percentiles_ms[50]
    return float(high / low)


def test_the_nearest_size_of_experts_corrects(trace: Any) -> None:
    # Sizes are compared by their ratio: 384 bytes are nearer to 768 than to 96.
    own = {SHAPE.expert_bytes // 4: corrections(2.0), SHAPE.expert_bytes * 2: corrections(5.0)}
    machine = any_machine(corrections=corrections(3.0), by_size=own)
    for text in ("lru:4", "lru:4:host", "lru:4:split", "unbuffered"):
        found = predicted(trace, machine, parse_setting(text))
        np.testing.assert_allclose(found.step_ms, 5 * found.modelled_ms)
    # What has one factor for all of it is fitted over all sizes.
    found = predicted(trace, machine, parse_setting("gating:dynamic"))
    np.testing.assert_allclose(found.step_ms, 3 * found.modelled_ms)
    smaller = ExpertShape(d_model=8, d_ff=1, dtype="float32")
    assert smaller.expert_bytes == min(own)
    question = cost_model.question_of(trace, shape=smaller)
    for text in ("lru:4", "unbuffered"):
        found = cost_model.predict(question, parse_setting(text), machine)
        np.testing.assert_allclose(found.step_ms, 2 * found.modelled_ms)


@pytest.mark.usefixtures("_steady_host")
def test_a_gating_kernel_has_a_factor_of_its_own(trace: Any) -> None:
    own = {"dynamic": KernelCorrection(log_factor=np.log(3.0), error=0.0)}
    known = dataclasses.replace(corrections(2.0), kernels=own, gating=leftovers(WIDE))
    machine = any_machine(corrections=known)
    for text, expected in {"unbuffered": 2.0, "lru:4": 2.0, "gating:dynamic": 3.0}.items():
        found = predicted(trace, machine, parse_setting(text))
        np.testing.assert_allclose(found.step_ms, expected * found.modelled_ms)
    # Its leftovers are those of kernels, and its factor's error counts.
    assert width(trace, machine, "gating:dynamic") > 1.3
    for text in ("unbuffered", "lru:4"):
        assert width(trace, machine, text) == pytest.approx(1)
    unsure = {"dynamic": KernelCorrection(log_factor=np.log(1.5), error=0.1)}
    known = dataclasses.replace(corrections(2.0), kernels=unsure)
    # 90 % of a log of standard deviation 0.1, from 200 draws.
    wide = width(trace, any_machine(corrections=known), "gating:dynamic")
    assert np.log(wide) == pytest.approx(2 * 1.645 * 0.1, rel=0.2)
    # Without trials of it the constants speak, and nothing is known of how far they are off.
    alone = any_machine(corrections=dataclasses.replace(corrections(2.0), kernels={}))
    found = predicted(trace, alone, parse_setting("gating:dynamic"))
    np.testing.assert_array_equal(found.step_ms, found.modelled_ms)
    assert found.percentiles_ms[50][1:] == (None, None)


@pytest.mark.usefixtures("_steady_host")
def test_what_is_not_buffered_is_corrected_part_by_part(trace: Any) -> None:
    # Launching is all that counts without a buffer; with one, copies take ten times as long.
    slow = {"expert_host_s": exactly(1.0), "to_device": flat(10.0)}
    plain = corrections()
    factors = {"launch": 3.0, "copy": 0.5}
    logs = tuple(np.log([factors.get(part, 1.0) for part in pipeline.PARTS]).tolist())
    machine = any_machine(corrections=dataclasses.replace(plain, log_factors=logs), **slow)
    found = predicted(trace, machine, parse_setting("unbuffered"))
    np.testing.assert_allclose(found.step_ms, 3 * found.modelled_ms, rtol=1e-3)
    # Errors of its parts count, those of others do not.
    place = {part: pipeline.PARTS.index(part) for part in ("launch", "copy")}
    for part, expected in (("launch", 0.1), ("copy", 0.0)):
        covariance = np.array(plain.covariance)
        covariance[place[part], place[part]] = 0.1**2
        own = dataclasses.replace(plain, covariance=tuple(map(tuple, covariance.tolist())))
        wide = np.log(width(trace, any_machine(corrections=own, **slow), "unbuffered"))
        assert wide == pytest.approx(2 * 1.645 * expected, rel=0.2, abs=1e-3), part
    # What is left over of it is what is left over of buffers that the host computes nothing for.
    left = dataclasses.replace(
        corrections(residuals=WIDE), host=leftovers((0.0,) * 5), gating=leftovers((0.0,) * 5)
    )
    assert width(trace, any_machine(corrections=left), "unbuffered") > 1.3
    # Without such trials the constants speak: those of kernels say nothing of it.
    alone = dataclasses.replace(corrections(3.0), buffering=None)
    found = predicted(trace, any_machine(corrections=alone), parse_setting("unbuffered"))
    np.testing.assert_array_equal(found.step_ms, found.modelled_ms)
    assert found.percentiles_ms[50][1:] == (None, None)


@pytest.mark.usefixtures("_steady_host")
def test_settings_whose_host_computes_have_their_own_leftovers(trace: Any) -> None:
    known = dataclasses.replace(corrections(), host=leftovers(WIDE))
    machine = any_machine(corrections=known)
    assert width(trace, machine, "lru:4") == pytest.approx(1)
    assert width(trace, machine, "lru:4:host") > 1.3
    assert width(trace, machine, "lru:4:split") > 1.3
    steady = dataclasses.replace(corrections(residuals=WIDE), host=leftovers((0.0,) * 5))
    machine = any_machine(corrections=steady)
    assert width(trace, machine, "lru:4") > 1.3
    assert width(trace, machine, "lru:4:split") == pytest.approx(1)
    # Where the host was not tried, what else was tried has to do; where nothing else was, it has
    # to be the host's own.
    untried = any_machine(corrections=corrections(residuals=WIDE))
    assert width(trace, untried, "lru:4:host") > 1.3
    alone = any_machine(corrections=dataclasses.replace(known, buffering=None))
    found = predicted(trace, alone, parse_setting("lru:4"))
    assert found.percentiles_ms[50][1:] == (None, None)
    assert width(trace, alone, "lru:4:host") > 1.3


def test_a_host_that_was_watched_varies_as_it_did(trace: Any) -> None:
    slow = {"expert_host_s": exactly(1.0), "corrections": corrections()}
    probes = np.exp(np.random.default_rng(0).normal(0, 0.1, 200)).tolist()
    watched = any_machine(host_probes_ms=tuple(probes), **slow)
    assert cost_model.host_spread(watched) == pytest.approx(0.1, rel=0.15)
    found = np.log(width(trace, watched, "lru:2"))
    assert found == pytest.approx(2 * 1.645 * cost_model.host_spread(watched), rel=0.2)
    # A hiccup is none of its speed, a slow stretch is.
    hiccup = any_machine(host_probes_ms=(1.0,) * 19 + (9.0,), **slow)
    assert cost_model.host_spread(hiccup) == cost_model.LEAST_HOST_SPREAD
    stretch = any_machine(host_probes_ms=(1.0,) * 15 + (2.0,) * 5, **slow)
    assert cost_model.host_spread(stretch) == pytest.approx(np.log(2) / 2)
    few = any_machine(host_probes_ms=(1.0,) * (cost_model.LEAST_PROBES - 1), **slow)
    assert cost_model.host_spread(few) == cost_model.HOST_SPREAD


def test_hosts_vary_where_they_are_waited_for(trace: Any) -> None:
    # 1 s to launch an expert, or 1 s for a copy; all else takes microseconds.
    host_bound = {"expert_host_s": exactly(1.0), "corrections": corrections()}
    link_bound = {"to_device": flat(1.0), "corrections": corrections()}
    by_host = width(trace, any_machine(**host_bound), "lru:2")
    by_link = width(trace, any_machine(**link_bound), "lru:2")
    assert np.log(by_host) == pytest.approx(2 * 1.645 * cost_model.HOST_SPREAD, rel=0.2)
    assert np.log(by_link) < 0.01
    # Without a buffer too; what has one factor for all it does is off by as much, where it waits
    # for the host.
    unbuffered = width(trace, any_machine(**host_bound), "unbuffered")
    assert np.log(unbuffered) == pytest.approx(2 * 1.645 * cost_model.HOST_SPREAD, rel=0.2)
    machine = any_machine(**host_bound)
    for host_s, expected in ((1e-6, 0.0), (1e3, cost_model.HOST_SPREAD)):
        kernel = dataclasses.replace(machine.gating["dynamic"], host_dispatch_s=host_s)
        bound = dataclasses.replace(machine, gating={"dynamic": kernel})
        found = np.log(width(trace, bound, "gating:dynamic"))
        assert found == pytest.approx(2 * 1.645 * expected, rel=0.2, abs=1e-6)
    # The host alone computes and launches where the device is the host: it was calibrated itself.
    for text in ("lru:2", "unbuffered", "gating:dynamic"):
        serial = any_machine(is_serial=True, **host_bound)
        assert width(trace, serial, text) == pytest.approx(1)
    assert set(cost_model.HOST_PARTS) < set(pipeline.PARTS)
    assert not {"copy", "expert", "sort", "combine_device"} & set(cost_model.HOST_PARTS)


@pytest.mark.usefixtures("_steady_host")
def test_errors_of_parts_widen(trace: Any) -> None:
    setting = BufferingSetting(capacity=2)
    slow = Curve(sizes=(256.0,), times_s=(exactly(1e-3),))
    known = corrections()
    narrow = predicted(trace, any_machine(corrections=known, to_device=slow), setting)
    assert narrow.percentiles_ms[50][1] == pytest.approx(narrow.percentiles_ms[50][2])
    covariance = np.array(known.covariance)
    copy = pipeline.PARTS.index("copy")
    covariance[copy, copy] = 0.1**2
    unsure = dataclasses.replace(known, covariance=tuple(map(tuple, covariance.tolist())))
    wide = predicted(
        trace, any_machine(corrections=unsure, to_device=slow), setting
    ).percentiles_ms[50]
    assert wide[1] < 0.95 * wide[0] and wide[2] > 1.05 * wide[0]


@pytest.mark.usefixtures("_steady_host")
def test_stated_intervals_hold_on_a_machine_that_obeys_the_model(trace: Any) -> None:
    # A world in which settings are off by a factor of 5 % and steps by 3 %: of settings measured
    # in it, about nine in ten have to lie within the interval made from trials in it.
    generator = np.random.default_rng(7)
    setting = BufferingSetting(capacity=4)
    question = cost_model.question_of(trace, shape=SHAPE)
    machine = any_machine()
    work = cost_model.work_of(question, setting, machine)
    exact = pipeline.step_times(work)[0] * 1e3

    def run(judged: Any) -> Any:
        factor = 1.1 * np.exp(0.05 * generator.standard_normal())
        noise = np.exp(0.03 * generator.standard_normal((4, len(judged))))
        return exact[judged] * factor * noise

    inside = []
    for _ in range(40):
        tried = [
            TriedBuffer(trial=trial_of(exact, run(np.arange(len(exact)))), work=work)
            for _ in range(12)
        ]
        known = dataclasses.replace(machine, corrections=fit_corrections(tried, {}))
        found = cost_model.predict(question, setting, known)
        measured = np.median(run(question.judged), axis=0)
        for percentile, (_, low, high) in found.percentiles_ms.items():
            inside.append(low <= np.percentile(measured, percentile) <= high)
    assert 0.8 <= np.mean(inside) <= 0.98


def trial_of(modelled_ms: Any, measured_ms: Any, kind: str = "buffering") -> Trial:
    return Trial(
        kind=kind,
        setting="made up",
        routing="made up",
        modelled_ms=tuple(modelled_ms.tolist()),
        measured_ms=tuple(map(tuple, measured_ms.tolist())),
    )


def test_bytes_and_naive_models(tmp_path: Path) -> None:
    trace = hand_steps(tmp_path, [0, 1], [1, 2], [1, 2])
    machine = hand_calibration(to_device=Curve(sizes=(100.0,), times_s=(exactly(10.0),)))
    machine = dataclasses.replace(machine, device_copy_bytes_per_s=exactly(float(1 << 30)))
    question = cost_model.question_of(trace, shape=SHAPE, phase="all")
    found = cost_model.predict(question, parse_setting("lru:4"), machine)
    assert SHAPE.expert_bytes == 3 * 8 * 4 * 4
    assert SHAPE.block_bytes == 256 + 256
    assert found.copied_bytes.tolist() == [1024, 512, 0]
    assert found.device_bytes == 4 * SHAPE.expert_bytes
    assert found.judged_hit_rate == 3 / 6
    read_s = 2 * SHAPE.expert_bytes / (1 << 30)
    assert found.naive_bandwidth_ms[50] == pytest.approx(1e3 * (51.2 + read_s))
    # Copies of 512 bytes take 51.2 s each: 3 of them, 6 experts of 4 s, over 3 steps.
    assert found.naive_mean_ms == pytest.approx(1e3 * (3 * 51.2 + 6 * 4) / 3)


def test_a_hit_rate_is_of_the_judged_steps(tmp_path: Path) -> None:
    # A prompt fills four slots; of four lookups of decode steps one misses. With the prompt's four
    # misses the rate would be 3 of 8, and would contradict the bytes copied per judged step.
    def step(phase: str, *experts: int) -> list[HandToken]:
        return [
            HandToken(request=0, position=i, experts=[[expert]], phase=phase)
            for i, expert in enumerate(experts)
        ]

    steps = [step("prefill", 0, 1, 2, 3), step("decode", 0), step("decode", 1),
             step("decode", 0, 4)]  # fmt: skip
    trace = hand_trace(tmp_path / "hand.moeprof", steps, num_experts=8)
    question = cost_model.question_of(trace, shape=SHAPE)
    found = cost_model.predict(question, parse_setting("lru:4"), hand_calibration())
    assert found.judged_hit_rate == 3 / 4
    (row, _) = cost_model.prediction_rows(found, question)
    misses = (1 - row["judged_hit_rate"]) * 4 / 3
    assert row["copied_bytes_per_step"] == pytest.approx(misses * SHAPE.block_bytes)
    every = cost_model.question_of(trace, shape=SHAPE, phase="all")
    assert cost_model.predict(
        every, parse_setting("lru:4"), hand_calibration()
    ).judged_hit_rate == pytest.approx(3 / 8)
    for text in ("unbuffered", "gating:dynamic"):
        other = cost_model.predict(question, parse_setting(text), any_machine())
        assert other.judged_hit_rate is None
    # Repetitions are a measurement's: nothing is assumed of them.
    result = moeprof.replay.cost(trace, hand_calibration(), [parse_setting("lru:4")], shape=SHAPE)
    assert result.notes[1].startswith("3 of 4 steps judged, to which hit rates")
    assert not any("repetitions" in note for note in result.notes)


def test_predictions_of_a_cpu_say_that_they_were_not_judged(trace: Any) -> None:
    settings = [parse_setting("lru:25%")]
    for is_serial in (False, True):
        machine = any_machine(is_serial=is_serial)
        result = moeprof.replay.cost(trace, machine, settings, shape=SHAPE)
        assert (cost_model.UNJUDGED in result.notes) == is_serial


def test_the_table(trace: Any) -> None:
    machine = any_machine(corrections=corrections(residuals=(0.0, 0.01, -0.01)))
    settings = [parse_setting(text) for text in ("lru:25%", "min:4:host", "gating:dynamic")]
    result = moeprof.replay.cost(trace, machine, settings, shape=SHAPE)
    assert list(result.table["setting"]) == [s.name for s in settings for _ in range(2)]
    assert set(result.table["figure_class"]) == {"estimate"}
    timed = result.table[["predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms"]]
    assert np.isfinite(timed.to_numpy(float)).all()
    assert (result.table["low_ms"] <= result.table["predicted_ms"]).all()
    assert (result.table["predicted_ms"] <= result.table["high_ms"]).all()
    again = moeprof.replay.cost(trace, machine, settings, shape=SHAPE)
    assert again.table.equals(result.table)


def test_settings_are_read_as_they_are_written() -> None:
    for text in ("gating:dynamic", "lru:32", "lru:25%", "lru:32:host", "lru:8:split<=4",
                 "unbuffered", "lru:25%:ahead=2", "min:32:split:ahead=4",
                 "lru:8:split<=4:ahead=1"):  # fmt: skip
        assert parse_setting(text).name == text
    assert parse_setting("lru:32") == BufferingSetting(capacity=32, policy="lru")
    ahead = BufferingSetting(capacity="25%", policy="lru", miss="split", prefetch=4)
    assert parse_setting("lru:25% : split : ahead=4") == ahead
    assert parse_setting("lru:32:load:ahead=0") == parse_setting("lru:32")
    for text in ("lru", "lru:", "a:b:c:d", "lru:32:split<=x", "gating:fast", "best:32", "lru:0.5",
                 "lru:3:fly", "lru:3:ahead=", "lru:3:ahead=x", "lru:3:ahead=-1", "lru:ahead=2",
                 "ahead=2", "lru:3:ahead=2:split", "gating:dynamic:ahead=2",
                 "unbuffered:ahead=2"):  # fmt: skip
        with pytest.raises(UsageError):
            parse_setting(text)
    with pytest.raises(UsageError, match="all experts are on the device"):
        BufferingSetting(capacity=None, prefetch=1)
    with pytest.raises(UsageError, match="-1 experts cannot be copied ahead"):
        BufferingSetting(capacity=3, prefetch=-1)


def test_refusals(trace: Any, tmp_path: Path) -> None:
    machine = hand_calibration(policies=("lru",))
    with pytest.raises(UsageError, match="does not know the policy min"):
        predicted(trace, machine, parse_setting("min:4"))
    with pytest.raises(UsageError, match="does not know the gating kernel static_mask"):
        predicted(trace, machine, parse_setting("gating:static_mask"))
    with pytest.raises(UsageError, match="no steps of phase 'encode'"):
        predicted(trace, machine, parse_setting("lru:4"), phase="encode")
    with pytest.raises(UsageError, match="no stack 'x'"):
        predicted(trace, machine, parse_setting("lru:4"), stack="x")
    with pytest.raises(UsageError, match="nothing to predict"):
        moeprof.replay.cost(trace, machine, [])
    with pytest.raises(UsageError, match="bytes depends"):
        predicted(trace, machine, parse_setting("lru:4MiB"))
    ranks = synthetic_trace(tmp_path / "r.moeprof", num_requests=2, num_sites=1, num_ranks=2)
    with pytest.raises(TraceError, match="several ranks"):
        predicted(ranks, machine, parse_setting("lru:4"))


def test_shapes_of_a_trace(trace: Any) -> None:
    lm = moeprof.open("sample:lm")
    shape = shape_of_trace(lm, "decoder")
    assert shape.expert_bytes == lm.sites[0].expert_bytes
    half = shape_of_trace(lm, "decoder", dtype="float16")
    assert half.expert_bytes * 4 == shape.expert_bytes * half.item_bytes * (4 // shape.item_bytes)
    assert SHAPE.with_bytes(3 * 8 * 32 * 4).d_ff == 32
    with pytest.raises(UsageError, match="no dtype"):
        dataclasses.replace(SHAPE, dtype="int3")


def test_work_of_kernels() -> None:
    one = np.array([1.0])
    given = Dispatches(
        num_tokens=2048 * one, top_k=2 * one, active=5 * one, executed=4096 * one,
        num_experts=16 * one,
    )  # fmt: skip
    dynamic = kernel_work("dynamic", given, SHAPE)
    assert dynamic.weight_bytes == 5 * SHAPE.expert_bytes
    assert dynamic.flops == 4096 * 6 * 8 * 4
    index = kernel_work("static_index", given, SHAPE)
    assert index.flops == 16 * 2048 * SHAPE.flops_per_row
    mask = kernel_work("static_mask", given, SHAPE)
    assert mask.flops - index.flops == 4 * 2048 * 16 * 2048 * 8
    # Two groups of 1,024 tokens: half the mask, the same slots.
    grouped = kernel_work("static_grouped", given, SHAPE)
    assert grouped.flops - index.flops == (mask.flops - index.flops) / 2
    columns = device_columns(dynamic, given.active, hand_calibration())
    np.testing.assert_allclose(columns[0, :2], [1, 5])


def test_parts_are_fitted_without_negative_factors() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(0.1, 1, (30, 4))
    found = fit_parts(columns, columns @ np.array([1.0, 0.0, 3.0, 0.5]))
    np.testing.assert_allclose(found.factors, [1, 0, 3, 0.5], atol=1e-9)
    assert found.error < 1e-9
    times = np.maximum(1.0 - 0.5 * columns[:, 0], 0.1)
    least = fit_parts(columns[:, :1], times)
    assert (least.factors >= 0).all() and least.error > 0


def test_other_percentiles_and_another_plan_can_be_asked_for(tmp_path: Path) -> None:
    trace = hand_steps(tmp_path, [0, 1], [1, 2], [1, 2])
    machine = hand_calibration()
    question = cost_model.question_of(trace, shape=SHAPE, phase="all", percentiles=[95])
    found = cost_model.predict(question, parse_setting("lru:4"), machine)
    assert found.percentiles_ms.keys() == found.naive_bandwidth_ms.keys() == {95}
    assert found.percentiles_ms[95][0] == pytest.approx(np.percentile([24e3, 14e3, 8e3], 95))
    # A plan that copies nothing: what is left are two experts a step.
    resident = buffer_plans.plan_buffer(trace, question.routed, BufferingSetting(capacity=None))
    other = cost_model.predict(question, parse_setting("lru:4"), machine, plan=resident)
    assert other.modelled_ms.tolist() == [8e3] * 3
    assert not other.copied_bytes.any() and found.copied_bytes.any()


@pytest.mark.parametrize("text", ["lru:25%:ahead=²", "lru:²", "lru:4:split<=²"])
def test_superscripts_are_no_numbers_of_a_setting(text: str) -> None:
    with pytest.raises(UsageError):
        parse_setting(text)
