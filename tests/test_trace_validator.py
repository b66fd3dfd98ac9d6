"""Every way a trace can lie is named; honest traces pass."""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_tools import keep_rows, read_tables, rewrite, write_tables

from moeprof.errors import TraceError
from moeprof.trace import routing_rules, validator
from moeprof.trace import schema as spec
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.reader import open_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.synthetic import synthetic_trace
from moeprof.trace.validator import check

ROUTING = "routing/decoder"
PRUNED = SlotStatus.PRUNED_LAST_LAYER
EXITED = SlotStatus.EARLY_EXIT


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "lm.moeprof"
    return synthetic_trace(path, num_requests=20, num_sites=4, num_experts=16, top_k=2, batch=4)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    path = tmp_path_factory.mktemp("dropping") / "lm.moeprof"
    return synthetic_trace(path, num_requests=20, capacity_factor=1.0)


@pytest.fixture(scope="module")
def pruning(tmp_path_factory):
    """Its last layer saw one prompt token of each request, as Qwen's does."""
    path = tmp_path_factory.mktemp("pruning") / "lm.moeprof"
    return synthetic_trace(path, num_requests=20, prune_last_layer=True)


def errors(result):
    return {problem.code for problem in result.problems if problem.severity == "error"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stacks": ("encoder", "decoder"), "num_sequences": 3},
        {"mixed_steps": True, "capacity_factor": 1.25, "layer_stride": 2},
        {"prune_last_layer": True, "num_ranks": 2},
        {"top_k": [1, 2, 4, 3], "num_experts": [4, 8, 4, 40], "persistence": 0.9},
        {"weights": False, "executed": False, "timed": False},
        {"batch": 1, "prompt_tokens": 1, "output_tokens": 1, "length_spread": 0.0},
        {"skew": 2.0, "top_k": 1, "num_experts": 4},
    ],
    ids=str,
)
def test_honest_traces_pass(tmp_path, options):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=12, **options)
    result = check(trace)
    assert result.ok, result.problems
    assert result.codes == {"note"}
    assert result.num_tokens == trace.info.capture.num_tokens_recorded
    assert result.num_steps == len(trace.steps)
    assert check(trace.path) == result


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_requests=st.integers(1, 9),
    batch=st.integers(1, 5),
    prompt_tokens=st.integers(1, 12),
    output_tokens=st.integers(1, 6),
    num_sequences=st.integers(1, 3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_honest_trace_passes(tmp_path_factory, flags, **sizes):
    trace = synthetic_trace(
        tmp_path_factory.mktemp("any") / "a.moeprof",
        **sizes,
        mixed_steps=flags[0],
        prune_last_layer=flags[1],
        stacks=("encoder", "decoder") if flags[2] else ("decoder",),
        persistence=0.2,
    )
    assert check(trace).codes == {"note"}


def slots_of(trace, site):
    found = trace.sites[site]
    return slice(found.first_slot, found.first_slot + found.top_k)


def zero_a_site(tables):
    tables[ROUTING]["expert"][:, 2:4] = [0, 1]


def freeze_rows(tables):
    columns = tables[ROUTING]
    one = np.flatnonzero((columns["request"] == 3) & (columns["position"] >= 4))
    for name in ("expert", "weight"):
        columns[name][one] = columns[name][one[0]]


def repeat_an_id(tables):
    tables[ROUTING]["expert"][7, 3] = tables[ROUTING]["expert"][7, 2]


def shuffle_slots(tables):
    columns = tables[ROUTING]
    for name in ("expert", "weight"):
        columns[name][5, [0, 1]] = columns[name][5, [1, 0]]


def double_a_step(tables):
    """A pipeline stage that was recorded twice: every later step moves up by one."""
    for name in ("steps", "layers", "executed", ROUTING):
        columns = tables[name]
        again = columns["step"] == 9
        moved = np.where(columns["step"] > 9, columns["step"] + 1, columns["step"])
        for key in columns:
            columns[key] = np.concatenate([columns[key], columns[key][again]])
        columns["step"] = np.concatenate([moved, np.full(again.sum(), 10)])


def double_a_site(tables):
    for name in ("expert", "weight"):
        tables[ROUTING][name][:, 4:6] = tables[ROUTING][name][:, 0:2]


def record_padding(tables):
    """Rows of a finished request go on, as when nobody looked at the mask."""
    columns = tables[ROUTING]
    last = columns["position"][columns["request"] == 2].max()
    row = np.flatnonzero((columns["request"] == 2) & (columns["position"] == last))[0]
    later = np.unique(columns["step"][columns["step"] > columns["step"][row]])[:2]
    for key in columns:
        columns[key] = np.concatenate([columns[key], columns[key][[row, row]]])
    columns["step"][-2:] = later
    columns["row"][-2:] = 1000
    columns["position"][-2:] = [last + 1, last + 2]


def left_padding(tables):
    columns = tables[ROUTING]
    first = np.flatnonzero((columns["request"] == 1) & (columns["position"] == 0))[0]
    for key in columns:
        columns[key] = np.concatenate([columns[key], columns[key][[first, first]]])
    columns["position"][-2:] = [-1, -2]
    columns["row"][-2:] = [1000, 1001]


def drop_a_token(tables):
    columns = tables[ROUTING]
    keep_rows(columns, ~((columns["request"] == 3) & (columns["position"] == 6)))


def forget_a_token_at_a_site(tables):
    columns = tables[ROUTING]
    columns["expert"][11, 2:4] = -1
    columns["status"][11, 2:4] = SlotStatus.UNUSED
    columns["weight"][11, 2:4] = 0


def double_rows(tables):
    columns = tables[ROUTING]
    for key in columns:
        columns[key] = np.concatenate([columns[key], columns[key][20:25]])


def same_token_twice(tables):
    double_rows(tables)
    tables[ROUTING]["row"][-5:] += 1000


def not_a_number(tables):
    tables[ROUTING]["weight"][3, 1] = np.nan


def raw_weights(tables):
    tables[ROUTING]["weight"][:, 0:2] *= 0.5


def no_weights(tables):
    tables[ROUTING]["weight"][:, 0:2] = 0


def weigh_an_empty_slot(tables):
    columns = tables[ROUTING]
    columns["expert"][8, 1] = -1
    columns["status"][8, 1] = SlotStatus.UNUSED


def other_rows_executed(tables):
    executed = tables["executed"]
    of_site = np.flatnonzero(executed["site"] == 2)
    executed["num_executed_rows"][of_site] = 0
    executed["num_executed_rows"][of_site[executed["expert"][of_site] == 0]] = 99


def set_expert(value, status=None):
    def damage(tables):
        tables[ROUTING]["expert"][4, 2] = value
        if status is not None:
            tables[ROUTING]["status"][4, 2] = status

    return damage


def set_table(name, column, change):
    def damage(tables):
        tables[name][column] = change(tables[name][column])

    return damage


def increased(values):
    values = values.copy()
    values[6] += 1
    return values


def drop_row(name, index):
    def damage(tables):
        keep_rows(tables[name], np.arange(len(tables[name]["step"])) != index)

    return damage


def double_row(name, index):
    def damage(tables):
        for key, values in tables[name].items():
            tables[name][key] = np.concatenate([values, values[[index]]])

    return damage


def empty_stack_steps(tables):
    del tables[ROUTING]


def move_step(tables):
    for name in ("steps", "layers", "executed", ROUTING):
        tables[name]["step"] = np.where(
            tables[name]["step"] > 12, tables[name]["step"] + 3, tables[name]["step"]
        )


MUTANTS = {
    "frozen_site": zero_a_site,
    "stale_rows": freeze_rows,
    "repeated_expert": repeat_an_id,
    "slots_out_of_order": shuffle_slots,
    "doubled_step": double_a_step,
    "doubled_site": double_a_site,
    "padding_recorded": record_padding,
    "negative_position": left_padding,
    "position_gap": drop_a_token,
    "token_missing": forget_a_token_at_a_site,
    "doubled_row": double_rows,
    "doubled_token": same_token_twice,
    "weight_not_finite": not_a_number,
    "weight_sum": raw_weights,
    "zero_weights": no_weights,
    "weight_without_routing": weigh_an_empty_slot,
    "executed_disagrees": other_rows_executed,
    "executed_too_few": set_table("executed", "num_routed_rows", lambda rows: rows * 0),
    "expert_out_of_range": set_expert(16),
    "routed_without_expert": set_expert(-1),
    "expert_without_routing": set_expert(3, SlotStatus.UNUSED),
    "status_mixed": set_expert(-1, PRUNED),
    "unknown_status": set_expert(3, 9),
    "step_tokens": set_table("steps", "num_tokens", increased),
    "step_phase": set_table("steps", "phase", lambda phase: np.full_like(phase, "decode")),
    "step_unknown": drop_row("steps", -1),
    "step_gap": move_step,
    "doubled_step_row": double_row("steps", 5),
    "layer_tokens": set_table("layers", "num_tokens", increased),
    "layer_active_experts": set_table("layers", "num_active_experts", increased),
    "dispatch_missing": drop_row("layers", 10),
    "doubled_dispatch": double_row("layers", 10),
    "token_phase": set_table(ROUTING, "phase", lambda phase: np.full_like(phase, "decode")),
    "tokens_recorded": drop_a_token,
}
"""Damage to an honest trace, by the code that must name it."""


def step_unknown(tables):
    drop_row("steps", len(tables["steps"]["step"]) - 1)(tables)


MUTANTS["step_unknown"] = step_unknown


@pytest.mark.parametrize("code", sorted(MUTANTS))
def test_mutants_are_named(lm, tmp_path, code):
    result = check(rewrite(lm, tmp_path / "a.moeprof", MUTANTS[code]))
    assert code in errors(result), result.problems
    assert not result.ok
    for problem in result.problems:
        assert "{" not in problem.message
        assert "\n" not in problem.message
        assert problem.severity in ("error", "warning", "note")


def test_messages_say_where_and_how_often(lm, tmp_path):
    result = check(rewrite(lm, tmp_path / "a.moeprof", set_expert(16)))
    (problem,) = [each for each in result.problems if each.code == "expert_out_of_range"]
    assert problem.table == ROUTING
    assert problem.where == "site 1 (decoder layer 1)"
    assert problem.message == (
        "site 1 (decoder layer 1): 1 slots name an expert outside 0..15 "
        "(first: step 0, request 0, position 4)"
    )
    assert result.problems[0].severity == "error", "worst first"


def test_executed_rows_are_told_plainly(lm, tmp_path):
    result = check(rewrite(lm, tmp_path / "a.moeprof", other_rows_executed))
    (problem,) = [each for each in result.problems if each.code == "executed_disagrees"]
    assert problem.where == "site 2 (decoder layer 2)"
    assert "executed by expert 0" in problem.message
    assert re.search(r"rows routed to 16 experts", problem.message)


def test_executed_counts_of_the_recorder_alone(lm, tmp_path):
    counts = dataclasses.replace(
        lm.info.capture, num_executed_disagreeing=3, execution_note="experts {0, 1} ran"
    )
    result = check(rewrite(lm, tmp_path / "a.moeprof", capture=counts))
    (problem,) = [each for each in result.problems if each.code == "executed_disagrees"]
    assert problem.message.endswith("dispatches: experts {0, 1} ran")


def test_dropped_tokens(dropping, tmp_path):
    assert check(dropping).ok
    result = check(
        rewrite(dropping, tmp_path / "a.moeprof", set_table("layers", "num_dropped", increased))
    )
    assert errors(result) == {"layer_dropped"}
    result = check(
        rewrite(dropping, tmp_path / "b.moeprof", set_table("layers", "capacity", lambda c: c - 1))
    )
    assert errors(result) == {"capacity_exceeded"}


def test_a_last_layer_that_saw_one_prompt_token_passes(pruning):
    status = pruning.routing(stack="decoder", phase="prefill", layers=3)["status"]
    assert (status == PRUNED).sum() > 100
    assert check(pruning).codes == {"note"}


@pytest.mark.parametrize("case", ["last prompt token", "decode token", "inner site", "a hole"])
def test_the_same_with_another_token_missing_fails(pruning, tmp_path, case):
    last = slice(6, 8)

    def damage(tables):
        columns = tables[ROUTING]
        prompt = columns["phase"] == "prefill"
        unseen = columns["status"][:, 7] == PRUNED
        row, slots = {
            "last prompt token": (np.flatnonzero(prompt & ~unseen)[0], last),
            "decode token": (np.flatnonzero(~prompt)[0], last),
            "inner site": (np.flatnonzero(prompt)[0], slice(2, 4)),
            "a hole": (0, last),
        }[case]
        if case == "a hole":
            # The first prompt token is seen, and the next is not.
            columns["status"][row, slots] = 0
            columns["expert"][row, slots] = [1, 2]
            columns["weight"][row, slots] = [0.5, 0.5]
            return
        columns["status"][row, slots] = PRUNED
        columns["expert"][row, slots] = -1
        columns["weight"][row, slots] = 0

    result = check(rewrite(pruning, tmp_path / "a.moeprof", damage))
    assert "token_missing" in errors(result), result.problems


def test_early_exit_is_final(lm, tmp_path):
    def leave(tables, *, come_back):
        columns = tables[ROUTING]
        for slots in (slice(4, 6), slice(6, 8))[: 1 if come_back else 2]:
            columns["status"][30, slots] = EXITED
            columns["expert"][30, slots] = -1
            columns["weight"][30, slots] = 0

    result = check(rewrite(lm, tmp_path / "a.moeprof", lambda t: leave(t, come_back=False)))
    assert "exit_not_final" not in result.codes
    assert "token_missing" not in result.codes
    result = check(rewrite(lm, tmp_path / "b.moeprof", lambda t: leave(t, come_back=True)))
    assert "exit_not_final" in errors(result)


def by_hand(path, tokens, **options):
    return hand_trace(path, [[token] for token in tokens], **options)


def token(position, *, sequence=0, parent=None, request=0, experts=((0, 1), (2, 3))):
    return HandToken(
        request=request, position=position, sequence=sequence, parent=parent, experts=experts
    )


def test_beams_continue_their_parent(tmp_path):
    first = [token(0), token(0, sequence=1)]
    fine = [first, [token(1, sequence=0, parent=1), token(1, sequence=1, parent=1)]]
    assert "position_gap" not in check(hand_trace(tmp_path / "a.moeprof", fine)).codes
    expanded = [[token(0)], [token(1), token(1, sequence=1)]]
    assert "position_gap" not in check(hand_trace(tmp_path / "b.moeprof", expanded)).codes
    torn = [[token(0)], [token(1), token(2, sequence=1, parent=0)]]
    assert "position_gap" not in check(hand_trace(tmp_path / "c.moeprof", torn)).codes
    gap = [[token(0)], [token(1), token(3, sequence=1, parent=0)]]
    assert "position_gap" in check(hand_trace(tmp_path / "d.moeprof", gap)).codes
    orphan = [first, [token(1), token(1, sequence=1, parent=7)]]
    assert "position_gap" in check(hand_trace(tmp_path / "e.moeprof", orphan)).codes


def test_positions_are_followed_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("moeprof.trace.blocks.BLOCK_SLOTS", 1)
    monkeypatch.setattr("moeprof.trace.encoding.ROUTING_GROUP_ROWS", (2, 2))
    whole = [token(position, experts=((position % 8, 9),)) for position in range(9)]
    assert check(by_hand(tmp_path / "a.moeprof", whole, num_experts=16)).ok
    torn = by_hand(tmp_path / "b.moeprof", whole[:5] + whole[6:], num_experts=16)
    assert "position_gap" in errors(check(torn))
    again = by_hand(tmp_path / "c.moeprof", whole[:5] + whole[3:], num_experts=16)
    assert "repeated_position" in check(again).codes
    late = by_hand(tmp_path / "d.moeprof", whole[4:], num_experts=16)
    assert check(late).ok
    assert "late_start" in check(late).codes


def test_rejected_speculation_may_repeat_positions(lm, tmp_path):
    def speculate(tables, *, accepted):
        columns = tables[ROUTING]
        last = np.flatnonzero(columns["request"] == 5)[-1]
        for key in columns:
            columns[key] = np.concatenate([columns[key], columns[key][[last]]])
        columns["row"][-1] += 1000
        columns["accepted"] = np.array([True] * (len(columns["row"]) - 1) + [accepted])

    rejected = check(rewrite(lm, tmp_path / "a.moeprof", lambda t: speculate(t, accepted=False)))
    assert "doubled_token" not in rejected.codes
    kept = check(rewrite(lm, tmp_path / "b.moeprof", lambda t: speculate(t, accepted=True)))
    assert "doubled_token" in kept.codes


def test_a_collapsed_router_is_a_warning(tmp_path):
    trace = synthetic_trace(tmp_path / "a.moeprof", num_requests=12, top_k=1, num_sites=2)

    def collapse(tables, weights):
        tables[ROUTING]["expert"][:, 0] = 3
        tables[ROUTING]["weight"][:, 0] = weights

    free = tuple(dataclasses.replace(site, renormalized=False) for site in trace.sites)
    many = np.random.default_rng(0).uniform(0.1, 0.9, trace.info.capture.num_tokens_recorded)
    for name, weights, severity in (("b", many, "warning"), ("c", 0.5, "error")):
        path = tmp_path / f"{name}.moeprof"
        result = check(rewrite(trace, path, lambda t, w=weights: collapse(t, w), sites=free))
        (problem, *_) = [each for each in result.problems if each.code == "frozen_site"]
        assert problem.severity == severity


def test_capture_counts(lm, tmp_path):
    capture = lm.info.capture
    cases = {
        "calls_missing": {"num_calls_seen": capture.num_calls_seen - 1},
        "tokens_unaccounted": {"num_tokens_seen": capture.num_tokens_seen + 5},
        "tokens_recorded": {
            "num_tokens_recorded": capture.num_tokens_recorded - 1,
            "num_tokens_dropped": 1,
        },
    }
    for code, changes in cases.items():
        counts = dataclasses.replace(capture, **changes)
        result = check(rewrite(lm, tmp_path / f"{code}.moeprof", capture=counts))
        assert errors(result) == {code}
    assert "tokens_dropped" in result.codes


def test_an_unfinished_recording_is_a_warning(lm, tmp_path):
    path = tmp_path / "a.moeprof"
    shutil.copytree(lm.path, path)
    log = path / "commits-r00000.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    result = check(path)
    assert result.ok
    assert result.codes == {"incomplete", "note"}


def test_requests_without_a_row(lm, tmp_path):
    def forget(tables):
        keep_rows(tables["requests"], tables["requests"]["request"] != 4)

    result = check(rewrite(lm, tmp_path / "a.moeprof", forget))
    assert result.ok
    assert "request_unknown" in result.codes


def test_routing_that_is_missing_altogether(lm, tmp_path):
    result = check(rewrite(lm, tmp_path / "a.moeprof", empty_stack_steps))
    assert "step_tokens" in errors(result)


def test_nonsense_geometry(lm, tmp_path):
    path = tmp_path / "a.moeprof"
    sites = tuple(dataclasses.replace(site, first_slot=0) for site in lm.sites)
    tables = read_tables(lm)
    trace = write_tables(path, lm.info, tables)
    trace.info = dataclasses.replace(lm.info, sites=sites)
    assert "bad_geometry" in errors(check(trace))
    trace.info = dataclasses.replace(lm.info, sites=())
    assert "bad_geometry" in errors(check(trace))


def test_damage_is_reported_not_raised(lm, tmp_path):
    part = lm.parts(ROUTING)[0].path
    other = lm.parts("layers")[0].path

    def cut(path):
        path.write_bytes(path.read_bytes()[:-50])

    def scramble(path):
        data = path.read_bytes()
        footer = int.from_bytes(data[-8:-4], "little") + 8
        body = data[:4] + bytes(255 - byte for byte in data[4:-footer])
        path.write_bytes(body + data[-footer:])

    def shorten(path):
        pq.write_table(pq.read_table(path).slice(5), path)

    def lose_column(path):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([table.column_names[3]]), path)

    for number, (victim, damage, code) in enumerate(
        [
            (part, cut, "part_damaged"),
            (part, scramble, "part_damaged"),
            (part, Path.unlink, "part_damaged"),
            (part, shorten, "part_rows"),
            (part, lose_column, "column_missing"),
            (other, cut, "part_damaged"),
            (other, scramble, "part_damaged"),
            (other, lose_column, "column_missing"),
        ]
    ):
        path = tmp_path / f"{number}.moeprof"
        shutil.copytree(lm.path, path)
        damage(path / victim)
        result = check(path)
        assert code in errors(result), (number, result.problems)


