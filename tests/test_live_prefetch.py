"""Copies ahead of their lookup, live: same bits, same hits, the planned copies, slots in order."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import UsageError  # noqa: E402
from moeprof.live import expert_buffer  # noqa: E402
from moeprof.live.buffer_settings import BufferedSite, BufferSettings, described  # noqa: E402
from moeprof.live.expert_buffer import ExpertBuffer  # noqa: E402
from moeprof.live.expert_store import store_of_weights  # noqa: E402
from moeprof.live.experts import random_experts  # noqa: E402
from moeprof.live.kernels.streamed import STREAMED_TOKENS  # noqa: E402
from moeprof.live.routed_runs import (  # noqa: E402
    ExpertGeometry,
    RoutedStep,
    random_sites,
    routed_steps,
    run_steps,
    starting_rows,
)
from moeprof.live.transfers import HostTransfers  # noqa: E402
from moeprof.replay.buffer_plans import plan_buffer, read_routed_rows  # noqa: E402
from moeprof.replay.cache import policies  # noqa: E402
from moeprof.replay.serving_settings import BufferingSetting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

HAS_TRITON = importlib.util.find_spec("triton") is not None
GEOMETRY = ExpertGeometry(d_model=24, d_ff=16, dtype=torch.float32, bias=True)
BLOCK_BYTES = GEOMETRY.block_shape.block_bytes
KEYS = ["step", "stack", "site", "layer", "expert", "hit"]
HALF = torch.float16

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# Of memory of the host, with a stand-in for the device's copies.
interprets = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for a GPU here"
)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return synthetic_trace(
        tmp_path_factory.mktemp("ahead") / "t.moeprof",
        num_requests=5,
        num_sites=3,
        num_experts=8,
        top_k=2,
        batch=2,
        prompt_tokens=5,
        output_tokens=8,
        stacks=("encoder", "decoder"),
        seed=4,
    )


def steps_of(trace: Any, stacks: Sequence[str]) -> list[RoutedStep]:
    every = [
        step
        for stack in stacks
        for step in routed_steps(trace, stack=stack, device="cpu", dtype=torch.float32)
    ]
    return sorted(every, key=lambda step: step.step)


@pytest.fixture(scope="module")
def steps(trace: Any) -> list[RoutedStep]:
    return steps_of(trace, trace.stacks)


def buffer_of(trace: Any, stacks: Sequence[str] | None = None, **options: Any) -> ExpertBuffer:
    sites = [
        site
        for seed, stack in enumerate(trace.stacks)
        for site in random_sites(trace, GEOMETRY, stack=stack, seed=seed)
        if stacks is None or stack in stacks
    ]
    return ExpertBuffer(sites, BufferSettings(future=trace, **options), device="cpu")


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


class CopyWitness(TorchDispatchMode):
    """Counts copies of an expert's bytes between tensors of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.count += args[0].dtype == torch.uint8 and args[0].numel() == BLOCK_BYTES
        return func(*args, **(kwargs or {}))


def check_counts(buffer: ExpertBuffer) -> None:
    log, counts = buffer.lookups(), buffer.counts()
    assert (log[["hit", "copied", "ahead"]].sum(axis=1) <= 1).all()
    assert not (log["ahead"] & log["on_host"]).any()
    assert counts.prefetch_used == log["ahead"].sum() <= counts.prefetches
    assert counts.copies == counts.prefetches + log["copied"].sum()
    assert counts.copied_bytes == counts.copies * BLOCK_BYTES
    assert counts.prefetch_bytes == counts.prefetches * BLOCK_BYTES


@pytest.mark.parametrize(
    ("scope", "initial"), [("layer", "empty"), ("stack", "empty"), ("global", "full")]
)
def test_hits_are_those_of_the_replay_without_it(
    trace: Any, steps: list[RoutedStep], unbuffered: list[Any], scope: str, initial: str
) -> None:
    names = list(policies.POLICIES)
    options: dict[str, Any] = {"scope": scope, "initial": initial}
    predicted = moeprof.replay.buffering(
        trace, policies=names, capacities=(1, 3), semantics="sequential", jobs=1, **options
    )
    used = 0
    for policy in names:
        for capacity, prefetch in ((1, 3), (3, 1)):
            buffer = buffer_of(
                trace, capacity=capacity, policy=policy, prefetch=prefetch, **options
            )
            with CopyWitness() as witness:
                assert same(outputs_of(buffer, steps), unbuffered), (policy, capacity)
            found, expected = buffer.lookups(), predicted.lookups(policy, capacity)
            assert found[KEYS].values.tolist() == expected[KEYS].values.tolist()
            assert (found["hit"] | found["copied"] | found["ahead"]).all()
            assert buffer.audit() == []
            check_counts(buffer)
            assert witness.count == buffer.counts().copies
            used += buffer.counts().prefetch_used
    assert used > 50


