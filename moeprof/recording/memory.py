"""Memory of the device's allocator and of the process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class MemoryReading:
    """One reading; None where the device or the system does not say.

    Attributes:
        allocated_bytes: Allocated on the device.
        reserved_bytes: Held by the allocator.
        peak_bytes: Peak of allocated since the last reset.
        process_bytes: Resident memory of the process.
    """

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None


def process_bytes() -> int | None:
    """Returns the resident memory of this process; None where the system does not say."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * _PAGE_BYTES


class MemoryMeter:
    """Reads the memory of one device.

    Args:
        device: The device the model runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    @property
    def sees_device(self) -> bool:
        """True where the allocator keeps statistics."""
        return self._cuda

    def reset_peak(self) -> None:
        """Starts a new peak."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def allocated_bytes(self) -> int:
        """Returns allocated device bytes; 0 where there is no allocator to ask."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else 0

    def peak_bytes(self) -> int:
        """Returns the peak since the last reset; 0 where there is no allocator to ask."""
        return torch.cuda.max_memory_allocated(self._device) if self._cuda else 0

    def read(self) -> MemoryReading:
        """Returns all readings."""
        resident = process_bytes()
        if not self._cuda:
            return MemoryReading(process_bytes=resident)
        return MemoryReading(
            allocated_bytes=torch.cuda.memory_allocated(self._device),
            reserved_bytes=torch.cuda.memory_reserved(self._device),
            peak_bytes=torch.cuda.max_memory_allocated(self._device),
            process_bytes=resident,
        )
