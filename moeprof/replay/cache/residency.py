"""Which experts are on the device, in which slot, and what a dispatch has to copy.

Who stays is decided by the state machines of the replay (`moeprof.replay.cache.policies`) under
``sequential`` semantics: experts run one by one in increasing id and room is made before each
enters. Slots are places in device memory; a cache of C slots never holds more than C experts, but
any slot of the pool may be one of them. Leaves out copying and computing; knows no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moeprof.replay.cache import policies
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
    """

    expert: int
    hit: bool
    slot: int
    loads: bool
    on_host: bool
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
        pools: Slots of each pool: at least the capacities of its caches.
        full: Start with the lowest sites and ids resident, not empty.
    """

    def __init__(
        self, caches: Sequence[CacheSpec], pools: Sequence[int], *, full: bool = False
    ) -> None:
        self._caches = tuple(caches)
        self._pools = tuple(pools)
        self._full = full
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

    def swap(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Exchanges the slots of two residents in the map only: what a defect would do.

        Args:
            one: Site and expert.
            other: Site and expert.
        """
        places = []
        for site, expert in (one, other):
            cache, first = self._place[site]
            places.append((self._slots[cache], first + expert))
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
        free = self._free[self._caches[cache].pool]
        keys = [first + expert for expert in experts]
        active = frozenset(keys)
        reader: dict[int, int] = {}
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
            on_host = rule.is_on_host(rows[place])
            is_kept = key in machine
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
