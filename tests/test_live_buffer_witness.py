"""Witnesses of copies: a profile written out by hand, a meter that counts, the whole script."""

from __future__ import annotations

import functools
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from moeprof.live.buffer_settings import BufferSettings  # noqa: E402
from moeprof.live.copy_witness import (  # noqa: E402
    StepCopies,
    copies_by_step,
    overlapped_share,
    profiled,
    step_range,
    watched_link,
)
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.routed_runs import (  # noqa: E402
    ExpertGeometry,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.recording.devices import Device, DeviceSample, NullMeter  # noqa: E402
from moeprof.replay.buffer_plans import plan_buffer, read_routed_rows  # noqa: E402
from moeprof.replay.serving_settings import BufferingSetting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 1 << 20


def event(name: str, category: str, begun: float, length: float, **arguments: Any) -> Any:
    return {
        "ph": "X", "name": name, "cat": category, "ts": begun, "dur": length, "args": arguments,
    }  # fmt: skip


def copy(correlation: int, asked: float, ran: float, num_bytes: int, kind: str = "HtoD") -> Any:
    return [
        event("cudaMemcpyAsync", "cuda_runtime", asked, 2, correlation=correlation),
        event(
            f"Memcpy {kind} (Pinned -> Device)", "gpu_memcpy", ran, 50,
            correlation=correlation, bytes=num_bytes,
        ),
    ]  # fmt: skip


def test_copies_belong_to_the_step_that_asked() -> None:
    profile = {
        "traceEvents": [
            event("moeprof step 7", "user_annotation", 0, 100),
            event("moeprof step 8", "user_annotation", 100, 100),
            event("moeprof step 8", "gpu_user_annotation", 150, 100),
            event("moeprof step 9", "user_annotation", 200, 100),
            *copy(1, 10, 20, BLOCK),
            *copy(2, 90, 130, BLOCK),
            *copy(3, 120, 230, 2 * BLOCK),
            *copy(4, 125, 126, 512),
            *copy(5, 130, 131, BLOCK, kind="DtoH"),
            *copy(6, 310, 320, BLOCK),
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert copies_by_step(profile, least_bytes=BLOCK) == [
        StepCopies(step=7, copies=2, num_bytes=2 * BLOCK),
        StepCopies(step=8, copies=1, num_bytes=2 * BLOCK),
        StepCopies(step=9, copies=0, num_bytes=0),
    ]


def unseen(correlation: int, ran: float, num_bytes: int) -> Any:
    """A copy that the driver was asked for past the profiler."""
    return copy(correlation, 0, ran, num_bytes)[1]


def test_a_copy_that_nobody_saw_asked_for_belongs_to_where_it_ran() -> None:
    profile = {
        "traceEvents": [
            event("moeprof step 3", "user_annotation", 100, 100),
            event("moeprof step 4", "user_annotation", 300, 100),
            unseen(1, 120, BLOCK),
            # It ends in no step, and began in one.
            unseen(2, 190, BLOCK),
            unseen(3, 310, 2 * BLOCK),
            unseen(4, 320, 512),
            # Before, between and behind the steps.
            unseen(5, 50, BLOCK),
            unseen(6, 250, BLOCK),
            unseen(7, 450, BLOCK),
            # Asked for in step 3 and run in step 4; asked for between the steps.
            *copy(8, 195, 305, BLOCK),
            *copy(9, 290, 330, BLOCK),
            # What computed says nothing of copies.
            event("cuLaunchKernel", "cuda_driver", 150, 2, correlation=10),
            event("gemm", "kernel", 160, 20, correlation=10),
        ]
    }
    assert copies_by_step(profile, least_bytes=BLOCK) == [
        StepCopies(step=3, copies=3, num_bytes=3 * BLOCK),
        StepCopies(step=4, copies=1, num_bytes=2 * BLOCK),
    ]


def test_the_driver_is_seen_asking_too() -> None:
    asked, ran = copy(1, 150, 210, BLOCK)
    driver = event("cuMemcpyHtoDAsync_v2", "cuda_driver", 150, 2, correlation=1)
    steps = [
        event("moeprof step 0", "user_annotation", 100, 100),
        event("moeprof step 1", "user_annotation", 200, 100),
    ]
    for asking, step in ((asked, 0), (driver, 0), (None, 1)):
        # Events come in any order.
        events = [ran, *steps, *([] if asking is None else [asking])]
        found = copies_by_step({"traceEvents": events}, least_bytes=BLOCK)
        assert [each.step for each in found if each.copies] == [step]


def test_the_share_of_copies_behind_kernels() -> None:
    profile = {
        "traceEvents": [
            *copy(1, 0, 10, BLOCK),  # runs from 10 to 60
            *copy(2, 0, 100, BLOCK),  # runs from 100 to 150
            *copy(3, 0, 300, 64),
            event("gemm", "kernel", 0, 20),
            event("gemm", "kernel", 15, 15),
            event("gemm", "kernel", 40, 5),
            event("gemm", "kernel", 145, 100),
        ]
    }
    # 10 to 30, 40 to 45 and 145 to 150, of 100.
    assert overlapped_share(profile, least_bytes=BLOCK) == pytest.approx(0.3)
    assert overlapped_share({"traceEvents": []}, least_bytes=1) is None


class CountingMeter:
    """Receives as many bytes as it is told to."""

    reason = ""
    driver = "1"
    num_errors = 0
    last_error = ""

    def __init__(self, *, counts: bool = True) -> None:
        self.devices = (Device(index=0, name="made up", uuid="GPU-0"),)
        self.received = 100
        self.counts = counts

    def poll(self) -> None:
        """Nothing wraps."""

    def sample(self) -> list[DeviceSample]:
        return [DeviceSample(device=0, pcie_rx_bytes=self.received if self.counts else None)]

    def close(self) -> None:
        raise AssertionError("a meter that was given is not closed")


def test_the_link_is_watched_from_here_to_there() -> None:
    meter = CountingMeter()
    with watched_link(meter) as link:
        meter.received += 12345
    assert link.num_bytes == 12345
    assert link.reason == ""
    assert link.elapsed_s > 0


def test_a_link_that_is_not_counted_says_why() -> None:
    with watched_link(CountingMeter(counts=False)) as link:
        pass
    assert link.num_bytes is None
    assert "PCIe" in link.reason
    with watched_link(NullMeter("no GPU is visible")) as link:
        pass
    assert (link.num_bytes, link.reason) == (None, "no GPU is visible")


def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "analysis" / "gpu" / "buffering_live.py"), "--tiny",
        "--studies", "qwen3-30b-a3b", "--share-host",
        "--repetitions", "1", "--max-steps", "4", "--seconds", "600", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "buffering_live.json").read_text())
    assert set(results["studies"]) == {"qwen3-30b-a3b"}
    misses = {row["miss"] for row in results["studies"]["qwen3-30b-a3b"]["settings"]}
    assert misses == {"load", "split", "host"}
    ahead = [row["prefetch"] for row in results["studies"]["qwen3-30b-a3b"]["settings"]]
    assert {0, 2} == set(ahead)
    for study in results["studies"].values():
        assert study["settings"], "nothing fitted into the time"
        for row in study["settings"]:
            assert row["outputs_hold"] and row["lookups_equal_replay"]
            if row["miss"] != "load":
                assert row["output_errors"]["worst_row"] <= row["output_errors"]["tolerance"]
                control = row["wrong_expert_on_host"]
                assert control["dispatches_noticed"] == control["dispatches"] > 0
                assert not control["comparison_holds"]
            assert row["slots_broken"] == 0
            assert row["copies"] * study["block_bytes"] == row["copied_bytes"]
            assert row["copies_as_planned"] is True
            assert (row["copies_ahead"] > 0) == (row["prefetch"] > 0)
            assert len(row["repetitions"][0]["wall_ms"]) == study["steps"]
        wrong = study["wrong_slot_map"]
        assert wrong["held_before"] and wrong["outputs_differ_after"]
        assert wrong["slots_broken"] > 0
        assert study["routing_source"]["model"].startswith("zoo:")
        layers = study["wrong_layer"]
        assert layers["dispatches_noticed"] == layers["dispatches"] > 0
        assert study["host_copy_shared_by_all_layers"] is True
        whole = study["experts_per_layer_here"] * study["block_bytes"]
        assert whole < study["host_bytes"] < 2 * whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_on_a_gpu_copies_bits_and_memory_hold(tmp_path: Path) -> None:
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=4, num_sites=3, num_experts=8, top_k=2, seed=1
    )
    geometry = ExpertGeometry(d_model=256, d_ff=512, bias=True)
    steps = routed_steps(trace, stack="decoder", device="cuda", dtype=geometry.dtype)
    sites = random_sites(trace, geometry, stack="decoder", pinned=True)
    hidden = starting_rows(steps, geometry, "cuda")

    def outputs(buffer: ExpertBuffer) -> list[Any]:
        results = run_steps(buffer, steps, hidden, keep_outputs=True)
        return [out for result in results for out in result.outputs]

    unbuffered = ExpertBuffer(sites, BufferSettings(capacity=None), device="cuda")
    expected = outputs(unbuffered)
    unbuffered.close()
    del unbuffered
    predicted = moeprof.replay.buffering(
        trace, policies=["lru", "min", "pinned"], capacities=[3], semantics="sequential", jobs=1
    )
    routed = read_routed_rows(trace, "decoder")
    for policy in ("lru", "min", "pinned"):
        for miss, prefetch in (("load", 0), ("split", 0), ("load", 2)):
            # What the last buffer held lies in cycles, and would be let go while this one is made.
            gc.collect()
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            settings = BufferSettings(
                capacity=3, policy=policy, miss=miss, prefetch=prefetch, future=trace
            )
            buffer = ExpertBuffer(sites, settings, device="cuda")
            grown = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
            memory = buffer.memory()
            held = memory.cache_bytes + memory.staging_bytes + memory.padding_bytes
            assert grown == held + memory.workspace_bytes
            found = outputs(buffer)
            if miss == "load":
                assert all(map(torch.equal, found, expected))
            else:
                assert all(
                    torch.allclose(one.float(), other.float(), rtol=0.05, atol=0.05)
                    for one, other in zip(found, expected, strict=True)
                )
            lookups = predicted.lookups(policy, 3)
            keys = ["step", "site", "expert", "hit"]
            assert buffer.lookups()[keys].values.tolist() == lookups[keys].values.tolist()
            assert buffer.audit() == []
            if miss == "load":
                buffer.reset()
                profile = profiled(functools.partial(_in_ranges, buffer, steps, hidden))
                seen = copies_by_step(profile, least_bytes=sites[0].store.shape.block_bytes)
                setting = BufferingSetting(capacity=3, policy=policy, prefetch=prefetch)
                plan = plan_buffer(trace, routed, setting)
                copies = plan.copies_per_step(routed).tolist()
                assert [each.copies for each in seen] == copies
                if not prefetch:
                    misses = (~lookups["hit"]).groupby(lookups["step"]).sum()
                    assert copies == [int(misses[s.step]) for s in steps]
            assert (buffer.counts().prefetch_used > 0) == (prefetch > 0)
            buffer.close()
            del buffer


def _in_ranges(buffer: Any, steps: Any, hidden: Any) -> None:
    for step in steps:
        with step_range(step.step):
            list(run_steps(buffer, [step], hidden))
