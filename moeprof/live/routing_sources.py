"""Routing to drive a model or a stack of layers with, on the host, and where it comes from.

Reads it from a trace: step after step, the expert ids and weights of every site. Leaves out
bringing it to a device (`routing_schedules`) and into a model (`forcing`), and made-up routing
(`routing_controls`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeprof.errors import UsageError
from moeprof.trace import schema
from moeprof.trace.blocks import stream_rows
from moeprof.trace.parts import StepFilter
from moeprof.trace.reader import Trace
from moeprof.trace.schema import NO_EXPERT, SlotStatus

Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Floats = NDArray[np.float32]

WEIGHTS = ("recorded", "uniform")
_UNSEEN = (SlotStatus.PRUNED_LAST_LAYER, SlotStatus.EARLY_EXIT)


@dataclass(frozen=True, kw_only=True)
class RoutingSource:
    """Where routing comes from; every figure made under it names this.

    Attributes:
        kind: ``recorded``, ``synthetic`` (a made-up trace), ``uniform`` or ``skewed``.
        name: The trace, or the law of a control.
        model: The model that was recorded; empty for a control.
        random_weights: True where that model was never trained: its routing means nothing.
        geometry: Sites, experts and slots, by stack.
        num_requests: Requests whose tokens are used; 0 for a control.
        num_steps: Forward passes, all stacks together.
        num_tokens: Tokens, all stacks together.
        weights: Which weights the experts' outputs get.
        selection: What of the trace is used; empty for all of it.
        changes: What was done to it since it was recorded, in order.
        origin: Format, repository, commit, licence and the like of what is public.
        seed: Of a control.
        exponent: Zipf exponent of a control; 0 is uniform.
    """

    kind: str
    name: str
    model: str = ""
    random_weights: bool = False
    geometry: tuple[str, ...] = ()
    num_requests: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    weights: str = ""
    selection: str = ""
    changes: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    exponent: float | None = None

    def __str__(self) -> str:
        parts = [*self.geometry]
        if self.model:
            untrained = ", random weights: its routing means nothing" if self.random_weights else ""
            parts.append(f"model {self.model}{untrained}")
        counts = [(self.num_requests, "request"), (self.num_steps, "step")]
        counts.append((self.num_tokens, "token"))
        parts.append(", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts if n))
        parts += [self.selection, f"weights {self.weights}" if self.weights else "", *self.changes]
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        parts += [f"{name}: {value}" for name, value in self.origin.items()]
        return f"{self.kind} routing {self.name} ({'; '.join(part for part in parts if part)})"

    def changed(self, *changes: str) -> RoutingSource:
        """Returns the source with more said of what was done to it."""
        return dataclasses.replace(self, changes=(*self.changes, *changes))

    def to_json(self) -> dict[str, Any]:
        """Returns plain data for a results file, the sentence included."""
        plain = dataclasses.asdict(self)
        return {**plain, "origin": dict(self.origin), "description": str(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteRouting:
    """What one site computes with, pass after pass.

    Attributes:
        site: Site id in the trace.
        layer: Model layer inside the stack.
        num_experts: Routed experts.
        top_k: Slots per token.
        starts: [steps + 1] first row of each pass in the arrays below.
        experts: [rows, top_k] int32, -1 in slots without an expert.
        weights: [rows, top_k] float32, 0 in slots without an expert.
        tokens: [rows] index of the token in the stack; None where the site saw every token.
        places: [rows] row in the batch the module was called with, padding counted.
        num_rows: [steps] rows of that batch.
        stack_places: [rows] row in the batch the stack was called with; the same but where a last
            layer sees only the last token of each sequence.
        num_stack_rows: [steps] rows of that batch; -1 where the trace does not tell.
    """

    site: int
    layer: int
    num_experts: int
    top_k: int
    starts: Ints
    experts: Ids
    weights: Floats
    tokens: Ints | None
    places: Ints
    num_rows: Ints
    stack_places: Ints
    num_stack_rows: Ints

    def __post_init__(self) -> None:
        """Refuses what is no routing of that many experts and slots."""
        expected = (len(self.places), self.top_k)
        if self.experts.shape != expected or self.weights.shape != expected:
            raise UsageError(
                f"site {self.site}: experts {self.experts.shape} and weights {self.weights.shape} "
                f"are not of {expected[0]} tokens in {expected[1]} slots",
                hint="both are [rows, top_k], as places is [rows]",
            )
        if not self.experts.size:
            return
        low, high = int(self.experts.min()), int(self.experts.max())
        if low < NO_EXPERT or high >= self.num_experts:
            raise UsageError(
                f"site {self.site}: expert {high if high >= self.num_experts else low} is none of "
                f"the {self.num_experts} that it has",
                hint=f"ids go from 0 to {self.num_experts - 1}, {NO_EXPERT} in an empty slot",
            )

    @property
    def has_empty_slots(self) -> bool:
        """True where some token has a slot without an expert."""
        return bool((self.experts < 0).any())


@dataclass(frozen=True, kw_only=True, eq=False)
class StackRouting:
    """The passes of one stack.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        sites: In order of execution.
        starts: [steps + 1] first token of each pass.
        steps: [steps] step number in the trace.
        phases: [steps] encode, prefill, decode or mixed.
    """

    stack: str
    sites: tuple[SiteRouting, ...]
    starts: Ints
    steps: Ints
    phases: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_tokens(self) -> Ints:
        """[steps] tokens of each pass."""
        return np.diff(self.starts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Routing of every stack.

    Attributes:
        stacks: By name, encoder first.
        source: Where it comes from.
    """

    stacks: Mapping[str, StackRouting]
    source: RoutingSource

    @property
    def num_steps(self) -> int:
        """Passes of all stacks."""
        return sum(len(stack) for stack in self.stacks.values())

    def stack(self, name: str | None = None) -> StackRouting:
        """Returns one stack; its name may be left out where there is one only.

        Raises:
            UsageError: There is no such stack, or several to choose from.
        """
        if name is None and len(self.stacks) == 1:
            return next(iter(self.stacks.values()))
        if name is None or name not in self.stacks:
            what = "name a stack" if name is None else f"there is no stack {name!r}"
            raise UsageError(what, hint=f"stacks of this routing: {', '.join(self.stacks)}")
        return self.stacks[name]


