"""Verdicts on placements: try, do not try, or not enough evidence, with the numbers that decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from moeprof.replay import intervals, wording
from moeprof.replay.result import (
    SEVERITY_COST,
    SEVERITY_FACT,
    SEVERITY_NOTE,
    SEVERITY_WARNING,
    Finding,
)

Kind = Literal["large", "merged", "small"]

WORTH_IT = 0.02
"""Smallest gain that is worth a change of placement."""

TRY = "try"
DO_NOT_TRY = "do not try"
NOT_ENOUGH = "not enough evidence"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the verdicts on one stack rest on.

    Attributes:
        stack: The stack.
        table: One row per planner.
        ceilings: Column ``limit`` with rows uniform, hindsight, floor.
        choice: The planners compared within window A.
        transfer: Planned on one domain, judged on another; may be empty.
        replanning: Over time; may be empty.
        kind: What the headline counts: ``large`` dispatches as recorded, smaller ones ``merged``
            (an estimate), or ``small`` ones as recorded.
        min_tokens: Tokens of a dispatch that counts.
        num_devices: Devices.
        num_blocks: Blocks behind the intervals; 0 where there were too few.
        block_passes: Passes of a block.
        num_domains: Domains of the trace.
    """

    stack: str
    table: pd.DataFrame
    ceilings: pd.DataFrame
    choice: pd.DataFrame
    transfer: pd.DataFrame
    replanning: pd.DataFrame
    kind: Kind
    min_tokens: int
    num_devices: int
    num_blocks: int
    block_passes: int
    num_domains: int


def verdict(gain: float, low: float, high: float, ceiling: float) -> str:
    """Returns the verdict on a change.

    Args:
        gain: Share that the change saves.
        low: Lower end of its interval; NaN without one.
        high: Upper end.
        ceiling: Share that the best imaginable change would save.
    """
    if ceiling < WORTH_IT:
        return DO_NOT_TRY
    if np.isnan(low) or np.isnan(high):
        return NOT_ENOUGH
    if gain >= WORTH_IT and low > 0:
        return TRY
    return DO_NOT_TRY if high < WORTH_IT else NOT_ENOUGH


def findings(evidence: Evidence, *, num_stacks: int, section: str, nothing: str) -> list[Finding]:
    """Returns the findings of one stack, the verdict first.

    Args:
        evidence: What they rest on.
        num_stacks: Stacks of the trace; with more than one, sentences name theirs.
        section: Name of the analysis.
        nothing: Name of the planner that stands for doing nothing.
    """
    of_stack = f" ({evidence.stack})" if num_stacks > 1 else ""
    best = _chosen(evidence)
    found = [_main(evidence, best, nothing, section, of_stack)]
    table = evidence.table.set_index("planner")
    if "eplb" in table.index:
        if best not in ("eplb", nothing):
            found.append(_against_eplb(evidence, best, section, of_stack))
        if best != "eplb":
            found.append(_on(evidence, "eplb", section, of_stack))
    found += _transfer(evidence, section, of_stack)
    found += _replanning(evidence, section, of_stack)
    found.append(_size(evidence, section, of_stack))
    return found


def _chosen(evidence: Evidence) -> str:
    """Returns the planner that did best within window A."""
    choice = evidence.choice.dropna()
    if not len(choice):
        names = evidence.table["planner"].tolist()
        return "second_moment" if "second_moment" in names else str(names[-1])
    return str(choice["planner"].iloc[int(choice["mean_max_over_mean"].to_numpy().argmin())])


