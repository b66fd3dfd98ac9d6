"""Pure functions from a trace to a Result; no torch, no terminal, no plots.

Each analysis is imported on first use: its loops are compiled then, and only then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.replay.balance import balancing
    from moeprof.replay.breakdown import latency
    from moeprof.replay.cache.study import BufferingResult, buffering
    from moeprof.replay.calibration_file import Calibration, read_calibration, write_calibration
    from moeprof.replay.composition import compose
    from moeprof.replay.cost_model import cost
    from moeprof.replay.domains import transfer
    from moeprof.replay.expert_shapes import ExpertShape
    from moeprof.replay.flips import agreement
    from moeprof.replay.footprint import memory
    from moeprof.replay.gates import gating
    from moeprof.replay.result import Finding, Metric, Result
    from moeprof.replay.reuse import locality
    from moeprof.replay.serving_settings import BufferingSetting, GatingSetting, parse_setting
    from moeprof.replay.usage import activation
    from moeprof.replay.working_set import batching

__all__ = [
    "BufferingResult",
    "BufferingSetting",
    "Calibration",
    "ExpertShape",
    "Finding",
    "GatingSetting",
    "Metric",
    "Result",
    "activation",
    "agreement",
    "balancing",
    "batching",
    "buffering",
    "compose",
    "cost",
    "gating",
    "latency",
    "locality",
    "memory",
    "parse_setting",
    "read_calibration",
    "transfer",
    "write_calibration",
]

_HOMES = {
    "BufferingResult": "cache.study",
    "BufferingSetting": "serving_settings",
    "Calibration": "calibration_file",
    "ExpertShape": "expert_shapes",
    "Finding": "result",
    "GatingSetting": "serving_settings",
    "Metric": "result",
    "Result": "result",
    "activation": "usage",
    "agreement": "flips",
    "balancing": "balance",
    "batching": "working_set",
    "buffering": "cache.study",
    "compose": "composition",
    "cost": "cost_model",
    "gating": "gates",
    "latency": "breakdown",
    "locality": "reuse",
    "memory": "footprint",
    "parse_setting": "serving_settings",
    "read_calibration": "calibration_file",
    "transfer": "domains",
    "write_calibration": "calibration_file",
}


def __getattr__(name: str) -> Any:
    """Returns the public object called ``name``, importing its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
