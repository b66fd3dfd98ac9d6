"""How good predictions of step times were, over every file of `moeprof verify`.

    python -m analysis.prediction_quality [VERIFIED ...] [--predicted FILE ...] [--carried FILE ...]
        [--earlier FILE] [-o OUT]

Pools verified-*.json (analysis/results) and holds each to the predictions that were written before
it (predicted-*.json): every row judged must be a row predicted, and predicted earlier than it was
measured. Measured percentiles, errors and coverage are computed again from the times of the steps,
as the predictions mean them (of the steps' medians over repetitions, without what was set
aside); beside them stands what they are with nothing set aside (whole), and for all repetitions of
all steps together (raw). The coverage has its exact binomial interval and, since percentiles of a
setting and settings of a machine and trace go together, intervals that draw these whole. Regret is
that of `moeprof.live.verdicts.regrets`, per routing, machine, percentile and memory. Goals are met
or missed as they fall; what was predicted and not measured is listed. Predictions that were carried
over from another machine (carried-*.json, `analysis.carried_predictions`) are judged by the same
measurements, apart; what an earlier round came to (earlier_predictions.json) stays beside, and so
does, as part of no goal, how visits fell by the speed of the host before them
(`analysis.host_speeds`).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import command
from analysis.carried_predictions import Carried, judged_again, read_carried
from analysis.earlier_predictions import EARLIER, earlier_of, read_earlier
from analysis.host_speeds import by_host_speed
from analysis.judged_rows import (
    MODELS_OF_TIME,
    coverage_by_cluster,
    pooled_rows,
    quality_of,
    regret_of,
    regret_rows,
)
from analysis.judgements import Judgement, read_judgements
from analysis.run_differences import runs_apart
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verification_options import QUIET_CORE_NOTE, TOLERANCE
from moeprof.reporting.writing import write_files

RESULTS = Path(__file__).resolve().parent / "results"
RESULT = "prediction_quality.json"
KIND = "moeprof prediction quality"

LEAST_COVERAGE, MOST_COVERAGE = 0.85, 0.95
LEAST_PREDICTIONS = 200
LEAST_SETTINGS, LEAST_MODELS, LEAST_POLICIES, LEAST_CAPACITIES = 48, 3, 4, 4
MOST_MEDIAN_ERROR = 0.05
MOST_OF_NAIVE = 1 / 3
MOST_MEDIAN_REGRET, MOST_REGRET = 0.02, 0.10

_LATE = re.compile(r"no time for (.+)$")
"""In the notes of `moeprof verify`: settings that were asked for and not reached."""


def pooled(
    judgements: Sequence[Judgement],
    carried: Sequence[Carried] = (),
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns everything that the files say together, as plain data.

    Args:
        judgements: What is held to the goals.
        carried: Predictions carried over from another machine: judged by the same measurements,
            apart, and part of no goal.
        earlier: What an earlier round came to (`analysis.earlier_predictions`).
    """
    rows = pooled_rows(judgements)
    known = rows[rows["measured_ms"].notna()]
    counts = {
        "settings": len(known[["routing", "setting"]].drop_duplicates()),
        "models": known["model"].nunique(),
        "policies": known["policy"].nunique(),
        "capacities": known["capacity"].nunique(),
        "machines": known["machine"].nunique(),
        "not_to_tolerance": int((known["measured_spread"] > TOLERANCE).sum()),
        "tolerance": TOLERANCE,
    }
    whole = quality_of(rows)
    groups = [
        {"by": by, "of": str(value), **quality_of(own)}
        for by in ("machine", "model", "percentile", "kind")
        for value, own in known.groupby(by, sort=True)
    ] + [
        {"by": "machine and model", "of": f"{machine}, {model}", **quality_of(own)}
        for (machine, model), own in known.groupby(["machine", "model"], sort=True)
    ]
    regret = {
        **regret_of(rows),
        "by_machine": [
            {"machine": str(machine), **regret_of(own)}
            for machine, own in rows.groupby("machine", sort=True)
        ],
        "rows": json.loads(regret_rows(rows).to_json(orient="records", double_precision=12)),
    }
    sources = [_source(one) for one in judgements]
    return {
        "kind": KIND,
        "sources": sources,
        "counts": counts,
        "all": whole,
        "coverage_by_cluster": coverage_by_cluster(rows),
        "groups": groups,
        "regret": regret,
        "not_measured": _not_measured(judgements, rows),
        "goals": _goals(counts, whole, regret),
        "by_host_speed": by_host_speed(judgements),
        "runs_apart": runs_apart(judgements),
        "carried": judged_again(judgements, carried) if carried else None,
        "earlier": None if earlier is None else earlier_of(earlier, sources),
        "rows": json.loads(rows.to_json(orient="records", double_precision=12)),
    }


