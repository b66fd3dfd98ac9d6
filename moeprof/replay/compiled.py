"""The one way this package compiles loops: declared signatures, cached on disk, GIL released."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: str) -> Callable[[Function], Function]:
    """Returns a decorator that compiles a loop for exactly one signature.

    Args:
        signature: Numba signature. Arrays have to be contiguous and writable.
    """

    def decorate(function: Function) -> Function:
        try:
            loop = numba.njit(signature, cache=True, nogil=True)(function)
        except RuntimeError:
            # Numba's answer where neither the package nor the user's cache folder is writable.
            loop = numba.njit(signature, nogil=True)(function)
        return cast("Function", loop)

    return decorate
