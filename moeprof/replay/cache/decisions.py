"""`Residency`, compiled: one call decides a dispatch, in a few microseconds.

For the machines of `policies` with experts of one slot; `make_residency` takes `Residency` for any
other. What a call decides lies in arrays that the next call overwrites and that never move, so that
compiled readers may hold their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import decision_fetches, decision_loops, machine_state
from moeprof.replay.cache.decision_arrays import (
    Decision,
    columns_of,
    decision_in,
    empty_decision,
)
from moeprof.replay.cache.decision_loops import CHOSEN, GIVEN
from moeprof.replay.cache.decision_state import (
    AFTER,
    AHEAD,
    AHEAD_FIELDS,
    CACHE_FIELDS,
    CACHE_NODES,
    CACHE_POOL,
    CACHES,
    EXPERT,
    FETCHED_AFTER,
    FETCHED_EXPERT,
    FETCHED_SLOT,
    HIT,
    LOADS,
    NO_SUCH_EXPERT,
    NO_SUCH_SLOT,
    NUM_AHEAD,
    NUM_COLUMNS,
    NUM_COPIES,
    NUM_EXPERTS,
    NUM_ON_HOST,
    NUM_PIECES,
    ON_HOST,
    POOL_AHEAD,
    POOL_FIELDS,
    POOLS,
    ROWS,
    SITE,
    SITE_CACHE,
    SITE_EXPERTS,
    SITE_FIELDS,
    SITE_FIRST_KEY,
    SITE_ID,
    SITES,
    SLOT,
    make_state,
)
from moeprof.replay.cache.foresight import Foresight
from moeprof.replay.cache.machine_state import SLOT_OF, WIDTH
from moeprof.replay.cache.policies import Machine
from moeprof.replay.cache.residency import NO_SLOT, CacheSpec, Fetched, MissRule, Planned, Residency
from moeprof.replay.compiled import bare

__all__ = [
    "AFTER",
    "AHEAD",
    "EXPERT",
    "FETCHED_AFTER",
    "FETCHED_EXPERT",
    "FETCHED_SLOT",
    "HIT",
    "LOADS",
    "NUM_COLUMNS",
    "NUM_COPIES",
    "NUM_EXPERTS",
    "NUM_ON_HOST",
    "NUM_PIECES",
    "ON_HOST",
    "ROWS",
    "SITE",
    "SLOT",
    "CompiledResidency",
    "Decision",
    "can_compile",
    "columns_of",
    "empty_decision",
    "make_residency",
]

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

_NO_ROWS = -1
_ALL_ROWS = 1 << 62
_NOTHING: Int64s = np.zeros(0, np.int64)


def can_compile(caches: Sequence[CacheSpec], foresight: Foresight | None = None) -> bool:
    """Returns True where `CompiledResidency` knows every machine."""
    return _are_known([cache.machine() for cache in caches], foresight)


def _are_known(machines: Sequence[Machine], foresight: Foresight | None) -> bool:
    return type(foresight) in (Foresight, type(None)) and all(map(machine_state.is_known, machines))


def make_residency(
    caches: Sequence[CacheSpec],
    pools: Sequence[int],
    *,
    full: bool = False,
    prefetch: int = 0,
    foresight: Foresight | None = None,
) -> Residency | CompiledResidency:
    """Returns a `CompiledResidency` where it knows every machine, else a `Residency`.

    Arguments as there.
    """
    machines = [cache.machine() for cache in caches]
    if not caches or not _are_known(machines, foresight):
        return Residency(caches, pools, full=full, prefetch=prefetch, foresight=foresight)
    return CompiledResidency(
        caches, pools, full=full, prefetch=prefetch, foresight=foresight, machines=machines
    )


class CompiledResidency:
    """The caches of one device and the slots that they share; decides as `Residency` does.

    Args:
        caches: The caches, at least one; `can_compile` says which.
        pools: As `Residency` takes it, as are all but the last two.
        full: Start full, not empty.
        prefetch: Most experts of a pool that are copied ahead.
        foresight: Whose sites; what it has learned is not taken over.
        rule: What `decide` does about misses.
        machines: The caches' empty machines, where they were made already.

    Attributes:
        decision: What was decided last.
    """

    def __init__(
        self,
        caches: Sequence[CacheSpec],
        pools: Sequence[int],
        *,
        full: bool = False,
        prefetch: int = 0,
        foresight: Foresight | None = None,
        rule: MissRule | None = None,
        machines: Sequence[Machine] | None = None,
    ) -> None:
        assert not prefetch or foresight is not None
        made = [cache.machine() for cache in caches] if machines is None else machines
        assert _are_known(made, foresight)
        state = make_state(
            caches,
            [machine_state.state_of(machine) for machine in made],
            pools,
            prefetch=prefetch,
            foresight=foresight,
        )
        self._ints, self._longs, self._pairs = state.ints, state.longs, state.pairs
        # Others are known to the foresight alone: they are in no cache.
        cached = [site for cache in caches for site, _ in cache.sites]
        self._index = {site: state.index[site] for site in cached}
        self._num_sites = len(state.index)
        self._num_pools, self._num_caches = len(pools), len(caches)
        self.decision = decision_in(self._ints, self._longs, max(prefetch, 1))
        self.rule = rule or MissRule()
        # Compiled now, not in the first dispatch.
        self._decide = bare(decision_loops.decide)
        self._foresee = bare(decision_fetches.foresee) if prefetch else None
        if full:
            decision_loops.fill(self._ints, self._longs)
        self._at_start = self._ints.copy(), self._longs.copy()

    @property
    def rule(self) -> MissRule:
        """What `decide` does about misses."""
        return self._rule

    @rule.setter
    def rule(self, rule: MissRule) -> None:
        self._rule = rule
        self._host_rows = _host_rows(rule)

    def reset(self) -> None:
        """Empties every cache, or fills it as it was at the start; nothing moves."""
        self._ints[:], self._longs[:] = self._at_start
        self._pairs[:] = 0

    def decide(self, site: int, chosen: Int64s, num_slots: int) -> int:
        """Decides a dispatch; the answer lies in `decision`.

        Args:
            site: The site.
            chosen: [num_slots or more] index of an expert of the site; negative: nobody.
            num_slots: Slots of the dispatch.

        Returns:
            Active experts; where there are none nothing was decided.

        Raises:
            IndexError: An expert that the site does not have, or fewer of them than slots; nothing
                was decided.
            RuntimeError: A pool has too few slots; nothing may be decided before `reset`.
        """
        return self._decided(site, chosen, num_slots, CHOSEN, self._host_rows)

    def _decided(self, site: int, chosen: Int64s, num: int, given: int, host_rows: int) -> int:
        found: int = self._decide(
            self._ints, self._longs, chosen, num, given, self._index[site], host_rows
        )
        if found < 0:
            raise _error(found)
        return found

    def plan(
        self, site: int, experts: Sequence[int], rows: Sequence[int], rule: MissRule
    ) -> list[Planned]:
        """Looks up the active experts of a dispatch; as `Residency.plan`."""
        num = len(experts)
        if num and not 0 <= min(experts) <= max(experts) < self._site(site)[SITE_EXPERTS]:
            raise _error(NO_SUCH_EXPERT)
        self.decision.columns[EXPERT, :num] = experts
        self.decision.columns[ROWS, :num] = rows
        self._decided(site, _NOTHING, num, GIVEN, _host_rows(rule))
        return self.decision.planned()

    def foresee(self, site: int) -> int:
        """Says what is copied ahead of its lookup, once a dispatch was decided.

        Args:
            site: Site that was decided last.

        Returns:
            How many entries of `Decision.fetched` say so.
        """
        num = int(self.decision.counts[NUM_EXPERTS])
        return self._foreseen(site, self.decision.columns[EXPERT], num)

    def fetch_ahead(self, site: int, experts: Sequence[int]) -> list[Fetched]:
        """Says what is copied ahead; as `Residency.fetch_ahead`."""
        active = np.array(experts, np.int32)
        return self.decision.fetched_list(self._foreseen(site, active, len(active)))

    def _foreseen(self, site: int, experts: Int32s, num: int) -> int:
        if self._foresee is None or not num:
            return 0
        found = self._foresee(self._ints, self._longs, self._pairs, self._index[site], experts, num)
        if found < 0:
            raise _error(found)
        return found

    def residents(self) -> list[tuple[int, int, int]]:
        """Returns (site, expert, slot) of every expert on the device."""
        found = []
        caches = self._table(CACHES, self._num_caches, CACHE_FIELDS)
        sites = self._table(SITES, self._num_sites, SITE_FIELDS)
        for row in sorted(
            sites[sites[:, SITE_CACHE] >= 0].tolist(),
            key=lambda row: (row[SITE_CACHE], row[SITE_FIRST_KEY]),
        ):
            first = _first_slot(caches[row[SITE_CACHE]], row)
            slots = self._ints[first : first + row[SITE_EXPERTS]].tolist()
            found += [
                (row[SITE_ID], expert, slot) for expert, slot in enumerate(slots) if slot != NO_SLOT
            ]
        return found

    def fetched(self) -> list[tuple[int, int, int]]:
        """Returns (site, expert, slot) of every expert that is ahead of its lookup."""
        found = []
        sites = self._table(SITES, self._num_sites, SITE_FIELDS)
        for pool in self._table(POOLS, self._num_pools, POOL_FIELDS).tolist():
            first, count = pool[POOL_AHEAD], pool[NUM_AHEAD]
            ahead = self._ints[first : first + AHEAD_FIELDS * count].reshape(-1, AHEAD_FIELDS)
            found += [
                (int(sites[site, SITE_ID]), expert, slot) for site, expert, slot in ahead.tolist()
            ]
        return found

    def swap(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Exchanges two experts' slots in the map only; as `Residency.swap`."""
        places = [self._slot_at(*one), self._slot_at(*other)]
        self._ints[places] = self._ints[places[::-1]]

    def _slot_at(self, site: int, expert: int) -> int:
        """Returns where the slot of an expert on the device is noted."""
        row = self._site(site)
        cache = self._table(CACHES, self._num_caches, CACHE_FIELDS)[row[SITE_CACHE]]
        place = _first_slot(cache, row) + expert
        if self._ints[place] != NO_SLOT:
            return place
        pool = self._table(POOLS, self._num_pools, POOL_FIELDS)[cache[CACHE_POOL]]
        first, count = int(pool[POOL_AHEAD]), int(pool[NUM_AHEAD])
        ahead = self._ints[first : first + AHEAD_FIELDS * count].reshape(-1, AHEAD_FIELDS)
        (found,) = np.flatnonzero((ahead[:, :2] == (self._index[site], expert)).all(axis=1))
        return first + AHEAD_FIELDS * int(found) + 2

    def _site(self, site: int) -> list[int]:
        first = int(self._longs[SITES]) + self._index[site] * SITE_FIELDS
        found: list[int] = self._longs[first : first + SITE_FIELDS].tolist()
        return found

    def _table(self, table: int, num: int, num_fields: int) -> Int64s:
        first = self._longs[table]
        return self._longs[first : first + num * num_fields].reshape(num, num_fields)


def _first_slot(cache: Int64s, site: Sequence[int]) -> int:
    """Returns where the slots of a site's experts begin."""
    return int(cache[CACHE_NODES] + SLOT_OF * cache[WIDTH]) + site[SITE_FIRST_KEY]


def _host_rows(rule: MissRule) -> int:
    """Returns most rows of a miss that the host computes."""
    return {"load": _NO_ROWS, "host": _ALL_ROWS, "split": rule.host_rows}[rule.action]


def _error(code: int) -> Exception:
    if code == NO_SUCH_EXPERT:
        return IndexError("an expert that the site does not have")
    if code == NO_SUCH_SLOT:
        return IndexError("more slots than experts are given for")
    return RuntimeError("a pool has fewer slots than its caches and what is not kept take")
