"""What is copied ahead of its lookup: predicted by hand, placed by hand, and for every policy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moeprof.replay.cache import policies
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import (
    AT_ONCE,
    NO_SLOT,
    CacheSpec,
    Fetched,
    MissRule,
    Planned,
    Residency,
)

NUM_EXPERTS = 12
SITES = ((0, NUM_EXPERTS), (1, NUM_EXPERTS), (2, NUM_EXPERTS))


def test_counts_by_hand() -> None:
    foresight = Foresight([[(0, 4), (1, 4)]])
    for here, there in (([0, 1], [2, 3]), ([0], [3]), ([1], [2])):
        foresight.learn(0, here)
        foresight.learn(1, there)
    # After 0: once 2, twice 3. After 1: twice 2, once 3. Nothing is known of 2 and 3.
    for now, expected in (
        ([0], [3, 2]),
        ([1], [2, 3]),
        ([0, 1], [2, 3]),
        ([2], []),
        ([0, 3], [3, 2]),
    ):
        foresight.learn(0, now)
        assert foresight.ranked(0) == expected
    # From the last site to the first of the next step: 2 and 3 came before 0, then 3 before 1, then
    # 2 before 0; of passes that ended after site 0 nothing was learned.
    foresight.learn(1, [3])
    assert foresight.ranked(1) == [0, 1]
    foresight.learn(0, [2])
    foresight.learn(1, [3])
    assert foresight.ranked(1) == [0, 1, 2]
    assert (foresight.site_after(0), foresight.site_after(1)) == (1, 0)
    foresight.reset()
    foresight.learn(1, [3])
    assert foresight.ranked(1) == []


def test_nothing_is_learned_before_it_is_looked_up() -> None:
    foresight = Foresight([[(0, 4), (1, 4)]])
    foresight.learn(0, [1])
    assert foresight.ranked(0) == []
    foresight.learn(1, [2])
    foresight.learn(0, [1])
    assert foresight.ranked(0) == [2]


def test_stacks_are_apart_and_skipped_sites_teach_nothing() -> None:
    foresight = Foresight([[(0, 4), (1, 4), (2, 4)], [(7, 4)]])
    foresight.learn(0, [0])
    foresight.learn(7, [1])
    foresight.learn(1, [2])
    foresight.learn(7, [3])
    # A pass that skips 1 between 0 and 2.
    foresight.learn(0, [0])
    assert foresight.ranked(0) == [2]
    foresight.learn(2, [3])
    assert foresight.ranked(2) == []
    foresight.learn(0, [1])
    assert foresight.ranked(0) == []
    # A stack of one site follows itself.
    foresight.learn(7, [1])
    assert foresight.ranked(7) == [3]


def test_sites_may_differ_in_their_experts() -> None:
    foresight = Foresight([[(0, 2), (1, 6)]])
    for here, there in (([0, 1], [5]), ([1], [0, 5])):
        foresight.learn(0, here)
        foresight.learn(1, there)
    foresight.learn(0, [1])
    assert foresight.ranked(0) == [5, 0]
    foresight.learn(1, [5])
    assert foresight.ranked(1) == [1]


def caches_of(policy: str, capacity: int, scope: str = "layer") -> list[CacheSpec]:
    groups = [[site] for site in SITES] if scope == "layer" else [list(SITES)]
    return [
        CacheSpec(
            sites=tuple(group),
            capacity=capacity,
            pool=0,
            machine=functools.partial(_machine, policy, NUM_EXPERTS * len(group), capacity),
        )
        for group in groups
    ]


def _machine(policy: str, num_keys: int, capacity: int) -> policies.Machine:
    sizes = [1] * num_keys
    if policy in policies.SIMPLE_MACHINES:
        return policies.SIMPLE_MACHINES[policy](sizes, capacity)
    if policy == "random":
        return policies.Random(sizes, capacity, seed=policies.seed_of(3))
    return policies.Static(sizes, capacity, kept=range(capacity))


def residency_of(
    policy: str, capacity: int, *, prefetch: int, staging: int = 2, scope: str = "layer",
    full: bool = False,
) -> tuple[Residency, int]:  # fmt: skip
    caches = caches_of(policy, capacity, scope)
    slots = sum(cache.capacity for cache in caches) + staging + prefetch
    made = Residency(
        caches, [slots], full=full, prefetch=prefetch, foresight=Foresight([list(SITES)])
    )
    return made, slots


def two_sites(capacity: int, *, prefetch: int, staging: int = 0) -> Residency:
    """Two sites of four experts, caches under ``lru``."""
    caches = [
        CacheSpec(
            sites=((site, 4),),
            capacity=capacity,
            pool=0,
            machine=functools.partial(policies.SIMPLE_MACHINES["lru"], [1] * 4, capacity),
        )
        for site in (0, 1)
    ]
    return Residency(
        caches,
        [2 * capacity + staging + prefetch],
        prefetch=prefetch,
        foresight=Foresight([[(0, 4), (1, 4)]]),
    )


def test_the_next_site_may_be_in_no_cache() -> None:
    # A replay has caches only where the trace has lookups.
    machine = functools.partial(policies.SIMPLE_MACHINES["lru"], [1] * 4, 2)
    residency = Residency(
        [CacheSpec(sites=((0, 4),), capacity=2, pool=0, machine=machine)],
        [3],
        prefetch=1,
        foresight=Foresight([[(0, 4), (1, 4)]]),
    )
    for experts in ([1], [2, 3]):
        residency.plan(0, experts, [1] * len(experts), MissRule())
        assert residency.fetch_ahead(0, experts) == []


def step(residency: Residency, site: int, experts: Sequence[int], **rule: Any) -> Any:
    planned = residency.plan(site, experts, [1] * len(experts), MissRule(**rule))
    return planned, residency.fetch_ahead(site, experts)


def test_slots_by_hand() -> None:
    """A cache of one slot per site and one slot for what is ahead: slots 0, 1 and 2."""
    residency = two_sites(1, prefetch=1)
    assert step(residency, 0, [0]) == ([Planned(0, False, 0, True, False, AT_ONCE)], [])
    assert step(residency, 1, [2]) == ([Planned(2, False, 1, True, False, AT_ONCE)], [])
    # 0 again: at site 1 it was followed by 2, which is there. At site 1 now 3, by the slot beside.
    assert step(residency, 0, [0]) == ([Planned(0, True, 0, False, False, AT_ONCE)], [])
    planned, fetched = step(residency, 1, [3])
    # 2 leaves, its slot is free behind the one that nobody has used yet: 3 is copied to that one.
    # After site 1 comes site 0, where after 2 there was 0, which is there: of 3 nothing is known.
    assert (planned, fetched) == ([Planned(3, False, 2, True, False, AT_ONCE)], [])
    # 0 at site 0 was followed by 2 and by 3: 3 is resident, 2 is copied ahead, into the free slot.
    planned, fetched = step(residency, 0, [0])
    assert planned[0].hit and fetched == [Fetched(1, 2, 1, AT_ONCE)]
    assert residency.fetched() == [(1, 2, 1)]
    # 2 finds its copy and takes its slot, 3 leaves its slot to be free.
    planned, fetched = step(residency, 1, [2])
    assert planned == [Planned(2, False, 1, False, False, AT_ONCE, True)]
    assert residency.residents() == [(0, 0, 0), (1, 2, 1)]
    assert residency.fetched() == []
    # After 2 at site 1 there was 0 at site 0, which is resident.
    assert fetched == []
    # 3 is copied ahead now and not used: its slot is free again.
    planned, fetched = step(residency, 0, [0])
    assert fetched == [Fetched(1, 3, 2, AT_ONCE)]
    planned, _ = step(residency, 1, [2])
    assert planned[0].hit and residency.fetched() == []
    residency.reset()
    assert step(residency, 0, [0]) == ([Planned(0, False, 0, True, False, AT_ONCE)], [])
    assert residency.fetched() == []


def test_a_copy_ahead_waits_for_the_reader_of_its_slot() -> None:
    residency = two_sites(1, prefetch=1)
    for _ in range(2):
        step(residency, 0, [0])
        step(residency, 1, [2, 3])
    # 0 and 1 at site 0: 0 hits in its slot and leaves, 1 is copied there or beside it; the slot
    # that is free after that was read by 0, in place 0 of this dispatch, or by nobody.
    planned, fetched = step(residency, 0, [0, 1])
    assert planned[0].hit and planned[1].loads
    (one,) = fetched
    reader = {each.slot: place for place, each in enumerate(planned)}
    assert one.after == reader.get(one.slot, AT_ONCE) == 0


def test_the_device_computes_what_is_ahead() -> None:
    residency = two_sites(1, prefetch=1)
    for there in ([2], [3]):
        step(residency, 0, [0], action="host")
        planned, _ = step(residency, 1, there, action="host")
        assert planned[0].on_host
    _, fetched = step(residency, 0, [0], action="host")
    assert [(one.site, one.expert) for one in fetched] == [(1, 2)]
    planned, _ = step(residency, 1, [1, 2], action="host")
    assert [(one.on_host, one.ahead) for one in planned] == [(True, False), (False, True)]


def test_what_is_ahead_stays_while_it_is_likely_and_leaves_to_others() -> None:
    """A pass that ends early: what was copied for the next site is there in the next pass."""
    residency = two_sites(1, prefetch=1)
    for here, there in ((0, 2), (0, 3), (1, 0), (1, 1), (2, 1)):
        step(residency, 0, [here])
        step(residency, 1, [there])
    _, fetched = step(residency, 0, [0])
    assert [one.expert for one in fetched] == [2]
    # The same is likeliest still: nothing is copied.
    assert step(residency, 0, [0])[1] == []
    # Others are: the slot is taken from it.
    _, again = step(residency, 0, [1])
    assert [(one.expert, one.slot) for one in again] == [(0, fetched[0].slot)]
    assert residency.fetched() == [(1, 0, fetched[0].slot)]


def test_pieces_wait_for_no_copy_that_was_asked_for_later() -> None:
    hit, ahead = (Planned(0, True, 0, False, False, AT_ONCE),
                  Planned(1, False, 1, False, False, AT_ONCE, True))  # fmt: skip
    at_once = Planned(2, False, 2, True, False, AT_ONCE)
    behind = [Planned(3, False, 0, True, False, 0), Planned(4, False, 1, True, False, 1)]
    planned = [hit, ahead, at_once, *behind, Planned(5, False, 2, True, False, 2)]
    pieces = pieces_of(planned, streamed=True)
    assert pieces == [[0], [1], [2, 3, 4], [5]]
    assert copies_of(planned, pieces) == [[2], [3], [4], [5], []]
    assert pieces_of([ahead, at_once], streamed=True) == [[0], [1]]
    assert pieces_of(planned, streamed=False) == [[place] for place in range(6)]


def lookups(seed: int, num_steps: int = 40) -> list[tuple[int, list[int]]]:
    """Dispatches that depend on those before; some passes skip sites, some have many experts."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(num_steps):
        token = int(generator.integers(NUM_EXPERTS))
        for site, _ in SITES:
            if generator.random() < 0.1:
                continue
            likely = (token + site * 5 + np.arange(3)) % NUM_EXPERTS
            others = generator.integers(NUM_EXPERTS, size=generator.integers(1, 7))
            found.append((site, sorted({*likely.tolist(), *others.tolist()})))
    return found


