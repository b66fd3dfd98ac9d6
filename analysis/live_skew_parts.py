"""How skewed routing changes the kernel's share of the floor, as a part of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from analysis.live_evidence import ADDITIONAL_FILES, MANY_TOKENS, share_columns
from analysis.live_goals import (
    GOAL_MANY_SKEWED,
    GOAL_MANY_UNIFORM,
    Goal,
    not_measured,
    percent,
    share_said,
)
from analysis.live_parts import (
    Addition,
    beside_banners,
    figure_data,
    panel,
    part,
    repetitions_said,
    result_section,
    rows_table,
)
from analysis.live_styles import COLOURS, INK, SOFT, STYLE, save
from moeprof.errors import MoeprofError
from moeprof.replay.result import SEVERITY_COST, SEVERITY_FACT, Finding, Metric, Result
from moeprof.reporting.document import Described

OURS = "dynamic"
KERNELS: Mapping[str, str] = {
    OURS: "moeprof",
    "dynamic_grouped": "torch grouped GEMM",
    "transformers grouped_mm": "transformers grouped_mm",
}
"""The kernels that stand beside each other, as the file names them."""
RESTED, LOADED = "rested", "loaded"
"""States of the device: after a pause; after the kernel has run without one for a while."""
REFERENCE_ACTIVE = 95
"""Active experts of 512, about a fifth, near which a share is named beside the range of all."""
_NEEDED = ("exponent", "active_experts", "kernel", "bytes_ms", "flops_ms", "times_ms")
# A fastest repetition, or one under load, so much faster than the median of the rested device says
# that there are two ways it goes.
_FAR = 1.15
_AS_LONG = 0.05
"""How far two times may be apart, relative, that are said to be as long as each other."""
# Styles of lines; that of the loop, which is not shown here, since torch's own is transformers'.
_SERIES: Mapping[str, str] = {
    OURS: OURS,
    "dynamic_grouped": "dynamic_loop",
    "transformers grouped_mm": "grouped_mm",
}
_COMMAND = "`-m analysis.gpu.gating_skew`"
_HINT = "measure again with analysis/gpu/gating_skew.py"


def goal_of(exponent: float) -> float:
    """Returns the share of the floor that is the goal under a Zipf law; 0 is uniform routing."""
    return GOAL_MANY_SKEWED if exponent else GOAL_MANY_UNIFORM


def skew_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns one row per exponent and kernel, rested device, ascending: times in ms, shares.

    Goals are moeprof's: other kernels have none.

    Raises:
        MoeprofError: A row lacks a field, or there is not one of each kernel at every exponent.
    """
    return _shares(_rows_of(data, RESTED))


