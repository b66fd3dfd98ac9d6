"""Makes traces whose truth is known: skewed, persistent, per-domain routing, and hand-written ones.

The model behind `synthetic_trace`: at each site a token keeps the expert set of the token before
it in its sequence with probability ``persistence``; else it draws ``top_k`` distinct experts, one
after another, from its domain's popularity, a permuted Zipf law. Leaves out real models
(`moeprof.recording`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeprof.trace import schema as spec
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.writer import TraceWriter

Array = np.ndarray[Any, Any]

DOMAINS = ("news", "scripture", "code", "manual")
DECODER_START_TOKENS = 2
_UNIT_TOKENS = 1 << 15
_MAX_REJECTIONS = 64


@dataclass(frozen=True, kw_only=True)
class SyntheticTruth:
    """The law a synthetic trace was drawn from.

    Attributes:
        domains: Domain names; request r belongs to domain r modulo their number.
        persistence: Probability that a token keeps the set of the token before it.
        popularity: Per site id, the probability of each expert to be drawn first
            [domain, expert].
    """

    domains: tuple[str, ...]
    persistence: float
    popularity: Mapping[int, Array]


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
                    site=len(sites), stack=stack, layer=layer, num_experts=num_experts,
                    top_k=width, first_slot=sum(widths[:layer]), expert_bytes=expert_bytes,
                )  # fmt: skip
            )
    num_tokens = sum(len(step) for step in steps)
    calls = sum(len(step[0].experts) for step in steps)
    info = spec.TraceInfo(
        model=spec.ModelInfo(name="hand-written"),
        sites=tuple(sites),
        mode="synthetic",
        created="2026-01-01T00:00:00+00:00",
        capture=spec.CaptureCounts(
            num_sites=len(sites), num_calls_expected=calls, num_calls_seen=calls,
            num_tokens_seen=num_tokens, num_tokens_recorded=num_tokens,
        ),  # fmt: skip
    )
    with TraceWriter.create(path, info, flush_interval_s=float("inf")) as writer:
        for number, (stack, tokens) in enumerate(zip(stacks, steps, strict=True)):
            writer.append(_hand_unit(number, stack, tokens))
        writer.append({"requests": _hand_requests([t for step in steps for t in step])})
    return open_trace(path)


def synthetic_trace(
    path: str | os.PathLike[str],
    *,
    num_requests: int = 32,
    num_sites: int = 4,
    num_experts: int | Sequence[int] = 16,
    top_k: int | Sequence[int] = 2,
    seed: int = 0,
    skew: float = 1.0,
    persistence: float = 0.5,
    batch: int = 8,
    prompt_tokens: int = 24,
    output_tokens: int = 16,
    length_spread: float = 0.5,
    stacks: Sequence[str] = ("decoder",),
    domains: Sequence[str] = DOMAINS,
    domain_share: float = 0.5,
    num_sequences: int = 1,
    expert_bytes: int | Sequence[int] = 1 << 20,
    layer_stride: int = 1,
    capacity_factor: float | None = None,
    prune_last_layer: bool = False,
    mixed_steps: bool = False,
    weights: bool = True,
    executed: bool = True,
    timed: bool = True,
    num_ranks: int = 1,
    force: bool = False,
    compact: bool = True,
) -> Trace:
    """Writes a trace of made-up routing whose law is known; the same arguments give the same rows.

    Requests are admitted first come, first served, at most ``batch`` at a time, and leave when
    they have all their tokens.

    Args:
        path: Where to write it.
        num_requests: Requests.
        num_sites: MoE sites per stack.
        num_experts: Experts per site; a sequence gives each site of a stack its own number.
        top_k: Slots per token and site; likewise.
        seed: Seed of everything.
        skew: Exponent of the Zipf law; 0 is uniform.
        persistence: Probability that a token keeps the expert set of the token before it.
        batch: Requests running at a time.
        prompt_tokens: Mean prompt length.
        output_tokens: Mean output length.
        length_spread: Lengths are uniform within this share of the mean, up and down.
        stacks: ``("decoder",)`` (an LM) or ``("encoder", "decoder")`` (an MT model).
        domains: Domain names; MT takes them as target languages.
        domain_share: Weight of the domain's own popularity against the common one.
        num_sequences: Beams per request in the decoder.
        expert_bytes: Bytes of one expert; a sequence gives each site its own size.
        layer_stride: Every how many layers is an MoE layer; the others are dense.
        capacity_factor: Slots per expert = ceil(factor x k x tokens / E); more are dropped.
        prune_last_layer: The last site sees the last prompt token of a sequence only.
        mixed_steps: Prefill new requests in the same step in which others decode.
        weights: Record weights.
        executed: Record executed rows.
        timed: Record times and memory (made up, but proportional to tokens).
        num_ranks: Data-parallel ranks; requests are dealt in turn.
        force: Replace an existing trace.
        compact: Merge the parts at the end.
    """
    sites = _sites(
        stacks, num_sites, num_experts, top_k, expert_bytes, layer_stride, capacity_factor
    )
    law = {"seed": seed, "skew": skew, "persistence": persistence, "domains": list(domains),
           "domain_share": domain_share}  # fmt: skip
    world = tuple(
        spec.RankInfo(rank=rank, world_size=num_ranks, data_parallel=rank)
        for rank in range(num_ranks)
    )
    info = spec.TraceInfo(
        model=spec.ModelInfo(
            name="synthetic", architecture="synthetic", task="mt" if len(stacks) > 1 else "lm",
            dtype="float32", random_weights=True,
            num_layers={stack: num_sites * layer_stride for stack in stacks},
            static_bytes=_static_bytes(sites),
        ),  # fmt: skip
        sites=sites,
        mode="synthetic",
        command="synthetic_trace",
        created="2026-01-01T00:00:00+00:00",
        ranks=world,
        notes=("made-up routing: it says nothing about any model",),
        settings={"synthetic": law},
    )
    plan = _Plan(
        num_requests=num_requests, batch=batch, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens, length_spread=length_spread, num_sequences=num_sequences,
        mixed_steps=mixed_steps, stacks=tuple(stacks), seed=seed,
    )  # fmt: skip
    options = _Options(
        weights=weights, executed=executed, timed=timed, prune_last_layer=prune_last_layer,
        capacity_factor=capacity_factor, layer_stride=layer_stride,
    )  # fmt: skip
    for rank in range(num_ranks):
        requests = np.arange(rank, num_requests, num_ranks)
        writer = TraceWriter.create(
            path, info, rank=rank, force=force, flush_interval_s=float("inf")
        )
        with writer:
            _write_rank(writer, info, plan, options, requests, np.random.default_rng([seed, rank]))
            writer.close(compact=compact)
    return open_trace(path)


def synthetic_truth(info: spec.TraceInfo) -> SyntheticTruth:
    """Returns the law behind a trace of `synthetic_trace`."""
    law = info.settings["synthetic"]
    rng = np.random.default_rng([law["seed"], 1 << 20])
    domains = tuple(law["domains"])
    share = float(law["domain_share"])
    popularity = {}
    for site in info.sites:
        zipf = np.arange(1, site.num_experts + 1, dtype=np.float64) ** -float(law["skew"])
        zipf /= zipf.sum()
        common = rng.permutation(zipf)
        own = np.stack([rng.permutation(zipf) for _ in domains])
        popularity[site.site] = (1 - share) * common + share * own
    return SyntheticTruth(
        domains=domains, persistence=float(law["persistence"]), popularity=popularity
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What arrives and how it is batched."""

    num_requests: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    length_spread: float
    num_sequences: int
    mixed_steps: bool
    stacks: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What is recorded."""

    weights: bool
    executed: bool
    timed: bool
    prune_last_layer: bool
    capacity_factor: float | None
    layer_stride: int


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all steps of one stack, in order of execution."""

    step: Array
    row: Array
    request: Array
    sequence: Array
    position: Array
    phase: Array
    last_of_prompt: Array


