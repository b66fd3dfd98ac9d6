"""One host copy that all layers read: each at another place of it, so that layers differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeprof.live import expert_store, routed_runs  # noqa: E402
from moeprof.live.buffer_settings import BufferSettings  # noqa: E402
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.expert_store import host_bytes, make_store, on_device  # noqa: E402
from moeprof.live.routed_runs import (  # noqa: E402
    ExpertGeometry,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS, NUM_EXPERTS = 3, 8
GEOMETRIES = (
    ExpertGeometry(d_model=64, d_ff=32, dtype=torch.bfloat16),
    ExpertGeometry(d_model=24, d_ff=16, dtype=torch.float32, gated=False, bias=True),
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("shared") / "t.moeprof",
        num_requests=2,
        num_sites=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=2,
        batch=2,
        prompt_tokens=4,
        output_tokens=6,
        seed=1,
    )


def sites_of(trace: Any, geometry: ExpertGeometry, **options: Any) -> list[Any]:
    return random_sites(trace, geometry, stack="decoder", share_host=True, **options)


class Run:
    """A trace's routing on sites, through buffers of some kind."""

    def __init__(self, trace: Any, geometry: ExpertGeometry, sites: list[Any]) -> None:
        self.trace, self.sites = trace, sites
        self.steps = routed_steps(trace, stack="decoder", device="cpu", dtype=geometry.dtype)
        self.hidden = starting_rows(self.steps, geometry, "cpu")

    def buffer(self, **options: Any) -> ExpertBuffer:
        return ExpertBuffer(self.sites, BufferSettings(future=self.trace, **options), device="cpu")

    def outputs(self, buffer: ExpertBuffer) -> list[Any]:
        results = run_steps(buffer, self.steps, self.hidden, keep_outputs=True)
        return [out for result in results for out in result.outputs]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_no_two_blocks_are_alike_and_memory_is_that_of_one_layer(
    trace: Any, geometry: ExpertGeometry
) -> None:
    sites = sites_of(trace, geometry)
    stores = [site.store for site in sites]
    blocks = [store.block(expert) for store in stores for expert in range(NUM_EXPERTS)]
    assert len(blocks) == NUM_LAYERS * NUM_EXPERTS
    assert not any(torch.equal(*pair) for pair in itertools.combinations(blocks, 2))
    for store in stores:
        assert (store.num_experts, store.memory.numel()) == (
            NUM_EXPERTS, NUM_EXPERTS * geometry.block_shape.block_bytes,
        )  # fmt: skip
        assert all(one.isfinite().all() for one in store.all_weights("cpu").tensors())
        # Where kernels may read it, and where compiled code looks for each block.
        assert store.memory.storage_offset() % expert_store.ALIGNMENT_BYTES == 0
        assert [
            store.block(expert).data_ptr() - store.memory.data_ptr() for expert in range(3)
        ] == [expert * geometry.block_shape.block_bytes for expert in range(3)]
    assert len({store.memory.untyped_storage().data_ptr() for store in stores}) == 1
    of_one = NUM_EXPERTS * geometry.block_shape.block_bytes
    assert of_one < host_bytes(stores) <= of_one + 2 * geometry.block_shape.block_bytes
    assert ExpertBuffer(sites, BufferSettings(capacity=2), device="cpu").memory().host_bytes == (
        host_bytes(stores)
    )


def test_even_matrices_hardly_agree_between_layers(trace: Any) -> None:
    """Not only bytes differ somewhere: none of a layer's experts is another's but for its end."""
    every = [
        site.store.weights(expert).w_in.flatten()[:64].tolist()
        for site in sites_of(trace, GEOMETRIES[0])
        for expert in range(NUM_EXPERTS)
    ]
    assert len({tuple(begin) for begin in every}) == NUM_LAYERS * NUM_EXPERTS


