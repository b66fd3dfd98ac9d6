"""One rank's share of the founding paper's layout of 8 GPUs, on one GPU: memory by gating.

The rank has E / 8 experts of every Mixture-of-Experts layer and all else (arXiv 2303.06182, table I
and section III). It gates its own tokens, sends rows to all ranks, runs its experts on the rows of
all 8 ranks' tokens and brings its own back. The buffers of both all-to-alls are allocated at their
true sizes and filled from what is at hand, as there is no other rank: sizes are real, values are
not. With static gating a rank receives the slots of 8 ranks whatever was routed; with dynamic
gating the rows that recorded routing sends it, and the rank that is measured is the one with the
most in any layer. Leaves out time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis.gpu.headline_runs import Choice, ForcedGate, memory
from analysis.gpu.mt_stacks import MtDecoder, MtEncoder
from moeprof.live.experts import ExpertWeights
from moeprof.live.kernels import kernel_named
from moeprof.live.kernels.slots import combine_rows, queue_positions, rows_by_expert
from moeprof.live.kernels.static import combine_mask
from moeprof.live.paper_lm import PaperGate, PaperLm, PaperLmConfig, PaperMoe
from moeprof.live.scoring_heads import ScoringHead

RANKS = 8
STATIC = ("static_mask", "static_mask_fairseq")
DYNAMIC = ("dynamic_loop", "dynamic")
GATINGS = (*STATIC, *DYNAMIC)
HEAD_TOKENS = 1024
"""Tokens whose logits are held at once; the same for every gating."""

_BF16, _FP32 = 2, 4
_FAIRSEQ_MASK_BYTES = 13
"""Bytes per element of (tokens, experts, slots): two products and their sum in single precision,
and the boolean mask."""
_MASK_BYTES = 8
"""The same as `static_mask` allocates them: the weights in single and half precision, the mask."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankRouting:
    """What one rank computes with in one layer.

    Attributes:
        own: [S, k] experts and weights of its own tokens.
        counts: [ranks, local experts] rows that each rank sends to each of its experts.
        num_own: Rows that its own tokens need.
        num_received: Rows it receives.
        largest: Rows of its fullest expert.
    """

    own: Choice
    counts: torch.Tensor
    num_own: int
    num_received: int
    largest: int


def rank_routing(
    choices: Sequence[Choice], num_experts: int, device: str, rank: int | None = None
) -> tuple[int, list[RankRouting]]:
    """Returns the rank with the most rows in any layer and, per layer, its routing.

    Args:
        choices: Per layer, [ranks * S, k] experts and weights of all ranks' tokens, rank by rank.
        num_experts: Of a layer, dealt to ranks in contiguous ranges.
        device: Where to.
        rank: Take this one instead.
    """
    local = num_experts // RANKS
    sent = []
    for ids, _ in choices:
        by_rank = ids.view(RANKS, -1).cpu().numpy()
        counts = [np.bincount(row[row >= 0], minlength=num_experts) for row in by_rank]
        sent.append(np.stack(counts).reshape(RANKS, RANKS, local))
    if rank is None:
        rank = int(np.stack(sent).sum(axis=(1, 3)).max(axis=0).argmax())
    found = []
    for (ids, weights), counts in zip(choices, sent, strict=True):
        size = ids.shape[0] // RANKS
        own = slice(rank * size, (rank + 1) * size)
        mine = counts[:, rank]
        found.append(
            RankRouting(
                own=(ids[own].to(device), weights[own].to(device)),
                counts=torch.from_numpy(np.ascontiguousarray(mine)).to(device),
                num_own=int(counts[rank].sum()),
                num_received=int(mine.sum()),
                largest=int(mine.sum(axis=0).max()),
            )
        )
    return rank, found


