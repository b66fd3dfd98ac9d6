"""Every policy under every semantics, against cases worked out by hand and against definitions.

The definition-only reference below is written from the design's text over raw rows and shares no
code with the machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from cache_tools import random_rows, stream_of

from moeprof.replay.cache import policies, reference
from moeprof.replay.cache.streams import Stream

ALL = tuple(policies.POLICIES)


def hits(dispatches: Sequence[Sequence[int]], policy: str, capacity: int, **options: object) -> str:
    """Returns lookups by dispatch: h hit, m miss kept, s miss streamed."""
    sizes = options.pop("sizes", None)
    stream = stream_of(dispatches, sizes=sizes, num_keys=options.pop("num_keys", None))  # type: ignore[arg-type]
    if options.get("semantics") == "sequential":
        stream = stream.by_key()
    result = reference.replay(
        stream,
        policy,
        sizes=stream.key_bytes.tolist(),
        capacity=capacity,
        **options,  # type: ignore[arg-type]
    )
    letters = np.where(result.hit, "h", np.where(result.streamed, "s", "m"))
    bounds = stream.offset.tolist()
    return " ".join("".join(letters[first:stop]) for first, stop in itertools.pairwise(bounds))


# Dispatches as rows in order of token and slot; capacity; fate of each lookup.
# fmt: off
HAND_CASES: list[tuple[str, str, list[list[int]], int, str]] = [
    # The row order decides: 1 is refreshed after 2 by its repeated row, so 2 leaves.
    ("lru", "batch", [[1, 2, 1], [3], [1], [2]], 2, "mm m h m"),
    # Without the repeat, 1 leaves.
    ("lru", "batch", [[1, 2], [3], [2], [1]], 2, "mm m h m"),
    # More experts than slots: the last rows stay; 1 and 2 are streamed.
    ("lru", "batch", [[1, 2, 3, 4], [3, 4], [1]], 2, "ssmm hh m"),
    # A hit is judged at arrival: 1 hits although two others need its slot; 1 is older, leaves.
    ("lru", "batch", [[1], [1, 2, 3], [1]], 2, "m hmm m"),
    # Hits are refreshed first: 1 (hit, last row) is older than misses 2 and 3, so it leaves.
    ("lru", "batch_hits_first", [[1], [2, 3, 1], [1]], 2, "m mmh m"),
    # Under batch the last row of 1 counts: 2 leaves, streamed.
    ("lru", "batch", [[1], [2, 3, 1], [1]], 2, "m smh h"),
    # By increasing id; 1 makes room for 3, then 2 for 1 before 2 is looked up.
    ("lru", "sequential", [[2, 1], [3], [1, 2]], 2, "mm m mm"),
    # First in leaves first although it was just used; the dispatch's own are spared.
    ("fifo", "batch", [[1, 2], [1], [3], [1], [2]], 2, "mm h m m m"),
    ("fifo", "batch", [[1, 2], [1, 3], [2], [1]], 2, "mm hm m m"),
    ("fifo", "sequential", [[1, 2], [1, 3], [2], [1]], 2, "mm hm h m"),
    ("lifo", "batch", [[1, 2], [3], [1], [2], [3]], 2, "mm m h m m"),
    # Overflow: what was inserted last leaves; 1 and 2 stay.
    ("lifo", "batch", [[1, 2, 3], [1, 2], [3]], 2, "mms hh m"),
    # The paper's example: need 1 2 3 with two slots; 2 makes room for 3, 1 stays.
    ("paper", "sequential", [[1, 2, 3], [1, 2, 3]], 2, "msm hsm"),
    ("lifo", "sequential", [[1, 2, 3], [1, 2, 3]], 2, "msm hsm"),
    # Inactive first: 9 leaves for 3 although 1 was inserted later; plain lifo takes 1.
    ("paper", "sequential", [[9, 1], [1, 3], [1]], 2, "mm hm h"),
    ("lifo", "sequential", [[1, 9], [1, 3, 9], [9]], 2, "mm hsm h"),
    ("paper", "sequential", [[1, 9], [1, 3, 9], [9]], 2, "mm hsm h"),
    ("lifo", "sequential", [[0, 5], [1, 5], [5]], 2, "mm sm h"),
    ("paper", "sequential", [[0, 5], [1, 5], [5]], 2, "mm mh h"),
    # Counts: 1 was looked up twice, so 2 leaves.
    ("lfu", "batch", [[1, 2], [1], [3], [1], [2]], 2, "mm h m h m"),
    # Repeated rows count once: 1 and 2 tie, the last row of 1 is older.
    ("lfu", "batch", [[1, 1, 1, 2], [3], [2], [1]], 2, "mm m h m"),
    # Counts are forgotten: 1 comes back with one lookup and leaves before 2.
    ("lfu", "batch", [[1], [1], [2], [3], [2], [1]], 1, "m h m m m m"),
    # Farthest next dispatch: 2 comes later than 1.
    ("min", "batch", [[1, 2], [3], [1], [2]], 2, "mm m h m"),
    # Never again ties with never again: the larger id leaves.
    ("min", "batch", [[1, 2], [0], [1]], 2, "mm m h"),
    # Both used in the dispatch after next: a tie, the larger id leaves.
    ("min", "batch", [[1, 2], [3], [2, 1]], 2, "mm m mh"),
    # Every miss is inserted, so 1 has to leave for 3, which is not used again.
    ("min", "batch", [[1], [3], [1]], 1, "m m m"),
    ("min_bypass", "batch", [[1], [3], [1]], 1, "m s h"),
    # Next lookup: 1 comes before 2 within the next dispatch.
    ("min", "sequential", [[1, 2], [3], [1, 2]], 2, "mm m hm"),
    ("min_bypass", "sequential", [[1, 2], [3], [1, 2]], 2, "mm s hh"),
    # A touched expert may leave: 1 is never used again, 2 and 3 are.
    ("min_bypass", "batch", [[1, 2, 3], [2, 3]], 2, "smm hh"),
    ("min", "batch", [[1, 2, 3], [2, 3]], 2, "smm hh"),
    # Window A = first two dispatches: 2 most used, then 1 (smaller id); 3 is streamed.
    ("pinned", "batch", [[1, 2], [2, 3], [3], [1, 2]], 2, "mm hs s hh"),
    ("layers", "batch", [[0, 1], [0, 1]], 1, "ss ss"),
    ("layers", "batch", [[0, 1], [0, 1]], 2, "mm hh"),
    # Small holds 1, main 9: 2 to 10 go to main, as small is full and nothing has left. For 11, 1
    # moves to main (two lookups since), which is then too large: 2 leaves, no ghost. 11 leaves
    # small for 2 and is a ghost; it comes back into main.
    ("s3fifo", "batch", [[1], [1], [1], *[[n] for n in range(2, 12)], [1], [2], [3], [11]], 10,
     "m h h m m m m m m m m m m h m h m"),
    # T1 = 1 2, both once; 1 again -> T2. 3 takes 2 from T1; 2 is a ghost, p = 1, enters T2;
    # T1 (3) is as large as p, not larger: T2's oldest, 1, leaves.
    ("arc", "batch", [[1, 2], [1], [3], [2], [3], [1]], 2, "mm h m m h m"),
]
# fmt: on


@pytest.mark.parametrize(("policy", "semantics", "dispatches", "capacity", "fates"), HAND_CASES)
def test_hand_cases(
    policy: str, semantics: str, dispatches: list[list[int]], capacity: int, fates: str
) -> None:
    assert hits(dispatches, policy, capacity, semantics=semantics) == fates


def test_initial_full() -> None:
    # 0 and 1 are there; 0 was inserted first and leaves first under lru.
    assert hits([[2], [1], [0]], "lru", 2, initial="full") == "m h m"
    assert hits([[2], [0], [1]], "lifo", 2, initial="full") == "m h m"
    # Frequency 0: 1 leaves (older of the two untouched counts is 0, but 0 was hit).
    assert hits([[0], [2], [0], [1]], "lfu", 2, initial="full") == "h m h m"
    assert hits([[3], [0, 1, 2]], "min", 3, initial="full") == "m hhm"


def test_sizes_in_bytes() -> None:
    # 10 bytes hold 0 (6) and 1 (4); 2 (5) pushes both out, oldest first.
    sizes = [6, 4, 5]
    assert hits([[0, 1], [2], [1], [0]], "lru", 10, sizes=sizes) == "mm m h m"
    assert hits([[0, 1], [0], [2], [1]], "lru", 10, sizes=sizes) == "mm h m m"
    # Too large for the cache at all: streamed, and nobody leaves for it one by one.
    assert hits([[1], [0], [1]], "lru", 5, sizes=sizes, semantics="sequential") == "m s h"


@pytest.mark.parametrize("policy", [name for name in ALL if name not in ("layers",)])
@pytest.mark.parametrize("semantics", policies.SEMANTICS)
def test_everything_fits_or_nothing_does(policy: str, semantics: str) -> None:
    dispatches = [[0, 1, 2], [2, 1], [0, 3], [3, 2, 1, 0]]
    full = hits(dispatches, policy, 4, semantics=semantics)
    if policy == "pinned":
        assert full.startswith("mmm hh")
    else:
        assert full == "mmm hh hm hhhh"
    assert "h" not in hits(dispatches, policy, 0, semantics=semantics)


@pytest.mark.parametrize("policy", ["fifo", "lifo", "paper", "lru", "lfu", "s3fifo", "arc", "min"])
def test_single_lookups_are_the_same_under_all_semantics(policy: str) -> None:
    """A dispatch of one expert is one lookup, so what is measured before it is the same."""
    rng = np.random.default_rng(5)
    for capacity in (1, 2, 5, 11, 30):
        rows = random_rows(rng, num_keys=40, num_dispatches=600, max_rows=1, drift=0.02)
        fates = {hits(rows, policy, capacity, semantics=each) for each in policies.SEMANTICS}
        assert len(fates) == 1


# --- Written from the design alone -------------------------------------------------------------

Rows = list[list[int]]


def _defined(
    rows_of: Rows,
    order: Callable[[int, dict[str, dict[int, int]]], object],
    capacity: int,
    *,
    hits_first: bool = False,
    spare: bool = True,
) -> tuple[list[bool], list[int]]:
    """Replays row by row; who leaves is the smallest by ``order``."""
    facts: dict[str, dict[int, int]] = {"recency": {}, "inserted": {}, "count": {}, "next": {}}
    resident: set[int] = set()
    clock = 0
    fates = []
    sizes = []
    for number, rows in enumerate(rows_of):
        at_arrival = set(resident)
        for key in dict.fromkeys(rows):
            fates.append(key in at_arrival)
        later = rows
        if hits_first:
            later = [r for r in rows if r in at_arrival] + [r for r in rows if r not in at_arrival]
        counted: set[int] = set()
        for key in later:
            clock += 1
            if key not in resident:
                resident.add(key)
                facts["inserted"][key] = clock
                facts["count"][key] = 0
            if key not in counted:
                counted.add(key)
                facts["count"][key] += 1
            facts["recency"][key] = clock
            after = [n for n in range(number + 1, len(rows_of)) if key in rows_of[n]]
            facts["next"][key] = after[0] if after else 10**9
        while len(resident) > capacity:
            free = [key for key in resident if key not in rows or not spare]
            resident.remove(min(free or resident, key=lambda key: order(key, facts)))  # type: ignore[type-var,arg-type,return-value]
        sizes.append(len(resident))
    return fates, sizes


DEFINED: dict[str, Callable[[int, dict[str, dict[int, int]]], object]] = {
    "lru": lambda key, facts: facts["recency"][key],
    "fifo": lambda key, facts: facts["inserted"][key],
    "lifo": lambda key, facts: -facts["inserted"][key],
    "paper": lambda key, facts: -facts["inserted"][key],
    "lfu": lambda key, facts: (facts["count"][key], facts["recency"][key]),
    "min": lambda key, facts: (-facts["next"][key], -key),
    "min_bypass": lambda key, facts: (-facts["next"][key], -key),
}


@pytest.mark.parametrize("policy", list(DEFINED))
@pytest.mark.parametrize("hits_first", [False, True])
def test_machines_follow_the_definition(policy: str, hits_first: bool) -> None:
    """Dispatches up to four times the capacity; never more resident than fits."""
    rng = np.random.default_rng(1)
    semantics = "batch_hits_first" if hits_first else "batch"
    for _ in range(25):
        num_keys = int(rng.integers(2, 20))
        capacity = int(rng.integers(1, num_keys + 1))
        rows = random_rows(
            rng,
            num_keys=num_keys,
            num_dispatches=40,
            max_rows=int(rng.integers(1, 4 * capacity + 1)),
        )
        wanted, sizes = _defined(
            rows, DEFINED[policy], capacity, hits_first=hits_first, spare=policy != "min_bypass"
        )
        stream = stream_of(rows, num_keys=num_keys)
        found = reference.replay(
            stream, policy, sizes=[1] * num_keys, capacity=capacity, semantics=semantics
        )
        assert found.hit.tolist() == wanted
        assert max(sizes) <= capacity
        assert found.most_used <= capacity


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("semantics", policies.SEMANTICS)
@pytest.mark.parametrize("initial", policies.INITIALS)
def test_never_more_than_fits(policy: str, semantics: str, initial: str) -> None:
    """Any sizes, dispatches up to four times the capacity."""
    rng = np.random.default_rng(2)
    for unit in (True, False):
        for _ in range(3):
            num_keys = int(rng.integers(3, 24))
            sizes = [1] * num_keys if unit else rng.integers(1, 9, num_keys).tolist()
            capacity = int(rng.integers(1, sum(sizes)))
            rows = random_rows(rng, num_keys=num_keys, num_dispatches=50, max_rows=4 * capacity)
            stream: Stream = stream_of(rows, num_keys=num_keys, sizes=sizes)
            if semantics == "sequential":
                stream = stream.by_key()
            found = reference.replay(
                stream,
                policy,
                sizes=sizes,
                capacity=capacity,
                semantics=semantics,
                initial=initial,
            )
            assert found.most_used <= capacity
            assert not (found.hit & found.streamed).any()


def test_uniform_sets_hit_what_fits() -> None:
    """Uniform independent sets: batch LRU hits C/E; one by one it hits less."""
    rng = np.random.default_rng(3)
    rows = [rng.permutation(16)[:4].tolist() for _ in range(12_000)]
    stream = stream_of(rows, num_keys=16)
    for capacity, one_by_one in ((4, 0.1885), (8, 0.4486), (12, 0.7197)):
        together = reference.replay(stream, "lru", sizes=[1] * 16, capacity=capacity)
        assert abs(together.hit.mean() - capacity / 16) < 0.008
        alone = reference.replay(
            stream.by_key(), "lru", sizes=[1] * 16, capacity=capacity, semantics="sequential"
        )
        assert abs(alone.hit.mean() - one_by_one) < 0.008


def test_cyclic_access() -> None:
    """Cyclic access of N experts: LRU 0, LIFO (C-1)/N, MIN (C-1)/(N-1)."""
    num_rounds, num_experts = 400, 24
    rows = [list(range(num_experts))] * num_rounds
    stream = stream_of(rows, num_keys=num_experts)
    for capacity in (6, 12, 18):
        rate = {
            policy: reference.replay(
                stream, policy, sizes=[1] * num_experts, capacity=capacity, semantics="sequential"
            ).hit.mean()
            for policy in ("lru", "lifo", "min")
        }
        assert rate["lru"] == 0
        assert abs(rate["lifo"] - (capacity - 1) / num_experts) < 0.003
        assert abs(rate["min"] - (capacity - 1) / (num_experts - 1)) < 0.003
