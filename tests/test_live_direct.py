"""Dispatches asked for from compiled code, on a driver that stands in for the real one.

Its streams run as late or as early as events allow, so that whatever is not waited for shows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moeprof.errors import MoeprofError, UsageError
from moeprof.live import expert_buffer, piece_bench
from moeprof.live.buffer_settings import BufferedSite, BufferSettings
from moeprof.live.calibration_sizes import CPU_SIZES
from moeprof.live.direct_dispatch import DirectSlots
from moeprof.live.direct_launches import CELL, CELLS, PreparedKernel
from moeprof.live.driver_calls import FUNCTIONS, NOT_READY
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import ALIGNMENT_BYTES, store_of_weights
from moeprof.live.experts import random_experts
from moeprof.live.kernels.streamed import StreamedDispatch
from moeprof.live.row_blocks import Workspace
from moeprof.live.transfers import HostTransfers, make_slots
from moeprof.replay.calibration_file import Measured

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter here"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
HALF = torch.float16
COMPUTATIONS, COPIES = 0, 7
NUM_EVENTS = 5
DTYPES = {
    "hidden": HALF, "ids": torch.int64, "table": torch.int32, "pool": HALF, "inner": HALF,
    "rows": torch.float32, "rows_out": torch.float32, "weights": HALF, "out": HALF,
    "words": torch.int64,
}  # fmt: skip
_WORD = ctypes.c_int64


class Driver:
    """Two streams and their events; nothing runs before it has to, or copies as soon as they may.

    Args:
        eager: Copies run as soon as they may; else when a computation waits for them.
    """

    def __init__(self, *, eager):
        self.eager = eager
        self.work = {COMPUTATIONS: [], COPIES: []}
        self.done = {COMPUTATIONS: 0, COPIES: 0}
        self.events = {}
        self.kernels = []
        self.calls = []
        self.refuses = None
        named = {
            "cuMemcpyHtoDAsync_v2": (self.copy, 4),
            "cuEventRecord": (self.record, 2),
            "cuStreamWaitEvent": (self.wait, 3),
            "cuLaunchKernelEx": (self.launch, 4),
            "cuStreamQuery": (self.query, 1),
        }
        self.kept = []
        addresses = []
        for name in FUNCTIONS:
            function, count = named[name]
            kind = ctypes.CFUNCTYPE(ctypes.c_int, *[_WORD] * count)
            self.kept.append(kind(self.noted(name, function)))
            addresses.append(ctypes.cast(self.kept[-1], ctypes.c_void_p).value)
        self.functions = np.array(addresses, np.int64)

    def noted(self, name, function):
        def call(*given):
            self.calls.append(name)
            if self.refuses == name:
                return 700
            return function(*given) or 0

        return call

    def run(self, stream, until=None):
        until = len(self.work[stream]) if until is None else until
        while self.done[stream] < until:
            self.done[stream] += 1
            self.work[stream][self.done[stream] - 1]()

    def add(self, stream, work):
        self.work[stream].append(work)
        if self.eager and stream == COPIES:
            self.run(COPIES)

    def copy(self, target, source, size, stream):
        assert stream == COPIES and size > 0
        self.add(stream, lambda: ctypes.memmove(target, source, size))

    def record(self, event, stream):
        self.events[event] = (stream, len(self.work[stream]))

    def wait(self, stream, event, flags):
        assert flags == 0
        self.add(stream, lambda recorded=self.events[event]: self.run(*recorded))

    def reach(self, event):
        self.run(*self.events[event])

    def launch(self, config, function, parameters, extra):
        assert extra == 0
        words = (ctypes.c_int64 * 7).from_address(config)
        kernel, given, is_constant, names = self.kernels[function - 1]
        grid, stream = words[0] & 0xFFFFFFFF, words[4]
        assert (words[0] >> 32, words[1] & 0xFFFFFFFF, words[2]) == (1, 1, 1 | 1 << 32)
        places = (ctypes.c_int64 * len(names)).from_address(parameters)
        values = {
            name: ctypes.c_int64.from_address(place).value
            for name, place in zip(names, places, strict=True)
        }
        own = []
        for name, baked, constant in zip(kernel.arg_names, given, is_constant, strict=True):
            if constant:
                own.append(baked)
            elif name in DTYPES:
                own.append(memory_at(values[name], DTYPES[name], 1))
            else:
                own.append(values[name])
        self.add(stream, lambda: kernel[(grid,)](*own))

    def query(self, stream):
        if self.done[stream] < len(self.work[stream]):
            self.run(stream)
            return NOT_READY
        return 0

    def prepare(self, compiled):
        """Takes a kernel as it was first launched."""
        names = [
            name
            for name, constant in zip(
                compiled.kernel.arg_names, compiled.is_constant, strict=True
            )
            if not constant
        ]  # fmt: skip
        self.kernels.append((compiled.kernel, compiled.given, compiled.is_constant, names))
        return PreparedKernel(
            function=len(self.kernels),
            num_threads=128,
            shared_bytes=0,
            is_dependent=True,
            parameters=tuple({"rows_out": "rows"}.get(name, name) for name in names),
        )


def memory_at(address, dtype, *shape):
    """Returns numbers at an address; kernels count on from there."""
    size = dtype.itemsize * int(np.prod(shape))
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


class Plain:
    """What a kernel computes, in plain torch: Triton's interpreter takes a hundred times as long.

    Args:
        kernel: Whose arguments it takes.
    """

    def __init__(self, kernel):
        self.fn, self.arg_names = kernel.fn, kernel.arg_names
        self._compute = getattr(self, self.fn.__name__)

    def __getitem__(self, grid):
        def launch(*given, **options):
            values = dict(zip(self.arg_names, given, strict=True))
            self._compute(SimpleNamespace(programs=grid[0], **values))

        return launch

    @staticmethod
    def ids(own):
        tokens = own.num_tokens
        return memory_at(own.ids.data_ptr(), torch.int64, tokens * own.TOP_K).tolist()

    def experts(self, own, columns):
        """Yields each expert of a piece with the address of its block and its slots."""
        first, count = own.first, own.programs // -(-columns // own.COLUMNS)
        table = memory_at(own.table.data_ptr(), torch.int32, 2, own.TABLE).tolist()
        ids = self.ids(own)
        for expert, offset in zip(*(row[first : first + count] for row in table), strict=True):
            address = own.pool.data_ptr() + HALF.itemsize * offset * own.UNIT
            yield address, [slot for slot, chosen in enumerate(ids) if chosen == expert]

    def publish(self, own):
        ids = memory_at(own.ids.data_ptr(), torch.int64, own.num_slots)
        words = memory_at(own.words.data_ptr(), torch.int64, own.num_slots)
        words.copy_(own.turn << 32 | ids & 0xFFFFFFFF)

    def piece_in(self, own):
        assert own.GATED and not own.BIAS
        for address, slots in self.experts(own, own.D_FF):
            weight = memory_at(
                address + HALF.itemsize * own.W_IN, HALF, 2, own.D_FF, own.D_MODEL
            ).float()
            for slot in slots:
                place = own.hidden.data_ptr() + HALF.itemsize * (slot // own.TOP_K) * own.D_MODEL
                gate, up = weight @ memory_at(place, HALF, own.D_MODEL).float()
                inner = own.inner.data_ptr() + HALF.itemsize * slot * own.D_FF
                memory_at(inner, HALF, own.D_FF).copy_(torch.nn.functional.silu(gate) * up)

    def piece_out(self, own):
        for address, slots in self.experts(own, own.D_MODEL):
            weight = memory_at(
                address + HALF.itemsize * own.W_OUT, HALF, own.D_MODEL, own.D_FF
            ).float()
            for slot in slots:
                inner = own.inner.data_ptr() + HALF.itemsize * slot * own.D_FF
                row = own.rows_out.data_ptr() + 4 * slot * own.D_MODEL
                memory_at(row, torch.float32, own.D_MODEL).copy_(
                    weight @ memory_at(inner, HALF, own.D_FF).float()
                )

    def add_slots(self, own):
        tokens = own.programs // -(-own.D_MODEL // own.COLUMNS)
        own.num_tokens = tokens
        rows = memory_at(own.rows.data_ptr(), torch.float32, tokens, own.TOP_K, own.D_MODEL)
        gates = memory_at(own.weights.data_ptr(), HALF, tokens, own.TOP_K).float()
        chosen = torch.tensor(self.ids(own)).view(tokens, own.TOP_K) >= 0
        # What lies in the rows of a slot that is not executed is of an earlier dispatch.
        added = torch.where(chosen[:, :, None], gates[:, :, None] * rows, 0.0).sum(1)
        memory_at(own.out.data_ptr(), HALF, tokens, own.D_MODEL).copy_(added)


class FirstLaunch:
    """A kernel, and what it was first launched with."""

    def __init__(self, kernel, given):
        self.kernel, self.given = kernel, given
        kinds = inspect.signature(kernel.fn).parameters.values()
        self.is_constant = ["constexpr" in str(kind.annotation) for kind in kinds]

    def __getitem__(self, grid):
        def launch(*given):
            pairs = zip(given, self.given, self.is_constant, strict=True)
            self.kernel[grid](*(old if constant else new for new, old, constant in pairs))

        return launch


class Module:
    """The kernels of a module, each noted when it is first launched.

    Args:
        module: The module.
        is_real: Run in Triton's interpreter, not in plain torch.
    """

    def __init__(self, module, *, is_real):
        self._module, self._is_real = module, is_real

    def __getattr__(self, name):
        kernel = getattr(self._module, name)
        if not self._is_real and name != "put_rows":
            kernel = Plain(kernel)

        class Launcher:
            def __getitem__(self, grid):
                def launch(*given, **options):
                    kernel[grid](*given, **options)
                    return FirstLaunch(kernel, given)

                return launch

        return Launcher()


class DriverTransfers(HostTransfers):
    """Slots of a driver that stands in; from Python everything is done at once."""

    stream = COPIES

    def __init__(self, slots, driver):
        super().__init__(slots)
        self.driver = driver
        self.direct = DirectSlots(
            address=np.array([slot.data_ptr() for slot in slots], np.int64),
            offset=np.array([slot.storage_offset() // ALIGNMENT_BYTES for slot in slots], np.int32),
            pending=np.zeros(len(slots), np.int64),
            is_read=np.zeros(len(slots), np.uint8),
            arrivals=np.arange(1, NUM_EVENTS + 1),
            marks=np.arange(101, 101 + NUM_EVENTS),
            turns=np.zeros(3, np.int64),
        )

    def load(self, slot, block):
        """The host has waited: nobody computes; earlier copies come first."""
        self.driver.run(COPIES)
        super().load(slot, block)

    def await_all(self, slots):
        for slot in slots:
            if self.direct.pending[slot]:
                self.driver.reach(self.direct.pending[slot])
                self.direct.pending[slot] = 0

    def await_load(self, slot):
        self.await_all([slot])

    def finish(self):
        self.driver.run(COPIES)


def sites_of(num_sites, num_experts, *, gated=True, bias=False):
    return [
        BufferedSite(
            site=3 * site + 1,
            stack="decoder",
            layer=site,
            store=store_of_weights(
                random_experts(
                    num_experts=num_experts, d_model=32, d_ff=48, gated=gated, bias=bias,
                    activation="silu" if gated else "relu", dtype=HALF, seed=site,
                ),
                pinned=False,
            ),
        )
        for site in range(num_sites)
    ]  # fmt: skip


def dispatches(num, num_tokens, num_experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        hidden = torch.randn(num_tokens, 32, generator=generator).to(HALF)
        scores = torch.rand(num_tokens, num_experts, generator=generator)
        ids = scores.topk(top_k, dim=1).indices
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -1)
        yield hidden, ids, torch.rand(num_tokens, top_k, generator=generator).to(HALF)


@pytest.fixture
def direct(monkeypatch):
    """Makes buffers whose dispatches are asked for from compiled code, and their driver."""
    monkeypatch.setattr(expert_buffer, "can_stream", lambda *_: True)

    def make(sites, settings, *, eager=False, is_real=False):
        driver = Driver(eager=eager)
        with monkeypatch.context() as patch:
            patch.setattr(
                expert_buffer, "open_transfers", lambda slots: DriverTransfers(slots, driver)
            )
            patch.setattr(expert_buffer, "driver_functions", lambda: driver.functions)
            buffer = ExpertBuffer(sites, settings, device="cpu")
            buffer._direct = buffer._direct_runs()
        for one in buffer._distinct_streamed():
            one._kernels = Module(one._kernels, is_real=is_real)
            one._prepare = driver.prepare
        return buffer, driver

    return make


def plain_buffer(sites, settings, *, is_real=False):
    """Returns a buffer whose dispatches are asked for from Python."""
    buffer = ExpertBuffer(sites, settings, device="cpu")
    for one in buffer._distinct_streamed():
        one._kernels = Module(one._kernels, is_real=is_real)
    return buffer


def run_all(buffer, driver, every, kept):
    """Runs dispatches; what they were given lives until everything has run."""
    outputs = []
    for site, given in every:
        outputs.append(buffer.run(site, *given))
        kept.append(given)
    driver.run(COMPUTATIONS)
    return outputs


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("policy", "capacity", "prefetch"),
    [("lru", 1, 0), ("lru", 3, 0), ("lfu", 2, 2), ("paper", 2, 0), ("arc", 3, 1), ("layers", 6, 0)],
)
def test_the_same_bits_and_lookups_whatever_runs_first(direct, policy, capacity, prefetch, eager):
    sites = sites_of(2, 6)
    settings = BufferSettings(capacity=capacity, policy=policy, prefetch=prefetch)
    if policy == "layers":
        settings = BufferSettings(capacity=capacity, policy=policy, scope="stack")
    every = [(sites[index % 2].site, given) for index, given in enumerate(dispatches(24, 2, 6, 2))]
    plain = plain_buffer(sites, settings)
    expected = [plain.run(site, *given) for site, given in every]
    buffer, driver = direct(sites, settings, eager=eager)
    kept = []
    outputs = run_all(buffer, driver, every, kept)
    assert driver.calls.count("cuLaunchKernelEx") > 2 * len(every)
    assert all(torch.equal(out, own) for out, own in zip(outputs, expected, strict=True))
    assert buffer.lookups().equals(plain.lookups())
    own, other = buffer.counts(), plain.counts()
    assert (own.copies, own.copied_bytes, own.prefetches, own.waits) == (
        other.copies, other.copied_bytes, other.prefetches, other.waits,
    )  # fmt: skip
    assert buffer.audit() == []
    plain.close()
    buffer.close()


@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_kernels_take_their_arguments_as_triton_gives_them(direct, gated, bias, num_tokens):
    sites = sites_of(2, 6, gated=gated, bias=bias)
    settings = BufferSettings(capacity=None)
    every = [(sites[n % 2].site, given) for n, given in enumerate(dispatches(4, num_tokens, 6, 2))]
    plain = plain_buffer(sites, settings, is_real=True)
    buffer, driver = direct(sites, settings, is_real=True)
    outputs = run_all(buffer, driver, every, [])
    for (site, given), out in zip(every, outputs, strict=True):
        assert torch.equal(out, plain.run(site, *given))
    assert set(driver.calls) == {"cuLaunchKernelEx", "cuStreamQuery"}
    plain.close()
    buffer.close()


@pytest.mark.parametrize(("miss", "host_rows"), [("host", 1), ("split", 1)])
def test_experts_of_the_host_are_left_to_python(direct, miss, host_rows):
    sites = sites_of(1, 8)
    settings = BufferSettings(capacity=3, miss=miss, host_rows=host_rows)
    every = [(sites[0].site, given) for given in dispatches(10, 5, 8, 2)]
    plain = plain_buffer(sites, settings)
    buffer, driver = direct(sites, settings)
    for site, given in every:
        out = buffer.run(site, *given)
        driver.run(COMPUTATIONS)
        assert torch.equal(out, plain.run(site, *given))
    assert buffer.counts().host_experts == plain.counts().host_experts > 0
    assert buffer.lookups().equals(plain.lookups())
    plain.close()
    buffer.close()


def test_nothing_executed_is_zero_and_no_lookup(direct):
    sites = sites_of(1, 4)
    buffer, driver = direct(sites, BufferSettings(capacity=2))
    (every,) = dispatches(1, 3, 4, 2)
    hidden, ids, weights = every
    nobody = torch.full_like(ids, -1)
    kept = [buffer.run(1, hidden, ids, weights) for _ in range(2)]
    lookups = len(buffer.lookups())
    out = buffer.run(1, hidden, nobody, weights)
    driver.run(COMPUTATIONS)
    assert not out.any()
    assert len(buffer.lookups()) == lookups
    assert torch.equal(*kept)
    buffer.close()


def test_larger_dispatches_go_between(direct):
    sites = sites_of(1, 6)
    settings = BufferSettings(capacity=3)
    sizes = [2, 2, 150, 2, 150, 3, 3, 2]
    every = [(1, given) for n, size in enumerate(sizes) for given in dispatches(1, size, 6, 2, n)]
    plain = plain_buffer(sites, settings)
    buffer, driver = direct(sites, settings)
    for site, given in every:
        out = buffer.run(site, *given)
        driver.run(COMPUTATIONS)
        assert torch.equal(out, plain.run(site, *given))
    assert buffer.lookups().equals(plain.lookups())
    plain.close()
    buffer.close()


@pytest.mark.parametrize("name", FUNCTIONS[:4])
def test_a_driver_that_refuses_stops_everything(direct, name):
    sites = sites_of(1, 6)
    buffer, driver = direct(sites, BufferSettings(capacity=2))
    every = list(dispatches(6, 2, 6, 2))
    # What computations write to lives until they have run.
    kept = [buffer.run(1, *given) for given in every[:3]]
    driver.refuses = name
    with pytest.raises(MoeprofError, match="error 700"):
        kept += [buffer.run(1, *given) for given in every[3:]]
    driver.refuses = None
    if name != "cuLaunchKernelEx":
        with pytest.raises(MoeprofError, match="broke off"):
            buffer.run(1, *every[0])
    driver.run(COMPUTATIONS)
    buffer.reset()
    kept += [buffer.run(1, *given) for given in every]
    driver.run(COMPUTATIONS)
    assert len(kept) >= len(every)
    assert buffer.audit() == []
    buffer.close()


def test_a_device_that_says_nothing_is_not_waited_for_forever(direct):
    sites = sites_of(1, 6)
    buffer, driver = direct(sites, BufferSettings(capacity=2))
    every = list(dispatches(3, 2, 6, 2))
    outputs = [buffer.run(1, *given) for given in every[:2]]
    buffer._direct._driver, kept = silent_functions()
    with pytest.raises(MoeprofError, match="without saying"):
        buffer.run(1, *every[2])
    assert (len(outputs), len(kept)) == (2, len(FUNCTIONS))
    buffer._direct = None
    driver.run(COMPUTATIONS)
    buffer.close()


def silent_functions():
    """Returns a driver that says that all is well and does nothing, and what keeps it alive."""
    kept = [
        ctypes.CFUNCTYPE(ctypes.c_int, *[_WORD] * count)(lambda *_: 0) for count in (4, 2, 3, 4, 1)
    ]
    return np.array([ctypes.cast(one, ctypes.c_void_p).value for one in kept], np.int64), kept


@pytest.mark.parametrize("capacity", [None, 2])
def test_an_expert_that_there_is_not_is_refused_and_nothing_is_lost(direct, capacity):
    sites = sites_of(1, 6)
    buffer, driver = direct(sites, BufferSettings(capacity=capacity))
    every = [(1, given) for given in dispatches(4, 2, 6, 2)]
    kept = []
    run_all(buffer, driver, every[:2], kept)
    hidden, ids, weights = every[2][1]
    with pytest.raises(MoeprofError, match="there is not"):
        buffer.run(1, hidden, ids + 6, weights)
    outputs = run_all(buffer, driver, every[2:], kept)
    plain = plain_buffer(sites, BufferSettings(capacity=None))
    for (site, given), out in zip(every[2:], outputs, strict=True):
        assert torch.equal(out, plain.run(site, *given))
    plain.close()
    buffer.close()


@pytest.mark.parametrize("capacity", [None, 2])
def test_the_first_of_its_kind_may_choose_wrongly_too(direct, capacity):
    sites = [*sites_of(1, 6), *(dataclasses.replace(each, site=2) for each in sites_of(1, 8))]
    buffer, driver = direct(sites, BufferSettings(capacity=capacity, scope="stack"))
    ((hidden, ids, weights),) = dispatches(1, 2, 6, 2)
    with pytest.raises(MoeprofError, match="site 1 has 6"):
        # The other site has that one.
        buffer.run(1, hidden, ids.clamp(min=0) * 0 + 6, weights)
    assert buffer.lookups().empty
    kept = buffer.run(1, hidden, ids, weights)
    plain = plain_buffer(sites[:1], BufferSettings(capacity=None))
    assert torch.equal(kept, plain.run(1, hidden, ids, weights))
    driver.run(COMPUTATIONS)
    plain.close()
    buffer.close()


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("wrong", ["hidden", "ids", "weights", "elsewhere", "few", "narrow"])
def test_what_kernels_cannot_read_is_refused(direct, wrong, num_before):
    buffer, driver = direct(sites_of(1, 6), BufferSettings(capacity=None))
    kept = [(given, buffer.run(1, *given)) for given in dispatches(num_before, 2, 6, 2)]
    ((hidden, ids, weights),) = dispatches(1, 2, 6, 2)
    given = {
        "hidden": (hidden[:1], ids, weights),
        "ids": (hidden, ids[:, :1], weights),
        "weights": (hidden, ids, weights[:, :1]),
        "elsewhere": (hidden, ids.to("meta"), weights),
        "few": (hidden, ids.view(-1), weights.view(-1)),
        "narrow": (hidden[:, :16], ids, weights),
    }[wrong]
    with pytest.raises(UsageError, match="lies on meta" if wrong == "elsewhere" else "no dispatch"):
        buffer.run(1, *given)
    assert len(kept) == num_before
    driver.run(COMPUTATIONS)
    buffer.close()


@pytest.mark.parametrize("num_tokens", [100, 150])
def test_memory_that_is_still_read_is_not_let_go_of(direct, monkeypatch, num_tokens):
    """Of a dispatch in pieces, and of one that runs expert by expert."""
    buffer, driver = direct(sites_of(1, 6), BufferSettings(capacity=None))
    monkeypatch.setattr(buffer._computations, "finish", lambda: driver.run(COMPUTATIONS))
    few = [(given, buffer.run(1, *given)) for given in dispatches(3, 2, 6, 2)]
    under_way = []
    for kind in (StreamedDispatch, Workspace):

        def grow(own, num, grown=kind._grow):
            under_way.append(len(driver.work[COMPUTATIONS]) - driver.done[COMPUTATIONS])
            grown(own, num)

        monkeypatch.setattr(kind, "_grow", grow)
    assert driver.done[COMPUTATIONS] < len(driver.work[COMPUTATIONS])
    ((hidden, ids, weights),) = dispatches(1, num_tokens, 6, 2)
    many = buffer.run(1, hidden, ids, weights)
    assert under_way == [0]
    assert (len(few), len(many)) == (3, num_tokens)
    driver.run(COMPUTATIONS)
    buffer.close()


@pytest.mark.parametrize("last", [torch.int32, HALF, torch.float32])
def test_no_memory_to_grow_leaves_none_that_is_gone(direct, monkeypatch, last):
    """Addresses of what was let go of are not used again."""
    buffer, driver = direct(sites_of(1, 6), BufferSettings(capacity=None))
    every = list(dispatches(4, 2, 6, 2))
    kept = [buffer.run(1, *given) for given in every[:3]]
    driver.run(COMPUTATIONS)
    zeros = torch.zeros

    def taken(*shape, dtype, **named):
        if dtype == last:
            raise MemoryError
        return zeros(*shape, dtype=dtype, **named)

    (many,) = dispatches(1, 100, 6, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", taken)
        with pytest.raises(MemoryError):
            buffer.run(1, *many)
    kept.append(buffer.run(1, *every[3]))
    driver.run(COMPUTATIONS)
    (streamed,) = buffer._distinct_streamed()
    for name in ("inner", "rows", "words"):
        memory = getattr(streamed, f"_{name}")
        assert streamed.cells[CELL[name]] == memory.data_ptr() and len(memory) >= 4
    plain = plain_buffer(sites_of(1, 6), BufferSettings(capacity=None))
    assert torch.equal(kept[-1], plain.run(1, *every[3]))
    plain.close()
    buffer.close()


def test_the_host_keeps_no_gradients(direct):
    buffer, driver = direct(sites_of(1, 8), BufferSettings(capacity=4, miss="host"))
    for hidden, ids, weights in dispatches(12, 2, 8, 2):
        out = buffer.run(1, hidden.requires_grad_(), ids, weights.requires_grad_())
        driver.run(COMPUTATIONS)
        assert not out.requires_grad
    assert driver.calls
    assert not any(one.requires_grad for one in buffer._host_lane._buffers.values())
    buffer.close()


def test_nothing_runs_where_starting_anew_was_interrupted(direct, monkeypatch):
    sites = sites_of(1, 6)
    buffer, driver = direct(sites, BufferSettings(capacity=2))
    every = [(1, given) for given in dispatches(4, 2, 6, 2)]
    kept = []
    run_all(buffer, driver, every, kept)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(buffer._residency, "reset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            buffer.reset()
    with pytest.raises(MoeprofError, match="broke off"):
        buffer.run(1, *every[0][1])
    driver.run(COMPUTATIONS)
    buffer.reset()
    run_all(buffer, driver, every, kept)
    assert buffer.audit() == []
    buffer.close()


@pytest.mark.parametrize("num_before", [0, 2])
def test_ids_are_no_less_wrong_for_being_large(direct, num_before):
    buffer, driver = direct(sites_of(1, 6), BufferSettings(capacity=4), is_real=True)
    kept = [(given, buffer.run(1, *given)) for given in dispatches(num_before, 1, 6, 2)]
    ((hidden, ids, weights),) = dispatches(1, 1, 6, 2)
    for large in (1 << 31, 1 << 32, 1 << 40):
        with pytest.raises(MoeprofError, match="site 1 has 6"):
            buffer.run(1, hidden, ids.clamp(min=0) + large, weights)
    nobody = buffer.run(1, hidden, ids.clamp(min=0) - (1 << 33), weights)
    driver.run(COMPUTATIONS)
    assert not nobody.any()
    assert buffer.counts().dispatches == len(kept) == num_before
    buffer.close()


def test_copies_left_out_copy_nothing_and_decide_the_same(direct):
    sites = sites_of(2, 6)
    settings = BufferSettings(capacity=2, prefetch=1)
    every = [(sites[n % 2].site, given) for n, given in enumerate(dispatches(12, 2, 6, 2))]
    buffer, driver = direct(sites, settings)
    kept = []
    run_all(buffer, driver, every, kept)
    lookups = buffer.lookups()
    buffer.leave_out_copies(left_out=True)
    driver.calls.clear()
    run_all(buffer, driver, every, kept)
    assert driver.calls.count("cuMemcpyHtoDAsync_v2") == 0
    assert buffer.lookups().equals(lookups)
    buffer.close()


def test_copies_left_out_of_a_part_are_asked_for_after_it(direct):
    sites = sites_of(2, 6)
    settings = BufferSettings(capacity=2, prefetch=1)
    every = [(sites[n % 2].site, given) for n, given in enumerate(dispatches(12, 2, 6, 2))]
    whole, driver = direct(sites, settings)
    run_all(whole, driver, every[:8], [])
    driver.calls.clear()
    run_all(whole, driver, every[8:], [])
    expected = driver.calls.count("cuMemcpyHtoDAsync_v2")
    buffer, driver = direct(sites, settings)
    with buffer.without_copies():
        run_all(buffer, driver, every[:8], [])
    assert driver.calls.count("cuMemcpyHtoDAsync_v2") == 0
    run_all(buffer, driver, every[8:], [])
    assert driver.calls.count("cuMemcpyHtoDAsync_v2") == expected > 0
    assert buffer.lookups().equals(whole.lookups())
    assert buffer.counts().copies == whole.counts().copies
    buffer.close()
    whole.close()


def test_a_wrong_slot_map_shows(direct):
    sites = sites_of(1, 4)
    whole = plain_buffer(sites, BufferSettings(capacity=None))
    buffer, driver = direct(sites, BufferSettings(capacity=4))
    every = [(1, given) for given in dispatches(4, 4, 4, 2)]
    expected = [whole.run(site, *given) for site, given in every]
    kept = []
    outputs = run_all(buffer, driver, every, kept)
    assert all(torch.equal(out, own) for out, own in zip(outputs, expected, strict=True))
    first, second = buffer.resident_experts()[:2]
    buffer.misplace(first, second)
    assert len(buffer.audit()) == 2
    outputs = run_all(buffer, driver, every, kept)
    assert not all(torch.equal(out, own) for out, own in zip(outputs, expected, strict=True))
    whole.close()
    buffer.close()


@pytest.mark.parametrize("capacity", [None, 2])
def test_experts_are_read_where_they_lie_in_a_piece_that_sites_share(direct, capacity):
    (one,) = sites_of(1, 6)
    size = one.store.shape.block_bytes
    sites = [
        dataclasses.replace(
            one,
            site=nth + 1,
            store=dataclasses.replace(
                one.store, num_experts=4, memory=one.store.memory[nth * size : (nth + 4) * size]
            ),
        )
        for nth in range(3)
    ]
    buffer, driver = direct(sites, BufferSettings(capacity=capacity))
    kept = []
    for hidden, ids, weights in dispatches(4, 4, 4, 2):
        found = run_all(
            buffer, driver, [(site.site, (hidden, ids, weights)) for site in sites], kept
        )
        for nth, out in enumerate(found):
            # The same experts, counted from where the piece begins.
            moved = torch.where(ids >= 0, ids + nth, ids)
            whole = plain_buffer([one], BufferSettings(capacity=None))
            assert torch.equal(out, whole.run(one.site, hidden, moved, weights))
            whole.close()
    assert buffer.audit() == []
    assert buffer.memory().host_bytes == one.store.memory.numel()
    buffer.close()


def test_every_argument_has_a_cell():
    from moeprof.live.kernels import piecewise

    for kernel in (piecewise.publish, piecewise.piece_in, piecewise.piece_out, piecewise.add_slots):
        kinds = inspect.signature(kernel.fn).parameters
        for name, kind in kinds.items():
            if "constexpr" not in str(kind.annotation):
                assert {"rows_out": "rows"}.get(name, name) in CELLS


class Clock:
    """Runs what is to be timed, in the order of a clock that is real; seconds are made up."""

    is_serial = False

    def __init__(self, driver):
        self.driver = driver

    def settle(self):
        self.driver.run(COMPUTATIONS)
        self.driver.run(COPIES)

    def host(self, function, *, before=lambda: None):
        before()
        self.settle()
        calls = len(self.driver.calls)
        out = function()
        took = len(self.driver.calls) - calls
        self.settle()
        del out
        return Measured.of([float(took)] * 3)

    late = device_part = host


def test_a_bench_counts_what_is_asked_for(monkeypatch, tmp_path):
    """Seconds are calls of the driver: a piece takes two, a copy one, and so on."""
    driver = Driver(eager=False)
    # At once: what is timed drops what it computes.
    driver.add = lambda stream, work: work()

    def made(*given, **named):
        dispatch = StreamedDispatch(*given, **named)
        dispatch._kernels = Module(dispatch._kernels, is_real=True)
        dispatch._prepare = driver.prepare
        return dispatch

    monkeypatch.setattr(piece_bench, "StreamedDispatch", made)
    monkeypatch.setattr(piece_bench, "open_transfers", lambda slots: DriverTransfers(slots, driver))
    monkeypatch.setattr(piece_bench, "driver_functions", lambda: driver.functions)
    monkeypatch.setattr(piece_bench, "current_handle", lambda device: COMPUTATIONS)
    sizes = dataclasses.replace(
        CPU_SIZES, dtype="float16", slots=(2, 4), pieces=(1, 3), d_model=32, top_k=2
    )
    bench = piece_bench.PieceBench(torch.device("cpu"), sizes)
    bench.times = Clock(driver)
    store = sites_of(1, 4)[0].store
    slots, _pools = make_slots([4], [store.shape.block_bytes], "cpu")
    for expert, slot in enumerate(slots):
        slot.copy_(store.block(expert))
    found = bench.of_store(store, slots)
    assert found.known.median == 1
    assert [one.median for one in found.host.times_s] == [2, 2]
    assert found.load.median == 1
    # The arrival of copies is recorded and waited for.
    assert found.slot.median == 2
    assert found.combine_host.median == 1
    assert found.rest.median == 0
