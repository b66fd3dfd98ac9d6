"""What was not captured is an error, and a recorded model is as it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from recording_runs import hook_count, padded_batch, record_run  # noqa: E402

import moeprof  # noqa: E402
from moeprof.errors import CaptureError, MoeprofError  # noqa: E402
from moeprof.trace.validator import check  # noqa: E402

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}
BATCH = padded_batch([7, 3, 5])


class BoomError(Exception):
    pass


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.qwen2_moe()


def _forward(model: Any) -> Any:
    with torch.no_grad():
        return model(**BATCH).logits


def _raise_in(module: Any, *, call: int = 1, after: bool = False) -> Any:
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1
        if count[0] == call:
            raise BoomError

    return module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook)


def test_the_model_is_as_it_was(model: Any, tmp_path: Path) -> None:
    from transformers import cache_utils

    methods = (cache_utils.Cache.reorder_cache, cache_utils.EncoderDecoderCache.reorder_cache)
    expected, generated = _forward(model), model.generate(**BATCH, **GREEDY)
    assert hook_count(model) == 0
    for name in ("a", "b"):
        run = record_run(
            model, tmp_path / f"{name}.moeprof", lambda: model.generate(**BATCH, **GREEDY)
        )
        assert torch.equal(run.result, generated)
        assert hook_count(model) == 0
        assert "generate" not in vars(model)
    assert methods == (
        cache_utils.Cache.reorder_cache,
        cache_utils.EncoderDecoderCache.reorder_cache,
    )
    assert torch.equal(_forward(model), expected)
    first, second = (moeprof.open(tmp_path / f"{name}.moeprof") for name in ("a", "b"))
    assert first.routing().equals(second.routing())


def test_a_generate_of_its_own_is_kept(model: Any, tmp_path: Path) -> None:
    original = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.generate = generate
    try:
        run = record_run(model, tmp_path / "t.moeprof", lambda: model.generate(**BATCH, **GREEDY))
        assert model.generate is generate
    finally:
        del model.generate
    assert run.trace.requests["num_output_tokens"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_every_grad_mode(model: Any, mode: Any, tmp_path: Path) -> None:
    def run() -> None:
        with mode():
            model(**BATCH)
            model.generate(**BATCH, **GREEDY)

    assert len(record_run(model, tmp_path / "t.moeprof", run).calls) == 4


def test_a_pass_that_raises_becomes_no_step(model: Any, tmp_path: Path) -> None:
    layer = model.model.layers[1]
    places = [
        (model.model.embed_tokens, False),
        (layer.mlp.gate, False),
        (layer.mlp.experts, False),
        (layer.mlp.experts, True),
        (model.lm_head, False),
        (model.lm_head, True),
    ]
    expected = _forward(model)
    with moeprof.record(model, tmp_path / "t.moeprof", probe_every=0) as recorder:
        for module, after in places:
            handle = _raise_in(module, after=after)
            with pytest.raises(BoomError):
                _forward(model)
            handle.remove()
        _forward(model)
        handle = _raise_in(model.lm_head, call=3)
        with pytest.raises(BoomError):
            model.generate(**BATCH, **{**GREEDY, "max_new_tokens": 6})
        handle.remove()
        assert torch.equal(_forward(model), expected)
    assert hook_count(model) == 0
    trace: Any = moeprof.open(recorder.path)
    assert trace.complete
    assert trace.steps["phase"].tolist() == ["prefill", "prefill", "decode", "prefill"]
    assert trace.requests["num_output_tokens"].tolist() == [0] * 3 + [1] * 3 + [0] * 3
    assert check(trace).ok
    # Times are those of whole passes only.
    timed = trace.layers[trace.layers["step"] == 3]
    assert timed["layer_ms"].notna().all()


def test_a_body_that_raises_leaves_an_incomplete_trace(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.moeprof"
    with pytest.raises(BoomError), moeprof.record(model, path):
        model.generate(**BATCH, **GREEDY)
        raise BoomError
    trace: Any = moeprof.open(path)
    assert not trace.complete
    assert len(trace.steps) == 3
    assert trace.requests["num_output_tokens"].tolist() == [3, 3, 3]
    assert hook_count(model) == 0
    result = check(trace)
    assert result.ok
    assert result.codes >= {"incomplete"}


def test_a_model_that_never_ran(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.moeprof"
    with pytest.raises(CaptureError, match="did not run") as caught, moeprof.record(model, path):
        pass
    assert "with block" in caught.value.hint
    assert not path.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["whole", "layers"])
def test_a_compiled_model_whose_hooks_are_silent(part: str, tmp_path: Path) -> None:
    model: Any = tiny_models._build(
        "MixtralForCausalLM",
        "MixtralConfig",
        **{**tiny_models.COMMON, "num_hidden_layers": 1, "num_local_experts": 2},
    )
    torch._dynamo.reset()
    try:
        for module in [model] if part == "whole" else model.model.layers:
            module.compile(backend="eager")
        _forward(model)
        with (
            pytest.raises(CaptureError, match="nothing was captured") as caught,
            moeprof.record(model, tmp_path / "t.moeprof"),
        ):
            _forward(model)
    finally:
        torch._dynamo.reset()
    assert "compile" in caught.value.hint
    if part == "layers":
        assert not moeprof.open(tmp_path / "t.moeprof").complete


def test_a_site_that_is_silent(model: Any, tmp_path: Path) -> None:
    """A fused kernel took the place of one block."""
    block = model.model.layers[1].mlp
    path = tmp_path / "t.moeprof"
    with (
        pytest.raises(CaptureError, match="1 of 2 MoE calls") as caught,
        moeprof.record(model, path),
    ):
        _forward(model)
        block.forward = lambda hidden: hidden * 0
        try:
            _forward(model)
        finally:
            del block.forward
    assert "model.layers.1.mlp" in caught.value.message
    assert caught.value.hint
    trace: Any = moeprof.open(path)
    assert not trace.complete
    assert len(trace.steps) == 2
    assert not check(trace).ok


def test_recorders_that_end_in_another_order(model: Any, tmp_path: Path) -> None:
    from transformers import cache_utils

    method = cache_utils.Cache.reorder_cache
    recorders = [moeprof.record(model, tmp_path / f"{i}.moeprof") for i in range(2)]
    for recorder in recorders:
        recorder.start()
    model.generate(**BATCH, **GREEDY)
    recorders[0].stop()
    expected = model.generate(**BATCH, **GREEDY, num_beams=2)
    recorders[1].stop()
    assert hook_count(model) == 0
    assert torch.equal(model.generate(**BATCH, **GREEDY, num_beams=2), expected)
    assert [len(moeprof.open(recorder.path).requests) for recorder in recorders] == [3, 6]
    assert cache_utils.Cache.reorder_cache is method
    vars(model).pop("generate", None)  # The wrapper of the first passes calls on.


def test_generate_does_not_compile_while_it_is_recorded(model: Any, tmp_path: Path) -> None:
    """On a GPU it would, by itself, wherever the cache is static."""
    from transformers import CompileConfig

    config: Any = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    settings = {**GREEDY, "cache_implementation": "static", "compile_config": config}
    expected = model.generate(**BATCH, **GREEDY)
    run = record_run(model, tmp_path / "t.moeprof", lambda: model.generate(**BATCH, **settings))
    assert torch.equal(run.result, expected)
    assert run.trace.requests["num_prompt_tokens"].tolist() == [7, 3, 5]


@pytest.mark.filterwarnings("ignore")
def test_several_sequences_in_one_row(model: Any, tmp_path: Path) -> None:
    """Continuous batching, and packed rows in training: whose token is whose cannot be told."""
    ids = BATCH["input_ids"]
    with (
        pytest.raises(CaptureError, match="1 forward passes held several sequences") as caught,
        moeprof.record(model, tmp_path / "t.moeprof"),
        torch.no_grad(),
    ):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 3, 7]))
    assert "padded batches" in caught.value.hint


def test_an_output_that_exists(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.moeprof"
    record_run(model, path, lambda: _forward(model))
    with pytest.raises(MoeprofError, match="exists") as caught:
        moeprof.record(model, path).start()
    assert "--force" in caught.value.hint
    assert hook_count(model) == 0
    record_run(model, path, lambda: [_forward(model) for _ in range(2)], force=True)
    assert len(moeprof.open(path).steps) == 2


def test_an_unknown_option(model: Any) -> None:
    with pytest.raises(MoeprofError, match="'foo'") as caught:
        moeprof.record(model, "never.moeprof", foo=1)
    assert "probe_every" in caught.value.hint


def test_a_trace_holds_no_text(model: Any, tmp_path: Path) -> None:
    run = record_run(model, tmp_path / "t.moeprof", lambda: model.generate(**BATCH, **GREEDY))
    assert not run.trace.has_table("token_ids")
    assert (tmp_path / "t.moeprof").stat().st_mode & 0o077 == 0
    for path in (tmp_path / "t.moeprof").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
