"""`moeprof.replay.buffering`: rows add up, orders hold, bounds are never beaten, errors help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moeprof import replay
from moeprof.errors import UsageError
from moeprof.replay.cache import policies, reference, sizes, streams
from moeprof.replay.result import Result
from moeprof.trace import synthetic_trace
from moeprof.trace.handmade import HandToken, hand_trace
from moeprof.trace.reader import Trace

FORCED = ("paper", "lifo", "fifo", "lru", "lfu", "s3fifo", "arc", "random")
EVERY = tuple(policies.POLICIES)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Sites of different expert sizes, batches of eight, prefill, decode and mixed steps."""
    return synthetic_trace(
        tmp_path_factory.mktemp("study") / "lm.moeprof",
        num_requests=16,
        num_sites=3,
        num_experts=[12, 16, 8],
        top_k=[2, 3, 1],
        expert_bytes=[1000, 1700, 600],
        batch=8,
        mixed_steps=True,
        seed=3,
    )


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return synthetic_trace(
        tmp_path_factory.mktemp("study") / "mt.moeprof",
        num_requests=10,
        num_sites=2,
        num_experts=8,
        top_k=2,
        batch=4,
        stacks=("encoder", "decoder"),
        num_ranks=2,
        seed=4,
    )


def _definition_lookups(trace: Trace) -> int:
    """Distinct experts of every dispatch, from the streamed dispatches."""
    return sum(len(np.unique(each.experts[each.experts >= 0])) for each in trace.dispatches())


@pytest.mark.parametrize("scope", streams.SCOPES)
@pytest.mark.parametrize("semantics", policies.SEMANTICS)
def test_table(trace: Trace, scope: str, semantics: str) -> None:
    result = replay.buffering(
        trace,
        policies=[*EVERY, "bound"],
        capacities=[3, 0.3, "50%", 1.0],
        scope=scope,
        semantics=semantics,
        jobs=1,
    )
    table = result.table
    assert isinstance(result, Result)
    assert set(table["phase"]) == {"all", "prefill", "decode", "mixed"}
    assert len(table) == 13 * 4 * 4
    every = table[table["phase"] == "all"].set_index(["policy", "capacity"])
    assert (every["num_lookups"] == _definition_lookups(trace)).all()
    summed = table[table["phase"] != "all"].groupby(["policy", "capacity"])
    for column in ("num_lookups", "misses_compulsory"):
        assert (summed[column].sum() == every[column].sort_index()).all()
    real = table[table["policy"] != "bound"]
    every_real = real[real["phase"] == "all"].set_index(["policy", "capacity"])
    summed = real[real["phase"] != "all"].groupby(["policy", "capacity"])
    for column in ("num_hits", "bytes_moved", "bytes_streamed"):
        assert (summed[column].sum() == every_real[column].sort_index()).all()
    misses = table[["misses_compulsory", "misses_capacity", "misses_policy"]]
    assert (misses >= 0).all(axis=None)
    assert (misses.sum(axis=1) == table["num_lookups"] - table["num_hits"]).all()
    assert (real["bytes_streamed"] <= real["bytes_moved"]).all()
    assert table["low"].notna().any()
    known = table.dropna(subset=["low"])
    assert (known["low"] <= known["hit_rate"] + 1e-9).mean() > 0.9
    # Everything fits: only first uses miss.
    full = table[(table["capacity"] == 1.0) & ~table["policy"].isin(["pinned"])]
    assert (full["num_lookups"] - full["num_hits"] == full["misses_compulsory"]).all()
    # No policy beats the bound, hits or bytes, whatever the sizes.
    for _, group in table.groupby(["capacity", "phase"]):
        top = group[group["policy"] == "bound"].iloc[0]
        assert (group["num_hits"] <= top["num_hits"]).all()
        assert (group["bytes_moved"] >= top["bytes_moved"]).all()


@pytest.mark.parametrize("initial", policies.INITIALS)
@pytest.mark.parametrize("semantics", policies.SEMANTICS)
def test_nothing_beats_min(translation: Trace, semantics: str, initial: str) -> None:
    """Equal sizes, all phases: min among those that insert, min_bypass among all."""
    table = replay.buffering(
        translation,
        policies=EVERY,
        capacities=[1, 2, 4, 6],
        semantics=semantics,
        initial=initial,
        jobs=1,
    ).table
    for _, group in table[table["phase"] == "all"].groupby("capacity"):
        hits = group.set_index("policy")["num_hits"]
        assert (hits[list(FORCED)] <= hits["min"]).all()
        assert (hits <= hits["min_bypass"]).all()


