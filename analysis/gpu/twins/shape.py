"""Shapes of the twins: the paper's layers, experts, top-k and d_model, narrow in all else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TwinConfig:
    """Shape of a twin.

    Attributes:
        vocab_size: Rows of the embedding, which is also the output head.
        encoder_layers: Layers of the encoder; 0 for a language model.
        decoder_layers: Layers of the decoder.
        moe_every: Every so many layers, counted from 1, one routes.
        d_model: Width of the residual stream.
        num_experts: Experts of a layer that routes.
        top_k: Experts per token.
        expert_width: Hidden width of an expert.
        ffn_width: Hidden width of the layers that do not route.
        attention_width: Width of queries, keys and values over all heads.
        num_heads: Attention heads.
        max_positions: Longest sequence.
        dropout: Of the embedding and of what each part adds to the residual stream.
        dtype: What layers compute in.
    """

    vocab_size: int
    encoder_layers: int
    decoder_layers: int
    moe_every: int
    d_model: int
    num_experts: int
    top_k: int
    expert_width: int
    ffn_width: int
    attention_width: int
    num_heads: int
    max_positions: int
    dropout: float = 0.1
    dtype: str = "bfloat16"

    @property
    def is_encoder_decoder(self) -> bool:
        """True for a translation model."""
        return self.encoder_layers > 0

    @property
    def num_layers(self) -> int:
        """Layers of both stacks."""
        return self.encoder_layers + self.decoder_layers

    def routes(self, layer: int) -> bool:
        """Returns True where ``layer`` of a stack, counted from 0, routes."""
        return (layer + 1) % self.moe_every == 0


def lm_config(vocab_size: int) -> TwinConfig:
    """Returns the twin of the paper's language model (24 layers, 12 x 512 experts, top-2)."""
    return TwinConfig(
        vocab_size=vocab_size, encoder_layers=0, decoder_layers=24, moe_every=2, d_model=1024,
        num_experts=512, top_k=2, expert_width=128, ffn_width=1024, attention_width=512,
        num_heads=8, max_positions=1024,
    )  # fmt: skip


def mt_config(vocab_size: int) -> TwinConfig:
    """Returns the twin of the paper's translation model (24 + 24 layers, 12 x 128, top-2)."""
    return TwinConfig(
        vocab_size=vocab_size, encoder_layers=24, decoder_layers=24, moe_every=4, d_model=2048,
        num_experts=128, top_k=2, expert_width=256, ffn_width=1024, attention_width=512,
        num_heads=8, max_positions=256,
    )  # fmt: skip
