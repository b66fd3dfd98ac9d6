"""Compiled decisions equal `Residency` and its pieces: every policy, dispatch by dispatch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprof.replay import buffer_plans
from moeprof.replay.cache import decisions, policies
from moeprof.replay.cache.decisions import CompiledResidency, can_compile, make_residency
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import CacheSpec, Fetched, MissRule, Planned, Residency
from moeprof.replay.serving_settings import BufferingSetting
from moeprof.trace.reader import Trace
from moeprof.trace.synthetic import synthetic_trace

NUM_EXPERTS = 12
# Sites of different sizes; ids are no indices.
SITES = ((0, NUM_EXPERTS), (3, NUM_EXPERTS - 3), (4, NUM_EXPERTS))
SCOPES = {
    "layer": tuple((site,) for site in SITES),
    "stack": (SITES,),
    "mixed": ((SITES[0], SITES[2]), (SITES[1],)),
}
POLICIES = (*policies.SIMPLE_MACHINES, "random", "static", "min", "min_bypass")
NOT_ALL_KEPT = ("static", "min_bypass")
RULES = (MissRule(), MissRule(action="host"), MissRule(action="split", host_rows=2))

Chosen = NDArray[np.int64]
Dispatches = Sequence[tuple[int, Chosen]]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return synthetic_trace(
        tmp_path_factory.mktemp("trace") / "t", num_requests=6, num_sites=3, num_experts=12,
        top_k=2, batch=3, prompt_tokens=8, output_tokens=16, seed=4,
    )  # fmt: skip


class Both(NamedTuple):
    """The reference and what is held to it."""

    reference: Residency
    compiled: CompiledResidency


def machine_of(
    policy: str, num_keys: int, capacity: int, uses: dict[int, list[int]]
) -> policies.Machine:
    sizes = [1] * num_keys
    if policy in policies.SIMPLE_MACHINES:
        return policies.SIMPLE_MACHINES[policy](sizes, capacity)
    if policy == "random":
        return policies.Random(sizes, capacity, seed=policies.seed_of(num_keys))
    if policy == "static":
        kept = [(3 + 2 * number) % num_keys for number in range(min(capacity, num_keys // 2))]
        return policies.Static(sizes, capacity, kept=kept)
    return {"min": policies.Min, "min_bypass": policies.MinBypass}[policy](
        sizes, capacity, uses=uses
    )


def dispatches_of(seed: int, num_rounds: int = 12) -> list[tuple[int, Chosen]]:
    """Sites in turn, some skipped; experts by skewed chances, a few of them or nearly all."""
    generator = np.random.default_rng(seed)
    chances = generator.dirichlet(np.full(NUM_EXPERTS, 0.5)) + 1e-3
    found = []
    for _ in range(num_rounds):
        for site, count in SITES:
            if generator.random() < 0.1:
                continue
            slots = generator.integers(4 * count if generator.random() < 0.3 else 6)
            own = chances[:count] / chances[:count].sum()
            chosen = generator.choice(count, size=slots, p=own)
            chosen[generator.random(slots) < 0.15] = -1
            found.append((site, chosen))
    return found


def counted(chosen: Chosen) -> tuple[list[int], list[int]]:
    experts, rows = np.unique(chosen[chosen >= 0], return_counts=True)
    return experts.tolist(), rows.tolist()


def caches_of(
    policy: str, capacity: int, dispatches: Dispatches, *, scope: str = "layer", num_pools: int = 1
) -> list[CacheSpec]:
    found = []
    for number, group in enumerate(SCOPES[scope]):
        counts = [count for _, count in group]
        first = dict(zip(dict(group), np.cumsum([0, *counts[:-1]]).tolist(), strict=True))
        uses: dict[int, list[int]] = {key: [] for key in range(sum(counts))}
        keys = [
            first[site] + expert
            for site, chosen in dispatches
            if site in first
            for expert in counted(chosen)[0]
        ]
        for time, key in enumerate(keys):
            uses[key].append(time)
        made = functools.partial(machine_of, policy, sum(counts), capacity, uses)
        pool = number % num_pools
        found.append(CacheSpec(sites=group, capacity=capacity, pool=pool, machine=made))
    return found


def both(
    caches: Sequence[CacheSpec], *, staging: int, full: bool = False, prefetch: int = 0
) -> Both:
    num_pools = max(cache.pool for cache in caches) + 1
    pools = [
        sum(cache.capacity for cache in caches if cache.pool == pool) + staging + prefetch
        for pool in range(num_pools)
    ]
    made = [
        kind(caches, pools, full=full, prefetch=prefetch, foresight=Foresight([SITES]))
        for kind in (Residency, CompiledResidency)
    ]
    return Both(*made)


def decided(compiled: CompiledResidency, site: int, chosen: Chosen, turn: int) -> int:
    """Decides, with and without something behind the slots of the dispatch: it is not read."""
    given = chosen if turn % 2 else np.append(chosen, NUM_EXPERTS)
    return compiled.decide(site, given, len(chosen))


def run_both(made: Both, dispatches: Dispatches, rule: MissRule) -> Iterator[list[Planned]]:
    """Holds every decision, and all that is resident or ahead after it, to the reference."""
    reference, compiled = made
    compiled.rule = rule
    decision = compiled.decision
    assert compiled.residents() == reference.residents()
    for turn, (site, chosen) in enumerate(dispatches):
        experts, rows = counted(chosen)
        planned = reference.plan(site, experts, rows, rule) if experts else []
        if turn % 7 == 6 and experts:
            assert compiled.plan(site, experts, rows, rule) == planned
        else:
            assert decided(compiled, site, chosen, turn) == len(experts)
        assert decision.planned() == planned
        assert decision.columns[decisions.ROWS, : len(rows)].tolist() == rows
        pieces = pieces_of(planned, streamed=True)
        assert decision.pieces() == pieces
        assert decision.copies() == copies_of(planned, pieces)
        assert decision.counts.tolist() == [
            len(planned),
            len(pieces),
            sum(each.loads for each in planned),
            sum(each.on_host for each in planned),
        ]
        fetched = reference.fetch_ahead(site, experts)
        if turn % 2:
            assert compiled.fetch_ahead(site, experts) == fetched
        else:
            assert decision.fetched_list(compiled.foresee(site)) == fetched
        assert compiled.fetched() == reference.fetched()
        assert compiled.residents() == reference.residents()
        yield planned


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_decides_as_its_machine(policy: str, scope: str) -> None:
    seen = set()
    for number, capacity in enumerate((0, 1, 2, 5, NUM_EXPERTS - 1, 40)):
        for full in (False, True):
            dispatches = dispatches_of(number)
            caches = caches_of(policy, capacity, dispatches, scope=scope, num_pools=1 + number % 2)
            staging = 2 if not capacity or policy in NOT_ALL_KEPT else number % 3
            made = both(caches, staging=staging, full=full)
            rule = RULES[(number + full) % len(RULES)]
            first = list(run_both(made, dispatches, rule))
            for each in made:
                each.reset()
            assert list(run_both(made, dispatches, rule)) == first
            seen |= {(each.hit, each.loads, each.on_host) for one in first for each in one}
    assert len(seen) >= 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_copies_ahead(policy: str, prefetch: int) -> None:
    num_fetched = num_found = 0
    for number, scope in enumerate(SCOPES):
        dispatches = dispatches_of(10 + number, num_rounds=30)
        caches = caches_of(policy, 3 + number, dispatches, scope=scope, num_pools=1 + number % 2)
        made = both(caches, staging=2, prefetch=prefetch, full=bool(number % 2))
        for planned in run_both(made, dispatches, RULES[number]):
            num_found += sum(each.ahead for each in planned)
            num_fetched += len(made.reference.fetched())
    assert num_fetched and num_found


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_dispatches(data: st.DataObject) -> None:
    count = dict(SITES)
    ids = {site: st.lists(st.integers(-1, count[site] - 1), max_size=20) for site in count}
    sites = data.draw(st.lists(st.sampled_from([*count]), min_size=1, max_size=12))
    dispatches = [(site, np.array(data.draw(ids[site]), np.int64)) for site in sites]
    policy = data.draw(st.sampled_from(POLICIES))
    caches = caches_of(
        policy,
        data.draw(st.integers(0, NUM_EXPERTS)),
        dispatches,
        scope=data.draw(st.sampled_from([*SCOPES])),
        num_pools=data.draw(st.integers(1, 2)),
    )
    made = both(
        caches,
        staging=data.draw(st.integers(1, 3)),
        full=data.draw(st.booleans()),
        prefetch=data.draw(st.integers(0, 4)),
    )
    for _ in run_both(made, dispatches, data.draw(st.sampled_from(RULES))):
        pass


def lru_cache(num_experts: int = 8, capacity: int = 3) -> CacheSpec:
    machine = functools.partial(policies.Lru, [1] * num_experts, capacity)
    return CacheSpec(sites=((5, num_experts),), capacity=capacity, pool=0, machine=machine)


def test_an_expert_that_there_is_not_changes_nothing() -> None:
    compiled = CompiledResidency([lru_cache()], [3])
    assert compiled.decide(5, np.array([1, 4, 1, -1, -7]), 5) == 2
    before = compiled.decision.planned(), compiled.residents()
    for chosen in ([0, 8], [1 << 40, 2], [2, 3, 1 << 62]):
        with pytest.raises(IndexError, match="does not have"):
            compiled.decide(5, np.array(chosen), len(chosen))
        assert (compiled.decision.planned(), compiled.residents()) == before
    with pytest.raises(IndexError, match="more slots"):
        compiled.decide(5, np.array([1, 2]), 3)
    for experts in ([8], [-1, 2], [1, 9, 2]):
        with pytest.raises(IndexError, match="does not have"):
            compiled.plan(5, experts, [1] * len(experts), MissRule())
    assert compiled.decide(5, np.array([2, 2]), 2) == 1
    assert compiled.decision.columns[: decisions.HIT, 0].tolist() == [2, 2]


def test_nobody_is_nothing() -> None:
    compiled = CompiledResidency([lru_cache()], [3])
    compiled.decide(5, np.array([1, 2]), 2)
    before = compiled.residents()
    for chosen, num_slots in (([-1, -1], 2), ([1], 0)):
        assert compiled.decide(5, np.array(chosen), num_slots) == 0
        assert (compiled.decision.pieces(), compiled.decision.copies()) == ([], [[]])
        assert not compiled.decision.counts.any()
    assert compiled.residents() == before


def test_a_decision_never_moves() -> None:
    compiled = CompiledResidency([lru_cache()], [3], full=True)
    decision = compiled.decision
    addresses = [getattr(decision, name).ctypes.data for name in decision.__dataclass_fields__]
    start = compiled.residents()
    assert compiled.decide(5, np.arange(8), 8) == 8
    compiled.reset()
    assert compiled.residents() == start == [(5, 0, 0), (5, 1, 1), (5, 2, 2)]
    assert compiled.decision is decision
    assert addresses == [
        getattr(decision, name).ctypes.data for name in decision.__dataclass_fields__
    ]
    assert all(getattr(decision, name).flags.c_contiguous for name in decision.__dataclass_fields__)


def test_swapped_slots() -> None:
    caches = caches_of("lru", 4, [])
    made = both(caches, staging=0, full=True)
    for each in made:
        each.swap((0, 1), (4, 3))
    assert made.compiled.residents() == made.reference.residents()
    assert (0, 1, 11) in made.compiled.residents()
    for _ in run_both(made, dispatches_of(3), MissRule()):
        pass


def test_swapped_slots_of_what_is_ahead() -> None:
    dispatches = dispatches_of(4, num_rounds=30)
    made = both(caches_of("lru", 2, dispatches), staging=0, prefetch=2)
    num_swaps = 0
    for _ in run_both(made, dispatches, MissRule()):
        ahead = made.reference.fetched()
        one = made.reference.residents()[0]
        if ahead:
            other = ahead[-1]
            for each in made:
                each.swap(one[:2], other[:2])
            assert (*one[:2], other[2]) in made.compiled.residents()
            assert (*other[:2], one[2]) in made.compiled.fetched()
            num_swaps += 1
    assert num_swaps > 2


def test_too_few_slots_are_an_error() -> None:
    compiled = CompiledResidency([lru_cache(capacity=0)], [0])
    with pytest.raises(RuntimeError, match="fewer slots"):
        compiled.decide(5, np.array([1]), 1)


class _Own(policies.Lru):
    """A machine of one's own."""


