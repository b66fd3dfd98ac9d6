"""Traces written token by token, for tests and examples small enough to work out by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprof.trace import schema as spec
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class HandToken:
    """One token of a hand-written trace.

    Attributes:
        request: Request id.
        position: Position in the sequence.
        experts: Ids per site and slot.
        phase: Token phase.
        sequence: Beam or sample.
        parent: The sequence it continued from; itself when None.
        status: `SlotStatus` per site and slot; all routed when None.
        weights: Weights per site and slot; uniform over a site's slots when None.
    """

    request: int
    position: int
    experts: Sequence[Sequence[int]]
    phase: str = "decode"
    sequence: int = 0
    parent: int | None = None
    status: Sequence[Sequence[int]] | None = None
    weights: Sequence[Sequence[float]] | None = None


def hand_trace(
    path: str | os.PathLike[str],
    steps: Sequence[Sequence[HandToken]],
    *,
    num_experts: int = 8,
    expert_bytes: int = 1 << 20,
    stacks: Sequence[str] | None = None,
) -> Trace:
    """Writes a trace given token by token; sites and slots follow from the tokens.

    Args:
        path: Where to write it.
        steps: Tokens of each step.
        num_experts: Experts per site.
        expert_bytes: Bytes of one expert.
        stacks: Stack of each step; all in the decoder when None.
    """
    stacks = ["decoder"] * len(steps) if stacks is None else list(stacks)
    sites: list[spec.Site] = []
    for stack in sorted(set(stacks), reverse=True):
        widths = [len(slots) for slots in steps[stacks.index(stack)][0].experts]
        for layer, width in enumerate(widths):
            sites.append(
                spec.Site(
                    site=len(sites),
                    stack=stack,
                    layer=layer,
                    num_experts=num_experts,
                    top_k=width,
                    first_slot=sum(widths[:layer]),
                    expert_bytes=expert_bytes,
                )
            )
    num_tokens = sum(len(step) for step in steps)
    calls = sum(len(step[0].experts) for step in steps)
    info = spec.TraceInfo(
        model=spec.ModelInfo(name="hand-written"),
        sites=tuple(sites),
        mode="synthetic",
        created="2026-01-01T00:00:00+00:00",
        capture=spec.CaptureCounts(
            num_sites=len(sites),
            num_calls_expected=calls,
            num_calls_seen=calls,
            num_tokens_seen=num_tokens,
            num_tokens_recorded=num_tokens,
        ),
    )
    with TraceWriter.create(path, info, flush_interval_s=float("inf")) as writer:
        for number, (stack, tokens) in enumerate(zip(stacks, steps, strict=True)):
            writer.append(_hand_unit(number, stack, tokens))
        writer.append({"requests": _hand_requests([t for step in steps for t in step])})
    return open_trace(path)


def _hand_unit(step: int, stack: str, tokens: Sequence[HandToken]) -> dict[str, dict[str, Any]]:
    expert = np.array([np.concatenate(token.experts) for token in tokens])
    widths = [len(slots) for slots in tokens[0].experts]
    uniform = np.repeat([1 / width for width in widths], widths)
    weight = [uniform if t.weights is None else np.concatenate(t.weights) for t in tokens]
    zeros = np.zeros(len(uniform), np.uint8)
    status = [zeros if t.status is None else np.concatenate(t.status) for t in tokens]
    phases = [token.phase for token in tokens]
    kinds = set(phases)
    return {
        "steps": {
            "step": step,
            "stack": stack,
            "phase": kinds.pop() if len(kinds) == 1 else "mixed",
            "batch": len({(token.request, token.sequence) for token in tokens}),
            "num_tokens": len(tokens),
            "num_prefill_tokens": len(phases) - phases.count("decode"),
            "num_decode_tokens": phases.count("decode"),
            "num_padded_tokens": 0,
            "probed": False,
            "start_s": 0.01 * step,
        },
        f"routing/{stack}": {
            "step": step,
            "row": np.arange(len(tokens)),
            "request": [token.request for token in tokens],
            "sequence": [token.sequence for token in tokens],
            "parent_sequence": [
                token.sequence if token.parent is None else token.parent for token in tokens
            ],
            "position": [token.position for token in tokens],
            "phase": phases,
            "expert": expert,
            "status": np.array(status),
            "weight": np.array(weight),
        },
    }


def _hand_requests(tokens: Sequence[HandToken]) -> dict[str, Any]:
    names = sorted({token.request for token in tokens})
    return {
        "request": names,
        "task": "lm",
        "domain": [f"domain-{name % 2}" for name in names],
        "num_sequences": [
            1 + max(token.sequence for token in tokens if token.request == name) for name in names
        ],
        "num_prompt_tokens": [
            len({t.position for t in tokens if t.request == name and t.phase == "prefill"})
            for name in names
        ],
        "arrival_s": 0.0,
    }
