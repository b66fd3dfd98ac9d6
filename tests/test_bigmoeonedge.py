"""A device's own cache log: imported, replayed, and equal to it row by row."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moeprof import replay
from moeprof.errors import MoeprofError, TraceError, UsageError
from moeprof.replay.cache import reference, streams
from moeprof.replay.cache.streams import Stream
from moeprof.trace import check
from moeprof.trace.foreign import import_trace
from moeprof.trace.reader import Trace
from moeprof.trace.schema import SlotStatus

DATA = (
    Path(os.environ.get("MOEPROF_DATA", Path(__file__).parents[2] / "shared" / "data"))
    / "bigmoeonedge-qwen3-30b-a3b"
)
ROUTE, CURVE = DATA / "qwen.route.csv", DATA / "qwen-curve.csv"
needs_data = pytest.mark.skipif(
    not ROUTE.is_file(), reason="set MOEPROF_DATA to the folder that holds the device log"
)
RUN_BUDGET = 4000 << 20
DECODE = 2

SMALL = """\
# route_trace v1
# model=/data/models/Tiny.gguf arch=tinymoe n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=7
# layer=1 expert_bytes=100 dense_bytes=7
# layer=2 expert_bytes=60 dense_bytes=7
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,1,0,3,0.6,0,100
0,0,0,1,1,1,0.4,0,100
0,0,1,1,0,1,0.7,1,0
0,0,1,1,1,2,0.3,0,100
0,0,1,2,0,0,0.5,0,60
0,0,1,2,1,2,0.5,0,60
0,1,2,1,0,3,0.9,1,0
0,1,2,1,1,0,0.1,0,100
0,1,2,2,0,2,0.5,2,0
0,1,2,2,1,3,0.5,0,60
1,0,3,1,0,3,1.0,1,0
1,0,3,2,0,3,1.0,1,0
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("device") / "qwen.moeprof"
    return import_trace(ROUTE, path, source_format="bigmoeonedge")


@cache
def _stream(trace: Trace) -> Stream:
    (stream,) = streams.streams(streams.read_rows(trace), scope="global")
    return stream


def _device_lookups() -> pd.DataFrame:
    """The log's first row of each expert in each dispatch, in order of execution."""
    rows = pd.read_csv(ROUTE, comment="#")
    rows["forward"] = np.where(rows["phase"] == 0, -1, rows["step"])
    rows = rows.sort_values(["turn", "forward", "layer", "step", "slot"], kind="stable")
    return rows.drop_duplicates(["turn", "forward", "layer", "expert"])


@needs_data
def test_import_passes_the_check(imported: Trace) -> None:
    result = check(imported)
    assert result.ok, result.problems
    assert len(imported.sites) == 48
    assert imported.requests["num_prompt_tokens"].tolist() == [28]
    assert imported.requests["num_output_tokens"].tolist() == [128]


@needs_data
def test_lru_equals_the_device_on_every_lookup(imported: Trace) -> None:
    device = _device_lookups()
    stream = _stream(imported)
    sizes = stream.key_bytes.tolist()
    replay = reference.replay(stream, "lru", sizes=sizes, capacity=RUN_BUDGET)
    assert len(device) == stream.num_lookups == 39_526
    np.testing.assert_array_equal(stream.key_expert[stream.key], device["expert"])
    np.testing.assert_array_equal(replay.hit, device["residency"] > 0)
    assert replay.most_used <= RUN_BUDGET
    assert round(100 * replay.hit.mean(), 2) == 74.88


