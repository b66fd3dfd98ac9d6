"""Every cache policy as a small state machine, with its source and its ties in one table.

`TABLE` is the definition. A machine knows residency and order; when an expert is looked up, and
when something has to leave, is decided by the semantics (`moeprof.replay.cache.reference`). Sizes
and capacity share one unit: slots where all experts of a cache have one size, else bytes. Experts
are dense keys, ascending by site and expert id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

SEMANTICS = ("batch", "batch_hits_first", "sequential")
INITIALS = ("empty", "full")
BOUND = "bound"

RANDOM_SEED = 1
NEVER = 1 << 62
"""Next use of an expert that is not used again."""

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SMALL_SHARE = 10
_GHOST_SHARE = 9
S3_MAX_FREQUENCY = 3
S3_PROMOTION = 2
NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PolicyDefinition:
    """One row of the policy table.

    Attributes:
        name: As in ``policies=``.
        source: Where it comes from.
        leaves: Who leaves first, ties included.
        sets: What ``batch`` means where it does not follow from the rule for all policies.
        sees_future: True for policies no device can run.
        fits_trace: True for policies planned on a part of the trace they are scored on.
    """

    name: str
    source: str
    leaves: str
    sets: str = ""
    sees_future: bool = False
    fits_trace: bool = False


TABLE: tuple[PolicyDefinition, ...] = (
    PolicyDefinition(
        name="paper",
        source="Huang et al., arXiv 2303.06182, section VI (expert buffering)",
        leaves="experts that are not active in this dispatch, the one inserted last first; then "
        "active ones, the one inserted last first",
        sets="under batch every policy spares the active first, so paper is lifo there; the two "
        "differ under sequential",
    ),
    PolicyDefinition(
        name="lifo",
        source="last in, first out; the rule inside the paper's",
        leaves="the expert inserted last; hits change nothing",
    ),
    PolicyDefinition(
        name="fifo",
        source="first in, first out",
        leaves="the expert inserted first; hits change nothing",
    ),
    PolicyDefinition(
        name="lru",
        source="least recently used; per layer as in mixtral-offloading (arXiv 2312.17238)",
        leaves="the expert whose last row (token, then slot as recorded) lies farthest back",
    ),
    PolicyDefinition(
        name="lfu",
        source="least frequently used, counted while resident",
        leaves="the lowest count of lookups; among equals the one whose last row lies farthest "
        "back; counts are forgotten on eviction",
    ),
    PolicyDefinition(
        name="s3fifo",
        source="Yang et al., SOSP 2023: small queue 10 %, main queue 90 %, ghosts for 90 %",
        leaves="from main where it exceeds its 90 % or small is empty, else from small; small: "
        "first in, looked up twice or more since = moved to main, and the next of small is asked, "
        "else leaves into the ghosts; "
        "main: first in, looked up since = to the back with one count less, else leaves",
        sets="ghosts are those at arrival; counts rise once per lookup, up to 3; experts of the "
        "dispatch are passed over while others leave, and new ones queue up after that; until the "
        "first eviction new experts go to main once small is full; small holds at least one",
    ),
    PolicyDefinition(
        name="arc",
        source="Megiddo and Modha, FAST 2003",
        leaves="from T1 (seen once) where it is larger than its target p, or as large after a hit "
        "in the ghosts of T2, or T2 is empty; else from T2; either by last row",
        sets="ghosts and their sizes are those at arrival: each ghost hit moves p by "
        "max(1, ratio of ghost sizes), in units of the expert's size; new experts of the dispatch "
        "are not counted in T1 while others leave; ghosts are cut back after the dispatch",
    ),
    PolicyDefinition(
        name="random",
        source="control",
        leaves="drawn evenly among those that may leave, listed by site and id when the first of "
        "a dispatch is drawn; the last of the list takes the place of the one drawn; xorshift64* "
        "seeded per cache",
    ),
    PolicyDefinition(
        name="pinned",
        source="static placement of hot experts (Fiddler, arXiv 2402.07033)",
        leaves="experts with most lookups in window A (the first half of the cache's dispatches; "
        "ties: smaller site, then smaller id; as many as fit) enter at their first miss and stay; "
        "all others are streamed",
        fits_trace=True,
    ),
    PolicyDefinition(
        name="layers",
        source="whole layers kept on the device, as engines offload",
        leaves="experts of the first sites, as many whole sites as fit, enter at their first miss "
        "and stay; all others are streamed",
    ),
    PolicyDefinition(
        name="min",
        source="Belady 1966, inserting every miss",
        leaves="the farthest next use: next dispatch under batch, next lookup under sequential; "
        "ties: larger site, then larger id",
        sees_future=True,
    ),
    PolicyDefinition(
        name="min_bypass",
        source="Belady 1966, where a miss need not be kept",
        leaves="as min, but experts of the dispatch are not spared",
        sets="optimal for equal sizes and all phases together",
        sees_future=True,
    ),
)

POLICIES: Mapping[str, PolicyDefinition] = {each.name: each for each in TABLE}


class Machine:
    """Residency and order of one cache; subclasses say who leaves.

    Attributes:
        sizes: Size of each key.
        capacity: In the unit of the sizes.
        used: Size of all residents; may exceed the capacity within a dispatch only.
    """

    spares_active: ClassVar[bool] = False
    """True where experts of the whole dispatch are spared also under ``sequential``."""
    bypasses: ClassVar[bool] = False
    """True where experts of the dispatch are not spared, and a newcomer may leave at once."""

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        self.sizes = sizes
        self.capacity = capacity
        self.used = 0
        self._residents: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._residents

    def arrive(self, keys: Collection[int]) -> None:
        """Tells which experts are looked up together, before any of them is.

        Args:
            keys: All of a dispatch under ``batch*``, one under ``sequential``.
        """

    def hit(self, key: int) -> None:
        """Counts a lookup that found its expert."""

    def insert(self, key: int) -> None:
        """Makes an expert resident; some policies refuse."""
        self._residents[key] = None
        self.used += self.sizes[key]

    def place(self, key: int) -> None:
        """Makes an expert resident before the first dispatch, not counting as a lookup."""
        self.insert(key)

    def touch(self, key: int) -> None:
        """Refreshes recency: called once per expert, in the order of last rows."""

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts one expert that is not protected and returns it; None where there is none."""
        for key in self._order():
            if key not in protected:
                self._evict(key)
                return key
        return None

    def _order(self) -> Iterable[int]:
        """Returns the residents, first to leave first."""
        return self._residents

    def _evict(self, key: int) -> None:
        del self._residents[key]
        self.used -= self.sizes[key]


