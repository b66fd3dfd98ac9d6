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
    from moeprof.replay.composition import compose
    from moeprof.replay.domains import transfer
    from moeprof.replay.flips import agreement
    from moeprof.replay.footprint import memory
    from moeprof.replay.gates import gating
    from moeprof.replay.result import Finding, Metric, Result
    from moeprof.replay.reuse import locality
    from moeprof.replay.usage import activation
    from moeprof.replay.working_set import batching

__all__ = [
    "BufferingResult",
    "Finding",
    "Metric",
    "Result",
    "activation",
    "agreement",
    "balancing",
    "batching",
    "buffering",
    "compose",
    "gating",
    "latency",
    "locality",
    "memory",
    "transfer",
]

_HOMES = {
    "BufferingResult": "cache.study",
    "Finding": "result",
    "Metric": "result",
    "Result": "result",
    "activation": "usage",
    "agreement": "flips",
    "balancing": "balance",
    "batching": "working_set",
    "buffering": "cache.study",
    "compose": "composition",
    "gating": "gates",
    "latency": "breakdown",
    "locality": "reuse",
    "memory": "footprint",
    "transfer": "domains",
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