def _main(evidence: Evidence, best: str, nothing: str, section: str, of_stack: str) -> Finding:
    ceiling = _limit(evidence, "floor")
    if best == nothing:
        said = (
            f"do not try another placement{of_stack}: within window A none of the "
            f"{len(evidence.table) - 1} planners beat experts in the order of their ids. No "
            f"placement could save more than {_percent(ceiling)} of the fullest device's "
            f"load."
        )
        return _finding(said, SEVERITY_FACT, section, evidence, best)
    row = _row(evidence, best)
    decided = verdict(
        row["gain_over_nothing"],
        row["gain_over_nothing_low"],
        row["gain_over_nothing_high"],
        ceiling,
    )
    hindsight = _limit(evidence, "hindsight")
    said = (
        f"{decided} placing experts by {best}{of_stack} on {evidence.num_devices} devices: the "
        f"fullest device of a dispatch carries {_gain(row, 'nothing')} than with experts in "
        f"the order of their ids (max/mean {wording.number(row['mean_max_over_mean'])} instead of "
        f"{wording.number(_row(evidence, nothing)['mean_max_over_mean'])}). With hindsight it "
        f"would be {_percent(hindsight)} less, and no placement can save more than "
        f"{_percent(ceiling)}."
    )
    if decided == NOT_ENOUGH:
        said = said.replace(f"{decided} placing", f"{decided} on placing") + _more(evidence)
    severity = {TRY: SEVERITY_COST, NOT_ENOUGH: SEVERITY_WARNING}.get(decided, SEVERITY_FACT)
    return _finding(said, severity, section, evidence, best, metric=True)


def _against_eplb(evidence: Evidence, best: str, section: str, of_stack: str) -> Finding:
    row = _row(evidence, best)
    said = (
        f"against EPLB{of_stack}, {best} loads the fullest device {_gain(row, 'eplb')} on "
        "dispatches it has not seen."
    )
    return _finding(said, SEVERITY_FACT, section, evidence, best)


def _on(evidence: Evidence, planner: str, section: str, of_stack: str) -> Finding:
    row = _row(evidence, planner)
    decided = verdict(
        row["gain_over_nothing"],
        row["gain_over_nothing_low"],
        row["gain_over_nothing_high"],
        _limit(evidence, "floor"),
    )
    between = " on" if decided == NOT_ENOUGH else ""
    said = (
        f"{decided}{between} EPLB{of_stack}: it loads the fullest device of a dispatch "
        f"{_gain(row, 'nothing')} than doing nothing."
    )
    return _finding(said, SEVERITY_FACT - 1, section, evidence, planner)


def _transfer(evidence: Evidence, section: str, of_stack: str) -> list[Finding]:
    frame = evidence.transfer
    planner = next(
        (name for name in ("second_moment", "eplb") if (frame["planner"] == name).any()), None
    )
    if planner is None:
        return []
    mine = frame[frame["planner"] == planner].set_index(["planned_on", "judged_on"])
    ratio = mine["mean_max_over_mean"]
    single = [name for name in dict.fromkeys(frame["judged_on"]) if (name, name) in ratio.index]
    losses = {
        (one, other): float(ratio[one, other] / ratio[other, other] - 1)
        for one in single
        for other in single
        if one != other
    }
    if not losses:
        return []
    (one, other), worst = max(losses.items(), key=lambda item: item[1])
    mixed = max(float(ratio["(all)", name] / ratio[name, name] - 1) for name in single)
    said = (
        f"planned on one domain, judged on another{of_stack}: {planner} placed for {one} loads "
        f"the fullest device {_percent(worst)} more on {other} than a placement made for "
        f"{other}; placed for all domains together, at most {_percent(max(mixed, 0.0))} "
        "more."
    )
    return [_finding(said, SEVERITY_FACT - 2, section, evidence, planner)]


