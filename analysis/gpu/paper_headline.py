"""The founding paper's 52B language model, whole: throughput and memory of each gating.

    python -m analysis.gpu.paper_headline --out DIR --routing TRACE [--seconds 460]   # on one H200
    python -m analysis.gpu.paper_headline --out DIR --routing uniform --tiny     # on a CPU

Scores batches of 1,024-token sequences (arXiv 2303.06182: 24 layers, every second with 512 experts,
top-2, d_model 1024, d_ff 4096; random bf16 weights) under recorded routing: every gate computes its
own choice, as it costs, and hands on the recorded one. TRACE is a routing twin's (see
`analysis.gpu.twins`); `uniform` draws routing instead. Static gating has the paper's capacity, 0.05
of the tokens. The dense twin has no experts and, in the layers that route, a feed-forward network
top_k times as wide: the same operations per token.

Each gating runs at listed batch sizes (the dispatch mask at every one from 1 to 8, and at 16), then
at doubled ones until memory ends or a pass would take too long, which the result then says
(``endings``). Batches too slow to be timed run once, for their memory (``once``). What time there
is (--seconds) goes first to what is judged: the dense twin, which has a part of it for its larger
batches too, the listed batches, the breakdown, then at least 20 repetitions of every row that the
headline takes; larger batches come after that. Per setting: time of every pass, memory beyond the
weights. Written to DIR/paper_headline.json after every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.headline_runs import ForcedGate, Prepare, RunLimits, print_headline, release
from analysis.gpu.headline_series import DENSE_SHARES, TURNS, Series, ends_of, print_endings
from analysis.gpu.time_spent import TimeSpent, print_seconds
from moeprof.live.application import apply_gating
from moeprof.live.paper_lm import PaperFfn, PaperLm, PaperLmConfig
from moeprof.live.routing_controls import RoutingShape, uniform_routing
from moeprof.live.routing_sources import read_routing
from moeprof.live.scoring_heads import ScoringHead
from moeprof.trace.reader import open_trace

RESULT = "paper_headline.json"
LENGTH = 1024
TINY_LENGTH = 8
TOKEN_FRACTION = 0.05
BATCHES = {
    "static_mask": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "static_grouped": (1, 2, 4, 8, 16, 32),
    "static_index": (1, 2, 4, 8, 16, 32, 48),
    "dynamic_loop": (1, 4, 16, 48, 96),
    "dynamic_grouped": (1, 2, 4, 8, 16, 32, 48, 64, 96, 128),
    "dynamic": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160),
    "dense": (1, 2, 4, 8, 16, 32, 64, 96, 128, 160),
}
BREAKDOWN_BATCH = 8
LIMITS = RunLimits(seconds=1.5, least_repeats=2)
# Judged rows are run some 20 times more: what is timed must not be too slow for that.
CLIMBING = RunLimits(seconds=0.0, least_repeats=2, point_seconds=5.0, pass_seconds=10.0)
TINY_MOST_BATCH = 4
# Of the time, when to be done with: the dense twin, and of the gatings listed batches, judged ones
# for the first time, larger ones. What is left is for judged rows that are larger.
SHARES = {"dense": 0.2, "listed": 0.6, "judged": 0.75, "larger": 0.87, "again": 1.0}


def recorded_choices(
    source: str, config: PaperLmConfig, num_tokens: int, device: str
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], str]:
    """Returns ids and weights of ``num_tokens`` tokens for each MoE layer, and where they are from.

    Sequences of the recording are drawn in random order, so that a batch mixes its domains, and
    come again where it has too few.
    """
    if source == "uniform":
        shape = RoutingShape(
            num_sites=config.num_moe_layers, num_experts=config.num_experts,
            top_k=config.top_k, tokens=[num_tokens],
        )  # fmt: skip
        routing = uniform_routing(shape)
        order = np.arange(num_tokens)
    else:
        routing = read_routing(open_trace(source), phase="prefill")
        rows = len(routing.stack().sites[0].experts) // LENGTH
        sequences = np.random.default_rng(0).permutation(rows)
        sequences = np.resize(sequences, -(-num_tokens // LENGTH))
        order = (sequences[:, None] * LENGTH + np.arange(LENGTH)).ravel()[:num_tokens]
    sites = routing.stack().sites
    if len(sites) != config.num_moe_layers or sites[0].num_experts != config.num_experts:
        raise SystemExit(
            f"{source} has {len(sites)} sites of {sites[0].num_experts} experts, the model"
            f" {config.num_moe_layers} of {config.num_experts}"
        )
    said = str(routing.source)
    if source != "uniform":
        said += f"; {rows} sequences of {LENGTH} in random order, repeated where a batch is larger"
    choices = [
        (
            torch.from_numpy(site.experts[order]).long().to(device),
            torch.from_numpy(site.weights[order]).to(device),
        )
        for site in sites
    ]
    return choices, said


def build(config: PaperLmConfig, device: str) -> PaperLm:
    """Returns the model with a head that scores."""
    model = PaperLm(config, device=device)
    model.head = ScoringHead(model.embedding.weight)
    return model


def dense_twin(config: PaperLmConfig, device: str) -> PaperLm:
    """Returns the model with a wider feed-forward network in place of the experts."""
    none = dataclasses.replace(config, moe_every=config.num_layers + 1)
    wide = dataclasses.replace(config, d_ff=config.d_ff * config.top_k)
    model = build(none, device)
    for index, layer in enumerate(model.layers):
        if config.is_moe_layer(index):
            layer.ffn = PaperFfn(wide, device=torch.device(device), dtype=torch.bfloat16)
            for parameter in layer.ffn.parameters():
                nn.init.normal_(parameter, std=config.d_model**-0.5)
                parameter.requires_grad_(requires_grad=False)
    return model


def scoring(model: PaperLm, device: str) -> Prepare:
    """Returns what makes passes that score batches of sequences of random tokens."""
    length = LENGTH if device != "cpu" else TINY_LENGTH

    def prepare(batch: int) -> tuple[int, Callable[[], object]]:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, length)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
        model.head.targets = ids.roll(-1, dims=1)
        return batch * length, lambda: model(ids)

    return prepare


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Runs everything; what there is is in ``path`` after every step."""
    begun_s = time.monotonic()
    spent = TimeSpent()
    device = "cpu" if options.tiny else "cuda"
    command = shlex.join(["python", "-m", "analysis.gpu.paper_headline", *options.given])
    result = evidence(command, device)
    config = PaperLmConfig()
    batches: dict[str, Sequence[int]] = dict(BATCHES)
    limits, climbing = LIMITS, CLIMBING
    if options.tiny:
        config = dataclasses.replace(
            config, vocab_size=64, num_layers=4, d_model=32, d_ff=64, num_heads=4, num_experts=16
        )
        batches = {name: each[:2] for name, each in batches.items()}
        limits = dataclasses.replace(limits, seconds=0.0)
        climbing = dataclasses.replace(climbing, most_batch=TINY_MOST_BATCH)
    result["config"] = dataclasses.asdict(config)
    # Choices come again beyond that: see `ForcedGate`.
    most = max(max(each) for name, each in batches.items() if name != "dense") * LENGTH
    with spent.part("routing"):
        choices, said = recorded_choices(options.routing, config, most, device)
    result["routing"] = said
    result["weight_bytes"] = None
    print(f"routing: {said}", flush=True)

    def keep() -> None:
        result.update(series.result())
        result["seconds_by_part"] = spent.seconds
        result["wall_s"] = time.monotonic() - begun_s
        write_json(path, result)

    series = Series(
        order=list(BATCHES), device=device, limits=limits, climbing=climbing, keep=keep,
        spent=spent, label="LM",
    )  # fmt: skip
    ends = ends_of(SHARES, begun_s, begun_s + options.seconds)
    run_dense(config, batches, series, ends["dense"])
    release(device)
    with spent.part("building the model"):
        model = build(config, device)
    result["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    routed = [layer.moe for layer in model.layers if layer.routes]
    for moe, (ids, weights) in zip(routed, choices, strict=True):
        moe.gate = ForcedGate(moe.gate, [(ids, weights)])

    @contextmanager
    def given(name: str) -> Iterator[Prepare]:
        fraction = TOKEN_FRACTION if name.startswith("static") else None
        with apply_gating(model, name, token_fraction=fraction):
            yield scoring(model, device)

    series.run(TURNS, given, model, batches, breakdown_batch=BREAKDOWN_BATCH, ends=ends)
    keep()
    return result


def run_dense(
    config: PaperLmConfig, batches: Mapping[str, Sequence[int]], series: Series, until_s: float
) -> None:
    """Measures the dense twin, which must not share the device with the experts."""
    ends = ends_of(DENSE_SHARES, time.monotonic(), until_s)
    with series.spent.part("building the dense twin"):
        model = dense_twin(config, series.device)

    @contextmanager
    def given(_: str) -> Iterator[Prepare]:
        yield scoring(model, series.device)

    series.run(["dense"], given, model, batches, breakdown_batch=BREAKDOWN_BATCH, ends=ends)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", required=True, help="a trace, or: uniform")
    parser.add_argument("--seconds", type=float, default=460.0, help="time to be done in")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    path = options.out / RESULT
    result = measure(options, path)
    print_headline(result["headline"])
    print_endings(result["endings"])
    print_seconds(result["seconds_by_part"])
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
