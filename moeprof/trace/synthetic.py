"""Makes traces whose truth is known: skewed, persistent, per-domain routing, and hand-written ones.

The model behind `synthetic_trace`: at each site a token keeps the expert set of the token before
it in its sequence with probability ``persistence``; else it draws ``top_k`` distinct experts, one
after another, from its domain's popularity, a permuted Zipf law. Leaves out real models
(`moeprof.recording`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeprof.trace import arrivals
from moeprof.trace import schema as spec
from moeprof.trace.arrivals import Plan, Requests, Tokens
from moeprof.trace.reader import Trace, open_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.writer import TraceWriter

Array = np.ndarray[Any, Any]

DOMAINS = ("news", "scripture", "code", "manual")
_UNIT_TOKENS = 1 << 15
_STEP_S = 0.002
_TOKEN_S = 1e-5


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
    geometry = {"num_experts": num_experts, "top_k": top_k, "expert_bytes": expert_bytes}
    rule = None
    if capacity_factor is not None:
        rule = spec.CapacityRule(rule="capacity_factor", value=capacity_factor)
    sites = _sites(stacks, num_sites, layer_stride, geometry, rule)
    law = {
        "seed": seed,
        "skew": skew,
        "persistence": persistence,
        "domains": list(domains),
        "domain_share": domain_share,
    }
    world = tuple(
        spec.RankInfo(rank=rank, world_size=num_ranks, data_parallel=rank)
        for rank in range(num_ranks)
    )
    info = spec.TraceInfo(
        model=spec.ModelInfo(
            name="synthetic",
            architecture="synthetic",
            task="mt" if len(stacks) > 1 else "lm",
            dtype="float32",
            random_weights=True,
            num_layers={stack: num_sites * layer_stride for stack in stacks},
            static_bytes=_static_bytes(sites),
        ),
        sites=sites,
        mode="synthetic",
        command="synthetic_trace",
        created="2026-01-01T00:00:00+00:00",
        ranks=world,
        notes=("made-up routing: it says nothing about any model",),
        settings={"synthetic": law},
    )
    plan = Plan(
        num_requests=num_requests,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        length_spread=length_spread,
        num_sequences=num_sequences,
        mixed_steps=mixed_steps,
        stacks=tuple(stacks),
        seed=seed,
    )
    options = _Options(
        weights=weights,
        executed=executed,
        timed=timed,
        prune_last_layer=prune_last_layer,
        capacity_factor=capacity_factor,
        layer_stride=layer_stride,
    )
    for rank in range(num_ranks):
        writer = TraceWriter.create(
            path, info, rank=rank, force=force, flush_interval_s=float("inf")
        )
        with writer:
            requests = Requests.draw(plan, rank=rank, num_ranks=num_ranks)
            _write_rank(writer, _Making(info, options, seed=(seed, rank)), plan, requests)
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
class _Options:
    """What is recorded."""

    weights: bool
    executed: bool
    timed: bool
    prune_last_layer: bool
    capacity_factor: float | None
    layer_stride: int


def _sites(
    stacks: Sequence[str],
    num_sites: int,
    layer_stride: int,
    geometry: Mapping[str, int | Sequence[int]],
    rule: spec.CapacityRule | None,
) -> tuple[spec.Site, ...]:
    sites: list[spec.Site] = []
    for stack in stacks:
        first_slot = 0
        for index in range(num_sites):
            layer = (index + 1) * layer_stride - 1
            own = {
                name: value if isinstance(value, int) else int(value[index])
                for name, value in geometry.items()
            }
            site = spec.Site(
                site=len(sites),
                stack=stack,
                layer=layer,
                name=f"{stack}.layers.{layer}.moe",
                num_experts=own["num_experts"],
                top_k=own["top_k"],
                first_slot=first_slot,
                expert_bytes=own["expert_bytes"],
                matrices_per_expert=3,
                d_model=256,
                d_ff=512,
                scoring="softmax",
                renormalized=True,
                scaling_factor=1.0,
                capacity_rule=rule,
                slot_order="by_weight",
                adapter="synthetic",
            )
            sites.append(site)
            first_slot += site.top_k
    return tuple(sites)


def _static_bytes(sites: Sequence[spec.Site]) -> spec.StaticBytes:
    experts = sum(site.num_experts * site.expert_bytes for site in sites)
    return spec.StaticBytes(
        embedding=experts // 20,
        attention=experts // 10,
        dense_ffn=experts // 20,
        experts=experts,
        router=1024 * len(sites),
        other=4096,
    )


class _Making:
    """One rank's trace in the making: geometry, law, options, clock and random numbers."""

    def __init__(self, info: spec.TraceInfo, options: _Options, *, seed: Sequence[int]) -> None:
        self.info = info
        self.options = options
        self.truth = synthetic_truth(info)
        self.rng = np.random.default_rng(list(seed))
        self.start_s = np.zeros(1)

    def set_clock(self, num_tokens: Sequence[int]) -> None:
        """Gives each step a time proportional to its tokens."""
        self.start_s = np.cumsum([0.0, *(_STEP_S + _TOKEN_S * count for count in num_tokens)])


