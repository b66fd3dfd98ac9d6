"""How figures of what was measured on a GPU look, and how they are saved.

Colours are told apart by readers who are colour blind; text is never read as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from moeprof.errors import MoeprofError

DPI = 130
INK, SOFT, GRID = "#1d2129", "#565d69", "#e4e1da"
COLOURS = ("#1f4fc4", "#c9622a", "#0f8a6d", "#9a4fb0", "#a8842c", "#6b7280")
"""For kinds of things without colours of their own."""
STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "text.color": INK,
        "text.parse_math": False,
        "hatch.linewidth": 0.5,
        "hatch.color": "white",
        "figure.facecolor": "white",
    }
)
_NUM_COLOURS = 96


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG and lets go of it.

    Raises:
        MoeprofError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DPI)
        # A palette is enough for lines, and a third of the bytes.
        Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS).save(path, optimize=True)
    except OSError as error:
        raise MoeprofError(
            f"cannot write {path}: {error.strerror or error}", hint="choose another place with -o"
        ) from error
    finally:
        plt.close(figure)
