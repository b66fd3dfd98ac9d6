"""Times the gating kernels at the founding paper's geometries, beside the floor and public kernels.

    python -m analysis.gpu.gating_kernels --out DIR [--routing TRACE]       # on a GPU
    python -m analysis.gpu.gating_kernels --out DIR --tiny                  # tries it on a CPU

Geometries (arXiv 2303.06182, Table I): LM, 512 experts of 1024 x 4096, static capacity 0.05 of the
tokens; MT, 128 experts of 2048 x 8192, capacity 1.0; top-2 in both, experts with biases and a
rectifier. Routing is drawn (uniform; a Zipf law) and, where a trace is given, taken from it. The
floor of a layer is max(active expert bytes / copy bandwidth, FLOPs / matrix rate), both rates
measured in the same run. Public kernels run where they are installed: transformers' grouped_mm, and
moe-ops (PyPI), which chooses its tiles anew for every number of tokens, under uniform routing, as a
service would before it knows any other; the result says which were not run, and why.

Outputs of every kernel are held to float64, token by token: on many shapes first, then on each
layer that is timed. A missing, doubled or wrongly weighted slot of one token is beyond the
tolerance; where one is found the result names it and the exit code is 1.

Up to 64 tokens, layers are timed as replays of a CUDA graph that goes through several layers'
weights, so that no weight is still in the L2 cache. Of larger ones the host asks for all
repetitions before the first begins: a layer may take no longer than its launches do. Every
repetition is kept, in DIR/gating_kernels.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.kernel_tuning import forget_tuning
from moeprof.live.ceilings import Ceilings, measure_ceilings
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.kernels import KERNELS
from moeprof.live.kernels.slots import rows_by_expert, within_capacity
from moeprof.live.kernels.static import GROUP_TOKENS
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
TOLERANCE = 2e-2
"""Largest relative error of a token. Roundings to bfloat16 reach 0.007."""
_SMALL_ROW = 0.1
"""Tokens whose output is smaller than this share of the median are held to that share of it."""

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


PUBLIC: Mapping[str, tuple[str, Call]] = {
    "transformers grouped_mm": ("transformers", transformers_grouped),
    "moe-ops": ("moe_ops", moe_ops),
}
"""Public kernels, each with the module it needs."""
_ON_GPU_ONLY = ("moe-ops",)
_VLLM = "vLLM fused_experts"


def public_kernels() -> tuple[dict[str, Call], dict[str, str]]:
    """Returns the public kernels that can run here, and why others cannot."""
    calls, not_run = {}, {}
    for name, (module, call) in PUBLIC.items():
        if importlib.util.find_spec(module) is None:
            not_run[name] = "not installed"
        elif name in _ON_GPU_ONLY and not torch.cuda.is_available():
            not_run[name] = "needs a GPU"
        else:
            calls[name] = call
    reason = (
        "it has gated experts, and SiLU, GELU and squared ReLU without a gate; experts here have a "
        "ReLU without a gate"
    )
    installed = importlib.util.find_spec("vllm") is not None
    not_run[_VLLM] = reason if installed else f"{reason}; not installed either"
    return calls, not_run


def contenders(
    num_tokens: int, geometry: Geometry, public: Mapping[str, Call]
) -> dict[str, tuple[Call, int | None]]:
    """Returns the kernels to time, each with its capacity; static ones have the paper's."""
    capacity = geometry.capacity(num_tokens)

    def at_capacity(kernel: Any) -> Call:
        return lambda *given: kernel(*given, capacity=capacity)

    calls: dict[str, tuple[Call, int | None]] = {}
    for name, kernel in KERNELS.items():
        is_static = name.startswith("static")
        calls[name] = (at_capacity(kernel), capacity) if is_static else (kernel, None)
    return calls | {name: (call, None) for name, call in public.items()}


def slot_weights(expert_ids: torch.Tensor) -> torch.Tensor:
    """Returns weights [T, k] for ``expert_ids`` [T, k], none of them near zero or another's.

    Slot j of k has 0.5 + j/k to 0.5 + (j + 0.25)/k: none may be left out, taken twice or weighted
    like another of the same token without changing that token's output by more than `TOLERANCE`.
    """
    top_k = expert_ids.shape[1]
    slots = torch.arange(top_k, device=expert_ids.device)
    drawn = torch.rand(expert_ids.shape, device=expert_ids.device)
    return 0.5 + (slots + 0.25 * drawn) / top_k