class Fifo(Machine):
    """First in, first out."""


class Lifo(Machine):
    """Last in, first out."""

    def _order(self) -> Iterable[int]:
        return reversed(self._residents)


class Paper(Lifo):
    """Inactive experts first, then last in, first out."""

    spares_active = True


class Lru(Machine):
    """Least recently used."""

    def touch(self, key: int) -> None:
        """Moves the expert to the recent end."""
        if key in self._residents:
            self._residents.move_to_end(key)


class Lfu(Machine):
    """Least frequently used; counts live as long as residency."""

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        super().__init__(sizes, capacity)
        self._frequency: dict[int, int] = {}

    def hit(self, key: int) -> None:
        """Counts it."""
        self._frequency[key] += 1

    def insert(self, key: int) -> None:
        """Starts at one."""
        super().insert(key)
        self._frequency[key] = 1

    def place(self, key: int) -> None:
        """Starts at zero."""
        super().insert(key)
        self._frequency[key] = 0

    def touch(self, key: int) -> None:
        """Moves the expert behind its equals."""
        if key in self._residents:
            self._residents.move_to_end(key)

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts the lowest count; `min` keeps the order of last rows among equals."""
        free = (key for key in self._residents if key not in protected)
        found = min(free, key=self._frequency.__getitem__, default=None)
        if found is not None:
            self._evict(found)
        return found

    def _evict(self, key: int) -> None:
        super()._evict(key)
        del self._frequency[key]


class S3Fifo(Machine):
    """Small and main queues with ghosts."""

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        super().__init__(sizes, capacity)
        self._small_capacity, self._main_capacity, self._ghost_capacity = s3_shares(capacity)
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._small_used = self._main_used = self._ghosts_used = 0
        self._frequency: dict[int, int] = {}
        self._from_ghosts: set[int] = set()
        self._has_evicted = False
        self._newcomers: list[int] = []

    def __contains__(self, key: int) -> bool:
        return key in self._frequency

    def arrive(self, keys: Collection[int]) -> None:
        """Notes which experts are ghosts, and whether room will have to be made."""
        self._join()
        missing = [key for key in keys if key not in self]
        self._from_ghosts = {key for key in missing if key in self._ghosts}
        for key in self._from_ghosts:
            self._forget(key)
        if self.used + sum(self.sizes[key] for key in missing) > self.capacity:
            self._has_evicted = True

    def hit(self, key: int) -> None:
        """Counts it, up to three."""
        self._frequency[key] = min(self._frequency[key] + 1, S3_MAX_FREQUENCY)

    def insert(self, key: int) -> None:
        """Goes to small, or to main where it was a ghost; queues up when room has been made."""
        self._frequency[key] = 0
        self._newcomers.append(key)
        self.used += self.sizes[key]

    def _join(self) -> None:
        """Lets the newcomers into the queues."""
        for key in self._newcomers:
            size = self.sizes[key]
            full = self._small_used >= self._small_capacity
            if key in self._from_ghosts or (full and not self._has_evicted):
                self._main[key] = None
                self._main_used += size
            else:
                self._small[key] = None
                self._small_used += size
        self._newcomers = []

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts one expert; see the table."""
        if not protected:
            self._join()
        from_small = False
        while True:
            small = next((key for key in self._small if key not in protected), None)
            main = next((key for key in self._main if key not in protected), None)
            if small is None and main is None:
                return None
            if main is not None and (
                small is None or (self._main_used > self._main_capacity and not from_small)
            ):
                if self._frequency[main]:
                    self._frequency[main] -= 1
                    self._main.move_to_end(main)
                    continue
                del self._main[main]
                self._main_used -= self.sizes[main]
                self._gone(main)
                return main
            assert small is not None
            from_small = True
            size = self.sizes[small]
            del self._small[small]
            self._small_used -= size
            if self._frequency[small] >= S3_PROMOTION:
                self._main[small] = None
                self._main_used += size
                self._frequency[small] = 0
                continue
            self._gone(small)
            self._remember(small)
            return small

    def _gone(self, key: int) -> None:
        del self._frequency[key]
        self.used -= self.sizes[key]

    def _remember(self, key: int) -> None:
        size = self.sizes[key]
        if size > self._ghost_capacity:
            return
        while self._ghosts_used + size > self._ghost_capacity:
            self._forget(next(iter(self._ghosts)))
        self._ghosts[key] = None
        self._ghosts_used += size

    def _forget(self, key: int) -> None:
        del self._ghosts[key]
        self._ghosts_used -= self.sizes[key]


