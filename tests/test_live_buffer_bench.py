"""What the bench of buffered runs judges: the allocator, the link, the profiler; and what fails."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from analysis.gpu import buffering_bench, buffering_live  # noqa: E402
from analysis.gpu.allocator_readings import (  # noqa: E402
    AllocatorReading,
    handed_out,
    is_steady,
    steady_state,
)
from analysis.gpu.buffering_bench import (  # noqa: E402
    Bench,
    Study,
    failed_checks,
    profiled_windows,
    without_rows,
)
from analysis.gpu.link_readings import (  # noqa: E402
    NET_OF_CONTROL,
    NOT_NET,
    is_link_within,
    link_judged,
)
from analysis.live_evidence import buffering_matrix, checks_held  # noqa: E402
from moeprof.live import copy_witness  # noqa: E402
from moeprof.live.routed_runs import RoutedStep  # noqa: E402
from moeprof.live.transfers import HostTransfers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

COMMITTED = Path(__file__).resolve().parents[1] / "analysis" / "results" / "buffering_live.json"
MIB = 1 << 20


def tiny_study(*arguments: str) -> Study:
    options = buffering_live.parser().parse_args(
        ["--tiny", "--studies", "qwen3-30b-a3b", "--max-steps", "4", "--repetitions", "2",
         *arguments]
    )  # fmt: skip
    assert isinstance(options, argparse.Namespace)
    (study,) = buffering_live.studies(options)
    return study


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    found = Bench(tiny_study(), torch.device("cpu"))
    found.unbuffered()
    yield found
    found.close()


def row_of(**fields: Any) -> dict[str, Any]:
    return {
        "policy": "lru", "capacity": 8, "miss": "load", "outputs_hold": True,
        "lookups_equal_replay": True, "slots_broken": 0, "allocations_in_steady_state": 0,
        "requested_as_predicted": None, **fields,
    }  # fmt: skip


def failed(**fields: Any) -> list[str]:
    return failed_checks({"settings": [row_of(**fields)], "wrong_slot_map": None})


def reading(driver: int, blocks: int, num_bytes: int) -> AllocatorReading:
    return AllocatorReading(driver_allocations=driver, blocks=blocks, allocated_bytes=num_bytes)


def test_what_a_repetition_takes_of_the_allocator_by_hand() -> None:
    # Two steps: 3 blocks, of which one of 512 bytes is held between them, then 5; it is let go.
    found = handed_out(
        [reading(7, 100, 4096), reading(7, 103, 4608), reading(8, 108, 4608), reading(8, 108, 4096)]
    )
    assert found == {
        "driver_allocations": 1,
        "blocks_by_step": [3, 5],
        "grown_bytes_by_step": [512, 512],
        "grown_bytes": 0,
    }
    assert handed_out([]) is None


def test_the_steady_state_by_hand() -> None:
    repetitions = [{"allocator": {"blocks_by_step": blocks}} for blocks in ([3, 5], [3, 9])]
    found = steady_state(reading(7, 100, 4096), reading(9, 121, 4608), repetitions)
    assert found == {
        "driver_allocations_in_steady_state": 2,
        "allocations_in_steady_state": 2,
        "allocator_in_steady_state": {
            "blocks": 21,
            "most_blocks_of_a_step": 9,
            "median_blocks_of_a_step": 4.0,
            "grown_bytes": 512,
        },
    }
    on_cpu = steady_state(None, None, [{"allocator": None}])
    assert on_cpu["allocator_in_steady_state"] is None
    assert on_cpu["driver_allocations_in_steady_state"] == 0


@pytest.mark.parametrize(
    ("num_driver", "grown_bytes", "steady"),
    [(0, 0, True), (0, -512, True), (0, 512, False), (1, 0, False)],
)
def test_memory_that_is_kept_fails_without_the_driver(
    num_driver: int, grown_bytes: int, steady: bool
) -> None:
    own = {"blocks": 9, "most_blocks_of_a_step": 3, "grown_bytes": grown_bytes}
    fields = {"allocations_in_steady_state": num_driver, "allocator_in_steady_state": own}
    assert is_steady(row_of(**fields)) is steady
    assert failed(**fields) == ([] if steady else ["lru 8 load: allocations"])


@pytest.mark.parametrize("leak", [0, 64])
def test_a_leak_in_the_timed_runs_is_found_and_blocks_are_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, leak: int
) -> None:
    """Every reading stands for two blocks more, of which a leak keeps some bytes."""
    taken = [0]

    def read(_: Any) -> AllocatorReading:
        taken[0] += 1
        return reading(5, 2 * taken[0], 4096 + leak * taken[0])

    monkeypatch.setattr(buffering_bench, "allocator_reading", read)
    row = bench.run("lru", 8, "load")
    allocator = row["allocator_in_steady_state"]
    assert row["driver_allocations_in_steady_state"] == row["allocations_in_steady_state"] == 0
    assert allocator["most_blocks_of_a_step"] == allocator["median_blocks_of_a_step"] == 2
    # Two repetitions of four steps, read before and after too; once more before and after both.
    assert allocator["grown_bytes"] == leak * (2 * 6 + 1)
    for each in row["repetitions"]:
        assert each["allocator"]["blocks_by_step"] == [2] * 4
        assert each["allocator"]["grown_bytes_by_step"] == [leak * step for step in (1, 2, 3, 4)]
        assert each["allocator"]["grown_bytes"] == 5 * leak
    study = {"settings": [row], "wrong_slot_map": None}
    assert failed_checks(study) == (["lru 8 load: allocations"] if leak else [])


def test_the_link_is_judged_by_the_middle_net_of_what_else_it_carries() -> None:
    gross, net = [0.5, 0.4, 0.6], [-0.001, 0.03, 0.004]
    judged = link_judged({"link_errors": gross, "link_errors_net": net})
    assert judged is not None
    # 1.645 times the deviation, 0.0166, times the root of pi / 2 over three.
    assert judged.pop("half_width") == pytest.approx(0.0198, abs=5e-5)
    assert judged == {"error": 0.004, "by": NET_OF_CONTROL}
    judged = link_judged({"link_errors": [-0.02]})
    assert judged == {"error": 0.02, "half_width": None, "by": NOT_NET}
    assert link_judged({"link_error": None}) is None
    assert link_judged({"link_errors": [], "link_errors_net": []}) is None


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"link_errors": [0.5], "link_errors_net": [0.0201]}, True),
        ({"link_errors": [0.5], "link_errors_net": [-0.0201]}, True),
        ({"link_errors": [0.5], "link_errors_net": [0.05, 0.001, -0.001]}, False),
        ({"link_errors": [0.5], "link_errors_net": [0.05, 0.049, 0.048]}, True),
        # Too far apart to tell.
        ({"link_errors": [0.5], "link_errors_net": [0.5, 0.05, -0.5]}, False),
        ({"link_errors": [0.5]}, True),
        ({"link_errors": [0.01]}, False),
        ({"link_error": None}, False),
        ({}, False),
    ],
)
def test_counters_that_disagree_with_the_copies_fail(fields: dict[str, Any], lost: bool) -> None:
    assert failed(**fields) == (["lru 8 load: link"] if lost else [])


def test_counters_that_vary_by_more_than_they_are_to_agree_tell_nothing() -> None:
    assert is_link_within({"link_errors_net": [0.05, 0.049, 0.048]}) is False
    assert is_link_within({"link_errors_net": [0.001, 0.002, 0.003]}) is True
    assert is_link_within({"link_errors_net": [0.1, 0.001, -0.1]}) is None
    # Nine runs tell what three do not.
    assert is_link_within({"link_errors_net": [0.03, 0.001, -0.03]}) is None
    assert is_link_within({"link_errors_net": [0.03, 0.001, -0.03] * 3}) is True


def test_each_setting_says_what_its_link_is_judged_by(bench: Bench) -> None:
    counts = {"copied_bytes": 1000}
    runs = [{"link_bytes": 1130, "counts": counts}, {"link_bytes": None, "counts": counts}]
    bench.overhead = 1.1
    try:
        net = bench.link(runs, [20, 40])
        gross = bench.link(runs, [])
    finally:
        bench.overhead = None
    assert net["link_judged"] == {
        "error": pytest.approx(0.0), "half_width": None, "by": NET_OF_CONTROL,
    }  # fmt: skip
    assert gross["link_judged"] == {
        "error": pytest.approx(30 / 1100), "half_width": None, "by": NOT_NET,
    }  # fmt: skip
    assert bench.link(runs, [20]) == {"link_error": None}


def test_a_layer_that_is_not_noticed_fails() -> None:
    study: dict[str, Any] = {"settings": [row_of()], "wrong_slot_map": None, "wrong_layer": None}
    assert failed_checks(study) == []
    study["wrong_layer"] = {"dispatches": 9, "dispatches_noticed": 9}
    assert failed_checks(study) == []
    study["wrong_layer"] = {"dispatches": 9, "dispatches_noticed": 8}
    assert failed_checks(study) == ["experts of another layer were not noticed"]


def steps_of(phases: str) -> list[RoutedStep]:
    names = {"p": "prefill", "d": "decode"}
    return [
        RoutedStep(step=10 + index, phase=names[phase], passes=())
        for index, phase in enumerate(phases)
    ]


@pytest.mark.parametrize(
    ("phases", "num_decode", "windows"),
    [
        ("pdddd", 2, [range(1), range(1, 3)]),
        ("ppdd", 8, [range(1, 2), range(2, 4)]),
        ("dddd", 2, [range(2)]),
        ("pppp", 3, [range(3)]),
    ],
)
def test_a_prefill_and_the_decode_steps_after_it_are_profiled(
    phases: str, num_decode: int, windows: list[range]
) -> None:
    assert profiled_windows(steps_of(phases), num_decode) == windows


def event(category: str, name: str, begun: float, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "ts": begun, "dur": 0.5, "args": arguments,
    }  # fmt: skip


def test_rows_of_the_host_are_no_experts() -> None:
    block, rows = (event("gpu_memcpy", "Memcpy HtoD", 0.0, bytes=size) for size in (MIB, 3 * MIB))
    kernel, other = event("kernel", "gemm", 0.0), event("user_annotation", "step", 0.0)
    named = {"ph": "M", "name": "process_name"}
    profile = {"other": 1, "traceEvents": [block, rows, kernel, other, named]}
    assert without_rows(profile, MIB) == {"other": 1, "traceEvents": [block, kernel, other, named]}


class Profiler:
    """Stands in for the profiler: slots of the host, whose copies are seen as a device's are.

    Args:
        loses: Copies that it does not see, of all.
        rows_bytes: Bytes of a larger copy that every step makes besides.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loses: int = 0, rows_bytes: int = 0):
        self.events: list[dict[str, Any]] | None = None
        self.steps: list[int] = []
        self.now = 0.0
        self.loses, self.rows_bytes = loses, rows_bytes
        load = HostTransfers.load

        def seen(transfers: Any, slot: int, block: Any) -> None:
            load(transfers, slot, block)
            if self.events is not None and not transfers.is_blank:
                if self.loses:
                    self.loses -= 1
                else:
                    self.copied(block.numel())

        monkeypatch.setattr(HostTransfers, "load", seen)
        monkeypatch.setattr(buffering_bench, "profiled", self.profiled)
        monkeypatch.setattr(buffering_bench, "step_range", self.step_range)
        monkeypatch.setattr(Bench, "why_not_profiled", lambda _: None)

    def copied(self, num_bytes: int) -> None:
        assert self.events is not None
        self.now += 1
        number = len(self.events)
        self.events.append(
            event("gpu_memcpy", "Memcpy HtoD", self.now, bytes=num_bytes, correlation=number)
        )

    def profiled(self, run: Callable[[], None]) -> dict[str, Any]:
        self.events = []
        run()
        found, self.events = self.events, None
        return {"traceEvents": found}

    @contextlib.contextmanager
    def step_range(self, step: int) -> Iterator[None]:
        assert self.events is not None
        self.steps.append(step)
        self.now += 1
        begun = self.now
        if self.rows_bytes:
            self.copied(self.rows_bytes)
        yield
        self.now += 1
        whole = event("user_annotation", f"{copy_witness.STEP_NAME} {step}", begun)
        self.events.append({**whole, "dur": self.now - begun})


