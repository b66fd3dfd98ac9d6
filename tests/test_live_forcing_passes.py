"""Which recorded pass a forced model computes with: errors give it back, recomputing repeats it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from forcing_tools import nllb_moe, routing_for  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import TraceError, UsageError  # noqa: E402
from moeprof.live import ForcedRouting, force_routing  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def tokens(rows: int = 2, length: int = 7, seed: int = 3) -> Any:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Any = None) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def loss(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, use_cache=False).logits.square().mean()


def trained(use_reentrant: bool | None) -> Any:
    model: Any = tiny_models.mixtral()
    model.train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
        )
    return model


def gradients(model: Any) -> dict[str, Any]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-8) for name in one
    )


# ---------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_pass(use_reentrant: bool) -> None:
    found = []
    for kind in (None, use_reentrant):
        model = trained(kind)
        with force_routing(model, routing_for(model, [14] * 5)) as forced:
            for step in range(3):  # Gradients of several passes, each with its own backward.
                loss(model, tokens(seed=step)).backward()
            run(model)  # And one without.
            loss(model, tokens(seed=4)).backward()
            assert forced.passes == {"decoder": 5}
        found.append(gradients(model))
    assert same(*found) and any(name.endswith("gate_up_proj") for name in found[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_pass_that_is_repeated_need_not_be_the_last(use_reentrant: bool) -> None:
    found = []
    for kind in (None, use_reentrant):
        model = trained(kind)
        with force_routing(model, routing_for(model, [14] * 3)):
            first = loss(model, tokens())
            run(model)
            first.backward()
        found.append(gradients(model))
    assert same(*found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_where_two_passes_could_be_meant_it_is_refused(use_reentrant: bool) -> None:
    model = trained(use_reentrant)
    with force_routing(model, routing_for(model, [14] * 4)) as forced:
        both = loss(model, tokens()) + loss(model, tokens(seed=4))
        with pytest.raises(UsageError, match="which recorded pass") as refused:
            both.backward()
        assert "after each forward pass" in refused.value.hint
        loss(model, tokens()).backward()
        assert forced.passes == {"decoder": 3}
    # Where nothing is computed again there is nothing to tell.
    model = trained(None)
    with force_routing(model, routing_for(model, [14] * 2)):
        (loss(model, tokens()) + loss(model, tokens(seed=4))).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_stack_that_is_repeated_as_a_whole(use_reentrant: bool) -> None:
    found = []
    for repeated in (False, True):
        model = trained(None)
        embedded = model.model.embed_tokens(tokens()).detach().requires_grad_()

        def stack(embeddings: Any, model: Any = model) -> Any:
            return model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

        with force_routing(model, routing_for(model, [14] * 3)) as forced:
            for _ in range(2):
                out = (
                    checkpoint(stack, embedded, use_reentrant=use_reentrant)
                    if repeated
                    else stack(embedded)
                )
                out.square().mean().backward()
            assert forced.passes == {"decoder": 2}
            run(model)
        found.append(gradients(model))
    assert same(*found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_the_caller_runs_are_repeated_too(use_reentrant: bool) -> None:
    found = []
    for repeated in (False, True):
        model: Any = tiny_models.mixtral()
        blocks = [layer.mlp for layer in model.model.layers]
        hidden = torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(1))
        hidden.requires_grad_()
        with force_routing(blocks, routing_for(model, [14] * 3)) as forced:
            for _ in range(2):
                out = hidden
                for block in blocks:
                    out = (
                        checkpoint(block, out, use_reentrant=use_reentrant)
                        if repeated
                        else block(out)
                    )
                out.square().mean().backward()
            assert forced.passes == {"decoder": 2}
        found.append(gradients(model) | {"hidden": hidden.grad})
    assert same(*found)


# ---------------------------------------------------------------- passes that did not end
def forced_outputs(model: Any, routing: Any) -> list[Any]:
    with force_routing(model, routing):
        return [run(model), run(model)]


def test_a_refused_batch_gives_its_pass_back() -> None:
    model: Any = tiny_models.mixtral()
    routing = routing_for(model, [14, 14])
    first, second = forced_outputs(model, routing)
    assert not torch.equal(first, second)
    with force_routing(model, routing) as forced:
        for expected in (first, second):
            with pytest.raises(UsageError, match="is called with 10 rows"):
                run(model, tokens(2, 5))
            assert torch.equal(run(model), expected)
        with pytest.raises(UsageError, match="used up"):
            run(model)
        assert forced.passes == {"decoder": 2}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_stack_that_an_error_ended_gives_its_pass_back(error: type[BaseException]) -> None:
    model: Any = tiny_models.mixtral()
    routing = routing_for(model, [14, 14])
    first, second = forced_outputs(model, routing)

    def fail(*_: Any) -> None:
        raise error

    with force_routing(model, routing):
        for expected in (first, second):
            handle = model.model.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(error):
                run(model)
            handle.remove()
            assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("stack's end", ValueError),
        ("before the head", ValueError),
        ("before the head", KeyboardInterrupt),
        ("model's end", ValueError),
        ("model's end", KeyboardInterrupt),
    ],
)
def test_an_error_after_the_stacks_ran_through_does_not_give_passes_back(
    place: str, error: type[BaseException]
) -> None:
    """As who raises to stop before the head does, once the activations are there."""
    model: Any = tiny_models.mixtral()
    routing = routing_for(model, [14, 14, 14])
    seen: list[Any] = []
    kept = model.model.register_forward_hook(lambda *given: seen.append(given[2][0].clone()))
    with force_routing(model, routing):
        for _ in range(3):
            run(model)
    kept.remove()
    expected, seen = seen, []

    def stop(*given: Any) -> None:
        if place == "stack's end":
            seen.append(given[2][0].clone())
        raise error

    if place == "stack's end":
        model.model.register_forward_hook(stop)
    else:
        model.model.register_forward_hook(lambda *given: seen.append(given[2][0].clone()))
        if place == "before the head":
            model.lm_head.register_forward_pre_hook(stop)
        else:
            model.register_forward_hook(stop)
    passes = []
    with force_routing(model, routing) as forced:
        for _ in range(3):
            with pytest.raises(error):
                run(model)
            passes.append(forced.passes["decoder"])
    assert passes == [1, 2, 3]
    assert len(seen) == 3 and all(map(torch.equal, seen, expected))


def test_a_failed_decoder_gives_the_encoder_s_pass_back() -> None:
    model: Any = nllb_moe()
    routing = routing_for(model, [14, 14], encoder_tokens=[14, 14])

    def call(decoder_ids: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens(), decoder_input_ids=decoder_ids).logits

    with force_routing(model, routing):
        first, second = call(tokens()), call(tokens())
    with force_routing(model, routing) as forced:
        for expected in (first, second):
            with pytest.raises(UsageError, match="is called with 10 rows"):
                call(tokens(2, 5))
            assert torch.equal(call(tokens()), expected)
        assert forced.passes == {"encoder": 2, "decoder": 2}


def test_an_encoder_whose_decoder_is_used_up_gives_its_pass_back() -> None:
    model: Any = nllb_moe()
    routing = routing_for(model, [14], encoder_tokens=[14, 14])
    with force_routing(model, routing) as forced, torch.no_grad():
        model(input_ids=tokens(), decoder_input_ids=tokens())
        with pytest.raises(UsageError, match="decoder is used up"):
            model(input_ids=tokens(), decoder_input_ids=tokens())
        assert forced.passes == {"encoder": 1, "decoder": 1}


def test_an_interrupted_step_leaves_later_passes_alone() -> None:
    """generate() calls the encoder outside of the model's forward pass."""
    model: Any = nllb_moe()
    routing = routing_for(model, [2] * 12, encoder_tokens=[14] * 4)
    interrupted = [True]
    encoded: list[Any] = []

    def stop(*_: Any) -> None:
        if interrupted.pop():
            raise KeyboardInterrupt

    def generate() -> None:
        model.generate(tokens(), max_new_tokens=2, min_new_tokens=2)

    def watch(module: Any, args: Any, output: Any) -> None:
        encoded.append(output[0].clone())

    model.get_encoder().register_forward_hook(watch)
    with force_routing(model, routing):
        for _ in range(3):
            generate()
    expected = encoded[:]
    assert not torch.equal(expected[0], expected[1])
    encoded.clear()
    handle = model.get_decoder().layers[1].register_forward_pre_hook(stop)
    passes = []
    with force_routing(model, routing) as forced:
        with pytest.raises(KeyboardInterrupt):
            generate()
        handle.remove()
        passes.append(forced.passes["encoder"])
        for _ in range(2):
            generate()
            passes.append(forced.passes["encoder"])
        decoded = forced.passes["decoder"]
    assert passes == [1, 2, 3] and all(map(torch.equal, encoded, expected))
    with force_routing(model, routing) as forced:
        for _ in range(2):
            generate()
        assert forced.passes["decoder"] == decoded


