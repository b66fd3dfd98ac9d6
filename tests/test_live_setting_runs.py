"""A setting run step by step: what is copied when, and what a visit leaves out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moeprof.live import setting_runs, watched_steps  # noqa: E402
from moeprof.live.cache_plans import prepare_caches  # noqa: E402
from moeprof.live.setting_runs import ResidentExperts, SettingRun, open_stack  # noqa: E402
from moeprof.live.watched_steps import StepTimes  # noqa: E402
from moeprof.replay.expert_shapes import ExpertShape  # noqa: E402
from moeprof.replay.serving_settings import parse_setting  # noqa: E402
from moeprof.trace.synthetic import synthetic_trace  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ExpertShape(d_model=16, d_ff=8, dtype="float32")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trace = synthetic_trace(
        tmp_path_factory.mktemp("runs") / "t.moeprof",
        num_requests=3,
        num_sites=2,
        num_experts=8,
        batch=3,
        prompt_tokens=4,
        output_tokens=6,
    )
    return open_stack(trace, stack="decoder", device="cpu", shape=SHAPE)


def judged_of(stack: Any) -> list[int]:
    return [index for index, step in enumerate(stack.steps) if step.phase == "decode"]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts copies into slots by the step that asked for them."""
    from moeprof.live.transfers import HostTransfers

    found: Counter[int] = Counter()
    now: list[int] = []
    load, begin = HostTransfers.load, setting_runs.ExpertBuffer.begin_step

    def loaded(self: Any, slot: int, block: Any) -> None:
        before = self.slots[slot].clone()
        self.slots[slot].fill_(255)
        load(self, slot, block)
        if bool((self.slots[slot] == 255).all()):
            self.slots[slot].copy_(before)
        else:
            found[now[-1]] += 1

    def begun(self: Any, step: int | None = None) -> None:
        now.append(step)
        begin(self, step)

    monkeypatch.setattr(HostTransfers, "load", loaded)
    monkeypatch.setattr(setting_runs.ExpertBuffer, "begin_step", begun)
    return found


@pytest.mark.parametrize("name", ["lru:3", "min:2", "lru:2:ahead=1", "lru:4:host"])
def test_only_judged_steps_copy_and_all_decide_the_same(
    stack: Any, copied: Counter[int], name: str
) -> None:
    setting, judged = parse_setting(name), judged_of(stack)
    assert 0 < len(judged) < len(stack.steps)
    whole = SettingRun(stack, setting)
    assert len(whole.repeat().times_ms) == len(stack.steps)
    expected = dict(copied)
    run = SettingRun(stack, setting, judged=judged)
    copied.clear()
    assert len(run.repeat().times_ms) == len(stack.steps)
    steps = {stack.steps[index].step for index in judged}
    assert set(expected) - steps, "nothing is left out"
    assert copied == {step: count for step, count in expected.items() if step in steps}
    assert run._buffer is not None and whole._buffer is not None
    assert run._buffer.lookups().equals(whole._buffer.lookups())
    # What was asked for counts, as it did.
    assert run.copied_bytes == whole.copied_bytes
    run.close()
    whole.close()


def test_slots_hold_experts_before_anything_is_copied(stack: Any) -> None:
    run = SettingRun(stack, parse_setting("lru:3"), judged=judged_of(stack))
    assert run._buffer is not None
    (pool,) = run._buffer._pools
    block = stack.sites[0].store.block(0)
    assert block.any() and torch.equal(pool.view(-1, block.numel()), block.expand(6, -1))
    run.close()
    plain = SettingRun(stack, parse_setting("lru:3"))
    assert plain._buffer is not None and not plain._buffer._pools[0].any()
    plain.close()


def test_later_warm_ups_are_short_and_copy_nothing(stack: Any, copied: Counter[int]) -> None:
    run = SettingRun(stack, parse_setting("lru:2"))
    run.warm_up(is_whole=False)
    assert run._buffer is not None
    lookups = run._buffer.lookups()
    assert not copied and run._buffer.counts().copies > 0
    assert set(lookups["step"]) == {step.step for step in stack.warming_steps}
    run.warm_up()
    assert copied and set(run._buffer.lookups()["step"]) == {step.step for step in stack.steps}
    run.close()


def test_warming_steps_have_every_kind_of_dispatch(stack: Any) -> None:
    found = stack.warming_steps
    every = Counter(tuple(one.ids.shape) for step in stack.steps for one in step.passes)
    own = Counter(tuple(one.ids.shape) for step in found for one in step.passes)
    assert set(own) == set(every) and len(every) > 1
    assert all(own[kind] >= min(3, every[kind]) for kind in every)
    # Whoever leaves a step out leaves a kind too seldom.
    assert len(found) < len(stack.steps)
    assert stack.most_rows == max(tokens * slots for tokens, slots in every)


