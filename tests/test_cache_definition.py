"""The buffering table against a slow replay written from the definition, from trace to row."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from moeprof import replay
from moeprof.trace.synthetic import synthetic_trace

POLICIES = ("paper", "lifo", "fifo", "lru", "lfu", "min", "min_bypass")
NEVER = 10**9


def caches(trace, scope, devices):
    """Returns, per cache, its experts and its dispatches (phase, rows in recorded order)."""
    found = {}
    sites = {site.site: site for site in trace.sites}
    for each in trace.dispatches():
        site = sites[each.site]
        unit = {"layer": each.site, "stack": site.stack, "global": ""}[scope]
        for device in range(devices):
            rows = [
                (each.site, expert)
                for expert in each.experts.ravel().tolist()
                if expert >= 0 and expert * devices // site.num_experts == device
            ]
            if rows:
                found.setdefault((each.rank, device, unit), []).append((each.step, each, rows))
    for place, dispatches in found.items():
        keys = [
            (site.site, expert)
            for site in trace.sites
            for expert in range(site.num_experts)
            if place[2] in (site.site, site.stack, "")
            and expert * devices // site.num_experts == place[1]
        ]
        ordered = sorted(dispatches, key=lambda one: one[0])
        yield keys, [(each.phase, rows) for _, each, rows in ordered]


def size_and_capacity(asked, keys, bytes_of, all_bytes):
    """Returns the size of each expert and the capacity, in slots or bytes."""
    if isinstance(asked, int):
        return dict.fromkeys(keys, 1), asked
    share = Fraction(asked[:-1]) / 100 if asked.endswith("%") else None
    total = int(share * all_bytes) if share is not None else int(asked[:-1])
    size = {key: bytes_of[key[0]] for key in keys}
    return size, total * sum(size.values()) // all_bytes


def replayed(keys, dispatches, size, capacity, policy, semantics, initial):  # noqa: PLR0912
    """Yields (phase, expert, hit, streamed) of every lookup."""
    inserted, touched, count = {}, {}, {}
    looked_up = [
        sorted(set(rows)) if semantics == "sequential" else list(dict.fromkeys(rows))
        for _, rows in dispatches
    ]
    now = itertools.count()
    uses = {}
    for index, experts in enumerate(looked_up):
        for expert in experts:
            time = next(now)
            uses.setdefault(expert, []).append(time if semantics == "sequential" else index)
    now, clock = itertools.count(), itertools.count()

    def used():
        return sum(size[expert] for expert in inserted)

    def enter(expert, frequency):
        inserted[expert] = touched[expert] = next(clock)
        count[expert] = frequency

    def next_use(expert, time):
        return next((use for use in uses.get(expert, []) if use > time), NEVER)

    def leave(may, time, active):
        rank = {
            "paper": lambda one: (one in active, -inserted[one]),
            "lifo": lambda one: -inserted[one],
            "fifo": lambda one: inserted[one],
            "lru": lambda one: touched[one],
            "lfu": lambda one: (count[one], touched[one]),
            "min": lambda one: (-next_use(one, time), -one[0], -one[1]),
            "min_bypass": lambda one: (-next_use(one, time), -one[0], -one[1]),
        }[policy]
        del inserted[min(may, key=rank)]

    if initial == "full":
        for expert in keys:
            if used() + size[expert] > capacity:
                break
            enter(expert, 0)
    for index, ((phase, rows), experts) in enumerate(zip(dispatches, looked_up, strict=True)):
        active, hit = set(experts), {}
        if semantics == "sequential":
            for expert in experts:
                time = next(now)
                hit[expert] = expert in inserted
                if hit[expert]:
                    touched[expert] = next(clock)
                    count[expert] += 1
                elif size[expert] <= capacity:
                    if policy == "min_bypass":
                        enter(expert, 1)
                    while used() + (policy != "min_bypass") * size[expert] > capacity:
                        leave(list(inserted), time, active)
                    if policy != "min_bypass":
                        enter(expert, 1)
        else:
            hit = {expert: expert in inserted for expert in experts}
            order = rows
            if semantics == "batch_hits_first":
                order = sorted(rows, key=lambda expert: not hit[expert])
            for expert in order:
                if expert not in inserted:
                    enter(expert, 0)
                touched[expert] = next(clock)
            for expert in experts:
                count[expert] += 1
            while used() > capacity:
                spared = [one for one in inserted if one not in active]
                if policy == "min_bypass" or not spared:
                    spared = list(inserted)
                leave(spared, index, active)
        assert used() <= capacity
        for expert in experts:
            yield phase, expert, hit[expert], not hit[expert] and expert not in inserted


@pytest.mark.parametrize("seed", range(3))
def test_rows_follow_the_definition(tmp_path, seed):
    trace = synthetic_trace(
        tmp_path / "t.moeprof", seed=seed, num_requests=6, num_sites=2, num_experts=[6, 9],
        top_k=[2, 3], expert_bytes=[(10, 7), (5, 5), (3, 16)][seed], batch=3, prompt_tokens=5,
        output_tokens=8, mixed_steps=seed == 0, num_ranks=1 + (seed == 1),
        stacks=("encoder", "decoder") if seed == 2 else ("decoder",),
        capacity_factor=0.8 if seed == 1 else None, prune_last_layer=seed == 0,
    )  # fmt: skip
    bytes_of = {site.site: site.expert_bytes for site in trace.sites}
    all_bytes = sum(site.num_experts * site.expert_bytes for site in trace.sites)
    capacities = [2, 5, "35%", f"{all_bytes // 5}B"]
    options = itertools.product(
        ("layer", "stack", "global"), ("batch", "batch_hits_first", "sequential"),
        ("empty", "full"), (1, 2),
    )  # fmt: skip
    # A third of the options for each trace, in turn: every value meets every trace.
    for number, (scope, semantics, initial, devices) in enumerate(options):
        if (number // 4 + number) % 3 != seed:
            continue
        table = replay.buffering(
            trace, policies=POLICIES, capacities=capacities, scope=scope, semantics=semantics,
            initial=initial, devices=devices, jobs=1,
        ).table  # fmt: skip
        found = {
            (row.policy, row.capacity, row.phase): (
                row.num_lookups, row.num_hits, row.bytes_moved, row.bytes_streamed,
            )
            for row in table.itertuples()
        }  # fmt: skip
        wanted = {}
        for keys, dispatches in caches(trace, scope, devices):
            for policy, asked in itertools.product(POLICIES, capacities):
                size, capacity = size_and_capacity(asked, keys, bytes_of, all_bytes)
                for phase, expert, hit, streamed in replayed(
                    keys, dispatches, size, capacity, policy, semantics, initial
                ):
                    cost = bytes_of[expert[0]]
                    for each in (phase, "all"):
                        row = wanted.setdefault((policy, asked, each), [0, 0, 0, 0])
                        row[0] += 1
                        row[1] += hit
                        row[2] += cost * (not hit)
                        row[3] += cost * streamed
        assert found == {place: tuple(row) for place, row in wanted.items()}