def test_lru_and_min_grow_with_capacity(trace: Trace) -> None:
    table = replay.buffering(
        trace,
        policies=["lru", "min", "min_bypass", "bound"],
        capacities=list(range(1, 17)),
        jobs=1,
    ).table
    for _, group in table[table["phase"] == "all"].groupby("policy"):
        assert (np.diff(group["num_hits"]) >= 0).all()


def test_per_cache_adds_up(trace: Trace) -> None:
    result = replay.buffering(
        trace, policies=["lru", "bound"], capacities=[4, "40%"], devices=2, jobs=1
    )
    per_cache = result.per_cache
    assert len(per_cache[["site", "device"]].drop_duplicates()) == 6
    summed = per_cache.groupby(["policy", "capacity", "phase"], sort=False)
    whole = result.table.set_index(["policy", "capacity", "phase"])
    for column in ("num_lookups", "num_hits", "bytes_moved"):
        assert (summed[column].sum() == whole[column]).all()
    worst = per_cache[per_cache["worst"]]
    assert len(worst) == len(whole)
    assert (
        worst.set_index(["policy", "capacity", "phase"])["hit_rate"]
        == per_cache.groupby(["policy", "capacity", "phase"])["hit_rate"]
        .min()
        .reindex(worst.set_index(["policy", "capacity", "phase"]).index)
    ).all()


@pytest.mark.parametrize("semantics", policies.SEMANTICS)
def test_lookups_are_what_the_table_counts(trace: Trace, semantics: str) -> None:
    result = replay.buffering(
        trace,
        policies=["lru", "random"],
        capacities=[5, "30%"],
        scope="stack",
        devices=2,
        semantics=semantics,
        jobs=1,
    )
    for policy in ("lru", "random"):
        for capacity in (5, "30%"):
            lookups = result.lookups(policy, capacity)
            own = result.table[
                (result.table["policy"] == policy) & (result.table["capacity"] == capacity)
            ].set_index("phase")
            assert len(lookups) == own.loc["all", "num_lookups"]
            assert lookups["hit"].sum() == own.loc["all", "num_hits"]
            decode = lookups[lookups["phase"] == "decode"]
            assert decode["hit"].sum() == own.loc["decode", "num_hits"]
            assert lookups["step"].is_monotonic_increasing
    with pytest.raises(UsageError, match="no lookups of 'bound'"):
        result.lookups("bound", 5)


def test_lookups_stand_in_order_of_execution(tmp_path: Path) -> None:
    steps = [
        [
            HandToken(request=0, position=0, experts=[[3, 1], [0, 2]], phase="prefill"),
            HandToken(request=0, position=1, experts=[[1, 2], [2, 0]], phase="prefill"),
        ],
        [HandToken(request=0, position=2, experts=[[1, 3], [0, 1]])],
    ]
    trace = hand_trace(tmp_path / "hand.moeprof", steps, num_experts=4)
    lookups = replay.buffering(trace, policies=["lru"], capacities=[2], jobs=1).lookups("lru", 2)
    rows = lookups[["step", "site", "expert", "hit"]].itertuples(index=False, name=None)
    # Site 0: rows 3 1 1 2, so 1 and 2 stay; site 1: rows 0 2 2 0, both stay.
    assert list(rows) == [
        (0, 0, 3, False), (0, 0, 1, False), (0, 0, 2, False), (0, 1, 0, False), (0, 1, 2, False),
        (1, 0, 1, True), (1, 0, 3, False), (1, 1, 0, True), (1, 1, 1, False),
    ]  # fmt: skip
    assert lookups["layer"].tolist() == lookups["site"].tolist()


def test_shares_follow_the_definition(trace: Trace) -> None:
    """A lookup wanted by m requests gives 1/m to each: halves and totals, recounted slowly."""
    result = replay.buffering(trace, policies=["lru"], capacities=[4], jobs=1)
    lookups = result.lookups("lru", 4).set_index(["step", "site", "expert"])["hit"]
    wanted: dict[int, float] = {}
    hits: dict[int, float] = {}
    for each in trace.dispatches():
        for expert in np.unique(each.experts[each.experts >= 0]):
            who = np.unique(each.requests[(each.experts == expert).any(axis=1)])
            for request in who.tolist():
                wanted[request] = wanted.get(request, 0) + 1 / len(who)
                if lookups[each.step, each.site, expert]:
                    hits[request] = hits.get(request, 0) + 1 / len(who)
    row = result.table[result.table["phase"] == "all"].iloc[0]
    assert abs(sum(wanted.values()) - row["num_lookups"]) < 1e-6
    assert abs(sum(hits.values()) - row["num_hits"]) < 1e-6
    half = result.settings.rows.requests.half
    for number, column in ((0, "first_half"), (1, "second_half")):
        own = [request for request in wanted if half[request] == number]
        rate = sum(hits.get(r, 0) for r in own) / sum(wanted[r] for r in own)
        assert abs(rate - row[column]) < 1e-9


