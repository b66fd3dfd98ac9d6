"""Which setting is measured when: in visits, in rounds spread over the whole run.

A slow stretch of the machine then hits a visit of each of many settings and not one setting whole;
neighbours in time are compared, forwards and backwards in turn, and a setting's visits disagree
where the machine did. Leaves out what runs (`setting_runs`) and what it is judged by
(`verification`).
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moeprof.live.host_probe import probe_ms
from moeprof.live.setting_runs import uncollected
from moeprof.live.step_percentiles import RepeatedSteps, more_visits
from moeprof.live.watched_steps import StepTimes

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

# Of a repetition, as long as no later visit has shown it: kernels are compiled in the first one.
_LATER_WARMUP = 1 / 8
# So many of a setting's repetitions are left for: fewer visits do not know it, with however many
# repetitions.
_MANY_VISITS = 12
# Fewer say next to nothing of how many more are needed.
_FEW_VISITS = 3


class Run(Protocol):
    """What can be visited: `moeprof.live.setting_runs.SettingRun`."""

    def warm_up(self, *, is_whole: bool) -> None:
        """Runs all steps, or as many as anything that was warmed up before needs."""

    def repeat(self) -> StepTimes:
        """Returns the time of each step."""

    def close(self, *, keep_memory: bool) -> None:
        """Lets go of what was built."""


@dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """How much is measured.

    Attributes:
        rounds: In which every setting is visited, time permitting.
        repetitions: Of each setting in these at least, time permitting; as many in every further
            visit as in one of them.
        most_repetitions: Of each setting.
        tolerance: Settings known better than that are visited no more.
        most_s: No visit is begun after so long, and none that is known to end later.
    """

    rounds: int
    repetitions: int
    most_repetitions: int
    tolerance: float
    most_s: float | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds that all settings are visited in."""
        return min(self.rounds, self.repetitions)

    @property
    def of_visit(self) -> int:
        """Repetitions of a visit at least."""
        return -(-self.repetitions // self.num_rounds)

    def worth_making(self, overhead_s: float, repetition_s: float) -> int:
        """Returns the repetitions that a visit makes, time permitting.

        Where repetitions of a visit vary as much as visits do, a mean is known best for its time
        with as many as the root of what a visit costs besides over what a repetition costs
        (Cochran, Sampling Techniques, 10.6). They vary less, which asks for fewer; a percentile of
        medians gains more from each than a mean does, which asks for more.

        Args:
            overhead_s: Of a visit, without repetitions.
            repetition_s: Of each.
        """
        most = max(self.of_visit, self.most_repetitions // _MANY_VISITS)
        wanted = math.isqrt(int(overhead_s / repetition_s)) if repetition_s > 0 else 0
        return min(max(wanted, self.of_visit), most)


@dataclass(frozen=True, kw_only=True, eq=False)
class Visit:
    """A setting, built and repeated.

    Attributes:
        round: From 1.
        begun_s: Since the first visit began.
        probe_ms: Of the host, just before the repetitions (`moeprof.live.host_probe`).
        times_ms: [repetitions, steps].
        is_quiet: [repetitions, steps] False where the core of the dispatching thread was found slow
            (`moeprof.live.watched_steps`).
    """

    round: int
    begun_s: float
    probe_ms: float
    times_ms: Floats
    is_quiet: Flags


@dataclass(frozen=True, kw_only=True, eq=False)
class Visited:
    """All visits of a setting, in order."""

    visits: tuple[Visit, ...]

    @property
    def repeated(self) -> RepeatedSteps:
        """All repetitions."""
        return RepeatedSteps(
            times_ms=self.times_ms,
            is_quiet=np.concatenate([visit.is_quiet for visit in self.visits]),
            visit_of=np.repeat(np.arange(len(self.visits)), self._counts),
        )

    @property
    def times_ms(self) -> Floats:
        """[repetitions, steps]."""
        return np.concatenate([visit.times_ms for visit in self.visits])

    @property
    def round_of(self) -> Numbers:
        """[repetitions] round of each."""
        return np.repeat([visit.round for visit in self.visits], self._counts)

    @property
    def _counts(self) -> list[int]:
        return [len(visit.times_ms) for visit in self.visits]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """What was measured.

    Attributes:
        measured: By setting, in the order given, then those that only an earlier run measured; None
            where memory did not suffice.
        late: Settings for which there was no time.
    """

    measured: Mapping[str, Visited | None]
    late: tuple[str, ...]


def run_in_rounds(
    names: Sequence[str],
    opened: Callable[[str], Run],
    limits: RoundLimits,
    *,
    spread: Callable[[Visited], float],
    probe: Callable[[], float] = probe_ms,
    settle: Callable[[], object] | None = None,
    earlier: Mapping[str, Visited] | None = None,
    empty: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> Rounds:
    """Measures settings in rounds: all in order, all in reverse order, and so on.

    Then those that are not known to the tolerance are visited in further rounds: first whoever was
    visited fewer than three times, then whoever is expected to be known soonest, as far as time
    suffices for it, so that as many as possible are. Where time is short every setting is repeated
    less in its visits, then visited in fewer rounds, before any is left out.

    Args:
        names: Of the settings.
        opened: Builds a setting; it or its run raises `torch.cuda.OutOfMemoryError` where memory
            does not suffice. Tried once more after ``empty``.
        limits: How much is measured.
        spread: How well a setting is known, as a share.
        probe: Speed of the host in milliseconds.
        settle: Called before each visit, with what it is to find the machine ready.
        earlier: Visits of an earlier run, which these are added to: whoever is known from them is
            not visited again, all others at least once more, time permitting. They do not count as
            repetitions of this run. Those of settings that are not named stay as they are.
        empty: Gives memory that torch keeps back to the driver. Called only where memory ran out:
            visits build out of what the last ones left, and the driver is slow to give as much
            again.
        clock: In seconds.
        progress: Called with (setting and round, visits done, visits planned).
    """
    return _Schedule(
        names=tuple(names),
        opened=opened,
        limits=limits,
        spread=spread,
        probe=probe,
        settle=settle or (lambda: None),
        earlier=earlier or {},
        empty=empty or _empty,
        clock=clock,
        show=progress or (lambda *_: None),
    ).run()


def _empty() -> None:
    # What failed to be built may lie in cycles.
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What a visit takes: to build, to warm up, each repetition, and to close."""

    built_s: float
    warmed_s: float
    repetition_s: float
    closed_s: float

    def visit_s(self, repetitions: int) -> float:
        return self.built_s + self.warmed_s + repetitions * self.repetition_s + self.closed_s


@dataclass(kw_only=True, eq=False)
class _Schedule:
    """The state of a run in rounds."""

    names: tuple[str, ...]
    opened: Callable[[str], Run]
    limits: RoundLimits
    spread: Callable[[Visited], float]
    probe: Callable[[], float]
    settle: Callable[[], object]
    earlier: Mapping[str, Visited]
    empty: Callable[[], None]
    clock: Callable[[], float]
    show: Progress
    visits: dict[str, list[Visit]] = field(default_factory=dict)
    # Of so many visits.
    spreads: dict[str, tuple[int, float]] = field(default_factory=dict)
    costs: dict[str, _Cost] = field(default_factory=dict)
    without_room: set[str] = field(default_factory=set)
    last: str | None = None
    begun_s: float = 0.0
    num_done: int = 0

    def run(self) -> Rounds:
        """Runs all rounds."""
        self.begun_s = self.clock()
        self.visits = {name: list(each.visits) for name, each in self.earlier.items()}
        gc.collect()
        # What is there stays: each visit looks for garbage before it begins.
        gc.freeze()
        try:
            number = self._once_more() if self.earlier else self._all_rounds()
            while self._further_round(number + 1):
                number += 1
        finally:
            gc.unfreeze()
        measured = {
            name: Visited(visits=tuple(self.visits[name])) if name in self.visits else None
            for name in dict.fromkeys((*self.names, *self.earlier))
            if name in self.visits or name in self.without_room
        }
        late = tuple(name for name in self.names if name not in measured)
        return Rounds(measured=measured, late=late)

    def _all_rounds(self) -> int:
        """Visits all settings in each of the least rounds that there is time for.

        Returns:
            The last round begun.
        """
        limits = self.limits
        for number in range(1, limits.num_rounds + 1):
            order = self._not_again(self._unfinished()[:: 1 if number % 2 else -1])
            # Half a round would know some settings better: further rounds choose which.
            if number > 1 and self._left_s() < sum(self.costs[name].visit_s(1) for name in order):
                return number - 1
            for index, name in enumerate(order):
                if self._left_s() <= 0:
                    return number
                later = self._unfinished() * (limits.num_rounds - number)
                planned = self.num_done + len(order) - index + len(later)
                self.show(f"{name}, round {number} of {limits.num_rounds}", self.num_done, planned)
                self._visit(name, number, others=[*order[index + 1 :], *later])
        return limits.num_rounds

    def _once_more(self) -> int:
        """Visits those that are not known from an earlier run; says in which round."""
        number = 1 + max(each.visits[-1].round for each in self.earlier.values())
        order = [
            name
            for name in self.names
            if name not in self.visits or self._spread_of(name) > self.limits.tolerance
        ]
        for index, name in enumerate(order):
            if self._left_s() <= 0:
                break
            self.show(f"{name}, round {number}", index, len(order))
            self._visit(name, number, others=order[index + 1 :])
        return number

    def _further_round(self, number: int) -> bool:
        """Visits settings that are not known; False where none was."""
        spreads = {
            # What a visit costs is known of those that this run has visited.
            name: self._spread_of(name)
            for name in self._unfinished()
            if name in self.costs
        }
        unknown = [name for name, each in spreads.items() if each > self.limits.tolerance]
        order = self._not_again(self._worth_visiting(unknown))
        before = self.num_done, len(self.without_room)
        for index, name in enumerate(order):
            if self._left_s() < self.costs[name].visit_s(1):
                continue
            known = spreads[name]
            said = f"known to {known:.1%}" if math.isfinite(known) else "not known"
            planned = self.num_done + len(order) - index
            self.show(f"{name}, round {number}, {said}", self.num_done, planned)
            self._visit(name, number, others=order[index + 1 :])
        return (self.num_done, len(self.without_room)) != before

    def _spread_of(self, name: str) -> float:
        """Returns how well a setting is known; bootstrap draws take as long as short visits."""
        count = len(self.visits[name])
        if self.spreads.get(name, (0, 0.0))[0] != count:
            self.spreads[name] = count, self.spread(Visited(visits=tuple(self.visits[name])))
        return self.spreads[name][1]

    def _worth_visiting(self, unknown: list[str]) -> list[str]:
        """Returns who is visited next, soonest known first.

        Those that are still expected to be known in the time that is left, all that were visited
        too seldom to say, or all where nobody is expected to be known.
        """
        needed_s = {name: self._needed_s(name) for name in unknown}
        order = sorted(
            unknown,
            key=lambda name: (
                min(len(self.visits[name]), _FEW_VISITS),
                needed_s[name],
                self._usual_s(name),
            ),
        )
        left_s = self._left_s()
        # Who is too expensive by now must not keep the others from the time that is left.
        order = [name for name in order if self.costs[name].visit_s(1) <= left_s]
        few = [name for name in order if len(self.visits[name]) < _FEW_VISITS]
        if few:
            return few
        ends = itertools.accumulate(needed_s[name] for name in order)
        num_reached = sum(end <= left_s for end in ends)
        # One alone would be visited twice in a row.
        return order[: max(2, num_reached)] if num_reached else order

    def _needed_s(self, name: str) -> float:
        """Returns the time until a setting is known, as far as its visits say."""
        repeated = Visited(visits=tuple(self.visits[name])).repeated
        left = self.limits.most_repetitions - self._num_repetitions(name)
        most = -(-left * len(self._own_visits(name)) // self._num_repetitions(name))
        quiet = repeated.num_quiet_visits
        if quiet < min(_FEW_VISITS, len(self.visits[name])):
            # Nothing is known yet of the step that was seldom quiet but how seldom.
            more = (_FEW_VISITS - quiet) * len(self.visits[name]) / max(1, quiet)
            return (more if more <= most else math.inf) * self._usual_s(name)
        # Whoever is quiet in one visit of two needs two for one.
        more = more_visits(self._spread_of(name), quiet, self.limits.tolerance, most=most)
        return more * len(self.visits[name]) / quiet * self._usual_s(name)

    def _usual_s(self, name: str) -> float:
        """Returns the time of a visit."""
        repetitions = -(-self._num_repetitions(name) // len(self._own_visits(name)))
        return self.costs[name].visit_s(repetitions)

    def _not_again(self, order: list[str]) -> list[str]:
        """Returns the order with another setting first where its first was visited last.

        Two visits in a row lie in the same stretch of the machine.
        """
        if len(order) > 1 and order[0] == self.last:
            order[0], order[1] = order[1], order[0]
        return order

    def _visit(self, name: str, number: int, *, others: Sequence[str]) -> None:
        for is_last in (False, True):
            try:
                self._visited(name, number, others)
                return
            except torch.cuda.OutOfMemoryError:
                pass
            # Outside of the handler: the error holds on to what was built.
            if is_last:
                self.without_room.add(name)
            else:
                self.empty()

    def _visited(self, name: str, number: int, others: Sequence[str]) -> None:
        begun_s = self.clock()
        is_first = name not in self.costs
        most = self.limits.most_repetitions - self._num_repetitions(name)
        with uncollected():
            # What earlier visits have left (modules, kernels) stays too.
            gc.freeze()
            self.settle()
            run = self.opened(name)
            try:
                built_s = self.clock()
                run.warm_up(is_whole=is_first)
                warmed_s = self.clock()
                probed_ms = self.probe()
                times: list[StepTimes] = []
                repeating_s = self.clock()
                while True:
                    times.append(run.repeat())
                    repetition_s = (self.clock() - repeating_s) / len(times)
                    warming_s = warmed_s - built_s
                    if is_first:
                        # Next time it will be a later visit.
                        warming_s = min(warming_s, _LATER_WARMUP * repetition_s)
                    overhead_s = built_s - begun_s + warming_s + repeating_s - warmed_s
                    wanted = self.limits.worth_making(overhead_s, repetition_s)
                    if len(times) >= min(wanted, most):
                        break
                    if not self._has_time(len(times) + 1, repetition_s, name, others):
                        break
                repeated_s = self.clock()
            finally:
                run.close(keep_memory=True)
        self.costs[name] = _Cost(
            built_s=built_s - begun_s + repeating_s - warmed_s,
            warmed_s=warming_s,
            repetition_s=repetition_s,
            closed_s=self.clock() - repeated_s,
        )
        visit = Visit(
            round=number,
            begun_s=begun_s - self.begun_s,
            probe_ms=probed_ms,
            times_ms=np.array([each.times_ms for each in times], np.float64),
            is_quiet=np.array([each.is_quiet for each in times], np.bool_),
        )
        self.visits.setdefault(name, []).append(visit)
        self.last = name
        self.num_done += 1

    def _has_time(
        self, repetitions: int, repetition_s: float, name: str, others: Sequence[str]
    ) -> bool:
        """Says whether one repetition more fits, and as many of all that is yet to be visited."""
        left_s = self._left_s()
        if math.isinf(left_s):
            return True
        # A setting not seen yet takes what the others took, this one where it is the first.
        seen = [cost.visit_s(repetitions) for cost in self.costs.values()]
        unseen_s = float(np.mean(seen)) if seen else (repetitions + 1) * repetition_s
        others_s = sum(
            self.costs[other].visit_s(repetitions) if other in self.costs else unseen_s
            for other in others
        )
        own = self.costs.get(name)
        closed_s = 0.0 if own is None else own.closed_s
        return repetition_s + closed_s + others_s <= left_s

    def _unfinished(self) -> list[str]:
        """Returns who has room, and was not repeated as often as it may be."""
        return [
            name
            for name in self.names
            if name not in self.without_room
            and self._num_repetitions(name) < self.limits.most_repetitions
        ]

    def _num_repetitions(self, name: str) -> int:
        """Returns the repetitions of a setting in this run."""
        return sum(len(visit.times_ms) for visit in self._own_visits(name))

    def _own_visits(self, name: str) -> list[Visit]:
        """Returns the visits of this run."""
        before = len(self.earlier[name].visits) if name in self.earlier else 0
        return self.visits.get(name, [])[before:]

    def _left_s(self) -> float:
        if self.limits.most_s is None:
            return math.inf
        return self.limits.most_s - (self.clock() - self.begun_s)
