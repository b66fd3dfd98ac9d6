"""What follows from a buffering replay: try, do not try, or not enough evidence.

Doing nothing is always a candidate: keeping every expert resident (nothing is moved, nothing is
saved), and keeping lru where another policy looks better. Leaves out time: what a moved byte costs
is a matter of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moeprof.replay import intervals, wording
from moeprof.replay.cache import counts, policies
from moeprof.replay.intervals import Interval
from moeprof.replay.result import (
    SEVERITY_COST,
    SEVERITY_FACT,
    SEVERITY_NOTE,
    SEVERITY_WARNING,
    Finding,
    Metric,
)
from moeprof.trace import schema

if TYPE_CHECKING:
    from moeprof.replay.cache.counts import Counts, Question
    from moeprof.trace.reader import Trace

SECTION = "buffering"
WORTH_TRYING = 0.9
"""A buffer is worth trying where at least this share of lookups hits, at the interval's low end."""
WORTH_CHANGING = 0.005
"""A policy is worth changing for at least this share of lookups."""

_DO_NOTHING = "lru"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Metrics and findings."""

    metrics: tuple[Metric, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The numbers of one policy at one capacity in the phase that counts."""

    policy: str
    index: int
    label: str
    num_bytes: int
    rate: Interval
    ceiling: float
    moved_bytes: Interval


def judge(
    trace: Trace,
    *,
    table: pd.DataFrame,
    total: Counts,
    question: Question,
    halves: NDArray[np.int8],
    capacity_bytes: Sequence[int],
    scope: str,
) -> Judged:
    """Returns metrics and findings of a study.

    Args:
        trace: The trace.
        table: The study's table.
        total: The counts of all caches.
        question: What was asked.
        halves: [requests] half of each request.
        capacity_bytes: [capacities].
        scope: What shares a cache.
    """
    phase = _main_phase(total)
    rows = _rows(table, total, capacity_bytes, phase)
    findings: list[Finding] = []
    runnable = [row for row in rows if not _foreseeing(row.policy)]
    if runnable:
        findings += _whether_to_buffer(trace, runnable, question, phase)
        findings += _which_policy(trace, runnable, total, question, halves, phase)
    findings += _cliff(runnable, total, question, scope, phase)
    return Judged(
        metrics=tuple(_metrics(table, rows)),
        findings=tuple(
            sorted(
                wording.routing_findings(trace, SECTION, findings),
                key=lambda finding: -finding.severity,
            )
        ),
    )


def _foreseeing(policy: str) -> bool:
    """Returns True for policies that know more than a device would."""
    known = policies.POLICIES.get(policy)
    return known is None or known.sees_future or known.fits_trace


def _main_phase(total: Counts) -> int:
    present = tuple(name for index, name in enumerate(schema.PHASES) if total.lookups[index])
    return schema.PHASES.index(wording.main_phase(present))


def _rows(
    table: pd.DataFrame, total: Counts, capacity_bytes: Sequence[int], phase: int
) -> list[_Row]:
    name = schema.PHASES[phase]
    chosen = table[table["phase"] == name]
    found = []
    for policy, frame in chosen.groupby("policy", sort=False):
        own: list[Any] = list(frame.itertuples(index=False))
        for index, row in enumerate(own):
            found.append(
                _Row(
                    policy=str(policy),
                    index=index,
                    label=_label(row.capacity),
                    num_bytes=capacity_bytes[index],
                    rate=_interval(row, "hit_rate", ""),
                    ceiling=float(total.bound_hits[index, phase] / total.lookups[phase]),
                    moved_bytes=_interval(row, "bytes_moved_per_pass", "bytes_moved_per_pass_"),
                )
            )
    return found


def _interval(row: Any, name: str, prefix: str) -> Interval:
    """Returns a column of a row with its interval, where there is one."""
    low, high = float(getattr(row, f"{prefix}low")), float(getattr(row, f"{prefix}high"))
    known = np.isfinite(low) and np.isfinite(high)
    halves = (
        float(getattr(row, f"{prefix}first_half")),
        float(getattr(row, f"{prefix}second_half")),
    )
    return Interval(
        value=float(getattr(row, name)),
        low=low if known else None,
        high=high if known else None,
        split_half=halves if np.isfinite(halves).all() else None,
    )


