"""What a gating kernel does in a dispatch, in weight bytes, FLOPs and bytes moved.

The kernels are those of `moeprof.live.kernels`; nothing is dropped, so the static ones give every
expert a slot for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.serving_settings import GROUP_TOKENS, STATIC_KERNELS

if TYPE_CHECKING:
    from moeprof.replay.calibration_file import Calibration, GatingTimes
    from moeprof.replay.expert_shapes import ExpertShape

Floats = NDArray[np.float64]

_MASK_ITEM_BYTES = 4
_ROW_PASSES = 2
_MASK_PASSES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatches:
    """Sizes of dispatches, each [dispatches].

    Attributes:
        num_tokens: Tokens.
        top_k: Slots per token.
        active: Experts that have rows.
        executed: Rows of all experts.
        num_experts: Experts of the site.
    """

    num_tokens: Floats
    top_k: Floats
    active: Floats
    executed: Floats
    num_experts: Floats


class KernelWork(NamedTuple):
    """What a kernel does, each [dispatches].

    Attributes:
        weight_bytes: Weights read.
        flops: Floating-point operations.
        moved_bytes: Bytes of rows and masks, read and written.
    """

    weight_bytes: Floats
    flops: Floats
    moved_bytes: Floats


def kernel_work(kernel: str, given: Dispatches, shape: ExpertShape) -> KernelWork:
    """Returns what a kernel does.

    Args:
        kernel: Its name.
        given: The dispatches.
        shape: Of the experts.
    """
    row_bytes = shape.d_model * shape.item_bytes
    routed = given.num_tokens * given.top_k
    if kernel not in STATIC_KERNELS:
        return KernelWork(
            weight_bytes=given.active * shape.expert_bytes,
            flops=given.executed * shape.flops_per_row,
            moved_bytes=_ROW_PASSES * (routed + given.executed) * row_bytes,
        )
    slots = given.num_tokens
    groups = np.ones_like(slots)
    if kernel == "static_grouped":
        slots = np.minimum(slots, GROUP_TOKENS)
        groups = np.ceil(given.num_tokens / np.maximum(slots, 1.0))
    rows = groups * given.num_experts * slots
    flops = rows * shape.flops_per_row
    moved = _ROW_PASSES * (routed + rows) * row_bytes
    if kernel != "static_index":
        # Each group of tokens has a mask of [tokens, experts, slots], used once in and once out.
        mask = groups * slots * given.num_experts * slots
        flops = flops + 2 * _MASK_PASSES * mask * shape.d_model
        moved = moved + mask * _MASK_PASSES * (_MASK_ITEM_BYTES + shape.item_bytes)
    return KernelWork(
        weight_bytes=given.num_experts * shape.expert_bytes, flops=flops, moved_bytes=moved
    )


def device_columns(work: KernelWork, active: Floats, machine: Calibration) -> Floats:
    """Returns [dispatches, 5] what the factors of `GatingTimes` multiply, in seconds or counts."""
    copy = machine.device_copy_bytes_per_s.median
    return np.stack(
        [
            np.ones_like(active),
            active,
            work.weight_bytes / copy,
            work.flops / machine.matrix_flops_per_s.median,
            work.moved_bytes / copy,
        ],
        axis=1,
    )


def device_seconds(
    times: GatingTimes, work: KernelWork, active: Floats, machine: Calibration
) -> Floats:
    """Returns the device time [dispatches] of a kernel."""
    factors = np.array(
        [
            times.device_dispatch_s,
            times.device_expert_s,
            times.weight_factor,
            times.flops_factor,
            times.moved_factor,
        ]
    )
    found: Floats = device_columns(work, active, machine) @ factors
    return found