class RankMoe(nn.Module):
    """A Mixture-of-Experts layer of which this rank has a share.

    Args:
        config: Of the whole layer: all its experts.
        block: Layer of the share; its experts are used.
        token_fraction: Slots per expert and rank as a share of a rank's tokens; static only.

    Attributes:
        gating: One of `GATINGS`; set before a pass.
        routing: What is routed; set before a pass.
    """

    def __init__(self, config: PaperLmConfig, block: PaperMoe, token_fraction: float) -> None:
        super().__init__()
        weight = block.experts.w_in
        self.gate = ForcedGate(PaperGate(config, device=weight.device, dtype=weight.dtype), [])
        with torch.no_grad():
            self.gate.gate.weight.normal_(std=config.d_model**-0.5).requires_grad_(
                requires_grad=False
            )
        self.experts = block.experts
        self.num_experts = config.num_experts
        self.token_fraction = token_fraction
        self.gating = GATINGS[0]
        self.routing: RankRouting | None = None

    def route(self, gating: str, routing: RankRouting) -> None:
        """Sets the gating and what is routed."""
        self.gating, self.routing = gating, routing
        self.gate.choices = [routing.own]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output for ``hidden_states`` [B, S, d_model]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, weights = self.gate(flat)
        own = self.experts
        experts = ExpertWeights(
            w_in=own.w_in, w_out=own.w_out, b_in=own.b_in, b_out=own.b_out, activation="relu"
        )
        run = self._static if self.gating in STATIC else self._dynamic
        return run(flat, ids, weights, experts).view_as(hidden_states)

    def _static(
        self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
    ) -> torch.Tensor:
        """As fairseq's ``moe_layer.py``: masks, equal all-to-alls, experts one after another."""
        slots = math.ceil(self.token_fraction * flat.shape[0])
        make = combine_mask if self.gating == "static_mask" else fairseq_mask
        combine = make(ids, weights, self.num_experts, slots)
        dispatch = combine.bool().to(flat.dtype)
        back = combine.to(flat.dtype).view(flat.shape[0], -1)
        sent = dispatch.view(flat.shape[0], -1).t() @ flat
        del dispatch, combine
        received = _exchanged(sent, sent.shape[0])
        del sent
        by_expert = received.view(RANKS, experts.num_experts, slots, -1)
        for expert in range(experts.num_experts):
            rows = by_expert[:, expert].reshape(RANKS * slots, -1)
            by_expert[:, expert] = experts.run(expert, rows).view(RANKS, slots, -1)
        returned = _exchanged(received, received.shape[0])
        del received, by_expert
        return back @ returned

    def _dynamic(
        self, flat: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertWeights
    ) -> torch.Tensor:
        """As the paper's section V: rows by expert, unequal all-to-alls, experts on what came."""
        routing = self.routing
        assert routing is not None
        order = rows_by_expert(ids, self.num_experts)
        sent = flat.index_select(0, order.slots[: routing.num_own] // ids.shape[1])
        received = _exchanged(sent, routing.num_received)
        del sent
        local = torch.arange(experts.num_experts, device=flat.device).repeat(RANKS)
        arrived = torch.repeat_interleave(
            local, routing.counts.reshape(-1), output_size=routing.num_received
        )[:, None]
        ones = torch.ones_like(arrived, dtype=flat.dtype)
        made = kernel_named(self.gating)(received, arrived, ones, experts)
        del received
        # Slots without an expert have no row, but a place.
        returned = torch.empty(ids.numel(), flat.shape[1], dtype=flat.dtype, device=flat.device)
        _fill_rows(returned[: routing.num_own], made)
        del made
        return combine_rows(returned, order, weights)


def fairseq_mask(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int, slots: int
) -> torch.Tensor:
    """Returns the weights as [S, num_experts, slots] by products of one-hots, as fairseq does.

    ``top2gate.py``: one batched product per choice, in single precision, added up; the boolean mask
    is made while all of them are alive.
    """
    places = queue_positions(ids, num_experts)
    parts = []
    for slot in range(ids.shape[1]):
        kept = (places[:, slot] >= 0) & (places[:, slot] < slots)
        gate = torch.zeros(ids.shape[0], num_experts, 1, dtype=torch.float32, device=ids.device)
        value = torch.where(kept, weights[:, slot].float(), 0)
        gate.scatter_(1, ids[:, slot].clamp(min=0)[:, None, None], value[:, None, None])
        location = torch.zeros(ids.shape[0], 1, slots, dtype=torch.float32, device=ids.device)
        place = places[:, slot].clamp(min=0, max=slots - 1)
        location.scatter_(2, place[:, None, None], 1.0)
        parts.append(torch.bmm(gate, location))
    combined = parts[0]
    for part in parts[1:]:
        combined = combined + part
    # Held while the products are, as there.
    mask = combined.bool()
    del parts, mask
    return combined


def _exchanged(sent: torch.Tensor, num_received: int) -> torch.Tensor:
    """Returns a receive buffer of its true size, filled from what was sent."""
    received = sent.new_empty(num_received, sent.shape[1])
    _fill_rows(received, sent)
    return received


def _fill_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies ``source`` into ``target``, again and again or in part; zeros where it is empty."""
    if not source.shape[0]:
        target.zero_()
        return
    for start in range(0, target.shape[0], source.shape[0]):
        part = target[start : start + source.shape[0]]
        part.copy_(source[: part.shape[0]])


@dataclass(frozen=True, kw_only=True)
class Share:
    """A model of which every layer has a rank's share of experts.

    Attributes:
        model: ``lm`` or ``mt``.
        modules: What holds its weights.
        blocks: Its Mixture-of-Experts layers, in order of execution.
        run: A pass over a rank's batch.
    """

    model: str
    modules: tuple[nn.Module, ...]
    blocks: tuple[RankMoe, ...]
    run: Callable[[], object]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, shared ones once."""
        every = {id(p): p for module in self.modules for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in every.values())


def _shared(stack: nn.Module, config: PaperLmConfig, fraction: float) -> list[RankMoe]:
    blocks = []
    for layer in stack.layers:
        if layer.routes:
            layer.moe = RankMoe(config, layer.moe, fraction)
            blocks.append(layer.moe)
    return blocks


def lm_share(config: PaperLmConfig, batch: int, length: int, fraction: float, device: str) -> Share:
    """Returns a rank's share of the language model, scoring ``batch`` sequences."""
    own = dataclasses.replace(config, num_experts=config.num_experts // RANKS)
    model = PaperLm(own, device=device)
    model.head = ScoringHead(model.embedding.weight, chunk_tokens=HEAD_TOKENS)
    blocks = _shared(model, config, fraction)
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    model.head.targets = ids.roll(-1, dims=1)
    return Share(model="lm", modules=(model,), blocks=tuple(blocks), run=lambda: model(ids))


def mt_share(
    config: PaperLmConfig, keep: torch.Tensor, fraction: float, past_tokens: int, device: str
) -> Share:
    """Returns a rank's share of the translation model: a batch encoded, then one decode step.

    Args:
        config: Of a stack, all experts.
        keep: [B, S] True for tokens of the sentences.
        fraction: Slots per expert and rank as a share of a rank's tokens.
        past_tokens: Tokens decoded so far.
        device: Where.
    """
    own = dataclasses.replace(config, num_experts=config.num_experts // RANKS)
    encoder = MtEncoder(own, device=device)
    decoder = MtDecoder(own, device=device, embedding=encoder.embedding)
    blocks = [*_shared(encoder, config, fraction), *_shared(decoder, config, fraction)]
    tokens = torch.randint(config.vocab_size, keep.shape, device=device)

    def translate() -> torch.Tensor:
        encoded = encoder(tokens, keep)
        state = decoder.begin(encoded, past_tokens=past_tokens, max_tokens=past_tokens + 1)
        del encoded
        return decoder(tokens[:, :1], state)

    return Share(model="mt", modules=(encoder, decoder), blocks=tuple(blocks), run=translate)


def moe_layer_bytes(
    gating: str,
    config: PaperLmConfig,
    *,
    num_tokens: int,
    fraction: float,
    routing: RankRouting | None = None,
) -> int:
    """Returns what one layer allocates at its peak by arithmetic on shapes, its input included.

    Counts the tensors of `RankMoe` that have as many elements as a mask or as rows have.

    Args:
        gating: One of `GATINGS`.
        config: Of the whole layer.
        num_tokens: Of the rank, padding counted.
        fraction: Slots per expert and rank as a share of its tokens.
        routing: Of dynamic gating.
    """
    width, hidden = config.d_model * _BF16, config.d_ff * _BF16
    stream = 2 * num_tokens * width
    if gating in STATIC:
        slots = math.ceil(fraction * num_tokens)
        elements = num_tokens * config.num_experts * slots
        rows = config.num_experts * slots * width
        one = RANKS * slots * (2 * width + 2 * hidden)
        masks = elements * _MASK_BYTES + rows
        if gating == "static_mask_fairseq":
            masks = max(masks, elements * _FAIRSEQ_MASK_BYTES)
        return stream + max(masks, elements * _BF16 + rows + max(rows, one))
    assert routing is not None
    received = routing.num_received * width
    # Rows as they came, as they were gathered and as the experts leave them.
    running = 3 * received
    if gating == "dynamic_loop":
        adding = 3 * routing.num_received * config.d_model * _FP32
        running += max(2 * routing.largest * hidden, adding)
    else:
        running += routing.num_received * hidden
    sending = routing.num_own * width + received
    combining = config.top_k * num_tokens * width + 3 * num_tokens * config.d_model * _FP32
    return stream + max(sending, running, combining)


def measure(
    share: Share, gating: str, routing: Sequence[RankRouting], device: str
) -> dict[str, Any]:
    """Returns the memory of a pass: weights, and the peak of all that torch held."""
    for block, each in zip(share.blocks, routing, strict=True):
        block.route(gating, each)
    if device != "cpu":
        torch.cuda.empty_cache()
    resident, _ = memory(device)
    with torch.no_grad():
        share.run()
    _, peak = memory(device)
    known = device != "cpu"
    return {
        "gating": gating,
        "weight_bytes": share.weight_bytes,
        "resident_bytes": resident if known else None,
        "peak_bytes": peak if known else None,
        "activation_bytes": peak - share.weight_bytes if known else None,
    }