@pytest.mark.parametrize(
    ("policy", "capacity", "miss", "prefetch"),
    [
        ("paper", 8, "load", 0),
        ("min", 16, "load", 0),
        ("lru", 1, "load", 0),
        ("lru", 8, "split", 0),
        ("pinned", 8, "host", 0),
        ("lru", 8, "load", 2),
    ],
)
def test_the_profiler_looks_at_every_setting_and_a_prefill(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, policy: str, capacity: int, miss: str,
    prefetch: int,
) -> None:  # fmt: skip
    given: dict[str, Any] = {"policies": [policy], "capacities": [capacity], "jobs": 1}
    monkeypatch.setattr(
        bench,
        "predicted",
        moeprof.replay.buffering(bench.trace, semantics="sequential", **given),
    )
    block = bench.sites[0].store.shape.block_bytes
    profiler = Profiler(monkeypatch, rows_bytes=0 if miss == "load" else 3 * block)
    row = bench.run(policy, capacity, miss, prefetch)
    found = row["profiler"]
    assert found["holds"] and "profiler_left_out" not in row
    assert [each["step"] for each in found["steps"]] == profiler.steps
    assert [each["phase"] for each in found["steps"]] == ["prefill", "decode", "decode", "decode"]
    assert sum(each["copies"] for each in found["steps"]) == row["copies"] > 0
    assert found["copies_counted"] == (
        "of a block or more" if miss == "load" else "of a block exactly"
    )