def _label(capacity: object) -> str:
    """Returns how a sentence names a capacity."""
    if isinstance(capacity, int) or (isinstance(capacity, str) and capacity.isdecimal()):
        return f"{capacity} {'slot' if int(capacity) == 1 else 'slots'} per cache"
    if isinstance(capacity, float):
        return f"{100 * capacity:g}% of expert bytes"
    return str(capacity)


def _metrics(table: pd.DataFrame, rows: list[_Row]) -> list[Metric]:
    """Returns hit rates and bytes moved per forward pass, in the phase that counts."""
    del table
    metrics = []
    for row in rows:
        path = f"{SECTION}/{{}}/{row.policy}/{row.label}"
        metrics.append(
            wording.metric_of(
                path.format("hit_rate"), row.rate, unit="share", figure_class="exact",
                better="higher", note=f"the ceiling is {wording.percent(row.ceiling)}",
            )
        )  # fmt: skip
        metrics.append(
            wording.metric_of(
                path.format("bytes_moved_per_pass"),
                row.moved_bytes,
                unit="bytes", figure_class="exact", better="lower",
                note="bytes of all misses per forward pass",
            )
        )  # fmt: skip
    return metrics


def _whether_to_buffer(
    trace: Trace, rows: list[_Row], question: Question, phase: int
) -> list[Finding]:
    """Returns the verdict on a buffer as such, against keeping everything resident."""
    name = schema.PHASES[phase]
    everything = question.expert_bytes
    smaller = [row for row in rows if row.num_bytes < everything]
    if not smaller:
        return []
    best = [
        max((row for row in smaller if row.index == index), key=lambda row: row.rate.value or 0)
        for index in sorted({row.index for row in smaller})
    ]
    best.sort(key=lambda row: row.num_bytes)
    metric = f"{SECTION}/hit_rate/{{0.policy}}/{{0.label}}"
    if wording.missing_requests(len(trace.requests)):
        row = best[-1]
        return [
            Finding(
                text=f"Not enough evidence for or against a buffer: on this trace {row.label} with "
                f"{row.policy} hit {wording.share_with_interval(row.rate)} of {name} lookups "
                f"(ceiling {wording.percent(row.ceiling)}).",
                severity=SEVERITY_FACT, section=SECTION, metric=metric.format(row),
            )
        ]  # fmt: skip
    good = [row for row in best if (row.rate.low or row.rate.value or 0) >= WORTH_TRYING]
    if good:
        row = good[0]
        saved = everything - row.num_bytes
        return [
            Finding(
                text=f"Try a buffer of {row.label} with {row.policy}: "
                f"{wording.share_with_interval(row.rate)} of {name} lookups hit (ceiling "
                f"{wording.percent(row.ceiling)}), which frees {wording.num_bytes(saved)} of "
                f"{wording.num_bytes(everything)} and moves "
                f"{wording.num_bytes(row.moved_bytes.value or 0)} per forward pass; keeping "
                "everything resident moves nothing.",
                severity=SEVERITY_COST, section=SECTION, metric=metric.format(row),
            )
        ]  # fmt: skip
    row = best[-1]
    reason = (
        f"even the ceiling is {wording.percent(row.ceiling)}: only more memory helps"
        if row.ceiling < WORTH_TRYING
        else f"the ceiling is {wording.percent(row.ceiling)}: a better policy could help"
    )
    return [
        Finding(
            text=f"Do not try a buffer of {row.label} or less where missing experts delay the "
            f"pass: the best policy that can run ({row.policy}) hits "
            f"{wording.share_with_interval(row.rate)} of {name} lookups and moves "
            f"{wording.num_bytes(row.moved_bytes.value or 0)} per forward pass; {reason}. "
            "Keeping everything resident moves nothing.",
            severity=SEVERITY_COST, section=SECTION, metric=metric.format(row),
        )
    ]  # fmt: skip


