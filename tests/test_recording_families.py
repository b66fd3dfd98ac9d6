"""Families whose MoE layers are built in ways of their own are read as the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import recording_models  # noqa: E402
import tiny_models  # noqa: E402
from recording_runs import Run, hook_count, padded_batch, record_run  # noqa: E402

import moeprof  # noqa: E402
from moeprof.recording.sites import find_sites  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}


@pytest.mark.parametrize("name", list(recording_models.FAMILIES))
def test_family(name: str, tmp_path: Path) -> None:
    model: Any = recording_models.FAMILIES[name]()
    batch = padded_batch([7, 3, 5])
    expected = model.generate(**batch, **GREEDY)
    run = record_run(model, tmp_path / "t.moeprof", lambda: model.generate(**batch, **GREEDY))
    assert torch.equal(run.result, expected)
    assert hook_count(model) == 0
    assert run.phases == ["prefill", "decode", "decode"]
    assert run.trace.steps["num_tokens"].tolist() == [15, 3, 3]
    capture = run.trace.info.capture
    assert capture.num_executed_checked == 2 * len(run.trace.sites)
    _check_geometry(run, model)


def _check_geometry(run: Run, model: Any) -> None:
    trace = run.trace
    static = trace.model.static_bytes
    assert static is not None
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert static.total == sum(t.numel() * t.element_size() for t in tensors.values())
    for part in ("embedding", "attention", "experts", "router"):
        assert getattr(static, part) > 0, part
    for site in trace.sites:
        assert site.d_model == 32
        width = site.matrices_per_expert * site.d_model * site.d_ff * 4
        assert site.expert_bytes == width
    if all(site.adapter != "jetmoe_gating" for site in trace.sites):
        # JetMoE's block keeps an output bias beside its experts.
        ids = {site.num_experts for site in trace.sites}
        if ids != {12}:
            total = sum(site.expert_bytes * site.num_experts for site in trace.sites)
            assert static.experts == total


def test_attention_experts_come_before_feed_forward_ones(tmp_path: Path) -> None:
    sites = find_sites(tiny_models.jetmoe())
    assert [(site.layer, site.kind) for site in sites] == [
        (layer, kind) for layer in range(3) for kind in ("attention", "ffn")
    ]


def test_experts_that_compute_nothing_show_no_execution(tmp_path: Path) -> None:
    model: Any = recording_models.longcat()
    run = record_run(
        model, tmp_path / "t.moeprof", lambda: model.generate(**padded_batch([7, 7]), **GREEDY)
    )
    executed = run.trace.executed
    empty = executed["expert"] >= 8
    assert executed[empty]["num_executed_rows"].isna().all()
    assert executed[empty]["num_routed_rows"].sum() > 0
    seen = executed[~empty]
    assert (seen["num_executed_rows"] == seen["num_routed_rows"]).all()


def test_every_expert_runs_where_the_architecture_says_so(tmp_path: Path) -> None:
    model: Any = recording_models.llama4()
    run = record_run(
        model, tmp_path / "t.moeprof", lambda: model.generate(**padded_batch([7, 7]), **GREEDY)
    )
    assert all(site.runs_all_experts for site in run.trace.sites)
    prefill = run.trace.executed[run.trace.executed["step"] == 0]
    assert (prefill["num_executed_rows"] == 14).all()
    assert prefill.groupby("site")["num_routed_rows"].sum().tolist() == [28] * 2


def test_geometry_of_special_cases() -> None:
    def first(name: str) -> Any:
        model = recording_models.FAMILIES[name]()
        from moeprof.recording.sites import geometry

        return geometry(model, find_sites(model), {0: 2, 1: 2, 2: 2, 3: 2})[0]

    assert first("ernie").selection_bias is not None
    assert first("granite_moe_shared").num_shared_experts == 1
    assert first("granite_moe_shared").shared_expert_bytes == 3 * 32 * 16 * 4
    assert (first("dbrx").matrices_per_expert, first("dbrx").d_ff) == (3, 24)
    assert (first("longcat").num_experts, first("longcat").d_ff) == (12, 16)


def _kept_input(model: Any, module: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    kept: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append((args, dict(kwargs))), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    return kept[0]


def _rows_changed(module: Any, call: tuple[Any, Any], weight: Any) -> Any:
    def run() -> Any:
        with torch.no_grad():
            out = module(*call[0], **call[1])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(-1, out.shape[-1]).double().numpy()

    before = run()
    weight.mul_(1.5)
    after = run()
    weight.div_(1.5)
    return np.abs(after - before).max(axis=1) > 1e-6 * np.abs(before).max()


Place = tuple[Any, Any]
"""A module, and the parameter that stacks what its experts put out."""


def _jetmoe(model: Any) -> Iterator[Place]:
    for layer in model.model.layers:
        yield layer.self_attention, layer.self_attention.experts.output_linear.weight
        yield layer.mlp, layer.mlp.output_linear.weight


def _aria(model: Any) -> Iterator[Place]:
    for layer in model.model.layers:
        yield layer.mlp, layer.mlp.experts.fc2.weight


def _llama4(model: Any) -> Iterator[Place]:
    for layer in model.model.layers:
        if layer.is_moe_layer:
            yield layer.feed_forward, layer.feed_forward.experts.down_proj


@pytest.mark.parametrize(
    ("name", "places"), [("jetmoe", _jetmoe), ("aria", _aria), ("llama4", _llama4)]
)
def test_changing_an_expert_changes_the_tokens_recorded_for_it(
    name: str, places: Callable[[Any], Iterator[Place]], tmp_path: Path
) -> None:
    model: Any = recording_models.FAMILIES[name]()
    batch = padded_batch([7, 7, 7])
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder, torch.no_grad():
        model(**batch, use_cache=False)
    trace: Any = moeprof.open(recorder.path)
    routing = trace.routing(columns=["row", "site", "expert"])
    for site, (module, weight) in enumerate(places(model)):
        call = _kept_input(model, module, batch)
        mine = routing[routing["site"] == site]
        for expert in range(trace.sites[site].num_experts):
            changed = _rows_changed(module, call, weight.data[expert])
            recorded = np.zeros(21, dtype=bool)
            recorded[mine[mine["expert"] == expert]["row"]] = True
            assert np.array_equal(changed, recorded), f"site {site}, expert {expert}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    model: Any = tiny_models.deepseek_v3().to(getattr(torch, dtype))
    batch = padded_batch([7, 3])
    run = record_run(
        model, tmp_path / "t.moeprof", lambda: model.generate(**batch, **GREEDY), scores=True
    )
    assert run.trace.model.dtype == dtype
    assert {site.scoring for site in run.trace.sites} == {"sigmoid"}


def test_weights_offloaded_to_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model: Any = tiny_models.qwen2_moe()
    batch = padded_batch([7, 3])
    expected = model.generate(**batch, **GREEDY)
    whole = record_run(model, tmp_path / "a.moeprof", lambda: model.generate(**batch, **GREEDY))
    accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    run = record_run(model, tmp_path / "b.moeprof", lambda: model.generate(**batch, **GREEDY))
    assert torch.equal(run.result, expected)
    assert run.trace.sites == whole.trace.sites
    assert run.trace.model.static_bytes == whole.trace.model.static_bytes
    assert run.trace.info.capture == whole.trace.info.capture
