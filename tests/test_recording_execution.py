"""Rows executed are counted beside rows routed, and a model whose two disagree is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from recording_runs import padded_batch, record_run  # noqa: E402

import moeprof  # noqa: E402
from moeprof.recording.summary import recording_lines  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402
from moeprof.zoo.dispatch import fix_nllb_dispatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_executed_rows_are_routed_rows_padding_included(
    name: str, implementation: str, tmp_path: Path
) -> None:
    model: Any = tiny_models.LMS[name]()
    model.set_experts_implementation(implementation)
    batch = padded_batch([7, 3])
    run = record_run(
        model, tmp_path / "t.moeprof", lambda: model.generate(**batch, **GREEDY), probe_every=1
    )
    executed = run.trace.executed
    assert (executed["num_executed_rows"] == executed["num_routed_rows"]).all()
    totals = executed.groupby(["step", "site"])["num_routed_rows"].sum()
    top_k = run.trace.sites[0].top_k
    assert totals.loc[0].tolist() == [14 * top_k] * len(run.trace.sites)
    assert totals.loc[1].tolist() == [2 * top_k] * len(run.trace.sites)
    assert run.trace.info.kernels == {"prefill": implementation, "decode": implementation}


def test_steps_that_are_not_probed_show_no_fused_execution(tmp_path: Path) -> None:
    model: Any = tiny_models.mixtral()
    batch = padded_batch([7, 3])

    def run_it() -> None:
        model.generate(**batch, **{**GREEDY, "max_new_tokens": 6})

    run = record_run(model, tmp_path / "t.moeprof", run_it, probe_every=2)
    probed = run.trace.steps[run.trace.steps["probed"]]["step"]
    assert probed.tolist() == [0, 1, 3, 5]
    assert sorted(run.trace.executed["step"].unique()) == probed.tolist()
    never = record_run(model, tmp_path / "n.moeprof", run_it, probe_every=0)
    assert never.trace.executed.empty
    assert never.trace.info.capture.num_executed_checked == 0
    assert any("could not be seen" in line for line in recording_lines(never.trace.path))


def _record_nllb(model: Any, path: Path, **options: Any) -> Any:
    batch = padded_batch([6, 2, 4], side="right", pad=1)
    with moeprof.record(model, path, **options) as recorder:
        model.generate(**batch, **GREEDY)
    return moeprof.open(recorder.path)


def test_nllb_runs_two_experts_whatever_its_router_says(tmp_path: Path) -> None:
    """The fault of transformers 5.17 to 5.23 is noticed, said and marked."""
    model: Any = tiny_models.nllb_moe()
    trace = _record_nllb(model, tmp_path / "t.moeprof")
    capture = trace.info.capture
    assert capture.num_executed_checked == capture.num_executed_disagreeing == 8
    assert "2 ran (experts 0, 1)" in capture.execution_note
    assert any("disagree" in note for note in trace.info.notes)
    by_expert = trace.executed.groupby("expert")[["num_routed_rows", "num_executed_rows"]].sum()
    assert (by_expert["num_routed_rows"] > 0).sum() > 2
    assert by_expert.index[by_expert["num_executed_rows"] > 0].tolist() == [0, 1]
    [line] = [line for line in recording_lines(trace.path) if line.startswith("execution")]
    assert "DISAGREES" in line
    result = check(trace)
    assert not result.ok
    assert result.codes >= {"executed_disagrees"}


def test_a_fixed_nllb_agrees_on_every_step(tmp_path: Path) -> None:
    model: Any = tiny_models.nllb_moe()
    fix_nllb_dispatch(model)
    trace = _record_nllb(model, tmp_path / "t.moeprof", fixes=("nllb-dispatch",))
    capture = trace.info.capture
    # Experts that are modules of their own are counted in steps that are not probed, too.
    assert capture.num_executed_checked == 8
    assert capture.num_executed_disagreeing == 0
    assert capture.execution_note is None
    assert trace.model.fixes == ("nllb-dispatch",)
    assert check(trace).ok
    [line] = [line for line in recording_lines(trace.path) if line.startswith("execution")]
    assert "equal rows routed in all 8" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nllb_drops_are_seen(dtype: str, tmp_path: Path) -> None:
    model: Any = tiny_models.nllb_moe(moe_eval_capacity_token_fraction=0.15)
    model = model.to(getattr(torch, dtype))
    fix_nllb_dispatch(model)
    trace = _record_nllb(model, tmp_path / "t.moeprof")
    layers = trace.layers[trace.layers["site"].notna()]
    encoder = layers[layers["stack"] == "encoder"]
    assert (encoder["capacity"] == 4).all()  # 0.15 x 21 rows, rounded up
    assert encoder["num_dropped"].sum() > 0
    assert trace.sites[0].capacity_rule.value == 0.15
    executed = trace.executed.set_index(["step", "site", "expert"])["num_executed_rows"]
    assert executed.loc[0].max() <= 4
    assert check(trace).ok