@dataclass(frozen=True)
class _Steps:
    """The steps of one unit: their numbers, and for each token the index of its step."""

    numbers: Array
    of_token: Array

    @classmethod
    def of(cls, tokens: Tokens) -> _Steps:
        """Returns the steps that ``tokens`` belong to."""
        numbers, of_token = np.unique(tokens.step, return_inverse=True)
        return cls(numbers, of_token)

    def count(self, chosen: Array | None = None) -> Array:
        """Returns how many tokens, or chosen tokens, each step has."""
        tokens = self.of_token if chosen is None else self.of_token[chosen]
        return np.bincount(tokens, minlength=len(self.numbers))

    def sum(self, values: Array) -> Array:
        """Returns the sum of a value of the tokens of each step."""
        return np.bincount(self.of_token, weights=values, minlength=len(self.numbers))


def _write_rank(writer: TraceWriter, making: _Making, plan: Plan, requests: Requests) -> None:
    schedule = arrivals.run(plan, requests)
    making.set_clock(schedule.num_tokens)
    info = making.info
    writer.append({"requests": _request_columns(making, plan, requests)})
    num_calls = 0
    for stack in plan.stacks:
        tokens = schedule.tokens(stack)
        routed = _route(making, stack, tokens)
        num_calls += schedule.stack.count(stack) * len(info.sites_of(stack))
        for rows in _units(tokens):
            part = {name: values[rows] for name, values in routed.items()}
            writer.append(_unit(making, stack, tokens.rows(rows), part))
    num_tokens = sum(schedule.num_tokens)
    writer.update_info(
        capture=spec.CaptureCounts(
            num_sites=len(info.sites),
            num_calls_expected=num_calls,
            num_calls_seen=num_calls,
            num_tokens_seen=num_tokens,
            num_tokens_recorded=num_tokens,
            num_executed_checked=num_calls if making.options.executed else 0,
        )
    )


def _request_columns(making: _Making, plan: Plan, requests: Requests) -> dict[str, Any]:
    domains = making.truth.domains
    labels = [domains[request % len(domains)] for request in requests.request.tolist()]
    task = making.info.model.task
    return {
        "request": requests.request,
        "task": task,
        "domain": None if task == "mt" else labels,
        "language": labels if task == "mt" else None,
        "prompt_id": [f"synthetic-{request}" for request in requests.request.tolist()],
        "num_prompt_tokens": requests.prompt,
        "num_output_tokens": requests.output,
        "num_sequences": plan.num_sequences,
        "arrival_s": making.start_s[requests.first_step],
        "end_s": making.start_s[requests.last_step + 1],
    }


def _route(making: _Making, stack: str, tokens: Tokens) -> dict[str, Array]:
    """Returns expert, status and weight of all tokens of a stack [token, slot]."""
    info, options = making.info, making.options
    num_tokens, num_slots = len(tokens.step), info.num_slots(stack)
    expert = np.zeros((num_tokens, num_slots), np.int32 if info.wide_ids(stack) else np.int16)
    status = np.zeros((num_tokens, num_slots), np.uint8)
    weight = np.zeros((num_tokens, num_slots if options.weights else 0), np.float16)
    chain = np.lexsort((tokens.position, tokens.sequence, tokens.request))
    follows = np.zeros(num_tokens, bool)
    follows[1:] = (np.diff(tokens.request[chain]) == 0) & (np.diff(tokens.sequence[chain]) == 0)
    domain = tokens.request[chain] % len(making.truth.domains)
    for site in info.sites_of(stack):
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        expert[chain, slots] = _chained_sets(making, site, domain, follows)
        if options.capacity_factor is not None:
            dropped = _over_capacity(tokens.step, expert[:, slots], site, options.capacity_factor)
            status[:, slots][dropped] = SlotStatus.DROPPED
        if options.weights:
            weight[:, slots] = _weights(making.rng, num_tokens, site.top_k)
    if options.prune_last_layer:
        last = info.sites_of(stack)[-1].first_slot
        unseen = (tokens.phase == spec.TOKEN_PHASES.index("prefill")) & ~tokens.last_of_prompt
        expert[unseen, last:] = spec.NO_EXPERT
        status[unseen, last:] = SlotStatus.PRUNED_LAST_LAYER
    if options.weights:
        weight[status != SlotStatus.ROUTED] = 0
    return {"expert": expert, "status": status, "weight": weight}