def test_what_is_not_known_is_not_compiled() -> None:
    def spec(machine: Any) -> list[CacheSpec]:
        return [CacheSpec(sites=((0, 4),), capacity=2, pool=0, machine=lambda: machine)]

    def placed() -> policies.Machine:
        machine = policies.Lru([1] * 4, 2)
        machine.place(1)
        return machine

    assert can_compile(spec(policies.Lru([1] * 4, 2)))
    for machine in (
        _Own([1] * 4, 2),
        policies.Lru([1, 1, 2, 1], 2),
        policies.Static([1] * 4, 1, kept=[1, 2]),
        placed(),
    ):
        assert not can_compile(spec(machine))
        assert isinstance(make_residency(spec(machine), [2]), Residency)
    known = spec(policies.Lru([1] * 4, 2))
    assert isinstance(make_residency(known, [2]), CompiledResidency)

    class OwnForesight(Foresight):
        """One's own."""

    assert not can_compile(known, OwnForesight([((0, 4),)]))
    assert isinstance(make_residency([], []), Residency)


def test_the_next_site_may_be_in_no_cache() -> None:
    machine = functools.partial(policies.Lru, [1] * 4, 2)
    cache = CacheSpec(sites=((0, 4),), capacity=2, pool=0, machine=machine)
    compiled = CompiledResidency([cache], [3], prefetch=1, foresight=Foresight([[(0, 4), (1, 9)]]))
    for experts in ([1], [2, 3]):
        compiled.decide(0, np.array(experts), len(experts))
        assert compiled.foresee(0) == 0
    with pytest.raises(KeyError):
        compiled.decide(1, np.array([3]), 1)


