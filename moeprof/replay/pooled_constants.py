"""One set of constants from several calibrations of the same kind of machine.

A machine whose host other people use too is another machine an hour later. What it was measured to
do at several times says more than the last time alone: constants are the geometric means, and their
errors no less than what the times differ by. Leaves out trials, which have to be modelled again by
the constants of all (`moeprof.live.calibration.pooled`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moeprof.errors import CalibrationError
from moeprof.replay.calibration_file import Calibration, Curve, Measured

_SAME = ("dtype", "is_serial")
_HINT = "pool calibrations of one kind of machine, measured with the same sizes"
# What is told of one of them, or put together otherwise.
_TOLD = ("device", "versions", "date", "command", "host_probes_ms", "num_disturbed", "trials",
         "corrections", "by_size", "trials_of", "all_to_all", "exchange_ranks",
         "sizes")  # fmt: skip


def in_time_order(calibrations: Sequence[Calibration]) -> list[Calibration]:
    """Returns calibrations, the earliest first.

    Raises:
        CalibrationError: Two are one and the same, which would make what they say look surer than
            it is, or one does not say when it was measured.
    """
    dated = [(_measured_at(one), one) for one in calibrations]
    seen: set[tuple[str, datetime]] = set()
    for at, one in dated:
        if (one.name, at) in seen:
            raise CalibrationError(
                f"two of the calibrations are the same measurement: {one.name}, {one.date}",
                hint="pool calibrations that were measured each at a time of its own",
            )
        seen.add((one.name, at))
    return [one for _, one in sorted(dated, key=lambda each: each[0])]


def _measured_at(calibration: Calibration) -> datetime:
    try:
        found = datetime.fromisoformat(calibration.date)
    except ValueError:
        raise CalibrationError(
            f"a calibration of {calibration.name} says {calibration.date!r} for a date", hint=_HINT
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def pooled_constants(calibrations: Sequence[Calibration]) -> Calibration:
    """Returns what several calibrations say together, without trials.

    Policies, kernels and constants that only some of them know are taken from those. Device,
    versions, date and exchange between ranks are those of the last one.

    Args:
        calibrations: Of one kind of machine; at least one.

    Raises:
        CalibrationError: They are of different machines or sizes, or two of them are one.
    """
    calibrations = in_time_order(calibrations)
    last = calibrations[-1]
    for one in calibrations:
        if one.name != last.name:
            raise CalibrationError(f"{one.name} is not {last.name}", hint=_HINT)
        if any(getattr(one, name) != getattr(last, name) for name in _SAME):
            raise CalibrationError("the calibrations are of other weights or devices", hint=_HINT)
    fields = {
        field.name: _together([getattr(one, field.name) for one in calibrations])
        for field in dataclasses.fields(Calibration)
        if field.name not in (*_TOLD, *_SAME)
    }
    probes = [probe for one in calibrations for probe in one.host_probes_ms]
    disturbed = [one.num_disturbed for one in calibrations if one.num_disturbed is not None]
    return dataclasses.replace(
        last, **fields, host_probes_ms=tuple(probes), trials=(), corrections=None, by_size={},
        trials_of=None, num_disturbed=sum(disturbed) if disturbed else None,
    )  # fmt: skip


def _together(values: Sequence[Any]) -> Any:
    """Returns the middle of values of one field."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    first = known[0]
    if isinstance(first, Measured):
        return _measured(known)
    if isinstance(first, Curve) and not _is_same([curve.sizes for curve in known]):
        raise _other_sizes()
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return type(first)(
            **{
                field.name: _together([getattr(value, field.name) for value in known])
                for field in dataclasses.fields(first)
            }
        )
    if isinstance(first, Mapping):
        names = list(dict.fromkeys(name for value in known for name in value))
        return {
            name: _together([value[name] for value in known if name in value]) for name in names
        }
    if isinstance(first, tuple):
        if len({len(value) for value in known}) > 1:
            raise _other_sizes()
        return tuple(_together(list(each)) for each in zip(*known, strict=True))
    if isinstance(first, float) and not _is_same(known):
        # Parts of a fit: one that is zero at one time is half of what it was at another.
        return float(np.mean(known))
    if not _is_same(known):
        raise _other_sizes()
    return first


def _other_sizes() -> CalibrationError:
    return CalibrationError("the calibrations were measured at other sizes", hint=_HINT)


def _is_same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _measured(values: Sequence[Measured]) -> Measured:
    """Returns the geometric mean, as far off as the calibrations are from each other."""
    count = len(values)
    if count == 1:
        return values[0]
    medians = np.array([value.median for value in values])
    error = math.sqrt(sum(value.error**2 for value in values)) / count
    median = float(np.mean(medians))
    if (medians > 0).all():
        logs = np.log(medians)
        median = float(np.exp(logs.mean()))
        error = max(error, float(logs.std(ddof=1)) / math.sqrt(count))
    return Measured(
        median=median,
        low=min(value.low for value in values),
        high=max(value.high for value in values),
        error=error,
        num_repetitions=sum(value.num_repetitions for value in values),
    )
