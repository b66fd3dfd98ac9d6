"""Measures gating kernels over tokens and active experts, and fits their parts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from moeprof.live.bench import Bench
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.grouping import can_group
from moeprof.live.kernels import KERNELS
from moeprof.live.kernels.fused import can_fuse
from moeprof.live.setting_runs import gating_layer
from moeprof.replay.calibration_file import Calibration, GatingTimes
from moeprof.replay.expert_shapes import ExpertShape
from moeprof.replay.gating_work import Dispatches, device_columns, kernel_work
from moeprof.replay.least_squares import fit_parts
from moeprof.replay.serving_settings import STATIC_KERNELS

_ACTIVE_SHARES = (0.25, 1.0)


@dataclass(frozen=True, kw_only=True)
class _KernelPoint:
    """A gating kernel at one size."""

    columns: tuple[float, ...]
    active: float
    device_s: float
    host_s: float


class KernelBench(Bench):
    """Measures gating kernels on one device."""

    def of_kernel(self, name: str, machine: Calibration) -> GatingTimes:
        """Measures a gating kernel over tokens and active experts, and fits its parts."""
        found = [self._kernel_points(name, size, machine) for size in self.sizes.expert_bytes]
        points = [point for of_size, _ in found for point in of_size]
        waits = any(each for _, each in found)
        fit = fit_parts(
            np.array([point.columns for point in points]),
            np.array([point.device_s for point in points]),
        )
        host = np.zeros(2)
        if not waits and not self.times.is_serial:
            host = fit_parts(
                np.array([[1.0, point.active] for point in points]),
                np.array([point.host_s for point in points]),
            ).factors
        return GatingTimes(
            host_dispatch_s=float(host[0]),
            host_expert_s=float(host[1]),
            device_dispatch_s=float(fit.factors[0]),
            device_expert_s=float(fit.factors[1]),
            weight_factor=float(fit.factors[2]),
            flops_factor=float(fit.factors[3]),
            moved_factor=float(fit.factors[4]),
            waits=waits and not self.times.is_serial,
            error=fit.error,
        )

    def _kernel_points(
        self, name: str, size: int, machine: Calibration
    ) -> tuple[list[_KernelPoint], bool]:
        """Returns times at one size of experts, and whether the host waits in them."""
        sizes, times = self.sizes, self.times
        shape = sizes.shape(size)
        experts = _stacked(shape, sizes.num_experts, self.device)
        kernel = KERNELS[name]
        hidden = self.rows(max(sizes.tokens), width=shape.d_model)
        waits = _waits(name, hidden, experts)
        found = []
        for tokens, share in itertools.product(sizes.tokens, _ACTIVE_SHARES):
            used = max(sizes.top_k, round(share * sizes.num_experts))
            flat = torch.arange(tokens * sizes.top_k, device=self.device) % used
            ids = flat.view(tokens, sizes.top_k)
            gates = torch.full(ids.shape, 1 / sizes.top_k, dtype=self.dtype, device=self.device)

            def layer(
                rows: torch.Tensor = hidden[:tokens],
                ids: torch.Tensor = ids,
                gates: torch.Tensor = gates,
            ) -> torch.Tensor:
                return gating_layer(kernel, rows, ids, gates, experts)

            numbers = {
                "num_tokens": tokens,
                "top_k": sizes.top_k,
                "active": min(used, flat.numel()),
                "executed": flat.numel(),
                "num_experts": sizes.num_experts,
            }
            given = Dispatches(**{key: np.array([float(n)]) for key, n in numbers.items()})
            work = kernel_work(name, given, shape)
            found.append(
                _KernelPoint(
                    columns=tuple(device_columns(work, given.active, machine)[0].tolist()),
                    active=float(given.active[0]),
                    device_s=(times.wall(layer) if waits else times.device_part(layer)).median,
                    host_s=times.host(layer).median,
                )
            )
        return found, waits


def _waits(name: str, hidden: torch.Tensor, experts: ExpertWeights) -> bool:
    """Returns True where the host waits for the device in a kernel (itself, or its fallback)."""
    if name in STATIC_KERNELS or (name == "dynamic" and can_fuse(hidden, experts)):
        return False
    return name == "dynamic_loop" or not can_group(experts.w_in, hidden)


def _stacked(shape: ExpertShape, count: int, device: torch.device) -> ExpertWeights:
    return random_experts(
        num_experts=count,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        gated=shape.gated,
        device=device,
        dtype=getattr(torch, shape.dtype),
        activation="silu" if shape.gated else "relu",
    )
