"""Routing that nobody recorded, to hold against routing that somebody did; and other batches of it.

A cache or a kernel under uniform routing shows what it is worth where routing helps nobody; under
a Zipf law, what popularity alone gives, without the order of a text. Leaves out domains and
persistence (`moeprof.trace.synthetic_trace` makes traces of those).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.live.routing_sources import (
    Ids,
    Ints,
    Routing,
    RoutingSource,
    SiteRouting,
    StackRouting,
    geometry_of,
    read_routing,
    trace_name,
)
from moeprof.replay import compose
from moeprof.trace.reader import Trace

DEFAULT_EXPONENT = 1.0
_CHUNK_SCORES = 1 << 22
"""Random numbers drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class RoutingShape:
    """How many sites, experts, slots and tokens a control has.

    Attributes:
        num_sites: MoE layers of the stack.
        num_experts: Routed experts of each.
        top_k: Slots per token.
        tokens: Tokens of each forward pass, e.g. ``[28] + [1] * 128``.
        stack: ``encoder`` or ``decoder``.
        phases: Phase of each pass; None: all encode, or all decode.
    """

    num_sites: int
    num_experts: int
    top_k: int
    tokens: Sequence[int]
    stack: str = "decoder"
    phases: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be drawn."""
        if self.num_sites < 1 or not len(self.tokens) or min(self.tokens) < 0:
            raise UsageError("a control needs sites, and passes of 0 or more tokens each")
        if self.phases is not None and len(self.phases) != len(self.tokens):
            raise UsageError(f"{len(self.phases)} phases for {len(self.tokens)} passes")
        if not 1 <= self.top_k <= self.num_experts:
            raise UsageError(f"top_k must lie between 1 and {self.num_experts}, got {self.top_k}")


ShapeLike = Routing | Trace | RoutingShape | Sequence[RoutingShape]


def uniform_routing(shape: ShapeLike, *, seed: int = 0) -> Routing:
    """Returns routing in which every set of top_k experts is equally likely for every token.

    Args:
        shape: Sites, experts, slots and tokens per pass; a trace or routing lends its own, with
            its steps and phases, so that the two differ in nothing but who is chosen. One shape
            per stack for an encoder-decoder model.
        seed: Of the drawing.
    """
    return _control(shape, kind="uniform", exponent=0.0, seed=seed)


def skewed_routing(
    shape: ShapeLike, *, exponent: float = DEFAULT_EXPONENT, seed: int = 0
) -> Routing:
    """Returns routing whose experts follow a Zipf law, the ranks permuted site by site.

    Each token draws its experts one after another without putting back, the r-th most popular
    with probability proportional to ``r ** -exponent``; tokens are independent of each other.

    Args:
        shape: As for `uniform_routing`.
        exponent: Of the law; 0 is uniform.
        seed: Of the permutations and the drawing.
    """
    if not np.isfinite(exponent) or exponent < 0:
        raise UsageError(f"the exponent must be 0 or more, got {exponent}")
    return _control(shape, kind="skewed", exponent=float(exponent), seed=seed)


def rebatched_routing(
    trace: Trace, *, max_batch: int, schedule: str = "static", **options: Any
) -> Routing:
    """Returns the recorded requests in batches of another size, so that batch 1 drives batch 8.

    `moeprof.replay.compose` re-batches; how is part of the source. ``static`` is what `generate`
    does. Requests that come more than once route alike and are said to; a trace of one request
    cannot fill a batch: see `staggered_routing`.

    Args:
        trace: The recording.
        max_batch: Most requests at a time.
        schedule: ``static`` or ``continuous``.
        **options: Others of `moeprof.replay.compose`.
    """
    routing = read_routing(compose(trace, schedule, max_batch=max_batch, **options))
    source = dataclasses.replace(routing.source, name=trace_name(trace))
    return dataclasses.replace(routing, source=source)


def staggered_routing(
    routing: Routing | Trace, *, batch: int, stack: str | None = None, phase: str = "decode"
) -> Routing:
    """Returns passes of ``batch`` tokens taken from passes of one token, far apart in the run.

    For a recording of a single request. Its one-token passes are cut into ``batch`` runs of equal
    length; pass i of the result holds the i-th token of every run. Consecutive passes so keep the
    order of the text in every row, as requests that run side by side do; but all rows are one
    text, whose topics are closer than those of a batch of strangers.

    Args:
        routing: What was recorded.
        batch: Tokens per pass.
        stack: The stack; may be left out where there is one.
        phase: Phase of the passes used.
    """
    source = routing if isinstance(routing, Routing) else read_routing(routing)
    own = source.stack(stack)
    chosen = np.array([name == phase for name in own.phases]) & (own.num_tokens == 1)
    passes = np.flatnonzero(chosen)
    length = len(passes) // batch if batch > 0 else 0
    if not length:
        raise UsageError(
            f"{len(passes)} {phase} passes of one token do not fill one of {batch}",
            hint="choose a smaller batch or record a longer run",
        )
    # [pass of the result, row of its batch] -> pass of the recording
    order = passes[: length * batch].reshape(batch, length).T
    sites = tuple(_gathered(site, order) for site in own.sites)
    result = StackRouting(
        stack=own.stack,
        sites=sites,
        starts=np.arange(length + 1, dtype=np.int64) * batch,
        steps=np.arange(length, dtype=np.int64),
        phases=(phase,) * length,
    )
    said = dataclasses.replace(
        source.source,
        geometry=geometry_of({own.stack: result}),
        num_steps=length,
        num_tokens=length * batch,
    ).changed(
        f"staggered: each pass holds {batch} {phase} tokens {length} apart in the same run"
        if batch > 1
        else f"{phase} tokens one by one"
    )
    return Routing(stacks={own.stack: result}, source=said)


def _gathered(site: SiteRouting, order: NDArray[np.intp]) -> SiteRouting:
    """Returns a site's routing with passes [results, rows] of one token side by side."""
    flat = order.ravel()
    if (np.diff(site.starts)[flat] != 1).any():
        raise UsageError(
            f"site {site.site} did not see every token of these passes",
            hint="leave it out: read_routing(trace, sites=...)",
        )
    rows = site.starts[flat]
    length, batch = order.shape
    places = np.tile(np.arange(batch, dtype=np.int64), length)
    num_rows = np.full(length, batch, np.int64)
    return dataclasses.replace(
        site,
        starts=np.arange(length + 1, dtype=np.int64) * batch,
        experts=site.experts[rows],
        weights=site.weights[rows],
        tokens=None,
        places=places,
        num_rows=num_rows,
        stack_places=places,
        num_stack_rows=num_rows,
    )