@dataclass
class _Schedule:
    """Steps in order of execution, as they are planned."""

    stack: list[str] = field(default_factory=list)
    request: list[Array] = field(default_factory=list)
    sequence: list[Array] = field(default_factory=list)
    position: list[Array] = field(default_factory=list)
    phase: list[Array] = field(default_factory=list)
    last_of_prompt: list[Array] = field(default_factory=list)

    def add(self, stack: str, *groups: Mapping[str, Array]) -> None:
        """Adds a step made of groups of tokens."""
        self.stack.append(stack)
        for name in ("request", "sequence", "position", "phase", "last_of_prompt"):
            getattr(self, name).append(np.concatenate([group[name] for group in groups]))

    def tokens(self, stack: str) -> _Tokens:
        """Returns the tokens of one stack."""
        steps = [index for index, name in enumerate(self.stack) if name == stack]
        sizes = [len(self.request[index]) for index in steps]

        def joined(columns: list[Array]) -> Array:
            return np.concatenate([np.zeros(0, np.int64), *(columns[i] for i in steps)])

        return _Tokens(
            step=np.repeat(np.array(steps, np.int64), sizes),
            row=np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in sizes)]),
            request=joined(self.request),
            sequence=joined(self.sequence),
            position=joined(self.position),
            phase=joined(self.phase).astype(np.uint8),
            last_of_prompt=joined(self.last_of_prompt).astype(bool),
        )


