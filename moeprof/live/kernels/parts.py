"""Pieces that the Triton kernels share."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ACTIVATION_CODES = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


@triton.jit
def activated(value, ACTIVATION: tl.constexpr) -> Any:
    """Returns the activation of ``value``, in single precision; codes as `ACTIVATION_CODES`."""
    if ACTIVATION == 0:
        return tl.maximum(value, 0.0)
    elif ACTIVATION == 1:
        return value * tl.sigmoid(value)
    elif ACTIVATION == 2:
        return 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        # tanh(x) = 2 sigmoid(2 x) - 1
        return value * tl.sigmoid(2.0 * inner)


def next_power(value: int, least: int = 16) -> int:
    """Returns the least power of two that is no less than ``value`` and ``least``."""
    return max(least, 1 << (max(value, 1) - 1).bit_length())


def processors(device: torch.device) -> int:
    """Returns how many multiprocessors a device has; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
