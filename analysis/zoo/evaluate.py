"""Evaluate a built-in model on held-out text with stock transformers, and write its figures.

Language model: bits per byte by domain beside unigram baselines (over its own tokens and over
bytes, each estimated on the training text of all domains and of the domain alone). Translation:
chrF2 and BLEU by language and domain, greedy, with the corrected dispatch and, on help text,
without it. Both: how often each layer uses its experts on held-out text.

    python analysis/zoo/evaluate.py lm --pack .zoo-pack --output analysis/results/zoo_lm.json
    python analysis/zoo/evaluate.py mt --pack .zoo-pack --output analysis/results/zoo_mt.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from clean import fraction
from compare_routing import Routes
from vocabulary import read_rows

from moeprof import zoo

CONTEXT = 512
STRIDE = 384  # every token is scored once, with 128 tokens of context at least
SENTENCES = 600
BATCH = 128


def facts(loaded: zoo.LoadedModel) -> dict[str, object]:
    """What ran where."""
    parts = Path(zoo.builtin(loaded.name).folder)
    size = (parts / "model.safetensors").stat().st_size
    return {
        "model": loaded.name,
        "architecture": loaded.architecture,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "safetensors_bytes": size,
        "weight_hash": loaded.weight_hash,
        "fixes": list(loaded.fixes),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "device": "CUDA " + torch.cuda.get_device_name()
        if loaded.model.device.type == "cuda"
        else f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def usage_figures(routes: Routes, num_experts: int) -> dict[str, object]:
    """How unequally each layer used its experts."""
    layers = {}
    for name, steps in routes.steps.items():
        counts = np.bincount(np.concatenate(steps).ravel(), minlength=num_experts)
        share = counts / counts.mean()
        used = share[share > 0] / num_experts
        layers[name] = {
            "least_over_uniform": round(float(share.min()), 3),
            "most_over_uniform": round(float(share.max()), 3),
            "experts_under_a_tenth": int((share < 0.1).sum()),
            "entropy": round(float(-(used * np.log(used)).sum() / np.log(num_experts)), 4),
        }
    return layers


# ---------------------------------------------------------------- language model
@torch.inference_mode()
def bits_per_byte(
    loaded: zoo.LoadedModel, documents: dict[str, list[list[int]]], sizes: dict[str, int]
) -> dict[str, float]:
    """Score every token of every document once, in strided windows of the context."""
    result = {}
    for domain, rows in documents.items():
        total = 0.0
        windows = [
            (ids[start : start + CONTEXT + 1], 0 if start == 0 else CONTEXT - STRIDE)
            for ids in rows
            for start in range(0, max(len(ids) - 1 - (CONTEXT - STRIDE), 1), STRIDE)
        ]
        windows.sort(key=lambda w: len(w[0]))
        for first in range(0, len(windows), 8):
            group = windows[first : first + 8]
            width = max(len(ids) for ids, _ in group)
            ids = torch.zeros(len(group), width, dtype=torch.int64)
            keep = torch.zeros(len(group), width - 1, dtype=torch.bool)
            for row, (tokens, skip) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                keep[row, skip : len(tokens) - 1] = True
            ids = ids.to(loaded.model.device)
            logits = loaded.model(input_ids=ids[:, :-1]).logits.float()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            total += float(losses[keep.to(losses.device)].sum())
        result[domain] = total / math.log(2) / sizes[domain]
        print(domain, f"{result[domain]:.4f} bits per byte", flush=True)
    return result


def unigram_bits(
    train: list[np.ndarray], held: list[np.ndarray], num_symbols: int, num_bytes: int
) -> float:
    """Bits per byte of an add-one unigram model."""
    counts = np.ones(num_symbols)
    for row in train:
        counts += np.bincount(row, minlength=num_symbols)
    code_lengths = -np.log2(counts / counts.sum())
    return float(sum(code_lengths[row].sum() for row in held) / num_bytes)


def evaluate_lm(loaded: zoo.LoadedModel, pack: Path, every: int) -> dict[str, object]:
    """Bits per byte by domain, baselines and usage."""
    rows = read_rows(pack / "lm.jsonl.xz")
    tokenizer = loaded.tokenizer
    encoded = tokenizer([row["text"] for row in rows])["input_ids"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    held = {d: [] for d in domains}
    held_bytes = dict.fromkeys(domains, 0)
    tokens: dict[tuple[str, str], list[np.ndarray]] = {}
    symbols: dict[tuple[str, str], list[np.ndarray]] = {}
    taken = dict.fromkeys(domains, 0)
    for row, ids in zip(rows, encoded, strict=True):
        domain, data = row["domain"], row["text"].encode()
        if row["split"] == "test":
            taken[domain] += 1
            if taken[domain] % every:
                continue
            held[domain].append([0, *ids, 0])
            held_bytes[domain] += len(data)
        key = (domain, row["split"])
        tokens.setdefault(key, []).append(np.array([*ids, 0]))
        symbols.setdefault(key, []).append(np.frombuffer(data, np.uint8))
    routes = Routes(loaded.model)
    start = time.perf_counter()
    bits = bits_per_byte(loaded, held, held_bytes)
    table = {}
    for domain in domains:
        baselines = {}
        for name, units, size in (("token", tokens, len(tokenizer)), ("byte", symbols, 256)):
            own = units[domain, "train"]
            mix = [row for d in domains for row in units[d, "train"]]
            for scope, train in (("mix", mix), ("domain", own)):
                baselines[f"{name}_unigram_{scope}"] = round(
                    unigram_bits(train, units[domain, "test"], size, held_bytes[domain]), 4
                )
        hardest = min(baselines.values())
        table[domain] = {
            "bits_per_byte": round(bits[domain], 4),
            **baselines,
            "share_of_token_unigram_mix": round(bits[domain] / baselines["token_unigram_mix"], 4),
            "share_of_hardest_unigram": round(bits[domain] / hardest, 4),
            "share_of_byte_unigram_mix": round(bits[domain] / baselines["byte_unigram_mix"], 4),
            "documents": len(held[domain]),
            "bytes": held_bytes[domain],
            "tokens": sum(len(ids) for ids in held[domain]),
        }
    return {
        "held_out": table,
        "usage": usage_figures(routes, loaded.model.config.num_experts),
        "seconds": round(time.perf_counter() - start),
    }


# ---------------------------------------------------------------- translation
@torch.inference_mode()
def translate(loaded: zoo.LoadedModel, prompts: list[zoo.Prompt]) -> list[str]:
    """Translate greedily, sentences of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))
    outputs = [""] * len(prompts)
    batches = zoo.batches(loaded, [prompts[i] for i in order], BATCH)
    done = 0
    for batch in batches:
        longest = batch.inputs["input_ids"].shape[1]
        ids = loaded.model.generate(
            **batch.inputs, max_new_tokens=min(2 * longest + 10, 160), **batch.generate_kwargs
        )
        for row in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True):
            outputs[order[done]] = row.strip()
            done += 1
    return outputs


