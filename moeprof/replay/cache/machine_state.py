"""Machines of `policies` as arrays: what compiled loops know of a cache.

For the machines whose experts take one slot each. A cache is a row of int64 (`own`), a block of
int32 (`nodes`) and one of int64 (`wide`), laid out by the constants below. What they do in a lookup
stands in `sequential_machines` and `ghost_machines`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.cache import policies
from moeprof.replay.cache.policies import Machine
from moeprof.replay.compiled import inlined

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

# Lists that the first leaves, lists that the last leaves, then all others.
FIFO, LRU, LIFO, PAPER, STATIC, LFU, S3FIFO, ARC, RANDOM, MIN, MIN_BYPASS = range(11)

# A cache's row of int64. STATE: of `RANDOM` its random numbers, of `ARC` its target, a float64.
KIND, CAPACITY, NUM_KEYS, WIDTH, USED, STATE, CURSOR, NUM_FREE_BUCKETS = range(8)
SMALL_CAPACITY, MAIN_CAPACITY, GHOST_CAPACITY = 8, 9, 10
SMALL_USED, MAIN_USED, GHOSTS_USED, HAS_EVICTED = 11, 12, 13, 14
FIRST_USED, SECOND_USED, FIRST_GHOSTS, SECOND_GHOSTS = 11, 12, 13, 14
NUM_FIELDS = 15

# Its block of int32: arrays of WIDTH = keys + heads of lists. Of `MIN` and `MIN_BYPASS` the first
# lists the residents and the second says where each stands in it.
NUM_HEADS = 4
FOLLOWING, BEFORE, SLOT_OF, OF = range(4)
BUCKET_COUNT, BUCKET_END, FREE_BUCKETS = 4, 5, 6
NUM_ARRAYS = {LFU: 7}

# What `OF` holds. `S3FIFO`: lookups since a resident entered its queue, or one of the first two;
# `ARC`: one of the last five; `PAPER`: 1 for active experts, `STATIC`: for those that are kept;
# `LFU`: a bucket, which is all residents of one count.
ABSENT, GHOST = -1, -2
NOWHERE, T1, T2, B1, B2 = range(5)

# Its block of int64. `MIN`, `MIN_BYPASS`: arrays by key: next use, where it stands and where the
# key's uses end in the times behind them. `RANDOM`: residents as set bits.
NEXT_USE, USE, USES_END = range(3)

NOBODY = -1
FINDS = "int64(int64[::1], int32[::1], int64[::1], int64)"
"""Signature of what says who leaves, or `NOBODY`: own, nodes, wide and the key that missed."""

_KINDS: dict[type[Machine], int] = {
    policies.Fifo: FIFO,
    policies.Lifo: LIFO,
    policies.Paper: PAPER,
    policies.Lru: LRU,
    policies.Static: STATIC,
    policies.Lfu: LFU,
    policies.S3Fifo: S3FIFO,
    policies.Arc: ARC,
    policies.Random: RANDOM,
    policies.Min: MIN,
    policies.MinBypass: MIN_BYPASS,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class MachineState:
    """A machine as arrays.

    Attributes:
        own: [`NUM_FIELDS`] its numbers.
        nodes: [arrays * `WIDTH`] its block by key.
        wide: Its block of int64; of most kinds nothing.
    """

    own: Int64s
    nodes: Int32s
    wide: Int64s


def is_known(machine: Machine) -> bool:
    """Returns True for an empty machine that `state_of` makes arrays of."""
    if type(machine) not in _KINDS or machine.used or any(size != 1 for size in machine.sizes):
        return False
    # Python's machine cannot make room either where a set that does not fit is kept.
    return not isinstance(machine, policies.Static) or len(machine.kept) <= machine.capacity


def state_of(machine: Machine) -> MachineState:
    """Returns the arrays of an empty machine.

    Args:
        machine: One that `is_known`.
    """
    kind = _KINDS[type(machine)]
    num_keys = len(machine.sizes)
    width = num_keys + NUM_HEADS
    own = np.zeros(NUM_FIELDS, np.int64)
    own[[KIND, CAPACITY, NUM_KEYS, WIDTH]] = kind, machine.capacity, num_keys, width
    nodes = np.zeros((NUM_ARRAYS.get(kind, OF + 1), width), np.int32)
    nodes[FOLLOWING] = nodes[BEFORE] = np.arange(width)
    nodes[SLOT_OF] = NOBODY
    wide = np.zeros(0, np.int64)
    if isinstance(machine, policies.Static):
        nodes[OF, list(machine.kept)] = 1
    elif isinstance(machine, policies.S3Fifo):
        nodes[OF] = ABSENT
        own[SMALL_CAPACITY : GHOST_CAPACITY + 1] = policies.s3_shares(machine.capacity)
    elif isinstance(machine, policies.Lfu):
        nodes[FREE_BUCKETS] = np.arange(width)
        own[NUM_FREE_BUCKETS] = width
    elif isinstance(machine, policies.Random):
        own[STATE] = np.array(machine.state, np.uint64).view(np.int64)
        wide = np.zeros(num_keys // 64 + 1, np.int64)
    elif isinstance(machine, policies.Min):
        wide = _uses(machine, num_keys)
    return MachineState(own=own, nodes=nodes.reshape(-1), wide=wide)


def _uses(machine: policies.Min, num_keys: int) -> Int64s:
    """Returns [3 * keys + uses]: next use, place of it, end of the key's uses; then all uses."""
    uses = [machine.uses.get(key, ()) for key in range(num_keys)]
    ends = (USES_END + 1) * num_keys + np.cumsum([len(times) for times in uses], dtype=np.int64)
    first = [times[0] if times else policies.NEVER for times in uses]
    starts = ends - [len(times) for times in uses]
    every = [np.asarray(times, np.int64) for times in uses]
    return np.concatenate([first, starts, ends, *every]).astype(np.int64)


@inlined("void(int64[::1], int32[::1], int64)", allocates=False)
def unlink(own, nodes, node):  # type: ignore[no-untyped-def]
    """Takes a node out of its list."""
    width = own[WIDTH]
    after, previous = nodes[node], nodes[width + node]
    nodes[previous] = after
    nodes[width + after] = previous


@inlined("void(int64[::1], int32[::1], int64, int64)", allocates=False)
def link(own, nodes, place, node):  # type: ignore[no-untyped-def]
    """Puts a node behind another."""
    width = own[WIDTH]
    after = nodes[place]
    nodes[place] = node
    nodes[width + node] = place
    nodes[node] = after
    nodes[width + after] = node


@inlined("void(int64[::1], int32[::1], int64, int64)", allocates=False)
def append(own, nodes, head, node):  # type: ignore[no-untyped-def]
    """Puts a node at the end of the list of ``head``."""
    link(own, nodes, nodes[own[WIDTH] + head], node)
