"""Results that the page on GPU measurements takes where they are there: made-up ones."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import verified_files as made

pytest.importorskip("torch")

from analysis import live_prediction_drawings
from analysis import live_results as analysis
from analysis import prediction_quality as quality
from analysis.earlier_predictions import reduced
from analysis.gpu import expert_parallel
from analysis.live_evidence import ADDITIONAL_FILES, FILES, RESULTS, read_evidence
from analysis.live_parallel_parts import (
    dispatches_checked,
    error_rows,
    not_estimated_rows,
    part_rows,
    scaling_rows,
    setting_of,
    step_rows,
)
from analysis.live_parts import rows_table
from analysis.live_prediction_drawings import draw_memory_latency, draw_predictions
from analysis.live_prediction_parts import latency_part, latency_rows
from analysis.live_prediction_words import carried_findings, earlier_findings
from moeprof.errors import MoeprofError
from moeprof.reporting.numbers import formatted

HEAD = {
    "command": "python -m x", "date": "2026-01-05T00:00:00+00:00",
    "hardware": {"device_name": "H200", "device_memory_bytes": 1 << 37, "driver": "1"},
    "versions": {"torch": "2"},
}  # fmt: skip
HOSTILE = '<script>alert("x")</script> $\\frac{ | _a_'


def latency_result(judged=True):
    """Returns memory against latency: lru is recommended, min the best on the H200."""
    sizes = made.settings_of()
    times = {name: 20.0 + 5 * index for index, name in enumerate(sizes)}
    copying = [name for name in sizes if name.startswith(("lru", "min"))]

    def row(name, value, **more):
        return {"setting": name, "device_bytes": sizes[name] * made.GIB, "p95_ms": value, **more}

    return {
        "command": "python -m analysis.memory_latency",
        "percentile": 95,
        "routing": {"trace": "q.moeprof", "model": "Q.gguf"},
        "layers": 2, "judged_steps": 40, "tokens_per_judged_step": 1.0,
        "all_expert_bytes": 8 * made.GIB, "budget_bytes": 4 * made.GIB,
        "calibrated_on": "H100", "calibrated": made.CALIBRATED, "predicted_on": made.PREDICTED,
        "recommended": "lru:25%",
        "predicted": [
            row(
                name, value, low_ms=0.9 * value, high_ms=1.1 * value, judged_hit_rate=0.5,
                policy=name.partition(":")[0] if name in copying else None,
                kind="load" if name in copying else name.partition(":")[0],
            )
            for name, value in times.items()
        ],
        "token_major": [
            row(name, 1.1 * times[name], judged_token_hit_rate=0.4) for name in copying
        ],
        "hit_rate_alone": [row(name, 1.5 * times[name], judged_hit_rate=0.5) for name in copying],
        "frontier": [{"share": n / 8, "device_bytes": n * made.GIB, "p95_ms": 24 - n}
                     for n in (1, 2, 4, 8)],
        "measured": [
            {**row(name, value * (0.5 if name == "min:25%" else 1.0)), "machine": "H200",
             "spread": 0.01, "raw_p95_ms": 1.2 * value, "repetitions": 3}
            for name, value in times.items()
        ] if judged else [],
        "sources": [{"file": "verified-q-h200.json", "machine": "H200", "notes": [], **HEAD}]
        if judged else [],
    }  # fmt: skip


def parallel_result():
    """Returns two placements on two devices; the prediction picks the worse one."""

    def step(planner, measured, predicted, **more):
        return {"planner": planner, "num_redundant": 0, "num_tokens": 32, "max_over_mean": 1.5,
                "num_passes_joined": 4,
                "num_devices": 2, "step_ms": measured, "predicted_ms": predicted,
                "times_ms": [measured] * 3, **more}  # fmt: skip

    # As files have it that hold no corrected estimates.
    scaled = step("eplb", 1.0, 1.0, low_ms=0.8, high_ms=1.5)
    loads = {"num_dispatches": 5, "num_dispatches_of_trace": 9, "num_equal": 5, "num_rows_lost": 0}
    return {
        **HEAD, "num_ranks": 2, "backend": "nccl", "kernel": "dynamic", "notes": ["a note"],
        "all_to_all": {"line": {"latency_ms": 0.02, "bytes_per_s": 1e11, "largest_error": 0.1}},
        "traces_asked_for": ["t.moeprof", "late.moeprof"],
        "traces": [
            {
                "trace": "t.moeprof", "experts": "paper LM", "routing": {"description": "of t"},
                "outputs": {"eplb": {"num_dispatches": 4, "num_equal": 4, "num_same_twice": 4}},
                "timed_outputs": {"eplb": {"relative_error": 1e-3, "same_twice": True}},
                "loads": [{**loads, "site": 0, "setting": name} for name in ("contiguous", "eplb")],
                "steps": [step("contiguous", 2.0, 1.0), step("eplb", 1.0, 1.2)],
                "regret": [{"num_tokens": 32, "chosen": "contiguous+0", "best": "eplb+0",
                            "regret": 1.0}],
                "scaling": [{**scaled, "num_devices": 8}],
                "num_scaled_settings": 3,
            }
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def additions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("additions")
    judgements = quality.read_judgements(*made.made_up(folder))
    predictions = {"command": "python -m x", **quality.pooled(judgements)}
    return {
        "predictions": json.loads(json.dumps(predictions)),
        "latency": latency_result(),
        "parallel": parallel_result(),
    }


@pytest.fixture(scope="module")
def bare():
    return dataclasses.replace(read_evidence(), additions={})


@pytest.fixture(scope="module")
def evidence(bare, additions):
    return dataclasses.replace(bare, additions=additions)


def verdicts(evidence):
    return {goal.quantity: goal.verdict for goal in analysis.every_goal(evidence)}


def test_what_is_absent_is_said_to_be_not_measured(bare):
    page = analysis.results_page(bare)
    found = verdicts(bare)
    for begins in (
        "Settings predicted", "Regret", "Median error", "Expert parallelism", "MT ",
        "Kernel by skew",
    ):  # fmt: skip
        own = [verdict for quantity, verdict in found.items() if quantity.startswith(begins)]
        assert own and set(own) == {"not measured"}
    assert {part["id"] for part in page.json_data["traces"]}.isdisjoint(analysis.ADDITIONS)


def test_goals_are_those_of_the_results(evidence, additions):
    found = verdicts(evidence)
    for goal in additions["predictions"]["goals"]:
        assert found[goal["quantity"]] == ("reached" if goal["met"] else "missed")
    assert found["Expert parallelism: rows that reach every device, dispatch by dispatch"] == (
        "reached"
    )
    broken = json.loads(json.dumps(additions["parallel"]))
    broken["traces"][0]["loads"][0]["num_rows_lost"] = 1
    broken["traces"][0]["timed_outputs"]["eplb"]["relative_error"] = 0.1
    worse = verdicts(dataclasses.replace(evidence, additions={**additions, "parallel": broken}))
    own = {quantity: verdict for quantity, verdict in worse.items() if "parallelism" in quantity}
    assert list(own.values()) == ["missed", "missed", "no goal set"]


def test_the_page_says_what_was_found(evidence):
    page = analysis.results_page(evidence)
    parts = {part["id"]: part for part in page.json_data["traces"]}
    assert set(evidence.additions) < set(parts)
    said = " ".join(
        finding["text"]
        for part in parts.values()
        for section in part["sections"]
        for finding in section["findings"]
    )
    assert "Over 72 predictions of 18 settings" in said
    assert "recommends lru:25%: p95 25 ms predicted; 25 ms on H200, the best there 15 ms" in said
    assert "0.0% by the cost model, 10.0% by a token-flattened replay, 50.0% by a hit rate" in said
    assert "2.00x with eplb (t.moeprof, 32 tokens; 0.83x predicted)" in said
    assert "off by 35% (median of 2): t 35% (signed -15.0%, 1 of 2 too short)" in said
    assert "in 10 of 10 checks (5 of 9 dispatches at 1 layer, 2 placements); outputs" in said
    assert "at most 100% over the best measured" in said
    for part in parts.values():
        labels = {fact["label"] for fact in part["facts"]}
        assert labels >= {"Device", "Driver", "Versions", "Date", "Command", "Routing source"}
    assert "No time was left for late.moeprof" in page.html
    for picture in re.findall(r"<svg[^>]*>", page.html):
        assert len(re.search(r'aria-label="([^"]*)"', picture).group(1)) > 20
    classes = {metric["figure_class"] for metric in parts["latency"]["sections"][0]["metrics"]}
    assert classes == {"estimate"}


def test_estimates_for_more_devices_are_corrected_and_lie_in_their_bars():
    # Measured over predicted: 2 and 1 / 1.2, whose median is the mean of both.
    data = parallel_result()
    (row,) = scaling_rows(data).to_dict("records")
    assert row["uncorrected_ms"] == 1.0
    assert row["estimate_ms"] == pytest.approx((2 + 1 / 1.2) / 2)
    bar = row["estimate_ms_low"], row["estimate_ms_high"]
    assert bar == pytest.approx((1 / 1.2, 2))
    # Files written since hold both; steps of other batches correct nothing.
    (scaled,) = data["traces"][0]["scaling"]
    scaled |= {"uncorrected_ms": 1.0, "step_ms": 1.4, "num_ratios": 2}
    data["traces"][0]["steps"].append(
        {**data["traces"][0]["steps"][0], "num_tokens": 64, "step_ms": 9.0}
    )
    assert scaling_rows(data).to_dict("records") == [row]
    errors = error_rows(data).to_dict("records")
    assert [each["num_tokens"] for each in errors] == [32, 64]
    assert errors[0]["num_steps"] == 2 and errors[0]["num_too_short"] == 1
    assert errors[0]["error_share"] == pytest.approx((-0.5 + 0.2) / 2)
    assert errors[0]["size_of_error_share"] == pytest.approx((0.5 + 0.2) / 2)


def test_the_page_says_how_estimates_were_corrected(additions):
    (section,) = analysis.ADDITIONS["parallel"].part(additions["parallel"]).data["sections"]
    notes = " ".join(section["notes"])
    assert "t.moeprof, 32 tokens: 1.42 (0.83 to 2.00, 2 steps)" in notes
    assert "no interval of known coverage" in notes
    assert "there was time: 1 of 3 of t.moeprof" in notes
    assert "the fastest by 100%, 20% predicted (t.moeprof, 32 tokens)" in notes
    titles = [table["title"] for table in section["tables"]]
    assert titles == ["Steps measured", "How far off predictions were", "More devices"]
    assert section["tables"][2]["figure_class"] == "estimate"


def test_what_was_not_estimated_for_more_devices_is_shown(additions):
    title = "Not estimated for more devices"
    before = additions["parallel"]
    (section,) = analysis.ADDITIONS["parallel"].part(before).data["sections"]
    assert title not in {table["title"] for table in section["tables"]}
    data = json.loads(json.dumps(before))
    late = "the time given to this trace was up"
    data["traces"][0]["not_estimated"] = [
        {"num_devices": 32, "setting": None, "wanted": True, "reason": "experts do not deal"},
        {"num_devices": 16, "setting": "eplb", "wanted": True, "reason": late},
        {"num_devices": 8, "setting": "random", "wanted": False, "reason": late},
        {"num_devices": 16, "setting": "eplb+8", "wanted": False, "reason": HOSTILE},
        {"num_devices": 16, "setting": "peak+8", "wanted": False, "reason": late},
    ]
    described = analysis.ADDITIONS["parallel"].part(data)
    (section,) = described.data["sections"]
    (table,) = [each for each in section["tables"] if each["title"] == title]
    assert table["figure_class"] == "estimate"
    assert [tuple(row.values()) for row in table["rows"]] == [
        ("t.moeprof", 8, "random", "none", late),
        ("t.moeprof", 16, "eplb, peak +8", "eplb", late),
        ("t.moeprof", 16, "eplb +8", "none", HOSTILE),
        ("t.moeprof", 32, "all", "all", "experts do not deal"),
    ]
    # Everything was estimated.
    data["traces"][0]["not_estimated"] = []
    (section,) = analysis.ADDITIONS["parallel"].part(data).data["sections"]
    assert title not in {table["title"] for table in section["tables"]}


def test_what_the_script_leaves_out_reads_as_the_page_has_it():
    subject = expert_parallel.PlannerSetting(planner="eplb", num_redundant=8)
    data = parallel_result()
    row = {"num_devices": 8, "setting": str(subject), "wanted": False, "reason": "time"}
    data["traces"][0]["not_estimated"] = [row]
    (found,) = not_estimated_rows(data).to_dict("records")
    assert found["placements"] == setting_of({"planner": "eplb", "num_redundant": 8}) == "eplb +8"


def test_parts_of_steps_stand_beside_what_was_predicted_of_them():
    data = parallel_result()
    assert part_rows(data).empty
    (section,) = analysis.ADDITIONS["parallel"].part(data).data["sections"]
    assert not any("Parts" in table["title"] for table in section["tables"])
    times = ((1.0, 3.0), (2.0, 4.0))
    for row, (whole, sent) in zip(data["traces"][0]["steps"], times, strict=True):
        row["parts_ms"] = {"size_exchange": whole, "experts": sent}
        row["predicted_parts_ms"] = {"experts": 1.0, "size_exchange": 0.25}
    (section,) = analysis.ADDITIONS["parallel"].part(data).data["sections"]
    (table,) = [each for each in section["tables"] if each["title"].startswith("Parts")]
    assert table["rows"] == [
        {"trace": "t.moeprof", "num_tokens": 32, "size exchange": "1.500, predicted 0.250",
         "experts": "3.500, predicted 1.000"}
    ]  # fmt: skip


def test_what_outputs_were_held_to_is_said(additions):
    data = json.loads(json.dumps(additions["parallel"]))
    (trace,) = data["traces"]
    trace["outputs"]["contiguous"] = {"num_dispatches": 4, "num_equal": 3, "num_same_twice": 2}
    trace["timed_outputs"]["contiguous"] = {"relative_error": 4e-3, "same_twice": False}
    described = analysis.ADDITIONS["parallel"].part(data)
    (section,) = described.data["sections"]
    (note,) = [each for each in section["notes"] if each.startswith("Outputs are checked")]
    assert "to the bit in 7 of 8 dispatches" in note
    assert "off by at most 4.0e-03 (0.01 is allowed)" in note
    assert "in 6 of those dispatches, and in 1 of 2 runs" in note
    labels = {fact["label"] for fact in described.data["facts"]}
    assert not any(label.startswith("Layer") for label in labels)
    trace |= {"timed_site": 6, "geometry": {"num_experts": 512, "d_model": 1024, "d_ff": 4096}}
    facts = analysis.ADDITIONS["parallel"].part(data).data["facts"]
    lines = {fact["label"]: fact["lines"] for fact in facts}
    assert lines["Layer, t.moeprof"] == ["512 experts of 1024 x 4096 (paper LM), layer timed: 6"]


def test_layers_whose_dispatches_were_checked_are_counted_over_all_traces():
    data = parallel_result()
    (trace,) = data["traces"]
    # Two layers of one trace, and one of another with the same number; one placement is missing.
    other = {"site": 3, "num_dispatches": 2, "num_equal": 2}
    trace["loads"] += [{**each, **other} for each in trace["loads"]]
    data["traces"].append({**trace, "trace": "u.moeprof", "loads": trace["loads"][:1]})
    found = dispatches_checked(data)
    assert (found.num_dispatches, found.num_of_layers) == (5 + 2 + 5, 9 + 9 + 9)
    assert (found.num_layers, found.num_placements) == (3, 1)
    assert found.said == "12 of 27 dispatches at 3 layers, 1 placement"
    loads, *_ = (goal.found for goal in analysis.ADDITIONS["parallel"].goals(data))
    assert loads == "19 of 19 (12 of 27 dispatches at 3 layers, 1 placement)"
    assert dispatches_checked({"traces": []}).num_layers == 0


def test_the_bar_of_an_estimate_is_said_to_be_that_of_its_number_of_tokens(additions):
    """Some files say otherwise of what they computed so; the script does not any more."""
    former = (
        "size exchange as measured here; error bar: the range of measured over predicted of all "
        "settings here; no network between hosts is in it"
    )
    data = {**additions["parallel"], "notes": ["a note", former]}
    (section,) = analysis.ADDITIONS["parallel"].part(data).data["sections"]
    assert section["notes"][:2] == [
        "a note", "size exchange as measured here; no network between hosts is in it",
    ]  # fmt: skip
    assert "of the same trace and number of tokens" in " ".join(section["notes"])
    (scaling,) = [note for note in expert_parallel.NOTES if note.startswith("scaling")]
    assert "the same trace and number of tokens" in scaling and "all settings" not in scaling


def cells(table):
    """Returns the rows of a table as its reader sees them, by the names of columns."""
    return [
        {key: formatted(row.get(key), row["unit"] if unit == "row" else unit)
         for key, _, unit in table["columns"]}
        for row in table["rows"]
    ]  # fmt: skip


def test_columns_are_shown_by_their_suffix_else_by_what_they_hold():
    rows = pd.DataFrame(
        {"name": ["a"], "num_devices": [2000], "num_late": [0], "max_over_mean": [1.3603683897],
         "error_share": [-0.7324], "step_ms": [2.0663], "held": [True]}
    )  # fmt: skip
    table = rows_table("a table", rows)
    assert cells(table) == [
        {"name": "a", "num_devices": "2,000", "num_late": "0", "max_over_mean": "1.36",
         "error_share": "-73%", "step_ms": "2.07 ms", "held": "yes"}
    ]  # fmt: skip
    # What is read by programs stays whole.
    assert table["rows"][0]["max_over_mean"] == 1.3603683897


def test_every_prediction_is_shown_in_percent_and_with_what_was_stated(additions):
    (section,) = analysis.ADDITIONS["predictions"].part(additions["predictions"]).data["sections"]
    (table,) = [each for each in section["tables"] if each["title"] == "Every prediction"]
    data, shown = additions["predictions"]["rows"], cells(table)
    assert len(shown) == len(data)
    for row, said, drawn in zip(data, shown, table["rows"], strict=True):
        for key in ("error", "measured_spread", "naive_bandwidth_error", "naive_mean_error"):
            assert row[key] is None or re.fullmatch(r"-?[\d.]{1,5}%", said[f"{key}_share"])
            assert drawn[f"{key}_share"] == row[key]
        stated = (drawn["predicted_ms_low"], drawn["predicted_ms_high"])
        assert stated == (row["low_ms"], row["high_ms"])


def test_the_parallel_tables_say_what_they_are_medians_of(additions):
    (section,) = analysis.ADDITIONS["parallel"].part(additions["parallel"]).data["sections"]
    steps, errors, scaled = map(cells, section["tables"])
    assert steps[0]["max_over_mean"] == scaled[0]["max_over_mean"] == "1.50"
    assert steps[0]["error_share"] == "-50%"
    (row,) = errors
    assert row["median_signed_error_share"] == "-15%"
    assert row["median_absolute_error_share"] == "35%" and row["num_too_short"] == "1"
    kept = section["tables"][1]["rows"][0]
    bar = [kept[f"median_measured_over_predicted_share{end}"] for end in ("_low", "", "_high")]
    assert bar == pytest.approx([1 / 1.2, (2 + 1 / 1.2) / 2, 2])


KEPT_PARALLEL = RESULTS / ADDITIONAL_FILES["parallel"]


def test_estimates_that_are_kept_lie_in_their_bars():
    rows = scaling_rows(json.loads(KEPT_PARALLEL.read_text()))
    assert len(rows)
    assert (rows["estimate_ms_low"] <= rows["estimate_ms"]).all()
    assert (rows["estimate_ms"] <= rows["estimate_ms_high"]).all()


def test_what_the_readme_says_of_expert_parallelism():
    """Recomputed from the repetitions, by other code than that which wrote the table."""
    notes = Path(__file__).resolve().parents[1] / "docs" / "measurements.md"
    text = " ".join(notes.read_text().split())
    ratios, gains = {}, []
    for each in json.loads(KEPT_PARALLEL.read_text())["traces"]:
        name = each["trace"].removeprefix("sample:").removesuffix(".moeprof")
        steps = [
            (row["num_tokens"], np.median(row["times_ms"]), row["predicted_ms"])
            for row in each["steps"]
        ]
        errors = np.array([predicted / measured - 1 for _, measured, predicted in steps])
        assert (
            f"{name} {np.median(abs(errors)):.0%} (signed {100 * np.median(errors):+.1f}%, "
            f"{(errors < 0).sum()} of {len(errors)} too short)"
        ) in text
        for size in sorted({size for size, *_ in steps}):
            own = np.array([row[1:] for row in steps if row[0] == size])
            assert len(own) == 16 and each["steps"][0]["planner"] == "contiguous"
            ratios.setdefault(name, []).append(f"{np.median(own[:, 0] / own[:, 1]):.2f}")
            gains.append(own[0] / own[own[:, 0].argmin()])
    assert "of the 16 placements of the same trace" in text
    spread = {}
    for each in json.loads(KEPT_PARALLEL.read_text())["traces"]:
        for row in each["scaling"]:
            if not row["num_redundant"]:
                key = each["trace"], row["num_devices"], row["num_tokens"]
                spread.setdefault(key, []).append(sum(row["parts_ms"].values()))
    widest = max(spread, key=lambda key: max(spread[key]) / min(spread[key]))
    assert widest[:2] == ("qwen3.moeprof", 8)
    ratio = max(spread[widest]) / min(spread[widest])
    assert f"they differ by up to {ratio:.1f}x without replicas (Qwen3, 8 GPUs)" in text
    lm, mt, qwen = (" and ".join(ratios[name]) for name in ("twin-lm", "twin-mt", "qwen3"))
    assert f"{lm} (twin-lm), {mt} (twin-mt), {qwen} (Qwen3's 65 tokens)" in text
    *little, most = sorted(map(tuple, gains))
    assert f"it gains {most[0]:.2f}x, as predicted" in text
    assert f"{most[0]:.2f}" == f"{most[1]:.2f}"
    sites = {
        (each["trace"], row["site"]): (row["num_dispatches"], row["num_dispatches_of_trace"])
        for each in json.loads(KEPT_PARALLEL.read_text())["traces"]
        for row in each["loads"]
    }
    run, every = np.sum(list(sites.values()), axis=0)
    assert f"Of {every:,} dispatches at {len(sites)} layers {run:,} were run" in text
    assert len(little) == 4 and "at four of the five batch sizes the fastest" in text
    (low, least), (high, most) = np.min(little, axis=0), np.max(little, axis=0)
    assert f"gains {low:.2f}x to {high:.2f}x over experts in order" in text
    assert f"of which {least:.2f}x to {most:.2f}x was predicted" in text


def next_round(folder):
    """Returns predictions of two machines by themselves, carried over to one, a round before."""
    old = quality.pooled(quality.read_judgements(*made.made_up(folder, traces=["a"], off=1.5)))
    (folder / "next").mkdir()
    verified, predicted = [], []
    for machine, ms in (("H100", 10.0), ("H200", 12.0)):
        said = {(name, each): ms for name in ("lru:25%", "min:25%") for each in made.PERCENTILES}
        predicted.append(made.predicted_file(folder / "next", "a", said, machine=machine))
        times = {name: made.step_times(ms, index) for index, name in enumerate(dict(said))}
        verified.append(
            made.verified_file(
                predicted[-1], machine, {name: times[name, 50] for name, _ in times},
                date="2026-01-04T00:00:00+00:00", probes_ms=(2.0, 2.0, 3.0, 2.0),
            )
        )  # fmt: skip
    late = made.predicted_file(folder / "next", "late", {("lru:25%", 50): 1.0}, machine="H200")
    files = [
        made.carried_file(predicted[1], 1.02), made.carried_file(late, 1.0),
        made.carried_file(predicted[1], 1.5, is_unchanged=True),
    ]  # fmt: skip
    found = quality.pooled(
        quality.read_judgements(verified, [*predicted, late]),
        quality.read_carried(files),
        reduced({**old, "command": "python -m x"}),
    )
    return json.loads(json.dumps({"command": "python -m x", **found}))


def test_machines_what_carries_over_and_the_round_before_are_shown(evidence, tmp_path):
    data = next_round(tmp_path)
    page = analysis.results_page(dataclasses.replace(evidence, additions={"predictions": data}))
    (part,) = [part for part in page.json_data["traces"] if part["id"] == "predictions"]
    (section,) = part["sections"]
    said = " ".join(finding["text"] for finding in section["findings"])
    assert "Each machine was predicted from its own calibration." in said
    assert "H200 predicted from its own constants and trials on H100: " in said
    assert "from the calibration of H100, unchanged: 0% of 4" in said
    assert "from its own calibration, on the same runs: " in said
    assert "An earlier round, 2026-01-03 00:00:00 UTC to 2026-01-03 00:00:00 UTC" in said
    assert "(moeprof 0, torch 2), came to 0% of 24" in said and "It missed " in said
    assert "Median error of a predicted percentile" in said.partition("It missed ")[2]
    notes = " ".join(section["notes"])
    assert "a on H200 2.00 to 3.00 ms (median 2.00 over 8 visits)" in notes
    assert "not measured there: carried-late-h200-constants.json (H200)." in notes
    tables = {table["title"]: table["rows"] for table in section["tables"]}
    assert [row["machine"] for row in tables["By machine"]] == ["H100", "H200"]
    carried = tables["From another machine's trials, held to no goal"]
    assert [(row["predicted_from"], row["trials_on"]) for row in carried] == [
        ("its own calibration", "H200"),
        ("constants of the machine, trials of the other", "H100"),
        ("calibration of the other, unchanged", "H100"),
    ]
    assert carried[2]["median_signed_share"] > 0.3 > carried[1]["median_signed_share"]
    # What carries over is no prediction of the machine: it is in no goal and in no other figure.
    plain = {**data, "carried": None, "earlier": None}
    assert analysis.ADDITIONS["predictions"].goals(plain) == analysis.ADDITIONS[
        "predictions"
    ].goals(data)
    rows = analysis.ADDITIONS["predictions"].rows
    assert set(rows(data)) == {"predictions", "carried-predictions"}
    assert set(rows(plain)) == {"predictions"} and len(rows(data)["carried-predictions"]) == 8
    assert carried_findings(plain) == earlier_findings(plain) == []
    draw_predictions(data, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_readme(evidence, bare, additions):
    added = analysis.every_readme_row(evidence)[len(analysis.every_readme_row(bare)) :]
    whole = additions["predictions"]["all"]
    assert [row[0].partition(" ")[0] for row in added] == ["Step", "median", "regret", "Expert"]
    assert added[0][1].startswith(f"100% of {whole['predictions']} (")
    assert added[0][2] == "85% to 95%, missed" and added[1][2] == "5%"
    assert added[3][1] == (
        "10 of 10 (5 of 9 dispatches at 1 layer, 2 placements); 2 of 2 checks; off by 35% (median "
        "of 2), 35% to 35% by trace"
    )
    text = f"# a\n\n{analysis.SECTION}\n\n| old |\n| --- |\n| row |\n\nafter\n\n## b\n\n| kept |\n"
    changed = analysis.with_table(text, "| new |\n")
    assert changed == f"# a\n\n{analysis.SECTION}\n\n| new |\n\nafter\n\n## b\n\n| kept |\n"
    for other in ("# a\n", f"{analysis.SECTION}\n\nno table\n"):
        with pytest.raises(MoeprofError, match="there is no table"):
            analysis.with_table(other, "| new |\n")


def test_a_prediction_that_was_not_measured_is_still_shown(evidence, additions, tmp_path):
    unjudged = latency_result(judged=False)
    page = analysis.results_page(dataclasses.replace(evidence, additions={"latency": unjudged}))
    assert "nothing of it was measured yet" in page.html
    draw_memory_latency(unjudged, tmp_path / "a.png")
    draw_memory_latency({**latency_result(), "recommended": None}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    rows = additions["predictions"]["rows"]
    nothing = {**additions["predictions"],
               "rows": [{**row, "measured_ms": None} for row in rows]}  # fmt: skip
    draw_predictions(nothing, tmp_path / "c.png")
    table = latency_rows(latency_result())
    assert table["measured, H200_ms"].notna().all()
    assert table["hit rate alone_ms"].notna().sum() == 4


def test_what_was_not_measured_does_not_crowd_the_figure(tmp_path):
    data = latency_result()
    del data["measured"][1]  # lru:25%, which is recommended
    del data["measured"][-2]  # min:50%
    shown = live_prediction_drawings.measured_alone(data)
    assert {each["setting"] for each in data["predicted"]} - {
        each["setting"] for each in shown["predicted"]
    } == {"min:50%"}
    assert [each["setting"] for each in shown["hit_rate_alone"]].count("min:50%") == 0
    unjudged = latency_result(judged=False)
    assert live_prediction_drawings.measured_alone(unjudged) == unjudged
    # A few staged experts more are no other size; a setting that copies ahead has another mark.
    (ahead,) = [dict(each) for each in data["predicted"] if each["setting"] == "lru:50%"]
    ahead |= {"setting": "lru:50%:ahead=1", "ahead": 1,
              "device_bytes": ahead["device_bytes"] * 1001 // 1000}  # fmt: skip
    buffers = [*shown["predicted"], ahead]
    assert len(live_prediction_drawings.sizes_of(buffers)) == 3
    places = live_prediction_drawings.places_of(buffers)
    assert len(set(places.values())) == len(buffers)
    assert 1 < places["lru:50%:ahead=1"] / places["lru:50%"] < 1.2
    more = {**data, "predicted": [*data["predicted"], ahead]}
    figure = tmp_path / "more.png"
    draw_memory_latency({**more, "recommended": "lru:50%:ahead=1"}, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    # Lines of the page join sizes of one policy: what copies ahead is on none of them.
    (drawn,) = latency_part(more).data["sections"][0]["figures"]
    lines = {each["label"]: each["points"] for each in drawn["panels"][0]["series"]}
    # Of lru only 50% was measured.
    assert len(lines["lru, predicted"]) == 1 and len(lines["min, predicted"]) == 1


def test_another_machine_stands_beside_with_predictions_of_its_own(evidence, tmp_path):
    other = {**latency_result(), "calibrated_on": "An H300", "recommended": "lru:50%"}
    other["sources"] = [{**other["sources"][0], "beside": "others ran"}]
    data = {**latency_result(), "others": [other]}
    page = analysis.results_page(dataclasses.replace(evidence, additions={"latency": data}))
    (part,) = [part for part in page.json_data["traces"] if part["id"] == "latency"]
    assert part["verdict"].endswith("recommends lru:25% (H100), lru:50% (An H300).")
    assert part["banners"] == ["While this was measured on H200, others ran."]
    (section,) = part["sections"]
    said = " ".join(finding["text"] for finding in section["findings"])
    assert "recommends lru:25%: p95" in said and "recommends lru:50%: p95" in said
    assert "predicted for H100: 0.0%" in said and "predicted for An H300: 0.0%" in said
    assert [table["title"] for table in section["tables"]][-1] == "Every setting, An H300"
    rows = analysis.ADDITIONS["latency"].rows(data)
    assert set(rows) == {"memory-latency", "memory-latency-an-h300"}
    for name, drawn in (("one", latency_result()), ("two", data)):
        draw_memory_latency(drawn, tmp_path / f"{name}.png")
    heights = [
        int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24], "big")
        for name in ("one", "two")
    ]
    assert heights[1] > 1.5 * heights[0]


@pytest.mark.usefixtures("coarse_figures")
def test_the_command_writes_what_is_there(additions, tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    for file in FILES.values():
        shutil.copy(RESULTS / file, results)
    figure, readme = tmp_path / "latency.png", tmp_path / "README.md"
    command = ["--results", str(results), "-o", str(out)]
    assert analysis.main([*command, "--latency-figure", str(figure)]) == 1
    assert "memory_latency.json" in capsys.readouterr().err and not figure.exists()
    for name, data in additions.items():
        (results / ADDITIONAL_FILES[name]).write_text(json.dumps(data))
    readme.write_text(f"{analysis.SECTION}\n\n| old |\n\nafter\n")
    options = ["--latency-figure", str(figure), "--readme", str(readme)]
    assert analysis.main([*command, *options]) == 0
    for name in ("predictions.png", "memory-latency.png", "parallel.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert figure.read_bytes() == (out / "memory-latency.png").read_bytes()
    assert (out / "readme-table.md").read_text() in readme.read_text()
    assert len(pd.read_csv(out / "predictions.csv")) == len(additions["predictions"]["rows"])
    assert len(pd.read_csv(out / "parallel-steps.csv")) == len(step_rows(additions["parallel"]))
    assert len(pd.read_csv(out / "parallel-errors.csv")) == 1
    for name in additions:
        path = results / ADDITIONAL_FILES[name]
        kept = path.read_text()
        for text, said in (("[", "cannot read"), ('{"command": 1}', "lacks")):
            path.write_text(text)
            assert analysis.main(command) == 1
            error = capsys.readouterr().err
            assert said in error and path.name in error and "Traceback" not in error
        path.write_text(kept)


def test_hostile_text_is_escaped(evidence, additions):
    hostile = json.loads(json.dumps(additions).replace("H200", "HOSTILE").replace("H100", "HOSTILE")
                         .replace("t.moeprof", "HOSTILE").replace("of t", "HOSTILE")
                         .replace('"model a"', '"HOSTILE"'))  # fmt: skip
    (trace,) = hostile["parallel"]["traces"]
    trace |= {
        "timed_site": 1, "geometry": {"num_experts": 1, "d_model": 1, "d_ff": "HOSTILE"},
        "not_estimated": [{"num_devices": 8, "setting": "HOSTILE", "wanted": True,
                           "reason": "HOSTILE"}],
    }  # fmt: skip
    hostile["parallel"]["source_sha256"] = "<script>alert"
    text = json.dumps(hostile).replace("HOSTILE", json.dumps(HOSTILE)[1:-1])
    page = analysis.results_page(dataclasses.replace(evidence, additions=json.loads(text)))
    assert "<script>alert" not in page.html and "<script>alert" not in page.markdown
    assert "alert" in page.html


KEPT = [Path(RESULTS / file) for file in ADDITIONAL_FILES.values()]


@pytest.mark.skipif(not any(path.exists() for path in KEPT), reason="nothing of it is kept yet")
def test_what_is_kept_can_be_shown():
    evidence = read_evidence()
    assert set(evidence.additions) == {
        name for name, file in ADDITIONAL_FILES.items() if (RESULTS / file).exists()
    }
    page = analysis.results_page(evidence)
    assert page.html
    # No number is shown with digits that nobody reads.
    assert re.findall(r"\d\.\d{4,}", page.markdown) == []
