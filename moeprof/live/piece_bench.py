"""Measures dispatches of a few tokens that run in pieces, as the live buffer asks for them.

That is from compiled code where it can be, else from Python. What the device does is the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moeprof.live.bench import Bench
from moeprof.live.buffer_settings import BufferedSite, BufferSettings
from moeprof.live.direct_launches import Launches
from moeprof.live.direct_runs import DirectRuns
from moeprof.live.driver_calls import driver_functions
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import ExpertStore
from moeprof.live.kernels.streamed import STREAMED_TOKENS, StreamedDispatch
from moeprof.live.measured_curves import ascending, scaled
from moeprof.live.transfers import Transfers, current_handle, open_transfers
from moeprof.replay.cache.decisions import (
    EXPERT,
    HIT,
    LOADS,
    NUM_COPIES,
    NUM_EXPERTS,
    NUM_PIECES,
    SLOT,
    CompiledResidency,
)
from moeprof.replay.cache.policies import Lru
from moeprof.replay.cache.residency import CacheSpec
from moeprof.replay.calibration_file import Curve, Measured

_SITE = 0
_MANY_COPIES = 32


@dataclass(frozen=True, kw_only=True)
class PieceParts:
    """What was measured of dispatches that run in pieces, at one size of experts.

    Attributes:
        known: As in `moeprof.replay.calibration_file.StreamedTimes`, as for what follows.
        late: See there.
        host: See there.
        slot: See there.
        load: See there.
        device: See there.
        combine_host: See there.
        combine_device: See there.
        rest: See there.
    """

    known: Measured
    late: Measured
    host: Curve
    slot: Measured
    load: Measured
    device: Curve
    combine_host: Measured
    combine_device: Curve
    rest: Measured | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """What a dispatch is given: rows, ids and gates of so many (token, slot) rows."""

    hidden: torch.Tensor
    ids: torch.Tensor
    gates: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Returns the rows as a step normalizes them."""
        return F.rms_norm(self.hidden, self.hidden.shape[-1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """A dispatch that can be asked for, once all that it needs lies there."""

    before: Callable[[], object]
    ask: Callable[[], object]


def difference(whole: Measured, part: Measured, share: float = 1.0) -> Measured:
    """Returns ``share`` of what ``whole`` takes beyond ``part``, but nothing below 0."""
    median = max(0.0, whole.median - part.median)
    off = float(np.hypot(whole.error * whole.median, part.error * part.median))
    return Measured(
        median=share * median,
        low=share * max(0.0, median - abs(whole.median - whole.low)),
        high=share * (median + abs(whole.high - whole.median)),
        error=off / median if median else 0.0,
        num_repetitions=min(whole.num_repetitions, part.num_repetitions),
    )


class PieceBench(Bench):
    """Measures dispatches in pieces on one device.

    Args:
        device: Which.
        sizes: How large things are.
        watch: See `moeprof.live.part_times.PartTimes`.
    """

    def of_store(self, store: ExpertStore, slots: Sequence[torch.Tensor]) -> PieceParts:
        """Returns what dispatches over a store's experts take.

        Args:
            store: The experts.
            slots: As many on the device, filled.
        """
        shape, sizes = store.shape, self.sizes
        self._width = shape.shapes["w_out"][0]
        self._turn = itertools.count()
        most, size = max(len(slots), sizes.pieces[-1]), shape.block_bytes
        memory = torch.empty(most * size, dtype=torch.uint8, device=self.device)
        blocks = [memory[each * size : (each + 1) * size] for each in range(most)]
        for index, block in enumerate(blocks):
            block.copy_(slots[index % len(slots)][:size])
        dispatch = StreamedDispatch(shape, num_experts=most, device=self.device)
        dispatch.reserve(STREAMED_TOKENS * sizes.top_k)
        transfers = open_transfers(blocks)
        ask = self._from_python if transfers.direct is None else self._from_compiled
        found = ask(store, dispatch, blocks, transfers, self._on_device(dispatch, blocks))
        transfers.finish()
        return found

    def _given(self, num_slots: int, num_experts: int) -> _Given:
        """Returns what takes a dispatch whose experts are 0, 1, ..."""
        top_k = self.sizes.top_k
        tokens = min(STREAMED_TOKENS, max(1, -(-num_slots // top_k)))
        ids = torch.arange(tokens * top_k, device=self.device) % num_experts
        ids = ids.view(tokens, top_k)
        gates = torch.full(ids.shape, 1 / top_k, dtype=self.dtype, device=self.device)
        return _Given(hidden=self.rows(tokens, width=self._width), ids=ids, gates=gates)

    def _next_blocks(self, count: int, most: int) -> NDArray[np.int64]:
        """Returns others each time: no cache of the device holds them."""
        return (next(self._turn) * count + np.arange(count)) % most

    def _piece(
        self, dispatch: StreamedDispatch, blocks: Sequence[torch.Tensor], count: int
    ) -> Callable[[], object]:
        def run() -> None:
            own = [blocks[each] for each in self._next_blocks(count, len(blocks))]
            dispatch.run(range(count), own)

        return run

    @staticmethod
    def _beginning(dispatch: StreamedDispatch, given: _Given) -> Callable[[], object]:
        return lambda: dispatch.begin(given.rows(), given.ids, given.gates)

    @staticmethod
    def _combining(dispatch: StreamedDispatch, given: _Given) -> Callable[[], object]:
        return lambda: given.hidden + dispatch.combined()

    def _on_device(
        self, dispatch: StreamedDispatch, blocks: Sequence[torch.Tensor]
    ) -> tuple[Curve, Curve]:
        """Returns device times of pieces by experts, and of what follows by slots."""
        pieces = [
            (
                count,
                self.times.device_part(
                    self._piece(dispatch, blocks, count),
                    before=self._beginning(dispatch, self._given(count, count)),
                ),
            )
            for count in self.sizes.pieces
        ]
        combine = []
        for num_slots in self._slots():
            given = self._given(num_slots, min(num_slots, len(blocks)))
            self._beginning(dispatch, given)()
            time = self.times.device_part(self._combining(dispatch, given))
            combine.append((given.ids.numel(), time))
        return ascending(pieces), ascending(combine)

    def _slots(self) -> list[int]:
        return [n for n in self.sizes.slots if n <= STREAMED_TOKENS * self.sizes.top_k]

    def _from_python(
        self,
        store: ExpertStore,
        dispatch: StreamedDispatch,
        blocks: Sequence[torch.Tensor],
        transfers: Transfers,
        on_device: tuple[Curve, Curve],
    ) -> PieceParts:
        sizes, times = self.sizes, self.times
        given = self._given(sizes.top_k, sizes.top_k)
        group = range(min(store.num_experts, sizes.top_k))

        def known() -> None:
            self._beginning(dispatch, given)()
            dispatch.active()

        def order() -> None:
            transfers.await_all([0])
            transfers.mark()

        def ask() -> None:
            transfers.load_all([(each, store.block(each)) for each in group])

        host = [
            (
                count,
                times.host(
                    self._piece(dispatch, blocks, count),
                    before=self._beginning(dispatch, self._given(count, count)),
                ),
            )
            for count in sizes.pieces
        ]
        self._beginning(dispatch, given)()
        combine = times.host(self._combining(dispatch, given))
        load = scaled(times.host(ask), 1 / len(group))
        transfers.finish()
        return PieceParts(
            known=times.host(known),
            late=times.late(known),
            host=ascending(host),
            slot=times.host(order),
            load=load,
            device=on_device[0],
            combine_host=combine,
            combine_device=on_device[1],
            rest=None,
        )

    def _from_compiled(
        self,
        store: ExpertStore,
        dispatch: StreamedDispatch,
        blocks: Sequence[torch.Tensor],
        transfers: Transfers,
        on_device: tuple[Curve, Curve],
    ) -> PieceParts:
        sizes, times = self.sizes, self.times
        direct = DirectRuns(
            driver=driver_functions(),
            most_site=_SITE,
            most_experts=len(blocks),
            residency=None,
            transfers=transfers,
        )
        direct.add(_SITE, pool=blocks[0], memory=store.memory, block_bytes=store.shape.block_bytes)
        stream = 0 if self.times.is_serial else current_handle(self.device)
        given = self._given(sizes.top_k, sizes.top_k)
        launches = self._launches(dispatch, blocks, given)
        if launches is None:
            return self._from_python(store, dispatch, blocks, transfers, on_device)

        def known() -> None:
            found = dispatch.launches(given.rows(), given.ids, given.gates)
            assert found is not None
            direct.learn(dispatch, found, stream)

        def run(count: int, copies: int = 0) -> _Asked:
            """Returns what asks for a dispatch of one piece of so many experts, or of none."""
            own = given if count <= sizes.top_k else self._given(count, count)
            found = self._launches(dispatch, blocks, own)
            assert found is not None
            kept: list[torch.Tensor] = []

            def before() -> None:
                dispatch.launches(own.hidden, own.ids, own.gates)
                kept[:] = [dispatch.out()]
                self._decide(direct, count, copies)

            return _Asked(
                before=before,
                ask=lambda: direct.run(_SITE, dispatch, found, stream, combines=True),
            )

        def host(asked: _Asked) -> Measured:
            return times.host(asked.ask, before=asked.before)

        nothing = run(0)

        def combine() -> torch.Tensor:
            out = dispatch.out()
            nothing.ask()
            return given.hidden + out

        bare = host(nothing)
        combine_host = times.host(combine, before=nothing.before)
        by_count = [(count, difference(host(run(count)), bare)) for count in sizes.pieces]
        few = min(sizes.top_k, store.num_experts)
        uncopied, one = (host(run(few, copies)) for copies in (0, 1))
        # One copy more takes less than the host varies by: many more tell.
        many = max(few, min(_MANY_COPIES, store.num_experts, len(blocks)))
        first, all_of_them = (host(run(many, copies)) for copies in (1, many))
        load = difference(all_of_them, first, 1 / max(1, many - 1))
        transfers.finish()
        own_known = times.host(known)
        return PieceParts(
            known=own_known,
            late=times.late(known),
            host=ascending(by_count),
            slot=difference(difference(one, uncopied), load),
            load=load,
            device=on_device[0],
            combine_host=combine_host,
            combine_device=on_device[1],
            rest=self._rest(store, given, [own_known, combine_host, difference(uncopied, bare)]),
        )

    def _launches(
        self, dispatch: StreamedDispatch, blocks: Sequence[torch.Tensor], given: _Given
    ) -> Launches | None:
        """Returns launches of dispatches like one, which is run from Python first."""
        found = dispatch.launches(given.hidden, given.ids, given.gates)
        if found is None:
            self._beginning(dispatch, given)()
            self._piece(dispatch, blocks, min(len(blocks), given.ids.numel()))()
            self._combining(dispatch, given)()
            self.times.settle()
            found = dispatch.launches(given.hidden, given.ids, given.gates)
        return found

    def _decide(self, direct: DirectRuns, count: int, copies: int) -> None:
        """Writes a decision: one piece of ``count`` hits, or misses of which some are copied."""
        own = direct.decision
        own.columns[EXPERT, :count] = np.arange(count)
        own.columns[SLOT, :count] = self._next_blocks(count, own.columns.shape[1])
        own.columns[HIT, :count], own.columns[LOADS, :count] = 1, 0
        own.columns[HIT, :copies], own.columns[LOADS, :copies] = 0, 1
        own.counts[:] = 0
        own.counts[NUM_EXPERTS], own.counts[NUM_COPIES] = count, copies
        own.counts[NUM_PIECES] = min(1, count)
        own.piece_starts[:2] = 0, count
        own.piece_places[:count] = np.arange(count)
        own.copy_starts[:3] = 0, copies, copies
        own.copy_places[:copies] = np.arange(copies)

    def _rest(self, store: ExpertStore, given: _Given, parts: Sequence[Measured]) -> Measured:
        """Returns what a whole dispatch of hits takes beyond its parts, once the host knows."""
        top_k, count = self.sizes.top_k, store.num_experts
        place = BufferedSite(site=_SITE, stack="decoder", layer=0, store=store)
        settings = BufferSettings(capacity=count, initial="full")
        buffer = ExpertBuffer([place], settings, device=self.device)
        buffer.reserve(given.ids.numel())
        ids = given.ids % count
        whole = self.times.host(
            lambda: given.hidden + buffer.run(_SITE, given.rows(), ids, given.gates)
        )
        buffer.close()
        machine = functools.partial(Lru, [1] * count, count)
        cache = CacheSpec(sites=((_SITE, count),), capacity=count, pool=0, machine=machine)
        residency = CompiledResidency([cache], [count], full=True)
        chosen = ids.view(-1).cpu().numpy()
        decided = self.times.host(lambda: residency.decide(_SITE, chosen, top_k))
        named_s = sum(part.median for part in [*parts, decided])
        return difference(whole, replace(parts[0], median=named_s))
