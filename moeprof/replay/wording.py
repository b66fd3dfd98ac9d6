"""Numbers as words, and the sentences that every analysis has to be able to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeprof.replay import intervals
from moeprof.replay.intervals import Interval
from moeprof.replay.result import SEVERITY_WARNING, FigureClass, Finding, Metric

if TYPE_CHECKING:
    from typing import Literal

    from moeprof.replay.tokens import StackTokens
    from moeprof.trace.reader import Trace

_SMALL_SHARE = 0.1
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_KIB = 1024
_THREE_DIGITS = 100
_TWO_DIGITS = 10
_ORDER = {"decode": 0, "encode": 1, "prefill": 2, "mixed": 3}


def percent(share: float) -> str:
    """Returns a share as a percentage with two or three digits."""
    digits = 1 if 0 < round(abs(share), 3) < _SMALL_SHARE else 0
    return f"{100 * share:z.{digits}f}%"


def percent_range(low: float, high: float) -> str:
    """Returns ``38 to 44%``, with one digit more where both ends would read the same."""
    first, second = percent(low), percent(high)
    if first == second and low != high:
        first, second = f"{100 * low:z.1f}%", f"{100 * high:z.1f}%"
    return f"{first.removesuffix('%')} to {second}"


def points(share: float) -> str:
    """Returns a difference of shares in percentage points."""
    return (
        f"{100 * share:z.0f} points" if abs(share) >= _SMALL_SHARE else f"{100 * share:z.1f} points"
    )


def number(value: float) -> str:
    """Returns a number with three significant digits, thousands separated."""
    if abs(value) >= _THREE_DIGITS or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= _TWO_DIGITS else f"{value:.2f}"


def num_bytes(count: float) -> str:
    """Returns bytes in the binary unit that leaves one to four digits."""
    for unit in _UNITS:
        if abs(count) < _KIB or unit == _UNITS[-1]:
            break
        count /= _KIB
    return f"{number(count)} {unit}"


def milliseconds(value: float) -> str:
    """Returns milliseconds with their unit."""
    return f"{number(value)} ms"


def share_with_interval(interval: Interval) -> str:
    """Returns, for example, ``41% (38-44%)``; without the brackets where there is no interval."""
    if interval.value is None:
        return "unknown"
    if interval.low is None or interval.high is None:
        return percent(interval.value)
    value = percent(interval.value)
    if percent(interval.low) == percent(interval.high):
        value = f"{100 * interval.value:.1f}%"
    return f"{value} ({percent_range(interval.low, interval.high)})"


def points_with_interval(interval: Interval) -> str:
    """Returns a difference of shares with its interval."""
    if interval.value is None:
        return "unknown"
    if interval.low is None or interval.high is None:
        return points(interval.value)
    low, high = points(interval.low), points(interval.high)
    return f"{points(interval.value)} ({low.removesuffix(' points')} to {high})"


def number_with_interval(interval: Interval, unit: str = "") -> str:
    """Returns a number with its interval and unit."""
    if interval.value is None:
        return "unknown"
    text = number(interval.value)
    if interval.low is not None and interval.high is not None:
        text += f" ({number(interval.low)} to {number(interval.high)})"
    return f"{text} {unit}".rstrip()


def place(stack: str, phase: str, *, num_stacks: int) -> str:
    """Returns how a sentence names a phase of a stack: ``decode`` or ``decoder decode``."""
    if phase == "encode":
        return "the encoder"
    return phase if num_stacks == 1 else f"{stack} {phase}"


def main_phase(phases: tuple[str, ...]) -> str:
    """Returns the phase that a sentence about a stack is about: decode where there is one."""
    return min(phases, key=lambda phase: _ORDER.get(phase, len(_ORDER)))


def metric_of(
    name: str,
    interval: Interval,
    *,
    unit: str,
    figure_class: FigureClass,
    better: Literal["lower", "higher"] | None = None,
    note: str = "",
) -> Metric:
    """Returns a `Metric` from an interval."""
    return Metric(
        name=name,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        split_half=interval.split_half,
        unit=unit,
        figure_class=figure_class,
        better=better,
        note=note,
    )


def missing_requests(num_requests: int) -> str:
    """Returns the verdict on too few requests, or an empty string where there are enough."""
    if num_requests >= intervals.MIN_REQUESTS:
        return ""
    more = intervals.MIN_REQUESTS - num_requests
    return (
        f"not enough evidence about traffic like this ({num_requests} "
        f"{'request' if num_requests == 1 else 'requests'}): record about {more} more"
    )


def routing_findings(trace: Trace, section: str, findings: list[Finding]) -> tuple[Finding, ...]:
    """Returns findings about routing, or what has to be said instead of them.

    Random weights: the routing means nothing, so nothing is concluded from it. Too few requests:
    the verdict on that goes with them.
    """
    if trace.info.model.random_weights:
        text = (
            "The weights are random: times and bytes mean what they say, but the routing means "
            "nothing, and nothing is concluded from it."
        )
        return (Finding(text=text, severity=SEVERITY_WARNING, section=section),)
    too_few = few_requests_finding(trace, section)
    return (*findings, too_few) if too_few else tuple(findings)


def few_requests_finding(trace: Trace, section: str) -> Finding | None:
    """Returns the verdict on too few requests, or None where there are enough."""
    verdict = missing_requests(len(trace.requests))
    if not verdict:
        return None
    text = (
        f"{verdict[0].upper()}{verdict[1:]}. Until then the numbers describe this trace only and "
        "carry no intervals."
    )
    return Finding(text=text, severity=SEVERITY_WARNING + 2, section=section)


def stacks_of(trace: Trace) -> tuple[tuple[str, StackTokens], ...]:
    """Returns the stacks of a trace with their routing, encoder first."""
    from moeprof.replay.tokens import load

    return tuple((stack, load(trace, stack)) for stack in trace.info.stacks)