def _per_site(value: int | Sequence[int], index: int) -> int:
    return value if isinstance(value, int) else int(value[index])


def _sites(
    stacks: Sequence[str],
    num_sites: int,
    num_experts: int | Sequence[int],
    top_k: int | Sequence[int],
    expert_bytes: int | Sequence[int],
    layer_stride: int,
    capacity_factor: float | None,
) -> tuple[spec.Site, ...]:
    rule = None
    if capacity_factor is not None:
        rule = spec.CapacityRule(rule="capacity_factor", value=capacity_factor)
    sites: list[spec.Site] = []
    for stack in stacks:
        first_slot = 0
        for index in range(num_sites):
            width = _per_site(top_k, index)
            sites.append(
                spec.Site(
                    site=len(sites), stack=stack, layer=(index + 1) * layer_stride - 1,
                    name=f"{stack}.layers.{(index + 1) * layer_stride - 1}.moe",
                    num_experts=_per_site(num_experts, index), top_k=width, first_slot=first_slot,
                    expert_bytes=_per_site(expert_bytes, index), matrices_per_expert=3,
                    d_model=256, d_ff=512, scoring="softmax", renormalized=True,
                    scaling_factor=1.0, capacity_rule=rule, slot_order="by_weight",
                    adapter="synthetic",
                )  # fmt: skip
            )
            first_slot += width
    return tuple(sites)


def _static_bytes(sites: Sequence[spec.Site]) -> spec.StaticBytes:
    experts = sum(site.num_experts * site.expert_bytes for site in sites)
    return spec.StaticBytes(
        embedding=experts // 20, attention=experts // 10, dense_ffn=experts // 20,
        experts=experts, router=1024 * len(sites), other=4096,
    )  # fmt: skip


def _lengths(rng: np.random.Generator, mean: int, spread: float, count: int) -> Array:
    low = max(1, round(mean * (1 - spread)))
    return rng.integers(low, max(low, round(mean * (1 + spread))) + 1, count)


