"""Expert parallelism: plans by hand, and eight processes against one device and the replay."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import parallel_ranks  # noqa: E402
from calibrations import exactly  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from parallel_ranks import WORLD, Case, Loads  # noqa: E402
from torch.multiprocessing import ProcessRaisedException  # noqa: E402

from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import random_experts  # noqa: E402
from moeprof.live.expert_parallel import (  # noqa: E402
    PARTS,
    SlotTables,
    experts_of_rank,
    on_one_device,
    slot_ids,
)
from moeprof.live.kernels import KERNELS  # noqa: E402
from moeprof.live.parallel_corrections import CorrectedStep, corrected_step  # noqa: E402
from moeprof.live.parallel_estimates import (  # noqa: E402
    AllToAllLine,
    estimated_step,
    fitted_line,
    share_times,
)
from moeprof.live.parallel_plans import (  # noqa: E402
    busiest_rows,
    check_layout,
    rank_plan,
    rows_between,
    rows_to_slots,
    shard_counts,
    shard_starts,
)
from moeprof.live.parallel_traces import PlannerSetting, site_dispatches  # noqa: E402
from moeprof.live.rank_processes import run_ranks  # noqa: E402
from moeprof.replay import balancing, loads  # noqa: E402
from moeprof.replay.calibration_file import Curve  # noqa: E402
from moeprof.replay.loads import layout as laid_out  # noqa: E402
from moeprof.replay.planners import PLANNERS  # noqa: E402
from moeprof.trace.schema import RankInfo  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

SETTINGS = [
    *(PlannerSetting(planner=name) for name in PLANNERS),
    *(PlannerSetting(planner=name, num_redundant=8) for name in ("greedy", "eplb", "robust")),
]


def by_hand():
    """Expert 0 on both devices, 1 on device 0, 2 on device 1."""
    return laid_out([0, 1, 2, 0], num_experts=3, num_devices=2)


def test_round_robin_by_hand():
    # Rows of expert 0 are 0, 1, 2 on rank 0 and 3, 4 on rank 1; replica 0 gets 0, 2, 4.
    counts = [[3, 1, 0], [2, 0, 4]]
    assert rows_to_slots(counts, by_hand()).tolist() == [[2, 1, 0, 1], [1, 0, 4, 1]]
    assert rows_between(counts, by_hand()).tolist() == [[3, 1], [1, 5]]
    first, second = (rank_plan(counts, by_hand(), rank) for rank in range(2))
    assert (first.send_splits, first.receive_splits) == ([3, 1], [3, 1])
    assert (second.send_splits, second.receive_splits) == ([1, 5], [1, 5])
    assert first.received.tolist() == [[2, 1], [1, 0]]
    assert second.slot_rows.tolist() == [4, 2]
    assert (first.num_received, second.num_received) == (4, 6)


def test_an_odd_count_before_shifts_the_next_rank():
    # With one row on rank 0, rank 1 begins with replica 1.
    assert rows_to_slots([[1, 0, 0], [1, 0, 0]], by_hand()).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def drawn_layout(rng, num_experts, num_devices, num_redundant):
    slots = np.concatenate([np.arange(num_experts), rng.integers(num_experts, size=num_redundant)])
    return laid_out(rng.permutation(slots), num_experts=num_experts, num_devices=num_devices)


@pytest.mark.parametrize("num_redundant", [0, 4, 20])
def test_plans_equal_dealing_rows_one_by_one(num_redundant):
    rng = np.random.default_rng(num_redundant)
    layout = drawn_layout(rng, 12, 4, num_redundant)
    counts = rng.integers(0, 9, (4, 12)) * (rng.random((4, 12)) < 0.7)
    slot_of = {
        (int(expert), int(replica)): slot
        for slot, (expert, replica) in enumerate(zip(layout.expert, layout.replica, strict=True))
    }
    expected = np.zeros((4, len(layout.expert)), int)
    for expert in range(12):
        number = 0
        for rank in range(4):
            for _ in range(counts[rank, expert]):
                expected[rank, slot_of[expert, number % layout.counts[expert]]] += 1
                number += 1
    assert (rows_to_slots(counts, layout) == expected).all()
    replayed = loads.device_loads(counts.sum(axis=0)[None], layout, "round_robin")[0]
    plans = [rank_plan(counts, layout, rank) for rank in range(4)]
    assert [plan.num_received for plan in plans] == replayed.tolist()
    assert sum(plan.num_sent for plan in plans) == counts.sum()


@pytest.mark.parametrize("num_redundant", [0, 4])
def test_ranks_together_choose_the_slots_of_one_device(num_redundant):
    rng = np.random.default_rng(3)
    layout = drawn_layout(rng, 8, 4, num_redundant)
    experts = rng.integers(-1, 8, (37, 3)).astype(np.int32)
    tables = SlotTables.of(layout, "cpu")
    whole = slot_ids(torch.from_numpy(experts), tables)
    starts = np.array([0, 5, 5, 30, 37])
    counts = shard_counts(experts, starts, 8)
    parts = [
        slot_ids(
            torch.from_numpy(experts[starts[rank] : starts[rank + 1]]),
            tables,
            torch.from_numpy(counts[:rank].sum(axis=0)),
        )
        for rank in range(4)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole < 0, torch.from_numpy(experts) < 0)
    # The replay's count of distinct devices per token follows the same order of rows.
    device = np.where(whole >= 0, layout.device[whole.clamp(min=0)], -1)
    distinct = [len(set(row[row >= 0])) for row in device if (row >= 0).any()]
    replayed, _ = loads.destinations(np.zeros(37), experts, layout, devices_per_node=1)
    assert np.mean(distinct) == replayed


def test_shards_and_busiest_device_by_hand():
    assert shard_starts(7, 4).tolist() == [0, 1, 3, 5, 7]
    assert shard_starts(2, 4).tolist() == [0, 0, 1, 1, 2]
    ids = np.array([[0, 1], [1, -1], [2, 2]])
    assert shard_counts(ids, [0, 1, 1, 3], 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 2]]
    # Device 1 receives 3 + 4 from others, no one sends more; what stays is not counted.
    assert busiest_rows(np.array([[100, 3, 0], [1, 0, 1], [1, 4, 9]])) == 7


@pytest.mark.parametrize(
    ("slots", "num_experts", "num_devices", "num_ranks", "said"),
    [
        ([0, 1, 2, 3], 4, 2, 4, "2 devices, the group has 4"),
        ([0, 1, 2, 3], 5, 2, 2, "for 4 experts, the layer has 5"),
        ([0, 1, 2, 0, 1], 3, 2, 2, "5 slots cannot be dealt evenly"),
        ([0, 1, 1, 0], 3, 2, 2, "no slot for expert 2"),
    ],
)
def test_placements_that_do_not_fit_are_refused(slots, num_experts, num_devices, num_ranks, said):
    own = 4 if num_experts == 5 else num_experts
    layout = laid_out(slots, num_experts=own, num_devices=num_devices)
    with pytest.raises(UsageError, match=said):
        check_layout(layout, num_experts=num_experts, num_ranks=num_ranks)


def test_a_line_is_found_again():
    sizes = np.array([0, 1e4, 1e6, 1e8])
    line = fitted_line(sizes, 0.02 + sizes / 4e8 * 1e3, num_ranks=2)
    assert line.latency_ms == pytest.approx(0.02)
    assert line.bytes_per_s == pytest.approx(4e8)
    assert line.largest_error < 1e-9
    assert line.time_ms(4e8) == pytest.approx(1000.02)
    bent = fitted_line([1e3, 1e6, 1e8], [0.02, 0.02, 0.5], num_ranks=2)
    assert 0.01 < bent.largest_error < 1


def test_a_line_has_no_negative_latency_and_no_negative_bandwidth():
    line = fitted_line([1e3, 1e6], [1e-6, 1e-2], num_ranks=2)
    assert line.latency_ms == 0
    assert line.bytes_per_s > 0
    with pytest.raises(UsageError, match="no longer than smaller"):
        fitted_line([1e3, 1e6], [2.0, 1.0], num_ranks=2)
    with pytest.raises(UsageError, match="two sizes"):
        fitted_line([1e3, 1e3], [2.0, 1.0], num_ranks=2)


def test_an_estimate_adds_up_what_it_names():
    experts = random_experts(num_experts=3, d_model=8, d_ff=8, dtype=torch.float32)
    layout = by_hand()
    slots = experts.select(torch.from_numpy(layout.expert))
    ids = np.array([[1, -1], [1, 1], [1, -1], [1, -1]])
    line = AllToAllLine(latency_ms=1.0, bytes_per_s=3.2e4, largest_error=0.0, num_ranks=2)
    found = estimated_step(ids, slots, layout, exchange=line, size_exchange_ms=5.0, repeats=2)
    # All rows go to device 0; rank 1 sends it two rows of 32 bytes.
    assert found.busiest_bytes == 64
    assert found.return_ms == pytest.approx(1 + 64 / 3.2e4 * 1e3)
    assert found.token_exchange_ms > found.return_ms
    assert found.shares_ms[1] == 0
    assert found.experts_ms == found.shares_ms[0] > 0
    parts = (5.0, found.token_exchange_ms, found.experts_ms, found.return_ms, found.combine_ms)
    assert found.step_ms == pytest.approx(sum(parts))
    corrected = found.corrected([1.5, 0.5, 1.2])
    assert (corrected.low_ms, corrected.high_ms) == (0.5 * found.step_ms, 1.5 * found.step_ms)
    assert (corrected.step_ms, corrected.num_ratios) == (1.2 * found.step_ms, 3)
    curve = Curve(sizes=(32.0, 96.0), times_s=(exactly(0.25), exactly(0.75)))
    by_curve = estimated_step(ids, slots, layout, exchange=curve, size_exchange_ms=5.0, repeats=2)
    assert by_curve.return_ms == pytest.approx(500.0)
    assert by_curve.token_exchange_ms > by_curve.return_ms
    more = random_experts(num_experts=5, d_model=8, d_ff=8, dtype=torch.float32)
    with pytest.raises(UsageError, match="the placement has 4 slots, the weights 5"):
        estimated_step(ids, more, layout, exchange=line, size_exchange_ms=5.0, repeats=2)


def test_a_corrected_estimate_by_hand():
    # Every step took longer than estimated: the bar leaves out the estimate as it was.
    found = corrected_step(2.0, [1.5, 1.25, 3.0, 1.25])
    assert found == CorrectedStep(step_ms=2.75, low_ms=2.5, high_ms=6.0, num_ratios=4)
    with pytest.raises(UsageError, match="by no measurement"):
        corrected_step(2.0, [])


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e3), st.lists(st.floats(0.1, 10.0), min_size=1, max_size=20), st.randoms())
def test_an_estimate_lies_in_its_error_bar(uncorrected_ms, ratios, random):
    found = corrected_step(uncorrected_ms, ratios)
    assert found.low_ms <= found.step_ms <= found.high_ms
    random.shuffle(ratios)
    assert corrected_step(uncorrected_ms, ratios) == found


def test_shares_run_the_rows_they_are_given():
    experts = random_experts(num_experts=4, d_model=8, d_ff=8, dtype=torch.float32)
    times = share_times(experts, np.array([3, 0, 0, 0]), num_devices=2, repeats=3)
    assert len(times[0].times_ms) == 3
    assert times[1] is None


def make_case(name, num_ranks, layout, ids, *, starts=None, dtype=torch.float32, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(ids), 16, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(ids.shape, generator=generator)
    bounds = shard_starts(len(ids), num_ranks) if starts is None else np.asarray(starts)
    return Case(
        name=f"{name}, {num_ranks} ranks",
        layout=layout,
        hidden=hidden,
        ids=ids,
        weights=weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        starts=tuple(bounds.tolist()),
        shape={"d_model": 16, "d_ff": 32, "gated": True, "bias": True, "seed": seed},
        **changes,
    )


def make_cases():
    cases = []
    for num_ranks in (2, 4, 8):
        rng = np.random.default_rng(num_ranks)
        ids = torch.from_numpy(rng.permuted(np.tile(np.arange(16), (61, 1)), axis=1)[:, :3])
        plain = drawn_layout(rng, 16, num_ranks, 0)
        replicated = drawn_layout(rng, 16, num_ranks, 2 * num_ranks)
        contiguous = laid_out(np.arange(16), num_experts=16, num_devices=num_ranks)
        uneven = np.sort(rng.integers(0, 62, num_ranks - 1))
        unequal = [0, *uneven, 61]
        last_only = [0] * num_ranks + [61]
        holes = ids.masked_fill(torch.from_numpy(rng.random(ids.shape) < 0.4), -1)
        cases += [
            make_case("in order of ids", num_ranks, contiguous, ids),
            make_case("any placement", num_ranks, plain, ids, starts=unequal, seed=1),
            make_case("replicas", num_ranks, replicated, ids, starts=unequal, seed=2),
            make_case("replicas, float64", num_ranks, replicated, ids, dtype=torch.float64),
            make_case("bfloat16", num_ranks, plain, ids, dtype=torch.bfloat16),
            make_case("tokens on one rank only", num_ranks, replicated, ids, starts=last_only),
            make_case("slots without expert", num_ranks, replicated, holes, starts=unequal),
            make_case("one expert takes all", num_ranks, plain, torch.full((61, 1), 5)),
            make_case("one replicated expert", num_ranks, replicated, torch.full((61, 1), 5)),
            make_case("an expert twice in a token", num_ranks, replicated, ids // 8 * 8),
            make_case("nothing executed", num_ranks, plain, torch.full((61, 2), -1)),
            make_case("no tokens", num_ranks, replicated, ids[:0]),
            make_case("weights of others", num_ranks, plain, ids, misplaced=True),
        ]
    return cases


CASES = make_cases()
RIGHT = [case for case in CASES if not case.misplaced]


def settings_of(num_ranks):
    """Returns all settings; on eight ranks, which take their time, the last ones."""
    return SETTINGS if num_ranks < WORLD else SETTINGS[-4:]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return synthetic_trace(
        tmp_path_factory.mktemp("t") / "made.moeprof",
        num_requests=12,
        num_sites=2,
        num_experts=[16, 24],
        top_k=[2, 3],
        batch=4,
        output_tokens=4,
        prune_last_layer=True,
        seed=4,
    )


@pytest.fixture(scope="module")
def dispatches(trace):
    return site_dispatches(trace)


@pytest.fixture(scope="module")
def ranks(dispatches):
    """Everything the eight ranks saw."""
    every = [
        Loads(
            layouts=[
                [each.layout(setting, size) for setting in settings_of(size)] for each in dispatches
            ],
            experts=[each.experts for each in dispatches],
            starts=[each.starts for each in dispatches],
        )
        for size in (2, 4, 8)
    ]
    # Imported once for all: eight times would take longer than everything ranks do here.
    multiprocessing.set_forkserver_preload(["moeprof.live.expert_parallel"])
    seen = run_ranks(
        parallel_ranks.run_everything, WORLD, CASES, every, timeout_s=240, start_method="forkserver"
    )
    assert not multiprocessing.active_children()
    return seen


def seen_of(ranks, case):
    found = sorted(
        (seen[case.name] for seen in ranks if case.name in seen), key=lambda s: s["rank"]
    )
    assert [each["rank"] for each in found] == list(range(case.num_ranks))
    return found


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_outputs_are_those_of_one_device(ranks, case):
    out = torch.cat([each["out"] for each in seen_of(ranks, case)])
    batch = case.hidden, case.ids, case.weights
    assert out.shape == case.hidden.shape
    assert out.dtype == case.hidden.dtype
    assert torch.equal(out, on_one_device(*batch, case.experts, case.layout))
    plain = KERNELS["dynamic_loop"](*batch, case.experts)
    if (case.layout.counts == 1).all():
        assert torch.equal(out, plain)
    # Replicas cut an expert's rows in two: products of other shapes, rounded otherwise.
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[out.dtype]
    torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_every_row_arrives_once(ranks, case):
    found = seen_of(ranks, case)
    executed = int((case.ids >= 0).sum())
    assert sum(each["load"] for each in found) == executed
    assert sum(sum(each["send_splits"]) for each in found) == executed
    sent = np.array([each["send_splits"] for each in found])
    received = np.array([each["receive_splits"] for each in found])
    assert (sent == received.T).all()
    went = torch.cat([each["went"] for each in found]).double()
    came = torch.cat([each["came"] for each in found]).double()
    # The rows are those that were sent, whatever their order.
    assert sorted(went.tolist()) == sorted(came.tolist())
    counts = torch.bincount(case.ids[case.ids >= 0], minlength=16)
    replayed = loads.device_loads(counts[None].numpy(), case.layout, "round_robin")[0]
    assert [each["load"] for each in found] == replayed.tolist()
    per_slot = np.concatenate([each["slot_rows"] for each in found])
    by_expert = np.bincount(case.layout.expert, per_slot, minlength=16)
    assert by_expert.tolist() == counts.tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_bits_twice(ranks, case):
    assert all(each["same_again"] for each in seen_of(ranks, case))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_weights_of_other_experts_are_noticed(ranks, num_ranks):
    case = next(case for case in CASES if case.misplaced and case.num_ranks == num_ranks)
    out = torch.cat([each["out"] for each in seen_of(ranks, case)])
    right = on_one_device(case.hidden, case.ids, case.weights, case.experts, case.layout)
    assert (out - right).abs().max() > 0.1


def live_loads(ranks, num_ranks):
    """Returns [sites][settings] arrays [dispatches, devices] of the rows that arrived."""
    found = [seen["loads", num_ranks] for seen in ranks if ("loads", num_ranks) in seen]
    arrived = [np.array(rows) for _, rows in sorted(found, key=lambda each: each[0])]
    assert len(arrived) == num_ranks
    return np.stack(arrived, axis=-1)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_loads_of_every_dispatch_are_the_replays(ranks, dispatches, num_ranks):
    live = live_loads(ranks, num_ranks)
    replicated = 0
    for place, each in enumerate(dispatches):
        assert (live[place].sum(axis=-1) == each.rows.sum(axis=1)).all()
        for index, setting in enumerate(settings_of(num_ranks)):
            layout = each.layout(setting, num_ranks)
            replicated += (layout.counts > 1).any()
            replayed = each.device_loads(layout)
            assert (live[place, index] == replayed).all(), (each.site.site, str(setting))
    assert replicated


@pytest.mark.parametrize("num_redundant", [0, 8])
def test_loads_are_those_that_balancing_reports(ranks, trace, dispatches, num_redundant):
    chosen = [s for s in SETTINGS if s.num_redundant == num_redundant]
    names = [setting.planner for setting in chosen]
    replayed = balancing(
        trace,
        4,
        num_redundant=num_redundant,
        planners=[name for name in names if name in ("contiguous", "greedy", "eplb", "robust")],
        replica_rule="round_robin",
    ).tables
    live = live_loads(ranks, 4)
    num_compared = 0
    for (planner, site), frame in replayed["devices"].groupby(["planner", "site"]):
        if planner not in names:
            continue  # Doing nothing is always added; with redundant slots it was not run.
        place = [each.site.site for each in dispatches].index(site)
        each = dispatches[place]
        index = SETTINGS.index(PlannerSetting(planner=planner, num_redundant=num_redundant))
        total = live[place, index][each.judged].sum(axis=0)
        assert frame.sort_values("device")["num_rows"].tolist() == total.tolist()
        placed = replayed["placements"].query("planner == @planner and site == @site")
        layout = each.layout(SETTINGS[index], 4)
        assert placed.sort_values("slot")["expert"].tolist() == layout.expert.tolist()
        num_compared += 1
    assert num_compared >= 6


def test_dispatches_hold_what_the_trace_recorded(trace, dispatches):
    assert [each.site.top_k for each in dispatches] == [2, 3]
    assert dispatches[1].starts[-1] < dispatches[0].starts[-1]  # The last layer sees fewer tokens.
    for each in dispatches:
        for index in range(len(each)):
            ids = each.dispatch(index)
            counts = np.bincount(ids[ids >= 0], minlength=each.site.num_experts)
            assert (counts == each.rows[index]).all()
    first, second = np.flatnonzero(dispatches[0].judged)[:2].tolist()
    parts = dispatches[0].dispatch(first), dispatches[0].dispatch(second)
    joined, num_passes = dispatches[0].joined(len(parts[0]) + 1)
    assert num_passes == 2
    assert (joined == np.concatenate(parts)[: len(parts[0]) + 1]).all()
    everything, _ = dispatches[0].joined(10**6)
    assert len(everything) == np.diff(dispatches[0].starts)[dispatches[0].judged].sum()
    with pytest.raises(UsageError, match="no site 9"):
        site_dispatches(trace, sites=[9])
    with pytest.raises(UsageError, match="no stack 'encoder'"):
        site_dispatches(trace, stack="encoder")


def test_ranks_that_recorded_together_are_one_dispatch(tmp_path):
    recorded = synthetic_trace(
        tmp_path / "two.moeprof", num_requests=16, num_sites=1, batch=4, num_ranks=2, domains=("a",)
    )
    apart = site_dispatches(recorded)[0]
    ranks = tuple(
        RankInfo(rank=rank, world_size=2, data_parallel=rank, expert_parallel=rank)
        for rank in range(2)
    )
    recorded.info = dataclasses.replace(recorded.info, ranks=ranks)
    merged = site_dispatches(recorded)[0]
    assert len(merged) < len(apart)
    assert merged.rows.sum() == apart.rows.sum()
    # Rank 0's tokens come first: its part of a pass is what it recorded.
    first = recorded.routing(stack="decoder", steps=[0]).query("rank == 0")
    ids = first.sort_values(["request", "position", "slot"])["expert"].to_numpy().reshape(-1, 2)
    assert (merged.dispatch(0)[: len(ids)] == ids).all()
    assert len(merged.dispatch(0)) > len(ids)


def test_parts_are_timed_in_order(ranks):
    for seen in ranks:
        clocks = seen["clocks"]
        assert clocks["in_order"]
        assert tuple(clocks["parts"]) == PARTS
        assert all(len(times) == 3 and min(times) >= 0 for times in clocks["parts"].values())
        assert clocks["step"] == ranks[0]["clocks"]["step"]
        assert [len(each.times_ms) for each in clocks["exchanges"]] == [2, 2, 2]
        assert clocks["exchanges"] == ranks[0]["clocks"]["exchanges"]


@pytest.mark.parametrize("placement", ["plain", "replicas"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("weights of other tokens", "ids (6, 2) and weights (12, 1) are no dispatch"),
        ("more rows", "rows (9, 8), ids (6, 2) and weights (6, 2) are no dispatch"),
        ("wider rows", "rows (6, 9) and ids (6, 2) are no dispatch over experts of width 8"),
        ("rows of another dtype", "rows are torch.float64, the experts torch.float32"),
        ("ids that are no integers", "ids of experts are torch.float32"),
        ("elsewhere", "lies on meta, its experts on cpu"),
        ("gradient of rows", "expert parallelism is for inference only"),
        ("gradient of rows sent", "expert parallelism is for inference only"),
        ("gradient of weights", "expert parallelism is for inference only"),
        ("gradient of experts", "expert parallelism is for inference only"),
        ("too high on rank 1", "3 ids on rank 1 are of no expert: the layer has 4"),
        ("far too high", "12 ids on rank 1 are of no expert"),
        ("below -1", "3 ids on rank 1 are of no expert"),
    ],
)
def test_what_is_no_dispatch_is_refused_on_every_rank(ranks, placement, wrong, said):
    for seen in ranks:
        assert said in (seen["refused"][placement, wrong] or "")


@pytest.mark.parametrize("placement", ["plain", "replicas"])
def test_ranks_that_were_refused_go_on(ranks, placement):
    assert all(seen["refused"][placement, "afterwards"] for seen in ranks)


def test_a_rank_that_fails_stops_the_others_and_says_why():
    with pytest.raises(ProcessRaisedException, match="rank 1 has had enough") as raised:
        run_ranks(parallel_ranks.fail_on_one, 2, timeout_s=120)
    assert "fail_on_one" in str(raised.value)
    assert not multiprocessing.active_children()


def test_weights_of_a_rank_are_its_slots():
    experts = random_experts(num_experts=3, d_model=8, d_ff=8, dtype=torch.float32)
    own = experts_of_rank(experts, by_hand(), 1)
    assert torch.equal(own.w_in, experts.w_in[[2, 0]])


def test_weights_of_other_placements_are_refused():
    more = random_experts(num_experts=4, d_model=8, d_ff=8, dtype=torch.float32)
    with pytest.raises(UsageError, match="for 3 experts, the layer has 4"):
        experts_of_rank(more, by_hand(), 1)
    batch = torch.ones(2, 8), torch.tensor([[0], [3]]), torch.ones(2, 1)
    with pytest.raises(UsageError, match="for 3 experts, the layer has 4"):
        on_one_device(*batch, more, by_hand())
    with pytest.raises(UsageError, match="are no dispatch over experts of width 8"):
        on_one_device(batch[0], batch[1], torch.ones(1, 2), more.select(slice(3)), by_hand())
    for rank in (-1, 2):
        with pytest.raises(UsageError, match=f"2 devices, there is no {rank}"):
            experts_of_rank(more.select(slice(3)), by_hand(), rank)


def test_counts_of_a_rank_are_not_the_next_ones():
    with pytest.raises(UsageError, match="expert 5 in a layer of 3"):
        shard_counts(np.array([[0, 5], [1, 2]]), [0, 1, 2], 3)
