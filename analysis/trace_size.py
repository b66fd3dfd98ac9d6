"""Prints the bytes a trace takes per routing decision: ids with all keys, with weights, everything.

python -m analysis.trace_size [TRACE...]
"""

from __future__ import annotations

import sys

import pyarrow.parquet as pq

import moeprof
from moeprof.trace.reader import Trace

VALUES = ("weight", "score", "selection_score")


def routing_bytes(trace: Trace) -> tuple[int, int, int]:
    """Returns (decisions, bytes of ids with keys, bytes of the whole routing) over all stacks."""
    decisions = with_keys = whole = 0
    for stack in trace.stacks:
        for part in trace.parts(f"routing/{stack}"):
            with trace.store.open_part(part.path) as file:
                metadata = pq.ParquetFile(file).metadata
            decisions += metadata.num_rows * trace.info.num_slots(stack)
            for group in range(metadata.num_row_groups):
                for index in range(metadata.num_columns):
                    column = metadata.row_group(group).column(index)
                    size = column.total_compressed_size
                    whole += size
                    with_keys += size * (column.path_in_schema.split(".")[0] not in VALUES)
    return decisions, with_keys, whole


def main() -> None:
    """Prints one line per trace."""
    for name in sys.argv[1:] or ("sample:lm", "sample:mt", "sample:paper"):
        trace = moeprof.open(name)
        decisions, with_keys, whole = routing_bytes(trace)
        print(
            f"{name}: {decisions:,} decisions; {with_keys / decisions:.2f} bytes each for ids with "
            f"keys, {whole / decisions:.2f} with weights, {trace.num_bytes / decisions:.2f} in all"
        )


if __name__ == "__main__":
    main()
