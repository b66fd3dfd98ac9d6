"""Load balancing on whole traces: windows, headline, verdicts, transfer, replanning."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trace_tools import rewrite

from moeprof.errors import MoeprofError, UsageError
from moeprof.replay import balancing, transfer, windows
from moeprof.replay.planners import DEFAULT_PLANNERS
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.schema import RankInfo
from moeprof.trace.synthetic import synthetic_trace

FEW = ("contiguous", "greedy", "eplb", "second_moment")


@pytest.fixture(scope="module")
def by_domain(tmp_path_factory):
    """One prompt of about 300 tokens at a time, each domain with favourites of its own."""
    trace = synthetic_trace(
        tmp_path_factory.mktemp("traces") / "domains",
        num_requests=64,
        num_sites=2,
        num_experts=32,
        top_k=4,
        seed=1,
        skew=0.8,
        domain_share=1.0,
        persistence=0.2,
        batch=1,
        prompt_tokens=300,
        output_tokens=2,
        length_spread=0.1,
        executed=False,
        timed=False,
    )
    return rewrite(
        trace,
        tmp_path_factory.mktemp("traces") / "trained",
        model=dataclasses.replace(trace.model, random_weights=False),
    )


@pytest.fixture(scope="module")
def result(by_domain):
    return balancing(by_domain, devices=8)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("traces") / "uniform",
        num_requests=80,
        num_sites=2,
        num_experts=32,
        top_k=4,
        seed=2,
        skew=0.0,
        persistence=0.0,
        batch=1,
        prompt_tokens=300,
        output_tokens=1,
        executed=False,
        timed=False,
    )


def row(result, planner):
    return result.table.set_index("planner").loc[planner]


def test_ours_beat_eplb_and_greedy_on_unseen_dispatches(result):
    for name in ("second_moment", "peak"):
        found = row(result, name)
        assert found.gain_over_eplb_low > 0.05, name
        assert found.gain_over_eplb_low < found.gain_over_eplb < found.gain_over_eplb_high
        assert found.mean_max_over_mean < row(result, "greedy").mean_max_over_mean
    assert row(result, "eplb").gain_over_eplb == 0
    assert row(result, "contiguous").gain_over_nothing_low == 0


def test_robust_has_the_best_worst_domain(result):
    worst = result.table.set_index("planner")["worst_domain_max_over_mean"]
    assert worst["robust"] < worst[["greedy", "eplb", "second_moment"]].min()


def test_table_is_complete(result):
    assert result.table["planner"].tolist() == list(DEFAULT_PLANNERS)
    assert (result.table["figure_class"] == "exact").all()
    assert (result.table["mean_tokens"] >= 256).all()
    assert (result.table["floor_max_over_mean"] <= result.table["mean_max_over_mean"]).all()
    assert (result.table["avg_max_load"] * 8).tolist() == pytest.approx(
        result.table["mean_max_over_mean"].tolist()
    )
    for name, frame in result.tables.items():
        assert len(frame), name
        assert (frame["stack"] == "decoder").all(), name
    metric = result.metric("balancing/gain_over_eplb/decoder/second_moment")
    assert metric.low < metric.value < metric.high
    assert metric.figure_class == "exact"


def test_verdict_and_its_numbers(result):
    first = result.findings[0].text
    assert first.startswith("Try placing experts by ")
    assert "95%" in first
    assert "no placement can save more than" in first
    assert any(finding.text.startswith("Against EPLB") for finding in result.findings)
    assert any("planned on one domain" in finding.text.lower() for finding in result.findings)


def test_conservation(by_domain, result):
    passes = windows.passes(by_domain, "decoder")
    judged = passes.judged[passes.part_pass[passes.part_of_token]].sum()
    devices = result.tables["devices"]
    rows = devices.groupby(["planner", "site"])["num_rows"].sum()
    assert rows.to_numpy() == pytest.approx(judged * 4)
    assert len(passes.token_order) == len(passes.tokens.dispatch)


def test_nothing_comes_from_window_b(by_domain, tmp_path):
    passes = windows.passes(by_domain, "decoder")
    judged_steps = set(passes.tokens.dispatch_step[passes.judged].tolist())
    order = np.random.default_rng(0).permutation(32)

    def scramble(tables):
        columns = tables["routing/decoder"]
        chosen = np.isin(columns["step"], list(judged_steps))
        columns["expert"][chosen] = order[columns["expert"][chosen]]

    scrambled = rewrite(by_domain, tmp_path / "scrambled", scramble)
    before = balancing(by_domain, planners=FEW)
    after = balancing(scrambled, planners=FEW)
    pd.testing.assert_frame_equal(before.tables["placements"], after.tables["placements"])
    pd.testing.assert_frame_equal(before.tables["choice"], after.tables["choice"])
    assert not before.table.equals(after.table)


def test_uniform_routing_cannot_be_improved(uniform):
    found = balancing(uniform, devices=8)
    gains = found.table.set_index("planner").drop(index="contiguous")
    assert (gains["gain_over_nothing"].abs() < 0.015).all()
    assert (gains["gain_over_nothing_low"] < 0.01).all()
    nothing = row(found, "contiguous")
    assert nothing.mean_max_over_mean == pytest.approx(nothing.uniform_max_over_mean, rel=0.01)


def test_random_weights_are_said_and_nothing_is_concluded(uniform):
    found = balancing(uniform, planners=("eplb",))
    assert [finding.text.startswith("The weights are random") for finding in found.findings] == [
        True
    ]


def test_transfer_between_domains(result):
    frame = result.tables["transfer"]
    mine = frame[frame["planner"] == "second_moment"].set_index(["planned_on", "judged_on"])
    ratio = mine["mean_max_over_mean"]
    domains = ["news", "scripture", "code", "manual"]
    for name in domains:
        foreign = [ratio[other, name] for other in domains if other != name]
        assert ratio[name, name] < min(foreign)
        assert ratio["(all)", name] < np.mean(foreign)
        assert ("(others)", name) in ratio.index


def test_replanning_charges_bytes(result):
    frame = result.tables["replanning"].set_index(["planner", "num_plans"])
    assert (frame.loc["contiguous"]["bytes_moved"] == 0).all()
    once = frame.loc[("eplb", 1)]
    again = frame.loc[("eplb", 4)]
    assert once["bytes_moved"] == 0
    assert again["bytes_moved"] == again["num_experts_moved"] << 20
    assert 0 < again["bytes_moved_relabelled"] <= again["bytes_moved"]
    # Three changes of two sites of 32 experts of 1 MiB: more cannot move.
    assert again["bytes_moved"] <= 3 * 2 * 32 << 20


def test_replanning_experts_of_unknown_size(by_domain, tmp_path):
    sites = tuple(dataclasses.replace(site, expert_bytes=0) for site in by_domain.sites)
    trace = rewrite(by_domain, tmp_path / "unsized", sites=sites)
    result = balancing(trace, planners=FEW)
    frame = result.tables["replanning"]
    assert frame[["bytes_moved", "bytes_moved_relabelled", "bytes_per_token"]].isna().all(axis=None)
    (again,) = frame[(frame["planner"] == "eplb") & (frame["num_plans"] == 4)].to_dict("records")
    assert 0 < again["num_experts_moved"] <= 3 * 2 * 32
    said = next(each.text for each in result.findings if "times instead of once" in each.text)
    assert "0 B" not in said and said.endswith(" experts.")


@pytest.mark.parametrize("rule", ["even", "round_robin"])
def test_replicas_groups_and_nodes(by_domain, rule):
    found = balancing(
        by_domain,
        devices=8,
        num_redundant=8,
        groups=4,
        nodes=2,
        planners=("eplb", "eplb_global", "second_moment"),
        replica_rule=rule,
    )
    slots = found.table.set_index("planner")["num_slots"]
    assert slots.to_dict() == {"contiguous": 64, "eplb": 80, "eplb_global": 80, "second_moment": 80}
    assert row(found, "second_moment").gain_over_nothing > 0
    assert 1 <= row(found, "eplb").nodes_per_token <= 2
    assert (found.table["nodes_per_token"] <= found.table["devices_per_token"]).all()
    placements = found.tables["placements"]
    for _, mine in placements[placements["planner"] == "eplb"].groupby("site"):
        # Groups of eight experts stay on one node of four devices.
        nodes = (mine["device"] // 4).groupby(mine["expert"] // 8).nunique()
        assert (nodes == 1).all()


def test_hand_worked_trace(tmp_path):
    # Four passes of two tokens, experts 0 and 1 always together: apart is twice as good.
    steps = [
        [
            HandToken(request=step, position=0, experts=[[0]], phase="prefill"),
            HandToken(request=step, position=1, experts=[[1]], phase="prefill"),
        ]
        for step in range(4)
    ]
    trace = hand_trace(tmp_path / "hand", steps, num_experts=4)
    passes = windows.passes(trace, "decoder")
    assert len(passes) == 4
    found = balancing(trace, devices=2, planners=("eplb", "second_moment"))
    assert row(found, "contiguous").mean_max_over_mean == 2
    assert row(found, "contiguous").max_load == 1
    assert row(found, "eplb").mean_max_over_mean == 1
    assert row(found, "second_moment").mean_max_over_mean == 1
    assert row(found, "second_moment").gain_over_nothing == 0.5
    assert row(found, "second_moment").balancedness == 1
    assert row(found, "second_moment").devices_per_token == 1
    assert np.isnan(row(found, "second_moment").gain_over_nothing_low)
    assert found.findings[0].text.startswith("Not enough evidence")
    assert any("does not hold 256 tokens" in note for note in found.notes)


def test_small_dispatches_are_merged_and_said(tmp_path):
    trace = synthetic_trace(
        tmp_path / "small",
        num_requests=40,
        num_sites=1,
        num_experts=16,
        batch=8,
        prompt_tokens=12,
        output_tokens=60,
        domains=("only",),
        executed=False,
        timed=False,
    )
    found = balancing(trace, devices=4, planners=("eplb",))
    assert (found.table["figure_class"] == "estimate").all()
    assert any("which is an estimate" in note for note in found.notes)
    assert found.metrics[0].figure_class == "estimate"
    sizes = found.tables["sizes"].groupby("tokens")["figure_class"].first()
    assert sizes["merged to 256"] == "estimate"
    assert sizes["1-15"] == "exact"


def test_merged_rows_by_hand():
    tokens = np.array([100, 300, 100, 0, 100, 50, 60])
    key = np.array([0, 0, 0, 0, 0, 1, 0])
    group, enough = windows.merged_rows(tokens, key, 256)
    # 100 + 100 + 100 close one group around the large row; the rest stays open.
    assert group.tolist() == [0, 1, 0, -1, 0, 2, 3]
    assert enough.tolist() == [True, True, False, False]


def test_domains_are_split_by_themselves_where_few_requests_cross(tmp_path):
    # Twelve passes of one domain; requests of six, then of three passes: the cut is after six.
    lengths = [6, 3, 3]
    steps = []
    for request, length in enumerate(lengths):
        for position in range(length):
            steps.append([HandToken(request=2 * request, position=position, experts=[[position]])])
    trace = hand_trace(tmp_path / "cut", steps)
    passes = windows.passes(trace, "decoder")
    assert passes.judged.tolist() == [False] * 6 + [True] * 6
    assert passes.straddling == 0
    assert passes.longest_request == 3


def test_two_domains_each_keep_half(tmp_path):
    # Eight passes of even requests (domain-0), then four of odd ones (domain-1).
    steps = [
        [HandToken(request=request, position=0, experts=[[0]])]
        for request in (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7)
    ]
    passes = windows.passes(hand_trace(tmp_path / "two", steps), "decoder")
    assert passes.judged.tolist() == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2
    assert not passes.mixes


def with_ranks(trace, ranks, **changes):
    trace.info = dataclasses.replace(trace.info, ranks=ranks, **changes)
    return trace


def test_expert_parallel_ranks_are_merged(tmp_path):
    def record(name):
        return synthetic_trace(
            tmp_path / name,
            num_requests=32,
            num_sites=1,
            num_experts=16,
            batch=4,
            prompt_tokens=20,
            output_tokens=8,
            num_ranks=2,
            executed=False,
            timed=False,
        )

    apart = windows.passes(record("apart"), "decoder")
    trace = with_ranks(
        record("merged"),
        tuple(
            RankInfo(rank=rank, world_size=2, data_parallel=rank, expert_parallel=rank)
            for rank in range(2)
        ),
    )
    merged = windows.passes(trace, "decoder")
    assert set(apart.lane.tolist()) == {0, 1}
    assert set(merged.lane.tolist()) == {0}
    assert len(merged) == len(set(merged.tokens.dispatch_step.tolist()))
    assert len(merged.token_order) == len(apart.token_order)
    found = balancing(trace, devices=4, planners=("eplb",))
    assert found.table["num_dispatches"].iloc[0] > 0


def test_a_missing_rank_is_refused(uniform):
    trace = with_ranks(
        type(uniform)(uniform.store, uniform.info, uniform.logs),
        (RankInfo(rank=0, world_size=2, expert_parallel=1),),
        missing_ranks=(1,),
    )
    with pytest.raises(MoeprofError, match="rank 1 is missing"):
        balancing(trace)


def test_tensor_parallel_copies_count_once(uniform):
    trace = with_ranks(
        type(uniform)(uniform.store, uniform.info, uniform.logs),
        (RankInfo(rank=0, tensor_parallel=1),),
    )
    with pytest.raises(MoeprofError, match="0 forward passes"):
        balancing(trace)


def test_both_stacks_of_a_translation_model(tmp_path):
    trace = synthetic_trace(
        tmp_path / "mt",
        num_requests=24,
        num_sites=1,
        num_experts=8,
        stacks=("encoder", "decoder"),
        executed=False,
        timed=False,
    )
    found = balancing(trace, devices=4, planners=("eplb",))
    assert set(found.table["stack"]) == {"encoder", "decoder"}
    assert set(found.tables["phases"]["phase"]) >= {"encode", "decode"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"planners": ("best",)}, "no planner 'best'"),
        ({"replica_rule": "odd"}, "no replica rule 'odd'"),
        ({"devices": 5}, "32 slots cannot be dealt evenly to 5 devices"),
        ({"devices": 8, "nodes": 3}, "8 devices cannot be dealt evenly to 3 nodes"),
        ({"num_redundant": -8}, "fewer slots than experts"),
    ],
)
def test_refusals(uniform, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        balancing(uniform, **options)
    assert caught.value.hint


def test_one_pass_is_too_short(tmp_path):
    steps = [[HandToken(request=0, position=0, experts=[[0]])]]
    with pytest.raises(MoeprofError, match="1 forward passes"):
        balancing(hand_trace(tmp_path / "short", steps), devices=2)


def counts_frame(rows):
    return pd.DataFrame(
        [
            {"domain": domain, "layer": 0, "expert": expert, "count": count}
            for domain, counts in rows.items()
            for expert, count in enumerate(counts)
        ]
    )


def test_transfer_of_counts_by_hand():
    # "a" needs 0 apart from 1, "b" needs 0 apart from 2; 0 beside 3 suits both.
    counts = counts_frame({"a": [4, 4, 1, 1], "b": [4, 1, 4, 1]})
    found = transfer(counts, devices=2, planners=("contiguous", "eplb", "robust"))
    ratio = found.set_index(["planner", "planned_on", "judged_on"])["mean_max_over_mean"]
    assert ratio["contiguous", "a", "a"] == 1.6
    assert ratio["contiguous", "a", "b"] == 1
    assert ratio["eplb", "a", "a"] == 1
    assert ratio["robust", "(all)", "a"] == 1
    assert ratio["robust", "(all)", "b"] == 1
    assert (found["balancedness"] * found["mean_max_over_mean"]).tolist() == pytest.approx(
        [1] * len(found)
    )


def test_transfer_of_counts_wants_its_columns():
    with pytest.raises(UsageError, match="no column 'count'"):
        transfer(pd.DataFrame({"domain": ["a"], "layer": [0], "expert": [0]}))


def test_transfer_of_published_counts():
    path = Path(__file__).parents[1] / "../shared/data/olmoe_counts/expert_counts.csv.gz"
    if not path.exists():
        pytest.skip("the published counts lie beside the repository only")
    counts = pd.read_csv(path)
    sums = counts.groupby(["model", "domain", "layer"])["count"].sum()
    assert (sums % 205_243 == 0).any()
    found = transfer(counts[counts["model"] == "olmoe"], devices=8)
    worst = found[found["planned_on"] == "(all)"].groupby("planner")["mean_max_over_mean"].max()
    assert worst["robust"] < worst[["contiguous", "greedy", "eplb", "second_moment"]].min()
    own = found[found["planned_on"] == found["judged_on"]].set_index(["planner", "judged_on"])
    assert (own.loc["eplb"]["mean_max_over_mean"] < 1.3).all()
    # Mixtral's eight experts are used alike in all domains: little to place, little to lose.
    found = transfer(counts[counts["model"] == "mistral"], devices=4)
    assert len(found["judged_on"].unique()) > 1
    assert found["mean_max_over_mean"].max() < 1.2
    worst = found[found["planned_on"] == "(all)"].groupby("planner")["mean_max_over_mean"].max()
    assert worst["robust"] == worst.min()
