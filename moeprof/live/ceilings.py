"""How fast a device copies and multiplies: the rates that kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moeprof.live.experts import ExpertWeights
from moeprof.live.repetitions import Repetitions, repeat

COPY_BYTES = 4 << 30
MATRIX_WIDTH = 8192
_CPU_COPY_BYTES = 64 << 20
_CPU_MATRIX_WIDTH = 512


@dataclass(frozen=True)
class FloorParts:
    """The least times that reading and multiplying take, each at the rate of the device.

    Attributes:
        bytes_ms: Every active expert's weights read once.
        flops_ms: Every executed row multiplied.
    """

    bytes_ms: float
    flops_ms: float

    @property
    def floor_ms(self) -> float:
        """The longer of the two: the other can be hidden behind it."""
        return max(self.bytes_ms, self.flops_ms)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device.

    Attributes:
        copy_bytes_per_s: Bytes read plus bytes written of a large copy on the device, per second.
        matrix_flops_per_s: Floating-point operations of a large matrix product on random data.
        copy: The repetitions of the first.
        matrix: The repetitions of the second.
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    copy: Repetitions
    matrix: Repetitions

    def floor_ms(self, expert_ids: torch.Tensor, experts: ExpertWeights) -> float:
        """Returns the least time a layer can take for this routing.

        Either every active expert's weights are read once, at the rate at which the device copies,
        or every executed row is multiplied, at the rate at which it multiplies.

        Args:
            expert_ids: [T, k]; -1 where a slot is not executed.
            experts: The layer's.
        """
        return self.floor_parts(expert_ids, experts).floor_ms

    def floor_parts(self, expert_ids: torch.Tensor, experts: ExpertWeights) -> FloorParts:
        """Returns both times of which `floor_ms` is the longer; arguments as there."""
        executed = expert_ids[expert_ids >= 0]
        num_bytes = len(torch.unique(executed)) * experts.expert_bytes
        num_flops = executed.numel() * experts.flops_per_row
        return FloorParts(
            bytes_ms=1e3 * (num_bytes / self.copy_bytes_per_s),
            flops_ms=1e3 * (num_flops / self.matrix_flops_per_s),
        )


def measure_ceilings(
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    rest_s: float = 0.0,
    load_s: float = 0.0,
) -> Ceilings:
    """Measures a device's copy bandwidth and matrix rate.

    Args:
        device: Which; a CPU is measured at small sizes.
        dtype: Of the matrices.
        repeats: Timed repetitions of each.
        rest_s: Seconds that the device idles before each; as for what is held against them.
        load_s: Seconds that each runs before it is timed; likewise.
    """
    on_gpu = torch.device(device).type == "cuda"
    num_bytes = COPY_BYTES if on_gpu else _CPU_COPY_BYTES
    width = MATRIX_WIDTH if on_gpu else _CPU_MATRIX_WIDTH
    given: dict[str, Any] = {
        "device": device, "repeats": repeats, "rest_s": rest_s, "load_s": load_s
    }  # fmt: skip
    copy = _copy_times(num_bytes, given)
    matrix = _matrix_times(width, dtype, given)
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / copy.median_ms * 1e3,
        matrix_flops_per_s=2 * width**3 / matrix.median_ms * 1e3,
        copy=copy,
        matrix=matrix,
    )


def _copy_times(num_bytes: int, given: dict[str, Any]) -> Repetitions:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=given["device"])
    target = torch.empty_like(source)
    return repeat(lambda: target.copy_(source), **given)


def _matrix_times(width: int, dtype: torch.dtype, given: dict[str, Any]) -> Repetitions:
    left, right = (torch.randn(width, width, device=given["device"], dtype=dtype) for _ in range(2))
    return repeat(lambda: left @ right, **given)
