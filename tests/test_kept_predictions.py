"""Predictions that are kept come from the calibrations that are kept, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from moeprof.live.verification import make_predictions
from moeprof.live.verification_files import read_predictions
from moeprof.replay.calibration_file import read_calibration
from moeprof.replay.serving_settings import parse_setting
from moeprof.trace.reader import open_trace

STATED = ("predicted_ms", "low_ms", "high_ms", "naive_bandwidth_ms", "naive_mean_ms")
RESULTS = Path(__file__).resolve().parents[1] / "analysis" / "results"


# Qwen3's trace is not kept here: `analysis.memory_latency` compares its predictions likewise.
@pytest.mark.parametrize(
    ("name", "trace", "calibration"),
    [
        ("twin-mt-h100", "sample:twin-mt", "h100"),
        # From before the model was changed, and not run again.
        ("twin-mt-h200", "sample:twin-mt", "h200-twin-mt"),
        ("zoo-lm-h100", "sample:lm", "h100"),
        ("zoo-lm-h200", "sample:lm", "h200"),
    ],
)
def test_predictions_come_from_the_calibration_that_is_kept(name, trace, calibration):
    kept = read_predictions(RESULTS / f"predicted-{name}.json")
    machine = read_calibration(RESULTS / f"calibration-{calibration}.json")
    assert kept.facts["calibrated"] == machine.date
    again = make_predictions(
        open_trace(trace), machine, [parse_setting(each) for each in kept.settings], kept.options
    )
    assert again.settings == kept.settings
    for row, own in zip(again.rows, kept.rows, strict=True):
        assert (row["setting"], row["percentile"]) == (own["setting"], own["percentile"])
        for key in STATED:
            assert row[key] == pytest.approx(own[key], rel=1e-9), (own["setting"], key)
