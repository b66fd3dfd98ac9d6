"""Lets kernels of other packages choose their tiles for the size that is timed.

Triton's autotuner times its tiles at the first call with a key and keeps the fastest for good. A
key need not have the number of tokens: moe-ops' grouped GEMM has the number of experts alone, and
what it chose for one token is slow for 16,384.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import ModuleType
from typing import Any


def forget_tuning(packages: Collection[str]) -> int:
    """Makes the Triton autotuners of packages choose anew at their next call.

    Args:
        packages: Names of top-level packages; those that are not imported have chosen nothing.

    Returns:
        How many autotuners had chosen something.
    """
    found: dict[int, dict[Any, Any]] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in packages or not isinstance(module, ModuleType):
            continue
        for value in list(vars(module).values()):
            # By name: Triton may be absent, and packages have objects that no attribute may be
            # asked of.
            if type(value).__name__ == "Autotuner" and value.cache:
                found[id(value)] = value.cache
    for chosen in found.values():
        chosen.clear()
    return len(found)
