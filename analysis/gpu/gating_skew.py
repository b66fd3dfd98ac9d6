"""Times moeprof's kernel at the paper's LM geometry by how skewed its routing is.

    python -m analysis.gpu.gating_skew --out DIR            # on a GPU with 24 GB free
    python -m analysis.gpu.gating_skew --out DIR --tiny     # tries it on a CPU

Routing is drawn by Zipf laws, from uniform (exponent 0) to one that leaves most experts idle. The
more skewed it is, the sooner the active experts are read, while multiplying takes the same time:
each row keeps both parts of the floor, which is the longer of the two. One exponent is judged by
`analysis.gpu.gating_kernels`; this says what lies on both sides of it.

A GPU that multiplies without a pause is slower: on an H200 a product of matrices then takes a fifth
longer than after a rest. Kernels and ceilings are therefore measured rested, each after a pause,
and loaded, each after it has run without one for a while: load slows some more than others. A row's
floor is of its own state; the page holds both to that of the rested device. At each exponent the
outputs of moeprof's kernel are held to one GEMM per expert first. Every repetition is kept, in
DIR/gating_skew.json; the exit code is 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.gating_kernels import LM, Call, relative_error, tiny, transformers_grouped
from moeprof.live.ceilings import Ceilings, measure_ceilings
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.kernels import dynamic, dynamic_grouped, dynamic_loop
from moeprof.live.repetitions import repeat
from moeprof.live.routing_controls import RoutingShape, skewed_routing, uniform_routing

RESULT = "gating_skew.json"
EXPONENTS = (0.0, 1.0, 1.4, 1.8, 2.0, 2.1, 2.2, 2.3, 2.4, 2.6, 2.8, 3.0)
NUM_TOKENS = 16_384
REST_S, LOAD_S = 0.5, 1.0
TOP_K = 2
TOLERANCE = 1e-2
"""Largest relative error between two kernels in bfloat16, each of which rounds in its own order."""
CALLS: Mapping[str, Call] = {
    "dynamic": dynamic,
    "dynamic_grouped": dynamic_grouped,
    "transformers grouped_mm": transformers_grouped,
}
_TINY_EXPONENTS = (0.0, 2.2, 3.0)
_TINY_TOKENS = 256


def drawn_ids(
    num_experts: int, num_tokens: int, exponent: float, device: str
) -> tuple[torch.Tensor, str]:
    """Returns routing by a Zipf law and what it is; the same as that of `gating_kernels`.

    Args:
        num_experts: Of the layer.
        num_tokens: Of its input, and the seed.
        exponent: Of the law; 0 is uniform.
        device: Where the ids [num_tokens, TOP_K] are put.
    """
    shape = RoutingShape(num_sites=1, num_experts=num_experts, top_k=TOP_K, tokens=[num_tokens])
    if exponent:
        routing = skewed_routing(shape, exponent=exponent, seed=num_tokens)
    else:
        routing = uniform_routing(shape, seed=num_tokens)
    ids = torch.from_numpy(routing.stack().sites[0].experts).long()
    return ids.to(device), str(routing.source)


@dataclass(frozen=True)
class State:
    """A state of the device, and what it can do in it.

    Attributes:
        rest_s: Seconds of pause before each kernel.
        load_s: Seconds that it runs before it is timed.
        ceilings: Of the device, measured so.
    """

    rest_s: float
    load_s: float
    ceilings: Ceilings


def states_of(device: str, *, tiny: bool) -> dict[str, State]:
    """Returns the states in which kernels are timed: ``rested`` and ``loaded``."""
    short = 0.01
    waits = {"rested": (short if tiny else REST_S, 0.0), "loaded": (0.0, short if tiny else LOAD_S)}
    return {
        name: State(rest_s, load_s, measure_ceilings(device, rest_s=rest_s, load_s=load_s))
        for name, (rest_s, load_s) in waits.items()
    }


def rows_at(
    exponent: float,
    ids: torch.Tensor,
    experts: ExpertWeights,
    states: Mapping[str, State],
    repeats: int,
) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Returns one row per kernel for each state, and moeprof's error against a GEMM per expert.

    Args:
        exponent: That the routing was drawn with.
        ids: Expert ids [T, k].
        experts: The layer's.
        states: Of the same device.
        repeats: Timed repetitions of each kernel.
    """
    device = ids.device
    hidden = torch.randn(len(ids), experts.d_model, device=device, dtype=experts.w_in.dtype)
    weights = torch.rand(ids.shape, device=device)
    given = (hidden, ids, weights, experts)
    error = relative_error(dynamic(*given), dynamic_loop(*given).double())
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, state in states.items():
        parts = state.ceilings.floor_parts(ids, experts)
        for kernel, call in CALLS.items():
            times = repeat(
                functools.partial(call, *given), device=device, repeats=repeats,
                rest_s=state.rest_s, load_s=state.load_s,
            )  # fmt: skip
            row = {
                "exponent": exponent,
                "active_experts": len(torch.unique(ids)),
                "kernel": kernel,
                "bytes_ms": parts.bytes_ms,
                "flops_ms": parts.flops_ms,
                "floor_ms": parts.floor_ms,
                "median_ms": times.median_ms,
                "share_of_floor": parts.floor_ms / times.median_ms,
                "times_ms": times.times_ms,
            }
            rows.setdefault(name, []).append(row)
    return rows, error


