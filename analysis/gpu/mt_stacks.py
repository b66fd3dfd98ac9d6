"""The founding paper's translation model in plain torch, a stack at a time, with random weights.

NLLB-200's 54.5 billion parameters (arXiv 2303.06182, Table I): 24 encoder and 24 decoder layers of
d_model 2048 and 16 heads, pre-norm, every fourth with 128 ungated experts of d_ff 8192, top-2, in
the others one such network. Its parts are those of `moeprof.live.paper_lm`. The decoder makes one
step: its keys and values of earlier tokens and of the encoder's output are given. Leaves out
routing that means something, beam search and training.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

from moeprof.live.paper_lm import (
    ATTENTION_KERNELS,
    PaperAttention,
    PaperCache,
    PaperFfn,
    PaperLayer,
    PaperLmConfig,
    PaperMoe,
    fill_weights,
    sinusoids,
)

MT_CONFIG = PaperLmConfig(
    vocab_size=256206, moe_every=4, d_model=2048, d_ff=8192, num_experts=128, max_positions=1024
)
"""One stack of it; `num_layers` are those of the stack."""

DTYPE = torch.bfloat16


class EncoderAttention(PaperAttention):
    """Self-attention of every token to every token that is no padding."""

    def forward(
        self, hidden_states: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the output for ``hidden_states`` [B, S, d_model].

        Args:
            hidden_states: The input.
            keep: [B, 1, 1, S] True for tokens; None where nothing is padding.
        """
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        result: torch.Tensor = self.out(out.transpose(1, 2).reshape(batch, length, width))
        return result


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to keys and values of an encoder's output."""

    def __init__(self, config: PaperLmConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.query = nn.Linear(width, width, device=device, dtype=dtype)
        self.key_value = nn.Linear(width, 2 * width, device=device, dtype=dtype)
        self.out = nn.Linear(width, width, device=device, dtype=dtype)

    def keys_values(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values [B, heads, S, width] of ``encoded`` [B, S, d_model]."""
        batch, length, _ = encoded.shape
        both = self.key_value(encoded).view(batch, length, 2, self.num_heads, -1)
        key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Returns the output for ``hidden_states`` [B, S, d_model]."""
        batch, length, width = hidden_states.shape
        query = self.query(hidden_states).view(batch, length, self.num_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = self.out(out.transpose(1, 2).reshape(batch, length, width))
        return result


class EncoderLayer(PaperLayer):
    """Self-attention and feed-forward."""

    def __init__(
        self, config: PaperLmConfig, layer: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype, attention=EncoderAttention)

    def forward(self, hidden: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Returns the layer's output for ``hidden`` [B, S, d_model]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), keep)
        return self.feed_forward(hidden)


class DecoderLayer(PaperLayer):
    """Self-attention to the tokens so far, attention to the encoder's output, feed-forward."""

    def __init__(
        self, config: PaperLmConfig, layer: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype)
        self.cross_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.cross_attention = CrossAttention(config, device=device, dtype=dtype)

    def forward(
        self, hidden: torch.Tensor, past: PaperCache, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Returns the layer's output for ``hidden`` [B, 1, d_model]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), past)
        hidden = hidden + self.cross_attention(self.cross_norm(hidden), key, value)
        return self.feed_forward(hidden)


class GreedyHead(nn.Module):
    """The likeliest next token of each row; its weight is the embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns tokens [...] for ``hidden`` [..., d_model]."""
        return F.linear(hidden, self.weight).argmax(dim=-1)


class UnpaddedFfn(PaperFfn):
    """A feed-forward network that leaves out padding, as experts do; its output there is zero.

    Attributes:
        rows: [N] int64 places of tokens that are no padding, of all B x S; None where all are.
    """

    rows: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the network's output [B, S, d_model]."""
        if self.rows is None:
            return super().forward(hidden_states)
        flat = hidden_states.flatten(0, -2)
        out = torch.zeros_like(flat)
        out[self.rows] = super().forward(flat[self.rows])
        return out.view_as(hidden_states)


class MtStack(nn.Module):
    """Embedding, positions and layers of one stack.

    Args:
        config: Its shape.
        layer: Class of its layers.
        device: Where.
        embedding: Of the other stack, where both are there; one of its own otherwise.
        seed: Of the random weights.
    """

    random_weights = True

    def __init__(
        self,
        config: PaperLmConfig,
        layer: type[EncoderLayer] | type[DecoderLayer],
        *,
        device: str,
        embedding: nn.Embedding | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        where = torch.device(device)
        self.layers = nn.ModuleList(
            layer(config, index, device=where, dtype=DTYPE) for index in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model, device=where, dtype=DTYPE)
        if embedding is None:
            embedding = nn.Embedding(config.vocab_size, config.d_model, device=where, dtype=DTYPE)
        if where.type != "meta":
            fill_weights(self, torch.Generator(where).manual_seed(seed))
        self.embedding = embedding
        positions = sinusoids(config.max_positions, config.d_model, where).to(DTYPE)
        self.register_buffer("positions", positions, persistent=False)
        self.eval().requires_grad_(requires_grad=False)

    def embed(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Returns [B, S, d_model] for ``tokens`` [B, S] that begin at position ``start``."""
        scale = math.sqrt(self.config.d_model)
        places = self.positions[start : start + tokens.shape[1]]
        return self.embedding(tokens) * scale + places

    @property
    def moes(self) -> list[PaperMoe]:
        """Its Mixture-of-Experts blocks."""
        return [layer.moe for layer in self.layers if layer.routes]


class MtEncoder(MtStack):
    """The encoder: whole sentences in one pass."""

    def __init__(self, config: PaperLmConfig = MT_CONFIG, *, device: str, seed: int = 0) -> None:
        super().__init__(config, EncoderLayer, device=device, seed=seed)

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the output [B, S, d_model].

        Args:
            tokens: [B, S] int64.
            keep: [B, S] True where a token is no padding; None where none is.
        """
        mask = None if keep is None else keep[:, None, None, :]
        hidden = self.embed(tokens)
        with sdpa_kernel(ATTENTION_KERNELS):
            for layer in self.layers:
                hidden = layer(hidden, mask)
        out: torch.Tensor = self.norm(hidden)
        return out


@dataclasses.dataclass(frozen=True)
class DecoderState:
    """What a decoder keeps of sentences between two steps.

    Attributes:
        past: Keys and values of the tokens so far.
        crossing: Per layer, keys and values [B, heads, S, width] of the encoder's output.
    """

    past: PaperCache
    crossing: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class MtDecoder(MtStack):
    """The decoder: one step of a batch of sentences, and the likeliest next tokens."""

    def __init__(
        self,
        config: PaperLmConfig = MT_CONFIG,
        *,
        device: str,
        embedding: nn.Embedding | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(config, DecoderLayer, device=device, embedding=embedding, seed=seed)
        self.head = GreedyHead(self.embedding)

    def begin(self, encoded: torch.Tensor, *, past_tokens: int, max_tokens: int) -> DecoderState:
        """Returns what there is to decode from, as if ``past_tokens`` had been decoded.

        Args:
            encoded: [B, S, d_model].
            past_tokens: Tokens per sentence so far; their keys and values are zero.
            max_tokens: Most tokens per sentence.
        """
        weight = self.embedding.weight
        past = PaperCache(
            self.config, batch=encoded.shape[0], max_length=max_tokens, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        for layer in range(self.config.num_layers):
            zeros = torch.zeros(
                encoded.shape[0], self.config.num_heads, past_tokens,
                self.config.d_model // self.config.num_heads, device=weight.device,
                dtype=weight.dtype,
            )  # fmt: skip
            past.extend(layer, zeros, zeros)
        past.advance(past_tokens)
        crossing = tuple(layer.cross_attention.keys_values(encoded) for layer in self.layers)
        return DecoderState(past=past, crossing=crossing)

    def forward(self, tokens: torch.Tensor, state: DecoderState) -> torch.Tensor:
        """Returns the next tokens [B, 1] after ``tokens`` [B, 1]; ``state`` is not moved on."""
        hidden = self.embed(tokens, state.past.get_seq_length())
        with sdpa_kernel(ATTENTION_KERNELS):
            for layer, (key, value) in zip(self.layers, state.crossing, strict=True):
                hidden = layer(hidden, state.past, key, value)
        chosen: torch.Tensor = self.head(self.norm(hidden))
        return chosen


def dense_config(config: PaperLmConfig) -> PaperLmConfig:
    """Returns the shape without experts."""
    return dataclasses.replace(config, moe_every=config.num_layers + 1)


def widen(stack: MtStack, config: PaperLmConfig, device: str) -> None:
    """Gives a stack without experts wider networks where ``config`` routes: equal operations.

    Like experts, they leave out padding, where it is known (`leave_out_padding`).
    """
    wide = dataclasses.replace(config, d_ff=config.d_ff * config.top_k)
    generator = torch.Generator(device).manual_seed(2)
    for index, layer in enumerate(stack.layers):
        if config.is_moe_layer(index):
            holder = nn.ModuleDict(
                {"ffn": UnpaddedFfn(wide, device=torch.device(device), dtype=DTYPE)}
            )
            fill_weights(holder, generator)
            layer.ffn = holder["ffn"].requires_grad_(requires_grad=False)


def leave_out_padding(stack: MtStack, keep: torch.Tensor) -> None:
    """Tells the networks that stand for experts which tokens of the next pass are padding.

    Args:
        stack: With such networks, or without.
        keep: [B, S] True where a token is no padding.
    """
    networks = [each for each in stack.modules() if isinstance(each, UnpaddedFfn)]
    rows = keep.flatten().nonzero().squeeze(1) if networks else None
    for network in networks:
        network.rows = rows
