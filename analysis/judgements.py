"""Files of `moeprof verify` and the predictions that they judge, read and held to each other.

Every row judged must be a row predicted, and predicted earlier than it was measured; what a file
says must be what its steps say. Leaves out how good predictions were (`analysis.judged_rows`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeprof.errors import MoeprofError
from moeprof.live.step_percentiles import repetitions_of
from moeprof.live.verification_files import VERIFICATION_KIND, read_predictions
from moeprof.live.verification_options import Predictions

PREDICTED = (
    "predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms", "naive_mean_ms",
    "copied_bytes_per_step", "device_bytes",
)  # fmt: skip
"""What a row says of its prediction; bytes copied are those of a mean judged step."""

HIT_RATES: Mapping[str, str] = MappingProxyType(
    {"judged_hit_rate": "judged_hit_rate", "every_step_hit_rate": "hit_rate"}
)
"""What hit rates are called here, and in rows: of the judged steps, or, as earlier predictions have
it, of every step that runs, a prompt's into an empty buffer included. A row has one of them."""

CARRIED_FACT = "carried_for"
"""Among the facts of predictions that another machine's trials made."""

_NEEDED = ("kind", "command", "date", "hardware", "versions", "notes", "rows", "step_times")
_CLOSE = 1e-9
_HINT = "write it again: moeprof verify TRACE --predictions FILE -o FILE"


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """A file of measurements and the predictions that it judges.

    Attributes:
        name: Of the file.
        content: The file.
        predicted: Name of the file of predictions.
        predictions: Written before.
    """

    name: str
    content: Mapping[str, Any]
    predicted: str
    predictions: Predictions

    @property
    def machine(self) -> str:
        """Where it was measured."""
        hardware = self.content["hardware"]
        return str(hardware["device_name"] or hardware.get("cpu_name"))

    @property
    def trace(self) -> str:
        """What the predictions are called, less the machine that they are for."""
        return trace_named(self.predicted, self.machine)

    def first_measured(self) -> datetime:
        """Returns when the first of the runs was made whose visits are in the file.

        Raises:
            KeyError, TypeError, ValueError: A run has no date.
        """
        # Visits may have been added to those of runs before.
        runs = [*self.content.get("earlier_runs", ()), self.content]
        return min(datetime.fromisoformat(run["date"]) for run in runs)


def trace_named(predicted: str, machine: str) -> str:
    """Returns ``qwen3`` for predicted-qwen3-h200.json and an NVIDIA H200.

    Args:
        predicted: Name of a file of predictions.
        machine: That they are for.
    """
    name = Path(predicted).stem.removeprefix("predicted-")
    rest, _, last = name.rpartition("-")
    return rest if rest and last in machine.lower().split() else name


