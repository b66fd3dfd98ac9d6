"""The script that measures expert parallelism, tried on two processes without a GPU."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
from replay_tools import make_site  # noqa: E402

from analysis.gpu import expert_parallel, parallel_studies  # noqa: E402
from analysis.live_parallel_parts import parallel_part, scaling_rows  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live.expert_parallel import PARTS  # noqa: E402
from moeprof.live.parallel_estimates import AllToAllLine, StepEstimate  # noqa: E402
from moeprof.live.parallel_traces import PlannerSetting  # noqa: E402
from moeprof.replay.loads import layout as laid_out  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    arguments = ["--tiny", "--out", str(folder), "--planners", "contiguous", "eplb"]
    assert expert_parallel.main(arguments) == 0
    return json.loads((folder / expert_parallel.RESULT).read_text())


def test_loads_and_outputs_are_checked(result):
    (trace,) = result["traces"]
    settings = {"contiguous", "eplb", "eplb+2"}
    assert set(trace["outputs"]) == set(trace["timed_outputs"]) == settings
    assert {(row["site"], row["setting"]) for row in trace["loads"]} == {
        (site, setting) for site in (0, 1) for setting in settings
    }
    for row in trace["loads"]:
        assert row["num_equal"] == row["num_dispatches"] == row["num_dispatches_of_trace"] > 0
        assert row["num_rows_lost"] == 0
        assert row["mean_max_over_mean"] >= 1
    for row in trace["outputs"].values():
        assert row["num_equal"] == row["num_same_twice"] == row["num_dispatches"] > 0
    sizes = {row["num_tokens"] for row in trace["steps"]}
    assert len(sizes) == 2
    for row in trace["timed_outputs"].values():
        assert len(row["errors_by_batch"]) == len(sizes)
        assert row["relative_error"] == max(row["errors_by_batch"])


def test_steps_come_in_rounds_of_all_placements(monkeypatch):
    asked = []

    def timed(device, experts, layout, ids, plan):
        asked.append((layout, ids))
        times = (float(len(asked)),) * plan.repeats
        return {"whole_ms": times, "parts_ms": dict.fromkeys(PARTS, times)}

    monkeypatch.setattr(parallel_studies, "time_step", timed)
    plan = parallel_studies.Plan(
        kernel="dynamic", dtype=torch.float32, repeats=6, share_repeats=1, exchange_bytes=()
    )
    found = parallel_studies.all_steps(
        torch.device("cpu"), None, {"a": "in a", "b": "in b"}, ["few", "many"], plan
    )
    one_round = [("in a", "few"), ("in a", "many"), ("in b", "few"), ("in b", "many")]
    assert asked == one_round * parallel_studies.NUM_ROUNDS
    # Six repetitions in four rounds: two, two, one and one.
    assert found["a"][0]["whole_ms"] == (1.0, 1.0, 5.0, 5.0, 9.0, 13.0)
    assert found["b"][1]["parts_ms"][PARTS[0]] == (4.0, 4.0, 8.0, 8.0, 12.0, 16.0)


def test_estimates_that_were_taken_once_are_said_to_rank_nothing(result):
    def notes(data):
        section = parallel_part(data).data["sections"][0]
        return [each for each in section["notes"] if "was estimated once" in each]

    assert not notes(result)
    before = {key: value for key, value in result.items() if key != "step_rounds"}
    (said,) = notes(before)
    rows = scaling_rows(result)
    plain = rows[~rows["setting"].str.contains("+", regex=False)]
    spread = max(
        own["uncorrected_ms"].max() / own["uncorrected_ms"].min()
        for _, own in plain.groupby(["num_devices", "num_tokens"])
    )
    assert f"they differ by up to {spread:.1f} times" in said
    alone = copy.deepcopy(before)
    for each in alone["traces"]:
        each["scaling"] = []
    assert not notes(alone)


def test_the_middle_of_the_rounds_counts():
    def taking(milliseconds):
        return StepEstimate(
            num_devices=1, size_exchange_ms=0.0, token_exchange_ms=0.0, experts_ms=milliseconds,
            return_ms=0.0, combine_ms=0.0, shares_ms=(milliseconds,), busiest_bytes=0,
        )  # fmt: skip

    for times, middle_ms in (([9.0, 1.0, 2.0], 2.0), ([9.0, 1.0], 1.0), ([9.0], 9.0)):
        assert parallel_studies.middle([taking(each) for each in times]).step_ms == middle_ms


def test_steps_stand_beside_what_was_predicted(result):
    (trace,) = result["traces"]
    assert trace["routing"]["kind"] == "synthetic"
    sizes = {row["num_tokens"] for row in trace["steps"]}
    assert len(trace["steps"]) == 3 * len(sizes)
    for row in trace["steps"]:
        assert row["figure_class"] == "measured"
        assert tuple(row["part_times_ms"]) == tuple(row["predicted_parts_ms"]) == PARTS
        assert len(row["times_ms"]) == 3
        assert sum(row["predicted_parts_ms"].values()) == pytest.approx(row["predicted_ms"])
        assert row["measured_over_predicted"] == row["step_ms"] / row["predicted_ms"]
    assert [each["num_tokens"] for each in trace["regret"]] == sorted(sizes)
    assert all(each["regret"] >= 0 for each in trace["regret"])


def test_more_devices_are_estimates_with_an_error_bar(result):
    (trace,) = result["traces"]
    assert {row["num_devices"] for row in trace["scaling"]} == {8, 16, 32}
    scaled = {
        (row["num_devices"], row["planner"], row["num_redundant"]) for row in trace["scaling"]
    }
    assert len(scaled) == trace["num_scaled_settings"] == 9
    for row in trace["scaling"]:
        assert row["figure_class"] == "estimate"
        assert len(row["shares_ms"]) == row["num_devices"]
        assert row["parts_ms"]["experts"] == max(row["shares_ms"])
        ratios = [
            step["measured_over_predicted"]
            for step in trace["steps"]
            if step["num_tokens"] == row["num_tokens"]
        ]
        assert row["uncorrected_ms"] == pytest.approx(sum(row["parts_ms"].values()))
        assert row["step_ms"] == pytest.approx(row["uncorrected_ms"] * np.median(ratios))
        assert row["low_ms"] == pytest.approx(row["uncorrected_ms"] * min(ratios))
        assert row["high_ms"] == pytest.approx(row["uncorrected_ms"] * max(ratios))
        assert row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        assert row["num_ratios"] == len(ratios) == 3
    shown = scaling_rows(result).sort_values(["num_devices", "num_tokens"], kind="stable")
    assert shown["estimate_ms"].tolist() == [row["step_ms"] for row in trace["scaling"]]
    line = result["all_to_all"]["line"]
    assert line["num_ranks"] == result["num_ranks"] == 2
    exchanges = result["all_to_all"]
    assert len(exchanges["times_ms"]) == len(exchanges["bytes_to_others"])


def test_what_was_not_estimated_is_said(result, tmp_path):
    (trace,) = result["traces"]
    assert trace["not_estimated"] == []
    assert len(result["source_sha256"]) == 64
    assert result["planning_s"] > 0
    assert {"loads", "steps", "estimates for more devices"} <= set(trace["seconds_by_part"])
    options = expert_parallel.options_of(
        ["--tiny", "--out", str(tmp_path), "--planners", "contiguous", "eplb", "random"]
    )
    path = tmp_path / "odd.moeprof"
    synthetic_trace(path, num_requests=12, num_sites=2, num_experts=24, top_k=2, output_tokens=4)
    subject = expert_parallel.subject_of(str(path), options, 2)
    nothing = parallel_studies.Findings(
        outputs={}, timed_outputs={}, arrived=[], size_exchange={}, estimates={}, steps={}
    )
    jobs = parallel_studies.by_importance(subject.study.layouts, 2)
    some = dataclasses.replace(nothing, estimates={job: [] for job in jobs[:1]})
    said = list(expert_parallel.not_estimated(subject, some, 2))
    assert [(each["num_devices"], each["setting"], each["wanted"]) for each in said] == [
        (16, None, True),
        (32, None, True),
        (8, "eplb", True),
        (8, "eplb+8", False),
        (8, "random", False),
    ]
    assert "24 experts" in said[0]["reason"] and "time" in said[2]["reason"]


def test_the_page_takes_what_the_script_says(result):
    (section,) = parallel_part(result).data["sections"]
    assert "Not estimated for more devices" not in {each["title"] for each in section["tables"]}
    (note,) = [each for each in section["notes"] if each.startswith("Outputs are checked")]
    num_checked = sum(row["num_dispatches"] for row in result["traces"][0]["outputs"].values())
    assert f"to the bit in {num_checked} of {num_checked} dispatches" in note
    facts = {each["label"]: each["lines"] for each in parallel_part(result).data["facts"]}
    (trace,) = result["traces"]
    assert facts[f"Layer, {trace['trace']}"] == [
        f"32 experts of 64 x 128 (tiny), layer timed: {trace['timed_site']}"
    ]
    (code,) = facts["Code"]
    assert code.startswith(f"sha256 {result['source_sha256'][:16]} of the package moeprof, ")


def test_what_is_wanted_most_is_estimated_first():
    names = ("random", "eplb", "eplb_global", "contiguous", "robust", "greedy")
    layouts = {
        count: dict.fromkeys(expert_parallel.settings_for(names, 512, count), object())
        for count in (2, 8, 16, 32)
    }
    jobs = parallel_studies.by_importance(layouts, 2)
    assert len(jobs) == 3 * (6 + 4) and all(count != 2 for count, _ in jobs)
    first = [(str(name), count) for count, name in jobs[:12]]
    assert first == [
        (planner, count)
        for planner in ("contiguous", "greedy", "eplb", "robust")
        for count in (8, 16, 32)
    ]
    assert {name.planner for _, name in jobs[12:21]} == {"greedy", "eplb", "robust"}
    assert {name.planner for _, name in jobs[21:]} == {"random", "eplb_global"}
    # Slots a device: two ranks share what is wanted most, and all of a kind go to one.
    slots = [(512 + name.num_redundant) // count for count, name in jobs]
    ranks = parallel_studies.dealt(slots, 2)
    assert set(ranks[:12]) == {0, 1}
    assert ranks[:3] == [0, 1, 0]
    assert all(
        len({r for r, s in zip(ranks, slots, strict=True) if s == kind}) == 1 for kind in set(slots)
    )


def test_what_does_not_hold_is_named(result):
    assert expert_parallel.failures(result) == []
    wrong = copy.deepcopy(result)
    wrong["traces"][0]["loads"][0]["num_equal"] -= 1
    wrong["traces"][0]["outputs"]["eplb"]["num_same_twice"] -= 1
    wrong["traces"][0]["timed_outputs"]["eplb+2"]["relative_error"] = 0.5
    said = expert_parallel.failures(wrong)
    assert len(said) == 3
    assert "eplb+2" in said[2]


def test_without_time_the_exchanges_are_kept_and_traces_named(tmp_path, capsys):
    assert expert_parallel.main(["--tiny", "--out", str(tmp_path), "--seconds", "0"]) == 1
    kept = json.loads((tmp_path / expert_parallel.RESULT).read_text())
    assert kept["traces"] == [] and kept["traces_asked_for"] == ["made-up.moeprof"]
    assert kept["all_to_all"]["line"]["bytes_per_s"] > 0
    assert "made-up.moeprof: not run" in capsys.readouterr().err


@pytest.fixture
def alone(tmp_path):
    store = (tmp_path / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.device("cpu")
    dist.destroy_process_group()


def test_checks_and_estimates_end_when_time_is_up(alone):
    setting, layout = (
        PlannerSetting(planner="contiguous"),
        laid_out(np.arange(4), num_experts=4, num_devices=1),
    )
    dispatches = [np.array([[each % 4]] * (each + 1)) for each in range(20)]
    check = parallel_studies.SiteCheck(dispatches=dispatches, layouts={setting: layout})
    never, now = float("inf"), 0.0
    rows = parallel_studies.arrived(alone, check, never)
    assert rows.tolist() == [list(range(1, 21))]
    assert parallel_studies.arrived(alone, check, now).tolist() == [list(range(1, 9))]

    shape = {"d_model": 8, "d_ff": 8, "gated": True, "bias": False}
    study = parallel_studies.Study(
        shape=shape,
        num_experts=4,
        checks=[check],
        batches=dispatches[-1:],
        layouts={1: {setting: layout}},
    )
    plan = parallel_studies.Plan(
        kernel="dynamic_loop", dtype=torch.float32, repeats=2, share_repeats=2, exchange_bytes=()
    )
    experts = parallel_studies.full_experts(alone, study, plan)
    line = AllToAllLine(latency_ms=1.0, bytes_per_s=1e9, largest_error=0.0, num_ranks=1)
    given = ([(1, setting)], study, experts, plan, line, {False: 1.0})
    assert parallel_studies.all_estimates(*given, until_s=now) == {}
    found = parallel_studies.all_estimates(*given, until_s=never)
    assert list(found) == [(1, setting)] and len(found[1, setting]) == 1


def test_what_is_wanted_most_may_take_longer(alone):
    """Time for the trace is up before estimates begin: only the wanted ones are made."""

    def layouts_on(count):
        placed = laid_out(np.arange(4), num_experts=4, num_devices=count)
        return {PlannerSetting(planner=name): placed for name in ("random", "contiguous")}

    ids = np.arange(8).reshape(4, 2) % 4
    study = parallel_studies.Study(
        shape={"d_model": 8, "d_ff": 8, "gated": True, "bias": False},
        num_experts=4,
        checks=[parallel_studies.SiteCheck(dispatches=[ids], layouts=layouts_on(1))],
        batches=[ids],
        layouts={count: layouts_on(count) for count in (1, 2, 4)},
    )
    plan = parallel_studies.Plan(
        kernel="dynamic_loop", dtype=torch.float32, repeats=2, share_repeats=2, exchange_bytes=()
    )
    line = AllToAllLine(latency_ms=1.0, bytes_per_s=1e9, largest_error=0.0, num_ranks=1)
    found = parallel_studies.run_study(alone, study, plan, line, 0.0, float("inf"))
    scaled = [(count, str(name)) for count, name in found.estimates if count != 1]
    assert scaled == [(2, "contiguous"), (4, "contiguous")]
    assert set(found.steps) == set(study.layouts[1])
    assert {"loads", "steps", "estimates for more devices"} <= set(found.seconds)
    found = parallel_studies.run_study(alone, study, plan, line, float("inf"), 0.0)
    assert len(found.estimates) == 6


def test_shapes_of_experts():
    assert expert_parallel.shape_of(make_site(512, 2), tiny=False)[0] == "paper LM"
    assert expert_parallel.shape_of(make_site(128, 2), tiny=False)[0] == "paper MT"
    assert expert_parallel.shape_of(make_site(128, 6), tiny=False)[0] == "Qwen3-30B-A3B"
    own = make_site(16, 4, d_model=32, d_ff=48, matrices_per_expert=3)
    assert expert_parallel.shape_of(own, tiny=False) == (
        "its own",
        {"d_model": 32, "d_ff": 48, "gated": True, "bias": False},
    )
    with pytest.raises(UsageError, match="how large its 16 experts"):
        expert_parallel.shape_of(make_site(16, 4), tiny=False)


def test_redundant_slots_deal_evenly():
    settings = expert_parallel.settings_for(["contiguous", "eplb"], 512, 32)
    assert [str(setting) for setting in settings] == ["contiguous", "eplb", "eplb+32"]
    assert parallel_studies.spread(10, 4).tolist() == [0, 3, 6, 9]
    assert parallel_studies.spread(3, 400).tolist() == [0, 1, 2]
