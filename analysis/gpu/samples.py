"""Records the sample traces of `traces/samples/` on a GPU.

Three recordings: the built-in language model, the built-in translation model, and a plain torch
language model of the founding paper's shape (arXiv 2303.06182, Table I: 52B, 512 experts, top-2)
with as many layers as fit the device. The third has random weights: its times and bytes are real,
its routing means nothing, and the trace says so.

    python analysis/gpu/samples.py --out DIR                 # on a GPU
    python analysis/gpu/samples.py --out DIR --tiny          # tries the script on a CPU

Each trace is left in DIR as NAME.moeprof.tar.gz, with a summary in DIR/samples.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import moeprof
from moeprof.live.paper_lm import PaperExperts, PaperLm, PaperLmConfig
from moeprof.recording.hardware import hardware, versions
from moeprof.recording.summary import recording_lines
from moeprof.recording.tokens import RequestLabel

ROOT = Path(__file__).resolve().parents[2]
NUM_REQUESTS = 48
BATCH_SIZE = 8
PROMPT_TOKENS = 192
NEW_TOKENS = 17
RESERVED_BYTES = 8 << 30
PROBE_EVERY = 16


def fitting(config: PaperLmConfig, free_bytes: int) -> PaperLmConfig:
    """Returns ``config`` with as many layers, in steps of a dense and a MoE layer, as fit."""
    layers = config.num_layers
    while layers > config.moe_every:
        with torch.device("meta"):
            model = PaperLm(replace(config, num_layers=layers), device="meta")
        if 2 * model.num_params + RESERVED_BYTES <= free_bytes:
            break
        layers -= config.moe_every
    return replace(config, num_layers=layers)


def record_paper_lm(path: Path, *, device: str, tiny: bool) -> None:
    """Records the plain torch model into ``path``."""
    config = PaperLmConfig()
    if tiny:
        config = replace(
            config, vocab_size=512, num_layers=4, d_model=64, d_ff=128, num_heads=4, num_experts=32
        )
    elif device == "cuda":
        config = fitting(config, torch.cuda.mem_get_info()[0])
    begun = time.perf_counter()
    model = PaperLm(config, device=device, dtype=torch.float32 if tiny else torch.bfloat16)
    print(f"built {config.num_layers} layers, {model.num_params / 1e9:.2f} B parameters, "
          f"{time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip
    moeprof.register(PaperExperts, ids="top_k_index", weights="top_k_weights")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (NUM_REQUESTS, PROMPT_TOKENS), generator=generator)
    model.generate(ids[:BATCH_SIZE].to(device), max_new_tokens=3)
    recorder = moeprof.record(
        model,
        path,
        name=f"paper-lm-{config.num_layers}-layers",
        mode="forward",
        probe_every=PROBE_EVERY,
        random_weights=True,
        command="python analysis/gpu/samples.py",
        notes=("Random weights and random tokens: times and bytes are real, routing is not.",),
        force=True,
    )
    with recorder:
        for first in range(0, NUM_REQUESTS, BATCH_SIZE):
            labels = [
                RequestLabel(prompt_id=f"random-{i}", domain=f"random-tokens-{i % 4}")
                for i in range(first, first + BATCH_SIZE)
            ]
            recorder.announce(labels)
            model.generate(ids[first : first + BATCH_SIZE].to(device), max_new_tokens=NEW_TOKENS)
        recorder.profile(lambda: model.generate(ids[:BATCH_SIZE].to(device), max_new_tokens=10))


def main() -> None:
    """Records, packs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--only", choices=("lm", "mt", "paper"), action="append")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": "python analysis/gpu/samples.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware(torch.device(device))),
        "versions": versions(),
        "traces": {},
    }
    work = options.out / "traces"
    for name in options.only or ("lm", "mt", "paper"):
        path = work / f"{name}.moeprof"
        begun = time.perf_counter()
        if name == "paper":
            record_paper_lm(path, device=device, tiny=options.tiny)
        else:
            limit = ["--limit", "16"] if options.tiny else []
            command = [sys.executable, "-m", "moeprof", "record", f"zoo:{name}", "--force", "-o",
                       path.name, "--device", device, *limit]  # fmt: skip
            work.mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, cwd=work, env=environment)
        trace = moeprof.open(path)
        problems = moeprof.check(path).problems
        archive = options.out / f"{name}.moeprof.tar.gz"
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(path, arcname=path.name)
        lines = recording_lines(path)
        results["traces"][name] = {
            "size_bytes": trace.num_bytes,
            "num_requests": len(trace.requests),
            "elapsed_s": round(time.perf_counter() - begun, 1),
            "summary": lines,
            "problems": [f"{p.severity} {p.code}: {p.message}" for p in problems],
        }
        print(f"== {name}", *lines, *results["traces"][name]["problems"], sep="\n", flush=True)
    text = json.dumps(results, indent=2)
    (options.out / "samples.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