def test_columns_of_a_plan() -> None:
    made = both(caches_of("lru", 2, []), staging=0)
    for site, chosen in dispatches_of(1, num_rounds=3):
        experts, rows = counted(chosen)
        planned = made.compiled.plan(site, experts, rows, MissRule())
        columns = decisions.columns_of(planned, rows)
        np.testing.assert_array_equal(
            columns, made.compiled.decision.columns[:, : len(experts)], strict=True
        )
    empty = decisions.empty_decision(6)
    assert empty.planned() == empty.pieces() == empty.fetched_list(0) == []
    assert empty.columns.shape == (decisions.NUM_COLUMNS, 6)
    assert decisions.columns_of([], []).shape == (decisions.NUM_COLUMNS, 0)


def test_fetched_names_its_rows() -> None:
    foresight = Foresight([[(7, 4), (9, 4)]])
    machine = functools.partial(policies.Lru, [1] * 4, 1)
    caches = [CacheSpec(sites=((site, 4),), capacity=1, pool=0, machine=machine) for site in (7, 9)]
    compiled = CompiledResidency(caches, [3], prefetch=1, foresight=foresight)
    for site, expert in ((7, 0), (9, 2), (7, 0), (9, 3), (7, 0)):
        compiled.decide(site, np.array([expert]), 1)
        fetched = compiled.foresee(site)
    assert fetched == 1
    rows = [decisions.SITE, decisions.FETCHED_EXPERT, decisions.FETCHED_SLOT]
    assert compiled.decision.fetched[rows, 0].tolist() == [9, 2, 1]
    assert compiled.decision.fetched_list(1) == [Fetched(9, 2, 1, -1)]


