"""Calibrations made by hand, whose numbers are easy to work with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moeprof.replay.calibration_file import (
    Calibration,
    Corrections,
    Curve,
    DecisionTimes,
    ExpertTimes,
    GatingTimes,
    KernelCorrection,
    Leftovers,
    Measured,
    StreamedTimes,
    Trial,
)
from moeprof.replay.pipeline import PARTS


def exactly(value: float, error: float = 0.0) -> Measured:
    return Measured(median=value, low=value, high=value, error=error, num_repetitions=5)


def flat(seconds: float) -> Curve:
    return Curve(sizes=(1e9,), times_s=(exactly(seconds),))


def surface(seconds: float) -> ExpertTimes:
    return ExpertTimes(expert_bytes=(1 << 40,), by_rows=(flat(seconds),))


FREE = DecisionTimes(dispatch_s=0.0, hit_s=0.0, miss_s=0.0, slot_s=0.0, error=0.0)


def trial(ratio: float, kind: str = "buffering", steps: int = 4) -> Trial:
    return Trial(
        kind=kind,
        setting="lru:1",
        routing="made up",
        modelled_ms=(10.0,) * steps,
        measured_ms=((10.0 * ratio,) * steps,) * 2,
    )


def leftovers(residuals: Sequence[float]) -> Leftovers:
    """Trials that are off by so much, whose steps do not differ."""
    return Leftovers(residuals=tuple(residuals), freedom=len(residuals), jitter=(1.0,))


def corrections(
    ratio: float = 1.0, *, residuals: Sequence[float] = (0.0,) * 5, kernel: str = "dynamic"
) -> Corrections:
    """All takes ``ratio`` times as long, with a kernel too; that alone is sure."""
    left = leftovers(residuals)
    whole = KernelCorrection(log_factor=math.log(ratio), error=0.0)
    return Corrections(
        parts=PARTS,
        log_factors=(math.log(ratio),) * len(PARTS),
        covariance=tuple(
            tuple(1e-18 if row == column else 0.0 for column in range(len(PARTS)))
            for row in range(len(PARTS))
        ),
        buffering=left,
        kernels={kernel: whole},
        gating=left,
    )


def streamed_times(**changes: Any) -> StreamedTimes:
    """Pieces take 2 s, whatever is in them; all else is free."""
    free = exactly(0.0)
    given: dict[str, Any] = {
        "most_tokens": 64,
        "rows_at_once": 16,
        "known_s": free,
        "late_s": free,
        "piece_host": flat(0.0),
        "slot_host_s": free,
        "load_host_s": free,
        "piece_device": surface(2.0),
        "combine_host_s": free,
        "combine_device": flat(0.0),
    }
    return StreamedTimes(**given | changes)


def hand_calibration(
    *,
    policies: Sequence[str] = ("lru", "lifo", "paper", "min"),
    **changes: Any,
) -> Calibration:
    """Copies take 10 s, experts 4 s on the device and 3 s on the host; all else is free."""
    given: dict[str, Any] = {
        "device": {"device": "cuda", "device_name": "made up", "driver": "1"},
        "versions": {"torch": "2"},
        "date": "2026-01-01T00:00:00+00:00",
        "command": "by hand",
        "dtype": "float32",
        "is_serial": False,
        "device_copy_bytes_per_s": exactly(1e12),
        "matrix_flops_per_s": exactly(1e15),
        "to_device": flat(10.0),
        "device_expert": surface(4.0),
        "host_expert": surface(3.0),
        "sort_device": flat(0.0),
        "combine_device": flat(0.0),
        "decisions": dict.fromkeys(policies, FREE),
        "gating": {
            "dynamic": GatingTimes(
                host_dispatch_s=1.0,
                host_expert_s=0.0,
                device_dispatch_s=0.5,
                device_expert_s=2.0,
                weight_factor=0.0,
                flops_factor=0.0,
                moved_factor=0.0,
                waits=False,
                error=0.0,
            )
        },
    }
    for name in (
        "launch_host_s", "launch_device_s", "expert_host_s", "slot_host_s", "load_host_s",
        "fetch_s", "return_host_s", "known_s", "combine_host_s", "sync_s", "handover_s",
    ):  # fmt: skip
        given[name] = exactly(0.0)
    return Calibration(**given | changes)
