"""What uniform routing would show on the same number of tokens: the yardstick beside usage numbers.

A finite sample of uniform routing is not perfectly even, so "less than even" has to be read against
these expectations. Exact where tokens route independently: an expert's count is then binomial.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_EXACT_UP_TO = 2_000_000
_SPREADS = 12.0


def idle_share(share_per_token: float, num_tokens: Floats) -> Floats:
    """Returns the chance that an expert gets none of ``num_tokens`` tokens.

    Args:
        share_per_token: Chance of one token picking it: k/E.
        num_tokens: Any shape.
    """
    return np.asarray((1 - share_per_token) ** num_tokens, dtype=np.float64)


def normalized_entropy(num_experts: int, picked: float, num_tokens: int) -> float:
    """Returns the expected entropy of usage, 1 being perfectly even.

    Args:
        num_experts: Experts of the site.
        picked: Experts per token.
        num_tokens: Tokens that routed.
    """
    if num_experts == 1 or num_tokens == 0:
        return math.nan
    counts, chance = _binomial(num_tokens, picked / num_experts)
    share = counts / (num_tokens * picked)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0)
    return float(-num_experts * (chance * terms).sum() / math.log(num_experts))


def max_over_mean(num_experts: int, picked: float, num_tokens: int) -> float:
    """Returns the expected load of the fullest expert over the mean load.

    Experts' counts are taken as independent, which is right to within a percent or so.
    """
    if num_tokens == 0:
        return math.nan
    counts, chance = _binomial(num_tokens, picked / num_experts)
    below = np.cumsum(chance)
    largest = float(counts[0] + np.sum(1 - np.minimum(below, 1) ** num_experts))
    return largest / (num_tokens * picked / num_experts)


def _binomial(num_trials: int, chance: float) -> tuple[Floats, Floats]:
    """Returns counts around the mean, consecutive, with their chances (normal for huge samples)."""
    mean = num_trials * chance
    spread = math.sqrt(max(mean * (1 - chance), 1.0))
    low = max(math.floor(mean - _SPREADS * spread), 0)
    high = min(math.ceil(mean + _SPREADS * spread) + 1, num_trials)
    counts = np.arange(low, high + 1, dtype=np.float64)
    if chance >= 1:
        return np.array([float(num_trials)]), np.array([1.0])
    if num_trials > _EXACT_UP_TO:
        weights = np.exp(-((counts - mean) ** 2) / (2 * spread**2))
    else:
        # log C(n, x) by steps from the lowest count; the common factor is normalized away.
        steps = np.log((num_trials - counts[:-1]) / (counts[:-1] + 1))
        log_weights = np.r_[0, np.cumsum(steps)] + counts * math.log(chance / (1 - chance))
        weights = np.exp(log_weights - log_weights.max())
    return counts, weights / weights.sum()