def test_a_copy_that_the_profiler_does_not_see_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    Profiler(monkeypatch, loses=1)
    row = bench.run("lru", 8, "split")
    prefill, *decode = row["profiler"]["steps"]
    assert prefill["copies"] == prefill["predicted_copies"] - 1
    assert all(each["copies"] == each["predicted_copies"] for each in decode)
    study = {"settings": [row], "wrong_slot_map": None}
    assert failed_checks(study) == ["lru 8 split: profiler"]


def test_what_the_profiler_did_not_look_at_says_why(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.why_not_profiled() == "runs on the CPU"
    assert bench.run("lru", 8, "load")["profiler_left_out"] == "runs on the CPU"
    monkeypatch.setattr(bench, "is_cuda", True)
    assert bench.why_not_profiled() is None
    monkeypatch.setattr(bench, "ends_s", 0.0)
    assert bench.why_not_profiled() == "out of time"
    monkeypatch.setattr(bench, "study", replace(bench.study, profile_steps=0))
    assert bench.why_not_profiled() == "no step was to be profiled"


def test_tiny_runs_leave_a_gpu_alone_and_readers_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> Any:
        raise AssertionError("the counters of a GPU are not of a run on the CPU")

    monkeypatch.setattr(copy_witness, "open_meter", opened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    buffering_live.main([
        "--tiny", "--studies", "qwen3-30b-a3b", "--max-steps", "3", "--repetitions", "1",
        "--share-host", "--seconds", "0.01", "--out", str(tmp_path),
    ])  # fmt: skip
    found = json.loads((tmp_path / "buffering_live.json").read_text())
    (study,) = found["studies"].values()
    assert study["settings"][0]["repetitions"][0]["link_reason"] == "runs on the CPU"
    assert study["settings"][0]["repetitions"][0]["allocator"] is None
    rows = buffering_matrix(found)
    assert rows["no_allocations"].all()
    # What the page says was not looked at, and why.
    assert set(rows["profiler_left_out"]) == set(rows["link_not_judged"]) == {"runs on the CPU"}
    assert rows["link_error_judged"].isna().all() and set(rows["link_judged_by"]) == {""}
    assert all(checks_held(found).values())


def test_results_with_and_without_later_fields_are_judged() -> None:
    for study in json.loads(COMMITTED.read_text())["studies"].values():
        # Where next to nothing is copied, what else crosses the link may be more than 2 % of it.
        assert [line for line in failed_checks(study) if not line.endswith(": link")] == []
        assert all(link_judged(row) is not None for row in study["settings"])
