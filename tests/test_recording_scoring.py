"""The scoring rule is found by measurement, and scores are the router's own.

The ground truth is computed here from the logits that a hook of the test sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from recording_runs import padded_batch  # noqa: E402

import moeprof  # noqa: E402
from moeprof.recording.scoring import ScoringRule, infer_scoring  # noqa: E402
from moeprof.recording.sites import find_sites  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}

RULES = {
    "mixtral": ("softmax", True, 1.0, "by_weight"),
    "olmoe": ("softmax", False, 1.0, "by_weight"),
    "deepseek_v3": ("sigmoid", True, 2.5, "by_score"),
    "gpt_oss": ("softmax", True, 1.0, "by_weight"),
    "switch": ("softmax", False, 1.0, "by_weight"),
    "nllb_moe": ("softmax", True, 0.8, "by_weight"),
    "llama4": ("sigmoid", False, 1.0, "by_weight"),
}


def _model(name: str) -> Any:
    builders = {**tiny_models.LMS, **tiny_models.MTS, **tiny_models.OTHERS}
    return builders[name]()


def _record(model: Any, name: str, path: Path, **options: Any) -> Any:
    is_mt = name in tiny_models.MTS
    batch = padded_batch([7, 3, 5], side="right" if is_mt else "left", pad=1 if is_mt else 0)
    with moeprof.record(model, path, **options) as recorder:
        model.generate(**batch, **GREEDY)
    return moeprof.open(recorder.path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(RULES))
def test_rule(name: str, dtype: str, tmp_path: Path) -> None:
    model = _model(name).to(getattr(torch, dtype))
    trace = _record(model, name, tmp_path / "t.moeprof")
    for site in trace.sites:
        found = (site.scoring, site.renormalized, site.scaling_factor, site.slot_order)
        assert found == RULES[name]


@pytest.mark.parametrize("name", ["olmoe", "switch", "deepseek_v3"])
def test_scores_are_the_affinities_of_the_chosen_experts(name: str, tmp_path: Path) -> None:
    model = _model(name)
    found = find_sites(model)
    logits: dict[int, list[Any]] = {site: [] for site in range(len(found))}

    def keep(site: int, output: Any) -> None:
        tensor = output if torch.is_tensor(output) else output[0]
        logits[site].append(tensor.detach().reshape(-1, found[site].num_experts).double())

    handles = []
    for site, place in enumerate(found):
        router: Any = place.modules.router
        module = router.classifier if name == "switch" else router
        hook: Any = lambda module, args, output, site=site: keep(site, output)  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    trace = _record(model, name, tmp_path / "t.moeprof", scores=True)
    for handle in handles:
        handle.remove()
    wanted = ["step", "row", "expert", "score", "selection_score"]
    columns = wanted if name == "deepseek_v3" else wanted[:-1]
    checked = 0
    for site, place in enumerate(found):
        steps = sorted(trace.layers[trace.layers["site"] == site]["step"])
        for step, raw in zip(steps, logits[site], strict=True):
            table = trace.routing(stack=place.stack, steps=step, columns=[*columns, "site"])
            table = table[table["site"] == site]
            affinity = torch.sigmoid(raw) if name == "deepseek_v3" else torch.softmax(raw, dim=-1)
            cells = affinity[table["row"].to_numpy(), table["expert"].to_numpy()].numpy()
            assert np.allclose(table["score"], cells, rtol=2e-3, atol=1e-6)
            checked += len(table)
            if name == "deepseek_v3":
                router = place.modules.router
                bias = router.e_score_correction_bias.double().numpy()
                biased = cells + bias[table["expert"].to_numpy()]
                assert np.allclose(table["selection_score"], biased, rtol=2e-3, atol=1e-3)
    assert checked > 40


def test_scores_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    trace = _record(_model("mixtral"), "mixtral", tmp_path / "t.moeprof")
    assert trace.routing(columns=["score"])["score"].isna().all()


def _case(rows: int = 64, experts: int = 8, top_k: int = 2) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (rows, experts)).astype(np.float32)
    ids = np.argsort(-logits, axis=1)[:, :top_k]
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits, ids, np.take_along_axis(softmax, ids, axis=1)


@pytest.mark.parametrize("factor", [1.0, 2.5, 1.004, 0.0625, 16.0])
def test_the_scaling_factor_is_exact_where_weights_are(factor: float) -> None:
    logits, ids, scores = _case()
    assert infer_scoring(logits, ids, scores * factor) == ScoringRule("softmax", False, factor)


def test_a_rule_of_another_kind_stays_unknown() -> None:
    logits, ids, scores = _case()
    assert infer_scoring(logits, ids, scores**2) is None
    assert infer_scoring(logits[:1], ids[:1], scores[:1]) is None
