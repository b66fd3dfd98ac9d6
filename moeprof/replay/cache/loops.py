"""What the compiled loops share: compilation on first use, linked lists, heaps, set bits."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir  # type: ignore[import-untyped]

from moeprof.replay.compiled import compiled

Function = TypeVar("Function", bound=Callable[..., Any])


def lazily_compiled(signature: str) -> Callable[[Function], Function]:
    """Returns a decorator like `compiled` that waits for the first call.

    There are many policies, most runs use few of them, and each takes about two seconds to compile
    where no cache is there yet.

    Args:
        signature: Numba signature.
    """

    def decorate(function: Function) -> Function:
        lock = threading.Lock()
        loops: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            if not loops:
                with lock:
                    if not loops:
                        loops.append(compiled(signature)(function))
            return loops[0](*arguments)

        return cast("Function", call)

    return decorate


@numba.njit
def unlink(following, before, node):  # type: ignore[no-untyped-def]
    """Takes a node out of its list."""
    after, previous = following[node], before[node]
    following[previous] = after
    before[after] = previous


@numba.njit
def append(following, before, head, node):  # type: ignore[no-untyped-def]
    """Puts a node at the end of the list of ``head``."""
    previous = before[head]
    following[previous] = node
    before[node] = previous
    following[node] = head
    before[head] = node


@numba.njit
def push(heap, length, item):  # type: ignore[no-untyped-def]
    """Adds an item to a heap whose largest is on top; returns its length."""
    child = length
    while child > 0:
        parent = (child - 1) >> 1
        if heap[parent] >= item:
            break
        heap[child] = heap[parent]
        child = parent
    heap[child] = item
    return length + 1


@numba.njit
def pop(heap, length):  # type: ignore[no-untyped-def]
    """Removes the top of a heap; returns its length."""
    length -= 1
    item = heap[length]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= length:
            break
        if child + 1 < length and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= item:
            break
        heap[parent] = heap[child]
        parent = child
    heap[parent] = item
    return length


def _popcount(typing_context: Any, value: Any) -> Any:
    """Returns the number of set bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return value(value), generate


popcount: Any = numba.extending.intrinsic(_popcount)


def _leading_zeros(typing_context: Any, value: Any) -> Any:
    """Returns the number of zeros above the highest set bit; the number must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return value(value), generate


leading_zeros: Any = numba.extending.intrinsic(_leading_zeros)
