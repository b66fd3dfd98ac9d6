"""Replays traces against static and dynamic gating, beside the founding paper's numbers.

    python -m analysis.gating [TRACE...] [-o OUT]

TRACE is any trace; without one the sample traces are taken. Writes a page (OUT/gating.html, .md
and .json) and every row of the replay (OUT/NAME.csv, OUT/NAME-sweep.csv). The page holds the
paper's Fig. 8 (what a capacity wastes and drops) on each trace, and a table of what the paper
(arXiv 2303.06182) and an independent profile of fairseq's 15B model publish on gating and memory,
each with what comes out here and why it differs where it does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import command
from moeprof.replay import gating
from moeprof.replay.capacity import (
    PAPER_FRACTIONS,
    PAPER_LM,
    PAPER_LM_SMALL,
    PAPER_MT,
    MoeShape,
    elementwise_blocks,
    static_dispatches,
)
from moeprof.reporting.gating_sections import gating_section
from moeprof.reporting.layout import TableData
from moeprof.reporting.replays import SWEEP, own_fraction
from moeprof.reporting.studies import Study, published_table, save_studies

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Published:
    """A published number and what comes out here.

    Attributes:
        quantity: What it is.
        published: As printed.
        found: What the code here gives; None where it gives nothing.
        unit: Of both.
        verdict: What is reproduced, what differs, and why.
    """

    quantity: str
    published: str
    found: float | None
    unit: str
    verdict: str


def published() -> list[Published]:
    """Returns the published numbers on gating and memory beside what comes out here."""
    lm = static_dispatches(PAPER_LM.moe, num_tokens=[2048], value=PAPER_FRACTIONS["lm"])
    large = static_dispatches(PAPER_LM.moe, num_tokens=[4096], value=PAPER_FRACTIONS["lm"])
    mt = static_dispatches(PAPER_MT.moe, num_tokens=[2048], value=PAPER_FRACTIONS["mt"])
    small = static_dispatches(
        PAPER_LM_SMALL.moe, num_tokens=[2048] * 4, value=PAPER_FRACTIONS["lm"]
    )
    calls, products = PAPER_LM_SMALL.batched_products(small, sequence_length=2048)
    payload, needed = small.dispatched_bytes, small.needed_bytes
    assert payload is not None and needed is not None
    whole = PAPER_MT.device_bytes(devices=8)
    one, ten = (PAPER_MT.device_bytes(devices=8, cache_slots=slots) for slots in (1, 10))
    toy = static_dispatches(MoeShape(num_experts=3, top_k=1), num_tokens=[6], value=0.5)
    exact = "reproduced from shapes"
    per_token = "rows per row"
    rows = [
        ("Fig. 8, its example: slots per expert (3 experts, 6 tokens, capacity 0.5)", "3",
         float(toy.slots[0, 0]), "slots", exact),
        ("The same: rows sent for each row needed, top-1", "not printed", toy.waste_factor,
         per_token, "drawn in the paper as empty slots; the figures here show them on each trace"),
        ("Waste factor, LM", "12.8", lm.waste_factor_without_ceiling, per_token, exact),
        ("Waste factor, LM, 2,048 tokens, slots rounded up", "not printed", lm.waste_factor,
         per_token, exact),
        ("Waste factor, MT", "64", mt.waste_factor, per_token, exact),
        ("Parameters, LM", "52 B", PAPER_LM.num_params / 1e9, "B", f"{exact}: 51.83 B"),
        ("Parameters, MT", "54.5 B", PAPER_MT.num_params / 1e9, "B", exact),
        ("Static memory per GPU, LM, 8 GPUs", "12.59 GB", PAPER_LM.device_bytes(devices=8) / _GIB,
         "GiB", "reproduced to 1 %: printed total less printed activations; GB there means GiB"),
        ("Static memory per GPU, MT, 8 GPUs", "not printed", whole / _GIB, "GiB",
         "the base of the printed 32.2 % and 1.47; printed total less activations is 19.27"),
        ("Freed by a cache of 10 of 16 experts", "2.25 GB", (whole - ten) / _GIB, "GiB", exact),
        ("Freed by a cache of 1 of 16 experts", "32.2 %", 100 * (whole - one) / whole, "%", exact),
        ("Memory ratio at cache size 1", "1.47", whole / one, "times",
         f"{exact}; the headline is this smallest cache"),
        ("Memory ratio at cache size 10", "not printed", whole / ten, "times",
         "the configuration whose throughput is printed saves this much"),
        ("Dynamic memory, LM, batch 8, static gating", "6.29 GB",
         float(large.mask_bytes[0, 0]) / _GIB, "GiB",
         "differs by 5 %: masks of one layer at 4,096 tokens; the sequence length is not printed"),
        ("Profile of fairseq 15B: thread blocks of the mask", "421,888",
         float(elementwise_blocks(int(small.mask_elements[0, 0]))), "blocks", exact),
        ("The same: one mask in single precision", "not printed",
         float(small.combine_bytes[0, 0]) / _MIB, "MiB", exact),
        ("The same: batched products of 5 passes, allocated", "29.94 GiB", 5 * products / _GIB,
         "GiB", f"{exact}, attention included: {5 * calls} calls"),
        ("The same: rows per expert", "412", float(small.rows_per_expert[0]), "rows", exact),
        ("The same: expert calls", "15,360",
         float(5 * 4 * PAPER_LM_SMALL.num_moe_layers * small.local_experts), "calls", exact),
        ("The same: all-to-all payload", "not printed", float(payload[0, 0]) / _MIB, "MiB",
         "what each device sends both ways per layer"),
        ("The same: payload needed", "not printed", float(needed[0, 0]) / _MIB, "MiB",
         "the rows that tokens need"),
        ("Throughput, dynamic over static", "6.21, 5.75, 2.58 times", None, "",
         "not replayed: a trace holds no time of gating that was not run; it takes a live run"),
    ]  # fmt: skip
    return [Published(*row) for row in rows]


def published_numbers() -> TableData:
    """Returns `published` as a table of the page."""
    return published_table(
        "The founding paper's numbers on gating and memory",
        [
            (
                row.quantity,
                row.published,
                "" if row.found is None else f"{_number(row.found)} {row.unit}",
                row.verdict,
            )
            for row in published()
        ],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.5g}"


def studied(path: str) -> Study:
    """Returns gating of a trace at the paper's capacity for the task, and over all capacities."""
    trace = command.opened(path, "gating")
    result = gating(trace, values=[own_fraction(trace)])
    sweep = gating(trace, values=SWEEP)
    return Study(
        trace=trace,
        result=result,
        section=gating_section(trace, result, sweep=sweep),
        frames={"": result.table, "sweep": sweep.table},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and returns the exit code."""
    options = command.parser("gating", __doc__).parse_args(arguments)

    def write() -> tuple[Path, ...]:
        studies = [studied(path) for path in options.traces]
        return save_studies(
            studies, published_numbers(), options.output, name="gating", subject="Gating"
        )

    return command.run(write)


if __name__ == "__main__":
    sys.exit(main())
