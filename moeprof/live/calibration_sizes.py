"""How large the things are that a calibration measures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moeprof.errors import UsageError
from moeprof.replay.expert_shapes import ExpertShape

_WIDTH_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How trials are run.

    Attributes:
        batch: Requests at a time.
        num_layers: Layers.
        num_steps: Steps.
    """

    batch: int
    num_layers: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class CalibrationSizes:
    """How large the things are that are measured.

    Attributes:
        expert_bytes: Sizes of experts, ascending.
        d_model: Width of a row, where ``widths`` does not say.
        widths: (size of an expert, width of a row) of sizes whose rows are wider or narrower: small
            experts on the device take as long as their rows are wide, whatever their bytes.
        gated: Experts of three matrices, not two.
        dtype: Of weights and rows.
        num_experts: Experts per layer of trials.
        top_k: Slots per token of trials.
        regimes: What trials run.
        rows: Rows of an expert on the device.
        host_rows: Rows of an expert on the host.
        slots: (token, slot) rows of a dispatch.
        tokens: Tokens of a dispatch, for gating kernels.
        pieces: Experts of a piece.
        cold_bytes: Experts that take turns take so much at least, so that no cache of the device
            holds them.
        repeats: Repetitions of each part.
        trial_repetitions: Repetitions of each trial, in two turns: two where that would take
            seconds, more where they are quick.
    """

    expert_bytes: tuple[int, ...]
    d_model: int
    widths: tuple[tuple[int, int], ...] = ()
    gated: bool = True
    dtype: str
    num_experts: int
    top_k: int
    regimes: tuple[Regime, ...]
    rows: tuple[int, ...]
    host_rows: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[int, ...]
    cold_bytes: int
    repeats: int
    trial_repetitions: int

    def __post_init__(self) -> None:
        """Refuses what cannot be measured."""
        for name in ("expert_bytes", "rows", "host_rows", "slots", "tokens", "pieces"):
            values = getattr(self, name)
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise UsageError(f"{name} has to ascend from 1 or more, not {values}")

    def shape(self, expert_bytes: int) -> ExpertShape:
        """Returns the shape of experts of about that size, of widths as models have them."""
        width = dict(self.widths).get(expert_bytes, self.d_model)
        base = ExpertShape(d_model=width, d_ff=1, gated=self.gated, dtype=self.dtype)
        near = base.with_bytes(expert_bytes)
        d_ff = max(1, round(near.d_ff / _WIDTH_MULTIPLE)) * _WIDTH_MULTIPLE
        return dataclasses.replace(near, d_ff=d_ff)


GPU_SIZES = CalibrationSizes(
    expert_bytes=(9 << 20, 32 << 20, 64 << 20),
    d_model=2048,
    dtype="bfloat16",
    num_experts=64,
    top_k=6,
    # With more requests at a time more is copied in a step: fewer layers, for about the same time.
    regimes=(
        Regime(batch=1, num_layers=4, num_steps=12),
        Regime(batch=8, num_layers=2, num_steps=8),
    ),
    rows=(1, 2, 4, 8, 16, 64, 256, 1024),
    host_rows=(1, 2, 4, 16),
    slots=(8, 64, 512, 4096),
    tokens=(1, 8, 32, 128, 512),
    pieces=(1, 2, 4, 8, 16, 32, 64),
    cold_bytes=256 << 20,
    repeats=20,
    trial_repetitions=4,
)
CPU_SIZES = CalibrationSizes(
    expert_bytes=(64 << 10, 512 << 10),
    d_model=128,
    dtype="float32",
    num_experts=16,
    top_k=2,
    regimes=(
        Regime(batch=1, num_layers=4, num_steps=12),
        Regime(batch=8, num_layers=2, num_steps=8),
    ),
    rows=(1, 4, 16, 64),
    host_rows=(1, 4, 16),
    slots=(8, 64, 256),
    tokens=(1, 8, 32),
    pieces=(1, 4, 16),
    cold_bytes=4 << 20,
    repeats=10,
    trial_repetitions=4,
)
