"""Measures the constants of a machine: copies, experts, pieces, and what surrounds them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from moeprof.live.bench import Bench
from moeprof.live.expert_store import ExpertStore
from moeprof.live.kernels.streamed import ROWS_AT_ONCE, STREAMED_TOKENS, can_stream
from moeprof.live.measured_curves import ascending, middle, middle_curve, scaled, surface
from moeprof.live.part_times import PartTimes
from moeprof.live.piece_bench import PieceBench, PieceParts
from moeprof.live.routed_runs import random_sites
from moeprof.live.row_blocks import Workspace
from moeprof.live.setting_runs import geometry_of
from moeprof.live.transfers import HostTransfers, make_slots, open_transfers
from moeprof.replay.calibration_file import Curve, Measured, StreamedTimes
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.trace.synthetic import synthetic_trace

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

_SMALL_ROWS = 8
_CHAIN = 16
_COPIES = 8


@dataclass(frozen=True, kw_only=True)
class ExpertParts:
    """What was measured at one size of experts."""

    expert_bytes: int
    block_bytes: int
    copy: Measured
    on_device: Curve
    on_host: Curve
    launch: Measured
    slot: Measured
    load: Measured
    handover: Measured
    pieces: PieceParts | None


def streamed_times(by_size: Sequence[ExpertParts]) -> StreamedTimes | None:
    """Returns what depends on the size of experts by size, and the middle of all else.

    The host asks for large experts as it does for small ones: they are moments of one measurement.
    """
    found = [(one.expert_bytes, one.pieces) for one in by_size if one.pieces is not None]
    if not found:
        return None
    every = [parts for _, parts in found]
    rest = [parts.rest for parts in every if parts.rest is not None]
    return StreamedTimes(
        most_tokens=STREAMED_TOKENS,
        rows_at_once=ROWS_AT_ONCE,
        known_s=middle([parts.known for parts in every]),
        late_s=middle([parts.late for parts in every]),
        piece_host=middle_curve([parts.host for parts in every]),
        slot_host_s=middle([parts.slot for parts in every]),
        load_host_s=middle([parts.load for parts in every]),
        piece_device=surface([(size, parts.device) for size, parts in found]),
        combine_host_s=middle([parts.combine_host for parts in every]),
        combine_device=middle_curve([parts.combine_device for parts in every]),
        rest_host_s=middle(rest) if rest else None,
    )


class _UnwaitedWorkspace(Workspace):
    """A workspace that is not asked what the device found: for its device part alone."""

    def _received(self, count: int) -> list[int]:
        return [0] * count


class ConstantBench(Bench):
    """Measures constants on one device."""

    def _store(self, shape: ExpertShape, count: int, trace: Trace) -> ExpertStore:
        site = random_sites(
            trace, geometry_of(shape), stack="decoder", pinned=not self.times.is_serial
        )[0]
        assert site.store.num_experts == count
        return site.store

    def of_expert(self, size: int) -> ExpertParts:
        """Measures copies and computations of experts of one size."""
        shape = self.sizes.shape(size)
        count = max(2, -(-self.sizes.cold_bytes // shape.block_bytes))
        with tempfile.TemporaryDirectory() as folder:
            only = synthetic_trace(
                Path(folder) / "one.moeprof", num_requests=1, num_sites=1, num_experts=count
            )
            store = self._store(shape, count, only)
        slots, pools = make_slots([count], [shape.block_bytes], self.device)
        for expert, slot in enumerate(slots):
            slot.copy_(store.block(expert))
        views = [store.shape.weights(slot[: store.shape.block_bytes]) for slot in slots]
        transfers = open_transfers(slots)
        self.times.settle()
        turn = itertools.cycle(range(count))

        def load() -> None:
            for _ in range(_COPIES):
                expert = next(turn)
                slots[expert][: shape.block_bytes].copy_(store.block(expert), non_blocking=True)

        def ask() -> None:
            expert = next(turn)
            transfers.load(expert, store.block(expert))

        def order() -> None:
            expert = next(turn)
            transfers.await_load(expert)
            transfers.release(expert)

        def on_device(rows: torch.Tensor) -> Callable[[], object]:
            return lambda: views[next(turn)].run(0, rows)

        def by_host(rows: torch.Tensor) -> Callable[[], object]:
            # As the live buffer does: the weights are looked up in their block each time.
            return lambda: store.weights(next(turn)).run(0, rows)

        few = self.rows(self.sizes.rows[0], width=shape.d_model)

        def chain() -> None:
            # The read event lies behind whatever the device is busy with.
            transfers.release(0)
            for expert in range(_CHAIN):
                transfers.load(0, store.block(expert % count))
                transfers.await_load(0)
                views[0].run(0, few)
                transfers.release(0)

        given = {rows: self.rows(rows, width=shape.d_model) for rows in self.sizes.rows}
        own = {n: self.rows(n, "cpu", width=shape.d_model) for n in self.sizes.host_rows}
        # One after another, as they are asked for; what the first waits for is a handover.
        copy = scaled(self.times.device_part(load), 1 / _COPIES)
        curve = ascending(
            [(n, self.times.device_part(on_device(rows))) for n, rows in given.items()]
        )
        found = ExpertParts(
            expert_bytes=shape.expert_bytes,
            block_bytes=shape.block_bytes,
            copy=copy,
            on_device=curve,
            on_host=ascending([(n, self._on_host(by_host(rows))) for n, rows in own.items()]),
            launch=self.times.host(on_device(few)),
            # Without a queue there is nothing to order, and a copy is done when it is asked for.
            slot=self.times.host(order),
            load=self.times.host(ask),
            handover=self._handover(chain, copy.median + curve.times_s[0].median),
            pieces=PieceBench(self.device, self.sizes, watch=self.watch).of_store(store, slots)
            if not self.times.is_serial and can_stream(store.shape, self.device)
            else None,
        )
        transfers.finish()
        assert isinstance(transfers, HostTransfers) == self.times.is_serial
        store.close()
        del pools
        return found

    def _handover(self, chain: Callable[[], object], link_s: float) -> Measured:
        """Returns what a chain of copies and experts in one slot takes beyond them, per handover.

        Each link of the chain is a copy that waits for the expert before it, and an expert that
        waits for the copy: two handovers.
        """
        if self.times.is_serial:
            return self.times.host(chain)
        whole = self.times.device_part(chain)

        def beyond(chain_s: float) -> float:
            return max(0.0, (chain_s / _CHAIN - link_s) / 2)

        return Measured(
            median=beyond(whole.median),
            low=beyond(whole.low),
            high=beyond(whole.high),
            error=whole.error,
            num_repetitions=whole.num_repetitions,
        )

    def _on_host(self, function: Callable[[], object]) -> Measured:
        return PartTimes(torch.device("cpu"), repeats=self.sizes.repeats).device_part(function)

    def of_dispatch(self) -> dict[str, Any]:
        """Measures what surrounds the experts of a dispatch, by its (token, slot) rows."""
        sizes, times = self.sizes, self.times
        first: dict[str, Any] = {}
        sort, combine = [], []
        for slots in sizes.slots:
            tokens = max(1, slots // sizes.top_k)
            hidden = self.rows(tokens)
            ids = torch.arange(tokens * sizes.top_k, device=self.device) % sizes.num_experts
            ids = ids.view(tokens, sizes.top_k)
            gates = torch.full(ids.shape, 1 / sizes.top_k, dtype=self.dtype, device=self.device)
            spaces = [
                kind(
                    num_experts=sizes.num_experts,
                    d_model=sizes.d_model,
                    dtype=self.dtype,
                    device=self.device,
                )
                for kind in (Workspace, _UnwaitedWorkspace)
            ]

            def before(
                space: Workspace, hidden: torch.Tensor = hidden, ids: torch.Tensor = ids
            ) -> Any:
                rows = F.rms_norm(hidden, hidden.shape[-1:])
                return space.sorted_rows(rows, ids, sizes.num_experts)

            given, order, _ = before(spaces[0])
            pieces = list(given.split(max(1, len(given) // min(len(given), sizes.top_k))))
            returned = torch.empty_like(given)

            def after(
                pieces: list[torch.Tensor] = pieces,
                returned: torch.Tensor = returned,
                order: torch.Tensor = order,
                gates: torch.Tensor = gates,
                hidden: torch.Tensor = hidden,
                space: Workspace = spaces[0],
            ) -> torch.Tensor:
                torch.cat(pieces, out=returned)
                return hidden + space.combined(returned, order, gates, len(returned))

            sort.append((ids.numel(), times.device_part(lambda: before(spaces[1]))))  # noqa: B023
            combine.append((ids.numel(), times.device_part(after)))
            if not first:
                first["combine_host_s"] = times.host(after)
                # The host waits inside, so what it needs is the whole of it on an idle device.
                first["known_s"] = times.host(lambda: before(spaces[0]))  # noqa: B023
        small = self.rows(_SMALL_ROWS)
        pinned = torch.empty(small.shape, dtype=self.dtype, pin_memory=not times.is_serial)

        def fetch() -> None:
            pinned.copy_(small, non_blocking=True)
            times.settle()

        return {
            **first,
            "sort_device": ascending(sort),
            "combine_device": ascending(combine),
            "fetch_s": times.wall(fetch),
            "return_host_s": times.wall(
                lambda: small.copy_(pinned, non_blocking=True), settle=times.is_serial
            ),
            "sync_s": times.host(times.settle),
            "launch_host_s": times.host(lambda: small.add_(1)),
            "launch_device_s": times.device_part(lambda: small.add_(1)),
        }