@pytest.mark.parametrize("before", ["a call", "a stack's call", "an interrupted call"])
def test_layers_called_by_hand_after_the_model_begin_passes_of_their_own(before: str) -> None:
    model: Any = tiny_models.mixtral()
    layers = [layer.mlp for layer in model.model.layers]
    routing = routing_for(model, [14] * 5)
    hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))

    def by_hand() -> list[Any]:
        with torch.no_grad():
            return [layer(hidden) for layer in layers]

    with force_routing(layers, routing):
        expected = [by_hand() for _ in range(5)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with force_routing(model, routing) as forced:
        if before == "an interrupted call":
            run(model)
            handle = layers[2].register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                run(model)
            handle.remove()
        elif before == "a call":
            run(model)
        else:
            with torch.no_grad():
                model.model(tokens())
        for step in range(1, 4):
            assert all(map(torch.equal, by_hand(), expected[step]))
            assert forced.passes == {"decoder": step + 1}
        run(model)
        assert forced.passes == {"decoder": 5}


def test_a_site_called_in_parts_within_its_stack_stays_in_the_pass() -> None:
    model: Any = tiny_models.mixtral()
    routing = routing_for(model, [14, 14])
    block = model.model.layers[1].mlp
    calls: list[Any] = []

    def again(module: Any, args: Any, output: Any) -> None:
        if len(calls) < 1:
            calls.append(output)
            calls.append(module(*args))

    block.register_forward_hook(again)
    with force_routing(model, routing) as forced:
        run(model)
        assert forced.passes == {"decoder": 1} and torch.equal(*calls)


def test_a_model_that_returns_nothing_goes_on_to_the_next_pass() -> None:
    class Quiet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                layer.mlp for layer in tiny_models.mixtral().model.layers
            )

        def forward(self, hidden: Any) -> None:
            for layer in self.layers:
                hidden = layer(hidden)

    model = Quiet()
    routing = routing_for(tiny_models.mixtral(), [14, 14])
    hidden = torch.randn(1, 14, 32)
    with force_routing(model, routing) as forced, torch.no_grad():
        model(hidden)
        assert forced.passes == {"decoder": 1}
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            model(hidden)  # While another error is handled.
        assert forced.passes == {"decoder": 2}


