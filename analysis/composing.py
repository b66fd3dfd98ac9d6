"""How well does a recording answer for another batch size?

    python -m analysis.composing [--model MODEL] [--dtype DTYPE] [--score] [--limit N] [-o OUT]

Records a model at batch 1 and at batch 8 with the same prompts, re-batches the first recording
with `moeprof.replay.compose(schedule="static", max_batch=8)` and compares it with the second,
dispatch by dispatch. In single precision they should be equal; in half precision the share of
decisions that flipped is the error of composing. ``--score`` reads the prompts instead of
generating, so that no flip can change the text. Writes OUT/composing-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeprof.errors import MoeprofError
from moeprof.replay import agreement, compose
from moeprof.trace.reader import Trace, open_trace

DEFAULT_OUTPUT = Path("demo", "composing")
BATCH = 8


def recorded(folder: Path, batch_size: int, options: argparse.Namespace) -> Trace:
    """Returns a fresh recording."""
    from moeprof.recording.session import RecordOptions, record_model

    path = folder / f"batch-{batch_size}.moeprof"
    record_model(
        RecordOptions(
            model=options.model,
            output=str(path),
            batch_size=batch_size,
            limit=options.limit,
            dtype=options.dtype,
            score=options.score,
            scores=True,
            profile=False,
        )
    )
    return open_trace(path)


def comparison(alone: Trace, together: Trace, *, batch_size: int = BATCH) -> dict[str, Any]:
    """Returns how a re-batched recording differs from a fresh one.

    Args:
        alone: Recorded at batch 1.
        together: Recorded at ``batch_size``.
        batch_size: Of the second recording.
    """
    composed = compose(alone, "static", max_batch=batch_size)
    result = agreement(composed, together)
    flips = result.tables["flips"]
    columns = ["step", "stack", "phase", "batch", "num_tokens", "num_padded_tokens"]
    rate = result.metric("agreement/flip_rate")
    return {
        "model": together.info.model.name,
        "dtype": together.info.model.dtype,
        "mode": together.info.mode,
        "num_requests": len(together.requests),
        "same_steps": bool(composed.steps[columns].equals(together.steps[columns])),
        "num_dispatches": int(result.table["num_dispatches"].sum()),
        "num_differing_dispatches": int(result.table["num_differing_dispatches"].sum()),
        "num_decisions": int(result.table["num_decisions"].sum()),
        "num_flipped": int(result.table["num_flipped"].sum()),
        "flip_rate": rate.value,
        "flip_rate_low": rate.low,
        "flip_rate_high": rate.high,
        "num_first_flips": int(flips["root"].sum()),
        "num_first_flips_tied": int((flips["root"] & flips["tied"]).sum()),
        "finding": result.findings[0].text,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Records, compares, writes, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.composing",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("--model", default="zoo:lm")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="OUT")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            traces = [recorded(Path(folder), size, options) for size in (1, BATCH)]
            found = comparison(*traces)
    except MoeprofError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.model.replace(":", "-").replace("/", "-")
    mode = "-score" if options.score else ""
    path = options.output / f"composing-{name}-{options.dtype}{mode}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(found["finding"])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
