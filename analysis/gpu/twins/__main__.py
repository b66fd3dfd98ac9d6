"""Trains a routing twin by the clock and records it on held-out text.

Models of the founding paper's routing geometry (arXiv 2303.06182, Table I), narrow otherwise:

    python -m analysis.gpu.twins lm --data .twin-pack --out DIR --minutes 7
    python -m analysis.gpu.twins mt --data .twin-pack --out DIR --minutes 7
    python -m analysis.gpu.twins lm --data .twin-pack --out DIR --minutes 0.5 --tiny   # on a CPU
    python -m analysis.gpu.twins evidence DIR/twin-lm.moeprof.tar.gz DIR/twin-lm.json

DIR gets TASK's trace (`twin-TASK.moeprof.tar.gz`) and what was learned and routed
(`twin-TASK.json`). Of the model nothing is kept. With `--no-evidence` the figures of the routing,
which need no GPU, are left to the verb `evidence`. `analysis.gpu.twins.pack` makes the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import moeprof
from analysis.gpu.twins import pack as packing
from analysis.gpu.twins.batches import LmBatches, MtBatches
from analysis.gpu.twins.evidence import routing_evidence
from analysis.gpu.twins.learning import LearningOptions, held_out, learn
from analysis.gpu.twins.model import Twin
from analysis.gpu.twins.recording import LmPlan, MtPlan, Recorded, archive, record
from analysis.gpu.twins.shape import TwinConfig, lm_config, mt_config
from moeprof.recording.hardware import hardware, versions

TASKS = ("lm", "mt")
BATCH_TOKENS = {"lm": 32768, "mt": 16384}
PEAK_RATE = {"lm": 8e-4, "mt": 6e-4}
SMOOTHING = {"lm": 0.0, "mt": 0.1}
HELD_OUT_ROWS = {"lm": 16, "mt": 96}


def tiny(config: TwinConfig) -> TwinConfig:
    """Returns a shape of the same kind that a CPU trains in seconds."""
    return replace(
        config,
        encoder_layers=4 * config.is_encoder_decoder,
        decoder_layers=4,
        d_model=48,
        num_experts=16,
        expert_width=16,
        ffn_width=64,
        attention_width=32,
        num_heads=2,
        max_positions=64,
        dtype="float32",
    )


def tiny_plan(plan: LmPlan | MtPlan, domains: tuple[str, ...]) -> LmPlan | MtPlan:
    """Returns a plan of the same kind that takes seconds."""
    if isinstance(plan, LmPlan):
        return replace(
            plan, domains=domains, sequences=4, batch=4, prompts=2, prompt_tokens=16, new_tokens=6,
            generate_batch=4,
        )  # fmt: skip
    return replace(plan, batch=6, batches=2, source_tokens=(2, 48), new_tokens=12)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, records, packs; returns what was found, as written to DIR."""
    begun = time.perf_counter()
    task = args.task
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.data / f"{task}.pack"
    pack = packing.read_lm(source) if task == "lm" else packing.read_mt(source)
    config = (lm_config if task == "lm" else mt_config)(pack.token_bytes.size)
    plan: LmPlan | MtPlan = LmPlan() if task == "lm" else MtPlan()
    batch_tokens = args.batch_tokens or BATCH_TOKENS[task]
    if args.tiny:
        config, plan = tiny(config), tiny_plan(plan, pack.domains[:2])
        batch_tokens = args.batch_tokens or 1024
    batches: LmBatches | MtBatches
    if isinstance(pack, packing.LmPack):
        batches = LmBatches(
            pack, window=config.max_positions, batch_tokens=batch_tokens, device=device,
            seed=args.seed,
        )  # fmt: skip
    else:
        batches = MtBatches(
            pack, max_positions=config.max_positions, batch_tokens=batch_tokens, device=device,
            seed=args.seed,
        )  # fmt: skip
    model = Twin(config, device=device, seed=args.seed)
    num_params = model.num_params
    set_up_s = time.perf_counter() - begun
    print(
        f"twin-{task} on {device}: {num_params / 1e9:.3f} B parameters, "
        f"{batches.epoch_tokens} training tokens, set up in {set_up_s:.0f} s",
        flush=True,
    )
    options = LearningOptions(
        train_s=max(1.0, 60 * args.minutes - set_up_s),
        max_steps=args.max_steps,
        peak_rate=args.rate or PEAK_RATE[task],
        warmup_steps=20 if args.tiny else 200,
        smoothing=SMOOTHING[task],
    )
    learned = learn(model, batches, options)
    model.freeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found: dict[str, Any] = {
        "name": f"twin-{task}",
        "command": "python -m analysis.gpu.twins " + " ".join(args.words),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware(device)),
        "versions": versions(),
        "tiny": args.tiny,
        "num_params": num_params,
        "config": asdict(config),
        "text": {
            "training_tokens": batches.epoch_tokens,
            "vocabulary": int(pack.token_bytes.size),
            "domains": list(pack.domains),
            "pack_bytes": source.stat().st_size,
        },
        "options": asdict(options),
        "learned": asdict(learned),
        "held_out": [
            asdict(entry) for entry in held_out(model, pack, batches, rows=HELD_OUT_ROWS[task])
        ],
    }
    target = args.out / f"twin-{task}.json"
    write(target, found)
    print(f"recording at {time.perf_counter() - begun:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"twin-{task}.moeprof"
        done = record(
            path,
            model,
            pack,
            batches,
            plan,
            name=f"twin-{task}",
            task=task,
            timing=False,
            probe_every=args.probe_every,
            command=found["command"],
            notes=(note(config, learned.steps, learned.num_tokens),),
        )
        found["recorded"] = {**asdict(done), "plan": asdict(plan), "examples": texts(args, done)}
        archive(path, args.out / f"{path.name}.tar.gz")
        found["archive_bytes"] = (args.out / f"{path.name}.tar.gz").stat().st_size
        write(target, found)
        print(f"recorded at {time.perf_counter() - begun:.0f} s", flush=True)
        if args.evidence:
            found["routing"] = routing_evidence(moeprof.open(path))
    found["elapsed_s"] = round(time.perf_counter() - begun, 1)
    write(target, found)
    return found


def note(config: TwinConfig, steps: int, num_tokens: int) -> str:
    """Returns what every reader of the trace should know of its model."""
    return (
        f"Routing twin: trained for {steps} steps on {num_tokens / 1e6:.0f} million tokens; "
        f"layers, experts, top-k and d_model of the founding paper's model, experts of hidden "
        f"width {config.expert_width}. Its routing is learned; its times and bytes are not those "
        "of the paper's model."
    )


def texts(args: argparse.Namespace, done: Recorded) -> list[dict[str, str]]:
    """Returns the recorded examples as text; empty without the vocabulary."""
    path = args.data / f"{args.task}.tokenizer.json"
    if not path.exists():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return [
        {
            "label": label,
            "given": tokenizer.decode(given)[-400:],
            "made": tokenizer.decode(made),
            "reference": tokenizer.decode(reference),
        }
        for label, given, made, reference in done.examples
    ]


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes JSON."""
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    top = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    verbs = top.add_subparsers(dest="task", required=True)
    for task in TASKS:
        verb = verbs.add_parser(task)
        verb.add_argument("--data", type=Path, default=Path(".twin-pack"))
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--minutes", type=float, default=7.0, help="set-up and training")
        verb.add_argument("--tiny", action="store_true", help="a small shape, on the CPU")
        verb.add_argument("--batch-tokens", type=int)
        verb.add_argument("--max-steps", type=int, default=10**9)
        verb.add_argument("--rate", type=float, help="peak learning rate")
        verb.add_argument("--probe-every", type=int, default=8)
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--no-evidence", dest="evidence", action="store_false")
    again = verbs.add_parser("evidence", help="routing figures of a trace, into its JSON file")
    again.add_argument("trace", type=Path, help="the archive, or the folder it holds")
    again.add_argument("json", type=Path)
    return top


def main(words: list[str] | None = None) -> int:
    """Runs one verb."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    args.words = words
    if args.task == "evidence":
        found = json.loads(args.json.read_text(encoding="utf-8"))
        write(args.json, {**found, "routing": evidence_of(args.trace)})
        return 0
    found = run(args)
    shown = ("routing", "archive_bytes", "elapsed_s")
    print(json.dumps({key: found[key] for key in shown if key in found}))
    return 0


def evidence_of(path: Path) -> dict[str, Any]:
    """Returns the figures of a trace, in its folder or archived."""
    if path.is_dir():
        return routing_evidence(moeprof.open(path))
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
        return routing_evidence(moeprof.open(Path(folder) / path.name.removesuffix(".tar.gz")))


if __name__ == "__main__":
    sys.exit(main())
