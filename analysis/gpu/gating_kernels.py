"""Times the gating kernels at the founding paper's geometries, beside the floor and public kernels.

    python -m analysis.gpu.gating_kernels --out DIR [--routing TRACE]       # on a GPU
    python -m analysis.gpu.gating_kernels --out DIR --tiny                  # tries it on a CPU

Geometries (arXiv 2303.06182, Table I): LM, 512 experts of 1024 x 4096, static capacity 0.05 of the
tokens; MT, 128 experts of 2048 x 8192, capacity 1.0; top-2 in both, experts with biases and a
rectifier. Routing is drawn (uniform; a Zipf law) and, where a trace is given, taken from it. The
floor of a layer is max(active expert bytes / copy bandwidth, FLOPs / matrix rate), both rates
measured in the same run. Public kernels run where they are installed: transformers' grouped_mm, and
moe-ops (PyPI). Everything is checked against float64 first.

Up to 64 tokens, layers are timed as replays of a CUDA graph that goes through several layers'
weights, so that no weight is still in the L2 cache. Every repetition is kept, in
DIR/gating_kernels.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from analysis.gpu.evidence import evidence, write_json
from moeprof.live.ceilings import Ceilings, measure_ceilings
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.kernels import KERNELS, dynamic_loop
from moeprof.live.kernels.slots import rows_by_expert
from moeprof.live.repetitions import Repetitions, repeat
from moeprof.live.routing_controls import RoutingShape, skewed_routing, uniform_routing
from moeprof.live.routing_sources import Routing, read_routing
from moeprof.trace.reader import open_trace

RESULT = "gating_kernels.json"
FEW_TOKENS = (8, 16, 32, 64)
MANY_TOKENS = {"lm": (1024, 4096, 16384), "mt": (64, 2048)}
# The second is judged. Under it 97 of 512 experts have a token of 4,096, and 179 one of 16,384;
# `analysis.gpu.gating_skew` measures exponents on both sides of it.
EXPONENTS = (1.0, 2.2)
# Pause before each kernel and each ceiling: a GPU at its power limit is slower, and what is
# compared must not differ by what ran before.
REST_S = 0.25
GRAPH_LAYERS = 6
GRAPH_CALLS = 24
MASK_BYTES_PER_SLOT = 10

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]


@dataclass(frozen=True)
class Geometry:
    """One of the paper's models, as far as a MoE layer goes.

    Attributes:
        name: ``lm`` or ``mt``.
        num_experts: Experts of a layer.
        d_model: Width of a token.
        d_ff: Hidden width of an expert.
        token_fraction: Static capacity, as a share of the tokens.
    """

    name: str
    num_experts: int
    d_model: int
    d_ff: int
    token_fraction: float

    def capacity(self, num_tokens: int) -> int:
        """Returns the static capacity, ceil(fraction x tokens)."""
        return -int(-self.token_fraction * num_tokens // 1)


LM = Geometry("lm", 512, 1024, 4096, 0.05)
MT = Geometry("mt", 128, 2048, 8192, 1.0)


def transformers_grouped(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """The library's own grouped_mm implementation of experts, on the same weights."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(_TransformersExperts(experts), hidden, ids, weights)


class _TransformersExperts:
    """What transformers' function reads of an experts module."""

    has_bias = True
    has_gate = False
    is_transposed = False

    def __init__(self, experts: ExpertWeights) -> None:
        self.num_experts = experts.num_experts
        self.up_proj, self.up_proj_bias = experts.w_in, experts.b_in
        self.down_proj, self.down_proj_bias = experts.w_out, experts.b_out
        self.act_fn = F.relu


