"""What stands in for a model's experts: one at a time, guarded, and gone without a trace."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from forcing_tools import nllb_moe, routing_for  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import MoeprofError, UsageError  # noqa: E402
from moeprof.live import apply_gating, buffer_experts, buffered_models, force_routing  # noqa: E402
from moeprof.live.expert_store import ExpertStore, store_of_layout  # noqa: E402
from moeprof.live.paper_lm import PaperLm, PaperLmConfig  # noqa: E402
from moeprof.live.stacking import expert_layout  # noqa: E402
from moeprof.live.stand_ins import WeightWatch, replace_forward  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

PAPER = PaperLmConfig(
    vocab_size=64, num_layers=4, d_model=32, d_ff=48, num_heads=4, num_experts=8, max_positions=32
)
TECHNIQUES: dict[str, Callable[[Any], Any]] = {
    "gating": lambda model: apply_gating(model, "dynamic"),
    "buffer": lambda model: buffer_experts(model, capacity=2),
}


def ids(rows: int = 2, length: int = 7) -> Any:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(3))


def called(model: Any) -> Any:
    if isinstance(model, PaperLm):
        return model(ids())
    if model.config.is_encoder_decoder:
        return model(input_ids=ids(), decoder_input_ids=ids()).logits
    return model(input_ids=ids()).logits


def logits(model: Any) -> Any:
    with torch.no_grad():
        return called(model)


def replaced(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


# ---------------------------------------------------------------- one at a time
@pytest.mark.parametrize("second", list(TECHNIQUES))
@pytest.mark.parametrize("first", list(TECHNIQUES))
def test_one_technique_at_a_time(first: str, second: str) -> None:
    model = tiny_models.mixtral()
    plain = logits(model)
    with TECHNIQUES[first](model):
        inside = logits(model)
        # A part of the model is refused as well.
        for part in (model, model.model):
            with pytest.raises(UsageError, match="already") as refused, TECHNIQUES[second](part):
                pass
            assert first in str(refused.value) and refused.value.hint
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(model), plain) and not replaced(model)
    with TECHNIQUES[second](model):
        pass


def test_handles_taken_back_in_any_order_leave_the_model_as_it_was() -> None:
    model = tiny_models.mixtral()
    plain = logits(model)
    first = apply_gating(model, "static_index", token_fraction=0.05)
    with pytest.raises(UsageError):
        apply_gating(model, "dynamic")
    first.restore()
    second = apply_gating(model, "dynamic")
    first.restore()
    assert replaced(model)
    second.restore()
    second.restore()
    assert torch.equal(logits(model), plain) and not replaced(model)


@pytest.mark.parametrize("second", list(TECHNIQUES))
@pytest.mark.parametrize("build", [tiny_models.mixtral, nllb_moe])
def test_a_gating_whose_handle_was_dropped_is_taken_back_by_the_next(
    build: Any, second: str
) -> None:
    model = build()
    plain = logits(model)
    apply_gating(model, "static_index", token_fraction=0.05)
    dropping = logits(model)
    assert not torch.allclose(dropping, plain, atol=1e-3)  # It stays without its handle.
    with TECHNIQUES[second](model):
        assert torch.allclose(logits(model), plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model), plain)
    assert build is nllb_moe or not replaced(model)


def test_what_fails_while_it_is_applied_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.mixtral()
    plain = logits(model)
    with monkeypatch.context() as patched:
        given: list[Any] = []

        def second_fails(module: Any, forward: Any) -> Any:
            given.append(module)
            if len(given) > 1:
                raise ZeroDivisionError
            return replace_forward(module, forward)

        patched.setattr("moeprof.live.application.replace_forward", second_fails)
        with pytest.raises(ZeroDivisionError):
            apply_gating(model, "dynamic")
    assert torch.equal(logits(model), plain) and not replaced(model)
    apply_gating(model, "dynamic").restore()


def test_a_wrapper_that_stays_longer_calls_the_module_s_own_forward() -> None:
    module = torch.nn.Linear(2, 2)
    rows = torch.ones(1, 2)
    own = module(rows)
    take_back = replace_forward(module, lambda rows: rows * 0)
    inner = module.forward
    module.forward = lambda rows: inner(rows) + 1  # As offloading does.
    assert torch.equal(module(rows), torch.ones(1, 2))
    take_back()
    assert torch.equal(module(rows), own + 1)
    take_back()
    assert torch.equal(module(rows), own + 1)


def test_a_forward_that_was_wrapped_and_left_over_is_copied_as_the_module_s_own() -> None:
    module = torch.nn.Linear(2, 2)
    rows = torch.ones(1, 2)
    take_back = replace_forward(module, lambda rows: rows * 0)
    inner = module.forward
    module.forward = functools.partial(inner)  # As offloading does,
    take_back()
    module.forward = inner  # and undoes it.
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            module.weight.mul_(2)
            duplicate.weight.zero_()
        assert torch.equal(duplicate(rows)[0], module.bias)
        assert not torch.equal(module(rows)[0], module.bias)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("build", [tiny_models.mixtral, tiny_models.switch, None])
def test_a_model_that_is_dropped_while_something_stands_in_goes_at_once(
    build: Any, is_kept: bool
) -> None:
    model = build() if build is not None else PaperLm(PAPER, dtype=torch.float32)
    gc.collect()
    gating: Any = apply_gating(model, "dynamic")
    logits(model)
    names = [name for name, _ in model.named_modules() if name.endswith("experts")]
    found = [weakref.ref(model.get_submodule(name)) for name in names]
    found += [weakref.ref(parameter) for parameter in model.parameters()]
    assert len(names) > 1
    standing = [weakref.ref(module) for module in model.modules() if "forward" in vars(module)]
    found += standing
    assert standing
    if not is_kept:
        del gating
    del model
    assert [one() for one in found] == [None] * len(found)
    if is_kept:
        gating.restore()


@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_copies_that_would_run_another_model_s_experts_are_refused(technique: str) -> None:
    model = tiny_models.mixtral()
    with TECHNIQUES[technique](model), pytest.raises(MoeprofError, match="cannot be copied"):
        copy.deepcopy(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_forced_routing_goes_with_either(technique: str) -> None:
    for model in (tiny_models.mixtral(), PaperLm(PAPER, dtype=torch.float32)):
        routing = routing_for(model, [14])
        with force_routing(model, routing):
            expected = logits(model)
        assert not torch.allclose(logits(model), expected, atol=1e-3)
        with TECHNIQUES[technique](model), force_routing(model, routing):
            assert torch.allclose(logits(model), expected, atol=1e-3)
        with force_routing(model, routing), TECHNIQUES[technique](model):
            assert torch.allclose(logits(model), expected, atol=1e-3)


def test_a_gating_is_entered_once() -> None:
    model = tiny_models.mixtral()
    gating = apply_gating(model, "dynamic")
    with gating, pytest.raises(UsageError, match="entered already"), gating:
        pass
    with pytest.raises(UsageError, match="taken back already") as refused, gating:
        pass
    assert "apply_gating(model, 'dynamic')" in refused.value.hint


def test_a_paper_s_model_under_a_gating_is_recorded(tmp_path: Any) -> None:
    model = PaperLm(PAPER, dtype=torch.float32)
    with moeprof.record(model, tmp_path / "own.moeprof"):
        logits(model)
    with apply_gating(model, "dynamic"), moeprof.record(model, tmp_path / "other.moeprof"):
        logits(model)
    own, other = (moeprof.open(tmp_path / f"{name}.moeprof").routing() for name in ("own", "other"))
    assert len(own) == 2 * 14 * 2 and own["expert"].equals(other["expert"])


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("build", [tiny_models.mixtral, nllb_moe])
def test_changed_weights_are_refused_where_they_would_be_ignored(build: Any) -> None:
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    before, expected = logits(model), logits(other)
    own = copy.deepcopy(model.state_dict())
    with buffer_experts(model, capacity=None):
        logits(model)
        model.load_state_dict(other.state_dict())
        with pytest.raises(MoeprofError, match="changed after buffer_experts") as refused:
            logits(model)
        assert "apply it again" in refused.value.hint
    # They are the model's own, and are read when it is applied again.
    assert torch.equal(logits(model), expected)
    with buffer_experts(model, capacity=2):
        assert torch.allclose(logits(model), expected, rtol=1e-3, atol=1e-4)
    with apply_gating(model, "dynamic"):
        model.load_state_dict(own)
        if build is nllb_moe:  # Modules apart, which are copied.
            with pytest.raises(MoeprofError, match="changed after apply_gating"):
                logits(model)
        else:
            assert torch.allclose(logits(model), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_parameters_elsewhere_are_refused(technique: str) -> None:
    model = tiny_models.mixtral()
    with TECHNIQUES[technique](model):
        model.double()
        with pytest.raises(MoeprofError, match=r"experts of model\.layers\.0\.mlp changed"):
            logits(model)
    model = tiny_models.mixtral()
    with TECHNIQUES[technique](model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        with pytest.raises(MoeprofError, match=r"experts of model\.layers\.0\.mlp changed"):
            logits(model)


def test_a_watch_sees_other_parameters_memory_and_content() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    def watch(*, is_shared: bool = False) -> WeightWatch:
        return WeightWatch(module, module.parameters(), is_shared=is_shared)

    both = watch(), watch(is_shared=True)
    assert [each.has_changed() for each in both] == [False, False]
    with torch.inference_mode():
        module[1].bias.add_(1)
    assert [each.has_changed() for each in both] == [True, False]
    both = watch(), watch(is_shared=True)
    module[0].weight.data = module[0].weight.data.clone()
    assert [each.has_changed() for each in both] == [True, True]
    both = watch(), watch(is_shared=True)
    module[0].weight = torch.nn.Parameter(module[0].weight.data)
    assert [each.has_changed() for each in both] == [True, True]
    with torch.inference_mode():
        module[0].weight = torch.nn.Parameter(torch.ones(2, 2))
    inference = watch()
    assert not inference.has_changed()


def test_a_watch_sees_other_modules() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    watch = WeightWatch(module, module.parameters(), is_shared=False)
    own = module["b"]
    assert not watch.has_changed()
    module["b"] = copy.deepcopy(own)
    assert watch.has_changed() and watch.has_changed()
    module["b"] = own
    assert not watch.has_changed()


@pytest.mark.parametrize("technique", list(TECHNIQUES))
@pytest.mark.parametrize("is_one", [True, False])
def test_expert_modules_that_were_replaced_are_not_ignored(is_one: bool, technique: str) -> None:
    model: Any = nllb_moe()
    block = model.model.decoder.layers[1].ffn
    other = copy.deepcopy(block.experts)
    with TECHNIQUES[technique](model):
        logits(model)
        if is_one:
            block.experts["expert_0"] = other["expert_0"]
        else:
            block.experts = other
        with pytest.raises(MoeprofError, match="changed after"):
            logits(model)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("number", [0, 63, 64, 129])
def test_a_watch_of_many_parameters(number: int, is_first: bool) -> None:
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(2)) for _ in range(130))
    watch = WeightWatch(module, module.parameters(), is_shared=False)
    if not is_first:
        assert not watch.has_changed()
    with torch.no_grad():
        module[number].add_(1)
    assert watch.has_changed()
    watch = WeightWatch(module, module.parameters(), is_shared=False)
    if not is_first:
        assert not any(watch.has_changed() for _ in range(10))
    module[number].data = torch.ones(2)
    # All at the first look, then in three turns; once seen it stays so.
    looks = [watch.has_changed() for _ in range(1 if is_first else 3)]
    assert looks[-1] and watch.has_changed() and watch.has_changed()
    watch = WeightWatch(module, module.parameters(), is_shared=False)
    if not is_first:
        assert not watch.has_changed()
    for parameter in module:  # A whole model that moves.
        parameter.data = parameter.data.clone()
    assert watch.has_changed()


def test_a_watch_of_what_has_no_version_does_not_fail() -> None:
    with torch.inference_mode():
        module = torch.nn.Linear(2, 2)
    module.weight.data = torch.ones(2, 2)
    assert not module.weight.is_inference() and module.bias.is_inference()
    watch = WeightWatch(module, module.parameters(), is_shared=False)
    assert not watch.has_changed()


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("build", [tiny_models.mixtral, nllb_moe])
@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_a_backward_pass_is_refused_and_a_forward_pass_is_not(technique: str, build: Any) -> None:
    model = build()
    expected = logits(model)
    with TECHNIQUES[technique](model):
        out = called(model)
        assert torch.allclose(out, expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(MoeprofError, match="no gradients: it is for inference") as refused:
            out.sum().backward()
        assert "torch.no_grad()" in refused.value.hint
        again = logits(model)
        assert not again.requires_grad and torch.equal(again, out)
        # The experts alone may train, or all but the experts.
        is_expert = [".experts." in name for name, _ in model.named_parameters()]
        for trains in (True, False):
            for parameter, own in zip(model.parameters(), is_expert, strict=True):
                parameter.requires_grad_(own is trains)
            with pytest.raises(MoeprofError, match="no gradients"):
                called(model).sum().backward()
        model.requires_grad_(requires_grad=False)
        assert not called(model).requires_grad
        model.requires_grad_()
    called(model).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".experts." in n) or (
        build is nllb_moe
    )


def test_the_paper_s_model_refuses_a_backward_pass_too() -> None:
    model = PaperLm(PAPER, dtype=torch.float32).requires_grad_()
    expected = logits(model)
    for technique in TECHNIQUES.values():
        with technique(model):
            out = called(model)
            assert torch.allclose(out, expected, atol=1e-4)
            with pytest.raises(MoeprofError, match="no gradients"):
                out.sum().backward()


# ---------------------------------------------------------------- kinds of calls
@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_no_token_at_all(technique: str) -> None:
    mixtral, paper = tiny_models.mixtral(), PaperLm(PAPER, dtype=torch.float32)
    switch: Any = tiny_models.switch()
    blocks = [
        (mixtral, mixtral.model.layers[0].mlp),
        (paper, paper.layers[1].moe),
        (switch, switch.encoder.block[1].layer[1].mlp),
    ]
    for model, block in blocks:
        nothing = torch.zeros(1, 0, 32)
        with torch.no_grad(), TECHNIQUES[technique](model):
            out = block(nothing)
        assert (out if torch.is_tensor(out) else out[0]).shape == nothing.shape


@pytest.mark.parametrize("technique", list(TECHNIQUES))
def test_entering_within_autocast_reads_what_is_there(technique: str) -> None:
    model = tiny_models.mixtral()
    plain = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        applied = TECHNIQUES[technique](model)
        with applied, torch.autocast("cpu", enabled=False):
            assert torch.allclose(logits(model), plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_models.mixtral, nllb_moe])
def test_inference_mode_leaves_a_model_that_can_be_trained(build: Any) -> None:
    model = build()
    with torch.inference_mode(), buffer_experts(model, capacity=2):
        called(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    called(model).sum().backward()
    with torch.inference_mode():
        gating = apply_gating(model, "dynamic")
    with gating:
        called(model)


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("technique", list(TECHNIQUES))
@pytest.mark.parametrize("build", [tiny_models.mixtral, nllb_moe])
def test_a_model_made_in_inference_mode_stays_what_it_is(
    build: Any, technique: str, is_inside: bool
) -> None:
    with torch.inference_mode():
        model = build()
        expected = called(model)
    for _ in range(2):
        with torch.inference_mode(is_inside), TECHNIQUES[technique](model):
            for mode in (torch.inference_mode(), torch.no_grad()):
                with mode:
                    assert torch.allclose(called(model), expected, rtol=1e-3, atol=1e-4)
        assert all(parameter.is_inference() for parameter in model.parameters())
        for mode in (torch.inference_mode(), torch.no_grad()):
            with mode:
                assert torch.allclose(called(model), expected, rtol=1e-3, atol=1e-4)


def test_parameters_of_both_kinds_stay_what_they_are() -> None:
    model: Any = tiny_models.mixtral()
    expected = logits(model)
    experts = model.model.layers[1].mlp.experts
    with torch.inference_mode():
        experts.down_proj = torch.nn.Parameter(experts.down_proj.clone())
    kinds = [parameter.is_inference() for parameter in model.parameters()]
    assert sum(kinds) == 1
    with torch.inference_mode(), buffer_experts(model, capacity=2):
        assert torch.allclose(called(model), expected, rtol=1e-3, atol=1e-4)
    assert [parameter.is_inference() for parameter in model.parameters()] == kinds
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------- leaving
def test_one_failure_on_leaving_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.mixtral()
    plain = logits(model)
    experts = [layer.mlp.experts for layer in model.model.layers]
    stuck = {id(experts[1].down_proj)}
    closed: list[int] = []
    bring_back = buffered_models._bring_back

    def no_room(parameter: Any, device: Any) -> None:
        if id(parameter) in stuck:
            raise torch.OutOfMemoryError("no room")
        bring_back(parameter, device)

    monkeypatch.setattr(buffered_models, "_bring_back", no_room)
    monkeypatch.setattr(ExpertStore, "close", lambda self: closed.append(self.memory.data_ptr()))
    with (
        pytest.raises(torch.OutOfMemoryError, match="no room") as raised,
        buffer_experts(model, capacity=2) as buffer,
    ):
        held = [
            range(memory.data_ptr(), memory.data_ptr() + memory.numel())
            for memory in (site.store.memory for site in buffer.sites)
        ]
    assert raised.value.__notes__ == ["1 of 2 parameters of experts stay in host memory"]
    # Everything else lies in memory of its own; stores that hold nothing were closed.
    inside = [
        [parameter.data_ptr() in memory for parameter in own.parameters()]
        for own, memory in zip(experts, held, strict=True)
    ]
    assert inside == [[False, False], [False, True], [False, False]]
    assert sorted(closed) == sorted([held[0].start, held[2].start])
    assert torch.equal(logits(model), plain) and not replaced(model)
    # The user's own error comes first.
    with pytest.raises(ZeroDivisionError) as own, buffer_experts(model, capacity=2):
        raise ZeroDivisionError
    assert "OutOfMemoryError: no room" in own.value.__notes__[0]
    stuck.clear()
    with buffer_experts(model, capacity=2):
        pass
    assert torch.equal(logits(model), plain)


def test_a_store_that_something_stays_in_is_closed_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = expert_layout(tiny_models.mixtral().model.layers[0].mlp.experts)
    store = store_of_layout(layout)
    closed: list[Any] = []
    monkeypatch.setattr(ExpertStore, "close", lambda self: closed.append(self.memory))

    def no_room(parameter: Any, device: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(buffered_models, "_bring_back", no_room)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            buffered_models._take_home(layout, torch.device("cpu"), store)
    del raised
    gc.collect()
    assert not closed
    del layout
    gc.collect()
    assert [memory is store.memory for memory in closed] == [True]


def test_shares_of_tokens_that_are_no_numbers_are_refused() -> None:
    model = tiny_models.mixtral()
    for share in ("a", [0.5], float("nan"), 0):
        with pytest.raises(UsageError, match="above 0 and up to 1"):
            apply_gating(model, "static_mask", token_fraction=share)