def read_routing(
    trace: Trace,
    *,
    stacks: Sequence[str] | None = None,
    sites: Sequence[int] | None = None,
    steps: Any = None,
    phase: str | None = None,
    rank: int | None = None,
    weights: str = "recorded",
    origin: Mapping[str, str] | None = None,
) -> Routing:
    """Returns the routing of a trace, or of a part of it, on the host.

    Args:
        trace: A recording, an imported or a composed trace.
        stacks: Stacks wanted; all when None.
        sites: Site ids wanted, in the order in which they drive; a stack of fewer layers takes
            fewer. All when None.
        steps: Steps wanted: a step, a slice (stop excluded), a range or a collection.
        phase: Only passes of this phase: encode, prefill, decode or mixed.
        rank: Rank whose passes are taken; needed where several recorded.
        weights: ``recorded``; or ``uniform``, 1 / slots of each token, which is also what a trace
            without weights gets.
        origin: Where the public original is (repository, commit, licence), if the trace does not
            say; becomes part of the source.

    Raises:
        UsageError: There is no such stack, site, rank or weights, or nothing is left.
        TraceError: The trace is damaged.
    """
    if weights not in WEIGHTS:
        raise UsageError(
            f"unknown weights {weights!r}", hint=f"choose one of: {', '.join(WEIGHTS)}"
        )
    names = trace.stacks if stacks is None else tuple(stacks)
    for name in names:
        if name not in trace.stacks:
            raise UsageError(
                f"the trace has no stack {name!r}", hint=f"it has: {', '.join(trace.stacks)}"
            )
    chosen = _chosen_sites(trace, names, sites)
    rank = _rank(trace, rank)
    reading = _Reading(
        rank=rank, steps=StepFilter.of(steps), phase=phase, uniform=weights != "recorded"
    )
    read = {name: _read_stack(trace, name, own, reading) for name, own in chosen.items() if own}
    if not any(len(stack.steps) for stack, *_ in read.values()):
        raise UsageError("no step of the trace is left", hint="check steps, phase and stacks")
    uniform = sorted({said for _, said, _ in read.values()})
    requests = np.unique(np.concatenate([found for _, _, found in read.values()]))
    routing = {name: stack for name, (stack, _, _) in read.items()}
    selected = []
    if stacks is not None:
        selected.append("+".join(routing))
    if sites is not None:
        selected.append(f"sites {_listed(sites)}")
    if steps is not None:
        selected.append(f"{sum(map(len, routing.values()))} of {_num_steps(trace, rank)} steps")
    if phase is not None:
        selected.append(f"{phase} passes only")
    if len(trace.ranks) > 1:
        selected.append(f"rank {rank}")
    source = dataclasses.replace(
        _source_of(trace),
        geometry=geometry_of(routing),
        num_requests=len(requests),
        num_steps=sum(map(len, routing.values())),
        num_tokens=sum(int(stack.starts[-1]) for stack in routing.values()),
        weights=" and ".join(uniform),
        selection=", ".join(selected),
    )
    source = source.changed(*_partial(routing))
    if origin is not None:
        source = dataclasses.replace(source, origin={**source.origin, **origin})
    return Routing(stacks=routing, source=source)


