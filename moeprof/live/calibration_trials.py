"""Whole steps under several settings on made-up routing, next to what is modelled of them."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moeprof.live.bench import Bench
from moeprof.live.calibration_sizes import CalibrationSizes, Regime
from moeprof.live.routed_runs import routed_steps, starting_rows
from moeprof.live.setting_runs import (
    RoutedStack,
    SettingRun,
    geometry_of,
    open_stack,
    uncollected,
)
from moeprof.live.watched_steps import StepTimes
from moeprof.replay import cost_model
from moeprof.replay.calibration_file import Calibration, Trial
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.pipeline import Work, step_times
from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, Setting
from moeprof.trace.synthetic import synthetic_trace

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

ROUTING = "made-up routing (Zipf, half of the experts kept from token to token)"

# Few, so that prompts are dispatches of a few tokens too, which is what is predicted.
_PROMPT_TOKENS = 4
_TRIAL_POLICIES = ("lru", "lfu", "paper", "min")
_TRIAL_SHARES = (0.125, 0.5)
_TRIAL_MISSES = ("host", "split")
_TRIAL_MISS_SHARE = 0.25
_TRIAL_AHEAD = ((0.125, 4), (0.5, 2))
_TURNS = 2
_TURN_S = 0.75
_CHEAP_S = 0.1
_MOST_REPETITIONS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class MadeUp:
    """Made-up routing of a regime."""

    regime: Regime
    trace: Trace


def made_up(folder: Path, sizes: CalibrationSizes, regime: Regime) -> MadeUp:
    """Writes the routing of a regime into a folder."""
    trace = synthetic_trace(
        folder / f"calibration-{regime.batch}.moeprof",
        num_requests=2 * regime.batch,
        num_sites=regime.num_layers,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        batch=regime.batch,
        prompt_tokens=_PROMPT_TOKENS,
        # Lengths differ: long enough that the batch stays full while trials run.
        output_tokens=2 * regime.num_steps,
    )
    return MadeUp(regime=regime, trace=trace)


@dataclass(frozen=True, kw_only=True, eq=False)
class TriedSetting:
    """A trial, and what is modelled of it.

    Attributes:
        trial: What was measured.
        work: What is modelled.
        whole: The gating kernel, which has one factor for all its work; None where parts have one.
        expert_bytes: Of an expert.
    """

    trial: Trial
    work: Work
    whole: str | None
    expert_bytes: int


class TrialBench(Bench):
    """Runs trials on one device."""

    def trials(
        self,
        regimes: Sequence[MadeUp],
        size: int,
        machine: Calibration,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> list[TriedSetting]:
        """Runs settings on made-up routing, at one size of experts; ``between`` before each."""
        shape = self.sizes.shape(size)
        # Page-locked memory takes seconds to be had: one copy for all regimes.
        most = max(regimes, key=lambda made: made.regime.num_layers)
        whole = open_stack(
            most.trace, stack="decoder", device=self.device, shape=shape, share_host=True
        )
        found: list[TriedSetting] = []
        # What is there stays: each trial looks for garbage before it begins.
        gc.collect()
        gc.freeze()
        try:
            for made in regimes:
                found += self._regime_trials(whole, made, machine, between)
        finally:
            gc.unfreeze()
            whole.close()
        return found

    def _regime_trials(
        self,
        whole: RoutedStack,
        made: MadeUp,
        machine: Calibration,
        between: Callable[[], None],
    ) -> list[TriedSetting]:
        stack = self._stack_of(whole, made)
        question = trial_question(made, whole.shape)
        settings = trial_settings(machine)
        measured: dict[str, tuple[StepTimes, ...]] = {each.name: () for each in settings}
        # Each setting at two moments: a slow stretch of the machine is no setting's own.
        for turn, order in enumerate((settings, settings[::-1])):
            for setting in order:
                if setting.name not in measured:
                    continue
                between()
                try:
                    measured[setting.name] += self._turn(stack, setting, is_first=turn == 0)
                except torch.cuda.OutOfMemoryError:
                    # A trial fewer: what is kept on the device depends on the setting.
                    del measured[setting.name]
                    torch.cuda.empty_cache()
        return [
            tried_setting(self._kept(measured[setting.name]), question, setting, machine)
            for setting in settings
            if setting.name in measured
        ]

    def _stack_of(self, whole: RoutedStack, made: MadeUp) -> RoutedStack:
        """Returns the first layers of a stack under the routing of a regime."""
        steps = routed_steps(
            made.trace,
            stack="decoder",
            device=self.device,
            dtype=self.dtype,
            max_steps=made.regime.num_steps,
        )
        return dataclasses.replace(
            whole,
            trace=made.trace,
            sites=whole.sites[: made.regime.num_layers],
            steps=tuple(steps),
            hidden=starting_rows(steps, geometry_of(whole.shape), self.device),
        )

    def _turn(
        self, stack: RoutedStack, setting: Setting, *, is_first: bool
    ) -> tuple[StepTimes, ...]:
        run = SettingRun(stack, setting)
        try:
            with uncollected():
                run.warm_up(is_whole=is_first)
                return self._repeated(run)
        finally:
            run.close()

    def _repeated(self, run: SettingRun) -> tuple[StepTimes, ...]:
        """Returns the repetitions of one of `_TURNS` turns.

        Fewer repetitions where they take long, more where they take next to nothing or were
        disturbed: small experts are bound by the host, whose speed varies most.
        """
        begun_s = time.perf_counter()
        found = [run.repeat(self.watch)]
        usual = -(-self.sizes.trial_repetitions // _TURNS)
        while len(found) < _MOST_REPETITIONS:
            elapsed_s = time.perf_counter() - begun_s
            fewest = min(map(sum, zip(*(each.is_quiet for each in found), strict=True)))
            if elapsed_s > (_TURN_S if fewest < usual else _CHEAP_S):
                break
            found.append(run.repeat(self.watch))
        return tuple(found)

    def _kept(self, found: Sequence[StepTimes]) -> tuple[tuple[float | None, ...], ...]:
        """Returns [repetitions][steps] in milliseconds, None where one is set aside.

        A step that was disturbed each time has all its times, which is noted.
        """
        is_quiet = np.array([each.is_quiet for each in found])
        never = ~is_quiet.any(axis=0)
        for _ in range(int(never.sum())):
            self.watch.give_up()
        return tuple(
            tuple(ms if kept else None for ms, kept in zip(each.times_ms, own, strict=True))
            for each, own in zip(found, (is_quiet | never).tolist(), strict=True)
        )


def trial_question(made: MadeUp, shape: ExpertShape) -> cost_model.Question:
    """Returns what is asked of trials of a regime."""
    return cost_model.question_of(
        made.trace, shape=shape, phase="all", max_steps=made.regime.num_steps
    )


def tried_setting(
    measured_ms: tuple[tuple[float | None, ...], ...],
    question: cost_model.Question,
    setting: Setting,
    machine: Calibration,
) -> TriedSetting:
    """Returns a trial beside what is modelled of it."""
    work = cost_model.work_of(question, setting, machine)
    is_gating = isinstance(setting, GatingSetting)
    trial = Trial(
        kind="gating" if is_gating else "buffering",
        setting=setting.name,
        routing=ROUTING,
        modelled_ms=tuple((step_times(work)[0] * 1e3).tolist()),
        measured_ms=measured_ms,
    )
    return TriedSetting(
        trial=trial,
        work=work,
        whole=cost_model.whole_of(setting),
        expert_bytes=question.shape.expert_bytes,
    )


def trial_settings(machine: Calibration) -> list[Setting]:
    """Returns the settings that are tried: no buffer, small and large ones, others, every kernel.

    Policies differ in how long they take to decide, which is measured for all of them, and in what
    they copy, which is known: a few of them are enough. Copies ahead are tried where the time to
    choose them is known.
    """
    known = [name for name in _TRIAL_POLICIES if name in machine.decisions]
    found: list[Setting] = [BufferingSetting(capacity=None)]
    found += [
        BufferingSetting(capacity=share, policy=policy)
        for policy in known or list(machine.decisions)
        for share in _TRIAL_SHARES
    ]
    found += [
        BufferingSetting(capacity=_TRIAL_MISS_SHARE, policy=policy, miss=miss)
        for policy in known[:1]
        for miss in _TRIAL_MISSES
    ]
    if machine.foresee_s is not None:
        found += [
            BufferingSetting(capacity=share, policy=policy, prefetch=prefetch)
            for policy in known[:1]
            for share, prefetch in _TRIAL_AHEAD
        ]
    found += [GatingSetting(kernel=name) for name in machine.gating]
    return found
