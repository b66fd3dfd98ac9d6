"""Figures that the founding paper prints (arXiv 2303.06182) and that measurements stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MT_GAINS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"mt-encoder": (5.75, 10.98), "mt-decoder": (2.58, 5.71)}
)
"""Throughput of dynamic over static gating: on one node (Fig. 9), and the most on several."""
MEMORY_RATIOS: Mapping[str, float] = MappingProxyType({"lm": 1.36, "mt": 1.1})
"""Total memory per GPU of static over dynamic gating, on 8 GPUs (section V)."""

MT_BUFFERED_SHARES = {1: 0.322, 10: 2.25 / 17.49}
"""Of the static memory of a device (17.49 GiB) what buffering the decoder's experts saves, by slots
per layer of 16: 32.2 % with one, 2.25 GB with ten (section 6)."""

MT_DEVICE_GIB = 17.49
"""Static memory of one of 8 devices, from the model's parameters."""