def _chained_sets(making: _Making, site: spec.Site, domain: Array, follows: Array) -> Array:
    """Returns expert sets along the sequences: kept from the token before, or drawn anew."""
    num_tokens = len(domain)
    drawn = ~follows | (making.rng.random(num_tokens) >= making.truth.persistence)
    fresh = np.zeros((num_tokens, site.top_k), np.int64)
    for index, popularity in enumerate(making.truth.popularity[site.site]):
        chosen = np.flatnonzero(drawn & (domain == index))
        fresh[chosen] = _distinct(making.rng, popularity, site.top_k, len(chosen))
    return fresh[np.maximum.accumulate(np.where(drawn, np.arange(num_tokens), 0))]


def _weights(rng: np.random.Generator, num_tokens: int, top_k: int) -> Array:
    """Returns softmax weights, largest first."""
    scores = np.exp(rng.standard_normal((num_tokens, top_k), dtype=np.float32))
    weights: Array = -np.sort(-scores / scores.sum(axis=1, keepdims=True), axis=1)
    return weights


def _distinct(rng: np.random.Generator, popularity: Array, count: int, num_rows: int) -> Array:
    """Returns ``count`` distinct experts per row, drawn one after another by popularity."""
    drawn = np.full((num_rows, count), -1, np.int64)
    if count * 2 > len(popularity):
        noise = rng.gumbel(size=(num_rows, len(popularity))) + np.log(popularity)
        drawn[:] = np.argsort(-noise, axis=1)[:, :count]
        return drawn
    cumulative = np.cumsum(popularity)
    cumulative /= cumulative[-1]
    for slot in range(count):
        open_rows = np.arange(num_rows)
        while len(open_rows):
            candidate = np.searchsorted(cumulative, rng.random(len(open_rows)), side="right")
            taken = (drawn[open_rows, :slot] == candidate[:, None]).any(axis=1)
            drawn[open_rows[~taken], slot] = candidate[~taken]
            open_rows = open_rows[taken]
    return drawn