def _source(one: Judgement) -> dict[str, Any]:
    facts = one.predictions.facts
    return {
        "verified": one.name,
        "predicted": one.predicted,
        "trace": one.trace,
        "model": facts["model"],
        "machine": one.machine,
        "hardware": one.content["hardware"],
        "versions": one.content["versions"],
        "calibrated_on": facts["calibrated_on"],
        "calibrated": facts["calibrated"],
        "predicted_on": facts["date"],
        "measured_on": one.content["date"],
        "command": one.content["command"],
        "notes": one.content["notes"],
        "host_probe_ms": _host_probe_ms(one),
        "aside_share": _aside_share(one),
        **({"beside": one.content["beside"]} if "beside" in one.content else {}),
    }


def _aside_share(one: Judgement) -> float | None:
    """Returns the share of all times that a run set aside; None where it did not look."""
    if QUIET_CORE_NOTE not in one.content["notes"]:
        return None
    found = [repetitions_of(times) for times in one.content["step_times"].values()]
    size = sum(each.times_ms.size for each in found)
    return sum(each.num_aside for each in found) / size if size else None


def _host_probe_ms(one: Judgement) -> dict[str, float] | None:
    """Returns how long a fixed piece of work took the host before visits; None where not timed."""
    probes = [
        visit["probe_ms"]
        for times in one.content["step_times"].values()
        for visit in times.get("visits", ())
        if "probe_ms" in visit
    ]
    if not probes:
        return None
    low, middle, high = pd.Series(probes, dtype=float).quantile([0.0, 0.5, 1.0]).tolist()
    return {"visits": len(probes), "least": low, "median": middle, "most": high}


def _not_measured(judgements: Sequence[Judgement], rows: pd.DataFrame) -> list[dict[str, str]]:
    """Returns settings that were predicted and not measured where others of them were."""
    found = []
    for predicted, machine in dict.fromkeys((one.predicted, one.machine) for one in judgements):
        (one, *_) = [each for each in judgements if each.predicted == predicted]
        own = rows[(rows["trace"] == one.trace) & (rows["machine"] == machine)]
        ran = set(own.loc[own["measured_ms"].notna(), "setting"])
        tried = set(own["setting"])
        late = {
            name
            for each in judgements
            if (each.predicted, each.machine) == (predicted, machine)
            for name in _late(each)
        }
        found += [
            {
                "trace": one.trace,
                "machine": machine,
                "setting": name,
                "why": "no room"
                if name in tried
                else "no time was left"
                if name in late
                else "not run",
            }
            for name in one.predictions.settings
            if name not in ran
        ]
    return found


def _late(one: Judgement) -> list[str]:
    """Returns settings that a run says it had no time for."""
    found = [_LATE.search(note) for note in one.content["notes"]]
    return [name for match in found if match for name in match[1].split(", ")]


