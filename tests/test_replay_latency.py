"""Times: unknown is not zero, remainders are shown, kernels split what modules hide."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from replay_tools import mark_trained

from moeprof import replay
from moeprof.replay.breakdown import COMPONENTS
from moeprof.replay.stalls import stalled
from moeprof.trace.synthetic import synthetic_trace

COLUMNS = (
    "attention_ms", "dense_ffn_ms", "moe_ms", "gate_ms", "dispatch_ms", "experts_ms",
    "combine_ms", "shared_experts_ms",
)  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    found = mark_trained(
        synthetic_trace(tmp_path / "t.moeprof", num_requests=24, num_sites=2, batch=4, seed=1)
    )
    steps, layers = found.steps.copy(), found.layers.copy()
    steps[["wall_ms", "embedding_ms", "head_ms"]] = 10.0, 1.0, 2.0
    layers[list(COLUMNS)] = np.nan
    for column, value in {
        "attention_ms": 1.0, "moe_ms": 2.0, "gate_ms": 0.25, "experts_ms": 1.5,
    }.items():  # fmt: skip
        layers[column] = value
    found.steps, found.layers = steps, layers
    return found


def shares(result, phase="decode"):
    rows = result.table[result.table["phase"] == phase]
    return dict(zip(rows["component"], rows["share"], strict=True))


def test_components_and_their_remainder(trace):
    result = replay.latency(trace)
    found = shares(result)
    assert found == pytest.approx(
        {
            "embedding": 0.1,
            "attention": 0.2,
            "gate": 0.05,
            "experts": 0.3,
            "moe_rest": 0.05,
            "head": 0.2,
            "other": 0.1,
        }
    )
    assert list(found) == [name for name in COMPONENTS if name in found]
    moe = result.metric("latency/moe_share/decoder/decode")
    assert (moe.value, moe.low, moe.high) == pytest.approx((0.4, 0.4, 0.4))
    assert moe.figure_class == "measured"
    notes = " ".join(result.notes)
    assert "no module shows dispatch, combine" in notes
    assert "unknown, not zero" in notes


def test_unknown_components_are_absent(trace):
    trace.layers["gate_ms"] = np.nan
    trace.layers["experts_ms"] = np.nan
    result = replay.latency(trace)
    found = shares(result)
    assert "gate" not in found
    assert found["moe_block"] == pytest.approx(0.4)
    assert result.metric("latency/moe_share/decoder/decode").value == pytest.approx(0.4)

    trace.layers["moe_ms"] = np.nan
    result = replay.latency(trace)
    assert shares(result)["other"] == pytest.approx(0.5)
    with pytest.raises(KeyError):
        result.metric("latency/moe_share/decoder/decode")


def test_kernels_split_the_experts_module(trace):
    rows = [
        ("experts", "dispatch", 1.0), ("experts", "experts", 2.0), ("experts", "combine", 0.5),
        ("experts", "unclassified", 0.5), ("block", "unclassified", 1.0),
        ("block", "combine", 3.0),
    ]  # fmt: skip
    trace.kernels = pd.DataFrame(
        {
            "profile_step": 0, "stack": "decoder", "phase": "decode", "region": region,
            "component": component, "device_ms": ms, "num_kernels": 1,
        }
        for region, component, ms in rows
    )  # fmt: skip
    trace.has_table = lambda name: True
    result = replay.latency(trace)
    found = shares(result)
    assert found["dispatch"] == pytest.approx(0.3 / 4)
    assert found["experts"] == pytest.approx(0.3 / 2)
    assert found["combine"] == pytest.approx(0.3 / 8 + 0.05 * 0.75)
    assert found["unclassified"] == pytest.approx(0.3 / 8)
    assert found["moe_rest"] == pytest.approx(0.05 * 0.25)
    assert sum(found.values()) == pytest.approx(1)
    classes = result.table[result.table["phase"] == "decode"].set_index("component")
    assert classes.loc["experts", "figure_class"] == "estimate"
    assert classes.loc["gate", "figure_class"] == "measured"
    assert "dispatch" not in shares(result, "prefill")
    kernels = result.tables["kernels"].set_index(["region", "component"])
    assert kernels.loc[("experts", "experts"), "region_share"] == pytest.approx(0.5)
    assert (kernels["num_profiled_steps"] == 1).all()


def test_a_block_no_module_splits_is_split_by_its_kernels(trace):
    trace.layers["experts_ms"] = np.nan
    trace.kernels = pd.DataFrame(
        {
            "profile_step": 0, "stack": "decoder", "phase": "decode", "region": "block",
            "component": component, "device_ms": ms, "num_kernels": 1,
        }
        for component, ms in (("experts", 3.0), ("unclassified", 1.0))
    )  # fmt: skip
    trace.has_table = lambda name: True
    found = shares(replay.latency(trace))
    assert found["experts"] == pytest.approx(0.35 * 0.75)
    assert found["moe_rest"] == pytest.approx(0.35 * 0.25)
    assert "moe_block" not in found


def test_watched_steps_do_not_count_as_time(trace):
    decode = trace.steps.index[trace.steps["phase"] == "decode"][:5]
    trace.steps.loc[decode, "probed"] = True
    trace.steps.loc[decode, "wall_ms"] = 1e6
    result = replay.latency(trace)
    assert result.metric("latency/host_p95_ms/decoder/decode").value == 10.0
    assert any(note.startswith("5 of ") for note in result.notes)


def test_steps_without_component_times_are_said(trace):
    first = trace.steps.loc[trace.steps["phase"] == "decode", "step"].iloc[0]
    trace.layers.loc[trace.layers["step"] == first, list(COLUMNS)] = np.nan
    result = replay.latency(trace)
    assert shares(result)["attention"] == pytest.approx(0.2)
    assert any("component times of" in note for note in result.notes)


def test_device_time_is_preferred(trace):
    trace.steps["device_ms"] = 20.0
    result = replay.latency(trace)
    assert set(result.table["clock"]) == {"device"}
    assert shares(result)["attention"] == pytest.approx(0.1)
    assert result.metric("latency/device_p50_ms/decoder/decode").value == 20.0
    assert result.metric("latency/host_p50_ms/decoder/decode").value == 10.0


def test_throughput_is_tokens_over_time(trace):
    result = replay.latency(trace)
    decode = trace.steps[trace.steps["phase"] == "decode"]
    expected = 1000 * decode["num_tokens"].sum() / decode["wall_ms"].sum()
    found = result.metric("latency/host_tokens_per_s/decoder/decode")
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_overlong_components_are_said(trace):
    trace.steps["wall_ms"] = 4.0
    assert any("components add up to" in note for note in replay.latency(trace).notes)


def test_stalled_steps_are_told_apart(trace):
    decode = trace.steps.index[trace.steps["phase"] == "decode"]
    stalls = decode[:6]
    trace.steps.loc[stalls, "wall_ms"] = 110.0
    in_stall = trace.layers["step"].isin(trace.steps.loc[stalls, "step"])
    trace.layers.loc[in_stall, "attention_ms"] = 51.0
    result = replay.latency(trace)
    assert shares(result)["attention"] == pytest.approx(0.2)
    stalled = result.metric("latency/stalled_share/decoder/decode")
    expected = 6 * 110 / (6 * 110 + 10 * (len(decode) - 6))
    assert stalled.value == pytest.approx(expected)
    assert stalled.low < stalled.value < stalled.high
    assert result.metric("latency/stalled_share/decoder/prefill").value == 0
    finding = next(f for f in result.findings if f.metric == stalled.name)
    assert f"6 of {len(decode)} steps took over 3 times" in finding.text
    assert "mostly in attention" in finding.text
    assert any("medians and tokens per second do not" in note for note in result.notes)


def test_long_prompts_are_no_stalls():
    total, rows = np.array([10.0, 11, 12, 100, 100]), np.array([10.0, 10, 12, 100, 12])
    assert stalled(total, rows).tolist() == [False, False, False, False, True]


def test_no_times_at_all(trace):
    trace.layers[list(COLUMNS)] = np.nan
    trace.steps["wall_ms"] = np.nan
    result = replay.latency(trace)
    assert result.table.empty
    assert result.metrics == ()
    assert "unknown is not zero" in result.notes[0]


def test_heavy_blocks_are_a_cost(trace):
    trace.steps["wall_ms"] = 20.0
    trace.layers["attention_ms"] = 0.5
    trace.layers["experts_ms"] = 7.5
    trace.layers["moe_ms"] = 8.0
    (finding,) = replay.latency(trace).findings
    assert "80.0%" in finding.text
    assert "5.00 times as fast" in finding.text
