"""The experts of one Mixture-of-Experts layer as stacked weights, and what one expert computes.

Every gating kernel, the expert buffer and expert parallelism take these; none knows a model class.
Leaves out finding them in a model (`stacking`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from moeprof.errors import UsageError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda rows: F.gelu(rows, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Weights of the experts of one layer.

    An expert computes ``w_out @ activation(w_in @ x + b_in) + b_out``; where ``gated``, the first
    half of what ``w_in`` yields is the gate and the second is what it multiplies:
    ``w_out @ (activation(gate) * up) + b_out``.

    Attributes:
        w_in: [num_experts, d_ff, d_model], or [num_experts, 2 * d_ff, d_model] where gated.
        w_out: [num_experts, d_model, d_ff].
        b_in: [num_experts, rows of w_in], or None.
        b_out: [num_experts, d_model], or None.
        activation: A key of `ACTIVATIONS`.
        gated: True where the activation gates.
    """

    w_in: torch.Tensor
    w_out: torch.Tensor
    b_in: torch.Tensor | None = None
    b_out: torch.Tensor | None = None
    activation: str = "silu"
    gated: bool = False

    def __post_init__(self) -> None:
        """Refuses shapes that do not belong together."""
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"unknown activation {self.activation!r}",
                hint=f"choose one of: {', '.join(ACTIVATIONS)}",
            )
        experts, rows_in, width = self.w_in.shape
        hidden = rows_in // 2 if self.gated else rows_in
        if (self.gated and rows_in % 2) or tuple(self.w_out.shape) != (experts, width, hidden):
            raise UsageError(
                f"w_in {tuple(self.w_in.shape)} and w_out {tuple(self.w_out.shape)} do not belong"
                " together"
            )
        for name, bias, size in (("b_in", self.b_in, rows_in), ("b_out", self.b_out, width)):
            if bias is not None and tuple(bias.shape) != (experts, size):
                raise UsageError(f"{name} is {tuple(bias.shape)}, expected {(experts, size)}")

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.w_in.shape[0]

    @property
    def d_model(self) -> int:
        """Width of a token."""
        return self.w_in.shape[2]

    @property
    def d_ff(self) -> int:
        """Hidden width of an expert."""
        return self.w_out.shape[2]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, biases included."""
        total = sum(t.numel() * t.element_size() for t in self.tensors())
        return total // self.num_experts

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of the matrix products for one row."""
        return 2 * self.d_model * (self.w_in.shape[1] + self.d_ff)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns the tensors there are, each [num_experts, ...]."""
        every = (self.w_in, self.w_out, self.b_in, self.b_out)
        return tuple(tensor for tensor in every if tensor is not None)

    def to(self, *, dtype: torch.dtype | None = None, device: str | None = None) -> ExpertWeights:
        """Returns a copy in ``dtype`` on ``device``."""
        return self._mapped(lambda tensor: tensor.to(device=device, dtype=dtype))

    def select(self, experts: slice | torch.Tensor) -> ExpertWeights:
        """Returns the weights of some experts only."""
        return self._mapped(lambda tensor: tensor[experts])

    def contiguous(self) -> ExpertWeights:
        """Returns each tensor as one piece of memory, as grouped kernels want them."""
        return self._mapped(torch.Tensor.contiguous)

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> ExpertWeights:
        return replace(
            self,
            w_in=change(self.w_in),
            w_out=change(self.w_out),
            b_in=None if self.b_in is None else change(self.b_in),
            b_out=None if self.b_out is None else change(self.b_out),
        )

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the activation of ``hidden`` [..., rows of w_in] as [..., d_ff]."""
        function = ACTIVATIONS[self.activation]
        if not self.gated:
            return function(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return function(gate) * up

    def run(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Returns ``rows`` [n, d_model] through one expert."""
        b_in = None if self.b_in is None else self.b_in[expert]
        b_out = None if self.b_out is None else self.b_out[expert]
        hidden = self.activate(F.linear(rows, self.w_in[expert], b_in))
        return F.linear(hidden, self.w_out[expert], b_out)


def random_experts(
    *,
    num_experts: int,
    d_model: int,
    d_ff: int,
    activation: str = "silu",
    gated: bool = True,
    bias: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> ExpertWeights:
    """Returns experts drawn from N(0, 1 / inputs), biases from N(0, 0.01).

    Filled expert by expert, on the device and in the dtype asked for.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(num_experts, rows, columns, device=device, dtype=dtype)
        for matrix in weight:
            matrix.normal_(std=columns**-0.5, generator=generator)
        return weight

    def drawn_bias(size: int) -> torch.Tensor:
        vector = torch.empty(num_experts, size, device=device, dtype=dtype)
        return vector.normal_(std=0.1, generator=generator)

    rows_in = 2 * d_ff if gated else d_ff
    return ExpertWeights(
        w_in=drawn(rows_in, d_model),
        w_out=drawn(d_model, d_ff),
        b_in=drawn_bias(rows_in) if bias else None,
        b_out=drawn_bias(d_model) if bias else None,
        activation=activation,
        gated=gated,
    )
