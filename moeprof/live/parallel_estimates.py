"""What a step would take on devices that are not there: every share in turn on one device.

An estimate, never a measurement: the slowest share of the experts, the exchange from a line or a
curve through exchanges between the devices there are, and the work on a rank's own tokens. It is
corrected by how far the same arithmetic was off where it could be measured
(`parallel_corrections`); the range of that is its error bar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from moeprof.errors import UsageError
from moeprof.live.expert_parallel import DEFAULT_KERNEL, SlotTables, slot_ids
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels import kernel_named
from moeprof.live.kernels.slots import combine_rows, rows_by_expert
from moeprof.live.parallel_corrections import CorrectedStep, corrected_step
from moeprof.live.parallel_plans import (
    busiest_rows,
    check_layout,
    rows_between,
    rows_to_slots,
    shard_counts,
    shard_starts,
)
from moeprof.live.repetitions import Repetitions, repeat, repeat_in_turn
from moeprof.replay.calibration_file import Curve
from moeprof.replay.loads import Layout
from moeprof.replay.result import FigureClass

_LEAST_POINTS = 2


@dataclass(frozen=True, kw_only=True)
class AllToAllLine:
    """Time of an all-to-all: latency + bytes / bandwidth.

    Attributes:
        latency_ms: What it takes however little is sent; 0 or more.
        bytes_per_s: Bytes that the busiest rank sends to others, per second, beyond that.
        largest_error: Largest |line / measured - 1| of the points it was fitted to.
        num_ranks: Ranks that exchanged.
    """

    latency_ms: float
    bytes_per_s: float
    largest_error: float
    num_ranks: int

    def time_ms(self, num_bytes: float) -> float:
        """Returns the time when the busiest rank sends, or receives, so many bytes."""
        return self.latency_ms + num_bytes / self.bytes_per_s * 1e3


def fitted_line(num_bytes: ArrayLike, times_ms: ArrayLike, *, num_ranks: int) -> AllToAllLine:
    """Returns the line whose relative errors have the least sum of squares.

    Args:
        num_bytes: [points] bytes that the busiest rank sends to others.
        times_ms: [points] all above 0.
        num_ranks: Ranks that exchanged.

    Raises:
        UsageError: The points do not tell latency from bandwidth.
    """
    sizes, times = np.asarray(num_bytes, np.float64), np.asarray(times_ms, np.float64)
    if len(np.unique(sizes)) < _LEAST_POINTS:
        raise UsageError("a line needs exchanges of two sizes at least")
    # Residuals over the times: small exchanges count as much as large ones.
    weighted = np.stack([np.ones(len(sizes)), sizes], axis=1) / times[:, None]
    latency_ms, ms_per_byte = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)[0]
    if latency_ms < 0:
        latency_ms, share = 0.0, sizes / times
        ms_per_byte = share.sum() / (share**2).sum()
    if ms_per_byte <= 0:
        raise UsageError(
            "larger exchanges took no longer than smaller ones",
            hint="measure larger ones, or with less running beside",
        )
    errors = np.abs((latency_ms + sizes * ms_per_byte) / times - 1)
    return AllToAllLine(
        latency_ms=float(latency_ms),
        bytes_per_s=float(1e3 / ms_per_byte),
        largest_error=float(errors.max()),
        num_ranks=num_ranks,
    )


def exchange_ms(exchange: AllToAllLine | Curve, num_bytes: float) -> float:
    """Returns what an exchange takes in which the busiest rank sends or receives so many bytes.

    Args:
        exchange: A line, or the curve of a calibration (`exchange_times.exchange_curve`).
        num_bytes: To others.
    """
    if isinstance(exchange, AllToAllLine):
        return exchange.time_ms(num_bytes)
    return float(exchange.at(num_bytes)) * 1e3


def share_times(
    slots: ExpertWeights,
    slot_rows: NDArray[np.int64],
    *,
    num_devices: int,
    kernel: str = DEFAULT_KERNEL,
    repeats: int = 20,
) -> list[Repetitions | None]:
    """Times every device's share of the experts on the device they lie on.

    One after the other, then all again: a small share would else be found in a cache that its own
    device shares among all layers.

    Args:
        slots: Weights of all slots of a placement in their order: ``experts.select(expert)``.
        slot_rows: [slots] rows that each gets.
        num_devices: Devices that the slots are for.
        kernel: Name of a gating kernel.
        repeats: Timed repetitions of each.

    Returns:
        [devices]; None for a device without rows.
    """
    run = kernel_named(kernel)
    device = slots.w_in.device
    per_device = slots.num_experts // num_devices
    shares: dict[int, Callable[[], object]] = {}
    for index, rows in enumerate(slot_rows.reshape(num_devices, per_device)):
        total = int(rows.sum())
        if not total:
            continue
        own = slots.select(slice(index * per_device, (index + 1) * per_device))
        ids = torch.from_numpy(np.repeat(np.arange(per_device), rows)).to(device)[:, None]
        hidden = torch.randn(total, slots.d_model, dtype=slots.w_in.dtype, device=device)
        ones = torch.ones(total, 1, device=device)

        def share(
            own: ExpertWeights = own,
            ids: torch.Tensor = ids,
            hidden: torch.Tensor = hidden,
            ones: torch.Tensor = ones,
        ) -> None:
            run(hidden, ids, ones, own)

        shares[index] = share
    times = repeat_in_turn(list(shares.values()), device=device, repeats=repeats)
    found = dict(zip(shares, times, strict=True))
    return [found.get(index) for index in range(num_devices)]


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """What one step would take on so many devices.

    Attributes:
        figure_class: Never a measurement.
        num_devices: Devices.
        size_exchange_ms: As given.
        token_exchange_ms: Bringing rows in order, and sending them: from the exchanges measured.
        experts_ms: The slowest share.
        return_ms: Sending them back: likewise.
        combine_ms: Adding them up.
        shares_ms: Median of every device's share of the experts.
        busiest_bytes: Bytes that the busiest device sends to others, or receives, in an exchange.
    """

    figure_class: ClassVar[FigureClass] = "estimate"
    num_devices: int
    size_exchange_ms: float
    token_exchange_ms: float
    experts_ms: float
    return_ms: float
    combine_ms: float
    shares_ms: tuple[float, ...]
    busiest_bytes: int

    @property
    def step_ms(self) -> float:
        """All parts together, uncorrected."""
        exchanges_ms = self.size_exchange_ms + self.token_exchange_ms + self.return_ms
        return exchanges_ms + self.experts_ms + self.combine_ms

    def corrected(self, ratios: Sequence[float]) -> CorrectedStep:
        """Returns the step times the median of ``ratios``, and their range as its error bar.

        Args:
            ratios: Measured over estimated, of steps that were both.

        Raises:
            UsageError: There are no ratios.
        """
        return corrected_step(self.step_ms, ratios)


def estimated_step(
    experts: NDArray[np.integer],
    slots: ExpertWeights,
    layout: Layout,
    *,
    exchange: AllToAllLine | Curve,
    size_exchange_ms: float,
    kernel: str = DEFAULT_KERNEL,
    repeats: int = 20,
) -> StepEstimate:
    """Returns what a dispatch would take on the devices of a placement.

    Tokens are dealt to the devices in contiguous parts. Bandwidth and latency between any two
    devices are taken to be those of the exchanges that were measured: devices of one host on a
    switch, not a network.

    Args:
        experts: [tokens, top_k] ids; -1: not executed.
        slots: Weights of all slots in their order, on the device that runs them.
        layout: The placement.
        exchange: Of all-to-alls: a line, or a calibration's curve.
        size_exchange_ms: Of a size exchange.
        kernel: Name of a gating kernel.
        repeats: Timed repetitions of each share.

    Raises:
        UsageError: The placement does not fit the weights or the ids, or cannot be carried out.
    """
    num_devices = layout.num_devices
    check_layout(layout, num_experts=layout.num_experts, num_ranks=num_devices)
    if slots.num_experts != len(layout.expert):
        raise UsageError(
            f"the placement has {len(layout.expert)} slots, the weights {slots.num_experts}",
            hint="take them by experts.select(expert), of every slot of the placement",
        )
    starts = shard_starts(len(experts), num_devices)
    counts = shard_counts(experts, starts, layout.num_experts)
    shares = share_times(
        slots,
        rows_to_slots(counts, layout).sum(axis=0),
        num_devices=num_devices,
        kernel=kernel,
        repeats=repeats,
    )
    shares_ms = tuple(0.0 if share is None else share.median_ms for share in shares)
    row_bytes = slots.d_model * slots.w_in.element_size()
    busiest_bytes = busiest_rows(rows_between(counts, layout)) * row_bytes
    sending_ms = exchange_ms(exchange, busiest_bytes)
    # The rank with most tokens holds up the rest.
    largest = int(np.diff(starts).argmax())
    own = experts[starts[largest] : starts[largest + 1]]
    order_ms, combine_ms = own_token_times(own, slots, layout, repeats=repeats)
    return StepEstimate(
        num_devices=num_devices,
        size_exchange_ms=size_exchange_ms,
        token_exchange_ms=order_ms + sending_ms,
        experts_ms=max(shares_ms),
        return_ms=sending_ms,
        combine_ms=combine_ms,
        shares_ms=shares_ms,
        busiest_bytes=busiest_bytes,
    )


def own_token_times(
    experts: NDArray[np.integer], slots: ExpertWeights, layout: Layout, *, repeats: int = 20
) -> tuple[float, float]:
    """Returns the milliseconds of bringing a rank's own rows in order, and of adding them up.

    Args:
        experts: [tokens, top_k] of one rank.
        slots: Weights that lie on the device in question.
        layout: The placement.
        repeats: Timed repetitions of each.
    """
    device, dtype = slots.w_in.device, slots.w_in.dtype
    if not len(experts):
        return 0.0, 0.0
    ids = torch.from_numpy(np.asarray(experts, np.int64)).to(device)
    hidden = torch.randn(len(experts), slots.d_model, dtype=dtype, device=device)
    weights = torch.rand(ids.shape, device=device)
    where = slot_ids(ids, SlotTables.of(layout, device))
    num_slots = len(layout.expert)

    def in_order() -> torch.Tensor:
        order = rows_by_expert(where, num_slots)
        return hidden.index_select(0, order.slots // ids.shape[1])

    order, rows = rows_by_expert(where, num_slots), in_order()
    ordering = repeat(in_order, device=device, repeats=repeats)
    combining = repeat(lambda: combine_rows(rows, order, weights), device=device, repeats=repeats)
    return ordering.median_ms, combining.median_ms
