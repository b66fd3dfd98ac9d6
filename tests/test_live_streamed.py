"""Dispatches run piece by piece: their kernels, and the buffer that uses them."""

from __future__ import annotations

import functools
import importlib.util
import inspect

import pytest
import torch

from moeprof.live import expert_buffer
from moeprof.live.buffer_settings import BufferedSite, BufferSettings
from moeprof.live.expert_buffer import ExpertBuffer
from moeprof.live.expert_store import store_of_weights
from moeprof.live.experts import random_experts
from moeprof.live.kernels import dynamic_loop
from moeprof.live.kernels.streamed import ROWS_AT_ONCE, STREAMED_TOKENS
from moeprof.replay.cache.pieces import copies_of, pieces_of
from moeprof.replay.cache.residency import AT_ONCE, NO_SLOT, Planned

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies no bfloat16.
HALF = torch.float16
TOLERANCE = 2e-3

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


def hit(expert, slot):
    return Planned(expert, True, slot, False, False, AT_ONCE)


def load(expert, slot, after=AT_ONCE, *, on_host=False):
    return Planned(expert, False, slot, True, on_host, after)


def test_hits_run_first_and_copies_are_asked_for_as_early_as_slots_allow():
    planned = [load(0, 3), hit(1, 0), load(2, 0, after=1), load(3, 0, after=2), hit(4, 1)]
    pieces = pieces_of(planned, streamed=True)
    assert pieces == [[1, 4], [0, 2], [3]]
    # At once; when the hits were launched; when the second piece was; nothing is left.
    assert copies_of(planned, pieces) == [[0], [2], [3], []]


def test_the_host_s_experts_are_in_no_piece_and_their_copies_come_last():
    planned = [
        load(0, 2, on_host=True),
        hit(1, 0),
        Planned(2, False, NO_SLOT, False, True, AT_ONCE),
    ]
    pieces = pieces_of(planned, streamed=True)
    assert pieces == [[1]]
    assert copies_of(planned, pieces) == [[], [0]]


def test_one_by_one_every_lookup_is_a_piece():
    planned = [load(0, 3), hit(1, 0), load(2, 0, after=1)]
    pieces = pieces_of(planned, streamed=False)
    assert pieces == [[0], [1], [2]]
    assert copies_of(planned, pieces) == [[0], [], [2], []]


def sites_of(num_sites, num_experts, *, gated, bias):
    return [
        BufferedSite(
            site=site,
            stack="decoder",
            layer=site,
            store=store_of_weights(
                random_experts(
                    num_experts=num_experts, d_model=32, d_ff=48, gated=gated, bias=bias,
                    activation="silu" if gated else "relu", dtype=HALF, seed=site,
                ),
                pinned=DEVICE == "cuda",
            ),
        )
        for site in range(num_sites)
    ]  # fmt: skip


def dispatches(num, num_tokens, num_experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        hidden = torch.randn(num_tokens, 32, generator=generator).to(DEVICE, HALF)
        scores = torch.rand(num_tokens, num_experts, generator=generator)
        ids = scores.topk(top_k, dim=1).indices
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -1)
        weights = torch.rand(num_tokens, top_k, generator=generator)
        yield hidden, ids.to(DEVICE), weights.to(DEVICE, HALF)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def streaming(monkeypatch):
    """Streams on any device, and says how often."""
    launched = []
    original = expert_buffer.StreamedDispatch.run

    def run(self, experts, blocks):
        launched.append(list(experts))
        original(self, experts, blocks)

    monkeypatch.setattr(expert_buffer, "can_stream", lambda *_: True)
    monkeypatch.setattr(expert_buffer.StreamedDispatch, "run", run)
    # Compiled code launches what nobody here would see.
    monkeypatch.setattr(expert_buffer.ExpertBuffer, "_direct_runs", lambda self: None)
    return launched