def test_gatings_are_warmed_up_too(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    steps_of = setting_runs._gating_steps

    def noted(own: Any, steps: Any, *more: Any) -> StepTimes:
        ran.append(len(steps))
        return steps_of(own, steps, *more)

    monkeypatch.setattr(setting_runs, "_gating_steps", noted)
    resident = ResidentExperts()
    run = SettingRun(stack, parse_setting("gating:dynamic"), resident=resident)
    run.warm_up()
    run.warm_up(is_whole=False)
    assert ran == [len(stack.steps), len(stack.warming_steps)]
    run.close()


class NextToBusy:
    """A watch on a core that is found slow after every third step."""

    def __init__(self) -> None:
        self.num_settled = self.num_looks = 0

    def settle(self) -> None:
        self.num_settled += 1
        self.found = iter((True, True, True, False))

    def give_up(self) -> None:
        raise AssertionError("steps are never given up")

    def is_quiet(self) -> bool:
        self.num_looks += 1
        return next(self.found)


@pytest.mark.parametrize("name", ["lru:3", "unbuffered", "gating:dynamic"])
def test_the_core_is_looked_at_between_steps(
    stack: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(watched_steps, "_LOOK_EVERY_MS", 0.0)
    run = SettingRun(stack, parse_setting(name), judged=judged_of(stack))
    watch = NextToBusy()
    # Nobody needs to know what the core was like while things were warmed up.
    run.warm_up()
    assert watch.num_looks == watch.num_settled == 0
    found = run.repeat(watch)
    count = len(stack.steps)
    assert len(found.times_ms) == count > 6 and min(found.times_ms) > 0
    # Quiet, quiet, slow: each look is made after one step, and once more on another core.
    assert found.is_quiet == tuple(step % 3 < 2 for step in range(count))
    assert watch.num_settled == 1 + count // 3
    assert watch.num_looks == 1 + count + count // 3
    unwatched = run.repeat()
    assert unwatched.is_quiet == (True,) * count and watch.num_looks == 1 + count + count // 3
    run.close()


def test_copies_come_back_where_a_run_without_them_fails(stack: Any) -> None:
    run = SettingRun(stack, parse_setting("lru:2"))
    buffer = run._buffer
    assert buffer is not None and buffer._transfers is not None
    with pytest.raises(KeyboardInterrupt), buffer.without_copies():
        assert buffer._transfers.is_blank
        raise KeyboardInterrupt
    assert not buffer._transfers.is_blank
    buffer.leave_out_copies(left_out=True)
    with buffer.without_copies():
        pass
    assert buffer._transfers.is_blank
    run.close()
    whole = SettingRun(stack, parse_setting("unbuffered"))
    assert whole._buffer is not None
    with whole._buffer.without_copies():
        assert len(whole.repeat().times_ms) == len(stack.steps)
    whole.close()


@pytest.mark.parametrize("name", ["lru:3", "min:2", "lru:2:ahead=1", "random:2"])
def test_caches_are_prepared_once_for_all_runs(
    stack: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    setting, made = parse_setting(name), []

    def prepared_caches(*given: Any) -> Any:
        made.append(given)
        return prepare_caches(*given)

    monkeypatch.setattr(setting_runs, "prepare_caches", prepared_caches)
    prepared: dict[str, Any] = {}
    found = []
    for _ in range(3):
        run = SettingRun(stack, setting, prepared=prepared)
        run.warm_up(is_whole=False)
        run.repeat()
        assert run._buffer is not None and run._buffer.audit() == []
        found.append(run._buffer.lookups())
        run.close()
    assert len(made) == 1 and list(prepared) == [setting.name]
    alone = SettingRun(stack, setting)
    alone.repeat()
    assert alone._buffer is not None and len(made) == 2
    assert all(alone._buffer.lookups().equals(each) for each in found)
    alone.close()


def test_experts_of_one_host_copy_are_all_there(stack: Any) -> None:
    """On the device every site has experts of its own, however they came there."""
    shared = open_stack(stack.trace, stack="decoder", device="cpu", shape=SHAPE, share_host=True)
    first, second = shared.sites
    pieces = {site.store.memory.untyped_storage().data_ptr() for site in shared.sites}
    assert len(pieces) == 1
    own = ResidentExperts().of(shared)
    assert not torch.equal(own[first.site].w_in, own[second.site].w_in)
    for site in shared.sites:
        weights, expected = own[site.site], site.store.all_weights("cpu")
        assert torch.equal(weights.w_in, expected.w_in)
        assert torch.equal(weights.w_out, expected.w_out)
        assert weights.w_in.is_contiguous() and weights.w_out.is_contiguous()
    assert own[first.site].w_in.data_ptr() != own[second.site].w_in.data_ptr()
