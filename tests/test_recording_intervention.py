"""The trace says what the model did: verified by changing one expert at a time.

For every architecture, on prefill and on decode: changing expert e changes exactly the tokens
recorded for e, and by the recorded weight times what the expert itself puts out. Nothing here
looks at routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402

import moeprof  # noqa: E402
from moeprof.recording.sites import FoundSite, find_sites  # noqa: E402
from moeprof.trace.reader import Trace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SCALE = 0.5
PROMPT_COLUMNS = 7
NEW_TOKENS = 4


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every check also runs on a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return str(request.param)


@dataclass
class BlockCall:
    """The input one MoE block got in one forward pass of its stack."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _watch_blocks(sites: list[FoundSite]) -> tuple[dict[int, list[BlockCall]], list[Any]]:
    calls: dict[int, list[BlockCall]] = {i: [] for i in range(len(sites))}

    def keep(site: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            cloned = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            calls[site].append(BlockCall(cloned, dict(kwargs)))

        return hook

    handles = [
        site.modules.block.register_forward_pre_hook(keep(i), with_kwargs=True)
        for i, site in enumerate(sites)
    ]
    return calls, handles


def _inputs(task: str, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 95, (3, PROMPT_COLUMNS), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(0, 3) if task == "lm" else slice(PROMPT_COLUMNS - 3, PROMPT_COLUMNS)
    mask[1, padded] = 0
    ids[1, padded] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _expert_parameters(site: FoundSite, expert: int) -> Iterator[Any]:
    """Yields views of everything that scales the output of one expert."""
    if site.expert_modules:
        last = list(site.expert_modules[expert].named_parameters())
        names = ("fc2", "wo")
        yield from (p.data for name, p in last if name.split(".")[0] in names)
        return
    assert site.modules.experts is not None
    for name, parameter in site.modules.experts.named_parameters():
        if "down_proj" in name or "output_linear" in name:
            yield parameter.data[expert]


def _run_block(site: FoundSite, call: BlockCall) -> np.ndarray:
    with torch.no_grad():
        out = site.modules.block(*call.args, **call.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(-1, out.shape[-1]).double().cpu().numpy()


def _expert_output(site: FoundSite, call: BlockCall, expert: int, top_k: int) -> np.ndarray:
    """Returns what one expert puts out for every row: the model's own experts module, told to
    apply this expert alone with weight 1.
    """
    hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.no_grad():
        if site.expert_modules:
            return site.expert_modules[expert](flat).double().cpu().numpy()
        others = [e for e in range(site.num_experts) if e != expert][: top_k - 1]
        ids = torch.tensor([[expert, *others]]).repeat(flat.shape[0], 1).to(flat.device)
        weights = torch.zeros(flat.shape[0], top_k, device=flat.device)
        weights[:, 0] = 1.0
        return site.modules.experts(flat, ids, weights).double().cpu().numpy()


def _recorded(trace: Trace, site: int, step: int, rows: int) -> np.ndarray:
    """Returns [rows, experts] recorded weights of one dispatch; NaN where rows were left out."""
    spec = trace.sites[site]
    table = trace.routing(
        stack=spec.stack, steps=step, columns=["row", "site", "expert", "weight", "status"]
    )
    table = table[table["site"] == site]
    result = np.full((rows, spec.num_experts), np.nan)
    result[table["row"].unique()] = 0.0
    routed = table[table["status"] == 0]
    result[routed["row"], routed["expert"]] = routed["weight"]
    return result


def _check(
    model: Any, sites: list[FoundSite], calls: dict[int, list[BlockCall]], trace: Trace,
    *, weights: bool = True,
) -> None:  # fmt: skip
    steps = {stack: trace.steps[trace.steps["stack"] == stack]["step"].tolist()
             for stack in trace.stacks}  # fmt: skip
    changed_pairs = 0
    for i, site in enumerate(sites):
        stack_steps = steps[site.stack]
        assert len(calls[i]) == len(stack_steps)
        for call, step in list(zip(calls[i], stack_steps, strict=True))[:3]:
            before = _run_block(site, call)
            recorded = _recorded(trace, i, step, before.shape[0])
            kept = ~np.isnan(recorded[:, 0])
            assert kept.any()
            scale = np.abs(before).max()
            for expert in range(site.num_experts):
                own = _expert_output(site, call, expert, trace.sites[i].top_k) if weights else None
                views = list(_expert_parameters(site, expert))
                assert views, "the test must know what scales an expert's output"
                saved = [view.clone() for view in views]
                for view in views:
                    view.mul_(1.0 + SCALE)
                after = _run_block(site, call)
                for view, original in zip(views, saved, strict=True):
                    view.copy_(original)
                delta = after - before
                changed = np.abs(delta).max(axis=1) > 1e-5 * scale
                routed = recorded[:, expert] > 0
                assert np.array_equal(changed[kept], routed[kept]), (
                    f"{site.name} step {step} expert {expert}: "
                    f"changed {np.flatnonzero(changed & kept)}, "
                    f"recorded {np.flatnonzero(routed & kept)}"
                )
                changed_pairs += int(changed[kept].sum())
                if own is not None:
                    predicted = SCALE * recorded[:, [expert]] * own
                    error = np.abs(delta - predicted)[kept].max(initial=0.0)
                    assert error <= 2e-3 * max(np.abs(own).max(), 1e-9), (
                        f"{site.name} step {step} expert {expert}: weight off"
                    )
    assert changed_pairs > 0


@pytest.mark.parametrize("name", list(tiny_models.LMS))
def test_lm_routing_is_the_models_own(name: str, device: str, tmp_path: Path) -> None:
    model = tiny_models.LMS[name]().to(device)
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model.generate(**_inputs("lm", device), max_new_tokens=NEW_TOKENS, do_sample=False)
    for handle in handles:
        handle.remove()
    trace = moeprof.open(recorder.path)
    assert set(trace.steps["phase"]) == {"prefill", "decode"}
    _check(model, sites, calls, trace)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_is_seen(
    implementation: str, device: str, tmp_path: Path
) -> None:
    model = tiny_models.qwen3_moe().to(device)
    model.set_experts_implementation(implementation)
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model.generate(**_inputs("lm", device), max_new_tokens=NEW_TOKENS, do_sample=False)
    for handle in handles:
        handle.remove()
    trace = moeprof.open(recorder.path)
    # On a GPU `generate` swaps grouped_mm for batched_mm while it decodes.
    assert implementation in trace.info.kernels.values()
    assert trace.info.capture.num_executed_checked > 0
    assert trace.info.capture.num_executed_disagreeing == 0
    _check(model, sites, calls, trace)


def test_switch_encoder_and_decoder(device: str, tmp_path: Path) -> None:
    model = tiny_models.switch().to(device)
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model.generate(**_inputs("mt", device), max_new_tokens=NEW_TOKENS, do_sample=False)
    for handle in handles:
        handle.remove()
    trace = moeprof.open(recorder.path)
    assert trace.stacks == ("encoder", "decoder")
    _check(model, sites, calls, trace)


@pytest.mark.parametrize("fraction", [1.0, 0.12])
def test_nllb_with_correct_dispatch(fraction: float, device: str, tmp_path: Path) -> None:
    from moeprof.zoo.dispatch import fix_nllb_dispatch

    model = tiny_models.nllb_moe(moe_eval_capacity_token_fraction=fraction).to(device)
    assert fix_nllb_dispatch(model) == 4
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof", fixes=("nllb-dispatch",)) as recorder:
        model.generate(
            **_inputs("mt", device), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=2
        )
    for handle in handles:
        handle.remove()
    trace = moeprof.open(recorder.path)
    assert trace.info.capture.num_executed_disagreeing == 0
    dropped = trace.layers["num_dropped"].sum()
    assert (dropped > 0) == (fraction < 1.0)
    _check(model, sites, calls, trace)


def test_llama4_runs_every_expert_but_routes_few(device: str, tmp_path: Path) -> None:
    model = tiny_models.llama4().to(device)
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model.generate(**_inputs("lm", device), max_new_tokens=NEW_TOKENS, do_sample=False)
    for handle in handles:
        handle.remove()
    # Its experts multiply their input by the weight, so only the tokens can be compared.
    _check(model, sites, calls, moeprof.open(recorder.path), weights=False)


def test_a_wrong_trace_would_be_caught(device: str, tmp_path: Path) -> None:
    """The check itself can fail: another model's calls do not fit this trace."""
    model = tiny_models.mixtral().to(device)
    sites = find_sites(model)
    calls, handles = _watch_blocks(sites)
    with moeprof.record(model, tmp_path / "t.moeprof") as recorder:
        model.generate(**_inputs("lm", device), max_new_tokens=NEW_TOKENS, do_sample=False)
    for handle in handles:
        handle.remove()
    for site_calls in calls.values():
        site_calls[0] = BlockCall((site_calls[0].args[0].flip(0),), site_calls[0].kwargs)
    with pytest.raises(AssertionError):
        _check(model, sites, calls, moeprof.open(recorder.path))
