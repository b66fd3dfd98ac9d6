"""How large the things are that a calibration measures, as its file says it.

Leaves out which sizes suit which device (`moeprof.live.calibration_sizes`).
"""

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