def test_nothing_is_foreseen_for_experts_that_there_are_not() -> None:
    compiled = CompiledResidency([lru_cache()], [4], prefetch=1, foresight=Foresight([[(5, 8)]]))
    compiled.decide(5, np.array([7]), 1)
    for experts in ([8], [1, -1]):
        with pytest.raises(IndexError, match="does not have"):
            compiled.fetch_ahead(5, experts)
    assert compiled.foresee(5) == 0


@pytest.mark.parametrize("policy", ["lru", "paper", "min_bypass", "pinned"])
def test_plans_of_a_trace(policy: str, trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = buffer_plans.read_routed_rows(trace, "decoder")
    for setting in (
        BufferingSetting(capacity=0.3, policy=policy, prefetch=2),
        BufferingSetting(capacity=2, policy=policy, miss="split", initial="full", scope="stack"),
    ):
        made = buffer_plans.residency_of(trace, routed, setting)
        assert isinstance(made.residency, CompiledResidency)
        compiled = buffer_plans.plan_buffer(trace, routed, setting)
        with monkeypatch.context() as patch:
            patch.setattr(buffer_plans, "make_residency", Residency)
            expected = buffer_plans.plan_buffer(trace, routed, setting)
        assert compiled.loads.any() and compiled.hit.any()
        _assert_same(compiled, expected)


def _assert_same(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(found):
            _assert_same(found, expected)
        else:
            np.testing.assert_array_equal(found, expected, strict=True)