class Arc(Machine):
    """Adaptive replacement: T1 seen once, T2 seen more often, ghosts B1 and B2."""

    def __init__(self, sizes: Sequence[int], capacity: int) -> None:
        super().__init__(sizes, capacity)
        self._lists: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(2))
        self._ghosts: tuple[OrderedDict[int, None], ...] = tuple(OrderedDict() for _ in range(2))
        self._list_used = [0, 0]
        self._ghost_used = [0, 0]
        self._target = 0.0
        self._hit_second_ghosts = False
        self._returning: set[int] = set()
        self._newcomers: set[int] = set()

    def __contains__(self, key: int) -> bool:
        return key in self._lists[0] or key in self._lists[1]

    def arrive(self, keys: Collection[int]) -> None:
        """Cuts the ghosts back, measures them and moves the target."""
        self._trim()
        self._newcomers = set()
        self._returning = set()
        self._hit_second_ghosts = False
        first, second = self._ghost_used
        for key in keys:
            size = self.sizes[key]
            if key in self._ghosts[0]:
                step = max(1.0, second / first) * size
                self._target = min(self._target + step, float(self.capacity))
            elif key in self._ghosts[1]:
                step = max(1.0, first / second) * size
                self._target = max(self._target - step, 0.0)
                self._hit_second_ghosts = True
            else:
                continue
            self._returning.add(key)
        for key in self._returning:
            self._forget(0 if key in self._ghosts[0] else 1, key)

    def hit(self, key: int) -> None:
        """Moves the expert to the recent end of T2."""
        size = self.sizes[key]
        if key in self._lists[0]:
            del self._lists[0][key]
            self._list_used[0] -= size
            self._list_used[1] += size
            self._lists[1][key] = None
        else:
            self._lists[1].move_to_end(key)

    def insert(self, key: int) -> None:
        """Enters T2 where it was a ghost, else T1."""
        which = 1 if key in self._returning else 0
        self._lists[which][key] = None
        self._list_used[which] += self.sizes[key]
        self._newcomers.add(key)
        self.used += self.sizes[key]

    def touch(self, key: int) -> None:
        """Moves the expert to the recent end of its list."""
        for each in self._lists:
            if key in each:
                each.move_to_end(key)

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts from T1 or T2; see the table."""
        found = [next((key for key in each if key not in protected), None) for each in self._lists]
        if found == [None, None]:
            return None
        first = self._list_used[0]
        if protected:
            spared = (key for key in self._newcomers if key in self._lists[0])
            first -= sum(self.sizes[key] for key in spared)
        too_large = first > self._target or (first == self._target and self._hit_second_ghosts)
        which = 0 if (first > 0 and too_large) or found[1] is None else 1
        if found[which] is None:
            which = 1 - which
        key = found[which]
        assert key is not None
        size = self.sizes[key]
        del self._lists[which][key]
        self._list_used[which] -= size
        self.used -= size
        self._ghosts[which][key] = None
        self._ghost_used[which] += size
        return key

    def _trim(self) -> None:
        while self._ghosts[0] and self._list_used[0] + self._ghost_used[0] > self.capacity:
            self._forget(0, next(iter(self._ghosts[0])))
        while self._ghosts[1] and self.used + sum(self._ghost_used) > 2 * self.capacity:
            self._forget(1, next(iter(self._ghosts[1])))

    def _forget(self, which: int, key: int) -> None:
        del self._ghosts[which][key]
        self._ghost_used[which] -= self.sizes[key]


class Random(Machine):
    """Anyone may leave.

    Args:
        sizes: Size of each key.
        capacity: In the unit of the sizes.
        seed: From `seed_of`.
    """

    def __init__(self, sizes: Sequence[int], capacity: int, *, seed: int) -> None:
        super().__init__(sizes, capacity)
        self._state = seed
        self._candidates: list[int] | None = None
        self._protected: Collection[int] = NOBODY

    @property
    def state(self) -> int:
        """State of the random numbers; the seed before the first eviction."""
        return self._state

    def arrive(self, keys: Collection[int]) -> None:
        """Starts a new list of candidates."""
        self._candidates = None

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts one at random."""
        if self._candidates is None or self._protected is not protected:
            self._candidates = sorted(key for key in self._residents if key not in protected)
            self._protected = protected
        candidates = self._candidates
        if not candidates:
            return None
        self._state, drawn = xorshift(self._state)
        index = drawn % len(candidates)
        key = candidates[index]
        candidates[index] = candidates[-1]
        candidates.pop()
        self._evict(key)
        return key


