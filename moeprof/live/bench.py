"""What every bench of a calibration has: a device, sizes, a clock of parts, and rows."""

from __future__ import annotations

import torch

from moeprof.live.calibration_sizes import CalibrationSizes
from moeprof.live.core_binding import Unwatched, Watch
from moeprof.live.part_times import PartTimes


class Bench:
    """A device on which parts are measured.

    Args:
        device: Which.
        sizes: How large things are.
        watch: See `PartTimes`.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: CalibrationSizes,
        *,
        watch: Watch | None = None,
    ) -> None:
        self.device = device
        self.sizes = sizes
        self.watch: Watch = watch or Unwatched()
        self.dtype: torch.dtype = getattr(torch, sizes.dtype)
        self.times = PartTimes(device, repeats=sizes.repeats, watch=self.watch)

    def rows(
        self,
        count: int,
        device: torch.device | str | None = None,
        *,
        width: int | None = None,
    ) -> torch.Tensor:
        """Returns rows [count, width or d_model], the same for the same count."""
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(count, width or self.sizes.d_model, generator=generator)
        return rows.to(device=self.device if device is None else device, dtype=self.dtype)
