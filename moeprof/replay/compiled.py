"""The one way this package compiles loops: on first use, for one signature, cached on disk.

Compiling takes far longer than most replays, so it is kept small: a loop is compiled when it is
first called, what loops share is compiled into them (`inlined`), and entry points that only C would
call are left out. Where the cache lies is for Numba to say: beside the package, or in the user's
cache folder where the package cannot be written to, or at ``NUMBA_CACHE_DIR``. A change to any
source of the package's parts that are compiled makes loops be compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import sigutils
from numba.core.compiler import Flags

_COMPILED_PARTS = ("replay", "live")
_DIGITS = 12

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(signature: str, *, allocates: bool = True) -> Callable[[Function], Function]:
    """Returns a decorator that compiles a loop for exactly one signature, on its first call.

    The loop gives up the GIL. Compiled loops call each other only through `inlined` helpers.

    Args:
        signature: Numba signature. Arrays have to be contiguous and writable.
        allocates: It may make arrays. Else nobody counts references to those that it is given,
            which takes most of a loop of microseconds; its helpers must not allocate either.
    """

    def decorate(function: Function) -> Function:
        lock = threading.Lock()
        loops: list[Callable[..., Any]] = []

        def made() -> Callable[..., Any]:
            with lock:
                if not loops:
                    loops.append(_compile(function, signature, allocates=allocates))
            return loops[0]

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            if not loops:
                made()
            return loops[0](*arguments)

        call.made = made  # type: ignore[attr-defined]
        return cast("Function", call)

    return decorate


def bare(loop: Function) -> Function:
    """Returns what a `compiled` loop calls, compiled now: for callers that count microseconds."""
    return cast("Function", loop.made())  # type: ignore[attr-defined]


def _compile(function: Callable[..., Any], signature: str, *, allocates: bool) -> Any:
    options: dict[str, Any] = {"nogil": True, "no_cfunc_wrapper": True}
    if not allocates:
        options["_nrt"] = False
    # Numba names the file by this, and looks at nothing but the loop's own source.
    function.__qualname__ += f"-{_sources()}"
    with _uncollected():
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:
            # Numba's answer where neither the package nor the user's cache folder is writable.
            return numba.njit(signature, **options)(function)


@functools.cache
def _sources() -> str:
    """Returns what changes whenever a source that may be compiled into a loop does.

    Helpers and constants of other modules are: a loop that was compiled with earlier ones would
    read and write where they were.
    """
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for part in _COMPILED_PARTS for path in (package / part).rglob("*.py"))
    facts = [(path.relative_to(package).as_posix(), path.stat()) for path in files]
    told = repr([(name, fact.st_size, fact.st_mtime_ns) for name, fact in facts])
    return hashlib.sha256(told.encode()).hexdigest()[:_DIGITS]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Stops the garbage collector: what a compiler builds stays, and is large to look through.

    Of threads that overlap, the one that stopped it starts it again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def inlined(signature: str, *, allocates: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator for what compiled loops call: one version, whatever integers come.

    `numba.njit` would compile a helper anew for every mix of int32 and int64 that callers have,
    each with entry points of its own that nobody uses. Python cannot call it.

    Args:
        signature: Numba signature; arguments are cast to it.
        allocates: It may make arrays. Else it is inlined however large it is, for loops that do
            not allocate: a call hands over seven words for every array.
    """
    arguments, result = sigutils.normalize_signature(signature)  # type: ignore[no-untyped-call]

    def decorate(function: Callable[..., Any]) -> Any:
        def type_of(typing_context: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Any, typed: Any, values: Any) -> Any:
                if allocates:
                    return context.compile_internal(builder, function, typed, values)
                flags: Any = cast("Any", Flags)()
                flags.forceinline = True
                made = context.compile_subroutine(builder, function, typed, flags=flags)
                return context.call_internal(builder, made.fndesc, typed, values)

            return result(*arguments), generate

        # Numba reads names and number of the arguments from the signature.
        context = inspect.signature(type_of).parameters["typing_context"]
        own = inspect.signature(function)
        functools.update_wrapper(type_of, function)
        type_of.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[context, *own.parameters.values()]
        )
        return numba.extending.intrinsic(type_of)

    return decorate


@inlined("int32[::1](int64, int32)")
def filled_int32(length, value):  # type: ignore[no-untyped-def]
    """Returns [length] int32; `numpy.full` takes far longer to compile."""
    found = np.empty(length, np.int32)
    for index in range(length):
        found[index] = value
    return found


@inlined("int64[::1](int64, int64)")
def filled_int64(length, value):  # type: ignore[no-untyped-def]
    """Returns [length] int64; `numpy.full` takes far longer to compile."""
    found = np.empty(length, np.int64)
    for index in range(length):
        found[index] = value
    return found
