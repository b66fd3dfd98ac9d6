"""The report: self-contained, escaped, small, in order, and drawn from its JSON alone."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from replay_tools import mark_trained

import moeprof
from moeprof.errors import MoeprofError, UsageError
from moeprof.reporting import Report, document, layout
from moeprof.reporting.markdown import markdown_page
from moeprof.reporting.page import html_page
from moeprof.trace import schema
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.synthetic import synthetic_trace

HOSTILE = '<script>alert("x")</script>"&\'|`*{{ 7*7 }}'
MAX_PAGE_BYTES = 3_000_000


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "lm.moeprof"
    trace = synthetic_trace(path, num_requests=32, num_sites=3, layer_stride=2, seed=1)
    return mark_trained(trace)


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    path = tmp_path_factory.mktemp("mt") / "mt.moeprof"
    trace = synthetic_trace(
        path, num_requests=32, num_sites=2, stacks=("encoder", "decoder"), seed=2,
        domains=("German", "French"),
    )  # fmt: skip
    return mark_trained(trace)


@pytest.fixture(scope="module")
def report(lm, mt):
    return moeprof.report([lm, mt])


class Page(HTMLParser):
    """Collects what a test wants to know of a page."""

    VOID = frozenset({"meta", "img", "br", "hr"})

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.tags, self.open = [], [], [], [], []
        self.images_without_alt = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        self.images_without_alt += tag == "img" and not found.get("alt")
        self.images_without_alt += tag == "svg" and not found.get("aria-label")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(report):
    page = Page(report.html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in report.html
    assert "@import" not in report.html
    assert not re.search(r"https?://", report.html)
    assert len(report.html.encode()) < MAX_PAGE_BYTES


def test_links_lead_somewhere_and_figures_can_be_read_aloud(report):
    page = Page(report.html)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.images_without_alt == 0


def test_both_colour_schemes_and_print(report):
    assert "prefers-color-scheme:dark" in report.html
    assert "@media print" in report.html


def test_the_order_of_the_page(report):
    positions = [report.html.index(mark) for mark in (
        "<h1>", 'class="verdict"', "<h2 id=\"findings-title\"", 'id="comparison"',
        'id="lm-run"', 'id="lm-latency"', 'id="lm-memory"', 'id="lm-activation"',
        'id="lm-locality"', 'id="lm-batching"', 'id="lm-gating"', 'id="lm-buffering"',
        'id="lm-balancing"', 'id="mt-run"', 'id="mt-batching"', 'id="method"',
    )]  # fmt: skip
    assert positions == sorted(positions)
    names = [section["name"] for section in report.json_data["traces"][0]["sections"]]
    assert names == list(layout.SECTIONS)
    assert names[:5] == ["latency", "memory", "activation", "locality", "batching"]
    assert names[5:] == ["gating", "buffering", "balancing"]


def test_every_figure_says_how_to_read_it(report):
    figures = [f for t in report.json_data["traces"] for s in t["sections"] for f in s["figures"]]
    assert {figure["kind"] for figure in figures} == {"bars", "lines", "layers", "heat", "meters"}
    assert all(figure["how_to_read"].endswith(".") for figure in figures)
    assert report.html.count("<figure") == len(figures)
    assert report.html.count("<b>How to read</b>") == len(figures)


def test_the_pages_are_drawn_from_the_json_alone(report):
    data = json.loads(report.json)
    assert html_page(data) == report.html
    assert markdown_page(data) == report.markdown
    assert data["moeprof_report"] == layout.REPORT_VERSION
    assert "NaN" not in report.json


def test_the_json_has_the_documented_structure(report):
    data = report.json_data
    for kind, value in (
        (layout.ReportData, data),
        (layout.TraceData, data["traces"][0]),
        (layout.SectionData, data["traces"][0]["sections"][0]),
        (layout.MetricData, data["traces"][0]["sections"][0]["metrics"][0]),
        (layout.FigureData, data["traces"][0]["sections"][0]["figures"][0]),
        (layout.TableData, data["traces"][0]["sections"][0]["tables"][0]),
        (layout.FindingData, data["findings"][0]),
        (layout.FactData, data["traces"][0]["facts"][0]),
    ):
        assert set(value) == set(kind.__annotations__)
    names = [m["name"] for s in data["traces"][0]["sections"] for m in s["metrics"]]
    assert len(names) == len(set(names))
    classes = {m["figure_class"] for t in data["traces"] for s in t["sections"]
               for m in s["metrics"]}  # fmt: skip
    assert classes <= {"exact", "estimate", "measured"}


def test_three_to_seven_findings_worst_first_from_each_trace(report):
    findings = report.findings
    assert 3 <= len(findings) <= document.MAX_FINDINGS
    severities = [finding.severity for finding in findings]
    assert severities == sorted(severities, reverse=True)
    assert {finding.trace for finding in findings} == {"lm", "mt"}
    assert "Finding" in repr(findings[0])


def test_one_trace_makes_a_page_too(lm):
    one = moeprof.report(lm, title="A title")
    assert one.json_data["comparison"] is None
    assert 'id="comparison"' not in one.html
    assert "<h1>A title</h1>" in one.html
    assert one.markdown.startswith("# A title\n")


def test_hostile_names_are_shown_not_run(lm):
    model = dataclasses.replace(lm.info.model, name=HOSTILE, architecture=HOSTILE)
    info = dataclasses.replace(
        lm.info, model=model, command=HOSTILE, notes=(HOSTILE,),
        hardware=dataclasses.replace(lm.info.hardware, device_name=HOSTILE, cpu_name=HOSTILE),
        versions={"torch": HOSTILE},
    )  # fmt: skip
    trace = copied(lm, info)
    trace.requests = trace.requests.assign(
        domain=np.where(trace.requests["request"] % 2, HOSTILE, "<b>other</b>")
    )
    found = moeprof.report(trace)
    assert "script" not in Page(found.html).tags
    assert "<script" not in found.html
    assert html.escape(HOSTILE, quote=False)[:20] in found.html
    assert "49" not in re.findall(r"\{\{.*?\}\}", found.html)
    assert "{{ 7*7 }}" in found.html
    assert "<script" not in found.markdown
    assert "<script" not in found._repr_html_()


def copied(trace, info):
    other = moeprof.open(trace.path)
    other.info = info
    return other


def test_random_weights_stand_in_a_banner(tmp_path):
    trace = synthetic_trace(tmp_path / "t.moeprof", num_requests=16, seed=3)
    found = moeprof.report(trace)
    assert any("weights are random" in banner for banner in found.json_data["traces"][0]["banners"])
    assert 'class="banner"' in found.html
    assert "random weights: routing left out" in found.json_data["verdict"]
    assert sum("random" in finding.text for finding in found.findings) == 1


def test_disagreeing_execution_comes_first(lm):
    capture = dataclasses.replace(
        lm.info.capture, num_executed_checked=50, num_executed_disagreeing=40,
        execution_note="experts 0 and 1 run only",
    )  # fmt: skip
    notes = ("executed rows disagree with routed rows",)
    found = moeprof.report(copied(lm, dataclasses.replace(lm.info, capture=capture, notes=notes)))
    assert "40 of 50 dispatches (experts 0 and 1 run only)" in found.findings[0].text
    assert len(found.json_data["traces"][0]["banners"]) == 1
    assert "needs attention" in found.json_data["verdict"]


def test_what_is_wrong_with_a_recording_is_said(lm):
    capture = dataclasses.replace(
        lm.info.capture, num_calls_expected=10, num_calls_seen=8, num_tokens_dropped=5,
        num_tokens_seen=50, num_padded_tokens=3,
    )  # fmt: skip
    trace = copied(lm, dataclasses.replace(lm.info, capture=capture, missing_ranks=(1,)))
    trace.complete = False
    said = " ".join(moeprof.report(trace).json_data["traces"][0]["banners"])
    for words in ("rank 1", "8 of 10", "did not end", "10% of the tokens"):
        assert words in said


def test_too_few_requests_are_said_once(tmp_path):
    trace = mark_trained(synthetic_trace(tmp_path / "t.moeprof", num_requests=4, seed=1))
    found = moeprof.report(trace)
    assert sum("record about 6 more" in finding.text for finding in found.findings) == 1
    metrics = [m for s in found.json_data["traces"][0]["sections"] for m in s["metrics"]]
    assert all(metric["low"] is None for metric in metrics)
    assert "no interval" in found.html


def test_run_facts_tell_what_is_known(lm):
    info = dataclasses.replace(
        lm.info,
        model=dataclasses.replace(lm.info.model, weight_hash="abcdef0123456789", fixes=("f",)),
        kernels={"decode": "eager"},
        hardware=schema.Hardware(
            device="cuda", device_name="GPU", num_devices=2, device_memory_bytes=80 << 30,
            driver="1.2", cpu_name="CPU", num_cpus=1, host_memory_bytes=1 << 30,
        ),
        versions={"torch": "2.13", "unlisted": "9"},
        origin={"source": "somewhere"},
    )  # fmt: skip
    facts = {f["label"]: f["lines"] for f in
             moeprof.report(copied(lm, info)).json_data["traces"][0]["facts"]}  # fmt: skip
    assert "weights abcdef012345" in facts["Model"]
    assert facts["Device"] == ["2 x GPU, 80 GiB", "CPU, 1 CPU, 1 GiB host memory", "driver 1.2"]
    assert facts["Versions"] == ["torch 2.13"]
    assert facts["Origin"] == ["source: somewhere"]
    assert facts["MoE layers"][-1] == "experts run by decode: eager"


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_steps": True},
        {"prune_last_layer": True, "num_experts": [4, 8, 16, 8], "top_k": [1, 2, 4, 2]},
        {"capacity_factor": 0.5, "stacks": ("encoder", "decoder")},
        {"timed": False, "weights": False, "executed": False},
        {"num_ranks": 2},
        {"num_sequences": 3, "stacks": ("encoder", "decoder")},
        {"num_requests": 1},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 4, "top_k": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_odd_traces_make_pages(tmp_path, options):
    settings = {"num_requests": 12, "output_tokens": 8, **options}
    found = moeprof.report(mark_trained(synthetic_trace(tmp_path / "t.moeprof", **settings)))
    assert found.findings
    for text in (found.html, found.markdown, found.json):
        assert not re.search(r"\b(nan|NaN|inf|None)\b", re.sub(r"base64,[^\"]*", "", text))


def test_a_single_token_makes_a_page(tmp_path):
    token = HandToken(request=0, position=0, experts=[[0, 1]], phase="prefill")
    found = moeprof.report(hand_trace(tmp_path / "t.moeprof", [[token]]))
    assert "average step of 1 token" in found.markdown
    assert "Nothing was recorded" in found.html


def test_the_largest_page_stays_small(tmp_path):
    trace = synthetic_trace(
        tmp_path / "big.moeprof", num_requests=96, num_sites=12, num_experts=512, top_k=10,
        batch=1, prompt_tokens=40, output_tokens=12, seed=4, executed=False, weights=False,
    )  # fmt: skip
    page = moeprof.report(mark_trained(trace)).html
    assert page.count("data:image/png") == 12 * 3
    assert len(page.encode()) < MAX_PAGE_BYTES


def test_saving_writes_the_data_first(report, tmp_path):
    written = report.save(tmp_path / "page.html")
    assert [path.name for path in written] == ["page.json", "page.html"]
    assert json.loads((tmp_path / "page.json").read_text()) == report.json_data
    assert (tmp_path / "page.html").read_text() == report.html
    assert report.save(tmp_path / "page.md")[1].read_text() == report.markdown
    assert report.save(str(tmp_path / "only.json")) == (tmp_path / "only.json",)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"page.json", "page.html", "page.md", "only.json"}


def test_saving_keeps_foreign_files(report, tmp_path):
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    with pytest.raises(MoeprofError, match="no report"):
        report.save(tmp_path / "package.html")
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'
    assert not (tmp_path / "package.html").exists()


def test_saving_elsewhere_is_one_line(report, tmp_path):
    with pytest.raises(UsageError, match="format"):
        report.save(tmp_path / "page.pdf")
    with pytest.raises(MoeprofError, match="cannot write"):
        report.save(tmp_path / "no" / "such" / "page.html")
    with pytest.raises(UsageError, match="no trace"):
        moeprof.report([])


def test_paths_are_opened(tmp_path):
    small = synthetic_trace(
        tmp_path / "lm.moeprof", num_requests=2, num_sites=1, num_experts=4, output_tokens=4
    )
    assert moeprof.report(small.path).json_data["traces"][0]["name"] == "lm"
    twice = moeprof.report([small, small.path]).json_data["traces"]
    assert [trace["id"] for trace in twice] == ["lm", "lm-2"]


def test_notebooks_get_a_frame(report):
    frame = report._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert Page(frame).tags == ["iframe"]
    assert "2 traces" not in repr(report)
    assert "findings" in repr(report)
    assert isinstance(report, Report)


def test_markdown_has_the_same_order_and_numbers(report):
    text = report.markdown
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    assert titles[:3] == ["synthetic", "Findings", "Side by side"]
    assert titles.count("Latency breakdown") == 2
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}
        assert len(widths) == 1
    assert text.count("How to read:") == report.html.count("<b>How to read</b>")
