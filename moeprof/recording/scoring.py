"""Establishes by measurement how a router turns logits into the weights it applies.

Config fields are named differently in every family and are sometimes wrong, so the rule is found
by trying the known ones against captured logits, ids and weights. Where none reproduces the
weights the rule stays unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOLERANCE = 5e-3
MIN_WEIGHT = 1e-6
MIN_ROWS = 2
MIN_SPREAD = 1e-4
MAX_DIGITS = 5


@dataclass(frozen=True)
class ScoringRule:
    """How weights follow from logits.

    Attributes:
        scoring: ``softmax`` (over all experts), ``sigmoid`` or ``softmax_topk`` (over the
            selected logits only).
        renormalized: True when each token's weights sum to ``scaling_factor``.
        scaling_factor: Constant factor.
    """

    scoring: str
    renormalized: bool
    scaling_factor: float


def affinity(logits: np.ndarray, experts: np.ndarray, scoring: str) -> np.ndarray:
    """Returns [T, k] affinities of the selected experts before bias and renormalization.

    Args:
        logits: [T, E] router logits.
        experts: [T, k] selected ids, all valid.
        scoring: As in `ScoringRule`.
    """
    logits = logits.astype(np.float32)
    chosen = np.take_along_axis(logits, experts, axis=1)
    if scoring == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-chosen)), dtype=np.float32)
    pool = chosen if scoring == "softmax_topk" else logits
    top = pool.max(axis=1, keepdims=True)
    total = np.exp(pool - top).sum(axis=1, keepdims=True)
    return np.asarray(np.exp(chosen - top) / total, dtype=np.float32)


def infer_scoring(
    logits: np.ndarray, experts: np.ndarray, weights: np.ndarray, *, eps: float = 0.0
) -> ScoringRule | None:
    """Returns the rule that reproduces ``weights``, or None when no known one does.

    Args:
        logits: [T, E] router logits.
        experts: [T, k] selected ids.
        weights: [T, k] weights the model applied.
        eps: Relative spacing of the numbers the model computed them in.
    """
    usable = (experts >= 0).all(axis=1) & (weights > MIN_WEIGHT).all(axis=1)
    if usable.sum() < MIN_ROWS:
        return None
    logits, experts = logits[usable], experts[usable]
    weights = weights[usable].astype(np.float64)
    for scoring in ("softmax_topk", "softmax", "sigmoid"):
        scores = affinity(logits, experts, scoring).astype(np.float64)
        if scoring == "softmax_topk":
            # Equal to a renormalized softmax; only tell them apart when k is 1, where a
            # renormalized softmax is always 1 as well: name both "softmax, renormalized".
            scale = _constant(weights / scores, eps)
            if scale is not None:
                return ScoringRule("softmax", True, scale)
            continue
        scale = _constant(weights / scores, eps)
        if scale is not None:
            return ScoringRule(scoring, False, scale)
        shares = scores / scores.sum(axis=1, keepdims=True)
        scale = _constant(weights / shares, eps)
        if scale is not None:
            return ScoringRule(scoring, True, scale)
    return None


def _constant(ratio: np.ndarray, eps: float) -> float | None:
    middle = float(np.median(ratio))
    if not np.isfinite(middle) or middle <= 0:
        return None
    deviation = np.abs(ratio / middle - 1.0)
    tolerance = max(TOLERANCE, 2 * eps)
    if np.quantile(deviation, 0.98) > tolerance or deviation.max() > 10 * tolerance:
        return None
    # Weights in half precision are off by their rounding, and so is the constant.
    allowed = max(float(np.median(deviation)), eps / 2, MIN_SPREAD) * middle
    plain = (round(middle, digits) for digits in range(MAX_DIGITS))
    return next((value for value in plain if abs(value - middle) <= allowed), middle)
