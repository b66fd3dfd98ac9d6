"""The model that is trained: a plain torch transformer whose routing has the paper's geometry.

Decoder-only, or encoder-decoder with cross-attention; pre-norm, sinusoidal positions, the embedding
is also the head. Experts, dense feed-forward networks and attention are narrow, so that minutes of
training are many tokens. Weights are kept in single precision and cast where they are used. Leaves
out the layers that route (`routing`) and the training (`learning`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

from analysis.gpu.twins.routing import TwinMoe
from analysis.gpu.twins.shape import TwinConfig
from moeprof.live.paper_lm import ATTENTION_KERNELS

_POSITION_BASE = 10000.0
_INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear layer without bias whose weight is cast to the dtype of its input."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the product."""
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))


class Norm(nn.LayerNorm):
    """A layer norm whose parameters are cast to the dtype of its input."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the normalized input."""
        dtype = hidden_states.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


class TwinFfn(nn.Module):
    """The dense feed-forward network of the layers that do not route."""

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.w_in = Linear(config.d_model, config.ffn_width)
        self.w_out = Linear(config.ffn_width, config.d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the network's output."""
        out: torch.Tensor = self.w_out(F.relu(self.w_in(hidden_states)))
        return out


class TwinCache:
    """Keys and values of the tokens seen so far, in storage taken once."""

    def __init__(self, config: TwinConfig, *, batch: int, max_length: int, like: torch.Tensor):
        head_width = config.attention_width // config.num_heads
        shape = (config.decoder_layers, 2, batch, config.num_heads, max_length, head_width)
        self._store = torch.empty(shape, device=like.device, dtype=getattr(torch, config.dtype))
        self._length = 0
        self.crossed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get_seq_length(self) -> int:
        """Returns the tokens per sequence seen so far."""
        return self._length

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values [B, heads, S, width] and returns all, old ones first."""
        end = self._length + key.shape[-2]
        self._store[layer, 0, :, :, self._length : end] = key
        self._store[layer, 1, :, :, self._length : end] = value
        return self._store[layer, 0, :, :, :end], self._store[layer, 1, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts ``num_tokens`` as seen, once all layers have stored them."""
        self._length += num_tokens


class TwinAttention(nn.Module):
    """Self-attention, or attention over an encoder's output."""

    def __init__(self, config: TwinConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.layer = config.num_heads, layer
        width = config.attention_width
        self.query = Linear(config.d_model, width)
        self.key_value = Linear(config.d_model, 2 * width)
        self.out = Linear(width, config.d_model)

    def _heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        return hidden_states.view(batch, length, self.num_heads, -1).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        memory: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        past: TwinCache | None = None,
    ) -> torch.Tensor:
        """Returns the attention output.

        Args:
            hidden_states: [B, S, d_model].
            memory: [B, M, d_model], what is attended to; None for ``hidden_states`` itself.
            mask: [B, 1, 1, M] True where something may be seen.
            causal: True where a token sees only those before it.
            past: Tokens before these.
        """
        query = self._heads(self.query(hidden_states))
        crossed = past.crossed.get(self.layer) if past is not None and memory is not None else None
        if crossed is None:
            source = hidden_states if memory is None else memory
            key, value = (self._heads(t) for t in self.key_value(source).chunk(2, dim=-1))
            if past is not None and memory is not None:
                past.crossed[self.layer] = (key, value)
            elif past is not None:
                causal = causal and hidden_states.shape[1] > 1
                assert not causal or past.get_seq_length() == 0
                key, value = past.extend(self.layer, key, value)
        else:
            key, value = crossed
        if mask is not None:
            mask = mask.expand(-1, 1, query.shape[-2], -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        result: torch.Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result


class TwinLayer(nn.Module):
    """One pre-norm layer; holds `moe` where it routes, else `ffn`."""

    def __init__(self, config: TwinConfig, layer: int, *, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.dropout = decoder, config.dropout
        self.attention_norm = Norm(config.d_model)
        self.attention = TwinAttention(config, layer)
        self.crosses = decoder and config.is_encoder_decoder
        if self.crosses:
            self.cross_norm = Norm(config.d_model)
            self.cross_attention = TwinAttention(config, layer)
        self.ffn_norm = Norm(config.d_model)
        self.routes = config.routes(layer)
        if self.routes:
            self.moe = TwinMoe(config)
        else:
            self.ffn = TwinFfn(config)

    def _drop(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.dropout(hidden_states, self.dropout, training=self.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        valid: torch.Tensor | None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        past: TwinCache | None = None,
    ) -> torch.Tensor:
        """Returns the layer's output for ``hidden_states`` [B, S, d_model]."""
        mask = valid[:, None, None] if valid is not None and not self.decoder else None
        y = self.attention(
            self.attention_norm(hidden_states), mask=mask, causal=self.decoder, past=past
        )
        hidden_states = hidden_states + self._drop(y)
        if self.crosses:
            y = self.cross_attention(
                self.cross_norm(hidden_states), memory=memory, mask=memory_mask, past=past
            )
            hidden_states = hidden_states + self._drop(y)
        y = self.ffn_norm(hidden_states)
        y = self.moe(y, valid) if self.routes else self.ffn(y)
        return hidden_states + self._drop(y)


class TwinStack(nn.Module):
    """An encoder, or a decoder up to its hidden states."""

    def __init__(self, config: TwinConfig, embedding: nn.Embedding, *, decoder: bool) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        self.embedding = embedding
        count = config.decoder_layers if decoder else config.encoder_layers
        self.layers = nn.ModuleList(
            TwinLayer(config, layer, decoder=decoder) for layer in range(count)
        )
        self.norm = Norm(config.d_model)
        positions = _sinusoids(config.max_positions, config.d_model)
        self.register_buffer("positions", positions, persistent=False)
        self.positions: torch.Tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past: TwinCache | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the normalized hidden states [B, S, d_model].

        Args:
            input_ids: [B, S] tokens; padding at the end of a row.
            attention_mask: [B, S] 0 for padding; None where there is none.
            past: Tokens before these; these are added to it.
            memory: [B, M, d_model] the encoder's output.
            memory_mask: [B, 1, 1, M] True for its tokens.
        """
        start = past.get_seq_length() if past is not None else 0
        positions = self.positions[start : start + input_ids.shape[1]]
        hidden = self.embedding(input_ids) * math.sqrt(self.config.d_model) + positions
        hidden = hidden.to(getattr(torch, self.config.dtype))
        hidden = F.dropout(hidden, self.config.dropout, training=self.training)
        valid = attention_mask.bool() if attention_mask is not None else None
        with sdpa_kernel(ATTENTION_KERNELS):
            for layer in self.layers:
                hidden = layer(
                    hidden, valid=valid, memory=memory, memory_mask=memory_mask, past=past
                )
        if past is not None:
            past.advance(input_ids.shape[1])
        out: torch.Tensor = self.norm(hidden)
        return out


class Twin(nn.Module):
    """A twin; `encoder` is there for translation only."""

    def __init__(self, config: TwinConfig, *, device: torch.device | str = "cpu", seed: int = 0):
        super().__init__()
        self.config = config
        with torch.device(device):
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            if config.is_encoder_decoder:
                self.encoder = TwinStack(config, self.embedding, decoder=False)
            self.decoder = TwinStack(config, self.embedding, decoder=True)
        self._fill(torch.Generator(device).manual_seed(seed))

    @torch.no_grad()
    def _fill(self, generator: torch.Generator) -> None:
        """Fills matrices from normals; what writes to the residual stream starts smaller."""
        smaller = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            part = name.removesuffix(".weight").rpartition(".")[2]
            if parameter.dim() == 1:
                continue
            if part == "embedding":
                std = self.config.d_model**-0.5
            elif part == "gate":
                std = _INIT_STD
            else:
                std = parameter.shape[-1] ** -0.5
            std *= smaller if part in ("out", "w_out") else 1.0
            # Expert by expert: some devices fill at most 2**32 numbers at once.
            for matrix in parameter if parameter.dim() > 2 else (parameter,):
                matrix.normal_(std=std, generator=generator)

    @property
    def num_params(self) -> int:
        """Parameters; the embedding, which is also the head, counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def routed(self) -> list[TwinMoe]:
        """Layers that route, encoder first."""
        return [module for module in self.modules() if isinstance(module, TwinMoe)]

    def last_balance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the last training pass's balancing loss [sites] and load [sites, experts]."""
        kept = [(moe.balance, moe.load) for moe in self.routed]
        balances = [balance for balance, _ in kept if balance is not None]
        return torch.stack(balances), torch.stack([load for _, load in kept if load is not None])

    def forget(self) -> None:
        """Drops what a pass left behind, which keeps its activations alive."""
        for moe in self.routed:
            moe.balance = None

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the next token."""
        return F.linear(hidden_states, self.embedding.weight.to(hidden_states.dtype))

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the encoder's output [B, S, d_model] and its mask [B, 1, 1, S]."""
        return self.encoder(input_ids, attention_mask), attention_mask.bool()[:, None, None]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the decoder's hidden states [B, S, d_model], before the head.

        Args:
            input_ids: [B, S] the text; for translation the source.
            attention_mask: [B, S] 0 for padding of the source.
            decoder_input_ids: [B, S'] the target (translation).
            decoder_mask: [B, S'] 0 for padding of the target.
        """
        if decoder_input_ids is None:
            out: torch.Tensor = self.decoder(input_ids)
            return out
        assert attention_mask is not None
        memory, mask = self.encode(input_ids, attention_mask)
        out = self.decoder(decoder_input_ids, decoder_mask, memory=memory, memory_mask=mask)
        return out

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        eos_token_id: int | None = None,
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Returns the likeliest or a sampled continuation.

        Args:
            input_ids: [B, S] prompts without padding, or sources of a translation.
            max_new_tokens: Most tokens to add.
            attention_mask: [B, S] 0 for padding of the source.
            decoder_input_ids: [B, 1] what the target begins with.
            eos_token_id: Ends a row, which then repeats it; None: rows never end.
            temperature: Of sampling; None takes the likeliest token.

        Returns:
            The prompts, or what targets began with, followed by the tokens added.
        """
        tokens = [input_ids if decoder_input_ids is None else decoder_input_ids]
        memory, mask = None, None
        if decoder_input_ids is not None:
            assert attention_mask is not None
            memory, mask = self.encode(input_ids, attention_mask)
        length = tokens[0].shape[1] + max_new_tokens
        past = TwinCache(
            self.config, batch=tokens[0].shape[0], max_length=length, like=self.embedding.weight
        )
        ended = torch.zeros(tokens[0].shape[0], dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            hidden = self.decoder(tokens[-1], past=past, memory=memory, memory_mask=mask)
            scores = self.logits(hidden[:, -1]).float()
            if temperature is None:
                chosen = scores.argmax(dim=-1)
            else:
                chosen = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0]
            if eos_token_id is not None:
                chosen = chosen.masked_fill(ended, eos_token_id)
                ended = ended | (chosen == eos_token_id)
            tokens.append(chosen[:, None])
            if eos_token_id is not None and bool(ended.all()):
                break
        return torch.cat(tokens, dim=1)

    @torch.no_grad()
    def freeze(self) -> Twin:
        """Casts the matrices of the layers to what they compute in; returns the model.

        The result computes what the trained model computes: they were cast before each use. The
        embedding, the gates and the norms stay as they are.
        """
        dtype = getattr(torch, self.config.dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            if parameter.dim() > 1 and not name.endswith(("gate.weight", "embedding.weight")):
                parameter.data = parameter.data.to(dtype)
        return self.eval()


def _sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Returns sinusoidal position vectors [num_positions, width]: sines, then cosines."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * (-math.log(_POSITION_BASE) / max(half - 1, 1)))
    angles = torch.arange(num_positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