def measure(options: argparse.Namespace) -> bool:
    """Times everything, writes the result; returns True where all outputs agree."""
    device = "cpu" if options.tiny else "cuda"
    repeats = 3 if options.tiny else 20
    geometry = tiny(LM) if options.tiny else LM
    num_tokens = _TINY_TOKENS if options.tiny else NUM_TOKENS
    exponents = _TINY_EXPONENTS if options.tiny else EXPONENTS
    result = evidence(
        shlex.join(["python", "-m", "analysis.gpu.gating_skew", *options.given]), device
    )
    states = states_of(device, tiny=options.tiny)
    experts = random_experts(
        num_experts=geometry.num_experts, d_model=geometry.d_model, d_ff=geometry.d_ff,
        gated=False, bias=True, activation="relu", device=device, seed=0,
    )  # fmt: skip
    result |= {
        "geometry": dataclasses.asdict(geometry) | {"top_k": TOP_K},
        "num_tokens": num_tokens,
        "tolerance": TOLERANCE,
        "complete": False,
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in states}
    measured: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        measured[name] = dataclasses.asdict(state) | {"rows": rows[name]}
        print(
            f"{name}: copy {state.ceilings.copy_bytes_per_s / 1e12:.2f} TB/s,"
            f" matrix {state.ceilings.matrix_flops_per_s / 1e12:.0f} TFLOP/s",
            flush=True,
        )
    agreement: list[dict[str, Any]] = []
    said: dict[str, str] = {}
    for exponent in exponents:
        ids, said[f"{exponent:g}"] = drawn_ids(geometry.num_experts, num_tokens, exponent, device)
        made, error = rows_at(exponent, ids, experts, states, repeats)
        for name, own in made.items():
            rows[name] += own
        agreement.append({"exponent": exponent, "relative_error": error})
        for name, own in made.items():
            print(
                f"  exponent {exponent:g}, {name}: {own[0]['active_experts']} active, floor"
                f" {own[0]['floor_ms']:.4f} ms, error {error:.1e}; "
                + ", ".join(f"{row['kernel']} {row['share_of_floor']:.3f}" for row in own),
                flush=True,
            )
        # Kept as it grows: a run that is cut short leaves what it has measured.
        result |= {
            "routing": said,
            "agreement": agreement,
            "states": measured,
            "complete": exponent == exponents[-1],
        }
        write_json(options.out / RESULT, result)
    return all(row["relative_error"] <= TOLERANCE for row in agreement)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.gpu.gating_skew",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    agrees = measure(options)
    print(f"written to {options.out / RESULT}")
    if not agrees:
        print(f"outputs differ by more than {TOLERANCE:g}: see agreement", file=sys.stderr)
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