def _replanning(evidence: Evidence, section: str, of_stack: str) -> list[Finding]:
    frame = evidence.replanning
    again = frame[(frame["num_plans"] > 1) & frame["planner"].isin(["second_moment", "eplb"])]
    if not len(again):
        return []
    mean_gain = again.groupby("planner", sort=False)["gain_over_once"].mean()
    planner = str(mean_gain.index[int(mean_gain.to_numpy().argmax())])
    gain = float(mean_gain.max())
    mine = again[again["planner"] == planner]
    times = ", ".join(str(number) for number in mine["num_plans"].tolist())
    advice = "" if gain >= WORTH_IT else "do not plan again while traffic goes on: "
    change = "lowers" if gain >= 0 else "raises"
    said = (
        f"{advice}planning {times} times instead of once{of_stack} ({planner}) {change} the "
        f"fullest device's load by {_percent(abs(gain))} on average, and moves {_moved(mine)}."
    )
    severity = SEVERITY_FACT - 3 if gain >= WORTH_IT else SEVERITY_NOTE
    return [_finding(said, severity, section, evidence, planner)]


def _moved(plans: pd.DataFrame) -> str:
    """Returns what planning again moves, in bytes where the experts' sizes are known."""
    sized = bool(plans["bytes_moved"].notna().all())
    moved = plans["bytes_moved" if sized else "num_experts_moved"]
    ends = [float(moved.min()), float(moved.max())]
    said = [wording.num_bytes(end) if sized else wording.number(end) for end in ends]
    return " to ".join(dict.fromkeys(said)) + (" of experts" if sized else " experts")


def _size(evidence: Evidence, section: str, of_stack: str) -> Finding:
    first = evidence.table.iloc[0]
    said = (
        f"uniform routing{of_stack} of dispatches as large ({wording.number(first['mean_tokens'])} "
        f"tokens on average) would show max/mean "
        f"{wording.number(first['uniform_max_over_mean'])} by chance alone."
    )
    if evidence.kind == "small":
        said += (
            f" Window B does not hold {evidence.min_tokens} tokens to merge: its small dispatches "
            "count as recorded."
        )
    if evidence.kind == "merged":
        said += (
            f" No recorded dispatch has {evidence.min_tokens} tokens: these figures merge "
            "consecutive ones and are an estimate."
        )
    return _finding(said, SEVERITY_NOTE, section, evidence, str(first["planner"]))


def _gain(row: dict[str, Any], reference: str) -> str:
    """Returns, for example, ``14.7% (95%: 14.1 to 15.4%) less``."""
    value = row[f"gain_over_{reference}"]
    low, high = row[f"gain_over_{reference}_low"], row[f"gain_over_{reference}_high"]
    word = "less"
    if value < 0:
        value, low, high, word = -value, -high, -low, "more"
    if np.isnan(low):
        return f"{_percent(value)} {word}"
    return f"{_percent(value)} (95%: {_percent(low).removesuffix('%')} to {_percent(high)}) {word}"


def _percent(share: float) -> str:
    """Returns a share as a percentage with one digit after the point; no minus before a zero."""
    return f"{round(100 * share, 1) + 0.0:.1f}%"


def _more(evidence: Evidence) -> str:
    if evidence.num_blocks:
        return " The interval is too wide: record more of the same traffic."
    needed = 2 * intervals.MIN_BLOCKS * evidence.block_passes
    return (
        f" An interval takes {intervals.MIN_BLOCKS} blocks of {evidence.block_passes} passes in "
        f"window B: record about {needed:,} passes."
    )


def _row(evidence: Evidence, planner: str) -> dict[str, Any]:
    mine = evidence.table[evidence.table["planner"] == planner]
    return {str(name): value for name, value in mine.iloc[0].to_dict().items()}


def _limit(evidence: Evidence, name: str) -> float:
    mine = evidence.ceilings[evidence.ceilings["limit"] == name]
    return float(mine["gain_over_nothing"].iloc[0])


def _finding(
    said: str,
    severity: int,
    section: str,
    evidence: Evidence,
    planner: str,
    *,
    metric: bool = False,
) -> Finding:
    quantity = "gain_over_nothing" if metric else "max_over_mean"
    return Finding(
        text=said[0].upper() + said[1:],
        severity=severity,
        section=section,
        metric=f"{section}/{quantity}/{evidence.stack}/{planner}",
    )