def test_expert_parallel_ranks_share_caches(tmp_path: Path) -> None:
    """Ranks of one group are merged; replicas have caches of their own."""
    import dataclasses

    path = tmp_path / "ranks.moeprof"
    apart = synthetic_trace(path, num_requests=8, num_sites=1, num_ranks=2, batch=2, seed=1)
    alone = replay.buffering(apart, policies=["lru"], capacities=[4], jobs=1)
    assert sorted(set(alone.per_cache["replica"])) == [0, 1]
    together = synthetic_trace(
        path, num_requests=8, num_sites=1, num_ranks=2, batch=2, seed=1, force=True
    )
    ranks = tuple(
        dataclasses.replace(each, expert_parallel=each.rank) for each in together.info.ranks
    )
    together.info = dataclasses.replace(together.info, ranks=ranks)
    merged = replay.buffering(together, policies=["lru"], capacities=[4], jobs=1)
    assert set(merged.per_cache["replica"]) == {0}
    wanted: dict[int, set[int]] = {}
    for each in together.dispatches():
        wanted.setdefault(each.step, set()).update(each.experts[each.experts >= 0].tolist())
    assert merged.table["num_lookups"].iloc[0] == sum(map(len, wanted.values()))


def test_placement(trace: Trace) -> None:
    """One device that holds everything is like no placement; experts follow the placement."""
    placement = {site.site: [0] * site.num_experts for site in trace.sites}
    one = replay.buffering(trace, policies=["lru"], capacities=[4], jobs=1).table
    two = replay.buffering(
        trace, policies=["lru"], capacities=[4], devices=2, placement=placement, jobs=1
    ).table
    pd.testing.assert_frame_equal(one, two)
    with pytest.raises(UsageError, match="entries"):
        replay.buffering(trace, policies=["lru"], capacities=[4], placement=[0, 0], jobs=1)
    with pytest.raises(UsageError, match="device 1 of 1"):
        replay.buffering(
            trace,
            policies=["lru"],
            capacities=[4],
            jobs=1,
            placement={site.site: [1] * site.num_experts for site in trace.sites},
        )


