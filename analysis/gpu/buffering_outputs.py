"""Compares outputs of experts that ran partly on the host with those that all ran on the device.

The two round differently, so bits cannot be asked for. Every dispatch is given the input that it
was given without a buffer (`moeprof.live.routed_runs.run_steps`, ``follow``): along a chain of 48
layers in bfloat16 differences of a few thousandths grow to several hundredths, where a wrong result
could hide. Leaves out running (`buffering_bench`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from moeprof.live.buffer_settings import BufferedSite
from moeprof.live.expert_store import ExpertStore
from moeprof.live.experts import ExpertWeights
from moeprof.live.routed_runs import ExpertGeometry, RoutedStep

_SINGLE = torch.finfo(torch.float32).eps / 2


def roundings(geometry: ExpertGeometry) -> int:
    """Returns how often a number is rounded to the dtype of the experts on its way through one.

    A matrix product rounds its result, and once more where parts of a sum are added in that dtype,
    as cuBLAS may; biases round again; a gated expert multiplies two products. ReLU rounds nothing.
    Last, the combination.
    """
    product = 2 + geometry.bias
    activation = 2 if geometry.gated else 0
    return product * (2 if geometry.gated else 1) + activation + product + 1


def tolerance(geometry: ExpertGeometry) -> float:
    """Returns the largest relative difference of a row that rounding explains.

    Each rounding moves a number by at most the unit roundoff of its dtype; those of both sides are
    taken as independent. Added to it is the bound for sums in single precision, of as many terms as
    the longer of the two products has.
    """
    unit = torch.finfo(geometry.dtype).eps / 2
    longest = max(geometry.d_model, geometry.d_ff)
    return math.sqrt(2 * roundings(geometry)) * unit + longest * _SINGLE


def row_errors(found: torch.Tensor, expected: torch.Tensor) -> np.ndarray:
    """Returns |found - expected| / |expected| of every row, in Euclidean norms.

    Where a row should be zero: 0 if it is, else infinity.
    """
    difference = (found.double() - expected.double()).norm(dim=-1)
    scale = expected.double().norm(dim=-1)
    ratio = torch.where(difference == 0, 0.0, difference / scale)
    errors: np.ndarray = ratio.cpu().numpy()
    return errors


def compared(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], geometry: ExpertGeometry
) -> dict[str, Any]:
    """Returns the errors of all dispatches and whether every row is within the tolerance."""
    limit = tolerance(geometry)
    worst_rows = [
        float(row_errors(one, other).max(initial=0.0))
        for one, other in zip(found, expected, strict=True)
    ]
    dispatches = [
        float(row_errors(one.reshape(1, -1), other.reshape(1, -1))[0])
        for one, other in zip(found, expected, strict=True)
    ]
    return {
        "tolerance": limit,
        "roundings": roundings(geometry),
        "dispatches": len(dispatches),
        "worst_row": max(worst_rows),
        "worst_dispatch": max(dispatches),
        "median_dispatch": float(np.median(dispatches)),
        "holds": max(worst_rows) <= limit,
    }


def noticed(
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    steps: Sequence[RoutedStep],
    sites: Sequence[BufferedSite],
    lookups: pd.DataFrame,
    geometry: ExpertGeometry,
) -> dict[str, Any]:
    """Says how often the comparison fails where the host computed wrong experts.

    Args:
        found: Outputs of a run on `wrong_on_host` sites.
        expected: As they should be.
        steps: What was run.
        sites: The sites.
        lookups: Of that run: which experts ran on the host.
        geometry: Of the experts.

    Returns:
        Counts of dispatches, and of tokens, that had an expert on the host, and of those above the
        tolerance; what the comparison says of the whole run. Tokens whose expert on the host
        weighs next to nothing cannot be noticed.
    """
    limit = tolerance(geometry)
    ids_of = {
        site.site: np.arange(site.store.num_experts)
        if site.expert_ids is None
        else np.asarray(site.expert_ids)
        for site in sites
    }
    on_host = lookups[lookups["on_host"]]
    experts = {key: rows.to_numpy() for key, rows in on_host.groupby(["step", "site"])["expert"]}
    counts = {"dispatches": 0, "dispatches_noticed": 0, "tokens": 0, "tokens_noticed": 0}
    outputs = iter(zip(found, expected, strict=True))
    for step in steps:
        for each in step.passes:
            errors = row_errors(*next(outputs))
            own = experts.get((step.step, each.site))
            if own is None:
                continue
            local = np.searchsorted(ids_of[each.site], own)
            touched = np.isin(each.ids.cpu().numpy(), local).any(axis=1)
            wrong = errors[touched] > limit
            counts["dispatches"] += 1
            counts["dispatches_noticed"] += bool(wrong.any())
            counts["tokens"] += int(touched.sum())
            counts["tokens_noticed"] += int(wrong.sum())
    return {**counts, "comparison_holds": compared(found, expected, geometry)["holds"]}


class _ShiftedOnHost(ExpertStore):
    """Hands the host the next expert's weights; what is copied to the device stays right."""

    def weights(self, expert: int) -> ExpertWeights:
        return super().weights((expert + 1) % self.num_experts)


def wrong_layers(sites: Sequence[BufferedSite]) -> list[BufferedSite] | None:
    """Returns the sites, each with the experts of the next; None where no other has as many."""
    stores = [site.store for site in sites]
    counts = {store.num_experts for store in stores}
    if len(stores) == 1 or len(counts) > 1:
        return None
    return [
        dataclasses.replace(site, store=store)
        for site, store in zip(sites, [*stores[1:], stores[0]], strict=True)
    ]


def wrong_on_host(sites: Sequence[BufferedSite]) -> list[BufferedSite]:
    """Returns the sites with experts exchanged where the host computes; memory is shared."""
    return [
        BufferedSite(
            site=site.site,
            stack=site.stack,
            layer=site.layer,
            store=_ShiftedOnHost(
                num_experts=site.store.num_experts,
                shape=site.store.shape,
                memory=site.store.memory,
                # Who locked the memory unlocks it.
                is_locked=False,
            ),
            expert_ids=site.expert_ids,
            run=site.run,
        )
        for site in sites
    ]
