"""Kernels and curves against the state machines, lookup by lookup, on random traces."""

from __future__ import annotations

import numpy as np
import pytest
from cache_tools import random_rows, stream_of

from moeprof.replay.cache import curves, engine, policies, reference
from moeprof.replay.cache.streams import Stream

ALL = tuple(policies.POLICIES)


def _same_as_machines(
    stream: Stream,
    policy: str,
    sizes: list[int],
    capacities: list[int],
    *,
    semantics: str,
    initial: str,
    curve: bool,
) -> None:
    found = engine.hits(
        stream,
        policy,
        sizes=np.array(sizes, np.int64),
        capacities=capacities,
        semantics=semantics,
        initial=initial,
        cache=3,
        curve=curve,
    )
    weight = stream.key_bytes[stream.key]
    phase = stream.lookup_phase()
    for index, capacity in enumerate(capacities):
        slow = reference.replay(
            stream,
            policy,
            sizes=sizes,
            capacity=capacity,
            semantics=semantics,
            initial=initial,
            cache=3,
        )
        assert slow.most_used <= capacity
        np.testing.assert_array_equal(found.at(index), slow.hit, err_msg=f"{policy} {capacity}")
        streamed = np.bincount(phase, weights=weight * slow.streamed, minlength=4)
        np.testing.assert_array_equal(found.streamed[index], streamed, err_msg=str(capacity))


def _random_stream(rng: np.random.Generator, *, unit: bool) -> tuple[Stream, list[int], list[int]]:
    num_keys = int(rng.integers(2, 40))
    sizes = [1] * num_keys if unit else rng.integers(1, 9, num_keys).tolist()
    rows = random_rows(
        rng,
        num_keys=num_keys,
        num_dispatches=int(rng.integers(1, 90)),
        max_rows=int(rng.choice([1, 3, 20, 2 * num_keys])),
        skew=float(rng.choice([0.0, 0.8, 1.5])),
    )
    stream = stream_of(
        rows,
        num_keys=num_keys,
        phases=rng.integers(0, 4, len(rows)).tolist(),
        key_site=sorted(rng.integers(0, 4, num_keys).tolist()),
    )
    object.__setattr__(stream, "key_bytes", np.array(rng.integers(1, 50, num_keys), np.int64))
    # From a quarter of the largest dispatch on: dispatches up to 4C and beyond.
    whole = sum(sizes)
    capacities = sorted({int(each) for each in rng.integers(1, whole + 1, 4)} | {1, whole})
    return stream, sizes, capacities


@pytest.mark.parametrize("semantics", policies.SEMANTICS)
@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("unit", [True, False])
def test_kernels_equal_the_machines(policy: str, semantics: str, unit: bool) -> None:
    rng = np.random.default_rng(list(policy.encode()))
    for index in range(8):
        stream, sizes, capacities = _random_stream(rng, unit=unit)
        if semantics == "sequential":
            stream = stream.by_key()
        _same_as_machines(
            stream,
            policy,
            sizes,
            capacities,
            semantics=semantics,
            initial=policies.INITIALS[index % 2],
            curve=False,
        )


@pytest.mark.parametrize(
    ("policy", "semantics", "initial"),
    [
        (policy, semantics, initial)
        for policy in ALL
        for semantics in policies.SEMANTICS
        for initial in policies.INITIALS
        if curves.exists(policy, semantics=semantics, initial=initial)
    ],
)
def test_curves_equal_single_sizes(policy: str, semantics: str, initial: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(12):
        stream, sizes, _ = _random_stream(rng, unit=True)
        if semantics == "sequential":
            stream = stream.by_key()
        _same_as_machines(
            stream,
            policy,
            sizes,
            list(range(1, len(sizes) + 1)),
            semantics=semantics,
            initial=initial,
            curve=True,
        )


@pytest.mark.parametrize("policy", ["lru", "min", "lifo"])
def test_curves_of_many_keys(policy: str) -> None:
    """Windows are repacked and blocks passed over: more keys than one block, word or window."""
    rng = np.random.default_rng(11)
    num_keys = 700
    weight = np.arange(1, num_keys + 1) ** -0.7
    keys = rng.choice(num_keys, size=12_000, p=weight / weight.sum())
    stream = stream_of([[int(key)] for key in keys], num_keys=num_keys)
    capacities = [1, 2, 15, 16, 17, 127, 128, 129, 300, 500, 699, 700]
    fast = engine.hits(
        stream,
        policy,
        sizes=np.ones(num_keys, np.int64),
        capacities=capacities,
        semantics="sequential",
    )
    single = engine.hits(
        stream,
        policy,
        sizes=np.ones(num_keys, np.int64),
        capacities=capacities,
        semantics="sequential",
        curve=False,
    )
    np.testing.assert_array_equal(fast.mask, single.mask)
    if policy != "lifo":
        rows = [list(map(int, rng.choice(num_keys, size=40))) for _ in range(600)]
        stream = stream_of(rows, num_keys=num_keys)
        fast = engine.hits(stream, policy, sizes=np.ones(num_keys, np.int64), capacities=capacities)
        single = engine.hits(
            stream, policy, sizes=np.ones(num_keys, np.int64), capacities=capacities, curve=False
        )
        np.testing.assert_array_equal(fast.mask, single.mask)
        np.testing.assert_array_equal(fast.streamed, single.streamed)


def test_more_capacities_than_bits() -> None:
    rng = np.random.default_rng(4)
    rows = random_rows(rng, num_keys=150, num_dispatches=80, max_rows=60)
    stream = stream_of(rows, num_keys=150)
    capacities = list(range(1, 150))
    for policy in ("lru", "fifo"):
        found = engine.hits(stream, policy, sizes=np.ones(150, np.int64), capacities=capacities)
        for index in (0, 63, 64, 127, 128, 148):
            slow = reference.replay(stream, policy, sizes=[1] * 150, capacity=capacities[index])
            np.testing.assert_array_equal(found.at(index), slow.hit)
