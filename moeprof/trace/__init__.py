"""The trace format: schema, writer, reader, validator, synthetic traces.

Importing this package is cheap; pyarrow and pandas load with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.trace.blocks import Dispatch, RoutingBlock
    from moeprof.trace.foreign import import_trace
    from moeprof.trace.reader import Trace, open_trace
    from moeprof.trace.schema import SlotStatus, TraceInfo
    from moeprof.trace.synthetic import synthetic_trace
    from moeprof.trace.validator import CheckResult, Problem, check
    from moeprof.trace.writer import TraceWriter

_HOME = {
    "CheckResult": "validator",
    "Dispatch": "blocks",
    "Problem": "validator",
    "RoutingBlock": "blocks",
    "SlotStatus": "schema",
    "Trace": "reader",
    "TraceInfo": "schema",
    "TraceWriter": "writer",
    "check": "validator",
    "import_trace": "foreign",
    "open_trace": "reader",
    "synthetic_trace": "synthetic",
}

__all__ = [
    "CheckResult",
    "Dispatch",
    "Problem",
    "RoutingBlock",
    "SlotStatus",
    "Trace",
    "TraceInfo",
    "TraceWriter",
    "check",
    "import_trace",
    "open_trace",
    "synthetic_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