def _over_capacity(step: Array, expert: Array, site: spec.Site, factor: float) -> Array:
    """Returns True for decisions beyond an expert's capacity in their step, in token order."""
    capacity = np.ceil(factor * site.top_k * np.bincount(step) / site.num_experts)
    key = (step[:, None] * site.num_experts + expert).reshape(-1)
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    place = np.arange(len(ordered)) - np.repeat(first, np.diff(np.append(first, len(ordered))))
    over = np.zeros(len(key), bool)
    over[order] = place >= capacity[ordered // site.num_experts]
    return over.reshape(expert.shape)


def _units(tokens: Tokens) -> Iterator[slice]:
    """Yields ranges of tokens that are whole steps."""
    starts = np.flatnonzero(np.diff(tokens.step, prepend=-1)).tolist()
    first = 0
    for start in [*starts, len(tokens.step)]:
        if start - first >= _UNIT_TOKENS:
            yield slice(first, start)
            first = start
    if first < len(tokens.step):
        yield slice(first, len(tokens.step))


def _unit(
    making: _Making, stack: str, tokens: Tokens, routed: Mapping[str, Array]
) -> dict[str, dict[str, Any]]:
    """Returns the rows of every table for whole steps."""
    steps = _Steps.of(tokens)
    decode = tokens.phase == spec.TOKEN_PHASES.index("decode")
    parent = tokens.sequence.copy()
    if parent.any():
        parent[decode] = making.rng.integers(0, parent.max() + 1, int(decode.sum()))
    routing = {
        "step": tokens.step,
        "row": tokens.row,
        "request": tokens.request,
        "sequence": tokens.sequence,
        "parent_sequence": parent,
        "position": tokens.position,
        "phase": tokens.phase,
        "expert": routed["expert"],
        "status": routed["status"],
    }
    if making.options.weights:
        routing["weight"] = routed["weight"]
    layers, executed = _layers(making, stack, steps, routed)
    unit = {
        "steps": _step_columns(making, stack, tokens, steps, decode),
        f"routing/{stack}": routing,
        "layers": layers,
    }
    if making.options.executed:
        unit["executed"] = executed
    return unit


def _step_columns(
    making: _Making, stack: str, tokens: Tokens, steps: _Steps, decode: Array
) -> dict[str, Any]:
    first = np.flatnonzero(np.diff(tokens.step, prepend=-1))
    lowest = np.minimum.reduceat(tokens.phase, first)
    highest = np.maximum.reduceat(tokens.phase, first)
    rows = np.unique(np.stack([steps.of_token, tokens.request, tokens.sequence]), axis=1)
    num_tokens, num_decode = steps.count(), steps.count(decode)
    columns: dict[str, Any] = {
        "step": steps.numbers,
        "stack": stack,
        "phase": np.where(lowest == highest, lowest, spec.PHASES.index("mixed")),
        "batch": np.bincount(rows[0], minlength=len(steps.numbers)),
        "num_tokens": num_tokens,
        "num_prefill_tokens": num_tokens - num_decode,
        "num_decode_tokens": num_decode,
        "num_padded_tokens": 0,
        "probed": False,
        "start_s": making.start_s[steps.numbers],
    }
    if making.options.timed:
        wall_ms = np.diff(making.start_s)[steps.numbers] * 1000
        columns["wall_ms"] = wall_ms
        columns["embedding_ms"] = 0.03 * wall_ms
        columns["head_ms"] = 0.05 * wall_ms
        columns["other_ms"] = 0.02 * wall_ms
        columns["process_bytes"] = 1 << 30
    return columns


def _layers(
    making: _Making, stack: str, steps: _Steps, routed: Mapping[str, Array]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the columns of `layers` and `executed` of one unit."""
    rows: list[dict[str, Any]] = []
    executed: list[Array] = []
    options = making.options
    for site in making.info.sites_of(stack):
        for layer in range(site.layer - options.layer_stride + 1, site.layer):
            rows.append(_layer_columns(making, steps, steps.count(), layer, None))
        slots = slice(site.first_slot, site.first_slot + site.top_k)
        expert, status = routed["expert"][:, slots], routed["status"][:, slots]
        seen = steps.count((status != SlotStatus.PRUNED_LAST_LAYER).any(axis=1))
        key = steps.of_token[:, None] * site.num_experts + expert
        active, counts = np.unique(key[status == SlotStatus.ROUTED], return_counts=True)
        step, active = np.divmod(active, site.num_experts)
        row = _layer_columns(making, steps, seen, site.layer, site)
        row["num_active_experts"] = np.bincount(step, minlength=len(steps.numbers))
        if options.capacity_factor is not None:
            share = options.capacity_factor * site.top_k / site.num_experts
            row["capacity"] = np.ceil(share * steps.count())
            row["num_dropped"] = steps.sum((status == SlotStatus.DROPPED).sum(axis=1))
        rows.append(row)
        numbers = steps.numbers[step]
        executed.append(np.stack([numbers, np.full(len(step), site.site), active, counts]))
    blank = np.full(len(steps.numbers), np.nan)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.concatenate([row.get(name, blank) for row in rows]) for name in names}
    order = np.lexsort((columns["layer"], columns["step"]))
    layers: dict[str, Any] = {name: values[order] for name, values in columns.items()}
    layers["stack"] = stack
    layers["component_source"] = "hook" if options.timed else None
    joined = np.concatenate(executed, axis=1)
    joined = joined[:, np.lexsort((joined[1], joined[0]))]
    names_of_rows = ("step", "site", "expert", "num_routed_rows", "num_executed_rows")
    return layers, dict(zip(names_of_rows, joined[[0, 1, 2, 3, 3]], strict=True))


def _layer_columns(
    making: _Making, steps: _Steps, num_tokens: Array, layer: int, site: spec.Site | None
) -> dict[str, Any]:
    """Returns one row of `layers` per step, with made-up times proportional to tokens."""
    columns: dict[str, Any] = {
        "step": steps.numbers,
        "layer": np.full(len(steps.numbers), layer),
        "site": np.full(len(steps.numbers), np.nan if site is None else site.site),
        "num_tokens": num_tokens,
        "num_rows": num_tokens,
    }
    if not making.options.timed:
        return columns
    noise = making.rng.uniform(0.9, 1.1, len(steps.numbers))
    unit_ms = (0.02 + 0.001 * num_tokens) * noise
    columns["attention_ms"] = 2 * unit_ms
    columns["activation_peak_bytes"] = 4096 * num_tokens
    if site is None:
        columns["dense_ffn_ms"] = 3 * unit_ms
        columns["layer_ms"] = 5.2 * unit_ms
    else:
        columns["gate_ms"] = 0.5 * unit_ms
        columns["experts_ms"] = 4 * unit_ms
        columns["moe_ms"] = 4.6 * unit_ms
        columns["layer_ms"] = 6.8 * unit_ms
    return columns
