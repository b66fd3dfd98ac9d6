"""The kernel's share of the floor by skew: the script at a tiny size, and the page's part."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

import moeprof  # noqa: E402
from analysis import live_results as page  # noqa: E402
from analysis import live_skew_parts as parts  # noqa: E402
from analysis.gpu import gating_skew as script  # noqa: E402
from analysis.live_evidence import (  # noqa: E402
    ADDITIONAL_FILES,
    FILES,
    RESULTS,
    read_evidence,
)
from analysis.live_goals import share_said  # noqa: E402
from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.live.ceilings import Ceilings  # noqa: E402
from moeprof.live.experts import random_experts  # noqa: E402
from moeprof.live.repetitions import Repetitions  # noqa: E402
from moeprof.live.source_digest import source_digest  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# Exponent, active experts, ms of reading, of multiplying, of moeprof's kernel. Of the floor, which
# is the longer of the first two, the kernel reaches 80 %, 75 %, 51 % and 67 %.
MADE_UP = (
    (0.0, 512, 2.0, 0.5, 2.5),
    (1.0, 400, 1.5, 0.5, 2.0),
    (2.2, 130, 0.51, 0.5, 1.0),
    (3.0, 90, 0.25, 0.5, 0.75),
)
ABOUT = "Kernel by skew of routing, 16,384 tokens, device rested"
SKEWED = f"{ABOUT}: share of the floor under every Zipf law"
UNIFORM = f"{ABOUT}, uniform routing: share of the floor"
OUTPUTS = "Kernel by skew of routing, 16,384 tokens: outputs against one GEMM per expert, largest "
CEILINGS = Ceilings(
    copy_bytes_per_s=1e6,
    matrix_flops_per_s=1e6,
    copy=Repetitions((1.0, 1.0)),
    matrix=Repetitions((1.0, 1.0)),
)


def result(settings=MADE_UP, error=0.004):
    """Returns what the script writes; public kernels take twice as long as moeprof's.

    The loaded device multiplies at half the rate; its kernels take 1.25 times as long.
    """
    return {
        "command": "python -m analysis.gpu.gating_skew --out x",
        "date": "2026-01-05T00:00:00+00:00",
        "hardware": {"device_name": "H200", "device_memory_bytes": 1 << 37, "driver": "1"},
        "versions": {"torch": "2"},
        "geometry": {"num_experts": 512, "d_model": 1024, "d_ff": 4096, "top_k": 2},
        "num_tokens": 16_384,
        "tolerance": 0.01,
        "routing": {f"{each[0]:g}": f"drawn at {each[0]:g}" for each in settings},
        "agreement": [{"exponent": each[0], "relative_error": error} for each in settings],
        "states": {
            "rested": state(settings, 0.5, 0.0, 1.0, 1.0),
            "loaded": state(settings, 0.0, 1.0, 2.0, 1.25),
        },
        "complete": True,
    }


def state(settings, rest_s, load_s, multiplying_takes, kernels_take):
    return {
        "rest_s": rest_s,
        "load_s": load_s,
        "ceilings": {"copy_bytes_per_s": 4e12, "matrix_flops_per_s": 8e14 / multiplying_takes},
        "rows": [
            {
                "exponent": exponent, "active_experts": active, "kernel": kernel,
                "bytes_ms": reading, "flops_ms": multiplying_takes * multiplying,
                "times_ms": [kernels_take * factor * ours * each for each in (0.9, 1.0, 1.1)],
            }
            for exponent, active, reading, multiplying, ours in settings
            for kernel, factor in
            ((name, 1 if name == "dynamic" else 2) for name in parts.KERNELS)
        ],
    }  # fmt: skip


def goals(data):
    return {goal.quantity: goal for goal in parts.skew_goals(data)}


@pytest.fixture(scope="module")
def bare():
    return dataclasses.replace(read_evidence(), additions={})


def part_of(bare, data):
    report = page.results_page(dataclasses.replace(bare, additions={"skew": data}))
    (part,) = [each for each in report.json_data["traces"] if each["id"] == "skew"]
    return part, report


def test_the_floor_is_the_longer_of_its_parts():
    experts = random_experts(
        num_experts=4, d_model=8, d_ff=16, gated=False, bias=True, activation="relu", device="cpu",
        dtype=torch.bfloat16, seed=0,
    )  # fmt: skip
    ids = torch.tensor([[0, 1], [1, -1]])
    found = CEILINGS.floor_parts(ids, experts)
    # Two experts of 2 x 8 x 16 weights and 16 + 8 biases in two bytes; three rows, each of two
    # products of 8 x 16, at 1e6 a second.
    assert found.bytes_ms == pytest.approx(2 * 2 * (2 * 8 * 16 + 16 + 8) / 1e3)
    assert found.flops_ms == pytest.approx(3 * 2 * 2 * 8 * 16 / 1e3)
    assert found.floor_ms == CEILINGS.floor_ms(ids, experts) == found.flops_ms
    one = torch.tensor([[3, -1]])
    assert CEILINGS.floor_ms(one, experts) == CEILINGS.floor_parts(one, experts).bytes_ms


def test_how_many_experts_an_exponent_leaves_busy():
    """What `analysis.gpu.gating_kernels` says of the exponent it judges."""
    for exponent, tokens, active in ((2.2, 16_384, 179), (2.2, 4_096, 97), (0.0, 4_096, 512)):
        ids, said = script.drawn_ids(512, tokens, exponent, "cpu")
        assert ids.shape == (tokens, 2) and (ids[:, 0] != ids[:, 1]).all()
        assert len(torch.unique(ids)) == active
        assert ("Zipf law of exponent 2.2" in said) == bool(exponent)


def test_the_script_measures_and_the_page_shows_it(tmp_path, bare, capsys):
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 0
    assert "written to" in capsys.readouterr().out
    path = tmp_path / ADDITIONAL_FILES["skew"]
    data = json.loads(path.read_text())
    assert data["complete"] and data["command"].endswith(f"--out {tmp_path} --tiny")
    assert data["source_sha256"] == source_digest(Path(moeprof.__file__).parent)
    assert [row["exponent"] for row in data["agreement"]] == [0.0, 2.2, 3.0]
    for row in data["agreement"]:
        assert list(row["by_kernel"]) == list(parts.KERNELS)
        assert row["relative_error"] == row["by_kernel"]["dynamic"] < data["tolerance"] == 0.02
    assert data["failures"] == []
    waits = {name: (own["rest_s"], own["load_s"]) for name, own in data["states"].items()}
    assert waits == {"rested": (0.01, 0.0), "loaded": (0.0, 0.01)}
    assert [own["ahead"] for own in data["states"].values()] == [True, False]
    for own in data["states"].values():
        assert len(own["ceilings"]["copy"]["times_ms"]) > 2
        assert [row["kernel"] for row in own["rows"]] == 3 * list(parts.KERNELS)
        for row in own["rows"]:
            assert row["floor_ms"] == max(row["bytes_ms"], row["flops_ms"]) > 0
            assert row["median_ms"] == pytest.approx(np.median(row["times_ms"]))
            assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["median_ms"])
        first, _, last = own["rows"][::3]
        assert first["active_experts"] == 16 > last["active_experts"]
        assert first["bytes_ms"] > last["bytes_ms"] and first["flops_ms"] == last["flops_ms"]
    part, _ = part_of(bare, data)
    assert "Zipf 2.2 to 3" in part["verdict"]
    # The page says of a new result what it was held to, and still reads one that does not say it.
    held = [text for text in findings_of(data) if "outputs are held to" in text]
    assert "held to float64, token by token: the largest relative error" in held[0]
    assert any("outputs against float64, token by token" in name for name in goals(data))
    assert any("are held to one GEMM per expert" in text for text in findings_of(result()))


def test_a_run_cut_short_leaves_what_it_measured_in_every_state(tmp_path, monkeypatch, bare):
    begun = iter(range(6))
    rows_of = script.rows_of

    def interrupted(*given):
        if next(begun) == 5:
            raise KeyboardInterrupt
        return rows_of(*given)

    monkeypatch.setattr(script, "measure_ceilings", lambda device, **waits: CEILINGS)
    monkeypatch.setattr(script, "rows_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--out", str(tmp_path), "--tiny"])
    # Three exponents of the rested device and two of the loaded one.
    data = json.loads((tmp_path / script.RESULT).read_text())
    assert not data["complete"]
    for own in data["states"].values():
        assert [row["exponent"] for row in own["rows"]] == [0.0] * 3 + [2.2] * 3
    assert len(data["agreement"]) == 3
    part, _ = part_of(bare, data)
    assert "The run was cut short" in json.dumps(part)


def test_the_code_that_was_measured_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    first, second = tmp_path / "a.py", tmp_path / "inner" / "b.py"
    first.write_text("1")
    second.write_text("2")
    found = [source_digest(tmp_path)]
    (tmp_path / "notes.txt").write_text("no code")
    assert source_digest(tmp_path) == found[0] and len(found[0]) == 64
    second.write_text("3")
    found.append(source_digest(tmp_path))
    second.rename(tmp_path / "b.py")
    found.append(source_digest(tmp_path))
    assert len(set(found)) == 3


@pytest.fixture
def quick(monkeypatch):
    """One exponent, no ceilings measured."""
    monkeypatch.setattr(script, "measure_ceilings", lambda device, **waits: CEILINGS)
    monkeypatch.setattr(script, "_TINY_EXPONENTS", (2.2,))


def with_kernel(monkeypatch, name, kernel):
    monkeypatch.setattr(script, "CALLS", {**script.CALLS, name: kernel})


@pytest.mark.usefixtures("quick")
def test_outputs_that_differ_are_said(tmp_path, monkeypatch, bare, capsys):
    with_kernel(monkeypatch, "dynamic", lambda hidden, *given: torch.zeros_like(hidden))
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 1
    error = capsys.readouterr().err
    assert "outputs of dynamic are off: exponent 2.2" in error and "0.02 is allowed" in error
    data = json.loads((tmp_path / script.RESULT).read_text())
    assert [row["relative_error"] for row in data["agreement"]] == pytest.approx([1.0])
    part, _ = part_of(bare, data)
    said = [each["text"] for each in part["sections"][0]["findings"]]
    assert any("error is 1.0e+00, beyond the 0.02" in text for text in said)
    outputs = [goal for name, goal in goals(data).items() if "outputs against" in name]
    assert [goal.verdict for goal in outputs] == ["missed"]
    assert any("outputs of dynamic are off" in text for text in part["banners"])


@pytest.mark.usefixtures("quick")
def test_errors_of_the_other_kernels_are_said_too(tmp_path, monkeypatch, bare):
    with_kernel(monkeypatch, "dynamic_grouped", lambda hidden, *given: torch.zeros_like(hidden))
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 1
    data = json.loads((tmp_path / script.RESULT).read_text())
    part, _ = part_of(bare, data)
    said = " ".join(each["text"] for each in part["sections"][0]["findings"])
    assert "Those of the others: 1.0e+00 (torch grouped GEMM), " in said
    for row in data["agreement"]:
        del row["by_kernel"]
    part, _ = part_of(bare, data)
    assert not any("of the others" in each["text"] for each in part["sections"][0]["findings"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kernel", script.CALLS)
def test_one_token_of_any_kernel_is_enough(tmp_path, monkeypatch, capsys, kernel):
    """Of all 256 it is too little for a norm over the layer to notice."""
    right = script.CALLS[kernel]

    def dropping(hidden, ids, weights, experts):
        last = weights.clone()
        last[-1, 0] = 0.9 * weights[-1, 0]
        return right(hidden, ids, last, experts)

    with_kernel(monkeypatch, kernel, dropping)
    assert script.main(["--out", str(tmp_path), "--tiny"]) == 1
    error = capsys.readouterr().err
    assert error.count("are off") == 1 and f"outputs of {kernel} are off" in error
    data = json.loads((tmp_path / script.RESULT).read_text())
    assert data["complete"] and len(data["failures"]) == 1


def test_what_is_reached_is_computed():
    found = goals(result())
    skewed = found[SKEWED]
    assert skewed.verdict == "missed" and skewed.goal == "at least 60%"
    assert skewed.found == (
        "Zipf 1 to 3: 51% to 75%; 67% at 90 active experts (Zipf 3); least at 2.2 (130 active); "
        "reached at 2 of 3 exponents, missed at 2.2"
    )
    (uniform,) = [goal for name, goal in found.items() if name.startswith(UNIFORM)]
    assert (uniform.found, uniform.goal, uniform.verdict) == ("80%", "at least 80%", "reached")
    (outputs,) = [goal for name, goal in found.items() if name.startswith(OUTPUTS)]
    assert outputs.verdict == "reached" and outputs.found == "4.0e-03"
    ((quantity, row, goal, command),) = parts.skew_readme_rows(result())
    assert quantity == "moeprof's kernel by skew, 16,384 tokens: Zipf 1 to 3"
    # Loaded, kernels take 1.25 times as long; the floor is the rested device's.
    assert row == (
        "51% to 75%; 67% at 90 active experts (Zipf 3); least at 2.2 (130 active); on a loaded "
        "device, against the same floor, 41% to 60%"
    )
    assert goal == "60%, missed at 2.2" and "gating_skew" in command


def test_another_outcome_is_said_otherwise():
    # Uniform routing below its own goal; reading takes twice as long where the share is least.
    other = ((0.0, 512, 2.0, 0.5, 2.6), (1.0, 200, 1.0, 0.5, 1.25), (3.0, 80, 0.25, 0.5, 0.625))
    data = result(other)
    found = list(parts.skew_goals(data))
    assert [goal.verdict for goal in found] == ["reached", "missed", "reached"]
    assert "missed" not in found[0].found and found[1].found == "77%"
    ((_, row, goal, _),) = parts.skew_readme_rows(data)
    assert goal == "60%"
    assert "least at 1 (200 active); on a loaded" in row
    # Two ways it goes, of which the median is the slow one.
    for each in data["states"]["rested"]["rows"]:
        if each["kernel"] == parts.OURS and each["exponent"] == 1:
            each["times_ms"][0] = 1.0
    ((_, row, _, _),) = parts.skew_readme_rows(data)
    assert "least at 1 (200 active, in its fastest repetition 100%); on a" in row
    assert (
        "the least is 80% at 1, in its fastest repetition 100%, where 200 experts are active and "
        "reading the active experts takes 2.0 times as long as multiplying; at 3, with 80 active, "
        "it is 80%." in parts.skew_part(data).data["verdict"]
    )
    data = result(other)
    assert (
        "at every exponent measured; the least is 80% at 1" in parts.skew_part(data).data["verdict"]
    )
    slow = result(tuple((*each[:4], 10.0) for each in other[1:]))
    assert "misses the goal of 60% of the floor at every" in parts.skew_part(slow).data["verdict"]
    assert [goal.verdict for goal in parts.skew_goals(slow)] == [
        "missed", "not measured", "reached",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("share", "said"), [(0.6, "60%"), (0.5999, "59.9%"), (0.597, "59.7%"), (0.594, "59%")]
)
def test_a_missed_goal_does_not_read_as_reached(share, said):
    assert share_said(share, 0.6) == said


def test_the_part_says_what_was_found(bare):
    part, report = part_of(bare, result())
    assert part["verdict"] == (
        "Under skewed routing (Zipf 1 to 3), device rested, moeprof's kernel reaches the goal of "
        "60% of the floor at 2 of 3 exponents (1, 3) and misses it at 2.2; the least is 51% at "
        "2.2, where 130 experts are active and reading the active experts takes as long as "
        "multiplying; at 3, with 90 active, it is 67%."
    )
    assert "feasibility" not in report.markdown
    (section,) = part["sections"]
    assert section["question"] == "How does skew change the kernel's share of the floor?"
    assert {metric["figure_class"] for metric in section["metrics"]} == {"measured"}
    # Quartiles of three times: halfway between the middle one and the others.
    (least,) = [metric for metric in section["metrics"] if metric["name"] == "skew/least"]
    assert (least["low"], least["value"], least["high"]) == pytest.approx(
        (0.51 / 1.05, 0.51, 0.51 / 0.95)
    )
    (figure,) = section["figures"]
    shares, times = (
        {series["label"]: series["points"] for series in each["series"]}
        for each in figure["panels"]
    )
    assert set(shares) == {
        *parts.KERNELS.values(), "moeprof, device loaded", "goal for moeprof",
    }  # fmt: skip
    assert [point[1] for point in shares["moeprof, device loaded"]] == pytest.approx(
        [0.64, 0.6, 0.408, 0.5 / 0.9375]
    )
    (loaded,) = [
        each["text"] for each in section["findings"] if each["metric"] == "skew/loaded"
    ]  # fmt: skip
    assert loaded == (
        "With the device loaded (each runs for 1 s before it is timed), products of matrices run "
        "at 50% of their rate after a rest, and kernels under skewed routing take, at most, 25% "
        "longer (moeprof), 25% longer (torch grouped GEMM), 25% longer (transformers grouped_mm). "
        "Against the floor of the rested device moeprof's is then 41% to 60%."
    )
    assert [point[1] for point in shares["goal for moeprof"]] == [0.8, 0.6, 0.6, 0.6]
    assert [point[1] for point in shares["transformers grouped_mm"]] == pytest.approx(
        [0.4, 0.375, 0.255, 1 / 3]
    )
    assert [point[:2] for point in times["reading the active experts"]] == [
        [0.0, 2.0], [1.0, 1.5], [2.2, 0.51], [3.0, 0.25],
    ]  # fmt: skip
    assert [point[1] for point in times["multiplying"]] == [0.5] * 4
    rows = section["tables"][0]["rows"]
    assert len(rows) == 24 and [row["reached"] for row in rows[:4]] == ["yes", None, None, "yes"]
    assert [row["device"] for row in rows[::12]] == ["rested", "loaded"]
    # The fastest of three repetitions takes 0.9 of the median; the loaded ones 1.25 times that.
    units = {key: unit for key, _, unit in section["tables"][0]["columns"]}
    assert units["share"] == units["fastest_repetition_share"] == "share"
    assert [row["fastest_repetition_share"] for row in rows[::12]] == pytest.approx(
        [0.8 / 0.9, 0.8 / 0.9 / 1.25]
    )
    (even,) = [
        each["text"] for each in section["findings"] if each["metric"] == "skew/uniform"
    ]  # fmt: skip
    assert even.endswith("moeprof's kernel is at 80% of the floor (goal 80%: reached).")
    for picture in re.findall(r"<svg[^>]*>", report.html):
        assert len(re.search(r'aria-label="([^"]*)"', picture).group(1)) > 20
    cut, _ = part_of(bare, {**result(), "complete": False, "beside": "others ran"})
    assert [text.split()[0] for text in cut["banners"]] == ["The", "While"]


def findings_of(data):
    (section,) = parts.skew_part(data).data["sections"]
    return [each["text"] for each in section["findings"]]


def test_a_share_that_is_higher_under_load_is_said():
    data = result()
    for row in data["states"]["loaded"]["rows"]:
        if row["kernel"] == parts.OURS and row["exponent"] == 2.2:
            row["times_ms"] = [0.68]
    # 0.51 ms of the floor of the rested device, where it takes 1 ms.
    (loaded,) = [text for text in findings_of(data) if text.startswith("With the device loaded")]
    assert loaded.endswith(" Its share is higher under load at 2.2 (75%, after a rest 51%).")
    assert "higher under load" not in " ".join(findings_of(result()))


def test_without_the_file_there_is_no_part(bare):
    report = page.results_page(bare)
    assert "skew" not in {part["id"] for part in report.json_data["traces"]}
    own = [goal for goal in page.every_goal(bare) if goal.section == "skew"]
    assert [goal.quantity for goal in own] == list(goals(result()))
    assert {goal.verdict for goal in own} == {"not measured"}
    assert not any("by skew" in row[0] for row in page.every_readme_row(bare))


@pytest.mark.usefixtures("coarse_figures")
def test_the_command_writes_it_or_names_what_is_wrong(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    for file in FILES.values():
        shutil.copy(RESULTS / file, results)
    path = results / ADDITIONAL_FILES["skew"]
    command = ["--results", str(results), "-o", str(out)]
    path.write_text(json.dumps(result()))
    assert page.main(command) == 0
    assert (out / "gating-skew.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(out / "gating-skew.csv")) == 24
    assert "moeprof's kernel by skew" in (out / "readme-table.md").read_text()
    capsys.readouterr()
    for text, said in (("[", "cannot read"), ('{"command": 1}', "lacks")):
        path.write_text(text)
        assert page.main(command) == 1
        error = capsys.readouterr().err
        assert said in error and path.name in error and "Traceback" not in error


def rested(data):
    return data["states"]["rested"]


def rows(data):
    return rested(data)["rows"]


def _without(field):
    def change(data):
        del rows(data)[3][field]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("flops_ms"), "a row of gating_skew.json lacks flops_ms"),
        (lambda data: rows(data).insert(0, None), "lacks exponent"),
        (lambda data: rows(data)[0].update(times_ms=[]), "times that are no numbers"),
        (lambda data: rows(data)[0].update(times_ms="fast"), "times that are no numbers"),
        (lambda data: rows(data)[0].update(bytes_ms=None), "times that are no numbers"),
        (lambda data: rows(data)[0].update(times_ms=[0.0, 1.0]), "times that are no numbers"),
        (lambda data: rows(data)[0].update(exponent=None), "times that are no numbers"),
        (lambda data: rested(data).update(rows=3), "has not one row of each of dynamic"),
        (lambda data: rows(data).pop(), "has not one row of each of dynamic"),
        (lambda data: rested(data).update(rows=[]), "has not one row of each of dynamic"),
        (lambda data: rested(data).update(rows=rows(data)[:3]), "no row of skewed routing"),
        (lambda data: data.update(states=[]), "lacks rest_s, load_s, ceilings, rows of the rested"),
        (lambda data: rested(data).pop("ceilings"), "lacks ceilings of the rested device"),
        (lambda data: data["states"].pop("loaded"), "rows of the loaded device"),
        (lambda data: data["states"]["loaded"]["rows"].pop(0), "other rows of the loaded device"),
        (lambda data: data["states"]["loaded"].update(rows=[None]), "a row .* lacks exponent"),
        (lambda data: data.update(agreement=[]), "does not say how far outputs agree"),
        (lambda data: data["agreement"][0].clear(), "does not say how far outputs agree"),
    ],
)
def test_a_damaged_result_is_named_in_one_line(change, said):
    data = copy.deepcopy(result())
    change(data)
    with pytest.raises(MoeprofError, match=said) as error:
        parts.skew_goals(data)
        parts.skew_readme_rows(data)
    assert "\n" not in str(error.value) and "gating_skew.py" in error.value.hint
