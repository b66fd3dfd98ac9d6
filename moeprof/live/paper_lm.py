"""A plain torch language model in the shape of the first paper on Mixture-of-Experts inference.

A decoder-only pre-norm transformer whose every second layer routes each token to two of many
ungated two-matrix experts, with dynamic gating: rows are sorted by expert and run through one
grouped matrix product; nothing is dropped and no slot is padded. Weights are random: it serves to
measure time and memory at scale, its routing means nothing. Leaves out training, padding inside a
batch and sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeprof.errors import UsageError
from moeprof.live.grouping import can_group
from moeprof.live.kernels.fused import suits_device

EXPERT_KERNELS = ("auto", "grouped", "loop")
# Without cuDNN's, which plans anew, for some 30 ms, at each length of the cache it has not seen.
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_POSITION_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class PaperLmConfig:
    """Shape of the model; the defaults are the paper's language model of 52 billion parameters.

    Attributes:
        vocab_size: Rows of the embedding, which is also the output head.
        num_layers: Layers in all.
        moe_every: Every so many layers, counted from 1, one is a Mixture-of-Experts layer.
        d_model: Width of the residual stream.
        d_ff: Hidden width of a dense feed-forward network and of each expert.
        num_heads: Attention heads.
        num_experts: Experts of a Mixture-of-Experts layer.
        top_k: Experts per token.
        bias: True where linear layers and experts have a bias; the gate never has one.
        max_positions: Longest sequence.
        expert_kernel: ``grouped`` (one grouped matrix product), ``loop`` (one product per active
            expert; waits for the device) or ``auto``, which takes the first where it is there.
    """

    vocab_size: int = 51200
    num_layers: int = 24
    moe_every: int = 2
    d_model: int = 1024
    d_ff: int = 4096
    num_heads: int = 16
    num_experts: int = 512
    top_k: int = 2
    bias: bool = True
    max_positions: int = 4096
    expert_kernel: str = "auto"

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        if self.d_model % self.num_heads or self.d_model % 2:
            raise UsageError(
                f"d_model {self.d_model} must be even and a multiple of num_heads {self.num_heads}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise UsageError(f"top_k must lie between 1 and {self.num_experts}, got {self.top_k}")
        if self.expert_kernel not in EXPERT_KERNELS:
            raise UsageError(
                f"unknown expert_kernel {self.expert_kernel!r}",
                hint=f"choose one of: {', '.join(EXPERT_KERNELS)}",
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Returns True where ``layer``, counted from 0, routes."""
        return (layer + 1) % self.moe_every == 0

    @property
    def num_moe_layers(self) -> int:
        """Layers that route."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def num_expert_params(self) -> int:
        """Parameters of one expert."""
        biases = self.d_ff + self.d_model if self.bias else 0
        return 2 * self.d_model * self.d_ff + biases


class Dispatched(NamedTuple):
    """Rows in expert order.

    Attributes:
        rows: [T * k, d_model], sorted by expert, token order within an expert.
        row_experts: [T * k] int64, expert of each row.
        ends: [num_experts] int32, end of each expert's rows.
        inverse: [T * k] int64, where the row of (token, slot) went.
    """

    rows: torch.Tensor
    row_experts: torch.Tensor
    ends: torch.Tensor
    inverse: torch.Tensor


class PaperGate(nn.Module):
    """Chooses experts: softmax over all in single precision, top k, weights made to sum to 1."""

    def __init__(self, config: PaperLmConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        precise = dtype if dtype == torch.float64 else torch.float32
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, config.d_model, device=device, dtype=precise)
        )
        self._parts: tuple[tuple[int, int], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (expert ids [T, k] int64, best first; weights [T, k] in the model's dtype)."""
        if self._is_in_parts(hidden_states):
            from moeprof.live.kernels.router import route

            return route(hidden_states, self._weight_parts(), top_k=self.top_k)
        logits = F.linear(hidden_states.to(self.weight.dtype), self.weight)
        chosen, top_k_index = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        weights = chosen / chosen.sum(dim=-1, keepdim=True)
        return top_k_index, weights.to(hidden_states.dtype)

    def _is_in_parts(self, hidden_states: torch.Tensor) -> bool:
        """Returns True where half-precision products give single-precision logits (`router`)."""
        return (
            hidden_states.dtype == torch.bfloat16
            and self.weight.dtype == torch.float32
            and not (torch.is_grad_enabled() and self.weight.requires_grad)
            and suits_device(hidden_states.device, hidden_states.dtype)
        )

    def _weight_parts(self) -> torch.Tensor:
        """Returns the parts of the weights as they are now."""
        weight = self.weight
        version = (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        if self._parts is None or self._parts[0] != version:
            from moeprof.live.kernels.router import in_parts

            self._parts = (version, in_parts(weight))
        return self._parts[1]


class PaperDispatch(nn.Module):
    """Brings rows into expert order without waiting for the device."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> Dispatched:
        """Returns the rows of ``hidden_states`` [T, d_model], one per slot, by expert."""
        flat = top_k_index.reshape(-1)
        row_experts, order = flat.sort(stable=True)
        every = torch.arange(self.num_experts, device=flat.device)
        ends = torch.searchsorted(row_experts, every, right=True, out_int32=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=flat.device)
        rows = hidden_states.index_select(0, order // top_k_index.shape[-1])
        return Dispatched(rows=rows, row_experts=row_experts, ends=ends, inverse=inverse)


class PaperExperts(nn.Module):
    """Two-matrix experts with a rectifier between, all in one tensor per matrix."""

    def __init__(self, config: PaperLmConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.kernel = config.expert_kernel
        count, width, hidden = config.num_experts, config.d_model, config.d_ff
        self.w_in = nn.Parameter(torch.empty(count, hidden, width, device=device, dtype=dtype))
        self.w_out = nn.Parameter(torch.empty(count, width, hidden, device=device, dtype=dtype))
        self.b_in: nn.Parameter | None = None
        self.b_out: nn.Parameter | None = None
        if config.bias:
            self.b_in = nn.Parameter(torch.empty(count, hidden, device=device, dtype=dtype))
            self.b_out = nn.Parameter(torch.empty(count, width, device=device, dtype=dtype))

    def forward(
        self,
        rows: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        row_experts: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Returns each row through its expert.

        Args:
            rows: [T * k, d_model], sorted by expert.
            top_k_index: [T, k] int64; shows a recorder which experts each token chose.
            top_k_weights: [T, k]; shows a recorder the weights that the combination applies.
            row_experts: [T * k] int64, expert of each row.
            ends: [num_experts] int32, end of each expert's rows.
        """
        if self.uses_grouped(rows):
            return self._grouped(rows, row_experts, ends)
        return self._loop(rows, ends)

    def uses_grouped(self, rows: torch.Tensor) -> bool:
        """Returns True where ``rows`` will run as one grouped matrix product."""
        return self.kernel == "grouped" or (self.kernel == "auto" and can_group(self.w_in, rows))

    def _grouped(
        self, rows: torch.Tensor, row_experts: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        hidden = F.grouped_mm(rows, self.w_in.transpose(1, 2), offs=ends)
        if self.b_in is not None:
            hidden += self.b_in[row_experts]
        out = F.grouped_mm(hidden.relu_(), self.w_out.transpose(1, 2), offs=ends)
        if self.b_out is not None:
            out += self.b_out[row_experts]
        return out

    def _loop(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(rows)
        start = 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                b_in = None if self.b_in is None else self.b_in[expert]
                b_out = None if self.b_out is None else self.b_out[expert]
                hidden = F.linear(rows[start:end], self.w_in[expert], b_in).relu_()
                out[start:end] = F.linear(hidden, self.w_out[expert], b_out)
            start = end
        return out


class PaperCombine(nn.Module):
    """Brings rows back into token order and adds each token's, weighted; bit-reproducible."""

    def forward(
        self, rows: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns [T, d_model] from ``rows`` [T * k, d_model] and ``weights`` [T, k]."""
        by_token = rows.index_select(0, inverse).view(*weights.shape, rows.shape[-1])
        out = by_token[:, 0] * weights[:, :1]
        for slot in range(1, weights.shape[1]):
            out = torch.addcmul(out, by_token[:, slot], weights[:, slot : slot + 1])
        return out


class PaperMoe(nn.Module):
    """A Mixture-of-Experts layer: gate, dispatch, experts and combine are modules of their own."""

    def __init__(self, config: PaperLmConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = PaperGate(config, device=device, dtype=dtype)
        self.dispatch = PaperDispatch(config.num_experts)
        self.experts = PaperExperts(config, device=device, dtype=dtype)
        self.combine = PaperCombine()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output for ``hidden_states`` [B, S, d_model]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k_index, top_k_weights = self.gate(flat)
        sent = self.dispatch(flat, top_k_index)
        rows = self.experts(sent.rows, top_k_index, top_k_weights, sent.row_experts, sent.ends)
        combined: torch.Tensor = self.combine(rows, sent.inverse, top_k_weights)
        return combined.view_as(hidden_states)


class PaperFfn(nn.Module):
    """The dense feed-forward network of the layers that do not route."""

    def __init__(self, config: PaperLmConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.w_in = nn.Linear(
            config.d_model, config.d_ff, bias=config.bias, device=device, dtype=dtype
        )
        self.w_out = nn.Linear(
            config.d_ff, config.d_model, bias=config.bias, device=device, dtype=dtype
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the network's output, in the shape of its input."""
        out: torch.Tensor = self.w_out(self.w_in(hidden_states).relu_())
        return out


class PaperCache:
    """Keys and values of the tokens seen so far, in storage taken once.

    Args:
        config: Shape of the model.
        batch: Sequences.
        max_length: Most tokens per sequence.
        device: Where.
        dtype: The model's.
    """

    def __init__(
        self,
        config: PaperLmConfig,
        *,
        batch: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        head_width = config.d_model // config.num_heads
        shape = (config.num_layers, 2, batch, config.num_heads, max_length, head_width)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self._length = 0

    def get_seq_length(self) -> int:
        """Returns the tokens per sequence seen so far."""
        return self._length

    @property
    def max_length(self) -> int:
        """Most tokens per sequence."""
        return self._store.shape[-2]

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values [B, heads, S, width] and returns all, old ones first."""
        start, end = self._length, self._length + key.shape[-2]
        self._store[layer, 0, :, :, start:end] = key
        self._store[layer, 1, :, :, start:end] = value
        return self._store[layer, 0, :, :, :end], self._store[layer, 1, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts ``num_tokens`` as seen, once all layers have stored them."""
        self._length += num_tokens


class PaperAttention(nn.Module):
    """Causal self-attention."""

    def __init__(
        self, config: PaperLmConfig, layer: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.layer = layer
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias, device=device, dtype=dtype)
        self.out = nn.Linear(width, width, bias=config.bias, device=device, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor, past: PaperCache | None = None) -> torch.Tensor:
        """Returns the attention output for ``hidden_states`` [B, S, d_model]."""
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask, causal = None, length > 1
        if past is not None:
            seen = past.get_seq_length()
            key, value = past.extend(self.layer, key, value)
            if seen and causal:
                every = torch.arange(seen + length, device=query.device)
                mask, causal = every[None, :] <= every[seen:, None], False
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        result: torch.Tensor = self.out(out.transpose(1, 2).reshape(batch, length, width))
        return result


class PaperLayer(nn.Module):
    """One pre-norm transformer layer; holds `moe` where it routes, else `ffn`.

    Args:
        config: The model's sizes.
        layer: Which layer this is.
        device: Where its weights lie.
        dtype: Of its weights.
        attention: Kind of self-attention.
    """

    def __init__(
        self,
        config: PaperLmConfig,
        layer: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: type[PaperAttention] = PaperAttention,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.attention = attention(config, layer, device=device, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.routes = config.is_moe_layer(layer)
        if self.routes:
            self.moe = PaperMoe(config, device=device, dtype=dtype)
        else:
            self.ffn = PaperFfn(config, device=device, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor, past: PaperCache | None = None) -> torch.Tensor:
        """Returns the layer's output for ``hidden_states`` [B, S, d_model]."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), past)
        return self.feed_forward(hidden_states)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns ``hidden_states`` plus what the layer's experts or network make of it."""
        network = self.moe if self.routes else self.ffn
        out: torch.Tensor = hidden_states + network(self.ffn_norm(hidden_states))
        return out


class PaperLm(nn.Module):
    """The language model, with random weights.

    Every tensor is made and filled on ``device`` in ``dtype``, one after the other, so that the
    model never takes more memory than its weights. On the device ``meta`` nothing is filled.

    Args:
        config: Shape.
        device: Where.
        dtype: Of all weights but the gates', which are at least in single precision.
        seed: Of the random weights.

    Attributes:
        random_weights: True: its routing means nothing.
    """

    random_weights = True

    def __init__(
        self,
        config: PaperLmConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config = config or PaperLmConfig()
        device = torch.device(device)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            PaperLayer(config, layer, device=device, dtype=dtype)
            for layer in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.head = nn.Linear(
            config.d_model, config.vocab_size, bias=False, device="meta", dtype=dtype
        )
        self.head.weight = self.embedding.weight
        positions = sinusoids(config.max_positions, config.d_model, device).to(dtype)
        self.register_buffer("positions", positions, persistent=False)
        self.positions: torch.Tensor
        if device.type != "meta":
            fill_weights(self, torch.Generator(device).manual_seed(seed))
        self.eval().requires_grad_(requires_grad=False)

    @property
    def num_params(self) -> int:
        """Parameters; the embedding, which is also the head, counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def new_cache(self, batch: int, max_length: int) -> PaperCache:
        """Returns an empty cache for ``batch`` sequences of at most ``max_length`` tokens."""
        weight = self.embedding.weight
        return PaperCache(
            self.config,
            batch=batch,
            max_length=max_length,
            device=weight.device,
            dtype=weight.dtype,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        past: PaperCache | None = None,
        *,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Returns the logits.

        Args:
            input_ids: [B, S] int64, without padding.
            past: Tokens before these; these are added to it.
            last_only: True for the logits of the last token only, [B, 1, vocab_size].
        """
        start = past.get_seq_length() if past is not None else 0
        end = start + input_ids.shape[1]
        limit: int = self.config.max_positions
        if past is not None:
            limit = min(limit, past.max_length)
        if end > limit:
            raise UsageError(
                f"{end} tokens per sequence are more than the {limit} there is room for",
                hint="make the cache longer, or build the model with a larger max_positions",
            )
        scale = math.sqrt(self.config.d_model)
        hidden = self.embedding(input_ids) * scale + self.positions[start:end]
        with sdpa_kernel(ATTENTION_KERNELS):
            for layer in self.layers:
                hidden = layer(hidden, past)
        if past is not None:
            past.advance(input_ids.shape[1])
        if last_only:
            hidden = hidden[:, -1:]
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, *, max_new_tokens: int) -> torch.Tensor:
        """Returns ``input_ids`` [B, S] followed by the likeliest ``max_new_tokens`` tokens."""
        tokens = [input_ids]
        past = self.new_cache(input_ids.shape[0], input_ids.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            logits = self(tokens[-1], past=past, last_only=True)
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
        return torch.cat(tokens, dim=1)


@torch.no_grad()
def fill_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Fills matrices from N(0, 1 / inputs), biases with 0, norms with 1."""
    for name, parameter in module.named_parameters():
        if "norm" in name.split(".")[-2]:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.split(".")[-1] in ("bias", "b_in", "b_out"):
            parameter.zero_()
        else:
            std = 1 / math.sqrt(parameter.shape[-1])
            # Expert by expert: some devices fill at most 2**32 numbers at once.
            for matrix in parameter if parameter.dim() > 2 else (parameter,):  # noqa: PLR2004
                matrix.normal_(std=std, generator=generator)


def sinusoids(num_positions: int, width: int, device: torch.device) -> torch.Tensor:
    """Returns sinusoidal position vectors [num_positions, width]: sines, then cosines."""
    half = width // 2
    scale = math.log(_POSITION_BASE) / max(half - 1, 1)
    rates = torch.exp(torch.arange(half, device=device, dtype=torch.float64) * -scale)
    angles = torch.arange(num_positions, device=device, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
