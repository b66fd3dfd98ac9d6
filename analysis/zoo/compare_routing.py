"""Compare the routing of the built-in models with that of large trained ones.

Batch 1, decode only, 128 tokens a request, per layer, then the mean over layers (and over requests
for the built-in models): normalized entropy of expert usage, max/mean load, overlap of consecutive
steps with the same steps shuffled in time beside it, LRU hit rate with a cache of 1/8 and 1/4 of a
layer's experts. For models of which only counts are known: entropy and max/mean load per domain.

    python analysis/zoo/compare_routing.py --data ../shared/data --output routing.json
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from moeprof import zoo

NUM_STEPS = 128
SHUFFLES = 20


def figures(chosen: np.ndarray, num_experts: int) -> dict[str, float]:
    """Return the figures of one layer from its choices (step, slot) at batch 1."""
    k = chosen.shape[1]
    counts = np.bincount(chosen.ravel(), minlength=num_experts)
    share = counts[counts > 0] / counts.sum()
    result = {
        "entropy": float(-(share * np.log(share)).sum() / np.log(num_experts)),
        "max_over_mean": float(counts.max() / counts.mean()),
        "overlap": overlap(chosen, num_experts),
    }
    random = np.random.default_rng(0)
    shuffled = [overlap(random.permutation(chosen), num_experts) for _ in range(SHUFFLES)]
    result["overlap_shuffled"] = float(np.mean(shuffled))
    for name, part in (("eighth", 8), ("quarter", 4)):
        capacity = max(num_experts // part, 1)
        result[f"lru_hit_{name}"] = lru_hit_rate(chosen, capacity)
        result[f"lru_hit_{name}_shuffled"] = float(
            np.mean([lru_hit_rate(random.permutation(chosen), capacity) for _ in range(5)])
        )
    result["capacity_eighth_over_k"] = num_experts / 8 / k
    return result


def overlap(chosen: np.ndarray, num_experts: int) -> float:
    """Return the mean share of a step's experts that the step before used too."""
    used = np.zeros((len(chosen), num_experts), bool)
    used[np.arange(len(chosen))[:, None], chosen] = True
    return float((used[1:] & used[:-1]).sum(1).mean() / chosen.shape[1])


def lru_hit_rate(chosen: np.ndarray, capacity: int) -> float:
    """Return the share of lookups that a least-recently-used cache of one layer serves."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for step in chosen.tolist():
        hits += sum(expert in cache for expert in step)
        for expert in step:
            cache.pop(expert, None)
            cache[expert] = None
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / chosen.size


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average figures."""
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def of_route_file(path: Path) -> dict[str, float]:
    """Figures of a recorded run of Qwen3-30B-A3B (top-6)."""
    frame = pd.read_csv(path, comment="#")
    frame = frame[frame["phase"] == 1]
    rows = []
    for _, layer in frame.groupby("layer"):
        table = layer.pivot(index="step", columns="slot", values="expert").to_numpy()
        rows.append(figures(table[:NUM_STEPS], 128))
    return mean(rows)


def of_counts(path: Path) -> dict[str, dict[str, float]]:
    """Entropy and max/mean load from published counts, by model, the mean over domains, layers."""
    frame = pd.read_csv(path)
    found: dict[str, list[dict[str, float]]] = {}
    for keys, group in frame.groupby(["model", "domain", "layer"]):
        counts = group["count"].to_numpy(dtype=float)
        share = counts / counts.sum()
        share = share[share > 0]
        found.setdefault(str(keys[0]), []).append(
            {
                "entropy": float(-(share * np.log(share)).sum() / np.log(len(counts))),
                "max_over_mean": float(counts.max() / counts.mean()),
                "share_under_a_tenth": float((counts < 0.1 * counts.mean()).mean()),
            }
        )
    return {model: mean(rows) for model, rows in found.items()}


def nllb_choice(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the two experts of every token that is not padding, the heavier first."""
    weights, chosen = output[1].topk(2)
    return chosen[weights[:, 0] > 0]


class Routes:
    """Choices of every MoE layer of a model, as they are made."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps: dict[str, list[np.ndarray]] = {}
        for name, module in model.named_modules():
            kind = type(module).__name__
            if kind == "Qwen3MoeTopKRouter":
                module.register_forward_hook(self._hook(name, lambda out: out[2]))
            elif kind == "NllbMoeTop2Router":
                module.register_forward_hook(self._hook(name, nllb_choice))

    def _hook(self, name, choose):
        def hook(module, inputs, output):
            self.steps.setdefault(name, []).append(choose(output).cpu().numpy())

        return hook


@torch.inference_mode()
def of_builtin(name: str, num_requests: int) -> dict[str, object]:
    """Figures of decoding with a built-in model, and of its loads by domain or language."""
    loaded = zoo.load(name, device="cpu")
    routes = Routes(loaded.model)
    num_experts = loaded.model.config.num_experts
    rows: dict[str, list[dict[str, float]]] = {}
    tokens: dict[tuple[str, str], list[np.ndarray]] = {}
    joined: dict[str, list[np.ndarray]] = {}
    for batch in zoo.batches(loaded, loaded.prompts[:num_requests], 1):
        routes.steps.clear()
        loaded.model.generate(**batch.inputs, max_new_tokens=NUM_STEPS + 1, **batch.generate_kwargs)
        label = batch.prompts[0].domain if loaded.task == "lm" else batch.prompts[0].language
        for layer, steps in routes.steps.items():
            tokens.setdefault((label or "", layer), []).append(np.concatenate(steps))
            decode = [step for step in steps if len(step) == 1]
            if not decode:  # an encoder runs once, over the whole sentence
                continue
            chosen = np.concatenate(decode)[:NUM_STEPS]
            joined.setdefault(layer, []).append(chosen)
            if loaded.task == "lm" and len(chosen) >= NUM_STEPS:
                rows.setdefault(layer, []).append(figures(chosen, num_experts))
    if loaded.task == "mt":  # sentences are shorter: 128 tokens are several requests in a row
        for layer, parts in joined.items():
            stream = np.concatenate(parts)
            rows[layer] = [
                figures(stream[start : start + NUM_STEPS], num_experts)
                for start in range(0, len(stream) - NUM_STEPS + 1, NUM_STEPS)
            ]
    loads = []
    for steps in tokens.values():
        counts = np.bincount(np.concatenate(steps).ravel(), minlength=num_experts)
        share = counts[counts > 0] / counts.sum()
        loads.append(
            {
                "entropy": float(-(share * np.log(share)).sum() / np.log(num_experts)),
                "max_over_mean": float(counts.max() / counts.mean()),
                "share_under_a_tenth": float((counts < 0.1 * counts.mean()).mean()),
            }
        )
    return {
        "decode": mean([row for found in rows.values() for row in found]),
        "decode_by_layer": {layer: mean(found) for layer, found in rows.items()},
        "by_domain_and_layer": mean(loads),
        "requests": num_requests,
    }


def main() -> None:
    """Print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--models", nargs="*", default=["zoo:lm", "zoo:mt"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {name: of_builtin(name, args.requests) for name in args.models}
    route = args.data / "bigmoeonedge-qwen3-30b-a3b" / "qwen.route.csv"
    if route.exists():
        result["Qwen3-30B-A3B"] = {"decode": of_route_file(route)}
        counts = args.data / "olmoe_counts" / "expert_counts.csv.gz"
        result["counts"] = of_counts(counts)
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
