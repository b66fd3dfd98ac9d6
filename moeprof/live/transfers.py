"""Copies of experts from host memory into slots, ordered against the computations that read them.

On a GPU copies run on a stream of their own. Events order them: a copy into a slot waits until the
last computation that reads it has finished, and a computation waits until the copy that it reads
has arrived. A slot has two events of its own for experts that run one by one; pieces of a dispatch
take theirs from two rings. Nothing waits on the host. Leaves out what is copied where
(`residency`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from moeprof.live.device_copies import copy_to_device, wait_for_event
from moeprof.live.direct_dispatch import DirectSlots
from moeprof.live.expert_store import ALIGNMENT_BYTES, Bytes
from moeprof.live.spare_events import SpareEvents

_NUM_EVENTS = 256
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()
_SPARE_EVENTS: dict[str, SpareEvents] = {}


def new_event() -> torch.cuda.Event:
    """Returns an event that keeps no time, the cheapest kind."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def with_index(device: torch.device) -> torch.device:
    """Returns a device that stays the same one, whichever is the current one later."""
    if device.type == "cuda":
        return torch.device(device.type, _index_of(device))
    # Tensors on "cpu:0" say that they lie on "cpu".
    return torch.device("cpu") if device.type == "cpu" else device


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which a device is the current one.

    Triton launches on the current device, and the driver takes streams of its context only,
    wherever the tensors lie.
    """
    if device.type != "cuda" or _index_of(device) == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)


def _index_of(device: torch.device) -> int:
    """Returns the index of a CUDA device; that of the current one where it has none."""
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


def current_handle(device: torch.device) -> int:
    """Returns the handle of the current stream of a CUDA device.

    `torch.cuda.current_stream` makes an object for it, which takes ten times as long.
    """
    return int(torch._C._cuda_getCurrentRawStream(_index_of(device)))


def _spare_events(device: torch.device) -> SpareEvents:
    """Returns the events of a device that nobody uses."""

    def made() -> torch.cuda.Event:
        event = new_event()
        # The driver knows an event once it was recorded.
        event.record(torch.cuda.current_stream(device))
        return event

    return _SPARE_EVENTS.setdefault(str(device), SpareEvents(made))


class Computations:
    """The computations of a buffer, in one order however the caller changes streams.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._handle = 0

    def begin(self) -> int:
        """Lets what follows on the current stream wait for all that was begun before.

        Returns:
            Handle of the current stream; 0 without streams.
        """
        if not self._is_cuda:
            return 0
        handle = current_handle(self._device)
        if self._stream is None or handle != self._handle:
            current = torch.cuda.current_stream(self._device)
            if self._stream is not None:
                current.wait_stream(self._stream)
            self._stream, self._handle = current, handle
        return handle

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

    @property
    def direct(self) -> DirectSlots | None:
        """The slots as compiled code uses them, or None."""

    @property
    def stream(self) -> int:
        """Handle of the stream of copies; 0 where there is none."""

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

    def let_go(self) -> None:
        """Gives back what others can use, once all that was asked for has finished."""


class HostTransfers:
    """Slots in host memory: every copy is done when it is asked for.

    Args:
        slots: As `make_slots` returned them.
    """

    direct = None
    stream = 0

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

    def let_go(self) -> None:
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
        self.stream = self._copies.cuda_stream
        self._slot_bytes = [slot.numel() for slot in slots]
        self._spare = _spare_events(device)
        self._arrived = self._spare.take(len(slots))
        self._read = self._spare.take(len(slots))
        # Apart: an arrival that nobody has waited for must not become a mark of the other stream.
        self._arrivals, self._marks = (self._spare.take(_NUM_EVENTS) for _ in range(2))
        self.direct = DirectSlots(
            address=np.array([slot.data_ptr() for slot in slots], np.int64),
            offset=np.array([slot.storage_offset() // ALIGNMENT_BYTES for slot in slots], np.int32),
            pending=np.zeros(len(slots), np.int64),
            is_read=np.zeros(len(slots), np.uint8),
            arrivals=np.array([each.cuda_event for each in self._arrivals], np.int64),
            marks=np.array([each.cuda_event for each in self._marks], np.int64),
            turns=np.zeros(3, np.int64),
        )
        # The slots' memory may have been somebody else's on the stream that made them.
        torch.cuda.synchronize(device)
        self._compute = torch.cuda.current_stream(device)

    def let_go(self) -> None:
        """Gives the events back."""
        self._spare.give_back([*self._arrived, *self._read, *self._arrivals, *self._marks])
        self._arrived, self._read, self._arrivals, self._marks = [], [], [], []

    def _next_event(self, events: Sequence[torch.cuda.Event], turn: int) -> torch.cuda.Event:
        turns = self.direct.turns
        event: torch.cuda.Event = events[int(turns[turn])]
        turns[turn] = (turns[turn] + 1) % len(events)
        return event

    def begin(self) -> None:
        """Keeps the order of computations where the caller has changed streams."""
        current = torch.cuda.current_stream(self.slots[0].device)
        if current != self._compute:
            current.wait_stream(self._compute)
            self._compute = current

    def load(self, slot: int, block: Bytes) -> None:
        """Starts the copy."""
        if self.direct.is_read[slot]:
            self._copies.wait_event(self._read[slot])
            self.direct.is_read[slot] = 0
        self._copy(slot, block)
        self._arrived[slot].record(self._copies)
        self.direct.pending[slot] = self._arrived[slot].cuda_event

    def _copy(self, slot: int, block: Bytes) -> None:
        num_bytes = block.numel()
        assert num_bytes <= self._slot_bytes[slot]
        if self.is_blank:
            return
        copy_to_device(int(self.direct.address[slot]), block.data_ptr(), num_bytes, self.stream)

    def await_load(self, slot: int) -> None:
        """Lets the computing stream wait."""
        self.await_all([slot])

    def release(self, slot: int) -> None:
        """Marks the computing stream."""
        self._read[slot].record(self._compute)
        self.direct.is_read[slot] = 1

    def load_all(self, copies: Sequence[tuple[int, Bytes]], *, behind: Any = None) -> None:
        """Starts copies, with one event for all of them."""
        if not copies:
            return
        if behind is not None:
            self._copies.wait_event(behind)
        for slot, block in copies:
            self._copy(slot, block)
        # An event may be in use still: waiting for its later record is waiting too long, no more.
        arrived = self._next_event(self._arrivals, 0)
        arrived.record(self._copies)
        for slot, _ in copies:
            self.direct.pending[slot] = arrived.cuda_event
            self.direct.is_read[slot] = 0

    def await_all(self, slots: Sequence[int]) -> None:
        """Lets the computing stream wait, once per event."""
        pending = self.direct.pending
        for event in {int(pending[slot]) for slot in slots} - {0}:
            wait_for_event(self._compute.cuda_stream, event)
        pending[list(slots)] = 0

    def mark(self) -> torch.cuda.Event:
        """Marks the computing stream."""
        marked = self._next_event(self._marks, 1)
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
            slots += pool.view(count, size).unbind(0)
    return slots, pools


def open_transfers(slots: Sequence[Bytes]) -> Transfers:
    """Returns the transfers that suit the slots' device."""
    return CudaTransfers(slots) if slots[0].device.type == "cuda" else HostTransfers(slots)