def moe_ops(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """moe-ops' permute, grouped GEMM and unpermute; it has no biases, they are added between."""
    from moe_ops import grouped_gemm, permute, unpermute

    rows, places, offsets = permute(hidden, ids.to(torch.int32), E=experts.num_experts)
    row_experts = rows_by_expert(ids, experts.num_experts).experts
    inner = grouped_gemm(rows, experts.w_in, offsets, trans_b=True)
    inner = (inner + experts.b_in[row_experts]).relu_()
    out = grouped_gemm(inner, experts.w_out, offsets, trans_b=True)
    out += experts.b_out[row_experts]
    return unpermute(out, places, weights, num_tokens=hidden.shape[0], num_topK=ids.shape[1])


def contenders(num_tokens: int, geometry: Geometry) -> dict[str, Call]:
    """Returns the kernels to time; static ones at the paper's capacity."""
    capacity = geometry.capacity(num_tokens)

    def at_capacity(kernel: Any) -> Call:
        return lambda *given: kernel(*given, capacity=capacity)

    calls: dict[str, Call] = {}
    for name, kernel in KERNELS.items():
        calls[name] = at_capacity(kernel) if name.startswith("static") else kernel
    calls["transformers grouped_mm"] = transformers_grouped
    if importlib.util.find_spec("moe_ops") is not None and torch.cuda.is_available():
        calls["moe-ops"] = moe_ops
    return calls


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns ||out - reference|| / ||reference||."""
    difference = torch.linalg.vector_norm(out.double() - reference)
    return float(difference / torch.linalg.vector_norm(reference).clamp(min=1e-30))


def check(device: str, *, tiny: bool) -> dict[str, Any]:
    """Holds every kernel to float64 on many shapes; returns the largest error of each."""
    worst: dict[str, float] = {}
    num_cases = 0
    widths = (64, 96) if tiny else (1024, 2048)
    for tokens, experts_, top_k, gated, activation in (
        (1, 512, 2, False, "relu"), (8, 32, 2, True, "silu"), (64, 128, 8, True, "gelu_tanh"),
        (65, 8, 2, False, "gelu"), (1000, 64, 2, False, "relu"), (3000, 16, 4, True, "silu"),
    )[: 2 if tiny else None]:  # fmt: skip
        experts = random_experts(
            num_experts=experts_, d_model=widths[0], d_ff=widths[1], gated=gated, bias=True,
            activation=activation, device=device, dtype=torch.bfloat16, seed=tokens,
        )  # fmt: skip
        exact = experts.to(dtype=torch.float64)
        hidden = torch.randn(tokens, widths[0], device=device).bfloat16()
        weights = torch.rand(tokens, top_k, device=device)
        for case, ids in _cases(tokens, experts_, top_k, device):
            capacity = max(1, tokens * top_k // experts_) if case == "drops" else None
            reference = dynamic_loop(
                hidden.double(), ids, weights.double(), exact, capacity=capacity
            )
            num_cases += 1
            for name, kernel in KERNELS.items():
                if name == "static_grouped" and capacity is not None and tokens > 1024:
                    continue  # Its capacity is per group: it drops others.
                out = kernel(hidden, ids, weights, experts, capacity=capacity)
                error = relative_error(out, reference)
                worst[name] = max(worst.get(name, 0.0), error)
            if case != "drops" and bool((ids >= 0).all()) and not gated:
                out = transformers_grouped(hidden, ids, weights, _with_relu(experts))
                reference = dynamic_loop(hidden.double(), ids, weights.double(), _with_relu(exact))
                error = relative_error(out, reference)
                name = "transformers grouped_mm"
                worst[name] = max(worst.get(name, 0.0), error)
    return {"num_cases": num_cases, "largest_relative_error": worst}


def _with_relu(experts: ExpertWeights) -> ExpertWeights:
    return dataclasses.replace(experts, activation="relu")


def _cases(
    tokens: int, num_experts: int, top_k: int, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    shape = RoutingShape(num_sites=1, num_experts=num_experts, top_k=top_k, tokens=[tokens])
    uniform = _ids(uniform_routing(shape, seed=tokens), 0, 0, device)
    yield "uniform", uniform
    yield "skewed", _ids(skewed_routing(shape, seed=tokens, exponent=EXPONENTS[-1]), 0, 0, device)
    one = torch.arange(top_k, device=device).expand(tokens, top_k).contiguous()
    yield "all tokens to the same experts", one
    yield "empty slots", uniform.masked_fill(torch.rand(uniform.shape, device=device) < 0.4, -1)
    yield "no slot executed", torch.full_like(uniform, -1)
    yield "drops", uniform


def _ids(routing: Routing, site: int, step: int, device: str) -> torch.Tensor:
    own = routing.stack().sites[site]
    rows = own.experts[own.starts[step] : own.starts[step + 1]]
    return torch.from_numpy(rows).long().to(device)


@dataclass(frozen=True)
class Source:
    """Routing of one shape, and what it is.

    Attributes:
        name: Short.
        said: Where it comes from.
        judged: ``uniform``, ``skewed`` or an empty string, where no goal is set.
        ids: Expert ids [T, k], as many as layers are asked for.
    """

    name: str
    said: str
    judged: str
    ids: tuple[torch.Tensor, ...]


def sources(
    geometry: Geometry, num_tokens: int, num_layers: int, device: str, trace: str | None
) -> Iterator[Source]:
    """Yields the routings to time."""
    shape = RoutingShape(
        num_sites=num_layers, num_experts=geometry.num_experts, top_k=2, tokens=[num_tokens]
    )
    drawn = [("uniform", "uniform", uniform_routing(shape, seed=num_tokens))]
    for exponent in EXPONENTS:
        routing = skewed_routing(shape, exponent=exponent, seed=num_tokens)
        judged = "skewed" if exponent == EXPONENTS[-1] else ""
        drawn.append((f"zipf {exponent:g}", judged, routing))
    for name, judged, routing in drawn:
        ids = tuple(_ids(routing, layer, 0, device) for layer in range(num_layers))
        yield Source(name, str(routing.source), judged, ids)
    if trace is not None:
        yield from _recorded(trace, geometry, num_tokens, num_layers, device)


def _recorded(
    trace: str, geometry: Geometry, num_tokens: int, num_layers: int, device: str
) -> Iterator[Source]:
    """Yields batches of a trace's tokens, consecutive ones of its passes, site by site."""
    routing = read_routing(open_trace(trace))
    for name in routing.stacks:
        stack = routing.stack(name)
        own = [site for site in stack.sites if site.num_experts == geometry.num_experts]
        if not own or min(len(site.experts) for site in own) < num_tokens:
            continue
        ids = []
        for layer in range(num_layers):
            site = own[layer % len(own)]
            start = (layer * num_tokens) % (len(site.experts) - num_tokens + 1)
            ids.append(torch.from_numpy(site.experts[start : start + num_tokens]).long().to(device))
        yield Source(f"recorded, {name}", str(routing.source), "", tuple(ids))


def mask_fits(geometry: Geometry, num_tokens: int, device: str) -> bool:
    """Returns True where the dispatch and combine masks of `static_mask` fit the device."""
    slots = num_tokens * geometry.num_experts * geometry.capacity(num_tokens)
    if device == "cpu":
        return slots < 1 << 26
    return slots * MASK_BYTES_PER_SLOT < torch.cuda.mem_get_info()[0]


def time_many(
    geometry: Geometry, experts: ExpertWeights, num_tokens: int, source: Source,
    ceilings: Ceilings, device: str, repeats: int, rest_s: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields one row per kernel: one layer, launched as it is."""
    hidden = torch.randn(num_tokens, geometry.d_model, device=device, dtype=experts.w_in.dtype)
    weights = torch.rand(num_tokens, 2, device=device)
    ids = source.ids[0]
    floor_ms = ceilings.floor_ms(ids, experts)
    for name, call in contenders(num_tokens, geometry).items():
        if name == "static_mask" and not mask_fits(geometry, num_tokens, device):
            continue
        extra_bytes = None
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        call(hidden, ids, weights, experts)
        if device != "cpu":
            extra_bytes = torch.cuda.max_memory_allocated() - before
        times = repeat(
            lambda call=call: call(hidden, ids, weights, experts), device=device, repeats=repeats,
            rest_s=rest_s,
        )  # fmt: skip
        yield _row(geometry, num_tokens, source, name, "eager", floor_ms, times, 1) | {
            "extra_bytes": extra_bytes
        }


def time_few(
    geometry: Geometry, layers: list[ExpertWeights], num_tokens: int, source: Source,
    ceilings: Ceilings, device: str, repeats: int, rest_s: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields rows of a graph's replay, a layer's share of it, and of the same launched eagerly."""
    hidden = torch.randn(num_tokens, geometry.d_model, device=device, dtype=layers[0].w_in.dtype)
    weights = torch.rand(num_tokens, 2, device=device)
    calls = [(layers[i % len(layers)], ids) for i, ids in enumerate(source.ids)]
    floor_ms = sum(ceilings.floor_ms(ids, experts) for experts, ids in calls) / len(calls)
    for name, call in contenders(num_tokens, geometry).items():
        if name.startswith("static") or name == "dynamic_loop":
            continue

        def through(call: Call = call) -> None:
            for experts, ids in calls:
                call(hidden, ids, weights, experts)

        for mode in ("graph", "eager"):
            run = through
            if mode == "graph":
                if device == "cpu":
                    continue
                run = captured(through)
                if run is None:
                    continue
            times = repeat(run, device=device, repeats=repeats, rest_s=rest_s)
            yield _row(geometry, num_tokens, source, name, mode, floor_ms, times, len(calls))


def captured(function: Callable[[], None]) -> Callable[[], None] | None:
    """Returns the replay of a CUDA graph of ``function``; None where it cannot be captured."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except (RuntimeError, torch.AcceleratorError) as error:
        print(f"    no graph: {str(error).splitlines()[0][:80]}")
        torch.cuda.synchronize()
        return None
    return graph.replay


def _row(
    geometry: Geometry, num_tokens: int, source: Source, kernel: str, mode: str, floor_ms: float,
    times: Repetitions, num_calls: int,
) -> dict[str, Any]:  # fmt: skip
    per_call = tuple(round(ms / num_calls, 5) for ms in times.times_ms)
    median = Repetitions(per_call).median_ms
    ids = torch.stack(source.ids)
    active = sum(len(torch.unique(each[each >= 0])) for each in ids) / len(ids)
    row = {
        "geometry": geometry.name,
        "num_tokens": num_tokens,
        "routing": source.name,
        "judged": source.judged,
        "mean_active_experts": active,
        "kernel": kernel,
        "mode": mode,
        "floor_ms": round(floor_ms, 5),
        "median_ms": median,
        "share_of_floor": round(floor_ms / median, 4),
        "times_ms": per_call,
    }
    print(
        f"  {geometry.name} {num_tokens:6d} {source.name:18s} {kernel:24s} {mode:6s}"
        f" {median:9.4f} ms  floor {floor_ms:8.4f}  share {floor_ms / median:.3f}",
        flush=True,
    )
    return row


def tiny(geometry: Geometry) -> Geometry:
    """Returns a geometry small enough for a CPU."""
    return dataclasses.replace(geometry, num_experts=16, d_model=64, d_ff=128)


def measure(options: argparse.Namespace) -> None:
    """Checks and times everything; writes the result."""
    device = "cpu" if options.tiny else "cuda"
    repeats = 3 if options.tiny else 20
    result = evidence(shlex.join(["python", "-m", "analysis.gpu.gating_kernels", *sys.argv[1:]]),
                      device)  # fmt: skip
    result["check"] = check(device, tiny=options.tiny)
    print(f"checked {result['check']}", flush=True)
    rest_s = 0.0 if options.tiny else REST_S
    ceilings = measure_ceilings(device, rest_s=rest_s)
    result |= {"ceilings": dataclasses.asdict(ceilings), "rest_s": rest_s}
    print(
        f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s,"
        f" matrix {ceilings.matrix_flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    said: dict[str, str] = {}
    for full in (LM, MT):
        geometry = tiny(full) if options.tiny else full
        num_layers = 2 if options.tiny or full is MT else GRAPH_LAYERS
        layers = [
            random_experts(
                num_experts=geometry.num_experts, d_model=geometry.d_model, d_ff=geometry.d_ff,
                gated=False, bias=True, activation="relu", device=device, seed=layer,
            )
            for layer in range(num_layers)
        ]  # fmt: skip
        if full is LM:
            for num_tokens in FEW_TOKENS[: 1 if options.tiny else None]:
                for source in sources(geometry, num_tokens, GRAPH_CALLS, device, options.routing):
                    said[source.name] = source.said
                    rows += time_few(
                        geometry, layers, num_tokens, source, ceilings, device, repeats, rest_s
                    )
        del layers[1:]
        for num_tokens in (256,) if options.tiny else MANY_TOKENS[full.name]:
            for source in sources(geometry, num_tokens, 1, device, options.routing):
                said[source.name] = source.said
                rows += time_many(
                    geometry, layers[0], num_tokens, source, ceilings, device, repeats, rest_s
                )
        del layers
        # Kept as it grows: a run that is cut short leaves what it has measured.
        result |= {"routing": said, "rows": rows, "complete": full is MT}
        write_json(options.out / RESULT, result)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", help="a trace whose routing is timed too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args()
    measure(options)
    print(f"written to {options.out / RESULT}")


if __name__ == "__main__":
    main()
