"""Recorded routing of a translation model, as batches of sentences and as decode steps.

From a routing twin's trace (`analysis.gpu.twins`): the encoder's passes give sentences, the
decoder's give steps. Leaves out the model that it drives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from analysis.gpu.headline_runs import Choice, first_rows
from moeprof.live.paper_lm import PaperLmConfig
from moeprof.live.routing_sources import Routing, StackRouting, read_routing
from moeprof.trace.reader import Trace, open_trace

LENGTH = 32
"""Tokens to which every sentence is padded."""
SHORTEST = 17
"""Shorter sentences are left out, so that padding is not most of a batch."""
DECODE_STEPS = 8
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class RecordedBatches:
    """Choices of as many sentences as were asked for; in larger batches they come again.

    Attributes:
        choices: Per site, per recorded pass, [rows, k] experts and weights; -1 where padding is.
        keep: [sentences, length] True for tokens; None for decode steps, which have no padding.
        said: Where they are from and what was done to them.
        num_distinct: Sentences (encoder) or rows of the shortest step (decoder) before repeating.
    """

    choices: list[list[Choice]]
    keep: torch.Tensor | None
    said: str
    num_distinct: int

    def num_tokens(self, batch: int) -> int:
        """Returns tokens without padding of a pass over the first ``batch`` sentences."""
        return batch if self.keep is None else int(first_rows(self.keep, batch).sum())

    def active_experts(self, batch: int) -> float:
        """Returns the mean, over sites and passes, of experts that ``batch`` sentences choose."""
        rows = batch if self.keep is None else batch * self.keep.shape[1]
        counts = [int((ids[:rows].unique() >= 0).sum()) for own in self.choices for ids, _ in own]
        return sum(counts) / len(counts)


def encoder_batches(
    source: str, config: PaperLmConfig, num_sentences: int, device: str
) -> RecordedBatches:
    """Returns the encoder's routing of whole sentences, each padded to `LENGTH` tokens.

    Recorded sentences of `SHORTEST` to `LENGTH` tokens come in random order, again where there are
    too few. A source that was encoded for several target languages counts once for each.
    """
    trace = open_trace(source)
    routing = read_routing(trace, stacks=("encoder",), phase="encode")
    stack = routing.stack("encoder")
    _check(source, stack, config)
    sentence = _sentences(trace, stack)
    starts = np.flatnonzero(np.diff(sentence, prepend=-1))
    lengths = np.diff(np.append(starts, sentence.size))
    fitting = np.flatnonzero((lengths >= SHORTEST) & (lengths <= LENGTH))
    if not fitting.size:
        raise SystemExit(f"{source} has no sentence of {SHORTEST} to {LENGTH} tokens")
    order = np.random.default_rng(_SEED).permutation(fitting)
    chosen = np.resize(order, num_sentences)
    places = np.arange(LENGTH)
    keep = places < lengths[chosen, None]
    rows = np.where(keep, starts[chosen, None] + places, 0).ravel()
    empty = np.logical_not(keep).ravel()
    said = (
        f"{routing.source}; {fitting.size} sentences of {SHORTEST} to {LENGTH} tokens in random"
        f" order, each padded to {LENGTH}, repeated where a batch is larger; padding is not routed"
    )
    choices = [
        [_choice(site.experts[rows], site.weights[rows], device, empty)] for site in stack.sites
    ]
    return RecordedBatches(
        choices=choices,
        keep=torch.from_numpy(keep).to(device),
        said=said,
        num_distinct=int(fitting.size),
    )


def decoder_steps(
    source: str, config: PaperLmConfig, num_sentences: int, device: str
) -> RecordedBatches:
    """Returns the decoder's routing of the first `DECODE_STEPS` decode steps of sentences.

    A step has the rows that recorded passes had at that place, passes in random order, again where
    there are too few; the places of sentences that have ended are taken by those of other passes.
    """
    trace = open_trace(source)
    routing = read_routing(trace, stacks=("decoder",), phase="decode")
    stack = routing.stack("decoder")
    _check(source, stack, config)
    group, place = _decode_places(trace, routing)
    shuffled = np.random.default_rng(_SEED).permutation(int(group.max()) + 1)
    choices: list[list[Choice]] = [[] for _ in stack.sites]
    counts = []
    for step in range(min(DECODE_STEPS, int(place.max()) + 1)):
        passes = np.flatnonzero(place == step)
        passes = passes[np.argsort(shuffled[group[passes]], kind="stable")]
        rows = np.concatenate([np.arange(stack.starts[p], stack.starts[p + 1]) for p in passes])
        counts.append(rows.size)
        rows = np.resize(rows, num_sentences)
        for own, site in zip(choices, stack.sites, strict=True):
            own.append(_choice(site.experts[rows], site.weights[rows], device))
    said = (
        f"{routing.source}; the first {len(counts)} decode steps in turn, {min(counts)} to"
        f" {max(counts)} rows each, passes in random order, repeated where a batch is larger"
    )
    return RecordedBatches(choices=choices, keep=None, said=said, num_distinct=min(counts))


def uniform_control(recorded: RecordedBatches, config: PaperLmConfig) -> RecordedBatches:
    """Returns the same batches with every set of top_k experts equally likely, weights equal."""
    first = recorded.choices[0][0][0]
    # Drawn where it is used: on the host this would take longer than the measurement.
    generator = torch.Generator(first.device).manual_seed(_SEED)
    empty = None if recorded.keep is None else recorded.keep.logical_not().reshape(-1, 1)

    def drawn() -> Choice:
        chances = torch.rand(
            len(first), config.num_experts, device=first.device, generator=generator
        )
        ids = chances.topk(config.top_k, dim=-1).indices
        weights = torch.full_like(ids, 1 / config.top_k, dtype=torch.float32)
        if empty is None:
            return ids, weights
        return ids.masked_fill(empty, -1), weights.masked_fill(empty, 0)

    return RecordedBatches(
        choices=[[drawn() for _ in own] for own in recorded.choices],
        keep=recorded.keep,
        said=f"uniform routing ({len(recorded.choices)} sites of {config.num_experts} experts"
        f" top-{config.top_k}; seed {_SEED}; weights 1/slots each), padding as recorded",
        num_distinct=len(first),
    )


def _choice(
    experts: np.ndarray, weights: np.ndarray, device: str, empty: np.ndarray | None = None
) -> Choice:
    if empty is not None:
        experts = np.where(empty[:, None], -1, experts)
        weights = np.where(empty[:, None], 0, weights)
    ids = torch.from_numpy(np.ascontiguousarray(experts)).long().to(device)
    return ids, torch.from_numpy(np.ascontiguousarray(weights)).to(device)


def _check(source: str, stack: StackRouting, config: PaperLmConfig) -> None:
    sites = stack.sites
    if len(sites) != config.num_moe_layers or sites[0].num_experts != config.num_experts:
        raise SystemExit(
            f"{source} has {len(sites)} {stack.stack} sites of {sites[0].num_experts} experts, the"
            f" model {config.num_moe_layers} of {config.num_experts}"
        )


def _sentences(trace: Trace, stack: StackRouting) -> np.ndarray:
    """Returns [tokens] a number for the sentence of each token, ascending."""
    steps, requests = [], []
    for block in trace.blocks(stack.stack):
        chosen = np.isin(block.step, stack.steps)
        steps.append(block.step[chosen])
        requests.append(block.request[chosen])
    step, request = np.concatenate(steps), np.concatenate(requests)
    assert step.size == stack.starts[-1]
    changes = (np.diff(step, prepend=-1) != 0) | (np.diff(request, prepend=-1) != 0)
    return np.cumsum(changes)


def _decode_places(trace: Trace, routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Returns, per decode pass, the encoded batch it belongs to and its place in its decoding."""
    steps = trace.steps.sort_values("step")
    encoded = steps.loc[steps["phase"] == "encode", "step"].to_numpy()
    group = np.searchsorted(encoded, routing.stack("decoder").steps)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    first = np.repeat(starts, np.diff(np.append(starts, group.size)))
    return group, np.arange(group.size) - first
