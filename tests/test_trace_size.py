"""Bytes per routing decision after compaction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moeprof.trace.synthetic import synthetic_trace

CASES = {
    "4 sites, 32 experts, top 2": {"num_sites": 4, "num_experts": 32, "top_k": 2},
    "16 sites, 64 experts, top 8": {"num_sites": 16, "num_experts": 64, "top_k": 8},
    "12 sites, 512 experts, top 10": {"num_sites": 12, "num_experts": 512, "top_k": 10},
}


def bytes_by_column(trace, table):
    totals = {}
    for part in trace.parts(table):
        metadata = pq.ParquetFile(Path(trace.path, part.path)).metadata
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                name = chunk.path_in_schema.partition(".")[0]
                totals[name] = totals.get(name, 0) + chunk.total_compressed_size
    return totals


@pytest.mark.parametrize("name", list(CASES))
def test_bytes_per_decision(tmp_path, name):
    """The bars of the format are 1.2 bytes for ids and keys and 2.6 with weights."""
    trace = synthetic_trace(
        tmp_path / "a.moeprof",
        num_requests=150,
        prompt_tokens=60,
        output_tokens=60,
        skew=0.7,
        persistence=0.3,
        executed=False,
        timed=False,
        **CASES[name],
    )
    totals = bytes_by_column(trace, "routing/decoder")
    decisions = len(trace.table("routing/decoder", columns=["row"])) * trace.info.num_slots(
        "decoder"
    )
    files = sum(part.num_bytes for part in trace.parts("routing/decoder"))
    with_weights = files / decisions
    ids = (files - totals["weight"]) / decisions
    print(f"{name}: {ids:.3f} bytes per decision for ids and keys, {with_weights:.3f} with weights")
    assert ids <= 1.2
    assert with_weights <= 2.6
    assert totals["status"] / decisions < 0.01
    keys = sum(totals[key] for key in totals if key not in ("expert", "weight", "status"))
    assert keys / decisions < 0.2
    entropy_bytes = np.log2(trace.sites[0].num_experts) / 8
    assert totals["expert"] / decisions < entropy_bytes + 0.1
