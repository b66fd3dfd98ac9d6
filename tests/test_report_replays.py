"""Gating, buffering and balancing in a report: equal to the replays, honest where they are not."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from replay_tools import mark_trained
from test_report import HOSTILE, Page, copied

import moeprof
from moeprof import cli
from moeprof.errors import MoeprofError, UsageError
from moeprof.replay import balancing, buffering, gating
from moeprof.reporting import CHARACTERIZATION, REPLAYS, SECTIONS, replays, studies, writing
from moeprof.trace import schema
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "My run.moeprof"
    trace = synthetic_trace(
        path, num_requests=24, num_sites=2, num_experts=12, prompt_tokens=60, executed=False
    )
    return mark_trained(trace)


def sections_of(trace, *names):
    found = moeprof.report(trace, sections=names or REPLAYS)
    return {section["name"]: section for section in found.json_data["traces"][0]["sections"]}


def expected(trace):
    """Returns the replays by themselves, at the settings that the sections name."""
    own = all(site.capacity_rule is not None for site in trace.sites)
    return {
        "gating": gating(trace, "model")
        if own
        else gating(trace, values=[replays.own_fraction(trace)]),
        "buffering": buffering(
            trace,
            policies=replays.POLICIES,
            capacities=replays.capacities_of(trace, 1, most=replays.NUM_CAPACITIES),
        ),
        "balancing": balancing(
            trace,
            replays.devices_for(trace, replays.MAX_DEVICES),
            planners=replays.planners_for(trace),
        ),
    }


def assert_equal_to_replays(trace, sections):
    for name, result in expected(trace).items():
        section = sections[name]
        assert section["absence"] == ""
        assert [metric["name"] for metric in section["metrics"]] == [m.name for m in result.metrics]
        for shown, metric in zip(section["metrics"], result.metrics, strict=True):
            assert shown["value"] == metric.value
            assert (shown["low"], shown["high"]) == (metric.low, metric.high)
            halves = None if metric.split_half is None else list(metric.split_half)
            assert shown["split_half"] == halves
            assert shown["figure_class"] == metric.figure_class
        assert {finding["text"] for finding in section["findings"]} == {
            finding.text for finding in result.findings
        }
        assert section["notes"][0].startswith("Settings here: ")
        assert f"moeprof replay {name} TRACE" in section["notes"][0]
        assert set(section["headline"]) <= {metric.name for metric in result.metrics}
        assert section["headline"]


@pytest.mark.parametrize("sample", ["sample:lm", "sample:mt"])
def test_sections_of_samples_equal_the_replays(sample):
    trace = moeprof.open(sample)
    assert_equal_to_replays(trace, sections_of(trace))


def test_sections_of_a_users_trace_equal_the_replays(lm):
    sections = sections_of(str(lm.path))
    # Read again from its path, the trace says that its weights are random.
    assert all("random" in finding["text"] for s in sections.values() for finding in s["findings"])
    sections = sections_of(lm)
    assert_equal_to_replays(lm, sections)
    assert sections["balancing"]["title"] == "Placing experts on 6 devices"


def test_the_models_own_rule_is_replayed(tmp_path):
    trace = mark_trained(
        synthetic_trace(tmp_path / "t.moeprof", num_requests=12, capacity_factor=0.8)
    )
    section = sections_of(trace, "gating")["gating"]
    assert "the model's own capacity rule" in section["notes"][0]
    assert {metric["name"].split("/")[-1] for metric in section["metrics"]} == {
        "capacity_factor-0.8"
    }


def figure(section, name):
    return next(each for each in section["figures"] if each["id"] == name)


def test_figures_are_drawn_from_the_replays(lm):
    sections, results = sections_of(lm), expected(lm)
    stacks = results["gating"].tables["stacks"]
    row = stacks[stacks["phase"] == "decode"].iloc[0]
    static, dynamic = figure(sections["gating"], "gating-rows")["panels"][0]["rows"]
    assert static["value"] == row["num_slots"] == sum(s["value"] for s in static["segments"])
    assert dynamic["value"] == row["num_decisions"]
    lengths = [sum(s["share"] for s in bar["segments"]) for bar in (static, dynamic)]
    assert max(lengths) == pytest.approx(1)
    assert lengths[0] / lengths[1] == pytest.approx(static["value"] / dynamic["value"])

    table = results["buffering"].table
    own = table[(table["policy"] == "lru") & (table["phase"] == "decode")]
    panel = next(
        panel
        for panel in figure(sections["buffering"], "buffering-hits")["panels"]
        if panel["title"] == "decode"
    )
    points = next(s for s in panel["series"] if s["label"] == "LRU")["points"]
    assert [point[0] for point in points] == own["capacity"].tolist()
    assert [point[1] for point in points] == own["hit_rate"].tolist()
    assert [point[2] for point in points] == own["low"].tolist()

    caches = results["buffering"].per_cache
    worst = caches[(caches["policy"] == "fifo") & (caches["phase"] == "decode")]
    lowest = worst.groupby("capacity")["hit_rate"].min()
    panel = figure(sections["buffering"], "buffering-worst")["panels"][-1]
    points = next(s for s in panel["series"] if s["label"] == "FIFO")["points"]
    assert [point[1] for point in points] == (1 - lowest.sort_index()).tolist()

    moved = figure(sections["buffering"], "buffering-moved")
    assert moved["panels"][-1]["y_unit"] == "bytes"
    points = next(s for s in moved["panels"][-1]["series"] if s["label"] == "LRU")["points"]
    passes = int((lm.steps["phase"] == "decode").sum())
    assert [point[1] for point in points] == (own["bytes_moved"] / passes).tolist()
    assert points[-1][0] == pytest.approx(100)

    loads = figure(sections["balancing"], "balancing-loads-decoder")["panels"][0]["rows"]
    shown = {each["label"]: each["value"] for each in loads}
    first = results["balancing"].table.iloc[0]
    assert shown["in order of ids (nothing done): average"] == first["avg_max_load"]
    assert shown["in order of ids (nothing done): largest"] == first["max_load"]
    assert shown["perfect balance (1/6)"] == pytest.approx(1 / 6)


def test_pages_of_all_kinds_hold_the_sections(lm):
    found = moeprof.report(lm)
    page = Page(found.html)
    assert page.images_without_alt == 0
    assert {f"my-run-{name}" for name in SECTIONS} <= set(page.ids)
    for title in ("Gating", "Expert buffering", "Placing experts on 6 devices"):
        assert f"<h3>{title}</h3>" in found.html
        assert f"\n### {title}\n" in found.markdown
    for number in ("Fig. 8", "Fig. 12b", "Fig. 13", "Fig. 14"):
        assert number in found.html
    names = [m["name"] for s in found.json_data["traces"][0]["sections"] for m in s["metrics"]]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == set(SECTIONS)


def test_chosen_sections_only(lm, monkeypatch):
    def refuse(trace, name):
        raise AssertionError(f"{name} was replayed")

    monkeypatch.setattr(replays, "replayed", refuse)
    found = moeprof.report(lm, sections=CHARACTERIZATION)
    names = [section["name"] for section in found.json_data["traces"][0]["sections"]]
    assert names == list(CHARACTERIZATION)
    with pytest.raises(AssertionError, match="gating was replayed"):
        moeprof.report(lm)
    with pytest.raises(UsageError, match="no section 'gate'"):
        moeprof.report(lm, sections=["gate"])
    with pytest.raises(UsageError, match="no section to report"):
        moeprof.report(lm, sections=[])


def test_progress_names_what_is_done(lm):
    told = []
    moeprof.report(lm, sections=("gating", "memory"), progress=lambda *each: told.append(each))
    assert told == [("my-run", 0, 2, "memory"), ("my-run", 1, 2, "gating"), ("my-run", 2, 2, "")]


def test_the_command_line_offers_the_same_sections(lm, tmp_path, monkeypatch, capsys):
    assert cli.SECTIONS == SECTIONS
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(lm.path), "-o", "a.html", "--only", "buffering"]) == 0
    (section,) = json.loads(Path("a.json").read_text())["traces"][0]["sections"]
    assert section["name"] == "buffering"
    assert cli.main(["report", str(lm.path), "-o", "b.html", "--only", "cache"]) == 2
    assert "balancing" in capsys.readouterr().err


def test_the_end_of_a_recording_replays_nothing(lm, monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(
        "moeprof.reporting.report",
        lambda traces, *, sections, progress: (
            asked.append(sections) or writing.report(traces, sections=["memory"])
        ),
    )
    cli._finish_recording(cli.Talk(), lm.path, with_report=False, force=False)
    assert asked == [CHARACTERIZATION]
    assert "Next: moeprof report" in capsys.readouterr().err
    path = tmp_path / "t.moeprof"
    path.symlink_to(lm.path)
    cli._finish_recording(cli.Talk(quiet=True), path, with_report=True, force=False)
    assert asked == [CHARACTERIZATION, None]
    assert (tmp_path / "t.html").exists()


def test_what_was_recorded_comes_before_replays(lm):
    found = moeprof.report([lm, lm.path]).findings
    for trace in ("my-run", "my-run-2"):
        mine = [finding.section for finding in found if finding.trace == trace]
        assert sum(section in REPLAYS for section in mine) <= 1 < len(mine)
    only = moeprof.report(lm, sections=REPLAYS).findings
    assert len([finding for finding in only if finding.section in REPLAYS]) > 1


# Where a section does not apply


def with_sites(trace, **changes):
    sites = tuple(dataclasses.replace(site, **changes) for site in trace.sites)
    return copied(trace, dataclasses.replace(trace.info, sites=sites))


def absences(trace):
    found = moeprof.report(trace, sections=REPLAYS)
    sections = found.json_data["traces"][0]["sections"]
    for section in sections:
        if section["absence"]:
            assert html.escape(section["absence"], quote=False)[:30] in found.html
            assert not section["metrics"]
            assert not section["figures"]
    assert "Nothing was recorded" not in found.html
    return {section["name"]: section["absence"] for section in sections}


def test_a_dense_model(lm):
    dense = copied(lm, dataclasses.replace(lm.info, sites=()))
    said = absences(dense)
    assert set(said) == set(REPLAYS)
    assert all("no Mixture-of-Experts layers" in text for text in said.values())


def test_experts_of_unknown_size(lm):
    unsized = with_sites(lm, expert_bytes=0)
    said = absences(unsized)
    assert "does not say how large an expert is" in said["buffering"]
    assert said["gating"] == said["balancing"] == ""
    for trace, known in ((lm, True), (unsized, False)):
        tables = sections_of(trace, "balancing")["balancing"]["tables"]
        again = next(table for table in tables if table["title"].startswith("Planned again"))
        assert all((row["bytes_moved"] is not None) is known for row in again["rows"])


def test_one_expert_only(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=12, num_experts=1, top_k=1)
    said = absences(mark_trained(trace))
    assert "no layer has an expert that a cache could do without" in said["buffering"]
    assert "1 experts cannot be dealt" in said["balancing"]


def test_experts_that_no_devices_can_share(tmp_path):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=12, num_sites=2, num_experts=[11, 13]
    )
    said = absences(mark_trained(trace))
    assert "11 or 13 experts cannot be dealt evenly" in said["balancing"]
    assert "--num-redundant" in said["balancing"]
    assert said["gating"] == said["buffering"] == ""


def test_a_trace_too_short_to_be_split(tmp_path):
    token = HandToken(request=0, position=0, experts=[[0, 1]], phase="prefill")
    said = absences(hand_trace(tmp_path / "t.moeprof", [[token]]))
    assert said["gating"] == said["buffering"] == ""
    assert said["balancing"] == (
        "Load balancing cannot be replayed on this trace: the decoder ran 1 forward passes; one "
        "has to plan and another to judge (record more requests)."
    )


def test_missing_ranks(lm):
    ranks = tuple(schema.RankInfo(rank=rank, expert_parallel=rank) for rank in (0, 1))
    said = absences(copied(lm, dataclasses.replace(lm.info, ranks=ranks, missing_ranks=(1,))))
    for text in said.values():
        assert "cannot be replayed on this trace" in text
        assert "rank" in text


def test_one_request_has_sections_but_no_intervals(tmp_path):
    trace = mark_trained(synthetic_trace(tmp_path / "t.moeprof", num_requests=1, num_sites=2))
    sections = sections_of(trace)
    assert all(section["absence"] == "" for section in sections.values())
    metrics = [m for name in ("gating", "buffering") for m in sections[name]["metrics"]]
    assert metrics
    assert all(metric["low"] is None for metric in metrics)
    said = " ".join(f["text"] for section in sections.values() for f in section["findings"])
    assert "ot enough evidence" in said


def test_planners_that_search_are_left_out_of_large_models(lm):
    wide = with_sites(lm, num_experts=1024)
    assert replays.planners_for(lm) == replays.PLANNERS
    assert set(replays.PLANNERS) - set(replays.planners_for(wide)) == set(replays.SEARCHING)
    assert set(replays.SEARCHING) < set(replays.PLANNERS)


def test_planners_left_out_are_said(lm, monkeypatch):
    monkeypatch.setattr(replays, "MAX_PAIRS", 1)
    section = sections_of(lm, "balancing")["balancing"]
    assert "searching takes minutes" in section["notes"][0]
    assert "second_moment" in section["notes"][0].partition("left out")[2]
    assert not any("second_moment" in metric["name"] for metric in section["metrics"])


def test_hostile_names_in_replays(lm):
    model = dataclasses.replace(lm.info.model, name=HOSTILE, task=HOSTILE)
    trace = copied(lm, dataclasses.replace(lm.info, model=model))
    trace.requests = trace.requests.assign(
        domain=np.where(trace.requests["request"] % 2, HOSTILE, "<b>other</b>")
    )
    found = moeprof.report(trace, sections=REPLAYS)
    tables = found.json_data["traces"][0]["sections"][2]["tables"]
    transfer = next(table for table in tables if table["title"].startswith("Planned on one"))
    assert f"On {HOSTILE}" in [heading for _, heading, _ in transfer["columns"]]
    assert "script" not in Page(found.html).tags
    assert "<b>other" not in found.html
    assert "<script" not in found.markdown


# Pages of one replay


def study(trace, **changes):
    section = replays.replayed(trace, "gating")
    settings = {
        "trace": trace, "result": section.result, "section": section.section,
        "frames": {"": pd.DataFrame({"a": [1]}), "sweep": pd.DataFrame({"b": [2]})},
    }  # fmt: skip
    return studies.Study(**{**settings, **changes})


PUBLISHED = studies.published_table("Published <i>numbers</i>", [("q|", "1", "2", "<script>")])


def saved(found, folder, published=PUBLISHED):
    return studies.save_studies(found, published, folder, name="gating", subject="Gating")


def test_studies_are_written_whole(lm, tmp_path):
    hostile = copied(
        lm, dataclasses.replace(lm.info, model=dataclasses.replace(lm.info.model, name=HOSTILE))
    )
    folder = tmp_path / "new" / "folder"
    written = saved([study(hostile), study(lm)], folder)
    assert [path.name for path in written] == [
        "gating.json", "gating.md", "gating.html", "my-run.csv", "my-run-sweep.csv",
        "my-run-2.csv", "my-run-2-sweep.csv",
    ]  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {path.name for path in written}
    text = (folder / "gating.html").read_text()
    assert "script" not in Page(text).tags
    assert "Published &lt;i&gt;numbers&lt;/i&gt;</h2>" in text
    assert "<script" not in text
    markdown = (folder / "gating.md").read_text()
    assert "## Published &lt;i&gt;numbers&lt;/i&gt;" in markdown
    assert "<script" not in markdown
    data = json.loads((folder / "gating.json").read_text())
    assert data["comparison"]["rows"][0]["verdict"] == "<script>"
    assert data["verdict"].startswith(HOSTILE)


def test_no_rows_are_lost_to_equal_names(lm, tmp_path):
    first = study(lm, frames={"": pd.DataFrame({"a": [1]}), "2": pd.DataFrame({"b": [2]})})
    written = saved([first, first], tmp_path)
    assert len(written) == len(set(written)) == 3 + 4
    heads = sorted(path.read_text().split()[0] for path in written[3:])
    assert heads == ["a", "a", "b", "b"]


def test_what_cannot_be_written_leaves_what_was_there(lm, tmp_path):
    found = [study(lm)]
    (tmp_path / "gating.json").write_text("{}")
    with pytest.raises(MoeprofError, match="no report"):
        saved(found, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gating.json"]
    with pytest.raises(MoeprofError, match="cannot make"):
        saved(found, tmp_path / "gating.json" / "folder")
    with pytest.raises(MoeprofError, match=r"cannot write .*b"):
        writing.write_files({tmp_path / "a": "new", tmp_path / "no" / "b": "new"})
    (tmp_path / "a").write_text("old")
    with pytest.raises(MoeprofError, match="cannot write"):
        writing.write_files({tmp_path / "a": "new", tmp_path / "no" / "b": "new"})
    assert (tmp_path / "a").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"gating.json", "a"}