@pytest.mark.parametrize("policy", ["lru", "lfu", "paper", "min", "min_bypass", "pinned"])
@pytest.mark.parametrize("miss", ["load", "host", "split"])
def test_every_step_copies_what_is_planned(trace: Any, policy: str, miss: str) -> None:
    own = steps_of(trace, ["decoder"])
    hidden = starting_rows(own, GEOMETRY, "cpu")
    routed = read_routed_rows(trace, "decoder")
    for capacity, prefetch, initial in ((2, 2, "empty"), ("12.5%", 4, "full"), (0.05, 1, "empty")):
        options: dict[str, Any] = {
            "capacity": capacity, "policy": policy, "miss": miss, "prefetch": prefetch,
            "initial": initial,
        }  # fmt: skip
        plan = plan_buffer(trace, routed, BufferingSetting(**options))
        buffer = buffer_of(trace, ["decoder"], **options)
        planned = plan.copies_per_step(routed).tolist()
        for step, copies in zip(own, planned, strict=True):
            with CopyWitness() as witness:
                list(run_steps(buffer, [step], hidden))
            assert witness.count == copies
        log = buffer.lookups()
        for name, column in (("hit", plan.hit), ("copied", plan.loads), ("ahead", plan.ahead.used),
                             ("on_host", plan.on_host)):  # fmt: skip
            assert log[name].tolist() == column.astype(bool).tolist()
        assert buffer.counts().prefetches == len(plan.ahead.dispatch)
        assert sum(planned) == buffer.counts().copies
        memory = buffer.memory()
        expert_bytes = GEOMETRY.block_shape.expert_bytes
        assert memory.cache_bytes == plan.num_slots * expert_bytes
        assert memory.staging_bytes == plan.num_staging * expert_bytes
        held = sum(pool.numel() for pool in buffer._pools)
        assert held == memory.cache_bytes + memory.staging_bytes + memory.padding_bytes
        check_counts(buffer)


def test_slots_are_taken_for_what_is_ahead(trace: Any) -> None:
    for policy, staging in (("lru", 0), ("layers", 2)):
        plain, ahead = (
            buffer_of(trace, capacity=2, policy=policy, prefetch=prefetch).memory()
            for prefetch in (0, 3)
        )
        expert_bytes = GEOMETRY.block_shape.expert_bytes
        assert plain.staging_bytes == staging * expert_bytes
        assert ahead.staging_bytes == (staging + 3) * expert_bytes
        assert ahead.cache_bytes == plain.cache_bytes
        assert plain.saved_bytes - ahead.saved_bytes == 3 * expert_bytes


def test_nothing_is_taken_in_steady_state_and_runs_repeat(
    trace: Any, steps: list[RoutedStep]
) -> None:
    buffer = buffer_of(trace, capacity=2, prefetch=2)
    buffer.reserve(max(p.ids.numel() for s in steps for p in s.passes))
    once = outputs_of(buffer, steps)
    log, counts = buffer.lookups(), buffer.counts()
    places = [slot.data_ptr() for slot in buffer._transfers.slots]  # type: ignore[union-attr]
    growths = buffer.workspace_growths()
    buffer.reset()
    assert buffer.counts().prefetches == buffer.counts().copies == 0
    assert same(outputs_of(buffer, steps), once)
    again = buffer.counts()
    assert buffer.lookups().equals(log)
    assert (again.copies, again.prefetches, again.prefetch_used) == (
        counts.copies, counts.prefetches, counts.prefetch_used,
    )  # fmt: skip
    assert [slot.data_ptr() for slot in buffer._transfers.slots] == places  # type: ignore[union-attr]
    assert buffer.workspace_growths() == growths