@needs_data
def test_the_study_equals_the_device_and_the_published_curves(imported: Trace) -> None:
    """Every budget, to every printed digit, and every lookup at the run's own budget."""
    curve = pd.read_csv(CURVE)
    budgets = sorted(set(curve["budget_mib"]))
    assert len(budgets) == 11
    result = replay.buffering(
        imported, policies=["lru", "min"], capacities=[f"{each}MiB" for each in budgets],
        scope="global", jobs=1,
    )  # fmt: skip
    device = _device_lookups()
    lookups = result.lookups("lru", "4000MiB")
    np.testing.assert_array_equal(lookups["expert"], device["expert"])
    np.testing.assert_array_equal(lookups["layer"], device["layer"])
    np.testing.assert_array_equal(lookups["hit"], device["residency"] > 0)
    found = result.table.set_index(["policy", "capacity", "phase"]).sort_index()
    for published, policy in (("lru", "lru"), ("belady", "min")):
        for row in curve[curve["policy"] == published].itertuples():
            own = found.loc[policy, f"{row.budget_mib}MiB"]
            assert own.loc["all", "capacity_bytes"] == row.budget_mib << 20
            assert f"{100 * own.loc['all', 'hit_rate']:.3f}" == f"{row.hit_pct_cum:.3f}"
            assert f"{100 * own.loc['decode', 'hit_rate']:.3f}" == f"{row.hit_pct_decode:.3f}"
            assert f"{own.loc['all', 'bytes_moved'] / 2**20:.1f}" == f"{row.read_mib:.1f}"


@needs_data
def test_a_machine_equals_the_published_optimum(imported: Trace) -> None:
    """Belady by the slow reference, at the run's budget."""
    stream = _stream(imported)
    slow = reference.replay(stream, "min", sizes=stream.key_bytes.tolist(), capacity=RUN_BUDGET)
    assert f"{100 * slow.hit.mean():.3f}" == "86.472"
    assert f"{100 * slow.hit[stream.lookup_phase() == DECODE].mean():.3f}" == "92.716"


@needs_data
def test_one_token_at_a_time_would_be_wrong(imported: Trace) -> None:
    """Flat LRU, token by token, says 76.67 % where the device had 74.88 %."""
    rows = pd.read_csv(ROUTE, comment="#").sort_values(
        ["turn", "phase", "step", "layer", "slot"], kind="stable"
    )
    sizes = dict(zip(range(48), (site.expert_bytes for site in imported.sites), strict=True))
    resident: dict[tuple[int, int], int] = {}
    used = hits = 0
    for layer, expert in zip(rows["layer"], rows["expert"], strict=True):
        key = (layer, expert)
        if key in resident:
            hits += 1
            del resident[key]
        else:
            used += sizes[layer]
        resident[key] = sizes[layer]
        while used > RUN_BUDGET:
            used -= resident.pop(next(iter(resident)))
    assert round(100 * hits / len(rows), 2) == 76.67


def test_small_log(tmp_path: Path) -> None:
    source = tmp_path / "tiny.route.csv"
    source.write_text(SMALL)
    trace = import_trace(source, tmp_path / "tiny.moeprof", source_format="bigmoeonedge")
    result = check(trace)
    assert result.ok, result.problems
    assert [site.layer for site in trace.sites] == [1, 2]
    assert [site.expert_bytes for site in trace.sites] == [100, 60]
    assert trace.model.name == "Tiny.gguf"
    assert trace.steps["phase"].tolist() == ["prefill", "decode", "prefill"]
    assert trace.requests["num_prompt_tokens"].tolist() == [2, 1]
    routing = trace.routing()
    unseen = routing[
        (routing["request"] == 0) & (routing["position"] == 0) & (routing["site"] == 1)
    ]
    assert set(unseen["status"]) == {SlotStatus.PRUNED_LAST_LAYER}
    (stream,) = streams.streams(streams.read_rows(trace), scope="global")
    lookups = [
        (int(stream.key_site[key]), int(stream.key_expert[key])) for key in stream.key.tolist()
    ]
    assert lookups == [
        (0, 3),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
        (0, 3),
        (0, 0),
        (1, 2),
        (1, 3),
        (0, 3),
        (1, 3),
    ]
    # Prompt of layer 1: 3 1 | 1 2, so expert 1 was used later than 3, expert 2 last.
    assert stream.last[:3].tolist() == [0, 1, 2]


def imported_text(text: str, folder: Path) -> Trace:
    (folder / "log.csv").write_text(text)
    return import_trace(folder / "log.csv", folder / "log.moeprof", source_format="bigmoeonedge")


def test_unknown_weights_stay_unknown(tmp_path: Path) -> None:
    """The engine writes nan where the graph shows no weight; it is no fault of the file."""
    trace = imported_text(SMALL.replace(",0.6,", ",nan,"), tmp_path)
    result = check(trace)
    assert result.ok, result.problems
    assert "1 of 12 choices have no weight" in trace.info.notes[0]
    assert not trace.has_column("routing/decoder", "weight")
    assert {site.slot_order for site in trace.sites} == {"by_score"}
    assert (
        int(replay.buffering(trace, policies=["lru"], capacities=[1]).table["num_lookups"].max())
        == 11
    )