def read_judgements(verified: Iterable[Path], predicted: Iterable[Path]) -> list[Judgement]:
    """Reads files of measurements, each with the predictions that it judges.

    Args:
        verified: From ``moeprof verify -o``.
        predicted: From ``moeprof verify --predict-only -o``.

    Raises:
        MoeprofError: A file is damaged, lacks or repeats rows, judges what was not predicted
            before, or what another judges as well, or predictions were carried over from another
            machine.
    """
    known = {path.name: read_predictions(path) for path in predicted}
    for name, predictions in known.items():
        check_unique(name, predictions.rows, "write them again: moeprof verify --predict-only")
        if CARRIED_FACT in predictions.facts:
            raise MoeprofError(
                f"{name} is carried over from another machine",
                hint="such predictions are judged apart: --carried FILE",
            )
    found = []
    seen: dict[tuple[str, str, str], str] = {}
    for path in sorted(verified):
        content = _read(path)
        name = _predictions_of(path, content, known)
        _check_complete(path, content, known[name])
        one = Judgement(name=path.name, content=content, predicted=name, predictions=known[name])
        _check_dates(one)
        for setting in dict.fromkeys(row["setting"] for row in content["rows"]):
            key = (one.predictions.facts["trace"], one.machine, setting)
            if key in seen:
                raise MoeprofError(
                    f"{setting} of {key[0]} was measured on {one.machine} in {seen[key]} and in "
                    f"{path.name}",
                    hint="every setting counts once; name the files to pool",
                )
            seen[key] = path.name
        found.append(one)
    if not found:
        raise MoeprofError("there is nothing to pool", hint=_HINT)
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoeprofError(f"{path} cannot be read: {error}", hint=_HINT) from error
    if not isinstance(content, dict) or content.get("kind") != VERIFICATION_KIND:
        raise MoeprofError(f"{path} is not from moeprof verify", hint=_HINT)
    lacking = [field for field in _NEEDED if field not in content]
    if lacking:
        raise MoeprofError(f"{path} lacks {', '.join(lacking)}", hint=_HINT)
    try:
        for row in content["rows"]:
            _check_row(row, content["step_times"].get(row["setting"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MoeprofError(f"{path} is damaged: {error!r}", hint=_HINT) from None
    return content


def _check_row(row: Mapping[str, Any], times: Mapping[str, Any] | None) -> None:
    """Raises ValueError where a row is not what its steps say."""
    what = f"{row['setting']} p{row['percentile']}"
    if (times is None) != (row["measured_ms"] is None):
        raise ValueError(f"{what} has a time and no steps, or steps and no time")
    if times is None:
        return
    found = repetitions_of(times)
    if len(found.times_ms) != row["repetitions"]:
        raise ValueError(f"{what} has not as many repetitions as it says")
    value = found.percentile_ms(row["percentile"])
    if not math.isclose(value, row["measured_ms"], rel_tol=1e-6):
        raise ValueError(f"{what} says {row['measured_ms']} ms, its steps say otherwise")


def _predictions_of(
    path: Path, content: Mapping[str, Any], known: Mapping[str, Predictions]
) -> str:
    """Returns the file whose rows these are."""
    for name, predictions in known.items():
        rows = {(row["setting"], row["percentile"]): row for row in predictions.rows}
        if all(
            _is_same(row, rows.get((row["setting"], row["percentile"]))) for row in content["rows"]
        ):
            return name
    raise MoeprofError(
        f"{path} judges what none of {', '.join(known) or 'no predictions'} says",
        hint="give the predictions that it was run with: --predicted FILE",
    )


def check_unique(name: str, rows: Sequence[Mapping[str, Any]], hint: str) -> None:
    """Refuses rows that say a percentile of a setting twice: it would count twice.

    Args:
        name: Of their file.
        rows: Of predictions or measurements.
        hint: The way out.

    Raises:
        MoeprofError: A percentile is there twice.
    """
    counts = Counter((row["setting"], row["percentile"]) for row in rows)
    for (setting, percentile), count in counts.items():
        if count > 1:
            raise MoeprofError(f"{name} has {count} rows of {setting} p{percentile}", hint=hint)


def _check_complete(path: Path, content: Mapping[str, Any], predictions: Predictions) -> None:
    """Refuses a file that leaves out some of what was predicted of a setting that was tried."""
    check_unique(path.name, content["rows"], _HINT)
    given = {(row["setting"], row["percentile"]) for row in content["rows"]}
    tried = {row["setting"] for row in content["rows"]} | set(content["step_times"])
    predicted = {row["setting"] for row in predictions.rows}
    unknown = sorted(tried - predicted)
    if unknown:
        raise MoeprofError(
            f"{path.name} measured {unknown[0]}, which was not predicted in the file that it "
            "judges",
            hint=_HINT,
        )
    for row in predictions.rows:
        setting, percentile = row["setting"], row["percentile"]
        if setting in tried and (setting, percentile) not in given:
            raise MoeprofError(
                f"{path.name} lacks p{percentile} of {setting}, which was predicted and measured",
                hint=_HINT,
            )


def _is_same(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    if other is None:
        return False
    for key in (*PREDICTED, *HIT_RATES.values()):
        is_given = key in row, key in other
        if key not in PREDICTED and is_given == (False, False):
            continue
        if is_given != (True, True):
            return False
        one, two = row[key], other[key]
        if (one is None) != (two is None):
            return False
        if one is not None and not math.isclose(one, two, rel_tol=_CLOSE, abs_tol=_CLOSE):
            return False
    return True


def _check_dates(one: Judgement) -> None:
    facts = one.predictions.facts
    try:
        calibrated, predicted = (
            datetime.fromisoformat(facts[key]) for key in ("calibrated", "date")
        )
        measured = one.first_measured()
        in_order = calibrated <= predicted < measured
    except (KeyError, TypeError, ValueError) as error:
        raise MoeprofError(f"{one.name} or {one.predicted} has no date: {error}") from None
    if not in_order:
        raise MoeprofError(
            f"{one.name} was measured {measured}, {one.predicted} predicted {predicted} from what "
            f"was calibrated {calibrated}: not in this order",
            hint="predictions are kept before anything is measured",
        )
