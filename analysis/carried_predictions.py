"""Predictions for a machine that another machine's trials make, judged apart from its own.

    python -m analysis.carried_predictions PREDICTED --trace TRACE --trials CALIBRATION
        [--constants CALIBRATION] -o OUT

PREDICTED are a machine's own predictions; the same settings are predicted again, before they are
measured. With ``--constants`` (the calibration that PREDICTED come from) the machine's constants
are corrected by the trials of the other: what do trials on one GPU say about another? Without, the
other's calibration alone predicts this machine, unchanged.

`analysis.prediction_quality` judges what is written by the measurements of PREDICTED.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import command
from analysis.judged_rows import pooled_rows, quality_of, regret_of
from analysis.judgements import CARRIED_FACT, PREDICTED, Judgement, check_unique, trace_named
from moeprof.errors import MoeprofError
from moeprof.live.verification import make_predictions
from moeprof.live.verification_files import read_predictions, write_predictions
from moeprof.live.verification_options import Predictions
from moeprof.replay.calibration_file import Calibration, read_calibration
from moeprof.replay.corrections import with_trials_of
from moeprof.replay.serving_settings import parse_setting
from moeprof.trace.reader import Trace, open_trace

CONSTANTS = "constants of the machine, trials of the other"
UNCHANGED = "calibration of the other, unchanged"
KINDS = (CONSTANTS, UNCHANGED)

_FACTS = (
    CARRIED_FACT, "judged_on", "trials_on", "trials_date", "calibrated_on", "calibrated", "trace",
    "num_lookups", "date",
)  # fmt: skip
_LISTED = (
    "trace", "machine", "setting", "percentile", *PREDICTED, "measured_ms", "inside", "error",
    "naive_bandwidth_error", "naive_mean_error",
)  # fmt: skip
_HINT = "write it again: python -m analysis.carried_predictions PREDICTED ... -o FILE"


def carried_over(
    predicted: str,
    own: Predictions,
    trace: Trace,
    *,
    constants: Calibration | None,
    trials: Calibration,
    said: str,
) -> Predictions:
    """Returns predictions of the same settings by another machine's trials.

    Args:
        predicted: Name of the file of ``own``.
        own: The machine's own predictions.
        trace: Of them.
        constants: The calibration that they come from; None for nothing but the other's.
        trials: The other machine's calibration.
        said: The command.

    Raises:
        MoeprofError: These do not belong together, or nothing would be carried over.
    """
    facts = own.facts
    if CARRIED_FACT in facts:
        raise MoeprofError(f"{predicted} is carried over itself", hint="give a machine's own")
    if trials.trials_of is not None:
        raise MoeprofError(
            f"the calibration of {trials.name} has trials of {trials.trials_of.machine} itself",
            hint="give the calibration of the machine that ran the trials",
        )
    if trials.name == facts["calibrated_on"]:
        raise MoeprofError(
            f"{predicted} comes from trials on {trials.name} already",
            hint="--trials is the calibration of another machine",
        )
    if constants is not None and (constants.name, constants.date) != (
        facts["calibrated_on"],
        facts["calibrated"],
    ):
        raise MoeprofError(
            f"{predicted} comes from a calibration of {facts['calibrated_on']} of "
            f"{facts['calibrated']}, not from that of {constants.name} of {constants.date}",
            hint="--constants is the calibration that it was made from",
        )
    machine = trials if constants is None else with_trials_of(constants, trials)
    found = make_predictions(
        trace, machine, [parse_setting(name) for name in own.settings], own.options
    )
    for fact in ("trace", "num_lookups"):
        if found.facts[fact] != facts[fact]:
            raise MoeprofError(f"{predicted} is not of {trace.path}", hint="give its trace")
    added = {
        CARRIED_FACT: predicted,
        "judged_on": facts["calibrated_on"],
        "trials_on": trials.name,
        "trials_date": trials.date,
        "command": said,
    }
    return replace(found, facts={**found.facts, **added})


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """A file of predictions that were carried over.

    Attributes:
        name: Of the file.
        predictions: What it says.
    """

    name: str
    predictions: Predictions

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the predictions."""
        return self.predictions.facts

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        is_own = self.facts["calibrated_on"] == self.facts["judged_on"]
        return CONSTANTS if is_own else UNCHANGED


def read_carried(paths: Iterable[Path] | None) -> list[Carried]:
    """Reads files of this command; none when None.

    Raises:
        MoeprofError: One is damaged or something else, or two say the same.
    """
    found: list[Carried] = []
    seen: dict[tuple[str, str], str] = {}
    for path in sorted(paths or ()):
        one = Carried(name=path.name, predictions=read_predictions(path))
        lacking = [fact for fact in _FACTS if fact not in one.facts]
        if lacking:
            raise MoeprofError(
                f"{path} is not carried over: it lacks {', '.join(lacking)}", hint=_HINT
            )
        check_unique(path.name, one.predictions.rows, _HINT)
        facts = one.facts
        if facts["trials_on"] == facts["judged_on"] or (
            one.kind == UNCHANGED and facts["calibrated_on"] != facts["trials_on"]
        ):
            raise MoeprofError(
                f"{path} carries nothing over to {facts['judged_on']}: constants of "
                f"{facts['calibrated_on']}, trials of {facts['trials_on']}",
                hint=_HINT,
            )
        key = (facts[CARRIED_FACT], one.kind)
        if key in seen:
            raise MoeprofError(
                f"{path.name} and {seen[key]} both carry over {key[0]} ({key[1]})",
                hint="every prediction counts once; name the files to judge",
            )
        seen[key] = path.name
        found.append(one)
    return found