class LateTransfers(HostTransfers):
    """Copies of one stream, in order and as late as they may be; readers end as late as they may.

    A slot that a dispatch has read is being read until somebody waits: the host, which does before
    each dispatch, or the stream of copies, for a mark or for the reader of the slot.
    """

    def __init__(self, slots: Any) -> None:
        super().__init__(slots)
        self.queue: list[tuple[int, Any]] = []
        self.being_read: dict[int, int] = {}
        self.launched: list[int] = []
        self.num_marks = 0
        self.waited = -1
        self.num_open_at_begin = 0

    def begin(self) -> None:
        self.being_read.clear()
        self.num_open_at_begin += bool(self.queue)

    def _ask(self, slot: int, block: Any) -> None:
        assert self.being_read.get(slot, -1) <= self.waited, "overwritten while it is read"
        self.queue.append((slot, block))

    def load(self, slot: int, block: Any) -> None:
        self.being_read.pop(slot, None)
        self._ask(slot, block)

    def load_all(self, copies: Any, *, behind: Any = None) -> None:
        self.waited = max(self.waited, -1 if behind is None else behind)
        for slot, block in copies:
            self._ask(slot, block)

    def _arrive(self, slot: int) -> None:
        while any(waiting == slot for waiting, _ in self.queue):
            own, block = self.queue.pop(0)
            self.slots[own][: block.numel()].copy_(block)

    def await_load(self, slot: int) -> None:
        self._arrive(slot)

    def release(self, slot: int) -> None:
        # Waited for by its slot.
        self.being_read[slot] = self.waited

    def await_all(self, slots: Any) -> None:
        for slot in slots:
            self._arrive(slot)
        self.launched += slots

    def mark(self) -> Any:
        self.num_marks += 1
        self.being_read |= dict.fromkeys(self.launched, self.num_marks)
        self.launched = []
        return self.num_marks

    def finish(self) -> None:
        for slot, _ in list(self.queue):
            self._arrive(slot)