@needs_triton
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_all_experts_on_the_device(streaming, gated, bias, num_tokens):
    sites = sites_of(2, 6, gated=gated, bias=bias)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=None), device=DEVICE)
    for site in (0, 1):
        experts = sites[site].store.all_weights(DEVICE)
        for hidden, ids, weights in dispatches(3, num_tokens, 6, 2, seed=site):
            out = buffer.run(site, hidden, ids, weights)
            expected = dynamic_loop(
                hidden.double(), ids, weights.double(), experts.to(dtype=torch.float64)
            )
            assert out.dtype == HALF
            assert error(out, expected) < TOLERANCE
    assert streaming
    buffer.close()


@functools.cache
def outputs_of_all_experts():
    """Eight dispatches to two sites and what comes out with all experts on the device."""
    whole = ExpertBuffer(
        sites_of(2, 6, gated=True, bias=False), BufferSettings(capacity=None), device=DEVICE
    )
    every = list(dispatches(8, 2, 6, 2))
    outputs = [whole.run(index % 2, *given) for index, given in enumerate(every)]
    whole.close()
    return list(zip(every, outputs, strict=True))


@needs_triton
@pytest.mark.parametrize("policy", ["lru", "lfu", "paper", "fifo"])
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_buffer_puts_out_the_same_bits(streaming, policy, capacity):
    # Streamed as well: the first that asks has the fixture, and so have all who ask.
    expected = outputs_of_all_experts()
    sites = sites_of(2, 6, gated=True, bias=False)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=capacity, policy=policy), device=DEVICE)
    one_by_one = []
    for index, ((hidden, ids, weights), out) in enumerate(expected):
        streaming.clear()
        assert torch.equal(buffer.run(index % 2, hidden, ids, weights), out)
        run = [expert for piece in streaming for expert in piece]
        assert sorted(run) == sorted(set(ids[ids >= 0].tolist()))
        one_by_one.append(len(run))
        assert len(streaming) <= len(run)
    assert buffer.audit() == []
    assert max(one_by_one) > 1
    counts = buffer.counts()
    assert counts.hits + counts.copies == counts.lookups
    buffer.close()


@needs_triton
@pytest.mark.parametrize(("miss", "host_rows"), [("host", 1), ("split", 1), ("split", 2)])
def test_experts_on_the_host_are_put_among_the_rest(streaming, miss, host_rows):
    sites = sites_of(1, 8, gated=False, bias=True)
    whole = ExpertBuffer(sites, BufferSettings(capacity=None), device=DEVICE)
    buffer = ExpertBuffer(
        sites, BufferSettings(capacity=3, policy="lru", miss=miss, host_rows=host_rows),
        device=DEVICE,
    )  # fmt: skip
    for hidden, ids, weights in dispatches(6, 5, 8, 2):
        expected = whole.run(0, hidden, ids, weights)
        assert error(buffer.run(0, hidden, ids, weights), expected) < TOLERANCE
    assert buffer.counts().host_experts > 0
    assert buffer.audit() == []
    whole.close()
    buffer.close()


@needs_triton
def test_nothing_executed_is_zero_and_large_dispatches_go_the_other_way(streaming):
    sites = sites_of(1, 4, gated=True, bias=False)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2), device=DEVICE)
    ((hidden, ids, weights),) = dispatches(1, 3, 4, 2)
    assert not buffer.run(0, hidden, torch.full_like(ids, -1), weights).any()
    assert not streaming
    ((hidden, ids, weights),) = dispatches(1, STREAMED_TOKENS + 1, 4, 2)
    assert buffer.run(0, hidden, ids, weights).any()
    assert not streaming
    buffer.close()


@needs_triton
def test_a_wrong_slot_map_shows(streaming):
    sites = sites_of(1, 4, gated=True, bias=False)
    whole = ExpertBuffer(sites, BufferSettings(capacity=None), device=DEVICE)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=4), device=DEVICE)
    every = list(dispatches(4, 4, 4, 2))
    for given in every:
        assert torch.equal(buffer.run(0, *given), whole.run(0, *given))
    first, second = buffer.resident_experts()[:2]
    buffer.misplace(first, second)
    assert len(buffer.audit()) == 2
    assert not all(torch.equal(buffer.run(0, *given), whole.run(0, *given)) for given in every)
    whole.close()
    buffer.close()


@needs_triton
def test_rows_read_at_once_are_those_of_the_kernel():
    from moeprof.live.kernels.few import FEW_ROWS

    assert ROWS_AT_ONCE == FEW_ROWS