def scores(outputs: list[str], references: list[str]) -> dict[str, object]:
    """chrF2 and BLEU with their signatures."""
    from sacrebleu.metrics import BLEU, CHRF

    result: dict[str, object] = {"sentences": len(outputs)}
    for name, metric in (("chrf2", CHRF()), ("bleu", BLEU())):
        score = metric.corpus_score(outputs, [references])
        result[name] = round(score.score, 2)
        result[f"{name}_signature"] = str(metric.get_signature())
    return result


def evaluate_mt(
    loaded: zoo.LoadedModel, pack: Path, limit: int, domains: list[str]
) -> dict[str, object]:
    """chrF2 and BLEU by domain and language, with and without the fix; usage."""
    broken = zoo.load("zoo:mt", device=str(loaded.model.device), fixes=())
    rows = [row for row in read_rows(pack / "mt.jsonl.xz") if row["split"] == "test"]
    groups: dict[tuple[str, str], dict[str, zoo.Prompt]] = {}
    for row in sorted(rows, key=lambda r: fraction(f"evaluate {r['source']}")):
        words = len(row["source"].split())
        group = groups.setdefault((row["domain"], row["language"]), {})
        if len(group) >= limit or not 4 <= words <= 60 or row["source"] in group:
            continue
        group[row["source"]] = zoo.Prompt(
            id=str(len(group)),
            text=row["source"],
            source_language="eng_Latn",
            language=row["language"],
            reference=row["target"],
        )
    start = time.perf_counter()
    table: dict[str, dict[str, object]] = {}
    every: list[zoo.Prompt] = []
    without: dict[str, object] = {}
    for (domain, language), group in sorted(groups.items()):
        if domain not in domains:
            continue
        prompts = list(group.values())
        every += prompts
        references = [prompt.reference or "" for prompt in prompts]
        outputs = translate(loaded, prompts)
        table.setdefault(domain, {})[language] = scores(outputs, references)
        print(domain, language, table[domain][language], flush=True)
        if domain == "help":
            wrong = translate(broken, prompts)
            without[language] = {
                **scores(wrong, references),
                "example": {
                    "source": prompts[0].text,
                    "reference": prompts[0].reference,
                    "with_fix": outputs[0],
                    "without_fix": wrong[0],
                },
            }
            print("  without the fix", without[language], flush=True)
    routes = Routes(loaded.model)
    with torch.inference_mode():  # teacher-forced, so that rows past the end do not count
        for batch in zoo.batches(loaded, sorted(every, key=lambda p: len(p.text)), BATCH):
            loaded.model(**batch.inputs, **batch.targets, use_cache=False)
    return {
        "held_out": table,
        "help_without_dispatch_fix": without,
        "usage": usage_figures(routes, loaded.model.config.num_experts),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    """Evaluate one model and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=["lm", "mt"])
    parser.add_argument("--pack", type=Path, default=Path(".zoo-pack"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--every", type=int, default=1, help="every n-th held-out document only")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument(
        "--domains", nargs="*", default=["help", "interface", "game", "docs", "scripture"]
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = zoo.load(f"zoo:{args.task}", device=args.device, dtype="float32")
    result = facts(loaded)
    if args.task == "lm":
        result |= evaluate_lm(loaded, args.pack, args.every)
    else:
        result |= evaluate_mt(loaded, args.pack, args.sentences, args.domains)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
