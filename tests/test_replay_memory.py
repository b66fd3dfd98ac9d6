"""Memory: static parts, peaks beyond them, unknowns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from replay_tools import mark_trained

from moeprof import replay
from moeprof.replay.footprint import MAX_TIMELINE_POINTS
from moeprof.trace import schema
from moeprof.trace.synthetic import synthetic_trace

GIB = 1 << 30


@pytest.fixture
def trace(tmp_path):
    found = mark_trained(synthetic_trace(tmp_path / "t.moeprof", num_requests=20, seed=1))
    model = dataclasses.replace(
        found.info.model, static_bytes=schema.StaticBytes(embedding=GIB, experts=3 * GIB)
    )
    found.info = dataclasses.replace(found.info, model=model)
    steps = found.steps.copy()
    steps["allocated_bytes"] = 4.5 * GIB
    steps["reserved_bytes"] = 6.0 * GIB
    steps["peak_bytes"] = np.where(steps["phase"] == "prefill", 5.5 * GIB, 4.75 * GIB)
    found.steps = steps
    return found


def test_static_parts(trace):
    result = replay.memory(trace)
    parts = result.table.set_index("part")
    assert parts["bytes"].sum() == 4 * GIB
    assert parts.loc["experts", "share"] == 0.75
    share = result.metric("memory/experts_share")
    assert (share.value, share.figure_class) == (0.75, "exact")
    assert "Experts hold 75% of the 4 GiB" in result.findings[0].text


def test_activations_are_the_peak_less_what_is_static(trace):
    result = replay.memory(trace)
    largest = result.metric("memory/max_activation_bytes/decoder/prefill")
    assert (largest.value, largest.figure_class) == (1.5 * GIB, "measured")
    median = result.metric("memory/p50_activation_bytes/decoder/decode")
    assert median.value == 0.75 * GIB
    assert "1.50 GiB in prefill" in result.findings[1].text
    assert result.metric("memory/max_reserved_bytes/decoder/decode").value == 6 * GIB


def test_without_an_allocator_activations_are_unknown(trace):
    trace.steps[["allocated_bytes", "reserved_bytes", "peak_bytes"]] = np.nan
    result = replay.memory(trace)
    assert not any("activation" in metric.name for metric in result.metrics)
    assert result.tables["dynamic"]["max_activation_bytes"].isna().all()
    assert any("unknown, not zero" in note for note in result.notes)
    assert result.metric("memory/max_process_bytes/decoder/decode").value > 0


def test_a_peak_below_the_static_bytes_is_no_activation(trace):
    """Weights that are not on the device would give a negative number."""
    trace.steps["peak_bytes"] = 1.0 * GIB
    assert not any("activation" in metric.name for metric in replay.memory(trace).metrics)


def test_unknown_static_bytes(trace):
    model = dataclasses.replace(trace.info.model, static_bytes=None)
    trace.info = dataclasses.replace(trace.info, model=model)
    result = replay.memory(trace)
    assert result.table.empty
    assert not result.findings
    assert "were not recorded" in result.notes[0]


def test_the_timeline_keeps_peaks(trace):
    many = pd.concat([trace.steps] * 40, ignore_index=True)
    many["start_s"] = np.arange(len(many), dtype=float)
    many.loc[17, "peak_bytes"] = 7.0 * GIB
    trace.steps = many
    timeline = replay.memory(trace).tables["timeline"]
    assert len(timeline) == MAX_TIMELINE_POINTS
    assert timeline["peak_bytes"].max() == 7.0 * GIB
    assert timeline["start_s"].is_monotonic_increasing


def test_devices_are_summed_up(trace):
    trace.devices = pd.DataFrame(
        {
            "rank": 0, "time_s": [0.0, 1.0, 2.0], "device": 0,
            "utilization_pct": [10.0, 50.0, np.nan], "memory_used_bytes": [1e9, 3e9, 2e9],
            "power_w": np.nan, "energy_j": [100.0, np.nan, 350.0], "pcie_tx_bytes": np.nan,
            "pcie_rx_bytes": [5.0, 6.0, 9.0],
        }
    )  # fmt: skip
    row = replay.memory(trace).tables["devices"].iloc[0]
    assert row["mean_utilization_pct"] == 30.0
    assert row["max_memory_used_bytes"] == 3e9
    assert row["energy_j"] == 250.0
    assert row["pcie_rx_bytes"] == 4.0
    assert row[["mean_power_w", "pcie_tx_bytes"]].isna().all()


def test_layers_in_order_of_execution(trace):
    table = replay.memory(trace).tables["layers"]
    assert table["phase"].tolist() == ["prefill"] * 4 + ["decode"] * 4
    assert (table["max_activation_peak_bytes"] >= table["mean_activation_peak_bytes"]).all()
