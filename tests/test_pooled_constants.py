"""Constants of several calibrations together, by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from calibrations import exactly, flat, hand_calibration, streamed_times

from moeprof.errors import CalibrationError
from moeprof.replay.pooled_constants import in_time_order, pooled_constants

LATER = "2026-01-01T01:00:00+00:00"


def test_times_are_the_geometric_mean_and_as_sure_as_they_agree() -> None:
    one = hand_calibration(sync_s=exactly(1e-5, 0.01), to_device=flat(1.0))
    two = hand_calibration(sync_s=exactly(4e-5, 0.01), to_device=flat(1.0), date=LATER)
    found = pooled_constants([one, two])
    assert found.sync_s.median == pytest.approx(2e-5)
    assert (found.sync_s.low, found.sync_s.high) == (1e-5, 4e-5)
    assert found.sync_s.num_repetitions == 10
    # The standard deviation of two logs that are log 4 apart, over the root of two.
    assert found.sync_s.error == pytest.approx(math.log(4) / 2)
    # Where they agree, their own errors are all there is.
    assert found.to_device == dataclasses.replace(
        one.to_device, times_s=(dataclasses.replace(exactly(1.0), num_repetitions=10),)
    )
    assert found.date == LATER and not found.trials and found.corrections is None
    assert pooled_constants([one]).sync_s == one.sync_s


def test_what_only_some_know_is_theirs() -> None:
    one = hand_calibration(foresee_s=None, streamed=None, host_probes_ms=(1.0, 2.0))
    two = hand_calibration(
        foresee_s=exactly(1e-5), streamed=streamed_times(), host_probes_ms=(3.0,), date=LATER
    )
    slow = {name: dataclasses.replace(each, miss_s=each.miss_s + 2.0)
            for name, each in two.decisions.items()}  # fmt: skip
    two = dataclasses.replace(two, decisions={**slow, "own": slow["lru"]})
    found = pooled_constants([one, two])
    assert found.foresee_s == two.foresee_s and found.streamed == two.streamed
    assert found.host_probes_ms == (1.0, 2.0, 3.0)
    assert found.decisions["own"] == slow["lru"]
    assert found.decisions["lru"].miss_s == pytest.approx(one.decisions["lru"].miss_s + 1.0)


def other_sizes(machine: Any) -> Any:
    longer = dataclasses.replace(machine.to_device, sizes=(1e9, 2e9), times_s=(exactly(1.0),) * 2)
    return dataclasses.replace(machine, to_device=longer)


def as_many_sizes(machine: Any) -> Any:
    sizes = tuple(2.0 * size for size in machine.to_device.sizes)
    return dataclasses.replace(
        machine, to_device=dataclasses.replace(machine.to_device, sizes=sizes)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: dataclasses.replace(m, device={"device_name": "other"}), "is not"),
        (lambda m: dataclasses.replace(m, dtype="float16"), "other weights"),
        (lambda m: dataclasses.replace(m, is_serial=not m.is_serial), "other weights or devices"),
        (other_sizes, "other sizes"),
        (as_many_sizes, "other sizes"),
    ],
)  # fmt: skip
def test_different_machines_are_refused(change: Any, said: str) -> None:
    machine = hand_calibration()
    later = dataclasses.replace(machine, date=LATER)
    with pytest.raises(CalibrationError, match=said):
        pooled_constants([machine, change(later)])


def test_a_zero_is_no_reason_to_forget_the_other() -> None:
    found = pooled_constants(
        [hand_calibration(sync_s=exactly(0.0)), hand_calibration(sync_s=exactly(2.0), date=LATER)]
    )
    assert found.sync_s.median == 1.0
    assert np.isfinite(found.sync_s.error)


def test_they_are_put_in_order_of_time() -> None:
    # The same hour as another clock has it: 02:30 there is 00:30 here.
    dates = ["2026-01-01T02:30:00+02:00", "2026-01-01T00:00:00+00:00", LATER, "2025-12-31T23:59:59"]
    every = [hand_calibration(date=date, host_probes_ms=(1.0 + n,)) for n, date in enumerate(dates)]
    assert [each.date for each in in_time_order(every)] == [dates[n] for n in (3, 1, 0, 2)]
    found = pooled_constants(every)
    assert found.date == LATER and found.host_probes_ms == (4.0, 2.0, 1.0, 3.0)


def test_the_same_measurement_counts_once() -> None:
    machine = hand_calibration()
    for again in (
        machine,
        dataclasses.replace(machine, sync_s=exactly(2.0)),
        dataclasses.replace(machine, date="2026-01-01T02:00:00+02:00"),
    ):
        with pytest.raises(CalibrationError, match="are the same measurement: made up") as caught:
            pooled_constants([machine, hand_calibration(date=LATER), again])
        assert "\n" not in caught.value.message and caught.value.hint
    with pytest.raises(CalibrationError, match="says 'yesterday' for a date"):
        pooled_constants([machine, dataclasses.replace(machine, date="yesterday")])
