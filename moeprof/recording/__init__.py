"""Instrumentation: discovery of MoE sites, adapters, timing, memory, devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.recording.recorder import Recorder, RecorderOptions, record
    from moeprof.recording.sites import register
    from moeprof.recording.tokens import RequestLabel

__all__ = ["Recorder", "RecorderOptions", "RequestLabel", "record", "register"]

_HOMES = {
    "Recorder": "recorder",
    "RecorderOptions": "recorder",
    "RequestLabel": "tokens",
    "record": "recorder",
    "register": "sites",
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

        raise MissingExtraError("torch", extra="record", purpose="recording") from error
    return getattr(module, name)
