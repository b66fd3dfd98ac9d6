"""Re-batches recorded requests into another trace.

Where nothing is dropped, a token's experts do not depend on the batch it travels in: a recording at
batch 8 answers for batch 128. What cannot be known from a recording stays null (times, memory,
executed rows). Leaves out the batching policies (`schedules`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moeprof.errors import MoeprofError, TraceError, UsageError
from moeprof.replay import capacity, rebatching, schedules
from moeprof.replay.recorded import RecordedStack, recorded_stack
from moeprof.replay.schedules import SCHEDULES, Clock, Workload
from moeprof.replay.tokens import requests_from_table
from moeprof.trace import schema
from moeprof.trace.reader import open_trace
from moeprof.trace.schema import SlotStatus
from moeprof.trace.writer import TraceWriter

if TYPE_CHECKING:
    from moeprof.trace.reader import Trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DEFAULT_BATCH = 32
HALF_PRECISION_FLIPS = (
    "of the built-in language model's choices 0.4 % (0.3 to 0.5 %) differ between batches of 1 and "
    "8 in bfloat16"
)
"""Measured on 48 prompts read, not generated, on a CPU: `python -m analysis.composing`."""
NOMINAL_STEP_S = 0.001
"""Duration of a step where no step of the recording was timed."""


def compose(
    trace: Trace,
    schedule: str = "continuous",
    *,
    max_batch: int = DEFAULT_BATCH,
    chunk: int | None = None,
    arrivals: Sequence[float] | None = None,
    mix: Mapping[str, float] | None = None,
    num_requests: int | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Trace:
    """Re-batches the requests of a trace into a trace that every analysis accepts.

    Routing stays as recorded, token by token. ``continuous``: first come, first served; each step
    holds one turn of every request that decodes, then at most ``chunk`` prompt tokens; encoders run
    on whole sources. ``static``: what `generate` does, batches of ``max_batch`` requests in order,
    prompts together, then decoding until all have ended; rows of ended requests and padding are
    left out and counted in ``num_padded_tokens``.

    Every stack has its own steps, and one step is one dispatch per site. Times cannot be known:
    ``wall_ms`` and the like are null, and ``start_s`` follows from a time per step and per token
    fitted to the recording. Executed rows, memory and scores of all experts are left out.

    Args:
        trace: The recording; all its ranks are merged into one.
        schedule: ``continuous`` or ``static``.
        max_batch: Most requests running at a time.
        chunk: Most prompt tokens per step (``continuous``); None for no limit. Prompts stay whole
            where the last layer was recorded for their last token only: what it would do at the
            end of a chunk is not known.
        arrivals: Seconds at which requests arrive, in the order of `Trace.requests` (of the
            drawing, with ``mix``); None: all at 0.
        mix: Share of each domain (or language) in the traffic. Requests are drawn: first the
            domain, then one of its requests, each once before any comes again.
        num_requests: Requests to draw with ``mix``; as many as recorded when None.
        seed: Seed of the drawing.
        path: Where to write the trace; a temporary folder that goes away with the returned object
            when None.

    Raises:
        UsageError: An option makes no sense.
        MoeprofError: The model drops tokens, so its routing depends on the batch; or ``path``
            exists.
        TraceError: The trace is damaged, or lacks ranks.
    """
    _check_options(schedule, max_batch=max_batch, chunk=chunk, num_requests=num_requests, mix=mix)
    if trace.info.missing_ranks:
        raise TraceError(
            f"the trace lacks rank {trace.info.missing_ranks[0]}",
            hint="copy the parts of all ranks into the trace",
        )
    _refuse_drops(trace)
    source = _Source.read(trace)
    drawn = source.drawn(mix, num_requests=num_requests, seed=seed)
    arrival_s = _arrivals(arrivals, len(drawn))
    order = np.argsort(arrival_s, kind="stable")
    clock, is_timed = _clock(trace)
    work = source.workload(drawn[order], arrival_s[order])
    turn_tokens = source.turn_tokens()[drawn[order]]
    if schedule == "static":
        steps = schedules.static(work, max_batch=max_batch, clock=clock, turn_tokens=turn_tokens)
    else:
        steps = schedules.continuous(
            work, max_batch=max_batch, chunk=chunk, clock=clock, turn_tokens=turn_tokens
        )
    options = {
        "schedule": schedule,
        "max_batch": max_batch,
        "chunk": chunk,
        "arrivals": None if arrivals is None else "given",
        "mix": None if mix is None else {str(name): float(share) for name, share in mix.items()},
        "num_requests": num_requests,
        "seed": seed,
    }
    info = _info(trace, options, num_repeated=len(drawn) - len(np.unique(drawn)), timed=is_timed)
    temporary = None if path is not None else tempfile.mkdtemp(prefix="moeprof-")
    target = Path(temporary, "composed.moeprof") if temporary is not None else Path(path or "")
    try:
        ids = source.ids(drawn)
        with TraceWriter.create(target, info, flush_interval_s=float("inf")) as writer:
            counts = rebatching.write_steps(
                writer, source.stacks, steps, request=drawn[order], ids=ids[order], work=work
            )
            writer.append({"requests": source.request_rows(drawn, ids, arrival_s, counts, order)})
            writer.update_info(capture=counts.capture(info))
        composed = open_trace(target)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(composed, shutil.rmtree, temporary, ignore_errors=True)
    return composed


@dataclass(frozen=True, kw_only=True, eq=False)
class _Source:
    """The recorded requests that have tokens.

    Attributes:
        table: Rows of `Trace.requests`, in order of rank and id.
        stacks: Tokens per stack.
        labels: [requests] domain or language.
        num_ranks: Ranks of the recording.
    """

    table: pd.DataFrame
    stacks: Mapping[str, RecordedStack]
    labels: NDArray[np.str_]
    num_ranks: int

    @classmethod
    def read(cls, trace: Trace) -> _Source:
        table = trace.requests
        known = requests_from_table(table, task=trace.info.model.task)
        stacks = {stack: recorded_stack(trace, stack, known.key) for stack in trace.info.stacks}
        for stack in stacks.values():
            if (stack.columns["status"] == SlotStatus.DROPPED).any():
                raise _drops(trace, "the recording dropped tokens by capacity")
        return cls(
            table=table,
            stacks=stacks,
            labels=np.array(known.labels)[known.label],
            num_ranks=len(trace.ranks),
        )

    def drawn(
        self, mix: Mapping[str, float] | None, *, num_requests: int | None, seed: int
    ) -> Ints:
        """Returns the recorded requests to serve, in order."""
        served = np.zeros(len(self.table), bool)
        for stack in self.stacks.values():
            served |= (stack.num_prompt > 0) | (stack.num_turns > 0)
        available = np.flatnonzero(served)
        if not len(available):
            raise MoeprofError("the trace holds no request with tokens")
        if mix is None:
            return available
        present = sorted({str(label) for label in self.labels[available] if label})
        unknown = [name for name in mix if name not in present]
        if unknown:
            raise UsageError(
                f"no request of the trace is of {unknown[0]!r}",
                hint=f"there are: {', '.join(present) or 'no domains'}",
            )
        shares = np.array([float(share) for share in mix.values()])
        if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
            raise UsageError("the shares of a mix must be 0 or more and not all 0")
        generator = np.random.default_rng(seed)
        count = len(available) if num_requests is None else num_requests
        domain = generator.choice(len(shares), size=count, p=shares / shares.sum())
        found = np.zeros(count, np.int64)
        for index, name in enumerate(mix):
            places = np.flatnonzero(domain == index)
            own = available[self.labels[available] == name]
            rounds = -(-len(places) // len(own))
            deck = [generator.permutation(own) for _ in range(rounds)]
            found[places] = np.concatenate([*deck, own[:0]])[: len(places)]
        return found

    def ids(self, drawn: Ints) -> Ints:
        """Returns the ids of the served requests: as recorded where that tells them apart."""
        recorded = self.table["request"].to_numpy(np.int64)[drawn]
        if len(np.unique(recorded)) == len(recorded):
            return recorded
        return np.arange(len(drawn), dtype=np.int64)

    def workload(self, drawn: Ints, arrival_s: Floats) -> Workload:
        nothing = np.zeros(len(self.table), np.int64)
        encoder, decoder = self.stacks.get("encoder"), self.stacks.get("decoder")
        sequences = self.table["num_sequences"].fillna(1).to_numpy(np.int64)
        return Workload(
            num_source=(nothing if encoder is None else encoder.num_prompt)[drawn],
            num_prompt=(nothing if decoder is None else decoder.num_prompt)[drawn],
            num_turns=(nothing if decoder is None else decoder.num_turns)[drawn],
            num_sequences=np.maximum(sequences, 1)[drawn],
            arrival_s=arrival_s,
            whole_prompts=decoder is not None and decoder.is_pruned,
        )

    def turn_tokens(self) -> Floats:
        """Returns [recorded requests] mean tokens of a decode turn."""
        decoder = self.stacks.get("decoder")
        return np.zeros(len(self.table)) if decoder is None else decoder.turn_tokens()

    def request_rows(
        self,
        drawn: Ints,
        ids: Ints,
        arrival_s: Floats,
        counts: rebatching.Written,
        order: Ints,
    ) -> dict[str, Any]:
        """Returns the columns of the table `requests`."""
        rows = self.table.iloc[drawn]
        end_s = np.empty(len(drawn))
        end_s[order] = counts.end_s
        kept = [
            column.name
            for column in schema.REQUESTS.columns
            if column.name not in ("rank", "request", "arrival_s", "end_s") and column.name in rows
        ]
        columns: dict[str, Any] = {
            name: rows[name].astype(object).where(rows[name].notna(), None).to_numpy()
            for name in kept
        }
        return {"request": ids, "arrival_s": arrival_s, "end_s": end_s, **columns}


def _check_options(
    schedule: str,
    *,
    max_batch: int,
    chunk: int | None,
    num_requests: int | None,
    mix: Mapping[str, float] | None,
) -> None:
    if schedule not in SCHEDULES:
        raise UsageError(
            f"unknown schedule {schedule!r}", hint=f"choose one of: {', '.join(SCHEDULES)}"
        )
    numbers = {"max_batch": max_batch, "chunk": chunk, "num_requests": num_requests}
    for name, number in numbers.items():
        if number is None and name != "max_batch":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
            raise UsageError(f"{name} must be a whole number from 1 up, not {number!r}")
    if schedule == "static" and chunk is not None:
        raise UsageError(
            "static batching runs prompts whole: chunk has no place in it",
            hint="leave chunk out, or use schedule='continuous'",
        )
    if num_requests is not None and mix is None:
        raise UsageError(
            "num_requests is for drawn requests", hint="give a mix, for example mix={'news': 1}"
        )
    if mix is not None and not mix:
        raise UsageError("the mix names no domain")


def _refuse_drops(trace: Trace) -> None:
    dropping = [site for site in trace.info.sites if capacity.may_drop(site)]
    if dropping:
        site = dropping[0]
        rule = site.capacity_rule
        assert rule is not None
        raise _drops(trace, f"site {site.site} has the capacity rule {rule.rule} {rule.value:g}")


def _drops(trace: Trace, reason: str) -> MoeprofError:
    return MoeprofError(
        f"{trace.info.model.name} cannot be re-batched: {reason}, and what is dropped depends on "
        "the batch",
        hint="record it at the batch size in question, or with a capacity that never drops",
    )


def _arrivals(arrivals: Sequence[float] | None, count: int) -> Floats:
    if arrivals is None:
        return np.zeros(count)
    given = np.asarray(arrivals, np.float64)
    if given.shape != (count,):
        raise UsageError(f"arrivals needs one number for each of the {count} requests")
    if not np.isfinite(given).all() or (given < 0).any():
        raise UsageError("arrivals must be seconds, 0 or more")
    return given


def _clock(trace: Trace) -> tuple[Clock, bool]:
    """Returns the time of a step fitted to the recording, and whether there was any to fit."""
    steps = trace.steps
    wall = steps["device_ms"].fillna(steps["wall_ms"])
    steps = steps[wall.notna() & ~steps["probed"]]
    if steps.empty:
        return Clock(step_s=NOMINAL_STEP_S, token_s=0.0), False
    seconds = wall[steps.index].to_numpy(np.float64) / 1000
    tokens = steps["num_tokens"].to_numpy(np.float64)
    spread = float(((tokens - tokens.mean()) ** 2).sum())
    slope = float(((tokens - tokens.mean()) * seconds).sum()) / spread if spread else 0.0
    slope = max(slope, 0.0)
    constant = float(seconds.mean() - slope * tokens.mean())
    return Clock(step_s=max(constant, float(seconds.min()) / 2, 1e-9), token_s=slope), True


def _info(
    trace: Trace, options: Mapping[str, Any], *, num_repeated: int, timed: bool
) -> schema.TraceInfo:
    said = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
    notes = [
        *trace.info.notes,
        "Re-batched from a recording: routing is as recorded, batches are not; times, memory and "
        "executed rows are unknown, and start_s is an estimate"
        + ("." if timed else " (no step of the recording was timed: 1 ms a step)."),
    ]
    if num_repeated:
        notes.append(
            f"{num_repeated} of the requests come more than once: intervals take them for "
            "independent and are too narrow."
        )
    if trace.info.model.dtype not in ("", "float32", "float64"):
        notes.append(
            f"The model computes in {trace.info.model.dtype}, where the batch itself turns near "
            f"ties round: {HALF_PRECISION_FLIPS}. Record at two batch sizes and compare them with "
            "moeprof.replay.agreement to know it for this model."
        )
    return replace(
        trace.info,
        command=f"moeprof.replay.compose(trace, {said})",
        capture=schema.CaptureCounts(num_sites=len(trace.info.sites)),
        ranks=(schema.RankInfo(),),
        missing_ranks=(),
        notes=tuple(notes),
        complete=False,
        settings={**trace.info.settings, **_score_precision(trace), "composed": dict(options)},
    )


def _score_precision(trace: Trace) -> dict[str, str]:
    """Returns the setting that keeps scores from looking more precise than they were stored."""
    stored = {
        trace.stored_type(f"routing/{stack}", name)
        for stack in trace.stacks
        for name in ("score", "selection_score")
    }
    return {"score_dtype": "float16"} if pa.float16() in stored else {}
