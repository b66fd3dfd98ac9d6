"""Runs a model at growing batch sizes under each gating, and sets the gatings beside each other.

What the headline runs of the founding paper's models (arXiv 2303.06182) share: gates that hand on
recorded choices, time and memory of a batch, where the time goes, gains at own best batches and at
equal terms. Leaves out the models, their routing and the order of things (`headline_series`).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprof.live.paper_lm import PaperGate
from moeprof.live.repetitions import repeat, wait_for

Choice = tuple[torch.Tensor, torch.Tensor]
Prepare = Callable[[int], tuple[int, Callable[[], object]]]
"""From a batch size to (tokens of a pass, a pass)."""

_FIRST_REPEATS = 2
"""Timed passes that tell how many more there may be; all there are where a pass is slow."""
_MEMORY_ENDED = ("out of memory", "ALLOC_FAILED")
"""How libraries beside torch's allocator say that memory has ended."""


@dataclass
class StepCursor:
    """Which recorded pass the gates hand on.

    Attributes:
        num_steps: Recorded passes; after the last comes the first.
        step: The pass.
    """

    num_steps: int = 1
    step: int = 0

    def advance(self) -> None:
        """Goes to the next pass."""
        self.step = (self.step + 1) % self.num_steps


class ForcedGate(nn.Module):
    """A gate that computes its own choice and hands on a recorded one.

    Args:
        gate: The model's own.
        choices: Per recorded pass, [T, k] int64 experts (-1: not executed) and [T, k] weights. For
            more tokens than that they come again from the first, written out for one layer at a
            time, so that large batches hold no choices of their own.
        cursor: Which pass; shared by the gates of a model.
    """

    def __init__(
        self, gate: PaperGate, choices: Sequence[Choice], cursor: StepCursor | None = None
    ) -> None:
        super().__init__()
        self.gate = gate
        self.choices = list(choices)
        self.cursor = cursor or StepCursor()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (ids [T, k], weights [T, k]), as `PaperGate` does."""
        self.gate(hidden)
        rows = hidden.shape[0]
        ids, weights = self.choices[self.cursor.step]
        return first_rows(ids, rows), first_rows(weights, rows).to(hidden.dtype)


def first_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns the first rows of ``tensor``, which come again where it has too few."""
    if num_rows > len(tensor):
        times = -(-num_rows // len(tensor))
        tensor = tensor.repeat(times, *[1] * (tensor.dim() - 1))
    return tensor[:num_rows]


def release(device: str) -> None:
    """Gives back what is held no more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def free_bytes(device: str) -> int | None:
    """Returns the memory that is left; None where torch does not count."""
    if device == "cpu":
        return None
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free


def memory(device: str) -> tuple[int, int]:
    """Returns (allocated, peak) bytes and forgets the peak; zeros where torch does not count."""
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now, peak


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """How long a batch may be measured, and which batches are not tried.

    Attributes:
        seconds: Time for the repetitions of a batch, within the two counts below.
        least_repeats: Fewest timed passes.
        most_repeats: Most timed passes.
        point_seconds: A batch predicted to need longer than this is not tried; None tries all.
        pass_seconds: Where batches are doubled, one that would need longer than ``point_seconds``
            runs once, for its memory, if that pass is predicted to take no longer than this.
        deadline_s: On `time.monotonic`; no batch is begun after it. None: no end.
        most_batch: Where batches are doubled, none is larger; None: no end but memory.
    """

    seconds: float = 3.0
    least_repeats: int = 4
    most_repeats: int = 20
    point_seconds: float | None = None
    pass_seconds: float = 10.0
    deadline_s: float | None = None
    most_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRuns:
    """What came of one gating.

    Attributes:
        rows: One per batch that ran or ran out of memory.
        skipped: One per batch that was not tried: gating, batch, reason.
        once: One per batch that ran a single time, for its memory: too slow to be timed.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    once: list[dict[str, Any]] = field(default_factory=list)


Grown = Callable[[str, dict[str, Any]], object]
"""Is given a list of `BatchRuns` by name, and a row that it has grown by."""


def _ignored(_: str, __: dict[str, Any]) -> None:
    pass


def run_batch(
    prepare: Prepare, batch: int, device: str, limits: RunLimits | None = None
) -> dict[str, Any]:
    """Returns times and memory of passes over ``batch`` sequences; the first pass is a warm-up.

    What ``prepare`` allocates counts as memory of the batch.
    """
    limits = limits or RunLimits()
    if device != "cpu":
        torch.cuda.empty_cache()
    before, _ = memory(device)
    num_tokens, run = prepare(batch)
    with torch.no_grad():
        first = repeat(run, device=device, repeats=_FIRST_REPEATS, warmup=1)
        _, peak = memory(device)
        wanted = int(limits.seconds * 1e3 / first.median_ms)
        repeats = max(limits.least_repeats, min(limits.most_repeats, wanted))
        times = first
        if repeats > _FIRST_REPEATS:
            times = repeat(run, device=device, warmup=0, repeats=repeats)
    return {
        "batch": batch,
        "num_tokens": num_tokens,
        **times_fields(times.times_ms, num_tokens),
        "extra_bytes": peak - before,
    }


def times_fields(times_ms: Sequence[float], num_tokens: int) -> dict[str, Any]:
    """Returns what a row says of the times of its passes."""
    median_ms = float(np.median(times_ms))
    return {
        "median_ms": median_ms,
        "p95_ms": float(np.percentile(times_ms, 95)),
        "tokens_per_s": num_tokens / median_ms * 1e3,
        "times_ms": [round(ms, 4) for ms in times_ms],
    }


def run_once(prepare: Prepare, batch: int, device: str) -> dict[str, Any]:
    """Returns memory, and the time of the only pass, over ``batch`` sequences."""
    if device != "cpu":
        torch.cuda.empty_cache()
    before, _ = memory(device)
    num_tokens, run = prepare(batch)
    wait_for(device)
    begun = time.perf_counter()
    with torch.no_grad():
        run()
    wait_for(device)
    pass_ms = (time.perf_counter() - begun) * 1e3
    _, peak = memory(device)
    return {
        "batch": batch,
        "num_tokens": num_tokens,
        "pass_ms": pass_ms,
        "extra_bytes": peak - before,
    }


def revisited(
    row: Mapping[str, Any], prepare: Prepare, device: str, repeats: int
) -> dict[str, Any]:
    """Returns a row with new times, so many; those it had are in ``sweep_times_ms``."""
    if device != "cpu":
        torch.cuda.empty_cache()
    num_tokens, run = prepare(row["batch"])
    with torch.no_grad():
        times = repeat(run, device=device, warmup=1, repeats=repeats)
    fields = times_fields(times.times_ms, num_tokens)
    return {**row, **fields, "sweep_times_ms": row["times_ms"], "revisited": True}


def attempted(run: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """Returns what ``run`` does, or why memory ended.

    Args:
        run: Measures something.
        device: Where; given back what was left over.
    """
    try:
        return run()
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        ended = any(words in str(error) for words in _MEMORY_ENDED)
        if not ended and not isinstance(error, torch.OutOfMemoryError):
            raise
    release(device)
    return {"out_of_memory": said}


def run_gating(
    name: str,
    batches: Sequence[int],
    prepare: Prepare,
    device: str,
    *,
    limits: RunLimits | None = None,
    growth: int = 1,
    grown: Grown = _ignored,
) -> BatchRuns:
    """Measures one gating at growing batches until memory ends.

    Args:
        name: Of the gating.
        batches: Ascending.
        prepare: See `Prepare`.
        device: ``cuda`` or ``cpu``.
        limits: See there.
        growth: Power of the batch with which its time and memory grow at most: 1, or 2 for a
            dispatch mask whose slots are a share of the tokens.
        grown: Called with every row, as soon as there is one.
    """
    limits = limits or RunLimits()
    found = BatchRuns()
    for index, batch in enumerate(batches):
        reason = _too_far(found.rows, batch, limits, device, growth)
        if reason:
            print(f"  {name:16s} batch {batch:5d} and larger not tried: {reason}", flush=True)
            for each in batches[index:]:
                left_out = {"gating": name, "batch": each, "reason": reason}
                found.skipped.append(left_out)
                grown("skipped", left_out)
            break
        measure = functools.partial(run_batch, prepare, batch, device, limits)
        row = {"gating": name, "batch": batch, **attempted(measure, device)}
        print(row_text(row), flush=True)
        found.rows.append(row)
        grown("rows", row)
        if "out_of_memory" in row:
            break
    return found


def row_text(row: Mapping[str, Any]) -> str:
    """Returns what came of a batch, for the terminal."""
    text = f"  {row['gating']:16s} batch {row['batch']:5d}: "
    if "out_of_memory" in row:
        return f"{text}out of memory"
    size = f"{row['extra_bytes'] / 2**30:6.2f} GiB"
    if "pass_ms" in row:
        return f"{text}{row['pass_ms']:9.2f} ms the only pass, {size}"
    return (
        f"{text}{row['median_ms']:9.2f} ms, p95 {row['p95_ms']:9.2f} of {len(row['times_ms'])},"
        f" {row['tokens_per_s'] / 1e3:7.1f} k tokens/s, {size}"
    )


def climb(
    name: str,
    before: BatchRuns,
    prepare: Prepare,
    device: str,
    *,
    limits: RunLimits,
    first_batch: int = 1,
    growth: int = 1,
    grown: Grown = _ignored,
) -> BatchRuns:
    """Doubles the batch of a gating, after the largest that ran, until memory ends.

    A batch that is predicted, from the largest before it, to take too long to be timed runs once,
    for its memory, and is timed if it was quicker than that. One that would take too long even once
    is not tried, but a larger one is where memory is predicted to end, which takes no time. A batch
    that fails otherwise ends the series, which is said.

    Args:
        name: Of the gating.
        before: What came of its batches so far.
        prepare: See `Prepare`.
        device: ``cuda`` or ``cpu``.
        limits: See there.
        first_batch: Where none has run.
        growth: See `run_gating`.
        grown: See there.

    Returns:
        What came of larger batches.
    """
    found = BatchRuns()
    own = [row for row in (*before.rows, *before.once) if row["gating"] == name]
    if any("out_of_memory" in row for row in own):
        return found
    last = max(own, key=lambda row: row["batch"], default=None)
    batch = first_batch if last is None else 2 * last["batch"]

    def add(kind: str, row: dict[str, Any]) -> None:
        getattr(found, kind).append(row)
        grown(kind, row)

    def skip(reason: str) -> None:
        print(f"  {name:16s} batch {batch:5d} not tried: {reason}", flush=True)
        add("skipped", {"gating": name, "batch": batch, "reason": reason})

    while True:
        if limits.deadline_s is not None and time.monotonic() > limits.deadline_s:
            skip("the time given to larger batches is up")
            return found
        if limits.most_batch is not None and batch > limits.most_batch:
            skip(f"larger than {limits.most_batch}, the largest that is to be tried")
            return found
        seconds, beyond = (0.0, None) if last is None else _ahead(last, batch, device, growth)
        reason = _too_long(seconds, limits)
        passes = (1 + _FIRST_REPEATS) * seconds
        is_timed = reason is None and (
            limits.point_seconds is None or passes <= limits.point_seconds
        )
        if reason and not beyond:
            skip(reason)
            if beyond is None:
                return found
            batch *= 2
            continue
        measure = functools.partial(run_once, prepare, batch, device)
        if is_timed:
            short = dataclasses.replace(limits, least_repeats=_FIRST_REPEATS)
            measure = functools.partial(run_batch, prepare, batch, device, short)
        try:
            row = {"gating": name, "batch": batch, **attempted(measure, device)}
        except RuntimeError as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            # Ends the run where the device is lost: no figure after that could be trusted.
            memory(device)
            release(device)
            skip(f"failed: {said}")
            return found
        print(row_text(row), flush=True)
        if "out_of_memory" in row:
            add("rows", row)
            return found
        add("rows" if is_timed else "once", row)
        last = row
        if is_timed or not _is_quick(row, limits):
            batch *= 2
        # Else it was quicker than predicted, as where it does not grow with the batch: timed after
        # all, where there is time.


def _ahead(
    last: Mapping[str, Any], batch: int, device: str, growth: int
) -> tuple[float, bool | None]:
    """Returns seconds of a pass over ``batch``, and whether memory ends: from an earlier batch.

    The second is None where the earlier batch does not tell.
    """
    factor = (batch / last["batch"]) ** growth
    free = free_bytes(device)
    pass_ms = last["median_ms"] if "median_ms" in last else last["pass_ms"]
    beyond = None
    if free is not None and last["extra_bytes"] > 0:
        beyond = last["extra_bytes"] * factor > free
    return pass_ms * factor / 1e3, beyond


def _is_quick(row: Mapping[str, Any], limits: RunLimits) -> bool:
    """Returns True where what ran once takes no longer than may be timed."""
    passes = (1 + _FIRST_REPEATS) * row["pass_ms"] / 1e3
    return limits.point_seconds is not None and passes <= limits.point_seconds


def _too_long(seconds: float, limits: RunLimits) -> str | None:
    """Returns why a pass that takes so long is not run even once, or None."""
    if seconds > limits.pass_seconds:
        return f"a pass predicted to take {seconds:.1f} s, more than {limits.pass_seconds:g} s"
    if limits.deadline_s is None:
        return None
    left = limits.deadline_s - time.monotonic()
    if seconds > left:
        return f"a pass predicted to take {seconds:.1f} s, more than the {left:.1f} s left"
    return None


def ending(name: str, found: BatchRuns) -> dict[str, Any]:
    """Returns how the series of a gating ended: where memory did, or why no larger batch was tried.

    ``faster_once`` are batches that ran once and gave more tokens per second than any that was
    timed: its best may lie there.

    Args:
        name: Of the gating.
        found: What came of all gatings.
    """
    rows = [row for row in found.rows if row["gating"] == name]
    skipped = [row for row in found.skipped if row["gating"] == name]
    ran = [row["batch"] for row in rows if "times_ms" in row]
    only = [row for row in found.once if row["gating"] == name and row["batch"] not in ran]
    once = [row["batch"] for row in only]
    largest = max([*ran, *once], default=0)
    out = min((row["batch"] for row in rows if "out_of_memory" in row), default=None)
    left = sorted(
        (row for row in skipped if row["batch"] not in once and row["batch"] > max(ran, default=0)),
        key=lambda row: row["batch"],
    )
    beyond = [row for row in left if row["batch"] > largest]
    if out is not None:
        said = f"out of memory at batch {out}"
        below = dict.fromkeys(row["batch"] for row in left if row["batch"] < out)
        if below:
            said += f"; not tried below it: {', '.join(map(str, below))}"
    elif beyond:
        said = f"not tried: batches from {beyond[0]['batch']} up: {beyond[0]['reason']}"
    elif largest:
        said = f"not tried: batches above {largest} come after what is judged"
    else:
        said = "not tried: its turn did not come"
    rate = max((row["tokens_per_s"] for row in rows if "tokens_per_s" in row), default=math.inf)
    return {
        "gating": name,
        "largest_timed": max(ran, default=None),
        "largest_run": largest or None,
        "faster_once": [
            row["batch"] for row in only if row["num_tokens"] / row["pass_ms"] * 1e3 > rate
        ],
        "out_of_memory_batch": out,
        "said": said,
    }


def _too_far(
    rows: Sequence[Mapping[str, Any]], batch: int, limits: RunLimits, device: str, growth: int
) -> str | None:
    """Returns why a batch is not tried, or None: judged by the batch before it."""
    if limits.deadline_s is not None and time.monotonic() > limits.deadline_s:
        return "the time given to this gating is up"
    if not rows or limits.point_seconds is None:
        return None
    last = rows[-1]
    passes = 1 + _FIRST_REPEATS
    if limits.least_repeats > _FIRST_REPEATS:
        passes += limits.least_repeats
    seconds, beyond = _ahead(last, batch, device, growth)
    seconds *= passes
    # Running out of memory takes no time: such a batch is tried, so that memory ends the series.
    if seconds > limits.point_seconds and not beyond:
        return (
            f"{passes} passes predicted to take {seconds:.1f} s, more than"
            f" {limits.point_seconds:g} s"
        )
    return None


@contextmanager
def timed_parts(model: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Records events around the parts of every layer of ``model.layers`` while it is open."""
    events: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(*_: Any) -> None:
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
            events.setdefault(name, []).append([begin, None])

        def after(*_: Any) -> None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            events[name][-1][1] = end

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for layer in model.layers:
        watch("attention", layer.attention)
        if hasattr(layer, "cross_attention"):
            watch("attention", layer.cross_attention)
        if layer.routes:
            watch("moe", layer.moe)
            watch("gate", layer.moe.gate)
        else:
            watch("dense_ffn", layer.ffn)
    if hasattr(model, "head"):
        watch("head", model.head)
    watch("all", model)
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def breakdown(model: nn.Module, name: str, batch: int, prepare: Prepare) -> dict[str, Any]:
    """Returns the time of each part of one pass, in milliseconds, medians over passes."""
    _, run = prepare(batch)
    run()
    passes = []
    for _ in range(5):
        with timed_parts(model) as events:
            run()
        torch.cuda.synchronize()
        passes.append(
            {part: sum(a.elapsed_time(b) for a, b in pairs) for part, pairs in events.items()}
        )
    parts = {part: float(np.median([each[part] for each in passes])) for part in passes[0]}
    if "moe" in parts:
        parts["dispatch_experts_combine"] = parts.pop("moe") - parts["gate"]
    print(f"  parts of {name}, batch {batch}: "
          + ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()), flush=True)  # fmt: skip
    return {"gating": name, "batch": batch, "parts_ms": parts}


def best(rows: Sequence[dict[str, Any]], gating: str) -> dict[str, Any] | None:
    """Returns the row with the most tokens per second."""
    own = [row for row in rows if row["gating"] == gating and "tokens_per_s" in row]
    return max(own, key=lambda row: row["tokens_per_s"], default=None)


def equal_terms(rows: Sequence[dict[str, Any]], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns moeprof's fastest row with no more memory and no longer p95 than ``other``."""
    equal = [
        row
        for row in rows
        if row["gating"] == "dynamic"
        and "tokens_per_s" in row
        and row["extra_bytes"] <= other["extra_bytes"]
        and row["p95_ms"] <= other["p95_ms"]
    ]
    return max(equal, key=lambda row: row["tokens_per_s"], default=None)


def headline(rows: Sequence[dict[str, Any]], gatings: Sequence[str]) -> list[dict[str, Any]]:
    """Compares moeprof's gating with each other at its own best batch and at equal terms.

    Equal terms: ours at the batch with the most tokens per second among those that need no more
    memory and no longer at the 95th percentile than the baseline at its own best batch.
    """
    top = best(rows, "dynamic")
    compared = []
    for name in gatings:
        other = best(rows, name)
        if name == "dynamic" or other is None or top is None:
            continue
        fair = equal_terms(rows, other)
        repetitions = {
            "baseline_repetitions": len(other["times_ms"]),
            "best_repetitions": len(top["times_ms"]),
            "equal_terms_repetitions": len(fair["times_ms"]) if fair else None,
        }
        compared.append(
            {
                "baseline": name,
                "baseline_batch": other["batch"],
                "baseline_tokens_per_s": other["tokens_per_s"],
                "best_batch": top["batch"],
                "gain_at_own_best": top["tokens_per_s"] / other["tokens_per_s"],
                "equal_terms_batch": fair["batch"] if fair else None,
                "gain_at_equal_terms": (
                    fair["tokens_per_s"] / other["tokens_per_s"] if fair else None
                ),
                **repetitions,
                "baseline_p95_ms": other["p95_ms"],
                "equal_terms_p95_ms": fair["p95_ms"] if fair else None,
            }
        )
    return compared


def print_headline(compared: Sequence[Mapping[str, Any]]) -> None:
    """Prints the gains, a line each."""
    for row in compared:
        fair = row["gain_at_equal_terms"]
        print(
            f"against {row['baseline']}: {row['gain_at_own_best']:.2f}x at its own best batch,"
            f" {f'{fair:.2f}x' if fair else 'not to be had'} at equal memory and p95; repetitions:"
            f" {row['best_repetitions']} over {row['baseline_repetitions']},"
            f" {row['equal_terms_repetitions'] or 'none'} at equal terms",
            flush=True,
        )
