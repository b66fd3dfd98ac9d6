"""All gatings of a model in order of importance: judged batches, then larger ones till memory ends.

What is judged comes first, and every step is kept as soon as it is done: a run that is cut short
has it. Figures that are judged (each gating's own best batch, moeprof's at equal terms) are
measured again, one after the other, until every one of them has `JUDGED_REPEATS` repetitions.
Leaves out the models, their batches and how long each step may take.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from analysis.gpu.headline_runs import (
    BatchRuns,
    Prepare,
    RunLimits,
    attempted,
    best,
    breakdown,
    climb,
    ending,
    equal_terms,
    headline,
    revisited,
    row_text,
    run_gating,
)
from analysis.gpu.time_spent import TimeSpent

JUDGED_REPEATS = 20
"""Repetitions of a row that the headline is taken from."""
OURS = "dynamic"
# Most wanted first: what comes late may find its time used up.
TURNS = (
    OURS,
    "static_mask",
    "static_grouped",
    "static_index",
    "dynamic_grouped",
    "dynamic_loop",
)
DENSE_SHARES = {"listed": 0.4, "judged": 0.65, "larger": 0.85, "again": 1.0}
"""Of the dense twin's time, when to be done with each step of `Series.run`."""
Given = Callable[[str], AbstractContextManager[Prepare]]
"""From a gating to a context in which the model has it: what makes its passes."""


def growth_of(gating: str) -> int:
    """Returns the power of the batch with which a gating's time and memory grow at most."""
    return 2 if gating == "static_mask" else 1


@dataclass(frozen=True, kw_only=True)
class Series:
    """What is measured of the gatings of a model.

    Attributes:
        order: Of the gatings in results.
        device: ``cuda`` or ``cpu``.
        limits: Of listed batches.
        climbing: Of larger ones.
        keep: Called after every step, to write what there is.
        spent: Where the time goes.
        label: Of this model there.
        found: What came of every batch.
        parts: Where the time of a pass goes, by gating.
    """

    order: Sequence[str]
    device: str
    limits: RunLimits
    climbing: RunLimits
    keep: Callable[[], None] = lambda: None
    spent: TimeSpent = field(default_factory=TimeSpent)
    label: str = "model"
    found: BatchRuns = field(default_factory=BatchRuns)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        names: Sequence[str],
        given: Given,
        model: nn.Module,
        batches: Mapping[str, Sequence[int]],
        *,
        breakdown_batch: int,
        ends: Mapping[str, float],
    ) -> None:
        """Measures gatings: listed batches, judged rows, larger batches, then rows judged anew.

        Args:
            names: Of the gatings, most wanted first.
            given: How.
            model: Theirs.
            batches: Listed ones of each.
            breakdown_batch: Whose pass is broken down.
            ends: When to be done with ``listed``, ``judged``, ``larger`` and ``again``, by
                `time.monotonic`.
        """
        for index, name in enumerate(names):
            with given(name) as prepare:
                until_s = even_share(ends["listed"], len(names) - index)
                self.sweep(name, batches[name], prepare, until_s=until_s)
                if time.monotonic() < ends["judged"]:
                    self.break_down(model, name, breakdown_batch, prepare)
        self.revisit(names, given, until_s=ends["judged"])
        for index, name in enumerate(names):
            with given(name) as prepare:
                until_s = even_share(ends["larger"], len(names) - index)
                self.climb(name, prepare, first_batch=batches[name][0], until_s=until_s)
        self.revisit(names, given, until_s=ends["again"])

    def sweep(self, name: str, batches: Sequence[int], prepare: Prepare, *, until_s: float) -> None:
        """Measures the listed batches of a gating, until ``until_s`` by `time.monotonic`."""
        limits = dataclasses.replace(self.limits, deadline_s=until_s)
        with self.spent.part(f"{self.label}: {name}, listed batches"):
            run_gating(
                name, batches, prepare, self.device, limits=limits, growth=growth_of(name),
                grown=self._add,
            )  # fmt: skip

    def break_down(self, model: nn.Module, name: str, batch: int, prepare: Prepare) -> None:
        """Measures where the time of a pass goes; not on a CPU."""
        if self.device == "cpu":
            return
        with self.spent.part(f"{self.label}: {name}, breakdown"):
            self.parts.append(breakdown(model, name, batch, prepare))
        self.keep()

    def climb(self, name: str, prepare: Prepare, *, first_batch: int, until_s: float) -> None:
        """Doubles the batch of a gating until memory ends, or until ``until_s``."""
        limits = dataclasses.replace(self.climbing, deadline_s=until_s)
        with self.spent.part(f"{self.label}: {name}, till memory ends"):
            climb(
                name, self.found, prepare, self.device, limits=limits, first_batch=first_batch,
                growth=growth_of(name), grown=self._add,
            )  # fmt: skip

    def revisit(self, names: Iterable[str], given: Given, *, until_s: float) -> None:
        """Measures the rows that the headline takes again, until all were or time is up.

        moeprof's best first, then the quickest. New times may put another row in the place of one:
        then that one is measured again, too.

        Args:
            names: Gatings that can be run now.
            given: How.
            until_s: By `time.monotonic`.
        """
        names = list(names)
        given_up: set[tuple[str, int]] = set()
        while True:
            wanted = [
                row
                for row in judged_rows(self.found.rows, self.order)
                if row["gating"] in names
                and not row.get("revisited")
                and (row["gating"], row["batch"]) not in given_up
            ]
            if not wanted:
                return
            top = best(self.found.rows, OURS)
            row = min(wanted, key=lambda each: (each is not top, each["median_ms"]))
            seconds = (1 + JUDGED_REPEATS) * row["median_ms"] / 1e3
            name, batch = row["gating"], row["batch"]
            left = until_s - time.monotonic()
            if seconds > left:
                print(
                    f"  {name:16s} batch {batch:5d} not measured again: {seconds:.1f} s, of which"
                    f" {max(left, 0):.1f} are left",
                    flush=True,
                )
                given_up.add((name, batch))
                continue
            with self.spent.part(f"{self.label}: {name}, judged batches again"):
                again = self._again(row, given)
            if "out_of_memory" in again:
                given_up.add((name, batch))
                continue
            self.found.rows[self.found.rows.index(row)] = again
            print(f"{row_text(again)}, again", flush=True)
            self.keep()

    def result(self) -> dict[str, Any]:
        """Returns what a results file says of it."""
        place = {name: index for index, name in enumerate(self.order)}
        timed = {(row["gating"], row["batch"]) for row in self.found.rows}
        once = [row for row in self.found.once if (row["gating"], row["batch"]) not in timed]
        ran = timed | {(row["gating"], row["batch"]) for row in once}

        def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
            return sorted(rows, key=lambda row: (place[row["gating"]], row["batch"]))

        rows = ordered(self.found.rows)
        return {
            "rows": rows,
            "once": ordered(once),
            # Left out while listed, run while doubled.
            "skipped": ordered(
                row for row in self.found.skipped if (row["gating"], row["batch"]) not in ran
            ),
            "endings": [ending(name, self.found) for name in self.order],
            "breakdown": self.parts,
            "headline": headline(rows, self.order),
            "judged_repeats": JUDGED_REPEATS,
        }

    def _again(self, row: dict[str, Any], given: Given) -> dict[str, Any]:
        with given(row["gating"]) as prepare:
            return attempted(
                lambda: revisited(row, prepare, self.device, JUDGED_REPEATS), self.device
            )

    def _add(self, kind: str, row: dict[str, Any]) -> None:
        """Keeps what came of a batch, so that whatever happens next does not lose it."""
        getattr(self.found, kind).append(row)
        self.keep()


