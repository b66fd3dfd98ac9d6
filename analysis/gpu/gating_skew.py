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
floor is of its own state; the page holds both to that of the rested device, which is asked for all
repetitions before it begins: a layer of a millisecond is no longer than its launches take on a slow
host. The loaded one cannot wait for that without a rest. At each exponent the outputs of every
kernel are held to float64 first, token by token. Every repetition is kept, in
DIR/gating_skew.json; the exit code is 1 where outputs are off.
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
from analysis.gpu.gating_kernels import (
    LM,
    TOLERANCE,
    Call,
    Definition,
    Given,
    off_said,
    slot_weights,
    tiny,
    transformers_grouped,
)
from moeprof.live.ceilings import Ceilings, measure_ceilings
from moeprof.live.experts import ExpertWeights, random_experts
from moeprof.live.kernels import dynamic, dynamic_grouped
from moeprof.live.repetitions import repeat
from moeprof.live.routing_controls import RoutingShape, skewed_routing, uniform_routing

RESULT = "gating_skew.json"
EXPONENTS = (0.0, 1.0, 1.4, 1.8, 2.0, 2.1, 2.2, 2.3, 2.4, 2.6, 2.8, 3.0)
NUM_TOKENS = 16_384
REST_S, LOAD_S = 0.5, 1.0
STATES = ("rested", "loaded")
TOP_K = 2
OURS = "dynamic"
CALLS: Mapping[str, Call] = {
    OURS: dynamic,
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
        ahead: True where the host asks for all repetitions before the first begins.
        ceilings: Of the device, rested and loaded likewise.
    """

    rest_s: float
    load_s: float
    ahead: bool
    ceilings: Ceilings


def state_of(name: str, device: str, *, tiny: bool) -> State:
    """Returns the state ``rested`` or ``loaded``, its ceilings measured."""
    rest_s, load_s = (0.01, 0.01) if tiny else (REST_S, LOAD_S)
    waits = {"rest_s": rest_s} if name == "rested" else {"load_s": load_s}
    ceilings = measure_ceilings(device, **waits)
    if name == "rested":
        return State(rest_s=rest_s, load_s=0.0, ahead=True, ceilings=ceilings)
    return State(rest_s=0.0, load_s=load_s, ahead=False, ceilings=ceilings)


@dataclass(frozen=True)
class Layer:
    """What a kernel is given.

    Attributes:
        exponent: That the routing was drawn with.
        given: Hidden states [T, d_model], expert ids [T, k], weights [T, k] and the experts.
    """

    exponent: float
    given: Given

    @property
    def ids(self) -> torch.Tensor:
        """Expert ids [T, k]."""
        return self.given[1]


def layer_of(exponent: float, ids: torch.Tensor, experts: ExpertWeights) -> Layer:
    """Returns a layer's input for routing ``ids`` [T, k] that was drawn with ``exponent``."""
    hidden = torch.randn(len(ids), experts.d_model, device=ids.device, dtype=experts.w_in.dtype)
    return Layer(exponent=exponent, given=(hidden, ids, slot_weights(ids), experts))


def agreement_of(layer: Layer) -> dict[str, Any]:
    """Returns the largest relative error of a token, of moeprof's kernel and of each, by name."""
    definition = Definition(layer.given)
    errors = {
        name: definition.error(name, None, call(*layer.given)) for name, call in CALLS.items()
    }
    return {"exponent": layer.exponent, "relative_error": errors[OURS], "by_kernel": errors}


def rows_of(layer: Layer, state: State, repeats: int) -> list[dict[str, Any]]:
    """Returns one row per kernel.

    Args:
        layer: What the kernels are given.
        state: Of the device.
        repeats: Timed repetitions of each kernel.
    """
    parts = state.ceilings.floor_parts(layer.ids, layer.given[-1])
    rows = []
    for kernel, call in CALLS.items():
        times = repeat(
            functools.partial(call, *layer.given), device=layer.ids.device, repeats=repeats,
            rest_s=state.rest_s, load_s=state.load_s, ahead=state.ahead,
        )  # fmt: skip
        row = {
            "exponent": layer.exponent,
            "active_experts": len(torch.unique(layer.ids)),
            "kernel": kernel,
            "bytes_ms": parts.bytes_ms,
            "flops_ms": parts.flops_ms,
            "floor_ms": parts.floor_ms,
            "median_ms": times.median_ms,
            "share_of_floor": parts.floor_ms / times.median_ms,
            "times_ms": times.times_ms,
        }
        rows.append(row)
    return rows


def measure(options: argparse.Namespace) -> list[str]:
    """Times everything, writes the result; returns what is off, each in words."""
    device = "cpu" if options.tiny else "cuda"
    repeats = 3 if options.tiny else 20
    geometry = tiny(LM) if options.tiny else LM
    num_tokens = _TINY_TOKENS if options.tiny else NUM_TOKENS
    exponents = _TINY_EXPONENTS if options.tiny else EXPONENTS
    result = evidence(
        shlex.join(["python", "-m", "analysis.gpu.gating_skew", *options.given]), device
    )
    experts = random_experts(
        num_experts=geometry.num_experts, d_model=geometry.d_model, d_ff=geometry.d_ff,
        gated=False, bias=True, activation="relu", device=device, seed=0,
    )  # fmt: skip
    result |= {
        "geometry": dataclasses.asdict(geometry) | {"top_k": TOP_K},
        "num_tokens": num_tokens,
        "tolerance": TOLERANCE,
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in STATES}
    measured: dict[str, dict[str, Any]] = {}
    layers: list[Layer] = []
    agreement: list[dict[str, Any]] = []
    said: dict[str, str] = {}
    for exponent in exponents:
        ids, said[f"{exponent:g}"] = drawn_ids(geometry.num_experts, num_tokens, exponent, device)
        layer = layer_of(exponent, ids, experts)
        agreement.append(agreement_of(layer))
        layers.append(layer)
    off = [
        off_said(kernel, error, f"exponent {row['exponent']:g}")
        for row in agreement
        for kernel, error in row["by_kernel"].items()
        if error > TOLERANCE
    ]
    result |= {
        "routing": said,
        "reference": "float64, token by token",
        "agreement": agreement,
        "failures": off,
    }
    largest = max(error for row in agreement for error in row["by_kernel"].values())
    print(f"largest error of a token {largest:.1e}", flush=True)
    # All of the rested device before any of the loaded one, which is warmer.
    for name in STATES:
        state = state_of(name, device, tiny=options.tiny)
        measured[name] = dataclasses.asdict(state)
        print(
            f"{name}: copy {state.ceilings.copy_bytes_per_s / 1e12:.2f} TB/s,"
            f" matrix {state.ceilings.matrix_flops_per_s / 1e12:.0f} TFLOP/s",
            flush=True,
        )
        for layer in layers:
            own = rows_of(layer, state, repeats)
            rows[name] += own
            print(
                f"  exponent {layer.exponent:g}, {name}: {own[0]['active_experts']} active, floor"
                f" {own[0]['floor_ms']:.4f} ms; "
                + ", ".join(f"{row['kernel']} {row['share_of_floor']:.3f}" for row in own),
                flush=True,
            )
            # A run that is cut short leaves the exponents that it has measured in every state.
            done = min(map(len, rows.values()))
            if done:
                kept = {name: measured[name] | {"rows": rows[name][:done]} for name in STATES}
                complete = done == len(CALLS) * len(layers)
                write_json(options.out / RESULT, result | {"states": kept, "complete": complete})
    return off


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
    off = measure(options)
    print(f"written to {options.out / RESULT}")
    for line in off:
        print(f"{line}, at most {TOLERANCE:g} is allowed", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