def _group(
    requests: Array, first: Array, counts: Array, phase: str, num_sequences: int, prompt_end: Array
) -> dict[str, Array]:
    """Returns the tokens first .. first + count of each request, for each of its sequences."""
    requests, first, counts, prompt_end = (
        np.repeat(values, num_sequences) for values in (requests, first, counts, prompt_end)
    )
    sequences = np.tile(np.arange(num_sequences), len(requests) // max(num_sequences, 1))
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    position = np.arange(int(counts.sum())) - starts + np.repeat(first, counts)
    code = spec.TOKEN_PHASES.index(phase)
    return {
        "request": np.repeat(requests, counts),
        "sequence": np.repeat(sequences, counts),
        "position": position,
        "phase": np.full(len(position), code),
        "last_of_prompt": position == np.repeat(prompt_end, counts) - 1,
    }


def _schedule(
    plan: _Plan, requests: Array, prompts: Array, outputs: Array
) -> tuple[_Schedule, dict[str, Array]]:
    """Returns the steps, and the step in which each request starts and ends."""
    schedule = _Schedule()
    has_encoder = "encoder" in plan.stacks
    decoder_prompts = np.full_like(prompts, DECODER_START_TOKENS) if has_encoder else prompts
    first_step = np.zeros(len(requests), np.int64)
    last_step = np.zeros(len(requests), np.int64)
    done = np.ones(len(requests), np.int64)
    active = np.zeros(0, np.int64)
    next_request = 0
    beams = plan.num_sequences
    while next_request < len(requests) or len(active):
        admitted = np.arange(next_request, min(len(requests), next_request + plan.batch - len(active)))
        next_request += len(admitted)
        groups = []
        if len(admitted):
            first_step[admitted] = len(schedule.stack)
            zeros = np.zeros(len(admitted), np.int64)
            if has_encoder:
                sources = prompts[admitted]
                schedule.add(
                    "encoder", _group(requests[admitted], zeros, sources, "encode", 1, sources)
                )
            ends = decoder_prompts[admitted]
            prefill = _group(requests[admitted], zeros, ends, "prefill", beams, ends)
            if plan.mixed_steps:
                groups.append(prefill)
            else:
                schedule.add("decoder", prefill)
        running = active[done[active] < outputs[active]]
        if len(running):
            position = decoder_prompts[running] + done[running] - 1
            ones = np.ones(len(running), np.int64)
            none = np.zeros(len(running), np.int64)
            groups.append(_group(requests[running], position, ones, "decode", beams, none))
            done[running] += 1
        if groups:
            schedule.add("decoder", *groups)
        active = np.concatenate([active, admitted])
        ended = done[active] >= outputs[active]
        last_step[active[ended]] = len(schedule.stack) - 1
        active = active[~ended]
    return schedule, {"first_step": first_step, "last_step": last_step}


def _write_rank(
    writer: TraceWriter,
    info: spec.TraceInfo,
    plan: _Plan,
    options: _Options,
    requests: Array,
    rng: np.random.Generator,
) -> None:
    lengths = np.random.default_rng([plan.seed, 1 << 21])
    prompts = _lengths(lengths, plan.prompt_tokens, plan.length_spread, plan.num_requests)[requests]
    outputs = _lengths(lengths, plan.output_tokens, plan.length_spread, plan.num_requests)[requests]
    schedule, ends = _schedule(plan, requests, prompts, outputs)
    start_s = np.cumsum([0.0, *(0.002 + 1e-5 * len(each) for each in schedule.request)])
    writer.append({"requests": _requests(info, plan, requests, prompts, outputs, start_s, ends)})
    num_tokens = num_calls = 0
    truth = synthetic_truth(info)
    for stack in plan.stacks:
        tokens = schedule.tokens(stack)
        routed = _route(tokens, info, stack, truth, options, rng)
        num_tokens += len(tokens.step)
        num_calls += sum(name == stack for name in schedule.stack) * len(info.sites_of(stack))
        for unit in _units(tokens, routed, info, stack, options, start_s, rng):
            writer.append(unit)
    writer.update_info(
        capture=spec.CaptureCounts(
            num_sites=len(info.sites), num_calls_expected=num_calls, num_calls_seen=num_calls,
            num_tokens_seen=num_tokens, num_tokens_recorded=num_tokens,
            num_executed_checked=num_calls if options.executed else 0,
        )  # fmt: skip
    )


def _requests(
    info: spec.TraceInfo,
    plan: _Plan,
    requests: Array,
    prompts: Array,
    outputs: Array,
    start_s: Array,
    ends: Mapping[str, Array],
) -> dict[str, Any]:
    domains = info.settings["synthetic"]["domains"]
    labels = [domains[request % len(domains)] for request in requests]
    translates = info.model.task == "mt"
    return {
        "request": requests,
        "task": info.model.task,
        "domain": None if translates else labels,
        "language": labels if translates else None,
        "prompt_id": [f"synthetic-{request}" for request in requests],
        "num_prompt_tokens": prompts,
        "num_output_tokens": outputs,
        "num_sequences": plan.num_sequences,
        "arrival_s": start_s[ends["first_step"]],
        "end_s": start_s[ends["last_step"] + 1],
    }


def _route(
    tokens: _Tokens,
    info: spec.TraceInfo,
    stack: str,
    truth: SyntheticTruth,
    options: _Options,
    rng: np.random.Generator,
) -> dict[str, Array]:
    """Returns expert, status and weight of all tokens of a stack [token, slot]."""
    num_tokens, num_slots = len(tokens.step), info.num_slots(stack)
    wide = info.wide_ids(stack)
    expert = np.zeros((num_tokens, num_slots), np.int32 if wide else np.int16)
    status = np.zeros((num_tokens, num_slots), np.uint8)
    weight = np.zeros((num_tokens, num_slots if options.weights else 0), np.float16)
    domain = tokens.request % len(truth.domains)
    chain = np.lexsort((tokens.position, tokens.sequence, tokens.request))
    same = np.zeros(num_tokens, bool)
    same[1:] = (np.diff(tokens.request[chain]) == 0) & (np.diff(tokens.sequence[chain]) == 0)
    sites = info.sites_of(stack)
    for site in sites:
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        drawn = np.full(num_tokens, True)
        drawn[1:] = ~same[1:] | (rng.random(max(num_tokens - 1, 0)) >= truth.persistence)
        source = np.maximum.accumulate(np.where(drawn, np.arange(num_tokens), 0))
        fresh = np.zeros((num_tokens, site.top_k), expert.dtype)
        ordered_domain = domain[chain]
        for index in range(len(truth.domains)):
            chosen = np.flatnonzero(drawn & (ordered_domain == index))
            fresh[chosen] = _distinct(
                rng, truth.popularity[site.site][index], site.top_k, len(chosen)
            )
        expert[chain, slots] = fresh[source]
        if options.capacity_factor is not None:
            dropped = _over_capacity(tokens.step, expert[:, slots], site, options.capacity_factor)
            status[:, slots][dropped] = SlotStatus.DROPPED
        if options.weights:
            scores = np.exp(rng.standard_normal((num_tokens, site.top_k)).astype(np.float32))
            scores = -np.sort(-scores, axis=1)
            weight[:, slots] = scores / scores.sum(axis=1, keepdims=True)
            weight[:, slots][status[:, slots] == SlotStatus.DROPPED] = 0
    if options.prune_last_layer:
        slots = slice(sites[-1].first_slot, num_slots)
        unseen = (tokens.phase == spec.TOKEN_PHASES.index("prefill")) & ~tokens.last_of_prompt
        expert[unseen, slots] = spec.NO_EXPERT
        status[unseen, slots] = SlotStatus.PRUNED_LAST_LAYER
        weight[unseen, slots] = 0
    return {"expert": expert, "status": status, "weight": weight}


def _distinct(rng: np.random.Generator, popularity: Array, count: int, num_rows: int) -> Array:
    """Returns ``count`` distinct experts per row, drawn one after another by popularity."""
    if count * 2 > len(popularity):
        noise = rng.gumbel(size=(num_rows, len(popularity))) + np.log(popularity)
        return np.argsort(-noise, axis=1)[:, :count]
    cumulative = np.cumsum(popularity)
    cumulative /= cumulative[-1]
    drawn = np.full((num_rows, count), -1, np.int64)
    for slot in range(count):
        open_rows = np.arange(num_rows)
        for _ in range(_MAX_REJECTIONS):
            candidate = np.searchsorted(cumulative, rng.random(len(open_rows)), side="right")
            taken = (drawn[open_rows, :slot] == candidate[:, None]).any(axis=1)
            drawn[open_rows[~taken], slot] = candidate[~taken]
            open_rows = open_rows[taken]
            if not len(open_rows):
                break
        else:
            noise = rng.gumbel(size=(len(open_rows), len(popularity))) + np.log(popularity)
            noise[np.arange(len(open_rows))[:, None], drawn[open_rows, :slot]] = -np.inf
            drawn[open_rows, slot] = noise.argmax(axis=1)
    return drawn


def _over_capacity(step: Array, expert: Array, site: spec.Site, factor: float) -> Array:
    """Returns True for decisions beyond an expert's capacity in their step, in token order."""
    tokens_per_step = np.bincount(step)
    capacity = np.ceil(factor * site.top_k * tokens_per_step / site.num_experts)
    key = (step[:, None] * site.num_experts + expert).reshape(-1)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    place = np.arange(len(ordered)) - np.repeat(first, np.diff(np.append(first, len(ordered))))
    over = np.zeros(len(key), bool)
    over[order] = place >= capacity[ordered // site.num_experts]
    return over.reshape(expert.shape)


def _units(
    tokens: _Tokens,
    routed: Mapping[str, Array],
    info: spec.TraceInfo,
    stack: str,
    options: _Options,
    start_s: Array,
    rng: np.random.Generator,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Yields units of whole steps."""
    starts = np.flatnonzero(np.diff(tokens.step, prepend=-1))
    bounds = [0]
    for start in starts.tolist():
        if start - bounds[-1] >= _UNIT_TOKENS:
            bounds.append(start)
    bounds.append(len(tokens.step))
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        rows = slice(first, last)
        part = _Tokens(*(getattr(tokens, name)[rows] for name in _Tokens.__dataclass_fields__))
        sets = {name: values[rows] for name, values in routed.items()}
        yield _unit(part, sets, info, stack, options, start_s, rng)


def _unit(
    tokens: _Tokens,
    routed: Mapping[str, Array],
    info: spec.TraceInfo,
    stack: str,
    options: _Options,
    start_s: Array,
    rng: np.random.Generator,
) -> dict[str, dict[str, Any]]:
    starts = np.flatnonzero(np.diff(tokens.step, prepend=-1))
    steps = tokens.step[starts]
    index = np.repeat(np.arange(len(steps)), np.diff(np.append(starts, len(tokens.step))))
    num_tokens = np.bincount(index, minlength=len(steps))
    decode = tokens.phase == spec.TOKEN_PHASES.index("decode")
    num_decode = np.bincount(index, weights=decode, minlength=len(steps)).astype(np.int64)
    lowest = np.minimum.reduceat(tokens.phase, starts)
    highest = np.maximum.reduceat(tokens.phase, starts)
    parent = tokens.sequence.copy()
    if parent.any():
        parent[decode] = rng.integers(0, parent.max() + 1, int(decode.sum()))
    batch_key = np.unique(np.stack([index, tokens.request, tokens.sequence]), axis=1)[0]
    unit = {
        "steps": {
            "step": steps,
            "stack": stack,
            "phase": np.where(lowest == highest, lowest, spec.PHASES.index("mixed")),
            "batch": np.bincount(batch_key, minlength=len(steps)),
            "num_tokens": num_tokens,
            "num_prefill_tokens": 0 if stack == "encoder" else num_tokens - num_decode,
            "num_decode_tokens": num_decode,
            "num_padded_tokens": 0,
            "probed": False,
            "start_s": start_s[steps],
        },
        f"routing/{stack}": {
            "step": tokens.step,
            "row": tokens.row,
            "request": tokens.request,
            "sequence": tokens.sequence,
            "parent_sequence": parent,
            "position": tokens.position,
            "phase": tokens.phase,
            "expert": routed["expert"],
            "status": routed["status"],
        },
    }
    if options.weights:
        unit[f"routing/{stack}"]["weight"] = routed["weight"]
    unit["layers"], executed = _layers(steps, index, num_tokens, routed, info, stack, options, rng)
    if options.executed:
        unit["executed"] = executed
    if options.timed:
        wall_ms = np.diff(start_s)[steps] * 1000
        unit["steps"] |= {
            "wall_ms": wall_ms,
            "embedding_ms": 0.03 * wall_ms,
            "head_ms": 0.05 * wall_ms,
            "other_ms": 0.02 * wall_ms,
            "process_bytes": 1 << 30,
        }
    return unit


def _layers(
    steps: Array,
    index: Array,
    num_tokens: Array,
    routed: Mapping[str, Array],
    info: spec.TraceInfo,
    stack: str,
    options: _Options,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rows of `layers` and `executed` of one unit."""
    rows: list[dict[str, Any]] = []
    executed: list[Array] = []
    for site in info.sites_of(stack):
        for layer in range(site.layer - options.layer_stride + 1, site.layer):
            rows.append(_layer_rows(steps, num_tokens, None, layer, options, rng))
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        expert, status = routed["expert"][:, slots], routed["status"][:, slots]
        seen = status[:, 0] != SlotStatus.PRUNED_LAST_LAYER
        tokens_seen = np.bincount(index[seen], minlength=len(steps))
        dropped = (status == SlotStatus.DROPPED).sum(axis=1)
        applied = status == SlotStatus.ROUTED
        key = (index[:, None] * site.num_experts + expert)[applied]
        active, counts = np.unique(key, return_counts=True)
        row = _layer_rows(steps, tokens_seen, site, site.layer, options, rng)
        row["num_active_experts"] = np.bincount(active // site.num_experts, minlength=len(steps))
        row["num_dropped"] = np.bincount(index, weights=dropped, minlength=len(steps))
        if options.capacity_factor is not None:
            share = options.capacity_factor * site.top_k / site.num_experts
            row["capacity"] = np.ceil(share * tokens_seen)
        rows.append(row)
        executed.append(
            np.stack(
                [
                    steps[active // site.num_experts], np.full(len(active), site.site),
                    active % site.num_experts, counts,
                ]
            )  # fmt: skip
        )
    names = dict.fromkeys(name for row in rows for name in row)
    blank = np.full(len(steps), np.nan)
    columns = {name: np.concatenate([row.get(name, blank) for row in rows]) for name in names}
    order = np.lexsort((columns["layer"], columns["step"]))
    layers: dict[str, Any] = {name: values[order] for name, values in columns.items()}
    layers["stack"] = stack
    layers["component_source"] = "hook" if options.timed else None
    joined = np.concatenate(executed, axis=1)
    joined = joined[:, np.lexsort((joined[1], joined[0]))]
    return layers, {
        "step": joined[0], "site": joined[1], "expert": joined[2], "num_routed_rows": joined[3],
        "num_executed_rows": joined[3],
    }  # fmt: skip


def _layer_rows(
    steps: Array,
    num_tokens: Array,
    site: spec.Site | None,
    layer: int,
    options: _Options,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Returns one row of `layers` per step, with made-up times proportional to tokens."""
    rows: dict[str, Any] = {
        "step": steps,
        "layer": np.full(len(steps), layer),
        "site": np.full(len(steps), np.nan if site is None else site.site),
        "num_tokens": num_tokens,
        "num_rows": num_tokens,
    }
    if not options.timed:
        return rows
    noise = rng.uniform(0.9, 1.1, len(steps))
    unit_ms = (0.02 + 0.001 * num_tokens) * noise
    rows["attention_ms"] = 2 * unit_ms
    rows["activation_peak_bytes"] = 4096 * num_tokens
    if site is None:
        rows["dense_ffn_ms"] = 3 * unit_ms
        rows["layer_ms"] = 5.2 * unit_ms
    else:
        rows["gate_ms"] = 0.5 * unit_ms
        rows["experts_ms"] = 4 * unit_ms
        rows["moe_ms"] = 4.6 * unit_ms
        rows["layer_ms"] = 6.8 * unit_ms
    return rows


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
            "num_prefill_tokens": phases.count("prefill"),
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