def loaded_rows(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the same of the loaded device, held to the floor of the rested one; no goals.

    Each kernel is loaded by its own work, which slows some more than others. A floor of the loaded
    device would be that of a product of matrices, which slows down most.

    Raises:
        MoeprofError: As of `skew_rows`, or exponents are not those of the rested device.
    """
    floors = {
        (row["exponent"], row["kernel"]): {each: row[each] for each in ("bytes_ms", "flops_ms")}
        for row in _rows_of(data, RESTED)
    }
    own = _rows_of(data, LOADED)
    if [(row["exponent"], row["kernel"]) for row in own] != list(floors):
        raise MoeprofError(
            f"{ADDITIONAL_FILES['skew']} has other rows of the loaded device", hint=_HINT
        )
    rows = _shares([{**row, **floors[row["exponent"], row["kernel"]]} for row in own])
    return rows.assign(goal_share=math.nan, reached=None)


def every_row(data: Mapping[str, Any]) -> pd.DataFrame:
    """Returns the rows of both, with a column that says which."""
    made = []
    for state, rows in ((RESTED, skew_rows(data)), (LOADED, loaded_rows(data))):
        rows.insert(0, "device", state)
        made.append(rows)
    return pd.concat(made, ignore_index=True)


def _measured(data: Mapping[str, Any], state: str) -> Mapping[str, Any]:
    """Returns what was measured in a state: rows, ceilings and waits."""
    states = data["states"]
    own = states.get(state) if isinstance(states, dict) else None
    lacking = [
        each for each in ("rest_s", "load_s", "ceilings", "rows")
        if not (isinstance(own, dict) and each in own)
    ]  # fmt: skip
    if not isinstance(own, dict) or lacking:
        raise MoeprofError(
            f"{ADDITIONAL_FILES['skew']} lacks {', '.join(lacking)} of the {state} device",
            hint=_HINT,
        )
    return own


def _rows_of(data: Mapping[str, Any], state: str) -> list[Mapping[str, Any]]:
    """Returns the rows of a state as the file has them, with every field."""
    file, rows = ADDITIONAL_FILES["skew"], _measured(data, state)["rows"]
    made = rows if isinstance(rows, list) else []
    for row in made:
        lacking = [each for each in _NEEDED if not (isinstance(row, dict) and each in row)]
        if lacking:
            raise MoeprofError(f"a row of {file} lacks {', '.join(lacking)}", hint=_HINT)
        times, parts = row["times_ms"], (row["bytes_ms"], row["flops_ms"])
        known = isinstance(times, list) and len(times) > 0 and _is_number(row["exponent"])
        if not known or not all(_is_number(each) and each > 0 for each in (*parts, *times)):
            raise MoeprofError(f"a row of {file} has times that are no numbers", hint=_HINT)
    return made


def _shares(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns rows with their shares of the floor; refused unless there is one of each kernel."""
    file = ADDITIONAL_FILES["skew"]
    found = []
    for row in rows:
        floor, ours = max(row["bytes_ms"], row["flops_ms"]), row["kernel"] == OURS
        columns = share_columns(floor, row["times_ms"])
        found.append(
            {
                "exponent": float(row["exponent"]),
                "active_experts": row["active_experts"],
                "kernel": row["kernel"],
                "reading_ms": row["bytes_ms"],
                "multiplying_ms": row["flops_ms"],
                **columns,
                "share_fastest": floor / min(row["times_ms"]),
                "goal_share": goal_of(row["exponent"]) if ours else math.nan,
                "reached": columns["share"] >= goal_of(row["exponent"]) if ours else None,
                "num_repetitions": len(row["times_ms"]),
            }
        )
    made = pd.DataFrame(found)
    named = set(KERNELS)
    if made.empty or any(
        len(own) != len(named) or set(own["kernel"]) != named for _, own in made.groupby("exponent")
    ):
        raise MoeprofError(
            f"{file} has not one row of each of {', '.join(KERNELS)} at every exponent",
            hint=_HINT,
        )
    if not (made["exponent"] > 0).any():
        raise MoeprofError(f"{file} has no row of skewed routing", hint=_HINT)
    return made.sort_values("exponent", kind="stable", ignore_index=True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Skew:
    """moeprof's kernel over the exponents of skewed routing, uniform routing left out.

    Attributes:
        rows: Of `skew_rows`, one per exponent.
        least: The row with the least share.
        most: The row with the largest.
        nearest: The row whose active experts are nearest to `REFERENCE_ACTIVE`.
    """

    rows: pd.DataFrame
    least: pd.Series[Any]
    most: pd.Series[Any]
    nearest: pd.Series[Any]

    @property
    def reached(self) -> list[float]:
        """Exponents at which the goal is reached."""
        return self._exponents(reached=True)

    @property
    def missed(self) -> list[float]:
        """The others."""
        return self._exponents(reached=False)

    def _exponents(self, *, reached: bool) -> list[float]:
        own = self.rows[self.rows["reached"].astype(bool) == reached]
        return [float(each) for each in own["exponent"]]

    @property
    def span(self) -> str:
        """The exponents, in words."""
        return f"Zipf {self.rows['exponent'].min():g} to {self.rows['exponent'].max():g}"


def skew_of(rows: pd.DataFrame) -> Skew:
    """Returns what moeprof's kernel does over the exponents, from `skew_rows`."""
    own = rows[(rows["kernel"] == OURS) & (rows["exponent"] > 0)].reset_index(drop=True)
    return Skew(
        rows=own,
        least=own.loc[own["share"].idxmin()],
        most=own.loc[own["share"].idxmax()],
        nearest=own.loc[(own["active_experts"] - REFERENCE_ACTIVE).abs().idxmin()],
    )


def uniform_row(rows: pd.DataFrame) -> pd.Series[Any] | None:
    """Returns moeprof's kernel on uniform routing; None where that was not measured."""
    own = rows[(rows["kernel"] == OURS) & (rows["exponent"] == 0)]
    return None if own.empty else own.iloc[0]


def beside_multiplying(row: pd.Series[Any]) -> str:
    """Returns how long reading the active experts takes, against multiplying, in words."""
    ratio = row["reading_ms"] / row["multiplying_ms"]
    times = "as long" if abs(ratio - 1) <= _AS_LONG else f"{ratio:.1f} times as long"
    return f"reading the active experts takes {times} as multiplying"


def varied(row: pd.Series[Any]) -> str:
    """Returns what the fastest repetition says where the median is far from it, else nothing."""
    if row["share_fastest"] < _FAR * row["share"]:
        return ""
    return f", in its fastest repetition {percent(row['share_fastest'])}"


def largest_error(data: Mapping[str, Any]) -> float:
    """Returns the largest relative error of moeprof's kernel against one GEMM per expert."""
    try:
        return max(float(row["relative_error"]) for row in data["agreement"])
    except (KeyError, TypeError, ValueError) as error:
        raise MoeprofError(
            f"{ADDITIONAL_FILES['skew']} does not say how far outputs agree", hint=_HINT
        ) from error


def _others_said(data: Mapping[str, Any]) -> str:
    """Returns the largest relative error of every other kernel, where they were held to anything.

    Earlier runs held moeprof's kernel only.
    """
    errors: dict[str, float] = {}
    for row in data["agreement"]:
        for kernel, error in row.get("by_kernel", {}).items():
            if kernel != OURS:
                errors[kernel] = max(error, errors.get(kernel, 0.0))
    said = ", ".join(f"{error:.1e} ({KERNELS.get(name, name)})" for name, error in errors.items())
    return f" Those of the others: {said}." if said else ""


def _reference(data: Mapping[str, Any] | None) -> str:
    """Returns what outputs are held to, in words."""
    return str((data or {}).get("reference", "one GEMM per expert"))


def _said(row: pd.Series[Any]) -> str:
    return share_said(row["share"], row["goal_share"])


def _listed(exponents: Sequence[float]) -> str:
    return ", ".join(f"{each:g}" for each in exponents)


def _range(skew: Skew) -> str:
    return f"{_said(skew.least)} to {_said(skew.most)}"


def skew_goals(data: Mapping[str, Any] | None) -> list[Goal]:
    """Returns what the kernel is held to, by how skewed routing is."""
    about = f"Kernel by skew of routing, {MANY_TOKENS if data is None else data['num_tokens']:,}"
    least = f"at least {percent(GOAL_MANY_SKEWED)}"
    least_uniform = f"at least {percent(GOAL_MANY_UNIFORM)}"
    outputs = f"{about} tokens: outputs against {_reference(data)}, largest relative error"
    skewed = f"{about} tokens, device rested: share of the floor under every Zipf law", least
    uniform = (
        f"{about} tokens, device rested, uniform routing: share of the floor",
        least_uniform,
    )
    if data is None:
        return not_measured("skew", skewed, uniform, (outputs, "that of bfloat16"))
    made = _rested_goals(skew_rows(data), skewed, uniform)
    error = largest_error(data)
    made.append(
        Goal(
            quantity=outputs, goal=f"at most {data['tolerance']:g}", found=f"{error:.1e}",
            met=error <= data["tolerance"], section="skew",
        )
    )  # fmt: skip
    return made


def _rested_goals(
    rows: pd.DataFrame, skewed: tuple[str, str], uniform: tuple[str, str]
) -> list[Goal]:
    """Returns the goals of shares, each of what it is about and what it is.

    A loaded device has none: its floor is that of a product of matrices slowed by its own load.
    """
    skew, even = skew_of(rows), uniform_row(rows)
    found = f"{skew.span}: {_found(skew)}"
    if skew.missed:
        found += (
            f"; reached at {len(skew.reached)} of {len(skew.rows)} exponents, missed at "
            f"{_listed(skew.missed)}"
        )
    quantity, goal = skewed
    made = [Goal(quantity=quantity, goal=goal, found=found, met=not skew.missed, section="skew")]
    if even is None:
        return made + not_measured("skew", uniform)
    quantity, goal = uniform
    reached = bool(even["reached"])
    made.append(
        Goal(quantity=quantity, goal=goal, found=_said(even), met=reached, section="skew")
    )  # fmt: skip
    return made


def _found(skew: Skew) -> str:
    """Returns the range of shares, what it is near the reference, and the least, in words."""
    return (
        f"{_range(skew)}; {_said(skew.nearest)} at {skew.nearest['active_experts']} active "
        f"experts (Zipf {skew.nearest['exponent']:g}); least at {skew.least['exponent']:g} "
        f"({skew.least['active_experts']} active{varied(skew.least)})"
    )


def skew_readme_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the row of the README's table: a rested device, and what a loaded one does."""
    skew, loaded = skew_of(skew_rows(data)), skew_of(loaded_rows(data))
    missed = f", missed at {_listed(skew.missed)}" if skew.missed else ""
    return [
        (
            f"moeprof's kernel by skew, {data['num_tokens']:,} tokens: {skew.span}",
            f"{_found(skew)}; on a loaded device, against the same floor, "
            f"{percent(loaded.least['share'])} to {percent(loaded.most['share'])}",
            f"{percent(GOAL_MANY_SKEWED)}{missed}",
            _COMMAND,
        )
    ]


def skew_part(data: Mapping[str, Any]) -> Described:
    """Returns the share of the floor by skew."""
    rows, loaded = skew_rows(data), loaded_rows(data)
    skew, even, error = skew_of(rows), uniform_row(rows), largest_error(data)
    verdict, under_load = _verdict(skew), skew_of(loaded)
    metrics = [
        _metric("least", skew.least),
        _metric("reference", skew.nearest),
        *([] if even is None else [_metric("uniform", even)]),
        _metric("loaded", under_load.least),
    ]
    labels = {
        "skew/least": f"moeprof, device rested, the least, exponent {skew.least['exponent']:g} "
        f"({skew.least['active_experts']} active)",
        "skew/reference": f"moeprof, device rested, {skew.nearest['active_experts']} active, "
        f"exponent {skew.nearest['exponent']:g}",
        "skew/uniform": "moeprof, device rested, uniform routing",
        "skew/loaded": f"moeprof, device loaded, the least, exponent "
        f"{under_load.least['exponent']:g} ({under_load.least['active_experts']} active)",
    }
    geometry = data["geometry"]
    agrees = error <= data["tolerance"]
    result = Result(
        name="skew",
        title="Share of the floor by skew",
        table=every_row(data),
        metrics=tuple(metrics),
        findings=(
            Finding(
                text=verdict,
                severity=SEVERITY_COST - 2 if skew.missed else SEVERITY_FACT,
                section="skew",
                metric="skew/least",
            ),
            *_uniform_findings(even),
            Finding(
                text=_loaded_said(data, rows, loaded),
                severity=SEVERITY_FACT,
                section="skew",
                metric="skew/loaded",
            ),
            Finding(
                text=f"At every exponent moeprof's outputs are held to {_reference(data)}: the "
                f"largest relative error is {error:.1e}, "
                f"{'within' if agrees else 'beyond'} the {data['tolerance']:g} that roundings to "
                f"bfloat16 allow.{_others_said(data)}",
                severity=SEVERITY_FACT - 1 if agrees else SEVERITY_COST + 10,
                section="skew",
            ),
        ),
        notes=(
            "The floor is the longer of two times: reading every active expert once, which is "
            "shorter the more skewed routing is, and multiplying, which is the same for all. "
            "Where they are equally long, whatever of one is not done during the other adds to it.",
            "Beside the least and the most the share is named at the exponent that leaves nearest "
            f"to {REFERENCE_ACTIVE} experts active.",
            *(
                f"Measured rates, {_waits(data, state)}: {_rates(data, state)}."
                for state in (RESTED, LOADED)
            ),
            "Each rate and each kernel is measured alone, after a pause and after its own load. "
            "Goals are set for the rested device: load slows some more than others.",
        ),
    )
    section = result_section(
        result,
        question="How does skew change the kernel's share of the floor?",
        labels=labels,
        figures=[_figure(rows, loaded, skew)],
        tables=[rows_table("Every exponent and kernel", _named(every_row(data)))],
        headline=[metric.name for metric in metrics],
    )
    return part(
        "skew",
        data,
        title="Kernels by skew",
        verdict=verdict,
        routing=list(data["routing"].values()),
        facts={
            "Layer": f"{geometry['num_experts']} experts of {geometry['d_model']} x "
            f"{geometry['d_ff']}, top-{geometry['top_k']}, {data['num_tokens']:,} tokens",
            "Repetitions": repetitions_said(rows["num_repetitions"]),
        },
        banners=[
            *([] if data["complete"] else ["The run was cut short: exponents are missing."]),
            *(f"Wrong: {each}." for each in data.get("failures", ())),
            *beside_banners([data]),
        ],
        section=section,
        result=result,
    )


def _rates(data: Mapping[str, Any], state: str) -> str:
    rates = _measured(data, state)["ceilings"]
    return (
        f"copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s read plus written, matrix products "
        f"{rates['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s"
    )


def _waits(data: Mapping[str, Any], state: str) -> str:
    """Returns what was done before each measurement of a state."""
    own = _measured(data, state)
    if state == RESTED:
        ahead = ", all of its repetitions asked for before the first begins"
        return (
            f"device rested ({own['rest_s']:g} s of pause before each"
            f"{ahead if own.get('ahead') else ''})"
        )
    return f"device loaded (each runs for {own['load_s']:g} s before it is timed)"


def _loaded_said(data: Mapping[str, Any], rows: pd.DataFrame, loaded: pd.DataFrame) -> str:
    """Returns how much load slows kernels and rates, and what moeprof's kernel then does."""
    rates = [_measured(data, state)["ceilings"]["matrix_flops_per_s"] for state in (RESTED, LOADED)]
    slower = {
        label: _slowed(rows, loaded, kernel) for kernel, label in KERNELS.items()
    }  # fmt: skip
    skew = skew_of(loaded)
    return (
        f"With the {_waits(data, LOADED)}, products of matrices run at "
        f"{percent(rates[1] / rates[0])} of their rate after a rest, and kernels under skewed "
        "routing take, at most, "
        + ", ".join(f"{percent(more)} longer ({label})" for label, more in slower.items())
        + f". Against the floor of the rested device moeprof's is then "
        f"{percent(skew.least['share'])} to {percent(skew.most['share'])}.{_higher(rows, loaded)}"
    )


def _higher(rows: pd.DataFrame, loaded: pd.DataFrame) -> str:
    """Returns where moeprof's share is far higher under load than after a rest, else nothing."""
    pairs = zip(skew_of(rows).rows.iloc, skew_of(loaded).rows.iloc, strict=True)
    said = ", ".join(
        f"at {own['exponent']:g} ({percent(other['share'])}, after a rest {_said(own)})"
        for own, other in pairs
        if other["share"] > _FAR * own["share"]
    )
    return f" Its share is higher under load {said}." if said else ""


def _slowed(rows: pd.DataFrame, loaded: pd.DataFrame, kernel: str) -> float:
    """Returns by which share a kernel takes longer under load, at most, under skewed routing."""
    own, other = (
        each[(each["kernel"] == kernel) & (each["exponent"] > 0)]["median_ms"].to_numpy()
        for each in (rows, loaded)
    )
    return max(0.0, float((other / own - 1).max()))


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns rows with exponents, kernels and goals as they are read."""
    goals = ["" if math.isnan(each) else percent(each) for each in rows["goal_share"]]
    return rows.assign(
        exponent=rows["exponent"].map("{:g}".format),
        kernel=rows["kernel"].map(KERNELS),
        goal_share=goals,
    ).rename(columns={"goal_share": "goal", "share_fastest": "fastest_repetition_share"})


def _verdict(skew: Skew) -> str:
    """Returns which exponents reach the goal, the least, and what it is near the reference."""
    goal = percent(GOAL_MANY_SKEWED)
    if not skew.missed:
        reached = f"reaches the goal of {goal} of the floor at every exponent measured"
    elif not skew.reached:
        reached = f"misses the goal of {goal} of the floor at every exponent measured"
    else:
        reached = (
            f"reaches the goal of {goal} of the floor at {len(skew.reached)} of "
            f"{len(skew.rows)} exponents ({_listed(skew.reached)}) and misses it at "
            f"{_listed(skew.missed)}"
        )
    return (
        f"Under skewed routing ({skew.span}), device rested, moeprof's kernel {reached}; the least "
        f"is {_said(skew.least)} at {skew.least['exponent']:g}{varied(skew.least)}, where "
        f"{skew.least['active_experts']} experts are active and "
        f"{beside_multiplying(skew.least)}; at {skew.nearest['exponent']:g}, with "
        f"{skew.nearest['active_experts']} active, it is {_said(skew.nearest)}."
    )


def _uniform_findings(row: pd.Series[Any] | None) -> list[Finding]:
    if row is None:
        return []
    goal = percent(GOAL_MANY_UNIFORM)
    return [
        Finding(
            text=f"On uniform routing, device rested, in the same run, moeprof's kernel is at "
            f"{_said(row)} of the floor (goal {goal}: "
            f"{'reached' if row['reached'] else 'missed'}).",
            severity=SEVERITY_FACT if row["reached"] else SEVERITY_COST - 2,
            section="skew",
            metric="skew/uniform",
        )
    ]


def _metric(name: str, row: pd.Series[Any]) -> Metric:
    return Metric(
        name=f"skew/{name}", value=row["share"], unit="share", figure_class="measured",
        low=row["share_low"], high=row["share_high"], better="higher", note="share of the floor",
    )  # fmt: skip


def _figure(rows: pd.DataFrame, loaded: pd.DataFrame, skew: Skew) -> Any:
    shares: list[dict[str, Any]] = [
        {
            "key": _SERIES[kernel],
            "label": label,
            "points": [
                [row["exponent"], row["share"], row["share_low"], row["share_high"]]
                for _, row in rows[rows["kernel"] == kernel].iterrows()
            ],
        }
        for kernel, label in KERNELS.items()
    ]
    shares.append(
        {
            "key": "static_index",
            "label": "moeprof, device loaded",
            "points": [
                [row["exponent"], row["share"], row["share_low"], row["share_high"]]
                for _, row in loaded[loaded["kernel"] == OURS].iterrows()
            ],
        }
    )
    own = rows[rows["kernel"] == OURS]
    goals = [[each, goal_of(each), None, None] for each in own["exponent"]]
    shares.append({"key": "goal", "label": "goal for moeprof", "marks": True, "points": goals})
    times = [
        {
            "key": key,
            "label": label,
            "points": [[row["exponent"], row[column], None, None] for _, row in own.iterrows()],
        }
        for key, label, column in (
            ("uniform", "reading the active experts", "reading_ms"),
            ("shuffled", "multiplying", "multiplying_ms"),
        )
    ]
    times.append(
        {
            "key": OURS,
            "label": KERNELS[OURS],
            "points": [
                [row["exponent"], row["median_ms"], row["low_ms"], row["high_ms"]]
                for _, row in own.iterrows()
            ],
        }
    )
    linear = {"x_scale": "linear"}
    return figure_data(
        "skew-shares",
        "lines",
        "Share of the floor, and what the floor is made of, by skew",
        alt="; ".join(
            f"exponent {row['exponent']:g}, {row['active_experts']} active experts: moeprof "
            f"{_said(row)}, on a loaded device {percent(other)}"
            for (_, row), other in zip(
                own.iterrows(), loaded[loaded["kernel"] == OURS]["share"], strict=True
            )
        ),
        how="Right is more skewed; 0 is uniform. Dots are the goals. Times and the floor are of "
        "the rested device, to which the loaded one is held, too. The floor is the upper of the "
        "two times on the right; moeprof's kernel stands above them. Bands are the quartiles of "
        f"the repetitions. The least share is at {skew.least['exponent']:g}.",
        panels=[
            {**panel("share of the floor", "Zipf exponent", "share", "share", shares), **linear},
            {**panel("time, device rested", "Zipf exponent", "ms", "ms", times), **linear},
        ],
    )


def draw_skew(data: Mapping[str, Any], path: Path) -> None:
    """Draws shares of the floor with their goals, and both parts of the floor, by exponent."""
    rows, loaded = skew_rows(data), loaded_rows(data)
    own, under_load = rows[rows["kernel"] == OURS], loaded[loaded["kernel"] == OURS]
    with mpl.rc_context(dict(STYLE)):
        figure, (shares, times) = plt.subplots(1, 2, figsize=(10.6, 4.1), layout="constrained")
        for colour, mark, (kernel, label) in zip(COLOURS, "osD", KERNELS.items(), strict=False):
            each = rows[rows["kernel"] == kernel]
            _band(shares, each, "share", colour)
            shares.plot(
                each["exponent"], each["share"], color=colour, marker=mark, markersize=4.5,
                linestyle="-" if kernel == OURS else (0, (6, 2)), label=label,
                linewidth=2.4 if kernel == OURS else 1.5,
            )  # fmt: skip
        _band(shares, under_load, "share", COLOURS[0])
        shares.plot(
            under_load["exponent"], under_load["share"], color=COLOURS[0], marker="o",
            markersize=4.5, markerfacecolor="white", linewidth=1.5, linestyle=(0, (1, 1.2)),
            label="moeprof, device loaded",
        )  # fmt: skip
        shares.plot(
            own["exponent"], own["goal_share"], linestyle="", marker="_", markersize=11,
            markeredgewidth=2.4, color="#b3261e", label="goal for moeprof",
        )  # fmt: skip
        least = skew_of(rows).least
        shares.annotate(
            f"least, rested: {_said(least)}, {least['active_experts']} active",
            # Below the curve of the loaded device.
            (least["exponent"], least["share"]), xytext=(0, -40), textcoords="offset points",
            ha="center", fontsize=9, color=COLOURS[0],
        )  # fmt: skip
        shares.set(ylim=(0, max(1.15, 1.05 * rows["share_high"].max())))
        shares.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        shares.set_title("share of the floor of the rested device")
        for column, label, line in (
            ("reading_ms", "reading the active experts", (0, (6, 2))),
            ("multiplying_ms", "multiplying", (0, (1, 1.6))),
        ):
            times.plot(own["exponent"], own[column], color=SOFT, linestyle=line, label=label)
        times.plot(
            own["exponent"], own["floor_ms"], color=INK, linewidth=1.2, label="floor: the longer"
        )
        times.fill_between(
            own["exponent"], own["low_ms"], own["high_ms"], color=COLOURS[0], alpha=0.18,
            linewidth=0,
        )  # fmt: skip
        times.plot(
            own["exponent"], own["median_ms"], color=COLOURS[0], marker="o", markersize=4.5,
            linewidth=2.4, label=KERNELS[OURS],
        )  # fmt: skip
        times.set(ylim=(0, None))
        times.set_title("time, ms, device rested")
        for axes in (shares, times):
            axes.set_xlabel("Zipf exponent; 0 is uniform")
            axes.legend(frameon=False, fontsize=8.5)
        device = data["hardware"]["device_name"] or data["hardware"]["cpu_name"]
        figure.suptitle(
            f"The kernel's share of the floor by skew, {data['num_tokens']:,} tokens, one {device}",
            x=0.008, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
        save(figure, path)


def _band(axes: Axes, rows: pd.DataFrame, column: str, colour: str) -> None:
    axes.fill_between(
        rows["exponent"], rows[f"{column}_low"], rows[f"{column}_high"], color=colour, alpha=0.18,
        linewidth=0,
    )  # fmt: skip


SKEW = Addition(
    part=skew_part,
    goals=skew_goals,
    readme_rows=skew_readme_rows,
    rows=lambda data: {"gating-skew": every_row(data)},
    drawings={"gating-skew.png": draw_skew},
)
