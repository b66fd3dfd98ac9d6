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