def geometry_of(stacks: Mapping[str, StackRouting]) -> tuple[str, ...]:
    """Returns one phrase per stack: how many sites of how many experts and slots."""
    said = []
    for name, stack in stacks.items():
        shapes = dict.fromkeys((site.num_experts, site.top_k) for site in stack.sites)
        sizes = " or ".join(f"{experts} experts top-{k}" for experts, k in shapes)
        said.append(f"{name}: {len(stack.sites)} sites of {sizes}")
    return tuple(said)


def _partial(stacks: Mapping[str, StackRouting]) -> list[str]:
    """Returns what must be said of sites that saw fewer tokens than others."""
    said = []
    for name, stack in stacks.items():
        for site in stack.sites:
            if site.tokens is not None:
                said.append(
                    f"{name} layer {site.layer} was recorded for {len(site.tokens)} of "
                    f"{int(stack.starts[-1])} tokens"
                )
    return said


@dataclass(frozen=True)
class _Reading:
    """What is read of every stack."""

    rank: int
    steps: StepFilter
    phase: str | None
    uniform: bool


def _chosen_sites(
    trace: Trace, stacks: Sequence[str], sites: Sequence[int] | None
) -> dict[str, list[schema.Site]]:
    """Returns the sites wanted of each stack, in the order wanted."""
    if sites is None:
        return {name: list(trace.info.sites_of(name)) for name in stacks}
    known = {site.site: site for name in stacks for site in trace.info.sites_of(name)}
    for site in sites:
        if site not in known:
            raise UsageError(
                f"the trace has no site {site} in {'+'.join(stacks)}",
                hint=f"site ids are {min(known)} to {max(known)}",
            )
    wanted = [known[site] for site in sites]
    return {name: [site for site in wanted if site.stack == name] for name in stacks}


def _rank(trace: Trace, rank: int | None) -> int:
    if rank is None and len(trace.ranks) == 1:
        return trace.ranks[0]
    if rank is None:
        raise UsageError(
            f"{len(trace.ranks)} ranks recorded this trace, each its own passes",
            hint="say whose passes drive the model, e.g. rank=0, or merge them with "
            "moeprof.replay.compose",
        )
    if rank not in trace.ranks:
        known = ", ".join(map(str, trace.ranks))
        raise UsageError(f"the trace has no rank {rank}", hint=f"it has: {known}")
    return rank