@pytest.mark.parametrize("policy", ["lru", "min"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_buffered_runs_compute_the_same_bits(
    trace: Any, geometry: ExpertGeometry, policy: str
) -> None:
    run = Run(trace, geometry, sites_of(trace, geometry))
    expected = run.outputs(run.buffer(capacity=None))
    buffer = run.buffer(capacity=3, policy=policy)
    assert all(map(torch.equal, run.outputs(buffer), expected))
    assert buffer.audit() == []
    # The host computes with the same experts.
    on_host = run.outputs(run.buffer(capacity=1, policy=policy, miss="host"))
    assert all(map(torch.equal, on_host, expected))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_block_of_another_layer_fails_bits_and_audit(
    trace: Any, geometry: ExpertGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = sites_of(trace, geometry)
    run = Run(trace, geometry, sites)
    expected = run.outputs(run.buffer(capacity=None))
    next_layer = {
        one.store.block(expert).data_ptr(): other.store.block(expert)
        for one, other in itertools.pairwise([*sites, sites[0]])
        for expert in range(NUM_EXPERTS)
    }
    assert len(next_layer) == NUM_LAYERS * NUM_EXPERTS
    buffer = run.buffer(capacity=NUM_EXPERTS)
    transfers: Any = buffer._transfers
    load = transfers.load
    monkeypatch.setattr(
        transfers, "load", lambda slot, block: load(slot, next_layer[block.data_ptr()])
    )
    assert not any(map(torch.equal, run.outputs(buffer), expected))
    wrong = buffer.audit()
    assert len(wrong) == len(buffer.resident_experts()) > 10


def test_devices_with_fewer_experts_share_among_themselves(trace: Any) -> None:
    sites = sites_of(trace, GEOMETRIES[0], device_index=1, num_devices=4)
    assert [site.store.num_experts for site in sites] == [2] * NUM_LAYERS
    assert [site.expert_ids for site in sites] == [[2, 3]] * NUM_LAYERS
    assert not torch.equal(sites[0].store.memory, sites[1].store.memory)


def test_what_is_locked_once_is_unlocked_once(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    unlocked: list[int] = []
    monkeypatch.setattr(expert_store, "LEAST_LOCKED_BYTES", 0)
    monkeypatch.setattr(expert_store, "lock", lambda memory: locked.append(memory.data_ptr()))
    monkeypatch.setattr(expert_store, "unlock", lambda memory: unlocked.append(memory.data_ptr()))
    for site in sites_of(trace, GEOMETRIES[0], pinned=True):
        site.store.close()
    assert unlocked == locked and len(locked) == 1


class Crossings(torch.overrides.TorchFunctionMode):
    """Counts bytes that are brought to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.to and found.device != args[0].device:
            self.num_bytes.append(args[0].numel())
        return found


def test_what_layers_share_comes_over_the_link_once(trace: Any) -> None:
    shared = [site.store for site in sites_of(trace, GEOMETRIES[0])]
    own = [site.store for site in random_sites(trace, GEOMETRIES[0], stack="decoder", seed=3)]
    with Crossings() as crossings:
        found = list(on_device([*shared, *own], "meta"))
    assert crossings.num_bytes == [host_bytes(shared), *(store.memory.numel() for store in own)]
    assert [one.numel() for one in found] == [each.memory.numel() for each in (*shared, *own)]
    assert {one.device.type for one in found} == {"meta"}
    here = list(on_device(shared, "cpu"))
    assert [one.data_ptr() for one in here] == [store.memory.data_ptr() for store in shared]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_layer_has_memory_of_its_own(trace: Any) -> None:
    stores = [site.store for site in sites_of(trace, GEOMETRIES[0], pinned=True)]
    found = list(on_device(stores, "cuda"))
    assert all(torch.equal(one.cpu(), each.memory) for one, each in zip(found, stores, strict=True))
    assert len({one.untyped_storage().data_ptr() for one in found}) == NUM_LAYERS


def test_the_little_that_is_shared_more_follows_from_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def noted(shape: Any, num_experts: int, *given: Any, **options: Any) -> Any:
        made.append(num_experts)
        return make_store(shape, num_experts, *given, **options)

    monkeypatch.setattr(routed_runs, "make_store", noted)
    for layers in (1, 2, 48):
        trace = synthetic_trace(
            tmp_path / f"{layers}.moeprof", num_requests=1, num_sites=layers, num_experts=128,
            top_k=2, prompt_tokens=1, output_tokens=1,
        )  # fmt: skip
        random_sites(trace, ExpertGeometry(d_model=256, d_ff=128), stack="decoder", share_host=True)
    # 196,608 bytes a block; each layer begins 128 x 64 numbers of two bytes behind the last.
    assert made == [128, 129, 128 + -(-47 * 16384 // 196608)]


@pytest.mark.parametrize(
    ("geometry", "counts"),
    [
        # Stores a window of all experts apart: the tenth would begin with a block of the first.
        (ExpertGeometry(d_model=256, d_ff=48, dtype=torch.bfloat16), [64] * 16),
        (GEOMETRIES[0], [8, 8, 7, 7]),
        (GEOMETRIES[0], [7, 8, 1, 7]),
        # Blocks so short that there is no room for as many beginnings.
        (ExpertGeometry(d_model=8, d_ff=8, dtype=torch.bfloat16, gated=False), [4] * 12),
    ],
)
def test_no_layer_has_a_block_of_another(geometry: ExpertGeometry, counts: list[int]) -> None:
    shape = geometry.block_shape
    source = routed_runs._source(shape, max(counts) * len(counts), 0)
    stores = routed_runs._shared_stores(shape, counts, source, pinned=False)
    assert [store.num_experts for store in stores] == counts
    blocks = {
        store.block(expert).numpy().tobytes()
        for store in stores
        for expert in range(store.num_experts)
    }
    assert len(blocks) == sum(counts)
    for store in stores:
        weights = store.all_weights("cpu")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.tensors())
    own = sum(counts) * shape.block_bytes
    # Hardly more than a store of each size, but where blocks are too short for that.
    assert host_bytes(stores) <= (own if shape.block_bytes < 1024 else 0.8 * own)