def test_layers_give_back_the_pass_that_a_refused_batch_began() -> None:
    model: Any = tiny_models.mixtral()
    routing = routing_for(model, [14, 14])
    blocks = [layer.mlp for layer in model.model.layers]
    hidden = torch.randn(1, 14, 32)

    def through(hidden: Any) -> Any:
        with torch.no_grad():
            for block in blocks:
                hidden = block(hidden)
        return hidden

    with force_routing(blocks, routing):
        first, second = through(hidden), through(hidden)
    with force_routing(blocks, routing) as forced:
        for expected in (first, second):
            with pytest.raises(UsageError, match="is called with 5 rows"):
                through(hidden[:, :5])
            assert torch.equal(through(hidden), expected)
        assert forced.passes == {"decoder": 2}


# ---------------------------------------------------------------- what drives
def test_a_path_drives_as_the_trace_does(tmp_path: Any) -> None:
    model: Any = tiny_models.mixtral()
    path = tmp_path / "run.moeprof"
    with moeprof.record(model, path):
        run(model)
    for given in (path, str(path), moeprof.open(path)):
        forced = force_routing(model, given)
        assert isinstance(forced, ForcedRouting) and forced.num_passes == {"decoder": 1}
    with pytest.raises(TraceError, match="does not exist"):
        force_routing(model, tmp_path / "none.moeprof")
    with pytest.raises(UsageError, match="expected a trace or a Routing") as refused:
        force_routing(model, [1, 2])
    assert "moeprof.open" in refused.value.hint


def test_made_routing_of_experts_that_there_are_not_is_refused() -> None:
    site = routing_for(tiny_models.mixtral(), [14]).stack().sites[0]
    for experts, named in (
        (site.experts + 6, int(site.experts.max()) + 6),
        (site.experts - 9, None),
    ):
        with pytest.raises(UsageError, match="none of the 8") as refused:
            dataclasses.replace(site, experts=experts)
        assert "0 to 7" in refused.value.hint
        assert named is None or f"expert {named} " in str(refused.value)
    with pytest.raises(UsageError, match="14 tokens in 2 slots"):
        dataclasses.replace(site, weights=site.weights[:, :1])
    with pytest.raises(UsageError, match="14 tokens in 2 slots"):
        dataclasses.replace(site, experts=site.experts[:3])