def _num_steps(trace: Trace, rank: int) -> int:
    return int((trace.steps["rank"] == rank).sum())


def _read_stack(
    trace: Trace, name: str, sites: Sequence[schema.Site], reading: _Reading
) -> tuple[StackRouting, str, Ints]:
    """Returns the routing of a stack, which weights it has, and the requests in it."""
    frame = trace.steps
    frame = frame[(frame["rank"] == reading.rank) & (frame["stack"] == name)].sort_values("step")
    frame = frame[reading.steps.mask(frame["step"].to_numpy())]
    if reading.phase is not None:
        frame = frame[frame["phase"] == reading.phase]
    step = frame["step"].to_numpy().astype(np.int64)
    table = f"routing/{name}"
    weighted = not reading.uniform and trace.has_column(table, "weight")
    slots = np.concatenate([np.arange(s.first_slot, s.first_slot + s.top_k) for s in sites])
    rows = _token_rows(trace, name, step, slots, reading.rank, weighted=weighted)
    starts = np.searchsorted(rows["step"], np.append(step, np.iinfo(np.int64).max)).astype(np.int64)
    routed = rows["status"] == SlotStatus.ROUTED
    experts = np.where(routed, rows["expert"], NO_EXPERT).astype(np.int32)
    said = "as recorded"
    if not weighted or not rows["weight"][routed].any():
        said = "1/slots each" + ("" if reading.uniform else ", as none were recorded")
        rows["weight"] = _uniform_weights(experts, sites)
    weight = np.where(routed, rows["weight"], 0).astype(np.float32)
    batches = _Batches(
        batch=frame["batch"].to_numpy().astype(np.int64),
        num_rows=(frame["num_tokens"] + frame["num_padded_tokens"]).to_numpy().astype(np.int64),
    )
    found = []
    first = 0
    for site in sites:
        own = slice(first, first + site.top_k)
        first += site.top_k
        seen = np.logical_not(np.isin(rows["status"][:, own], _UNSEEN).all(axis=1))
        found.append(
            _site_routing(site, starts, rows["row"], seen, experts[:, own], weight[:, own], batches)
        )
    stack = StackRouting(
        stack=name,
        sites=tuple(found),
        starts=starts,
        steps=step,
        phases=tuple(str(phase) for phase in frame["phase"]),
    )
    return stack, said, np.unique(rows["request"]).astype(np.int64)


def _token_rows(
    trace: Trace, stack: str, step: Ints, slots: Ints, rank: int, *, weighted: bool
) -> dict[str, NDArray[Any]]:
    """Returns the tokens of the chosen steps, in order of execution."""
    parts = [
        part
        for log in trace.logs
        if log.rank == rank
        for part in log.parts
        if part.table == f"routing/{stack}"
    ]
    lists = ("expert", "status", *(("weight",) if weighted else ()))
    pieces = []
    for rows in stream_rows(
        trace.store,
        parts,
        num_slots=trace.info.num_slots(stack),
        weights=weighted,
        extra=("row",),
    ):
        keep = np.isin(rows["step"], step)
        piece = {name: rows[name][keep] for name in ("step", "row", "request")}
        pieces.append(piece | {name: rows[name][keep][:, slots] for name in lists})
    if not pieces:
        empty: dict[str, NDArray[Any]] = {
            name: np.zeros(0, np.int64) for name in ("step", "row", "request")
        }
        return empty | {name: np.zeros((0, len(slots)), np.int16) for name in lists}
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _uniform_weights(experts: Ids, sites: Sequence[schema.Site]) -> Floats:
    """Returns 1 / (slots with an expert) of each token and site."""
    weights = np.zeros(experts.shape, np.float32)
    first = 0
    for site in sites:
        own = slice(first, first + site.top_k)
        first += site.top_k
        used = experts[:, own] >= 0
        weights[:, own] = used / np.maximum(used.sum(axis=1, keepdims=True), 1)
    return weights