def _goals(
    counts: Mapping[str, Any], whole: Mapping[str, Any], regret: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns every goal, what was found and whether it is met; None where nothing was found."""
    made = []

    def add(quantity: str, goal: str, found: str | None, met: bool | None) -> None:
        made.append({"quantity": quantity, "goal": goal, "found": found, "met": met})

    add(
        "Settings predicted, then measured",
        f"at least {LEAST_SETTINGS} over {LEAST_MODELS} models, {LEAST_POLICIES} policies, "
        f"{LEAST_CAPACITIES} capacities",
        f"{counts['settings']} over {counts['models']} models, {counts['policies']} policies, "
        f"{counts['capacities']} capacities",
        counts["settings"] >= LEAST_SETTINGS
        and counts["models"] >= LEAST_MODELS
        and counts["policies"] >= LEAST_POLICIES
        and counts["capacities"] >= LEAST_CAPACITIES,
    )
    rough = counts["not_to_tolerance"]
    add(
        f"Percentiles measured to {TOLERANCE:.0%}",
        "all",
        f"{whole['predictions'] - rough} of {whole['predictions']}",
        rough == 0 if whole["predictions"] else None,
    )
    coverage = whole["coverage"]
    add(
        "Measurements inside their stated 90% interval",
        f"{LEAST_COVERAGE:.0%} to {MOST_COVERAGE:.0%} of at least {LEAST_PREDICTIONS}",
        None
        if coverage is None
        else f"{coverage:.0%} of {whole['stated']} ({whole['coverage_low']:.0%} to "
        f"{whole['coverage_high']:.0%})",
        None
        if coverage is None
        else LEAST_COVERAGE <= coverage <= MOST_COVERAGE and whole["stated"] >= LEAST_PREDICTIONS,
    )
    medians = {name: each["0.5"] for name, each in whole["absolute_errors"].items()}
    own = medians["model"]
    add(
        "Median error of a predicted percentile",
        f"at most {MOST_MEDIAN_ERROR:.0%}",
        None if own is None else f"{own:.1%}",
        None if own is None else own <= MOST_MEDIAN_ERROR,
    )
    naive = {name: value for name, value in medians.items() if name != "model"}
    add(
        "The same over that of " + " and ".join(n for n in MODELS_OF_TIME if n != "model"),
        "at most a third of each",
        None
        if own is None
        else " and ".join(
            f"{own / value:.2f} of {value:.1%}" if value else "0" for value in naive.values()
        ),
        None if own is None else all(own <= value * MOST_OF_NAIVE for value in naive.values()),
    )
    for what, most in (("median", MOST_MEDIAN_REGRET), ("worst", MOST_REGRET)):
        value = regret[what]
        add(
            f"Regret of the setting recommended at equal memory, {what}",
            f"at most {most:.0%}",
            None if value is None else f"{value:.1%} over {regret['choices']} choices",
            None if value is None else value <= most,
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what the files say together and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.prediction_quality",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("verified", nargs="*", type=Path, metavar="VERIFIED")
    parser.add_argument("--predicted", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--carried", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--earlier", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / RESULT, metavar="OUT")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)

    def write() -> tuple[Path, ...]:
        # Files that are named do not go with others that happen to be kept.
        is_named = bool(options.verified)
        found = pooled(
            read_judgements(
                options.verified or sorted(RESULTS.glob("verified-*.json")),
                options.predicted or sorted(RESULTS.glob("predicted-*.json")),
            ),
            read_carried(
                options.carried
                if is_named or options.carried is not None
                else sorted(RESULTS.glob("carried-*.json"))
            ),
            read_earlier(options.earlier or RESULTS / EARLIER)
            if options.earlier or (not is_named and (RESULTS / EARLIER).exists())
            else None,
        )
        said = {"command": shlex.join(["python", "-m", "analysis.prediction_quality", *given])}
        for goal in found["goals"]:
            print(f"{_verdict(goal['met'])}: {goal['quantity']}: {goal['found']}, {goal['goal']}")
        return write_files({options.output: json.dumps({**said, **found}, indent=1) + "\n"})

    return command.run(write)


def _verdict(met: bool | None) -> str:
    if met is None:
        return "not measured"
    return "reached" if met else "missed"


if __name__ == "__main__":
    sys.exit(main())
