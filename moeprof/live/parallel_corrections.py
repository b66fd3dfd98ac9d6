"""Estimates of steps, corrected by how far the same arithmetic was off where it was measured.

Knows no torch: the page of results corrects with it what a file holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moeprof.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class CorrectedStep:
    """An estimate with its error bar, which it lies in.

    The bar is the range of what was seen, not an interval of some coverage: it says nothing of how
    much further off the arithmetic is on devices that nobody measured.

    Attributes:
        step_ms: The uncorrected time times the median ratio.
        low_ms: Times the least ratio.
        high_ms: Times the greatest.
        num_ratios: Steps that were both measured and estimated.
    """

    step_ms: float
    low_ms: float
    high_ms: float
    num_ratios: int


def corrected_step(uncorrected_ms: float, ratios: Sequence[float]) -> CorrectedStep:
    """Returns an estimate times the median of ``ratios``, and their range as its error bar.

    Args:
        uncorrected_ms: As the arithmetic has it.
        ratios: Measured over estimated, of steps that were both.

    Raises:
        UsageError: There are no ratios.
    """
    if not ratios:
        raise UsageError(
            "an estimate cannot be corrected by no measurement",
            hint="measure a step of the same routing on the devices there are",
        )
    return CorrectedStep(
        step_ms=uncorrected_ms * statistics.median(ratios),
        low_ms=uncorrected_ms * min(ratios),
        high_ms=uncorrected_ms * max(ratios),
        num_ratios=len(ratios),
    )
