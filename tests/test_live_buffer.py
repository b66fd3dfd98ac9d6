"""The live expert buffer against the replay, against no buffer at all, and against sabotage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import expert_buffer, expert_store  # noqa: E402
from moeprof.live.buffer_settings import BufferedSite, BufferSettings  # noqa: E402
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.experts import ExpertWeights, random_experts  # noqa: E402
from moeprof.live.routed_runs import (  # noqa: E402
    ExpertGeometry,
    RoutedStep,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.live.transfers import HostTransfers  # noqa: E402
from moeprof.replay.cache import policies  # noqa: E402
from moeprof.replay.cache.residency import CacheSpec, MissRule, Residency  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = ExpertGeometry(d_model=24, d_ff=16, dtype=torch.float32, bias=True)
KEYS = ["step", "stack", "site", "layer", "expert", "hit"]
EXPERT_BYTES = 4 * (32 * 24 + 24 * 16 + 32 + 24)
ROUNDED_BYTES = 4 * (32 * 24 + 24 * 16) + 256 + 256
CAPACITIES = (1, 3, 6)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("buffer") / "t.moeprof",
        num_requests=6,
        num_sites=2,
        num_experts=8,
        top_k=2,
        batch=3,
        prompt_tokens=5,
        output_tokens=8,
        stacks=("encoder", "decoder"),
        capacity_factor=1.25,
        seed=3,
    )


@pytest.fixture(scope="module")
def steps(trace: Any) -> list[RoutedStep]:
    return steps_of(trace)


def steps_of(trace: Any, **options: Any) -> list[RoutedStep]:
    every = [
        step
        for stack in trace.stacks
        for step in routed_steps(trace, stack=stack, device="cpu", dtype=torch.float32, **options)
    ]
    return sorted(every, key=lambda step: step.step)


def test_many_layers_keep_numbers_finite(tmp_path: Path) -> None:
    trace = synthetic_trace(
        tmp_path / "t.moeprof", num_requests=1, num_sites=64, num_experts=4, output_tokens=2
    )
    steps = steps_of(trace)
    assert all(out.isfinite().all() for out in outputs_of(buffer_of(trace, capacity=2), steps))


def buffer_of(trace: Any, *, settings: Any = None, **options: Any) -> ExpertBuffer:
    share = {name: options[name] for name in ("device_index", "num_devices") if name in options}
    sites = [
        site
        for seed, stack in enumerate(trace.stacks)
        for site in random_sites(trace, GEOMETRY, stack=stack, seed=seed, **share)
    ]
    return ExpertBuffer(sites, settings or BufferSettings(**options), device="cpu")


def outputs_of(buffer: ExpertBuffer, steps: Sequence[RoutedStep]) -> list[Any]:
    hidden = starting_rows(steps, GEOMETRY, "cpu")
    return [
        out for step in run_steps(buffer, steps, hidden, keep_outputs=True) for out in step.outputs
    ]


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def unbuffered(trace: Any, steps: list[RoutedStep]) -> list[Any]:
    return outputs_of(buffer_of(trace, capacity=None), steps)


def by_hand(experts: ExpertWeights, hidden: Any, ids: Any, weights: Any) -> Any:
    """One token at a time, in double precision."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    exact = experts.to(dtype=torch.float64)
    for token in range(hidden.shape[0]):
        for slot in range(ids.shape[1]):
            if (expert := int(ids[token, slot])) >= 0:
                row = exact.run(expert, hidden[token : token + 1].double())
                out[token] += row[0] * weights[token, slot].double()
    return out


