"""Runs MoE layers whose experts lie in host memory, a few of them in slots on the device.

Every policy decides through its state machine of the replay, under ``sequential`` semantics, so the
lookups of a run equal those that `moeprof.replay.buffering` predicts from its trace. The host must
know which experts are active, and waits for the device once per dispatch for that. Inference only.
Leaves out models (`buffered_models`) and traces without a model (`routed_runs`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from moeprof.errors import MoeprofError, UsageError
from moeprof.live.buffer_settings import (
    BufferCounts,
    BufferedSite,
    BufferMemory,
    BufferSettings,
    check_settings,
)
from moeprof.live.cache_plans import PreparedCaches, prepare_caches
from moeprof.live.direct_launches import Launches
from moeprof.live.direct_runs import DirectRuns
from moeprof.live.dispatch_checks import check_dispatch
from moeprof.live.driver_calls import driver_functions
from moeprof.live.expert_store import BlockShape, Bytes, host_bytes, on_device
from moeprof.live.experts import ExpertWeights
from moeprof.live.host_lane import HostLane
from moeprof.live.kernels.streamed import STREAMED_TOKENS, StreamedDispatch, can_stream
from moeprof.live.lookup_log import LoggedDispatch, every_column, lookup_table
from moeprof.live.repetitions import wait_for
from moeprof.live.row_blocks import UnknownExpertError, Workspace
from moeprof.live.transfers import (
    Computations,
    Transfers,
    made_current,
    make_slots,
    open_transfers,
    with_index,
)
from moeprof.replay.cache.decisions import (
    AHEAD,
    HIT,
    NUM_COPIES,
    ON_HOST,
    ROWS,
    CompiledResidency,
    columns_of,
)
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import (
    AT_ONCE,
    NO_SLOT,
    Fetched,
    MissRule,
    Planned,
    Residency,
)

_MOST_TOP_K = 16


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What a buffer that is closed says."""

    counts: BufferCounts
    memory: BufferMemory
    growths: int


