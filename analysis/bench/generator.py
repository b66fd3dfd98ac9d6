"""Traces for the benchmarks: flat key streams, and routing of any length.

Seeds are fixed, so everybody measures the same traces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moeprof.trace import schema
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.writer import TraceWriter

NUM_LAYERS, NUM_EXPERTS, TOP_K = 24, 512, 10
NUM_KEYS = NUM_LAYERS * NUM_EXPERTS
FLAT_NAMES = ("zipf1.0", "zipf0.6", "moe")

_RHO = 0.9
_STEPS_PER_UNIT = 256


def flat_keys(name: str, length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Returns a stream of 24 x 512 keys.

    Args:
        name: ``zipf1.0`` and ``zipf0.6``: independent draws over all keys; ``moe``: layers in turn,
            top 10 of 512 by logits that drift (AR(1), rho 0.9).
        length: Lookups.
    """
    rng = np.random.default_rng(list(name.encode()))
    if name.startswith("zipf"):
        weight = np.arange(1, NUM_KEYS + 1) ** -float(name.removeprefix("zipf"))
        edges = np.cumsum(weight / weight.sum())
        names = rng.permutation(NUM_KEYS).astype(np.int32)
        keys = np.empty(length, np.int32)
        for first in range(0, length, 1 << 20):
            part = keys[first : first + (1 << 20)]
            drawn = np.searchsorted(edges, rng.random(len(part)), side="right")
            part[:] = names[np.minimum(drawn, NUM_KEYS - 1)]
        return keys
    num_steps = -(-length // (NUM_LAYERS * TOP_K))
    base = rng.normal(size=(NUM_LAYERS, NUM_EXPERTS)).astype(np.float32)
    state = rng.normal(size=base.shape).astype(np.float32)
    found = np.empty((num_steps, NUM_LAYERS, TOP_K), np.int32)
    shift = (np.arange(NUM_LAYERS) * NUM_EXPERTS)[:, None]
    noise = np.float32(np.sqrt(1 - _RHO**2))
    for step in range(num_steps):
        state = np.float32(_RHO) * state + noise * rng.standard_normal(base.shape, dtype=np.float32)
        top = np.argpartition(-(base + state), TOP_K, axis=1)[:, :TOP_K]
        found[step] = top + shift
    return found.reshape(-1)[:length]


def routing_trace(
    path: Path,
    *,
    num_decisions: int,
    num_sites: int = 48,
    num_experts: int = 128,
    top_k: int = 8,
    num_requests: int = 64,
    batch: int = 32,
    prompt_tokens: int = 32,
    seed: int = 1,
    with_prefill: bool = True,
    repeats: int = 1,
) -> Trace:
    """Writes a trace of about ``num_decisions`` routing decisions.

    Requests run in waves of ``batch``: one prefill of all prompts, then decode steps with one token
    each. Every token's logits are its site's popularity plus a state of its request that drifts.

    Args:
        path: Where to write it.
        num_decisions: Tokens x sites x top_k.
        num_sites: MoE sites.
        num_experts: Experts per site.
        top_k: Slots.
        num_requests: Requests.
        batch: Requests of a wave.
        prompt_tokens: Prompt length.
        seed: Seed.
        with_prefill: False leaves the prompts out.
        repeats: Write the same decode steps so many times over; ``num_decisions`` counts all.
    """
    rng = np.random.default_rng(seed)
    prompt = prompt_tokens if with_prefill else 0
    tokens = num_decisions // (num_sites * top_k * repeats)
    num_steps = max(tokens // num_requests - prompt, 1)
    sites = tuple(
        schema.Site(
            site=index, stack="decoder", layer=index, num_experts=num_experts, top_k=top_k,
            first_slot=index * top_k, expert_bytes=1 << 20,
        )
        for index in range(num_sites)
    )  # fmt: skip
    info = schema.TraceInfo(
        model=schema.ModelInfo(name="benchmark", random_weights=True), sites=sites,
        mode="synthetic", created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    base = rng.normal(size=(num_sites, num_experts)).astype(np.float32)
    step = 0
    with TraceWriter.create(path, info, force=True, flush_interval_s=float("inf")) as writer:
        writer.append(
            {
                "requests": {
                    "request": np.arange(num_requests), "task": "lm", "num_sequences": 1,
                    "num_prompt_tokens": prompt, "num_output_tokens": num_steps, "arrival_s": 0.0,
                }
            }
        )  # fmt: skip
        for first in range(0, num_requests, batch):
            own = np.arange(first, min(first + batch, num_requests))
            state = rng.standard_normal((len(own), num_sites, num_experts), dtype=np.float32)
            if prompt:
                experts = np.concatenate(
                    [_pick(base, _drifted(state, rng), top_k) for _ in range(prompt)]
                )
                requests = np.tile(own, prompt)
                order = np.argsort(requests, kind="stable")
                writer.append(
                    _unit(
                        np.full(len(requests), step), requests[order],
                        np.tile(np.arange(prompt), len(own)), experts[order], "prefill",
                    )
                )  # fmt: skip
                step += 1
            for start in range(0, num_steps, _STEPS_PER_UNIT):
                count = min(_STEPS_PER_UNIT, num_steps - start)
                experts = np.concatenate(
                    [_pick(base, _drifted(state, rng), top_k) for _ in range(count)]
                )
                for _ in range(repeats):
                    writer.append(
                        _unit(
                            np.repeat(step + np.arange(count), len(own)), np.tile(own, count),
                            np.repeat(prompt + start + np.arange(count), len(own)), experts,
                            "decode",
                        )
                    )  # fmt: skip
                    step += count
    return open_trace(path)


def _drifted(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the state, moved on in place."""
    state *= np.float32(_RHO)
    state += np.float32(np.sqrt(1 - _RHO**2)) * rng.standard_normal(state.shape, dtype=np.float32)
    return state


def _pick(base: np.ndarray, state: np.ndarray, top_k: int) -> np.ndarray:
    """Returns [tokens, sites x top_k] ids, the highest logit first."""
    logits = base + state
    top = np.argpartition(-logits, top_k, axis=2)[:, :, :top_k]
    order = np.argsort(-np.take_along_axis(logits, top, axis=2), axis=2)
    picked = np.take_along_axis(top, order, axis=2)
    return picked.reshape(len(state), -1).astype(np.int16)


def _unit(
    step: np.ndarray, request: np.ndarray, position: np.ndarray, experts: np.ndarray, phase: str
) -> dict[str, dict[str, Any]]:
    numbers, counts = np.unique(step, return_counts=True)
    row = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
    prefill = counts if phase == "prefill" else np.zeros_like(counts)
    return {
        "steps": {
            "step": numbers, "stack": "decoder", "phase": phase, "batch": len(np.unique(request)),
            "num_tokens": counts, "num_prefill_tokens": prefill,
            "num_decode_tokens": counts - prefill, "num_padded_tokens": 0, "probed": False,
            "start_s": 0.01 * numbers,
        },
        "routing/decoder": {
            "step": step, "row": row, "request": request, "sequence": 0, "parent_sequence": 0,
            "position": position, "phase": phase, "expert": experts,
            "status": np.zeros(experts.shape, np.uint8),
        },
    }  # fmt: skip
