"""Made-up traffic with a known law, and slow but obvious counterparts of the analyses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

from moeprof.replay import access, tokens
from moeprof.trace import schema


def make_law(rng, *, num_experts, num_labels=4, skew=1.0, label_share=0.5):
    """Returns [labels, experts] probabilities: a common Zipf law mixed with one per label."""
    zipf = np.arange(1, num_experts + 1.0) ** -skew
    zipf /= zipf.sum()
    common = rng.permutation(zipf)
    return np.stack(
        [
            (1 - label_share) * common + label_share * rng.permutation(zipf)
            for _ in range(num_labels)
        ]
    )


def make_traffic(rng, law, *, num_requests, batch, top_k=2, mean_tokens=20, persistence=0.5):
    """Returns (step, request, experts) of decode tokens, admitted first come first served."""
    num_experts = law.shape[1]
    lengths = rng.integers(mean_tokens // 2, mean_tokens * 3 // 2 + 1, num_requests)
    free, start = np.zeros(batch, int), np.zeros(num_requests, int)
    for request, length in enumerate(lengths):
        slot = free.argmin()
        start[request] = free[slot]
        free[slot] += length
    label = rng.integers(len(law), size=num_requests)
    longest = lengths.max()
    noise = -np.log(-np.log(rng.random((num_requests, longest, num_experts))))
    drawn = np.argsort(-(np.log(law[label])[:, None] + noise), axis=2)[:, :, :top_k]
    keep = rng.random((num_requests, longest)) < persistence
    for index in range(1, longest):
        drawn[:, index] = np.where(keep[:, index, None], drawn[:, index - 1], drawn[:, index])
    request = np.repeat(np.arange(num_requests), lengths)
    index = np.concatenate([np.arange(length) for length in lengths])
    step = start[request] + index
    order = np.lexsort((request, step))
    return step[order], request[order], drawn[request, index][order]


def make_site(num_experts, top_k, **changes):
    fields = {
        "site": 0,
        "stack": "decoder",
        "layer": 0,
        "num_experts": num_experts,
        "top_k": top_k,
        "first_slot": 0,
        "expert_bytes": 1024,
    }
    return schema.Site(**{**fields, **changes})


def make_tokens(step, request, experts, *, num_experts, num_requests=None, phase="decode", rank=0):
    """Returns one site's `StackTokens`; positions follow from the order of steps."""
    step, request = np.asarray(step, np.int64), np.asarray(request, np.int64)
    experts = np.asarray(experts, np.int32)
    rank = np.broadcast_to(np.asarray(rank, np.int64), step.shape)
    position = np.zeros(len(step), np.int64)
    for who in np.unique(request):
        mine = np.flatnonzero(request == who)
        position[mine] = np.argsort(np.argsort(step[mine], kind="stable"))
    count = num_requests or int(request.max()) + 1
    phases = np.broadcast_to(np.asarray(phase), step.shape)
    table = pd.DataFrame({"rank": rank, "step": step, "phase": phases})
    names = pd.MultiIndex.from_product([np.unique(rank), range(count)], names=["rank", "request"])
    return tokens.stack_tokens(
        stack="decoder",
        sites=(make_site(num_experts, experts.shape[1]),),
        rank=rank,
        step=step,
        request=request,
        sequence=np.zeros(len(step), np.int64),
        position=position,
        phase=np.array([schema.TOKEN_PHASES.index(name) for name in phases], np.uint8),
        expert=(experts,),
        step_phases=table.drop_duplicates(["rank", "step"]),
        requests=tokens.requests_from_table(names.to_frame(index=False), task="lm"),
    )


def make_accesses(step, request, experts, *, num_experts, **options):
    found = make_tokens(step, request, experts, num_experts=num_experts, **options)
    return access.accesses(found, found.sites[0])


def sets_of(accesses):
    """Returns the experts of each dispatch as a set."""
    return [
        set(accesses.expert[start:stop].tolist())
        for start, stop in zip(accesses.offset[:-1], accesses.offset[1:], strict=True)
    ]


def mark_trained(trace, **changes):
    """Lets a made-up trace pass for one of a trained model."""
    model = dataclasses.replace(trace.info.model, random_weights=False)
    trace.info = dataclasses.replace(trace.info, model=model, notes=(), **changes)
    return trace