def test_discarded_choices_ran_nowhere(tmp_path: Path) -> None:
    """Newer files mark misses that were discarded instead of read."""
    head, rows = SMALL.split("expert_bytes\n0", 1)
    lines = ("0" + rows).splitlines()
    lines = [f"{line},{int(line.startswith('0,1,2,1,1'))}" for line in lines]
    text = head + "expert_bytes,dropped\n" + "\n".join(lines) + "\n"
    trace = imported_text(text, tmp_path)
    result = check(trace)
    assert result.ok, result.problems
    routing = trace.routing()
    (row,) = routing[routing["status"] == SlotStatus.DROPPED].to_dict("records")
    assert (row["expert"], row["layer"], row["weight"]) == (0, 1, 0.0)
    assert trace.layers["num_dropped"].sum() == 1
    assert (
        int(replay.buffering(trace, policies=["lru"], capacities=[1]).table["num_lookups"].max())
        == 10
    )


def test_routers_that_rank_by_another_score(tmp_path: Path) -> None:
    """Slots are in rank order; with a selection bias the weights need not fall."""
    trace = imported_text(SMALL.replace("0,3,0.6,0,100", "0,3,0.2,0,100"), tmp_path)
    result = check(trace)
    assert result.ok, result.problems
    assert [site.slot_order for site in trace.sites] == ["by_score", "by_weight"]


def test_any_order_columns_by_name_and_a_turn_that_only_decodes(tmp_path: Path) -> None:
    text = SMALL + "2,1,9,1,0,2,1.0,0,100\n2,1,9,2,0,2,1.0,0,60\n"
    start = text.index("turn,phase")
    frame = pd.read_csv(io.StringIO(text[start:])).sample(frac=1, random_state=0)
    frame = frame[frame.columns[::-1]].assign(note="x")
    changed = text[:start] + frame.to_csv(index=False).replace(",", ", ")
    trace = imported_text(changed, tmp_path)
    assert check(trace).ok
    plain = tmp_path / "plain"
    plain.mkdir()
    pd.testing.assert_frame_equal(trace.routing(), imported_text(text, plain).routing())
    assert trace.requests["num_prompt_tokens"].tolist() == [2, 1, 0]
    assert trace.requests["num_output_tokens"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("# route_trace v1", "# something else"), "is no route_trace v1"),
        (("n_expert=4", "n_expert=many"), "n_expert as a number"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,0,1,0,9,0.6,0,100"), "outside the 4 experts"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,0,1,0,x,0.6,0,100"), "column expert"),
        (("0,0,0,1,1,1,0.4,0,100", "0,0,0,1,0,1,0.4,0,100"), "twice"),
        (("residency,", ""), "lacks the column residency"),
        (("0,1,2,2,1,3,0.5,0,60", "0,7,2,2,1,3,0.5,0,60"), "phase"),
        (("# route_trace v1", "# route_trace v10"), "is no route_trace v1"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,0,1,0,2.5,0.6,0,100"), "column expert .* whole numbers"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,inf,1,0,3,0.6,0,100"), "column step .* whole numbers"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,0,99999,0,3,0.6,0,100"), "column layer .* up to 32,767"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,-1,1,0,3,0.6,0,100"), "without a position"),
        (("0,0,0,1,0,3,0.6,0,100", "0,0,0,1,0,3,inf,0,100"), "column weight"),
        (("0,0,0,1,1,1,0.4,0,100", "0,0,0,1,7,1,0.4,0,100"), "8 slots per token"),
    ],
)
def test_damaged_logs_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    source = tmp_path / "bad.route.csv"
    assert change[0] in SMALL
    source.write_text(SMALL.replace(*change))
    with pytest.raises(TraceError, match=message):
        import_trace(source, tmp_path / "bad.moeprof", source_format="bigmoeonedge")


def test_unknown_format_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format"):
        import_trace(tmp_path / "x", source_format="other")
    with pytest.raises(MoeprofError, match="no file"):
        import_trace(tmp_path / "x", source_format="bigmoeonedge")