def exact_output(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
) -> torch.Tensor:
    """Returns what a layer computes by definition, in double precision.

    Only one expert at a time is held in double precision.

    Args:
        hidden: [T, d_model].
        ids: [T, k]; -1 where a slot is not executed.
        weights: [T, k].
        experts: The layer's.
    """
    rows, gates = hidden.double(), weights.double()
    out = torch.zeros_like(rows)
    for expert in torch.unique(ids[ids >= 0]).tolist():
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        own = experts.select(slice(expert, expert + 1)).to(dtype=torch.float64)
        out.index_add_(0, tokens, own.run(0, rows[tokens]) * gates[tokens, slots, None])
    return out


def executed_ids(
    kernel: str, ids: torch.Tensor, num_experts: int, capacity: int | None
) -> torch.Tensor:
    """Returns ``ids`` [T, k] with -1 where a kernel drops the slot.

    Args:
        kernel: Its name; groups of tokens have a capacity of their own (see `static_grouped`).
        ids: -1 where a slot is not executed.
        num_experts: Of the layer.
        capacity: Rows an expert takes; None drops nothing.
    """
    if capacity is None or kernel != "static_grouped":
        return within_capacity(ids, num_experts, capacity)
    group = min(GROUP_TOKENS, len(ids))
    slots = -(-capacity * group // len(ids))
    return torch.cat([within_capacity(part, num_experts, slots) for part in ids.split(group)])


def token_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the largest relative error of a token, ||out - reference|| / ||reference||.

    A token whose reference is small, as where no slot is executed, is held to a share of the median
    of those that are not zero. Infinite where an output is not a number.

    Args:
        out: [T, d_model].
        reference: [T, d_model] in double precision.
    """
    sizes = torch.linalg.vector_norm(reference, dim=1)
    executed = sizes[sizes > 0]
    least = _SMALL_ROW * float(executed.median()) if len(executed) else 1.0
    differences = torch.linalg.vector_norm(out.double() - reference, dim=1)
    errors = torch.nan_to_num(differences / sizes.clamp(min=least), nan=torch.inf, posinf=torch.inf)
    return float(errors.max())


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]
"""Hidden states [T, d_model], expert ids [T, k], weights [T, k] and the experts of a layer."""


@dataclass(frozen=True)
class Definition:
    """What a layer computes in double precision, each way of dropping slots computed once.

    Attributes:
        given: What its kernels are given.
    """

    given: Given
    _outputs: dict[tuple[bool, int | None], torch.Tensor] = field(default_factory=dict)

    def error(self, kernel: str, capacity: int | None, out: torch.Tensor) -> float:
        """Returns the `token_error` of what ``kernel`` computed with ``capacity``."""
        hidden, ids, weights, experts = self.given
        key = capacity is not None and kernel == "static_grouped", capacity
        if key not in self._outputs:
            kept = executed_ids(kernel, ids, experts.num_experts, capacity)
            self._outputs[key] = exact_output(hidden, kept, weights, experts)
        return token_error(out, self._outputs[key])


def off_said(kernel: str, error: float, where: str) -> str:
    """Returns what is wrong with a kernel whose outputs are off, in words."""
    return f"outputs of {kernel} are off: {where}, relative error of a token {error:.1e}"


def check(device: str, public: Mapping[str, Call], *, tiny: bool) -> dict[str, Any]:
    """Holds every kernel to float64 on many shapes.

    Public ones are given no gate, no empty slot and no capacity.

    Returns:
        The largest error of a token and the number of cases, by kernel, and the tolerance; what
        public kernels raised, which are then not in that case.
    """
    raised: dict[str, str] = {}
    worst: dict[str, float] = {}
    cases_of: dict[str, int] = {}
    num_cases = 0
    widths = (64, 96) if tiny else (1024, 2048)

    def hold(definition: Definition, name: str, capacity: int | None, out: torch.Tensor) -> None:
        worst[name] = max(worst.get(name, 0.0), definition.error(name, capacity, out))
        cases_of[name] = cases_of.get(name, 0) + 1

    for tokens, experts_, top_k, gated, activation in (
        (1, 512, 2, False, "relu"), (8, 32, 2, True, "silu"), (64, 128, 8, True, "gelu_tanh"),
        (65, 8, 2, False, "gelu"), (1000, 64, 2, False, "relu"), (3000, 16, 4, True, "silu"),
    )[: 2 if tiny else None]:  # fmt: skip
        experts = random_experts(
            num_experts=experts_, d_model=widths[0], d_ff=widths[1], gated=gated, bias=True,
            activation=activation, device=device, dtype=torch.bfloat16, seed=tokens,
        )  # fmt: skip
        hidden = torch.randn(tokens, widths[0], device=device).bfloat16()
        for case, ids in _cases(tokens, experts_, top_k, device):
            capacity = max(1, tokens * top_k // experts_) if case == "drops" else None
            weights = slot_weights(ids)
            definition = Definition((hidden, ids, weights, experts))
            num_cases += 1
            for name, kernel in KERNELS.items():
                out = kernel(hidden, ids, weights, experts, capacity=capacity)
                hold(definition, name, capacity, out)
            if case == "drops" or gated or bool((ids < 0).any()):
                continue
            given = hidden, ids, weights, _with_relu(experts)
            definition = Definition(given)
            for name, call in public.items():
                # Whatever others' code raises must not cost the run.
                try:
                    out = call(*given)
                except Exception as error:
                    raised[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                else:
                    hold(definition, name, None, out)
    return {
        "num_cases": num_cases,
        "cases_by_kernel": cases_of,
        "tolerance": TOLERANCE,
        "largest_relative_error": worst,
        "raised": raised,
    }


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


@dataclass(frozen=True)
class Run:
    """How kernels are timed.

    Attributes:
        public: Public kernels, by name.
        ceilings: Of the device.
        device: ``cuda``, or ``cpu`` to try it.
        repeats: Timed repetitions of each.
        rest_s: Seconds of pause before each.
    """

    public: Mapping[str, Call]
    ceilings: Ceilings
    device: str
    repeats: int
    rest_s: float


def time_many(
    geometry: Geometry, experts: ExpertWeights, num_tokens: int, source: Source, run: Run
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields one row per kernel: one layer, launched as it is, the host ahead of the device."""
    device, ids = run.device, source.ids[0]
    hidden = torch.randn(num_tokens, geometry.d_model, device=device, dtype=experts.w_in.dtype)
    given = hidden, ids, slot_weights(ids), experts
    definition = Definition(given)
    floor_ms = run.ceilings.floor_ms(ids, experts)
    _forget_unused(device)
    calls = contenders(num_tokens, geometry, run.public)
    if not mask_fits(geometry, num_tokens, device):
        del calls["static_mask"]
    # All outputs before any time: what is timed comes after other timed work, not after these.
    found = {}
    for name, (call, capacity) in calls.items():
        extra_bytes = None
        if device != "cpu":
            # Kernels that choose their tiles now take memory for it once.
            call(*given)
            _forget_unused(device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        out = call(*given)
        if device != "cpu":
            extra_bytes = torch.cuda.max_memory_allocated() - before
        found[name] = {
            "extra_bytes": extra_bytes,
            "relative_error": definition.error(name, capacity, out),
        }
        del out
    for name, (call, _) in calls.items():
        _forget_unused(device)
        times = repeat(
            lambda call=call: call(*given), device=device, repeats=run.repeats,
            rest_s=run.rest_s, ahead=True,
        )  # fmt: skip
        row = _row(geometry, num_tokens, source, name, "eager", floor_ms, times, 1)
        yield row | {"ahead": True} | found[name]


def _forget_unused(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()


def time_few(
    geometry: Geometry, layers: list[ExpertWeights], num_tokens: int, source: Source, run: Run
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yields rows of a graph's replay, a layer's share of it, and of the same launched eagerly."""
    device, dtype = run.device, layers[0].w_in.dtype
    hidden = torch.randn(num_tokens, geometry.d_model, device=device, dtype=dtype)
    weights = slot_weights(source.ids[0])
    calls = [(layers[i % len(layers)], ids) for i, ids in enumerate(source.ids)]
    floor_ms = sum(run.ceilings.floor_ms(ids, experts) for experts, ids in calls) / len(calls)
    kernels = {
        name: call
        for name, (call, _) in contenders(num_tokens, geometry, run.public).items()
        if not name.startswith("static") and name != "dynamic_loop"
    }
    definitions = [Definition((hidden, ids, weights, experts)) for experts, ids in calls]
    errors = {
        name: max(each.error(name, None, call(*each.given)) for each in definitions)
        for name, call in kernels.items()
    }
    for name, call in kernels.items():

        def through(call: Call = call) -> torch.Tensor:
            for experts, ids in calls:
                out = call(hidden, ids, weights, experts)
            return out

        for mode in ("graph", "eager"):
            timed: Callable[[], object] = through
            error = errors[name]
            if mode == "graph":
                if device == "cpu":
                    continue
                graph = captured(through)
                if graph is None:
                    continue
                timed, last = graph
                error = max(error, definitions[-1].error(name, None, rewritten(timed, last)))
            times = repeat(timed, device=device, repeats=run.repeats, rest_s=run.rest_s)
            row = _row(geometry, num_tokens, source, name, mode, floor_ms, times, len(calls))
            yield row | {"ahead": False, "relative_error": error}


def captured(
    function: Callable[[], torch.Tensor],
) -> tuple[Callable[[], None], torch.Tensor] | None:
    """Returns the replay of a CUDA graph of ``function`` and the result that each replay rewrites.

    None where it cannot be captured.
    """
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = function()
    except (RuntimeError, torch.AcceleratorError) as error:
        print(f"    no graph: {str(error).splitlines()[0][:80]}")
        torch.cuda.synchronize()
        return None
    return graph.replay, out


def rewritten(replay: Callable[[], None], out: torch.Tensor) -> torch.Tensor:
    """Returns ``out``, cleared first, as a graph's replay leaves it."""
    out.zero_()
    replay()
    torch.cuda.synchronize()
    return out


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
        "routing_source": source.said,
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


def measure(options: argparse.Namespace) -> list[str]:
    """Checks and times everything, writes the result; returns what is off, each in words."""
    device = "cpu" if options.tiny else "cuda"
    repeats = 3 if options.tiny else 20
    public, not_run = public_kernels()
    result = evidence(
        shlex.join(["python", "-m", "analysis.gpu.gating_kernels", *options.given]), device
    )
    checked = check(device, public, tiny=options.tiny)
    # What ran in no case is not timed.
    held = checked["largest_relative_error"]
    not_run |= {name: why for name, why in checked["raised"].items() if name not in held}
    result |= {"check": checked, "public_not_run": not_run}
    print(f"checked {checked}; not run {not_run}", flush=True)
    off = [
        off_said(name, error, "on small layers")
        for name, error in held.items()
        if error > TOLERANCE
    ]
    rest_s = 0.0 if options.tiny else REST_S
    ceilings = measure_ceilings(device, rest_s=rest_s)
    result |= {"ceilings": dataclasses.asdict(ceilings), "rest_s": rest_s}
    print(
        f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s,"
        f" matrix {ceilings.matrix_flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    run = Run(
        public={name: call for name, call in public.items() if name in held},
        ceilings=ceilings, device=device, repeats=repeats, rest_s=rest_s,
    )  # fmt: skip
    others, retuned = [module for module, _ in PUBLIC.values()], 0
    rows: list[dict[str, Any]] = []
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
                retuned += forget_tuning(others)
                for source in sources(geometry, num_tokens, GRAPH_CALLS, device, options.routing):
                    rows += time_few(geometry, layers, num_tokens, source, run)
        del layers[1:]
        for num_tokens in (256,) if options.tiny else MANY_TOKENS[full.name]:
            retuned += forget_tuning(others)
            for source in sources(geometry, num_tokens, 1, device, options.routing):
                rows += time_many(geometry, layers[0], num_tokens, source, run)
        del layers
        # Kept as it grows: a run that is cut short leaves what it has measured.
        result |= {
            "routing": largest_sources(rows),
            "rows": rows,
            "failures": off + rows_off(rows),
            "retuned": retuned,
            "complete": full is MT,
        }
        write_json(options.out / RESULT, result)
    return off + rows_off(rows)


def largest_sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns by name of a routing what it is in the rows of most tokens of the first geometry.

    These are judged, and named where there is no room for the source of every row.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        other = found.get(row["routing"])
        same = other is not None and other["geometry"] == row["geometry"]
        if other is None or (same and row["num_tokens"] > other["num_tokens"]):
            found[row["routing"]] = row
    return {name: row["routing_source"] for name, row in found.items()}


def rows_off(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns which rows' outputs are off, each in words."""
    return [
        off_said(
            row["kernel"],
            row["relative_error"],
            f"{row['geometry']}, {row['num_tokens']:,} tokens, {row['routing']}, {row['mode']}",
        )
        for row in rows
        if row["relative_error"] > TOLERANCE
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.gpu.gating_kernels",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--routing", help="a trace whose routing is timed too")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    off = measure(options)
    print(f"written to {options.out / RESULT}")
    for line in off:
        print(f"{line}, at most {TOLERANCE:g} is allowed", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