class ExpertBuffer:
    """The experts of several sites, buffered on one device.

    For one thread. `close` waits for all that the device still does with its memory and lets go of
    it, and of the stores; without it, that is waited for when the buffer goes. A closed one still
    tells what it did.

    Args:
        sites: The sites, in order of execution within their stacks.
        settings: How they are buffered.
        device: Where experts run.
        dtype: Of rows; that of the experts when None.
        prepared: Its caches, from `moeprof.live.cache_plans.prepare_caches` for these sites and
            settings; no other buffer that is open has them. Made here when None.

    Raises:
        UsageError: The settings make no sense, or contradict each other.
    """

    def __init__(
        self,
        sites: Sequence[BufferedSite],
        settings: BufferSettings,
        *,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        prepared: PreparedCaches | None = None,
    ) -> None:
        check_settings(settings)
        self._told: _Told | None = None
        self.sites = tuple(sites)
        self.settings = settings
        self.device = with_index(torch.device(device))
        self._by_id = {site.site: site for site in self.sites}
        self._ids = {
            site.site: np.arange(site.store.num_experts)
            if site.expert_ids is None
            else np.asarray(site.expert_ids)
            for site in self.sites
        }
        self._rule = MissRule(action=settings.miss, host_rows=settings.host_rows)
        self._workspaces: dict[tuple[int, torch.dtype], Workspace] = {}
        for site in self.sites:
            workspace = self._workspace_of(site, dtype or site.store.shape.dtype)
            workspace.prepare(site.store.num_experts)
        self._streamed = _streamed_dispatches(self.sites, self.device)
        self._memory: dict[int, torch.Tensor] = {}
        self._all: dict[int, ExpertWeights] = {}
        self._blocks: dict[int, tuple[Bytes, ...]] = {}
        self._views: dict[tuple[int, int], ExpertWeights] = {}
        self._residency: Residency | CompiledResidency | None = None
        self._transfers: Transfers | None = None
        self._computations = Computations(self.device)
        self._pools: list[torch.Tensor] = []
        self._pool_of: dict[int, torch.Tensor] = {}
        self._cache_bytes = self._staging_bytes = self._padding_bytes = 0
        self._host_lane: HostLane | None = None
        if settings.capacity is None:
            stores = [site.store for site in self.sites]
            for site, memory in zip(self.sites, on_device(stores, self.device), strict=True):
                self._keep_all(site, memory)
            if self.device.type == "cuda":
                # Copies of copies are only queued, and computations may follow on another stream.
                torch.cuda.synchronize(self.device)
            held = sum(site.store.memory.numel() for site in self.sites)
            self._cache_bytes = sum(site.store.expert_bytes for site in self.sites)
            self._padding_bytes = held - self._cache_bytes
        else:
            self._make_slots(prepared or prepare_caches(self.sites, settings))
        self._step = -1
        self._is_halfway = False
        self._log: list[LoggedDispatch] = []
        self._num_copies = self._copied_bytes = self._num_initial = 0
        self._num_ahead = self._ahead_bytes = 0
        self._direct = self._direct_runs() if self.device.type == "cuda" else None
        # Its memory may be written on another stream, and be somebody else's once it is gone.
        self._last_wait = weakref.finalize(self, _wait_outside_captures, self.device)
        self._last_wait.atexit = False
        self.reset()

    def _direct_runs(self) -> DirectRuns | None:
        """Returns what asks for dispatches from compiled code; None where Python has to."""
        residency = self._residency
        if not self._streamed or isinstance(residency, Residency):
            return None
        found = DirectRuns(
            driver=driver_functions(),
            most_site=max(self._by_id),
            most_experts=max(site.store.num_experts for site in self.sites),
            residency=residency,
            transfers=self._transfers,
        )
        for site, memory in self._memory.items():
            store = self._by_id[site].store
            found.add_resident(
                site,
                memory=memory,
                block_bytes=store.shape.block_bytes,
                num_experts=store.num_experts,
            )
        for site, pool in self._pool_of.items():
            store = self._by_id[site].store
            found.add(site, pool=pool, memory=store.memory, block_bytes=store.shape.block_bytes)
        return found

    def _keep_all(self, site: BufferedSite, memory: Bytes) -> None:
        """Takes all experts of a site, which lie on the device."""
        store = site.store
        self._memory[site.site] = memory
        self._all[site.site] = store.shape.stacked_weights(memory, store.num_experts)
        self._blocks[site.site] = torch.split(memory, store.shape.block_bytes)

    def _make_slots(self, prepared: PreparedCaches) -> None:
        plan, self._residency = prepared.plan, prepared.residency
        slots, self._pools = make_slots(plan.pool_slots, plan.slot_bytes, self.device)
        self._cache_bytes, self._staging_bytes = plan.cache_bytes, plan.staging_bytes
        self._padding_bytes = plan.padding_bytes
        self._pool_of = {
            site: self._pools[cache.pool] for cache in plan.caches for site, _ in cache.sites
        }
        self._transfers = open_transfers(slots) if slots else None
        if self._rule.action != "load":
            self._host_lane = HostLane(self.device)

    def _workspace_of(self, site: BufferedSite, dtype: torch.dtype) -> Workspace:
        width = site.store.shape.shapes["w_in"][1]
        if (width, dtype) not in self._workspaces:
            self._workspaces[width, dtype] = Workspace(
                num_experts=max(each.store.num_experts for each in self.sites),
                d_model=width,
                dtype=dtype,
                device=self.device,
            )
        return self._workspaces[width, dtype]

    def reserve(self, num_rows: int) -> None:
        """Makes room for dispatches of that many (token, slot) rows."""
        # What grows lets go of memory that computations may still read.
        self._computations.finish()
        with made_current(self.device):
            # What is asked for on another stream waits until it is made.
            self._computations.begin()
            for workspace in self._workspaces.values():
                workspace.reserve(num_rows)
            for streamed in self._distinct_streamed():
                streamed.reserve(min(num_rows, STREAMED_TOKENS * _MOST_TOP_K))

    def _distinct_streamed(self) -> list[StreamedDispatch]:
        return list({id(one): one for one in self._streamed.values()}.values())

    def _spaces(self) -> list[Workspace | StreamedDispatch]:
        return [*self._workspaces.values(), *self._distinct_streamed()]

    def reset(self) -> None:
        """Starts anew: empty caches (full ones where so set), no lookups, steps from 0.

        Raises:
            MoeprofError: It is closed.
        """
        self._check_open()
        self._step = -1
        self._log.clear()
        self._num_copies = self._copied_bytes = self._num_initial = 0
        self._num_ahead = self._ahead_bytes = 0
        for workspace in self._workspaces.values():
            workspace.wait_s, workspace.num_waits = 0.0, 0
        for streamed in self._distinct_streamed():
            streamed.wait_s, streamed.num_waits = 0.0, 0
        if self._residency is None:
            return
        # Until all is done: this may be interrupted too.
        self._is_halfway = True
        # Slots are filled anew, and nothing says which of them the last dispatch still reads.
        self._computations.finish()
        if self._transfers is not None:
            self._transfers.finish()
        self._residency.reset()
        with made_current(self.device):
            for site, expert, slot in self._residency.residents():
                self._load(self._by_id[site], expert, slot)
                self._num_initial += 1
        self._num_copies = self._copied_bytes = 0
        self._is_halfway = False

    def leave_out_copies(self, *, left_out: bool) -> None:
        """Starts anew with or without the copies of experts, all else being done as it is.

        What a run without them still moves is not theirs: a control for counters of the link. Its
        outputs are wrong.
        """
        if self._transfers is not None:
            self._transfers.finish()
            self._transfers.is_blank = left_out
        self.reset()

    @contextmanager
    def without_copies(self) -> Iterator[None]:
        """Leaves the copies of what is asked for within it out, all else being done as it is.

        Decisions are those with copies, and so is what later dispatches ask for, but slots keep
        what they held: outputs are wrong from then on, until `reset`.
        """
        if self._transfers is None:
            yield
            return
        before, self._transfers.is_blank = self._transfers.is_blank, True
        try:
            yield
        finally:
            self._transfers.is_blank = before

    def fill_slots(self) -> None:
        """Puts an expert into every slot, for runs that read slots that nothing was copied into.

        Any expert does: it only is no memory full of zeros.
        """
        largest: dict[int, Bytes] = {}
        for site, pool in self._pool_of.items():
            block = self._by_id[site].store.block(0)
            if block.numel() > largest.get(pool.data_ptr(), block[:0]).numel():
                largest[pool.data_ptr()] = block
        for pool in self._pools:
            # Numbers of eight bytes: of single bytes the device writes far fewer at a time.
            words = largest[pool.data_ptr()].to(pool.device).view(torch.int64)
            pool.view(torch.int64).view(-1, words.numel()).copy_(words)
        if self.device.type == "cuda":
            # Copies have a stream of their own.
            torch.cuda.synchronize(self.device)

    def begin_step(self, step: int | None = None) -> None:
        """Says that a forward pass of a stack begins; steps count from 0 unless given."""
        self._step = self._step + 1 if step is None else step

    def run(
        self, site: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns the output of a site's experts [T, d_model].

        Args:
            site: Site id.
            hidden: [T, d_model].
            ids: [T, k] indices into the site's experts here; -1 in slots that are not executed.
            weights: [T, k].

        Raises:
            MoeprofError: The last dispatch broke off halfway (no memory, an interruption): nothing
                is run before `reset`. Or there is no expert of some id, or the buffer is closed.
            UsageError: The tensors do not fit together, or lie elsewhere.
        """
        self._check_open()
        place = self._by_id[site]
        streamed = self._streamed.get(site)
        is_small = (
            0 < hidden.shape[0] <= STREAMED_TOKENS and hidden.dtype == place.store.shape.dtype
        )
        with made_current(self.device):
            # Before the host waits: then it waits for the dispatch before this one too.
            stream = self._computations.begin()
            if streamed is not None and is_small:
                if ids.numel() > streamed.num_slots:
                    # What grows lets go of memory that computations may still read.
                    self._computations.finish()
                if self._direct is not None:
                    launches = streamed.launches(hidden, ids, weights)
                    if launches is not None:
                        return self._run_directly(
                            place, streamed, self._direct, launches, hidden, stream
                        )
                return self._run_streamed(place, streamed, hidden, ids, weights)
            return self._run_sorted(place, hidden, ids, weights)

    @torch.no_grad()
    def _run_sorted(
        self, place: BufferedSite, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Runs a dispatch expert by expert."""
        check_dispatch(
            hidden, ids, weights, d_model=place.store.shape.shapes["w_in"][1], device=self.device
        )
        workspace = self._workspace_of(place, hidden.dtype)
        if ids.numel() > workspace.num_rows:
            self._computations.finish()
        try:
            given, slots, ends = workspace.sorted_rows(hidden, ids, place.store.num_experts)
        except UnknownExpertError:
            raise _no_such_expert(place) from None
        rows = self._run_blocks(place, given, ends, workspace)
        return workspace.combined(rows, slots, weights, ends[-1])

    @torch.no_grad()
    def run_sorted(self, site: int, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Returns rows [n, d_model] through their experts, in storage that the next call reuses.

        Args:
            site: Site id.
            rows: [n, d_model] in order of expert.
            ends: [experts] end of each expert's rows.

        Raises:
            MoeprofError: As `run` has it.
            UsageError: They end beyond the rows.
        """
        self._check_open()
        place = self._by_id[site]
        workspace = self._workspace_of(place, rows.dtype)
        with made_current(self.device):
            self._computations.begin()
            if rows.shape[0] > workspace.num_rows:
                self._computations.finish()
            workspace.reserve(rows.shape[0])
            on_host = workspace.ends_on_host(ends)
            if on_host[-1] > rows.shape[0]:
                raise UsageError(
                    f"experts' rows end at {on_host[-1]}, but there are {rows.shape[0]}",
                    hint="pass the end of each expert's rows, in order of expert",
                )
            return self._run_blocks(place, rows, on_host, workspace)

    @torch.no_grad()
    def _run_streamed(
        self,
        place: BufferedSite,
        streamed: StreamedDispatch,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Runs a dispatch of a few tokens, several experts at a time."""
        streamed.begin(hidden, ids, weights)
        experts, rows = streamed.active()
        if experts and experts[-1] >= place.store.num_experts:
            raise _no_such_expert(place)
        if self._residency is None:
            if experts:
                blocks = self._blocks[place.site]
                streamed.run(experts, [blocks[expert] for expert in experts])
            return streamed.combined()
        if experts:
            planned = self._plan(place, experts, rows)
            self._run_pieces(place, streamed, planned, hidden)
            self._is_halfway = False
        return streamed.combined()

    def _run_directly(
        self,
        place: BufferedSite,
        streamed: StreamedDispatch,
        direct: DirectRuns,
        launches: Launches,
        hidden: torch.Tensor,
        stream: int,
    ) -> torch.Tensor:
        """Runs a dispatch of a few tokens as `_run_streamed` does, without Python between."""
        site = place.site
        out = streamed.out()
        direct.learn(streamed, launches, stream)
        if self._residency is not None:
            self._begin_dispatch()
        try:
            count = direct.decide(site, streamed)
        except IndexError:
            # Nothing was decided.
            self._is_halfway = False
            raise _no_such_expert(place) from None
        if not count:
            self._is_halfway = False
            direct.combine(launches, stream)
            return out
        if self._residency is not None:
            self._log.append((self._step, site, direct.decision.columns[:, :count].copy()))
        prefetches = bool(self.settings.prefetch)
        on_host = direct.on_host()
        if on_host:
            assert self._host_lane is not None
            with torch.no_grad():
                self._host_lane.fetch([hidden])
        is_last = not (prefetches or on_host)
        direct.run(site, streamed, launches, stream, combines=is_last)
        copied = int(direct.decision.counts[NUM_COPIES])
        self._num_copies += copied
        self._copied_bytes += copied * place.store.shape.block_bytes
        if prefetches:
            self._count_ahead(direct.decision.fetched_list(direct.copy_ahead(site)))
        if on_host:
            self._put_from_host(place, streamed, on_host)
        if not is_last:
            direct.combine(launches, stream)
        self._is_halfway = False
        return out

    def _put_from_host(
        self, place: BufferedSite, streamed: StreamedDispatch, experts: list[int]
    ) -> None:
        """Computes experts on the host and puts their rows among those of a dispatch."""
        assert self._host_lane is not None
        own = [streamed.slots_of(expert) for expert in experts]
        rows = [[slot // streamed.top_k for slot in slots] for slots in own]
        with torch.no_grad():
            given = self._host_lane.compute(place, experts, rows)
            streamed.put([slot for slots in own for slot in slots], torch.cat(given))

    def _begin_dispatch(self) -> None:
        """Notes that copies of a dispatch are under way; whoever asks says when it is done.

        Raises:
            MoeprofError: The last dispatch broke off: its copies may be missing.
        """
        if self._is_halfway:
            raise MoeprofError(
                "the last dispatch broke off halfway, so what lies in the slots is not known",
                hint="start anew: ExpertBuffer.reset()",
            )
        self._is_halfway = True

    def _plan(self, place: BufferedSite, experts: list[int], rows: list[int]) -> list[Planned]:
        """Returns what is done about active experts; see `_begin_dispatch`."""
        assert self._residency is not None
        self._begin_dispatch()
        planned = self._residency.plan(place.site, experts, rows, self._rule)
        self._log.append((self._step, place.site, columns_of(planned, rows)))
        return planned

    def _run_pieces(
        self,
        place: BufferedSite,
        streamed: StreamedDispatch,
        planned: list[Planned],
        hidden: torch.Tensor,
    ) -> None:
        """Runs the pieces of a dispatch, copies as early as their slots allow.

        The host has waited for the device, so that only readers of this dispatch are not done.
        """
        transfers, lane = self._transfers, self._host_lane
        on_host = [step for step in planned if step.on_host]
        if on_host:
            assert lane is not None
            lane.fetch([hidden])
        pieces = pieces_of(planned, streamed=True)
        asked = copies_of(planned, pieces)
        if transfers is not None:
            transfers.begin()
        mark: Any = None
        for piece, copies in zip(pieces, asked, strict=False):
            assert transfers is not None
            self._load_all(place, [planned[each] for each in copies], behind=mark)
            steps = [planned[each] for each in piece]
            slots = [step.slot for step in steps]
            transfers.await_all(slots)
            streamed.run([step.expert for step in steps], [transfers.slots[n] for n in slots])
            mark = transfers.mark()
        fetched = self._foreseen(place, planned)
        if asked[-1]:
            self._load_all(place, [planned[each] for each in asked[-1]], behind=mark)
        self._load_ahead(fetched, streamed=True, behind=mark)
        if on_host:
            self._put_from_host(place, streamed, [step.expert for step in on_host])

    def _load_all(self, place: BufferedSite, steps: list[Planned], *, behind: Any) -> None:
        if not steps:
            return
        assert self._transfers is not None
        copies = [(step.slot, place.store.block(step.expert)) for step in steps]
        self._transfers.load_all(copies, behind=behind)
        self._num_copies += len(copies)
        self._copied_bytes += sum(block.numel() for _, block in copies)

    def _foreseen(self, place: BufferedSite, planned: list[Planned]) -> list[Fetched]:
        """Returns what is copied ahead after a dispatch, all of which was launched."""
        if not self.settings.prefetch:
            return []
        assert self._residency is not None
        return self._residency.fetch_ahead(place.site, [step.expert for step in planned])

    def _load_ahead(
        self, fetched: list[Fetched], *, streamed: bool = False, behind: Any = None
    ) -> None:
        """Copies ahead, once all else was asked for; one by one, so that nobody waits for all.

        Args:
            fetched: What.
            streamed: The dispatch before it ran in pieces.
            behind: If so the mark of the last one, or None without.
        """
        for one in fetched:
            assert self._transfers is not None
            block = self._by_id[one.site].store.block(one.expert)
            if streamed:
                waits_for = None if one.after == AT_ONCE else behind
                self._transfers.load_all([(one.slot, block)], behind=waits_for)
            else:
                self._transfers.load(one.slot, block)
        self._count_ahead(fetched)

    def _count_ahead(self, fetched: Sequence[Fetched]) -> None:
        self._num_ahead += len(fetched)
        self._ahead_bytes += sum(self._by_id[one.site].store.shape.block_bytes for one in fetched)

    def _run_blocks(
        self, place: BufferedSite, given: torch.Tensor, ends: list[int], workspace: Workspace
    ) -> torch.Tensor:
        starts = [0, *ends[:-1]]
        active = [expert for expert, end in enumerate(ends) if end > starts[expert]]
        returned = workspace.returned[: given.shape[0]]
        if not active:
            return returned
        bounds = [(starts[expert], ends[expert]) for expert in active]
        if self._residency is None:
            pieces = [
                self._run_expert(place, expert, self._all[place.site], given[start:end])
                for expert, (start, end) in zip(active, bounds, strict=True)
            ]
        else:
            rows = [end - start for start, end in bounds]
            planned = self._plan(place, active, rows)
            pieces = self._run_planned(place, given, planned, bounds)
            self._is_halfway = False
        torch.cat(pieces, out=returned[: ends[-1]])
        return returned

    def _run_planned(
        self,
        place: BufferedSite,
        given: torch.Tensor,
        planned: list[Planned],
        bounds: list[tuple[int, int]],
    ) -> list[torch.Tensor]:
        """Runs the experts of a dispatch, copies as early as their slots allow."""
        transfers, lane = self._transfers, self._host_lane
        if transfers is not None:
            transfers.begin()
        on_host = [index for index, step in enumerate(planned) if step.on_host]
        if on_host:
            assert lane is not None
            lane.fetch([given[slice(*bounds[index])] for index in on_host])
        waiting = [step for step in planned if step.loads]
        next_load = 0
        pieces: list[torch.Tensor | None] = [None] * len(planned)
        for index, step in enumerate(planned):
            while next_load < len(waiting) and waiting[next_load].after < index:
                self._load(place, waiting[next_load].expert, waiting[next_load].slot)
                next_load += 1
            if step.on_host:
                continue
            assert transfers is not None
            transfers.await_load(step.slot)
            pieces[index] = self._run_expert(
                place, step.expert, self._view(place, step.slot), given[slice(*bounds[index])]
            )
            transfers.release(step.slot)
        fetched = self._foreseen(place, planned)
        for step in waiting[next_load:]:
            self._load(place, step.expert, step.slot)
        self._load_ahead(fetched)
        if on_host:
            assert lane is not None
            experts = [planned[index].expert for index in on_host]
            for index, piece in zip(on_host, lane.compute(place, experts), strict=True):
                pieces[index] = piece
        return [piece for piece in pieces if piece is not None]

    def _run_expert(
        self, place: BufferedSite, expert: int, weights: ExpertWeights, rows: torch.Tensor
    ) -> torch.Tensor:
        """Runs one expert; ``weights`` hold one expert (a slot) or all."""
        if place.run is not None:
            return place.run(expert, weights, rows)
        return weights.run(0 if weights.num_experts == 1 else expert, rows)

    def _view(self, place: BufferedSite, slot: int) -> ExpertWeights:
        key = (place.site, slot)
        if key not in self._views:
            assert self._transfers is not None
            block = self._transfers.slots[slot][: place.store.shape.block_bytes]
            self._views[key] = place.store.shape.weights(block)
        return self._views[key]

    def _load(self, place: BufferedSite, expert: int, slot: int) -> None:
        assert self._transfers is not None
        block = place.store.block(expert)
        self._transfers.load(slot, block)
        self._num_copies += 1
        self._copied_bytes += block.numel()

    def lookups(self) -> pd.DataFrame:
        """Returns one row per lookup in order of execution, as `BufferingResult.lookups` has them.

        Columns step, stack, site, layer, expert, hit; then copied (its block went to the device for
        this lookup), ahead (it missed, but had been copied ahead), on_host and rows.
        """
        return lookup_table(self._log, self._by_id, self._ids)

    def counts(self) -> BufferCounts:
        """Returns what was done so far."""
        if self._told is not None:
            return self._told.counts
        every = every_column(self._log)
        on_host = every[ON_HOST] > 0
        spaces = self._spaces()
        return BufferCounts(
            dispatches=len(self._log),
            lookups=every.shape[1],
            hits=int(every[HIT].sum()),
            copies=self._num_copies + self._num_ahead,
            copied_bytes=self._copied_bytes + self._ahead_bytes,
            prefetches=self._num_ahead,
            prefetch_bytes=self._ahead_bytes,
            prefetch_used=int(every[AHEAD].sum()),
            initial_copies=self._num_initial,
            host_experts=int(on_host.sum()),
            host_rows=int(every[ROWS][on_host].sum()),
            waits=sum(space.num_waits for space in spaces),
            wait_s=sum(space.wait_s for space in spaces),
        )

    def memory(self) -> BufferMemory:
        """Returns the bytes that the experts take, here and there; took, where it is closed."""
        if self._told is not None:
            return self._told.memory
        return BufferMemory(
            expert_bytes=sum(site.store.expert_bytes for site in self.sites),
            cache_bytes=self._cache_bytes,
            staging_bytes=self._staging_bytes,
            padding_bytes=self._padding_bytes,
            workspace_bytes=sum(space.num_bytes for space in self._spaces()),
            host_bytes=host_bytes(site.store for site in self.sites),
        )

    def workspace_growths(self) -> int:
        """Returns how often a workspace was taken anew; constant in steady state."""
        if self._told is not None:
            return self._told.growths
        return sum(space.num_growths for space in self._spaces())

    def audit(self) -> list[tuple[int, int]]:
        """Compares every expert on the device, as it lies in its slot, with the host's copy.

        Returns:
            (site, expert id) of those that differ: none, unless something is broken.

        Raises:
            MoeprofError: It is closed.
        """
        self._check_open()
        return [
            (site, int(self._ids[site][expert]))
            for site, expert, slot in [*self._residents(), *self._fetched()]
            if not self._is_intact(site, expert, slot)
        ]

    def resident_experts(self) -> list[tuple[int, int]]:
        """Returns (site id, index at the site) of every expert in a cache.

        Raises:
            MoeprofError: It is closed.
        """
        self._check_open()
        return [(site, expert) for site, expert, _ in self._residents()]

    def _residents(self) -> Iterator[tuple[int, int, int]]:
        if self._residency is None or self._transfers is None:
            return
        self._transfers.finish()
        yield from self._residency.residents()

    def _fetched(self) -> Iterator[tuple[int, int, int]]:
        if self._residency is None or self._transfers is None:
            return
        self._transfers.finish()
        yield from self._residency.fetched()

    def _is_intact(self, site: int, expert: int, slot: int) -> bool:
        assert self._transfers is not None and slot != NO_SLOT
        block = self._by_id[site].store.block(expert)
        held = self._transfers.slots[slot][: block.numel()]
        return torch.equal(held, block.to(held.device))

    def misplace(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """Breaks the slot map on purpose, so that checks can be seen to fail.

        Args:
            one: Site id and index of a resident expert.
            other: Another.
        """
        assert self._residency is not None
        self._residency.swap(one, other)

    def close(self) -> None:
        """Waits for computations and copies, and lets go of slots, stores and all other memory."""
        if self._told is not None:
            return
        self._computations.finish()
        if self._transfers is not None:
            self._transfers.finish()
        self._last_wait.detach()
        self._told = _Told(
            counts=self.counts(), memory=self.memory(), growths=self.workspace_growths()
        )
        self._views.clear()
        self._direct = None
        self._memory.clear()
        self._pool_of.clear()
        self._all.clear()
        self._blocks.clear()
        for streamed in self._distinct_streamed():
            streamed.let_go()
        self._streamed.clear()
        self._workspaces.clear()
        self._pools.clear()
        if self._transfers is not None:
            self._transfers.let_go()
        self._transfers = None
        self._host_lane = None
        # What its lookups were at is still asked for; the experts are not.
        self.sites = tuple(
            dataclasses.replace(site, store=site.store.emptied(), run=None) for site in self.sites
        )
        self._by_id = {site.site: site for site in self.sites}

    def _check_open(self) -> None:
        if self._told is not None:
            raise MoeprofError(
                "the expert buffer is closed",
                hint="use it before it is closed: within its `with`, where it has one",
            )


def _wait_outside_captures(device: torch.device) -> None:
    """Waits for a device; not in a graph's capture, in which nobody may wait."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        wait_for(device)


def _no_such_expert(place: BufferedSite) -> MoeprofError:
    return MoeprofError(
        "the router chose an expert that there is not: "
        f"site {place.site} has {place.store.num_experts}",
        hint="ids are indices into the site's experts; a row that is no number has none",
    )


def _streamed_dispatches(
    sites: Sequence[BufferedSite], device: torch.device
) -> dict[int, StreamedDispatch]:
    """Returns what runs small dispatches of the sites that allow it; one for sites of a shape."""
    found: dict[int, StreamedDispatch] = {}
    made: list[tuple[BlockShape, StreamedDispatch]] = []
    most = max(site.store.num_experts for site in sites)
    for site in sites:
        shape = site.store.shape
        if site.run is not None or not can_stream(shape, device):
            continue
        own = next((one for other, one in made if other == shape), None)
        if own is None:
            own = StreamedDispatch(shape, num_experts=most, device=device)
            made.append((shape, own))
        found[site.site] = own
    return found