def even_share(until_s: float, num_left: int) -> float:
    """Returns when one of ``num_left`` is to be done: up to nearly twice its even share.

    Whoever comes last has some time left, however long the others took.
    """
    now = time.monotonic()
    return min(until_s, now + 2 * (until_s - now) / (num_left + 1))


def ends_of(shares: Mapping[str, float], begun_s: float, until_s: float) -> dict[str, float]:
    """Returns when to be done with each of ``shares`` of the time between."""
    return {name: begun_s + share * (until_s - begun_s) for name, share in shares.items()}


def judged_rows(rows: Sequence[dict[str, Any]], gatings: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows that `headline` takes: best ones, moeprof's first, and those at equal terms.

    Args:
        rows: Of all gatings, as `headline` gets them.
        gatings: All.
    """
    tops = [row for name in (OURS, *gatings) if (row := best(rows, name)) is not None]
    fair = [
        row
        for other in tops
        if other["gating"] != OURS and (row := equal_terms(rows, other)) is not None
    ]
    unique = {(row["gating"], row["batch"]): row for row in (*tops, *fair)}
    return list(unique.values())


def print_endings(endings: Iterable[dict[str, Any]]) -> None:
    """Prints how each gating's series ended, a line each."""
    for each in endings:
        faster = ", ".join(map(str, each["faster_once"]))
        print(
            f"{each['gating']}: largest batch timed {each['largest_timed']}, run"
            f" {each['largest_run']}; {each['said']}"
            + (f"; faster in the only pass: {faster}" if faster else ""),
            flush=True,
        )
