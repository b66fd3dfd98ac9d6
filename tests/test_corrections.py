"""Corrections from trials on machines whose factors are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrations import (
    FREE,
    corrections,
    exactly,
    flat,
    hand_calibration,
    streamed_times,
    surface,
    trial,
)

from moeprof.errors import CalibrationError
from moeprof.replay import cost_model
from moeprof.replay.calibration_file import Corrections, Trial, TrialSource
from moeprof.replay.corrections import (
    BETWEEN_SIZES,
    PRIOR,
    TriedBuffer,
    fit_by_size,
    fit_corrections,
    with_trials_of,
)
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.pipeline import PARTS, Work, step_times
from moeprof.replay.serving_settings import parse_setting
from moeprof.trace.synthetic import synthetic_trace

SHAPE = ExpertShape(d_model=8, d_ff=8, dtype="bfloat16")
SETTINGS = ("unbuffered", "lru:2", "lru:8", "paper:2", "min:4", "lru:4:host", "lru:4:split")


def works_on(folder: Path, copy_s: float) -> list[Work]:
    """What settings do at batch 1 and 4, on a machine whose copies take so long."""
    machine = hand_calibration(
        to_device=flat(copy_s),
        host_expert=surface(3e-4),
        decisions=dict.fromkeys(("lru", "paper", "min"), FREE),
        fetch_s=exactly(2e-5),
        return_host_s=exactly(2e-5),
        sync_s=exactly(1e-5),
        handover_s=exactly(1e-5),
        streamed=streamed_times(
            known_s=exactly(4e-5),
            late_s=exactly(2e-5),
            piece_host=flat(3e-5),
            load_host_s=exactly(5e-6),
            piece_device=surface(4e-5),
            combine_host_s=exactly(2e-5),
            combine_device=flat(1e-5),
        ),
    )
    found = []
    for batch in (1, 4):
        trace = synthetic_trace(
            folder / f"{batch}.moeprof",
            num_requests=2 * batch,
            num_sites=3,
            num_experts=16,
            top_k=3,
            batch=batch,
            prompt_tokens=4,
            output_tokens=8,
        )
        question = cost_model.question_of(trace, shape=SHAPE, phase="all")
        found += [cost_model.work_of(question, parse_setting(text), machine) for text in SETTINGS]
    return found


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> list[Work]:
    """Work on a machine where copies count most."""
    return works_on(tmp_path_factory.mktemp("corrections"), 2e-4)


@pytest.fixture(scope="module")
def bound_works(tmp_path_factory: pytest.TempPathFactory) -> list[Work]:
    """Work on a machine where copies hide all that can be hidden."""
    return works_on(tmp_path_factory.mktemp("bound"), 1e-2)


def only(works: Sequence[Work], *settings: str) -> list[Work]:
    """The work of some of `SETTINGS`."""
    return [work for index, work in enumerate(works) if SETTINGS[index % len(SETTINGS)] in settings]


def trial_of(ms: Any, modelled_ms: Any, kind: str = "buffering") -> Trial:
    return Trial(
        kind=kind,
        setting="made up",
        routing="made up",
        modelled_ms=tuple(modelled_ms),
        measured_ms=tuple(map(tuple, ms)),
    )


def logs_of(factors: Mapping[str, float]) -> Any:
    return np.log([factors.get(part, 1.0) for part in PARTS])


def tried(
    works: Sequence[Work], factors: Mapping[str, float], *, between: float = 0.0,
    noise: float = 0.0, of_host: float = 0.0, expert_bytes: int = SHAPE.expert_bytes, seed: int = 0,
) -> list[TriedBuffer]:  # fmt: skip
    """Trials on a machine that is off by ``factors``, settings by ``between``, steps by noise.

    Settings whose host computes are off by ``of_host`` besides.
    """
    generator = np.random.default_rng(seed)
    found = []
    for work in works:
        exact = step_times(work, np.exp(logs_of(factors))[None])[0] * 1e3
        exact = exact * np.exp(between * generator.standard_normal())
        if of_host and work.on_host.any():
            exact = exact * np.exp(of_host * generator.standard_normal())
        run = exact * np.exp(noise * generator.standard_normal((4, len(exact))))
        trial = trial_of(run, step_times(work)[0] * 1e3)
        found.append(TriedBuffer(trial=trial, work=work, expert_bytes=expert_bytes))
    return found


def factor(found: Any, part: str) -> float:
    return float(np.exp(found.log_factors[PARTS.index(part)]))


def error(found: Any, part: str) -> float:
    place = PARTS.index(part)
    return float(np.sqrt(found.covariance[place][place]))


def test_known_factors_are_recovered(works: list[Work]) -> None:
    found = fit_corrections(tried(works, {"copy": 1.25, "host_expert": 0.8}), {})
    assert found is not None and found.buffering is not None
    assert factor(found, "copy") == pytest.approx(1.25, rel=0.02)
    assert factor(found, "host_expert") == pytest.approx(0.8, rel=0.03)
    assert error(found, "copy") < 0.05
    # What it predicts is what was measured, of trials left out too.
    for each in tried(works, {"copy": 1.25, "host_expert": 0.8}):
        fitted = step_times(each.work, np.exp(found.log_factors)[None])[0] * 1e3
        assert np.median(fitted / each.trial.step_ms()) == pytest.approx(1, abs=0.02)
    assert found.buffering.spread < 0.03


def test_the_first_step_of_a_trial_says_nothing(works: list[Work]) -> None:
    plain = tried(works, {"copy": 1.2})
    cold = [
        dataclasses.replace(
            each,
            trial=dataclasses.replace(
                each.trial,
                measured_ms=tuple((2.0 * run[0], *run[1:]) for run in each.trial.measured_ms),
            ),
        )
        for each in plain
    ]
    assert fit_corrections(cold, {}) == fit_corrections(plain, {})
    kernels = {"dynamic": [trial_of([np.array([9.0, 2.0, 2.0])], [1.0] * 3, "gating")]}
    found = fit_corrections([], kernels)
    assert found is not None and found.gating is not None
    assert found.kernels["dynamic"].log_factor == pytest.approx(np.log(2))
    assert found.gating.jitter == (1.0, 1.0)
    # A trial of one step has no other.
    alone = fit_corrections([], {"dynamic": [trial_of([np.array([9.0])], [1.0], "gating")]})
    assert alone is not None and alone.kernels["dynamic"].log_factor == pytest.approx(np.log(9))


def test_parts_that_no_trial_sees_stay(works: list[Work]) -> None:
    # Nothing is decided, and nothing runs expert by expert; half of the trials is not enough for
    # the host's way, which is not tried there.
    found = fit_corrections(tried(works[:4], {"copy": 1.2}), {})
    assert found is not None
    for part in ("decide", "host_expert", "lane"):
        assert factor(found, part) == pytest.approx(1, abs=1e-6)
        assert error(found, part) == pytest.approx(PRIOR)


def test_what_settings_are_off_by_is_left_over(works: list[Work]) -> None:
    every = [
        fit_corrections(tried(works, {"copy": 1.1}, between=0.05, noise=0.02, seed=seed), {})
        for seed in range(6)
    ]
    spreads = [found.buffering.spread for found in every if found and found.buffering]
    assert 0.03 < np.median(spreads) < 0.08
    assert all(abs(factor(found, "copy") / 1.1 - 1) < 4 * error(found, "copy") for found in every)
    first = every[0]
    assert first is not None and first.buffering is not None
    # Those whose host computes are judged apart.
    assert first.host is not None
    num_host = sum(work.on_host.any() for work in works)
    assert 0 < num_host < len(works)
    assert len(first.host.residuals) == num_host
    assert len(first.buffering.residuals) == len(works) - num_host
    assert 1 <= first.buffering.freedom < len(works) - num_host
    assert 1 <= first.host.freedom < num_host
    assert np.median(first.buffering.jitter) == pytest.approx(1, abs=0.005)
    # A median of four: sigma 1.25 / sqrt(4) of a single step's.
    assert np.std(np.log(first.buffering.jitter)) == pytest.approx(0.02 * 0.6, rel=0.4)


def test_left_out_is_left_out(works: list[Work]) -> None:
    # One trial of a kind of its own: what it says of itself must not be believed.
    given = tried(works, {})
    odd = works[5]
    measured = step_times(odd, np.exp(logs_of({"host_expert": 1.5}))[None])[0] * 1e3
    alone = [each for each, work in zip(given, works, strict=True) if not work.on_host.any()]
    alone.append(TriedBuffer(trial=trial_of([measured], step_times(odd)[0] * 1e3), work=odd))
    found = fit_corrections(alone, {})
    assert found is not None and found.buffering is not None and found.host is not None
    whole = float(np.median(np.log(measured / (step_times(odd)[0] * 1e3))))
    assert whole > 0.1
    assert found.host.residuals == pytest.approx([whole], rel=0.1)
    # Nor does it say anything of the others.
    assert len(found.buffering.residuals) == len(alone) - 1
    assert found.buffering.spread < 0.01
    fitted = step_times(odd, np.exp(found.log_factors)[None])[0] * 1e3
    assert np.median(np.log(measured / fitted)) < 0.5 * whole


def placed(buffers: Sequence[TriedBuffer], first: int = 0) -> list[TriedBuffer]:
    """Trials that each try something else, as every calibration tries it."""
    return [dataclasses.replace(each, place=first + n) for n, each in enumerate(buffers)]


def test_trials_of_one_calibration_are_left_out_one_by_one(works: list[Work]) -> None:
    given = tried(works, {"copy": 1.2}, between=0.05, noise=0.02)
    assert fit_corrections(placed(given), {}) == fit_corrections(given, {})
    assert fit_by_size(placed(given)) == fit_by_size(given)
    kernels = {
        name: [trial_of([np.full(3, 2.0 * ratio)], [2.0] * 3, "gating") for ratio in ratios]
        for name, ratios in {"dynamic": (1.0, 1.2, 1.5), "static_mask": (0.8, 0.9)}.items()
    }
    places = {"dynamic": [("a", 0), ("a", 1), None], "static_mask": [("a", 0), ("a", 1)]}
    assert fit_corrections(given, kernels, places) == fit_corrections(given, kernels)


def test_the_same_at_several_times_is_left_out_together(works: list[Work]) -> None:
    # Every setting is off by something of its own, the same whenever it is tried.
    given = placed(tried(works, {"copy": 1.1}, between=0.1))
    once, twice = fit_corrections(given, {}), fit_corrections([*given, *given], {})
    believed = fit_corrections(
        [dataclasses.replace(each, place=None) for each in [*given, *given]], {}
    )
    assert once is not None and twice is not None and believed is not None
    for kind in ("buffering", "host"):
        own, pooled, alone = (getattr(each, kind) for each in (once, twice, believed))
        count = len(own.residuals)
        assert pooled.residuals[:count] == pytest.approx(pooled.residuals[count:])
        # A second time says nothing new of settings that were not tried: not less is left over.
        assert pooled.spread > max(0.9 * own.spread, 1.03 * alone.spread)
        assert pooled.freedom <= own.freedom + 0.5 and pooled.freedom <= count < alone.freedom
    # By hand: what the others say of each is what they say without its second time.
    every = [each for each in given if each.place != 0]
    others = fit_corrections([*every, *every], {})
    assert others is not None and twice.buffering is not None
    fitted = step_times(given[0].work, np.exp(others.log_factors)[None])[0] * 1e3
    left = np.median(np.log(given[0].trial.step_ms() / fitted)[1:])
    assert twice.buffering.residuals[0] == pytest.approx(left, abs=0.02)


def test_a_kernel_tried_at_several_times_is_left_out_together() -> None:
    def at(ratio: float) -> Trial:
        return trial_of([np.full(3, ratio)], [1.0] * 3, "gating")

    trials = {"dynamic": [at(1.0), at(2.0), at(1.0), at(2.0)], "static_mask": [at(3.0), at(3.0)]}
    places = {"dynamic": ["small", "large"] * 2, "static_mask": ["small", "small"]}
    found = fit_corrections([], trials, places)
    assert found is not None and found.gating is not None
    # Each is judged by the other place alone; the kernel with one place by nothing.
    log = float(np.log(2))
    assert found.gating.residuals == pytest.approx(
        [-log, log, -log, log, np.log(3), np.log(3)], abs=1e-12
    )
    # Three places less two factors; two places, not four trials, tell of the first.
    assert found.gating.freedom == 1
    spread = np.std([0.0, log, 0.0, log], ddof=1)
    assert found.kernels["dynamic"].error == pytest.approx(1.2533 * spread / 2**0.5)
    once = fit_corrections([], {"dynamic": trials["dynamic"][:2]})
    assert once is not None and once.gating is not None
    assert once.gating.residuals == pytest.approx([-log, log])


def test_a_host_that_is_not_steady_does_not_blur_the_rest(works: list[Work]) -> None:
    factors = {"copy": 1.25}
    steady = fit_corrections(tried(works, factors), {})
    found = fit_corrections(tried(works, factors, of_host=0.4), {})
    assert steady is not None and found is not None
    assert found.buffering is not None and found.host is not None
    assert found.buffering.spread < 0.03
    assert 0.1 < found.host.spread < 1
    assert factor(found, "copy") == pytest.approx(1.25, rel=0.03)
    assert error(found, "copy") < 1.5 * error(steady, "copy")
    # What only they can tell is told less well.
    assert error(found, "host_expert") > 2 * error(steady, "host_expert")


def test_each_size_of_experts_is_fitted_by_itself(works: list[Work]) -> None:
    # The larger one first: sizes are put in order.
    large = tried(works, {"copy": 1.3}, expert_bytes=4096)
    small = tried(works, {"copy": 0.8}, expert_bytes=1024)
    found = fit_by_size([*large, *small])
    assert list(found) == [1024, 4096]
    assert factor(found[1024], "copy") == pytest.approx(0.8, rel=0.02)
    assert factor(found[4096], "copy") == pytest.approx(1.3, rel=0.02)
    for own in found.values():
        assert own.buffering is not None and own.host is not None
        assert len(own.buffering.residuals) + len(own.host.residuals) == len(works)
        assert not own.kernels and own.gating is None
    # Together they are neither.
    both = fit_corrections([*large, *small], {})
    assert both is not None and both.buffering is not None
    assert 0.85 < factor(both, "copy") < 1.25
    assert both.buffering.spread > 0.1
    assert fit_by_size([]) == {}


def test_a_size_takes_from_the_others_what_its_trials_do_not_see(works: list[Work]) -> None:
    factors = {"copy": 1.2, "host_expert": 0.7}
    seen = tried(works, factors, expert_bytes=1024)
    # The host computes nothing at the larger size.
    unseen = tried(only(works, "lru:2", "lru:8", "min:4"), factors, expert_bytes=4096)
    overall = fit_corrections([*seen, *unseen], {})
    found = fit_by_size([*seen, *unseen])
    assert overall is not None
    assert factor(overall, "host_expert") == pytest.approx(0.7, rel=0.05)
    part = "host_expert"
    assert factor(found[4096], part) == pytest.approx(factor(overall, part), rel=0.01)
    # It is as sure as it is of all sizes, and as sizes are alike.
    assert error(found[4096], part) == pytest.approx(
        np.hypot(error(overall, part), BETWEEN_SIZES), rel=0.02
    )
    assert error(found[1024], part) < 0.5 * error(found[4096], part)
    assert found[4096].host is None
    # By itself it would know nothing of it.
    alone = fit_corrections(unseen, {})
    assert alone is not None
    assert factor(alone, part) == pytest.approx(1, abs=1e-6)
    assert error(alone, part) == pytest.approx(PRIOR)
    # What nobody sees stays, and is no surer than a constant.
    assert factor(found[4096], "decide") == pytest.approx(1, abs=1e-6)
    assert error(found[4096], "decide") == pytest.approx(np.hypot(PRIOR, BETWEEN_SIZES))


def test_a_size_that_differs_keeps_its_own(works: list[Work]) -> None:
    # Three sizes agree: what they say of all does not move the fourth, nor it them.
    by_size = {1024: 1.0, 2048: 1.0, 4096: 1.0, 8192: 1.6}
    given = [
        one for size, copy in by_size.items()
        for one in tried(works, {"copy": copy}, noise=0.01, expert_bytes=size, seed=size)
    ]  # fmt: skip
    found = fit_by_size(given)
    overall = fit_corrections(given, {})
    assert overall is not None and factor(overall, "copy") < 1.3
    for size, copy in by_size.items():
        assert factor(found[size], "copy") == pytest.approx(copy, rel=0.02)
        own = found[size].buffering
        assert own is not None and own.spread < 0.03
    # What hardly differs, in trials that differ more among themselves, is drawn to the others.
    unsure = [
        *tried(works, {}, noise=0.01, expert_bytes=1024),
        *tried(only(works, "lru:2"), {"copy": 1.2}, between=0.3, expert_bytes=4096, seed=3),
    ]
    drawn = fit_by_size(unsure)[4096]
    apart = fit_corrections([one for one in unsure if one.expert_bytes == 4096], {})
    assert apart is not None
    assert abs(drawn.log_factors[PARTS.index("copy")]) < abs(
        0.8 * apart.log_factors[PARTS.index("copy")]
    )


def test_trials_without_a_buffer_tell_what_copies_hide(bound_works: list[Work]) -> None:
    # A host that is slower than its constants say, where nearly all of a step is copies.
    slow = dict.fromkeys(("known", "launch", "combine_host"), 1.4)
    bound = only(bound_works, "lru:2", "paper:2")
    free = only(bound_works, "unbuffered")

    def fitted(given: Sequence[Work]) -> Corrections:
        return fit_by_size(tried(given, slow, noise=0.002, expert_bytes=1024))[1024]

    def off(found: Corrections) -> float:
        """How far a run without a buffer is from what it is predicted to take."""
        scale = np.exp(np.array([found.log_factors, logs_of(slow)]))
        every = [step_times(work, scale) for work in free]
        return float(max(abs(np.log(np.median(own / exact))) for own, exact in every))

    def unsure(found: Corrections) -> float:
        """The standard deviation of the log of what such a run is predicted to take."""
        root = np.linalg.cholesky(np.array(found.covariance))
        draws = np.random.default_rng(0).standard_normal((200, len(PARTS))) @ root.T
        scale = np.exp(np.array(found.log_factors) + draws)
        return float(max(np.std(np.log(step_times(work, scale).sum(axis=1))) for work in free))

    hidden, told = fitted(bound), fitted([*bound, *free])
    for found in (hidden, told):
        assert factor(found, "copy") == pytest.approx(1, abs=0.01)
    # Copies alone leave the host's parts as they are thought to be.
    for part in slow:
        assert factor(hidden, part) == pytest.approx(1, abs=0.01)
        assert error(hidden, part) > PRIOR
        # The wait is less sure than the others, and takes most of it.
        assert factor(told, part) > 1.02
    assert off(hidden) > 0.1
    assert off(told) < 0.01
    # Which of them it is may be open still; what they take together is not.
    assert unsure(hidden) > 0.1
    assert unsure(told) < 0.05


def test_kernels_have_a_factor_each() -> None:
    plain = [10.0] * 5
    trials = {
        "dynamic": [
            trial_of([np.array(plain) * ratio], plain, "gating") for ratio in (1.8, 2, 2.2)
        ],
        "static_mask": [trial_of([np.array(plain) * 0.5], plain, "gating")],
        "static_index": [],
    }
    found = fit_corrections([], trials)
    assert found is not None and found.buffering is None and found.gating is not None
    assert set(found.kernels) == {"dynamic", "static_mask"}
    assert found.kernels["dynamic"].log_factor == pytest.approx(np.log(2))
    assert 0 < found.kernels["dynamic"].error < 0.15
    assert found.kernels["static_mask"].error > found.kernels["dynamic"].error
    assert len(found.gating.residuals) == 4
    assert found.gating.residuals[0] == pytest.approx(np.log(1.8 / 2.1), abs=0.02)
    assert found.log_factors == (0.0,) * len(PARTS)


def test_no_trials_change_nothing(tmp_path: Path) -> None:
    assert fit_corrections([], {}) is None
    assert fit_corrections([], {"dynamic": []}) is None


def named(name: str, **changes: Any) -> Any:
    return hand_calibration(device={"device_name": name}, **changes)


def test_trials_of_another_machine_correct_the_constants_of_this_one(tmp_path: Path) -> None:
    other = named(
        "other",
        date="2026-01-05T00:00:00+00:00",
        to_device=flat(99.0),
        corrections=corrections(1.5),
        by_size={64: corrections(2.0)},
        trials=(trial(1.5),),
    )
    this = named("this", corrections=corrections(3.0), trials=(trial(3.0), trial(3.0)))
    found = with_trials_of(this, other)
    assert found.trials_of == TrialSource(machine="other", date=other.date)
    taken = {"trials": other.trials, "corrections": other.corrections, "by_size": other.by_size}
    assert found == dataclasses.replace(this, **taken, trials_of=found.trials_of)
    # What is handed on keeps saying where it was measured.
    third = with_trials_of(named("third"), found)
    assert third.trials_of == found.trials_of and third.name == "third"

    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=2, num_sites=2, num_experts=8)
    question = cost_model.question_of(trace, shape=SHAPE)
    setting = parse_setting("lru:2")

    def middle(machine: Any) -> float:
        return cost_model.predict(question, setting, machine).percentiles_ms[50][0]

    plain = middle(dataclasses.replace(this, corrections=None))
    assert middle(found) == pytest.approx(2.0 * plain, rel=1e-3)
    assert middle(this) == pytest.approx(3.0 * plain, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "other has no trials"),
        ({"corrections": dataclasses.replace(corrections(), parts=("copy",))}, "other parts"),
        (
            {
                "corrections": corrections(),
                "by_size": {64: dataclasses.replace(corrections(), parts=("copy",))},
            },
            "other parts",
        ),
        (
            {"corrections": corrections(), "dtype": "bfloat16"},
            "experts of bfloat16 there, float32 here",
        ),
        (
            {"corrections": corrections(), "is_serial": True},
            "is the host itself: True there, False here",
        ),
        (
            {"corrections": corrections(), "streamed": streamed_times()},
            "runs in pieces: True there, False here",
        ),
    ],
)
def test_trials_that_say_nothing_about_a_machine_are_refused(
    changes: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(CalibrationError, match=said) as caught:
        with_trials_of(named("this"), named("other", **changes))
    assert caught.value.hint
