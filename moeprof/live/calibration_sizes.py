"""Which sizes a calibration measures: those that suit a device, or those that are asked for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from moeprof.errors import UsageError
from moeprof.replay.cache.sizes import byte_count
from moeprof.replay.calibration_sizes import CalibrationSizes, Regime
from moeprof.replay.expert_shapes import parse_shape

__all__ = [
    "CPU_SIZES",
    "GPU_SIZES",
    "CalibrationSizes",
    "Regime",
    "asked_in",
    "asked_sizes",
]

_OPTION = "--expert-bytes"


def asked_sizes(
    texts: Sequence[str], *, dtype: str
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Returns sizes of experts, and the widths of the rows of those that are given as shapes.

    Args:
        texts: Bytes, or a shape where small: ``9MiB``, ``256x48``.
        dtype: Of weights and rows.

    Returns:
        ``expert_bytes`` and ``widths`` as `CalibrationSizes` has them, both ascending.

    Raises:
        UsageError: One is neither, cannot be measured, or is as large as another of other width.
    """
    sizes: set[int] = set()
    widths: dict[int, int] = {}
    for text in texts:
        if "x" not in text.lower():
            sizes.add(byte_count(text))
            continue
        shape = parse_shape(text, dtype=dtype)
        if shape.bias or not shape.gated:
            raise UsageError(
                "experts are measured gated and without bias", hint="D_MODELxD_FF, as in 256x48"
            )
        if widths.setdefault(shape.expert_bytes, shape.d_model) != shape.d_model:
            raise UsageError(
                f"experts of {shape.expert_bytes} bytes are asked for at two widths",
                hint="calibrate twice: a calibration knows one width for each size",
            )
        sizes.add(shape.expert_bytes)
    return tuple(sorted(sizes)), tuple(sorted(widths.items()))


def asked_in(command: str) -> list[str] | None:
    """Returns the sizes of experts that a ``moeprof calibrate`` asked for; None where it did not.

    Args:
        command: As a calibration's file has it.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == _OPTION:
            found = value or following
    return None if found is None else [part.strip() for part in found.split(",") if part.strip()]


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