def _control(shape: ShapeLike, *, kind: str, exponent: float, seed: int) -> Routing:
    """Returns drawn routing of a shape."""
    if isinstance(shape, Trace):
        shape = read_routing(shape)
    lender = ""
    if isinstance(shape, Routing):
        stacks = dict(shape.stacks)
        lender = f"shape of {shape.source.name}"
    else:
        shapes = (shape,) if isinstance(shape, RoutingShape) else tuple(shape)
        stacks = {each.stack: _blank(each) for each in shapes}
    generator = np.random.default_rng(seed)
    drawn = {
        name: dataclasses.replace(
            stack, sites=tuple(_drawn(site, exponent, generator) for site in stack.sites)
        )
        for name, stack in stacks.items()
    }
    source = RoutingSource(
        kind=kind,
        name="over all experts" if kind == "uniform" else f"by a Zipf law of exponent {exponent:g}",
        geometry=geometry_of(drawn),
        num_steps=sum(map(len, drawn.values())),
        num_tokens=sum(int(stack.starts[-1]) for stack in drawn.values()),
        weights="1/slots each",
        selection=lender,
        seed=seed,
        exponent=exponent,
    )
    return Routing(stacks=drawn, source=source)


def _blank(shape: RoutingShape) -> StackRouting:
    """Returns the passes of a shape, nothing chosen yet."""
    tokens = np.asarray(list(shape.tokens), np.int64)
    starts = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
    num_rows = int(starts[-1])
    places = np.arange(num_rows, dtype=np.int64) - np.repeat(starts[:-1], tokens)
    sites = tuple(
        SiteRouting(
            site=index,
            layer=index,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            starts=starts,
            experts=np.zeros((num_rows, shape.top_k), np.int32),
            weights=np.zeros((num_rows, shape.top_k), np.float32),
            tokens=None,
            places=places,
            num_rows=tokens,
            stack_places=places,
            num_stack_rows=tokens,
        )
        for index in range(shape.num_sites)
    )
    phase = "encode" if shape.stack == "encoder" else "decode"
    return StackRouting(
        stack=shape.stack,
        sites=sites,
        starts=starts,
        steps=np.arange(len(tokens), dtype=np.int64),
        phases=tuple(shape.phases) if shape.phases is not None else (phase,) * len(tokens),
    )


def _drawn(site: SiteRouting, exponent: float, generator: np.random.Generator) -> SiteRouting:
    """Returns a site with experts drawn by a Zipf law, weights 1 / top_k."""
    ranks = np.arange(1, site.num_experts + 1, dtype=np.float64)
    popularity = (-exponent * np.log(ranks))[generator.permutation(site.num_experts)]
    experts = draw_experts(popularity, len(site.experts), site.top_k, generator)
    weights = np.full(experts.shape, 1 / site.top_k, np.float32)
    return dataclasses.replace(site, experts=experts, weights=weights)


def draw_experts(
    log_popularity: NDArray[np.float64],
    num_tokens: int,
    top_k: int,
    generator: np.random.Generator,
) -> Ids:
    """Returns [num_tokens, top_k] distinct experts per token, in the order drawn.

    Gumbel noise added to log probabilities and sorted is drawing without putting back.

    Args:
        log_popularity: [num_experts] log of unnormalized probabilities.
        num_tokens: Tokens.
        top_k: Experts per token.
        generator: Of the noise.
    """
    num_experts = len(log_popularity)
    chunk = max(1, _CHUNK_SCORES // num_experts)
    drawn = np.empty((num_tokens, top_k), np.int32)
    for start in range(0, num_tokens, chunk):
        rows = drawn[start : start + chunk]
        scores = log_popularity + generator.gumbel(size=(len(rows), num_experts))
        best: Ints = np.argpartition(scores, -top_k, axis=1)[:, -top_k:].astype(np.int64)
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        rows[:] = np.take_along_axis(best, order, axis=1)
    return drawn
