"""Times, memory and the kernel pass: present where they can be, null where they cannot.

No test asserts how long anything takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import recording_models  # noqa: E402
import tiny_models  # noqa: E402
from recording_runs import hook_count, padded_batch, record_run  # noqa: E402

import moeprof  # noqa: E402
from moeprof.recording.kernels import CallShape, classify  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
COMPONENTS = ("gate_ms", "experts_ms", "shared_experts_ms")


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny_models.qwen2_moe()


def test_times_of_layers(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    run = record_run(
        lm, tmp_path / "t.moeprof", lambda: lm.generate(**batch, **GREEDY), probe_every=4
    )
    steps = run.trace.steps.set_index("step")
    assert steps["probed"].tolist() == [True, True, False, False, False, True]
    layers = run.trace.layers.join(steps[["probed", "wall_ms"]], on="step")
    times = [name for name in layers.columns if name.endswith("_ms") and name != "wall_ms"]
    probed = layers[layers["probed"]]
    assert probed[times].isna().all().all()
    assert probed["component_source"].isna().all()
    timed = layers[~layers["probed"]]
    assert (timed["component_source"] == "hook").all()
    assert (timed[["layer_ms", "attention_ms"]] > 0).all().all()
    sparse, dense = timed[timed["site"].notna()], timed[timed["site"].isna()]
    assert (sparse[["moe_ms", *COMPONENTS]] > 0).all().all()
    assert sparse["dense_ffn_ms"].isna().all()
    assert (dense["dense_ffn_ms"] > 0).all()
    assert dense[["moe_ms", *COMPONENTS]].isna().all().all()
    # What its modules hide stays unknown: dispatch and combine happen inside the experts call.
    assert timed[["dispatch_ms", "combine_ms"]].isna().all().all()


def test_parts_lie_inside_what_holds_them(lm: Any, tmp_path: Path) -> None:
    batch = padded_batch([7, 3])
    run = record_run(
        lm, tmp_path / "t.moeprof", lambda: lm.generate(**batch, **GREEDY), probe_every=0
    )
    layers = run.trace.layers
    slack = 1e-3
    sparse = layers[layers["site"].notna()]
    assert (sparse[list(COMPONENTS)].sum(axis=1) <= sparse["moe_ms"] + slack).all()
    inside = layers[["attention_ms", "moe_ms", "dense_ffn_ms"]].sum(axis=1)
    assert (inside <= layers["layer_ms"] + slack).all()
    steps = run.trace.steps.set_index("step")
    named = steps[["embedding_ms", "head_ms", "other_ms"]]
    assert (named > 0).all().all()
    total = named.sum(axis=1) + layers.groupby("step")["layer_ms"].sum()
    assert np.allclose(total, steps["wall_ms"], rtol=1e-3, atol=slack)


def test_times_can_be_left_out(lm: Any, tmp_path: Path) -> None:
    run = record_run(
        lm,
        tmp_path / "t.moeprof",
        lambda: lm.generate(**padded_batch([7, 3]), **GREEDY),
        timing=False,
    )
    assert run.trace.layers["layer_ms"].isna().all()
    assert (run.trace.steps["wall_ms"] > 0).all()


def test_attention_that_holds_experts_is_timed_too(tmp_path: Path) -> None:
    model: Any = tiny_models.jetmoe()
    run = record_run(
        model,
        tmp_path / "t.moeprof",
        lambda: model.generate(**padded_batch([7, 3]), **GREEDY),
        probe_every=0,
    )
    first = run.trace.layers.drop_duplicates(["step", "layer"])
    assert (first["attention_ms"] > 0).all()
    assert run.trace.model.static_bytes.attention > 0


def test_memory_of_a_machine_without_a_device(lm: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    run = record_run(
        lm, tmp_path / "t.moeprof", lambda: lm.generate(**padded_batch([7, 3]), **GREEDY)
    )
    steps = run.trace.steps
    assert (steps["process_bytes"] > 1 << 20).all()
    for name in ("allocated_bytes", "reserved_bytes", "peak_bytes", "device_ms"):
        assert steps[name].isna().all()
    assert run.trace.layers["activation_peak_bytes"].isna().all()
    assert not run.trace.has_table("devices") or run.trace.devices.empty
    assert run.trace.info.hardware.device == "cpu"
    assert run.trace.info.settings["device_meter"]


@pytest.mark.parametrize("name", ["mixtral", "nllb_moe", "dbrx"])
def test_kernels_say_what_the_experts_call_hides(name: str, tmp_path: Path) -> None:
    from moeprof.zoo.dispatch import fix_nllb_dispatch

    builders = {**tiny_models.LMS, **tiny_models.MTS, **recording_models.FAMILIES}
    model: Any = builders[name]()
    fix_nllb_dispatch(model)
    is_mt = name in tiny_models.MTS
    batch = padded_batch([7, 3], side="right" if is_mt else "left", pad=1 if is_mt else 0)
    path = tmp_path / "t.moeprof"

    def generate() -> Any:
        return model.generate(**batch, **{**GREEDY, "max_new_tokens": 4})

    with moeprof.record(model, path) as recorder:
        expected = generate()
        recorder.profile(generate)
        num_steps = recorder._instrument.num_steps
        assert torch.equal(generate(), expected)
    assert hook_count(model) == 0
    trace: Any = moeprof.open(path)
    assert check(trace).ok
    assert len(trace.steps) == 2 * num_steps, "the profiled pass is no step"
    kernels = trace.kernels
    assert (kernels["device_ms"] >= 0).all()
    assert set(kernels["site"]) == {site.site for site in trace.sites}
    phases = ["encode", "prefill", "decode"] if is_mt else ["prefill", "decode"]
    assert set(kernels["phase"]) == set(phases)
    # The middle of the passes, so that one the machine interrupted does not count.
    by_pass = kernels.groupby(["site", "profile_step", "component"])["device_ms"].sum().unstack()
    middle = by_pass.median()
    assert (middle[["dispatch", "experts", "combine"]] > 0).all()
    assert middle["unclassified"] < middle.sum() / 2


def test_profiling_before_recording_is_an_error(lm: Any, tmp_path: Path) -> None:
    from moeprof.errors import MoeprofError

    with (
        pytest.raises(MoeprofError, match="nothing was recorded yet"),
        moeprof.record(lm, tmp_path / "t.moeprof") as recorder,
    ):
        recorder.profile(lambda: None)
    assert hook_count(lm) == 0


CALL = CallShape(num_rows=21, d_model=32, num_experts=8, top_k=2)


@pytest.mark.parametrize(
    ("name", "shapes", "component"),
    [
        ("aten::mm", [(5, 32), (32, 96)], "experts"),
        ("aten::_grouped_mm", [(42, 32), (8, 32, 96), (8,)], "experts"),
        ("aten::silu", [(42, 48)], "experts"),
        ("aten::mul", [(42, 48), (42, 48)], "experts"),
        ("aten::add_", [(42, 32), (42, 32)], "experts"),
        ("aten::index", [(8, 32, 96), (42,)], "experts"),
        ("aten::one_hot", [(21, 2)], "dispatch"),
        ("aten::sort", [(42,)], "dispatch"),
        ("aten::histc", [(42,)], "dispatch"),
        ("aten::clamp_", [(42,)], "dispatch"),
        ("aten::index", [(21, 32), (5,)], "dispatch"),
        ("aten::index_put_", [(42,), (), (42,)], "dispatch"),
        ("aten::softmax", [(21, 2)], "dispatch"),
        ("aten::mul", [(42, 32), (42, 1)], "combine"),
        ("aten::masked_fill_", [(42, 32), (42, 1)], "combine"),
        ("aten::index_add_", [(21, 32), (), (5,)], "combine"),
        ("aten::index_copy_", [(42, 32), (), (42,)], "combine"),
        ("aten::index", [(42, 32), (42,)], "combine"),
        ("aten::sum", [(21, 2, 32)], "combine"),
        ("aten::zeros_like", [(21, 32)], "combine"),
        ("aten::add", [(3, 7, 32), (3, 7, 32)], "combine"),
        ("aten::fft_rfft", [(21, 32)], "unclassified"),
        ("mylib::mm", [(21, 32)], "experts"),
        ("mylib::secret", [], "unclassified"),
    ],
)
def test_classification(name: str, shapes: list[tuple[int, ...]], component: str) -> None:
    assert classify(name, shapes, CALL) == component
