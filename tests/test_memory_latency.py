"""Memory against latency: every series from a tiny run, and one token after another by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from calibrations import corrections, exactly, flat, hand_calibration, surface

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from analysis import memory_latency as analysis  # noqa: E402
from analysis.live_prediction_parts import latency_rows  # noqa: E402
from analysis.token_major import token_major  # noqa: E402
from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.live import verification, verification_files  # noqa: E402
from moeprof.live.verification_options import VerifyOptions  # noqa: E402
from moeprof.replay import buffer_plans  # noqa: E402
from moeprof.replay.cache import streams  # noqa: E402
from moeprof.replay.calibration_file import write_calibration  # noqa: E402
from moeprof.replay.expert_shapes import ExpertShape  # noqa: E402
from moeprof.replay.serving_settings import parse_setting  # noqa: E402
from moeprof.trace.handmade import HandToken, hand_trace  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = VerifyOptions(
    shape=ExpertShape(d_model=16, d_ff=8, dtype="float32"), phase="all", repetitions=3
)
SETTINGS = ["unbuffered", "lru:2", "min:2", "lru:4", "lru:4:host", "gating:dynamic"]


@pytest.fixture(scope="module")
def machine():
    own = corrections(residuals=(-0.1, -0.05, 0.0, 0.05, 0.1))
    changes = {"to_device": flat(10e-3), "device_expert": surface(4e-3), "sync_s": exactly(1e-3)}
    return hand_calibration(corrections=own, **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory, machine):
    """A trace, its calibration, predictions and measurements."""
    folder = tmp_path_factory.mktemp("latency")
    trace = synthetic_trace(
        folder / "t.moeprof", num_requests=3, num_sites=2, num_experts=8, batch=3,
        prompt_tokens=4, output_tokens=6,
    )  # fmt: skip
    write_calibration(machine, folder / "calibration.json")
    settings = [parse_setting(name) for name in SETTINGS]
    made = verification.make_predictions(trace, machine, settings, OPTIONS)
    made = dataclasses.replace(made, facts={**made.facts, "date": "2026-01-02T00:00:00+00:00"})
    verification_files.write_predictions(made, folder / "predicted-t.json")
    result = verification.verify(trace, predictions=made, device="cpu", only=SETTINGS[:3])
    verification_files.write_verification(result, folder / "verified-t-cpu.json", command="verify")
    return folder


def found_in(folder, machine, **options):
    return analysis.memory_latency(
        moeprof.open(folder / "t.moeprof"),
        verification_files.read_predictions(folder / "predicted-t.json"),
        machine,
        analysis.read_judgements([folder / "verified-t-cpu.json"], [folder / "predicted-t.json"]),
        **options,
    )


@pytest.fixture(scope="module")
def found(files, machine):
    return found_in(files, machine)


def by_setting(rows):
    return {row["setting"]: row for row in rows}


def test_every_series_is_there(found):
    rows = by_setting(found["predicted"])
    assert list(rows) == SETTINGS
    for row in rows.values():
        assert row["low_ms"] <= row["p95_ms"] <= row["high_ms"]
    copied = {"lru:2", "min:2", "lru:4"}
    assert set(by_setting(found["token_major"])) == set(by_setting(found["hit_rate_alone"]))
    assert set(by_setting(found["token_major"])) == copied
    assert found["all_expert_bytes"] == rows["unbuffered"]["device_bytes"]
    assert rows["lru:4"]["device_bytes"] * 2 == found["all_expert_bytes"]


def test_recommended_is_the_least_predicted_within_the_budget(found, files, machine):
    fitting = [
        row
        for row in found["predicted"]
        if row["device_bytes"] <= found["budget_bytes"] and row["policy"] != "min"
    ]
    assert found["budget_bytes"] * 2 == found["all_expert_bytes"]
    assert found["recommended"] == min(fitting, key=lambda row: row["p95_ms"])["setting"]
    tight = found_in(files, machine, budget_share=0.26)
    # min would be faster, and knows the future.
    assert tight["recommended"] == "lru:2"
    assert found_in(files, machine, budget_share=0.01)["recommended"] is None


def test_the_frontier_is_below_what_copies(found):
    frontier = found["frontier"]
    sizes = [row["device_bytes"] for row in frontier]
    times = [row["p95_ms"] for row in frontier]
    assert sizes == sorted(sizes) and times == sorted(times, reverse=True)
    assert sizes[-1] == found["all_expert_bytes"]
    for name in ("lru:2", "min:2", "lru:4"):
        row = by_setting(found["predicted"])[name]
        bound = [each["p95_ms"] for each in frontier if each["device_bytes"] <= row["device_bytes"]]
        assert min(bound) <= row["p95_ms"]


def test_measured_percentiles_are_those_of_the_steps(found, files):
    times = json.loads((files / "verified-t-cpu.json").read_text())["step_times"]
    rows = by_setting(found["measured"])
    assert set(rows) == set(SETTINGS[:3])
    for name, row in rows.items():
        steps = np.array(times[name]["measured_ms"])
        assert row["p95_ms"] == pytest.approx(np.percentile(np.median(steps, axis=0), 95))
        assert row["raw_p95_ms"] == pytest.approx(np.percentile(steps.ravel(), 95))
        assert row["spread"] > 0
        assert row["repetitions"] == len(steps)


def test_a_hit_rate_alone_adds_copies(found, machine):
    rows, alone = by_setting(found["predicted"]), by_setting(found["hit_rate_alone"])
    extra = {name: row["p95_ms"] - rows["unbuffered"]["p95_ms"] for name, row in alone.items()}
    for name, other in (("lru:2", "lru:4"), ("min:2", "lru:4")):
        misses = (1 - alone[name]["judged_hit_rate"]) / (1 - alone[other]["judged_hit_rate"])
        assert extra[name] / extra[other] == pytest.approx(misses)
    assert extra["lru:2"] > 0


def test_a_hit_rate_and_lookups_are_of_the_same_steps(tmp_path, machine):
    # A prompt fills four slots; three decode steps look up four experts, one of which is copied.
    def step(phase, *experts):
        return [
            HandToken(request=0, position=i, experts=[[expert]], phase=phase)
            for i, expert in enumerate(experts)
        ]

    trace = hand_trace(
        tmp_path / "hand.moeprof",
        [step("prefill", 0, 1, 2, 3), step("decode", 0), step("decode", 1), step("decode", 0, 4)],
        num_experts=8,
    )
    options = dataclasses.replace(OPTIONS, phase=None)
    settings = [parse_setting(name) for name in ("unbuffered", "lru:4")]
    made = verification.make_predictions(trace, machine, settings, options)
    found = analysis.memory_latency(trace, made, machine)
    plain, predicted = found["predicted"]
    (alone,), (flat,) = found["hit_rate_alone"], found["token_major"]
    assert found["judged_steps"] == 3
    assert predicted["judged_hit_rate"] == alone["judged_hit_rate"] == 3 / 4
    assert flat["judged_token_hit_rate"] == 3 / 4
    # A copy takes 10 ms; a mean judged step makes a third of one. With the prompt's four misses the
    # rate would be 3 of 8, and five sixths of a copy be charged to each step.
    assert alone["misses_per_judged_step"] == pytest.approx(1 / 3)
    assert alone["p95_ms"] - plain["p95_ms"] == pytest.approx(10 / 3)
    row = next(row for row in made.rows if row["setting"] == "lru:4")
    assert row["copied_bytes_per_step"] == pytest.approx(made.shape.block_bytes / 3)
    (line,) = [row for row in latency_rows(found).to_dict("records") if row["setting"] == "lru:4"]
    assert line["judged_hit_rate"] == 3 / 4


KEPT = analysis.RESULTS / analysis.RESULT


@pytest.mark.skipif(not KEPT.exists(), reason="no predictions were judged on a GPU yet")
def test_kept_hit_rates_are_those_of_the_bytes_that_were_predicted():
    content = json.loads(KEPT.read_text())
    files = ("predicted-qwen3-h100.json", "predicted-qwen3-h200.json")
    for each, file in zip([content, *content["others"]], files, strict=True):
        predictions = verification_files.read_predictions(analysis.RESULTS / file)
        copied = {row["setting"]: row["copied_bytes_per_step"] for row in predictions.rows}
        for row in each["hit_rate_alone"]:
            copies = copied[row["setting"]] / predictions.shape.block_bytes
            assert row["misses_per_judged_step"] == pytest.approx(copies)


def hand(tmp_path, *dispatches):
    """One layer; each dispatch a list of tokens, each a list of experts."""
    steps = [
        [HandToken(request=0, position=i, experts=[list(each)]) for i, each in enumerate(tokens)]
        for tokens in dispatches
    ]
    return hand_trace(tmp_path / "hand.moeprof", steps, num_experts=8)


def test_one_token_after_another_by_hand(tmp_path):
    # Two slots, lru. Tokens 0, 1, 2, 0: all miss, 0 twice in one dispatch; then 0 hits, 3 misses.
    trace = hand(tmp_path, [[0], [1], [2], [0]], [[0], [3]])
    setting = parse_setting("lru:2")
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    plan = buffer_plans.plan_buffer(trace, routed, setting, rows=rows)
    flat = token_major(rows, routed, setting, plan.capacity)
    assert routed.expert.tolist() == [0, 1, 2, 0, 3]
    assert flat.misses.tolist() == [2, 1, 1, 0, 1]
    assert flat.hit_rate == pytest.approx(1 / 6)
    made = flat.plan(plan)
    assert made.loads.tolist() == [1, 1, 1, 0, 1] and made.hit.tolist() == [0, 0, 0, 1, 0]
    assert made.awaits.tolist() == [0, 1, 2, -1, 4] and set(made.after.tolist()) == {-1}
    # As what runs together: 0 leaves for 2, so that the second dispatch misses it.
    assert plan.loads.tolist() == [1, 1, 1, 1, 1]
    # Only the first step asked for: nothing of the second.
    first = buffer_plans.read_routed_rows(trace, "decoder", max_steps=1)
    assert token_major(rows, first, setting, plan.capacity).misses.tolist() == [2, 1, 1]


def test_one_token_a_step_is_the_same_either_way(tmp_path):
    trace = hand(tmp_path, *[[[a]] for a in (0, 1, 2, 0, 3, 1, 1, 2)])
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    rows = streams.read_rows(trace)
    for name in ("lru:2", "lifo:2", "min:3"):
        plan = buffer_plans.plan_buffer(trace, routed, parse_setting(name), rows=rows)
        flat = token_major(rows, routed, parse_setting(name), plan.capacity)
        assert flat.misses.tolist() == plan.loads.tolist()


def test_the_command_and_what_it_refuses(files, machine, tmp_path, capsys):
    out = tmp_path / "out.json"
    calibration = files / "calibration.json"
    command = [str(files / "t.moeprof"), "--predicted", str(files / "predicted-t.json"),
               "-o", str(out), "--calibration"]  # fmt: skip
    assert analysis.main([*command, str(calibration)]) == 0
    content = json.loads(out.read_text())
    assert content["measured"] == [] and content["command"].startswith("python -m analysis.memory")
    also = [files / "predicted-t.json", calibration, files / "verified-t-cpu.json"]
    assert analysis.main([*command, str(calibration), "--also", *map(str, also)]) == 0
    (other,) = json.loads(out.read_text())["others"]
    assert other["predicted"] == content["predicted"] and len(other["measured"]) == 3
    for changes, said in (
        ({"date": "2026-01-01T01:00:00+00:00"}, "a calibration of 2026-01-01T00:00:00"),
        ({"to_device": flat(20e-3)}, "by this cost model, the predictions say"),
    ):
        other = tmp_path / f"{len(said)}.json"
        write_calibration(dataclasses.replace(machine, **changes), other)
        assert analysis.main([*command, str(other)]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(MoeprofError, match="are not of"):
        analysis.memory_latency(
            moeprof.open("sample:lm"),
            verification_files.read_predictions(files / "predicted-t.json"),
            machine,
        )
