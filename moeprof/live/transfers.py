"""Copies of experts from host memory into slots, ordered against the computations that read them.

On a GPU copies run on a stream of their own. Two events per slot order them: a copy into a slot
waits until the last computation that reads it has finished, and a computation waits until the copy
that it reads has arrived. Nothing waits on the host. Leaves out what is copied where (`residency`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from moeprof.live.device_copies import copy_to_device
from moeprof.live.expert_store import ALIGNMENT_BYTES, Bytes

_NUM_EVENTS = 256


def new_event() -> torch.cuda.Event:
    """Returns an event that keeps no time, the cheapest kind."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which a device is the current one.

    Triton launches on the current device, and the driver takes streams of its context only,
    wherever the tensors lie.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(device)


class Computations:
    """The computations of a buffer, in one order however the caller changes streams.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def begin(self) -> None:
        """Lets what follows on the current stream wait for all that was begun before."""
        if self._device.type != "cuda":
            return
        current = torch.cuda.current_stream(self._device)
        if self._stream is not None and current != self._stream:
            current.wait_stream(self._stream)
        self._stream = current

    def finish(self) -> None:
        """Waits on the host until all that was begun has finished."""
        if self._stream is not None:
            self._stream.synchronize()


class Transfers(Protocol):
    """Slots on a device and the copies into them.

    Attributes:
        is_blank: Nothing is copied, all else happens: a control that shows what else a run does.
    """

    is_blank: bool

    @property
    def slots(self) -> Sequence[Bytes]:
        """The slots."""

    def begin(self) -> None:
        """Called once per dispatch, before anything else."""

    def load(self, slot: int, block: Bytes) -> None:
        """Starts a copy that may overwrite the slot once its released readers have finished."""

    def await_load(self, slot: int) -> None:
        """Makes computations that follow wait for the copy into the slot."""

    def release(self, slot: int) -> None:
        """Says that the last computation so far is a reader of the slot."""

    def load_all(self, copies: Sequence[tuple[int, Bytes]], *, behind: Any = None) -> None:
        """Starts copies into slots whose readers have all finished, but for those of ``behind``.

        Args:
            copies: Slots and blocks.
            behind: A `mark` that the copies wait for.
        """

    def await_all(self, slots: Sequence[int]) -> None:
        """Makes computations that follow wait for the copies into slots."""

    def mark(self) -> Any:
        """Returns a mark behind the last computation so far."""

    def finish(self) -> None:
        """Waits on the host until every copy has arrived."""


class HostTransfers:
    """Slots in host memory: every copy is done when it is asked for.

    Args:
        slots: As `make_slots` returned them.
    """

    def __init__(self, slots: Sequence[Bytes]) -> None:
        self.slots = slots
        self.is_blank = False

    def begin(self) -> None:
        """Does nothing."""

    def load(self, slot: int, block: Bytes) -> None:
        """Copies."""
        if self.is_blank:
            return
        self.slots[slot][: block.numel()].copy_(block)

    def await_load(self, slot: int) -> None:
        """Does nothing: the copy is done."""

    def release(self, slot: int) -> None:
        """Does nothing: the computation is done."""

    def load_all(self, copies: Sequence[tuple[int, Bytes]], *, behind: Any = None) -> None:
        """Copies."""
        for slot, block in copies:
            self.load(slot, block)

    def await_all(self, slots: Sequence[int]) -> None:
        """Does nothing: the copies are done."""

    def mark(self) -> None:
        """Does nothing: the computation is done."""

    def finish(self) -> None:
        """Does nothing."""


class CudaTransfers:
    """Slots on a GPU, filled on a stream of their own.

    Args:
        slots: As `make_slots` returned them.
    """

    def __init__(self, slots: Sequence[Bytes]) -> None:
        self.slots = slots
        self.is_blank = False
        device = slots[0].device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream = self._copies.cuda_stream
        self._addresses = [slot.data_ptr() for slot in slots]
        self._slot_bytes = [slot.numel() for slot in slots]
        self._arrived = [new_event() for _ in slots]
        self._read = [new_event() for _ in slots]
        self._is_read = [False] * len(slots)
        # The event that says that the copy into a slot has arrived, until a reader has waited.
        self._pending: dict[int, torch.cuda.Event] = {}
        # Apart: an arrival that nobody has waited for must not become a mark of the other stream.
        self._arrivals = itertools.cycle([new_event() for _ in range(_NUM_EVENTS)])
        self._marks = itertools.cycle([new_event() for _ in range(_NUM_EVENTS)])
        # The slots' memory may have been somebody else's on the stream that made them.
        torch.cuda.synchronize(device)
        self._compute = torch.cuda.current_stream(device)

    def begin(self) -> None:
        """Keeps the order of computations where the caller has changed streams."""
        current = torch.cuda.current_stream(self.slots[0].device)
        if current != self._compute:
            current.wait_stream(self._compute)
            self._compute = current

    def load(self, slot: int, block: Bytes) -> None:
        """Starts the copy."""
        if self._is_read[slot]:
            self._copies.wait_event(self._read[slot])
            self._is_read[slot] = False
        self._copy(slot, block)
        self._arrived[slot].record(self._copies)
        self._pending[slot] = self._arrived[slot]

    def _copy(self, slot: int, block: Bytes) -> None:
        num_bytes = block.numel()
        assert num_bytes <= self._slot_bytes[slot]
        if self.is_blank:
            return
        copy_to_device(self._addresses[slot], block.data_ptr(), num_bytes, self._stream)

    def await_load(self, slot: int) -> None:
        """Lets the computing stream wait."""
        arrived = self._pending.pop(slot, None)
        if arrived is not None:
            self._compute.wait_event(arrived)

    def release(self, slot: int) -> None:
        """Marks the computing stream."""
        self._read[slot].record(self._compute)
        self._is_read[slot] = True

    def load_all(self, copies: Sequence[tuple[int, Bytes]], *, behind: Any = None) -> None:
        """Starts copies, with one event for all of them."""
        if not copies:
            return
        if behind is not None:
            self._copies.wait_event(behind)
        for slot, block in copies:
            self._copy(slot, block)
        # An event may be in use still: waiting for its later record is waiting too long, no more.
        arrived = next(self._arrivals)
        arrived.record(self._copies)
        for slot, _ in copies:
            self._pending[slot] = arrived
            self._is_read[slot] = False

    def await_all(self, slots: Sequence[int]) -> None:
        """Lets the computing stream wait, once per event."""
        found = [self._pending.pop(slot, None) for slot in slots]
        for arrived in {id(one): one for one in found if one is not None}.values():
            self._compute.wait_event(arrived)

    def mark(self) -> torch.cuda.Event:
        """Marks the computing stream."""
        marked = next(self._marks)
        marked.record(self._compute)
        return marked

    def finish(self) -> None:
        """Waits for the stream of copies."""
        self._copies.synchronize()


def make_slots(
    counts: Sequence[int], slot_bytes: Sequence[int], device: torch.device
) -> tuple[list[Bytes], list[torch.Tensor]]:
    """Returns (all slots, pool after pool; the memory of each pool).

    Args:
        counts: Slots of each pool.
        slot_bytes: Bytes of a slot of each pool; multiples of the alignment.
        device: Where.
    """
    slots: list[Bytes] = []
    pools = []
    with torch.inference_mode(False):
        for count, size in zip(counts, slot_bytes, strict=True):
            assert size % ALIGNMENT_BYTES == 0
            pool = torch.zeros(count * size, dtype=torch.uint8, device=device)
            pools.append(pool)
            slots += [pool[index * size : (index + 1) * size] for index in range(count)]
    return slots, pools


def open_transfers(slots: Sequence[Bytes]) -> Transfers:
    """Returns the transfers that suit the slots' device."""
    return CudaTransfers(slots) if slots[0].device.type == "cuda" else HostTransfers(slots)
