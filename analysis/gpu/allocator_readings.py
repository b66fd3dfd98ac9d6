"""What torch's caching allocator does while a buffer runs: what it asks the driver for, and keeps.

A driver that is not asked says little, since the allocator has memory in hand after a first run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class AllocatorReading:
    """What torch's caching allocator of a GPU has done so far.

    Attributes:
        driver_allocations: Times that it asked the driver for memory.
        blocks: Blocks that it handed out, from memory that it holds or the driver's.
        allocated_bytes: Bytes of blocks that are in use now.
    """

    driver_allocations: int
    blocks: int
    allocated_bytes: int


def allocator_reading(device: torch.device) -> AllocatorReading | None:
    """Returns what the allocator of a GPU has done so far; None on a CPU."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    return AllocatorReading(
        driver_allocations=int(stats["num_device_alloc"]),
        blocks=int(stats["allocation.all.allocated"]),
        allocated_bytes=int(stats["allocated_bytes.all.current"]),
    )


def handed_out(readings: Sequence[AllocatorReading]) -> dict[str, Any] | None:
    """Returns what the allocator did in one repetition; None without readings.

    Args:
        readings: Before the first step, after each, and once all that the last one held is gone.
    """
    if not readings:
        return None
    before, *after_steps, after = readings
    blocks = [each.blocks for each in (before, *after_steps)]
    return {
        "driver_allocations": after.driver_allocations - before.driver_allocations,
        "blocks_by_step": [later - earlier for earlier, later in itertools.pairwise(blocks)],
        # A step's last rows are still held when it is read.
        "grown_bytes_by_step": [
            each.allocated_bytes - before.allocated_bytes for each in after_steps
        ],
        "grown_bytes": after.allocated_bytes - before.allocated_bytes,
    }


def steady_state(
    warm: AllocatorReading | None,
    done: AllocatorReading | None,
    repetitions: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns what the allocator did while a setting was timed, after a run of all steps.

    Args:
        warm: Before the first repetition; None on a CPU.
        done: After the last.
        repetitions: With what `handed_out` said of each.
    """
    if warm is None or done is None:
        num_driver, own = 0, None
    else:
        num_driver = done.driver_allocations - warm.driver_allocations
        by_step = [count for each in repetitions for count in each["allocator"]["blocks_by_step"]]
        own = {
            "blocks": done.blocks - warm.blocks,
            "most_blocks_of_a_step": max(by_step),
            "median_blocks_of_a_step": float(np.median(by_step)),
            "grown_bytes": done.allocated_bytes - warm.allocated_bytes,
        }
    return {
        "driver_allocations_in_steady_state": num_driver,
        # By its name in earlier results.
        "allocations_in_steady_state": num_driver,
        "allocator_in_steady_state": own,
    }


def is_steady(row: Mapping[str, Any]) -> bool:
    """Returns True where the driver was not asked for memory and no more of it came into use."""
    own = row.get("allocator_in_steady_state")
    grown = 0 if own is None else own["grown_bytes"]
    return bool(row["allocations_in_steady_state"] == 0 and grown <= 0)
