"""The built-in trained models, and loading of any other model by folder or hub id.

Leaves out recording. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprof.zoo.batching import Batch, batches
    from moeprof.zoo.catalog import BUILTINS, BuiltinModel, builtin
    from moeprof.zoo.dispatch import fix_nllb_dispatch, needs_nllb_dispatch_fix
    from moeprof.zoo.loader import LoadedModel, load
    from moeprof.zoo.prompts import Prompt, read_prompts

__all__ = [
    "BUILTINS",
    "Batch",
    "BuiltinModel",
    "LoadedModel",
    "Prompt",
    "batches",
    "builtin",
    "fix_nllb_dispatch",
    "load",
    "needs_nllb_dispatch_fix",
    "read_prompts",
]

_HOMES = {
    "BUILTINS": "catalog",
    "Batch": "batching",
    "BuiltinModel": "catalog",
    "LoadedModel": "loader",
    "Prompt": "prompts",
    "batches": "batching",
    "builtin": "catalog",
    "fix_nllb_dispatch": "dispatch",
    "load": "loader",
    "needs_nllb_dispatch_fix": "dispatch",
    "read_prompts": "prompts",
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
