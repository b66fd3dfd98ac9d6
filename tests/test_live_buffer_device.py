"""What a GPU would be told: streams, events and page locks, on stand-ins that note every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.live import expert_store, transfers  # noqa: E402
from moeprof.live.experts import random_experts  # noqa: E402


class Device:
    """Streams run their work in order, as late as events allow; nothing runs before it is asked."""

    def __init__(self) -> None:
        self.now: Stream = Stream(self)
        self.log: list[str] = []

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Event:
    def __init__(self) -> None:
        self.recorded: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = (stream, len(stream.work))

    def reach(self) -> None:
        if self.recorded is not None:
            stream, position = self.recorded
            stream.run(position)


class Stream:
    def __init__(self, device: Any) -> None:
        self.work: list[Any] = []
        self.done = 0
        self.cuda_stream = self

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def wait_event(self, event: Event) -> None:
        recorded = event.recorded
        if recorded is not None:
            self.work.append(lambda: recorded[0].run(recorded[1]))

    def wait_stream(self, other: Stream) -> None:
        position = len(other.work)
        self.work.append(lambda: other.run(position))

    def synchronize(self) -> None:
        self.run(len(self.work))


class LazySlot:
    """A slot that copies reach when their stream runs."""

    def __init__(self) -> None:
        self.held = ""
        self.device = "cuda:0"

    def data_ptr(self) -> LazySlot:
        return self

    def numel(self) -> int:
        return 1


class Block:
    def __init__(self, name: str) -> None:
        self.name = name

    def data_ptr(self) -> str:
        return self.name

    def numel(self) -> int:
        return 1


def copy_to_device(slot: LazySlot, name: str, num_bytes: int, stream: Stream) -> None:
    def run() -> None:
        slot.held = name

    assert num_bytes == 1
    stream.work.append(run)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", made.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(transfers, "copy_to_device", copy_to_device)
    return made


def test_computations_find_what_they_wait_for(device: Device) -> None:
    slots: Any = [LazySlot(), LazySlot()]
    moved = transfers.CudaTransfers(slots)
    seen: list[tuple[str, str]] = []

    def compute(slot: int, name: str) -> None:
        moved.await_load(slot)
        device.now.work.append(lambda: seen.append((name, slots[slot].held)))
        moved.release(slot)

    # Everything is asked for before anything runs; then the copies run first, as far as they may.
    moved.begin()
    for slot, name in ((0, "a"), (1, "b"), (0, "c"), (1, "d"), (0, "e")):
        moved.load(slot, Block(name))  # type: ignore[arg-type]
        compute(slot, name)
    compute(0, "e")
    moved.finish()
    device.now.synchronize()
    assert seen == [(name, name) for name in "abcdee"]


def test_a_copy_that_is_read_much_later_is_still_waited_for(device: Device) -> None:
    """An expert that the host computed may be copied now and read hundreds of dispatches later."""
    slots: Any = [LazySlot()]
    moved = transfers.CudaTransfers(slots)
    moved.begin()
    moved.load_all([(0, Block("a"))])  # type: ignore[list-item]
    for _ in range(600):
        moved.mark()
    seen: list[str] = []
    moved.await_all([0])
    device.now.work.append(lambda: seen.append(slots[0].held))
    device.now.synchronize()
    assert seen == ["a"]


def test_another_stream_waits_for_the_one_before(device: Device) -> None:
    slots: Any = [LazySlot()]
    moved = transfers.CudaTransfers(slots)
    moved.begin()
    moved.load(0, Block("a"))  # type: ignore[arg-type]
    moved.await_load(0)
    other = Stream(device)
    seen: list[str] = []
    with device.entered(other):
        moved.begin()
        moved.await_load(0)  # The first stream has waited already: nothing is pending.
        other.work.append(lambda: seen.append(slots[0].held))
        moved.release(0)
    other.synchronize()
    assert seen == ["a"]


class Runtime:
    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.locked: list[tuple[int, int]] = []
        self.unlocked: list[int] = []

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:
        self.locked.append((place, size))
        assert flags == 0
        return self.answer

    def cudaHostUnregister(self, place: int) -> int:
        self.unlocked.append(place)
        return 0


def test_experts_are_locked_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(expert_store, "LEAST_LOCKED_BYTES", 0)
    experts = random_experts(num_experts=3, d_model=16, d_ff=8, dtype=torch.float32, bias=True)
    store = expert_store.store_of_weights(experts, pinned=True)
    place = store.memory.data_ptr()
    assert runtime.locked == [(place, 3 * store.shape.block_bytes)]
    rows = torch.randn(2, 16)
    for expert in range(3):
        assert torch.equal(store.weights(expert).run(0, rows), experts.run(expert, rows))
        assert torch.equal(store.all_weights("cpu").run(expert, rows), experts.run(expert, rows))
    store.close()
    assert runtime.unlocked == [place]


def test_a_driver_that_refuses_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(2))
    with pytest.raises(MoeprofError, match="page-lock") as refused:
        expert_store.lock(torch.zeros(16, dtype=torch.uint8))
    assert "ulimit" in refused.value.hint


def test_a_host_that_waits_on_another_stream_waits_for_the_one_before(device: Device) -> None:
    computations = transfers.Computations(torch.device("cuda:0"))
    done: list[str] = []
    computations.begin()
    device.now.work.append(lambda: done.append("first"))
    other = Stream(device)
    with device.entered(other):
        computations.begin()
        asked = Event()
        asked.record(other)
        asked.reach()
        assert done == ["first"]
        other.work.append(lambda: done.append("second"))
    computations.finish()
    assert done == ["first", "second"]