class Static(Machine):
    """A fixed set stays once it has entered; nobody else is kept.

    Args:
        sizes: Size of each key.
        capacity: In the unit of the sizes.
        kept: The set; it fits.
    """

    bypasses = True

    def __init__(self, sizes: Sequence[int], capacity: int, *, kept: Collection[int]) -> None:
        super().__init__(sizes, capacity)
        self._kept = frozenset(kept)

    @property
    def kept(self) -> frozenset[int]:
        """The set."""
        return self._kept

    def insert(self, key: int) -> None:
        """Takes members of the set only."""
        if key in self._kept:
            super().insert(key)

    def place(self, key: int) -> None:
        """Takes anybody; who is no member leaves when room is needed."""
        super().insert(key)

    def _order(self) -> Iterable[int]:
        return [key for key in self._residents if key not in self._kept]


class Min(Machine):
    """Farthest next use.

    Args:
        sizes: Size of each key.
        capacity: In the unit of the sizes.
        uses: Ascending times of each key's lookups (dispatches, or lookups).

    Attributes:
        uses: As given.
    """

    def __init__(
        self, sizes: Sequence[int], capacity: int, *, uses: Mapping[int, Sequence[int]]
    ) -> None:
        super().__init__(sizes, capacity)
        self.uses = uses
        self._uses = {key: iter(times) for key, times in uses.items()}
        self._next = {key: next(times, NEVER) for key, times in self._uses.items()}

    def arrive(self, keys: Collection[int]) -> None:
        """Moves on to the next use of the experts looked up."""
        for key in keys:
            self._next[key] = next(self._uses[key], NEVER)

    def victim(self, protected: Collection[int] = NOBODY) -> int | None:
        """Evicts the farthest next use."""
        free = (key for key in self._residents if key not in protected)
        found = max(free, key=lambda key: (self._next.get(key, NEVER), key), default=None)
        if found is not None:
            self._evict(found)
        return found