def judged_again(judgements: Sequence[Judgement], carried: Sequence[Carried]) -> dict[str, Any]:
    """Returns how good predictions that were carried over are, by the same measured runs.

    Args:
        judgements: Measurements and the machines' own predictions.
        carried: Beside these.

    Raises:
        MoeprofError: A file does not go with the predictions that it names, or was not written
            before the measurement.
    """
    sources, kinds, listed, missing = [], [], [], []
    for kind in KINDS:
        own, again = [], []
        for one in (each for each in carried if each.kind == kind):
            beside = [each for each in judgements if each.predicted == one.facts[CARRIED_FACT]
                      and each.machine == one.facts["judged_on"]]  # fmt: skip
            for judgement in beside:
                _check_beside(one, judgement)
            sources.append(_source(one, beside))
            if not beside:
                missing.append({"carried": one.name, "machine": one.facts["judged_on"]})
                continue
            own.append(pooled_rows(beside))
            again.append(_rows_again(own[-1], one))
        if not again:
            continue
        rows, before = pd.concat(again, ignore_index=True), pd.concat(own, ignore_index=True)
        kinds.append(
            {
                "kind": kind,
                "machines": sorted(rows["machine"].unique()),
                "trials_on": sorted(
                    {each["trials_on"] for each in sources if each["kind"] == kind}
                ),
                **quality_of(rows),
                "regret": regret_of(rows),
                "own": {**quality_of(before), "regret": regret_of(before)},
            }
        )
        rows = rows[rows["measured_ms"].notna()][list(_LISTED)]
        rows.insert(0, "kind", kind)
        listed.append(rows)
    every = pd.concat(listed, ignore_index=True) if listed else pd.DataFrame()
    return {
        "sources": sources,
        "kinds": kinds,
        "not_measured": missing,
        "rows": every.astype(object).where(every.notna(), None).to_dict(orient="records"),
    }


def _source(one: Carried, beside: Sequence[Judgement]) -> dict[str, Any]:
    facts = one.facts
    return {
        "carried": one.name,
        "kind": one.kind,
        "beside": facts[CARRIED_FACT],
        "trace": trace_named(facts[CARRIED_FACT], facts["judged_on"]),
        "machine": facts["judged_on"],
        "calibrated_on": facts["calibrated_on"],
        "calibrated": facts["calibrated"],
        "trials_on": facts["trials_on"],
        "trials_date": facts["trials_date"],
        "predicted_on": facts["date"],
        "verified": [each.name for each in beside],
    }


def _check_beside(one: Carried, judgement: Judgement) -> None:
    """Refuses what is not said of the same settings, or not before the measurement."""
    own, facts = judgement.predictions, one.facts
    differ = [
        what
        for what, here, there in (
            ("settings", one.predictions.settings, own.settings),
            ("options", asdict(one.predictions.options), asdict(own.options)),
            ("trace", facts["trace"], own.facts["trace"]),
            ("lookups", facts["num_lookups"], own.facts["num_lookups"]),
        )
        if here != there
    ]
    if differ:
        raise MoeprofError(
            f"{one.name} has other {', '.join(differ)} than {judgement.predicted}", hint=_HINT
        )
    dates = [facts["calibrated"], facts["trials_date"], facts["date"]]
    try:
        *before, predicted = map(datetime.fromisoformat, dates)
        measured = judgement.first_measured()
        in_order = max(before) <= predicted < measured
    except (KeyError, TypeError, ValueError) as error:
        raise MoeprofError(f"{one.name} has no date: {error}") from None
    if not in_order:
        raise MoeprofError(
            f"{judgement.name} was measured {measured}, {one.name} predicted {dates[2]} from what "
            f"was calibrated {dates[0]} and tried {dates[1]}: not in this order",
            hint="predictions are kept before anything is measured",
        )


def _rows_again(own: pd.DataFrame, one: Carried) -> pd.DataFrame:
    """Returns measured rows with what was carried over in place of the machine's predictions."""
    said = {(row["setting"], row["percentile"]): row for row in one.predictions.rows}
    keys = list(zip(own["setting"], own["percentile"], strict=True))
    try:
        found = pd.DataFrame([{name: said[key][name] for name in PREDICTED} for key in keys])
    except KeyError as error:
        raise MoeprofError(f"{one.name} is damaged: it lacks {error}", hint=_HINT) from None
    rows = own.assign(**{name: found[name].to_numpy() for name in PREDICTED})
    measured = rows["measured_ms"].to_numpy(float)
    low, high = rows["low_ms"].to_numpy(float), rows["high_ms"].to_numpy(float)
    inside = ((low <= measured) & (measured <= high)).astype(object)
    inside[~(np.isfinite(low) & np.isfinite(measured))] = None
    return rows.assign(
        inside=inside,
        error=rows["predicted_ms"].to_numpy(float) / measured - 1,
        naive_bandwidth_error=rows["naive_bandwidth_ms"].to_numpy(float) / measured - 1,
        naive_mean_error=rows["naive_mean_ms"].to_numpy(float) / measured - 1,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes predictions and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.carried_predictions",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("predicted", type=Path, metavar="PREDICTED")
    parser.add_argument("--trace", required=True)
    parser.add_argument("--trials", type=Path, required=True, metavar="CALIBRATION")
    parser.add_argument("--constants", type=Path, metavar="CALIBRATION")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--force", action="store_true", help="Replace an existing file.")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)

    def write() -> tuple[Path, ...]:
        made = carried_over(
            options.predicted.name,
            read_predictions(options.predicted),
            open_trace(options.trace),
            constants=None if options.constants is None else read_calibration(options.constants),
            trials=read_calibration(options.trials),
            said=shlex.join(["python", "-m", "analysis.carried_predictions", *given]),
        )
        return (write_predictions(made, options.output, force=options.force),)

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