@pytest.mark.parametrize("gated", [True, False])
def test_outputs_are_those_of_the_experts(gated: bool) -> None:
    experts = random_experts(
        num_experts=6, d_model=16, d_ff=8, gated=gated, bias=True, dtype=torch.float32
    )
    store = expert_store.store_of_weights(experts)
    site = BufferedSite(site=0, stack="decoder", layer=0, store=store)
    buffer = ExpertBuffer([site], BufferSettings(capacity=2), device="cpu")
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 7, 3):
        hidden = torch.randn(tokens, 16, generator=generator)
        ids = torch.rand(tokens, 6, generator=generator).topk(3).indices
        ids[torch.rand(tokens, 3, generator=generator) < 0.3] = -1
        weights = torch.rand(tokens, 3, generator=generator)
        found = buffer.run(0, hidden, ids, weights)
        expected = by_hand(experts, hidden, ids, weights)
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    nothing = buffer.run(0, hidden, torch.full_like(ids, -1), weights)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_outputs_are_those_of_the_paper_s_kernel_to_the_bit() -> None:
    kernels = pytest.importorskip("moeprof.live.kernels")
    experts = random_experts(num_experts=5, d_model=32, d_ff=16, dtype=torch.bfloat16)
    site = BufferedSite(
        site=0, stack="decoder", layer=0, store=expert_store.store_of_weights(experts)
    )
    buffer = ExpertBuffer([site], BufferSettings(capacity=2), device="cpu")
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 32, generator=generator).bfloat16()
    ids = torch.rand(9, 5, generator=generator).topk(2).indices
    ids[4] = -1
    weights = torch.rand(9, 2, generator=generator).bfloat16()
    expected = kernels.KERNELS["dynamic_loop"](hidden, ids, weights, experts)
    assert torch.equal(buffer.run(0, hidden, ids, weights), expected)


@pytest.mark.parametrize(
    ("scope", "initial"), [("layer", "empty"), ("stack", "empty"), ("global", "full")]
)
def test_lookups_equal_the_replay_row_by_row(
    trace: Any, steps: list[RoutedStep], unbuffered: list[Any], scope: str, initial: str
) -> None:
    names = list(policies.POLICIES)
    predicted = moeprof.replay.buffering(
        trace,
        policies=names,
        capacities=CAPACITIES,
        scope=scope,
        semantics="sequential",
        initial=initial,
        jobs=1,
    )
    for policy in names:
        for capacity in CAPACITIES:
            buffer = buffer_of(
                trace, capacity=capacity, policy=policy, scope=scope, initial=initial, future=trace
            )
            assert same(outputs_of(buffer, steps), unbuffered), (policy, capacity)
            found = buffer.lookups()
            expected = predicted.lookups(policy, capacity)
            assert found[KEYS].values.tolist() == expected[KEYS].values.tolist()
            assert buffer.audit() == []
            misses = int((~expected["hit"]).sum())
            assert buffer.counts().copies == misses
            assert buffer.counts().copied_bytes == misses * ROUNDED_BYTES


def test_a_share_of_the_experts_equals_its_device_in_the_replay(trace: Any) -> None:
    predicted = moeprof.replay.buffering(
        trace,
        policies=["paper", "random"],
        capacities=[1, 2],
        semantics="sequential",
        devices=4,
        jobs=1,
    )
    for policy in ("paper", "random"):
        for device in (0, 3):
            options = {"device_index": device, "num_devices": 4}
            buffer = buffer_of(trace, capacity=1, policy=policy, future=trace, **options)
            outputs_of(buffer, steps_of(trace, **options))
            expected = predicted.lookups(policy, 1)
            expected = expected[expected["device"] == device]
            assert buffer.lookups()[KEYS].values.tolist() == expected[KEYS].values.tolist()


def test_random_evictions_need_no_trace(trace: Any, steps: list[RoutedStep]) -> None:
    predicted = moeprof.replay.buffering(
        trace, policies=["random"], capacities=[3], semantics="sequential", jobs=1
    ).lookups("random", 3)
    buffer = buffer_of(trace, capacity=3, policy="random")
    outputs_of(buffer, steps)
    assert buffer.lookups()[KEYS].values.tolist() == predicted[KEYS].values.tolist()


@pytest.mark.parametrize("policy", ["lru", "lfu", "min"])
def test_capacities_as_shares_equal_the_replay(
    trace: Any, steps: list[RoutedStep], policy: str
) -> None:
    predicted = moeprof.replay.buffering(
        trace, policies=[policy], capacities=[0.4], semantics="sequential", jobs=1
    )
    buffer = buffer_of(trace, capacity=0.4, policy=policy, future=trace)
    outputs_of(buffer, steps)
    expected = predicted.lookups(policy, 0.4)
    assert buffer.lookups()[KEYS].values.tolist() == expected[KEYS].values.tolist()


