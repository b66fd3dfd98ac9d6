"""Heat maps as small PNG files: one pixel per cell, scaled up by the page.

The colour map is perceptually uniform and readable on light and dark ground. Colour grows with the
square root of the share, so that idle, fair and busy experts can all be told apart.
"""

from __future__ import annotations

import base64
import functools
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.replay import wording

NUM_COLOURS = 256

_ANCHORS = (
    (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141),
    (44, 114, 142), (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128),
    (63, 188, 115), (94, 201, 98), (132, 212, 75), (173, 220, 48), (216, 226, 25), (253, 231, 37),
)  # fmt: skip
"""Viridis (CC0), 17 of its colours."""
_TICK_SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TICK_GAP = 0.13
_PIXEL = 8
_BRIGHT = 0.995


@functools.cache
def palette() -> NDArray[np.uint8]:
    """Returns [256, 3] colours, dark to bright."""
    anchors = np.array(_ANCHORS, dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, NUM_COLOURS)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


def gradient() -> str:
    """Returns the colour map as a CSS gradient."""
    return f"linear-gradient(90deg,{','.join(f'rgb{anchor}' for anchor in _ANCHORS)})"


def shares_of(panel: dict[str, Any]) -> NDArray[np.float64]:
    """Returns [rows, experts] shares of tokens."""
    counts = np.array(panel["counts"], dtype=np.float64)
    tokens = np.array(panel["num_tokens"], dtype=np.float64)
    return counts / np.maximum(tokens, 1)[:, None]


def scale_of(panels: Sequence[dict[str, Any]]) -> float:
    """Returns the share that has the brightest colour: nearly the largest.

    A few cells of thin rows would otherwise take the whole scale for themselves.
    """
    cells = np.concatenate([shares_of(panel).ravel() for panel in panels])
    if not len(cells):
        return 1.0
    fair = max(panel["top_k"] / panel["num_experts"] for panel in panels)
    largest = float(cells.max())
    return min(largest, max(float(np.quantile(cells, _BRIGHT)), 2 * fair)) or 1.0


def data_uri(panel: dict[str, Any], scale: float) -> str:
    """Returns the panel as a PNG in a data URI."""
    level = np.sqrt(np.clip(shares_of(panel) / scale, 0, 1))
    pixels = np.round(level * (NUM_COLOURS - 1)).astype(np.uint8)
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Returns [rows, columns] palette indexes as a PNG file."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, _PIXEL, 3, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette().tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def legend_ticks(panels: Sequence[dict[str, Any]], scale: float) -> list[tuple[float, str]]:
    """Returns where ticks of the colour scale lie, 0 to 1, and what they say."""
    fair = {panel["top_k"] / panel["num_experts"] for panel in panels}
    largest = max(float(shares_of(panel).max(initial=0.0)) for panel in panels)
    more = " or more" if largest > scale else ""
    ticks = [(0.0, "0"), (1.0, f"{wording.percent(scale)}{more}")]
    if len(fair) == 1 and min(fair) <= scale:
        share = min(fair)
        ticks.append((float(np.sqrt(share / scale)), f"{wording.percent(share)} = uniform"))
    for share in _TICK_SHARES:
        at = float(np.sqrt(share / scale))
        if at < 1 and all(abs(at - other) > 2 * _TICK_GAP for other, _ in ticks):
            ticks.append((at, wording.percent(share)))
    return sorted(ticks)
