"""What the compiled loops share: linked lists, heaps, set bits."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]

from moeprof.replay.compiled import inlined


@inlined("void(int32[::1], int32[::1], int64)")
def unlink(following, before, node):  # type: ignore[no-untyped-def]
    """Takes a node out of its list."""
    after, previous = following[node], before[node]
    following[previous] = after
    before[after] = previous


@inlined("void(int32[::1], int32[::1], int64, int64)")
def append(following, before, head, node):  # type: ignore[no-untyped-def]
    """Puts a node at the end of the list of ``head``."""
    previous = before[head]
    following[previous] = node
    before[node] = previous
    following[node] = head
    before[head] = node


@inlined("int64(int64[::1], int64, int64)")
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


@inlined("int64(int64[::1], int64)")
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
