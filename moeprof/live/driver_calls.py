"""Functions of the CUDA driver as compiled loops call them: by address, without Python.

A dispatch of an expert buffer asks for a dozen things. From Python each takes microseconds, twice
as many on a slow host, and the device waits meanwhile. Compiled loops take the addresses as plain
numbers: nothing about a machine is compiled in, so that what is cached on disk stays good.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numpy.typing import NDArray

from moeprof.live.device_copies import opened_driver

COPY_TO_DEVICE, RECORD, WAIT, LAUNCH, QUERY = range(5)
"""Places of functions in what `driver_functions` returns."""

FUNCTIONS = (
    "cuMemcpyHtoDAsync_v2",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuLaunchKernelEx",
    "cuStreamQuery",
)
NOT_READY = 600
"""What the driver answers where a stream still has work."""


@functools.cache
def driver_functions() -> NDArray[np.int64]:
    """Returns the addresses of `FUNCTIONS`.

    Raises:
        MoeprofError: The driver cannot be opened.
    """
    library = opened_driver()
    found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS]
    return np.array(found, np.int64)


def _calling(num_arguments: int) -> Callable[..., Any]:
    """Returns what calls a C function of so many numbers or pointers, which returns an int."""

    def type_of(typing_context: Any, address: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.IntType(32), [word] * num_arguments)
            function = builder.inttoptr(values[0], kind.as_pointer())
            return builder.call(function, values[1:])

        return numba.int32(*[numba.int64] * (1 + num_arguments)), generate

    return type_of


def _call_1(typing_context: Any, address: Any, first: Any) -> Any:
    """Calls a function of one argument."""
    return _calling(1)(typing_context, address, first)


def _call_2(typing_context: Any, address: Any, first: Any, second: Any) -> Any:
    """Calls a function of two arguments."""
    return _calling(2)(typing_context, address, first, second)


def _call_3(typing_context: Any, address: Any, first: Any, second: Any, third: Any) -> Any:
    """Calls a function of three arguments."""
    return _calling(3)(typing_context, address, first, second, third)


def _call_4(
    typing_context: Any, address: Any, first: Any, second: Any, third: Any, fourth: Any
) -> Any:
    """Calls a function of four arguments."""
    return _calling(4)(typing_context, address, first, second, third, fourth)


def _loaded(typing_context: Any, address: Any) -> Any:
    """Reads 64 bits that another processor writes: really, each time."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return numba.int64(numba.int64), generate


call_1: Any = numba.extending.intrinsic(_call_1)
call_2: Any = numba.extending.intrinsic(_call_2)
call_3: Any = numba.extending.intrinsic(_call_3)
call_4: Any = numba.extending.intrinsic(_call_4)
loaded: Any = numba.extending.intrinsic(_loaded)
