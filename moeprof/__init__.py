"""Characterize Mixture-of-Experts inference: record, replay, report.

Importing this package imports nothing heavy: every public name is loaded on first use. It leaves
out the command line, which is `moeprof.cli`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof import replay, zoo
    from moeprof.errors import MoeprofError
    from moeprof.recording import record, register
    from moeprof.reporting import report
    from moeprof.trace.reader import open_trace as open
    from moeprof.trace.validator import check

__version__ = "0.1.0"

__all__ = [
    "MoeprofError",
    "__version__",
    "check",
    "open",
    "record",
    "register",
    "replay",
    "report",
    "zoo",
]

_HOMES = {
    "MoeprofError": "moeprof.errors:MoeprofError",
    "check": "moeprof.trace.validator:check",
    "open": "moeprof.trace.reader:open_trace",
    "record": "moeprof.recording:record",
    "register": "moeprof.recording:register",
    "replay": "moeprof.replay",
    "report": "moeprof.reporting:report",
    "zoo": "moeprof.zoo",
}


def __getattr__(name: str) -> Any:
    """Returns the public object called ``name``, importing its module on first use."""
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    module_name, _, attribute = home.partition(":")
    module = importlib.import_module(module_name)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names."""
    return sorted(__all__)