class CopyWitness(TorchDispatchMode):
    """Counts copies of that many bytes between tensors of bytes."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target = args[0]
            self.count += target.dtype == torch.uint8 and target.numel() == self.num_bytes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_step_copies_what_the_replay_predicts(
    trace: Any, steps: list[RoutedStep], capacity: int
) -> None:
    predicted = moeprof.replay.buffering(
        trace, policies=["lru"], capacities=[capacity], semantics="sequential", jobs=1
    ).lookups("lru", capacity)
    misses = (~predicted["hit"]).groupby(predicted["step"]).sum()
    buffer = buffer_of(trace, capacity=capacity)
    hidden = starting_rows(steps, GEOMETRY, "cpu")
    for step in steps:
        with CopyWitness(ROUNDED_BYTES) as witness:
            list(run_steps(buffer, [step], hidden))
        assert witness.count == misses.get(step.step, 0)


def test_a_wrong_slot_map_is_noticed(
    trace: Any, steps: list[RoutedStep], unbuffered: list[Any]
) -> None:
    buffer = buffer_of(trace, capacity=6)
    half = len(steps) // 2
    hidden = starting_rows(steps, GEOMETRY, "cpu")
    outputs = [
        out
        for step in run_steps(buffer, steps[:half], hidden, keep_outputs=True)
        for out in step.outputs
    ]
    assert same(outputs, unbuffered[: len(outputs)])
    log = buffer.lookups()
    # Two experts of one site that the next step will find.
    coming = {(p.site, int(e)) for s in steps[half:] for p in s.passes for e in p.ids.unique()}
    site = int(log["site"].iloc[-1])
    resident = [e for s, e, _ in buffer._residency.residents() if s == site]  # type: ignore[union-attr]
    pair = [expert for expert in resident if (site, expert) in coming][:2]
    buffer.misplace((site, pair[0]), (site, pair[1]))
    assert buffer.audit() == [(site, pair[0]), (site, pair[1])]
    rest = [
        out
        for step in run_steps(buffer, steps[half:], hidden, keep_outputs=True)
        for out in step.outputs
    ]
    assert not same(rest, unbuffered[len(outputs) :])


class LateTransfers(HostTransfers):
    """Copies as late as they are allowed to: when somebody waits for them."""

    def __init__(self, slots: Any) -> None:
        super().__init__(slots)
        self.open: dict[int, Any] = {}

    def load(self, slot: int, block: Any) -> None:
        self.await_load(slot)
        self.open[slot] = block

    def await_load(self, slot: int) -> None:
        if slot in self.open:
            super().load(slot, self.open.pop(slot))

    def finish(self) -> None:
        for slot in list(self.open):
            self.await_load(slot)


class OrderedTransfers(HostTransfers):
    """Notes the order of copies and reads; a copy spoils what is in the slot at once."""

    def __init__(self, slots: Any) -> None:
        super().__init__(slots)
        self.log: list[tuple[str, int]] = []

    def load(self, slot: int, block: Any) -> None:
        self.log.append(("load", slot))
        super().load(slot, block)

    def await_load(self, slot: int) -> None:
        self.log.append(("await", slot))

    def release(self, slot: int) -> None:
        self.log.append(("release", slot))


@pytest.mark.parametrize("transfers", [HostTransfers, LateTransfers])
@pytest.mark.parametrize("miss", ["load", "split"])
@pytest.mark.parametrize("staging", [0, 1, 3])
def test_copies_may_be_early_or_late(
    trace: Any,
    steps: list[RoutedStep],
    unbuffered: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    transfers: Any,
    miss: str,
    staging: int,
) -> None:
    monkeypatch.setattr(expert_buffer, "open_transfers", transfers)
    for policy, capacity in (("lru", 1), ("lru", 3), ("paper", 2), ("lfu", 4)):
        buffer = buffer_of(trace, capacity=capacity, policy=policy, miss=miss, staging=staging)
        assert same(outputs_of(buffer, steps), unbuffered)
        assert buffer.audit() == []


def test_slots_are_released_before_they_are_overwritten(
    trace: Any, steps: list[RoutedStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_buffer, "open_transfers", OrderedTransfers)
    buffer = buffer_of(trace, capacity=3, policy="lru")
    outputs_of(buffer, steps)
    log = buffer._transfers.log  # type: ignore[union-attr]
    state: dict[int, str] = {}
    ahead = 0
    for position, (what, slot) in enumerate(log):
        before = state.get(slot, "")
        if what == "load":
            assert before in ("", "release")
            ahead += log[position + 1] != ("await", slot)
        elif what == "await":
            assert before in ("load", "release")
        else:
            assert before == "await"
        state[slot] = what
    assert ahead > 0, "no copy was asked for before its turn"


def test_host_computes_what_is_missing(
    trace: Any, steps: list[RoutedStep], unbuffered: list[Any]
) -> None:
    for policy in ("pinned", "lru", "min_bypass"):
        loaded = buffer_of(trace, capacity=3, policy=policy, future=trace)
        outputs_of(loaded, steps)
        buffer = buffer_of(trace, capacity=3, policy=policy, miss="host", future=trace)
        outputs = outputs_of(buffer, steps)
        for found, expected in zip(outputs, unbuffered, strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        log, counts = buffer.lookups(), buffer.counts()
        assert log[KEYS].equals(loaded.lookups()[KEYS])
        assert (log["on_host"] == ~log["hit"]).all()
        assert counts.host_experts == counts.lookups - counts.hits
        assert counts.host_rows == log.loc[log["on_host"], "rows"].sum()
        assert buffer.audit() == []
        # What is not resident after its dispatch is not copied: the replay's streamed bytes.
        table = moeprof.replay.buffering(
            trace, policies=[policy], capacities=[3], semantics="sequential", jobs=1
        ).table
        total = table[table["phase"] == "all"].iloc[0]
        expert_bytes = trace.sites[0].expert_bytes
        kept = (total["bytes_moved"] - total["bytes_streamed"]) // expert_bytes
        assert counts.copies == kept
        assert counts.copies < counts.lookups - counts.hits


def test_split_sends_small_blocks_to_the_host(trace: Any, steps: list[RoutedStep]) -> None:
    buffer = buffer_of(trace, capacity=2, miss="split", host_rows=2)
    outputs_of(buffer, steps)
    log = buffer.lookups()
    missed = log[~log["hit"]]
    assert (missed["on_host"] == (missed["rows"] <= 2)).all()
    assert 0 < missed["on_host"].sum() < len(missed)
    assert missed.loc[~missed["on_host"], "copied"].all()


def test_memory_equals_the_prediction_to_the_byte(trace: Any) -> None:
    table = moeprof.replay.buffering(
        trace, policies=["lru"], capacities=[3], semantics="sequential", jobs=1
    ).table
    asked = int(table["capacity_bytes"].iloc[0]) // trace.sites[0].expert_bytes * EXPERT_BYTES
    for staging in (0, 2):
        buffer = buffer_of(trace, capacity=3, staging=staging)
        memory = buffer.memory()
        num_caches, num_experts = len(trace.sites), 8
        assert memory.expert_bytes == num_caches * num_experts * EXPERT_BYTES
        assert memory.cache_bytes == num_caches * 3 * EXPERT_BYTES == asked
        assert memory.staging_bytes == staging * EXPERT_BYTES
        assert memory.saved_bytes == memory.expert_bytes - asked - staging * EXPERT_BYTES
        held = sum(pool.numel() for pool in buffer._pools)
        assert held == memory.cache_bytes + memory.staging_bytes + memory.padding_bytes
        assert memory.host_bytes == num_caches * num_experts * ROUNDED_BYTES


def test_without_a_buffer_nothing_is_saved(trace: Any) -> None:
    memory = buffer_of(trace, capacity=None).memory()
    assert memory.saved_bytes == 0
    assert memory.cache_bytes + memory.padding_bytes == memory.host_bytes


def test_the_paper_s_static_memory(tmp_path: Path) -> None:
    """Arithmetic only: 6 layers of 16 experts of 64 MiB and their biases (arXiv 2303.06182, VI)."""
    trace = synthetic_trace(
        tmp_path / "t.moeprof",
        num_requests=1,
        num_sites=6,
        num_experts=16,
        prompt_tokens=1,
        output_tokens=1,
    )
    geometry = ExpertGeometry(
        d_model=2048, d_ff=8192, gated=False, bias=True, activation="relu", dtype=torch.float16
    )
    size = geometry.block_shape.expert_bytes
    assert geometry.block_shape.block_bytes == size
    assert size / 2**20 == pytest.approx(64.02, abs=0.005)
    saved = {c: (16 - c) * size * len(trace.sites) / 2**30 for c in (1, 10)}
    assert saved[1] == pytest.approx(5.627, abs=0.001)
    assert saved[10] == pytest.approx(2.251, abs=0.001)


def test_steady_state_takes_nothing_new(trace: Any, steps: list[RoutedStep]) -> None:
    buffer = buffer_of(trace, capacity=3, miss="split")
    buffer.reserve(max(p.ids.numel() for s in steps for p in s.passes))
    outputs_of(buffer, steps)
    before = (buffer.workspace_growths(), [slot.data_ptr() for slot in buffer._transfers.slots])  # type: ignore[union-attr]
    buffer.reset()
    first = buffer.lookups()
    assert first.empty
    outputs_of(buffer, steps)
    assert buffer.counts().waits == buffer.counts().dispatches
    after = (buffer.workspace_growths(), [slot.data_ptr() for slot in buffer._transfers.slots])  # type: ignore[union-attr]
    assert after == before


def test_reset_starts_anew(trace: Any, steps: list[RoutedStep]) -> None:
    buffer = buffer_of(trace, capacity=3, policy="random", initial="full")
    once = outputs_of(buffer, steps)
    log = buffer.lookups()
    buffer.reset()
    assert buffer.counts().initial_copies == 3 * len(trace.sites)
    assert same(outputs_of(buffer, steps), once)
    assert buffer.lookups().equals(log)


def test_copies_can_be_left_out_as_a_control(
    trace: Any, steps: list[RoutedStep], unbuffered: list[Any]
) -> None:
    buffer = buffer_of(trace, capacity=2, initial="full")
    assert same(outputs_of(buffer, steps), unbuffered)
    log, counts = buffer.lookups(), buffer.counts()
    buffer.leave_out_copies(left_out=True)
    with CopyWitness(ROUNDED_BYTES) as witness:
        outputs = outputs_of(buffer, steps)
    assert witness.count == 0
    assert not same(outputs, unbuffered)
    assert buffer.lookups().equals(log)
    assert buffer.counts().copied_bytes == counts.copied_bytes > 0
    buffer.leave_out_copies(left_out=False)
    assert same(outputs_of(buffer, steps), unbuffered)


def test_shared_host_copies_take_less_memory(trace: Any) -> None:
    own, shared = (
        ExpertBuffer(
            random_sites(trace, GEOMETRY, stack="decoder", share_host=share),
            BufferSettings(capacity=2),
            device="cpu",
        ).memory()
        for share in (False, True)
    )
    # Two sites of eight experts, or those of one and the little that the other begins further on.
    block = GEOMETRY.block_shape.block_bytes
    assert (own.host_bytes, shared.host_bytes) == (16 * block, 9 * block)
    assert own.expert_bytes == shared.expert_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "there is no policy"),
        ({"scope": "expert"}, "there is no scope"),
        ({"miss": "skip"}, "there is no miss action"),
        ({"initial": "warm"}, "there is no initial"),
        ({"policy": "min"}, "planned on a trace"),
        ({"capacity": 0}, "holds nothing"),
        ({"policy": "layers", "staging": 0}, "needs staging"),
        ({"capacity": 0.5, "num_devices": 2}, "share of all devices"),
    ],
)
def test_refusals(trace: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        buffer_of(trace, **{"capacity": 2, **options})


def test_bypassed_experts_pass_through_staging_slots() -> None:
    """By hand: one cache of one slot that keeps expert 1 only, one slot beside it."""

    def machine() -> policies.Machine:
        return policies.Static([1] * 4, 1, kept=[1])

    cache = CacheSpec(sites=((0, 4),), capacity=1, pool=0, machine=machine)
    residency = Residency([cache], [2])
    first = residency.plan(0, [0, 1, 2], [1, 1, 1], MissRule())
    assert [(p.expert, p.hit, p.slot, p.loads, p.after) for p in first] == [
        (0, False, 0, True, -1),
        (1, False, 1, True, -1),
        (2, False, 0, True, 0),
    ]
    second = residency.plan(0, [1, 3], [1, 1], MissRule())
    assert [(p.hit, p.slot, p.loads) for p in second] == [(True, 1, False), (False, 0, True)]
    assert residency.residents() == [(0, 1, 1)]


def test_experts_of_random_sites_differ(trace: Any) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    blocks = [site.store.block(expert) for site in sites for expert in range(8)]
    assert len({block.numpy().tobytes() for block in blocks}) == len(blocks)
    flat = torch.cat([site.store.weights(0).w_in.reshape(-1) for site in sites])
    assert float(flat.std()) == pytest.approx(24**-0.5, rel=0.1)


def test_weights_come_from_the_trace(trace: Any, steps: list[RoutedStep]) -> None:
    dispatches = list(trace.dispatches(weights=True))
    passes = [each for step in steps for each in step.passes]
    assert len(dispatches) == len(passes)
    for dispatch, each in zip(dispatches, passes, strict=True):
        assert np.array_equal(dispatch.experts, each.ids.numpy())
        assert np.array_equal(dispatch.weights, each.weights.numpy())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_after_half_a_dispatch_nothing_is_run_before_a_reset(
    trace: Any, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    hidden, gates = torch.randn(2, 24), torch.ones(2, 2)
    several, last = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[2, -1], [-1, -1]])
    expected = ExpertBuffer(sites, BufferSettings(capacity=None), device="cpu").run(
        sites[0].site, hidden, last, gates
    )
    buffer = ExpertBuffer(sites, BufferSettings(capacity=1, prefetch=prefetch), device="cpu")

    def without_memory(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(ExpertWeights, "run", without_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            buffer.run(sites[0].site, hidden, several, gates)
    # Expert 2 has its slot, but was never copied.
    for _ in range(2):
        with pytest.raises(moeprof.MoeprofError, match="broke off halfway") as caught:
            buffer.run(sites[0].site, hidden, last, gates)
        assert caught.value.hint
    buffer.reset()
    assert torch.equal(buffer.run(sites[0].site, hidden, last, gates), expected)
    assert not buffer.audit()


@pytest.mark.parametrize("capacity", [None, 2])
def test_an_expert_that_there_is_not_is_refused(trace: Any, capacity: int | None) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    buffer = ExpertBuffer(sites, BufferSettings(capacity=capacity), device="cpu")
    hidden, gates = torch.randn(2, 24), torch.ones(2, 2)
    wrong, right = torch.tensor([[0, 8], [-1, 1]]), torch.tensor([[0, 7], [-1, 1]])
    for ids in (wrong, torch.tensor([[1 << 40, 0], [1, -1]])):
        with pytest.raises(
            moeprof.MoeprofError, match="chose an expert that there is not"
        ) as caught:
            buffer.run(sites[0].site, hidden, ids, gates)
        assert caught.value.hint
    # Nothing was decided: what follows runs.
    expected = torch.zeros(2, 24)
    for token, expert in ((0, 0), (0, 7), (1, 1)):
        expected[token] += sites[0].store.weights(expert).run(0, hidden[token : token + 1])[0]
    found = buffer.run(sites[0].site, hidden, right, gates)
    torch.testing.assert_close(found, expected)
    assert buffer.counts().dispatches == (1 if capacity else 0)


@pytest.mark.parametrize("closed", [False, True])
def test_a_buffer_that_goes_waits_for_its_device(
    trace: Any, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    # Those of other tests.
    gc.collect()
    waited: list[Any] = []
    monkeypatch.setattr(expert_buffer, "wait_for", waited.append)
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2), device="cpu")
    if closed:
        # Waits for its own work itself; and again later would do no harm, but in a graph's capture.
        buffer.close()
    del buffer
    gc.collect()
    assert waited == ([] if closed else [torch.device("cpu")])


def test_a_closed_buffer_tells_what_it_did_and_holds_nothing(trace: Any) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2), device="cpu")
    hidden, ids, gates = torch.randn(2, 24), torch.tensor([[0, 7], [-1, 1]]), torch.ones(2, 2)
    buffer.begin_step()
    buffer.run(sites[0].site, hidden, ids, gates)
    told = buffer.counts(), buffer.memory(), buffer.workspace_growths()
    lookups = buffer.lookups()
    held = [weakref.ref(site.store.memory) for site in sites]
    for _ in range(2):
        buffer.close()
    del sites
    gc.collect()
    assert not any(one() is not None for one in held)
    assert (buffer.counts(), buffer.memory(), buffer.workspace_growths()) == told
    assert told[0].lookups == 3 and told[1].host_bytes > 0
    pd.testing.assert_frame_equal(buffer.lookups(), lookups)
    asked = (
        lambda: buffer.run(0, hidden, ids, gates),
        lambda: buffer.run_sorted(0, hidden, torch.tensor([2] * 8)),
        buffer.reset,
        buffer.audit,
        buffer.resident_experts,
    )
    for ask in asked:
        with pytest.raises(moeprof.MoeprofError, match="the expert buffer is closed") as caught:
            ask()
        assert caught.value.hint


@pytest.mark.parametrize("capacity", [None, 2])
def test_dispatches_take_no_memory_beyond_what_was_reserved(
    trace: Any, capacity: int | None
) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    buffer = ExpertBuffer(sites, BufferSettings(capacity=capacity), device="cpu")
    buffer.reserve(400)
    reserved = buffer.memory()
    ids = torch.arange(400).view(200, 2) % 8
    buffer.run(sites[0].site, torch.randn(200, 24), ids, torch.ones(200, 2))
    assert buffer.memory() == reserved


def test_nobody_waits_in_the_capture_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(expert_buffer, "wait_for", waited.append)
    device = torch.device("cuda", 1)
    for is_capturing in (True, False):
        monkeypatch.setattr(
            expert_buffer.torch.cuda,
            "is_current_stream_capturing",
            lambda: is_capturing,  # noqa: B023
        )
        expert_buffer._wait_outside_captures(device)
    assert waited.count(device) == 1


def test_tensors_that_do_not_fit_are_refused(trace: Any) -> None:
    sites = random_sites(trace, GEOMETRY, stack="decoder")
    buffer = ExpertBuffer(sites, BufferSettings(capacity=2), device="cpu")
    hidden, ids, gates = torch.randn(6, 24), torch.zeros(6, 2).long(), torch.ones(6, 2)
    for given in (
        (hidden, ids, torch.ones(6, 4)),
        (hidden, ids, torch.ones(12, 1)),
        (hidden, ids, torch.ones(3, 4)),
        (torch.randn(9, 24), ids, gates),
        (torch.randn(4, 24), ids, gates),
        (torch.randn(6, 8), ids, gates),
        (hidden, ids.double(), gates),
    ):
        with pytest.raises(UsageError):
            buffer.run(sites[0].site, *given)
    with pytest.raises(UsageError, match="rows end at 9, but there are 6"):
        buffer.run_sorted(sites[0].site, hidden, torch.tensor([2, 4, 6, 9, 9, 9, 9, 9]))
    # Nothing was decided, and what fits runs.
    assert buffer.counts().lookups == 0
    assert buffer.run(sites[0].site, hidden, ids, gates).shape == (6, 24)
