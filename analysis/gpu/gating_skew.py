"""Times moeprof's kernel at the paper's LM geometry by how skewed its routing is.

    python -m analysis.gpu.gating_skew --out DIR            # on a GPU with 24 GB free
    python -m analysis.gpu.gating_skew --out DIR --tiny     # tries it on a CPU

Routing is drawn by Zipf laws, from uniform (exponent 0) to one that leaves most experts idle. The
more skewed it is, the sooner the active experts are read, while multiplying takes the same time:
each row keeps both parts of the floor, which is the longer of the two. One exponent is judged by
`analysis.gpu.gating_kernels`; this says what lies on both sides of it.

Kernels take turns, repetition by repetition, on one set of experts. At each exponent the outputs of
moeprof's kernel are held to one GEMM per expert first. Every repetition is kept, in
DIR/gating_skew.json; the exit code is 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from analysis.gpu.evidence import evidence, write_json
from analysis.gpu.gating_kernels import LM, Call, relative_error, tiny, transformers_grouped
from moeprof.live.ceilings import Ceilings, measure_ceilings
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.kernels import dynamic, dynamic_grouped, dynamic_loop
from moeprof.live.repetitions import repeat_in_turn
from moeprof.live.routing_controls import RoutingShape, skewed_routing, uniform_routing

RESULT = "gating_skew.json"
EXPONENTS = (0.0, 1.0, 1.4, 1.8, 2.0, 2.1, 2.2, 2.3, 2.4, 2.6, 2.8, 3.0)
NUM_TOKENS = 16_384
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


def rows_at(
    exponent: float, ids: torch.Tensor, experts: ExpertWeights, ceilings: Ceilings, repeats: int
) -> tuple[list[dict[str, Any]], float]:
    """Returns one row per kernel, and how far moeprof's is from one GEMM per expert.

    Args:
        exponent: That the routing was drawn with.
        ids: Expert ids [T, k].
        experts: The layer's.
        ceilings: Of the same device.
        repeats: Timed repetitions of each kernel.
    """
    device = ids.device
    hidden = torch.randn(len(ids), experts.d_model, device=device, dtype=experts.w_in.dtype)
    weights = torch.rand(ids.shape, device=device)
    given = (hidden, ids, weights, experts)
    error = relative_error(dynamic(*given), dynamic_loop(*given).double())
    parts = ceilings.floor_parts(ids, experts)
    times = repeat_in_turn(
        [functools.partial(call, *given) for call in CALLS.values()], device=device, repeats=repeats
    )
    rows = [
        {
            "exponent": exponent,
            "active_experts": len(torch.unique(ids)),
            "kernel": name,
            "bytes_ms": parts.bytes_ms,
            "flops_ms": parts.flops_ms,
            "floor_ms": parts.floor_ms,
            "median_ms": each.median_ms,
            "share_of_floor": parts.floor_ms / each.median_ms,
            "times_ms": each.times_ms,
        }
        for name, each in zip(CALLS, times, strict=True)
    ]
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
    ceilings = measure_ceilings(device)
    experts = random_experts(
        num_experts=geometry.num_experts, d_model=geometry.d_model, d_ff=geometry.d_ff,
        gated=False, bias=True, activation="relu", device=device, seed=0,
    )  # fmt: skip
    result |= {
        "geometry": dataclasses.asdict(geometry) | {"top_k": TOP_K},
        "num_tokens": num_tokens,
        "ceilings": dataclasses.asdict(ceilings),
        "tolerance": TOLERANCE,
        "complete": False,
    }
    print(
        f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s,"
        f" matrix {ceilings.matrix_flops_per_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    said: dict[str, str] = {}
    for exponent in exponents:
        ids, said[f"{exponent:g}"] = drawn_ids(geometry.num_experts, num_tokens, exponent, device)
        made, error = rows_at(exponent, ids, experts, ceilings, repeats)
        rows += made
        agreement.append({"exponent": exponent, "relative_error": error})
        print(
            f"  exponent {exponent:g}: {made[0]['active_experts']} active experts, floor"
            f" {made[0]['floor_ms']:.4f} ms, error {error:.1e}; "
            + ", ".join(f"{row['kernel']} {row['share_of_floor']:.3f}" for row in made),
            flush=True,
        )
        # Kept as it grows: a run that is cut short leaves what it has measured.
        result |= {
            "routing": said,
            "agreement": agreement,
            "rows": rows,
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