class MinBypass(Min):
    """Farthest next use, the dispatch's own experts included."""

    bypasses = True


SIMPLE_MACHINES: Mapping[str, type[Machine]] = {
    "paper": Paper,
    "lifo": Lifo,
    "fifo": Fifo,
    "lru": Lru,
    "lfu": Lfu,
    "s3fifo": S3Fifo,
    "arc": Arc,
}


def s3_shares(capacity: int) -> tuple[int, int, int]:
    """Returns the sizes of small, main and ghosts of `S3Fifo`."""
    small = max(1, capacity // _SMALL_SHARE)
    return small, capacity - small, capacity * _GHOST_SHARE // _SMALL_SHARE


def seed_of(cache: int, seed: int = RANDOM_SEED) -> int:
    """Returns the first state of the random numbers of a cache (splitmix64; never 0)."""
    mixed = (seed + (cache + 1) * _GOLDEN) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (mixed ^ (mixed >> 31)) or _GOLDEN


def xorshift(state: int) -> tuple[int, int]:
    """Returns the next state and a number of 31 bits (xorshift64*)."""
    state ^= state >> 12
    state = (state ^ (state << 25)) & _MASK64
    state ^= state >> 27
    return state, ((state * 0x2545F4914F6CDD1D) & _MASK64) >> 33


def most_used(lookups: Sequence[int], sizes: Sequence[int], capacity: int) -> list[int]:
    """Returns the keys that `pinned` keeps: most lookups first, as many as fit.

    Args:
        lookups: Lookups of each key in window A.
        sizes: Size of each key.
        capacity: In the unit of the sizes.
    """
    order = sorted(
        (key for key in range(len(sizes)) if lookups[key]), key=lambda key: (-lookups[key], key)
    )
    kept = []
    free = capacity
    for key in order:
        if sizes[key] > free:
            break
        kept.append(key)
        free -= sizes[key]
    return kept


def whole_sites(sites: Sequence[int], sizes: Sequence[int], capacity: int) -> list[int]:
    """Returns the keys that `layers` keeps: the first sites, as many whole ones as fit.

    Args:
        sites: Site of each key, ascending.
        sizes: Size of each key.
        capacity: In the unit of the sizes.
    """
    kept: list[int] = []
    free = capacity
    for site in sorted(set(sites)):
        keys = [key for key, own in enumerate(sites) if own == site]
        needed = sum(sizes[key] for key in keys)
        if needed > free:
            break
        kept += keys
        free -= needed
    return kept


def placed_at_start(sizes: Sequence[int], capacity: int) -> list[int]:
    """Returns the residents of a cache that starts full: lowest site and id first, until full."""
    placed = []
    free = capacity
    for key, size in enumerate(sizes):
        if size > free:
            break
        placed.append(key)
        free -= size
    return placed