@pytest.mark.parametrize("scope", ["layer", "stack"])
@pytest.mark.parametrize(
    ("policy", "staging"),
    [*((name, 0) for name in (*policies.SIMPLE_MACHINES, "random")), ("pinned", 1)],
)
def test_prefetch_changes_no_decision(policy: str, staging: int, scope: str) -> None:
    every = lookups(len(policy))
    used = 0
    for capacity, prefetch, full in itertools.product((1, 4), (1, 2, 5), (False, True)):
        options: dict[str, Any] = {"staging": staging, "scope": scope, "full": full}
        plain, _ = residency_of(policy, capacity, prefetch=0, **options)
        made, num_slots = residency_of(policy, capacity, prefetch=prefetch, **options)
        used += run_beside(plain, made, every, num_slots, prefetch)
    assert used > 0


def run_beside(
    plain: Residency,
    made: Residency,
    every: Sequence[tuple[int, list[int]]],
    num_slots: int,
    prefetch: int,
) -> int:
    """Runs both and holds what is in the slots to what is read; returns misses found ahead."""
    held = {slot: (site, expert) for site, expert, slot in made.residents()}
    found = 0
    for site, experts in every:
        ahead_before = {(other, expert): slot for other, expert, slot in made.fetched()}
        expected = plain.plan(site, experts, [1] * len(experts), MissRule())
        planned = made.plan(site, experts, [1] * len(experts), MissRule())
        assert [one.hit for one in planned] == [one.hit for one in expected]
        readers: dict[int, int] = {}
        for place, one in enumerate(planned):
            # Hits, copies for the lookup, and copies ahead: each expert is one of them.
            assert one.hit + one.loads + one.ahead == 1
            assert one.slot != NO_SLOT
            if one.loads:
                assert (site, one.expert) not in ahead_before, "copied twice"
                assert readers.get(one.slot, AT_ONCE) == one.after
                held[one.slot] = (site, one.expert)
            if one.ahead:
                assert ahead_before[site, one.expert] == one.slot
            assert held[one.slot] == (site, one.expert), "another expert lies there"
            readers[one.slot] = place
            found += one.ahead
        fetched = made.fetch_ahead(site, experts)
        for one in fetched:
            assert one.site == (site + 1) % len(SITES)
            assert one.after == readers.get(one.slot, AT_ONCE)
            held[one.slot] = (one.site, one.expert)
        waiting = [one.after != AT_ONCE for one in fetched]
        assert waiting == sorted(waiting), "one that could start at once waits for another"
        residents, ahead = made.residents(), made.fetched()
        assert [one[:2] for one in residents] == [one[:2] for one in plain.residents()]
        taken = [slot for *_, slot in [*residents, *ahead]]
        assert len(taken) == len(set(taken)) and max(taken, default=0) < num_slots
        assert len(ahead) <= prefetch
        assert not {one[:2] for one in residents} & {one[:2] for one in ahead}
        for other, expert, slot in [*residents, *ahead]:
            assert held[slot] == (other, expert)
    return found