class Compiled:
    """A kernel with its constants baked in, as Triton compiles it: later ones are not looked at."""

    def __init__(self, kernel, given, options):
        self._kernel, self._given, self._options = kernel, given, options
        kinds = inspect.signature(kernel.fn).parameters.values()
        self._is_constant = ["constexpr" in str(kind.annotation) for kind in kinds]

    def __getitem__(self, grid):
        def launch(*given):
            pairs = zip(given, self._given, self._is_constant, strict=True)
            own = [baked if is_constant else new for new, baked, is_constant in pairs]
            self._kernel[grid](*own, **self._options)

        return launch


class Compiler:
    """The kernels of a module, compiled when they are first launched."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        kernel = getattr(self._module, name)

        class Launcher:
            def __getitem__(self, grid):
                def launch(*given, **options):
                    kernel[grid](*given, **options)
                    return Compiled(kernel, given, options)

                return launch

        return Launcher()


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled there anyway")
def test_kernels_compiled_before_a_larger_dispatch_serve_after_it(streaming):
    sites = sites_of(1, 6, gated=True, bias=False)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=None), device=DEVICE)
    (own,) = buffer._distinct_streamed()
    own._kernels = Compiler(own._kernels)
    experts = sites[0].store.all_weights(DEVICE)
    growths = buffer.workspace_growths()
    for num_tokens in (3, STREAMED_TOKENS // 2 + 8, 3):
        for hidden, ids, weights in dispatches(2, num_tokens, 6, 2, seed=num_tokens):
            expected = dynamic_loop(
                hidden.double(), ids, weights.double(), experts.to(dtype=torch.float64)
            )
            assert error(buffer.run(0, hidden, ids, weights), expected) < TOLERANCE
    assert buffer.workspace_growths() > growths
    buffer.close()


@needs_triton
def test_the_order_of_computations_is_kept_before_experts_are_asked_for(streaming, monkeypatch):
    told = []

    def note(owner, name):
        original = getattr(owner, name)

        def noted(self, *given, **named):
            told.append(f"{owner.__name__}.{name}")
            return original(self, *given, **named)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in (
        (expert_buffer.Computations, "begin"),
        (expert_buffer.Computations, "finish"),
        (expert_buffer.StreamedDispatch, "begin"),
        (expert_buffer.Workspace, "sorted_rows"),
        (expert_buffer.CompiledResidency, "reset"),
    ):
        note(owner, name)
    sites = sites_of(1, 4, gated=True, bias=False)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2, initial="full"), device=DEVICE)
    for num_tokens, *then in (
        (3, "StreamedDispatch.begin"),
        # What it reads is taken anew, for more rows.
        (200, "Computations.finish", "Workspace.sorted_rows"),
        (200, "Workspace.sorted_rows"),
        (128, "Computations.finish", "StreamedDispatch.begin"),
        (128, "StreamedDispatch.begin"),
    ):
        told.clear()
        ((hidden, ids, weights),) = dispatches(1, num_tokens, 4, 2)
        buffer.run(0, hidden, ids, weights)
        assert told == ["Computations.begin", *then]
    told.clear()
    buffer.reset()
    assert told == ["Computations.finish", "CompiledResidency.reset"]
    told.clear()
    buffer.close()
    assert told == ["Computations.finish"]


@needs_triton
@pytest.mark.parametrize("streams", [True, False])
def test_counts_do_not_depend_on_how_a_dispatch_runs(monkeypatch, streams):
    monkeypatch.setattr(expert_buffer, "can_stream", lambda *_: streams)
    sites = sites_of(1, 4, gated=True, bias=False)
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2), device=DEVICE)
    ((hidden, ids, weights),) = dispatches(1, 3, 4, 2)
    buffer.run(0, hidden, ids, weights)
    buffer.run(0, hidden, torch.full_like(ids, -1), weights)
    assert (buffer.counts().dispatches, buffer.counts().waits) == (1, 2)
    before = buffer.counts(), buffer.memory()
    buffer.close()
    assert (buffer.counts(), buffer.memory()) == before
