"""How far the link's counters are from the copies of a run, and how well that is known.

Counters see commands, ids and rows beside the copies. What a run without copies receives is taken
off; it differs from run to run, which is nothing beside many bytes and much beside few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

LINK_TOLERANCE = 0.02
NET_OF_CONTROL = "net of runs of the same setting without copies"
NOT_NET = "all that was received: no run without copies was counted"
_NORMAL_95 = NormalDist().inv_cdf(0.95)


def half_width(values: Sequence[float]) -> float:
    """Returns half of the 90% interval of a median, were its values normal; NaN of fewer than 2."""
    if len(values) < 2:
        return math.nan
    # The median of many normal values varies by sqrt(pi / 2) times what their mean does.
    return _NORMAL_95 * float(np.std(values, ddof=1)) * math.sqrt(math.pi / 2 / len(values))


def link_judged(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns how far the link's counters are from the copies, the middle of the repetitions.

    Args:
        row: With ``link_errors`` and, where runs without copies were counted, ``link_errors_net``.

    Returns:
        ``error``, without sign, ``half_width`` of its 90% interval (None: a single repetition) and
        ``by``: what was taken off; None where nothing was counted.
    """
    for name, by in (("link_errors_net", NET_OF_CONTROL), ("link_errors", NOT_NET)):
        if errors := row.get(name):
            width = half_width(errors)
            return {
                "error": abs(float(np.median(errors))),
                "half_width": None if math.isnan(width) else width,
                "by": by,
            }
    return None


def is_link_within(row: Mapping[str, Any]) -> bool | None:
    """Returns True where the link's counters agree with the copies.

    None where there are none, and where they are known less well than they are to agree.
    """
    judged = link_judged(row)
    if judged is None or (judged["half_width"] or 0.0) > LINK_TOLERANCE:
        return None
    return bool(judged["error"] <= LINK_TOLERANCE)
