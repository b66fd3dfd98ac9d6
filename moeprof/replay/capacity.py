"""Arithmetic on shapes: what a capacity rule makes of a dispatch, and what a device holds.

Static gating gives every expert the same number of slots: more tokens are dropped, fewer leave
placeholders, which are sent and computed like tokens. Everything here follows from shapes and
token counts alone. Leaves out routing (`gates`) and time.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.trace import schema

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RULES = ("token_fraction", "capacity_factor", "fixed")
TILE_ROWS = 128
"""Rows that a matrix product handles at a time unless told otherwise."""

MASK_ELEMENT_BYTES = 15
"""Bytes per element of the (tokens, experts, slots) tensors if all are alive at once: two products
in single precision, their sum, the boolean mask and the weights in half precision."""

COMBINE_ELEMENT_BYTES = 4
COUNT_BYTES = 8
ELEMENTWISE_THREADS = 256
DTYPE_BYTES: Mapping[str, int] = types.MappingProxyType(
    {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
)

_MULTIPLY_ADD = 2


def slots_per_expert(
    rule: str, value: float, *, num_tokens: Any, num_experts: int, top_k: int
) -> Ints:
    """Returns the slots that one device's tokens get at each expert.

    ``token_fraction``: ceil(value x tokens). ``capacity_factor``: ceil(value x k x tokens / E).
    ``fixed``: value. The arithmetic is that of double precision from left to right, as models do
    it: 0.07 x 100 rounds up to 8.

    Args:
        rule: One of `RULES`.
        value: Its parameter.
        num_tokens: Tokens of the device, padding counted; any shape.
        num_experts: Routed experts of the site.
        top_k: Experts per token.
    """
    exact = slots_without_ceiling(
        rule, value, num_tokens=num_tokens, num_experts=num_experts, top_k=top_k
    )
    return np.ceil(exact).astype(np.int64)


def slots_without_ceiling(
    rule: str, value: float, *, num_tokens: Any, num_experts: int, top_k: int
) -> Floats:
    """Returns `slots_per_expert` before it is rounded up."""
    check_rule(rule, value)
    tokens = np.asarray(num_tokens, np.float64)
    if rule == "token_fraction":
        return value * tokens
    if rule == "capacity_factor":
        return value * top_k * tokens / num_experts
    return np.where(tokens > 0, value, 0.0)


def check_rule(rule: str, value: float) -> None:
    """Refuses rules that do not exist and parameters that make no sense.

    Raises:
        UsageError: With the rules there are.
    """
    if rule not in RULES:
        raise UsageError(
            f"unknown capacity rule {rule!r}", hint=f"choose one of: {', '.join(RULES)}"
        )
    if isinstance(value, bool) or not np.isfinite(value) or value <= 0:
        raise UsageError(
            f"{rule} needs a number above 0, not {value!r}",
            hint="the founding paper's language model has token_fraction 0.05",
        )


def may_drop(site: schema.Site) -> bool:
    """Returns True where the site's own rule can give an expert fewer slots than tokens.

    The experts of one token are distinct, so no expert is ever chosen by more than all tokens.
    """
    rule = site.capacity_rule
    if rule is None:
        return False
    if rule.rule == "token_fraction":
        return rule.value < 1
    if rule.rule == "capacity_factor":
        return rule.value * site.top_k < site.num_experts
    return True


def expert_devices(num_experts: int, devices: int) -> Ints:
    """Returns [experts] the device of each: contiguous ranges whose sizes differ by at most 1."""
    return np.arange(num_experts, dtype=np.int64) * devices // num_experts


def tile_rows(rows: Any, tile: int = TILE_ROWS) -> Ints:
    """Returns row counts rounded up to whole tiles; no rows need no tile."""
    return -(-np.asarray(rows, np.int64) // tile) * tile


def elementwise_blocks(num_elements: int, *, threads: int = ELEMENTWISE_THREADS) -> int:
    """Returns the thread blocks of a kernel that gives every element one thread."""
    return -(-num_elements // threads)


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Shape of one MoE layer; None where it is not known, and what follows from it too.

    Attributes:
        num_experts: Routed experts.
        top_k: Experts per token.
        d_model: Width of a token.
        d_ff: Hidden width of an expert.
        matrices_per_expert: Weight matrices of an expert: 2 ungated, 3 gated.
        element_bytes: Bytes of one number of an activation.
        expert_bytes: Bytes of one expert's parameters.
    """

    num_experts: int
    top_k: int
    d_model: int | None = None
    d_ff: int | None = None
    matrices_per_expert: int | None = None
    element_bytes: int | None = None
    expert_bytes: int | None = None

    @classmethod
    def of_site(cls, site: schema.Site, *, dtype: str = "") -> MoeShape:
        """Returns the shape of a recorded site.

        Args:
            site: The site.
            dtype: Of its activations.
        """
        return cls(
            num_experts=site.num_experts,
            top_k=site.top_k,
            d_model=site.d_model,
            d_ff=site.d_ff,
            matrices_per_expert=site.matrices_per_expert,
            element_bytes=DTYPE_BYTES.get(dtype),
            expert_bytes=site.expert_bytes,
        )

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one token as it is sent to an expert."""
        if self.d_model is None or self.element_bytes is None:
            return None
        return self.d_model * self.element_bytes

    @property
    def row_flops(self) -> int | None:
        """Floating-point operations of one row through an expert."""
        if self.d_model is None or self.d_ff is None or self.matrices_per_expert is None:
            return None
        return _MULTIPLY_ADD * self.d_model * self.d_ff * self.matrices_per_expert

    @property
    def mask_element_flops(self) -> int | None:
        """Operations per element of the mask: one product brings rows in, one brings them back."""
        return None if self.d_model is None else 2 * _MULTIPLY_ADD * self.d_model


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticDispatches:
    """Dispatches of one site under a capacity rule, as shapes alone determine them.

    Attributes:
        shape: Of the site.
        num_tokens: [dispatches, devices] tokens of each device, padding counted.
        slots: [dispatches, devices] slots per expert that each device fills.
        exact_slots: The same before they were rounded up.
    """

    shape: MoeShape
    num_tokens: Ints
    slots: Ints
    exact_slots: Floats

    @property
    def devices(self) -> int:
        """Devices that share the experts."""
        return int(self.slots.shape[1])

    @property
    def rows(self) -> Ints:
        """[dispatches, devices] rows each device sends: its slots at all experts."""
        return self.shape.num_experts * self.slots

    @property
    def rows_per_expert(self) -> Ints:
        """[dispatches] rows every expert runs on, empty experts too."""
        total: Ints = self.slots.sum(axis=1)
        return total

    @property
    def crossing_rows(self) -> Ints:
        """[dispatches] rows whose expert lies on another device than their token."""
        local = np.bincount(
            expert_devices(self.shape.num_experts, self.devices), minlength=self.devices
        )
        total: Ints = (self.slots * (self.shape.num_experts - local)).sum(axis=1)
        return total

    @property
    def mask_elements(self) -> Ints:
        """[dispatches, devices] elements of a device's (tokens, experts, slots) tensor."""
        return self.num_tokens * self.rows

    @property
    def mask_bytes(self) -> Ints:
        """[dispatches, devices] bytes of all such tensors alive at once."""
        return self.mask_elements * MASK_ELEMENT_BYTES

    @property
    def combine_bytes(self) -> Ints:
        """[dispatches, devices] bytes of one such tensor in single precision."""
        return self.mask_elements * COMBINE_ELEMENT_BYTES

    @property
    def dispatched_bytes(self) -> Ints | None:
        """[dispatches, devices] bytes of the rows a device sends."""
        return None if self.shape.row_bytes is None else self.rows * self.shape.row_bytes

    @property
    def needed_bytes(self) -> Ints | None:
        """[dispatches, devices] bytes of the rows that its tokens need."""
        if self.shape.row_bytes is None:
            return None
        return self.shape.top_k * self.num_tokens * self.shape.row_bytes

    @property
    def local_experts(self) -> int:
        """Experts of the fullest device: its calls of an expert per dispatch."""
        return -(-self.shape.num_experts // self.devices)

    @property
    def waste_factor(self) -> float:
        """Rows processed for each one that a token needs."""
        return float(self.rows.sum() / (self.shape.top_k * self.num_tokens.sum()))

    @property
    def waste_factor_without_ceiling(self) -> float:
        """The same before slots are rounded up: E x fraction / k, or the capacity factor."""
        rows = self.shape.num_experts * self.exact_slots.sum()
        return float(rows / (self.shape.top_k * self.num_tokens.sum()))


def static_dispatches(
    shape: MoeShape, *, num_tokens: Any, rule: str = "token_fraction", value: float
) -> StaticDispatches:
    """Returns what a capacity rule makes of dispatches.

    Example: the founding paper's small language model on four devices::

        shape = MoeShape(num_experts=512, top_k=2, d_model=768, element_bytes=2)
        static_dispatches(shape, num_tokens=[2048] * 4, value=0.05).rows_per_expert  # [412]

    Args:
        shape: Of the site.
        num_tokens: Tokens of each device, padding counted: [devices] or [dispatches, devices].
        rule: One of `RULES`.
        value: Its parameter.
    """
    tokens = np.atleast_2d(np.asarray(num_tokens, np.int64))
    exact = slots_without_ceiling(
        rule, value, num_tokens=tokens, num_experts=shape.num_experts, top_k=shape.top_k
    )
    return StaticDispatches(
        shape=shape, num_tokens=tokens, slots=np.ceil(exact).astype(np.int64), exact_slots=exact
    )


def device_bytes(
    static: schema.StaticBytes,
    sites: tuple[schema.Site, ...],
    *,
    devices: int = 1,
    cache_slots: int | None = None,
    cached_stack: str = "decoder",
) -> int:
    """Returns the parameter bytes of the fullest device.

    Experts are dealt to devices in contiguous ranges, everything else is on every device.

    Args:
        static: Bytes of the whole model by part.
        sites: Its sites.
        devices: Devices that share the experts.
        cache_slots: Experts per device and site kept in device memory; None keeps all.
        cached_stack: The stack that `cache_slots` is about; other stacks keep all.
    """
    total = static.total - sum(site.num_experts * site.expert_bytes for site in sites)
    for site in sites:
        held = -(-site.num_experts // devices)
        if cache_slots is not None and site.stack == cached_stack:
            held = min(held, cache_slots)
        total += held * site.expert_bytes
    return total


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a whole transformer with tied embeddings, pre-norm layers and biases.

    Attributes:
        moe: Shape of its MoE layers; dense layers have the same ``d_model`` and ``d_ff``.
        num_encoder_layers: Layers of the encoder; 0 in a language model.
        num_decoder_layers: Layers of the decoder.
        moe_every: Every so many layers, counted from 1, one is an MoE layer.
        vocab_size: Rows of the embedding, which is also the output head.
        num_heads: Attention heads.
    """

    moe: MoeShape
    num_encoder_layers: int = 0
    num_decoder_layers: int
    moe_every: int
    vocab_size: int
    num_heads: int

    @property
    def _width(self) -> int:
        assert self.moe.d_model is not None
        return self.moe.d_model

    @property
    def _layers(self) -> dict[str, int]:
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of both stacks."""
        return sum(count // self.moe_every for count in self._layers.values())

    @property
    def expert_params(self) -> int:
        """Parameters of one expert: two matrices and their biases."""
        assert self.moe.d_ff is not None
        return 2 * self._width * self.moe.d_ff + self.moe.d_ff + self._width

    @property
    def params(self) -> Mapping[str, int]:
        """Parameters by part, as `schema.StaticBytes` names them."""
        width, layers = self._width, sum(self._layers.values())
        crossing = self.num_decoder_layers if self.num_encoder_layers else 0
        norms = 2 * layers + crossing + sum(count > 0 for count in self._layers.values())
        return {
            "embedding": self.vocab_size * width,
            "attention": (layers + crossing) * (4 * width * width + 4 * width),
            "dense_ffn": (layers - self.num_moe_layers) * self.expert_params,
            "experts": self.num_moe_layers * self.moe.num_experts * self.expert_params,
            "router": self.num_moe_layers * self.moe.num_experts * width,
            "other": norms * 2 * width,
        }

    @property
    def num_params(self) -> int:
        """All parameters."""
        return sum(self.params.values())

    @property
    def static_bytes(self) -> schema.StaticBytes:
        """Bytes by part, all in the activations' type."""
        size = self.moe.element_bytes
        assert size is not None
        return schema.StaticBytes(**{part: size * n for part, n in self.params.items()})

    @property
    def sites(self) -> tuple[schema.Site, ...]:
        """Its MoE layers as a trace would name them."""
        assert self.moe.element_bytes is not None
        found: list[schema.Site] = []
        for stack, count in self._layers.items():
            for index in range(count // self.moe_every):
                found.append(
                    schema.Site(
                        site=len(found),
                        stack=stack,
                        layer=(index + 1) * self.moe_every - 1,
                        num_experts=self.moe.num_experts,
                        top_k=self.moe.top_k,
                        first_slot=index * self.moe.top_k,
                        expert_bytes=self.expert_params * self.moe.element_bytes,
                        matrices_per_expert=self.moe.matrices_per_expert,
                        d_model=self.moe.d_model,
                        d_ff=self.moe.d_ff,
                    )
                )
        return tuple(found)

    def device_bytes(self, *, devices: int = 1, cache_slots: int | None = None) -> int:
        """Returns `device_bytes` of this model; a cache holds decoder experts."""
        return device_bytes(self.static_bytes, self.sites, devices=devices, cache_slots=cache_slots)

    def batched_products(
        self, dispatch: StaticDispatches, *, sequence_length: int
    ) -> tuple[int, int]:
        """Returns how many batched products one forward pass of a decoder makes, and their bytes.

        Each MoE layer makes two for its combine weights (one per choice of a top-2 gate), each
        attention makes one for its scores and one for its output.

        Args:
            dispatch: One dispatch; the first device is looked at.
            sequence_length: Tokens per sequence.
        """
        assert self.moe.element_bytes is not None
        tokens = int(dispatch.num_tokens[0, 0])
        scores = tokens * sequence_length * self.num_heads * self.moe.element_bytes
        output = tokens * self._width * self.moe.element_bytes
        combine = 2 * self.num_moe_layers
        attention = self.num_decoder_layers
        total = combine * int(dispatch.combine_bytes[0, 0]) + attention * (scores + output)
        return combine + 2 * attention, total


PAPER_LM = ModelShape(
    moe=MoeShape(
        num_experts=512, top_k=2, d_model=1024, d_ff=4096, matrices_per_expert=2, element_bytes=2
    ),
    num_decoder_layers=24,
    moe_every=2,
    vocab_size=51200,
    num_heads=16,
)
"""The founding paper's language model (arXiv 2303.06182, Table I): 52 B."""

PAPER_MT = ModelShape(
    moe=MoeShape(
        num_experts=128, top_k=2, d_model=2048, d_ff=8192, matrices_per_expert=2, element_bytes=2
    ),
    num_encoder_layers=24,
    num_decoder_layers=24,
    moe_every=4,
    vocab_size=256206,
    num_heads=16,
)
"""Its translation model: NLLB-200, 54.5 B."""

PAPER_LM_SMALL = ModelShape(
    moe=MoeShape(
        num_experts=512, top_k=2, d_model=768, d_ff=3072, matrices_per_expert=2, element_bytes=2
    ),
    num_decoder_layers=12,
    moe_every=2,
    vocab_size=51200,
    num_heads=12,
)
"""Its small language model: fairseq's 15 B, of which an independent profile is public."""

PAPER_FRACTIONS: Mapping[str, float] = types.MappingProxyType({"lm": 0.05, "mt": 1.0})
"""Slots per token and expert that the paper's models have."""
