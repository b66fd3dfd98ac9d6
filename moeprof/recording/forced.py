"""Which MoE sites compute with routing that is not their own choice, and where it comes from.

A recording made meanwhile must say so. Leaves out how a site is made to (`moeprof.live.forcing`).
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn

_SOURCES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def mark(modules: Iterable[nn.Module], source: str) -> None:
    """Notes that the sites watched at ``modules`` are driven by ``source``."""
    for module in modules:
        _SOURCES[module] = source


def unmark(modules: Iterable[nn.Module]) -> None:
    """Notes that the sites watched at ``modules`` choose for themselves again."""
    for module in modules:
        _SOURCES.pop(module, None)


def forced_source(modules: Iterable[nn.Module]) -> str | None:
    """Returns what drives the first of these sites that is driven; None where none is."""
    if not _SOURCES:
        return None
    found = (_SOURCES.get(module) for module in modules)
    return next((source for source in found if source is not None), None)
