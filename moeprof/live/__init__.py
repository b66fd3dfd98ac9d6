"""The same techniques executed on a device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.live.experts import ExpertWeights, random_experts

__all__ = ["ExpertWeights", "random_experts"]

_HOMES = {
    "ExpertWeights": "experts",
    "random_experts": "experts",
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
