"""Steps that took far longer than their like: warm-up of kernels, stalls of the host, neighbours.

A breakdown that sums over them describes the stall, not the step. Leaves out why they happened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeprof.replay.access import Floats

FACTOR = 3.0
"""A stalled step takes more than this many times the median, in all and per row."""


def stalled(total_ms: Floats, num_rows: Floats) -> NDArray[np.bool_]:
    """Returns which steps stalled; long prompts did not.

    Args:
        total_ms: [steps] of one stack and phase.
        num_rows: [steps] rows of the batch, padding counted.
    """
    per_row = total_ms / np.maximum(num_rows, 1)
    slow: NDArray[np.bool_] = (total_ms > FACTOR * np.median(total_ms)) & (
        per_row > FACTOR * np.median(per_row)
    )
    return slow