@pytest.mark.parametrize("miss", ["load", "split"])
@pytest.mark.parametrize("staging", [0, 1])
def test_copies_ahead_may_be_late(
    trace: Any,
    steps: list[RoutedStep],
    unbuffered: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    miss: str,
    staging: int,
) -> None:
    monkeypatch.setattr(expert_buffer, "open_transfers", LateTransfers)
    for policy, capacity, prefetch in (("lru", 1, 2), ("paper", 2, 1), ("lfu", 3, 4)):
        buffer = buffer_of(
            trace, capacity=capacity, policy=policy, miss=miss, staging=staging, prefetch=prefetch
        )
        assert same(outputs_of(buffer, steps), unbuffered)
        assert buffer.counts().prefetch_used > 0
        transfers: Any = buffer._transfers
        assert transfers.num_open_at_begin > 0, "no copy was under way from one site to the next"
        # Copies that nobody reads are under way here too.
        outputs_of(buffer, steps[: len(steps) // 2])
        assert transfers.queue
        buffer.reset()
        assert not transfers.queue
        assert same(outputs_of(buffer, steps), unbuffered)
        assert buffer.audit() == []


def half_sites(num_sites: int, num_experts: int) -> list[BufferedSite]:
    return [
        BufferedSite(
            site=site,
            stack="decoder",
            layer=site,
            store=store_of_weights(
                random_experts(
                    num_experts=num_experts, d_model=32, d_ff=16, gated=True, dtype=HALF, seed=site
                )
            ),
        )
        for site in range(num_sites)
    ]


def dispatches(num_sites: int, num_experts: int) -> Iterator[tuple[int, Any, Any, Any]]:
    """Passes that repeat themselves, one of them large, one without a site, some without tokens."""
    generator = torch.Generator().manual_seed(7)
    for index in range(7):
        for site in range(num_sites):
            if (index, site) == (3, 1):
                continue
            tokens = STREAMED_TOKENS + 3 if index == 4 else 2
            hidden = torch.randn(tokens, 32, generator=generator).to(HALF)
            first = torch.randint(2, (1,), generator=generator) * 3 + site
            ids = (first + torch.arange(tokens * 2).view(tokens, 2)) % num_experts
            if tokens > 2:
                ids %= 4
            if (index, site) in {(2, 0), (5, 2)}:
                ids = torch.full_like(ids, -1)
            weights = torch.rand(tokens, 2, generator=generator).to(HALF)
            yield site, hidden, ids, weights


def off_by(found: Any, expected: Any) -> float:
    distance = (found.double() - expected.double()).norm()
    return float(distance) / max(float(expected.double().norm()), 1e-9)


@needs_triton
@interprets
@pytest.mark.parametrize(("policy", "miss"), [("lru", "load"), ("layers", "split")])
def test_dispatches_in_pieces(monkeypatch: pytest.MonkeyPatch, policy: str, miss: str) -> None:
    sites = half_sites(3, 8)
    settings = BufferSettings(capacity=2, policy=policy, miss=miss)
    plain = ExpertBuffer(sites, settings, device="cpu")
    for given in dispatches(3, 8):
        plain.run(*given)
    monkeypatch.setattr(expert_buffer, "can_stream", lambda *_: True)
    monkeypatch.setattr(expert_buffer, "open_transfers", LateTransfers)
    whole = ExpertBuffer(sites, BufferSettings(capacity=None), device="cpu")
    buffer = ExpertBuffer(sites, dataclasses.replace(settings, prefetch=2), device="cpu")
    for given in dispatches(3, 8):
        found, expected = buffer.run(*given), whole.run(*given)
        assert torch.equal(found, expected) or (miss == "split" and off_by(found, expected) < 2e-3)
    log, counts = buffer.lookups(), buffer.counts()
    assert counts.prefetch_used > 0
    assert buffer.audit() == []
    same_columns = ["site", "expert", "hit", "rows"]
    assert log[same_columns].equals(plain.lookups()[same_columns])
    assert counts.copies == log["copied"].sum() + counts.prefetches


@needs_triton
@interprets
def test_a_copy_ahead_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in sees what it is there for: copies ahead that wait for no reader."""
    monkeypatch.setattr(expert_buffer, "can_stream", lambda *_: True)
    monkeypatch.setattr(expert_buffer, "open_transfers", LateTransfers)
    original = expert_buffer.ExpertBuffer._load_ahead

    def forgetful(self: Any, fetched: Any, **options: Any) -> None:
        original(self, fetched, **{**options, "behind": None})

    monkeypatch.setattr(expert_buffer.ExpertBuffer, "_load_ahead", forgetful)
    buffer = ExpertBuffer(
        half_sites(3, 8), BufferSettings(capacity=1, policy="layers", prefetch=1, staging=1),
        device="cpu",
    )  # fmt: skip
    with pytest.raises(AssertionError, match="overwritten while it is read"):
        for given in dispatches(3, 8):
            buffer.run(*given)


def test_a_wrong_slot_of_what_is_ahead_is_noticed(trace: Any, steps: list[RoutedStep]) -> None:
    buffer = buffer_of(trace, capacity=1, prefetch=2)
    hidden = starting_rows(steps, GEOMETRY, "cpu")
    residency: Any = buffer._residency
    for _ in run_steps(buffer, steps, hidden):
        if len(residency.fetched()) > 1:
            break
    one, other = (each[:2] for each in residency.fetched())
    assert buffer.audit() == []
    buffer.misplace(one, other)
    assert sorted(buffer.audit()) == sorted([one, other])


def test_settings_say_what_is_copied_ahead(trace: Any) -> None:
    settings = BufferSettings(capacity=2, prefetch=3)
    assert described(settings)["prefetch"] == 3
    assert described(BufferSettings(capacity=2))["prefetch"] == 0
    with pytest.raises(UsageError, match="-1 experts cannot be copied ahead"):
        buffer_of(trace, capacity=2, prefetch=-1)
    with pytest.raises(UsageError, match="all experts are on the device"):
        buffer_of(trace, capacity=None, prefetch=1)


def test_a_model_s_experts_are_copied_ahead() -> None:
    from moeprof.live.buffered_models import buffer_experts
    from moeprof.zoo.loader import load

    loaded = load("zoo:lm", device="cpu", dtype="float32")
    ids = torch.arange(24).view(1, 24) % 90 + 3
    with torch.no_grad():
        with buffer_experts(loaded.model, capacity=None):
            expected = [loaded.model(ids[:, :length]).logits for length in range(18, 24)]
        with buffer_experts(loaded.model, capacity=8, prefetch=2) as buffer:
            found = [loaded.model(ids[:, :length]).logits for length in range(18, 24)]
            counts = buffer.counts()
            assert buffer.audit() == []
    assert same(found, expected)
    assert 0 < counts.prefetch_used <= counts.prefetches


def test_a_setting_runs_as_it_is_planned(trace: Any, tmp_path: Path) -> None:
    from moeprof.live.setting_runs import SettingRun, open_stack
    from moeprof.replay import cost_model
    from moeprof.replay.expert_shapes import ExpertShape
    from moeprof.replay.serving_settings import parse_setting

    shape = ExpertShape(d_model=16, d_ff=8, dtype="float32")
    stack = open_stack(trace, stack="decoder", device="cpu", shape=shape)
    question = cost_model.question_of(trace, shape=shape, phase="all")
    for text in ("lru:25%:ahead=2", "lru:2:split:ahead=4", "min:3:host:ahead=1"):
        setting = parse_setting(text)
        run = SettingRun(stack, setting)
        run.warm_up()
        run.repeat()
        plan = cost_model.plan_buffer(trace, question.routed, setting)
        copies = int(plan.copies_per_step(question.routed).sum())
        assert run.copied_bytes == copies * shape.block_bytes
        assert copies > plan.loads.sum()
        run.close()
