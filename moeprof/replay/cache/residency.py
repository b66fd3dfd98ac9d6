"""Which experts are on the device, in which slot, and what a dispatch has to copy.

Who stays is decided by the state machines of the replay (`moeprof.replay.cache.policies`) under
``sequential`` semantics: experts run one by one in increasing id and room is made before each
enters. Slots are places in device memory; a cache of C slots never holds more than C experts, but
any slot of the pool may be one of them.

Experts may be copied ahead of their lookup (`moeprof.replay.cache.foresight` says which): each
takes a slot beside the caches. That changes no decision of a policy: a lookup that misses stays a
miss, but finds its copy made or under way. Leaves out copying and computing; knows no torch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeprof.replay.cache import policies
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.policies import Machine
from moeprof.replay.cache.reference import look_up

NO_SLOT = -1
AT_ONCE = -1
MISS_ACTIONS = ("load", "host", "split")


class Planned(NamedTuple):
    """What happens to one active expert of a dispatch.

    Attributes:
        expert: Index at the site.
        hit: It was resident.
        slot: Where it is read from or copied to; `NO_SLOT` where it is neither.
        loads: Its block is copied into the slot.
        on_host: The host computes its rows.
        after: Place in the dispatch of the last expert that reads what is in the slot before the
            copy; `AT_ONCE` where none does.
        ahead: It missed, but was copied into the slot after an earlier dispatch, or still is being
            copied. Then nothing is loaded, and the device computes.
    """

    expert: int
    hit: bool
    slot: int
    loads: bool
    on_host: bool
    after: int
    ahead: bool = False


class Fetched(NamedTuple):
    """An expert that is copied ahead of its lookup, after all else of a dispatch.

    Attributes:
        site: Site that is expected to look it up.
        expert: Index there.
        slot: Where it is copied to.
        after: As in `Planned`, of the dispatch after which it is copied.
    """

    site: int
    expert: int
    slot: int
    after: int


@dataclass(frozen=True, kw_only=True)
class MissRule:
    """What is done about a miss.

    Attributes:
        action: One of `MISS_ACTIONS`. ``load`` copies the expert and computes on the device.
            ``host`` computes its rows on the host; an expert that the policy keeps is copied as
            well, behind the computation, for later lookups. ``split`` does the second where an
            expert has at most ``host_rows`` rows, else the first.
        host_rows: See above.
    """

    action: str = "load"
    host_rows: int = 1

    def is_on_host(self, num_rows: int) -> bool:
        """Returns True where the host computes a miss of that many rows."""
        return self.action == "host" or (self.action == "split" and num_rows <= self.host_rows)


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """One cache.

    Attributes:
        sites: Sites whose experts it holds, ascending, with their number of experts.
        capacity: Slots.
        pool: Pool of slots that it uses.
        machine: Makes its empty state machine.
    """

    sites: tuple[tuple[int, int], ...]
    capacity: int
    pool: int
    machine: Callable[[], Machine]

    @property
    def num_keys(self) -> int:
        """Experts that it may hold."""
        return sum(count for _, count in self.sites)


class Residency:
    """The caches of one device and the slots that they share.

    Args:
        caches: The caches.
        pools: Slots of each pool: at least the capacities of its caches, and ``prefetch`` more.
        full: Start with the lowest sites and ids resident, not empty.
        prefetch: Most experts of a pool that are copied ahead and not looked up yet.
        foresight: Says which; needed where ``prefetch`` is positive.
    """

    def __init__(
        self,
        caches: Sequence[CacheSpec],
        pools: Sequence[int],
        *,
        full: bool = False,
        prefetch: int = 0,
        foresight: Foresight | None = None,
    ) -> None:
        assert not prefetch or foresight is not None
        self._caches = tuple(caches)
        self._pools = tuple(pools)
        self._full = full
        self._prefetch = prefetch
        self._foresight = foresight
        # By pool: site and expert -> slot, first copied first.
        self._ahead: list[dict[tuple[int, int], int]] = []
        # Slots read in the last dispatch, with the place of their last reader.
        self._reader: dict[int, int] = {}
        self._place: dict[int, tuple[int, int]] = {}
        for index, cache in enumerate(self._caches):
            first = 0
            for site, count in cache.sites:
                self._place[site] = (index, first)
                first += count
        self._machines: list[Machine] = []
        self._slots: list[dict[int, int]] = []
        self._free: list[deque[int]] = []
        self.reset()

    def reset(self) -> None:
        """Empties every cache, or fills it as it was at the start."""
        self._machines = [cache.machine() for cache in self._caches]
        self._slots = [{} for _ in self._caches]
        self._ahead = [{} for _ in self._pools]
        self._reader = {}
        if self._foresight is not None:
            self._foresight.reset()
        self._free = []
        first = 0
        for count in self._pools:
            self._free.append(deque(range(first, first + count)))
            first += count
        if self._full:
            for cache, machine, slots in zip(
                self._caches, self._machines, self._slots, strict=True
            ):
                for key in policies.placed_at_start(machine.sizes, machine.capacity):
                    machine.place(key)
                    slots[key] = self._free[cache.pool].popleft()

    def residents(self) -> list[tuple[int, int, int]]:
        """Returns (site, expert, slot) of every expert on the device."""
        found = []
        for cache, slots in zip(self._caches, self._slots, strict=True):
            first = 0
            for site, count in cache.sites:
                found += [
                    (site, key - first, slot)
                    for key, slot in sorted(slots.items())
                    if first <= key < first + count
                ]
                first += count
        return found

    def fetched(self) -> list[tuple[int, int, int]]:
        """Returns (site, expert, slot) of every expert that is ahead of its lookup."""
        return [(*key, slot) for ahead in self._ahead for key, slot in ahead.items()]

    def swap(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Exchanges two experts' slots in the map only: what a defect would do.

        Args:
            one: Site and expert, on the device: resident or ahead of its lookup.
            other: Another.
        """
        places: list[tuple[dict[Any, int], Any]] = []
        for site, expert in (one, other):
            cache, first = self._place[site]
            ahead = self._ahead[self._caches[cache].pool]
            places.append(
                (ahead, (site, expert))
                if (site, expert) in ahead
                else (self._slots[cache], first + expert)
            )
        (left, key), (right, other_key) = places
        left[key], right[other_key] = right[other_key], left[key]

    def plan(
        self, site: int, experts: Sequence[int], rows: Sequence[int], rule: MissRule
    ) -> list[Planned]:
        """Looks up the active experts of a dispatch and says what has to be done.

        Args:
            site: The site.
            experts: Active experts, ascending.
            rows: Rows of each.
            rule: What is done about misses.
        """
        cache, first = self._place[site]
        machine, slots = self._machines[cache], self._slots[cache]
        pool = self._caches[cache].pool
        free = self._free[pool]
        keys = [first + expert for expert in experts]
        active = frozenset(keys)
        ahead = self._taken_ahead(pool, site, experts)
        self._reader = reader = {}
        planned: list[Planned] = []
        for place, (expert, key) in enumerate(zip(experts, keys, strict=True)):
            outcome = look_up(machine, key, active)
            if outcome.hit:
                slot = slots[key]
                reader[slot] = place
                planned.append(Planned(expert, True, slot, False, False, AT_ONCE))
                continue
            for left in outcome.evicted:
                if left != key:
                    free.append(slots.pop(left))
            is_kept = key in machine
            if expert in ahead:
                slot = ahead[expert]
                planned.append(Planned(expert, False, slot, False, False, AT_ONCE, True))
                if is_kept:
                    slots[key] = slot
                else:
                    free.append(slot)
                reader[slot] = place
                continue
            on_host = rule.is_on_host(rows[place])
            if on_host and not is_kept:
                planned.append(Planned(expert, False, NO_SLOT, False, True, AT_ONCE))
                continue
            slot = free.popleft()
            planned.append(Planned(expert, False, slot, True, on_host, reader.get(slot, AT_ONCE)))
            if is_kept:
                slots[key] = slot
            else:
                free.append(slot)
            if not on_host:
                reader[slot] = place
        return [
            # Nobody reads it: not in this dispatch, and it is gone after it.
            step._replace(loads=False, slot=NO_SLOT)
            if step.on_host and step.loads and slots.get(first + step.expert) != step.slot
            else step
            for step in planned
        ]

    def _taken_ahead(self, pool: int, site: int, experts: Sequence[int]) -> dict[int, int]:
        """Returns the slots of active experts that are ahead; frees those of the site's others."""
        ahead = self._ahead[pool]
        if not ahead:
            return {}
        taken = {}
        for expert in [expert for other, expert in ahead if other == site]:
            slot = ahead.pop((site, expert))
            if expert in experts:
                taken[expert] = slot
            else:
                self._free[pool].append(slot)
        return taken

    def fetch_ahead(self, site: int, experts: Sequence[int]) -> list[Fetched]:
        """Says what is copied ahead once all else of a dispatch was asked for, in that order.

        Of the experts of the next site that are not resident, the ``prefetch`` likeliest. Those
        that are ahead already stay; for the others slots are taken, where there are too few from
        what was copied ahead first. Slots that nobody read in this dispatch come first.

        Args:
            site: Site of the dispatch that was planned last.
            experts: Its active experts, ascending.
        """
        if not self._prefetch or not experts:
            return []
        assert self._foresight is not None
        self._foresight.learn(site, experts)
        likely = self._foresight.ranked(site)
        if not likely:
            # A next site that is never looked up may be in no cache.
            return []
        upcoming = self._foresight.site_after(site)
        cache, first = self._place[upcoming]
        slots, pool = self._slots[cache], self._caches[cache].pool
        ahead, free = self._ahead[pool], self._free[pool]
        absent = (expert for expert in likely if first + expert not in slots)
        likeliest = [(upcoming, expert) for expert in itertools.islice(absent, self._prefetch)]
        wanted = [key for key in likeliest if key not in ahead]
        for key in [key for key in ahead if key not in likeliest]:
            if len(ahead) + len(wanted) <= self._prefetch:
                break
            free.append(ahead.pop(key))
        taken = [free.popleft() for _ in wanted]
        taken.sort(key=lambda slot: slot in self._reader)
        ahead.update(zip(wanted, taken, strict=True))
        return [
            Fetched(*key, slot, self._reader.get(slot, AT_ONCE))
            for key, slot in zip(wanted, taken, strict=True)
        ]
