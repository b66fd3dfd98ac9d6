"""Does a placement beat EPLB on text that a trained model reads, and by how much?

    python -m analysis.balancing_gain [--model MODEL] [--passages N] [--devices N,N] [-o OUT]

Records a model reading the beginnings of the modules of Python's standard library and of the topics
of its reference (they come with the interpreter; nothing is downloaded), one a forward pass,
re-batches the recording with `moeprof.replay.compose` and asks `moeprof.replay.balancing` what each
planner's placement gains over EPLB's on dispatches that it has not seen. A gain counts where the
whole paired 95 % interval lies above 5 %. One passage a dispatch is where experts that are busy
together matter most; the more passages a dispatch mixes, the nearer it comes to the mean load,
which EPLB knows. Writes OUT/balancing-gain-NAME.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeprof.errors import MoeprofError
from moeprof.replay import balancing, compose
from moeprof.reporting.vocabulary import records
from moeprof.trace.reader import Trace, open_trace

DEFAULT_OUTPUT = Path("demo", "balancing-gain")
PASSAGE_CHARS = 1200
"""About 300 to 400 tokens of the built-in model: above the 256 of a dispatch that counts."""
BATCHES = (1, 2, 4)
PLANNERS = ("greedy", "anticorrelation", "eplb", "second_moment", "peak", "robust")
GOAL = 0.05
SEED = 0

_SHOWN = (
    "planner",
    "figure_class",
    "num_dispatches",
    "mean_tokens",
    "mean_max_over_mean",
    "uniform_max_over_mean",
    "floor_max_over_mean",
    "gain_over_nothing",
    "gain_over_nothing_low",
    "gain_over_nothing_high",
    "gain_over_eplb",
    "gain_over_eplb_low",
    "gain_over_eplb_high",
)


def passages(number: int) -> list[dict[str, str]]:
    """Returns the beginnings of modules and of topics, in a drawn order.

    Args:
        number: Most passages in all, at most half of them of either kind.
    """
    found = []
    for domain, texts in (("code", _modules()), ("manual", _topics())):
        # One of each text: no window sees a text that the other saw, and passes are independent.
        # Some installations hold a module twice, under two names.
        begun: dict[str, str] = {}
        for name, text in texts:
            if len(text) >= PASSAGE_CHARS:
                begun.setdefault(text[:PASSAGE_CHARS], f"{domain}-{name}")
        mine = [{"id": name, "text": text, "domain": domain} for text, name in begun.items()]
        found += mine[: number - number // 2 if domain == "code" else number // 2]
    order = np.random.default_rng(SEED).permutation(len(found))
    return [found[index] for index in order]


def _modules() -> Iterator[tuple[str, str]]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.stem, path.read_text(encoding="utf-8", errors="replace")


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def recorded(folder: Path, model: str, texts: Sequence[dict[str, str]]) -> Trace:
    """Returns a fresh recording of a model that reads the texts one by one."""
    from moeprof.recording.session import RecordOptions, record_model

    prompts = folder / "passages.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in texts), encoding="utf-8")
    path = folder / "passages.moeprof"
    record_model(
        RecordOptions(
            model=model,
            output=str(path),
            prompts=str(prompts),
            batch_size=1,
            score=True,
            profile=False,
        )
    )
    return open_trace(path)


def gains(trace: Trace, devices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns one row per batch size, number of devices and planner.

    ``chosen`` marks the planner that did best within window A: of all rows of a batch size and
    number of devices it is the one to quote, since nothing of window B picked it.

    Args:
        trace: Recorded at batch 1.
        devices: Numbers of devices.
    """
    rows = []
    for batch in BATCHES:
        composed = compose(trace, "static", max_batch=batch)
        for count in devices:
            result = balancing(composed, count, planners=PLANNERS)
            choice = result.tables["choice"].set_index("planner")["mean_max_over_mean"].dropna()
            chosen = str(choice.idxmin()) if len(choice) else None
            rows += [
                {
                    "batch": batch,
                    "num_devices": count,
                    "chosen": row["planner"] == chosen,
                    **{name: _number(row[name]) for name in _SHOWN},
                }
                for row in records(result.table)
            ]
    return rows


def _number(value: object) -> object:
    """Returns a value as JSON holds it: null where there is no number."""
    return None if isinstance(value, float) and np.isnan(value) else value


def sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what the first batch size and number of devices show, in words."""
    row = next((row for row in rows if row["chosen"]), None)
    if row is None or row["gain_over_eplb_low"] is None:
        return "Not enough passages for an interval."
    low, high = row["gain_over_eplb_low"], row["gain_over_eplb_high"]
    return (
        f"{row['planner']} loads the fullest of {row['num_devices']} devices "
        f"{100 * row['gain_over_eplb']:.1f}% (95%: {100 * low:.1f} to {100 * high:.1f}%) less than "
        f"EPLB does on {row['num_dispatches']} dispatches of {row['mean_tokens']:.0f} tokens; goal "
        f"{100 * GOAL:g}%: {'reached' if low > GOAL else 'missed'}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Records, replays, writes, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.balancing_gain",
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
    )
    parser.add_argument("--model", default="zoo:lm")
    parser.add_argument("--passages", type=int, default=400, metavar="N")
    parser.add_argument("--devices", default="8,4,16", metavar="N,N")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_OUTPUT, metavar="OUT")
    options = parser.parse_args(arguments)
    try:
        devices = [int(each) for each in options.devices.split(",")]
    except ValueError:
        parser.error(f"--devices takes whole numbers, not {options.devices!r}")
    texts = passages(options.passages)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trace = recorded(Path(folder), options.model, texts)
            rows = gains(trace, devices)
            model = trace.info.model
    except MoeprofError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    found = {
        "model": model.name,
        "dtype": model.dtype,
        "python": platform.python_version(),
        "num_passages": len(texts),
        "passages_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "interval": "95 %, paired over blocks of consecutive passes",
        "goal": GOAL,
        "finding": sentence(rows),
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.model.replace(":", "-").replace("/", "-")
    path = options.output / f"balancing-gain-{name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(found["finding"])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
