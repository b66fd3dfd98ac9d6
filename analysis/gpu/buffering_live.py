"""Runs expert buffering on a GPU at full size and holds it to the replay.

Three studies (``--studies``):

* ``qwen3-30b-a3b``: the geometry of Qwen3-30B-A3B (48 layers of 128 experts, d_model 2048, d_ff
  768, gated), random weights, under the routing of a run of that model. Public original:
  https://github.com/Helldez/BigMoeOnEdge, docs/bench-data, commit
  2d4f2b11db128cbe32da738ce114c0479542f458, Apache-2.0; turned into a trace by
  ``python -m moeprof import bigmoeonedge qwen.route.csv -o qwen3.moeprof``.
* ``mt-decoder``: the decoder of the translation model of arXiv 2303.06182 (d_model 2048, d_ff 8192,
  experts of 64 MiB), random weights, under its twin's routing, on one device of eight, each with
  the 16 experts of a layer assigned to it: the paper's points, 1 and 10 of 16. Beside the run
  stands what the replay says of all eight.
* ``zoo-lm``: the built-in language model with its own weights, under its own recorded routing. Rows
  are random: attention and gates are not run.

For every policy and capacity, and for a setting that copies experts ahead of their lookup: outputs
equal to the bit to those without a buffer, lookups equal to the ``sequential`` replay row by row,
copies counted by the profiler equal to the predicted ones of a prefill and of ``--profile-steps``
decode steps each (the misses, or what the plan says where experts are copied ahead or computed on
the host), bytes over the link, memory, and the latency of every step of every repetition. Where
experts run on the host, outputs are compared row by row with a tolerance for rounding, and shown to
fail it with wrong experts (`analysis.gpu.buffering_outputs`). That outputs show wrong experts is
seen twice more: with slots exchanged, and with every layer given the experts of the next.

The column ``checks`` reads B (outputs), H (lookups), S (slots hold what the map says), P (the
profiler), C (the copies asked for equal those predicted), A (in the timed runs, after one of all
steps, torch did not ask the driver for memory, and no more of its own was in use afterwards), M
(bytes requested on the device equal the prediction) and L (PCIe counters within 2 % of the copies);
``!`` where one of them fails, ``-`` where it was not looked at, or is not known that well.
``blocks`` are what torch's allocator hands out in a step, at most: A does not say that this is
none. ``lru+2`` copies up to 2 experts ahead after each dispatch.

    python analysis/gpu/buffering_live.py --trace qwen3.moeprof --out DIR
    python analysis/gpu/buffering_live.py --studies zoo-lm,mt-decoder --out DIR
    python analysis/gpu/buffering_live.py --tiny --out DIR     # tries the script on a CPU

Prints a table and writes DIR/buffering_live.json; fails where a check does not hold. Each study
carries its own command, date and hardware. ``--into FILE`` puts the studies that were run into
FILE, beside those that it holds from other runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from analysis.gpu.buffering_bench import Bench, Study, failed_checks, say
from analysis.gpu.evidence import evidence, write_json
from moeprof.live.routed_runs import ExpertGeometry

QWEN, MT, ZOO = "qwen3-30b-a3b", "mt-decoder", "zoo-lm"
STUDIES = (QWEN, MT, ZOO)
MT_TRACE, ZOO_TRACE = "sample:twin-mt", "sample:lm"
ZOO_REPETITIONS = 3
_PLACES = {"--out": "DIR", "--into": "FILE"}


def studies(options: argparse.Namespace) -> list[Study]:
    """Returns what to run."""
    common = {
        "stack": "decoder",
        "max_steps": options.max_steps,
        "repetitions": options.repetitions,
        "profile_steps": options.profile_steps,
    }
    every = {
        QWEN: Study(
            name=QWEN,
            trace=options.trace or "",
            geometry=ExpertGeometry(d_model=2048, d_ff=768),
            policies=("lru", "paper", "lfu", "min", "s3fifo", "arc"),
            capacities=(32, 64, 16),
            misses=(("lru", 32, "split"), ("pinned", 32, "host")),
            aheads=(("lru", 32, 2),),
            seconds=240.0,
            share_host=options.share_host,
            **common,
        ),
        MT: Study(
            name=MT,
            trace=options.mt_trace,
            geometry=ExpertGeometry(
                d_model=2048, d_ff=8192, gated=False, bias=True, activation="relu"
            ),
            policies=("paper", "lru", "min", "fifo"),
            capacities=(10, 1),
            misses=(),
            devices=options.mt_devices,
            device=options.mt_device,
            seconds=35.0,
            share_host=options.share_host,
            **common,
        ),
        ZOO: Study(
            name=ZOO,
            trace=ZOO_TRACE,
            geometry=None,
            policies=("lru", "paper", "lfu", "min"),
            capacities=(16, 24, 8),
            misses=(("lru", 16, "split"), ("pinned", 16, "host")),
            aheads=(("lru", 16, 2),),
            seconds=20.0,
            # Little is copied: what else crosses the link differs from one run to the next.
            **{**common, "repetitions": ZOO_REPETITIONS * options.repetitions},
        ),
    }
    if options.tiny:
        every = tiny(every, options)
    chosen = [every[name] for name in options.studies or every if every[name].trace]
    if options.seconds is not None:
        chosen = [replace(study, seconds=options.seconds) for study in chosen]
    return chosen


def tiny(every: dict[str, Study], options: argparse.Namespace) -> dict[str, Study]:
    """Returns the same studies at sizes that a CPU runs in seconds."""
    steps = min(options.max_steps, 12)
    gated = ExpertGeometry(d_model=64, d_ff=32, dtype=torch.float32)
    plain = replace(gated, gated=False, bias=True, activation="relu")
    return {
        QWEN: replace(
            every[QWEN], trace=options.trace or ZOO_TRACE, geometry=gated, max_steps=steps,
            policies=("paper", "min"), capacities=(8, 16),
            misses=(("lru", 8, "split"), ("pinned", 8, "host")), aheads=(("lru", 8, 2),),
        ),
        MT: replace(every[MT], geometry=plain, max_steps=steps, policies=("paper", "min")),
        ZOO: replace(every[ZOO], max_steps=steps, policies=("lru",), capacities=(24,),
                     aheads=(), repetitions=options.repetitions),
    }  # fmt: skip


def said_command(arguments: Sequence[str]) -> str:
    """Returns the command line, folders of the machine left out."""
    words = []
    before = ""
    for word in arguments:
        option, is_joined, value = word.partition("=")
        if before in _PLACES:
            words.append(_PLACES[before])
        elif is_joined and option in _PLACES:
            words.append(f"{option}={_PLACES[option]}")
        elif "trace" in before:
            words.append(Path(word).name)
        elif is_joined and "trace" in option:
            words.append(f"{option}={Path(value).name}")
        else:
            words.append(word)
        before = word
    return "python " + shlex.join(["analysis/gpu/buffering_live.py", *words])


def put_into(path: Path, found: dict[str, Any]) -> None:
    """Writes studies into a file, beside those of other names that it holds, in their order."""
    held = json.loads(path.read_text(encoding="utf-8"))["studies"] if path.exists() else {}
    every = {**held, **found}
    known = [name for name in STUDIES if name in every]
    others = [name for name in every if name not in STUDIES]
    write_json(path, {"studies": {name: every[name] for name in (*known, *others)}})


def named_studies(text: str) -> tuple[str, ...]:
    """Returns the studies of an option."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in STUDIES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; one of: {', '.join(STUDIES)}")
    return names


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    top = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    top.add_argument("--studies", type=named_studies, metavar="NAME,...",
                     help=f"of {', '.join(STUDIES)}; all, unless given")  # fmt: skip
    top.add_argument("--trace", help="routing of Qwen3-30B-A3B, a .moeprof folder")
    top.add_argument("--mt-trace", default=MT_TRACE, help="routing of a translation model")
    top.add_argument("--mt-devices", type=int, default=8, help="devices of the model's experts")
    top.add_argument("--mt-device", type=int, default=0, help="which of them runs here")
    top.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    top.add_argument("--into", type=Path, metavar="FILE", help="a result to put the studies into")
    top.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    top.add_argument("--max-steps", type=int, default=65, help="most steps of each trace")
    top.add_argument("--repetitions", type=int, default=3)
    top.add_argument("--profile-steps", type=int, default=8,
                     help="decode steps of each setting under the profiler, beside a prefill; 0: "
                     "none of either")  # fmt: skip
    top.add_argument("--seconds", type=float, help="for the settings of each study")
    top.add_argument("--share-host", action="store_true",
                     help="one host copy for all layers, each at another place of it; said in the "
                     "result")  # fmt: skip
    top.add_argument("--beside", metavar="TEXT",
                     help="what else ran on the machine, said in the result")  # fmt: skip
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs, prints and writes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    chosen = studies(options)
    if not options.tiny and not options.trace and (QWEN in (options.studies or STUDIES[:1])):
        parser().error("give --trace, --studies or --tiny")
    device = torch.device("cpu" if options.tiny else "cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    target = options.out / "buffering_live.json"
    for study in chosen:
        said = evidence(said_command(arguments), device)
        bench = Bench(study, device)
        found[study.name] = {
            **said,
            "beside": options.beside,
            "tiny": options.tiny,
            **bench.table(),
        }
        bench.close()
        # FILE may be DIR's own result, whose other studies must stay.
        if options.into is None or options.into.resolve() != target.resolve():
            write_json(target, {"studies": found})
        if options.into is not None:
            put_into(options.into, {study.name: found[study.name]})
    say(f"Wrote {target}")
    failed = [f"{name}: {line}" for name, one in found.items() for line in failed_checks(one)]
    if failed:
        raise SystemExit("did not hold: " + "; ".join(failed))


if __name__ == "__main__":
    main()