def _which_policy(
    trace: Trace,
    rows: list[_Row],
    total: Counts,
    question: Question,
    halves: NDArray[np.int8],
    phase: int,
) -> list[Finding]:
    """Returns the verdict on changing lru for another policy, at the middle capacity."""
    names = list(dict.fromkeys(row.policy for row in rows))
    if _DO_NOTHING not in names or len(names) == 1:
        return []
    by_size = sorted(
        (row for row in rows if row.policy == _DO_NOTHING), key=lambda row: row.num_bytes
    )
    base = by_size[(len(by_size) - 1) // 2]
    others = [row for row in rows if row.index == base.index and row.policy != _DO_NOTHING]
    other = max(others, key=lambda row: row.rate.value or 0)
    lookups = total.lookup_shares[phase]

    def ratio(policy: str) -> tuple[counts.Floats, counts.Floats]:
        return total.hit_shares[question.policies.index(policy), base.index, phase], lookups

    gain = intervals.difference(ratio(other.policy), ratio(_DO_NOTHING), halves=halves)[0]
    left = base.ceiling - (base.rate.value or 0)
    where = f"at {base.label}"
    metric = f"{SECTION}/hit_rate/{other.policy}/{other.label}"
    ceiling = f"the ceiling lies {wording.points(left)} above lru"
    if wording.missing_requests(len(trace.requests)):
        text = (
            f"Not enough evidence to change the policy {where}: {other.policy} hits "
            f"{wording.points_with_interval(gain)} more than lru on this trace; {ceiling}."
        )
        severity = SEVERITY_NOTE
    elif (gain.low or 0) > WORTH_CHANGING:
        text = (
            f"Try {other.policy} instead of lru {where}: "
            f"{wording.points_with_interval(gain)} more lookups hit; {ceiling}."
        )
        severity = SEVERITY_COST - 1
    elif left < 2 * WORTH_CHANGING:
        text = f"Do not try another policy than lru {where}: {ceiling}, so no policy can gain more."
        severity = SEVERITY_FACT
    else:
        text = (
            f"Do not change lru for {other.policy} {where}, the best of the others that can run: "
            f"its gain is {wording.points_with_interval(gain)}; {ceiling}."
        )
        severity = SEVERITY_FACT
    return [Finding(text=text, severity=severity, section=SECTION, metric=metric)]


def _cliff(
    rows: list[_Row], total: Counts, question: Question, scope: str, phase: int
) -> list[Finding]:
    """Returns the warning where most caches are smaller than one forward pass asks for."""
    asked = total.num_caches[phase]
    small = [
        index for index in range(len(question.capacities)) if 2 * total.cycles[index, phase] > asked
    ]
    own = [row for row in rows if row.index in small]
    if not own:
        return []
    largest = max(own, key=lambda row: row.num_bytes)
    fewer = " and fewer" if len({row.index for row in own}) > 1 else ""
    hit = [
        f"{row.policy} hits {wording.percent(row.rate.value or 0)}"
        for row in own
        if row.index == largest.index and row.policy in {"lru", "fifo"}
    ]
    numbers = f": {', '.join(hit)} at {largest.label}" if hit else ""
    what = {"layer": "a dispatch of its layer", "stack": "a pass of its stack"}.get(
        scope, "a forward pass"
    )
    name = schema.PHASES[phase]
    # That the smallest size asked for is too small surprises nobody.
    is_expected = {row.index for row in own} == {min(rows, key=lambda row: row.num_bytes).index}
    severity = SEVERITY_FACT if is_expected and len(question.capacities) > 1 else SEVERITY_WARNING
    return [
        Finding(
            text=f"Cliff: at {largest.label}{fewer} a cache holds less than what {what} "
            f"asks of it in {name} (median), in {int(total.cycles[largest.index, phase])} of "
            f"{int(asked)} caches. lru and fifo then evict experts just before they are needed "
            f"again{numbers}.",
            severity=severity, section=SECTION,
        )
    ]  # fmt: skip
