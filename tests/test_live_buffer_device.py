"""What a GPU would be told: streams, events and page locks, on stand-ins that note every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moeprof.errors import MoeprofError  # noqa: E402
from moeprof.live import expert_buffer, expert_store, transfers  # noqa: E402
from moeprof.live.buffer_settings import BufferedSite, BufferSettings  # noqa: E402
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.experts import random_experts  # noqa: E402
from moeprof.replay.cache import policies  # noqa: E402
from moeprof.replay.cache.foresight import Foresight  # noqa: E402
from moeprof.replay.cache.residency import CacheSpec, MissRule, Residency  # noqa: E402


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
    every: ClassVar[list[Event]] = []

    def __init__(self) -> None:
        self.recorded: tuple[Stream, int] | None = None
        self.every.append(self)
        # 0 is no event.
        self.cuda_event = len(self.every)

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

    every: ClassVar[list[LazySlot]] = []

    def __init__(self) -> None:
        self.held = ""
        self.device = "cuda:0"
        self.every.append(self)
        self._address = len(self.every) - 1

    def data_ptr(self) -> int:
        return self._address

    def storage_offset(self) -> int:
        return 0

    def numel(self) -> int:
        return 1


class Block:
    def __init__(self, name: str) -> None:
        self.name = name

    def data_ptr(self) -> str:
        return self.name

    def numel(self) -> int:
        return 1


def copy_to_device(address: int, name: str, num_bytes: int, stream: Stream) -> None:
    def run() -> None:
        LazySlot.every[address].held = name

    assert num_bytes == 1
    stream.work.append(run)


def wait_for_event(stream: Stream, event: int) -> None:
    stream.wait_event(Event.every[event - 1])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", made.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(transfers, "_SPARE_EVENTS", {})
    monkeypatch.setattr(transfers, "copy_to_device", copy_to_device)
    monkeypatch.setattr(transfers, "wait_for_event", wait_for_event)
    monkeypatch.setattr(transfers, "current_handle", lambda device: id(made.now))
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


def test_events_go_from_one_to_the_next(device: Device) -> None:
    def run(num_slots: int) -> tuple[Any, list[str]]:
        slots: Any = [LazySlot() for _ in range(num_slots)]
        moved, seen = transfers.CudaTransfers(slots), []
        moved.begin()
        for name in "abc":
            moved.load(0, Block(name))  # type: ignore[arg-type]
            moved.await_load(0)
            device.now.work.append(lambda: seen.append(slots[0].held))
            moved.release(0)
        moved.finish()
        device.now.synchronize()
        return moved, seen

    first, seen = run(2)
    made = len(Event.every)
    other, _ = run(2)
    # Nothing is anybody's twice while both are open.
    assert len(Event.every) > made
    own = set(first.direct.arrivals) | set(first.direct.marks)
    assert not own & (set(other.direct.arrivals) | set(other.direct.marks))
    made = len(Event.every)
    first.let_go()
    third, again = run(2)
    assert len(Event.every) == made
    assert seen == again == list("abc")
    third.let_go()
    run(3)
    assert len(Event.every) == made + 2


def test_a_device_stays_the_same_whichever_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert transfers.with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert transfers.with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    monkeypatch.setattr(expert_buffer, "with_index", lambda device: torch.device(device.type, 0))
    experts = random_experts(num_experts=2, d_model=8, d_ff=8, dtype=torch.float32)
    store = expert_store.store_of_weights(experts)
    site = BufferedSite(site=0, stack="decoder", layer=0, store=store)
    buffer = ExpertBuffer([site], BufferSettings(capacity=None), device="cpu")
    assert buffer.device == torch.device("cpu", 0)
    buffer.close()


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


class Bufferless:
    """An expert buffer of two sites over slots that only hold names, and what it read of them."""

    num_experts = 6
    capacity = 2

    def __init__(self, device: Device, policy: str, prefetch: int) -> None:
        self.seen: list[tuple[str, str]] = []
        self.device = device
        staging = 1 if policy == "layers" else 0
        slots: Any = [LazySlot() for _ in range(2 * self.capacity + staging + prefetch)]
        self.moved = transfers.CudaTransfers(slots)
        self.residency = Residency(
            [
                CacheSpec(sites=((site, self.num_experts),), capacity=self.capacity, pool=0,
                          machine=lambda: self.machine(policy))
                for site in (0, 1)
            ],
            [len(slots)],
            prefetch=prefetch,
            foresight=Foresight([[(site, self.num_experts) for site in (0, 1)]]),
        )  # fmt: skip
        self.buffer: Any = object.__new__(ExpertBuffer)
        self.buffer.settings = BufferSettings(capacity=self.capacity, prefetch=prefetch)
        self.buffer._transfers, self.buffer._residency = self.moved, self.residency
        self.buffer._host_lane = None
        self.buffer._num_copies = self.buffer._copied_bytes = 0
        self.buffer._num_ahead = self.buffer._ahead_bytes = 0
        self.buffer._by_id = {
            site: SimpleNamespace(
                site=site,
                store=SimpleNamespace(
                    shape=SimpleNamespace(block_bytes=1),
                    block=lambda expert, site=site: Block(f"{site}:{expert}"),
                ),
                run=lambda expert, slot, _rows, site=site: self.read(site, expert, slot),
            )
            for site in (0, 1)
        }
        # What is read of a slot is the slot.
        self.buffer._views = {(site, n): slot for site in (0, 1) for n, slot in enumerate(slots)}

    def machine(self, policy: str) -> Any:
        sizes = [1] * self.num_experts
        if policy == "layers":
            return policies.Static(sizes, self.capacity, kept=range(self.capacity))
        return policies.SIMPLE_MACHINES[policy](sizes, self.capacity)

    def read(self, site: int, expert: int, slot: LazySlot) -> None:
        self.device.now.work.append(lambda: self.seen.append((f"{site}:{expert}", slot.held)))

    def dispatch(self, site: int, experts: list[int], *, in_pieces: bool) -> None:
        """Runs a dispatch; the host learns the experts, and so waits for all computations."""
        self.device.now.synchronize()
        place = self.buffer._by_id[site]
        planned = self.residency.plan(site, experts, [1] * len(experts), MissRule())
        if not in_pieces:
            rows: Any = [None] * len(experts)
            bounds = [(place, place + 1) for place in range(len(experts))]
            self.buffer._run_planned(place, rows, planned, bounds)
            return

        def run(own: list[int], blocks: list[LazySlot]) -> None:
            for expert, slot in zip(own, blocks, strict=True):
                self.read(site, expert, slot)

        self.buffer._run_pieces(place, SimpleNamespace(run=run), planned, None)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("policy", ["lru", "lifo", "layers"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_copies_ahead_keep_the_order_of_streams(
    device: Device, policy: str, prefetch: int, eager: bool
) -> None:
    """Copies run as early as their events allow, or as late; some dispatches run in pieces."""
    generator = np.random.default_rng(prefetch)
    made = Bufferless(device, policy, prefetch)
    wanted = []
    for index in range(60):
        site = index % 2
        first = int(generator.integers(3))
        experts = sorted({(first + site) % 6, (first + 3) % 6, int(generator.integers(6))})
        made.dispatch(site, experts, in_pieces=bool(generator.random() < 0.7))
        wanted += [f"{site}:{expert}" for expert in experts]
        if eager:
            made.moved.finish()
    device.now.synchronize()
    assert sorted(name for name, _ in made.seen) == sorted(wanted)
    assert [held for _, held in made.seen] == [name for name, _ in made.seen]
    assert made.buffer._num_ahead > 10
