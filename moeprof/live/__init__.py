"""The same techniques executed on a device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.live.application import AppliedGating, apply_gating
    from moeprof.live.buffer_settings import BufferSettings
    from moeprof.live.buffered_models import buffer_experts
    from moeprof.live.calibration import calibrate, pooled, refitted
    from moeprof.live.calibration_sizes import CPU_SIZES, GPU_SIZES, CalibrationSizes
    from moeprof.live.exchange_times import exchange_curve
    from moeprof.live.expert_buffer import ExpertBuffer
    from moeprof.live.expert_parallel import ParallelExperts, experts_of_rank
    from moeprof.live.experts import ExpertWeights, random_experts
    from moeprof.live.forcing import ForcedRouting, force_routing
    from moeprof.live.parallel_clocks import PartClock
    from moeprof.live.parallel_estimates import estimated_step
    from moeprof.live.parallel_traces import PlannerSetting, site_dispatches
    from moeprof.live.rank_processes import run_ranks
    from moeprof.live.routing_controls import (
        RoutingShape,
        rebatched_routing,
        skewed_routing,
        staggered_routing,
        uniform_routing,
    )
    from moeprof.live.routing_schedules import DeviceRouting, RoutingBuffers, routing_of
    from moeprof.live.routing_sources import Routing, RoutingSource, read_routing
    from moeprof.live.stacking import stack_experts
    from moeprof.live.verification import verify
    from moeprof.live.verification_options import VerifyOptions

__all__ = [
    "CPU_SIZES",
    "GPU_SIZES",
    "AppliedGating",
    "BufferSettings",
    "CalibrationSizes",
    "DeviceRouting",
    "ExpertBuffer",
    "ExpertWeights",
    "ForcedRouting",
    "ParallelExperts",
    "PartClock",
    "PlannerSetting",
    "Routing",
    "RoutingBuffers",
    "RoutingShape",
    "RoutingSource",
    "VerifyOptions",
    "apply_gating",
    "buffer_experts",
    "calibrate",
    "estimated_step",
    "exchange_curve",
    "experts_of_rank",
    "force_routing",
    "pooled",
    "random_experts",
    "read_routing",
    "rebatched_routing",
    "refitted",
    "routing_of",
    "run_ranks",
    "site_dispatches",
    "skewed_routing",
    "stack_experts",
    "staggered_routing",
    "uniform_routing",
    "verify",
]

_HOMES = {
    "CPU_SIZES": "calibration_sizes",
    "GPU_SIZES": "calibration_sizes",
    "AppliedGating": "application",
    "BufferSettings": "buffer_settings",
    "CalibrationSizes": "calibration_sizes",
    "DeviceRouting": "routing_schedules",
    "ExpertBuffer": "expert_buffer",
    "ExpertWeights": "experts",
    "ForcedRouting": "forcing",
    "ParallelExperts": "expert_parallel",
    "PartClock": "parallel_clocks",
    "PlannerSetting": "parallel_traces",
    "Routing": "routing_sources",
    "RoutingBuffers": "routing_schedules",
    "RoutingShape": "routing_controls",
    "RoutingSource": "routing_sources",
    "VerifyOptions": "verification_options",
    "apply_gating": "application",
    "buffer_experts": "buffered_models",
    "calibrate": "calibration",
    "estimated_step": "parallel_estimates",
    "exchange_curve": "exchange_times",
    "experts_of_rank": "expert_parallel",
    "force_routing": "forcing",
    "random_experts": "experts",
    "read_routing": "routing_sources",
    "rebatched_routing": "routing_controls",
    "pooled": "calibration",
    "refitted": "calibration",
    "routing_of": "routing_schedules",
    "run_ranks": "rank_processes",
    "site_dispatches": "parallel_traces",
    "skewed_routing": "routing_controls",
    "stack_experts": "stacking",
    "staggered_routing": "routing_controls",
    "uniform_routing": "routing_controls",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used; torch is needed only then."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from moeprof.errors import MissingExtraError

        raise MissingExtraError("torch", extra="record", purpose="running techniques") from error
    return getattr(module, name)