def test_rows_out_of_order_are_reported(lm, tmp_path):
    path = tmp_path / "a.moeprof"
    shutil.copytree(lm.path, path)
    part = path / lm.parts(ROUTING)[0].path
    table = pq.read_table(part)
    pq.write_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), part)
    assert "part_damaged" in errors(check(path))
    with pytest.raises(TraceError, match="not in order of execution"):
        list(open_trace(path).blocks("decoder"))


def test_what_cannot_be_opened_raises(tmp_path):
    with pytest.raises(TraceError):
        check(tmp_path)


def test_many_decisions_in_seconds(tmp_path):
    trace = synthetic_trace(
        tmp_path / "a.moeprof",
        num_requests=150,
        num_sites=12,
        num_experts=64,
        top_k=8,
        prompt_tokens=60,
        output_tokens=40,
        batch=16,
    )
    start_s = time.process_time()
    result = check(trace)
    elapsed_s = time.process_time() - start_s
    assert result.ok
    assert result.num_decisions / elapsed_s > 400_000


def test_every_code_is_documented():
    sources = "".join(
        Path(module.__file__).read_text(encoding="utf-8") for module in (validator, routing_rules)
    )
    used = set(re.findall(r'(?:add|_add)\(\s*"([a-z_]+)"', sources))
    used |= set(re.findall(r'\("(layer_[a-z_]+)", "num_', sources))
    spec_text = (Path(__file__).parents[1] / "traces" / "README.md").read_text(encoding="utf-8")
    section = spec_text.split("## What `moeprof check` finds")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", section, flags=re.M))
    assert used == documented
    assert set(MUTANTS) <= used


def test_statuses_are_all_known():
    assert [status.value for status in SlotStatus] == list(range(len(SlotStatus)))
    assert spec.TOKEN_PHASES == ("encode", "prefill", "decode")
    assert pd.Index(spec.PHASES).is_unique
