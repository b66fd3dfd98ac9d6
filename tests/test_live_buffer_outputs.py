"""Outputs of experts that ran on the host: rounding is allowed for, a wrong expert is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import moeprof  # noqa: E402
from analysis.gpu import buffering_live  # noqa: E402
from analysis.gpu.buffering_bench import by_device, failed_checks  # noqa: E402
from analysis.gpu.buffering_outputs import (  # noqa: E402
    compared,
    noticed,
    row_errors,
    tolerance,
    wrong_layers,
    wrong_on_host,
)
from moeprof.live.buffer_settings import BufferSettings  # noqa: E402
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.expert_store import ExpertStore  # noqa: E402
from moeprof.live.experts import ExpertWeights  # noqa: E402
from moeprof.live.routed_runs import (  # noqa: E402
    ExpertGeometry,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.live.setting_runs import geometry_of, open_stack  # noqa: E402
from moeprof.live.source_digest import source_digest  # noqa: E402
from moeprof.trace.reader import open_trace  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 48
DEEP = ExpertGeometry(d_model=256, d_ff=96)


class Deep:
    """48 layers in bfloat16 and what they put out with all experts in one place."""

    def __init__(self, folder: Path) -> None:
        self.trace = synthetic_trace(
            folder / "deep.moeprof", num_requests=1, num_sites=NUM_LAYERS, num_experts=16, top_k=6,
            batch=1, prompt_tokens=6, output_tokens=6, seed=0,
        )  # fmt: skip
        self.sites = random_sites(self.trace, DEEP, stack="decoder")
        self.steps = routed_steps(self.trace, stack="decoder", device="cpu", dtype=DEEP.dtype)
        self.hidden = starting_rows(self.steps, DEEP, "cpu")
        self.expected = self.outputs(self.buffer(capacity=None))

    def buffer(self, sites: Any = None, **options: Any) -> ExpertBuffer:
        settings = BufferSettings(future=self.trace, **options)
        return ExpertBuffer(sites or self.sites, settings, device="cpu")

    def outputs(self, buffer: ExpertBuffer, follow: Any = None) -> list[Any]:
        results = run_steps(buffer, self.steps, self.hidden, keep_outputs=True, follow=follow)
        return [out for result in results for out in result.outputs]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep(tmp_path_factory.mktemp("deep"))


class RoundsLess(ExpertWeights):
    """Experts that keep single precision inside, as a processor with other kernels might."""

    def run(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(rows.float(), self.w_in[expert].float())
        return F.linear(self.activate(hidden), self.w_out[expert].float()).to(rows.dtype)


class OtherHost(ExpertStore):
    """Rounds otherwise where the host computes."""

    def weights(self, expert: int) -> ExpertWeights:
        fields = dataclasses.fields(ExpertWeights)
        right = super().weights(expert)
        return RoundsLess(**{field.name: getattr(right, field.name) for field in fields})


def rounding_otherwise(sites: Sequence[Any]) -> list[Any]:
    return [
        dataclasses.replace(
            site,
            store=OtherHost(**{
                field.name: getattr(site.store, field.name)
                for field in dataclasses.fields(site.store)
            }),
        )
        for site in sites
    ]  # fmt: skip


@pytest.mark.parametrize(("policy", "miss"), [("pinned", "host"), ("lru", "split")])
def test_rounding_adds_up_along_layers_but_not_where_inputs_are_given(
    deep: Deep, policy: str, miss: str
) -> None:
    options = {"capacity": 4, "policy": policy, "miss": miss}
    sites = rounding_otherwise(deep.sites)
    chained = compared(deep.outputs(deep.buffer(sites, **options)), deep.expected, DEEP)
    given = compared(
        deep.outputs(deep.buffer(sites, **options), follow=deep.expected), deep.expected, DEEP
    )
    assert given["holds"] and 0 < given["worst_row"] <= given["tolerance"]
    assert not chained["holds"]
    assert chained["worst_row"] > 3 * given["worst_row"]


@pytest.mark.parametrize(("policy", "miss"), [("pinned", "host"), ("lru", "split")])
def test_a_wrong_expert_on_the_host_is_noticed_in_every_dispatch(
    deep: Deep, policy: str, miss: str
) -> None:
    sites = wrong_on_host(deep.sites)
    buffer = deep.buffer(sites, capacity=4, policy=policy, miss=miss)
    outputs = deep.outputs(buffer, follow=deep.expected)
    log = buffer.lookups()
    found = noticed(outputs, deep.expected, deep.steps, sites, log, DEEP)
    on_host = log[log["on_host"]]
    assert found["dispatches"] == len(on_host.groupby(["step", "site"])) > 20
    assert found["dispatches_noticed"] == found["dispatches"]
    assert found["tokens_noticed"] == found["tokens"] >= found["dispatches"]
    assert not found["comparison_holds"]
    # Copies are of the right experts: only the host was wrong.
    assert buffer.audit() == []
    right = deep.buffer(sites, capacity=4, policy=policy)
    assert all(map(torch.equal, deep.outputs(right), deep.expected))


def test_experts_of_another_layer_are_noticed_where_layers_share_a_host_copy(deep: Deep) -> None:
    shared = random_sites(deep.trace, DEEP, stack="decoder", share_host=True)
    expected = deep.outputs(deep.buffer(shared, capacity=None))
    sites = wrong_layers(shared)
    assert sites is not None
    found = deep.outputs(deep.buffer(sites, capacity=4), follow=expected)
    assert not any(map(torch.equal, found, expected))
    assert wrong_layers(shared[:1]) is None


def test_following_gives_every_dispatch_the_other_run_s_input(deep: Deep) -> None:
    buffer = deep.buffer(capacity=4)
    assert all(map(torch.equal, deep.outputs(buffer, follow=deep.expected), deep.expected))
    # Followed to zeros, every dispatch of a step is given the rows that the step starts with.
    zeros = [torch.zeros_like(out) for out in deep.expected]
    found = iter(deep.outputs(deep.buffer(capacity=None), follow=zeros))
    whole = deep.buffer(capacity=None)
    for step in deep.steps:
        whole.begin_step(step.step)
        rows = F.rms_norm(deep.hidden[: step.num_tokens], (DEEP.d_model,))
        for each in step.passes:
            out = whole.run(each.site, rows, each.ids, each.weights)
            assert torch.equal(out, next(found))


def test_errors_are_relative_to_each_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1e-9], [1.0, 0.0]])
    assert row_errors(found, expected).tolist() == pytest.approx([0.1, 0.0, np.inf, 0.0])


def test_the_tolerance_follows_the_dtype_and_the_kind_of_expert() -> None:
    plain = dataclasses.replace(DEEP, gated=False, activation="relu")
    assert tolerance(DEEP) == pytest.approx(2**-8 * np.sqrt(18) + 256 * 2**-24)
    assert tolerance(plain) == pytest.approx(2**-8 * np.sqrt(10) + 256 * 2**-24)
    assert tolerance(dataclasses.replace(plain, bias=True)) > tolerance(plain)
    single = dataclasses.replace(DEEP, dtype=torch.float32)
    assert tolerance(single) < 1e-3 * tolerance(DEEP)


def test_the_zoo_s_own_experts_are_within_rounding_too() -> None:
    stack = open_stack(open_trace("sample:lm"), stack="decoder", device="cpu", max_steps=3)
    assert stack.weights_source == "weights of zoo:lm"

    def outputs(sites: Any, follow: Any = None, **options: Any) -> list[Any]:
        buffer = ExpertBuffer(sites, BufferSettings(**options), device="cpu")
        results = run_steps(buffer, stack.steps, stack.hidden, keep_outputs=True, follow=follow)
        return [out for result in results for out in result.outputs]

    expected = outputs(stack.sites, capacity=None)
    geometry = geometry_of(stack.shape)
    given = {"capacity": 8, "miss": "host", "follow": expected}
    right = compared(outputs(rounding_otherwise(stack.sites), **given), expected, geometry)
    assert right["holds"] and right["worst_row"] > 0
    wrong = compared(outputs(wrong_on_host(stack.sites), **given), expected, geometry)
    assert not wrong["holds"]


def test_a_folders_own_result_keeps_its_studies(tmp_path: Path) -> None:
    kept = tmp_path / "buffering_live.json"
    kept.write_text(json.dumps({"studies": {"other": {}, "zoo-lm": {}, "qwen3-30b-a3b": {}}}))
    same = tmp_path / ".." / tmp_path.name / kept.name
    buffering_live.main([
        "--tiny", "--max-steps", "4", "--repetitions", "1", "--seconds", "0.01", "--studies",
        "mt-decoder", "--out", str(tmp_path), "--into", str(same),
    ])  # fmt: skip
    studies = json.loads(kept.read_text())["studies"]
    assert list(studies) == ["qwen3-30b-a3b", "mt-decoder", "zoo-lm", "other"]
    assert studies["mt-decoder"]["settings"] and not studies["zoo-lm"]


def test_devices_of_the_replay_are_added_up(tmp_path: Path) -> None:
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=3, num_experts=8, seed=0)
    predicted = moeprof.replay.buffering(
        trace, policies=["lru"], capacities=[1], semantics="sequential", devices=4, jobs=1
    )
    lookups = predicted.lookups("lru", 1)
    found = by_device(lookups, 4)
    for device in range(4):
        own = lookups[lookups["device"] == device]
        assert found["misses"][device] == (~own["hit"]).sum()
    assert found["total_misses"] == sum(found["misses"]) <= found["total_lookups"] == len(lookups)
    assert by_device(lookups[lookups["device"] == 1], 4)["lookups"][0] == 0


def test_studies_of_several_runs_end_in_one_file(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"studies": {"other": {"date": "before"}, "zoo-lm": {"date": "x"}}}))
    common = ["--tiny", "--max-steps", "8", "--repetitions", "1", "--seconds", "0.01"]
    out = tmp_path / "out"
    buffering_live.main([
        *common, "--studies", "zoo-lm,mt-decoder", "--out", str(out), "--into", str(kept),
        "--beside", "tests",
    ])  # fmt: skip
    own = json.loads((out / "buffering_live.json").read_text())["studies"]
    assert list(own) == ["zoo-lm", "mt-decoder"]
    merged = json.loads(kept.read_text())["studies"]
    assert merged == {"other": {"date": "before"}, **own}
    for study in own.values():
        assert study["beside"] == "tests" and study["tiny"] is True
        assert str(tmp_path) not in study["command"]
        assert "--out DIR --into FILE" in study["command"]
        assert {"date", "hardware", "versions"} <= set(study)
        assert study["source_sha256"] == source_digest(Path(moeprof.__file__).parent)
        assert len(study["settings"]) == 1 and study["left_out_for_time"]
    assert own["zoo-lm"]["weights_source"] == "weights of zoo:lm"
    assert own["zoo-lm"]["geometry"]["dtype"] == "torch.float16"
    mt = own["mt-decoder"]
    assert mt["routing_source"]["trace"] == "sample:twin-mt"
    assert (mt["routing_source"]["devices"], mt["experts_per_layer_here"]) == (8, 16)
    (row,) = mt["settings"]
    assert (row["policy"], row["capacity"]) == ("paper", 10)
    assert row["replay_by_device"]["misses"][0] == row["misses"]
    assert len(row["replay_by_device"]["misses"]) == 8


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give --trace"),
        (["--studies", "qwen3-30b-a3b"], "give --trace"),
        (["--studies", "mt-decoder,qwen3-30b-a3b"], "give --trace"),
        (["--studies", "lm"], "lm; one of: qwen3-30b-a3b, mt-decoder, zoo-lm"),
    ],
)
def test_studies_that_cannot_be_run_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    with pytest.raises(SystemExit):
        buffering_live.main(arguments)
    assert error in capsys.readouterr().err


def test_full_sizes_are_the_paper_s_and_fit_their_time() -> None:
    every = {
        study.name: study
        for study in buffering_live.studies(buffering_live.parser().parse_args(["--trace", "q"]))
    }
    assert list(every) == list(buffering_live.STUDIES)
    mt = every["mt-decoder"]
    assert mt.geometry is not None
    assert mt.geometry.block_shape.shapes["w_in"] == (8192, 2048)
    assert mt.capacities == (10, 1) and (mt.devices, mt.device) == (8, 0)
    assert mt.seconds + every["zoo-lm"].seconds <= 60
    shorter = buffering_live.parser().parse_args(["--seconds", "3", "--studies", "zoo-lm"])
    assert [study.seconds for study in buffering_live.studies(shorter)] == [3]


def test_a_control_that_does_not_fail_is_a_failure() -> None:
    row = {
        "policy": "lru", "capacity": 8, "miss": "host", "outputs_hold": True,
        "lookups_equal_replay": True, "slots_broken": 0, "allocations_in_steady_state": 0,
        "requested_as_predicted": None,
        "wrong_expert_on_host": {"dispatches": 4, "comparison_holds": False},
    }  # fmt: skip
    study: dict[str, Any] = {"settings": [row], "wrong_slot_map": None}
    assert failed_checks(study) == []
    row["wrong_expert_on_host"] = {"dispatches": 4, "comparison_holds": True}
    assert failed_checks(study) == ["lru 8 host: wrong experts on the host were not noticed"]
