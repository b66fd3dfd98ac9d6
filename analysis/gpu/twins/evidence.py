"""Says whether a twin's routing means something: use, idleness, dependence on text, locality.

Everything comes from the recorded trace; figures beside uniform routing and shuffled order are
those of `moeprof.replay`. Leaves out training (`learning`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moeprof.trace.reader import Trace
from moeprof.trace.validator import check

if TYPE_CHECKING:
    from moeprof.replay import Metric

_RARE = 0.1


def loads(trace: Trace) -> dict[tuple[str, str, int], np.ndarray]:
    """Returns [num_experts] tokens per expert by (stack, phase of the step, site)."""
    sizes = {site.site: site.num_experts for site in trace.sites}
    found: dict[tuple[str, str, int], np.ndarray] = {}
    for dispatch in trace.dispatches():
        key = (dispatch.stack, dispatch.phase, dispatch.site)
        chosen = dispatch.experts[dispatch.experts >= 0]
        counts = np.bincount(chosen.ravel(), minlength=sizes[dispatch.site])
        found[key] = found.get(key, 0) + counts
    return found


def use(trace: Trace) -> list[dict[str, Any]]:
    """Returns one row per stack and phase: how evenly experts are used over the whole trace."""
    grouped: dict[tuple[str, str], list[np.ndarray]] = {}
    for (stack, phase, _), counts in loads(trace).items():
        grouped.setdefault((stack, phase), []).append(counts)
    rows = []
    for (stack, phase), sites in grouped.items():
        shares = np.stack(sites) / np.stack(sites).sum(axis=1, keepdims=True)
        even = 1 / shares.shape[1]
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        entropy = -(shares * logs).sum(axis=1) / math.log(shares.shape[1])
        rows.append(
            {
                "stack": stack,
                "phase": phase,
                "num_sites": shares.shape[0],
                "num_experts": shares.shape[1],
                "num_decisions": int(np.stack(sites).sum()),
                "share_below_tenth_of_uniform": float((shares < _RARE * even).mean()),
                "share_never_used": float((shares == 0).mean()),
                "entropy_of_load": float(entropy.mean()),
                "lowest_entropy_of_load": float(entropy.min()),
                "largest_over_uniform": float((shares.max(axis=1) / even).mean()),
            }
        )
    return rows


def idleness(trace: Trace) -> list[dict[str, Any]]:
    """Returns one row per stack, phase and size of dispatch: experts without a token.

    Sizes are those of the largest dispatch alone, then halves of it: as sequences end, fewer tokens
    leave more experts idle, and a mean over all sizes would hide what a full batch does. Beside
    each stands what routing every token evenly would leave idle, (1 - k / E) ** tokens.
    """
    grouped: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    sites = {site.site: site for site in trace.sites}
    for dispatch in trace.dispatches():
        site = sites[dispatch.site]
        chosen = dispatch.experts[dispatch.experts >= 0]
        num_tokens = dispatch.experts.shape[0]
        idle = 1 - np.unique(chosen).size / site.num_experts
        even = (1 - site.top_k / site.num_experts) ** num_tokens
        grouped.setdefault((dispatch.stack, dispatch.phase), []).append((num_tokens, idle, even))
    rows = []
    for (stack, phase), found in grouped.items():
        sizes, idle_shares, even_shares = np.array(found).T
        most = sizes.max()
        # 0: as large as any; 1: more than half of that; 2: more than a quarter; ...
        levels = np.where(sizes == most, 0, 1 + np.floor(np.log2(most / sizes)).astype(int))
        for level in np.unique(levels):
            own = levels == level
            rows.append(
                {
                    "stack": stack,
                    "phase": phase,
                    "least_tokens": int(sizes[own].min()),
                    "most_tokens": int(sizes[own].max()),
                    "num_dispatches": int(own.sum()),
                    "inactive_share": float(idle_shares[own].mean()),
                    "uniform_inactive_share": float(even_shares[own].mean()),
                }
            )
    return rows


def routing_evidence(trace: Trace) -> dict[str, Any]:
    """Returns what the trace says of its routing, ready for JSON."""
    # Here, so that a machine that only trains and records needs less.
    from moeprof.replay import activation, locality

    result = check(trace)
    metrics = [*activation(trace).metrics, *locality(trace).metrics]
    return {
        "check": {
            "ok": result.ok,
            "problems": [f"{p.severity} {p.code}: {p.message}" for p in result.problems],
        },
        "capture": {
            "num_requests": len(trace.requests),
            "num_steps": len(trace.steps),
            "num_tokens": int(trace.steps["num_tokens"].sum()),
            "size_bytes": trace.num_bytes,
        },
        "use": use(trace),
        "idleness": idleness(trace),
        "metrics": {metric.name: _plain(metric) for metric in metrics},
    }


def _plain(metric: Metric) -> dict[str, Any]:
    values = {"value": metric.value, "low": metric.low, "high": metric.high}
    finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    return {"value": None, **finite, "unit": metric.unit, "note": metric.note}
