"""Adds up what static and dynamic gating make of the dispatches of one site.

Static gating as fairseq and GShard do it: first choices take slots before second choices, in
token order; padding counts when capacity is computed and takes no slot. Every unit is shared among
the requests that caused it. Leaves out tables and words (`gates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay import capacity
from moeprof.replay.capacity import MoeShape, StaticDispatches
from moeprof.replay.demand import Demand
from moeprof.trace import schema

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_PHASES = len(schema.PHASES)

REQUEST_SUMS = ("tokens", "decisions", "dynamic_tile_rows")
"""Summed per phase and request."""
VALUE_SUMS = ("slots", "exact_slots", "dropped", "clipped", "lost", "tile_rows")
"""Summed per phase, request and rule."""
PHASE_TOTALS = ("num_dispatches", "num_padded", "dynamic_crossing_rows", "active_experts")
"""Summed per phase."""
VALUE_TOTALS = ("crossing_rows", "mask_elements")
"""Summed per phase and rule."""
VALUE_MAXIMA = ("max_slots", "max_mask_elements", "max_rows", "max_rows_per_expert")
"""Largest per phase and rule; rows and mask of one device."""


@dataclass(kw_only=True, eq=False)
class SiteSums:
    """Sums over all dispatches of one site.

    Attributes:
        site: The site.
        rules: (rule, value) pairs compared.
        num_requests: Requests of the trace.
        shape: Shape of the site.
        devices: Devices the tokens are dealt to.
        tile: Rows of a tile.
        sums: Arrays by name: [phases, requests] for `REQUEST_SUMS`, [phases, requests, rules] for
            `VALUE_SUMS`, [phases] and [phases, rules] for totals and maxima.
    """

    site: schema.Site
    rules: Sequence[tuple[str, float]]
    num_requests: int
    shape: MoeShape
    devices: int
    tile: int
    sums: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        per_request = (NUM_PHASES, self.num_requests)
        num_rules = len(self.rules)
        for shape, names in (
            (per_request, REQUEST_SUMS),
            ((*per_request, num_rules), VALUE_SUMS),
            ((NUM_PHASES,), (*PHASE_TOTALS, "max_needed_rows")),
            ((NUM_PHASES, num_rules), (*VALUE_TOTALS, *VALUE_MAXIMA)),
        ):
            self.sums.update({name: np.zeros(shape) for name in names})

    def add(self, demand: Demand) -> None:
        """Adds whole dispatches."""
        here = _Counted.of(demand)
        if not len(here.token):
            return
        self._add_dynamic(here)
        for index, (rule, value) in enumerate(self.rules):
            padded = demand.num_tokens + demand.num_padded
            # A dispatch that the site saw no token of did not happen.
            padded = np.where(here.happened[:, None], padded, 0)
            static = capacity.static_dispatches(
                self.shape, num_tokens=padded, rule=rule, value=value
            )
            self._add_static(here, static, index)

    def _add_dynamic(self, here: _Counted) -> None:
        demand, sums = here.demand, self.sums
        phase = demand.phase[here.happened]
        sums["num_dispatches"] += np.bincount(phase, minlength=NUM_PHASES)
        padded = demand.num_padded.sum(axis=1)[here.happened]
        sums["num_padded"] += np.bincount(phase, weights=padded, minlength=NUM_PHASES)
        sums["tokens"] += here.by_request(np.ones(len(demand.dispatch)))
        sums["decisions"] += here.by_request((demand.expert >= 0).sum(axis=1))
        home = capacity.expert_devices(self.site.num_experts, demand.devices)
        crossing = home[here.expert] != demand.device[here.token]
        decision_phase = demand.phase[demand.dispatch[here.token]]
        sums["dynamic_crossing_rows"] += np.bincount(
            decision_phase, weights=crossing, minlength=NUM_PHASES
        )
        cell = demand.dispatch[here.token] * self.site.num_experts + here.expert
        wants, owners = _distinct(cell, demand.request[here.token], self.num_requests)
        cells, want_cell, wanting = np.unique(wants, return_inverse=True, return_counts=True)
        rows = np.bincount(cell, minlength=int(cells[-1]) + 1)[cells]
        sums["active_experts"] += np.bincount(
            demand.phase[cells // self.site.num_experts], minlength=NUM_PHASES
        )
        units = capacity.tile_rows(rows, self.tile) / wanting
        index = demand.phase[wants // self.site.num_experts] * self.num_requests + owners
        sums["dynamic_tile_rows"] += _tallied(
            index, units[want_cell], (NUM_PHASES, self.num_requests)
        )
        needed = np.bincount(
            demand.dispatch[here.token] * demand.devices + demand.device[here.token],
            minlength=demand.num_tokens.size,
        ).reshape(demand.num_tokens.shape)
        np.maximum.at(sums["max_needed_rows"], demand.phase, needed.max(axis=1))

    def _add_static(self, here: _Counted, static: StaticDispatches, index: int) -> None:
        demand, sums, phase = here.demand, self.sums, here.demand.phase
        self._add_drops(here, static.slots.reshape(-1), index)
        exact = static.exact_slots * self.site.num_experts
        # A token is what gives every expert its share of a slot; padding, rounding and fixed
        # slots have no single cause.
        per_token = exact / np.maximum(static.num_tokens, 1)
        if self.rules[index][0] == "fixed":
            per_token = np.zeros_like(exact)
        own = here.by_request(per_token.reshape(-1)[here.token_group])
        caused = per_token * demand.num_tokens
        sums["slots"][:, :, index] += own + here.shared(static.rows - caused)
        sums["exact_slots"][:, :, index] += own + here.shared(exact - caused)
        tiles = self.site.num_experts * capacity.tile_rows(static.rows_per_expert, self.tile)
        sums["tile_rows"][:, :, index] += here.shared_by_dispatch(tiles)
        totals = {
            "crossing_rows": static.crossing_rows,
            "mask_elements": static.mask_elements.sum(axis=1),
        }
        for name, values in totals.items():
            sums[name][:, index] += np.bincount(phase, weights=values, minlength=NUM_PHASES)
        maxima = {
            "max_slots": static.slots.max(axis=1),
            "max_mask_elements": static.mask_elements.max(axis=1),
            "max_rows": static.rows.max(axis=1),
            "max_rows_per_expert": static.rows_per_expert,
        }
        for name, values in maxima.items():
            np.maximum.at(sums[name][:, index], phase, values)

    def _add_drops(self, here: _Counted, slots: Ints, index: int) -> None:
        """Adds what finds no slot, as a whole and shared among the requests that cause it.

        A request causes what its own tokens lose, and it crowds others out: at an expert that
        overflows it adds the rows it sends there and takes off the slots that its tokens bring.
        What it crowds out beyond its own losses may be negative, and sums to nothing over all.
        """
        demand, sums = here.demand, self.sums
        over = here.place >= slots[here.group]
        if not over.any():
            return
        num_tokens, num_cells = len(demand.dispatch), len(here.cell_group)
        dropped = np.bincount(here.token, weights=over, minlength=num_tokens)
        lost = (dropped > 0) & (dropped == (demand.expert >= 0).sum(axis=1))
        overflow = np.maximum(np.bincount(here.cell, weights=over, minlength=num_cells), 1)
        per_token = slots / np.maximum(np.bincount(here.token_group, minlength=len(slots)), 1)
        every = np.ones(num_tokens, bool)
        # Own losses, and of which drops one more makes one more loss.
        kinds = {
            "dropped": (dropped, every),
            "clipped": (dropped > 0, dropped == 1),
            "lost": (lost, lost),
        }
        for name, (own, marginal) in kinds.items():
            counted = np.bincount(
                here.cell, weights=over & marginal[here.token], minlength=num_cells
            )
            factor = counted / overflow
            crowding = np.bincount(
                here.token, weights=factor[here.cell] * ~over, minlength=num_tokens
            )
            brought = np.bincount(here.cell_group, weights=factor, minlength=len(slots))
            relief = (brought * per_token)[here.token_group]
            sums[name][:, :, index] += here.by_request(own + crowding - relief)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Counted:
    """A demand with its decisions in the order in which they take slots.

    Attributes:
        demand: The demand.
        token_group: [tokens] dispatch and device in one number.
        token: [decisions] index of the token.
        expert: [decisions].
        group: [decisions] dispatch and device.
        place: [decisions] decisions of the same expert and group before it.
        cell: [decisions] index of the pair of group and expert.
        cell_group: [cells] group of each such pair.
        happened: [dispatches] the site saw a token.
        cause_group: [causes] distinct (group, request) pairs.
        cause_request: [causes].
    """

    demand: Demand
    token_group: Ints
    token: Ints
    expert: Ints
    group: Ints
    place: Ints
    cell: Ints
    cell_group: Ints
    happened: NDArray[np.bool_]
    cause_group: Ints
    cause_request: Ints

    @classmethod
    def of(cls, demand: Demand) -> _Counted:
        """Returns the decisions: first choices in token order, then second ones."""
        slot, token = np.nonzero(demand.expert.T >= 0)
        expert = demand.expert[token, slot]
        token_group = demand.dispatch * demand.devices + demand.device
        group = token_group[token]
        place, cell = places(group * demand.site.num_experts + expert)
        cell_group = np.zeros(int(cell.max(initial=-1)) + 1, np.int64)
        cell_group[cell] = group
        causes = _distinct(token_group, demand.request, demand.num_requests)
        return cls(
            demand=demand,
            token_group=token_group,
            token=token,
            expert=expert,
            group=group,
            place=place,
            cell=cell,
            cell_group=cell_group,
            happened=demand.num_tokens.sum(axis=1) > 0,
            cause_group=causes[0],
            cause_request=causes[1],
        )

    def by_request(self, units: NDArray[Any]) -> Floats:
        """Returns [phases, requests] sums of a number per token."""
        demand = self.demand
        index = demand.phase[demand.dispatch] * demand.num_requests + demand.request
        return _tallied(index, units, (NUM_PHASES, demand.num_requests))

    def shared(self, units: NDArray[Any]) -> Floats:
        """Returns [phases, requests] units of (dispatch, device), shared among its requests.

        What a device without tokens has (padding of sequences that ended) is shared among all
        requests of the dispatch.
        """
        flat = units.reshape(-1).astype(np.float64)
        num_causes = np.bincount(self.cause_group, minlength=len(flat))
        found = self._tallied_causes(flat / np.maximum(num_causes, 1))
        orphans = np.where(num_causes == 0, flat, 0.0).reshape(units.shape).sum(axis=1)
        return found + self.shared_by_dispatch(orphans) if orphans.any() else found

    def shared_by_dispatch(self, units: NDArray[Any]) -> Floats:
        """Returns [phases, requests] units of dispatches, shared among their requests."""
        devices = self.demand.devices
        num_causes = np.bincount(self.cause_group // devices, minlength=len(units))
        each = units / np.maximum(num_causes, 1)
        return self._tallied_causes(np.repeat(each, devices))

    def _tallied_causes(self, each: Floats) -> Floats:
        demand = self.demand
        phase = demand.phase[self.cause_group // demand.devices]
        index = phase * demand.num_requests + self.cause_request
        return _tallied(index, each[self.cause_group], (NUM_PHASES, demand.num_requests))


def places(key: Ints) -> tuple[Ints, Ints]:
    """Returns how many equal keys come before each, and the rank of each key."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    index = np.arange(len(key))
    fresh = np.diff(ordered, prepend=-1) != 0
    place, cell = np.empty(len(key), np.int64), np.empty(len(key), np.int64)
    place[order] = index - np.maximum.accumulate(np.where(fresh, index, 0))
    cell[order] = np.cumsum(fresh) - 1
    return place, cell


def _distinct(first: Ints, second: Ints, width: int) -> tuple[Ints, Ints]:
    """Returns the distinct pairs of two arrays; the second lies below ``width``."""
    pairs = np.unique(first * width + second)
    return pairs // max(width, 1), pairs % max(width, 1)


def _tallied(index: Ints, units: NDArray[Any], shape: tuple[int, int]) -> Floats:
    sums = np.bincount(index, weights=units.astype(np.float64), minlength=shape[0] * shape[1])
    return sums.astype(np.float64).reshape(shape)