def test_capacities() -> None:
    parse = sizes.parse_capacity
    assert parse(np.int64(7)).slots == 7
    assert parse("16").slots == 16
    assert parse("4000MiB").num_bytes == 4000 << 20
    assert parse("1.5 GB").num_bytes == 1_500_000_000
    assert parse("12 B").num_bytes == 12
    assert parse(0.29).total_bytes(100) == parse("29%").total_bytes(100) == 29
    assert parse(1.0).total_bytes(12_345_678_901) == 12_345_678_901
    for bad, message in (
        (True, "cannot be True"), (0, "holds nothing"), (-1, "holds nothing"), (1.5, "no share"),
        (0.0, "no share"), ("0.25", "share or a number"), ("1.0", "share or a number"),
        ("many", "no capacity"), ("120%", "no share"), (None, "cannot be None"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message) as error:
            parse(bad)
        assert "16" in error.value.hint


def test_totals_are_split_by_bytes(trace: Trace) -> None:
    """In proportion to each cache's expert bytes, rounded down; slots cost the largest expert."""
    rows = streams.read_rows(trace)
    expert_bytes = 12 * 1000 + 16 * 1700 + 8 * 600
    total = 10_000
    for stream in streams.streams(rows, scope="layer"):
        (group,) = sizes.cache_sizes(stream, [sizes.parse_capacity(f"{total}B")], expert_bytes)
        share = total * stream.all_bytes // expert_bytes
        assert group.capacities == (share // stream.largest_bytes,)
    result = replay.buffering(trace, policies=["lru"], capacities=[2, "10000B", 0.5], jobs=1)
    asked = result.table.drop_duplicates("capacity").set_index("capacity")["capacity_bytes"]
    assert asked.tolist() == [2 * (1000 + 1700 + 600), total, expert_bytes // 2]
    whole = replay.buffering(trace, policies=["lru"], capacities=[2], scope="global", jobs=1)
    assert whole.table["capacity_bytes"].iloc[0] == 2 * 1700


def test_usage_errors(trace: Trace) -> None:
    for options, message in (
        ({"policies": ["best"]}, "no policy 'best'"),
        ({"policies": "lru"}, "are lists"),
        ({"capacities": []}, "nothing to replay"),
        ({"scope": "device"}, "no scope"),
        ({"semantics": "flat"}, "no semantics"),
        ({"initial": "warm"}, "cannot start"),
        ({"devices": 0}, "have to be devices"),
    ):
        with pytest.raises(UsageError, match=message):
            replay.buffering(trace, **{"policies": ["lru"], "capacities": [2], **options})  # type: ignore[arg-type]


def _as_if_trained(trace: Trace) -> Trace:
    import dataclasses

    model = dataclasses.replace(trace.info.model, random_weights=False)
    trace.info = dataclasses.replace(trace.info, model=model)
    return trace


def test_verdicts(tmp_path: Path) -> None:
    steady = synthetic_trace(
        tmp_path / "steady.moeprof",
        num_requests=24,
        num_sites=2,
        num_experts=64,
        top_k=2,
        persistence=0.97,
        skew=1.6,
        batch=2,
        output_tokens=60,
        seed=5,
    )
    found = replay.buffering(
        _as_if_trained(steady), policies=["lru", "fifo", "bound"], capacities=[1, 16, 32], jobs=1
    )
    texts = [finding.text for finding in found.findings]
    assert any(text.startswith("Try a buffer of") and "ceiling" in text for text in texts)
    assert any(text.startswith("Cliff: at 1 slot per cache") for text in texts)
    assert any(text.startswith("Do not") and "lru" in text for text in texts)
    even = synthetic_trace(
        tmp_path / "even.moeprof",
        num_requests=24,
        num_sites=2,
        num_experts=64,
        top_k=4,
        persistence=0.0,
        skew=0.0,
        batch=4,
        seed=6,
    )
    texts = [
        finding.text
        for finding in replay.buffering(
            _as_if_trained(even), policies=["lru"], capacities=[0.25], jobs=1
        ).findings
    ]
    assert any(text.startswith("Do not try a buffer") for text in texts)
    few = synthetic_trace(tmp_path / "few.moeprof", num_requests=3, seed=7)
    result = replay.buffering(_as_if_trained(few), jobs=1)
    assert result.table["low"].isna().all()
    assert all("ot enough evidence" in finding.text or "Cliff" in finding.text
               for finding in result.findings)  # fmt: skip


def test_streams_match_the_dispatches(translation: Trace) -> None:
    """Lookups, their last rows and wants, against the trace's own dispatches."""
    rows = streams.read_rows(translation)
    for stream in streams.streams(rows, scope="layer"):
        own = [
            each
            for each in translation.dispatches(sites=[stream.site])
            if each.rank == stream.replica
        ]
        assert len(own) == stream.num_dispatches
        for index, each in enumerate(own):
            flat = each.experts.ravel()
            flat = flat[flat >= 0].tolist()
            first, stop = stream.offset[index], stream.offset[index + 1]
            assert stream.key[first:stop].tolist() == list(dict.fromkeys(flat))
            by_last = list(dict.fromkeys(reversed(flat)))[::-1]
            assert stream.key[stream.last[first:stop]].tolist() == by_last
            for lookup in range(first, stop):
                who = np.unique(each.requests[(each.experts == stream.key[lookup]).any(axis=1)])
                assert stream.num_wanting[lookup] == len(who)


def test_reference_and_study_agree_on_bytes(trace: Trace) -> None:
    rows = streams.read_rows(trace)
    (stream,) = streams.streams(rows, scope="global")
    capacity = int(stream.key_bytes.sum()) // 3
    table = replay.buffering(
        trace, policies=["arc"], capacities=[f"{capacity}B"], scope="global", jobs=1
    ).table
    slow = reference.replay(stream, "arc", sizes=stream.key_bytes.tolist(), capacity=capacity)
    weight = stream.key_bytes[stream.key]
    row = table[table["phase"] == "all"].iloc[0]
    assert row["num_hits"] == slow.hit.sum()
    assert row["bytes_moved"] == weight[~slow.hit].sum()
    assert row["bytes_streamed"] == weight[slow.streamed].sum()