@dataclass(frozen=True)
class _Batches:
    """Sizes of the batches a stack was called with.

    Attributes:
        batch: [steps] rows of the batch.
        num_rows: [steps] tokens of the batch, padding counted.
    """

    batch: Ints
    num_rows: Ints


def _site_routing(
    site: schema.Site,
    starts: Ints,
    row: Ints,
    seen: NDArray[np.bool_],
    experts: Ids,
    weights: Floats,
    batches: _Batches,
) -> SiteRouting:
    """Returns what one site computes with; tokens it did not see are left out."""
    everything = bool(seen.all())
    before = np.concatenate([[0], np.cumsum(seen)])
    own = before[starts]
    of_step = np.repeat(np.arange(len(starts) - 1), np.diff(own))
    row = row[seen].astype(np.int64)
    # A last layer may be called with the last token of every row of the batch only.
    pruned = (np.diff(own) < np.diff(starts)) & (
        batches.num_rows % np.maximum(batches.batch, 1) == 0
    )
    columns = np.where(pruned, batches.num_rows // np.maximum(batches.batch, 1), 1)
    places = row // columns[of_step]
    num_rows = np.where(pruned, batches.batch, batches.num_rows)
    # Where rows do not tell, tokens lie one after another.
    doubtful = _doubtful(places, of_step, num_rows)
    ordinal = np.arange(len(row)) - own[:-1][of_step]
    unknown = _doubtful(row, of_step, batches.num_rows)
    return SiteRouting(
        site=site.site,
        layer=site.layer,
        num_experts=site.num_experts,
        top_k=site.top_k,
        starts=own,
        experts=np.ascontiguousarray(experts[seen]),
        weights=np.ascontiguousarray(weights[seen]),
        tokens=None if everything else np.flatnonzero(seen),
        places=np.where(doubtful[of_step], ordinal, places),
        num_rows=np.where(doubtful, np.diff(own), num_rows),
        stack_places=row,
        num_stack_rows=np.where(unknown, -1, batches.num_rows),
    )


def _doubtful(places: Ints, of_step: Ints, num_rows: Ints) -> NDArray[np.bool_]:
    """Returns [steps] True where places are no ascending rows of a batch of that size."""
    doubtful = np.zeros(len(num_rows), bool)
    doubtful[of_step[places >= num_rows[of_step]]] = True
    twice = (np.diff(places) <= 0) & (np.diff(of_step) == 0)
    doubtful[of_step[1:][twice]] = True
    return doubtful


def trace_name(trace: Trace) -> str:
    """Returns the last part of a trace's path."""
    return re.split(r"[/\\]", str(trace.path).rstrip("/\\"))[-1]


def _source_of(trace: Trace) -> RoutingSource:
    """Returns what a trace says of itself."""
    info = trace.info
    kind = "synthetic" if info.mode == "synthetic" else "recorded"
    changes = [note for note in info.notes if "not the model's own choice" in note]
    composed = info.settings.get("composed")
    if isinstance(composed, Mapping):
        said = ", ".join(f"{name}={value}" for name, value in composed.items() if value is not None)
        changes.append(f"re-batched from its requests: {said}")
        changes += [note for note in info.notes if "come more than once" in note]
    origin = dict(info.origin)
    if kind == "synthetic":
        law = info.settings.get("synthetic", {})
        origin |= {str(name): str(value) for name, value in law.items()}
    return RoutingSource(
        kind=kind,
        name=trace_name(trace),
        model="" if kind == "synthetic" else info.model.name,
        random_weights=info.model.random_weights and kind != "synthetic",
        changes=tuple(change.rstrip(".") for change in changes),
        origin=origin,
    )


def _listed(values: Sequence[int]) -> str:
    """Returns ids as text, runs shortened."""
    numbers = list(values)
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
