"""The shape of one expert: how many bytes a copy of it moves and what a row of it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moeprof.errors import UsageError

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

BLOCK_ALIGNMENT_BYTES = 256
"""Within the copy of an expert every tensor starts at a multiple of this."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

_GATED_MATRICES = 3


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Shape of an expert as it is run.

    Attributes:
        d_model: Width of a row.
        d_ff: Hidden width.
        gated: Three matrices, not two.
        bias: With biases.
        dtype: A key of `ITEM_BYTES`.
    """

    d_model: int
    d_ff: int
    gated: bool = True
    bias: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be run."""
        if self.dtype not in ITEM_BYTES:
            raise UsageError(
                f"there is no dtype {self.dtype!r}", hint=f"one of {', '.join(ITEM_BYTES)}"
            )
        if min(self.d_model, self.d_ff) < 1:
            raise UsageError(f"an expert of {self.d_model} x {self.d_ff} holds nothing")

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return ITEM_BYTES[self.dtype]

    @property
    def tensor_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        rows = 2 * self.d_ff if self.gated else self.d_ff
        sizes = [rows * self.d_model, self.d_model * self.d_ff]
        if self.bias:
            sizes += [rows, self.d_model]
        return tuple(size * self.item_bytes for size in sizes)

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert's tensors."""
        return sum(self.tensor_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes that a copy of an expert moves: its tensors, each rounded up."""
        return sum(
            -(-size // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES for size in self.tensor_bytes
        )

    @property
    def flops_per_row(self) -> int:
        """Floating-point operations of the matrix products for one row."""
        return 2 * self.d_model * self.d_ff * (_GATED_MATRICES if self.gated else 2)

    def with_bytes(self, expert_bytes: int) -> ExpertShape:
        """Returns the shape of this width whose experts are nearest to so many bytes."""
        matrices = _GATED_MATRICES if self.gated else 2
        width = round(expert_bytes / (matrices * self.d_model * self.item_bytes))
        return replace(self, d_ff=max(1, width))


def parse_shape(text: str, *, dtype: str = "bfloat16") -> ExpertShape:
    """Returns a shape from text.

    Args:
        text: ``D_MODELxD_FF``, then ``:ungated`` for two matrices, ``:bias`` for biases, as in
            ``2048x8192:ungated:bias``.
        dtype: Of the experts.

    Raises:
        UsageError: It is no shape.
    """
    size, *flags = text.lower().split(":")
    sides = size.split("x")
    is_size = len(sides) == 2 and all(side.isdecimal() for side in sides)  # noqa: PLR2004
    if not is_size or not {"ungated", "bias"}.issuperset(flags):
        raise UsageError(f"{text!r} is no shape", hint="D_MODELxD_FF, as in 2048x768")
    return ExpertShape(
        d_model=int(sides[0]),
        d_ff=int(sides[1]),
        gated="ungated" not in flags,
        bias="bias" in flags,
        dtype=dtype,
    )


def shape_of_trace(trace: Trace, stack: str, *, dtype: str | None = None) -> ExpertShape:
    """Returns the shape of a stack's experts as the trace has it.

    Args:
        trace: The trace.
        stack: Its stack.
        dtype: As run; that of the recorded model when None.

    Raises:
        UsageError: The trace does not say, or its sites differ.
    """
    sites = trace.info.sites_of(stack)
    if not sites:
        raise UsageError(f"there is no stack {stack!r}", hint=f"one of {', '.join(trace.stacks)}")
    shapes = {(site.d_model, site.d_ff, site.matrices_per_expert) for site in sites}
    if len(shapes) > 1:
        raise UsageError(f"the experts of the stack {stack} differ in shape")
    d_model, d_ff, matrices = shapes.pop()
    if d_model is None or d_ff is None:
        raise UsageError(
            "the trace does not say how wide its experts are", hint="say it: D_MODELxD_FF"
        )
    own = trace.model.dtype.removeprefix("torch.")
    name = dtype or (own if own in ITEM_BYTES else "bfloat16")
    shape = ExpertShape(d_model=d_model, d_ff=d_ff, gated=matrices != 2, dtype=name)  # noqa: PLR2004
    with_bias = replace(shape, bias=True)
    return with_bias if sites[0].expert_bytes == with_bias.expert_bytes else shape
